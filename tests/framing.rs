//! Framing: every message that can be read in two ways is refused, from clients and from endpoints, over raw sockets.
//!
//! `cargo test --test framing -- --nocapture` prints what is sent and what each is answered.

mod support;

use std::time::Duration;

use support::{
    Backend, Body, Gate, Http2Client, Proxy, RawClient, Script, Step, eventually, http2_request, start_proxy, within,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// What a table's row is answered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Refusal {
    BadRequest,
    HeaderTooLarge,
}

impl Refusal {
    fn status(self) -> u16 {
        match self {
            Refusal::BadRequest => 400,
            Refusal::HeaderTooLarge => 431,
        }
    }

    fn code(self) -> &'static str {
        match self {
            Refusal::BadRequest => "bad_request",
            Refusal::HeaderTooLarge => "header_too_large",
        }
    }
}

/// A whole request that would be served if it were read as one. It stands behind each bad request.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";

fn service(url: &str) -> String {
    format!(
        "services:\n  - name: agent\n    outlier: {{consecutive_failures: 0}}\n    \
         versions: [{{name: v, endpoints: [\"{url}\"]}}]\n"
    )
}

async fn proxy_before(backend: &Backend) -> Proxy {
    start_proxy(&service(backend.url())).await
}

/// A POST with these fields and a body behind them.
fn with(fields: &str, body: &str) -> Vec<u8> {
    format!("POST /x HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}").into_bytes()
}

/// A head of this start line, as far as the empty line, with a Host.
fn line(start: &str) -> Vec<u8> {
    format!("{start}\r\nHost: a\r\n\r\n").into_bytes()
}

