//! Bodies: bytes arrive unchanged, both ways, over every pair of HTTP versions, however the network splits them.

mod support;

use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use support::{
    Backend, Body, Http2Client, Proxy, Random, RawClient, Response, Script, Step, eventually, http2_request,
    start_proxy, within,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

/// One exchange: what each side sends, and in which form.
#[derive(Clone, Copy, Debug)]
struct Case {
    seed: u64,
    request_length: usize,
    response_length: usize,
    request_chunked: bool,
    response: Form,
    request_trailers: bool,
    /// The most that one read or write moves.
    piece_max: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// The request's body comes back while it is still being sent.
    Echo,
    Length,
    Chunked,
    Trailers,
    /// HTTP/1.1 only.
    UntilClose,
}

fn cases() -> impl Strategy<Value = Case> {
    let length = || prop_oneof![0..3usize, 0..2_000usize, 16_380..16_390usize, 60_000..140_000usize];
    let form = prop_oneof![
        Just(Form::Echo),
        Just(Form::Length),
        Just(Form::Chunked),
        Just(Form::Trailers),
        Just(Form::UntilClose)
    ];
    let piece = prop_oneof![Just(1usize), 2..50usize, 50..5_000usize, Just(100_000usize)];
    (any::<u64>(), length(), length(), any::<bool>(), form, any::<bool>(), piece).prop_map(
        |(seed, request_length, response_length, request_chunked, response, request_trailers, piece_max)| Case {
            seed: seed | 1,
            // Byte for byte is slow; it needs no long bodies.
            request_length: request_length.min(piece_max * 2_000),
            response_length: response_length.min(piece_max * 2_000),
            request_chunked,
            response,
            request_trailers,
            piece_max,
        },
    )
}

#[test]
fn bytes_arrive_unchanged_both_ways_over_every_pair_of_versions_and_every_split() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let world = runtime.block_on(World::start());
    let mut runner =
        TestRunner::new(Config { cases: 150, max_shrink_iters: 40, failure_persistence: None, ..Config::default() });
    let result = runner.run(&cases(), |case| runtime.block_on(world.check(case)));
    if let Err(failure) = result {
        panic!("{failure}");
    }
}

/// Endpoints of both versions behind one proxy, with a network in between that splits what it carries.
struct World {
    http1: Backend,
    http2: Backend,
    proxy: Proxy,
}

impl World {
    async fn start() -> World {
        let (http1, http2) = (Backend::start().await, Backend::start_http2().await);
        let (near1, near2) = (splitter(http1.address()).await, splitter(http2.address()).await);
        let config = format!(
            "routes:\n  - {{match: {{path: /one}}, service: one}}\n  - {{match: {{path: /two}}, service: two}}\n\
             services:\n  - {{name: one, versions: [{{name: v, endpoints: [\"http://{near1}\"]}}]}}\n  \
             - {{name: two, versions: [{{name: v, http: 2, endpoints: [\"http://{near2}\"]}}]}}\n"
        );
        World { proxy: start_proxy(&config).await, http1, http2 }
    }

    async fn check(&self, case: Case) -> Result<(), TestCaseError> {
        for (backend, path) in [(&self.http1, "/one"), (&self.http2, "/two")] {
            for http2_client in [false, true] {
                let what = format!("HTTP/{} client, {path}", if http2_client { 2 } else { 1 });
                let to_http2 = path == "/two";
                let case = match case.response {
                    Form::UntilClose if to_http2 => Case { response: Form::Chunked, ..case },
                    _ => case,
                };
                let mut random = Random(case.seed);
                let sent = random.bytes(case.request_length);
                let answer = random.bytes(case.response_length);
                let before = backend.request_count();
                let (to_send, split) = (answer.clone(), random.number());
                // Not as the next script only: then an exchange that fails would give its answer to the one after it.
                backend.each(move |_| script(case, &to_send, &mut Random(split)));
                let got = if http2_client {
                    over_http2(self.proxy.address, path, case, &sent).await
                } else {
                    over_http1(self.proxy.address, path, case, &sent, &mut random).await
                };
                let expected = if case.response == Form::Echo { &sent } else { &answer };
                prop_assert_eq!(got.status(), 200, "{}: {}", &what, got.text());
                prop_assert!(!got.truncated, "{} was cut after {} bytes", &what, got.body.len());
                prop_assert!(
                    got.body == *expected,
                    "{}: {} bytes of {} came back",
                    &what,
                    got.body.len(),
                    expected.len()
                );
                let trailers =
                    if case.response == Form::Trailers { vec![("x-sum".to_owned(), "1".to_owned())] } else { vec![] };
                prop_assert_eq!(&got.trailers, &trailers, "{}", &what);
                eventually("the request is whole", || backend.requests()[before].body_complete).await;
                let request = backend.request(before + 1).await;
                prop_assert!(
                    request.body == sent,
                    "{}: {} bytes of {} were received",
                    &what,
                    request.body.len(),
                    sent.len()
                );
                let trailers: Vec<_> =
                    request.trailers.iter().map(|(name, value)| (name.to_lowercase(), value.as_str())).collect();
                let expected = if case.sends_trailers() { vec![("x-check".to_owned(), "1")] } else { vec![] };
                prop_assert_eq!(trailers, expected, "{}", &what);
            }
        }
        Ok(())
    }
}

