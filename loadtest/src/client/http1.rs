//! The generator's HTTP/1.1: one write a request, one read an event, connections kept for the next request.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Answer, Failure, Request};
use crate::socket::{Dialer, Socket};
use crate::statistics::{Fault, Statistics};
use crate::wire::{BodyDecoder, Framing, HEAD_BYTES_MAX, HEADERS_MAX, head_length};

/// Connections that wait for their next request, the newest first.
pub struct Pool {
    dialer: Arc<Dialer>,
    idle: Arc<Mutex<Vec<Connection>>>,
}

struct Connection {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Pool {
    pub fn new(dialer: Arc<Dialer>) -> Self {
        Self { dialer, idle: Arc::default() }
    }

    /// Sends a request and reads the head of its answer.
    pub async fn send(&self, request: &Request<'_>, statistics: &Statistics) -> Result<Answer, Failure> {
        let bytes = encode(request);
        let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(connection) = kept {
            match self.exchange(connection, &bytes).await {
                // Closed while it was kept: every client sends anew then, on a fresh connection.
                Err(Attempt { unanswered: true, .. }) => statistics.count(|counts| counts.reconnects += 1),
                other => return other.map_err(|attempt| attempt.failure),
            }
        }
        let socket = self.dialer.dial().await?;
        statistics.count(|counts| counts.connections += 1);
        self.exchange(Connection { socket, buffer: Vec::new() }, &bytes).await.map_err(|attempt| attempt.failure)
    }

