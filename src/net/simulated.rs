//! Simulated: a network in memory, of which a test decides every delay and every fault.
//!
//! It is the network of the thread on which it was made, and behaves as TCP does towards those who use it:
//!
//! - What was sent comes whole, in order and once, or the connection ends with an error. What is lost on the way is sent
//!   again and only comes later.
//! - Over a link that is cut everything waits, as it does until somebody's patience ends. A reset that meets a cut link is
//!   lost for good: its peer learns of it by the answer to what it sends next.
//! - A host that loses its power says nothing. What arrives at it after it is back is answered by a reset.
//! - A socket that is closed with unread bytes resets, as does one whose closing is told to.
//! - A side that does not read holds the other one back after [`WINDOW_BYTES`].
//!
//! Everything that happens at one instant happens in the order of the connections' numbers, so that one seed is one
//! story, whatever order the product does two things in that are one to it.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

/// What may be on its way and unread in one direction of a connection.
const WINDOW_BYTES: usize = 64 * 1024;
/// Until what was lost is sent again for the first time; each further time it is twice as long.
const RESEND_AFTER: Duration = Duration::from_millis(200);
/// When what waited for a cut link is sent again after that is whole, at the latest.
const RESUME_WITHIN: Duration = Duration::from_secs(2);
/// The ports that connections come from.
const FIRST_PORT: u16 = 20_000;

/// The network. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Network(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Something was sent: the time at which [`Network::drive`] has to look again may have changed.
    changed: Notify,
}

/// How a link between two hosts is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// One way, at the least.
    pub latency: Duration,
    /// Up to so much more, anew for each segment.
    pub jitter: Duration,
    /// The part of the segments that get lost.
    pub loss: f64,
    pub passage: Passage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    Open,
    /// Everything waits, nothing is lost.
    Held,
    /// Everything is lost, and sent again when it is open.
    Cut,
}

impl Default for Link {
    fn default() -> Link {
        let millisecond = Duration::from_millis(1);
        Link { latency: millisecond, jitter: millisecond, loss: 0.0, passage: Passage::Open }
    }
}

#[derive(Debug)]
struct State {
    seed: u64,
    /// Where the product runs: whence it connects.
    product: IpAddr,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    listeners: HashMap<SocketAddr, Waiting>,
    links: HashMap<(IpAddr, IpAddr), Link>,
    /// Hosts without power.
    dark: Vec<IpAddr>,
    /// When to look at which direction of which connection.
    due: BinaryHeap<Reverse<(Instant, u64, usize)>>,
}

/// What a listener has not accepted yet.
#[derive(Debug, Default)]
struct Waiting {
    connections: VecDeque<(u64, SocketAddr)>,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Connection {
    ends: [End; 2],
    /// `ways[side]` goes from `ends[side]` to the other.
    ways: [Way; 2],
    chance: SmallRng,
}

#[derive(Debug)]
struct End {
    address: SocketAddr,
    /// Nobody holds it: it was closed, or its host has lost its power since.
    gone: bool,
    established: bool,
    received: VecDeque<u8>,
    /// The other side has sent everything.
    finished: bool,
    /// Why it broke; told once, as the system does, and the end after that.
    failure: Option<ErrorKind>,
    broken: bool,
    shut: bool,
    resets_on_close: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// Of whoever waits for the other side's end.
    watcher: Option<Waker>,
}

#[derive(Debug, Default)]
struct Way {
    segments: VecDeque<(Instant, Segment)>,
    bytes: usize,
}

#[derive(Debug)]
enum Segment {
    Syn,
    SynAck,
    Data(Vec<u8>),
    Fin,
    Reset,
}

/// A connected socket. Dropping it closes it.
#[derive(Debug)]
pub struct Stream {
    network: Network,
    connection: u64,
    side: usize,
}

/// A listening socket. Dropping it closes it; connections that it has not accepted are reset.
#[derive(Debug)]
pub struct Listener {
    network: Network,
    address: SocketAddr,
}

thread_local! {
    static CURRENT: RefCell<Option<Network>> = const { RefCell::new(None) };
}

/// The network of this thread, where it has a simulated one.
pub fn current() -> Option<Network> {
    CURRENT.with_borrow(Clone::clone)
}

/// This thread's network is the system's again.
pub fn end() {
    CURRENT.set(None);
}

impl Network {
    /// Makes this thread's network. The product's own connections come from `product`. Somebody has to
    /// [`Network::drive`] it.
    pub fn begin(seed: u64, product: IpAddr) -> Network {
        let state = State {
            seed,
            product,
            connections: BTreeMap::new(),
            next_connection: 0,
            listeners: HashMap::new(),
            links: HashMap::new(),
            dark: Vec::new(),
            due: BinaryHeap::new(),
        };
        let network = Network(Arc::new(Shared { state: Mutex::new(state), changed: Notify::new() }));
        CURRENT.set(Some(network.clone()));
        network
    }

