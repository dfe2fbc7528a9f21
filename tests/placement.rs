//! Placement: who gets a run, a session, a turn; driven without sockets and with time as an argument.

#[path = "support/placement.rs"]
mod support;

#[expect(dead_code, reason = "other tests need all of it")]
#[path = "support/random.rs"]
mod random;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul::balance;
use longhaul::config::{Affinity, Balance, WhenDraining, WhenLost};
use longhaul::ids::{self, RunId};
use longhaul::protocols;
use longhaul::state::core::{Core, Finish, Grant, Unplaced};
use longhaul::state::dispatcher::{Ask, Dispatcher, Picked, PinHint};
use longhaul::state::runs::About;
use longhaul::state::status::{CancelReport, Ending, EndpointState, EndpointStatus};
use longhaul::state::{AffinityOutcome, Evidence, Kind, Refusal, RunOutcome};
use proptest::prelude::*;
use random::Random;
use support::{Fleet, Place, key, place};

/// A core with a clock.
struct World {
    core: Core,
    now: Instant,
}

impl World {
    fn new(fleet: &Fleet) -> World {
        let mut world = World { core: Core::new(support::SERVICE), now: ids::now() };
        world.apply(fleet);
        world
    }

    fn apply(&mut self, fleet: &Fleet) {
        self.core.apply(fleet.settings(), self.now);
    }

    fn ask(&mut self, ask: Ask<'_>) -> Result<Grant, Unplaced> {
        let run = (ask.kind == Kind::Start).then(RunId::generate);
        self.core.pick(ask, run, self.now, 0)
    }

    fn start(&mut self, session: &str) -> Result<Grant, Unplaced> {
        self.ask(Ask::new(Kind::Start, Some(&key(session))))
    }

    fn other(&mut self, session: &str) -> Result<Grant, Unplaced> {
        self.ask(Ask::new(Kind::Other, Some(&key(session))))
    }

    fn keyless(&mut self, kind: Kind) -> Result<Grant, Unplaced> {
        self.ask(Ask::new(kind, None))
    }

    /// A start without a session that draws this number.
    fn drawn(&mut self, number: u64) -> Grant {
        let ask = Ask::new(Kind::Start, None);
        self.core.pick(ask, Some(RunId::generate()), self.now, number).expect("a place")
    }

    fn hinted(&mut self, session: &str, kind: Kind, port: u16) -> Result<Grant, Unplaced> {
        let hint = PinHint { version: "stable".into(), endpoint: support::url(port).identity() };
        self.ask(Ask { hint: Some(&hint), ..Ask::new(kind, Some(&key(session))) })
    }

    /// Starts a run of the session, has it answered with success, and ends it. Says where and how.
    fn serve(&mut self, session: &str) -> (u16, AffinityOutcome) {
        let grant = self.start(session).expect("a place");
        let place = (self.port(&grant), grant.affinity());
        self.succeed(grant);
        place
    }

    fn succeed(&mut self, grant: Grant) {
        self.core.confirm(&grant, self.now);
        self.finish(grant);
    }

    fn finish(&mut self, grant: Grant) {
        self.core.finish(grant, Finish::Ended(RunOutcome::Completed), self.now);
    }

    fn port(&self, grant: &Grant) -> u16 {
        port_of(&self.core.target(grant).address)
    }

    fn version(&self, grant: &Grant) -> String {
        self.core.target(grant).version.to_string()
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
    }

    fn endpoint(&mut self, port: u16) -> Option<EndpointStatus> {
        let status = self.core.status(self.now);
        let mut endpoints = status.versions.into_iter().flat_map(|version| version.endpoints);
        endpoints.find(|endpoint| port_of(&endpoint.address) == port)
    }

    fn outstanding(&mut self, port: u16) -> u32 {
        self.endpoint(port).map_or(0, |endpoint| endpoint.outstanding_runs)
    }

    fn sessions(&mut self) -> u64 {
        self.core.status(self.now).versions.iter().map(|version| version.sessions).sum()
    }

    fn fail(&mut self, port: u16, times: u32) {
        for _ in 0..times {
            let grant = self.hinted(&format!("fail-{port}"), Kind::Other, port).expect("a place");
            assert_eq!(self.port(&grant), port);
            self.core.report(&grant, Evidence::Bad, self.now);
            self.finish(grant);
        }
    }

    fn drain(&mut self, port: u16) {
        assert!(self.core.set_drained(&support::url(port).address(), true, self.now));
    }

    fn probe(&mut self, port: u16, healthy: bool) {
        self.core.probe_result(&support::url(port).identity(), healthy, self.now);
    }
}

fn port_of(address: &str) -> u16 {
    address.rsplit(':').next().and_then(|port| port.parse().ok()).expect("an address with a port")
}

fn fleet(ports: impl IntoIterator<Item = u16>) -> Fleet {
    Fleet::new().version("stable", 1, ports.into_iter().map(place))
}

// Runs without sessions.

#[test]
fn fifty_runs_lie_ten_on_each_of_five_endpoints() {
    let mut world = World::new(&fleet(1..=5));
    let grants: Vec<Grant> = (0..50).map(|_| world.keyless(Kind::Start).expect("a place")).collect();
    for port in 1..=5 {
        assert_eq!(world.outstanding(port), 10);
    }
    for grant in grants {
        world.finish(grant);
    }
    assert_eq!(world.core.status(world.now).outstanding_runs, 0);
}

#[test]
fn ties_rotate() {
    let mut world = World::new(&fleet(1..=3));
    let mut order = Vec::new();
    for _ in 0..6 {
        let grant = world.keyless(Kind::Start).expect("a place");
        order.push(world.port(&grant));
        world.finish(grant);
    }
    assert_eq!(order, [1, 2, 3, 1, 2, 3]);
}

/// Lengths of runs are mostly short and now and then long, so that where the oldest run is a run will last longest.
#[test]
fn ties_among_the_busy_do_not_go_to_those_with_the_oldest_runs() {
    const ENDPOINTS: usize = 10;
    /// What the shortest queue does with the same runs, if ties go in turn.
    struct InTurn {
        runs: [u32; ENDPOINTS],
        next: usize,
    }
    impl InTurn {
        fn pick(&mut self) -> usize {
            let order = (0..ENDPOINTS).map(|offset| (self.next + offset) % ENDPOINTS);
            let port = order.min_by_key(|&port| self.runs[port]).expect("there are some");
            self.runs[port] += 1;
            self.next = port + 1;
            port
        }
    }
    fn unit(random: &mut Random) -> f64 {
        random.below(1 << 53) as f64 / (1_u64 << 53) as f64
    }
    fn exponential(mean: f64, unit: f64) -> f64 {
        -mean * (1.0 - unit).ln()
    }
    fn deviation(runs: &[u32; ENDPOINTS]) -> f64 {
        let mean = f64::from(runs.iter().sum::<u32>()) / ENDPOINTS as f64;
        (runs.iter().map(|&runs| (f64::from(runs) - mean).powi(2)).sum::<f64>() / ENDPOINTS as f64).sqrt()
    }

    let mut world = World::new(&fleet(0..ENDPOINTS as u16));
    let mut random = Random(7);
    let mut ideal = InTurn { runs: [0; ENDPOINTS], next: 0 };
    let mut runs = [0; ENDPOINTS];
    let mut ends: BTreeMap<u64, (Grant, usize)> = BTreeMap::new();
    let (mut at, mut spread, mut ideal_spread) = (0, 0.0, 0.0);
    for _ in 0..30_000 {
        // In microseconds: 28 runs at a time, four fifths of them 0.1 s long on average and the others 1.5 s.
        let arrival = at + exponential(13_600.0, unit(&mut random)) as u64;
        let mean = if unit(&mut random) < 0.8 { 100_000.0 } else { 1_500_000.0 };
        let mut end = arrival + exponential(mean, unit(&mut random)) as u64;
        while let Some(first) = ends.first_entry().filter(|first| *first.key() <= arrival) {
            let (ended, (grant, ideal_port)) = first.remove_entry();
            let passed = (ended - at) as f64;
            spread += passed * deviation(&runs);
            ideal_spread += passed * deviation(&ideal.runs);
            at = ended;
            runs[world.port(&grant) as usize] -= 1;
            ideal.runs[ideal_port] -= 1;
            world.finish(grant);
        }
        let passed = (arrival - at) as f64;
        spread += passed * deviation(&runs);
        ideal_spread += passed * deviation(&ideal.runs);
        at = arrival;
        let grant = world.drawn(random.number());
        runs[world.port(&grant) as usize] += 1;
        while ends.contains_key(&end) {
            end += 1;
        }
        ends.insert(end, (grant, ideal.pick()));
    }
    let (spread, ideal_spread) = (spread / at as f64, ideal_spread / at as f64);
    assert!(spread <= ideal_spread, "{spread:.3} runs, and {ideal_spread:.3} with ties in turn");
}

#[test]
fn no_endpoint_is_favoured_for_long_where_all_stay_equally_busy() {
    let mut world = World::new(&fleet(0..3));
    let mut random = Random(7);
    let held: Vec<Grant> = (0..3).map(|_| world.keyless(Kind::Start).expect("a place")).collect();
    let mut counts = [0_u32; 3];
    let (mut streak, mut longest, mut last) = (0, 0, 0);
    for _ in 0..3_000 {
        let grant = world.drawn(random.number());
        let port = world.port(&grant);
        counts[usize::from(port)] += 1;
        streak = if port == last { streak + 1 } else { 1 };
        longest = longest.max(streak);
        last = port;
        world.finish(grant);
    }
    // By lot: 1,000 each with a deviation of 26, and a streak of about 8.
    assert!(counts.iter().all(|count| (850..1150).contains(count)) && longest < 20, "{counts:?}, {longest}");
    for grant in held {
        world.finish(grant);
    }
}

