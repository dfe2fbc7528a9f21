//! Step 3 for HTTP/2: serves a client's connection; each of its streams is an exchange with a task of its own.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::RecvStream;
use h2::ext::Protocol;
use h2::server::SendResponse;
use http::{Method, Request};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::timeout;

use crate::drain::Phase;
use crate::http1;
use crate::message::{Fields, Framing, RequestHead, Version};
use crate::net::stream::Stream;
use crate::proxy;
use crate::proxy::account::OpenExchange;
use crate::proxy::connection::Connection;
use crate::proxy::peer::{Http2, Peer};
use crate::proxy::timer::Timer;
use crate::proxy::worker::Load;

/// What a stream may send ahead of the endpoint's reading.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// The same for all streams of a connection together.
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// Answer bytes of a stream that may wait for the client; then the endpoint is held back.
const SEND_BUFFER_BYTES_MAX: usize = 64 * 1024;

/// So much longer than `limits.max_header_bytes` a head may be to be read all the same, so that the answer to it is an
/// error of ours, logged and counted. To what is longer yet the h2 crate answers by itself, 431 and no more.
const OVERSIZE_BYTES: usize = 128 * 1024;

/// What a field takes besides its bytes (RFC 9113 section 6.5.2).
const FIELD_OVERHEAD_BYTES: usize = 32;

/// How long a connection that was told to close may stay without a stream: its client may have sent a request before it
/// heard of it, and the last bytes may still be on their way.
const GOODBYE: Duration = Duration::from_secs(2);

/// How long after GOAWAY a request may arrive that its client sent before it had read that (RFC 9113 section 6.8). A start
/// that comes later is refused.
const HEARD: Duration = Duration::from_secs(1);

/// Serves HTTP/2 until the client leaves, nothing happens for the keep-alive time-out, or the proxy drains.
pub async fn serve(connection: Rc<Connection>, stream: Stream, unread: Vec<u8>) {
    let listener = connection.listener();
    let limits = &listener.config.limits;
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(limits.max_streams_per_connection)
        .max_header_list_size(u32::try_from(limits.max_header_bytes + OVERSIZE_BYTES).unwrap_or(u32::MAX))
        .max_send_buffer_size(SEND_BUFFER_BYTES_MAX)
        .enable_connect_protocol();
    let io = Rewound { unread: Bytes::from(unread), stream };
    let mut http2 = match timeout(limits.header_timeout, builder.handshake::<_, Bytes>(io)).await {
        Ok(Ok(http2)) => http2,
        Ok(Err(_)) | Err(_) => return,
    };
    let mut timer = Timer::new(listener.config.keepalive_timeout);
    let draining = connection.worker.running.drain.reached(Phase::Draining);
    tokio::pin!(draining);
    let mut quiet_since = None;
    // Told to close (GOAWAY). The drain waits for the connection's own end, which comes when the client has heard of it
    // and its last stream has gone out: the exchange's end is only where its bytes were handed to this task.
    let mut told: Option<(OpenExchange, Instant)> = None;
    loop {
        let patience = if told.is_some() { GOODBYE } else { connection.listener().config.keepalive_timeout };
        let accepted = poll_fn(|context| {
            if let Poll::Ready(accepted) = http2.poll_accept(context) {
                return Poll::Ready(Some(accepted));
            }
            if told.is_none() && draining.as_mut().poll(context).is_ready() {
                return Poll::Ready(None);
            }
            if http2.has_streams() {
                quiet_since = None;
                return Poll::Pending;
            }
            let quiet_deadline = *quiet_since.get_or_insert_with(crate::ids::now) + patience;
            timer.poll_passed(context, quiet_deadline).map(|()| None)
        })
        .await;
        let tell = match accepted {
            Some(Some(Ok((request, respond)))) => {
                if told.as_ref().is_some_and(|(_, at)| crate::ids::now().saturating_duration_since(*at) >= HEARD) {
                    connection.warn();
                }
                let of_stream = connection.clone();
                tokio::task::spawn_local(async move {
                    Box::pin(serve_stream(&of_stream, request, respond)).await;
                });
                connection.told_to_close()
            }
            Some(Some(Err(_)) | None) => return,
            None if told.is_some() => return,
            None => true,
        };
        if tell && told.is_none() {
            told = Some((OpenExchange::new(&connection.worker), crate::ids::now()));
            quiet_since = None;
            http2.graceful_shutdown();
        }
    }
}

