//! Config: every example passes, every kind of mistake has its message, and the schema says what the reader reads.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul::config::{self, Config, Loaded, Problems, RouteAction};
use proptest::prelude::*;
use serde_json::{Value, json};

const MINIMAL: &str = include_str!("../config/minimal.yaml");
const EVERYTHING: &str = include_str!("../config/everything.yaml");

fn check(text: &str) -> Result<Loaded, Problems> {
    check_in(Path::new("/nonexistent"), text)
}

fn check_in(base: &Path, text: &str) -> Result<Loaded, Problems> {
    config::check(text, "longhaul.yaml", base, &|name| match name {
        "PORT" => Some("8080".to_owned()),
        "TOKEN" => Some("Bearer abc".to_owned()),
        "EMPTY" => Some(String::new()),
        _ => None,
    })
}

fn good(text: &str) -> Loaded {
    check(text).unwrap_or_else(|problems| panic!("{problems}"))
}

fn examples() -> Vec<(PathBuf, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("config/ is there").map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    assert!(files.len() >= 5, "only {} examples", files.len());
    files.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).expect("readable"))).collect()
}

#[test]
fn every_example_passes() {
    for (path, _) in examples() {
        if let Err(problems) = config::load(&path) {
            panic!("{problems}");
        }
    }
}

#[test]
fn the_smallest_useful_file_means_its_defaults() {
    let loaded = good(MINIMAL);
    assert_eq!(loaded.warnings, []);
    assert_eq!(loaded.config.routes.len(), 1);
    assert_eq!(loaded.config.routes[0].action, RouteAction::Service(0));
    assert_eq!(loaded.config.services[0].timeouts.first_byte, Duration::from_secs(300));
    insta::assert_snapshot!("defaults", format!("{:#}", loaded.effective));
}

#[test]
fn everything_is_read() {
    let loaded = good(EVERYTHING);
    insta::assert_snapshot!("everything", format!("{:#?}", loaded.config));
}

/// The file -> what it means -> a file that means the same.
#[test]
fn the_effective_configuration_is_a_file_of_the_same_meaning() {
    for (path, text) in examples() {
        let first = good(&text);
        let again = good(&first.effective.to_string());
        assert!(first.config.same_meaning(&again.config), "{}", path.display());
        assert_eq!(first.effective, again.effective, "{}", path.display());
    }
}

#[test]
fn the_same_meaning_may_be_written_in_other_words() {
    let first = good(MINIMAL).config;
    let other = good(
        "services: [{versions: [{endpoints: [{url: 'http://10.0.0.11:8000/'}, 'http://10.0.0.12:8000'], name: stable}], name: support,
          timeouts: {first_byte: 300s}, session: }]\nlisteners: [{address: '0.0.0.0:${PORT}', limits: {max_header_bytes: 65536}}]",
    );
    assert!(first.same_meaning(&other.config));
    let different = good(&MINIMAL.replace("10.0.0.12", "10.0.0.13"));
    assert!(!first.same_meaning(&different.config));
}

#[test]
fn secrets_of_cookies_are_part_of_the_meaning_and_never_shown() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("keys.txt"), "0123456789abcdef\n").expect("written");
    std::fs::write(folder.path().join("token"), "s3cret\n").expect("written");
    let text = with_service(
        "    session: {cookie: {secret_file: keys.txt}}\n",
        "        headers: {set: {authorization: \"Bearer ${file:token}\", x-api-key: literal, x-plain: shown, x-env: \"${TOKEN}\"}}\n",
    );
    let first = check_in(folder.path(), &text).unwrap_or_else(|problems| panic!("{problems}"));
    let version = &first.config.services[0].versions[0];
    assert_eq!(version.headers.set[0].1, "Bearer s3cret", "the newline at the end of the file is no part of it");
    let shown = &first.effective["services"][0]["versions"][0]["headers"]["set"];
    assert_eq!(*shown, json!({"authorization": "***", "x-api-key": "***", "x-plain": "shown", "x-env": "***"}));
    assert!(!first.effective.to_string().contains("s3cret"));
    assert_eq!(first.files, [folder.path().join("token"), folder.path().join("keys.txt")]);
    std::fs::write(folder.path().join("keys.txt"), "fedcba9876543210\n0123456789abcdef\n").expect("written");
    let second = check_in(folder.path(), &text).unwrap_or_else(|problems| panic!("{problems}"));
    assert_eq!(first.sha256, second.sha256);
    assert!(!first.config.same_meaning(&second.config));
}

