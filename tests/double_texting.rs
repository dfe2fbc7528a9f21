//! Double texting: a second message in a session that has a run, under each policy, over plain HTTP and as LangGraph.

mod support;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use support::{
    Backend, Counting, Gate, Proxy, RawClient, Request, Script, Seen, Step, eventually, langgraph, post, start_proxy,
};

const SESSIONS: usize = 1_000;

/// Sessions that are under way at once.
const AT_ONCE: usize = 50;

fn config(url: &str, protocol: &str, runs: &str) -> String {
    format!(
        "services:\n  - name: agents\n    agent_protocol: {protocol}\n    session: {{key: [{{header: x-session}}]}}\n    \
         runs: {{{runs}}}\n    versions: [{{name: stable, endpoints: [\"{url}\"]}}]\n"
    )
}

fn start(session: usize, name: &str, microseconds: &str) -> String {
    format!(
        "POST /run HTTP/1.1\r\nHost: agents.test\r\nX-Session: s{session}\r\nX-Name: {name}\r\n\
         X-Microseconds: {microseconds}\r\nContent-Length: 0\r\n\r\n"
    )
}

/// What the two clients of a session got.
#[derive(Debug)]
struct Texted {
    first_truncated: bool,
    second: u16,
    code: Option<String>,
    /// The run that a refusal names, and the first one's.
    named: Option<String>,
    first_run: Option<String>,
    should_retry: Option<String>,
}

/// When the first run of a session ends by itself.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Release {
    /// The second has been answered.
    Answered,
    /// A little after the second was sent.
    Sent,
    Never,
}

/// A session's first message, and a second one as soon as the first has been heard of.
async fn text_twice(proxy: &Proxy, backend: &Counting, session: usize, release: Release) -> Texted {
    let mut first = proxy.connect().await;
    first.send(start(session, "first", "held")).await;
    let head = first.read_head().await;
    assert_eq!(head.status, 200);
    let first_run = head.header("longhaul-run-id").map(str::to_owned);
    first.read_chunks_until("begin first").await;
    let mut second = proxy.connect().await;
    second.send(start(session, "second", "5000")).await;
    if release == Release::Sent {
        tokio::time::sleep(Duration::from_millis(20)).await;
        backend.release(&format!("s{session}"));
    }
    let answer = second.read_response().await;
    if release == Release::Answered {
        backend.release(&format!("s{session}"));
    }
    assert!(!answer.truncated, "the second is answered whole");
    let rest = first.read_to_end_of_body().await;
    Texted {
        first_truncated: !rest.contains("end first"),
        second: answer.status(),
        code: answer.code(),
        named: answer.header("longhaul-run-id").map(str::to_owned),
        first_run,
        should_retry: answer.header("x-should-retry").map(str::to_owned),
    }
}

/// What `text` got in each session.
async fn text_all<F: Future>(text: impl Fn(usize) -> F) -> Vec<F::Output> {
    let mut under_way = FuturesUnordered::new();
    let mut texted = Vec::new();
    for session in 0..SESSIONS {
        if under_way.len() >= AT_ONCE {
            texted.extend(under_way.next().await);
        }
        under_way.push(text(session));
    }
    while let Some(one) = under_way.next().await {
        texted.push(one);
    }
    texted
}

/// The first and the second run of each session, as the backend saw them.
fn by_session(seen: Vec<Seen>) -> HashMap<String, Vec<Seen>> {
    let mut sessions: HashMap<String, Vec<Seen>> = HashMap::new();
    for run in seen {
        sessions.entry(run.session.clone()).or_default().push(run);
    }
    assert_eq!(sessions.len(), SESSIONS);
    sessions
}

async fn thousand(policy: &str, release: Release) -> (Vec<Texted>, HashMap<String, Vec<Seen>>) {
    let backend = Counting::start();
    let runs = format!("queue: {{max: 1000}}, double_texting: {{policy: {policy}}}");
    let proxy = start_proxy(&config(&backend.url(), "http", &runs)).await;
    let begun = longhaul::ids::now();
    let texted = text_all(|session| text_twice(&proxy, &backend, session, release)).await;
    let sessions = by_session(backend.seen());
    let runs: usize = sessions.values().map(Vec::len).sum();
    let beside = sessions.values().flatten().filter(|run| run.beside > 0).count();
    let whole = sessions.values().flatten().filter(|run| run.whole).count();
    println!(
        "{policy}: {SESSIONS} sessions texted twice in {:?}: {runs} runs at the backend, {beside} beside another of their \
         session, {whole} whole; answers to the second: {:?}",
        begun.elapsed(),
        texted.iter().fold(HashMap::<u16, usize>::new(), |mut counts, one| {
            *counts.entry(one.second).or_default() += 1;
            counts
        }),
    );
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
    (texted, sessions)
}

