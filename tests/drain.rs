//! Drain: the proxy ends, by call and by SIGTERM, and no stream is lost.

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use longhaul::app::App;
use longhaul::control::shutdown::Ended;
use longhaul::drain::Phase;
use longhaul::ids;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";

fn config(endpoint: &str, shutdown: &str) -> String {
    format!(
        "shutdown: {shutdown}\nservices:\n  - name: support\n    versions:\n      - {{name: stable, endpoints: [\"{endpoint}\"]}}\n"
    )
}

async fn ended(app: App) -> Ended {
    let wait = tokio::task::spawn_blocking(move || app.wait());
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("the end").expect("no panic")
}

async fn refuses(address: SocketAddr) {
    eventually_async("new connections are refused", || async { TcpStream::connect(address).await.is_err() }).await;
}

/// Opens an event stream and reads its first event.
async fn open_stream(address: SocketAddr, backend: &Backend) -> (RawClient, Head, Drip) {
    let mut client = RawClient::connect(address).await;
    client.send(GET).await;
    let drip = backend.drip().await;
    drip.event("first").await;
    let head = client.read_head().await;
    client.read_chunks_until("first").await;
    (client, head, drip)
}

async fn next_data(body: &mut h2::RecvStream) -> Option<Result<bytes::Bytes, h2::Error>> {
    let data = within("data", body.data()).await;
    if let Some(Ok(data)) = &data {
        let _ = body.flow_control().release_capacity(data.len());
    }
    data
}

#[tokio::test]
async fn a_drain_goes_through_its_stages() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&config(backend.url(), "{delay: 2s, timeout: 20s}")).await;
    let (mut streaming, head, drip) = open_stream(proxy.address, &backend).await;
    assert_eq!(head.header("connection"), None);
    let mut idle = proxy.connect().await;
    let mut second_idle = proxy.connect().await;
    for client in [&mut idle, &mut second_idle] {
        backend.next(Script::ok("before"));
        client.send(GET).await;
        assert_eq!(client.read_response().await.text(), "before");
    }

    // Announced: not ready, everything served, on new connections too.
    proxy.app.drain.drain();
    eventually_async("not ready", || async { proxy.admin("GET", "/readyz").await.status() == 503 }).await;
    backend.next(Script::ok("meanwhile"));
    let meanwhile = get(proxy.address, "/", "").await;
    assert_eq!((meanwhile.text().as_str(), meanwhile.header("connection")), ("meanwhile", None));
    assert_eq!(proxy.app.running.drain.phase(), Phase::Announced, "the delay was too short for this machine");

    // Draining: listeners closed; a connection that was not told yet is served once more, and told.
    refuses(proxy.address).await;
    backend.next(Script::ok("last"));
    idle.send(GET).await;
    let last = idle.read_response().await;
    assert_eq!((last.text().as_str(), last.header("connection")), ("last", Some("close")));
    assert_eq!(idle.closed().await, b"");
    assert_eq!(proxy.admin("GET", "/readyz").await.status(), 503);

    // The open stream goes on to its own end.
    drip.event("second").await;
    streaming.read_chunks_until("second").await;
    drip.finish().await;
    assert_eq!(streaming.read_chunk().await, None);
    assert_eq!(ended(proxy.app).await, Ended { cut: 0, forced: false });
    assert_eq!(second_idle.closed().await, b"");
}

