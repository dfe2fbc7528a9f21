//! Upstream: a connection to an endpoint, taken from the pool or opened, and the endpoint's half of an exchange on it.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::ResponseFuture;
use http::{Method, Request};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::config::{EndpointHost, EndpointUrl, HttpVersion};
use crate::error::{Code, ProxyError};
use crate::http1::{self, HeadLimits};
use crate::message::{Fields, Framing, RequestHead, ResponseHead, Version};
use crate::net::stream::{Plain, Stream};
use crate::proxy::in_place;
use crate::proxy::peer::{HeadFault, Http1, Http2, Peer, fields, header_map};
use crate::proxy::pool::{Counted, Multiplexed, Pool, StreamCount};
use crate::state::Target;

/// Bounds of an endpoint's answer head.
const HEAD_LIMITS: HeadLimits = HeadLimits { max_bytes: 256 * 1024, max_fields: 256 };

/// What an endpoint may send ahead on one stream; more waits for the client to read.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// The same for all streams of a connection together.
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// What frames may cost beyond their bytes while they wait for clients to read, on one connection. Past it the connection
/// is closed with every stream on it, so there is room for many clients that hold back streams of single tokens.
const FRAME_OVERHEAD_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The endpoint's half of one exchange: owned, so that it can leave the client's task.
pub struct Upstream {
    pub peer: Peer,
    /// It is a kept HTTP/1.1 connection, which the endpoint may have been about to close.
    pub reused: bool,
    wire: Wire,
    /// The request is a HEAD: no body follows its answer.
    head: bool,
}

enum Wire {
    Http1 {
        counted: Counted,
    },
    /// Boxed to keep the usual case small: a silent HTTP/1.1 stream.
    Http2 {
        response: Option<Box<ResponseFuture>>,
        _stream: StreamCount,
    },
}

/// Why no answer head came.
pub struct Unanswered {
    /// The endpoint has seen nothing of the request: any request may be tried again.
    pub unsent: bool,
    /// It was the connection that could not be used any more (or for one more stream), which says nothing of its endpoint.
    pub connection_spent: bool,
    pub error: ProxyError,
}

/// A connection that is ready for a request head.
pub enum Connected {
    Http1 { stream: Stream, counted: Counted, reused: bool },
    Http2 { connection: Multiplexed, stream: StreamCount },
}

/// Opens a connection, within the connect time-out.
pub async fn connect(pool: &Pool, target: &Arc<Target>, connect_timeout: Duration) -> Result<Connected, ProxyError> {
    let limit_reached =
        || ProxyError::new(Code::Overloaded, format!("pool.max_connections to {} is reached", target.address));
    let opening = async {
        let counted = Counted::make_room(target).await.ok_or_else(limit_reached)?;
        open(pool, target, counted).await
    };
    match timeout(connect_timeout, opening).await {
        Ok(result) => result,
        Err(_) => Err(ProxyError::new(
            Code::ConnectTimeout,
            format!("{} did not accept the connection within {connect_timeout:?}", target.address),
        )),
    }
}

/// A connection at hand, without waiting.
pub fn pooled(pool: &Pool, target: &Arc<Target>) -> Option<Connected> {
    if target.http != HttpVersion::Http1
        && let Some((connection, stream)) = pool.share(target)
    {
        return Some(Connected::Http2 { connection, stream });
    }
    let (stream, counted) = pool.take(target)?;
    Some(Connected::Http1 { stream, counted, reused: true })
}

async fn open(pool: &Pool, target: &Arc<Target>, counted: Counted) -> Result<Connected, ProxyError> {
    let plain = open_plain(&target.url).await.map_err(|error| {
        ProxyError::new(Code::ConnectFailed, format!("could not connect to {}: {error}", target.address))
    })?;
    let stream = match &target.tls {
        None => Stream::Plain(plain),
        Some(tls) => {
            let connector = tokio_rustls::TlsConnector::from(tls.config.clone());
            let stream = connector.connect(tls.server_name.clone(), plain).await.map_err(|error| {
                ProxyError::new(Code::TlsFailed, format!("TLS handshake with {} failed: {error}", target.address))
            })?;
            Stream::TlsClient(Box::new(stream))
        }
    };
    let http2 = match target.http {
        HttpVersion::Http1 => false,
        HttpVersion::Http2 => true,
        HttpVersion::Auto => stream.negotiated_http2(),
    };
    if !http2 {
        return Ok(Connected::Http1 { stream, counted, reused: false });
    }
    let handshake = h2::client::Builder::new()
        .enable_push(false)
        .data_frame_budget(FRAME_OVERHEAD_BYTES_MAX)
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(HEAD_LIMITS.max_bytes as u32)
        // Until the endpoint has said how many streams it takes: more could wait behind the first to its end.
        .initial_max_send_streams(1)
        .handshake::<_, Bytes>(stream);
    let (sender, connection) = handshake.await.map_err(|error| {
        ProxyError::new(Code::ConnectFailed, format!("{} does not speak HTTP/2: {error}", target.address))
    })?;
    tokio::task::spawn_local(async move {
        // How it ended shows in the streams that were on it.
        let _ = connection.await;
        drop(counted);
    });
    let (connection, stream) = pool.add(target, sender);
    Ok(Connected::Http2 { connection, stream })
}

