//! The load test drives its own agent and floor: every kind of work goes well, and what goes wrong is seen.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

/// A process of the load test that says where it listens; ended when dropped.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let mut child = loadtest(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let bound: Value = serde_json::from_str(&line).unwrap();
        Self { child, address: bound["addresses"][0].as_str().unwrap().to_owned() }
    }

    fn agent() -> Self {
        Self::start(&["agent"])
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn loadtest(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadtest"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Runs the generator; its report and whether it found all well.
fn run(target: &str, arguments: &[&str]) -> (Value, bool) {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let html = folder.path().join("report.html");
    let output = loadtest(&["run", "--target", target, "--window-from", "0s"])
        .args(arguments)
        .args([Path::new("--json"), &json, Path::new("--html"), &html])
        .output()
        .unwrap();
    assert!(matches!(output.status.code(), Some(0 | 1)), "{}", text(&output));
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.contains("<svg") && !page.contains("http-equiv") && !page.contains("src="), "a page of its own");
    (serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap(), output.status.success())
}

fn eventually(condition: impl Fn() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("it did not come true within 10 s");
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

#[test]
fn every_kind_of_work_goes_well() {
    let agent = Server::agent();
    let target = format!("http://{}", agent.address);
    let twenty = ["--rate", "100", "--limit", "20", "--duration", "1s", "--interval", "10ms", "--events", "5"];
    let cases: [(&str, &[&str], u64, u64); 9] = [
        ("short", &[], 0, 20),
        ("stream", &[], 100, 20),
        ("web-socket", &[], 100, 0),
        ("idle", &["--window-to", "500ms"], 20, 0),
        ("run", &["--time", "20ms"], 0, 20),
        ("job", &["--time", "20ms"], 0, 0),
        ("stream", &["--http", "2", "--streams-per-connection", "10"], 100, 20),
        ("idle", &["--http", "2", "--window-to", "500ms"], 20, 0),
        ("run", &["--http", "2", "--time", "20ms", "--exponential"], 0, 20),
    ];
    for (kind, more, events, answers) in cases {
        let (report, well) = run(&target, &[&["--kind", kind][..], &twenty, more].concat());
        let counts = &report["counts"];
        assert!(well && counts["completed"] == 20, "{kind} {more:?}: {counts} {}", report["fault_examples"]);
        assert_eq!(counts["events"], events, "{kind} {more:?}");
        if answers > 0 {
            assert_eq!(counts["answers"], answers, "{kind} {more:?}");
        }
    }
}

#[test]
fn sessions_think_between_turns_and_clients_abort() {
    let agent = Server::agent();
    let target = format!("http://{}", agent.address);
    let session = ["--kind", "short", "--limit", "5", "--turns", "3", "--think", "50ms", "--duration", "1s"];
    let (report, well) = run(&target, &[&session[..], &["--session-header", "x-session-id", "--rate", "100"]].concat());
    assert!(well && report["counts"]["completed"] == 15, "{report}");
    assert!(report["seconds"].as_f64().unwrap() >= 0.1, "two pauses of 50 ms");

    let stream = [
        "--kind",
        "stream",
        "--rate",
        "100",
        "--limit",
        "20",
        "--duration",
        "1s",
        "--interval",
        "50ms",
        "--events",
        "20",
    ];
    let (report, well) = run(&target, &[&stream[..], &["--abort", "1"]].concat());
    assert!(well && report["counts"]["aborted"] == 20, "who leaves on purpose is no fault: {report}");
}

#[test]
fn a_stream_that_is_cut_is_a_fault() {
    let agent = Server::agent();
    let mut floor = Server::start(&["floor", "--to", &agent.address]);
    let target = format!("http://{}", floor.address);
    let load = ["--kind", "stream", "--rate", "100", "--limit", "5", "--duration", "1s", "--interval", "100ms"];
    let descriptors = format!("/proc/{}/fd", floor.child.id());
    let open = move || std::fs::read_dir(&descriptors).unwrap().count();
    let before = open();
    let killer = std::thread::spawn(move || {
        // Five streams, each with two sockets; they last 10 s.
        eventually(|| open() >= before + 10);
        floor.child.kill().unwrap();
        floor.child.wait().unwrap();
    });
    let (report, well) = run(&target, &load);
    killer.join().unwrap();
    let faults: u64 = report["faults"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert!(!well && faults >= 5, "{report}");
}

#[test]
fn a_target_that_refuses_is_a_fault_and_nonsense_is_refused() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (report, well) = run(&format!("http://{nobody}"), &["--limit", "3", "--duration", "1s"]);
    assert!(!well && report["faults"]["connect"] == 3, "{report}");
    for wrong in [&["--target", "127.0.0.1"][..], &["--target", "https://127.0.0.1:1"], &[]] {
        let output = loadtest(&["run"]).args(wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    }
}

#[test]
fn the_quick_comparison_of_floor_and_direct_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let output = loadtest(&[
        "compare",
        "--quick",
        "--peers",
        "direct,floor",
        "--work",
        "a,b,c,d,e",
        "--total",
        "60s",
        "--output",
    ])
    .arg(folder.path())
    .output()
    .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let found: Value = serde_json::from_slice(&std::fs::read(folder.path().join("compare.json")).unwrap()).unwrap();
    let items = found["items"].as_array().unwrap();
    assert_eq!(items.len(), 7, "a, b, c, three of d, e");
    for item in items {
        let floor = item["contestants"].as_array().unwrap().iter().find(|one| one["name"] == "floor").unwrap();
        let headline = item["figures"][0].as_str().unwrap();
        assert!(floor["values"][headline][0][1].as_f64().is_some(), "{item}");
        assert_eq!(floor["faults"], 0, "{item}");
    }
    assert!(std::fs::read_to_string(folder.path().join("compare.html")).unwrap().contains("<svg"));
}
