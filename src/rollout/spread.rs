//! Spread: how times are spread, in a histogram of fixed size whose bounds grow by a constant factor.
//!
//! Counts are exact; a time is only known to lie between two bounds, and who compares times takes the bounds so that
//! rounding never makes a difference certain.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Bounds for each doubling of the time: neighbours differ by 2.2 %.
const BUCKETS_A_DOUBLING: f64 = 32.0;

/// Times up to this are one bucket.
const SHORTEST_SECONDS: f64 = 0.001;

/// 26 doublings: up to 18.6 hours are told apart.
const BUCKETS: usize = 834;

/// Times of runs. Of two buckets one is `(bound(n - 1), bound(n)]`; the last has no upper bound.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(u16, u32)>", into = "Vec<(u16, u32)>")]
pub struct Spread {
    counts: Box<[u32; BUCKETS]>,
    total: u64,
    /// No bucket from this one on has anything in it.
    end: usize,
}

impl Default for Spread {
    fn default() -> Spread {
        Spread { counts: Box::new([0; BUCKETS]), total: 0, end: 0 }
    }
}

impl Spread {
    pub fn add(&mut self, time: Duration) {
        let doublings = (time.as_secs_f64() / SHORTEST_SECONDS).log2();
        // What is shorter than the shortest, 0 included, has a negative logarithm, which the conversion makes 0.
        let index = ((doublings * BUCKETS_A_DOUBLING).ceil() as usize).min(BUCKETS - 1);
        if let Some(count) = self.counts[index].checked_add(1) {
            self.counts[index] = count;
            self.total += 1;
            self.end = self.end.max(index + 1);
        }
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    /// How many times are longer than what bucket `index` may hold: all before the first one, none after the last.
    pub fn above(&self, index: i64) -> u64 {
        let first = usize::try_from(index + 1).unwrap_or(0).min(self.end);
        self.counts[first..self.end].iter().map(|count| u64::from(*count)).sum()
    }

    /// The last bucket that at least the `part` of all times reach.
    pub fn last_reached_by(&self, part: f64) -> i64 {
        let enough = part * self.total as f64;
        let mut reach = 0;
        let found = self.counts[..self.end].iter().rposition(|count| {
            reach += u64::from(*count);
            reach as f64 >= enough
        });
        found.unwrap_or(0) as i64
    }

    /// The 95th percentile in seconds, rounded up to a bound; `None` without times.
    pub fn p95(&self) -> Option<f64> {
        (self.total > 0).then(|| upper_bound(self.last_reached_by(0.05).min(LAST_BUCKET - 1)))
    }
}

/// The last bucket, for what is longer than all bounds.
pub const LAST_BUCKET: i64 = BUCKETS as i64 - 1;

/// So many buckets further each bound is at least `ratio` times as large.
pub fn buckets_of(ratio: f64) -> i64 {
    (ratio.log2() * BUCKETS_A_DOUBLING - 1e-9).ceil() as i64
}

/// In seconds.
fn upper_bound(index: i64) -> f64 {
    SHORTEST_SECONDS * (index as f64 / BUCKETS_A_DOUBLING).exp2()
}

impl From<Spread> for Vec<(u16, u32)> {
    /// The buckets with something in them.
    fn from(spread: Spread) -> Vec<(u16, u32)> {
        let filled = spread.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        filled.map(|(index, count)| (index as u16, *count)).collect()
    }
}

impl From<Vec<(u16, u32)>> for Spread {
    /// Buckets that don't exist, as from a file of another release, are left out.
    fn from(filled: Vec<(u16, u32)>) -> Spread {
        let mut spread = Spread::default();
        for (index, count) in filled {
            if let Some(bucket) = spread.counts.get_mut(usize::from(index)) {
                *bucket = count;
                spread.end = spread.end.max(usize::from(index) + 1);
            }
        }
        spread.total = spread.counts.iter().map(|count| u64::from(*count)).sum();
        spread
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spread(seconds: impl IntoIterator<Item = f64>) -> Spread {
        let mut spread = Spread::default();
        seconds.into_iter().for_each(|time| spread.add(Duration::from_secs_f64(time)));
        spread
    }

    #[test]
    fn the_95th_percentile_is_right_within_the_step_of_the_bounds() {
        let found = spread((1..=1000).map(|n| f64::from(n) / 100.0)).p95().expect("there are times");
        assert!((9.5..9.5 * 1.023).contains(&found), "{found}");
        assert_eq!(Spread::default().p95(), None);
    }

    #[test]
    fn the_shortest_and_the_longest_have_a_bucket() {
        let spread = spread([0.0, 0.0001, 0.001, 1e6]);
        assert_eq!((spread.total(), spread.above(-1), spread.above(0)), (4, 4, 1));
        assert_eq!((spread.above(LAST_BUCKET - 1), spread.above(LAST_BUCKET)), (1, 0));
        assert_eq!((spread.above(-1000), spread.above(1_000_000)), (4, 0));
        let longest = upper_bound(LAST_BUCKET - 1);
        assert!((60_000.0..70_000.0).contains(&longest), "{longest}");
        assert_eq!(spread.p95(), Some(longest));
    }

    #[test]
    fn a_ratio_is_never_fewer_buckets_than_it_is() {
        assert_eq!(buckets_of(1.0), 0);
        assert_eq!(buckets_of(2.0), 32);
        assert_eq!(buckets_of(0.5), -32);
        assert_eq!(buckets_of(1.5), 19);
    }

    proptest! {
        #[test]
        fn buckets_count_what_is_longer_than_their_bound(seconds in prop::collection::vec(0.0..1e5_f64, 1..200), index in 0..LAST_BUCKET) {
            let spread = spread(seconds.iter().copied());
            let longer = |bound: f64| seconds.iter().filter(|time| **time > bound).count() as u64;
            let bound = upper_bound(index);
            prop_assert!((longer(bound * (1.0 + 1e-9))..=longer(bound * (1.0 - 1e-9))).contains(&spread.above(index)));
            let reached = spread.last_reached_by(0.05);
            prop_assert!(spread.above(reached - 1) * 20 >= spread.total());
            prop_assert!(spread.above(reached) * 20 < spread.total());
        }

        #[test]
        fn it_is_kept_by_its_filled_buckets(seconds in prop::collection::vec(0.0..1e5_f64, 0..50)) {
            let spread = spread(seconds);
            let text = serde_json::to_string(&spread).expect("serialises");
            prop_assert_eq!(serde_json::from_str::<Spread>(&text).expect("reads"), spread);
        }
    }
}
