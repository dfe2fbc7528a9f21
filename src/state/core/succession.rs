//! Succession: gives the whole state of a service to another process, and takes it from one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use crate::config::{self, Policy};
use crate::ids::RunId;
use crate::protocols::Cancel;
use crate::state::core::waiting::{OwnAsk, Waiter};
use crate::state::core::{Arrived, Core, Grant, Origin, Request};
use crate::state::dispatcher::Ask;
use crate::state::endpoints::{Health, HealthStanding};
use crate::state::queue::{Arrival, Place, Ticket};
use crate::state::runs::{Cancelling, NewRun};
use crate::state::sessions::SessionKey;
use crate::state::succession::{AboutLeft, AskSent, EndpointLeft, Estate, RunLeft, SessionLeft, Told};
use crate::state::{AffinityOutcome, Refusal, RunOutcome};

/// How long an exchange waits for the successor's answer at least, which has its own deadline for the queue.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a run that the successor wants to end may take to do so.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Whom everything is told. What waits to be sent is bounded by the exchanges that this process still has.
pub(super) struct Successor {
    to: UnboundedSender<Told>,
}

impl Core {
    // Before: this process gives.

    pub fn hand_over(&mut self, to: UnboundedSender<Told>, now: Instant) -> Estate {
        let now = self.advance(now);
        let estate = self.estate(now);
        let waiting = self.room.queue.everybody().map(|(ticket, class, waiter)| {
            // It has its place in its session's order already, and must only keep it.
            let policy = if waiter.turn.is_some() { Policy::Enqueue } else { Policy::Allow };
            let ask = Ask { class, policy, ..waiter.ask.ask() };
            let ask = Box::new(AskSent::of(&ask, waiter.run));
            Told::Asks { service: self.name.to_string(), ticket, ask }
        });
        for asks in waiting {
            // Whoever reads is gone only where the handover has failed, and then it is taken back.
            let _ = to.send(asks);
        }
        self.successor = Some(Successor { to });
        estate
    }

    pub fn reinstate(&mut self, now: Instant) {
        self.advance(now);
        if self.successor.take().is_some() {
            self.room.changed_for_all();
        }
    }

    /// What nothing here carries, and the rollout, are the successor's alone.
    pub fn retire(&mut self, now: Instant) {
        let now = self.advance(now);
        self.forget_rollout();
        let uncarried = self.runs.iter().filter(|(_, run)| run.carriers == 0).map(|(number, _)| number);
        for number in uncarried.collect::<Vec<u32>>() {
            let _ = self.end_run(number, RunOutcome::Unknown, now);
        }
    }

    #[inline]
    pub(super) fn has_successor(&self) -> bool {
        self.successor.is_some()
    }

    pub(super) fn queue_timeout(&self) -> Duration {
        let configured = self.rules.queue_timeout;
        if self.has_successor() { configured.max(ANSWER_TIMEOUT) } else { configured }
    }

    /// Whoever comes now waits for what the successor says.
    pub(super) fn ask_successor(&mut self, ask: &Ask<'_>, run: Option<RunId>, now: Instant) -> Arrived {
        let arrival = Arrival {
            class: ask.class,
            principal: ask.principal,
            session: None,
            place: Place::Nowhere,
            deadline: now + self.queue_timeout(),
            beyond_max: true,
            waiter: Waiter { ask: Arc::new(OwnAsk::of(ask)), run, turn: None, counted: false },
        };
        let Ok(ticket) = self.room.queue.push(arrival, now) else { return Arrived::Refused(Refusal::QueueFull) };
        self.room.handover.sit(ticket);
        if let Some(run) = run {
            self.room.by_run.insert(run, ticket);
        }
        let ask = Box::new(AskSent::of(ask, run));
        self.tell_successor(|service| Told::Asks { service, ticket, ask });
        Arrived::Waiting(ticket)
    }

    /// The successor has reserved an endpoint for whoever has this ticket.
    pub fn placed_there(&mut self, ticket: Ticket, endpoint: &str, affinity: AffinityOutcome, now: Instant) {
        let now = self.advance(now);
        // Whoever left has told so.
        let Some(waiter) = self.room.queue.leave(ticket) else { return };
        let Waiter { ask, run, .. } = waiter;
        if let Some(run) = run {
            self.room.by_run.remove(&run);
        }
        let Some(number) = self.by_identity.get(endpoint).copied() else {
            // Only the newer configuration knows it.
            if let Some(run) = run {
                self.tell_end(run, RunOutcome::Rejected);
            }
            return self.give(ticket, Err(Refusal::NoEndpoint));
        };
        let ask = ask.ask();
        let session = ask.key.filter(|_| self.rules.affinity == config::Affinity::Pin).and_then(|key| {
            match self.live_session(key, now) {
                Some(session) => {
                    if self.sessions.endpoint(session) != number {
                        self.move_pin(session, number);
                    }
                    Some(session)
                }
                None => self.pin(key, number, false, now),
            }
        });
        let request = Request { key: ask.key, run, creates: ask.creates, version: None, now, rng: 0 };
        let mut grant = self.reserve(number, session, false, affinity, &request);
        // The successor has chosen the only place that it may have.
        grant.fixed = self.rules.any_limit;
        if let Some(number) = grant.run {
            if let Some(key) = ask.run {
                self.runs.name(number, key);
            }
            if let Some(run) = self.runs.run_mut(number) {
                run.about = ask.about.cloned().unwrap_or_default();
                run.deadline = self.rules.max_duration.map(|max| now + max);
            }
        }
        self.give(ticket, Ok(grant));
    }

