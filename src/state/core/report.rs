//! Report: reads the live state for the admin API and the metrics.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::rollout::WEIGHT_UNIT;
use crate::state::core::{BORN_BEFORE, Core};
use crate::state::endpoints::{Endpoint, HealthStanding, Version};
use crate::state::queue::Place;
use crate::state::sessions::TICK;
use crate::state::status::{
    DrainEstimate, DrainStatus, EndpointState, EndpointStatus, RunInfo, ServiceStatus, SessionInfo, VersionDemand,
    VersionStatus,
};

impl Core {
    /// The service as it is now, in the shape of the admin API.
    pub fn status(&mut self, now: Instant) -> ServiceStatus {
        let outlook = self.drains_with_runs().then(|| self.outlook(now));
        let draining = self.draining().into_iter().filter(|(_, has_runs)| *has_runs);
        let estimates = draining.filter_map(|(number, _)| Some((number, outlook.as_ref()?.empty_in(number))));
        self.status_by(&estimates.collect(), now)
    }

    /// As [`Core::status`], with estimates of when the endpoints that drain will be empty, by number.
    pub fn status_by(&mut self, estimates: &HashMap<u32, DrainEstimate>, now: Instant) -> ServiceStatus {
        let now = self.advance(now);
        let drains = self.drains(estimates, now);
        let demands = self.version_demands();
        let versions: Vec<VersionStatus> = self
            .versions
            .iter()
            .zip(demands)
            .map(|(version, demand)| self.version_status(version, demand, &drains))
            .filter(|status| !status.endpoints.is_empty() || self.configures(&status.name))
            .collect();
        let capacity = self
            .versions
            .iter()
            .filter(|version| version.configured)
            .try_fold(0, |sum, version| Some(sum + self.capacity(version)?));
        let endpoints = || self.endpoints.numbers().into_iter().map(|number| &self.endpoints[number]);
        let outstanding_runs = endpoints().map(|endpoint| u64::from(endpoint.outstanding)).sum();
        let queue = self.queue_status(now);
        let staying = endpoints().filter(|endpoint| !endpoint.draining());
        let demand = staying.map(|endpoint| u64::from(endpoint.outstanding)).sum::<u64>() + queue.length;
        let saturation = capacity.map(|capacity| match (demand, capacity) {
            (0, _) => 0.0,
            (_, 0) => 1.0,
            (demand, capacity) => demand as f64 / capacity as f64,
        });
        ServiceStatus {
            name: self.name.to_string(),
            versions,
            queue,
            outstanding_runs,
            capacity,
            demand,
            placeable_demand: self.placeable_demand(),
            saturation,
        }
    }

    /// Whether a run is outstanding or somebody waits, so that the service may not be scaled to zero; and how many have
    /// come to wait so far.
    pub fn work(&self) -> (bool, u64) {
        (!self.room.queue.is_empty() || self.runs.len() > 0, self.room.queue.arrivals())
    }

    /// Appends the sessions of the slots `from..from + count` to `found`, at most until that holds `limit`. Returns the
    /// next slot, or `None` at the end: the caller goes on from there, with the lock released in between.
    pub fn scan_sessions(
        &mut self,
        key: Option<&str>,
        from: u32,
        count: u32,
        limit: usize,
        found: &mut Vec<SessionInfo>,
        now: Instant,
    ) -> Option<u32> {
        let now = self.advance(now);
        let slots = self.sessions.slots();
        let end = slots.min(from.saturating_add(count));
        for slot in from..end {
            if found.len() >= limit {
                return None;
            }
            let wanted = |session: u32| key.is_none_or(|key| self.sessions.answers_to(session, key));
            if self.sessions.view(slot).is_some_and(|view| wanted(view.id)) {
                found.extend(self.session_info(slot, now));
            }
        }
        (end < slots).then_some(end)
    }

