//! Waiting: the core with its queue and its turns, driven without sockets and with time as an argument, against a model
//! that looks at everybody.

#[expect(dead_code, reason = "only the dispatcher has metrics")]
#[path = "support/placement.rs"]
mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use longhaul::balance::{self, Candidate};
use longhaul::config::{Policy, WhenDraining};
use longhaul::ids::{self, RunId};
use longhaul::state::core::{Arrived, Core, Finish, Grant};
use longhaul::state::dispatcher::Ask;
use longhaul::state::queue::{Class, Ticket};
use longhaul::state::sessions::SessionKey;
use longhaul::state::status::{EndpointState, ServiceStatus};
use longhaul::state::{Kind, Refusal, RunOutcome};
use proptest::prelude::*;
use support::{Fleet, Place, key};

#[derive(Clone, Debug)]
enum Step {
    Arrive {
        session: Option<u8>,
        class: u8,
        principal: u8,
        starts: bool,
    },
    Leave(usize),
    /// A run or exchange ends, its answer having been a success or not.
    Free(usize, bool),
    Retry(usize),
    Reload(usize),
    Drain(u16, bool),
    Health(u16, bool),
    Forget,
    Pass(u64),
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (proptest::option::of(0..8_u8), 0..3_u8, 0..3_u8, proptest::bool::weighted(0.9)).prop_map(
            |(session, class, principal, starts)| Step::Arrive { session, class, principal, starts }
        ),
        3 => (0..40_usize).prop_map(Step::Leave),
        9 => (0..40_usize, proptest::bool::weighted(0.8)).prop_map(|(which, good)| Step::Free(which, good)),
        1 => (0..40_usize).prop_map(Step::Retry),
        1 => (0..4_usize).prop_map(Step::Reload),
        1 => (1..6_u16, any::<bool>()).prop_map(|(port, drain)| Step::Drain(port, drain)),
        2 => (1..6_u16, proptest::bool::weighted(0.7)).prop_map(|(port, healthy)| Step::Health(port, healthy)),
        1 => Just(Step::Forget),
        1 => (1..3_000_u64).prop_map(Step::Pass),
    ]
}

fn fleets(stay: bool) -> Vec<Fleet> {
    let limited = |port, max| Place { port, weight: 1, max_runs: Some(max) };
    let base = || {
        Fleet::new().with(|config| {
            config.runs.queue.max = 12;
            config.runs.max_per_endpoint = Some(1);
            config.runs.queue.timeout = Duration::from_secs(5);
            config.health.path = Some("/".to_owned());
            (config.health.unhealthy_after, config.health.healthy_after) = (1, 1);
            if stay {
                config.session.when_draining = WhenDraining::Stay;
            }
        })
    };
    vec![
        base().version("a", 1, [limited(1, 2), limited(2, 1)]),
        base().version("a", 1, [limited(1, 1), limited(3, 2)]).version("b", 1, [limited(4, 1)]),
        base().version("b", 3, [limited(4, 2), limited(2, 1)]).version("c", 0, [limited(5, 1)]),
        base().version("a", 1, []).with(|config| config.runs.queue.max = 3),
    ]
}

/// Knows that it was woken.
#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Waiting {
    ticket: Ticket,
    key: Option<SessionKey>,
    /// Class and principal.
    flow: (u8, u8),
    starts: bool,
    flag: Arc<Flag>,
}

struct World {
    core: Core,
    now: Instant,
    fleet: Fleet,
    waiting: Vec<Waiting>,
    held: Vec<Grant>,
    /// Tickets of each session, and of each flow without one, in the order in which they were given something.
    served: BTreeMap<String, Vec<Ticket>>,
}

impl World {
    fn new(fleet: Fleet) -> World {
        let mut world = World {
            core: Core::new(support::SERVICE),
            now: ids::now(),
            fleet,
            waiting: Vec::new(),
            held: Vec::new(),
            served: BTreeMap::new(),
        };
        world.core.apply(world.fleet.settings(), world.now);
        world.settle();
        world
    }

