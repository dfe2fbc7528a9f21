//! A day of agents, second by second: runs arrive, wait for a slot, run; pods start late and end when their runs have ended.

use std::collections::VecDeque;

use crate::hpa::controller::{Behavior, Controller, SYNC_PERIOD, from_pods, from_total};
use crate::plan::Random;

const DAY: u32 = 24 * 3600;
/// Runs that one pod can have at once (`max_per_endpoint`).
pub const SLOTS: u32 = 10;
/// Runs that one pod should have.
pub const TARGET: f64 = 7.0;
pub const PODS_MIN: u32 = 2;
pub const PODS_MAX: u32 = 40;
/// A run that waited so long is refused (`queue.timeout`).
const QUEUE_TIMEOUT: u32 = 300;
/// From the decision until a pod is ready.
const START: (f64, f64) = (20.0, 45.0);
/// Uniformly distributed.
const RUN: (f64, f64) = (30.0, 300.0);
/// A change of replicas that is no noise.
const SWING: f64 = 0.2;
/// When runs become lighter, in the setup where they do, and to which part.
const NOON: u32 = 12 * 3600;
const LIGHTER: f64 = 0.5;
/// When, how long, how many times the usual rate of arrivals.
const BURSTS: [(u32, u32, f64); 3] = [(2 * 3600, 300, 8.0), (10 * 3600, 600, 2.5), (14 * 3600 + 1800, 1200, 2.0)];
/// Of a run: it computes (parsing, tools) and waits for its model in turns, exponentially distributed around these seconds.
const COMPUTES: f64 = 3.0;
const WAITS: f64 = 12.0;
const CORES_COMPUTING: f64 = 0.25;
const CORES_WAITING: f64 = 0.005;
const CORES_OF_POD: f64 = 0.02;
/// How often the metrics server asks kubelets, in seconds.
const SCRAPE_PERIOD: u32 = 15;
/// The mean use of a pod that has as many runs as it should.
pub const CORES_TUNED: f64 =
    CORES_OF_POD + TARGET * (CORES_COMPUTING * COMPUTES + CORES_WAITING * WAITS) / (COMPUTES + WAITS);

/// What the autoscaler reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Signal {
    /// longhaul_run_demand: outstanding on pods that don't end, and waiting.
    RunDemand,
    /// The mean use of the pods, with this target in cores.
    Cpu(f64),
}

/// One way to run the agents.
#[derive(Clone, Debug)]
pub struct Setup {
    pub name: &'static str,
    pub signal: Signal,
    pub behavior: Behavior,
    /// terminationGracePeriodSeconds of the agents.
    pub grace: u32,
    /// Whether pods with the least runs are removed first (pod-deletion-cost).
    pub idle_first: bool,
    /// From noon runs compute half as much: other tools, another model.
    pub lighter_at_noon: bool,
}

/// How the day was.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub runs: u32,
    pub cut: u32,
    pub refused: u32,
    /// Of every run that was started, in seconds, sorted.
    pub waits: Vec<u32>,
    /// Pods that are there, ending ones too.
    pub pod_hours: f64,
    pub most_pods: u32,
    /// Changes of the number of replicas.
    pub moves: u32,
    /// A change up after one down, or the other way round.
    pub direction_changes: u32,
    /// Turns of more than [`SWING`] of the replicas and more than one pod.
    pub swings: u32,
    /// Every minute: runs that are there or wait.
    pub demand: Vec<u32>,
    /// Every minute: replicas.
    pub pods: Vec<u32>,
}

impl Outcome {
    pub fn wait(&self, quantile: f64) -> u32 {
        let last = self.waits.len().saturating_sub(1);
        self.waits.get((last as f64 * quantile).round() as usize).copied().unwrap_or(0)
    }

    /// The part of all runs that waited longer than this, or in vain.
    pub fn waited_over(&self, seconds: u32) -> f64 {
        let late = self.waits.iter().filter(|&&wait| wait > seconds).count() as f64 + f64::from(self.refused);
        late / f64::from(self.runs.max(1))
    }
}

struct Run {
    ends: u32,
    computes: bool,
    turns: u32,
}

struct Pod {
    ready: u32,
    /// When it is killed, once it ends.
    killed: Option<u32>,
    runs: Vec<Run>,
    /// Core seconds since the last scrape.
    used: f64,
    /// As of the last scrape.
    cores: Option<f64>,
}

