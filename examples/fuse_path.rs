//! A bench helper: serves the NBD socket `RUN_DIR/nbd.sock` as `MOUNT_DIR/disk` until standard input ends.
//!
//! `fuse_path RUN_DIR EXPORT MOUNT_DIR [CONNECTIONS [LOG_BYTES]]`; the server must never be restarted.

use std::io::Read;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use zerofsctl::error::Result;
use zerofsctl::keeper::path::{DataPath, DataPathConfig, Prober};

struct AlwaysFine;

impl Prober for AlwaysFine {
    fn database_open(&self) -> Result<bool> {
        Ok(true)
    }
    fn flush_was_honest(&self, _: Instant) -> bool {
        true
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let number = |i: usize, default| args.get(i).map_or(default, |n| n.parse().expect("a number"));
    let config = DataPathConfig {
        run_dir: PathBuf::from(&args[1]),
        export: args[2].clone(),
        connections: number(4, 4) as usize,
        log_bytes: number(5, 256 << 20),
        io_timeout: None,
        volume: "bench".parse()?,
        epoch: 1,
        zeros_when_closed: false,
        replay_log: true,
    };
    let (events, told) = mpsc::channel();
    let path = DataPath::new(config, Arc::new(AlwaysFine), events)?;
    path.server_up()?;
    path.mount_fuse(args[3].as_ref())?;
    println!("ready {}", path.size());
    let _ = std::io::stdin().read(&mut [0]);
    println!("{}", serde_json::to_string(&path.stats()).expect("plain numbers"));
    while let Ok(event) = told.try_recv() {
        println!("{event:?}");
    }
    path.flush()?;
    path.unmount_fuse()
}
