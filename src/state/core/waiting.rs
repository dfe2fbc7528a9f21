//! Waiting: starts that can't go at once: for a slot, for a ready endpoint, or for their session's turn.
//!
//! Whatever frees something only notes it; [`Core::settle_up`] hands it on before the lock is released. So nobody who
//! comes later can take a slot that somebody waits for, and no slot is free while somebody who may use it waits.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::config::{self, Policy};
use crate::ids::RunId;
use crate::protocols::Cancel;
use crate::state::core::{Core, Ended, Finish, Grant, Rules, Unplaced};
use crate::state::dispatcher::{Ask, PinHint};
use crate::state::handover::Handover;
use crate::state::pace::Pace;
use crate::state::queue::{Arrival, Offer, Place, Principal, Queue, Ticket};
use crate::state::rate::Rate;
use crate::state::runs::About;
use crate::state::sessions::SessionKey;
use crate::state::status::{DueCall, QueueStatus};
use crate::state::turn::{Answer, Turns};
use crate::state::{AffinityOutcome, Kind, Refusal, RunOutcome};

/// Waiters whose time is over that are told so under one hold of the lock.
const EXPIRED_PER_LOOK: usize = 1024;

/// What a wait ends with.
pub type Given = Result<Grant, Refusal>;

/// What became of whoever came.
pub enum Arrived {
    Placed(Grant),
    Waiting(Ticket),
    Refused(Refusal),
}

/// Everything about those who wait.
pub(super) struct Room {
    pub queue: Queue<Waiter>,
    pub handover: Handover<Given>,
    turns: Turns,
    /// Starts that wait, by the id that their run will have.
    pub by_run: HashMap<RunId, Ticket>,
    /// Slots that became free, measured.
    rate: Rate,
    /// Endpoints that may have something for somebody.
    freed: Vec<u32>,
    /// Starts whose turn has come.
    due: Vec<RunId>,
    /// Lanes of those for whom something has changed.
    changed: Vec<Place>,
    /// Sessions of those for whom something has changed.
    changed_sessions: Vec<u64>,
    all_changed: bool,
    /// Endpoints that became ready while somebody waited.
    paces: HashMap<u32, Pace>,
    /// When one of them may take the next.
    pace_due: Option<Instant>,
    /// The endpoint that offers a slot: whoever is placed now is placed there, or waits for another.
    serving: Option<u32>,
    /// Runs of each principal, and starts that wait for a slot.
    principals: HashMap<[u8; 16], u32>,
    /// Calls about runs that were interrupted.
    calls: Vec<DueCall>,
    /// To be woken once the lock is released.
    wakers: Vec<Waker>,
    hasher: RandomState,
    rng: u64,
}

/// Who waits.
pub(super) struct Waiter {
    pub ask: Arc<OwnAsk>,
    pub run: Option<RunId>,
    /// The session whose turn it has or waits for.
    pub turn: Option<SessionKey>,
    /// Among its principal's.
    pub counted: bool,
}

/// What a run keeps of how it came to be, where that matters at its end.
#[derive(Default)]
pub(crate) struct Origin {
    /// The session among whose starts it counts.
    pub turn: Option<SessionKey>,
    pub principal: Principal,
    /// What the call carries besides by which it is interrupted, where that waits for its name.
    pub credentials: Vec<(&'static str, String)>,
}

/// An [`Ask`] that can wait.
pub(super) struct OwnAsk {
    key: Option<SessionKey>,
    kind: Kind,
    creates: bool,
    bound: bool,
    run: Option<Box<str>>,
    about: Option<About>,
    version: Option<Box<str>>,
    hint: Option<PinHint>,
    principal: Principal,
}

impl OwnAsk {
    pub fn of(ask: &Ask<'_>) -> OwnAsk {
        OwnAsk {
            key: ask.key.cloned(),
            kind: ask.kind,
            creates: ask.creates,
            bound: ask.bound,
            run: ask.run.map(Box::from),
            about: ask.about.cloned(),
            version: ask.version.map(Box::from),
            hint: ask.hint.cloned(),
            principal: ask.principal,
        }
    }

