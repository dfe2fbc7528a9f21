//! Upgrade: processes that were started beside a running one (`longhaul run --upgrade`) take over from it.

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use support::*;

/// The processes of one proxy, the last of which serves.
struct Chain {
    directory: tempfile::TempDir,
    address: SocketAddr,
    admin: SocketAddr,
    programs: Vec<Program>,
}

impl Chain {
    async fn start(config: &str) -> Chain {
        Chain::start_by(config, |_| {}).await
    }

    async fn start_by(config: &str, with: impl FnOnce(&mut Command)) -> Chain {
        let directory = tempfile::tempdir().expect("a directory");
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut chain = Chain { directory, address: nowhere, admin: nowhere, programs: Vec::new() };
        chain.write(config);
        let mut command = chain.command(&[]);
        with(&mut command);
        let program = Program::spawn(&mut command);
        chain.address = port(&program.after("listening on 127.0.0.1:").await);
        chain.admin = port(&program.after("admin listening on 127.0.0.1:").await);
        chain.programs.push(program);
        chain
    }

    fn write(&self, config: &str) {
        let head = "listeners: [{name: public, address: '127.0.0.1:0', keepalive_timeout: 2s}]\n\
                    admin: {address: '127.0.0.1:0'}\nlog: {access: false}\n";
        let shutdown = if config.contains("shutdown:") { "" } else { "shutdown: {delay: 0s, timeout: 60s}\n" };
        std::fs::write(self.config(), format!("{head}{shutdown}{config}")).expect("writable");
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("longhaul.yaml")
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
        command.args(["run", "-c"]).arg(self.config()).args(more).stdin(Stdio::null()).env_remove("NOTIFY_SOCKET");
        command
    }

    /// Starts a process beside the one that serves. What becomes of it is to be waited for.
    fn begin_upgrade(&self) -> Program {
        Program::spawn(&mut self.command(&["--upgrade"]))
    }

    /// A new process takes over.
    async fn upgrade(&mut self) {
        let program = self.begin_upgrade();
        eventually_within(Duration::from_secs(20), "the new process serves", || {
            count(self.newest(), "the new process serves") == 1
        })
        .await;
        self.programs.push(program);
    }

    fn newest(&self) -> &Program {
        self.programs.last().expect("one at least")
    }

    async fn ends_well(&mut self, index: usize) {
        let lines = self.programs[index].lines();
        let status = self.programs[index].ended().await;
        assert!(status.success(), "{status}: {lines:#?}");
    }

    /// Where a session is, and what the proxy says to that.
    async fn say(&self, session: &str) -> (String, String) {
        let answer = post(self.address, "/short", &format!("x-session: {session}\r\n"), "{}").await;
        assert_eq!(answer.status(), 200, "{}: {:#?}", answer.text(), self.newest().lines());
        (answer.text(), answer.header("longhaul-affinity").expect("always there").to_owned())
    }

    /// A stream of a session that the test writes.
    async fn stream(&self, session: &str, backend: &Backend) -> (RawClient, Drip) {
        let mut client = RawClient::connect(self.address).await;
        client
            .send(format!("POST /stream HTTP/1.1\r\nHost: a\r\nx-session: {session}\r\ncontent-length: 2\r\n\r\n{{}}"))
            .await;
        let drip = backend.drip().await;
        assert_eq!(client.read_head().await.status, 200);
        (client, drip)
    }
}

fn port(text: &str) -> SocketAddr {
    let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
    SocketAddr::from(([127, 0, 0, 1], digits.parse().expect("a port")))
}

fn count(program: &Program, text: &str) -> usize {
    program.lines().iter().filter(|line| line.contains(text)).count()
}

/// An agent that tells its name, and streams where it is asked to.
async fn agent() -> Backend {
    let backend = Backend::start().await;
    backend.drip_each();
    backend
}

fn service(backends: &[&Backend], more: &str) -> String {
    let urls: Vec<&str> = backends.iter().map(|backend| backend.url()).collect();
    format!(
        "services:\n- name: support\n  session: {{key: [header: x-session]}}\n{more}  \
         versions: [{{name: stable, endpoints: ['{}']}}]\n",
        urls.join("', '")
    )
}

async fn finish(mut client: RawClient, drip: Drip) {
    drip.event("last").await;
    drip.finish().await;
    assert!(client.read_to_end_of_body().await.contains("data: last"));
}

