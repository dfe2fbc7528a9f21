//! Drain of an endpoint: who may ask for it, how what is left at its deadline is cut, and when it will be empty.

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use bytes::Bytes;
use longhaul::ids;
use serde_json::Value;
use support::*;
use tokio::net::TcpListener;

fn config(endpoints: &[&Backend], rest: &str) -> String {
    let urls: Vec<String> = endpoints.iter().map(|backend| format!("\"{}\"", backend.url())).collect();
    format!(
        "services:\n  - name: support\n    session: {{key: [{{header: x-session-id}}]}}\n{rest}    versions:\n      - {{name: stable, endpoints: [{}]}}\n",
        urls.join(", ")
    )
}

async fn start_session(address: SocketAddr, session: &str) -> Response {
    post(address, "/run", &format!("x-session-id: {session}\r\n"), "{}").await
}

/// Opens an event stream and reads its first event.
async fn open_stream(address: SocketAddr, backend: &Backend) -> (RawClient, Drip) {
    let mut client = RawClient::connect(address).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
    let drip = backend.drip().await;
    drip.event("first").await;
    client.read_head().await;
    client.read_chunks_until("first").await;
    (client, drip)
}

async fn becomes(proxy: &Proxy, backend: &Backend, state: &str, by: &[&str]) {
    eventually_async(&format!("{} is {state} by {by:?}", backend.name()), || async {
        let endpoint = proxy.endpoint(&backend.name()).await.expect("an endpoint");
        let reasons = endpoint["drain"]["by"].as_array().cloned().unwrap_or_default();
        endpoint["state"] == state && reasons == by.iter().map(|one| Value::from(*one)).collect::<Vec<_>>()
    })
    .await;
}

/// Answers its check with the status that is set, everything else with `ok` and these header fields.
fn answers(backend: &Backend, health: &Arc<AtomicU16>, fields: &'static [(&'static str, &'static str)]) {
    let health = Arc::clone(health);
    backend.each(move |request| match request.target.as_str() {
        "/health" => Script::status(health.load(Ordering::SeqCst)),
        _ => Script::answer(200, fields, "ok"),
    });
}

#[tokio::test]
async fn a_health_answer_drains_the_endpoint_until_another_ends_that() {
    let (draining, other) = (Backend::start().await, Backend::start().await);
    let (health, well) = (Arc::new(AtomicU16::new(200)), Arc::new(AtomicU16::new(200)));
    answers(&draining, &health, &[]);
    answers(&other, &well, &[]);
    let check = "    health: {path: /health, interval: 100ms, draining_status: 503, unhealthy_after: 1}\n";
    let proxy = start_proxy(&config(&[&draining, &other], check)).await;
    for backend in [&draining, &other] {
        becomes(&proxy, backend, "ready", &[]).await;
    }
    // Sessions on both.
    for number in 0..4 {
        assert_eq!(start_session(proxy.address, &format!("before-{number}")).await.status(), 200);
    }
    let starts = |backend: &Backend| backend.requests().iter().filter(|request| request.target == "/run").count();
    assert_eq!((starts(&draining), starts(&other)), (2, 2));

    health.store(503, Ordering::SeqCst);
    becomes(&proxy, &draining, "draining", &["health"]).await;
    for number in 0..4 {
        // New sessions, and those that were there: idle ones move.
        assert_eq!(
            start_session(proxy.address, &format!("new-{number}")).await.header("longhaul-affinity"),
            Some("new")
        );
        start_session(proxy.address, &format!("before-{number}")).await;
    }
    assert_eq!(starts(&draining), 2);

    // Ended by hand, it is begun anew by the next answer; by a good answer it ends for good.
    assert_eq!(proxy.drain("support", &draining.name(), true).await.status(), 200);
    becomes(&proxy, &draining, "draining", &["health"]).await;
    health.store(200, Ordering::SeqCst);
    becomes(&proxy, &draining, "ready", &[]).await;
    // The same by a field of the answer, without any status for it.
    let checked = "    health: {path: /health, interval: 100ms, unhealthy_after: 1}\n";
    assert_eq!(proxy.reload(&config(&[&draining, &other], checked)).await.status(), 200);
    draining.each(|_| Script::answer(200, &[("longhaul-drain", "1")], "ok"));
    becomes(&proxy, &draining, "draining", &["health"]).await;
    answers(&draining, &health, &[]);
    becomes(&proxy, &draining, "ready", &[]).await;
    // Neither status: unhealthy, as ever.
    health.store(500, Ordering::SeqCst);
    becomes(&proxy, &draining, "unhealthy", &[]).await;
}

