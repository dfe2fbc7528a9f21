//! The tests' own backend and client, tried on each other: what they can't do, no test shows.

mod support;

use support::{Backend, Certificate, Gate, Http2Client, RawClient, Script, Step, eventually, get, http2_request, post};

#[tokio::test]
async fn a_backend_answers_and_remembers() {
    let backend = Backend::start().await;
    backend.next(Script::status(503));
    assert_eq!(get(backend.address(), "/first", "X-A: 1\r\n").await.status(), 503);
    let answer = post(backend.address(), "/second?q=1", "", "hello").await;
    assert_eq!((answer.status(), answer.text()), (200, "ok".to_owned()));
    let requests = backend.requests();
    assert_eq!((requests[0].method.as_str(), requests[0].header("x-a")), ("GET", Some("1")));
    assert_eq!((requests[1].target.as_str(), requests[1].body.as_slice()), ("/second?q=1", b"hello".as_slice()));
    assert!(requests[1].body_complete);
    assert_eq!((backend.connections(), requests[1].connection), (2, 1));
    eventually("connections end", || backend.open_connections() == 0).await;
}

#[tokio::test]
async fn a_drip_is_written_by_the_test() {
    let backend = Backend::start().await;
    backend.drip_each();
    let mut client = RawClient::connect(backend.address()).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let drip = backend.drip().await;
    drip.event("one").await;
    assert_eq!(client.read_head().await.header("content-type"), Some("text/event-stream"));
    assert_eq!(client.read_chunk().await.as_deref(), Some(b"data: one\n\n".as_slice()));
    assert_eq!(backend.in_flight(), 1);
    drip.finish_with(&[("x-end", "yes")]).await;
    assert_eq!(client.read_chunk().await, None);
    eventually("the exchange ends", || backend.in_flight() == 0).await;

    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    backend.drip().await.cut().await;
    assert!(client.read_response().await.truncated);
}

#[tokio::test]
async fn a_drip_notices_that_its_reader_left() {
    let backend = Backend::start().await;
    backend.drip_each();
    let mut client = RawClient::connect(backend.address()).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let drip = backend.drip().await;
    assert!(!drip.gone());
    drop(client);
    drip.until_gone().await;
}

#[tokio::test]
async fn a_gate_holds_an_answer_back_and_raw_bytes_pass_as_they_are() {
    let backend = Backend::start().await;
    let gate = Gate::new();
    backend.next(Script::raw("HTTP/1.1 200 OK\r\nBad Header\r\n\r\n").after(&gate));
    let mut client = RawClient::connect(backend.address()).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    eventually("it arrives", || backend.in_flight() == 1).await;
    gate.open();
    assert_eq!(client.read_to_end().await, b"HTTP/1.1 200 OK\r\nBad Header\r\n\r\n");
}

#[tokio::test]
async fn refusing_resetting_tunnelling_and_echoing() {
    let mut backend = Backend::start().await;
    backend.next(Script(vec![Step::Reset]));
    let mut client = RawClient::connect(backend.address()).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(client.try_read_head().await.is_err());

    backend.next(Script::tunnel("echo"));
    let mut client = RawClient::connect(backend.address()).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n").await;
    assert_eq!(client.read_head().await.status, 101);
    client.send("ping").await;
    assert_eq!(client.read_exact(4).await, b"ping");

    backend.next(Script::echo());
    let chunked =
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nX-T: 1\r\n\r\n";
    assert_eq!(support::fetch(backend.address(), chunked).await.text(), "abcde");
    assert_eq!(backend.requests()[2].trailers, [("X-T".to_owned(), "1".to_owned())]);

    backend.refuse().await;
    assert!(tokio::net::TcpStream::connect(backend.address()).await.is_err());
    backend.resume().await;
    assert_eq!(get(backend.address(), "/", "").await.status(), 200);
}

#[tokio::test]
async fn unix_tls_and_http2_backends() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("agent.sock");
    let unix = Backend::start_unix(&path).await;
    let mut client = RawClient::connect_unix(&path).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_response().await.text(), "ok");
    assert_eq!(unix.request_count(), 1);

    let certificate = Certificate::create(directory.path(), &["localhost"]);
    let tls = Backend::start_tls(&certificate, &["h2", "http/1.1"]).await;
    let mut client = RawClient::connect_tls(tls.address(), "localhost", certificate.client(&["http/1.1"])).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_response().await.text(), "ok");
    let client = Http2Client::connect_tls(tls.address(), "localhost", certificate.client(&["h2"])).await;
    assert_eq!(client.fetch(http2_request("GET", tls.address(), "/h2"), b"").await.text(), "ok");

    let http2 = Backend::start_http2().await;
    let client = Http2Client::connect(http2.address()).await;
    http2.next(Script::echo());
    let long = vec![7; 300_000];
    let answer = client.fetch(http2_request("POST", http2.address(), "/echo"), &long).await;
    assert!(answer.body == long && !answer.truncated);
    assert_eq!(http2.requests()[0].target, "/echo");
    http2.drip_each();
    let stream = client.open(http2_request("GET", http2.address(), "/"), true).await;
    let drip = http2.drip().await;
    drip.event("one").await;
    let (head, mut body) = stream.head().await;
    assert_eq!(head.header("content-type"), Some("text/event-stream"));
    assert_eq!(body.data().await.expect("data").expect("data"), "data: one\n\n");
    drop(body);
    drip.until_gone().await;
}
