//! The crash matrix on the model machine: a kill before and after every change of every operation, then
//! the same command again; refused changes; and random interleavings of all of it. The model panics on each
//! thing that must never happen (mkfs over data, a device in use taken away, …), so every case checks those too.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use proptest::prelude::*;
use zerofsctl::error::{Kind, Result};
use zerofsctl::host::fake::{FakeHost, Killed};
use zerofsctl::host::{IoPath, Life, Transport, User};
use zerofsctl::journal;
use zerofsctl::ops::{self, AttachSpec, PublishSpec, Scope};
use zerofsctl::run::{Engine, Silent};
use zerofsctl::values::{ByteSize, TargetPath, VolumeId};

fn volume() -> VolumeId {
    "vol1".parse().unwrap()
}

fn target(path: &str) -> TargetPath {
    TargetPath::new(Path::new(path), Path::new("/")).unwrap()
}

/// How the devices of a test are made.
type Made = (Transport, IoPath);
const FUSE: Made = (Transport::Fuse, IoPath::Guarded);
const NBD: Made = (Transport::Nbd, IoPath::Guarded);
const DIRECT: Made = (Transport::Nbd, IoPath::Direct);
const ALL: [Made; 3] = [FUSE, NBD, DIRECT];

/// One machine, its run folder, and a user who types commands.
struct Machine {
    host: FakeHost,
    run_dir: tempfile::TempDir,
    made: Made,
}

impl Machine {
    fn new(made: Made) -> Self {
        // Every case writes and syncs a journal: memory keeps that quick.
        let run_dir = tempfile::Builder::new().prefix("crash").tempdir_in("/dev/shm").unwrap();
        let host = FakeHost::with_nbd();
        host.watch_locks(run_dir.path());
        Machine { host, run_dir, made }
    }

    fn engine(&self) -> Engine<'_> {
        Engine { host: &self.host, observer: &Silent }
    }

    fn spec(&self, at: &str) -> AttachSpec {
        let (transport, path) = self.made;
        AttachSpec { transport, path, ..AttachSpec::plain(volume(), target(at), "file:///store".into()) }
    }

    fn attach(&self, at: &str) -> Result<()> {
        ops::attach::attach(&self.engine(), self.run_dir.path(), &self.spec(at)).map(drop)
    }

    fn attach_block(&self, at: &str) -> Result<()> {
        let spec = AttachSpec { block: true, ..self.spec(at) };
        ops::attach::attach(&self.engine(), self.run_dir.path(), &spec).map(drop)
    }

    fn detach_scope(&self, scope: &Scope) -> Result<()> {
        ops::detach::detach(&self.engine(), self.run_dir.path(), &volume(), scope, Default::default())
            .map(drop)
    }

    fn detach(&self) -> Result<()> {
        self.detach_scope(&Scope::Volume)
    }

    fn detach_target(&self, at: &str) -> Result<()> {
        self.detach_scope(&Scope::Target(target(at)))
    }

    fn resize(&self, gib: u64) -> Result<()> {
        let size = ByteSize(gib * ByteSize::GIB);
        ops::resize::resize(&self.engine(), self.run_dir.path(), &self.spec("/grow"), size).map(drop)
    }

    fn fsck(&self) -> Result<()> {
        let spec = ops::fsck::FsckSpec { attach: self.spec("/none"), repair: false, read_data: None };
        ops::fsck::fsck(&self.engine(), self.run_dir.path(), &spec).map(drop)
    }

    fn publish_spec(&self, at: &str, block: bool) -> PublishSpec {
        PublishSpec {
            volume: volume(),
            staged: target(if block { "/raw" } else { "/a" }),
            target: target(at),
            read_only: false,
            block,
            alone: false,
            group: (!block).then_some(4711),
        }
    }

    fn publish(&self, at: &str) -> Result<()> {
        let spec = self.publish_spec(at, false);
        ops::publish::publish(&self.engine(), self.run_dir.path(), &spec).map(drop)
    }

    fn publish_block(&self, at: &str) -> Result<()> {
        let spec = self.publish_spec(at, true);
        ops::publish::publish(&self.engine(), self.run_dir.path(), &spec).map(drop)
    }

    fn unpublish(&self, at: &str) -> Result<()> {
        ops::publish::unpublish(&self.engine(), self.run_dir.path(), &volume(), &target(at)).map(drop)
    }

    /// Written to, at `/a`, and in `/pod` and `/other`.
    fn attach_with_two_pods(&self) {
        self.attach("/a").unwrap();
        self.publish("/pod").unwrap();
        self.publish("/other").unwrap();
        self.host.write(1);
    }

    fn let_other_pod_hold(&self) {
        self.host.set_users(vec![User { pid: 42, name: "of the other pod".into() }]);
    }

    fn recover(&self) -> Result<()> {
        ops::recover::recover(&self.engine(), self.run_dir.path(), &volume()).map(drop)
    }

    /// What the watcher of the node does about the volume.
    fn watch(&self) -> Result<()> {
        ops::take_over::take_over(&self.engine(), self.run_dir.path(), &volume()).map(drop)
    }

    /// Runs `command`; true when the model killed it.
    fn killed(&self, command: &dyn Fn(&Machine) -> Result<()>) -> bool {
        match catch_unwind(AssertUnwindSafe(|| command(self))) {
            Ok(_) => false,
            Err(payload) if payload.is::<Killed>() => true,
            Err(payload) => std::panic::resume_unwind(payload),
        }
    }

    /// Nothing is left, neither on the machine nor in the run folder.
    fn assert_empty(&self, when: &str) {
        assert_eq!(self.host.leftovers(), Vec::<&str>::new(), "{when}");
        assert_eq!(journal::volumes(self.run_dir.path()).unwrap(), vec![], "{when}");
        let locks = self.run_dir.path().join("locks");
        assert!(
            !locks.exists() || std::fs::read_dir(locks).unwrap().count() == 0,
            "{when}: a lock file is left"
        );
    }

    fn assert_data(&self, when: &str) {
        assert_eq!(self.host.read(), Some(self.host.acknowledged()), "{when}");
    }
}

