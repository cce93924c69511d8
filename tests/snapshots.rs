//! What people read, as snapshots: a review then reads prose. Plans, reports in every form, errors with their hints,
//! the error table, and the config of each ZeroFS version, all on the model host. `cargo insta review` accepts a change.

use std::path::Path;
use std::time::Duration;

use insta::assert_snapshot;
use zerofsctl::error::{Error, Kind};
use zerofsctl::host::CheckResult;
use zerofsctl::host::fake::FakeHost;
use zerofsctl::host::{IoPath, StopOptions, Transport, User};
use zerofsctl::journal::{Journal, Standing};
use zerofsctl::ops::{self, AttachSpec, Scope};
use zerofsctl::report::volume::{Found, Seen, list, show};
use zerofsctl::report::{Format, Report, operation};
use zerofsctl::run::{Engine, RunReport, Silent};
use zerofsctl::values::{ByteSize, FsType, TargetPath, VolumeId};
use zerofsctl::zerofs::config::{self, Aws, ConfigInput, Lsm};
use zerofsctl::zerofs::versions::profiles;
use zeroize::Zeroizing;

// ---------------------------------------------------------------- plans and reports, on the model

struct Machine {
    host: FakeHost,
    run: tempfile::TempDir,
}

fn volume() -> VolumeId {
    "vol1".parse().unwrap()
}

fn target(path: &str) -> TargetPath {
    TargetPath::new(Path::new(path), Path::new("/")).unwrap()
}

fn spec() -> AttachSpec {
    AttachSpec::plain(volume(), target("/mnt/vol1"), "s3://bucket/prefix".into())
}

impl Machine {
    fn new() -> Machine {
        Machine { host: FakeHost::with_nbd(), run: tempfile::tempdir().unwrap() }
    }

    fn engine(&self) -> Engine<'_> {
        Engine { host: &self.host, observer: &Silent }
    }

    fn attach(&self, spec: &AttachSpec) -> Result<RunReport, Error> {
        ops::attach::attach(&self.engine(), self.run.path(), spec).map(timed)
    }

    fn detach(&self, scope: &Scope) -> Result<Option<RunReport>, Error> {
        let stop = StopOptions::default();
        let run = ops::detach::detach(&self.engine(), self.run.path(), &volume(), scope, stop)?;
        Ok(run.map(timed))
    }
}

/// The times are those of the model, which mean nothing: every step takes a fixed one instead.
fn timed(mut run: RunReport) -> RunReport {
    for (i, task) in run.tasks.iter_mut().enumerate() {
        task.elapsed = Duration::from_micros(1_500 * (i as u64 + 1));
    }
    run
}

fn forms(name: &str, report: &Report) {
    for (form, format) in [
        ("table", Format::Table),
        ("wide", Format::Wide),
        ("json", Format::Json),
        ("yaml", Format::Yaml),
        ("name", Format::Name),
    ] {
        let text = report.render(format, None).unwrap();
        if format == Format::Json {
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!((&value["schema"], &value["kind"]), (&1.into(), &report.kind.into()));
        }
        assert_snapshot!(format!("{name}-{form}"), text);
    }
}

fn preview(name: &str, operation: &'static str, lines: &[zerofsctl::run::Preview]) {
    let report = Report::of_preview(operation, &volume(), lines);
    assert_snapshot!(format!("plan-{name}"), report.render(Format::Table, None).unwrap());
}

#[test]
fn plans_of_attach() {
    let m = Machine::new();
    let show = |name: &str, spec: &AttachSpec| {
        preview(name, "attach", &ops::attach::preview(&m.host, spec).unwrap());
    };
    show("attach-new", &spec());
    show("attach-block", &AttachSpec { block: true, ..spec() });
    show("attach-read-only", &AttachSpec { read_only: true, ..spec() });
    let options = vec!["noatime".into(), "discard".into()];
    show("attach-options", &AttachSpec { fs: Some(FsType::Xfs), mount_options: options, ..spec() });
    m.attach(&spec()).unwrap();
    show("attach-again", &spec());
    show("attach-second-target", &AttachSpec { target: target("/srv/vol1"), ..spec() });
    assert_snapshot!("plan-attach-json", serde_json::to_string_pretty(&spec().plan()).unwrap());
}

