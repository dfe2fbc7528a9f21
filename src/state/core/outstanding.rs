//! Outstanding: runs from their reservation to their end, which may come without an exchange: told by another answer,
//! found out by asking, or assumed after silence.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::ids::RunId;
use crate::protocols::{Call, Cancel, Fact, Protocol, RunRef, Standing as Found};
use crate::state::core::standing::Standing;
use crate::state::core::{Core, Ended, Grant};
use crate::state::runs::{About, Cancelling, NewRun, Run, Stop};
use crate::state::sessions::SessionKey;
use crate::state::status::{CancelReport, DueCall, Ending, Question};
use crate::state::{AffinityOutcome, Kind, RunOutcome};

/// Between two status calls about one run: an eighth of its age, within these.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// How long a call about a run may be under way before it counts as lost.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// Status calls in a row that reached nobody after which the endpoint, and with it the run, is taken for dead.
const UNREACHABLE_MAX: u32 = 3;

/// How long a run that was to be cancelled may take to end; then it counts as ended all the same.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// How the exchange that carried a run is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The run has ended with it.
    Ended(RunOutcome),
    /// The run goes on.
    Left,
}

impl Core {
    /// The place of an exchange that follows an outstanding run: a join carries it, a read or cancel only goes there.
    pub(super) fn follow(&mut self, number: u32, kind: Kind, now: Instant) -> Option<Grant> {
        let run = self.runs.run_mut(number).filter(|run| !run.ended)?;
        let (endpoint, session, id) = (run.endpoint, run.session, run.id);
        run.seen = now;
        let joins = kind == Kind::Join;
        if joins {
            run.carriers += 1;
            self.watch(number);
        } else {
            self.endpoints[endpoint].open += 1;
        }
        if let Some(session) = session {
            self.sessions.open(session);
        }
        Some(Grant {
            endpoint,
            session,
            run: joins.then_some(number),
            run_id: joins.then_some(id),
            affinity: AffinityOutcome::Hit,
            matched: false,
            seen: super::rollout::Seen::default(),
            fixed: true,
            placing: false,
            tried: Vec::new(),
        })
    }

    /// A carrier of a run is over.
    pub(super) fn drop_carrier(&mut self, number: u32, finish: Finish, now: Instant) -> Option<Ended> {
        let run = self.runs.run_mut(number)?;
        run.carriers -= 1;
        run.seen = now;
        let (endpoint, alone) = (run.endpoint, run.carriers == 0);
        let closing = run.cancel.filter(|cancelling| cancelling.by_closing && alone);
        let ended = if run.ended {
            self.endpoints[endpoint].open -= 1;
            None
        } else {
            match finish {
                // What carried it was closed to end it.
                Finish::Left if let Some(cancelling) = closing => self.end_run(number, cancelling.outcome, now),
                // One reader of several that left, or whose stream broke, ends nothing.
                Finish::Ended(RunOutcome::Cancelled | RunOutcome::Truncated) if !alone => None,
                Finish::Ended(outcome) => self.end_run(number, outcome, now),
                Finish::Left if alone && self.has_successor() => {
                    self.leave_run(number, now);
                    None
                }
                Finish::Left => {
                    self.watch(number);
                    self.run_changed(number);
                    None
                }
            }
        };
        self.runs.forget(number);
        ended
    }

    /// Ends an outstanding run, whoever carries it.
    pub(super) fn end_run(&mut self, number: u32, outcome: RunOutcome, now: Instant) -> Option<Ended> {
        let run = self.runs.run(number).filter(|run| !run.ended)?;
        let (endpoint, session, carriers) = (run.endpoint, run.session, run.carriers);
        let ended = Ended { target: run.target.clone(), outcome, duration: run.age(now) };
        self.tell_end(run.id, outcome);
        self.judge_run(number, outcome, now);
        self.run_ends(number);
        self.learn_duration(ended.duration, outcome, now);
        let first = self.runs.end(number);
        self.endpoints[endpoint].outstanding -= 1;
        if self.rules.any_limit {
            self.room.slot_freed(now);
        }
        if let Some(run) = self.runs.run_mut(number)
            && let Some(origin) = run.origin.take()
        {
            let id = run.id;
            self.room.run_ended(id, &origin);
        }
        if !self.endpoints[endpoint].ready {
            // A session that waits for it alone may be free to move.
            self.room.changed_for(endpoint);
        }
        // What still carries it is an exchange like others from here on.
        self.endpoints[endpoint].open += carriers;
        self.reindex(endpoint);
        if let Some(session) = session {
            if let Some(first) = first {
                self.sessions.set_first_run(session, first);
            }
            if !self.sessions.busy(session) {
                self.rest_or_unpin(session, now);
            }
        }
        self.runs.forget(number);
        self.settle(endpoint, now);
        Some(ended)
    }