fn bad_heads() -> Vec<(&'static str, Vec<u8>, Refusal)> {
    const CHUNKED: &str = "Transfer-Encoding: chunked\r\n";
    const EMPTY: &str = "0\r\n\r\n";
    let bad = |name, bytes| (name, bytes, Refusal::BadRequest);
    let large = |name, bytes| (name, bytes, Refusal::HeaderTooLarge);
    let host = |fields: &str| format!("GET / HTTP/1.1\r\n{fields}\r\n").into_bytes();
    vec![
        // How long the body is.
        bad("Content-Length with Transfer-Encoding", with(&format!("Content-Length: 5\r\n{CHUNKED}"), EMPTY)),
        bad("Transfer-Encoding with Content-Length", with(&format!("{CHUNKED}Content-Length: 0\r\n"), EMPTY)),
        bad("two Content-Length, different", with("Content-Length: 1\r\nContent-Length: 2\r\n", "xx")),
        bad("two Content-Length, equal", with("Content-Length: 1\r\ncontent-length: 1\r\n", "x")),
        bad("Content-Length as a list", with("Content-Length: 1, 1\r\n", "x")),
        bad("Content-Length with a plus", with("Content-Length: +1\r\n", "x")),
        bad("Content-Length with a minus", with("Content-Length: -1\r\n", "x")),
        bad("Content-Length with 0x", with("Content-Length: 0x1\r\n", "x")),
        bad("Content-Length with a fraction", with("Content-Length: 1.0\r\n", "x")),
        bad("Content-Length in quotes", with("Content-Length: \"1\"\r\n", "x")),
        bad("Content-Length with an underscore", with("Content-Length: 1_0\r\n", "x")),
        bad("Content-Length with a space inside", with("Content-Length: 1 0\r\n", "x")),
        bad("Content-Length without a number", with("Content-Length:\r\n", "")),
        bad("Content-Length past 64 bits", with("Content-Length: 18446744073709551617\r\n", "x")),
        bad("Content-Length after a vertical tab", with("Content-Length: \x0b1\r\n", "x")),
        bad("doubled Transfer-Encoding", with(&format!("{CHUNKED}{CHUNKED}"), EMPTY)),
        bad("doubled chunked in one", with("Transfer-Encoding: chunked, chunked\r\n", EMPTY)),
        bad("unknown Transfer-Encoding", with("Transfer-Encoding: xchunked\r\n", EMPTY)),
        bad("Transfer-Encoding: identity", with("Transfer-Encoding: identity\r\n", EMPTY)),
        bad("Transfer-Encoding: gzip, chunked", with("Transfer-Encoding: gzip, chunked\r\n", EMPTY)),
        bad("Transfer-Encoding: chunked, identity", with("Transfer-Encoding: chunked, identity\r\n", EMPTY)),
        bad("Transfer-Encoding with a parameter", with("Transfer-Encoding: chunked;q=1\r\n", EMPTY)),
        bad("Transfer-Encoding in quotes", with("Transfer-Encoding: \"chunked\"\r\n", EMPTY)),
        bad("Transfer-Encoding with a comma", with("Transfer-Encoding: ,chunked\r\n", EMPTY)),
        bad("Transfer-Encoding without a value", with("Transfer-Encoding:\r\n", EMPTY)),
        bad("Transfer-Encoding after a vertical tab", with("Transfer-Encoding: \x0bchunked\r\n", EMPTY)),
        bad(
            "Transfer-Encoding in HTTP/1.0",
            format!("POST / HTTP/1.0\r\nHost: a\r\n{CHUNKED}\r\n{EMPTY}").into_bytes(),
        ),
        // For whom it is.
        bad("no Host", host("")),
        bad("two Host, equal", host("Host: a\r\nHost: a\r\n")),
        bad("two Host, different", host("Host: a\r\nhost: b\r\n")),
        bad("empty Host", host("Host:\r\n")),
        bad("Host with a path", host("Host: a/b\r\n")),
        bad("Host with a user", host("Host: u@a\r\n")),
        bad("Host with a space", host("Host: a b\r\n")),
        bad("Host as a list", host("Host: a, b\r\n")),
        bad("Host with a bad port", host("Host: a:1x\r\n")),
        bad("absolute form that contradicts Host", line("GET http://b/ HTTP/1.1")),
        bad("absolute form with another port", line("GET http://a:81/ HTTP/1.1")),
        bad("absolute form with a user", line("GET http://u@a/ HTTP/1.1")),
        bad("absolute form without a host", line("GET http:///x HTTP/1.1")),
        bad("absolute form of another scheme", line("GET ftp://a/ HTTP/1.1")),
        bad("CONNECT", b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n".to_vec()),
        bad("Connection that names Host", host("Host: a\r\nConnection: host\r\n")),
        bad("Connection that names Content-Length", with("Content-Length: 1\r\nConnection: content-length\r\n", "x")),
        bad(
            "Connection that names Transfer-Encoding",
            with(&format!("{CHUNKED}Connection: Transfer-Encoding\r\n"), EMPTY),
        ),
        // Lines and bytes.
        bad("folded line, space", with("X-A: 1\r\n 2\r\n", "")),
        bad("folded line, tab", with("X-A: 1\r\n\t2\r\n", "")),
        bad("folded first line", host(" Host: a\r\n")),
        bad("space before the colon", with("X-A : 1\r\n", "")),
        bad("tab before the colon", with("X-A\t: 1\r\n", "")),
        bad("space before the colon of a length", with("Content-Length : 1\r\n", "x")),
        bad("field without a colon", with("X-A\r\n", "")),
        bad("field without a name", with(": 1\r\n", "")),
        bad("field name that is no token", with("X(A): 1\r\n", "")),
        bad("field name that is not ASCII", with("X-\u{e4}: 1\r\n", "")),
        bad("bare LF between fields", with("X-A: 1\nX-B: 2\r\n", "")),
        bad("bare LF everywhere", b"GET / HTTP/1.1\nHost: a\n\n".to_vec()),
        bad("bare LF at the end", b"GET / HTTP/1.1\r\nHost: a\r\n\n".to_vec()),
        bad("bare CR in a value", with("X-A: 1\r2\r\n", "")),
        bad("bare CR in the request line", line("GET /\rx HTTP/1.1")),
        bad("two CRs before the LF", b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n".to_vec()),
        bad("NUL in a value", with("X-A: 1\x002\r\n", "")),
        bad("NUL in a name", with("X\0A: 1\r\n", "")),
        bad("NUL in the target", line("GET /\0 HTTP/1.1")),
        bad("escape byte in a value", with("X-A: \x1b\r\n", "")),
        bad("delete byte in a value", with("X-A: \x7f\r\n", "")),
        // The target.
        bad("control byte in the target", line("GET /\x01 HTTP/1.1")),
        bad("tab in the target", line("GET /a\tb HTTP/1.1")),
        bad("delete byte in the target", line("GET /\x7f HTTP/1.1")),
        bad("space in the target", line("GET /a b HTTP/1.1")),
        bad("two spaces before the target", line("GET  / HTTP/1.1")),
        bad("two spaces before the version", line("GET /  HTTP/1.1")),
        bad("space in the query", line("GET /?a b HTTP/1.1")),
        bad("fragment in the target", line("GET /#x HTTP/1.1")),
        bad("byte past ASCII in the target", line("GET /\u{e4} HTTP/1.1")),
        bad("encoded NUL in the path", line("GET /%00 HTTP/1.1")),
        bad("percent sign without digits", line("GET /%zz HTTP/1.1")),
        bad("backslash in the path", line("GET /\\..\\x HTTP/1.1")),
        bad("target without a slash", line("GET x HTTP/1.1")),
        bad("asterisk for GET", line("GET * HTTP/1.1")),
        // The request line.
        bad("no version", line("GET /")),
        bad("HTTP/0.9", b"GET /\r\n\r\n".to_vec()),
        bad("HTTP/1.2", line("GET / HTTP/1.2")),
        bad("HTTP/2.0", line("GET / HTTP/2.0")),
        bad("lower-case version", line("GET / http/1.1")),
        bad("space after the version", line("GET / HTTP/1.1 ")),
        bad("space before the method", line(" GET / HTTP/1.1")),
        bad("method that is no token", line("G{T / HTTP/1.1")),
        bad("tab instead of a space", line("GET\t/\tHTTP/1.1")),
        bad("two empty lines before the request", b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()),
        bad("no HTTP at all", b"hello there\r\n\r\n".to_vec()),
        bad("a TLS handshake", b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n".to_vec()),
        // Bounds.
        large("one field too large", with(&format!("X-A: {}\r\n", "a".repeat(5000)), "")),
        large("target too large", line(&format!("GET /{} HTTP/1.1", "a".repeat(5000)))),
        large("head without an end", format!("GET / HTTP/1.1\r\nX-A: {}", "a".repeat(5000)).into_bytes()),
        large("too many fields", with(&"X-A: 1\r\n".repeat(40), "")),
    ]
}

const LIMITS: &str =
    "listeners: [{address: \"127.0.0.1:0\", limits: {max_header_bytes: 4KiB, max_headers: 32, header_timeout: 60s}}]\n";

#[tokio::test]
async fn every_bad_head_is_refused_and_nothing_of_it_reaches_the_endpoint() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&format!("{LIMITS}{}", service(backend.url()))).await;
    for (name, bytes, refusal) in bad_heads() {
        let mut client = proxy.connect().await;
        // In one write, so that what follows is there when the refusal is made.
        let _ = client.try_send([&bytes, SMUGGLED.as_bytes()].concat()).await;
        let status = refused(&mut client, name, refusal).await;
        println!("{name:<45} -> {status} {}, closed", refusal.code());
    }
    assert_eq!(backend.connections(), 0, "nothing of all this reached the endpoint");
    // The proxy has taken no harm, and the way to the endpoint was open all the time.
    assert_eq!(support::get(proxy.address, "/", "").await.status(), 200);
}

/// Reads the refusal and the end of the connection.
async fn refused(client: &mut RawClient, name: &str, refusal: Refusal) -> u16 {
    let answer = client.read_response().await;
    assert_eq!(
        (answer.status(), answer.code().as_deref()),
        (refusal.status(), Some(refusal.code())),
        "{name}: {answer:?}"
    );
    assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{name}");
    assert_eq!(answer.header("longhaul-affinity"), Some("none"), "{name}");
    assert!(answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")), "{name}");
    assert!(answer.header("proxy-status").is_some_and(|value| value.starts_with("longhaul")), "{name}");
    let problem = answer.json();
    assert!(problem["type"].is_string() && problem["title"].is_string() && problem["detail"].is_string(), "{name}");
    assert_eq!(problem["status"], refusal.status(), "{name}");
    let rest = client.closed().await;
    assert!(rest.is_empty(), "{name}: after the refusal came {:?}", String::from_utf8_lossy(&rest));
    answer.status()
}

#[tokio::test]
async fn a_bad_head_is_refused_wherever_the_network_splits_it() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&format!("{LIMITS}{}", service(backend.url()))).await;
    for (name, bytes, refusal) in bad_heads().into_iter().filter(|(_, bytes, _)| bytes.len() < 100) {
        let mut client = proxy.connect().await;
        for byte in bytes.iter().chain(SMUGGLED.as_bytes()) {
            // The refusal may come before the last byte.
            if client.try_send([*byte]).await.is_err() {
                break;
            }
        }
        refused(&mut client, name, refusal).await;
    }
    assert_eq!(backend.connections(), 0);
}

