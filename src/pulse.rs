//! Pulse: each thread that must never stand still shows that it turns; the watchdog looks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a thread that turns says so.
pub const BEAT: Duration = Duration::from_secs(1);

/// The pulses of all threads of a proxy.
#[derive(Default)]
pub struct Pulses {
    all: Mutex<Vec<(String, Arc<AtomicU64>)>>,
}

/// One thread's.
pub struct Pulse(Arc<AtomicU64>);

impl Pulse {
    pub fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Pulses {
    /// A thread that is watched from here on.
    pub fn join(&self, name: &str) -> Pulse {
        let count = Arc::new(AtomicU64::new(0));
        self.lock().push((name.to_owned(), Arc::clone(&count)));
        Pulse(count)
    }

    /// Every thread, and how often it has beaten.
    pub fn counts(&self) -> Vec<(String, u64)> {
        self.lock().iter().map(|(name, count)| (name.clone(), count.load(Ordering::Relaxed))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(String, Arc<AtomicU64>)>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
