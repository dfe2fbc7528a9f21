//! Failures: retries, time-outs, broken endpoints, health, ejection, limits, connection pools and the proxy's cookie.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use longhaul::state::status::EndpointState;
use support::{
    Backend, Body, Certificate, Drip, Gate, Proxy, RawClient, Response, Script, Step, eventually, fetch, get, post,
    start_proxy,
};

/// A service of these endpoints in one version; `more` are further keys of it, each line indented by four.
fn service(urls: &[&str], more: &str) -> String {
    format!("services:\n  - name: support\n    versions: [{{name: stable, endpoints: [{}]}}]\n{more}", urls.join(", "))
}

fn over(backends: &[Backend], more: &str) -> String {
    service(&backends.iter().map(Backend::url).collect::<Vec<_>>(), more)
}

const BY_HEADER: &str = "    session: {key: [{header: x-session-id}]}\n";

/// Outstanding runs at one backend.
fn load(proxy: &Proxy, backend: &Backend) -> u32 {
    endpoint(proxy, backend).map_or(0, |(_, outstanding)| outstanding)
}

fn endpoint(proxy: &Proxy, backend: &Backend) -> Option<(EndpointState, u32)> {
    let endpoints = proxy.state().versions.into_iter().flat_map(|version| version.endpoints);
    let mut found = endpoints.filter(|endpoint| endpoint.address == backend.name());
    found.next().map(|endpoint| (endpoint.state, endpoint.outstanding_runs))
}

fn is(proxy: &Proxy, backend: &Backend, state: EndpointState) -> bool {
    endpoint(proxy, backend).is_some_and(|(found, _)| found == state)
}

/// How many runs ended so.
async fn ended(proxy: &Proxy, outcome: &str) -> f64 {
    proxy.metric("longhaul_runs_total", &[&format!("outcome=\"{outcome}\"")]).await.unwrap_or(0.0)
}

/// Exactly these runs have ended: each outcome and how often.
async fn ended_are(proxy: &Proxy, expected: &[(&str, f64)]) {
    for (outcome, count) in expected {
        proxy.metric_becomes("longhaul_runs_total", &[&format!("outcome=\"{outcome}\"")], *count).await;
    }
    let all: f64 = expected.iter().map(|(_, count)| count).sum();
    assert_eq!(proxy.metric("longhaul_runs_total", &[]).await, Some(all), "no other outcome than {expected:?}");
}

async fn run(proxy: &Proxy) -> Response {
    post(proxy.address, "/run", "", "hi").await
}

async fn run_in(proxy: &Proxy, session: &str) -> Response {
    post(proxy.address, "/run", &format!("X-Session-Id: {session}\r\n"), "hi").await
}