#[test]
fn plans_of_the_other_operations() {
    let m = Machine::new();
    m.attach(&spec()).unwrap();
    m.attach(&AttachSpec { target: target("/srv/vol1"), ..spec() }).unwrap();
    let run = m.run.path();
    let detach = |scope: &Scope| {
        ops::detach::preview(&m.host, run, &volume(), scope, StopOptions::default()).unwrap().unwrap()
    };
    preview("detach", "detach", &detach(&Scope::Volume));
    preview("detach-one-target", "detach", &detach(&Scope::Target(target("/srv/vol1"))));
    let size = ByteSize(2 * ByteSize::GIB);
    preview("resize", "resize", &ops::resize::preview(&m.host, run, &spec(), size).unwrap());
    m.detach(&Scope::Volume).unwrap();
    let place = AttachSpec { target: target("/run/zerofsctl/volumes/vol1/grow"), ..spec() };
    preview("resize-detached", "resize", &ops::resize::preview(&m.host, run, &place, size).unwrap());
    for (name, repair, read_data) in
        [("fsck", false, None), ("fsck-repair", true, Some("1/7".parse().unwrap()))]
    {
        let fsck = ops::fsck::FsckSpec { attach: spec(), repair, read_data };
        preview(name, "fsck", &ops::fsck::preview(&m.host, run, &fsck).unwrap());
    }
}

#[test]
fn reports_of_attach_and_detach() {
    let m = Machine::new();
    forms("attach", &operation::attach(&spec(), &m.attach(&spec()).unwrap()));
    forms("attach-again", &operation::attach(&spec(), &m.attach(&spec()).unwrap()));
    let run = m.detach(&Scope::Volume).unwrap().unwrap();
    forms("detach", &Report::of_run("detach", &volume(), &run).summary("vol1 is detached"));
    let block = AttachSpec { block: true, read_only: true, target: target("/srv/disk"), ..spec() };
    let run = m.attach(&block).unwrap();
    assert_snapshot!(
        "attach-block-table",
        operation::attach(&block, &run).render(Format::Table, None).unwrap()
    );
}

#[test]
fn reports_of_fsck() {
    let m = Machine::new();
    m.attach(&spec()).unwrap();
    m.detach(&Scope::Volume).unwrap();
    let fsck = ops::fsck::FsckSpec { attach: spec(), repair: false, read_data: Some("10%".parse().unwrap()) };
    let mut run = timed(ops::fsck::fsck(&m.engine(), m.run.path(), &fsck).unwrap());
    forms("fsck-clean", &operation::fsck(&volume(), &run, false, true));
    run.facts.check = Some(CheckResult {
        clean: false,
        repaired: false,
        output: "Pass 1: Checking inodes\nInode 12 has an invalid extent\n".into(),
    });
    run.facts.unreadable = Some(vec![(1 << 20, 4096)]);
    let report = operation::fsck(&volume(), &run, false, false);
    assert_eq!(report.exit, 3);
    assert_snapshot!("fsck-faults-table", report.render(Format::Table, None).unwrap());
    run.facts.check = Some(CheckResult { clean: true, repaired: true, output: "Fixed.\n".into() });
    run.facts.unreadable = None;
    let report = operation::fsck(&volume(), &run, true, false);
    assert_eq!(report.exit, 0);
    assert_snapshot!("fsck-repaired-table", report.render(Format::Table, None).unwrap());
}

fn found(volume: &str, state: &str, reason: Option<&str>) -> Found {
    Found {
        volume: volume.parse().unwrap(),
        state: state.into(),
        reason: reason.map(str::to_owned),
        size: Some(ByteSize(10 * ByteSize::GIB)),
        fs: Some(FsType::Ext4),
        device: None,
        transport: None,
        path: None,
        reconnects: None,
        targets: vec![],
        storage_url: "s3://bucket/prefix".into(),
        epoch: Some(3),
        keeper_pid: None,
        zerofs_pid: None,
        restarts: None,
    }
}

