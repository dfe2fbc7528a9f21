//! Estimate: when an endpoint that gets no new runs will be empty, from how long runs have taken so far and how old its
//! own are. Pure: durations and ages in, probabilities out.
//!
//! A run that has lasted four minutes tells more than the average of all runs: what counts is how many of those that
//! lasted four minutes lasted five. And runs that are still outstanding count, too, with the time that they have lasted
//! at least: without them a service of long runs would look quick until its first long run has ended (Kaplan and Meier,
//! "Nonparametric estimation from incomplete observations", 1958). An endpoint is empty when the last of its runs has
//! ended, so its time is the longest of many.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Places of the histogram: eight for each doubling (they are 12.5 % wide at most), from a millisecond to [`HORIZON`].
const BUCKETS: usize = 240;

/// Longer runs count as so long, and no estimate goes further: 2^32 milliseconds, about 50 days.
pub const HORIZON: Duration = Duration::from_millis(1 << 32);

/// After so long a run counts half: what agents do changes with their versions.
const HALF_LIFE: Duration = Duration::from_secs(30 * 60);

/// How often what was seen is made to count less.
const DECAY_EVERY: Duration = Duration::from_secs(60);

/// So many runs are never forgotten: an old idea of a quiet service is better than none.
const KEPT_RUNS: f64 = 100.0;

/// So many runs are assumed beside those that were seen, where nothing else is known: a run that has lasted for a time
/// goes on as long again with even odds. Few enough not to be noticed beside real ones.
const ASSUMED_RUNS: f64 = 0.1;

/// Half of the assumed runs last longer than this, in seconds.
const ASSUMED_SECONDS: f64 = 1.0;

/// How long the runs of a service took: a histogram of bounded size in which old runs fade.
#[derive(Clone, Debug)]
pub struct Durations {
    ended: Box<[f64]>,
    total: f64,
    faded_at: Option<Instant>,
}

/// How long the outstanding runs of an endpoint, or of a service, have lasted by now.
#[derive(Clone, Debug, Default)]
pub struct Ages {
    groups: BTreeMap<usize, Group>,
    count: u32,
}

/// Runs of about the same age.
#[derive(Clone, Copy, Debug, Default)]
struct Group {
    count: u32,
    seconds: f64,
}

/// What part of all runs lasts longer than a given time.
#[derive(Clone, Debug)]
pub struct Survival {
    /// At the lower edge of each bucket, and at [`HORIZON`].
    alive: Box<[f64]>,
}

impl Default for Durations {
    fn default() -> Durations {
        Durations { ended: vec![0.0; BUCKETS].into(), total: 0.0, faded_at: None }
    }
}

impl Durations {
    /// A run has ended by itself after so long.
    pub fn observe(&mut self, duration: Duration, now: Instant) {
        let since = *self.faded_at.get_or_insert(now);
        let passed = now.saturating_duration_since(since);
        if passed >= DECAY_EVERY {
            self.fade(passed);
            self.faded_at = Some(now);
        }
        self.ended[bucket(duration)] += 1.0;
        self.total += 1.0;
    }

    /// How many runs it rests on; those that fade count in part.
    pub fn runs_seen(&self) -> f64 {
        self.total
    }

    fn fade(&mut self, passed: Duration) {
        let fading = 0.5_f64.powf(passed.as_secs_f64() / HALF_LIFE.as_secs_f64());
        let factor = fading.max(KEPT_RUNS / self.total.max(KEPT_RUNS));
        self.ended.iter_mut().for_each(|weight| *weight *= factor);
        self.total *= factor;
    }
}

impl Ages {
    pub fn add(&mut self, age: Duration) {
        let group = self.groups.entry(bucket(age)).or_default();
        group.count += 1;
        group.seconds += age.min(HORIZON).as_secs_f64();
        self.count += 1;
    }

    pub fn merge(&mut self, other: &Ages) {
        for (bucket, more) in &other.groups {
            let group = self.groups.entry(*bucket).or_default();
            group.count += more.count;
            group.seconds += more.seconds;
        }
        self.count += other.count;
    }