/// The model's kills are panics; only real ones shall print.
fn quiet_kills() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let default = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.payload().is::<Killed>() {
                default(info);
            }
        }));
    });
}

type Command = fn(&Machine) -> Result<()>;

/// What happens before, what is killed, and what must be true after it was run again.
struct Case {
    name: &'static str,
    before: fn(&Machine),
    command: Command,
    after: fn(&Machine, &str),
}

fn gone_and_intact(m: &Machine, when: &str) {
    m.assert_empty(when);
    m.attach("/a").unwrap();
    m.assert_data(when);
}

const CASES: &[Case] = &[
    Case { name: "attach fresh", before: |_| {}, command: |m| m.attach("/a"), after: Machine::assert_data },
    Case {
        name: "attach existing",
        before: |m| {
            m.attach("/a").unwrap();
            m.host.write(1);
            m.detach().unwrap();
        },
        command: |m| m.attach("/a"),
        after: Machine::assert_data,
    },
    Case {
        name: "second mount",
        before: |m| {
            m.attach("/a").unwrap();
            m.host.write(1);
        },
        command: |m| m.attach("/b"),
        after: Machine::assert_data,
    },
    Case {
        name: "attach after the keeper was killed",
        before: |m| {
            m.attach("/a").unwrap();
            m.host.write(1);
            m.host.kill_keeper();
        },
        command: |m| m.attach("/a"),
        after: Machine::assert_data,
    },
    Case {
        name: "recover after keeper and ZeroFS were killed",
        before: |m| {
            m.attach("/a").unwrap();
            m.attach("/b").unwrap();
            m.host.write(1);
            m.host.kill_keeper();
            m.host.kill_zerofs();
        },
        command: Machine::recover,
        after: |m, when| {
            m.assert_data(when);
            assert_eq!(m.host.mounted_at(), ["/a", "/b"], "{when}");
        },
    },
    Case {
        name: "recover of a volume with pods",
        before: |m| {
            m.attach_with_two_pods();
            m.host.kill_keeper();
        },
        command: Machine::recover,
        after: |m, when| {
            m.assert_data(when);
            assert_eq!(m.host.mounted_at(), ["/a", "/pod", "/other"], "{when}");
        },
    },
    Case {
        name: "attach at one of two places after the keeper was killed",
        before: |m| {
            m.attach("/a").unwrap();
            m.attach("/b").unwrap();
            m.host.write(1);
            m.host.kill_keeper();
        },
        command: |m| m.attach("/b"),
        after: |m, when| {
            m.assert_data(when);
            assert_eq!(m.host.mounted_at(), ["/a", "/b"], "{when}");
        },
    },
    Case {
        name: "unpublish after the keeper was killed",
        before: |m| {
            m.attach_with_two_pods();
            m.host.kill_keeper();
        },
        command: |m| {
            // A healing that may be killed anywhere, and a pod that ends afterwards: that one must not come back.
            m.recover()?;
            m.unpublish("/pod")
        },
        after: |m, when| {
            m.recover().unwrap_or_else(|e| panic!("{when}: {e}"));
            m.assert_data(when);
            assert_eq!(m.host.mounted_at(), ["/a", "/other"], "{when}");
        },
    },
    Case {
        name: "detach",
        before: |m| {
            m.attach("/a").unwrap();
            m.attach("/b").unwrap();
            m.host.write(1);
        },
        command: Machine::detach,
        after: gone_and_intact,
    },
    Case {
        name: "detach of a volume whose keeper was killed",
        before: |m| {
            m.attach("/a").unwrap();
            m.host.write(1);
            m.host.kill_keeper();
        },
        command: Machine::detach,
        after: gone_and_intact,
    },
    Case {
        name: "resize",
        before: |m| {
            m.attach("/a").unwrap();
            m.host.write(1);
        },
        command: |m| m.resize(2),
        after: |m, when| {
            let grown = Some(ByteSize(2 * ByteSize::GIB));
            assert_eq!(m.host.sizes(), (grown, grown), "{when}");
            m.assert_data(when);
        },
    },
    Case {
        name: "resize of a detached volume",
        before: |m| {
            m.attach("/a").unwrap();
            m.host.write(1);
            m.detach().unwrap();
        },
        command: |m| m.resize(2),
        after: |m, when| {
            m.assert_empty(when);
            m.attach("/a").unwrap();
            let grown = Some(ByteSize(2 * ByteSize::GIB));
            assert_eq!(m.host.sizes(), (grown, grown), "{when}");
            m.assert_data(when);
        },
    },
    Case {
        name: "fsck",
        before: |m| {
            m.attach("/a").unwrap();
            m.host.write(1);
            m.detach().unwrap();
        },
        command: Machine::fsck,
        after: gone_and_intact,
    },
    Case {
        name: "recover after the kernel gave up waiting for a keeper",
        before: |m| {
            m.attach("/a").unwrap();
            m.host.write(1);
            m.host.kill_keeper();
            m.host.time_out();
        },
        command: Machine::recover,
        after: |m, when| {
            m.assert_data(when);
        },
    },
    Case {
        name: "detach after keeper and ZeroFS were killed",
        before: |m| {
            m.attach("/a").unwrap();
            m.host.write(1);
            m.host.kill_keeper();
            m.host.kill_zerofs();
        },
        command: Machine::detach,
        after: gone_and_intact,
    },
    Case {
        name: "resize after the keeper was killed",
        before: |m| {
            m.attach("/a").unwrap();
            m.host.write(1);
            m.host.kill_keeper();
        },
        command: |m| m.resize(2),
        after: |m, when| {
            let grown = Some(ByteSize(2 * ByteSize::GIB));
            assert_eq!(m.host.sizes(), (grown, grown), "{when}");
            m.assert_data(when);
        },
    },
    Case {
        name: "publish",
        before: |m| {
            m.attach("/a").unwrap();
            m.host.write(1);
        },
        command: |m| m.publish("/pod"),
        after: |m, when| {
            m.assert_data(when);
            assert_eq!(m.host.mounted_at(), ["/a", "/pod"], "{when}");
        },
    },
    Case {
        name: "publish after the keeper was killed",
        before: |m| {
            m.attach("/a").unwrap();
            m.publish("/pod").unwrap();
            m.host.write(1);
            m.host.kill_keeper();
        },
        command: |m| m.publish("/pod"),
        after: |m, when| {
            m.assert_data(when);
            assert_eq!(m.host.mounted_at(), ["/a", "/pod"], "{when}");
        },
    },
    Case {
        name: "unpublish of one of two",
        before: |m| {
            m.attach_with_two_pods();
        },
        command: |m| m.unpublish("/pod"),
        after: |m, when| {
            m.assert_data(when);
            assert_eq!(m.host.mounted_at(), ["/a", "/other"], "{when}");
        },
    },
    Case {
        name: "unpublish while another pod holds the failed device",
        before: |m| {
            m.attach_with_two_pods();
            m.host.kill_keeper();
            m.host.kill_zerofs();
            m.let_other_pod_hold();
        },
        command: |m| {
            // What the driver does by itself; that the device is held is no matter of the pod that goes.
            if let Err(e) = m.recover()
                && e.kind() != Kind::Busy
            {
                return Err(e);
            }
            m.unpublish("/pod")
        },
        after: |m, when| {
            m.host.set_users(vec![]);
            m.recover().unwrap_or_else(|e| panic!("{when}: {e}"));
            m.assert_data(when);
            assert_eq!(m.host.mounted_at(), ["/a", "/other"], "{when}");
        },
    },
    Case {
        name: "raw publish",
        before: |m| m.attach_block("/raw").unwrap(),
        command: |m| m.publish_block("/pod"),
        after: |m, when| assert_eq!(m.host.mounted_at(), ["/pod"], "{when}"),
    },
    Case {
        name: "raw block attach",
        before: |_| {},
        command: |m| m.attach_block("/dev/shm/raw"),
        after: |m, when| assert!(m.host.leftovers().contains(&"link"), "{when}"),
    },
];

