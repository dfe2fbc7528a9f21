//! Endpoints: the live endpoints of a service and who is least loaded.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::balance::Score;
use crate::config;
use crate::state::Target;
use crate::state::discovery::Found;
use crate::state::ordered::Ordered;
use crate::state::status::Dealt;

/// Weights are compared in thousandths, so that slow start can take a part of them.
const FULL_WEIGHT: u64 = 1000;

/// The share of its weight with which a slow start begins, in thousandths.
const SLOW_WEIGHT: u64 = 100;

/// Among so many equally loaded endpoints, those picked longest ago, a lot is drawn.
const TIED_MAX: usize = 8;

/// One rotation of an endpoint of weight 1.
const STRIDE: u128 = 1 << 32;

/// One address that serves a version, from the first configuration that names it until nothing refers to it.
pub(crate) struct Endpoint {
    pub identity: Box<str>,
    /// [`crate::balance::endpoint_hash`] of the identity.
    pub hash: u64,
    pub target: Arc<Target>,
    pub version: usize,
    pub weight: u32,
    pub max_runs: Option<u32>,
    pub outstanding: u32,
    /// Open exchanges that are not runs.
    pub open: u32,
    /// Sessions placed here of which the first run is still to come.
    pub credit: u32,
    pub sessions: u32,
    /// Runs that it says it has, those included that started elsewhere, and until when that holds.
    pub reported: Option<(u32, Instant)>,
    /// The newest configuration names it, or a source of it does.
    pub configured: bool,
    /// Set where a source gives it, not the configuration.
    pub found: Option<Found>,
    /// It is known from before, and its version's sources have not answered yet: its sessions stay, nobody new comes.
    pub awaited: bool,
    /// Its source does not list it any more because it does not answer any more.
    pub lost: bool,
    /// An operator drains it.
    pub drained: bool,
    /// It says itself that it drains.
    pub says: Option<Says>,
    /// Removed, and its drain is over.
    pub gone: bool,
    /// Set while it drains, removed or by an operator: when that ends at the latest and what is left is cut.
    pub drain_deadline: Option<Instant>,
    /// Set while what its drain has left is being cut.
    pub cutting: Option<Cutting>,
    pub health: Health,
    pub failures: u32,
    pub ejected_until: Option<Instant>,
    /// May take new work, but for its limit of runs.
    pub ready: bool,
    /// It was there when the service began, so that its first readiness needs no slow start.
    pub original: bool,
    /// When the slow start began that goes on.
    pub ramp: Option<Instant>,
    /// When it was last chosen by load or given a run, by the service's count of those: what else passes takes no turn.
    pub stamp: u64,
    /// How far it has come in the rotation.
    pub pass: u128,
    indexed: Indexed,
}

/// How an endpoint tells that it drains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Says {
    /// By the answer to its check: `health.draining_status`, or the field there.
    ByHealth,
    /// An answer of it carried `longhaul-drain: 1`.
    ByAnswer,
}

/// Exchanges are cut one after another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cutting {
    pub since: Instant,
    pub over: Duration,
}

impl Cutting {
    /// The part of them that is cut by now, from 0 to 1.
    pub fn share(&self, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.since);
        if passed >= self.over { 1.0 } else { passed.as_secs_f64() / self.over.as_secs_f64() }
    }
}

/// What active checks say.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Health {
    pub standing: HealthStanding,
    /// Answers in a row that speak against the standing.
    pub against: u32,
    /// It was healthy at least once.
    pub proven: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum HealthStanding {
    /// Nobody has asked yet, or there is no check.
    #[default]
    Unknown,
    Healthy,
    Unhealthy,
}

impl Health {
    /// Takes one answer. The very first success suffices; from then on it takes several in a row to turn.
    pub fn answer(&mut self, healthy: bool, unhealthy_after: u32, healthy_after: u32) {
        use HealthStanding::{Healthy, Unhealthy, Unknown};
        let turns = match (self.standing, healthy) {
            (Healthy, true) | (Unhealthy, false) => {
                self.against = 0;
                return;
            }
            (Unknown, _) => true,
            (Healthy, false) => self.against + 1 >= unhealthy_after,
            (Unhealthy, true) => !self.proven || self.against + 1 >= healthy_after,
        };
        if turns {
            self.standing = if healthy { Healthy } else { Unhealthy };
            self.proven |= healthy;
            self.against = 0;
        } else {
            self.against += 1;
        }
    }
}

/// Where a version's indices have an endpoint.
#[derive(Clone, Copy, Debug, Default)]
enum Indexed {
    #[default]
    Nowhere,
    ByLoad(ByLoad),
    Ramping,
}

