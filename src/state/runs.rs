//! Runs: a record for every piece of agent work, from its reservation to its end.

use std::sync::Arc;
use std::time::Instant;

use crate::ids::RunId;
use crate::state::{RunOutcome, Target};

/// One outstanding run. It owns its endpoint's slot; exchanges are only its carriers.
pub(crate) struct Run {
    pub id: RunId,
    /// Where it runs; its metrics go by this at its end.
    pub target: Arc<Target>,
    pub endpoint: u32,
    pub session: Option<u32>,
    pub started: Instant,
    /// Exchanges that carry it.
    pub carriers: u32,
    /// How often it was sent, the first time included.
    pub attempts: u32,
    pub outcome: RunOutcome,
    /// Its neighbours among the runs of its session.
    previous: Option<u32>,
    next: Option<u32>,
}

/// All outstanding runs of one service.
#[derive(Default)]
pub(crate) struct Runs {
    slots: Vec<Option<Run>>,
    free: Vec<u32>,
}

impl Runs {
    /// Adds a run before `first`, the newest run of its session. What is returned is the newest now.
    pub fn insert(&mut self, run: NewRun, first: Option<u32>) -> u32 {
        let NewRun { id, target, endpoint, session, started } = run;
        let run = Run {
            id,
            target,
            endpoint,
            session,
            started,
            carriers: 1,
            attempts: 1,
            outcome: RunOutcome::Cancelled,
            previous: None,
            next: None,
        };
        let number = match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = Some(run);
                number
            }
            None => {
                self.slots.push(Some(run));
                (self.slots.len() - 1) as u32
            }
        };
        self.link(number, first);
        number
    }

    /// Puts a run that was in no session before `first`.
    pub fn link(&mut self, number: u32, first: Option<u32>) {
        if let Some(first) = first.and_then(|first| self.slots[first as usize].as_mut()) {
            first.previous = Some(number);
        }
        if let Some(run) = self.slots[number as usize].as_mut() {
            run.next = first;
        }
    }

    /// Takes a run out, and says which is the newest of its session now, where this one was.
    pub fn remove(&mut self, number: u32) -> Option<(Run, Option<Option<u32>>)> {
        let run = self.slots[number as usize].take()?;
        self.free.push(number);
        if let Some(next) = run.next.and_then(|next| self.slots[next as usize].as_mut()) {
            next.previous = run.previous;
        }
        if let Some(previous) = run.previous.and_then(|previous| self.slots[previous as usize].as_mut()) {
            previous.next = run.next;
        }
        let first = run.previous.is_none().then_some(run.next);
        Some((run, first))
    }

    pub fn run_mut(&mut self, number: u32) -> Option<&mut Run> {
        self.slots[number as usize].as_mut()
    }

    /// Whether any run of the chain that begins at `first` is at `endpoint`.
    pub fn any_at(&self, first: Option<u32>, endpoint: u32) -> bool {
        self.chain(first).any(|run| run.endpoint == endpoint)
    }

    pub fn chain(&self, first: Option<u32>) -> impl Iterator<Item = &Run> {
        let at = |number: u32| self.slots[number as usize].as_ref();
        std::iter::successors(first.and_then(at), move |run| run.next.and_then(at))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Run> {
        self.slots.iter().flatten()
    }
}

/// What a run begins with.
pub(crate) struct NewRun {
    pub id: RunId,
    pub target: Arc<Target>,
    pub endpoint: u32,
    pub session: Option<u32>,
    pub started: Instant,
}
