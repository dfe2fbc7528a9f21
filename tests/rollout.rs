//! Rollout: new sessions walk from one version to another, are taken back where that fails, and none is ever moved.

#[path = "support/placement.rs"]
mod placement;
mod support;

use std::collections::HashMap;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use longhaul::config::{self, OnBad};
use longhaul::ids;
use longhaul::rollout::{Command as Steer, Place as Stands, Rollout};
use longhaul::state::dispatcher::{Ask, Dispatcher, Picked, PinHint, Placed};
use longhaul::state::waiting::Waiting;
use longhaul::state::{AffinityOutcome, Kind, RunOutcome};
use placement::{Fleet, Place, key, place};
use serde_json::Value;
use support::{Backend, Proxy, RawClient, Response, Script, eventually_async, post, start_proxy};

/// From stable to canary in these shares, each held for 10 minutes but for the whole.
fn plan(shares: &[f64]) -> config::Rollout {
    let step = |share: f64| {
        let hold = if share < 1.0 { Duration::from_secs(600) } else { Duration::ZERO };
        config::RolloutStep { share, hold }
    };
    config::Rollout {
        from: "stable".to_owned(),
        to: "canary".to_owned(),
        steps: shares.iter().copied().map(step).collect(),
        judge: config::Judge {
            min_runs: 50,
            max_failed: Some(0.05),
            failed_ratio: Some(2.0),
            first_event_p95_ratio: Some(1.5),
            duration_p95_ratio: Some(1.5),
            confidence: 0.95,
        },
        on_bad: OnBad::Abort,
    }
}

fn fleet(shares: &[f64]) -> Fleet {
    let fleet = Fleet::new().version("stable", 95, [place(1), place(2)]).version("canary", 5, [place(3)]);
    fleet.with(|service| service.rollout = Some(plan(shares)))
}

/// A dispatcher and a time that is a little ahead of the real one, so that leases, which read the clock, don't hurry it.
struct World {
    dispatcher: Arc<Dispatcher>,
    now: Instant,
}

impl World {
    fn new(fleet: &Fleet) -> World {
        let dispatcher = Dispatcher::new(placement::SERVICE, placement::service_metrics());
        let now = ids::now();
        dispatcher.apply(fleet.settings(), now);
        World { dispatcher, now }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.dispatcher.tick(self.now);
    }

    fn pick(&self, ask: Ask<'_>) -> Placed {
        self.dispatcher.pick(ask, self.now, 0).ok().and_then(Picked::placed).expect("there is room")
    }

    fn start(&self, session: &str) -> Placed {
        self.pick(Ask::new(Kind::Start, Some(&key(session))))
    }

    /// A run of the session that ends so, after an answer that was a success; on which version, and how it came there.
    fn run(&self, session: &str, outcome: RunOutcome) -> (String, AffinityOutcome) {
        let Placed { target, affinity, mut lease } = self.start(session);
        lease.confirm(self.now);
        lease.outcome(outcome);
        (target.version.to_string(), affinity)
    }

    fn rollout(&self) -> Rollout {
        self.dispatcher.rollout(self.now).expect("there is one")
    }

    fn steer(&self, command: Steer) -> Rollout {
        self.dispatcher.steer_rollout(command, self.now).expect("there is one").expect("it means something")
    }

    /// Judged runs of from and to.
    fn judged(&self) -> (u64, u64) {
        let rollout = self.rollout();
        let evidence = rollout.report().evidence;
        (evidence.from.runs, evidence.to.runs)
    }

    fn version(&self, name: &str) -> Value {
        let status = serde_json::to_value(self.dispatcher.status(self.now)).expect("serialises");
        let versions = status["versions"].as_array().cloned().unwrap_or_default();
        versions.into_iter().find(|version| version["name"] == name).expect("it is there")
    }
}

const SESSIONS: usize = 200_000;

/// How far a share of so many may be from what it should be: three standard deviations of a binomial.
fn three_sigma(share: f64, count: usize) -> f64 {
    3.0 * (share * (1.0 - share) / count as f64).sqrt()
}

