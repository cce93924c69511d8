//! How block devices are made: the options of every command that makes some.

use std::time::Duration;

use clap::Args;

use super::attach::time;
use crate::error::{Error, Result};
use crate::host::{IoPath, Made, Transport};

/// See the module.
#[derive(Debug, Clone, Args)]
pub struct DeviceArgs {
    /// How the block device is made: nbd (by the kernel), fuse, or auto, which takes nbd where it works
    #[arg(long, value_name = "KIND", default_value = "auto")]
    transport: String,
    /// For nbd: guarded (a crash of ZeroFS is only a pause) or direct (it fails the device)
    #[arg(long, value_name = "KIND", default_value = "guarded")]
    path: String,
    /// For nbd: how long the kernel holds I/O while no keeper serves the device
    #[arg(long, value_name = "TIME", default_value = "10m")]
    reconnect_timeout: String,
}

impl DeviceArgs {
    /// Checks every value.
    pub(super) fn check(&self) -> Result<Made> {
        let mut transport: Transport = self.transport.parse()?;
        let path: IoPath = self.path.parse()?;
        match (path, transport) {
            (IoPath::Direct, Transport::Fuse) => {
                return Err(Error::usage("--path direct and --transport fuse exclude each other")
                    .hint("the direct path is one of the kernel's NBD client: use --transport nbd"));
            }
            (IoPath::Direct, _) => transport = Transport::Nbd,
            (IoPath::Guarded, _) => {}
        }
        let reconnect_timeout = time("--reconnect-timeout", &self.reconnect_timeout)?;
        if !(Duration::from_secs(1)..=Duration::from_secs(7 * 24 * 3600)).contains(&reconnect_timeout) {
            return Err(Error::usage("--reconnect-timeout is out of range")
                .hint("give between 1s and 7days; 10m suits most nodes"));
        }
        Ok(Made { transport, path, reconnect_timeout })
    }
}
