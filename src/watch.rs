//! The watcher of a node: it starts the next keeper for every volume of a run folder whose keeper died while its NBD device
//! stands. `zerofsctl watch` runs it, and so may any other long-running process of ours, on a thread.
//!
//! It sleeps until something happens: a keeper's end (its pidfd), a new keeper (inotify on the run folders), a stop. It
//! never touches a volume whose lock an operation holds, but looks again a little later; and what keeps failing it tries
//! ever more rarely. Keepers outlive it: each has a session of its own.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::error::{Doing, Error, Kind, Result};
use crate::file_lock::{self, Taken};
use crate::host::linux::{Dirs, LinuxHost};
use crate::host::{Life, Observe, device};
use crate::journal;
use crate::keeper::PID_FILE;
use crate::keeper::process::{Identity, Process};
use crate::ops::{self, take_over::TakeOver};
use crate::run::{Engine, Silent};
use crate::values::VolumeId;

/// A look at everything, should an event ever be lost.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// How long to leave a volume alone that an operation holds; doubled up to [`BUSY_MOST`].
const BUSY_LEAST: Duration = Duration::from_millis(50);
const BUSY_MOST: Duration = Duration::from_secs(1);

/// After a failure; doubled with each further one up to [`BACK_OFF_MOST`].
const BACK_OFF: Duration = Duration::from_millis(500);
const BACK_OFF_MOST: Duration = Duration::from_secs(60);

/// A keeper that died so soon after it was started has failed, too.
const SOON: Duration = Duration::from_secs(10);

/// What the watcher needs to know and do about volumes. Called on several threads.
pub trait Volumes: Send + Sync + 'static {
    /// Whether an NBD device of the volume stands here. Quick, and without asking anybody.
    fn has_device(&self, volume: &VolumeId) -> Result<bool>;
    /// Starts the next keeper, if the device waits for one. May take as long as ZeroFS needs to start.
    fn take_over(&self, volume: &VolumeId) -> Result<TakeOver>;
}

/// Something to tell.
#[derive(Debug)]
pub enum Event {
    /// It watches.
    Watching {
        /// The volumes that are here.
        volumes: usize,
    },
    /// A keeper died, and its device waits.
    Died {
        /// Of which volume.
        volume: VolumeId,
        /// The keeper's process.
        pid: i32,
    },
    /// The next keeper serves the device.
    TookOver {
        /// Of which volume.
        volume: VolumeId,
        /// Since the death was noticed.
        elapsed: Duration,
    },
    /// An operation holds the volume, which is left alone until that has ended.
    Held {
        /// Which volume.
        volume: VolumeId,
        /// The operation's process.
        pid: i32,
    },
    /// The device only gives errors: nothing that a keeper could take over.
    Wreck {
        /// Of which volume.
        volume: VolumeId,
    },
    /// It did not work, and is tried again.
    Failed {
        /// With which volume.
        volume: VolumeId,
        /// Why.
        error: Error,
        /// When it is tried again.
        again: Duration,
    },
    /// It was asked to end.
    Stopping,
}

impl Event {
    /// A stable name: `took-over`.
    pub fn name(&self) -> &'static str {
        match self {
            Event::Watching { .. } => "watching",
            Event::Died { .. } => "died",
            Event::TookOver { .. } => "took-over",
            Event::Held { .. } => "held",
            Event::Wreck { .. } => "wreck",
            Event::Failed { .. } => "failed",
            Event::Stopping => "stopping",
        }
    }

    /// The volume that it is about.
    pub fn volume(&self) -> Option<&VolumeId> {
        match self {
            Event::Watching { .. } | Event::Stopping => None,
            Event::Died { volume, .. }
            | Event::TookOver { volume, .. }
            | Event::Held { volume, .. }
            | Event::Wreck { volume }
            | Event::Failed { volume, .. } => Some(volume),
        }
    }

    /// Whether somebody should look.
    pub fn is_bad(&self) -> bool {
        matches!(self, Event::Wreck { .. } | Event::Failed { .. })
    }

    /// A sentence, without the volume.
    pub fn message(&self) -> String {
        match self {
            Event::Watching { volumes: 1 } => "watching the keeper of 1 volume".into(),
            Event::Watching { volumes } => format!("watching the keepers of {volumes} volumes"),
            Event::Died { pid, .. } => format!("its keeper (pid {pid}) is gone, its device waits"),
            Event::TookOver { elapsed, .. } => {
                format!("the next keeper took over its device after {:.3} s", elapsed.as_secs_f64())
            }
            Event::Held { pid, .. } => {
                format!("a command is at work on it (pid {pid}): left alone meanwhile")
            }
            Event::Wreck { volume } => {
                format!(
                    "its keeper is gone, and its device only gives errors; run: zerofsctl recover {volume}"
                )
            }
            Event::Failed { error, again, .. } => {
                let hint = error.hint_text().map(|h| format!("; hint: {h}")).unwrap_or_default();
                format!(
                    "the next keeper cannot take over: {}; tried again in {:.1} s{hint}",
                    error.message(),
                    again.as_secs_f64()
                )
            }
            Event::Stopping => "stopping; the keepers stay".into(),
        }
    }
}