#[test]
fn two_hundred_thousand_sessions_walk_and_each_sees_one_version() {
    let shares = [0.01, 0.1, 0.5, 1.0];
    // The judge's own time is not what is tested here.
    let mut world = World::new(&fleet(&shares).with(|service| {
        let judge = &mut service.rollout.as_mut().expect("it has one").judge;
        (judge.first_event_p95_ratio, judge.duration_p95_ratio) = (None, None);
    }));
    let window = SESSIONS / shares.len();
    let mut homes: Vec<bool> = Vec::with_capacity(SESSIONS);
    for (step, share) in shares.into_iter().enumerate() {
        let expected = if share < 1.0 { Stands::Running { step: step + 1 } } else { Stands::Completed };
        assert_eq!(world.rollout().place(), expected);
        let born: Vec<usize> = (step * window..(step + 1) * window).collect();
        for number in &born {
            world.now += Duration::from_millis(5);
            let (version, affinity) = world.run(&format!("session-{number}"), RunOutcome::Completed);
            assert_eq!(affinity, AffinityOutcome::New);
            homes.push(version == "canary");
            // One that is older comes back.
            let again = number * 7919 % homes.len();
            let (version, affinity) = world.run(&format!("session-{again}"), RunOutcome::Completed);
            assert_eq!((version == "canary", affinity), (homes[again], AffinityOutcome::Hit), "session {again}");
        }
        assert_eq!(world.rollout().place(), expected, "a window is shorter than a hold");
        let canaries = born.iter().filter(|number| homes[**number]).count();
        let real = canaries as f64 / window as f64;
        println!(
            "step {share}: {canaries} of {window}, off by {:.2} sigma",
            3.0 * (real - share) / three_sigma(share, window).max(1e-9)
        );
        assert!((real - share).abs() <= three_sigma(share, window), "{share}: {real}");
        let version = world.version("canary");
        assert_eq!(version["share"]["weight"], share);
        assert_eq!(version["share"]["sessions"], real, "what is published is what happened");
        world.pass(Duration::from_secs(600));
    }
    for (number, canary) in homes.iter().enumerate() {
        let (version, affinity) = world.run(&format!("session-{number}"), RunOutcome::Completed);
        assert_eq!((version == "canary", affinity), (*canary, AffinityOutcome::Hit), "session {number}");
    }
    assert_eq!(world.version("canary")["effective_weight"], 100);
    assert_eq!(world.version("stable")["effective_weight"], 0);
}

#[test]
fn sessions_without_a_key_are_dealt_by_turns_at_the_new_weights() {
    let world = World::new(&fleet(&[0.1, 0.5, 1.0]));
    let share = |count: usize| {
        let canary = (0..count).filter(|_| &*world.pick(Ask::new(Kind::Start, None)).target.version == "canary");
        canary.count()
    };
    assert_eq!(share(1000), 100);
    world.steer(Steer::Promote);
    assert_eq!(share(1000), 500);
    world.steer(Steer::Abort);
    assert_eq!(share(1000), 0);
}

#[test]
fn only_young_sessions_that_nobody_sent_are_judged() {
    let fleet = fleet(&[0.5, 1.0]);
    let mut world = World::new(&fleet);
    let run = |world: &World, ask: Ask<'_>, end: &dyn Fn(&mut Placed)| {
        let mut placed = world.pick(ask);
        placed.lease.confirm(world.now);
        placed.lease.outcome(RunOutcome::Completed);
        end(&mut placed);
        placed.target.version.to_string()
    };
    let total = |world: &World| world.judged().0 + world.judged().1;
    run(&world, Ask::new(Kind::Start, None), &|_| {});
    run(&world, Ask::new(Kind::Start, Some(&key("one"))), &|_| {});
    assert_eq!(total(&world), 2);

    // The client's fault, and what became nothing.
    run(&world, Ask::new(Kind::Start, None), &|placed| placed.lease.keep_from_judge());
    for outcome in [RunOutcome::Cancelled, RunOutcome::Interrupted, RunOutcome::Unknown] {
        run(&world, Ask::new(Kind::Start, None), &|placed| placed.lease.outcome(outcome));
    }
    assert_eq!(total(&world), 2);

    // Sent by a match, with and without a session, and at its later runs too.
    let sent = key("sent");
    run(&world, Ask { version: Some("canary"), ..Ask::new(Kind::Start, Some(&sent)) }, &|_| {});
    run(&world, Ask::new(Kind::Start, Some(&sent)), &|_| {});
    run(&world, Ask { version: Some("canary"), ..Ask::new(Kind::Start, None) }, &|_| {});
    assert_eq!(total(&world), 2);

    // A cookie of another replica: how old that session is, nobody knows.
    let hint = PinHint { version: "canary".to_owned(), endpoint: placement::url(3).identity() };
    let told = run(&world, Ask { hint: Some(&hint), ..Ask::new(Kind::Start, Some(&key("told"))) }, &|_| {});
    assert_eq!((told.as_str(), total(&world)), ("canary", 2));

    // Moved by a drain.
    let moves = |number: &u32| world.run(&format!("moves-{number}"), RunOutcome::Completed).0 == "canary";
    let moves = (0..100).find(moves).expect("half of them begin at canary");
    let before = total(&world);
    assert!(world.dispatcher.drain_endpoint(&placement::url(3).address(), world.now));
    let moved = world.run(&format!("moves-{moves}"), RunOutcome::Completed);
    assert_eq!(moved, ("stable".to_owned(), AffinityOutcome::Moved));
    assert_eq!(world.run(&format!("moves-{moves}"), RunOutcome::Completed).1, AffinityOutcome::Hit);
    assert_eq!(total(&world), before);
    assert!(world.dispatcher.undrain_endpoint(&placement::url(3).address(), world.now));

    // Older than the step.
    world.pass(Duration::from_secs(5));
    world.steer(Steer::Abort);
    world.steer(Steer::Start);
    assert_eq!(total(&world), 0);
    world.run("one", RunOutcome::Failed);
    assert_eq!(total(&world), 0);
    world.pass(Duration::from_secs(2));
    run(&world, Ask::new(Kind::Start, Some(&key("young"))), &|_| {});
    assert_eq!(total(&world), 1);
}

