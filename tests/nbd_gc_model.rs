//! The collector raced against everything else that happens on a node, on a model: attach, detach, kills and
//! take-overs of the same and of other volumes, mounts and opens by others, foreign devices that come and go, indices
//! that are used again. Things happen between any two looks of the collector, and in the middle of a look.
//!
//! It asserts that no live, used or foreign device is ever disconnected, and that once things are quiet every real
//! leak is gone and nothing else. `ZEROFSCTL_CASES` sets how many histories are tried.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::SmallRng};
use zerofsctl::error::{Error, Kind, Result};
use zerofsctl::host::nbd::capacity::Capacity;
use zerofsctl::host::nbd::survey::{Connection, Device, Survey};
use zerofsctl::host::nbd::verdict::{
    Backend, Evidence, Ownership, Recorded, Served, Verdict, judge, ownership,
};
use zerofsctl::ops::nbd_gc::{Fate, GcSpec, Left, World, collect, plan};
use zerofsctl::values::{ByteSize, VolumeId};

const INDICES: u32 = 5;
const VOLUMES: usize = 3;

/// Backends of others, some of them nearly ours.
const FOREIGN: [&str; 6] = ["", "zerofs", "zerofs:", "zerofs:../x", "ZEROFS:vol0", "nbdkit"];

#[derive(Debug, Clone)]
struct Slot {
    id: u64,
    pid: u32,
    backend: String,
    /// The volume whose server's sockets it has.
    volume: Option<usize>,
    mounted: bool,
    /// When somebody opened it.
    opened: Option<u64>,
}

#[derive(Debug, Clone, Default)]
struct Volume {
    server: bool,
    /// A command that holds the lock: what it is about to do, last step first.
    command: Option<Vec<Step>>,
    locked_by_collector: bool,
    /// The record of its device: index and process.
    record: Option<(u32, u32)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Step {
    StartServer,
    Connect,
    Mount,
    Unmount,
    Disconnect,
    StopServer,
}

struct State {
    random: SmallRng,
    identifiers: bool,
    slots: BTreeMap<u32, Slot>,
    /// Indices that the collector has claimed.
    claimed: BTreeSet<u32>,
    volumes: Vec<Volume>,
    marks: BTreeMap<(u32, u64), jiff::Timestamp>,
    seconds: i64,
    clock: u64,
    last_look: u64,
    next_id: u64,
    quiet: bool,
    /// How likely it is that anything happens at a given moment.
    pace: f64,
    disconnected: Vec<(u32, u64)>,
    history: Vec<String>,
}

fn id_of(volume: usize) -> VolumeId {
    format!("vol{volume}").parse().unwrap()
}

fn number(volume: &VolumeId) -> usize {
    volume.as_str()[3..].parse().unwrap()
}

impl State {
    fn tell(&mut self, what: String) {
        self.history.push(format!("{} {what}", self.clock));
    }

    fn free(&self) -> Option<u32> {
        // While the collector has it open, the kernel lets nobody connect it.
        (0..INDICES).find(|i| !self.slots.contains_key(i) && !self.claimed.contains(i))
    }

    fn connect(&mut self, backend: String, volume: Option<usize>) -> Option<u32> {
        let index = self.free()?;
        self.next_id += 1;
        let pid = 100 + self.next_id as u32;
        self.slots
            .insert(index, Slot { id: self.next_id, pid, backend, volume, mounted: false, opened: None });
        Some(index)
    }

    fn of(&self, volume: usize) -> Option<u32> {
        self.slots.iter().find(|(_, s)| s.volume == Some(volume)).map(|(i, _)| *i)
    }

