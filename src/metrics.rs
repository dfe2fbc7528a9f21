//! Metrics: every series of the contract; handles are resolved once and held by whoever records.
//!
//! What happens is counted here as it happens. What *is* (outstanding runs, endpoint states, weights) is never stored:
//! [`Metrics::render`] writes it from a [`Scrape`] of the live state, so that the series of a removed endpoint vanish
//! with it and no gauge can drift from the truth.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

use crate::error::Code;

/// The media type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The label `outcome` of `longhaul_runs_total`, in the order of [`VersionMetrics::runs`].
pub const RUN_OUTCOMES: [&str; 8] =
    ["completed", "failed", "cancelled", "interrupted", "truncated", "timed_out", "rejected", "unknown"];

/// The label `outcome` of `longhaul_affinity_total`, in the order of [`ServiceMetrics::affinity`].
pub const AFFINITY_OUTCOMES: [&str; 5] = ["new", "hit", "moved", "lost", "none"];

/// The label `state` of `longhaul_endpoint_state`.
pub const ENDPOINT_STATES: [&str; 5] = ["ready", "draining", "unhealthy", "ejected", "gone"];

/// The label `quantile` of `longhaul_drain_estimate_seconds`, in the order of [`ScrapedEndpoint::empty_in_seconds`].
pub const QUANTILES: [&str; 2] = ["0.5", "0.95"];

/// The registry and the families behind the handles.
pub struct Metrics {
    registry: Registry,
    runs: IntCounterVec,
    run_duration: HistogramVec,
    time_to_first_event: HistogramVec,
    queue_wait: HistogramVec,
    stream_events: IntCounterVec,
    stream_bytes: IntCounterVec,
    affinity: IntCounterVec,
    requests: IntCounterVec,
    access_log_dropped: IntCounter,
    handles: Mutex<Handles>,
}

/// The series of one version of a service; shared by every endpoint of it.
pub struct VersionMetrics {
    /// In the order of [`RUN_OUTCOMES`].
    pub runs: [IntCounter; 8],
    pub run_duration_seconds: Histogram,
    pub time_to_first_event_seconds: Histogram,
    pub stream_events: IntCounter,
    /// From the client towards the endpoint.
    pub bytes_request: IntCounter,
    pub bytes_response: IntCounter,
}

/// The series of a service that have no version.
pub struct ServiceMetrics {
    /// In the order of [`AFFINITY_OUTCOMES`].
    pub affinity: [IntCounter; 5],
    /// `longhaul_runs_total` with an empty version: runs that were never dispatched.
    pub rejected: IntCounter,
    pub queue_wait_seconds: Histogram,
}

/// The series of the file that keeps the state.
#[derive(Clone)]
pub struct StoreMetrics {
    pub commit_duration_seconds: Histogram,
    /// Keys that are being written.
    pub dirty_keys: IntGauge,
    pub keys_written: IntCounter,
    pub errors: IntCounter,
    /// 1 while what changes is written.
    pub keeping: IntGauge,
}

/// The series of one listener.
pub struct ListenerMetrics {
    /// Connections that are open now.
    pub connections: IntGauge,
}

/// `longhaul_requests_total` of one listener and route.
pub struct RouteMetrics {
    family: IntCounterVec,
    listener: String,
    route: String,
    /// By status class, then by code. Made at their first use: most combinations never occur.
    counters: [OnceLock<IntCounter>; STATUS_CLASSES.len() * CODES],
}

/// What is true at the moment of a scrape, taken from the live state by whoever renders.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scrape {
    pub generation: u64,
    pub draining: bool,
    pub reloads_succeeded: u64,
    pub reloads_failed: u64,
    /// The newest reload took effect or changed nothing; so before the first.
    pub last_reload_successful: bool,
    pub services: Vec<ScrapedService>,
    pub sources: Vec<ScrapedSource>,
}

/// A source of endpoints at the moment of a scrape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScrapedSource {
    pub service: String,
    pub version: String,
    pub source: String,
    /// In the order of [`READINESS`].
    pub endpoints: [u64; 3],
    /// Since the epoch; 0: never.
    pub last_success_seconds: f64,
    pub failures: u64,
    pub has_problem: bool,
}

/// The label `readiness` of `longhaul_discovery_endpoints`.
const READINESS: [&str; 3] = ["ready", "not_ready", "draining"];

/// A service at the moment of a scrape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScrapedService {
    pub name: String,
    pub queued_runs: u64,
    /// Outstanding on endpoints that stay, and queued.
    pub demand: u64,
    /// Queued and not pinned.
    pub placeable_demand: u64,
    /// Demand as a share of the capacity; `None` where that is unlimited.
    pub saturation: Option<f64>,
    pub versions: Vec<ScrapedVersion>,
}

