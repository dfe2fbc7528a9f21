//! Core: the decisions of the dispatcher as a plain struct that takes `now`: no lock, no clock, no socket.
//!
//! Everything that changes an endpoint's load ends in `reindex`, so that the next pick finds the least loaded endpoint
//! at the top of an ordered set; nothing is ever scanned to place a run.
//!
//! Here is the life of an exchange, from its pick to its end, and what is due with time. What these call is in the files below.

mod apply;
mod changes;
mod discovery;
mod drain;
mod health;
mod image;
mod outlook;
mod outstanding;
mod pins;
mod placement;
mod report;
mod retry;
mod rollout;
mod shadow;
mod standing;
mod succession;
mod waiting;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config;
use crate::estimate::Durations;
use crate::ids::RunId;
use crate::state::changes::Changes;
use crate::state::core::waiting::Room;
use crate::state::dispatcher::Ask;
use crate::state::endpoints::{Endpoints, Version};
use crate::state::runs::{Runs, Stop};
use crate::state::sessions::{SessionKey, Sessions, TICK, Ticks};
use crate::state::{AffinityOutcome, Kind, RunOutcome, Target};

pub use changes::Taking;
pub use drain::{Rolling, SPREAD_PART, USUAL_TICK};
pub use image::Restored;
pub use outlook::Outlook;
pub use outstanding::{CancelAnswer, Finish};
pub(crate) use waiting::Origin;
pub use waiting::{Arrived, Given};

/// Expired sessions that one pick cleans up at most.
const EXPIRED_PER_PICK: usize = 16;

/// Outstanding runs of one service; more are refused as if every endpoint were full.
const RUNS_MAX: usize = 1_000_000;

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
    /// Counts what was placed by load, and runs: the stamp by which ties rotate.
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

    /// A ready endpoint has a free slot, or there is a place to wait.
    pub fn ready_for_work(&mut self, now: Instant) -> bool {
        self.advance(now);
        self.has_queue_place() || self.versions.iter().any(|version| version.has_slot())
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
