//! Client: an HTTP/1.1 client that sends exactly the bytes it is given and shows exactly what came back.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::{Io, head_end, header, within};

/// One connection. Every read has the deadline of the tests.
pub struct RawClient {
    io: Box<dyn Io>,
    /// Read, not yet given out.
    buffer: Vec<u8>,
}

/// The head of a response.
#[derive(Clone, Debug)]
pub struct Head {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    /// The bytes as they came, with the blank line.
    pub raw: Vec<u8>,
}

/// A whole response.
#[derive(Clone, Debug)]
pub struct Response {
    pub head: Head,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
    /// The connection ended before the body was complete.
    pub truncated: bool,
}

impl RawClient {
    pub async fn connect(address: SocketAddr) -> RawClient {
        let stream = within("connect", TcpStream::connect(address)).await.expect("something listens");
        stream.set_nodelay(true).expect("a TCP socket");
        RawClient::over(stream)
    }

    /// As [`RawClient::connect`] from another loopback address (127.0.0.2 ..), as another client.
    pub async fn connect_from(source: [u8; 4], address: SocketAddr) -> RawClient {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind(SocketAddr::from((source, 0))).expect("a loopback address");
        RawClient::over(within("connect", socket.connect(address)).await.expect("something listens"))
    }

    pub async fn connect_unix(path: &Path) -> RawClient {
        RawClient::over(within("connect", UnixStream::connect(path)).await.expect("something listens"))
    }

    pub async fn connect_tls(address: SocketAddr, name: &str, config: Arc<rustls::ClientConfig>) -> RawClient {
        let stream = within("connect", TcpStream::connect(address)).await.expect("something listens");
        let name = rustls::pki_types::ServerName::try_from(name.to_owned()).expect("a server name");
        let connecting = tokio_rustls::TlsConnector::from(config).connect(name, stream);
        RawClient::over(within("TLS handshake", connecting).await.expect("TLS handshake"))
    }

    pub fn over(io: impl Io + 'static) -> RawClient {
        RawClient { io: Box::new(io), buffer: Vec::new() }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).await.expect("the peer takes what is sent");
    }

    /// As [`RawClient::send`], for a peer that may have closed.
    pub async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        within("send", async {
            self.io.write_all(bytes.as_ref()).await?;
            self.io.flush().await
        })
        .await
    }

    /// Half-closes: nothing more is sent, reading goes on.
    pub async fn finish_sending(&mut self) {
        within("half-close", self.io.shutdown()).await.expect("open");
    }

    /// The next response head, 1xx included.
    pub async fn read_head(&mut self) -> Head {
        self.try_read_head().await.unwrap_or_else(|seen| {
            panic!("closed instead of a response head; seen: {:?}", String::from_utf8_lossy(&seen))
        })
    }

    /// As [`RawClient::read_head`]; the error is what came before the connection ended.
    pub async fn try_read_head(&mut self) -> Result<Head, Vec<u8>> {
        loop {
            if let Some(end) = head_end(&self.buffer) {
                let raw: Vec<u8> = self.buffer.drain(..end).collect();
                return Ok(parse_head(raw));
            }
            if !self.fill().await {
                return Err(std::mem::take(&mut self.buffer));
            }
        }
    }

    /// The data of the next chunk; `None` at the last one, whose trailers are read too, and at a connection that ended
    /// (which [`RawClient::read_response`] tells apart).
    pub async fn read_chunk(&mut self) -> Option<Vec<u8>> {
        match self.try_read_chunk().await {
            Chunk::Data(data) => Some(data),
            Chunk::Last(_) | Chunk::Cut => None,
        }
    }

    /// Reads chunks until what they hold together contains `text`; panics if the body ends first.
    pub async fn read_chunks_until(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        loop {
            match self.read_chunk().await {
                Some(data) => seen.extend_from_slice(&data),
                None => panic!("ended before {text:?}; seen: {:?}", String::from_utf8_lossy(&seen)),
            }
            let seen = String::from_utf8_lossy(&seen);
            if seen.contains(text) {
                return seen.into_owned();
            }
        }
    }

    /// Reads a head, and chunks until what they hold together contains `text`.
    pub async fn read_chunks_after_head(&mut self, text: &str) -> Head {
        let head = self.read_head().await;
        self.read_chunks_until(text).await;
        head
    }

    /// The data of all chunks that are still to come, whether the body ends whole or not.
    pub async fn read_to_end_of_body(&mut self) -> String {
        let mut seen = Vec::new();
        while let Some(data) = self.read_chunk().await {
            seen.extend_from_slice(&data);
        }
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Exactly `count` bytes as they came.
    pub async fn read_exact(&mut self, count: usize) -> Vec<u8> {
        while self.buffer.len() < count {
            assert!(self.fill().await, "closed after {} of {count} bytes", self.buffer.len());
        }
        self.buffer.drain(..count).collect()
    }

    /// Everything until the connection ends, as it came. A reset counts as an end.
    pub async fn read_to_end(&mut self) -> Vec<u8> {
        while self.fill().await {}
        std::mem::take(&mut self.buffer)
    }

    /// The next final response (1xx are passed over) with its body, as its framing says.
    pub async fn read_response(&mut self) -> Response {
        self.read_response_to("GET").await
    }

    /// As [`RawClient::read_response`]; the answer to a HEAD request has no body.
    pub async fn read_response_to(&mut self, method: &str) -> Response {
        let mut head = self.read_head().await;
        while (100..200).contains(&head.status) && head.status != 101 {
            head = self.read_head().await;
        }
        let none = method == "HEAD" || matches!(head.status, 101 | 204 | 304);
        let mut response = Response { head, body: Vec::new(), trailers: Vec::new(), truncated: false };
        if none {
            return response;
        }
        if let Some(length) = response.head.header("content-length") {
            let length: usize = length.parse().expect("a number");
            while self.buffer.len() < length && self.fill().await {}
            response.truncated = self.buffer.len() < length;
            response.body = self.buffer.drain(..length.min(self.buffer.len())).collect();
        } else if response.head.header("transfer-encoding") == Some("chunked") {
            loop {
                match self.try_read_chunk().await {
                    Chunk::Data(data) => response.body.extend_from_slice(&data),
                    Chunk::Last(trailers) => {
                        response.trailers = trailers;
                        break;
                    }
                    Chunk::Cut => {
                        response.truncated = true;
                        break;
                    }
                }
            }
        } else {
            response.body = self.read_to_end().await;
        }
        response
    }

    /// Writes `wire` in pieces of `write_size` while it reads, and reads one response.
    pub async fn exchange(&mut self, wire: &[u8], write_size: usize) -> Response {
        let (mut reader, mut writer) = tokio::io::split(&mut self.io);
        let writing = async {
            for piece in wire.chunks(write_size) {
                // The peer may have answered and closed; what it said is looked at.
                if writer.write_all(piece).await.is_err() || writer.flush().await.is_err() {
                    return;
                }
            }
        };
        tokio::pin!(writing);
        let mut bytes = [0; 16 * 1024];
        loop {
            let progress = within("an exchange goes on", async {
                tokio::select! {
                    () = &mut writing => None,
                    count = reader.read(&mut bytes) => Some(count),
                }
            });
            match progress.await {
                None | Some(Ok(0) | Err(_)) => break,
                Some(Ok(count)) => self.buffer.extend_from_slice(&bytes[..count]),
            }
        }
        self.read_response().await
    }

    /// Waits until the peer has closed; what it still sent is returned.
    pub async fn closed(&mut self) -> Vec<u8> {
        self.read_to_end().await
    }

    async fn try_read_chunk(&mut self) -> Chunk {
        let Some(line) = self.read_line().await else { return Chunk::Cut };
        let size = line.split(';').next().unwrap_or_default();
        let size = usize::from_str_radix(size, 16).unwrap_or_else(|_| panic!("not a chunk size: {line:?}"));
        if size == 0 {
            let mut trailers = Vec::new();
            loop {
                match self.read_line().await {
                    None => return Chunk::Cut,
                    Some(line) if line.is_empty() => return Chunk::Last(trailers),
                    Some(line) => {
                        let (name, value) = line.split_once(':').expect("a trailer field");
                        trailers.push((name.to_owned(), value.trim().to_owned()));
                    }
                }
            }
        }
        while self.buffer.len() < size + 2 {
            if !self.fill().await {
                return Chunk::Cut;
            }
        }
        let data = self.buffer.drain(..size).collect();
        assert_eq!(self.buffer.drain(..2).as_slice(), b"\r\n", "the end of a chunk");
        Chunk::Data(data)
    }

    async fn read_line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|window| window == b"\r\n") {
                let line: Vec<u8> = self.buffer.drain(..end + 2).take(end).collect();
                return Some(String::from_utf8(line).expect("ASCII"));
            }
            if !self.fill().await {
                return None;
            }
        }
    }

    /// Reads some more; `false` at the end (a reset included).
    async fn fill(&mut self) -> bool {
        let mut bytes = [0; 16 * 1024];
        match within("read from the proxy", self.io.read(&mut bytes)).await {
            Ok(0) | Err(_) => false,
            Ok(count) => {
                self.buffer.extend_from_slice(&bytes[..count]);
                true
            }
        }
    }
}

