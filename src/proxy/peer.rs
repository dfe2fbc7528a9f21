//! Peer: the client's or the endpoint's side of one exchange, as a source of body bytes and a sink for them.
//!
//! One relay for all kinds: [`Http1`] reads and writes its own connection, [`Http2`] one stream of a connection that a task
//! of its own drives.

mod http1;
mod http2;

use std::io;
use std::task::{Context, Poll};

use bytes::Bytes;

use crate::message::{Fields, ResponseHead};
use crate::proxy::observe::Observer;

pub use http1::{Closing, HeadFault, HeadWait, Http1};
pub use http2::{Http2, fields, header_map};

/// One side of an exchange.
pub enum Peer {
    Http1(Http1),
    Http2(Box<Http2>),
    /// Takes everything and gives nothing: in the place of a client that has left.
    Nobody,
}

/// What a source gives next.
pub enum Next {
    /// [`Peer::held`] is not empty.
    Bytes,
    /// The body has ended whole, with these trailers.
    End(Option<Fields>),
}

/// Why a source can't go on.
#[derive(Debug)]
pub enum SourceFault {
    /// The connection ended before the body did.
    Cut(io::Error),
    /// The framing is malformed.
    Malformed(&'static str),
}

impl Peer {
    /// Makes [`Peer::held`] non-empty, or tells that the body has ended. `raw`: HTTP/1.1 chunk framing is kept.
    pub fn poll_next(
        &mut self,
        context: &mut Context<'_>,
        raw: bool,
        observer: &mut Observer,
    ) -> Poll<Result<Next, SourceFault>> {
        match self {
            Peer::Http1(peer) => peer.poll_next(context, raw, observer),
            Peer::Http2(peer) => peer.poll_next(context, observer),
            Peer::Nobody => Poll::Pending,
        }
    }

    /// Bytes that are checked and wait to be written to the other side.
    pub fn held(&self) -> &[u8] {
        match self {
            Peer::Http1(peer) => peer.held(),
            Peer::Http2(peer) => peer.held(),
            Peer::Nobody => &[],
        }
    }

    /// The first `count` held bytes were written.
    pub fn consume(&mut self, count: usize) {
        match self {
            Peer::Http1(peer) => peer.consume(count),
            Peer::Http2(peer) => peer.consume(count),
            Peer::Nobody => {}
        }
    }

    /// Every byte of the body has come in (some may still be held).
    pub fn source_ended(&self) -> bool {
        match self {
            Peer::Http1(peer) => peer.source_ended(),
            Peer::Http2(peer) => peer.source_ended(),
            Peer::Nobody => true,
        }
    }

    /// The trailers that came in, until [`Peer::poll_next`] gives them.
    pub fn trailers(&self) -> Option<&Fields> {
        match self {
            Peer::Http1(peer) => peer.trailers(),
            Peer::Http2(_) | Peer::Nobody => None,
        }
    }

    /// What comes next is a chunk of HTTP/1.1 from its first byte on.
    pub fn is_between_chunks(&self) -> bool {
        match self {
            Peer::Http1(peer) => peer.is_between_chunks(),
            Peer::Http2(_) | Peer::Nobody => false,
        }
    }

    /// Writes body bytes, with a pending head before them in the same call where there is one; how many of `data` were
    /// taken (at least 1).
    pub fn poll_write(&mut self, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Peer::Http1(peer) => peer.poll_write(context, data),
            Peer::Http2(peer) => peer.poll_write(context, data),
            Peer::Nobody => Poll::Ready(Ok(data.len())),
        }
    }

