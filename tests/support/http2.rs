//! HTTP/2: the backend's other half and a client, both on the h2 crate.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{Request as HttpRequest, Response as HttpResponse, StatusCode};
use tokio::net::TcpStream;

use super::backend::{Body, Request, Script, Shared, Step};
use super::client::{Head, Response};
use super::{Io, eventually, within};

/// One HTTP/2 connection to the proxy.
pub struct Http2Client {
    sender: h2::client::SendRequest<Bytes>,
    connection: tokio::task::JoinHandle<()>,
}

/// An open exchange of a [`Http2Client`].
pub struct Http2Stream {
    pub send: SendStream<Bytes>,
    response: h2::client::ResponseFuture,
}

impl Http2Client {
    /// With prior knowledge.
    pub async fn connect(address: SocketAddr) -> Http2Client {
        let stream = within("connect", TcpStream::connect(address)).await.expect("something listens");
        stream.set_nodelay(true).expect("a TCP socket");
        Http2Client::over(stream).await
    }

    pub async fn connect_tls(address: SocketAddr, name: &str, config: Arc<rustls::ClientConfig>) -> Http2Client {
        let stream = within("connect", TcpStream::connect(address)).await.expect("something listens");
        let name = rustls::pki_types::ServerName::try_from(name.to_owned()).expect("a server name");
        let connecting = tokio_rustls::TlsConnector::from(config).connect(name, stream);
        let stream = within("TLS handshake", connecting).await.expect("TLS handshake");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()), "ALPN");
        Http2Client::over(stream).await
    }

    pub async fn over(io: impl Io + 'static) -> Http2Client {
        let mut builder = h2::client::Builder::new();
        // So that a stream that a test leaves unread does not use up what is meant for all.
        builder.initial_connection_window_size(16 * 1024 * 1024).data_frame_budget(1 << 30);
        let (sender, connection) = within("HTTP/2 handshake", builder.handshake(io)).await.expect("a peer of HTTP/2");
        let connection = tokio::spawn(async move {
            // Its errors show at the streams.
            let _ = connection.await;
        });
        Http2Client { sender, connection }
    }

    /// Opens an exchange; `end`: the request has no body.
    pub async fn open(&self, request: HttpRequest<()>, end: bool) -> Http2Stream {
        let mut sender = within("room for a stream", self.sender.clone().ready()).await.expect("an open connection");
        let (response, send) = sender.send_request(request, end).expect("a valid request");
        Http2Stream { send, response }
    }

    /// As [`Http2Client::open`] for an extended CONNECT (RFC 8441), which the peer has to allow first.
    pub async fn open_extended(&self, request: HttpRequest<()>) -> Http2Stream {
        eventually("the peer's settings allow extended CONNECT", || self.sender.is_extended_connect_protocol_enabled())
            .await;
        self.open(request, false).await
    }

    /// As [`Http2Client::open`] without a body, for a connection that may take no more streams.
    pub async fn try_open(&self, request: HttpRequest<()>) -> Result<Http2Stream, h2::Error> {
        let mut sender = within("room for a stream", self.sender.clone().ready()).await?;
        let (response, send) = sender.send_request(request, true)?;
        Ok(Http2Stream { send, response })
    }

    /// One whole exchange.
    pub async fn fetch(&self, request: HttpRequest<()>, body: &[u8]) -> Response {
        self.fetch_with(request, body, &[]).await
    }

    /// As [`Http2Client::fetch`], with trailers behind the body.
    pub async fn fetch_with(&self, request: HttpRequest<()>, body: &[u8], trailers: &[(&str, &str)]) -> Response {
        let nothing = body.is_empty() && trailers.is_empty();
        let Http2Stream { mut send, response } = self.open(request, nothing).await;
        let sending = async {
            if !nothing && send_all(&mut send, body, trailers.is_empty()).await && !trailers.is_empty() {
                let mut map = http::HeaderMap::new();
                for (name, value) in trailers {
                    let name = http::HeaderName::try_from(*name).expect("a field name");
                    map.append(name, value.parse().expect("a field value"));
                }
                // Where the stream was reset, the answer shows it.
                let _ = send.send_trailers(map);
            }
            // The answer is the end of the exchange, whether or not it waited for the body.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            response = receive(response) => response,
            () = sending => unreachable!("it never ends"),
        }
    }

    /// Closes the connection at once.
    pub fn abort(&self) {
        self.connection.abort();
    }
}

