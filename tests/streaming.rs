//! Streaming: what passes through, as it comes, and what is refused.

mod support;

use std::time::Duration;

use support::{
    Backend, Body, Drip, Gate, Http2Client, Http2Stream, Proxy, Random, RawClient, Script, Step, eventually, fetch,
    get, http2_request, post, start_proxy, within,
};

/// A configuration with one service of one endpoint.
fn one(backend: &Backend) -> String {
    with(backend, "")
}

/// As [`one`] with more keys of the service, each line indented by four.
fn with(backend: &Backend, more: &str) -> String {
    format!(
        "services:\n  - name: support\n    versions: [{{name: stable, endpoints: [\"{}\"]}}]\n{more}",
        backend.url()
    )
}

/// Starts a stream through the proxy; the drip is its endpoint's end.
async fn open_stream(proxy: &Proxy, backend: &Backend) -> (RawClient, Drip) {
    let mut client = proxy.connect().await;
    client.send("POST /run HTTP/1.1\r\nHost: agents.test\r\nContent-Length: 2\r\n\r\nhi").await;
    let drip = backend.drip().await;
    assert_eq!(client.read_head().await.status, 200);
    (client, drip)
}

/// As [`open_stream`] over HTTP/2; the head is still to be read.
async fn open_http2_stream(proxy: &Proxy, backend: &Backend) -> (Http2Client, Http2Stream, Drip) {
    let client = Http2Client::connect(proxy.address).await;
    let mut stream = client.open(http2_request("POST", proxy.address, "/run"), false).await;
    stream.send(b"hi", true).await;
    let drip = backend.drip().await;
    (client, stream, drip)
}

#[tokio::test]
async fn the_first_event_arrives_before_the_second_is_sent() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&one(&backend)).await;
    let (mut client, drip) = open_stream(&proxy, &backend).await;
    for number in 0..5 {
        drip.event(&number.to_string()).await;
        // The next is written only after this one is here: nothing can have been held back.
        client.read_chunks_until(&format!("data: {number}\n\n")).await;
    }
    drip.finish().await;
    assert_eq!(client.read_chunk().await, None);
}

#[tokio::test]
async fn the_head_arrives_before_any_body() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&one(&backend)).await;
    // `open_stream` has read the head although the endpoint has said nothing more.
    let (mut client, drip) = open_stream(&proxy, &backend).await;
    drip.event("late").await;
    client.read_chunks_until("late").await;
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let backend = Backend::start().await;
    backend.each(|_| {
        let head = Step::Head { status: 200, headers: vec![("trailer".into(), "x-sum".into())], body: Body::Chunked };
        let trailers = Step::Trailers(vec![("x-sum".into(), "42".into())]);
        Script(vec![Step::ReadBody, head, Step::Data(b"body".to_vec()), trailers])
    });
    let proxy = start_proxy(&one(&backend)).await;
    let request = "POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\nTrailer: X-Up\r\n\
                   Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Up: 7\r\n\r\n";
    let answer = fetch(proxy.address, request).await;
    assert_eq!(answer.text(), "body");
    let lower = |fields: &[(String, String)]| -> Vec<(String, String)> {
        fields.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.clone())).collect()
    };
    assert_eq!(lower(&answer.trailers), [("x-sum".to_owned(), "42".to_owned())]);
    assert_eq!(lower(&backend.requests()[0].trailers), [("x-up".to_owned(), "7".to_owned())]);
}

#[tokio::test]
async fn an_endpoint_that_dies_mid_stream_truncates_visibly() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&one(&backend)).await;
    let (mut client, drip) = open_stream(&proxy, &backend).await;
    drip.event("one").await;
    client.read_chunks_until("one").await;
    drip.cut().await;
    let rest = client.closed().await;
    assert!(!rest.ends_with(b"0\r\n\r\n"), "{:?}", String::from_utf8_lossy(&rest));
    let labels = ["service=\"support\"", "outcome=\"truncated\""];
    proxy.metric_becomes("longhaul_runs_total", &labels, 1.0).await;
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
}

