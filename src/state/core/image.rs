//! Image: takes a picture of the service, and goes on from one that another process took.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config;
use crate::ids::RunId;
use crate::protocols;
use crate::rollout::{Moment, Rollout};
use crate::state::core::{Core, Origin, RUNS_MAX};
use crate::state::endpoints::{Endpoint, Version};
use crate::state::image::{DrainImage, Pin, Place, RunImage, RunsTaken, ServiceImage};
use crate::state::runs::{About, NewRun, Run};
use crate::state::sessions::{SessionKey, TICK, Ticks};
use crate::state::{Target, TargetSettings};

/// Gives places numbers, as they are first met.
#[derive(Default)]
pub(super) struct Places {
    pub list: Vec<Place>,
    by_endpoint: HashMap<u32, u32>,
}

/// What a picture was restored to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    pub pins: usize,
    /// Pins whose time was over, or for which the table had no room.
    pub dropped: usize,
    pub runs: usize,
}

impl Core {
    /// The whole picture at this instant. Pins that no success has confirmed are left out unless their session is busy.
    pub fn image(&mut self, taken: RunsTaken, now: Instant) -> ServiceImage {
        let now = self.advance(now);
        let mut places = Places::default();
        let pins = (0..self.sessions.slots()).filter_map(|slot| self.pin_image(slot, &mut places, now)).collect();
        let runs = self.run_images(taken, &mut places);
        ServiceImage {
            name: self.name.to_string(),
            places: places.list,
            pins,
            runs,
            drains: self.drain_images(),
            rollout: self.rollout(now).cloned(),
        }
    }

    /// What is pinned in a slot of the table, if anything that is to last.
    pub(super) fn pin_image(&self, slot: u32, places: &mut Places, now: Instant) -> Option<Pin> {
        let view = self.sessions.view(slot)?;
        if !view.confirmed && !view.busy {
            return None;
        }
        let idle = if view.busy { 0 } else { self.ticks(now).wrapping_sub(view.used) };
        let used = self.moment(now).0.saturating_sub((TICK * idle).as_millis() as u64);
        Some(Pin {
            key: self.sessions.session_key(slot),
            aliases: self.sessions.aliases(slot),
            place: self.place_number(places, view.endpoint),
            confirmed: view.confirmed,
            settled: self.sessions.settled(slot),
            matched: view.matched,
            evicted: self.sessions.evicted(slot),
            born: self.sessions.born_seconds(slot).map(|seconds| self.born(seconds)),
            used: Moment(used),
        })
    }

    /// Of all that are wanted.
    pub(super) fn run_images(&self, taken: RunsTaken, places: &mut Places) -> Vec<RunImage> {
        let runs = self.runs.iter().map(|(_, run)| run);
        let wanted = |run: &&Run| taken == RunsTaken::All || run.lasts();
        runs.filter(wanted).map(|run| self.run_image(run, places)).collect()
    }

    /// Of a run that is to be stored.
    pub(super) fn lasting_run_image(&self, number: u32, places: &mut Places) -> Option<RunImage> {
        let run = self.runs.run(number).filter(|run| !run.ended && run.lasts())?;
        Some(self.run_image(run, places))
    }

    /// One run, and its place, which is the only one.
    pub(super) fn run_alone(&self, run: &Run) -> (RunImage, Place) {
        let mut places = Places::default();
        let image = self.run_image(run, &mut places);
        (image, places.list.swap_remove(0))
    }

    fn run_image(&self, run: &Run, places: &mut Places) -> RunImage {
        RunImage {
            id: run.id.to_string(),
            place: self.place_number(places, run.endpoint),
            session: run.session.map(|session| self.sessions.session_key(session)),
            protocol: run.about.protocol.map(|protocol| protocol.name().to_owned()),
            base: run.about.base.to_string(),
            key: run.key.as_deref().map(str::to_owned),
            goes_on: run.about.goes_on,
            started: self.moment(run.started),
            deadline: run.deadline.map(|deadline| self.moment(deadline)),
            first_event: run.first_event.map(|at| self.moment(at)),
            attempts: run.attempts,
            carriers: run.carriers,
            matched: run.matched,
            unjudged: run.unjudged,
            principal: run.origin.as_ref().and_then(|origin| origin.principal),
        }
    }

    pub(super) fn drain_images(&self) -> Vec<DrainImage> {
        let endpoints = self.endpoints.numbers().into_iter().map(|number| &self.endpoints[number]);
        let drained = endpoints.filter(|endpoint| endpoint.drained);
        let image = |endpoint: &Endpoint| DrainImage {
            endpoint: endpoint.identity.to_string(),
            deadline: endpoint.drain_deadline.map(|deadline| self.moment(deadline)),
        };
        drained.map(image).collect()
    }