    /// Takes what an answer told. Every run that has ended by it is added to `ended`.
    pub fn tell(
        &mut self,
        grant: &mut Grant,
        facts: &mut Vec<Fact>,
        scope: Option<[u8; 16]>,
        about: &About,
        ended: &mut Vec<Ended>,
        now: Instant,
    ) {
        let now = self.advance(now);
        self.note(grant);
        for fact in facts.drain(..) {
            match fact {
                Fact::Session(text) => self.learn(grant, &SessionKey { scope, text: text.into() }, now),
                Fact::Run(key) => {
                    if let Some(run) = grant.run {
                        self.runs.name(run, &key);
                        self.run_changed(run);
                        self.tell_name(run, &key);
                        self.named(run, now);
                    }
                }
                Fact::Ended(outcome) => ended.extend(grant.run.and_then(|run| self.end_run(run, outcome, now))),
                Fact::RunStarted(key) => self.start_unasked(grant, &key, about, now),
                Fact::RunEnded(key, outcome) => {
                    ended.extend(self.runs.find(&key).and_then(|run| self.end_run(run, outcome, now)));
                }
                Fact::RunAlive(key) => {
                    if let Some(run) = self.runs.find(&key).and_then(|run| self.runs.run_mut(run)) {
                        run.seen = now;
                    }
                }
                Fact::SessionRunsEnded(outcome) => {
                    for run in self.session_runs(grant) {
                        ended.extend(self.end_run(run, outcome, now));
                    }
                }
                Fact::SessionLost => {
                    if let Some(session) = grant.session {
                        self.pin_ends(session);
                        self.sessions.doubt(session);
                    }
                }
                Fact::RecheckSession => {
                    for run in self.session_runs(grant) {
                        self.runs.wake_at(run, now);
                    }
                }
                Fact::RecheckEndpoint => {
                    let here = self.runs.iter().filter(|(_, run)| run.endpoint == grant.endpoint);
                    for run in here.map(|(number, _)| number).collect::<Vec<u32>>() {
                        self.runs.wake_at(run, now);
                    }
                }
            }
        }
    }

    /// The exchange that opened a socket is over: so are the runs that were started over it, or they go on alone.
    pub fn leave_started(&mut self, keys: &[String], finish: Finish, ended: &mut Vec<Ended>, now: Instant) {
        let now = self.advance(now);
        for number in keys.iter().filter_map(|key| self.runs.find(key)).collect::<Vec<u32>>() {
            match finish {
                Finish::Ended(outcome) => ended.extend(self.end_run(number, outcome, now)),
                Finish::Left if self.has_successor() => self.leave_run(number, now),
                Finish::Left => self.watch(number),
            }
        }
    }

    /// Those of the exchange's session, but for the one that it started.
    fn session_runs(&self, grant: &Grant) -> Vec<u32> {
        let first = grant.session.and_then(|session| self.sessions.first_run(session));
        self.runs.chain(first).map(|(number, _)| number).filter(|number| Some(*number) != grant.run).collect()
    }

