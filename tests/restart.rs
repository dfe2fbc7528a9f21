//! Restart: the built program with `state: {file: ..}`, ended in order and by SIGKILL, and started again.

mod support;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use support::{Backend, Program, Request, Script, eventually, eventually_async, fetch, langgraph, post};
use tokio::time::Instant;

const THREAD: &str = "11111111-1111-4111-8111-111111111111";
const RUN: &str = "22222222-2222-4222-8222-222222222222";

/// What is at most lost by a crash: one interval of commits, and what a busy machine may take for one.
const WINDOW: Duration = Duration::from_millis(750);

/// One program after the other with the same file and directory.
struct Restarted {
    directory: tempfile::TempDir,
    program: Program,
    address: SocketAddr,
    admin: SocketAddr,
}

impl Restarted {
    async fn start(services: &str) -> Restarted {
        let directory = tempfile::tempdir().expect("a directory");
        write_config(directory.path(), services);
        let (program, address, admin) = launch(directory.path()).await;
        Restarted { directory, program, address, admin }
    }

    fn edit(&self, services: &str) {
        write_config(self.directory.path(), services);
    }

    fn state_file(&self) -> PathBuf {
        self.directory.path().join("state").join("longhaul.redb")
    }

    /// Drains and exits.
    async fn end(&mut self) {
        self.program.signal("TERM");
        assert!(self.program.ended().await.success(), "{:#?}", self.program.lines());
    }

    async fn kill(&mut self) {
        self.program.signal("KILL");
        self.program.ended().await;
    }

    async fn start_again(&mut self) {
        (self.program, self.address, self.admin) = launch(self.directory.path()).await;
    }