#[test]
fn what_is_no_run_and_brings_no_session_leaves_the_turns_of_starts_as_they_are() {
    let mut world = World::new(&fleet(0..3));
    let mut order = Vec::new();
    for reads in [0, 1, 0, 0, 2, 1] {
        for _ in 0..reads {
            let grant = world.keyless(Kind::Other).expect("a place");
            world.finish(grant);
        }
        let grant = world.keyless(Kind::Start).expect("a place");
        order.push(world.port(&grant));
        world.finish(grant);
    }
    assert_eq!(order, [0, 1, 2, 0, 1, 2]);
}

#[test]
fn where_endpoints_say_that_they_have_more_than_our_runs_these_go_in_turn() {
    let mut world = World::new(&fleet(0..3));
    for port in 0..3 {
        world.core.reported_load(&support::url(port).identity(), 6, Duration::from_secs(60), world.now);
    }
    let mut random = Random(7);
    let mut counts = [0; 3];
    for _ in 0..12 {
        let grant = world.drawn(random.number());
        counts[usize::from(world.port(&grant))] += 1;
    }
    assert_eq!(counts, [4; 3]);
}

#[test]
fn exchanges_that_are_no_runs_rotate_by_weight_and_weigh_nothing() {
    let places = [Place { weight: 3, ..place(1) }, place(2), Place { max_runs: Some(0), ..place(3) }];
    let mut world = World::new(&Fleet::new().version("stable", 1, places));
    let mut counts = BTreeMap::new();
    for _ in 0..500 {
        let grant = world.keyless(Kind::Other).expect("a place, full or not");
        *counts.entry(world.port(&grant)).or_insert(0) += 1;
    }
    assert_eq!(counts, BTreeMap::from([(1, 300), (2, 100), (3, 100)]));
    let run = world.keyless(Kind::Start).expect("a place");
    assert_eq!(world.port(&run), 1);
    assert_eq!(world.core.status(world.now).outstanding_runs, 1);
}

#[test]
fn full_is_told_from_empty() {
    let mut world = World::new(&Fleet::new().version("stable", 1, [Place { max_runs: Some(1), ..place(1) }]));
    let grant = world.keyless(Kind::Start).expect("a place");
    assert!(matches!(world.keyless(Kind::Start), Err(Unplaced::Full(_))));
    assert!(!world.core.ready_for_work(world.now));
    world.finish(grant);
    assert!(world.core.ready_for_work(world.now));
    world.drain(1);
    assert_eq!(world.keyless(Kind::Start).unwrap_err(), Unplaced::Empty);
    assert_eq!(world.keyless(Kind::Other).unwrap_err(), Unplaced::Empty);
    assert_eq!(world.start("a").unwrap_err(), Unplaced::Empty);
    assert_eq!(Unplaced::Empty.refusal(), Refusal::NoEndpoint);
}

#[test]
fn round_robin_and_random_go_by_weight_and_skip_the_full() {
    for balance in [Balance::RoundRobin, Balance::Random] {
        let places = [Place { weight: 3, ..place(1) }, place(2), Place { max_runs: Some(0), ..place(3) }];
        let fleet = Fleet::new().version("stable", 1, places).with(|config| config.balance = balance);
        let mut world = World::new(&fleet);
        let mut counts: BTreeMap<u16, u32> = BTreeMap::new();
        for n in 0..4_000_u64 {
            let ask = Ask::new(Kind::Start, None);
            // Evenly over all 64 bits.
            let rng = n.wrapping_mul(u64::MAX / 4_000);
            let grant = world.core.pick(ask, Some(RunId::generate()), world.now, rng).expect("a place");
            *counts.entry(world.port(&grant)).or_default() += 1;
            world.finish(grant);
        }
        assert_eq!(counts.get(&3), None);
        assert!(counts[&1].abs_diff(3_000) <= 1, "{balance:?} {counts:?}");
    }
}

#[test]
fn an_endpoint_that_joins_later_starts_slowly() {
    let slow =
        |ports: std::ops::RangeInclusive<u16>| fleet(ports).with(|config| config.slow_start = Duration::from_secs(10));
    let mut world = World::new(&slow(1..=2));
    for _ in 0..20 {
        world.keyless(Kind::Start).expect("a place");
    }
    assert_eq!((world.outstanding(1), world.outstanding(2)), (10, 10), "nobody is slow at the beginning");
    world.apply(&slow(1..=3));
    // At a tenth of its weight, one run weighs as ten.
    world.keyless(Kind::Start).expect("a place");
    assert_eq!(world.outstanding(3), 1);
    world.keyless(Kind::Start).expect("a place");
    assert_eq!(world.outstanding(3), 1);
    world.apply(&slow(1..=3).with(|config| config.attempts = 3));
    world.wait(Duration::from_secs(5));
    for _ in 0..6 {
        world.keyless(Kind::Start).expect("a place");
    }
    assert!((5..=7).contains(&world.outstanding(3)), "{} at 55 %", world.outstanding(3));
    world.wait(Duration::from_secs(5));
    for _ in 0..20 {
        world.keyless(Kind::Start).expect("a place");
    }
    assert_eq!(world.outstanding(3), 16, "all alike in the end");
}

// Sessions.

#[test]
fn a_session_stays_where_it_succeeded() {
    let mut world = World::new(&fleet(1..=3));
    let (home, outcome) = world.serve("a");
    assert_eq!(outcome, AffinityOutcome::New);
    for _ in 0..10 {
        world.keyless(Kind::Start).expect("a place");
        assert_eq!(world.serve("a"), (home, AffinityOutcome::Hit));
    }
    let other = world.other("a").expect("a place");
    assert_eq!((world.port(&other), other.affinity()), (home, AffinityOutcome::Hit));
    assert_eq!(world.sessions(), 1);
}

#[test]
fn concurrent_first_requests_go_to_one_endpoint() {
    let mut world = World::new(&fleet(1..=3));
    let first = world.start("a").expect("a place");
    let second = world.start("a").expect("a place");
    assert_eq!(world.port(&first), world.port(&second));
    assert_eq!((first.affinity(), second.affinity()), (AffinityOutcome::New, AffinityOutcome::Hit));
    // The pin holds until the last of them has failed.
    world.finish(first);
    assert_eq!(world.sessions(), 1);
    world.finish(second);
    assert_eq!(world.sessions(), 0);
}

#[test]
fn a_pin_that_no_success_confirmed_is_dropped() {
    let mut world = World::new(&fleet(1..=2));
    let grant = world.start("a").expect("a place");
    world.finish(grant);
    assert_eq!(world.sessions(), 0);
    let first = world.start("a").expect("a place");
    assert_eq!(first.affinity(), AffinityOutcome::New);
    let second = world.other("a").expect("a place");
    world.core.confirm(&second, world.now);
    world.finish(second);
    world.finish(first);
    assert_eq!(world.sessions(), 1, "one success of any of its exchanges is enough");
}

#[test]
fn a_placement_without_a_run_weighs_as_one_until_the_first_run_or_ten_seconds() {
    let mut world = World::new(&fleet(1..=2));
    let thread = world.other("a").expect("a place");
    let home = world.port(&thread);
    world.succeed(thread);
    let away = 3 - home;
    let start = |world: &mut World| {
        let grant = world.keyless(Kind::Start).expect("a place");
        let port = world.port(&grant);
        world.finish(grant);
        port
    };
    assert_eq!([start(&mut world), start(&mut world), start(&mut world)], [away; 3]);
    assert_eq!(world.core.status(world.now).outstanding_runs, 0, "it weighs for placement only");
    // Its first run takes the place of the credit, and gives it back at its end.
    assert_eq!(world.serve("a").0, home);
    let both = [start(&mut world), start(&mut world)];
    assert!(both.contains(&home), "{both:?}");

    let thread = world.other("b").expect("a place");
    let home = world.port(&thread);
    world.succeed(thread);
    world.wait(Duration::from_millis(9_999));
    assert_eq!([start(&mut world), start(&mut world)], [3 - home; 2]);
    world.wait(Duration::from_millis(1));
    let both = [start(&mut world), start(&mut world)];
    assert!(both.contains(&home), "{both:?}");
}

#[test]
fn the_pinned_endpoint_full_means_waiting_there_and_other_exchanges_pass() {
    let places = [Place { max_runs: Some(1), ..place(1) }, Place { max_runs: Some(1), ..place(2) }];
    let mut world = World::new(&Fleet::new().version("stable", 1, places));
    let (home, _) = world.serve("a");
    let run = world.start("a").expect("a place");
    assert_eq!(world.port(&run), home);
    assert!(matches!(world.start("a"), Err(Unplaced::PinnedFull(_))));
    assert!(world.other("a").is_ok());
    let grant = world.core_start();
    assert_eq!(world.port(&grant), 3 - home);
}

impl World {
    /// A run without a session, kept.
    fn core_start(&mut self) -> Grant {
        self.keyless(Kind::Start).expect("a place")
    }
}

