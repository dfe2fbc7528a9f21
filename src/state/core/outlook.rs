//! Outlook: what estimates of drains and rollouts rest on, gathered in steps: with a hundred thousand runs outstanding,
//! nobody else is to wait for the service's lock while all of them are looked at, or while it is computed.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::estimate::{Ages, Durations, Survival};
use crate::state::core::Core;
use crate::state::status::DrainEstimate;

/// How old the outstanding runs are, by endpoint, and how long others took. An endpoint that leaves and one that takes its
/// number between two steps may be taken for each other: an estimate.
pub struct Outlook {
    durations: Durations,
    by_endpoint: HashMap<u32, Ages>,
    survival: Option<Survival>,
    none: Ages,
}

impl Core {
    /// Begins to gather; [`Core::look_at_runs`] follows, and [`Outlook::conclude`].
    pub fn begin_outlook(&self) -> Outlook {
        let durations = self.durations.clone();
        Outlook { durations, by_endpoint: HashMap::new(), survival: None, none: Ages::default() }
    }

    /// Some endpoint that drains has runs, so that there is something to estimate.
    pub fn drains_with_runs(&self) -> bool {
        let has_runs = |number: u32| self.endpoints[number].draining() && self.endpoints[number].outstanding > 0;
        self.endpoints.numbers().into_iter().any(has_runs)
    }

    /// Looks at the runs of the slots `from..from + count`. Returns the next slot, or `None` at the end: the caller goes
    /// on from there, with the lock released in between.
    pub fn look_at_runs(&self, outlook: &mut Outlook, from: u32, count: u32, now: Instant) -> Option<u32> {
        let end = from.saturating_add(count);
        for run in self.runs.between(from, end) {
            outlook.by_endpoint.entry(run.endpoint).or_default().add(run.age(now));
        }
        (end < self.runs.slots()).then_some(end)
    }

    /// All of it in one step, for whoever holds the core alone.
    pub fn outlook(&self, now: Instant) -> Outlook {
        let mut outlook = self.begin_outlook();
        self.look_at_runs(&mut outlook, 0, u32::MAX, now);
        outlook.conclude();
        outlook
    }
}

impl Outlook {
    /// Everything was looked at. To be called without the lock, as it computes for a while.
    pub fn conclude(&mut self) {
        let mut all = Ages::default();
        self.by_endpoint.values().for_each(|ages| all.merge(ages));
        self.survival = Some(Survival::new(&self.durations, &all));
    }

    pub(super) fn runs_seen(&self) -> u64 {
        self.durations.runs_seen().round() as u64
    }

    /// When the endpoint of this number will be empty.
    pub fn empty_in(&self, number: u32) -> DrainEstimate {
        let ages = self.ages(number);
        let within = |probability| self.survival.as_ref().and_then(|survival| survival.empty_within(ages, probability));
        let whole = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        DrainEstimate { p50_ms: within(0.5).map(whole), p95_ms: within(0.95).map(whole), runs_seen: self.runs_seen() }
    }

    /// The probability that none of an endpoint's runs outlasts this time, and how many do on average.
    pub(super) fn after(&self, number: u32, grace: Duration) -> (f64, f64) {
        let ages = self.ages(number);
        self.survival
            .as_ref()
            .map_or((1.0, 0.0), |survival| (survival.all_ended(ages, grace), survival.expected_left(ages, grace)))
    }

    fn ages(&self, number: u32) -> &Ages {
        self.by_endpoint.get(&number).unwrap_or(&self.none)
    }
}
