//! The HTTP/1.1 side: one connection, its pooled read buffer, the framing of the body that comes in and of the one that
//! goes out. While it is silent it holds no buffer.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::AsyncWrite;

use crate::http1::chunks::{Chunks, HEADROOM, Piece};
use crate::http1::{self, HeadError, HeadLimits};
use crate::message::{Fields, Framing, RequestHead, ResponseHead};
use crate::net::hang_up::HangUp;
use crate::net::stream::Stream;
use crate::proxy::buffer::{Buffer, READ_BYTES};
use crate::proxy::observe::Observer;
use crate::proxy::peer::{Next, SourceFault};

/// Body bytes that are copied behind a pending head, so that both are one write: a vectored one costs more than that.
const JOINED_BYTES_MAX: usize = 512;

/// Trailers longer than this are malformed.
const TRAILER_BYTES_MAX: u32 = 16 * 1024;

/// An HTTP/1.1 connection and where it is in its current messages.
pub struct Http1 {
    stream: Stream,
    buffer: Option<Buffer>,
    /// `buffer[held_start..held_end]`: body bytes that are checked and wait to be written to the other side.
    held_start: usize,
    held_end: usize,
    /// `buffer[start..end]`: bytes not looked at yet.
    start: usize,
    end: usize,
    /// Body bytes that were read ahead to find a session key; they go before everything else.
    ahead: Option<Box<Bytes>>,
    /// How far the head in `buffer[start..end]` was scanned for its end.
    scanned: usize,
    incoming: Incoming,
    aside: Option<Box<Aside>>,
    outgoing: Outgoing,
    /// Bytes that go out before the body: a head, chunk framing. `pending[pending_start..]` is still to be written.
    pending: Vec<u8>,
    pending_start: usize,
    /// What is left of the chunk that was begun.
    chunk_left: usize,
    /// The TLS session may hold bytes.
    unflushed: bool,
    /// Some bytes went out.
    written: bool,
    finished: bool,
    /// The head of the answer waits in `pending`, and no byte of it has gone out.
    head_unsent: bool,
}

/// What few messages have.
#[derive(Default)]
struct Aside {
    /// Those of the body that came in, until they are given on.
    trailers: Option<Fields>,
    /// Once the buffer was full while the other side was watched, until its message has ended.
    hang_up: Option<HangUp>,
}

/// How the body that comes in ends.
enum Incoming {
    Ended,
    Length(u64),
    Chunked(Chunks),
    Eof,
}

/// How the body that goes out is framed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outgoing {
    /// As it is: of known length, until the connection ends, already in chunks, or a tunnel.
    Raw,
    Chunked,
}

/// Why no head came.
#[derive(Debug)]
pub enum HeadFault {
    /// The connection ended; `clean` where no byte of a head had come.
    Closed {
        clean: bool,
        error: Option<io::Error>,
    },
    Head(HeadError),
}

/// Whether a head has begun to come in.
pub enum HeadWait {
    Nothing,
    Begun,
}

/// A connection that is to be closed after an answer that the client must still be able to read.
pub struct Closing {
    stream: Stream,
    discarded: usize,
    shut: bool,
}

impl Http1 {
    #[inline(always)]
    pub fn new(stream: Stream) -> Http1 {
        Http1 {
            stream,
            buffer: None,
            held_start: 0,
            held_end: 0,
            start: 0,
            end: 0,
            ahead: None,
            scanned: 0,
            incoming: Incoming::Ended,
            aside: None,
            outgoing: Outgoing::Raw,
            pending: Vec::new(),
            pending_start: 0,
            chunk_left: 0,
            unflushed: false,
            written: false,
            finished: true,
            head_unsent: false,
        }
    }

    /// Takes bytes that were read from the stream before it came here.
    pub fn with_unread(stream: Stream, unread: &[u8]) -> Http1 {
        let mut peer = Http1::new(stream);
        if !unread.is_empty() {
            let mut buffer = Buffer::take();
            buffer.grow(HEADROOM + unread.len());
            buffer[HEADROOM..HEADROOM + unread.len()].copy_from_slice(unread);
            peer.buffer = Some(buffer);
            peer.start = HEADROOM;
            peer.end = HEADROOM + unread.len();
        }
        peer
    }

    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Bytes that came in and that no message has claimed yet.
    pub fn unread(&self) -> &[u8] {
        match &self.buffer {
            Some(buffer) => &buffer[self.start..self.end],
            None => &[],
        }
    }

