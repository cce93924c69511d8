//! The keeper's main loop: one ZeroFS process, started, watched, restarted and ended.
//!
//! All decisions are taken on one thread, one event after the other; other threads only wait for something
//! (the end of the process, its first answer, a flush) and send an event. Each start of ZeroFS has a number,
//! its generation, so that an event about a server that is gone is recognised and ignored.
//!
//! ```text
//! starting ─→ ready ⇄ stalled (killed or died: back-off, start, replay)
//!     │         │└──→ fenced  (the volume has a new owner: never started again)
//!     ↓         ↓
//!   failed   stopping ─→ gone
//! ```

use std::collections::VecDeque;
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use tracing::{debug, error, info, warn};

use super::control::{Answer, Progress, State, StopOptions, Stopped};
use super::path::{DataEvent, LogState, Replayed};
use super::process::{Exit, Identity, Launch, MARKER, Process, find_marked, passed_on, write_json};
use super::ready::wait_until_it_answers;
use super::service::{FUSE_DIR, Shared, fenced_error, stopping_error};
use super::watchdog::{Alarm, Finding, Watch};
use super::{Hooks, OWNER_THREAD, causes, lock, thread};
use crate::error::{Doing, Error, Kind, Result};
use crate::host::cgroup::Cgroup;
use crate::zerofs::versions::{Profile, READ_ERRORS_ARE_ZEROS, Sign};

/// The sockets of ZeroFS in the run folder: 9P, NBD, RPC.
pub(crate) const SOCKETS: [&str; 3] = ["9p.sock", "nbd.sock", "rpc.sock"];

/// The record of the running ZeroFS in the run folder.
pub(crate) const RECORD: &str = "zerofs.pid";

/// The replay log in the run folder.
const REPLAY_LOG: &str = "replay.log";

/// How long a killed process may take to disappear before that is worth a word.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// A server that was ready for less than that did not recover: the next wait is longer. Short, since it is ready
/// only once it has carried out a replay and a flush.
const SETTLED: Duration = Duration::from_millis(100);

/// The longest wait between two starts.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// A server that has not answered for that long is reported as stalled.
const SILENCE: Duration = Duration::from_secs(8);

/// A keeper whose ZeroFS never started ends by itself after that long: nobody came for the error.
const FAILED_LINGER: Duration = Duration::from_secs(120);

/// A stop waits that long for a change of the device that is under way.
const MOUNTING_LIMIT: Duration = Duration::from_secs(10);

/// What the record file says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The process; none between the decision to start it and the start.
    pub zerofs: Option<Identity>,
    /// Where in the log its lines begin.
    pub log_offset: u64,
}

/// What happens to the supervisor.
pub(crate) enum Event {
    /// Whether the volume is still ours, or who has it.
    Owner(Result<()>),
    /// The process of this generation has ended.
    Exited(u64, Exit),
    /// The server of this generation answers on both sockets.
    Answering(u64),
    /// The watchdog saw something.
    Alarm(Alarm),
    /// The data path is connected to the server of this generation, or could not be.
    Up(u64, Result<Replayed>),
    /// The data path tells something.
    Data(DataEvent),
    /// A client wants the data path connected.
    Raise(Sender<Result<Replayed>>),
    /// A client wants an end, since then.
    Stop(StopOptions, Instant, Sender<Answer>),
    /// The flush of a stop is over.
    Flushed(Result<()>),
    /// Someone sent us SIGTERM.
    Terminate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No process; the next start is at that time.
    Waiting(Instant),
    /// No process; whether the volume is still ours is being asked.
    Asking,
    /// A process, which does not answer yet.
    Starting(Instant),
    /// It answers; the data path is being connected.
    Raising,
    /// All is well.
    Ready(Instant),
    /// SIGKILL was sent; its end is awaited.
    Condemned,
    /// SIGTERM was sent; its end is awaited.
    Terminating,
    /// It shall not be started again.
    Fenced,
    /// It cannot be started.
    Failed(Instant),
    /// All is over.
    Gone,
}

struct Stopping {
    since: Instant,
    next_word: Instant,
    waiting: Vec<(Instant, Sender<Answer>)>,
    flushing: bool,
    warnings: Vec<String>,
}

/// See the module.
pub(crate) struct Supervisor {
    shared: Arc<Shared>,
    watch: Arc<Watch>,
    hooks: Hooks,
    profile: Profile,
    events: Receiver<Event>,
    server: Option<Arc<Process>>,
    cgroup: Option<Cgroup>,
    generation: u64,
    phase: Phase,
    wait: Duration,
    /// When the first start began.
    begun: Instant,
    ever_ready: bool,
    /// The running one has answered.
    answered: bool,
    /// The data path has been connected once, so it must be connected again after each restart.
    attached: bool,
    raising: VecDeque<Sender<Result<Replayed>>>,
    raise_attempts: u32,
    stopping: Option<Stopping>,
    /// Why the last try to start it failed, while it is still being tried.
    last_cause: Option<Error>,
    /// How ZeroFS ended, as what follows its name in a sentence.
    reason: String,
    /// Whether its log may tell the cause of that end.
    explained_by_log: bool,
    /// What an earlier keeper, or an earlier start, may have left running is to be settled before anything is started.
    adopts: bool,
    /// How many writes that were in the log have become void, since the volume has a new owner.
    voided: u64,
}