#[tokio::test]
async fn an_endpoint_that_dies_mid_stream_resets_the_stream_of_http2() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&one(&backend)).await;
    let (_client, stream, drip) = open_http2_stream(&proxy, &backend).await;
    drip.event("one").await;
    let (head, mut body) = stream.head().await;
    assert_eq!(head.status, 200);
    assert_eq!(within("the event", body.data()).await.expect("data").expect("data"), "data: one\n\n");
    drip.cut().await;
    let end = within("the end", body.data()).await;
    assert!(end.is_some_and(|end| end.is_err_and(|error| error.is_reset())), "reset, not ended");
}

#[tokio::test]
async fn a_body_shorter_than_its_length_is_not_ended_as_complete() {
    let backend = Backend::start().await;
    backend.each(|_| Script::raw("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"));
    let proxy = start_proxy(&one(&backend)).await;
    let answer = get(proxy.address, "/", "").await;
    assert!(answer.truncated && answer.body == b"half", "{answer:?}");
}

#[tokio::test]
async fn a_client_that_leaves_closes_the_endpoint_at_once() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&one(&backend)).await;
    let (mut client, drip) = open_stream(&proxy, &backend).await;
    drip.event("one").await;
    client.read_chunks_until("one").await;
    drop(client);
    // Without another byte from the endpoint.
    drip.until_gone().await;
    let labels = ["service=\"support\"", "outcome=\"cancelled\""];
    proxy.metric_becomes("longhaul_runs_total", &labels, 1.0).await;
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_closes_the_endpoint_too() {
    let backend = Backend::start().await;
    let gate = Gate::new();
    let held = gate.clone();
    backend.each(move |_| Script::ok("late").after(&held));
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    client.send("POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
    eventually("the run arrives", || backend.in_flight() == 1).await;
    // A half-close after the whole request counts as leaving.
    client.finish_sending().await;
    eventually("the endpoint's connection ends", || backend.in_flight() == 0).await;
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
}

#[tokio::test]
async fn a_client_that_leaves_is_seen_to_while_the_endpoint_takes_nothing_of_its_body() {
    let backend = Backend::start().await;
    let gate = Gate::new();
    let answers = [vec![], vec![Step::Head { status: 200, headers: vec![], body: Body::Chunked }]];
    // Before it has answered, and afterwards.
    for (round, mut steps) in answers.into_iter().enumerate() {
        let answered = !steps.is_empty();
        steps.push(Step::Stall(gate.clone()));
        backend.next(Script(steps));
        let proxy = start_proxy(&one(&backend)).await;
        let stream = tokio::net::TcpStream::connect(proxy.address).await.expect("a listener");
        // An end would wait behind what its own side could not send yet, and be nobody's to see; a reset does not.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option");
        let mut client = RawClient::over(stream);
        let part = vec![b'x'; 256 * 1024];
        client.send(format!("POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", 64 << 20)).await;
        client.send(&part).await;
        eventually("the run arrives", || backend.request_count() == round + 1).await;
        if answered {
            client.read_head().await;
        }
        // Until nobody takes any more.
        while tokio::time::timeout(Duration::from_millis(200), client.try_send(&part)).await.is_ok() {}
        drop(client);
        proxy.metric_becomes("longhaul_runs_total", &["outcome=\"cancelled\""], 1.0).await;
        proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
    }
    gate.open();
}

#[tokio::test]
async fn a_reset_of_http2_closes_the_endpoint() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&one(&backend)).await;
    let (_client, mut stream, drip) = open_http2_stream(&proxy, &backend).await;
    drip.event("one").await;
    stream.reset();
    drip.until_gone().await;
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
}