fn attached() -> Found {
    let m = Machine::new();
    let device = m.attach(&spec()).unwrap().facts.device;
    Found {
        device,
        transport: Some(Transport::Nbd),
        path: Some(IoPath::Guarded),
        reconnects: Some(2),
        targets: vec!["/mnt/vol1".into(), "/srv/vol1".into()],
        keeper_pid: Some(4711),
        zerofs_pid: Some(4712),
        restarts: Some(1),
        ..found("vol1", "attached", None)
    }
}

#[test]
fn reports_of_list() {
    forms("list-empty", &list(&[]));
    forms(
        "list",
        &list(&[
            attached(),
            found("vol2", "broken", Some("its keeper is gone; run: zerofsctl recover vol2")),
            Found {
                transport: Some(Transport::Nbd),
                path: Some(IoPath::Direct),
                reconnects: Some(0),
                ..found(
                    "vol5",
                    "broken",
                    Some(
                        "its device has failed: its ZeroFS was killed by SIGKILL; run: zerofsctl recover vol5",
                    ),
                )
            },
            found("vol3", "elsewhere", Some("attached by node b (state folder /var/lib/zerofsctl)")),
            Found { fs: None, ..found("vol4", "released", None) },
        ]),
    );
}

#[test]
fn reports_of_show() {
    let m = Machine::new();
    m.attach(&spec()).unwrap();
    let mut runs = Journal::peek(m.run.path(), &volume()).unwrap().unwrap();
    assert!(Standing::of(&runs).claimed);
    for run in &mut runs {
        run.at = "2026-01-02T03:04:05Z".parse().unwrap();
    }
    let status = serde_json::json!({
        "volume": "vol1", "keeper": {"pid": 4711, "start": 1, "boot": "b"},
        "zerofs": {"pid": 4712, "start": 2, "boot": "b"}, "zerofs_version": "0.19.1", "state": "ready",
        "reason": null, "error": null, "state_seconds": 60.0, "restarts": 1, "epoch": 3, "data_path": true,
        "size": 10u64 << 30, "log": {"state": "clean"}, "fuse_mounted": false,
        "nbd": {"index": 0, "path": "guarded", "read_only": false, "connected": true, "connections": 4,
            "reconnect_timeout_ms": 600000, "reconnects": 2, "dead_connections": 4, "failed": null},
        "stats": zerofsctl::keeper::path::Stats::default(), "warnings": ["something to know"],
    });
    let record = serde_json::json!({
        "id": "vol1", "capacity": 10u64 << 30, "filesystem": "ext4", "created": "2026-01-02T03:04:05Z",
        "zerofs_version": "0.19.1", "content": "formatted", "epoch": 3, "state": "ready",
        "owner": {"node": "a", "machine_id": "m", "boot_id": "b", "instance": "i",
            "state_dir": "/var/lib/zerofsctl", "run_dir": "/run/zerofsctl", "since": "2026-01-02T03:04:05Z"},
    });
    let seen = Seen {
        store: "s3://bucket/prefix/vol1".into(),
        found: attached(),
        record: Some(serde_json::from_value(record).unwrap()),
        status: Some(serde_json::from_value(status).unwrap()),
        runs,
        run_folder: "/run/zerofsctl/volumes/vol1".into(),
        logs: "/var/lib/zerofsctl/logs/vol1".into(),
    };
    forms("show", &show(&seen));
    let gone = Seen { found: found("vol1", "released", None), status: None, runs: vec![], ..seen };
    assert_snapshot!("show-released-table", show(&gone).render(Format::Table, None).unwrap());
}

#[test]
fn a_narrow_terminal_breaks_lines_between_words() {
    let m = Machine::new();
    let report = operation::attach(&spec(), &m.attach(&spec()).unwrap());
    let text = report.render(Format::Table, Some(80)).unwrap();
    assert!(text.lines().skip(1).all(|l| l.chars().count() <= 80), "{text}");
    assert_snapshot!("attach-80-columns", text);
}

