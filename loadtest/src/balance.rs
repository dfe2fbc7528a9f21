//! How evenly outstanding runs lie on backends over time: measured by the mock agent, and simulated for ideal policies.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use serde::{Deserialize, Serialize};

use crate::plan::Random;

/// Outstanding runs of each backend, and their spread summed over time.
#[derive(Clone, Debug)]
pub struct Balance {
    outstanding: Vec<u32>,
    started_ns: u64,
    changed_ns: u64,
    mean_area: f64,
    deviation_area: f64,
    range_area: f64,
}

/// Averages over time, of outstanding runs a backend.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Spread {
    pub seconds: f64,
    pub mean: f64,
    /// The standard deviation over the backends.
    pub deviation: f64,
    /// The most loaded backend less the least loaded one.
    pub range: f64,
}

impl Balance {
    pub fn new(backends: usize, now_ns: u64) -> Self {
        let outstanding = vec![0; backends];
        Self {
            outstanding,
            started_ns: now_ns,
            changed_ns: now_ns,
            mean_area: 0.0,
            deviation_area: 0.0,
            range_area: 0.0,
        }
    }

    pub fn outstanding(&self) -> &[u32] {
        &self.outstanding
    }

    pub fn start(&mut self, backend: usize, now_ns: u64) {
        self.advance(now_ns);
        self.outstanding[backend] += 1;
    }

    pub fn end(&mut self, backend: usize, now_ns: u64) {
        self.advance(now_ns);
        self.outstanding[backend] -= 1;
    }

    /// Forgets the past, keeps what is outstanding.
    pub fn restart(&mut self, now_ns: u64) {
        let outstanding = std::mem::take(&mut self.outstanding);
        *self = Self { outstanding, ..Self::new(0, now_ns) };
    }

    pub fn spread(&mut self, now_ns: u64) -> Spread {
        self.advance(now_ns);
        let area = self.changed_ns.saturating_sub(self.started_ns) as f64;
        let per = |sum: f64| if area == 0.0 { 0.0 } else { sum / area };
        Spread {
            seconds: area / 1e9,
            mean: per(self.mean_area),
            deviation: per(self.deviation_area),
            range: per(self.range_area),
        }
    }

    fn advance(&mut self, now_ns: u64) {
        let elapsed = now_ns.saturating_sub(self.changed_ns) as f64;
        self.changed_ns = self.changed_ns.max(now_ns);
        let count = self.outstanding.len() as f64;
        if elapsed == 0.0 || count == 0.0 {
            return;
        }
        let mean = self.outstanding.iter().map(|&runs| f64::from(runs)).sum::<f64>() / count;
        let variance = self.outstanding.iter().map(|&runs| (f64::from(runs) - mean).powi(2)).sum::<f64>() / count;
        let most = self.outstanding.iter().max().copied().unwrap_or(0);
        let least = self.outstanding.iter().min().copied().unwrap_or(0);
        self.mean_area += mean * elapsed;
        self.deviation_area += variance.sqrt() * elapsed;
        self.range_area += f64::from(most - least) * elapsed;
    }
}

/// How a simulated balancer picks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Policy {
    /// The backend with the fewest outstanding runs at that instant, ties in turn: nothing that sees only counts does better.
    JoinShortestQueue,
    Random,
    RoundRobin,
}

/// What a policy would have made of a trace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Simulated {
    pub spread: Spread,
    /// How long each run waited for a free place at its backend, in nanoseconds, in order of arrival.
    pub waits_ns: Vec<u64>,
}

