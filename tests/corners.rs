//! Corners: bodies, retries and principals where two capabilities meet, as somebody found who tried to break them.

mod support;

use bytes::Bytes;
use support::{
    Backend, Gate, Http2Client, Response, Script, Step, eventually, fetch, http2_request, post, start_proxy,
};
use tokio::net::TcpListener;

/// A service of these endpoints in one version; `more` are further keys of it, each line indented by four.
fn service(urls: &[&str], version: &str, more: &str) -> String {
    format!(
        "services:\n  - name: support\n    versions: [{{name: stable, endpoints: [{}]{version}}}]\n{more}",
        urls.join(", ")
    )
}

const BY_JSON: &str = "    session: {key: [{json: /thread}]}\n";

fn affinity(answer: &Response) -> &str {
    answer.header("longhaul-affinity").unwrap_or_default()
}

#[tokio::test]
async fn an_empty_chunked_body_ends_where_a_key_was_looked_for_in_it() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(&[backend.url()], "", BY_JSON)).await;
    for trailers in ["", "X-Up: 7\r\n"] {
        let request = format!(
            "POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\nTransfer-Encoding: chunked\r\n\r\n\
             0\r\n{trailers}\r\n"
        );
        let answer = fetch(proxy.address, request).await;
        assert_eq!((answer.status(), answer.text().as_str()), (200, "ok"), "{trailers:?}");
        let request = backend.requests().pop().expect("a request");
        assert!(request.body_complete);
        assert_eq!(request.trailers.len(), trailers.lines().count());
    }
}

#[tokio::test]
async fn trailers_of_a_request_that_was_answered_here_are_not_the_next_ones() {
    let backend = Backend::start_http2().await;
    let full = "    session: {key: [{json: /thread}]}\n    runs: {max_per_endpoint: 1}\n";
    let proxy = start_proxy(&service(&[backend.url()], ", http: 2", full)).await;
    let gate = Gate::new();
    backend.next(Script::ok("first").after(&gate));
    let mut first = proxy.connect().await;
    first.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
    backend.request(1).await;

    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Secret: 7\r\n\r\n").await;
    assert_eq!(client.read_response().await.status(), 429);
    gate.open();
    assert_eq!(first.read_response().await.text(), "first");
    eventually("a free slot", || proxy.outstanding() == 0).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
    assert_eq!(client.read_response().await.status(), 200);
    assert_eq!(backend.requests()[1].trailers, []);
}

#[tokio::test]
async fn the_cookie_of_one_principal_is_none_for_another() {
    let mut backends = Vec::new();
    for _ in 0..4 {
        backends.push(Backend::start().await);
    }
    let urls: Vec<&str> = backends.iter().map(Backend::url).collect();
    let scoped = "    session: {cookie: {name: lh}, scope: [{header: authorization}]}\n";
    let proxy = start_proxy(&service(&urls, "", scoped)).await;
    let first = post(proxy.address, "/run", "Authorization: Bearer anna\r\n", "hi").await;
    let cookie = first.header("set-cookie").and_then(|field| field.split(';').next()).expect("a cookie").to_owned();
    let with_cookie = |user: &str| format!("{user}Cookie: {cookie}\r\n");
    for (user, expected) in [
        ("Authorization: Bearer anna\r\n", "hit"),
        ("Authorization: Bearer mallory\r\n", "new"),
        ("", "new"),
        ("Authorization: Bearer anna\r\n", "hit"),
    ] {
        let answer = post(proxy.address, "/run", &with_cookie(user), "hi").await;
        assert_eq!((affinity(&answer), answer.header("set-cookie").is_some()), (expected, expected == "new"), "{user}");
    }
}

#[tokio::test]
async fn principals_with_long_or_strange_credentials_are_not_one() {
    let backend = Backend::start().await;
    let scoped = "    session: {key: [{header: x-session-id}], scope: [{header: authorization}]}\n";
    let proxy = start_proxy(&service(&[backend.url()], "", scoped)).await;
    let long = "t".repeat(4000);
    for (number, token) in ["", "a", &format!("{long}a"), &format!("{long}b"), "\u{fc}"].iter().enumerate() {
        // The last is ISO 8859-1, no UTF-8.
        let line = format!("POST / HTTP/1.1\r\nHost: a\r\nX-Session-Id: shared\r\nAuthorization: {token}\r\n");
        let mut wire: Vec<u8> = line.chars().map(|character| character as u8).collect();
        wire.extend_from_slice(b"Content-Length: 2\r\n\r\nhi");
        for expected in ["new", "hit"] {
            assert_eq!(affinity(&fetch(proxy.address, &wire).await), expected, "{number}");
        }
    }
}

