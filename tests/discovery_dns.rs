//! Discovery by DNS: a name server's answers become endpoints, and what it does not say changes nothing.

mod support;

use std::net::SocketAddr;

use longhaul::control::discovery::Surroundings;
use support::*;

/// One service whose endpoints are found by `sources`.
fn config(sources: &str, rest: &str) -> String {
    format!(
        "services:\n  - name: support\n    session: {{key: [{{header: x-session-id}}]}}\n{rest}    versions:\n      - {{name: stable, endpoints: [{sources}]}}\n"
    )
}

fn start(server: &NameServer, config: &str) -> Proxy {
    start_proxy_in(Surroundings { name_servers: Some(vec![server.address]), ..Surroundings::default() }, config)
}

async fn ready(proxy: &Proxy) {
    eventually_async("the proxy is ready", || async { proxy.admin("GET", "/readyz").await.status() == 200 }).await;
}

async fn are_ready(proxy: &Proxy, backends: &[&Backend]) {
    let mut wanted: Vec<String> = backends.iter().map(|backend| backend.name()).collect();
    wanted.sort();
    eventually_async(&format!("{wanted:?} are ready"), || async { proxy.endpoints_in("ready").await == wanted }).await;
}

fn ip(backend: &Backend) -> String {
    backend.address().ip().to_string()
}

fn port(backend: &Backend) -> u16 {
    backend.address().port()
}

async fn run(address: SocketAddr, session: &str) -> Response {
    post(address, "/run", &format!("x-session-id: {session}\r\n"), "{}").await
}

/// Sessions go to all of them.
async fn all_are_used(proxy: &Proxy, backends: &[&Backend]) {
    let before: Vec<usize> = backends.iter().map(|backend| backend.request_count()).collect();
    for number in 0..2 * backends.len() {
        assert_eq!(run(proxy.address, &format!("{number}-{}", before[0])).await.status(), 200);
    }
    for (backend, before) in backends.iter().zip(before) {
        assert!(backend.request_count() > before, "{} is used", backend.name());
    }
}

#[tokio::test]
async fn addresses_come_and_go_and_a_run_of_one_that_left_is_finished() {
    let server = NameServer::start().await;
    let fleet = Backend::start_fleet(3).await;
    let [a, b, c] = &fleet[..] else { panic!("three") };
    server.addresses("agents.test", 0, &[&ip(a), &ip(b)]);
    let source = format!("{{dns: {{name: agents.test., port: {}, refresh: 100ms}}}}", port(a));
    let proxy = start(&server, &config(&source, ""));
    ready(&proxy).await;
    are_ready(&proxy, &[a, b]).await;
    all_are_used(&proxy, &[a, b]).await;
    let found = proxy.endpoint(&a.name()).await.expect("an endpoint");
    assert_eq!(found["source"], format!("dns agents.test.:{}", port(a)));

    a.drip_each();
    b.drip_each();
    let mut client = proxy.connect().await;
    client.send("POST /run HTTP/1.1\r\nHost: a\r\nx-session-id: long\r\nContent-Length: 0\r\n\r\n").await;
    let (busy, idle, drip) = tokio::select! {
        drip = a.drip() => (a, b, drip),
        drip = b.drip() => (b, a, drip),
    };
    drip.event("first").await;
    client.read_head().await;
    client.read_chunks_until("first").await;

    server.addresses("agents.test", 0, &[&ip(idle), &ip(c)]);
    are_ready(&proxy, &[idle, c]).await;
    let leaving = proxy.endpoint(&busy.name()).await.expect("it has a run");
    assert_eq!((&leaving["state"], &leaving["drain"]["by"][0]), (&"draining".into(), &"removed".into()));
    drip.event("last").await;
    drip.finish().await;
    assert!(client.read_to_end_of_body().await.contains("last"));
    eventually_async("it is forgotten", || async { proxy.endpoint(&busy.name()).await.is_none() }).await;
}

