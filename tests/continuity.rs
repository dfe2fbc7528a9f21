//! Continuity: reloads, removals and aborts under load: nothing is lost, nothing moves, every count is exact.

mod support;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use longhaul::state::status::EndpointState;
use support::{
    Backend, Body, Drip, Gate, Proxy, Random, RawClient, Response, Script, Step, eventually, eventually_within, get,
    post, start_proxy,
};
use tokio::task::JoinSet;

async fn named(count: usize) -> Vec<Backend> {
    let backends = Backend::start_several(count).await;
    for (number, backend) in backends.iter().enumerate() {
        backend.each(move |_| Script::ok(&format!("backend {number}")));
    }
    backends
}

fn urls(backends: &[Backend]) -> String {
    backends.iter().map(|backend| format!("\"{}\"", backend.url())).collect::<Vec<_>>().join(", ")
}

/// Sessions by header, one version.
fn stable(backends: &[Backend], more: &str) -> String {
    format!(
        "services:\n  - name: support\n    session: {{key: [{{header: x-session-id}}]}}\n    \
         versions: [{{name: stable, endpoints: [{}]}}]\n{more}",
        urls(backends)
    )
}

/// Sessions by header, two versions.
fn split(stable: &[Backend], canary: &[Backend], weights: (u32, u32), more: &str) -> String {
    format!(
        "services:\n  - name: support\n    session: {{key: [{{header: x-session-id}}]}}\n    versions:\n      \
         - {{name: stable, weight: {}, endpoints: [{}]}}\n      \
         - {{name: canary, weight: {}, endpoints: [{}], match: {{headers: {{x-canary: \"1\"}}}}}}\n{more}",
        weights.0,
        urls(stable),
        weights.1,
        urls(canary)
    )
}

/// Outstanding runs and open exchanges at each backend.
fn loads(proxy: &Proxy, backends: &[Backend]) -> Vec<(usize, usize)> {
    let endpoints: Vec<_> = proxy.state().versions.into_iter().flat_map(|version| version.endpoints).collect();
    let load = |backend: &Backend| {
        let of = endpoints.iter().find(|endpoint| endpoint.address == backend.name());
        of.map_or((0, 0), |endpoint| (endpoint.outstanding_runs as usize, endpoint.open_exchanges as usize))
    };
    backends.iter().map(load).collect()
}

fn standing(proxy: &Proxy, backend: &Backend) -> Option<EndpointState> {
    let mut endpoints = proxy.state().versions.into_iter().flat_map(|version| version.endpoints);
    endpoints.find(|endpoint| endpoint.address == backend.name()).map(|endpoint| endpoint.state)
}

fn idle(proxy: &Proxy, backends: &[Backend]) -> bool {
    loads(proxy, backends).iter().all(|load| *load == (0, 0))
}

async fn reload(proxy: &Proxy, config: &str) -> u64 {
    let answer = proxy.reload(config).await;
    assert_eq!(answer.status(), 200, "{}", answer.text());
    answer.json()["generation"].as_u64().expect("a number")
}

async fn run_in(proxy: &Proxy, session: &str, headers: &str) -> Response {
    post(proxy.address, "/run", &format!("X-Session-Id: {session}\r\n{headers}"), "hi").await
}

fn affinity(answer: &Response) -> &str {
    answer.header("longhaul-affinity").expect("on every response")
}

/// The events of a body so far, as `data: ` lines.
fn events(body: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(body);
    text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).map(str::to_owned).collect()
}

/// A stream that is open, and its endpoint's end of it.
async fn open_stream(proxy: &Proxy, backends: &[Backend], headers: &str) -> (RawClient, Drip, usize) {
    let before: Vec<usize> = backends.iter().map(Backend::request_count).collect();
    let mut client = proxy.connect().await;
    client.send(format!("POST /run HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: 2\r\n\r\nhi")).await;
    assert_eq!(client.read_head().await.status, 200);
    let chosen = (0..backends.len()).find(|number| backends[*number].request_count() > before[*number]);
    let chosen = chosen.expect("one got it");
    (client, backends[chosen].drip().await, chosen)
}