/// A version at the moment of a scrape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScrapedVersion {
    pub name: String,
    pub effective_weight: f64,
    /// Given by weight since the version is known: sessions that began, runs that ended, and the seconds that these took.
    pub sessions_begun: u64,
    pub runs_ended: u64,
    pub run_seconds: f64,
    pub sessions: u64,
    pub outstanding_runs: u64,
    /// `None`: unlimited.
    pub run_capacity: Option<u64>,
    pub endpoints: Vec<ScrapedEndpoint>,
}

/// An endpoint at the moment of a scrape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScrapedEndpoint {
    pub address: String,
    /// One of [`ENDPOINT_STATES`].
    pub state: &'static str,
    pub outstanding_runs: u64,
    pub sessions: u64,
    /// Where it drains: in how many seconds it will be empty, by the probability of that ([`QUANTILES`]); those that can't
    /// be told are missing.
    pub empty_in_seconds: [Option<f64>; 2],
}

impl RouteMetrics {
    /// Counts one exchange at its end; `status` 0 means that no answer was begun.
    pub fn record(&self, status: u16, code: Option<Code>) {
        let class = match status / 100 {
            class @ 1..=5 => usize::from(class),
            _ => 0,
        };
        let code_index = code.map_or(0, |code| code as usize + 1);
        self.counters[class * CODES + code_index].get_or_init(|| self.counter(class, code)).inc();
    }

    fn counter(&self, class: usize, code: Option<Code>) -> IntCounter {
        let code = code.map_or("none", Code::as_str);
        self.family.with_label_values(&[&self.listener, &self.route, STATUS_CLASSES[class], code])
    }
}

impl ScrapedEndpoint {
    /// It takes no new sessions and will be gone.
    fn leaving(&self) -> bool {
        matches!(self.state, "draining" | "gone")
    }
}