#[tokio::test]
async fn an_answer_drains_its_endpoint_and_the_client_does_not_see_it() {
    let (draining, other) = (Backend::start().await, Backend::start().await);
    let health = Arc::new(AtomicU16::new(200));
    answers(&draining, &health, &[("longhaul-drain", "1")]);
    answers(&other, &health, &[]);
    let proxy = start_proxy(&config(&[&draining, &other], "    drain: {timeout: 2s}\n")).await;
    for number in 0..6 {
        let answer = start_session(proxy.address, &format!("s-{number}")).await;
        assert_eq!((answer.text().as_str(), answer.header("longhaul-drain")), ("ok", None));
    }
    becomes(&proxy, &draining, "draining", &["answer"]).await;
    assert_eq!(draining.request_count(), 1, "the first answer was the word");

    assert_eq!(proxy.drain("support", &draining.name(), true).await.status(), 200);
    becomes(&proxy, &draining, "ready", &[]).await;
    start_session(proxy.address, "a").await;
    start_session(proxy.address, "b").await;
    becomes(&proxy, &draining, "draining", &["answer"]).await;
    // Nobody asks it how it is: at the end of the drain's time it is tried again.
    becomes(&proxy, &draining, "ready", &[]).await;

    // Where the check can tell, a good answer ends it.
    let check = "    health: {path: /health, interval: 100ms, draining_status: 503}\n    drain: {timeout: 10m}\n";
    assert_eq!(proxy.reload(&config(&[&draining, &other], check)).await.status(), 200);
    let count = draining.requests().iter().filter(|request| request.target == "/run").count();
    let runs = || draining.requests().iter().filter(|request| request.target == "/run").count();
    let mut number = 0;
    while runs() == count {
        start_session(proxy.address, &format!("c-{number}")).await;
        number += 1;
    }
    becomes(&proxy, &draining, "ready", &[]).await;
}

#[tokio::test]
async fn what_is_left_at_the_deadline_is_cut_one_after_another_with_a_last_word() {
    const STREAMS: usize = 24;
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&config(&[&backend], "    drain: {timeout: 3s}\n")).await;
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        streams.push(open_stream(proxy.address, &backend).await);
    }
    let (mut within_event, half) = open_stream(proxy.address, &backend).await;
    half.data("data: half").await;
    within_event.read_chunks_until("half").await;
    let http2 = Http2Client::connect(proxy.address).await;
    let stream = http2.open(http2_request("POST", proxy.address, "/"), true).await;
    let drip = backend.drip().await;
    drip.event("first").await;
    let (_, mut body) = stream.head().await;

    assert_eq!(proxy.drain("support", &backend.name(), false).await.status(), 200);
    let began = ids::now();
    let mut reading = tokio::task::JoinSet::new();
    for (mut client, drip) in streams {
        reading.spawn(async move {
            let word = client.read_chunk().await;
            let at = began.elapsed();
            let word = String::from_utf8(word.expect("a last word")).expect("text");
            let retry = word.strip_prefix("retry: ").and_then(|rest| rest.strip_suffix("\n\n"));
            let retry: u64 = retry.and_then(|retry| retry.parse().ok()).unwrap_or_else(|| panic!("{word:?}"));
            assert!((1_000..5_000).contains(&retry), "{retry}");
            assert_eq!(client.closed().await, b"", "no last chunk");
            drop(drip);
            at
        });
    }
    let mut cuts = Vec::new();
    while let Some(at) = reading.join_next().await {
        cuts.push(at.expect("a last word"));
    }
    cuts.sort_unstable();
    let (first, last) = (cuts[0], cuts[STREAMS - 1]);
    assert!(first >= Duration::from_secs(3), "{first:?}");
    assert!(last - first >= Duration::from_millis(100), "all at once: {cuts:?}");
    assert_eq!(within_event.closed().await, b"", "nothing is put into an event");

    let mut seen = Vec::new();
    let end = loop {
        match within("the cut", body.data()).await {
            Some(Ok(data)) => seen.extend_from_slice(&data),
            end => break end,
        }
    };
    assert!(end.is_some_and(|end| end.is_err()), "an end as if complete");
    let seen = String::from_utf8_lossy(&seen);
    assert!(seen.starts_with("data: first\n\nretry: ") && seen.ends_with("\n\n"), "{seen}");
}

