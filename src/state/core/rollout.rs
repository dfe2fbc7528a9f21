//! Rollout: which weights new sessions are dealt by, what a rollout is told of runs that end, and who is sent anew.

use std::time::{Duration, Instant};

use crate::config;
use crate::rollout::{self, Command, EndedRun, Ending, Moment, Refused, Rollout, Transition};
use crate::state::RunOutcome;
use crate::state::core::{BORN_BEFORE, Core, Grant, Request, Unplaced};
use crate::state::endpoints::Version;
use crate::state::status::{Dealt, Share};

/// The service's rollout, and what it takes to tell it of the time.
#[derive(Default)]
pub(super) struct Judged {
    rollout: Option<Rollout>,
    /// A point on the clock that never jumps, and what the wall said then.
    anchor: Option<(Instant, Moment)>,
    /// How many transitions of it were handed out.
    told: u64,
}

/// What an exchange has seen of the run that it started.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    starts: bool,
    unjudged: bool,
    /// Its first event was told.
    began: bool,
}

impl Seen {
    /// Whoever joins a run comes later, and what is said to it is said to it alone.
    pub fn of_exchange(starts: bool) -> Seen {
        Seen { starts, ..Seen::default() }
    }
}

impl Grant {
    /// How its run ends is not its version's doing: a 4xx is the client's fault, a cut at the end of a drain is ours.
    pub fn keep_from_judge(&mut self) {
        self.seen.unjudged = true;
    }

    /// Whether its run still waits for its first event, which is noted then: once, as everybody else waits meanwhile.
    pub fn begins(&mut self) -> bool {
        self.seen.starts && !std::mem::replace(&mut self.seen.began, true)
    }
}

impl Core {
    /// What the wall says at `now`. The first that is told is kept: the wall may jump, and a rollout's holds must not.
    pub fn set_wall_clock(&mut self, now: Instant, wall: Moment) {
        self.rollout.anchor.get_or_insert((now, wall));
    }

    /// The rollout as it stands now, with what is due at this time done.
    pub fn rollout(&mut self, now: Instant) -> Option<&Rollout> {
        let now = self.advance(now);
        self.advance_rollout(now);
        self.rollout.rollout.as_ref()
    }

    /// Follows a person's command. `None`: the service has no rollout.
    pub fn steer_rollout(&mut self, command: Command, now: Instant) -> Option<Result<&Rollout, Refused>> {
        let now = self.advance(now);
        let moment = self.moment(now);
        let followed = self.rollout.rollout.as_mut()?.command(command, moment);
        self.rollout_changed();
        self.reweigh();
        let rollout = self.rollout.rollout.as_ref()?;
        Some(followed.map(|_| rollout))
    }

    /// The transitions of the rollout that nobody was told of yet, for the log.
    pub fn take_transitions(&mut self) -> Vec<Transition> {
        let Judged { rollout, told, .. } = &mut self.rollout;
        let Some(history) = rollout.as_ref().map(Rollout::history) else { return Vec::new() };
        if history.count() == *told {
            return Vec::new();
        }
        let fresh = history.iter().filter(|transition| transition.number > *told).cloned().collect();
        *told = history.count();
        fresh
    }

    /// Marks the sessions in the slots `from..from + count` that are pinned to the version and have no run outstanding:
    /// each is placed anew at its next start. Returns how many, and the next slot as [`Core::scan_sessions`]. `None`:
    /// there is no such version.
    pub fn evict_sessions(
        &mut self,
        version: &str,
        from: u32,
        count: u32,
        now: Instant,
    ) -> Option<(usize, Option<u32>)> {
        self.advance(now);
        let version = self.versions.iter().position(|known| *known.name == *version)?;
        let slots = self.sessions.slots();
        let end = slots.min(from.saturating_add(count));
        let mut evicted = 0;
        for slot in from..end {
            let Some(view) = self.sessions.view(slot) else { continue };
            let (session, endpoint) = (view.id, view.endpoint);
            if self.endpoints[endpoint].version == version && self.sessions.first_run(session).is_none() {
                self.sessions.evict(session, true);
                self.pin_changed(session);
                evicted += 1;
            }
        }
        // Whoever waits for its own endpoint may not any more.
        self.room.changed_for_all();
        Some((evicted, (end < slots).then_some(end)))
    }