struct Day<'a> {
    setup: &'a Setup,
    /// Of arrivals and runs: the same for every setup.
    arrivals: Random,
    /// Of pods and their use.
    chance: Random,
    pods: Vec<Pod>,
    /// (since, seconds that it will take)
    queue: VecDeque<(u32, u32)>,
    outcome: Outcome,
}

/// One day. The same seed gives the same runs at the same times, whatever the setup.
pub fn simulate(setup: &Setup, seed: u64) -> Outcome {
    let mut day = Day {
        setup,
        arrivals: Random::new(seed),
        chance: Random::new(seed ^ 0x5bd1_e995),
        pods: Vec::new(),
        queue: VecDeque::new(),
        outcome: Outcome::default(),
    };
    for _ in 0..PODS_MIN {
        day.pods.push(Pod::new(0));
    }
    let mut controller = Controller::new(PODS_MIN, PODS_MAX, setup.behavior.clone());
    let mut next = 0.0;
    let mut last_was_up = None;
    for now in 0..DAY {
        while next <= f64::from(now) {
            let length = RUN.0 + day.arrivals.unit() * (RUN.1 - RUN.0);
            day.queue.push_back((now, length as u32));
            day.outcome.runs += 1;
            next += day.arrivals.exponential() / rate(next as u32);
        }
        day.turn(now);
        day.place(now);
        if now % SCRAPE_PERIOD == 7 {
            day.scrape(now);
        }
        if now % SYNC_PERIOD == 0 {
            let replicas = day.replicas();
            let decided = controller.decide(now, replicas, day.recommended(now, replicas));
            if decided != replicas {
                let up = decided > replicas;
                day.outcome.moves += 1;
                day.outcome.direction_changes += u32::from(last_was_up == Some(!up));
                last_was_up = Some(up);
                day.scale(now, replicas, decided);
            }
        }
        if now % 60 == 0 {
            let demand = day.outstanding() + day.queue.len() as u32;
            let replicas = day.replicas();
            day.outcome.demand.push(demand);
            day.outcome.pods.push(replicas);
        }
        day.outcome.pod_hours += day.pods.len() as f64 / 3600.0;
        day.outcome.most_pods = day.outcome.most_pods.max(day.pods.len() as u32);
    }
    day.outcome.waits.sort_unstable();
    day.outcome.swings = swings(&day.outcome.pods);
    day.outcome
}

/// How often a line turns, where a turn counts once it has come back by more than [`SWING`], and by more than one.
fn swings(values: &[u32]) -> u32 {
    let Some(&first) = values.first() else { return 0 };
    let (mut turns, mut rising, mut low, mut high) = (0, None, first, first);
    for &value in values {
        (low, high) = (low.min(value), high.max(value));
        let fell = value + 1 < high && f64::from(value) < f64::from(high) * (1.0 - SWING);
        let rose = value > low + 1 && f64::from(low) < f64::from(value) * (1.0 - SWING);
        if fell && rising != Some(false) {
            turns += u32::from(rising.is_some());
            (rising, low) = (Some(false), value);
        } else if rose && rising != Some(true) {
            turns += u32::from(rising.is_some());
            (rising, high) = (Some(true), value);
        }
    }
    turns
}

/// Arrivals a second: few at night, most in the early afternoon, and bursts.
fn rate(now: u32) -> f64 {
    let hour = f64::from(now) / 3600.0;
    let day = (0.5 - 0.5 * ((hour - 2.0) / 24.0 * std::f64::consts::TAU).cos()).powi(2);
    let usual = 0.02 + 0.5 * day;
    let burst = BURSTS.iter().find(|(at, length, _)| (*at..at + length).contains(&now));
    usual * burst.map_or(1.0, |(_, _, times)| *times)
}

impl Pod {
    fn new(ready: u32) -> Self {
        Self { ready, killed: None, runs: Vec::new(), used: 0.0, cores: None }
    }
}