    /// One thing happens.
    fn happen(&mut self) {
        self.clock += 1;
        if self.quiet {
            return;
        }
        match self.random.random_range(0..12) {
            // A command goes a step further, begins, or is killed. It holds the lock all the while.
            0..=4 => {
                let volume = self.random.random_range(0..VOLUMES);
                self.command(volume);
            }
            5 => {
                let volume = self.random.random_range(0..VOLUMES);
                if self.volumes[volume].command.take().is_some() {
                    self.tell(format!("the command on vol{volume} is killed"));
                }
            }
            6 => {
                let volume = self.random.random_range(0..VOLUMES);
                if std::mem::take(&mut self.volumes[volume].server) {
                    self.tell(format!("the server of vol{volume} is killed"));
                }
            }
            7 => {
                let at = self.random.random_range(0..FOREIGN.len());
                if let Some(index) = self.connect(FOREIGN[at].into(), None) {
                    self.tell(format!("nbd{index} is connected as {:?}", FOREIGN[at]));
                }
            }
            // Others disconnect what they like, ours too.
            8 => {
                let index = self.random.random_range(0..INDICES);
                if self.slots.get(&index).is_some_and(|s| !s.mounted) && !self.claimed.contains(&index) {
                    self.slots.remove(&index);
                    self.tell(format!("nbd{index} is disconnected by others"));
                }
            }
            // A mount takes an exclusive claim, which the collector's refuses.
            9 => {
                let index = self.random.random_range(0..INDICES);
                let (claimed, coin) = (self.claimed.contains(&index), self.random.random_bool(0.5));
                if let Some(slot) = self.slots.get_mut(&index)
                    && !claimed
                {
                    slot.mounted = coin;
                    self.tell(format!("nbd{index} mounted: {coin}"));
                }
            }
            10 => {
                let index = self.random.random_range(0..INDICES);
                let (now, coin) = (self.clock, self.random.random_bool(0.5));
                if let Some(slot) = self.slots.get_mut(&index) {
                    slot.opened = coin.then_some(now);
                    self.tell(format!("nbd{index} open: {coin}"));
                }
            }
            _ => self.seconds += self.random.random_range(0..120),
        }
    }

    fn command(&mut self, volume: usize) {
        if self.volumes[volume].locked_by_collector {
            return;
        }
        let Some(mut steps) = self.volumes[volume].command.take() else {
            let steps = match self.random.random_range(0..3) {
                0 => vec![Step::Mount, Step::Connect, Step::StartServer],
                1 => vec![Step::StopServer, Step::Disconnect, Step::Unmount],
                // A take-over: the next server has the device that is there.
                _ => vec![Step::StartServer],
            };
            self.volumes[volume].command = Some(steps);
            return;
        };
        let Some(step) = steps.pop() else { return };
        let index = self.of(volume);
        self.tell(format!("vol{volume}: {step:?}, it has {index:?}"));
        match (step, index) {
            (Step::StartServer, _) => self.volumes[volume].server = true,
            (Step::Connect, None) if self.volumes[volume].server => {
                if let Some(index) = self.connect(format!("zerofs:vol{volume}"), Some(volume)) {
                    let pid = self.slots[&index].pid;
                    self.volumes[volume].record = Some((index, pid));
                }
            }
            (Step::Mount | Step::Unmount, Some(index)) if !self.claimed.contains(&index) => {
                self.slots.get_mut(&index).unwrap().mounted = step == Step::Mount;
            }
            (Step::Disconnect, Some(index)) if !self.slots[&index].mounted => {
                self.slots.remove(&index);
                self.volumes[volume].record = None;
            }
            (Step::StopServer, None) => self.volumes[volume].server = false,
            _ => {}
        }
        if !steps.is_empty() {
            self.volumes[volume].command = Some(steps);
        }
    }

    /// Whether disconnecting it harms nobody: what the collector must be sure of.
    fn is_leak(&self, index: u32) -> bool {
        self.slots.get(&index).is_some_and(|slot| {
            let Some(volume) = slot.volume.map(|v| &self.volumes[v]) else { return false };
            !slot.mounted && slot.opened.is_none() && !volume.server && volume.command.is_none()
        })
    }
}

struct Node(RefCell<State>);

struct Lock<'a>(&'a Node, usize);

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        self.0.0.borrow_mut().volumes[self.1].locked_by_collector = false;
    }
}