#[test]
fn a_reload_goes_on_an_edit_begins_again_and_without_the_block_the_file_applies() {
    let first = fleet(&[0.1, 0.5, 1.0]);
    let world = World::new(&first);
    world.steer(Steer::Promote);
    world
        .dispatcher
        .apply(first.clone().with(|service| service.slow_start = Duration::from_secs(9)).settings(), world.now);
    assert_eq!(world.rollout().place(), Stands::Running { step: 2 });
    assert_eq!(world.version("canary")["effective_weight"], 50);
    world.dispatcher.apply(fleet(&[0.2, 0.5, 1.0]).settings(), world.now);
    assert_eq!(world.rollout().place(), Stands::Running { step: 1 });
    assert_eq!(world.version("canary")["effective_weight"], 20);
    assert_eq!(world.rollout().history().count(), 3);
    world.dispatcher.apply(first.with(|service| service.rollout = None).settings(), world.now);
    assert!(world.dispatcher.rollout(world.now).is_none());
    assert!(world.dispatcher.steer_rollout(Steer::Start, world.now).is_none());
    assert_eq!(world.version("canary")["effective_weight"], 5);
}

#[test]
fn an_evicted_version_loses_its_idle_sessions_and_no_run() {
    let world = World::new(&fleet(&[1.0]));
    for number in 0..20 {
        assert_eq!(world.run(&format!("idle-{number}"), RunOutcome::Completed).0, "canary");
    }
    let mut working = world.start("working");
    working.lease.confirm(world.now);
    assert_eq!(world.dispatcher.evict_sessions("canary", world.now), Some(20));
    assert_eq!(world.run("idle-0", RunOutcome::Completed), ("canary".to_owned(), AffinityOutcome::Hit));
    world.steer(Steer::Abort);
    assert_eq!(world.run("idle-0", RunOutcome::Completed), ("canary".to_owned(), AffinityOutcome::Hit));
    for number in 1..20 {
        let session = format!("idle-{number}");
        // Whatever only reads is answered by who knows the session.
        let read = world.pick(Ask::new(Kind::Other, Some(&key(&session))));
        assert_eq!((&*read.target.version, read.affinity), ("canary", AffinityOutcome::Hit));
        drop(read);
        assert_eq!(world.run(&session, RunOutcome::Completed), ("stable".to_owned(), AffinityOutcome::Moved));
        assert_eq!(world.run(&session, RunOutcome::Completed), ("stable".to_owned(), AffinityOutcome::Hit));
    }
    assert_eq!(world.run("working", RunOutcome::Completed), ("canary".to_owned(), AffinityOutcome::Hit));
    working.lease.outcome(RunOutcome::Completed);
    drop(working);
    assert_eq!(world.run("working", RunOutcome::Completed), ("canary".to_owned(), AffinityOutcome::Hit));
    assert_eq!(world.dispatcher.evict_sessions("blue", world.now), None);
}