#[tokio::test]
async fn a_process_started_beside_the_one_that_serves_takes_over() {
    let backend = agent().await;
    let mut chain = Chain::start(&service(&[&backend], "")).await;
    let (client, drip) = chain.stream("a", &backend).await;
    chain.upgrade().await;
    // At once: there is nobody to be asked for a moment, which is waited for.
    chain.upgrade().await;
    backend.next(Script::ok("here"));
    assert_eq!(chain.say("a").await, ("here".to_owned(), "hit".to_owned()));
    finish(client, drip).await;
    chain.ends_well(0).await;
    chain.ends_well(1).await;
    // Those that come by themselves and by SIGUSR2 may follow one another.
    let before = chain.newest().id();
    chain.newest().signal("USR2");
    eventually_within(Duration::from_secs(20), "it is handed over", || {
        count(chain.newest(), "the new process serves") == 1
    })
    .await;
    let line = chain.newest().after("the new process serves").await;
    let child: String = line.split("process").last().unwrap_or_default().chars().filter(char::is_ascii_digit).collect();
    assert_ne!(child, before.to_string());
    chain.ends_well(2).await;
    let last = chain.begin_upgrade();
    last.after("took over from the process before").await;
    backend.next(Script::ok("here"));
    assert_eq!(chain.say("a").await, ("here".to_owned(), "hit".to_owned()));
    chain.programs.push(last);
    chain.newest().signal("TERM");
    chain.ends_well(3).await;
}

#[tokio::test]
async fn without_a_running_process_there_is_nothing_to_take_over() {
    let backend = agent().await;
    let mut chain = Chain::start(&service(&[&backend], "")).await;
    chain.newest().signal("TERM");
    chain.ends_well(0).await;
    let mut program = chain.begin_upgrade();
    assert_eq!(program.ended().await.code(), Some(1));
    let said = program.after("no running longhaul").await;
    assert!(said.contains("start it without --upgrade"), "{said}");
}

#[tokio::test]
async fn a_process_that_can_not_take_over_changes_nothing() {
    let backend = agent().await;
    let good = service(&[&backend], "");
    let mut chain = Chain::start(&good).await;
    let (client, drip) = chain.stream("a", &backend).await;

    chain.write("services: [");
    let mut program = chain.begin_upgrade();
    assert_eq!(program.ended().await.code(), Some(1));
    eventually("it is logged", || count(chain.newest(), "this one goes on as before") == 1).await;
    chain.write(&good);

    // One that only knocks, and one that says nothing.
    let mut program = chain.begin_upgrade();
    program.signal("STOP");
    program.signal("KILL");
    program.ended().await;
    backend.next(Script::ok("here"));
    assert_eq!(chain.say("a").await.1, "hit");

    chain.upgrade().await;
    finish(client, drip).await;
    chain.ends_well(0).await;
    backend.next(Script::ok("here"));
    assert_eq!(chain.say("a").await.1, "hit");
}

/// Whether processes may be started in a PID namespace of their own, as in a container: root may.
fn has_namespaces() -> bool {
    let tried = Command::new("unshare").args(["--pid", "--fork", "true"]).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}

impl Chain {
    /// Its command in a PID namespace of its own, which ends with what is returned.
    fn apart(&self, more: &[&str]) -> Program {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", env!("CARGO_BIN_EXE_longhaul"), "run", "-c"]);
        command.arg(self.config()).args(more).stdin(Stdio::null()).env_remove("NOTIFY_SOCKET");
        Program::spawn(&mut command)
    }
}

#[tokio::test]
async fn whoever_can_not_be_seen_by_the_process_that_serves_is_told_so() {
    if !has_namespaces() {
        eprintln!("skipped: no PID namespace can be made here");
        return;
    }
    let backend = agent().await;
    let mut chain = Chain::start(&service(&[&backend], "")).await;
    chain.newest().signal("TERM");
    chain.ends_well(0).await;
    let inside = chain.apart(&[]);
    inside.after("admin listening on").await;
    let mut outside = chain.begin_upgrade();
    assert_eq!(outside.ended().await.code(), Some(1));
    let said = outside.after("does not hand over").await;
    assert!(said.contains("PID namespace") && said.contains("kill -USR2 1 there"), "{said}");
    drop(inside);

    // The other way round the process that serves sees the other, and knows it by its own number of it.
    chain.start_again().await;
    let _inside = chain.apart(&["--upgrade"]);
    eventually_within(Duration::from_secs(20), "it takes over", || {
        count(chain.newest(), "the new process serves") == 1
    })
    .await;
    chain.ends_well(1).await;
}

