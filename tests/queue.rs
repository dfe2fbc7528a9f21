//! The queue: starts that wait for a slot, or for an endpoint, and what becomes of them.

mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use support::{
    Backend, Certificate, Counting, Drip, Proxy, Random, RawClient, Response, Seen, eventually_async, get, post,
    start_proxy,
};

/// A service of these endpoints with a limit of runs for each.
fn config(urls: &[String], limit: usize, more: &str) -> String {
    let urls: Vec<String> = urls.iter().map(|url| format!("\"{url}\"")).collect();
    format!(
        "services:\n  - name: agents\n    agent_protocol: http\n    runs: {{max_per_endpoint: {limit}{more}}}\n    \
         versions: [{{name: stable, endpoints: [{}]}}]\n",
        urls.join(", ")
    )
}

async fn queued(proxy: &Proxy, runs: f64) {
    proxy.metric_becomes("longhaul_queued_runs", &["service=\"agents\""], runs).await;
}

fn start(headers: &str) -> String {
    format!("POST /run HTTP/1.1\r\nHost: agents.test\r\nContent-Length: 2\r\n{headers}\r\n{{}}")
}

/// A client that has sent its start, once the proxy has it in its queue as the `count`th.
async fn waiting_client(proxy: &Proxy, headers: &str, count: f64) -> RawClient {
    let mut client = proxy.connect().await;
    client.send(start(headers)).await;
    queued(proxy, count).await;
    client
}

/// A backend whose only slot, by the proxy's limit, is taken by the run of a first client; `more` are further settings of
/// runs.
async fn full(more: &str) -> (Backend, Proxy, RawClient, Drip) {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&config(&[backend.url().to_owned()], 1, more)).await;
    let mut first = proxy.connect().await;
    first.send(start("")).await;
    let running = backend.drip().await;
    (backend, proxy, first, running)
}

#[tokio::test]
async fn a_start_waits_for_a_slot_and_is_counted_while_it_does() {
    let (backend, proxy, mut first, running) = full(", queue: {max: 2}").await;
    let mut second = waiting_client(&proxy, "", 1.0).await;
    let mut third = waiting_client(&proxy, "", 2.0).await;
    let refused = post(proxy.address, "/run", "", "{}").await;
    assert_eq!((refused.status(), refused.code().as_deref()), (429, Some("queue_full")));
    assert!(refused.header("retry-after").expect("a time").parse::<u32>().expect("seconds") >= 1);
    let status = &proxy.status().await["services"][0];
    assert_eq!(status["queue"]["length"], 2, "{status}");
    let load = &proxy.admin("GET", "/api/v1/metrics").await.json()["services"]["agents"];
    assert_eq!((&load["queued_runs"], &load["demand"], &load["placeable_demand"]), (&2.into(), &3.into(), &2.into()));
    assert_eq!(load["saturation"], 3.0);
    assert_eq!(proxy.admin("GET", "/readyz?service=agents").await.status(), 503, "neither a slot nor a place");

    running.finish().await;
    assert_eq!(first.read_response().await.status(), 200);
    let running = backend.drip().await;
    assert_eq!(proxy.admin("GET", "/readyz?service=agents").await.status(), 200, "a place to wait");
    running.finish().await;
    assert_eq!(second.read_response().await.status(), 200);
    backend.drip().await.finish().await;
    assert_eq!(third.read_response().await.status(), 200);
    assert_eq!(backend.requests().len(), 3);
    proxy.metric_becomes("longhaul_queue_wait_seconds_count", &["service=\"agents\""], 2.0).await;
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

#[tokio::test]
async fn whoever_waits_too_long_or_leaves_gives_up_its_place() {
    let (backend, proxy, mut first, running) = full(", queue: {max: 1, timeout: 300ms}").await;
    drop(waiting_client(&proxy, "", 1.0).await);
    queued(&proxy, 0.0).await;
    // One that has sent but a part of its body leaves, too.
    let mut client = proxy.connect().await;
    client.send("POST /run HTTP/1.1\r\nHost: agents.test\r\nContent-Length: 100\r\n\r\nabc").await;
    queued(&proxy, 1.0).await;
    drop(client);
    queued(&proxy, 0.0).await;
    let begun = longhaul::ids::now();
    let late = post(proxy.address, "/run", "", "{}").await;
    assert_eq!((late.status(), late.code().as_deref()), (503, Some("queue_timeout")));
    assert!(late.header("retry-after").is_some() && begun.elapsed() >= Duration::from_millis(300));
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"rejected\""], 3.0).await;
    running.finish().await;
    first.read_response().await;
    assert_eq!(backend.requests().len(), 1);
}