#[tokio::test]
async fn the_deadline_of_a_drain_is_kept_to_a_fraction_of_a_second() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&config(&[&backend], "    drain: {timeout: 1s}\n")).await;
    // The second one begins soon after a tick of the clock, by which the first was cut.
    for _ in 0..2 {
        let (mut client, drip) = open_stream(proxy.address, &backend).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(proxy.drain("support", &backend.name(), false).await.status(), 200);
        let began = ids::now();
        client.closed().await;
        let after = began.elapsed();
        assert!(after >= Duration::from_secs(1) && after < Duration::from_millis(1550), "cut after {after:?}");
        drop(drip);
        assert_eq!(proxy.drain("support", &backend.name(), true).await.status(), 200);
    }
}

#[tokio::test]
async fn a_websocket_is_told_that_the_server_goes_away() {
    const OPENING: &str = "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                           Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n";
    let backend = Backend::start().await;
    backend.each(|_| Script::tunnel("websocket"));
    let limits = "    drain: {timeout: 1s}\n";
    let proxy = start_proxy(&format!("shutdown: {{delay: 0s, timeout: 1s}}\n{}", config(&[&backend], limits))).await;
    // What the tunnel sends back is what the server says: a whole frame, and a part of one.
    let (mut whole, mut part) = (proxy.connect().await, proxy.connect().await);
    for (client, says) in [(&mut whole, &b"\x81\x02hi"[..]), (&mut part, &b"\x81\x05hi"[..])] {
        client.send(OPENING).await;
        assert_eq!(client.read_head().await.status, 101);
        client.send(says).await;
        assert_eq!(client.read_exact(says.len()).await, says);
    }
    assert_eq!(proxy.drain("support", &backend.name(), false).await.status(), 200);
    assert_eq!(whole.closed().await, [0x88, 2, 0x03, 0xe9]);
    assert_eq!(part.closed().await, b"", "nothing is put into a frame");

    // The same at the proxy's own end.
    assert_eq!(proxy.drain("support", &backend.name(), true).await.status(), 200);
    let mut last = proxy.connect().await;
    last.send(OPENING).await;
    assert_eq!(last.read_head().await.status, 101);
    proxy.app.drain.drain();
    assert_eq!(last.closed().await, [0x88, 2, 0x03, 0xe9]);
}

