//! Image: what another process goes on with, driven without sockets and with time as an argument.

#[path = "support/placement.rs"]
#[expect(dead_code, reason = "other tests need all of it")]
mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use longhaul::ids::{self, RunId};
use longhaul::protocols::{self, Fact};
use longhaul::rollout::{Moment, Place as Step};
use longhaul::state::core::{Core, Finish, Restored};
use longhaul::state::dispatcher::Ask;
use longhaul::state::image::{Place, RunsTaken, ServiceImage};
use longhaul::state::runs::About;
use longhaul::state::sessions::SessionKey;
use longhaul::state::{AffinityOutcome, Kind, RunOutcome, TargetSettings};
use proptest::prelude::*;
use support::{Fleet, key, place};

const HOUR: Duration = Duration::from_secs(3600);

fn core(fleet: &Fleet, now: Instant, wall: Moment) -> Core {
    let mut core = Core::new(support::SERVICE);
    core.set_wall_clock(now, wall);
    core.apply(fleet.settings(), now);
    core
}

fn serve(core: &mut Core, session: &str, now: Instant) -> (String, AffinityOutcome) {
    let grant =
        core.pick(Ask::new(Kind::Start, Some(&key(session))), Some(RunId::generate()), now, 0).expect("a place");
    let place = (core.target(&grant).address.to_string(), grant.affinity());
    core.confirm(&grant, now);
    core.finish(grant, Finish::Ended(RunOutcome::Completed), now);
    place
}

/// Starts a run that its protocol can be asked about, and lets go of it.
fn leave_run(core: &mut Core, session: &str, run: &str, now: Instant) -> String {
    let about = About { protocol: protocols::by_name("langgraph"), base: Box::from(""), goes_on: true };
    let key = key(session);
    let ask = Ask { about: Some(&about), ..Ask::new(Kind::Start, Some(&key)) };
    let mut grant = core.pick(ask, Some(RunId::generate()), now, 0).expect("a place");
    let address = core.target(&grant).address.to_string();
    core.confirm(&grant, now);
    core.tell(&mut grant, &mut vec![Fact::Run(run.to_owned())], None, &about, &mut Vec::new(), now);
    core.finish(grant, Finish::Left, now);
    address
}

/// As control describes an endpoint that the configuration no longer names.
fn unnamed(place: &Place) -> Option<TargetSettings> {
    let port = place.endpoint.rsplit(':').next()?.parse().ok()?;
    let fleet = Fleet::new().version(&place.version, 1, [support::place(port)]);
    fleet.settings().targets.into_iter().flatten().next()
}

/// As another process reads it.
fn passed_on(image: &ServiceImage) -> ServiceImage {
    serde_json::from_str(&serde_json::to_string(image).expect("JSON")).expect("the same shape")
}

#[test]
fn pins_runs_and_drains_go_on_in_another_process() {
    let fleet = Fleet::new().version("stable", 1, [place(1), place(2), place(3)]);
    let (now, wall) = (ids::now(), Moment(1_000_000_000_000));
    let mut first = core(&fleet, now, wall);
    let places: BTreeMap<String, String> =
        (0..30).map(|n| format!("session-{n}")).map(|name| (name.clone(), serve(&mut first, &name, now).0)).collect();
    let mut grant = first.pick(Ask::new(Kind::Other, Some(&key("session-0"))), None, now, 0).expect("a place");
    first.learn(&mut grant, &key("another name"), now);
    first.finish(grant, Finish::Left, now);
    // Nobody has answered this one with success: its pin lives as long as its exchange.
    let _open = first.pick(Ask::new(Kind::Other, Some(&key("tentative"))), None, now, 0).expect("a place");
    let where_it_runs = leave_run(&mut first, "worker", "thread-1/run-1", now);
    assert!(first.set_drained("127.0.0.1:1", true, now));
    let image = passed_on(&first.image(RunsTaken::Lasting, now));

    // A minute later, and the second process counts its own time.
    let (later, wall) = (now + HOUR, Moment(wall.0 + 60_000));
    let mut second = core(&fleet, later, wall);
    let restored = second.restore(image.clone(), &unnamed, later);
    assert_eq!(restored, Restored { pins: 31, dropped: 1, runs: 1 });
    for (name, address) in &places {
        let grant = second.pick(Ask::new(Kind::Other, Some(&key(name))), None, later, 0).expect("a place");
        assert_eq!((&*second.target(&grant).address, grant.affinity()), (&**address, AffinityOutcome::Hit), "{name}");
        second.finish(grant, Finish::Left, later);
    }
    let alias = second.pick(Ask::new(Kind::Other, Some(&key("another name"))), None, later, 0).expect("a place");
    assert_eq!(&*second.target(&alias).address, places["session-0"]);
    second.finish(alias, Finish::Left, later);

    let runs = second.runs(None, 10, later);
    assert_eq!((runs.len(), runs[0].endpoint.as_str(), runs[0].carriers), (1, where_it_runs.as_str(), 0));
    assert_eq!(runs[0].age_ms, 60_000, "it began in the first process");
    assert_eq!(runs[0].session.as_deref(), Some("worker"));
    let mut ended = Vec::new();
    let calls = second.due_runs(10, &mut ended, later);
    assert_eq!((calls.len(), ended.len()), (1, 0), "it is asked about at once");

    // New sessions avoid the drained endpoint, and those that are there leave it.
    assert!((0..10).all(|n| serve(&mut second, &format!("new-{n}"), later).0 != "127.0.0.1:1"));
    let there = places.iter().find(|(_, address)| *address == "127.0.0.1:1").expect("one of thirty").0;
    assert_eq!(serve(&mut second, there, later).1, AffinityOutcome::Moved);
    assert_eq!(second.image(RunsTaken::Lasting, later).drains, image.drains);
}

