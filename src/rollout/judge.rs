//! Judge: what the runs of one step say about the new version, asked after every run.
//!
//! A version is bad once one criterion's difference is certain. The chance of a verdict without a difference, `1 -
//! confidence`, is for a whole rollout: it is shared out among steps and criteria, and looking often costs nothing.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::Judge;
use crate::rollout::certainty::{self, Count, Prior};
use crate::rollout::spread::{self, LAST_BUCKET, Spread};

/// The part of the times that is above a 95th percentile.
const ABOVE_P95: f64 = 0.05;

/// ln E from which on there are signs of a difference: a canary that fails a fifth of its runs has passed it after 50 of
/// them, one that is as good as `from` seldom ever does.
const DOUBT_LN: f64 = -1.0;

/// How a run ended, as far as it is judged. Who counts leaves out what tells nothing about the version: 4xx answers (the
/// client's fault), and runs that were cancelled, interrupted, rejected, or of which the end is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Good,
    /// Failed, truncated or timed out.
    Bad,
}

/// What both versions did in one step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    pub from: Runs,
    pub to: Runs,
}

/// What one version did: some counts, about 7 KB, however many runs there are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Runs {
    ended: u64,
    failed: u64,
    /// Of every run that had one.
    first_event: Spread,
    /// Of good runs: a failure may be quick, and is counted as what it is.
    duration: Spread,
}

/// One way in which `to` may be worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Criterion {
    MaxFailed,
    Failed,
    FirstEventP95,
    DurationP95,
}

/// One criterion, as it stands: for logs and answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    pub criterion: Criterion,
    /// Part of the runs that failed, or seconds; `None`: no runs.
    pub from: Option<f64>,
    pub to: Option<f64>,
    /// For `max_failed` a part of the runs, for the others how many times as much as `from`.
    pub limit: f64,
    /// How certain it is that `to` is beyond the limit: bad from the configured confidence on.
    pub certainty: f64,
}

/// A step's evidence in a few numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub from: Counts,
    pub to: Counts,
    pub comparisons: Vec<Comparison>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    pub runs: u64,
    pub failed: u64,
    /// In seconds.
    pub first_event_p95: Option<f64>,
    pub duration_p95: Option<f64>,
}

impl Runs {
    pub fn add(&mut self, ending: Ending, first_event: Option<Duration>, duration: Duration) {
        self.ended += 1;
        if let Some(first_event) = first_event {
            self.first_event.add(first_event);
        }
        match ending {
            Ending::Good => self.duration.add(duration),
            Ending::Bad => self.failed += 1,
        }
    }

    fn failures(&self) -> Count {
        Count { hits: self.failed, of: self.ended }
    }

    fn counts(&self) -> Counts {
        Counts {
            runs: self.ended,
            failed: self.failed,
            first_event_p95: self.first_event.p95(),
            duration_p95: self.duration.p95(),
        }
    }
}

impl Evidence {
    /// Whether both versions have the runs that the judge asks for.
    pub fn is_enough(&self, judge: &Judge) -> bool {
        self.from.ended.min(self.to.ended) >= judge.min_runs
    }

    /// Whether `to` is certainly worse. Never before there is enough. `step_share` is the part of a rollout's error that
    /// this step may make.
    pub fn is_bad(&self, judge: &Judge, step_share: f64) -> bool {
        self.is_enough(judge)
            && tests(judge, step_share).any(|Test { criterion, limit, share }| {
                self.reaches(criterion, limit, -(share * (1.0 - judge.confidence)).ln())
            })
    }

    /// Whether there are signs, uncertain ones, that `to` is worse: a step with these is not passed, because the next one
    /// would begin without them. More runs make them certain or make them vanish.
    pub fn is_doubtful(&self, judge: &Judge) -> bool {
        tests(judge, 1.0).any(|Test { criterion, limit, .. }| self.reaches(criterion, limit, DOUBT_LN))
    }

    pub fn summary(&self, judge: &Judge, step_share: f64) -> Summary {
        let comparisons = tests(judge, step_share).map(|Test { criterion, limit, share }| Comparison {
            criterion,
            from: measured(&self.from, criterion),
            to: measured(&self.to, criterion),
            limit,
            certainty: 1.0 - ((-self.e_ln(criterion, limit, f64::NEG_INFINITY)).exp() / share).min(1.0),
        });
        Summary { from: self.from.counts(), to: self.to.counts(), comparisons: comparisons.collect() }
    }

    /// Whether E reached `threshold` (both as ln) against "`to` is within `limit`".
    fn reaches(&self, criterion: Criterion, limit: f64, threshold: f64) -> bool {
        self.e_ln(criterion, limit, threshold) >= threshold
    }

