//! Passing: what goes through the proxy, and what of it is changed, line by line of "What passes".

mod support;

use std::time::Duration;

use support::{
    Backend, Body, Gate, Http2Client, Proxy, RawClient, Request, Response, Script, Step, eventually, fetch, get,
    http2_request, post, start_proxy, within,
};

fn service(backend: &Backend, more: &str) -> String {
    format!("services:\n  - name: agent\n{more}    versions: [{{name: v, endpoints: [\"{}\"]}}]\n", backend.url())
}

async fn proxy_before(backend: &Backend) -> Proxy {
    start_proxy(&service(backend, "")).await
}

/// Listener keys, in front of a service.
fn listening(keys: &str) -> String {
    format!("listeners: [{{address: \"127.0.0.1:0\", {keys}}}]\n")
}

fn answer(status: u16, headers: &[(&str, &str)], body: Body) -> Step {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Step::Head { status, headers, body }
}

fn raw(bytes: &str) -> Step {
    Step::Raw(bytes.as_bytes().to_vec())
}

const EMPTY_POST: &str = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";

// ---- fields ----

#[tokio::test]
async fn hop_by_hop_fields_and_nominated_ones_stay_on_their_hop() {
    let backend = Backend::start().await;
    backend.each(|_| {
        let hop = [
            ("Connection", "X-Hop, keep-alive"),
            ("x-hop", "1"),
            ("X-HOP", "2"),
            ("Keep-Alive", "timeout=5"),
            ("Proxy-Connection", "keep-alive"),
            ("Upgrade", "h2c"),
            ("TE", "trailers"),
            ("X-End", "kept"),
        ];
        Script(vec![Step::ReadBody, answer(200, &hop, Body::Length(0))])
    });
    let proxy = proxy_before(&backend).await;
    let got = get(
        proxy.address,
        "/",
        "Connection: X-Hop\r\nConnection: keep-alive, x-second\r\nX-Hop: 1\r\nx-hop: 2\r\nX-Second: 3\r\nKeep-Alive: timeout=5\r\n\
         Proxy-Connection: keep-alive\r\nUpgrade: websocket\r\nTE: gzip, trailers\r\nX-End: kept\r\n",
    )
    .await;
    let request = backend.request(1).await;
    for name in ["x-hop", "x-second", "keep-alive", "proxy-connection", "upgrade"] {
        assert_eq!(request.header(name), None, "{name} towards the endpoint");
        assert_eq!(got.header(name), None, "{name} towards the client");
    }
    // TE is a matter of each hop; that trailers are welcome is true of ours too.
    assert_eq!((request.header("te"), request.header("connection")), (Some("trailers"), Some("TE")));
    assert_eq!((got.header("te"), got.header("connection")), (None, None));
    assert_eq!((request.header("x-end"), got.header("x-end")), (Some("kept"), Some("kept")));
}

#[tokio::test]
async fn everything_else_passes_as_it_is_in_order_and_case() {
    let backend = Backend::start().await;
    backend.each(|_| {
        Script(vec![
            Step::ReadBody,
            raw("HTTP/1.1 299 Quite Fine\r\nX-Two: 2\r\nx-one: 1\r\nX-Two: 3\r\nX-Empty:\r\nX-Latin: \u{e4}\r\nServer: s\r\nDate: d\r\nContent-Length: 0\r\n\r\n"),
        ])
    });
    let proxy = proxy_before(&backend).await;
    let got = get(
        proxy.address,
        "/a;b=c/%C3%A4?q=%zz&\"<x>\"",
        "X-Two: 2\r\nx-one: 1\r\nX-Two: 3\r\nCookie: a=1; b=2\r\nAuthorization: Bearer x\r\nAccept-Encoding: gzip\r\nX-Empty:\r\n",
    )
    .await;
    assert!(got.head.raw.starts_with(b"HTTP/1.1 299 Quite Fine\r\nX-Two: 2\r\nx-one: 1\r\nX-Two: 3\r\n"), "{got:?}");
    assert_eq!((got.header("x-empty"), got.header("server"), got.header("date")), (Some(""), Some("s"), Some("d")));
    assert!(String::from_utf8(got.head.raw.clone()).expect("as sent").contains("X-Latin: \u{e4}\r\n"));
    let request = backend.request(1).await;
    assert_eq!(request.target, "/a;b=c/%C3%A4?q=%zz&\"<x>\"");
    let head = String::from_utf8(request.raw_head.clone()).expect("ASCII");
    assert!(
        head.contains("X-Two: 2\r\nx-one: 1\r\nX-Two: 3\r\nCookie: a=1; b=2\r\nAuthorization: Bearer x\r\n"),
        "{head}"
    );
    // No compression and no names of our own in Via or Server.
    assert_eq!((request.header("accept-encoding"), request.header("via")), (Some("gzip"), None));
    assert_eq!(got.header("via"), None);
}

