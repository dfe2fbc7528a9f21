//! Sessions: who goes where, who stays, who moves, and that every run is counted exactly.

mod support;

use std::collections::{HashMap, HashSet};

use support::{
    Backend, Drip, Gate, Program, Proxy, RawClient, Response, Script, ask_admin, eventually, eventually_within, post,
    start_proxy,
};

/// A backend that answers with its own name.
async fn named(name: &'static str) -> Backend {
    let backend = Backend::start().await;
    backend.each(move |_| Script::ok(name));
    backend
}

async fn several(count: usize) -> Vec<Backend> {
    let mut backends = Vec::new();
    for name in ["a", "b", "c", "d", "e"].into_iter().take(count) {
        backends.push(named(name).await);
    }
    backends
}

fn urls(backends: &[Backend]) -> String {
    backends.iter().map(|backend| format!("\"{}\"", backend.url())).collect::<Vec<_>>().join(", ")
}

/// One service whose sessions are told by the header `x-session-id`.
fn pinned(backends: &[Backend], more: &str) -> String {
    format!(
        "services:\n  - name: support\n    session: {{key: [{{header: x-session-id}}]}}\n    \
         versions: [{{name: stable, endpoints: [{}]}}]\n{more}",
        urls(backends)
    )
}

async fn run(proxy: &Proxy, session: &str) -> Response {
    post(proxy.address, "/run", &format!("X-Session-Id: {session}\r\n"), "hi").await
}

fn affinity(answer: &Response) -> &str {
    answer.header("longhaul-affinity").expect("on every response")
}

/// Starts a stream; returns it with its endpoint's end.
async fn stream(proxy: &Proxy, backends: &[Backend], headers: &str) -> (RawClient, Drip, usize) {
    let before: Vec<usize> = backends.iter().map(Backend::request_count).collect();
    let mut client = proxy.connect().await;
    client.send(format!("POST /run HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: 2\r\n\r\nhi")).await;
    assert_eq!(client.read_head().await.status, 200);
    let chosen =
        (0..backends.len()).find(|index| backends[*index].request_count() > before[*index]).expect("one got it");
    let drip = backends[chosen].drip().await;
    (client, drip, chosen)
}

#[tokio::test]
async fn pins_hold_over_a_thousand_sessions_and_through_reloads() {
    let backends = several(3).await;
    let config = pinned(&backends, "");
    let proxy = start_proxy(&config).await;
    let mut homes = HashMap::new();
    for round in 0..3 {
        for number in 0..1000 {
            let session = format!("session-{number}");
            let answer = run(&proxy, &session).await;
            assert_eq!(affinity(&answer), if round == 0 { "new" } else { "hit" }, "{session}");
            let home = homes.entry(session.clone()).or_insert_with(|| answer.text());
            assert_eq!(*home, answer.text(), "{session} moved");
        }
        let reloaded = proxy.reload(&format!("{config}    slow_start: {}s\n", round + 1)).await;
        assert_eq!(reloaded.status(), 200, "{reloaded:?}");
    }
    assert_eq!(homes.values().collect::<HashSet<_>>().len(), 3, "all endpoints have some");
    proxy.metric_becomes("longhaul_sessions", &["service=\"support\"", "version=\"stable\""], 1000.0).await;
}

#[tokio::test]
async fn fifty_unpinned_runs_on_five_idle_endpoints_lie_ten_on_each() {
    let backends = several(5).await;
    backends.iter().for_each(Backend::drip_each);
    let proxy = start_proxy(&pinned(&backends, "")).await;
    let mut open = Vec::new();
    for started in 1..=50 {
        let (client, drip, _) = stream(&proxy, &backends, "").await;
        open.push((client, drip));
        let counts: Vec<usize> = backends.iter().map(Backend::in_flight).collect();
        let spread = counts.iter().max().expect("five") - counts.iter().min().expect("five");
        assert!(spread <= 1, "after {started} starts: {counts:?}");
    }
    assert!(backends.iter().all(|backend| backend.in_flight() == 10));
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 50.0).await;
    drop(open);
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
}

#[tokio::test]
async fn a_heavier_endpoint_gets_its_multiple() {
    let backends = several(2).await;
    backends.iter().for_each(Backend::drip_each);
    let config = format!(
        "services: [{{name: support, versions: [{{name: stable, endpoints: [\"{}\", {{url: \"{}\", weight: 2}}]}}]}}]\n",
        backends[0].url(),
        backends[1].url()
    );
    let proxy = start_proxy(&config).await;
    let mut open = Vec::new();
    for _ in 0..30 {
        open.push(stream(&proxy, &backends, "").await);
    }
    assert_eq!((backends[0].in_flight(), backends[1].in_flight()), (10, 20));
}