#[test]
fn dollar_signs_can_be_written() {
    let text = format!("{MINIMAL}routes: [{{respond: {{body: \"costs $5, $${{VAR}} and ${{PORT}}\"}}}}]\n");
    let RouteAction::Respond { body, .. } = &good(&text).config.routes[0].action else { panic!("responds") };
    assert_eq!(body, "costs $5, ${VAR} and 8080");
}

#[test]
fn labels_of_routes_are_their_path_or_host() {
    let loaded = good(&format!(
        "{MINIMAL}routes:\n- {{match: {{hosts: [A.example.com], path: /x/**}}, service: support}}\n\
         - {{match: {{hosts: [A.example.com, b]}}, service: support}}\n- {{service: support}}\n"
    ));
    let labels: Vec<&str> = loaded.config.routes.iter().map(|route| route.label.as_str()).collect();
    assert_eq!(labels, ["/x/**", "a.example.com", "default"]);
}

#[test]
fn a_file_that_is_not_there_is_a_problem_too() {
    let problems = config::load(Path::new("/nonexistent/longhaul.yaml")).expect_err("it is not there");
    let expected = "/nonexistent/longhaul.yaml:1:1: (file): cannot read /nonexistent/longhaul.yaml: there is no such file; `-c FILE` names another";
    assert_eq!(problems.to_string(), expected);
}

/// A service with further lines in it and in its version.
fn with_service(service: &str, version: &str) -> String {
    format!(
        "listeners:\n  - address: 0.0.0.0:8080\nservices:\n  - name: a\n{service}    versions:\n      - name: v\n\
         \x20       endpoints: [http://h:1]\n{version}"
    )
}

fn in_service(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|line| with_service(&format!("    {line}\n"), "")).collect()
}

fn in_version(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|line| with_service("", &format!("        {line}\n"))).collect()
}

fn at_top(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|line| with_service("", &format!("{line}\n"))).collect()
}

fn in_listener(lines: &[&str]) -> Vec<String> {
    let base = with_service("", "");
    lines.iter().map(|line| base.replace("address: 0.0.0.0:8080", line)).collect()
}

fn with_endpoints(items: &[&str]) -> Vec<String> {
    let base = with_service("", "");
    items.iter().map(|items| base.replace("[http://h:1]", items)).collect()
}

/// What each file is told, after the line that is wrong in it.
fn told(base: &Path, shown: &[&str], texts: &[String]) -> String {
    let mut all = String::new();
    assert_eq!(shown.len(), texts.len());
    for (shown, text) in shown.iter().zip(texts) {
        let answer = match check_in(base, text) {
            Err(problems) => problems.to_string(),
            Ok(loaded) if !loaded.warnings.is_empty() => {
                loaded.warnings.iter().map(|warning| format!("warning: {warning}")).collect::<Vec<_>>().join("\n")
            }
            Ok(_) => panic!("this should have a problem or a warning: {shown}"),
        };
        let answer = answer.replace(&base.display().to_string(), "DIR");
        writeln!(all, "{shown}\n  {}\n", answer.replace('\n', "\n  ")).expect("into a string");
    }
    all
}

macro_rules! snapshot_of_mistakes {
    ($test:ident, $place:expr, $lines:expr) => {
        #[test]
        fn $test() {
            let lines: &[&str] = &$lines;
            insta::assert_snapshot!(stringify!($test), told(Path::new("/nonexistent"), lines, &$place(lines)));
        }
    };
}

snapshot_of_mistakes!(
    mistakes_in_yaml,
    |lines: &[&str]| lines.iter().map(|line| line.replace('|', "\n")).collect::<Vec<_>>(),
    [
        "",
        "just text",
        "[a, b]",
        "listeners: [",
        "a: b: c",
        "listeners:|\t- x",
        "listeners: []|services: []",
        "listeners:|services:",
        "listeners: {}",
        "listeners: [{address: '0.0.0.0:1'}]|services: [{name: a, versions: [{name: v, endpoints: []}]}]|services: []",
        "--- {}|--- {}",
        "listeners: !custom []",
        "listeners: *nowhere",
        "? [a]|: b",
    ]
);

snapshot_of_mistakes!(
    unknown_keys,
    at_top,
    [
        "listener: []",
        "timeouts: {}",
        "nonsense: 1",
        "shutdown: {delai: 5s, grace: 1s}",
        "<<: {}",
        "\"strange key\\n\": 1",
    ]
);