    pub fn ask(&self) -> Ask<'_> {
        Ask {
            creates: self.creates,
            bound: self.bound,
            run: self.run.as_deref(),
            about: self.about.as_ref(),
            version: self.version.as_deref(),
            hint: self.hint.as_ref(),
            principal: self.principal,
            ..Ask::new(self.kind, self.key.as_ref())
        }
    }
}

/// How a start stands to its session.
enum Turn {
    /// It may go; the session that counts it, if any does.
    Goes(Option<SessionKey>),
    /// It waits already.
    Waits(Ticket),
}

impl Room {
    pub fn new() -> Room {
        Room {
            queue: Queue::new(0),
            handover: Handover::default(),
            turns: Turns::default(),
            by_run: HashMap::new(),
            rate: Rate::default(),
            freed: Vec::new(),
            due: Vec::new(),
            changed: Vec::new(),
            changed_sessions: Vec::new(),
            all_changed: false,
            paces: HashMap::new(),
            pace_due: None,
            serving: None,
            principals: HashMap::new(),
            calls: Vec::new(),
            wakers: Vec::new(),
            hasher: RandomState::new(),
            rng: 0,
        }
    }

    /// Something of an endpoint's load or readiness is different.
    #[inline]
    pub fn touched(&mut self, endpoint: u32) {
        if !self.queue.is_empty() {
            self.freed.push(endpoint);
        }
    }

    /// Whoever waits for this endpoint alone is to be looked at again.
    #[inline]
    pub fn changed_for(&mut self, endpoint: u32) {
        if !self.queue.is_empty() && self.queue.has_lane(Place::Endpoint(endpoint)) {
            self.changed.push(Place::Endpoint(endpoint));
        }
    }

    /// Whoever waits of this session is to be looked at again.
    #[inline]
    pub fn changed_for_session(&mut self, key: impl FnOnce() -> SessionKey) {
        if !self.queue.is_empty() {
            self.changed_sessions.push(self.hasher.hash_one(key()));
        }
    }

    /// Everybody in a lane is to be looked at again.
    pub fn changed_for_all(&mut self) {
        self.all_changed |= !self.queue.is_empty();
    }

    /// An endpoint became ready.
    pub fn fresh(&mut self, endpoint: u32, now: Instant) {
        if !self.queue.is_empty() {
            self.paces.insert(endpoint, Pace::new(now));
        }
    }

    /// The endpoint that offers a slot, while somebody is placed for it.
    pub fn serving(&self) -> Option<u32> {
        self.serving
    }

    /// Another process hands on what becomes free. What is noted here would only grow; should this one decide again, it
    /// looks at everybody. Turns that have come stay: each is a waiter's, once.
    fn leave_it_to_another(&mut self) {
        self.all_changed |= !(self.freed.is_empty() && self.changed.is_empty() && self.changed_sessions.is_empty());
        self.freed.clear();
        self.changed.clear();
        self.changed_sessions.clear();
    }

    /// A slot is free, of those that are limited.
    pub fn slot_freed(&mut self, now: Instant) {
        self.rate.event(now);
    }

    /// A run has ended: its session's next may go.
    pub fn run_ended(&mut self, run: RunId, origin: &Origin) {
        if let Some(session) = &origin.turn {
            self.due.extend(self.turns.ended(session, run));
        }
        if let Some(principal) = origin.principal {
            self.uncount(principal);
        }
    }

    pub fn count(&mut self, principal: [u8; 16]) {
        *self.principals.entry(principal).or_insert(0) += 1;
    }

    fn uncount(&mut self, principal: [u8; 16]) {
        if let Some(count) = self.principals.get_mut(&principal) {
            *count -= 1;
            if *count == 0 {
                self.principals.remove(&principal);
            }
        }
    }
}

impl Rules {
    /// Runs are counted for their session, because a second one may not simply go.
    pub(super) fn takes_turns(&self) -> bool {
        self.double_texting.policy != Policy::Allow || self.double_texting.allow_override
    }
}