fn is_error(answer: &Response, status: u16, code: &str) {
    assert_eq!((answer.status(), answer.code().as_deref()), (status, Some(code)), "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    assert!(answer.header("proxy-status").is_some_and(|field| field.starts_with("longhaul; error=")), "{answer:?}");
    assert!(answer.header("longhaul-affinity").is_some(), "{answer:?}");
}

/// Starts a stream; its head and nothing else was read.
async fn stream(proxy: &Proxy, headers: &str) -> RawClient {
    let mut client = proxy.connect().await;
    client.send(format!("POST /run HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: 2\r\n\r\nhi")).await;
    assert_eq!(client.read_head().await.status, 200);
    client
}

/// Starts a stream at the only backend.
async fn stream_at(proxy: &Proxy, backend: &Backend) -> (RawClient, Drip) {
    let client = stream(proxy, "").await;
    (client, backend.drip().await)
}

fn reset_before_the_answer() -> Script {
    Script(vec![Step::ReadBody, Step::Reset])
}

// Retries.

#[tokio::test]
async fn a_refused_start_goes_to_another_endpoint_as_the_same_run() {
    let mut backends = Backend::start_several(2).await;
    backends[0].refuse().await;
    backends[1].drip_each();
    let proxy = start_proxy(&over(&backends, "    outlier: {consecutive_failures: 0}\n")).await;
    let mut streams = Vec::new();
    for count in 1..=6 {
        let mut client = proxy.connect().await;
        client.send("POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
        let head = client.read_head().await;
        let drip = backends[1].drip().await;
        assert_eq!(head.status, 200);
        assert_eq!(head.header("longhaul-run-id"), drip.request.header("longhaul-run-id"), "one run");
        assert_eq!(backends[1].request(count as usize).await.body, b"hi");
        streams.push((client, drip));
        assert_eq!((load(&proxy, &backends[0]), load(&proxy, &backends[1])), (0, count), "the slot was handed over");
    }
    let runs = proxy.dispatcher().runs(None, 100, longhaul::ids::now());
    assert_eq!(runs.len(), 6);
    // From the second on the refusing endpoint is the least loaded one.
    assert!(runs.iter().filter(|run| run.attempts == 2).count() >= 5, "{runs:?}");
    for (mut client, drip) in streams {
        drip.finish().await;
        while client.read_chunk().await.is_some() {}
    }
    assert_eq!(proxy.outstanding(), 0);
    ended_are(&proxy, &[("completed", 6.0)]).await;
    assert_eq!(proxy.metric("longhaul_affinity_total", &[]).await, Some(6.0), "picked once each");
}

#[tokio::test]
async fn all_refused_is_connect_failed() {
    let mut backends = Backend::start_several(3).await;
    for backend in &mut backends {
        backend.refuse().await;
    }
    let proxy = start_proxy(&over(&backends, "")).await;
    let answer = run(&proxy).await;
    is_error(&answer, 502, "connect_failed");
    assert!(answer.header("longhaul-run-id").is_some() && answer.header("retry-after").is_some());
    assert_eq!(proxy.outstanding(), 0);
    ended_are(&proxy, &[("failed", 1.0)]).await;
}

#[tokio::test]
async fn a_retry_never_exceeds_the_attempts() {
    for attempts in 1..=3 {
        let backends = Backend::start_several(4).await;
        backends.iter().for_each(|backend| backend.each(|_| reset_before_the_answer()));
        let proxy = start_proxy(&over(&backends, &format!("    retries: {{attempts: {attempts}}}\n"))).await;
        is_error(&get(proxy.address, "/", "").await, 502, "upstream_reset");
        let tried: Vec<usize> = backends.iter().map(Backend::request_count).collect();
        assert_eq!(tried.iter().sum::<usize>(), attempts, "{tried:?}");
        assert!(tried.iter().all(|count| *count <= 1), "never twice at one that was tried: {tried:?}");
    }
}

#[tokio::test]
async fn what_an_endpoint_may_have_done_is_not_done_twice() {
    let backends = Backend::start_several(2).await;
    backends.iter().for_each(|backend| backend.each(|_| reset_before_the_answer()));
    let proxy = start_proxy(&over(&backends, "    outlier: {consecutive_failures: 0}\n")).await;
    for method in ["POST", "PATCH"] {
        let before = backends[0].request_count() + backends[1].request_count();
        let answer = fetch(proxy.address, format!("{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"));
        is_error(&answer.await, 502, "upstream_reset");
        assert_eq!(backends[0].request_count() + backends[1].request_count(), before + 1, "{method}");
    }
    assert_eq!(proxy.outstanding(), 0);
    ended_are(&proxy, &[("failed", 1.0)]).await;
}

#[tokio::test]
async fn what_is_safe_to_repeat_is_not_repeated_where_its_session_no_longer_is() {
    let backends = Backend::start_several(2).await;
    let (first, second, never) = (Gate::new(), Gate::new(), Gate::new());
    let head = || Step::Head { status: 200, headers: vec![], body: Body::Chunked };
    let come = Arc::new(AtomicUsize::new(0));
    for backend in &backends {
        let (first, second, never, come) = (first.clone(), second.clone(), never.clone(), Arc::clone(&come));
        backend.each(move |_| match come.fetch_add(1, Ordering::SeqCst) {
            0 => reset_before_the_answer().after(&first),
            1 => reset_before_the_answer().after(&second),
            _ => Script(vec![head(), Step::Data(b"data: one\n\n".to_vec()), Step::Wait(never.clone())]),
        });
    }
    let more = format!("{BY_HEADER}    runs: {{max_per_endpoint: 2}}\n");
    let proxy = start_proxy(&over(&backends, &more)).await;
    let start = async || {
        let mut client = proxy.connect().await;
        client.send("GET / HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\nx-session-id: s\r\n\r\n").await;
        client
    };
    let mut moves = start().await;
    eventually("it has come", || come.load(Ordering::SeqCst) == 1).await;
    let mut stays = start().await;
    eventually("it has come", || come.load(Ordering::SeqCst) == 2).await;
    first.open();
    assert_eq!(moves.read_head().await.status, 200);
    // The session has moved, and this one fills its new endpoint.
    let mut fills = start().await;
    assert_eq!(fills.read_head().await.status, 200);
    assert!(backends.iter().all(|backend| backend.request_count() == 2));
    second.open();
    is_error(&stays.read_response().await, 502, "upstream_reset");
    assert_eq!(come.load(Ordering::SeqCst), 4, "it was asked once");
}

#[tokio::test]
async fn what_is_safe_to_repeat_is_repeated_with_its_body() {
    for method in ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"] {
        for chunked in [false, true] {
            let backends = Backend::start_several(2).await;
            let resets = Arc::new(AtomicUsize::new(0));
            for backend in &backends {
                let resets = Arc::clone(&resets);
                backend.each(move |_| match resets.fetch_add(1, Ordering::SeqCst) {
                    0 => reset_before_the_answer(),
                    _ => Script::ok("ok"),
                });
            }
            let proxy = start_proxy(&over(&backends, "")).await;
            let body = match (method, chunked) {
                ("PUT" | "DELETE", false) => "Content-Length: 5\r\n\r\nhello",
                ("PUT" | "DELETE", true) => "Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
                _ => "\r\n",
            };
            let mut client = proxy.connect().await;
            client.send(format!("{method} / HTTP/1.1\r\nHost: a\r\n{body}")).await;
            assert_eq!(client.read_response_to(method).await.status(), 200, "{method}");
            let requests: Vec<_> = backends.iter().flat_map(Backend::requests).collect();
            assert_eq!(requests.len(), 2, "{method}");
            let whole = if body == "\r\n" { b"".as_slice() } else { b"hello" };
            assert!(requests.iter().all(|request| request.body == whole), "{method}: {requests:?}");
            assert_eq!(backends[0].request_count(), 1, "{method}: on another endpoint");
        }
    }
}

#[tokio::test]
async fn a_large_body_is_not_kept_to_be_repeated() {
    let backends = Backend::start_several(2).await;
    backends.iter().for_each(|backend| backend.each(|_| reset_before_the_answer()));
    let proxy = start_proxy(&over(&backends, "")).await;
    let mut wire = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n".to_vec();
    wire.resize(wire.len() + 300_000, b'x');
    let answer = proxy.connect().await.exchange(&wire, 300_000).await;
    is_error(&answer, 502, "upstream_reset");
    assert_eq!(backends[0].request_count() + backends[1].request_count(), 1);
}

#[tokio::test]
async fn a_status_is_never_repeated() {
    let backends = Backend::start_several(2).await;
    backends.iter().for_each(|backend| backend.each(|_| Script::status(503)));
    let proxy = start_proxy(&over(&backends, "    outlier: {consecutive_failures: 0}\n")).await;
    assert_eq!(get(proxy.address, "/", "").await.status(), 503);
    assert_eq!(run(&proxy).await.status(), 503);
    assert_eq!(backends[0].request_count() + backends[1].request_count(), 2);
    ended_are(&proxy, &[("failed", 1.0)]).await;
}

#[tokio::test]
async fn a_pooled_connection_that_was_closed_is_noticed_even_for_a_post_to_a_lone_endpoint() {
    let backends = Backend::start_several(1).await;
    let proxy = start_proxy(&over(&backends, "")).await;
    let mut client = proxy.connect().await;
    for count in 1..=10 {
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
        assert_eq!(client.read_response().await.status(), 200);
        assert_eq!(backends[0].request_count(), count);
        backends[0].cut_connections();
        eventually("the connection ends", || backends[0].open_connections() == 0).await;
    }
    ended_are(&proxy, &[("completed", 10.0)]).await;
}

#[tokio::test]
async fn a_pooled_connection_that_dies_at_the_next_request_is_replaced_also_at_a_lone_endpoint() {
    let backends = Backend::start_several(1).await;
    let proxy = start_proxy(&over(&backends, "")).await;
    // As an endpoint whose keep-alive time ends in the very moment of reuse.
    backends[0].each(|request| match request.connection {
        0 => Script(vec![Step::ReadBody, Step::Reset]),
        _ => Script::ok("fresh"),
    });
    backends[0].next(Script::ok("first"));
    let mut client = proxy.connect().await;
    for expected in ["first", "fresh"] {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let answer = client.read_response().await;
        assert_eq!((answer.status(), answer.text().as_str()), (200, expected));
    }
    assert_eq!((backends[0].request_count(), backends[0].connections()), (3, 2));
    // Fresh connections that die are no such case.
    backends[0].cut_connections();
    eventually("all connections end", || backends[0].open_connections() == 0).await;
    backends[0].each(|_| reset_before_the_answer());
    is_error(&post(proxy.address, "/", "", "hi").await, 502, "upstream_reset");
    assert_eq!(backends[0].request_count(), 4, "what it may have done is not done twice");
}

#[tokio::test]
async fn a_lone_endpoint_is_asked_again_for_what_is_safe_to_repeat() {
    for (method, tries) in
        [("GET", 2), ("HEAD", 2), ("OPTIONS", 2), ("PUT", 2), ("DELETE", 2), ("POST", 1), ("PATCH", 1)]
    {
        let backend = Backend::start().await;
        backend.next(reset_before_the_answer());
        let proxy = start_proxy(&service(&[backend.url()], "")).await;
        let mut client = proxy.connect().await;
        client.send(format!("{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")).await;
        let status = if tries == 2 { 200 } else { 502 };
        assert_eq!(client.read_response_to(method).await.status(), status, "{method}");
        assert_eq!(backend.request_count(), tries, "{method}");

        backend.each(|_| reset_before_the_answer());
        client = proxy.connect().await;
        client.send(format!("{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")).await;
        assert_eq!(client.read_response_to(method).await.status(), 502, "{method}");
        assert_eq!(backend.request_count(), 2 * tries, "{method}: `attempts` and no more");
    }
}

#[tokio::test]
async fn a_confirmed_pin_is_tried_again_at_its_own_endpoint_only() {
    let mut backends = Backend::start_several(2).await;
    let proxy = start_proxy(&over(&backends, BY_HEADER)).await;
    assert_eq!(run_in(&proxy, "anna").await.status(), 200);
    let (home, other) = if backends[0].request_count() == 1 { (0, 1) } else { (1, 0) };
    backends[home].refuse().await;
    backends[home].cut_connections();
    eventually("its connections end", || backends[home].open_connections() == 0).await;
    let answer = run_in(&proxy, "anna").await;
    is_error(&answer, 502, "connect_failed");
    assert_eq!(answer.header("longhaul-affinity"), Some("hit"));
    assert_eq!(backends[other].request_count(), 0);
    // A reset before the answer is tried again there, too.
    backends[home].resume().await;
    backends[home].next(reset_before_the_answer());
    assert_eq!(get(proxy.address, "/state", "X-Session-Id: anna\r\n").await.status(), 200);
    assert_eq!((backends[home].request_count(), backends[other].request_count()), (3, 0));
    assert_eq!(run_in(&proxy, "anna").await.header("longhaul-affinity"), Some("hit"));
    assert_eq!((backends[home].request_count(), backends[other].request_count()), (4, 0));
    assert_eq!(proxy.outstanding(), 0);
}

#[tokio::test]
async fn a_tentative_pin_moves_with_the_retry() {
    let mut backends = Backend::start_several(2).await;
    backends[0].refuse().await;
    let proxy = start_proxy(&over(&backends, &format!("{BY_HEADER}    outlier: {{consecutive_failures: 0}}\n"))).await;
    for number in 0..10 {
        assert_eq!(run_in(&proxy, &format!("session-{number}")).await.header("longhaul-affinity"), Some("new"));
    }
    backends[0].resume().await;
    for number in 0..10 {
        assert_eq!(run_in(&proxy, &format!("session-{number}")).await.header("longhaul-affinity"), Some("hit"));
    }
    assert_eq!((backends[0].request_count(), backends[1].request_count()), (0, 20), "they live where they were served");
    let sessions = proxy.dispatcher().sessions(None, 100, longhaul::ids::now());
    assert!(sessions.iter().all(|session| session.endpoint == backends[1].name()), "{sessions:?}");
}

// Time-outs.

/// An address where connections are neither accepted nor refused: its backlog is full.
struct Deaf {
    url: String,
    _listener: socket2::Socket,
    _waiting: Vec<tokio::net::TcpStream>,
}

impl Deaf {
    async fn start() -> Deaf {
        let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        listener.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free port");
        listener.listen(0).expect("bound");
        let address = listener.local_addr().expect("bound").as_socket().expect("TCP");
        let mut waiting = Vec::new();
        // The system keeps one more than it was told, or a few.
        while let Ok(connected) =
            tokio::time::timeout(Duration::from_millis(300), tokio::net::TcpStream::connect(address)).await
        {
            waiting.push(connected.expect("it listens"));
            assert!(waiting.len() < 100, "the backlog has no end");
        }
        Deaf { url: format!("http://{address}"), _listener: listener, _waiting: waiting }
    }
}

#[tokio::test]
async fn an_endpoint_that_does_not_accept_is_connect_timeout_unless_another_does() {
    let deaf = Deaf::start().await;
    let backend = Backend::start().await;
    let timeouts = "    timeouts: {connect: 200ms}\n";
    let proxy = start_proxy(&service(&[&deaf.url], timeouts)).await;
    is_error(&run(&proxy).await, 504, "connect_timeout");
    ended_are(&proxy, &[("failed", 1.0)]).await;
    let proxy = start_proxy(&service(&[&deaf.url, backend.url()], timeouts)).await;
    for _ in 0..2 {
        assert_eq!(run(&proxy).await.status(), 200);
    }
    assert_eq!(backend.request_count(), 2);
    ended_are(&proxy, &[("completed", 2.0)]).await;
}

#[tokio::test]
async fn a_client_that_leaves_while_we_connect_cancels_its_run() {
    let deaf = Deaf::start().await;
    let proxy = start_proxy(&service(&[&deaf.url], "    timeouts: {connect: 1h}\n")).await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n").await;
    eventually("the run is outstanding", || proxy.outstanding() == 1).await;
    drop(client);
    eventually("it ends", || proxy.outstanding() == 0).await;
    ended_are(&proxy, &[("cancelled", 1.0)]).await;
}

#[tokio::test]
async fn a_background_run_is_begun_though_its_client_leaves_while_we_connect() {
    let deaf = Deaf::start().await;
    let backend = Backend::start().await;
    backend.each(|_| Script::ok("{}"));
    let more = "    agent_protocol: langgraph\n    timeouts: {connect: 500ms}\n    health: {interval: 1h}\n";
    let proxy = start_proxy(&service(&[&deaf.url, backend.url()], more)).await;
    let begun = || proxy.outstanding() as usize + backend.request_count();
    // Some of them are sent to the endpoint that does not accept first.
    for thread in 0..6 {
        let before = begun();
        let mut client = proxy.connect().await;
        let body = r#"{"assistant_id": "agent", "input": {}}"#;
        let head = format!("POST /threads/{thread}/runs HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n");
        client.send(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len())).await;
        eventually("it is on its way", || begun() > before).await;
        drop(client);
    }
    eventually("all have come", || backend.request_count() == 6).await;
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer_is_first_byte_timeout_and_not_asked_again() {
    let backends = Backend::start_several(2).await;
    let never = Gate::new();
    for backend in &backends {
        let never = never.clone();
        backend.each(move |_| Script::ok("late").after(&never));
    }
    let proxy = start_proxy(&over(&backends, "    timeouts: {first_byte: 200ms}\n")).await;
    is_error(&run(&proxy).await, 504, "first_byte_timeout");
    is_error(&get(proxy.address, "/", "").await, 504, "first_byte_timeout");
    assert_eq!(backends[0].request_count() + backends[1].request_count(), 2, "no other is asked");
    eventually("the endpoints are told", || backends.iter().all(|backend| backend.in_flight() == 0)).await;
    ended_are(&proxy, &[("timed_out", 1.0)]).await;
    assert_eq!(proxy.outstanding(), 0);
}

#[tokio::test]
async fn a_run_that_takes_too_long_is_run_timeout_or_cut() {
    let backends = Backend::start_several(1).await;
    let never = Gate::new();
    backends[0].next(Script::ok("late").after(&never));
    let proxy = start_proxy(&over(&backends, "    runs: {max_duration: 300ms}\n")).await;
    is_error(&run(&proxy).await, 504, "run_timeout");

    backends[0].drip_each();
    let (mut client, drip) = stream_at(&proxy, &backends[0]).await;
    drip.event("one").await;
    client.read_chunks_until("one").await;
    assert!(!client.closed().await.ends_with(b"0\r\n\r\n"), "cut, not completed");
    drip.until_gone().await;
    ended_are(&proxy, &[("timed_out", 2.0)]).await;

    // What is no run has no such limit.
    let mut reader = proxy.connect().await;
    reader.send("GET /log HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let log = backends[0].drip().await;
    let (mut client, drip) = stream_at(&proxy, &backends[0]).await;
    client.closed().await;
    drip.until_gone().await;
    log.event("still here").await;
    reader.read_head().await;
    reader.read_chunks_until("still here").await;
}

#[tokio::test]
async fn silence_cuts_a_stream() {
    let backends = Backend::start_several(1).await;
    backends[0].drip_each();
    let proxy = start_proxy(&over(&backends, "    timeouts: {idle: 300ms}\n")).await;
    let (mut client, drip) = stream_at(&proxy, &backends[0]).await;
    drip.event("one").await;
    client.read_chunks_until("one").await;
    assert!(!client.closed().await.ends_with(b"0\r\n\r\n"), "cut, not completed");
    drip.until_gone().await;
    // An end before the end is truncated; only first_byte and max_duration time out.
    ended_are(&proxy, &[("truncated", 1.0)]).await;
    assert_eq!(proxy.outstanding(), 0);
}

/// Waits as long as it takes the proxy to cut `times` silent streams, one after another.
async fn idle_times(proxy: &Proxy, backend: &Backend, times: usize) {
    for _ in 0..times {
        let (mut client, _drip) = stream_at(proxy, backend).await;
        client.closed().await;
    }
}

#[tokio::test]
async fn the_time_in_which_the_client_holds_back_is_no_silence() {
    const BODY: usize = 32 * 1024 * 1024;
    let large = Backend::start().await;
    large.each(|_| {
        let head = Step::Head { status: 200, headers: vec![], body: Body::Length(BODY) };
        Script(vec![Step::ReadBody, head, Step::Data(vec![b'x'; BODY]), Step::End])
    });
    let silent = Backend::start().await;
    silent.drip_each();
    let config = format!(
        "routes: [{{match: {{path: /large}}, service: large}}, {{service: silent}}]\nservices:\n  \
         - {{name: large, timeouts: {{idle: 300ms}}, versions: [{{name: v, endpoints: [\"{}\"]}}]}}\n  \
         - {{name: silent, timeouts: {{idle: 300ms}}, versions: [{{name: v, endpoints: [\"{}\"]}}]}}\n",
        large.url(),
        silent.url()
    );
    let proxy = start_proxy(&config).await;
    let mut client = proxy.connect().await;
    client.send("GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_head().await.status, 200);
    idle_times(&proxy, &silent, 4).await;
    assert_eq!(large.in_flight(), 1, "it is held back");
    assert_eq!(client.read_exact(BODY).await.len(), BODY);
}

// How runs end.

#[tokio::test]
async fn an_endpoint_that_dies_in_its_answer_cuts_it_visibly() {
    let backends = Backend::start_several(1).await;
    let proxy = start_proxy(&over(&backends, "")).await;
    for (body, count) in [(Body::Length(100), 1.0), (Body::Chunked, 2.0)] {
        for end in [Step::Close, Step::Reset] {
            let head = Step::Head { status: 200, headers: vec![], body };
            backends[0].next(Script(vec![Step::ReadBody, head, Step::Data(b"part".to_vec()), end]));
            let answer = run(&proxy).await;
            assert!(answer.truncated, "{body:?}: {answer:?}");
        }
        ended_are(&proxy, &[("truncated", 2.0 * count)]).await;
    }
    // An answer until the end of the connection is whole when that ends well, and cut when it breaks.
    let head = || Step::Head { status: 200, headers: vec![], body: Body::Eof };
    backends[0].next(Script(vec![Step::ReadBody, head(), Step::Data(b"part".to_vec()), Step::Close]));
    let answer = run(&proxy).await;
    assert_eq!((answer.truncated, answer.text().as_str()), (false, "part"));
    ended_are(&proxy, &[("truncated", 4.0), ("completed", 1.0)]).await;
    assert_eq!(proxy.outstanding(), 0);
}

#[tokio::test]
async fn outcomes_follow_status_and_client() {
    let backends = Backend::start_several(1).await;
    let proxy = start_proxy(&over(&backends, "    outlier: {consecutive_failures: 0}\n")).await;
    for status in [200, 204, 302, 400, 401, 404, 429, 500, 502, 503, 504] {
        backends[0].next(Script(vec![
            Step::ReadBody,
            Step::Head { status, headers: vec![], body: if status == 204 { Body::None } else { Body::Length(0) } },
        ]));
        let answer = run(&proxy).await;
        assert_eq!((answer.status(), answer.code()), (status, None), "passed on as it is");
    }
    ended_are(&proxy, &[("completed", 7.0), ("failed", 4.0)]).await;
    // Before the head.
    let never = Gate::new();
    backends[0].next(Script::ok("late").after(&never));
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
    eventually("it arrives", || backends[0].in_flight() == 1).await;
    drop(client);
    eventually("the endpoint is told", || backends[0].in_flight() == 0).await;
    // After it, and in its own request.
    backends[0].drip_each();
    let (client, drip) = stream_at(&proxy, &backends[0]).await;
    drop(client);
    drip.until_gone().await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 200\r\n\r\nhi").await;
    eventually("it is outstanding", || proxy.outstanding() == 1).await;
    drop(client);
    eventually("nothing is outstanding", || proxy.outstanding() == 0).await;
    ended_are(&proxy, &[("completed", 7.0), ("failed", 4.0), ("cancelled", 3.0)]).await;
}

#[tokio::test]
async fn a_run_is_over_for_the_count_before_its_client_sees_the_end() {
    let backends = Backend::start_several(1).await;
    backends[0].drip_each();
    let proxy = start_proxy(&over(&backends, "")).await;
    for _ in 0..50 {
        let (mut client, drip) = stream_at(&proxy, &backends[0]).await;
        assert_eq!(proxy.outstanding(), 1);
        drip.finish().await;
        assert!(client.read_chunk().await.is_none());
        assert_eq!(proxy.outstanding(), 0);
    }
}

#[tokio::test]
async fn an_endpoint_that_speaks_no_tls_or_is_a_stranger_is_tls_failed() {
    // It closes before a handshake.
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = mute.local_addr().expect("bound");
    tokio::spawn(async move { while mute.accept().await.is_ok() {} });
    let proxy = start_proxy(&service(&[&format!("https://{address}")], "")).await;
    is_error(&run(&proxy).await, 502, "tls_failed");
    let stranger = Backend::start_tls(&Certificate::create(proxy.directory(), &["localhost"]), &["http/1.1"]).await;
    let proxy = start_proxy(&service(&[stranger.url()], "")).await;
    is_error(&run(&proxy).await, 502, "tls_failed");
    assert_eq!(stranger.request_count(), 0);
    ended_are(&proxy, &[("failed", 1.0)]).await;
}

// Health.

/// A backend whose health checks are answered with the status that the test sets; anything else is "ok".
fn checked(backend: &Backend) -> Arc<AtomicU16> {
    let status = Arc::new(AtomicU16::new(200));
    let answered = Arc::clone(&status);
    backend.each(move |request| match request.target.as_str() {
        "/health" => Script::status(answered.load(Ordering::SeqCst)),
        _ => Script::ok("ok"),
    });
    status
}

fn probes(backend: &Backend) -> usize {
    backend.requests().iter().filter(|request| request.target == "/health").count()
}

/// Waits for so many more probes, the first of which may have been answered before.
async fn more_probes(backend: &Backend, count: usize) {
    let enough = probes(backend) + count + 1;
    eventually("the endpoint is probed", || probes(backend) >= enough).await;
}

const QUICK_CHECKS: &str =
    "    health: {path: /health, interval: 40ms, timeout: 2s, unhealthy_after: 3, healthy_after: 2}\n";

#[tokio::test]
async fn an_endpoint_is_not_ready_before_its_first_health_answer_and_one_suffices() {
    let backends = Backend::start_several(1).await;
    let gate = Gate::new();
    let held = gate.clone();
    backends[0].each(move |request| match request.target.as_str() {
        "/health" => Script::ok("well").after(&held),
        _ => Script::ok("ok"),
    });
    let slow = "    health: {path: /health, interval: 1h, timeout: 1h, healthy_after: 5}\n";
    let proxy = start_proxy(&over(&backends, slow)).await;
    eventually("it is probed at once", || probes(&backends[0]) == 1).await;
    let answer = run(&proxy).await;
    is_error(&answer, 503, "no_endpoint");
    assert!(answer.header("retry-after").is_some());
    gate.open();
    eventually("it is ready", || is(&proxy, &backends[0], EndpointState::Ready)).await;
    assert_eq!(run(&proxy).await.status(), 200);
    assert_eq!(probes(&backends[0]), 1, "one answer was enough");
}

#[tokio::test]
async fn some_answers_in_a_row_make_an_endpoint_unhealthy_and_healthy_again() {
    let backends = Backend::start_several(2).await;
    let status = checked(&backends[0]);
    checked(&backends[1]);
    let proxy = start_proxy(&over(&backends, QUICK_CHECKS)).await;
    eventually("both are ready", || backends.iter().all(|backend| is(&proxy, backend, EndpointState::Ready))).await;
    // Two failures are not yet three: whatever is asked after them, the endpoint stays.
    for _ in 0..3 {
        for _ in 0..2 {
            backends[0].next(Script::status(500));
        }
        for _ in 0..3 {
            let seen = probes(&backends[0]);
            eventually("the next probe", || probes(&backends[0]) > seen).await;
            assert!(is(&proxy, &backends[0], EndpointState::Ready));
        }
    }
    // A refusal of the prober is no evidence.
    for refusal in [401, 403] {
        status.store(refusal, Ordering::SeqCst);
        more_probes(&backends[0], 4).await;
        assert!(is(&proxy, &backends[0], EndpointState::Ready), "{refusal}");
    }
    status.store(500, Ordering::SeqCst);
    let before = probes(&backends[0]);
    eventually("it is unhealthy", || is(&proxy, &backends[0], EndpointState::Unhealthy)).await;
    assert!(probes(&backends[0]) >= before + 3);
    for refusal in [401, 403] {
        status.store(refusal, Ordering::SeqCst);
        more_probes(&backends[0], 3).await;
        assert!(is(&proxy, &backends[0], EndpointState::Unhealthy), "{refusal}");
    }
    let before = backends[0].request_count() - probes(&backends[0]);
    for _ in 0..6 {
        assert_eq!(run(&proxy).await.status(), 200);
    }
    assert_eq!(backends[0].request_count() - probes(&backends[0]), before, "it gets no work");
    status.store(200, Ordering::SeqCst);
    let before = probes(&backends[0]);
    eventually("it is back", || is(&proxy, &backends[0], EndpointState::Ready)).await;
    assert!(probes(&backends[0]) >= before + 2);
}

#[tokio::test]
async fn probes_carry_configured_headers_and_no_clients_credentials() {
    let backends = Backend::start_several(1).await;
    checked(&backends[0]);
    let config = format!(
        "services:\n  - name: support\n{QUICK_CHECKS}    versions: [{{name: stable, endpoints: [\"{}\"], \
         headers: {{set: {{x-api-key: ours}}}}}}]\n",
        backends[0].url()
    );
    let proxy = start_proxy(&config).await;
    eventually("it is ready", || is(&proxy, &backends[0], EndpointState::Ready)).await;
    post(proxy.address, "/run", "Authorization: Bearer theirs\r\nCookie: a=b\r\n", "hi").await;
    more_probes(&backends[0], 2).await;
    for request in backends[0].requests() {
        assert_eq!(request.header("x-api-key"), Some("ours"));
        let probe = request.target == "/health";
        assert_eq!(request.header("authorization").is_none(), probe, "{request:?}");
        assert!(!probe || request.header("cookie").is_none());
    }
}

// Ejection.

#[tokio::test]
async fn failures_in_a_row_eject_an_endpoint_for_a_while() {
    let backends = Backend::start_several(2).await;
    let status = Arc::new(AtomicU16::new(500));
    let answered = Arc::clone(&status);
    backends[0].each(move |_| Script::status(answered.load(Ordering::SeqCst)));
    let outlier = "    outlier: {consecutive_failures: 3, eject_for: 2s}\n    balance: round-robin\n";
    let proxy = start_proxy(&over(&backends, outlier)).await;
    // Failures with successes in between are not in a row.
    for code in [500, 500, 200, 500, 500, 404, 500, 500, 200] {
        status.store(code, Ordering::SeqCst);
        let before = backends[0].request_count();
        while backends[0].request_count() == before {
            run(&proxy).await;
        }
        assert!(is(&proxy, &backends[0], EndpointState::Ready), "after {code}");
    }
    status.store(500, Ordering::SeqCst);
    let before = backends[0].request_count();
    while backends[0].request_count() < before + 3 {
        assert!(is(&proxy, &backends[0], EndpointState::Ready));
        run(&proxy).await;
    }
    assert!(is(&proxy, &backends[0], EndpointState::Ejected));
    for _ in 0..10 {
        assert_eq!(run(&proxy).await.status(), 200);
    }
    assert_eq!(backends[0].request_count(), before + 3, "it gets no work");
    status.store(200, Ordering::SeqCst);
    eventually("its time is over", || is(&proxy, &backends[0], EndpointState::Ready)).await;
    while backends[0].request_count() == before + 3 {
        assert_eq!(run(&proxy).await.status(), 200);
    }
}

#[tokio::test]
async fn never_more_than_max_ejected_and_never_a_lone_endpoint() {
    for (count, most, expected) in [(4, "50%", 2), (4, "100%", 3), (5, "20%", 1), (4, "0%", 0), (1, "100%", 0)] {
        let mut backends = Backend::start_several(count).await;
        for backend in &mut backends {
            backend.refuse().await;
        }
        let outlier = format!("    outlier: {{consecutive_failures: 2, eject_for: 1h, max_ejected: {most}}}\n");
        let proxy = start_proxy(&over(&backends, &outlier)).await;
        for _ in 0..30 {
            is_error(&run(&proxy).await, 502, "connect_failed");
        }
        let ejected = backends.iter().filter(|backend| is(&proxy, backend, EndpointState::Ejected)).count();
        assert_eq!(ejected, expected, "{count} endpoints, max_ejected {most}");
    }
}

// Empty and full.

#[tokio::test]
async fn a_service_without_endpoint_is_no_endpoint() {
    let proxy = start_proxy(&service(&[], "")).await;
    for answer in [run(&proxy).await, get(proxy.address, "/", "").await] {
        is_error(&answer, 503, "no_endpoint");
        assert!(answer.header("retry-after").is_some_and(|seconds| seconds.parse::<u32>().is_ok()));
    }
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"rejected\"", "version=\"\""], 1.0).await;
}

#[tokio::test]
async fn full_endpoints_are_queue_full_for_runs_only() {
    let backends = Backend::start_several(2).await;
    backends.iter().for_each(Backend::drip_each);
    let proxy = start_proxy(&over(&backends, "    runs: {max_per_endpoint: 2}\n")).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(stream(&proxy, "").await);
    }
    assert_eq!((load(&proxy, &backends[0]), load(&proxy, &backends[1])), (2, 2));
    let answer = run(&proxy).await;
    is_error(&answer, 429, "queue_full");
    assert!(answer.header("retry-after").is_some());
    assert!(answer.header("longhaul-run-id").is_none(), "no run was started");
    ended_are(&proxy, &[("rejected", 1.0)]).await;
    let mut reader = proxy.connect().await;
    reader.send("GET /log HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(reader.read_head().await.status, 200, "what is no run passes");
    drop(streams.pop());
    eventually("a slot is free", || proxy.outstanding() == 3).await;
    streams.push(stream(&proxy, "").await);
    is_error(&run(&proxy).await, 429, "queue_full");
}

#[tokio::test]
async fn an_endpoints_own_limit_counts_and_a_retry_does_not_break_it() {
    let mut backends = Backend::start_several(2).await;
    backends.iter().for_each(Backend::drip_each);
    let limited = format!("{{url: \"{}\", max_runs: 1}}", backends[0].url());
    let proxy = start_proxy(&service(&[&limited, backends[1].url()], "    outlier: {consecutive_failures: 0}\n")).await;
    let mut streams = Vec::new();
    for _ in 0..5 {
        streams.push(stream(&proxy, "").await);
    }
    assert_eq!((load(&proxy, &backends[0]), load(&proxy, &backends[1])), (1, 4));
    backends[1].refuse().await;
    backends[1].cut_connections();
    eventually("its streams end", || load(&proxy, &backends[1]) == 0).await;
    let answer = run(&proxy).await;
    is_error(&answer, 502, "connect_failed");
    assert_eq!((load(&proxy, &backends[0]), load(&proxy, &backends[1])), (1, 0));
}

// Pools.

/// Serves `count` exchanges at the same time, then ends them all.
async fn burst(proxy: &Proxy, backend: &Backend, count: usize) {
    let mut open = Vec::new();
    for _ in 0..count {
        open.push(stream_at(proxy, backend).await);
    }
    for (mut client, drip) in open {
        drip.finish().await;
        while client.read_chunk().await.is_some() {}
    }
}

#[tokio::test]
async fn idle_connections_are_kept_up_to_max_idle_and_not_for_ever() {
    let backends = Backend::start_several(1).await;
    backends[0].drip_each();
    let proxy = start_proxy(&over(&backends, "    pool: {max_idle: 3, idle_timeout: 1s}\n")).await;
    burst(&proxy, &backends[0], 10).await;
    eventually("only three are kept", || backends[0].open_connections() == 3).await;
    eventually("and none for ever", || backends[0].open_connections() == 0).await;
    let proxy = start_proxy(&over(&backends, "    pool: {max_idle: 0}\n")).await;
    burst(&proxy, &backends[0], 3).await;
    eventually("none is kept", || backends[0].open_connections() == 0).await;
}

#[tokio::test]
async fn max_connections_is_overloaded() {
    let backends = Backend::start_several(1).await;
    backends[0].drip_each();
    let proxy = start_proxy(&over(&backends, "    pool: {max_connections: 2}\n")).await;
    let first = stream_at(&proxy, &backends[0]).await;
    let _second = stream_at(&proxy, &backends[0]).await;
    let answer = run(&proxy).await;
    is_error(&answer, 503, "overloaded");
    assert!(answer.header("retry-after").is_some());
    assert!(is(&proxy, &backends[0], EndpointState::Ready), "our own limit is no evidence against it");
    drop(first);
    eventually("one is free", || backends[0].open_connections() == 1).await;
    stream_at(&proxy, &backends[0]).await;
}

#[tokio::test]
async fn idle_connections_never_use_up_max_connections() {
    let backends = Backend::start_several(1).await;
    let proxy = start_proxy(&over(&backends, "    pool: {max_connections: 1}\n")).await;
    // Connections of clients alternate between workers; the endpoint's idle one is at one of them.
    for _ in 0..50 {
        let answer = run(&proxy).await;
        assert_eq!(answer.status(), 200, "{}", answer.text());
        eventually("one connection at most", || backends[0].open_connections() <= 1).await;
    }
}

#[tokio::test]
async fn connections_to_a_removed_endpoint_are_dropped() {
    let backends = Backend::start_several(2).await;
    let proxy = start_proxy(&over(&backends, "")).await;
    for _ in 0..8 {
        assert_eq!(run(&proxy).await.status(), 200);
    }
    assert!(backends.iter().all(|backend| backend.open_connections() > 0));
    let reloaded = proxy.reload(&over(&backends[..1], "")).await;
    assert_eq!(reloaded.status(), 200);
    eventually("they are closed", || backends[1].open_connections() == 0).await;
    assert!(backends[0].open_connections() > 0, "the others stay");
}

// The proxy's own cookie.

const COOKIE: &str = "    session: {cookie: {name: lh, ttl: 1h}}\n";

/// `name=value` of the cookie that an answer sets.
fn cookie_of(answer: &Response) -> Option<String> {
    answer.header("set-cookie").map(|field| field.split(';').next().unwrap_or_default().to_owned())
}

async fn run_with(proxy: &Proxy, cookie: &str) -> Response {
    post(proxy.address, "/run", &format!("Cookie: {cookie}\r\n"), "hi").await
}

async fn named(count: usize) -> Vec<Backend> {
    let backends = Backend::start_several(count).await;
    for (number, backend) in backends.iter().enumerate() {
        backend.each(move |_| Script::ok(&format!("backend {number}")));
    }
    backends
}

#[tokio::test]
async fn the_cookie_is_the_browsers_secret_and_survives_reloads_and_forgetting() {
    let backends = named(4).await;
    let proxy = start_proxy(&over(&backends, COOKIE)).await;
    let first = run(&proxy).await;
    let field = first.header("set-cookie").expect("one is issued").to_ascii_lowercase();
    for attribute in ["; httponly", "; samesite=", "; path=/", "; max-age=3600"] {
        assert!(field.contains(attribute), "{attribute}: {field}");
    }
    let cookie = cookie_of(&first).expect("a pair");
    for round in 1..=3 {
        for more in [cookie.clone(), format!("a=1; {cookie}; b=2"), format!("{cookie}; a=1")] {
            let answer = run_with(&proxy, &more).await;
            assert_eq!((answer.text(), answer.header("longhaul-affinity")), (first.text(), Some("hit")));
            assert_eq!(answer.header("set-cookie"), None, "it has one");
        }
        let reloaded = proxy.reload(&over(&backends, &format!("{COOKIE}    slow_start: {round}s\n"))).await;
        assert_eq!(reloaded.status(), 200);
    }
    for request in backends.iter().flat_map(Backend::requests) {
        assert!(!request.header("cookie").is_some_and(|field| field.contains("lh=")), "{request:?}");
    }
    // The table forgets it, as another replica would not know it: the cookie tells where it lives.
    for _ in 0..5 {
        assert_eq!(proxy.dispatcher().forget_sessions(None, longhaul::ids::now()), 1);
        let answer = run_with(&proxy, &cookie).await;
        assert_eq!((answer.text(), answer.header("longhaul-affinity")), (first.text(), Some("hit")));
    }
}

#[tokio::test]
async fn a_forged_cookie_is_none() {
    let backends = named(2).await;
    let proxy = start_proxy(&over(&backends, COOKIE)).await;
    let cookie = cookie_of(&run(&proxy).await).expect("one is issued");
    let mut flipped = cookie.clone().into_bytes();
    let last = flipped.len() - 4;
    flipped[last] = if flipped[last] == b'A' { b'B' } else { b'A' };
    let flipped = String::from_utf8(flipped).expect("ASCII");
    for forged in [flipped.as_str(), "lh=x", "lh=", "lh=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"] {
        let answer = run_with(&proxy, forged).await;
        assert_eq!((answer.status(), answer.header("longhaul-affinity")), (200, Some("new")), "{forged}");
        assert!(cookie_of(&answer).is_some_and(|new| new != cookie), "{forged}: a new one is issued");
    }
    for request in backends.iter().flat_map(Backend::requests) {
        assert_eq!(request.header("cookie"), None, "forged ones are stripped too");
    }
}

#[tokio::test]
async fn a_session_that_moves_gets_a_new_cookie() {
    let backends = named(2).await;
    let proxy = start_proxy(&over(&backends, COOKIE)).await;
    let first = run(&proxy).await;
    let cookie = cookie_of(&first).expect("one is issued");
    let home = if first.text() == "backend 0" { 0 } else { 1 };
    assert_eq!(proxy.drain("support", &backends[home].name(), false).await.status(), 200);
    let moved = run_with(&proxy, &cookie).await;
    assert_eq!((moved.text(), moved.header("longhaul-affinity")), (format!("backend {}", 1 - home), Some("moved")));
    let newer = cookie_of(&moved).expect("one that knows the new place");
    assert_eq!(proxy.drain("support", &backends[home].name(), true).await.status(), 200);
    proxy.dispatcher().forget_sessions(None, longhaul::ids::now());
    let answer = run_with(&proxy, &newer).await;
    assert_eq!((answer.text(), answer.header("longhaul-affinity")), (moved.text(), Some("hit")));
    // And it is the same session still.
    assert_eq!(run_with(&proxy, &cookie).await.text(), moved.text());
}

#[tokio::test]
async fn a_failed_answer_issues_no_cookie() {
    let backends = Backend::start_several(1).await;
    backends[0].each(|_| Script::status(500));
    let proxy = start_proxy(&over(&backends, &format!("{COOKIE}    outlier: {{consecutive_failures: 0}}\n"))).await;
    let answer = run(&proxy).await;
    assert_eq!((answer.status(), answer.header("set-cookie")), (500, None));
    assert_eq!(ended(&proxy, "failed").await, 1.0);
}