/// What is known of one volume.
#[derive(Default)]
struct Watched {
    /// The keeper that lives, or the last one that did.
    identity: Option<Identity>,
    /// A hold on it while it lives.
    keeper: Option<Process>,
    /// When its death was noticed.
    since: Option<Instant>,
    /// When to do something about it.
    due: Option<Instant>,
    working: bool,
    /// Left alone because of an operation: how long until the next look.
    held: Option<Duration>,
    failures: u32,
    took_over: Option<Instant>,
}

/// See the module.
pub struct Watcher {
    run_dir: PathBuf,
    volumes: Arc<dyn Volumes>,
    inotify: Inotify,
    known: BTreeMap<VolumeId, Watched>,
    results: mpsc::Receiver<(VolumeId, Result<TakeOver>)>,
    tell: mpsc::Sender<(VolumeId, Result<TakeOver>)>,
    wake: Arc<EventFd>,
    /// Held while it watches.
    _lock: File,
}

impl Watcher {
    /// Makes the watcher of a run folder. [`Kind::Busy`] when there is one already.
    pub fn new(run_dir: &Path, volumes: Arc<dyn Volumes>) -> Result<Watcher> {
        let folder = run_dir.join("volumes");
        journal::private_folder(&folder)?;
        let path = run_dir.join(journal::WATCH_LOCK);
        let Taken::Ours(lock) = file_lock::try_take(&path).doing("lock", &path)? else {
            return Err(Error::new(
                Kind::Busy,
                format!("another watcher is at work on {}", run_dir.display()),
            )
            .hint("one is enough: see systemctl status zerofsctl-watch, or end that one first"));
        };
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .doing("watch the folder", &folder)?;
        let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_ONLYDIR;
        inotify.add_watch(&folder, flags).doing("watch the folder", &folder)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .doing("make", "an event descriptor")?;
        let (tell, results) = mpsc::channel();
        Ok(Watcher {
            run_dir: run_dir.to_owned(),
            volumes,
            inotify,
            known: BTreeMap::new(),
            results,
            tell,
            wake: Arc::new(wake),
            _lock: lock,
        })
    }

    /// Watches until `stop` becomes readable; tells what happens. Take-overs that are at work then are left to the next
    /// watcher, who goes on from where they are.
    pub fn run(mut self, stop: BorrowedFd<'_>, tell: &dyn Fn(&Event)) -> Result<()> {
        self.look(tell)?;
        // A keeper that lives need not serve its device: whoever started it may have been killed.
        let now = Instant::now();
        for (volume, watched) in &mut self.known {
            if watched.due.is_none() && self.volumes.has_device(volume).unwrap_or(true) {
                watched.due = Some(now);
            }
        }
        tell(&Event::Watching { volumes: self.known.len() });
        loop {
            self.begin_what_is_due(tell);
            if self.sleep(stop)? {
                tell(&Event::Stopping);
                return Ok(());
            }
            while let Ok((volume, result)) = self.results.try_recv() {
                self.settle(volume, result, tell);
            }
            self.look(tell)?;
        }
    }

