//! Drain: endpoints that finish what they have. Who may say so, how what is left at the deadline is cut, and when they will
//! be empty.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::estimate::{Ages, Survival};
use crate::run::RunOutcome;
use crate::state::core::Core;
use crate::state::endpoints::{Cutting, Endpoint, Says};
use crate::state::status::{DrainEstimate, DrainStatus, RollEndpoint, RollReport};

/// What is left at a deadline is cut within this part of the drain's time-out, so that clients don't come back all at once.
pub const SPREAD_PART: u32 = 10;

impl Core {
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
            _ => return,
        }
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

    /// The ages of the outstanding runs, by endpoint. One look at every run of the service.
    fn ages(&self, now: Instant) -> HashMap<u32, Ages> {
        let mut by_endpoint: HashMap<u32, Ages> = HashMap::new();
        for (_, run) in self.runs.iter() {
            by_endpoint.entry(run.endpoint).or_default().add(run.age(now));
        }
        by_endpoint
    }

    /// What is to be told of the drains of endpoints. Nothing is computed where none has a run to finish.
    pub(super) fn drains(&self, now: Instant) -> HashMap<u32, DrainStatus> {
        let numbers = self.endpoints.numbers();
        let draining: Vec<u32> = numbers.into_iter().filter(|number| self.endpoints[*number].draining()).collect();
        let is_needed = draining.iter().any(|number| self.endpoints[*number].outstanding > 0);
        let ages = if is_needed { self.ages(now) } else { HashMap::new() };
        let survival = is_needed.then(|| self.survival(&ages));
        let none = Ages::default();
        draining
            .into_iter()
            .map(|number| {
                let endpoint = &self.endpoints[number];
                let ages = ages.get(&number).unwrap_or(&none);
                let status = DrainStatus {
                    by: endpoint.drain_reasons(),
                    cut_in_ms: endpoint.drain_deadline.map(|deadline| milliseconds(deadline, now)),
                    empty_in: self.estimate(survival.as_ref(), ages),
                };
                (number, status)
            })
            .collect()
    }

    fn survival(&self, ages: &HashMap<u32, Ages>) -> Survival {
        let mut all = Ages::default();
        ages.values().for_each(|ages| all.merge(ages));
        Survival::new(&self.durations, &all)
    }

    fn estimate(&self, survival: Option<&Survival>, ages: &Ages) -> DrainEstimate {
        let within = |probability| match survival {
            Some(survival) => survival.empty_within(ages, probability),
            None => Some(Duration::ZERO),
        };
        let whole = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        DrainEstimate {
            p50_ms: within(0.5).map(whole),
            p95_ms: within(0.95).map(whole),
            runs_seen: self.durations.runs_seen().round() as u64,
        }
    }

    /// What a rollout now would cut if every configured endpoint, or the one at this address (or identity), were given
    /// so long to finish. `None`: there is no such endpoint. `grace`: [`None`] is `drain.timeout`.
    pub fn safe_to_roll(
        &mut self,
        address: Option<&str>,
        grace: Option<Duration>,
        confidence: f64,
        now: Instant,
    ) -> Option<RollReport> {
        let now = self.advance(now);
        let grace = grace.unwrap_or(self.rules.drain_timeout);
        let named = |endpoint: &Endpoint| {
            address.is_none_or(|name| &*endpoint.target.address == name || &*endpoint.identity == name)
        };
        let numbers = self.endpoints.numbers();
        let chosen: Vec<u32> = numbers
            .into_iter()
            .filter(|number| self.endpoints[*number].configured && named(&self.endpoints[*number]))
            .collect();
        if chosen.is_empty() && address.is_some() {
            return None;
        }
        let ages = self.ages(now);
        let survival = self.survival(&ages);
        let none = Ages::default();
        let endpoints: Vec<RollEndpoint> = chosen
            .into_iter()
            .map(|number| {
                let endpoint = &self.endpoints[number];
                let ages = ages.get(&number).unwrap_or(&none);
                let probability_none_cut = survival.all_ended(ages, grace);
                RollEndpoint {
                    address: endpoint.target.address.to_string(),
                    version: self.versions[endpoint.version].name.to_string(),
                    state: self.state(endpoint),
                    outstanding_runs: endpoint.outstanding,
                    sessions: endpoint.sessions,
                    expected_cut_runs: survival.expected_left(ages, grace),
                    probability_none_cut,
                    empty_in: self.estimate(Some(&survival), ages),
                    safe: probability_none_cut >= confidence,
                }
            })
            .collect();
        let probability_none_cut = endpoints.iter().map(|endpoint| endpoint.probability_none_cut).product();
        Some(RollReport {
            service: self.name.to_string(),
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
            confidence,
            safe: probability_none_cut >= confidence,
            outstanding_runs: endpoints.iter().map(|endpoint| u64::from(endpoint.outstanding_runs)).sum(),
            expected_cut_runs: endpoints.iter().map(|endpoint| endpoint.expected_cut_runs).sum(),
            probability_none_cut,
            runs_seen: self.durations.runs_seen().round() as u64,
            endpoints,
        })
    }
}

fn milliseconds(until: Instant, now: Instant) -> u64 {
    u64::try_from(until.saturating_duration_since(now).as_millis()).unwrap_or(u64::MAX)
}