    /// ln E against "`to` is within `limit`". Where it is below `enough`, some other number below that may be given instead.
    fn e_ln(&self, criterion: Criterion, limit: f64, enough: f64) -> f64 {
        let (from, to) = (self.from.failures(), self.to.failures());
        match criterion {
            // Both claims, to be below the limit and to be no worse than `from`, must be refuted, each by itself.
            Criterion::MaxFailed => match certainty::against_ratio(1.0, from, to) {
                e_ln if e_ln < enough => e_ln,
                e_ln => e_ln.min(certainty::against_at_most(limit, to, Prior::FIFTH)),
            },
            Criterion::Failed => certainty::against_ratio(limit, from, to),
            Criterion::FirstEventP95 => slower_ln(&self.from.first_event, &self.to.first_event, limit, enough),
            Criterion::DurationP95 => slower_ln(&self.from.duration, &self.to.duration, limit, enough),
        }
    }
}

/// ln E against "the 95th percentile of `to` is at most `ratio` times that of `from`"; of an E below `enough` only that it is.
///
/// Nothing is presumed of how times are spread, so a heavy tail is no reason for a verdict. Wherever the percentile of
/// `from` really is, say in the bucket b: at least 5 % of its times reach b, and of those of `to`, were it within the ratio,
/// at most 5 % would be longer than `ratio` times the end of b. The two versions' evidence against these two claims
/// multiplies, as that of independent runs does. The claim is refuted where this is so for every b.
fn slower_ln(from: &Spread, to: &Spread, ratio: f64, enough: f64) -> f64 {
    use std::f64::consts::LN_2;

    if from.total() == 0 || to.total() == 0 {
        return f64::NEG_INFINITY;
    }
    let shift = spread::buckets_of(ratio);
    let first = from.last_reached_by(ABOVE_P95);
    let mut least = f64::INFINITY;
    for bucket in first..=LAST_BUCKET {
        let against_from = match bucket {
            // A smaller b has no less than this of `from`, and more of `to`.
            _ if bucket == first => -LN_2,
            _ => {
                let reaching = Count { hits: from.above(bucket - 1), of: from.total() };
                certainty::hedged(certainty::against_at_least(ABOVE_P95, reaching, Prior::TWENTIETH))
            }
        };
        let longer = Count { hits: to.above(bucket.saturating_add(shift)), of: to.total() };
        let against_to = certainty::hedged(certainty::against_at_most(ABOVE_P95, longer, Prior::TENTH));
        least = least.min(against_from + against_to);
        // What is against `from` grows with b, and a hedge is never below this.
        if least < enough || against_from - LN_2 >= least {
            break;
        }
    }
    least
}

/// One of the questions that are asked in a step.
struct Test {
    criterion: Criterion,
    limit: f64,
    /// The part of a rollout's error that it may make.
    share: f64,
}

/// What is looked at. A failure is what a judge must be quick about, so these two get most of the error.
fn tests(judge: &Judge, step_share: f64) -> impl Iterator<Item = Test> {
    let all = [
        (Criterion::MaxFailed, judge.max_failed, 4.0),
        (Criterion::Failed, judge.failed_ratio, 4.0),
        (Criterion::FirstEventP95, judge.first_event_p95_ratio, 1.0),
        (Criterion::DurationP95, judge.duration_p95_ratio, 1.0),
    ];
    let asked = all.into_iter().filter_map(|(criterion, limit, parts)| Some((criterion, limit?, parts)));
    let whole: f64 = asked.clone().map(|(_, _, parts)| parts).sum();
    asked.map(move |(criterion, limit, parts)| Test { criterion, limit, share: step_share * parts / whole })
}

fn measured(runs: &Runs, criterion: Criterion) -> Option<f64> {
    match criterion {
        Criterion::MaxFailed | Criterion::Failed => (runs.ended > 0).then(|| runs.failures().rate()),
        Criterion::FirstEventP95 => runs.first_event.p95(),
        Criterion::DurationP95 => runs.duration.p95(),
    }
}

impl Criterion {
    /// As the configuration calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Criterion::MaxFailed => "max_failed",
            Criterion::Failed => "worse_than_from.failed",
            Criterion::FirstEventP95 => "worse_than_from.first_event_p95",
            Criterion::DurationP95 => "worse_than_from.duration_p95",
        }
    }
}

impl Summary {
    /// The comparison that is furthest beyond its limit.
    pub fn worst(&self) -> Option<&Comparison> {
        self.comparisons.iter().max_by(|left, right| left.certainty.total_cmp(&right.certainty))
    }
}