impl Metrics {
    pub fn new() -> Arc<Metrics> {
        let registry = Registry::new();
        let counter = |name, help, labels: &[&str]| {
            let family = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid metric name");
            register(&registry, family)
        };
        let histogram = |name: &str, help: &str, labels: &[&str], buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            register(&registry, HistogramVec::new(options, labels).expect("a valid metric name"))
        };
        let single = |name, help| {
            let counter = IntCounter::new(name, help).expect("a valid metric name");
            register(&registry, counter)
        };
        Arc::new(Metrics {
            runs: counter(
                "longhaul_runs_total",
                "Runs that ended, by outcome; the version is empty where a run was never dispatched.",
                &["service", "version", "outcome"],
            ),
            run_duration: histogram(
                "longhaul_run_duration_seconds",
                "From the reservation of an endpoint to the end of the run.",
                &["service", "version"],
                RUN_BUCKETS,
            ),
            time_to_first_event: histogram(
                "longhaul_time_to_first_event_seconds",
                "From the request's head to the first event of a stream, or the first body byte of another answer.",
                &["service", "version"],
                WAIT_BUCKETS,
            ),
            queue_wait: histogram(
                "longhaul_queue_wait_seconds",
                "How long runs waited for an endpoint.",
                &["service"],
                WAIT_BUCKETS,
            ),
            stream_events: counter(
                "longhaul_stream_events_total",
                "Server-sent events relayed.",
                &["service", "version"],
            ),
            stream_bytes: counter(
                "longhaul_stream_bytes_total",
                "Body bytes relayed; request is towards the endpoint.",
                &["service", "version", "direction"],
            ),
            affinity: counter(
                "longhaul_affinity_total",
                "Exchanges by what became of their session's pin.",
                &["service", "outcome"],
            ),
            requests: counter(
                "longhaul_requests_total",
                "Exchanges that ended, by status class and by the proxy's own error code.",
                &["listener", "route", "status", "code"],
            ),
            access_log_dropped: single(
                "longhaul_access_log_dropped_total",
                "Access log lines dropped because whoever reads them is too slow.",
            ),
            handles: Mutex::default(),
            registry,
        })
    }

    /// The series of a version; the same labels give the same handle.
    pub fn version(&self, service: &str, version: &str) -> Arc<VersionMetrics> {
        let mut handles = self.handles();
        let key = (service.to_owned(), version.to_owned());
        if !handles.versions.contains_key(&key) {
            handles.versions.make_room(|(service, version)| self.forget_version(service, version));
        }
        let handle = handles.versions.entry(key, || {
            let labels = &[service, version];
            Arc::new(VersionMetrics {
                runs: RUN_OUTCOMES.map(|outcome| self.runs.with_label_values(&[service, version, outcome])),
                run_duration_seconds: self.run_duration.with_label_values(labels),
                time_to_first_event_seconds: self.time_to_first_event.with_label_values(labels),
                stream_events: self.stream_events.with_label_values(labels),
                bytes_request: self.stream_bytes.with_label_values(&[service, version, "request"]),
                bytes_response: self.stream_bytes.with_label_values(&[service, version, "response"]),
            })
        });
        Arc::clone(handle)
    }

    /// The series of a service; the same label gives the same handle.
    pub fn service(&self, service: &str) -> Arc<ServiceMetrics> {
        let mut handles = self.handles();
        if !handles.services.contains_key(service) {
            handles.services.make_room(|service| self.forget_service(service));
        }
        let handle = handles.services.entry(service.to_owned(), || {
            Arc::new(ServiceMetrics {
                affinity: AFFINITY_OUTCOMES.map(|outcome| self.affinity.with_label_values(&[service, outcome])),
                rejected: self.runs.with_label_values(&[service, "", "rejected"]),
                queue_wait_seconds: self.queue_wait.with_label_values(&[service]),
            })
        });
        Arc::clone(handle)
    }

    /// The series of a listener; the same label gives the same handle. They vanish once nobody holds the handle.
    pub fn listener(&self, listener: &str) -> Arc<ListenerMetrics> {
        let mut handles = self.handles();
        let handle = handles.listeners.entry(listener.to_owned()).or_insert_with(|| {
            let connections = IntGauge::new("longhaul_connections", "connections").expect("a valid metric name");
            Arc::new(ListenerMetrics { connections })
        });
        Arc::clone(handle)
    }

    /// The series of a route on a listener; the same labels give the same handle.
    pub fn route(&self, listener: &str, route: &str) -> Arc<RouteMetrics> {
        let mut handles = self.handles();
        let key = (listener.to_owned(), route.to_owned());
        if !handles.routes.contains_key(&key) {
            handles.routes.make_room(|(listener, route)| self.forget_route(listener, route));
        }
        let handle = handles.routes.entry(key, || {
            Arc::new(RouteMetrics {
                family: self.requests.clone(),
                listener: listener.to_owned(),
                route: route.to_owned(),
                counters: [const { OnceLock::new() }; STATUS_CLASSES.len() * CODES],
            })
        });
        Arc::clone(handle)
    }

    /// The series of the state's file; to be asked for once, where there is one.
    pub fn store(&self) -> StoreMetrics {
        let options = HistogramOpts::new(
            "longhaul_store_commit_duration_seconds",
            "Transactions of the state's file, until they are on the disk.",
        );
        let store = StoreMetrics {
            commit_duration_seconds: Histogram::with_opts(options.buckets(COMMIT_BUCKETS.to_vec()))
                .expect("a valid metric"),
            dirty_keys: IntGauge::new("longhaul_store_dirty_keys", "Keys that are being written to the state's file.")
                .expect("a valid metric"),
            keys_written: IntCounter::new("longhaul_store_keys_written_total", "Keys written to the state's file.")
                .expect("a valid metric"),
            errors: IntCounter::new("longhaul_store_errors_total", "Transactions of the state's file that failed.")
                .expect("a valid metric"),
            keeping: IntGauge::new("longhaul_store_keeping", "1 while what changes is written to the state's file.")
                .expect("a valid metric"),
        };
        let collectors: [Box<dyn Collector>; 5] = [
            Box::new(store.commit_duration_seconds.clone()),
            Box::new(store.dirty_keys.clone()),
            Box::new(store.keys_written.clone()),
            Box::new(store.errors.clone()),
            Box::new(store.keeping.clone()),
        ];
        for collector in collectors {
            // A second store of this process counts in series that nobody sees.
            let _ = self.registry.register(collector);
        }
        store
    }

    /// `longhaul_access_log_dropped_total`.
    pub fn access_log_dropped(&self) -> IntCounter {
        self.access_log_dropped.clone()
    }

    /// All series in the text format of Prometheus ([`CONTENT_TYPE`]): what was counted, and `scrape`.
    pub fn render(&self, scrape: &Scrape) -> String {
        let mut text = String::with_capacity(16 << 10);
        // Fails only for a family without series (which `gather` leaves out) or a failing writer; a String never fails.
        let encoded = TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text);
        debug_assert!(encoded.is_ok(), "{encoded:?}");
        self.connections().write(&mut text);
        for family in families(scrape) {
            family.write(&mut text);
        }
        text
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    fn connections(&self) -> Family {
        let mut family = Family::new("longhaul_connections", "Open client connections.", &["listener"]);
        let mut handles = self.handles();
        // The map's own is the last handle: the listener was removed and its last connection has ended.
        handles.listeners.retain(|_, handle| Arc::strong_count(handle) > 1 || handle.connections.get() != 0);
        for (listener, handle) in &handles.listeners {
            family.add(&[listener], handle.connections.get() as f64);
        }
        family
    }

    // Removing a series that is not there is an error, and no harm.

    fn forget_version(&self, service: &str, version: &str) {
        for outcome in RUN_OUTCOMES {
            let _ = self.runs.remove_label_values(&[service, version, outcome]);
        }
        for direction in ["request", "response"] {
            let _ = self.stream_bytes.remove_label_values(&[service, version, direction]);
        }
        let _ = self.stream_events.remove_label_values(&[service, version]);
        let _ = self.run_duration.remove_label_values(&[service, version]);
        let _ = self.time_to_first_event.remove_label_values(&[service, version]);
    }

    fn forget_service(&self, service: &str) {
        for outcome in AFFINITY_OUTCOMES {
            let _ = self.affinity.remove_label_values(&[service, outcome]);
        }
        let _ = self.runs.remove_label_values(&[service, "", "rejected"]);
        let _ = self.queue_wait.remove_label_values(&[service]);
    }

    fn forget_route(&self, listener: &str, route: &str) {
        for class in STATUS_CLASSES {
            for code in Code::ALL.map(Code::as_str).into_iter().chain(["none"]) {
                let _ = self.requests.remove_label_values(&[listener, route, class, code]);
            }
        }
    }

    fn handles(&self) -> MutexGuard<'_, Handles> {
        // The maps are never left half changed, so a panic elsewhere does not spoil them.
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names that left the configuration keep their counters, so that no last increment is missed; but of each kind only so
/// many, since a process may live through any number of rollouts with a new version name each.
const FORMER_MAX: usize = 100;