#[test]
fn whoever_waits_goes_where_the_new_weights_send_it() {
    let canary = Place { max_runs: Some(1), ..place(3) };
    let fleet = Fleet::new().version("stable", 95, [place(1)]).version("canary", 5, [canary]);
    let world = World::new(&fleet.with(|service| {
        service.rollout = Some(plan(&[1.0]));
        service.runs.queue.max = 10;
    }));
    assert_eq!(world.run("idle", RunOutcome::Completed).0, "canary");
    assert_eq!(world.run("stays", RunOutcome::Completed).0, "canary");
    let mut working = world.start("working");
    working.lease.confirm(world.now);
    let wait = |session: Option<&str>| {
        let key = session.map(key);
        match world.dispatcher.pick(Ask::new(Kind::Start, key.as_ref()), world.now, 0) {
            Ok(Picked::Waiting(waiting)) => waiting,
            _ => panic!("canary is full"),
        }
    };
    let mut context = Context::from_waker(Waker::noop());
    let mut look = |waiting: &mut Waiting| match waiting.poll(&mut context) {
        Poll::Ready(given) => given.ok().map(|placed| (placed.target.version.to_string(), placed.affinity)),
        Poll::Pending => None,
    };
    let (mut young, mut keyless, mut idle) = (wait(Some("young")), wait(None), wait(Some("idle")));
    for waiting in [&mut young, &mut keyless, &mut idle] {
        assert_eq!(look(waiting), None);
    }
    world.steer(Steer::Abort);
    assert_eq!(look(&mut young), Some(("stable".to_owned(), AffinityOutcome::New)));
    assert_eq!(look(&mut keyless), Some(("stable".to_owned(), AffinityOutcome::None)));
    assert_eq!(look(&mut idle), None, "a session stays");
    assert_eq!(world.dispatcher.evict_sessions("canary", world.now), Some(2));
    assert_eq!(look(&mut idle), Some(("stable".to_owned(), AffinityOutcome::Moved)));
    working.lease.outcome(RunOutcome::Completed);
}

/// A service that goes from one backend to another.
fn rolling(stable: &Backend, canary: &Backend, service: &str, steps: &str) -> String {
    format!(
        "services:\n  - name: support\n    session: {{key: [{{header: x-session-id}}]}}\n{service}    versions:\n      \
         - {{name: stable, weight: 95, endpoints: [\"{}\"]}}\n      - {{name: canary, weight: 5, endpoints: [\"{}\"], match: {{headers: {{x-canary: \"1\"}}}}}}\n    \
         rollout: {{from: stable, to: canary, steps: [{steps}]}}\n",
        stable.url(),
        canary.url()
    )
}

async fn named(name: &'static str) -> Backend {
    let backend = Backend::start().await;
    backend.each(move |_| Script::ok(name));
    backend
}

async fn run(proxy: &Proxy, session: &str) -> Response {
    post(proxy.address, "/run", &format!("X-Session-Id: {session}\r\n"), "hi").await
}

const ROLLOUT: &str = "/api/v1/services/support/rollout";

async fn steer(proxy: &Proxy, action: &str) -> Response {
    proxy.admin("POST", &format!("{ROLLOUT}/{action}")).await
}

