//! take-over: the next keeper for a device that waits for one, and nothing else; what the watcher of a node does.

use super::*;

/// How it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakeOver {
    /// The volume is not attached here, or its device is served.
    NotNeeded,
    /// The next keeper serves the device.
    Done,
    /// The device only gives errors: that is for `recover`.
    Wreck,
}

/// Starts the next keeper of a volume whose NBD device waits for one. Everything else stays as it is: a command that was
/// cut short, and a device that gives errors, are for `recover`.
///
/// # Errors
/// [`Kind::Busy`] while an operation holds the volume; whatever keeps the keeper from starting.
pub fn take_over(engine: &Engine<'_>, run_dir: &Path, volume: &VolumeId) -> Result<TakeOver> {
    let journal = open(engine, run_dir, volume)?;
    let result = (|| {
        if journal.standing().connect.is_none() {
            return Ok(TakeOver::NotNeeded);
        }
        match engine.host.device(volume).map_err(|e| e.on(volume))?.life {
            Life::Served => Ok(TakeOver::NotNeeded),
            Life::Dead => {
                engine.host.let_fail(volume).map_err(|e| e.on(volume))?;
                Ok(TakeOver::Wreck)
            }
            Life::Waiting => {
                engine.host.take_over(volume).map_err(|e| e.on(volume).in_step("take-over"))?;
                Ok(TakeOver::Done)
            }
        }
    })();
    journal.close()?;
    result
}
