//! Peer LangGraph: the official LangGraph client and `langgraph dev` servers, with and without the proxy between.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::{
    Fleet, PeerClient, PeerScript, Peers, Proxy, RawClient, Transcript, assert_same, eventually_async, fetch, get,
    post_json, start_proxy, transcript,
};
use tokio::time::Instant;

const SERVER: PeerScript = PeerScript { environment: "langgraph", file: "langgraph_server.py" };
const CLIENT: PeerScript = PeerScript { environment: "langgraph", file: "langgraph_client.py" };
/// Ten runs at a time on each server.
static SERVERS: Fleet = Fleet::new(SERVER, &["10"], "/ok");

/// How long the proxy may take to see what happens at a server without a request of its own: one interval of its probes.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// What a busy machine adds to that.
const LATENESS: Duration = Duration::from_secs(1);

async fn proxy_before(servers: &Peers, protocol: &str, more: &str) -> Proxy {
    let urls = servers.urls();
    start_proxy(&format!(
        "services:\n  - name: agent\n    agent_protocol: {protocol}\n    pool: {{idle_timeout: 2s}}\n{more}    \
         versions: [{{name: stable, endpoints: {urls}}}]\n"
    ))
    .await
}

fn url(proxy: &Proxy) -> String {
    format!("http://{}", proxy.address)
}

/// What the servers say is waiting or running, all together.
async fn at_work(servers: &Peers) -> u64 {
    let path = "/metrics?format=json";
    let (waiting, running) =
        tokio::join!(servers.counts(path, "/queue/n_pending"), servers.counts(path, "/queue/n_running"));
    waiting.iter().chain(&running).sum()
}

/// How many threads each server has.
async fn threads(servers: &Peers) -> Vec<u64> {
    let mut counts = Vec::new();
    for peer in servers.each() {
        counts
            .push(post_json(peer.address(), "/threads/count", "", &json!({})).await.json().as_u64().expect("a number"));
    }
    counts
}

