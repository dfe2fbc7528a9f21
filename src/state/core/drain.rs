//! Drain: endpoints that finish what they have. Who may say so, how what is left at the deadline is cut, and when they will
//! be empty.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::run::RunOutcome;
use crate::state::core::{Core, Outlook};
use crate::state::endpoints::{Cutting, Endpoint, Says};
use crate::state::status::{DrainEstimate, DrainStatus, RollEndpoint, RollReport};

/// What is left at a deadline is cut within this part of the drain's time-out, so that clients don't come back all at once.
pub const SPREAD_PART: u32 = 10;

/// How often time is told ([`Core::tick`]) while nothing is due soon.
pub const USUAL_TICK: Duration = Duration::from_secs(1);

impl Core {
    /// Starts or ends an operator's drain of all endpoints at an address (or identity); ending it also forgets what they
    /// said of themselves. False where there is none.
    pub fn set_drained(&mut self, address: &str, drained: bool, now: Instant) -> bool {
        let now = self.advance(now);
        let deadline = now + self.rules.drain_timeout;
        let mut found = false;
        for number in self.endpoints.numbers() {
            let endpoint = &mut self.endpoints[number];
            if endpoint.configured && (&*endpoint.target.address == address || &*endpoint.identity == address) {
                endpoint.drained = drained;
                if drained {
                    endpoint.drain_deadline.get_or_insert(deadline);
                } else {
                    // Should it still say so itself, it drains again when it next does.
                    endpoint.says = None;
                    if !endpoint.draining() {
                        endpoint.end_drain();
                    }
                }
                found = true;
                self.drains_changed();
                self.refresh(number, now);
            }
        }
        found
    }

    /// A health check was answered well, and with a word on whether the endpoint takes new sessions.
    pub fn probe_drains(&mut self, identity: &str, drains: bool, now: Instant) {
        let now = self.advance(now);
        if let Some((number, _)) = self.take_health(identity, true, now) {
            self.endpoint_says(number, drains.then_some(Says::ByHealth), now);
        }
    }

    /// A health check was answered well. Where checks can tell of a drain, that ends one that the endpoint has told of
    /// itself, by whatever means; else only if it had been unhealthy, and so has been another process since.
    pub(super) fn probe_was_good(&mut self, number: u32, recovered: bool, now: Instant) {
        let told_by_checks = self.rules.asks_draining || self.endpoints[number].says == Some(Says::ByHealth);
        if told_by_checks || recovered {
            self.endpoint_says(number, None, now);
        }
    }

    /// An answer of the endpoint said whether it drains (`longhaul-drain`).
    pub fn answer_says(&mut self, number: u32, drains: bool, now: Instant) {
        let now = self.advance(now);
        // An endpoint that is gone and answers late has nothing to say.
        if self.endpoints.contains(number) && !self.endpoints[number].gone {
            if drains != self.endpoints[number].says.is_some() {
                self.tell_says(number, drains);
            }
            self.endpoint_says(number, drains.then_some(Says::ByAnswer), now);
        }
    }

    fn endpoint_says(&mut self, number: u32, says: Option<Says>, now: Instant) {
        let endpoint = &mut self.endpoints[number];
        // Said again it means the same, and begins no second deadline.
        if endpoint.says.is_some() == says.is_some() {
            if says == Some(Says::ByHealth) {
                // From here on a check can also take it back.
                endpoint.says = says;
            }
            return;
        }
        let was_draining = endpoint.draining();
        endpoint.says = says;
        match (was_draining, endpoint.draining()) {
            (false, true) => endpoint.drain_deadline = Some(now + self.rules.drain_timeout),
            (true, false) => endpoint.end_drain(),
            _ => return self.drains_changed(),
        }
        self.drains_changed();
        self.refresh(number, now);
    }

    /// Begins to cut what an endpoint's drain has left at its deadline, and goes on with it.
    pub(super) fn cut_what_is_left(&mut self, number: u32, now: Instant) {
        let over = self.rules.drain_timeout / SPREAD_PART;
        let forgets = !self.rules.asks_draining;
        let endpoint = &mut self.endpoints[number];
        if endpoint.drain_deadline.take_if(|deadline| now >= *deadline).is_some() {
            if !endpoint.idle() {
                // From now on, however late it is noticed: else a short time would be over before it began.
                endpoint.cutting = Some(Cutting { since: now, over });
                endpoint.target.cut.begin();
            }
            self.drains_changed();
            let endpoint = &mut self.endpoints[number];
            if forgets && endpoint.says == Some(Says::ByAnswer) {
                // Nobody would ever say otherwise: no answer comes from where nothing is sent. Whoever is there now is
                // tried again, and may say it again.
                endpoint.says = None;
                self.refresh(number, now);
            }
        }
        let endpoint = &mut self.endpoints[number];
        if let Some(cutting) = &endpoint.cutting {
            let share = cutting.share(now);
            endpoint.target.cut.reach(share);
            if share >= 1.0 {
                endpoint.cutting = None;
            }
        }
    }

    /// What an endpoint's drain has left is being cut, so that time matters more than usual.
    pub fn is_cutting(&self) -> bool {
        self.endpoints.numbers().into_iter().any(|number| self.endpoints[number].cutting.is_some())
    }

    /// The deadline of an endpoint's drain comes before the next usual tick would.
    pub fn cuts_soon(&self, now: Instant) -> bool {
        let soon = |deadline: Instant| deadline <= now + USUAL_TICK;
        self.endpoints.numbers().into_iter().any(|number| self.endpoints[number].drain_deadline.is_some_and(soon))
    }