#[tokio::test]
async fn every_kind_of_key_is_the_same_session() {
    let backends = several(4).await;
    let config = pinned(&backends, "").replace(
        "[{header: x-session-id}]",
        "[{header: x-session-id}, {cookie: sid}, {query: thread}, {path: \"/threads/{session}/**\"}, {json: /config/thread_id}]",
    );
    let proxy = start_proxy(&config).await;
    let home = run(&proxy, "anna").await.text();
    let address = proxy.address;
    let json = r#"{"message": "hi", "config": {"thread_id": "anna"}}"#;
    let answers = [
        post(address, "/run", "Cookie: a=b; sid=anna; c=d\r\n", "").await,
        post(address, "/run?x=1&thread=anna", "", "").await,
        post(address, "/threads/anna/runs", "", "").await,
        post(address, "/run", "Content-Type: application/json\r\n", json).await,
    ];
    for answer in answers {
        assert_eq!((answer.text().as_str(), affinity(&answer)), (home.as_str(), "hit"), "{answer:?}");
    }
    let bodies: Vec<Vec<u8>> = backends.iter().flat_map(Backend::requests).map(|request| request.body).collect();
    assert!(bodies.contains(&json.as_bytes().to_vec()), "the body that was looked at is given back whole");
}

#[tokio::test]
async fn ids_are_learned_from_responses_of_success_only() {
    for (source, headers, body) in [
        ("response_header: x-session-id", vec![("x-session-id", "made-here")], "{}"),
        ("response_json: /thread/id", vec![("content-type", "application/json")], r#"{"thread": {"id": "made-here"}}"#),
    ] {
        let backends = several(4).await;
        for backend in &backends {
            let headers: Vec<(String, String)> =
                headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            backend.each(move |request| {
                let status = if request.target == "/bogus" { 404 } else { 200 };
                let headers: Vec<(&str, &str)> =
                    headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
                Script::answer(status, &headers, body)
            });
        }
        let key = format!("[{{header: x-session-id}}, {{{source}}}]");
        let proxy = start_proxy(&pinned(&backends, "").replace("[{header: x-session-id}]", &key)).await;
        post(proxy.address, "/bogus", "", "{}").await;
        let unknown = run(&proxy, "made-here").await;
        assert_eq!(affinity(&unknown), "new", "{source}: not learned from an error");

        let proxy = start_proxy(&pinned(&backends, "").replace("[{header: x-session-id}]", &key)).await;
        let before: Vec<usize> = backends.iter().map(Backend::request_count).collect();
        post(proxy.address, "/create", "", "{}").await;
        let home = (0..4).find(|index| backends[*index].request_count() > before[*index]).expect("one got it");
        let before = backends[home].request_count();
        assert_eq!(affinity(&run(&proxy, "made-here").await), "hit", "{source}");
        assert_eq!(backends[home].request_count(), before + 1, "{source}: the same endpoint");
    }
}

#[tokio::test]
async fn the_proxys_own_cookie_keeps_a_session_and_stays_with_the_proxy() {
    let backends = several(4).await;
    let config = pinned(&backends, "").replace("{key: [{header: x-session-id}]}", "{cookie: {name: lh, ttl: 1h}}");
    let proxy = start_proxy(&config).await;
    let first = post(proxy.address, "/run", "", "hi").await;
    let set = first.header("set-cookie").expect("a cookie is issued").to_owned();
    let lower = set.to_ascii_lowercase();
    assert!(lower.starts_with("lh=") && lower.contains("httponly") && lower.contains("samesite"), "{set}");
    let pair = set.split(';').next().expect("a pair").to_owned();
    for backend in &backends {
        assert!(!pair.contains(&backend.address().port().to_string()), "the address is not shown");
    }
    for _ in 0..5 {
        let answer = post(proxy.address, "/run", &format!("Cookie: own=1; {pair}; other=2\r\n"), "hi").await;
        assert_eq!((answer.text(), affinity(&answer)), (first.text(), "hit"));
    }
    let cookies: HashSet<Option<String>> = backends
        .iter()
        .flat_map(Backend::requests)
        .map(|request| request.header("cookie").map(|cookie| cookie.replace(' ', "")))
        .collect();
    assert_eq!(cookies, HashSet::from([None, Some("own=1;other=2".to_owned())]), "ours is removed, the client's stay");
    let forged = post(proxy.address, "/run", &format!("Cookie: {pair}x\r\n"), "hi").await;
    assert_eq!((affinity(&forged), forged.header("set-cookie").is_some()), ("new", true), "a forged one is none");
}

#[tokio::test]
async fn one_principals_pin_is_never_used_for_another() {
    let backends = several(2).await;
    let scoped = "[{header: x-session-id}], scope: [{header: authorization}]";
    let proxy = start_proxy(&pinned(&backends, "").replace("[{header: x-session-id}]", scoped)).await;
    let as_user = |user: &str| format!("X-Session-Id: shared\r\nAuthorization: Bearer {user}\r\n");
    assert_eq!(affinity(&post(proxy.address, "/run", &as_user("anna"), "hi").await), "new");
    assert_eq!(affinity(&post(proxy.address, "/run", &as_user("anna"), "hi").await), "hit");
    assert_eq!(affinity(&post(proxy.address, "/run", &as_user("mallory"), "hi").await), "new");
    assert_eq!(
        affinity(&post(proxy.address, "/run", "X-Session-Id: shared\r\n", "hi").await),
        "new",
        "nobody is a principal too"
    );
}

#[tokio::test]
async fn a_pin_that_saw_no_success_is_dropped() {
    let backends = several(1).await;
    let proxy = start_proxy(&pinned(&backends, "    outlier: {consecutive_failures: 0}\n")).await;
    backends[0].next(Script::status(500));
    assert_eq!(affinity(&run(&proxy, "anna").await), "new");
    assert_eq!(affinity(&run(&proxy, "anna").await), "new", "nothing held");
    assert_eq!(affinity(&run(&proxy, "anna").await), "hit", "a success holds");
    backends[0].next(Script::status(500));
    assert_eq!(affinity(&run(&proxy, "anna").await), "hit");
    assert_eq!(affinity(&run(&proxy, "anna").await), "hit", "a later failure takes nothing away");
}

#[tokio::test]
async fn affinity_hash_needs_no_table_and_none_keeps_nobody() {
    let backends = several(3).await;
    let hash = pinned(&backends, "").replace("session: {", "session: {affinity: hash, ");
    let (one, other) = (start_proxy(&hash).await, start_proxy(&hash).await);
    let mut homes = HashSet::new();
    for number in 0..50 {
        let session = format!("session-{number}");
        let answer = run(&one, &session).await;
        assert_eq!(affinity(&answer), "hit");
        assert_eq!(answer.text(), run(&other, &session).await.text(), "every replica agrees");
        homes.insert(answer.text());
    }
    assert_eq!(homes.len(), 3);
    let proxy = start_proxy(&pinned(&backends, "").replace("session: {", "session: {affinity: none, ")).await;
    let answers: Vec<Response> =
        [run(&proxy, "anna").await, run(&proxy, "anna").await, run(&proxy, "anna").await].into();
    assert!(answers.iter().all(|answer| affinity(answer) == "none"));
    assert_eq!(answers.iter().map(Response::text).collect::<HashSet<_>>().len(), 3, "ties rotate");
}

/// Two versions with these weights; the canary is chosen by a header too.
fn split(stable: &Backend, canary: &Backend, weights: (u32, u32)) -> String {
    format!(
        "services:\n  - name: support\n    session: {{key: [{{header: x-session-id}}]}}\n    versions:\n      \
         - {{name: stable, weight: {}, endpoints: [\"{}\"]}}\n      \
         - {{name: canary, weight: {}, endpoints: [\"{}\"], match: {{headers: {{x-canary: \"1\"}}}}}}\n",
        weights.0,
        stable.url(),
        weights.1,
        canary.url()
    )
}

#[tokio::test]
async fn weights_move_new_sessions_only_and_never_back() {
    let (stable, canary) = (named("stable").await, named("canary").await);
    let proxy = start_proxy(&split(&stable, &canary, (90, 10))).await;
    let mut homes = HashMap::new();
    for number in 0..400 {
        homes.insert(number, run(&proxy, &format!("session-{number}")).await.text());
    }
    let on_canary = homes.values().filter(|home| *home == "canary").count();
    // 40 expected; 3 sigma are 18.
    assert!((22..=58).contains(&on_canary), "{on_canary} of 400");
    for weights in [(50, 50), (100, 0), (0, 100)] {
        assert_eq!(proxy.reload(&split(&stable, &canary, weights)).await.status(), 200);
        for (number, home) in &homes {
            let answer = run(&proxy, &format!("session-{number}")).await;
            assert_eq!((answer.text(), affinity(&answer)), (home.clone(), "hit"), "at {weights:?}");
        }
    }
    for number in 0..20 {
        assert_eq!(run(&proxy, &format!("late-{number}")).await.text(), "canary", "all new ones");
    }
}

#[tokio::test]
async fn cohorts_are_monotone_and_alike_everywhere() {
    let (stable, canary) = (named("stable").await, named("canary").await);
    let mut before: HashSet<usize> = HashSet::new();
    for weight in [5, 20, 50, 90] {
        // A new proxy knows no pin: only the cohort decides.
        let proxy = start_proxy(&split(&stable, &canary, (100 - weight, weight))).await;
        let mut now = HashSet::new();
        for number in 0..200 {
            if run(&proxy, &format!("session-{number}")).await.text() == "canary" {
                now.insert(number);
            }
        }
        assert!(before.is_subset(&now), "raising the weight to {weight} moved a session back");
        before = now;
    }
}

#[tokio::test]
async fn a_match_chooses_the_version_of_new_sessions_also_at_weight_zero() {
    let (stable, canary) = (named("stable").await, named("canary").await);
    let proxy = start_proxy(&split(&stable, &canary, (100, 0))).await;
    let tester = "X-Session-Id: tester\r\nX-Canary: 1\r\n";
    assert_eq!(post(proxy.address, "/run", tester, "hi").await.text(), "canary");
    assert_eq!(run(&proxy, "tester").await.text(), "canary", "the session stays without the header");
    assert_eq!(run(&proxy, "anna").await.text(), "stable");
    let anna = "X-Session-Id: anna\r\nX-Canary: 1\r\n";
    assert_eq!(post(proxy.address, "/run", anna, "hi").await.text(), "stable", "a pin wins over a match");
    assert_eq!(post(proxy.address, "/run", "X-Canary: 1\r\n", "hi").await.text(), "canary", "keyless too");
}

#[tokio::test]
async fn a_version_without_ready_endpoint_leaves_its_sessions_to_the_others() {
    let stable = named("stable").await;
    let config = format!(
        "services:\n  - name: support\n    session: {{key: [{{header: x-session-id}}]}}\n    versions:\n      \
         - {{name: empty, weight: 90, endpoints: []}}\n      - {{name: stable, weight: 10, endpoints: [\"{}\"]}}\n",
        stable.url()
    );
    let proxy = start_proxy(&config).await;
    for number in 0..20 {
        assert_eq!(run(&proxy, &format!("session-{number}")).await.text(), "stable");
    }
}

#[tokio::test]
async fn a_draining_endpoint_finishes_its_runs_and_its_idle_sessions_move() {
    let backends = several(2).await;
    backends.iter().for_each(Backend::drip_each);
    let proxy = start_proxy(&pinned(&backends, "")).await;
    let (mut busy, busy_drip, home) = stream(&proxy, &backends, "X-Session-Id: busy\r\n").await;
    let (mut idle, idle_drip, other) = stream(&proxy, &backends, "X-Session-Id: idle\r\n").await;
    assert_ne!(home, other);
    idle_drip.finish().await;
    assert_eq!(idle.read_chunk().await, None);
    let address = backends[home].name();
    assert_eq!(proxy.drain("support", &address, false).await.status(), 200);
    assert_eq!(proxy.endpoint(&address).await.expect("still there")["state"], "draining");

    // The session with a run in hand stays, also with a second run.
    let (second, second_drip, stays) = stream(&proxy, &backends, "X-Session-Id: busy\r\n").await;
    assert_eq!(stays, home);
    drop((second, second_drip));
    busy_drip.event("still here").await;
    busy.read_chunks_until("still here").await;
    busy_drip.finish().await;
    assert_eq!(busy.read_chunk().await, None);
    proxy.metric_becomes("longhaul_endpoint_outstanding_runs", &[&format!("endpoint=\"{address}\"")], 0.0).await;

    backends.iter().for_each(|backend| backend.each(|_| Script::ok("ok")));
    let before = backends[home].request_count();
    assert_eq!(affinity(&run(&proxy, "busy").await), "moved");
    assert_eq!(affinity(&run(&proxy, "busy").await), "hit");
    for number in 0..10 {
        run(&proxy, &format!("new-{number}")).await;
    }
    assert_eq!(backends[home].request_count(), before, "no new session either");
    assert_eq!(proxy.drain("support", &address, true).await.status(), 200);
    for number in 10..20 {
        run(&proxy, &format!("new-{number}")).await;
    }
    assert!(backends[home].request_count() > before, "back again");
}

#[tokio::test]
async fn a_draining_endpoint_keeps_its_sessions_where_they_are_to_stay() {
    let backends = several(2).await;
    let config = pinned(&backends, "").replace("session: {", "session: {when_draining: stay, ");
    let proxy = start_proxy(&config).await;
    let home = run(&proxy, "anna").await.text();
    let backend = if home == "a" { &backends[0] } else { &backends[1] };
    proxy.drain("support", &backend.name(), false).await;
    let answer = run(&proxy, "anna").await;
    assert_eq!((answer.text(), affinity(&answer)), (home.clone(), "hit"));
    for number in 0..10 {
        assert_ne!(run(&proxy, &format!("new-{number}")).await.text(), home);
    }
}

#[tokio::test]
async fn sessions_of_a_removed_endpoint_are_lost_and_told_so() {
    for (when_lost, expected) in [("rebind", (200, "lost")), ("reject", (503, "lost"))] {
        let backends = several(2).await;
        let keys = format!("session: {{when_lost: {when_lost}, ");
        let config = pinned(&backends, "").replace("session: {", &keys);
        let proxy = start_proxy(&config).await;
        let home = run(&proxy, "anna").await.text();
        let left = if home == "a" { &backends[1..] } else { &backends[..1] };
        let smaller = pinned(left, "").replace("session: {", &keys);
        assert_eq!(proxy.reload(&smaller).await.status(), 200);
        let answer = run(&proxy, "anna").await;
        assert_eq!((answer.status(), affinity(&answer)), expected, "{when_lost}: {answer:?}");
        if when_lost == "reject" {
            assert_eq!(answer.code().as_deref(), Some("session_lost"));
        } else {
            assert_eq!(affinity(&run(&proxy, "anna").await), "hit");
        }
    }
}

#[tokio::test]
async fn a_run_on_a_removed_endpoint_goes_on() {
    let backends = several(2).await;
    backends.iter().for_each(Backend::drip_each);
    let proxy = start_proxy(&pinned(&backends, "")).await;
    let (mut client, drip, home) = stream(&proxy, &backends, "X-Session-Id: anna\r\n").await;
    let left = if home == 0 { &backends[1..] } else { &backends[..1] };
    assert_eq!(proxy.reload(&pinned(left, "")).await.status(), 200);
    drip.event("still here").await;
    client.read_chunks_until("still here").await;
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 1.0).await;
    drip.finish().await;
    assert_eq!(client.read_chunk().await, None);
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
}