#[tokio::test]
async fn a_service_manager_keeps_its_process() {
    let backend = agent().await;
    let directory = tempfile::tempdir().expect("a directory");
    let manager = directory.path().join("notify");
    let _socket = std::os::unix::net::UnixDatagram::bind(&manager).expect("a socket");
    let with = |command: &mut Command| {
        command.env("NOTIFY_SOCKET", &manager);
    };
    let chain = Chain::start_by(&service(&[&backend], ""), with).await;
    let mut program = chain.begin_upgrade();
    assert_eq!(program.ended().await.code(), Some(1));
    program.after(&format!("kill -USR2 {}", chain.newest().id())).await;
    backend.next(Script::ok("here"));
    assert_eq!(chain.say("a").await.1, "new");
}

impl Chain {
    async fn admin(&self, method: &str, path: &str) -> Response {
        ask_admin(self.admin, method, path).await
    }

    /// Of the newest process.
    async fn endpoint(&self, backend: &Backend) -> serde_json::Value {
        let status = self.admin("GET", "/api/v1/status").await.json();
        let versions = status["services"][0]["versions"].as_array().expect("versions").clone();
        let mut endpoints = versions.iter().filter_map(|version| version["endpoints"].as_array()).flatten();
        let named = endpoints.find(|endpoint| endpoint["address"] == backend.name().as_str());
        named.cloned().unwrap_or_default()
    }

    async fn steer(&self, backend: &Backend, verb: &str) {
        let address = backend.name().replace(':', "%3A");
        let path = format!("/api/v1/services/support/endpoints/{address}/{verb}");
        assert_eq!(self.admin("POST", &path).await.status(), 200);
    }

    /// A new process of the same file, as after a crash.
    async fn start_again(&mut self) {
        let program = Program::spawn(&mut self.command(&[]));
        self.address = port(&program.after("listening on 127.0.0.1:").await);
        self.admin = port(&program.after("admin listening on 127.0.0.1:").await);
        self.programs.push(program);
    }
}

#[tokio::test]
async fn a_run_at_an_endpoint_that_was_removed_passes_and_its_end_counts() {
    let (gone, stays) = (agent().await, agent().await);
    let mut chain = Chain::start(&service(&[&gone], "")).await;
    let (client, drip) = chain.stream("a", &gone).await;
    drip.event("first").await;
    chain.write(&service(&[&stays], ""));
    assert_eq!(chain.admin("POST", "/api/v1/reload").await.status(), 200);
    let outstanding = |endpoint: &serde_json::Value| (endpoint["state"].clone(), endpoint["outstanding_runs"].clone());
    let draining = ("draining".into(), 1.into());
    assert_eq!(outstanding(&chain.endpoint(&gone).await), draining);
    chain.upgrade().await;
    let passed = chain.endpoint(&gone).await;
    assert_eq!(outstanding(&passed), draining, "{passed}");
    // Its drain goes on to its deadline, and no second one begins.
    let left = passed["drain"]["cut_in_ms"].as_u64().expect("a deadline");
    assert!(left < 600_000, "{left}");
    finish(client, drip).await;
    eventually_async("it is over", || async { chain.endpoint(&gone).await["outstanding_runs"] != 1 }).await;
    let metrics = chain.admin("GET", "/metrics").await.text();
    let counted = "longhaul_runs_total{outcome=\"completed\",service=\"support\",version=\"stable\"} 1";
    assert!(metrics.contains(counted), "{metrics}");
    chain.ends_well(0).await;
    // Its pin passed, too: the session is moved, and not new.
    stays.next(Script::ok("there"));
    assert!(["moved", "lost"].contains(&chain.say("a").await.1.as_str()));
}

#[tokio::test]
async fn what_operators_say_after_a_handover_holds_for_what_the_old_process_carries() {
    let (one, two) = (agent().await, agent().await);
    let mut chain = Chain::start(&service(&[&one, &two], "  drain: {timeout: 3s}\n")).await;
    let mut streams = Vec::new();
    for session in ["a", "b"] {
        let mut client = RawClient::connect(chain.address).await;
        let ask = format!("POST /stream HTTP/1.1\r\nHost: a\r\nx-session: {session}\r\ncontent-length: 2\r\n\r\n{{}}");
        client.send(ask).await;
        assert_eq!(client.read_head().await.status, 200);
        streams.push(client);
    }
    let (first, second) = (one.drip().await, two.drip().await);
    let first_is_a = first.request.header("x-session") == Some("a");
    let (of_two, of_one) =
        if first_is_a { (streams.pop(), streams.pop()) } else { (streams.remove(0).into(), streams.pop()) };
    let (mut of_one, of_two) = (of_one.expect("two"), of_two.expect("two"));
    // One drain is taken back after the handover, the other begins then.
    chain.steer(&two, "drain").await;
    chain.upgrade().await;
    chain.steer(&two, "undrain").await;
    chain.steer(&one, "drain").await;
    let word = of_one.read_to_end_of_body().await;
    assert!(word.contains("retry: "), "cut at the deadline: {word:?}");
    // By now the other would be cut, too.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!second.gone());
    finish(of_two, second).await;
    first.until_gone().await;
    assert_eq!(chain.endpoint(&two).await["state"], "ready");
}

