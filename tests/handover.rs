//! Handover: real processes, one taking over from the other under load; nothing is refused, cut, moved or miscounted.

mod support;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use support::*;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// How long a stream lasts, and how often an event comes.
const STREAM: Duration = Duration::from_millis(1500);
const EVENT: Duration = Duration::from_millis(100);

/// An agent that counts how many runs it has at once.
struct Agent {
    address: SocketAddr,
    open: AtomicUsize,
    most: AtomicUsize,
    runs: AtomicUsize,
}

impl Agent {
    async fn start() -> Arc<Agent> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let agent = Arc::new(Agent { address, open: 0.into(), most: 0.into(), runs: 0.into() });
        let serving = Arc::clone(&agent);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let agent = Arc::clone(&serving);
                // A proxy that leaves ends the connection.
                tokio::spawn(async move { agent.serve(stream).await });
            }
        });
        agent
    }

    async fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let (mut first, mut length) = (String::new(), 0);
            loop {
                let mut line = String::new();
                if stream.read_line(&mut line).await? == 0 {
                    return Ok(());
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().expect("a number");
                }
                if line == "\r\n" {
                    break;
                }
                if first.is_empty() {
                    first = line;
                }
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await?;
            if first.starts_with("GET") {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await?;
                continue;
            }
            let open = self.open.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(open, Ordering::SeqCst);
            self.runs.fetch_add(1, Ordering::SeqCst);
            let done = self.run(&mut stream, first.contains("/stream")).await;
            self.open.fetch_sub(1, Ordering::SeqCst);
            done?;
        }
    }

    /// The last byte is sent by the caller's count: whoever reads the end finds the slot free only after it.
    async fn run(&self, stream: &mut BufReader<TcpStream>, long: bool) -> std::io::Result<()> {
        let name = self.address.to_string();
        if !long {
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", name.len());
            tokio::time::sleep(Duration::from_millis(5)).await;
            self.open.fetch_sub(1, Ordering::SeqCst);
            let sent = stream.write_all(format!("{head}{name}").as_bytes()).await;
            self.open.fetch_add(1, Ordering::SeqCst);
            return sent;
        }
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            .await?;
        for _ in 0..STREAM.as_millis() / EVENT.as_millis() {
            let event = format!("data: {name}\n\n");
            stream.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await?;
            tokio::time::sleep(EVENT).await;
        }
        self.open.fetch_sub(1, Ordering::SeqCst);
        let sent = stream.write_all(b"0\r\n\r\n").await;
        self.open.fetch_add(1, Ordering::SeqCst);
        sent
    }
}

/// The processes of one proxy, the newest of which serves.
struct Service {
    program: Program,
    directory: tempfile::TempDir,
    binary: PathBuf,
    address: SocketAddr,
    admin: SocketAddr,
    processes: Mutex<Vec<u32>>,
}

impl Service {
    async fn start(services: &str) -> Service {
        Service::start_with(services, "127.0.0.1:0", "127.0.0.1:0").await
    }

    async fn start_with(services: &str, listener: &str, admin: &str) -> Service {
        let directory = tempfile::tempdir().expect("a directory");
        let binary = directory.path().join("longhaul");
        // Not a copy: a file that was written just now may still be open for that in a child of another test.
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_longhaul"), &binary).expect("a link");
        let config = directory.path().join("longhaul.yaml");
        let text = format!(
            "listeners:\n  - {{name: public, address: \"{listener}\", keepalive_timeout: 3s}}\n\
             admin: {{address: \"{admin}\"}}\nlog: {{session_ids: plain}}\n\
             shutdown: {{delay: 0ms, timeout: 60s}}\n{services}"
        );
        std::fs::write(&config, text).expect("a file");
        let program = Program::spawn(Command::new(&binary).args(["run", "-c"]).arg(&config).stdin(Stdio::null()));
        let address = program.after("listening on ").await;
        let admin = program.after("admin listening on ").await;
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        // Those of unix sockets are known to whoever made them.
        let parse = |text: String| text.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(nowhere);
        let processes = Mutex::new(vec![program.id()]);
        Service { address: parse(address), admin: parse(admin), program, directory, binary, processes }
    }