#[tokio::test]
async fn a_full_endpoint_is_429_until_a_run_ends() {
    let backends = several(1).await;
    let gate = Gate::new();
    let held = gate.clone();
    backends[0].each(move |_| Script::ok("ok").after(&held));
    let proxy = start_proxy(&pinned(&backends, "    runs: {max_per_endpoint: 2}\n")).await;
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut client = proxy.connect().await;
        client.send("POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
        clients.push(client);
    }
    eventually("both are at work", || backends[0].in_flight() == 2).await;
    let full = post(proxy.address, "/run", "", "hi").await;
    assert_eq!((full.status(), full.code().as_deref()), (429, Some("queue_full")));
    assert!(full.header("retry-after").is_some());
    proxy.metric_becomes("longhaul_runs_total", &["version=\"\"", "outcome=\"rejected\""], 1.0).await;
    gate.open();
    for client in &mut clients {
        assert_eq!(client.read_response().await.status(), 200);
    }
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
    assert_eq!(post(proxy.address, "/run", "", "hi").await.status(), 200);
}

#[tokio::test]
async fn a_full_pin_is_told_as_a_hit() {
    let backends = several(2).await;
    backends.iter().for_each(Backend::drip_each);
    let proxy = start_proxy(&pinned(&backends, "    runs: {max_per_endpoint: 1}\n")).await;
    let (_client, drip, _) = stream(&proxy, &backends, "X-Session-Id: anna\r\n").await;
    drip.event("at work").await;
    let full = run(&proxy, "anna").await;
    assert_eq!((full.status(), affinity(&full)), (429, "hit"), "{full:?}");
    assert_eq!(full.code().as_deref(), Some("queue_full"));
    proxy.metric_becomes("longhaul_affinity_total", &["outcome=\"hit\""], 1.0).await;
}

