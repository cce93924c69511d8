//! What our own run folder says of NBD devices: keepers, journals, locks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::survey::{Owners, Server};
use crate::journal::{self, volume_folder};
use crate::keeper::client::KeeperClient;
use crate::keeper::device::Record;
use crate::keeper::process::Identity;
use crate::keeper::{PID_FILE, ZEROFS_PID_FILE};
use crate::values::VolumeId;

/// See the module.
#[derive(Debug, Clone)]
pub struct RunDir {
    run: PathBuf,
    limit: Duration,
}

impl RunDir {
    /// The run root, usually `/run/zerofsctl`; `limit` is how long all keepers together may take to answer.
    pub fn new(run: &Path, limit: Duration) -> RunDir {
        RunDir { run: run.to_owned(), limit }
    }
}

/// The process that a pid file names, while it runs.
fn alive(file: &Path) -> Option<u32> {
    Identity::read(file).filter(Identity::is_alive).and_then(|i| u32::try_from(i.pid).ok())
}

impl Owners for RunDir {
    fn servers(&self, volumes: &[VolumeId]) -> BTreeMap<VolumeId, Server> {
        let deadline = Instant::now() + self.limit;
        // All are asked before the first answer is waited for: a stopped keeper must not delay the others' answers.
        let asked: Vec<(&VolumeId, PathBuf, Option<KeeperClient>)> = volumes
            .iter()
            .map(|volume| {
                let folder = volume_folder(&self.run, volume);
                let client = KeeperClient::connect_within(&folder, self.limit)
                    .and_then(|mut client| client.ask_status().map(|()| client));
                (volume, folder, client.ok())
            })
            .collect();
        let answer = |(volume, folder, client): (&VolumeId, PathBuf, Option<KeeperClient>)| {
            let status = client.and_then(|mut client| client.status_by(deadline).ok());
            let server = match status {
                Some(status) => {
                    let nbd = status.nbd.as_ref();
                    Server {
                        keeper: u32::try_from(status.keeper.pid).ok(),
                        answers: true,
                        zerofs: status.zerofs.and_then(|z| u32::try_from(z.pid).ok()),
                        state: Some(status.state.name().to_owned()),
                        index: nbd.and_then(|n| n.index),
                        connected: nbd.map(|n| n.connected),
                        reconnects: nbd.map(|n| n.reconnects),
                        dead_links: nbd.map(|n| n.dead_connections),
                        elsewhere: None,
                    }
                }
                None => Server {
                    keeper: alive(&folder.join(PID_FILE)),
                    zerofs: alive(&folder.join(ZEROFS_PID_FILE)),
                    ..Server::default()
                },
            };
            (volume.clone(), server)
        };
        asked.into_iter().map(answer).collect()
    }

    fn recorded(&self) -> BTreeMap<u32, Vec<(VolumeId, Option<u32>)>> {
        let mut found: BTreeMap<u32, Vec<_>> = BTreeMap::new();
        for volume in journal::volumes(&self.run).unwrap_or_default() {
            let record = Record::read(&volume_folder(&self.run, &volume)).unwrap_or_else(|e| {
                tracing::warn!(volume = %volume, "{e}");
                None
            });
            if let Some(record) = record
                && let Some(index) = record.index
            {
                let pid = record.pid.and_then(|pid| u32::try_from(pid).ok());
                found.entry(index).or_default().push((volume, pid));
            }
        }
        found
    }

    fn at_work(&self, volume: &VolumeId) -> Option<i32> {
        journal::holder(&self.run, volume).filter(|pid| *pid != std::process::id() as i32)
    }
}