impl Core {
    /// Places an exchange, or gives it a place to wait, or says why neither. Runs that end by it are added to `ended`.
    pub fn arrive(
        &mut self,
        ask: &Ask<'_>,
        run: Option<RunId>,
        ended: &mut Vec<Ended>,
        now: Instant,
        rng: u64,
    ) -> Arrived {
        let now = self.begin_pick(now);
        self.room.rng = rng;
        if let Some(grant) = self.follow_run(ask, now) {
            return Arrived::Placed(grant);
        }
        if self.has_successor() {
            return self.ask_successor(ask, run, now);
        }
        let Some(run) = run else { return self.arrive_beside(ask, now, rng) };
        if self.is_principal_full(ask) {
            return Arrived::Refused(Refusal::PrincipalLimit);
        }
        let turn = if self.rules.takes_turns() { self.take_turn(ask, run, ended, now) } else { Ok(Turn::Goes(None)) };
        let turn = match turn {
            Ok(Turn::Goes(turn)) => turn,
            Ok(Turn::Waits(ticket)) => return Arrived::Waiting(ticket),
            Err(refusal) => return Arrived::Refused(refusal),
        };
        let refusal = match self.go(ask, run, now, rng) {
            Ok(grant) => {
                self.note_origin(&grant, turn, ask.principal, false);
                return Arrived::Placed(grant);
            }
            Err((unplaced, None)) => unplaced.refusal(),
            Err((unplaced, Some(place))) => match self.wait(ask, Some(run), turn.clone(), place, false, now) {
                Ok(ticket) => {
                    if !self.room.paces.is_empty() {
                        // It may have stood back for somebody who can't use what is there.
                        self.look_at(place);
                    }
                    return Arrived::Waiting(ticket);
                }
                Err(()) => unplaced.refusal(),
            },
        };
        if let Some(session) = turn {
            let next = self.room.turns.ended(&session, run);
            self.room.due.extend(next);
        }
        Arrived::Refused(refusal)
    }

    /// An exchange that starts no run waits only where no endpoint is ready.
    fn arrive_beside(&mut self, ask: &Ask<'_>, now: Instant, rng: u64) -> Arrived {
        match self.place(ask, None, now, rng) {
            Ok(grant) => Arrived::Placed(grant),
            Err(Unplaced::Empty) => match self.wait(ask, None, None, Place::Ready, false, now) {
                Ok(ticket) => Arrived::Waiting(ticket),
                Err(()) => Arrived::Refused(Refusal::NoEndpoint),
            },
            Err(unplaced) => Arrived::Refused(unplaced.refusal()),
        }
    }

    /// Places a start now, or says where it would have to wait, if it may.
    fn go(&mut self, ask: &Ask<'_>, run: RunId, now: Instant, rng: u64) -> Result<Grant, (Unplaced, Option<Place>)> {
        if self.runs.len() >= super::RUNS_MAX {
            return Err((Unplaced::Full(None), None));
        }
        // Fresh endpoints have free slots that those who wait are given one by one: nobody goes before them.
        if !self.room.paces.is_empty() && self.room.queue.placeable() > 0 {
            let place = self.lane(ask, true, now).map_err(|unplaced| (unplaced, None))?;
            if !matches!(place, Place::Endpoint(_)) {
                return Err((Unplaced::Full(None), Some(place)));
            }
        }
        self.grant(ask, Some(run), now, rng).map_err(|unplaced| (unplaced, self.lane_after(ask, unplaced)))
    }

    /// Where somebody waits who was not placed for this reason; `None`: waiting would not help.
    fn lane_after(&self, ask: &Ask<'_>, unplaced: Unplaced) -> Option<Place> {
        match unplaced {
            Unplaced::PinnedFull(endpoint) => Some(Place::Endpoint(endpoint)),
            Unplaced::Full(Some(version)) if ask.key.is_some() || ask.version.is_some() => {
                Some(Place::Version(version))
            }
            Unplaced::Full(_) | Unplaced::Empty if ask.kind == Kind::Start => Some(Place::Any),
            Unplaced::Full(_) | Unplaced::Empty => Some(Place::Ready),
            Unplaced::Lost | Unplaced::Bound(_) => None,
        }
    }

