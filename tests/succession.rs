//! Succession: two dispatchers, one of which takes over from the other in the midst of things, without any socket.

#[path = "support/placement.rs"]
mod placement;

use std::collections::HashMap;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use longhaul::config;
use longhaul::ids::{self, RunId};
use longhaul::rollout::{Command as Steer, Place as Stands};
use longhaul::state::core::Finish;
use longhaul::state::dispatcher::{Ask, Dispatcher, Lease, Picked, Placed};
use longhaul::state::queue::Ticket;
use longhaul::state::succession::{Answer, Estate, Told};
use longhaul::state::waiting::Waiting;
use longhaul::state::{AffinityOutcome, Kind, Refusal, RunOutcome};
use placement::{Fleet, Place, key, place};
use tokio::sync::mpsc;

const MAX: u32 = 3;
const PORTS: [u16; 3] = [1, 2, 3];

fn fleet() -> Fleet {
    let places = PORTS.map(|port| Place { max_runs: Some(MAX), ..place(port) });
    Fleet::new().version("stable", 1, places).with(|service| service.runs.queue.max = 1000)
}

fn dispatcher(fleet: &Fleet, now: Instant) -> Arc<Dispatcher> {
    let dispatcher = Dispatcher::new(placement::SERVICE, placement::service_metrics());
    dispatcher.apply(fleet.settings(), now);
    dispatcher
}

fn poll(waiting: &mut Waiting) -> Option<Result<Placed, Refusal>> {
    match waiting.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(found) => Some(found),
        Poll::Pending => None,
    }
}

fn start<'a>(session: &'a longhaul::state::sessions::SessionKey) -> Ask<'a> {
    Ask::new(Kind::Start, Some(session))
}

fn outstanding(dispatcher: &Dispatcher, now: Instant) -> HashMap<String, u64> {
    let status = dispatcher.status(now);
    let endpoints = status.versions.iter().flat_map(|version| &version.endpoints);
    endpoints.map(|endpoint| (endpoint.address.to_string(), u64::from(endpoint.outstanding_runs))).collect()
}

/// Two processes, and what goes between them; a message takes the way over JSON, as it does in earnest.
struct Pair {
    old: Arc<Dispatcher>,
    new: Arc<Dispatcher>,
    told: mpsc::UnboundedReceiver<Told>,
    leases: HashMap<RunId, Lease>,
    waiting: HashMap<Ticket, Waiting>,
    now: Instant,
}

impl Pair {
    #[expect(clippy::disallowed_methods, reason = "a test sends as much as it likes")]
    fn hand_over(old: &Arc<Dispatcher>, fleet: &Fleet, now: Instant) -> Pair {
        let (to, told) = mpsc::unbounded_channel();
        let estate = old.hand_over(to, now);
        let estate: Estate = serde_json::from_str(&serde_json::to_string(&estate).expect("JSON")).expect("the same");
        let new = dispatcher(fleet, now);
        let leases = new.take_over(estate, &|_| None, now).into_iter().collect();
        old.retire(now);
        Pair { old: Arc::clone(old), new, told, leases, waiting: HashMap::new(), now }
    }

    /// Delivers everything, until nothing is on its way.
    fn settle(&mut self) {
        loop {
            let mut moved = false;
            while let Ok(told) = self.told.try_recv() {
                self.take(serde_json::from_str(&serde_json::to_string(&told).expect("JSON")).expect("the same"));
                moved = true;
            }
            let tickets: Vec<Ticket> = self.waiting.keys().copied().collect();
            for ticket in tickets {
                let found = self.waiting.get_mut(&ticket).and_then(poll);
                if let Some(found) = found {
                    self.waiting.remove(&ticket);
                    self.answer(ticket, found);
                    moved = true;
                }
            }
            if !moved {
                return;
            }
        }
    }