struct Claim<'a>(&'a Node, u32);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.0.borrow_mut().claimed.remove(&self.1);
    }
}

impl Node {
    fn new(seed: u64, identifiers: bool) -> Node {
        Node(RefCell::new(State {
            random: SmallRng::seed_from_u64(seed),
            identifiers,
            slots: BTreeMap::new(),
            claimed: BTreeSet::new(),
            volumes: vec![Volume::default(); VOLUMES],
            marks: BTreeMap::new(),
            seconds: 0,
            clock: 0,
            last_look: 0,
            next_id: 0,
            quiet: false,
            pace: [0.02, 0.1, 0.3, 1.0][(seed % 4) as usize],
            disconnected: vec![],
            history: vec![],
        }))
    }

    /// Some histories are wild, and in some nearly nothing happens while the collector works.
    fn things_happen(&self, most: usize) {
        let mut s = self.0.borrow_mut();
        let pace = s.pace;
        if !s.random.random_bool(pace) {
            return;
        }
        let n = s.random.random_range(0..=most);
        for _ in 0..n {
            s.happen();
        }
    }

    /// The parts of a look, with things happening between them; the verdict is the real one.
    fn look_at(&self, index: u32) -> Option<Device> {
        let slot = self.0.borrow().slots.get(&index).cloned()?;
        self.things_happen(1);
        let (backend, recorded) = {
            let s = self.0.borrow();
            // What is read by and by may be of another connection already.
            let text = s.slots.get(&index).map(|s| s.backend.clone());
            match (s.identifiers, text) {
                (true, Some(text)) => (Backend::Text(text), None),
                (true, None) => (Backend::Absent, None),
                (false, _) => {
                    let named = s.volumes.iter().enumerate().filter_map(|(v, volume)| {
                        let (_, pid) = volume.record.filter(|(i, _)| *i == index)?;
                        Some((id_of(v), Some(pid)))
                    });
                    let named: Vec<_> = named.collect();
                    (Backend::Unsupported, Recorded::among(&named, Some(slot.pid)))
                }
            }
        };
        let owner = ownership(&backend, recorded.as_ref());
        self.things_happen(1);
        let used_by = {
            let s = self.0.borrow();
            let now = s.slots.get(&index);
            now.filter(|n| n.mounted || n.opened.is_some()).map(|_| "somebody".to_owned())
        };
        self.things_happen(1);
        let volume = match &owner {
            Ownership::Ours(volume, _) => Some(volume.clone()),
            _ => None,
        };
        let served = {
            let s = self.0.borrow();
            let runs = volume.as_ref().is_some_and(|v| s.volumes[number(v)].server);
            if runs { Served::By("its keeper".into()) } else { Served::Nobody }
        };
        self.things_happen(1);
        let s = self.0.borrow();
        let operation = volume
            .as_ref()
            .filter(|v| s.volumes[number(v)].command.is_some())
            .map(|_| "a command".to_owned());
        let same = s.slots.get(&index).is_some_and(|n| n.id == slot.id);
        let doubts = if same { vec![] } else { vec!["it changed".to_owned()] };
        let proof = match &owner {
            Ownership::Ours(_, proof) => Some(*proof),
            _ => None,
        };
        let (verdict, why) = judge(&Evidence { ownership: owner, used_by, served, operation, doubts });
        let since = jiff::Timestamp::from_second(0).unwrap();
        Some(Device {
            index,
            path: format!("/dev/nbd{index}").into(),
            connection: Some(Connection { id: slot.id, pid: Some(slot.pid), since }),
            size: ByteSize(1 << 30),
            backend: match backend {
                Backend::Text(text) => Some(text),
                _ => None,
            },
            volume,
            proof,
            server: None,
            mounts: vec![],
            holders: vec![],
            openers: None,
            verdict: Some(verdict),
            why,
            leaked_since: None,
        })
    }
}

