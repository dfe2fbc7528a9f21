//! What the mock agent knows about its backends: outstanding runs, places to work in, waits and jobs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Backend;
use crate::balance::{Balance, Spread};
use crate::clock::monotonic_ns;

/// The state of all backends of this process.
pub struct Board {
    state: Mutex<State>,
    places: Option<Vec<Arc<Semaphore>>>,
}

struct State {
    balance: Balance,
    /// How long runs waited for a place, in microseconds.
    waits: Histogram<u64>,
    finished: u64,
    jobs: HashMap<u64, u64>,
    next_job: u64,
}

/// What `GET /board` answers.
#[derive(Debug, Deserialize, Serialize)]
pub struct BoardReport {
    pub outstanding: Vec<u32>,
    pub finished: u64,
    pub spread: Spread,
    pub wait_mean_ms: f64,
    pub wait_p99_ms: f64,
}

// Past this many jobs the oldest numbers are not kept: their polls answer 404.
const JOBS_MAX: usize = 1_000_000;

impl Board {
    pub fn new(backends: usize, slots: Option<usize>) -> Self {
        let state = State {
            balance: Balance::new(backends, monotonic_ns()),
            waits: Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("the bounds are constants that make sense"),
            finished: 0,
            jobs: HashMap::new(),
            next_job: 0,
        };
        let places = slots.map(|slots| (0..backends).map(|_| Arc::new(Semaphore::new(slots))).collect());
        Self { state: Mutex::new(state), places }
    }

    /// The sums over time so far; `restart` begins new ones.
    pub fn report(&self, restart: bool) -> BoardReport {
        let mut state = self.state();
        let now_ns = monotonic_ns();
        let spread = state.balance.spread(now_ns);
        let outstanding = state.balance.outstanding().to_vec();
        let report = BoardReport {
            outstanding,
            finished: state.finished,
            spread,
            wait_mean_ms: if state.waits.is_empty() { 0.0 } else { state.waits.mean() / 1e3 },
            wait_p99_ms: state.waits.value_at_quantile(0.99) as f64 / 1e3,
        };
        if restart {
            state.balance.restart(now_ns);
            state.waits.reset();
            state.finished = 0;
        }
        report
    }

    /// Notes a job that will be done in `hold_ns`; its number.
    pub fn add_job(&self, hold_ns: u64) -> u64 {
        let mut state = self.state();
        let number = state.next_job;
        state.next_job += 1;
        if state.jobs.len() < JOBS_MAX {
            state.jobs.insert(number, monotonic_ns() + hold_ns);
        }
        number
    }

    /// Whether a job is done; `None` if there is no such job. A job that is seen done is forgotten.
    pub fn job_done(&self, number: u64) -> Option<bool> {
        let mut state = self.state();
        let done = *state.jobs.get(&number)? <= monotonic_ns();
        if done {
            state.jobs.remove(&number);
        }
        Some(done)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A run on a backend: outstanding until dropped.
pub struct OpenRun {
    backend: Backend,
    _place: Option<OwnedSemaphorePermit>,
}

impl OpenRun {
    /// Counts the run at once.
    pub fn start(backend: &Backend) -> Self {
        backend.board.state().balance.start(backend.number, monotonic_ns());
        Self { backend: backend.clone(), _place: None }
    }

    /// Waits for a free place, in the order of asking.
    pub async fn take_place(&mut self) {
        let Some(places) = &self.backend.board.places else { return };
        let since_ns = monotonic_ns();
        let places = places[self.backend.number].clone();
        // With a place free at once nothing was waited for, whatever the clock says.
        let waited_us = match places.clone().try_acquire_owned() {
            Ok(place) => {
                self._place = Some(place);
                0
            }
            Err(_) => {
                self._place = places.acquire_owned().await.ok();
                (monotonic_ns() - since_ns) / 1000
            }
        };
        self.backend.board.state().waits.saturating_record(waited_us);
    }
}

impl Drop for OpenRun {
    fn drop(&mut self) {
        let mut state = self.backend.board.state();
        state.balance.end(self.backend.number, monotonic_ns());
        state.finished += 1;
    }
}
