//! Apply: takes a configuration into the live state without touching what lives: counts, pins, runs, drains, health.

use std::sync::Arc;
use std::time::Instant;

use crate::state::core::{Core, Rules};
use crate::state::discovery::OfSources;
use crate::state::dispatcher::ServiceSettings;
use crate::state::endpoints::{Endpoint, Health, HealthStanding, Says, Version};
use crate::state::{ClientTls, Target, TargetSettings};

impl Core {
    /// Takes a configuration, the first or the next. Endpoints keep their numbers by identity; those that it no longer
    /// names drain.
    pub fn apply(&mut self, settings: ServiceSettings, now: Instant) {
        let now = self.advance(now);
        let ServiceSettings { config, targets, discovered } = settings;
        let old = std::mem::replace(&mut self.rules, Rules::of(&config));
        if let Some(changes) = &mut self.changes {
            changes.set_idle_timeout(self.rules.idle_timeout);
        }
        let (was_checked, took_turns) = (old.checked, old.takes_turns());
        self.take_versions(&config.versions);
        self.take_rollout(config.rollout.as_ref(), now);

        let mut removed = Vec::new();
        for number in self.endpoints.numbers() {
            self.endpoints.forget_index(number);
            let endpoint = &mut self.endpoints[number];
            if std::mem::take(&mut endpoint.configured) {
                removed.push(number);
            }
            // A check that is new doubts nobody who served without one.
            if self.rules.checked && !was_checked && endpoint.health.standing == HealthStanding::Unknown {
                endpoint.health = Health { standing: HealthStanding::Healthy, against: 0, proven: true };
            }
            // What a check said that is no more must not be held against anybody when there is one again.
            if !self.rules.checked {
                endpoint.health = Health::default();
                endpoint.says.take_if(|says| *says == Says::ByHealth);
            }
            if self.rules.outlier.consecutive_failures == 0 {
                endpoint.ejected_until = None;
            }
        }
        for (index, (version, targets)) in config.versions.iter().zip(targets).enumerate() {
            for (endpoint, target) in version.endpoints.iter().zip(targets) {
                let number = self.take_endpoint(index, target);
                let live = &mut self.endpoints[number];
                live.weight = endpoint.weight;
                live.max_runs = endpoint.max_runs.or(config.runs.max_per_endpoint);
                live.found = None;
                self.versions[index].endpoints.push(number);
            }
        }
        for (index, OfSources { found, awaited }) in discovered.into_iter().enumerate() {
            self.versions[index].awaited = awaited;
            for found in found {
                // Listed as well, or found by another version before.
                let known = self.by_identity.get(&*found.settings.identity());
                if known.is_none_or(|number| !self.endpoints[*number].configured) {
                    let number = self.take_discovered(index, found, now);
                    self.versions[index].endpoints.push(number);
                }
            }
        }
        for number in &removed {
            let endpoint = &mut self.endpoints[*number];
            let version = &mut self.versions[endpoint.version];
            if endpoint.awaited && version.awaited {
                endpoint.configured = true;
                version.endpoints.push(*number);
            }
        }
        removed.retain(|number| !self.endpoints[*number].configured);
        self.drain_news += 1;
        for number in &removed {
            self.endpoints[*number].drain_deadline.get_or_insert(now + self.rules.drain_timeout);
        }
        self.applied = true;

        self.ejected.clear();
        for number in self.endpoints.numbers() {
            let endpoint = &self.endpoints[number];
            let version = &mut self.versions[endpoint.version];
            if !endpoint.configured {
                version.endpoints.push(number);
            }
            if endpoint.ejected_until.is_some() {
                version.ejected += 1;
                self.ejected.push(number);
            }
            self.refresh(number, now);
        }
        // With fewer endpoints fewer may be ejected: the last one of a version must not be.
        for version in 0..self.versions.len() {
            self.readmit_surplus(version, now);
        }
        for number in removed {
            self.settle(number, now);
        }
        self.take_queue_rules(took_turns);
    }