#[tokio::test]
async fn ambiguous_requests_are_refused_and_the_connection_is_closed() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&one(&backend)).await;
    let chunked = "Transfer-Encoding: chunked\r\n";
    let refused: Vec<(&str, String)> = vec![
        ("length with chunks", format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n{chunked}\r\n0\r\n\r\n")),
        ("chunks with length", format!("POST / HTTP/1.1\r\nHost: a\r\n{chunked}Content-Length: 3\r\n\r\n0\r\n\r\n")),
        ("two lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx".into()),
        ("two equal lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx".into()),
        ("a list of lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\nx".into()),
        ("doubled coding", format!("POST / HTTP/1.1\r\nHost: a\r\n{chunked}{chunked}\r\n0\r\n\r\n")),
        ("doubled in one", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n".into()),
        ("unknown coding", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n".into()),
        (
            "coding before chunked",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n".into(),
        ),
        ("coding in 1.0", format!("POST / HTTP/1.0\r\nHost: a\r\n{chunked}\r\n0\r\n\r\n")),
        ("no host", "GET / HTTP/1.1\r\n\r\n".into()),
        ("two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n".into()),
        ("folded line", "GET / HTTP/1.1\r\nHost: a\r\nX-A: 1\r\n 2\r\n\r\n".into()),
        ("space before colon", "GET / HTTP/1.1\r\nHost: a\r\nX-A : 1\r\n\r\n".into()),
        ("bare LF", "GET / HTTP/1.1\r\nHost: a\nX-A: 1\r\n\r\n".into()),
        ("bare CR", "GET / HTTP/1.1\r\nHost: a\r\nX-A: 1\r2\r\n\r\n".into()),
        ("NUL in a value", "GET / HTTP/1.1\r\nHost: a\r\nX-A: 1\0\r\n\r\n".into()),
        ("signed length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\nx".into()),
        ("negative length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\nx".into()),
        ("hexadecimal length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x1\r\n\r\nx".into()),
        ("huge length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\nx".into()),
        ("control byte in target", "GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        ("space in target", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        ("contradicting absolute form", "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        ("no request at all", "hello there\r\n\r\n".into()),
    ];
    for (what, request) in refused {
        let mut client = proxy.connect().await;
        client.send(&request).await;
        let answer = client.read_response().await;
        assert_eq!((answer.status(), answer.code().as_deref()), (400, Some("bad_request")), "{what}: {answer:?}");
        assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{what}");
        assert!(client.closed().await.is_empty(), "{what}: nothing after the answer");
    }
    assert_eq!(backend.request_count(), 0, "nothing of it was forwarded");
}

#[tokio::test]
async fn bad_chunks_end_the_exchange_and_never_reach_the_endpoint_as_complete() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&one(&backend)).await;
    let bad = [
        "fffffffffffffffff\r\n",
        "0x3\r\nabc\r\n",
        "-1\r\n",
        "+3\r\nabc\r\n",
        "3\nabc\r\n",
        "3;a=\x01\r\nabc\r\n",
        "3\r\nabcd\r\n",
        "zz\r\n",
        " 3\r\nabc\r\n",
    ];
    for chunks in bad {
        let mut client = proxy.connect().await;
        client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").await;
        let _ = client.try_send(format!("{chunks}0\r\n\r\n")).await;
        if let Ok(head) = client.try_read_head().await {
            assert_eq!(head.status, 400, "{chunks:?}");
        }
        client.closed().await;
    }
    assert!(backend.requests().iter().all(|request| !request.body_complete), "{:?}", backend.requests());
}

#[tokio::test]
async fn limits_of_head_and_body_have_their_answers() {
    let backend = Backend::start().await;
    let limits = "listeners: [{address: \"127.0.0.1:0\", limits: {max_header_bytes: 4KiB, max_headers: 20, max_body_bytes: 1KiB}}]\n";
    let proxy = start_proxy(&format!("{limits}{}", one(&backend))).await;
    let long = get(proxy.address, "/", &format!("X-Long: {}\r\n", "x".repeat(5000))).await;
    assert_eq!((long.status(), long.code().as_deref()), (431, Some("header_too_large")));
    let many = get(proxy.address, "/", &"X-Many: 1\r\n".repeat(30)).await;
    assert_eq!(many.status(), 431);
    let body = post(proxy.address, "/", "", &"x".repeat(2000)).await;
    assert_eq!((body.status(), body.code().as_deref()), (413, Some("body_too_large")));
    assert_eq!(backend.request_count(), 0);
    assert_eq!(post(proxy.address, "/", "", &"x".repeat(1024)).await.status(), 200);
}

#[tokio::test]
async fn malformed_answers_of_an_endpoint_are_502_and_never_passed_on() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&format!("{}    outlier: {{consecutive_failures: 0}}\n", with(&backend, ""))).await;
    let malformed = [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nBad Name: 1\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX-A: 1\r\n folded\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX-A: a\0b\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        "HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        "220 mail.example ESMTP\r\n\r\n",
        "",
    ];
    for answer in malformed {
        backend.next(Script::raw(answer));
        let got = post(proxy.address, "/", "", "hi").await;
        assert_eq!((got.status(), got.code().as_deref()), (502, Some("upstream_reset")), "{answer:?}: {got:?}");
        assert!(got.header("proxy-status").is_some(), "{answer:?}");
        assert!(got.header("x-a").is_none(), "{answer:?}");
    }
    assert_eq!(post(proxy.address, "/", "", "hi").await.status(), 200, "the proxy goes on");
}

