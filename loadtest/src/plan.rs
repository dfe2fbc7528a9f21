//! The plan of a load test: who arrives when and asks for what, drawn from a seed, so that the same plan can be
//! replayed against another target or in a simulation.

use crate::clock::nanoseconds;
use crate::workload::{Length, Process, SESSIONS_MAX, Work, Workload};

/// A session that arrives.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedSession {
    /// From the start of the test, in nanoseconds.
    pub at_ns: u64,
    pub number: u64,
    pub turns: Vec<PlannedRun>,
}

/// One turn of a session.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlannedRun {
    /// Which item of the workload's mix.
    pub item: usize,
    /// How long the agent is asked to take, in nanoseconds.
    pub time_ns: u64,
    /// The pause before this turn, in nanoseconds.
    pub think_ns: u64,
    /// When the client leaves, if it does, in nanoseconds from the start of the run.
    pub abort_after_ns: Option<u64>,
}

/// Draws sessions in the order of their arrival.
pub struct Planner<'a> {
    workload: &'a Workload,
    random: Random,
    at_ns: f64,
    number: u64,
    weight_total: f64,
}

impl<'a> Planner<'a> {
    pub fn new(workload: &'a Workload) -> Self {
        let weight_total = workload.mix.iter().map(|item| item.weight).sum();
        Self { workload, random: Random::new(workload.seed), at_ns: 0.0, number: 0, weight_total }
    }

    fn turn(&mut self, first: bool) -> PlannedRun {
        let item = self.item();
        let time_ns = match &self.workload.mix[item].work {
            Work::Run { time } | Work::Job { time, .. } => self.length_ns(*time),
            Work::Stream { events: count, interval, .. } | Work::WebSocket { messages: count, interval, .. } => {
                // The first comes at once: n of them leave n - 1 intervals between.
                nanoseconds(interval.0) * u64::from(count.saturating_sub(1))
            }
            Work::Idle | Work::Short { .. } => 0,
        };
        let think_ns = if first { 0 } else { self.length_ns(self.workload.session.think) };
        let leaves = self.workload.abort > 0.0 && self.random.unit() < self.workload.abort;
        let abort_after_ns = leaves.then(|| (self.random.unit() * time_ns as f64) as u64);
        PlannedRun { item, time_ns, think_ns, abort_after_ns }
    }

    fn item(&mut self) -> usize {
        if self.workload.mix.len() == 1 {
            return 0;
        }
        let mut left = self.random.unit() * self.weight_total;
        for (index, item) in self.workload.mix.iter().enumerate() {
            left -= item.weight;
            if left < 0.0 {
                return index;
            }
        }
        self.workload.mix.len() - 1
    }

    fn length_ns(&mut self, length: Length) -> u64 {
        match length {
            Length::Fixed(span) => nanoseconds(span.0),
            Length::Uniform { min, max } => {
                let (min, max) = (nanoseconds(min.0), nanoseconds(max.0));
                min + (self.random.unit() * max.saturating_sub(min) as f64) as u64
            }
            Length::Exponential { mean } => (self.random.exponential() * nanoseconds(mean.0) as f64) as u64,
        }
    }
}

impl Iterator for Planner<'_> {
    type Item = PlannedSession;

    /// The next session; `None` after the duration or the limit. In a closed loop times of arrival mean nothing.
    fn next(&mut self) -> Option<PlannedSession> {
        let arrivals = &self.workload.arrivals;
        let limit = if arrivals.limit == 0 { SESSIONS_MAX } else { arrivals.limit };
        let open = arrivals.concurrency.is_none();
        if self.number >= limit || (open && self.at_ns >= nanoseconds(arrivals.duration.0) as f64) {
            return None;
        }
        let at_ns = self.at_ns as u64;
        if open {
            let gap = match arrivals.process {
                Process::Constant => 1.0,
                Process::Poisson => self.random.exponential(),
            };
            self.at_ns += gap / arrivals.rate * 1e9;
        }
        let number = self.number;
        self.number += 1;
        let turns = (0..self.workload.session.turns).map(|turn| self.turn(turn == 0)).collect();
        Some(PlannedSession { at_ns, number, turns })
    }
}

/// SplitMix64: small, fast, and the same on every machine for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// At least 0, less than 1.
    pub fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Exponentially distributed with mean 1.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::workload::{Arrivals, Span};

    fn workload(text: &str) -> Workload {
        Workload::parse(&format!("target: x\n{text}")).unwrap()
    }

    #[test]
    fn constant_arrivals_are_evenly_spaced() {
        let workload = workload("mix: [{kind: short}]\narrivals: {rate: 100, process: constant, duration: 1s}");
        let times: Vec<u64> = Planner::new(&workload).map(|session| session.at_ns).collect();
        assert_eq!(times.len(), 100);
        assert!(times.windows(2).all(|pair| (9_999_999..=10_000_001).contains(&(pair[1] - pair[0]))));
    }

    #[test]
    fn poisson_arrivals_have_the_rate_and_the_variance() {
        let workload = workload("mix: [{kind: short}]\narrivals: {rate: 1000, duration: 60s}");
        let times: Vec<f64> = Planner::new(&workload).map(|session| session.at_ns as f64 / 1e6).collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean - 1.0).abs() < 0.02, "mean gap {mean} ms");
        assert!((variance - 1.0).abs() < 0.05, "variance {variance}");
    }

    #[test]
    fn the_same_seed_draws_the_same_plan() {
        let mut workload = workload("mix: [{kind: run, time: {mean: 1s}}, {kind: short}]\nabort: 0.5");
        let plan = |workload: &Workload| Planner::new(workload).collect::<Vec<_>>();
        let first = plan(&workload);
        assert_eq!(first, plan(&workload));
        workload.seed = 2;
        assert_ne!(first, plan(&workload));
    }

    #[test]
    fn the_mix_follows_its_weights_and_aborts_fall_within_the_run() {
        let mut workload = workload("mix: [{kind: run, time: 1s, weight: 4}, {kind: short}]\nabort: 0.25");
        workload.arrivals = Arrivals { rate: 1e4, duration: Span(Duration::from_secs(1)), ..workload.arrivals.clone() };
        let runs: Vec<PlannedRun> = Planner::new(&workload).flat_map(|session| session.turns).collect();
        let share = |count: usize| count as f64 / runs.len() as f64;
        assert!((share(runs.iter().filter(|run| run.item == 0).count()) - 0.8).abs() < 0.02);
        assert!((share(runs.iter().filter(|run| run.abort_after_ns.is_some()).count()) - 0.25).abs() < 0.02);
        assert!(runs.iter().all(|run| run.abort_after_ns.is_none_or(|after| after <= run.time_ns)));
    }

    #[test]
    fn only_later_turns_are_thought_about() {
        let workload = workload("mix: [{kind: short}]\nsession: {turns: 3, think: 2s}\narrivals: {limit: 1}");
        let session = Planner::new(&workload).next().unwrap();
        let thinks: Vec<u64> = session.turns.iter().map(|turn| turn.think_ns).collect();
        assert_eq!(thinks, [0, 2_000_000_000, 2_000_000_000]);
    }
}
