//! Rate: how fast a service's slots are handed on, measured, and what that means for whoever is told to come again.

use std::time::{Duration, Instant};

/// Over how long the past counts. Runs take minutes, so a few of them must be in sight.
const MEMORY: Duration = Duration::from_secs(120);

/// What is told before anything was seen.
const RETRY_UNKNOWN: Duration = Duration::from_secs(5);

/// What is told at most: who comes back later than that has found another way.
pub const RETRY_MAX: Duration = Duration::from_secs(300);

/// An exponentially weighted rate: each event counts 1 and fades with [`MEMORY`].
#[derive(Default)]
pub struct Rate {
    since: Option<Instant>,
    /// Events, faded up to `updated`.
    count: f64,
    updated: Option<Instant>,
}

impl Rate {
    /// Watching begins. An event before that begins it, too.
    pub fn begin(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// A slot was handed on, or became free.
    pub fn event(&mut self, now: Instant) {
        self.begin(now);
        self.count = self.faded(now) + 1.0;
        self.updated = Some(self.updated.map_or(now, |updated| updated.max(now)));
    }

    /// Events per second; `None` before the first.
    pub fn per_second(&self, now: Instant) -> Option<f64> {
        self.updated?;
        let watched = now.saturating_duration_since(self.since?).as_secs_f64().max(1.0);
        // As if the past before the beginning had not been: a young measurement is not a low one.
        let memory = MEMORY.as_secs_f64();
        Some(self.faded(now) / (memory * -(-watched / memory).exp_m1()))
    }

    /// `Retry-After` for somebody who would stand behind `ahead` others: whole seconds from 1 to [`RETRY_MAX`].
    pub fn retry_after(&self, ahead: usize, now: Instant) -> Duration {
        let Some(rate) = self.per_second(now) else { return RETRY_UNKNOWN };
        let seconds = (ahead as f64 + 1.0) / rate;
        // A rate that has faded to nothing gives infinity, which is more than the most.
        Duration::from_secs(seconds.ceil().clamp(1.0, RETRY_MAX.as_secs_f64()) as u64)
    }

    fn faded(&self, now: Instant) -> f64 {
        let Some(updated) = self.updated else { return 0.0 };
        let passed = now.saturating_duration_since(updated).as_secs_f64();
        self.count * (-passed / MEMORY.as_secs_f64()).exp()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn before_any_evidence_the_answer_is_modest() {
        let now = crate::ids::now();
        let mut rate = Rate::default();
        assert_eq!(rate.retry_after(1_000, now), RETRY_UNKNOWN);
        rate.begin(now);
        assert_eq!(rate.retry_after(0, now + Duration::from_secs(60)), RETRY_UNKNOWN);
        rate.event(now + Duration::from_secs(60));
        assert_eq!(rate.retry_after(0, now + Duration::from_secs(60)), Duration::from_secs(48), "one in a minute");
    }

    #[test]
    fn silence_lengthens_the_wait_up_to_the_most() {
        let now = crate::ids::now();
        let mut rate = Rate::default();
        for half in 0..240 {
            rate.event(now + Duration::from_millis(500 * half));
        }
        let wait = |later| rate.retry_after(0, now + Duration::from_secs(later));
        assert_eq!(wait(120), Duration::from_secs(1));
        assert!(wait(600) > wait(300) && wait(300) > wait(120));
        assert_eq!(wait(100_000), RETRY_MAX);
    }

    proptest! {
        /// Steady events are measured as what they are, from early on, and the wait is the length of the line over that.
        #[test]
        fn a_steady_rate_is_found(period_ms in 10..20_000_u64, events in 60..400_u64, ahead in 0..2_000_usize) {
            let start = crate::ids::now();
            let mut rate = Rate::default();
            rate.begin(start);
            for event in 1..=events {
                rate.event(start + Duration::from_millis(period_ms * event));
            }
            let now = start + Duration::from_millis(period_ms * events);
            let true_rate = 1_000.0 / period_ms as f64;
            let measured = rate.per_second(now).expect("there were events");
            // Right after an event there is up to one too many in sight.
            let excess = if period_ms * events < 1_000 { 1.0 } else { 0.15 };
            prop_assert!((measured / true_rate - 1.0).abs() < excess, "{measured} for {true_rate}");
            let wait = rate.retry_after(ahead, now).as_secs_f64();
            let expected = ((ahead + 1) as f64 / measured).clamp(1.0, RETRY_MAX.as_secs_f64());
            prop_assert!((wait - expected).abs() <= 1.0);
        }

        /// Clocks of several threads disagree; nothing here may panic or leave the bounds for that.
        #[test]
        fn any_order_of_times_stays_in_bounds(times in proptest::collection::vec(0..1_000_000_u64, 1..50), ahead: usize) {
            let start = crate::ids::now();
            let mut rate = Rate::default();
            for time in times {
                let now = start + Duration::from_millis(time);
                rate.event(now);
                let wait = rate.retry_after(ahead, now);
                prop_assert!(wait >= Duration::from_secs(1) && wait <= RETRY_MAX && wait.subsec_nanos() == 0);
            }
        }
    }
}
