//! `--metrics-file`: what a run came to, for Prometheus, written however it ends.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use super::Store;
use crate::cli::Context;
use crate::error::{Doing, Error, Result};
use crate::report::Report;
use crate::report::gc_metrics::{RunMetrics, Told};

/// No file of ours is larger.
const LONGEST: u64 = 1 << 20;

/// See the module.
#[derive(Debug, Clone, Args)]
pub struct MetricsArgs {
    /// Write metrics of this run there, for Prometheus: in the folder of node_exporter's textfile collector, ending in .prom
    #[arg(long, value_name = "FILE")]
    metrics_file: Option<PathBuf>,
}

impl MetricsArgs {
    /// Whether any are wanted.
    pub(super) fn wanted(&self) -> bool {
        self.metrics_file.is_some()
    }

    /// Runs the command, and writes what it noted, whether it ends well or not.
    ///
    /// # Errors
    /// Those of `work`; and one that the file cannot be written, before anything else is done. When it cannot be written
    /// in the end, that is a warning, with exit code 4 where all else went well.
    pub(super) fn note(
        &self,
        command: Told,
        store: &Store,
        context: &Context,
        work: impl FnOnce(&mut RunMetrics) -> Result<Report>,
    ) -> Result<Report> {
        let mut metrics = RunMetrics::new(command, store.url());
        let Some(path) = self.metrics_file.as_ref().map(|path| context.cwd.join(path)) else {
            return work(&mut metrics);
        };
        let begun = Instant::now();
        let before = before(&path)?;
        let mut result = work(&mut metrics);
        let exit = result.as_ref().map_or_else(|e| e.kind().row().exit, |report| report.exit);
        let text = metrics.text(exit, jiff::Timestamp::now(), begun.elapsed(), &before);
        if let Err(e) = write(&path, &text) {
            context.progress.warn(&e.to_string());
            if let Ok(report) = &mut result
                && report.exit == 0
            {
                report.exit = 4;
            }
        }
        result
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The metrics of the run before. What is there must be a file of ours, so that a slip of the hand replaces nothing else.
fn before(path: &Path) -> Result<String> {
    let hint =
        "name a file in a folder that is there, such as /var/lib/prometheus/node-exporter/zerofs-gc.prom";
    let wrong = |why: &str| Error::usage(format!("--metrics-file: {} {why}", path.display())).hint(hint);
    if !folder(path).is_dir() {
        return Err(wrong("is in no folder that is there"));
    }
    // Now, rather than after a deletion that nobody would hear of.
    tempfile::Builder::new()
        .tempfile_in(folder(path))
        .doing("write --metrics-file in", folder(path))
        .map_err(|e| e.hint(hint))?;
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(e) => return Err(e).doing("examine", path),
        Ok(meta) if !meta.is_file() => return Err(wrong("is not a file")),
        Ok(meta) if meta.len() > LONGEST => return Err(wrong("is no file of metrics")),
        Ok(_) => {}
    }
    let text = String::from_utf8_lossy(&std::fs::read(path).doing("read", path)?).into_owned();
    if text.trim().is_empty() || text.lines().any(|l| l.starts_with("# TYPE zerofs_gc_")) {
        return Ok(text);
    }
    Err(wrong("holds something else than metrics of gc-s3"))
}

/// Whole or not at all, and for others to read: node_exporter is another user.
fn write(path: &Path, text: &str) -> Result<()> {
    let mut file = tempfile::Builder::new()
        .prefix(".zerofs-gc-")
        .permissions(std::fs::Permissions::from_mode(0o644))
        .tempfile_in(folder(path))
        .doing("write metrics in", folder(path))?;
    file.write_all(text.as_bytes()).doing("write metrics in", folder(path))?;
    // The umask of the caller counts in the making.
    std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o644))
        .doing("write metrics in", folder(path))?;
    file.persist(path).map_err(|e| e.error).doing("write the metrics", path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn only_a_file_of_ours_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("zerofs-gc.prom");
        assert_eq!(before(&path).unwrap(), "");
        write(&path, "# TYPE zerofs_gc_volumes gauge\n").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(before(&path).unwrap(), "# TYPE zerofs_gc_volumes gauge\n");
        let other = dir.path().join("zerofs.yaml");
        std::fs::write(&other, "storageURL: s3://zerofs\n").unwrap();
        for wrong in [other.as_path(), dir.path(), Path::new("/dev/zero")] {
            let e = before(wrong).unwrap_err();
            assert!(e.kind() == Kind::Usage || wrong == Path::new("/dev/zero"), "{e}");
            assert!(e.hint_text().is_some(), "{e}");
        }
        let e = before(&dir.path().join("nowhere/x.prom")).unwrap_err();
        assert!(e.message().contains("nowhere") && e.hint_text().is_some(), "{e}");
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }
}