#[tokio::test]
async fn who_the_client_is_comes_from_us_unless_the_peer_is_trusted() {
    let backend = Backend::start().await;
    let config = format!("{}{}", listening("trusted_proxies: [127.0.0.2/32]"), service(&backend, ""));
    let proxy = start_proxy(&config).await;
    let said = "GET / HTTP/1.1\r\nHost: agents.test\r\nX-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: https\r\n\
                X-Forwarded-Host: public.example\r\nForwarded: for=203.0.113.7\r\nLonghaul-Custom: 1\r\n\r\n";
    let mut stranger = proxy.connect().await;
    stranger.send(said).await;
    stranger.read_response().await;
    let request = backend.request(1).await;
    assert_eq!(all(&request, "x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(all(&request, "x-forwarded-proto"), ["http"]);
    assert_eq!(all(&request, "x-forwarded-host"), ["agents.test"]);
    assert_eq!(all(&request, "forwarded"), ["for=127.0.0.1;host=agents.test;proto=http"]);
    assert_eq!(request.header("longhaul-custom"), None);

    let mut trusted = RawClient::connect_from([127, 0, 0, 2], proxy.address).await;
    trusted.send(said).await;
    trusted.read_response().await;
    let request = backend.request(2).await;
    assert_eq!(all(&request, "x-forwarded-for"), ["203.0.113.7, 127.0.0.2"]);
    assert_eq!(all(&request, "x-forwarded-proto"), ["https"]);
    assert_eq!(all(&request, "x-forwarded-host"), ["public.example"]);
    assert_eq!(all(&request, "forwarded"), ["for=203.0.113.7, for=127.0.0.2"]);
    assert_eq!(request.header("longhaul-custom"), Some("1"));

    let mut silent = RawClient::connect_from([127, 0, 0, 2], proxy.address).await;
    silent.send("GET / HTTP/1.1\r\nHost: agents.test\r\n\r\n").await;
    silent.read_response().await;
    let request = backend.request(3).await;
    assert_eq!(all(&request, "x-forwarded-for"), ["127.0.0.2"]);
    assert_eq!(all(&request, "x-forwarded-host"), ["agents.test"]);
}

fn all<'a>(request: &'a Request, name: &str) -> Vec<&'a str> {
    let fields = request.headers.iter().filter(|(field, _)| field.eq_ignore_ascii_case(name));
    fields.map(|(_, value)| value.as_str()).collect()
}

#[tokio::test]
async fn ids_are_made_where_they_are_absent_and_kept_where_they_are_there() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    get(proxy.address, "/", "tracestate: orphan=1\r\n").await;
    get(proxy.address, "/", "").await;
    let (first, second) = (backend.request(1).await, backend.request(2).await);
    let id = first.header("x-request-id").expect("made");
    assert!(uuid::Uuid::parse_str(id).is_ok() && second.header("x-request-id") != Some(id), "{id}");
    let parent = first.header("traceparent").expect("made");
    let parts: Vec<_> = parent.split('-').map(str::len).collect();
    assert!(parts == [2, 32, 16, 2] && parent.starts_with("00-"), "{parent}");
    let kept = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    get(proxy.address, "/", &format!("X-Request-Id: mine\r\nTraceparent: {kept}\r\nTracestate: a=b\r\n")).await;
    let third = backend.request(3).await;
    assert_eq!((all(&third, "x-request-id"), all(&third, "traceparent")), (vec!["mine"], vec![kept]));
    assert_eq!(third.header("tracestate"), Some("a=b"));
}

#[tokio::test]
async fn our_own_names_are_ours_in_both_directions() {
    let backend = Backend::start().await;
    backend.each(|_| {
        Script(vec![
            Step::ReadBody,
            raw("HTTP/1.1 103 Early Hints\r\nLonghaul-Affinity: hit\r\nLink: x\r\n\r\n"),
            answer(
                200,
                &[("longhaul-affinity", "hit"), ("Longhaul-Run-Id", "forged"), ("LONGHAUL-x", "1")],
                Body::Chunked,
            ),
            Step::Trailers(vec![("longhaul-outcome".into(), "forged".into()), ("x-sum".into(), "1".into())]),
        ])
    });
    let proxy = proxy_before(&backend).await;
    let mut client = proxy.connect().await;
    client
        .send("POST / HTTP/1.1\r\nHost: a\r\nlonghaul-run-id: forged\r\nLonghaul-X: 1\r\nContent-Length: 0\r\n\r\n")
        .await;
    let hint = client.read_head().await;
    assert_eq!((hint.status, hint.header("longhaul-affinity"), hint.header("link")), (103, None, Some("x")));
    let got = client.read_response().await;
    let ours: Vec<_> =
        got.head.headers.iter().filter(|(name, _)| name.to_lowercase().starts_with("longhaul-")).collect();
    assert_eq!(ours.len(), 2, "{ours:?}");
    assert_eq!(got.header("longhaul-affinity"), Some("none"));
    let run = got.header("longhaul-run-id").expect("a POST is a run");
    assert_eq!(uuid::Uuid::parse_str(run).map(|id| id.get_version_num()), Ok(7));
    assert_eq!(got.trailers, [("x-sum".to_owned(), "1".to_owned())]);
    let request = backend.request(1).await;
    assert_eq!((all(&request, "longhaul-run-id"), request.header("longhaul-x")), (vec![run], None));
    // A plain GET is no run.
    let got = get(proxy.address, "/", "").await;
    assert_eq!((got.header("longhaul-run-id"), got.header("longhaul-affinity")), (None, Some("none")));
}

