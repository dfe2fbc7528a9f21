//! Changes: what of a service is not yet in the store. Marked under the service's lock as it happens, taken by the store
//! from time to time. Marks are bounded: where there are too many, everything is taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::ids::RunId;
use crate::rollout::Rollout;
use crate::state::image::{DrainImage, Pin, Place, RunImage};
use crate::state::sessions::{TICK, Ticks};

/// Marks of each kind that are kept; with more of one the whole service is written anew.
pub const MARKS_MAX: usize = 65_536;

/// The last use of a session is stored anew when it passes into another such part of `idle_timeout`.
const PARTS: u32 = 16;

/// How exactly the store knows when a session was used last: a restored one may live that much longer.
pub fn exactness(idle_timeout: Duration) -> Duration {
    // One part from the last use to its end, and one until the scan comes by whoever is busy.
    2 * part(idle_timeout)
}

fn part(idle_timeout: Duration) -> Duration {
    (idle_timeout / PARTS).max(TICK)
}

/// The marks of one service. None is there while nobody keeps them.
#[derive(Default)]
pub(crate) struct Changes {
    /// Slots of sessions.
    pins: Vec<u32>,
    /// Compact keys of sessions that are no more.
    removed: Vec<Box<[u8]>>,
    /// Numbers of runs.
    runs: Vec<u32>,
    ended: Vec<RunId>,
    pub drains: bool,
    pub rollout: bool,
    /// There were too many, or what is stored was stored by other rules.
    pub whole: bool,
    /// A [`part`] of `idle_timeout`.
    part: Ticks,
    /// There was a configuration.
    configured: bool,
    /// Shared with whoever takes them: there is something.
    told: Arc<AtomicBool>,
}

/// What the store is to write. Removals come first.
#[derive(Debug, Default, PartialEq)]
pub struct Delta {
    /// What is stored of pins and runs goes before the rest comes.
    pub whole: bool,
    /// Compact keys.
    pub removed: Vec<Box<[u8]>>,
    /// To which pins and runs refer.
    pub places: Vec<Place>,
    pub pins: Vec<Pin>,
    pub ended: Vec<String>,
    pub runs: Vec<RunImage>,
    /// All of them, where any changed.
    pub drains: Option<Vec<DrainImage>>,
    /// `Some(None)`: there is none any more.
    pub rollout: Option<Option<Rollout>>,
}

/// What was marked when the store came.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Marked {
    pub whole: bool,
    /// Sorted, each once.
    pub pins: Vec<u32>,
    pub removed: Vec<Box<[u8]>>,
    /// Sorted, each once.
    pub runs: Vec<u32>,
    pub ended: Vec<RunId>,
    pub drains: bool,
    pub rollout: bool,
}

impl Delta {
    /// How many keys it writes, about.
    pub fn keys(&self) -> usize {
        self.removed.len() + self.pins.len() + self.ended.len() + self.runs.len()
    }
}

impl Changes {
    pub fn new(told: Arc<AtomicBool>, idle_timeout: Duration) -> Changes {
        let mut changes = Changes { told, ..Changes::default() };
        changes.set_idle_timeout(idle_timeout);
        changes
    }

    pub fn set_idle_timeout(&mut self, idle_timeout: Duration) {
        let part = (part(idle_timeout).as_millis() / TICK.as_millis()) as Ticks;
        if std::mem::replace(&mut self.part, part) != part && self.configured {
            self.whole();
        }
        self.configured |= !idle_timeout.is_zero();
    }

    /// Whether a last use is to be stored, where `before` is.
    pub fn differs(&self, before: Ticks, now: Ticks) -> bool {
        let part = self.part.max(1);
        before / part != now / part
    }

    /// How many slots of a table of so many are to be looked at every second, so that none goes unseen for a part.
    pub fn scan(&self, slots: u32) -> u32 {
        let seconds = u64::from(self.part) * TICK.as_millis() as u64 / 1000;
        u32::try_from(u64::from(slots) / seconds.max(1) + 1).unwrap_or(u32::MAX)
    }

