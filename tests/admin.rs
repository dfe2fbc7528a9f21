//! The admin API over real sockets: what it answers, and to whom.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use longhaul::app::{self, App};
use longhaul::config::{self, Address};
use longhaul::drain::Phase;
use longhaul::state::dispatcher::{Ask, Lease, Picked};
use longhaul::state::sessions::SessionKey;
use longhaul::state::{AffinityOutcome, Kind, RunOutcome};
use longhaul::{ids, metrics};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A proxy with one service of two versions; nothing listens at its endpoints, which no test needs.
struct Proxy {
    app: App,
    directory: TempDir,
}

const CONFIG: &str = "\
listeners:
  - {name: public, address: \"127.0.0.1:0\"}
log: {access: false}
shutdown: {delay: 0s, timeout: 5s}
services:
  - name: support
    session: {key: [{header: x-session-id}]}
    runs: {max_per_endpoint: 4}
    versions:
      - {name: stable, weight: 95, endpoints: [\"http://10.0.0.11:8000\", \"http://10.0.0.12:8000\"]}
      - {name: canary, weight: 5, endpoints: []}
";

fn start(admin: &str) -> Proxy {
    start_with(CONFIG, admin)
}

fn start_with(config: &str, admin: &str) -> Proxy {
    let directory = tempfile::tempdir().unwrap();
    let admin = admin.replace("DIR", directory.path().to_str().unwrap());
    let path = directory.path().join("longhaul.yaml");
    std::fs::write(directory.path().join("token"), "s3cret\n").unwrap();
    std::fs::write(&path, format!("{config}admin: {admin}\n")).unwrap();
    let loaded = config::load(&path).unwrap_or_else(|problems| panic!("{problems}"));
    let app = app::build(app::Options::new(path, loaded)).unwrap();
    Proxy { app, directory }
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// An error in the form of RFC 9457.
    fn code(&self) -> String {
        assert!(self.head.contains("content-type: application/problem+json"), "{}", self.head);
        let problem = self.json();
        assert_eq!(problem["status"], self.status);
        problem["code"].as_str().unwrap().to_owned()
    }
}

trait Stream: Read + Write {}
impl<S: Read + Write> Stream for S {}

fn connect(address: &Address) -> Box<dyn Stream> {
    match address {
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            Box::new(stream)
        }
        Address::Unix(path) => {
            let stream = UnixStream::connect(path).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            Box::new(stream)
        }
    }
}

/// `fields`: whole lines, Host included.
fn raw(address: &Address, request: &str, fields: &[&str]) -> Answer {
    let mut stream = connect(address);
    let fields: String = fields.iter().map(|field| format!("{field}\r\n")).collect();
    stream.write_all(format!("{request} HTTP/1.1\r\n{fields}Connection: close\r\n\r\n").as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    Answer { status: head[9..12].parse().unwrap(), head: head.to_owned(), body: body.to_owned() }
}

impl Proxy {
    fn ask(&self, request: &str) -> Answer {
        self.ask_with(request, &[])
    }

    fn ask_with(&self, request: &str, fields: &[&str]) -> Answer {
        raw(&self.app.bound.admin, request, &[&["Host: localhost"], fields].concat())
    }

    fn start_run(&self, session: &str) -> Lease {
        let key = SessionKey { scope: None, text: session.into() };
        let ask = Ask::new(Kind::Start, Some(&key));
        let snapshot = self.app.running.snapshot.load();
        let mut lease =
            snapshot.services[0].dispatcher.pick(ask, ids::now(), 0).ok().and_then(Picked::placed).unwrap().lease;
        lease.confirm(ids::now());
        lease
    }

    fn sample(&self, series: &str) -> Option<f64> {
        let text = self.ask("GET /metrics").body;
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map(|value| value.parse().unwrap())
    }
}

#[test]
fn the_labels_of_metrics_are_those_of_the_state() {
    assert_eq!(RunOutcome::ALL.map(RunOutcome::as_str), metrics::RUN_OUTCOMES);
    assert_eq!(AffinityOutcome::ALL.map(AffinityOutcome::as_str), metrics::AFFINITY_OUTCOMES);
    let states = longhaul::state::status::EndpointState::ALL.map(|state| state.as_str());
    assert_eq!(states, metrics::ENDPOINT_STATES);
}

#[test]
fn status_runs_sessions_and_metrics_tell_the_same() {
    let proxy = start("{address: \"127.0.0.1:0\"}");
    let leases = ["a", "b", "c"].map(|session| proxy.start_run(session));

    let status = proxy.ask("GET /api/v1/status").json();
    assert_eq!(status["config"]["generation"], 1);
    assert_eq!(status["config"]["last_error"], Value::Null);
    assert_eq!(status["config"]["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(status["draining"], false);
    assert_eq!(status["listeners"][0]["name"], "public");
    let service = &status["services"][0];
    assert_eq!(service["name"], "support");
    assert_eq!(service["queue"], json!({ "length": 0, "oldest_ms": 0 }));
    assert_eq!(service["versions"][0]["outstanding_runs"], 3);
    assert_eq!(service["versions"][0]["endpoints"][0]["state"], "ready");
    assert_eq!(service["versions"][1]["endpoints"], json!([]));

    let load = proxy.ask("GET /api/v1/metrics").json();
    let expected = json!({
        "outstanding_runs": 3, "queued_runs": 0, "capacity": 8, "demand": 3, "placeable_demand": 0,
        "saturation": 0.375,
    });
    assert_eq!(load["services"]["support"], expected);
    // At /metrics as well, but for those alone who want nothing else.
    let beside = proxy.ask_with("GET /metrics", &["Accept: application/json"]).json();
    assert_eq!(beside["services"]["support"], expected);
    for accept in ["*/*", "application/json, text/plain, */*", "application/json;q=0.5, */*;q=0.1", "text/plain"] {
        let answer = proxy.ask_with("GET /metrics", &[&format!("Accept: {accept}")]);
        assert!(answer.body.starts_with("# HELP "), "{accept}: {}", answer.body);
    }
    assert_eq!(proxy.sample("longhaul_outstanding_runs{service=\"support\",version=\"stable\"}"), Some(3.0));
    assert_eq!(proxy.sample("longhaul_saturation{service=\"support\"}"), Some(0.375));
    let busy = proxy.ask("GET /busy");
    assert_eq!((busy.status, busy.json()), (423, json!({ "outstanding_runs": 3 })));

    let runs = proxy.ask("GET /api/v1/runs?service=support&session=b&limit=10").json();
    assert_eq!(runs["runs"].as_array().unwrap().len(), 1);
    assert_eq!(runs["runs"][0]["id"], leases[1].run_id().unwrap().to_string());
    assert_eq!(proxy.ask("GET /api/v1/sessions?limit=2").json()["sessions"].as_array().unwrap().len(), 2);

    drop(leases);
    assert_eq!(proxy.ask("GET /busy").status, 200);
    assert_eq!(proxy.ask("DELETE /api/v1/sessions?service=support&key=a").json(), json!({ "forgotten": 1 }));
    assert_eq!(proxy.ask("GET /api/v1/sessions").json()["sessions"].as_array().unwrap().len(), 2);
    assert_eq!(proxy.sample("longhaul_sessions{service=\"support\",version=\"stable\"}"), Some(2.0));
}

#[test]
fn endpoints_are_drained_and_undrained() {
    let proxy = start("{address: \"127.0.0.1:0\"}");
    let state =
        || proxy.ask("GET /api/v1/status").json()["services"][0]["versions"][0]["endpoints"][0]["state"].clone();
    let path = "/api/v1/services/support/endpoints/10.0.0.11%3A8000";
    assert_eq!(proxy.ask(&format!("POST {path}/drain")).status, 200);
    assert_eq!(state(), "draining");
    let series = "longhaul_drain_remaining_runs{service=\"support\",endpoint=\"10.0.0.11:8000\"}";
    assert_eq!(proxy.sample(series), Some(0.0));
    assert_eq!(proxy.ask(&format!("POST {path}/undrain")).status, 200);
    assert_eq!(state(), "ready");
    assert_eq!(proxy.sample(series), None);
    assert_eq!(proxy.ask("POST /api/v1/services/support/endpoints/10.0.0.99%3A8000/drain").code(), "not_found");
    assert_eq!(proxy.ask("POST /api/v1/services/nobody/endpoints/10.0.0.11%3A8000/drain").code(), "not_found");
}

#[test]
fn a_bad_reload_tells_its_problems_and_changes_nothing() {
    let proxy = start("{address: \"127.0.0.1:0\"}");
    let path = proxy.directory.path().join("longhaul.yaml");
    let good = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, good.replace("weight: 95", "weight: many")).unwrap();
    let answer = proxy.ask("POST /api/v1/reload");
    assert_eq!((answer.status, answer.code().as_str()), (400, "bad_config"));
    assert_eq!(answer.json()["problems"][0]["path"], "services[0].versions[0].weight");
    let config = proxy.ask("GET /api/v1/status").json()["config"].clone();
    assert_eq!(config["generation"], 1);
    assert!(config["last_error"].as_str().unwrap().contains("services[0].versions[0].weight"));
    assert_eq!(proxy.ask("GET /readyz").status, 200);
    assert_eq!(proxy.sample("longhaul_config_last_reload_successful"), Some(0.0));
    assert_eq!(proxy.sample("longhaul_config_reloads_total{result=\"failure\"}"), Some(1.0));

    std::fs::write(&path, good.replace("weight: 95", "weight: 50")).unwrap();
    assert_eq!(proxy.ask("POST /api/v1/reload").json(), json!({ "generation": 2 }));
    assert_eq!(proxy.sample("longhaul_config_generation"), Some(2.0));
    assert_eq!(proxy.sample("longhaul_config_last_reload_successful"), Some(1.0));
    assert_eq!(proxy.ask("GET /api/v1/config").json()["services"][0]["versions"][0]["weight"], 50);
}

#[test]
fn readiness_ends_with_the_announcement_of_the_drain() {
    let proxy = start("{address: \"127.0.0.1:0\"}");
    assert_eq!(proxy.ask("GET /healthz").status, 200);
    assert_eq!(proxy.ask("GET /readyz?service=support").status, 200);
    assert_eq!(proxy.ask("GET /readyz?service=nobody").code(), "not_found");
    let full: Vec<Lease> = (0..8).map(|index| proxy.start_run(&index.to_string())).collect();
    assert_eq!(proxy.ask("GET /readyz?service=support").status, 503);
    assert_eq!(proxy.ask("GET /readyz").status, 200, "the proxy itself is well");
    drop(full);
    proxy.app.running.drain.advance(Phase::Announced);
    let answer = proxy.ask("GET /readyz");
    assert_eq!((answer.status, answer.code().as_str()), (503, "not_ready"));
    assert!(answer.body.contains("draining"));
    assert_eq!(proxy.ask("GET /healthz").status, 200);
    assert_eq!(proxy.sample("longhaul_draining"), Some(1.0));
}

#[test]
fn asking_for_the_drain_ends_the_proxy() {
    let proxy = start("{address: \"127.0.0.1:0\"}");
    assert_eq!(proxy.ask("POST /api/v1/drain").status, 202);
    let ended = proxy.app.wait();
    assert!(!ended.forced && ended.cut == 0, "{ended:?}");
}

#[test]
fn what_is_not_there_is_a_problem() {
    let proxy = start("{address: \"127.0.0.1:0\"}");
    assert_eq!(proxy.ask("GET /nothing").code(), "not_found");
    assert_eq!(proxy.ask("POST /api/v1/status").code(), "method_not_allowed");
    assert_eq!(proxy.ask("GET /api/v1/services/support/rollout").status, 404);
    assert_eq!(proxy.ask("POST /api/v1/services/support/rollout/start").code(), "not_found");
    assert_eq!(proxy.ask("DELETE /api/v1/runs/01936f5c-1d2e-7a3b-8c4d-5e6f70819203").status, 404);
    for bad in ["DELETE /api/v1/sessions", "DELETE /api/v1/sessions?service=support&key=", "GET /api/v1/runs?limit=x"] {
        assert_eq!(proxy.ask(bad).code(), "bad_request", "{bad}");
    }
    assert_eq!(proxy.ask("DELETE /api/v1/sessions?service=support&kye=a").code(), "bad_request");
}

#[test]
fn pages_of_other_sites_are_refused() {
    let proxy = start("{address: \"127.0.0.1:0\"}");
    let Address::Tcp(address) = proxy.app.bound.admin.clone() else { panic!("TCP") };
    let own_host = format!("Host: {address}");
    let status = |request: &str, fields: &[&str]| raw(&proxy.app.bound.admin, request, fields).status;
    assert_eq!(status("GET /api/v1/status", &["Host: rebound.example"]), 403);
    assert_eq!(status("GET /api/v1/status", &["Host: 127.0.0.1.nip.example:9901"]), 403);
    assert_eq!(status("GET /api/v1/status", &[&own_host]), 200);
    assert_eq!(status("GET /api/v1/status", &[&own_host, "Origin: http://evil.example"]), 403);
    assert_eq!(status("GET /api/v1/status", &[&own_host, "Origin: null"]), 403);
    assert_eq!(status("GET /api/v1/status", &[&own_host, &format!("Origin: http://{address}")]), 200);
    assert_eq!(status("POST /api/v1/reload", &[&own_host, "Sec-Fetch-Site: cross-site"]), 403);
    assert_eq!(status("POST /api/v1/reload", &[&own_host, "Sec-Fetch-Site: same-origin"]), 200);
}

#[test]
fn the_token_opens_everything_and_shows_session_keys() {
    let proxy = start("{address: \"127.0.0.1:0\", token_file: DIR/token}");
    let lease = proxy.start_run("thread-1");
    for open in ["GET /healthz", "GET /readyz"] {
        assert_eq!(proxy.ask(open).status, 200, "{open}");
    }
    for closed in ["GET /metrics", "GET /busy", "GET /api/v1/status", "POST /api/v1/drain", "GET /api/v1/nothing"] {
        let answer = proxy.ask(closed);
        assert_eq!((answer.status, answer.code().as_str()), (401, "unauthorized"), "{closed}");
        assert!(answer.head.contains("www-authenticate: Bearer"));
    }
    let page = proxy.ask("GET /");
    assert_eq!(page.status, 401);
    assert!(page.body.contains("Admin token") && !page.body.contains("support"));
    for wrong in ["Bearer", "Bearer ", "Bearer s3cre", "Bearer s3crets", "Basic s3cret", "s3cret"] {
        let field = format!("Authorization: {wrong}");
        assert_eq!(proxy.ask_with("GET /api/v1/status", &[&field]).status, 401, "{wrong}");
    }
    let runs = proxy.ask_with("GET /api/v1/runs", &["Authorization: Bearer s3cret"]).json();
    assert_eq!(runs["runs"][0]["session"], "thread-1");

    // The file counts as it is now: a new token, and an unreadable one lets nobody in.
    std::fs::write(proxy.directory.path().join("token"), "other").unwrap();
    assert_eq!(proxy.ask_with("GET /busy", &["Authorization: Bearer s3cret"]).status, 401);
    assert_eq!(proxy.ask_with("GET /busy", &["Authorization: bearer other"]).status, 423);
    std::fs::write(proxy.directory.path().join("token"), "\n").unwrap();
    assert_eq!(proxy.ask_with("GET /busy", &["Authorization: Bearer "]).status, 401);
    std::fs::remove_file(proxy.directory.path().join("token")).unwrap();
    assert_eq!(proxy.ask_with("GET /busy", &["Authorization: Bearer other"]).status, 401);
    drop(lease);
}

#[test]
fn session_keys_are_hashed_over_tcp_and_plain_over_the_private_socket() {
    let tcp = start("{address: \"127.0.0.1:0\"}");
    let lease = tcp.start_run("thread-1");
    let sessions = tcp.ask("GET /api/v1/sessions?key=thread-1").json();
    assert_eq!(sessions["sessions"][0]["key"], "4b0a5fefc328e6b9");
    assert_eq!(tcp.ask("GET /api/v1/runs").json()["runs"][0]["session"], "4b0a5fefc328e6b9");
    drop(lease);

    let unix = start("{address: \"unix:DIR/admin.sock\"}");
    let Address::Unix(path) = unix.app.bound.admin.clone() else { panic!("unix") };
    let lease = unix.start_run("thread-1");
    assert_eq!(unix.ask("GET /api/v1/sessions").json()["sessions"][0]["key"], "thread-1");
    assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    drop(lease);
}

#[test]
fn probes_need_no_token_and_show_nothing_else() {
    let proxy = start("{address: \"127.0.0.1:0\", token_file: DIR/token, probes: {address: \"127.0.0.1:0\"}}");
    let probes = proxy.app.bound.probes.clone().unwrap();
    let status = |request: &str| raw(&probes, request, &["Host: probe.example"]).status;
    for open in ["GET /healthz", "GET /readyz", "GET /metrics", "GET /busy", "HEAD /healthz"] {
        assert_eq!(status(open), 200, "{open}");
    }
    for closed in ["GET /", "GET /api/v1/status", "POST /api/v1/drain"] {
        assert_eq!(status(closed), 404, "{closed}");
    }
}

#[test]
fn the_live_page_may_run_only_its_own_script() {
    let proxy = start("{address: \"127.0.0.1:0\"}");
    let page = proxy.ask("GET /");
    assert_eq!(page.status, 200);
    assert!(page.head.contains("content-type: text/html; charset=utf-8"), "{}", page.head);
    assert!(page.head.contains("content-security-policy: default-src 'none'; script-src 'sha256-"), "{}", page.head);
    assert!(page.head.contains("cache-control: no-store"));
    assert!(page.body.starts_with("<!doctype html>"));
}

#[test]
fn answers_end_with_a_line_end_and_errors_name_what_there_is() {
    let proxy = start("{address: \"127.0.0.1:0\"}");
    for request in [
        "GET /healthz",
        "GET /readyz",
        "GET /busy",
        "GET /metrics",
        "GET /api/v1/status",
        "GET /api/v1/config",
        "GET /api/v1/metrics",
        "GET /api/v1/sessions",
        "GET /api/v1/runs",
        "POST /api/v1/reload",
        "GET /nowhere",
        "DELETE /api/v1/runs/x",
        "GET /api/v1/services/support/rollout",
    ] {
        let answer = proxy.ask(request);
        assert!(answer.body.ends_with('\n') && !answer.body.ends_with("\n\n"), "{request}: {:?}", answer.body);
    }
    let unknown = proxy.ask("POST /api/v1/services/supprot/endpoints/x/drain");
    assert_eq!(unknown.json()["detail"], "there is no service supprot; there are: support");
    let unknown = proxy.ask("POST /api/v1/services/support/endpoints/x/drain");
    assert_eq!(unknown.json()["detail"], "support has no endpoint x; it has 10.0.0.11:8000, 10.0.0.12:8000");
}

/// docs/operations.md, held against what is served.
#[test]
fn the_document_names_every_metric_and_every_code() {
    let document = include_str!("../docs/operations.md");
    let proxy = start("{address: \"127.0.0.1:0\"}");
    let _run = proxy.start_run("anna");
    // As where the state has a file.
    let _store = proxy.app.running.metrics.store();
    assert_eq!(proxy.ask("POST /api/v1/services/support/endpoints/10.0.0.11%3A8000/drain").status, 200);
    // As where endpoints are found.
    let source = CONFIG.replace("endpoints: []", "endpoints: [{dns: {name: agents.invalid., port: 8000}}]");
    let finds = start_with(&source, "{address: \"127.0.0.1:0\"}");
    let text = proxy.ask("GET /metrics").body + &finds.ask("GET /metrics").body;
    let mut served: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .chain(["longhaul_requests_total"])
        .collect();
    served.sort_unstable();
    served.dedup();
    let quoted = document.split('`').skip(1).step_by(2);
    let mut named: Vec<&str> = quoted.filter(|name| name.starts_with("longhaul_")).collect();
    named.sort_unstable();
    named.dedup();
    assert_eq!(named, served);

    for code in longhaul::error::Code::ALL {
        let name = format!("`{}`", code.as_str());
        let status = code.status();
        let mut rows = document.lines().filter(|line| line.starts_with('|') && line.contains(&name));
        assert!(rows.any(|row| row.contains(status.as_str())), "{name} with {status} is in no row");
    }
}
