//! Peer: agent packages that nobody here wrote, as child processes: servers on free ports, and clients with a transcript.
//!
//! The scripts are in `tests/peers`; `scripts/peers` installs what they import. A server ends with its standard input,
//! whose other end is ours, so none outlives its test, however that ends.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use tempfile::TempDir;

use super::{DEADLINE, RawClient, Response, eventually_within, get};

/// How long a server may take until it serves, on a busy machine.
const START: Duration = Duration::from_secs(120);
/// How long a client may take for all of its scenarios, on a busy machine.
const CLIENT: Duration = Duration::from_secs(180);
/// How many lines of a server's diagnostics a failure shows.
const SHOWN_LINES: usize = 60;

/// A script of `tests/peers` and what runs it.
#[derive(Clone, Copy)]
pub struct PeerScript {
    /// A Python environment of `scripts/peers`, or `node`.
    pub environment: &'static str,
    pub file: &'static str,
}

impl PeerScript {
    fn command(self, arguments: &[&str]) -> Command {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let installed = root.join("target/peers");
        let (interpreter, needed) = match self.environment {
            "node" => (PathBuf::from("node"), installed.join("npm/.stamp")),
            name => (installed.join(name).join("bin/python"), installed.join(name).join(".stamp")),
        };
        assert!(needed.exists(), "the agent packages of this test are not installed: run scripts/peers first");
        let mut command = Command::new(interpreter);
        command.arg(root.join("tests/peers").join(self.file)).args(arguments);
        // Loopback only, whatever the machine is set up for; and nothing is written beside the scripts.
        command.envs([
            ("NO_PROXY", "*"),
            ("no_proxy", "*"),
            ("PYTHONDONTWRITEBYTECODE", "1"),
            ("PYTHONUNBUFFERED", "1"),
        ]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

/// A running server.
pub struct Peer {
    child: Child,
    /// Open as long as the server is to live.
    _input: ChildStdin,
    address: SocketAddr,
    diagnostics: Lines,
    _directory: TempDir,
}

impl Peer {
    /// Starts a server and waits until `ready` is answered by 200.
    pub async fn start(script: PeerScript, arguments: &[&str], ready: &str) -> Peer {
        let directory = tempfile::tempdir().expect("a directory");
        let mut child = script.command(arguments).current_dir(directory.path()).spawn().expect("the interpreter runs");
        let input = child.stdin.take().expect("piped");
        let output = Lines::collect(child.stdout.take().expect("piped"));
        let diagnostics = Lines::collect(child.stderr.take().expect("piped"));
        let mut peer = Peer {
            child,
            _input: input,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            diagnostics,
            _directory: directory,
        };
        let end = tokio::time::Instant::now() + START;
        loop {
            if let Some(port) = output.first_after("port ") {
                peer.address.set_port(port.parse().expect("a port"));
                if answers(peer.address, ready).await {
                    return peer;
                }
            }
            assert!(peer.is_alive(), "{} ended at its start:\n{}", script.file, peer.diagnostics.last());
            assert!(
                tokio::time::Instant::now() < end,
                "{} doesn't serve after {START:?}:\n{}",
                script.file,
                peer.diagnostics.last()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the server says of itself at `path`, not through the proxy.
    pub async fn ask(&self, path: &str) -> Value {
        get(self.address, path, "").await.json()
    }

    /// The number at `pointer` of what the server says at `path`.
    pub async fn count(&self, path: &str, pointer: &str) -> u64 {
        let answer = self.ask(path).await;
        let number = answer.pointer(pointer).and_then(Value::as_u64);
        number.unwrap_or_else(|| panic!("no number at {pointer} of {path}: {answer}"))
    }

    /// Ends the server at once, as a crash does.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child of ours");
        self.child.wait().expect("a child of ours");
    }

    fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("a child of ours").is_none()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether `path` is answered by 200. Unlike the client of tests this one takes a refused connection for an answer.
async fn answers(address: SocketAddr, path: &str) -> bool {
    let Ok(Ok(stream)) = tokio::time::timeout(DEADLINE, tokio::net::TcpStream::connect(address)).await else {
        return false;
    };
    let mut client = RawClient::over(stream);
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    client.try_send(request).await.is_ok() && client.try_read_head().await.is_ok_and(|head| head.status == 200)
}

/// Servers of one kind, which the tests of a file use one after the other: their start is slow and what they count is
/// their own.
pub struct Fleet {
    script: PeerScript,
    arguments: &'static [&'static str],
    ready: &'static str,
    peers: tokio::sync::Mutex<Vec<Peer>>,
}

/// The servers of a [`Fleet`], for one test. A test that fails shows their diagnostics.
pub struct Peers {
    held: tokio::sync::MutexGuard<'static, Vec<Peer>>,
    count: usize,
}

impl Fleet {
    pub const fn new(script: PeerScript, arguments: &'static [&'static str], ready: &'static str) -> Fleet {
        Fleet { script, arguments, ready, peers: tokio::sync::Mutex::const_new(Vec::new()) }
    }

    /// So many servers; those that have ended are replaced.
    pub async fn take(&'static self, count: usize) -> Peers {
        let mut held = self.peers.lock().await;
        held.retain_mut(Peer::is_alive);
        let missing = count.saturating_sub(held.len());
        held.extend(join_all((0..missing).map(|_| Peer::start(self.script, self.arguments, self.ready))).await);
        Peers { held, count }
    }
}

impl Peers {
    pub fn each(&self) -> &[Peer] {
        &self.held[..self.count]
    }

    pub fn kill(&mut self, index: usize) {
        self.held[index].kill();
    }

    /// As a list of the configuration.
    pub fn urls(&self) -> String {
        let urls: Vec<String> = self.each().iter().map(|peer| format!("\"{}\"", peer.url())).collect();
        format!("[{}]", urls.join(", "))
    }

    /// The number at `pointer` of what each server says at `path`.
    pub async fn counts(&self, path: &str, pointer: &str) -> Vec<u64> {
        join_all(self.each().iter().map(|peer| peer.count(path, pointer))).await
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for peer in self.each() {
                eprintln!("---- {} said:\n{}", peer.address, peer.diagnostics.last());
            }
        }
    }
}

/// What a client saw, by scenario.
pub type Transcript = BTreeMap<String, Value>;

/// A running client script.
pub struct PeerClient {
    name: String,
    child: Child,
    input: ChildStdin,
    output: Lines,
    diagnostics: Lines,
}

impl PeerClient {
    /// Starts `SCRIPT URL SCENARIO..`.
    pub fn start(script: PeerScript, url: &str, scenarios: &[&str]) -> PeerClient {
        PeerClient::start_with(script, url, scenarios, &[])
    }

    pub fn start_with(script: PeerScript, url: &str, scenarios: &[&str], environment: &[(&str, &str)]) -> PeerClient {
        let arguments = [&[url], scenarios].concat();
        let mut child =
            script.command(&arguments).envs(environment.iter().copied()).spawn().expect("the interpreter runs");
        PeerClient {
            name: format!("{} {}", script.file, arguments.join(" ")),
            input: child.stdin.take().expect("piped"),
            output: Lines::collect(child.stdout.take().expect("piped")),
            diagnostics: Lines::collect(child.stderr.take().expect("piped")),
            child,
        }
    }

    /// Waits until the client prints a line.
    pub async fn prints(&mut self, line: &str) {
        let PeerClient { name, child, output, diagnostics, .. } = self;
        let found = || {
            let printed = output.all();
            let ended = child.try_wait().expect("a child of ours").is_some();
            assert!(!ended, "{name} ended: {printed:#?}\n{}", diagnostics.last());
            printed.iter().any(|printed| printed == line)
        };
        eventually_within(CLIENT, &format!("{name} prints {line:?}"), found).await;
    }

    /// Tells a client that waits for it to go on.
    pub fn go_on(&mut self) {
        writeln!(self.input, "go on").expect("the client reads");
        self.input.flush().expect("the client reads");
    }

    /// Waits for the end; every scenario must have come to one.
    pub async fn finish(mut self) -> Transcript {
        let mut status = None;
        let child = &mut self.child;
        let ended = || {
            status = child.try_wait().expect("a child of ours");
            status.is_some()
        };
        let end = tokio::time::timeout(CLIENT, eventually_within(CLIENT * 2, "the client ends", ended)).await;
        self.output.wait_for_end().await;
        let transcript: Transcript = self
            .output
            .all()
            .iter()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .map(|line| (line["scenario"].as_str().unwrap_or_default().to_owned(), line["seen"].clone()))
            .collect();
        let broken: Vec<String> = transcript
            .iter()
            .filter_map(|(name, seen)| Some(format!("{name}:\n{}", seen.get("exception")?.as_str()?)))
            .collect();
        assert!(
            end.is_ok() && broken.is_empty() && status.is_some_and(|status| status.success()),
            "{}: {}\n{}\n{}\nended so far: {:?}",
            self.name,
            if end.is_ok() { "scenarios failed" } else { "takes too long" },
            broken.join("\n"),
            self.diagnostics.last(),
            transcript.keys().collect::<Vec<_>>(),
        );
        transcript
    }
}

impl Drop for PeerClient {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts `SCRIPT URL SCENARIO..` and waits for its end.
pub async fn transcript(script: PeerScript, url: &str, scenarios: &[&str]) -> Transcript {
    PeerClient::start(script, url, scenarios).finish().await
}

/// Panics, scenario by scenario, where a client saw something else than it did without the proxy.
pub fn assert_same(direct: &Transcript, proxied: &Transcript) {
    let different: Vec<String> = direct
        .iter()
        .filter(|(name, seen)| proxied.get(*name) != Some(seen))
        .map(|(name, seen)| {
            let through = proxied.get(name).map_or_else(|| "nothing".to_owned(), Value::to_string);
            format!("{name}:\n  one server: {seen}\n  the proxy:  {through}")
        })
        .collect();
    assert!(different.is_empty(), "a client sees a difference:\n{}", different.join("\n"));
}

/// Lines that a child writes, as they come.
struct Lines {
    read: Arc<Mutex<(Vec<String>, bool)>>,
}

impl Lines {
    fn collect(stream: impl Read + Send + 'static) -> Lines {
        let read = Arc::new(Mutex::new((Vec::new(), false)));
        let writer = Arc::clone(&read);
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                writer.lock().expect("no reader panicked").0.push(line);
            }
            writer.lock().expect("no reader panicked").1 = true;
        });
        Lines { read }
    }

    fn all(&self) -> Vec<String> {
        self.read.lock().expect("no reader panicked").0.clone()
    }

    fn first_after(&self, start: &str) -> Option<String> {
        self.all().iter().find_map(|line| line.strip_prefix(start).map(str::to_owned))
    }

    fn last(&self) -> String {
        let all = self.all();
        all[all.len().saturating_sub(SHOWN_LINES)..].join("\n")
    }

    async fn wait_for_end(&self) {
        let ended = || self.read.lock().expect("no reader panicked").1;
        eventually_within(DEADLINE, "the last line of a child that has ended", ended).await;
    }
}

/// Sends a request with a JSON body as the official clients do, for what they have no call for.
pub async fn post_json(address: SocketAddr, path: &str, headers: &str, body: &Value) -> Response {
    super::post(address, path, &format!("Content-Type: application/json\r\n{headers}"), &body.to_string()).await
}
