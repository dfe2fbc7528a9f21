//! Dispatcher: picks an endpoint and reserves it in one step, per service.
//!
//! One lock a service, held for about a microsecond and never across an await; [`Core`] behind it decides.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::futures::Notified;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::config;
use crate::ids::{self, RunId};
use crate::metrics::ServiceMetrics;
use crate::orca::Report;
use crate::protocols::{Fact, Standing};
use crate::rollout::{Command, Moment, Refused, Rollout};
use crate::state::changes::Delta;
use crate::state::core::{Arrived, CancelAnswer, Core, Ended, Finish, Grant, Outlook, Restored};
use crate::state::discovery::{Change, OfSources};
use crate::state::idempotency::{self, ANSWERS_BYTES_MAX, Start, StartKey, Starts};
use crate::state::image::{Place, RunsTaken, ServiceImage};
use crate::state::queue::{Class, Principal};
use crate::state::recording::Budget;
use crate::state::runs::{About, Stop};
use crate::state::sessions::SessionKey;
use crate::state::status::{CancelReport, DueCall, Ending, RollReport, RunInfo, ServiceStatus, SessionInfo};
use crate::state::waiting::Waiting;
use crate::state::{AffinityOutcome, Evidence, Kind, Refusal, RunOutcome, Target, TargetSettings};

/// Copies of starts (`shadow`) that may be under way at once; more are not made.
const COPIES_MAX: usize = 64;

/// Slots of a table that are read under one hold of the lock.
const SCAN: u32 = 1024;

/// One service's live state. Outlives every configuration that names it.
pub struct Dispatcher {
    name: Arc<str>,
    core: Mutex<Core>,
    /// Starts that carry a key. Apart from the core: whoever comes without one never looks here.
    starts: Mutex<Starts>,
    /// It has a rollout, which wants to know more of runs than is worth the lock otherwise.
    judged: AtomicBool,
    /// One for each copy that may be under way.
    copies: Arc<Semaphore>,
    work: Work,
    metrics: Arc<ServiceMetrics>,
}

/// Whether a service has anything to do. Written under the service's lock, told after it is released: whoever is woken
/// reads what is true then.
#[derive(Default)]
struct Work {
    there_is: AtomicBool,
    /// How many have come to wait.
    arrivals: AtomicU64,
    changed: Notify,
}

/// What an exchange asks of the dispatcher.
pub struct Ask<'a> {
    pub key: Option<&'a SessionKey>,
    pub kind: Kind,
    /// It makes a session without starting a run.
    pub creates: bool,
    /// Its session lives where it is pinned and nowhere else: it is refused rather than moved.
    pub bound: bool,
    /// Of a join, read or cancel: the run that is meant. Of a start: the run's key where the client made it.
    pub run: Option<&'a str>,
    /// Of a start: what is to be known of its run.
    pub about: Option<&'a About>,
    /// The version that a `versions[].match` of the current configuration chose, by name.
    pub version: Option<&'a str>,
    /// Where the proxy's own cookie says that the session lives; used when the table does not know the session
    /// (another replica, a restart).
    pub hint: Option<&'a PinHint>,
    /// The id that a start's run is to have, where that was made before.
    pub id: Option<RunId>,
    /// How urgent a start is, should it have to wait.
    pub class: Class,
    /// Whose start it is; `None`: nobody's that is known.
    pub principal: Principal,
    /// What a start does if its session has a run.
    pub policy: config::Policy,
    /// What the calls carry besides by which such a run is interrupted: header fields of the request that asks.
    pub credentials: &'a [(&'static str, String)],
}

impl<'a> Ask<'a> {
    /// As plain HTTP asks.
    pub fn new(kind: Kind, key: Option<&'a SessionKey>) -> Ask<'a> {
        Ask {
            key,
            kind,
            creates: false,
            bound: false,
            run: None,
            about: None,
            version: None,
            hint: None,
            id: None,
            class: Class::default(),
            principal: None,
            policy: config::Policy::Allow,
            credentials: &[],
        }
    }
}

/// A pin as the proxy's cookie carries it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PinHint {
    pub version: String,
    /// [`crate::config::EndpointUrl::identity`].
    pub endpoint: String,
}

/// One service's configuration, with what reaching its endpoints takes.
pub struct ServiceSettings {
    pub config: config::Service,
    /// By version and endpoint, in the order of `config.versions[].endpoints`. TLS settings count as unchanged while
    /// their `Arc` is the same.
    pub targets: Vec<Vec<TargetSettings>>,
    /// By version: what its sources have found so far. Where there is nothing for a version, it has none.
    pub discovered: Vec<OfSources>,
}