#[tokio::test]
async fn a_drain_past_its_time_cuts_visibly() {
    for removed in [false, true] {
        let backends = several(2).await;
        backends.iter().for_each(Backend::drip_each);
        let more = "    drain: {timeout: 300ms}\n";
        let proxy = start_proxy(&pinned(&backends, more)).await;
        let (mut streaming, _first, home) = stream(&proxy, &backends, "X-Session-Id: anna\r\n").await;
        // One that has no answer yet, on the same endpoint.
        let gate = Gate::new();
        let held = gate.clone();
        backends[home].each(move |_| Script::ok("late").after(&held));
        let mut waiting = proxy.connect().await;
        waiting.send("POST /run HTTP/1.1\r\nHost: a\r\nX-Session-Id: anna\r\nContent-Length: 0\r\n\r\n").await;
        eventually("both are there", || backends[home].in_flight() == 2).await;
        let (mut other, other_drip, elsewhere) = stream(&proxy, &backends, "X-Session-Id: otto\r\n").await;
        assert_ne!(elsewhere, home);
        if removed {
            assert_eq!(proxy.reload(&pinned(&backends[elsewhere..=elsewhere], more)).await.status(), 200);
        } else {
            assert_eq!(proxy.drain("support", &backends[home].name(), false).await.status(), 200);
        }
        streaming.closed().await;
        let answer = waiting.read_response().await;
        assert_eq!((answer.status(), answer.code().as_deref()), (502, Some("upstream_reset")), "{answer:?}");
        proxy.metric_becomes("longhaul_runs_total", &["outcome=\"truncated\""], 1.0).await;
        proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 1.0).await;
        other_drip.finish().await;
        assert_eq!(other.read_chunk().await, None, "nobody else is cut");
    }
}

