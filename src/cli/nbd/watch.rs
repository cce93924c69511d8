use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::cli::{Context, attach};
use crate::error::{Doing, Error, Kind, Result};
use crate::host::nbd::netlink::LinkDead;
use crate::host::nbd::owners::RunDir;
use crate::host::nbd::survey::{self, Roots, Scope};
use crate::host::nbd::{absent, capacity, marks};
use crate::report::nbd::{Change, changes};
use crate::report::{Format, Report};

/// How long keepers may take to answer, all together.
const KEEPERS: Duration = Duration::from_millis(500);

/// Print what becomes of NBD devices, a line each, until Ctrl-C
///
/// The first lines are the devices that are connected already. Then: connected, disconnected, resized, another verdict,
/// and connections that the kernel gives up. As root it also notes since when a leak is one, which zerofsctl nbd gc asks
/// for. With -o json each line is an object.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl nbd watch
  zerofsctl nbd watch --interval 10s -o json")]
pub struct WatchArgs {
    /// How long to wait between two looks; lost connections are told at once
    #[arg(long, value_name = "TIME", default_value = "2s")]
    interval: String,
}

pub fn run(args: &WatchArgs, context: &Context, format: Format) -> Result<Report> {
    let interval = attach::time("--interval", &args.interval)?;
    if interval < Duration::from_millis(10) {
        return Err(Error::usage("--interval is too short").hint("give 10ms or more, such as 2s"));
    }
    let json = match format {
        Format::Json => true,
        Format::Table | Format::Wide => false,
        Format::Yaml | Format::Name => {
            return Err(
                Error::usage("nbd watch prints lines of text or of JSON").hint("give -o table or -o json")
            );
        }
    };
    let run = context.dirs()?.run;
    let root = nix::unistd::geteuid().is_root();
    // The signals become something to wait for: the end comes between two lines.
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().doing("hold back", "signals")?;
    let ended = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).doing("wait for", "signals")?;
    // Without the module there is nothing to hear of yet; it may be loaded later.
    let mut dead_links = LinkDead::listen().ok();
    if let Some(e) = absent(&capacity()?) {
        context.progress.warn(&format!("{e}; {}", e.hint_text().unwrap_or_default()));
    }
    let mut before = Vec::new();
    let mut out = std::io::stdout();
    loop {
        let owners = RunDir::new(&run, KEEPERS);
        let mut now = survey::take(&Roots::default(), &owners, Scope::default())?;
        if root {
            marks::update(&run, &mut now, jiff::Timestamp::now())?;
        }
        for change in changes(&before, &now.devices) {
            if !tell(&mut out, &change, json)? {
                return Ok(silent());
            }
        }
        before = now.devices;
        if dead_links.is_none() && now.capacity.available {
            dead_links = LinkDead::listen().ok();
        }
        let next = Instant::now() + interval;
        loop {
            let left = next.saturating_duration_since(Instant::now());
            let mut fds = vec![
                PollFd::new(ended.as_fd(), PollFlags::POLLIN),
                // Nothing to wait for but that the reader goes away.
                PollFd::new(out.as_fd(), PollFlags::empty()),
            ];
            if let Some(dead_links) = &dead_links {
                fds.push(PollFd::new(dead_links.as_fd(), PollFlags::POLLIN));
            }
            let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, timeout) {
                Err(nix::Error::EINTR) => continue,
                Err(e) => return Err(e).doing("wait for", "a change"),
                Ok(_) => {}
            }
            let happened = |at: usize| fds.get(at).and_then(PollFd::revents).is_some_and(|r| !r.is_empty());
            if happened(0) || happened(1) {
                return Ok(silent());
            }
            if happened(2)
                && let Some(links) = &dead_links
            {
                match links.next(Duration::from_millis(1)) {
                    Ok(Some(index)) => {
                        if !tell(&mut out, &Change::LinkDead { index }, json)? {
                            return Ok(silent());
                        }
                        // What it is to us may have changed as well.
                        break;
                    }
                    Ok(None) => {}
                    Err(e) => {
                        context.progress.warn(&e.to_string());
                        dead_links = None;
                        break;
                    }
                }
            }
            if Instant::now() >= next {
                break;
            }
        }
    }
}

/// Prints a line; false when nobody reads any more, which is no failure.
fn tell(out: &mut std::io::Stdout, change: &Change, json: bool) -> Result<bool> {
    match writeln!(out, "{}", change.line(jiff::Timestamp::now(), json)).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::new(Kind::Failed, format!("cannot print a change: {e}"))),
    }
}

/// Everything was printed already.
fn silent() -> Report {
    Report::printed("nbd-watch")
}
