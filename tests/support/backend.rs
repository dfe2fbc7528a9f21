//! Backend: an endpoint whose every byte the test decides, and which remembers everything it was sent.
//!
//! It speaks HTTP/1.1 by itself on plain sockets, so that it can be as wrong as a test wants it; HTTP/2 is the h2
//! crate's. What it does with a request is a [`Script`]: a list of [`Step`]s.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::{Certificate, Io, eventually, head_end, header, http2, within};

/// Bytes that a backend takes ahead of its script while it waits.
const READ_AHEAD_BYTES_MAX: usize = 64 * 1024;

/// What a backend does with one request. After the last step the connection waits for the next request.
#[derive(Debug)]
pub struct Script(pub Vec<Step>);

/// One thing that a backend does.
#[derive(Debug)]
pub enum Step {
    /// Reads the request's body to its end.
    ReadBody,
    /// Writes a response head.
    Head { status: u16, headers: Vec<(String, String)>, body: Body },
    /// Writes body bytes, in one chunk where the head said [`Body::Chunked`].
    Data(Vec<u8>),
    /// Ends the body.
    End,
    /// Ends a chunked body with trailers.
    Trailers(Vec<(String, String)>),
    /// Writes these bytes as they are (HTTP/1.1 only).
    Raw(Vec<u8>),
    /// Sends the request's body back as it comes, with its end.
    EchoBody,
    /// Sends every byte back until the peer ends (HTTP/1.1 only): the life of a connection after 101.
    Tunnel,
    /// Waits until the gate opens, noticing when the peer goes.
    Wait(Gate),
    /// As `Wait`, without reading from the connection: the peer's writes come to a halt.
    Stall(Gate),
    /// Does what the test sends, one after another; the sender's end is a cut.
    Follow(mpsc::Receiver<Step>, Arc<Fate>),
    /// Closes the connection (resets the stream of HTTP/2).
    Close,
    /// Closes the connection with a TCP reset (resets the stream of HTTP/2).
    Reset,
}

/// The framing that [`Step::Head`] announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    None,
    Length(usize),
    Chunked,
    /// Until the connection closes.
    Eof,
}

impl Script {
    /// 200 with this body, after the request was read.
    pub fn ok(body: &str) -> Script {
        Script::answer(200, &[], body)
    }

    pub fn status(status: u16) -> Script {
        Script::answer(status, &[], "")
    }

    pub fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Script {
        Script(vec![
            Step::ReadBody,
            Step::Head { status, headers: owned(headers), body: Body::Length(body.len()) },
            Step::Data(body.into()),
            Step::End,
        ])
    }

    pub fn json(status: u16, body: &str) -> Script {
        Script::answer(status, &[("content-type", "application/json")], body)
    }

    /// These bytes as they are, after the request was read; then the connection closes.
    pub fn raw(bytes: impl AsRef<[u8]>) -> Script {
        Script(vec![Step::ReadBody, Step::Raw(bytes.as_ref().to_vec()), Step::Close])
    }

    /// The request's body back, as it comes.
    pub fn echo() -> Script {
        Script(vec![Step::Head { status: 200, headers: vec![], body: Body::Chunked }, Step::EchoBody])
    }

    /// Accepts an upgrade to `protocol` and sends every byte back.
    pub fn tunnel(protocol: &str) -> Script {
        let head = format!("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n");
        Script(vec![Step::Raw(head.into()), Step::Tunnel])
    }

    /// `self` after the gate has opened.
    pub fn after(mut self, gate: &Gate) -> Script {
        self.0.insert(0, Step::Wait(gate.clone()));
        self
    }
}

/// Closed at first; what waits on it goes on when the test opens it.
#[derive(Clone, Debug)]
pub struct Gate(watch::Sender<bool>);

impl Default for Gate {
    fn default() -> Self {
        Gate::new()
    }
}

impl Gate {
    pub fn new() -> Gate {
        Gate(watch::Sender::new(false))
    }

    pub fn open(&self) {
        self.0.send_replace(true);
    }

    pub(super) async fn opened(&self) {
        // `self` is a sender, so the channel can't close.
        let _ = self.0.subscribe().wait_for(|open| *open).await;
    }
}

/// Whether the proxy has given up an exchange.
#[derive(Debug, Default)]
pub struct Fate {
    pub(super) gone: AtomicBool,
}