/// Refuses the first stream once a part of its body is there, takes the second whole, and gives its body back.
async fn refuse_one_and_take_the_next(listener: TcpListener) -> Vec<u8> {
    let (stream, _) = listener.accept().await.expect("a connection");
    let mut connection = h2::server::handshake(stream).await.expect("the proxy speaks HTTP/2");
    let (accepted, mut streams) = tokio::sync::mpsc::channel(4);
    tokio::spawn(async move {
        while let Some(Ok(stream)) = connection.accept().await {
            let _ = accepted.send(stream).await;
        }
    });
    {
        let (mut first, mut respond) = streams.recv().await.expect("a stream");
        // What was not released is all that the window lets through.
        let mut part = 0;
        while part < 65_535 {
            part += first.body_mut().data().await.expect("a part").expect("a part").len();
        }
        respond.send_reset(h2::Reason::REFUSED_STREAM);
    }
    let (second, mut respond) = streams.recv().await.expect("another stream");
    let mut body = second.into_body();
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.expect("data");
        body.flow_control().release_capacity(data.len()).expect("a stream");
        bytes.extend_from_slice(&data);
    }
    let mut send = respond.send_response(http::Response::new(()), false).expect("a stream");
    send.send_data(Bytes::from_static(b"taken"), true).expect("a stream");
    bytes
}

#[tokio::test]
async fn a_body_that_was_read_ahead_and_sent_in_part_is_sent_again_whole() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    let proxy = start_proxy(&service(&[&endpoint], ", http: 2", BY_JSON)).await;
    let taking = tokio::spawn(refuse_one_and_take_the_next(listener));
    let body = format!("{{\"filler\": \"{}\", \"thread\": \"anna\"}}", "x".repeat(100_000));
    let answer = post(proxy.address, "/", "Content-Type: application/json\r\n", &body).await;
    assert_eq!((answer.status(), answer.text().as_str()), (200, "taken"));
    let taken = taking.await.expect("an endpoint");
    assert_eq!(taken.len(), body.len());
    assert_eq!(taken, body.as_bytes());
}

#[tokio::test]
async fn a_reset_by_the_client_while_the_endpoint_takes_no_more_closes_the_endpoint() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(&[backend.url()], "", "")).await;
    let gate = Gate::new();
    let mut script = Script::ok("read");
    script.0.insert(0, Step::Stall(gate.clone()));
    backend.next(script);
    let client = Http2Client::connect(proxy.address).await;
    let mut upload = client.open(http2_request("POST", proxy.address, "/"), false).await;
    backend.request(1).await;
    let piece = vec![b'x'; 64 * 1024];
    let until_stuck = async {
        loop {
            upload.send(&piece, false).await;
        }
    };
    let others = async {
        for _ in 0..100 {
            assert_eq!(client.fetch(http2_request("GET", proxy.address, "/"), b"").await.text(), "ok");
        }
    };
    tokio::select! {
        () = until_stuck => {}
        () = others => {}
    }
    assert_eq!(proxy.outstanding(), 1);
    upload.reset();
    eventually("the run has ended", || proxy.outstanding() == 0).await;
}

#[tokio::test]
async fn trailers_are_sent_again_with_their_body() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(&[backend.url()], "", "")).await;
    let mut client = proxy.connect().await;
    // The one kept connection breaks when it is used again.
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_response().await.status(), 200);
    backend.next(Script(vec![Step::ReadBody, Step::Reset]));
    client.send("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Up: 7\r\n\r\n").await;
    assert_eq!(client.read_response().await.status(), 200);
    let [.., broken, again] = &backend.requests()[..] else { panic!("two attempts") };
    assert_eq!((broken.body.as_slice(), again.body.as_slice()), (&b"hi"[..], &b"hi"[..]));
    assert_eq!(again.trailers, broken.trailers);
    assert_eq!(again.trailers.len(), 1);
}

#[tokio::test]
async fn data_behind_an_answer_without_body_never_reaches_the_client() {
    for (method, status) in [("GET", 204), ("GET", 304), ("HEAD", 200)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let proxy = start_proxy(&service(&[&endpoint], ", http: 2", "")).await;
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.expect("a connection");
            let mut connection = h2::server::handshake(stream).await.expect("the proxy speaks HTTP/2");
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                let head = http::Response::builder().status(status).body(()).expect("a head");
                let mut body = respond.send_response(head, false).expect("a stream");
                let evil = Bytes::from_static(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil");
                body.send_data(evil, true).expect("a stream");
            }
        });
        let mut client = proxy.connect().await;
        client.send(format!("{method} / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")).await;
        let seen = String::from_utf8(client.read_to_end().await).expect("text");
        assert!(!seen.contains("evil"), "{method} {status}: {seen}");
    }
}

