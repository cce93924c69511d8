//! Attach beside its floor: one volume, and many at once; memory and start-up.

use std::time::{Duration, Instant};

use crate::command::{Zerofsctl, field_kib, finish, mapped_kib};
use crate::floor::{Floor, Times};
use crate::support::dir::{TestDir, processes};
use crate::{Scale, against_most, head, median, row, say, seconds};

const SIZE: u64 = 1 << 30;
const SIZE_ARG: &str = "1Gi";

/// One attach after the other, in turns with the floor, each of a fresh volume and then of an existing one.
pub fn one(scale: &Scale) {
    let dir = TestDir::new();
    let mut floors: [Vec<Times>; 2] = Default::default();
    let mut ours: [Vec<Duration>; 2] = Default::default();
    for round in 0..scale.rounds {
        say(format!("attach, round {} of {}", round + 1, scale.rounds));
        let floor = Floor::new(&dir.join(format!("f{round}")), SIZE);
        let zerofsctl = Zerofsctl::new(&dir.join(format!("z{round}")));
        let target = dir.join(format!("t{round}")).display().to_string();
        for age in 0..2 {
            let attached = floor.attach();
            floors[age].push(attached.times);
            attached.detach();
            ours[age].push(zerofsctl.time(&Zerofsctl::attach_args("bench", &target, SIZE_ARG)));
            zerofsctl.time(&["detach", "bench"]);
        }
    }
    println!("## One attach: median of {} turns each\n", scale.rounds);
    head(&["volume", "zerofsctl attach", "floor", "ratio", "floor: server / disk / device / mkfs / mount"]);
    for (age, name) in ["fresh", "existing"].iter().enumerate() {
        let part = |of: fn(&Times) -> Duration| median(&floors[age].iter().map(of).collect::<Vec<_>>());
        let (attach, floor) = (median(&ours[age]), part(Times::total));
        let parts =
            [part(|t| t.server), part(|t| t.disk), part(|t| t.device), part(|t| t.mkfs), part(|t| t.mount)];
        row([
            (*name).to_owned(),
            seconds(attach),
            seconds(floor),
            against_most(attach.as_secs_f64() / floor.as_secs_f64(), 1.15),
            parts.map(seconds).join(" / "),
        ]);
    }
    println!();
}

/// Many fresh volumes at once.
pub fn many(scale: &Scale) {
    let count = scale.parallel;
    let rounds = scale.rounds.min(3);
    let dir = TestDir::new();
    let (mut floors, mut ours) = (vec![], vec![]);
    for round in 0..rounds {
        say(format!("{count} at once, round {} of {rounds}", round + 1));
        let began = Instant::now();
        let attached: Vec<_> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..count)
                .map(|i| {
                    let floor = Floor::new(&dir.join(format!("f{round}-{i}")), SIZE);
                    scope.spawn(move || floor.attach())
                })
                .collect();
            handles.into_iter().map(|handle| handle.join().expect("every floor attaches")).collect()
        });
        floors.push(began.elapsed());
        attached.into_iter().for_each(|floor| floor.detach());

        let zerofsctl = Zerofsctl::new(&dir.join(format!("z{round}")));
        let volumes: Vec<_> = (0..count)
            .map(|i| (format!("bench-{i}"), dir.join(format!("t{round}-{i}")).display().to_string()))
            .collect();
        let began = Instant::now();
        let started: Vec<_> = volumes
            .iter()
            .map(|(volume, target)| {
                let args = Zerofsctl::attach_args(volume, target, SIZE_ARG);
                (zerofsctl.command(&args).spawn().expect("zerofsctl can be started"), args)
            })
            .collect();
        started.into_iter().for_each(|(child, args)| finish(child, &args));
        ours.push(began.elapsed());
        volumes.iter().for_each(|(volume, _)| {
            zerofsctl.time(&["detach", volume]);
        });
    }
    println!("## {count} attaches at once, all fresh: median of {rounds} turns each\n");
    head(&["zerofsctl attach", "floor", "ratio"]);
    let (attach, floor) = (median(&ours), median(&floors));
    row([seconds(attach), seconds(floor), against_most(attach.as_secs_f64() / floor.as_secs_f64(), 1.3)]);
    println!();
}

/// Memory of the command and of an idle keeper, and how long `--help` takes.
pub fn memory(scale: &Scale) {
    say("memory and start-up");
    let dir = TestDir::new();
    let zerofsctl = Zerofsctl::new(&dir.join("z"));
    let target = dir.join("t").display().to_string();
    let attach = zerofsctl.peak_kib(&Zerofsctl::attach_args("bench", &target, SIZE_ARG));
    let list = zerofsctl.peak_kib(&["list"]);
    // Idle: what mkfs and mount asked for has been answered.
    std::thread::sleep(Duration::from_secs(10));
    let keepers = processes(dir.path());
    let keeper = keepers.iter().find(|(_, command)| command.contains(" keeper ")).expect("a keeper runs").0;
    let status = format!("/proc/{keeper}/status");
    let resident = field_kib(status.as_ref(), "VmRSS:").expect("the keeper runs");
    let log = mapped_kib(keeper, "replay.log");
    let detach = zerofsctl.peak_kib(&["detach", "bench"]);
    let helps: Vec<_> = (0..scale.rounds.max(30)).map(|_| zerofsctl.time(&["--help"])).collect();

    let mib = |kib: u64| kib as f64 / 1024.0;
    println!("## Memory and start-up\n");
    head(&["what", "measured"]);
    for (what, kib) in [("attach", attach), ("detach", detach), ("list", list)] {
        row([format!("peak of `{what}`, MiB"), against_most(mib(kib), 30.0)]);
    }
    row([
        "idle keeper without the replay log's pages, MiB".to_owned(),
        against_most(mib(resident.saturating_sub(log)), 15.0),
    ]);
    row(["the replay log's resident pages, MiB".to_owned(), format!("{:.2}", mib(log))]);
    row([
        format!("`--help`, median of {}, ms", helps.len()),
        against_most(median(&helps).as_secs_f64() * 1000.0, 10.0),
    ]);
    println!();
}