/// The test's hold on one response that it sends piece by piece.
#[derive(Debug)]
pub struct Drip {
    pub request: Request,
    steps: mpsc::Sender<Step>,
    fate: Arc<Fate>,
}

impl Drip {
    /// Sends one SSE event.
    pub async fn event(&self, data: &str) {
        self.step(Step::Data(format!("data: {data}\n\n").into())).await;
    }

    pub async fn data(&self, bytes: impl AsRef<[u8]>) {
        self.step(Step::Data(bytes.as_ref().to_vec())).await;
    }

    pub async fn step(&self, step: Step) {
        // The proxy may be gone already; the test asks by `gone`.
        let _ = within("the backend takes the next step", self.steps.send(step)).await;
    }

    /// Ends the response as complete.
    pub async fn finish(self) {
        self.step(Step::End).await;
    }

    /// Ends the response with trailers.
    pub async fn finish_with(self, trailers: &[(&str, &str)]) {
        self.step(Step::Trailers(owned(trailers))).await;
    }

    /// Closes the connection in the middle of the response.
    pub async fn cut(self) {
        self.step(Step::Close).await;
    }

    /// The proxy has closed the connection (reset the stream) under the response.
    pub fn gone(&self) -> bool {
        self.fate.gone.load(Ordering::SeqCst)
    }

    /// Waits until the proxy has closed the connection under the response.
    pub async fn until_gone(&self) {
        eventually("the proxy gives up the endpoint's half", || self.gone()).await;
    }
}

/// A request as it came.
#[derive(Clone, Debug, Default)]
pub struct Request {
    pub method: String,
    /// The request target as sent; path and query.
    pub target: String,
    pub headers: Vec<(String, String)>,
    /// The head's bytes with the blank line; empty for HTTP/2.
    pub raw_head: Vec<u8>,
    /// What has come of the body so far.
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
    pub body_complete: bool,
    /// Counts the backend's connections from 0.
    pub connection: usize,
    /// The `:authority` of HTTP/2; the Host of HTTP/1.1.
    pub authority: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }
}

/// A listening endpoint. Dropping it closes its listener and its connections.
pub struct Backend {
    address: Option<SocketAddr>,
    url: String,
    pub(super) shared: Arc<Shared>,
    accepting: Option<tokio::task::JoinHandle<()>>,
    /// Holds the port while nobody listens.
    reserved: Option<TcpSocket>,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Tcp,
    Unix(PathBuf),
    Tls(Arc<rustls::ServerConfig>),
    Http2,
}

type Writer = Box<dyn FnMut(&Request) -> Script + Send>;

pub(super) struct Shared {
    requests: Mutex<Vec<Request>>,
    next: Mutex<VecDeque<Script>>,
    each: Mutex<Writer>,
    drips: mpsc::Sender<Drip>,
    dripped: tokio::sync::Mutex<mpsc::Receiver<Drip>>,
    connections: AtomicUsize,
    open: AtomicUsize,
    in_flight: AtomicUsize,
    cut: watch::Sender<u64>,
}

impl Backend {
    /// A backend on a loopback port that answers `200 ok` until it is told otherwise.
    pub async fn start() -> Backend {
        Backend::listen_at(Kind::Tcp, None).await
    }

    /// As [`Backend::start`], at this address (a free port of it, where that is 0).
    pub async fn start_at(address: impl Into<SocketAddr>) -> Backend {
        Backend::listen_at(Kind::Tcp, Some(address.into())).await
    }

    /// As [`Backend::start`], so many.
    pub async fn start_several(count: usize) -> Vec<Backend> {
        let mut backends = Vec::new();
        for _ in 0..count {
            backends.push(Backend::start().await);
        }
        backends
    }

