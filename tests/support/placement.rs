//! Support for tests and benches of placement: services made of loopback addresses, without any socket.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use longhaul::config;
use longhaul::metrics::{ServiceMetrics, VersionMetrics};
use longhaul::state::TargetSettings;
use longhaul::state::dispatcher::ServiceSettings;
use longhaul::state::sessions::SessionKey;
use prometheus::{Histogram, HistogramOpts, IntCounter};

pub const SERVICE: &str = "support";

/// One endpoint: its port is its name.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub port: u16,
    pub weight: u32,
    pub max_runs: Option<u32>,
}

pub fn place(port: u16) -> Place {
    Place { port, weight: 1, max_runs: None }
}

/// A service in the making.
#[derive(Clone)]
pub struct Fleet {
    pub config: config::Service,
}

impl Fleet {
    pub fn new() -> Fleet {
        Fleet {
            config: config::Service {
                name: SERVICE.to_owned(),
                agent_protocol: config::AgentProtocol::Http,
                session: config::Session {
                    key: Vec::new(),
                    cookie: None,
                    scope: Vec::new(),
                    affinity: config::Affinity::Pin,
                    idle_timeout: Duration::from_secs(3600),
                    max_sessions: 1_000_000,
                    when_draining: config::WhenDraining::MoveIdle,
                    when_lost: config::WhenLost::Rebind,
                },
                runs: config::Runs {
                    matches: None,
                    max_per_endpoint: None,
                    max_per_principal: None,
                    queue: config::Queue {
                        max: 0,
                        timeout: Duration::from_secs(30),
                        progress: None,
                        priority_header: None,
                    },
                    double_texting: config::DoubleTexting { policy: config::Policy::Allow, allow_override: false },
                    idempotency: None,
                    max_duration: None,
                    on_disconnect: config::OnDisconnect::Protocol,
                    unseen_timeout: Duration::from_secs(3600),
                    heartbeat: None,
                },
                timeouts: config::Timeouts {
                    connect: Duration::from_secs(5),
                    first_byte: Duration::from_secs(300),
                    idle: Duration::from_secs(600),
                },
                attempts: 2,
                health: config::Health {
                    path: None,
                    tcp: false,
                    port: None,
                    expect_status: vec![(200, 399)],
                    draining_status: Vec::new(),
                    interval: Duration::from_secs(5),
                    timeout: Duration::from_secs(2),
                    unhealthy_after: 3,
                    healthy_after: 2,
                    load: None,
                },
                outlier: config::Outlier {
                    consecutive_failures: 5,
                    eject_for: Duration::from_secs(30),
                    max_ejected: 0.5,
                },
                balance: config::Balance::LeastOutstandingRuns,
                slow_start: Duration::ZERO,
                pool: pool(),
                versions: Vec::new(),
                shadow: None,
                rollout: None,
                drain_timeout: Duration::from_secs(600),
            },
        }
    }

    /// Adds a version.
    pub fn version(mut self, name: &str, weight: u32, places: impl IntoIterator<Item = Place>) -> Fleet {
        let endpoints = places.into_iter().map(|place| config::Endpoint {
            url: url(place.port),
            weight: place.weight,
            max_runs: place.max_runs,
        });
        self.config.versions.push(config::Version {
            name: name.to_owned(),
            weight,
            endpoints: endpoints.collect(),
            sources: Vec::new(),
            http: config::HttpVersion::Auto,
            host: config::HostPolicy::Preserve,
            tls: config::UpstreamTls::default(),
            headers: config::HeaderEdits::default(),
            matches: Vec::new(),
        });
        self
    }

    pub fn with(mut self, edit: impl FnOnce(&mut config::Service)) -> Fleet {
        edit(&mut self.config);
        self
    }

    /// What control would make of it.
    pub fn settings(&self) -> ServiceSettings {
        let targets = self.config.versions.iter().map(|version| {
            let metrics = version_metrics();
            let target = |endpoint: &config::Endpoint| TargetSettings {
                service: SERVICE.into(),
                version: version.name.as_str().into(),
                url: endpoint.url.clone(),
                uid: None,
                http: version.http,
                host: version.host.clone(),
                headers: version.headers.clone(),
                pool: self.config.pool.clone(),
                tls: None,
                metrics: metrics.clone(),
            };
            version.endpoints.iter().map(target).collect()
        });
        ServiceSettings { config: self.config.clone(), targets: targets.collect(), discovered: Vec::new() }
    }
}

pub fn url(port: u16) -> config::EndpointUrl {
    let host = config::EndpointHost::Ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
    config::EndpointUrl::Tcp { https: false, host, port }
}

pub fn key(text: &str) -> SessionKey {
    SessionKey { scope: None, text: text.into() }
}

pub fn version_metrics() -> Arc<VersionMetrics> {
    Arc::new(VersionMetrics {
        runs: std::array::from_fn(|_| counter()),
        run_duration_seconds: histogram(),
        time_to_first_event_seconds: histogram(),
        stream_events: counter(),
        bytes_request: counter(),
        bytes_response: counter(),
    })
}

pub fn service_metrics() -> Arc<ServiceMetrics> {
    Arc::new(ServiceMetrics {
        affinity: std::array::from_fn(|_| counter()),
        rejected: counter(),
        queue_wait_seconds: histogram(),
    })
}

fn counter() -> IntCounter {
    IntCounter::new("test", "test").expect("a good name")
}

fn histogram() -> Histogram {
    Histogram::with_opts(HistogramOpts::new("test", "test")).expect("a good name")
}

fn pool() -> config::Pool {
    config::Pool { max_idle: 100, idle_timeout: Duration::from_secs(60), max_connections: None }
}