    /// Takes the rollout of a configuration, after its versions.
    pub(super) fn take_rollout(&mut self, plan: Option<&config::Rollout>, now: Instant) {
        self.rollout.anchor.get_or_insert((now, Moment::default()));
        let moment = self.moment(now);
        let earlier = self.rollout.rollout.take();
        if earlier.is_none() {
            self.rollout.told = 0;
        }
        if plan.is_some() || earlier.is_some() {
            self.rollout_changed();
        }
        self.rollout.rollout = plan.map(|plan| Rollout::load(plan, earlier, moment));
        self.reweigh();
    }

    pub(super) fn forget_rollout(&mut self) {
        self.rollout.rollout = None;
    }

    pub(super) fn advance_rollout(&mut self, now: Instant) {
        let moment = self.moment(now);
        if self.rollout.rollout.as_mut().is_some_and(|rollout| rollout.advance(moment)) {
            self.rollout_changed();
            self.reweigh();
        }
    }

    /// The first event of the answer to the exchange that started a run.
    pub fn first_event(&mut self, grant: &Grant, at: Instant) {
        if let Some(run) = grant.run.and_then(|run| self.runs.run_mut(run)) {
            run.first_event = Some(at);
        }
    }

    /// Keeps with the run what the exchange that started it has seen of it.
    pub(super) fn note(&mut self, grant: &Grant) {
        let Seen { starts, unjudged, .. } = grant.seen;
        if starts
            && unjudged
            && let Some(run) = grant.run.and_then(|run| self.runs.run_mut(run))
        {
            run.unjudged = true;
        }
    }

    /// Counts a run that is about to end, and tells the rollout of it.
    pub(super) fn judge_run(&mut self, number: u32, outcome: RunOutcome, now: Instant) {
        let Some(run) = self.runs.run(number) else { return };
        let matched = match run.session {
            Some(session) => self.sessions.matched(session),
            None => run.matched,
        };
        if matched {
            return;
        }
        let (unjudged, session, started, duration) = (run.unjudged, run.session, run.started, run.age(now));
        let first_event = run.first_event.map(|at| at.saturating_duration_since(started));
        if let Some(version) = self.versions.iter_mut().find(|version| version.name == run.target.version) {
            version.dealt.total.runs += 1;
            version.dealt.total.run_time += duration;
        }
        let side = self.rollout.rollout.as_ref().and_then(|rollout| rollout.side(&run.target.version));
        let (Some(side), Some(ending), false) = (side, ending(outcome), unjudged) else { return };
        let born = match session.map(|session| self.sessions.born_seconds(session)) {
            Some(Some(seconds)) => self.born(seconds),
            // A session that began before its pin is older than any step.
            Some(None) => return,
            None => self.moment(started),
        };
        let moment = self.moment(now);
        let run = EndedRun { side, ending, born, first_event, duration };
        self.rollout_changed();
        if self.rollout.rollout.as_mut().is_some_and(|rollout| rollout.observe(run, moment)) {
            self.reweigh();
        }
    }

    /// A session began by the weights, or by a `match`.
    pub(super) fn count_session(&mut self, endpoint: u32, matched: bool) {
        let version = self.endpoints[endpoint].version;
        self.versions[version].dealt.total.sessions += u64::from(!matched);
    }

    /// Whether the weights send a session elsewhere that was evicted. One that is to stay where it is keeps its endpoint.
    pub(super) fn leaves_evicted(&mut self, session: u32, here: u32, request: &Request<'_>) -> bool {
        if request.run.is_none() || !self.is_evicted(session) {
            return false;
        }
        let unmatched = Request { version: None, ..*request };
        let version = self.choose_version(&unmatched, &[]).map(|(version, _)| version);
        let leaves = version.is_some_and(|version| version != self.endpoints[here].version);
        if !leaves {
            self.sessions.evict(session, false);
            self.pin_changed(session);
        }
        leaves
    }

    /// Its next start is placed anew, unless a run of it is outstanding then.
    pub(super) fn is_evicted(&self, session: u32) -> bool {
        self.sessions.evicted(session) && self.sessions.first_run(session).is_none()
    }

    /// A new endpoint for a session that was `here`.
    pub(super) fn place_anew(&mut self, here: u32, evicted: bool, request: &Request<'_>) -> Result<u32, Unplaced> {
        if evicted {
            return self.place_by_weights(request);
        }
        self.place_again(self.endpoints[here].version, request)
    }

