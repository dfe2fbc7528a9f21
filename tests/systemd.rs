//! Systemd, by its protocols: sockets that are passed (LISTEN_FDS), and what the service manager is told (NOTIFY_SOCKET).

mod support;

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use support::*;

fn config(directory: &Path, listener: &str, endpoint: &str) -> PathBuf {
    let path = directory.join("longhaul.yaml");
    let admin = directory.join("admin.sock");
    let text = format!(
        "listeners:\n  - {{name: public, address: \"{listener}\"}}\nadmin: {{address: \"unix:{}\"}}\n\
         shutdown: {{delay: 0ms, timeout: 10s}}\n\
         services:\n  - name: support\n    versions:\n      - {{name: stable, endpoints: [\"{endpoint}\"]}}\n",
        admin.display()
    );
    std::fs::write(&path, text).expect("a file");
    path
}

/// `longhaul run` with this as its descriptor 3, as a service manager starts it.
fn activated(socket: OwnedFd, config: &Path) -> Command {
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "export LISTEN_PID=$$; exec \"$0\" run -c \"$1\" 3<&0 0</dev/null",
            env!("CARGO_BIN_EXE_longhaul"),
        ])
        .arg(config)
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDNAMES", "longhaul.socket")
        .stdin(Stdio::from(socket));
    command
}

struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(directory: &Path) -> Manager {
        let path = directory.join("notify");
        let socket = UnixDatagram::bind(&path).expect("a socket");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a time-out");
        Manager { socket, path }
    }

    /// The next message that begins with this; others are passed over.
    fn next(&self, beginning: &str) -> String {
        let mut buffer = [0; 1024];
        loop {
            let count = self.socket.recv(&mut buffer).unwrap_or_else(|error| panic!("no {beginning}: {error}"));
            let message = String::from_utf8_lossy(&buffer[..count]).into_owned();
            if message.starts_with(beginning) {
                return message;
            }
        }
    }
}

#[tokio::test]
async fn a_passed_socket_serves_those_who_connected_before() {
    let directory = tempfile::tempdir().expect("a directory");
    let backend = Backend::start().await;
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = socket.local_addr().expect("an address");
    let path = config(directory.path(), &address.to_string(), backend.url());
    let mut early = RawClient::connect(address).await;
    let mut program = Program::spawn(&mut activated(socket.into(), &path));
    program.after("listening on ").await;

    backend.next(Script::ok("hello"));
    early.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert_eq!(early.read_response().await.text(), "hello");
    program.signal("TERM");
    assert!(program.ended().await.success(), "{:#?}", program.lines());
}

#[tokio::test]
async fn a_passed_unix_socket_keeps_its_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("public.sock");
    let socket = UnixListener::bind(&file).expect("a socket");
    let path = config(directory.path(), &format!("unix:{}", file.display()), "http://127.0.0.1:9");
    let mut program = Program::spawn(&mut activated(socket.into(), &path));
    program.after("listening on ").await;
    program.signal("TERM");
    assert!(program.ended().await.success(), "{:#?}", program.lines());
    assert!(file.exists(), "it belongs to the service manager");
    assert!(!directory.path().join("admin.sock").exists(), "while that of our own is gone");
}

#[tokio::test]
async fn a_socket_that_nobody_is_configured_for_is_an_error() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = socket.local_addr().expect("an address");
    let path = config(directory.path(), "127.0.0.1:0", "http://127.0.0.1:9");
    let mut program = Program::spawn(&mut activated(socket.into(), &path));
    assert!(!program.ended().await.success());
    let said = program.after("no address of the configuration is for: ").await;
    assert!(said.starts_with(&format!("{address} (longhaul.socket); configured are 127.0.0.1:0")), "{said}");
}

#[tokio::test]
async fn the_service_manager_is_told_of_every_stage() {
    let directory = tempfile::tempdir().expect("a directory");
    let manager = Manager::new(directory.path());
    let path = config(directory.path(), "127.0.0.1:0", "http://127.0.0.1:9");
    let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
    command.args(["run", "-c"]).arg(&path).stdin(Stdio::null());
    command.env("NOTIFY_SOCKET", &manager.path).env("WATCHDOG_USEC", "400000");
    let mut program = Program::spawn(&mut command);
    assert_eq!(manager.next("READY=1"), "READY=1\nSTATUS=serving, configuration 1\n");
    for _ in 0..3 {
        manager.next("WATCHDOG=1");
    }
    program.signal("HUP");
    let reloading = manager.next("RELOADING=1");
    assert!(reloading.contains("\nMONOTONIC_USEC="), "{reloading}");
    assert_eq!(manager.next("READY=1"), "READY=1\nSTATUS=serving, configuration 1\n");
    std::fs::write(&path, "services: 1\n").expect("a file");
    program.signal("HUP");
    let refused = manager.next("READY=1\nSTATUS=serving configuration 1; a newer one was refused");
    assert!(refused.ends_with("problems\n"), "{refused}");
    program.signal("TERM");
    manager.next("STOPPING=1");
    assert!(program.ended().await.success(), "{:#?}", program.lines());
}

#[tokio::test]
async fn after_a_handover_the_new_process_is_the_main_one_and_speaks() {
    let directory = tempfile::tempdir().expect("a directory");
    let manager = Manager::new(directory.path());
    let path = config(directory.path(), "127.0.0.1:0", "http://127.0.0.1:9");
    let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
    command.args(["run", "-c"]).arg(&path).stdin(Stdio::null());
    command.env("NOTIFY_SOCKET", &manager.path);
    let mut program = Program::spawn(&mut command);
    manager.next("READY=1");
    program.signal("USR2");
    // In this order: of another than the main process nothing may be heard.
    let main = manager.next("");
    let process = main.strip_prefix("MAINPID=").unwrap_or_else(|| panic!("{main}")).trim().to_owned();
    assert_ne!(process, program.id().to_string());
    let ready = manager.next("");
    assert_eq!(ready, "READY=1\nSTATUS=serving, configuration 1\n");
    assert!(program.ended().await.success(), "{:#?}", program.lines());
    let status = Command::new("kill").args(["-TERM", &process]).status();
    assert!(status.is_ok_and(|status| status.success()));
    assert!(manager.next("").starts_with("STOPPING=1"));
    let alive = || std::fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| !stat.contains(") Z"));
    eventually("the new process ends", || !alive()).await;
}