    /// Finds new volumes, new keepers and dead ones.
    fn look(&mut self, tell: &dyn Fn(&Event)) -> Result<()> {
        let here = journal::volumes(&self.run_dir)?;
        self.known.retain(|volume, watched| watched.working || here.contains(volume));
        for volume in here {
            let folder = journal::volume_folder(&self.run_dir, &volume);
            // Each time: a volume that was detached and attached again has another folder.
            let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_ONLYDIR;
            match self.inotify.add_watch(&folder, flags) {
                // Gone again.
                Err(nix::Error::ENOENT) => continue,
                other => drop(other.doing("watch the folder", &folder)?),
            }
            let watched = self.known.entry(volume.clone()).or_default();
            if watched.keeper.as_ref().is_some_and(|k| !k.ended(Duration::ZERO)) {
                continue;
            }
            let had_one = watched.keeper.take().is_some();
            let identity = Identity::read(&folder.join(PID_FILE));
            watched.keeper = identity.as_ref().and_then(|i| Process::open(i).ok().flatten());
            let new = identity != watched.identity;
            watched.identity.clone_from(&identity);
            // One that stopped by itself has removed its file.
            let Some(identity) = identity else { continue };
            if watched.keeper.is_some() || !(had_one || new) || watched.working {
                continue;
            }
            // A doubt is for the take-over to find out.
            if self.volumes.has_device(&volume).unwrap_or(true) {
                let now = Instant::now();
                tell(&Event::Died { volume, pid: identity.pid });
                watched.since = Some(now);
                let soon = watched.took_over.is_some_and(|at| at.elapsed() < SOON);
                watched.failures = if soon { watched.failures + 1 } else { 0 };
                watched.due = Some(if soon { now + back_off(watched.failures) } else { now });
            }
        }
        Ok(())
    }

    /// Starts a thread for each volume that something is to be done about: ZeroFS may take long to start.
    fn begin_what_is_due(&mut self, tell: &dyn Fn(&Event)) {
        let now = Instant::now();
        for (volume, watched) in &mut self.known {
            if watched.working || watched.due.is_none_or(|due| due > now) {
                continue;
            }
            if let Some(pid) = journal::holder(&self.run_dir, volume) {
                if watched.held.is_none() {
                    tell(&Event::Held { volume: volume.clone(), pid });
                }
                let pause = watched.held.map_or(BUSY_LEAST, |held| (held * 2).min(BUSY_MOST));
                watched.held = Some(pause);
                watched.due = Some(now + pause);
                continue;
            }
            watched.held = None;
            watched.due = None;
            watched.working = true;
            let (volumes, results, wake) = (self.volumes.clone(), self.tell.clone(), self.wake.clone());
            let mine = volume.clone();
            let work = move || {
                let result = volumes.take_over(&mine);
                let _ = results.send((mine, result));
                let _ = wake.write(1);
            };
            if let Err(e) = std::thread::Builder::new().name("take-over".into()).spawn(work) {
                let error = Error::environment(format!("cannot start a thread: {e}"));
                let _ = self.tell.send((volume.clone(), Err(error)));
                let _ = self.wake.write(1);
            }
        }
    }

    fn settle(&mut self, volume: VolumeId, result: Result<TakeOver>, tell: &dyn Fn(&Event)) {
        let Some(watched) = self.known.get_mut(&volume) else { return };
        watched.working = false;
        let now = Instant::now();
        match result {
            Ok(TakeOver::Done) => {
                let elapsed = watched.since.take().map_or(Duration::ZERO, |since| since.elapsed());
                watched.took_over = Some(now);
                tell(&Event::TookOver { volume, elapsed });
            }
            Ok(TakeOver::NotNeeded) => {}
            Ok(TakeOver::Wreck) => tell(&Event::Wreck { volume }),
            Err(e) if e.kind() == Kind::Busy => watched.due = Some(now + BUSY_LEAST),
            Err(error) => {
                watched.failures += 1;
                let again = back_off(watched.failures);
                watched.due = Some(now + again);
                tell(&Event::Failed { volume, error, again });
            }
        }
    }