/// More of a request than the proxy reads ahead, and no more than sockets take.
fn long_start() -> Vec<u8> {
    let body = vec![b'x'; 64 * 1024];
    let head = format!("POST /run HTTP/1.1\r\nHost: agents.test\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), &body].concat()
}

#[tokio::test]
async fn whoever_leaves_gives_up_its_place_though_much_of_its_request_is_unread() {
    let backend = Backend::start().await;
    backend.drip_each();
    let directory = tempfile::tempdir().expect("a directory");
    let certificate = Certificate::create(directory.path(), &["agents.test"]);
    let listeners = format!(
        "listeners:\n  - address: 127.0.0.1:0\n  - address: 127.0.0.1:0\n    name: tls\n    tls: {{certificates: [{{cert_file: {}, \
         key_file: {}}}]}}\n",
        certificate.cert_file.display(),
        certificate.key_file.display()
    );
    let urls = [backend.url().to_owned()];
    let proxy = start_proxy(&(listeners + &config(&urls, 1, ", queue: {max: 1}"))).await;
    let mut first = proxy.connect().await;
    first.send(start("")).await;
    let running = backend.drip().await;
    let over_tls = RawClient::connect_tls(proxy.listeners[1], "agents.test", certificate.client(&[])).await;
    for mut client in [proxy.connect().await, over_tls] {
        client.send(long_start()).await;
        queued(&proxy, 1.0).await;
        drop(client);
        queued(&proxy, 0.0).await;
    }
    // One that stays loses nothing of it.
    let mut stays = proxy.connect().await;
    stays.send(long_start()).await;
    queued(&proxy, 1.0).await;
    running.finish().await;
    backend.drip().await.finish().await;
    assert_eq!(stays.read_response().await.status(), 200);
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"rejected\""], 2.0).await;
}

#[tokio::test]
async fn over_http2_a_reset_gives_up_the_place() {
    let (_backend, proxy, _first, _running) = full(", queue: {max: 5}").await;
    let client = support::Http2Client::connect(proxy.address).await;
    let request = support::http2_request("POST", proxy.address, "/run");
    let mut stream = client.open(request, false).await;
    queued(&proxy, 1.0).await;
    stream.reset();
    queued(&proxy, 0.0).await;
}

#[tokio::test]
async fn a_pinned_start_waits_for_its_own_endpoint_and_holds_up_nobody() {
    let backends = [Backend::start().await, Backend::start().await];
    for backend in &backends {
        backend.drip_each();
    }
    let urls = backends.each_ref().map(|backend| backend.url().to_owned());
    let more = ", queue: {max: 5}}\n    session: {key: [{header: x-session}]";
    let proxy = start_proxy(&config(&urls, 1, more)).await;
    let mut pinned = proxy.connect().await;
    pinned.send(start("X-Session: a\r\n")).await;
    eventually_async("somebody has it", || async { backends.iter().any(|backend| backend.requests().len() == 1) })
        .await;
    let [here, there] = match backends[0].requests().len() {
        1 => [&backends[0], &backends[1]],
        _ => [&backends[1], &backends[0]],
    };
    let at_here = here.drip().await;
    at_here.event("x").await;
    pinned.read_head().await;
    let _again = waiting_client(&proxy, "X-Session: a\r\n", 1.0).await;
    assert_eq!(proxy.metric("longhaul_placeable_demand", &[]).await, Some(0.0), "no other endpoint would help it");
    for _ in 0..3 {
        let mut other = proxy.connect().await;
        other.send(start("")).await;
        there.drip().await.finish().await;
        assert_eq!(other.read_response().await.status(), 200);
    }
    // Its endpoint drains: between runs it may go elsewhere, in its order of arrival.
    assert_eq!(proxy.drain("agents", &here.name(), false).await.status(), 200);
    queued(&proxy, 1.0).await;
    at_here.finish().await;
    let moved = there.drip().await;
    assert_eq!(moved.request.header("x-session"), Some("a"));
}

