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
    // Of another chain's it knows nothing, and a third follows the second.
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
    let said = program.lines().join("\n");
    assert!(said.contains("no running longhaul") && said.contains("start it without --upgrade"), "{said}");
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

#[tokio::test]
async fn a_service_manager_keeps_its_process() {
    let backend = agent().await;
    let directory = tempfile::tempdir().expect("a directory");
    let manager = directory.path().join("notify");
    let _socket = std::os::unix::net::UnixDatagram::bind(&manager).expect("a socket");
    let with = |command: &mut Command| drop(command.env("NOTIFY_SOCKET", &manager));
    let chain = Chain::start_by(&service(&[&backend], ""), with).await;
    let mut program = chain.begin_upgrade();
    assert_eq!(program.ended().await.code(), Some(1));
    let said = program.lines().join("\n");
    assert!(said.contains(&format!("kill -USR2 {}", chain.newest().id())), "{said}");
    backend.next(Script::ok("here"));
    assert_eq!(chain.say("a").await.1, "new");
}