#[tokio::test]
async fn a_thousand_reloads_leave_nothing_behind() {
    let backends = several(2).await;
    let proxy = start_proxy(&pinned(&backends, "")).await;
    let config = |round: usize| {
        let own = format!("http://127.0.0.1:{}", 20_000 + round);
        pinned(&backends, "")
            .replace("name: stable", &format!("name: v{round}"))
            .replace("endpoints: [", &format!("endpoints: [\"{own}\", "))
    };
    let descriptors = || std::fs::read_dir("/proc/self/fd").expect("Linux").count();
    let mut series = 0;
    let mut before = 0;
    for round in 0..1_000 {
        assert_eq!(proxy.reload(&config(round)).await.status(), 200);
        if round == 200 {
            assert_eq!(run(&proxy, "anna").await.status(), 200);
            series = proxy.admin("GET", "/metrics").await.text().lines().count();
            before = descriptors();
        }
    }
    assert_eq!(run(&proxy, "anna").await.status(), 200);
    let text = proxy.admin("GET", "/metrics").await.text();
    assert!(text.lines().count() <= series + 60, "{series} lines became {}", text.lines().count());
    let endpoints = |text: &str| text.lines().filter(|line| line.starts_with("longhaul_endpoint_outstanding")).count();
    assert_eq!(endpoints(&text), 3, "those of removed endpoints vanish");
    // Other tests of this process have connections of their own.
    eventually("no descriptor is left", || descriptors() <= before + 50).await;
}