    /// Sleeps until something happens; true when that is the stop.
    fn sleep(&self, stop: BorrowedFd<'_>) -> Result<bool> {
        let now = Instant::now();
        let due = self.known.values().filter(|w| !w.working).filter_map(|w| w.due).min();
        let limit = due.map_or(LOOK_AGAIN, |due| due.saturating_duration_since(now).min(LOOK_AGAIN));
        // Rounded up, so that the last round does not spin.
        let timeout = PollTimeout::try_from(limit.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![
            PollFd::new(stop, PollFlags::POLLIN),
            PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
        ];
        let keepers = self.known.values().filter_map(|w| w.keeper.as_ref());
        fds.extend(keepers.map(|k| PollFd::new(k.fd(), PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e).doing("wait for", "keepers"),
        }
        let stopped = fds[0].revents().is_some_and(|r| !r.is_empty());
        // Only that something happened is of interest: everything is looked at anyway.
        while self.inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
        let _ = self.wake.read();
        Ok(stopped)
    }
}

/// Settles volumes that are attached here, with nothing but what their attach left: neither settings nor password.
#[derive(Debug, Clone)]
pub struct Settler {
    dirs: Dirs,
    node: String,
}

impl Settler {
    /// For the volumes of these roots, on the node of that name.
    pub fn new(dirs: Dirs, node: String) -> Settler {
        Settler { dirs, node }
    }

    /// The host of one volume.
    pub fn host(&self, volume: &VolumeId) -> Result<LinuxHost> {
        LinuxHost::saved(&self.dirs, &self.node, volume)
    }
}

impl Volumes for Settler {
    fn has_device(&self, volume: &VolumeId) -> Result<bool> {
        device::may_be_taken_over(&self.dirs.volume_run(volume), volume)
    }

    fn take_over(&self, volume: &VolumeId) -> Result<TakeOver> {
        let host = self.host(volume)?;
        // A look without the lock: taking it, even for an instant, could fail the command that wants it.
        if host.device(volume)?.life == Life::Served {
            return Ok(TakeOver::NotNeeded);
        }
        ops::take_over::take_over(&Engine { host: &host, observer: &Silent }, &self.dirs.run, volume)
    }
}

fn back_off(failures: u32) -> Duration {
    BACK_OFF.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(BACK_OFF_MOST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    /// Long enough for any machine.
    const LIMIT: Duration = Duration::from_secs(30);

    fn volume() -> VolumeId {
        "vol1".parse().unwrap()
    }

    fn asleep(run_dir: &Path) -> Child {
        let folder = journal::volume_folder(run_dir, &volume());
        std::fs::create_dir_all(&folder).unwrap();
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        Identity::of(child.id() as i32).unwrap().write(&folder.join(PID_FILE)).unwrap();
        child
    }

    fn kill(mut child: Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Keepers that are `sleep`.
    struct Sleepers {
        run_dir: PathBuf,
        device: AtomicBool,
        asked: AtomicUsize,
        fail: AtomicUsize,
        taken: AtomicUsize,
        next: Mutex<Option<Child>>,
    }

    impl Volumes for Sleepers {
        fn has_device(&self, _: &VolumeId) -> Result<bool> {
            let device = self.device.load(Ordering::SeqCst);
            self.asked.fetch_add(1, Ordering::SeqCst);
            Ok(device)
        }

        fn take_over(&self, _: &VolumeId) -> Result<TakeOver> {
            let folder = journal::volume_folder(&self.run_dir, &volume());
            if Identity::read(&folder.join(PID_FILE)).is_some_and(|i| i.is_alive()) {
                return Ok(TakeOver::NotNeeded);
            }
            let failures = self.fail.load(Ordering::SeqCst);
            if failures > 0 {
                self.fail.store(failures - 1, Ordering::SeqCst);
                return Err(Error::new(Kind::Unreachable, "no store").hint("plug it in"));
            }
            self.taken.fetch_add(1, Ordering::SeqCst);
            *self.next.lock().unwrap() = Some(asleep(&self.run_dir));
            Ok(TakeOver::Done)
        }
    }

    /// A watcher on a thread, and what it told.
    struct Run {
        dir: tempfile::TempDir,
        sleepers: Arc<Sleepers>,
        events: Arc<Mutex<Vec<String>>>,
        stop: Arc<EventFd>,
        thread: Option<std::thread::JoinHandle<Result<()>>>,
    }

    impl Run {
        fn new(prepare: impl FnOnce(&Path)) -> Run {
            let dir = tempfile::tempdir().unwrap();
            prepare(dir.path());
            let sleepers = Arc::new(Sleepers {
                run_dir: dir.path().to_owned(),
                device: AtomicBool::new(true),
                asked: AtomicUsize::new(0),
                fail: AtomicUsize::new(0),
                taken: AtomicUsize::new(0),
                next: Mutex::new(None),
            });
            let watcher = Watcher::new(dir.path(), sleepers.clone()).unwrap();
            let events = Arc::new(Mutex::new(Vec::new()));
            let stop = Arc::new(EventFd::new().unwrap());
            let (told, stopped) = (events.clone(), stop.clone());
            let thread = std::thread::spawn(move || {
                watcher.run(stopped.as_fd(), &|e| told.lock().unwrap().push(e.name().to_owned()))
            });
            let run = Run { dir, sleepers, events, stop, thread: Some(thread) };
            run.wait_for("watching", 1);
            run
        }

        fn count(&self, name: &str) -> usize {
            self.events.lock().unwrap().iter().filter(|e| *e == name).count()
        }

        fn wait_for(&self, name: &str, times: usize) {
            let begun = Instant::now();
            while self.count(name) < times {
                assert!(begun.elapsed() < LIMIT, "no {name}: {:?}", self.events.lock().unwrap());
                std::thread::sleep(Duration::from_millis(5));
            }
        }

        fn next(&self) -> Child {
            self.sleepers.next.lock().unwrap().take().expect("a keeper was started")
        }
    }

    impl Drop for Run {
        fn drop(&mut self) {
            self.stop.write(1).unwrap();
            let ended = self.thread.take().unwrap().join();
            if let Some(child) = self.sleepers.next.lock().unwrap().take() {
                kill(child);
            }
            if !std::thread::panicking() {
                ended.unwrap().unwrap();
                assert_eq!(self.count("stopping"), 1);
            }
        }
    }

    #[test]
    fn a_keeper_that_dies_is_followed_by_the_next_one_again_and_again() {
        let run = Run::new(|_| {});
        // It begins after the watcher, which must notice it.
        let first = asleep(run.dir.path());
        kill(first);
        run.wait_for("took-over", 1);
        kill(run.next());
        run.wait_for("took-over", 2);
        assert_eq!(run.sleepers.taken.load(Ordering::SeqCst), 2);
        assert_eq!(run.count("failed"), 0);
    }

    #[test]
    fn one_that_was_dead_before_the_watcher_is_found() {
        let run = Run::new(|dir| kill(asleep(dir)));
        run.wait_for("took-over", 1);
    }

    #[test]
    fn a_failed_take_over_is_tried_again() {
        let run = Run::new(|_| {});
        run.sleepers.fail.store(2, Ordering::SeqCst);
        kill(asleep(run.dir.path()));
        run.wait_for("took-over", 1);
        assert_eq!(run.count("failed"), 2);
    }

    #[test]
    fn a_volume_that_an_operation_holds_is_left_alone_until_it_ends() {
        let run = Run::new(|_| {});
        let keeper = asleep(run.dir.path());
        let journal = journal::Journal::open(run.dir.path(), &volume()).unwrap();
        kill(keeper);
        run.wait_for("held", 1);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(run.sleepers.taken.load(Ordering::SeqCst), 0);
        drop(journal);
        run.wait_for("took-over", 1);
        assert_eq!(run.count("held"), 1, "told once");
    }

    #[test]
    fn a_keeper_without_a_device_and_one_that_stopped_by_itself_are_nothing_to_do() {
        let run = Run::new(|_| {});
        run.sleepers.device.store(false, Ordering::SeqCst);
        kill(asleep(run.dir.path()));
        // However long the watcher takes to see that.
        let begun = Instant::now();
        while run.sleepers.asked.load(Ordering::SeqCst) == 0 {
            assert!(begun.elapsed() < LIMIT, "the watcher does not look");
            std::thread::sleep(Duration::from_millis(5));
        }
        run.sleepers.device.store(true, Ordering::SeqCst);
        let keeper = asleep(run.dir.path());
        std::fs::remove_file(journal::volume_folder(run.dir.path(), &volume()).join(PID_FILE)).unwrap();
        kill(keeper);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(run.sleepers.taken.load(Ordering::SeqCst), 0);
        assert_eq!(run.count("died"), 0);
    }

    #[test]
    fn a_second_watcher_of_the_same_folder_is_refused() {
        let run = Run::new(|_| {});
        let second = Watcher::new(run.dir.path(), run.sleepers.clone()).err().unwrap();
        assert_eq!(second.kind(), Kind::Busy);
        assert!(second.hint_text().is_some());
    }

    #[test]
    fn the_pause_grows_with_each_failure_up_to_a_minute() {
        let pauses: Vec<u128> = [1, 2, 3, 7, 8, 40].map(|n| back_off(n).as_millis()).to_vec();
        assert_eq!(pauses, [500, 1000, 2000, 32_000, 60_000, 60_000]);
    }
}
