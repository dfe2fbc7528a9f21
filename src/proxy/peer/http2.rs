//! The HTTP/2 side: one stream of a connection. The connection's own task does the input and output; here bytes are
//! taken from it and handed to it under its flow control.

use std::io;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};

use crate::http1;
use crate::message::Fields;
use crate::proxy::observe::Observer;
use crate::proxy::peer::{Next, SourceFault};

/// One stream of an HTTP/2 connection.
pub struct Http2 {
    incoming: Option<RecvStream>,
    /// `incoming` until the other side has agreed to be a tunnel.
    held_back: Option<RecvStream>,
    /// What came in and was not written to the other side yet.
    held: Bytes,
    /// Held bytes that flow control counts; those read ahead were released when they were read.
    counted: usize,
    ended: bool,
    /// What comes in has no body, by its method or status.
    bodiless: bool,
    /// Those that were read ahead.
    trailers: Option<Fields>,
    outgoing: Option<SendStream<Bytes>>,
    /// Before the answer was begun a server's stream has this instead of `outgoing`.
    respond: Option<h2::server::SendResponse<Bytes>>,
    /// The end of what we send has been marked.
    outgoing_ended: bool,
}

impl Http2 {
    /// The client's side of a stream that it opened on us.
    pub fn server(incoming: RecvStream, respond: h2::server::SendResponse<Bytes>) -> Http2 {
        let ended = incoming.is_end_stream();
        Http2 {
            incoming: Some(incoming),
            held_back: None,
            held: Bytes::new(),
            counted: 0,
            ended,
            bodiless: false,
            trailers: None,
            outgoing: None,
            respond: Some(respond),
            outgoing_ended: false,
        }
    }

    /// The endpoint's side of a stream that we opened; what comes in is set by [`Http2::receive`].
    pub fn client(outgoing: SendStream<Bytes>) -> Http2 {
        Http2 {
            incoming: None,
            held_back: None,
            held: Bytes::new(),
            counted: 0,
            ended: false,
            bodiless: false,
            trailers: None,
            outgoing: Some(outgoing),
            respond: None,
            outgoing_ended: false,
        }
    }

    /// An extended CONNECT (RFC 8441): what the client sends is no body but the tunnel's, and must not pass before the
    /// endpoint has switched. Flow control holds it back.
    pub fn hold_back(&mut self) {
        self.held_back = self.incoming.take();
        self.ended = true;
    }

    pub fn become_tunnel(&mut self) {
        if let Some(incoming) = self.held_back.take() {
            self.incoming = Some(incoming);
            self.ended = false;
        }
    }

    /// The head was all there is to send.
    pub fn nothing_to_send(&mut self) {
        self.outgoing_ended = true;
    }

    /// The answer's body; `bodiless`: there must be none.
    pub fn receive(&mut self, incoming: RecvStream, bodiless: bool) {
        self.bodiless = bodiless;
        self.ended = incoming.is_end_stream();
        self.incoming = Some(incoming);
    }

    /// Begins the answer; `end`: it has no body.
    pub fn send_response(&mut self, head: http::Response<()>, end: bool) -> io::Result<()> {
        let Some(mut respond) = self.respond.take() else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let outgoing = respond.send_response(head, end).map_err(io::Error::other)?;
        self.outgoing = (!end).then_some(outgoing);
        if end {
            // Kept so that a reset by the client is still seen while its request body goes on.
            self.respond = Some(respond);
        }
        Ok(())
    }

    /// Sends an interim answer (1xx).
    pub fn send_informational(&mut self, head: http::Response<()>) {
        if let Some(respond) = &mut self.respond {
            // An interim answer may be lost; the final one tells the same.
            let _ = respond.send_informational(head);
        }
    }

    pub fn put_back(&mut self, ahead: Bytes) {
        // What is held came after it.
        self.held = if self.held.is_empty() { ahead } else { [&*ahead, &*self.held].concat().into() };
    }

    pub fn put_back_trailers(&mut self, trailers: Option<Fields>) {
        self.trailers = trailers;
    }

