//! Progress on standard error: a spinner on a terminal, plain lines otherwise, JSON lines where asked for.

use std::cell::RefCell;
use std::io::{IsTerminal, Write};
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde_json::json;

use crate::error::Error;
use crate::journal::Outcome;
use crate::plan::{Plan, Task};
use crate::run::Observer;

/// Shows steps as they happen.
#[derive(Clone)]
pub struct Progress(Rc<Inner>);

struct Inner {
    bar: Option<ProgressBar>,
    /// Ends the thread that tells, without a terminal, that a step is still at work.
    heartbeat: RefCell<Option<mpsc::Sender<()>>>,
    json: bool,
    verbose: u8,
}

/// A line on standard error. A reader that went away is no reason to stop half-way.
fn print(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

fn formed(word: &str, text: &str, json: bool) -> String {
    if !json {
        return format!("{word}: {text}");
    }
    let level = if word == "warning" { "WARN" } else { "INFO" };
    json!({"timestamp": Timestamp::now(), "level": level, "message": text}).to_string()
}

/// Says `what` every ten seconds, until the sender is dropped.
fn beat(what: String, json: bool) -> Option<mpsc::Sender<()>> {
    let (sender, receiver) = mpsc::channel();
    let begun = std::time::Instant::now();
    let work = move || {
        while receiver.recv_timeout(Duration::from_secs(10)) == Err(mpsc::RecvTimeoutError::Timeout) {
            print(&formed("progress", &format!("{what}, {} s", begun.elapsed().as_secs()), json));
        }
    };
    // Without a thread there is just no word.
    std::thread::Builder::new().stack_size(64 * 1024).spawn(work).ok().map(|_| sender)
}

impl Progress {
    /// A spinner if standard error is a terminal.
    pub fn new(verbose: u8, json: bool) -> Progress {
        let bar = (std::io::stderr().is_terminal() && !json).then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar
        });
        Progress(Rc::new(Inner { bar, heartbeat: RefCell::new(None), json, verbose }))
    }

    /// Takes the spinner away, before anything else is printed.
    pub fn finish(&self) {
        if let Some(bar) = &self.0.bar {
            bar.disable_steady_tick();
            bar.finish_and_clear();
        }
    }

    /// A warning, always shown.
    pub fn warn(&self, text: &str) {
        self.line("warning", text);
    }

    /// What a watcher tells, always shown.
    pub fn event(&self, event: &crate::watch::Event) {
        let volume = event.volume().map(|v| format!("volume {v}: ")).unwrap_or_default();
        if self.0.json {
            let level = if event.is_bad() { "WARN" } else { "INFO" };
            let line = json!({"timestamp": Timestamp::now(), "level": level, "event": event.name(),
                "volume": event.volume(), "message": event.message()});
            return self.print(&line.to_string());
        }
        let word = if event.is_bad() { "warning" } else { "note" };
        self.print(&format!("{word}: {volume}{}", event.message()));
    }

    fn line(&self, word: &str, text: &str) {
        self.print(&formed(word, text, self.0.json));
    }

    fn print(&self, line: &str) {
        match &self.0.bar {
            Some(bar) if !bar.is_finished() => bar.suspend(|| print(line)),
            _ => print(line),
        }
    }

    /// Shows how far a long operation is: at most a few lines a second on a terminal, one in ten seconds elsewhere.
    pub fn long(&self) -> crate::host::linux::Progress {
        let this = self.clone();
        let last = std::cell::Cell::new(None::<std::time::Instant>);
        Box::new(move |what, done, of| {
            let pause =
                if this.0.bar.is_some() { Duration::from_millis(200) } else { Duration::from_secs(10) };
            if last.get().is_some_and(|at| at.elapsed() < pause) {
                return;
            }
            let first = last.replace(Some(std::time::Instant::now())).is_none();
            let text = match of {
                // Small numbers are seconds, large ones bytes.
                Some(of) if of >= 1 << 20 => {
                    format!(
                        "{what}: {} of {} ({}%)",
                        crate::values::ByteSize(done),
                        crate::values::ByteSize(of),
                        done * 100 / of
                    )
                }
                Some(of) => format!("{what}: {done} s of at most {of} s"),
                None => format!("{what}: {done} s"),
            };
            match &this.0.bar {
                Some(bar) => bar.set_message(text),
                None if first => {}
                None => this.line("progress", &text),
            }
        })
    }
}

impl Observer for Progress {
    fn started(&self, plan: &Plan, task: &Task) {
        if let Some(bar) = &self.0.bar {
            bar.reset();
            bar.enable_steady_tick(Duration::from_millis(100));
            bar.set_message(format!("{}: {}", plan.volume, task.step.describe(task.direction)));
        } else if !matches!(task.name(), "stop" | "read-data") {
            // Those two tell how far they are; of the others, somebody who waits should at least hear that they go on.
            let what = format!("volume {}: step {}: still at work", plan.volume, task.name());
            *self.0.heartbeat.borrow_mut() = beat(what, self.0.json);
        }
    }

    fn failed(&self, _: &Plan, _: &Task, _: &Error) {
        *self.0.heartbeat.borrow_mut() = None;
    }

    fn settled(&self, plan: &Plan, task: &Task, outcome: Outcome, elapsed: Duration) {
        *self.0.heartbeat.borrow_mut() = None;
        let outcome = match outcome {
            Outcome::Already => "already",
            Outcome::Done => "done",
        };
        if self.0.json {
            let milliseconds = (elapsed.as_secs_f64() * 1e6).round() / 1e3;
            let line = json!({"timestamp": Timestamp::now(), "level": "INFO",
                "message": task.step.describe(task.direction), "volume": plan.volume,
                "operation": plan.operation.name(), "step": task.name(), "outcome": outcome,
                "milliseconds": milliseconds});
            print(&line.to_string());
        } else if self.0.verbose > 0 {
            let milliseconds = elapsed.as_secs_f64() * 1e3;
            self.print(&format!("{}: {} {outcome} ({milliseconds:.1} ms)", plan.volume, task.name()));
        }
    }

    fn note(&self, text: &str) {
        self.line("note", text);
    }

    fn interrupted(&self) -> bool {
        super::context::interrupted()
    }
}
