//! Discovery: takes what sources find into the live state, one endpoint at a time.

use std::time::Instant;

use crate::state::core::Core;
use crate::state::discovery::{Change, Discovered, Found, Readiness};

impl Core {
    /// Takes changes of the endpoints that sources give to a version. What the configuration lists goes before them, and
    /// one that another version has moves to this one.
    pub fn discover(&mut self, version: &str, changes: Vec<Change>, now: Instant) {
        let now = self.advance(now);
        let known = |it: &crate::state::endpoints::Version| it.configured && *it.name == *version;
        let Some(version) = self.versions.iter().position(known) else { return };
        for change in changes {
            match change {
                Change::Put(found) => self.put_discovered(version, *found, now),
                Change::Remove { identity, lost } => {
                    if let Some(number) = self.by_identity.get(&identity).copied() {
                        self.remove_discovered(number, lost, now);
                    }
                }
                Change::AllAnswered => self.end_waiting_for_sources(version, now),
            }
        }
        // With fewer endpoints fewer may be ejected.
        self.readmit_surplus(version, now);
    }

    fn put_discovered(&mut self, version: usize, found: Discovered, now: Instant) {
        let known = self.by_identity.get(&*found.settings.identity()).copied();
        if let Some(number) = known {
            let endpoint = &self.endpoints[number];
            if endpoint.configured && endpoint.found.is_none() && !endpoint.awaited {
                return;
            }
            self.move_to_version(number, version);
        }
        let number = self.take_discovered(version, found, now);
        if known.is_none() {
            self.versions[version].endpoints.push(number);
        }
        self.refresh(number, now);
    }

    /// Makes or updates the endpoint, but leaves the indices of its version to the caller.
    pub(super) fn take_discovered(&mut self, version: usize, found: Discovered, now: Instant) -> u32 {
        let Discovered { settings, weight, max_runs, readiness, origin } = found;
        // Those that are found first were there before: they need no slow start.
        let original = self.versions[version].awaited;
        let known = self.by_identity.contains_key(&*settings.identity());
        let number = self.take_endpoint(version, settings);
        let default_max = self.rules.max_per_endpoint;
        let deadline = now + self.rules.drain_timeout;
        let endpoint = &mut self.endpoints[number];
        endpoint.original |= original && !known;
        endpoint.weight = weight;
        endpoint.max_runs = max_runs.or(default_max);
        endpoint.found = Some(Found { origin, readiness });
        if endpoint.draining() {
            endpoint.drain_deadline.get_or_insert(deadline);
        } else {
            endpoint.end_drain();
        }
        number
    }

    /// A source does not list it any more: it drains, and gets nothing more at all where it is lost.
    fn remove_discovered(&mut self, number: u32, lost: bool, now: Instant) {
        let deadline = now + self.rules.drain_timeout;
        let endpoint = &mut self.endpoints[number];
        if endpoint.found.is_none() && !endpoint.awaited {
            return;
        }
        endpoint.configured = false;
        endpoint.awaited = false;
        endpoint.lost = lost;
        endpoint.drain_deadline.get_or_insert(deadline);
        self.refresh(number, now);
        self.settle(number, now);
    }

    /// What was kept from before for the sources' word, and was not found, is removed now.
    fn end_waiting_for_sources(&mut self, version: usize, now: Instant) {
        if !std::mem::take(&mut self.versions[version].awaited) {
            return;
        }
        let endpoints = self.versions[version].endpoints.clone();
        for number in endpoints.into_iter().filter(|number| self.endpoints[*number].awaited).collect::<Vec<_>>() {
            self.remove_discovered(number, false, now);
        }
    }

    /// Takes an endpoint out of the orders of the version that it is in, and into another one. Its readiness is to be
    /// found out anew ([`Core::refresh`]).
    fn move_to_version(&mut self, number: u32, to: usize) {
        let endpoint = &mut self.endpoints[number];
        let from = endpoint.version;
        if from == to {
            return;
        }
        endpoint.ready = false;
        let ejected = u32::from(endpoint.ejected_until.is_some());
        let version = &mut self.versions[from];
        version.place_in_rotation(number, endpoint);
        version.index(number, endpoint);
        version.endpoints.retain(|other| *other != number);
        version.ejected -= ejected;
        endpoint.version = to;
        endpoint.pass = 0;
        self.versions[to].ejected += ejected;
        self.versions[to].endpoints.push(number);
        self.room.changed_for_all();
    }
}

impl Found {
    pub fn serves(&self) -> bool {
        self.readiness != Readiness::NotReady
    }

    pub fn drains(&self) -> bool {
        self.readiness == Readiness::Draining
    }
}