    /// A run that no request asked for takes a slot, whether or not one is free: it is there.
    fn start_unasked(&mut self, grant: &Grant, key: &str, about: &About, now: Instant) {
        if self.runs.find(key).is_some() || self.runs.len() >= super::RUNS_MAX {
            return;
        }
        let endpoint = &mut self.endpoints[grant.endpoint];
        endpoint.outstanding += 1;
        let target = endpoint.target.clone();
        let first = grant.session.and_then(|session| self.sessions.first_run(session));
        let number = self.runs.insert(
            NewRun {
                id: RunId::generate(),
                target,
                endpoint: grant.endpoint,
                session: grant.session,
                started: now,
                about: about.clone(),
                carriers: 0,
                matched: grant.matched,
            },
            first,
        );
        if let Some(session) = grant.session {
            self.sessions.set_first_run(session, Some(number));
            let session = self.sessions.session_key(session);
            self.session_of_run_known(number, &session);
        }
        self.runs.name(number, key);
        self.run_changed(number);
        self.reindex(grant.endpoint);
        self.watch(number);
        self.tell_start(number);
    }

    /// Sees to it that a run is looked at when something about it is due.
    pub(super) fn watch(&mut self, number: u32) {
        let Some(run) = self.runs.run(number).filter(|run| !run.ended) else { return };
        let mut next = run.deadline;
        let mut sooner = |when: Instant| next = Some(next.map_or(when, |next: Instant| next.min(when)));
        if let Some(cancelling) = &run.cancel {
            let nameless = run.key.is_none() && run.carriers > 0;
            sooner(if cancelling.sent || nameless { cancelling.until } else { run.seen });
        }
        if run.carriers == 0 {
            sooner(run.seen + self.rules.unseen_timeout);
            if run.asks() {
                sooner(run.seen);
            }
        }
        match next {
            Some(next) => self.runs.wake_at(number, next),
            None => self.runs.sleep(number),
        }
    }

    /// Looks at the runs about which something is due: ends those that have to be over, and gives the calls to be made,
    /// `limit` at most.
    pub fn due_runs(&mut self, limit: usize, ended: &mut Vec<Ended>, now: Instant) -> Vec<DueCall> {
        let now = self.advance(now);
        let mut calls = Vec::new();
        self.look_at_waiting(limit, &mut calls, now);
        while calls.len() < limit
            && let Some(number) = self.runs.take_due(now)
        {
            let Some(run) = self.runs.run(number) else { continue };
            if run.deadline.is_some_and(|deadline| deadline <= now) && run.cancel.is_none() {
                calls.extend(self.cancel(number, Cancel::Interrupt, RunOutcome::TimedOut, ended, now));
                continue;
            }
            if let Some(cancelling) = run.cancel.filter(|cancelling| !cancelling.sent) {
                calls.extend(self.cancel(number, cancelling.how, cancelling.outcome, ended, now));
                continue;
            }
            if let Some(cancelling) = run.cancel.filter(|cancelling| cancelling.until <= now) {
                ended.extend(self.end_run(number, cancelling.outcome, now));
                continue;
            }
            if run.carriers == 0 && now.saturating_duration_since(run.seen) >= self.rules.unseen_timeout {
                ended.extend(self.end_run(number, RunOutcome::Unknown, now));
                continue;
            }
            if self.standing(run.endpoint) == Standing::Lost && run.carriers == 0 && run.unreachable > 0 {
                ended.extend(self.end_run(number, RunOutcome::Failed, now));
                continue;
            }
            match self.question(number) {
                Some(call) => {
                    calls.push(call);
                    if let Some(run) = self.runs.run_mut(number) {
                        run.asking = true;
                    }
                    // Should nobody bring the answer, it is asked again.
                    self.runs.wake_at(number, now + CALL_TIMEOUT);
                }
                None => {
                    let unseen = self.runs.run(number).map(|run| run.seen + self.rules.unseen_timeout);
                    if let Some(unseen) = unseen {
                        self.runs.wake_at(number, unseen.max(now + PAUSE_MIN));
                    }
                }
            }
        }
        calls
    }

    /// The status call about a run.
    fn question(&self, number: u32) -> Option<DueCall> {
        let run = self.runs.run(number)?;
        let call = run.about.protocol?.status_call(&run.reference()?)?;
        Some(run.due(number, Question::Status, call))
    }