    /// Outstanding runs, those of one session only where its key (or alias) is given.
    pub fn runs(&mut self, session: Option<&str>, limit: usize, now: Instant) -> Vec<RunInfo> {
        let mut found = Vec::new();
        self.scan_runs(session, 0, u32::MAX, limit, &mut found, now);
        found
    }

    /// Appends the outstanding runs of the slots `from..from + count` to `found`, at most until that holds `limit`; those
    /// of one session only where its key (or alias) is given. Returns the next slot as [`Core::scan_sessions`].
    pub fn scan_runs(
        &mut self,
        session: Option<&str>,
        from: u32,
        count: u32,
        limit: usize,
        found: &mut Vec<RunInfo>,
        now: Instant,
    ) -> Option<u32> {
        let now = self.advance(now);
        let wanted = |id: Option<u32>| match (session, id) {
            (None, _) => true,
            (Some(key), Some(id)) => self.sessions.answers_to(id, key),
            (Some(_), None) => false,
        };
        let end = from.saturating_add(count);
        let left = limit.saturating_sub(found.len());
        let runs = self.runs.between(from, end).filter(|run| wanted(run.session)).take(left);
        found.extend(runs.map(|run| RunInfo {
            id: run.id.to_string(),
            version: run.target.version.to_string(),
            endpoint: run.target.address.to_string(),
            session: run.session.map(|session| self.sessions.key(session).to_owned()),
            state: if run.cancel.is_some() { "cancelling" } else { "running" },
            protocol: run.about.protocol.map_or("http", |protocol| protocol.name()),
            protocol_id: run.key.as_deref().map(str::to_owned),
            age_ms: milliseconds(run.age(now)),
            carriers: run.carriers,
            attempts: run.attempts,
        }));
        (end < self.runs.slots() && found.len() < limit).then_some(end)
    }

    fn session_info(&self, slot: u32, now: Instant) -> Option<SessionInfo> {
        let view = self.sessions.view(slot)?;
        let endpoint = &self.endpoints[view.endpoint];
        let age = BORN_BEFORE + self.started.map_or(Duration::ZERO, |started| now.saturating_duration_since(started));
        let idle = self.ticks(now).wrapping_sub(view.used);
        Some(SessionInfo {
            key: view.key.to_owned(),
            version: self.versions[endpoint.version].name.to_string(),
            endpoint: endpoint.target.address.to_string(),
            confirmed: view.confirmed,
            matched: view.matched,
            outstanding_runs: self.runs.chain(self.sessions.first_run(slot)).count() as u32,
            idle_ms: if view.busy { 0 } else { milliseconds(TICK * idle) },
            age_ms: milliseconds(age.saturating_sub(Duration::from_secs(view.born_seconds.into()))),
        })
    }

    /// The demand of each version, in their order.
    fn version_demands(&self) -> Vec<VersionDemand> {
        let draining_runs = |version: &Version| {
            let endpoints = version.endpoints.iter().map(|number| &self.endpoints[*number]);
            endpoints.filter(|endpoint| endpoint.draining()).map(|endpoint| u64::from(endpoint.outstanding)).sum()
        };
        let mut demands: Vec<VersionDemand> = self
            .versions
            .iter()
            .map(|version| VersionDemand { draining_runs: draining_runs(version), ..VersionDemand::default() })
            .collect();
        if self.room.queue.is_empty() {
            return demands;
        }
        let (mut anywhere, mut placed) = (0, 0);
        for (place, count) in self.room.queue.waiting_by_place() {
            placed += count;
            let version = match place {
                Place::Endpoint(endpoint) => Some((self.endpoints[endpoint].version, 0)),
                Place::Version(version) => Some((version, count)),
                Place::Any | Place::Ready | Place::Nowhere | Place::Turn => None,
            };
            match version.and_then(|(version, placeable)| Some((demands.get_mut(version)?, placeable))) {
                Some((demand, placeable)) => {
                    demand.queued += count as f64;
                    demand.placeable += placeable as f64;
                }
                None => anywhere += count,
            }
        }
        let in_turn = self.room.queue.len() - placed;
        let weights: f64 = self.versions.iter().map(|version| version.effective_weight as f64).sum();
        let configured = self.versions.iter().filter(|version| version.configured).count() as f64;
        for (version, demand) in self.versions.iter().zip(&mut demands) {
            let share = match version.configured {
                _ if weights > 0.0 => version.effective_weight as f64 / weights,
                true => 1.0 / configured,
                false => 0.0,
            };
            demand.queued += (anywhere + in_turn) as f64 * share;
            demand.placeable += anywhere as f64 * share;
        }
        demands
    }