#[tokio::test]
async fn answers_without_body_keep_the_connection() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    let head_only = |status, length| {
        Script(vec![
            Step::ReadBody,
            Step::Head { status, headers: vec![("etag".into(), "\"1\"".into())], body: length },
        ])
    };
    for (method, script, status) in [
        ("HEAD", head_only(200, Body::Length(1000)), 200),
        ("GET", head_only(204, Body::None), 204),
        ("GET", head_only(304, Body::None), 304),
        ("GET", Script::ok("body"), 200),
    ] {
        backend.next(script);
        client.send(format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        let answer = client.read_response_to(method).await;
        assert_eq!(answer.status(), status);
        if method == "HEAD" {
            assert_eq!(answer.header("content-length"), Some("1000"));
        }
    }
}

#[tokio::test]
async fn one_connection_of_a_client_uses_one_of_the_endpoint() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    for _ in 0..5 {
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
        assert_eq!(client.read_response().await.text(), "ok");
    }
    assert_eq!(backend.connections(), 1);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let backend = Backend::start().await;
    backend.each(|request| Script::ok(&request.target));
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    client
        .send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\nGET /3 HTTP/1.1\r\nHost: a\r\n\r\n")
        .await;
    for path in ["/1", "/2", "/3"] {
        assert_eq!(client.read_response().await.text(), path);
    }
}

#[tokio::test]
async fn http10_is_answered_and_closed() {
    let backend = Backend::start().await;
    backend.each(|_| {
        let head = Step::Head { status: 200, headers: vec![], body: Body::Chunked };
        Script(vec![head, Step::Data(b"streamed".to_vec()), Step::End])
    });
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.0\r\n\r\n").await;
    let answer = client.read_response().await;
    assert_eq!((answer.status(), answer.text().as_str()), (200, "streamed"));
    assert_eq!(answer.header("transfer-encoding"), None, "HTTP/1.0 has no chunks");
    client.closed().await;
}

#[tokio::test]
async fn continue_is_asked_for_and_other_informational_answers_pass() {
    let backend = Backend::start().await;
    backend.next(Script(vec![
        Step::Raw(b"HTTP/1.1 100 Continue\r\n\r\n".to_vec()),
        Step::ReadBody,
        Step::Raw(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n".to_vec()),
        Step::Head { status: 200, headers: vec![], body: Body::Length(2) },
        Step::Data(b"ok".to_vec()),
    ]));
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").await;
    assert_eq!(client.read_head().await.status, 100);
    client.send("hello").await;
    let hint = client.read_head().await;
    assert_eq!((hint.status, hint.header("link")), (103, Some("</a>")));
    assert_eq!(client.read_response().await.text(), "ok");
    assert_eq!(backend.requests()[0].body, b"hello");
}

#[tokio::test]
async fn an_answer_before_the_end_of_the_body_passes() {
    let backend = Backend::start().await;
    backend
        .next(Script(vec![Step::Raw(b"HTTP/1.1 403 No\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno".to_vec())]));
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nbegin").await;
    let answer = client.read_response().await;
    assert_eq!((answer.status(), answer.text().as_str()), (403, "no"));
}

#[tokio::test]
async fn an_upgrade_is_a_tunnel_both_ways() {
    let backend = Backend::start().await;
    backend.each(|_| Script::tunnel("websocket"));
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    client
        .send(
            "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: chat\r\n\r\n",
        )
        .await;
    let head = client.read_head().await;
    assert_eq!((head.status, head.header("upgrade")), (101, Some("websocket")));
    for text in ["ping", "pong, and more"] {
        client.send(text).await;
        assert_eq!(client.read_exact(text.len()).await, text.as_bytes());
    }
    let request = backend.request(1).await;
    assert_eq!(request.header("sec-websocket-protocol"), Some("chat"));
    assert!(request.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("upgrade")));
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 1.0).await;
    drop(client);
    eventually("the tunnel ends at the endpoint", || backend.in_flight() == 0).await;
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
}