#[tokio::test]
async fn the_more_urgent_goes_first_and_principals_take_turns() {
    let more = ", queue: {max: 50, priority_header: x-priority}}\n    session: {scope: [{header: authorization}]";
    let (backend, proxy, _first, mut running) = full(more).await;
    let mut clients = Vec::new();
    for (name, headers) in [
        ("crowd", "Authorization: a\r\n"),
        ("crowd", "Authorization: a\r\n"),
        ("crowd", "Authorization: a\r\n"),
        ("few", "Authorization: b\r\n"),
        ("urgent", "Authorization: a\r\nX-Priority: 0\r\n"),
    ] {
        let headers = format!("X-Name: {name}\r\n{headers}");
        clients.push(waiting_client(&proxy, &headers, clients.len() as f64 + 1.0).await);
    }
    let mut order = Vec::new();
    for _ in 0..5 {
        running.finish().await;
        running = backend.drip().await;
        order.push(running.request.header("x-name").expect("a name").to_owned());
    }
    assert_eq!(order, ["urgent", "crowd", "few", "crowd", "crowd"]);
}

#[tokio::test]
async fn the_proxys_drain_waits_for_those_who_wait() {
    let (backend, proxy, mut first, running) = full(", queue: {max: 5}").await;
    let mut second = waiting_client(&proxy, "", 1.0).await;
    assert_eq!(proxy.admin("POST", "/api/v1/drain").await.status(), 202);
    running.finish().await;
    assert_eq!(first.read_response().await.status(), 200);
    backend.drip().await.finish().await;
    assert_eq!(second.read_response().await.status(), 200);
}

#[tokio::test]
async fn without_a_ready_endpoint_everything_waits_that_has_no_pin() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&config(&[], 5, ", queue: {max: 5}")).await;
    let mut start = waiting_client(&proxy, "", 1.0).await;
    let mut other = proxy.connect().await;
    other.send("GET /state HTTP/1.1\r\nHost: agents.test\r\n\r\n").await;
    queued(&proxy, 2.0).await;
    assert_eq!(proxy.metric("longhaul_run_demand", &[]).await, Some(2.0));
    assert_eq!(proxy.reload(&config(&[backend.url().to_owned()], 5, ", queue: {max: 5}")).await.status(), 200);
    assert_eq!(start.read_response().await.status(), 200);
    assert_eq!(other.read_response().await.status(), 200);
    assert_eq!(proxy.reload(&config(&[], 5, "")).await.status(), 200);
    let refused = get(proxy.address, "/state", "").await;
    assert_eq!((refused.status(), refused.code().as_deref()), (503, Some("no_endpoint")));
}

