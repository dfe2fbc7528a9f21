//! Steps 1 to 3 of a connection's life: PROXY protocol, TLS, then HTTP/1.1 or HTTP/2 until it ends or drains.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use crate::drain::Phase;
use crate::error::{Code, ProxyError};
use crate::http1::{HeadError, HeadLimits};
use crate::message::Version;
use crate::net::listen::Accepted;
use crate::net::proxy_protocol;
use crate::net::stream::{Plain, Stream};
use crate::proxy::account::{self, OpenExchange};
use crate::proxy::peer::{HeadFault, HeadWait, Http1, Peer};
use crate::proxy::timer::Timer;
use crate::proxy::worker::{Handed, Local, Worker};
use crate::proxy::{self, forwarded, http2_server, in_place, problem};
use crate::snapshot::Listener;

/// The first bytes of HTTP/2 with prior knowledge (RFC 9113 section 3.4), as far as they look like an HTTP/1 head.
const HTTP2_PREFACE_HEAD: &[u8] = b"PRI * HTTP/2.0\r\n\r\n";

/// How long a client may take to read the last answer before its connection is closed under it.
const LINGER: Duration = Duration::from_secs(2);

/// A PROXY protocol header longer than this is refused (version 2 can carry 64 KiB of extensions).
const PROXY_HEADER_BYTES_MAX: usize = 4 * 1024;

/// What the exchanges of one connection share.
pub struct Connection {
    pub worker: Rc<Worker>,
    /// Who connected, by the PROXY protocol where that is accepted.
    pub peer: forwarded::Peer,
    listener: RefCell<Local<Listener>>,
    /// The snapshot's in which `listener` was looked up (its low half: idle streams are many).
    generation: Cell<u32>,
    /// A reload has removed the listener.
    orphaned: Cell<bool>,
    /// The client was told that the proxy ends, and has had the time to hear it.
    warned: Cell<bool>,
}

impl Connection {
    /// The listener as the newest configuration has it; as it was last, where a reload removed it.
    pub fn listener(&self) -> Local<Listener> {
        let current = self.worker.current();
        let generation = current.snapshot.generation as u32;
        if self.generation.replace(generation) != generation {
            let newest = current.listener(&self.listener.borrow().local_address);
            match newest {
                Some(newest) => *self.listener.borrow_mut() = newest,
                None => self.orphaned.set(true),
            }
        }
        self.listener.borrow().clone()
    }

    /// As [`Connection::listener`] was when it was last asked.
    fn last_listener(&self) -> Local<Listener> {
        self.listener.borrow().clone()
    }

    /// No further request is wanted on this connection: the proxy drains, or its listener is gone.
    pub fn told_to_close(&self) -> bool {
        self.orphaned.get() || self.worker.running.drain.phase() >= Phase::Draining
    }

    /// What arrives from here on was sent by a client that knew better.
    pub fn warn(&self) {
        self.warned.set(true);
    }

    /// No run may start here any more: the proxy drains, and the client was told so before it asked.
    pub fn refuses_starts(&self) -> bool {
        self.warned.get() && self.worker.running.drain.phase() >= Phase::Draining
    }

    /// The peer is one of `trusted_proxies`.
    pub fn peer_trusted(&self, listener: &Listener) -> bool {
        self.peer.is_trusted(&listener.config.trusted_proxies)
    }
}

/// Counts a connection as long as it lives.
struct Counted(Arc<Listener>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.metrics.connections.dec();
    }
}

/// Serves an accepted socket to its end.
pub async fn serve(worker: Rc<Worker>, handed: Handed) {
    let Handed { accepted, listener, load: _load } = handed;
    listener.metrics.connections.inc();
    let _counted = Counted(listener.clone());
    match Box::pin(open(worker, accepted, listener)).await {
        Ok((connection, stream)) if stream.negotiated_http2() => {
            Box::pin(http2_server::serve(Rc::new(connection), stream, Vec::new())).await;
        }
        Ok((connection, stream)) => serve_http1(connection, stream).await,
        // Nobody is there to be told; a scan or a health check of a TCP balancer looks like this.
        Err(error) => tracing::debug!("connection ended before its first request: {error}"),
    }
}