    /// Backends on one port of addresses of their own, as the pods of a service are.
    pub async fn start_fleet(count: u8) -> Vec<Backend> {
        let mut fleet: Vec<Backend> = Vec::new();
        // Somebody else may have the port on one of the addresses.
        'ports: loop {
            fleet.clear();
            let port = Backend::start_at(([127, 0, 0, 1], 0)).await.address().port();
            for last in 2..2 + count {
                let address = SocketAddr::from(([127, 0, 0, last], port));
                if TcpListener::bind(address).await.is_err() {
                    continue 'ports;
                }
                fleet.push(Backend::start_at(address).await);
            }
            return fleet;
        }
    }

    pub async fn start_unix(path: &Path) -> Backend {
        Backend::listen(Kind::Unix(path.to_owned())).await
    }

    /// HTTP/1.1 or HTTP/2 over TLS, as `alpn` lets the client choose.
    pub async fn start_tls(certificate: &Certificate, alpn: &[&str]) -> Backend {
        Backend::listen(Kind::Tls(certificate.server(alpn))).await
    }

    /// HTTP/2 with prior knowledge.
    pub async fn start_http2() -> Backend {
        Backend::listen(Kind::Http2).await
    }

    async fn listen(kind: Kind) -> Backend {
        Backend::listen_at(kind, None).await
    }

    async fn listen_at(kind: Kind, address: Option<SocketAddr>) -> Backend {
        let (drips, dripped) = mpsc::channel(10_000);
        let shared = Arc::new(Shared {
            requests: Mutex::default(),
            next: Mutex::default(),
            each: Mutex::new(Box::new(|_| Script::ok("ok"))),
            drips,
            dripped: tokio::sync::Mutex::new(dripped),
            connections: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            cut: watch::Sender::new(0),
        });
        let mut backend = Backend { address, url: String::new(), shared, accepting: None, reserved: None, kind };
        backend.resume().await;
        backend
    }

    /// What a configuration names it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// `host:port` or `unix:/path`, as status and metrics name it.
    pub fn name(&self) -> String {
        match &self.kind {
            Kind::Unix(path) => format!("unix:{}", path.display()),
            _ => self.address().to_string(),
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address.expect("not a unix socket")
    }

    /// What to do with each request, unless [`Backend::next`] said so for it.
    pub fn each(&self, script: impl FnMut(&Request) -> Script + Send + 'static) {
        *lock(&self.shared.each) = Box::new(script);
    }

    /// What to do with the next request that comes.
    pub fn next(&self, script: Script) {
        lock(&self.shared.next).push_back(script);
    }

    /// From now on every request is answered by an event stream that the test writes: see [`Backend::drip`].
    pub fn drip_each(&self) {
        self.drip_each_with(200, &[("content-type", "text/event-stream")]);
    }

    /// As [`Backend::drip_each`] with a head of the test's choice.
    pub fn drip_each_with(&self, status: u16, headers: &[(&str, &str)]) {
        let headers = owned(headers);
        let drips = self.shared.drips.clone();
        self.each(move |request| {
            let (steps, follow) = mpsc::channel(64);
            let fate = Arc::new(Fate::default());
            let drip = Drip { request: request.clone(), steps, fate: Arc::clone(&fate) };
            drips.try_send(drip).expect("fewer than 10,000 unclaimed drips");
            let head = Step::Head { status, headers: headers.clone(), body: Body::Chunked };
            Script(vec![Step::ReadBody, head, Step::Follow(follow, fate)])
        });
    }

    /// The next response that waits for the test's words, in order of arrival.
    pub async fn drip(&self) -> Drip {
        let mut dripped = self.shared.dripped.lock().await;
        within("a request reaches the backend", dripped.recv()).await.expect("the backend holds a sender")
    }

    /// All requests so far, in order of their heads.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.shared.requests).clone()
    }

    pub fn request_count(&self) -> usize {
        lock(&self.shared.requests).len()
    }

    /// The last request, once there are `count`.
    pub async fn request(&self, count: usize) -> Request {
        eventually("the request reaches the backend", || self.request_count() >= count).await;
        self.requests().swap_remove(count - 1)
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    pub fn open_connections(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// Requests whose script has not ended.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::SeqCst)
    }

    /// Closes every open connection, as a crash would; the listener stays.
    pub fn cut_connections(&self) {
        self.shared.cut.send_modify(|count| *count += 1);
    }

    /// Stops listening: new connections are refused, open ones go on.
    pub async fn refuse(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            accepting.abort();
            // Its end, so that the socket is closed when this returns.
            let _ = accepting.await;
        }
        if let Kind::Unix(path) = &self.kind {
            let _ = std::fs::remove_file(path);
        }
        // Bound and not listening: connections are refused, and nobody else is given the port meanwhile.
        self.reserved = self.address.map(|address| {
            let socket = TcpSocket::new_v4().expect("a socket");
            socket.set_reuseaddr(true).expect("an option");
            socket.bind(address).expect("the port was this backend's");
            socket
        });
    }

    /// Listens again, on the same address.
    pub async fn resume(&mut self) {
        drop(self.reserved.take());
        let shared = Arc::clone(&self.shared);
        if let Kind::Unix(path) = &self.kind {
            let listener = UnixListener::bind(path).expect("a free path");
            self.url = format!("unix:{}", path.display());
            self.accepting = Some(tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serve_http1(Box::new(stream), None, Arc::clone(&shared)));
                }
            }));
            return;
        }
        let wanted = self.address.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
        let listener = TcpListener::bind(wanted).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        self.address = Some(address);
        self.url = match self.kind {
            Kind::Tls(_) => format!("https://localhost:{}", address.port()),
            _ => format!("http://{address}"),
        };
        let kind = self.kind.clone();
        self.accepting = Some(tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let shared = Arc::clone(&shared);
                match &kind {
                    Kind::Http2 => drop(tokio::spawn(http2::serve(Box::new(stream), shared))),
                    Kind::Tls(config) => drop(tokio::spawn(serve_tls(stream, Arc::clone(config), shared))),
                    Kind::Tcp | Kind::Unix(_) => {
                        let descriptor = stream.as_fd().try_clone_to_owned().ok();
                        drop(tokio::spawn(serve_http1(Box::new(stream), descriptor, shared)));
                    }
                }
            }
        }));
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            accepting.abort();
        }
        self.cut_connections();
    }
}