/// The states in which all scenarios must end, so that a script that sees nothing is noticed.
fn assert_right(direct: &Transcript) {
    assert_eq!(direct["cancel"], json!({"status": "interrupted", "again": 404, "after": 1}), "the script is right");
    assert_eq!(direct["cancel_rollback"], 404, "a run that is rolled back is gone");
    let interrupted = &direct["interrupt"];
    assert_eq!(interrupted["first"], "interrupted", "one create ends several runs");
    assert_eq!(interrupted["second"], "interrupted", "one create ends several runs");
    assert_eq!(direct["delete_thread"], 404, "its runs are gone with a thread");
    assert_eq!(direct["errors"]["waited"]["__error__"]["message"], "boom", "an error inside a 200");
    assert_eq!(direct["resume"]["seen"], json!([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), "a stream goes on where it was left");
}

async fn assert_no_difference(count: usize, protocol: &str) {
    let servers = SERVERS.take(count).await;
    let proxy = proxy_before(&servers, protocol, "").await;
    let (direct, proxied) = (servers.each()[0].url(), url(&proxy));
    let (direct, proxied) = tokio::join!(transcript(CLIENT, &direct, &["all"]), transcript(CLIENT, &proxied, &["all"]));
    assert_right(&direct);
    assert_same(&direct, &proxied);
    // Runs that nobody asks for again (a batch without threads) are found out by probes.
    let end = Instant::now() + PROBE_INTERVAL * 2 + LATENESS;
    while proxy.metric("longhaul_outstanding_runs", &[]).await != Some(0.0) {
        assert!(Instant::now() < end, "every run ends in the proxy's count: {:?}", runs(&proxy).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn runs(proxy: &Proxy) -> Value {
    proxy.admin("GET", "/api/v1/runs?limit=1000").await.json()
}

/// A thread, by way of `address`.
async fn create_thread(proxy: &Proxy) -> String {
    let answer = post_json(proxy.address, "/threads", "", &json!({})).await;
    assert_eq!(answer.status(), 200, "{answer:?}");
    answer.json()["thread_id"].as_str().expect("an id").to_owned()
}

#[tokio::test]
async fn a_client_sees_no_difference_through_plain_http_before_one_server() {
    assert_no_difference(1, "http").await;
}

/// What a configuration can say without recognition: where the thread is in a path, and in the answer that makes it.
#[tokio::test]
async fn threads_stay_by_their_configured_id_before_three_servers() {
    let servers = SERVERS.take(3).await;
    let keys = "    session: {key: [{path: \"/threads/{session}/**\"}, {response_json: /thread_id}]}\n";
    let proxy = proxy_before(&servers, "http", keys).await;
    let scenarios = &["conversation", "threads", "cancel", "interrupt", "rollback", "resume", "background"];
    let (direct, proxied) = (servers.each()[0].url(), url(&proxy));
    let (direct, proxied) =
        tokio::join!(transcript(CLIENT, &direct, scenarios), transcript(CLIENT, &proxied, scenarios));
    assert_same(&direct, &proxied);
}

#[tokio::test]
async fn recognised_a_client_sees_no_difference_before_three_servers() {
    assert_no_difference(3, "langgraph").await;
}

#[tokio::test]
async fn recognised_by_itself_a_client_sees_no_difference_before_three_servers() {
    assert_no_difference(3, "auto").await;
}

/// At every moment the proxy's count is one that the servers had within the last interval of its probes.
#[tokio::test]
async fn recognised_100_background_runs_are_counted_as_the_servers_count_them() {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, "langgraph", "    health: {path: /ok}\n").await;
    let proxied = url(&proxy);
    let client = PeerClient::start(CLIENT, &proxied, &["leave_background=100,2"]);

    let started = Instant::now();
    let mut samples: Vec<(Instant, u64, u64)> = Vec::new();
    loop {
        let own = at_work(&servers).await;
        let counted = proxy.metric("longhaul_outstanding_runs", &[]).await.unwrap_or_default();
        // An own count of integers, read from a text of decimals.
        let counted = counted as u64;
        samples.push((Instant::now(), own, counted));
        let peak = samples.iter().map(|(_, own, _)| *own).max().unwrap_or_default();
        if peak > 0 && own == 0 && counted == 0 {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "both return to zero: {}", shown(&samples));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    client.finish().await;

    let window = PROBE_INTERVAL + LATENESS;
    for (now, _, counted) in &samples {
        let recent = samples.iter().filter(|(at, _, _)| *at <= *now + LATENESS && *at + window >= *now);
        let recent: Vec<u64> = recent.map(|(_, own, _)| *own).collect();
        let (least, most) = (recent.iter().min().expect("itself"), recent.iter().max().expect("itself"));
        assert!((least..=most).contains(&counted), "{counted} is not within {least}..={most}: {}", shown(&samples));
    }
    let peak = samples.iter().map(|(_, _, counted)| *counted).max().expect("samples");
    assert!((60..=100).contains(&peak), "most runs were outstanding at the same time: {}", shown(&samples));
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\""], 100.0).await;
}

/// Milliseconds, the servers' count, the proxy's.
fn shown(samples: &[(Instant, u64, u64)]) -> String {
    let start = samples.first().map(|(at, _, _)| *at);
    let each = samples
        .iter()
        .filter_map(|(at, own, counted)| Some(format!("{}:{own}/{counted}", at.duration_since(start?).as_millis())));
    each.collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn recognised_500_threads_created_at_once_spread_evenly() {
    let servers = SERVERS.take(3).await;
    let before = threads(&servers).await;
    let proxy = proxy_before(&servers, "langgraph", "").await;
    let seen = transcript(CLIENT, &url(&proxy), &["create_threads=500"]).await;
    assert_eq!(seen["create_threads"], 500);
    let after = threads(&servers).await;
    let new: Vec<u64> = before.iter().zip(&after).map(|(before, after)| after - before).collect();
    assert_eq!(new.iter().sum::<u64>(), 500, "{new:?}");
    assert!(new.iter().all(|count| (160..=174).contains(count)), "spread evenly: {new:?}");
    proxy.metric_becomes("longhaul_sessions", &[], 500.0).await;
}

/// A background run is the proxy's to know after its request has ended: counted, listed, and cancelled by its id.
#[tokio::test]
async fn recognised_a_background_run_is_listed_and_can_be_killed() {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, "langgraph", "").await;
    let thread = create_thread(&proxy).await;
    let long = json!({"assistant_id": "agent", "input": {"steps": 600, "sleep": 0.1}});
    let created = post_json(proxy.address, &format!("/threads/{thread}/runs"), "", &long).await;
    let run = created.json()["run_id"].as_str().expect("an id").to_owned();
    let id = created.header("longhaul-run-id").expect("a start has one").to_owned();
    assert_eq!(proxy.metric("longhaul_outstanding_runs", &[]).await, Some(1.0), "it outlives its request");
    assert!(runs(&proxy).await.to_string().contains(&id), "{}", runs(&proxy).await);

    let killed = proxy.admin("DELETE", &format!("/api/v1/runs/{id}")).await;
    assert_eq!(killed.json()["cancel"], "sent", "{killed:?}");
    let path = format!("/threads/{thread}/runs/{run}");
    eventually_async("the server knows", || async {
        get(proxy.address, &path, "").await.json()["status"] == "interrupted"
    })
    .await;
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

/// Each of these ends runs that it doesn't name: an interrupting create, the deletion of a thread, a rollback.
#[tokio::test]
async fn recognised_one_request_ends_all_runs_that_it_ends_at_the_server() {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, "langgraph", "").await;
    let outstanding = || proxy.metric("longhaul_outstanding_runs", &[]);
    let thread = create_thread(&proxy).await;
    let path = format!("/threads/{thread}/runs");
    let long = |strategy: &str| json!({"assistant_id": "agent", "input": {"steps": 600, "sleep": 0.1}, "multitask_strategy": strategy});
    for number in 1..=3 {
        post_json(proxy.address, &path, "", &long("enqueue")).await;
        assert_eq!(outstanding().await, Some(f64::from(number)));
    }
    let interrupting = post_json(proxy.address, &path, "", &long("interrupt")).await;
    assert_eq!(interrupting.status(), 200);
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 1.0).await;
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"interrupted\""], 3.0).await;

    let rolled_back = post_json(proxy.address, &path, "", &long("rollback")).await;
    assert_eq!(rolled_back.status(), 200);
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 1.0).await;

    let request = format!("DELETE /threads/{thread} HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\n\r\n", proxy.address);
    assert_eq!(fetch(proxy.address, request).await.status(), 204);
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