    /// Delivers, until it is dropped.
    pub async fn drive(self) {
        loop {
            let next = self.lock().deliver(Instant::now());
            let changed = self.0.changed.notified();
            match next {
                // Either way it looks again.
                Some(at) => drop(tokio::time::timeout_at(at, changed).await),
                None => changed.await,
            }
        }
    }

    /// Listens there. As of a system: one listener an address.
    pub fn bind(&self, address: SocketAddr) -> io::Result<Listener> {
        let mut state = self.lock();
        if state.listeners.contains_key(&address) {
            return Err(ErrorKind::AddrInUse.into());
        }
        state.listeners.insert(address, Waiting::default());
        Ok(Listener { network: self.clone(), address })
    }

    /// Connects as the product does.
    pub async fn connect(&self, to: SocketAddr) -> io::Result<Stream> {
        let product = self.lock().product;
        // A process reaches what is on its own machine, wherever that is.
        self.connect_from(if to.ip().is_loopback() { to.ip() } else { product }, to).await
    }

    /// Connects from a host.
    pub async fn connect_from(&self, host: IpAddr, to: SocketAddr) -> io::Result<Stream> {
        let stream = {
            let mut state = self.lock();
            let connection = state.next_connection;
            state.next_connection += 1;
            let from = SocketAddr::new(host, FIRST_PORT.wrapping_add(connection as u16).max(1));
            let seed = state.seed ^ connection.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            // The other end is nobody's until a listener has it.
            let ends = [End::new(from), End { gone: true, ..End::new(to) }];
            let chance = SmallRng::seed_from_u64(seed);
            state.connections.insert(connection, Connection { ends, ways: Default::default(), chance });
            state.send(connection, 0, Segment::Syn);
            Stream { network: self.clone(), connection, side: 0 }
        };
        self.0.changed.notify_one();
        poll_fn(|context| {
            let mut state = self.lock();
            let end = state.end(&stream);
            match end.failure.take() {
                // Nobody listens there.
                Some(_) => Poll::Ready(Err(io::Error::from(ErrorKind::ConnectionRefused))),
                None if end.established => Poll::Ready(Ok(())),
                None => {
                    end.writer = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await?;
        Ok(stream)
    }

    /// How the link between two hosts is.
    pub fn link(&self, one: IpAddr, other: IpAddr) -> Link {
        self.lock().link(one, other)
    }

    /// Changes it. What waited goes on where it is open again.
    pub fn set_link(&self, one: IpAddr, other: IpAddr, link: Link) {
        let mut state = self.lock();
        let before = state.link(one, other);
        state.links.insert(ordered(one, other), link);
        if before.passage != Passage::Open && link.passage == Passage::Open {
            state.resume(before.passage == Passage::Cut, |from, to| ordered(from, to) == ordered(one, other));
        }
        drop(state);
        self.0.changed.notify_one();
    }

    /// Resets every connection between two hosts, as something between them may that forgets what it knew.
    pub fn reset_all(&self, one: IpAddr, other: IpAddr) {
        let mut state = self.lock();
        for connection in state.connections.values_mut() {
            if ordered(connection.ends[0].address.ip(), connection.ends[1].address.ip()) == ordered(one, other) {
                for side in 0..2 {
                    connection.ways[side] = Way::default();
                    connection.ends[side].fail(ErrorKind::ConnectionReset);
                }
            }
        }
        state.forget_ended();
    }

    /// The host stops at once and says nothing. Whoever holds sockets of it drops them: that is silent, too.
    pub fn cut_power(&self, host: IpAddr) {
        let mut state = self.lock();
        state.dark.push(host);
        for connection in state.connections.values_mut() {
            for side in 0..2 {
                if connection.ends[side].address.ip() == host {
                    connection.ends[side].gone = true;
                    connection.ends[side].fail(ErrorKind::ConnectionAborted);
                    // What has not left is lost with it.
                    connection.ways[side] = Way::default();
                }
            }
        }
    }

    /// The host is back, and knows nothing.
    pub fn restore_power(&self, host: IpAddr) {
        let mut state = self.lock();
        state.dark.retain(|dark| *dark != host);
        state.resume(true, |_, to| to == host);
        drop(state);
        self.0.changed.notify_one();
    }

    /// Connections of which the host has its end open.
    pub fn open_connections(&self, host: IpAddr) -> usize {
        let state = self.lock();
        let ends = state.connections.values().flat_map(|connection| &connection.ends);
        ends.filter(|end| end.address.ip() == host && !end.gone).count()
    }

    /// Whether the host at the other end of a connection holds its end no more, though word of that may not have come yet
    /// to the end of `side`.
    pub fn is_left(&self, connection: u64, side: usize) -> bool {
        self.lock().connections.get(&connection).is_none_or(|connection| connection.ends[1 - side].gone)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ordered(one: IpAddr, other: IpAddr) -> (IpAddr, IpAddr) {
    (one.min(other), one.max(other))
}

impl State {
    fn link(&self, one: IpAddr, other: IpAddr) -> Link {
        self.links.get(&ordered(one, other)).copied().unwrap_or_default()
    }

    /// The end of a socket that somebody holds: its connection is there as long.
    fn end(&mut self, stream: &Stream) -> &mut End {
        match self.connections.get_mut(&stream.connection) {
            Some(connection) => &mut connection.ends[stream.side],
            None => unreachable!("a connection is forgotten when both its ends are dropped"),
        }
    }

    /// Puts a segment on its way.
    fn send(&mut self, number: u64, side: usize, segment: Segment) {
        let Some(connection) = self.connections.get(&number) else { return };
        let (from, to) = (connection.ends[side].address.ip(), connection.ends[1 - side].address.ip());
        if self.dark.contains(&from) {
            return;
        }
        let link = self.link(from, to);
        let Some(connection) = self.connections.get_mut(&number) else { return };
        let chance = &mut connection.chance;
        let mut delay = link.latency + link.jitter.mul_f64(chance.random::<f64>());
        let mut again = RESEND_AFTER;
        while link.loss > 0.0 && chance.random_bool(link.loss) && again < Duration::from_secs(10) {
            if matches!(segment, Segment::Reset) {
                return;
            }
            delay += again;
            again *= 2;
        }
        let way = &mut connection.ways[side];
        let at = way.segments.back().map_or(Instant::now() + delay, |(last, _)| (Instant::now() + delay).max(*last));
        if let Segment::Data(data) = &segment {
            way.bytes += data.len();
        }
        way.segments.push_back((at, segment));
        self.due.push(Reverse((at, number, side)));
    }

    /// Delivers what has come by `now`, and says when to look again.
    fn deliver(&mut self, now: Instant) -> Option<Instant> {
        while let Some(Reverse((at, number, side))) = self.due.peek().copied() {
            if at > now {
                return Some(at);
            }
            self.due.pop();
            self.advance(number, side, now);
        }
        None
    }

    /// Delivers what has come in one direction.
    fn advance(&mut self, number: u64, side: usize, now: Instant) {
        while let Some(connection) = self.connections.get_mut(&number) {
            let (from, to) = (connection.ends[side].address.ip(), connection.ends[1 - side].address.ip());
            let way = &mut connection.ways[side];
            if way.segments.front().is_none_or(|(at, _)| *at > now) {
                break;
            }
            let passage = if self.dark.contains(&to) {
                Passage::Cut
            } else {
                self.links.get(&ordered(from, to)).map_or(Passage::Open, |link| link.passage)
            };
            match passage {
                Passage::Open => {}
                Passage::Held => break,
                Passage::Cut => {
                    way.segments.retain(|(at, segment)| *at > now || !matches!(segment, Segment::Reset));
                    break;
                }
            }
            if let Some((_, segment)) = way.segments.pop_front() {
                self.arrive(number, side, segment);
            }
        }
        self.forget(number);
    }

    /// A segment from `side` reaches the other.
    fn arrive(&mut self, number: u64, side: usize, segment: Segment) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        let from = connection.ends[side].address;
        if let Segment::Data(data) = &segment {
            connection.ways[side].bytes -= data.len();
        }
        let end = &mut connection.ends[1 - side];
        let answer = match segment {
            Segment::Syn => match self.listeners.get_mut(&end.address) {
                Some(waiting) => {
                    end.gone = false;
                    end.established = true;
                    waiting.connections.push_back((number, from));
                    wake(&mut waiting.waker);
                    Some(Segment::SynAck)
                }
                None => Some(Segment::Reset),
            },
            Segment::Reset => {
                end.fail(ErrorKind::ConnectionReset);
                connection.ways[1 - side] = Way::default();
                None
            }
            _ if end.gone => matches!(segment, Segment::Data(_) | Segment::SynAck).then_some(Segment::Reset),
            Segment::SynAck => {
                end.established = true;
                wake(&mut end.writer);
                None
            }
            Segment::Data(data) => {
                end.received.extend(data);
                wake(&mut end.reader);
                None
            }
            Segment::Fin => {
                end.finished = true;
                wake(&mut end.reader);
                wake(&mut end.watcher);
                None
            }
        };
        if let Some(answer) = answer {
            self.send(number, 1 - side, answer);
        }
    }

    /// What waited on the way to where `of` says is sent again.
    fn resume(&mut self, was_lost: bool, of: impl Fn(IpAddr, IpAddr) -> bool) {
        let now = Instant::now();
        for (number, connection) in &mut self.connections {
            for side in 0..2 {
                let (from, to) = (connection.ends[side].address.ip(), connection.ends[1 - side].address.ip());
                if connection.ways[side].segments.is_empty() || !of(from, to) {
                    continue;
                }
                let share = if was_lost { connection.chance.random::<f64>() } else { 0.0 };
                let at = now + Duration::from_millis(1) + RESUME_WITHIN.mul_f64(share);
                for (due, _) in &mut connection.ways[side].segments {
                    *due = (*due).max(at);
                    self.due.push(Reverse((*due, *number, side)));
                }
            }
        }
    }

    fn forget(&mut self, number: u64) {
        if self.connections.get(&number).is_some_and(Connection::has_ended) {
            self.connections.remove(&number);
        }
    }

    fn forget_ended(&mut self) {
        self.connections.retain(|_, connection| !connection.has_ended());
    }
}

impl Connection {
    fn has_ended(&self) -> bool {
        self.ends.iter().all(|end| end.gone) && self.ways.iter().all(|way| way.segments.is_empty())
    }
}

impl End {
    fn new(address: SocketAddr) -> End {
        End {
            address,
            gone: false,
            established: false,
            received: VecDeque::new(),
            finished: false,
            failure: None,
            broken: false,
            shut: false,
            resets_on_close: false,
            reader: None,
            writer: None,
            watcher: None,
        }
    }

    fn fail(&mut self, failure: ErrorKind) {
        self.failure = Some(failure);
        self.broken = true;
        // A reset overtakes what was not read yet.
        self.received.clear();
        wake(&mut self.reader);
        wake(&mut self.writer);
        wake(&mut self.watcher);
    }

    fn is_readable(&self) -> bool {
        !self.received.is_empty() || self.finished || self.broken
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

impl Listener {
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// As of a system's listener; only the last caller's waker is kept.
    pub fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(Stream, SocketAddr)>> {
        let mut state = self.network.lock();
        let Some(waiting) = state.listeners.get_mut(&self.address) else { return Poll::Pending };
        match waiting.connections.pop_front() {
            Some((connection, from)) => {
                Poll::Ready(Ok((Stream { network: self.network.clone(), connection, side: 1 }, from)))
            }
            None => {
                waiting.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    pub async fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        poll_fn(|context| self.poll_accept(context)).await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let waiting = self.network.lock().listeners.remove(&self.address);
        for (connection, _) in waiting.unwrap_or_default().connections {
            let stream = Stream { network: self.network.clone(), connection, side: 1 };
            stream.reset_on_close();
        }
    }
}

impl Stream {
    /// Ready when a read gives bytes, the end or an error.
    pub fn poll_read_ready(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.network.lock();
        let end = state.end(self);
        if end.is_readable() {
            return Poll::Ready(Ok(()));
        }
        end.reader = Some(context.waker().clone());
        Poll::Pending
    }

    pub fn is_read_ready(&self) -> bool {
        self.network.lock().end(self).is_readable()
    }

    /// Waits for the other side's end, whatever of it is unread; only the last caller's waker is kept.
    pub fn hang_up(&self) -> impl Future<Output = ()> + use<> {
        let (network, connection, side) = (self.network.clone(), self.connection, self.side);
        poll_fn(move |context| {
            let mut state = network.lock();
            let Some(connection) = state.connections.get_mut(&connection) else { return Poll::Ready(()) };
            let end = &mut connection.ends[side];
            if end.finished || end.broken {
                return Poll::Ready(());
            }
            end.watcher = Some(context.waker().clone());
            Poll::Pending
        })
    }

    /// Closing will reset.
    pub fn reset_on_close(&self) {
        self.network.lock().end(self).resets_on_close = true;
    }

    /// The number of its connection.
    pub fn connection(&self) -> u64 {
        self.connection
    }

    pub fn poll_receive(&self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut state = self.network.lock();
        let Some(connection) = state.connections.get_mut(&self.connection) else { return Poll::Ready(Ok(0)) };
        let (near, far) = ends(connection, self.side);
        if let Some(failure) = near.failure.take() {
            return Poll::Ready(Err(failure.into()));
        }
        if near.received.is_empty() {
            if near.finished || near.broken || buffer.is_empty() {
                return Poll::Ready(Ok(0));
            }
            near.reader = Some(context.waker().clone());
            return Poll::Pending;
        }
        let count = buffer.len().min(near.received.len());
        for (to, from) in buffer.iter_mut().zip(near.received.drain(..count)) {
            *to = from;
        }
        wake(&mut far.writer);
        Poll::Ready(Ok(count))
    }

    pub fn poll_send(&self, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.network.lock();
        let Some(connection) = state.connections.get_mut(&self.connection) else {
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
        };
        let on_the_way = connection.ways[self.side].bytes;
        let (near, far) = ends(connection, self.side);
        if let Some(failure) = near.failure.take() {
            return Poll::Ready(Err(failure.into()));
        }
        if near.broken || near.shut {
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
        }
        let room = WINDOW_BYTES.saturating_sub(on_the_way + far.received.len());
        if room == 0 && !data.is_empty() {
            near.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let count = room.min(data.len());
        // In pieces, as a reader may get anything: what it makes of them must not depend on how they come.
        let split = if count > 1 { connection.chance.random_range(1..=count) } else { count };
        state.send(self.connection, self.side, Segment::Data(data[..split].to_vec()));
        if split < count {
            state.send(self.connection, self.side, Segment::Data(data[split..count].to_vec()));
        }
        drop(state);
        self.network.0.changed.notify_one();
        Poll::Ready(Ok(count))
    }

    fn shut(&self) {
        let mut state = self.network.lock();
        let end = state.end(self);
        if !std::mem::replace(&mut end.shut, true) && !end.broken {
            state.send(self.connection, self.side, Segment::Fin);
            drop(state);
            self.network.0.changed.notify_one();
        }
    }
}

fn ends(connection: &mut Connection, side: usize) -> (&mut End, &mut End) {
    let [first, second] = &mut connection.ends;
    if side == 0 { (first, second) } else { (second, first) }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut state = self.network.lock();
        let Some(connection) = state.connections.get_mut(&self.connection) else { return };
        let end = &mut connection.ends[self.side];
        // Its host may have lost its power before.
        if !std::mem::replace(&mut end.gone, true) && !end.broken {
            let resets = end.resets_on_close || !end.received.is_empty();
            let last = match (resets, end.shut) {
                (true, _) => Some(Segment::Reset),
                (false, false) => Some(Segment::Fin),
                (false, true) => None,
            };
            if end.resets_on_close {
                connection.ways[self.side] = Way::default();
            }
            if let Some(last) = last {
                state.send(self.connection, self.side, last);
            }
        }
        state.forget(self.connection);
        drop(state);
        self.network.0.changed.notify_one();
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = std::task::ready!(self.poll_receive(context, into.initialize_unfilled()))?;
        into.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(context, data)
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut();
        Poll::Ready(Ok(()))
    }
}