async fn open_plain(url: &EndpointUrl) -> io::Result<Plain> {
    match url {
        EndpointUrl::Unix(path) => Ok(Plain::Unix(UnixStream::connect(path).await?)),
        EndpointUrl::Tcp { host: EndpointHost::Ip(ip), port, .. } => {
            Plain::connect_tcp(SocketAddr::new(*ip, *port)).await
        }
        EndpointUrl::Tcp { host: EndpointHost::Name(name), port, .. } => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{name} has no address"));
            for address in tokio::net::lookup_host((name.as_str(), *port)).await? {
                match Plain::connect_tcp(address).await {
                    Ok(plain) => return Ok(plain),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

impl Upstream {
    /// Closes the exchange's connection (or stream) now, though what belongs to it is kept.
    pub fn hang_up(&mut self) {
        if let Peer::Http2(stream) = &mut self.peer {
            stream.reset(h2::Reason::CANCEL);
        }
        self.peer = Peer::Nobody;
    }

    /// Begins the exchange, in a box: it is large, and goes through several hands. The head is on its way (or waits for the
    /// first body bytes to go with it). `passes_chunks`: the client's own chunk framing will be passed on.
    pub async fn begin(
        connected: Connected,
        request: &RequestHead,
        host: &[u8],
        https: bool,
        passes_chunks: bool,
    ) -> Result<Box<Upstream>, Unanswered> {
        match connected {
            Connected::Http1 { stream, counted, reused } => {
                let mut upstream = in_place::boxed(|| Upstream {
                    peer: Peer::Http1(Http1::new(stream)),
                    reused,
                    wire: Wire::Http1 { counted },
                    head: request.method == Method::HEAD,
                });
                if let Peer::Http1(peer) = &mut upstream.peer {
                    http1::write_request(peer.pending_head(), request, host);
                    peer.begin_body(request.framing, passes_chunks);
                }
                Ok(upstream)
            }
            // Boxed, so that HTTP/1.1 does not make room for it.
            Connected::Http2 { connection, stream } => {
                Box::pin(Upstream::begin_stream(connection, stream, request, host, https)).await.map(Box::new)
            }
        }
    }

    /// As [`Upstream::begin`], as a stream of an HTTP/2 connection.
    async fn begin_stream(
        connection: Multiplexed,
        stream: StreamCount,
        request: &RequestHead,
        host: &[u8],
        https: bool,
    ) -> Result<Upstream, Unanswered> {
        let unsent = |error: h2::Error| Unanswered {
            unsent: true,
            connection_spent: true,
            error: ProxyError::new(Code::UpstreamReset, format!("the endpoint took no new stream: {error}")),
        };
        let mut sender = connection.sender.clone().ready().await.map_err(unsent)?;
        let end = matches!(request.framing, Framing::None | Framing::Length(0));
        let head = http2_request(request, host, https).map_err(|error| Unanswered {
            unsent: false,
            connection_spent: false,
            error: ProxyError::new(Code::BadRequest, format!("HTTP/2 can't carry this request: {error}")),
        })?;
        let (response, outgoing) = sender.send_request(head, end).map_err(unsent)?;
        let mut peer = Http2::client(outgoing);
        if end {
            peer.nothing_to_send();
        }
        Ok(Upstream {
            peer: Peer::Http2(Box::new(peer)),
            reused: false,
            wire: Wire::Http2 { response: Some(Box::new(response)), _stream: stream },
            head: request.method == Method::HEAD,
        })
    }

    /// The next answer head, interim ones too.
    pub fn poll_response(&mut self, context: &mut Context<'_>) -> Poll<Result<ResponseHead, Unanswered>> {
        match (&mut self.peer, &mut self.wire) {
            (Peer::Http1(peer), _) => {
                let head = match ready!(peer.poll_head(context, HEAD_LIMITS)) {
                    Ok(length) => peer
                        .take_response(length, HEAD_LIMITS, if self.head { &Method::HEAD } else { &Method::GET })
                        .map_err(HeadFault::Head),
                    Err(fault) => Err(fault),
                };
                Poll::Ready(head.map_err(|fault| Unanswered { unsent: !peer.has_written(), ..head_fault(fault) }))
            }
            (Peer::Http2(peer), Wire::Http2 { response, .. }) => {
                let Some(future) = response else { return Poll::Pending };
                match ready!(Pin::new(future).poll(context)) {
                    Ok(answer) => {
                        *response = None;
                        let (parts, body) = answer.into_parts();
                        let head = http2_response(&parts, body.is_end_stream(), self.head);
                        peer.receive(body, head.framing == Framing::None);
                        Poll::Ready(Ok(head))
                    }
                    Err(error) => {
                        // RFC 9113 section 8.7: refused streams, and those above the last of a GOAWAY, were not processed.
                        let unsent = error.is_remote()
                            && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM));
                        let detail = format!("the endpoint ended the stream before it answered: {error}");
                        Poll::Ready(Err(Unanswered {
                            unsent,
                            connection_spent: unsent,
                            error: ProxyError::new(Code::UpstreamReset, detail),
                        }))
                    }
                }
            }
            (Peer::Http2(_), Wire::Http1 { .. }) | (Peer::Nobody, _) => Poll::Pending,
        }
    }

    /// Gives the connection back to the pool, where the exchange has left it clean and the endpoint keeps it open.
    pub fn recycle(self: Box<Self>, pool: &Pool, keep_alive: bool) {
        let is_clean = matches!(&self.peer, Peer::Http1(peer) if peer.is_at_rest() && peer.is_flushed());
        if keep_alive
            && is_clean
            && let Upstream { peer: Peer::Http1(peer), wire: Wire::Http1 { counted }, .. } = *self
        {
            pool.put(peer.into_stream(), counted, crate::ids::now());
        }
    }
}

fn head_fault(fault: HeadFault) -> Unanswered {
    let detail = match fault {
        HeadFault::Closed { error: Some(error), .. } => format!("the connection broke before the answer: {error}"),
        HeadFault::Closed { error: None, clean: true } => "the endpoint closed the connection without an answer".into(),
        HeadFault::Closed { error: None, clean: false } => "the endpoint closed the connection within its head".into(),
        HeadFault::Head(http1::HeadError::TooLarge) => "the endpoint's answer head is too large".into(),
        HeadFault::Head(http1::HeadError::Malformed(reason)) => format!("the endpoint's answer is malformed: {reason}"),
    };
    Unanswered { unsent: false, connection_spent: false, error: ProxyError::new(Code::UpstreamReset, detail) }
}

fn http2_request(request: &RequestHead, host: &[u8], https: bool) -> Result<Request<()>, http::Error> {
    let target = match &request.query {
        Some(query) => format!("{}?{query}", request.path),
        None => request.path.clone(),
    };
    let uri = http::Uri::builder()
        .scheme(if https { "https" } else { "http" })
        .authority(host)
        .path_and_query(target)
        .build()?;
    let mut head = Request::builder().method(request.method.clone()).uri(uri).body(())?;
    *head.headers_mut() = header_map(&request.fields);
    if let Framing::Length(length) = request.framing {
        head.headers_mut().insert(http::header::CONTENT_LENGTH, length.into());
    }
    if request.accepts_trailers {
        head.headers_mut().insert(http::header::TE, http::HeaderValue::from_static("trailers"));
    }
    Ok(head)
}

fn http2_response(parts: &http::response::Parts, ended: bool, head: bool) -> ResponseHead {
    let mut fields: Fields = fields(&parts.headers);
    let length = parts.headers.get(http::header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    fields.remove("content-length");
    let bodiless = head || matches!(parts.status.as_u16(), 204 | 304);
    ResponseHead {
        status: parts.status,
        reason: None,
        version: Version::Http2,
        fields,
        framing: match length {
            _ if bodiless => Framing::None,
            Some(length) => Framing::Length(length),
            None if ended => Framing::Length(0),
            None => Framing::Chunked,
        },
        declared_length: if bodiless { length } else { None },
        keep_alive: true,
        upgrade: None,
    }
}