impl Supervisor {
    /// A supervisor, which has started nothing yet.
    pub fn new(
        shared: Arc<Shared>,
        watch: Arc<Watch>,
        hooks: Hooks,
        profile: Profile,
        events: Receiver<Event>,
        cgroup: Option<Cgroup>,
    ) -> Supervisor {
        let now = Instant::now();
        Supervisor {
            shared,
            watch,
            hooks,
            profile,
            events,
            server: None,
            cgroup,
            generation: 0,
            phase: Phase::Waiting(now),
            wait: Duration::ZERO,
            begun: now,
            ever_ready: false,
            answered: false,
            attached: false,
            raising: VecDeque::new(),
            raise_attempts: 0,
            stopping: None,
            last_cause: None,
            reason: String::new(),
            explained_by_log: false,
            adopts: false,
            voided: 0,
        }
    }

    /// Adopts the ZeroFS that an earlier keeper left behind, or starts one.
    ///
    /// With `resumes`, a device of that keeper waits: the data path is connected as soon as a server answers, and a
    /// server that does not start is tried again for as long as it takes. Gives whether one was adopted.
    pub fn start_or_adopt(&mut self, resumes: bool) -> bool {
        if resumes {
            (self.ever_ready, self.attached) = (true, true);
        }
        self.adopts = true;
        self.launch()
    }

    /// Works until the volume is stopped. Returns whether the end was a clean one.
    pub fn run(&mut self) -> bool {
        while self.phase != Phase::Gone {
            let event = match self.next_deadline() {
                Some(at) => self.events.recv_timeout(at.saturating_duration_since(Instant::now())),
                None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
                // Impossible while `shared` holds a sender; ending beats spinning.
                Err(RecvTimeoutError::Disconnected) => return false,
            }
            self.tick();
        }
        true
    }

    // --- time -------------------------------------------------------------------------------------------