    fn version_status(
        &self,
        version: &Version,
        demand: VersionDemand,
        drains: &HashMap<u32, DrainStatus>,
    ) -> VersionStatus {
        let endpoints = || version.endpoints.iter().map(|number| &self.endpoints[*number]);
        VersionStatus {
            name: version.name.to_string(),
            weight: version.weight,
            effective_weight: version.effective_weight as f64 / WEIGHT_UNIT as f64,
            dealt: version.dealt.total,
            share: self.share(version),
            sessions: endpoints().map(|endpoint| u64::from(endpoint.sessions)).sum(),
            outstanding_runs: endpoints().map(|endpoint| u64::from(endpoint.outstanding)).sum(),
            capacity: self.capacity(version),
            demand,
            // One that is gone and has nothing left to finish is kept for its pins only.
            endpoints: version
                .endpoints
                .iter()
                .map(|number| (number, &self.endpoints[*number]))
                .filter(|(_, endpoint)| !endpoint.gone || !endpoint.idle())
                .map(|(number, endpoint)| self.endpoint_status(endpoint, drains.get(number).cloned()))
                .collect(),
        }
    }

    fn endpoint_status(&self, endpoint: &Endpoint, drain: Option<DrainStatus>) -> EndpointStatus {
        let origin = endpoint.found.as_ref().map(|found| &found.origin);
        let text = |text: &std::sync::Arc<str>| text.to_string();
        EndpointStatus {
            address: endpoint.target.address.to_string(),
            source: origin.map(|origin| text(&origin.source)),
            pod: origin.and_then(|origin| origin.pod.as_ref()).map(text),
            zone: origin.and_then(|origin| origin.zone.as_ref()).map(text),
            state: self.state(endpoint),
            outstanding_runs: endpoint.outstanding,
            reported_runs: endpoint.reported.map(|(runs, _)| runs),
            open_exchanges: endpoint.open,
            max_runs: endpoint.max_runs,
            sessions: endpoint.sessions,
            weight: endpoint.weight,
            connections: endpoint.target.connections.load(std::sync::atomic::Ordering::Relaxed),
            drain,
        }
    }

    pub(super) fn state(&self, endpoint: &Endpoint) -> EndpointState {
        if endpoint.gone {
            EndpointState::Gone
        } else if endpoint.draining() {
            EndpointState::Draining
        } else if !endpoint.serves()
            || endpoint.awaited
            || self.rules.checked && endpoint.health.standing != HealthStanding::Healthy
        {
            EndpointState::Unhealthy
        } else if endpoint.ejected_until.is_some() {
            EndpointState::Ejected
        } else {
            EndpointState::Ready
        }
    }

    /// Runs that the ready endpoints of a version may have at once; `None` where one of them has no limit.
    fn capacity(&self, version: &Version) -> Option<u64> {
        let endpoints = || version.endpoints.iter().map(|number| &self.endpoints[*number]);
        let configured = || endpoints().filter(|endpoint| endpoint.configured);
        if configured().any(|endpoint| endpoint.max_runs.is_none())
            || (configured().next().is_none() && self.rules.max_per_endpoint.is_none())
        {
            return None;
        }
        Some(
            endpoints().filter(|endpoint| endpoint.ready).filter_map(|endpoint| endpoint.max_runs).map(u64::from).sum(),
        )
    }

    fn configures(&self, version: &str) -> bool {
        self.versions.iter().any(|known| known.configured && *known.name == *version)
    }
}

fn milliseconds(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}
