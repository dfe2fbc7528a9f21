//! Config: the checked form of the configuration file, as every other module reads it.
//!
//! A [`Config`] exists only if [`check`] found no problem, so readers never validate again.
//! Durations are [`Duration`], sizes are bytes, ratios are fractions between 0 and 1.

mod certificates;
mod file;
mod kubernetes;
mod not_yet;
mod pattern;
mod read;
mod rollout;
mod routes;
mod schema;
mod services;
mod sources;
mod substitute;
mod termination;
mod values;
mod yaml;

use std::fmt;
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use schema::schema;
pub use values::parse_duration;

/// A configuration is written by people; a larger file is surely not meant.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Reads and checks the file at `path`, with the environment of this process.
pub fn load(path: &Path) -> Result<Loaded, Problems> {
    let file_name = path.display().to_string();
    let fail = |what: String| {
        let message = format!("cannot read {file_name}: {what}");
        Err(Problems { file: file_name.clone(), list: vec![read::problem(yaml::Spot::START, "", message)] })
    };
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return fail("there is no such file; `-c FILE` names another".to_owned());
        }
        Err(error) => return fail(error.to_string()),
        Ok(length) if length as u64 > FILE_BYTES_MAX => return fail("it is larger than 16MiB".to_owned()),
        Ok(_) => {}
    }
    let Ok(text) = String::from_utf8(bytes) else { return fail("it is not UTF-8".to_owned()) };
    // Absolute, so that the files that it names can be watched wherever they are.
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let base = absolute.parent().unwrap_or(Path::new(""));
    check(&text, &file_name, base, &|name| std::env::var(name).ok())
}

/// Checks the text of a configuration file. Relative paths are relative to `base`; `environment` gives the value of `${VAR}`.
/// The files that it names (certificates, secrets) are read.
pub fn check(
    text: &str,
    file_name: &str,
    base: &Path,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<Loaded, Problems> {
    let file = file_name.to_owned();
    let mut root = match yaml::parse(text) {
        Ok(root) => root,
        Err(error) => return Err(Problems { file, list: vec![read::problem(error.spot, "", error.message)] }),
    };
    let mut context = read::Context::new(base);
    substitute::prepare(&mut root, "", environment, &mut context);
    let found = file::file().read(&mut context, &root, "");
    if let Some(message) = found.as_ref().and_then(|read| termination::warning(&read.value.shutdown, environment)) {
        let spot = root.child("shutdown").map_or(yaml::Spot::START, |node| node.spot);
        context.warning(spot, "shutdown", message);
    }
    context.problems.sort_by_key(|problem| (problem.line, problem.column));
    context.warnings.sort_by_key(|problem| (problem.line, problem.column));
    match found {
        Some(read) if context.problems.is_empty() => Ok(Loaded {
            config: read.value,
            warnings: context.warnings,
            sha256: Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect(),
            effective: read.shown,
            files: context.files,
        }),
        _ => Err(Problems { file, list: context.problems }),
    }
}

/// The whole configuration, valid and complete (every default filled in).
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub listeners: Vec<Listener>,
    pub admin: Admin,
    pub debug_from: Vec<IpNet>,
    pub log: Log,
    pub shutdown: Shutdown,
    pub state: State,
    pub kubernetes: Kubernetes,
    /// First match wins. Never empty: a file without routes gets one that matches everything.
    pub routes: Vec<Route>,
    pub services: Vec<Service>,
}

impl Config {
    /// Whether taking `other` instead would change nothing: the same values, those read from files included.
    /// (Certificates are not among these: whoever holds them reads them again when their files change.)
    pub fn same_meaning(&self, other: &Config) -> bool {
        self == other
    }
}

/// Where sessions, runs and rollouts are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// A restart forgets them.
    #[default]
    Memory,
    /// In this directory.
    File(PathBuf),
}

/// How longhaul and a cluster work together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kubernetes {
    /// `None`: the service account of the pod that longhaul runs in.
    pub kubeconfig: Option<PathBuf>,
    /// Set: `external.metrics.k8s.io/v1beta1` is served.
    pub external_metrics: Option<ExternalMetrics>,
    /// Set: a scaler of KEDA is served.
    pub keda: Option<Keda>,
    /// Pods with runs are marked as costly to delete.
    pub pod_deletion_cost: bool,
    pub leader_election: LeaderElection,
}

