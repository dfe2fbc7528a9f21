//! Health: what checks, exchanges and answers tell of an endpoint, and the ejection of one that fails too often.

use std::time::{Duration, Instant};

use crate::config;
use crate::orca::Report;
use crate::state::Evidence;
use crate::state::core::{Core, Grant, Rules};
use crate::state::endpoints::HealthStanding;

/// How long a load counts that an answer told; the next one replaces it.
const REPORT_TIME: Duration = Duration::from_secs(10);

impl Core {
    /// The answer of an active health check; where it told that the endpoint drains, [`Core::probe_drains`].
    pub fn probe_result(&mut self, identity: &str, healthy: bool, now: Instant) {
        let now = self.advance(now);
        if let Some((number, recovered)) = self.take_health(identity, healthy, now)
            && healthy
        {
            self.probe_was_good(number, recovered, now);
        }
    }

    /// Takes one answer of a check, where there is one. Of which endpoint, and whether it was unhealthy until then.
    pub(super) fn take_health(&mut self, identity: &str, healthy: bool, now: Instant) -> Option<(u32, bool)> {
        let number = self.by_identity.get(identity).copied().filter(|_| self.rules.checked)?;
        let Rules { unhealthy_after, healthy_after, .. } = self.rules;
        let health = &mut self.endpoints[number].health;
        let before = health.standing;
        health.answer(healthy, unhealthy_after, healthy_after);
        let recovered = before == HealthStanding::Unhealthy && health.standing == HealthStanding::Healthy;
        self.refresh(number, now);
        Some((number, recovered))
    }

    /// Takes evidence about the endpoint of a grant.
    pub fn report(&mut self, grant: &Grant, evidence: Evidence, now: Instant) {
        let now = self.advance(now);
        let endpoint = &mut self.endpoints[grant.endpoint];
        match evidence {
            Evidence::Good => {
                endpoint.failures = 0;
                endpoint.target.set_failing(false);
            }
            Evidence::Bad => {
                endpoint.target.set_failing(true);
                endpoint.failures = endpoint.failures.saturating_add(1);
                self.judge(grant.endpoint, now);
            }
        }
    }

    /// Takes what an endpoint says of its own load, for so long.
    pub fn reported_load(&mut self, identity: &str, runs: u32, holds: Duration, now: Instant) {
        let now = self.advance(now);
        let Some(number) = self.by_identity.get(identity).copied() else { return };
        self.endpoints[number].reported = Some((runs, now + holds));
        self.reindex(number);
    }

    /// As [`Core::reported_load`], told with an answer of a grant's endpoint.
    pub fn reported_with_answer(&mut self, grant: &Grant, report: &Report, now: Instant) {
        let now = self.advance(now);
        let endpoint = &mut self.endpoints[grant.endpoint];
        let Some(runs) = report.as_runs(endpoint.max_runs) else { return };
        endpoint.reported = Some((runs, now + REPORT_TIME));
        self.reindex(grant.endpoint);
    }

    /// Ejects an endpoint that failed too often, where its version can do without.
    fn judge(&mut self, number: u32, now: Instant) {
        let config::Outlier { consecutive_failures, eject_for, .. } = self.rules.outlier;
        let endpoint = &self.endpoints[number];
        if consecutive_failures == 0 || endpoint.failures < consecutive_failures || !endpoint.ready {
            return;
        }
        let version = &self.versions[endpoint.version];
        // The only one that is ready is as good as alone: ejecting it would help nobody.
        if version.ready() < 2 || version.ejected >= self.most_ejected(endpoint.version) {
            return;
        }
        let endpoint = &mut self.endpoints[number];
        endpoint.ejected_until = Some(now + eject_for);
        endpoint.failures = 0;
        self.versions[endpoint.version].ejected += 1;
        self.ejected.push(number);
        self.refresh(number, now);
    }

    /// How many endpoints of a version may be ejected at once: its share, at least one, but never a lone one.
    fn most_ejected(&self, version: usize) -> u32 {
        let config::Outlier { max_ejected, .. } = self.rules.outlier;
        let endpoints = &self.versions[version].endpoints;
        let all = endpoints.iter().filter(|number| self.endpoints[**number].configured).count();
        if all < 2 || max_ejected <= 0.0 { 0 } else { ((all as f64 * max_ejected).floor() as u32).max(1) }
    }

    /// Readmits those who were ejected first, until a version has no more of them than it may.
    pub(super) fn readmit_surplus(&mut self, version: usize, now: Instant) {
        let mut ejected: Vec<u32> = self.versions[version].endpoints.clone();
        ejected.retain(|number| self.endpoints[*number].configured && self.endpoints[*number].ejected_until.is_some());
        ejected.sort_by_key(|number| self.endpoints[*number].ejected_until);
        let surplus = ejected.len().saturating_sub(self.most_ejected(version) as usize);
        for number in ejected.into_iter().take(surplus) {
            self.readmit(number, now);
        }
    }

    pub(super) fn readmit(&mut self, number: u32, now: Instant) {
        self.ejected.retain(|other| *other != number);
        let endpoint = &mut self.endpoints[number];
        if endpoint.ejected_until.take().is_some() {
            endpoint.failures = 0;
            self.versions[endpoint.version].ejected -= 1;
            self.refresh(number, now);
        }
    }
}