#[tokio::test]
async fn fifty_reloads_under_two_hundred_streams_lose_no_event_and_no_count() {
    const STREAMS: usize = 200;
    const RELOADS: usize = 50;
    let backends = Backend::start_several(4).await;
    backends.iter().for_each(Backend::drip_each);
    let proxy = start_proxy(&stable(&backends[..3], "")).await;
    let mut drips = Vec::new();
    let mut readers = JoinSet::new();
    for number in 0..STREAMS {
        // Half of them are sessions.
        let headers = if number % 2 == 0 { format!("X-Session-Id: s-{number}\r\n") } else { String::new() };
        let (mut client, drip, _) = open_stream(&proxy, &backends, &headers).await;
        drips.push(drip);
        readers.spawn(async move {
            let mut body = Vec::new();
            while let Some(data) = client.read_chunk().await {
                body.extend_from_slice(&data);
            }
            // A cut would have left the connection closed.
            client.send("GET /after HTTP/1.1\r\nHost: a\r\n\r\n").await;
            assert_eq!(client.read_response().await.text(), "served on");
            events(&body)
        });
    }
    let mut generation = 1;
    for round in 0..RELOADS {
        for drip in &drips {
            drip.event(&round.to_string()).await;
        }
        // Endpoints come and go, and so do settings that concern each stream.
        let config = match round % 3 {
            0 => stable(&backends, ""),
            1 => stable(&backends[1..], &format!("    timeouts: {{idle: {}m}}\n", 10 + round)),
            _ => stable(&backends[..3], "    runs: {max_per_endpoint: 1}\n"),
        };
        let next = reload(&proxy, &config).await;
        assert!(next > generation, "it took effect");
        generation = next;
        assert_eq!(proxy.outstanding(), STREAMS as u64, "after reload {round}");
        let metric = proxy.metric("longhaul_outstanding_runs", &["service=\"support\""]).await;
        assert_eq!(metric, Some(STREAMS as f64), "after reload {round}");
    }
    for backend in &backends {
        backend.each(|_| Script::ok("served on"));
    }
    for drip in drips {
        drip.finish().await;
    }
    let expected: Vec<String> = (0..RELOADS).map(|round| round.to_string()).collect();
    let mut complete = 0;
    while let Some(seen) = readers.join_next().await {
        assert_eq!(seen.expect("no panic"), expected, "every event, in order");
        complete += 1;
    }
    println!("{complete} streams, {RELOADS} reloads: {} events, none lost", complete * RELOADS);
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\""], STREAMS as f64).await;
    assert_eq!(proxy.metric("longhaul_runs_total", &[]).await, Some(STREAMS as f64));
}

/// What the runs of a batch wait for, in the middle of their answers.
type Current = Arc<Mutex<Gate>>;

/// Each request's answer: an event that repeats the request, then, when the gate opens, an event that ends it.
fn answer_in_two(backend: &Backend, name: usize, current: &Current) {
    let current = Arc::clone(current);
    backend.each(move |request| {
        let gate = current.lock().expect("no panic").clone();
        let said = request.header("x-number").unwrap_or("?").to_owned();
        let session = request.header("x-session-id").unwrap_or("?").to_owned();
        Script(vec![
            Step::ReadBody,
            Step::Head {
                status: 200,
                headers: vec![("content-type".into(), "text/event-stream".into())],
                body: Body::Chunked,
            },
            Step::Data(format!("data: {name} {session} {said}\n\n").into()),
            Step::Wait(gate),
            Step::Data(format!("data: end {said}\n\n").into()),
            Step::End,
        ])
    });
}