/// PROXY protocol and TLS, each under the header time-out.
async fn open(worker: Rc<Worker>, accepted: Accepted, listener: Arc<Listener>) -> io::Result<(Connection, Stream)> {
    let header_timeout = listener.config.limits.header_timeout;
    let (mut plain, peer) = accepted.into_tokio()?;
    let mut peer = peer.map(|address| address.ip().to_canonical());
    let from_trusted = peer.is_some_and(|peer| listener.config.trusted_proxies.iter().any(|net| net.contains(&peer)));
    if listener.config.proxy_protocol && from_trusted {
        let source = timeout(header_timeout, read_proxy_header(&mut plain)).await.map_err(io::Error::other)??;
        if let Some(client) = source {
            peer = Some(client);
        }
    }
    let stream = match &listener.tls {
        None => Stream::Plain(plain),
        Some(tls) => {
            let acceptor = tokio_rustls::TlsAcceptor::from(tls.config());
            let stream = timeout(header_timeout, acceptor.accept(plain)).await.map_err(io::Error::other)??;
            Stream::TlsServer(Box::new(stream))
        }
    };
    let peer = forwarded::Peer::new(peer, stream.is_tls());
    let connection = Connection {
        worker,
        peer,
        listener: RefCell::new(Rc::new(listener)),
        // That of no snapshot.
        generation: Cell::new(0),
        orphaned: Cell::new(false),
        warned: Cell::new(false),
    };
    Ok((connection, stream))
}

/// Reads exactly the PROXY protocol header, no byte of what follows it.
async fn read_proxy_header(plain: &mut Plain) -> io::Result<Option<IpAddr>> {
    let malformed = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, format!("PROXY protocol: {reason}"));
    // Version 1 has at least 15 bytes, version 2 at least 16: neither can end before this.
    let mut header = vec![0; 15];
    plain.read_exact(&mut header).await?;
    loop {
        match proxy_protocol::read(&header) {
            Ok(Some((source, _))) => return Ok(source.client.map(|address| address.ip().to_canonical())),
            Ok(None) if header.len() >= PROXY_HEADER_BYTES_MAX => return Err(malformed("the header is too long")),
            Ok(None) => header.push(plain.read_u8().await?),
            Err(_) => return Err(malformed("the header is malformed; is the peer configured to send it?")),
        }
    }
}

async fn serve_http1(connection: Connection, stream: Stream) {
    let mut client = Peer::Http1(Http1::new(stream));
    let mut timer = Timer::new(connection.listener().config.keepalive_timeout);
    let mut first = true;
    loop {
        let Peer::Http1(http1) = &mut client else { return };
        let listener = connection.last_listener();
        let limits = HeadLimits {
            max_bytes: listener.config.limits.max_header_bytes,
            max_fields: listener.config.limits.max_headers,
        };
        let length = match next_head(http1, &mut timer, limits, &listener, &connection.worker, first).await {
            Ok(length) => length,
            Err(HeadFault::Head(error)) => return Box::pin(refuse(&connection, client, &mut timer, error)).await,
            Err(HeadFault::Closed { .. }) => return,
        };
        if first && !connection.peer.tls && http1.unread().starts_with(HTTP2_PREFACE_HEAD) {
            let Peer::Http1(http1) = client else { return };
            drop(timer);
            let (stream, unread) = http1.into_parts();
            return Box::pin(http2_server::serve(Rc::new(connection), stream, unread)).await;
        }
        first = false;
        let request = match http1.take_request(length, limits) {
            Ok(request) => request,
            Err(error) => return Box::pin(refuse(&connection, client, &mut timer, error)).await,
        };
        let upgrade = request.upgrade.is_some();
        let exchange = in_place::pinned(|| proxy::exchange(&connection, &mut client, request, &mut timer));
        let after = at_one_instant_a_poll(exchange).await;
        let Peer::Http1(http1) = &mut client else { return };
        match after {
            // Bytes behind a refused upgrade could be meant for the protocol that did not come about.
            proxy::After::KeepAlive if !upgrade || http1.unread().is_empty() => {}
            proxy::After::KeepAlive | proxy::After::Linger => return Box::pin(linger(client, &mut timer)).await,
            proxy::After::Close => return,
        }
    }
}