#[tokio::test]
async fn debug_fields_are_for_those_in_debug_from_who_ask() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    let asked = get(proxy.address, "/", "longhaul-debug: 1\r\n").await;
    assert_eq!(asked.header("longhaul-version"), Some("v"));
    assert_eq!(asked.header("longhaul-endpoint"), Some(backend.name().as_str()));
    assert_eq!(get(proxy.address, "/", "").await.header("longhaul-endpoint"), None, "nobody asked");
    backend.next(Script(vec![Step::ReadBody, Step::Close]));
    let failed = post(proxy.address, "/", "longhaul-debug: 1\r\n", "hi").await;
    assert_eq!((failed.status(), failed.header("longhaul-version")), (502, Some("v")));
    assert_eq!(failed.header("longhaul-endpoint"), Some(backend.name().as_str()), "of an error too");
    let elsewhere = format!("debug_from: [10.0.0.0/8]\n{}", service(&backend, ""));
    let proxy = start_proxy(&elsewhere).await;
    let refused = get(proxy.address, "/", "longhaul-debug: 1\r\n").await;
    assert_eq!((refused.header("longhaul-version"), refused.header("longhaul-endpoint")), (None, None));
}

#[tokio::test]
async fn a_trusted_proxy_tells_who_asks_for_debug_fields_by_either_field() {
    let backend = Backend::start().await;
    let config = format!("{}{}", listening("trusted_proxies: [127.0.0.0/8]"), service(&backend, ""));
    let proxy = start_proxy(&config).await;
    for (told, shown) in [
        ("", true),
        ("X-Forwarded-For: 203.0.113.7\r\n", false),
        ("Forwarded: for=203.0.113.7;proto=https\r\n", false),
        ("Forwarded: for=203.0.113.7, for=127.0.0.9\r\n", false),
        ("Forwarded: for=127.0.0.9\r\n", true),
    ] {
        let asked = get(proxy.address, "/", &format!("longhaul-debug: 1\r\n{told}")).await;
        assert_eq!(asked.header("longhaul-endpoint").is_some(), shown, "{told}");
    }
}

#[tokio::test]
async fn the_patterns_of_a_service_look_at_the_path_that_is_forwarded() {
    let backend = Backend::start().await;
    let routes =
        "routes:\n  - {match: {path: /support/**}, service: agent, strip_prefix: /support}\n  - service: agent\n";
    let keys = "    agent_protocol: http\n    session: {key: [{path: \"/threads/{session}/**\"}]}\n    \
                runs: {match: [{methods: [POST], path: \"/threads/*/runs\"}]}\n";
    let proxy = start_proxy(&format!("{routes}{}", service(&backend, keys))).await;
    for (path, affinity, is_run) in [
        ("/support/threads/t1/runs", "new", true),
        ("/threads/t1/runs", "hit", true),
        ("/support/threads/t1", "hit", false),
        ("/support/runs", "none", false),
    ] {
        let answer = post(proxy.address, path, "", "hi").await;
        assert_eq!(answer.header("longhaul-affinity"), Some(affinity), "{path}");
        assert_eq!(answer.header("longhaul-run-id").is_some(), is_run, "{path}");
    }
    assert_eq!(backend.requests()[0].target, "/threads/t1/runs");
}

#[tokio::test]
async fn what_we_say_of_our_own_place_is_as_the_client_behind_a_trusted_proxy_sees_it() {
    let backend = Backend::start().await;
    let url = backend.url().to_owned();
    let card = format!(r#"{{"name":"agent","url":"{url}/rpc","capabilities":{{}}}}"#);
    let there = format!("{url}/there");
    backend.each(move |_| {
        Script::answer(200, &[("content-type", "application/json"), ("location", there.as_str())], &card)
    });
    let routes = "routes:\n  - {match: {path: /new/**}, redirect: {path: /newer}}\n  \
                  - {match: {path: /agents/**}, service: agent, strip_prefix: /agents}\n";
    let cookie = "    session: {cookie: {name: lh}}\n";
    let config = format!("{}{routes}{}", listening("trusted_proxies: [127.0.0.2/32]"), service(&backend, cookie));
    let proxy = start_proxy(&config).await;
    let told = "X-Forwarded-Proto: https\r\nX-Forwarded-Host: public.example\r\n";
    for (from, base) in [([127, 0, 0, 1], "http://inner.test"), ([127, 0, 0, 2], "https://public.example")] {
        let mut client = RawClient::connect_from(from, proxy.address).await;
        client.send(format!("GET /new HTTP/1.1\r\nHost: inner.test\r\n{told}\r\n")).await;
        let redirect = client.read_response().await;
        assert_eq!(redirect.header("location"), Some(format!("{base}/newer").as_str()));

        let path = "/agents/.well-known/agent-card.json";
        client.send(format!("GET {path} HTTP/1.1\r\nHost: inner.test\r\n{told}\r\n")).await;
        let answer = client.read_response().await;
        assert_eq!(answer.json()["url"], format!("{base}/agents/rpc"));
        assert_eq!(answer.header("location"), Some(format!("{base}/agents/there").as_str()));
        let cookie = answer.header("set-cookie").expect("a cookie");
        assert_eq!(cookie.ends_with("; Secure"), base.starts_with("https"), "{cookie}");
    }
}

// ---- configured edits ----

#[tokio::test]
async fn a_stripped_prefix_comes_back_in_what_the_endpoint_says_of_its_place() {
    let backend = Backend::start().await;
    let url = backend.url().to_owned();
    backend.each(move |_| {
        Script(vec![
            Step::ReadBody,
            answer(
                201,
                &[
                    ("Location", "/runs/1?x=/y"),
                    ("Content-Location", &format!("{url}/runs/1")),
                    ("Set-Cookie", "a=1; Path=/; HttpOnly"),
                    ("Set-Cookie", "b=2; path=/deep"),
                    ("Set-Cookie", "c=3"),
                    ("Link", "</other>"),
                ],
                Body::Length(0),
            ),
        ])
    });
    let routes = "routes:\n  - {match: {path: /support/**}, service: agent, strip_prefix: /support}\n";
    let config = format!("{routes}{}", service(&backend, "")).replace("endpoints:", "host: endpoint, endpoints:");
    let proxy = start_proxy(&config).await;
    let got = get(proxy.address, "/support/a?b", "").await;
    assert_eq!(backend.request(1).await.target, "/a?b");
    assert_eq!(got.header("location"), Some("/support/runs/1?x=/y"));
    assert_eq!(got.header("content-location"), Some("http://agents.test/support/runs/1"));
    assert_eq!(got.header("link"), Some("</other>"));
    let cookies: Vec<_> = got.head.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("set-cookie")).collect();
    let cookies: Vec<_> = cookies.iter().map(|(_, value)| value.as_str()).collect();
    assert_eq!(cookies, ["a=1; Path=/support; HttpOnly", "b=2; Path=/support/deep", "c=3"]);
    for (path, target) in [("/support", "/"), ("/support/", "/"), ("/support//x", "//x"), ("/support/x/../y", "/y")] {
        let before = backend.request_count();
        get(proxy.address, path, "").await;
        assert_eq!(backend.request(before + 1).await.target, target, "{path}");
    }
    assert_eq!(get(proxy.address, "/supporters", "").await.status(), 404);
    assert_eq!(get(proxy.address, "/support/../admin", "").await.status(), 404, "matched as it would be forwarded");
}