    fn newest(&self) -> u32 {
        *self.processes.lock().expect("no panic").last().expect("one at least")
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.newest().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name}");
    }

    fn count(&self, text: &str) -> usize {
        self.program.lines().iter().filter(|line| line.contains(text)).count()
    }

    /// Hands over, and waits until the new process serves.
    async fn hand_over(&self) -> u32 {
        const SERVES: &str = "the new process serves";
        let before = self.count(SERVES);
        self.signal("USR2");
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while self.count(SERVES) == before {
            assert!(tokio::time::Instant::now() < deadline, "no handover: {:#?}", self.program.lines());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let lines = self.program.lines();
        let line = lines.iter().rfind(|line| line.contains(SERVES)).expect("counted");
        let plain: String =
            line.split("process").last().unwrap_or_default().chars().filter(char::is_ascii_digit).collect();
        let process = plain.parse().unwrap_or_else(|_| panic!("a process in {line:?}"));
        self.processes.lock().expect("no panic").push(process);
        process
    }

    async fn status(&self) -> Value {
        ask_admin(self.admin, "GET", "/api/v1/status").await.json()
    }

    async fn gone(&self, process: u32) {
        eventually_within(Duration::from_secs(30), "the old process ends", || !lives(process)).await;
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        for process in self.processes.lock().expect("no panic").iter().filter(|process| lives(**process)) {
            let _ = Command::new("kill").args(["-KILL", &process.to_string()]).status();
        }
    }
}

fn lives(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn endpoints(status: &Value) -> Vec<Value> {
    let versions = status["services"][0]["versions"].as_array().expect("versions");
    versions.iter().filter_map(|version| version["endpoints"].as_array()).flatten().cloned().collect()
}

/// What the clients saw.
#[derive(Default)]
struct Seen {
    /// By session: who served it.
    homes: Mutex<HashMap<String, String>>,
    faults: Mutex<Vec<String>>,
    done: AtomicUsize,
    stop: AtomicBool,
}

impl Seen {
    fn fault(&self, fault: String) {
        self.faults.lock().expect("no panic").push(fault);
    }

    fn faults(&self) -> Vec<String> {
        self.faults.lock().expect("no panic").clone()
    }

    /// Checks an answer, and says whether its connection is kept.
    fn judge(&self, session: &str, response: &Response, long: bool) -> bool {
        self.done.fetch_add(1, Ordering::SeqCst);
        let affinity = response.head.header("longhaul-affinity").unwrap_or_default().to_owned();
        if response.head.status != 200 || response.truncated {
            self.fault(format!(
                "{session}: {} truncated={} {}",
                response.head.status,
                response.truncated,
                response.text()
            ));
            return false;
        }
        let text = response.text();
        let home = if long {
            text.lines().next().unwrap_or_default().trim_start_matches("data: ").to_owned()
        } else {
            text.clone()
        };
        if long && text.matches("data: ").count() as u128 != STREAM.as_millis() / EVENT.as_millis() {
            self.fault(format!("{session}: events are missing: {text}"));
        }
        let mut homes = self.homes.lock().expect("no panic");
        let known = homes.entry(session.to_owned()).or_insert_with(|| home.clone());
        if *known != home || !["new", "hit"].contains(&affinity.as_str()) {
            self.fault(format!("{session}: moved from {known} to {home} ({affinity})"));
        }
        response.head.header("connection") != Some("close")
    }
}

fn request(path: &str, session: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: a\r\nx-session-id: {session}\r\ncontent-length: 2\r\n\r\nhi")
}

/// Runs, one after the other, each on a connection of its own: streams, or short ones, which connect all the time.
async fn run_on(address: SocketAddr, session: String, long: bool, seen: Arc<Seen>) {
    let path = if long { "/stream" } else { "/short" };
    while !seen.stop.load(Ordering::SeqCst) {
        let Ok(stream) = TcpStream::connect(address).await else {
            return seen.fault(format!("{session}: refused"));
        };
        let mut client = RawClient::over(stream);
        if client.try_send(request(path, &session)).await.is_err() {
            return seen.fault(format!("{session}: a new connection was cut"));
        }
        let response = client.read_response().await;
        seen.judge(&session, &response, long);
    }
}

/// Requests on one connection, as long as the proxy keeps it; every other one is a stream. What is sent to an old process
/// has to be counted by the new one, and for long enough to be noticed.
async fn keep_asking(address: SocketAddr, session: String, pause: Duration, seen: Arc<Seen>) {
    'connection: while !seen.stop.load(Ordering::SeqCst) {
        let Ok(stream) = TcpStream::connect(address).await else {
            return seen.fault(format!("{session}: refused"));
        };
        let mut client = RawClient::over(stream);
        for long in [false, true].into_iter().cycle() {
            if seen.stop.load(Ordering::SeqCst) {
                return;
            }
            let path = if long { "/stream" } else { "/short" };
            if client.try_send(request(path, &session)).await.is_err() {
                return seen.fault(format!("{session}: a kept connection was cut"));
            }
            let response = client.read_response().await;
            if !seen.judge(&session, &response, long) {
                continue 'connection;
            }
            tokio::time::sleep(pause).await;
        }
    }
}