#[tokio::test]
async fn what_follows_a_refused_upgrade_is_not_tunnelled() {
    let backend = Backend::start().await;
    backend.next(Script::answer(403, &[], "no"));
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n\0raw bytes\r\n\r\n").await;
    assert_eq!(client.read_response().await.status(), 403);
    client.closed().await;
    assert_eq!(backend.request_count(), 1, "the bytes after the request went nowhere");
}

#[tokio::test]
async fn hop_by_hop_fields_never_pass() {
    let backend = Backend::start().await;
    backend.each(|_| {
        let mut headers = vec![("connection".to_owned(), "x-hop".to_owned()), ("x-hop".to_owned(), "1".to_owned())];
        headers.push(("keep-alive".to_owned(), "timeout=5".to_owned()));
        headers.push(("x-end".to_owned(), "2".to_owned()));
        Script(vec![Step::ReadBody, Step::Head { status: 200, headers, body: Body::Length(0) }])
    });
    let proxy = start_proxy(&one(&backend)).await;
    let headers = "Connection: keep-alive, X-Secret\r\nX-Secret: 1\r\nKeep-Alive: 5\r\nProxy-Connection: x\r\nTE: gzip\r\nX-Keep: 3\r\n";
    let answer = get(proxy.address, "/", headers).await;
    let request = &backend.requests()[0];
    for name in ["x-secret", "keep-alive", "proxy-connection", "te"] {
        assert_eq!(request.header(name), None, "{name}");
    }
    assert_eq!(request.header("x-keep"), Some("3"));
    assert_eq!((answer.header("x-hop"), answer.header("keep-alive")), (None, None));
    assert_eq!(answer.header("x-end"), Some("2"));
}

#[tokio::test]
async fn forwarded_fields_of_strangers_are_replaced() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&one(&backend)).await;
    let forged = "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: evil\r\nForwarded: for=6.6.6.6\r\n\
                  longhaul-run-id: forged\r\nlonghaul-anything: 1\r\n";
    get(proxy.address, "/", forged).await;
    let request = &backend.requests()[0];
    assert_eq!(request.header("x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(request.header("x-forwarded-proto"), Some("http"));
    assert_eq!(request.header("x-forwarded-host"), Some("agents.test"));
    assert!(!request.header("forwarded").is_some_and(|value| value.contains("6.6.6.6")));
    assert_eq!(request.header("longhaul-anything"), None);
    assert_ne!(request.header("longhaul-run-id"), Some("forged"));
}

#[tokio::test]
async fn forwarded_fields_of_trusted_proxies_are_continued() {
    let backend = Backend::start().await;
    let listener = "listeners: [{address: \"127.0.0.1:0\", trusted_proxies: [127.0.0.0/8]}]\n";
    let proxy = start_proxy(&format!("{listener}{}", one(&backend))).await;
    get(
        proxy.address,
        "/",
        "X-Forwarded-For: 10.1.1.1\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: shop.example\r\n",
    )
    .await;
    let request = &backend.requests()[0];
    assert_eq!(request.header("x-forwarded-for"), Some("10.1.1.1, 127.0.0.1"));
    assert_eq!(request.header("x-forwarded-proto"), Some("https"));
    assert_eq!(request.header("x-forwarded-host"), Some("shop.example"));
}

#[tokio::test]
async fn ids_are_made_when_absent_and_kept_when_there() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&one(&backend)).await;
    get(proxy.address, "/", "").await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    get(proxy.address, "/", &format!("X-Request-Id: mine\r\nTraceparent: {trace}\r\n")).await;
    let requests = backend.requests();
    assert!(requests[0].header("x-request-id").is_some_and(|id| !id.is_empty()));
    assert!(requests[0].header("traceparent").is_some_and(|trace| trace.len() == 55));
    assert_eq!((requests[1].header("x-request-id"), requests[1].header("traceparent")), (Some("mine"), Some(trace)));
}