    /// Puts the versions into the order of the configuration. Those that it no longer names stay at the end while they
    /// have endpoints.
    fn take_versions(&mut self, configured: &[crate::config::Version]) {
        let old = std::mem::take(&mut self.versions);
        let old_turns = std::mem::take(&mut self.turns);
        let mut old: Vec<Option<(Version, i64)>> = old.into_iter().zip(old_turns).map(Some).collect();
        let mut moved_to = vec![0; old.len()];
        for settings in configured {
            let known =
                old.iter().position(|slot| slot.as_ref().is_some_and(|(version, _)| *version.name == *settings.name));
            let (mut version, turn) = match known.and_then(|index| old[index].take()) {
                Some(kept) => kept,
                None => (Version::new(Arc::from(settings.name.as_str())), 0),
            };
            if let Some(index) = known {
                moved_to[index] = self.versions.len();
            }
            // A turn saved up under other weights would be a burst now.
            let turn = if version.weight == settings.weight { turn } else { 0 };
            version.weight = settings.weight;
            version.configured = true;
            self.versions.push(version);
            self.turns.push(turn);
        }
        for (index, slot) in old.iter_mut().enumerate() {
            if let Some((mut version, _)) = slot.take_if(|(version, _)| !version.endpoints.is_empty()) {
                moved_to[index] = self.versions.len();
                version.weight = 0;
                version.configured = false;
                self.versions.push(version);
                self.turns.push(0);
            }
        }
        for version in &mut self.versions {
            version.clear();
        }
        for number in self.endpoints.numbers() {
            let endpoint = &mut self.endpoints[number];
            endpoint.version = moved_to[endpoint.version];
        }
    }

    /// The endpoint that these settings describe: the one that lives under that identity, or a new one.
    pub(super) fn take_endpoint(&mut self, version: usize, settings: TargetSettings) -> u32 {
        let identity = settings.identity();
        let Some(number) = self.by_identity.get(identity.as_str()).copied() else {
            let mut endpoint = Endpoint::new(&identity, Arc::new(Target::new(settings)), version);
            endpoint.original = !self.applied;
            let number = self.endpoints.insert(endpoint);
            self.by_identity.insert(identity.into(), number);
            return number;
        };
        let endpoint = &mut self.endpoints[number];
        endpoint.configured = true;
        endpoint.awaited = false;
        endpoint.lost = false;
        if !endpoint.draining() {
            endpoint.end_drain();
        }
        if endpoint.version != version {
            endpoint.version = version;
            endpoint.pass = 0;
        }
        if std::mem::take(&mut endpoint.gone) {
            // It comes back, perhaps as another process: it has to show its health again.
            endpoint.health = Health::default();
            endpoint.failures = 0;
            endpoint.ejected_until = None;
        }
        if endpoint.target.retired() || !describes(&settings, &endpoint.target) {
            endpoint.target.retire();
            endpoint.target = Arc::new(endpoint.target.replaced(settings));
        }
        number
    }
}

/// Nothing that connections to the target depend on has changed.
fn describes(settings: &TargetSettings, target: &Target) -> bool {
    let TargetSettings { service, version, url, uid, http, host, headers, pool, tls, metrics: _ } = settings;
    *service == target.service
        && *version == target.version
        && *url == target.url
        && *uid == target.uid
        && *http == target.http
        && *host == target.host
        && *headers == target.headers
        && *pool == target.pool
        && same_tls(tls.as_ref(), target.tls.as_ref())
}

fn same_tls(left: Option<&ClientTls>, right: Option<&ClientTls>) -> bool {
    match (left, right) {
        (None, None) => true,
        (Some(left), Some(right)) => Arc::ptr_eq(&left.config, &right.config) && left.server_name == right.server_name,
        _ => false,
    }
}