    fn place_number(&self, places: &mut Places, endpoint: u32) -> u32 {
        let Places { list, by_endpoint } = places;
        *by_endpoint.entry(endpoint).or_insert_with(|| {
            let endpoint = &self.endpoints[endpoint];
            let version = self.versions[endpoint.version].name.to_string();
            list.push(Place { version, endpoint: endpoint.identity.to_string() });
            (list.len() - 1) as u32
        })
    }

    /// Goes on with the rollout of a picture, before or after the first configuration: with the same block where it was,
    /// with an edited one from its first step. Nothing that it did before is told again.
    pub fn restore_rollout(&mut self, earlier: Rollout, now: Instant) {
        let now = self.advance(now);
        let plan = self.rollout_plan();
        if self.applied && plan.is_none() {
            return;
        }
        self.put_rollout(earlier);
        if let Some(plan) = plan {
            self.take_rollout(Some(&plan), now);
        }
    }

    /// Takes the pins, runs and drains of a picture, and its rollout. To be called after the first configuration was
    /// applied and before anything is placed; what is here already stays. `settings` describes endpoints that the
    /// configuration no longer names (`None`: it can't be reached): runs there drain, and pins there wait for `when_lost`.
    pub fn restore(
        &mut self,
        image: ServiceImage,
        settings: &dyn Fn(&Place) -> Option<TargetSettings>,
        now: Instant,
    ) -> Restored {
        let now = self.advance(now);
        let ServiceImage { name: _, places, mut pins, mut runs, drains, rollout } = image;
        if let Some(rollout) = rollout {
            self.restore_rollout(rollout, now);
        }
        let mut numbers: Vec<Option<Option<u32>>> = vec![None; places.len()];
        let mut number = |core: &mut Core, place: u32| {
            let slot = numbers.get_mut(place as usize)?;
            *slot.get_or_insert_with(|| core.restored_place(&places[place as usize], settings, now))
        };
        runs.truncate(RUNS_MAX);
        let busy: HashSet<SessionKey> = runs.iter().filter_map(|run| run.session.clone()).collect();
        let mut restored = Restored::default();
        // The list of idle sessions is in the order of their last use.
        pins.sort_unstable_by_key(|pin| pin.used);
        let surplus = pins.len().saturating_sub(self.rules.max_sessions.saturating_sub(self.sessions.len()));
        for (index, pin) in pins.into_iter().enumerate() {
            let kept = index >= surplus && self.rules.affinity != config::Affinity::None;
            let endpoint = kept.then(|| number(self, pin.place)).flatten();
            match endpoint {
                Some(endpoint)
                    if self.restore_pin(&pin, endpoint, !busy.is_empty() && busy.contains(&pin.key), now) =>
                {
                    restored.pins += 1
                }
                _ => {
                    restored.dropped += 1;
                    if let Some(changes) = &mut self.changes {
                        changes.removed(|| pin.key.to_bytes());
                    }
                }
            }
        }
        for run in &runs {
            if let Some(endpoint) = number(self, run.place)
                && self.restore_run(run, endpoint, now)
            {
                restored.runs += 1;
            } else if let (Some(changes), Some(id)) = (&mut self.changes, RunId::parse(&run.id)) {
                changes.ended(id);
            }
        }
        for drain in &drains {
            if !self.restore_drain(drain, now) {
                // It is not to be found again by the next start.
                self.drains_changed();
            }
        }
        for number in numbers.into_iter().flatten().flatten() {
            self.settle(number, now);
        }
        self.room.changed_for_all();
        restored
    }

    fn restore_pin(&mut self, pin: &Pin, endpoint: u32, busy: bool, now: Instant) -> bool {
        let idle = Duration::from_millis(self.moment(now).0.saturating_sub(pin.used.0));
        if !busy && (!pin.confirmed || idle > self.rules.idle_timeout) || self.sessions.find(&pin.key).is_some() {
            return false;
        }
        let born = pin.born.map_or(0, |born| self.seconds_of_birth(born));
        let session = self.sessions.insert(&pin.key, endpoint, pin.matched, born);
        if pin.born.is_none() {
            self.sessions.carry(session);
        }
        if pin.confirmed {
            self.sessions.confirm(session, pin.settled);
        }
        self.sessions.evict(session, pin.evicted);
        for alias in &pin.aliases {
            self.sessions.add_alias(session, alias, self.rules.max_sessions);
        }
        let ticks = (idle.as_millis() / TICK.as_millis()) as Ticks;
        self.sessions.rest(session, self.ticks(now).wrapping_sub(ticks));
        self.endpoints[endpoint].sessions += 1;
        true
    }

