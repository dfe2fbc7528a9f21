//! Runs: pieces of work that outlive their requests, against endpoints that behave as agent servers do.

mod support;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use support::{
    Backend, Gate, Proxy, RawClient, Request, Script, Step, eventually, eventually_async, get, langgraph, post,
    start_proxy,
};

const THREAD: &str = "11111111-1111-4111-8111-111111111111";
const OTHER: &str = "33333333-3333-4333-8333-333333333333";

/// As much of a LangGraph server as the proxy can see: threads, background runs, their status, streams, cancel.
#[derive(Clone, Default)]
struct Agent {
    /// By run: its status.
    runs: Arc<Mutex<HashMap<String, &'static str>>>,
}

impl Agent {
    async fn start() -> (Agent, Backend) {
        let agent = Agent::default();
        let backend = Backend::start().await;
        let serving = agent.clone();
        backend.each(move |request| serving.answer(request));
        (agent, backend)
    }

    fn set(&self, run: &str, status: &'static str) {
        self.runs.lock().expect("runs").insert(run.to_owned(), status);
    }

    fn answer(&self, request: &Request) -> Script {
        let mut runs = self.runs.lock().expect("runs");
        match (request.method.as_str(), langgraph::parts(request).as_slice()) {
            ("POST", ["threads"]) => Script::json(200, &format!(r#"{{"thread_id":"{THREAD}","status":"idle"}}"#)),
            ("POST", ["threads", thread, "runs"]) => {
                let run = langgraph::run_id(runs.len());
                runs.insert(run.clone(), "running");
                langgraph::created(thread, &run)
            }
            ("POST", ["threads", thread, "runs", "stream"]) => {
                let run = langgraph::run_id(runs.len());
                runs.insert(run.clone(), "running");
                langgraph::stream(thread, &run, None)
            }
            ("GET", ["threads", _, "runs", run]) => langgraph::state(run, runs.get(*run).copied()),
            ("POST", ["threads", _, "runs", run, "cancel", ..]) => {
                runs.insert((*run).to_owned(), "interrupted");
                Script::json(202, "")
            }
            ("DELETE", ["threads", ..]) => Script::json(204, ""),
            _ => Script::json(404, "{}"),
        }
    }
}

fn config(backends: &[&Backend], more: &str) -> String {
    let urls: Vec<String> = backends.iter().map(|backend| format!("\"{}\"", backend.url())).collect();
    format!("services:\n  - name: agents\n    versions: [{{name: stable, endpoints: [{}]}}]\n{more}", urls.join(", "))
}

async fn outstanding(proxy: &Proxy, runs: f64) {
    proxy.metric_becomes("longhaul_outstanding_runs", &["service=\"agents\""], runs).await;
}

async fn ended(proxy: &Proxy, outcome: &str, count: f64) {
    let outcome = format!("outcome=\"{outcome}\"");
    proxy.metric_becomes("longhaul_runs_total", &["version=\"stable\"", &outcome], count).await;
}

async fn create(proxy: &Proxy, thread: &str) -> support::Response {
    let headers = "Content-Type: application/json\r\n";
    post(proxy.address, &format!("/threads/{thread}/runs"), headers, r#"{"assistant_id":"agent"}"#).await
}

#[tokio::test]
async fn a_background_run_counts_until_its_endpoint_says_that_it_has_ended() {
    let (agent, backend) = Agent::start().await;
    let proxy = start_proxy(&config(&[&backend], "    agent_protocol: langgraph\n")).await;
    let created = create(&proxy, THREAD).await;
    assert_eq!(created.status(), 200);
    let run = created.json()["run_id"].as_str().expect("an id").to_owned();
    assert!(created.header("longhaul-run-id").is_some());
    outstanding(&proxy, 1.0).await;
    let listed = proxy.admin("GET", "/api/v1/runs").await.json();
    let listed = &listed["runs"][0];
    assert_eq!(listed["protocol"], "langgraph", "{listed}");
    assert_eq!(listed["carriers"], 0, "{listed}");
    assert!(listed["protocol_id"].as_str().is_some_and(|id| id.contains(&run)), "{listed}");
    // It is asked about, and still runs.
    eventually("its status is asked", || backend.requests().iter().any(|request| request.method == "GET")).await;
    outstanding(&proxy, 1.0).await;
    agent.set(&run, "success");
    ended(&proxy, "completed", 1.0).await;
    outstanding(&proxy, 0.0).await;
}

/// A client that has started a background run, which its endpoint has not answered yet.
async fn started(proxy: &Proxy, backend: &Backend) -> RawClient {
    let mut client = proxy.connect().await;
    let body = r#"{"assistant_id":"agent"}"#;
    let head = format!("POST /threads/{THREAD}/runs HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n");
    client.send(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len())).await;
    // It is asked for its load, too.
    let has_start = || backend.requests().iter().any(|request| request.method == "POST");
    eventually("the endpoint has the start", has_start).await;
    client
}

#[tokio::test]
async fn a_background_run_counts_though_its_client_leaves_before_it_is_answered() {
    let backend = Backend::start().await;
    let gate = Gate::default();
    let (answer, runs) = (gate.clone(), Arc::new(Mutex::new("running")));
    let status = runs.clone();
    backend.each(move |request| {
        let json = ("content-type", "application/json");
        if request.method == "GET" {
            return Script::answer(200, &[json], &format!(r#"{{"status":"{}"}}"#, status.lock().expect("a status")));
        }
        let location = format!("{}/r-1", request.target);
        let Script(steps) = Script::answer(200, &[json, ("content-location", &location)], r#"{"run_id":"r-1"}"#);
        Script([Step::ReadBody, Step::Wait(answer.clone())].into_iter().chain(steps).collect())
    });
    let proxy = start_proxy(&config(&[&backend], "    agent_protocol: langgraph\n")).await;
    let client = started(&proxy, &backend).await;
    drop(client);
    let began = longhaul::ids::now();
    eventually("time goes by, in which the proxy sees that", || began.elapsed() > Duration::from_millis(200)).await;
    outstanding(&proxy, 1.0).await;
    gate.open();
    eventually("its status is asked", || backend.requests().iter().any(|request| request.method == "GET")).await;
    outstanding(&proxy, 1.0).await;
    *runs.lock().expect("a status") = "success";
    ended(&proxy, "completed", 1.0).await;
    outstanding(&proxy, 0.0).await;
}

#[tokio::test]
async fn each_status_is_the_outcome_that_it_means() {
    let (agent, backend) = Agent::start().await;
    let proxy = start_proxy(&config(&[&backend], "    agent_protocol: langgraph\n")).await;
    for (status, outcome) in [("error", "failed"), ("timeout", "timed_out"), ("success", "completed")] {
        let created = create(&proxy, THREAD).await;
        agent.set(created.json()["run_id"].as_str().expect("an id"), status);
        ended(&proxy, outcome, 1.0).await;
    }
    // Rolled back: its endpoint knows it no more.
    let created = create(&proxy, THREAD).await;
    agent.runs.lock().expect("runs").remove(created.json()["run_id"].as_str().expect("an id"));
    ended(&proxy, "interrupted", 1.0).await;
    outstanding(&proxy, 0.0).await;
}

#[tokio::test]
async fn the_end_of_a_stream_is_not_the_end_of_its_run() {
    let (agent, backend) = Agent::start().await;
    let proxy = start_proxy(&config(&[&backend], "    agent_protocol: auto\n")).await;
    let headers = "Content-Type: application/json\r\n";
    let path = format!("/threads/{THREAD}/runs/stream");
    let streamed = post(proxy.address, &path, headers, r#"{"assistant_id":"agent"}"#).await;
    assert!(streamed.text().contains("metadata"), "{}", streamed.text());
    outstanding(&proxy, 1.0).await;
    agent.set(&langgraph::run_id(0), "success");
    ended(&proxy, "completed", 1.0).await;
}

#[tokio::test]
async fn polls_joins_and_cancels_follow_the_run_wherever_the_thread_is() {
    let (_, first) = Agent::start().await;
    let (_, second) = Agent::start().await;
    let proxy = start_proxy(&config(&[&first, &second], "    agent_protocol: langgraph\n")).await;
    // Two threads, one on each endpoint, for each has one run.
    let one = create(&proxy, THREAD).await.json()["run_id"].as_str().expect("an id").to_owned();
    let two = create(&proxy, OTHER).await.json()["run_id"].as_str().expect("an id").to_owned();
    let starts = |backend: &Backend| backend.requests().iter().filter(|request| request.method == "POST").count();
    assert_eq!((starts(&first), starts(&second)), (1, 1));
    for (thread, run) in [(THREAD, &one), (OTHER, &two)] {
        let polled = get(proxy.address, &format!("/threads/{thread}/runs/{run}"), "").await;
        assert_eq!((polled.status(), polled.header("longhaul-affinity")), (200, Some("hit")));
    }
    let cancelled = post(proxy.address, &format!("/threads/{THREAD}/runs/{one}/cancel"), "", "").await;
    assert_eq!(cancelled.status(), 202);
    ended(&proxy, "interrupted", 1.0).await;
    outstanding(&proxy, 1.0).await;
}

#[tokio::test]
async fn an_operator_ends_a_run_by_the_protocols_own_call() {
    let (_, backend) = Agent::start().await;
    let proxy = start_proxy(&config(&[&backend], "    agent_protocol: langgraph\n")).await;
    let created = create(&proxy, THREAD).await;
    let id = created.header("longhaul-run-id").expect("an id").to_owned();
    let answer = proxy.admin("DELETE", &format!("/api/v1/runs/{id}")).await;
    assert_eq!(answer.json()["cancel"], "sent");
    ended(&proxy, "cancelled", 1.0).await;
    let cancels = backend.requests().into_iter().filter(|request| request.target.contains("/cancel")).count();
    assert_eq!(cancels, 1);
    assert_eq!(proxy.admin("DELETE", &format!("/api/v1/runs/{id}")).await.status(), 404);
    assert_eq!(proxy.admin("DELETE", "/api/v1/runs/nonsense").await.status(), 400);
}

#[tokio::test]
async fn the_end_of_a_run_without_a_name_is_answered_for_when_it_is_known() {
    for (status, said, cancels) in [(200, "sent", 1), (500, "confirmed", 0)] {
        let backend = Backend::start().await;
        let gate = Gate::default();
        let answer = gate.clone();
        backend.each(move |request| {
            let json = ("content-type", "application/json");
            if request.method == "GET" || request.target.contains("/cancel") {
                return Script::answer(200, &[json], r#"{"status":"running"}"#);
            }
            let location = format!("{}/r-1", request.target);
            let Script(steps) = Script::answer(status, &[json, ("content-location", &location)], r#"{"run_id":"r-1"}"#);
            Script([Step::ReadBody, Step::Wait(answer.clone())].into_iter().chain(steps).collect())
        });
        let proxy = start_proxy(&config(&[&backend], "    agent_protocol: langgraph\n")).await;
        let _client = started(&proxy, &backend).await;
        let listed = proxy.admin("GET", "/api/v1/runs").await.json();
        let id = listed["runs"][0]["id"].as_str().expect("an id").to_owned();
        let path = format!("/api/v1/runs/{id}");
        let mut killing = std::pin::pin!(proxy.admin("DELETE", &path));
        let early = tokio::time::timeout(Duration::from_millis(300), killing.as_mut()).await;
        assert!(early.is_err(), "nobody knows yet: {}", early.expect("answered").text());
        gate.open();
        assert_eq!(killing.await.json()["cancel"], said);
        if cancels > 0 {
            eventually("its endpoint is called", || backend.requests().iter().any(|it| it.target.contains("/cancel")))
                .await;
        }
        assert_eq!(backend.requests().iter().filter(|it| it.target.contains("/cancel")).count(), cancels);
    }
}

#[tokio::test]
async fn an_operator_cuts_a_run_that_has_no_call() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&config(&[&backend], "    agent_protocol: http\n")).await;
    let mut client = proxy.connect().await;
    client.send("POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
    let drip = backend.drip().await;
    let head = client.read_head().await;
    let id = head.header("longhaul-run-id").expect("an id").to_owned();
    // Another stream at the same endpoint must not notice.
    let mut bystander = proxy.connect().await;
    bystander.send("POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
    let other = backend.drip().await;
    bystander.read_head().await;
    let answer = proxy.admin("DELETE", &format!("/api/v1/runs/{id}")).await;
    assert_eq!(answer.json()["cancel"], "confirmed");
    let rest = client.closed().await;
    assert!(!rest.ends_with(b"0\r\n\r\n"), "a cut is no end");
    drip.until_gone().await;
    ended(&proxy, "cancelled", 1.0).await;
    outstanding(&proxy, 1.0).await;
    other.event("still here").await;
    bystander.read_chunks_until("still here").await;
}

#[tokio::test]
async fn silence_ends_a_run_as_unknown_and_a_dead_endpoint_as_failed() {
    let (_, backend) = Agent::start().await;
    let silent = Backend::start().await;
    silent.each(|request| match request.method.as_str() {
        "POST" => Script::answer(
            200,
            &[("content-type", "application/json"), ("content-location", &format!("{}/r-1", request.target))],
            r#"{"run_id":"r-1"}"#,
        ),
        // No evidence: the proxy is not allowed to ask.
        _ => Script::status(403),
    });
    let more = "    agent_protocol: langgraph\n    runs: {unseen_timeout: 300ms}\n";
    let proxy = start_proxy(&config(&[&silent], more)).await;
    assert_eq!(create(&proxy, THREAD).await.status(), 200);
    ended(&proxy, "unknown", 1.0).await;
    drop(proxy);

    let proxy = start_proxy(&config(&[&backend], "    agent_protocol: langgraph\n")).await;
    assert_eq!(create(&proxy, THREAD).await.status(), 200);
    drop(backend);
    ended(&proxy, "failed", 1.0).await;
    outstanding(&proxy, 0.0).await;
}

/// Opens a stream, and returns it with its endpoint's end, when its head has come.
async fn stream(proxy: &Proxy, backend: &Backend) -> (RawClient, support::Drip) {
    let mut client = proxy.connect().await;
    client.send("POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").await;
    let drip = backend.drip().await;
    client.read_head().await;
    (client, drip)
}

#[tokio::test]
async fn a_run_goes_on_without_its_client_where_that_is_configured() {
    let backend = Backend::start().await;
    backend.drip_each();
    let more = "    runs: {on_disconnect: continue}\n";
    let proxy = start_proxy(&config(&[&backend], more)).await;
    let (client, drip) = stream(&proxy, &backend).await;
    drop(client);
    for number in 0..3 {
        drip.event(&number.to_string()).await;
    }
    outstanding(&proxy, 1.0).await;
    assert!(!drip.gone());
    drip.finish().await;
    ended(&proxy, "completed", 1.0).await;
    outstanding(&proxy, 0.0).await;
    proxy.metric_becomes("longhaul_stream_events_total", &["service=\"agents\""], 3.0).await;
}

#[tokio::test]
async fn a_run_goes_on_without_its_client_for_so_long_and_no_longer() {
    let backend = Backend::start().await;
    backend.drip_each();
    let more = "    runs: {on_disconnect: {continue_for: 200ms}}\n";
    let proxy = start_proxy(&config(&[&backend], more)).await;
    let (client, drip) = stream(&proxy, &backend).await;
    drop(client);
    drip.until_gone().await;
    ended(&proxy, "cancelled", 1.0).await;
}

#[tokio::test]
async fn a_heartbeat_breaks_silence_between_events_and_nowhere_else() {
    let backend = Backend::start().await;
    backend.drip_each_with(200, &[("content-type", "text/event-stream")]);
    let proxy = start_proxy(&config(&[&backend], "    runs: {heartbeat: 100ms}\n")).await;
    let (mut client, drip) = stream(&proxy, &backend).await;
    client.read_chunks_until(": heartbeat\n\n").await;
    drip.event("one").await;
    let text = client.read_chunks_until("data: one\n\n").await;
    assert!(text.ends_with("data: one\n\n"));
    client.read_chunks_until(": heartbeat\n\n: heartbeat\n\n").await;
    // Half an event: a comment here would be part of it.
    drip.data("data: tw").await;
    client.read_chunks_until("data: tw").await;
    let began = longhaul::ids::now();
    eventually("time goes by", || began.elapsed() > Duration::from_millis(350)).await;
    drip.data("o\n\n").await;
    let text = client.read_chunks_until("o\n\n").await;
    assert_eq!(text, "o\n\n", "nothing was put into the event");
    drip.finish().await;
    while client.read_chunk().await.is_some() {}
}

#[tokio::test]
async fn no_heartbeat_is_put_into_what_is_no_event_stream() {
    let backend = Backend::start().await;
    backend.drip_each_with(200, &[("content-type", "application/json")]);
    let proxy = start_proxy(&config(&[&backend], "    runs: {heartbeat: 50ms}\n")).await;
    let (mut client, drip) = stream(&proxy, &backend).await;
    let began = longhaul::ids::now();
    eventually("time goes by", || began.elapsed() > Duration::from_millis(200)).await;
    drip.data("{}").await;
    assert_eq!(client.read_chunk().await, Some(b"{}".to_vec()));
}

#[tokio::test]
async fn load_that_an_endpoint_reports_keeps_new_runs_away_from_it() {
    let (busy, idle) = (Backend::start().await, Backend::start().await);
    let report = |load: &'static str| move |_: &Request| Script::answer(200, &[("endpoint-load-metrics", load)], "");
    busy.each(report("TEXT named_metrics.runs=50"));
    idle.each(report("TEXT named_metrics.runs=0"));
    let proxy = start_proxy(&config(&[&busy, &idle], "")).await;
    for _ in 0..20 {
        assert_eq!(post(proxy.address, "/run", "", "").await.status(), 200);
    }
    // Until it has reported it is as good as the other.
    assert_eq!(busy.request_count(), 1);
    let endpoint = proxy.endpoint(&busy.address().to_string()).await.expect("it is there");
    assert_eq!(endpoint["reported_runs"], 50);
}

#[tokio::test]
async fn load_in_the_answer_of_a_health_check_counts_and_so_does_an_agentcore_ping() {
    let (busy, idle) = (Backend::start().await, Backend::start().await);
    busy.each(|_| Script::json(200, r#"{"queue":{"running":7}}"#));
    idle.each(|_| Script::json(200, r#"{"queue":{"running":0}}"#));
    let more = "    health: {path: /status, interval: 50ms, load: /queue/running}\n";
    let proxy = start_proxy(&config(&[&busy, &idle], more)).await;
    let address = busy.address().to_string();
    eventually_async("the load is known", || async {
        proxy.endpoint(&address).await.is_some_and(|endpoint| endpoint["reported_runs"] == 7)
    })
    .await;
    let starts = |backend: &Backend| backend.requests().iter().filter(|request| request.method == "POST").count();
    for _ in 0..5 {
        assert_eq!(post(proxy.address, "/run", "", "").await.status(), 200);
    }
    assert_eq!((starts(&busy), starts(&idle)), (0, 5));
}