fn agents_config(agents: &[Arc<Agent>], more: &str, max: usize) -> String {
    let endpoints: Vec<String> = agents.iter().map(|agent| format!("\"http://{}\"", agent.address)).collect();
    format!(
        "services:\n  - name: support\n    session: {{key: [{{header: x-session-id}}]}}\n    health: {{path: /, interval: 200ms}}\n    \
         runs: {{max_per_endpoint: {max}, queue: {{max: 1000, timeout: 30s}}}}\n{more}    versions:\n      \
         - {{name: stable, endpoints: [{}]}}\n",
        endpoints.join(", ")
    )
}

async fn agents(count: usize) -> Vec<Arc<Agent>> {
    let mut agents = Vec::new();
    for _ in 0..count {
        agents.push(Agent::start().await);
    }
    agents
}

#[tokio::test]
async fn three_handovers_under_load_refuse_cut_and_move_nothing() {
    const MAX: usize = 50;
    let agents = agents(4).await;
    let service = Service::start(&agents_config(&agents, "", MAX)).await;
    let seen = Arc::new(Seen::default());
    let mut clients = Vec::new();
    for number in 0..200 {
        clients.push(tokio::spawn(run_on(service.address, format!("stream-{number}"), true, Arc::clone(&seen))));
    }
    for number in 0..40 {
        let pause = Duration::from_millis(number * 3);
        let session = format!("kept-{number}");
        clients.push(tokio::spawn(keep_asking(service.address, session, pause, Arc::clone(&seen))));
    }
    eventually_within(Duration::from_secs(20), "the load is there", || seen.done.load(Ordering::SeqCst) > 300).await;
    let first = service.newest();
    for round in 0..3 {
        let before = seen.done.load(Ordering::SeqCst);
        service.hand_over().await;
        eventually_within(Duration::from_secs(40), "the new one works", || {
            seen.done.load(Ordering::SeqCst) > before + 300
        })
        .await;
        assert_eq!(seen.faults(), [""; 0], "round {round}: {:#?}", service.program.lines());
    }
    seen.stop.store(true, Ordering::SeqCst);
    for client in clients {
        client.await.expect("no panic");
    }
    assert_eq!(seen.faults(), [""; 0], "{:#?}", service.program.lines());
    for agent in &agents {
        let most = agent.most.load(Ordering::SeqCst);
        assert!(most <= MAX, "an agent had {most} runs at once");
        assert!(most > MAX / 2, "the load was no load: {most}");
    }
    assert_eq!(service.status().await["services"][0]["versions"][0]["sessions"], 240);
    eventually_async("every run has ended", || async {
        endpoints(&service.status().await).iter().all(|endpoint| endpoint["outstanding_runs"] == 0)
    })
    .await;
    let newest = service.newest();
    let processes = service.processes.lock().expect("no panic").clone();
    for process in processes {
        if process != newest {
            service.gone(process).await;
        }
    }
    assert!(lives(newest) && newest != first);
    // Every answer has its line in the access log, whichever process wrote it.
    let done = seen.done.load(Ordering::SeqCst);
    let logged = || service.count("path=/s");
    eventually("every line of the access log is there", || logged() == done).await;
    assert_eq!(service.count("outcome=completed"), done);
    println!(
        "{} answers over three handovers: 0 refused, 0 cut, 0 moved; at most {:?} runs at once of {MAX}",
        seen.done.load(Ordering::SeqCst),
        agents.iter().map(|agent| agent.most.load(Ordering::SeqCst)).collect::<Vec<_>>()
    );
    service.signal("TERM");
    service.gone(newest).await;
}

