//! Store: keeps what a restart must not lose in a file (`state: {file: DIRECTORY}`): written by one thread of its own, so that
//! nobody ever waits for a disk.
//!
//! Dispatchers mark what changes ([`crate::state::changes`]). Every [`COMMIT_EVERY`] the thread takes what was marked and
//! commits it in one transaction that is on the disk (fsync) when it ends. So a crash loses what changed within that
//! time and one commit, and nothing else; what was committed is whole, whenever the crash came.

mod file;
mod slot;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tracing::{error, info, warn};

use crate::config;
use crate::ids;
use crate::metrics::StoreMetrics;
use crate::rollout::Moment;
use crate::state::changes::{Delta, exactness};
use crate::state::dispatcher::Dispatcher;
use crate::state::image::ServiceImage;
use file::StateFile;
pub use file::{Secrets, path_in};
pub use slot::{Expected, StoreSlot};

/// How often what has changed is committed.
pub const COMMIT_EVERY: Duration = Duration::from_millis(250);

/// How long a start waits for another process to close the file.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// How often it looks meanwhile.
const LOCK_LOOK_EVERY: Duration = Duration::from_millis(20);

/// After a commit that failed, the next is tried so much later.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why there is no store: a sentence that names the file and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{}: can't be used for the state: {failure}; give `state.file` a directory that longhaul may write to", .path.display())]
    Unusable { path: PathBuf, failure: String },
    #[error("{}: another process has it open (a longhaul with the same `state.file`?); end that one, or give this one a directory of its own", .0.display())]
    Locked(PathBuf),
    #[error("{}: is not what longhaul wrote, or is damaged: {failure}; restore it from a backup, or move it away to begin without pins, rollout and drains", .path.display())]
    Damaged { path: PathBuf, failure: String },
    #[error("{}: was written by a newer longhaul (format {format}); run that one, or move it away to begin without pins, rollout and drains", .path.display())]
    Newer { path: PathBuf, format: u64 },
}

/// What was in the file.
pub struct Kept {
    pub secrets: Secrets,
    /// By name.
    pub services: HashMap<String, ServiceImage>,
}

/// The open file and its thread. Dropping it without [`Store::close`] closes it, too.
pub struct Store {
    shared: Arc<Shared>,
    commands: SyncSender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    path: PathBuf,
    /// Something was marked.
    told: Arc<AtomicBool>,
    services: Mutex<Vec<KeptService>>,
    metrics: StoreMetrics,
}

struct KeptService {
    name: Arc<str>,
    /// Not more: a service that left the configuration lives as long as its exchanges.
    dispatcher: Weak<Dispatcher>,
}

enum Command {
    Close,
}

/// Opens the file of a directory, or makes both, and reads all that is kept. Waits for a moment where another process has
/// it open.
pub fn open(directory: &Path, metrics: StoreMetrics) -> Result<(Store, Kept), OpenError> {
    let path = path_in(directory);
    let (file, kept) = open_in_time(directory, &path)?;
    Ok((start(path, file, metrics)?, kept))
}

fn start(path: PathBuf, file: StateFile, metrics: StoreMetrics) -> Result<Store, OpenError> {
    metrics.keeping.set(1);
    let shared = Arc::new(Shared { path: path.clone(), told: Arc::default(), services: Mutex::default(), metrics });
    let (commands, receiver) = sync_channel(1);
    let thread = {
        let shared = Arc::clone(&shared);
        let writing = move || {
            let written = caught(|| {
                write(&shared, file, &receiver);
                Ok(())
            });
            if let Err(failure) = written {
                shared.metrics.errors.inc();
                shared.metrics.keeping.set(0);
                error!("{}: the state is not kept until the next start: {failure}", shared.path.display());
            }
        };
        let spawned = thread::Builder::new().name("store".to_owned()).spawn(writing);
        spawned.map_err(|failure| OpenError::Unusable { path, failure: failure.to_string() })?
    };
    Ok(Store { shared, commands, thread: Mutex::new(Some(thread)) })
}