#[tokio::test]
async fn a_principal_has_no_more_runs_than_it_may() {
    let backend = Backend::start().await;
    backend.drip_each();
    let urls = [backend.url().to_owned()];
    let more = ", max_per_principal: 1}\n    session: {scope: [{header: authorization}]";
    let proxy = start_proxy(&config(&urls, 10, more)).await;
    let mut clients = Vec::new();
    for headers in ["Authorization: a\r\n", "Authorization: b\r\n", "", ""] {
        let mut client = proxy.connect().await;
        client.send(start(headers)).await;
        clients.push((client, backend.drip().await));
    }
    let refused = post(proxy.address, "/run", "Authorization: a\r\n", "{}").await;
    assert_eq!((refused.status(), refused.code().as_deref()), (429, Some("principal_limit")));
    assert!(refused.header("retry-after").is_some());
    let (mut client, running) = clients.remove(0);
    running.finish().await;
    client.read_response().await;
    let mut again = proxy.connect().await;
    again.send(start("Authorization: a\r\n")).await;
    backend.drip().await;
}

#[tokio::test]
async fn the_kill_switch_frees_a_slot_and_ends_what_it_names() {
    let (backend, proxy, mut first, running) = full(", queue: {max: 5}").await;
    running.event("x").await;
    let head = first.read_head().await;
    let mut second = waiting_client(&proxy, "", 1.0).await;
    let run = head.header("longhaul-run-id").expect("an id");
    let killed = proxy.admin("DELETE", &format!("/api/v1/runs/{run}")).await;
    assert_eq!(killed.json()["cancel"], "confirmed");
    running.until_gone().await;
    backend.drip().await.finish().await;
    assert_eq!(second.read_response().await.status(), 200);
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"cancelled\""], 1.0).await;
}

#[tokio::test]
async fn who_reads_events_is_told_its_position_while_it_waits() {
    let (backend, proxy, _first, running) = full(", queue: {max: 5, timeout: 1s, progress: 50ms}").await;
    let mut second = waiting_client(&proxy, "Accept: text/event-stream\r\n", 1.0).await;
    let mut third = waiting_client(&proxy, "Accept: text/event-stream\r\n", 2.0).await;
    let mut plain = waiting_client(&proxy, "", 3.0).await;
    let head = second.read_head().await;
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    let run = head.header("longhaul-run-id").expect("an id").to_owned();
    second.read_chunks_until(": queue position 1\n\n").await;
    third.read_head().await;
    third.read_chunks_until(": queue position 2\n\n").await;
    running.finish().await;
    let running = backend.drip().await;
    assert_eq!(running.request.header("longhaul-run-id"), Some(run.as_str()));
    third.read_chunks_until(": queue position 1\n\n").await;
    running.event("hello").await;
    second.read_chunks_until("data: hello\n\n").await;
    // Too late for the others: who was told its position reads of it in its stream, which then breaks off.
    let seen = third.read_to_end_of_body().await;
    assert!(seen.contains("event: error\ndata: {") && seen.contains("queue_timeout"), "{seen}");
    assert_eq!(plain.read_response().await.code().as_deref(), Some("queue_timeout"));
    running.finish().await;
    let rest = second.read_chunk().await;
    assert!(rest.is_none(), "it ends as a whole one");
}

#[tokio::test]
async fn what_fails_after_a_position_was_told_is_an_event_and_a_visible_cut() {
    let (backend, proxy, _first, running) = full(", queue: {max: 5, progress: 50ms}").await;
    backend.next(support::Script::status(500));
    let mut second = waiting_client(&proxy, "Accept: text/event-stream\r\n", 1.0).await;
    second.read_head().await;
    second.read_chunks_until(": queue position 1\n\n").await;
    running.finish().await;
    let seen = String::from_utf8_lossy(&second.read_to_end().await).into_owned();
    assert!(seen.contains("event: error\ndata: {") && seen.contains("upstream_reset"), "{seen}");
    assert!(!seen.ends_with("0\r\n\r\n"), "it does not end as a whole one: {seen}");
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"failed\""], 1.0).await;
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or_default()
}

