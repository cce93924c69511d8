//! `make bench`: zerofsctl beside what it is measured against, in one run on one machine.
//!
//! ```text
//! cargo bench --bench side_by_side [-- PART... [--rounds N] [--seconds N] [--parallel N] [--depth N] [--volumes N] [--objects N]]
//! ```
//!
//! The parts: `attach` (one volume, fresh and existing, beside the same by hand), `parallel` (many at once),
//! `memory` (and start-up time), `transport` (the FUSE transport beside nbdfuse with a loop device), `csi` (the driver: calls,
//! memory, many stages at once), `wire` (the guarded path of the NBD transport without a device), `list` (`nbd list` of devices that are
//! plain files), and only when asked for,
//! since it needs the kernel's nbd module, `nbd` (`make bench-nbd`: the NBD transport beside nbd-client), or since it needs a MinIO,
//! `gc` (`make bench-gc`: gc-s3 beside s5cmd).
//! Whatever is compared runs in turns, so that a machine that becomes slower slows both. The result is
//! Markdown on stdout; the story is on stderr. It needs root.

mod attach;
mod command;
mod csi;
mod floor;
mod gc;
mod nbd;
#[path = "../../tests/support/mod.rs"]
mod support;
mod transport;

use std::time::Duration;

/// How much of everything to do.
pub struct Scale {
    /// Turns of each comparison.
    pub rounds: usize,
    /// Seconds of each fio run.
    pub seconds: u64,
    /// Volumes attached at once.
    pub parallel: usize,
    /// Requests in flight of the 1 MiB jobs of `nbd`.
    pub depth: usize,
    /// Volumes of `gc`.
    pub volumes: usize,
    /// Their objects, in all.
    pub objects: usize,
}

const PARTS: [&str; 9] = ["attach", "parallel", "memory", "transport", "csi", "wire", "list", "nbd", "gc"];

fn main() {
    let mut parts = Vec::new();
    let mut scale =
        Scale { rounds: 7, seconds: 10, parallel: 20, depth: 8, volumes: 1100, objects: 1_000_000 };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse().ok()).unwrap_or_else(|| usage(&arg));
        match arg.as_str() {
            // What cargo itself adds.
            "--bench" => {}
            "--rounds" => scale.rounds = number() as usize,
            "--seconds" => scale.seconds = number(),
            "--parallel" => scale.parallel = number() as usize,
            "--depth" => scale.depth = number() as usize,
            "--volumes" => scale.volumes = (number() as usize).max(2),
            "--objects" => scale.objects = (number() as usize).max(10 * scale.volumes),
            part if PARTS.contains(&part) => parts.push(part.to_owned()),
            other => usage(other),
        }
    }
    support::require_root();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    print_machine();
    if wanted("attach") {
        attach::one(&scale);
    }
    if wanted("parallel") {
        attach::many(&scale);
    }
    if wanted("memory") {
        attach::memory(&scale);
    }
    if wanted("transport") {
        transport::compare(&scale);
    }
    if wanted("csi") {
        csi::driver(&scale);
    }
    if wanted("wire") {
        nbd::wire(&scale);
    }
    if wanted("list") {
        nbd::list_of_files(&scale);
    }
    if parts.iter().any(|part| part == "nbd") {
        nbd::compare(&scale);
    }
    if parts.iter().any(|part| part == "gc") {
        gc::compare(&scale);
    }
}

fn usage(at: &str) -> ! {
    eprintln!(
        "'{at}'? usage: [{}]... [--rounds N] [--seconds N] [--parallel N] [--depth N] [--volumes N] [--objects N]",
        PARTS.join("|")
    );
    std::process::exit(2);
}

fn print_machine() {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let cpu = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| Some(line.strip_prefix("model name")?.split_once(": ")?.1.to_owned()))
        .unwrap_or_else(|| "unknown".into());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory_kib: u64 = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
        .unwrap_or(0);
    println!(
        "Machine: {cores} × {cpu}, {} GiB, Linux {}; {}.\n",
        memory_kib.div_ceil(1 << 20),
        read("/proc/sys/kernel/osrelease").trim(),
        jiff::Zoned::now().date()
    );
}

/// A line of the story.
pub fn say(text: impl AsRef<str>) {
    eprintln!("bench: {}", text.as_ref());
}

/// The middle one of some values: half of the others are smaller, half larger.
pub fn median<T: Copy + PartialOrd>(values: &[T]) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).expect("measured values can be compared"));
    sorted[sorted.len() / 2]
}

/// A duration as a table shows it.
pub fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}

/// Prints one Markdown table row.
pub fn row<S: AsRef<str>>(cells: impl IntoIterator<Item = S>) {
    let cells: Vec<_> = cells.into_iter().map(|cell| cell.as_ref().to_owned()).collect();
    println!("| {} |", cells.join(" | "));
}

/// Prints a Markdown table's head.
pub fn head(cells: &[&str]) {
    row(cells);
    row(cells.iter().map(|_| "---"));
}

/// "1.083 (target: at most 1.15)", with a word when the target is missed.
pub fn against_most(ratio: f64, most: f64) -> String {
    let verdict = if ratio <= most { "" } else { ", **missed**" };
    format!("{ratio:.3} (target: at most {most:.2}{verdict})")
}

/// The same for a value that should be large.
pub fn against_least(ratio: f64, least: f64) -> String {
    let verdict = if ratio >= least { "" } else { ", **missed**" };
    format!("{ratio:.3} (target: at least {least:.2}{verdict})")
}