snapshot_of_mistakes!(
    mistakes_in_substitutions,
    at_top,
    [
        "shutdown: {delay: \"${UNSET}\"}",
        "shutdown: {delay: \"${file:secrets/x}\"}",
        "shutdown: {delay: \"${\"}",
        "shutdown: {delay: \"${A-B}\"}",
        "shutdown: {delay: \"${EMPTY}\"}",
        "shutdown: {delay: ${EMPTY}}",
        "shutdown: {delay: \"${PORT}\"}",
    ]
);

snapshot_of_mistakes!(
    mistakes_in_listeners,
    in_listener,
    [
        "name: x",
        "address: 8080",
        "address: :8080",
        "address: localhost:8080",
        "address: 0.0.0.0",
        "address: /run/x.sock",
        "address: unix:",
        "address: example.com:80",
        "address: 0.0.0.0:99999",
        "{address: '0.0.0.0:1', keepalive_timeout: 0s}",
        "{address: '0.0.0.0:1', proxy_protocol: accept}",
        "{address: '0.0.0.0:1', proxy_protocol: v2, trusted_proxies: [10.0.0.1/8, 10.0.0.0/33, x]}",
        "{address: '0.0.0.0:1', limits: {max_connections: 0, max_header_bytes: 64KB, max_headers: many, max_body_bytes: -1}}",
        "{address: '0.0.0.0:1', limits: {max_header_bytes: 1GiB, header_timeout: 10, max_streams_per_connection: \"5\"}}",
        "{address: '0.0.0.0:1', limits: [1]}",
        "{address: '127.0.0.1:9901'}",
        "{address: '0.0.0.0:1'}\n  - {address: '0.0.0.0:1'}",
        "{name: a, address: '0.0.0.0:1'}\n  - {name: a, address: '0.0.0.0:2'}",
        "{address: '0.0.0.0:1', tls: {}}",
        "{address: '0.0.0.0:1', tls: {certificates: []}}",
        "{address: '0.0.0.0:1', tls: {certificates: [{cert_file: a.crt, key_file: a.key}], min_version: 1.1}}",
    ]
);

snapshot_of_mistakes!(
    mistakes_at_the_top,
    at_top,
    [
        "admin: {address: '0.0.0.0:9901'}",
        "admin: {address: '0.0.0.0:9901', token_file: token}",
        "admin: {probes: {}}",
        "admin: {probes: {address: unix:/x}}",
        "admin: {probes: {address: '127.0.0.1:9901'}}",
        "debug_from: [everyone]",
        "debug_from: 10.0.0.0/8",
        "log: {level: verbose, format: jsn, access: yes, session_ids: clear}",
        "log: text",
        "trace: {sample: 200%}",
        "trace: {sample: 0.5}",
        "shutdown: {delay: 5, timeout: 0s}",
        "shutdown: {delay: 1d, timeout: 1h30m}",
        "shutdown: {delay: 99999999h, timeout: null}",
    ]
);

snapshot_of_mistakes!(
    mistakes_in_routes,
    at_top,
    [
        "routes: [{match: {path: /a}}]",
        "routes: [{service: b}]",
        "routes: [{service: something-else}]",
        "routes: [{service: a, respond: {}}]",
        "routes: [{redirect: {}}]",
        "routes: [{redirect: {scheme: ftp, status: 200, host: 'a b', path: x}}]",
        "routes: [{respond: {status: 99}}]",
        "routes: [{respond: {status: 204, body: x}}]",
        "routes: [{service: a, match: {path: x}}]",
        "routes: [{service: a, match: {path: '/a/**/b'}}]",
        "routes: [{service: a, match: {path: '/a*'}}]",
        "routes: [{service: a, match: {path: '/{session}'}}]",
        "routes: [{service: a, match: {path: '/{id}'}}]",
        "routes: [{service: a, match: {path: '/%61/../b/./ü'}}]",
        "routes: [{service: a, match: {path: '/%zz'}}]",
        "routes: [{service: a, match: {path: '/a?b=c'}}]",
        "routes: [{service: a, match: {hosts: ['a.*.com', 'a:80', 'a b', '']}}]",
        "routes: [{service: a, match: {methods: [post, 'A B']}}]",
        "routes: [{service: a, match: {headers: {'x y': 1, host: b, x-a: \"a\\nb\", X-A: 2, x-b: , x-c: [1]}}}]",
        "routes: [{service: a, strip_prefix: a}]",
        "routes: [{service: a, strip_prefix: /}]",
        "routes: [{service: a, strip_prefix: /a/}]",
        "routes: [{service: a, strip_prefix: /a/*}]",
        "routes: [{service: a, match: {path: /b/**}, strip_prefix: /a}]",
        "routes: [{service: a, headers: {request: {set: {content-length: 1}, remove: [connection, 'a b']}}}]",
        "routes: [{service: a, headers: {response: {set: {x-a: b}, remove: [x-a]}}}]",
        "routes: [{service: a, timeouts: {connect: 0s, first: 5s}}]",
        "routes: [{respond: {}, strip_prefix: /a}]",
        "routes: [{service: a}, {match: {path: /a}, service: a}]",
        "routes: [{respond: {}}]",
    ]
);