/// `longhaul rollout support ..` as a pipeline calls it.
async fn command(proxy: &Proxy, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
    command.args(["rollout", "support"]).args(arguments).args(["--admin", &format!("http://{}", proxy.admin)]);
    command.stdin(Stdio::null());
    tokio::task::spawn_blocking(move || command.output().expect("the binary was built with the tests"))
        .await
        .expect("ends")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn an_abort_lets_a_hundred_streams_finish_and_sends_nobody_new() {
    let (stable, canary) = (named("stable").await, Backend::start().await);
    canary.drip_each();
    let proxy = start_proxy(&rolling(&stable, &canary, "", "{weight: 100%}")).await;
    let mut streams: Vec<RawClient> = Vec::new();
    for number in 0..100 {
        let mut client = proxy.connect().await;
        client
            .send(format!("POST /run HTTP/1.1\r\nHost: a\r\nX-Session-Id: s-{number}\r\nContent-Length: 2\r\n\r\nhi"))
            .await;
        assert_eq!(client.read_head().await.status, 200);
        streams.push(client);
    }
    let mut drips = Vec::new();
    for _ in 0..100 {
        let drip = canary.drip().await;
        drip.event("working").await;
        drips.push(drip);
    }
    let aborted = steer(&proxy, "abort").await;
    assert_eq!((aborted.status(), aborted.json()["state"].as_str()), (200, Some("aborted")));
    for number in 0..200 {
        assert_eq!(run(&proxy, &format!("new-{number}")).await.text(), "stable");
    }
    assert_eq!((canary.request_count(), canary.in_flight()), (100, 100));
    for drip in drips {
        assert!(!drip.gone());
        drip.event("done").await;
        drip.finish().await;
    }
    for client in &mut streams {
        assert!(client.read_chunks_until("done").await.contains("working"));
        assert!(client.read_chunk().await.is_none(), "the stream ends as complete");
    }
    proxy.metric_becomes("longhaul_runs_total", &["version=\"canary\"", "outcome=\"completed\""], 100.0).await;
    canary.each(|_| Script::ok("canary"));
    assert_eq!(run(&proxy, "s-0").await.text(), "canary", "a session stays where it began");
    assert_eq!(proxy.metric("longhaul_affinity_total", &["outcome=\"moved\""]).await, Some(0.0));
}

#[tokio::test]
async fn a_canary_that_fails_inside_200_is_aborted() {
    let events = [("content-type", "text/event-stream")];
    let good = "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\ndata: [DONE]\n\n";
    let bad = "data: {\"error\":{\"message\":\"the tool is gone\",\"type\":\"server_error\"}}\n\n";
    let (stable, canary) = (Backend::start().await, Backend::start().await);
    stable.each(move |_| Script::answer(200, &events, good));
    let mut answered = 0;
    canary.each(move |_| {
        answered += 1;
        Script::answer(200, &events, if answered % 5 == 0 { bad } else { good })
    });
    let service = "    agent_protocol: openai-chat\n";
    let config = rolling(&stable, &canary, service, "{weight: 50%, hold: 1h}, {weight: 100%}");
    let proxy = start_proxy(&config).await;
    assert_eq!(proxy.admin("GET", ROLLOUT).await.json()["state"], "running");
    let running = command(&proxy, &["status"]).await;
    assert!(running.status.success(), "{running:?}");
    assert!(
        said(&running).starts_with("support: stable -> canary, step 1 of 2\n50% of the new sessions"),
        "{running:?}"
    );
    let completion = async |session: &str| {
        let headers = format!("X-Session-Id: {session}\r\nContent-Type: application/json\r\n");
        let answer = post(proxy.address, "/v1/chat/completions", &headers, "{\"model\":\"m\",\"stream\":true}").await;
        assert_eq!(answer.status(), 200, "nobody sees it by the status");
    };
    for number in 0..400 {
        completion(&format!("session-{number}")).await;
        if number % 20 == 0 && proxy.admin("GET", ROLLOUT).await.json()["state"] == "aborted" {
            break;
        }
    }
    let report = proxy.admin("GET", ROLLOUT).await.json();
    assert_eq!(report["state"], "aborted", "{report:#}");
    let last = report["history"].as_array().and_then(|history| history.last()).expect("a transition").clone();
    assert_eq!(last["cause"], "bad");
    let [runs, failed] = ["runs", "failed"].map(|field| last["evidence"]["to"][field].as_u64().expect("counted"));
    println!("aborted after {runs} runs of the canary, {failed} failed");
    assert!(runs <= 100 && failed == runs / 5, "{last:#}");
    assert_eq!(last["evidence"]["from"]["failed"], 0);

    let before = canary.request_count();
    for number in 0..50 {
        completion(&format!("later-{number}")).await;
    }
    assert_eq!(canary.request_count(), before);
    assert_eq!(proxy.metric("longhaul_version_weight", &["version=\"canary\""]).await, Some(0.0));
    assert_eq!(proxy.metric("longhaul_version_weight", &["version=\"stable\""]).await, Some(100.0));
    let sessions = proxy.metric("longhaul_version_sessions_total", &["version=\"canary\""]).await;
    assert_eq!(sessions, Some(before as f64));
    assert_eq!(proxy.metric("longhaul_version_runs_total", &["version=\"canary\""]).await, Some(before as f64));

    let waited = command(&proxy, &["status", "--wait"]).await;
    assert_eq!(waited.status.code(), Some(1), "{waited:?}");
    assert!(said(&waited).contains("step 1 -> aborted: the new version is worse; `to` failed"), "{}", said(&waited));
    let json = command(&proxy, &["--json"]).await;
    assert_eq!(serde_json::from_str::<Value>(&said(&json)).expect("JSON")["state"], "aborted");
    assert_eq!(json.status.code(), Some(0));
    let refused = command(&proxy, &["promote"]).await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("`start` begins it again"), "{refused:?}");
}

