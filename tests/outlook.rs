//! Outlook: what a look at the status, and the question what a rollout would cut, cost everybody else while many runs are
//! outstanding: the lock of the service is held for steps, and what is told is the same as in one.

#[path = "support/placement.rs"]
#[expect(dead_code, reason = "other tests need all of it")]
mod support;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use longhaul::ids::{self, RunId};
use longhaul::state::Kind;
use longhaul::state::core::{Core, Finish, Grant, Outlook};
use longhaul::state::dispatcher::{Ask, Dispatcher, Picked};
use longhaul::state::{RunOutcome, core};
use support::{Fleet, place};

/// As the dispatcher's.
const STEP: u32 = 1024;
const ENDPOINTS: u16 = 10;

fn fleet() -> Fleet {
    Fleet::new().version("stable", 1, (1..=ENDPOINTS).map(place))
}

/// A service with so many runs, one a second, half of whose endpoints drain.
fn busy(runs: usize, mut now: Instant) -> (Core, Vec<Grant>, Instant) {
    let mut core = Core::new(support::SERVICE);
    core.apply(fleet().settings(), now);
    let start = |core: &mut Core, now| {
        core.pick(Ask::new(Kind::Start, None), Some(RunId::generate()), now, 0).expect("there is room")
    };
    for _ in 0..1000 {
        let grant = start(&mut core, now);
        now += Duration::from_millis(500);
        core.finish(grant, Finish::Ended(RunOutcome::Completed), now);
    }
    let mut grants = Vec::new();
    for _ in 0..runs {
        grants.push(start(&mut core, now));
        now += Duration::from_millis(1);
    }
    for port in 1..=ENDPOINTS / 2 {
        assert!(core.set_drained(&format!("127.0.0.1:{port}"), true, now));
    }
    (core, grants, now)
}

fn in_steps(core: &Core, step: u32, now: Instant, mut taken: impl FnMut(Duration)) -> Outlook {
    let mut timed = |began: Instant| taken(ids::now() - began);
    let began = ids::now();
    let mut outlook = core.begin_outlook();
    timed(began);
    let mut from = Some(0);
    while let Some(slot) = from {
        let began = ids::now();
        from = core.look_at_runs(&mut outlook, slot, step, now);
        timed(began);
    }
    outlook.conclude();
    outlook
}

#[test]
fn steps_tell_what_one_look_tells() {
    let (mut core, grants, now) = busy(3000, ids::now());
    let whole = core.outlook(now);
    for step in [1, 7, 1000, 3000, STEP] {
        let stepwise = in_steps(&core, step, now, |_| {});
        for (number, has_runs) in core.draining() {
            assert!(has_runs);
            assert_eq!(stepwise.empty_in(number), whole.empty_in(number));
        }
        let roll = |core: &mut Core, outlook: &Outlook| {
            core.safe_to_roll(None, Some(Duration::from_secs(1)), 0.95, now).expect("all").estimated(outlook)
        };
        let report = roll(&mut core, &stepwise);
        assert_eq!(report, roll(&mut core, &whole));
        assert_eq!((report.outstanding_runs, report.safe, report.endpoints.len()), (3000, false, 10));
        assert!(report.expected_cut_runs > 0.0 && report.expected_cut_runs < 3000.0, "{report:?}");
    }
    let status = core.status(now);
    let drains: Vec<_> =
        status.versions.iter().flat_map(|it| &it.endpoints).filter_map(|it| it.drain.as_ref()).collect();
    assert_eq!(drains.len(), 5);
    assert!(drains.iter().all(|drain| drain.empty_in.p95_ms > drain.empty_in.p50_ms), "{drains:?}");
    drop(grants);
}

#[test]
fn a_dispatcher_tells_the_same() {
    let now = ids::now();
    let dispatcher = Dispatcher::new(support::SERVICE, support::service_metrics());
    dispatcher.apply(fleet().settings(), now);
    let start = || dispatcher.pick(Ask::new(Kind::Start, None), now, 0).ok().and_then(Picked::placed).expect("room");
    let placed: Vec<_> = (0..2500).map(|_| start()).collect();
    assert!(dispatcher.drain_endpoint("127.0.0.1:3", now));
    let later = now + Duration::from_secs(2);
    let status = dispatcher.status(later);
    let endpoints = || status.versions.iter().flat_map(|version| &version.endpoints);
    let drain = endpoints().find_map(|endpoint| endpoint.drain.clone()).expect("one drains");
    assert!(drain.empty_in.p95_ms.is_some_and(|p95| p95 > 2000), "{drain:?}");
    assert_eq!(dispatcher.runs(None, usize::MAX, later).len(), 2500);
    assert_eq!(dispatcher.runs(None, 2000, later).len(), 2000);
    let report = dispatcher.safe_to_roll(None, None, 0.95, later).expect("all");
    assert_eq!(report.outstanding_runs, 2500);
    drop(placed);
    let status = dispatcher.status(later);
    let drain = status.versions[0].endpoints.iter().find_map(|endpoint| endpoint.drain.clone()).expect("it drains");
    assert_eq!((drain.empty_in.p50_ms, drain.empty_in.p95_ms), (Some(0), Some(0)), "nothing is left");
}

/// Prints for how long the lock is held: `cargo test --release --test outlook -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, for release builds"]
fn the_lock_is_held_for_steps() {
    const RUNS: usize = 100_000;
    let (mut core, grants, now) = busy(RUNS, ids::now());
    let mut best: HashMap<&str, Duration> = HashMap::new();
    let mut note = |what: &'static str, took: Duration| {
        let known = best.entry(what).or_insert(took);
        *known = took.min(*known);
    };
    for _ in 0..20 {
        let began = ids::now();
        drop(core.status(now));
        note("status in one hold", ids::now() - began);
        let began = ids::now();
        let outlook = core.outlook(now);
        let rolling: Option<core::Rolling> = core.safe_to_roll(None, None, 0.95, now);
        drop(rolling.map(|rolling| rolling.estimated(&outlook)));
        note("safe-to-roll in one hold", ids::now() - began);

        let mut longest = Duration::ZERO;
        let outlook = in_steps(&core, STEP, now, |took| longest = longest.max(took));
        let estimates: HashMap<_, _> =
            core.draining().into_iter().map(|(number, _)| (number, outlook.empty_in(number))).collect();
        let began = ids::now();
        drop(core.status_by(&estimates, now));
        note("status, its longest hold", longest.max(ids::now() - began));
        let began = ids::now();
        drop(core.safe_to_roll(None, None, 0.95, now));
        note("safe-to-roll, its longest hold", longest.max(ids::now() - began));
    }
    println!("{RUNS} runs: {best:#?}");
    drop(grants);
}
