use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use crate::error::{Error, Kind, Result};
use crate::host::access;
use crate::keeper::{self, Hooks, KeeperConfig};

/// The keeper of one volume; started by attach, not by hand
#[derive(Debug, Clone, Args)]
pub struct KeeperArgs {
    /// The run folder of the volume
    #[arg(long, value_name = "DIR")]
    volume_run_dir: PathBuf,
}

pub fn run(args: &KeeperArgs) -> u8 {
    let hooks = Hooks { before_restart: Some(Arc::new(still_ours)) };
    let code = keeper::main(&args.volume_run_dir, hooks);
    u8::from(code != std::process::ExitCode::SUCCESS)
}

/// Before a ZeroFS that died is started again: it would fence whoever owns the volume by now, since with ZeroFS the
/// newcomer wins. The catalog's attach epoch says who that is.
fn still_ours(config: &KeeperConfig) -> Result<()> {
    let folder = config.config_path.parent().unwrap_or(&config.run_dir);
    let (url, s3) = access::load(folder)?
        .ok_or_else(|| Error::failed(format!("{} has no record of where its store is", folder.display())))?;
    let (record, _) = crate::catalog::open(&url, &s3)?
        .get(&config.volume)?
        .ok_or_else(|| Error::refused("its catalog record has disappeared"))?;
    if record.epoch == config.epoch {
        return Ok(());
    }
    let by = record.owner.map_or_else(|| "somebody who has let go of it again".to_owned(), |o| o.to_string());
    Err(Error::new(
        Kind::Conflict,
        format!("it was taken over by {by} (epoch {}, ours is {})", record.epoch, config.epoch),
    ))
}