/// Opens the file of a directory after the process that had it open has closed it. What is in it was told by that process
/// already, so all is to be written anew, and under the secrets that both have. Waits for the disk.
fn take_over(directory: &Path, metrics: StoreMetrics, secrets: &Secrets) -> Result<Store, OpenError> {
    let path = path_in(directory);
    let (file, _) = open_in_time(directory, &path)?;
    file.keep_secrets(secrets).map_err(|failure| OpenError::Unusable { path: path.clone(), failure })?;
    start(path, file, metrics)
}

fn open_in_time(directory: &Path, path: &Path) -> Result<(StateFile, Kept), OpenError> {
    let since = ids::now();
    let mut said = false;
    loop {
        match StateFile::open(directory, path) {
            Err(OpenError::Locked(_)) if ids::now().saturating_duration_since(since) < LOCK_TIMEOUT => {
                if !std::mem::replace(&mut said, true) {
                    info!("{}: another process has it open; waiting for up to {LOCK_TIMEOUT:?}", path.display());
                }
                thread::sleep(LOCK_LOOK_EVERY);
            }
            Err(failure) => return Err(failure),
            Ok(file) => {
                let kept = file.read()?;
                return Ok((file, kept));
            }
        }
    }
}

impl Store {
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Keeps a service from here on. `known`: what is in the file is what it goes on from; otherwise all is written anew.
    pub fn keep(&self, dispatcher: &Arc<Dispatcher>, known: bool) {
        let mut services = self.shared.services();
        if services.iter().any(|kept| kept.dispatcher.as_ptr() == Arc::as_ptr(dispatcher)) {
            return;
        }
        services.retain(|kept| kept.name != *dispatcher.name());
        services.push(KeptService { name: Arc::clone(dispatcher.name()), dispatcher: Arc::downgrade(dispatcher) });
        drop(services);
        dispatcher.keep_changes(Arc::clone(&self.shared.told), !known);
    }

    /// Services of the file that the configuration does not name: they leave it with the next commit.
    pub fn forget(&self, names: impl IntoIterator<Item = String>) {
        let mut services = self.shared.services();
        for name in
            names.into_iter().filter(|name| !services.iter().any(|kept| *kept.name == **name)).collect::<Vec<_>>()
        {
            services.push(KeptService { name: name.into(), dispatcher: Weak::new() });
            self.shared.told.store(true, Ordering::Release);
        }
    }

