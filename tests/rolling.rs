//! Rolling: real processes are drained, killed and replaced under load, and nothing is cut: endpoints, then the proxy itself.
//! And what dies silently takes only its own runs along.
//!
//! By default in a fiftieth of real time. In full (streams of 5 to 60 s, 1,000 reloads and 100,000 runs):
//! `ROLLING_SCALE=1 ROLLING_FULL=1 cargo test --release --test rolling -- --nocapture --test-threads 1`

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use longhaul::ids;
use support::*;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader as AsyncBufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Events of one stream.
const EVENTS: u64 = 20;

/// Where a process of this test is told to be an endpoint: the address on which to listen.
const AGENT: &str = "ROLLING_AGENT_ADDRESS";

/// How much of real time the streams take.
fn scale() -> f64 {
    std::env::var("ROLLING_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(0.02)
}

fn full() -> bool {
    std::env::var_os("ROLLING_FULL").is_some()
}

// ---- an endpoint ----

/// No test: what the others start as a process of its own.
#[test]
#[ignore = "the endpoint process of the other tests"]
fn endpoint_process() {
    let Ok(address) = std::env::var(AGENT) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let listener = TcpListener::bind(&address).await.expect("its address");
        let local = listener.local_addr().expect("bound");
        println!("\nendpoint listening on {local}");
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            tokio::spawn(serve(stream, local));
        }
    });
}

/// `/stream?N`: events over so many milliseconds, each with the endpoint's address and its number; else `ok`.
async fn serve(stream: TcpStream, local: SocketAddr) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = AsyncBufReader::new(read);
    loop {
        let (mut first, mut length) = (String::new(), 0);
        if read.read_line(&mut first).await? == 0 {
            return Ok(());
        }
        loop {
            let mut line = String::new();
            read.read_line(&mut line).await?;
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().expect("a number");
            }
            if line.trim().is_empty() {
                break;
            }
        }
        read.read_exact(&mut vec![0; length]).await?;
        let path = first.split(' ').nth(1).unwrap_or_default();
        let Some(milliseconds) = path.strip_prefix("/stream?").and_then(|text| text.parse::<u64>().ok()) else {
            write.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await?;
            continue;
        };
        write
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            .await?;
        for number in 0..EVENTS {
            let event = format!("data: {local} {number}\n\n");
            write.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await?;
            tokio::time::sleep(Duration::from_millis(milliseconds) / EVENTS as u32).await;
        }
        write.write_all(b"0\r\n\r\n").await?;
    }
}

/// An endpoint process. Dropping it kills it.
struct Agent {
    child: Child,
    address: SocketAddr,
}

impl Agent {
    fn start(address: &str) -> Agent {
        Agent::start_by(&mut Command::new(std::env::current_exe().expect("this test")), address)
    }

    /// `command` runs this test's program, to which the arguments are added.
    fn start_by(command: &mut Command, address: &str) -> Agent {
        let mut child = command
            .args(["--exact", "endpoint_process", "--ignored", "--nocapture", "--test-threads", "1"])
            .env(AGENT, address)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this test's program");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let address = loop {
            let line = lines.next().expect("it says where it listens").expect("text");
            if let Some(address) = line.strip_prefix("endpoint listening on ") {
                break address.parse().expect("an address");
            }
        };
        // The harness of that process has more to say at its end, to nobody.
        std::thread::spawn(move || lines.for_each(drop));
        Agent { child, address }
    }

    fn kill(mut self) -> SocketAddr {
        self.signal("KILL");
        let _ = self.child.wait();
        self.address
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name}");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// ---- a proxy ----

/// The program, and where it listens.
struct Served {
    program: Program,
    address: SocketAddr,
    admin: SocketAddr,
    file: std::path::PathBuf,
    listen: String,
}

impl Served {
    async fn start(directory: &Path, name: &str, listen: &str, services: &str) -> Served {
        let file = directory.join(name);
        let listen = listen.to_owned();
        std::fs::write(&file, Served::config(&listen, services)).expect("writable");
        let program = Program::start(&["run", "-c", file.to_str().expect("UTF-8")]);
        let admin = program.after("admin listening on ").await.trim().parse().expect("an address");
        let rest = program.after(" listening on ").await;
        let address = rest.split_whitespace().next().expect("an address").parse().expect("an address");
        let served = Served { program, address, admin, file, listen };
        eventually_async("the proxy is ready", || async { ask_admin(admin, "GET", "/readyz").await.status() == 200 })
            .await;
        served
    }

