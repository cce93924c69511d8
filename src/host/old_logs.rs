//! Logs stay after a detach, so that what went wrong can be found out later; not for ever, on a node where volumes come and go.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::linux::Dirs;
use crate::error::{Doing, Result};
use crate::journal::Held;
use crate::keeper::{KEEPER_LOG, ZEROFS_LOG};
use crate::values::VolumeId;

/// How long after the last line.
pub const KEPT: Duration = Duration::from_secs(14 * 24 * 3600);

/// Removes the logs of volumes that are not here any more, and that nothing was written to for [`KEPT`]. A volume that an
/// operation works on is left alone, and so is every file and folder that is not a log of ours.
pub fn remove(dirs: &Dirs, now: SystemTime) -> Result<()> {
    let folder = dirs.state.join("logs");
    let entries = match std::fs::read_dir(&folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.doing("read the folder", &folder)?,
    };
    for entry in entries {
        let entry = entry.doing("read the folder", &folder)?;
        let Some(volume) = entry.file_name().to_str().and_then(|n| n.parse::<VolumeId>().ok()) else {
            continue;
        };
        // Looked at without the lock first: taking it could fail a command that wants it.
        if is_here(dirs, &volume) || !is_old(&entry.path(), now)? {
            continue;
        }
        let Ok(held) = Held::take(&dirs.run, &volume) else { continue };
        if !is_here(dirs, &volume) && is_old(&entry.path(), now)? {
            remove_logs(&entry.path())?;
        }
        held.release()?;
    }
    Ok(())
}

fn is_here(dirs: &Dirs, volume: &VolumeId) -> bool {
    dirs.volume_run(volume).exists() || dirs.volume_state(volume).exists()
}

/// Whether it and everything in it is. A time that lies ahead is that of a clock which was wrong, now or then: not old.
fn is_old(folder: &Path, now: SystemTime) -> Result<bool> {
    let old = |path: &Path| -> Result<bool> {
        let written = path.metadata().and_then(|m| m.modified()).doing("look at", path)?;
        Ok(now.duration_since(written).unwrap_or_default() >= KEPT)
    };
    // Each attach makes a file in it, or has done so not long ago: mostly that one look is enough.
    if !old(folder)? {
        return Ok(false);
    }
    for entry in std::fs::read_dir(folder).doing("read the folder", folder)? {
        if !old(&entry.doing("read the folder", folder)?.path())? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn remove_logs(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).doing("read the folder", folder)? {
        let entry = entry.doing("read the folder", folder)?;
        let name = entry.file_name();
        if name.to_str().is_some_and(|n| n.starts_with(ZEROFS_LOG) || n.starts_with(KEEPER_LOG)) {
            std::fs::remove_file(entry.path()).doing("remove", entry.path())?;
        }
    }
    match std::fs::remove_dir(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::DirectoryNotEmpty => Err(e).doing("remove", folder),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    #[test]
    fn only_old_logs_of_volumes_that_are_gone_go() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = Dirs { state: dir.path().join("s"), run: dir.path().join("r") };
        let (now, old) = (SystemTime::now(), SystemTime::now() - KEPT - Duration::from_secs(60));
        let log = |volume: &str, name: &str, time: SystemTime| {
            let folder = dirs.state.join("logs").join(volume);
            fs::create_dir_all(&folder).unwrap();
            File::create(folder.join(name)).unwrap().set_modified(time).unwrap();
            File::open(&folder).unwrap().set_modified(old).unwrap();
        };
        for (volume, time) in [
            ("gone", old),
            ("young", now),
            ("here", old),
            ("claimed", old),
            ("busy", old),
            ("ahead", now + KEPT),
        ] {
            log(volume, "zerofs.log", time);
            log(volume, "zerofs.log.1", old);
            log(volume, "keeper.log", old);
        }
        log("fresh", "keeper.log", old);
        File::open(dirs.state.join("logs/fresh")).unwrap().set_modified(now).unwrap();
        log("noted", "keeper.log", old);
        log("noted", "what-happened.txt", old);
        log("Not a volume", "keeper.log", old);
        fs::create_dir_all(dirs.volume_run(&"here".parse().unwrap())).unwrap();
        fs::create_dir_all(dirs.volume_state(&"claimed".parse().unwrap())).unwrap();
        let held = Held::take(&dirs.run, &"busy".parse().unwrap()).unwrap();

        remove(&dirs, now).unwrap();
        let left = || {
            let mut names: Vec<_> = fs::read_dir(dirs.state.join("logs"))
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(left(), ["Not a volume", "ahead", "busy", "claimed", "fresh", "here", "noted", "young"]);
        let noted: Vec<_> =
            fs::read_dir(dirs.state.join("logs/noted")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(noted, ["what-happened.txt"], "what somebody else put there stays");
        assert_eq!(
            fs::read_dir(dirs.run.join("locks")).unwrap().count(),
            1,
            "no lock file stays but the one that is held"
        );
        held.release().unwrap();
        remove(&dirs, now).unwrap();
        assert!(!left().contains(&"busy".to_owned()));
    }
}
