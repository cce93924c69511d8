//! The CSI driver: how long calls take that find everything done, what memory it has, idle and with many volumes, and many
//! stages at once beside as many floors.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use zerofsctl::host::fake::FakeHost;
use zerofsctl::ops::{self, AttachSpec};
use zerofsctl::run::{Engine, Silent};
use zerofsctl::values::TargetPath;

use crate::command::field_kib;
use crate::floor::Floor;
use crate::support::cli::Node;
use crate::support::csi::{Driver, Mode, mount};
use crate::support::dir::TestDir;
use crate::{Scale, against_most, head, median, row, say, seconds};

const SIZE: u64 = 1 << 30;
const CALLS: usize = 1000;
const STAGES: usize = 30;
const VOLUMES: usize = 100;
const RWO: Mode = Mode::SingleNodeWriter;

/// Three times the period in which a driver looks after its volumes, so that it has done all of that.
const SETTLED: Duration = Duration::from_secs(30);

/// All of it.
pub fn driver(scale: &Scale) {
    let idle = resident(&[], "an idle driver");
    let (publish, stats, line) = calls();
    let many = crowd(&line);
    println!("## The CSI driver\n");
    head(&["what", "measured"]);
    let ms = |d: Duration| d.as_secs_f64() * 1000.0;
    for (name, times) in [("NodePublishVolume", publish), ("NodeGetVolumeStats", stats)] {
        let at = |part: usize| ms(times[times.len() * part / 1000]);
        row([
            format!("{name} again, {CALLS} calls: p99, ms"),
            format!("{}; median {:.2}, slowest {:.2}", against_most(at(990), 5.0), at(500), at(999)),
        ]);
    }
    let mib = |kib: u64| kib as f64 / 1024.0;
    row(["resident when idle, MiB".to_owned(), against_most(mib(idle), 12.0)]);
    row([format!("resident with {VOLUMES} volumes, MiB"), against_most(mib(many), 25.0)]);
    println!();
    stages(scale);
}

fn resident_of(driver: &Driver) -> u64 {
    let status = PathBuf::from(format!("/proc/{}/status", driver.pid()));
    field_kib(&status, "VmRSS:").expect("the driver runs")
}

fn resident(words: &[&str], what: &str) -> u64 {
    say(what);
    let node = Node::new();
    let driver = Driver::start(&node, words);
    driver.client().probe().expect("it is ready");
    std::thread::sleep(SETTLED);
    let kib = resident_of(&driver);
    driver.stop();
    kib
}

/// The times of calls that find everything done, in order of length, and what a keeper answers when asked how it is.
fn calls() -> (Vec<Duration>, Vec<Duration>, String) {
    say(format!("{CALLS} calls of each kind"));
    let node = Node::new();
    let driver = Driver::start(&node, &[]);
    let client = driver.client();
    client.create_plain("bench", SIZE as i64, &[("deleteDataOnPVCDelete", "true")]).expect("it is made");
    let (staging, pod) = (node.dir.join("staging"), node.dir.join("pod"));
    fs::create_dir(&staging).expect("the bench's folder can be written");
    client.stage("bench", &staging, mount(RWO)).expect("it is staged");
    client.publish("bench", &staging, &pod, mount(RWO), false).expect("it is published");
    let (mut publish, mut stats) = (Vec::new(), Vec::new());
    for _ in 0..CALLS {
        let began = Instant::now();
        client.publish("bench", &staging, &pod, mount(RWO), false).expect("it is published");
        publish.push(began.elapsed());
        let began = Instant::now();
        client.stats("bench", &pod).expect("it is there");
        stats.push(began.elapsed());
    }
    publish.sort();
    stats.sort();
    let line = keepers_line(&node.run_root().join("volumes/bench"));
    client.unpublish("bench", &pod).expect("it goes");
    client.unstage("bench", &staging).expect("it goes");
    client.delete("bench").expect("it goes");
    driver.stop();
    (publish, stats, line)
}

fn keepers_line(folder: &Path) -> String {
    let mut keeper = UnixStream::connect(folder.join("keeper.sock")).expect("the keeper listens");
    keeper.write_all(b"{\"v\":1,\"request\":\"status\"}\n").expect("the keeper reads");
    let mut line = String::new();
    BufReader::new(keeper).read_line(&mut line).expect("the keeper answers");
    assert!(line.contains("\"ready\""), "{line}");
    line
}

