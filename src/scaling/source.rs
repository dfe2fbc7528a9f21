//! Source: reads this process's own load from its live state.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use crate::control::ReloadState;
use crate::drain::Phase;
use crate::ids::{self, RunId};
use crate::scaling::Load;
use crate::snapshot::Running;
use crate::state::dispatcher::Dispatcher;
use crate::state::status::ServiceStatus;

/// Between two looks at what everybody has to do, however much happens.
const LOOK_APART: Duration = Duration::from_millis(5);
/// Answers that wait for other work, at once.
const WAITING_MAX: usize = 64;

/// The live state of one process, as those see it who sum it up. Cheap to clone.
#[derive(Clone)]
pub struct Source {
    pub running: Arc<Running>,
    pub reload_state: Arc<ReloadState>,
    /// Names this process among the replicas; random.
    instance: Arc<str>,
    /// Places for answers that wait: they must leave room for probes on the same port.
    waiting: Arc<Semaphore>,
}

impl Source {
    pub fn new(running: Arc<Running>, reload_state: Arc<ReloadState>) -> Source {
        let waiting = Arc::new(Semaphore::new(WAITING_MAX));
        Source { running, reload_state, instance: RunId::generate().to_string().into(), waiting }
    }

    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Those of the configuration, then those that left it and still have exchanges: their runs count until they end.
    pub fn dispatchers(&self) -> Vec<Arc<Dispatcher>> {
        let snapshot = self.running.snapshot.load();
        let configured = snapshot.services.iter().map(|service| Arc::clone(&service.dispatcher));
        let removed = self.reload_state.removed_services().into_iter().map(|(_, dispatcher)| dispatcher);
        let mut all: Vec<Arc<Dispatcher>> = configured.collect();
        for dispatcher in removed {
            // A service that came back may be on both lists for a moment.
            if !all.iter().any(|known| Arc::ptr_eq(known, &dispatcher)) {
                all.push(dispatcher);
            }
        }
        all
    }

    pub fn services(&self, now: Instant) -> Vec<ServiceStatus> {
        self.dispatchers().iter().map(|dispatcher| dispatcher.status(now)).collect()
    }

    /// As [`Source::load`], but not before it is another activity than `known`, the time is over or the proxy drains.
    pub async fn load_when_changed(&self, known: &str, wait: Duration) -> Load {
        // Whoever finds no place is answered at once, and asks again.
        let Ok(_waiting) = self.waiting.try_acquire() else { return self.load(false, ids::now()) };
        let deadline = tokio::time::Instant::now() + wait;
        // That the drain begins is told once: whoever asks during it waits for other work, as ever.
        let drains_already = self.running.drain.phase() >= Phase::Announced;
        loop {
            let dispatchers = self.dispatchers();
            let mut changes: Vec<_> =
                dispatchers.iter().map(|dispatcher| Box::pin(dispatcher.work_changes())).collect();
            for change in &mut changes {
                change.as_mut().enable();
            }
            let load = self.load(false, ids::now());
            if load.activity != known || (!drains_already && self.running.drain.phase() >= Phase::Announced) {
                return load;
            }
            let changed = poll_fn(|context| {
                let mut changes = changes.iter_mut();
                if changes.any(|change| change.as_mut().poll(context).is_ready()) {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            });
            tokio::select! {
                () = changed => tokio::time::sleep(LOOK_APART).await,
                () = self.running.drain.reached(Phase::Announced), if !drains_already => {}
                () = tokio::time::sleep_until(deadline) => return load,
            }
        }
    }

    /// What this process has to do.
    pub fn load(&self, with_endpoints: bool, now: Instant) -> Load {
        Load::of(&self.instance, &self.services(now), with_endpoints)
    }
}
