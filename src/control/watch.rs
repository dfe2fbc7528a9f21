//! Watch: reloads when the configuration, or a file that it names, has other content than before.
//!
//! Directories are watched, not files: ConfigMaps swap a symlink and editors rename, and both leave a watched file behind.
//! Events only say when to look; what counts is the content. A slow poll finds what no event announced.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tracing::{debug, info, warn};

use crate::control::reload::hex;
use crate::control::{ReloadHandle, ReloadState};

/// A writer is taken to be done when nothing happened for so long.
const SETTLE: Duration = Duration::from_millis(200);
/// But a directory that is never quiet is looked at all the same.
const SETTLE_MAX: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_secs(10);

/// Watches until it is dropped, or until reloads are over.
pub async fn run(path: PathBuf, reload: ReloadHandle, state: Arc<ReloadState>) {
    if std::fs::metadata(&path).is_ok_and(|it| !it.is_file()) {
        info!("{} is no regular file and can be read but once: it is not watched", path.display());
        return;
    }
    let (sender, mut events) = mpsc::channel(1);
    let mut files = named_files(&path, &state);
    let mut watches = Watches::new(&files, &sender);
    let mut reloaded = state.subscribe();
    let mut seen = fingerprints(files.clone()).await;
    let loaded = Some(state.status().sha256);
    if seen.insert(path.clone(), loaded.clone()) != Some(loaded) {
        // The file changed between its first reading and now: look at once.
        let _ = sender.try_send(());
    }
    let mut poll = tokio::time::interval_at(Instant::now() + POLL, POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let polled = tokio::select! {
            _ = events.recv() => {
                settle(&mut events).await;
                false
            }
            _ = poll.tick() => true,
            changed = reloaded.changed() => {
                if changed.is_err() {
                    return;
                }
                // Somebody reloaded: other files may count now.
                let now_named = named_files(&path, &state);
                if now_named != files {
                    files = now_named;
                    let fresh = fingerprints(files.clone()).await;
                    // What was seen before stays as it was seen, else a change since then would go unnoticed.
                    seen = fresh
                        .into_iter()
                        .map(|(path, now)| {
                            let before = seen.get(&path).cloned();
                            (path, before.unwrap_or(now))
                        })
                        .collect();
                    watches.update(&files);
                }
                continue;
            }
        };
        let found = fingerprints(files.clone()).await;
        let changed = found != seen;
        seen = found;
        if changed {
            info!("the configuration or a file that it names has changed");
            // The reloader has logged what it thought of it.
            let _ = reload.reload().await;
        } else if state.status().last_error.is_some() {
            // A refused configuration may be waiting for a file that is not in the list: the list is of the good one.
            let _ = reload.retry().await;
        }
        if changed && polled {
            debug!("no event had told of the change: watching anew");
            watches = Watches::new(&files, &sender);
        } else {
            // A symlink may point into another directory now.
            watches.update(&files);
        }
    }
}

fn named_files(path: &Path, state: &ReloadState) -> BTreeSet<PathBuf> {
    let mut files: BTreeSet<PathBuf> = state.status().files.into_iter().collect();
    files.insert(path.to_owned());
    files
}

/// Waits until nothing has happened for [`SETTLE`].
async fn settle(events: &mut mpsc::Receiver<()>) {
    let quiet = async { while let Ok(Some(())) = timeout(SETTLE, events.recv()).await {} };
    let _ = timeout(SETTLE_MAX, quiet).await;
}

/// The content of each file as SHA-256 in hex; `None` where it can't be read.
type Fingerprints = BTreeMap<PathBuf, Option<String>>;

async fn fingerprints(files: BTreeSet<PathBuf>) -> Fingerprints {
    let read = move || {
        files
            .into_iter()
            .map(|path| {
                let digest = digest(&path).ok();
                (path, digest)
            })
            .collect()
    };
    // Fails only when the runtime ends, and then nobody compares any more.
    tokio::task::spawn_blocking(read).await.unwrap_or_default()
}

/// Of the whole file, in a bounded buffer.
fn digest(path: &Path) -> std::io::Result<String> {
    if !std::fs::metadata(path)?.is_file() {
        // Opening a pipe would wait for its writer.
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let mut file = std::fs::File::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match std::io::Read::read(&mut file, &mut buffer)? {
            0 => return Ok(hex(&digest.finalize())),
            count => digest.update(&buffer[..count]),
        }
    }
}

/// The directories that are watched.
struct Watches {
    /// `None` where the system has no watches to give; the poll is enough then, only slower.
    watcher: Option<RecommendedWatcher>,
    directories: BTreeSet<PathBuf>,
}

impl Watches {
    fn new(files: &BTreeSet<PathBuf>, events: &mpsc::Sender<()>) -> Watches {
        let events = events.clone();
        let on_event = move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !is_reading(event.kind)) {
                // Full means that a look is due already.
                let _ = events.try_send(());
            }
        };
        let watcher = notify::recommended_watcher(on_event)
            .inspect_err(|failure| warn!("can't watch files ({failure}): looking every {POLL:?} instead"))
            .ok();
        let mut watches = Watches { watcher, directories: BTreeSet::new() };
        watches.update(files);
        watches
    }

    fn update(&mut self, files: &BTreeSet<PathBuf>) {
        let Some(watcher) = &mut self.watcher else { return };
        let wanted = directories(files);
        for gone in self.directories.difference(&wanted) {
            // Fails where the directory itself is gone, and its watch with it.
            let _ = watcher.unwatch(gone);
        }
        let mut watched = BTreeSet::new();
        for directory in wanted {
            if self.directories.contains(&directory) {
                watched.insert(directory);
                continue;
            }
            match watcher.watch(&directory, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    watched.insert(directory);
                }
                Err(failure) => {
                    debug!("can't watch {} ({failure}): looking every {POLL:?} instead", directory.display());
                }
            }
        }
        self.directories = watched;
    }
}

/// Our own look at a file is an event, too; it must not lead to the next look.
fn is_reading(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

/// Where the files are by name, and where they are in truth.
fn directories(files: &BTreeSet<PathBuf>) -> BTreeSet<PathBuf> {
    let mut directories = BTreeSet::new();
    for file in files {
        directories.insert(directory(file));
        if let Ok(real) = file.canonicalize() {
            directories.insert(directory(&real));
        }
    }
    directories
}

fn directory(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
