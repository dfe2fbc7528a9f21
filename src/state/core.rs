//! Core: the decisions of the dispatcher as a plain struct that takes `now`: no lock, no clock, no socket.
//!
//! Everything that changes an endpoint's load ends in `reindex`, so that the next pick finds the least loaded endpoint
//! at the top of an ordered set; nothing is ever scanned to place a run.

mod apply;
mod changes;
mod discovery;
mod drain;
mod image;
mod outlook;
mod outstanding;
mod report;
mod rollout;
mod shadow;
mod succession;
mod waiting;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::balance::{self, Candidate};
use crate::config;
use crate::estimate::Durations;
use crate::ids::RunId;
use crate::orca::Report;
use crate::state::changes::Changes;
use crate::state::core::waiting::Room;
use crate::state::dispatcher::{Ask, PinHint};
use crate::state::endpoints::{Choice, Endpoint, Endpoints, HealthStanding, Version};
use crate::state::runs::{About, NewRun, Runs, Stop};
use crate::state::sessions::{SessionKey, Sessions, TICK, Ticks};
use crate::state::{AffinityOutcome, Evidence, Kind, RunOutcome, Target};

pub use changes::Taking;
pub use drain::{Rolling, SPREAD_PART, USUAL_TICK};
pub use image::Restored;
pub use outlook::Outlook;
pub use outstanding::{CancelAnswer, Finish};
pub(crate) use waiting::Origin;
pub use waiting::{Arrived, Given};

/// How long a session that was placed without a run weighs as one.
const CREDIT_TIME: Duration = Duration::from_secs(10);

/// How long a load counts that an answer told; the next one replaces it.
const REPORT_TIME: Duration = Duration::from_secs(10);

/// Expired sessions that one pick cleans up at most.
const EXPIRED_PER_PICK: usize = 16;

/// Outstanding runs of one service; more are refused as if every endpoint were full.
const RUNS_MAX: usize = 1_000_000;

/// Sessions that one pick evicts at most where the table is full.
const EVICTED_PER_PICK: usize = 16;

/// Ages of sessions reach back so far before the service's start: they may be older than this process.
const BORN_BEFORE: Duration = Duration::from_secs(365 * 24 * 3600);

/// One service's live state.
pub struct Core {
    name: Arc<str>,
    rules: Rules,
    versions: Vec<Version>,
    rollout: rollout::Judged,
    /// Credits of the smooth weighted round robin over `versions`.
    turns: Vec<i64>,
    endpoints: Endpoints,
    by_identity: HashMap<Box<str>, u32>,
    sessions: Sessions,
    runs: Runs,
    /// How long runs have taken.
    durations: Durations,
    room: Room,
    /// Placement credits in the order in which they end: when, and whose.
    credits: BTreeMap<u64, (Instant, u32)>,
    last_credit: u64,
    /// Endpoints that are ejected now.
    ejected: Vec<u32>,
    /// Counts picks: the stamp by which ties rotate.
    picks: u64,
    /// The first configuration is there.
    applied: bool,
    started: Option<Instant>,
    /// The latest `now` that was seen: time never goes back, whoever read the clock first.
    clock: Option<Instant>,
    /// What the store does not know yet; `None`: there is none.
    changes: Option<Changes>,
    /// The slot of the table from which [`Core::mark_busy`] goes on.
    scanned: u32,
    /// When it looked last.
    scanned_at: Option<Instant>,
    /// Counts what has become of drains.
    drain_news: u64,
    /// Another process decides; this one only carries what it has.
    successor: Option<succession::Successor>,
}

/// What of the configuration decides here.
struct Rules {
    affinity: config::Affinity,
    idle_timeout: Duration,
    max_sessions: usize,
    when_draining: config::WhenDraining,
    when_lost: config::WhenLost,
    /// There is an active check.
    checked: bool,
    /// The check can tell that an endpoint drains.
    asks_draining: bool,
    /// The limit of runs of endpoints that have none of their own.
    max_per_endpoint: Option<u32>,
    unhealthy_after: u32,
    healthy_after: u32,
    outlier: config::Outlier,
    balance: config::Balance,
    slow_start: Duration,
    drain_timeout: Duration,
    unseen_timeout: Duration,
    max_duration: Option<Duration>,
    /// Some endpoint has a limit of runs, so that slots are worth counting.
    any_limit: bool,
    queue_max: usize,
    queue_timeout: Duration,
    double_texting: config::DoubleTexting,
    max_per_principal: Option<u32>,
}

/// What an exchange holds: its place at an endpoint, and its part in a session and in a run. Given back by
/// [`Core::finish`], exactly once.
#[derive(Debug)]
pub struct Grant {
    endpoint: u32,
    session: Option<u32>,
    run: Option<u32>,
    run_id: Option<RunId>,
    affinity: AffinityOutcome,
    matched: bool,
    seen: rollout::Seen,
    /// There is no other endpoint for it: `affinity: hash` chose this one, or its run is there.
    fixed: bool,
    /// It makes a session whose key is still to be learned, and weighs as a run until then.
    placing: bool,
    /// Identities of the endpoints tried before this one: it doesn't keep them alive, and their numbers are given again.
    tried: Vec<Box<str>>,
}

/// Why an exchange can't be placed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unplaced {
    /// Its own endpoint is full: only a slot there helps.
    PinnedFull(u32),
    /// Every endpoint of the version is full: any slot there helps. `None`: it is not one version that is meant.
    Full(Option<usize>),
    /// No endpoint is ready.
    Empty,
    /// Its endpoint is gone, and `when_lost` is `reject`.
    Lost,
    /// It would have to move, and can't.
    Bound(AffinityOutcome),
}