#[tokio::test]
async fn ten_thousand_runs_of_a_thousand_sessions_through_fifty_reloads() {
    const CLIENTS: usize = 100;
    const SESSIONS: usize = 1000;
    const ROUNDS: usize = 10;
    const RELOADS: usize = 50;
    let backends = Backend::start_several(5).await;
    let current: Current = Arc::new(Mutex::new(Gate::new()));
    for (name, backend) in backends.iter().enumerate() {
        answer_in_two(backend, name, &current);
    }
    let config = |number: usize| {
        let more = format!("    timeouts: {{idle: {}s}}\n", 600 + number);
        split(&backends[..4], &backends[4..], (100, (number * 7 % 100) as u32), &more)
    };
    let proxy = start_proxy(&config(20)).await;
    let started = longhaul::ids::now();
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(proxy.connect().await);
    }
    let mut homes: HashMap<usize, String> = HashMap::new();
    let (mut moved, mut failed, mut lost, mut inexact, mut reloads, mut checks) = (0, 0, 0, 0, 0, 0);
    for batch in 0..ROUNDS * SESSIONS / CLIENTS {
        let round = batch * CLIENTS / SESSIONS;
        let gate = Gate::new();
        *current.lock().expect("no panic") = gate.clone();
        let session = |client: usize| (batch * CLIENTS + client) % SESSIONS;
        for (number, client) in clients.iter_mut().enumerate() {
            let request = format!(
                "POST /run HTTP/1.1\r\nHost: a\r\nX-Session-Id: session-{}\r\nX-Number: {round}\r\nContent-Length: 2\r\n\r\nhi",
                session(number)
            );
            client.send(request).await;
        }
        for (number, client) in clients.iter_mut().enumerate() {
            let head = client.read_head().await;
            let expected = if round == 0 { "new" } else { "hit" };
            failed += usize::from(head.status != 200);
            moved += usize::from(head.header("longhaul-affinity") != Some(expected));
            let first = client.read_chunks_until("\n\n").await;
            let Some((home, rest)) = first.trim_start_matches("data: ").split_once(' ') else { panic!("{first:?}") };
            moved += usize::from(*homes.entry(session(number)).or_insert_with(|| home.to_owned()) != home);
            lost += usize::from(rest != format!("session-{} {round}\n\n", session(number)));
        }
        // All are in the middle of their answers: 100 runs are outstanding, and where they are.
        let mut check = async |expected: usize| {
            let total = proxy.metric("longhaul_outstanding_runs", &["service=\"support\""]).await;
            checks += 1;
            inexact += usize::from(total != Some(expected as f64) || proxy.outstanding() != expected as u64);
        };
        check(CLIENTS).await;
        let there: Vec<(usize, usize)> = backends.iter().map(|backend| (backend.in_flight(), 0)).collect();
        assert_eq!(loads(&proxy, &backends), there, "each endpoint's count");
        if batch % 2 == 1 && reloads < RELOADS {
            reload(&proxy, &config(batch + 21)).await;
            reloads += 1;
            check(CLIENTS).await;
        }
        gate.open();
        for client in &mut clients {
            let end = client.read_chunks_until("\n\n").await;
            lost += usize::from(end != format!("data: end {round}\n\n"));
            lost += usize::from(client.read_chunk().await.is_some());
        }
        check(0).await;
    }
    let elapsed = started.elapsed();
    // Each session's runs arrived in their order, at one endpoint.
    let mut reordered = 0;
    let mut next: HashMap<String, usize> = HashMap::new();
    for request in backends.iter().flat_map(Backend::requests) {
        let number: usize = request.header("x-number").and_then(|text| text.parse().ok()).expect("a number");
        let due = next.entry(request.header("x-session-id").expect("a session").to_owned()).or_default();
        reordered += usize::from(*due != number);
        *due += 1;
    }
    let runs: usize = next.values().sum();
    println!(
        "{runs} runs in {} sessions over {} endpoints with {reloads} reloads: {moved} moved, {failed} failed, {lost} lost, \
         {reordered} reordered; outstanding runs exact in {} of {checks} checks; {:.1} s",
        homes.len(),
        backends.len(),
        checks - inexact,
        elapsed.as_secs_f64()
    );
    assert_eq!((runs, homes.len(), reloads), (ROUNDS * SESSIONS, SESSIONS, RELOADS));
    assert_eq!((moved, failed, lost, reordered, inexact), (0, 0, 0, 0, 0));
    assert_eq!(homes.values().collect::<HashSet<_>>().len(), 5, "all endpoints have sessions");
    let completed = proxy.metric("longhaul_runs_total", &["outcome=\"completed\""]).await;
    assert_eq!(completed, Some((ROUNDS * SESSIONS) as f64));
    assert_eq!(proxy.metric("longhaul_runs_total", &[]).await, completed);
    assert_eq!(proxy.metric("longhaul_sessions", &["service=\"support\""]).await, Some(SESSIONS as f64));
}