    pub fn refused_there(&mut self, ticket: Ticket, refusal: Refusal) {
        let Some(waiter) = self.room.queue.leave(ticket) else { return };
        if let Some(run) = waiter.run {
            self.room.by_run.remove(&run);
        }
        self.give(ticket, Err(refusal));
    }

    /// A run that is carried here was ended from there: what carries it is to be cut.
    pub fn stop_run(&mut self, id: RunId, outcome: RunOutcome, now: Instant) {
        let now = self.advance(now);
        let Some(number) = self.runs.by_id(id) else { return };
        let until = now + STOP_TIMEOUT;
        if let Some(run) = self.runs.run_mut(number) {
            run.stop.set(outcome);
            let how = Cancel::Interrupt;
            run.cancel = Some(Cancelling { how, outcome, until, sent: true, by_closing: true });
        }
        self.runs.wake_at(number, until);
    }

    // What is told, where there is somebody.

    fn tell_successor(&self, told: impl FnOnce(String) -> Told) {
        if let Some(successor) = &self.successor {
            // Where nobody reads any more, this process is about to decide again.
            let _ = successor.to.send(told(self.name.to_string()));
        }
    }

    pub(super) fn tell_end(&self, run: RunId, outcome: RunOutcome) {
        self.tell_successor(|service| Told::Ended { service, run, outcome });
    }

    /// Somebody waits no longer, and does not know whether it was given a place just now.
    pub(super) fn tell_leave(&self, ticket: Ticket, run: Option<RunId>) {
        self.tell_successor(|service| Told::Leaves { service, ticket });
        if let Some(run) = run {
            self.tell_end(run, RunOutcome::Rejected);
        }
    }

    pub(super) fn tell_name(&self, number: u32, key: &str) {
        if let (true, Some(run)) = (self.has_successor(), self.runs.run(number)) {
            self.tell_successor(|service| Told::Named { service, run: run.id, key: key.to_owned() });
        }
    }

    pub(super) fn tell_move(&self, grant: &Grant) {
        if let (true, Some(run)) = (self.has_successor(), grant.run_id) {
            let endpoint = self.endpoints[grant.endpoint].identity.to_string();
            self.tell_successor(|service| Told::Moved { service, run, endpoint });
        }
    }

    pub(super) fn tell_pin(&self, session: u32, alias: Option<&SessionKey>) {
        if self.has_successor() {
            let key = self.sessions.session_key(session);
            let endpoint = self.endpoints[self.sessions.endpoint(session)].identity.to_string();
            self.tell_successor(|service| Told::Pinned { service, key, alias: alias.cloned(), endpoint });
        }
    }

    pub(super) fn tell_start(&self, number: u32, now: Instant) {
        if let (true, Some(run)) = (self.has_successor(), self.run_left(number, true, now)) {
            self.tell_successor(|service| Told::Started { service, run: Box::new(run) });
        }
    }

    /// A run goes on that nothing here carries any more: the successor looks after it.
    pub(super) fn leave_run(&mut self, number: u32, now: Instant) {
        if let Some(run) = self.runs.run(number) {
            let run = run.id;
            self.tell_successor(|service| Told::Left { service, run });
            let _ = self.end_run(number, RunOutcome::Unknown, now);
        }
    }