// ---------------------------------------------------------------- errors

#[test]
fn the_error_table() {
    let mut text = String::from("kind         exit  gRPC  label        retryable\n");
    for kind in Kind::ALL {
        let row = kind.row();
        text += &format!(
            "{:<12} {:>4}  {:>4}  {:<12} {}\n",
            format!("{kind:?}"),
            row.exit,
            row.grpc,
            row.label,
            row.retryable
        );
    }
    assert_snapshot!(text);
}

/// As the program prints them.
fn printed(what: &str, error: &Error) -> String {
    let hint = error.hint_text().unwrap_or_else(|| panic!("no hint: {error}"));
    format!("# {what}\nerror: {error}\nhint: {hint}\n[{}]\n\n", error.kind().row().exit)
}

#[test]
fn errors_of_operations() {
    let mut text = String::new();
    let mut note = |what: &str, error: Error| text += &printed(what, &error);

    let m = Machine::new();
    m.host.mount_foreign("/mnt/other");
    let other = AttachSpec { target: target("/mnt/other"), ..spec() };
    note("a target where something is mounted", m.attach(&other).unwrap_err());
    let read_only = AttachSpec { read_only: true, ..spec() };
    note("a read-only attach of a volume that does not exist", m.attach(&read_only).unwrap_err());

    m.attach(&AttachSpec { size: Some(ByteSize(ByteSize::GIB)), ..spec() }).unwrap();
    let size = |n| AttachSpec { size: Some(ByteSize(n * ByteSize::GIB)), ..spec() };
    note("a larger size than it has", m.attach(&size(2)).unwrap_err());
    let smaller = AttachSpec { size: Some(ByteSize(512 * ByteSize::MIB)), ..spec() };
    note("a smaller size than it has", m.attach(&smaller).unwrap_err());
    note("another filesystem", m.attach(&AttachSpec { fs: Some(FsType::Xfs), ..spec() }).unwrap_err());
    note("read-only while it is read-write", m.attach(&read_only).unwrap_err());
    let shrink = ByteSize(512 * ByteSize::MIB);
    note("shrink", ops::resize::resize(&m.engine(), m.run.path(), &spec(), shrink).unwrap_err());
    let fsck = ops::fsck::FsckSpec { attach: spec(), repair: false, read_data: None };
    note("a check while attached", ops::fsck::fsck(&m.engine(), m.run.path(), &fsck).unwrap_err());
    note("detach elsewhere", m.detach(&Scope::Target(target("/mnt/x"))).unwrap_err());
    m.host.set_users(vec![User { pid: 42, name: "postgres".into() }]);
    note("detach while in use", m.detach(&Scope::Volume).unwrap_err());
    m.host.set_users(vec![]);

    let held = Journal::open(m.run.path(), &volume()).unwrap();
    let busy = m.detach(&Scope::Volume).unwrap_err();
    let pid = format!(" (pid {})", std::process::id());
    let busy = Error::new(busy.kind(), busy.message().replace(&pid, " (pid N)"))
        .hint(busy.hint_text().unwrap())
        .on(&volume());
    note("another command at work", busy);
    drop(held);

    m.detach(&Scope::Volume).unwrap();
    m.host.fail_at(Some(3));
    let failed = m.attach(&spec()).unwrap_err().hint("none: the model failed it");
    note("a step that fails", failed);
    assert_snapshot!(text);
}

// ---------------------------------------------------------------- config.toml