#[tokio::test]
async fn fields_are_edited_on_routes_and_on_versions() {
    let backend = Backend::start().await;
    backend.each(|_| Script::answer(200, &[("x-internal", "1"), ("x-stays", "2"), ("x-old", "3")], "ok"));
    let config = format!(
        "routes:\n  - match: {{path: /**}}\n    service: agent\n    headers:\n      \
         request: {{set: {{x-route: \"1\", x-both: route}}, remove: [x-drop]}}\n      \
         response: {{set: {{x-old: new}}, remove: [x-internal]}}\n\
         services:\n  - name: agent\n    versions: [{{name: v, endpoints: [\"{}\"], \
         headers: {{set: {{authorization: Bearer upstream, x-both: version}}, remove: [x-client]}}}}]\n",
        backend.url()
    );
    let proxy = start_proxy(&config).await;
    let got =
        get(proxy.address, "/", "X-Drop: 1\r\nX-Client: 1\r\nX-Route: forged\r\nAuthorization: Bearer client\r\n")
            .await;
    let request = backend.request(1).await;
    assert_eq!((request.header("x-drop"), request.header("x-client")), (None, None));
    assert_eq!(all(&request, "x-route"), ["1"]);
    assert_eq!(all(&request, "authorization"), ["Bearer upstream"]);
    assert_eq!(all(&request, "x-both"), ["version"]);
    assert_eq!((got.header("x-internal"), got.header("x-stays"), got.header("x-old")), (None, Some("2"), Some("new")));
}

#[tokio::test]
async fn the_host_is_kept_or_the_endpoints_or_a_given_one() {
    let backend = Backend::start().await;
    let address = backend.address().to_string();
    for (policy, expected) in
        [("preserve", "agents.test"), ("endpoint", address.as_str()), ("literal.example", "literal.example")]
    {
        let config = service(&backend, "").replace("endpoints:", &format!("host: {policy}, endpoints:"));
        let proxy = start_proxy(&config).await;
        let before = backend.request_count();
        get(proxy.address, "/", "").await;
        let request = backend.request(before + 1).await;
        assert_eq!(all(&request, "host"), [expected], "{policy}");
        assert_eq!(request.header("x-forwarded-host"), Some("agents.test"), "{policy}");
    }
}

