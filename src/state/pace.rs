//! Pace: how fast the waiting room may empty onto an endpoint that has just become ready.
//!
//! Slots bound what an endpoint gets where it has a limit. One without a limit would take everybody who waited for the
//! first sign of life, while its siblings, which start a second later, would find nobody. So a fresh endpoint may have a
//! few at once and twice as many with every second that it has lived; others that come meanwhile share what still waits.

use std::time::{Duration, Instant};

/// What a fresh endpoint may have in its first moment.
const FIRST: u64 = 10;

/// In this time what it may have doubles.
const DOUBLING: Duration = Duration::from_secs(1);

/// Doublings after which nothing is held back any more: by then it may have ten thousand.
const DOUBLINGS_MAX: u32 = 10;

/// What a fresh endpoint may take from the waiting room. To be kept until [`Pace::over`].
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    since: Instant,
}

impl Pace {
    /// The endpoint has become ready.
    pub fn new(now: Instant) -> Pace {
        Pace { since: now }
    }

    /// It is no longer fresh.
    pub fn over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= DOUBLING * DOUBLINGS_MAX
    }

    /// With so many runs and exchanges it may take one more waiter now; otherwise when, should none of them end.
    pub fn ready(&self, load: u64, now: Instant) -> Result<(), Instant> {
        if self.over(now) || load < allowed(now.saturating_duration_since(self.since)) {
            return Ok(());
        }
        Err(self.since + time_of(load + 1))
    }
}

/// How many it may have after so long: doubled with each whole [`DOUBLING`], evenly in between.
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
        let pace = Pace::new(start);
        let mut now = start;
        for load in 0..200 {
            if let Err(later) = pace.ready(load, now) {
                now = later;
            }
            assert_eq!(now == start, load < FIRST, "with {load}");
            assert_eq!(pace.ready(load, now), Ok(()));
        }
        assert_eq!(now - start, Duration::from_millis(4_250));
        assert!(!pace.over(now));
    }

    #[test]
    fn what_ends_makes_room_at_once() {
        let start = crate::ids::now();
        let pace = Pace::new(start);
        assert!(pace.ready(FIRST, start).is_err());
        assert_eq!(pace.ready(FIRST - 1, start), Ok(()));
    }

    #[test]
    fn after_ten_seconds_nothing_is_held_back() {
        let start = crate::ids::now();
        let pace = Pace::new(start);
        let load = u64::from(u32::MAX);
        assert_eq!(pace.ready(load, start), Err(start + Duration::from_secs(10)));
        assert_eq!(pace.ready(load, start + Duration::from_secs(10)), Ok(()));
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