    /// Writes what has changed and closes the file, so that another process may open it. What changes later is not kept.
    pub fn close(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        // A thread that has ended already said why.
        let _ = self.commands.send(Command::Close);
        if thread.join().is_err() {
            error!("{}: the thread that writes it broke down; the last changes may be missing", self.path().display());
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn services(&self) -> MutexGuard<'_, Vec<KeptService>> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that was marked, by service; `None`: the service is no more.
    fn take(&self) -> Vec<(Arc<str>, Option<Delta>)> {
        let mut services = self.services();
        let dispatchers: Vec<(Arc<str>, Option<Arc<Dispatcher>>)> =
            services.iter().map(|kept| (Arc::clone(&kept.name), kept.dispatcher.upgrade())).collect();
        services.retain(|kept| kept.dispatcher.strong_count() > 0);
        drop(services);
        let taken = dispatchers.into_iter().filter_map(|(name, dispatcher)| match dispatcher {
            Some(dispatcher) => dispatcher.take_changes(ids::now()).map(|delta| (name, Some(delta))),
            None => Some((name, None)),
        });
        taken.collect()
    }

    /// After a failure nobody knows what is in the file.
    fn begin_anew(&self) {
        for dispatcher in self.services().iter().filter_map(|kept| kept.dispatcher.upgrade()) {
            dispatcher.change_whole();
        }
    }
}

/// The thread: commits until it is told to close.
fn write(shared: &Shared, file: StateFile, commands: &Receiver<Command>) {
    let mut file = Some(file);
    let mut pause = COMMIT_EVERY;
    let mut looked = ids::now();
    let mut failing = false;
    loop {
        let ends = !matches!(commands.recv_timeout(pause), Err(RecvTimeoutError::Timeout));
        // A service that is no more marks nothing, so that is looked for from time to time.
        let look = ids::now().saturating_duration_since(looked) >= RETRY_AFTER;
        pause = COMMIT_EVERY;
        if shared.told.swap(false, Ordering::AcqRel) || look || ends {
            looked = ids::now();
            match caught(|| commit(shared, &mut file)) {
                Ok(()) if failing => {
                    failing = false;
                    shared.metrics.keeping.set(1);
                    info!("{}: can be written again", shared.path.display());
                }
                Ok(()) => {}
                Err(failure) => {
                    shared.metrics.errors.inc();
                    shared.metrics.keeping.set(0);
                    if !std::mem::replace(&mut failing, true) {
                        error!(
                            "{}: the state can't be written: {failure}; the proxy goes on, and tries again every {RETRY_AFTER:?}",
                            shared.path.display()
                        );
                    }
                    shared.begin_anew();
                    pause = RETRY_AFTER;
                }
            }
        }
        if ends {
            break;
        }
    }
    if let Some(file) = file
        && let Err(failure) = caught(|| file.close())
    {
        warn!("{}: closing it failed: {failure}", shared.path.display());
    }
}

fn commit(shared: &Shared, file: &mut Option<StateFile>) -> Result<(), String> {
    let taken = shared.take();
    if taken.is_empty() {
        return Ok(());
    }
    let keys: usize = taken.iter().map(|(_, delta)| delta.as_ref().map_or(1, Delta::keys)).sum();
    shared.metrics.dirty_keys.set(keys as i64);
    let began = ids::now();
    // What failed once may fail for ever where it is open, so it is opened anew.
    let mut open = match file.take() {
        Some(file) => file,
        None => {
            let directory = shared.path.parent().unwrap_or(Path::new("."));
            StateFile::open(directory, &shared.path).map_err(|failure| failure.to_string())?
        }
    };
    if let Err(failure) = caught(|| open.write(&taken)) {
        // Where that breaks down, too, the file stays locked, which the next try says.
        let _ = caught(|| {
            drop(open);
            Ok(())
        });
        return Err(failure);
    }
    *file = Some(open);
    shared.metrics.dirty_keys.set(0);
    shared.metrics.keys_written.inc_by(keys as u64);
    shared.metrics.commit_duration_seconds.observe(ids::now().saturating_duration_since(began).as_secs_f64());
    Ok(())
}

/// The database panics where its file is not what it wrote (somebody else did, or the disk): that ends what was being
/// done, and neither this thread nor the proxy.
fn caught<T>(act: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(format!("the database broke down: {}", said.unwrap_or("it does not say why")))
    })
}

impl Kept {
    /// Takes out a service. The store knows only roughly when a session was used last; it lives as long as it may have to.
    pub fn take(&mut self, service: &config::Service) -> Option<ServiceImage> {
        let mut image = self.services.remove(&service.name)?;
        let slack = exactness(service.session.idle_timeout).as_millis() as u64;
        let now = Moment::of(ids::wall_clock());
        for pin in &mut image.pins {
            pin.used = Moment(pin.used.0 + slack).min(now);
        }
        Some(image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_with_its_words() {
        let ended = caught::<()>(|| panic!("page {} is torn", 7));
        assert_eq!(ended, Err("the database broke down: page 7 is torn".to_owned()));
        let ended = caught::<()>(|| panic!("torn"));
        assert_eq!(ended, Err("the database broke down: torn".to_owned()));
        assert_eq!(caught(|| Ok(1)), Ok(1));
    }
}