    /// The lane in which somebody has to wait, as things are: it may promise too much, never too little.
    fn lane(&mut self, ask: &Ask<'_>, starts: bool, now: Instant) -> Result<Place, Unplaced> {
        let anywhere = if starts { Place::Any } else { Place::Ready };
        let of_version = |core: &Core, version: usize| {
            let known = &core.versions[version];
            let taken = starts && known.configured && known.ready() > 0;
            if taken { Place::Version(version) } else { anywhere }
        };
        if let Some(key) = ask.key.filter(|_| self.rules.affinity != config::Affinity::None) {
            let here = match self.live_session(key, now) {
                // Where the weights send it, is known when it is placed.
                Some(session) if starts && self.is_evicted(session) => return Ok(anywhere),
                Some(session) => {
                    let here = self.sessions.endpoint(session);
                    Some((here, self.runs.any_at(self.sessions.first_run(session), here)))
                }
                None => ask.hint.and_then(|hint| Some((*self.by_identity.get(hint.endpoint.as_str())?, false))),
            };
            if let Some((here, works_here)) = here {
                return match self.leaves(self.standing(here), works_here, starts)? {
                    None => Ok(Place::Endpoint(here)),
                    Some(outcome) if ask.bound => Err(Unplaced::Bound(outcome)),
                    // Better an endpoint that drains than none.
                    Some(AffinityOutcome::Moved) if self.versions.iter().all(|version| version.ready() == 0) => {
                        Ok(Place::Endpoint(here))
                    }
                    Some(_) => Ok(of_version(self, self.endpoints[here].version)),
                };
            }
        }
        let matched = ask
            .version
            .and_then(|name| self.versions.iter().position(|version| version.configured && *version.name == *name));
        Ok(matched.map_or(anywhere, |version| of_version(self, version)))
    }

    /// Takes a place in the queue, if there is one.
    fn wait(
        &mut self,
        ask: &Ask<'_>,
        run: Option<RunId>,
        turn: Option<SessionKey>,
        place: Place,
        beyond_max: bool,
        now: Instant,
    ) -> Result<Ticket, ()> {
        let session = match (ask.key, &turn) {
            (_, Some(first)) => Some(self.room.hasher.hash_one(first)),
            (Some(key), None) => {
                let first = self.first_key(key, now);
                Some(self.room.hasher.hash_one(first))
            }
            (None, None) => None,
        };
        // One that waits for its turn takes the place of a run that has ended by then.
        let counted = run.is_some() && place != Place::Turn;
        let principal = ask.principal.filter(|_| counted);
        let arrival = Arrival {
            class: ask.class,
            principal: ask.principal,
            session,
            place,
            deadline: now + self.rules.queue_timeout,
            beyond_max,
            waiter: Waiter { ask: Arc::new(OwnAsk::of(ask)), run, turn, counted: principal.is_some() },
        };
        self.room.rate.begin(now);
        let ticket = self.room.queue.push(arrival, now).map_err(drop)?;
        self.room.handover.sit(ticket);
        if let Some(run) = run {
            self.room.by_run.insert(run, ticket);
        }
        if let Some(principal) = principal {
            self.room.count(principal);
        }
        Ok(ticket)
    }

    /// When somebody who comes to wait now has waited long enough.
    pub fn wait_until(&self, now: Instant) -> Instant {
        now + self.queue_timeout()
    }

    // Turns.

    /// What a start's session says to it.
    fn take_turn(&mut self, ask: &Ask<'_>, run: RunId, ended: &mut Vec<Ended>, now: Instant) -> Result<Turn, Refusal> {
        let Some(key) = ask.key else { return Ok(Turn::Goes(None)) };
        let session = self.first_key(key, now);
        let (cancel, replaced) = match self.room.turns.ask(&session, run, ask.policy, now) {
            Answer::Go => return Ok(Turn::Goes(Some(session))),
            Answer::Busy(outstanding) => return Err(Refusal::Busy(outstanding)),
            Answer::Full => return Err(Refusal::QueueFull),
            Answer::Wait => {
                return match self.wait(ask, Some(run), Some(session.clone()), Place::Turn, false, now) {
                    Ok(ticket) => Ok(Turn::Waits(ticket)),
                    Err(()) => {
                        let next = self.room.turns.ended(&session, run);
                        self.room.due.extend(next);
                        Err(Refusal::QueueFull)
                    }
                };
            }
            Answer::Interrupt { cancel, replaced } => (cancel, replaced),
        };
        let Ok(ticket) = self.wait(ask, Some(run), Some(session), Place::Turn, true, now) else {
            return Err(Refusal::QueueFull);
        };
        for other in replaced {
            self.refuse_run(other, Refusal::Busy(run), now);
        }
        let how = if ask.policy == Policy::Rollback { Cancel::Rollback } else { Cancel::Interrupt };
        for other in cancel {
            self.interrupt(other, run, how, ask.credentials, ended, now);
        }
        Ok(Turn::Waits(ticket))
    }

