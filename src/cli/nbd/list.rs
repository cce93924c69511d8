use std::time::Duration;

use clap::Args;

use crate::cli::Context;
use crate::error::Result;
use crate::host::nbd::owners::RunDir;
use crate::host::nbd::survey::{self, Roots, Scope};
use crate::host::nbd::{absent, marks};
use crate::report::{Format, Report, nbd};

/// How long keepers may take to answer, all together: a list should not hang for one that is stopped.
const KEEPERS: Duration = Duration::from_millis(500);

/// List the connected NBD devices, who uses and serves each, and what it is to us
///
/// The verdict is ours-in-use (mounted, held or open), ours-idle (nobody uses it, but a keeper, ZeroFS or a command
/// stands behind it), ours-leaked (nobody uses it and nothing stands behind it), foreign (connected by others), or
/// unknown (something could not be looked at). Mounts are looked for in every mount namespace.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl nbd list
  zerofsctl nbd list --all -o wide
  zerofsctl nbd list --check || zerofsctl nbd gc")]
pub struct ListArgs {
    /// Also devices that are not connected
    #[arg(long)]
    all: bool,
    /// Exit with code 3 when a device of ours is leaked, 4 when it is not known whether one is
    #[arg(long)]
    check: bool,
}

pub fn run(args: &ListArgs, context: &Context, format: Format) -> Result<Report> {
    let dirs = context.dirs()?;
    // A table shows no openers, so only those are looked for that a verdict depends on.
    let openers = matches!(format, Format::Wide | Format::Json | Format::Yaml);
    let scope = Scope { all: args.all, openers };
    let mut survey = survey::take(&Roots::default(), &RunDir::new(&dirs.run, KEEPERS), scope)?;
    marks::fill(&dirs.run, &mut survey);
    let report = nbd::list(&survey, args.check, jiff::Timestamp::now());
    Ok(report.notes(absent(&survey.capacity).iter().flat_map(nbd::why_none)))
}
