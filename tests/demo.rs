//! Demo: the printed tour works when a person pastes it.

mod support;

use std::process::{Command, Stdio};
use std::time::Duration;

use support::{Program, RawClient, eventually, eventually_within};

/// Starts the demo and returns its tour once it is printed whole.
async fn start() -> (Program, Vec<String>) {
    let program = Program::start(&["demo", "--port", "0"]);
    eventually_within(Duration::from_secs(20), "the tour is printed", || {
        program.lines().iter().any(|line| line.contains("/metrics"))
    })
    .await;
    let lines = program.lines();
    (program, lines)
}

/// The lines to paste, in order.
fn pasted(lines: &[String]) -> Vec<&str> {
    lines.iter().filter_map(|line| line.strip_prefix("     ")).collect()
}

/// What a shell says to one line.
async fn paste(line: &str) -> String {
    let mut shell = Command::new("sh");
    shell.args(["-c", line]).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || shell.output()).await.expect("no panic").expect("a shell");
    assert!(output.status.success(), "{line}\n{output:?}");
    String::from_utf8_lossy(&output.stdout).to_lowercase()
}

#[tokio::test]
async fn every_line_of_the_tour_works_when_pasted() {
    let (mut program, lines) = start().await;
    let tour = pasted(&lines);
    assert_eq!(tour.len(), 12, "{tour:#?}");
    let agent = |output: &str| {
        let start = output.find("\"agent\":\"").map(|position| position + 9);
        start.and_then(|start| output[start..].split('"').next()).map(str::to_owned)
    };

    // Three sessions' worth of lines at once: a person pastes one after another, but answers take seconds.
    let anna = async {
        let first = paste(tour[0]).await;
        assert!(first.contains("event: done"), "{first}");
        let (second, third) = tokio::join!(paste(tour[1]), paste(tour[2]));
        assert_eq!((agent(&second), agent(&third)), (agent(&first), agent(&first)), "one session, one agent");
        assert!(format!("{second}{third}").contains("\"turn\":3"), "{second}{third}");
    };
    let tester = async {
        let canary = paste(tour[4]).await;
        let stays = paste(tour[5]).await;
        assert_eq!((agent(&canary), agent(&stays)), (Some("canary-1".to_owned()), Some("canary-1".to_owned())));
        assert!(stays.contains("\"turn\":2"), "{stays}");
    };
    let (guests, (), ()) = tokio::join!(paste(tour[3]), anna, tester);
    assert_eq!(guests.matches("\"turn\":1").count(), 10, "{guests}");

    paste(tour[6]).await;
    let status = paste(tour[7]).await;
    assert!(status.contains("stable") && status.contains("canary"), "{status}");

    paste(tour[8]).await;
    let moved = paste(tour[9]).await;
    let drained = guests.matches("\"agent\":\"stable-1\"").count();
    assert_eq!(moved.matches("longhaul-affinity: moved").count(), drained, "{guests}\n{moved}");
    assert_eq!(moved.matches("longhaul-affinity: hit").count(), 10 - drained, "{moved}");
    assert!(!moved.contains("stable-1"), "{moved}");
    paste(tour[10]).await;

    let metrics = paste(tour[11]).await;
    assert!(metrics.contains("longhaul_runs_total{"), "{metrics}");

    program.signal("INT");
    assert!(program.ended().await.success());
}

#[tokio::test]
async fn the_live_page_is_there_and_a_taken_port_is_said() {
    let (program, lines) = start().await;
    let page = lines.iter().find_map(|line| line.trim().strip_prefix("live page  http://")).expect("the live page");
    let address: std::net::SocketAddr = page.trim_end_matches('/').parse().expect("an address");
    let mut client = RawClient::connect(address).await;
    client.send(format!("GET / HTTP/1.1\r\nHost: {address}\r\n\r\n")).await;
    let answer = client.read_response().await;
    assert_eq!(answer.status(), 200);
    assert!(answer.header("content-type").is_some_and(|kind| kind.starts_with("text/html")), "{answer:?}");

    let mut other = Program::start(&["demo", "--port", &address.port().to_string()]);
    assert!(!other.ended().await.success());
    // What it wrote is read by another thread, which may come after the end is seen.
    eventually("the taken port is said", || other.lines().join("\n").contains("--port")).await;
    drop(program);
}