#[tokio::test]
async fn failures_change_nothing() {
    let server = NameServer::start().await;
    let fleet = Backend::start_fleet(2).await;
    let (a, b) = (&fleet[0], &fleet[1]);
    server.addresses("agents.test", 0, &[&ip(a)]);
    let source = format!("{{dns: {{name: agents.test., port: {}, refresh: 100ms}}}}", port(a));
    let proxy = start(&server, &config(&source, ""));
    ready(&proxy).await;
    let failures = || async { proxy.status().await["discovery"][0]["failures"].as_u64().unwrap_or_default() };
    // SERVFAIL, NXDOMAIN, REFUSED.
    for code in [2, 3, 5] {
        server.code("agents.test", code);
        let before = failures().await;
        eventually_async("it was asked in vain", || async { failures().await > before + 1 }).await;
        assert_eq!(proxy.endpoints_in("ready").await, [a.name()], "code {code}");
        assert_eq!(run(proxy.address, "s").await.status(), 200);
        assert_eq!(proxy.admin("GET", "/readyz").await.status(), 200);
    }
    let problem = proxy.status().await["discovery"][0]["problem"].as_str().expect("a problem").to_owned();
    assert!(problem.contains("agents.test"), "{problem}");
    // One type of addresses fails, the other is believed.
    server.addresses("agents.test", 0, &[&ip(b)]);
    are_ready(&proxy, &[b]).await;
    eventually_async("all is well", || async { proxy.status().await["discovery"][0]["problem"].is_null() }).await;
    // An answer without addresses is an answer.
    server.addresses("agents.test", 0, &[]);
    are_ready(&proxy, &[]).await;
    assert_eq!(run(proxy.address, "t").await.code().as_deref(), Some("no_endpoint"));
}

#[tokio::test]
async fn whoever_comes_before_the_first_answer_waits_in_the_queue() {
    let server = NameServer::start().await;
    let backend = Backend::start_at(([127, 0, 0, 2], 0)).await;
    server.code("agents.test", 2);
    let source = format!("{{dns: {{name: agents.test., port: {}, refresh: 100ms}}}}", port(&backend));
    let proxy = start(&server, &config(&source, "    runs: {queue: {max: 10, timeout: 30s}}\n"));
    let address = proxy.address;
    let waiting = tokio::spawn(async move { run(address, "s").await });
    eventually_async("it waits", || async { proxy.status().await["services"][0]["queue"]["length"] == 1 }).await;
    let answer = proxy.admin("GET", "/readyz").await;
    assert_eq!(answer.status(), 503);
    assert!(answer.text().contains("agents.test"), "{}", answer.text());
    server.addresses("agents.test", 30, &[&ip(&backend)]);
    assert_eq!(within("it is placed", waiting).await.expect("no panic").status(), 200);
    ready(&proxy).await;
}

#[tokio::test]
async fn services_have_ports_weights_and_priorities() {
    let server = NameServer::start().await;
    let (a, b, spare) = (Backend::start().await, Backend::start().await, Backend::start().await);
    for name in ["a", "b", "spare"] {
        server.addresses(&format!("{name}.test"), 0, &["127.0.0.1"]);
    }
    let srv = |priority, weight, backend: &Backend, target| Srv { priority, weight, port: port(backend), target };
    let all = [srv(1, 3, &a, "a.test"), srv(1, 0, &b, "b.test"), srv(2, 1, &spare, "spare.test")];
    server.services("_http._tcp.agents.test", 0, &all);
    let source = "{dns: {name: _http._tcp.agents.test., refresh: 100ms}, weight: 2, max_runs: 7}";
    let proxy = start(&server, &config(source, ""));
    ready(&proxy).await;
    are_ready(&proxy, &[&a, &b]).await;
    let weight = |endpoint: Option<serde_json::Value>| {
        let endpoint = endpoint.expect("an endpoint");
        (endpoint["weight"].as_u64(), endpoint["max_runs"].as_u64())
    };
    assert_eq!(weight(proxy.endpoint(&a.name()).await), (Some(6), Some(7)));
    assert_eq!(weight(proxy.endpoint(&b.name()).await), (Some(2), Some(7)));
    // A target that nobody knows any more keeps its addresses; one that is not named any more doesn't.
    server.code("a.test", 2);
    server.services("_http._tcp.agents.test", 0, &[srv(1, 3, &a, "a.test"), srv(2, 1, &spare, "spare.test")]);
    are_ready(&proxy, &[&a]).await;
    server.services("_http._tcp.agents.test", 0, &[srv(2, 1, &spare, "spare.test")]);
    are_ready(&proxy, &[&spare]).await;
    assert_eq!(run(proxy.address, "s").await.status(), 200);
}