#[tokio::test]
async fn a_run_has_an_id_on_both_sides_and_every_answer_its_affinity() {
    let backend = Backend::start().await;
    backend.each(|_| Script::answer(200, &[("longhaul-affinity", "forged"), ("longhaul-x", "1")], "ok"));
    let proxy = start_proxy(&one(&backend)).await;
    let start = post(proxy.address, "/", "", "hi").await;
    let id = start.header("longhaul-run-id").expect("a start has an id").to_owned();
    assert!(id.len() == 36 && id.as_bytes()[14] == b'7', "a UUIDv7: {id}");
    assert_eq!(backend.requests()[0].header("longhaul-run-id"), Some(id.as_str()));
    assert_eq!((start.header("longhaul-affinity"), start.header("longhaul-x")), (Some("none"), None));
    let other = get(proxy.address, "/", "").await;
    assert_eq!(other.header("longhaul-run-id"), None, "a GET is no run");
    let refused = fetch(proxy.address, "GET / HTTP/1.1\r\n\r\n").await;
    assert_eq!(refused.header("longhaul-affinity"), Some("none"), "errors too");
}

#[tokio::test]
async fn debug_headers_are_for_those_who_may_ask() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&one(&backend)).await;
    let shown = get(proxy.address, "/", "longhaul-debug: 1\r\n").await;
    assert_eq!(shown.header("longhaul-version"), Some("stable"));
    assert_eq!(shown.header("longhaul-endpoint"), Some(backend.name().as_str()));
    let silent = get(proxy.address, "/", "").await;
    assert_eq!((silent.header("longhaul-version"), silent.header("longhaul-endpoint")), (None, None));
    let proxy = start_proxy(&format!("debug_from: []\n{}", one(&backend))).await;
    assert_eq!(get(proxy.address, "/", "longhaul-debug: 1\r\n").await.header("longhaul-endpoint"), None);
}

#[tokio::test]
async fn a_slow_endpoint_holds_back_the_client_not_our_memory() {
    const BODY: usize = 64 << 20;
    let backend = Backend::start().await;
    let gate = Gate::new();
    let mut script = Script::ok("got it");
    script.0.insert(0, Step::Stall(gate.clone()));
    backend.next(script);
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {BODY}\r\n\r\n")).await;
    eventually("the head arrives", || backend.in_flight() == 1).await;
    let piece = vec![b'x'; 64 << 10];
    let mut sent = 0;
    while let Ok(done) = tokio::time::timeout(Duration::from_millis(300), client.try_send(&piece)).await {
        done.expect("open");
        sent += piece.len();
        assert!(sent < BODY / 2, "the proxy takes what the endpoint does not");
    }
    gate.open();
    // The piece that was interrupted may be sent in part: what counts is that the flow goes on.
    eventually("the flow goes on", || backend.requests()[0].body.len() >= sent).await;
}

#[tokio::test]
async fn a_client_that_stops_reading_holds_back_the_endpoint() {
    const BODY: usize = 48 << 20;
    let backend = Backend::start().await;
    let gate = Gate::new();
    let written = gate.clone();
    backend.each(move |_| {
        let mut steps = vec![Step::ReadBody, Step::Head { status: 200, headers: vec![], body: Body::Length(BODY) }];
        steps.extend((0..BODY >> 20).map(|_| Step::Data(vec![b'y'; 1 << 20])));
        Script(steps).after(&written)
    });
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    gate.open();
    assert_eq!(client.read_head().await.status, 200);
    // Another exchange goes through meanwhile; the endpoint of the first is still at work because nobody reads.
    assert_eq!(proxy.admin("GET", "/healthz").await.status(), 200);
    assert_eq!(backend.in_flight(), 1, "48 MiB must not fit into buffers");
    let body = client.read_exact(BODY).await;
    assert!(body.iter().all(|byte| *byte == b'y'));
}

#[tokio::test]
async fn a_refused_connection_is_502_and_another_endpoint_is_tried() {
    let mut down = Backend::start().await;
    let up = Backend::start().await;
    down.refuse().await;
    let proxy = start_proxy(&one(&down)).await;
    let answer = post(proxy.address, "/", "", "hi").await;
    assert_eq!((answer.status(), answer.code().as_deref()), (502, Some("connect_failed")));
    assert!(answer.header("retry-after").is_some());

    let both = format!(
        "services:\n  - name: support\n    versions: [{{name: stable, endpoints: [\"{}\", \"{}\"]}}]\n",
        down.url(),
        up.url()
    );
    let proxy = start_proxy(&both).await;
    for _ in 0..20 {
        assert_eq!(post(proxy.address, "/", "", "hi").await.status(), 200);
    }
}