enum Chunk {
    Data(Vec<u8>),
    Last(Vec<(String, String)>),
    Cut,
}

impl Head {
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }
}

impl Response {
    pub fn status(&self) -> u16 {
        self.head.status
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.text()))
    }

    /// The `code` of a problem answer.
    pub fn code(&self) -> Option<String> {
        let problem: serde_json::Value = serde_json::from_slice(&self.body).ok()?;
        problem.get("code")?.as_str().map(str::to_owned)
    }
}

/// Sends `request` on a connection of its own and reads one response.
pub async fn fetch(address: SocketAddr, request: impl AsRef<[u8]>) -> Response {
    let mut client = RawClient::connect(address).await;
    client.send(request).await;
    client.read_response().await
}

/// `GET path` on a connection of its own, with more `headers` (each line ended by CRLF).
pub async fn get(address: SocketAddr, path: &str, headers: &str) -> Response {
    fetch(address, format!("GET {path} HTTP/1.1\r\nHost: agents.test\r\n{headers}\r\n")).await
}

/// `POST path` on a connection of its own, with more `headers` (each line ended by CRLF).
pub async fn post(address: SocketAddr, path: &str, headers: &str, body: &str) -> Response {
    let length = body.len();
    fetch(
        address,
        format!("POST {path} HTTP/1.1\r\nHost: agents.test\r\nContent-Length: {length}\r\n{headers}\r\n{body}"),
    )
    .await
}

fn parse_head(raw: Vec<u8>) -> Head {
    let mut fields = [httparse::EMPTY_HEADER; 256];
    let mut response = httparse::Response::new(&mut fields);
    let status = match response.parse(&raw) {
        Ok(httparse::Status::Complete(_)) => response.code.expect("a whole head has one"),
        other => panic!("not a response head ({other:?}): {:?}", String::from_utf8_lossy(&raw)),
    };
    let headers = response
        .headers
        .iter()
        .map(|field| (field.name.to_owned(), String::from_utf8_lossy(field.value).into_owned()))
        .collect();
    Head { status, headers, raw }
}
