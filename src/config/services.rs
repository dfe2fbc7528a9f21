//! Services: what of the file describes agents, their sessions, runs, versions and endpoints.

use std::collections::HashMap;
use std::path::Path;

use super::file::{authorities_file, check_pair};
use super::read::{Block, Kind, Located, block};
use super::rollout::{rollout, shadow};
use super::routes::header_edits;
use super::sources;
use super::values::{
    boolean, choice, cookie_name, count, duration, endpoint_url, header_name, headers, json_pointer, method, name,
    parse_authority, path, path_pattern, port, positive_duration, ratio, size, small, status_ranges, text,
};
use super::yaml::quote;
use super::{
    Affinity, AgentProtocol, Balance, DoubleTexting, Endpoint, EndpointSource, EndpointUrl, Health, HostPolicy,
    HttpVersion, Idempotency, KeySource, OnDisconnect, Outlier, Policy, Pool, Queue, Rollout, RunMatch, Runs, Service,
    Session, SessionCookie, Source, Timeouts, UpstreamTls, Version, WhenDraining, WhenLost,
};

const WEIGHT_MAX: u32 = 1_000_000;
/// Shorter secrets could be guessed.
const SECRET_CHARACTERS_MIN: usize = 16;

/// The list of services.
pub fn services() -> Kind<'static, Vec<Located<Service>>> {
    service().located().list().inspected(|context, services| {
        let mut lines: HashMap<&str, usize> = HashMap::new();
        for service in services {
            let name = service.value.name.as_str();
            if let Some(line) = lines.get(name) {
                let message =
                    format!("the name {name} is already that of the service in line {line}; names are unique");
                service.problem(context, "name", message);
            }
            lines.entry(name).or_insert(service.spot.line);
        }
    })
}

const PROTOCOLS: &[(&str, AgentProtocol)] = &[
    ("auto", AgentProtocol::Auto),
    ("http", AgentProtocol::Http),
    ("langgraph", AgentProtocol::Named("langgraph")),
    ("mcp", AgentProtocol::Named("mcp")),
    ("a2a", AgentProtocol::Named("a2a")),
    ("ag-ui", AgentProtocol::Named("ag-ui")),
    ("openai-responses", AgentProtocol::Named("openai-responses")),
    ("openai-chat", AgentProtocol::Named("openai-chat")),
    ("anthropic", AgentProtocol::Named("anthropic")),
    ("acp", AgentProtocol::Named("acp")),
    ("ai-sdk", AgentProtocol::Named("ai-sdk")),
    ("adk", AgentProtocol::Named("adk")),
    ("agentcore", AgentProtocol::Named("agentcore")),
];