#[test]
fn sessions_expire_when_idle_but_never_under_a_run() {
    let fleet = fleet(1..=2).with(|config| config.session.idle_timeout = Duration::from_secs(60));
    let mut world = World::new(&fleet);
    world.serve("idle");
    let run = world.start("busy").expect("a place");
    world.core.confirm(&run, world.now);
    world.wait(Duration::from_secs(59));
    assert_eq!(world.serve("idle").1, AffinityOutcome::Hit);
    world.wait(Duration::from_secs(61));
    assert_eq!(world.serve("idle").1, AffinityOutcome::New);
    world.wait(Duration::from_secs(61));
    assert_eq!(world.core.expire(100, world.now), 1);
    assert_eq!(world.sessions(), 1);
    // The time counts from the end of the last exchange.
    world.finish(run);
    world.wait(Duration::from_secs(59));
    assert_eq!(world.serve("busy").1, AffinityOutcome::Hit);
}

#[test]
fn a_session_past_its_time_is_new_although_others_expire_first() {
    let fleet = fleet(1..=2).with(|config| config.session.idle_timeout = Duration::from_secs(60));
    let mut world = World::new(&fleet);
    for n in 0..100 {
        world.serve(&n.to_string());
    }
    world.wait(Duration::from_secs(61));
    assert_eq!(world.serve("99").1, AffinityOutcome::New);
    assert_eq!(world.core.expire(1_000, world.now), 100 - 16 - 1, "one pick cleans up a few");
}

#[test]
fn the_table_is_bounded_and_gives_up_the_longest_idle_first() {
    let mut world = World::new(&fleet(1..=2).with(|config| config.session.max_sessions = 3));
    let busy = world.start("busy").expect("a place");
    world.core.confirm(&busy, world.now);
    for session in ["a", "b"] {
        world.serve(session);
        world.wait(Duration::from_secs(1));
    }
    assert_eq!(world.serve("a").1, AffinityOutcome::Hit);
    assert_eq!(world.serve("c").1, AffinityOutcome::New);
    let mut keys = keys(&mut world);
    keys.sort();
    assert_eq!(keys, ["a", "busy", "c"]);

    // Where all are busy, a run is served and counted, but not pinned.
    let grants = [world.start("a").expect("a place"), world.start("c").expect("a place")];
    let extra = world.start("d").expect("a place");
    assert_eq!(extra.affinity(), AffinityOutcome::None);
    assert_eq!(world.core.status(world.now).outstanding_runs, 4);
    assert_eq!(world.sessions(), 3);
    for grant in grants.into_iter().chain([extra, busy]) {
        world.finish(grant);
    }
    assert_eq!(world.core.status(world.now).outstanding_runs, 0);
}

fn keys(world: &mut World) -> Vec<String> {
    let mut found = Vec::new();
    assert_eq!(world.core.scan_sessions(None, 0, 1_000, 1_000, &mut found, world.now), None);
    found.into_iter().map(|session| session.key).collect()
}

#[test]
fn a_lower_bound_of_the_table_is_reached_in_steps() {
    let mut world = World::new(&fleet(1..=2));
    for number in 0..10_000 {
        world.serve(&format!("old-{number}"));
    }
    world.apply(&fleet(1..=2).with(|config| config.session.max_sessions = 10));
    assert_eq!(world.sessions(), 10_000, "a lower limit cuts nothing at once");
    assert_eq!(world.serve("new-0").1, AffinityOutcome::New);
    assert_eq!(world.sessions(), 10_000 + 1 - 16);
    for number in 1..1_000 {
        assert_eq!(world.serve(&format!("new-{number}")).1, AffinityOutcome::New);
    }
    assert_eq!(world.sessions(), 10);
    assert_eq!(world.serve("new-999").1, AffinityOutcome::Hit, "the youngest are left");
}

#[test]
fn learned_ids_become_the_key_or_an_alias() {
    let mut world = World::new(&fleet(1..=3));
    let mut grant = world.keyless(Kind::Start).expect("a place");
    let home = world.port(&grant);
    world.core.learn(&mut grant, &key("thread-1"), world.now);
    assert_eq!(world.core.runs(Some("thread-1"), 10, world.now).len(), 1);
    world.succeed(grant);
    assert_eq!(world.serve("thread-1"), (home, AffinityOutcome::Hit));

    let mut grant = world.start("mine").expect("a place");
    let home = world.port(&grant);
    world.core.learn(&mut grant, &key("theirs"), world.now);
    world.core.learn(&mut grant, &key("thread-1"), world.now);
    world.succeed(grant);
    assert_eq!(world.serve("theirs"), (home, AffinityOutcome::Hit));
    assert_eq!(world.sessions(), 2, "an alias is no session");
    let mut found = Vec::new();
    world.core.scan_sessions(Some("theirs"), 0, 1_000, 10, &mut found, world.now);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].key.as_str(), found[0].confirmed), ("mine", true));
    assert_eq!(world.core.forget_sessions(Some("theirs"), 0, 1_000, world.now), (1, None));
    assert_eq!(world.serve("mine").1, AffinityOutcome::New);
}

#[test]
fn without_affinity_nothing_is_pinned_or_learned() {
    let mut world = World::new(&fleet(1..=3).with(|config| config.session.affinity = Affinity::None));
    let mut grant = world.start("a").expect("a place");
    assert_eq!(grant.affinity(), AffinityOutcome::None);
    world.core.learn(&mut grant, &key("b"), world.now);
    world.succeed(grant);
    assert_eq!(world.sessions(), 0);
}

#[test]
fn the_cookie_of_another_replica_brings_a_session_home() {
    let mut world = World::new(&fleet(1..=4));
    for port in 1..=4 {
        let grant = world.hinted(&format!("s{port}"), Kind::Start, port).expect("a place");
        assert_eq!((world.port(&grant), grant.affinity()), (port, AffinityOutcome::Hit));
    }
    world.drain(3);
    let grant = world.hinted("x", Kind::Other, 3).expect("a place");
    assert_eq!((world.port(&grant), grant.affinity()), (3, AffinityOutcome::Hit));
    let grant = world.hinted("y", Kind::Start, 3).expect("a place");
    assert_ne!(world.port(&grant), 3);
    assert_eq!(grant.affinity(), AffinityOutcome::Moved);
    let grant = world.hinted("z", Kind::Start, 99).expect("a place");
    assert_eq!(grant.affinity(), AffinityOutcome::Lost);
    world.apply(&fleet(1..=4).with(|config| config.session.when_lost = WhenLost::Reject));
    assert_eq!(world.hinted("w", Kind::Start, 99).unwrap_err(), Unplaced::Lost);
}

// Draining and losing.

#[test]
fn idle_sessions_leave_a_draining_endpoint_at_their_next_start() {
    let mut world = World::new(&fleet(1..=2));
    let (home, _) = world.serve("a");
    world.drain(home);
    let read = world.other("a").expect("a place");
    assert_eq!((world.port(&read), read.affinity()), (home, AffinityOutcome::Hit), "reads follow the state");
    let run = world.start("a").expect("a place");
    assert_eq!((world.port(&run), run.affinity()), (3 - home, AffinityOutcome::Moved));
    world.finish(run);
    // It had succeeded before, so one failure does not make it forget where it is now.
    assert_eq!(world.serve("a"), (3 - home, AffinityOutcome::Hit));
    assert!(world.core.set_drained(&support::url(home).address(), false, world.now));
    assert!(!world.core.set_drained("127.0.0.1:99", true, world.now));
    assert_eq!(world.serve("a"), (3 - home, AffinityOutcome::Hit));
}

#[test]
fn a_session_at_work_stays_on_its_draining_endpoint() {
    let mut world = World::new(&fleet(1..=2));
    let run = world.start("a").expect("a place");
    world.core.confirm(&run, world.now);
    let home = world.port(&run);
    world.drain(home);
    assert_eq!(world.serve("a"), (home, AffinityOutcome::Hit));
    world.finish(run);
    assert_eq!(world.serve("a"), (3 - home, AffinityOutcome::Moved));
}

#[test]
fn stay_keeps_sessions_until_the_endpoint_is_gone() {
    let stay = |ports: Vec<u16>| fleet(ports).with(|config| config.session.when_draining = WhenDraining::Stay);
    let mut world = World::new(&stay(vec![1, 2]));
    let (home, _) = world.serve("a");
    let run = world.start("b").and_then(|_| world.start("a")).expect("a place");
    world.apply(&stay(vec![3 - home]));
    assert_eq!(world.serve("a"), (home, AffinityOutcome::Hit));
    assert_eq!(world.endpoint(home).map(|endpoint| endpoint.state), Some(EndpointState::Draining));
    world.finish(run);
    assert_eq!(world.endpoint(home), None);
    assert_eq!(world.serve("a"), (3 - home, AffinityOutcome::Lost));
}

#[test]
fn a_lone_draining_endpoint_keeps_its_sessions() {
    let mut world = World::new(&fleet([1]));
    world.serve("a");
    world.drain(1);
    assert_eq!(world.serve("a"), (1, AffinityOutcome::Hit), "there is nowhere else");
    assert_eq!(world.start("b").unwrap_err(), Unplaced::Empty);
}

#[test]
fn a_removed_endpoint_finishes_and_is_retired() {
    let mut world = World::new(&fleet(1..=2));
    let grants: Vec<Grant> = (0..4).map(|_| world.core_start()).collect();
    let target = world.core.target(grants.iter().find(|grant| world.port(grant) == 2).expect("one there"));
    world.apply(&fleet([1]));
    assert!(!target.retired());
    for _ in 0..3 {
        let grant = world.core_start();
        assert_eq!(world.port(&grant), 1);
    }
    let status = world.core.status(world.now);
    assert_eq!((status.outstanding_runs, status.demand), (7, 5));
    for grant in grants {
        world.finish(grant);
    }
    assert!(target.retired());
    assert_eq!(world.endpoint(2), None);

    // Its time may be over before it has finished.
    world.apply(&fleet(1..=2));
    let grant = world.core_start();
    assert_eq!(world.port(&grant), 2);
    world.apply(&fleet([1]));
    world.wait(Duration::from_secs(600));
    world.core.tick(world.now);
    assert_eq!(world.endpoint(2).map(|endpoint| endpoint.state), Some(EndpointState::Gone));
    assert!(world.core.target(&grant).retired());
    world.finish(grant);
    assert_eq!(world.endpoint(2), None);
}

