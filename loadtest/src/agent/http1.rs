//! The mock agent on HTTP/1.1: one task a connection, one write an event.

use std::io;
use std::time::Duration;

use anyhow::bail;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::Backend;
use super::answer::{Answer, Full, StreamPlan, answer};
use super::board::OpenRun;
use crate::clock::{Timer, monotonic_ns, nanoseconds};
use crate::event::EventTemplate;
use crate::wire::{BodyDecoder, Framing, HEAD_BYTES_MAX, HEADERS_MAX, head_length};

/// Serves one connection until its client closes it. `buffered` was read from it before.
pub async fn serve<S>(mut stream: S, mut buffered: Vec<u8>, backend: Backend) -> anyhow::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut out = Vec::new();
    loop {
        let Some(request) = read_request(&mut stream, &mut buffered).await? else { return Ok(()) };
        out.clear();
        match answer(&request.target, &backend) {
            Answer::Full(full) => {
                write_full(&mut out, &full, backend.number);
                stream.write_all(&out).await?;
            }
            Answer::Run(hold) => {
                let mut run = OpenRun::start(&backend);
                let worked = async {
                    run.take_place().await;
                    tokio::time::sleep(hold).await;
                };
                tokio::select! {
                    () = worked => {}
                    left = client_left(&mut stream, &mut buffered) => return left,
                }
                drop(run);
                let done = Full { status: 200, body: "done".to_owned(), location: None };
                write_full(&mut out, &done, backend.number);
                stream.write_all(&out).await?;
            }
            Answer::Stream(plan) => {
                let run = OpenRun::start(&backend);
                write_stream(&mut stream, &mut out, &plan, backend.number).await?;
                if plan.silent {
                    // Not needed while silent: thousands of such streams are one process's.
                    drop(out);
                    drop(buffered);
                    return client_left(&mut stream, &mut Vec::new()).await;
                }
                drop(run);
            }
            Answer::WebSocket => {
                let Some(key) = &request.websocket_key else { bail!("not a WebSocket handshake") };
                let accept = derive_accept_key(key.as_bytes());
                let head = format!(
                    "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
                     sec-websocket-accept: {accept}\r\nx-agent: {}\r\n\r\n",
                    backend.number
                );
                stream.write_all(head.as_bytes()).await?;
                let _run = OpenRun::start(&backend);
                return echo(stream, buffered).await;
            }
        }
        if !request.keep_alive {
            stream.shutdown().await?;
            return Ok(());
        }
    }
}

struct Request {
    target: String,
    keep_alive: bool,
    websocket_key: Option<String>,
}

/// Reads a head and skips the body. `None`: the client closed between requests.
async fn read_request<S: AsyncRead + Unpin>(stream: &mut S, buffered: &mut Vec<u8>) -> anyhow::Result<Option<Request>> {
    let length = loop {
        if let Some(length) = head_length(buffered) {
            break length;
        }
        if buffered.len() > HEAD_BYTES_MAX {
            bail!("a head is longer than {HEAD_BYTES_MAX} bytes");
        }
        if fill(stream, buffered).await? == 0 {
            return Ok(None);
        }
    };
    let (request, framing) = parse(&buffered[..length])?;
    buffered.drain(..length);
    let mut body = BodyDecoder::new(framing);
    while !body.ended() {
        if buffered.is_empty() && fill(stream, buffered).await? == 0 {
            bail!("the client left within its request");
        }
        let used = body.decode(buffered, |_| {}).map_err(|error| anyhow::anyhow!("{error}"))?;
        buffered.drain(..used);
    }
    Ok(Some(request))
}

fn parse(head: &[u8]) -> anyhow::Result<(Request, Framing)> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    parsed.parse(head)?;
    let mut request = Request {
        target: parsed.path.unwrap_or("/").to_owned(),
        keep_alive: parsed.version == Some(1),
        websocket_key: None,
    };
    let mut framing = Framing::Length(0);
    for header in parsed.headers.iter() {
        let value = std::str::from_utf8(header.value).unwrap_or("").trim();
        if header.name.eq_ignore_ascii_case("content-length") {
            framing = Framing::Length(value.parse()?);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            framing = Framing::Chunked;
        } else if header.name.eq_ignore_ascii_case("connection") && value.eq_ignore_ascii_case("close") {
            request.keep_alive = false;
        } else if header.name.eq_ignore_ascii_case("sec-websocket-key") {
            request.websocket_key = Some(value.to_owned());
        }
    }
    Ok((request, framing))
}

const READ_BYTES: usize = 4096;

async fn fill<S: AsyncRead + Unpin>(stream: &mut S, buffered: &mut Vec<u8>) -> io::Result<usize> {
    buffered.reserve(READ_BYTES);
    stream.read_buf(buffered).await
}