impl<'a> World for &'a Node {
    type Lock = Lock<'a>;
    type Claim = Claim<'a>;

    fn look(&self) -> Result<Survey> {
        {
            let mut s = self.0.borrow_mut();
            s.last_look = s.clock;
        }
        let mut devices: Vec<Device> = (0..INDICES).filter_map(|i| self.look_at(i)).collect();
        let mut s = self.0.borrow_mut();
        let now = jiff::Timestamp::from_second(s.seconds).unwrap();
        let before = std::mem::take(&mut s.marks);
        for d in devices.iter_mut().filter(|d| d.verdict == Some(Verdict::OursLeaked)) {
            let key = (d.index, d.connection.as_ref().unwrap().id);
            let since = before.get(&key).copied().unwrap_or(now);
            s.marks.insert(key, since);
            d.leaked_since = Some(since);
        }
        let connected = devices.len() as u32;
        let capacity = Capacity {
            available: true,
            nbds_max: Some(INDICES),
            existing: INDICES,
            connected,
            limit: INDICES,
        };
        Ok(Survey { devices, capacity, identifiers: s.identifiers, namespaces: 1 })
    }

    fn pause(&self, _: Duration) {
        self.things_happen(6);
        self.0.borrow_mut().seconds += 1;
    }

    fn now(&self) -> jiff::Timestamp {
        jiff::Timestamp::from_second(self.0.borrow().seconds).unwrap()
    }

    fn lock(&self, volume: &VolumeId) -> Result<Lock<'a>> {
        self.things_happen(3);
        let mut s = self.0.borrow_mut();
        if s.volumes[number(volume)].command.is_some() {
            return Err(Error::new(Kind::Busy, "a command is at work on it"));
        }
        s.volumes[number(volume)].locked_by_collector = true;
        Ok(Lock(self, number(volume)))
    }

    fn claim(&self, index: u32) -> Result<Claim<'a>> {
        self.things_happen(3);
        let mut s = self.0.borrow_mut();
        if s.slots.get(&index).is_some_and(|s| s.mounted) {
            return Err(Error::new(Kind::Busy, "the kernel says that somebody has it"));
        }
        s.claimed.insert(index);
        Ok(Claim(self, index))
    }

    fn disconnect(&self, index: u32, claim: Claim<'a>) -> Result<()> {
        self.things_happen(2);
        let mut s = self.0.borrow_mut();
        let history = s.history.join("\n");
        let Some(slot) = s.slots.remove(&index) else { panic!("nothing is connected there\n{history}") };
        let volume = slot.volume.unwrap_or_else(|| panic!("nbd{index} is foreign: {slot:?}\n{history}"));
        assert!(!slot.mounted, "nbd{index} is mounted\n{history}");
        let state = &s.volumes[volume];
        assert!(!state.server, "nbd{index} has a server\n{history}");
        assert!(state.command.is_none() && state.locked_by_collector, "a command is at work\n{history}");
        // Nothing in the kernel keeps others from opening a dead device; before the last look it would be seen.
        assert!(slot.opened.is_none_or(|at| at > s.last_look), "nbd{index} is open\n{history}");
        s.disconnected.push((index, slot.id));
        drop(s);
        drop(claim);
        Ok(())
    }

    fn leads_to(&self, _: &VolumeId, _: u32) -> Result<Option<std::path::PathBuf>> {
        Ok(None)
    }

    fn left(&self, _: &VolumeId, _: Option<&Lock<'a>>) -> Result<Left> {
        Ok(Left::Nothing)
    }
}