    pub fn pin(&mut self, slot: u32) {
        if self.pins.last() != Some(&slot) && !self.overflows(self.pins.len()) {
            self.pins.push(slot);
        }
        self.tell();
    }

    pub fn removed(&mut self, key: impl FnOnce() -> Box<[u8]>) {
        if !self.overflows(self.removed.len()) {
            self.removed.push(key());
        }
        self.tell();
    }

    pub fn run(&mut self, number: u32) {
        if self.runs.last() != Some(&number) && !self.overflows(self.runs.len()) {
            self.runs.push(number);
        }
        self.tell();
    }

    pub fn ended(&mut self, run: RunId) {
        if !self.overflows(self.ended.len()) {
            self.ended.push(run);
        }
        self.tell();
    }

    /// Everything is to be written anew.
    pub fn whole(&mut self) {
        self.whole = true;
        self.tell();
    }

    pub fn drains(&mut self) {
        self.drains = true;
        self.tell();
    }

    pub fn rollout(&mut self) {
        self.rollout = true;
        self.tell();
    }

    /// What is marked, which then no longer is.
    pub fn take(&mut self) -> Marked {
        let sorted = |list: &mut Vec<u32>| {
            let mut list = std::mem::take(list);
            list.sort_unstable();
            list.dedup();
            list
        };
        Marked {
            whole: std::mem::take(&mut self.whole),
            pins: sorted(&mut self.pins),
            removed: std::mem::take(&mut self.removed),
            runs: sorted(&mut self.runs),
            ended: std::mem::take(&mut self.ended),
            drains: std::mem::take(&mut self.drains),
            rollout: std::mem::take(&mut self.rollout),
        }
    }

    fn overflows(&mut self, length: usize) -> bool {
        self.whole |= length >= MARKS_MAX;
        self.whole
    }

    fn tell(&self) {
        self.told.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn changes() -> Changes {
        Changes::new(Arc::default(), Duration::from_secs(1600))
    }

    #[test]
    fn marks_are_bounded_and_then_everything_is_taken() {
        let mut changes = changes();
        for slot in 0..2 * MARKS_MAX as u32 {
            changes.pin(slot);
            changes.removed(|| Box::from(*b"key"));
        }
        assert_eq!((changes.pins.len(), changes.removed.len()), (MARKS_MAX, MARKS_MAX.min(changes.removed.len())));
        let marked = changes.take();
        assert!(marked.whole);
        changes.pin(1);
        assert_eq!(changes.take(), Marked { pins: vec![1], ..Marked::default() }, "it begins anew");
        assert_eq!(changes.take(), Marked::default());
    }

    #[test]
    fn a_use_is_stored_once_in_each_part_of_the_idle_timeout() {
        let changes = changes();
        let every_second = (0..1600_u32).filter(|second| changes.differs(second * 100, second * 100 + 100));
        assert_eq!(every_second.count(), 16);
        assert_eq!(exactness(Duration::from_secs(1600)), Duration::from_secs(200));
        assert_eq!(changes.scan(1_000_000), 10_001);
    }

    #[test]
    fn other_rules_have_everything_stored_anew() {
        let mut changes = changes();
        changes.set_idle_timeout(Duration::from_secs(1600));
        assert!(!changes.take().whole);
        changes.set_idle_timeout(Duration::from_secs(60));
        assert!(changes.take().whole);
    }

    proptest! {
        #[test]
        fn each_mark_is_taken_once_and_whoever_takes_is_told(slots in proptest::collection::vec(0..50_u32, 0..200)) {
            let told = Arc::new(AtomicBool::new(false));
            let mut changes = Changes::new(told.clone(), Duration::from_secs(60));
            for slot in &slots {
                changes.pin(*slot);
                changes.run(*slot);
            }
            prop_assert_eq!(told.load(Ordering::Acquire), !slots.is_empty());
            let wanted: Vec<u32> = slots.into_iter().collect::<std::collections::BTreeSet<u32>>().into_iter().collect();
            let marked = changes.take();
            prop_assert_eq!(&marked.pins, &wanted);
            prop_assert_eq!(&marked.runs, &wanted);
        }
    }
}