    fn estate(&self, now: Instant) -> Estate {
        let numbers = self.endpoints.numbers();
        let endpoints = numbers.iter().map(|number| {
            let endpoint = &self.endpoints[*number];
            EndpointLeft {
                identity: endpoint.identity.to_string(),
                drained: endpoint.drained,
                drain_left: endpoint.drain_deadline.map(|deadline| ahead(deadline, now)),
                healthy: match endpoint.health.standing {
                    HealthStanding::Unknown => None,
                    standing => Some(standing == HealthStanding::Healthy),
                },
                ejected_for: endpoint.ejected_until.map(|until| ahead(until, now)),
            }
        });
        let ticks = self.ticks(now);
        let left = (0..self.sessions.slots()).filter_map(|slot| self.sessions.view(slot));
        let mut sessions: Vec<SessionLeft> = left
            .filter(|view| view.confirmed)
            .filter_map(|view| {
                Some(SessionLeft {
                    key: self.sessions.session_key(view.id),
                    aliases: self.sessions.aliases(view.id),
                    endpoint: numbers.binary_search(&view.endpoint).ok()? as u32,
                    idle: milliseconds(self.sessions.idle(view.id, ticks)),
                    born: self.sessions.born_seconds(view.id),
                    settled: self.sessions.settled(view.id),
                    matched: view.matched,
                    evicted: self.sessions.evicted(view.id),
                })
            })
            .collect();
        sessions.sort_by_key(|session| std::cmp::Reverse(session.idle));
        let runs = self.runs.iter().filter_map(|(number, run)| self.run_left(number, run.carriers > 0, now));
        Estate {
            service: self.name.to_string(),
            started_ago: self.started.map_or(0, |started| behind(started, now)),
            rollout: self.rollout.rollout.clone(),
            endpoints: endpoints.collect(),
            sessions,
            runs: runs.collect(),
        }
    }

    fn run_left(&self, number: u32, carried: bool, now: Instant) -> Option<RunLeft> {
        let run = self.runs.run(number).filter(|run| !run.ended)?;
        let origin = run.origin.as_deref();
        Some(RunLeft {
            id: run.id,
            endpoint: self.endpoints[run.endpoint].identity.to_string(),
            session: run.session.map(|session| self.sessions.session_key(session)),
            key: run.key.as_deref().map(str::to_owned),
            about: AboutLeft::of(&run.about),
            age: milliseconds(run.age(now)),
            carried,
            matched: run.matched,
            unjudged: run.unjudged,
            first_event: run.first_event.map(|at| milliseconds(at.saturating_duration_since(run.started))),
            turn: origin.and_then(|origin| origin.turn.clone()),
            principal: origin.and_then(|origin| origin.principal),
            deadline: run.deadline.map(|deadline| ahead(deadline, now)),
        })
    }

    // After: this process takes.

    /// To be called when the configuration was applied, before anything is placed. Pins and runs at endpoints that the
    /// configuration does not name are not taken. Returned is what the process before carries.
    pub fn take_over(&mut self, estate: Estate, now: Instant) -> Vec<Grant> {
        let now = self.advance(now);
        let Estate { service: _, started_ago, rollout, endpoints, sessions, runs } = estate;
        if let Some(started) = now.checked_sub(Duration::from_millis(started_ago)) {
            self.started = Some(started);
        }
        if let Some(rollout) = rollout {
            self.continue_rollout(rollout, now);
        }
        let numbers: Vec<Option<u32>> =
            endpoints.iter().map(|endpoint| self.take_endpoint_over(endpoint, now)).collect();
        let ticks = self.ticks(now);
        for left in sessions {
            let Some(number) = numbers.get(left.endpoint as usize).copied().flatten() else { continue };
            if self.sessions.len() >= self.rules.max_sessions || self.sessions.find(&left.key).is_some() {
                continue;
            }
            let session = self.sessions.insert(&left.key, number, left.matched, left.born.unwrap_or(0));
            self.endpoints[number].sessions += 1;
            self.sessions.confirm(session, left.settled);
            if left.born.is_none() {
                self.sessions.carry(session);
            }
            self.sessions.evict(session, left.evicted);
            for alias in &left.aliases {
                self.sessions.add_alias(session, alias, self.rules.max_sessions);
            }
            let idle = Duration::from_millis(left.idle).as_millis() / super::TICK.as_millis();
            self.sessions.rest(session, ticks.wrapping_sub(idle as u32));
        }
        let adopted: Vec<Grant> = runs.iter().filter_map(|run| self.adopt_run(run, now)).collect();
        for number in self.endpoints.numbers() {
            self.refresh(number, now);
        }
        adopted
    }

    fn take_endpoint_over(&mut self, left: &EndpointLeft, now: Instant) -> Option<u32> {
        let number = self.by_identity.get(left.identity.as_str()).copied()?;
        let soon = |left: u64| now + Duration::from_millis(left);
        let endpoint = &mut self.endpoints[number];
        endpoint.drained = left.drained;
        endpoint.drain_deadline = left.drain_left.map(soon).filter(|_| left.drained);
        if let (Some(healthy), true) = (left.healthy, self.rules.checked)
            && endpoint.health.standing == HealthStanding::Unknown
        {
            let standing = if healthy { HealthStanding::Healthy } else { HealthStanding::Unhealthy };
            endpoint.health = Health { standing, against: 0, proven: healthy };
        }
        if let Some(left) = left.ejected_for.filter(|_| self.rules.outlier.consecutive_failures > 0) {
            endpoint.ejected_until = Some(soon(left));
            self.versions[endpoint.version].ejected += 1;
            self.ejected.push(number);
        }
        self.refresh(number, now);
        Some(number)
    }

