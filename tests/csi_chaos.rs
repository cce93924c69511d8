//! kill -9 of the driver at random instants, while a kubelet has many volumes staged, published, written to, unpublished and
//! unstaged: in the end everything is as was asked for, nothing is left, and no mounted volume saw an I/O error.

mod support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::cli::{Node, files_below};
use support::csi::Driver;
use support::dir::{Leftover, leftovers};
use support::kubelet::{Kubelet, Tally};
use support::rounds;

const MIB: i64 = 1 << 20;

/// How many volumes, and how often the driver is killed. `make test-long` does it all.
fn scale() -> (usize, usize) {
    let kills = rounds(10, 40);
    if kills > 10 { (30, kills as usize) } else { (7, kills as usize) }
}

/// One volume's life until `stop`, which ends with it in its pods, if it is to be `up` then.
fn life(kubelet: &mut Kubelet, up: bool, stop: &AtomicBool, random: &mut StdRng) {
    loop {
        let over = stop.load(Ordering::Relaxed);
        if kubelet.up(!over) {
            for _ in 0..random.random_range(1..8) {
                kubelet.work();
                std::thread::sleep(Duration::from_millis(random.random_range(0..120)));
            }
            if over && up {
                return;
            }
        }
        kubelet.down();
        if over {
            return;
        }
    }
}

#[test]
fn root_a_driver_that_is_killed_at_random_instants_does_what_its_kubelet_asks_for() {
    let (volumes, kills) = scale();
    let seed: u64 = rand::random();
    eprintln!("seed {seed}, {volumes} volumes, {kills} kills");
    let node = Node::new();
    let mut driver = Some(Driver::start(&node, &[]));
    let socket = driver.as_ref().expect("it was just started").socket.clone();
    let home = node.dir.join("kubelet");
    let mut kubelets: Vec<Kubelet> = (0..volumes)
        .map(|n| {
            // Raw devices, and volumes of two pods, are among them.
            let (raw, pods) = (n % 4 == 3, 1 + usize::from(n % 3 == 0));
            Kubelet::new(&socket, &home, &format!("v{n}"), raw, pods, seed ^ n as u64)
        })
        .collect();
    for kubelet in &mut kubelets {
        kubelet.create(64 * MIB);
    }
    let stop = AtomicBool::new(false);
    let alive = AtomicUsize::new(volumes);
    std::thread::scope(|scope| {
        for (n, kubelet) in kubelets.iter_mut().enumerate() {
            let (stop, alive) = (&stop, &alive);
            scope.spawn(move || {
                // One that fails must not let the others go on for long.
                struct End<'a>(&'a AtomicBool, &'a AtomicUsize);
                impl Drop for End<'_> {
                    fn drop(&mut self) {
                        self.1.fetch_sub(1, Ordering::Relaxed);
                        if std::thread::panicking() {
                            self.0.store(true, Ordering::Relaxed);
                        }
                    }
                }
                let _end = End(stop, alive);
                let mut random = StdRng::seed_from_u64(seed.wrapping_add(1000 + n as u64));
                life(kubelet, n % 2 == 0, stop, &mut random);
            });
        }
        let mut random = StdRng::seed_from_u64(seed.wrapping_add(1));
        for _ in 0..kills {
            std::thread::sleep(Duration::from_millis(random.random_range(0..2500)));
            if stop.load(Ordering::Relaxed) {
                break;
            }
            driver.take().expect("there is one").kill();
            std::thread::sleep(Duration::from_millis(random.random_range(0..200)));
            driver = Some(Driver::start(&node, &[]));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(alive.load(Ordering::Relaxed), 0);

    // What was asked for, and no more: by the mount table, the devices and processes, and the catalog.
    let driver = driver.expect("there is one");
    let up: Vec<&Kubelet> = kubelets.iter().step_by(2).collect();
    let there = leftovers(node.dir.path());
    let count = |kind: fn(&Leftover) -> bool| there.iter().filter(|l| kind(l)).count();
    // The mount of the FUSE file belongs to each.
    let mounts: usize = up.iter().map(|k| k.mounts() + 1).sum();
    assert_eq!(count(|l| matches!(l, Leftover::Mount(_))), mounts, "mounts: {there:#?}");
    assert_eq!(count(|l| matches!(l, Leftover::Loop(..))), up.len(), "loop devices: {there:#?}");
    let (keepers, servers) = node.processes();
    assert_eq!((keepers.len(), servers.len()), (up.len(), up.len()), "{there:#?}");
    let client = driver.client();
    for (n, kubelet) in kubelets.iter().enumerate() {
        let status = client.get(kubelet.volume()).expect("it is there").status.expect("it has one");
        let condition = status.volume_condition.expect("it has one");
        let found = node.found(kubelet.volume());
        if n % 2 == 0 {
            assert_eq!((status.published_node_ids.len(), condition.abnormal), (1, false), "{condition:?}");
            assert_eq!(found["state"], "attached", "{found:#}");
        } else {
            assert_eq!((status.published_node_ids.len(), &*condition.message), (0, "not in use"));
            assert_eq!(found["state"], "released", "{found:#}");
        }
    }
    for kubelet in kubelets.iter_mut().step_by(2) {
        kubelet.work();
        kubelet.down();
    }
    let mut all = Tally::default();
    for kubelet in &mut kubelets {
        kubelet.delete();
        all += kubelet.tally;
    }
    eprintln!("{all:?}");
    assert!(all.broken > 0, "no kill struck a call: {all:?}");
    assert!(all.writes > all.ups && all.downs >= volumes as u64, "{all:?}");
    assert!(client.list(0, "").expect("the driver lists").entries.is_empty());
    assert!(driver.stop().success());
    node.assert_nothing_left("after the kills");
    // With the data, too.
    let store = node.state().join("store");
    let left: Vec<_> = files_below(&store).into_iter().filter(|f| f.is_file()).collect();
    assert!(left.is_empty(), "files of deleted volumes: {left:#?}");
}
