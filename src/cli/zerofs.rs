use clap::{Args, Subcommand};
use serde_json::json;

use super::Context;
use crate::error::Result;
use crate::host::linux::version_of;
use crate::report::Report;
use crate::zerofs::versions::{Profile, profiles};

/// Tell what is known of ZeroFS itself
#[derive(Debug, Clone, Args)]
pub struct ZerofsArgs {
    #[command(subcommand)]
    command: ZerofsCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum ZerofsCommand {
    /// List the known versions, their faults, the guard against each, and the program found
    Versions,
}

pub fn run(args: &ZerofsArgs, context: &Context) -> Result<Report> {
    let ZerofsCommand::Versions = args.command;
    let found = context.zerofs_program().and_then(|p| version_of(&p).map(|v| (p, v)));
    let known = profiles();
    let row_of = |p: &Profile| {
        let starred = found.as_ref().is_ok_and(|(_, v)| {
            Profile::of(*v).is_ok_and(|f| f.keys == p.keys && f.faults == p.faults && f.format == p.format)
        });
        let faults: Vec<&str> = p.faults.iter().map(|f| f.name).collect();
        let sections: std::collections::BTreeSet<&str> =
            p.keys.iter().map(|k| k.section.split('.').next().unwrap_or(k.section)).collect();
        let store = match (p.file_storage, p.needs_if_match) {
            (true, _) => "s3, file",
            (false, true) => "s3 with If-Match",
            (false, false) => "s3",
        };
        vec![
            format!("{}{}", p.version, if starred { " *" } else { "" }),
            format!("{:?}", p.knowledge).to_lowercase(),
            store.to_owned(),
            faults.len().to_string(),
            sections.into_iter().collect::<Vec<_>>().join(" "),
            if faults.is_empty() { "-".into() } else { faults.join(", ") },
        ]
    };
    let rows = known.iter().map(row_of).collect();
    let mut notes = Vec::new();
    match &found {
        Ok((program, version)) => {
            notes.push(String::new());
            notes.push(format!("Found: {} (version {version}, marked *)", program.display()));
            let profile = Profile::of(*version)?;
            notes.extend(profile.warning.iter().map(|w| format!("warning: {w}")));
            for fault in &profile.faults {
                notes.push(format!("  {}: {}\n    guard: {}", fault.name, fault.what, fault.guard));
            }
        }
        Err(e) => {
            notes.push(String::new());
            notes.push(format!("Found: none ({e})"));
            notes.extend(e.hint_text().map(|hint| format!("hint: {hint}")));
        }
    }
    let program = found.as_ref().ok().map(|(p, v)| json!({"path": p, "version": v}));
    Ok(Report::new("zerofs-versions", json!({"program": program, "profiles": known}))
        .summary("Each row holds from its version up to the next; -o wide names the faults.")
        .table(&["FROM", "KNOWN BY", "STORE", "FAULTS", "CONFIG SECTIONS", "WHICH FAULTS"], rows)
        .wide_from(5)
        .names(known.iter().map(|p| p.version.to_string()))
        .notes(notes))
}