    /// The proxy ends: cuts every exchange up to this share of them, the first time beginning with those there are then.
    /// Whoever waits is sent away.
    pub fn cut_all(&mut self, begins: bool, share: f64) {
        self.refuse_all();
        for number in self.endpoints.numbers() {
            let endpoint = &mut self.endpoints[number];
            endpoint.cutting = None;
            if begins {
                endpoint.target.cut.begin();
            }
            endpoint.target.cut.reach(share);
        }
    }

    /// A run that ended tells how long runs take, unless something cut it off or it never began.
    pub(super) fn learn_duration(&mut self, duration: Duration, outcome: RunOutcome, now: Instant) {
        if !matches!(outcome, RunOutcome::Truncated | RunOutcome::Unknown | RunOutcome::Rejected) {
            self.durations.observe(duration, now);
        }
    }

    /// The endpoints that drain, by number, and those among them that have runs.
    pub fn draining(&self) -> Vec<(u32, bool)> {
        let numbers = self.endpoints.numbers().into_iter();
        let draining = numbers.filter(|number| self.endpoints[*number].draining());
        draining.map(|number| (number, self.endpoints[number].outstanding > 0)).collect()
    }

    /// What is to be told of the drains of endpoints. `estimates` is of those that have runs to finish.
    pub(super) fn drains(&self, estimates: &HashMap<u32, DrainEstimate>, now: Instant) -> HashMap<u32, DrainStatus> {
        let runs_seen = self.durations.runs_seen().round() as u64;
        let draining = self.draining().into_iter().map(|(number, has_runs)| {
            let endpoint = &self.endpoints[number];
            let unknown = (!has_runs).then_some(0);
            let status = DrainStatus {
                by: endpoint.drain_reasons(),
                cut_in_ms: endpoint.drain_deadline.map(|deadline| milliseconds(deadline, now)),
                empty_in: estimates.get(&number).copied().unwrap_or(DrainEstimate {
                    p50_ms: unknown,
                    p95_ms: unknown,
                    runs_seen,
                }),
            };
            (number, status)
        });
        draining.collect()
    }

    /// What a rollout now would cut if every configured endpoint, or the one at this address (or identity), were given
    /// so long to finish, without what is to be estimated: [`Rolling::estimated`]. `None`: there is no such endpoint. `grace`:
    /// [`None`] is `drain.timeout`.
    pub fn safe_to_roll(
        &mut self,
        address: Option<&str>,
        grace: Option<Duration>,
        confidence: f64,
        now: Instant,
    ) -> Option<Rolling> {
        self.advance(now);
        let grace = grace.unwrap_or(self.rules.drain_timeout);
        let named = |endpoint: &Endpoint| {
            address.is_none_or(|name| &*endpoint.target.address == name || &*endpoint.identity == name)
        };
        let numbers = self.endpoints.numbers().into_iter();
        let chosen: Vec<u32> =
            numbers.filter(|number| self.endpoints[*number].configured && named(&self.endpoints[*number])).collect();
        if chosen.is_empty() && address.is_some() {
            return None;
        }
        let endpoints = chosen.iter().map(|number| {
            let endpoint = &self.endpoints[*number];
            RollEndpoint {
                address: endpoint.target.address.to_string(),
                version: self.versions[endpoint.version].name.to_string(),
                state: self.state(endpoint),
                outstanding_runs: endpoint.outstanding,
                sessions: endpoint.sessions,
                expected_cut_runs: 0.0,
                probability_none_cut: 1.0,
                empty_in: DrainEstimate { p50_ms: None, p95_ms: None, runs_seen: 0 },
                safe: true,
            }
        });
        let report = RollReport {
            service: self.name.to_string(),
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
            confidence,
            safe: true,
            outstanding_runs: 0,
            expected_cut_runs: 0.0,
            probability_none_cut: 1.0,
            runs_seen: 0,
            endpoints: endpoints.collect(),
        };
        Some(Rolling { numbers: chosen, grace, report })
    }
}

/// A report on a rollout that lacks its estimates still.
pub struct Rolling {
    /// Of `report.endpoints`.
    numbers: Vec<u32>,
    grace: Duration,
    report: RollReport,
}

impl Rolling {
    /// Computes for a while, without the service's lock.
    pub fn estimated(self, outlook: &Outlook) -> RollReport {
        let Rolling { numbers, grace, mut report } = self;
        for (number, endpoint) in numbers.into_iter().zip(&mut report.endpoints) {
            (endpoint.probability_none_cut, endpoint.expected_cut_runs) = outlook.after(number, grace);
            endpoint.empty_in = outlook.empty_in(number);
            endpoint.safe = endpoint.probability_none_cut >= report.confidence;
        }
        let endpoints = &report.endpoints;
        report.probability_none_cut = endpoints.iter().map(|endpoint| endpoint.probability_none_cut).product();
        report.expected_cut_runs = endpoints.iter().fold(0.0, |all, endpoint| all + endpoint.expected_cut_runs);
        report.outstanding_runs = endpoints.iter().map(|endpoint| u64::from(endpoint.outstanding_runs)).sum();
        report.safe = report.probability_none_cut >= report.confidence;
        report.runs_seen = outlook.runs_seen();
        report
    }
}

fn milliseconds(until: Instant, now: Instant) -> u64 {
    u64::try_from(until.saturating_duration_since(now).as_millis()).unwrap_or(u64::MAX)
}