/// An endpoint in the order in which starts take them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ByLoad {
    score: Score,
    stamp: u64,
    pub endpoint: u32,
}

/// What a version was given by weight: what a `match` sent is not in it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Dealing {
    /// Since the version is known.
    pub total: Dealt,
    /// What that was when the weights changed last.
    pub before: Dealt,
}

/// One version of the service.
pub(crate) struct Version {
    pub name: Arc<str>,
    /// [`crate::balance::version_hash`] of the name.
    pub hash: u64,
    /// As configured.
    pub weight: u32,
    /// What new sessions are dealt by, in [`crate::rollout::WEIGHT_UNIT`]s: a rollout shares out what its versions have.
    pub effective_weight: u64,
    pub dealt: Dealing,
    /// The newest configuration names it.
    pub configured: bool,
    /// One of its sources has not answered yet.
    pub awaited: bool,
    /// In the order of the configuration, then as they were found; removed ones after.
    pub endpoints: Vec<u32>,
    /// Ready endpoints with a free slot, least loaded first, that of the oldest [`Endpoint::stamp`] first among equals.
    by_load: Ordered<ByLoad>,
    /// Those with a free slot that are in slow start: their weight changes with time, so they are compared at each pick.
    ramping: Vec<u32>,
    /// Ready endpoints, full or not, in the order of their next turn.
    rotation: Ordered<(u128, u32)>,
    /// Where the rotation is; endpoints that join begin here.
    pass: u128,
    pub ejected: u32,
}

impl Endpoint {
    pub fn new(identity: &str, target: Arc<Target>, version: usize) -> Endpoint {
        Endpoint {
            identity: identity.into(),
            hash: crate::balance::endpoint_hash(identity),
            target,
            version,
            weight: 1,
            max_runs: None,
            outstanding: 0,
            open: 0,
            credit: 0,
            sessions: 0,
            reported: None,
            configured: true,
            found: None,
            awaited: false,
            lost: false,
            drained: false,
            says: None,
            gone: false,
            drain_deadline: None,
            cutting: None,
            health: Health::default(),
            failures: 0,
            ejected_until: None,
            ready: false,
            original: false,
            ramp: None,
            stamp: 0,
            pass: 0,
            indexed: Indexed::Nowhere,
        }
    }

    pub fn has_slot(&self) -> bool {
        self.max_runs.is_none_or(|max| self.outstanding < max)
    }

    /// Runs that it has, by our own count or by what it says: never the sum, which would count ours twice.
    pub fn load(&self) -> u32 {
        self.outstanding.max(self.reported.map_or(0, |(runs, _)| runs))
    }

    pub fn draining(&self) -> bool {
        self.drained || self.says.is_some() || !self.configured || self.found.as_ref().is_some_and(Found::drains)
    }

    /// Its source has nothing against its work.
    pub fn serves(&self) -> bool {
        !self.lost && self.found.as_ref().is_none_or(Found::serves)
    }

    /// Why it drains; none where it does not.
    pub fn drain_reasons(&self) -> Vec<&'static str> {
        let says = self.says.map(|says| match says {
            Says::ByHealth => "health",
            Says::ByAnswer => "answer",
        });
        let found = self.configured && self.found.as_ref().is_some_and(Found::drains);
        let removed = (!self.configured).then_some("removed");
        let reasons = [self.drained.then_some("operator"), removed, says, found.then_some("source")];
        reasons.into_iter().flatten().collect()
    }

    /// There is no reason to drain any more: nothing is cut, nor goes on being cut.
    pub fn end_drain(&mut self) {
        self.drain_deadline = None;
        self.cutting = None;
    }

    /// Nothing of the proxy's is there any more.
    pub fn idle(&self) -> bool {
        self.outstanding == 0 && self.open == 0
    }

    fn score(&self, share: u64) -> Score {
        Score {
            load: u64::from(self.load()) + u64::from(self.credit) + 1,
            weight: u64::from(self.weight.max(1)) * share,
        }
    }

    /// Among its equals the one picked longest ago is next, and no lot is drawn: it has no run of ours, or says that it has
    /// more than ours, so that another of ours doesn't change its load.
    fn takes_turns(&self) -> bool {
        self.outstanding == 0 || self.load() > self.outstanding
    }

    /// The share of its weight that counts now, in thousandths.
    fn share(&self, slow_start: Duration, now: Instant) -> u64 {
        let Some(since) = self.ramp else { return FULL_WEIGHT };
        let elapsed = now.saturating_duration_since(since).as_millis();
        let whole = slow_start.as_millis();
        if elapsed >= whole {
            return FULL_WEIGHT;
        }
        SLOW_WEIGHT + ((u128::from(FULL_WEIGHT - SLOW_WEIGHT) * elapsed) / whole) as u64
    }
}