#[tokio::test]
async fn whoever_connects_all_the_time_is_never_refused_nor_cut() {
    let agents = agents(2).await;
    let service = Service::start(&agents_config(&agents, "", 1000)).await;
    let seen = Arc::new(Seen::default());
    let clients: Vec<_> = (0..32)
        .map(|number| tokio::spawn(run_on(service.address, format!("new-{number}"), false, Arc::clone(&seen))))
        .collect();
    for round in 0..4 {
        let before = seen.done.load(Ordering::SeqCst);
        let worked = || seen.done.load(Ordering::SeqCst) > before + 500;
        eventually_within(Duration::from_secs(20), "they work", worked).await;
        if round < 3 {
            service.hand_over().await;
        }
    }
    seen.stop.store(true, Ordering::SeqCst);
    for client in clients {
        client.await.expect("no panic");
    }
    assert_eq!(seen.faults(), [""; 0], "{:#?}", service.program.lines());
    println!("{} connections over three handovers: 0 refused, 0 cut, 0 moved", seen.done.load(Ordering::SeqCst));
}

#[tokio::test]
async fn the_new_process_knows_what_the_old_one_carries_and_what_operators_said() {
    let agents = agents(2).await;
    let service = Service::start(&agents_config(&agents, "", 1)).await;
    // One run of each; then one of them is drained.
    let mut streams = Vec::new();
    for session in ["a", "b"] {
        let mut client = RawClient::connect(service.address).await;
        client.send(request("/stream", session)).await;
        client.read_head().await;
        streams.push(client);
    }
    let drained = agents[0].address.to_string();
    let path = format!("/api/v1/services/support/endpoints/{}/drain", drained.replace(':', "%3A"));
    assert!(ask_admin(service.admin, "POST", &path).await.head.status < 300);
    // This one waits in the old process's queue, for a slot of the new one's counting.
    let mut waiting = RawClient::connect(service.address).await;
    waiting.send(request("/stream", "c")).await;
    eventually_async("it waits", || async { service.status().await["services"][0]["queue"]["length"] == 1 }).await;
    let old = service.newest();
    service.hand_over().await;
    let status = service.status().await;
    for endpoint in endpoints(&status) {
        assert_eq!(endpoint["outstanding_runs"], 1, "{status:#}");
        let state = if endpoint["address"] == *drained { "draining" } else { "ready" };
        assert_eq!(endpoint["state"], state, "{status:#}");
    }
    assert_eq!(status["config"]["generation"], 1);
    assert_eq!(service.status().await["services"][0]["queue"]["length"], 1);
    for mut client in streams {
        client.read_chunks_until("data: ").await;
        while client.read_chunk().await.is_some() {}
    }
    let response = waiting.read_response().await;
    assert_eq!((response.head.status, response.truncated), (200, false));
    assert!(response.text().contains(&agents[1].address.to_string()), "it waited for the one that is not drained");
    assert!(agents.iter().all(|agent| agent.most.load(Ordering::SeqCst) == 1));
    drop(waiting);
    service.gone(old).await;
}

#[tokio::test]
async fn a_new_process_that_fails_changes_nothing() {
    let agents = agents(1).await;
    let service = Service::start(&agents_config(&agents, "", 10)).await;
    let path = service.directory.path().join("longhaul.yaml");
    let good = std::fs::read_to_string(&path).expect("a file");
    let works = async |session: &str| {
        let mut client = RawClient::connect(service.address).await;
        client.send(request("/short", session)).await;
        let response = client.read_response().await;
        assert_eq!((response.head.status, response.head.header("connection")), (200, None), "{response:?}");
    };
    works("a").await;
    let failed = async |count| {
        let logged = || service.count("this one goes on as before") == count;
        eventually_within(Duration::from_secs(20), "the failure is logged", logged).await;
    };

    // A configuration that is wrong.
    std::fs::write(&path, good.replace("stable", "[")).expect("a file");
    service.signal("USR2");
    failed(1).await;
    works("a").await;
    std::fs::write(&path, &good).expect("a file");

    // A program that ends at once.
    let script = service.directory.path().join("script");
    std::fs::write(&script, "#!/bin/sh\nexit 1\n").expect("a file");
    make_executable(&script);
    std::fs::rename(&service.binary, service.directory.path().join("kept")).expect("same directory");
    std::fs::rename(&script, &service.binary).expect("same directory");
    service.signal("USR2");
    failed(2).await;
    works("a").await;

    // One that is ready, and breaks down with the state in its hands.
    let script = service.directory.path().join("script");
    std::fs::write(
        &script,
        "#!/bin/sh\ndd bs=65536 count=1 of=/dev/null 2>/dev/null\nprintf '\\000\\000\\000\\007\"ready\"' >&0\ndd bs=65536 count=1 of=/dev/null 2>/dev/null\nexit 1\n",
    )
    .expect("a file");
    make_executable(&script);
    std::fs::rename(&script, &service.binary).expect("same directory");
    service.signal("USR2");
    failed(3).await;
    assert_eq!(service.count("it did not take the state over"), 1, "{:#?}", service.program.lines());
    works("a").await;
    works("b").await;

    // And one that is good again: it is taken by its name.
    std::fs::rename(service.directory.path().join("kept"), &service.binary).expect("same directory");
    let old = service.newest();
    service.hand_over().await;
    service.gone(old).await;
    works("a").await;
    assert_eq!(service.status().await["services"][0]["versions"][0]["sessions"], 2);
}