    fn take(&mut self, told: Told) {
        match told {
            Told::Asks { ticket, ask, .. } => match self.new.pick_for(&ask, self.now) {
                Ok(Picked::Placed(placed)) => self.answer(ticket, Ok(placed)),
                Ok(Picked::Waiting(waiting)) => drop(self.waiting.insert(ticket, waiting)),
                Err(refusal) => self.answer(ticket, Err(refusal)),
            },
            Told::Leaves { ticket, .. } => drop(self.waiting.remove(&ticket)),
            Told::Ended { run, outcome, .. } => {
                if let Some(mut lease) = self.leases.remove(&run) {
                    lease.outcome(outcome);
                }
            }
            Told::Left { run, .. } => {
                if let Some(mut lease) = self.leases.remove(&run) {
                    lease.finish(Finish::Left);
                }
            }
            Told::Started { run, place, .. } => self.leases.extend(self.new.adopt_run(*run, place, self.now)),
            Told::Named { run, key, .. } => self.new.adopt_name(run, &key, self.now),
            Told::Moved { run, endpoint, .. } => {
                if let Some(lease) = self.leases.get_mut(&run) {
                    lease.was_moved(&endpoint, self.now);
                }
            }
            Told::Says { endpoint, drains, .. } => self.new.adopt_says(&endpoint, drains, self.now),
            Told::Pinned { key, alias, endpoint, .. } => {
                self.new.adopt_pin(&key, alias.as_ref(), &endpoint, self.now);
            }
        }
    }

    fn answer(&mut self, ticket: Ticket, found: Result<Placed, Refusal>) {
        let service = placement::SERVICE.to_owned();
        let answer = match found {
            Ok(Placed { target, affinity, lease }) => {
                self.leases.extend(lease.run_id().map(|run| (run, lease)));
                Answer::Placed { service, ticket, endpoint: target.url.identity(), affinity }
            }
            Err(refusal) => Answer::Refused { service, ticket, refusal },
        };
        self.old.answered(answer, self.now);
    }
}

/// A small generator, so that a seed is the whole of a case.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % below as u64) as usize
    }
}

/// The runs of both processes as the agents see them.
#[derive(Default)]
struct Agents {
    running: Vec<(bool, Placed)>,
    waiting: Vec<(bool, String, Waiting)>,
    homes: HashMap<String, String>,
}

impl Agents {
    fn arrive(&mut self, of_old: bool, session: &str, placed: Placed, now: Instant) {
        let home = placed.target.address.to_string();
        let known = self.homes.entry(session.to_owned()).or_insert_with(|| home.clone());
        assert_eq!(*known, home, "session {session} was moved");
        let mut placed = placed;
        placed.lease.confirm(now);
        self.running.push((of_old, placed));
    }

    fn look(&mut self, now: Instant) {
        for (of_old, session, mut waiting) in std::mem::take(&mut self.waiting) {
            match poll(&mut waiting) {
                Some(found) => {
                    let placed = found.unwrap_or_else(|refusal| panic!("{session} was refused: {refusal:?}"));
                    self.arrive(of_old, &session, placed, now);
                }
                None => self.waiting.push((of_old, session, waiting)),
            }
        }
    }

    fn counts(&self) -> HashMap<String, u64> {
        let mut counts: HashMap<String, u64> = PORTS.iter().map(|port| (format!("127.0.0.1:{port}"), 0)).collect();
        for (_, placed) in &self.running {
            *counts.entry(placed.target.address.to_string()).or_default() += 1;
        }
        counts
    }
}

