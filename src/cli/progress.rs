//! Progress on standard error: a spinner on a terminal, plain lines otherwise, JSON lines where asked for.

use std::io::{IsTerminal, Write};
use std::rc::Rc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde_json::json;

use crate::journal::Outcome;
use crate::plan::{Plan, Task};
use crate::run::Observer;

/// Shows steps as they happen.
#[derive(Clone)]
pub struct Progress(Rc<Inner>);

struct Inner {
    bar: Option<ProgressBar>,
    json: bool,
    verbose: u8,
}

/// A line on standard error. A reader that went away is no reason to stop half-way.
fn print(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

impl Progress {
    /// A spinner if standard error is a terminal.
    pub fn new(verbose: u8, json: bool) -> Progress {
        let bar = (std::io::stderr().is_terminal() && !json).then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Progress(Rc::new(Inner { bar, json, verbose }))
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

    fn line(&self, word: &str, text: &str) {
        if self.0.json {
            let level = if word == "warning" { "WARN" } else { "INFO" };
            print(&json!({"timestamp": Timestamp::now(), "level": level, "message": text}).to_string());
            return;
        }
        self.print(&format!("{word}: {text}"));
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
        }
    }

    fn settled(&self, plan: &Plan, task: &Task, outcome: Outcome, elapsed: Duration) {
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
