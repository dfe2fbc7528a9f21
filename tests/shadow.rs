//! Shadow: copies of starts that nobody hears of, and that hold up nobody.

mod support;

use std::collections::HashMap;

use support::{Backend, Proxy, RawClient, Response, Script, eventually, post, start_proxy};

async fn shadowed(share: &str) -> (Backend, Backend, Proxy) {
    let (stable, canary) = (Backend::start().await, Backend::start().await);
    stable.each(|_| Script::ok("stable"));
    canary.each(|_| Script::ok("canary"));
    let config = format!(
        "services:\n  - name: support\n    agent_protocol: http\n    session: {{key: [{{header: x-session-id}}]}}\n    versions:\n      \
         - {{name: stable, endpoints: [\"{}\"]}}\n      - {{name: canary, weight: 0, endpoints: [\"{}\"], headers: {{set: {{x-version: canary}}}}, \
         match: {{headers: {{x-canary: \"1\"}}}}}}\n    shadow: {{version: canary, percent: {share}}}\n",
        stable.url(),
        canary.url()
    );
    let proxy = start_proxy(&config).await;
    (stable, canary, proxy)
}

async fn run(proxy: &Proxy, headers: &str, body: &str) -> Response {
    post(proxy.address, "/run?x=1", headers, body).await
}

#[tokio::test]
async fn a_start_is_copied_whole_and_counted_nowhere() {
    let (stable, canary, proxy) = shadowed("100%").await;
    let body = "b".repeat(60_000);
    let answer = run(&proxy, "X-Session-Id: s\r\nAuthorization: Bearer t\r\n", &body).await;
    assert_eq!(answer.text(), "stable");
    eventually("the copy is there whole", || canary.requests().iter().any(|request| request.body_complete)).await;
    let copy = canary.request(1).await;
    let real = stable.request(1).await;
    assert_eq!((copy.target.as_str(), copy.body.len()), ("/run?x=1", body.len()));
    assert_eq!((&copy.method, &copy.body, copy.header("authorization")), (&real.method, &real.body, Some("Bearer t")));
    assert_eq!((copy.header("longhaul-shadow"), real.header("longhaul-shadow")), (Some("1"), None));
    assert_eq!((copy.header("longhaul-run-id").is_some(), real.header("longhaul-run-id").is_some()), (false, true));
    assert_eq!((copy.header("x-version"), real.header("x-version")), (Some("canary"), None));

    // In chunks, and without a body.
    let whole = async |count: usize| {
        let complete = || canary.requests().get(count - 1).is_some_and(|request| request.body_complete);
        eventually("the copy is there whole", complete).await;
        canary.request(count).await
    };
    let mut client = proxy.connect().await;
    client
        .send("POST /run HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n4\r\n you\r\n0\r\n\r\n")
        .await;
    assert_eq!(client.read_response().await.text(), "stable");
    assert_eq!(whole(2).await.body, b"hi you");
    client.send("GET /events HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n").await;
    assert_eq!(client.read_response().await.text(), "stable");
    assert_eq!(canary.request(3).await.target, "/events");

    // Neither what is no start, nor what goes there anyway, nor what is too large.
    client.send("GET /state HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_response().await.text(), "stable");
    assert_eq!(run(&proxy, "X-Canary: 1\r\n", "hi").await.text(), "canary");
    assert_eq!(run(&proxy, "", &"b".repeat(70_000)).await.text(), "stable");
    assert_eq!(run(&proxy, "", "last").await.text(), "stable");
    assert_eq!(whole(5).await.body, b"last");
    let own = canary.requests().iter().filter(|request| request.header("longhaul-shadow").is_none()).count();
    assert_eq!((canary.request_count(), own), (5, 1));
    proxy.metric_becomes("longhaul_runs_total", &["version=\"canary\""], 1.0).await;
    assert_eq!(proxy.metric("longhaul_sessions", &["version=\"canary\""]).await, Some(0.0));
    assert_eq!(proxy.metric("longhaul_outstanding_runs", &["version=\"canary\""]).await, Some(0.0));
}

#[tokio::test]
async fn copies_that_hang_or_fail_hold_up_nobody_and_are_bounded() {
    let (_stable, mut canary, proxy) = shadowed("100%").await;
    canary.drip_each();
    for number in 0..100 {
        assert_eq!(run(&proxy, &format!("X-Session-Id: {number}\r\n"), "hi").await.text(), "stable");
    }
    eventually("the copies are under way", || canary.in_flight() >= 64).await;
    assert_eq!(canary.request_count(), 64);
    for _ in 0..64 {
        let drip = canary.drip().await;
        drip.event("thrown away").await;
        drip.finish().await;
    }
    eventually("the copies are over", || canary.in_flight() == 0).await;
    assert_eq!(run(&proxy, "", "again").await.text(), "stable");
    let seen = || canary.requests().last().is_some_and(|request| request.body == b"again");
    eventually("there is room for a copy again", seen).await;
    canary.refuse().await;
    for _ in 0..5 {
        assert_eq!(run(&proxy, "", "hi").await.text(), "stable");
    }
}

#[tokio::test]
async fn whole_sessions_are_copied() {
    let (_stable, canary, proxy) = shadowed("25%").await;
    let mut client: RawClient = proxy.connect().await;
    for _ in 0..3 {
        for number in 0..200 {
            client
                .send(format!(
                    "POST /run HTTP/1.1\r\nHost: a\r\nX-Session-Id: s-{number}\r\nContent-Length: 2\r\n\r\nhi"
                ))
                .await;
            assert_eq!(client.read_response().await.text(), "stable");
        }
    }
    let copies = || {
        let mut copies: HashMap<String, usize> = HashMap::new();
        for request in canary.requests() {
            *copies.entry(request.header("x-session-id").expect("sent").to_owned()).or_default() += 1;
        }
        copies
    };
    eventually("every session was copied as often as it ran", || copies().values().all(|count| *count == 3)).await;
    let copied = copies().len();
    println!("{copied} of 200 sessions are copied");
    assert!((30..=70).contains(&copied), "{copied} of 200 sessions");
}
