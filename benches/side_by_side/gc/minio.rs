//! On a real MinIO.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use zerofsctl::catalog;

use super::process::{Ran, cpu_of, run};
use super::store::Volumes;
use super::{BUCKET, Sides, URL, counted, counted_by_s5cmd, data};
use crate::support::dir::TestDir;
use crate::support::minio::Minio;
use crate::{Scale, against_least, head, median, row, say, seconds};

/// A run, and what the server's processor time for it was.
struct Turn {
    ran: Ran,
    server: Duration,
}

/// Counting everything in turns, and then deleting half of it each.
pub fn compare(scale: &Scale) {
    let volumes = Volumes { count: scale.volumes, objects: scale.objects as u64, alike: false };
    let dir = TestDir::new();
    // In memory, so that the disk is not what is measured.
    let memory = tempfile::Builder::new().prefix("zc-").tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
    let minio = Minio::start(memory.path());
    minio.ask("PUT", &format!("/{BUCKET}"), &[], b"");
    fill(&minio, &volumes);
    let sides = Sides::new(dir.path(), &minio.settings());
    let turn = |command| {
        let before = cpu_of(minio.pid());
        let ran = run(command);
        Turn { ran, server: cpu_of(minio.pid()) - before }
    };
    let all = volumes.half(true) + volumes.half(false);
    let folder = format!("{URL}/*");

    let (mut scans, mut dus, mut lists) = (vec![], vec![], vec![]);
    let rounds = scale.rounds.min(3);
    for round in 0..rounds {
        say(format!("counting, round {} of {rounds}", round + 1));
        let scan = turn(sides.gc(&["scan", "-o", "json"]));
        assert_eq!(counted(&scan.ran.stdout), (all, volumes.count), "the scan counts everything");
        scans.push(scan);
        let du = turn(sides.s5cmd(&["du", &folder]));
        // It counts the records, too.
        assert_eq!(counted_by_s5cmd(&du.ran.stdout), all + volumes.count as u64, "so does s5cmd");
        dus.push(du);
        lists.push(turn(sides.s5cmd(&["ls", &folder])));
    }

    say("deleting");
    let sweep = ["sweep", "--gone-cluster", "a", "--grace", "0s", "--max-delete", "100%"];
    let mark = turn(sides.gc(&["mark", "--gone-cluster", "a", "--max-delete", "100%"]));
    // The store tells whole seconds: a mark is due from the next one on.
    std::thread::sleep(Duration::from_secs(2));
    let look = turn(sides.gc(&[&sweep[..], &["--dry-run"]].concat()));
    let swept = turn(sides.gc(&[&sweep[..], &["--yes", "-o", "json"]].concat()));
    // As quick as it can be: it need not tell each object.
    let removed = turn(sides.s5cmd(&["--log", "error", "rm", &format!("{URL}/b-*")]));
    let objects = data(&swept.ran.stdout)["objects"].as_u64();
    assert_eq!(objects, Some(volumes.half(true)), "everything of the one half is swept");
    let left = run(sides.gc(&["scan", "-o", "json"]));
    assert_eq!(counted(&left.stdout).0, 0, "nothing is left of either half");
    // What was looked at before the deletion is no part of it; s5cmd looks at nothing.
    let deletion = Ran {
        time: swept.ran.time.saturating_sub(look.ran.time),
        cpu: swept.ran.cpu.saturating_sub(look.ran.cpu),
        peak_kib: swept.ran.peak_kib,
        stdout: String::new(),
    };
    let deletion = Turn { ran: deletion, server: swept.server.saturating_sub(look.server) };

    println!("## gc-s3 beside s5cmd on MinIO: {all} objects in {} volumes\n", volumes.count);
    head(&["what", "time", "objects/s", "peak, MiB", "own processor time", "the server's"]);
    let line = |name: &str, turns: &[Turn], objects: u64| {
        let mid = |of: &dyn Fn(&Turn) -> f64| median(&turns.iter().map(of).collect::<Vec<_>>());
        let at = |secs: f64| seconds(Duration::from_secs_f64(secs));
        let time = mid(&|t| t.ran.time.as_secs_f64());
        let rate = objects as f64 / time;
        row([
            name.to_owned(),
            at(time),
            format!("{rate:.0}"),
            format!("{:.1}", mid(&|t| t.ran.peak_kib as f64 / 1024.0)),
            at(mid(&|t| t.ran.cpu.as_secs_f64())),
            at(mid(&|t| t.server.as_secs_f64())),
        ]);
        rate
    };
    let (a, b) = (volumes.half(true), volumes.half(false));
    let scan = line("`gc-s3 scan`, with the records", &scans, all);
    let du = line("`s5cmd du`", &dus, all);
    line("`s5cmd ls`", &lists, all);
    line("`gc-s3 mark` of one half (scans everything)", &[mark], all);
    let whole = line("`gc-s3 sweep` of it, all of it (scans everything first)", &[swept], a);
    line("`gc-s3 sweep --dry-run` right before: only the scan", &[look], all);
    let deletion = line("the difference: the deletion", &[deletion], a);
    let removed = line("`s5cmd rm` of the other half", &[removed], b);
    println!();
    head(&["rate", "ratio"]);
    row(["scan to du".to_owned(), against_least(scan / du, 1.0)]);
    row(["deletion to rm".to_owned(), against_least(deletion / removed, 1.0)]);
    row(["the whole sweep to rm".to_owned(), format!("{:.3}", whole / removed)]);
    println!();
}

/// Puts all objects and records; MinIO unpacks an archive for each volume.
fn fill(minio: &Minio, volumes: &Volumes) {
    say(format!("filling MinIO with {} objects", volumes.objects));
    let (began, next) = (Instant::now(), AtomicUsize::new(0));
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= volumes.count {
                        return;
                    }
                    let keys: Vec<String> = (0..volumes.size(n))
                        .map(|i| format!("vols/{}/{}", volumes.name(n), volumes.key(n, i)))
                        .collect();
                    for keys in keys.chunks(2000) {
                        minio.put_many(BUCKET, keys.iter().map(|k| (k.as_str(), &b"abcdefgh"[..])));
                    }
                    if n % 100 == 99 {
                        say(format!("{} of {} volumes", n + 1, volumes.count));
                    }
                }
            });
        }
    });
    let url = URL.parse().expect("a URL");
    volumes.write_records(|| catalog::open(&url, &minio.settings()).expect("settings that can be used"));
    say(format!("filled in {}", seconds(began.elapsed())));
}