impl Drop for Http2Client {
    fn drop(&mut self) {
        self.abort();
    }
}

impl Http2Stream {
    /// Sends body bytes as flow control lets them.
    pub async fn send(&mut self, bytes: &[u8], end: bool) {
        assert!(within("flow control", send_all(&mut self.send, bytes, end)).await, "the stream was reset");
    }

    /// Gives the stream up with RST_STREAM.
    pub fn reset(&mut self) {
        self.send.send_reset(h2::Reason::CANCEL);
    }

    /// As [`Http2Stream::head`], keeping the sending half.
    pub async fn response(&mut self) -> (Head, RecvStream) {
        let (parts, receive) = within("response head", &mut self.response).await.expect("a response").into_parts();
        (Head { status: parts.status.as_u16(), headers: pairs(&parts.headers), raw: Vec::new() }, receive)
    }

    /// Both halves: what is sent, and the response to come.
    pub fn split(self) -> (SendStream<Bytes>, h2::client::ResponseFuture) {
        (self.send, self.response)
    }

    /// The response's head, and where its body comes from.
    pub async fn head(self) -> (Head, RecvStream) {
        self.try_head().await.expect("a response")
    }

    pub async fn try_head(self) -> Result<(Head, RecvStream), h2::Error> {
        let (parts, receive) = within("response head", self.response).await?.into_parts();
        Ok((Head { status: parts.status.as_u16(), headers: pairs(&parts.headers), raw: Vec::new() }, receive))
    }
}

async fn receive(response: h2::client::ResponseFuture) -> Response {
    let (parts, mut receive) = within("response head", response).await.expect("a response").into_parts();
    let head = Head { status: parts.status.as_u16(), headers: pairs(&parts.headers), raw: Vec::new() };
    let mut response = Response { head, body: Vec::new(), trailers: Vec::new(), truncated: false };
    while let Some(data) = within("data", receive.data()).await {
        let Ok(data) = data else {
            response.truncated = true;
            return response;
        };
        let _ = receive.flow_control().release_capacity(data.len());
        response.body.extend_from_slice(&data);
    }
    match within("trailers", receive.trailers()).await {
        Ok(trailers) => response.trailers = trailers.map(|map| pairs(&map)).unwrap_or_default(),
        Err(_) => response.truncated = true,
    }
    response
}

/// A request head of HTTP/2 for `path`.
pub fn request(method: &str, address: SocketAddr, path: &str) -> HttpRequest<()> {
    HttpRequest::builder().method(method).uri(format!("http://{address}{path}")).body(()).expect("a valid request")
}

/// Serves one connection by the backend's scripts.
pub(super) async fn serve(io: Box<dyn Io>, shared: Arc<Shared>) {
    let (number, _counted) = shared.connected();
    let work = async {
        let mut builder = h2::server::Builder::new();
        // So that a stream that a script leaves unread does not use up what is meant for all.
        builder.enable_connect_protocol().initial_connection_window_size(16 * 1024 * 1024).data_frame_budget(1 << 30);
        let Ok(mut connection) = builder.handshake::<_, Bytes>(io).await else { return };
        let mut exchanges = tokio::task::JoinSet::new();
        while let Some(Ok((request, respond))) = connection.accept().await {
            exchanges.spawn(exchange(request, respond, number, Arc::clone(&shared)));
        }
    };
    tokio::select! {
        () = work => {}
        () = shared.cut() => {}
    }
}

async fn exchange(
    request: HttpRequest<RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    connection: usize,
    shared: Arc<Shared>,
) {
    let (parts, mut body) = request.into_parts();
    let record = Request {
        method: parts.method.to_string(),
        target: parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
        authority: parts.uri.authority().map(ToString::to_string).unwrap_or_default(),
        headers: pairs(&parts.headers),
        body_complete: body.is_end_stream(),
        connection,
        ..Request::default()
    };
    let (index, script, _in_flight) = shared.arrived(record);
    let mut sending = None;
    for step in script.0 {
        if perform(step, &mut respond, &mut body, &mut sending, index, &shared).await.is_none() {
            break;
        }
    }
}