/// Who leaves a stream leaves the run; who comes back by its path finds it, without a body or another mark.
#[tokio::test]
async fn recognised_a_run_whose_reader_left_is_counted_until_it_ends() {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, "langgraph", "").await;
    let thread = create_thread(&proxy).await;
    let body = json!({
        "assistant_id": "agent", "input": {"steps": 30, "sleep": 0.1}, "stream_mode": ["custom"], "stream_resumable": true,
    })
    .to_string();
    let length = body.len();
    let mut client = RawClient::connect(proxy.address).await;
    client
        .send(format!(
            "POST /threads/{thread}/runs/stream HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}",
            proxy.address
        ))
        .await;
    let head = client.read_head().await;
    let run = head.header("content-location").expect("where the run is").to_owned();
    client.read_chunks_until("event: custom").await;
    drop(client);
    assert_eq!(proxy.metric("longhaul_outstanding_runs", &[]).await, Some(1.0), "the run goes on");
    assert_eq!(get(proxy.address, &run, "").await.json()["status"], "running", "at the server too");

    let mut joined = RawClient::connect(proxy.address).await;
    joined.send(format!("GET {run}/stream HTTP/1.1\r\nHost: {}\r\nLast-Event-ID: -1\r\n\r\n", proxy.address)).await;
    assert_eq!(joined.read_head().await.status, 200);
    assert_eq!(proxy.metric("longhaul_outstanding_runs", &[]).await, Some(1.0), "a join is no run");
    joined.read_chunks_until("\"step\":29").await;
    let end = Instant::now() + PROBE_INTERVAL + LATENESS;
    while proxy.metric("longhaul_outstanding_runs", &[]).await != Some(0.0) {
        assert!(Instant::now() < end, "the run has ended: {}", runs(&proxy).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A failure inside a 200 is a failure: the event of a stream, the member of a `wait`, the state of a polled run.
#[tokio::test]
async fn recognised_failures_inside_a_200_are_failures() {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, "langgraph", "").await;
    transcript(CLIENT, &url(&proxy), &["errors"]).await;
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"failed\""], 3.0).await;
}

