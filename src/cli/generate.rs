use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

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
        What::Completions => completions(&mut command, &args.dir)?,
    };
    Ok(Report::new("generate", &written).names(written))
}

fn man(command: &clap::Command, dir: &Path) -> Result<Vec<String>> {
    let mut written = Vec::new();
    let mut page = |command: clap::Command, name: String| -> Result<()> {
        let mut text = Vec::new();
        clap_mangen::Man::new(command).title(name.to_uppercase()).render(&mut text).doing("render", &name)?;
        let path = dir.join(format!("{name}.1"));
        std::fs::write(&path, text).doing("write", &path)?;
        written.push(format!("{name}.1"));
        Ok(())
    };
    page(command.clone(), "zerofsctl".into())?;
    for sub in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        let name = format!("zerofsctl-{}", sub.get_name());
        // A page is named for good: clap wants names that live as long as the program.
        let sub = sub.clone().name(&*name.clone().leak());
        page(sub, name)?;
    }
    Ok(written)
}

fn completions(command: &mut clap::Command, dir: &Path) -> Result<Vec<String>> {
    use clap_complete::Shell;
    let mut written = Vec::new();
    for (shell, name) in
        [(Shell::Bash, "zerofsctl.bash"), (Shell::Zsh, "_zerofsctl"), (Shell::Fish, "zerofsctl.fish")]
    {
        let mut text = Vec::new();
        clap_complete::generate(shell, command, "zerofsctl", &mut text);
        let path = dir.join(name);
        std::fs::write(&path, text).doing("write", &path)?;
        written.push(name.to_owned());
    }
    Ok(written)
}