#[tokio::test]
async fn both_families_and_an_answer_too_long_for_a_datagram() {
    let server = NameServer::start().await;
    let v4 = Backend::start_at(([127, 0, 0, 1], 0)).await;
    let Ok(probe) = tokio::net::TcpListener::bind(("::1", port(&v4))).await else {
        eprintln!("there is no ::1 here: nothing is shown of it");
        return;
    };
    drop(probe);
    let v6 = Backend::start_at((std::net::Ipv6Addr::LOCALHOST, port(&v4))).await;
    server.addresses("agents.test", 0, &["127.0.0.1", "::1"]);
    let source = format!("{{dns: {{name: agents.test., port: {}, refresh: 100ms}}}}", port(&v4));
    let proxy = start(&server, &config(&source, ""));
    ready(&proxy).await;
    are_ready(&proxy, &[&v4, &v6]).await;
    all_are_used(&proxy, &[&v4, &v6]).await;
    let many: Vec<String> = (1..=200).map(|last| format!("127.0.1.{last}")).collect();
    server.addresses("agents.test", 0, &many.iter().map(String::as_str).collect::<Vec<_>>());
    eventually_async("all 200", || async { proxy.endpoints_in("ready").await.len() == 200 }).await;
}

#[tokio::test]
async fn an_answer_holds_as_long_as_its_time_to_live_and_no_longer_than_refresh() {
    let server = NameServer::start().await;
    let backend = Backend::start_at(([127, 0, 0, 2], 0)).await;
    for (name, ttl) in [("short.test", 1), ("long.test", 3600), ("kept.test", 3600)] {
        server.addresses(name, ttl, &[&ip(&backend)]);
    }
    let source = |name, refresh| format!("{{dns: {{name: {name}., port: {}, refresh: {refresh}}}}}", port(&backend));
    let version = |name, refresh| format!("{{name: {name}, endpoints: [{}]}}", source(format!("{name}.test"), refresh));
    let service = |name, refresh| format!("  - {{name: {name}, versions: [{}]}}\n", version(name, refresh));
    let config = format!(
        "services:\n{}{}{}routes: [{{match: {{path: /short}}, service: short}}, {{match: {{path: /long}}, service: long}}, {{service: kept}}]\n",
        service("short", "1h"),
        service("long", "200ms"),
        service("kept", "1h"),
    );
    let proxy = start(&server, &config);
    ready(&proxy).await;
    // Two questions a look: A and AAAA.
    eventually("both are asked again", || server.questions("short.test") >= 4 && server.questions("long.test") >= 6)
        .await;
    assert_eq!(server.questions("kept.test"), 2, "nobody asks for what still holds");
}

#[tokio::test]
async fn a_reload_keeps_what_a_source_has_found_and_drains_what_a_removed_one_had() {
    let server = NameServer::start().await;
    let fleet = Backend::start_fleet(2).await;
    let (a, b) = (&fleet[0], &fleet[1]);
    server.addresses("a.test", 3600, &[&ip(a)]);
    server.addresses("b.test", 3600, &[&ip(b)]);
    let source = |name| format!("{{dns: {{name: {name}.test., port: {}, refresh: 1h}}}}", port(a));
    let both = format!("{}, {}", source("a"), source("b"));
    let proxy = start(&server, &config(&both, ""));
    ready(&proxy).await;
    are_ready(&proxy, &[a, b]).await;
    assert_eq!(run(proxy.address, "s").await.status(), 200);

    let more = "    runs: {max_per_endpoint: 5}\n";
    assert_eq!(proxy.reload(&config(&both, more)).await.status(), 200);
    are_ready(&proxy, &[a, b]).await;
    assert_eq!(proxy.endpoint(&a.name()).await.expect("kept")["max_runs"], 5);
    assert_eq!(run(proxy.address, "s").await.header("longhaul-affinity"), Some("hit"));
    assert_eq!((server.questions("a.test"), server.questions("b.test")), (2, 2), "no source was started again");

    assert_eq!(proxy.reload(&config(&source("a"), more)).await.status(), 200);
    are_ready(&proxy, &[a]).await;
    // Listed, it is the configuration's; found again, the source's.
    let listed = format!("\"{}\"", a.url());
    assert_eq!(proxy.reload(&config(&format!("{listed}, {}", source("a")), more)).await.status(), 200);
    assert!(proxy.endpoint(&a.name()).await.expect("there")["source"].is_null());
    assert_eq!(proxy.reload(&config(&source("a"), more)).await.status(), 200);
    assert!(proxy.endpoint(&a.name()).await.expect("there")["source"].is_string());
}

