//! Status: what is known about reloads, and the services that left the configuration while runs of theirs go on.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use crate::config::{self, Problems};
use crate::state::dispatcher::{Dispatcher, ServiceSettings};

/// Between the swap and the drain of a removed service's endpoints.
const REMOVAL_GRACE: Duration = Duration::from_secs(1);

/// What is known about reloads: for the admin API and metrics.
#[derive(Clone, Debug)]
pub struct ReloadStatus {
    pub generation: u64,
    /// Of the last file that was found good, also where it changed nothing.
    pub sha256: String,
    /// When this generation took effect.
    pub loaded_at: SystemTime,
    /// Why the last reload was refused; `None` after one that was not.
    pub last_error: Option<Problems>,
    /// Reloads since the start, the first load not counted.
    pub succeeded: u64,
    pub failed: u64,
    /// Every file that the last good configuration names.
    pub files: Vec<PathBuf>,
}

/// [`ReloadStatus`], shared, and the services that left the configuration while runs of theirs go on.
pub struct ReloadState {
    pub(super) status: watch::Sender<ReloadStatus>,
    removed: Mutex<Vec<Removed>>,
}

impl ReloadState {
    pub(super) fn new(status: ReloadStatus) -> ReloadState {
        ReloadState { status: watch::Sender::new(status), removed: Mutex::new(Vec::new()) }
    }

    pub fn status(&self) -> ReloadStatus {
        self.status.borrow().clone()
    }

    /// Changes after every reload, refused ones included.
    pub fn subscribe(&self) -> watch::Receiver<ReloadStatus> {
        self.status.subscribe()
    }

    /// The services that are no longer configured, but still have exchanges.
    pub fn removed_services(&self) -> Vec<(String, Arc<Dispatcher>)> {
        self.lock_removed().iter().map(|gone| (gone.config.name.clone(), Arc::clone(&gone.dispatcher))).collect()
    }

    /// Drains the endpoints of removed services, and lets go of those that nobody uses. True as [`Dispatcher::tick`].
    pub(in crate::control) fn tick_removed(&self, now: Instant) -> bool {
        let mut is_cutting = false;
        self.lock_removed().retain_mut(|gone| {
            // Not at once: a request that was routed by the snapshot before may be about to pick.
            if !gone.emptied && now.saturating_duration_since(gone.at) >= REMOVAL_GRACE {
                let config = config::Service { versions: Vec::new(), ..gone.config.clone() };
                gone.dispatcher.apply(ServiceSettings { config, targets: Vec::new(), discovered: Vec::new() }, now);
                gone.emptied = true;
            }
            is_cutting |= gone.dispatcher.tick(now);
            // Every lease holds its dispatcher, so the last reference means: no exchange left.
            !(gone.emptied && Arc::strong_count(&gone.dispatcher) == 1)
        });
        is_cutting
    }

    pub(super) fn lock_removed(&self) -> MutexGuard<'_, Vec<Removed>> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A service that left the configuration. It is kept until the last exchange lets go of its dispatcher.
pub(super) struct Removed {
    pub(super) dispatcher: Arc<Dispatcher>,
    pub(super) config: config::Service,
    pub(super) at: Instant,
    pub(super) emptied: bool,
}