fn all_cases() -> impl Iterator<Item = (&'static Case, Made)> {
    CASES.iter().flat_map(|case| ALL.into_iter().map(move |made| (case, made)))
}

/// Every instant of every case: killed there, run again, the same end state; then a detach leaves nothing.
#[test]
fn a_kill_at_every_instant_ends_in_the_same_state() {
    quiet_kills();
    // With mounts that go on for as long as nobody waits for them, or come to their end in the middle of something else.
    let takes = [None, Some(1), Some(2), Some(5)];
    for ((case, made), takes) in all_cases().flat_map(|c| takes.map(|takes| (c, takes))) {
        let mut instant = 0;
        loop {
            let m = Machine::new(made);
            m.host.let_mounts_take(takes);
            (case.before)(&m);
            m.host.kill_at(Some(instant));
            let killed = m.killed(&case.command);
            m.host.kill_at(None);
            let when = format!("{} {made:?}, killed at instant {instant}, mounts take {takes:?}", case.name);
            if killed {
                (case.command)(&m).unwrap_or_else(|e| panic!("{when}: {e}"));
            }
            (case.after)(&m, &when);
            m.detach().unwrap_or_else(|e| panic!("{when}: {e}"));
            m.assert_empty(&when);
            if !killed {
                break;
            }
            instant += 1;
        }
        assert!(instant >= 2, "{}: only {instant} instants", case.name);
    }
}