fn service() -> Kind<'static, Service> {
    block("a service such as {name: support, versions: [..]}", |block| {
        let name = block.required("name", "The service's name; unique.", name());
        let about = "The wire conventions by which sessions and runs are recognised.";
        let agent_protocol = block.key("agent_protocol", about, choice(PROTOCOLS), "auto");
        let session = block.key("session", "How sessions are recognised and kept in their place.", session(), "{}");
        let (runs, places) = block.key("runs", "Which requests are runs, and their limits.", runs(), "{}");
        let timeouts = block.key("timeouts", "There is no total timeout.", timeouts(), "{}");
        let attempts = block.key("retries", "When an exchange is tried again.", retries(), "{}");
        let health = block.key("health", "Active checks; none where neither path nor tcp is set.", health(), "{}");
        let outlier = block.key("outlier", "Ejection of endpoints that fail real requests.", outlier(), "{}");
        let balance = block.key(
            "balance",
            "How an endpoint is chosen for new work.",
            choice(&[
                ("least-outstanding-runs", Balance::LeastOutstandingRuns),
                ("round-robin", Balance::RoundRobin),
                ("random", Balance::Random),
            ]),
            "least-outstanding-runs",
        );
        let slow_start = block.key("slow_start", "A new endpoint's weight grows over so long.", duration(), "0s");
        let pool = block.key("pool", "Connections to endpoints, for each endpoint.", pool(), "{}");
        let versions = block.required("versions", "The deployed revisions.", version().located().list());
        // Also of versions with problems, lest a rollout seem to name none.
        let names = block.names_in("versions");
        let shadow = block.optional("shadow", "A version that gets copies of requests.", shadow(&names));
        let rollout = block.optional("rollout", "A rollout in steps, judged by outcomes.", rollout(&names));
        let drain_timeout = block.key("drain", "How endpoints drain.", drain(), "{}");

        if let Some(Located { spot, path, .. }) = places.max_per_principal
            && session.scope.is_empty()
        {
            let message =
                "without `session.scope` nothing tells principals apart; add it, such as [{header: authorization}]";
            block.context().problem(spot, &path, message);
        }
        if let Some(Located { spot, path, .. }) = places.progress
            && let AgentProtocol::Named(protocol @ ("langgraph" | "mcp" | "acp")) = agent_protocol
        {
            let message =
                format!("clients of {protocol} need the head of the agent's own answer, which progress goes before");
            block.context().problem(spot, &path, message);
        }
        if let Some(Located { spot, path, .. }) = places.double_texting
            && let Err(message) = fits_protocol(runs.double_texting, agent_protocol)
        {
            block.context().problem(spot, &path, message);
        }
        let (name, versions) = (name?, versions?);
        if versions.is_empty() && !block.has_items("versions") {
            block.problem("versions", "there is no version; add one, such as {name: stable, endpoints: [..]}");
        }
        check_versions(block, &versions);
        let weight_of = |name: &str| {
            let found = versions.iter().find(|version| version.value.version.name == name);
            found.map_or(0, |version| version.value.version.weight)
        };
        if let Some(Rollout { from, to, .. }) = &rollout
            && weight_of(from) + weight_of(to) == 0
        {
            let message =
                format!("the weights of {from} and {to} are both 0, so the rollout has nothing to share among them");
            block.warning("rollout", message);
        }
        if session.affinity == Affinity::Hash && rollout.is_some() {
            let message =
                "with `affinity: hash` every change of weights moves sessions, so each step of a rollout does; use pin";
            block.warning("rollout", message);
        }
        Some(Service {
            name,
            agent_protocol,
            session,
            runs,
            timeouts,
            attempts,
            health,
            outlier,
            balance,
            slow_start,
            pool,
            versions: versions.into_iter().map(|version| version.value.version).collect(),
            shadow,
            rollout,
            drain_timeout,
        })
    })
}

/// Whether sessions of the protocol have one run at a time, and can do what the policy asks.
fn fits_protocol(double_texting: DoubleTexting, protocol: AgentProtocol) -> Result<(), &'static str> {
    let DoubleTexting { policy, allow_override } = double_texting;
    let mcp = protocol == AgentProtocol::Named("mcp");
    if mcp && (policy != Policy::Allow || allow_override) {
        return Err("parallel calls are normal in an mcp session; write `policy: allow`");
    }
    if policy == Policy::Rollback && protocol != AgentProtocol::Named("langgraph") {
        return Err("only langgraph can undo a run; write `policy: interrupt`, or `agent_protocol: langgraph`");
    }
    Ok(())
}

/// A version with where its endpoints stand.
struct ReadVersion {
    version: Version,
    endpoints: Vec<Located<Place>>,
}

/// Where an item of `endpoints` says that endpoints are.
enum Place {
    At(EndpointUrl),
    FoundBy(Source),
}

fn check_versions(block: &mut Block, versions: &[Located<ReadVersion>]) {
    let mut names: HashMap<&str, usize> = HashMap::new();
    let mut identities: HashMap<String, usize> = HashMap::new();
    for version in versions {
        let name = version.value.version.name.as_str();
        if let Some(line) = names.get(name) {
            let message = format!(
                "the name {name} is already that of the version in line {line}; names are unique within a service"
            );
            version.problem(block.context(), "name", message);
        }
        names.entry(name).or_insert(version.spot.line);
        for endpoint in &version.value.endpoints {
            let (what, identity) = match &endpoint.value {
                Place::At(url) => ("endpoint", url.identity()),
                Place::FoundBy(source) => ("source", source.to_string()),
            };
            if let Some(line) = identities.get(&identity) {
                let message = format!(
                    "the {what} {identity} is already in line {line}; list each once in a service (`weight` gives it more)"
                );
                block.context().problem(endpoint.spot, &endpoint.path, message);
            }
            identities.entry(identity).or_insert(endpoint.spot.line);
        }
    }
}