snapshot_of_mistakes!(
    mistakes_in_services,
    in_service,
    [
        "name: b",
        "versions: []",
        "agent_protocol: lang-graph",
        "timeouts: {connect: 0s, idle: soon}",
        "retries: {attempts: 0}",
        "health: {path: healthz, port: 70000, interval: 0s}",
        "health: {path: /healthz, tcp: true}",
        "health: {port: 80}",
        "health: {path: '/a b'}",
        "health: {path: /, expect_status: [200-399, 399-200, 20, ok]}",
        "health: {path: /, expect_status: []}",
        "health: {tcp: true, draining_status: 503}",
        "outlier: {consecutive_failures: -1, max_ejected: 50}",
        "balance: least-conn",
        "balance: roundrobin",
        "slow_start: null",
        "pool: {max_idle: 1.5, max_connections: 0}",
        "drain: 10m",
    ]
);

snapshot_of_mistakes!(
    mistakes_in_sessions_and_runs,
    in_service,
    [
        "session: {key: [x-session-id]}",
        "session: {key: [{}]}",
        "session: {key: [{header: a, cookie: b}]}",
        "session: {key: [{headr: a}]}",
        "session: {key: [{header: 'a b'}, {cookie: 'a=b'}, {query: ''}, {json: thread_id}, {json: $.a}, {json: /a~b}]}",
        "session: {key: [{path: /threads/*}]}",
        "session: {key: [{path: '/{session}/{session}'}]}",
        "session: {scope: [{response_header: x-user}]}",
        "session: {scope: [authorization]}",
        "session: {affinity: hash, key: [{response_header: x-id}, {response_json: /id}]}",
        "session: {affinity: sticky}",
        "session: {cookie: {}}",
        "session: {cookie: {name: 'a;b', ttl: 0s, secret_file: none.txt}}",
        "session: {idle_timeout: 0s, max_sessions: 0, when_draining: move, when_lost: drop}",
        "runs: {match: [{methods: [run], path: run}], max_per_endpoint: 0, max_duration: 0s}",
        "runs: {max_per_principal: 5}",
        "runs: {double_texting: {policy: enqueue}}",
        "runs: {double_texting: {policy: reject}}\n    agent_protocol: mcp",
        "runs: {double_texting: {allow_override: true}}\n    agent_protocol: mcp",
        "runs: {double_texting: {policy: rollback}}",
        "runs: {double_texting: {policy: rollback}}\n    agent_protocol: a2a",
        "runs: {idempotency: {key: [{json: /id}]}}",
        "runs: {queue: {progress: 15s}}\n    agent_protocol: langgraph",
        "runs: {on_disconnect: {continue_for: 0s}}",
    ]
);

snapshot_of_mistakes!(
    mistakes_in_versions,
    in_version,
    [
        "weight: 1000001",
        "weight: 5%",
        "http: 3",
        "host: preserved",
        "host: 'a b'",
        "tls: {cert_file: a.crt}",
        "tls: {key_file: a.key}",
        "tls: {cert_file: a.crt, key_file: a.key}",
        "tls: {ca_file: ca.crt, server_name: 'a b'}",
        "headers: {set: {host: a}}",
        "match: {hosts: [a]}",
        "match: {headers: [a]}",
        "- {name: v, endpoints: [http://h:2]}",
    ]
    .map(|line| if line.starts_with('-') { "weight: 1\n      - {name: v, endpoints: [http://h:2]}" } else { line })
);

