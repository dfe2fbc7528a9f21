//! Discovered endpoints in the live state: whatever order changes and reloads come in, exactly those that are ready get
//! what is new. Driven without sockets and with time as an argument.

#[expect(dead_code, reason = "only the dispatcher has metrics")]
#[path = "support/placement.rs"]
mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use longhaul::config::WhenDraining;
use longhaul::ids::{self, RunId};
use longhaul::state::core::{Core, Finish, Grant};
use longhaul::state::discovery::{Change, Discovered, OfSources, Origin, Readiness};
use longhaul::state::dispatcher::Ask;
use longhaul::state::status::EndpointState;
use longhaul::state::{Kind, RunOutcome, TargetSettings};
use proptest::prelude::*;
use support::{Fleet, key};

const VERSIONS: [&str; 2] = ["stable", "canary"];

#[derive(Clone, Debug)]
enum Step {
    Put { version: usize, port: u16, life: u8, readiness: Readiness },
    Remove { port: u16, life: u8, lost: bool },
    Reload { versions: usize },
    Start { session: u8 },
    Finish { which: usize },
    Tick,
}

fn step() -> impl Strategy<Value = Step> {
    let readiness =
        prop_oneof![3 => Just(Readiness::Ready), 1 => Just(Readiness::NotReady), 1 => Just(Readiness::Draining)];
    prop_oneof![
        6 => (0usize..2, 1u16..5, 0u8..2, readiness)
            .prop_map(|(version, port, life, readiness)| Step::Put { version, port, life, readiness }),
        3 => (1u16..5, 0u8..2, any::<bool>()).prop_map(|(port, life, lost)| Step::Remove { port, life, lost }),
        1 => (1usize..=2).prop_map(|versions| Step::Reload { versions }),
        6 => (0u8..6).prop_map(|session| Step::Start { session }),
        4 => any::<usize>().prop_map(|which| Step::Finish { which }),
        1 => Just(Step::Tick),
    ]
}

fn uid(life: u8) -> String {
    format!("life-{life}")
}

fn discovered(version: usize, port: u16, life: u8, readiness: Readiness) -> Discovered {
    let fleet = Fleet::new().version(VERSIONS[version], 1, [support::place(port)]);
    let settings = fleet.settings().targets.remove(0).remove(0);
    Discovered {
        settings: TargetSettings { uid: Some(uid(life).into()), ..settings },
        weight: 1,
        max_runs: None,
        readiness,
        origin: Origin { source: "test".into(), pod: None, zone: None },
    }
}

fn identity(port: u16, life: u8) -> String {
    longhaul::state::identity(&support::url(port), Some(&uid(life)))
}

/// What is listed: by port and life, its version and readiness.
type Listed = BTreeMap<(u16, u8), (usize, Readiness)>;

fn reload(core: &mut Core, versions: usize, listed: &Listed, when_draining: WhenDraining, now: Instant) {
    let mut fleet = Fleet::new().with(|service| service.session.when_draining = when_draining);
    for name in &VERSIONS[..versions] {
        fleet = fleet.version(name, 1, []);
    }
    let mut settings = fleet.settings();
    settings.discovered = (0..versions)
        .map(|version| OfSources {
            found: listed
                .iter()
                .filter(|(_, (of, _))| *of == version)
                .map(|((port, life), (_, readiness))| discovered(version, *port, *life, *readiness))
                .collect(),
            awaited: false,
        })
        .collect();
    core.apply(settings, now);
}

proptest! {
    #[test]
    fn exactly_those_who_are_ready_get_what_is_new(
        steps in proptest::collection::vec(step(), 1..80),
        stay in any::<bool>(),
    ) {
        let when_draining = if stay { WhenDraining::Stay } else { WhenDraining::MoveIdle };
        let mut now = ids::now();
        let mut core = Core::new(support::SERVICE);
        let (mut listed, mut versions) = (Listed::new(), 2);
        reload(&mut core, versions, &listed, when_draining, now);
        let mut grants: Vec<Grant> = Vec::new();
        for step in steps {
            now += Duration::from_millis(10);
            match step {
                Step::Put { version, port, life, readiness } if version < versions => {
                    listed.insert((port, life), (version, readiness));
                    let found = discovered(version, port, life, readiness);
                    core.discover(VERSIONS[version], vec![Change::Put(Box::new(found))], now);
                }
                Step::Put { .. } => {}
                Step::Remove { port, life, lost } => {
                    if let Some((version, _)) = listed.remove(&(port, life)) {
                        let identity = identity(port, life).into();
                        core.discover(VERSIONS[version], vec![Change::Remove { identity, lost }], now);
                    }
                }
                Step::Reload { versions: next } => {
                    versions = next;
                    listed.retain(|_, (version, _)| *version < versions);
                    reload(&mut core, versions, &listed, when_draining, now);
                }
                Step::Start { session } => {
                    let session = format!("session-{session}");
                    let placed = core.pick(Ask::new(Kind::Start, Some(&key(&session))), Some(RunId::generate()), now, 0);
                    let is_ready = |target: &longhaul::state::Target| {
                        listed.iter().any(|((port, life), (version, readiness))| {
                            *readiness == Readiness::Ready
                                && target.identity() == identity(*port, *life)
                                && &*target.version == VERSIONS[*version]
                        })
                    };
                    match placed {
                        Ok(grant) => {
                            let target = core.target(&grant);
                            let is_new = grant.affinity().as_str() != "hit";
                            prop_assert!(!is_new || is_ready(&target), "{} gets a new session", target.identity());
                            grants.push(grant);
                        }
                        Err(_) => {
                            let some = listed.values().any(|(_, readiness)| *readiness == Readiness::Ready);
                            prop_assert!(!some, "somebody is ready, and yet nothing is placed");
                        }
                    }
                }
                Step::Finish { which } if !grants.is_empty() => {
                    let grant = grants.swap_remove(which % grants.len());
                    core.confirm(&grant, now);
                    core.finish(grant, Finish::Ended(RunOutcome::Completed), now);
                }
                Step::Finish { .. } => {}
                Step::Tick => core.tick(now),
            }
            let status = core.status(now);
            let mut ready: Vec<(String, String)> = Vec::new();
            for version in &status.versions {
                for endpoint in version.endpoints.iter().filter(|endpoint| endpoint.state == EndpointState::Ready) {
                    ready.push((version.name.clone(), endpoint.address.clone()));
                }
            }
            let mut wanted: Vec<(String, String)> = listed
                .iter()
                .filter(|(_, (_, readiness))| *readiness == Readiness::Ready)
                .map(|((port, _), (version, _))| (VERSIONS[*version].to_owned(), support::url(*port).address()))
                .collect();
            ready.sort();
            wanted.sort();
            prop_assert_eq!(ready, wanted);
            let outstanding: u64 = status.versions.iter().map(|version| version.outstanding_runs).sum();
            prop_assert_eq!(outstanding, grants.len() as u64, "every run is counted once");
        }
        for grant in grants {
            core.finish(grant, Finish::Ended(RunOutcome::Completed), now);
        }
        prop_assert_eq!(core.status(now).outstanding_runs, 0);
    }
}