    pub fn count(&self) -> u32 {
        self.count
    }

    /// How many there are of an age, and that age in seconds.
    fn groups(&self) -> impl Iterator<Item = (f64, f64)> {
        self.groups.values().map(|group| (f64::from(group.count), group.seconds / f64::from(group.count)))
    }
}

impl Survival {
    /// From the runs that have ended and those (of the whole service) that have not.
    pub fn new(durations: &Durations, outstanding: &Ages) -> Survival {
        let mut alive = vec![1.0; BUCKETS + 1];
        let still = |bucket: usize| outstanding.groups.get(&bucket).map_or(0.0, |group| f64::from(group.count));
        let ended = |bucket: usize| durations.ended[bucket] + assumed(edge(bucket)) - assumed(edge(bucket + 1));
        // Those who were there to end at the bucket's lower edge, from the last bucket backwards.
        let mut at_risk = assumed(edge(BUCKETS));
        let mut hazards = [0.0; BUCKETS];
        for bucket in (0..BUCKETS).rev() {
            at_risk += ended(bucket) + still(bucket);
            // Whoever is just there was there for half of it.
            hazards[bucket] = ended(bucket) / (at_risk - still(bucket) / 2.0);
        }
        for bucket in 0..BUCKETS {
            alive[bucket + 1] = alive[bucket] * (1.0 - hazards[bucket]).clamp(0.0, 1.0);
        }
        Survival { alive: alive.into() }
    }

    /// The probability that a run of this age lasts longer than `more`, both in seconds.
    fn outlasts(&self, age: f64, more: f64) -> f64 {
        let now = self.longer_than(age);
        // Nothing is known of runs beyond the horizon but that they are there.
        if now <= 0.0 { 1.0 } else { (self.longer_than(age + more) / now).clamp(0.0, 1.0) }
    }

    /// The part of all runs that lasts longer than so many seconds.
    fn longer_than(&self, seconds: f64) -> f64 {
        let milliseconds = seconds * 1000.0;
        let index = bucket_of_milliseconds(milliseconds.clamp(0.0, f64::from(u32::MAX)) as u32);
        let (low, high) = (edge(index) * 1000.0, edge(index + 1) * 1000.0);
        let inside = ((milliseconds - low) / (high - low)).clamp(0.0, 1.0);
        self.alive[index] + (self.alive[index + 1] - self.alive[index]) * inside
    }

    /// The probability that all of these have ended within this time.
    pub fn all_ended(&self, ages: &Ages, within: Duration) -> f64 {
        self.all_ended_in(ages, within.as_secs_f64())
    }

    fn all_ended_in(&self, ages: &Ages, seconds: f64) -> f64 {
        let logarithm = ages.groups().map(|(count, age)| count * (-self.outlasts(age, seconds)).ln_1p());
        logarithm.sum::<f64>().exp()
    }

    /// How many of these are still there after this time, on average.
    pub fn expected_left(&self, ages: &Ages, after: Duration) -> f64 {
        // Not by `sum`, whose nothing is -0.0.
        ages.groups().fold(0.0, |left, (count, age)| left + count * self.outlasts(age, after.as_secs_f64()))
    }

    /// The time within which all of these have ended with this probability; `None`: not before [`HORIZON`].
    pub fn empty_within(&self, ages: &Ages, probability: f64) -> Option<Duration> {
        if ages.count == 0 {
            return Some(Duration::ZERO);
        }
        let (mut early, mut late) = (0.0, HORIZON.as_secs_f64());
        if self.all_ended_in(ages, late) < probability {
            return None;
        }
        // To the millisecond, which is as fine as the histogram begins.
        while late - early > 0.001 {
            let middle = f64::midpoint(early, late);
            if self.all_ended_in(ages, middle) < probability {
                early = middle;
            } else {
                late = middle;
            }
        }
        Some(Duration::from_secs_f64(late))
    }
}