/// Killed twice, the second time while the first kill is being settled.
#[test]
fn a_kill_while_settling_a_kill_ends_in_the_same_state() {
    quiet_kills();
    // The direct path differs only in what a crash of ZeroFS means: once is enough for it.
    for (case, made) in all_cases().filter(|(_, made)| *made != DIRECT) {
        for first in 0.. {
            let mut reached = false;
            for second in 0.. {
                let m = Machine::new(made);
                (case.before)(&m);
                m.host.kill_at(Some(first));
                if !m.killed(&case.command) {
                    break;
                }
                reached = true;
                m.host.kill_at(Some(second));
                let again = m.killed(&case.command);
                m.host.kill_at(None);
                let when = format!("{} {made:?}, killed at {first} and then at {second}", case.name);
                if again {
                    (case.command)(&m).unwrap_or_else(|e| panic!("{when}: {e}"));
                }
                (case.after)(&m, &when);
                m.detach().unwrap_or_else(|e| panic!("{when}: {e}"));
                m.assert_empty(&when);
                if !again {
                    break;
                }
            }
            if !reached {
                break;
            }
        }
    }
}

/// A change that is refused: attach and fsck undo their own work; the others say so and are finished later.
#[test]
fn a_failure_at_every_instant_is_reported_and_leaves_nothing_behind() {
    quiet_kills();
    for (case, made) in all_cases() {
        for instant in 0.. {
            let m = Machine::new(made);
            (case.before)(&m);
            let (left, data) = (m.host.leftovers(), m.host.acknowledged());
            m.host.fail_at(Some(instant));
            let result = (case.command)(&m);
            // A refusal may be made good on the way: then the command succeeds, and there may be more of them.
            let refused = !m.host.is_to_fail();
            m.host.fail_at(None);
            let when = format!("{} {made:?}, refused at instant {instant}", case.name);
            if let Err(e) = result {
                assert!(e.step().is_some(), "{when}: {e} names no step");
                if ["attach fresh", "attach existing", "second mount", "fsck"].contains(&case.name) {
                    assert_eq!(m.host.leftovers(), left, "{when}: {e}");
                }
                (case.command)(&m).unwrap_or_else(|e| panic!("{when}: {e}"));
            }
            (case.after)(&m, &when);
            assert_eq!(m.host.acknowledged(), data, "{when}");
            m.detach().unwrap_or_else(|e| panic!("{when}: {e}"));
            m.assert_empty(&when);
            if !refused {
                assert!(instant >= 2, "{when}: there was nothing to refuse");
                break;
            }
        }
    }
}