#[tokio::test]
async fn a_drain_that_an_endpoint_told_of_passes() {
    let (one, two) = (agent().await, agent().await);
    let mut chain = Chain::start(&service(&[&one, &two], "")).await;
    for backend in [&one, &two] {
        backend.each(|_| Script::ok("kept"));
    }
    chain.say("a").await;
    let (home, other) = if one.request_count() == 1 { (&one, &two) } else { (&two, &one) };
    home.next(Script::answer(200, &[("longhaul-drain", "1")], "leaving"));
    assert_eq!(chain.say("a").await, ("leaving".to_owned(), "hit".to_owned()));
    eventually_async("it drains", || async { chain.endpoint(home).await["state"] == "draining" }).await;
    let before = chain.endpoint(home).await["drain"]["cut_in_ms"].as_u64().expect("a deadline");
    chain.upgrade().await;
    let after = chain.endpoint(home).await;
    assert_eq!((&after["state"], &after["drain"]["by"][0]), (&"draining".into(), &"answer".into()), "{after}");
    assert!(after["drain"]["cut_in_ms"].as_u64().is_some_and(|left| left <= before), "{after}");
    let asked = other.request_count();
    assert_eq!(chain.say("a").await.1, "moved");
    assert_eq!(other.request_count(), asked + 1);
}

#[tokio::test]
async fn what_is_left_at_shutdown_timeout_is_cut_one_after_another() {
    const STREAMS: usize = 20;
    let backend = agent().await;
    let config = format!("shutdown: {{delay: 0s, timeout: 3s}}\n{}", service(&[&backend], ""));
    let mut chain = Chain::start(&config).await;
    let mut streams = Vec::new();
    let mut drips = Vec::new();
    for number in 0..STREAMS {
        let (client, drip) = chain.stream(&format!("s-{number}"), &backend).await;
        streams.push(client);
        drips.push(drip);
    }
    chain.upgrade().await;
    let ends = streams.into_iter().map(|mut client| {
        tokio::spawn(async move {
            let word = tokio::time::timeout(Duration::from_secs(20), client.read_to_end_of_body()).await;
            (word.expect("an end"), tokio::time::Instant::now())
        })
    });
    let mut moments = Vec::new();
    for end in ends.collect::<Vec<_>>() {
        let (word, at) = end.await.expect("no panic");
        assert!(word.contains("retry: "), "a last word: {word:?}");
        moments.push(at);
    }
    moments.sort_unstable();
    let spread = moments[STREAMS - 1] - moments[0];
    // A tenth of the time, in steps of 100 ms.
    assert!(spread >= Duration::from_millis(90), "all at once: {spread:?}");
    let status = chain.programs[0].ended().await;
    assert_eq!(status.code(), Some(1), "something was cut");
    backend.each(|_| Script::ok("here"));
    assert_eq!(chain.say("s-0").await.1, "hit");
}

/// The process has the state's file open.
fn has_the_file(process: u32) -> bool {
    let open = std::fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
    open.filter_map(|entry| std::fs::read_link(entry.path()).ok()).any(|path| path.ends_with("longhaul.redb"))
}

/// A connection that a process has accepted just before it was stopped is given up, for another.
async fn pin(chain: &Chain, homes: &mut Vec<(String, String)>, session: &str) {
    for _ in 0..5 {
        if let Ok((home, affinity)) = tokio::time::timeout(Duration::from_secs(2), chain.say(session)).await {
            assert_eq!(affinity, "new");
            homes.push((session.to_owned(), home));
            return;
        }
    }
    panic!("nobody serves {session}: {:#?}", chain.newest().lines());
}