impl Shared {
    /// Counts the connection until the guard is dropped.
    pub(super) fn connected(self: &Arc<Self>) -> (usize, Counted) {
        let number = self.connections.fetch_add(1, Ordering::SeqCst);
        self.open.fetch_add(1, Ordering::SeqCst);
        (number, Counted { shared: Arc::clone(self), which: |shared| &shared.open })
    }

    /// Records the request and finds what to do with it; counts it as in flight until the guard is dropped.
    pub(super) fn arrived(self: &Arc<Self>, request: Request) -> (usize, Script, Counted) {
        let next = lock(&self.next).pop_front();
        let script = match next {
            Some(script) => script,
            None => (lock(&self.each))(&request),
        };
        let mut requests = lock(&self.requests);
        requests.push(request);
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        (requests.len() - 1, script, Counted { shared: Arc::clone(self), which: |shared| &shared.in_flight })
    }

    /// Changes the record of request `index`.
    pub(super) fn record(&self, index: usize, change: impl FnOnce(&mut Request)) {
        if let Some(request) = lock(&self.requests).get_mut(index) {
            change(request);
        }
    }

    /// Returns when the test cuts all connections.
    pub(super) async fn cut(&self) {
        let mut receiver = self.cut.subscribe();
        let _ = receiver.changed().await;
    }
}

/// Gives a count back when dropped.
pub(super) struct Counted {
    shared: Arc<Shared>,
    which: fn(&Shared) -> &AtomicUsize,
}

impl Drop for Counted {
    fn drop(&mut self) {
        (self.which)(&self.shared).fetch_sub(1, Ordering::SeqCst);
    }
}

async fn serve_tls(stream: tokio::net::TcpStream, config: Arc<rustls::ServerConfig>, shared: Arc<Shared>) {
    if let Ok(stream) = tokio_rustls::TlsAcceptor::from(config).accept(stream).await {
        if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
            http2::serve(Box::new(stream), shared).await;
        } else {
            serve_http1(Box::new(stream), None, shared).await;
        }
    }
}

async fn serve_http1(io: Box<dyn Io>, descriptor: Option<OwnedFd>, shared: Arc<Shared>) {
    let (number, _counted) = shared.connected();
    let connection = Connection {
        io,
        descriptor,
        shared: Arc::clone(&shared),
        number,
        buffer: Vec::new(),
        body: Incoming::Done,
        chunked: false,
        request: 0,
    };
    tokio::select! {
        _ended = connection.run() => {}
        () = shared.cut() => {}
    }
}

/// The peer is gone, or the script closed the connection.
#[derive(Debug)]
struct Ended;

impl From<std::io::Error> for Ended {
    fn from(_: std::io::Error) -> Ended {
        Ended
    }
}

/// How much of the request's body is still to come.
enum Incoming {
    Done,
    Length(usize),
    /// Between chunks.
    ChunkSize,
    ChunkData(usize),
}

struct Connection {
    io: Box<dyn Io>,
    /// The socket once more, for what only a socket can do.
    descriptor: Option<OwnedFd>,
    shared: Arc<Shared>,
    number: usize,
    /// Read, not yet used.
    buffer: Vec<u8>,
    body: Incoming,
    /// The response's body is chunked.
    chunked: bool,
    /// The index of the request's record.
    request: usize,
}