#[test]
fn a_session_lost_is_placed_again_or_rejected() {
    for when_lost in [WhenLost::Rebind, WhenLost::Reject] {
        let checked = fleet(1..=2).with(|config| {
            config.health.tcp = true;
            config.session.when_lost = when_lost;
        });
        let mut world = World::new(&checked);
        assert_eq!(world.start("a").unwrap_err(), Unplaced::Empty, "nobody is ready before the first answer");
        world.probe(1, true);
        world.probe(2, true);
        let (home, _) = world.serve("a");
        let run = world.start("a").expect("a place");
        for _ in 0..3 {
            world.probe(home, false);
        }
        assert_eq!(world.serve("a"), (home, AffinityOutcome::Hit), "its run is still there");
        world.finish(run);
        match when_lost {
            WhenLost::Rebind => {
                let read = world.other("a").expect("a place");
                assert_eq!((world.port(&read), read.affinity()), (3 - home, AffinityOutcome::Lost));
            }
            WhenLost::Reject => {
                assert_eq!(world.start("a").unwrap_err(), Unplaced::Lost);
                world.probe(home, true);
                world.probe(home, true);
                assert_eq!(world.serve("a"), (home, AffinityOutcome::Hit), "back again");
            }
        }
    }
}

#[test]
fn failing_endpoints_are_ejected_within_bounds() {
    let mut world = World::new(&fleet(1..=4));
    world.fail(1, 4);
    let good = world.hinted("fail-1", Kind::Other, 1).expect("a place");
    world.core.report(&good, Evidence::Good, world.now);
    world.finish(good);
    world.fail(1, 4);
    assert_eq!(world.endpoint(1).expect("there").state, EndpointState::Ready, "success starts the count anew");
    world.fail(1, 1);
    for port in 2..=4 {
        world.fail(port, 5);
    }
    let ejected: Vec<u16> = (1..=4)
        .filter(|port| world.endpoint(*port).is_some_and(|endpoint| endpoint.state == EndpointState::Ejected))
        .collect();
    assert_eq!(ejected, [1, 2], "half of them at most");
    for _ in 0..8 {
        let grant = world.core_start();
        assert!(world.port(&grant) > 2);
    }
    world.wait(Duration::from_secs(30));
    let grant = world.core_start();
    assert!(world.port(&grant) <= 2, "time is over");

    let mut alone = World::new(&fleet([1]));
    alone.fail(1, 20);
    assert_eq!(alone.endpoint(1).expect("there").state, EndpointState::Ready);
}

#[test]
fn a_reload_leaves_no_lone_endpoint_ejected() {
    let mut world = World::new(&fleet(1..=3));
    world.fail(1, 5);
    assert_eq!(world.endpoint(1).expect("there").state, EndpointState::Ejected);
    world.apply(&fleet(1..=2));
    assert_eq!(world.endpoint(1).expect("there").state, EndpointState::Ejected, "another is left");
    world.apply(&fleet([1]));
    assert_eq!(world.endpoint(1).expect("there").state, EndpointState::Ready);
    let grant = world.core_start();
    assert_eq!(world.port(&grant), 1);
}

#[test]
fn what_an_abolished_check_said_is_forgotten() {
    let checked = fleet(1..=2).with(|config| config.health.tcp = true);
    let mut world = World::new(&checked);
    world.probe(1, true);
    world.probe(2, false);
    world.apply(&fleet(1..=2));
    world.apply(&checked);
    assert_eq!(world.endpoint(2).expect("there").state, EndpointState::Ready, "it has served without a check");
}

#[test]
fn a_drain_past_its_time_cuts_what_is_left_once() {
    for removed in [false, true] {
        let mut world = World::new(&fleet(1..=2));
        let grants = [world.core_start(), world.core_start()];
        let on = |port| grants.iter().find(|grant| world.port(grant) == port).expect("one on each");
        let (leaving, staying) = (world.core.target(on(2)), world.core.target(on(1)));
        if removed {
            world.apply(&fleet([1]));
        } else {
            world.drain(2);
            world.wait(Duration::from_secs(300));
            // Neither a reload nor a second call begins it anew.
            world.apply(&fleet(1..=2));
            world.drain(2);
            world.wait(Duration::from_secs(299));
        }
        world.core.tick(world.now);
        assert_eq!(leaving.cut.count(), 0, "its time is not over");
        world.wait(if removed { Duration::from_secs(600) } else { Duration::from_secs(1) });
        for _ in 0..3 {
            world.core.tick(world.now);
        }
        assert_eq!((leaving.cut.count(), staying.cut.count()), (1, 0));
        for grant in grants {
            world.finish(grant);
        }
    }
    // One after another, within a tenth of the time-out.
    let mut world = World::new(&fleet(1..=2));
    let grant = world.core_start();
    let target = world.core.target(&grant);
    let port = world.port(&grant);
    world.drain(port);
    world.wait(Duration::from_secs(600));
    for (wait, share) in [(0, 0.0), (15, 0.25), (30, 0.75), (15, 1.0)] {
        world.wait(Duration::from_secs(wait));
        world.core.tick(world.now);
        let (count, place) = target.cut.wave();
        assert_eq!((count, place), (1, (share * f64::from(u32::MAX)) as u32));
    }
    assert!(!world.core.is_cutting());

    let mut world = World::new(&fleet(1..=2));
    let grant = world.core_start();
    let port = world.port(&grant);
    world.drain(port);
    assert!(world.core.set_drained(&support::url(port).address(), false, world.now));
    world.wait(Duration::from_secs(3600));
    world.core.tick(world.now);
    assert_eq!(world.core.target(&grant).cut.count(), 0, "the drain was called off");
}

#[test]
fn an_endpoint_that_comes_back_while_it_drains_keeps_its_count() {
    let mut world = World::new(&fleet(1..=2));
    let grants: Vec<Grant> = (0..6).map(|_| world.core_start()).collect();
    world.apply(&fleet([1]));
    world.apply(&fleet(1..=2));
    assert_eq!((world.outstanding(1), world.outstanding(2)), (3, 3));
    world.wait(Duration::from_secs(3600));
    world.core.tick(world.now);
    assert_eq!(world.endpoint(2).expect("there").state, EndpointState::Ready);
    // Also after its time was over.
    world.apply(&fleet([1]));
    world.wait(Duration::from_secs(600));
    world.core.tick(world.now);
    world.apply(&fleet(1..=2));
    assert_eq!(world.outstanding(2), 3);
    let next = world.core_start();
    assert!(!world.core.target(&next).retired());
    for grant in grants.into_iter().chain([next]) {
        world.finish(grant);
    }
    assert_eq!((world.outstanding(1), world.outstanding(2)), (0, 0));
}

#[test]
fn a_full_pin_is_told_as_a_hit() {
    assert_eq!(Unplaced::PinnedFull(0).refusal().affinity(), AffinityOutcome::Hit);
    assert_eq!(Unplaced::PinnedFull(0).refusal().code(), Unplaced::Full(None).refusal().code());
    assert_eq!(Unplaced::Full(None).refusal().affinity(), AffinityOutcome::None);
}

// Retrying.

#[test]
fn a_retry_hands_over_slot_and_tentative_pin() {
    let mut world = World::new(&fleet(1..=3));
    let mut grant = world.start("a").expect("a place");
    let mut tried = vec![world.port(&grant)];
    for _ in 0..2 {
        let target = world.core.retry(&mut grant, world.now, 0).expect("another");
        tried.push(port_of(&target.address));
        assert_eq!(world.core.status(world.now).outstanding_runs, 1);
        assert_eq!(world.outstanding(tried[tried.len() - 1]), 1);
    }
    assert_eq!(world.core.retry(&mut grant, world.now, 0).err(), Some(Unplaced::Empty), "all were tried");
    let last = tried[2];
    tried.sort();
    assert_eq!(tried, [1, 2, 3]);
    world.succeed(grant);
    assert_eq!(world.serve("a"), (last, AffinityOutcome::Hit));
    assert_eq!(world.core.status(world.now).outstanding_runs, 0);
}

/// Endpoints that left and came back meanwhile don't bear the numbers that they had.
#[test]
fn a_retry_knows_what_was_tried_across_reloads() {
    let mut world = World::new(&fleet(1..=3));
    let mut grant = world.keyless(Kind::Start).expect("a place");
    let first = world.port(&grant);
    world.core.retry(&mut grant, world.now, 0).expect("another");
    let second = world.port(&grant);
    let third = 6 - first - second;
    for ports in [vec![second], vec![second, 4], vec![second, 4, third, first]] {
        world.apply(&fleet(ports));
    }
    let mut others: Vec<u16> = (0..2)
        .map(|_| port_of(&world.core.retry(&mut grant, world.now, 0).expect("one that wasn't tried").address))
        .collect();
    others.sort();
    assert_eq!(others, [third.min(4), third.max(4)]);
    assert_eq!(world.core.retry(&mut grant, world.now, 0).err(), Some(Unplaced::Empty), "all were tried");
}

#[test]
fn a_confirmed_pin_retries_at_home() {
    let mut world = World::new(&fleet(1..=3));
    let (home, _) = world.serve("a");
    let mut grant = world.start("a").expect("a place");
    let target = world.core.retry(&mut grant, world.now, 0).expect("the same");
    assert_eq!(port_of(&target.address), home);
    assert_eq!(world.core.runs(None, 10, world.now)[0].attempts, 2);
}

