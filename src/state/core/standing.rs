//! Standing: what an endpoint can be given, its place in the orders that picks go by, and the end of one that was removed.

use std::time::Instant;

use crate::config;
use crate::state::core::{Core, Rules};
use crate::state::endpoints::{Endpoint, HealthStanding};

/// What a pinned session can expect of its endpoint.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    Open,
    Draining,
    Lost,
}

impl Core {
    pub(super) fn standing(&self, number: u32) -> Standing {
        let endpoint = &self.endpoints[number];
        let unhealthy = self.rules.checked && endpoint.health.standing == HealthStanding::Unhealthy;
        if endpoint.gone || unhealthy || !endpoint.serves() || endpoint.ejected_until.is_some() {
            Standing::Lost
        } else if endpoint.draining() {
            Standing::Draining
        } else {
            // Not asked yet is no reason to think that its sessions are lost.
            Standing::Open
        }
    }

    fn is_ready(&self, endpoint: &Endpoint) -> bool {
        !endpoint.draining()
            && endpoint.serves()
            && !endpoint.awaited
            && endpoint.ejected_until.is_none()
            && (!self.rules.checked || endpoint.health.standing == HealthStanding::Healthy)
    }

    /// Brings readiness and all orders up to date with what became of an endpoint.
    pub(super) fn refresh(&mut self, number: u32, now: Instant) {
        let ready = self.is_ready(&self.endpoints[number]);
        let Rules { slow_start, affinity, .. } = self.rules;
        let endpoint = &mut self.endpoints[number];
        let were_ready = self.versions[endpoint.version].ready();
        let turned = ready != endpoint.ready;
        if turned {
            endpoint.ready = ready;
            endpoint.ramp = (ready && !endpoint.original && !slow_start.is_zero()).then_some(now);
            if ready {
                endpoint.original = false;
            }
        }
        let version = &mut self.versions[endpoint.version];
        version.place_in_rotation(number, endpoint);
        // New sessions of a version without ready endpoints go to others; hashed ones go by all that are ready.
        if (were_ready == 0) != (version.ready() == 0) || (turned && affinity == config::Affinity::Hash) {
            self.room.changed_for_all();
        }
        if turned && ready {
            self.room.fresh(number, now);
        }
        self.room.changed_for(number);
        self.reindex(number);
    }

    pub(super) fn reindex(&mut self, number: u32) {
        let endpoint = &mut self.endpoints[number];
        self.versions[endpoint.version].index(number, endpoint);
        self.room.touched(number);
    }

    /// Takes endpoints whose slow start is over into the common order.
    pub(super) fn graduate(&mut self, version: usize, now: Instant) {
        let slow_start = self.rules.slow_start;
        let endpoints = &self.endpoints;
        let over = |number: &u32| {
            endpoints[*number].ramp.is_none_or(|since| now.saturating_duration_since(since) >= slow_start)
        };
        let done: Vec<u32> = self.versions[version].ramping().iter().copied().filter(over).collect();
        for number in done {
            self.endpoints[number].ramp = None;
            self.reindex(number);
        }
    }

    /// Ends the drain of a removed endpoint that has finished, or whose time is over.
    pub(super) fn settle(&mut self, number: u32, now: Instant) {
        // Forgetting its last session may have released it already.
        if !self.endpoints.contains(number) {
            return;
        }
        self.reindex(number);
        let endpoint = &mut self.endpoints[number];
        if endpoint.configured {
            return;
        }
        if !endpoint.gone && (endpoint.idle() || endpoint.drain_deadline.is_none_or(|deadline| now >= deadline)) {
            endpoint.gone = true;
            let drained = std::mem::take(&mut endpoint.drained);
            endpoint.says = None;
            endpoint.target.retire();
            self.room.changed_for(number);
            if drained {
                self.drains_changed();
            }
        }
        self.release(number);
    }

    /// Forgets an endpoint that is gone once nothing refers to it.
    pub(super) fn release(&mut self, number: u32) {
        let endpoint = &self.endpoints[number];
        if !endpoint.gone || !endpoint.idle() || endpoint.sessions > 0 {
            return;
        }
        self.ejected.retain(|other| *other != number);
        self.room.changed_for(number);
        if let Some(endpoint) = self.endpoints.remove(number) {
            let version = &mut self.versions[endpoint.version];
            version.endpoints.retain(|other| *other != number);
            if endpoint.ejected_until.is_some() {
                version.ejected -= 1;
            }
            self.by_identity.remove(&endpoint.identity);
        }
    }
}
