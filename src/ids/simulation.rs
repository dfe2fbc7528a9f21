//! Simulation: a clock and chance that a test decides, for the thread on which it has begun.
//!
//! The monotonic clock is the runtime's (which stands while there is anything to do, and then jumps to the next timer), so
//! a seed and the runtime's own order decide everything that happens.

use std::cell::RefCell;
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Where the wall clock of every simulation begins, in seconds since 1970: any will do, if it is always the same.
const WALL_CLOCK_BEGINS: u64 = 1_800_000_000;

struct Simulated {
    chance: SmallRng,
    began: Instant,
    /// What the wall clock shows when the simulation begins; jumps move it.
    wall_clock: SystemTime,
}

thread_local! {
    static SIMULATED: RefCell<Option<Simulated>> = const { RefCell::new(None) };
}

/// This thread's clock and chance are simulated as long as it lives.
pub struct Simulation(());

impl Drop for Simulation {
    fn drop(&mut self) {
        SIMULATED.set(None);
    }
}

/// From here on this thread's clocks are those of the runtime that it is in, and its chance follows from `seed`.
pub fn begin(seed: u64) -> Simulation {
    SIMULATED.set(Some(Simulated {
        chance: SmallRng::seed_from_u64(seed),
        began: tokio::time::Instant::now().into_std(),
        wall_clock: SystemTime::UNIX_EPOCH + Duration::from_secs(WALL_CLOCK_BEGINS),
    }));
    Simulation(())
}

pub fn is_on() -> bool {
    SIMULATED.with_borrow(Option::is_some)
}

/// Somebody sets the wall clock of the machine: forward or back. The monotonic one goes on as it does.
pub fn jump_wall_clock(by: Duration, back: bool) {
    SIMULATED.with_borrow_mut(|simulated| {
        if let Some(simulated) = simulated {
            simulated.wall_clock = if back { simulated.wall_clock - by } else { simulated.wall_clock + by };
        }
    });
}

pub(super) fn now() -> Option<Instant> {
    is_on().then(|| tokio::time::Instant::now().into_std())
}

pub(super) fn wall_clock() -> Option<SystemTime> {
    let since = |simulated: &Simulated| Some(now()?.saturating_duration_since(simulated.began));
    SIMULATED.with_borrow(|simulated| {
        let simulated = simulated.as_ref()?;
        Some(simulated.wall_clock + since(simulated)?)
    })
}

/// False where chance is real: then nothing was filled.
pub(super) fn fill(bytes: &mut [u8]) -> bool {
    SIMULATED.with_borrow_mut(|simulated| match simulated {
        Some(simulated) => {
            simulated.chance.fill_bytes(bytes);
            true
        }
        None => false,
    })
}