    pub fn poll_next(&mut self, context: &mut Context<'_>, observer: &mut Observer) -> Poll<Result<Next, SourceFault>> {
        loop {
            if !self.held.is_empty() {
                return Poll::Ready(Ok(Next::Bytes));
            }
            let Some(incoming) = &mut self.incoming else { return Poll::Ready(Ok(Next::End(self.trailers.take()))) };
            match ready!(incoming.poll_data(context)) {
                // On HTTP/1.1 it would be taken for the next answer.
                Some(Ok(data)) if self.bodiless && !data.is_empty() => {
                    return Poll::Ready(Err(SourceFault::Malformed("data behind an answer that has no body")));
                }
                Some(Ok(data)) => {
                    observer.observe(&data);
                    self.counted = data.len();
                    self.held = data;
                    self.ended = incoming.is_end_stream();
                }
                Some(Err(error)) => return Poll::Ready(Err(cut(error))),
                None => {
                    let trailers = ready!(incoming.poll_trailers(context)).map_err(cut)?;
                    self.incoming = None;
                    self.ended = true;
                    return Poll::Ready(Ok(Next::End(trailers.map(|map| {
                        let mut trailers = fields(&map);
                        trailers.retain(|name, _| http1::may_be_trailer(name));
                        trailers
                    }))));
                }
            }
        }
    }

    pub fn held(&self) -> &[u8] {
        &self.held
    }

    pub fn consume(&mut self, count: usize) {
        let _ = self.held.split_to(count);
        let counted = count.min(self.counted);
        self.counted -= counted;
        if counted > 0
            && let Some(incoming) = &mut self.incoming
        {
            // Fails only where the stream is gone, which the next read tells.
            let _ = incoming.flow_control().release_capacity(counted);
        }
        if self.held.is_empty() {
            self.held = Bytes::new();
        }
    }

    pub fn source_ended(&self) -> bool {
        self.ended
    }

    pub fn poll_write(&mut self, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let Some(outgoing) = &mut self.outgoing else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
        outgoing.reserve_capacity(data.len());
        while outgoing.capacity() == 0 {
            match ready!(outgoing.poll_capacity(context)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let count = outgoing.capacity().min(data.len());
        outgoing.send_data(Bytes::copy_from_slice(&data[..count]), false).map_err(io::Error::other)?;
        Poll::Ready(Ok(count))
    }

    pub fn finish(&mut self, trailers: Option<Fields>) -> io::Result<()> {
        let Some(outgoing) = &mut self.outgoing else { return Ok(()) };
        if std::mem::replace(&mut self.outgoing_ended, true) {
            return Ok(());
        }
        match trailers {
            Some(trailers) if !trailers.is_empty() => outgoing.send_trailers(header_map(&trailers)),
            _ => outgoing.send_data(Bytes::new(), true),
        }
        .map_err(io::Error::other)
    }

    /// Ends the stream visibly unfinished.
    pub fn reset(&mut self, reason: Reason) {
        if let Some(mut outgoing) = self.outgoing.take() {
            outgoing.send_reset(reason);
        }
        if let Some(mut respond) = self.respond.take() {
            respond.send_reset(reason);
        }
    }

    pub fn poll_gone(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let reset = match (&mut self.outgoing, &mut self.respond) {
            (Some(outgoing), _) => outgoing.poll_reset(context).map(|_| ()),
            (None, Some(respond)) => respond.poll_reset(context).map(|_| ()),
            (None, None) => Poll::Pending,
        };
        ready!(reset);
        Poll::Ready(())
    }
}

fn cut(error: h2::Error) -> SourceFault {
    SourceFault::Cut(io::Error::other(error))
}

/// A field section as HTTP/2 has it, in our form.
pub fn fields(map: &http::HeaderMap) -> Fields {
    let bytes = map.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let mut fields = Fields::with_capacity(bytes, map.len());
    for (name, value) in map {
        fields.push(name.as_str().as_bytes(), value.as_bytes());
    }
    fields
}

/// Our form as HTTP/2 wants it: names in lower case (RFC 9113 section 8.2).
pub fn header_map(fields: &Fields) -> http::HeaderMap {
    let mut map = http::HeaderMap::with_capacity(fields.len());
    for (name, value) in fields.iter() {
        // Both were read strictly before; what HTTP/2 can't carry all the same is left out.
        if let (Ok(name), Ok(value)) = (http::HeaderName::from_bytes(name), http::HeaderValue::from_bytes(value)) {
            map.append(name, value);
        }
    }
    map
}