    // ---- heads that come in ----

    /// Ready when a whole head is in the buffer: its length. [`Http1::head_begun`] tells what a pending one waits for.
    pub fn poll_head(&mut self, context: &mut Context<'_>, limits: HeadLimits) -> Poll<Result<usize, HeadFault>> {
        loop {
            if self.start < self.end {
                let buffer = self.buffer.as_ref().map_or(&[][..], |buffer| &buffer[self.start..self.end]);
                match http1::head_end(buffer, &mut self.scanned, limits) {
                    Ok(Some(length)) => return Poll::Ready(Ok(length)),
                    Ok(None) => {}
                    Err(error) => return Poll::Ready(Err(HeadFault::Head(error))),
                }
            }
            let clean = self.start == self.end;
            match ready!(self.poll_fill(context, limits.max_bytes)) {
                Ok(0) => return Poll::Ready(Err(HeadFault::Closed { clean, error: None })),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(HeadFault::Closed { clean, error: Some(error) })),
            }
        }
    }

    pub fn head_begun(&self) -> HeadWait {
        if self.start == self.end { HeadWait::Nothing } else { HeadWait::Begun }
    }

    /// Reads the request head of that length and makes its body the one that comes in.
    pub fn take_request(&mut self, length: usize, limits: HeadLimits) -> Result<Box<RequestHead>, HeadError> {
        let head = Box::new(http1::read_request(&self.unread()[..length], limits)?);
        self.claim(length);
        self.expect_body(head.framing);
        Ok(head)
    }

    /// As [`Http1::take_request`], for a response.
    pub fn take_response(
        &mut self,
        length: usize,
        limits: HeadLimits,
        method: &http::Method,
    ) -> Result<ResponseHead, HeadError> {
        let head = http1::read_response(&self.unread()[..length], limits, method)?;
        self.claim(length);
        self.expect_body(head.framing);
        Ok(head)
    }

    fn claim(&mut self, length: usize) {
        self.start += length;
        self.scanned = 0;
        if self.start == self.end {
            self.release();
        }
    }

    fn expect_body(&mut self, framing: Framing) {
        // Trailers of a body that nobody took to its end are not this one's.
        self.aside = None;
        self.incoming = match framing {
            Framing::None | Framing::Length(0) => Incoming::Ended,
            Framing::Length(length) => Incoming::Length(length),
            Framing::Chunked => Incoming::Chunked(Chunks::new(TRAILER_BYTES_MAX)),
            Framing::Eof => Incoming::Eof,
        };
    }

    /// What comes next is a chunk from its first byte on: it can go on with its framing as it is.
    pub fn is_between_chunks(&self) -> bool {
        matches!(&self.incoming, Incoming::Chunked(chunks) if chunks.is_between_chunks())
    }

    /// From here on both directions are a tunnel (RFC 9110 section 7.8): bytes without framing.
    pub fn become_tunnel(&mut self) {
        self.incoming = Incoming::Eof;
        self.outgoing = Outgoing::Raw;
        self.finished = false;
        // A tunnel's end is read.
        self.aside = None;
    }

    /// Bytes read ahead of their time go first.
    pub fn put_back(&mut self, ahead: Bytes) {
        let ahead = match self.ahead.take() {
            Some(left) => [&ahead[..], &left[..]].concat().into(),
            None => ahead,
        };
        self.ahead = (!ahead.is_empty()).then(|| Box::new(ahead));
    }

    pub fn put_back_trailers(&mut self, trailers: Option<Fields>) {
        set_trailers(&mut self.aside, trailers);
    }

    // ---- heads that go out ----

    /// Where the next head is to be written to; goes out with the first body bytes or the next flush.
    pub fn pending_head(&mut self) -> &mut Vec<u8> {
        if self.pending_start == self.pending.len() {
            self.pending.clear();
            self.pending_start = 0;
        }
        &mut self.pending
    }

    /// The body that follows the head just written is framed so; `passes_chunks`: the source's own chunk framing is
    /// passed on.
    pub fn begin_body(&mut self, framing: Framing, passes_chunks: bool) {
        self.outgoing = if framing == Framing::Chunked && !passes_chunks { Outgoing::Chunked } else { Outgoing::Raw };
        self.finished = false;
        self.chunk_left = 0;
        self.head_unsent = true;
    }

    /// Takes the head back that [`Http1::begin_body`] followed, if no byte of it has gone out, so that another can be
    /// written in its place.
    pub fn take_back_head(&mut self) -> bool {
        let unsent = self.head_unsent && self.pending_start == 0;
        if unsent {
            self.head_unsent = false;
            self.pending.clear();
            self.chunk_left = 0;
        }
        unsent
    }

    // ---- as a source ----

    pub fn poll_next(
        &mut self,
        context: &mut Context<'_>,
        raw: bool,
        observer: &mut Observer,
    ) -> Poll<Result<Next, SourceFault>> {
        loop {
            if self.held_start < self.held_end || self.ahead.is_some() {
                return Poll::Ready(Ok(Next::Bytes));
            }
            if matches!(self.incoming, Incoming::Ended) {
                let trailers = self.aside.as_mut().and_then(|aside| aside.trailers.take());
                return Poll::Ready(Ok(Next::End(trailers)));
            }
            if self.start == self.end {
                match ready!(self.poll_fill(context, READ_BYTES)) {
                    Ok(0) if matches!(self.incoming, Incoming::Eof) => {
                        self.incoming = Incoming::Ended;
                        continue;
                    }
                    Ok(0) => return Poll::Ready(Err(SourceFault::Cut(io::ErrorKind::UnexpectedEof.into()))),
                    Ok(_) => {}
                    Err(error) => return Poll::Ready(Err(SourceFault::Cut(error))),
                }
            }
            self.scan(raw, observer).map_err(SourceFault::Malformed)?;
        }
    }

    /// Looks at the unread bytes once: what belongs to the body becomes held.
    fn scan(&mut self, raw: bool, observer: &mut Observer) -> Result<(), &'static str> {
        let Some(buffer) = &mut self.buffer else { return Ok(()) };
        match &mut self.incoming {
            Incoming::Ended => {}
            Incoming::Eof => {
                observer.observe(&buffer[self.start..self.end]);
                (self.held_start, self.held_end) = (self.start, self.end);
                self.start = self.end;
            }
            Incoming::Length(left) => {
                let available = (self.end - self.start) as u64;
                let take = available.min(*left) as usize;
                observer.observe(&buffer[self.start..self.start + take]);
                (self.held_start, self.held_end) = (self.start, self.start + take);
                self.start += take;
                *left -= take as u64;
                if *left == 0 {
                    self.incoming = Incoming::Ended;
                }
            }
            Incoming::Chunked(chunks) if raw => {
                let pass = chunks
                    .pass(buffer, self.start, self.end, |payload| observer.observe(payload))
                    .map_err(|fault| fault.0)?;
                (self.held_start, self.held_end) = (pass.forward.start, pass.forward.end);
                self.start = pass.consumed;
                if pass.ended {
                    set_trailers(&mut self.aside, chunks.take_trailers());
                    self.incoming = Incoming::Ended;
                }
            }
            Incoming::Chunked(chunks) => match chunks.next(&buffer[self.start..self.end]).map_err(|fault| fault.0)? {
                Piece::NeedMore => self.start = self.end,
                Piece::Framing { length, .. } => self.start += length,
                Piece::Data { length } => {
                    observer.observe(&buffer[self.start..self.start + length]);
                    (self.held_start, self.held_end) = (self.start, self.start + length);
                    self.start += length;
                }
                Piece::End { length } => {
                    self.start += length;
                    set_trailers(&mut self.aside, chunks.take_trailers());
                    self.incoming = Incoming::Ended;
                }
            },
        }
        if self.held_start == self.held_end && self.start == self.end {
            self.release();
        }
        Ok(())
    }

    pub fn held(&self) -> &[u8] {
        if let Some(ahead) = &self.ahead {
            return ahead;
        }
        match &self.buffer {
            Some(buffer) => &buffer[self.held_start..self.held_end],
            None => &[],
        }
    }

    pub fn consume(&mut self, count: usize) {
        if let Some(ahead) = &mut self.ahead {
            let _ = ahead.split_to(count);
            if ahead.is_empty() {
                self.ahead = None;
            }
            return;
        }
        self.held_start += count;
        if self.held_start == self.held_end && self.start == self.end {
            self.release();
        }
    }

    pub fn source_ended(&self) -> bool {
        matches!(self.incoming, Incoming::Ended)
    }

    pub fn trailers(&self) -> Option<&Fields> {
        self.aside.as_ref()?.trailers.as_ref()
    }

    /// Nothing of the message that came in is left, and nothing came after it.
    pub fn is_at_rest(&self) -> bool {
        self.source_ended() && self.held_start == self.held_end && self.start == self.end && self.ahead.is_none()
    }

    /// Ready when the connection ended. What comes before that is looked at later: as much of it as there is room for is
    /// read, and behind more than that the end is seen without reading, if it could be sent: not behind what the sockets
    /// don't take either.
    pub fn poll_gone(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while self.buffer.as_ref().is_none_or(|buffer| self.end < buffer.len()) {
            if self.source_ended()
                && let Some(aside) = &mut self.aside
            {
                aside.hang_up = None;
            }
            match ready!(self.poll_fill(context, READ_BYTES)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(_) => {}
            }
        }
        let aside = self.aside.get_or_insert_default();
        if aside.hang_up.is_none() {
            // Where no descriptor is free the end is seen when all before it has been read.
            aside.hang_up = HangUp::of(&self.stream).ok();
        }
        match &mut aside.hang_up {
            Some(hang_up) => hang_up.poll(context),
            None => Poll::Pending,
        }
    }

    /// Closes with a reset instead of an end, for a body that only the connection's end would end.
    pub fn reset_on_close(&self) {
        self.stream.reset_on_close();
    }

    /// Reads more bytes behind `end`; 0 is the end of the connection. Holds no buffer while it waits for the first.
    fn poll_fill(&mut self, context: &mut Context<'_>, bytes_max: usize) -> Poll<io::Result<usize>> {
        if self.buffer.is_none() {
            ready!(self.stream.poll_read_ready(context))?;
            self.buffer = Some(Buffer::take());
            (self.start, self.end) = (HEADROOM, HEADROOM);
            (self.held_start, self.held_end) = (HEADROOM, HEADROOM);
        }
        let Some(buffer) = &mut self.buffer else { return Poll::Pending };
        if self.start == self.end && self.held_start == self.held_end {
            (self.start, self.end) = (HEADROOM, HEADROOM);
            (self.held_start, self.held_end) = (HEADROOM, HEADROOM);
        }
        if self.end == buffer.len() {
            // Only a head can be larger than a buffer; the limit has let it come this far.
            let unread = self.end - self.start;
            buffer.copy_within(self.start..self.end, HEADROOM);
            (self.start, self.end) = (HEADROOM, HEADROOM + unread);
            (self.held_start, self.held_end) = (HEADROOM, HEADROOM);
            if self.end == buffer.len() {
                let larger = (2 * buffer.len()).min(HEADROOM + bytes_max.max(READ_BYTES) + 1);
                buffer.grow(larger);
            }
        }
        let read = self.stream.poll_read_into(context, &mut buffer[self.end..]);
        if let Poll::Ready(Ok(count)) = &read {
            self.end += count;
        }
        if self.start == self.end && self.held_start == self.held_end {
            self.release();
        }
        read
    }

    fn release(&mut self) {
        self.buffer = None;
        (self.start, self.end, self.held_start, self.held_end) = (0, 0, 0, 0);
    }

    // ---- as a sink ----

    pub fn poll_write(&mut self, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.outgoing == Outgoing::Chunked && self.chunk_left == 0 {
            let mut header = [0; 18];
            let length = http1::write_chunk_header(&mut header, data.len());
            self.pending_head().extend_from_slice(&header[..length]);
            self.chunk_left = data.len();
        }
        if self.pending_start < self.pending.len() && data.len() <= JOINED_BYTES_MAX {
            return self.poll_write_joined(context, data);
        }
        loop {
            let pending = &self.pending[self.pending_start..];
            let pending_length = pending.len();
            // The end of a chunk goes out with its last bytes.
            let chunk_end: &[u8] =
                if self.outgoing == Outgoing::Chunked && self.chunk_left == data.len() { b"\r\n" } else { b"" };
            let slices = [IoSlice::new(pending), IoSlice::new(data), IoSlice::new(chunk_end)];
            let used = match (pending_length, chunk_end.len()) {
                (0, 0) => &slices[1..2],
                (0, _) => &slices[1..3],
                (_, 0) => &slices[0..2],
                _ => &slices[..],
            };
            let mut written = ready!(self.stream.poll_write_slices(context, used))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written = true;
            self.head_unsent = false;
            self.unflushed = self.stream.buffers_writes();
            let of_pending = written.min(pending_length);
            self.pending_start += of_pending;
            written -= of_pending;
            if self.pending_start == self.pending.len() {
                self.release_pending();
            }
            if written == 0 {
                continue;
            }
            let of_data = written.min(data.len());
            if self.outgoing == Outgoing::Chunked {
                self.chunk_left -= of_data;
                if self.chunk_left == 0 {
                    let of_chunk_end = written - of_data;
                    self.pending_head().extend_from_slice(&chunk_end[of_chunk_end..]);
                }
            }
            return Poll::Ready(Ok(of_data));
        }
    }

    /// Writes what is pending and `data` as one piece.
    fn poll_write_joined(&mut self, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let pending_length = self.pending.len();
        self.pending.extend_from_slice(data);
        if self.outgoing == Outgoing::Chunked && self.chunk_left == data.len() {
            self.pending.extend_from_slice(b"\r\n");
        }
        let slices = [IoSlice::new(&self.pending[self.pending_start..])];
        let written = match self.stream.poll_write_slices(context, &slices) {
            Poll::Ready(Ok(written)) if written > 0 => written,
            not_taken => {
                // It comes again.
                self.pending.truncate(pending_length);
                ready!(not_taken)?;
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        };
        self.written = true;
        self.head_unsent = false;
        self.unflushed = self.stream.buffers_writes();
        if self.outgoing == Outgoing::Chunked {
            self.chunk_left -= data.len();
        }
        // Where the socket took less, the rest waits here: it is small.
        self.pending_start += written;
        if self.pending_start == self.pending.len() {
            self.release_pending();
        }
        Poll::Ready(Ok(data.len()))
    }

    pub fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.pending_start < self.pending.len() {
            let slices = [IoSlice::new(&self.pending[self.pending_start..])];
            let written = ready!(self.stream.poll_write_slices(context, &slices))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written = true;
            self.head_unsent = false;
            self.unflushed = self.stream.buffers_writes();
            self.pending_start += written;
            if self.pending_start == self.pending.len() {
                self.release_pending();
            }
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(context))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    pub fn poll_finish(
        &mut self,
        context: &mut Context<'_>,
        raw: bool,
        trailers: &mut Option<Box<Fields>>,
    ) -> Poll<io::Result<()>> {
        if !self.finished {
            self.finished = true;
            let terminator = self.outgoing == Outgoing::Chunked;
            let trailers = trailers.take();
            if terminator {
                self.pending_head().extend_from_slice(b"0\r\n");
            }
            match trailers {
                Some(trailers) if terminator || raw => http1::write_trailers(self.pending_head(), &trailers),
                _ if terminator => self.pending_head().extend_from_slice(b"\r\n"),
                _ => {}
            }
        }
        self.poll_flush(context)
    }

    /// Frees the memory of a head that has gone out, so that a stream does not keep it.
    fn release_pending(&mut self) {
        self.pending_start = 0;
        if self.pending.capacity() > 256 { self.pending = Vec::new() } else { self.pending.clear() }
    }

    /// Since it was made from its stream, something went out: the other side may have seen it.
    pub fn has_written(&self) -> bool {
        self.written
    }

    /// Nothing waits to be written.
    pub fn is_flushed(&self) -> bool {
        self.finished && self.pending_start == self.pending.len() && !self.unflushed
    }

    /// The connection, and what came in on it and was not claimed.
    pub fn into_parts(self) -> (Stream, Vec<u8>) {
        let unread = self.unread().to_vec();
        (self.stream, unread)
    }

    /// The connection, where nothing of what came in is left.
    #[inline(always)]
    pub fn into_stream(self) -> Stream {
        self.stream
    }

    pub fn into_closing(self) -> Closing {
        Closing { stream: self.stream, discarded: 0, shut: false }
    }

    /// Ends our half of the connection.
    pub fn poll_shutdown(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_flush(context))?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

fn set_trailers(aside: &mut Option<Box<Aside>>, trailers: Option<Fields>) {
    if trailers.is_some() || aside.is_some() {
        aside.get_or_insert_default().trailers = trailers;
    }
}

impl Closing {
    /// Bytes of an unwanted body that are thrown away before the connection is reset all the same.
    const DISCARDED_BYTES_MAX: usize = 1024 * 1024;

    /// Says that no more comes, then reads and forgets what the client still sends, until it ends (RFC 9112 section
    /// 9.6): a close with unread bytes would reset the connection and could destroy the answer on its way.
    pub fn poll_linger(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if !self.shut {
            let ended = ready!(Pin::new(&mut self.stream).poll_shutdown(context));
            self.shut = true;
            if ended.is_err() {
                return Poll::Ready(());
            }
        }
        loop {
            if ready!(self.stream.poll_read_ready(context)).is_err() {
                return Poll::Ready(());
            }
            let mut buffer = Buffer::take();
            match ready!(self.stream.poll_read_into(context, &mut buffer)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(count) => self.discarded += count,
            }
            if self.discarded > Self::DISCARDED_BYTES_MAX {
                return Poll::Ready(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;

    use super::*;
    use crate::net::stream::Plain;

    async fn peer_with(framing: Framing, wire: &[u8]) -> (Http1, UnixStream) {
        let (near, mut far) = UnixStream::pair().expect("a pair of sockets");
        far.write_all(wire).await.expect("room in the socket");
        let mut peer = Http1::new(Stream::Plain(Plain::Unix(near)));
        peer.expect_body(framing);
        let mut observer = Observer::default();
        let next = poll_fn(|context| peer.poll_next(context, false, &mut observer)).await;
        assert!(matches!(next, Ok(Next::Bytes)));
        (peer, far)
    }

    #[tokio::test]
    async fn an_end_is_seen_behind_more_than_the_buffer_holds() {
        let (near, mut far) = UnixStream::pair().expect("a pair of sockets");
        let sent = vec![b'x'; 3 * READ_BYTES];
        far.write_all(&sent).await.expect("room in the socket");
        let mut peer = Http1::new(Stream::Plain(Plain::Unix(near)));
        peer.expect_body(Framing::Length(sent.len() as u64));
        assert!(poll_fn(|context| Poll::Ready(peer.poll_gone(context))).await.is_pending());
        drop(far);
        let gone = tokio::time::timeout(std::time::Duration::from_secs(5), poll_fn(|context| peer.poll_gone(context)));
        gone.await.expect("it is seen");
        // Nothing of it is lost, and the second descriptor is closed with the end of the message.
        let mut observer = Observer::default();
        let mut read = 0;
        while let Ok(Next::Bytes) = poll_fn(|context| peer.poll_next(context, false, &mut observer)).await {
            let count = peer.held().len();
            read += count;
            peer.consume(count);
        }
        assert_eq!(read, sent.len());
        poll_fn(|context| peer.poll_gone(context)).await;
        assert!(peer.aside.is_none_or(|aside| aside.hang_up.is_none()));
    }

    /// A retry sends what is held, so looking whether the client is still there must not lose it.
    #[tokio::test]
    async fn what_is_held_stays_while_the_other_side_is_watched() {
        let (mut peer, mut far) = peer_with(Framing::Length(10), b"hello").await;
        for more in [&b""[..], b"wor"] {
            far.write_all(more).await.expect("room in the socket");
            let gone = poll_fn(|context| Poll::Ready(peer.poll_gone(context))).await;
            assert!(gone.is_pending());
            assert_eq!(peer.held(), b"hello");
        }
        drop(far);
        poll_fn(|context| peer.poll_gone(context)).await;
        assert_eq!(peer.held(), b"hello");
    }

    #[tokio::test]
    async fn what_is_put_back_comes_before_the_rest_of_what_was_put_back_before() {
        let (mut peer, _far) = peer_with(Framing::Length(5), b"c").await;
        peer.put_back(Bytes::from_static(b"ab"));
        peer.consume(1);
        peer.put_back(Bytes::from_static(b"a"));
        assert_eq!(peer.held(), b"ab");
        peer.consume(2);
        assert_eq!(peer.held(), b"c");
    }
}
