use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use super::context::Purpose;
use super::{Context, StorageArgs};
use crate::error::{Doing, Error, Result};
use crate::host::StopOptions;
use crate::host::linux::Dirs;
use crate::ops::{self, AttachSpec, Scope};
use crate::report::Report;
use crate::run::{Engine, RunReport};
use crate::values::{ByteSize, FsType, TargetPath, VolumeId};

/// Try it out: attach, write, detach, compare, resize, check, clean up
///
/// It takes the real ZeroFS, a real block device and a real filesystem, on a store of its own in the state folder, and
/// removes everything again.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Leave the volume attached at the end, and say how to take it away
    #[arg(long)]
    keep: bool,
}

/// Written, and read back after a detach.
const DATA: usize = 16 << 20;

pub fn run(args: &DemoArgs, context: &Context) -> Result<Report> {
    context.require_root()?;
    let roots = context.dirs()?;
    let name = format!("demo-{}", std::process::id());
    let dirs = Dirs { state: roots.state.join(&name), run: roots.run.join(&name) };
    let mut demo = Demo { context: context.for_trial(&dirs), rows: Vec::new(), data: Vec::new() };
    let begun = Instant::now();
    let result = demo.story(&dirs, args.keep);
    if result.is_err() {
        // Whatever failed, nothing stays; a second failure would hide the first.
        let _ = demo.detach();
    }
    if result.is_err() || !args.keep {
        for dir in [&dirs.state, &dirs.run] {
            let _ = fs::remove_dir_all(dir);
            // Only what the demo itself had to make.
            let _ = dir.parent().map(fs::remove_dir);
        }
    }
    result?;
    let mut report = Report::new("demo", json!({"runs": demo.data}))
        .summary(format!(
            "All of it worked: {} written, found again after a detach, and still there after growing. {:.1} s.",
            ByteSize(DATA as u64),
            begun.elapsed().as_secs_f64()
        ))
        .table(&["OPERATION", "STEP", "OUTCOME", "TIME", "WHAT"], demo.rows)
        .names(["demo".to_owned()]);
    if args.keep {
        let flags = format!("--state-dir {} --run-dir {}", dirs.state.display(), dirs.run.display());
        report = report.notes([
            format!("kept: the volume demo is attached at {}", dirs.run.join("mnt").display()),
            format!(
                "take it away: zerofsctl {flags} detach demo && rm -r {} {}",
                dirs.state.display(),
                dirs.run.display()
            ),
        ]);
    }
    Ok(report)
}

struct Demo {
    context: Context,
    rows: Vec<Vec<String>>,
    data: Vec<serde_json::Value>,
}

impl Demo {
    fn volume() -> Result<VolumeId> {
        "demo".parse()
    }

    fn story(&mut self, dirs: &Dirs, keep: bool) -> Result<()> {
        let mnt = dirs.run.join("mnt");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dirs.run).doing("make", &dirs.run)?;
        let written: Vec<u8> =
            (0..DATA as u32 / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let file = mnt.join("data");

        self.attach(&mnt)?;
        self.timed("write", &format!("write {} and fsync", ByteSize(DATA as u64)), || {
            let mut f = fs::File::create(&file).doing("make", &file)?;
            f.write_all(&written).doing("write", &file)?;
            f.sync_all().doing("sync", &file)
        })?;
        self.detach()?;
        self.attach(&mnt)?;
        self.timed("compare", "read it back and compare", || compare(&file, &written))?;
        // Online where the machine permits it, else between a detach and an attach.
        let online = self.with(|engine, _, _| Ok(engine.host.can_grow_mounted(FsType::Ext4).is_ok()))?;
        if !online {
            self.detach()?;
        }
        self.resize(&mnt)?;
        self.attach(&mnt)?;
        self.timed("compare", "read it back and compare", || compare(&file, &written))?;
        self.detach()?;
        self.fsck(&mnt)?;
        if keep {
            self.attach(&mnt)?;
        }
        Ok(())
    }