#[tokio::test]
async fn what_is_found_is_checked_as_what_is_listed() {
    let server = NameServer::start().await;
    let fleet = Backend::start_fleet(2).await;
    let (well, ill) = (&fleet[0], &fleet[1]);
    ill.each(|_| Script::status(500));
    server.addresses("agents.test", 0, &[&ip(well), &ip(ill)]);
    let source = format!("{{dns: {{name: agents.test., port: {}, refresh: 100ms}}}}", port(well));
    let proxy = start(&server, &config(&source, "    health: {path: /health, interval: 100ms}\n"));
    ready(&proxy).await;
    are_ready(&proxy, &[well]).await;
    eventually_async("it is ill", || async { proxy.endpoints_in("unhealthy").await == [ill.name()] }).await;
    ill.each(|_| Script::ok("well"));
    are_ready(&proxy, &[well, ill]).await;
}

#[tokio::test]
async fn after_a_restart_sessions_stay_where_they_were_until_the_first_answer() {
    let server = NameServer::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let fleet = Backend::start_fleet(3).await;
    let (a, b, other) = (&fleet[0], &fleet[1], &fleet[2]);
    server.addresses("agents.test", 0, &[&ip(a), &ip(b)]);
    let source = format!("{{dns: {{name: agents.test., port: {}, refresh: 100ms}}}}", port(a));
    let config = format!("state: {{file: {}}}\n{}", directory.path().display(), config(&source, ""));
    let proxy = start(&server, &config);
    ready(&proxy).await;
    are_ready(&proxy, &[a, b]).await;
    for session in ["one", "two"] {
        assert_eq!(run(proxy.address, session).await.status(), 200);
    }
    let before = (a.request_count(), b.request_count());
    assert_eq!(before, (1, 1));
    assert!(proxy.admin("POST", "/api/v1/drain").await.status() < 300);
    let app = proxy.app;
    tokio::task::spawn_blocking(move || app.wait()).await.expect("it ends");

    server.code("agents.test", 2);
    let proxy = start(&server, &config);
    for session in ["one", "two"] {
        assert_eq!(run(proxy.address, session).await.header("longhaul-affinity"), Some("hit"));
    }
    assert_eq!((a.request_count(), b.request_count()), (2, 2));
    assert_eq!(run(proxy.address, "three").await.code().as_deref(), Some("no_endpoint"));
    // A reload meanwhile changes nothing of that.
    let more = config.replace("services:", "debug_from: []\nservices:");
    assert_eq!(proxy.reload(&more).await.status(), 200);
    assert_eq!(run(proxy.address, "one").await.header("longhaul-affinity"), Some("hit"));
    server.addresses("agents.test", 0, &[&ip(b), &ip(other)]);
    are_ready(&proxy, &[b, other]).await;
    let answers = [run(proxy.address, "one").await, run(proxy.address, "two").await];
    let mut outcomes: Vec<&str> = answers.iter().filter_map(|answer| answer.header("longhaul-affinity")).collect();
    outcomes.sort_unstable();
    assert_eq!(outcomes, ["hit", "lost"]);
    assert!(proxy.endpoint(&a.name()).await.is_none());
}