    fn config(listen: &str, services: &str) -> String {
        format!(
            "listeners: [{{name: public, address: '{listen}'}}]\nadmin: {{address: '127.0.0.1:0'}}\nlog: {{access: false}}\nshutdown: {{delay: 200ms, timeout: 5m}}\n{services}"
        )
    }

    async fn reload(&self, services: &str) {
        std::fs::write(&self.file, Served::config(&self.listen, services)).expect("writable");
        let answer = ask_admin(self.admin, "POST", "/api/v1/reload").await;
        assert_eq!(answer.status(), 200, "{}", answer.text());
    }

    async fn endpoint(&self, address: SocketAddr) -> serde_json::Value {
        let status = ask_admin(self.admin, "GET", "/api/v1/status").await.json();
        let endpoints = status["services"][0]["versions"][0]["endpoints"].as_array().cloned().unwrap_or_default();
        let found = endpoints.into_iter().find(|endpoint| endpoint["address"] == address.to_string());
        found.unwrap_or(serde_json::Value::Null)
    }

    async fn steer(&self, address: SocketAddr, verb: &str) {
        let address = address.to_string().replace(':', "%3A");
        let path = format!("/api/v1/services/support/endpoints/{address}/{verb}");
        assert_eq!(ask_admin(self.admin, "POST", &path).await.status(), 200);
    }