#[test]
fn the_config_of_every_version() {
    let secret = |s: &str| Some(Zeroizing::new(s.to_owned()));
    let input = ConfigInput {
        storage_url: "s3://bucket/prefix/vol1".into(),
        password: Zeroizing::new("not-a-real-password".into()),
        cache_dir: "/var/lib/zerofsctl/volumes/vol1/cache".into(),
        cache_disk_gb: 1.0,
        cache_memory_gb: Some(0.25),
        device_size: 10 << 30,
        max_size_gb: None,
        lsm: Lsm {
            l0_max_ssts: Some(16),
            max_unflushed_gb: Some(1.0),
            max_concurrent_compactions: Some(8),
            flush_interval_secs: Some(30),
        },
        aws: Aws {
            endpoint: Some("https://s3.example.com".into()),
            region: Some("eu-central-1".into()),
            allow_http: None,
            access_key_id: Some("EXAMPLE".into()),
            secret_access_key: secret("not-a-real-key"),
            session_token: None,
        },
        read_only: false,
    };
    // One after the other; a version that renders as the one before it is only named.
    let (mut text, mut last) = (String::new(), String::new());
    for profile in profiles() {
        let config = config::render(&input, &profile).unwrap();
        let shown = config.replace("not-a-real-password", "[password]").replace("not-a-real-key", "[key]");
        assert!(!shown.contains("not-a-real"), "a secret stands where none is expected");
        text += &format!("######## from ZeroFS {}\n", profile.version);
        if shown == last {
            text += "as before\n\n";
        } else {
            text += &format!("{shown}\n");
            for note in config::notes(&input, &profile) {
                text += &format!("note: {note}\n");
            }
            last = shown;
        }
    }
    assert_snapshot!(text);
}

// ---------------------------------------------------------------- NBD devices

mod nbd_devices {
    use zerofsctl::host::nbd::capacity::Capacity;
    use zerofsctl::host::nbd::survey::{Connection, Device, Server, Survey};
    use zerofsctl::host::nbd::usage::{Mounted, Program, Serving};
    use zerofsctl::host::nbd::verdict::{Proof, Verdict};
    use zerofsctl::ops::nbd_gc::{Fate, GcSpec, Item, Left, Reason};
    use zerofsctl::report::nbd::{ExportInfo, changes, gc, info, list};
    use zerofsctl::zerofs::nbd::{Export, TransmissionFlags};

    use super::*;

    fn now() -> jiff::Timestamp {
        "2026-11-26T12:00:00Z".parse().unwrap()
    }

    fn device(index: u32, backend: Option<&str>, verdict: Verdict, why: &str) -> Device {
        let volume = backend.and_then(zerofsctl::host::nbd::volume_of);
        Device {
            index,
            path: format!("/dev/nbd{index}").into(),
            connection: Some(Connection {
                id: u64::from(index),
                pid: Some(4711),
                since: "2026-11-26T09:55:00Z".parse().unwrap(),
            }),
            size: ByteSize(10 * ByteSize::GIB),
            backend: backend.map(str::to_owned),
            proof: volume.as_ref().map(|_| Proof::Backend),
            server: volume.as_ref().map(|_| Server::default()),
            volume,
            mounts: vec![],
            holders: vec![],
            openers: Some(vec![]),
            verdict: Some(verdict),
            why: why.into(),
            leaked_since: None,
        }
    }

    fn devices() -> Vec<Device> {
        let answers = Server {
            keeper: Some(4711),
            answers: true,
            zerofs: Some(4712),
            state: Some("ready".into()),
            index: Some(0),
            connected: Some(true),
            reconnects: Some(2),
            dead_links: Some(2),
            elsewhere: None,
        };
        let mount = |target: &str, in_namespace_of| Mounted { target: target.into(), in_namespace_of };
        let used = Device {
            server: Some(answers.clone()),
            mounts: vec![
                mount("/mnt/vol1", None),
                mount("/mnt/vol1", Some(77)),
                mount("/data", Some(77)),
                mount("/data", Some(78)),
            ],
            ..device(0, Some("zerofs:vol1"), Verdict::OursInUse, "mounted at /mnt/vol1")
        };
        let idle = Device {
            server: Some(Server { index: Some(1), ..answers }),
            ..device(1, Some("zerofs:vol2"), Verdict::OursIdle, "its keeper answers (pid 4711)")
        };
        let leaked = Device {
            leaked_since: Some("2026-11-26T11:48:00Z".parse().unwrap()),
            ..device(
                2,
                Some("zerofs:vol3"),
                Verdict::OursLeaked,
                "no mount, no holder, nobody has it open, and nothing serves it",
            )
        };
        let foreign = Device {
            holders: vec!["dm-0".into()],
            openers: Some(vec![User { pid: 99, name: "qemu".into() }]),
            ..device(3, Some("zerofs:\u{1b}[31m"), Verdict::Foreign, "its backend identifier is not ours")
        };
        let unknown = device(
            4,
            Some("zerofs:vol5"),
            Verdict::Unknown,
            "the mounts of 3 processes may not be read: run it as root",
        );
        let mut absent = device(5, None, Verdict::Foreign, "not connected");
        (absent.connection, absent.verdict, absent.size) = (None, None, ByteSize(0));
        vec![used, idle, leaked, foreign, unknown, absent]
    }

