//! What a command answers: one value, printed as a table, as JSON or YAML, or as bare names. The JSON has a
//! schema version; fields are only ever added to it.

use std::io::Write;

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::journal::Outcome;
use crate::run::{Preview, RunReport, Would};

pub mod nbd;
pub mod gc;
pub mod gc_metrics;
pub mod operation;
pub mod volume;

/// The version of the JSON form.
pub const SCHEMA: u32 = 1;

/// `-o`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// A table for people.
    #[default]
    Table,
    /// The table with more columns.
    Wide,
    /// One JSON object.
    Json,
    /// The same as YAML.
    Yaml,
    /// Bare names, one per line.
    Name,
}

/// A count with its noun: `1 volume`, `2 volumes`.
pub fn counted<N: std::fmt::Display + PartialEq + From<u8>>(n: N, noun: &str) -> String {
    let s = if n == N::from(1) { "" } else { "s" };
    format!("{n} {noun}{s}")
}

/// A command's answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// `attach`, `list`, …; goes into the JSON.
    pub kind: &'static str,
    /// A line above the table.
    pub summary: Option<String>,
    /// Column heads; those after `wide_from` only show in wide tables.
    pub columns: Vec<&'static str>,
    /// From which column on only a wide table shows them.
    pub wide_from: usize,
    /// Rows, as long as `columns`.
    pub rows: Vec<Vec<String>>,
    /// Lines below the table.
    pub notes: Vec<String>,
    /// For `-o name`.
    pub names: Vec<String>,
    /// For JSON and YAML.
    pub data: Value,
    /// The exit code.
    pub exit: u8,
    /// It was printed while it came to be.
    pub printed: bool,
}

impl Report {
    /// An answer with data and nothing to show yet.
    pub fn new(kind: &'static str, data: impl Serialize) -> Report {
        Report {
            kind,
            summary: None,
            columns: Vec::new(),
            wide_from: usize::MAX,
            rows: Vec::new(),
            notes: Vec::new(),
            names: Vec::new(),
            data: serde_json::to_value(data).unwrap_or(Value::Null),
            exit: 0,
            printed: false,
        }
    }

    /// Nothing to print: the answer was given line by line.
    pub fn printed(kind: &'static str) -> Report {
        Report { printed: true, ..Report::new(kind, ()) }
    }

    /// With a line above the table.
    pub fn summary(mut self, text: impl Into<String>) -> Report {
        self.summary = Some(text.into());
        self
    }