/// One random life: runs begin and end in the old process, it hands over, and then in both.
fn life(seed: u64) {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let now = ids::now();
    let fleet = fleet();
    let old = dispatcher(&fleet, now);
    let mut agents = Agents::default();
    let mut pair: Option<Pair> = None;
    for step in 0..120 {
        if step == 40 {
            pair = Some(Pair::hand_over(&old, &fleet, now));
        }
        let of_old = pair.is_none() || dice.roll(2) == 0;
        let dispatcher = match &pair {
            Some(pair) if !of_old => &pair.new,
            _ => &old,
        };
        match dice.roll(5) {
            0..=2 => {
                let session = format!("s{}", dice.roll(20));
                match dispatcher.pick(start(&key(&session)), now, 0) {
                    Ok(Picked::Placed(placed)) => agents.arrive(of_old, &session, placed, now),
                    Ok(Picked::Waiting(waiting)) => agents.waiting.push((of_old, session, waiting)),
                    Err(refusal) => panic!("{session} was refused: {refusal:?}"),
                }
            }
            3 if !agents.running.is_empty() => {
                let (_, mut placed) = agents.running.swap_remove(dice.roll(agents.running.len()));
                placed.lease.outcome(RunOutcome::Completed);
            }
            4 if !agents.waiting.is_empty() && dice.roll(3) == 0 => {
                drop(agents.waiting.swap_remove(dice.roll(agents.waiting.len())));
            }
            _ => {}
        }
        // Messages may be late, but never so that an agent has more than it may.
        if dice.roll(2) == 0
            && let Some(pair) = &mut pair
        {
            pair.settle();
        }
        agents.look(now);
        let counts = agents.counts();
        assert!(counts.values().all(|count| *count <= u64::from(MAX)), "too many: {counts:?}");
    }
    let mut pair = pair.expect("handed over");
    while !agents.running.is_empty() || !agents.waiting.is_empty() {
        // An answer may let somebody go whose confirmed pin is told in its turn.
        for _ in 0..3 {
            pair.settle();
            agents.look(now);
        }
        assert_eq!(outstanding(&pair.new, now), agents.counts());
        if let Some((_, mut placed)) = agents.running.pop() {
            placed.lease.outcome(RunOutcome::Completed);
        }
    }
    pair.settle();
    assert!(outstanding(&pair.new, now).values().all(|count| *count == 0));
    assert!(pair.leases.is_empty() && pair.waiting.is_empty());
    let sessions = pair.new.sessions(None, usize::MAX, now);
    for session in &sessions {
        assert_eq!(agents.homes.get(&session.key.to_string()), Some(&session.endpoint.to_string()));
    }
    assert_eq!(sessions.len(), agents.homes.len(), "a pin was lost");
}

#[test]
fn no_life_moves_a_session_miscounts_a_run_or_loses_a_waiter() {
    for seed in 1..=300 {
        println!("seed {seed}");
        life(seed);
    }
}

#[test]
fn a_failed_handover_is_taken_back() {
    let now = ids::now();
    let fleet = fleet();
    let old = dispatcher(&fleet, now);
    let running: Vec<Placed> = (0..MAX as usize * PORTS.len())
        .map(|number| {
            let session = key(&format!("s{number}"));
            old.pick(start(&session), now, 0).ok().and_then(Picked::placed).expect("there is room")
        })
        .collect();
    let (before, late) = (key("before"), key("late"));
    let Ok(Picked::Waiting(mut first)) = old.pick(start(&before), now, 0) else { panic!("all are full") };
    let pair = Pair::hand_over(&old, &fleet, now);
    let Ok(Picked::Waiting(mut second)) = old.pick(start(&late), now, 0) else { panic!("the successor is asked") };
    drop(pair);
    assert!(poll(&mut first).is_none() && poll(&mut second).is_none());
    old.reinstate(now);
    let mut running = running.into_iter();
    drop(running.next());
    let Some(Ok(first)) = poll(&mut first) else { panic!("its turn has come") };
    assert!(poll(&mut second).is_none());
    drop(running.next());
    let Some(Ok(second)) = poll(&mut second) else { panic!("its turn has come") };
    drop((first, second, running));
    assert!(outstanding(&old, now).values().all(|count| *count == 0));
}

#[test]
fn runs_that_go_on_alone_and_those_to_be_stopped_are_the_new_ones() {
    let now = ids::now();
    let fleet = fleet();
    let old = dispatcher(&fleet, now);
    let start_of = |session: &str| {
        let session = key(session);
        old.pick(start(&session), now, 0).ok().and_then(Picked::placed).expect("there is room")
    };
    let (mut gone, mut leaves, stays) = (start_of("gone"), start_of("leaves"), start_of("stays"));
    gone.lease.finish(Finish::Left);
    drop(gone);
    let mut pair = Pair::hand_over(&old, &fleet, now);
    assert_eq!(pair.leases.len(), 2, "one has nobody who would tell its end");
    assert_eq!(outstanding(&old, now).values().sum::<u64>(), 2);
    leaves.lease.finish(Finish::Left);
    drop(leaves);
    pair.settle();
    assert_eq!(outstanding(&old, now).values().sum::<u64>(), 1);
    assert_eq!(outstanding(&pair.new, now).values().sum::<u64>(), 3);
    // Nothing is heard of the two: they end where runs are looked after.
    let later = now + Duration::from_secs(3601);
    assert!(pair.new.due_runs(10, later).is_empty());
    assert_eq!(outstanding(&pair.new, later).values().sum::<u64>(), 1);

    let id = stays.lease.run_id().expect("a start");
    pair.new.cancel(id, later).expect("it is known");
    let stop = pair.leases[&id].stop().and_then(|stop| stop.outcome());
    assert_eq!(stop, Some(RunOutcome::Cancelled));
    let service = placement::SERVICE.to_owned();
    old.answered(Answer::Stop { service, run: id, outcome: RunOutcome::Cancelled }, now);
    assert_eq!(stays.lease.stop().and_then(|stop| stop.outcome()), Some(RunOutcome::Cancelled));
    drop(stays);
    pair.settle();
    assert_eq!(outstanding(&pair.new, later).values().sum::<u64>(), 0);
}

