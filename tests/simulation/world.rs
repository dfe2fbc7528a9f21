//! World: a proxy, its agents and its clients on one thread, from the first connection to the proxy's own end.

use std::cell::RefCell;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use longhaul::app::Options;
use longhaul::app::here::{self, Here};
use longhaul::ids;
use longhaul::net::simulated::{Link, Network};
use longhaul::state::status::{EndpointStatus, ServiceStatus};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{Instant, sleep, timeout};

use crate::agent::Agent;
use crate::client::{Ask, Client, Outcome, exchange};
use crate::faults;
use crate::oracle::Oracle;
use crate::shape::{PROXY, Settings, Shape, agent_host, client_host, listener};
use crate::trace::{Story, Trace};
use crate::wire::Wire;

/// Everything has come to rest so soon after the last fault is healed: runs that nobody can ask about have ended as
/// unknown (`unseen_timeout`), dead connections have run into their time-outs.
const REST_WITHIN: Duration = Duration::from_secs(150);
/// Clients have ended so soon after their time: their patience, and that of two turns.
const CLIENTS_END_WITHIN: Duration = Duration::from_secs(180);
/// How often is looked whether limits hold.
const LOOK_EVERY: Duration = Duration::from_millis(250);

pub struct World {
    pub network: Network,
    pub trace: Trace,
    pub oracle: RefCell<Oracle>,
    pub shape: Shape,
    /// What the proxy was told last.
    pub settings: RefCell<Settings>,
    pub agents: Vec<Rc<Agent>>,
    pub proxy: Here,
    /// By client: when something last happened to its link.
    client_troubles: RefCell<Vec<Option<Instant>>>,
    directory: TempDir,
    /// There is one file.
    reloading: tokio::sync::Mutex<()>,
}

/// Lives one seed.
pub fn live(seed: u64) -> Story {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build_local(Default::default())
        .expect("a runtime");
    let story = runtime.block_on(async {
        let _simulation = ids::simulation::begin(seed);
        let network = Network::begin(seed, PROXY);
        let driver = spawn_local(network.clone().drive());
        let story = World::begin(seed, network.clone()).await;
        driver.abort();
        story
    });
    drop(runtime);
    // What the runtime's tasks still held used it.
    longhaul::net::simulated::end();
    story
}

impl World {
    async fn begin(seed: u64, network: Network) -> Story {
        let mut chance = SmallRng::seed_from_u64(seed);
        let shape = Shape::draw(&mut chance);
        let settings = shape.first_settings(&mut chance);
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("longhaul.yaml");
        let text = shape.configuration(&settings);
        fs::write(&file, &text).expect("writable");
        let loaded = longhaul::config::load(&file).unwrap_or_else(|problems| panic!("{problems}\n{text}"));
        let proxy = here::build(Options::new(file, loaded)).unwrap_or_else(|failure| panic!("{failure}"));
        let limits = (0..shape.agents).map(|agent| settings.limit(&shape, agent)).collect();
        let world = Rc::new(World {
            trace: Trace::begin(),
            oracle: RefCell::new(Oracle::new(network.clone(), limits)),
            agents: (0..shape.agents).map(Agent::new).collect(),
            client_troubles: RefCell::new(vec![None; shape.clients + 1]),
            settings: RefCell::new(settings),
            network,
            shape,
            proxy,
            directory,
            reloading: tokio::sync::Mutex::default(),
        });
        world.trace.note(format!(
            "seed {seed}: {} clients, {} agents, {:?}",
            world.shape.clients, world.shape.agents, world.shape.services
        ));
        world.agents.iter().for_each(|agent| agent.start(&world));
        world.clone().pass(chance).await;
        world.trace.story()
    }

    async fn pass(self: Rc<World>, mut chance: SmallRng) {
        let looking = spawn_local(Rc::clone(&self).look());
        let until = Instant::now() + Duration::from_secs(self.shape.seconds);
        let plan = faults::draw(&self, &mut chance);
        let clients: Vec<JoinHandle<()>> = (0..self.shape.clients)
            .map(|index| {
                let client = Client::new(index, Rc::clone(&self), SmallRng::seed_from_u64(chance.random()));
                spawn_local(client.run(until))
            })
            .collect();
        faults::carry_out(&self, plan).await;
        tokio::time::sleep_until(until).await;
        faults::heal(&self).await;
        self.trace.note("everything is healed");
        for (index, client) in clients.into_iter().enumerate() {
            let left = until + CLIENTS_END_WITHIN - Instant::now();
            if timeout(left, client).await.is_err() {
                self.trace.violation(format!("client {index} waits for ever"));
            }
        }
        self.rest().await;
        self.fill().await;
        looking.abort();
        self.end().await;
    }