/// Of the assumed runs, how many last longer (Lomax, with the shape that has no mean: nothing is ruled out).
fn assumed(seconds: f64) -> f64 {
    ASSUMED_RUNS * ASSUMED_SECONDS / (ASSUMED_SECONDS + seconds)
}

fn bucket(duration: Duration) -> usize {
    bucket_of_milliseconds(u32::try_from(duration.as_millis()).unwrap_or(u32::MAX))
}

fn bucket_of_milliseconds(milliseconds: u32) -> usize {
    if milliseconds < 8 {
        return milliseconds as usize;
    }
    let exponent = milliseconds.ilog2();
    ((exponent - 2) * 8 + ((milliseconds >> (exponent - 3)) & 7)) as usize
}

/// The lower edge of a bucket, in seconds; of the one behind the last, the horizon.
fn edge(bucket: usize) -> f64 {
    let milliseconds = if bucket < 8 { bucket as u64 } else { (8 + bucket as u64 % 8) << (bucket / 8 - 1) };
    milliseconds as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn ages_of(list: &[f64]) -> Ages {
        let mut ages = Ages::default();
        list.iter().for_each(|age| ages.add(seconds(*age)));
        ages
    }

    fn seen(list: impl IntoIterator<Item = f64>) -> Durations {
        let mut durations = Durations::default();
        let now = crate::ids::now();
        list.into_iter().for_each(|duration| durations.observe(seconds(duration), now));
        durations
    }

    #[test]
    fn what_is_known_exactly_is_told_so() {
        let durations = seen(std::iter::repeat_n(10.0, 1000));
        let ages = ages_of(&[4.0]);
        let survival = Survival::new(&durations, &ages);
        let (p50, p95) = (survival.empty_within(&ages, 0.5).unwrap(), survival.empty_within(&ages, 0.95).unwrap());
        // 10 seconds lie in the bucket from 9.2 to 10.2.
        assert!(p50 >= seconds(5.0) && p50 <= p95 && p95 <= seconds(6.5), "{p50:?} {p95:?}");
        assert!(survival.all_ended(&ages, seconds(7.0)) > 0.99);
        assert!(survival.all_ended(&ages, seconds(4.0)) < 0.01);
    }

    #[test]
    fn of_no_run_none_is_left() {
        let survival = Survival::new(&seen([1.0]), &Ages::default());
        let left = survival.expected_left(&Ages::default(), seconds(1.0));
        assert!(left == 0.0 && left.is_sign_positive(), "{left:?}");
    }

    #[test]
    fn without_history_a_run_goes_on_as_long_again() {
        let ages = ages_of(&[60.0]);
        let survival = Survival::new(&Durations::default(), &ages);
        let p50 = survival.empty_within(&ages, 0.5).unwrap();
        assert!(p50 > seconds(50.0) && p50 < seconds(75.0), "{p50:?}");
    }

    #[test]
    fn runs_that_have_not_ended_keep_a_young_service_from_looking_quick() {
        // Two short runs have ended, twenty of a minute are under way.
        let durations = seen([1.0, 1.0]);
        let fresh = ages_of(&[0.0]);
        let blind = Survival::new(&durations, &fresh);
        let mut all = ages_of(&[60.0; 20]);
        all.merge(&fresh);
        let knowing = Survival::new(&durations, &all);
        assert!(blind.empty_within(&fresh, 0.5) < Some(seconds(2.0)));
        assert!(knowing.empty_within(&fresh, 0.5) > Some(seconds(60.0)));
    }

    #[test]
    fn old_runs_fade_and_the_last_ones_stay() {
        let start = crate::ids::now();
        let mut durations = Durations::default();
        (0..10_000).for_each(|_| durations.observe(seconds(1.0), start));
        durations.observe(seconds(1.0), start + HALF_LIFE);
        assert!((durations.runs_seen() - 5_001.0).abs() < 1.0, "{}", durations.runs_seen());
        durations.observe(seconds(1.0), start + HALF_LIFE * 100);
        assert!((durations.runs_seen() - 101.0).abs() < 1e-6, "{}", durations.runs_seen());
    }

    /// Runs of a known law: the estimate holds what it says, over many endpoints of several runs each.
    #[test]
    fn the_estimate_is_kept_as_often_as_it_says() {
        let mut state = 7_u64;
        let mut chance = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (((state >> 11) as f64) + 0.5) / (1_u64 << 53) as f64
        };
        // Between 5 and 60 seconds, more short ones than long.
        let mut draw = || 5.0 + 55.0 * chance().powi(2);
        let durations = seen((0..2_000).map(|_| draw()).collect::<Vec<_>>());
        let (mut within_p50, mut within_p95, endpoints) = (0, 0, 400);
        for _ in 0..endpoints {
            let mut ages = Ages::default();
            let mut empty_in: f64 = 0.0;
            for _ in 0..20 {
                // A run that is met at a random moment is one that has not ended by then.
                let (age, whole) = loop {
                    let (age, whole) = (draw() - 5.0, draw());
                    if age < whole {
                        break (age, whole);
                    }
                };
                ages.add(seconds(age));
                empty_in = empty_in.max(whole - age);
            }
            let survival = Survival::new(&durations, &ages);
            within_p50 += usize::from(seconds(empty_in) <= survival.empty_within(&ages, 0.5).unwrap());
            within_p95 += usize::from(seconds(empty_in) <= survival.empty_within(&ages, 0.95).unwrap());
        }
        let (p50, p95) = (within_p50 as f64 / f64::from(endpoints), within_p95 as f64 / f64::from(endpoints));
        assert!((0.40..=0.70).contains(&p50), "{p50}");
        assert!(p95 >= 0.90, "{p95}");
    }

    proptest! {
        #[test]
        fn a_duration_lies_between_its_edges(milliseconds in any::<u32>()) {
            let index = bucket_of_milliseconds(milliseconds);
            prop_assert!(index < BUCKETS);
            let exact = f64::from(milliseconds) / 1000.0;
            prop_assert!(edge(index) <= exact && exact < edge(index + 1));
            prop_assert!(milliseconds < 8 || edge(index + 1) <= edge(index) * 1.125 + 1e-9);
        }

        #[test]
        fn probabilities_are_in_order(
            durations in prop::collection::vec(0.0..5_000.0, 0..60),
            ages in prop::collection::vec(0.0..5_000.0, 0..40),
            more in 0.0..5_000.0,
            age in 0.0..5_000.0,
        ) {
            let durations = seen(durations);
            let mut ages = ages_of(&ages);
            let survival = Survival::new(&durations, &ages);
            prop_assert!(survival.alive.windows(2).all(|pair| pair[0] >= pair[1] && pair[1] > 0.0));

            let (p50, p95) = (survival.empty_within(&ages, 0.5), survival.empty_within(&ages, 0.95));
            let orderly = |time: Option<Duration>| time.unwrap_or(HORIZON);
            prop_assert!(orderly(p50) <= orderly(p95));
            if let Some(p50) = p50.filter(|_| ages.count() > 0) {
                prop_assert!(survival.all_ended(&ages, p50) >= 0.5);
                prop_assert!(survival.all_ended(&ages, p50.saturating_sub(Duration::from_millis(2))) <= 0.5 + 1e-9);
            }
            let (sooner, later) = (seconds(more), seconds(more * 2.0));
            prop_assert!(survival.all_ended(&ages, sooner) <= survival.all_ended(&ages, later));
            prop_assert!(survival.expected_left(&ages, sooner) >= survival.expected_left(&ages, later));
            prop_assert!(survival.expected_left(&ages, sooner) <= f64::from(ages.count()) + 1e-9);

            // One run more makes nothing sooner, but for the mean age of its group, which moves within the bucket.
            let before = survival.all_ended(&ages, sooner);
            ages.add(seconds(age));
            prop_assert!(survival.all_ended(&ages, sooner) <= before * 1.2 + 1e-6);
        }
    }
}