    /// Takes what a status call found.
    pub fn asked(&mut self, number: u32, id: RunId, found: Option<Found>, ended: &mut Vec<Ended>, now: Instant) {
        let now = self.advance(now);
        let Some(run) = self.runs.run_mut(number).filter(|run| run.id == id && !run.ended) else { return };
        run.asking = false;
        let pause = (run.age(now) / 8).clamp(PAUSE_MIN, PAUSE_MAX);
        match found {
            Some(Found::Ended(outcome)) => {
                let outcome = run.cancel.map_or(outcome, |cancelling| match outcome {
                    RunOutcome::Completed | RunOutcome::Failed | RunOutcome::TimedOut => outcome,
                    _ => cancelling.outcome,
                });
                ended.extend(self.end_run(number, outcome, now));
                return;
            }
            Some(Found::Running) => {
                run.seen = now;
                run.unreachable = 0;
            }
            Some(Found::NoEvidence) => run.unreachable = 0,
            None => {
                run.unreachable += 1;
                if run.unreachable >= UNREACHABLE_MAX && run.carriers == 0 {
                    ended.extend(self.end_run(number, RunOutcome::Failed, now));
                    return;
                }
            }
        }
        let run = self.runs.run(number);
        let Some(run) = run.filter(|run| run.carriers == 0 || run.cancel.is_some() || run.deadline.is_some()) else {
            return;
        };
        let mut next = now + pause;
        for deadline in [run.deadline, run.cancel.map(|cancelling| cancelling.until)].into_iter().flatten() {
            next = next.min(deadline.max(now));
        }
        self.runs.wake_at(number, next);
    }

    /// Ends a run: by the protocol's call where it has one, else by closing what carries it, which is done at once in
    /// both cases. What the call needs is returned.
    pub(super) fn cancel(
        &mut self,
        number: u32,
        how: Cancel,
        outcome: RunOutcome,
        ended: &mut Vec<Ended>,
        now: Instant,
    ) -> Option<DueCall> {
        let run = self.runs.run_mut(number).filter(|run| !run.ended)?;
        let call = run.reference().and_then(|reference| run.about.protocol?.cancel_call(&reference, how));
        let waiting = run.cancel.filter(|cancelling| !cancelling.sent).map(|cancelling| cancelling.until);
        let until = waiting.unwrap_or(now + CANCEL_TIMEOUT);
        let may_be_named = run.key.is_none() && run.about.goes_on && run.about.protocol.is_some();
        if may_be_named && run.carriers > 0 && now < until {
            // Its endpoint would work on though its connection were closed: it is called once it has said the name.
            run.cancel = Some(Cancelling { how, outcome, until, sent: false, by_closing: false });
            self.runs.wake_at(number, until);
            return None;
        }
        run.stop.set(outcome);
        let until = now + CANCEL_TIMEOUT;
        let Some(call) = call else {
            if run.carriers == 0 {
                ended.extend(self.end_run(number, outcome, now));
            } else {
                // It ends when what carries it is closed, not a moment earlier: its slot is another's then.
                run.cancel = Some(Cancelling { how, outcome, until, sent: true, by_closing: true });
                self.runs.wake_at(number, until);
            }
            return None;
        };
        run.cancel = Some(Cancelling { how, outcome, until, sent: true, by_closing: false });
        run.stop.set_called();
        run.asking = true;
        let mut due = run.due(number, Question::Cancel, call);
        if let Some(origin) = &mut run.origin {
            due.call.fields.append(&mut origin.credentials);
        }
        self.runs.wake_at(number, until);
        Some(due)
    }

    /// The endpoint has said what it calls a run: where it is to end, it can be called now.
    pub(super) fn named(&mut self, number: u32, now: Instant) {
        if self.runs.run(number).is_some_and(Run::waits_for_cancel) {
            self.runs.wake_at(number, now);
        }
    }

    /// The grant's run is to be ended by its protocol's call as soon as nothing carries it. False: there is none.
    pub fn cancel_soon(&mut self, grant: &Grant, now: Instant) -> bool {
        let now = self.advance(now);
        let Some(run) = grant.run.and_then(|run| self.runs.run_mut(run)).filter(|run| !run.ended) else { return false };
        let has_call = run.reference().is_some_and(|reference| {
            let call = |protocol: &'static dyn Protocol| protocol.cancel_call(&reference, Cancel::Interrupt);
            run.about.protocol.and_then(call).is_some()
        });
        if has_call {
            let until = now + CANCEL_TIMEOUT;
            run.cancel = Some(Cancelling {
                how: Cancel::Interrupt,
                outcome: RunOutcome::Cancelled,
                until,
                sent: false,
                by_closing: false,
            });
        }
        has_call
    }