/// A run that has ended: what is to be recorded, outside the lock.
pub struct Ended {
    pub target: Arc<Target>,
    pub outcome: RunOutcome,
    pub duration: Duration,
}

impl Grant {
    /// Where it is.
    pub(super) fn endpoint(&self) -> u32 {
        self.endpoint
    }

    pub fn run_id(&self) -> Option<RunId> {
        self.run_id
    }

    pub fn affinity(&self) -> AffinityOutcome {
        self.affinity
    }

    pub fn has_session(&self) -> bool {
        self.session.is_some()
    }
}

/// An exchange on its way to a place.
#[derive(Clone, Copy)]
struct Request<'a> {
    key: Option<&'a SessionKey>,
    run: Option<RunId>,
    /// It makes a session without starting a run.
    creates: bool,
    version: Option<&'a str>,
    now: Instant,
    rng: u64,
}

/// What a pinned session can expect of its endpoint.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    Open,
    Draining,
    Lost,
}

impl Core {
    /// A service that no configuration has described yet: nothing can be placed.
    pub fn new(name: &str) -> Core {
        Core {
            name: name.into(),
            rules: Rules::before_the_first_configuration(),
            versions: Vec::new(),
            rollout: rollout::Judged::default(),
            turns: Vec::new(),
            endpoints: Endpoints::default(),
            by_identity: HashMap::new(),
            sessions: Sessions::new(),
            runs: Runs::default(),
            durations: Durations::default(),
            room: Room::new(),
            credits: BTreeMap::new(),
            last_credit: 0,
            ejected: Vec::new(),
            picks: 0,
            applied: false,
            started: None,
            clock: None,
            changes: None,
            scanned: 0,
            scanned_at: None,
            drain_news: 0,
            successor: None,
        }
    }

    /// Chooses an endpoint and reserves it. `run` is the id of the run that a start begins, `None` for other exchanges.
    pub fn pick(&mut self, ask: Ask<'_>, run: Option<RunId>, now: Instant, rng: u64) -> Result<Grant, Unplaced> {
        let now = self.begin_pick(now);
        if let Some(grant) = self.follow_run(&ask, now) {
            return Ok(grant);
        }
        self.grant(&ask, run, now, rng)
    }

    fn begin_pick(&mut self, now: Instant) -> Instant {
        let now = self.advance(now);
        self.expire(EXPIRED_PER_PICK, now);
        now
    }

    /// The place of an exchange that is about an outstanding run.
    fn follow_run(&mut self, ask: &Ask<'_>, now: Instant) -> Option<Grant> {
        if ask.kind == Kind::Start {
            return None;
        }
        let number = self.runs.find(ask.run?)?;
        self.follow(number, ask.kind, now)
    }

    /// Chooses and reserves for an exchange, and notes what is to be known of the run that it starts.
    fn grant(&mut self, ask: &Ask<'_>, run: Option<RunId>, now: Instant, rng: u64) -> Result<Grant, Unplaced> {
        debug_assert_eq!(run.is_some(), ask.kind == Kind::Start);
        if run.is_some() && self.runs.len() >= RUNS_MAX {
            return Err(Unplaced::Full(None));
        }
        let grant = self.place(ask, run, now, rng)?;
        if let Some(run) = grant.run {
            if let Some(key) = ask.run {
                self.runs.name(run, key);
            }
            if let Some(run) = self.runs.run_mut(run) {
                run.about = ask.about.cloned().unwrap_or_default();
                run.deadline = self.rules.max_duration.map(|max| now + max);
            }
            self.run_changed(run);
        }
        Ok(grant)
    }

    fn place(&mut self, ask: &Ask<'_>, run: Option<RunId>, now: Instant, rng: u64) -> Result<Grant, Unplaced> {
        let request = Request { key: ask.key, run, creates: ask.creates, version: ask.version, now, rng };
        let (Some(key), true) = (ask.key, self.rules.affinity != config::Affinity::None) else {
            return self.pick_without_session(request);
        };
        if let Some(session) = self.live_session(key, now) {
            return self.pick_pinned(session, ask.bound, request);
        }
        match (self.rules.affinity, ask.hint) {
            (config::Affinity::Hash, _) => self.pick_hashed(key, request),
            (_, Some(hint)) => self.pick_hinted(key, hint, request),
            (_, None) => self.pick_new(key, request),
        }
    }

    /// The target of a grant: of the endpoint where it is now.
    pub fn target(&self, grant: &Grant) -> Arc<Target> {
        self.endpoints[grant.endpoint].target.clone()
    }

    /// An exchange of the session was answered with 2xx or 3xx.
    pub fn confirm(&mut self, grant: &Grant, now: Instant) {
        self.advance(now);
        if let Some(session) = grant.session {
            let settled = self.sessions.endpoint(session) == grant.endpoint;
            let known = self.sessions.confirmed(session) && (!settled || self.sessions.settled(session));
            self.sessions.confirm(session, settled);
            if !known {
                self.pin_changed(session);
            }
            self.tell_pin(session, None);
        }
    }