/// A healing that was cut short, then a pod that ends before the next one: its place is not made again.
#[test]
fn what_is_taken_away_while_it_is_awaited_does_not_come_back() {
    quiet_kills();
    for instant in 0.. {
        let m = Machine::new(FUSE);
        m.attach_with_two_pods();
        m.host.kill_keeper();
        m.host.kill_at(Some(instant));
        let killed = m.killed(&Machine::recover);
        m.host.kill_at(None);
        let when = format!("recover killed at {instant}");
        m.unpublish("/pod").unwrap_or_else(|e| panic!("{when}: {e}"));
        m.recover().unwrap_or_else(|e| panic!("{when}: {e}"));
        m.assert_data(&when);
        assert_eq!(m.host.mounted_at(), ["/a", "/other"], "{when}");
        m.detach().unwrap_or_else(|e| panic!("{when}: {e}"));
        m.assert_empty(&when);
        if !killed {
            break;
        }
    }
}

/// A store that is away makes a healing fail: nothing is forgotten until it succeeds.
#[test]
fn a_healing_that_fails_keeps_the_places_for_the_next_one() {
    for made in [FUSE, DIRECT] {
        let m = Machine::new(made);
        m.attach("/a").unwrap();
        m.publish("/pod").unwrap();
        m.host.write(1);
        m.host.kill_keeper();
        m.host.kill_zerofs();
        m.host.set_store_away(true);
        for _ in 0..3 {
            assert!(m.recover().is_err(), "{made:?}");
        }
        m.host.set_store_away(false);
        m.recover().unwrap();
        m.assert_data("healed");
        assert_eq!(m.host.mounted_at(), ["/a", "/pod"], "{made:?}");
        m.detach().unwrap();
        m.assert_empty("after detach");
    }
}

#[test]
fn attaching_twice_is_already() {
    let m = Machine::new(FUSE);
    m.attach("/a").unwrap();
    let again = ops::attach::attach(&m.engine(), m.run_dir.path(), &m.spec("/a")).unwrap();
    assert!(again.already(), "{:?}", again.tasks);
    m.detach().unwrap();
    m.assert_empty("after detach");
}

#[test]
fn one_target_of_two_goes_and_the_other_stays() {
    let m = Machine::new(FUSE);
    m.attach("/a").unwrap();
    m.attach("/b").unwrap();
    m.host.write(1);
    m.detach_target("/a").unwrap();
    m.assert_data("one mount left");
    assert_eq!(m.detach_target("/c").unwrap_err().kind(), Kind::NotFound);
    m.detach_target("/b").unwrap();
    m.assert_empty("the last target takes everything with it");
}

#[test]
fn a_device_in_use_is_never_taken_away() {
    let m = Machine::new(FUSE);
    m.attach("/a").unwrap();
    m.host.write(1);
    m.host.set_users(vec![User { pid: 42, name: "dd".into() }]);
    let error = m.detach().unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.to_string().contains("dd (42)"), "{error}");
    m.host.set_users(vec![]);
    m.detach().unwrap();
    m.assert_empty("after the user let go");
}

#[test]
fn a_killed_keeper_is_a_pause_on_nbd_and_a_wreck_on_fuse() {
    for made in ALL {
        let m = Machine::new(made);
        m.attach("/a").unwrap();
        m.host.write(1);
        m.host.kill_keeper();
        if made == FUSE {
            assert_eq!(m.host.life(), Life::Dead);
            m.watch().unwrap();
            assert_eq!(m.host.life(), Life::Dead, "the watcher leaves a wreck to recover");
            m.recover().unwrap();
        } else {
            assert_eq!(m.host.life(), Life::Waiting);
            assert_eq!(m.host.read(), None, "I/O waits");
            let instants = m.host.instants();
            m.watch().unwrap();
            assert!(m.host.instants() - instants <= 6, "only a keeper is started: no mount, no disconnect");
        }
        m.assert_data("with the next keeper");
        m.watch().unwrap();
        m.assert_data("where all is well there is nothing to do");
        m.detach().unwrap();
        m.assert_empty("after detach");
        m.watch().unwrap();
        m.assert_empty("the watcher makes nothing of a volume that is not there");
    }
}

/// Killed at every instant, the watcher's next look goes on from there.
#[test]
fn a_kill_of_the_watcher_at_every_instant_is_made_good_by_the_next_look() {
    quiet_kills();
    for made in [NBD, DIRECT] {
        for instant in 0.. {
            let m = Machine::new(made);
            m.attach("/a").unwrap();
            m.host.write(1);
            m.host.kill_keeper();
            m.host.kill_at(Some(instant));
            let killed = m.killed(&Machine::watch);
            m.host.kill_at(None);
            m.watch().unwrap();
            m.assert_data(&format!("{made:?}, watcher killed at {instant}"));
            m.detach().unwrap();
            m.assert_empty("after detach");
            if !killed {
                break;
            }
        }
    }
}