#[test]
fn exchanges_of_one_new_session_follow_its_pin() {
    let mut world = World::new(&fleet(1..=3));
    let mut first = world.start("a").expect("a place");
    let mut second = world.start("a").expect("a place");
    world.core.retry(&mut first, world.now, 0).expect("another");
    world.core.retry(&mut second, world.now, 0).expect("another");
    assert_eq!(world.port(&first), world.port(&second));
}

#[test]
fn a_retry_goes_to_another_version_only_where_its_own_has_no_other() {
    let two = Fleet::new().version("stable", 1, [1, 2].map(place)).version("canary", 1, [place(3)]);
    let mut world = World::new(&two);
    let ask = |version| Ask { version: Some(version), ..Ask::new(Kind::Start, None) };
    let mut grant = world.ask(ask("stable")).expect("a place");
    world.core.retry(&mut grant, world.now, 0).expect("another");
    assert_eq!(world.version(&grant), "stable");
    world.core.retry(&mut grant, world.now, 0).expect("another");
    assert_eq!(world.version(&grant), "canary");
    let mut grant = world.keyless(Kind::Other).expect("a place");
    let first = world.port(&grant);
    world.core.retry(&mut grant, world.now, 0).expect("another");
    assert_ne!(world.port(&grant), first);
}

// Versions.

fn split(stable: u32, canary: u32) -> Fleet {
    Fleet::new().version("stable", stable, [1, 2].map(place)).version("canary", canary, [3, 4].map(place))
}

#[test]
fn a_hundred_thousand_sessions_split_within_three_sigma() {
    let count = 100_000;
    for canary in [1, 5, 50] {
        let mut world = World::new(&split(100 - canary, canary));
        let mut hits = 0;
        for n in 0..count {
            let grant = world.start(&format!("session-{n}")).expect("a place");
            hits += u32::from(world.version(&grant) == "canary");
            world.finish(grant);
        }
        let share = f64::from(canary) / 100.0;
        let sigma = (f64::from(count) * share * (1.0 - share)).sqrt();
        let off = (f64::from(hits) - f64::from(count) * share).abs();
        assert!(off < 3.0 * sigma, "{hits} at {canary} %");
    }
}

#[test]
fn exchanges_without_a_session_split_exactly() {
    let mut world = World::new(&split(95, 5));
    for kind in [Kind::Start, Kind::Other] {
        let mut hits = 0;
        for _ in 0..1_000 {
            let grant = world.keyless(kind).expect("a place");
            hits += u32::from(world.version(&grant) == "canary");
            world.finish(grant);
        }
        assert_eq!(hits, 50);
    }
}

#[test]
fn a_session_keeps_its_version_at_weight_0_and_no_new_one_goes_there() {
    let mut world = World::new(&split(1, 1));
    let homes: Vec<(String, u16)> =
        (0..100).map(|n| n.to_string()).map(|session| (session.clone(), world.serve(&session).0)).collect();
    assert!(homes.iter().any(|(_, port)| *port >= 3));
    world.apply(&split(1, 0));
    for (session, home) in &homes {
        assert_eq!(world.serve(session), (*home, AffinityOutcome::Hit));
    }
    for n in 0..100 {
        assert!(world.serve(&format!("new-{n}")).0 <= 2);
        let grant = world.core_start();
        assert!(world.port(&grant) <= 2);
    }
    // Re-placed within its version although that has no weight.
    world.drain(3);
    for (session, _) in homes.iter().filter(|(_, home)| *home == 3) {
        assert_eq!(world.serve(session), (4, AffinityOutcome::Moved));
    }
    world.drain(4);
    for (session, _) in homes.iter().filter(|(_, home)| *home >= 3) {
        let (port, outcome) = world.serve(session);
        assert!(port <= 2);
        assert_eq!(outcome, AffinityOutcome::Moved);
    }
}

#[test]
fn a_version_without_a_ready_endpoint_falls_to_the_others_and_a_full_one_waits() {
    let limited = |port| Place { max_runs: Some(1), ..place(port) };
    let fleet = Fleet::new().version("stable", 1, [place(1)]).version("canary", 1, [limited(2)]);
    let mut world = World::new(&fleet);
    let (mut full, mut stable) = (0, 0);
    for n in 0..100 {
        match world.start(&n.to_string()) {
            Ok(grant) => stable += u32::from(world.version(&grant) == "stable"),
            Err(unplaced) => {
                assert!(matches!(unplaced, Unplaced::Full(_)));
                full += 1;
            }
        }
    }
    assert_eq!(stable + full, 99);
    assert!((30..70).contains(&full), "{full}");
    assert!((0..50).all(|_| world.keyless(Kind::Start).is_ok()), "without a session any free slot will do");
    world.drain(2);
    assert!((100..200).all(|n| world.start(&n.to_string()).is_ok()));
}

#[test]
fn a_match_wins_for_new_sessions_and_reaches_weight_0() {
    let mut world = World::new(&split(1, 0));
    let grant = world.ask(Ask { version: Some("canary"), ..Ask::new(Kind::Start, Some(&key("a"))) }).expect("a place");
    assert_eq!(world.version(&grant), "canary");
    world.succeed(grant);
    let mut found = Vec::new();
    world.core.scan_sessions(Some("a"), 0, 1_000, 1, &mut found, world.now);
    assert!(found[0].matched);
    let (home, _) = world.serve("b");
    let grant = world.ask(Ask { version: Some("canary"), ..Ask::new(Kind::Start, Some(&key("b"))) }).expect("a place");
    assert_eq!(world.port(&grant), home, "a pin wins over a match");
    let keyless = Ask { version: Some("canary"), ..Ask::new(Kind::Other, None) };
    let grant = world.ask(keyless).expect("a place");
    assert_eq!(world.version(&grant), "canary");
    world.drain(3);
    world.drain(4);
    let grant = world.ask(Ask { version: Some("canary"), ..Ask::new(Kind::Start, Some(&key("c"))) }).expect("a place");
    assert_eq!(world.version(&grant), "stable");
}

// Hash affinity.

#[test]
fn hashed_sessions_move_only_with_what_changed() {
    let hashed =
        |ports: std::ops::RangeInclusive<u16>| fleet(ports).with(|config| config.session.affinity = Affinity::Hash);
    let mut world = World::new(&hashed(1..=9));
    let homes = |world: &mut World| -> Vec<u16> {
        let homes = (0..2_000).map(|n| {
            let grant = world.start(&n.to_string()).expect("a place");
            assert_eq!(grant.affinity(), AffinityOutcome::Hit);
            let port = world.port(&grant);
            world.finish(grant);
            port
        });
        homes.collect()
    };
    let before = homes(&mut world);
    assert_eq!(world.sessions(), 0, "nothing is kept");
    world.apply(&hashed(1..=10));
    let after = homes(&mut world);
    let moved: Vec<_> = before.iter().zip(&after).filter(|(before, after)| before != after).collect();
    assert!(moved.iter().all(|(_, after)| **after == 10), "only towards the new one");
    assert!((100..=300).contains(&moved.len()), "{} of 2000 moved, a tenth is due", moved.len());
    world.drain(10);
    assert_eq!(homes(&mut world), before, "a draining endpoint leaves the hash");
}

#[test]
fn a_hashed_session_never_spills() {
    let places = (1..=3).map(|port| Place { max_runs: Some(1), ..place(port) });
    let fleet = Fleet::new().version("stable", 1, places).with(|config| config.session.affinity = Affinity::Hash);
    let mut world = World::new(&fleet);
    let mut grant = world.start("a").expect("a place");
    let home = world.port(&grant);
    assert!(matches!(world.start("a"), Err(Unplaced::PinnedFull(_))));
    let target = world.core.retry(&mut grant, world.now, 0).expect("the same");
    assert_eq!(port_of(&target.address), home);
}

// Reload.

#[test]
fn the_rotation_goes_on_evenly_when_endpoints_join_or_change_their_version() {
    let mut world = World::new(&split(1, 1));
    let turns = |world: &mut World, count: usize| {
        let mut counts = BTreeMap::new();
        for _ in 0..count {
            let grant = world.keyless(Kind::Other).expect("a place");
            *counts.entry(world.port(&grant)).or_insert(0) += 1;
            world.finish(grant);
        }
        counts
    };
    turns(&mut world, 400);
    world.apply(&fleet([1, 2, 5]));
    assert_eq!(
        turns(&mut world, 30),
        BTreeMap::from([(1, 10), (2, 10), (5, 10)]),
        "the new one has nothing to catch up"
    );
    world.apply(&Fleet::new().version("stable", 0, [place(1)]).version("fresh", 1, [2, 6].map(place)));
    assert_eq!(turns(&mut world, 20), BTreeMap::from([(2, 10), (6, 10)]), "nor has the old one anything to pay for");
}

#[test]
fn reloads_between_exchanges_don_t_change_the_split() {
    let mut world = World::new(&split(95, 5));
    let mut hits = 0;
    for _ in 0..1_000 {
        world.apply(&split(95, 5));
        let grant = world.keyless(Kind::Other).expect("a place");
        hits += u32::from(world.version(&grant) == "canary");
        world.finish(grant);
    }
    assert_eq!(hits, 50);
}

