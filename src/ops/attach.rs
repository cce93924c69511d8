//! attach: from a volume's name to a mounted filesystem, or a raw device.

use super::*;
use std::time::Duration;

use crate::host::{KeeperOptions, RECONNECT_TIMEOUT, StopOptions};

/// What to attach, where and how. Every value is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachSpec {
    /// Which volume.
    pub volume: VolumeId,
    /// Where it appears.
    pub target: TargetPath,
    /// Where its data lives.
    pub storage_url: String,
    /// None takes what the volume has, or 1Gi for a new one.
    pub size: Option<ByteSize>,
    /// None takes what the volume has, or ext4 for a new one.
    pub fs: Option<FsType>,
    /// For mount(8).
    pub mount_options: Vec<String>,
    /// Neither formats, nor repairs, nor writes.
    pub read_only: bool,
    /// Hands out the device itself, linked at the target.
    pub block: bool,
    /// How the device is made.
    pub transport: Transport,
    /// Where the kernel's NBD connections end.
    pub path: IoPath,
    /// How long the kernel holds I/O while no keeper serves an NBD device.
    pub reconnect_timeout: Duration,
    /// Take the volume from an owner that is gone for good.
    pub take_over: bool,
    /// For the keeper.
    pub keeper: KeeperOptions,
    /// For the stop of an attach that fails, and of a later detach.
    pub stop: StopOptions,
}

impl AttachSpec {
    /// A read-write mount with every default.
    pub fn plain(volume: VolumeId, target: TargetPath, storage_url: String) -> AttachSpec {
        AttachSpec {
            volume,
            target,
            storage_url,
            size: None,
            fs: None,
            mount_options: Vec::new(),
            read_only: false,
            block: false,
            transport: Transport::default(),
            path: IoPath::default(),
            reconnect_timeout: RECONNECT_TIMEOUT,
            take_over: false,
            keeper: KeeperOptions::default(),
            stop: StopOptions::default(),
        }
    }

    /// The plan. Pure: it looks at nothing.
    pub fn plan(&self) -> Plan {
        let mut tasks = prepare(self);
        let place = if self.block {
            Task::apply(step::Link { target: self.target.clone(), read_only: self.read_only }.into())
        } else {
            tasks.push(Task::apply(step::ProbeSignature {}.into()));
            tasks.push(Task::apply(step::Format { read_only: self.read_only }.into()));
            tasks.push(Task::apply(step::Preen { read_only: self.read_only }.into()));
            let (options, read_only) = (self.mount_options.clone(), self.read_only);
            Task::apply(step::Mount { target: self.target.clone(), options, read_only }.into())
        };
        tasks.push(place);
        Plan { operation: Operation::Attach, volume: self.volume.clone(), tasks }
    }
}

/// The steps up to the device, which fsck shares.
pub(super) fn prepare(spec: &AttachSpec) -> Vec<Task> {
    [
        step::Claim {
            storage_url: spec.storage_url.clone(),
            size: spec.size,
            fs: spec.fs,
            block: spec.block,
            must_exist: spec.read_only,
            take_over: spec.take_over,
        }
        .into(),
        step::WriteConfig {}.into(),
        step::Start { options: spec.keeper.clone(), stop: spec.stop }.into(),
        step::CreateDisk {}.into(),
        step::Replay {}.into(),
        step::Connect {
            transport: spec.transport,
            read_only: spec.read_only,
            path: spec.path,
            reconnect_timeout: spec.reconnect_timeout,
        }
        .into(),
    ]
    .into_iter()
    .map(Task::apply)
    .collect()
}

/// Refuses a target that cannot be right before anything is begun: nobody wants a volume made and formatted for a
/// typing error. The last step looks again, closer.
fn check_target(host: &dyn crate::host::Observe, spec: &AttachSpec) -> Result<()> {
    use crate::host::TargetView;
    let device = host.device(&spec.volume)?.device.map(|d| d.path);
    let target = &spec.target;
    let error = match host.target(target)? {
        TargetView::Missing => return Ok(()),
        TargetView::Other { link: Some(to) } if spec.block && Some(&to) == device.as_ref() => return Ok(()),
        _ if spec.block => step::target::occupied(target),
        TargetView::EmptyFolder => return Ok(()),
        TargetView::FullFolder => step::target::not_empty(target),
        TargetView::Other { .. } => step::target::not_a_folder(target),
        TargetView::MountPoint(entry) => match device {
            Some(device) if Path::new(&entry.source) == device => return Ok(()),
            _ => step::target::mounted(target, &entry),
        },
    };
    Err(error.on(&spec.volume))
}

/// What `prepare` made, taken down again.
pub(super) fn takedown(prepared: &[Task]) -> Vec<Task> {
    prepared
        .iter()
        .rev()
        .filter(|t| {
            matches!(t.step, Step::Connect(_) | Step::Start(_) | Step::WriteConfig(_) | Step::Claim(_))
        })
        .map(|t| Task::undo(t.step.clone()))
        .collect()
}

/// Attaches; a second time it is `already`, and at another target it is a second mount.
pub fn attach(engine: &Engine<'_>, run_dir: &Path, spec: &AttachSpec) -> Result<RunReport> {
    let plan = spec.plan();
    let mut journal = open(engine, run_dir, &spec.volume)?;
    let result = (|| {
        revive(engine, &spec.volume)?;
        engine.settle(&mut journal, Some(&plan))?;
        // A resumed run takes care of itself; the probes of its steps find a dead device.
        clear_wreck_of_resumed(engine, &mut journal, &spec.volume)?;
        if journal.open_run().is_none() {
            // It comes back with all that it had: this target may be one of several.
            if journal.standing().awaited.is_some() {
                engine.observer.note("it was attached here before its device died: that comes back first");
                super::recover::bring_back(engine, &mut journal, &spec.volume)?;
            }
            check_target(engine.host, spec)?;
            let standing = journal.standing();
            // A claim that failed would be undone, and with it what still lives here.
            if standing.claimed && !is_ours(engine, &spec.volume, &standing)? {
                return Err(Error::new(
                    Kind::Conflict,
                    "somebody else has had it since it was attached here",
                )
                .on(&spec.volume)
                .hint(format!("take down what is left of it first: zerofsctl detach {}", spec.volume)));
            }
            if standing.connect.is_none() {
                engine.host.prepare_transport(spec.transport).map_err(|e| e.on(&spec.volume))?;
            }
        }
        let facts = journal.standing().facts.carried();
        engine.run(&mut journal, plan, facts)
    })();
    journal.close()?;
    result
}

/// A wreck can also stand under an attach that was cut short: then that attach is taken back first.
fn clear_wreck_of_resumed(engine: &Engine<'_>, journal: &mut Journal, volume: &VolumeId) -> Result<()> {
    if journal.open_run().is_some() {
        let standing = journal.standing();
        if standing.connect.is_some() && engine.host.device(volume)?.life == Life::Dead {
            engine.settle(journal, None)?;
        } else {
            return Ok(());
        }
    }
    clear_wreck(engine, journal, volume).map(drop)
}

/// The dry run of an attach.
pub fn preview(host: &dyn crate::host::Observe, spec: &AttachSpec) -> Result<Vec<crate::run::Preview>> {
    check_target(host, spec)?;
    if host.device(&spec.volume)?.is_absent() {
        host.transport(spec.transport).map_err(|e| e.on(&spec.volume))?;
    }
    crate::run::preview(host, &spec.plan(), Facts::default())
}