impl Case {
    fn sends_trailers(&self) -> bool {
        self.request_chunked && self.request_trailers
    }
}

fn script(case: Case, answer: &[u8], random: &mut Random) -> Script {
    let head = |body| Step::Head { status: 200, headers: vec![], body };
    if case.response == Form::Echo {
        return Script(vec![head(Body::Chunked), Step::EchoBody]);
    }
    let body = match case.response {
        Form::Length => Body::Length(answer.len()),
        Form::UntilClose => Body::Eof,
        _ => Body::Chunked,
    };
    let mut steps = vec![Step::ReadBody, head(body)];
    let mut rest = answer;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(random.up_to(rest.len().min(20_000)));
        steps.push(Step::Data(piece.to_vec()));
        rest = after;
    }
    steps.push(match case.response {
        Form::Trailers => Step::Trailers(vec![("x-sum".into(), "1".into())]),
        Form::UntilClose => Step::Close,
        _ => Step::End,
    });
    Script(steps)
}

async fn over_http1(address: SocketAddr, path: &str, case: Case, body: &[u8], random: &mut Random) -> Response {
    let mut wire = format!("POST {path} HTTP/1.1\r\nHost: a\r\n").into_bytes();
    if case.request_chunked {
        wire.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
        let mut rest = body;
        while !rest.is_empty() {
            let (chunk, after) = rest.split_at(random.up_to(rest.len().min(30_000)));
            // Some in the canonical form, some not: upper case, leading zeros, extensions.
            let size = match random.up_to(4) {
                1 => format!("{:X}\r\n", chunk.len()),
                2 => format!("00{:x}\r\n", chunk.len()),
                3 => format!("{:x};name=\"value\"\r\n", chunk.len()),
                _ => format!("{:x}\r\n", chunk.len()),
            };
            wire.extend_from_slice(size.as_bytes());
            wire.extend_from_slice(chunk);
            wire.extend_from_slice(b"\r\n");
            rest = after;
        }
        wire.extend_from_slice(b"0\r\n");
        if case.request_trailers {
            wire.extend_from_slice(b"X-Check: 1\r\n");
        }
        wire.extend_from_slice(b"\r\n");
    } else {
        wire.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
        wire.extend_from_slice(body);
    }
    let mut client = RawClient::over(Splitting::connect(address, case).await);
    client.exchange(&wire, wire.len()).await
}

async fn over_http2(address: SocketAddr, path: &str, case: Case, body: &[u8]) -> Response {
    let client = Http2Client::over(Splitting::connect(address, case).await).await;
    let mut request = http2_request("POST", address, path);
    if !case.request_chunked {
        request.headers_mut().insert("content-length", body.len().into());
    }
    let trailers: &[(&str, &str)] = if case.sends_trailers() { &[("x-check", "1")] } else { &[] };
    client.fetch_with(request, body, trailers).await
}

/// A socket whose every read and write moves a random number of bytes.
struct Splitting {
    stream: TcpStream,
    random: Random,
    piece_max: usize,
}

impl Splitting {
    async fn connect(address: SocketAddr, case: Case) -> Splitting {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        if case.seed % 4 == 1 {
            // The proxy's writes are split, too.
            socket.set_recv_buffer_size(4096).expect("a size");
        }
        let stream = within("connect", socket.connect(address)).await.expect("something listens");
        stream.set_nodelay(true).expect("a TCP socket");
        Splitting { stream, random: Random(case.seed), piece_max: case.piece_max }
    }
}

impl AsyncRead for Splitting {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let most = self.piece_max.min(buffer.remaining()).max(1);
        let count = self.random.up_to(most);
        let mut bytes = vec![0; count];
        let mut part = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut part))?;
        buffer.put_slice(part.filled());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Splitting {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
        let most = self.piece_max.min(data.len()).max(1);
        let count = self.random.up_to(most).min(data.len());
        Pin::new(&mut self.stream).poll_write(context, &data[..count])
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A place in front of an endpoint that passes bytes on in pieces of random size.
async fn splitter(endpoint: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        let mut seed = 0x9e37_79b9_7f4a_7c15;
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(endpoint).await else { return };
            for stream in [&near, &far] {
                stream.set_nodelay(true).expect("a TCP socket");
            }
            let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
            seed += 2;
            tokio::spawn(pass_on(near_read, far_write, Random(seed)));
            tokio::spawn(pass_on(far_read, near_write, Random(!seed)));
        }
    });
    address
}

async fn pass_on(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, mut random: Random) {
    let mut bytes = [0; 20_000];
    loop {
        // Mostly a few bytes at a time or much; now and then one by one for a while.
        let most = [1, 7, 300, 3_000, 20_000][random.up_to(5) - 1];
        let count = random.up_to(most);
        match from.read(&mut bytes[..count]).await {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                if to.write_all(&bytes[..count]).await.is_err() {
                    break;
                }
            }
        }
    }
    // The end is passed on as an end.
    let _ = to.shutdown().await;
}