    fn timed(&mut self, name: &'static str, what: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let begun = Instant::now();
        work()?;
        self.row("", name, "done", begun.elapsed(), what);
        Ok(())
    }

    fn row(&mut self, operation: &str, step: &str, outcome: &str, elapsed: Duration, what: &str) {
        let time = format!("{:.1} ms", elapsed.as_secs_f64() * 1e3);
        self.rows.push(vec![operation.into(), step.into(), outcome.into(), time, what.into()]);
    }

    fn add(&mut self, operation: &'static str, run: &RunReport) {
        for (i, t) in run.tasks.iter().enumerate() {
            let operation = if i == 0 { operation } else { "" };
            let outcome = format!("{:?}", t.outcome).to_lowercase();
            self.row(operation, t.step, &outcome, t.elapsed, &t.what);
        }
        self.data.push(json!({"operation": operation, "steps": run.tasks, "facts": run.facts}));
    }

    fn spec(&self, mnt: &Path, url: String) -> Result<AttachSpec> {
        Ok(AttachSpec::plain(Self::volume()?, TargetPath::new(mnt, &self.context.cwd)?, url))
    }

    fn with<T>(&mut self, work: impl FnOnce(&Engine<'_>, &Dirs, String) -> Result<T>) -> Result<T> {
        let host = self.context.host(&Self::volume()?, &StorageArgs::default(), Purpose::Start)?;
        let dirs = self.context.dirs()?;
        let url = host.catalog().url().to_string();
        work(&self.context.engine(&host), &dirs, url)
    }

    fn attach(&mut self, mnt: &Path) -> Result<()> {
        let spec = self.spec(mnt, String::new())?;
        let run = self.with(|engine, dirs, storage_url| {
            ops::attach::attach(engine, &dirs.run, &AttachSpec { storage_url, ..spec })
        })?;
        self.add("attach", &run);
        Ok(())
    }

    fn detach(&mut self) -> Result<()> {
        let volume = Self::volume()?;
        let run = self.with(|engine, dirs, _| {
            ops::detach::detach(engine, &dirs.run, &volume, &Scope::Volume, StopOptions::default())
        })?;
        if let Some(run) = run {
            self.add("detach", &run);
        }
        Ok(())
    }

    fn resize(&mut self, mnt: &Path) -> Result<()> {
        let spec = self.spec(mnt, String::new())?;
        let run = self.with(|engine, dirs, storage_url| {
            let spec = AttachSpec { storage_url, ..spec };
            ops::resize::resize(engine, &dirs.run, &spec, ByteSize(2 * ByteSize::GIB))
        })?;
        self.add("resize", &run);
        Ok(())
    }

    fn fsck(&mut self, mnt: &Path) -> Result<()> {
        let attach = self.spec(mnt, String::new())?;
        let run = self.with(|engine, dirs, storage_url| {
            let spec = ops::fsck::FsckSpec {
                attach: AttachSpec { storage_url, ..attach },
                repair: false,
                read_data: None,
            };
            ops::fsck::fsck(engine, &dirs.run, &spec)
        })?;
        self.add("fsck", &run);
        if run.facts.check.as_ref().is_some_and(|c| c.clean) {
            return Ok(());
        }
        Err(Error::failed("the filesystem of the demo has faults")
            .hint("this must not happen: please report it, with the logs below the state folder"))
    }
}

fn compare(path: &Path, wanted: &[u8]) -> Result<()> {
    let mut found = Vec::with_capacity(wanted.len());
    fs::File::open(path).doing("open", path)?.read_to_end(&mut found).doing("read", path)?;
    if found == wanted {
        return Ok(());
    }
    let at = found.iter().zip(wanted).position(|(a, b)| a != b).unwrap_or(found.len().min(wanted.len()));
    Err(Error::failed(format!("what was read back differs from what was written, from byte {at} on"))
        .hint("this must not happen: please report it, with the logs below the state folder"))
}