    /// The proxy's own view: no endpoint is given a run beyond its limit.
    async fn look(self: Rc<World>) {
        let mut before: Vec<EndpointStatus> = Vec::new();
        loop {
            let endpoints: Vec<EndpointStatus> = self.endpoints();
            for endpoint in &endpoints {
                let Some(last) = before.iter().find(|last| last.address == endpoint.address) else { continue };
                // A lower limit cuts nothing; but nothing comes on top.
                let beyond = endpoint.max_runs.is_some_and(|max| endpoint.outstanding_runs > max);
                if beyond && last.max_runs == endpoint.max_runs && endpoint.outstanding_runs > last.outstanding_runs {
                    self.trace.violation(format!("{} has more runs than it may: {endpoint:?}", endpoint.address));
                }
            }
            before = endpoints;
            sleep(LOOK_EVERY).await;
        }
    }

    fn services(&self) -> Vec<ServiceStatus> {
        let snapshot = self.proxy.running.snapshot.load();
        snapshot.services.iter().map(|service| service.dispatcher.status(ids::now())).collect()
    }

    fn endpoints(&self) -> Vec<EndpointStatus> {
        self.services().into_iter().flat_map(|service| service.versions).flat_map(|version| version.endpoints).collect()
    }

    /// Nothing is outstanding, nobody waits, no connection is left, every endpoint is ready.
    async fn rest(&self) {
        self.becomes("everything is at rest", REST_WITHIN, || self.unrest()).await;
        let metrics = self.admin("GET", "/metrics").await;
        for name in ["longhaul_outstanding_runs", "longhaul_endpoint_outstanding_runs", "longhaul_queued_runs"] {
            let of = |line: &&str| line.starts_with(name);
            for line in metrics.lines().filter(of).filter(|line| !line.ends_with(" 0")) {
                self.trace.violation(format!("at rest, the metrics say {line}"));
            }
        }
        if !metrics.contains("longhaul_connections{") {
            self.trace.violation(format!("no metrics: {metrics}"));
        }
    }

    fn unrest(&self) -> Option<String> {
        let running = &self.proxy.running;
        let open = running.open_exchanges.get();
        if open > 0 {
            return Some(format!("{open} exchanges are open"));
        }
        for service in self.services() {
            if service.outstanding_runs > 0 || service.queue.length > 0 {
                return Some(format!(
                    "{}: {} runs, {} wait",
                    service.name, service.outstanding_runs, service.queue.length
                ));
            }
        }
        if let Some(endpoint) = self.endpoints().into_iter().find(|endpoint| {
            endpoint.outstanding_runs > 0
                || endpoint.open_exchanges > 0
                || endpoint.connections > 0
                || endpoint.state.as_str() != "ready"
        }) {
            return Some(format!("{endpoint:?}"));
        }
        let connections: i64 =
            running.snapshot.load().listeners.iter().map(|listener| listener.metrics.connections.get()).sum();
        if connections > 0 {
            return Some(format!("{connections} clients are connected"));
        }
        let sockets = self.network.open_connections(PROXY);
        (sockets > 0).then(|| format!("{sockets} sockets are open"))
    }

    /// Waits until there is nothing against it any more.
    async fn becomes(&self, what: &str, within: Duration, against: impl Fn() -> Option<String>) {
        let until = Instant::now() + within;
        while let Some(reason) = against() {
            if Instant::now() >= until {
                return self.trace.violation(format!("not within {within:?}: {what}: {reason}"));
            }
            sleep(Duration::from_millis(100)).await;
        }
        self.trace.note(what);
    }

    /// No slot is lost: every endpoint takes as many runs at once as it may, and not one more.
    async fn fill(self: &Rc<World>) {
        let filling = (0..self.shape.services.len()).map(|service| {
            let world = Rc::clone(self);
            spawn_local(async move { world.fill_service(service).await })
        });
        for filled in filling.collect::<Vec<_>>() {
            // It panics only where this file is wrong, which the panic hook tells.
            let _ = filled.await;
        }
        self.rest().await;
    }

    async fn fill_service(self: &Rc<World>, index: usize) {
        let client = self.shape.clients;
        let service = &self.shape.services[index];
        let settings = self.settings.borrow().clone();
        let limit = |agent: &usize| settings.limit(&self.shape, *agent);
        let limits: Vec<usize> = service.agents.iter().map(|agent| limit(agent).map_or(2, |it| it as usize)).collect();
        let is_limited = service.agents.iter().all(|agent| limit(agent).is_some());
        let all: usize = limits.iter().sum();
        let runs: Vec<JoinHandle<Outcome>> =
            (0..all).map(|number| self.ask_later(client, index, format!("f{index}n{number}"), 5, 1_000)).collect();
        sleep(Duration::from_secs(1)).await;
        let held: Vec<usize> = service.agents.iter().map(|agent| self.oracle.borrow().held_at(*agent)).collect();
        if held.iter().sum::<usize>() != all || (is_limited && held != limits) {
            self.trace.violation(format!("s{index} has room for {limits:?} runs and takes {held:?}"));
        }
        if is_limited {
            let one_more = self.ask_later(client, index, format!("f{index}more"), 1, 1);
            sleep(Duration::from_secs(1)).await;
            if one_more.is_finished() {
                self.trace.violation(format!("s{index} is full, and one more run did not wait: {:?}", one_more.await));
            } else {
                one_more.abort();
            }
        }
        for run in runs {
            let outcome = run.await;
            if !matches!(outcome, Ok(Outcome::Answered { status: 200, .. })) {
                self.trace.violation(format!("s{index}, with nothing wrong: {outcome:?}"));
            }
        }
    }

