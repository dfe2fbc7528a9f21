//! Pool: a worker's idle connections to endpoints. An idle connection that becomes readable was closed or is out of step,
//! and is dropped. The limits of an endpoint count the connections of all workers.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;
use tokio_util::task::AbortOnDropHandle;

use crate::net::stream::Stream;
use crate::state::Target;

/// Between the last byte of an answer, which lets the client ask again, and the moment when its connection is idle.
const JUST_ENDED: Duration = Duration::from_millis(50);

/// The idle HTTP/1.1 and the shared HTTP/2 connections of one worker, by [`Target::id`].
#[derive(Default)]
pub struct Pool {
    http1: Rc<RefCell<IdleByTarget>>,
    http2: RefCell<HashMap<u64, Vec<Multiplexed>, foldhash::fast::RandomState>>,
}

type IdleByTarget = HashMap<u64, OfTarget, foldhash::fast::RandomState>;

/// What a worker keeps of one target.
#[derive(Default)]
struct OfTarget {
    /// The one used last at the end.
    idle: Vec<Idle>,
    /// Places of connections that are in use again: the next that becomes idle takes one of them, as it would be another
    /// change, for every request, of a count that all workers change. None where places are scarce; given back by the next
    /// sweep.
    spare: Vec<IdlePlace>,
}

struct Idle {
    stream: Stream,
    place: IdlePlace,
    counted: Counted,
    since: Instant,
    /// Closes it for another worker that must not open one more; set where there is such a limit.
    _giving_way: Option<AbortOnDropHandle<()>>,
}

/// An HTTP/2 connection that several exchanges use at once.
#[derive(Clone)]
pub struct Multiplexed {
    pub sender: SendRequest<Bytes>,
    target: Arc<Target>,
    usage: Rc<Usage>,
}

struct Usage {
    streams: Cell<usize>,
    /// When a stream last began or ended.
    changed: Cell<Instant>,
}

/// One stream of a [`Multiplexed`] connection, as long as it lives.
pub struct StreamCount(Rc<Usage>);

/// Counts a connection among those of its target, as long as it lives.
pub struct Counted(Arc<Target>);

/// One of the `pool.max_idle` places of a target, as long as it lives.
struct IdlePlace(Arc<Target>);

impl Counted {
    /// Waits where `pool.max_connections` is reached until an idle connection, maybe another worker's, has given way;
    /// `None` where all are in use.
    pub async fn make_room(target: &Arc<Target>) -> Option<Counted> {
        let patience = tokio::time::Instant::from_std(crate::ids::now()) + JUST_ENDED;
        loop {
            let mut changed = pin!(target.connections_changed.notified());
            // Whatever changes from here on is noticed.
            changed.as_mut().enable();
            if let Some(counted) = Counted::open(target) {
                return Some(counted);
            }
            if target.idle_connections.load(Ordering::Relaxed) == 0 {
                tokio::time::timeout_at(patience, changed).await.ok()?;
                continue;
            }
            target.give_way.notify_one();
            changed.await;
        }
    }

    fn open(target: &Arc<Target>) -> Option<Counted> {
        let limit = target.pool.max_connections.unwrap_or(usize::MAX);
        let counted = target.connections.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |connections| {
            (connections < limit).then_some(connections + 1)
        });
        counted.is_ok().then(|| Counted(target.clone()))
    }

    pub fn target(&self) -> &Arc<Target> {
        &self.0
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
        tell(&self.0);
    }
}

impl IdlePlace {
    /// `None` where all are taken.
    fn take(target: &Arc<Target>) -> Option<IdlePlace> {
        let limit = target.pool.max_idle;
        let taken = target
            .idle_connections
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |idle| (idle < limit).then_some(idle + 1));
        taken.is_ok().then(|| {
            tell(target);
            IdlePlace(target.clone())
        })
    }

    /// Somebody may wait for what is idle, so that it matters at once who is.
    fn is_waited_for(&self) -> bool {
        self.0.pool.max_connections.is_some()
    }

    /// Nobody is likely to miss it while its connection is in use: no more than half of the places are taken.
    fn may_be_kept(&self) -> bool {
        !self.is_waited_for() && self.0.idle_connections.load(Ordering::Relaxed) <= self.0.pool.max_idle / 2
    }
}

impl Drop for IdlePlace {
    fn drop(&mut self) {
        self.0.idle_connections.fetch_sub(1, Ordering::Relaxed);
        tell(&self.0);
    }
}

/// Tells whoever waits for room. Nobody does where there is no limit; it would be a lock for every request.
fn tell(target: &Target) {
    if target.pool.max_connections.is_some() {
        target.connections_changed.notify_waiters();
    }
}

