use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use clap_mangen::roff::{Roff, bold, roman};

use crate::error::{Doing, Result};
use crate::report::Report;

/// Write man pages or shell completions
#[derive(Debug, Clone, Args)]
pub struct GenerateArgs {
    /// What to write
    what: What,
    /// The folder to write into
    dir: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum What {
    /// Man pages, one per command
    Man,
    /// For bash, zsh and fish
    Completions,
}

pub fn run(args: &GenerateArgs) -> Result<Report> {
    std::fs::create_dir_all(&args.dir).doing("make", &args.dir)?;
    let mut command = super::definition();
    command.build();
    let written = match args.what {
        What::Man => man(&command, &args.dir)?,
        What::Completions => completions(&args.dir)?,
    };
    Ok(Report::new("generate", &written).names(written))
}

fn man(command: &clap::Command, dir: &Path) -> Result<Vec<String>> {
    let mut written = Vec::new();
    let mut todo = vec![(command.clone(), "zerofsctl".to_owned())];
    while let Some((command, name)) = todo.pop() {
        for sub in command.get_subcommands().filter(|c| !c.is_hide_set()) {
            todo.push((sub.clone(), format!("{name}-{}", sub.get_name())));
        }
        let text = page(command, &name).doing("render", &name)?;
        let path = dir.join(format!("{name}.1"));
        std::fs::write(&path, text).doing("write", &path)?;
        written.push(format!("{name}.1"));
    }
    written.sort();
    Ok(written)
}

/// One man page: what clap knows of the command, then what holds for all of them.
fn page(mut command: clap::Command, name: &str) -> std::io::Result<Vec<u8>> {
    let usage = command.render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ").to_owned();
    let examples = examples(&command);
    let top = name == "zerofsctl";
    // A page is named for good: clap wants names that live as long as the program.
    let command = command.name(&*name.to_owned().leak()).bin_name(name).override_usage(usage);
    let man = clap_mangen::Man::new(command.clone())
        .title(name.to_uppercase())
        .source(concat!("zerofsctl ", env!("CARGO_PKG_VERSION")))
        .manual("ZeroFS volumes");
    let mut out = Vec::new();
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;
    if command.get_subcommands().any(|c| !c.is_hide_set()) {
        man.render_subcommands_section(&mut out)?;
    }
    let mut roff = Roff::new();
    if !examples.is_empty() {
        roff.control("SH", ["EXAMPLES"]);
        roff.control("nf", []);
        for line in &examples {
            roff.text([roman(line)]);
        }
        roff.control("fi", []);
    }
    let mut section = |title: &str, entries: &[(&str, &str)]| {
        roff.control("SH", [title]);
        for (term, what) in entries {
            roff.control("TP", []);
            roff.text([bold(*term)]);
            roff.text([roman(*what)]);
        }
    };
    section("EXIT STATUS", EXIT_STATUS);
    section("ENVIRONMENT", ENVIRONMENT);
    section("FILES", FILES);
    roff.control("SH", ["SEE ALSO"]);
    let see = if top {
        "mount(8), losetup(8), blkid(8), findmnt(8)".to_owned()
    } else {
        "zerofsctl(1), mount(8), losetup(8)".to_owned()
    };
    roff.text([roman(see)]);
    roff.to_writer(&mut out)?;
    Ok(out)
}

/// The lines below "Examples:" of a command's help.
fn examples(command: &clap::Command) -> Vec<String> {
    let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    text.lines()
        .skip_while(|line| !line.starts_with("Example"))
        .skip(1)
        .take_while(|line| line.starts_with("  "))
        .map(|line| line.trim().to_owned())
        .collect()
}

/// As in the error table, with what only an answer can say.
const EXIT_STATUS: &[(&str, &str)] = &[
    ("0", "Done, or nothing to do."),
    ("1", "Failed; nothing is half done, or the next command settles it."),
    ("2", "Wrong usage: an option, a value, a setting, a password."),
    ("3", "Findings: of fsck, faults or unreadable data; of nbd list --check, a leaked device."),
    ("4", "Warnings only."),
    ("5", "Done in part: some of the volumes, devices or objects failed."),
    ("10", "Not found: no such volume, path or device."),
    ("11", "Busy: another command, node or process holds the volume."),
    ("20", "Unreachable: the store or ZeroFS does not answer."),
    ("130", "Interrupted by a signal or a time limit."),
];

const ENVIRONMENT: &[(&str, &str)] = &[
    ("ZEROFSCTL_STATE_DIR, ZEROFSCTL_RUN_DIR", "As --state-dir and --run-dir."),
    ("ZEROFS_BIN", "As --zerofs-bin: the zerofs program. Otherwise PATH is searched, then ZEROFSCTL_TOOLS."),
    (
        "ZEROFSCTL_TOOLS",
        "A folder with zerofs-VERSION/bin/zerofs in it; ~/.cache/zerofsctl/tools if it is not set.",
    ),
    (
        "ZEROFS_ENCRYPTION_PASSWORD_FILE, ZEROFS_ENCRYPTION_PASSWORD",
        "The encryption password of the volume: a file that holds it, or itself. Not both. A Secret that the \
settings name goes first.",
    ),
    (
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN",
        "Keys for S3, where the settings name no Secret for them. Without any, the role of the machine.",
    ),
    ("NODE_ID", "The name of this node in the catalog; the host name if it is not set."),
    ("NO_COLOR", "No colours, if it is set."),
];

const FILES: &[(&str, &str)] = &[
    ("/run/zerofsctl/volumes/VOLUME/", "Journal, sockets and replay log of an attached volume."),
    ("/run/zerofsctl/locks/", "One lock per volume, held by the command at work."),
    (
        "/var/lib/zerofsctl/volumes/VOLUME/",
        "Config (mode 0600) and cache of an attached volume, and how its store is reached.",
    ),
    ("/var/lib/zerofsctl/logs/VOLUME/", "zerofs.log and keeper.log; kept after a detach."),
    ("/var/lib/zerofsctl/store/", "The embedded store, for volumes without a storage URL."),
    ("/var/lib/zerofsctl/store.password", "Its encryption password (mode 0600). Keep a copy."),
];

fn completions(dir: &Path) -> Result<Vec<String>> {
    use clap_complete::Shell;
    // Without what nobody is to type; clap has no other way to leave it out.
    let all = super::definition();
    let mut command = clap::Command::new("zerofsctl")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_flag(true)
        .disable_help_subcommand(true)
        .args(all.get_arguments().cloned())
        .subcommands(all.get_subcommands().filter(|c| !c.is_hide_set()).cloned());
    let mut written = Vec::new();
    for (shell, name) in
        [(Shell::Bash, "zerofsctl.bash"), (Shell::Zsh, "_zerofsctl"), (Shell::Fish, "zerofsctl.fish")]
    {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut command, "zerofsctl", &mut text);
        let path = dir.join(name);
        std::fs::write(&path, text).doing("write", &path)?;
        written.push(name.to_owned());
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn man_pages_and_help_tell_every_exit_code() {
        let mut command = super::super::definition();
        let help = command.render_help().to_string();
        for kind in Kind::ALL {
            let code = kind.row().exit.to_string();
            assert!(EXIT_STATUS.iter().any(|(c, _)| *c == code), "{kind:?}");
            assert!(help.contains(&format!("  {code} ")), "{kind:?}");
        }
        for (variable, _) in ENVIRONMENT {
            assert!(help.contains(variable), "{variable}");
        }
    }

    #[test]
    fn every_command_has_a_page_with_examples() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = super::super::definition();
        command.build();
        let written = man(&command, dir.path()).unwrap();
        assert!(written.contains(&"zerofsctl-zerofs-versions.1".to_owned()), "{written:?}");
        assert!(!written.iter().any(|name| name.contains("keeper")), "{written:?}");
        for name in ["attach", "detach", "list", "show", "resize", "fsck", "recover"] {
            let text = std::fs::read_to_string(dir.path().join(format!("zerofsctl-{name}.1"))).unwrap();
            for section in ["SYNOPSIS", "EXAMPLES", "EXIT STATUS", "ENVIRONMENT", "FILES"] {
                assert!(
                    text.contains(&format!(".SH \"{section}\"")) || text.contains(&format!(".SH {section}")),
                    "{name}: {section}"
                );
            }
        }
    }
}
