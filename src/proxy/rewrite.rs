//! Rewrite: the answers whose bodies name their endpoint's own address, which clients must not use: agent cards (A2A),
//! and, below a `strip_prefix`, the first event of an HTTP+SSE stream (MCP 2024-11-05).

use std::future::poll_fn;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;

use crate::config::EndpointUrl;
use crate::message::{Framing, RequestHead, ResponseHead};
use crate::protocols::{self, Recognised, a2a};
use crate::proxy::identify;
use crate::proxy::observe::Observer;
use crate::proxy::peer::{Next, Peer};
use crate::proxy::timer::Timer;
use crate::snapshot::Recognition;
use crate::sse;

/// A larger card passes as it is.
const CARD_BYTES_MAX: usize = 256 * 1024;

/// A longer first event passes as it is.
const EVENT_BYTES_MAX: usize = 8 * 1024;

/// How long is waited for what is to be rewritten; then it passes as it is.
const WAIT: Duration = Duration::from_secs(5);

/// How the client sees the service.
pub struct Place<'a> {
    pub scheme: &'a str,
    pub authority: &'a str,
    /// The route's `strip_prefix`.
    pub prefix: Option<&'a str>,
}

/// Reads ahead in an answer that may have to be rewritten. What is returned comes before the rest of the body, in the place
/// of what was read.
#[expect(clippy::too_many_arguments, reason = "two conditions, what is to be read, and what that takes")]
pub async fn ahead(
    recognised: Option<&Recognised>,
    recognition: Recognition,
    outside: &Place<'_>,
    request: &RequestHead,
    endpoint: &EndpointUrl,
    answer: &mut ResponseHead,
    upstream: &mut Peer,
    timer: &mut Timer,
) -> Option<Bytes> {
    if matches!(recognition, Recognition::Http) || request.method != Method::GET || answer.status.as_u16() != 200 {
        return None;
    }
    let view = identify::view(request, None);
    if a2a::asks_for_card(&view) && protocols::is_json(&answer.fields) {
        let (read, whole) = read(upstream, timer, |read| read.len() > CARD_BYTES_MAX).await;
        if !whole {
            return Some(read.into());
        }
        let base = format!("{}://{}{}", outside.scheme, outside.authority, outside.prefix.unwrap_or_default());
        let rewritten = a2a::rewrite_card(&read, &origin(endpoint), base.trim_end_matches('/'));
        if rewritten.is_some() {
            // They told of the other bytes.
            answer.fields.remove("content-digest");
            answer.fields.remove("digest");
            answer.fields.remove("etag");
        }
        let body = rewritten.unwrap_or(read);
        answer.framing = Framing::Length(body.len() as u64);
        return Some(body.into());
    }
    let prefix = outside.prefix?;
    let speaks_mcp = recognised.and_then(|found| found.protocol).is_some_and(|protocol| protocol.name() == "mcp");
    if !speaks_mcp || !protocols::is_event_stream(&answer.fields) || request.fields.contains("mcp-session-id") {
        return None;
    }
    let mut reader = sse::Reader::default();
    let mut seen = 0;
    let mut first = None;
    let (read, _) = read(upstream, timer, |read| {
        reader.feed(&read[seen..], |event| {
            first.get_or_insert_with(|| (event.name == b"endpoint").then(|| event.data.to_vec()));
        });
        seen = read.len();
        first.is_some() || seen > EVENT_BYTES_MAX
    })
    .await;
    let rewritten = first.flatten().and_then(|data| {
        let address = protocols::rewrite_endpoint_event(&data, prefix)?;
        replace(&read, &data, &address)
    });
    Some(rewritten.unwrap_or(read).into())
}

/// Reads until there is enough, the body ends (true), or it takes too long.
async fn read(upstream: &mut Peer, timer: &mut Timer, mut enough: impl FnMut(&[u8]) -> bool) -> (Vec<u8>, bool) {
    let mut read = Vec::new();
    let mut unobserved = Observer::default();
    let deadline: Instant = crate::ids::now() + WAIT;
    let whole = poll_fn(|context| {
        loop {
            match upstream.poll_next(context, false, &mut unobserved) {
                Poll::Ready(Ok(Next::Bytes)) => {
                    let bytes = upstream.held();
                    read.extend_from_slice(bytes);
                    let count = bytes.len();
                    upstream.consume(count);
                    if enough(&read) {
                        return Poll::Ready(false);
                    }
                }
                Poll::Ready(Ok(Next::End(trailers))) => {
                    upstream.put_back_trailers(trailers);
                    return Poll::Ready(true);
                }
                // It comes again, and ends the answer where it is.
                Poll::Ready(Err(_)) => return Poll::Ready(false),
                Poll::Pending => return timer.poll_passed(context, deadline).map(|()| false),
            }
        }
    })
    .await;
    (read, whole)
}

/// `text` with the first `old` in it replaced.
fn replace(text: &[u8], old: &[u8], new: &[u8]) -> Option<Vec<u8>> {
    let at = memchr::memmem::find(text, old)?;
    Some([&text[..at], new, &text[at + old.len()..]].concat())
}

/// `http://host:port`, as an agent would write where it is.
fn origin(endpoint: &EndpointUrl) -> String {
    match endpoint {
        EndpointUrl::Tcp { .. } => endpoint.identity(),
        EndpointUrl::Unix(_) => "http://localhost".to_owned(),
    }
}