    async fn admin(&self, method: &str, path: &str) -> support::Response {
        let host = self.admin;
        fetch(host, format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n")).await
    }

    /// The program has committed all that is older than this call.
    async fn stored(&self) {
        tokio::time::sleep(WINDOW).await;
    }

    /// The endpoint and affinity with which a session's next exchange is answered.
    async fn say(&self, session: &str) -> (String, String) {
        let response = post(self.address, "/chat", &format!("x-session: {session}\r\n"), "{}").await;
        assert_eq!(response.status(), 200, "{}", response.text());
        (response.text(), response.header("longhaul-affinity").expect("always there").to_owned())
    }
}

fn write_config(directory: &Path, services: &str) {
    let head = "listeners: [{name: public, address: '127.0.0.1:0'}]\nadmin: {address: '127.0.0.1:0'}\nlog: {access: false}\n\
                shutdown: {delay: 0s, timeout: 10s}\nstate: {file: state}\n";
    std::fs::write(directory.join("longhaul.yaml"), format!("{head}{services}")).expect("writable");
}

async fn launch(directory: &Path) -> (Program, SocketAddr, SocketAddr) {
    let file = directory.join("longhaul.yaml");
    let program = Program::start(&["run", "-c", file.to_str().expect("UTF-8")]);
    let end = Instant::now() + Duration::from_secs(30);
    while !program.lines().iter().any(|line| line.contains("admin listening on")) {
        assert!(Instant::now() < end, "it does not start: {:#?}", program.lines());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let address = program.after("listening on 127.0.0.1:").await;
    let admin = program.after("admin listening on 127.0.0.1:").await;
    let of = |port: &str| {
        SocketAddr::from(([127, 0, 0, 1], port.split_whitespace().next().expect("a port").parse().expect("a port")))
    };
    (program, of(&address), of(&admin))
}

/// An agent that tells its name, and has one background run for each that is asked for.
async fn agent(runs: &Arc<Mutex<HashMap<String, &'static str>>>) -> Backend {
    let backend = Backend::start().await;
    let (name, runs) = (backend.name(), Arc::clone(runs));
    backend.each(move |request| answer(request, &name, &mut runs.lock().expect("no panic")));
    backend
}

fn answer(request: &Request, name: &str, runs: &mut HashMap<String, &'static str>) -> Script {
    match (request.method.as_str(), langgraph::parts(request).as_slice()) {
        ("POST", ["threads", thread, "runs"]) => {
            runs.insert(RUN.to_owned(), "running");
            langgraph::created(thread, RUN)
        }
        ("GET", ["threads", _, "runs", run]) => langgraph::state(run, runs.get(*run).copied()),
        _ => Script::ok(name),
    }
}

fn services(stable: &[&Backend], canary: &Backend, step: &str) -> String {
    let urls: Vec<&str> = stable.iter().map(|backend| backend.url()).collect();
    format!(
        "services:\n- name: agents\n  agent_protocol: langgraph\n  session: {{key: [header: x-session]}}\n  \
         rollout: {{from: stable, to: canary, steps: [{{weight: 10%, hold: 10h}}, {{weight: {step}, hold: 10h}}, {{weight: 100%}}]}}\n  \
         versions:\n  - {{name: stable, weight: 50, endpoints: ['{}']}}\n  - {{name: canary, weight: 50, endpoints: ['{}']}}\n",
        urls.join("', '"),
        canary.url()
    )
}

async fn survives(crash: bool) {
    let runs = Arc::default();
    let (one, two, canary) = (agent(&runs).await, agent(&runs).await, agent(&runs).await);
    let mut proxy = Restarted::start(&services(&[&one, &two], &canary, "50%")).await;
    let mut places = HashMap::new();
    for n in 0..20 {
        let session = format!("session-{n}");
        places.insert(session.clone(), proxy.say(&session).await.0);
    }
    let headers = "Content-Type: application/json\r\n";
    let created = post(proxy.address, &format!("/threads/{THREAD}/runs"), headers, "{}").await;
    let id = created.header("longhaul-run-id").expect("a run").to_owned();
    assert_eq!(proxy.admin("POST", "/api/v1/services/agents/rollout/promote").await.status(), 200);
    assert_eq!(proxy.admin("POST", "/api/v1/services/agents/rollout/pause").await.status(), 200);
    let drain = format!("/api/v1/services/agents/endpoints/{}/drain", two.name().replace(':', "%3A"));
    assert_eq!(proxy.admin("POST", &drain).await.status(), 200);
    let rollout = proxy.admin("GET", "/api/v1/services/agents/rollout").await.json();

    if crash {
        proxy.stored().await;
        proxy.kill().await;
    } else {
        proxy.end().await;
    }
    proxy.start_again().await;

    let after = proxy.admin("GET", "/api/v1/services/agents/rollout").await.json();
    for field in ["state", "step", "paused_by", "since", "share", "history"] {
        assert_eq!(after[field], rollout[field], "{field}: {after}");
    }
    let status = proxy.admin("GET", "/api/v1/status").await.json();
    assert!(status["state"]["file"].as_str().is_some_and(|file| file.ends_with("longhaul.redb")), "{status}");
    let endpoints = status["services"][0]["versions"][0]["endpoints"].as_array().expect("two").clone();
    let drained = endpoints.iter().find(|endpoint| endpoint["address"] == two.name().as_str()).expect("it is there");
    assert_eq!(drained["state"], "draining");

    let listed = proxy.admin("GET", "/api/v1/runs").await.json();
    assert_eq!((&listed["runs"][0]["id"], &listed["runs"][0]["carriers"]), (&id.into(), &0.into()), "{listed}");
    for (session, place) in &places {
        let (there, affinity) = proxy.say(session).await;
        let expected = if *place == two.name() { "moved" } else { "hit" };
        assert_eq!(affinity, expected, "{session} was at {place} and is at {there}");
        assert!(there == *place || expected == "moved", "{session}");
    }
    // It is asked about, and ends as its endpoint says.
    runs.lock().expect("no panic").insert(RUN.to_owned(), "success");
    eventually_async("the run ends", || async {
        proxy.admin("GET", "/api/v1/runs").await.json()["runs"].as_array().is_some_and(Vec::is_empty)
    })
    .await;

    // Edited, the rollout begins anew; a pin whose endpoint is no longer there is lost and bound again.
    proxy.end().await;
    proxy.edit(&services(&[&two], &canary, "40%"));
    proxy.start_again().await;
    let edited = proxy.admin("GET", "/api/v1/services/agents/rollout").await.json();
    assert_eq!((&edited["state"], &edited["step"]), (&"running".into(), &1.into()), "{edited}");
    assert_eq!(edited["history"].as_array().map(Vec::len), rollout["history"].as_array().map(|list| list.len() + 1));
    for (session, place) in &places {
        let (there, affinity) = proxy.say(session).await;
        if *place == canary.name() {
            assert_eq!((there, affinity.as_str()), (canary.name(), "hit"), "{session}");
        } else {
            assert_eq!(affinity, "lost", "{session} was at {place} or moved from there");
        }
    }
}

#[tokio::test]
async fn what_is_kept_survives_a_restart_in_order() {
    survives(false).await;
}

#[tokio::test]
async fn what_is_kept_survives_a_crash() {
    survives(true).await;
}

/// Sessions come all the time while the program is killed and started again. `LONGHAUL_KILLS` says how often.
#[tokio::test]
async fn a_program_killed_again_and_again_loses_no_pin_that_is_older_than_the_window() {
    let kills: usize = std::env::var("LONGHAUL_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let runs = Arc::default();
    let agents = [agent(&runs).await, agent(&runs).await, agent(&runs).await];
    let urls: Vec<&str> = agents.iter().map(Backend::url).collect();
    let config = format!(
        "services:\n- name: agents\n  agent_protocol: http\n  session: {{key: [header: x-session]}}\n  \
         versions: [{{name: stable, endpoints: ['{}']}}]\n",
        urls.join("', '")
    );
    let mut proxy = Restarted::start(&config).await;
    // Where each session is, and when that was answered.
    let mut pinned: Vec<(String, String, Instant)> = Vec::new();
    let mut slowest = Duration::ZERO;
    for kill in 0..kills {
        // Later ones come within the window and may be lost; these may not.
        let until = Instant::now() + WINDOW / 2 + Duration::from_millis(61 * (kill as u64 * 7 % 23));
        let mut n = 0;
        while Instant::now() < until {
            let session = format!("session-{kill}-{n}");
            n += 1;
            let (place, _) = proxy.say(&session).await;
            pinned.push((session, place, Instant::now()));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let killed = Instant::now();
        proxy.kill().await;
        let began = Instant::now();
        proxy.start_again().await;
        slowest = slowest.max(began.elapsed());
        // Those that are old enough: a few of long ago, and all of this round.
        let lasting = pinned.iter().enumerate().filter(|(index, (_, _, at))| {
            *at + WINDOW < killed && (index % 97 == kill % 97 || *at + 3 * WINDOW > killed)
        });
        for (_, (session, place, _)) in lasting {
            let (there, affinity) = proxy.say(session).await;
            assert_eq!((&there, affinity.as_str()), (place, "hit"), "{session} after {} kills", kill + 1);
        }
        // What was young is not to be asked for: it may be pinned anew elsewhere.
        pinned.retain(|(_, _, at)| *at + WINDOW < killed);
    }
    assert!(pinned.len() > kills, "only {} pins are old enough to show anything", pinned.len());
    for (session, place, _) in pinned.iter().step_by(pinned.len() / 2000 + 1) {
        let (there, affinity) = proxy.say(session).await;
        assert_eq!((&there, affinity.as_str()), (place, "hit"), "{session}");
    }
    println!("{kills} kills, {} pins kept, the slowest start {slowest:?}", pinned.len());
}

#[tokio::test]
async fn a_file_that_is_something_else_or_open_elsewhere_is_named() {
    let runs = Arc::default();
    let backend = agent(&runs).await;
    let config = format!(
        "services:\n- name: agents\n  agent_protocol: http\n  session: {{key: [header: x-session]}}\n  \
         versions: [{{name: stable, endpoints: ['{}']}}]\n",
        backend.url()
    );
    let mut proxy = Restarted::start(&config).await;
    proxy.say("one").await;
    let file = proxy.directory.path().join("longhaul.yaml");
    let start = || Program::start(&["run", "-c", file.to_str().expect("UTF-8")]);

    // A second one waits a moment, then says why it ends; where the first ends meanwhile it goes on.
    let mut second = start();
    assert!(!second.ended().await.success());
    let told = second.lines().join("\n");
    assert!(told.contains("longhaul.redb") && told.contains("another process has it open"), "{told}");
    let third = start();
    third.after("waiting for up to").await;
    proxy.end().await;
    third.after("listening on 127.0.0.1:").await;
    drop(third);

    let whole = std::fs::read(proxy.state_file()).expect("it is there");
    for (name, bytes) in [("text", b"not a database".to_vec()), ("cut", whole[..whole.len() / 2].to_vec())] {
        std::fs::write(proxy.state_file(), bytes).expect("writable");
        let mut program = start();
        assert!(!program.ended().await.success(), "{name}");
        let told = program.lines().join("\n");
        assert!(told.contains("longhaul.redb") && told.contains("move it away"), "{name}: {told}");
    }
    std::fs::write(proxy.state_file(), whole).expect("writable");
    proxy.start_again().await;
    assert_eq!(proxy.say("one").await.1, "hit");
    eventually("it says what it found", || proxy.program.lines().iter().any(|line| line.contains("pins=1"))).await;
}

/// How many pins the start below goes on from: a million in a release build.
const PINS: u32 = if cfg!(debug_assertions) { 10_000 } else { 1_000_000 };

/// A start after a crash, with everything that a full table has. A debug build only shows that it works.
#[tokio::test]
async fn a_start_with_a_million_pins_takes_less_than_a_second() {
    let runs = Arc::default();
    let backend = agent(&runs).await;
    let services = format!(
        "services:\n- name: agents\n  agent_protocol: http\n  session: {{key: [header: x-session], idle_timeout: 24h, max_sessions: 2000000}}\n  \
         versions: [{{name: stable, endpoints: ['{}']}}]\n",
        backend.url()
    );
    let directory = tempfile::tempdir().expect("a directory");
    write_config(directory.path(), &services);
    fill(directory.path(), &backend);
    let mut proxy = {
        let (program, address, admin) = launch(directory.path()).await;
        Restarted { directory, program, address, admin }
    };
    for round in 0..3 {
        proxy.say("one more").await;
        proxy.stored().await;
        proxy.kill().await;
        let began = Instant::now();
        proxy.start_again().await;
        let took = began.elapsed();
        println!("start {round} with {PINS} pins: {took:?}");
        // A debug build on a busy machine shows nothing of the time.
        assert!(cfg!(debug_assertions) || took < Duration::from_secs(1), "{took:?}");
        for n in [0, PINS / 2, PINS - 1] {
            assert_eq!(proxy.say(&name_of(n)).await.1, "hit");
        }
    }
}

fn name_of(session: u32) -> String {
    format!("0193b5e0-7c1a-7000-8000-{session:012}")
}

/// Writes the file as a running program would.
fn fill(directory: &Path, backend: &Backend) {
    use longhaul::rollout::Moment;
    use longhaul::state::dispatcher::{Dispatcher, ServiceSettings};
    use longhaul::state::image::{Pin, Place, ServiceImage};
    use longhaul::state::sessions::SessionKey;
    let loaded = longhaul::config::load(&directory.join("longhaul.yaml")).expect("a good file");
    let metrics = longhaul::metrics::Metrics::new();
    let service = loaded.config.services[0].clone();
    let version = service.versions[0].clone();
    let target = longhaul::state::TargetSettings {
        service: service.name.as_str().into(),
        version: version.name.as_str().into(),
        url: version.endpoints[0].url.clone(),
        uid: None,
        http: version.http,
        host: version.host,
        headers: version.headers,
        pool: service.pool.clone(),
        tls: None,
        metrics: metrics.version("agents", "stable"),
    };
    let dispatcher = Dispatcher::new("agents", metrics.service("agents"));
    let now = longhaul::ids::now();
    dispatcher.apply(ServiceSettings { config: service, targets: vec![vec![target]], discovered: Vec::new() }, now);
    let used = Moment::of(longhaul::ids::wall_clock());
    let pin = |n| Pin {
        key: SessionKey { scope: None, text: name_of(n).into() },
        aliases: Vec::new(),
        place: 0,
        confirmed: true,
        settled: true,
        matched: false,
        evicted: false,
        born: Some(used),
        used,
    };
    let place = Place { version: "stable".to_owned(), endpoint: backend.url().to_owned() };
    let pins = (0..PINS).map(pin).collect();
    let image = ServiceImage { name: "agents".to_owned(), places: vec![place], pins, ..ServiceImage::default() };
    dispatcher.restore(image, &|_| None, now);
    let (store, _) = longhaul::store::open(&directory.join("state"), metrics.store()).expect("a new file");
    store.keep(&dispatcher, false);
    store.close();
}

#[tokio::test]
async fn what_the_configuration_names_no_more_leaves_the_file_at_the_next_start() {
    let runs = Arc::default();
    let (one, two) = (agent(&runs).await, agent(&runs).await);
    let service = |name: &str, endpoints: &[&Backend]| {
        let urls: Vec<&str> = endpoints.iter().map(|backend| backend.url()).collect();
        format!(
            "- name: {name}\n  agent_protocol: http\n  session: {{key: [header: x-session]}}\n  \
             versions: [{{name: stable, endpoints: ['{}']}}]\n",
            urls.join("', '")
        )
    };
    let both = format!(
        "routes:\n- {{match: {{path: /other/**}}, service: others}}\n- {{service: agents}}\nservices:\n{}{}",
        service("agents", &[&one, &two]),
        service("others", &[&one])
    );
    let mut proxy = Restarted::start(&both).await;
    proxy.say("a").await;
    let pinned = post(proxy.address, "/other/chat", "x-session: b\r\n", "{}").await;
    assert_eq!(pinned.header("longhaul-affinity"), Some("new"));
    let drain = |name: String| format!("/api/v1/services/agents/endpoints/{}/drain", name.replace(':', "%3A"));
    assert_eq!(proxy.admin("POST", &drain(two.name())).await.status(), 200);
    proxy.end().await;

    // The service and the drained endpoint go while the proxy is down, and come back two starts later.
    proxy.edit(&format!("services:\n{}", service("agents", &[&one])));
    proxy.start_again().await;
    let told = || proxy.program.lines().iter().filter(|line| line.contains("services=\"others\"")).count();
    eventually("it is said which", || told() == 1).await;
    proxy.end().await;
    proxy.start_again().await;
    assert!(!proxy.program.lines().iter().any(|line| line.contains("others")), "{:#?}", proxy.program.lines());
    proxy.end().await;
    proxy.edit(&both);
    proxy.start_again().await;
    let back = post(proxy.address, "/other/chat", "x-session: b\r\n", "{}").await;
    assert_eq!(back.header("longhaul-affinity"), Some("new"), "it left the file");
    let status = proxy.admin("GET", "/api/v1/status").await.json();
    let endpoints = status["services"][0]["versions"][0]["endpoints"].as_array().expect("two").clone();
    assert!(endpoints.iter().all(|endpoint| endpoint["state"] == "ready"), "{endpoints:#?}");
}
