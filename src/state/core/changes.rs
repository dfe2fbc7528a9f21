//! Changes: marks what the store has to write, and gives it out. Without a store every mark is one comparison.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::state::changes::{Changes, Delta, Marked};
use crate::state::core::Core;
use crate::state::core::image::Places;
use crate::state::image::RunsTaken;

/// How often busy sessions are looked for. The clock is rarely early, and never by so much that one in two were left out.
const SCAN_EVERY: Duration = Duration::from_millis(900);

/// A delta in the making: between two steps the lock is released, and what changes then is in the next one.
pub struct Taking {
    delta: Delta,
    places: Places,
    /// Slots of sessions that are still to be looked at.
    pins: Pending,
    runs: Vec<u32>,
}

enum Pending {
    Slots(Vec<u32>),
    /// All slots from this one on.
    From(u32),
}

impl Core {
    /// From here on changes are marked; `told` is set with each.
    pub fn keep_changes(&mut self, told: Arc<AtomicBool>, whole: bool) {
        self.changes = Some(Changes::new(told, self.rules.idle_timeout));
        if whole {
            self.change_whole();
        }
    }

    /// Everything is to be stored anew.
    pub fn change_whole(&mut self) {
        if let Some(changes) = &mut self.changes {
            changes.whole();
        }
    }

    /// Begins to take what has changed; `None`: nothing has.
    pub fn take_changes(&mut self, now: Instant) -> Option<Taking> {
        let now = self.advance(now);
        let marked = self.changes.as_mut()?.take();
        if marked == Marked::default() {
            return None;
        }
        let Marked { whole, pins, removed, runs, ended, drains, rollout } = marked;
        let mut places = Places::default();
        let mut delta = Delta { whole, ..Delta::default() };
        if whole {
            delta.runs = self.run_images(RunsTaken::Lasting, &mut places);
            self.runs.mark_stored();
        } else {
            delta.removed = removed;
            delta.ended = ended.iter().map(ToString::to_string).collect();
        }
        delta.drains = (drains || whole).then(|| self.drain_images());
        delta.rollout = (rollout || whole).then(|| self.rollout(now).cloned());
        let pins = if whole { Pending::From(0) } else { Pending::Slots(pins) };
        let runs = if whole { Vec::new() } else { runs };
        Some(Taking { delta, places, pins, runs })
    }

    /// Takes `count` more. `None`: there is more to take still.
    pub fn take_more(&mut self, taking: &mut Taking, count: usize, now: Instant) -> Option<Delta> {
        let now = self.advance(now);
        let slots = self.sessions.slots();
        let Taking { delta, places, pins, runs } = taking;
        let (looked_at, more): (Vec<u32>, bool) = match pins {
            Pending::Slots(list) => {
                let rest = list.split_off(list.len().min(count));
                let looked_at = std::mem::replace(list, rest);
                (looked_at, !list.is_empty())
            }
            Pending::From(from) => {
                let end = slots.min(from.saturating_add(count as u32));
                let looked_at = (*from..end).collect();
                *from = end;
                (looked_at, end < slots)
            }
        };
        for slot in looked_at {
            let Some(pin) = self.pin_image(slot, places, now) else { continue };
            if pin.confirmed {
                delta.pins.push(pin);
            }
        }
        let rest = runs.split_off(runs.len().min(count));
        for number in std::mem::replace(runs, rest) {
            delta.runs.extend(self.lasting_run_image(number, places));
        }
        if more || !runs.is_empty() {
            return None;
        }
        delta.places = std::mem::take(&mut places.list);
        Some(std::mem::take(delta))
    }

    /// Marks those that have been busy for long as used now. Looks at `count` slots from where it was.
    pub fn mark_busy(&mut self, count: u32, now: Instant) {
        let now = self.advance(now);
        let ticks = self.ticks(now);
        let Some(changes) = &mut self.changes else { return };
        let slots = self.sessions.slots();
        if self.scanned >= slots {
            self.scanned = 0;
        }
        let end = slots.min(self.scanned.saturating_add(count));
        for slot in self.scanned..end {
            let Some(view) = self.sessions.view(slot) else { continue };
            if view.busy && view.confirmed && changes.differs(view.used, ticks) {
                self.sessions.set_used(slot, ticks);
                changes.pin(slot);
            }
        }
        self.scanned = end;
    }

    /// How many slots [`Core::mark_busy`] is to look at now, so that it is the same number every second, however often
    /// this is asked; 0 where nobody wants to know, or it is not time yet.
    pub fn slots_to_look_at(&mut self, now: Instant) -> u32 {
        let now = self.advance(now);
        let Some(changes) = &self.changes else { return 0 };
        if self.scanned_at.is_some_and(|last| now.saturating_duration_since(last) < SCAN_EVERY) {
            return 0;
        }
        self.scanned_at = Some(now);
        changes.scan(self.sessions.slots())
    }

    /// What is stored of a session is to be stored anew.
    pub(super) fn pin_changed(&mut self, session: u32) {
        if let Some(changes) = &mut self.changes {
            changes.pin(session);
        }
    }

    /// A session is about to be forgotten.
    pub(super) fn pin_ends(&mut self, session: u32) {
        if let Some(changes) = &mut self.changes
            && self.sessions.confirmed(session)
        {
            changes.removed(|| self.sessions.key_bytes(session).into());
        }
    }

    /// A session is about to rest.
    pub(super) fn pin_rests(&mut self, session: u32, ticks: u32) {
        if let Some(changes) = &mut self.changes
            && changes.differs(self.sessions.used(session), ticks)
        {
            changes.pin(session);
        }
    }

    /// What is to be known of a run has changed.
    pub(super) fn run_changed(&mut self, number: u32) {
        if let Some(changes) = &mut self.changes
            && let Some(run) = self.runs.run_mut(number)
            && !run.ended
            && run.lasts()
        {
            run.stored = true;
            changes.run(number);
        }
    }

    /// A run is about to end.
    pub(super) fn run_ends(&mut self, number: u32) {
        if let Some(changes) = &mut self.changes
            && let Some(run) = self.runs.run(number).filter(|run| run.stored)
        {
            changes.ended(run.id);
        }
    }

    pub(super) fn drains_changed(&mut self) {
        self.drain_news += 1;
        if let Some(changes) = &mut self.changes {
            changes.drains();
        }
    }

    pub(super) fn rollout_changed(&mut self) {
        if let Some(changes) = &mut self.changes {
            changes.rollout();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids;

    #[test]
    fn what_is_looked_at_depends_on_time_and_not_on_how_often_the_clock_ticks() {
        let start = ids::now();
        let looked_at = |every: u64| {
            let mut core = Core::new("agents");
            core.rules.idle_timeout = Duration::from_secs(160);
            core.keep_changes(Arc::default(), false);
            let ticks = (0..60_000).step_by(every as usize);
            ticks.map(|after| core.slots_to_look_at(start + Duration::from_millis(after))).sum::<u32>()
        };
        assert_eq!(looked_at(1000), 60, "one slot at least, every second");
        assert_eq!(looked_at(100), 67);
    }
}