/// A reserved endpoint.
pub struct Placed {
    pub target: Arc<Target>,
    pub affinity: AffinityOutcome,
    pub lease: Lease,
}

/// Where a copy of a start goes. Its permit is given back when the copy is over.
pub struct Shadowed {
    pub target: Arc<Target>,
    pub permit: OwnedSemaphorePermit,
}

/// What a pick gives.
pub enum Picked {
    Placed(Placed),
    /// No endpoint has room, or it is not its session's turn.
    Waiting(Waiting),
}

impl Picked {
    /// What was reserved at once; a place in the queue is given up.
    pub fn placed(self) -> Option<Placed> {
        match self {
            Picked::Placed(placed) => Some(placed),
            Picked::Waiting(_) => None,
        }
    }
}

/// The reservation of one exchange: its run's slot (for a start) or its place among the open exchanges. Gives both back
/// when dropped, exactly once.
pub struct Lease {
    dispatcher: Arc<Dispatcher>,
    /// Taken by the drop.
    grant: Option<Grant>,
    finish: Finish,
    stop: Option<Arc<Stop>>,
}

impl Dispatcher {
    /// A service that no configuration has described yet: every pick is refused.
    pub fn new(name: &str, metrics: Arc<ServiceMetrics>) -> Arc<Dispatcher> {
        let copies = Arc::new(Semaphore::new(COPIES_MAX));
        let starts = Mutex::new(Starts::new(Duration::ZERO, Budget::new(ANSWERS_BYTES_MAX)));
        let mut core = Core::new(name);
        core.set_wall_clock(ids::now(), Moment::of(ids::wall_clock()));
        Arc::new(Dispatcher {
            name: name.into(),
            core: Mutex::new(core),
            starts,
            judged: AtomicBool::new(false),
            copies,
            work: Work::default(),
            metrics,
        })
    }

    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Picks and reserves, or takes a place to wait; `rng` is one random number, for lots.
    pub fn pick(self: &Arc<Self>, ask: Ask<'_>, now: Instant, rng: u64) -> Result<Picked, Refusal> {
        let run = (ask.kind == Kind::Start).then(|| ask.id.unwrap_or_else(RunId::generate));
        let mut ended = Vec::new();
        let picked = self.with(|core| match core.arrive(&ask, run, &mut ended, now, rng) {
            Arrived::Placed(grant) => Ok((core.target(&grant), core.stop(&grant), grant)),
            Arrived::Waiting(ticket) => Err(Ok((ticket, core.wait_until(now)))),
            Arrived::Refused(refusal) => Err(Err(refusal)),
        });
        record(ended);
        match picked {
            Ok((target, stop, grant)) => Ok(Picked::Placed(self.lease(target, stop, grant))),
            Err(Ok((ticket, until))) => Ok(Picked::Waiting(Waiting::new(self.clone(), ticket, run, now, until))),
            Err(Err(refusal)) => Err(self.refused(refusal, run)),
        }
    }

    /// What whoever waited was given.
    pub(super) fn placed(self: &Arc<Self>, grant: Grant) -> Placed {
        let (target, stop) = self.with(|core| (core.target(&grant), core.stop(&grant)));
        self.lease(target, stop, grant)
    }

    fn lease(self: &Arc<Self>, target: Arc<Target>, stop: Option<Arc<Stop>>, grant: Grant) -> Placed {
        let affinity = grant.affinity();
        self.metrics.affinity[affinity as usize].inc();
        let finish = Finish::Ended(RunOutcome::Cancelled);
        let lease = Lease { dispatcher: self.clone(), grant: Some(grant), finish, stop };
        Placed { target, affinity, lease }
    }

    pub(super) fn refused(&self, refusal: Refusal, run: Option<RunId>) -> Refusal {
        // What the client is told of its session counts, also where nothing was placed.
        if refusal.affinity() != AffinityOutcome::None {
            self.metrics.affinity[refusal.affinity() as usize].inc();
        }
        if run.is_some() {
            self.rejected();
        }
        refusal
    }

    /// A start was never dispatched.
    pub fn rejected(&self) {
        self.metrics.rejected.inc();
    }

    /// A start has waited so long.
    pub(super) fn waited(&self, time: Duration) {
        self.metrics.queue_wait_seconds.observe(time.as_secs_f64());
    }

