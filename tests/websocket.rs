//! WebSocket and other Upgrades through the proxy, spoken by tungstenite on both ends; over HTTP/2 too (RFC 8441).

mod support;

use std::net::SocketAddr;

use flate2::{Compress, Compression, FlushCompress};
use futures_util::{SinkExt, StreamExt};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::client::Response as Handshake;
use tokio_tungstenite::tungstenite::handshake::server::{Request as Asked, Response as Answer};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};

const RUNS: &str = "longhaul_outstanding_runs";

fn service(endpoint: &str) -> String {
    format!("services:\n  - name: support\n    versions:\n      - {{name: stable, endpoints: [\"{endpoint}\"]}}\n")
}

/// What a server of tungstenite does with its connection.
#[derive(Clone, Copy)]
enum Conduct {
    Echo,
    /// Says one word and closes in good order.
    CloseFirst,
    /// Says one word and is gone.
    Vanish,
}

/// Serves WebSockets; takes the subprotocol `agent.v2` where it is offered. Returns its URL.
async fn websocket_server(conduct: Conduct) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, conduct));
        }
    });
    url
}

#[expect(clippy::result_large_err, reason = "the callback's type is tungstenite's")]
async fn serve(stream: TcpStream, conduct: Conduct) {
    let choose = |asked: &Asked, mut answer: Answer| {
        let offered = asked.headers().get("sec-websocket-protocol").and_then(|it| it.to_str().ok()).unwrap_or_default();
        if offered.split(", ").any(|name| name == "agent.v2") {
            answer.headers_mut().insert("sec-websocket-protocol", "agent.v2".parse().expect("a value"));
        }
        if let Some(extensions) = asked.headers().get("x-echo-extensions") {
            answer.headers_mut().insert("x-seen-extensions", extensions.clone());
        }
        Ok(answer)
    };
    let mut socket = tokio_tungstenite::accept_hdr_async(stream, choose).await.expect("a handshake");
    match conduct {
        Conduct::Echo => {
            while let Some(Ok(message)) = socket.next().await {
                if message.is_ping() {
                    // Tungstenite answers by itself.
                    continue;
                }
                if message.is_close() || socket.send(message).await.is_err() {
                    break;
                }
            }
            let _ = socket.close(None).await;
        }
        Conduct::CloseFirst => {
            socket.send("hello".into()).await.expect("open");
            let frame = CloseFrame { code: CloseCode::Away, reason: "done".into() };
            socket.close(Some(frame)).await.expect("open");
            while let Some(Ok(_)) = socket.next().await {}
        }
        Conduct::Vanish => socket.send("hello".into()).await.expect("open"),
    }
}

async fn connect(proxy: &Proxy, headers: &[(&'static str, &str)]) -> (WebSocketStream<TcpStream>, Handshake) {
    let mut request = format!("ws://{}/chat", proxy.address).into_client_request().expect("a request");
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().expect("a value"));
    }
    let stream = TcpStream::connect(proxy.address).await.expect("something listens");
    within("the handshake", tokio_tungstenite::client_async(request, stream)).await.expect("a WebSocket")
}

async fn next<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(socket: &mut WebSocketStream<S>) -> Message {
    within("a message", socket.next()).await.expect("open").expect("a good message")
}

#[tokio::test]
async fn messages_of_all_sizes_come_back() {
    let proxy = start_proxy(&service(&websocket_server(Conduct::Echo).await)).await;
    let (mut socket, handshake) = connect(&proxy, &[]).await;
    assert_eq!(handshake.status(), 101);
    proxy.metric_becomes(RUNS, &[], 1.0).await;
    for length in [0, 1, 125, 126, 65_535, 65_536, 4 * 1024 * 1024] {
        let text = "x".repeat(length);
        socket.send(text.as_str().into()).await.expect("open");
        assert_eq!(next(&mut socket).await.into_text().expect("text").as_str(), text);
    }
    socket.send(Message::Ping("p".into())).await.expect("open");
    assert!(next(&mut socket).await.is_pong());
    // The client closes first, in good order: the endpoint says the last word.
    socket.close(None).await.expect("open");
    while let Some(Ok(message)) = within("the end", socket.next()).await {
        assert!(message.is_close());
    }
    proxy.metric_becomes(RUNS, &[], 0.0).await;
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\""], 1.0).await;
}