    /// Ends a run (or what would become one) for the sake of another.
    fn interrupt(
        &mut self,
        run: RunId,
        by: RunId,
        how: Cancel,
        credentials: &[(&'static str, String)],
        ended: &mut Vec<Ended>,
        now: Instant,
    ) {
        if self.room.by_run.contains_key(&run) {
            return self.refuse_run(run, Refusal::Busy(by), now);
        }
        let Some(number) = self.runs.by_id(run) else { return };
        if let Some(mut due) = self.cancel(number, how, RunOutcome::Interrupted, ended, now) {
            due.call.fields.extend(credentials.iter().cloned());
            self.room.calls.push(due);
        } else if let Some(run) = self.runs.run_mut(number).filter(|run| run.waits_for_cancel())
            && let Some(origin) = &mut run.origin
        {
            origin.credentials = credentials.to_vec();
        }
    }

    /// A start's turn has come: it waits for a slot like others, by its order of arrival.
    fn its_turn(&mut self, run: RunId, now: Instant) {
        let Some(ticket) = self.room.by_run.get(&run).copied() else { return };
        if self.room.queue.place(ticket) != Some(Place::Turn) {
            return;
        }
        let Some(waiter) = self.room.queue.get_mut(ticket) else { return };
        let ask = Arc::clone(&waiter.ask);
        if let Some(principal) = ask.principal {
            waiter.counted = true;
            self.room.count(principal);
        }
        match self.lane(&ask.ask(), true, now) {
            Ok(place) => {
                self.room.queue.sort(ticket, place);
                self.look_at(place);
            }
            Err(unplaced) => self.refuse(ticket, unplaced.refusal()),
        }
    }

    /// The first key of the session that this one is a name of.
    fn first_key(&mut self, key: &SessionKey, now: Instant) -> SessionKey {
        match self.live_session(key, now) {
            Some(session) => self.sessions.session_key(session),
            None => key.clone(),
        }
    }

    /// The session of a run has become known by its answer.
    pub(super) fn session_of_run_known(&mut self, number: u32, session: &SessionKey) {
        if !self.rules.takes_turns() {
            return;
        }
        let Some(run) = self.runs.run_mut(number).filter(|run| !run.ended) else { return };
        let origin = run.origin.get_or_insert_default();
        if origin.turn.is_none() {
            origin.turn = Some(session.clone());
            self.room.turns.adopt(session, run.id);
        }
    }

    // Principals.

    fn is_principal_full(&self, ask: &Ask<'_>) -> bool {
        // What interrupts takes the place of what is there.
        let (Some(max), Some(principal)) = (self.rules.max_per_principal, ask.principal) else { return false };
        !matches!(ask.policy, Policy::Interrupt | Policy::Rollback)
            && self.room.principals.get(&principal).is_some_and(|count| *count >= max)
    }

    pub(super) fn note_origin(&mut self, grant: &Grant, turn: Option<SessionKey>, principal: Principal, counted: bool) {
        if turn.is_none() && principal.is_none() {
            return;
        }
        if let Some(run) = grant.run.and_then(|run| self.runs.run_mut(run)) {
            run.origin = Some(Box::new(Origin { turn, principal, credentials: Vec::new() }));
            if let (Some(principal), false) = (principal, counted) {
                self.room.count(principal);
            }
        }
    }

    // Leaving.

    /// Whoever waits leaves. What was given to it meanwhile goes to the next.
    pub fn leave(&mut self, ticket: Ticket, now: Instant) {
        let now = self.advance(now);
        if let Some(waiter) = self.room.queue.leave(ticket) {
            self.tell_leave(ticket, waiter.run);
            self.room.handover.leave(ticket);
            self.will_not_start(waiter);
        } else if let Some(Ok(grant)) = self.room.handover.leave(ticket) {
            // It was never dispatched, so nobody is told of its run's end.
            let _ = self.finish(grant, Finish::Ended(RunOutcome::Rejected), now);
        }
    }

    /// Whoever waits looks whether it was given something, or will be woken.
    pub fn look(&mut self, ticket: Ticket, waker: &Waker) -> Option<Given> {
        self.room.handover.look(ticket, waker)
    }

    /// How many of those that wait came before, itself included.
    pub fn position(&self, ticket: Ticket) -> Option<usize> {
        self.room.queue.position(ticket)
    }

    fn will_not_start(&mut self, waiter: Waiter) {
        let Waiter { ask, run, turn, counted } = waiter;
        if let Some(run) = run {
            self.room.by_run.remove(&run);
            if let Some(session) = turn {
                let next = self.room.turns.ended(&session, run);
                self.room.due.extend(next);
            }
        }
        if let Some(principal) = ask.principal.filter(|_| counted) {
            self.room.uncount(principal);
        }
    }

    fn refuse(&mut self, ticket: Ticket, refusal: Refusal) {
        let Some(waiter) = self.room.queue.leave(ticket) else { return };
        self.tell_leave(ticket, waiter.run);
        self.will_not_start(waiter);
        self.give(ticket, Err(refusal));
    }

    /// Nobody who waits will be placed any more.
    pub(super) fn refuse_all(&mut self) {
        let mut waiting: Vec<Ticket> = self.room.by_run.values().copied().collect();
        waiting.extend(self.room.queue.all_in_lanes());
        for ticket in waiting {
            // One that was named twice is gone by then.
            self.refuse(ticket, Refusal::Ending);
        }
    }

    fn refuse_run(&mut self, run: RunId, refusal: Refusal, now: Instant) {
        let Some(ticket) = self.room.by_run.get(&run).copied() else { return };
        self.advance(now);
        self.refuse(ticket, refusal);
    }

    pub(super) fn give(&mut self, ticket: Ticket, given: Given) {
        match self.room.handover.give(ticket, given) {
            Ok(waker) => self.room.wakers.extend(waker),
            // Whoever is in the queue sits, so this does not happen; and if it did, no slot may be lost.
            Err(given) => {
                debug_assert!(false, "whoever waits has a seat");
                if let (Ok(grant), Some(now)) = (given, self.clock) {
                    let _ = self.finish(grant, Finish::Ended(RunOutcome::Rejected), now);
                }
            }
        }
    }

    // Handing on.

    /// Hands on what has become free. To be called before the lock is released, after whatever was done under it.
    #[inline]
    pub fn settle_up(&mut self) -> Vec<Waker> {
        let room = &self.room;
        // What nobody waits for is nobody's.
        if room.queue.is_empty() && room.wakers.is_empty() && room.paces.is_empty() {
            return Vec::new();
        }
        self.hand_on()
    }

    fn hand_on(&mut self) -> Vec<Waker> {
        if self.has_successor() {
            self.room.leave_it_to_another();
        }
        let room = &self.room;
        let nothing_changed = room.changed.is_empty() && room.changed_sessions.is_empty() && !room.all_changed;
        if self.has_successor() || (room.freed.is_empty() && room.due.is_empty() && nothing_changed) {
            return std::mem::take(&mut self.room.wakers);
        }
        if let Some(now) = self.clock {
            loop {
                if let Some(run) = self.room.due.pop() {
                    self.its_turn(run, now);
                } else if std::mem::take(&mut self.room.all_changed) {
                    let everybody = self.room.queue.all_in_lanes();
                    self.sort_again(&everybody, now);
                } else if let Some(place) = self.room.changed.pop() {
                    let waiting = self.room.queue.waiting_for(place);
                    self.sort_again(&waiting, now);
                } else if let Some(session) = self.room.changed_sessions.pop() {
                    let mut waiting = self.room.queue.of_session(session);
                    waiting.retain(|ticket| self.room.queue.place(*ticket) != Some(Place::Turn));
                    self.sort_again(&waiting, now);
                } else if let Some(endpoint) = self.room.freed.pop() {
                    self.serve(endpoint, now);
                } else {
                    break;
                }
            }
        }
        if self.room.queue.is_empty() {
            self.room.paces.clear();
            self.room.pace_due = None;
        }
        std::mem::take(&mut self.room.wakers)
    }

    /// Puts those for whom something has changed where they belong now.
    fn sort_again(&mut self, tickets: &[Ticket], now: Instant) {
        for ticket in tickets {
            let Some(waiter) = self.room.queue.get(*ticket) else { continue };
            let (ask, starts) = (Arc::clone(&waiter.ask), waiter.run.is_some());
            match self.lane(&ask.ask(), starts, now) {
                Ok(place) => self.room.queue.sort(*ticket, place),
                Err(unplaced) => self.refuse(*ticket, unplaced.refusal()),
            }
        }
        if !tickets.is_empty() {
            self.room.freed.clear();
            self.room.freed.extend(self.endpoints.numbers());
        }
    }

    /// Has those endpoints looked at where somebody in this lane may go.
    fn look_at(&mut self, place: Place) {
        match place {
            Place::Endpoint(endpoint) => self.room.freed.push(endpoint),
            Place::Version(version) => {
                if let Some(version) = self.versions.get(version) {
                    self.room.freed.extend(&version.endpoints);
                }
            }
            Place::Any | Place::Ready => self.room.freed.extend(self.endpoints.numbers()),
            Place::Nowhere | Place::Turn => {}
        }
    }

    /// Gives what an endpoint has to those who wait for it, in their order.
    fn serve(&mut self, endpoint: u32, now: Instant) {
        let rng = self.room.rng;
        while let Some(offer) = self.offer(endpoint, now)
            && let Some(ticket) = self.room.queue.first(offer)
            && let Some(waiter) = self.room.queue.get(ticket)
        {
            let (ask, run) = (Arc::clone(&waiter.ask), waiter.run);
            let ask = ask.ask();
            self.room.serving = run.is_some().then_some(endpoint);
            let granted = self.grant(&ask, run, now, rng);
            self.room.serving = None;
            let unplaced = match granted {
                Ok(grant) => {
                    if let Some(waiter) = self.room.queue.take(ticket, offer) {
                        let Waiter { ask, run, turn, counted } = waiter;
                        if let Some(run) = run {
                            self.room.by_run.remove(&run);
                        }
                        self.note_origin(&grant, turn, ask.principal, counted);
                    }
                    self.give(ticket, Ok(grant));
                    continue;
                }
                Err(unplaced) => unplaced,
            };
            let Some(place) = self.lane_after(&ask, unplaced) else {
                self.refuse(ticket, unplaced.refusal());
                continue;
            };
            let place = if self.room.queue.place(ticket) == Some(place) { Place::Nowhere } else { place };
            self.room.queue.sort(ticket, place);
            // Another version may have room, which only its own endpoints hand out.
            if let Place::Version(version) = place
                && self.versions.get(version).is_some_and(|version| version.has_slot())
            {
                self.look_at(place);
            }
        }
    }

    /// What an endpoint has to offer; `None`: nothing.
    fn offer(&mut self, number: u32, now: Instant) -> Option<Offer> {
        if !self.endpoints.contains(number) {
            return None;
        }
        let endpoint = &self.endpoints[number];
        let slot = endpoint.has_slot() && self.runs.len() < super::RUNS_MAX;
        let mut open = endpoint.ready;
        if let Some(pace) = self.room.paces.get(&number).filter(|_| open) {
            let load = u64::from(endpoint.outstanding) + u64::from(endpoint.open);
            if pace.over(now) {
                self.room.paces.remove(&number);
            } else if let Err(later) = pace.ready(load, now) {
                open = false;
                let due = self.room.pace_due.map_or(later, |due| due.min(later));
                self.room.pace_due = Some(due);
            }
        }
        let version = endpoint.version;
        let common = self.versions[version].effective_weight > 0;
        (slot || open).then_some(Offer { endpoint: number, version, slot, open, common })
    }

    // Time.

    /// What is due for those who wait; to be called often. The calls that are to be made are added to `calls`, up to
    /// `limit`.
    pub(super) fn look_at_waiting(&mut self, limit: usize, calls: &mut Vec<DueCall>, now: Instant) {
        let room = limit.saturating_sub(calls.len()).min(self.room.calls.len());
        calls.extend(self.room.calls.drain(..room));
        if self.room.queue.is_empty() {
            return;
        }
        let overdue = self.room.turns.overdue(now);
        self.room.due.extend(overdue);
        // Whoever waits looks at its own watch, too; this is for one that is held up.
        for (ticket, waiter) in self.room.queue.expire(now, EXPIRED_PER_LOOK) {
            self.tell_leave(ticket, waiter.run);
            self.will_not_start(waiter);
            self.give(ticket, Err(Refusal::QueueTimeout));
        }
        if self.room.pace_due.is_some_and(|due| due <= now) {
            self.room.pace_due = None;
            self.room.freed.extend(self.room.paces.keys());
        }
    }

    // What is told.

    pub(super) fn queue_status(&self, now: Instant) -> QueueStatus {
        let oldest = self.room.queue.oldest_age(now);
        QueueStatus {
            length: self.room.queue.len() as u64,
            oldest_ms: oldest.as_millis().try_into().unwrap_or(u64::MAX),
        }
    }

    /// Waiters that one more endpoint could take.
    pub(super) fn placeable_demand(&self) -> u64 {
        self.room.queue.placeable() as u64
    }

    pub(super) fn has_queue_place(&self) -> bool {
        self.room.queue.len() < self.rules.queue_max
    }

    /// When somebody who was refused a place should come again.
    pub fn retry_after(&self, now: Instant) -> Duration {
        self.room.rate.retry_after(self.room.queue.len(), now)
    }

    // Reload.

    /// Takes new rules.
    pub(super) fn take_queue_rules(&mut self, took_turns: bool) {
        self.room.queue.set_max(self.rules.queue_max);
        if self.rules.takes_turns() && !took_turns {
            let of_sessions = self.runs.iter().filter_map(|(number, run)| Some((number, run.session?)));
            let of_sessions: Vec<(u32, u32)> = of_sessions.collect();
            for (number, session) in of_sessions {
                let session = self.sessions.session_key(session);
                self.session_of_run_known(number, &session);
            }
        }
        self.room.changed_for_all();
    }
}

impl Unplaced {
    pub fn refusal(self) -> Refusal {
        match self {
            Unplaced::PinnedFull(_) => Refusal::PinnedFull,
            Unplaced::Full(_) => Refusal::QueueFull,
            Unplaced::Empty => Refusal::NoEndpoint,
            Unplaced::Lost => Refusal::SessionLost,
            Unplaced::Bound(affinity) => Refusal::SessionGone(affinity),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "nobody reads it")]
    fn what_is_freed_while_another_process_decides_is_not_gathered() {
        let now = ids::now();
        let mut core = Core::new("agents");
        core.hand_over(tokio::sync::mpsc::unbounded_channel().0, now);
        let waits = core.ask_successor(&Ask::new(Kind::Start, None), Some(RunId::generate()), now);
        assert!(matches!(waits, Arrived::Waiting(_)));
        core.room.all_changed = false;
        for endpoint in 0..1000 {
            core.room.touched(endpoint);
            core.room.changed.push(Place::Endpoint(endpoint));
            core.room.changed_for_session(|| SessionKey { scope: None, text: "a".into() });
            core.settle_up();
        }
        let Room { freed, changed, changed_sessions, all_changed, .. } = &core.room;
        assert!(freed.is_empty() && changed.is_empty() && changed_sessions.is_empty());
        assert!(all_changed, "should this one decide again, it looks at everybody");
    }
}