/// Every handle that was asked for.
#[derive(Default)]
struct Handles {
    versions: Known<(String, String), VersionMetrics>,
    services: Known<String, ServiceMetrics>,
    listeners: HashMap<String, Arc<ListenerMetrics>>,
    routes: Known<(String, String), RouteMetrics>,
}

/// Handles in the order in which they were first asked for.
struct Known<K, T> {
    handles: HashMap<K, (u64, Arc<T>)>,
    asked: u64,
}

impl<K, T> Default for Known<K, T> {
    fn default() -> Known<K, T> {
        Known { handles: HashMap::new(), asked: 0 }
    }
}

impl<K: Clone + Eq + Hash, T> Known<K, T> {
    fn contains_key<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.handles.contains_key(key)
    }

    fn entry(&mut self, key: K, make: impl FnOnce() -> Arc<T>) -> &Arc<T> {
        self.asked += 1;
        let asked = self.asked;
        &self.handles.entry(key).or_insert_with(|| (asked, make())).1
    }

    /// Forgets the oldest of those that nobody else holds, down to one less than [`FORMER_MAX`].
    fn make_room(&mut self, forget: impl Fn(&K)) {
        let former = self.handles.iter().filter(|(_, (_, handle))| Arc::strong_count(handle) == 1);
        let mut former: Vec<(u64, K)> = former.map(|(key, (asked, _))| (*asked, key.clone())).collect();
        let surplus = (former.len() + 1).saturating_sub(FORMER_MAX);
        former.sort_by_key(|(asked, _)| *asked);
        for (_, key) in former.into_iter().take(surplus) {
            forget(&key);
            self.handles.remove(&key);
        }
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, family: C) -> C {
    registry.register(Box::new(family.clone())).expect("every family has a name of its own");
    family
}