#[tokio::test]
async fn commands_and_signals_during_a_handover_are_not_lost() {
    let agents = agents(2).await;
    let service = Service::start(&agents_config(&agents, "", 10)).await;
    let path =
        format!("/api/v1/services/support/endpoints/{}/drain", agents[0].address.to_string().replace(':', "%3A"));
    let drain = async || ask_admin(service.admin, "POST", &path).await;
    // It is ready, takes the state, and says nothing to that until it is left alone.
    let script = service.directory.path().join("script");
    std::fs::write(
        &script,
        "#!/bin/sh\ndd bs=65536 count=1 of=/dev/null 2>/dev/null\nprintf '\\000\\000\\000\\007\"ready\"' >&0\necho hesitates >&2\nexec cat >/dev/null\n",
    )
    .expect("a file");
    make_executable(&script);
    std::fs::rename(&script, &service.binary).expect("same directory");
    service.signal("USR2");
    let end = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        // Until the state is given away it is done, which does no harm.
        let answer = drain().await;
        if answer.head.status == 503 {
            assert_eq!(answer.code().as_deref(), Some("handing_over"));
            break;
        }
        assert!(tokio::time::Instant::now() < end, "{:#?}", service.program.lines());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for (method, path) in [
        ("DELETE", "/api/v1/sessions?service=support"),
        ("POST", "/api/v1/services/support/versions/stable/evict"),
        ("DELETE", "/api/v1/runs/0194d1c2-0000-7000-8000-000000000000"),
    ] {
        assert_eq!(ask_admin(service.admin, method, path).await.head.status, 503, "{path}");
    }
    // Whoever asks for a place meanwhile waits, and is served by the old one when that is told to end: it takes all back.
    let mut waits = RawClient::connect(service.address).await;
    waits.send(request("/short", "a")).await;
    service.signal("TERM");
    service.gone(service.newest()).await;
    assert_eq!(waits.read_response().await.head.status, 200);
    assert_eq!(service.count("the new process serves"), 0);
}

#[tokio::test]
async fn a_chain_of_processes_counts_for_the_newest_and_ends_in_order() {
    let agents = agents(1).await;
    let service = Service::start(&agents_config(&agents, "", 2)).await;
    // It stays with the first process, which has to outlive two others' turns.
    let mut long = RawClient::connect(service.address).await;
    long.send(request("/stream", "long")).await;
    long.read_head().await;
    let first = service.newest();
    let mut idle = Vec::new();
    for round in 0..3 {
        let mut client = RawClient::connect(service.address).await;
        client.send(request("/short", &format!("kept-{round}"))).await;
        assert_eq!(client.read_response().await.head.header("connection"), None);
        idle.push(client);
        service.hand_over().await;
        let status = service.status().await;
        assert_eq!(endpoints(&status)[0]["outstanding_runs"], 1, "{status:#}");
    }
    assert!(lives(first));
    // A connection of every process: the newest decides, over one or more others, and the two slots hold for all.
    for client in &mut idle {
        client.send(request("/stream", "late")).await;
    }
    for client in &mut idle {
        let response = client.read_response().await;
        assert_eq!((response.head.status, response.head.header("connection")), (200, Some("close")));
        assert!(!response.truncated);
    }
    while long.read_chunk().await.is_some() {}
    assert_eq!(agents[0].most.load(Ordering::SeqCst), 2);
    drop((long, idle));
    let processes = service.processes.lock().expect("no panic").clone();
    for process in &processes[..3] {
        service.gone(*process).await;
    }
    let status = service.status().await;
    assert_eq!(endpoints(&status)[0]["outstanding_runs"], 0, "{status:#}");
    let runs = ask_admin(service.admin, "GET", "/metrics").await.text();
    let completed = "longhaul_runs_total{outcome=\"completed\",service=\"support\",version=\"stable\"} 4";
    assert!(runs.contains(completed), "the newest counts what ended after its turn began: {runs}");
    assert_eq!(service.count("went with runs in hand"), 0);
}