fn session() -> Kind<'static, Session> {
    block("a mapping", |block| {
        let about = "Places of the session key; first hit wins, before the protocol's own.";
        let key = block.key("key", about, key_source(true).located().list(), "[]");
        let about = "The proxy issues a cookie when nothing else is found.";
        let cookie = block.optional("cookie", about, session_cookie());
        let about = "Values that tell principals apart: pins of one are never used for another.";
        let scope = block.key("scope", about, key_source(false).list(), "[]");
        let affinity = block.key(
            "affinity",
            "pin: a table; hash: stateless, same on every replica; none.",
            choice(&[("pin", Affinity::Pin), ("hash", Affinity::Hash), ("none", Affinity::None)]),
            "pin",
        );
        let idle_timeout =
            block.key("idle_timeout", "A session idle for so long is forgotten.", positive_duration(), "1h");
        let max_sessions = block.key("max_sessions", "Sessions kept at once.", count(1), "1000000");
        let when_draining = block.key(
            "when_draining",
            "What becomes of idle sessions of a draining endpoint.",
            choice(&[("move-idle", WhenDraining::MoveIdle), ("stay", WhenDraining::Stay)]),
            "move-idle",
        );
        let when_lost = block.key(
            "when_lost",
            "What becomes of sessions whose endpoint is gone.",
            choice(&[("rebind", WhenLost::Rebind), ("reject", WhenLost::Reject)]),
            "rebind",
        );
        if affinity == Affinity::Hash {
            for source in &key {
                if matches!(source.value, KeySource::ResponseHeader(_) | KeySource::ResponseJson(_)) {
                    let message = "a key from a response is not known when `affinity: hash` picks; use pin, or a key of the request";
                    block.context().problem(source.spot, &source.path, message);
                }
            }
        }
        let key = key.into_iter().map(|source| source.value).collect();
        Some(Session { key, cookie, scope, affinity, idle_timeout, max_sessions, when_draining, when_lost })
    })
}

/// One place of a key: a mapping with exactly one entry.
fn key_source(responses: bool) -> Kind<'static, KeySource> {
    block("one place of a key such as {header: x-session-id}", move |block| {
        let mut found: Vec<KeySource> = Vec::new();
        let header = block.variant("header", "A request header.", header_name());
        found.extend(header.map(KeySource::Header));
        found.extend(block.variant("cookie", "A cookie of the application.", cookie_name()).map(KeySource::Cookie));
        let query = block.variant("query", "A query parameter.", text().checked(|name| not_empty(name)));
        found.extend(query.map(KeySource::Query));
        let path = block.variant("path", "A path pattern with {session} in it.", path_pattern(true));
        found.extend(path.map(KeySource::Path));
        let json = block.variant("json", "A JSON pointer into the request body.", json_pointer());
        found.extend(json.map(KeySource::Json));
        let mut names = vec!["header", "cookie", "query", "path", "json"];
        if responses {
            let header = block.variant("response_header", "A header of a successful response.", header_name());
            found.extend(header.map(KeySource::ResponseHeader));
            let json =
                block.variant("response_json", "A JSON pointer into a successful response's body.", json_pointer());
            found.extend(json.map(KeySource::ResponseJson));
            names.extend(["response_header", "response_json"]);
        } else if let Some(name) = ["response_header", "response_json"].into_iter().find(|name| block.has(name)) {
            block.problem(name, "a principal is told by its request; use header, cookie, query, path or json");
            block.forgive(name);
            return None;
        }
        let written: Vec<&str> = names.iter().copied().filter(|name| block.has(name)).collect();
        match written.as_slice() {
            [] => {
                block.problem("", format!("expected exactly one of {}; found none", names.join(", ")));
                None
            }
            [_] => found.pop(),
            more => {
                let message = format!("each item names one place; make {} items of their own", more.join(" and "));
                block.problem(more[1], message);
                None
            }
        }
    })
}

fn not_empty(text: &str) -> Result<(), String> {
    if text.is_empty() { Err("the name is empty".to_owned()) } else { Ok(()) }
}

