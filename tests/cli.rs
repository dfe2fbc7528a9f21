//! The program's commands, as a person or a script runs them.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use longhaul::app::{self, App};
use longhaul::config::{self, Address};
use serde_json::Value;
use tempfile::TempDir;

const GOOD: &str = "\
listeners:
  - {name: public, address: \"127.0.0.1:0\"}
shutdown: {delay: 0s, timeout: 5s}
services:
  - name: support
    versions:
      - {name: stable, endpoints: [\"http://10.0.0.11:8000\", {url: \"http://10.0.0.12:8000\", max_runs: 20}]}
";

fn longhaul(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_longhaul")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn stdout(output: &Output) -> &str {
    str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    str::from_utf8(&output.stderr).unwrap()
}

fn start(directory: &Path, admin: &str) -> App {
    let path = directory.join("longhaul.yaml");
    std::fs::write(&path, format!("{GOOD}admin: {admin}\n")).unwrap();
    let loaded = config::load(&path).unwrap_or_else(|problems| panic!("{problems}"));
    app::build(app::Options::new(path, loaded)).unwrap()
}

fn served() -> (TempDir, App, String) {
    let directory = tempfile::tempdir().unwrap();
    let app = start(directory.path(), "{address: \"127.0.0.1:0\"}");
    let Address::Tcp(address) = app.bound.admin else { panic!("TCP") };
    (directory, app, format!("http://{address}"))
}

#[test]
fn version_and_usage() {
    let output = longhaul(&["--version"]);
    assert_eq!(stdout(&output), format!("longhaul {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(longhaul(&["fly"]).status.code(), Some(2));
    assert_eq!(longhaul(&["rollout", "support", "hurry"]).status.code(), Some(2));
}

#[test]
fn check_prints_every_problem_with_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("longhaul.yaml");
    let name = file.to_str().unwrap();
    std::fs::write(&file, GOOD).unwrap();
    let output = longhaul(&["check", "-c", name]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    assert!(stdout(&output).ends_with(&format!("{name}: ok\n")));

    std::fs::write(&file, GOOD.replace("timeout: 5s", "timeout: soon").replace("max_runs: 20", "max_rnus: 20"))
        .unwrap();
    let output = longhaul(&["check", "-c", name]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(text.lines().all(|line| line.starts_with(&format!("{name}:"))), "{text}");
    assert!(text.contains(":3:") && text.contains(": shutdown.timeout: "), "{text}");
    assert!(text.contains(":7:") && text.contains("max_rnus"), "{text}");

    let output = longhaul(&["check", "-c", "/nowhere/longhaul.yaml"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("/nowhere/longhaul.yaml"));
    let output = longhaul(&["run", "-c", "/nowhere/longhaul.yaml"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("/nowhere/longhaul.yaml"));
}

#[test]
fn schema_is_json() {
    let schema: Value = serde_json::from_str(stdout(&longhaul(&["schema"]))).unwrap();
    assert!(schema["properties"]["services"].is_object());
}

#[test]
fn status_is_a_table_for_people_and_json_for_scripts() {
    let (_directory, _app, url) = served();
    let output = longhaul(&["status", "--admin", &url]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.contains("configuration 1 since 20"), "{text}");
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let head = ["SERVICE", "VERSION", "WEIGHT", "ENDPOINT", "STATE", "RUNS", "MAX", "OTHER", "SESSIONS"];
    assert!(rows.iter().any(|row| row == &head), "{text}");
    assert!(rows.iter().any(|row| row[..].ends_with(&["10.0.0.12:8000", "ready", "0", "20", "0", "0"])), "{text}");

    let json: Value = serde_json::from_str(stdout(&longhaul(&["status", "--json", "--admin", &url]))).unwrap();
    assert_eq!(json["services"][0]["name"], "support");
    assert_eq!(stdout(&longhaul(&["sessions", "--admin", &url])), "no sessions\n");
    assert_eq!(stdout(&longhaul(&["runs", "--service", "support", "--admin", &url])), "no outstanding runs\n");
    let output = longhaul(&["runs", "--service", "nobody", "--admin", &url]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("there is no service nobody"), "{}", stderr(&output));
}

#[test]
fn endpoints_and_the_proxy_are_drained() {
    let (_directory, app, url) = served();
    let state = || -> Value {
        let json: Value = serde_json::from_str(stdout(&longhaul(&["status", "--json", "--admin", &url]))).unwrap();
        json["services"][0]["versions"][0]["endpoints"][0]["state"].clone()
    };
    let output = longhaul(&["drain", "support", "10.0.0.11:8000", "--wait", "--admin", &url]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(state(), "draining");
    assert_eq!(longhaul(&["undrain", "support", "10.0.0.11:8000", "--admin", &url]).status.code(), Some(0));
    assert_eq!(state(), "ready");
    assert_eq!(longhaul(&["drain", "support", "10.0.0.99:8000", "--admin", &url]).status.code(), Some(1));

    let waiting = std::thread::spawn(move || longhaul(&["drain", "--wait", "--admin", &url]));
    let ended = app.wait();
    assert!(!ended.forced && ended.cut == 0, "{ended:?}");
    let output = waiting.join().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("ended"));
}

#[test]
fn unix_sockets_and_tokens() {
    let directory = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}/admin.sock", directory.path().display());
    let _app = start(directory.path(), &format!("{{address: \"{socket}\"}}"));
    assert_eq!(longhaul(&["status", "--admin", &socket]).status.code(), Some(0));

    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, "s3cret\n").unwrap();
    let app = start(directory.path(), "{address: \"127.0.0.1:0\", token_file: token}");
    let Address::Tcp(address) = app.bound.admin else { panic!("TCP") };
    let url = format!("http://{address}");
    let output = longhaul(&["status", "--admin", &url]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("--token-file"), "{}", stderr(&output));
    let output = longhaul(&["status", "--admin", &url, "--token-file", token.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn a_proxy_that_is_not_there_is_named() {
    // A port that was free a moment ago.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = longhaul(&["status", "--admin", &format!("http://{address}")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is longhaul running?"), "{}", stderr(&output));
}

#[test]
fn whoever_reads_may_stop_early() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_longhaul"))
        .arg("schema")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(stderr(&output), "");
}