#[tokio::test]
async fn subprotocols_and_extensions_pass() {
    let proxy = start_proxy(&service(&websocket_server(Conduct::Echo).await)).await;
    let offer = [("sec-websocket-protocol", "agent.v1, agent.v2"), ("x-echo-extensions", "kept")];
    let (_socket, handshake) = connect(&proxy, &offer).await;
    assert_eq!(handshake.headers()["sec-websocket-protocol"], "agent.v2");
    assert_eq!(handshake.headers()["x-seen-extensions"], "kept");

    let backend = Backend::start().await;
    backend.next(Script(vec![
        Step::Raw(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
              Sec-WebSocket-Accept: abc\r\nSec-WebSocket-Extensions: permessage-deflate; client_no_context_takeover\r\n\r\n"
                .to_vec(),
        ),
        Step::Tunnel,
    ]));
    let proxy = start_proxy(&service(backend.url())).await;
    let mut client = proxy.connect().await;
    client
        .send(
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n",
        )
        .await;
    let head = client.read_head().await;
    assert_eq!(head.status, 101);
    assert_eq!(head.header("sec-websocket-extensions"), Some("permessage-deflate; client_no_context_takeover"));
    assert_eq!(head.header("sec-websocket-accept"), Some("abc"));
    let seen = backend.request(1).await;
    assert_eq!(seen.header("sec-websocket-extensions"), Some("permessage-deflate; client_max_window_bits"));
    assert_eq!(seen.header("sec-websocket-key"), Some("dGhlIHNhbXBsZSBub25jZQ=="));
    assert_eq!(seen.header("connection").map(str::to_ascii_lowercase).as_deref(), Some("upgrade"));
}

#[tokio::test]
async fn the_server_closes_first() {
    let proxy = start_proxy(&service(&websocket_server(Conduct::CloseFirst).await)).await;
    let (mut socket, _) = connect(&proxy, &[]).await;
    assert_eq!(next(&mut socket).await.into_text().expect("text").as_str(), "hello");
    let Message::Close(Some(frame)) = next(&mut socket).await else { panic!("no close frame") };
    assert_eq!((frame.code, frame.reason.as_str()), (CloseCode::Away, "done"));
    while let Some(Ok(_)) = within("the end", socket.next()).await {}
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\""], 1.0).await;
    proxy.metric_becomes(RUNS, &[], 0.0).await;
}

#[tokio::test]
async fn an_abrupt_end_reaches_the_other_side() {
    let proxy = start_proxy(&service(&websocket_server(Conduct::Vanish).await)).await;
    let (mut socket, _) = connect(&proxy, &[]).await;
    assert_eq!(next(&mut socket).await.into_text().expect("text").as_str(), "hello");
    let end = within("the end", socket.next()).await;
    assert!(matches!(end, None | Some(Err(_))), "{end:?}");
    proxy.metric_becomes(RUNS, &[], 0.0).await;

    // The client vanishes.
    let backend = Backend::start().await;
    backend.each(|_| Script::tunnel("websocket"));
    let proxy = start_proxy(&service(backend.url())).await;
    let (socket, _) = connect_raw(&proxy).await;
    proxy.metric_becomes(RUNS, &[], 1.0).await;
    drop(socket);
    eventually("the endpoint hears of it", || backend.open_connections() == 0).await;
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"cancelled\""], 1.0).await;
    proxy.metric_becomes(RUNS, &[], 0.0).await;

    // The endpoint resets.
    backend.next(Script(vec![
        Step::Raw(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nbye".to_vec()),
        Step::Reset,
    ]));
    let (mut client, _) = connect_raw(&proxy).await;
    client.closed().await;
    proxy.metric_becomes(RUNS, &[], 0.0).await;
}

/// A frame that carries the whole of a text message, compressed (RFC 7692 section 7.2.1).
fn compressed_frame(compress: &mut Compress, text: &str) -> Vec<u8> {
    let mut payload = Vec::with_capacity(text.len() + 1000);
    compress.compress_vec(text.as_bytes(), &mut payload, FlushCompress::Sync).expect("it can be compressed");
    payload.truncate(payload.len() - 4);
    let length = u8::try_from(payload.len()).expect("a short message");
    assert!(length < 126, "a short message");
    [&[0xc1, length], &payload[..]].concat()
}