#[test]
fn what_the_configuration_no_longer_names_drains_and_its_pins_are_lost_then() {
    let fleet = Fleet::new().version("stable", 1, [place(1), place(2)]);
    let (now, wall) = (ids::now(), Moment(1_000_000_000_000));
    let mut first = core(&fleet, now, wall);
    let names: Vec<String> = (0..20).map(|n| format!("session-{n}")).collect();
    for name in &names {
        serve(&mut first, name, now);
    }
    let where_it_runs = leave_run(&mut first, "worker", "thread-1/run-1", now);
    let image = first.image(RunsTaken::Lasting, now);

    let left = if where_it_runs == "127.0.0.1:1" { 2 } else { 1 };
    let mut second = core(&Fleet::new().version("stable", 1, [place(left)]), now, wall);
    assert_eq!(second.restore(image, &unnamed, now), Restored { pins: 21, dropped: 0, runs: 1 });
    // Its run is still followed to where it is.
    let worker = key("worker");
    let follow = Ask { run: Some("thread-1/run-1"), ..Ask::new(Kind::Join, Some(&worker)) };
    let grant = second.pick(follow, None, now, 0).expect("its place");
    assert_eq!(*second.target(&grant).address, *where_it_runs);
    second.finish(grant, Finish::Ended(RunOutcome::Completed), now);
    let outcomes: Vec<AffinityOutcome> = names.iter().map(|name| serve(&mut second, name, now).1).collect();
    let lost = outcomes.iter().filter(|outcome| **outcome == AffinityOutcome::Lost).count();
    assert_eq!((lost, outcomes.len() - lost), (10, 10), "{outcomes:?}");
    second.forget_sessions(None, 0, u32::MAX, now);
    let endpoints = second.status(now).versions.iter().map(|version| version.endpoints.len()).sum::<usize>();
    assert_eq!(endpoints, 1, "nothing keeps the endpoint that is gone");
}

#[test]
fn pins_expire_by_the_time_that_has_passed_meanwhile() {
    let fleet = Fleet::new().version("stable", 1, [place(1)]);
    let (now, wall) = (ids::now(), Moment(1_000_000_000_000));
    let mut first = core(&fleet, now, wall);
    serve(&mut first, "old", now);
    let half = now + HOUR / 2;
    serve(&mut first, "young", half);
    let image = first.image(RunsTaken::Lasting, half);
    let mut second = core(&fleet, now, Moment(wall.0 + 3_601_000));
    assert_eq!(second.restore(image, &unnamed, now), Restored { pins: 1, dropped: 1, runs: 0 });
    assert_eq!(second.expire(10, now + HOUR / 2 - Duration::from_secs(10)), 0);
    assert_eq!(second.expire(10, now + HOUR / 2 + Duration::from_secs(10)), 1);
}