#[tokio::test]
async fn allow_lets_both_run_at_once() {
    let (texted, sessions) = thousand("allow", Release::Answered).await;
    assert!(texted.iter().all(|one| one.second == 200 && !one.first_truncated));
    assert!(sessions.values().all(|runs| matches!(&runs[..], [_, second] if second.beside == 1)));
}

#[tokio::test]
async fn reject_shows_the_backend_the_first_alone() {
    let (texted, sessions) = thousand("reject", Release::Answered).await;
    for one in &texted {
        assert_eq!((one.second, one.code.as_deref(), one.first_truncated), (409, Some("session_busy"), false));
        assert!(one.named.is_some() && one.named == one.first_run, "{one:?}");
        assert_eq!(one.should_retry.as_deref(), Some("false"));
    }
    assert!(sessions.values().all(|runs| matches!(&runs[..], [first] if first.whole)));
}

#[tokio::test]
async fn enqueue_shows_the_backend_one_after_the_other() {
    let (texted, sessions) = thousand("enqueue", Release::Sent).await;
    assert!(texted.iter().all(|one| one.second == 200 && !one.first_truncated));
    for runs in sessions.values() {
        let [first, second] = &runs[..] else { panic!("{runs:?}") };
        assert_eq!((first.name.as_str(), second.name.as_str(), second.beside), ("first", "second", 0));
        assert!(first.whole && second.whole && first.ended.is_some_and(|ended| ended <= second.started));
    }
}

#[tokio::test]
async fn interrupt_shows_the_backend_the_end_of_the_first_before_the_second() {
    let (texted, sessions) = thousand("interrupt", Release::Never).await;
    assert!(texted.iter().all(|one| one.second == 200 && one.first_truncated));
    for runs in sessions.values() {
        let [first, second] = &runs[..] else { panic!("{runs:?}") };
        assert_eq!((first.name.as_str(), second.name.as_str(), second.beside), ("first", "second", 0));
        assert!(!first.whole && second.whole && first.ended.is_some_and(|ended| ended <= second.started));
    }
}

/// What a LangGraph server was asked of its threads' runs, in order.
#[derive(Clone, Default)]
struct Threads(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// By thread: what happened.
    story: HashMap<String, Vec<String>>,
    /// By run: its end.
    running: HashMap<String, Gate>,
    runs: usize,
    cancelled_with: Vec<Option<String>>,
}

impl Threads {
    async fn start() -> (Threads, Backend) {
        let threads = Threads::default();
        let backend = Backend::start().await;
        let serving = threads.clone();
        backend.each(move |request| serving.answer(request));
        (threads, backend)
    }

    fn answer(&self, request: &Request) -> Script {
        let mut state = self.0.lock().expect("no panic");
        match (request.method.as_str(), langgraph::parts(request).as_slice()) {
            ("POST", ["threads", thread, "runs", "stream"]) => {
                state.runs += 1;
                let run = langgraph::run_id(state.runs);
                let gate = Gate::new();
                state.running.insert(run.clone(), gate.clone());
                let story = state.story.entry((*thread).to_owned()).or_default();
                story.push("start".to_owned());
                if story.len() > 1 {
                    // The second ends by itself.
                    gate.open();
                    state.running.remove(&run);
                }
                langgraph::stream(thread, &run, Some(&gate))
            }
            ("POST", ["threads", thread, "runs", run, "cancel", action]) => {
                let authorization = request.header("authorization").map(str::to_owned);
                state.cancelled_with.push(authorization);
                state.story.entry((*thread).to_owned()).or_default().push((*action).to_owned());
                if let Some(gate) = state.running.remove(*run) {
                    gate.open();
                }
                Script::json(202, "")
            }
            ("GET", ["threads", _, "runs", run]) => {
                let runs = state.running.contains_key(*run);
                langgraph::state(run, Some(if runs { "running" } else { "interrupted" }))
            }
            _ => Script::json(404, "{}"),
        }
    }
}