    /// Polled gently: a drain takes as long as its longest stream.
    async fn drained(&self, address: SocketAddr) {
        let end = ids::now() + Duration::from_secs(30) + Duration::from_secs(90).mul_f64(scale());
        loop {
            let endpoint = self.endpoint(address).await;
            if endpoint["outstanding_runs"] == 0 && endpoint["open_exchanges"] == 0 {
                return;
            }
            assert!(ids::now() < end, "not drained: {endpoint}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn services(endpoints: &[SocketAddr], rest: &str) -> String {
    let urls: Vec<String> = endpoints.iter().map(|address| format!("\"http://{address}\"")).collect();
    format!(
        "services:\n  - name: support\n    session: {{key: [{{header: x-session-id}}]}}\n{rest}    versions:\n      - {{name: stable, endpoints: [{}]}}\n",
        urls.join(", ")
    )
}

// ---- clients ----

/// How one stream ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Whole(SocketAddr),
    /// Broke off after its head; `None`: before any event.
    Cut(Option<SocketAddr>),
    /// Answered, but not by a stream.
    Refused(u16),
    /// Nothing of an answer came: another try is harmless.
    Unanswered,
}

/// Starts a run that streams for so long, and reads it to its end.
async fn stream(proxy: SocketAddr, session: &str, time: Duration) -> Outcome {
    stream_telling(proxy, session, time, &AtomicUsize::new(0)).await
}

/// As [`stream`]; counts in `begun` once its first event is there.
async fn stream_telling(proxy: SocketAddr, session: &str, time: Duration, begun: &AtomicUsize) -> Outcome {
    let Ok(stream) = TcpStream::connect(proxy).await else { return Outcome::Unanswered };
    let mut stream = AsyncBufReader::new(stream);
    let head = format!(
        "POST /stream?{} HTTP/1.1\r\nHost: a\r\nx-session-id: {session}\r\nContent-Length: 0\r\n\r\n",
        time.as_millis()
    );
    let mut line = String::new();
    if stream.write_all(head.as_bytes()).await.is_err() || !matches!(stream.read_line(&mut line).await, Ok(1..)) {
        return Outcome::Unanswered;
    }
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    if status != 200 {
        return Outcome::Refused(status);
    }
    let (mut from, mut next) = (None, 0);
    loop {
        line.clear();
        if !matches!(stream.read_line(&mut line).await, Ok(1..)) {
            return Outcome::Cut(from);
        }
        if let Some(event) = line.strip_prefix("data: ") {
            let (endpoint, number) = event.trim().split_once(' ').expect("an endpoint and a number");
            assert_eq!(number, next.to_string(), "events are lost or doubled");
            let endpoint = Some(endpoint.parse().expect("an address"));
            assert!(from.is_none() || from == endpoint, "a stream of two endpoints");
            if next == 0 {
                begun.fetch_add(1, Ordering::SeqCst);
            }
            from = endpoint;
            next += 1;
        }
        if line == "0\r\n" {
            assert_eq!(next, EVENTS, "it ended as if complete");
            return Outcome::Whole(from.expect("events have an endpoint"));
        }
    }
}

/// Between 5 and 60 seconds, times the scale.
fn stream_time(number: usize) -> Duration {
    let share = (number.wrapping_mul(2_654_435_761) % 10_007) as f64 / 10_007.0;
    Duration::from_secs_f64((5.0 + 55.0 * share) * scale())
}

/// What many clients have seen.
#[derive(Default)]
struct Tally {
    whole: AtomicUsize,
    retried: AtomicUsize,
}

/// So many clients, each with a session in which one run follows another until `enough`. A start that nobody has answered
/// is made again; everything else that is not a whole stream is returned.
fn load(
    proxies: Arc<dyn Fn() -> SocketAddr + Send + Sync>,
    clients: usize,
    tally: &Arc<Tally>,
    enough: &Arc<AtomicBool>,
) -> JoinSet<Vec<Outcome>> {
    let mut running = JoinSet::new();
    for client in 0..clients {
        let (proxies, tally, enough) = (Arc::clone(&proxies), Arc::clone(tally), Arc::clone(enough));
        running.spawn(async move {
            let mut wrong = Vec::new();
            let mut number = client;
            while !enough.load(Ordering::SeqCst) {
                number += clients;
                match stream(proxies(), &format!("session-{client}"), stream_time(number)).await {
                    Outcome::Whole(_) => drop(tally.whole.fetch_add(1, Ordering::SeqCst)),
                    Outcome::Unanswered => {
                        tally.retried.fetch_add(1, Ordering::SeqCst);
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    other => wrong.push(other),
                }
            }
            wrong
        });
    }
    running
}

// ---- nothing is cut ----

#[tokio::test]
async fn a_rolling_restart_of_endpoints_cuts_nothing() {
    const ENDPOINTS: usize = 10;
    const CLIENTS: usize = 500;
    longhaul::net::descriptors::raise_limit().expect("a limit");
    let directory = tempfile::tempdir().expect("a directory");
    let mut agents: Vec<Agent> = (0..ENDPOINTS).map(|_| Agent::start("127.0.0.1:0")).collect();
    let addresses: Vec<SocketAddr> = agents.iter().map(|agent| agent.address).collect();
    let proxy = Served::start(directory.path(), "a.yaml", "127.0.0.1:0", &services(&addresses, "")).await;
    let (tally, enough) = (Arc::<Tally>::default(), Arc::<AtomicBool>::default());
    let address = proxy.address;
    let mut running = load(Arc::new(move || address), CLIENTS, &tally, &enough);
    eventually_async("every client has a stream", || async {
        let mut outstanding = 0;
        for address in &addresses {
            outstanding += proxy.endpoint(*address).await["outstanding_runs"].as_u64().unwrap_or(0);
        }
        outstanding > CLIENTS as u64 * 9 / 10
    })
    .await;

    let began = ids::now();
    let mut longest = Duration::ZERO;
    for agent in &mut agents {
        let drained = ids::now();
        proxy.steer(agent.address, "drain").await;
        proxy.drained(agent.address).await;
        longest = longest.max(drained.elapsed());
        let address = agent.address;
        let _ = agent.child.kill();
        let _ = agent.child.wait();
        *agent = Agent::start(&address.to_string());
        proxy.steer(address, "undrain").await;
    }
    enough.store(true, Ordering::SeqCst);
    let mut wrong = Vec::new();
    while let Some(of_client) = running.join_next().await {
        wrong.extend(of_client.expect("no panic"));
    }
    let (whole, retried) = (tally.whole.load(Ordering::SeqCst), tally.retried.load(Ordering::SeqCst));
    println!(
        "endpoints: {whole} whole, {} cut or refused, {retried} unanswered, {:?} in all, longest drain {longest:?}",
        wrong.len(),
        began.elapsed()
    );
    assert_eq!((wrong, retried), (vec![], 0));
    assert!(whole >= CLIENTS, "{whole}");
}

#[tokio::test]
async fn one_proxy_takes_over_from_another_on_the_same_port() {
    const CLIENTS: usize = 200;
    longhaul::net::descriptors::raise_limit().expect("a limit");
    let directory = tempfile::tempdir().expect("a directory");
    let agents: Vec<Agent> = (0..3).map(|_| Agent::start("127.0.0.1:0")).collect();
    let addresses: Vec<SocketAddr> = agents.iter().map(|agent| agent.address).collect();
    let text = services(&addresses, "");
    let mut proxy = Served::start(directory.path(), "0.yaml", "127.0.0.1:0", &text).await;
    let port = proxy.address;
    let (tally, enough) = (Arc::<Tally>::default(), Arc::<AtomicBool>::default());
    let mut running = load(Arc::new(move || port), CLIENTS, &tally, &enough);
    for round in 1..=3 {
        let before = tally.whole.load(Ordering::SeqCst);
        let next = Served::start(directory.path(), &format!("{round}.yaml"), &port.to_string(), &text).await;
        assert_eq!(next.address, port);
        proxy.program.signal("TERM");
        let patience = Duration::from_secs(20) + Duration::from_secs(70).mul_f64(scale());
        let end = ids::now() + patience;
        let left = proxy.program.id();
        while Path::new(&format!("/proc/{left}/fd")).read_dir().is_ok_and(|mut open| open.next().is_some()) {
            assert!(ids::now() < end, "the old proxy did not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(proxy.program.ended().await.code(), Some(0), "{:?}", proxy.program.lines());
        proxy = next;
        let clients = CLIENTS / 2;
        eventually_within(patience, "the next proxy serves", || tally.whole.load(Ordering::SeqCst) > before + clients)
            .await;
    }
    enough.store(true, Ordering::SeqCst);
    let mut wrong = Vec::new();
    while let Some(of_client) = running.join_next().await {
        wrong.extend(of_client.expect("no panic"));
    }
    let (whole, retried) = (tally.whole.load(Ordering::SeqCst), tally.retried.load(Ordering::SeqCst));
    println!("proxies: {whole} whole, {} cut or refused, {retried} unanswered and made again", wrong.len());
    assert_eq!(wrong, vec![]);
    // What was in the queue of the socket that closed.
    assert!(retried < CLIENTS, "{retried}");
}

// ---- silent death ----

/// Checks often, and waits for no dead stream for long.
const WATCHFUL: &str = "    health: {path: /health, interval: 200ms, timeout: 400ms, unhealthy_after: 2, healthy_after: 1}\n    timeouts: {connect: 500ms, first_byte: 2s, idle: 2s}\n    retries: {attempts: 3}\n";

/// One of five endpoints dies, by `die`; `revive` brings it back. `first` is the one that does.
async fn only_its_own_runs_fail(
    what: &str,
    first: Agent,
    die: impl FnOnce(Agent) -> Option<Agent>,
    revive: impl FnOnce(Option<Agent>) -> Agent,
) {
    const SESSIONS: usize = 50;
    let directory = tempfile::tempdir().expect("a directory");
    let others: Vec<Agent> = (0..4).map(|_| Agent::start("127.0.0.1:0")).collect();
    let dying = first.address;
    let addresses: Vec<SocketAddr> = others.iter().map(|agent| agent.address).chain([dying]).collect();
    let proxy = Served::start(directory.path(), "a.yaml", "127.0.0.1:0", &services(&addresses, WATCHFUL)).await;
    for address in &addresses {
        eventually_async("every endpoint is ready", || async { proxy.endpoint(*address).await["state"] == "ready" })
            .await;
    }
    let begun = Arc::<AtomicUsize>::default();
    let mut running = JoinSet::new();
    for number in 0..SESSIONS {
        let (address, begun) = (proxy.address, Arc::clone(&begun));
        running.spawn(async move {
            let session = format!("s-{number}");
            (number, stream_telling(address, &session, Duration::from_secs(4), &begun).await)
        });
    }
    eventually("all streams have begun", || begun.load(Ordering::SeqCst) == SESSIONS).await;
    assert_eq!(proxy.endpoint(dying).await["outstanding_runs"], SESSIONS / 5);

    let died = ids::now();
    let body = die(first);
    eventually_async("it is taken out", || async { proxy.endpoint(dying).await["state"] != "ready" }).await;
    let out_after = died.elapsed();
    let mut ends: BTreeMap<usize, Outcome> = BTreeMap::new();
    while let Some(ended) = running.join_next().await {
        let (number, outcome) = ended.expect("no panic");
        ends.insert(number, outcome);
    }
    let lost: BTreeSet<usize> =
        ends.iter().filter(|(_, end)| !matches!(end, Outcome::Whole(_))).map(|(number, _)| *number).collect();
    for number in &lost {
        assert_eq!(ends[number], Outcome::Cut(Some(dying)), "only its own runs fail");
    }
    assert_eq!(lost.len(), SESSIONS / 5, "{ends:?}");
    println!("{what}: taken out after {out_after:?}, {} of {SESSIONS} runs cut", lost.len());
    // Two checks in a row, each with its interval and time-out.
    assert!(out_after < Duration::from_secs(3), "{out_after:?}");

    // Its sessions are bound to others.
    for number in &lost {
        let again = stream(proxy.address, &format!("s-{number}"), Duration::from_millis(50)).await;
        assert!(matches!(again, Outcome::Whole(other) if other != dying), "{again:?}");
    }
    let _alive = revive(body);
    eventually_async("it is back", || async { proxy.endpoint(dying).await["state"] == "ready" }).await;
    let mut seen = BTreeSet::new();
    for number in 0..20 {
        if let Outcome::Whole(from) = stream(proxy.address, &format!("new-{number}"), Duration::from_millis(20)).await {
            seen.insert(from);
        }
    }
    assert!(seen.contains(&dying), "it gets new sessions: {seen:?}");
}

#[tokio::test]
async fn a_killed_endpoint_takes_only_its_own_runs_along() {
    let dies = |agent: Agent| {
        agent.kill();
        None
    };
    let agent = Agent::start("127.0.0.1:0");
    let address = agent.address;
    only_its_own_runs_fail("SIGKILL", agent, dies, |_| Agent::start(&address.to_string())).await;
}

#[tokio::test]
async fn a_stopped_endpoint_takes_only_its_own_runs_along() {
    let stops = |agent: Agent| {
        agent.signal("STOP");
        Some(agent)
    };
    let goes_on = |agent: Option<Agent>| {
        let agent = agent.expect("it is only stopped");
        agent.signal("CONT");
        agent
    };
    only_its_own_runs_fail("SIGSTOP", Agent::start("127.0.0.1:0"), stops, goes_on).await;
}

/// A network of its own, gone when dropped.
struct Namespace(String);

impl Namespace {
    /// `None`: that is not allowed here.
    fn new() -> Option<Namespace> {
        let name = format!("longhaul-{}", std::process::id());
        let namespace = ip(&["netns", "add", &name]).then(|| Namespace(name.clone()))?;
        let (outside, inside) = (format!("lho{}", std::process::id()), format!("lhi{}", std::process::id()));
        let made = ip(&["link", "add", &outside, "type", "veth", "peer", "name", &inside])
            && ip(&["link", "set", &inside, "netns", &name])
            && ip(&["addr", "add", "10.231.77.1/30", "dev", &outside])
            && ip(&["link", "set", &outside, "up"])
            && ip(&["-n", &name, "addr", "add", "10.231.77.2/30", "dev", &inside])
            && ip(&["-n", &name, "link", "set", &inside, "up"]);
        made.then_some(namespace)
    }

    /// Packets are lost from here on, or are not any more. The outer end stays up, so that nothing goes another way.
    fn set(&self, state: &str) {
        let inside = format!("lhi{}", std::process::id());
        assert!(ip(&["-n", &self.0, "link", "set", &inside, state]), "the link goes {state}");
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.0]);
    }
}

fn ip(arguments: &[&str]) -> bool {
    let status = Command::new("ip").args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

#[tokio::test]
async fn an_endpoint_whose_network_is_cut_takes_only_its_own_runs_along() {
    let Some(namespace) = Namespace::new() else {
        println!("skipped: a network namespace can't be made here (that takes `ip` and root)");
        return;
    };
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &namespace.0]).arg(std::env::current_exe().expect("this test"));
    let agent = Agent::start_by(&mut command, "10.231.77.2:0");
    let cut = |agent: Agent| {
        namespace.set("down");
        Some(agent)
    };
    let mend = |agent: Option<Agent>| {
        namespace.set("up");
        agent.expect("it was only cut off")
    };
    only_its_own_runs_fail("network cut", agent, cut, mend).await;
}

// ---- nothing is left behind ----

/// Resident bytes, and open descriptors.
fn footprint(id: u32) -> (usize, usize) {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).expect("it lives");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let kibibytes: usize = resident.split_whitespace().next().and_then(|text| text.parse().ok()).expect("a number");
    let open = std::fs::read_dir(format!("/proc/{id}/fd")).expect("its descriptors").count();
    (kibibytes * 1024, open)
}

#[tokio::test]
async fn memory_and_descriptors_stay_flat_over_reloads_and_runs() {
    let (reloads, runs) = if full() { (1_000, 100_000) } else { (100, 10_000) };
    let directory = tempfile::tempdir().expect("a directory");
    let agents: Vec<Agent> = (0..4).map(|_| Agent::start("127.0.0.1:0")).collect();
    let addresses: Vec<SocketAddr> = agents.iter().map(|agent| agent.address).collect();
    // Sessions are remembered, which is no leak: there is a bound to them that is soon reached.
    let texts = [3, 4].map(|count| {
        services(&addresses[..count], "    drain: {timeout: 1s}\n")
            .replace("x-session-id}]", "x-session-id}], max_sessions: 1000")
    });
    let proxy = Served::start(directory.path(), "a.yaml", "127.0.0.1:0", &texts[0]).await;
    // A tenth first, after which everything has its size.
    reload_under_runs(&proxy, &texts, reloads / 10, runs / 10).await;
    let before = footprint(proxy.program.id());
    reload_under_runs(&proxy, &texts, reloads, runs).await;
    // What drains, and the pools of what is gone, are let go by the clock.
    let bound = (before.0 + before.0 / 10 + (4 << 20), before.1 + 8);
    let end = ids::now() + Duration::from_secs(10);
    let mut after = footprint(proxy.program.id());
    while after.0 > bound.0 || after.1 > bound.1 {
        assert!(ids::now() < end, "bytes and descriptors: {before:?} before, {after:?} after");
        tokio::time::sleep(Duration::from_millis(100)).await;
        after = footprint(proxy.program.id());
    }
    println!(
        "{reloads} reloads, {runs} runs: resident {} KiB before, {} KiB after; descriptors {} before, {} after",
        before.0 >> 10,
        after.0 >> 10,
        before.1,
        after.1
    );
}

/// Reloads between two configurations while runs go through, so that both are under way to the end.
async fn reload_under_runs(proxy: &Served, texts: &[String; 2], reloads: usize, runs: usize) {
    const CLIENTS: usize = 16;
    let done = Arc::<AtomicUsize>::default();
    let mut running = JoinSet::new();
    for client in 0..CLIENTS {
        let (done, address) = (Arc::clone(&done), proxy.address);
        running.spawn(async move {
            let mut connection = RawClient::connect(address).await;
            loop {
                let number = done.fetch_add(1, Ordering::SeqCst);
                if number >= runs {
                    return;
                }
                let session = format!("x-session-id: {client}-{number}");
                connection.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{session}\r\nContent-Length: 0\r\n\r\n")).await;
                assert_eq!(connection.read_response().await.status(), 200);
            }
        });
    }
    for reload in 0..reloads {
        proxy.reload(&texts[(reload + 1) % 2]).await;
        while done.load(Ordering::SeqCst) < runs * reload / reloads {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    while let Some(ended) = running.join_next().await {
        ended.expect("every run is answered");
    }
}
