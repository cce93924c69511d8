//! The volumes of a bench: how many objects each has, and what their keys are, as ZeroFS 0.19.1 names them.

use jiff::Timestamp;
use zerofsctl::catalog::{Catalog, VolumeRecord, Written};
use zerofsctl::values::{ByteSize, VolumeId};

/// The sizes of volumes that come again and again, in hundredths of the mean: a few are ten times as large as others, and some
/// need more than one page.
const SIZES: [u64; 11] = [11, 22, 33, 44, 55, 66, 88, 110, 165, 198, 308];

/// Two halves of volumes, `a-…` and `b-…`, each of a cluster of its own that is gone.
#[derive(Debug, Clone, Copy)]
pub struct Volumes {
    /// How many.
    pub count: usize,
    /// Objects in all.
    pub objects: u64,
    /// Whether they are alike in size.
    pub alike: bool,
}

impl Volumes {
    /// The name of a volume; in the order of their names.
    pub fn name(&self, n: usize) -> String {
        let half = if n < self.count / 2 { 'a' } else { 'b' };
        format!("{half}-{n:06}")
    }

    /// How many objects it has.
    pub fn size(&self, n: usize) -> u64 {
        let mean = self.objects / self.count as u64;
        if self.alike { mean } else { (mean * SIZES[n % SIZES.len()] / 100).max(3) }
    }

    /// The objects of the first (`a`) or second half.
    pub fn half(&self, first: bool) -> u64 {
        let middle = self.count / 2;
        let range = if first { 0..middle } else { middle..self.count };
        range.map(|n| self.size(n)).sum()
    }

    /// The key of its object `i` below the volume's prefix, in the order of the keys. A flush of ZeroFS adds one SST and one
    /// manifest.
    pub fn key(&self, n: usize, i: u64) -> String {
        let tables = self.size(n) / 2;
        match i {
            0 => ".zerofs_bucket_id".to_owned(),
            _ if i <= tables => format!("compacted/{}.sst", ulid(i)),
            _ => format!("manifest/{:020}.manifest", i - tables),
        }
    }

    /// The volume of this name, and which of its objects has this key.
    pub fn find(&self, name: &str, key: &str) -> Option<(usize, u64)> {
        let n = name.get(2..)?.parse().ok().filter(|n| *n < self.count && self.name(*n) == name)?;
        let i = if let Some(ulid) = key.strip_prefix("compacted/") {
            number_of(ulid)?
        } else if let Some(number) = key.strip_prefix("manifest/") {
            number.get(..20)?.parse::<u64>().ok()? + self.size(n) / 2
        } else {
            0
        };
        (i < self.size(n) && self.key(n, i) == key).then_some((n, i))
    }

    /// Writes their records, as an installation does.
    pub fn write_records(&self, open: impl Fn() -> Box<dyn Catalog> + Sync) {
        std::thread::scope(|s| {
            for part in 0..8 {
                let open = &open;
                s.spawn(move || {
                    let catalog = open();
                    for n in (part..self.count).step_by(8) {
                        let id: VolumeId = self.name(n).parse().expect("a name");
                        let mut record = VolumeRecord::new(id, ByteSize(1 << 30), None, Timestamp::now());
                        record.cluster = Some(self.name(n)[..1].to_owned());
                        let written = catalog.create(&record).expect("a record can be written");
                        assert!(matches!(written, Written::Done(_)), "{} is there already", self.name(n));
                    }
                });
            }
        });
    }
}

const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// The time of the first ULID and what each comes after the one before it, in milliseconds.
const FIRST: u64 = 1_760_000_000_000;
const EACH: u64 = 30_000;

/// A ULID whose time grows with `i`: ten characters of time and sixteen that look random.
fn ulid(i: u64) -> String {
    let digit = |bits: u64| char::from(DIGITS[(bits & 31) as usize]);
    let time = FIRST + EACH * i;
    let noise = i.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut text = String::with_capacity(26);
    text.extend((0..10).rev().map(|n| digit(time >> (5 * n))));
    text.extend((0..16).map(|n| digit(noise.rotate_left(11 * n))));
    text
}

/// Which `i` a ULID was made of.
fn number_of(ulid: &str) -> Option<u64> {
    let digit = |c: u8| DIGITS.iter().position(|d| *d == c).map(|d| d as u64);
    let time = ulid.bytes().take(10).try_fold(0u64, |sum, c| Some(sum << 5 | digit(c)?))?;
    Some(time.checked_sub(FIRST)? / EACH)
}