#[tokio::test]
async fn refused_requests_are_not_held_against_a_version() {
    let (stable, canary) = (named("stable").await, Backend::start().await);
    canary.each(|_| Script::status(404));
    let proxy = start_proxy(&rolling(&stable, &canary, "", "{weight: 50%, hold: 1h}, {weight: 100%}")).await;
    for number in 0..40 {
        run(&proxy, &format!("session-{number}")).await;
    }
    let report = proxy.admin("GET", ROLLOUT).await.json();
    assert!(report["evidence"]["from"]["runs"].as_u64() > Some(5), "{report:#}");
    assert!(report["evidence"]["from"]["first_event_p95"].is_f64(), "{report:#}");
    assert_eq!(report["evidence"]["to"]["runs"], 0);
    assert!(canary.request_count() > 5);
}

#[tokio::test]
async fn blue_green_switches_at_once_and_back_while_the_old_version_drains() {
    let (blue, green) = (named("blue").await, named("green").await);
    let with = rolling(&blue, &green, "", "{weight: 100%}");
    let without = with.lines().filter(|line| !line.contains("rollout:")).collect::<Vec<_>>().join("\n");
    let proxy = start_proxy(&without.replace("weight: 5", "weight: 0")).await;
    assert_eq!(proxy.admin("GET", ROLLOUT).await.status(), 404);
    for number in 0..20 {
        assert_eq!(run(&proxy, &format!("old-{number}")).await.text(), "blue");
    }
    assert_eq!(proxy.reload(&with).await.status(), 200);
    let started = command(&proxy, &["start", "--wait"]).await;
    assert_eq!(started.status.code(), Some(0), "{started:?}");
    assert!(said(&started).starts_with("support: stable -> canary, completed\n100% of"), "{}", said(&started));
    let mut homes: HashMap<String, &str> = HashMap::new();
    for (action, word, home) in
        [(None, "to", "green"), (Some("abort"), "back", "blue"), (Some("start"), "again", "green")]
    {
        if let Some(action) = action {
            assert_eq!(steer(&proxy, action).await.status(), 200);
        }
        for number in 0..20 {
            let session = format!("{word}-{number}");
            assert_eq!(run(&proxy, &session).await.text(), home);
            homes.insert(session, home);
        }
    }
    homes.extend((0..20).map(|number| (format!("old-{number}"), "blue")));
    for (session, home) in homes {
        let answer = run(&proxy, &session).await;
        assert_eq!((answer.text().as_str(), answer.header("longhaul-affinity")), (home, Some("hit")), "{session}");
    }
    let refused = steer(&proxy, "pause").await;
    assert_eq!((refused.status(), refused.code().as_deref()), (409, Some("rollout_refused")));
    assert_eq!(steer(&proxy, "hurry").await.status(), 404);
    assert_eq!(proxy.admin("POST", "/api/v1/services/nobody/rollout/start").await.status(), 404);

    // An emergency: whoever is at green comes back to blue as soon as it works again.
    assert_eq!(command(&proxy, &["abort", "--wait"]).await.status.code(), Some(0));
    let evicted = proxy.admin("POST", "/api/v1/services/support/versions/canary/evict").await;
    assert_eq!((evicted.status(), evicted.json()["evicted"].as_u64()), (200, Some(40)), "{evicted:?}");
    assert_eq!(proxy.admin("POST", "/api/v1/services/support/versions/v9/evict").await.status(), 404);
    let answer = run(&proxy, "to-3").await;
    assert_eq!((answer.text().as_str(), answer.header("longhaul-affinity")), ("blue", Some("moved")));
}

#[tokio::test]
async fn a_hold_passes_by_itself() {
    let (stable, canary) = (named("stable").await, named("canary").await);
    // Times depend on what else this machine does, and would be signs of a difference now and then.
    let judge = "judge: {min_runs: 5, worse_than_from: {first_event_p95: null, duration_p95: null}}";
    let config = rolling(&stable, &canary, "", "{weight: 50%, hold: 1s}, {weight: 100%}");
    let config = config.replace("{weight: 100%}]", &format!("{{weight: 100%}}], {judge}"));
    let proxy = start_proxy(&config).await;
    for number in 0..60 {
        run(&proxy, &format!("session-{number}")).await;
    }
    eventually_async("the rollout completes", || async {
        proxy.metric("longhaul_version_weight", &["version=\"canary\""]).await == Some(100.0)
    })
    .await;
    let report = proxy.admin("GET", ROLLOUT).await.json();
    assert_eq!((report["state"].as_str(), report["settled"].as_bool()), (Some("completed"), Some(true)));
}