/// Two handovers, the second before the first process has closed the file, as it is held up by SIGSTOP. Then the newest
/// ends, and what all of them were told is there after a restart. False: the first was quicker than the signal.
async fn quick_handovers(ends: &str) -> bool {
    let backends = [agent().await, agent().await];
    for backend in &backends {
        let name = backend.name();
        backend.each(move |_| Script::ok(&name));
    }
    let config = format!("state: {{file: state}}\n{}", service(&[&backends[0], &backends[1]], ""));
    let mut chain = Chain::start(&config).await;
    let mut homes = Vec::new();
    pin(&chain, &mut homes, "first").await;
    let second = chain.begin_upgrade();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while count(&second, "took over from the process before") == 0 {
        assert!(tokio::time::Instant::now() < deadline, "{:#?}", second.lines());
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    chain.newest().signal("STOP");
    let held = has_the_file(chain.newest().id());
    chain.programs.push(second);
    pin(&chain, &mut homes, "second").await;
    // By the second process, as the door may be the stopped one's still.
    chain.newest().signal("USR2");
    let line = chain.newest().after("the new process serves; this one finishes what it has begun").await;
    let third: String = line.split("process").last().unwrap_or_default().chars().filter(char::is_ascii_digit).collect();
    let third: u32 = third.parse().expect("a process");
    pin(&chain, &mut homes, "third").await;
    assert!(!has_the_file(third) || !held, "two have it open");
    chain.programs[0].signal("CONT");
    if ends == "KILL" {
        eventually_within(Duration::from_secs(20), "the newest has the file", || has_the_file(third)).await;
        // Three commits' time.
        tokio::time::sleep(Duration::from_millis(750)).await;
    }
    let status = Command::new("kill").args([&format!("-{ends}"), &third.to_string()]).status();
    assert!(status.is_ok_and(|status| status.success()));
    for program in &mut chain.programs {
        program.ended().await;
    }
    chain.start_again().await;
    for (session, home) in homes {
        let seen = (chain.newest().lines(), chain.programs[1].lines());
        assert_eq!(chain.say(&session).await, (home, "hit".to_owned()), "{session}: {seen:#?}");
    }
    held
}

#[tokio::test]
async fn the_newest_of_quick_handovers_has_the_file_when_it_is_killed() {
    for _ in 0..5 {
        if quick_handovers("KILL").await {
            return;
        }
    }
}

#[tokio::test]
async fn the_newest_of_quick_handovers_writes_the_file_when_it_is_ended_at_once() {
    for _ in 0..5 {
        if quick_handovers("TERM").await {
            return;
        }
    }
}

#[tokio::test]
async fn a_new_process_that_dies_at_once_leaves_the_streams_and_the_pins() {
    let backend = agent().await;
    let config = format!("state: {{file: state}}\n{}", service(&[&backend], ""));
    let mut chain = Chain::start(&config).await;
    let (client, drip) = chain.stream("a", &backend).await;
    drip.event("first").await;
    let mut program = chain.begin_upgrade();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while count(&program, "took over from the process before") == 0 {
        assert!(tokio::time::Instant::now() < deadline, "{:#?}", program.lines());
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    program.signal("KILL");
    program.ended().await;
    eventually("the old one notices", || count(chain.newest(), "deciding alone") == 1).await;
    finish(client, drip).await;
    chain.ends_well(0).await;
    chain.start_again().await;
    backend.next(Script::ok("here"));
    assert_eq!(chain.say("a").await, ("here".to_owned(), "hit".to_owned()));
}

#[tokio::test]
async fn an_old_process_that_dies_at_the_switch_leaves_all_to_the_new_one() {
    let backend = agent().await;
    let config = format!("state: {{file: state}}\n{}", service(&[&backend], ""));
    let mut chain = Chain::start(&config).await;
    let (mut client, drip) = chain.stream("a", &backend).await;
    let program = chain.begin_upgrade();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while count(&program, "took over from the process before") == 0 {
        assert!(tokio::time::Instant::now() < deadline, "{:#?}", program.lines());
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    chain.newest().signal("KILL");
    chain.programs.push(program);
    drip.until_gone().await;
    client.read_to_end_of_body().await;
    backend.next(Script::ok("here"));
    assert_eq!(chain.say("a").await, ("here".to_owned(), "hit".to_owned()));
    eventually_async("nobody carries that run", || async { chain.endpoint(&backend).await["outstanding_runs"] == 0 })
        .await;
    eventually_within(Duration::from_secs(20), "it has the file", || has_the_file(chain.newest().id())).await;
    chain.newest().signal("TERM");
    chain.ends_well(1).await;
    chain.start_again().await;
    backend.next(Script::ok("here"));
    assert_eq!(chain.say("a").await.1, "hit");
}