#[tokio::test]
async fn routes_answer_by_themselves_where_they_are_told_to() {
    let backend = Backend::start().await;
    let config = format!(
        "routes:\n  - {{match: {{path: /old/**}}, redirect: {{scheme: https, status: 308}}}}\n  \
         - {{match: {{path: /gone}}, respond: {{status: 410, body: \"gone for good\"}}}}\n  \
         - {{match: {{path: /agent/**}}, service: agent}}\n{}",
        service(&backend, "")
    );
    let proxy = start_proxy(&config).await;
    let moved = get(proxy.address, "/old/x?y=1", "").await;
    assert_eq!((moved.status(), moved.header("location")), (308, Some("https://agents.test/old/x?y=1")));
    let gone = get(proxy.address, "/gone", "").await;
    assert_eq!((gone.status(), gone.text().as_str()), (410, "gone for good"));
    let missing = get(proxy.address, "/elsewhere", "").await;
    assert_eq!((missing.status(), missing.code().as_deref()), (404, Some("no_route")));
    for made_here in [&moved, &gone, &missing] {
        assert_eq!(made_here.header("longhaul-affinity"), Some("none"));
    }
    // HEAD has the length and no body, and the connection goes on.
    let mut client = proxy.connect().await;
    client.send("HEAD /gone HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_response_to("HEAD").await.header("content-length"), Some("13"));
    client.send("GET /gone HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_response().await.status(), 410);
    // A body that nobody reads: the client is told that the connection closes.
    client.send("POST /gone HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello").await;
    let told = client.read_response().await;
    assert_eq!((told.status(), told.header("connection")), (410, Some("close")));
    client.closed().await;
    assert_eq!(backend.connections(), 0);
}

// ---- messages without a body, old versions ----

#[tokio::test]
async fn answers_without_a_body_keep_their_length_and_the_connection() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    let mut client = proxy.connect().await;
    for (method, script, status, length) in [
        ("HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", 200, Some("1000")),
        ("HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200, None),
        ("HEAD", "HTTP/1.1 404 Not Found\r\n\r\n", 404, None),
        ("GET", "HTTP/1.1 204 No Content\r\n\r\n", 204, None),
        ("GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\nETag: x\r\n\r\n", 304, Some("77")),
        ("GET", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, Some("0")),
        ("DELETE", "HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n", 205, Some("0")),
    ] {
        backend.next(Script(vec![Step::ReadBody, raw(script)]));
        client.send(format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        let got = client.read_response_to(method).await;
        assert_eq!((got.status(), got.header("content-length")), (status, length), "{method} {script}");
        assert_eq!((got.header("transfer-encoding"), got.body.len()), (None, 0), "{method} {script}");
    }
    assert_eq!(backend.connections(), 1);
}

#[tokio::test]
async fn http_1_0_clients_are_answered_without_chunks_and_closed_after() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    let chunked = || {
        Script(vec![
            Step::ReadBody,
            answer(200, &[], Body::Chunked),
            Step::Data(b"one ".to_vec()),
            Step::Data(b"two".to_vec()),
            Step::End,
        ])
    };
    for (head, script, body) in [
        ("GET / HTTP/1.0\r\n", chunked(), "one two"),
        ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n", chunked(), "one two"),
        ("GET / HTTP/1.0\r\nHost: a\r\n", Script::ok("sized"), "sized"),
        // An interim answer is not for HTTP/1.0.
        (
            "GET / HTTP/1.0\r\nHost: a\r\n",
            Script(vec![raw("HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")]),
            "hi",
        ),
    ] {
        backend.next(script);
        let mut client = proxy.connect().await;
        client.send(format!("{head}\r\n")).await;
        let got = client.read_response().await;
        assert_eq!((got.status(), got.text().as_str(), got.header("transfer-encoding")), (200, body, None));
        assert!(client.closed().await.is_empty());
    }
    assert_eq!(
        backend.requests()[0].header("host"),
        Some(backend.address().to_string().as_str()),
        "its own, for want of one"
    );
    // Cut in the middle: an end would look like the whole of it, so it is a reset.
    backend.next(Script(vec![answer(200, &[], Body::Chunked), Step::Data(b"half".to_vec()), Step::Close]));
    let stream = tokio::net::TcpStream::connect(proxy.address).await.expect("it listens");
    let mut stream = tokio::io::BufStream::new(stream);
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.expect("open");
    stream.flush().await.expect("open");
    let mut seen = Vec::new();
    let end = within("the cut", stream.read_to_end(&mut seen)).await;
    let told = String::from_utf8_lossy(&seen).starts_with("HTTP/1.1 502");
    assert!(told || end.is_err(), "{end:?}, {:?}", String::from_utf8_lossy(&seen));
}

#[tokio::test]
async fn endpoints_that_end_their_answer_by_closing_are_passed_on_so() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    for head in ["HTTP/1.0 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"] {
        backend.next(Script(vec![Step::ReadBody, raw(head), raw("until the end"), Step::Close]));
        let mut client = proxy.connect().await;
        client.send(EMPTY_POST).await;
        let got = client.read_response().await;
        assert_eq!((got.status(), got.text().as_str()), (200, "until the end"), "{head}");
        assert_eq!(
            (got.header("transfer-encoding"), got.header("content-length")),
            (None, None),
            "no last chunk is made up"
        );
        assert_eq!(got.header("connection"), Some("close"));
        assert!(got.head.raw.starts_with(b"HTTP/1.1 200 OK\r\n"));
    }
    // With a length, an HTTP/1.0 endpoint is like any other, except that its connection is not used again.
    for _ in 0..2 {
        backend.next(Script::raw("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"));
    }
    let mut client = proxy.connect().await;
    for _ in 0..2 {
        client.send(EMPTY_POST).await;
        assert_eq!(client.read_response().await.text(), "hello");
    }
}

// ---- interim answers ----

#[tokio::test]
async fn continue_makes_the_client_send_its_body() {
    let backend = Backend::start().await;
    backend.next(Script(vec![raw("HTTP/1.1 100 Continue\r\n\r\n"), Step::ReadBody, answer(200, &[], Body::Length(0))]));
    let proxy = proxy_before(&backend).await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 5\r\n\r\n").await;
    assert_eq!(client.read_head().await.status, 100);
    assert_eq!(backend.request(1).await.header("expect"), Some("100-continue"));
    client.send("hello").await;
    assert_eq!(client.read_response().await.status(), 200);
    assert_eq!(backend.requests()[0].body, b"hello");
    // And the connection goes on, on both sides.
    client.send(EMPTY_POST).await;
    assert_eq!(client.read_response().await.text(), "ok");
    assert_eq!(backend.connections(), 1);
}

#[tokio::test]
async fn a_final_answer_instead_of_continue_ends_the_exchange_and_both_connections() {
    let backend = Backend::start().await;
    backend.next(Script(vec![raw("HTTP/1.1 417 No\r\nContent-Length: 2\r\n\r\nno")]));
    let proxy = proxy_before(&backend).await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").await;
    let got = client.read_response().await;
    assert_eq!((got.status(), got.text().as_str()), (417, "no"));
    assert!(client.closed().await.is_empty());
    eventually("the endpoint's connection is closed", || backend.open_connections() == 0).await;
}

#[tokio::test]
async fn a_body_that_must_be_looked_into_is_asked_for() {
    let backend = Backend::start().await;
    let more = "    session: {key: [{json: /thread}]}\n";
    let proxy = start_proxy(&service(&backend, more)).await;
    let body = "{\"thread\": \"t1\", \"more\": [1, 2, 3]}";
    for (framing, wire) in [
        (format!("Content-Length: {}", body.len()), body.to_owned()),
        ("Transfer-Encoding: chunked".to_owned(), format!("{:x}\r\n{body}\r\n0\r\nX-Sum: 1\r\n\r\n", body.len())),
    ] {
        let before = backend.request_count();
        let mut client = proxy.connect().await;
        client
            .send(format!(
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n{framing}\r\n\r\n"
            ))
            .await;
        // The endpoint depends on the body, so nobody but the proxy can say so.
        assert_eq!(client.read_head().await.status, 100, "{framing}");
        client.send(wire).await;
        let got = client.read_response().await;
        assert_eq!(got.text(), "ok", "{framing}");
        assert_ne!(got.header("longhaul-affinity"), Some("none"), "{framing}");
        let request = backend.request(before + 1).await;
        assert_eq!(request.body, body.as_bytes(), "{framing}");
        assert_eq!(request.trailers.len(), usize::from(framing.contains("chunked")), "{framing}");
        client.send(EMPTY_POST).await;
        assert_eq!(client.read_response().await.status(), 200, "{framing}");
    }
    // Malformed behind the bytes that were looked into: refused, and the endpoint never takes it for a whole request.
    let mut client = proxy.connect().await;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    client.send(format!("{head}3\r\n{{}} \r\nzz\r\n{EMPTY_POST}")).await;
    assert_eq!(client.read_response().await.code().as_deref(), Some("bad_request"));
    assert!(client.closed().await.is_empty());
    assert!(backend.requests().iter().skip(4).all(|request| !request.body_complete));
}

#[tokio::test]
async fn what_a_client_does_wrong_never_counts_against_the_endpoint() {
    let (first, second) = (Backend::start_http2().await, Backend::start_http2().await);
    let config = service(&first, "    outlier: {consecutive_failures: 1}\n")
        .replace("endpoints: [", &format!("http: 2, endpoints: [\"{}\", ", second.url()));
    let proxy = start_proxy(&config).await;
    for _ in 0..3 {
        let asked = "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
        fetch(proxy.address, asked).await;
        fetch(proxy.address, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n").await;
        fetch(proxy.address, "GET /?a\\b\"<> HTTP/1.1\r\nHost: a\r\n\r\n").await;
    }
    for backend in [&first, &second] {
        let status = proxy.endpoint(&backend.name()).await.expect("it is there");
        assert_eq!(status["state"], "ready", "{status}");
    }
}

#[tokio::test]
async fn continue_works_where_a_side_is_http2() {
    let backend = Backend::start_http2().await;
    backend.each(|_| Script::echo());
    let proxy = start_proxy(&service(&backend, "").replace("endpoints:", "http: 2, endpoints:")).await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").await;
    assert_eq!(client.read_head().await.status, 100);
    client.send("hello").await;
    assert_eq!(client.read_response().await.text(), "hello");

    let backend = Backend::start().await;
    backend.next(Script(vec![
        raw("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"),
        Step::ReadBody,
        answer(200, &[], Body::Length(0)),
    ]));
    let proxy = proxy_before(&backend).await;
    let client = Http2Client::connect(proxy.address).await;
    let mut request = http2_request("POST", proxy.address, "/");
    request.headers_mut().insert("expect", "100-continue".parse().expect("a value"));
    assert_eq!(client.fetch(request, b"hello").await.status(), 200);
    assert_eq!(backend.requests()[0].body, b"hello");
}

// ---- trailers ----

#[tokio::test]
async fn trailers_pass_both_ways_and_carry_nothing_that_they_may_not() {
    for http2 in [false, true] {
        let backend = if http2 { Backend::start_http2().await } else { Backend::start().await };
        backend.each(|_| {
            let trailers = [
                ("x-sum", "abc"),
                ("set-cookie", "forged=1"),
                ("longhaul-run-id", "forged"),
                ("content-type", "forged"),
            ];
            let trailers = trailers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            Script(vec![
                Step::ReadBody,
                answer(200, &[("trailer", "x-sum")], Body::Chunked),
                Step::Data(b"body".to_vec()),
                Step::Trailers(trailers),
            ])
        });
        let version = if http2 { "http: 2, endpoints:" } else { "endpoints:" };
        let proxy = start_proxy(&service(&backend, "").replace("endpoints:", version)).await;
        let mut client = proxy.connect().await;
        client
            .send(
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X-Check\r\n\r\n4\r\nbody\r\n0\r\n\
                 X-Check: 1\r\nAuthorization: forged\r\nLonghaul-X: forged\r\nX-Forwarded-For: forged\r\nContent-Length: 9\r\nHost: b\r\n\r\n",
            )
            .await;
        let got = client.read_response().await;
        assert_eq!((got.text().as_str(), got.header("trailer")), ("body", Some("x-sum")));
        assert_eq!(got.trailers, [("x-sum".to_owned(), "abc".to_owned())], "HTTP/2: {http2}");
        let request = backend.request(1).await;
        let lower: Vec<_> =
            request.trailers.iter().map(|(name, value)| (name.to_lowercase(), value.as_str())).collect();
        assert_eq!(lower, [("x-check".to_owned(), "1")], "HTTP/2: {http2}");
        assert_eq!(request.body, b"body");
    }
}

// ---- the order of things ----

#[tokio::test]
async fn an_answer_before_the_requests_end_arrives_and_both_connections_close() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    for framing in ["Content-Length: 100000", "Transfer-Encoding: chunked"] {
        backend.next(Script(vec![raw("HTTP/1.1 403 No\r\nContent-Length: 2\r\n\r\nno"), Step::Wait(Gate::new())]));
        let mut client = proxy.connect().await;
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n5\r\nhello\r\n")).await;
        let got = client.read_response().await;
        assert_eq!((got.status(), got.text().as_str()), (403, "no"), "{framing}");
        // The rest of the body, with something in it that must not be taken for a request.
        let _ = client.try_send("5\r\nhello\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(client.closed().await.is_empty(), "{framing}");
        eventually("the endpoint's connection is closed", || backend.open_connections() == 0).await;
    }
    assert!(backend.requests().iter().all(|request| request.target == "/" && !request.body_complete));
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order_over_one_connection() {
    let backend = Backend::start().await;
    backend.each(|request| Script::ok(&request.target));
    let proxy = proxy_before(&backend).await;
    let mut client = proxy.connect().await;
    let wire: String = (0..50)
        .map(|number| match number % 3 {
            0 => format!("GET /{number} HTTP/1.1\r\nHost: a\r\n\r\n"),
            1 => format!("POST /{number} HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"),
            _ => format!(
                "POST /{number} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
            ),
        })
        .collect();
    client.send(&wire).await;
    for number in 0..50 {
        assert_eq!(client.read_response().await.text(), format!("/{number}"));
    }
    assert_eq!((backend.connections(), backend.request_count()), (1, 50));
    // The last request of a connection says so.
    client
        .send("GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET /never HTTP/1.1\r\nHost: a\r\n\r\n")
        .await;
    let last = client.read_response().await;
    assert_eq!((last.text().as_str(), last.header("connection")), ("/last", Some("close")));
    assert!(client.closed().await.is_empty());
    assert_eq!(backend.request_count(), 51);
}

// ---- backpressure ----

#[tokio::test]
async fn an_endpoint_that_does_not_read_stops_the_client_and_costs_no_memory() {
    const BODY: usize = 256 << 20;
    let backend = Backend::start().await;
    let gate = Gate::new();
    backend.next(Script(vec![Step::Stall(gate.clone()), Step::Close]));
    let config = format!("{}{}", listening("limits: {max_body_bytes: 1024MiB}"), service(&backend, ""));
    let proxy = start_proxy(&config).await;
    let mut client = proxy.connect().await;
    client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {BODY}\r\n\r\n")).await;
    eventually("the head arrives", || backend.in_flight() == 1).await;
    let before = resident_bytes();
    let piece = vec![b'x'; 256 << 10];
    let mut sent = 0;
    while let Ok(done) = tokio::time::timeout(Duration::from_millis(300), client.try_send(&piece)).await {
        done.expect("open");
        sent += piece.len();
        assert!(sent < BODY / 2, "the proxy takes what the endpoint does not");
    }
    // Everything else is in the sockets of the kernel. All tests of this file share this process.
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < sent.max(64 << 20), "{sent} bytes were taken, {grown} are held");
    gate.open();
}

fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    status.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("pages") * 4096
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_endpoint() {
    const PIECE: usize = 256 << 10;
    const PIECES: usize = 400;
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = proxy_before(&backend).await;
    let mut client = proxy.connect().await;
    client.send(EMPTY_POST).await;
    let drip = backend.drip().await;
    let mut taken = 0;
    // A step is taken when the one before was written, so what is taken is what the proxy has read and the kernel holds.
    while tokio::time::timeout(Duration::from_millis(300), drip.data(vec![b'y'; PIECE])).await.is_ok() {
        taken += 1;
        assert!(taken < PIECES, "the proxy takes what the client does not");
    }
    assert_eq!(client.read_head().await.status, 200);
    let mut seen = 0;
    while seen < (taken - 64).max(1) * PIECE {
        seen += client.read_chunk().await.expect("it goes on").len();
    }
}

#[tokio::test]
async fn a_client_that_holds_back_single_tokens_costs_its_endpoint_no_connection() {
    const TOKENS: usize = 30_000;
    let backend = Backend::start_http2().await;
    backend.each(|_| {
        let mut steps = vec![Step::ReadBody, answer(200, &[], Body::Chunked)];
        steps.extend((0..TOKENS).map(|_| Step::Data(b"data: a token......\n".to_vec())));
        steps.push(Step::End);
        Script(steps)
    });
    let proxy = start_proxy(&service(&backend, "").replace("endpoints:", "http: 2, endpoints:")).await;
    let client = Http2Client::connect(proxy.address).await;
    let stream = client.open(http2_request("GET", proxy.address, "/"), true).await;
    let (head, mut body) = stream.head().await;
    assert_eq!(head.status, 200);
    // The client reads nothing: every frame is a small one, and all that flow control allows wait in the proxy.
    let ended = async {
        while backend.in_flight() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_millis(500), ended).await.is_err(), "held back, not closed");
    let mut seen = 0;
    while let Some(data) = within("data", body.data()).await {
        let data = data.expect("the stream goes on");
        seen += data.len();
        body.flow_control().release_capacity(data.len()).expect("it was received");
    }
    assert_eq!(seen, TOKENS * 20);
}

// ---- leaving ----

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_closes_the_endpoint_at_once() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    let gate = Gate::new();
    let next = "GET /next HTTP/1.1\r\nHost: a\r\n\r\n";
    for (what, request) in [
        ("no body", "GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()),
        ("a whole body", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi".to_owned()),
        ("half a body", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\nhi".to_owned()),
        ("half a chunk", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n20\r\nhi".to_owned()),
        ("a pipelined request behind", format!("{EMPTY_POST}{next}")),
        ("half a request behind", format!("{EMPTY_POST}GET /nex")),
    ] {
        for half_close in [false, true] {
            backend.next(Script(vec![Step::Wait(gate.clone())]));
            let before = backend.request_count();
            let mut client = proxy.connect().await;
            client.send(&request).await;
            eventually("the request arrives", || backend.request_count() > before).await;
            if half_close {
                client.finish_sending().await;
                assert!(client.closed().await.is_empty(), "{what}");
            } else {
                drop(client);
            }
            eventually(&format!("{what}: the endpoint is closed"), || backend.in_flight() == 0).await;
        }
    }
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"agent\""], 0.0).await;
}

#[tokio::test]
async fn a_client_that_leaves_within_the_answer_closes_the_endpoint_at_once() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = proxy_before(&backend).await;
    for (what, request) in [
        ("a whole request", EMPTY_POST.to_owned()),
        ("half a body", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\nhi".to_owned()),
        ("a pipelined request behind", format!("{EMPTY_POST}GET /next HTTP/1.1\r\nHost: a\r\n\r\n")),
    ] {
        for half_close in [false, true] {
            let half_sent = request.contains("20");
            if half_sent {
                // The scripted stream waits for the whole request; this one answers at once.
                backend.next(Script(vec![
                    answer(200, &[], Body::Chunked),
                    Step::Data(b"data: 1\n\n".to_vec()),
                    Step::Wait(Gate::new()),
                ]));
            }
            let mut client = proxy.connect().await;
            client.send(&request).await;
            let drip = if half_sent { None } else { Some(backend.drip().await) };
            if let Some(drip) = &drip {
                drip.event("1").await;
            }
            assert_eq!(client.read_head().await.status, 200);
            client.read_chunks_until("data: 1").await;
            if half_close {
                client.finish_sending().await;
                let rest = client.closed().await;
                assert!(!rest.ends_with(b"0\r\n\r\n"), "{what}");
            } else {
                drop(client);
            }
            eventually(&format!("{what}: the endpoint is closed"), || backend.in_flight() == 0).await;
        }
    }
    let cancelled = ["outcome=\"cancelled\""];
    proxy.metric_becomes("longhaul_runs_total", &cancelled, 6.0).await;
}

// ---- limits ----

#[tokio::test]
async fn a_body_past_its_limit_is_413_whatever_its_framing() {
    let backend = Backend::start().await;
    let config = format!("{}{}", listening("limits: {max_body_bytes: 1KiB}"), service(&backend, ""));
    let proxy = start_proxy(&config).await;
    let too_large = |got: Response| assert_eq!((got.status(), got.code().as_deref()), (413, Some("body_too_large")));
    // By its length: refused before anything is forwarded, and before the body is asked for.
    too_large(
        fetch(proxy.address, "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1025\r\n\r\n")
            .await,
    );
    let mut client = proxy.connect().await;
    client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1025\r\n\r\n{}", "x".repeat(1025))).await;
    too_large(client.read_response().await);
    assert!(client.closed().await.is_empty());
    assert_eq!(backend.connections(), 0);
    // In chunks: as soon as they are too many.
    let chunk = format!("200\r\n{}\r\n", "x".repeat(0x200));
    let mut client = proxy.connect().await;
    client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}{chunk}")).await;
    let _ = client.try_send("1\r\nx\r\n").await;
    too_large(client.read_response().await);
    assert!(client.closed().await.is_empty());
    assert!(backend.requests().iter().all(|request| !request.body_complete));
    // Just so large is fine, both ways.
    assert_eq!(post(proxy.address, "/", "", &"x".repeat(1024)).await.text(), "ok");
    let whole = format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}{chunk}0\r\n\r\n");
    assert_eq!(fetch(proxy.address, whole).await.text(), "ok");
}
