//! Succession: gives the whole state of a service to another process, and takes it from one.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use crate::config::{self, Policy};
use crate::ids::RunId;
use crate::protocols::Cancel;
use crate::state::core::waiting::{OwnAsk, Waiter};
use crate::state::core::{Arrived, Core, Grant, Request};
use crate::state::dispatcher::Ask;
use crate::state::endpoints::{Endpoint, Health, HealthStanding, Says};
use crate::state::image::{Place, RunImage, RunsTaken, ServiceImage};
use crate::state::queue::{self, Arrival, Ticket};
use crate::state::runs::Cancelling;
use crate::state::sessions::SessionKey;
use crate::state::succession::{AskSent, DrainLeft, Estate, HealthLeft, Told};
use crate::state::{AffinityOutcome, Refusal, RunOutcome, TargetSettings};

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
        let image = self.image(RunsTaken::All, now);
        let estate = Estate { image, health: self.health_left(now), drains: self.drains_left() };
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
    pub fn has_successor(&self) -> bool {
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
            place: queue::Place::Nowhere,
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

    pub(super) fn tell_start(&self, number: u32) {
        if let (true, Some(run)) = (self.has_successor(), self.runs.run(number)) {
            let (run, place) = self.run_alone(run);
            self.tell_successor(|service| Told::Started { service, run: Box::new(run), place });
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

    /// An answer that came here said whether its endpoint drains.
    pub(super) fn tell_says(&self, number: u32, drains: bool) {
        self.tell_successor(|service| {
            let endpoint = self.endpoints[number].identity.to_string();
            Told::Says { service, endpoint, drains }
        });
    }

    /// What drains there drains here, and what no more, no more: it is cut, or not, where it is carried.
    pub fn drains_there(&mut self, drains: &[DrainLeft], now: Instant) {
        let now = self.advance(now);
        let by_identity: HashMap<&str, &DrainLeft> = drains.iter().map(|left| (left.endpoint.as_str(), left)).collect();
        for number in self.endpoints.numbers() {
            let endpoint = &self.endpoints[number];
            // One that was removed here already drains anyhow.
            if !endpoint.configured {
                continue;
            }
            let left = by_identity.get(&*endpoint.identity);
            let (drained, says) = left.map_or((false, None), |left| (left.drained, left.says));
            // A drain that has come to its deadline comes to it here, too, and may be forgotten by it as it is there.
            let is_over = left.is_some_and(|left| left.cut) && endpoint.draining();
            if is_over || (drained, says) == (endpoint.drained, endpoint.says) {
                continue;
            }
            let deadline = left.and_then(|left| left.deadline).map(|deadline| self.instant(deadline));
            let endpoint = &mut self.endpoints[number];
            let was_draining = endpoint.draining();
            (endpoint.drained, endpoint.says) = (drained, says);
            match (was_draining, endpoint.draining()) {
                (false, true) => endpoint.drain_deadline = deadline,
                (true, false) => endpoint.end_drain(),
                _ => {}
            }
            self.drains_changed();
            self.refresh(number, now);
        }
    }

    fn drains_left(&self) -> Vec<DrainLeft> {
        let endpoints = self.endpoints.numbers().into_iter().map(|number| &self.endpoints[number]);
        let drains = |endpoint: &&Endpoint| !endpoint.gone && (endpoint.draining() || endpoint.cutting.is_some());
        let left = endpoints.filter(drains).map(|endpoint| DrainLeft {
            endpoint: endpoint.identity.to_string(),
            drained: endpoint.drained || !endpoint.configured,
            says: endpoint.says,
            deadline: endpoint.drain_deadline.map(|deadline| self.moment(deadline)),
            cut: endpoint.cutting.is_some(),
        });
        left.collect()
    }

    fn health_left(&self, now: Instant) -> Vec<HealthLeft> {
        let endpoints = self.endpoints.numbers().into_iter().map(|number| &self.endpoints[number]);
        let left = endpoints.map(|endpoint| HealthLeft {
            endpoint: endpoint.identity.to_string(),
            healthy: match endpoint.health.standing {
                HealthStanding::Unknown => None,
                standing => Some(standing == HealthStanding::Healthy),
            },
            ejected_for: endpoint
                .ejected_until
                .map(|until| until.saturating_duration_since(now).as_millis().try_into().unwrap_or(u64::MAX)),
        });
        left.collect()
    }

    // After: this process takes.

    /// As [`Core::restore`]; returned is what the process before carries.
    pub fn take_over(
        &mut self,
        estate: Estate,
        settings: &dyn Fn(&Place) -> Option<TargetSettings>,
        now: Instant,
    ) -> Vec<Grant> {
        let now = self.advance(now);
        let Estate { image, health, drains } = estate;
        for left in &health {
            self.inherit_health(left, now);
        }
        let carried = image.runs.iter().filter(|run| run.carriers > 0).filter_map(|run| RunId::parse(&run.id));
        let carried: Vec<RunId> = carried.collect();
        self.restore(image, settings, now);
        for left in &drains {
            self.inherit_drain(left, now);
        }
        carried.into_iter().filter_map(|run| self.carry_for_another(run)).collect()
    }

    fn inherit_health(&mut self, left: &HealthLeft, now: Instant) {
        let Some(number) = self.by_identity.get(left.endpoint.as_str()).copied() else { return };
        let endpoint = &mut self.endpoints[number];
        if let (Some(healthy), true) = (left.healthy, self.rules.checked)
            && endpoint.health.standing == HealthStanding::Unknown
        {
            let standing = if healthy { HealthStanding::Healthy } else { HealthStanding::Unhealthy };
            endpoint.health = Health { standing, against: 0, proven: healthy };
        }
        if let Some(left) = left.ejected_for.filter(|_| self.rules.outlier.consecutive_failures > 0) {
            endpoint.ejected_until = Some(now + Duration::from_millis(left));
            self.versions[endpoint.version].ejected += 1;
            self.ejected.push(number);
        }
        self.refresh(number, now);
    }

    /// Operators' drains are in the picture; these are those that endpoints told of, and of endpoints that were removed.
    fn inherit_drain(&mut self, left: &DrainLeft, now: Instant) {
        let Some(number) = self.by_identity.get(left.endpoint.as_str()).copied() else { return };
        let deadline = left.deadline.map(|deadline| self.instant(deadline));
        let is_checked = self.rules.checked;
        let endpoint = &mut self.endpoints[number];
        if endpoint.configured {
            // What a check said that is no more holds against nobody.
            let says = left.says.filter(|says| is_checked || *says != Says::ByHealth);
            if says.is_some() && !endpoint.draining() {
                endpoint.drain_deadline = deadline;
            }
            endpoint.says = says;
        } else if let Some(deadline) = deadline {
            endpoint.drain_deadline = Some(deadline);
        }
        self.drains_changed();
        self.refresh(number, now);
    }

    /// All endpoints that drain, where there is news of them since that of this number.
    pub fn drains_since(&mut self, known: u64, now: Instant) -> Option<(u64, Vec<DrainLeft>)> {
        self.advance(now);
        (self.drain_news != known).then(|| (self.drain_news, self.drains_left()))
    }

    /// An answer that came to another process said whether its endpoint drains.
    pub fn adopt_says(&mut self, endpoint: &str, drains: bool, now: Instant) {
        if let Some(number) = self.by_identity.get(endpoint).copied() {
            self.answer_says(number, drains, now);
        }
    }

    /// The place among the carriers of an outstanding run that an exchange of another process has.
    fn carry_for_another(&mut self, id: RunId) -> Option<Grant> {
        let number = self.runs.by_id(id)?;
        let run = self.runs.run_mut(number)?;
        run.carriers += 1;
        let (endpoint, session, matched) = (run.endpoint, run.session, run.matched);
        if let Some(session) = session {
            self.sessions.open(session);
        }
        self.watch(number);
        Some(Grant {
            endpoint,
            session,
            run: Some(number),
            run_id: Some(id),
            affinity: AffinityOutcome::Hit,
            matched,
            seen: super::rollout::Seen::default(),
            fixed: true,
            placing: false,
            tried: Vec::new(),
        })
    }

    /// Counts a run that began in another process, whether or not a slot is free for it.
    pub fn adopt_started(&mut self, run: RunImage, place: Place, now: Instant) -> Option<Grant> {
        let id = RunId::parse(&run.id)?;
        let image = ServiceImage { places: vec![place], runs: vec![run], ..ServiceImage::default() };
        self.restore(image, &|_| None, now);
        let grant = self.carry_for_another(id)?;
        self.tell_start(grant.run?);
        Some(grant)
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
        self.pin_changed(session);
        if let Some(alias) = alias {
            self.sessions.add_alias(session, alias, self.rules.max_sessions);
        }
        self.tell_pin(session, alias);
    }

    pub fn adopt_name(&mut self, id: RunId, key: &str, now: Instant) {
        let now = self.advance(now);
        if let Some(number) = self.runs.by_id(id) {
            self.runs.name(number, key);
            self.run_changed(number);
            self.tell_name(number, key);
            self.named(number, now);
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
