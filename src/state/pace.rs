//! Pace: how fast the waiting room may empty onto an endpoint that has just become ready.
//!
//! Slots bound what an endpoint gets where it has a limit. One without a limit would take everybody who waited for the
//! first sign of life, while its siblings, which start a second later, would find nobody. So a fresh endpoint takes a
//! few at once and twice as many with every second that it has lived; others that come meanwhile share what still waits.

use std::time::{Duration, Instant};

/// Waiters that a fresh endpoint takes in its first moment.
const FIRST: u64 = 10;

/// In this time the sum of what it has taken may double.
const DOUBLING: Duration = Duration::from_secs(1);

/// Doublings after which nothing is held back any more: by then ten thousand have gone.
const DOUBLINGS_MAX: u32 = 10;

/// What a fresh endpoint has taken from the waiting room. To be kept until [`Pace::over`].
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    since: Instant,
    taken: u64,
}

impl Pace {
    /// The endpoint has become ready.
    pub fn new(now: Instant) -> Pace {
        Pace { since: now, taken: 0 }
    }

    /// It is no longer fresh.
    pub fn over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= DOUBLING * DOUBLINGS_MAX
    }

    /// It may take one more waiter now; otherwise when.
    pub fn ready(&self, now: Instant) -> Result<(), Instant> {
        if self.over(now) || self.taken < allowed(now.saturating_duration_since(self.since)) {
            return Ok(());
        }
        Err(self.since + time_of(self.taken + 1))
    }

    /// It takes one.
    pub fn take(&mut self) {
        self.taken += 1;
    }
}

/// How many may have gone after so long: doubled with each whole [`DOUBLING`], evenly in between.
fn allowed(age: Duration) -> u64 {
    let doublings = (age.as_nanos() / DOUBLING.as_nanos()).min(u128::from(DOUBLINGS_MAX)) as u32;
    let base = FIRST << doublings;
    let within = age.saturating_sub(DOUBLING * doublings).as_nanos().min(DOUBLING.as_nanos());
    base + (u128::from(base) * within / DOUBLING.as_nanos()) as u64
}

/// The least age at which so many are allowed.
fn time_of(count: u64) -> Duration {
    let mut base = FIRST;
    let mut age = Duration::ZERO;
    for _ in 0..DOUBLINGS_MAX {
        if count <= base * 2 {
            let beyond = u128::from(count.saturating_sub(base));
            let nanoseconds = (beyond * DOUBLING.as_nanos()).div_ceil(u128::from(base));
            return age + Duration::from_nanos(nanoseconds as u64);
        }
        base *= 2;
        age += DOUBLING;
    }
    age
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn two_hundred_take_about_four_seconds_and_leave_most_for_those_that_come_soon() {
        let start = crate::ids::now();
        let after = |milliseconds| allowed(Duration::from_millis(milliseconds));
        assert_eq!((after(0), after(500), after(1_000), after(2_000), after(4_000)), (10, 15, 20, 40, 160));
        let mut pace = Pace::new(start);
        let mut now = start;
        for taken in 0..200 {
            if let Err(later) = pace.ready(now) {
                now = later;
            }
            assert_eq!(now == start, taken < FIRST, "after {taken}");
            assert_eq!(pace.ready(now), Ok(()));
            pace.take();
        }
        assert_eq!(now - start, Duration::from_millis(4_250));
        assert!(!pace.over(now));
    }

    #[test]
    fn after_ten_seconds_nothing_is_held_back() {
        let start = crate::ids::now();
        let mut pace = Pace::new(start);
        pace.taken = u64::from(u32::MAX);
        assert_eq!(pace.ready(start), Err(start + Duration::from_secs(10)));
        assert_eq!(pace.ready(start + Duration::from_secs(10)), Ok(()));
    }

    proptest! {
        /// Whoever waits until it is told to finds that it may, and not a moment earlier.
        #[test]
        fn the_time_told_is_the_time(count in 1..20_000_u64) {
            let time = time_of(count);
            let last = DOUBLING * DOUBLINGS_MAX;
            prop_assert!(allowed(time) >= count || time == last);
            if time > Duration::ZERO {
                prop_assert!(allowed(time - Duration::from_nanos(1)) < count);
            }
        }
    }
}