#[tokio::test]
async fn a_storm_of_reloads_ends_with_the_last_file() {
    let backends = several(2).await;
    backends.iter().for_each(Backend::drip_each);
    let proxy = start_proxy(&pinned(&backends, "")).await;
    let (mut client, drip, _) = stream(&proxy, &backends, "X-Session-Id: anna\r\n").await;
    let mut asking = tokio::task::JoinSet::new();
    for round in 0..100 {
        let admin = proxy.admin;
        asking.spawn(async move { ask_admin(admin, "POST", "/api/v1/reload").await.status() });
        if round % 10 == 0 {
            // Every second one is refused.
            let more = if round % 20 == 0 { format!("    slow_start: {round}s\n") } else { "    slow: 1\n".to_owned() };
            proxy.reload(&pinned(&backends, &more)).await;
        }
    }
    for status in asking.join_all().await {
        assert!(status == 200 || status == 400, "{status}");
    }
    assert_eq!(proxy.reload(&pinned(&backends, "    slow_start: 77s\n")).await.status(), 200);
    let effective = proxy.admin("GET", "/api/v1/config").await.text();
    assert!(effective.contains("77s"), "{effective}");
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 1.0).await;
    drip.event("still here").await;
    client.read_chunks_until("still here").await;
    drip.finish().await;
    assert_eq!(client.read_chunk().await, None);
}

#[tokio::test]
async fn a_bad_file_changes_nothing_and_the_same_meaning_is_no_new_generation() {
    let backends = several(1).await;
    let config = pinned(&backends, "");
    let proxy = start_proxy(&config).await;
    let generation = proxy.status().await["config"]["generation"].clone();
    let refused = proxy.reload(&format!("{config}    ballance: random\n")).await;
    assert_eq!(refused.status(), 400, "{refused:?}");
    assert!(refused.text().contains("ballance"), "{refused:?}");
    assert_eq!(run(&proxy, "anna").await.status(), 200);
    assert_eq!(proxy.admin("GET", "/readyz").await.status(), 200);
    assert!(!proxy.status().await["config"]["last_error"].is_null());
    proxy.metric_becomes("longhaul_config_last_reload_successful", &[], 0.0).await;
    assert_eq!(proxy.reload(&format!("# the same\n{config}")).await.status(), 200);
    assert_eq!(proxy.status().await["config"]["generation"], generation);
    proxy.metric_becomes("longhaul_config_last_reload_successful", &[], 1.0).await;
}