#[tokio::test]
async fn runs_of_a_compressed_socket_are_counted_and_its_bytes_pass_as_they_are() {
    for (extensions, window_bits, keeps_window) in [
        ("permessage-deflate", 15, true),
        ("permessage-deflate; server_max_window_bits=9; client_max_window_bits=9", 9, true),
        ("permessage-deflate; server_no_context_takeover", 15, false),
    ] {
        let backend = Backend::start().await;
        let proxy = start_proxy(&service(backend.url())).await;
        let mut compress = Compress::new_with_window_bits(Compression::best(), false, window_bits);
        let mut frame = |text: &str| {
            let frame = compressed_frame(&mut compress, text);
            if !keeps_window {
                compress.reset();
            }
            frame
        };
        let created: Vec<_> = ["resp_1", "resp_2"]
            .map(|id| format!(r#"{{"type":"response.created","response":{{"id":"{id}","status":"in_progress"}}}}"#))
            .iter()
            .map(|text| frame(text))
            .collect();
        assert_eq!(created[1].len() < 16, keeps_window, "the second refers to the first: {}", created[1].len());
        let completed = frame(r#"{"type":"response.completed","response":{"id":"resp_1","status":"completed"}}"#);
        let gates = [Gate::new(), Gate::new()];
        let head = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Extensions: {extensions}\r\n\r\n"
        );
        backend.next(Script(vec![
            Step::Raw(head.into()),
            Step::Raw(created[0].clone()),
            Step::Wait(gates[0].clone()),
            Step::Raw(created[1].clone()),
            Step::Wait(gates[1].clone()),
            Step::Raw(completed.clone()),
            Step::Tunnel,
        ]));
        let mut client = proxy.connect().await;
        client.send("GET /v1/responses HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
        let head = client.read_head().await;
        assert_eq!((head.status, head.header("sec-websocket-extensions")), (101, Some(extensions)));
        assert_eq!(client.read_exact(created[0].len()).await, created[0]);
        proxy.metric_becomes(RUNS, &[], 1.0).await;
        gates[0].open();
        assert_eq!(client.read_exact(created[1].len()).await, created[1]);
        proxy.metric_becomes(RUNS, &[], 2.0).await;
        gates[1].open();
        assert_eq!(client.read_exact(completed.len()).await, completed);
        proxy.metric_becomes(RUNS, &[], 1.0).await;
        proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\""], 1.0).await;
        drop(client);
        proxy.metric_becomes(RUNS, &[], 0.0).await;
    }
}

/// The reader gives up, and nobody else notices.
#[tokio::test]
async fn what_can_not_be_inflated_passes_all_the_same() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(backend.url())).await;
    // A block of the reserved kind, then what could be read.
    let created = br#"{"type":"response.created","response":{"id":"resp_1"}}"#;
    let frames = [&b"\xc1\x01\x07\x81"[..], &[created.len() as u8], created].concat();
    backend.next(Script(vec![
        Step::Raw(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
              Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
                .to_vec(),
        ),
        Step::Raw(frames.clone()),
        Step::Tunnel,
    ]));
    let mut client = proxy.connect().await;
    client.send("GET /v1/responses HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
    assert_eq!(client.read_head().await.status, 101);
    assert_eq!(client.read_exact(frames.len()).await, frames);
    client.send("goes on").await;
    assert_eq!(client.read_exact(7).await, b"goes on");
    assert_eq!(proxy.metric(RUNS, &[]).await, Some(0.0));
}

fn upgrade(protocol: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n")
}

/// A client that has become a tunnel of `websocket`.
async fn connect_raw(proxy: &Proxy) -> (RawClient, Head) {
    let mut client = proxy.connect().await;
    client.send(upgrade("websocket")).await;
    let head = client.read_head().await;
    assert_eq!(head.status, 101);
    (client, head)
}

