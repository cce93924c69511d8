//! On a store that the bench plays itself: its keys are computed, its pages are those of S3 (1,000 keys, with a place to go on),
//! and each answer is as late as a distant store's. So the command is what limits, and there can be any number of keys.

mod server;

use std::time::Duration;

use zerofsctl::catalog;

use super::process::{Ran, run};
use super::store::Volumes;
use super::{Sides, URL, counted, counted_by_s5cmd};
use crate::support::dir::TestDir;
use crate::support::minio::settings;
use crate::{Scale, against_least, against_most, head, row, say, seconds};
use server::Played;

/// From here to a store in the same region and back, generously.
const ROUND_TRIP: Duration = Duration::from_millis(20);
/// Objects per hour, listed and deleted.
const PER_HOUR: f64 = 15e6;

/// A store with its records, and both sides for it.
fn play(dir: &TestDir, volumes: Volumes) -> (Played, Sides) {
    let played = Played::start(volumes);
    let (url, access) = (URL.parse().expect("a URL"), settings(played.address()));
    volumes.write_records(|| catalog::open(&url, &access).expect("settings that can be used"));
    let sides = Sides::new(dir.path(), &access);
    (played, sides)
}

/// Lists and deletes far from the store.
pub fn far_away(scale: &Scale) {
    let volumes = Volumes { count: scale.volumes, objects: scale.objects as u64, alike: false };
    let dir = TestDir::new();
    let (played, sides) = play(&dir, volumes);
    played.set_delay(ROUND_TRIP);
    let all = volumes.half(true) + volumes.half(false);
    let (a, b) = (volumes.half(true), volumes.half(false));
    println!(
        "## {ROUND_TRIP:?} from a store that is never busy: {all} objects in {} volumes\n",
        volumes.count
    );
    head(&["what", "time", "millions of objects an hour", "requests in flight, at most", "peak, MiB"]);
    let line = |name: &str, ran: &Ran, objects: u64, target: bool| {
        let hourly = 3600.0 * ran.rate(objects) / 1e6;
        let hourly = if target { against_least(hourly, PER_HOUR / 1e6) } else { format!("{hourly:.1}") };
        let peak = format!("{:.1}", ran.peak_kib as f64 / 1024.0);
        row([name.to_owned(), seconds(ran.time), hourly, played.take_most_in_flight().to_string(), peak]);
    };
    say("far away: scan");
    played.take_most_in_flight();
    let scan = run(sides.gc(&["scan", "-o", "json"]));
    assert_eq!(counted(&scan.stdout), (all, volumes.count));
    line("`gc-s3 scan`", &scan, all, true);
    let du = run(sides.s5cmd(&["du", &format!("{URL}/*")]));
    assert_eq!(counted_by_s5cmd(&du.stdout), all + volumes.count as u64);
    line("`s5cmd du`", &du, all, false);
    say("far away: sweep");
    let mark = run(sides.gc(&["mark", "--gone-cluster", "a", "--max-delete", "100%"]));
    line("`gc-s3 mark` of one half (scans everything)", &mark, all, false);
    std::thread::sleep(Duration::from_secs(2));
    let sweep = ["sweep", "--gone-cluster", "a", "--grace", "0s", "--max-delete", "100%", "--yes"];
    let sweep = run(sides.gc(&sweep));
    assert_eq!(played.objects_in(true), 0, "the half is swept");
    line("`gc-s3 sweep` of it (scans everything first)", &sweep, a, true);
    let rm = run(sides.s5cmd(&["--log", "error", "rm", &format!("{URL}/b-*")]));
    assert_eq!(played.objects_in(false), 0, "s5cmd deletes the other half");
    line("`s5cmd rm` of the other half", &rm, b, false);
    println!();
}

/// The memory of a scan of very many keys: in many volumes, and all in one.
pub fn many_keys(scale: &Scale) {
    let objects = 10 * scale.objects as u64;
    println!("## {objects} keys\n");
    head(&["what", "volumes", "time", "objects/s", "peak, MiB", "own processor time"]);
    for count in [scale.volumes, 2] {
        let dir = TestDir::new();
        let volumes = Volumes { count, objects, alike: true };
        let (_played, sides) = play(&dir, volumes);
        let all = volumes.half(true) + volumes.half(false);
        say(format!("{all} keys in {count} volumes"));
        let line = |name: &str, ran: &Ran, peak: String| {
            row([
                name.to_owned(),
                count.to_string(),
                seconds(ran.time),
                format!("{:.0}", ran.rate(all)),
                peak,
                seconds(ran.cpu),
            ]);
        };
        let scan = run(sides.gc(&["scan", "-o", "json"]));
        assert_eq!(counted(&scan.stdout), (all, count));
        line("`gc-s3 scan`", &scan, against_most(scan.peak_kib as f64 / 1024.0, 150.0));
        if count > 2 {
            let du = run(sides.s5cmd(&["du", &format!("{URL}/*")]));
            assert_eq!(counted_by_s5cmd(&du.stdout), all + count as u64);
            line("`s5cmd du`", &du, format!("{:.1}", du.peak_kib as f64 / 1024.0));
        }
    }
    println!();
}