impl Day<'_> {
    fn replicas(&self) -> u32 {
        self.pods.iter().filter(|pod| pod.killed.is_none()).count() as u32
    }

    /// As longhaul counts: what runs on pods that end needs no pods.
    fn outstanding(&self) -> u32 {
        self.pods.iter().filter(|pod| pod.killed.is_none()).map(|pod| pod.runs.len() as u32).sum()
    }

    /// What goes on within pods: runs compute, wait and end; pods that end are gone when they are empty, or killed.
    fn turn(&mut self, now: u32) {
        let Self { setup, pods, chance, outcome, .. } = self;
        let part = if setup.lighter_at_noon && now >= NOON { LIGHTER } else { 1.0 };
        pods.retain_mut(|pod| {
            pod.runs.retain_mut(|run| {
                if run.turns <= now {
                    run.computes = !run.computes;
                    let mean = if run.computes { COMPUTES } else { WAITS };
                    run.turns = now + (chance.exponential() * mean).ceil() as u32;
                }
                pod.used += part * if run.computes { CORES_COMPUTING } else { CORES_WAITING };
                run.ends > now
            });
            pod.used += CORES_OF_POD;
            let Some(killed) = pod.killed else { return true };
            if now >= killed {
                outcome.cut += pod.runs.len() as u32;
                return false;
            }
            !pod.runs.is_empty()
        });
    }

    /// Whoever waits gets a slot, in order, on the ready pod with the fewest runs.
    fn place(&mut self, now: u32) {
        while let Some(&(since, length)) = self.queue.front() {
            let ready = self.pods.iter_mut().filter(|pod| pod.killed.is_none() && pod.ready <= now);
            let emptiest = ready.min_by_key(|pod| pod.runs.len()).filter(|pod| pod.runs.len() < SLOTS as usize);
            if let Some(pod) = emptiest {
                pod.runs.push(Run { ends: now + length, computes: false, turns: now + 1 });
                self.outcome.waits.push(now - since);
            } else if now - since >= QUEUE_TIMEOUT {
                self.outcome.refused += 1;
            } else {
                return;
            }
            self.queue.pop_front();
        }
    }

    fn scrape(&mut self, now: u32) {
        for pod in &mut self.pods {
            // A pod that was not there for the whole time is not known yet.
            pod.cores = (pod.ready + SCRAPE_PERIOD <= now).then_some(pod.used / f64::from(SCRAPE_PERIOD));
            pod.used = 0.0;
        }
    }

    fn recommended(&self, now: u32, replicas: u32) -> u32 {
        match self.setup.signal {
            Signal::RunDemand => from_total(f64::from(self.outstanding()) + self.queue.len() as f64, TARGET, replicas),
            Signal::Cpu(target) => {
                let staying = || self.pods.iter().filter(|pod| pod.killed.is_none());
                let uses: Vec<f64> = staying().filter(|pod| pod.ready <= now).filter_map(|pod| pod.cores).collect();
                let unready = staying().count() - uses.len();
                from_pods(&uses, target, unready as u32, replicas)
            }
        }
    }

    fn scale(&mut self, now: u32, replicas: u32, decided: u32) {
        for _ in replicas..decided {
            let start = START.0 + self.chance.unit() * (START.1 - START.0);
            self.pods.push(Pod::new(now + start as u32));
        }
        for _ in decided..replicas {
            let Self { pods, chance, setup, .. } = self;
            // As a ReplicaSet chooses: not ready first, then by deletion cost; else nobody knows.
            let staying = pods.iter_mut().filter(|pod| pod.killed.is_none());
            let chosen = staying.min_by_key(|pod| {
                let cost = if setup.idle_first { pod.runs.len() as u64 } else { 0 };
                (pod.ready <= now, cost, chance.draw())
            });
            let Some(pod) = chosen else { return };
            pod.killed = Some(now + setup.grace);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swing_is_a_turn_that_is_no_noise() {
        assert_eq!(swings(&[2, 10, 2]), 1);
        assert_eq!(swings(&[2, 10, 2, 10, 2]), 3);
        assert_eq!(swings(&[10, 11, 10, 11, 12, 11, 10]), 0, "one pod more or less");
        assert_eq!(swings(&[2, 3, 2, 3, 2]), 0, "one pod, though it is a third");
        assert_eq!(swings(&[2, 4, 6, 8, 10, 9, 8, 7, 6]), 1);
        assert_eq!(swings(&[]), 0);
    }

    #[test]
    fn every_run_has_one_end() {
        let day = |signal| Setup {
            name: "",
            signal,
            behavior: Behavior::default_of_kubernetes(),
            grace: 30,
            idle_first: false,
            lighter_at_noon: false,
        };
        let outcome = simulate(&day(Signal::Cpu(0.7)), 3);
        let started = outcome.waits.len() as u32;
        let waiting = outcome.runs - started - outcome.refused;
        assert!(outcome.refused > 0 && waiting < 50, "{} runs, {started} started", outcome.runs);
        let again = simulate(&day(Signal::Cpu(0.7)), 3);
        assert_eq!((again.cut, again.waits), (outcome.cut, outcome.waits), "the same seed, the same day");
        assert_eq!(simulate(&day(Signal::RunDemand), 3).runs, outcome.runs, "the same runs, whatever scales");
    }
}