#[tokio::test]
async fn any_protocol_tunnels_its_bytes() {
    let backend = Backend::start().await;
    backend.each(|_| Script::tunnel("frobnicate/2"));
    let proxy = start_proxy(&service(backend.url())).await;
    let mut client = proxy.connect().await;
    client.send(upgrade("frobnicate/2")).await;
    let head = client.read_head().await;
    assert_eq!((head.status, head.header("upgrade")), (101, Some("frobnicate/2")));
    assert_eq!(head.header("longhaul-affinity"), Some("none"));
    for size in [1, 100, 1_000_000] {
        let bytes: Vec<u8> = (0..size).map(|number| (number % 251) as u8).collect();
        for piece in bytes.chunks(50_000) {
            client.send(piece).await;
            assert_eq!(client.read_exact(piece.len()).await, piece);
        }
    }
    // What looks like HTTP is none here.
    client.send("GET / HTTP/1.1\r\n\r\n0\r\n\r\n").await;
    assert_eq!(client.read_exact(23).await, b"GET / HTTP/1.1\r\n\r\n0\r\n\r\n");
    assert_eq!(backend.request_count(), 1);
}

#[tokio::test]
async fn tunnel_bytes_may_come_together_with_the_heads() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(backend.url())).await;
    // The endpoint's first bytes in one packet with its 101, again and again for both orders of events.
    for round in 0..20 {
        backend.next(Script(vec![
            Step::Raw(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nfirst words".to_vec(),
            ),
            Step::Tunnel,
        ]));
        let mut client = proxy.connect().await;
        // So do the client's: they wait until the endpoint has agreed.
        client.send(upgrade("x") + "early bird").await;
        assert_eq!(client.read_head().await.status, 101, "round {round}");
        assert_eq!(client.read_exact(21).await, b"first wordsearly bird");
    }
    // An endpoint that does not agree never sees them.
    backend.next(Script::answer(403, &[], "no"));
    let mut client = proxy.connect().await;
    client.send(upgrade("x") + "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_response().await.status(), 403);
    assert_eq!(client.closed().await, b"");
    assert!(backend.requests().iter().all(|request| request.target == "/"));
}

#[tokio::test]
async fn the_answer_to_a_bodiless_upgrade_with_a_length_may_come_at_once() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(backend.url())).await;
    for _ in 0..20 {
        backend.next(Script::tunnel("x"));
        let mut client = proxy.connect().await;
        client
            .send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
            .await;
        assert_eq!(client.read_head().await.status, 101);
        client.send("ping").await;
        assert_eq!(client.read_exact(4).await, b"ping");
    }
}

#[tokio::test]
async fn a_refused_upgrade_is_a_plain_answer() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(backend.url())).await;
    let mut client = proxy.connect().await;
    for (status, body) in [(200, "hello"), (403, "no"), (426, "")] {
        backend.next(Script::answer(status, &[], body));
        client.send(upgrade("websocket")).await;
        let answer = client.read_response().await;
        assert_eq!((answer.status(), answer.text().as_str()), (status, body));
    }
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_response().await.text(), "ok");
    assert_eq!(backend.connections(), 1);
    proxy.metric_becomes(RUNS, &[], 0.0).await;

    // A protocol that nobody asked for is nonsense.
    backend.next(Script::tunnel("other"));
    let answer = {
        let mut client = proxy.connect().await;
        client.send(upgrade("websocket")).await;
        client.read_response().await
    };
    assert_eq!((answer.status(), answer.code().as_deref()), (502, Some("upstream_reset")));
}

// ---- over HTTP/2 ----

fn extended_connect(address: SocketAddr) -> http::Request<()> {
    let mut request = http2_request("CONNECT", address, "/chat");
    request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    request.headers_mut().insert("sec-websocket-version", "13".parse().expect("a value"));
    request.headers_mut().insert("sec-websocket-protocol", "agent.v2".parse().expect("a value"));
    request
}

/// A connection on which the proxy has said that it serves extended CONNECT.
async fn http2_client(proxy: &Proxy) -> Http2Client {
    let client = Http2Client::connect(proxy.address).await;
    client.fetch(http2_request("GET", proxy.address, "/not-a-run"), b"").await;
    client
}

/// A stream of HTTP/2 as a byte stream.
fn byte_stream(mut send: h2::SendStream<bytes::Bytes>, mut receive: h2::RecvStream) -> DuplexStream {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let (mut reader, mut writer) = tokio::io::split(theirs);
    tokio::spawn(async move {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(count @ 1..) = reader.read(&mut buffer).await {
            let mut rest = bytes::Bytes::copy_from_slice(&buffer[..count]);
            while !rest.is_empty() {
                send.reserve_capacity(rest.len());
                let Some(Ok(room)) = std::future::poll_fn(|context| send.poll_capacity(context)).await else { return };
                if send.send_data(rest.split_to(room.min(rest.len())), false).is_err() {
                    return;
                }
            }
        }
        let _ = send.send_data(bytes::Bytes::new(), true);
    });
    tokio::spawn(async move {
        while let Some(Ok(data)) = receive.data().await {
            let _ = receive.flow_control().release_capacity(data.len());
            if writer.write_all(&data).await.is_err() {
                return;
            }
        }
        let _ = writer.shutdown().await;
    });
    ours
}

