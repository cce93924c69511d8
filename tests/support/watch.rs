//! `zerofsctl watch`, as a unit of systemd or a person at a terminal would run it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cli::Node;
use super::wait_until;

/// Long enough for any machine.
const LONG: Duration = Duration::from_secs(120);

/// `zerofsctl watch`, until it is dropped.
pub struct Watch {
    child: Child,
    log: PathBuf,
}

impl Watch {
    /// Starts it, and returns when it watches.
    #[track_caller]
    pub fn start(node: &Node) -> Watch {
        let log = node.dir.join("watch.log");
        let mut command = node.command(&["watch", "--log-format", "json"]);
        let child = command.stderr(File::create(&log).unwrap()).stdout(Stdio::null()).spawn().unwrap();
        let watch = Watch { child, log };
        watch.wait_for("watching", 1);
        watch
    }

    /// Waits until it has told of an event so many times.
    #[track_caller]
    pub fn wait_for(&self, event: &str, times: usize) {
        wait_until(&format!("{times} {event} of the watcher"), LONG, || self.count(event) >= times);
    }

    /// How many times it has told of an event.
    pub fn count(&self, event: &str) -> usize {
        let text = fs::read_to_string(&self.log).unwrap();
        // The last line may still be on its way.
        let lines = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
        lines.filter(|l| l["event"] == event).count()
    }

    /// SIGTERM; it must end with success, and leave the keepers alone.
    #[track_caller]
    pub fn stop(mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {}", fs::read_to_string(&self.log).unwrap());
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // After a stop there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
