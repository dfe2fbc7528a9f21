//! Respond: an answer that the proxy makes itself, sent whole.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;

use crate::http1;
use crate::message::{Framing, ResponseHead, Version};
use crate::proxy::peer::{Peer, header_map};
use crate::proxy::timer::Timer;

/// How long a client may take to read such an answer.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// Sends head and body; whether the client took all of it.
pub async fn send(
    client: &mut Peer,
    head: &mut ResponseHead,
    body: Bytes,
    version: Version,
    close: bool,
    timer: &mut Timer,
) -> bool {
    let empty = body.is_empty();
    if begin(client, head, version, close, false, empty).is_err() {
        return false;
    }
    let mut left = body;
    let mut no_trailers = None;
    let deadline = crate::ids::now() + SEND_TIMEOUT;
    poll_fn(|context| {
        while !left.is_empty() {
            match client.poll_write(context, &left) {
                Poll::Ready(Ok(count)) => drop(left.split_to(count)),
                Poll::Ready(Err(_)) => return Poll::Ready(false),
                Poll::Pending => return timer.poll_passed(context, deadline).map(|()| false),
            }
        }
        match client.poll_finish(context, false, &mut no_trailers) {
            Poll::Ready(result) => Poll::Ready(result.is_ok()),
            Poll::Pending => timer.poll_passed(context, deadline).map(|()| false),
        }
    })
    .await
}

/// Writes a part of a body that was begun, and does not end it.
pub async fn write(client: &mut Peer, mut left: Bytes, timer: &mut Timer) {
    let deadline = crate::ids::now() + SEND_TIMEOUT;
    poll_fn(|context| {
        while !left.is_empty() {
            match client.poll_write(context, &left) {
                Poll::Ready(Ok(count)) => drop(left.split_to(count)),
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => return timer.poll_passed(context, deadline),
            }
        }
        match client.poll_flush(context) {
            Poll::Ready(_) => Poll::Ready(()),
            Poll::Pending => timer.poll_passed(context, deadline),
        }
    })
    .await;
}

/// Begins an answer on the client's side. `passes_chunks`: the endpoint's chunk framing is passed on as it is;
/// `end`: there is no body.
pub fn begin(
    client: &mut Peer,
    head: &mut ResponseHead,
    version: Version,
    close: bool,
    passes_chunks: bool,
    end: bool,
) -> std::io::Result<()> {
    match client {
        Peer::Nobody => Ok(()),
        Peer::Http1(peer) => {
            if version == Version::Http10 && head.framing == Framing::Chunked {
                // HTTP/1.0 knows no chunks (RFC 9112 section 7): the end of the connection ends the body.
                head.framing = Framing::Eof;
            }
            http1::write_response(peer.pending_head(), head, close);
            peer.begin_body(head.framing, passes_chunks);
            Ok(())
        }
        Peer::Http2(peer) => {
            let mut answer = http::Response::new(());
            *answer.status_mut() = head.status;
            *answer.headers_mut() = header_map(&head.fields);
            let length = match head.framing {
                Framing::Length(length) => Some(length),
                _ => head.declared_length,
            };
            if let Some(length) = length {
                answer.headers_mut().insert(http::header::CONTENT_LENGTH, length.into());
            }
            peer.send_response(answer, end)
        }
    }
}

/// The body of an answer to HEAD stays away, its length is told (RFC 9110 section 9.3.2).
pub fn for_caller(head_only: bool, head: &mut ResponseHead, body: Bytes) -> Bytes {
    if !head_only {
        return body;
    }
    head.declared_length = Some(body.len() as u64);
    head.framing = Framing::None;
    Bytes::new()
}