#[test]
fn a_rollout_resumes_unless_it_was_edited() {
    let plan = |shares: [f64; 2]| longhaul::config::Rollout {
        steps: shares.map(|share| longhaul::config::RolloutStep { share, hold: HOUR }).to_vec(),
        ..support_rollout()
    };
    let fleet = |shares| {
        let versions = Fleet::new().version("stable", 50, [place(1)]).version("canary", 50, [place(2)]);
        versions.with(|service| service.rollout = Some(plan(shares)))
    };
    let (now, wall) = (ids::now(), Moment(1_000_000_000_000));
    let mut first = core(&fleet([0.1, 0.5]), now, wall);
    first.steer_rollout(longhaul::rollout::Command::Promote, now).expect("a rollout").expect("followed");
    let image = passed_on(&first.image(RunsTaken::Lasting, now));
    let before = image.rollout.clone().expect("a rollout");
    assert_eq!(before.place(), Step::Running { step: 2 });

    // Before the first configuration, as at a start, and after it, as at a handover.
    let mut started = Core::new(support::SERVICE);
    started.set_wall_clock(now, wall);
    started.restore_rollout(before.clone(), now);
    started.apply(fleet([0.1, 0.5]).settings(), now);
    let mut took_over = core(&fleet([0.1, 0.5]), now, wall);
    took_over.restore(image.clone(), &unnamed, now);
    for core in [&mut started, &mut took_over] {
        assert_eq!(core.rollout(now), Some(&before));
    }
    assert!(started.take_transitions().is_empty(), "nothing is told twice");

    let mut edited = core(&fleet([0.2, 0.5]), now, wall);
    edited.restore(image, &unnamed, now);
    let rollout = edited.rollout(now).expect("a rollout");
    assert_eq!(rollout.place(), Step::Running { step: 1 });
    assert_eq!(rollout.history().count(), before.history().count() + 1, "its history goes on");
}

fn support_rollout() -> longhaul::config::Rollout {
    let judge = longhaul::config::Judge {
        min_runs: 1,
        max_failed: Some(0.5),
        failed_ratio: None,
        first_event_p95_ratio: None,
        duration_p95_ratio: None,
        confidence: 0.95,
    };
    longhaul::config::Rollout {
        from: "stable".to_owned(),
        to: "canary".to_owned(),
        steps: Vec::new(),
        judge,
        on_bad: longhaul::config::OnBad::Abort,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What a picture of the second process shows is what the first one's did.
    #[test]
    fn a_picture_of_a_picture_is_the_same(
        sessions in proptest::collection::vec((0..20_u8, any::<bool>(), 0..3000_u64, any::<bool>()), 1..60),
        gap in 0..500_u64,
    ) {
        let fleet = Fleet::new().version("stable", 3, [place(1), place(2)]).version("canary", 1, [place(3)]);
        let (mut now, wall) = (ids::now(), Moment(1_000_000_000_000));
        let start = now;
        let mut first = core(&fleet, now, wall);
        for (name, scoped, wait, alias) in sessions {
            now += Duration::from_millis(wait);
            let scope = scoped.then_some([name; 16]);
            let session = SessionKey { scope, text: format!("session-{name}").into() };
            let mut grant = first.pick(Ask::new(Kind::Other, Some(&session)), None, now, 0).expect("a place");
            if alias {
                let alias = SessionKey { scope, text: format!("alias-{name}-{wait}").into() };
                first.learn(&mut grant, &alias, now);
            }
            first.confirm(&grant, now);
            first.finish(grant, Finish::Left, now);
        }
        let before = first.image(RunsTaken::All, now);
        let elapsed = (now - start).as_millis() as u64;
        let mut second = core(&fleet, start, Moment(wall.0 + elapsed + gap));
        let restored = second.restore(passed_on(&before), &unnamed, start);
        prop_assert_eq!((restored.pins, restored.dropped), (before.pins.len(), 0));
        let after = second.image(RunsTaken::All, start);
        let shown = |image: &ServiceImage| {
            let mut pins: Vec<_> = image
                .pins
                .iter()
                .map(|pin| {
                    let mut aliases: Vec<_> = pin.aliases.iter().map(SessionKey::to_bytes).collect();
                    aliases.sort();
                    (pin.key.to_bytes(), aliases, image.places[pin.place as usize].clone().endpoint, pin.confirmed, pin.born.is_some())
                })
                .collect();
            pins.sort();
            pins
        };
        prop_assert_eq!(shown(&before), shown(&after));
        // Times are kept in steps of 10 ms, births in seconds.
        for (pin, other) in before.pins.iter().flat_map(|pin| after.pins.iter().find(|other| other.key == pin.key).map(|other| (pin, other))) {
            prop_assert!(pin.used.0.abs_diff(other.used.0) <= 20, "{} {}", pin.used.0, other.used.0);
            prop_assert!(pin.born.unwrap().0.abs_diff(other.born.unwrap().0) <= 2000);
        }
    }
}