snapshot_of_mistakes!(
    mistakes_in_endpoints,
    with_endpoints,
    [
        "null",
        "http://h:1",
        "[10.0.0.1:80]",
        "[tcp://h:1]",
        "[wss://h:1]",
        "['http://']",
        "[http://h:0]",
        "[http://h:x]",
        "[http://h:1/v1]",
        "[http://h:1?x]",
        "[http://user:secret@h:1]",
        "[http://10.0.0.256:80]",
        "['http://::1:80']",
        "['http://[::g]:80']",
        "[http://h_h!:80]",
        "['unix:']",
        "[http://h, http://H:80/]",
        "[http://h, {url: http://h, weight: 2}]",
        "[{weight: 2}]",
        "[{url: http://h, weight: 0, max_runs: 0}]",
        "[{url: http://h, dns: {name: h, port: 1}}]",
        "[[http://h]]",
    ]
);

snapshot_of_mistakes!(
    mistakes_in_rollouts,
    in_service,
    [
        "rollout: canary",
        "rollout: {}",
        "rollout: {from: v, to: v, steps: []}",
        "rollout: {from: w, to: canary, steps: {weight: 5%}}",
        "rollout: {from: v, to: v, step: [5%]}",
        "rollout: {from: v, to: v, steps: [5%, {hold: 10m}, {weight: 5, hold: 10}]}",
        "rollout: {from: v, to: v, steps: [{weight: 101%}, {wait: 5%}], on_bad: stop}",
        "rollout: {from: v, to: v, steps: [{weight: 5%}], judge: {min_runs: many, max_failed: 5, confidence: 100%}}",
        "rollout: {from: v, to: v, steps: [{weight: 5%}], judge: {confidence: 5%, worse_than_from: 2.0, max_fails: 1%}}",
        "rollout: {from: v, to: v, steps: [{weight: 5%}], judge: {worse_than_from: {failed: 0, first_event_p95: 150%, duration: 2}}}",
        "rollout: {from: v, to: v, steps: [{weight: 5%}], judge: {worse_than_from: {failed: 1e3, first_event_p95: -1, duration_p95: .5}}}",
        "shadow: v",
        "shadow: {percent: 10%}",
        "shadow: {version: w, percent: 0%}",
    ]
);

snapshot_of_mistakes!(not_available_yet_in_services, in_service, ["runs: {resume: {buffer: 1MiB}}",]);

snapshot_of_mistakes!(
    not_available_yet_at_the_top,
    at_top,
    [
        "state: {}",
        "state: {file: 7, redis: {url: redis://h}}",
        "state: {redis: {url: redis://h}}",
        "state: {redis: {}}",
        "state: disk",
        "trace: {otlp_endpoint: http://h:4317}",
        "kubernetes: {kubeconfig: a, keda: {address: '0.0.0.0:8080'}, pod_deletion_cost: true, leader_election: {name: b}}",
        "kubernetes: {external_metrics: {address: '0.0.0.0:6443', tls: {cert_file: a, key_file: b}, replicas: {dns: ''}}}",
        "kubernetes: {external_metrics: {adress: '0.0.0.0:6443'}}",
    ]
);

snapshot_of_mistakes!(
    mistakes_in_sources,
    with_endpoints,
    [
        "[{dns: {name: 'http://agents.svc', port: 8000}}]",
        "[{dns: {name: 10.0.0.1, port: 8000}}]",
        "[{dns: {name: agents.svc}}]",
        "[{dns: {name: _http._tcp.agents.svc, port: 8000}}]",
        "[{dns: {name: agents.svc, port: 8000, refresh: 10ms}}]",
        "[{dns: {name: agents.svc, port: 8000}}, {dns: {name: agents.svc, port: 8000, refresh: 9s}}]",
        "[{dns: {name: agents.svc, port: 8000}, url: 'http://a:1'}]",
        "[{kubernetes: {namespace: Agents, service: support, port: http}}]",
        "[{kubernetes: {service: support}}]",
        "[{kubernetes: {service: support, port: 70000}}]",
        "[{kubernetes: {service: support, port: Http!}}]",
        "[{kubernetes: {service: support, port: http}}, {kubernetes: {service: support, port: http}}]",
    ]
);

