//! Metrics: every series of the contract; handles are resolved once and held by whoever records.

use std::sync::Arc;

use prometheus::{Histogram, IntCounter, IntGauge, Registry};

use crate::error::Code;

/// The registry and the families behind the handles.
pub struct Metrics {
    registry: Registry,
}

/// The series of one version of a service; shared by every [`crate::state::Target`] of it.
pub struct VersionMetrics {
    /// In the order of [`crate::state::RunOutcome::ALL`].
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
    /// In the order of [`crate::state::AffinityOutcome::ALL`].
    pub affinity: [IntCounter; 5],
    /// `longhaul_runs_total` with an empty version: runs that were never dispatched.
    pub rejected: IntCounter,
    pub queue_wait_seconds: Histogram,
}

pub struct ListenerMetrics {
    pub connections: IntGauge,
}

/// `longhaul_requests_total` of one listener and route.
pub struct RouteMetrics {
    _todo: (),
}

impl RouteMetrics {
    /// Counts one exchange at its end; `status` 0 means that no answer was begun.
    pub fn record(&self, _status: u16, _code: Option<Code>) {
        unimplemented!()
    }
}

impl Metrics {
    pub fn new() -> Arc<Metrics> {
        unimplemented!()
    }

    pub fn version(&self, _service: &str, _version: &str) -> Arc<VersionMetrics> {
        unimplemented!()
    }

    pub fn service(&self, _service: &str) -> Arc<ServiceMetrics> {
        unimplemented!()
    }

    pub fn listener(&self, _listener: &str) -> Arc<ListenerMetrics> {
        unimplemented!()
    }

    pub fn route(&self, _listener: &str, _route: &str) -> Arc<RouteMetrics> {
        unimplemented!()
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }
}