    /// When somebody who was refused a place should come again.
    pub fn retry_after(&self, now: Instant) -> Duration {
        self.with(|core| core.retry_after(now))
    }

    /// Takes a (re)loaded configuration. Counts, pins, runs, operator drains and health stay; unchanged settings keep
    /// their [`Target`]; endpoints that are not named any more drain; lower limits cut nothing.
    pub fn apply(&self, settings: ServiceSettings, now: Instant) {
        if let Some(idempotency) = &settings.config.runs.idempotency {
            self.starts().set_keep(idempotency.keep);
        }
        self.judged.store(settings.config.rollout.is_some(), Ordering::Relaxed);
        self.with(|core| core.apply(settings, now));
    }

    /// Takes what has changed of the endpoints that a version's sources find: see [`Core::discover`].
    pub fn discover(&self, version: &str, changes: Vec<Change>, now: Instant) {
        self.with(|core| core.discover(version, changes, now));
    }

    /// A start with a key comes; `run` is the id of its run if it is the first.
    pub fn first_start(&self, key: StartKey, run: RunId, now: Instant) -> Start {
        self.starts().start(key, run, now)
    }

    /// The run of a first start has ended, or did not come to be.
    pub(super) fn start_ended(&self, key: StartKey, run: RunId, finish: idempotency::Finish, now: Instant) {
        self.starts().ended(key, run, finish, now);
    }

    fn starts(&self) -> MutexGuard<'_, Starts> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer of an active health check of the endpoint with this [`crate::config::EndpointUrl::identity`].
    pub fn probe_result(&self, identity: &str, healthy: bool, now: Instant) {
        self.with(|core| core.probe_result(identity, healthy, now));
    }

    /// Such a check was answered well, and with a word on whether the endpoint drains.
    pub fn probe_drains(&self, identity: &str, drains: bool, now: Instant) {
        self.with(|core| core.probe_drains(identity, drains, now));
    }

    /// What an endpoint says of its own load, for so long: it may have runs that no request of ours started.
    pub fn reported_load(&self, identity: &str, runs: u32, holds: Duration, now: Instant) {
        self.with(|core| core.reported_load(identity, runs, holds, now));
    }

    /// Drains the endpoint at `host:port` (or with this identity) until it is undrained. False: there is none.
    pub fn drain_endpoint(&self, address: &str, now: Instant) -> bool {
        self.with(|core| core.set_drained(address, true, now))
    }

    /// Ends an operator's drain. False: there is no such endpoint.
    pub fn undrain_endpoint(&self, address: &str, now: Instant) -> bool {
        self.with(|core| core.set_drained(address, false, now))
    }

    pub fn status(&self, now: Instant) -> ServiceStatus {
        let mut estimates = HashMap::new();
        if self.with(|core| core.drains_with_runs()) {
            let outlook = self.outlook(now);
            let draining = self.with(|core| core.draining()).into_iter().filter(|(_, has_runs)| *has_runs);
            estimates.extend(draining.map(|(number, _)| (number, outlook.empty_in(number))));
        }
        self.with(|core| core.status_by(&estimates, now))
    }

    /// Looks at all outstanding runs, in steps.
    fn outlook(&self, now: Instant) -> Outlook {
        let mut outlook = self.with(|core| core.begin_outlook());
        let mut from = Some(0);
        while let Some(slot) = from {
            from = self.with(|core| core.look_at_runs(&mut outlook, slot, SCAN, now));
        }
        outlook.conclude();
        outlook
    }

    /// Sessions, those whose key (or alias) is `key` only where that is given, `limit` at most.
    pub fn sessions(&self, key: Option<&str>, limit: usize, now: Instant) -> Vec<SessionInfo> {
        let mut found = Vec::new();
        let mut from = Some(0);
        while let Some(slot) = from {
            from = self.with(|core| core.scan_sessions(key, slot, SCAN, limit, &mut found, now));
        }
        found
    }

    /// Outstanding runs, those of the session with this key (or alias) only where that is given, `limit` at most.
    pub fn runs(&self, session: Option<&str>, limit: usize, now: Instant) -> Vec<RunInfo> {
        let mut found = Vec::new();
        let mut from = Some(0);
        while let Some(slot) = from {
            from = self.with(|core| core.scan_runs(session, slot, SCAN, limit, &mut found, now));
        }
        found
    }

