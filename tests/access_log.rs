//! Access log: one line an exchange on the program's stdout, as text and as JSON.

mod support;

use std::net::SocketAddr;
use std::path::Path;

use serde_json::Value;
use support::{Backend, Http2Client, Program, Script, eventually, fetch, get, http2_request, post};

/// In the order of every line.
const FIELDS: [&str; 19] = [
    "time",
    "client",
    "method",
    "path",
    "status",
    "code",
    "outcome",
    "service",
    "version",
    "endpoint",
    "affinity",
    "session",
    "run",
    "queue_ms",
    "first_event_ms",
    "events",
    "bytes_in",
    "bytes_out",
    "duration_ms",
];

async fn start_program(directory: &Path, log: &str, backend: &Backend) -> (Program, SocketAddr) {
    let file = directory.join("longhaul.yaml");
    let config = format!(
        "listeners: [{{name: public, address: '127.0.0.1:0'}}]\nadmin: {{address: '127.0.0.1:0'}}\nlog: {log}\n\
         routes: [{{match: {{path: /run}}, service: support}}]\nservices:\n  - name: support\n    \
         session: {{key: [{{header: x-session-id}}]}}\n    versions: [{{name: stable, endpoints: ['{}']}}]\n",
        backend.url()
    );
    std::fs::write(&file, config).expect("writable");
    let program = Program::start(&["run", "-c", file.to_str().expect("UTF-8")]);
    let rest = program.after("listening on ").await;
    let address = rest.split(['"', ' ']).next().expect("an address").parse().expect("an address");
    (program, address)
}

/// The line of the exchange with this path.
async fn line_of(program: &Program, path: &str) -> String {
    let find = || program.lines().into_iter().find(|line| line.contains(path));
    eventually("the line is written", || find().is_some()).await;
    find().expect("it is there")
}

#[tokio::test]
async fn a_head_that_cannot_be_read_has_its_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let backend = Backend::start().await;
    let (program, address) = start_program(directory.path(), "{format: json}", &backend).await;
    let answer = fetch(address, "GET /run HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n").await;
    assert_eq!(answer.status(), 400);
    let line: Value = serde_json::from_str(&line_of(&program, "bad_request").await).expect("JSON");
    let keys: Vec<&String> = line.as_object().expect("an object").keys().collect();
    assert_eq!(keys.len(), FIELDS.len());
    assert_eq!((&line["status"], &line["client"]), (&Value::from(400), &Value::from("127.0.0.1")));
    assert_eq!((&line["method"], &line["path"], &line["affinity"]), (&Value::Null, &Value::Null, &Value::from("none")));

    // One of HTTP/2 that is too long has been read.
    let client = Http2Client::connect(address).await;
    let mut request = http2_request("GET", address, "/run");
    request.headers_mut().insert("x-long", "x".repeat(70_000).parse().expect("a field value"));
    assert_eq!(client.fetch(request, b"").await.status(), 431);
    let line: Value = serde_json::from_str(&line_of(&program, "header_too_large").await).expect("JSON");
    assert_eq!((&line["client"], &line["path"]), (&Value::from("127.0.0.1"), &Value::from("/run")));
}

#[tokio::test]
async fn text_lines_have_every_field_in_order() {
    let directory = tempfile::tempdir().expect("a directory");
    let backend = Backend::start().await;
    let (program, address) = start_program(directory.path(), "{format: text}", &backend).await;
    let headers = [("content-type", "text/event-stream")];
    backend.next(Script::answer(200, &headers, "data: 1\n\ndata: 2\n\n"));
    let answer = post(address, "/run?secret=1", "x-session-id: anna\r\n", "hello").await;
    let refused = get(address, "/nowhere", "").await;

    let line = line_of(&program, "path=/run").await;
    let pairs: Vec<(&str, &str)> = line.split(' ').map(|pair| pair.split_once('=').expect("a pair")).collect();
    assert_eq!(pairs.iter().map(|(name, _)| *name).collect::<Vec<_>>(), FIELDS, "{line}");
    let value = |name: &str| pairs.iter().find(|(known, _)| *known == name).expect("a field").1;
    let endpoint = backend.name();
    for (name, expected) in [
        ("client", "127.0.0.1"),
        ("method", "POST"),
        ("path", "/run"),
        ("status", "200"),
        ("code", "-"),
        ("outcome", "completed"),
        ("service", "support"),
        ("version", "stable"),
        ("endpoint", endpoint.as_str()),
        ("affinity", "new"),
        ("run", answer.header("longhaul-run-id").expect("a run")),
        ("events", "2"),
        ("bytes_in", "5"),
        ("bytes_out", "18"),
    ] {
        assert_eq!(value(name), expected, "{name} of {line}");
    }
    assert!(!line.contains("anna") && value("session").len() == 16, "hashed: {line}");

    let line = line_of(&program, "path=/nowhere").await;
    assert!(line.contains(" status=404 code=no_route outcome=- service=- "), "{line}");
    assert!(line.contains(&format!(" bytes_out={} ", refused.text().len())), "{line}");
}

#[tokio::test]
async fn json_lines_have_the_same_fields() {
    let directory = tempfile::tempdir().expect("a directory");
    let backend = Backend::start().await;
    let (program, address) = start_program(directory.path(), "{format: json, session_ids: plain}", &backend).await;
    backend.next(Script::ok("done"));
    post(address, "/run", "x-session-id: an\"na\r\n", "hello").await;
    let line = line_of(&program, "\"/run\"").await;
    let json: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
    assert_eq!(json.as_object().expect("an object").len(), FIELDS.len(), "{line}");
    for name in FIELDS {
        assert!(json.get(name).is_some(), "{name} is missing in {line}");
    }
    assert_eq!((&json["session"], &json["status"], &json["bytes_out"]), (&"an\"na".into(), &200.into(), &4.into()));
    assert_eq!((&json["code"], &json["events"]), (&Value::Null, &0.into()));
}