fn session_cookie() -> Kind<'static, SessionCookie> {
    block("a cookie such as {name: longhaul, ttl: 1h, secret_file: keys.txt}", |block| {
        let name = block.key("name", "The cookie's name.", cookie_name(), "longhaul");
        let ttl = block.key("ttl", "How long it is valid.", positive_duration(), "1h");
        let about = "A file with secrets, one a line: the first seals, all open.";
        let secret_file = block.optional("secret_file", about, path());
        let mut secrets = Vec::new();
        match secret_file {
            Some(file) => match read_secrets(&file) {
                Ok(read) => secrets = read,
                Err(message) => block.problem("secret_file", message),
            },
            None if !block.has("secret_file") => {
                let message = "without `secret_file` the key is random: cookies are not understood by other replicas, and \
                               end with a restart unless `state: {file: ..}` keeps it";
                block.warning("", message);
            }
            None => {}
        }
        Some(SessionCookie { name, ttl, secrets })
    })
}

fn read_secrets(file: &Path) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let mut secrets = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        if line.trim().chars().count() < SECRET_CHARACTERS_MIN {
            return Err(format!(
                "line {} of {} is too short: a secret has at least {SECRET_CHARACTERS_MIN} characters (openssl rand -hex 32 makes one)",
                index + 1,
                file.display()
            ));
        }
        secrets.push(line.trim().to_owned());
    }
    match secrets.is_empty() {
        true => Err(format!("{} holds no secret; write one a line (openssl rand -hex 32 makes one)", file.display())),
        false => Ok(secrets),
    }
}

/// What of the runs is to agree with the rest of the service.
struct RunPlaces {
    max_per_principal: Option<Located<u32>>,
    progress: Option<Located<std::time::Duration>>,
    double_texting: Option<Located<DoubleTexting>>,
}

fn runs() -> Kind<'static, (Runs, RunPlaces)> {
    block("a mapping", |block| {
        let about = "Which requests are runs; null: POST, Upgrade, and GET that accepts text/event-stream.";
        let matches = block.optional("match", about, run_match().list());
        let about = "Outstanding runs an endpoint may have; null: no limit.";
        let max_per_endpoint = block.optional("max_per_endpoint", about, small(1, u32::MAX));
        let about = "Outstanding runs of one session.scope value.";
        let max_per_principal = block.optional("max_per_principal", about, small(1, u32::MAX).located());
        let (queue, progress) = block.key("queue", "Where runs wait when all endpoints are full.", queue(), "{}");
        let double_texting =
            block.key("double_texting", "A run in a session that has one.", double_texting().located(), "{}");
        let idempotency = block.optional("idempotency", "Runs with the same key are started once.", idempotency());
        let about = "What becomes of a run whose client leaves.";
        let on_disconnect = block.key("on_disconnect", about, on_disconnect(), "protocol");
        let about = "A longer run is ended.";
        let max_duration = block.optional("max_duration", about, positive_duration());
        let about = "A run with no carrier and no evidence for so long ends as unknown.";
        let unseen_timeout = block.key("unseen_timeout", about, positive_duration(), "1h");
        let heartbeat = block.optional("heartbeat", "An SSE comment after that much silence.", positive_duration());
        block.optional("resume", "Keeps streams so that clients can continue them.", resume());
        if double_texting.value.policy == Policy::Enqueue && queue.max == 0 {
            block.problem("double_texting", "`policy: enqueue` needs a place to wait: set `queue.max` above 0");
        }
        let runs = Runs {
            matches,
            max_per_endpoint,
            max_per_principal: max_per_principal.as_ref().map(|max| max.value),
            queue,
            double_texting: double_texting.value,
            idempotency,
            max_duration,
            on_disconnect,
            unseen_timeout,
            heartbeat,
        };
        Some((runs, RunPlaces { max_per_principal, progress, double_texting: Some(double_texting) }))
    })
}

fn run_match() -> Kind<'static, RunMatch> {
    block("a match such as {methods: [POST], path: /run/**}", |block| {
        let methods = block.key("methods", "Any of these; none: any.", method().list(), "[]");
        let path = block.optional("path", "A path pattern.", path_pattern(false));
        Some(RunMatch { methods, path })
    })
}