    /// With a table.
    pub fn table(mut self, columns: &[&'static str], rows: Vec<Vec<String>>) -> Report {
        self.columns = columns.to_vec();
        self.rows = rows;
        self
    }

    /// Columns from this one on are for wide tables only.
    pub fn wide_from(mut self, column: usize) -> Report {
        self.wide_from = column;
        self
    }

    /// With lines below.
    pub fn notes(mut self, notes: impl IntoIterator<Item = String>) -> Report {
        self.notes.extend(notes);
        self
    }

    /// With names for `-o name`.
    pub fn names(mut self, names: impl IntoIterator<Item = String>) -> Report {
        self.names.extend(names);
        self
    }

    /// With an exit code.
    pub fn exit(mut self, code: u8) -> Report {
        self.exit = code;
        self
    }

    /// The report of a run: its steps with timings.
    pub fn of_run(kind: &'static str, volume: &crate::values::VolumeId, run: &RunReport) -> Report {
        let rows = run
            .tasks
            .iter()
            .map(|t| {
                let outcome = match t.outcome {
                    Outcome::Already => "already",
                    Outcome::Done => "done",
                };
                let time = format!("{:.1} ms", t.elapsed.as_secs_f64() * 1e3);
                vec![t.step.to_owned(), outcome.to_owned(), time, t.what.clone()]
            })
            .collect();
        Report::new(
            kind,
            json!({"volume": volume, "already": run.already(), "steps": run.tasks, "facts": run.facts}),
        )
        .table(&["STEP", "OUTCOME", "TIME", "WHAT"], rows)
        .notes(run.facts.notes.iter().map(|n| format!("note: {n}")))
        .names([volume.to_string()])
    }

    /// The report of a dry run: what would be done, and how by hand.
    pub fn of_preview(kind: &'static str, volume: &crate::values::VolumeId, lines: &[Preview]) -> Report {
        let rows = lines
            .iter()
            .map(|l| {
                let would = match l.would {
                    Would::Already => "already",
                    Would::Do => "would do",
                    Would::Depends => "depends",
                };
                vec![l.step.to_owned(), would.to_owned(), l.what.clone()]
            })
            .collect();
        // Not in the table: a command that is broken into a column cannot be copied.
        // Nor is there what is so already: a mkfs that nobody needs must not lie around.
        let by_hand: Vec<String> = lines
            .iter()
            .filter(|l| l.would != Would::Already && l.command != "true")
            .map(|l| format!("  {}", l.command))
            .collect();
        let head =
            if by_hand.is_empty() { vec![] } else { vec![String::new(), "By hand, about:".to_owned()] };
        Report::new(kind, json!({"volume": volume, "dry_run": true, "steps": lines}))
            .summary(format!("{kind} {volume}: a dry run, nothing was changed"))
            .table(&["STEP", "WOULD", "WHAT"], rows)
            .notes(head.into_iter().chain(by_hand))
            .names([volume.to_string()])
    }

    /// Prints it to `out`; `width` is that of the terminal, if it is one.
    pub fn print(&self, format: Format, width: Option<u16>, out: &mut dyn Write) -> Result<()> {
        let text = self.render(format, width)?;
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            // `zerofsctl list | head -1` is no failure.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            Err(e) => Err(Error::failed(format!("cannot print the report: {e}"))),
            Ok(()) => Ok(()),
        }
    }

    /// The text of it.
    pub fn render(&self, format: Format, width: Option<u16>) -> Result<String> {
        if self.printed {
            return Ok(String::new());
        }
        let failed = |e: &dyn std::fmt::Display| Error::failed(format!("cannot encode the report: {e}"));
        Ok(match format {
            Format::Json => {
                let mut text = serde_json::to_string_pretty(&self.object()).map_err(|e| failed(&e))?;
                text.push('\n');
                text
            }
            Format::Yaml => serde_yaml::to_string(&self.object()).map_err(|e| failed(&e))?,
            Format::Name => self.names.iter().map(|n| format!("{n}\n")).collect(),
            Format::Table | Format::Wide => self.render_table(format == Format::Wide, width),
        })
    }

    fn object(&self) -> Value {
        json!({"schema": SCHEMA, "kind": self.kind, "data": self.data})
    }

    fn render_table(&self, wide: bool, width: Option<u16>) -> String {
        let mut text = String::new();
        if let Some(summary) = &self.summary {
            text.push_str(summary);
            text.push('\n');
        }
        let shown = if wide { self.columns.len() } else { self.wide_from.min(self.columns.len()) };
        if shown > 0 {
            let mut table = Table::new();
            table.load_style(presets::NOTHING).set_header(self.columns[..shown].to_vec());
            match width {
                Some(width) => table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width),
                None => table.set_content_arrangement(ContentArrangement::Disabled),
            };
            for row in &self.rows {
                table.add_row(row[..shown].iter().map(|text| {
                    let cell = Cell::new(text);
                    if text.ends_with(" ms") { cell.set_alignment(CellAlignment::Right) } else { cell }
                }));
            }
            for line in table.to_string().lines() {
                // The preset pads both sides of every cell.
                text.push_str(line.strip_prefix(' ').unwrap_or(line).trim_end());
                text.push('\n');
            }
        }
        for note in &self.notes {
            text.push_str(note);
            text.push('\n');
        }
        text
    }
}