impl fmt::Display for Summary {
    /// `to failed 12 of 60 runs, from 3 of 5940; worse_than_from.failed is certain at 99.9%`
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { from, to, .. } = self;
        write!(formatter, "`to` failed {} of {} runs, `from` {} of {}", to.failed, to.runs, from.failed, from.runs)?;
        let Some(worst) = self.worst().filter(|worst| worst.certainty > 0.0) else { return Ok(()) };
        write!(
            formatter,
            "; beyond {} of {} with certainty {:.1}%",
            worst.criterion.as_str(),
            worst.limit,
            100.0 * worst.certainty
        )?;
        match (worst.criterion, worst.from, worst.to) {
            (Criterion::FirstEventP95 | Criterion::DurationP95, Some(from), Some(to)) => {
                write!(formatter, " ({to:.3} s against {from:.3} s)")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::testing::judge;

    fn runs(good: u64, bad: u64, seconds: f64) -> Runs {
        let mut runs = Runs::default();
        let duration = Duration::from_secs_f64(seconds);
        (0..good).for_each(|_| runs.add(Ending::Good, Some(duration / 10), duration));
        (0..bad).for_each(|_| runs.add(Ending::Bad, None, Duration::from_millis(1)));
        runs
    }

    #[test]
    fn there_is_no_verdict_without_enough_runs_on_either_side() {
        let bad = |from, to| Evidence { from: runs(from, 0, 1.0), to: runs(0, to, 1.0) }.is_bad(&judge(), 0.5);
        assert!(!bad(5000, 49));
        assert!(!bad(49, 5000));
        assert!(bad(50, 50));
    }

    #[test]
    fn many_failures_are_not_bad_where_from_has_as_many() {
        let failing = Evidence { from: runs(800, 200, 1.0), to: runs(400, 100, 1.0) };
        assert!(!failing.is_bad(&judge(), 0.5), "{}", failing.summary(&judge(), 0.5));
        let only_max = Judge { failed_ratio: None, first_event_p95_ratio: None, duration_p95_ratio: None, ..judge() };
        let worse = Evidence { from: runs(900, 100, 1.0), to: runs(400, 100, 1.0) };
        assert!(worse.is_bad(&only_max, 0.5), "{}", worse.summary(&only_max, 0.5));
        let within = Evidence { from: runs(100_000, 100, 1.0), to: runs(99_000, 1_000, 1.0) };
        assert!(!within.is_bad(&only_max, 0.5), "ten times as many as `from`, and fewer than 5 %");
        assert!(within.is_bad(&judge(), 0.5), "ten times as many as `from`");
    }

    #[test]
    fn slow_runs_are_bad_and_quick_failures_don_t_hide_them() {
        let slow = Evidence { from: runs(1000, 0, 1.0), to: runs(200, 0, 2.0) };
        let summary = slow.summary(&judge(), 0.5);
        assert!(slow.is_bad(&judge(), 0.5), "{summary}");
        let certain: Vec<Criterion> =
            summary.comparisons.iter().filter(|one| one.certainty >= 0.95).map(|one| one.criterion).collect();
        assert_eq!(certain, [Criterion::FirstEventP95, Criterion::DurationP95]);
        assert!(!Evidence { from: runs(1000, 0, 1.0), to: runs(200, 0, 1.4) }.is_bad(&judge(), 0.5));
        let only_slow = Judge { max_failed: None, failed_ratio: None, first_event_p95_ratio: None, ..judge() };
        assert!(Evidence { from: runs(1000, 0, 1.0), to: runs(200, 3000, 2.0) }.is_bad(&only_slow, 0.5));
    }

    #[test]
    fn what_is_not_looked_at_is_not_bad() {
        let nothing = Judge {
            max_failed: None,
            failed_ratio: None,
            first_event_p95_ratio: None,
            duration_p95_ratio: None,
            ..judge()
        };
        assert!(!Evidence { from: runs(1000, 0, 1.0), to: runs(0, 1000, 9.0) }.is_bad(&nothing, 0.5));
    }

    /// What is shown and what is decided agree.
    #[test]
    fn certainty_reaches_the_confidence_when_a_verdict_is_due() {
        for failed in 0..30 {
            let evidence = Evidence { from: runs(2000, 10, 1.0), to: runs(80, failed, 1.0 + failed as f64 / 10.0) };
            let worst = evidence.summary(&judge(), 0.5).worst().map_or(0.0, |worst| worst.certainty);
            assert_eq!(evidence.is_bad(&judge(), 0.5), worst >= 0.95, "{failed}: {worst}");
        }
    }
}
