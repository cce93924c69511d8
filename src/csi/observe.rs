//! Steps of operations, as logs and metrics tell of them.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Driver, Job};
use crate::error::Error;
use crate::journal::Outcome;
use crate::plan::{Plan, Task};
use crate::run::Observer;

/// Watches one call.
pub(super) struct Watcher<'a> {
    pub driver: &'a Driver,
    pub job: &'a Job,
}

impl Observer for Watcher<'_> {
    fn settled(&self, plan: &Plan, task: &Task, outcome: Outcome, elapsed: Duration) {
        let Job { rpc, request, .. } = self.job;
        self.driver.metrics.observe(*rpc, task.name(), elapsed);
        let milliseconds = elapsed.as_secs_f64() * 1e3;
        tracing::debug!(volume = %plan.volume, rpc = rpc.name(), request, step = task.name(), ?outcome, milliseconds,
            "{}", task.step.describe(task.direction));
    }

    fn failed(&self, plan: &Plan, task: &Task, error: &Error) {
        let Job { rpc, request, .. } = self.job;
        self.driver.metrics.failed(*rpc, task.name());
        tracing::warn!(volume = %plan.volume, rpc = rpc.name(), request, step = task.name(), "{}", error.message());
    }

    fn note(&self, text: &str) {
        let Job { rpc, request, volume } = self.job;
        tracing::info!(%volume, rpc = rpc.name(), request, "{text}");
    }

    fn interrupted(&self) -> bool {
        self.driver.interrupt.load(Ordering::Relaxed)
    }
}
