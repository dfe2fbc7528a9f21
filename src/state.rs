//! State: the live half of the proxy, keyed by identity and untouched by reloads: endpoints, sessions, runs.

pub mod core;
pub mod dispatcher;
mod endpoints;
pub mod handover;
pub mod idempotency;
pub mod image;
pub mod pace;
pub mod queue;
pub mod rate;
pub mod recording;
pub mod remembered;
pub mod runs;
pub mod sessions;
pub mod status;
pub mod succession;
pub mod turn;
pub mod waiting;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::config;
use crate::error::Code;
use crate::ids::RunId;
use crate::metrics::VersionMetrics;

pub use crate::run::{Kind, RunOutcome};

/// What the data plane needs to reach and to label one endpoint. Immutable: a reload that changes any of it makes a new
/// one and retires this one; unchanged settings keep the same `Arc`.
pub struct Target {
    /// Unique in this process, never reused: the key of the connection pools.
    pub id: u64,
    pub service: Arc<str>,
    pub version: Arc<str>,
    /// `host:port` or `unix:/path`.
    pub address: Arc<str>,
    pub url: config::EndpointUrl,
    pub http: config::HttpVersion,
    pub host: config::HostPolicy,
    pub headers: config::HeaderEdits,
    pub pool: config::Pool,
    /// Set for https.
    pub tls: Option<ClientTls>,
    pub metrics: Arc<VersionMetrics>,
    /// Open connections of all workers.
    pub connections: AtomicUsize,
    /// Those that no exchange uses.
    pub idle_connections: AtomicUsize,
    /// Asks whoever holds an idle connection to close it, because `pool.max_connections` keeps another worker waiting.
    pub give_way: Notify,
    /// Told when a connection has closed, has become idle, or is not idle any more.
    pub connections_changed: Notify,
    /// Shared with the targets that replace this one: exchanges that began under older settings are cut, too.
    pub cut: Arc<Cut>,
    retired: AtomicBool,
    /// Its last exchange gave bad evidence.
    failing: AtomicBool,
}

/// Tells the exchanges with an endpoint that its drain has taken as long as it may, and that what is left is cut.
#[derive(Default)]
pub struct Cut {
    count: AtomicU32,
    /// One for each worker, as far as they reach: every request waits here for a moment, and what workers share goes to
    /// and fro between their cores.
    told: [Told; TOLD_PLACES],
}

/// Where a worker's exchanges wait, with its cache lines to itself.
#[derive(Default)]
#[repr(align(128))]
struct Told(Notify);

const TOLD_PLACES: usize = 4;

/// This thread's among the [`Cut::told`].
fn told_place() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static PLACE: usize = NEXT.fetch_add(1, Ordering::Relaxed) % TOLD_PLACES;
    }
    PLACE.with(|place| *place)
}

impl Cut {
    /// How often it came to that. An exchange compares with what it was when its endpoint was picked.
    pub fn count(&self) -> u32 {
        self.count.load(Ordering::Acquire)
    }

    /// Is woken by the next one.
    pub fn told(&self) -> Notified<'_> {
        self.told[told_place()].0.notified()
    }

    pub fn now(&self) {
        self.count.fetch_add(1, Ordering::Release);
        for told in &self.told {
            told.0.notify_waiters();
        }
    }
}

/// How to do TLS towards an endpoint.
#[derive(Clone)]
pub struct ClientTls {
    pub config: Arc<rustls::ClientConfig>,
    pub server_name: rustls_pki_types::ServerName<'static>,
}

/// The part of a [`Target`] that configuration decides.
pub struct TargetSettings {
    pub service: Arc<str>,
    pub version: Arc<str>,
    pub url: config::EndpointUrl,
    pub http: config::HttpVersion,
    pub host: config::HostPolicy,
    pub headers: config::HeaderEdits,
    pub pool: config::Pool,
    pub tls: Option<ClientTls>,
    pub metrics: Arc<VersionMetrics>,
}

impl Target {
    pub fn new(settings: TargetSettings) -> Target {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let TargetSettings { service, version, url, http, host, headers, pool, tls, metrics } = settings;
        Target {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            address: url.address().into(),
            service,
            version,
            url,
            http,
            host,
            headers,
            pool,
            tls,
            metrics,
            connections: AtomicUsize::new(0),
            idle_connections: AtomicUsize::new(0),
            give_way: Notify::new(),
            connections_changed: Notify::new(),
            cut: Arc::default(),
            retired: AtomicBool::new(false),
            failing: AtomicBool::new(false),
        }
    }

    /// The same endpoint under other settings.
    pub fn replaced(&self, settings: TargetSettings) -> Target {
        let failing = AtomicBool::new(self.failing.load(Ordering::Relaxed));
        Target { cut: Arc::clone(&self.cut), failing, ..Target::new(settings) }
    }

    /// Whether [`Evidence::Good`] would change anything; what is replaced can't tell.
    pub fn needs_good_evidence(&self) -> bool {
        self.failing.load(Ordering::Relaxed) || self.retired()
    }

    pub(crate) fn set_failing(&self, failing: bool) {
        self.failing.store(failing, Ordering::Relaxed);
    }

    /// No idle connection to it is worth keeping: it was removed, or its settings were replaced.
    pub fn retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    pub fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }
}

/// The value of `longhaul-affinity` and of the label `outcome` of `longhaul_affinity_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AffinityOutcome {
    New,
    Hit,
    Moved,
    Lost,
    None,
}

impl AffinityOutcome {
    pub const ALL: [AffinityOutcome; 5] = [
        AffinityOutcome::New,
        AffinityOutcome::Hit,
        AffinityOutcome::Moved,
        AffinityOutcome::Lost,
        AffinityOutcome::None,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            AffinityOutcome::New => "new",
            AffinityOutcome::Hit => "hit",
            AffinityOutcome::Moved => "moved",
            AffinityOutcome::Lost => "lost",
            AffinityOutcome::None => "none",
        }
    }
}

/// What an exchange showed of its endpoint: the evidence of passive health (`outlier`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// An answer below 500.
    Good,
    /// Connect failure, reset, malformed answer, time-out before the first byte, or an answer of 500 and above.
    Bad,
}

/// Why no endpoint was picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    NoEndpoint,
    QueueFull,
    /// The session's own endpoint is full, and no other will do.
    PinnedFull,
    SessionLost,
    /// The session can't be moved: its client has to make another one.
    SessionGone(AffinityOutcome),
    /// It waited as long as it may.
    QueueTimeout,
    /// Its session has this run, or another start took its place.
    Busy(RunId),
    /// Its principal has as many runs as it may.
    PrincipalLimit,
}

impl Refusal {
    pub fn code(self) -> Code {
        match self {
            Refusal::NoEndpoint => Code::NoEndpoint,
            Refusal::QueueFull | Refusal::PinnedFull => Code::QueueFull,
            Refusal::SessionLost | Refusal::SessionGone(_) => Code::SessionLost,
            Refusal::QueueTimeout => Code::QueueTimeout,
            Refusal::Busy(_) => Code::SessionBusy,
            Refusal::PrincipalLimit => Code::PrincipalLimit,
        }
    }

    /// What it means for the session.
    pub fn affinity(self) -> AffinityOutcome {
        match self {
            Refusal::SessionLost => AffinityOutcome::Lost,
            Refusal::SessionGone(affinity) => affinity,
            Refusal::PinnedFull | Refusal::Busy(_) => AffinityOutcome::Hit,
            Refusal::NoEndpoint | Refusal::QueueFull | Refusal::QueueTimeout | Refusal::PrincipalLimit => {
                AffinityOutcome::None
            }
        }
    }
}