#[test]
fn a_rollout_an_operators_drain_and_turns_are_kept() {
    let now = ids::now();
    let step = |share: f64, hold| config::RolloutStep { share, hold: Duration::from_secs(hold) };
    let plan = config::Rollout {
        from: "stable".to_owned(),
        to: "canary".to_owned(),
        steps: vec![step(0.5, 600), step(1.0, 0)],
        judge: config::Judge {
            min_runs: 50,
            max_failed: Some(0.05),
            failed_ratio: None,
            first_event_p95_ratio: None,
            duration_p95_ratio: None,
            confidence: 0.95,
        },
        on_bad: config::OnBad::Pause,
    };
    let fleet = Fleet::new().version("stable", 100, [place(1), place(2)]).version("canary", 0, [place(3)]);
    let fleet = fleet.with(|service| {
        service.rollout = Some(plan);
        service.runs.queue.max = 10;
        service.runs.double_texting.policy = config::Policy::Enqueue;
    });
    let old = dispatcher(&fleet, now);
    old.steer_rollout(Steer::Start, now).expect("there is one").expect("it can start");
    assert!(old.drain_endpoint("127.0.0.1:2", now));
    let session = key("s");
    let enqueue = || Ask { policy: config::Policy::Enqueue, ..start(&session) };
    let mut first = old.pick(enqueue(), now, 0).ok().and_then(Picked::placed).expect("there is room");
    first.lease.confirm(now);
    let Ok(Picked::Waiting(mut second)) = old.pick(enqueue(), now, 0) else { panic!("it is not its turn") };
    let before = old.rollout(now).expect("there is one");
    assert!(matches!(before.place(), Stands::Running { .. }), "{:?}", before.place());

    let mut pair = Pair::hand_over(&old, &fleet, now);
    pair.settle();
    // All but its clock, which goes on.
    let after = pair.new.rollout(now).expect("there is one");
    assert_eq!((after.place(), after.history()), (before.place(), before.history()));
    let drains = |dispatcher: &Dispatcher| {
        let status = dispatcher.status(now);
        let endpoints: Vec<_> = status.versions.iter().flat_map(|version| &version.endpoints).collect();
        let states = endpoints.iter().map(|endpoint| (endpoint.address.to_string(), format!("{:?}", endpoint.state)));
        states.collect::<Vec<_>>()
    };
    assert_eq!(drains(&pair.new), drains(&old));
    // A third start of the session comes to the new process, and waits behind the second, which is the old one's.
    let Ok(Picked::Waiting(mut third)) = pair.new.pick(enqueue(), now, 0) else { panic!("it is not its turn") };
    assert!(poll(&mut second).is_none());
    drop(first);
    pair.settle();
    let Some(Ok(second)) = poll(&mut second) else { panic!("its turn has come") };
    assert_eq!(second.affinity, AffinityOutcome::Hit);
    assert!(poll(&mut third).is_none());
    drop(second);
    pair.settle();
    assert!(matches!(poll(&mut third), Some(Ok(_))));
}