#[test]
fn a_crash_of_zerofs_fails_a_direct_device_for_good_and_recover_makes_a_new_one() {
    let m = Machine::new(DIRECT);
    m.attach("/a").unwrap();
    m.host.write(1);
    m.host.kill_zerofs();
    assert_eq!(m.host.life(), Life::Dead);
    m.watch().unwrap();
    assert_eq!(m.host.life(), Life::Dead, "never a silent reconnect");
    m.recover().unwrap();
    m.assert_data("what was synced is there");
    m.detach().unwrap();
    m.assert_empty("after detach");
}

#[test]
fn a_filesystem_that_was_told_of_an_error_is_refused_by_attach_and_mounted_anew_by_recover() {
    let m = Machine::new(NBD);
    m.attach("/a").unwrap();
    m.host.write(1);
    m.host.kill_keeper();
    m.host.time_out();
    let error = m.attach("/a").unwrap_err();
    assert_eq!(error.kind(), Kind::Refused);
    assert!(error.hint_text().unwrap().contains("zerofsctl recover vol1"), "{error}");
    m.recover().unwrap();
    m.assert_data("mounted anew");
    m.detach().unwrap();
    m.assert_empty("after detach");
}

#[test]
fn a_detach_without_a_server_is_refused_and_with_force_gives_up_only_the_device() {
    for made in [FUSE, NBD] {
        let m = Machine::new(made);
        m.attach("/a").unwrap();
        m.host.write(1);
        m.host.set_store_away(true);
        let before = m.host.leftovers();
        assert_eq!(m.detach().unwrap_err().kind(), Kind::Interrupted);
        assert_eq!(m.host.leftovers(), before, "nothing was taken away");
        m.host.set_force(true);
        let error = m.detach().unwrap_err();
        assert_eq!((error.kind(), error.step()), (Kind::Unreachable, Some("stop")), "{error}");
        let left = m.host.leftovers();
        assert!(!left.contains(&"mount") && !left.contains(&"nbd") && !left.contains(&"device"), "{left:?}");
        assert!(left.contains(&"log"), "what was acknowledged waits: {left:?}");
        m.host.set_store_away(false);
        m.detach().unwrap();
        m.assert_empty("once the store is back");
        m.attach("/a").unwrap();
        m.assert_data("nothing that was acknowledged is lost");
    }
}

#[test]
fn a_place_on_a_failed_device_of_the_direct_path_brings_it_back_first() {
    let m = Machine::new(DIRECT);
    m.attach("/a").unwrap();
    m.host.write(1);
    m.host.kill_zerofs();
    assert_eq!(m.host.life(), Life::Dead);
    m.publish("/pod").unwrap();
    assert_eq!(m.host.life(), Life::Served);
    m.assert_data("for the pod");
}

/// A pod that goes does not wait for another one that still holds files on the failed device.
#[test]
fn a_pod_leaves_a_failed_device_that_another_one_still_holds() {
    let m = Machine::new(DIRECT);
    m.attach_with_two_pods();
    m.host.kill_zerofs();
    m.let_other_pod_hold();
    for _ in 0..2 {
        assert_eq!(m.recover().unwrap_err().kind(), Kind::Busy);
        m.unpublish("/pod").unwrap();
    }
    m.host.set_users(vec![]);
    m.recover().unwrap();
    m.assert_data("once nobody holds it");
    assert_eq!(m.host.mounted_at(), ["/a", "/other"]);
    m.detach().unwrap();
    m.assert_empty("after detach");
}

/// A filesystem that was told of an error is never mounted again beside those who still hold it.
#[test]
fn a_pod_that_leaves_a_harmed_filesystem_does_not_end_its_clear_up() {
    let m = Machine::new(NBD);
    m.attach_with_two_pods();
    m.host.kill_keeper();
    m.host.time_out();
    m.let_other_pod_hold();
    assert_eq!(m.recover().unwrap_err().kind(), Kind::Busy);
    assert_eq!(m.unpublish("/pod").unwrap_err().kind(), Kind::Busy);
    assert_eq!(m.recover().unwrap_err().kind(), Kind::Busy);
    m.host.set_users(vec![]);
    m.unpublish("/pod").unwrap();
    m.recover().unwrap();
    m.assert_data("mounted anew");
    assert_eq!(m.host.mounted_at(), ["/a", "/other"]);
    m.detach().unwrap();
    m.assert_empty("after detach");
}

/// A detach that waits for another pod has taken this one's place away already.
#[test]
fn a_pod_leaves_while_a_detach_waits_for_another_one() {
    let m = Machine::new(DIRECT);
    m.attach_with_two_pods();
    m.host.kill_zerofs();
    m.let_other_pod_hold();
    assert_eq!(m.detach().unwrap_err().kind(), Kind::Busy);
    m.unpublish("/pod").unwrap();
    m.host.set_users(vec![]);
    m.detach().unwrap();
    m.assert_empty("after detach");
}