/// The gauges of the live state, in the order of the contract.
fn families(scrape: &Scrape) -> Vec<Family> {
    let mut outstanding = Family::new(
        "longhaul_outstanding_runs",
        "Runs that hold a place on an endpoint, from its reservation until the run is known to have ended.",
        &["service", "version"],
    );
    let mut endpoint_outstanding = Family::new(
        "longhaul_endpoint_outstanding_runs",
        "Outstanding runs of one endpoint.",
        &["service", "version", "endpoint"],
    );
    let mut queued = Family::new("longhaul_queued_runs", "Runs that wait for an endpoint.", &["service"]);
    let mut capacity = Family::new(
        "longhaul_run_capacity",
        "Runs that may be outstanding at once; absent where unlimited.",
        &["service", "version"],
    );
    let mut saturation = Family::new(
        "longhaul_saturation",
        "Demand as a share of the capacity; absent where that is unlimited.",
        &["service"],
    );
    let mut demand = Family::new(
        "longhaul_run_demand",
        "The number to scale on: runs outstanding on endpoints that are not draining, and queued runs.",
        &["service"],
    );
    let mut placeable = Family::new(
        "longhaul_placeable_demand",
        "Queued runs that no pin ties to an endpoint: what another pod could take now.",
        &["service"],
    );
    let mut sessions = Family::new("longhaul_sessions", "Sessions that are pinned.", &["service", "version"]);
    let mut state = Family::new(
        "longhaul_endpoint_state",
        "1 for the state that an endpoint is in, 0 for the others.",
        &["service", "version", "endpoint", "state"],
    );
    let mut remaining = Family::new(
        "longhaul_drain_remaining_runs",
        "Outstanding runs that a draining endpoint still has to finish.",
        &["service", "endpoint"],
    );
    let mut remaining_sessions = Family::new(
        "longhaul_drain_remaining_sessions",
        "Sessions that are pinned to a draining endpoint.",
        &["service", "endpoint"],
    );
    let mut estimate = Family::new(
        "longhaul_drain_estimate_seconds",
        "In how many seconds a draining endpoint will have no run any more, with the probability of the quantile.",
        &["service", "endpoint", "quantile"],
    );
    let mut weight = Family::new("longhaul_version_weight", "The version's effective weight.", &["service", "version"]);
    let mut sessions_begun = Family::new(
        "longhaul_version_sessions_total",
        "Sessions that began at the version by weight, not by a match.",
        &["service", "version"],
    );
    let mut runs_ended = Family::new(
        "longhaul_version_runs_total",
        "Runs that ended, but for those of sessions that a match sent.",
        &["service", "version"],
    );
    let mut run_seconds = Family::new(
        "longhaul_version_run_seconds_total",
        "How long the runs of longhaul_version_runs_total took together.",
        &["service", "version"],
    );
    for family in [&mut sessions_begun, &mut runs_ended, &mut run_seconds] {
        family.kind = "counter";
    }
    let source = &["service", "version", "source"];
    let mut discovered = Family::new(
        "longhaul_discovery_endpoints",
        "Endpoints that a source lists, by what it says of them.",
        &["service", "version", "source", "readiness"],
    );
    let mut discovery_success = Family::new(
        "longhaul_discovery_last_success_timestamp_seconds",
        "When a source last said what there is, since the epoch; 0 if never.",
        source,
    );
    let mut discovery_problem = Family::new(
        "longhaul_discovery_problem",
        "1 while something is wrong with a source; what it knows stays in use.",
        source,
    );
    let mut discovery_failures =
        Family::new("longhaul_discovery_failures_total", "Times that a source was asked in vain.", source);
    discovery_failures.kind = "counter";
    let mut generation = Family::new("longhaul_config_generation", "Counts the configurations that took effect.", &[]);
    let mut last_reload = Family::new(
        "longhaul_config_last_reload_successful",
        "1 if the newest reload took effect or changed nothing, 0 if it was refused.",
        &[],
    );
    let mut reloads =
        Family::new("longhaul_config_reloads_total", "Reloads of the configuration, by result.", &["result"]);
    reloads.kind = "counter";
    let mut draining = Family::new("longhaul_draining", "1 while the proxy itself drains.", &[]);
    let mut build = Family::new("longhaul_build_info", "Always 1; what is running.", &["version", "commit"]);

    generation.add(&[], scrape.generation as f64);
    last_reload.add(&[], f64::from(u8::from(scrape.last_reload_successful)));
    reloads.add(&["success"], scrape.reloads_succeeded as f64);
    reloads.add(&["failure"], scrape.reloads_failed as f64);
    draining.add(&[], f64::from(u8::from(scrape.draining)));
    build.add(&[env!("CARGO_PKG_VERSION"), option_env!("LONGHAUL_COMMIT").unwrap_or("unknown")], 1.0);
    for source in &scrape.sources {
        let labels = [source.service.as_str(), source.version.as_str(), source.source.as_str()];
        let [service, version, name] = labels;
        for (readiness, count) in READINESS.into_iter().zip(source.endpoints) {
            discovered.add(&[service, version, name, readiness], count as f64);
        }
        discovery_success.set(&labels, source.last_success_seconds);
        discovery_problem.set(&labels, f64::from(u8::from(source.has_problem)));
        discovery_failures.add(&labels, source.failures as f64);
    }
    for service in &scrape.services {
        let name = service.name.as_str();
        queued.add(&[name], service.queued_runs as f64);
        demand.add(&[name], service.demand as f64);
        placeable.add(&[name], service.placeable_demand as f64);
        if let Some(value) = service.saturation {
            saturation.add(&[name], value);
        }
        for version in &service.versions {
            let labels = &[name, version.name.as_str()];
            outstanding.add(labels, version.outstanding_runs as f64);
            sessions.add(labels, version.sessions as f64);
            weight.add(labels, version.effective_weight);
            sessions_begun.add(labels, version.sessions_begun as f64);
            runs_ended.add(labels, version.runs_ended as f64);
            run_seconds.add(labels, version.run_seconds);
            if let Some(value) = version.run_capacity {
                capacity.add(labels, value as f64);
            }
            for endpoint in &version.endpoints {
                let labels = [name, version.name.as_str(), endpoint.address.as_str()];
                endpoint_outstanding.add(&labels, endpoint.outstanding_runs as f64);
                for one in ENDPOINT_STATES {
                    let [service, version, address] = labels;
                    state.set(&[service, version, address, one], f64::from(u8::from(one == endpoint.state)));
                }
                if endpoint.leaving() {
                    remaining.add(&[name, &endpoint.address], endpoint.outstanding_runs as f64);
                    remaining_sessions.add(&[name, &endpoint.address], endpoint.sessions as f64);
                    for (quantile, seconds) in QUANTILES.into_iter().zip(endpoint.empty_in_seconds) {
                        if let Some(seconds) = seconds {
                            estimate.set(&[name, &endpoint.address, quantile], seconds);
                        }
                    }
                }
            }
        }
    }
    vec![
        outstanding,
        endpoint_outstanding,
        queued,
        capacity,
        saturation,
        demand,
        placeable,
        sessions,
        state,
        remaining,
        remaining_sessions,
        estimate,
        weight,
        sessions_begun,
        runs_ended,
        run_seconds,
        discovered,
        discovery_success,
        discovery_problem,
        discovery_failures,
        generation,
        last_reload,
        reloads,
        draining,
        build,
    ]
}

