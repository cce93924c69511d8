//! The only loop: it takes a plan through its tasks, writes the journal around each, and undoes its own
//! work when one fails. It knows neither the command line nor gRPC.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::{Error, Kind, Result};
use crate::host::{Host, Observe, TargetView};
use crate::journal::{End, Journal, Outcome, Run, Settlement, TaskState, settlement};
use crate::plan::{Plan, Task};
use crate::step::{Direction, Facts, Step};

/// Sees every step event: progress lines, logs and metrics hang here.
pub trait Observer {
    /// A task begins.
    fn started(&self, _plan: &Plan, _task: &Task) {}
    /// A task is settled.
    fn settled(&self, _plan: &Plan, _task: &Task, _outcome: Outcome, _elapsed: Duration) {}
    /// A task failed.
    fn failed(&self, _plan: &Plan, _task: &Task, _error: &Error) {}
    /// The run takes itself back, or an earlier one is settled; a sentence says why.
    fn note(&self, _text: &str) {}
    /// Asked between steps: true stops the run, which then undoes its own work.
    fn interrupted(&self) -> bool {
        false
    }
}

/// Sees nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;
impl Observer for Silent {}

/// How one task went, for the report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskReport {
    /// `mount`
    pub step: &'static str,
    /// `done`, `already`
    pub outcome: Outcome,
    /// How long.
    #[serde(rename = "milliseconds", serialize_with = "as_milliseconds")]
    pub elapsed: Duration,
    /// The sentence.
    pub what: String,
}

fn as_milliseconds<S: serde::Serializer>(d: &Duration, s: S) -> std::result::Result<S::Ok, S::Error> {
    s.serialize_f64((d.as_secs_f64() * 1e6).round() / 1e3)
}

/// What a run ended with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunReport {
    /// The plan's tasks, in order.
    pub tasks: Vec<TaskReport>,
    /// What they learnt.
    pub facts: Facts,
}

impl RunReport {
    /// Whether everything was so before.
    pub fn already(&self) -> bool {
        self.tasks.iter().all(|t| t.outcome == Outcome::Already)
    }
}

/// The loop's surroundings.
pub struct Engine<'a> {
    /// What it works on.
    pub host: &'a dyn Host,
    /// Who watches.
    pub observer: &'a dyn Observer,
}

