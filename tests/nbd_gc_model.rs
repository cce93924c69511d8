//! The collector raced against everything else that happens on a node, on a model: attach, detach, kills and
//! take-overs of the same and of other volumes, mounts and opens by others, links of raw attaches and what others make of
//! them, foreign devices that come and go, indices that are used again. Things happen between any two looks of the
//! collector, and in the middle of a look.
//!
//! It asserts that no live, used or foreign device is ever disconnected, nor one that a link of its volume leads to, and
//! that once things are quiet every real leak is gone and nothing else. `ZEROFSCTL_CASES` sets how many histories are
//! tried.

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
use zerofsctl::ops::nbd_gc::{Fate, GcSpec, Item, Left, World, collect, plan};
use zerofsctl::values::{ByteSize, VolumeId};

const INDICES: u32 = 5;
const VOLUMES: usize = 3;
const PLACES: usize = 4;

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
    /// Where its raw attaches put links, as its journal has it: noted before they are made.
    raw: BTreeSet<usize>,
}

/// A path at which a link may be.
#[derive(Debug, Clone, Copy)]
struct Place {
    to: To,
    /// When that came to be so, and whether by a command of ours, which holds its volume's lock.
    at: u64,
    by_command: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum To {
    Nothing,
    Device(u32),
    /// It cannot be looked at.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Step {
    StartServer,
    Connect,
    Mount,
    Unmount,
    Disconnect,
    StopServer,
    Note(usize),
    Link(usize),
    Unlink,
}

struct State {
    random: SmallRng,
    identifiers: bool,
    slots: BTreeMap<u32, Slot>,
    /// Indices that the collector has claimed.
    claimed: BTreeSet<u32>,
    volumes: Vec<Volume>,
    places: [Place; PLACES],
    marks: BTreeMap<(u32, u64), jiff::Timestamp>,
    seconds: i64,
    clock: u64,
    last_look: u64,
    /// When links were looked at, since the last look at the devices.
    links_looked: Option<u64>,
    next_id: u64,
    quiet: bool,
    /// How likely it is that anything happens at a given moment.
    pace: f64,
    disconnected: Vec<(u32, u64)>,
    /// The kernel does not let go.
    stuck: bool,
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
        match self.random.random_range(0..14) {
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
            // Others take links away, and put them wherever they like.
            11 | 12 => {
                let (place, index) =
                    (self.random.random_range(0..PLACES), self.random.random_range(0..INDICES));
                let to = match self.random.random_range(0..10) {
                    0..5 => To::Nothing,
                    5..9 => To::Device(index),
                    _ => To::Unknown,
                };
                self.put(place, to, false);
            }
            _ => self.seconds += self.random.random_range(0..120),
        }
    }

    fn put(&mut self, place: usize, to: To, by_command: bool) {
        self.tell(format!("place {place} leads to {to:?}, by a command: {by_command}"));
        self.places[place] = Place { to, at: self.clock, by_command };
    }

    /// The places of the volume that lead to the device, or may.
    fn leading_to(&self, volume: usize, index: u32) -> impl Iterator<Item = &Place> {
        let all = self.volumes[volume].raw.iter().map(|place| &self.places[*place]);
        all.filter(move |place| place.to == To::Device(index) || place.to == To::Unknown)
    }