    /// As the dispatcher does before it releases the lock, and after.
    fn settle(&mut self) {
        for waker in self.core.settle_up() {
            waker.wake();
        }
        let mut index = 0;
        while let Some(waiting) = self.waiting.get(index) {
            let woken = waiting.flag.0.swap(false, Ordering::Relaxed);
            let given = self.core.look(waiting.ticket, &Waker::from(waiting.flag.clone()));
            assert_eq!(given.is_some(), woken, "whoever is given something is woken, and nobody else");
            let Some(given) = given else {
                index += 1;
                continue;
            };
            let waiting = self.waiting.remove(index);
            match given {
                Ok(grant) => {
                    let name = match &waiting.key {
                        Some(key) => key.text.to_string(),
                        None => format!("{:?}", waiting.flow),
                    };
                    if waiting.starts {
                        self.served.entry(name).or_default().push(waiting.ticket);
                    }
                    self.held.push(grant);
                }
                Err(refusal) => assert_eq!(refusal, Refusal::QueueTimeout),
            }
        }
    }

    fn arrive(&mut self, session: Option<u8>, flow: (u8, u8), starts: bool) {
        let key = session.map(|session| key(&format!("s{session}")));
        let kind = if starts { Kind::Start } else { Kind::Other };
        // Of one session all have one flow, as they would stand in the first one's anyway.
        let flow = if session.is_some() { (3, 0) } else { flow };
        let class = Class::of_header(Some(flow.0.to_string().as_bytes()));
        let principal = (flow.1 > 0).then_some([flow.1; 16]);
        let ask = Ask { class, principal, ..Ask::new(kind, key.as_ref()) };
        match self.core.arrive(&ask, starts.then(RunId::generate), &mut Vec::new(), self.now, 0) {
            Arrived::Placed(grant) => self.held.push(grant),
            Arrived::Waiting(ticket) => {
                let flag = Arc::<Flag>::default();
                let given = self.core.look(ticket, &Waker::from(flag.clone()));
                assert!(given.is_none(), "a waiter is given something only later");
                self.waiting.push(Waiting { ticket, key, flow, starts, flag });
            }
            Arrived::Refused(refusal) => {
                assert!(matches!(refusal, Refusal::QueueFull | Refusal::PinnedFull | Refusal::NoEndpoint));
                assert!(self.waiting.len() >= self.fleet.config.runs.queue.max as usize, "there was a place");
            }
        }
    }

    fn step(&mut self, step: &Step, fleets: &[Fleet]) {
        match step {
            Step::Arrive { session, class, principal, starts } => self.arrive(*session, (*class, *principal), *starts),
            Step::Leave(which) if !self.waiting.is_empty() => {
                let waiting = self.waiting.remove(which % self.waiting.len());
                self.core.leave(waiting.ticket, self.now);
            }
            Step::Free(which, good) if !self.held.is_empty() => {
                let grant = self.held.remove(which % self.held.len());
                if *good {
                    self.core.confirm(&grant, self.now);
                }
                self.core.finish(grant, Finish::Ended(RunOutcome::Completed), self.now);
            }
            Step::Retry(which) if !self.held.is_empty() => {
                let which = which % self.held.len();
                let _ = self.core.retry(&mut self.held[which], self.now, 0);
            }
            Step::Reload(which) => {
                self.fleet = fleets[*which].clone();
                self.core.apply(self.fleet.settings(), self.now);
            }
            Step::Drain(port, drain) => {
                self.core.set_drained(&support::url(*port).address(), *drain, self.now);
            }
            Step::Health(port, healthy) => {
                self.core.probe_result(&support::url(*port).identity(), *healthy, self.now);
            }
            Step::Forget => {
                self.core.forget_sessions(None, 0, u32::MAX, self.now);
            }
            Step::Pass(time) => {
                self.now += Duration::from_millis(*time);
                self.core.tick(self.now);
                self.core.due_runs(10, &mut Vec::new(), self.now);
            }
            Step::Leave(_) | Step::Free(..) | Step::Retry(_) => {}
        }
    }

    fn outstanding(status: &ServiceStatus) -> BTreeMap<String, (u32, Option<u32>)> {
        let endpoints = status.versions.iter().flat_map(|version| &version.endpoints);
        endpoints.map(|one| (one.address.clone(), (one.outstanding_runs, one.max_runs))).collect()
    }

    fn check(&mut self, before: &BTreeMap<String, (u32, Option<u32>)>) {
        let status = self.core.status(self.now);
        let runs = self.held.iter().filter(|grant| grant.run_id().is_some()).count();
        assert_eq!(status.outstanding_runs, runs as u64);
        assert_eq!(status.queue.length, self.waiting.len() as u64);
        for (address, (outstanding, max)) in World::outstanding(&status) {
            let had = before.get(&address).map_or(0, |(had, _)| *had);
            let max = max.expect("every endpoint has a limit");
            assert!(outstanding <= max || outstanding <= had, "{address} has {outstanding} of {max}, and had {had}");
        }
        self.check_idle_slots(&status);
    }