#[test]
fn a_reload_keeps_targets_that_did_not_change() {
    let mut world = World::new(&fleet(1..=2));
    let grants = [world.core_start(), world.core_start()];
    let before = grants.each_ref().map(|grant| world.core.target(grant));
    world.apply(&fleet([2, 1]).with(|config| config.attempts = 3));
    let after = grants.each_ref().map(|grant| world.core.target(grant));
    assert!(before.iter().zip(&after).all(|(before, after)| Arc::ptr_eq(before, after)));
    world.apply(&fleet(1..=2).with(|config| config.pool.max_idle = 1));
    let after = grants.each_ref().map(|grant| world.core.target(grant));
    assert!(before.iter().zip(&after).all(|(before, after)| before.retired() && !after.retired()));
    assert_eq!((world.outstanding(1), world.outstanding(2)), (1, 1));
}

#[test]
fn an_endpoint_that_changes_its_version_takes_its_sessions_and_counts_along() {
    let mut world = World::new(&split(1, 0));
    let (home, _) = world.serve("a");
    let run = world.start("a").expect("a place");
    let moved = Fleet::new().version("next", 1, [home].map(place)).version("stable", 1, [3 - home].map(place));
    world.apply(&moved);
    assert_eq!(world.outstanding(home), 1);
    let grant = world.start("a").expect("a place");
    assert_eq!((world.port(&grant), world.version(&grant).as_str()), (home, "next"));
    world.finish(grant);
    world.finish(run);
    let status = world.core.status(world.now);
    let names: Vec<&str> = status.versions.iter().map(|version| version.name.as_str()).collect();
    assert_eq!(names, ["next", "stable"], "a removed version is not shown once it is empty");
    assert_eq!(status.outstanding_runs, 0);
}

#[test]
fn operator_drains_and_health_outlive_reloads() {
    use EndpointState::{Draining, Ready, Unhealthy};
    let checked = |ports: std::ops::RangeInclusive<u16>| fleet(ports).with(|config| config.health.tcp = true);
    let mut world = World::new(&fleet(1..=3));
    world.drain(1);
    world.apply(&checked(1..=3));
    assert_eq!(world.endpoint(2).expect("there").state, Ready, "a new check doubts nobody");
    for _ in 0..3 {
        world.probe(2, false);
    }
    world.apply(&checked(1..=4));
    let states = [1, 2, 3, 4].map(|port| world.endpoint(port).expect("there").state);
    assert_eq!(states, [Draining, Unhealthy, Ready, Unhealthy]);
}

#[test]
fn capacity_and_saturation_count_what_is_ready() {
    let limited = |count| (1..=count).map(|port| Place { max_runs: Some(20), ..place(port) });
    let mut world = World::new(&Fleet::new().version("stable", 1, limited(2)));
    for _ in 0..15 {
        world.core_start();
    }
    let status = world.core.status(world.now);
    assert_eq!((status.capacity, status.demand, status.saturation), (Some(40), 15, Some(0.375)));
    world.apply(&fleet(1..=2));
    let status = world.core.status(world.now);
    assert_eq!((status.capacity, status.saturation), (None, None));
    let json = serde_json::to_value(&status).expect("serialises");
    assert_eq!(json["versions"][0]["endpoints"][0]["state"], "ready");
    assert_eq!(json["versions"][0]["effective_weight"], 1);
    assert_eq!(json["queue"]["length"], 0);
}

// The dispatcher around the core.

#[test]
fn a_lease_gives_back_exactly_once_and_counts_its_run() {
    let metrics = support::service_metrics();
    let dispatcher = Dispatcher::new(support::SERVICE, metrics.clone());
    let now = ids::now();
    let start = || Ask::new(Kind::Start, None);
    assert_eq!(dispatcher.pick(start(), now, 0).err(), Some(Refusal::NoEndpoint));
    assert_eq!(metrics.rejected.get(), 1);
    dispatcher.apply(Fleet::new().version("stable", 1, [place(1)]).settings(), now);
    let mut placed = dispatcher.pick(start(), now, 0).ok().and_then(Picked::placed).expect("a place");
    let shown = dispatcher.runs(None, 10, now);
    assert_eq!(shown[0].id, placed.lease.run_id().expect("a run").to_string());
    let runs = placed.target.metrics.clone();
    placed.lease.outcome(RunOutcome::Completed);
    drop(placed);
    let dropped = dispatcher.pick(start(), now, 0).ok().and_then(Picked::placed).expect("a place");
    drop(dropped);
    assert_eq!(runs.runs[RunOutcome::Completed as usize].get(), 1);
    assert_eq!(runs.runs[RunOutcome::Cancelled as usize].get(), 1);
    assert_eq!(runs.run_duration_seconds.get_sample_count(), 2);
    assert_eq!(metrics.affinity[AffinityOutcome::None as usize].get(), 2);
    assert_eq!(dispatcher.status(now).outstanding_runs, 0);
    assert!(dispatcher.runs(None, 10, now).is_empty());
}

#[test]
fn counts_end_at_zero_under_many_threads() {
    let dispatcher = Dispatcher::new(support::SERVICE, support::service_metrics());
    let fleets = [
        fleet(1..=4).with(|config| config.session.max_sessions = 50),
        fleet(2..=6).with(|config| config.session.max_sessions = 50),
        split(3, 1).with(|config| {
            config.session.max_sessions = 50;
            config.runs.max_per_endpoint = Some(3);
        }),
    ];
    dispatcher.apply(fleets[0].settings(), ids::now());
    std::thread::scope(|scope| {
        for thread in 0..6_u64 {
            let dispatcher = &dispatcher;
            scope.spawn(move || {
                let mut held = Vec::new();
                let mut state = thread + 1;
                for _ in 0..5_000 {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let chance = state >> 33;
                    let session = key(&(chance % 100).to_string());
                    let kind = if chance % 5 > 0 { Kind::Start } else { Kind::Other };
                    let ask = Ask::new(kind, (chance % 3 > 0).then_some(&session));
                    if let Ok(Picked::Placed(mut placed)) = dispatcher.pick(ask, ids::now(), state) {
                        match chance % 7 {
                            0 => drop(placed.lease.retry(ids::now(), state)),
                            1 | 2 => placed.lease.confirm(ids::now()),
                            3 => placed.lease.learn(key(&(chance % 1_000).to_string()), ids::now()),
                            4 => placed.lease.report(Evidence::Bad, ids::now()),
                            _ => {}
                        }
                        held.push(placed);
                    }
                    if held.len() > 5 {
                        held.swap_remove(chance as usize % held.len());
                    }
                }
            });
        }
        for round in 0..300 {
            dispatcher.apply(fleets[round % fleets.len()].settings(), ids::now());
            dispatcher.drain_endpoint("127.0.0.1:2", ids::now());
            dispatcher.tick(ids::now());
            dispatcher.undrain_endpoint("127.0.0.1:2", ids::now());
        }
    });
    let now = ids::now();
    let status = dispatcher.status(now);
    assert_eq!(status.outstanding_runs, 0);
    assert!(dispatcher.runs(None, 10, now).is_empty());
    let endpoints = status.versions.iter().flat_map(|version| &version.endpoints);
    assert!(endpoints.clone().all(|endpoint| endpoint.outstanding_runs == 0 && endpoint.open_exchanges == 0));
    let listed = dispatcher.sessions(None, usize::MAX, now).len();
    assert!(listed <= 50, "{listed}");
    assert_eq!(dispatcher.forget_sessions(None, now), listed, "nobody is busy any more");
    assert_eq!(dispatcher.status(now).versions.iter().map(|version| version.sessions).sum::<u64>(), 0);
}

// Properties.

/// One thing that happens to a service.
#[derive(Clone, Debug)]
enum Event {
    Pick { session: Option<u8>, starts: bool },
    Finish { which: usize, confirm: bool },
    Retry { which: usize },
    Learn { which: usize, session: u8 },
    Drain { port: u16, on: bool },
    Probe { port: u16, healthy: bool },
    Apply { plan: Plan },
    Wait { milliseconds: u64 },
}

/// What a configuration says of the ports 1 to 6: which version has them, if any, their weights and limits.
#[derive(Clone, Debug)]
struct Plan {
    stable_weight: u32,
    canary_weight: u32,
    ports: [Option<(bool, u32, Option<u32>)>; PORTS],
}

const PORTS: usize = 6;

impl Plan {
    fn fleet(&self, stay: bool) -> Fleet {
        let of = |canary: bool| {
            let places = self.ports.iter().zip(1..).filter_map(move |(place, port)| match place {
                Some((its, weight, max_runs)) if *its == canary => {
                    Some(Place { port, weight: *weight, max_runs: *max_runs })
                }
                _ => None,
            });
            places.collect::<Vec<_>>()
        };
        Fleet::new()
            .version("stable", self.stable_weight, of(false))
            .version("canary", self.canary_weight, of(true))
            .with(|config| {
                config.health.tcp = true;
                if stay {
                    config.session.when_draining = WhenDraining::Stay;
                }
            })
    }

    fn weight_of(&self, version: &str) -> u32 {
        if version == "stable" { self.stable_weight } else { self.canary_weight }
    }
}

fn plans() -> impl Strategy<Value = Plan> {
    let limit = prop_oneof![2 => Just(None), 1 => (1..4_u32).prop_map(Some)];
    let place = prop::option::weighted(0.8, (prop::bool::weighted(0.3), 1..4_u32, limit));
    (0..3_u32, 0..3_u32, prop::array::uniform6(place)).prop_map(|(stable_weight, canary_weight, ports)| Plan {
        stable_weight,
        canary_weight,
        ports,
    })
}