impl Connection {
    async fn run(mut self) -> Result<(), Ended> {
        loop {
            let request = self.read_head().await?;
            let (index, script, _in_flight) = self.shared.arrived(request);
            self.request = index;
            for step in script.0 {
                self.perform(step).await?;
            }
            // A request whose body the script left alone.
            while self.read_body_part().await?.is_some() {}
        }
    }

    async fn read_head(&mut self) -> Result<Request, Ended> {
        let end = loop {
            if let Some(end) = head_end(&self.buffer) {
                break end;
            }
            self.fill().await?;
        };
        let raw_head: Vec<u8> = self.buffer.drain(..end).collect();
        let mut fields = [httparse::EMPTY_HEADER; 256];
        let mut parsed = httparse::Request::new(&mut fields);
        match parsed.parse(&raw_head) {
            Ok(httparse::Status::Complete(_)) => {}
            other => panic!("the proxy sent a bad head ({other:?}): {:?}", String::from_utf8_lossy(&raw_head)),
        }
        let headers: Vec<(String, String)> = parsed
            .headers
            .iter()
            .map(|field| (field.name.to_owned(), String::from_utf8_lossy(field.value).into_owned()))
            .collect();
        let (method, target) = (parsed.method.unwrap_or_default(), parsed.path.unwrap_or_default());
        self.body = match (header(&headers, "transfer-encoding"), header(&headers, "content-length")) {
            (Some("chunked"), None) => Incoming::ChunkSize,
            (None, Some(length)) => Incoming::Length(length.parse().expect("a length")),
            (None, None) => Incoming::Done,
            other => panic!("the proxy sent ambiguous framing: {other:?}"),
        };
        Ok(Request {
            method: method.to_owned(),
            target: target.to_owned(),
            authority: header(&headers, "host").unwrap_or_default().to_owned(),
            headers,
            body_complete: matches!(self.body, Incoming::Done),
            connection: self.number,
            raw_head,
            ..Request::default()
        })
    }

    async fn perform(&mut self, step: Step) -> Result<(), Ended> {
        match step {
            Step::ReadBody => while self.read_body_part().await?.is_some() {},
            Step::Head { status, headers, body } => {
                let mut head = format!("HTTP/1.1 {status} Scripted\r\n");
                for (name, value) in headers {
                    head.push_str(&format!("{name}: {value}\r\n"));
                }
                match body {
                    Body::None => {}
                    Body::Length(length) => head.push_str(&format!("Content-Length: {length}\r\n")),
                    Body::Chunked => head.push_str("Transfer-Encoding: chunked\r\n"),
                    Body::Eof => head.push_str("Connection: close\r\n"),
                }
                head.push_str("\r\n");
                self.chunked = body == Body::Chunked;
                self.write(head.as_bytes()).await?;
            }
            Step::Data(data) => self.write_data(&data).await?,
            Step::End if self.chunked => self.write(b"0\r\n\r\n").await?,
            Step::End => {}
            Step::Trailers(trailers) => {
                let mut end = "0\r\n".to_owned();
                for (name, value) in trailers {
                    end.push_str(&format!("{name}: {value}\r\n"));
                }
                end.push_str("\r\n");
                self.write(end.as_bytes()).await?;
            }
            Step::Raw(bytes) => self.write(&bytes).await?,
            Step::EchoBody => {
                while let Some(part) = self.read_body_part().await? {
                    self.write_data(&part).await?;
                }
                if self.chunked {
                    self.write(b"0\r\n\r\n").await?;
                }
            }
            Step::Tunnel => loop {
                let bytes = std::mem::take(&mut self.buffer);
                self.write(&bytes).await?;
                self.fill().await?;
            },
            Step::Wait(gate) => {
                let opened = gate.opened();
                tokio::pin!(opened);
                loop {
                    let room = self.buffer.len() < READ_AHEAD_BYTES_MAX;
                    tokio::select! {
                        () = &mut opened => break,
                        filled = self.fill(), if room => filled?,
                    }
                }
            }
            Step::Stall(gate) => gate.opened().await,
            Step::Follow(mut steps, fate) => {
                let followed = self.follow(&mut steps).await;
                if followed.is_err() {
                    fate.gone.store(true, Ordering::SeqCst);
                }
                followed?;
            }
            Step::Close => {
                let _ = self.io.shutdown().await;
                return Err(Ended);
            }
            Step::Reset => {
                if let Some(descriptor) = &self.descriptor {
                    let _ = socket2::SockRef::from(descriptor).set_linger(Some(std::time::Duration::ZERO));
                }
                return Err(Ended);
            }
        }
        Ok(())
    }