#[tokio::test]
async fn fifty_unpinned_runs_on_five_idle_endpoints_lie_ten_on_each() {
    let backends = Backend::start_several(5).await;
    backends.iter().for_each(Backend::drip_each);
    let proxy = start_proxy(&stable(&backends, "")).await;
    // Started at once, from as many connections.
    let mut starting = JoinSet::new();
    for _ in 0..50 {
        let address = proxy.address;
        starting.spawn(async move {
            let mut client = RawClient::connect(address).await;
            client.send("POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
            assert_eq!(client.read_head().await.status, 200);
            client
        });
    }
    let open = starting.join_all().await;
    assert_eq!(loads(&proxy, &backends), vec![(10, 0); 5]);
    assert!(backends.iter().all(|backend| backend.in_flight() == 10));
    drop(open);
    eventually("all counts are zero", || idle(&proxy, &backends)).await;
}

#[tokio::test]
async fn pins_hold_over_a_thousand_sessions_and_through_reloads() {
    const SESSIONS: usize = 1000;
    let backends = named(4).await;
    let proxy = start_proxy(&stable(&backends, "")).await;
    let mut homes: HashMap<usize, String> = HashMap::new();
    let mut client = proxy.connect().await;
    for round in 0..4 {
        for number in 0..SESSIONS {
            client.send(format!("GET /state?{round} HTTP/1.1\r\nHost: a\r\nX-Session-Id: {number}\r\n\r\n")).await;
            let answer = client.read_response().await;
            assert_eq!(affinity(&answer), if round == 0 { "new" } else { "hit" });
            assert_eq!(*homes.entry(number).or_insert_with(|| answer.text()), answer.text(), "session {number}");
        }
        // The same endpoints in another order, with other weights, and one more.
        let mut order: Vec<&Backend> = backends.iter().collect();
        order.rotate_left(round + 1);
        let endpoints: Vec<String> =
            order.iter().map(|backend| format!("{{url: \"{}\", weight: {}}}", backend.url(), round + 2)).collect();
        reload(&proxy, &stable(&[], "").replace("endpoints: []", &format!("endpoints: [{}]", endpoints.join(", "))))
            .await;
    }
    let mut sizes: Vec<usize> = backends.iter().map(Backend::request_count).collect();
    sizes.sort_unstable();
    assert!(sizes[3] - sizes[0] <= 4 * 4, "sessions are spread evenly, by the weight of their placement: {sizes:?}");
}

#[tokio::test]
async fn sessions_are_split_by_the_weights_of_versions() {
    const SESSIONS: usize = 2000;
    let backends = named(3).await;
    for (stable, canary) in [(95, 5), (70, 30)] {
        let proxy = start_proxy(&split(&backends[..2], &backends[2..], (stable, canary), "")).await;
        let mut client = proxy.connect().await;
        let mut at_canary = 0;
        for number in 0..SESSIONS {
            client.send(format!("GET / HTTP/1.1\r\nHost: a\r\nX-Session-Id: user-{number}\r\n\r\n")).await;
            at_canary += usize::from(client.read_response().await.text() == "backend 2");
        }
        let share = f64::from(canary) / 100.0;
        let expected = SESSIONS as f64 * share;
        let sigma = (expected * (1.0 - share)).sqrt();
        let off = (at_canary as f64 - expected) / sigma;
        println!("{at_canary} of {SESSIONS} sessions at a canary of {canary} %: {off:.2} sigma");
        assert!(off.abs() <= 4.0, "{at_canary} of {SESSIONS} at {canary} %");
    }
}

#[tokio::test]
async fn counts_return_to_zero_after_random_aborts_of_both_sides() {
    const STREAMS: u64 = 300;
    for seed in 1..=3 {
        let mut random = Random(seed);
        let backends = Backend::start_several(3).await;
        let never = Gate::new();
        for backend in &backends {
            let never = never.clone();
            backend.each(move |request| {
                // The client says how its endpoint is to end.
                let head = Step::Head { status: 200, headers: vec![], body: Body::Chunked };
                let data = Step::Data(vec![b'x'; 1000]);
                match request.header("x-end").unwrap_or_default() {
                    "reset-early" => Script(vec![Step::Reset]),
                    "reset-before" => Script(vec![Step::ReadBody, Step::Reset]),
                    "close-before" => Script(vec![Step::ReadBody, Step::Close]),
                    "reset-within" => Script(vec![Step::ReadBody, head, data, Step::Reset]),
                    "close-within" => Script(vec![Step::ReadBody, head, data, Step::Close]),
                    "half-head" => Script::raw("HTTP/1.1 200 OK\r\nContent-"),
                    "nonsense" => Script::raw("HTTP/1.1 2x0 OK\r\n\r\n"),
                    "bad-chunk" => {
                        Script::raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\nzz\r\n")
                    }
                    "silent" => Script::ok("never").after(&never),
                    "open" => Script(vec![Step::ReadBody, head, data, Step::Wait(never.clone())]),
                    _ => Script(vec![Step::ReadBody, head, data, Step::End]),
                }
            });
        }
        let more = "    outlier: {consecutive_failures: 0}\n    timeouts: {first_byte: 1s, idle: 1s}\n";
        let proxy = start_proxy(&stable(&backends, more)).await;
        let mut aborting = JoinSet::new();
        for number in 0..STREAMS {
            let ends = [
                "reset-early",
                "reset-before",
                "close-before",
                "reset-within",
                "close-within",
                "half-head",
                "nonsense",
                "bad-chunk",
                "silent",
                "open",
                "whole",
            ];
            let end = ends[random.below(ends.len() as u64) as usize];
            let method = ["POST", "PUT", "GET"][random.below(3) as usize];
            let session = match random.below(2) {
                0 => format!("X-Session-Id: s-{}\r\n", random.below(40)),
                _ => String::new(),
            };
            let body = if method == "GET" { String::new() } else { "b".repeat(random.below(4000) as usize) };
            let wire = format!(
                "{method} /{number} HTTP/1.1\r\nHost: a\r\nX-End: {end}\r\n{session}Content-Length: {}\r\n\r\n{body}",
                body.len()
            );
            // Leaves within the request, at once after it, after the head, or stays to the end.
            let leaves = random.below(4);
            let cut = random.below(wire.len() as u64) as usize;
            let address = proxy.address;
            aborting.spawn(async move {
                let mut client = RawClient::connect(address).await;
                let sent = if leaves == 0 { &wire[..cut] } else { &wire };
                if client.try_send(sent).await.is_err() || leaves <= 1 {
                    return;
                }
                let head = client.try_read_head().await;
                if leaves == 3 && head.is_ok() && !matches!(end, "silent" | "open") {
                    let _ = tokio::time::timeout(Duration::from_secs(1), client.closed()).await;
                }
            });
        }
        while let Some(ended) = aborting.join_next().await {
            ended.expect("no panic");
        }
        eventually_within(Duration::from_secs(10), "all counts are zero", || idle(&proxy, &backends)).await;
        let open = &proxy.app.running.open_exchanges;
        eventually("no exchange is open", || open.get() == 0).await;
        assert_eq!(proxy.metric("longhaul_outstanding_runs", &["service=\"support\""]).await, Some(0.0));
        proxy.metric_becomes("longhaul_connections", &[], 0.0).await;
        let now = longhaul::ids::now();
        assert_eq!(proxy.dispatcher().runs(None, 10, now), []);
        assert!(proxy.dispatcher().sessions(None, 1000, now).iter().all(|session| session.confirmed));
        eventually("the endpoints know it", || backends.iter().all(|backend| backend.in_flight() == 0)).await;
        // And it works on.
        assert_eq!(post(proxy.address, "/", "X-End: whole\r\n", "hi").await.status(), 200);
    }
}

#[tokio::test]
async fn a_match_reaches_weight_zero_and_weight_zero_keeps_its_sessions() {
    let backends = named(2).await;
    let (stable, canary) = backends.split_at(1);
    let proxy = start_proxy(&split(stable, canary, (100, 0), "")).await;
    for number in 0..20 {
        assert_eq!(run_in(&proxy, &format!("plain-{number}"), "").await.text(), "backend 0");
        let matched = run_in(&proxy, &format!("matched-{number}"), "X-Canary: 1\r\n").await;
        assert_eq!((matched.text().as_str(), affinity(&matched)), ("backend 1", "new"));
    }
    assert_eq!(post(proxy.address, "/run", "X-Canary: 1\r\n", "hi").await.text(), "backend 1", "without a session too");
    assert_eq!(get(proxy.address, "/", "X-Canary: 2\r\n").await.text(), "backend 0");
    // A pin wins over a match, either way.
    assert_eq!(run_in(&proxy, "plain-1", "X-Canary: 1\r\n").await.text(), "backend 0");
    assert_eq!(run_in(&proxy, "matched-1", "").await.text(), "backend 1");

    let proxy = start_proxy(&split(stable, canary, (0, 100), "")).await;
    for number in 0..20 {
        assert_eq!(run_in(&proxy, &format!("s-{number}"), "").await.text(), "backend 1");
    }
    reload(&proxy, &split(stable, canary, (100, 0), "")).await;
    for number in 0..20 {
        let answer = run_in(&proxy, &format!("s-{number}"), "").await;
        assert_eq!((answer.text().as_str(), affinity(&answer)), ("backend 1", "hit"), "weights are for new sessions");
        assert_eq!(run_in(&proxy, &format!("t-{number}"), "").await.text(), "backend 0");
    }
}

#[tokio::test]
async fn a_removed_endpoint_finishes_its_stream_and_its_sessions_move_at_their_next_start() {
    let backends = Backend::start_several(2).await;
    backends.iter().for_each(Backend::drip_each);
    let proxy = start_proxy(&stable(&backends[..1], "")).await;
    let finish = async |client: &mut RawClient, drip: Drip| {
        drip.finish().await;
        while client.read_chunk().await.is_some() {}
    };
    let (mut client, drip, _) = open_stream(&proxy, &backends, "X-Session-Id: idle\r\n").await;
    finish(&mut client, drip).await;
    let (mut busy, drip, _) = open_stream(&proxy, &backends, "X-Session-Id: busy\r\n").await;
    reload(&proxy, &stable(&backends[1..], "")).await;
    assert_eq!(standing(&proxy, &backends[0]), Some(EndpointState::Draining));
    for number in 0..5 {
        drip.event(&number.to_string()).await;
        busy.read_chunks_until(&format!("data: {number}\n\n")).await;
    }
    // A session with a run there stays there; an idle one moves when it starts its next, and only then.
    let (mut second, second_drip, chosen) = open_stream(&proxy, &backends, "X-Session-Id: busy\r\n").await;
    assert_eq!(chosen, 0, "with its outstanding run");
    let mut read = proxy.connect().await;
    read.send("GET /state HTTP/1.1\r\nHost: a\r\nX-Session-Id: idle\r\n\r\n").await;
    let head = read.read_head().await;
    assert_eq!(head.header("longhaul-affinity"), Some("hit"), "no start");
    finish(&mut read, backends[0].drip().await).await;
    let mut moving = proxy.connect().await;
    moving.send("POST /run HTTP/1.1\r\nHost: a\r\nX-Session-Id: idle\r\nContent-Length: 2\r\n\r\nhi").await;
    assert_eq!(moving.read_head().await.header("longhaul-affinity"), Some("moved"));
    finish(&mut moving, backends[1].drip().await).await;
    assert_eq!(standing(&proxy, &backends[0]), Some(EndpointState::Draining));
    finish(&mut busy, drip).await;
    finish(&mut second, second_drip).await;
    // Its last run is over: gone, and what still was pinned there is lost.
    assert!(matches!(standing(&proxy, &backends[0]), None | Some(EndpointState::Gone)));
    let mut after = proxy.connect().await;
    after.send("POST /run HTTP/1.1\r\nHost: a\r\nX-Session-Id: busy\r\nContent-Length: 2\r\n\r\nhi").await;
    assert_eq!(after.read_head().await.header("longhaul-affinity"), Some("lost"));
    finish(&mut after, backends[1].drip().await).await;
    assert!(idle(&proxy, &backends));
    eventually("its connections are closed", || backends[0].open_connections() == 0).await;
    proxy.metric_becomes("longhaul_affinity_total", &["outcome=\"moved\""], 1.0).await;
    proxy.metric_becomes("longhaul_affinity_total", &["outcome=\"lost\""], 1.0).await;
}

#[tokio::test]
async fn stay_keeps_sessions_at_a_draining_endpoint_until_it_is_gone() {
    let backends = Backend::start_several(2).await;
    let keeping = |backends: &[Backend], when_lost: &str| {
        let session = format!("{{key: [{{header: x-session-id}}], when_draining: stay, when_lost: {when_lost}}}");
        stable(backends, "").replace("{key: [{header: x-session-id}]}", &session)
    };
    for (when_lost, status, outcome) in [("rebind", 200, "lost"), ("reject", 503, "lost")] {
        for backend in &backends {
            backend.each(|_| Script::ok("ok"));
        }
        let proxy = start_proxy(&keeping(&backends[..1], when_lost)).await;
        assert_eq!(run_in(&proxy, "anna", "").await.status(), 200);
        backends[0].drip_each();
        let (mut client, drip, _) = open_stream(&proxy, &backends, "").await;
        backends[0].each(|_| Script::ok("ok"));
        reload(&proxy, &keeping(&backends[1..], when_lost)).await;
        for _ in 0..3 {
            assert_eq!(affinity(&run_in(&proxy, "anna", "").await), "hit");
        }
        let before = backends[1].request_count();
        assert_eq!(affinity(&run_in(&proxy, "new", "").await), "new");
        assert_eq!(backends[1].request_count(), before + 1, "new sessions go elsewhere");
        drip.finish().await;
        assert!(client.read_chunk().await.is_none());
        let answer = run_in(&proxy, "anna", "").await;
        assert_eq!((answer.status(), affinity(&answer)), (status, outcome), "{when_lost}");
        if when_lost == "reject" {
            assert_eq!(answer.code().as_deref(), Some("session_lost"));
            let again = run_in(&proxy, "anna", "").await;
            assert_eq!(again.code().as_deref(), Some("session_lost"), "until somebody forgets it");
        } else {
            assert_eq!(affinity(&run_in(&proxy, "anna", "").await), "hit");
        }
    }
}

#[tokio::test]
async fn an_operators_drain_moves_idle_sessions_and_survives_reloads() {
    let backends = named(3).await;
    let proxy = start_proxy(&stable(&backends, "")).await;
    let home = run_in(&proxy, "anna", "").await.text();
    let number: usize = home.trim_start_matches("backend ").parse().expect("a number");
    assert_eq!(proxy.drain("support", &backends[number].name(), false).await.status(), 200);
    reload(&proxy, &stable(&backends, "    timeouts: {idle: 1m}\n")).await;
    assert_eq!(standing(&proxy, &backends[number]), Some(EndpointState::Draining));
    let answer = run_in(&proxy, "anna", "").await;
    assert_eq!(affinity(&answer), "moved");
    assert_ne!(answer.text(), home);
    for other in 0..12 {
        assert_ne!(run_in(&proxy, &format!("s-{other}"), "").await.text(), home);
    }
    assert_eq!(proxy.drain("support", &backends[number].name(), true).await.status(), 200);
    assert_eq!(standing(&proxy, &backends[number]), Some(EndpointState::Ready));
    assert_eq!(affinity(&run_in(&proxy, "anna", "").await), "hit", "it does not move back");
}