    fn command(&mut self, volume: usize) {
        if self.volumes[volume].locked_by_collector {
            return;
        }
        let Some(mut steps) = self.volumes[volume].command.take() else {
            let place = self.random.random_range(0..PLACES);
            let steps = match self.random.random_range(0..4) {
                0 => vec![Step::Mount, Step::Connect, Step::StartServer],
                1 => vec![Step::Link(place), Step::Note(place), Step::Connect, Step::StartServer],
                2 => vec![Step::StopServer, Step::Disconnect, Step::Unlink, Step::Unmount],
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
            (Step::Note(place), _) => {
                self.volumes[volume].raw.insert(place);
            }
            (Step::Link(place), Some(index)) if self.places[place].to == To::Nothing => {
                self.put(place, To::Device(index), true);
            }
            (Step::Unlink, _) => {
                for place in std::mem::take(&mut self.volumes[volume].raw) {
                    if index.is_some_and(|index| self.places[place].to == To::Device(index)) {
                        self.put(place, To::Nothing, true);
                    }
                }
            }
            _ => {}
        }
        if !steps.is_empty() {
            self.volumes[volume].command = Some(steps);
        }
    }

    /// Whether nobody uses or serves the device, which is ours.
    fn is_left(&self, index: u32) -> bool {
        self.slots.get(&index).is_some_and(|slot| {
            let Some(volume) = slot.volume.map(|v| &self.volumes[v]) else { return false };
            !slot.mounted && slot.opened.is_none() && !volume.server && volume.command.is_none()
        })
    }

    /// Whether disconnecting it harms nobody, either: what the collector must be sure of.
    fn is_leak(&self, index: u32) -> bool {
        let volume = self.slots.get(&index).and_then(|slot| slot.volume);
        self.is_left(index) && volume.is_some_and(|volume| self.leading_to(volume, index).next().is_none())
    }

    /// The connections of which this is so.
    fn all(&self, is_so: impl Fn(&State, u32) -> bool) -> Vec<(u32, u64)> {
        self.slots.iter().filter(|(i, _)| is_so(self, **i)).map(|(i, slot)| (*i, slot.id)).collect()
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
            places: [Place { to: To::Nothing, at: 0, by_command: false }; PLACES],
            marks: BTreeMap::new(),
            seconds: 0,
            clock: 0,
            last_look: 0,
            links_looked: None,
            next_id: 0,
            quiet: false,
            pace: [0.02, 0.1, 0.3, 1.0][(seed % 4) as usize],
            disconnected: vec![],
            stuck: false,
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
            s.links_looked = None;
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
        if s.stuck {
            return Err(Error::failed("it is not free").hint("see who holds it"));
        }
        let history = s.history.join("\n");
        let Some(slot) = s.slots.remove(&index) else { panic!("nothing is connected there\n{history}") };
        let volume = slot.volume.unwrap_or_else(|| panic!("nbd{index} is foreign: {slot:?}\n{history}"));
        assert!(!slot.mounted, "nbd{index} is mounted\n{history}");
        let state = &s.volumes[volume];
        assert!(!state.server, "nbd{index} has a server\n{history}");
        assert!(state.command.is_none() && state.locked_by_collector, "a command is at work\n{history}");
        // Nothing in the kernel keeps others from opening a dead device; before the last look it would be seen.
        assert!(slot.opened.is_none_or(|at| at > s.last_look), "nbd{index} is open\n{history}");
        // Nor from putting links to it; those of our commands keep away whoever has the lock.
        let unseen = |place: &Place| !place.by_command && s.links_looked.is_some_and(|at| place.at > at);
        for place in s.leading_to(volume, index) {
            assert!(unseen(place), "{place:?} leads to nbd{index}\n{history}");
        }
        s.disconnected.push((index, slot.id));
        drop(s);
        drop(claim);
        Ok(())
    }

    fn leads_to(&self, volume: &VolumeId, index: u32) -> Result<Option<std::path::PathBuf>> {
        let raw = {
            let mut s = self.0.borrow_mut();
            s.links_looked = Some(s.clock);
            s.volumes[number(volume)].raw.clone()
        };
        for place in raw {
            self.things_happen(1);
            match self.0.borrow().places[place].to {
                To::Device(to) if to == index => return Ok(Some(format!("/place{place}").into())),
                To::Unknown => return Err(Error::failed(format!("cannot look at /place{place}"))),
                To::Device(_) | To::Nothing => {}
            }
        }
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
    let (mut collected, mut in_races, mut linked_in_races, mut linked_at_the_end) = (0, 0, 0, 0);
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
                if s.random.random_bool(0.3) {
                    s.volumes[volume].raw.insert(volume);
                    s.put(volume, To::Device(index), true);
                }
            }
        }
        for _ in 0..6 {
            let events = node.0.borrow_mut().random.random_range(0..12);
            for _ in 0..events {
                node.0.borrow_mut().happen();
            }
            let items = collect(&&node, spec).unwrap();
            assert!(!items.iter().any(|i| i.fate == Fate::Would), "seed {seed}: {items:?}");
            linked_in_races += items.iter().filter(|i| is_kept_by_a_link(i)).count();
        }
        in_races += node.0.borrow().disconnected.len();
        {
            // Every command ends, whoever had something open has closed it, and every link can be looked at.
            let mut s = node.0.borrow_mut();
            s.quiet = true;
            s.volumes.iter_mut().for_each(|v| v.command = None);
            s.slots.values_mut().for_each(|slot| slot.opened = None);
            s.places.iter_mut().filter(|p| p.to == To::Unknown).for_each(|p| p.to = To::Nothing);
        }
        let (leaks, linked, stays, before) = {
            let s = node.0.borrow();
            let linked = s.all(|s, i| s.is_left(i) && !s.is_leak(i));
            (s.all(State::is_leak), linked, s.all(|s, i| !s.is_left(i)), s.disconnected.len())
        };
        // The first run only notes what is leaked; the second finds it old enough.
        plan(&&node, spec).unwrap();
        node.0.borrow_mut().seconds += 90;
        let items = collect(&&node, spec).unwrap();
        let kept: Vec<u32> = items.iter().filter(|i| is_kept_by_a_link(i)).map(|i| i.device.index).collect();
        assert_eq!(kept, linked.iter().map(|(i, _)| *i).collect::<Vec<_>>(), "seed {seed}: {items:?}");
        {
            let mut s = node.0.borrow_mut();
            assert_eq!(s.disconnected[before..], leaks, "seed {seed}\n{}", s.history.join("\n"));
            s.places.iter_mut().for_each(|place| place.to = To::Nothing);
        }
        // Once nothing leads there any more, nothing keeps them.
        collect(&&node, spec).unwrap();
        let s = node.0.borrow();
        let gone = &s.disconnected[before + leaks.len()..];
        assert_eq!(gone, linked, "seed {seed}\n{}", s.history.join("\n"));
        assert_eq!(s.all(|_, _| true), stays, "seed {seed}");
        assert!(s.claimed.is_empty() && s.volumes.iter().all(|v| !v.locked_by_collector), "seed {seed}");
        collected += leaks.len();
        linked_at_the_end += linked.len();
    }
    println!(
        "{} histories: {in_races} devices collected in races, {collected} once it was quiet; kept by a link: \
         {linked_in_races} and {linked_at_the_end}",
        cases()
    );
    assert!(collected > 0 && in_races > 100, "the histories make too few leaks: they try nothing");
    assert!(linked_in_races > 20 && linked_at_the_end > 0, "too few links lead to leaks");
}