#[tokio::test]
async fn a_connection_that_the_endpoint_closed_in_between_is_not_an_error() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&one(&backend)).await;
    let mut client = proxy.connect().await;
    for _ in 0..5 {
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
        assert_eq!(client.read_response().await.status(), 200);
        backend.cut_connections();
        eventually("it is closed", || backend.open_connections() == 0).await;
    }
    assert_eq!(backend.request_count(), 5, "none was sent twice");
}

#[tokio::test]
async fn a_post_that_was_received_is_never_sent_twice_and_a_get_once_more() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&one(&backend)).await;
    backend.next(Script(vec![Step::ReadBody, Step::Reset]));
    let answer = post(proxy.address, "/", "", "hi").await;
    assert_eq!((answer.status(), answer.code().as_deref()), (502, Some("upstream_reset")));
    assert_eq!(backend.request_count(), 1);

    let other = Backend::start().await;
    let both = format!(
        "services: [{{name: support, versions: [{{name: stable, endpoints: [\"{}\", \"{}\"]}}]}}]\n",
        backend.url(),
        other.url()
    );
    let proxy = start_proxy(&both).await;
    for resets in [&backend, &other] {
        resets.next(Script(vec![Step::ReadBody, Step::Reset]));
    }
    // Both reset once: the first try and the second fail, and there is no third.
    assert_eq!(get(proxy.address, "/", "").await.code().as_deref(), Some("upstream_reset"));
    assert_eq!((backend.request_count(), other.request_count()), (2, 1));
    backend.next(Script(vec![Step::ReadBody, Step::Reset]));
    for _ in 0..2 {
        assert_eq!(get(proxy.address, "/", "").await.status(), 200, "tried again on the other");
    }
    assert_eq!(backend.request_count() + other.request_count(), 6);

    let proxy = start_proxy(&one(&backend)).await;
    let before = backend.request_count();
    backend.next(Script::status(503));
    assert_eq!(get(proxy.address, "/", "").await.status(), 503, "a status is never retried");
    assert_eq!(backend.request_count(), before + 1);
}

#[tokio::test]
async fn time_outs_have_their_answers() {
    let backend = Backend::start().await;
    let gate = Gate::new();
    let held = gate.clone();
    backend.each(move |_| Script::ok("late").after(&held));
    let proxy = start_proxy(&with(&backend, "    timeouts: {first_byte: 200ms}\n")).await;
    let answer = post(proxy.address, "/", "", "hi").await;
    assert_eq!((answer.status(), answer.code().as_deref()), (504, Some("first_byte_timeout")));
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"timed_out\""], 1.0).await;
    eventually("the endpoint's connection ends", || backend.in_flight() == 0).await;

    backend.drip_each();
    let proxy = start_proxy(&with(&backend, "    timeouts: {idle: 200ms}\n")).await;
    let (mut client, drip) = open_stream(&proxy, &backend).await;
    drip.event("one").await;
    client.read_chunks_until("one").await;
    assert!(!client.closed().await.ends_with(b"0\r\n\r\n"), "cut, not completed");

    let proxy = start_proxy(&with(&backend, "    runs: {max_duration: 300ms}\n")).await;
    let (mut client, drip) = open_stream(&proxy, &backend).await;
    drip.event("one").await;
    client.read_chunks_until("one").await;
    assert!(!client.closed().await.ends_with(b"0\r\n\r\n"), "cut, not completed");
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"timed_out\""], 1.0).await;
}

#[tokio::test]
async fn outcomes_are_told_apart() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&with(&backend, "    outlier: {consecutive_failures: 0}\n")).await;
    for status in [200, 302, 404, 500, 503] {
        backend.next(Script::status(status));
        assert_eq!(post(proxy.address, "/", "", "hi").await.status(), status);
    }
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\"", "version=\"stable\""], 3.0).await;
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"failed\"", "version=\"stable\""], 2.0).await;
}