#[tokio::test]
async fn http2_streams_finish_after_the_goaway() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&config(backend.url(), "{delay: 0s, timeout: 20s}")).await;
    let client = Http2Client::connect(proxy.address).await;
    let stream = client.open(http2_request("GET", proxy.address, "/"), true).await;
    let drip = backend.drip().await;
    drip.event("first").await;
    let (_, mut body) = stream.head().await;
    assert!(next_data(&mut body).await.is_some_and(|data| data.is_ok()));

    // These race with the GOAWAY, which allows for it.
    backend.each(|_| Script::ok("raced"));
    proxy.app.drain.drain();
    for _ in 0..3 {
        let Ok(stream) = client.try_open(http2_request("GET", proxy.address, "/")).await else { break };
        let (head, mut body) = match stream.try_head().await {
            Ok(answer) => answer,
            // The client heard of it before the request had gone out.
            Err(error) if error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR) => break,
            Err(error) => panic!("no answer: {error}"),
        };
        assert_eq!(head.status, 200);
        assert_eq!(next_data(&mut body).await.expect("a body").expect("no reset"), "raced");
    }
    refuses(proxy.address).await;
    eventually_async("the client is told", || async {
        client.try_open(http2_request("GET", proxy.address, "/")).await.is_err()
    })
    .await;

    drip.event("second").await;
    assert!(next_data(&mut body).await.is_some_and(|data| data.is_ok()));
    drip.finish().await;
    while let Some(data) = next_data(&mut body).await {
        assert_eq!(data.expect("no reset"), "", "nothing but the end was left");
    }
    assert_eq!(ended(proxy.app).await, Ended { cut: 0, forced: false });
}

#[tokio::test]
async fn a_slow_http2_reader_gets_the_last_byte() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&config(backend.url(), "{delay: 0s, timeout: 20s}")).await;
    let client = Http2Client::connect(proxy.address).await;
    // More than the client's window, less than the proxy may keep for it: the exchange is over, its bytes are not.
    let text = "z".repeat(65_535 + 40_000);
    backend.next(Script::answer(200, &[], &text));
    let (_, mut body) = client.open(http2_request("GET", proxy.address, "/"), true).await.head().await;
    eventually("the endpoint is done", || backend.in_flight() == 0).await;
    proxy.metric_becomes("longhaul_endpoint_outstanding_runs", &[], 0.0).await;
    proxy.app.drain.drain();
    refuses(proxy.address).await;
    let (mut length, waiting) = (0, tokio::spawn(ended(proxy.app)));
    // Long enough for a drain that sees nothing to wait for to come to its end.
    let early = tokio::time::timeout(Duration::from_millis(500), async {
        while !waiting.is_finished() {
            tokio::time::sleep(Duration::from_millis(5)).await
        }
    });
    assert!(early.await.is_err(), "the drain did not wait");
    while let Some(data) = next_data(&mut body).await {
        length += data.expect("no reset").len();
    }
    assert_eq!(length, text.len());
    assert_eq!(waiting.await.expect("no panic"), Ended { cut: 0, forced: false });
}

#[tokio::test]
async fn an_idle_http2_client_that_is_gone_holds_nothing_up_for_long() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&config(backend.url(), "{delay: 0s, timeout: 60s}")).await;
    // It never reads, so it never answers the ping after the GOAWAY.
    let mut silent = proxy.connect().await;
    silent.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    proxy.metric_becomes("longhaul_connections", &[], 1.0).await;
    proxy.app.drain.drain();
    assert_eq!(ended(proxy.app).await, Ended { cut: 0, forced: false });
}

#[tokio::test]
async fn who_has_connected_before_the_listener_closed_is_served() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&config(backend.url(), "{delay: 0s, timeout: 20s}")).await;
    let mut clients = Vec::new();
    for _ in 0..100 {
        let mut client = proxy.connect().await;
        client.send(GET).await;
        clients.push(client);
    }
    proxy.app.drain.drain();
    for client in &mut clients {
        assert_eq!(client.read_response().await.text(), "ok");
    }
    assert_eq!(ended(proxy.app).await, Ended { cut: 0, forced: false });
}