#[tokio::test]
async fn websocket_over_http2_reaches_an_http1_endpoint() {
    let service = service(&websocket_server(Conduct::Echo).await);
    // The first request of a connection is answered by the proxy itself: the endpoint speaks nothing but WebSocket.
    let routes = "routes: [{match: {path: /not-a-run}, respond: {status: 204, body: ''}}, {service: support}]\n";
    let proxy = start_proxy(&format!("{routes}{service}")).await;
    let client = http2_client(&proxy).await;
    let (send, response) = client.open(extended_connect(proxy.address), false).await.split();
    let (parts, receive) = within("the answer", response).await.expect("an answer").into_parts();
    assert_eq!(parts.status, 200);
    assert_eq!(parts.headers["sec-websocket-protocol"], "agent.v2");
    for name in ["sec-websocket-accept", "upgrade", "connection"] {
        assert!(!parts.headers.contains_key(name), "{name}");
    }
    proxy.metric_becomes(RUNS, &[], 1.0).await;
    let mut socket = WebSocketStream::from_raw_socket(byte_stream(send, receive), Role::Client, None).await;
    for length in [0, 5, 70_000, 2 * 1024 * 1024] {
        let text = "y".repeat(length);
        socket.send(text.as_str().into()).await.expect("open");
        assert_eq!(next(&mut socket).await.into_text().expect("text").as_str(), text);
    }
    socket.close(None).await.expect("open");
    while let Some(Ok(message)) = within("the end", socket.next()).await {
        assert!(message.is_close());
    }
    proxy.metric_becomes(RUNS, &[], 0.0).await;
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\""], 1.0).await;
}

#[tokio::test]
async fn nothing_of_an_http2_tunnel_passes_before_the_endpoint_has_agreed() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(backend.url())).await;
    let client = http2_client(&proxy).await;
    let gate = Gate::new();
    backend.next(Script::answer(403, &[], "no").after(&gate));
    let mut stream = client.open(extended_connect(proxy.address), false).await;
    stream.send(b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", false).await;
    backend.request(2).await;
    // By now the proxy has the bytes: this came after them.
    assert_eq!(client.fetch(http2_request("GET", proxy.address, "/after"), b"").await.text(), "ok");
    gate.open();
    let (head, _) = stream.head().await;
    assert_eq!(head.status, 403);
    // The connection to the endpoint is used again, and is in step.
    for _ in 0..3 {
        assert_eq!(client.fetch(http2_request("GET", proxy.address, "/after"), b"").await.text(), "ok");
    }
    assert!(backend.requests().iter().all(|request| request.target != "/smuggled"), "{:?}", backend.requests());
    proxy.metric_becomes(RUNS, &[], 0.0).await;

    // Once it has agreed, they pass.
    backend.next(Script::tunnel("websocket"));
    let mut stream = client.open(extended_connect(proxy.address), false).await;
    stream.send(b"early bird", false).await;
    let (head, mut receive) = stream.head().await;
    assert_eq!(head.status, 200);
    let mut seen = Vec::new();
    while seen.len() < 10 {
        seen.extend_from_slice(&within("data", receive.data()).await.expect("open").expect("no reset"));
    }
    assert_eq!(seen, b"early bird");
}

#[tokio::test]
async fn a_reset_of_an_http2_tunnel_reaches_the_endpoint() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(backend.url())).await;
    let client = http2_client(&proxy).await;
    backend.each(|_| Script::tunnel("websocket"));
    let mut stream = client.open(extended_connect(proxy.address), false).await;
    proxy.metric_becomes(RUNS, &[], 1.0).await;
    stream.reset();
    proxy.metric_becomes(RUNS, &[], 0.0).await;
    eventually("the endpoint hears of it", || backend.in_flight() == 0).await;
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"cancelled\""], 1.0).await;
}