#[tokio::test]
async fn unix_sockets_pass_too() {
    let agents = agents(1).await;
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("public.sock");
    let admin = directory.path().join("admin.sock");
    let listener = format!("unix:{}", socket.display());
    let service =
        Service::start_with(&agents_config(&agents, "", 10), &listener, &format!("unix:{}", admin.display())).await;
    let mut stream = RawClient::connect_unix(&socket).await;
    stream.send(request("/stream", "a")).await;
    stream.read_head().await;
    let old = service.newest();
    service.hand_over().await;
    while stream.read_chunk().await.is_some() {}
    drop(stream);
    service.gone(old).await;
    let mut client = RawClient::connect_unix(&socket).await;
    client.send(request("/short", "a")).await;
    assert_eq!(client.read_response().await.head.header("longhaul-affinity"), Some("hit"));
    let mut client = RawClient::connect_unix(&admin).await;
    client.send("GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_response().await.head.status, 200);
    service.signal("TERM");
    service.gone(service.newest()).await;
    assert!(!socket.exists() && !admin.exists(), "the last one removes the files");
}

#[tokio::test]
async fn a_connection_of_http2_finishes_its_streams() {
    let agents = agents(1).await;
    let service = Service::start(&agents_config(&agents, "", 10)).await;
    let client = Http2Client::connect(service.address).await;
    let asked = |path: &str| {
        let uri = format!("http://{}{path}", service.address);
        http::Request::post(uri).header("x-session-id", "a").body(()).expect("a request")
    };
    let stream = client.open(asked("/stream"), true).await;
    eventually("the run is there", || agents[0].open.load(Ordering::SeqCst) == 1).await;
    let old = service.newest();
    service.hand_over().await;
    let (head, mut body) = stream.head().await;
    assert_eq!(head.status, 200);
    let mut text = String::new();
    while let Some(data) = within("data", body.data()).await {
        let data = data.expect("not cut");
        body.flow_control().release_capacity(data.len()).expect("as much as came");
        text.push_str(&String::from_utf8_lossy(&data));
    }
    assert_eq!(text.matches("data: ").count() as u128, STREAM.as_millis() / EVENT.as_millis());
    service.gone(old).await;
    let client = Http2Client::connect(service.address).await;
    let response = client.fetch(asked("/short"), b"").await;
    assert_eq!(response.head.header("longhaul-affinity"), Some("hit"));
}

fn make_executable(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("ours");
}

/// The file of the state passes from process to process: what any of them had is there after a crash of the last.
#[tokio::test]
async fn the_state_on_the_disk_goes_on_from_process_to_process() {
    let agents = agents(3).await;
    let config = format!("state: {{file: state}}\n{}", agents_config(&agents, "", 1000));
    let service = Service::start(&config).await;
    let homes = Mutex::new(HashMap::new());
    let begin = async |address: SocketAddr, sessions: std::ops::Range<usize>| {
        for number in sessions {
            let session = format!("s-{number}");
            let answer = fetch(address, request("/short", &session)).await;
            assert_eq!(answer.head.header("longhaul-affinity"), Some("new"), "{session}");
            homes.lock().expect("no panic").insert(session, answer.text());
        }
    };
    begin(service.address, 0..20).await;
    let first = service.newest();
    service.hand_over().await;
    begin(service.address, 20..40).await;
    service.gone(first).await;
    let second = service.newest();
    service.hand_over().await;
    begin(service.address, 40..60).await;
    service.gone(second).await;
    // Three commits' time.
    tokio::time::sleep(Duration::from_millis(750)).await;
    let third = service.newest();
    service.signal("KILL");
    service.gone(third).await;

    let config = service.directory.path().join("longhaul.yaml");
    let again = Program::spawn(Command::new(&service.binary).args(["run", "-c"]).arg(&config).stdin(Stdio::null()));
    let line = again.after("listening on ").await;
    let address: SocketAddr = line.split_whitespace().next().unwrap_or_default().parse().expect("an address");
    let homes = homes.into_inner().expect("no panic");
    assert_eq!(homes.len(), 60);
    for (session, home) in homes {
        let answer = fetch(address, request("/short", &session)).await;
        assert_eq!(
            (answer.head.header("longhaul-affinity"), answer.text()),
            (Some("hit"), home),
            "{session}: {:#?} {:#?}",
            service.program.lines(),
            again.lines()
        );
    }
}