fn events() -> impl Strategy<Value = Event> {
    let ports = 1..=PORTS as u16;
    let session = prop::option::weighted(0.6, 0..6_u8);
    prop_oneof![
        12 => (session, prop::bool::weighted(0.7)).prop_map(|(session, starts)| Event::Pick { session, starts }),
        8 => (any::<usize>(), any::<bool>()).prop_map(|(which, confirm)| Event::Finish { which, confirm }),
        2 => any::<usize>().prop_map(|which| Event::Retry { which }),
        1 => (any::<usize>(), 0..6_u8).prop_map(|(which, session)| Event::Learn { which, session }),
        1 => (ports.clone(), any::<bool>()).prop_map(|(port, on)| Event::Drain { port, on }),
        3 => (ports, prop::bool::weighted(0.7)).prop_map(|(port, healthy)| Event::Probe { port, healthy }),
        1 => plans().prop_map(|plan| Event::Apply { plan }),
        1 => (0..6_000_u64).prop_map(|milliseconds| Event::Wait { milliseconds }),
    ]
}

/// The same service, told naively: everything is looked for by scanning, nothing is kept in order.
struct Model {
    plan: Plan,
    stay: bool,
    now: Instant,
    endpoints: BTreeMap<u16, ModelEndpoint>,
    sessions: BTreeMap<u8, ModelSession>,
    held: Vec<Held>,
}

#[derive(Clone, Debug, Default)]
struct ModelEndpoint {
    configured: bool,
    drained: bool,
    /// `None` until the first answer; then the standing and the answers in a row against it.
    health: Option<(bool, u32)>,
    proven: bool,
}

#[derive(Clone, Debug)]
struct ModelSession {
    port: u16,
    confirmed: bool,
    settled: bool,
    credit_until: Option<Instant>,
}

struct Held {
    grant: Grant,
    port: u16,
    starts: bool,
    session: Option<u8>,
    tried: Vec<u16>,
}

impl Model {
    fn apply(&mut self, plan: &Plan) {
        self.plan = plan.clone();
        for (place, port) in plan.ports.iter().zip(1..) {
            let configured = place.is_some();
            if configured {
                self.endpoints.entry(port).or_default().configured = true;
            } else if let Some(endpoint) = self.endpoints.get_mut(&port) {
                endpoint.configured = false;
            }
        }
        self.forget_the_gone();
    }

    /// A removed endpoint without exchanges is gone: what was known of it is void, should it come back.
    fn forget_the_gone(&mut self) {
        for (port, endpoint) in &mut self.endpoints {
            if !endpoint.configured && self.held.iter().all(|held| held.port != *port) {
                *endpoint = ModelEndpoint::default();
            }
        }
    }

    fn gone(&self, port: u16) -> bool {
        !self.endpoints[&port].configured && self.held.iter().all(|held| held.port != port)
    }

    fn probe(&mut self, port: u16, healthy: bool) {
        // Nobody listens to answers about what is gone and has no session; with one they change nothing either.
        if !self.endpoints.contains_key(&port) || self.gone(port) {
            return;
        }
        let Some(endpoint) = self.endpoints.get_mut(&port) else { return };
        endpoint.health = Some(match endpoint.health {
            None => (healthy, 0),
            Some((standing, _)) if standing == healthy => (standing, 0),
            Some((true, against)) => {
                if against + 1 == 3 {
                    (false, 0)
                } else {
                    (true, against + 1)
                }
            }
            Some((false, against)) => {
                if !endpoint.proven || against + 1 == 2 {
                    (true, 0)
                } else {
                    (false, against + 1)
                }
            }
        });
        endpoint.proven |= endpoint.health == Some((true, 0));
    }

    fn outstanding(&self, port: u16) -> u32 {
        self.held.iter().filter(|held| held.starts && held.port == port).count() as u32
    }

    fn open(&self, port: u16) -> u32 {
        self.held.iter().filter(|held| !held.starts && held.port == port).count() as u32
    }

    fn credit(&self, port: u16) -> u32 {
        let weighs = |session: &&ModelSession| {
            session.port == port && session.credit_until.is_some_and(|until| until > self.now)
        };
        self.sessions.values().filter(weighs).count() as u32
    }

    fn works(&self, session: u8, port: u16) -> bool {
        self.held.iter().any(|held| held.starts && held.port == port && held.session == Some(session))
    }

    fn ready(&self, port: u16) -> bool {
        let endpoint = &self.endpoints[&port];
        endpoint.configured && !endpoint.drained && endpoint.health.is_some_and(|(healthy, _)| healthy)
    }

    fn lost(&self, port: u16) -> bool {
        self.gone(port) || self.endpoints[&port].health.is_some_and(|(healthy, _)| !healthy)
    }

    fn draining(&self, port: u16) -> bool {
        !self.endpoints[&port].configured || self.endpoints[&port].drained
    }

    fn place(&self, port: u16) -> (bool, u32, Option<u32>) {
        self.plan.ports[port as usize - 1].expect("only asked for what is configured")
    }

    fn has_slot(&self, port: u16) -> bool {
        self.place(port).2.is_none_or(|max| self.outstanding(port) < max)
    }

    fn of_version(&self, version: &str) -> Vec<u16> {
        let ports = self.plan.ports.iter().zip(1..);
        ports
            .filter(|(place, _)| place.is_some_and(|place| place.0 == (version == "canary")))
            .map(|(_, port)| port)
            .collect()
    }

    fn any_ready(&self, version: &str) -> bool {
        self.of_version(version).into_iter().any(|port| self.ready(port))
    }

    /// A run was placed freely: on a ready endpoint with a slot, and on a least loaded one of its version.
    fn check_least(&self, port: u16, version: &str, tried: &[u16]) {
        assert!(self.ready(port) && self.has_slot(port), "{port} takes no runs now");
        let load = |port: u16| {
            let (_, weight, _) = self.place(port);
            (u64::from(self.outstanding(port) + self.credit(port) + 1), u64::from(weight))
        };
        let (mine, my_weight) = load(port);
        for other in self.of_version(version) {
            if self.ready(other) && self.has_slot(other) && !tried.contains(&other) {
                let (its, its_weight) = load(other);
                assert!(mine * its_weight <= its * my_weight, "{other} was less loaded than {port}");
            }
        }
    }

    fn compare(&self, world: &mut World) {
        let status = world.core.status(self.now);
        let mut seen = BTreeMap::new();
        for endpoint in status.versions.iter().flat_map(|version| &version.endpoints) {
            let port = port_of(&endpoint.address);
            let counts = (endpoint.outstanding_runs, endpoint.open_exchanges);
            assert_eq!(counts, (self.outstanding(port), self.open(port)), "counts of {port}");
            assert_eq!(endpoint.state == EndpointState::Ready, self.ready(port), "readiness of {port}");
            seen.insert(port, ());
        }
        for port in self.endpoints.keys() {
            assert_eq!(seen.contains_key(port), !self.gone(*port), "{port} is shown while it is there");
        }
        let mut found = Vec::new();
        world.core.scan_sessions(None, 0, u32::MAX, usize::MAX, &mut found, self.now);
        let found: BTreeMap<u8, u16> =
            found.iter().map(|session| (session.key.parse().expect("a number"), port_of(&session.endpoint))).collect();
        let expected: BTreeMap<u8, u16> =
            self.sessions.iter().map(|(session, pinned)| (*session, pinned.port)).collect();
        assert_eq!(found, expected, "sessions and their homes");
    }

    fn pick(&mut self, world: &mut World, session: Option<u8>, starts: bool) {
        let key = session.map(|session| key(&session.to_string()));
        let kind = if starts { Kind::Start } else { Kind::Other };
        let picked = world.ask(Ask::new(kind, key.as_ref()));
        let known = session.and_then(|session| self.sessions.get(&session).cloned());
        let must_leave = |pinned: &ModelSession| {
            !self.works(session.unwrap_or_default(), pinned.port)
                && (self.lost(pinned.port) || (starts && !self.stay && self.draining(pinned.port)))
        };
        let grant = match picked {
            Ok(grant) => grant,
            Err(Unplaced::PinnedFull(_)) => {
                let pinned = known.expect("only a pin can be full");
                let full = !self.endpoints[&pinned.port].configured || !self.has_slot(pinned.port);
                assert!(starts && full);
                return;
            }
            Err(Unplaced::Full(_)) => {
                assert!(starts);
                assert!(known.as_ref().is_none_or(must_leave));
                let full = |version: &str| {
                    self.any_ready(version)
                        && self.of_version(version).into_iter().all(|port| !self.ready(port) || !self.has_slot(port))
                };
                assert!(full("stable") || full("canary"));
                if session.is_none() {
                    let open =
                        |version: &str| self.plan.weight_of(version) > 0 && self.any_ready(version) && !full(version);
                    assert!(!open("stable") && !open("canary"), "a run without a session takes any slot");
                }
                return;
            }
            Err(Unplaced::Empty) => {
                assert!(known.as_ref().is_none_or(|pinned| self.lost(pinned.port)));
                for version in ["stable", "canary"] {
                    assert!(self.plan.weight_of(version) == 0 || !self.any_ready(version), "{version} was there");
                }
                return;
            }
            Err(Unplaced::Lost) => panic!("when_lost is rebind"),
            Err(Unplaced::Bound(_)) => panic!("no session here is bound to its endpoint"),
        };
        let port = world.port(&grant);
        let version = world.version(&grant);
        match (grant.affinity(), known) {
            (AffinityOutcome::None, _) => assert_eq!(session, None),
            (AffinityOutcome::New, None) => {}
            (AffinityOutcome::Hit, Some(pinned)) => {
                assert_eq!(port, pinned.port, "a pin holds");
                let nowhere_else = ["stable", "canary"]
                    .iter()
                    .all(|version| !self.any_ready(version) || self.plan.weight_of(version) == 0);
                assert!(!must_leave(&pinned) || (nowhere_else && !self.lost(port)));
            }
            (AffinityOutcome::Moved, Some(pinned)) => {
                assert!(must_leave(&pinned) && !self.lost(pinned.port) && starts);
            }
            (AffinityOutcome::Lost, Some(pinned)) => assert!(must_leave(&pinned) && self.lost(pinned.port)),
            (outcome, known) => panic!("{outcome:?} for {known:?}"),
        }
        let placed = grant.affinity() != AffinityOutcome::Hit;
        if placed {
            assert!(self.ready(port));
            if starts {
                self.check_least(port, &version, &[]);
            }
        }
        if matches!(grant.affinity(), AffinityOutcome::None | AffinityOutcome::New) {
            assert!(self.plan.weight_of(&version) > 0);
        }
        if let Some(session) = session {
            let credit_until = Some(self.now + Duration::from_secs(10));
            let pinned = self.sessions.entry(session).or_insert(ModelSession {
                port,
                confirmed: false,
                settled: false,
                credit_until: None,
            });
            if placed {
                pinned.port = port;
                pinned.settled = false;
            }
            if starts {
                pinned.credit_until = None;
            } else if placed {
                pinned.credit_until = credit_until;
            }
        }
        self.held.push(Held { grant, port, starts, session, tried: Vec::new() });
    }