impl Version {
    pub fn new(name: Arc<str>) -> Version {
        Version {
            hash: crate::balance::version_hash(&name),
            name,
            weight: 0,
            effective_weight: 0,
            dealt: Dealing::default(),
            configured: false,
            awaited: false,
            endpoints: Vec::new(),
            by_load: Ordered::default(),
            ramping: Vec::new(),
            rotation: Ordered::default(),
            pass: 0,
            ejected: 0,
        }
    }

    /// Ready endpoints.
    pub fn ready(&self) -> usize {
        self.rotation.len()
    }

    /// A ready endpoint has a free slot.
    pub fn has_slot(&self) -> bool {
        !self.by_load.is_empty() || !self.ramping.is_empty()
    }

    /// The endpoint for a run, by the service's policy, none of `tried`.
    pub fn choose(&self, endpoints: &Endpoints, choice: &Choice<'_>) -> Option<u32> {
        match choice.balance {
            config::Balance::LeastOutstandingRuns => self.least_loaded(endpoints, choice),
            config::Balance::RoundRobin => self
                .rotation
                .iter()
                .map(|(_, endpoint)| *endpoint)
                .find(|endpoint| endpoints[*endpoint].has_slot() && !choice.tried.contains(endpoint)),
            config::Balance::Random => self.draw(endpoints, choice),
        }
    }

    /// The endpoint whose turn it is, full or not.
    pub fn next_in_rotation(&self, tried: &[u32]) -> Option<u32> {
        self.rotation.iter().map(|(_, endpoint)| *endpoint).find(|endpoint| !tried.contains(endpoint))
    }

    fn least_loaded(&self, endpoints: &Endpoints, choice: &Choice<'_>) -> Option<u32> {
        let steady = self.least_of_steady(endpoints, choice);
        let ramping = self.ramping.iter().filter(|endpoint| !choice.tried.contains(endpoint)).map(|endpoint| {
            let live = &endpoints[*endpoint];
            let score = live.score(live.share(choice.slow_start, choice.now));
            ByLoad { score, stamp: live.stamp, endpoint: *endpoint }
        });
        steady.into_iter().chain(ramping).min().map(|entry| entry.endpoint)
    }

    /// Busy equals are drawn among. The one picked longest ago has the oldest runs, and where most runs are short the oldest
    /// last longest yet: always taking that one spreads runs less evenly than a lot does.
    fn least_of_steady(&self, endpoints: &Endpoints, choice: &Choice<'_>) -> Option<ByLoad> {
        let mut entries = self.by_load.iter().filter(|entry| !choice.tried.contains(&entry.endpoint));
        let first = *entries.next()?;
        if endpoints[first.endpoint].takes_turns() {
            return Some(first);
        }
        let mut tied = [first; TIED_MAX];
        let mut count = 1;
        for (place, entry) in tied[1..].iter_mut().zip(entries.take_while(|entry| entry.score == first.score)) {
            *place = *entry;
            count += 1;
        }
        Some(tied[below(count, choice.rng) as usize])
    }

    fn draw(&self, endpoints: &Endpoints, choice: &Choice<'_>) -> Option<u32> {
        let free = || {
            let free = |number: &&u32| {
                endpoints[**number].ready && endpoints[**number].has_slot() && !choice.tried.contains(number)
            };
            self.endpoints.iter().filter(free).map(|number| {
                let endpoint = &endpoints[*number];
                (*number, u64::from(endpoint.weight.max(1)) * endpoint.share(choice.slow_start, choice.now))
            })
        };
        let total: u64 = free().map(|(_, weight)| weight).sum();
        let mut point = below(total, choice.rng);
        for (endpoint, weight) in free() {
            if point < weight {
                return Some(endpoint);
            }
            point -= weight;
        }
        None
    }

    /// Moves an endpoint to the back of the rotation, by its weight.
    pub fn turn(&mut self, number: u32, endpoint: &mut Endpoint, slow_start: Duration, now: Instant) {
        if self.rotation.remove(&(endpoint.pass, number)) {
            self.pass = self.pass.max(endpoint.pass);
            let weight = u64::from(endpoint.weight.max(1)) * endpoint.share(slow_start, now);
            endpoint.pass += STRIDE * u128::from(FULL_WEIGHT) / u128::from(weight);
            self.rotation.insert((endpoint.pass, number));
        }
    }

    /// Takes an endpoint into the rotation or out of it, as its readiness is.
    pub fn place_in_rotation(&mut self, number: u32, endpoint: &mut Endpoint) {
        self.rotation.remove(&(endpoint.pass, number));
        if endpoint.ready {
            endpoint.pass = endpoint.pass.max(self.pass);
            self.rotation.insert((endpoint.pass, number));
        }
    }