/// Replays `trace` (arrival and length of each run, in nanoseconds, sorted by arrival) on `backends` backends that
/// serve `slots` runs at once each and the rest in order. The spread is taken over `window_ns`.
pub fn simulate(
    policy: Policy,
    trace: &[(u64, u64)],
    backends: usize,
    slots: usize,
    window_ns: std::ops::Range<u64>,
) -> Simulated {
    let mut balance = Balance::new(backends, 0);
    let mut free_at: Vec<BinaryHeap<Reverse<u64>>> = vec![(0..slots).map(|_| Reverse(0)).collect(); backends];
    let mut departures: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    let mut waits_ns = Vec::with_capacity(trace.len());
    let mut turn = 0;
    let mut random = Random::new(1);
    let mut window_open = false;
    let mut clip = |balance: &mut Balance, now_ns: u64| {
        if !window_open && now_ns >= window_ns.start {
            balance.advance(window_ns.start);
            balance.restart(window_ns.start);
            window_open = true;
        }
    };
    for &(arrival_ns, length_ns) in trace.iter().take_while(|(arrival_ns, _)| *arrival_ns < window_ns.end) {
        while let Some(&Reverse((departure_ns, backend))) = departures.peek().filter(|next| next.0.0 <= arrival_ns) {
            departures.pop();
            clip(&mut balance, departure_ns);
            balance.end(backend, departure_ns);
        }
        clip(&mut balance, arrival_ns);
        let backend = match policy {
            Policy::JoinShortestQueue => (0..backends)
                .map(|offset| (turn + offset) % backends)
                .min_by_key(|&backend| balance.outstanding()[backend])
                .unwrap_or(0),
            Policy::Random => (random.draw() % backends as u64) as usize,
            Policy::RoundRobin => turn % backends,
        };
        turn = backend + 1;
        balance.start(backend, arrival_ns);
        let start_ns = free_at[backend].pop().map_or(arrival_ns, |Reverse(free_ns)| free_ns.max(arrival_ns));
        free_at[backend].push(Reverse(start_ns + length_ns));
        departures.push(Reverse((start_ns + length_ns, backend)));
        waits_ns.push(start_ns - arrival_ns);
    }
    while let Some(Reverse((departure_ns, backend))) = departures.pop().filter(|next| next.0.0 < window_ns.end) {
        clip(&mut balance, departure_ns);
        balance.end(backend, departure_ns);
    }
    clip(&mut balance, window_ns.end);
    Simulated { spread: balance.spread(window_ns.end), waits_ns }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_averaged_over_time() {
        let mut balance = Balance::new(2, 0);
        balance.start(0, 0);
        balance.start(0, 500);
        balance.end(0, 1000);
        balance.end(0, 1000);
        let spread = balance.spread(2000);
        assert_eq!((spread.mean, spread.deviation, spread.range), (0.375, 0.375, 0.75));
        balance.start(1, 2000);
        balance.restart(3000);
        assert_eq!(balance.spread(4000).range, 1.0, "what is outstanding outlives a restart");
    }

    #[test]
    fn join_shortest_queue_by_hand() {
        // Two backends with one place: the third run must wait for the shorter of the first two.
        let trace = [(0, 100), (10, 50), (20, 30), (200, 10)];
        let simulated = simulate(Policy::JoinShortestQueue, &trace, 2, 1, 0..300);
        assert_eq!(simulated.waits_ns, [0, 0, 80, 0], "a tie goes on to the next backend in turn");
        let simulated = simulate(Policy::JoinShortestQueue, &trace[..2], 2, 1, 0..100);
        // (1,0) for 10, (1,1) for 50, (1,0) for 40.
        assert_eq!(simulated.spread.range, 0.5);
    }

    #[test]
    fn join_shortest_queue_beats_round_robin_and_random() {
        let mut random = Random::new(7);
        let mut at_ns = 0.0;
        let trace: Vec<(u64, u64)> = (0..20_000)
            .map(|_| {
                at_ns += random.exponential() * 1000.0;
                let mean = if random.unit() < 0.8 { 4_000.0 } else { 90_000.0 };
                (at_ns as u64, (random.exponential() * mean) as u64)
            })
            .collect();
        let window = 1_000_000..at_ns as u64;
        let results = [Policy::JoinShortestQueue, Policy::RoundRobin, Policy::Random].map(|policy| {
            let simulated = simulate(policy, &trace, 10, 4, window.clone());
            let wait = simulated.waits_ns.iter().sum::<u64>() / simulated.waits_ns.len() as u64;
            (simulated.spread.deviation, wait)
        });
        assert!(results[0].0 < 0.7 * results[1].0 && results[1].0 < results[2].0, "{results:?}");
        assert!(results[0].1 < results[1].1 && results[1].1 < results[2].1, "{results:?}");
    }

    #[test]
    fn an_empty_trace_is_all_zero() {
        assert_eq!(simulate(Policy::RoundRobin, &[], 3, 1, 0..1000).spread.range, 0.0);
    }
}