/// Bodies in bad chunks, and what is wrong with them.
fn bad_chunks() -> Vec<(&'static str, String)> {
    let row = |name, chunks: &str| (name, chunks.to_owned());
    vec![
        row("chunk size past 64 bits", "fffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
        row("chunk size that wraps around", "10000000000000003\r\nabc\r\n0\r\n\r\n"),
        row("chunk size with 0x", "0x3\r\nabc\r\n0\r\n\r\n"),
        row("chunk size with a plus", "+3\r\nabc\r\n0\r\n\r\n"),
        row("chunk size with a minus", "-3\r\nabc\r\n0\r\n\r\n"),
        row("space before a chunk size", " 3\r\nabc\r\n0\r\n\r\n"),
        row("space after a chunk size", "3 \r\nabc\r\n0\r\n\r\n"),
        row("chunk size that is not hexadecimal", "3g\r\nabc\r\n0\r\n\r\n"),
        row("empty chunk size", "\r\nabc\r\n0\r\n\r\n"),
        row("bare LF after a chunk size", "3\nabc\r\n0\r\n\r\n"),
        row("bare CR after a chunk size", "3\rabc\r\n0\r\n\r\n"),
        row("control byte in an extension", "3;a=\x01\r\nabc\r\n0\r\n\r\n"),
        row("NUL in an extension", "3;a=\0\r\nabc\r\n0\r\n\r\n"),
        row("bare LF in an extension", "3;a\nabc\r\n0\r\n\r\n"),
        row("extension without end", &format!("3;{}", "a".repeat(64 * 1024))),
        row("chunk longer than its size", "3\r\nabcd\r\n0\r\n\r\n"),
        row("chunk shorter than its size", "3\r\nab\r\n0\r\n\r\n"),
        row("bare LF after a chunk", "3\r\nabc\n0\r\n\r\n"),
        row("no line end after a chunk", "3\r\nabc0\r\n\r\n"),
        row("bare LF after the last chunk", "0\n\n"),
        row("folded trailer", "0\r\nX-A: 1\r\n 2\r\n\r\n"),
        row("trailer without a colon", "0\r\nX-A\r\n\r\n"),
        row("space before a trailer's colon", "0\r\nX-A : 1\r\n\r\n"),
        row("bare LF in the trailers", "0\r\nX-A: 1\n\r\n"),
        row("NUL in a trailer", "0\r\nX-A: \0\r\n\r\n"),
        row("trailers without end", &format!("0\r\nX-A: {}\r\n", "a".repeat(64 * 1024))),
    ]
}

#[tokio::test]
async fn bad_chunks_are_refused_and_what_follows_is_no_request() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    for (name, chunks) in bad_chunks() {
        let head = "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        let before = backend.request_count();
        let mut client = proxy.connect().await;
        let _ = client.try_send(format!("{head}{chunks}{SMUGGLED}")).await;
        let status = refused(&mut client, name, Refusal::BadRequest).await;
        println!("{name:<45} -> {status} bad_request, closed");
        if chunks.len() < 1024 {
            assert_eq!(backend.request_count(), before, "{name}: not even the head went on");
        }
        eventually("nothing of it is left", || backend.open_connections() == 0).await;

        // The same behind a good chunk that the endpoint has already: its request never ends as a whole one.
        let mut client = proxy.connect().await;
        client.send(format!("{head}5\r\nhello\r\n")).await;
        eventually("the first chunk arrives", || {
            backend.in_flight() == 1 && backend.requests().last().is_some_and(|request| request.body == b"hello")
        })
        .await;
        let _ = client.try_send(format!("{chunks}{SMUGGLED}")).await;
        refused(&mut client, name, Refusal::BadRequest).await;
        eventually("the endpoint's connection is closed", || backend.in_flight() == 0).await;
    }
    for request in backend.requests() {
        assert_eq!(request.target, "/x");
        assert!(!request.body_complete, "{request:?}");
    }
}