impl StreamCount {
    fn new(usage: &Rc<Usage>) -> StreamCount {
        usage.streams.set(usage.streams.get() + 1);
        StreamCount(usage.clone())
    }
}

impl Drop for StreamCount {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.changed.set(crate::ids::now());
    }
}

impl Pool {
    /// The connection used last (old ones are the likeliest to be closed), if there is one that still stands.
    pub fn take(&self, target: &Target) -> Option<(Stream, Counted)> {
        let mut http1 = self.http1.borrow_mut();
        let OfTarget { idle, spare } = http1.get_mut(&target.id)?;
        while let Some(mut connection) = idle.pop() {
            if stands(&mut connection.stream) {
                if connection.place.may_be_kept() {
                    spare.push(connection.place);
                } else {
                    spare.clear();
                }
                return Some((connection.stream, connection.counted));
            }
        }
        None
    }

    /// Keeps a connection whose last exchange left it clean.
    pub fn put(&self, stream: Stream, counted: Counted, now: Instant) {
        if counted.target().retired() {
            return;
        }
        let mut http1 = self.http1.borrow_mut();
        let target = counted.target();
        let OfTarget { idle, spare } = http1.entry(target.id).or_default();
        let Some(place) = spare.pop().or_else(|| IdlePlace::take(target)) else { return };
        let giving_way = place.is_waited_for().then(|| self.give_way(target.clone()));
        idle.push(Idle { stream, counted, place, since: now, _giving_way: giving_way });
    }

    /// Once another worker waits for room, drops the connection that is idle for longest.
    fn give_way(&self, target: Arc<Target>) -> AbortOnDropHandle<()> {
        let http1 = Rc::downgrade(&self.http1);
        AbortOnDropHandle::new(tokio::task::spawn_local(async move {
            target.give_way.notified().await;
            if let Some(http1) = http1.upgrade()
                && let Some(OfTarget { idle, .. }) = http1.borrow_mut().get_mut(&target.id)
                && !idle.is_empty()
            {
                drop(idle.remove(0));
            }
        }))
    }

    /// A connection with room for one more stream, counted at once.
    pub fn share(&self, target: &Target) -> Option<(Multiplexed, StreamCount)> {
        let mut http2 = self.http2.borrow_mut();
        let connections = http2.get_mut(&target.id)?;
        connections.retain_mut(|connection| !matches!(poll_sender(connection), Poll::Ready(Err(_))));
        let connection = connections
            .iter()
            .find(|connection| connection.usage.streams.get() < connection.sender.current_max_send_streams())?;
        Some((connection.clone(), StreamCount::new(&connection.usage)))
    }

    /// Offers a new HTTP/2 connection to all; the first stream is the caller's.
    pub fn add(&self, target: &Arc<Target>, sender: SendRequest<Bytes>) -> (Multiplexed, StreamCount) {
        let usage = Rc::new(Usage { streams: Cell::new(0), changed: Cell::new(crate::ids::now()) });
        let connection = Multiplexed { sender, target: target.clone(), usage };
        self.http2.borrow_mut().entry(target.id).or_default().push(connection.clone());
        let count = StreamCount::new(&connection.usage);
        (connection, count)
    }

    /// Drops what is idle for too long, closed by its endpoint, or of a target that was removed.
    pub fn sweep(&self, now: Instant) {
        self.http1.borrow_mut().retain(|_, OfTarget { idle, spare }| {
            spare.clear();
            idle.retain_mut(|connection| {
                let target = connection.counted.target();
                now.duration_since(connection.since) < target.pool.idle_timeout
                    && !target.retired()
                    && stands(&mut connection.stream)
            });
            !idle.is_empty()
        });
        self.http2.borrow_mut().retain(|_, connections| {
            connections.retain_mut(|connection| {
                let unused = connection.usage.streams.get() == 0;
                let idle_for = now.saturating_duration_since(connection.usage.changed.get());
                let unwanted = connection.target.retired() || idle_for >= connection.target.pool.idle_timeout;
                let broken = matches!(poll_sender(connection), Poll::Ready(Err(_)));
                !broken && (!unused || !unwanted)
            });
            !connections.is_empty()
        });
    }
}

/// Nothing has come in on it.
fn stands(stream: &mut Stream) -> bool {
    !stream.is_read_ready()
}

fn poll_sender(connection: &mut Multiplexed) -> Poll<Result<(), h2::Error>> {
    connection.sender.poll_ready(&mut Context::from_waker(Waker::noop()))
}