    /// Forgets the pins of idle sessions, all or those of one key, and says how many. Busy ones stay.
    pub fn forget_sessions(&self, key: Option<&str>, now: Instant) -> usize {
        let mut forgotten = 0;
        let mut from = Some(0);
        while let Some(slot) = from {
            let (count, next) = self.with(|core| core.forget_sessions(key, slot, SCAN, now));
            forgotten += count;
            from = next;
        }
        forgotten
    }

    /// The rollout as it stands; `None`: the configuration has none.
    pub fn rollout(&self, now: Instant) -> Option<Rollout> {
        self.with(|core| core.rollout(now).cloned())
    }

    /// Follows a person's command to the rollout. `None`: the configuration has none.
    pub fn steer_rollout(&self, command: Command, now: Instant) -> Option<Result<Rollout, Refused>> {
        self.with(|core| Some(core.steer_rollout(command, now)?.cloned()))
    }

    /// A picture of everything that is to outlive this process, or of all.
    pub fn image(&self, taken: RunsTaken, now: Instant) -> ServiceImage {
        self.with(|core| core.image(taken, now))
    }

    /// Goes on with a rollout from a picture. To be called before the first [`Dispatcher::apply`], so that its block is
    /// not taken for new.
    pub fn restore_rollout(&self, rollout: Rollout, now: Instant) {
        self.with(|core| core.restore_rollout(rollout, now));
    }

    /// Goes on from a picture, after the first [`Dispatcher::apply`]: see [`Core::restore`].
    pub fn restore(
        &self,
        image: ServiceImage,
        settings: &dyn Fn(&Place) -> Option<TargetSettings>,
        now: Instant,
    ) -> Restored {
        self.with(|core| core.restore(image, settings, now))
    }

    /// From here on what changes is marked for the store; `told` is set with every mark.
    pub fn keep_changes(&self, told: Arc<AtomicBool>, whole: bool) {
        self.with(|core| core.keep_changes(told, whole));
    }

    /// The store is to write everything anew.
    pub fn change_whole(&self) {
        self.with(Core::change_whole);
    }

    /// What has changed since the last time; `None`: nothing. Taken in steps, so that nobody waits for it.
    pub fn take_changes(&self, now: Instant) -> Option<Delta> {
        let mut taking = self.with(|core| core.take_changes(now))?;
        loop {
            if let Some(delta) = self.with(|core| core.take_more(&mut taking, SCAN as usize, now)) {
                return Some(delta);
            }
        }
    }

    /// Where a copy of a start goes: see [`Core::shadow`]. `None`: nowhere, or too many are under way.
    pub fn shadow(&self, version: &str, place: u64) -> Option<Shadowed> {
        let permit = Arc::clone(&self.copies).try_acquire_owned().ok()?;
        let target = self.with(|core| core.shadow(version, place))?;
        Some(Shadowed { target, permit })
    }

    /// Has the sessions of a version that have no run outstanding placed anew, by the weights, each at its next start,
    /// and says how many. `None`: there is no such version.
    pub fn evict_sessions(&self, version: &str, now: Instant) -> Option<usize> {
        let mut evicted = 0;
        let mut from = Some(0);
        while let Some(slot) = from {
            let (count, next) = self.with(|core| core.evict_sessions(version, slot, SCAN, now))?;
            evicted += count;
            from = next;
        }
        Some(evicted)
    }

    /// A ready endpoint has a free slot.
    pub fn ready_for_work(&self, now: Instant) -> bool {
        self.with(|core| core.ready_for_work(now))
    }

    /// What is due with time; to be called every [`USUAL_TICK`](crate::state::core::USUAL_TICK), and more often while that returns
    /// true: exchanges are being cut then, one after another, or will be before the next usual tick.
    pub fn tick(&self, now: Instant) -> bool {
        self.starts().expire(now);
        let (mut busy, in_haste) = self.with(|core| {
            core.tick(now);
            (core.slots_to_look_at(now), core.is_cutting() || core.cuts_soon(now))
        });
        while busy > 0 {
            self.with(|core| core.mark_busy(busy.min(SCAN), now));
            busy = busy.saturating_sub(SCAN);
        }
        // In small steps, so that a million sessions that expire together hold up nobody.
        while self.with(|core| core.expire(SCAN as usize, now)) == SCAN as usize {}
        in_haste
    }

    /// The proxy ends: see [`Core::cut_all`].
    pub fn cut_all(&self, begins: bool, share: f64) {
        self.with(|core| core.cut_all(begins, share));
    }