/// Prints how long the steps of a large handover take: `cargo test --release --test succession -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, for release builds"]
#[expect(clippy::disallowed_methods, reason = "a test sends as much as it likes")]
fn a_million_sessions_pass() {
    let now = ids::now();
    let fleet = fleet().with(|service| service.runs.queue.max = 0);
    let old = dispatcher(&fleet, now);
    for number in 0..1_000_000 {
        let session = key(&format!("session-{number:036}"));
        let mut placed = old.pick(start(&session), now, 0).ok().and_then(Picked::placed).expect("there is room");
        placed.lease.confirm(now);
        placed.lease.outcome(RunOutcome::Completed);
    }
    let (to, _told) = mpsc::unbounded_channel();
    let began = ids::now();
    let estate = old.hand_over(to, now);
    let taken = ids::now();
    let text = serde_json::to_string(&estate).expect("JSON");
    let written = ids::now();
    let estate: Estate = serde_json::from_str(&text).expect("the same");
    let read = ids::now();
    let new = dispatcher(&fleet, now);
    new.take_over(estate, &|_| None, now);
    let restored = ids::now();
    assert_eq!(new.status(now).versions[0].sessions, 1_000_000);
    println!(
        "under the old one's lock {:?}, written {:?} ({} MB), read {:?}, taken over {:?}",
        taken - began,
        written - taken,
        text.len() / 1_000_000,
        read - written,
        restored - read
    );
}

fn says(dispatcher: &Dispatcher, port: u16, now: Instant) -> (String, Vec<&'static str>) {
    let status = dispatcher.status(now);
    let mut endpoints = status.versions.iter().flat_map(|version| &version.endpoints);
    let endpoint = endpoints.find(|endpoint| endpoint.address.ends_with(&format!(":{port}"))).expect("it is there");
    let reasons = endpoint.drain.as_ref().map(|drain| drain.by.clone()).unwrap_or_default();
    (format!("{:?}", endpoint.state), reasons)
}

/// What the new one's desk does every 50 ms.
fn tell_drains(pair: &Pair, known: &mut u64) {
    if let Some((news, drains)) = pair.new.drains_since(*known, pair.now) {
        *known = news;
        let service = placement::SERVICE.to_owned();
        let text = serde_json::to_string(&Answer::Drains { service, drains }).expect("JSON");
        pair.old.answered(serde_json::from_str(&text).expect("the same"), pair.now);
    }
}

#[test]
fn drains_pass_both_ways_whoever_told_of_them() {
    let now = ids::now();
    let fleet = fleet();
    let old = dispatcher(&fleet, now);
    let mut placed: Vec<Placed> = (0..3)
        .map(|number| {
            let session = key(&format!("s{number}"));
            old.pick(start(&session), now, 0).ok().and_then(Picked::placed).expect("there is room")
        })
        .collect();
    placed.sort_by_key(|placed| placed.target.address.to_string());
    placed[0].lease.endpoint_drains(true, now);
    assert!(old.drain_endpoint("127.0.0.1:2", now));
    let mut pair = Pair::hand_over(&old, &fleet, now);
    let draining = |reasons: &[&'static str]| ("Draining".to_owned(), reasons.to_vec());
    let ready = ("Ready".to_owned(), Vec::new());
    assert_eq!(says(&pair.new, 1, now), draining(&["answer"]));
    assert_eq!(says(&pair.new, 2, now), draining(&["operator"]));

    let mut known = 0;
    assert!(pair.new.undrain_endpoint("127.0.0.1:2", now) && pair.new.undrain_endpoint("127.0.0.1:1", now));
    tell_drains(&pair, &mut known);
    assert_eq!((says(&old, 1, now), says(&old, 2, now)), (ready.clone(), ready.clone()));
    assert!(pair.new.drain_endpoint("127.0.0.1:2", now));
    tell_drains(&pair, &mut known);
    assert_eq!(says(&old, 2, now), draining(&["operator"]));

    // An answer that comes to the old one is heard by the new one, and by everybody who goes on from it.
    placed[2].lease.endpoint_drains(true, now);
    pair.settle();
    assert_eq!(says(&pair.new, 3, now), draining(&["answer"]));
    tell_drains(&pair, &mut known);
    assert_eq!(says(&old, 3, now), draining(&["answer"]));

    // Both forget such a drain at its deadline, and the one whose news is late cuts all the same.
    let count = placed[2].target.cut.count();
    let late = now + Duration::from_secs(601);
    pair.new.tick(late);
    pair.now = late;
    tell_drains(&pair, &mut known);
    old.tick(late);
    assert_eq!(placed[2].target.cut.count(), count + 1, "what the old one carries is cut");
    assert_eq!(says(&old, 3, late), ready);
}