/// The kernel has taken the mount out of its table, and still waits for the storage.
#[test]
fn an_unmount_that_was_given_up_is_waited_for_and_ends_by_force() {
    for (made, forced) in [(FUSE, false), (FUSE, true), (NBD, false), (NBD, true)] {
        let m = Machine::new(made);
        m.attach("/a").unwrap();
        m.host.write(1);
        m.host.let_last_writes_stick();
        m.host.set_store_away(true);
        assert_eq!(m.detach().unwrap_err().step(), Some("unmount"));
        assert!(!m.host.leftovers().contains(&"mount"));
        let again = m.detach().unwrap_err();
        assert_eq!((again.kind(), again.step()), (Kind::Interrupted, Some("disconnect")), "{again}");
        assert!(m.attach("/a").is_err(), "it is mounted while it is unmounted");
        assert!(m.host.leftovers().contains(&"device"));
        if forced {
            m.host.set_force(true);
            assert_eq!(m.detach().unwrap_err().step(), Some("stop"));
            let left = m.host.leftovers();
            assert!(!left.contains(&"device") && left.contains(&"log"), "{left:?}");
        }
        m.host.set_store_away(false);
        m.detach().unwrap();
        m.assert_empty("once the store is back");
        m.attach("/a").unwrap();
        m.assert_data("nothing that was acknowledged is lost");
    }
}

#[test]
fn a_device_without_keeper_and_server_is_detached_by_force_only() {
    let m = Machine::new(NBD);
    m.attach("/a").unwrap();
    m.host.write(1);
    m.host.kill_keeper();
    m.host.set_store_away(true);
    assert!(m.watch().is_err(), "no keeper can start");
    assert_eq!(m.detach().unwrap_err().kind(), Kind::Interrupted);
    m.host.set_force(true);
    assert_eq!(m.detach().unwrap_err().step(), Some("stop"));
    assert!(!m.host.leftovers().contains(&"nbd"));
    m.host.set_store_away(false);
    m.detach().unwrap();
    m.attach("/a").unwrap();
    m.assert_data("nothing that was acknowledged is lost");
}

#[test]
fn the_transport_that_was_picked_is_a_fact_and_another_one_is_a_conflict() {
    let m = Machine::new((Transport::Auto, IoPath::Guarded));
    let run = ops::attach::attach(&m.engine(), m.run_dir.path(), &m.spec("/a")).unwrap();
    assert_eq!(run.facts.transport, Some(Transport::Nbd));
    assert_eq!(run.facts.path, Some(IoPath::Guarded));
    for made in [FUSE, DIRECT] {
        let (transport, path) = made;
        let spec = AttachSpec { transport, path, ..m.spec("/b") };
        let error = ops::attach::attach(&m.engine(), m.run_dir.path(), &spec).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict, "{error}");
    }
    m.detach().unwrap();
    m.assert_empty("after detach");
}

#[test]
fn a_transport_that_cannot_work_fails_before_anything_is_begun() {
    let m = Machine { host: FakeHost::new(), ..Machine::new(NBD) };
    assert_eq!(m.attach("/a").unwrap_err().kind(), Kind::Environment);
    assert_eq!(m.host.instants(), 0, "something was changed");
    m.assert_empty("after the refusal");
    let m = Machine { host: FakeHost::new(), ..Machine::new((Transport::Auto, IoPath::Guarded)) };
    let run = ops::attach::attach(&m.engine(), m.run_dir.path(), &m.spec("/a")).unwrap();
    assert_eq!(run.facts.transport, Some(Transport::Fuse));
}

#[test]
fn a_mount_of_something_else_at_the_target_is_left_alone() {
    let m = Machine::new(FUSE);
    m.host.mount_foreign("/a");
    assert_eq!(m.attach("/a").unwrap_err().kind(), Kind::Busy);
    m.assert_empty("after the refusal");
}

#[test]
fn a_volume_never_shrinks() {
    let m = Machine::new(FUSE);
    m.attach("/a").unwrap();
    m.resize(3).unwrap();
    let error = m.resize(2).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    m.detach().unwrap();
    m.assert_empty("after a refused shrink");
}