    /// A run without a session.
    fn ask_later(
        self: &Rc<World>,
        client: usize,
        service: usize,
        token: String,
        events: u64,
        gap: u64,
    ) -> JoinHandle<Outcome> {
        let world = Rc::clone(self);
        let ask = Ask {
            service,
            session: None,
            token,
            events,
            gap,
            failure: "none",
            stubborn: false,
            patience: Duration::from_secs(60),
        };
        spawn_local(async move { exchange(&world, client, None, &ask).await.0 })
    }

    /// The proxy's drain ends, and lets what runs end.
    async fn end(self: &Rc<World>) {
        let runs: Vec<JoinHandle<Outcome>> = (0..3)
            .map(|number| {
                let service = number % self.shape.services.len();
                self.ask_later(self.shape.clients, service, format!("d{number}"), 6, 1_000)
            })
            .collect();
        sleep(Duration::from_millis(500)).await;
        self.trace.note("the proxy is told to end");
        self.proxy.drain.drain();
        for run in runs {
            let outcome = run.await;
            // There may be room for fewer.
            if !matches!(outcome, Ok(Outcome::Answered { status: 200, .. } | Outcome::Refused { .. })) {
                self.trace.violation(format!("the proxy's drain cut a run: {outcome:?}"));
            }
        }
        let phase = || {
            let phase = self.proxy.running.drain.phase();
            (phase != longhaul::drain::Phase::Forced).then(|| format!("{phase:?}"))
        };
        self.becomes("the proxy has ended", Duration::from_secs(30), phase).await;
        let late = self.network.connect_from(client_host(0), listener()).await;
        if late.is_ok() {
            self.trace.violation("the proxy has ended and still listens");
        }
    }

    /// Asks the admin API, from the proxy's own machine.
    pub async fn admin(&self, method: &str, path: &str) -> String {
        let address = crate::shape::ADMIN.parse().expect("an address");
        let asked = async {
            let stream = self.network.connect(address).await.ok()?;
            let mut wire = Wire::new(stream);
            let head = format!(
                "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
                crate::shape::ADMIN
            );
            wire.write(&head).await.ok()?;
            let head = wire.head().await.ok()??;
            match wire.body(&head).await {
                crate::wire::Ending::Whole(body) => Some(format!("{}\n{}", head.line, String::from_utf8_lossy(&body))),
                crate::wire::Ending::Cut(_) => None,
            }
        };
        match timeout(Duration::from_secs(30), asked).await {
            Ok(Some(answer)) => answer,
            _ => {
                self.trace.violation(format!("the admin API does not answer {method} {path}"));
                String::new()
            }
        }
    }

    /// Writes the configuration as `settings` are now, and reloads.
    pub async fn reload(&self) {
        let _alone = self.reloading.lock().await;
        let text = self.shape.configuration(&self.settings.borrow());
        let limits = |oracle: &mut Oracle| {
            for agent in 0..self.shape.agents {
                oracle.set_limit(agent, self.settings.borrow().limit(&self.shape, agent));
            }
        };
        limits(&mut self.oracle.borrow_mut());
        fs::write(self.file(), text).expect("writable");
        if let Err(problems) = self.proxy.reload.reload().await {
            self.trace.violation(format!("a good configuration was refused: {problems}"));
        }
    }

    /// Reloads a file that is no configuration: nothing may change.
    pub async fn reload_nonsense(&self) {
        let _alone = self.reloading.lock().await;
        fs::write(self.file(), "services: [").expect("writable");
        if self.proxy.reload.reload().await.is_ok() {
            self.trace.violation("nonsense was taken for a configuration");
        }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("longhaul.yaml")
    }

    pub fn trouble_client(&self, client: usize) {
        self.client_troubles.borrow_mut()[client] = Some(Instant::now());
    }

    pub fn is_client_troubled(&self, client: usize, since: Instant) -> bool {
        let last = self.client_troubles.borrow()[client];
        last.is_some_and(|last| last + Duration::from_secs(10) >= since)
    }

    pub fn set_link(&self, host: IpAddr, link: Link) {
        self.network.set_link(host, PROXY, link);
    }

    /// Every link of the proxy, whole.
    pub fn heal_links(&self) {
        (0..self.shape.clients).for_each(|client| self.set_link(client_host(client), Link::default()));
        (0..self.shape.agents).for_each(|agent| self.set_link(agent_host(agent), Link::default()));
    }
}