#[tokio::test]
async fn the_estimate_is_told_and_a_rollout_is_judged_by_it() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&config(&[&backend], "")).await;
    let ask = |query: &'static str| proxy.admin("GET", query);
    let idle = ask("/api/v1/services/support/safe-to-roll?grace=1s").await.json();
    assert_eq!(
        (&idle["safe"], &idle["expected_cut_runs"], &idle["grace_ms"]),
        (&true.into(), &0.0.into(), &1000.into())
    );

    for _ in 0..50 {
        assert_eq!(post(proxy.address, "/", "", "{}").await.status(), 200);
    }
    backend.drip_each();
    let (_first, _drip) = open_stream(proxy.address, &backend).await;
    let (_second, _drip) = open_stream(proxy.address, &backend).await;
    let rolled = ask("/api/v1/services/support/safe-to-roll?grace=0s").await.json();
    assert_eq!((&rolled["safe"], &rolled["outstanding_runs"]), (&false.into(), &2.into()));
    assert_eq!(rolled["endpoints"][0]["address"], backend.name());
    assert!(rolled["expected_cut_runs"].as_f64().is_some_and(|cut| cut > 1.9), "{rolled}");
    assert_eq!(rolled["runs_seen"], 50);
    // Both are older than all that were seen, but no run is likely to go on for weeks.
    let patient = ask("/api/v1/services/support/safe-to-roll?grace=500h&confidence=0.9").await.json();
    assert_eq!(patient["safe"], true, "{patient}");
    assert_eq!(ask("/api/v1/services/support/safe-to-roll").await.json()["grace_ms"], 600_000);
    for (query, status) in [("grace=soon", 400), ("confidence=2", 400), ("endpoint=a%3A1", 404), ("grade=1s", 400)] {
        let path = format!("/api/v1/services/support/safe-to-roll?{query}");
        assert_eq!(proxy.admin("GET", &path).await.status(), status, "{query}");
    }

    let endpoint = proxy.endpoint(&backend.name()).await.expect("an endpoint");
    assert_eq!(endpoint["drain"], Value::Null);
    proxy.drain("support", &backend.name(), false).await;
    let endpoint = proxy.endpoint(&backend.name()).await.expect("an endpoint");
    let empty_in = &endpoint["drain"]["empty_in"];
    assert!(empty_in["p50_ms"].as_u64() <= empty_in["p95_ms"].as_u64() && empty_in["p50_ms"].is_u64(), "{endpoint}");
    assert!(endpoint["drain"]["cut_in_ms"].as_u64().is_some_and(|cut| cut > 590_000), "{endpoint}");
    for quantile in ["quantile=\"0.5\"", "quantile=\"0.95\""] {
        let seconds = proxy.metric("longhaul_drain_estimate_seconds", &[quantile]).await;
        assert!(seconds.is_some_and(|seconds| seconds > 0.0), "{quantile}: {seconds:?}");
    }
    assert_eq!(proxy.metric("longhaul_drain_remaining_sessions", &[]).await, Some(0.0));
}

#[tokio::test]
async fn drain_with_wait_tells_how_it_goes() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&config(&[&backend], "")).await;
    let (_client, drip) = open_stream(proxy.address, &backend).await;
    let admin = format!("http://{}", proxy.admin);
    let mut program = Program::start(&["drain", "support", &backend.name(), "--wait", "--admin", &admin]);
    let rest = program.after(": 1 open, 0 sessions, empty in ").await;
    assert!(rest.contains(" (p95 ") && rest.contains("), cut in "), "{rest}");
    drip.finish().await;
    assert_eq!(program.ended().await.code(), Some(0));
    assert!(program.lines().iter().any(|line| line.ends_with("is drained")), "{:?}", program.lines());
}

#[tokio::test]
async fn streams_of_a_connection_that_the_endpoint_gives_up_finish() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let proxy = start_proxy(&format!(
        "services:\n  - name: support\n    versions:\n      - {{name: stable, http: 2, endpoints: [\"{url}\"]}}\n"
    ))
    .await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let (stream, _) = listener.accept().await.expect("a connection");
    let mut first = h2::server::handshake(stream).await.expect("HTTP/2");
    let (_, mut respond) = first.accept().await.expect("a stream").expect("a request");
    let head = http::Response::builder().header("content-type", "text/event-stream").body(()).expect("a head");
    let mut body = respond.send_response(head, false).expect("open");
    body.send_data(Bytes::from_static(b"data: before\n\n"), false).expect("open");
    // GOAWAY, with the stream still open.
    first.graceful_shutdown();
    let serving = tokio::spawn(async move { while first.accept().await.is_some() {} });
    client.read_head().await;
    client.read_chunks_until("before").await;

    let second = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.expect("another connection");
        let mut connection = h2::server::handshake(stream).await.expect("HTTP/2");
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            let mut body = respond.send_response(http::Response::new(()), false).expect("open");
            body.send_data(Bytes::from_static(b"elsewhere"), true).expect("open");
        }
    });
    assert_eq!(get(proxy.address, "/", "").await.text(), "elsewhere");
    body.send_data(Bytes::from_static(b"data: after\n\n"), true).expect("open");
    client.read_chunks_until("after").await;
    assert_eq!(client.read_chunk().await, None, "a whole end");
    serving.await.expect("the first connection has ended");
    second.abort();
}