/// The agent beside the proxy runs tools.
#[test]
fn a_sidecar_whose_admin_api_is_open_is_warned_of() {
    let text = |admin: &str, endpoint: &str| {
        format!(
            "listeners: [{{address: '0.0.0.0:8080'}}]\nadmin: {{{admin}}}\nservices: [{{name: a, versions: [{{name: v, endpoints: \
             ['{endpoint}']}}]}}]\n"
        )
    };
    let warned = |admin: &str, endpoint: &str| {
        let warnings = good(&text(admin, endpoint)).warnings;
        warnings.iter().any(|warning| warning.path == "admin" && warning.message.contains("sidecar"))
    };
    let probes = "probes: {address: '0.0.0.0:9900'}";
    for endpoint in ["http://127.0.0.1:8000", "http://[::1]:8000", "http://localhost:8000", "unix:/run/agent.sock"] {
        assert!(warned(probes, endpoint), "{endpoint}");
    }
    assert!(!warned(probes, "http://10.0.0.1:8000"), "not beside it");
    assert!(!warned("", "http://127.0.0.1:8000"), "nobody else looks at it: a person's own machine");
    assert!(!warned(&format!("address: 'unix:/run/longhaul/admin.sock', {probes}"), "http://127.0.0.1:8000"));
}

#[test]
fn several_services_need_routes() {
    let text = "listeners: [{address: '0.0.0.0:1'}]\nservices:\n- {name: a, versions: [{name: v, endpoints: []}]}\n- {name: b, versions: [{name: v, endpoints: []}]}\n";
    let twice = text.replace("name: b", "name: a") + "routes: [{service: a}]\n";
    let unused = text.to_owned() + "routes: [{service: a}]\n";
    let shown = ["no routes", "the same name twice", "a service without a route"];
    let told = told(Path::new("/nonexistent"), &shown, &[text.to_owned(), twice, unused]);
    insta::assert_snapshot!("several_services", told);
}

#[test]
fn no_service_is_needed_where_nothing_is_forwarded() {
    let text = "listeners: [{address: '0.0.0.0:1'}]\nroutes: [{redirect: {scheme: https}}]\n";
    assert!(good(text).config.services.is_empty());
    let problems = check(&text.replace("{redirect: {scheme: https}}", "{service: a}")).expect_err("no service");
    assert!(problems.to_string().contains("there is no service"), "{problems}");
}