    /// No slot is free that somebody who waits may use.
    fn check_idle_slots(&mut self, status: &ServiceStatus) {
        let free = |version: &str| {
            let version = status.versions.iter().find(|known| known.name == *version);
            version.into_iter().flat_map(|version| &version.endpoints).any(|one| {
                one.state == EndpointState::Ready && one.max_runs.is_none_or(|max| one.outstanding_runs < max)
            })
        };
        let ready = |name: &str| {
            let version = status.versions.iter().find(|known| known.name == *name);
            version.is_some_and(|version| version.endpoints.iter().any(|one| one.state == EndpointState::Ready))
        };
        let open = || self.fleet.config.versions.iter().filter(|version| version.weight > 0 && ready(&version.name));
        let pins = {
            let mut pins = Vec::new();
            self.core.scan_sessions(None, 0, u32::MAX, usize::MAX, &mut pins, self.now);
            pins
        };
        for waiting in &self.waiting {
            let pin = waiting.key.as_ref().and_then(|key| pins.iter().find(|pin| *pin.key == *key.text));
            let idle = match (&waiting.key, pin) {
                _ if !waiting.starts => open().next().is_some() && pin.is_none(),
                (_, Some(pin)) => {
                    let endpoints = status.versions.iter().flat_map(|version| &version.endpoints);
                    let mut here = endpoints.filter(|one| one.address == pin.endpoint);
                    here.any(|one| {
                        one.state == EndpointState::Ready && one.max_runs.is_some_and(|max| one.outstanding_runs < max)
                    })
                }
                (None, None) => open().any(|version| free(&version.name)),
                (Some(key), None) => {
                    let versions: Vec<_> = open().collect();
                    let candidates = versions.iter().zip(0..).map(|(version, index)| Candidate {
                        index,
                        hash: balance::version_hash(&version.name),
                        name: &version.name,
                        weight: u64::from(version.weight),
                    });
                    let cohort = balance::rendezvous(balance::cohort(&key.text), candidates);
                    cohort.is_some_and(|index| free(&versions[index as usize].name))
                }
            };
            assert!(!idle, "{:?} of {:?} waits beside what it may use: {status:?}", waiting.key, waiting.flow);
        }
    }