    /// Pushes out what is pending: a head, a terminator, TLS records.
    pub fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Peer::Http1(peer) => peer.poll_flush(context),
            Peer::Http2(_) | Peer::Nobody => Poll::Ready(Ok(())),
        }
    }

    /// Ends the body as a whole one. `raw`: the source's own chunk terminator was passed already.
    pub fn poll_finish(
        &mut self,
        context: &mut Context<'_>,
        raw: bool,
        trailers: &mut Option<Box<Fields>>,
    ) -> Poll<io::Result<()>> {
        match self {
            Peer::Http1(peer) => peer.poll_finish(context, raw, trailers),
            Peer::Http2(peer) => Poll::Ready(peer.finish(trailers.take().map(|trailers| *trailers))),
            Peer::Nobody => Poll::Ready(Ok(())),
        }
    }

    /// Ready when this side has left: its connection ended or its stream was reset. On HTTP/1.1 also where what it sent
    /// before that was not read yet, and could be.
    pub fn poll_gone(&mut self, context: &mut Context<'_>) -> Poll<()> {
        match self {
            Peer::Http1(peer) => peer.poll_gone(context),
            Peer::Http2(peer) => peer.poll_gone(context),
            Peer::Nobody => Poll::Pending,
        }
    }

    /// Ready when this side has left while no more of what it sends is taken. `wanted`: what it sent before that is to be
    /// taken all the same.
    pub fn poll_left(&mut self, wanted: bool, context: &mut Context<'_>) -> Poll<()> {
        if wanted { self.poll_reset(context) } else { self.poll_gone(context) }
    }

    /// As [`Peer::poll_gone`], where all that it sent before it left is wanted: on HTTP/2 a reset overtakes that; on
    /// HTTP/1.1 the end comes behind it.
    fn poll_reset(&mut self, context: &mut Context<'_>) -> Poll<()> {
        match self {
            Peer::Http1(_) | Peer::Nobody => Poll::Pending,
            Peer::Http2(peer) => peer.poll_gone(context),
        }
    }

    /// Gives bytes back that were read ahead: they come again first, unobserved.
    pub fn put_back(&mut self, ahead: Bytes) {
        match self {
            Peer::Http1(peer) => peer.put_back(ahead),
            Peer::Http2(peer) => peer.put_back(ahead),
            Peer::Nobody => {}
        }
    }

    /// Gives trailers back that were read ahead.
    pub fn put_back_trailers(&mut self, trailers: Option<Fields>) {
        match self {
            Peer::Http1(peer) => peer.put_back_trailers(trailers),
            Peer::Http2(peer) => peer.put_back_trailers(trailers),
            Peer::Nobody => {}
        }
    }

    /// Tells the client to send its body (RFC 9110 section 10.1.1).
    pub fn send_continue(&mut self) {
        let mut head = http::Response::new(());
        *head.status_mut() = http::StatusCode::CONTINUE;
        match self {
            Peer::Http1(peer) => peer.pending_head().extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n"),
            Peer::Http2(peer) => peer.send_informational(head),
            Peer::Nobody => {}
        }
    }

    /// Passes an interim answer (1xx) on.
    pub fn send_informational(&mut self, interim: &ResponseHead) {
        match self {
            Peer::Http1(peer) => crate::http1::write_response(peer.pending_head(), interim, false),
            Peer::Http2(peer) => {
                let mut head = http::Response::new(());
                *head.status_mut() = interim.status;
                *head.headers_mut() = header_map(&interim.fields);
                peer.send_informational(head);
            }
            Peer::Nobody => {}
        }
    }

    /// Both directions are bytes without framing from here on.
    pub fn become_tunnel(&mut self) {
        match self {
            Peer::Http1(peer) => peer.become_tunnel(),
            Peer::Http2(peer) => peer.become_tunnel(),
            Peer::Nobody => {}
        }
    }

    /// Takes the answer's head back, if nothing of it has gone out.
    pub fn take_back_head(&mut self) -> bool {
        match self {
            Peer::Http1(peer) => peer.take_back_head(),
            Peer::Http2(_) | Peer::Nobody => false,
        }
    }

    pub fn is_http1(&self) -> bool {
        matches!(self, Peer::Http1(_))
    }
}
