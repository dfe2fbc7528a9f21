//! Simulation: whole rollouts with runs drawn by chance, to see how often the judge errs. docs/rollouts.md has the figures.
//!
//! Runs come at random moments, overlap, and are seen in the order in which they end, as in a proxy: a slow run is seen
//! late. `LONGHAUL_SIMULATIONS=2000` makes so many rollouts of each kind instead of 40 or 100, and prints the table.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::rollout::testing::plan;
use crate::rollout::{EndedRun, Ending, Moment, Place, Rollout, Side};

/// Runs of both versions together, in each second.
const RUNS_A_SECOND: f64 = 2.5;

/// Between two calls of [`Rollout::advance`]; the end of a run of `to` is looked at anyway.
const LOOK_EVERY_MS: u64 = 5000;

/// One kind of rollout.
#[derive(Clone, Copy)]
struct Scenario {
    name: &'static str,
    steps: &'static [(f64, u64)],
    from: Version,
    to: Version,
    /// Runs that a session has, all of which end alike if the first one fails.
    runs_a_session: u64,
}

#[derive(Clone, Copy)]
struct Version {
    failing: f64,
    /// Median seconds of a run.
    median: f64,
    /// Of the logarithm of its duration.
    sigma: f64,
}

/// Shares and seconds: 1 %, 10 % and 50 %, then 100 %. About 12,000 runs, 2,400 of them of the new version.
const FOUR_STEPS: &[(f64, u64)] = &[(0.01, 2000), (0.1, 1200), (0.5, 1600), (1.0, 0)];
/// Half at once: `from` has no more runs than `to`.
const HALF: &[(f64, u64)] = &[(0.5, 1600), (1.0, 0)];
const LONG_HALF: &[(f64, u64)] = &[(0.5, 3200), (1.0, 0)];

const fn version(failing: f64) -> Version {
    Version { failing, median: 20.0, sigma: 1.0 }
}

const fn scenario(name: &'static str, steps: &'static [(f64, u64)], from: Version, to: Version) -> Scenario {
    Scenario { name, steps, from, to, runs_a_session: 1 }
}

/// What became of many rollouts of one kind.
struct Outcome {
    rollouts: usize,
    aborted: usize,
    /// Of those, the ones that took at most 100 runs of `to`.
    within_100: usize,
    /// Runs of `to` that the aborted ones took, sorted.
    taken: Vec<u64>,
}

impl Scenario {
    /// So many rollouts, or as many as `LONGHAUL_SIMULATIONS` asks for.
    fn simulate(&self, rollouts: usize) -> Outcome {
        let asked = std::env::var("LONGHAUL_SIMULATIONS").ok();
        let rollouts = asked.as_ref().map_or(rollouts, |text| text.parse().expect("LONGHAUL_SIMULATIONS is a number"));
        let mut taken: Vec<u64> = (0..rollouts).filter_map(|seed| self.runs_until_abort(seed as u64)).collect();
        taken.sort_unstable();
        let within_100 = taken.iter().filter(|runs| **runs <= 100).count();
        let outcome = Outcome { rollouts, aborted: taken.len(), within_100, taken };
        if asked.is_some() {
            self.print(&outcome);
        }
        outcome
    }

    /// A line of the table in docs/rollouts.md.
    fn print(&self, outcome: &Outcome) {
        let percent = |count: usize| 100.0 * count as f64 / outcome.rollouts as f64;
        let at = |part: f64| outcome.taken.get((part * outcome.taken.len() as f64) as usize);
        let runs = match (at(0.5), at(0.95)) {
            (Some(half), Some(most)) => format!("{half}, {most}"),
            _ => String::new(),
        };
        let (aborted, within) = (percent(outcome.aborted), percent(outcome.within_100));
        println!("| {} | {aborted:.1} % | {within:.1} % | {runs} |", self.name);
    }

    /// The runs of `to` that were seen when the rollout was aborted; `None`: it completed.
    fn runs_until_abort(&self, seed: u64) -> Option<u64> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut rollout = Rollout::load(&plan(self.steps), None, Moment(0));
        let mut under_way: BinaryHeap<Reverse<(u64, u64, u64)>> = BinaryHeap::new();
        let mut ended: Vec<EndedRun> = Vec::new();
        let mut arrives = 0.0;
        let mut seen = 0;
        let mut next_look = 0;
        loop {
            arrives -= 1000.0 * self.runs_a_session as f64 / RUNS_A_SECOND * (1.0 - rng.random::<f64>()).ln();
            let now = arrives as u64;
            while let Some(Reverse((at, _, index))) = under_way.peek().copied()
                && at <= now
            {
                under_way.pop();
                let run = ended[index as usize];
                seen += u64::from(run.side == Side::To);
                rollout.observe(run, Moment(at));
                if at >= next_look {
                    rollout.advance(Moment(at));
                    next_look = at + LOOK_EVERY_MS;
                }
                match rollout.place() {
                    Place::Running { .. } => {}
                    Place::Completed => return None,
                    Place::Aborted => return Some(seen),
                    other => panic!("{other} without a command"),
                }
            }
            let share = rollout.report_share();
            let side = if rng.random::<f64>() < share { Side::To } else { Side::From };
            let version = if side == Side::To { self.to } else { self.from };
            let fails = rng.random::<f64>() < version.failing;
            for _ in 0..self.runs_a_session {
                let run = version.run(side, fails, now, &mut rng);
                let index = ended.len() as u64;
                under_way.push(Reverse((now + run.duration.as_millis() as u64, index, index)));
                ended.push(run);
            }
        }
    }
}