#[tokio::test]
async fn the_time_out_cuts_visibly() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&config(backend.url(), "{delay: 0s, timeout: 1s}")).await;
    let (mut http1, _, _first) = open_stream(proxy.address, &backend).await;
    let client = Http2Client::connect(proxy.address).await;
    let stream = client.open(http2_request("GET", proxy.address, "/"), true).await;
    let second = backend.drip().await;
    second.event("first").await;
    let (_, mut body) = stream.head().await;
    assert!(next_data(&mut body).await.is_some_and(|data| data.is_ok()));
    proxy.app.drain.drain();
    let end = ended(proxy.app).await;
    // Two exchanges, and the HTTP/2 connection that was to outlive its streams.
    assert!(end.cut >= 2 && !end.forced, "{end:?}");
    let word = String::from_utf8(http1.read_chunk().await.expect("a last word")).expect("text");
    assert!(word.starts_with("retry: ") && word.ends_with("\n\n"), "{word:?}");
    assert_eq!(http1.closed().await, b"", "no last chunk");
    let end = loop {
        match next_data(&mut body).await {
            Some(Ok(data)) => assert!(data.starts_with(b"retry: "), "{data:?}"),
            end => break end,
        }
    };
    assert!(end.is_some_and(|end| end.is_err()), "an end as if complete");
}

#[tokio::test]
async fn what_the_proxy_cuts_at_its_end_is_spread_and_a_second_word_ends_it_at_once() {
    for forced in [false, true] {
        let backend = Backend::start().await;
        backend.drip_each();
        let timeout = if forced { "20s" } else { "2s" };
        let proxy = start_proxy(&config(backend.url(), &format!("{{delay: 0s, timeout: {timeout}}}"))).await;
        let mut streams = Vec::new();
        for _ in 0..20 {
            streams.push(open_stream(proxy.address, &backend).await);
        }
        proxy.app.drain.drain();
        refuses(proxy.address).await;
        if forced {
            proxy.app.drain.force();
            let began = ids::now();
            assert_eq!(ended(proxy.app).await, Ended { cut: 20, forced: true });
            for (client, ..) in &mut streams {
                assert_eq!(client.closed().await, b"");
            }
            assert!(began.elapsed() < Duration::from_secs(10), "at once");
            continue;
        }
        let began = ids::now();
        let mut cuts = JoinSet::new();
        for (mut client, _, drip) in streams {
            cuts.spawn(async move {
                client.read_to_end_of_body().await;
                drop(drip);
                began.elapsed()
            });
        }
        let mut cuts = cuts.join_all().await;
        cuts.sort_unstable();
        assert!(cuts[19] - cuts[0] >= Duration::from_millis(50), "all at once: {cuts:?}");
        assert_eq!(ended(proxy.app).await, Ended { cut: 20, forced: false });
    }
}

#[tokio::test]
async fn whoever_has_no_answer_at_the_end_is_told_so() {
    let backend = Backend::start().await;
    backend.next(Script::ok("too late").after(&Gate::new()));
    let text = config(backend.url(), "{delay: 0s, timeout: 1s}");
    let queue = "    runs: {max_per_endpoint: 1, queue: {max: 5, timeout: 60s}}\n    versions:";
    let proxy = start_proxy(&text.replace("    versions:", queue)).await;
    let run = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";
    let mut first = proxy.connect().await;
    first.send(run).await;
    backend.request(1).await;
    let mut waiting = proxy.connect().await;
    waiting.send(run).await;
    proxy.metric_becomes("longhaul_queued_runs", &[], 1.0).await;
    proxy.app.drain.drain();
    for client in [&mut waiting, &mut first] {
        let answer = client.read_response().await;
        assert_eq!((answer.status(), answer.code().as_deref()), (503, Some("draining")));
    }
    // The one that was dispatched.
    assert_eq!(ended(proxy.app).await, Ended { cut: 1, forced: false });
    assert_eq!(backend.request_count(), 1);
}