async fn text_thread(proxy: &Proxy, number: usize) -> (bool, u16) {
    let path = format!("/threads/11111111-1111-4111-8111-{number:012}/runs/stream");
    let body = r#"{"assistant_id":"agent"}"#;
    let request = |authorization: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: agents.test\r\nContent-Type: application/json\r\n{authorization}Content-Length: \
             {}\r\n\r\n{body}",
            body.len()
        )
    };
    let mut first = proxy.connect().await;
    first.send(request("")).await;
    first.read_head().await;
    first.read_chunks_until("run_id").await;
    let mut second = proxy.connect().await;
    second.send(request(&format!("Authorization: Bearer {number}\r\n"))).await;
    let answer = second.read_response().await;
    assert!(!answer.truncated);
    // Cut, or ended by its agent, which was told to.
    first.read_to_end_of_body().await;
    (answer.text().contains("run_id"), answer.status())
}

/// The protocol's own cancel call goes first, with the credentials of the request that asked for it.
async fn thousand_threads(policy: &str, action: &str) {
    let (threads, backend) = Threads::start().await;
    let runs = format!("queue: {{max: 1000}}, double_texting: {{policy: {policy}}}");
    let proxy = start_proxy(&config(backend.url(), "langgraph", &runs)).await;
    let begun = longhaul::ids::now();
    let texted = text_all(|number| text_thread(&proxy, number)).await;
    assert!(texted.iter().all(|one| *one == (true, 200)));
    let state = threads.0.lock().expect("no panic");
    let mut credentials: Vec<Option<String>> = state.cancelled_with.clone();
    credentials.sort();
    credentials.dedup();
    println!(
        "{policy} as langgraph: {SESSIONS} threads texted twice in {:?}: {} starts, {} cancel calls, each with the \
         credentials of its own second message: {}",
        begun.elapsed(),
        state.runs,
        state.cancelled_with.len(),
        credentials.len(),
    );
    assert_eq!(state.story.len(), SESSIONS);
    let promised = ["start", action, "start"];
    assert!(state.story.values().all(|story| *story == promised), "{:?}", state.story.values().next());
    assert_eq!(credentials.len(), SESSIONS);
    assert!(credentials.iter().all(Option::is_some));
}

#[tokio::test]
async fn interrupt_uses_the_protocols_own_call() {
    thousand_threads("interrupt", "action=interrupt").await;
}