    /// The answer named its session: an alias of the request's, or the session that this exchange made.
    pub fn learn(&mut self, grant: &mut Grant, key: &SessionKey, now: Instant) {
        let now = self.advance(now);
        if self.rules.affinity == config::Affinity::None {
            return;
        }
        if let Some(session) = grant.session {
            if self.sessions.add_alias(session, key, self.rules.max_sessions) {
                self.pin_changed(session);
            }
            self.tell_pin(session, Some(key));
            return;
        }
        // What the table knows already stays as it is: the name may be another exchange's.
        if self.live_session(key, now).is_some() {
            return;
        }
        self.end_placing(grant);
        let Some(session) = self.pin(key, grant.endpoint, grant.matched, now) else { return };
        self.count_session(grant.endpoint, grant.matched);
        self.sessions.open(session);
        self.sessions.confirm(session, true);
        self.pin_changed(session);
        self.tell_pin(session, None);
        grant.session = Some(session);
        match grant.run.filter(|run| self.runs.run(*run).is_some_and(|run| !run.ended)) {
            Some(number) => {
                self.runs.link(number, None);
                if let Some(run) = self.runs.run_mut(number) {
                    run.session = Some(session);
                }
                self.sessions.set_first_run(session, Some(number));
                self.session_of_run_known(number, key);
            }
            None if grant.run.is_none() => self.give_credit(session, now),
            None => {}
        }
    }

    /// Moves a grant to another endpoint, or to the same one where its pin is confirmed.
    pub fn retry(&mut self, grant: &mut Grant, now: Instant, rng: u64) -> Result<Arc<Target>, Unplaced> {
        let now = self.advance(now);
        if grant.run.and_then(|run| self.runs.run(run)).is_some_and(|run| run.ended) {
            return Err(Unplaced::Lost);
        }
        let from = grant.endpoint;
        let pinned = grant.session.map(|session| (self.sessions.endpoint(session), self.sessions.settled(session)));
        let to = match pinned {
            _ if grant.fixed => from,
            Some((here, true)) if here == from => from,
            Some((here, settled)) if here != from && (settled || self.may_follow(grant, here)) => {
                // One that is gone is kept for its pins only.
                if self.was_tried(grant, here) || self.endpoints[here].gone {
                    return Err(Unplaced::Empty);
                }
                if grant.run.is_some() && !self.endpoints[here].has_slot() {
                    return Err(Unplaced::PinnedFull(here));
                }
                here
            }
            // Whoever has joined it meanwhile is there.
            _ if grant.run.and_then(|run| self.runs.run(run)).is_some_and(|run| run.carriers > 1) => from,
            _ => self.choose_another(grant, now, rng)?,
        };
        if let Some(run) = grant.run.and_then(|run| self.runs.run_mut(run)) {
            run.attempts += 1;
        }
        if to != from {
            self.shift(grant, to, now);
            self.tell_move(grant);
        }
        Ok(self.target(grant))
    }

    /// Takes evidence about the endpoint of a grant.
    pub fn report(&mut self, grant: &Grant, evidence: Evidence, now: Instant) {
        let now = self.advance(now);
        let endpoint = &mut self.endpoints[grant.endpoint];
        match evidence {
            Evidence::Good => {
                endpoint.failures = 0;
                endpoint.target.set_failing(false);
            }
            Evidence::Bad => {
                endpoint.target.set_failing(true);
                endpoint.failures = endpoint.failures.saturating_add(1);
                self.judge(grant.endpoint, now);
            }
        }
    }

    /// Gives back what a grant holds.
    pub fn finish(&mut self, mut grant: Grant, finish: Finish, now: Instant) -> Option<Ended> {
        let now = self.advance(now);
        self.end_placing(&mut grant);
        self.note(&grant);
        let ended = match grant.run {
            Some(run) => self.drop_carrier(run, finish, now),
            None => {
                self.endpoints[grant.endpoint].open -= 1;
                None
            }
        };
        if let Some(session) = grant.session
            && self.sessions.close(session)
        {
            self.rest_or_unpin(session, now);
        }
        self.settle(grant.endpoint, now);
        ended
    }

    /// How a grant's run hears that it was ended from elsewhere.
    pub fn stop(&self, grant: &Grant) -> Option<Arc<Stop>> {
        Some(Arc::clone(&self.runs.run(grant.run?)?.stop))
    }

    /// The answer of an active health check; where it told that the endpoint drains, [`Core::probe_drains`].
    pub fn probe_result(&mut self, identity: &str, healthy: bool, now: Instant) {
        let now = self.advance(now);
        if let Some((number, recovered)) = self.take_health(identity, healthy, now)
            && healthy
        {
            self.probe_was_good(number, recovered, now);
        }
    }

    /// Takes one answer of a check, where there is one. Of which endpoint, and whether it was unhealthy until then.
    fn take_health(&mut self, identity: &str, healthy: bool, now: Instant) -> Option<(u32, bool)> {
        let number = self.by_identity.get(identity).copied().filter(|_| self.rules.checked)?;
        let Rules { unhealthy_after, healthy_after, .. } = self.rules;
        let health = &mut self.endpoints[number].health;
        let before = health.standing;
        health.answer(healthy, unhealthy_after, healthy_after);
        let recovered = before == HealthStanding::Unhealthy && health.standing == HealthStanding::Healthy;
        self.refresh(number, now);
        Some((number, recovered))
    }

    /// Takes what an endpoint says of its own load, for so long.
    pub fn reported_load(&mut self, identity: &str, runs: u32, holds: Duration, now: Instant) {
        let now = self.advance(now);
        let Some(number) = self.by_identity.get(identity).copied() else { return };
        self.endpoints[number].reported = Some((runs, now + holds));
        self.reindex(number);
    }

    /// As [`Core::reported_load`], told with an answer of a grant's endpoint.
    pub fn reported_with_answer(&mut self, grant: &Grant, report: &Report, now: Instant) {
        let now = self.advance(now);
        let endpoint = &mut self.endpoints[grant.endpoint];
        let Some(runs) = report.as_runs(endpoint.max_runs) else { return };
        endpoint.reported = Some((runs, now + REPORT_TIME));
        self.reindex(grant.endpoint);
    }