#[tokio::test]
async fn a_request_of_which_a_part_has_come_is_served() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&config(backend.url(), "{delay: 0s, timeout: 20s}")).await;
    let (mut first, mut second) = (proxy.connect().await, proxy.connect().await);
    first.send("GET / HTTP/1.1\r\nHo").await;
    // Behind an answer as well as at the start of a connection.
    second.send(GET).await;
    assert_eq!(second.read_response().await.text(), "ok");
    second.send("GET / HTTP/1.1\r\nHo").await;
    eventually("both heads have begun", || proxy.app.running.open_exchanges.get() == 2).await;
    proxy.app.drain.drain();
    refuses(proxy.address).await;
    let waiting = tokio::spawn(ended(proxy.app));
    for client in [&mut first, &mut second] {
        assert!(!waiting.is_finished(), "the drain did not wait");
        client.send("st: a\r\n\r\n").await;
        let answer = client.read_response().await;
        assert_eq!((answer.text().as_str(), answer.header("connection")), ("ok", Some("close")));
    }
    assert_eq!(waiting.await.expect("no panic"), Ended { cut: 0, forced: false });
}

/// A client that does not answer the ping behind a GOAWAY, so that the proxy can't know that it was read.
#[tokio::test]
async fn a_start_long_after_the_goaway_is_refused_and_a_read_is_not() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&config(backend.url(), "{delay: 0s, timeout: 20s}")).await;
    let mut connection = TcpStream::connect(proxy.address).await.expect("open");
    connection.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("open");
    // What keeps the connection open: a GET, which is no run.
    send_head(&mut connection, 1, 0x82).await;
    let drip = backend.drip().await;
    drip.event("first").await;
    until_frame(&mut connection, |kind, id, _| (kind, id) == (0, 1)).await;

    proxy.app.drain.drain();
    // GOAWAY is frame 7.
    until_frame(&mut connection, |kind, _, _| kind == 7).await;
    backend.each(|_| Script::ok("raced"));
    // A start that was on its way is served.
    send_head(&mut connection, 3, 0x83).await;
    until_frame(&mut connection, |kind, id, payload| (kind, id) == (0, 3) && payload == b"raced").await;
    let mut id = 5;
    loop {
        send_head(&mut connection, id, 0x83).await;
        let payload = until_frame(&mut connection, |kind, stream, _| (kind, stream) == (0, id)).await;
        if payload != b"raced" {
            let text = String::from_utf8(payload).expect("text");
            assert!(text.contains(r#""status":503"#) && text.contains(r#""code":"draining""#), "{text}");
            break;
        }
        assert!(id < 4_001, "no start was refused");
        tokio::time::sleep(Duration::from_millis(5)).await;
        id += 2;
    }
    // What is no start goes on.
    send_head(&mut connection, id + 2, 0x82).await;
    until_frame(&mut connection, |kind, stream, payload| (kind, stream) == (0, id + 2) && payload == b"raced").await;
    assert_eq!(proxy.metric("longhaul_runs_total", &["outcome=\"rejected\""]).await, Some(1.0));
    drip.finish().await;
    drop(connection);
    assert_eq!(ended(proxy.app).await, Ended { cut: 0, forced: false });
}

/// The head of a request without a body, by the static table: `method` is 0x82 (GET) or 0x83 (POST).
async fn send_head(connection: &mut TcpStream, id: u32, method: u8) {
    // Frame HEADERS with END_STREAM and END_HEADERS; then the method, `:scheme: http`, `:path: /`, `:authority: a`.
    let fields = [method, 0x86, 0x84, 0x01, 1, b'a'];
    let frame = [&[0, 0, fields.len() as u8, 1, 5][..], &id.to_be_bytes(), &fields].concat();
    connection.write_all(&frame).await.expect("open");
}

/// Reads frames (their kind, stream and payload) until one is it; its payload.
async fn until_frame(connection: &mut TcpStream, is_it: impl Fn(u8, u32, &[u8]) -> bool) -> Vec<u8> {
    within("the frame", async {
        loop {
            let mut head = [0; 9];
            connection.read_exact(&mut head).await.expect("a frame");
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            connection.read_exact(&mut payload).await.expect("a whole frame");
            if is_it(head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), &payload) {
                return payload;
            }
        }
    })
    .await
}