/// A background run that its endpoint has not named yet: closing its connection would end nothing there.
#[tokio::test]
async fn a_run_without_a_name_is_interrupted_once_it_has_one() {
    let backend = Backend::start().await;
    let gate = Gate::default();
    let (first_answer, story) = (gate.clone(), Arc::new(Mutex::new(Vec::<String>::new())));
    let told = story.clone();
    backend.each(move |request| {
        let mut story = told.lock().expect("no panic");
        let json = ("content-type", "application/json");
        if request.method == "GET" {
            return Script::answer(200, &[json], r#"{"status":"interrupted"}"#);
        }
        if request.target.contains("/cancel") {
            story.push(format!("{} {}", request.target, request.header("authorization").unwrap_or("nobody")));
            return Script::answer(202, &[json], "");
        }
        let run = format!("r-{}", story.len());
        let location = format!("{}/{run}", request.target);
        story.push("start".to_owned());
        let Script(steps) = Script::answer(200, &[json, ("content-location", &location)], "{}");
        let held = (run == "r-0").then(|| Step::Wait(first_answer.clone()));
        Script([Step::ReadBody].into_iter().chain(held).chain(steps).collect())
    });
    let runs = "queue: {max: 10}, double_texting: {policy: interrupt}";
    let proxy = start_proxy(&config(backend.url(), "langgraph", runs)).await;
    let start = |authorization: &str| {
        let body = r#"{"assistant_id":"agent"}"#;
        format!(
            "POST /threads/11111111-1111-4111-8111-111111111111/runs HTTP/1.1\r\nHost: a\r\n\
             Content-Type: application/json\r\nAuthorization: {authorization}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let (mut first, mut second) = (proxy.connect().await, proxy.connect().await);
    first.send(start("first")).await;
    eventually("the endpoint has the first", || story.lock().expect("no panic").len() == 1).await;
    second.send(start("second")).await;
    proxy.metric_becomes("longhaul_queued_runs", &[], 1.0).await;
    assert_eq!(*story.lock().expect("no panic"), ["start"]);
    gate.open();
    assert_eq!(first.read_response().await.status(), 200);
    assert_eq!(second.read_response().await.status(), 200);
    let cancel = "/threads/11111111-1111-4111-8111-111111111111/runs/r-0/cancel?action=interrupt second";
    assert_eq!(*story.lock().expect("no panic"), ["start", cancel, "start"]);
}

#[tokio::test]
async fn rollback_uses_the_protocols_own_call() {
    thousand_threads("rollback", "action=rollback").await;
}

#[tokio::test]
async fn a_request_may_choose_its_policy_where_that_is_allowed() {
    for allowed in [true, false] {
        let backend = Backend::start().await;
        backend.drip_each();
        let runs = format!("double_texting: {{policy: allow, allow_override: {allowed}}}");
        let proxy = start_proxy(&config(backend.url(), "http", &runs)).await;
        let mut first = proxy.connect().await;
        first.send(start(1, "first", "0")).await;
        let running = backend.drip().await;
        let choose = |policy: &str| format!("X-Session: s1\r\nLonghaul-Double-Texting: {policy}\r\n");
        if allowed {
            let rejected = post(proxy.address, "/run", &choose("reject"), "").await;
            assert_eq!((rejected.status(), rejected.code().as_deref()), (409, Some("session_busy")));
            for bad in ["rollback", "maybe"] {
                let bad = post(proxy.address, "/run", &choose(bad), "").await;
                assert_eq!((bad.status(), bad.code().as_deref()), (400, Some("bad_request")));
            }
            let full = post(proxy.address, "/run", &choose("enqueue"), "").await;
            assert_eq!((full.status(), full.code().as_deref()), (429, Some("queue_full")), "there is no place to wait");
        }
        let mut second = proxy.connect().await;
        let policy = if allowed { "interrupt" } else { "reject" };
        second.send(format!("POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n{}\r\n", choose(policy))).await;
        let second_run = backend.drip().await;
        assert!(second_run.request.header("longhaul-double-texting").is_none());
        if allowed {
            running.until_gone().await;
        }
        second_run.finish().await;
        assert_eq!(second.read_response().await.status(), 200);
    }
}

#[tokio::test]
async fn whoever_waits_for_its_turn_may_leave_and_the_next_goes() {
    let backend = Backend::start().await;
    backend.drip_each();
    let runs = "queue: {max: 5}, double_texting: {policy: enqueue}";
    let proxy = start_proxy(&config(backend.url(), "http", runs)).await;
    let mut clients: Vec<RawClient> = Vec::new();
    let mut first = proxy.connect().await;
    first.send(start(1, "first", "0")).await;
    let running = backend.drip().await;
    for (count, name) in [(1.0, "second"), (2.0, "third")] {
        let mut client = proxy.connect().await;
        client.send(start(1, name, "0")).await;
        clients.push(client);
        proxy.metric_becomes("longhaul_queued_runs", &[], count).await;
    }
    assert_eq!(proxy.metric("longhaul_placeable_demand", &[]).await, Some(0.0), "no other endpoint would help them");
    drop(clients.remove(0));
    proxy.metric_becomes("longhaul_queued_runs", &[], 1.0).await;
    running.finish().await;
    let next = backend.drip().await;
    assert_eq!(next.request.header("x-name"), Some("third"));
    next.finish().await;
    assert_eq!(clients[0].read_response().await.status(), 200);
}

#[tokio::test]
async fn an_interrupted_start_is_told_by_whom_and_a_stuck_one_holds_nobody_for_ever() {
    let backend = Backend::start().await;
    backend.drip_each();
    let runs = "queue: {max: 5}, double_texting: {policy: interrupt}, max_per_endpoint: 1";
    let proxy = start_proxy(&config(backend.url(), "http", runs)).await;
    // Another session holds the only slot, so that a start waits, which a second one replaces.
    let mut other = proxy.connect().await;
    other.send(start(2, "other", "0")).await;
    let running = backend.drip().await;
    let mut first = proxy.connect().await;
    first.send(start(1, "first", "0")).await;
    proxy.metric_becomes("longhaul_queued_runs", &[], 1.0).await;
    let mut second = proxy.connect().await;
    second.send(start(1, "second", "0")).await;
    let replaced = first.read_response().await;
    assert_eq!((replaced.status(), replaced.code().as_deref()), (409, Some("session_busy")));
    running.finish().await;
    let next = backend.drip().await;
    assert_eq!(next.request.header("x-name"), Some("second"));
    assert_eq!(next.request.header("longhaul-run-id"), replaced.header("longhaul-run-id"));
    next.finish().await;
    tokio::time::timeout(Duration::from_secs(5), second.read_response()).await.expect("it is answered");
}