#[tokio::test]
async fn too_many_fields_are_431_in_both_versions() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(&[backend.url()], "", "")).await;
    let client = Http2Client::connect(proxy.address).await;
    for (fields, status) in [(120, 200), (140, 431)] {
        let mut request = http2_request("POST", proxy.address, "/");
        let mut lines = String::new();
        for number in 0..fields {
            let name = http::HeaderName::try_from(format!("x-{number}")).expect("a name");
            request.headers_mut().insert(name, http::HeaderValue::from_static("1"));
            lines.push_str(&format!("X-{number}: 1\r\n"));
        }
        assert_eq!(client.fetch(request, b"hi").await.status(), status);
        assert_eq!(post(proxy.address, "/", &lines, "hi").await.status(), status);
    }
    assert_eq!(backend.request_count(), 2);
}

#[tokio::test]
async fn a_head_that_is_too_long_is_answered_alike_in_both_versions() {
    let backend = Backend::start().await;
    let listener = "listeners: [{name: public, address: \"127.0.0.1:0\", limits: {max_header_bytes: 4KiB}}]\n";
    let proxy = start_proxy(&format!("{listener}{}", service(&[backend.url()], "", ""))).await;
    let client = Http2Client::connect(proxy.address).await;
    for length in [5_000, 100_000] {
        let value = "x".repeat(length);
        let mut request = http2_request("POST", proxy.address, "/");
        request.headers_mut().insert("x-long", value.parse().expect("a field value"));
        let over_http2 = client.fetch(request, b"hi").await;
        let over_http1 = post(proxy.address, "/", &format!("X-Long: {value}\r\n"), "hi").await;
        for answer in [over_http2, over_http1] {
            assert_eq!((answer.status(), answer.code().as_deref()), (431, Some("header_too_large")), "{length}");
            assert_eq!(affinity(&answer), "none");
            assert!(answer.header("proxy-status").is_some_and(|field| field.starts_with("longhaul; error=")));
        }
    }
    // The connection goes on, and a head within the limit passes.
    let mut request = http2_request("POST", proxy.address, "/");
    request.headers_mut().insert("x-long", "x".repeat(3_000).parse().expect("a field value"));
    assert_eq!(client.fetch(request, b"hi").await.status(), 200);
    proxy.metric_becomes("longhaul_requests_total", &["listener=\"public\"", "code=\"header_too_large\""], 4.0).await;
    assert_eq!(backend.request_count(), 1);
}

/// Streams of HTTP/2 that are given up anywhere: before, within and after their bodies, also with the whole connection.
#[tokio::test]
async fn counts_return_to_zero_after_resets_anywhere() {
    for version in ["", ", http: 2"] {
        let backend = if version.is_empty() { Backend::start().await } else { Backend::start_http2().await };
        backend.each(|_| Script::echo());
        let proxy = start_proxy(&service(&[backend.url()], version, BY_JSON)).await;
        let running = proxy.app.running.clone();
        for round in 0..40_usize {
            let client = Http2Client::connect(proxy.address).await;
            let mut kept = Vec::new();
            for number in 0..10 {
                let mut stream = client.open(http2_request("POST", proxy.address, "/"), false).await;
                for piece in 0..(round + number) % 5 {
                    let bytes =
                        if piece == 0 { b"{\"thread\": \"anna\", \"f\": \"".to_vec() } else { vec![b'x'; 20_000] };
                    // What comes back is not read, so that both directions come to a halt in some rounds.
                    stream.send(&bytes, false).await;
                }
                match (round * 7 + number) % 4 {
                    0 => stream.reset(),
                    1 => drop(stream),
                    2 => {
                        tokio::task::yield_now().await;
                        kept.push(stream);
                    }
                    _ => stream.send(b"\"}", true).await,
                }
            }
            if round % 3 == 0 {
                client.abort();
            }
        }
        eventually("no run is left", || proxy.outstanding() == 0).await;
        eventually("no exchange is left", || running.open_exchanges.get() == 0).await;
        eventually("none is left at the endpoint", || backend.in_flight() == 0).await;
        proxy.metric_becomes("longhaul_connections", &[], 0.0).await;
    }
}