/// Returns when the client closed; what it pipelines before that is kept.
async fn client_left<S: AsyncRead + Unpin>(stream: &mut S, buffered: &mut Vec<u8>) -> anyhow::Result<()> {
    while buffered.len() <= HEAD_BYTES_MAX {
        let mut byte = [0; 512];
        match stream.read(&mut byte).await? {
            0 => return Ok(()),
            read => buffered.extend_from_slice(&byte[..read]),
        }
    }
    bail!("the client pipelines without end")
}

fn write_full(out: &mut Vec<u8>, full: &Full, backend: usize) {
    let reason = match full.status {
        200 => "OK",
        202 => "Accepted",
        400 => "Bad Request",
        _ => "Not Found",
    };
    let location = full.location.as_ref().map(|place| format!("location: {place}\r\n")).unwrap_or_default();
    out.extend_from_slice(
        format!(
            "HTTP/1.1 {} {reason}\r\ncontent-length: {}\r\nx-agent: {backend}\r\n{location}\r\n{}",
            full.status,
            full.body.len(),
            full.body
        )
        .as_bytes(),
    );
}

async fn write_stream<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    out: &mut Vec<u8>,
    plan: &StreamPlan,
    backend: usize,
) -> anyhow::Result<()> {
    let mut template = EventTemplate::new(plan.tag, plan.size);
    let mut pace = Pace::start(plan.interval)?;
    out.extend_from_slice(
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n\
             transfer-encoding: chunked\r\nx-agent: {backend}\r\n\r\n"
        )
        .as_bytes(),
    );
    for sequence in 0..plan.events {
        pace.wait(sequence).await?;
        out.extend_from_slice(format!("{:x}\r\n", plan.size).as_bytes());
        out.extend_from_slice(template.stamped(sequence, pace.stamp_ns(sequence)));
        out.extend_from_slice(b"\r\n");
        if sequence + 1 == plan.events && !plan.silent {
            out.extend_from_slice(b"0\r\n\r\n");
        }
        pace.writing();
        stream.write_all(out).await?;
        pace.written();
        out.clear();
    }
    Ok(())
}

/// Keeps a stream's events to their times, and stamps honestly: an event that is late because the receiver would not
/// take the one before it carries the time at which it was due, so that the delay is seen (no coordinated omission).
pub struct Pace {
    timer: Timer,
    start_ns: u64,
    interval: Duration,
    write_began_ns: u64,
    blocked_until_ns: u64,
}

// A write into a socket buffer with room takes some microseconds; one that takes longer had to wait for the receiver.
const BLOCKED_NS: u64 = 2_000_000;

impl Pace {
    pub fn start(interval: Duration) -> io::Result<Self> {
        let start_ns = monotonic_ns();
        Ok(Self { timer: Timer::new()?, start_ns, interval, write_began_ns: 0, blocked_until_ns: 0 })
    }

    /// Waits until the event `sequence` is due.
    pub async fn wait(&self, sequence: u32) -> io::Result<()> {
        if sequence > 0 { self.timer.wait_until_ns(self.due_ns(sequence)).await } else { Ok(()) }
    }

    /// The send time to write into the event.
    pub fn stamp_ns(&self, sequence: u32) -> u64 {
        let due_ns = self.due_ns(sequence);
        if due_ns < self.blocked_until_ns { due_ns } else { monotonic_ns() }
    }

    fn due_ns(&self, sequence: u32) -> u64 {
        self.start_ns.saturating_add(nanoseconds(self.interval.saturating_mul(sequence)))
    }

    pub fn writing(&mut self) {
        self.write_began_ns = monotonic_ns();
    }

    pub fn written(&mut self) {
        let now_ns = monotonic_ns();
        if now_ns - self.write_began_ns > BLOCKED_NS {
            self.blocked_until_ns = now_ns;
        }
    }
}

async fn echo<S: AsyncRead + AsyncWrite + Unpin>(stream: S, buffered: Vec<u8>) -> anyhow::Result<()> {
    let mut socket = WebSocketStream::from_partially_read(stream, buffered, Role::Server, None).await;
    while let Some(message) = crate::websocket::receive(&mut socket).await? {
        crate::websocket::send(&mut socket, message).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_tells_framing_and_persistence() {
        let (request, framing) = parse(b"POST /stream HTTP/1.1\r\nhost: a\r\nContent-Length: 12\r\n\r\n").unwrap();
        assert_eq!((request.target.as_str(), request.keep_alive, framing), ("/stream", true, Framing::Length(12)));
        let (request, framing) =
            parse(b"POST / HTTP/1.1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
        assert_eq!((request.keep_alive, framing), (false, Framing::Chunked));
    }

    #[tokio::test]
    async fn an_event_delayed_by_its_receiver_carries_the_time_it_was_due() {
        let mut pace = Pace::start(Duration::from_millis(1)).unwrap();
        pace.blocked_until_ns = pace.start_ns + 5_000_000;
        assert_eq!(pace.stamp_ns(3), pace.start_ns + 3_000_000);
        pace.blocked_until_ns = 0;
        assert!(pace.stamp_ns(3) >= pace.start_ns && pace.stamp_ns(3) != pace.start_ns + 3_000_000);
    }
}
