//! History: the last transitions of a rollout, each with its cause and evidence.

use std::collections::VecDeque;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::rollout::judge::Summary;
use crate::rollout::{Command, Moment};

/// Older ones are forgotten.
pub const TRANSITIONS_MAX: usize = 50;

/// The oldest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct History(VecDeque<Transition>);

/// One change of state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Transition {
    /// Counts up from 1, those that are forgotten too.
    pub number: u64,
    pub at: Moment,
    pub before: Place,
    pub after: Place,
    pub cause: Cause,
    /// Of the step that it left; `None`: it was in none.
    pub evidence: Option<Summary>,
}

/// Where a rollout is. Steps count from 1, as people do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Place {
    Pending,
    Running { step: usize },
    Paused { step: usize },
    Completed,
    Aborted,
}

/// Why a rollout changed its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The block was there for the first time.
    Loaded,
    /// The block was changed.
    Edited,
    /// A person said so.
    Command(Command),
    /// The hold of the step was over, with enough runs.
    HoldOver,
    /// `to` is certainly worse than `from`.
    Bad,
}

impl History {
    /// Adds a transition, and gives it its number.
    pub fn add(&mut self, mut transition: Transition) {
        transition.number = self.count() + 1;
        if self.0.len() >= TRANSITIONS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(transition);
    }

    /// How many transitions there were.
    pub fn count(&self) -> u64 {
        self.last().map_or(0, |last| last.number)
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Transition> {
        self.0.iter()
    }

    pub fn last(&self) -> Option<&Transition> {
        self.0.back()
    }
}

impl fmt::Display for Transition {
    /// `running, step 2 -> aborted: bad: ..`, for the log and the command.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Transition { before, after, cause, evidence, .. } = self;
        write!(formatter, "{before} -> {after}: {cause}")?;
        match evidence {
            Some(evidence) => write!(formatter, "; {evidence}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Pending => formatter.write_str("pending"),
            Place::Running { step } => write!(formatter, "step {step}"),
            Place::Paused { step } => write!(formatter, "paused in step {step}"),
            Place::Completed => formatter.write_str("completed"),
            Place::Aborted => formatter.write_str("aborted"),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Cause::Loaded => "the configuration has a rollout",
            Cause::Edited => "the rollout was edited",
            Cause::Command(Command::Start) => "start was commanded",
            Cause::Command(Command::Promote) => "promote was commanded",
            Cause::Command(Command::Pause) => "pause was commanded",
            Cause::Command(Command::Resume) => "resume was commanded",
            Cause::Command(Command::Abort) => "abort was commanded",
            Cause::HoldOver => "the hold is over",
            Cause::Bad => "the new version is worse",
        })
    }
}