    /// An operator ends a run.
    pub fn cancel_by_id(
        &mut self,
        id: RunId,
        ended: &mut Vec<Ended>,
        now: Instant,
    ) -> Option<(Ending, Option<DueCall>)> {
        let now = self.advance(now);
        let number = self.runs.by_id(id)?;
        let carried = self.runs.run(number).is_some_and(|run| run.carriers > 0);
        let call = self.cancel(number, Cancel::Interrupt, RunOutcome::Cancelled, ended, now);
        let ending = match (self.runs.run(number).filter(|run| run.waits_for_cancel()), &call) {
            (Some(waits), _) => Ending::Open(Arc::clone(&waits.stop)),
            (None, Some(_)) => Ending::Told(CancelReport::Sent),
            (None, None) if carried => Ending::Told(CancelReport::Confirmed),
            (None, None) => Ending::Told(CancelReport::Impossible),
        };
        Some((ending, call))
    }

    /// What has become of a run of which [`Core::cancel_by_id`] could not say; `None`: that is still open.
    pub fn ending(&self, id: RunId, stop: &Stop) -> Option<CancelReport> {
        match (self.runs.by_id(id), stop.is_called()) {
            (Some(_), true) => Some(CancelReport::Sent),
            (Some(_), false) => None,
            // What carried it was closed, and its endpoint was never asked.
            (None, false) if stop.outcome().is_some() => Some(CancelReport::Impossible),
            (None, _) => Some(CancelReport::Confirmed),
        }
    }

    /// Takes the answer to a cancel call. `accepted`: the endpoint took it; `gone`: it knows no such run any more.
    pub fn cancelled(&mut self, number: u32, id: RunId, answer: CancelAnswer, ended: &mut Vec<Ended>, now: Instant) {
        let now = self.advance(now);
        let Some(run) = self.runs.run_mut(number).filter(|run| run.id == id && !run.ended) else { return };
        run.asking = false;
        let outcome = run.cancel.map_or(RunOutcome::Cancelled, |cancelling| cancelling.outcome);
        match answer {
            CancelAnswer::Gone => ended.extend(self.end_run(number, outcome, now)),
            // Whether it has ended is asked right away, and again until it has or its time is over.
            CancelAnswer::Accepted if run.asks() => self.runs.wake_at(number, now),
            CancelAnswer::Accepted => ended.extend(self.end_run(number, outcome, now)),
            CancelAnswer::Refused => {
                let until = run.cancel.map_or(now, |cancelling| cancelling.until);
                self.runs.wake_at(number, until.min(now + PAUSE_MIN));
            }
        }
    }

    /// A session without open exchanges and runs: kept if it is confirmed.
    pub(super) fn rest_or_unpin(&mut self, session: u32, now: Instant) {
        if self.sessions.confirmed(session) {
            let ticks = self.ticks(now);
            self.pin_rests(session, ticks);
            self.sessions.rest(session, ticks);
        } else {
            self.unpin(session);
        }
    }
}

/// What an endpoint said to a cancel call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelAnswer {
    Accepted,
    Gone,
    Refused,
}

impl Run {
    /// It is to be ended by a call that could not be made yet.
    pub fn waits_for_cancel(&self) -> bool {
        self.cancel.is_some_and(|cancelling| !cancelling.sent)
    }

    pub fn reference(&self) -> Option<RunRef<'_>> {
        Some(RunRef { base: &self.about.base, key: self.key.as_deref()? })
    }

    /// Its endpoint can be asked how it stands.
    fn asks(&self) -> bool {
        self.reference().is_some_and(|reference| {
            self.about.protocol.is_some_and(|protocol| protocol.status_call(&reference).is_some())
        })
    }

    fn due(&self, number: u32, question: Question, call: Call) -> DueCall {
        DueCall {
            number,
            id: self.id,
            target: self.target.clone(),
            about: self.about.clone(),
            key: self.key.clone().unwrap_or_default(),
            question,
            call,
        }
    }
}