/// Certificates that belong together, and some that don't.
fn certificates() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["a", "b"] {
        let made = rcgen::generate_simple_self_signed(vec![format!("{name}.example.com")]).expect("a certificate");
        std::fs::write(folder.path().join(format!("{name}.crt")), made.cert.pem()).expect("written");
        std::fs::write(folder.path().join(format!("{name}.key")), made.signing_key.serialize_pem()).expect("written");
    }
    std::fs::write(folder.path().join("empty"), "").expect("written");
    std::fs::write(folder.path().join("short"), "0123456789abcdef\nshort\n").expect("written");
    std::fs::write(folder.path().join("secret"), "hunter2\n").expect("written");
    std::fs::write(folder.path().join("broken.crt"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .expect("written");
    folder
}

#[test]
fn files_are_looked_at() {
    let folder = certificates();
    let base = with_service("", "");
    let listener = |tls: &str| base.replace("address: 0.0.0.0:8080", &format!("{{address: '0.0.0.0:1', tls: {tls}}}"));
    let lines = [
        "{certificates: [{cert_file: a.crt, key_file: b.key}]}",
        "{certificates: [{cert_file: a.key, key_file: a.key}]}",
        "{certificates: [{cert_file: a.crt, key_file: a.crt}]}",
        "{certificates: [{cert_file: a.crt, key_file: missing.key}]}",
        "{certificates: [{cert_file: broken.crt, key_file: a.key}]}",
        "{certificates: [{cert_file: a.crt}]}",
        "{certificates: [{cert_file: a.crt, key_file: a.key}], client_ca_file: empty}",
        "{certificates: [{cert_file: a.crt, key_file: a.key}], client_ca_file: broken.crt}",
    ];
    let told_tls = told(folder.path(), &lines, &lines.map(listener));
    let lines = [
        "session: {cookie: {secret_file: short}}",
        "session: {cookie: {secret_file: empty}}",
        "runs: {max_duration: \"${file:secret}\"}",
        "balance: ${file:secret}",
    ];
    let told_service = told(folder.path(), &lines, &in_service(&lines));
    assert!(!told_service.contains("hunter2"), "{told_service}");
    let lines = [
        "admin: {token_file: empty}",
        "routes: [{service: a, headers: {request: {set: {x-a: \"${file:secret}\\n\"}}}}]",
    ];
    let told_top = told(folder.path(), &lines, &at_top(&lines));
    insta::assert_snapshot!("files", format!("{told_tls}{told_service}{told_top}"));

    let good = "{certificates: [{cert_file: a.crt, key_file: a.key}, {cert_file: b.crt, key_file: b.key}], client_ca_file: a.crt, min_version: 1.3}";
    let loaded = check_in(folder.path(), &listener(good)).unwrap_or_else(|problems| panic!("{problems}"));
    let tls = loaded.config.listeners[0].tls.as_ref().expect("tls");
    assert_eq!(tls.certificates[1].key_file, folder.path().join("b.key"));
    assert_eq!(loaded.files.len(), 4);
}

#[test]
fn all_problems_are_told_at_once_in_the_order_of_the_file() {
    let text = "listeners:\n  - address: 8080\nservices:\n  - nme: a\n    versions:\n      - name: v\n        weight: x\n        endpoints: [h:1]\nlog: {level: loud}\n";
    let problems = check(text).expect_err("many");
    let lines: Vec<usize> = problems.list.iter().map(|problem| problem.line).collect();
    assert_eq!(lines, [2, 4, 4, 7, 8, 9], "{problems}");
}

#[test]
fn the_schema_and_the_reader_agree() {
    let schema = config::schema();
    for (path, text) in examples() {
        let mut wrong = Vec::new();
        validate(&schema, &to_json(&text), "", &mut wrong);
        validate(&schema, &good(&text).effective, "effective", &mut wrong);
        assert!(wrong.is_empty(), "{}: {wrong:#?}", path.display());
    }
    // And the other way: what the schema refuses, so does the reader.
    for text in [with_service("    nonsense: 1\n", ""), with_service("    retries: {attempts: 0}\n", "")] {
        let mut wrong = Vec::new();
        validate(&schema, &to_json(&text), "", &mut wrong);
        assert_eq!(wrong.len(), 1, "{wrong:?}");
        assert!(check(&text).is_err());
    }
}

/// Every block of the example with all keys has all keys of the schema: so a key can't be added without an example.
#[test]
fn the_example_with_everything_has_every_key() {
    let mut missing = Vec::new();
    find_missing(&config::schema(), &to_json(EVERYTHING), "", &mut missing);
    assert!(missing.is_empty(), "{missing:#?}");
}

fn find_missing(schema: &Value, value: &Value, path: &str, missing: &mut Vec<String>) {
    let Some(properties) = schema["properties"].as_object() else {
        let item = value.as_array().and_then(|items| items.first());
        if let Some(item) = item {
            find_missing(&schema["items"], item, &format!("{path}[]"), missing);
        }
        return;
    };
    let Some(fields) = value.as_object() else { return };
    // A route does one of three things; a key is in one place.
    let key_place = properties.contains_key("json");
    let route = properties.contains_key("redirect");
    for (name, property) in properties {
        match fields.get(name) {
            Some(value) => find_missing(property, value, &format!("{path}.{name}"), missing),
            None if key_place || route && matches!(name.as_str(), "redirect" | "respond") => {}
            None => missing.push(format!("{path}.{name}")),
        }
    }
}

/// As much of JSON Schema as the schema uses, patterns left out.
fn validate(schema: &Value, value: &Value, path: &str, wrong: &mut Vec<String>) {
    if let Some(forms) = schema["anyOf"].as_array() {
        let fits = forms.iter().any(|form| {
            let mut wrong = Vec::new();
            validate(form, value, path, &mut wrong);
            wrong.is_empty()
        });
        if !fits {
            wrong.push(format!("{path}: {value} fits no form"));
        }
    }
    if let Some(options) = schema["enum"].as_array()
        && !options.contains(value)
    {
        wrong.push(format!("{path}: {value} is not one of {options:?}"));
    }
    let name = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let types = match &schema["type"] {
        Value::Array(types) => types.clone(),
        Value::Null => vec![json!(name)],
        single => vec![single.clone()],
    };
    // JSON Schema: every integer is a number.
    let fits = types.contains(&json!(name)) || name == "integer" && types.contains(&json!("number"));
    if !fits {
        wrong.push(format!("{path}: {value} is no {types:?}"));
        return;
    }
    if let Some(number) = value.as_u64() {
        let least = schema["minimum"].as_u64().unwrap_or(0);
        let most = schema["maximum"].as_u64().unwrap_or(u64::MAX);
        if !(least..=most).contains(&number) {
            wrong.push(format!("{path}: {value} is not within {least} and {most}"));
        }
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        validate(&schema["items"], item, &format!("{path}[{index}]"), wrong);
    }
    if let Some(fields) = value.as_object() {
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !fields.contains_key(name) {
                wrong.push(format!("{path}: {name} is missing"));
            }
        }
        for (name, value) in fields {
            let path = format!("{path}.{name}");
            match (schema["properties"].get(name), schema.get("additionalProperties")) {
                (Some(property), _) => validate(property, value, &path, wrong),
                (None, Some(Value::Bool(false))) => wrong.push(format!("{path}: unknown key")),
                (None, Some(schema)) => validate(schema, value, &path, wrong),
                (None, None) => {}
            }
        }
    }
}