fn queue() -> Kind<'static, (Queue, Option<Located<std::time::Duration>>)> {
    block("a mapping with `max` and `timeout`", |block| {
        let max = block.key("max", "Places; 0: none.", small(0, 1_000_000), "0");
        let timeout = block.key("timeout", "A longer wait ends in 503.", positive_duration(), "30s");
        let about = "How often a waiting SSE client gets a comment.";
        let progress = block.optional("progress", about, positive_duration().located());
        let about = "A request header with a number from 0 to 7; lower goes first, 3 is the default.";
        let priority_header = block.optional("priority_header", about, header_name());
        let every = progress.as_ref().map(|progress| progress.value);
        Some((Queue { max, timeout, progress: every, priority_header }, progress))
    })
}

fn double_texting() -> Kind<'static, DoubleTexting> {
    block("a mapping with `policy`", |block| {
        let policy = block.key("policy", "What a second run of a session does.", choice(&Policy::WORDS), "allow");
        let about = "The request header longhaul-double-texting may choose another policy.";
        let allow_override = block.key("allow_override", about, boolean(), "false");
        Some(DoubleTexting { policy, allow_override })
    })
}

fn idempotency() -> Kind<'static, Idempotency> {
    block("a mapping with `key` and `keep`", |block| {
        let key = block.key("key", "Places of the key.", key_source(false).list(), "[{header: idempotency-key}]");
        let keep = block.key("keep", "How long an answer is kept.", positive_duration(), "10m");
        if key.iter().any(|source| matches!(source, KeySource::Json(_))) {
            block.problem("key", "the key of a start is in its head; use header, cookie, query or path");
        }
        Some(Idempotency { key, keep })
    })
}

fn on_disconnect() -> Kind<'static, OnDisconnect> {
    let bounded = block("{continue_for: 30s}", |block| {
        let time = block.required("continue_for", "The run goes on for so long.", positive_duration());
        time.map(|time| OnDisconnect::Continue(Some(time)))
    });
    const WORDS: &[(&str, OnDisconnect)] = &[
        ("protocol", OnDisconnect::Protocol),
        ("cancel", OnDisconnect::Cancel),
        ("continue", OnDisconnect::Continue(None)),
    ];
    choice(WORDS).or_block(bounded)
}

fn resume() -> Kind<'static, ()> {
    block("a mapping with `buffer` and `keep`", |block| {
        block.key("buffer", "Bytes kept of each stream.", size(1, 1 << 30), "1MiB");
        block.key("keep", "How long after its end.", positive_duration(), "5m");
        Some(())
    })
}

fn timeouts() -> Kind<'static, Timeouts> {
    block("a mapping with `connect`, `first_byte`, `idle`", |block| {
        Some(Timeouts {
            connect: block.key("connect", "For a connection to an endpoint.", positive_duration(), "5s"),
            first_byte: block.key("first_byte", "From dispatch to the response head.", positive_duration(), "5m"),
            idle: block.key("idle", "No byte either way for so long.", positive_duration(), "10m"),
        })
    })
}

fn retries() -> Kind<'static, u32> {
    block("a mapping with `attempts`", |block| {
        Some(block.key("attempts", "How often one exchange may be tried, the first time included.", small(1, 100), "2"))
    })
}

fn health() -> Kind<'static, Health> {
    block("a mapping", |block| {
        let path = block.optional("path", "The path of an HTTP check.", health_path());
        let tcp = block.key("tcp", "Whether a connection is enough.", boolean(), "false");
        let port = block.optional("port", "Another port than the endpoint's.", port());
        let expect_status =
            block.key("expect_status", "Status codes of a healthy endpoint.", status_ranges(), "200-399");
        let about = "Status codes of an endpoint that works and takes no new sessions.";
        let draining_status = block.optional("draining_status", about, status_ranges()).unwrap_or_default();
        let about = "A JSON pointer into the answer of the HTTP check, to the number of runs that the endpoint has.";
        let load = block.optional("load", about, json_pointer());
        let interval = block.key("interval", "Between two checks.", positive_duration(), "5s");
        let timeout = block.key("timeout", "Of one check.", positive_duration(), "2s");
        let unhealthy_after = block.key("unhealthy_after", "Failures in a row.", small(1, 1000), "3");
        let healthy_after = block.key("healthy_after", "Successes in a row.", small(1, 1000), "2");
        if path.is_some() && tcp {
            block.problem("tcp", "`path` and `tcp: true` exclude each other; keep one of the two");
        }
        if path.is_none() && !block.has("path") && !tcp && port.is_some() {
            block.warning("port", "this has no effect without `path` or `tcp: true`");
        }
        if !draining_status.is_empty() && path.is_none() && !block.has("path") {
            block.problem("draining_status", "the status is that of the HTTP check's answer: set `path`");
        }
        if load.is_some() && path.is_none() && !block.has("path") {
            block.problem("load", "the load is read from the answer of the HTTP check: set `path`");
        }
        Some(Health {
            path,
            tcp,
            port,
            expect_status,
            draining_status,
            interval,
            timeout,
            unhealthy_after,
            healthy_after,
            load,
        })
    })
}

