//! Testing: the plans that tests try, as a file means them that says nothing but the steps.

use std::time::Duration;

use crate::config::{self, Judge, OnBad, RolloutStep};

/// From stable to canary in these steps: share, and seconds.
pub fn plan(steps: &[(f64, u64)]) -> config::Rollout {
    let step = |(share, seconds): &(f64, u64)| RolloutStep { share: *share, hold: Duration::from_secs(*seconds) };
    config::Rollout {
        from: "stable".to_owned(),
        to: "canary".to_owned(),
        steps: steps.iter().map(step).collect(),
        judge: judge(),
        on_bad: OnBad::Abort,
    }
}

/// As `judge: {}`.
pub fn judge() -> Judge {
    Judge {
        min_runs: 50,
        max_failed: Some(0.05),
        failed_ratio: Some(2.0),
        first_event_p95_ratio: Some(1.5),
        duration_p95_ratio: Some(1.5),
        confidence: 0.95,
    }
}