    async fn exchange(&self, mut connection: Connection, bytes: &[u8]) -> Result<Answer, Attempt> {
        let broken = |error: io::Error| Attempt {
            unanswered: true,
            failure: Failure::new(Fault::Broken, format!("sending the request: {error}")),
        };
        connection.socket.write_all(bytes).await.map_err(broken)?;
        connection.socket.flush().await.map_err(broken)?;
        let head = read_head(&mut connection).await?;
        let home = head.keep_alive.then(|| Arc::downgrade(&self.idle));
        let decoder = BodyDecoder::new(head.framing);
        let body = Body { connection: Some(connection), decoder, home };
        Ok(Answer { status: head.status, agent: head.agent, location: head.location, body: super::Body::Http1(body) })
    }
}

/// The body of an answer; at its end the connection goes back to the pool.
pub struct Body {
    connection: Option<Connection>,
    decoder: BodyDecoder,
    home: Option<Weak<Mutex<Vec<Connection>>>>,
}

impl Body {
    pub async fn read(&mut self, content: &mut (dyn FnMut(&[u8]) + Send)) -> Result<bool, Failure> {
        let Some(connection) = &mut self.connection else { return Ok(false) };
        if !self.decoder.ended() {
            if connection.buffer.is_empty() {
                let read = fill(connection).await.map_err(|error| Failure::new(Fault::Broken, error))?;
                if read == 0 {
                    self.connection = None;
                    if self.decoder.may_end_by_close() {
                        return Ok(false);
                    }
                    return Err(Failure::new(Fault::CutOff, "the connection was closed within an answer"));
                }
            }
            let used = self
                .decoder
                .decode(&connection.buffer, content)
                .map_err(|error| Failure::new(Fault::Malformed, error))?;
            connection.buffer.drain(..used);
        }
        if !self.decoder.ended() {
            return Ok(true);
        }
        if let (Some(connection), Some(home)) =
            (self.connection.take(), self.home.take().and_then(|home| home.upgrade()))
        {
            if !connection.buffer.is_empty() {
                return Err(Failure::new(Fault::Malformed, "bytes after the end of an answer"));
            }
            home.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        }
        Ok(false)
    }
}

/// Asks for a WebSocket; the socket, what came behind the answer's head, and the backend.
pub async fn upgrade(
    mut socket: Socket,
    authority: &str,
    target: &str,
    session: Option<(&str, &str)>,
    key: &str,
) -> Result<(Socket, Vec<u8>, Option<u32>), Failure> {
    let session = session.map(|(name, value)| format!("{name}: {value}\r\n")).unwrap_or_default();
    let request = format!(
        "GET {target} HTTP/1.1\r\nhost: {authority}\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: {key}\r\n{session}\r\n"
    );
    let broken = |error: io::Error| Failure::new(Fault::Broken, error);
    socket.write_all(request.as_bytes()).await.map_err(broken)?;
    socket.flush().await.map_err(broken)?;
    let mut connection = Connection { socket, buffer: Vec::new() };
    let head = read_head(&mut connection).await.map_err(|attempt| attempt.failure)?;
    if head.status != 101 {
        return Err(Failure::new(Fault::Status, format!("a WebSocket was answered with {}", head.status)));
    }
    Ok((connection.socket, connection.buffer, head.agent))
}

/// A request that failed: `unanswered` when not a byte came back.
struct Attempt {
    unanswered: bool,
    failure: Failure,
}

struct Head {
    status: u16,
    framing: Framing,
    keep_alive: bool,
    agent: Option<u32>,
    location: Option<String>,
}

fn encode(request: &Request<'_>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(256);
    let mut put = |parts: &[&str]| parts.iter().for_each(|part| bytes.extend_from_slice(part.as_bytes()));
    put(&[request.method, " ", request.target, " HTTP/1.1\r\nhost: ", request.authority, "\r\naccept: "]);
    put(&[request.accept, "\r\n"]);
    if let Some((name, value)) = request.session {
        put(&[name, ": ", value, "\r\n"]);
    }
    if !request.body.is_empty() {
        put(&["content-type: application/json\r\ncontent-length: ", &request.body.len().to_string(), "\r\n"]);
    }
    put(&["\r\n", request.body]);
    bytes
}

async fn read_head(connection: &mut Connection) -> Result<Head, Attempt> {
    loop {
        if let Some(length) = head_length(&connection.buffer) {
            let head = parse(&connection.buffer[..length]).map_err(|explanation| Attempt {
                unanswered: false,
                failure: Failure::new(Fault::Malformed, explanation),
            })?;
            connection.buffer.drain(..length);
            if (100..200).contains(&head.status) && head.status != 101 {
                continue;
            }
            return Ok(head);
        }
        let unanswered = connection.buffer.is_empty();
        if connection.buffer.len() > HEAD_BYTES_MAX {
            let failure = Failure::new(Fault::Malformed, format!("a head of more than {HEAD_BYTES_MAX} bytes"));
            return Err(Attempt { unanswered, failure });
        }
        match fill(connection).await {
            Ok(0) => {
                let failure = Failure::new(Fault::CutOff, "the connection was closed before an answer");
                return Err(Attempt { unanswered, failure });
            }
            Ok(_) => {}
            Err(error) => {
                let failure = Failure::new(Fault::Broken, format!("before an answer: {error}"));
                return Err(Attempt { unanswered, failure });
            }
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Head, String> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut headers);
    parsed.parse(bytes).map_err(|error| error.to_string())?;
    let status = parsed.code.ok_or("no status")?;
    let mut head = Head {
        status,
        framing: if matches!(status, 100..200 | 204 | 304) { Framing::Length(0) } else { Framing::UntilClose },
        keep_alive: parsed.version == Some(1),
        agent: None,
        location: None,
    };
    for header in parsed.headers.iter() {
        let value = std::str::from_utf8(header.value).unwrap_or("").trim();
        match header.name.len() {
            14 if header.name.eq_ignore_ascii_case("content-length") => {
                let length = value.parse().map_err(|_| "a content-length that is no number")?;
                if head.framing != Framing::Chunked {
                    head.framing = Framing::Length(length);
                }
            }
            17 if header.name.eq_ignore_ascii_case("transfer-encoding") => head.framing = Framing::Chunked,
            10 if header.name.eq_ignore_ascii_case("connection") => {
                head.keep_alive &= !value.eq_ignore_ascii_case("close");
            }
            7 if header.name.eq_ignore_ascii_case("x-agent") => head.agent = value.parse().ok(),
            8 if header.name.eq_ignore_ascii_case("location") => head.location = Some(value.to_owned()),
            _ => {}
        }
    }
    head.keep_alive &= head.framing != Framing::UntilClose;
    Ok(head)
}

const READ_BYTES: usize = 4096;

async fn fill(connection: &mut Connection) -> io::Result<usize> {
    connection.buffer.reserve(READ_BYTES);
    connection.socket.read_buf(&mut connection.buffer).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_tells_framing_persistence_and_agent() {
        let head = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Agent: 7\r\n\r\n").unwrap();
        assert_eq!((head.framing, head.keep_alive, head.agent), (Framing::Length(2), true, Some(7)));
        let head = parse(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n").unwrap();
        assert_eq!((head.framing, head.keep_alive), (Framing::Chunked, false));
        let head = parse(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        assert_eq!((head.framing, head.keep_alive), (Framing::UntilClose, false));
        assert_eq!(parse(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap().framing, Framing::Length(0));
        assert!(parse(b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n").is_err());
    }

    #[test]
    fn a_request_is_encoded_with_its_body() {
        let request = Request {
            method: "POST",
            target: "/run",
            scheme: "http",
            authority: "a:1",
            session: Some(("x-session-id", "s")),
            body: "{}",
            accept: "*/*",
        };
        let text = String::from_utf8(encode(&request)).unwrap();
        assert!(text.starts_with("POST /run HTTP/1.1\r\nhost: a:1\r\n"), "{text}");
        assert!(text.contains("x-session-id: s\r\n") && text.ends_with("content-length: 2\r\n\r\n{}"), "{text}");
    }
}