    /// The part that a version really has, since the weights changed last.
    pub(super) fn share(&self, version: &Version) -> Share {
        let part = |of: &dyn Fn(&Version) -> f64| {
            let all: f64 = self.versions.iter().map(of).sum();
            (all > 0.0).then(|| of(version) / all)
        };
        let since = |of: fn(&Dealt) -> f64| part(&|version| of(&version.dealt.total) - of(&version.dealt.before));
        Share {
            weight: part(&|version| version.effective_weight as f64),
            sessions: since(|dealt| dealt.sessions as f64),
            runs: since(|dealt| dealt.runs as f64),
            run_minutes: since(|dealt| dealt.run_time.as_secs_f64()),
        }
    }

    /// Sets the weights that hold now.
    fn reweigh(&mut self) {
        let weights = self.versions.iter().map(|version| (&*version.name, version.weight));
        let weights = rollout::effective_weights(self.rollout.rollout.as_ref(), weights);
        let Core { versions, turns, .. } = self;
        let changed = versions.iter().zip(&weights).any(|(version, weight)| version.effective_weight != *weight);
        if !changed {
            return;
        }
        for ((version, turn), weight) in versions.iter_mut().zip(turns).zip(weights) {
            // A turn saved up under other weights would be a burst now.
            if version.effective_weight != weight {
                *turn = 0;
            }
            version.effective_weight = weight;
            version.dealt.before = version.dealt.total;
        }
        // Whoever waits for a version may be another's now.
        self.room.changed_for_all();
    }

    /// When a session began that did so many seconds after [`BORN_BEFORE`] the service's start. Rounded down: one that seems to be from
    /// before a step, and is not, is only not judged.
    pub(super) fn born(&self, seconds: u32) -> Moment {
        let started = self.started.map_or(Moment::default(), |started| self.moment(started));
        Moment((started.0 + 1000 * u64::from(seconds)).saturating_sub(BORN_BEFORE.as_millis() as u64))
    }

    /// The reverse of [`Core::born`].
    pub(super) fn seconds_of_birth(&self, born: Moment) -> u32 {
        let started = self.started.map_or(Moment::default(), |started| self.moment(started));
        let since = (born.0 + BORN_BEFORE.as_millis() as u64).saturating_sub(started.0);
        u32::try_from(since / 1000).unwrap_or(u32::MAX)
    }

    pub(super) fn rollout_plan(&self) -> Option<config::Rollout> {
        self.rollout.rollout.as_ref().map(|rollout| rollout.plan().clone())
    }

    /// A rollout of which everybody was told, in place of the one that is here.
    pub(super) fn put_rollout(&mut self, rollout: Rollout) {
        self.rollout.told = rollout.history().count();
        self.rollout.rollout = Some(rollout);
    }

    /// The reverse of [`Core::moment`], as far as the monotonic clock reaches back.
    pub(super) fn instant(&self, moment: Moment) -> Instant {
        let Some((anchor, wall)) = self.rollout.anchor else { return self.clock.unwrap_or_else(crate::ids::now) };
        if moment >= wall {
            return anchor + Duration::from_millis(moment.0 - wall.0);
        }
        anchor.checked_sub(Duration::from_millis(wall.0 - moment.0)).unwrap_or(anchor)
    }

    pub(super) fn moment(&self, at: Instant) -> Moment {
        let Some((anchor, wall)) = self.rollout.anchor else { return Moment::default() };
        let milliseconds = |duration: Duration| duration.as_millis() as u64;
        Moment(match at.checked_duration_since(anchor) {
            Some(after) => wall.0 + milliseconds(after),
            None => wall.0.saturating_sub(milliseconds(anchor.duration_since(at))),
        })
    }
}

/// As what a run counts; `None`: it says nothing of its version.
fn ending(outcome: RunOutcome) -> Option<Ending> {
    match outcome {
        RunOutcome::Completed => Some(Ending::Good),
        RunOutcome::Failed | RunOutcome::Truncated | RunOutcome::TimedOut => Some(Ending::Bad),
        RunOutcome::Cancelled | RunOutcome::Interrupted | RunOutcome::Rejected | RunOutcome::Unknown => None,
    }
}