/// The exchange as it is, with its clock read once a poll at the most.
fn at_one_instant_a_poll<F: Future>(mut exchange: Pin<Box<F>>) -> impl Future<Output = F::Output> {
    poll_fn(move |context| crate::ids::at_one_instant(|| exchange.as_mut().poll(context)))
}

/// Waits for the next request head: as long as keep-alive allows for its first byte, then the header time-out. A closure, so
/// that what it holds is held once: an idle connection is to be small.
fn next_head(
    http1: &mut Http1,
    timer: &mut Timer,
    limits: HeadLimits,
    listener: &Listener,
    worker: &Rc<Worker>,
    first: bool,
) -> impl Future<Output = Result<usize, HeadFault>> {
    let began = crate::ids::now();
    let mut partial_deadline = None;
    // A request of which a part has come holds the drain: it is on its way.
    let mut coming = None;
    poll_fn(move |context| {
        if let Poll::Ready(result) = http1.poll_head(context, limits) {
            return Poll::Ready(result);
        }
        let header_timeout = listener.config.limits.header_timeout;
        let keepalive_deadline = began + listener.config.keepalive_timeout;
        let deadline = match http1.head_begun() {
            HeadWait::Begun => {
                coming.get_or_insert_with(|| OpenExchange::new(worker));
                *partial_deadline.get_or_insert_with(|| crate::ids::now() + header_timeout)
            }
            // A client that connects and says nothing is given no longer than a slow head.
            HeadWait::Nothing if first => (began + header_timeout).min(keepalive_deadline),
            HeadWait::Nothing => keepalive_deadline,
        };
        timer.poll_passed(context, deadline).map(|()| Err(HeadFault::Closed { clean: true, error: None }))
    })
}

/// Answers a head that can't be read, and closes.
async fn refuse(connection: &Connection, mut client: Peer, timer: &mut Timer, error: HeadError) {
    let error = match error {
        HeadError::TooLarge => {
            ProxyError::new(Code::HeaderTooLarge, "the request head exceeds limits.max_header_bytes or max_headers")
        }
        HeadError::Malformed(reason) => ProxyError::new(Code::BadRequest, reason),
    };
    tracing::debug!(peer = ?connection.peer.address, "unreadable request head: {}", error.detail);
    let (mut head, body) = problem::error(&error, None);
    account::unreadable(connection, head.status, error.code, body.len());
    head.fields.append("longhaul-affinity", b"none");
    proxy::respond::send(&mut client, &mut head, body, Version::Http11, true, timer).await;
    linger(client, timer).await;
}

/// Closes without destroying the answer that is still on its way.
async fn linger(client: Peer, timer: &mut Timer) {
    let Peer::Http1(http1) = client else { return };
    let mut closing = http1.into_closing();
    let deadline = crate::ids::now() + LINGER;
    poll_fn(|context| match closing.poll_linger(context) {
        Poll::Ready(()) => Poll::Ready(()),
        Poll::Pending => timer.poll_passed(context, deadline),
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::RequestHead;

    fn size<A, B, F: Future>(_: impl FnOnce(A, B) -> F) -> usize {
        size_of::<F>()
    }

    fn size_of_exchange<'a, F: Future>(
        _: impl FnOnce(&'a Connection, &'a mut Peer, Box<RequestHead>, &'a mut Timer) -> F,
    ) -> usize {
        size_of::<F>()
    }

    /// What one connection costs while its stream is silent, beside the sockets: its task, and the boxes it holds. The
    /// bounds lie near a size class of the allocator, where a few bytes more cost some hundred a stream; other members
    /// of the workspace may switch features of shared crates on that add a word.
    #[test]
    fn a_silent_stream_is_small() {
        let task = size(serve);
        let flow = size_of::<proxy::relay::Flow>();
        let upstream = size_of::<proxy::upstream::Upstream>();
        let exchange = size_of_exchange(proxy::exchange);
        assert!(task <= 1152, "{task}");
        assert!(exchange <= 656, "{exchange}");
        assert!(flow <= 320, "{flow}");
        assert!(upstream <= 256, "{upstream}");
    }
}