/// 5,000 runs of random lengths at 3 times capacity, with random aborts and 20 reloads.
#[tokio::test]
async fn capacity_is_exact_and_nothing_is_lost_under_overload() {
    const RUNS: usize = 5_000;
    const LIMIT: usize = 10;
    const RELOADS: usize = 20;
    let backends: Vec<Counting> = (0..5).map(|_| Counting::start()).collect();
    let urls: Vec<String> = backends.iter().map(Counting::url).collect();
    let more = ", queue: {max: 1000}}\n    session: {key: [{header: x-session}]";
    let proxy = Arc::new(start_proxy(&config(&urls, LIMIT, more)).await);
    let begun = longhaul::ids::now();
    let next = Arc::new(AtomicUsize::new(0));
    let done = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..3 * LIMIT * backends.len())
        .map(|client| {
            let (address, next, done) = (proxy.address, Arc::clone(&next), Arc::clone(&done));
            tokio::spawn(async move {
                let mut chance = Random(client as u64);
                let (mut answered, mut aborted) = (0, 0);
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= RUNS {
                        return (answered, aborted);
                    }
                    let microseconds = chance.below(160_000);
                    let session = match chance.below(4) {
                        0 => format!("X-Session: s{}\r\n", chance.below(500)),
                        _ => String::new(),
                    };
                    let headers = format!("X-Name: {number}\r\nX-Microseconds: {microseconds}\r\n{session}");
                    let mut client = RawClient::connect(address).await;
                    client.send(start(&headers)).await;
                    if chance.below(10) == 0 {
                        let patience = Duration::from_micros(chance.below(400_000));
                        let _ = tokio::time::timeout(patience, client.read_response()).await;
                        aborted += 1;
                    } else {
                        let response = client.read_response().await;
                        let text = response.text();
                        assert_eq!(response.status(), 200, "{text}");
                        assert!(!response.truncated && text.contains(&format!("end {number}\n")), "{text}");
                        answered += 1;
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    // Endpoints leave and come back while all that goes on: one is missing after every other reload.
    let mut missing_times: Vec<(usize, Instant, Instant)> = Vec::new();
    for reload in 0..RELOADS {
        while done.load(Ordering::Relaxed) < (reload + 1) * RUNS / (RELOADS + 2) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let missing = (reload % 2 == 0).then_some(reload / 2 % backends.len());
        let here: Vec<String> =
            urls.iter().enumerate().filter(|(index, _)| Some(*index) != missing).map(|(_, url)| url.clone()).collect();
        let asked = longhaul::ids::now();
        let answer = proxy.reload(&config(&here, LIMIT, &format!(", unseen_timeout: {}s{more}", reload + 60))).await;
        assert_eq!(answer.status(), 200, "{}", answer.text());
        match (missing, missing_times.last_mut()) {
            (Some(missing), _) => missing_times.push((missing, asked, asked)),
            (None, Some((.., until))) => *until = longhaul::ids::now(),
            (None, None) => {}
        }
    }
    let (mut answered, mut aborted) = (0, 0);
    for client in clients {
        let (one_answered, one_aborted) = client.await.expect("no client fails");
        answered += one_answered;
        aborted += one_aborted;
    }
    let took = begun.elapsed();
    let mut idle: Vec<Duration> = Vec::new();
    for (index, backend) in backends.iter().enumerate() {
        assert!(backend.most() <= LIMIT, "{} runs at once", backend.most());
        // While it is missing, what is free there is nobody's.
        let missing = |since: Instant, until: Instant| {
            missing_times.iter().any(|(which, from, to)| *which == index && since <= *to && until >= *from)
        };
        let slots = idle_slots(&backend.seen(), LIMIT);
        idle.extend(
            slots.into_iter().filter(|(since, until)| !missing(*since, *until)).map(|(since, until)| until - since),
        );
    }
    idle.sort_unstable();
    let most: Vec<usize> = backends.iter().map(Counting::most).collect();
    let whole = backends.iter().flat_map(|backend| backend.seen()).filter(|run| run.whole).count();
    println!(
        "{RUNS} runs in {took:?}: {answered} answered whole, {aborted} aborted by their clients, 0 lost; most at once by \
         backend {most:?} of {LIMIT}; a freed slot was idle as its backend saw it: p50 {:?}, p99 {:?} ({} of them)",
        percentile(&idle, 50),
        percentile(&idle, 99),
        idle.len(),
    );
    assert_eq!(answered + aborted, RUNS);
    assert!(whole >= answered);
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
    queued(&proxy, 0.0).await;
    let status = proxy.status().await;
    assert!(
        status["services"][0]["versions"][0]["endpoints"]
            .as_array()
            .expect("a list")
            .iter()
            .all(|endpoint| { endpoint["outstanding_runs"] == 0 && endpoint["open_exchanges"] == 0 })
    );
}

/// From when to when each slot was free between two runs of a full backend, the first and last twentieth left out.
fn idle_slots(seen: &[Seen], limit: usize) -> Vec<(Instant, Instant)> {
    let mut events: Vec<(Instant, bool)> = Vec::new();
    for run in seen {
        events.push((run.started, true));
        events.extend(run.ended.map(|ended| (ended, false)));
    }
    events.sort();
    let edge = events.len() / 20;
    let (mut active, mut free, mut idle) = (0_usize, std::collections::VecDeque::new(), Vec::new());
    for (index, (at, starts)) in events.iter().enumerate() {
        if *starts {
            active += 1;
            if let Some(since) = free.pop_front()
                && (edge..events.len() - edge).contains(&index)
            {
                idle.push((since, *at));
            }
        } else {
            if active == limit || !free.is_empty() {
                free.push_back(*at);
            }
            active = active.saturating_sub(1);
        }
    }
    idle
}

/// 200 runs wait for the first endpoint.
#[tokio::test]
async fn from_zero_all_that_wait_run_in_order_and_the_first_at_once() {
    const RUNS: usize = 200;
    const SESSIONS: usize = 40;
    let backend = Counting::start();
    let more = ", queue: {max: 1000}, double_texting: {policy: enqueue}}\n    session: {key: [{header: x-session}]";
    let proxy = start_proxy(&config(&[], 20, more)).await;
    let mut clients = Vec::new();
    for number in 0..RUNS {
        let headers = format!("X-Name: {number}\r\nX-Session: s{}\r\nX-Microseconds: 2000\r\n", number % SESSIONS);
        let mut client = proxy.connect().await;
        client.send(start(&headers)).await;
        clients.push(client);
        // Those of one session come in their order; others at once.
        if number % SESSIONS == SESSIONS - 1 {
            queued(&proxy, number as f64 + 1.0).await;
        }
    }
    assert_eq!(proxy.metric("longhaul_run_demand", &[]).await, Some(RUNS as f64));
    let appeared = longhaul::ids::now();
    let reloaded = proxy.reload(&config(&[backend.url()], 20, more)).await;
    let ready = longhaul::ids::now();
    assert_eq!(reloaded.status(), 200);
    for (number, client) in clients.iter_mut().enumerate() {
        let response: Response = client.read_response().await;
        assert_eq!(response.status(), 200);
        assert!(response.text().contains(&format!("end {number}\n")));
    }
    let all = appeared.elapsed();
    let seen = backend.seen();
    assert_eq!(seen.len(), RUNS);
    let mut last: HashMap<&str, usize> = HashMap::new();
    for run in &seen {
        let number: usize = run.name.parse().expect("a number");
        let before = last.insert(&run.session, number);
        assert!(before.is_none_or(|before| before < number), "{} after {before:?}", run.name);
        assert_eq!(run.beside, 0, "one run of a session at a time");
    }
    let first = seen[0].started;
    println!(
        "{RUNS} waiting runs of {SESSIONS} sessions: the first dispatched {:?} after the reload that brought the endpoint \
         was asked for ({:?} after its answer), all whole and in order within {all:?}; most at once {}",
        first - appeared,
        first.saturating_duration_since(ready),
        backend.most(),
    );
    assert!(backend.most() <= 20);
    assert!(first.saturating_duration_since(ready) < Duration::from_millis(50));
}