    fn survey(devices: Vec<Device>) -> Survey {
        let connected = devices.iter().filter(|d| d.is_connected()).count() as u32;
        let capacity =
            Capacity { available: true, nbds_max: Some(16), existing: 16, connected, limit: 1 << 15 };
        Survey { devices, capacity, identifiers: true, namespaces: 3 }
    }

    #[test]
    fn lists_of_nbd_devices() {
        forms("nbd-list", &list(&survey(devices()), false, now()));
        assert_eq!(list(&survey(devices()), true, now()).exit, 3);
        assert_eq!(list(&survey(devices()[..2].to_vec()), true, now()).exit, 0);
        let show = |name: &str, survey: &Survey| {
            assert_snapshot!(
                format!("nbd-list-{name}"),
                list(survey, true, now()).render(Format::Table, None).unwrap()
            );
        };
        show("none", &survey(vec![]));
        let none = Capacity { available: false, nbds_max: None, existing: 0, connected: 0, limit: 0 };
        show("no-module", &Survey { capacity: none, ..survey(vec![]) });
        let full = Capacity { available: true, nbds_max: Some(2), existing: 2, connected: 2, limit: 2 };
        let old = Survey { identifiers: false, capacity: full, ..survey(devices()[..2].to_vec()) };
        show("old-kernel-and-full", &old);
        let run_dir = "/elsewhere/volumes/vol1".into();
        let elsewhere = Some(Serving { program: Program::Keeper, pid: 200, run_dir });
        let server = Some(Server { elsewhere, ..Server::default() });
        show("elsewhere", &survey(vec![Device { server, ..devices()[0].clone() }]));
    }

    #[test]
    fn collections_of_nbd_devices() {
        let spec = GcSpec { older_than: Duration::from_secs(300), pause: Duration::from_secs(1) };
        let with = |leak: Fate, left: Left| -> Vec<Item> {
            devices()[..5]
                .iter()
                .map(|d| match d.verdict {
                    Some(Verdict::OursLeaked) => {
                        Item { device: d.clone(), fate: leak.clone(), left: Some(left.clone()) }
                    }
                    _ => Item { device: d.clone(), fate: Fate::Kept(Reason::new(&d.why)), left: None },
                })
                .collect()
        };
        forms("nbd-gc-plan", &gc(&with(Fate::Would, Left::Maybe), spec, false, now()));
        let show = |name: &str, items: &[Item], exit: u8| {
            let report = gc(items, spec, true, now());
            assert_eq!(report.exit, exit, "{name}");
            assert_snapshot!(format!("nbd-gc-{name}"), report.render(Format::Table, None).unwrap());
        };
        show("done", &with(Fate::Disconnected, Left::Entries(7)), 0);
        let void = Left::Void("it is from before the last reboot".into());
        show("done-void-log", &with(Fate::Disconnected, void), 0);
        let damaged = with(Fate::Disconnected, Left::Damaged("its header is damaged".into()));
        show("done-damaged-log", &damaged, 0);
        let slow = Error::failed("/dev/nbd2 is not free 10 s after the disconnect")
            .hint("see who holds it: fuser -v /dev/nbd2; then run the same command again");
        show("failed", &with(Fate::Failed(slow.clone().into()), Left::Nothing), 1);
        let json = gc(&with(Fate::Failed(slow.clone().into()), Left::Nothing), spec, true, now());
        let failed = &json.data["devices"][2]["fate"];
        assert_eq!((&failed["why"], &failed["hint"]), (&slow.message().into(), &slow.hint_text().into()));
        let busy = Error::new(Kind::Busy, "another command is at work on it (pid 4711)")
            .hint("wait for it, or see what it does: zerofsctl show vol3");
        show("busy", &with(Fate::Kept(busy.into()), Left::Maybe), 0);
        show("nothing", &[], 0);
    }