    /// Counts a run where it is, whether or not a slot is free there. A grant is given for one that is carried.
    pub fn adopt_run(&mut self, left: &RunLeft, now: Instant) -> Option<Grant> {
        let now = self.advance(now);
        let number = self.by_identity.get(left.endpoint.as_str()).copied()?;
        if self.runs.by_id(left.id).is_some() || self.runs.len() >= super::RUNS_MAX {
            return None;
        }
        let pinned = left.session.as_ref().filter(|_| self.rules.affinity == config::Affinity::Pin);
        let session = pinned.and_then(|key| match self.sessions.find(key) {
            Some(session) => Some(session),
            None => self.pin(key, number, left.matched, now),
        });
        let earlier = |age: u64| now.checked_sub(Duration::from_millis(age)).unwrap_or(now);
        let started = earlier(left.age);
        let endpoint = &mut self.endpoints[number];
        endpoint.outstanding += 1;
        let run = NewRun {
            id: left.id,
            target: endpoint.target.clone(),
            endpoint: number,
            session,
            started,
            about: left.about.about(),
            carriers: u32::from(left.carried),
            matched: left.matched,
        };
        let first = session.and_then(|session| self.sessions.first_run(session));
        let run_number = self.runs.insert(run, first);
        if let Some(session) = session {
            // Busy, so that it is in no list of idle ones.
            self.sessions.open(session);
            self.sessions.set_first_run(session, Some(run_number));
            if !left.carried {
                self.sessions.close(session);
            }
        }
        if let Some(run) = self.runs.run_mut(run_number) {
            run.seen = now;
            run.unjudged = left.unjudged;
            run.first_event = left.first_event.map(|after| started + Duration::from_millis(after));
            run.deadline = left.deadline.map(|left| now + Duration::from_millis(left));
            if left.principal.is_some() {
                run.origin = Some(Box::new(Origin { turn: None, principal: left.principal }));
            }
        }
        if let Some(principal) = left.principal {
            self.room.count(principal);
        }
        if let Some(key) = &left.key {
            self.runs.name(run_number, key);
        }
        if let Some(turn) = &left.turn {
            self.session_of_run_known(run_number, turn);
        }
        self.reindex(number);
        self.watch(run_number);
        self.tell_start(run_number, now);
        left.carried.then(|| Grant {
            endpoint: number,
            session,
            run: Some(run_number),
            run_id: Some(left.id),
            affinity: AffinityOutcome::Hit,
            matched: left.matched,
            seen: super::rollout::Seen::default(),
            fixed: true,
            placing: false,
            tried: Vec::new(),
        })
    }

    /// A session lives there, as an answer said. One that this process has placed elsewhere meanwhile stays.
    pub fn adopt_pin(&mut self, key: &SessionKey, alias: Option<&SessionKey>, endpoint: &str, now: Instant) {
        let now = self.advance(now);
        if self.rules.affinity != config::Affinity::Pin {
            return;
        }
        let Some(number) = self.by_identity.get(endpoint).copied() else { return };
        let session = match self.sessions.find(key) {
            Some(session) => session,
            None => {
                let Some(session) = self.pin(key, number, false, now) else { return };
                self.sessions.confirm(session, true);
                self.rest_or_unpin(session, now);
                session
            }
        };
        if self.sessions.endpoint(session) == number {
            self.sessions.confirm(session, true);
        }
        if let Some(alias) = alias {
            self.sessions.add_alias(session, alias, self.rules.max_sessions);
        }
        self.tell_pin(session, alias);
    }

    pub fn adopt_name(&mut self, id: RunId, key: &str) {
        if let Some(number) = self.runs.by_id(id) {
            self.runs.name(number, key);
            self.tell_name(number, key);
        }
    }

    /// What another process carries was sent to this endpoint instead.
    pub fn follow_move(&mut self, grant: &mut Grant, endpoint: &str, now: Instant) {
        let now = self.advance(now);
        let Some(to) = self.by_identity.get(endpoint).copied() else { return };
        if to != grant.endpoint && grant.run.and_then(|run| self.runs.run(run)).is_some_and(|run| !run.ended) {
            self.shift(grant, to, now);
            self.tell_move(grant);
        }
    }
}

fn milliseconds(time: Duration) -> u64 {
    time.as_millis().try_into().unwrap_or(u64::MAX)
}

fn ahead(at: Instant, now: Instant) -> u64 {
    milliseconds(at.saturating_duration_since(now))
}

fn behind(at: Instant, now: Instant) -> u64 {
    milliseconds(now.saturating_duration_since(at))
}
