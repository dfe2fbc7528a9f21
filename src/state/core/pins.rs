//! Pins: which endpoint a session is at, from its first exchange until it expires, is evicted or is forgotten; and the credit by
//! which one without a run weighs as one.

use std::time::{Duration, Instant};

use crate::state::core::{BORN_BEFORE, Core};
use crate::state::sessions::SessionKey;

/// How long a session that was placed without a run weighs as one.
const CREDIT_TIME: Duration = Duration::from_secs(10);

/// Sessions that one pick evicts at most where the table is full.
const EVICTED_PER_PICK: usize = 16;

impl Core {
    /// The session of a key, unless its time is over.
    pub(super) fn live_session(&mut self, key: &SessionKey, now: Instant) -> Option<u32> {
        let session = self.sessions.find(key)?;
        if self.sessions.idle(session, self.ticks(now)) > self.rules.idle_timeout {
            self.unpin(session);
            return None;
        }
        Some(session)
    }

    /// Makes a session, in place of the one idle for longest where the table is full. Its first exchange is opened by
    /// the caller, or in [`Core::learn`]. `None`: every session is busy.
    pub(super) fn pin(&mut self, key: &SessionKey, endpoint: u32, matched: bool, now: Instant) -> Option<u32> {
        // A table far above a limit that was just lowered shrinks in steps, so that nobody waits for it.
        for _ in 0..EVICTED_PER_PICK {
            if self.sessions.len() < self.rules.max_sessions {
                break;
            }
            let oldest = self.sessions.oldest()?;
            self.unpin(oldest);
        }
        let born = BORN_BEFORE + self.started.map_or(Duration::ZERO, |started| now.saturating_duration_since(started));
        let session = self.sessions.insert(key, endpoint, matched, born.as_secs() as u32);
        self.endpoints[endpoint].sessions += 1;
        Some(session)
    }

    pub(super) fn move_pin(&mut self, session: u32, to: u32) {
        let from = self.sessions.endpoint(session);
        if self.sessions.credit(session) != 0 {
            self.endpoints[from].credit -= 1;
            self.endpoints[to].credit += 1;
        }
        self.endpoints[from].sessions -= 1;
        self.endpoints[to].sessions += 1;
        self.sessions.set_endpoint(session, to);
        if self.sessions.confirmed(session) {
            self.pin_changed(session);
        }
        self.room.changed_for_session(|| self.sessions.session_key(session));
        self.reindex(from);
        self.reindex(to);
        self.release(from);
    }

    /// Forgets a session that is not busy.
    pub(super) fn unpin(&mut self, session: u32) {
        self.take_credit(session);
        self.pin_ends(session);
        let endpoint = self.sessions.endpoint(session);
        self.room.changed_for_session(|| self.sessions.session_key(session));
        self.sessions.remove(session);
        self.endpoints[endpoint].sessions -= 1;
        self.release(endpoint);
    }

    /// Forgets expired sessions, `limit` at most, and says how many those were.
    pub fn expire(&mut self, limit: usize, now: Instant) -> usize {
        let ticks = self.ticks(now);
        for count in 0..limit {
            match self.sessions.oldest() {
                Some(oldest) if self.sessions.idle(oldest, ticks) > self.rules.idle_timeout => self.unpin(oldest),
                _ => return count,
            }
        }
        limit
    }

    /// Forgets the idle sessions of the slots `from..from + count`. Returns how many, and the next slot as
    /// [`Core::scan_sessions`].
    pub fn forget_sessions(&mut self, key: Option<&str>, from: u32, count: u32, now: Instant) -> (usize, Option<u32>) {
        self.advance(now);
        let slots = self.sessions.slots();
        let end = slots.min(from.saturating_add(count));
        let mut forgotten = 0;
        for slot in from..end {
            let Some(view) = self.sessions.view(slot) else { continue };
            let session = view.id;
            if !view.busy && key.is_none_or(|key| self.sessions.answers_to(session, key)) {
                self.unpin(session);
                forgotten += 1;
            }
        }
        (forgotten, (end < slots).then_some(end))
    }

    /// Lets a session weigh as one run until its first.
    pub(super) fn give_credit(&mut self, session: u32, now: Instant) {
        self.take_credit(session);
        self.last_credit += 1;
        self.credits.insert(self.last_credit, (now + CREDIT_TIME, session));
        self.sessions.set_credit(session, self.last_credit);
        let endpoint = self.sessions.endpoint(session);
        self.endpoints[endpoint].credit += 1;
        self.reindex(endpoint);
    }

    pub(super) fn take_credit(&mut self, session: u32) {
        let serial = self.sessions.credit(session);
        if serial != 0 {
            self.credits.remove(&serial);
            self.sessions.set_credit(session, 0);
            let endpoint = self.sessions.endpoint(session);
            self.endpoints[endpoint].credit -= 1;
            self.reindex(endpoint);
        }
    }
}