    fn finish(&mut self, world: &mut World, which: usize, confirm: bool) {
        if self.held.is_empty() {
            return;
        }
        let held = self.held.swap_remove(which % self.held.len());
        if confirm {
            world.core.confirm(&held.grant, self.now);
        }
        if let Some(session) = held.session {
            let pinned = self.sessions.get_mut(&session).expect("a busy session is kept");
            if confirm {
                pinned.confirmed = true;
                pinned.settled |= pinned.port == held.port;
            }
            let busy = self.held.iter().any(|other| other.session == Some(session));
            if !busy && !pinned.confirmed {
                self.sessions.remove(&session);
            }
        }
        world.finish(held.grant);
        self.forget_the_gone();
    }

    fn retry(&mut self, world: &mut World, which: usize) {
        if self.held.is_empty() {
            return;
        }
        let which = which % self.held.len();
        let before = self.held[which].port;
        let pinned = self.held[which].session.map(|session| self.sessions[&session].clone());
        let result = world.core.retry(&mut self.held[which].grant, self.now, 0);
        let Ok(target) = result else {
            let home = pinned.is_some_and(|pinned| pinned.settled && pinned.port == before);
            assert!(!home, "at home it may always try again");
            return;
        };
        let port = port_of(&target.address);
        if let Some(pinned) = &pinned
            && pinned.settled
        {
            assert_eq!(port, pinned.port, "a confirmed pin stays");
        } else {
            assert!(port != before && !self.held[which].tried.contains(&port), "never one tried before");
            if self.held[which].starts && pinned.as_ref().is_none_or(|pinned| pinned.port == before) {
                // The slot that is handed over counted at the old endpoint, which is out of the comparison.
                let mut tried = self.held[which].tried.clone();
                tried.push(before);
                self.check_least(port, &target.version, &tried);
            }
        }
        if port != before {
            self.held[which].tried.push(before);
            self.held[which].port = port;
            if let Some(session) = self.held[which].session {
                let pinned = self.sessions.get_mut(&session).expect("a busy session is kept");
                if !pinned.settled && pinned.port == before {
                    pinned.port = port;
                }
            }
        }
        self.forget_the_gone();
    }

    fn learn(&mut self, world: &mut World, which: usize, session: u8) {
        if self.held.is_empty() {
            return;
        }
        let which = which % self.held.len();
        // Aliases have their own test; here they would only blur whose key is whose.
        if self.held[which].session.is_some() {
            return;
        }
        world.core.learn(&mut self.held[which].grant, &key(&session.to_string()), self.now);
        if self.sessions.contains_key(&session) {
            return;
        }
        let held = &mut self.held[which];
        held.session = Some(session);
        let credit_until = (!held.starts).then_some(self.now + Duration::from_secs(10));
        let pinned = ModelSession { port: held.port, confirmed: true, settled: true, credit_until };
        self.sessions.insert(session, pinned);
    }

    fn step(&mut self, world: &mut World, event: &Event) {
        match event {
            Event::Pick { session, starts } => self.pick(world, *session, *starts),
            Event::Finish { which, confirm } => self.finish(world, *which, *confirm),
            Event::Retry { which } => self.retry(world, *which),
            Event::Learn { which, session } => self.learn(world, *which, *session),
            Event::Drain { port, on } => {
                let known = self.endpoints.get(port).is_some_and(|endpoint| endpoint.configured);
                let address = support::url(*port).address();
                assert_eq!(world.core.set_drained(&address, *on, self.now), known);
                if let Some(endpoint) = self.endpoints.get_mut(port).filter(|_| known) {
                    endpoint.drained = *on;
                }
            }
            Event::Probe { port, healthy } => {
                world.probe(*port, *healthy);
                self.probe(*port, *healthy);
            }
            Event::Apply { plan } => {
                world.apply(&plan.fleet(self.stay));
                self.apply(plan);
            }
            Event::Wait { milliseconds } => {
                world.wait(Duration::from_millis(*milliseconds));
                self.now = world.now;
                world.core.tick(self.now);
            }
        }
        self.compare(world);
    }
}

/// Its endpoint works on, and was never asked to stop: nobody may be told that it was.
#[test]
fn a_run_that_is_never_named_could_not_be_cancelled() {
    let mut world = World::new(&Fleet::new().version("stable", 1, [place(1)]));
    let about = About { protocol: protocols::by_name("langgraph"), base: Box::from(""), goes_on: true };
    let id = RunId::generate();
    let ask = Ask { about: Some(&about), ..Ask::new(Kind::Start, None) };
    let grant = world.core.pick(ask, Some(id), world.now, 0).expect("a place");
    let mut ended = Vec::new();
    let asked = world.core.cancel_by_id(id, &mut ended, world.now);
    let Some((Ending::Open(stop), None)) = asked else { panic!("it has no name") };
    assert_eq!((world.core.ending(id, &stop), stop.outcome()), (None, None));
    world.now += Duration::from_secs(11);
    assert!(world.core.due_runs(10, &mut ended, world.now).is_empty(), "there is no call");
    assert_eq!(stop.outcome(), Some(RunOutcome::Cancelled), "what carries it closes");
    assert_eq!(world.core.ending(id, &stop), None, "until then it counts");
    world.core.finish(grant, Finish::Left, world.now);
    assert_eq!(world.core.ending(id, &stop), Some(CancelReport::Impossible));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// For any order of picks, ends, retries, drains, probes and reloads.
    #[test]
    fn the_core_does_as_the_naive_model(
        plan in plans(),
        stay: bool,
        healthy: bool,
        events in prop::collection::vec(events(), 1..150),
    ) {
        let mut world = World::new(&plan.fleet(stay));
        let mut model = Model {
            plan: plan.clone(),
            stay,
            now: world.now,
            endpoints: BTreeMap::new(),
            sessions: BTreeMap::new(),
            held: Vec::new(),
        };
        model.apply(&plan);
        if healthy {
            for port in 1..=PORTS as u16 {
                model.step(&mut world, &Event::Probe { port, healthy: true });
            }
        }
        for event in &events {
            model.step(&mut world, event);
        }
        while !model.held.is_empty() {
            model.step(&mut world, &Event::Finish { which: 0, confirm: true });
        }
        prop_assert_eq!(world.core.status(world.now).outstanding_runs, 0);
        world.wait(Duration::from_secs(2 * 3600));
        world.core.expire(usize::MAX, world.now);
        prop_assert_eq!(world.sessions(), 0);
    }

    /// Starts alone, on equal and idle endpoints, never differ by more than one.
    #[test]
    fn starts_alone_lie_evenly(endpoints in 1..40_u16, starts in 0..200_u32) {
        let mut world = World::new(&fleet(1..=endpoints));
        let mut counts = vec![0_u32; endpoints as usize];
        for _ in 0..starts {
            let grant = world.core_start();
            counts[world.port(&grant) as usize - 1] += 1;
            let least = counts.iter().min().copied().unwrap_or_default();
            let most = counts.iter().max().copied().unwrap_or_default();
            prop_assert!(most - least <= 1, "{:?}", counts);
        }
    }

    /// Raising one version's weight only moves keys to it, lowering one only moves keys away from it.
    #[test]
    fn cohorts_are_monotone(
        weights in prop::collection::vec(0..1_000_u32, 2..6),
        which: prop::sample::Index,
        more in 1..1_000_u32,
        keys in prop::collection::vec("[a-z0-9-]{1,40}", 50),
    ) {
        let which = which.index(weights.len());
        let mut raised = weights.clone();
        raised[which] += more;
        for key in &keys {
            let (before, after) = (cohort_of(key, &weights), cohort_of(key, &raised));
            prop_assert!(before == after || after == Some(which), "{:?} to {:?}", before, after);
        }
    }
}

fn cohort_of(key: &str, weights: &[u32]) -> Option<usize> {
    let names: Vec<String> = (0..weights.len()).map(|index| format!("v{index}")).collect();
    let candidates = names.iter().zip(weights).zip(0..).map(|((name, weight), index)| balance::Candidate {
        index,
        hash: balance::version_hash(name),
        name,
        weight: u64::from(*weight),
    });
    balance::rendezvous(balance::cohort(key), candidates).map(|index| index as usize)
}