#[tokio::test]
async fn the_connections_of_a_removed_listener_finish() {
    let backend = Backend::start().await;
    backend.drip_each();
    let rest = config(backend.url(), "{delay: 0s, timeout: 10s}");
    let both = "listeners: [{name: a, address: '127.0.0.1:0'}, {name: b, address: '127.0.0.1:0'}]\n";
    let proxy = start_proxy(&format!("{both}{rest}")).await;
    let removed = proxy.listeners[1];
    let (mut streaming, _, drip) = open_stream(removed, &backend).await;
    let http2 = Http2Client::connect(removed).await;
    let mut idle = RawClient::connect(removed).await;
    backend.next(Script::ok("before"));
    idle.send(GET).await;
    assert_eq!(idle.read_response().await.header("connection"), None);

    let one = "listeners: [{name: a, address: '127.0.0.1:0'}]\n";
    assert_eq!(proxy.reload(&format!("{one}{rest}")).await.status(), 200);
    refuses(removed).await;
    backend.next(Script::ok("after"));
    idle.send(GET).await;
    let after = idle.read_response().await;
    assert_eq!((after.text().as_str(), after.header("connection")), ("after", Some("close")));
    assert_eq!(idle.closed().await, b"");
    // HTTP/2 is served and told by GOAWAY.
    backend.next(Script::ok("over http2"));
    assert_eq!(http2.fetch(http2_request("GET", removed, "/"), b"").await.text(), "over http2");
    eventually_async("the client is told", || async {
        http2.try_open(http2_request("GET", removed, "/not-served")).await.is_err()
    })
    .await;

    drip.event("second").await;
    streaming.read_chunks_until("second").await;
    drip.finish().await;
    assert_eq!(streaming.read_chunk().await, None);
    backend.next(Script::ok("the other"));
    assert_eq!(get(proxy.address, "/", "").await.text(), "the other");
}

// ---- the program ----

/// The program with this configuration, and where it listens.
async fn start_program(directory: &std::path::Path, config: &str) -> (Program, SocketAddr) {
    let file = directory.join("longhaul.yaml");
    let head =
        "listeners: [{name: public, address: '127.0.0.1:0'}]\nadmin: {address: '127.0.0.1:0'}\nlog: {access: false}\n";
    std::fs::write(&file, format!("{head}{config}")).expect("writable");
    let program = Program::start(&["run", "-c", file.to_str().expect("UTF-8")]);
    let rest = program.after(" listening on ").await;
    let address = rest.split_whitespace().next().expect("an address").parse().expect("an address");
    (program, address)
}

#[tokio::test]
async fn sigterm_with_open_streams_loses_none() {
    const STREAMS: usize = 50;
    const EVENTS: usize = 20;
    let directory = tempfile::tempdir().expect("a directory");
    let backend = Backend::start().await;
    backend.drip_each();
    let (mut program, address) =
        start_program(directory.path(), &config(backend.url(), "{delay: 200ms, timeout: 30s}")).await;
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        streams.push(open_stream(address, &backend).await);
    }
    program.signal("TERM");
    for number in 0..EVENTS {
        if number == EVENTS / 2 {
            refuses(address).await;
        }
        for (_, _, drip) in &streams {
            drip.event(&number.to_string()).await;
        }
    }
    for (mut client, _, drip) in streams {
        drip.finish().await;
        let mut seen = Vec::new();
        while let Some(chunk) = client.read_chunk().await {
            seen.extend_from_slice(&chunk);
        }
        let expected: String = (0..EVENTS).map(|number| format!("data: {number}\n\n")).collect();
        assert_eq!(String::from_utf8_lossy(&seen), expected);
    }
    assert_eq!(program.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_second_sigterm_ends_at_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let backend = Backend::start().await;
    backend.drip_each();
    let (mut program, address) =
        start_program(directory.path(), &config(backend.url(), "{delay: 60s, timeout: 10m}")).await;
    let (mut client, _, drip) = open_stream(address, &backend).await;
    program.signal("TERM");
    program.after("draining").await;
    drip.event("still served").await;
    client.read_chunks_until("still served").await;
    program.signal("TERM");
    program.ended().await;
    assert_eq!(client.closed().await, b"", "no last chunk");
    drip.until_gone().await;
}