#[tokio::test]
async fn fifty_reloads_under_two_hundred_streams_lose_no_event_and_no_count() {
    const STREAMS: usize = 200;
    let backends = several(5).await;
    backends.iter().for_each(Backend::drip_each);
    let proxy = start_proxy(&pinned(&backends, "")).await;
    let mut open = Vec::new();
    for number in 0..STREAMS {
        open.push(stream(&proxy, &backends, &format!("X-Session-Id: session-{number}\r\n")).await);
    }
    for round in 0..50 {
        let reloaded = proxy.reload(&pinned(&backends, &format!("    slow_start: {}s\n", round + 1))).await;
        assert_eq!(reloaded.status(), 200);
        for (_, drip, _) in &open {
            drip.event(&format!("event-{round}")).await;
        }
        let outstanding = proxy.metric("longhaul_outstanding_runs", &["service=\"support\""]).await;
        assert_eq!(outstanding, Some(STREAMS as f64), "after reload {round}");
    }
    for (client, drip, _) in open {
        drip.finish().await;
        let text = String::from_utf8(read_body(client).await).expect("text");
        let expected: String = (0..50).map(|round| format!("data: event-{round}\n\n")).collect();
        assert_eq!(text, expected);
    }
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\""], STREAMS as f64).await;
}

async fn read_body(mut client: RawClient) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(chunk) = client.read_chunk().await {
        body.extend_from_slice(&chunk);
    }
    body
}

#[tokio::test]
async fn ten_thousand_runs_through_fifty_reloads_move_no_session_and_fail_nowhere() {
    const CLIENTS: usize = 20;
    const RUNS: usize = 10_000;
    const SESSIONS: usize = 1000;
    let backends = several(5).await;
    let proxy = start_proxy(&pinned(&backends, "")).await;
    let address = proxy.address;
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            tokio::spawn(async move {
                let mut connection = RawClient::connect(address).await;
                let mut homes: HashMap<usize, String> = HashMap::new();
                for number in 0..RUNS / CLIENTS {
                    // Each client has sessions of its own, so that it sees every move.
                    let session = client * (SESSIONS / CLIENTS) + number % (SESSIONS / CLIENTS);
                    let body = format!("run {number} of {client}");
                    let length = body.len();
                    let head = format!("POST /run HTTP/1.1\r\nHost: a\r\nX-Session-Id: session-{session}\r\n");
                    connection.send(format!("{head}Content-Length: {length}\r\n\r\n{body}")).await;
                    let answer = connection.read_response().await;
                    assert_eq!(answer.status(), 200, "{answer:?}");
                    let home = homes.entry(session).or_insert_with(|| answer.text());
                    assert_eq!(*home, answer.text(), "session-{session} moved");
                }
            })
        })
        .collect();
    for round in 0..50 {
        assert_eq!(proxy.reload(&pinned(&backends, &format!("    slow_start: {}s\n", round + 1))).await.status(), 200);
    }
    for client in clients {
        client.await.expect("no client failed");
    }
    assert_eq!(backends.iter().map(Backend::request_count).sum::<usize>(), RUNS);
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\""], RUNS as f64).await;
    assert_eq!(proxy.metric("longhaul_affinity_total", &["outcome=\"moved\""]).await.unwrap_or_default(), 0.0);
    assert_eq!(proxy.metric("longhaul_affinity_total", &["outcome=\"new\""]).await, Some(SESSIONS as f64));
}

#[tokio::test]
async fn counts_return_to_zero_after_aborts_of_either_side() {
    let backends = several(3).await;
    backends.iter().for_each(Backend::drip_each);
    let proxy = start_proxy(&pinned(&backends, "    outlier: {consecutive_failures: 0}\n")).await;
    for round in 0..60 {
        let headers = if round % 2 == 0 { format!("X-Session-Id: session-{}\r\n", round % 7) } else { String::new() };
        let (client, drip, _) = stream(&proxy, &backends, &headers).await;
        match round % 5 {
            0 => drop(client),
            1 => drip.cut().await,
            2 => drop((client, drip)),
            3 => {
                drip.event("one").await;
                drip.step(support::Step::Reset).await;
            }
            _ => drip.finish().await,
        }
    }
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"support\""], 0.0).await;
    for backend in &backends {
        eventually("no exchange is left", || backend.in_flight() == 0).await;
        let labels = [format!("endpoint=\"{}\"", backend.name())];
        proxy.metric_becomes("longhaul_endpoint_outstanding_runs", &[&labels[0]], 0.0).await;
    }
    proxy.metric_becomes("longhaul_runs_total", &["version=\"stable\""], 60.0).await;
}