    /// What a rollout now would cut: see [`Core::safe_to_roll`].
    pub fn safe_to_roll(
        &self,
        endpoint: Option<&str>,
        grace: Option<Duration>,
        confidence: f64,
        now: Instant,
    ) -> Option<RollReport> {
        let outlook = self.outlook(now);
        let rolling = self.with(|core| core.safe_to_roll(endpoint, grace, confidence, now))?;
        Some(rolling.estimated(&outlook))
    }

    /// Ends the runs whose time is over and gives the calls that are to be made about others, `limit` at most.
    pub fn due_runs(&self, limit: usize, now: Instant) -> Vec<DueCall> {
        let mut ended = Vec::new();
        let calls = self.with(|core| core.due_runs(limit, &mut ended, now));
        record(ended);
        calls
    }

    /// What a status call found; `None`: it reached nobody.
    pub fn asked(&self, call: &DueCall, found: Option<Standing>, now: Instant) {
        let mut ended = Vec::new();
        self.with(|core| core.asked(call.number, call.id, found, &mut ended, now));
        record(ended);
    }

    /// What an endpoint said to a cancel call.
    pub fn cancelled(&self, call: &DueCall, answer: CancelAnswer, now: Instant) {
        let mut ended = Vec::new();
        self.with(|core| core.cancelled(call.number, call.id, answer, &mut ended, now));
        record(ended);
    }

    /// Ends a run by hand: what is carried is cut, and the endpoint is asked where its protocol has a call for it.
    /// `None`: there is no such run here.
    pub fn cancel(&self, id: RunId, now: Instant) -> Option<(Ending, Option<DueCall>)> {
        let mut ended = Vec::new();
        let ending = self.with(|core| core.cancel_by_id(id, &mut ended, now));
        record(ended);
        ending
    }

    /// What has become of a run that was to be ended and could not be yet; `None`: it can't still.
    pub fn ending(&self, id: RunId, stop: &Stop) -> Option<CancelReport> {
        self.with(|core| core.ending(id, stop))
    }

    /// A run is outstanding, or somebody waits.
    pub fn has_work(&self) -> bool {
        self.work.there_is.load(Ordering::Acquire)
    }

    /// Is woken when [`Dispatcher::has_work`] becomes something else, and when somebody comes to wait. To be asked for (and enabled) before that is read.
    pub fn work_changes(&self) -> Notified<'_> {
        self.work.changed.notified()
    }

    /// Does something under the lock. What became free by it is handed on before the lock is released; whoever got it is
    /// woken after, and where a rollout went by it is logged.
    pub(super) fn with<T>(&self, act: impl FnOnce(&mut Core) -> T) -> T {
        let (done, wakers, transitions, work_changed) = {
            let mut core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
            let done = act(&mut core);
            let (wakers, transitions) = (core.settle_up(), core.take_transitions());
            let (has_work, arrivals) = core.work();
            // Nobody else writes them, so they can be read before: most of the time nothing changes.
            let work_changed = self.work.there_is.load(Ordering::Relaxed) != has_work
                || self.work.arrivals.load(Ordering::Relaxed) != arrivals;
            if work_changed {
                self.work.there_is.store(has_work, Ordering::Release);
                self.work.arrivals.store(arrivals, Ordering::Release);
            }
            (done, wakers, transitions, work_changed)
        };
        if work_changed {
            self.work.changed.notify_waiters();
        }
        for waker in wakers {
            waker.wake();
        }
        for transition in transitions {
            tracing::info!(service = &*self.name, "rollout: {transition}");
        }
        done
    }
}

impl Lease {
    /// That of a run which an exchange of another process carries.
    pub(super) fn adopted(dispatcher: Arc<Dispatcher>, stop: Option<Arc<Stop>>, grant: Grant) -> Lease {
        Lease { dispatcher, grant: Some(grant), finish: Finish::Ended(RunOutcome::Unknown), stop }
    }

    /// The service that it is of.
    pub fn service(&self) -> &Arc<str> {
        self.dispatcher.name()
    }

    /// The process that carries its run has moved it to the endpoint with this identity.
    pub fn was_moved(&mut self, identity: &str, now: Instant) {
        if let Some(grant) = &mut self.grant {
            self.dispatcher.with(|core| core.follow_move(grant, identity, now));
        }
    }

    /// The run that this exchange started.
    pub fn run_id(&self) -> Option<RunId> {
        self.grant.as_ref().and_then(Grant::run_id)
    }

    /// The answer was 2xx or 3xx: the pin holds from now on.
    pub fn confirm(&mut self, now: Instant) {
        // Without a session there is no pin, and no reason to take the lock.
        if let Some(grant) = self.grant.as_ref().filter(|grant| grant.has_session()) {
            self.dispatcher.with(|core| core.confirm(grant, now));
        }
    }