/// One family of one scrape. Series with equal labels are one series: two endpoints of a service may share
/// `host:port` (http and https), and an endpoint that moved to another version exists twice while it drains.
struct Family {
    name: &'static str,
    help: &'static str,
    kind: &'static str,
    labels: &'static [&'static str],
    series: BTreeMap<String, f64>,
}

impl Family {
    fn new(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Family {
        Family { name, help, kind: "gauge", labels, series: BTreeMap::new() }
    }

    /// Adds to the series with these label values.
    fn add(&mut self, values: &[&str], value: f64) {
        *self.at(values) += value;
    }

    /// Sets a series of which equal ones are not to be added up: the largest stays.
    fn set(&mut self, values: &[&str], value: f64) {
        let series = self.at(values);
        *series = series.max(value);
    }

    fn at(&mut self, values: &[&str]) -> &mut f64 {
        debug_assert_eq!(self.labels.len(), values.len());
        let mut labels = String::new();
        for (index, (name, value)) in self.labels.iter().zip(values).enumerate() {
            labels.push(if index == 0 { '{' } else { ',' });
            labels.push_str(name);
            labels.push_str("=\"");
            escape_label(value, &mut labels);
            labels.push('"');
        }
        if !values.is_empty() {
            labels.push('}');
        }
        self.series.entry(labels).or_default()
    }

    fn write(&self, text: &mut String) {
        if self.series.is_empty() {
            return;
        }
        let Family { name, help, kind, .. } = self;
        // Writing to a String can't fail.
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (labels, value) in &self.series {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    }
}

/// Escapes a label value as the text format 0.0.4 wants it.
fn escape_label(value: &str, text: &mut String) {
    for character in value.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            other => text.push(other),
        }
    }
}

/// The label `status` of `longhaul_requests_total`.
const STATUS_CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// Every code, and none.
const CODES: usize = Code::ALL.len() + 1;

/// Seconds. Agents answer in a blink or work for an hour.
const RUN_BUCKETS: &[f64] =
    &[0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];