    fn restore_run(&mut self, image: &RunImage, endpoint: u32, now: Instant) -> bool {
        let known = image.key.as_deref().is_some_and(|key| self.runs.find(key).is_some());
        let Some(id) = RunId::parse(&image.id).filter(|_| !known && self.runs.len() < RUNS_MAX) else { return false };
        if self.runs.by_id(id).is_some() {
            return false;
        }
        if self.endpoints[endpoint].gone {
            return false;
        }
        let session = image.session.as_ref().and_then(|key| self.sessions.find(key));
        let first = session.and_then(|session| self.sessions.first_run(session));
        let about = About {
            protocol: image.protocol.as_deref().and_then(protocols::by_name),
            base: image.base.as_str().into(),
            goes_on: image.goes_on,
        };
        let target = self.endpoints[endpoint].target.clone();
        let started = self.instant(image.started);
        let (carriers, matched) = (0, image.matched);
        let new = NewRun { id, target, endpoint, session, started, about, carriers, matched };
        let number = self.runs.insert(new, first);
        let (deadline, first_event) =
            (image.deadline.map(|at| self.instant(at)), image.first_event.map(|at| self.instant(at)));
        if let Some(run) = self.runs.run_mut(number) {
            run.attempts = image.attempts;
            run.unjudged = image.unjudged;
            run.deadline = deadline;
            run.first_event = first_event;
            // Nobody could hear of it meanwhile; so it is asked at once, and given up after the whole time only.
            run.seen = now;
            run.stored = true;
        }
        if let Some(key) = &image.key {
            self.runs.name(number, key);
        }
        if let Some(principal) = image.principal {
            self.restore_principal(number, principal);
        }
        self.endpoints[endpoint].outstanding += 1;
        if let Some(session) = session {
            self.sessions.hold(session);
            self.sessions.set_first_run(session, Some(number));
            let key = self.sessions.session_key(session);
            self.session_of_run_known(number, &key);
        }
        self.reindex(endpoint);
        self.watch(number);
        true
    }

    fn restore_principal(&mut self, number: u32, principal: [u8; 16]) {
        if let Some(run) = self.runs.run_mut(number) {
            run.origin = Some(Box::new(Origin { principal: Some(principal), ..Origin::default() }));
            self.room.count(principal);
        }
    }

    /// False: its endpoint is not configured any more.
    fn restore_drain(&mut self, drain: &DrainImage, now: Instant) -> bool {
        let Some(number) = self.by_identity.get(drain.endpoint.as_str()).copied() else { return false };
        let deadline = drain.deadline.map(|deadline| self.instant(deadline));
        let endpoint = &mut self.endpoints[number];
        if endpoint.configured {
            endpoint.drained = true;
            endpoint.drain_deadline = deadline;
            self.refresh(number, now);
        }
        self.endpoints[number].configured
    }

    /// The endpoint of that identity, whatever version has it now, or one that drains because it is not configured.
    fn restored_place(
        &mut self,
        place: &Place,
        settings: &dyn Fn(&Place) -> Option<TargetSettings>,
        now: Instant,
    ) -> Option<u32> {
        if let Some(number) = self.by_identity.get(place.endpoint.as_str()) {
            return Some(*number);
        }
        let settings = settings(place)?;
        let known = self.versions.iter().position(|version| *version.name == *place.version);
        let version = known.unwrap_or_else(|| {
            self.versions.push(Version::new(Arc::from(place.version.as_str())));
            self.turns.push(0);
            self.versions.len() - 1
        });
        let mut endpoint = Endpoint::new(&place.endpoint, Arc::new(Target::new(settings)), version);
        // A source may be about to find it.
        endpoint.awaited = self.versions[version].awaited;
        endpoint.configured = endpoint.awaited;
        endpoint.max_runs = self.rules.max_per_endpoint;
        endpoint.drain_deadline = (!endpoint.awaited).then(|| now + self.rules.drain_timeout);
        let number = self.endpoints.insert(endpoint);
        self.by_identity.insert(place.endpoint.as_str().into(), number);
        self.versions[version].endpoints.push(number);
        Some(number)
    }
}

impl Run {
    /// It outlives this process: its endpoint goes on with it, and can be asked.
    pub fn lasts(&self) -> bool {
        self.carriers == 0 || self.about.goes_on && self.key.is_some()
    }
}