/// What a person, a pager and a power supply may do to one volume.
#[derive(Debug, Clone)]
enum Deed {
    Attach(u8),
    Detach,
    DetachTarget(u8),
    Resize(u8),
    Fsck,
    Recover,
    Watch,
    TimeOut,
    Publish(u8),
    Unpublish(u8),
    Write,
    Flush,
    KillKeeper,
    KillZerofs,
    StoreAway(bool),
    /// A program opens a file of it, or lets go.
    Hold(bool),
    DetachByForce,
}

impl Deed {
    fn act(&self, m: &Machine) -> Result<()> {
        m.host.set_force(matches!(self, Deed::DetachByForce));
        match self {
            Deed::Attach(0) => m.attach("/a"),
            Deed::Attach(n) => m.attach(&format!("/t{n}")),
            Deed::Detach | Deed::DetachByForce => m.detach(),
            Deed::DetachTarget(0) => m.detach_target("/a"),
            Deed::DetachTarget(n) => m.detach_target(&format!("/t{n}")),
            Deed::Resize(n) => m.resize(u64::from(*n)),
            Deed::Fsck => m.fsck(),
            Deed::Recover => m.recover(),
            Deed::Watch => m.watch(),
            Deed::TimeOut => {
                m.host.time_out();
                Ok(())
            }
            Deed::Publish(n) => m.publish(&format!("/pod{n}")),
            Deed::Unpublish(n) => m.unpublish(&format!("/pod{n}")),
            Deed::Write if m.host.read().is_some() => {
                m.host.write(m.host.acknowledged().len() as u64);
                Ok(())
            }
            Deed::Flush if m.host.read().is_some() => {
                m.host.flush();
                Ok(())
            }
            Deed::Write | Deed::Flush => Ok(()),
            Deed::KillKeeper => {
                m.host.kill_keeper();
                Ok(())
            }
            Deed::KillZerofs => {
                m.host.kill_zerofs();
                Ok(())
            }
            Deed::StoreAway(away) => {
                m.host.set_store_away(*away);
                Ok(())
            }
            Deed::Hold(held) if *held && !m.host.mounted_at().is_empty() => {
                m.host.set_users(vec![User { pid: 42, name: "dd".into() }]);
                Ok(())
            }
            Deed::Hold(_) => {
                m.host.set_users(vec![]);
                Ok(())
            }
        }
    }
}

fn deeds() -> impl Strategy<Value = (Deed, Option<u64>, Option<u64>)> {
    let deed = prop_oneof![
        4 => (0..3u8).prop_map(Deed::Attach),
        2 => Just(Deed::Detach),
        1 => (0..3u8).prop_map(Deed::DetachTarget),
        1 => (1..5u8).prop_map(Deed::Resize),
        1 => Just(Deed::Fsck),
        1 => Just(Deed::Recover),
        1 => Just(Deed::Watch),
        1 => Just(Deed::TimeOut),
        2 => (0..3u8).prop_map(Deed::Publish),
        1 => (0..3u8).prop_map(Deed::Unpublish),
        4 => Just(Deed::Write),
        1 => Just(Deed::Flush),
        1 => Just(Deed::KillKeeper),
        1 => Just(Deed::KillZerofs),
        1 => Just(Deed::StoreAway(true)),
        2 => Just(Deed::StoreAway(false)),
        1 => Just(Deed::Hold(true)),
        2 => Just(Deed::Hold(false)),
        1 => Just(Deed::DetachByForce),
    ];
    let instant = || prop_oneof![3 => Just(None), 1 => (0..30u64).prop_map(Some)];
    (deed, instant(), instant())
}

fn cases() -> u32 {
    std::env::var("ZEROFSCTL_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(512)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]
    /// Any order of commands, kills, refusals and crashes: nothing acknowledged is ever lost, the model never
    /// sees a forbidden thing, and in the end a detach leaves nothing.
    #[test]
    fn random_interleavings_lose_nothing(
        story in proptest::collection::vec(deeds(), 1..25),
        made in proptest::sample::select(ALL.to_vec()),
        last_writes_stick: bool,
        mounts_take in proptest::option::of(1..40u64),
    ) {
        quiet_kills();
        let m = Machine::new(made);
        m.host.let_mounts_take(mounts_take);
        if last_writes_stick {
            m.host.let_last_writes_stick();
        }
        for (deed, kill, fail) in &story {
            m.host.kill_at(*kill);
            m.host.fail_at(*fail);
            m.killed(&|m| deed.act(m));
        }
        m.host.kill_at(None);
        m.host.fail_at(None);
        m.host.set_store_away(false);
        m.host.set_users(vec![]);
        m.recover().unwrap();
        m.attach("/end").unwrap();
        prop_assert_eq!(m.host.read(), Some(m.host.acknowledged()));
        m.detach().unwrap();
        m.assert_empty("at the end of the story");
    }
}
