//! Run: the words of runs: what an exchange is to one, and how one ends.

use serde::{Deserialize, Serialize};

/// What an exchange is to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It starts a run.
    Start,
    /// It attaches to one that is under way: a second reader, a resumed stream.
    Join,
    /// It asks how one stands.
    Read,
    /// It asks for a run's end.
    Cancel,
    /// None of these.
    Other,
}

/// How a run ended: the label `outcome` of `longhaul_runs_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunOutcome {
    Completed,
    Failed,
    Cancelled,
    Interrupted,
    Truncated,
    TimedOut,
    Rejected,
    Unknown,
}

impl RunOutcome {
    pub const ALL: [RunOutcome; 8] = [
        RunOutcome::Completed,
        RunOutcome::Failed,
        RunOutcome::Cancelled,
        RunOutcome::Interrupted,
        RunOutcome::Truncated,
        RunOutcome::TimedOut,
        RunOutcome::Rejected,
        RunOutcome::Unknown,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            RunOutcome::Completed => "completed",
            RunOutcome::Failed => "failed",
            RunOutcome::Cancelled => "cancelled",
            RunOutcome::Interrupted => "interrupted",
            RunOutcome::Truncated => "truncated",
            RunOutcome::TimedOut => "timed_out",
            RunOutcome::Rejected => "rejected",
            RunOutcome::Unknown => "unknown",
        }
    }
}