    /// Does what comes, until the response is ended or the peer is gone.
    async fn follow(&mut self, steps: &mut mpsc::Receiver<Step>) -> Result<(), Ended> {
        loop {
            let room = self.buffer.len() < READ_AHEAD_BYTES_MAX;
            tokio::select! {
                // What the test said first counts first, so that an end that was sent is written before a close is seen.
                biased;
                step = steps.recv() => match step {
                    Some(step) => {
                        let last = matches!(step, Step::End | Step::Trailers(_));
                        Box::pin(self.perform(step)).await?;
                        if last {
                            return Ok(());
                        }
                    }
                    None => return Err(Ended),
                },
                filled = self.fill(), if room => filled?,
            }
        }
    }

    async fn write_data(&mut self, data: &[u8]) -> Result<(), Ended> {
        if self.chunked && !data.is_empty() {
            let mut chunk = format!("{:x}\r\n", data.len()).into_bytes();
            chunk.extend_from_slice(data);
            chunk.extend_from_slice(b"\r\n");
            self.write(&chunk).await
        } else {
            self.write(data).await
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Ended> {
        self.io.write_all(bytes).await?;
        self.io.flush().await?;
        Ok(())
    }

    /// The next piece of the request's body, recorded; `None` at its end.
    async fn read_body_part(&mut self) -> Result<Option<Vec<u8>>, Ended> {
        loop {
            match self.body {
                Incoming::Done => {
                    return Ok(None);
                }
                Incoming::Length(0) => self.body_done(Vec::new()),
                Incoming::Length(left) => {
                    let part = self.take_up_to(left).await?;
                    self.body = Incoming::Length(left - part.len());
                    return Ok(Some(part));
                }
                Incoming::ChunkSize => {
                    let line = self.read_line().await?;
                    let size = usize::from_str_radix(line.split(';').next().unwrap_or_default(), 16)
                        .unwrap_or_else(|_| panic!("the proxy sent a bad chunk size: {line:?}"));
                    if size > 0 {
                        self.body = Incoming::ChunkData(size);
                        continue;
                    }
                    let mut trailers = Vec::new();
                    loop {
                        let line = self.read_line().await?;
                        match line.split_once(':') {
                            Some((name, value)) => trailers.push((name.to_owned(), value.trim().to_owned())),
                            None => break,
                        }
                    }
                    self.body_done(trailers);
                }
                Incoming::ChunkData(0) => {
                    let line = self.read_line().await?;
                    assert!(line.is_empty(), "the proxy did not end a chunk: {line:?}");
                    self.body = Incoming::ChunkSize;
                }
                Incoming::ChunkData(left) => {
                    let part = self.take_up_to(left).await?;
                    self.body = Incoming::ChunkData(left - part.len());
                    return Ok(Some(part));
                }
            }
        }
    }

    fn body_done(&mut self, trailers: Vec<(String, String)>) {
        self.body = Incoming::Done;
        self.shared.record(self.request, |request| {
            request.body_complete = true;
            request.trailers = trailers;
        });
    }

    async fn take_up_to(&mut self, count: usize) -> Result<Vec<u8>, Ended> {
        if self.buffer.is_empty() {
            self.fill().await?;
        }
        let part: Vec<u8> = self.buffer.drain(..count.min(self.buffer.len())).collect();
        self.shared.record(self.request, |request| request.body.extend_from_slice(&part));
        Ok(part)
    }

    async fn read_line(&mut self) -> Result<String, Ended> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|window| window == b"\r\n") {
                let line: Vec<u8> = self.buffer.drain(..end + 2).take(end).collect();
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> Result<(), Ended> {
        let mut bytes = [0; 16 * 1024];
        match self.io.read(&mut bytes).await? {
            0 => Err(Ended),
            count => {
                self.buffer.extend_from_slice(&bytes[..count]);
                Ok(())
            }
        }
    }
}

pub(super) fn owned(headers: &[(&str, &str)]) -> Vec<(String, String)> {
    headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no test thread panicked while it held this")
}
