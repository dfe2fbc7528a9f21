//! What belongs to the whole process, in a test process of its own: signals, which reach every proxy in it, and descriptors.

use std::process::Command;
use std::time::Duration;

use longhaul::app::{self, Options};
use longhaul::config;
use longhaul::drain::Phase;
use longhaul::ids;

const PATIENCE: Duration = Duration::from_secs(10);

const FILE: &str = "
listeners:
  - {name: public, address: '127.0.0.1:0'}
admin: {address: '127.0.0.1:0'}
shutdown: {delay: 60000ms, timeout: 60000ms}
services:
  - name: support
    versions:
      - {name: stable, endpoints: ['http://127.0.0.1:9']}
";

/// Both in one: they must not run beside each other.
#[test]
fn the_process_has_room_for_descriptors_reloads_at_hangup_and_ends_at_the_second_terminate() {
    descriptors_have_their_room_before_the_first_client();
    hangup_reloads_and_the_second_terminate_ends_at_once();
}

fn descriptors_have_their_room_before_the_first_client() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("longhaul.yaml");
    std::fs::write(&path, FILE).expect("a file");
    let loaded = config::load(&path).expect("a good file");
    let app = app::build(Options::new(path, loaded)).expect("a start");

    let (soft, hard) = rlimit::Resource::NOFILE.get().expect("a limit");
    assert_eq!(soft, hard, "two sockets a stream need the most that is allowed");
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let slots = status.lines().find_map(|line| line.strip_prefix("FDSize:")).expect("a size");
    let slots: u64 = slots.trim().parse().expect("a number");
    // Else the kernel makes the table larger while workers wait.
    assert!(slots >= hard.min(16 * 1024), "{slots}");
    drop(app);
}

fn hangup_reloads_and_the_second_terminate_ends_at_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("longhaul.yaml");
    std::fs::write(&path, FILE).expect("a file");
    let loaded = config::load(&path).expect("a good file");
    let app = app::build(Options { signals: true, ..Options::new(path.clone(), loaded) }).expect("a start");

    std::fs::write(&path, FILE.replace("stable", "green")).expect("a file");
    send("USR2");
    send("HUP");
    wait_until("the reload", || app.reload_state.status().generation == 2);
    assert_eq!(app.running.drain.phase(), Phase::Serving);

    // As a preStop hook does it: the signal that follows is the first, and does not end at once.
    app.drain.drain();
    wait_until("announced", || app.running.drain.phase() == Phase::Announced);
    app.running.open_exchanges.begin();
    send("TERM");
    // A reload that comes after it shows that it was taken in.
    std::fs::write(&path, FILE.replace("stable", "blue")).expect("a file");
    send("HUP");
    wait_until("the reload", || app.reload_state.status().generation == 3);
    assert_eq!(app.running.drain.phase(), Phase::Announced);
    send("INT");
    let ended = app.wait();
    assert_eq!((ended.cut, ended.forced), (1, true));
}

/// To this very process.
fn send(signal: &str) {
    let pid = std::process::id().to_string();
    let status = Command::new("kill").args(["-s", signal, &pid]).status().expect("kill runs");
    assert!(status.success(), "kill -s {signal} {pid}");
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = ids::now() + PATIENCE;
    while !holds() {
        assert!(ids::now() < deadline, "did not happen in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