fn cases() -> u64 {
    std::env::var("ZEROFSCTL_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(2_000).max(500)
}

/// Histories with a collector that runs again and again; then everything is quiet, and it runs once more.
fn histories(identifiers: bool) {
    let mut seeds = SmallRng::seed_from_u64(20_261_126);
    let (mut collected, mut in_races) = (0usize, 0usize);
    for _ in 0..cases() {
        let seed: u64 = seeds.random();
        let node = Node::new(seed, identifiers);
        let spec = GcSpec {
            older_than: Duration::from_secs([0, 0, 2, 30][(seed / 4 % 4) as usize]),
            pause: Duration::from_secs(1),
        };
        for volume in 0..VOLUMES {
            // A crash has left most of them without a server.
            let mut s = node.0.borrow_mut();
            if s.random.random_bool(0.7)
                && let Some(index) = s.connect(format!("zerofs:vol{volume}"), Some(volume))
            {
                let pid = s.slots[&index].pid;
                s.volumes[volume].record = Some((index, pid));
            }
        }
        for _ in 0..6 {
            let events = node.0.borrow_mut().random.random_range(0..12);
            for _ in 0..events {
                node.0.borrow_mut().happen();
            }
            let items = collect(&&node, spec).unwrap();
            assert!(!items.iter().any(|i| i.fate == Fate::Would), "seed {seed}: {items:?}");
        }
        in_races += node.0.borrow().disconnected.len();
        {
            // Every command ends, whoever had something open has closed it.
            let mut s = node.0.borrow_mut();
            s.quiet = true;
            s.volumes.iter_mut().for_each(|v| v.command = None);
            s.slots.values_mut().for_each(|slot| slot.opened = None);
        }
        let leaks: Vec<(u32, u64)> = {
            let s = node.0.borrow();
            (0..INDICES).filter(|i| s.is_leak(*i)).map(|i| (i, s.slots[&i].id)).collect()
        };
        let stays: Vec<u32> =
            node.0.borrow().slots.keys().copied().filter(|i| !leaks.iter().any(|(l, _)| l == i)).collect();
        let before = node.0.borrow().disconnected.len();
        // The first run only notes what is leaked; the second finds it old enough.
        plan(&&node, spec).unwrap();
        node.0.borrow_mut().seconds += 90;
        collect(&&node, spec).unwrap();
        let s = node.0.borrow();
        assert_eq!(s.disconnected[before..], leaks, "seed {seed}\n{}", s.history.join("\n"));
        assert_eq!(s.slots.keys().copied().collect::<Vec<_>>(), stays, "seed {seed}");
        assert!(s.claimed.is_empty() && s.volumes.iter().all(|v| !v.locked_by_collector), "seed {seed}");
        collected += leaks.len();
    }
    println!("{} histories: {in_races} devices collected in races, {collected} once it was quiet", cases());
    assert!(collected > 0 && in_races > 100, "the histories make too few leaks: they try nothing");
}

#[test]
fn no_live_or_foreign_device_is_ever_disconnected_and_every_leak_goes() {
    histories(true);
}

#[test]
fn likewise_where_the_kernel_has_no_identifiers() {
    histories(false);
}

#[test]
fn a_young_leak_stays_until_it_is_old_enough() {
    let node = Node::new(1, true);
    {
        let mut s = node.0.borrow_mut();
        s.quiet = true;
        s.connect("zerofs:vol1".into(), Some(1));
    }
    let spec = GcSpec { older_than: Duration::from_secs(300), pause: Duration::from_secs(1) };
    let items = collect(&&node, spec).unwrap();
    assert!(matches!(&items[0].fate, Fate::Kept(why) if why.contains("5m are asked for")), "{items:?}");
    node.0.borrow_mut().seconds += 297;
    assert!(matches!(collect(&&node, spec).unwrap()[0].fate, Fate::Kept(_)));
    assert_eq!(plan(&&node, spec).unwrap()[0].fate, Fate::Would);
    assert!(node.0.borrow().disconnected.is_empty());
    let items = collect(&&node, spec).unwrap();
    assert_eq!((&items[0].fate, items[0].left), (&Fate::Disconnected, Some(Left::Nothing)));
}