    /// Everybody leaves or ends, and nothing is left of anybody.
    fn end(mut self) {
        while !self.waiting.is_empty() || !self.held.is_empty() {
            self.step(&Step::Leave(0), &[]);
            self.settle();
            self.step(&Step::Free(0, false), &[]);
            self.settle();
        }
        for served in self.served.values() {
            assert!(served.is_sorted(), "of one session, or one principal in one class, the first goes first");
        }
        let status = self.core.status(self.now);
        assert_eq!((status.outstanding_runs, status.queue.length, status.placeable_demand), (0, 0, 0));
        // Every slot can be had again.
        let capacity = status.capacity.expect("every endpoint has a limit");
        for _ in 0..capacity + 2 {
            self.arrive(None, (3, 0), true);
            self.settle();
        }
        let open = |name: &String| self.fleet.config.versions.iter().any(|one| one.name == *name && one.weight > 0);
        let usable =
            status.versions.iter().filter(|version| open(&version.name)).filter_map(|version| version.capacity);
        assert_eq!(self.held.len() as u64, usable.sum::<u64>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn slots_go_to_whoever_waits_and_none_is_lost(
        steps in proptest::collection::vec(steps(), 1..160),
        stay: bool,
    ) {
        let fleets = fleets(stay);
        let mut world = World::new(fleets[0].clone());
        for port in [1, 2] {
            world.step(&Step::Health(port, true), &fleets);
            world.settle();
        }
        for step in &steps {
            let before = World::outstanding(&world.core.status(world.now));
            world.step(step, &fleets);
            world.settle();
            world.check(&before);
        }
        world.end();
    }
}

/// A service of one endpoint with so many slots and a queue.
fn one_endpoint(slots: u32, policy: Policy) -> World {
    let place = Place { port: 1, weight: 1, max_runs: Some(slots) };
    World::new(Fleet::new().version("a", 1, [place]).with(|config| {
        config.runs.queue.max = 100;
        config.runs.double_texting.policy = policy;
    }))
}

impl World {
    fn start(&mut self, session: &str, policy: Policy) -> (RunId, Arrived) {
        let (key, run) = (key(session), RunId::generate());
        let ask = Ask { policy, ..Ask::new(Kind::Start, Some(&key)) };
        let arrived = self.core.arrive(&ask, Some(run), &mut Vec::new(), self.now, 0);
        (run, arrived)
    }

    fn start_waits(&mut self, session: &str, policy: Policy) -> Ticket {
        match self.start(session, policy).1 {
            Arrived::Waiting(ticket) => ticket,
            Arrived::Placed(_) => panic!("it was placed"),
            Arrived::Refused(refusal) => panic!("it was refused: {refusal:?}"),
        }
    }

    fn start_goes(&mut self, session: &str, policy: Policy) -> Grant {
        match self.start(session, policy).1 {
            Arrived::Placed(grant) => grant,
            Arrived::Waiting(_) => panic!("it waits"),
            Arrived::Refused(refusal) => panic!("it was refused: {refusal:?}"),
        }
    }

    fn given(&mut self, ticket: Ticket) -> Option<Result<Grant, Refusal>> {
        self.core.settle_up();
        self.core.look(ticket, Waker::noop())
    }

    fn finish(&mut self, grant: Grant) {
        self.core.finish(grant, Finish::Ended(RunOutcome::Completed), self.now);
    }
}

#[test]
fn a_second_start_goes_when_the_first_has_ended_and_not_before_older_ones_of_others() {
    let mut world = one_endpoint(1, Policy::Enqueue);
    let first = world.start_goes("a", Policy::Enqueue);
    let second = world.start_waits("a", Policy::Enqueue);
    let other = world.start_waits("b", Policy::Enqueue);
    let third = world.start_waits("a", Policy::Enqueue);
    world.finish(first);
    let second = world.given(second).expect("its turn").expect("a slot");
    assert!(world.given(other).is_none() && world.given(third).is_none());
    world.finish(second);
    let other = world.given(other).expect("it came before the third").expect("a slot");
    assert!(world.given(third).is_none());
    world.finish(other);
    assert!(matches!(world.given(third), Some(Ok(_))));
}

#[test]
fn a_rejected_start_is_told_the_run_that_is_there() {
    let mut world = one_endpoint(2, Policy::Reject);
    let first = world.start_goes("a", Policy::Reject);
    let (_, second) = world.start("a", Policy::Reject);
    let busy = first.run_id().map(Refusal::Busy);
    assert!(matches!(second, Arrived::Refused(refusal) if Some(refusal) == busy));
    world.finish(first);
    world.start_goes("a", Policy::Reject);
}

#[test]
fn an_interrupting_start_waits_until_what_carries_the_other_is_closed() {
    let mut world = one_endpoint(1, Policy::Interrupt);
    let first = world.start_goes("a", Policy::Interrupt);
    let stop = world.core.stop(&first).expect("a run");
    let queued = world.start_waits("b", Policy::Interrupt);
    let second = world.start_waits("a", Policy::Interrupt);
    assert_eq!(stop.outcome(), Some(RunOutcome::Interrupted), "what carries it is told");
    assert!(world.given(second).is_none(), "it has not been closed yet");
    assert!(world.given(queued).is_none());
    let ended = world.core.finish(first, Finish::Left, world.now).expect("it ends with what carried it");
    assert_eq!(ended.outcome, RunOutcome::Interrupted);
    let queued = world.given(queued).expect("it came first").expect("a slot");
    world.finish(queued);
    assert!(matches!(world.given(second), Some(Ok(_))));
}

#[test]
fn the_newest_of_many_interrupting_starts_is_the_one_that_goes() {
    let mut world = one_endpoint(1, Policy::Interrupt);
    let first = world.start_goes("a", Policy::Interrupt);
    let second = world.start_waits("a", Policy::Interrupt);
    let (third_run, third) = world.start("a", Policy::Interrupt);
    let Arrived::Waiting(third) = third else { panic!("the first is there") };
    assert!(matches!(world.given(second), Some(Err(Refusal::Busy(run))) if run == third_run));
    world.core.finish(first, Finish::Left, world.now);
    assert!(matches!(world.given(third), Some(Ok(_))));
}

#[test]
fn an_interrupting_start_waits_for_ten_seconds_at_most() {
    let mut world = one_endpoint(2, Policy::Interrupt);
    let _first = world.start_goes("a", Policy::Interrupt);
    let second = world.start_waits("a", Policy::Interrupt);
    for (seconds, goes) in [(9, false), (2, true)] {
        world.now += Duration::from_secs(seconds);
        world.core.due_runs(10, &mut Vec::new(), world.now);
        assert_eq!(world.given(second).is_some(), goes);
    }
}

#[test]
fn turns_begin_with_the_runs_that_are_there_when_a_reload_asks_for_them() {
    let mut world = one_endpoint(2, Policy::Allow);
    let first = world.start_goes("a", Policy::Allow);
    world.fleet.config.runs.double_texting.policy = Policy::Reject;
    world.core.apply(world.fleet.settings(), world.now);
    let (_, second) = world.start("a", Policy::Reject);
    assert!(matches!(second, Arrived::Refused(Refusal::Busy(run)) if Some(run) == first.run_id()));
}

#[test]
fn a_principal_has_so_many_runs_and_waiting_starts_together() {
    let mut world = one_endpoint(1, Policy::Allow);
    world.fleet.config.runs.max_per_principal = Some(2);
    world.core.apply(world.fleet.settings(), world.now);
    let start = |world: &mut World, principal| {
        let ask = Ask { principal, ..Ask::new(Kind::Start, None) };
        world.core.arrive(&ask, Some(RunId::generate()), &mut Vec::new(), world.now, 0)
    };
    let Arrived::Placed(first) = start(&mut world, Some([1; 16])) else { panic!("there is a slot") };
    let Arrived::Waiting(second) = start(&mut world, Some([1; 16])) else { panic!("there is a place") };
    assert!(matches!(start(&mut world, Some([1; 16])), Arrived::Refused(Refusal::PrincipalLimit)));
    assert!(matches!(start(&mut world, Some([2; 16])), Arrived::Waiting(_)), "another one");
    for _ in 0..5 {
        assert!(matches!(start(&mut world, None), Arrived::Waiting(_)), "those that are not told apart have no limit");
    }
    world.finish(first);
    let second = world.given(second).expect("it is the first").expect("a slot");
    assert!(matches!(start(&mut world, Some([1; 16])), Arrived::Waiting(_)));
    world.finish(second);
    world.core.settle_up();
    assert!(
        matches!(start(&mut world, Some([1; 16])), Arrived::Waiting(_)),
        "one waits or runs, and this is the second"
    );
    assert!(matches!(start(&mut world, Some([1; 16])), Arrived::Refused(Refusal::PrincipalLimit)));
}

/// A fresh endpoint without a limit takes a few of those who wait and leaves the others to its siblings, which come soon.
#[test]
fn the_queue_empties_onto_fresh_endpoints_at_a_pace() {
    let empty = Fleet::new().version("a", 1, []).with(|config| config.runs.queue.max = 200);
    let mut world = World::new(empty.clone());
    for _ in 0..200 {
        world.arrive(None, (3, 0), true);
    }
    world.fleet.config.versions.clear();
    world.fleet = world.fleet.clone().version("a", 1, [support::place(1), support::place(2)]);
    world.core.apply(world.fleet.settings(), world.now);
    world.settle();
    assert_eq!(world.held.len(), 20, "ten for each at once");
    world.arrive(None, (3, 0), true);
    assert_eq!(world.held.len(), 20, "nobody who comes later goes before them");
    for (milliseconds, so_many) in [(1_000, 40), (1_000, 80), (2_000, 201)] {
        world.now += Duration::from_millis(milliseconds);
        world.core.due_runs(10, &mut Vec::new(), world.now);
        world.settle();
        assert_eq!(world.held.len(), so_many);
    }
}

#[test]
fn without_a_ready_endpoint_everybody_waits_and_counts_as_demand() {
    let mut world = one_endpoint(1, Policy::Allow);
    world.core.set_drained(&support::url(1).address(), true, world.now);
    world.arrive(Some(1), (3, 0), false);
    world.arrive(None, (3, 0), true);
    let status = world.core.status(world.now);
    assert_eq!((status.queue.length, status.demand, status.placeable_demand), (2, 2, 2));
    assert!(world.core.ready_for_work(world.now), "there is a place to wait");
    world.core.set_drained(&support::url(1).address(), false, world.now);
    world.settle();
    assert_eq!(world.held.len(), 2);
}