/// The target of a check: a path, maybe with a query.
fn health_path() -> Kind<'static, String> {
    text().checked(|path| {
        let bad = |c: char| c.is_whitespace() || c.is_control() || !c.is_ascii() || c == '#';
        if !path.starts_with('/') {
            Err(format!("a path begins with `/`: {}", quote(&format!("/{path}"))))
        } else if path.contains(bad) {
            Err("a path has no spaces, `#` or characters beyond ASCII; percent-encode them".to_owned())
        } else {
            Ok(())
        }
    })
}

fn outlier() -> Kind<'static, Outlier> {
    block("a mapping", |block| {
        let about = "So many failures in a row eject an endpoint; 0: never.";
        let consecutive_failures = block.key("consecutive_failures", about, small(0, 1_000_000), "5");
        let eject_for = block.key("eject_for", "How long.", positive_duration(), "30s");
        let about = "Share of a version's endpoints that may be ejected at once.";
        let max_ejected = block.key("max_ejected", about, ratio(), "50%");
        Some(Outlier { consecutive_failures, eject_for, max_ejected })
    })
}

fn pool() -> Kind<'static, Pool> {
    block("a mapping", |block| {
        Some(Pool {
            max_idle: block.key("max_idle", "Idle connections kept.", count(0), "100"),
            idle_timeout: block.key("idle_timeout", "An idle connection is closed after.", positive_duration(), "60s"),
            max_connections: block.optional("max_connections", "Connections at once; null: no limit.", count(1)),
        })
    })
}

fn drain() -> Kind<'static, std::time::Duration> {
    block("a mapping with `timeout`", |block| {
        Some(block.key("timeout", "After that long what still runs is cut.", positive_duration(), "10m"))
    })
}

fn version() -> Kind<'static, ReadVersion> {
    block("a version such as {name: stable, endpoints: [..]}", |block| {
        let name = block.required("name", "The version's name; unique in the service.", name());
        let about = "Its share of new sessions, relative to the other versions; 0: none.";
        let weight = block.key("weight", about, small(0, WEIGHT_MAX), "100");
        let about = "Addresses that serve the version; [] where it is scaled to zero.";
        let endpoints = block.required("endpoints", about, endpoint().located().list());
        let http = block.key(
            "http",
            "auto: by ALPN on https, HTTP/1.1 on http; or 1 or 2.",
            choice(&[("auto", HttpVersion::Auto), ("1", HttpVersion::Http1), ("2", HttpVersion::Http2)]),
            "auto",
        );
        let host = block.key(
            "host",
            "The Host that endpoints see: preserve, endpoint, or a literal.",
            host_policy(),
            "preserve",
        );
        if let HostPolicy::Literal(literal) = &host
            && let Some(near) = super::read::nearest(literal, ["preserve", "endpoint"])
        {
            block.warning("host", format!("taken as the literal host {}; did you mean `{near}`?", quote(literal)));
        }
        let tls = block.key("tls", "TLS towards https endpoints.", upstream_tls(), "{}");
        let headers =
            block.key("headers", "Changes of request headers; `set` is also sent with checks.", header_edits(), "{}");
        let about = "New sessions and keyless exchanges with these headers go here, whatever the weights.";
        let matches = block.key("match", about, version_match(), "{}");

        let (mut list, mut sources, mut located) = (Vec::new(), Vec::new(), Vec::new());
        for item in endpoints? {
            match item.value.clone() {
                Item::None => {}
                Item::Endpoint(endpoint) => {
                    located.push(item.with(|_| Place::At(endpoint.url.clone())));
                    list.push(endpoint);
                }
                Item::Source(source) => {
                    located.push(item.with(|_| Place::FoundBy(source.source.clone())));
                    sources.push(source);
                }
            }
        }
        let name = name?;
        let version = Version { name, weight, endpoints: list, sources, http, host, tls, headers, matches };
        Some(ReadVersion { version, endpoints: located })
    })
}