/// Answers that can't be read in one way only.
fn bad_answers() -> Vec<(&'static str, Vec<u8>)> {
    let ok = |fields: &str, body: &str| format!("HTTP/1.1 200 OK\r\n{fields}\r\n{body}").into_bytes();
    let status = |line: &str| format!("{line}\r\nContent-Length: 2\r\n\r\nhi").into_bytes();
    const CHUNKED: &str = "Transfer-Encoding: chunked\r\n";
    vec![
        ("Content-Length with Transfer-Encoding", ok(&format!("Content-Length: 2\r\n{CHUNKED}"), "0\r\n\r\n")),
        ("two Content-Length", ok("Content-Length: 2\r\nContent-Length: 3\r\n", "hi")),
        ("two equal Content-Length", ok("Content-Length: 2\r\nContent-Length: 2\r\n", "hi")),
        ("Content-Length as a list", ok("Content-Length: 2, 2\r\n", "hi")),
        ("signed Content-Length", ok("Content-Length: +2\r\n", "hi")),
        ("negative Content-Length", ok("Content-Length: -2\r\n", "hi")),
        ("hexadecimal Content-Length", ok("Content-Length: 0x2\r\n", "hi")),
        ("Content-Length past 64 bits", ok("Content-Length: 18446744073709551618\r\n", "hi")),
        ("doubled Transfer-Encoding", ok(&format!("{CHUNKED}{CHUNKED}"), "0\r\n\r\n")),
        ("unknown Transfer-Encoding", ok("Transfer-Encoding: gzip\r\n", "0\r\n\r\n")),
        ("Transfer-Encoding in HTTP/1.0", format!("HTTP/1.0 200 OK\r\n{CHUNKED}\r\n0\r\n\r\n").into_bytes()),
        ("folded line", ok("X-A: 1\r\n 2\r\nContent-Length: 0\r\n", "")),
        ("space before the colon", ok("X-A : 1\r\nContent-Length: 0\r\n", "")),
        ("field without a colon", ok("X-A\r\nContent-Length: 0\r\n", "")),
        ("field name with a space", ok("X A: 1\r\nContent-Length: 0\r\n", "")),
        ("bare LF between fields", ok("X-A: 1\nContent-Length: 0\r\n", "")),
        ("bare LF everywhere", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n".to_vec()),
        ("bare CR in a value", ok("X-A: 1\r2\r\nContent-Length: 0\r\n", "")),
        ("NUL in a value", ok("X-A: \0\r\nContent-Length: 0\r\n", "")),
        ("control byte in a value", ok("X-A: \x1b\r\nContent-Length: 0\r\n", "")),
        ("control byte in the reason", status("HTTP/1.1 200 O\x01K")),
        ("status of two digits", status("HTTP/1.1 20 OK")),
        ("status of four digits", status("HTTP/1.1 2000 OK")),
        ("status below 100", status("HTTP/1.1 099 OK")),
        ("HTTP/2.0", status("HTTP/2.0 200 OK")),
        ("HTTP/0.9", b"<html>hi</html>\r\n\r\n".to_vec()),
        ("another protocol", b"220 mail.example ESMTP ready\r\n\r\n".to_vec()),
        (
            "101 that nobody asked for",
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n".to_vec(),
        ),
        ("101 without Upgrade", b"HTTP/1.1 101 Switching Protocols\r\n\r\n".to_vec()),
        ("head too large", ok(&format!("X-A: {}\r\n", "a".repeat(300 * 1024)), "")),
        ("too many fields", ok(&"X-A: 1\r\n".repeat(400), "")),
        ("head without an end", b"HTTP/1.1 200 OK\r\nContent-Le".to_vec()),
        ("nothing at all", Vec::new()),
        ("interim answers without end", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n".repeat(100)),
    ]
}

#[tokio::test]
async fn every_bad_answer_is_a_502_and_nothing_of_it_is_passed_on() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    for (name, bytes) in bad_answers() {
        backend.next(Script::raw(&bytes));
        let mut client = proxy.connect().await;
        client.send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
        let answer = client.read_response().await;
        assert_eq!((answer.status(), answer.code().as_deref()), (502, Some("upstream_reset")), "{name}: {answer:?}");
        assert!(answer.header("x-a").is_none() && answer.header("proxy-status").is_some(), "{name}");
        // The client did nothing wrong: its connection goes on.
        client.send("POST /next HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
        assert_eq!(client.read_response().await.text(), "ok", "{name}");
        println!("{name:<45} -> 502 upstream_reset");
    }
    assert_eq!(backend.requests().iter().filter(|request| request.target == "/x").count(), bad_answers().len());
}

#[tokio::test]
async fn bad_chunks_of_an_endpoint_are_seen_as_a_cut() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    for (name, chunks) in bad_chunks() {
        // Behind a good chunk that the client has already.
        let gate = Gate::new();
        backend.next(Script(vec![
            Step::ReadBody,
            Step::Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n".to_vec()),
            Step::Wait(gate.clone()),
            Step::Raw(chunks.clone().into_bytes()),
            Step::Close,
        ]));
        let mut client = proxy.connect().await;
        client.send(format!("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi{SMUGGLED}")).await;
        assert_eq!(client.read_head().await.status, 200, "{name}");
        assert_eq!(client.read_chunk().await.as_deref(), Some(&b"hello"[..]), "{name}");
        gate.open();
        let rest = client.closed().await;
        assert!(!rest.ends_with(b"0\r\n\r\n"), "{name}: {:?}", String::from_utf8_lossy(&rest));
        println!("{name:<45} -> cut");

        // In one piece with the head: nothing has gone out yet, so it can be told.
        backend
            .next(Script::raw([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunks.as_bytes()].concat()));
        let mut client = proxy.connect().await;
        client.send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
        let answer = client.read_response().await;
        let told = answer.status() == 502 && answer.code().as_deref() == Some("upstream_reset");
        assert!(told || answer.truncated, "{name}: {answer:?}");
    }
    assert!(backend.requests().iter().all(|request| request.target == "/x"), "a cut is the end of the connection");
}

#[tokio::test]
async fn an_answer_that_ends_too_early_is_seen_as_a_cut() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    for (name, bytes) in [
        ("shorter than its length", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"),
        ("no body at all", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"),
        ("no last chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
        ("within a chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel"),
        ("within the trailers", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-A: 1\r\n"),
        ("chunks without a byte", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ] {
        backend.next(Script::raw(bytes));
        let mut client = proxy.connect().await;
        client.send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
        let answer = client.read_response().await;
        // Whether the head had gone out already decides how it is told.
        let told = answer.status() == 502 && answer.code().as_deref() == Some("upstream_reset");
        assert!(told || (answer.status() == 200 && answer.truncated), "{name}: {answer:?}");
        if !told {
            assert!(!client.closed().await.ends_with(b"0\r\n\r\n"), "{name}");
        }
    }
}

#[tokio::test]
async fn bytes_behind_an_answer_are_never_taken_for_the_next() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    let forged = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged";
    for answer in [
        format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi{forged}"),
        format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n{forged}"),
        format!("HTTP/1.1 204 No Content\r\n\r\n{forged}"),
        format!("HTTP/1.1 204 No Content\r\nContent-Length: {}\r\n\r\n{forged}", forged.len()),
        format!("HTTP/1.1 304 Not Modified\r\nContent-Length: {}\r\n\r\n{forged}", forged.len()),
    ] {
        backend.next(Script(vec![Step::ReadBody, Step::Raw(answer.clone().into_bytes())]));
        let mut client = proxy.connect().await;
        client.send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
        assert!(!client.read_response().await.text().contains("forged"), "{answer}");
        for _ in 0..3 {
            client.send("POST /y HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
            assert_eq!(client.read_response().await.text(), "ok", "{answer}");
        }
    }
}

#[tokio::test]
async fn a_body_that_looks_like_a_request_stays_a_body() {
    let backend = Backend::start().await;
    backend.each(|request| Script::ok(&request.target));
    let proxy = proxy_before(&backend).await;
    let mut client = proxy.connect().await;
    let length = SMUGGLED.len();
    client
        .send(format!(
            "POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}\
             GET /2 HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}\
             POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{length:x}\r\n{SMUGGLED}\r\n0\r\n\r\n\
             DELETE /4 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0{length:x};x=y\r\n{SMUGGLED}\r\n000\r\n\r\n"
        ))
        .await;
    for target in ["/1", "/2", "/3", "/4"] {
        assert_eq!(client.read_response().await.text(), target);
    }
    let targets: Vec<_> = backend.requests().into_iter().map(|request| request.target).collect();
    assert_eq!(targets, ["/1", "/2", "/3", "/4"]);
    assert!(backend.requests().iter().all(|request| request.body == SMUGGLED.as_bytes()));
}

#[tokio::test]
async fn a_good_request_is_read_alike_wherever_the_network_splits_it() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    let request = b"POST /x?y HTTP/1.1\r\nHost: a\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\n\r\n\
                    3;e=1\r\nabc\r\n2\r\nde\r\n0\r\nX-Sum: 5\r\n\r\n";
    let mut client = proxy.connect().await;
    for split in 0..=request.len() {
        client.send(&request[..split]).await;
        tokio::task::yield_now().await;
        client.send(&request[split..]).await;
        assert_eq!(client.read_response().await.text(), "ok", "split at {split}");
    }
    for byte in request {
        client.send([*byte]).await;
    }
    assert_eq!(client.read_response().await.text(), "ok", "every byte for itself");
    for request in backend.requests() {
        assert_eq!((request.target.as_str(), request.body.as_slice()), ("/x?y", &b"abcde"[..]));
        assert_eq!(request.trailers, [("X-Sum".to_owned(), "5".to_owned())]);
    }
}

#[tokio::test]
async fn an_answer_is_read_alike_wherever_the_network_splits_it() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    let answer = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\n\r\n3;e=1\r\nabc\r\n02\r\nde\r\n0\r\nX-Sum: 5\r\n\r\n";
    let mut client = proxy.connect().await;
    for split in 0..=answer.len() {
        let parts = [Step::Raw(answer[..split].to_vec()), Step::Raw(answer[split..].to_vec())];
        backend.next(Script([Step::ReadBody].into_iter().chain(parts).collect()));
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
        let got = client.read_response().await;
        assert_eq!(
            (got.status(), got.text().as_str(), got.header("x-a")),
            (200, "abcde", Some("1")),
            "split at {split}"
        );
        assert_eq!(got.trailers, [("X-Sum".to_owned(), "5".to_owned())], "split at {split}");
    }
    assert_eq!(backend.connections(), 1, "each answer was read to its end");
}

#[tokio::test]
async fn nothing_follows_an_upgrade_before_its_101() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let proxy = start_proxy(&service(&url)).await;
    let mut client = proxy.connect().await;
    client
        .send(format!("GET /up HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: chat\r\n\r\nearly {SMUGGLED}"))
        .await;
    let (mut endpoint, _) = within("the request arrives", listener.accept()).await.expect("a connection");
    let mut head = Vec::new();
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        let mut bytes = [0; 1024];
        let count = within("the head arrives", endpoint.read(&mut bytes)).await.expect("open");
        assert!(count > 0, "closed within the head");
        head.extend_from_slice(&bytes[..count]);
    }
    assert!(head.ends_with(b"\r\n\r\n"), "nothing came with the head");
    // An interim answer makes its way through the exchange; meanwhile the early bytes had every chance to pass.
    endpoint.write_all(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n").await.expect("open");
    assert_eq!(client.read_head().await.status, 103);
    let mut bytes = [0; 16];
    let early = endpoint.try_read(&mut bytes);
    assert!(early.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "nothing came before the 101");
    endpoint
        .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: chat\r\n\r\nwelcome")
        .await
        .expect("open");
    assert_eq!(client.read_head().await.status, 101);
    assert_eq!(client.read_exact(7).await, b"welcome");
    let mut early = vec![0; 6 + SMUGGLED.len()];
    within("the early bytes pass", endpoint.read_exact(&mut early)).await.expect("open");
    assert_eq!(early, format!("early {SMUGGLED}").into_bytes());
}

#[tokio::test]
async fn a_101_before_the_request_has_ended_is_refused() {
    let backend = Backend::start().await;
    backend.each(|_| Script::tunnel("chat"));
    let proxy = proxy_before(&backend).await;
    let mut client = proxy.connect().await;
    client
        .send("POST /up HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: chat\r\nContent-Length: 10\r\n\r\nhalf")
        .await;
    let answer = client.read_response().await;
    assert_eq!((answer.status(), answer.code().as_deref()), (502, Some("upstream_reset")));
    assert!(client.closed().await.is_empty());
}

#[tokio::test]
async fn bytes_behind_a_refused_upgrade_close_the_connection() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    for behind in [SMUGGLED, "\x01\x02frames"] {
        let mut client = proxy.connect().await;
        client
            .send(format!("GET /up HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: chat\r\n\r\n{behind}"))
            .await;
        assert_eq!(client.read_response().await.text(), "ok", "the endpoint did not want to");
        assert!(client.closed().await.is_empty(), "closed, and no second answer");
    }
    // Without such bytes the connection goes on.
    let mut client = proxy.connect().await;
    client.send("GET /up HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: chat\r\n\r\n").await;
    assert_eq!(client.read_response().await.text(), "ok");
    client.send(SMUGGLED.replace("smuggled", "next")).await;
    assert_eq!(client.read_response().await.text(), "ok");
    assert!(backend.requests().iter().all(|request| request.target != "/smuggled"));
}

#[tokio::test]
async fn a_head_that_takes_too_long_closes_the_connection() {
    let backend = Backend::start().await;
    let limits = "listeners: [{address: \"127.0.0.1:0\", limits: {header_timeout: 300ms}}]\n";
    let proxy = start_proxy(&format!("{limits}{}", service(backend.url()))).await;
    let began = tokio::time::Instant::now();
    let mut silent = proxy.connect().await;
    let mut begun = proxy.connect().await;
    begun.send("GET / HTTP/1.1\r\nHo").await;
    assert!(begun.closed().await.is_empty());
    assert!(silent.closed().await.is_empty());
    assert!(began.elapsed() >= Duration::from_millis(250), "not before its time");
    // Every byte is progress, and yet the head has its time and no more.
    let mut slow = proxy.connect().await;
    let mut bytes = b"GET / HTTP/1.1\r\nX-Slow: ".iter().chain(std::iter::repeat(&b'a'));
    let began = tokio::time::Instant::now();
    let closed = async {
        let mut pace = tokio::time::interval(Duration::from_millis(20));
        while slow.try_send([*bytes.next().expect("endless")]).await.is_ok() {
            pace.tick().await;
        }
    };
    within("the slow head is cut off", closed).await;
    assert!(began.elapsed() >= Duration::from_millis(250), "not before its time");
    assert_eq!(backend.connections(), 0);
}

#[tokio::test]
async fn an_endpoint_never_sees_two_lengths_or_a_folded_line() {
    // What is sent on is written by the proxy: whatever case, order and space the client chose, there is one form.
    let backend = Backend::start().await;
    backend.each(|_| Script(vec![Step::ReadBody, Step::Head { status: 200, headers: vec![], body: Body::Length(0) }]));
    let proxy = proxy_before(&backend).await;
    let answer = support::fetch(
        proxy.address,
        "POST http://A:80/a/%2e%2e/%7eb?q HTTP/1.1\r\nhOST:\t a \r\ncontent-LENGTH: 0002 \r\nX-One:a\r\n\r\nhi",
    )
    .await;
    assert_eq!(answer.status(), 200);
    let request = backend.request(1).await;
    let head = String::from_utf8(request.raw_head.clone()).expect("ASCII");
    assert!(head.starts_with("POST /~b?q HTTP/1.1\r\nHost: "), "{head}");
    assert!(head.contains("\r\nContent-Length: 2\r\n") && head.contains("\r\nX-One: a\r\n"), "{head}");
    assert_eq!(request.body, b"hi");
}

#[tokio::test]
async fn nothing_follows_a_connect_of_http2_before_the_endpoint_has_switched() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    let client = Http2Client::connect(proxy.address).await;
    let connect = || {
        let mut request = http2_request("CONNECT", proxy.address, "/ws");
        request.headers_mut().insert("sec-websocket-version", "13".parse().expect("a value"));
        request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
        request
    };
    // Refused: what the client has sent already is no second request on the endpoint's connection.
    let gate = Gate::new();
    backend.next(Script::answer(403, &[], "no").after(&gate));
    let mut stream = client.open_extended(connect()).await;
    stream.send(SMUGGLED.as_bytes(), false).await;
    backend.request(1).await;
    gate.open();
    assert_eq!(stream.response().await.0.status, 403);
    assert_eq!(support::get(proxy.address, "/next", "").await.text(), "ok");
    // Accepted: the early bytes are the tunnel's first.
    backend.next(Script::tunnel("websocket"));
    let mut stream = client.open_extended(connect()).await;
    stream.send(b"early", false).await;
    let (head, mut body) = stream.response().await;
    assert_eq!(head.status, 200);
    assert_eq!(within("the echo", body.data()).await.expect("data").expect("data"), "early".as_bytes());
    let targets: Vec<_> = backend.requests().into_iter().map(|request| request.target).collect();
    assert_eq!(targets, ["/ws", "/next", "/ws"]);
}