    fn next_deadline(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Waiting(until) => Some(until),
            Phase::Starting(_) if !self.ever_ready => Some(self.begun + self.start_limit()),
            Phase::Failed(since) => Some(since + FAILED_LINGER),
            _ => None,
        };
        let stop = self.stopping.as_ref().map(|s| s.next_word);
        [phase, stop].into_iter().flatten().min()
    }

    fn start_limit(&self) -> Duration {
        Duration::from_secs(self.shared.config.start_limit_seconds)
    }

    fn tick(&mut self) {
        let now = Instant::now();
        match self.phase {
            Phase::Waiting(until) if now >= until => {
                self.launch();
            }
            Phase::Starting(_) if !self.ever_ready && now >= self.begun + self.start_limit() => {
                self.start_took_too_long();
            }
            Phase::Failed(since) if now >= since + FAILED_LINGER && !self.attached => {
                info!("nobody came for the failed start: ending");
                self.finish(Stopped::default());
            }
            _ => {}
        }
        if self.stopping.as_ref().is_some_and(|s| now >= s.next_word) {
            self.stop_word(now);
        }
    }

    fn start_took_too_long(&mut self) {
        let limit = self.start_limit().as_secs();
        // An earlier try that came to its end knows more than one that is still at it.
        let error = self.last_cause.take().unwrap_or_else(|| {
            let cause = self.explain(&format!("did not answer within {limit} s")).error;
            match cause.kind() {
                Kind::Failed => Error::new(Kind::Unreachable, cause.message())
                    .hint("check that the storage answers; a store that hangs makes ZeroFS wait for it"),
                _ => cause,
            }
        });
        self.failed(error);
        self.kill();
    }

    // --- events -----------------------------------------------------------------------------------------

    fn handle(&mut self, event: Event) {
        match event {
            Event::Owner(answer) if self.phase == Phase::Asking => self.owner(answer),
            Event::Exited(generation, exit) if generation == self.generation => self.exited(exit),
            Event::Answering(generation) if generation == self.generation => self.answering(),
            Event::Up(generation, result) => self.up(generation, result),
            Event::Alarm(alarm) => self.alarm(alarm),
            Event::Data(event) => self.data_event(event),
            Event::Raise(reply) => {
                self.raising.push_back(reply);
                self.raise_attempts = 0;
                self.raise_if_due();
            }
            Event::Stop(options, asked, reply) => self.stop(options, asked, reply),
            Event::Flushed(result) => self.flushed(result),
            Event::Terminate => self.terminate_signal(),
            Event::Exited(..) | Event::Answering(_) | Event::Owner(_) => {}
        }
    }

    fn exited(&mut self, exit: Exit) {
        self.server = None;
        self.watch.probe_regularly(false);
        self.shared.show(|b| b.zerofs = None);
        // The log is complete now, so this is the last word on whether the volume has a new owner.
        let fenced = self.watch.fenced();
        if self.cgroup.as_ref().is_some_and(|c| c.oom_kills() > 0) && exit == Exit::Signal(libc::SIGKILL) {
            warn!("ZeroFS reached its memory limit at least once");
        }
        info!("ZeroFS {exit}");
        self.shared.server_ended(exit, self.profile.zeros_when_closed);
        match self.phase {
            Phase::Terminating => {
                // Of an adopted one nobody tells us.
                if !matches!(exit, Exit::Code(0) | Exit::Unknown)
                    && self.answered
                    && let Some(stopping) = &mut self.stopping
                {
                    stopping.warnings.push(format!(
                        "ZeroFS {exit} while it was stopping; everything acknowledged had been flushed before"
                    ));
                }
                self.finish_clean();
            }
            Phase::Fenced | Phase::Failed(_) | Phase::Gone => {}
            phase => {
                self.leave_ready();
                self.shared.data.server_down();
                if !matches!(phase, Phase::Condemned) {
                    self.reason = exit.to_string();
                    // A kill from outside has nothing to do with what it said before.
                    self.explained_by_log = !matches!(exit, Exit::Signal(_));
                }
                match fenced {
                    Some(line) if self.ever_ready => self.fence(&line),
                    _ if !self.ever_ready => self.first_start_failed(exit),
                    _ => self.restart(),
                }
            }
        }
    }

    fn answering(&mut self) {
        if let Phase::Starting(since) = self.phase {
            info!("ZeroFS answers after {} ms", since.elapsed().as_millis());
            self.answered = true;
            self.watch.probe_regularly(true);
            if self.attached || !self.raising.is_empty() { self.raise() } else { self.ready() }
        }
    }

    fn ready(&mut self) {
        self.phase = Phase::Ready(Instant::now());
        self.ever_ready = true;
        if self.stopping.is_some() {
            self.advance_stop();
        } else {
            self.shared.enter(State::Ready, None);
        }
    }

    fn alarm(&mut self, alarm: Alarm) {
        let generation = match alarm {
            Alarm::Log(g, _)
            | Alarm::Closed(g)
            | Alarm::Silent(g, _)
            | Alarm::Answers(g)
            | Alarm::Unseen(g, _) => g,
        };
        // While it is being ended, what it says changes nothing any more.
        if generation != self.generation
            || !matches!(self.phase, Phase::Starting(_) | Phase::Raising | Phase::Ready(_))
        {
            return;
        }
        let serves = !matches!(self.phase, Phase::Starting(_));
        match alarm {
            Alarm::Log(_, Finding { sign, line }) => {
                // It is shown to people, and it was not we who wrote it.
                let line = causes::redact(&line, &causes::secrets_of(&self.shared.config.config_path));
                self.log_line(sign, line, serves);
            }
            Alarm::Closed(_) => self.condemn("its database is closed"),
            Alarm::Unseen(_, why) => self.condemn(&format!("its faults would not be seen: {why}")),
            Alarm::Silent(_, time) if time >= SILENCE && matches!(self.phase, Phase::Ready(_)) => {
                let reason = format!("ZeroFS has not answered for {} s; it is left alone", time.as_secs());
                if self.stopping.is_none() {
                    self.shared.enter(State::Stalled, Some(reason));
                }
            }
            Alarm::Silent(..) => {}
            Alarm::Answers(_) => {
                if self.stopping.is_none() && matches!(self.phase, Phase::Ready(_)) {
                    self.shared.enter(State::Ready, None);
                }
            }
        }
    }

    fn log_line(&mut self, sign: Sign, line: String, serves: bool) {
        match sign {
            Sign::Fenced if self.ever_ready => self.fence(&line),
            Sign::Fenced => self.condemn(&line),
            Sign::Closed => self.condemn(&format!("its database is closed: {line}")),
            Sign::FlushLied => self.condemn(&format!("it answered a flush that was not durable: {line}")),
            // A read that runs out of retries would be answered with zeros.
            Sign::StoreGivingUp if serves && self.profile.has_fault(READ_ERRORS_ARE_ZEROS) => {
                self.condemn(&format!("it is about to give up on its storage: {line}"));
            }
            Sign::StoreGivingUp | Sign::StoreTrouble => self.shared.trouble(line),
        }
    }

    fn data_event(&mut self, event: DataEvent) {
        match event {
            DataEvent::ServerLost(why) => {
                // When the process has ended, its end is on its way to us as an event.
                let lives = self.server.as_ref().is_some_and(|s| !s.ended(Duration::from_millis(20)));
                if lives && matches!(self.phase, Phase::Ready(_)) {
                    self.condemn(&why);
                } else {
                    debug!("the data path lost a server that is gone already: {why}");
                }
            }
            DataEvent::DeviceGone(why) => {
                let shared = self.shared.clone();
                // It waits for a disconnect that may be under way.
                if let Err(e) = thread("device-gone", move || shared.device_gone(&why)) {
                    warn!("cannot start a thread: {e}");
                }
            }
            DataEvent::LogFull => warn!("the replay log is full: writers wait for a flush"),
            DataEvent::ErrorDelivered { what, errno } => {
                warn!("{what} failed with {}", io::Error::from_raw_os_error(errno));
            }
        }
    }

    // --- the process ------------------------------------------------------------------------------------

    fn path(&self, name: &str) -> PathBuf {
        self.shared.config.run_dir.join(name)
    }

    /// Takes over a ZeroFS that still runs. A second one beside it would fence it.
    fn adopt(&mut self) -> Result<bool> {
        let path = self.path(RECORD);
        let record = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice::<Record>(&text).ok(),
            // No record, no process: it is written before one is started.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e).doing("read", &path),
        };
        let recorded = record.as_ref().and_then(|r| r.zerofs.clone());
        let mut found = find_marked(MARKER, self.shared.config.run_dir.as_os_str());
        if let Some(identity) = recorded.filter(|i| i.is_alive() && !found.contains(i)) {
            found.push(identity);
        }
        let mut alive = Vec::new();
        for identity in &found {
            alive.extend(Process::open(identity)?);
        }
        // What the old keeper had sent may still be carried out after a replay. Only a server that owes
        // nothing can be taken over; any other one is killed, and its successor gets the replay.
        let clean = self.shared.data.log_state() == LogState::Clean;
        match (alive.pop(), record) {
            (Some(process), Some(record)) if clean && alive.is_empty() => {
                info!("adopting the running ZeroFS ({})", process.identity());
                // Clean is also a log that somebody has deleted.
                self.shared.data.distrust();
                self.generation += 1;
                // Whatever the name of its log is by now.
                let output = PathBuf::from(format!("/proc/{}/fd/1", process.identity().pid));
                self.watch.begin(self.generation, Some((&output, record.log_offset)))?;
                self.attend(process)?;
                Ok(true)
            }
            (Some(process), _) => {
                alive.push(process);
                for process in alive {
                    info!("ending the ZeroFS of an earlier keeper ({})", process.identity());
                    if process.kill(KILL_LIMIT)?.is_none() {
                        return Err(Error::failed(format!(
                            "the ZeroFS of an earlier keeper ({}) does not end",
                            process.identity()
                        ))
                        .hint("it waits in the kernel, most likely for a disk: see the kernel's log"));
                    }
                }
                Ok(false)
            }
            (None, _) => Ok(false),
        }
    }

    /// Starts a server, once nothing of an earlier one is in the way. Whether that one was adopted instead.
    fn launch(&mut self) -> bool {
        if self.adopts {
            match self.adopt() {
                Ok(adopted) => {
                    self.adopts = false;
                    if adopted {
                        return true;
                    }
                }
                Err(e) => {
                    self.not_started(e);
                    return false;
                }
            }
        }
        match &self.hooks.before_restart {
            Some(check) if self.ever_ready => {
                let (check, config) = (check.clone(), self.shared.config.clone());
                let events = self.shared.events.clone();
                let asked = thread(OWNER_THREAD, move || {
                    let answer = std::panic::catch_unwind(AssertUnwindSafe(|| check(&config)));
                    let answer = answer.unwrap_or_else(|_| Err(Error::failed("the question panicked")));
                    let _ = events.send(Event::Owner(answer));
                });
                match asked {
                    Ok(_) => self.phase = Phase::Asking,
                    Err(e) => self.owner(Err(Error::environment(format!("cannot start a thread: {e}")))),
                }
            }
            _ => self.launch_now(),
        }
        false
    }

    fn owner(&mut self, answer: Result<()>) {
        match answer {
            Ok(()) => self.launch_now(),
            Err(e) if e.kind() == Kind::Conflict => self.fence(e.message()),
            Err(e) => {
                // In doubt it is not started: it would fence whoever owns the volume by now.
                self.reason = format!("is not started: cannot tell whether the volume is still ours: {e}");
                self.explained_by_log = false;
                self.restart();
            }
        }
    }

    fn launch_now(&mut self) {
        if let Err(e) = self.try_launch() {
            // It may run all the same, and a second one would fence it.
            self.adopts = !self.end_what_is_not_ours();
            self.not_started(e);
        }
    }

    /// Tried again when it has been ready before, or a device waits for it.
    fn not_started(&mut self, e: Error) {
        error!("{e}");
        self.reason = format!("could not be started: {e}");
        self.explained_by_log = false;
        if self.ever_ready { self.restart() } else { self.failed(e) }
    }

    /// Ends whatever ZeroFS has our marker, while we attend to none. Whether nothing is left of them.
    fn end_what_is_not_ours(&self) -> bool {
        let mut ended = true;
        for identity in find_marked(MARKER, self.shared.config.run_dir.as_os_str()) {
            let process = Process::open(&identity);
            match process.and_then(|p| p.map_or(Ok(true), |p| Ok(p.kill(KILL_LIMIT)?.is_some()))) {
                Ok(true) => {}
                Ok(false) => {
                    warn!("a ZeroFS ({identity}) does not end");
                    ended = false;
                }
                Err(e) => {
                    warn!("a ZeroFS ({identity}) may be left: {e}");
                    ended = false;
                }
            }
        }
        ended
    }

    fn try_launch(&mut self) -> Result<()> {
        self.generation += 1;
        if self.ever_ready {
            self.shared.restarts.fetch_add(1, Ordering::Relaxed);
        }
        let config = &self.shared.config;
        remove_sockets(&config.run_dir)?;
        let log_offset = self.watch.begin(self.generation, None)?;
        // Said before it is done: a keeper that is killed in between leaves a reason to look for the marker.
        write_json(&self.path(RECORD), &Record { zerofs: None, log_offset })?;
        let output = self.watch.log_for_appending()?;
        let entrance = match &self.cgroup {
            Some(group) => Some(group.entrance()?),
            None => None,
        };
        let mut env = passed_on();
        env.push(("RUST_LOG".into(), self.profile.rust_log(config.rust_log.as_deref()).into()));
        env.push(("NO_COLOR".into(), "1".into()));
        env.push((MARKER.into(), config.run_dir.clone().into()));
        let process = Launch {
            program: &config.zerofs_bin,
            name: None,
            args: vec!["run".into(), "--config".into(), config.config_path.clone().into()],
            env,
            cwd: &config.run_dir,
            output: &output,
            answer: None,
            cgroup: entrance.as_ref(),
        }
        .start()?;
        info!("started ZeroFS ({})", process.identity());
        let record = Record { zerofs: Some(process.identity().clone()), log_offset };
        write_json(&self.path(RECORD), &record)?;
        self.attend(process)
    }

    /// Waits, on other threads, for the end of the process and for its first answer.
    fn attend(&mut self, process: Process) -> Result<()> {
        let process = Arc::new(process);
        let generation = self.generation;
        self.server = Some(process.clone());
        self.phase = Phase::Starting(Instant::now());
        self.answered = false;
        self.shared.show(|b| b.zerofs = Some(process.identity().clone()));
        let (events, waited) = (self.shared.events.clone(), process.clone());
        thread("zerofs-end", move || {
            let exit = loop {
                if let Some(exit) = waited.wait(Duration::from_secs(3600)) {
                    break exit;
                }
            };
            let _ = events.send(Event::Exited(generation, exit));
        })
        .doing("start a thread of", "the keeper")?;
        let (events, dir) = (self.shared.events.clone(), self.shared.config.run_dir.clone());
        thread("zerofs-ready", move || {
            if wait_until_it_answers(&dir, &process) {
                let _ = events.send(Event::Answering(generation));
            }
        })
        .doing("start a thread of", "the keeper")?;
        Ok(())
    }

    fn kill(&self) {
        if let Some(server) = &self.server
            && let Err(e) = server.signal(Signal::SIGKILL)
        {
            error!("cannot kill ZeroFS: {e}");
        }
    }

    /// This server must go. What happens next is decided when it is gone and its log is complete.
    fn condemn(&mut self, why: &str) {
        // Before all else: what it does from here on may falsify data, and half a second may be too long.
        self.kill();
        warn!("killing ZeroFS: {why}");
        self.reason = format!("was killed, since {why}");
        self.explained_by_log = true;
        self.leave_ready();
        self.phase = Phase::Condemned;
        self.shared.data.server_down();
        self.watch.probe_regularly(false);
        if self.stopping.is_none() && self.ever_ready {
            self.shared.enter(State::Stalled, Some(format!("ZeroFS {}", self.reason)));
        }
    }

    /// A server that worked for a while is restarted at once; one that dies again and again is given time.
    fn leave_ready(&mut self) {
        if matches!(self.phase, Phase::Ready(since) if since.elapsed() >= SETTLED) {
            self.wait = Duration::ZERO;
        }
    }

    fn restart(&mut self) {
        let nothing_to_save = !self.attached || self.owes_nothing();
        if self.stopping.is_some() && nothing_to_save && !self.adopts {
            return self.finish_clean();
        }
        let cause = self.explained_by_log.then(|| self.explain(&self.reason).error);
        let reason = match cause.filter(|e| e.kind() != Kind::Failed) {
            Some(e) => e.message().to_owned(),
            None => format!("ZeroFS {}", self.reason),
        };
        warn!("ZeroFS is started again in {} ms: {reason}", self.wait.as_millis());
        self.phase = Phase::Waiting(Instant::now() + self.wait);
        self.wait = (self.wait * 2).clamp(Duration::from_millis(100), LONGEST_WAIT);
        if self.stopping.is_none() {
            self.shared.enter(State::Stalled, Some(reason));
        }
    }

    fn first_start_failed(&mut self, exit: Exit) {
        let cause = self.explain(&exit.to_string());
        if self.stopping.is_some() {
            return self.finish_clean();
        }
        if cause.permanent || self.begun.elapsed() + self.wait >= self.start_limit() {
            return self.failed(cause.error);
        }
        self.wait = (self.wait * 2).clamp(Duration::from_millis(100), LONGEST_WAIT);
        warn!("ZeroFS is started again in {} ms: {}", self.wait.as_millis(), cause.error);
        self.phase = Phase::Waiting(Instant::now() + self.wait);
        self.shared.enter(State::Starting, Some(cause.error.message().to_owned()));
        self.last_cause = Some(cause.error);
    }

    fn explain(&self, ended: &str) -> causes::Cause {
        let secrets = causes::secrets_of(&self.shared.config.config_path);
        causes::explain(&self.watch.output(), ended, &secrets)
    }

    fn failed(&mut self, e: Error) {
        error!("ZeroFS cannot be started: {e}");
        self.phase = Phase::Failed(Instant::now());
        for reply in self.raising.drain(..) {
            let _ = reply.send(Err(e.clone()));
        }
        self.shared.show(|b| b.error = Some((&e).into()));
        self.shared.enter(State::Failed, Some(e.message().to_owned()));
    }

    fn fence(&mut self, line: &str) {
        self.kill();
        error!("the volume has a new owner: {line}");
        self.phase = Phase::Fenced;
        self.shared.data.server_down();
        // Nothing is acknowledged any more, and what was is still in the log.
        if let LogState::LeftBehind { entries, .. } = self.shared.data.log_state() {
            self.voided = entries;
        }
        self.shared.data.fail("the volume has a new owner");
        self.watch.probe_regularly(false);
        let reason = format!("the volume was opened elsewhere: {line}");
        for reply in self.raising.drain(..) {
            let _ = reply.send(Err(fenced_error(&reason)));
        }
        self.shared.show(|b| b.data_path = false);
        self.shared.enter(State::Fenced, Some(reason));
        if self.stopping.is_some() {
            self.finish_void();
        }
    }

    // --- the data path ----------------------------------------------------------------------------------

    fn raise_if_due(&mut self) {
        match self.phase {
            Phase::Ready(_) if self.stopping.is_some() => {
                for reply in self.raising.drain(..) {
                    let _ = reply.send(Err(stopping_error()));
                }
            }
            Phase::Ready(_) if self.attached => {
                let size = self.shared.data.size();
                for reply in self.raising.drain(..) {
                    let _ = reply.send(Ok(Replayed { size, ..Replayed::default() }));
                }
            }
            Phase::Ready(_) => self.raise(),
            Phase::Fenced | Phase::Failed(_) | Phase::Terminating | Phase::Gone => {
                let board = lock(&self.shared.board).clone();
                for reply in self.raising.drain(..) {
                    let _ = reply.send(Err(match &board.error {
                        Some(e) => e.clone().into(),
                        None if board.state == State::Fenced => {
                            fenced_error(board.reason.as_deref().unwrap_or("the volume was opened elsewhere"))
                        }
                        None => stopping_error(),
                    }));
                }
            }
            // Done when the server answers.
            Phase::Waiting(_) | Phase::Asking | Phase::Starting(_) | Phase::Raising | Phase::Condemned => {}
        }
    }

    fn raise(&mut self) {
        self.phase = Phase::Raising;
        let generation = self.generation;
        let (events, data) = (self.shared.events.clone(), self.shared.data.clone());
        let spawned = thread("replay", move || {
            let result = data.server_up();
            let _ = events.send(Event::Up(generation, result));
        });
        if let Err(e) = spawned {
            self.condemn(&format!("cannot start a thread: {e}"));
        }
    }

    fn up(&mut self, generation: u64, result: Result<Replayed>) {
        if generation != self.generation || self.phase != Phase::Raising {
            // A server that died meanwhile: its successor gets the next try.
            return;
        }
        match result {
            // Lost again before we heard of it: that word came too early to count.
            Ok(_) if !self.shared.data.is_up() => self.condemn("its connections were lost at once"),
            Ok(replayed) => {
                if replayed.entries > 0 {
                    info!("replayed {} writes, {} bytes", replayed.entries, replayed.bytes);
                }
                self.attached = true;
                self.shared.show(|b| b.data_path = true);
                self.shared.server_serves();
                for reply in self.raising.drain(..) {
                    let _ = reply.send(Ok(replayed));
                }
                self.ready();
            }
            Err(e) if self.attached => self.condemn(&format!("the data path cannot be connected: {e}")),
            Err(e) => {
                self.raise_attempts += 1;
                warn!("the data path cannot be connected: {e}");
                let lives = self.server.as_ref().is_some_and(|s| !s.ended(Duration::from_millis(100)));
                if lives || self.raise_attempts >= 3 {
                    for reply in self.raising.drain(..) {
                        let _ = reply.send(Err(e.clone()));
                    }
                }
                if lives {
                    self.shared.data.server_down();
                    self.ready();
                }
            }
        }
    }

    fn owes_nothing(&self) -> bool {
        self.shared.data.log_state() == LogState::Clean && self.shared.data.stats().pending == 0
    }

    // --- stopping ---------------------------------------------------------------------------------------

    fn stop(&mut self, options: StopOptions, asked: Instant, reply: Sender<Answer>) {
        {
            let Some(_mounting) = self.shared.try_mounting() else {
                if asked.elapsed() < MOUNTING_LIMIT {
                    return self.later(asked, Event::Stop(options, asked, reply));
                }
                let e = Error::new(Kind::Busy, "the volume's device or FUSE file is being changed")
                    .hint("run the same command again");
                let _ = reply.send(Answer::Error((&e).into()));
                return;
            };
            if self.shared.device.is_connected() {
                if !options.even_if_mounted {
                    let e = Error::new(Kind::Busy, "the volume's NBD device is still connected")
                        .hint("detach the volume: zerofsctl detach VOLUME");
                    let _ = reply.send(Answer::Error((&e).into()));
                    return;
                }
                // Without a flush here: it might wait for us. The stop flushes what was acknowledged.
                if let Err(e) = self.shared.disconnect_nbd(true) {
                    let _ = reply.send(Answer::Error((&e).into()));
                    return;
                }
            }
            if self.shared.fuse_mounted() {
                if !options.even_if_mounted {
                    let e = Error::new(Kind::Busy, "the volume's FUSE file is still mounted")
                        .hint("detach the volume: zerofsctl detach VOLUME");
                    let _ = reply.send(Answer::Error((&e).into()));
                    return;
                }
                if let Err(e) = self.shared.unmount(options.force) {
                    let _ = reply.send(Answer::Error((&e).into()));
                    return;
                }
            }
            self.shared.show(|b| b.stopping = true);
        }
        let now = Instant::now();
        let limit = Duration::try_from_secs_f64(options.timeout_seconds).unwrap_or(Duration::MAX);
        let until = now.checked_add(limit).unwrap_or(now + Duration::from_secs(365 * 86400));
        match &mut self.stopping {
            Some(stopping) => stopping.waiting.push((until, reply)),
            None => {
                self.stopping = Some(Stopping {
                    since: now,
                    next_word: now + Duration::from_secs(1),
                    waiting: vec![(until, reply)],
                    flushing: false,
                    warnings: Vec::new(),
                });
                info!("stopping");
                if self.phase != Phase::Fenced {
                    self.shared.enter(State::Stopping, None);
                }
            }
        }
        if options.force { self.force_stop() } else { self.advance_stop() }
    }

    /// The same event again, as soon as nobody changes the device. Never waited for here: whoever changes it may wait for
    /// I/O, and I/O may wait for us.
    fn later(&self, asked: Instant, event: Event) {
        let shared = Arc::clone(&self.shared);
        let spawned = thread("later", move || {
            while shared.try_mounting().is_none() && asked.elapsed() < MOUNTING_LIMIT {
                std::thread::sleep(Duration::from_millis(5));
            }
            let _ = shared.events.send(event);
        });
        if let Err(e) = spawned {
            warn!("cannot start a thread: {e}");
        }
    }

    /// Does what the stop needs next, if it can be done now.
    fn advance_stop(&mut self) {
        match self.phase {
            Phase::Ready(_) if self.attached => {
                if self.stopping.as_ref().is_some_and(|s| s.flushing) {
                    return;
                }
                let (events, data) = (self.shared.events.clone(), self.shared.data.clone());
                let spawned = thread("flush", move || {
                    let _ = events.send(Event::Flushed(data.flush()));
                });
                match (spawned, &mut self.stopping) {
                    (Ok(_), Some(stopping)) => stopping.flushing = true,
                    (Err(e), _) => warn!("cannot start a thread: {e}"),
                    (Ok(_), None) => {}
                }
            }
            Phase::Ready(_) => self.terminate(),
            // What may still run is settled first.
            Phase::Waiting(_) if self.adopts => {}
            // Nothing was ever written through it.
            Phase::Starting(_) if !self.attached => self.terminate(),
            Phase::Waiting(_) | Phase::Asking if !self.attached || self.owes_nothing() => self.finish_clean(),
            Phase::Starting(_) if self.owes_nothing() => self.terminate(),
            Phase::Fenced => self.finish_void(),
            Phase::Failed(_) => self.finish_clean(),
            // Its next start replays what it owes; then the stop goes on.
            Phase::Starting(_) | Phase::Waiting(_) | Phase::Asking | Phase::Raising | Phase::Condemned => {}
            Phase::Terminating | Phase::Gone => {}
        }
    }

    fn flushed(&mut self, result: Result<()>) {
        let Some(stopping) = &mut self.stopping else {
            if let Err(e) = result {
                warn!("the flush failed: {e}");
            }
            return;
        };
        stopping.flushing = false;
        match result {
            Ok(()) if matches!(self.phase, Phase::Ready(_)) && self.owes_nothing() => self.terminate(),
            // Tried again with the next word, a second later at most.
            Ok(()) => {}
            Err(e) => warn!("the flush before the stop failed: {e}"),
        }
    }

    fn terminate(&mut self) {
        self.phase = Phase::Terminating;
        self.watch.probe_regularly(false);
        self.shared.data.server_down();
        let sent = self.server.as_ref().map(|s| s.signal(Signal::SIGTERM));
        if let Some(Err(e)) = sent {
            error!("cannot ask ZeroFS to end: {e}");
        }
    }

    fn stop_word(&mut self, now: Instant) {
        let Some(stopping) = &mut self.stopping else { return };
        stopping.next_word = now + Duration::from_secs(1);
        let elapsed = now - stopping.since;
        let stage = match self.phase {
            Phase::Terminating => "waiting for ZeroFS to end",
            Phase::Ready(_) => "flushing",
            _ => "waiting for ZeroFS to come back",
        };
        let word = Progress {
            stage: stage.to_owned(),
            elapsed_seconds: elapsed.as_secs_f64(),
            log_bytes: self.shared.data.stats().log_used,
        };
        stopping.waiting.retain(|(until, client)| {
            if now < *until {
                return client.send(Answer::Progress(word.clone())).is_ok();
            }
            let message = format!("not stopped after {:.0} s: still {stage}", elapsed.as_secs_f64());
            let e = Error::new(Kind::Interrupted, message)
                .hint("it goes on stopping: run the same command again; --force kills ZeroFS instead");
            let _ = client.send(Answer::Error((&e).into()));
            false
        });
        self.advance_stop();
    }

    fn force_stop(&mut self) {
        if self.adopts {
            self.adopts = !self.end_what_is_not_ours();
        }
        self.kill();
        if let Some(server) = &self.server
            && !server.ended(KILL_LIMIT)
            && let Some(stopping) = &mut self.stopping
        {
            stopping.warnings.push(format!("the killed ZeroFS ({}) has not ended yet", server.identity()));
        }
        if self.phase == Phase::Fenced {
            return self.finish_void();
        }
        self.shared.data.server_down();
        let (kept_entries, kept_bytes) = match self.shared.data.log_state() {
            LogState::LeftBehind { entries, bytes, .. } => (entries, bytes),
            LogState::Clean | LogState::Foreign { .. } => (0, 0),
        };
        self.finish(Stopped { clean: kept_entries == 0, kept_entries, kept_bytes, ..Stopped::default() });
    }

    /// ZeroFS is gone and everything acknowledged is durable (or, before the data path was ever connected,
    /// waits in the log of an earlier keeper).
    fn finish_clean(&mut self) {
        let (kept_entries, kept_bytes) = match self.shared.data.log_state() {
            LogState::LeftBehind { entries, bytes, .. } => (entries, bytes),
            LogState::Clean | LogState::Foreign { .. } => (0, 0),
        };
        self.finish(Stopped { clean: kept_entries == 0, kept_entries, kept_bytes, ..Stopped::default() });
    }

    /// The volume has a new owner: what the log holds must never be replayed.
    fn finish_void(&mut self) {
        let mut stopped = Stopped { clean: self.voided == 0, ..Stopped::default() };
        if self.voided > 0 {
            stopped.warnings.push(format!(
                "the volume was opened elsewhere: {} writes that were not flushed before are void",
                self.voided
            ));
        }
        if self.shared.data.log_state() != LogState::Clean
            && let Err(e) = self.shared.data.discard_log()
        {
            warn!("cannot empty the replay log: {e}");
        }
        self.finish(stopped);
    }

    /// Removes what is ours, answers the waiting clients, and ends the loop.
    fn finish(&mut self, mut stopped: Stopped) {
        self.watch.end();
        if let Some(server) = &self.server {
            // One that was killed, after a failed start or a fencing.
            server.ended(KILL_LIMIT);
        }
        let clean = self.shared.data.log_state() == LogState::Clean;
        let log = clean.then_some(REPLAY_LOG);
        // Without this record the next keeper would not look for what may still run.
        let record = (!self.adopts).then_some(RECORD);
        let gone = SOCKETS.into_iter().chain(log).chain(record).chain([
            super::CONFIG,
            super::control::SOCKET,
            super::device::RECORD,
            super::taken::FILE_NAME,
        ]);
        for path in gone.map(|name| self.path(name)) {
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    stopped.warnings.push(format!("cannot remove {}: {e}", path.display()));
                }
                _ => {}
            }
        }
        // Not there unless it was mounted; not empty when the unmount failed, and then it is said elsewhere.
        let _ = std::fs::remove_dir(self.path(FUSE_DIR));
        if let Some(Err(e)) = self.cgroup.as_ref().map(Cgroup::remove) {
            stopped.warnings.push(e.to_string());
        }
        let mut waiting = Vec::new();
        if let Some(stopping) = self.stopping.take() {
            stopped.elapsed_seconds = stopping.since.elapsed().as_secs_f64();
            stopped.warnings.splice(0..0, stopping.warnings);
            waiting = stopping.waiting;
        }
        for warning in &stopped.warnings {
            warn!("{warning}");
        }
        info!(
            "stopped{}",
            if stopped.kept_entries > 0 { ", with writes left in the replay log" } else { "" }
        );
        for (_, client) in waiting {
            let _ = client.send(Answer::Stopped(stopped.clone()));
        }
        self.phase = Phase::Gone;
    }

    /// SIGTERM to the keeper. At a shutdown it may come before the filesystems are unmounted, and then the
    /// device must live on.
    fn terminate_signal(&mut self) {
        if self.shared.try_mounting().is_none() {
            // Whether it is in use turns out after that.
            return self.later(Instant::now(), Event::Terminate);
        }
        // Whoever holds a failed device still has it.
        if self.shared.fuse_mounted() || self.shared.device.record().is_some() {
            warn!("SIGTERM is ignored, since the volume is in use; flushing. Use zerofsctl detach.");
            let (events, data) = (self.shared.events.clone(), self.shared.data.clone());
            let _ = thread("flush", move || {
                let _ = events.send(Event::Flushed(data.flush()));
            });
            return;
        }
        let (reply, _) = std::sync::mpsc::channel();
        let timeout_seconds = self.shared.config.stop_grace_seconds as f64;
        self.stop(
            StopOptions { timeout_seconds, force: false, even_if_mounted: false },
            Instant::now(),
            reply,
        );
    }
}

/// Removes the sockets that a dead ZeroFS left behind: they outlive it.
pub(crate) fn remove_sockets(run_dir: &Path) -> Result<()> {
    for name in SOCKETS {
        let path = run_dir.join(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).doing("remove the stale", &path),
            _ => {}
        }
    }
    Ok(())
}