/// The driver's memory with many volumes that it takes for attached: their journals are there, and somebody answers as their
/// keepers do. So many ZeroFS would not fit on the machines that this runs on, and are not what is measured.
fn crowd(line: &str) -> u64 {
    say(format!("{VOLUMES} volumes whose keepers are played"));
    let node = Node::new();
    let volumes: Vec<String> = (0..VOLUMES).map(|n| format!("crowd-{n}")).collect();
    let places: Vec<PathBuf> = volumes.iter().map(|v| node.dir.join(format!("staging/{v}"))).collect();
    for (volume, place) in volumes.iter().zip(&places) {
        let target = TargetPath::new(place, Path::new("/")).expect("a path");
        let spec = AttachSpec::plain(volume.parse().expect("a name"), target, "file:///store".into());
        let host = FakeHost::new();
        let engine = Engine { host: &host, observer: &Silent };
        ops::attach::attach(&engine, &node.run_root(), &spec).expect("the model attaches");
        let socket = node.run_root().join("volumes").join(volume).join("keeper.sock");
        let listener = UnixListener::bind(socket).expect("the bench's folder can be written");
        let answer = line.replace("\"volume\":\"bench\"", &format!("\"volume\":\"{volume}\""));
        // It ends with the bench.
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let mut reader = BufReader::new(client);
                let mut request = String::new();
                while reader.read_line(&mut request).is_ok_and(|n| n > 0) {
                    if reader.get_mut().write_all(answer.as_bytes()).is_err() {
                        break;
                    }
                    request.clear();
                }
            }
        });
    }
    let driver = Driver::start(&node, &[]);
    std::thread::sleep(SETTLED);
    let client = driver.client();
    for (volume, place) in volumes.iter().zip(&places) {
        client.stats(volume, place).expect("the driver takes it for attached");
    }
    let kib = resident_of(&driver);
    driver.stop();
    kib
}

/// Many stages of fresh volumes at once.
fn stages(scale: &Scale) {
    let rounds = scale.rounds.min(3);
    let dir = TestDir::new();
    let (mut floors, mut ours) = (vec![], vec![]);
    for round in 0..rounds {
        say(format!("{STAGES} stages at once, round {} of {rounds}", round + 1));
        let began = Instant::now();
        let attached: Vec<_> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..STAGES)
                .map(|i| {
                    let floor = Floor::new(&dir.join(format!("f{round}-{i}")), SIZE);
                    scope.spawn(move || floor.attach())
                })
                .collect();
            handles.into_iter().map(|handle| handle.join().expect("every floor attaches")).collect()
        });
        floors.push(began.elapsed());
        attached.into_iter().for_each(|floor| floor.detach());

        let node = Node::new();
        let driver = Driver::start(&node, &[]);
        let volumes: Vec<_> =
            (0..STAGES).map(|i| (format!("v{i}"), node.dir.join(format!("t{i}")))).collect();
        let clients: Vec<_> = volumes.iter().map(|_| driver.client()).collect();
        for ((volume, target), client) in volumes.iter().zip(&clients) {
            fs::create_dir(target).expect("the bench's folder can be written");
            client
                .create_plain(volume, SIZE as i64, &[("deleteDataOnPVCDelete", "true")])
                .expect("it is made");
        }
        let began = Instant::now();
        std::thread::scope(|scope| {
            for ((volume, target), client) in volumes.iter().zip(&clients) {
                scope.spawn(move || client.stage(volume, target, mount(RWO)).expect("it is staged"));
            }
        });
        ours.push(began.elapsed());
        for ((volume, target), client) in volumes.iter().zip(&clients) {
            client.unstage(volume, target).expect("it goes");
        }
        driver.stop();
    }
    println!("## {STAGES} stages at once, all fresh: median of {rounds} turns each\n");
    head(&["NodeStageVolume", "floor", "ratio"]);
    let (stage, floor) = (median(&ours), median(&floors));
    row([seconds(stage), seconds(floor), against_most(stage.as_secs_f64() / floor.as_secs_f64(), 1.3)]);
    println!();
}