/// `None`: the stream is at its end, well or badly.
async fn perform(
    step: Step,
    respond: &mut h2::server::SendResponse<Bytes>,
    body: &mut RecvStream,
    sending: &mut Option<SendStream<Bytes>>,
    index: usize,
    shared: &Arc<Shared>,
) -> Option<()> {
    match step {
        Step::ReadBody => while read_part(body, index, shared).await?.is_some() {},
        Step::Head { status, headers, body } => {
            let mut response = HttpResponse::builder().status(StatusCode::from_u16(status).expect("a status"));
            for (name, value) in headers {
                response = response.header(name, value);
            }
            if let Body::Length(length) = body {
                response = response.header("content-length", length);
            }
            let response = response.body(()).expect("a valid head");
            *sending = Some(respond.send_response(response, body == Body::None).ok()?);
        }
        Step::Data(data) => send_all(sending.as_mut()?, &data, false).await.then_some(())?,
        Step::End => sending.as_mut()?.send_data(Bytes::new(), true).ok()?,
        Step::Trailers(trailers) => {
            let mut map = http::HeaderMap::new();
            for (name, value) in trailers {
                let name = http::HeaderName::try_from(name).expect("a field name");
                map.append(name, value.parse().expect("a field value"));
            }
            sending.as_mut()?.send_trailers(map).ok()?;
        }
        Step::EchoBody => {
            while let Some(part) = read_part(body, index, shared).await? {
                send_all(sending.as_mut()?, &part, false).await.then_some(())?;
            }
            sending.as_mut()?.send_data(Bytes::new(), true).ok()?;
        }
        Step::Wait(gate) | Step::Stall(gate) => {
            let gone = std::future::poll_fn(|context| match sending.as_mut() {
                Some(stream) => stream.poll_reset(context),
                None => respond.poll_reset(context),
            });
            tokio::select! {
                () = gate.opened() => {}
                _reset = gone => return None,
            }
        }
        Step::Follow(mut steps, fate) => loop {
            let stream = sending.as_mut()?;
            let step = tokio::select! {
                biased;
                step = steps.recv() => step,
                _reset = std::future::poll_fn(|context| stream.poll_reset(context)) => {
                    fate.gone.store(true, Ordering::SeqCst);
                    return None;
                }
            };
            let Some(step) = step else {
                respond.send_reset(h2::Reason::INTERNAL_ERROR);
                return None;
            };
            let last = matches!(step, Step::End | Step::Trailers(_));
            let done = Box::pin(perform(step, respond, body, sending, index, shared)).await;
            if done.is_none() {
                fate.gone.store(true, Ordering::SeqCst);
                return None;
            }
            if last {
                return Some(());
            }
        },
        Step::Close | Step::Reset => {
            match sending {
                Some(stream) => stream.send_reset(h2::Reason::INTERNAL_ERROR),
                None => respond.send_reset(h2::Reason::INTERNAL_ERROR),
            }
            return None;
        }
        Step::Raw(_) | Step::Tunnel => panic!("raw bytes are HTTP/1.1's"),
    }
    Some(())
}

/// Outer `None`: the stream was reset; inner: its end.
async fn read_part(body: &mut RecvStream, index: usize, shared: &Arc<Shared>) -> Option<Option<Bytes>> {
    match body.data().await {
        Some(Ok(data)) => {
            let _ = body.flow_control().release_capacity(data.len());
            shared.record(index, |request| request.body.extend_from_slice(&data));
            Some(Some(data))
        }
        Some(Err(_)) => None,
        None => {
            let trailers = body.trailers().await.ok()?;
            shared.record(index, |request| {
                request.body_complete = true;
                request.trailers = trailers.map(|map| pairs(&map)).unwrap_or_default();
            });
            Some(None)
        }
    }
}

/// `false`: the stream was reset meanwhile.
async fn send_all(stream: &mut SendStream<Bytes>, bytes: &[u8], end: bool) -> bool {
    let mut rest = Bytes::copy_from_slice(bytes);
    while !rest.is_empty() {
        stream.reserve_capacity(rest.len());
        match std::future::poll_fn(|context| stream.poll_capacity(context)).await {
            Some(Ok(0)) => {}
            Some(Ok(room)) => {
                let part = rest.split_to(room.min(rest.len()));
                if stream.send_data(part, false).is_err() {
                    return false;
                }
            }
            Some(Err(_)) | None => return false,
        }
    }
    !end || stream.send_data(Bytes::new(), true).is_ok()
}

fn pairs(map: &http::HeaderMap) -> Vec<(String, String)> {
    map.iter().map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())).collect()
}