impl Kubernetes {
    /// Where the other replicas are, whichever block says it.
    pub fn replicas(&self) -> Option<&Replicas> {
        let of_metrics = self.external_metrics.as_ref().and_then(|metrics| metrics.replicas.as_ref());
        of_metrics.or(self.keda.as_ref().and_then(|keda| keda.replicas.as_ref()))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalMetrics {
    pub address: SocketAddr,
    pub certificate: CertificateFiles,
    /// `None`: callers are known by what ConfigMap kube-system/extension-apiserver-authentication says.
    pub client_ca_file: Option<PathBuf>,
    pub replicas: Option<Replicas>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keda {
    pub address: SocketAddr,
    pub replicas: Option<Replicas>,
}

/// The replicas of the proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replicas {
    /// A headless service, or whatever has all of their addresses.
    pub dns: String,
    /// Where each answers `/metrics`.
    pub port: u16,
}

/// The lease of whoever acts on the cluster for all replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaderElection {
    /// `None`: the pod's own.
    pub namespace: Option<String>,
    pub name: String,
}

impl Default for LeaderElection {
    fn default() -> LeaderElection {
        LeaderElection { namespace: None, name: "longhaul".to_owned() }
    }
}

/// Where a socket listens or connects.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    pub name: String,
    pub address: Address,
    pub tls: Option<ListenerTls>,
    pub trusted_proxies: Vec<IpNet>,
    /// Accept PROXY protocol v1 and v2 from `trusted_proxies`.
    pub proxy_protocol: bool,
    pub keepalive_timeout: Duration,
    pub limits: Limits,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ListenerTls {
    pub certificates: Vec<CertificateFiles>,
    pub client_ca_file: Option<PathBuf>,
    pub min_version: TlsVersion,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    V1_2,
    V1_3,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    pub max_connections: usize,
    pub header_timeout: Duration,
    pub max_header_bytes: usize,
    pub max_headers: usize,
    pub max_body_bytes: u64,
    pub max_streams_per_connection: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Admin {
    pub address: Address,
    pub token_file: Option<PathBuf>,
    pub probes: Option<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    pub level: LogLevel,
    pub format: LogFormat,
    pub access: bool,
    pub session_ids: SessionIds,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionIds {
    Hashed,
    Plain,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shutdown {
    /// How long everything is still served after SIGTERM, so that whoever routes to us can notice.
    pub delay: Duration,
    pub timeout: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// What metrics call it: its path pattern, else its hosts, else `default`.
    pub label: String,
    pub matches: RouteMatch,
    pub action: RouteAction,
    pub strip_prefix: Option<String>,
    pub request_headers: HeaderEdits,
    pub response_headers: HeaderEdits,
    pub timeouts: TimeoutOverrides,
}

/// All of the conditions must hold; an empty one holds always.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteMatch {
    /// Lower case, without port; `*.example.com` matches any depth below.
    pub hosts: Vec<String>,
    pub path: Option<PathPattern>,
    pub methods: Vec<Method>,
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RouteAction {
    /// Index into [`Config::services`].
    Service(usize),
    Redirect {
        scheme: Option<String>,
        host: Option<String>,
        path: Option<String>,
        status: StatusCode,
    },
    Respond {
        status: StatusCode,
        body: String,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(formatter),
            Address::Unix(path) => write!(formatter, "unix:{}", path.display()),
        }
    }
}

/// A path pattern: `*` is one segment, a final `/**` is the path itself and everything below it,
/// `{session}` (only in session keys) captures one segment. Read with [`str::parse`], compared with [`PathPattern::matches`].
///
/// Segments are what stands between slashes after the first one: `/a/` has two, of which the last is empty, `/` has one,
/// the empty one, and `/**` none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathPattern {
    pub segments: Vec<Segment>,
    /// Ends in `/**`.
    pub open: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    Literal(String),
    Any,
    Session,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeaderEdits {
    pub set: Vec<(HeaderName, HeaderValue)>,
    pub remove: Vec<HeaderName>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TimeoutOverrides {
    pub connect: Option<Duration>,
    pub first_byte: Option<Duration>,
    pub idle: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    pub name: String,
    pub agent_protocol: AgentProtocol,
    pub session: Session,
    pub runs: Runs,
    pub timeouts: Timeouts,
    /// How often one exchange may be tried, the first time included; at least 1.
    pub attempts: u32,
    pub health: Health,
    pub outlier: Outlier,
    pub balance: Balance,
    pub slow_start: Duration,
    pub pool: Pool,
    pub versions: Vec<Version>,
    pub shadow: Option<Shadow>,
    pub rollout: Option<Rollout>,
    pub drain_timeout: Duration,
}

/// The wire conventions by which sessions and runs are recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentProtocol {
    /// Found out for each exchange.
    Auto,
    Http,
    /// As the file names it.
    Named(&'static str),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    /// Places of the session key in order; first hit wins.
    pub key: Vec<KeySource>,
    pub cookie: Option<SessionCookie>,
    /// Values that tell principals apart: the pin of one is never used for another.
    pub scope: Vec<KeySource>,
    pub affinity: Affinity,
    pub idle_timeout: Duration,
    pub max_sessions: usize,
    pub when_draining: WhenDraining,
    pub when_lost: WhenLost,
}

#[derive(Clone, Debug, PartialEq)]
pub enum KeySource {
    Header(HeaderName),
    Cookie(String),
    Query(String),
    Path(PathPattern),
    /// A JSON pointer (RFC 6901) into the request body.
    Json(JsonPointer),
    ResponseHeader(HeaderName),
    ResponseJson(JsonPointer),
}

/// RFC 6901, unescaped, one token an element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonPointer(pub Vec<String>);

#[derive(Clone, PartialEq, Eq)]
pub struct SessionCookie {
    pub name: String,
    pub ttl: Duration,
    /// The secrets of `secret_file`, one a line: the first seals, all open. Empty: a random one for this process.
    pub secrets: Vec<String>,
}

impl fmt::Debug for SessionCookie {
    /// Without the secrets, which must not reach a log.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SessionCookie { name, ttl, secrets } = self;
        let shown = format_args!("{} of them", secrets.len());
        formatter.debug_struct("SessionCookie").field("name", name).field("ttl", ttl).field("secrets", &shown).finish()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affinity {
    Pin,
    Hash,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenDraining {
    MoveIdle,
    Stay,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenLost {
    Rebind,
    Reject,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Runs {
    /// Which requests are runs; `None`: POST, Upgrade, and GET that accepts `text/event-stream`.
    pub matches: Option<Vec<RunMatch>>,
    /// Outstanding runs an endpoint may have; an endpoint's own `max_runs` goes before it.
    pub max_per_endpoint: Option<u32>,
    /// Outstanding runs of one `session.scope` value.
    pub max_per_principal: Option<u32>,
    pub queue: Queue,
    pub double_texting: DoubleTexting,
    pub idempotency: Option<Idempotency>,
    pub max_duration: Option<Duration>,
    pub on_disconnect: OnDisconnect,
    /// A run with no carrier and no evidence for so long ends as unknown.
    pub unseen_timeout: Duration,
    /// An SSE comment after that much silence.
    pub heartbeat: Option<Duration>,
}

/// Where runs wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Places; 0: nobody waits.
    pub max: u32,
    pub timeout: Duration,
    /// How often a waiting client that accepts an event stream is told its position.
    pub progress: Option<Duration>,
    pub priority_header: Option<HeaderName>,
}

/// What a start does whose session has a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoubleTexting {
    pub policy: Policy,
    /// A request may choose another by `longhaul-double-texting`.
    pub allow_override: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    Allow,
    Reject,
    Enqueue,
    Interrupt,
    /// As interrupt, with a cancel that also undoes.
    Rollback,
}

impl Policy {
    pub const WORDS: [(&'static str, Policy); 5] = [
        ("allow", Policy::Allow),
        ("reject", Policy::Reject),
        ("enqueue", Policy::Enqueue),
        ("interrupt", Policy::Interrupt),
        ("rollback", Policy::Rollback),
    ];

    pub fn of_word(word: &[u8]) -> Option<Policy> {
        Policy::WORDS.iter().find(|(name, _)| name.as_bytes() == word).map(|(_, policy)| *policy)
    }
}

/// Starts with the same key are one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Idempotency {
    pub key: Vec<KeySource>,
    pub keep: Duration,
}

/// What becomes of a run whose client leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisconnect {
    /// What its protocol says.
    Protocol,
    Cancel,
    /// It goes on, read by nobody, for so long at most.
    Continue(Option<Duration>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct RunMatch {
    pub methods: Vec<Method>,
    pub path: Option<PathPattern>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    pub first_byte: Duration,
    pub idle: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    /// Path of the HTTP check; with `None` and `tcp: false` there is no active check.
    pub path: Option<String>,
    pub tcp: bool,
    pub port: Option<u16>,
    /// Inclusive ranges.
    pub expect_status: Vec<(u16, u16)>,
    /// As those; an endpoint that answers so works and takes no new sessions.
    pub draining_status: Vec<(u16, u16)>,
    pub interval: Duration,
    pub timeout: Duration,
    pub unhealthy_after: u32,
    pub healthy_after: u32,
    /// Where in the answer to the HTTP check the endpoint tells how many runs it has.
    pub load: Option<JsonPointer>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Outlier {
    /// 0 switches ejection off.
    pub consecutive_failures: u32,
    pub eject_for: Duration,
    /// Share of a version's endpoints that may be ejected at once; a lone endpoint never is.
    pub max_ejected: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    LeastOutstandingRuns,
    RoundRobin,
    Random,
}

/// Limits of upstream connections, per endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    pub max_idle: usize,
    pub idle_timeout: Duration,
    pub max_connections: Option<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Version {
    pub name: String,
    pub weight: u32,
    pub endpoints: Vec<Endpoint>,
    /// Where more of them are found.
    pub sources: Vec<EndpointSource>,
    pub http: HttpVersion,
    pub host: HostPolicy,
    pub tls: UpstreamTls,
    pub headers: HeaderEdits,
    /// Header conditions that send new sessions and keyless exchanges here, whatever the weights.
    pub matches: Vec<(HeaderName, HeaderValue)>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    pub url: EndpointUrl,
    pub weight: u32,
    pub max_runs: Option<u32>,
}

/// Endpoints that are found while the proxy runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSource {
    pub source: Source,
    /// Of each of them.
    pub weight: u32,
    pub max_runs: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    Dns(DnsSource),
    Kubernetes(KubernetesSource),
}

/// Every address of a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DnsSource {
    /// One that begins with `_` has SRV records (RFC 2782).
    pub name: String,
    /// `None` for SRV records, which have their own.
    pub port: Option<u16>,
    /// How long an answer holds at most.
    pub refresh: Duration,
}

impl DnsSource {
    pub fn is_srv(&self) -> bool {
        self.port.is_none()
    }
}

/// The pods behind a service, by its EndpointSlices.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KubernetesSource {
    /// `None`: that of the pod, or of the kubeconfig's context.
    pub namespace: Option<String>,
    pub service: String,
    pub port: PodPort,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PodPort {
    /// As the service names it.
    Name(String),
    /// Of the pods, whatever ports the service has.
    Number(u16),
}

impl fmt::Display for Source {
    /// How logs, status and metrics call it.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Dns(DnsSource { name, port: Some(port), .. }) => write!(formatter, "dns {name}:{port}"),
            Source::Dns(DnsSource { name, port: None, .. }) => write!(formatter, "dns {name}"),
            Source::Kubernetes(KubernetesSource { namespace, service, port }) => {
                let namespace = namespace.as_deref().map_or(String::new(), |namespace| format!("{namespace}/"));
                match port {
                    PodPort::Name(port) => write!(formatter, "kubernetes {namespace}{service}:{port}"),
                    PodPort::Number(port) => write!(formatter, "kubernetes {namespace}{service}:{port}"),
                }
            }
        }
    }
}

/// Where an endpoint is. Its identity within the service is [`EndpointUrl::identity`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EndpointUrl {
    Tcp { https: bool, host: EndpointHost, port: u16 },
    Unix(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EndpointHost {
    Ip(IpAddr),
    /// Resolved at each connect.
    Name(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpVersion {
    /// By ALPN on https, HTTP/1.1 on http.
    Auto,
    Http1,
    Http2,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPolicy {
    Preserve,
    Endpoint,
    Literal(String),
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct UpstreamTls {
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    pub server_name: Option<String>,
}

/// Copies of starts for another version, whose answers are thrown away.
#[derive(Clone, Debug, PartialEq)]
pub struct Shadow {
    /// Names one of [`Service::versions`].
    pub version: String,
    /// Share of the starts that are copied; above 0.
    pub share: f64,
}

/// How new sessions move from one version to another. Serialised where the state of a rollout is kept, to tell whether the
/// file was edited since.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// Names one of [`Service::versions`].
    pub from: String,
    /// Names another one.
    pub to: String,
    /// Never empty.
    pub steps: Vec<RolloutStep>,
    pub judge: Judge,
    pub on_bad: OnBad,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RolloutStep {
    /// The part of the new sessions of `from` and `to` together that starts at `to`.
    pub share: f64,
    /// How long the step lasts at least.
    pub hold: Duration,
}

/// What counts as bad. `None`: this is not looked at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judge {
    /// Runs that each of the two versions must have ended in a step, before it is judged or passed.
    pub min_runs: u64,
    /// Part of the runs that may fail, however many of `from` do.
    pub max_failed: Option<f64>,
    /// How many times as often as those of `from` the runs of `to` may fail. These three are above 0.
    pub failed_ratio: Option<f64>,
    /// How many times as large as that of `from` the 95th percentile of the time to the first event may be.
    pub first_event_p95_ratio: Option<f64>,
    /// The same of the duration of a run.
    pub duration_p95_ratio: Option<f64>,
    /// How certain a difference must be: at least 0.5 and below 1.
    pub confidence: f64,
}

/// What a rollout does where `to` is worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBad {
    /// New sessions go back to `from`; what runs at `to` ends there.
    Abort,
    /// The shares stay until a person decides.
    Pause,
}

impl EndpointUrl {
    /// `scheme://host:port` or `unix:/path`: what tells endpoints of one service apart.
    pub fn identity(&self) -> String {
        match self {
            EndpointUrl::Tcp { https, .. } => {
                format!("{}://{}", if *https { "https" } else { "http" }, self.address())
            }
            EndpointUrl::Unix(path) => format!("unix:{}", path.display()),
        }
    }

    /// Reads [`EndpointUrl::identity`]. `None`: it is something else.
    pub fn of_identity(identity: &str) -> Option<EndpointUrl> {
        match identity.strip_prefix("unix:") {
            Some(path) => Some(EndpointUrl::Unix(path.into())),
            None => values::parse_endpoint_url(identity).ok(),
        }
    }

    /// `host:port` (IPv6 in brackets) or `unix:/path`: the name in metrics, status and the admin API.
    pub fn address(&self) -> String {
        match self {
            EndpointUrl::Tcp { host: EndpointHost::Ip(ip), port, .. } => SocketAddr::new(*ip, *port).to_string(),
            EndpointUrl::Tcp { host: EndpointHost::Name(name), port, .. } => format!("{name}:{port}"),
            EndpointUrl::Unix(path) => format!("unix:{}", path.display()),
        }
    }
}

/// A configuration file that was found good.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    /// Nothing wrong, but worth a line in the log.
    pub warnings: Vec<Problem>,
    /// Of the file's text, in hex.
    pub sha256: String,
    /// The effective configuration in the file's own shape, defaults filled in, secrets redacted.
    pub effective: serde_json::Value,
    /// Every file that the configuration names (certificates, secrets, `${file:..}`): a change of one is a change too.
    pub files: Vec<PathBuf>,
}

/// One problem of a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// 1-based.
    pub line: usize,
    /// 1-based, in characters.
    pub column: usize,
    /// `services[0].versions[1].weight`
    pub path: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// All problems of a file, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems {
    pub file: String,
    pub list: Vec<Problem>,
}

impl fmt::Display for Problem {
    /// `LINE:COL: PATH: message`, without the file's name.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { line, column, path, message } = self;
        write!(formatter, "{line}:{column}: {path}: {message}")
    }
}

impl fmt::Display for Problems {
    /// One line for each, as compilers write them: `FILE:LINE:COL: PATH: message`.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.list.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(formatter, "{separator}{}:{problem}", self.file)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
