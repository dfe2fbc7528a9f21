//! Worker: one thread with a runtime of its own; what its connections share without locks.

use std::cell::RefCell;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::{ArcSwap, Cache};
use tokio::sync::mpsc;

use crate::config;
use crate::drain::Phase;
use crate::net::listen::Accepted;
use crate::proxy::connection;
use crate::proxy::pool::Pool;
use crate::pulse::{BEAT, Pulse};
use crate::snapshot::{Listener, Running, Service, Snapshot};

/// Accepted sockets that may wait for a worker before the accept loop waits for it.
const HANDED_OVER_MAX: usize = 1024;

/// What the connections of one worker share.
pub struct Worker {
    pub running: Arc<Running>,
    pub pool: Pool,
    pub load: Arc<AtomicUsize>,
    newest: RefCell<Newest>,
}

/// Shared by the exchanges of one worker. What all workers share is counted by atomic operations on memory that goes to
/// and fro between cores; a request would need a dozen of those.
pub type Local<T> = Rc<Arc<T>>;

/// A snapshot as one worker's exchanges share it. Long streams keep what they need of it, not the whole.
pub struct Current {
    pub snapshot: Arc<Snapshot>,
    listeners: Vec<Local<Listener>>,
    /// In the order of [`Snapshot::services`].
    pub services: Vec<Local<Service>>,
}

/// The newest snapshot that the worker has seen.
struct Newest {
    published: Cache<Published, Arc<Snapshot>>,
    current: Rc<Current>,
}

/// Where new snapshots appear.
struct Published(Arc<Running>);

impl Deref for Published {
    type Target = ArcSwap<Snapshot>;

    fn deref(&self) -> &ArcSwap<Snapshot> {
        &self.0.snapshot
    }
}

impl Current {
    fn new(snapshot: &Arc<Snapshot>) -> Rc<Current> {
        Rc::new(Current {
            snapshot: snapshot.clone(),
            listeners: snapshot.listeners.iter().cloned().map(Rc::new).collect(),
            services: snapshot.services.iter().cloned().map(Rc::new).collect(),
        })
    }

    /// As [`Snapshot::listener`].
    pub fn listener(&self, local_address: &config::Address) -> Option<Local<Listener>> {
        self.listeners.iter().find(|listener| listener.local_address == *local_address).cloned()
    }
}

impl Worker {
    fn new(running: Arc<Running>, load: Arc<AtomicUsize>) -> Worker {
        let mut published = Cache::new(Published(running.clone()));
        let current = Current::new(published.load());
        Worker { running, pool: Pool::default(), load, newest: RefCell::new(Newest { published, current }) }
    }

    /// The newest snapshot.
    pub fn current(&self) -> Rc<Current> {
        let Newest { published, current } = &mut *self.newest.borrow_mut();
        let newest = published.load();
        if !Arc::ptr_eq(newest, &current.snapshot) {
            *current = Current::new(newest);
        }
        current.clone()
    }
}

/// The accept loop's view of a worker.
pub struct WorkerHandle {
    sockets: mpsc::Sender<Handed>,
    /// Its open connections and exchanges.
    load: Arc<AtomicUsize>,
}

/// An accepted socket on its way to a worker.
pub struct Handed {
    pub accepted: Accepted,
    pub listener: Arc<Listener>,
    pub load: Load,
}

/// One connection or exchange of a worker's load, as long as it lives.
pub struct Load(Arc<AtomicUsize>);

impl Load {
    pub fn new(load: &Arc<AtomicUsize>) -> Load {
        load.fetch_add(1, Ordering::Relaxed);
        Load(load.clone())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl WorkerHandle {
    pub fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Hands a socket over; waits while the worker has too many to begin with.
    pub async fn serve(&self, accepted: Accepted, listener: Arc<Listener>) {
        // Fails only when the worker has ended, and with it the proxy.
        // Counted from here on, so that a burst is spread before the first of it is served.
        let _ = self.sockets.send(Handed { accepted, listener, load: Load::new(&self.load) }).await;
    }
}

/// Starts a worker thread. It ends at [`Phase::Forced`].
pub fn start(index: usize, running: Arc<Running>) -> std::io::Result<(WorkerHandle, std::thread::JoinHandle<()>)> {
    let (sender, receiver) = mpsc::channel(HANDED_OVER_MAX);
    let load = Arc::new(AtomicUsize::new(0));
    let handle = WorkerHandle { sockets: sender, load: load.clone() };
    let name = format!("worker-{index}");
    let pulse = running.pulses.join(&name);
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default());
        match runtime {
            Ok(runtime) => runtime.block_on(work(running, load, receiver, pulse)),
            Err(error) => tracing::error!("worker {index} could not start: {error}"),
        }
    })?;
    Ok((handle, thread))
}

/// Starts a worker on this thread. What it began goes on after [`Phase::Forced`] until the thread's runtime ends.
#[cfg(feature = "simulation")]
pub fn start_here(index: usize, running: Arc<Running>) -> WorkerHandle {
    let (sender, receiver) = mpsc::channel(HANDED_OVER_MAX);
    let load = Arc::new(AtomicUsize::new(0));
    let pulse = running.pulses.join(&format!("worker-{index}"));
    tokio::task::spawn_local(work(running, load.clone(), receiver, pulse));
    WorkerHandle { sockets: sender, load }
}

async fn work(running: Arc<Running>, load: Arc<AtomicUsize>, mut sockets: mpsc::Receiver<Handed>, pulse: Pulse) {
    let worker = Rc::new(Worker::new(running, load));
    let sweeper = worker.clone();
    tokio::task::spawn_local(async move {
        let mut interval = tokio::time::interval(BEAT);
        loop {
            interval.tick().await;
            pulse.beat();
            sweeper.pool.sweep(crate::ids::now());
            // A worker without requests must not keep an old snapshot either.
            sweeper.current();
        }
    });
    let drain = worker.running.drain.clone();
    let forced = drain.reached(Phase::Forced);
    tokio::pin!(forced);
    loop {
        tokio::select! {
            biased;
            () = &mut forced => return,
            socket = sockets.recv() => match socket {
                Some(handed) => {
                    tokio::task::spawn_local(connection::serve(worker.clone(), handed));
                }
                // The accept loop has ended; open connections go on until they are done or forced to end.
                None => {
                    forced.as_mut().await;
                    return;
                }
            },
        }
    }
}