async fn serve_stream(connection: &Connection, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    let _load = Load::new(&connection.worker.load);
    let (parts, body) = request.into_parts();
    let tunnel = parts.extensions.get::<Protocol>().is_some();
    let head = match request_head(parts, body.is_end_stream()) {
        Ok(head) => head,
        Err(_) => {
            // RFC 9113 section 8.1.1: a malformed request is a stream error.
            respond.send_reset(h2::Reason::PROTOCOL_ERROR);
            return;
        }
    };
    let mut http2 = Http2::server(body, respond);
    if tunnel {
        http2.hold_back();
    }
    let mut client = Peer::Http2(Box::new(http2));
    let mut timer = Timer::new(connection.listener().config.keepalive_timeout);
    proxy::exchange(connection, &mut client, Box::new(head), &mut timer).await;
}

/// How long a head is, as HTTP/2 counts (RFC 9113 section 6.5.2); pseudo-header fields without their names.
pub fn head_bytes(head: &RequestHead) -> usize {
    let query = head.query.as_ref().map_or(0, |query| 1 + query.len());
    let start = head.method.as_str().len() + head.path.len() + query + head.authority.len();
    start + head.fields.iter().map(|(name, value)| name.len() + value.len() + FIELD_OVERHEAD_BYTES).sum::<usize>()
}

/// Reads an HTTP/2 request head as strictly as an HTTP/1.1 one.
fn request_head(parts: http::request::Parts, ended: bool) -> Result<RequestHead, &'static str> {
    let protocol = parts.extensions.get::<Protocol>();
    let extended_connect = parts.method == Method::CONNECT && protocol.is_some();
    if parts.method == Method::CONNECT && !extended_connect {
        return Err("CONNECT asks for a forward proxy");
    }
    let target = parts.uri.path_and_query().map_or("", |target| target.as_str());
    let (path, query) = match target {
        "*" if parts.method == Method::OPTIONS => ("*".to_owned(), None),
        target => http1::normalise_target(target).map_err(|_| "the path is malformed")?,
    };
    let mut fields = Fields::with_capacity(512, parts.headers.len());
    let mut host = None;
    let mut framing = if ended { Framing::None } else { Framing::Chunked };
    let mut cookies: Vec<u8> = Vec::new();
    let mut accepts_trailers = false;
    let mut expect_continue = false;
    for (name, value) in &parts.headers {
        let value = value.as_bytes();
        match name.as_str() {
            "host" if host.is_some() => return Err("Host comes twice"),
            "host" => host = Some(value),
            "content-length" => {
                let length = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                // The h2 crate has checked that it is one number and that the body will be held to it.
                framing = Framing::Length(length.ok_or("content-length is no number")?);
            }
            // Crumbs become one field again (RFC 9113 section 8.2.3).
            "cookie" => {
                if !cookies.is_empty() {
                    cookies.extend_from_slice(b"; ");
                }
                cookies.extend_from_slice(value);
            }
            "te" => accepts_trailers = value.eq_ignore_ascii_case(b"trailers"),
            "expect" => expect_continue = value.eq_ignore_ascii_case(b"100-continue"),
            "connection" | "keep-alive" | "proxy-connection" | "transfer-encoding" | "upgrade" => {
                return Err("a connection-specific field in HTTP/2");
            }
            name => fields.push(name.as_bytes(), value),
        }
    }
    if !cookies.is_empty() {
        fields.push(b"cookie", &cookies);
    }
    let authority = parts.uri.authority().map(|authority| authority.as_str().as_bytes());
    let authority = match (authority, host) {
        (Some(authority), Some(host)) if !authority.eq_ignore_ascii_case(host) => {
            return Err(":authority contradicts Host");
        }
        (Some(authority), _) => authority,
        (None, Some(host)) => host,
        (None, None) => return Err("neither :authority nor Host"),
    };
    if !http1::valid_authority(authority) {
        return Err("the authority is malformed");
    }
    let upgrade = protocol.map(|protocol| protocol.as_str().to_owned());
    Ok(RequestHead {
        // An extended CONNECT goes on as the HTTP/1.1 Upgrade that it stands for (RFC 8441 section 5).
        method: if extended_connect { Method::GET } else { parts.method },
        path,
        query,
        authority: String::from_utf8_lossy(authority).into_owned(),
        version: Version::Http2,
        fields,
        framing: if extended_connect { Framing::None } else { framing },
        keep_alive: true,
        upgrade,
        expect_continue,
        accepts_trailers,
    })
}

/// A stream with bytes that were read from it too early put back in front.
struct Rewound {
    unread: Bytes,
    stream: Stream,
}

impl AsyncRead for Rewound {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, buffer);
        }
        let count = self.unread.len().min(buffer.remaining());
        buffer.put_slice(&self.unread.split_to(count));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewound {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
