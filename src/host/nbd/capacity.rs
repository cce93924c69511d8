//! How many NBD devices this machine has, and how many more it can have.

use std::path::Path;

use serde::Serialize;

use super::usage::read_small;
use crate::error::{Doing, Error, Result};

/// A device number has 20 bits for the minor number.
const MINORS: u32 = 1 << 20;

/// How to have more than there are numbers for: with room for 15 partitions on each there are 65,536.
pub const MORE_DEVICES: &str = "load the module with fewer partitions for each device: modprobe -r nbd && modprobe nbd \
nbds_max=64 max_part=15; and for each boot: echo 'options nbd nbds_max=64 max_part=15' > /etc/modprobe.d/nbd.conf && \
echo nbd > /etc/modules-load.d/nbd.conf";

/// Numbers of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Capacity {
    /// Whether the kernel has NBD, as a loaded module or built in.
    pub available: bool,
    /// How many the module made when it was loaded; none where it does not say.
    pub nbds_max: Option<u32>,
    /// How many there are now.
    pub existing: u32,
    /// How many of them are connected.
    pub connected: u32,
    /// How many there can be: netlink makes a further one when all are connected, up to what device numbers allow,
    /// whatever `nbds_max` says. It is no promise that a scheduler could be given: memory for so many volumes runs out
    /// long before, so how many a node shall take is for its operator to say.
    pub limit: u32,
}

impl Capacity {
    /// How many of the devices that exist are not connected.
    pub fn free(&self) -> u32 {
        self.existing.saturating_sub(self.connected)
    }

    /// How many more can be connected: free ones, and those that netlink can still make.
    pub fn remaining(&self) -> u32 {
        self.limit.saturating_sub(self.connected)
    }

    /// An error with a hint unless one more device can be connected.
    ///
    /// # Errors
    /// [`Kind::Environment`](crate::error::Kind::Environment): the kernel has no NBD, or every device is taken.
    pub fn require_one(&self) -> Result<()> {
        if !self.available {
            return Err(Error::environment("the kernel's nbd module is not loaded").hint(super::MODULE_HINT));
        }
        if self.remaining() > 0 {
            return Ok(());
        }
        Err(Error::environment(format!("all {} NBD devices of this machine are connected", self.limit))
            .hint(format!("see what they are: zerofsctl nbd list; or {MORE_DEVICES}")))
    }
}

/// The numbers of this machine.
///
/// # Errors
/// When the list of block devices cannot be read.
pub fn capacity() -> Result<Capacity> {
    let devices = super::sysfs::all()?;
    let connected = devices.iter().filter(|d| d.connected).count();
    Ok(of(Path::new("/sys"), devices.len(), connected))
}

/// [`Capacity::require_one`] of this machine, at the price of one list of names as long as there is room for new devices.
///
/// # Errors
/// Those of [`Capacity::require_one`] and [`capacity()`].
pub fn require_one() -> Result<()> {
    let block = Path::new("/sys/block");
    let entries = std::fs::read_dir(block).doing("read", block)?;
    let existing =
        entries.flatten().filter(|e| super::sysfs::index_of(Path::new(&e.file_name())).is_some()).count();
    if of(Path::new("/sys"), existing, 0).limit as usize > existing {
        return Ok(());
    }
    capacity()?.require_one()
}

/// The same, where the devices were counted already.
pub(super) fn of(sys: &Path, existing: usize, connected: usize) -> Capacity {
    let parameter = |name: &str| -> Option<u32> {
        read_small(&sys.join("module/nbd/parameters").join(name)).ok()?.trim().parse().ok()
    };
    let nbds_max = parameter("nbds_max");
    let available = nbds_max.is_some() || existing > 0;
    // Each device takes a power of two of minor numbers, enough for its partitions.
    let max_part = parameter("max_part").unwrap_or(16);
    let shift = u32::BITS - max_part.leading_zeros();
    let limit = if available { MINORS.checked_shr(shift).unwrap_or(0) } else { 0 };
    Capacity { available, nbds_max, existing: existing as u32, connected: connected as u32, limit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(parameters: &[(&str, &str)], existing: usize, connected: usize) -> Capacity {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("module/nbd/parameters");
        std::fs::create_dir_all(&folder).unwrap();
        for (name, value) in parameters {
            std::fs::write(folder.join(name), value).unwrap();
        }
        of(dir.path(), existing, connected)
    }

    #[test]
    fn the_parameters_and_the_devices_give_the_numbers() {
        let c = with(&[("nbds_max", "16\n"), ("max_part", "16\n")], 16, 3);
        assert_eq!((c.nbds_max, c.free(), c.limit, c.remaining()), (Some(16), 13, 1 << 15, (1 << 15) - 3));
        assert!(c.require_one().is_ok());
        let c = with(&[("nbds_max", "16\n"), ("max_part", "0\n")], 16, 3);
        assert_eq!(c.limit, 1 << 20, "a device without partitions takes one number");
        let c = with(&[("nbds_max", "4\n"), ("max_part", "524288\n")], 1, 1);
        assert_eq!((c.limit, c.remaining()), (1, 0));
        let e = c.require_one().unwrap_err();
        assert!(e.hint_text().unwrap().contains("nbds_max=64"), "{e}");
    }

    #[test]
    fn without_the_module_there_is_nothing() {
        let c = with(&[], 0, 0);
        assert_eq!((c.available, c.limit), (false, 0));
        assert!(c.require_one().unwrap_err().hint_text().unwrap().contains("modprobe nbd"));
        assert!(with(&[], 16, 0).available, "built in: it has devices, but may show no parameters");
    }
}
