//! Loads that know what they wrote: a ledger of blocks, and fio jobs that verify.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::fio::{FioJob, FioReport};

const SECOND: Duration = Duration::from_secs(1);
const BLOCK: usize = 4096;

/// What is in the filesystem's cache goes to the device, and then the cache of the tests' files is emptied, so that
/// reads come from the device again. (`drop_caches` would do that for the whole machine, and wait for every
/// filesystem on it.)
pub fn drop_caches(target: &Path) -> io::Result<()> {
    nix::unistd::syncfs(File::open(target)?).map_err(io::Error::from)?;
    for entry in fs::read_dir(target)? {
        let path = entry?.path();
        if path.is_file() {
            let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
            posix_fadvise(File::open(path)?, 0, 0, advice).map_err(io::Error::from)?;
        }
    }
    Ok(())
}

/// Random numbers, whose seed is printed.
pub fn rng(name: &str) -> StdRng {
    let seed = rand::random();
    println!("{name}: seed {seed}");
    StdRng::seed_from_u64(seed)
}

/// A file whose every block says where it belongs and how often it was written, and the record of what was
/// acknowledged. Blocks are written over and over, which fio's verification cannot tell from stale data.
#[derive(Clone)]
pub struct Ledger {
    path: PathBuf,
    blocks: Vec<Written>,
    /// When each request began and ended.
    pub times: Vec<(Instant, Instant)>,
    /// How many fsyncs have returned.
    pub syncs: Arc<AtomicU32>,
    /// What ended it, if it ended by itself.
    pub error: Option<String>,
}

/// How often a block was written: so that fsync had returned, so that the write had returned, at all.
#[derive(Clone, Copy, Default)]
pub struct Written {
    synced: u64,
    acknowledged: u64,
    tried: u64,
}

/// What a block must hold.
#[derive(Clone, Copy, PartialEq)]
pub enum Promise {
    /// Every write that returned.
    Acknowledged,
    /// Every write before the last fsync that returned.
    Synced,
}

/// A ledger that is being written.
pub struct Writing {
    stop: Arc<AtomicBool>,
    /// It ends with the first error.
    pub thread: JoinHandle<Ledger>,
}

/// A buffer as direct I/O wants it.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new(blocks: usize) -> Aligned {
        let memory = vec![0; (blocks + 1) * BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        Aligned { memory, start }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let end = self.start + self.memory.len() - BLOCK;
        &mut self.memory[self.start..end]
    }
}

fn fill(block: &mut [u8], index: u64, generation: u64) {
    block[..8].copy_from_slice(&index.to_le_bytes());
    block[8..16].copy_from_slice(&generation.to_le_bytes());
    let mut word = (index << 32 | generation) ^ 0x9e37_79b9_7f4a_7c15;
    for part in block[16..].chunks_exact_mut(8) {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        part.copy_from_slice(&word.to_le_bytes());
    }
}

impl Ledger {
    /// Writes each block of a new file once, durably.
    pub fn new(path: PathBuf, blocks: usize) -> Ledger {
        let mut content = vec![0; blocks * BLOCK];
        for (i, block) in content.chunks_exact_mut(BLOCK).enumerate() {
            fill(block, i as u64, 1);
        }
        fs::write(&path, &content).expect("the filesystem can be written");
        File::open(&path).and_then(|f| f.sync_all()).expect("the filesystem can be synced");
        let once = Written { synced: 1, acknowledged: 1, tried: 1 };
        Ledger { path, blocks: vec![once; blocks], times: vec![], syncs: Arc::default(), error: None }
    }