fn to_json(text: &str) -> Value {
    use saphyr::{LoadableYamlNode, Yaml};
    fn convert(node: &Yaml) -> Value {
        match node {
            node if node.is_null() => Value::Null,
            node if node.as_bool().is_some() => json!(node.as_bool()),
            node if node.as_integer().is_some() => json!(node.as_integer()),
            node if node.as_str().is_some() => json!(node.as_str()),
            node if node.as_sequence().is_some() => node.as_sequence().into_iter().flatten().map(convert).collect(),
            node => {
                let pairs = node.as_mapping().into_iter().flatten();
                Value::Object(
                    pairs.map(|(key, value)| (key.as_str().unwrap_or("?").to_owned(), convert(value))).collect(),
                )
            }
        }
    }
    convert(&Yaml::load_from_str(text).expect("valid YAML")[0])
}

/// Every problem can be pointed at.
fn assert_sane(text: &str, result: Result<Loaded, Problems>) {
    let Err(problems) = result else { return };
    assert!(!problems.list.is_empty(), "refused without a reason:\n{text}");
    for problem in &problems.list {
        assert!(problem.line >= 1 && problem.column >= 1, "{problem}");
        assert!(problem.line <= text.split(['\n', '\r']).count() + 1, "{problem}\n{text}");
        assert!(!problem.path.is_empty() && !problem.message.is_empty(), "{problem}");
    }
    assert_eq!(problems.to_string().lines().count(), problems.list.len(), "one line each: {problems}");
}

/// What people write by mistake.
const WORDS: &[&str] = &[
    "null",
    "[]",
    "{}",
    "-1",
    "0",
    "1e9",
    "\"\"",
    "true",
    "${X}",
    "${",
    "0s",
    "5%",
    "&a",
    "*a",
    "!t",
    "- ",
    ": ",
    "? ",
    "|",
    ">",
    "'",
    "\"",
    "#",
    "\t",
    "\n",
    "\r",
    "\u{feff}",
    "\u{0}",
    "é",
    "http://",
    "unix:",
    "[::]:0",
    "99999999999999999999",
    "<<: *a",
    "---",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_mutation_of_a_file_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), 0usize..20, 0..WORDS.len()), 1..6)) {
        let mut text: Vec<char> = EVERYTHING.chars().collect();
        for (at, removed, word) in changes {
            let at = at.index(text.len());
            let end = (at + removed).min(text.len());
            text.splice(at..end, WORDS[word].chars());
        }
        let text: String = text.into_iter().collect();
        assert_sane(&text, check(&text));
    }

    #[test]
    fn no_text_panics(text in "[ -~\n]{0,200}|\\PC{0,50}") {
        assert_sane(&text, check(&text));
    }

    /// A value in the place of any other is read or refused, with a place.
    #[test]
    fn no_misplaced_value_panics(at in any::<prop::sample::Index>(), word in 0..WORDS.len()) {
        let mut lines: Vec<String> = EVERYTHING.lines().map(str::to_owned).collect();
        let at = at.index(lines.len());
        let Some((key, _)) = lines[at].split_once(": ") else { return Ok(()) };
        lines[at] = format!("{key}: {}", WORDS[word]);
        let text = lines.join("\n");
        assert_sane(&text, check(&text));
    }

    #[test]
    fn durations_and_sizes_are_shown_as_they_can_be_read(milliseconds in 1u64..1_000_000_000, bytes in 0u64..1 << 40) {
        let text = with_service(&format!("    slow_start: {milliseconds}ms\n"), "")
            .replace("address: 0.0.0.0:8080", &format!("{{address: '0.0.0.0:1', limits: {{max_body_bytes: {bytes}}}}}"));
        let first = good(&text);
        prop_assert_eq!(first.config.services[0].slow_start, Duration::from_millis(milliseconds));
        prop_assert_eq!(first.config.listeners[0].limits.max_body_bytes, bytes);
        let again: Config = good(&first.effective.to_string()).config;
        prop_assert!(first.config.same_meaning(&again));
    }
}