fn is_kept_by_a_link(item: &Item) -> bool {
    matches!(&item.fate, Fate::Kept(reason) if reason.why.contains("leads to it"))
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
    let Fate::Kept(reason) = &items[0].fate else { panic!("{items:?}") };
    assert!(reason.why.contains("5m are asked for"), "{reason:?}");
    // Each run looks a second after it began.
    let due = reason.due_at.expect("it is told when to come back").as_second();
    node.0.borrow_mut().seconds = due - 2;
    assert!(matches!(collect(&&node, spec).unwrap()[0].fate, Fate::Kept(_)));
    assert_eq!(plan(&&node, spec).unwrap()[0].fate, Fate::Would);
    assert!(node.0.borrow().disconnected.is_empty());
    let items = collect(&&node, spec).unwrap();
    assert_eq!((&items[0].fate, &items[0].left), (&Fate::Disconnected, &Some(Left::Nothing)));
}

#[test]
fn what_fails_is_told_with_its_hint() {
    let node = Node::new(1, true);
    let spec = GcSpec { older_than: Duration::ZERO, pause: Duration::from_secs(1) };
    {
        let mut s = node.0.borrow_mut();
        (s.quiet, s.stuck) = (true, true);
        s.connect("zerofs:vol1".into(), Some(1));
    }
    let items = collect(&&node, spec).unwrap();
    let Fate::Failed(reason) = &items[0].fate else { panic!("{items:?}") };
    assert_eq!((&*reason.why, reason.hint.as_deref()), ("it is not free", Some("see who holds it")));
}