    /// Writes blocks at random, past the page cache, until it is told to stop or gets an error; every
    /// `sync_every` writes there is an fsync (none with 0).
    pub fn start(mut self, seed: u64, sync_every: u32) -> Writing {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            if let Err(e) = self.write(seed, sync_every, &told) {
                self.error = Some(e.to_string());
            }
            self
        });
        Writing { stop, thread }
    }

    fn write(&mut self, seed: u64, sync_every: u32, stop: &AtomicBool) -> io::Result<()> {
        let mut rng = StdRng::seed_from_u64(seed);
        let file = OpenOptions::new().write(true).custom_flags(nix::libc::O_DIRECT).open(&self.path)?;
        let mut buffer = Aligned::new(1);
        for count in 1u32.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let i = rng.random_range(0..self.blocks.len());
            self.blocks[i].tried += 1;
            fill(buffer.bytes(), i as u64, self.blocks[i].tried);
            let began = Instant::now();
            file.write_all_at(buffer.bytes(), (i * BLOCK) as u64)?;
            self.blocks[i].acknowledged = self.blocks[i].tried;
            if sync_every > 0 && count % sync_every == 0 {
                file.sync_data()?;
                self.syncs.fetch_add(1, Ordering::Relaxed);
                self.blocks.iter_mut().for_each(|b| b.synced = b.acknowledged);
            }
            self.times.push((began, Instant::now()));
            // A load, not a benchmark: the machine has others to serve.
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Takes what is there now for what is promised.
    pub fn settle(&mut self) {
        let content = fs::read(&self.path).expect("the ledger can be read");
        for (written, block) in self.blocks.iter_mut().zip(content.chunks(BLOCK)) {
            let generation = u64::from_le_bytes(block[8..16].try_into().expect("eight bytes"));
            *written = Written { synced: generation, acknowledged: generation, tried: written.tried };
        }
        self.times.clear();
        self.syncs = Arc::default();
        self.error = None;
    }

    /// Reads all of it past the page cache; what is not as promised.
    pub fn check(&self, promise: Promise) -> Vec<String> {
        let file = match OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(&self.path) {
            Ok(file) => file,
            Err(e) => return vec![format!("the ledger cannot be opened: {e}")],
        };
        let mut buffer = Aligned::new(self.blocks.len());
        if let Err(e) = file.read_exact_at(buffer.bytes(), 0) {
            return vec![format!("the ledger cannot be read: {e}")];
        }
        let mut expected = vec![0; BLOCK];
        let mut faults = Vec::new();
        for (i, (written, block)) in self.blocks.iter().zip(buffer.bytes().chunks(BLOCK)).enumerate() {
            let generation = u64::from_le_bytes(block[8..16].try_into().expect("eight bytes"));
            let least = match promise {
                Promise::Acknowledged => written.acknowledged,
                Promise::Synced => written.synced,
            };
            fill(&mut expected, i as u64, generation);
            if block != expected {
                let what = if block.iter().all(|b| *b == 0) { "zeros" } else { "garbage" };
                faults.push(format!("block {i} holds {what}; it was written {} times", written.acknowledged));
            } else if !(least..=written.tried).contains(&generation) {
                faults.push(format!("block {i} is of write {generation}, and {least} was promised"));
            }
        }
        shorten(faults)
    }
}

impl Writing {
    /// Ends it.
    pub fn stop(self) -> Ledger {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the ledger's thread does not panic")
    }
}

/// A few of many, so that a failure can be read.
pub fn shorten(mut faults: Vec<String>) -> Vec<String> {
    let all = faults.len();
    if all > 5 {
        faults.truncate(5);
        faults.push(format!("and {} more", all - 5));
    }
    faults
}

/// From each kill to the first answer after it.
pub fn stalls(kills: &[Instant], times: &[(Instant, Instant)]) -> Vec<Duration> {
    // What was on its way at the kill, or was asked while nobody had noticed it.
    let touched = |kill: Instant| {
        times.iter().filter(move |(began, ended)| *began < kill + SECOND / 5 && *ended > kill)
    };
    kills.iter().filter_map(|kill| touched(*kill).map(|(_, ended)| *ended - *kill).max()).collect()
}

/// Prints the least, the median and the most.
pub fn print_stalls(name: &str, stalls: &mut [Duration]) {
    stalls.sort();
    if let (Some(least), Some(most)) = (stalls.first(), stalls.last()) {
        let (n, median) = (stalls.len(), stalls[stalls.len() / 2]);
        println!("{name}: {n} stalls, from {least:.2?} to {most:.2?}, median {median:.2?}");
    }
}

/// A job that verifies `file`; its own files go to `dir`.
pub fn fio(dir: &Path, file: &Path) -> FioJob {
    let name = file.file_name().expect("a file has a name").to_string_lossy();
    FioJob::new(dir, &name)
        .set("filename", file.display())
        .set("bs", "4k")
        .set("size", "8m")
        .set("verify", "crc32c")
        .set("verify_fatal", 1)
}

/// Each block is written once, in random order, at a rate that gives about six seconds.
pub fn writing(job: FioJob, direct: bool, fsync: u32) -> FioJob {
    let job = job.set("rw", "randwrite").set("do_verify", 0).set("rate_iops", 350).set("fallocate", "none");
    let job = if direct { job.set("direct", 1).set("ioengine", "libaio").set("iodepth", 16) } else { job };
    if fsync > 0 { job.set("fsync", fsync) } else { job }
}

/// Reads back what [`writing`] wrote, and compares.
pub fn reading(job: FioJob, direct: bool) -> FioJob {
    let job = job.set("rw", if direct { "randread" } else { "read" });
    if direct { job.set("direct", 1).set("ioengine", "libaio").set("iodepth", 16) } else { job }
}

/// Adds to `faults` what a job of this name found.
pub fn judge(what: &str, report: &FioReport, faults: &mut Vec<String>) {
    if !report.status.success() || report.errors > 0 || !report.verify_failures.is_empty() {
        faults.push(format!(
            "{what}: {} errors, errno {}, {:?} {}",
            report.errors,
            report.errno,
            shorten(report.verify_failures.clone()),
            report.messages.trim()
        ));
    }
}