/// What became of the first run of a thread and of the second message, which came while that run was at work.
#[derive(Debug, PartialEq)]
struct SecondMessage {
    /// As the server has it; 404 where it is gone.
    first: Value,
    /// The answer to the second message, and its run as the server has it.
    status: u16,
    second: Value,
    /// What the agent has heard in this thread, as its state has it at the end.
    heard: Value,
    /// The second run was created before the first one's end.
    overlap: bool,
}

/// Sends a second message into a thread whose run is at work, and waits for the end of both.
async fn message_mid_run(proxy: &Proxy) -> SecondMessage {
    let thread = create_thread(proxy).await;
    let path = format!("/threads/{thread}/runs");
    let message = |say: &str, steps: u32| {
        // Left to itself the server would take any number: it is the proxy's strategy that shows.
        json!({"assistant_id": "agent", "input": {"say": say, "steps": steps, "sleep": 0.1}, "multitask_strategy": "enqueue"})
    };
    let run = |answer: &Value| format!("{path}/{}", answer["run_id"].as_str().unwrap_or("none"));
    let first = run(&post_json(proxy.address, &path, "", &message("first", 20)).await.json());
    let status_of = async |run: &str| {
        let answer = get(proxy.address, run, "").await;
        if answer.status() == 200 { answer.json()["status"].clone() } else { json!(answer.status()) }
    };
    let at_rest = async |run: &str| {
        eventually_async("the run ends", || async {
            !["pending", "running"].map(Value::from).contains(&status_of(run).await)
        })
        .await;
    };
    eventually_async("the first run is at work", || async { status_of(&first).await == "running" }).await;
    let answer = post_json(proxy.address, &path, "", &message("second", 1)).await;
    let first_then = status_of(&first).await;
    let overlap = answer.status() == 200 && (first_then == "running" || first_then == "pending");
    at_rest(&first).await;
    let second = if answer.status() == 200 {
        let second = run(&answer.json());
        at_rest(&second).await;
        status_of(&second).await
    } else {
        answer.json()["code"].clone()
    };
    let state = get(proxy.address, &format!("/threads/{thread}/state"), "").await.json();
    SecondMessage {
        first: status_of(&first).await,
        status: answer.status(),
        second,
        heard: state["values"]["heard"].clone(),
        overlap,
    }
}

/// Twenty threads at once over three servers, each strategy: what the servers did is what it promises.
async fn assert_double_texting(policy: &str, more: &str, promised: impl Fn() -> SecondMessage) {
    let servers = SERVERS.take(3).await;
    let runs = format!("    runs: {{double_texting: {{policy: {policy}}}{more}}}\n");
    let proxy = proxy_before(&servers, "langgraph", &runs).await;
    let threads = futures_util::future::join_all((0..20).map(|_| message_mid_run(&proxy))).await;
    for thread in threads {
        assert_eq!(thread, promised(), "{policy}");
    }
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

#[tokio::test]
async fn a_second_message_is_rejected_before_real_servers() {
    assert_double_texting("reject", "", || SecondMessage {
        first: json!("success"),
        status: 409,
        second: json!("session_busy"),
        heard: json!(["first"]),
        overlap: false,
    })
    .await;
}

#[tokio::test]
async fn a_second_message_waits_before_real_servers() {
    assert_double_texting("enqueue", ", queue: {max: 100}", || SecondMessage {
        first: json!("success"),
        status: 200,
        second: json!("success"),
        heard: json!(["first", "second"]),
        overlap: false,
    })
    .await;
}

#[tokio::test]
async fn a_second_message_interrupts_before_real_servers() {
    assert_double_texting("interrupt", "", || SecondMessage {
        first: json!("interrupted"),
        status: 200,
        second: json!("success"),
        heard: json!(["second"]),
        overlap: false,
    })
    .await;
}

#[tokio::test]
async fn a_second_message_rolls_back_before_real_servers() {
    assert_double_texting("rollback", "", || SecondMessage {
        first: json!(404),
        status: 200,
        second: json!("success"),
        heard: json!(["second"]),
        overlap: false,
    })
    .await;
}