#[tokio::test]
async fn nothing_ready_is_no_endpoint_and_no_route_is_404() {
    let config = "services: [{name: support, versions: [{name: stable, endpoints: []}]}]\n";
    let proxy = start_proxy(config).await;
    let answer = post(proxy.address, "/", "", "hi").await;
    assert_eq!((answer.status(), answer.code().as_deref()), (503, Some("no_endpoint")));
    let routed = format!("routes: [{{match: {{path: /a/**}}, service: support}}]\n{config}");
    let proxy = start_proxy(&routed).await;
    let answer = get(proxy.address, "/b", "").await;
    assert_eq!((answer.status(), answer.code().as_deref()), (404, Some("no_route")));
}

#[tokio::test]
async fn all_pairs_of_versions_carry_any_body_unchanged() {
    let http1 = Backend::start().await;
    let http2 = Backend::start_http2().await;
    for backend in [&http1, &http2] {
        backend.each(|_| Script::echo());
    }
    let config = format!(
        "routes:\n  - {{match: {{path: /one/**}}, service: one}}\n  - {{match: {{path: /two/**}}, service: two}}\n\
         services:\n  - {{name: one, versions: [{{name: v, endpoints: [\"{}\"]}}]}}\n  \
         - {{name: two, versions: [{{name: v, http: 2, endpoints: [\"{}\"]}}]}}\n",
        http1.url(),
        http2.url()
    );
    let proxy = start_proxy(&config).await;
    let http2_client = Http2Client::connect(proxy.address).await;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for length in [0, 1, 2, 1000, 16_383, 16_384, 65_535, 65_536, 200_001] {
        let body = random.bytes(length);
        let chunked = chunks(&body, &mut random);
        let write_size = random.up_to(40_000);
        for path in ["/one/echo", "/two/echo"] {
            let what = format!("{path}, {length} bytes, written by {write_size}");
            let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
            let answer = proxy.connect().await.exchange(&[head.as_bytes(), &chunked].concat(), write_size).await;
            assert!(answer.body == body && !answer.truncated, "HTTP/1.1 {what}");
            let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
            let answer = proxy.connect().await.exchange(&[head.as_bytes(), &body].concat(), write_size).await;
            assert!(answer.body == body && !answer.truncated, "HTTP/1.1 with length {what}");
            let answer = http2_client.fetch(http2_request("POST", proxy.address, path), &body).await;
            assert!(answer.body == body && !answer.truncated, "HTTP/2 {what}");
        }
    }
}

/// `body` as chunks of any sizes, with the last one.
fn chunks(body: &[u8], random: &mut Random) -> Vec<u8> {
    let mut wire = Vec::new();
    let mut rest = body;
    while !rest.is_empty() {
        let (chunk, after) = rest.split_at(rest.len().min(random.up_to(20_000)));
        wire.extend_from_slice(format!("{:X}\r\n", chunk.len()).as_bytes());
        wire.extend_from_slice(chunk);
        wire.extend_from_slice(b"\r\n");
        rest = after;
    }
    wire.extend_from_slice(b"0\r\n\r\n");
    wire
}

#[tokio::test]
async fn every_small_split_of_a_request_is_read_alike() {
    let backend = Backend::start().await;
    backend.each(|request| Script::ok(&format!("{} {}", request.method, request.target)));
    let proxy = start_proxy(&one(&backend)).await;
    let request =
        "POST /a/./b/../c?x=1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n";
    for write_size in 1..20 {
        let answer = proxy.connect().await.exchange(request.as_bytes(), write_size).await;
        assert_eq!(answer.text(), "POST /a/c?x=1", "written by {write_size}");
    }
    // The body is read by the script before it answers, so every record is whole.
    assert!(backend.requests().iter().all(|request| request.body == b"abcd" && request.body_complete));
}

#[tokio::test]
async fn curl_speaks_both_versions_with_it() {
    let backend = Backend::start().await;
    backend.each(|request| Script::ok(&format!("{} {}", request.method, request.target)));
    let proxy = start_proxy(&one(&backend)).await;
    for version in ["--http1.1", "--http2-prior-knowledge", "--http1.0"] {
        let url = format!("http://{}/chat", proxy.address);
        let mut curl = std::process::Command::new("curl");
        curl.args(["-sS", "--fail", "--max-time", "10", version, "-d", "hello", &url]);
        let output =
            tokio::task::spawn_blocking(move || curl.output()).await.expect("no panic").expect("curl is installed");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "POST /chat", "{version}: {output:?}");
    }
    assert!(backend.requests().iter().all(|request| request.body == b"hello"));
}