#[tokio::test]
async fn failing_endpoints_are_ejected_and_a_lone_one_never_is() {
    let backends = several(2).await;
    backends[0].each(|_| Script::status(500));
    let proxy = start_proxy(&pinned(&backends, "    outlier: {consecutive_failures: 3, eject_for: 1m}\n")).await;
    let mut failures = 0;
    for _ in 0..40 {
        failures += usize::from(post(proxy.address, "/run", "", "hi").await.status() == 500);
    }
    assert_eq!(failures, 3);
    assert_eq!(proxy.endpoint(&backends[0].name()).await.expect("there")["state"], "ejected");
    let proxy = start_proxy(&pinned(&backends[..1], "    outlier: {consecutive_failures: 3, eject_for: 1m}\n")).await;
    for _ in 0..10 {
        assert_eq!(post(proxy.address, "/run", "", "hi").await.status(), 500);
    }
}

#[tokio::test]
async fn health_checks_take_an_endpoint_out_and_back() {
    let mut backends = several(2).await;
    let health = "    health: {path: /health, interval: 50ms, timeout: 1s, unhealthy_after: 2, healthy_after: 2}\n";
    let proxy = start_proxy(&pinned(&backends, health)).await;
    let state = async |name: &str| proxy.endpoint(name).await.map(|endpoint| endpoint["state"].clone());
    for backend in &backends {
        support::eventually_async("it is ready", || async { state(&backend.name()).await == Some("ready".into()) })
            .await;
    }
    backends[0].refuse().await;
    backends[0].cut_connections();
    let name = backends[0].name();
    support::eventually_async("it is unhealthy", || async { state(&name).await == Some("unhealthy".into()) }).await;
    for _ in 0..10 {
        assert_eq!(post(proxy.address, "/run", "", "hi").await.text(), "b");
    }
    backends[0].resume().await;
    support::eventually_async("it is back", || async { state(&name).await == Some("ready".into()) }).await;
}

#[tokio::test]
async fn sigterm_with_open_streams_loses_none() {
    let backends = several(2).await;
    backends.iter().for_each(Backend::drip_each);
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("longhaul.yaml");
    // Ports that were free a moment ago: the program prints what it listens on, in words that this test does not fix.
    let (address, admin) = (free_port(), free_port());
    let text = format!(
        "listeners: [{{address: \"{address}\"}}]\nadmin: {{address: \"{admin}\"}}\nshutdown: {{delay: 300ms, timeout: 1m}}\n{}",
        pinned(&backends, "")
    );
    std::fs::write(&file, text).expect("writable");
    let mut program = Program::start(&["run", "-c", file.to_str().expect("UTF-8")]);
    eventually_within(std::time::Duration::from_secs(20), "it listens", || {
        std::net::TcpStream::connect(address).is_ok()
    })
    .await;

    let mut open = Vec::new();
    for _ in 0..20 {
        let mut client = RawClient::connect(address).await;
        client.send("POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
        assert_eq!(client.read_head().await.status, 200);
        open.push(client);
    }
    let mut drips = Vec::new();
    for backend in &backends {
        for _ in 0..backend.in_flight() {
            drips.push(backend.drip().await);
        }
    }
    assert_eq!(drips.len(), 20);
    let mut old = RawClient::connect(address).await;
    old.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    program.signal("TERM");
    support::eventually_async("readiness says so", || async {
        ask_admin(admin, "GET", "/readyz").await.status() == 503
    })
    .await;
    eventually("the listener closes", || std::net::TcpStream::connect(address).is_err()).await;
    for drip in drips {
        drip.event("to the end").await;
        drip.finish().await;
    }
    for client in open {
        assert_eq!(read_body(client).await, b"data: to the end\n\n");
    }
    // The exchange that came before the signal is served too.
    assert_eq!(old.read_head().await.status, 200);
    drop(old);
    assert!(program.ended().await.success(), "{:#?}", program.lines());
}

fn free_port() -> std::net::SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
    listener.local_addr().expect("bound")
}

#[tokio::test]
async fn the_operators_drain_survives_a_reload() {
    let backends = several(2).await;
    let proxy = start_proxy(&pinned(&backends, "")).await;
    let name = backends[0].name();
    proxy.drain("support", &name, false).await;
    assert_eq!(proxy.reload(&pinned(&backends, "    slow_start: 1s\n")).await.status(), 200);
    assert_eq!(proxy.endpoint(&name).await.expect("there")["state"], "draining");
    for _ in 0..10 {
        assert_eq!(post(proxy.address, "/run", "", "hi").await.text(), "b");
    }
}