/// Seconds.
const COMMIT_BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Seconds.
const WAIT_BUCKETS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn endpoint(address: &str, state: &'static str, outstanding_runs: u64) -> ScrapedEndpoint {
        let empty_in_seconds = [Some(2.5), None];
        ScrapedEndpoint { address: address.to_owned(), state, outstanding_runs, sessions: 3, empty_in_seconds }
    }

    fn support(endpoints: Vec<ScrapedEndpoint>, run_capacity: Option<u64>) -> Scrape {
        let version = ScrapedVersion {
            name: "stable".to_owned(),
            effective_weight: 95.0,
            sessions_begun: 9,
            runs_ended: 4,
            run_seconds: 2.5,
            sessions: 7,
            outstanding_runs: endpoints.iter().map(|endpoint| endpoint.outstanding_runs).sum(),
            run_capacity,
            endpoints,
        };
        let service = ScrapedService {
            name: "support".to_owned(),
            queued_runs: 3,
            demand: 15,
            placeable_demand: 2,
            saturation: run_capacity.map(|capacity| 15.0 / capacity as f64),
            versions: vec![version],
        };
        Scrape { generation: 4, reloads_failed: 1, services: vec![service], ..Scrape::default() }
    }

    #[test]
    fn names_that_left_the_configuration_are_forgotten_in_the_end() {
        let metrics = Metrics::new();
        let kept = metrics.version("support", "kept");
        kept.runs[0].inc();
        for number in 0..1_000 {
            metrics.version("support", &format!("v{number}")).runs[0].inc();
            metrics.route("public", &format!("/{number}")).record(200, None);
            metrics.service(&format!("s{number}")).affinity[0].inc();
        }
        let text = metrics.render(&Scrape::default());
        let count =
            |name: &str, more: &str| text.lines().filter(|line| line.starts_with(name) && line.contains(more)).count();
        assert_eq!(count("longhaul_runs_total{", "completed"), FORMER_MAX + 1);
        assert_eq!(count("longhaul_run_duration_seconds_count{", ""), FORMER_MAX + 1);
        assert_eq!(count("longhaul_requests_total{", ""), FORMER_MAX);
        assert_eq!(count("longhaul_affinity_total{", "new"), FORMER_MAX);
        assert_eq!(count("longhaul_runs_total{", "\"kept\""), 8, "it is still held");
        assert_eq!(count("longhaul_runs_total{", "\"v999\""), 8, "one that left just now is still told");
    }

    /// Reads the exposition strictly: HELP and TYPE once before the samples of a family, families in one piece, no
    /// series twice. Returns the samples.
    fn parse(text: &str) -> BTreeMap<String, f64> {
        let mut samples = BTreeMap::new();
        let mut families = BTreeSet::new();
        let (mut family, mut kind) = (String::new(), String::new());
        assert!(text.ends_with('\n'));
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                family = rest.split(' ').next().unwrap().to_owned();
                assert!(families.insert(family.clone()), "{family} has HELP twice");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, one) = rest.split_once(' ').unwrap();
                assert_eq!(name, family, "TYPE follows its HELP");
                kind = one.to_owned();
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let name = series.split('{').next().unwrap();
                let base = match kind.as_str() {
                    "histogram" => {
                        let suffixes = ["_bucket", "_sum", "_count"];
                        suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap()
                    }
                    "counter" | "gauge" => name,
                    other => panic!("unknown type {other}"),
                };
                assert_eq!(base, family, "a sample stands under its own family");
                assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "{series} twice");
            }
        }
        samples
    }

    #[test]
    fn the_same_labels_give_the_same_handle() {
        let metrics = Metrics::new();
        assert!(Arc::ptr_eq(&metrics.version("a", "v"), &metrics.version("a", "v")));
        assert!(!Arc::ptr_eq(&metrics.version("a", "v"), &metrics.version("a", "w")));
        assert!(Arc::ptr_eq(&metrics.service("a"), &metrics.service("a")));
        assert!(Arc::ptr_eq(&metrics.route("public", "/x"), &metrics.route("public", "/x")));
        let held = metrics.listener("public");
        assert!(Arc::ptr_eq(&held, &metrics.listener("public")));
    }

    #[test]
    fn codes_are_numbered_in_the_order_of_all() {
        for (index, code) in Code::ALL.into_iter().enumerate() {
            assert_eq!(code as usize, index);
        }
    }

    #[test]
    fn requests_are_counted_by_class_and_code() {
        let metrics = Metrics::new();
        let route = metrics.route("public", "/support/**");
        route.record(200, None);
        route.record(204, None);
        route.record(0, None);
        route.record(999, None);
        route.record(503, Some(Code::Draining));
        for code in Code::ALL {
            route.record(code.status().as_u16(), Some(code));
        }
        let samples = parse(&metrics.render(&Scrape::default()));
        let count = |status: &str, code: &str| {
            samples[&format!(
                "longhaul_requests_total{{code=\"{code}\",listener=\"public\",route=\"/support/**\",status=\"{status}\"}}"
            )]
        };
        assert_eq!(count("2xx", "none"), 2.0);
        assert_eq!(count("none", "none"), 2.0);
        assert_eq!(count("5xx", "draining"), 2.0);
        assert_eq!(count("4xx", "no_route"), 1.0);
        assert_eq!(samples.keys().filter(|series| series.starts_with("longhaul_requests_total")).count(), 21);
    }

    #[test]
    fn the_exposition_is_valid_and_complete() {
        let metrics = Metrics::new();
        metrics.version("support", "stable").runs[0].inc();
        metrics.version("support", "stable").run_duration_seconds.observe(0.2);
        metrics.service("support").affinity[1].inc();
        metrics.service("support").rejected.inc();
        let listener = metrics.listener("public");
        listener.connections.set(12);
        metrics.route("public", "default").record(200, None);
        let text = metrics.render(&support(vec![endpoint("10.0.0.11:8000", "ready", 12)], Some(40)));
        let samples = parse(&text);
        for (series, value) in [
            ("longhaul_outstanding_runs{service=\"support\",version=\"stable\"}", 12.0),
            (
                "longhaul_endpoint_outstanding_runs{service=\"support\",version=\"stable\",endpoint=\"10.0.0.11:8000\"}",
                12.0,
            ),
            ("longhaul_queued_runs{service=\"support\"}", 3.0),
            ("longhaul_run_capacity{service=\"support\",version=\"stable\"}", 40.0),
            ("longhaul_saturation{service=\"support\"}", 0.375),
            ("longhaul_run_demand{service=\"support\"}", 15.0),
            ("longhaul_placeable_demand{service=\"support\"}", 2.0),
            ("longhaul_sessions{service=\"support\",version=\"stable\"}", 7.0),
            ("longhaul_version_weight{service=\"support\",version=\"stable\"}", 95.0),
            ("longhaul_version_sessions_total{service=\"support\",version=\"stable\"}", 9.0),
            ("longhaul_version_runs_total{service=\"support\",version=\"stable\"}", 4.0),
            ("longhaul_version_run_seconds_total{service=\"support\",version=\"stable\"}", 2.5),
            ("longhaul_config_generation", 4.0),
            ("longhaul_config_last_reload_successful", 0.0),
            ("longhaul_config_reloads_total{result=\"failure\"}", 1.0),
            ("longhaul_config_reloads_total{result=\"success\"}", 0.0),
            ("longhaul_draining", 0.0),
            ("longhaul_connections{listener=\"public\"}", 12.0),
            ("longhaul_runs_total{outcome=\"completed\",service=\"support\",version=\"stable\"}", 1.0),
            ("longhaul_runs_total{outcome=\"rejected\",service=\"support\",version=\"\"}", 1.0),
            ("longhaul_affinity_total{outcome=\"hit\",service=\"support\"}", 1.0),
            ("longhaul_run_duration_seconds_count{service=\"support\",version=\"stable\"}", 1.0),
            ("longhaul_time_to_first_event_seconds_count{service=\"support\",version=\"stable\"}", 0.0),
            ("longhaul_queue_wait_seconds_count{service=\"support\"}", 0.0),
            ("longhaul_stream_events_total{service=\"support\",version=\"stable\"}", 0.0),
            ("longhaul_stream_bytes_total{direction=\"request\",service=\"support\",version=\"stable\"}", 0.0),
        ] {
            assert_eq!(samples.get(series), Some(&value), "{series}\n{text}");
        }
        assert!(text.contains("longhaul_build_info{version=\"0."));
    }

    #[test]
    fn unlimited_capacity_has_no_series() {
        let metrics = Metrics::new();
        let text = metrics.render(&support(vec![endpoint("a:1", "ready", 1)], None));
        assert!(!text.contains("longhaul_run_capacity") && !text.contains("longhaul_saturation"), "{text}");
    }

    #[test]
    fn draining_endpoints_show_what_remains() {
        let metrics = Metrics::new();
        let scrape = support(vec![endpoint("a:1", "ready", 2), endpoint("b:1", "draining", 5)], None);
        let samples = parse(&metrics.render(&scrape));
        assert_eq!(samples["longhaul_drain_remaining_runs{service=\"support\",endpoint=\"b:1\"}"], 5.0);
        assert_eq!(samples["longhaul_drain_remaining_sessions{service=\"support\",endpoint=\"b:1\"}"], 3.0);
        let estimate = |address: &str, quantile: &str| {
            samples.get(&format!(
                "longhaul_drain_estimate_seconds{{service=\"support\",endpoint=\"{address}\",quantile=\"{quantile}\"}}"
            ))
        };
        assert_eq!((estimate("b:1", "0.5"), estimate("b:1", "0.95")), (Some(&2.5), None));
        assert_eq!(estimate("a:1", "0.5"), None);
        assert!(!samples.contains_key("longhaul_drain_remaining_runs{service=\"support\",endpoint=\"a:1\"}"));
        let state = |address: &str, state: &str| {
            samples[&format!(
                "longhaul_endpoint_state{{service=\"support\",version=\"stable\",endpoint=\"{address}\",state=\"{state}\"}}"
            )]
        };
        assert_eq!((state("a:1", "ready"), state("a:1", "draining")), (1.0, 0.0));
        assert_eq!((state("b:1", "ready"), state("b:1", "draining")), (0.0, 1.0));
    }

    #[test]
    fn endpoints_that_share_an_address_are_one_valid_series() {
        let metrics = Metrics::new();
        let scrape = support(vec![endpoint("a:1", "ready", 2), endpoint("a:1", "gone", 5)], None);
        let samples = parse(&metrics.render(&scrape));
        let series = "longhaul_endpoint_outstanding_runs{service=\"support\",version=\"stable\",endpoint=\"a:1\"}";
        assert_eq!(samples[series], 7.0);
    }

    #[test]
    fn series_of_removed_endpoints_and_listeners_vanish() {
        let metrics = Metrics::new();
        let listener = metrics.listener("old");
        let text = metrics.render(&support(vec![endpoint("b:1", "ready", 1)], None));
        assert!(text.contains("b:1") && text.contains("listener=\"old\""), "{text}");
        drop(listener);
        let text = metrics.render(&support(vec![endpoint("c:1", "ready", 1)], None));
        assert!(!text.contains("b:1") && !text.contains("listener=\"old\""), "{text}");
    }

    #[test]
    fn labels_are_escaped() {
        let metrics = Metrics::new();
        let listener = metrics.listener("a\"b\\c\nd");
        listener.connections.set(1);
        let text = metrics.render(&Scrape::default());
        assert!(text.contains("longhaul_connections{listener=\"a\\\"b\\\\c\\nd\"} 1\n"), "{text}");
    }
}