/// An item of `endpoints`.
#[derive(Clone)]
enum Item {
    Endpoint(Endpoint),
    Source(EndpointSource),
    /// With a problem that was told.
    None,
}

fn endpoint() -> Kind<'static, Item> {
    let full = block("{url: http://10.0.0.12:8000, weight: 2, max_runs: 20}", |block| {
        let url = block.variant("url", "http://host:port, https://host:port or unix:/path.", endpoint_url());
        let dns = block.variant("dns", "Every address of a name.", sources::dns());
        let kubernetes = block.variant("kubernetes", "The pods of a service.", sources::kubernetes());
        let weight = block.key("weight", "Its share, relative to the other endpoints.", small(1, WEIGHT_MAX), "1");
        let about = "Outstanding runs it may have; goes before runs.max_per_endpoint.";
        let max_runs = block.optional("max_runs", about, small(1, u32::MAX));
        let written: Vec<&str> = ["url", "dns", "kubernetes"].into_iter().filter(|name| block.has(name)).collect();
        match written.as_slice() {
            [] => block.problem("", "an endpoint needs a `url`, such as {url: http://10.0.0.12:8000}"),
            [_] => {}
            more => {
                let message =
                    format!("an endpoint is found in one way; make {} items of their own", more.join(" and "));
                block.problem(more[1], message);
            }
        }
        let source = dns.map(Source::Dns).or(kubernetes.map(Source::Kubernetes));
        Some(match (url, source) {
            (Some(url), _) => Item::Endpoint(Endpoint { url, weight, max_runs }),
            (None, Some(source)) => Item::Source(EndpointSource { source, weight, max_runs }),
            (None, None) => Item::None,
        })
    });
    endpoint_url().map(|url| Item::Endpoint(Endpoint { url, weight: 1, max_runs: None })).or_block(full)
}

fn host_policy() -> Kind<'static, HostPolicy> {
    Kind::scalar(
        "preserve, endpoint or a host",
        || serde_json::json!({"type": "string", "minLength": 1}),
        |_, scalar| match scalar.text.as_str() {
            "preserve" => Ok(HostPolicy::Preserve),
            "endpoint" => Ok(HostPolicy::Endpoint),
            literal => parse_authority(literal).map(HostPolicy::Literal),
        },
        |host| match host {
            HostPolicy::Preserve => "preserve".into(),
            HostPolicy::Endpoint => "endpoint".into(),
            HostPolicy::Literal(literal) => literal.as_str().into(),
        },
    )
}

fn upstream_tls() -> Kind<'static, UpstreamTls> {
    block("a mapping", |block| {
        let ca_file = block.optional("ca_file", "Authorities to trust; null: the system's.", authorities_file());
        let cert_file = block.optional("cert_file", "Our own certificate, PEM.", path());
        let key_file = block.optional("key_file", "Its private key, PEM.", path());
        let server_name = block.optional("server_name", "The name to verify; null: the host.", text());
        match (&cert_file, &key_file) {
            (Some(cert_file), Some(key_file)) => check_pair(block, cert_file, key_file),
            (Some(_), None) if !block.has("key_file") => block.problem("cert_file", "`cert_file` needs `key_file`"),
            (None, Some(_)) if !block.has("cert_file") => block.problem("key_file", "`key_file` needs `cert_file`"),
            _ => {}
        }
        if let Some(name) = &server_name
            && rustls_pki_types::ServerName::try_from(name.as_str()).is_err()
        {
            block.problem("server_name", format!("{} is not a host name or address", quote(name)));
        }
        Some(UpstreamTls { ca_file, cert_file, key_file, server_name })
    })
}

fn version_match() -> Kind<'static, Vec<(http::HeaderName, http::HeaderValue)>> {
    block("a mapping with `headers`", |block| {
        Some(block.key("headers", "Each of these with exactly this value.", headers(), "{}"))
    })
}