    /// A leak that is only too young, until then.
    fn young(due_at: &str) -> Item {
        let due_at = Some(due_at.parse().unwrap());
        let reason = Reason::new("leaked, but known so for 12s only, and 5m are asked for");
        Item { device: devices()[2].clone(), fate: Fate::Kept(Reason { due_at, ..reason }), left: None }
    }

    #[test]
    fn young_leaks_say_when_to_come_back() {
        let spec = GcSpec { older_than: Duration::from_secs(300), pause: Duration::from_secs(1) };
        let table = |items: &[Item], done| {
            let report = gc(items, spec, done, now());
            assert_eq!(report.exit, 0);
            report.render(Format::Table, None).unwrap()
        };
        let one = young("2026-11-26T12:04:48Z");
        assert_snapshot!("nbd-gc-young", table(std::slice::from_ref(&one), true));
        // Whoever comes back when he was told must not come too early.
        let (sooner, over) = (young("2026-11-26T12:01:09.2Z"), young("2026-11-26T11:59:59Z"));
        assert_snapshot!("nbd-gc-young-ones", table(&[one.clone(), sooner], false));
        assert!(table(&[over], false).contains("known for 5m of 5m; run again in 0s"));
        let json = gc(&[one], spec, false, now()).render(Format::Json, None).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["data"]["devices"][0]["fate"]["due_at"], "2026-11-26T12:04:48Z");
    }

    #[test]
    fn what_an_nbd_server_has() {
        let export = |name: &str, flags: u16, block_status: bool| ExportInfo {
            name: name.into(),
            export: Export {
                size: 3 << 30,
                flags: TransmissionFlags::new(flags),
                min_block: 1,
                preferred_block: 4096,
                max_block: 32 << 20,
            },
            block_status,
        };
        let socket = Path::new("/run/zerofsctl/volumes/vol1/nbd.sock");
        forms("nbd-info", &info(socket, true, true, &[export("disk", 0x16d, false), export("", 3, true)]));
        assert_snapshot!(
            "nbd-info-none",
            info(socket, true, false, &[]).render(Format::Table, None).unwrap()
        );
    }

    #[test]
    fn changes_of_nbd_devices() {
        let before = devices();
        let mut after = devices();
        // One is connected anew, one grew, one became idle, one is gone, one has come.
        after[0].connection.as_mut().unwrap().id = 77;
        after[1].size = ByteSize(20 * ByteSize::GIB);
        after[2].verdict = Some(Verdict::OursIdle);
        after[2].why = "its keeper answers (pid 4800)".into();
        after.remove(3);
        after[4] = device(5, Some("nbdkit"), Verdict::Foreign, "its backend identifier is not ours");
        let mut all = changes(&before, &after);
        all.push(zerofsctl::report::nbd::Change::LinkDead { index: 1 });
        assert!(changes(&after, &after).is_empty());
        let lines = |json| all.iter().map(|c| c.line(now(), json) + "\n").collect::<String>();
        assert_snapshot!("nbd-watch", lines(false));
        for line in lines(true).lines() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!((&value["schema"], &value["kind"]), (&1.into(), &"nbd-change".into()));
        }
        assert_snapshot!("nbd-watch-json", lines(true));
    }
}