impl Engine<'_> {
    /// Settles an open run as `wanted` needs it, then takes `wanted` through.
    ///
    /// # Errors
    /// The first task's error, after the run's own work was undone; names volume and step.
    pub fn run(&self, journal: &mut Journal, wanted: Plan, facts: Facts) -> Result<RunReport> {
        match self.settle(journal, Some(&wanted))? {
            Settlement::Resume => self.observer.note("going on with an earlier run that was cut short"),
            _ => journal.begin(wanted, facts)?,
        }
        self.forward(journal)
    }

    /// Settles the open run, if there is one. After `Resume` it is still open.
    pub fn settle(&self, journal: &mut Journal, wanted: Option<&Plan>) -> Result<Settlement> {
        let what = settlement(journal.open_run(), wanted);
        let name = journal.open_run().map_or("", |r| r.plan.operation.name());
        if let Some(run) = journal.open_run() {
            self.finish_mounts(run)?;
        }
        match what {
            Settlement::Nothing | Settlement::Resume => {}
            Settlement::Finish => {
                self.observer.note(&format!("finishing an earlier {name} that was cut short"));
                self.forward(journal)?;
            }
            Settlement::Unwind => {
                self.observer.note(&format!("undoing an earlier {name} that was cut short"));
                self.unwind(journal)?;
            }
            Settlement::Abandon => journal.end(End::Abandoned)?,
        }
        Ok(what)
    }

    /// A mount goes on when its command is killed: what is found before its end is wrong a moment later.
    fn finish_mounts(&self, run: &Run) -> Result<()> {
        let Some(device) = &run.facts.device else { return Ok(()) };
        for (task, state) in run.plan.tasks.iter().zip(&run.states) {
            if let (Step::Mount(mount), Direction::Apply, TaskState::Started) =
                (&task.step, task.direction, state)
            {
                let done = self.host.finish_mount(&run.plan.volume, device, &mount.target);
                done.map_err(|e| e.on(&run.plan.volume).in_step(task.name()))?;
            }
        }
        Ok(())
    }

    /// The report of a plan that has nothing left to do; none when there is something. Writes no journal: for what is
    /// asked again and again.
    pub fn all_settled(&self, plan: &Plan, facts: &mut Facts) -> Result<Option<RunReport>> {
        let mut tasks = Vec::with_capacity(plan.tasks.len());
        for task in &plan.tasks {
            let begun = Instant::now();
            let settled = task.step.is_settled(task.direction, &plan.volume, facts, self.host);
            if !settled.map_err(|e| e.on(&plan.volume).in_step(task.name()))? {
                return Ok(None);
            }
            let elapsed = begun.elapsed();
            self.observer.settled(plan, task, Outcome::Already, elapsed);
            let what = task.step.describe(task.direction);
            tasks.push(TaskReport { step: task.name(), outcome: Outcome::Already, elapsed, what });
        }
        Ok(Some(RunReport { tasks, facts: facts.clone() }))
    }

    /// Takes the open run to its end, from wherever it is.
    fn forward(&self, journal: &mut Journal) -> Result<RunReport> {
        let (plan, mut facts) = match journal.open_run() {
            Some(run) => (run.plan.clone(), run.facts.clone()),
            None => return Err(Error::failed("no run is open")),
        };
        let mut tasks = Vec::with_capacity(plan.tasks.len());
        for (index, task) in plan.tasks.iter().enumerate() {
            self.observer.started(&plan, task);
            let begun = Instant::now();
            match self.take(journal, &plan, index, task, &mut facts) {
                Ok(outcome) => {
                    let elapsed = begun.elapsed();
                    self.observer.settled(&plan, task, outcome, elapsed);
                    let what = task.step.describe(task.direction);
                    tasks.push(TaskReport { step: task.name(), outcome, elapsed, what });
                }
                Err(error) => {
                    let error = self.as_interruption(error).on(&plan.volume).in_step(task.name());
                    self.observer.failed(&plan, task, &error);
                    return Err(self.fail(journal, index, error));
                }
            }
        }
        journal.end(End::Done)?;
        Ok(RunReport { tasks, facts })
    }

    /// A Ctrl-C also ends the programs that a step runs: their failure is no news then.
    fn as_interruption(&self, error: Error) -> Error {
        if !self.observer.interrupted() || error.kind() == Kind::Interrupted {
            return error;
        }
        Error::new(Kind::Interrupted, format!("interrupted: {}", error.message()))
            .hint("run the same command again")
    }

    /// One task: probe; if it is not so, record, do, record.
    fn take(
        &self,
        journal: &mut Journal,
        plan: &Plan,
        index: usize,
        task: &Task,
        facts: &mut Facts,
    ) -> Result<Outcome> {
        if self.observer.interrupted() {
            return Err(Error::new(Kind::Interrupted, "interrupted before this step")
                .hint("run the same command again"));
        }
        let outcome = if task.step.is_settled(task.direction, &plan.volume, facts, self.host)? {
            Outcome::Already
        } else {
            crash_point(task, "before");
            journal.started(index, facts)?;
            crash_point(task, "started");
            task.step.execute(task.direction, &plan.volume, facts, self.host)?;
            crash_point(task, "applied");
            Outcome::Done
        };
        journal.settled(index, outcome, facts)?;
        crash_point(task, "after");
        Ok(outcome)
    }

    /// After a failed task: undo what this run did, or leave it open for the next one to finish.
    fn fail(&self, journal: &mut Journal, index: usize, error: Error) -> Error {
        journal.take_back();
        if let Err(e) = journal.failed(index, &error) {
            tracing::error!("{e}");
            return error;
        }
        let forward = journal.open_run().is_some_and(|r| r.plan.operation.settles_forward());
        let changed = journal.open_run().is_some_and(|r| r.changed_something());
        let ended = match (changed, forward) {
            (false, _) => journal.end(End::Unwound),
            // An unmount of what is in use: as if it had not been asked for.
            (true, true) if self.had_no_effect(journal, index) => journal.end(End::Unwound),
            // Half a detach is finished by the next try, never taken back.
            (true, true) => Ok(()),
            (true, false) => {
                let why = match (error.kind(), error.step()) {
                    (Kind::Interrupted, _) | (_, None) => "interrupted".to_owned(),
                    (_, Some(step)) => format!("step {step} failed"),
                };
                self.observer.note(&format!("{why}: undoing what this run did"));
                self.unwind(journal)
            }
        };
        match ended {
            Ok(()) => error,
            Err(second) => {
                let volume = error.volume().map_or_else(String::new, |v| format!(" {v}"));
                error.context(format!("and undoing failed too ({second})")).hint(format!(
                    "see what is left: zerofsctl show{volume}; then: zerofsctl recover{volume}"
                ))
            }
        }
    }

    /// Whether the open run has changed nothing: its only task that was begun is `index`, which failed, and what it
    /// was to take away stands at its place as before.
    fn had_no_effect(&self, journal: &Journal, index: usize) -> bool {
        let Some(run) = journal.open_run() else { return false };
        let untouched =
            |state: &TaskState| matches!(state, TaskState::Pending | TaskState::Settled(Outcome::Already));
        let mut others = run.states.iter().enumerate().filter(|(i, _)| *i != index).map(|(_, state)| state);
        let stands = match &run.plan.tasks[index].step {
            Step::Mount(m) => matches!(self.host.target(&m.target), Ok(TargetView::MountPoint(_))),
            Step::Link(l) => matches!(self.host.target(&l.target), Ok(TargetView::Other { link: Some(_) })),
            Step::Bind(b) => matches!(self.host.target(&b.target), Ok(TargetView::MountPoint(_))),
            // Of anything else, a part may be gone.
            _ => false,
        };
        stands && others.all(untouched)
    }

    /// Undoes what the open run did or may have done, newest first.
    fn unwind(&self, journal: &mut Journal) -> Result<()> {
        let Some(run) = journal.open_run() else { return Ok(()) };
        let (plan, states, mut facts) = (run.plan.clone(), run.states.clone(), run.facts.clone());
        let begun = run.unwinding;
        journal.take_back();
        if !begun {
            journal.unwinding()?;
        }
        for (index, (task, state)) in plan.tasks.iter().zip(states).enumerate().rev() {
            if !matches!(state, TaskState::Started | TaskState::Settled(Outcome::Done)) {
                continue;
            }
            let reverse = match task.direction {
                Direction::Apply => Task::undo(task.step.clone()),
                Direction::Undo => continue,
            };
            self.observer.started(&plan, &reverse);
            let begun = Instant::now();
            let (volume, step) = (&plan.volume, &reverse.step);
            let result = match step.is_settled(Direction::Undo, volume, &mut facts, self.host) {
                Ok(true) => Ok(Outcome::Already),
                Ok(false) => {
                    crash_point(&reverse, "started");
                    step.execute(Direction::Undo, volume, &mut facts, self.host).map(|()| Outcome::Done)
                }
                Err(e) => Err(e),
            };
            match result {
                Ok(outcome) => {
                    crash_point(&reverse, "applied");
                    journal.undone(index, &facts)?;
                    self.observer.settled(&plan, &reverse, outcome, begun.elapsed());
                }
                Err(e) => {
                    let e = e.on(volume).in_step(reverse.name());
                    self.observer.failed(&plan, &reverse, &e);
                    return Err(e);
                }
            }
        }
        journal.end(End::Unwound)
    }
}