    /// The (successful) answer named its session; becomes the key, or an alias of the request's key.
    pub fn learn(&mut self, key: SessionKey, now: Instant) {
        if let Some(grant) = &mut self.grant {
            self.dispatcher.with(|core| core.learn(grant, &key, now));
        }
    }

    /// Moves the reservation to another endpoint in one step after an attempt that the endpoint never saw, never to one
    /// tried before. A confirmed pin stays on its own endpoint. Counts one more attempt.
    pub fn retry(&mut self, now: Instant, rng: u64) -> Result<Arc<Target>, Refusal> {
        match &mut self.grant {
            Some(grant) => {
                self.dispatcher.with(|core| core.retry(grant, now, rng)).map_err(|unplaced| unplaced.refusal())
            }
            None => Err(Refusal::NoEndpoint),
        }
    }

    /// The answer told whether its endpoint drains (`longhaul-drain`).
    pub fn endpoint_drains(&self, drains: bool, now: Instant) {
        if let Some(grant) = &self.grant {
            self.dispatcher.with(|core| core.answer_says(grant.endpoint(), drains, now));
        }
    }

    /// Load that the answer told (its head, or its trailers).
    pub fn reported_load(&self, report: &Report, now: Instant) {
        if let Some(grant) = &self.grant {
            self.dispatcher.with(|core| core.reported_with_answer(grant, report, now));
        }
    }

    /// Evidence for outlier ejection about the current target.
    pub fn report(&mut self, evidence: Evidence, now: Instant) {
        if let Some(grant) = &self.grant {
            self.dispatcher.with(|core| core.report(grant, evidence, now));
        }
    }

    /// How the run ends is not its version's doing: it is not told to the judge of a rollout.
    pub fn keep_from_judge(&mut self) {
        if let Some(grant) = &mut self.grant {
            grant.keep_from_judge();
        }
    }

    /// When the answer's first event came, where one has.
    pub fn first_event(&mut self, at: Option<Instant>) {
        if let (Some(grant), Some(at)) = (&mut self.grant, at)
            && self.dispatcher.judged.load(Ordering::Relaxed)
            && grant.begins()
        {
            self.dispatcher.with(|core| core.first_event(grant, at));
        }
    }

    /// Sets how the run is to be judged when the lease is dropped; without it a dropped run counts as cancelled.
    pub fn outcome(&mut self, outcome: RunOutcome) {
        self.finish = Finish::Ended(outcome);
    }

    /// As [`Lease::outcome`], or that the run is to go on.
    pub fn finish(&mut self, finish: Finish) {
        self.finish = finish;
    }

    /// Takes what the answer told, in order. `about` is for runs that begin unasked.
    pub fn tell(&mut self, facts: &mut Vec<Fact>, scope: Option<[u8; 16]>, about: &About, now: Instant) {
        if let (Some(grant), false) = (&mut self.grant, facts.is_empty()) {
            let mut ended = Vec::new();
            self.dispatcher.with(|core| core.tell(grant, facts, scope, about, &mut ended, now));
            record(ended);
        }
    }

    /// The socket over which these runs began is gone.
    pub fn leave_started(&self, keys: &[String], finish: Finish, now: Instant) {
        let mut ended = Vec::new();
        self.dispatcher.with(|core| core.leave_started(keys, finish, &mut ended, now));
        record(ended);
    }

    /// Tells whether the run was ended from elsewhere; `None` where this is no run's exchange.
    pub fn stop(&self) -> Option<&Arc<Stop>> {
        self.stop.as_ref()
    }

    /// The run is to be ended by its protocol's call, and to count as cancelled. True: there is such a call, and the run
    /// goes on until it is answered.
    pub fn cancel_soon(&mut self, now: Instant) -> bool {
        self.grant.as_ref().is_some_and(|grant| self.dispatcher.with(|core| core.cancel_soon(grant, now)))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(grant) = self.grant.take() else { return };
        let ended = self.dispatcher.with(|core| core.finish(grant, self.finish, ids::now()));
        record(ended);
    }
}

/// What has ended is counted outside of the lock.
fn record(ended: impl IntoIterator<Item = Ended>) {
    for ended in ended {
        let metrics = &ended.target.metrics;
        metrics.runs[ended.outcome as usize].inc();
        metrics.run_duration_seconds.observe(ended.duration.as_secs_f64());
    }
}
