//! Curl: a client that nobody here wrote, against the running proxy.

mod support;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Output, Stdio};

use support::{Backend, Proxy, Script, Step, start_proxy, within};
use tokio::sync::mpsc;

async fn proxy_before(backend: &Backend) -> Proxy {
    let url = backend.url();
    start_proxy(&format!("services:\n  - {{name: agent, versions: [{{name: v, endpoints: [\"{url}\"]}}]}}\n")).await
}

const MISSING: &str = "these tests need curl: install the package `curl`";

/// curl with these arguments; it gives up by itself after some time.
fn curl(arguments: &[&str], address: SocketAddr, path: &str) -> Command {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "10", "--noproxy", "*"]).args(arguments);
    command.arg(format!("http://{address}{path}")).stdin(Stdio::null());
    command
}

async fn run(arguments: &[&str], address: SocketAddr, path: &str) -> Output {
    let mut command = curl(arguments, address, path);
    let output = within("curl ends", tokio::task::spawn_blocking(move || command.output())).await;
    output.expect("no panic").expect(MISSING)
}

/// A curl that is at work.
struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Running {
    fn start(arguments: &[&str], address: SocketAddr, path: &str) -> Running {
        let mut child = curl(arguments, address, path).stdout(Stdio::piped()).spawn().expect(MISSING);
        let printed = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = mpsc::channel(64);
        std::thread::spawn(move || {
            for line in printed.lines().map_while(Result::ok) {
                // A test that has failed listens no more.
                if sender.blocking_send(line).is_err() {
                    return;
                }
            }
        });
        Running { child, lines }
    }

    /// The next line that it prints.
    async fn line(&mut self) -> String {
        within("curl prints a line", self.lines.recv()).await.expect("curl goes on")
    }

    /// Its exit code, when it has ended.
    async fn end(mut self) -> i32 {
        let ended = tokio::task::spawn_blocking(move || self.child.wait());
        within("curl ends", ended).await.expect("no panic").expect("it ran").code().expect("an exit")
    }
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

#[tokio::test]
async fn get_and_post_in_every_version() {
    let backend = Backend::start().await;
    backend.each(|request| Script::ok(&format!("{} {}", request.method, request.target)));
    let proxy = proxy_before(&backend).await;
    for (option, version) in [("--http1.0", "1.1"), ("--http1.1", "1.1"), ("--http2-prior-knowledge", "2")] {
        let shown = "\n%{http_version} %{http_code}";
        let got = run(&[option, "--write-out", shown], proxy.address, "/a/../b?c=d").await;
        assert_eq!(text(&got), format!("GET /b?c=d\n{version} 200"), "{option}");
        let got = run(&[option, "--data", "hello", "--write-out", shown], proxy.address, "/chat").await;
        assert_eq!(text(&got), format!("POST /chat\n{version} 200"), "{option}");
        assert_eq!(backend.requests().last().map(|request| request.body.clone()), Some(b"hello".to_vec()), "{option}");
        let got = run(&[option, "--head", "--write-out", shown], proxy.address, "/head").await;
        assert!(text(&got).ends_with(&format!("\n{version} 200")), "{option}");
    }
}

#[tokio::test]
async fn an_upgrade_to_http2_is_declined_and_the_request_served() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    // Without prior knowledge curl offers h2c (RFC 7540), which RFC 9113 has given up.
    let got = run(&["--http2", "--write-out", " %{http_version}"], proxy.address, "/").await;
    assert_eq!(text(&got), "ok 1.1");
    let request = backend.request(1).await;
    assert_eq!((request.header("upgrade"), request.header("http2-settings")), (None, None));
}

#[tokio::test]
async fn events_are_printed_as_they_come() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = proxy_before(&backend).await;
    for option in ["--http1.1", "--http2-prior-knowledge", "--http1.0"] {
        let mut curl =
            Running::start(&[option, "-N", "--header", "accept: text/event-stream"], proxy.address, "/events");
        let drip = backend.drip().await;
        for number in 0..3 {
            // The next event is sent when this one was printed.
            drip.event(&number.to_string()).await;
            assert_eq!(curl.line().await, format!("data: {number}"), "{option}");
            assert_eq!(curl.line().await, "", "{option}");
        }
        drip.finish().await;
        assert_eq!(curl.end().await, 0, "{option}");
    }
}

#[tokio::test]
async fn an_interrupted_curl_closes_the_endpoint() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = proxy_before(&backend).await;
    for option in ["--http1.1", "--http2-prior-knowledge"] {
        let mut curl = Running::start(&[option, "-N", "--data", "x"], proxy.address, "/run");
        let drip = backend.drip().await;
        drip.event("1").await;
        curl.line().await;
        curl.child.kill().expect("it runs");
        drip.until_gone().await;
        curl.child.wait().expect("it was killed");
    }
}

#[tokio::test]
async fn a_cut_stream_is_an_error_to_curl() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = proxy_before(&backend).await;
    // 18: a partial file; 56: receiving failed; 92: a stream of HTTP/2 was not closed cleanly.
    for (option, code) in [("--http1.1", 18), ("--http1.0", 56), ("--http2-prior-knowledge", 92)] {
        let mut curl = Running::start(&[option, "-N", "--data", "x"], proxy.address, "/run");
        let drip = backend.drip().await;
        drip.event("1").await;
        assert_eq!(curl.line().await, "data: 1", "{option}");
        drip.cut().await;
        assert_eq!(curl.end().await, code, "{option}");
    }
}

#[tokio::test]
async fn an_upload_waits_for_continue_and_arrives_whole() {
    let backend = Backend::start().await;
    backend.each(|request| {
        let mut script = Script::ok("stored");
        if request.header("expect").is_some() {
            script.0.insert(0, Step::Raw(b"HTTP/1.1 100 Continue\r\n\r\n".to_vec()));
        }
        script
    });
    let proxy = proxy_before(&backend).await;
    let body: Vec<u8> = (0..3_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let file = proxy.directory().join("upload");
    std::fs::write(&file, &body).expect("writable");
    let file = file.to_str().expect("UTF-8");
    for options in [
        &["--http1.1", "--header", "Expect: 100-continue", "--expect100-timeout", "60"][..],
        &["--http1.1", "--header", "Transfer-Encoding: chunked"],
        &["--http2-prior-knowledge"],
    ] {
        let got = run(&[options, &["--upload-file", file]].concat(), proxy.address, "/upload").await;
        assert_eq!(text(&got), "stored", "{options:?}");
        let request = backend.requests().pop().expect("one");
        assert_eq!(request.method, "PUT");
        assert!(request.body == body, "{options:?}: {} bytes of {}", request.body.len(), body.len());
    }
    let expected = backend.requests();
    assert_eq!(expected[0].header("expect"), Some("100-continue"));
}

#[tokio::test]
async fn one_curl_uses_one_connection_for_many_urls() {
    let backend = Backend::start().await;
    let proxy = proxy_before(&backend).await;
    // Not over HTTP/2: some versions of curl can't use such a connection again without TLS, whatever the server.
    let got = run(&["--http1.1", "--write-out", "%{num_connects}\n"], proxy.address, "/[1-5]").await;
    assert_eq!(text(&got), "ok1\nok0\nok0\nok0\nok0\n");
    assert_eq!((backend.request_count(), backend.connections()), (5, 1));
}
