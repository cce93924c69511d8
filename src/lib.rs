//! zerofsctl runs ZeroFS volumes: block devices whose data lives in S3. The program of this name is a thin rim around
//! this library, which leaves terminal, home and environment to [`cli`].
//!
//! # Five nouns
//!
//! - A **volume** is an id and a place where its data lives. What an operation wants of it is a checked value:
//!   [`ops::AttachSpec`] for an attach.
//! - A [`plan::Plan`] is the ordered list of steps that one operation on one volume takes: plain data, which is printed,
//!   written to the journal, and read back by whoever settles a run that was killed. The functions in [`ops`] that
//!   make plans look at nothing.
//! - A [`step::Step`] is one change: a name, a sentence, a probe, an apply and an undo. The enum is closed.
//! - A [`host::Host`] is everything outside the process: catalog, keeper, devices, filesystems, mounts. Its half
//!   [`host::Observe`] only looks, and a dry run gets no more. There is the real [`host::linux::LinuxHost`], and
//!   [`host::fake::FakeHost`], a model that can be killed at every instant.
//! - A [`report::Report`] is what is answered: a table, JSON, YAML, or names.
//!
//! Between them is one loop, [`run::Engine`]: it takes a plan through its steps, asks each whether it is so already,
//! writes the [`journal`] before and after each change, and undoes its own work when a step fails.
//!
//! # An attach, on the model
//!
//! ```
//! use zerofsctl::host::fake::FakeHost;
//! use zerofsctl::ops::{self, AttachSpec};
//! use zerofsctl::report::{Format, operation};
//! use zerofsctl::run::{Engine, Silent, Would};
//! use zerofsctl::values::TargetPath;
//!
//! # fn main() -> zerofsctl::error::Result<()> {
//! # let run_dir = tempfile::tempdir().unwrap();
//! # let run_dir = run_dir.path();
//! let target = TargetPath::new("/mnt/vol1".as_ref(), "/".as_ref())?;
//! let spec = AttachSpec::plain("vol1".parse()?, target, "s3://bucket/prefix".into());
//! let host = FakeHost::new();
//!
//! // The plan, and what a dry run says of it. It cannot change anything.
//! assert_eq!(spec.plan().tasks.first().unwrap().name(), "claim");
//! let lines = ops::attach::preview(&host, &spec)?;
//! assert_eq!(lines.last().unwrap().would, Would::Do);
//! assert!(host.leftovers().is_empty());
//!
//! // The run, and its report.
//! let engine = Engine { host: &host, observer: &Silent };
//! let run = ops::attach::attach(&engine, run_dir, &spec)?;
//! let text = operation::attach(&spec, &run).render(Format::Table, None)?;
//! assert!(text.starts_with("vol1 is attached at /mnt/vol1"));
//!
//! // A second time, nothing is left to do.
//! assert!(ops::attach::attach(&engine, run_dir, &spec)?.already());
//!
//! // And back.
//! let stop = Default::default();
//! ops::detach::detach(&engine, run_dir, &spec.volume, &ops::Scope::Volume, stop)?;
//! assert!(host.leftovers().is_empty());
//! # Ok(())
//! # }
//! ```
//!
//! The modules below are in reading order; ARCHITECTURE.md has the map.
#![warn(missing_docs)]

pub mod cli;
pub mod csi;
pub mod report;

pub mod watch;
pub mod gc;
pub mod ops;
pub mod run;
pub mod journal;
pub mod plan;
pub mod step;

pub mod host;
pub mod catalog;
pub mod k8s;
pub mod keeper;
pub mod zerofs;

pub mod settings;
pub mod mount_options;
pub mod password;
pub mod quantity;
pub mod values;
pub mod error;
pub mod atomic_file;
pub mod background;
pub mod file_lock;
mod apart;
