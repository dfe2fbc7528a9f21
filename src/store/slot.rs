//! Slot: where a process has its store. In a handover it comes after the start, when the process before has closed the
//! file, and it may be given away again before it has come: exactly one process has the file open, and whoever serves
//! last is the one that it ends with.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tracing::error;

use crate::metrics::StoreMetrics;
use crate::store::{OpenError, Secrets, Store, take_over};

/// Empty: the state is in memory alone, or the file is still another process's. Cheap to clone.
#[derive(Clone, Default)]
pub struct StoreSlot {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    open: OnceLock<Store>,
    /// Locked while the file is being opened, so that nobody gives it away or ends without it meanwhile.
    expected: Mutex<Option<Expected>>,
}

/// A file that another process has open still, and closes soon.
pub struct Expected {
    pub directory: PathBuf,
    pub metrics: StoreMetrics,
    /// Of both processes.
    pub secrets: Secrets,
}

impl StoreSlot {
    pub fn get(&self) -> Option<&Store> {
        self.inner.open.get()
    }

    /// The store of a process that takes over from nobody.
    pub fn put(&self, store: Store) {
        self.inner.open.get_or_init(|| store);
    }

    /// The store comes later: see [`StoreSlot::take_over`].
    pub fn expect(&self, expected: Expected) {
        *self.expected() = Some(expected);
    }

    /// Opens what is expected, if it still is. Waits for the disk, and a moment for another process to close the file.
    /// After an error, which is counted, it is expected still: it can be tried again.
    pub fn take_over(&self) -> Result<(), OpenError> {
        let mut expected = self.expected();
        let Some(Expected { directory, metrics, secrets }) = &*expected else { return Ok(()) };
        match take_over(directory, metrics.clone(), secrets) {
            Ok(store) => {
                self.put(store);
                *expected = None;
                Ok(())
            }
            Err(failure) => {
                metrics.errors.inc();
                Err(failure)
            }
        }
    }

    /// The next process has it from here on: closes it, with all that has changed written, or opens it never. Waits for
    /// the disk. Only to be called when the process before has closed the file, as the next one relies on that.
    pub fn give_away(&self) {
        *self.expected() = None;
        if let Some(store) = self.get() {
            store.close();
        }
    }

    /// The process ends. What another process has not released until now is waited for; `keep` names to the store what
    /// it is to write.
    pub fn end(&self, keep: impl FnOnce(&Store)) {
        if let Err(failure) = self.take_over() {
            error!("what changed since this process took over is not kept: {failure}");
        }
        if let Some(store) = self.get() {
            keep(store);
            store.close();
        }
    }

    fn expected(&self) -> MutexGuard<'_, Option<Expected>> {
        self.inner.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use crate::store::open;

    fn expecting(directory: &std::path::Path, secrets: &Secrets) -> (StoreSlot, StoreMetrics) {
        let metrics = Metrics::new().store();
        let slot = StoreSlot::default();
        let (directory, secrets) = (directory.to_owned(), secrets.clone());
        slot.expect(Expected { directory, metrics: metrics.clone(), secrets });
        (slot, metrics)
    }

    #[test]
    fn whoever_is_last_has_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let (first, kept) = open(directory.path(), Metrics::new().store()).unwrap();
        let (second, _) = expecting(directory.path(), &kept.secrets);
        let (third, _) = expecting(directory.path(), &kept.secrets);
        first.close();
        // It hands over before it has come to open it.
        second.give_away();
        second.take_over().unwrap();
        assert!(second.get().is_none());
        third.take_over().unwrap();
        assert!(third.get().is_some());
        let mut named = false;
        third.end(|_| named = true);
        assert!(named);
        open(directory.path(), Metrics::new().store()).unwrap();
    }

    #[test]
    fn an_end_waits_for_the_process_before() {
        let directory = tempfile::tempdir().unwrap();
        let (first, kept) = open(directory.path(), Metrics::new().store()).unwrap();
        let (second, metrics) = expecting(directory.path(), &kept.secrets);
        let closing = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(100));
            first.close();
        });
        let mut named = false;
        second.end(|_| named = true);
        assert!(named && metrics.errors.get() == 0);
        closing.join().unwrap();
    }
}