/// One line of a dry run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Preview {
    /// `mount`
    pub step: &'static str,
    /// What would happen.
    pub would: Would,
    /// The sentence.
    pub what: String,
    /// A shell command that does about the same.
    pub command: String,
}

/// What a dry run says of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Would {
    /// It is so already.
    Already,
    /// It would be done.
    Do,
    /// It depends on what an earlier step, not yet taken, will find.
    Depends,
}

/// The dry run: probes what can be probed. It gets only the read-only half of the host.
pub fn preview(host: &dyn Observe, plan: &Plan, mut facts: Facts) -> Result<Vec<Preview>> {
    let mut earlier_would_do = false;
    let mut lines = Vec::with_capacity(plan.tasks.len());
    for task in &plan.tasks {
        let would = match task.step.is_settled(task.direction, &plan.volume, &mut facts, host) {
            // An undo of what this plan itself would do: nothing is there yet, but then it will be.
            Ok(true) if would_apply(&lines, plan, task) => Would::Do,
            // It fills a device that is yet to grow.
            Ok(true) if earlier_would_do && matches!(task.step, Step::GrowFilesystem(_)) => Would::Depends,
            Ok(true) => Would::Already,
            Ok(false) if earlier_would_do && task.step.learns_on_the_way() => Would::Depends,
            Ok(false) => Would::Do,
            // What an earlier step has yet to bring about cannot be probed.
            Err(_) if earlier_would_do => Would::Depends,
            Err(e) => return Err(e.on(&plan.volume).in_step(task.name())),
        };
        earlier_would_do |= would != Would::Already;
        lines.push(Preview {
            step: task.name(),
            would,
            what: task.step.describe(task.direction),
            command: task.step.command(task.direction, &plan.volume, &facts),
        });
    }
    Ok(lines)
}

/// Whether `undo` takes back what an earlier line would do.
fn would_apply(lines: &[Preview], plan: &Plan, undo: &Task) -> bool {
    undo.direction == Direction::Undo
        && plan.tasks.iter().zip(lines).any(|(task, line)| {
            task.direction == Direction::Apply
                && task.step.name() == undo.step.name()
                && line.would != Would::Already
        })
}

/// Where a crash test kills this process: `ZEROFSCTL_TEST_KILL=mount:applied`. Debug builds only.
#[cfg(debug_assertions)]
fn crash_point(task: &Task, instant: &str) {
    if let Ok(wanted) = std::env::var("ZEROFSCTL_TEST_KILL")
        && wanted.split_once(':') == Some((task.name(), instant))
    {
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    }
}

#[cfg(not(debug_assertions))]
fn crash_point(_: &Task, _: &str) {}