    /// Starts or ends an operator's drain of all endpoints at an address (or identity); ending it also forgets what they
    /// said of themselves. False where there is none.
    pub fn set_drained(&mut self, address: &str, drained: bool, now: Instant) -> bool {
        let now = self.advance(now);
        let deadline = now + self.rules.drain_timeout;
        let mut found = false;
        for number in self.endpoints.numbers() {
            let endpoint = &mut self.endpoints[number];
            if endpoint.configured && (&*endpoint.target.address == address || &*endpoint.identity == address) {
                endpoint.drained = drained;
                if drained {
                    endpoint.drain_deadline.get_or_insert(deadline);
                } else {
                    // Should it still say so itself, it drains again when it next does.
                    endpoint.says = None;
                    if !endpoint.draining() {
                        endpoint.end_drain();
                    }
                }
                found = true;
                self.drains_changed();
                self.refresh(number, now);
            }
        }
        found
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

    /// What is due with time: slow starts and ejections that are over, drains past their deadline, credits.
    pub fn tick(&mut self, now: Instant) {
        let now = self.advance(now);
        self.advance_rollout(now);
        for version in 0..self.versions.len() {
            self.graduate(version, now);
        }
        for number in self.endpoints.numbers() {
            let endpoint = &mut self.endpoints[number];
            // Settling brings the order by load up to date.
            endpoint.reported.take_if(|(_, until)| now >= *until);
            self.cut_what_is_left(number, now);
            self.settle(number, now);
        }
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

    /// A ready endpoint has a free slot, or there is a place to wait.
    pub fn ready_for_work(&mut self, now: Instant) -> bool {
        self.advance(now);
        self.has_queue_place() || self.versions.iter().any(|version| version.has_slot())
    }

    // Picking.

    fn pick_without_session(&mut self, request: Request<'_>) -> Result<Grant, Unplaced> {
        let (version, matched) = self.choose_version(&request, &[]).ok_or(Unplaced::Empty)?;
        let endpoint = match request.run {
            None if !request.creates => self.versions[version].next_in_rotation(&[]).ok_or(Unplaced::Empty)?,
            _ => self.place_session(version, &request)?,
        };
        Ok(self.reserve(endpoint, None, matched, AffinityOutcome::None, &request))
    }

    fn pick_new(&mut self, key: &SessionKey, request: Request<'_>) -> Result<Grant, Unplaced> {
        let (version, matched) = self.choose_version(&request, &[]).ok_or(Unplaced::Empty)?;
        let endpoint = self.place_session(version, &request)?;
        let session = self.pin(key, endpoint, matched, request.now);
        self.count_session(endpoint, matched);
        // A table full of busy sessions leaves the new one without a pin; its run is counted all the same.
        let affinity = if session.is_some() { AffinityOutcome::New } else { AffinityOutcome::None };
        Ok(self.reserve(endpoint, session, matched, affinity, &request))
    }

    fn pick_pinned(&mut self, session: u32, bound: bool, request: Request<'_>) -> Result<Grant, Unplaced> {
        let here = self.sessions.endpoint(session);
        let works_here = self.runs.any_at(self.sessions.first_run(session), here);
        let standing = self.standing(here);
        let leaves = self.leaves(standing, works_here, request.run.is_some())?;
        let evicted = leaves.is_none() && self.leaves_evicted(session, here, &request);
        let moved = match leaves.or(evicted.then_some(AffinityOutcome::Moved)) {
            None => None,
            Some(outcome) if bound => {
                if !self.sessions.busy(session) {
                    self.unpin(session);
                }
                return Err(Unplaced::Bound(outcome));
            }
            Some(outcome) => match self.place_anew(here, evicted, &request) {
                Ok(there) => Some((there, outcome)),
                // Better an endpoint that drains than none.
                Err(Unplaced::Empty) if standing == Standing::Draining => None,
                Err(unplaced) => return Err(unplaced),
            },
        };
        if let Some((there, outcome)) = moved {
            self.move_pin(session, there);
            self.sessions.carry(session);
            return Ok(self.reserve(there, Some(session), false, outcome, &request));
        }
        if request.run.is_some() && !self.endpoints[here].has_slot() {
            return Err(Unplaced::PinnedFull(here));
        }
        Ok(self.reserve(here, Some(session), false, AffinityOutcome::Hit, &request))
    }

    /// The table doesn't know the session, but the proxy's cookie says where it lived.
    fn pick_hinted(&mut self, key: &SessionKey, hint: &PinHint, request: Request<'_>) -> Result<Grant, Unplaced> {
        let here = self.by_identity.get(hint.endpoint.as_str()).copied();
        let standing = here.map_or(Standing::Lost, |here| self.standing(here));
        let starts = request.run.is_some();
        let leaves = self.leaves(standing, false, starts)?;
        if let (Some(here), None) = (here, leaves) {
            if starts && !self.endpoints[here].has_slot() {
                return Err(Unplaced::PinnedFull(here));
            }
            let session = self.pin(key, here, false, request.now);
            if let Some(session) = session {
                self.sessions.carry(session);
                // The cookie was issued on success.
                self.sessions.confirm(session, true);
                self.pin_changed(session);
            }
            return Ok(self.reserve(here, session, false, AffinityOutcome::Hit, &request));
        }
        let version = match here {
            Some(here) => Some(self.endpoints[here].version),
            None => self.versions.iter().position(|version| *version.name == *hint.version),
        };
        let outcome = leaves.unwrap_or(AffinityOutcome::Lost);
        let there = match version {
            Some(version) => self.place_again(version, &request),
            None => self.place_by_weights(&request),
        };
        let there = match (there, here) {
            (Err(Unplaced::Empty), Some(here)) if standing == Standing::Draining => here,
            (there, _) => there?,
        };
        let session = self.pin(key, there, false, request.now);
        if let Some(session) = session {
            self.sessions.carry(session);
        }
        Ok(self.reserve(there, session, false, outcome, &request))
    }

    fn pick_hashed(&mut self, key: &SessionKey, request: Request<'_>) -> Result<Grant, Unplaced> {
        let (version, matched) = self.choose_version(&request, &[]).ok_or(Unplaced::Empty)?;
        let endpoint = {
            let endpoints = &self.endpoints;
            let candidates = self.versions[version].endpoints.iter().map(|number| (*number, &endpoints[*number]));
            let candidates = candidates.filter(|(_, endpoint)| endpoint.ready).map(|(index, endpoint)| Candidate {
                index,
                hash: endpoint.hash,
                name: &endpoint.identity,
                weight: u64::from(endpoint.weight.max(1)),
            });
            balance::rendezvous(balance::placement(&key.text), candidates).ok_or(Unplaced::Empty)?
        };
        if request.run.is_some() && !self.endpoints[endpoint].has_slot() {
            return Err(Unplaced::PinnedFull(endpoint));
        }
        let mut grant = self.reserve(endpoint, None, matched, AffinityOutcome::Hit, &request);
        grant.fixed = true;
        Ok(grant)
    }

    /// Whether a session must leave its endpoint, and as what.
    fn leaves(&self, standing: Standing, works_here: bool, starts: bool) -> Result<Option<AffinityOutcome>, Unplaced> {
        match standing {
            _ if works_here => Ok(None),
            Standing::Draining if starts && self.rules.when_draining == config::WhenDraining::MoveIdle => {
                Ok(Some(AffinityOutcome::Moved))
            }
            Standing::Open | Standing::Draining => Ok(None),
            Standing::Lost if self.rules.when_lost == config::WhenLost::Reject => Err(Unplaced::Lost),
            Standing::Lost => Ok(Some(AffinityOutcome::Lost)),
        }
    }

    /// A new endpoint for a session that had one: in its version if that has any, else as a new session's.
    fn place_again(&mut self, version: usize, request: &Request<'_>) -> Result<u32, Unplaced> {
        if self.versions[version].configured && self.versions[version].ready() > 0 {
            return self.place_session(version, request);
        }
        self.place_by_weights(request)
    }

    fn place_by_weights(&mut self, request: &Request<'_>) -> Result<u32, Unplaced> {
        let request = Request { version: None, ..*request };
        let (version, _) = self.choose_version(&request, &[]).ok_or(Unplaced::Empty)?;
        self.place_session(version, &request)
    }

    /// An endpoint of the version for a session: the least loaded, for an exchange without a run a full one too.
    fn place_session(&mut self, version: usize, request: &Request<'_>) -> Result<u32, Unplaced> {
        match self.choose(version, request, &[]) {
            Some(endpoint) => Ok(endpoint),
            None if request.run.is_some() => Err(Unplaced::Full(Some(version))),
            None => self.versions[version].next_in_rotation(&[]).ok_or(Unplaced::Empty),
        }
    }

    /// The version of a new session or of an exchange without one, and whether a match chose it. Versions without a
    /// ready endpoint outside `tried` are left out.
    fn choose_version(&mut self, request: &Request<'_>, tried: &[u32]) -> Option<(usize, bool)> {
        if let Some(name) = request.version {
            let matched = self.versions.iter().position(|version| version.configured && *version.name == *name);
            if let Some(version) = matched.filter(|version| self.offers(*version, tried)) {
                return Some((version, true));
            }
        }
        if let Some(key) = request.key {
            let candidates = self
                .versions
                .iter()
                .enumerate()
                .filter(|(index, version)| version.configured && self.offers(*index, tried));
            let candidates = candidates.map(|(index, version)| Candidate {
                index: index as u32,
                hash: version.hash,
                name: &version.name,
                weight: version.effective_weight,
            });
            let version = balance::rendezvous(balance::cohort(&key.text), candidates)?;
            return Some((version as usize, false));
        }
        // Whoever waited for any slot takes the one that is offered.
        if let Some(serving) = self.room.serving() {
            let version = self.endpoints[serving].version;
            return (self.versions[version].effective_weight > 0).then_some((version, false));
        }
        // A run without a session waits only where all are full, so versions with a free slot come first.
        let Core { versions, turns, endpoints, .. } = self;
        let any_slot = request.run.is_some()
            && versions.iter().any(|version| version.effective_weight > 0 && version.configured && version.has_slot());
        let candidates = versions
            .iter()
            .enumerate()
            .filter(|(index, version)| {
                version.configured && offers(versions, *index, endpoints, tried) && (!any_slot || version.has_slot())
            })
            .map(|(index, version)| (index, version.effective_weight));
        Some((balance::take_turn(turns, candidates)?, false))
    }

    /// A ready endpoint of the version is left.
    fn offers(&self, version: usize, tried: &[u32]) -> bool {
        offers(&self.versions, version, &self.endpoints, tried)
    }

    /// The endpoint of a version for one run more.
    fn choose(&mut self, version: usize, request: &Request<'_>, tried: &[u32]) -> Option<u32> {
        if let Some(serving) = self.room.serving() {
            let offered = &self.endpoints[serving];
            return (offered.version == version && offered.ready && offered.has_slot()).then_some(serving);
        }
        self.graduate(version, request.now);
        let choice = Choice {
            balance: self.rules.balance,
            slow_start: self.rules.slow_start,
            tried,
            now: request.now,
            rng: request.rng,
        };
        self.versions[version].choose(&self.endpoints, &choice)
    }

    fn reserve(
        &mut self,
        number: u32,
        session: Option<u32>,
        matched: bool,
        affinity: AffinityOutcome,
        request: &Request<'_>,
    ) -> Grant {
        self.picks += 1;
        let Rules { slow_start, .. } = self.rules;
        let endpoint = &mut self.endpoints[number];
        endpoint.stamp = self.picks;
        match request.run {
            Some(_) => endpoint.outstanding += 1,
            None => endpoint.open += 1,
        }
        let placing = request.creates && request.run.is_none() && session.is_none();
        endpoint.credit += u32::from(placing);
        self.versions[endpoint.version].turn(number, endpoint, slow_start, request.now);
        let run = request.run.map(|id| {
            let target = endpoint.target.clone();
            let first = session.and_then(|session| self.sessions.first_run(session));
            let about = About::default();
            let started = request.now;
            let new = NewRun { id, target, endpoint: number, session, started, about, carriers: 1, matched };
            self.runs.insert(new, first)
        });
        if let Some(session) = session {
            self.sessions.open(session);
            if run.is_some() {
                self.sessions.set_first_run(session, run);
                self.take_credit(session);
            } else if matches!(affinity, AffinityOutcome::New | AffinityOutcome::Lost | AffinityOutcome::Moved) {
                self.give_credit(session, request.now);
            }
        }
        self.reindex(number);
        Grant {
            endpoint: number,
            session,
            run,
            run_id: request.run,
            affinity,
            matched,
            seen: rollout::Seen::of_exchange(run.is_some()),
            fixed: false,
            placing,
            tried: Vec::new(),
        }
    }

    /// A session that an exchange was to make is there, or will not be.
    fn end_placing(&mut self, grant: &mut Grant) {
        if std::mem::take(&mut grant.placing) {
            self.endpoints[grant.endpoint].credit -= 1;
            self.reindex(grant.endpoint);
        }
    }

    // Retrying.

    /// A tentative pin was moved by another exchange of the session, to where this one may follow.
    fn may_follow(&self, grant: &Grant, here: u32) -> bool {
        let endpoint = &self.endpoints[here];
        endpoint.ready && !self.was_tried(grant, here) && (grant.run.is_none() || endpoint.has_slot())
    }

    fn was_tried(&self, grant: &Grant, endpoint: u32) -> bool {
        grant.tried.contains(&self.endpoints[endpoint].identity)
    }

    /// Another endpoint than those tried, of the same version if that has one.
    fn choose_another(&mut self, grant: &Grant, now: Instant, rng: u64) -> Result<u32, Unplaced> {
        let known = grant.tried.iter().filter_map(|identity| self.by_identity.get(identity).copied());
        let tried: Vec<u32> = known.chain([grant.endpoint]).collect();
        let version = self.endpoints[grant.endpoint].version;
        let key = grant.session.map(|session| SessionKey { scope: None, text: self.sessions.key(session).into() });
        let request = Request { key: key.as_ref(), run: grant.run_id, creates: grant.placing, version: None, now, rng };
        let version = if self.versions[version].configured && self.offers(version, &tried) {
            version
        } else {
            self.choose_version(&request, &tried).ok_or(Unplaced::Empty)?.0
        };
        if request.run.is_none() && grant.session.is_none() && !grant.placing {
            return self.versions[version].next_in_rotation(&tried).ok_or(Unplaced::Empty);
        }
        match self.choose(version, &request, &tried) {
            Some(endpoint) => Ok(endpoint),
            None if request.run.is_some() => Err(Unplaced::Full(Some(version))),
            None => self.versions[version].next_in_rotation(&tried).ok_or(Unplaced::Empty),
        }
    }

    /// Hands the grant's place over to another endpoint, and its tentative pin with it. (One that is confirmed at the
    /// old endpoint never comes here: it retries there.)
    fn shift(&mut self, grant: &mut Grant, to: u32, now: Instant) {
        let from = grant.endpoint;
        self.picks += 1;
        match grant.run {
            Some(_) => {
                self.endpoints[from].outstanding -= 1;
                self.endpoints[to].outstanding += 1;
            }
            None => {
                self.endpoints[from].open -= 1;
                self.endpoints[to].open += 1;
            }
        }
        if grant.placing {
            self.endpoints[from].credit -= 1;
            self.endpoints[to].credit += 1;
        }
        let Rules { slow_start, .. } = self.rules;
        let endpoint = &mut self.endpoints[to];
        endpoint.stamp = self.picks;
        self.versions[endpoint.version].turn(to, endpoint, slow_start, now);
        if let Some(run) = grant.run.and_then(|run| self.runs.run_mut(run)) {
            run.endpoint = to;
            run.target = endpoint.target.clone();
        }
        if let Some(run) = grant.run {
            self.run_changed(run);
        }
        grant.tried.push(self.endpoints[from].identity.clone());
        grant.endpoint = to;
        if let Some(session) = grant.session
            && self.sessions.endpoint(session) == from
        {
            self.move_pin(session, to);
        }
        self.reindex(to);
        self.settle(from, now);
    }

    // Sessions.

    /// The session of a key, unless its time is over.
    fn live_session(&mut self, key: &SessionKey, now: Instant) -> Option<u32> {
        let session = self.sessions.find(key)?;
        if self.sessions.idle(session, self.ticks(now)) > self.rules.idle_timeout {
            self.unpin(session);
            return None;
        }
        Some(session)
    }

    /// Makes a session, in place of the one idle for longest where the table is full. Its first exchange is opened by
    /// the caller, or here in [`Core::learn`]. `None`: every session is busy.
    fn pin(&mut self, key: &SessionKey, endpoint: u32, matched: bool, now: Instant) -> Option<u32> {
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

    /// Forgets a session that is not busy.
    fn unpin(&mut self, session: u32) {
        self.take_credit(session);
        self.pin_ends(session);
        let endpoint = self.sessions.endpoint(session);
        self.room.changed_for_session(|| self.sessions.session_key(session));
        self.sessions.remove(session);
        self.endpoints[endpoint].sessions -= 1;
        self.release(endpoint);
    }

    fn move_pin(&mut self, session: u32, to: u32) {
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

    /// Lets a session weigh as one run until its first.
    fn give_credit(&mut self, session: u32, now: Instant) {
        self.take_credit(session);
        self.last_credit += 1;
        self.credits.insert(self.last_credit, (now + CREDIT_TIME, session));
        self.sessions.set_credit(session, self.last_credit);
        let endpoint = self.sessions.endpoint(session);
        self.endpoints[endpoint].credit += 1;
        self.reindex(endpoint);
    }

    fn take_credit(&mut self, session: u32) {
        let serial = self.sessions.credit(session);
        if serial != 0 {
            self.credits.remove(&serial);
            self.sessions.set_credit(session, 0);
            let endpoint = self.sessions.endpoint(session);
            self.endpoints[endpoint].credit -= 1;
            self.reindex(endpoint);
        }
    }

    // Endpoints.

    fn standing(&self, number: u32) -> Standing {
        let endpoint = &self.endpoints[number];
        let unhealthy = self.rules.checked && endpoint.health.standing == HealthStanding::Unhealthy;
        if endpoint.gone || unhealthy || !endpoint.serves() || endpoint.ejected_until.is_some() {
            Standing::Lost
        } else if endpoint.draining() {
            Standing::Draining
        } else {
            // Not asked yet is no reason to think that its sessions are lost.
            Standing::Open
        }
    }

    fn is_ready(&self, endpoint: &Endpoint) -> bool {
        !endpoint.draining()
            && endpoint.serves()
            && !endpoint.awaited
            && endpoint.ejected_until.is_none()
            && (!self.rules.checked || endpoint.health.standing == HealthStanding::Healthy)
    }

    /// Brings readiness and all orders up to date with what became of an endpoint.
    fn refresh(&mut self, number: u32, now: Instant) {
        let ready = self.is_ready(&self.endpoints[number]);
        let Rules { slow_start, affinity, .. } = self.rules;
        let endpoint = &mut self.endpoints[number];
        let were_ready = self.versions[endpoint.version].ready();
        let turned = ready != endpoint.ready;
        if turned {
            endpoint.ready = ready;
            endpoint.ramp = (ready && !endpoint.original && !slow_start.is_zero()).then_some(now);
            if ready {
                endpoint.original = false;
            }
        }
        let version = &mut self.versions[endpoint.version];
        version.place_in_rotation(number, endpoint);
        // New sessions of a version without ready endpoints go to others; hashed ones go by all that are ready.
        if (were_ready == 0) != (version.ready() == 0) || (turned && affinity == config::Affinity::Hash) {
            self.room.changed_for_all();
        }
        if turned && ready {
            self.room.fresh(number, now);
        }
        self.room.changed_for(number);
        self.reindex(number);
    }

    fn reindex(&mut self, number: u32) {
        let endpoint = &mut self.endpoints[number];
        self.versions[endpoint.version].index(number, endpoint);
        self.room.touched(number);
    }

    /// Takes endpoints whose slow start is over into the common order.
    fn graduate(&mut self, version: usize, now: Instant) {
        let slow_start = self.rules.slow_start;
        let endpoints = &self.endpoints;
        let over = |number: &u32| {
            endpoints[*number].ramp.is_none_or(|since| now.saturating_duration_since(since) >= slow_start)
        };
        let done: Vec<u32> = self.versions[version].ramping().iter().copied().filter(over).collect();
        for number in done {
            self.endpoints[number].ramp = None;
            self.reindex(number);
        }
    }

    /// Ejects an endpoint that failed too often, where its version can do without.
    fn judge(&mut self, number: u32, now: Instant) {
        let config::Outlier { consecutive_failures, eject_for, .. } = self.rules.outlier;
        let endpoint = &self.endpoints[number];
        if consecutive_failures == 0 || endpoint.failures < consecutive_failures || !endpoint.ready {
            return;
        }
        let version = &self.versions[endpoint.version];
        // The only one that is ready is as good as alone: ejecting it would help nobody.
        if version.ready() < 2 || version.ejected >= self.most_ejected(endpoint.version) {
            return;
        }
        let endpoint = &mut self.endpoints[number];
        endpoint.ejected_until = Some(now + eject_for);
        endpoint.failures = 0;
        self.versions[endpoint.version].ejected += 1;
        self.ejected.push(number);
        self.refresh(number, now);
    }

    /// How many endpoints of a version may be ejected at once: its share, at least one, but never a lone one.
    fn most_ejected(&self, version: usize) -> u32 {
        let config::Outlier { max_ejected, .. } = self.rules.outlier;
        let endpoints = &self.versions[version].endpoints;
        let all = endpoints.iter().filter(|number| self.endpoints[**number].configured).count();
        if all < 2 || max_ejected <= 0.0 { 0 } else { ((all as f64 * max_ejected).floor() as u32).max(1) }
    }

    /// Readmits those who were ejected first, until a version has no more of them than it may.
    fn readmit_surplus(&mut self, version: usize, now: Instant) {
        let mut ejected: Vec<u32> = self.versions[version].endpoints.clone();
        ejected.retain(|number| self.endpoints[*number].configured && self.endpoints[*number].ejected_until.is_some());
        ejected.sort_by_key(|number| self.endpoints[*number].ejected_until);
        let surplus = ejected.len().saturating_sub(self.most_ejected(version) as usize);
        for number in ejected.into_iter().take(surplus) {
            self.readmit(number, now);
        }
    }

    fn readmit(&mut self, number: u32, now: Instant) {
        self.ejected.retain(|other| *other != number);
        let endpoint = &mut self.endpoints[number];
        if endpoint.ejected_until.take().is_some() {
            endpoint.failures = 0;
            self.versions[endpoint.version].ejected -= 1;
            self.refresh(number, now);
        }
    }

    /// Ends the drain of a removed endpoint that has finished, or whose time is over.
    fn settle(&mut self, number: u32, now: Instant) {
        // Forgetting its last session may have released it already.
        if !self.endpoints.contains(number) {
            return;
        }
        self.reindex(number);
        let endpoint = &mut self.endpoints[number];
        if endpoint.configured {
            return;
        }
        if !endpoint.gone && (endpoint.idle() || endpoint.drain_deadline.is_none_or(|deadline| now >= deadline)) {
            endpoint.gone = true;
            let drained = std::mem::take(&mut endpoint.drained);
            endpoint.says = None;
            endpoint.target.retire();
            self.room.changed_for(number);
            if drained {
                self.drains_changed();
            }
        }
        self.release(number);
    }

    /// Forgets an endpoint that is gone once nothing refers to it.
    fn release(&mut self, number: u32) {
        let endpoint = &self.endpoints[number];
        if !endpoint.gone || !endpoint.idle() || endpoint.sessions > 0 {
            return;
        }
        self.ejected.retain(|other| *other != number);
        self.room.changed_for(number);
        if let Some(endpoint) = self.endpoints.remove(number) {
            let version = &mut self.versions[endpoint.version];
            version.endpoints.retain(|other| *other != number);
            if endpoint.ejected_until.is_some() {
                version.ejected -= 1;
            }
            self.by_identity.remove(&endpoint.identity);
        }
    }

    // Time.

    /// Takes note of the time, and does what is due before any decision.
    fn advance(&mut self, now: Instant) -> Instant {
        let now = self.clock.map_or(now, |clock| clock.max(now));
        self.clock = Some(now);
        self.started.get_or_insert(now);
        while let Some(entry) = self.credits.first_entry()
            && entry.get().0 <= now
        {
            let (_, session) = *entry.get();
            self.take_credit(session);
        }
        if !self.ejected.is_empty() {
            let over = |number: &u32| self.endpoints[*number].ejected_until.is_none_or(|until| until <= now);
            let over: Vec<u32> = self.ejected.iter().copied().filter(over).collect();
            for number in over {
                self.readmit(number, now);
            }
        }
        now
    }

    fn ticks(&self, now: Instant) -> Ticks {
        let since = self.started.map_or(Duration::ZERO, |started| now.saturating_duration_since(started));
        (since.as_millis() / TICK.as_millis()) as Ticks
    }
}

/// A ready endpoint of the version is not among those tried.
fn offers(versions: &[Version], version: usize, endpoints: &Endpoints, tried: &[u32]) -> bool {
    let spent = tried.iter().filter(|number| endpoints[**number].ready && endpoints[**number].version == version);
    versions[version].ready() > spent.count()
}

impl Rules {
    fn of(service: &config::Service) -> Rules {
        Rules {
            affinity: service.session.affinity,
            idle_timeout: service.session.idle_timeout,
            max_sessions: service.session.max_sessions,
            when_draining: service.session.when_draining,
            when_lost: service.session.when_lost,
            checked: service.health.path.is_some() || service.health.tcp,
            asks_draining: service.health.path.is_some() && !service.health.draining_status.is_empty(),
            max_per_endpoint: service.runs.max_per_endpoint,
            unhealthy_after: service.health.unhealthy_after,
            healthy_after: service.health.healthy_after,
            outlier: service.outlier.clone(),
            balance: service.balance,
            slow_start: service.slow_start,
            drain_timeout: service.drain_timeout,
            unseen_timeout: service.runs.unseen_timeout,
            max_duration: service.runs.max_duration,
            any_limit: service.runs.max_per_endpoint.is_some()
                || service.versions.iter().flat_map(|version| &version.endpoints).any(|one| one.max_runs.is_some())
                || service.versions.iter().flat_map(|version| &version.sources).any(|one| one.max_runs.is_some()),
            queue_max: service.runs.queue.max as usize,
            queue_timeout: service.runs.queue.timeout,
            double_texting: service.runs.double_texting,
            max_per_principal: service.runs.max_per_principal,
        }
    }

    fn before_the_first_configuration() -> Rules {
        Rules {
            affinity: config::Affinity::None,
            idle_timeout: Duration::ZERO,
            max_sessions: 0,
            when_draining: config::WhenDraining::MoveIdle,
            when_lost: config::WhenLost::Rebind,
            checked: false,
            asks_draining: false,
            max_per_endpoint: None,
            unhealthy_after: 1,
            healthy_after: 1,
            outlier: config::Outlier { consecutive_failures: 0, eject_for: Duration::ZERO, max_ejected: 0.0 },
            balance: config::Balance::LeastOutstandingRuns,
            slow_start: Duration::ZERO,
            drain_timeout: Duration::ZERO,
            unseen_timeout: Duration::from_secs(3600),
            max_duration: None,
            any_limit: false,
            queue_max: 0,
            queue_timeout: Duration::ZERO,
            double_texting: config::DoubleTexting { policy: config::Policy::Allow, allow_override: false },
            max_per_principal: None,
        }
    }
}