    /// Brings the order by load up to date with one endpoint. To be called after every change of it.
    pub fn index(&mut self, number: u32, endpoint: &mut Endpoint) {
        let wanted = if !endpoint.ready || !endpoint.has_slot() {
            Indexed::Nowhere
        } else if endpoint.ramp.is_some() {
            Indexed::Ramping
        } else {
            Indexed::ByLoad(ByLoad { score: endpoint.score(FULL_WEIGHT), stamp: endpoint.stamp, endpoint: number })
        };
        match (&endpoint.indexed, &wanted) {
            (Indexed::Nowhere, Indexed::Nowhere) | (Indexed::Ramping, Indexed::Ramping) => return,
            // Nothing of its place has changed, as after an exchange that was no run.
            (Indexed::ByLoad(entry), Indexed::ByLoad(wanted)) if entry == wanted => return,
            (Indexed::ByLoad(entry), _) => {
                self.by_load.remove(entry);
            }
            (Indexed::Ramping, _) => self.ramping.retain(|other| *other != number),
            (Indexed::Nowhere, _) => {}
        }
        match wanted {
            Indexed::ByLoad(entry) => {
                self.by_load.insert(entry);
            }
            Indexed::Ramping => self.ramping.push(number),
            Indexed::Nowhere => {}
        }
        endpoint.indexed = wanted;
    }

    /// Endpoints in slow start.
    pub fn ramping(&self) -> &[u32] {
        &self.ramping
    }

    /// Forgets every order, before all endpoints are put in again.
    pub fn clear(&mut self) {
        self.awaited = false;
        self.endpoints.clear();
        self.by_load.clear();
        self.ramping.clear();
        self.rotation.clear();
        self.ejected = 0;
    }
}

/// A number below `end`, all equally likely where `random` is: the high half of the product, without a division.
fn below(end: u64, random: u64) -> u64 {
    ((u128::from(random) * u128::from(end)) >> 64) as u64
}

/// How an endpoint for a run is chosen.
pub(crate) struct Choice<'a> {
    pub balance: config::Balance,
    pub slow_start: Duration,
    pub tried: &'a [u32],
    pub now: Instant,
    pub rng: u64,
}

/// The endpoints of a service under numbers that stay.
#[derive(Default)]
pub(crate) struct Endpoints {
    slots: Vec<Option<Endpoint>>,
    free: Vec<u32>,
}

impl Endpoints {
    pub fn insert(&mut self, endpoint: Endpoint) -> u32 {
        match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = Some(endpoint);
                number
            }
            None => {
                self.slots.push(Some(endpoint));
                (self.slots.len() - 1) as u32
            }
        }
    }

    /// Only for what neither a lease nor a run nor a session refers to.
    pub fn remove(&mut self, number: u32) -> Option<Endpoint> {
        let endpoint = self.slots[number as usize].take()?;
        self.free.push(number);
        Some(endpoint)
    }

    pub fn contains(&self, number: u32) -> bool {
        self.slots.get(number as usize).is_some_and(Option::is_some)
    }

    pub fn numbers(&self) -> Vec<u32> {
        (0..self.slots.len() as u32).filter(|number| self.slots[*number as usize].is_some()).collect()
    }

    /// Forgets where the indices had an endpoint, because they were cleared.
    pub fn forget_index(&mut self, number: u32) {
        self[number].indexed = Indexed::Nowhere;
    }
}

impl std::ops::Index<u32> for Endpoints {
    type Output = Endpoint;

    fn index(&self, number: u32) -> &Endpoint {
        self.slots[number as usize].as_ref().expect("whoever has an endpoint's number keeps it alive")
    }
}

impl std::ops::IndexMut<u32> for Endpoints {
    fn index_mut(&mut self, number: u32) -> &mut Endpoint {
        self.slots[number as usize].as_mut().expect("whoever has an endpoint's number keeps it alive")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_success_suffices_and_later_turns_take_several() {
        let mut health = Health::default();
        health.answer(false, 3, 2);
        assert_eq!(health.standing, HealthStanding::Unhealthy);
        health.answer(true, 3, 2);
        assert_eq!(health.standing, HealthStanding::Healthy);
        for healthy in [false, false, true, false, false] {
            health.answer(healthy, 3, 2);
            assert_eq!(health.standing, HealthStanding::Healthy);
        }
        health.answer(false, 3, 2);
        assert_eq!(health.standing, HealthStanding::Unhealthy);
        health.answer(true, 3, 2);
        assert_eq!(health.standing, HealthStanding::Unhealthy);
        health.answer(true, 3, 2);
        assert_eq!(health.standing, HealthStanding::Healthy);
    }
}