impl Version {
    fn run(self, side: Side, fails: bool, now: u64, rng: &mut StdRng) -> EndedRun {
        let mut normal = || {
            // Box and Muller.
            let (radius, angle) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
            (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
        };
        let seconds = self.median * (self.sigma * normal()).exp();
        // The first event comes at a tenth, more or less.
        let first_event = seconds.min(0.1 * self.median * (self.sigma * normal()).exp());
        let part = if fails { rng.random::<f64>() } else { 1.0 };
        EndedRun {
            side,
            ending: if fails { Ending::Bad } else { Ending::Good },
            born: Moment(now),
            first_event: (first_event <= seconds * part).then(|| Duration::from_secs_f64(first_event)),
            duration: Duration::from_secs_f64(seconds * part),
        }
    }
}

impl Rollout {
    fn report_share(&self) -> f64 {
        self.share_parts() as f64 / crate::rollout::WEIGHT_UNIT as f64
    }
}

/// Of 100 at least so many are aborted within 100 runs of the new version.
fn assert_caught_early(scenario: Scenario, least: usize) {
    let Outcome { within_100, rollouts, .. } = scenario.simulate(100);
    assert!(within_100 * 100 >= rollouts * least, "{}: only {within_100} of {rollouts}", scenario.name);
}

/// At least 95 of 100 are aborted at some time.
fn assert_caught(scenario: Scenario) {
    let Outcome { aborted, rollouts, .. } = scenario.simulate(40);
    assert!(aborted * 100 >= rollouts * 95, "{}: only {aborted} of {rollouts}", scenario.name);
}

/// Only a line of the table: what is told there is that it is seldom seen.
fn more_seeds_only(scenario: Scenario) {
    if std::env::var_os("LONGHAUL_SIMULATIONS").is_some() {
        scenario.simulate(100);
    }
}

/// At most 5 of 100 are aborted.
fn assert_left_alone(scenario: Scenario) {
    let Outcome { aborted, rollouts, .. } = scenario.simulate(100);
    assert!(aborted * 100 <= rollouts * 5, "{}: {aborted} of {rollouts} were aborted", scenario.name);
}

#[test]
fn a_canary_that_fails_a_fifth_of_its_runs_is_caught_within_100_of_them() {
    let bad = version(0.2);
    assert_caught_early(scenario("fails 20 %, stable 0 %", FOUR_STEPS, version(0.0), bad), 95);
    assert_caught_early(scenario("fails 20 %, stable 1 %", FOUR_STEPS, version(0.01), bad), 95);
    // With 100 runs of `from` less can be known.
    assert_caught_early(scenario("fails 20 %, stable 0 %, half at once", HALF, version(0.0), bad), 95);
    assert_caught_early(scenario("fails 20 %, stable 1 %, half at once", HALF, version(0.01), bad), 92);
}

#[test]
fn a_canary_that_fails_less_is_caught_later() {
    assert_caught(scenario("fails 10 %, stable 1 %", FOUR_STEPS, version(0.01), version(0.1)));
    more_seeds_only(scenario("fails 5 %, stable 1 %", FOUR_STEPS, version(0.01), version(0.05)));
}

#[test]
fn a_canary_as_good_as_a_stable_that_never_fails_is_left_alone() {
    assert_left_alone(scenario("both fail 0 %", FOUR_STEPS, version(0.0), version(0.0)));
}

#[test]
fn a_canary_as_good_as_a_stable_that_fails_1_of_100_is_left_alone() {
    assert_left_alone(scenario("both fail 1 %", FOUR_STEPS, version(0.01), version(0.01)));
}

#[test]
fn a_canary_as_good_as_a_stable_that_fails_6_of_100_is_left_alone() {
    assert_left_alone(scenario("both fail 6 %", FOUR_STEPS, version(0.06), version(0.06)));
}

#[test]
fn a_canary_at_its_limits_is_left_alone() {
    // The worst that is allowed, where every error counts: twice as many failures, times half as long again.
    let slower = Version { median: 30.0, ..version(0.02) };
    assert_left_alone(scenario(
        "at the limits: fails 2 % and 1.5 times as slow, stable 1 %",
        HALF,
        version(0.01),
        slower,
    ));
}

#[test]
fn a_slower_canary_is_caught_by_its_times() {
    let slow = |sigma| Version { median: 40.0, sigma, ..version(0.0) };
    let stable = |sigma| Version { sigma, ..version(0.0) };
    assert_caught(scenario("twice as slow, sigma 0.5", FOUR_STEPS, stable(0.5), slow(0.5)));
    assert_caught(scenario("twice as slow, sigma 1, half of 8,000", LONG_HALF, stable(1.0), slow(1.0)));
    more_seeds_only(scenario("twice as slow, sigma 1", FOUR_STEPS, stable(1.0), slow(1.0)));
}

/// What the figures presume, and what happens where it is not so: runs of one session that all fail together are fewer
/// facts than they seem.
#[test]
fn sessions_that_fail_as_a_whole_are_seen_as_many_failures() {
    let sessions_of = |runs_a_session, name| {
        let both = version(0.01);
        Scenario { runs_a_session, ..scenario(name, FOUR_STEPS, both, both) }
    };
    assert_left_alone(sessions_of(2, "both fail 1 %, 2 runs a session that fail together"));
    more_seeds_only(sessions_of(5, "both fail 1 %, 5 runs a session that fail together"));
    more_seeds_only(sessions_of(20, "both fail 1 %, 20 runs a session that fail together"));
}
