//! State: the live half of the proxy, keyed by identity and untouched by reloads: endpoints, sessions, runs.

pub mod changes;
pub mod core;
pub mod discovery;
pub mod dispatcher;
mod endpoints;
pub mod handover;
pub mod idempotency;
pub mod image;
mod ordered;
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
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::config;
use crate::error::Code;
use crate::ids::RunId;
use crate::metrics::VersionMetrics;
use crate::per_thread::PerThread;

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
    /// What tells it from another at the same address: a pod's UID.
    pub uid: Option<Arc<str>>,
    pub http: config::HttpVersion,
    pub host: config::HostPolicy,
    pub headers: config::HeaderEdits,
    pub pool: config::Pool,
    /// Set for https.
    pub tls: Option<ClientTls>,
    pub metrics: Arc<VersionMetrics>,
    /// Open connections of all workers.
    pub connections: AtomicUsize,
    /// Those that no exchange uses, and the places among them that workers keep for some that one does.
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

/// Tells the exchanges with an endpoint that its drain has taken as long as it may, and that what is left is cut: one after
/// another, so that their clients do not return at once.
#[derive(Default)]
pub struct Cut {
    /// How often it came to that (the high half), and how far the last time has gone: each exchange has a place of its own
    /// between 1 and `u32::MAX`, and is cut when the low half has come so far.
    wave: AtomicU64,
    /// Every request waits here for a moment.
    told: PerThread<Notify, 4>,
}

impl Cut {
    /// How often it came to that. An exchange compares with what it was when its endpoint was picked.
    pub fn count(&self) -> u32 {
        self.wave().0
    }

    /// [`Cut::count`], and how far the last time has gone.
    pub fn wave(&self) -> (u32, u32) {
        let wave = self.wave.load(Ordering::Acquire);
        ((wave >> 32) as u32, wave as u32)
    }

    /// Is woken by the next step.
    pub fn told(&self) -> Notified<'_> {
        self.told.here().notified()
    }

    /// Begins to cut what there is now. Only to be called by whoever holds the service's lock, as [`Cut::reach`].
    pub fn begin(&self) {
        let (count, _) = self.wave();
        self.wave.store(u64::from(count.wrapping_add(1)) << 32, Ordering::Release);
        self.tell();
    }

    /// Cuts on, up to this share of it: 1.0 is all.
    pub fn reach(&self, share: f64) {
        let (count, _) = self.wave();
        let place = (share.clamp(0.0, 1.0) * f64::from(u32::MAX)) as u32;
        self.wave.store(u64::from(count) << 32 | u64::from(place), Ordering::Release);
        self.tell();
    }

    fn tell(&self) {
        for told in self.told.all() {
            told.notify_waiters();
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
    pub uid: Option<Arc<str>>,
    pub http: config::HttpVersion,
    pub host: config::HostPolicy,
    pub headers: config::HeaderEdits,
    pub pool: config::Pool,
    pub tls: Option<ClientTls>,
    pub metrics: Arc<VersionMetrics>,
}

impl TargetSettings {
    /// As [`Target::identity`].
    pub fn identity(&self) -> String {
        identity(&self.url, self.uid.as_deref())
    }
}

/// What tells endpoints of one service apart: [`config::EndpointUrl::identity`], and `#UID` where there is one.
pub fn identity(url: &config::EndpointUrl, uid: Option<&str>) -> String {
    match uid {
        Some(uid) => format!("{}#{uid}", url.identity()),
        None => url.identity(),
    }
}

/// Reads [`identity`]. `None`: it is something else.
pub fn of_identity(identity: &str) -> Option<(config::EndpointUrl, Option<&str>)> {
    // The path of a socket may have any character, and is no pod's.
    let (url, uid) = match identity.split_once('#') {
        Some((url, uid)) if !identity.starts_with("unix:") => (url, Some(uid)),
        _ => (identity, None),
    };
    Some((config::EndpointUrl::of_identity(url)?, uid))
}

impl Target {
    pub fn new(settings: TargetSettings) -> Target {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let TargetSettings { service, version, url, uid, http, host, headers, pool, tls, metrics } = settings;
        Target {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            address: url.address().into(),
            service,
            version,
            url,
            uid,
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

    /// What tells it apart within its service, in this and in every other process.
    pub fn identity(&self) -> String {
        identity(&self.url, self.uid.as_deref())
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
    /// The proxy ends, and nothing more will be placed.
    Ending,
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
            Refusal::Ending => Code::Draining,
        }
    }

    /// What it means for the session.
    pub fn affinity(self) -> AffinityOutcome {
        match self {
            Refusal::SessionLost => AffinityOutcome::Lost,
            Refusal::SessionGone(affinity) => affinity,
            Refusal::PinnedFull | Refusal::Busy(_) => AffinityOutcome::Hit,
            Refusal::NoEndpoint
            | Refusal::QueueFull
            | Refusal::QueueTimeout
            | Refusal::PrincipalLimit
            | Refusal::Ending => AffinityOutcome::None,
        }
    }
}
