//! Discovery: keeps one task for each source of endpoints in the newest configuration, and tells dispatchers what they find.
//!
//! A source that a reload keeps is not started again, and what it has found stays; what a removed one found drains. Whatever
//! becomes of the one who is asked (a name server, an API server), what is known holds until the next answer.

mod dns;
#[cfg(feature = "kubernetes")]
mod kubernetes;
#[cfg(feature = "kubernetes")]
mod slices;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use rustls_pki_types::ServerName;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use crate::config::{self, EndpointHost, EndpointUrl};
use crate::control::call::Way;
use crate::control::health::{Check, OwnLoad, Probe};
use crate::ids;
use crate::metrics::VersionMetrics;
use crate::state::discovery::{Change, Discovered, OfSources, Origin, Readiness};
use crate::state::dispatcher::Dispatcher;
use crate::state::{ClientTls, TargetSettings};

/// Between two looks at whether every source has answered.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What the ways to find endpoints take from their surroundings. Tests give their own.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// `None`: what `/etc/resolv.conf` says.
    pub name_servers: Option<Vec<SocketAddr>>,
    /// After so long a silence an API server is asked for a sign of life.
    pub silence: Duration,
}

impl Default for Surroundings {
    fn default() -> Surroundings {
        Surroundings { name_servers: None, silence: Duration::from_secs(10) }
    }
}

/// One source of one version, as the newest configuration has it.
pub struct Plan {
    pub service: Arc<str>,
    pub dispatcher: Arc<Dispatcher>,
    pub version: Arc<str>,
    pub source: config::EndpointSource,
    pub template: Template,
}

/// What every endpoint of a source has in common.
pub struct Template {
    pub http: config::HttpVersion,
    pub host: config::HostPolicy,
    pub headers: config::HeaderEdits,
    pub pool: config::Pool,
    pub metrics: Arc<VersionMetrics>,
    /// All speak https, whatever is found out about them.
    pub https: bool,
    /// `None`: https is not possible.
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// `None`: the name under which they are found.
    pub server_name: Option<ServerName<'static>>,
    pub health: config::Health,
    pub own_load: Option<OwnLoad>,
}

/// What a source tells of one endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    pub host: EndpointHost,
    pub port: u16,
    /// The source knows that it speaks https.
    pub https: bool,
    /// The name that its certificate has, unless the configuration says another.
    pub name: Arc<str>,
    pub uid: Option<Arc<str>>,
    pub pod: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    pub readiness: Readiness,
    /// Relative to the other endpoints of the source.
    pub weight: u32,
}

/// What tells endpoints of one source apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Box<str>);

impl Found {
    pub fn key(&self) -> Key {
        let url = EndpointUrl::Tcp { https: false, host: self.host.clone(), port: self.port };
        Key(crate::state::identity(&url, self.uid.as_deref()).into())
    }
}

/// What a source has found out since it told last.
#[derive(Default)]
pub struct Update {
    pub put: Vec<Found>,
    pub removed: Vec<Key>,
    /// What is removed does not answer any more, so that nobody is sent there.
    pub lost: bool,
    /// It is an answer, and yet something is wrong.
    pub problem: Option<String>,
}

/// How a source stands, for status and metrics.
#[derive(Clone, Debug)]
pub struct SourceStatus {
    pub service: Arc<str>,
    pub version: Arc<str>,
    /// [`config::Source`] as text.
    pub source: Arc<str>,
    /// It has said at least once what there is.
    pub answered: bool,
    pub ready: usize,
    pub not_ready: usize,
    pub draining: usize,
    /// When it last said what there is, or that nothing has changed.
    pub last_success: Option<SystemTime>,
    pub failures: u64,
    /// What is wrong now, and what to do.
    pub problem: Option<Arc<str>>,
}

/// All sources.
pub struct Discovery {
    surroundings: Surroundings,
    inner: Mutex<Inner>,
    /// What health is to probe: what is listed, and what is found.
    checks: watch::Sender<Vec<Arc<Check>>>,
}

#[derive(Default)]
struct Inner {
    /// Tasks may be spawned.
    started: bool,
    /// Every source has answered at some time: from then on one that is new keeps nobody from being ready.
    complete: bool,
    /// In the order of the configuration, which decides who has an endpoint that two find.
    sources: Vec<Source>,
    listed_checks: Vec<Arc<Check>>,
    kubernetes: config::Kubernetes,
    #[cfg(feature = "kubernetes")]
    cluster: Arc<kubernetes::Cluster>,
    last_id: u64,
}

struct Source {
    id: u64,
    name: Arc<str>,
    plan: Plan,
    found: HashMap<Key, Found>,
    checks: HashMap<Key, Arc<Check>>,
    answered: bool,
    last_success: Option<SystemTime>,
    failures: u64,
    problem: Option<Arc<str>>,
    /// It was told that another one has an endpoint that this one finds.
    told_of_double: bool,
    /// Ends with it.
    task: Option<AbortOnDropHandle<()>>,
}

impl Discovery {
    pub fn new(surroundings: Surroundings) -> Arc<Discovery> {
        Arc::new(Discovery {
            surroundings,
            inner: Mutex::new(Inner::default()),
            checks: watch::Sender::new(Vec::new()),
        })
    }

    /// For the health checks.
    pub fn checks(&self) -> watch::Receiver<Vec<Arc<Check>>> {
        self.checks.subscribe()
    }

    /// Takes the sources of a configuration that takes effect, and the checks of the endpoints that it lists. To be followed
    /// by [`Discovery::of_service`] for each service, in one go: sources tell what they find on the same thread.
    pub fn take(self: &Arc<Self>, plans: Vec<Plan>, checks: Vec<Arc<Check>>, kubernetes: &config::Kubernetes) {
        let mut inner = self.lock();
        let other_cluster = inner.kubernetes != *kubernetes;
        if other_cluster {
            inner.kubernetes = kubernetes.clone();
            #[cfg(feature = "kubernetes")]
            {
                inner.cluster = Arc::new(kubernetes::Cluster::new(kubernetes.clone()));
            }
        }
        let mut old = std::mem::take(&mut inner.sources);
        for plan in plans {
            let same = |old: &Source| old.plan.service == plan.service && old.plan.source.source == plan.source.source;
            // What another cluster said is nothing here: its pods leave.
            let elsewhere = other_cluster && matches!(plan.source.source, config::Source::Kubernetes(_));
            let mut source = match old.iter().position(same) {
                Some(place) if !elsewhere => Source { plan, ..old.swap_remove(place) },
                _ => {
                    inner.last_id += 1;
                    Source::new(inner.last_id, plan)
                }
            };
            source.checks =
                source.found.iter().filter_map(|(key, found)| Some((key.clone(), source.plan.check(found)?))).collect();
            inner.sources.push(source);
        }
        inner.listed_checks = checks;
        inner.complete |= !inner.sources.is_empty() && inner.sources.iter().all(|source| source.answered);
        if inner.started {
            self.start_tasks(&mut inner);
        }
        self.tell_checks(&inner);
    }

    /// What the sources of a service have found so far, by version.
    pub fn of_service(&self, service: &config::Service) -> Vec<OfSources> {
        let inner = self.lock();
        let of_version = |version: &config::Version| {
            let sources = || {
                inner
                    .sources
                    .iter()
                    .filter(|source| *source.plan.service == *service.name && *source.plan.version == *version.name)
            };
            OfSources {
                found: sources()
                    .flat_map(|source| source.found.values().filter_map(|found| source.discovered(found)))
                    .collect(),
                awaited: sources().any(|source| !source.answered),
            }
        };
        service.versions.iter().map(of_version).collect()
    }

    /// Begins to ask. To be called once, within the runtime of the control plane.
    pub fn start(self: &Arc<Self>) {
        let mut inner = self.lock();
        inner.started = true;
        self.start_tasks(&mut inner);
    }

    fn start_tasks(self: &Arc<Self>, inner: &mut Inner) {
        #[cfg(feature = "kubernetes")]
        let cluster = Arc::clone(&inner.cluster);
        for source in inner.sources.iter_mut().filter(|source| source.task.is_none()) {
            let reporter = Reporter { discovery: Arc::downgrade(self), id: source.id };
            let task = match &source.plan.source.source {
                config::Source::Dns(dns) => {
                    tokio::spawn(dns::run(dns.clone(), self.surroundings.name_servers.clone(), reporter))
                }
                #[cfg(feature = "kubernetes")]
                config::Source::Kubernetes(service) => tokio::spawn(kubernetes::run(
                    service.clone(),
                    Arc::clone(&cluster),
                    self.surroundings.silence,
                    reporter,
                )),
                // The configuration refuses it.
                #[cfg(not(feature = "kubernetes"))]
                config::Source::Kubernetes(_) => continue,
            };
            source.task = Some(AbortOnDropHandle::new(task));
        }
    }

    /// The first source that has never answered; `None` where all have, or had at some time.
    pub fn awaited(&self) -> Option<SourceStatus> {
        let mut inner = self.lock();
        let awaited = inner.sources.iter().find(|source| !source.answered).map(Source::status);
        inner.complete |= awaited.is_none();
        awaited.filter(|_| !inner.complete)
    }

    /// Returns when every source has answered.
    pub async fn complete(&self) {
        while self.awaited().is_some() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    pub fn status(&self) -> Vec<SourceStatus> {
        self.lock().sources.iter().map(Source::status).collect()
    }

    fn take_update(&self, id: u64, update: Update) {
        let mut inner = self.lock();
        let Some(place) = inner.sources.iter().position(|source| source.id == id) else { return };
        let mut changes: HashMap<Arc<str>, Vec<Change>> = HashMap::new();
        let Update { put, removed, lost, problem } = update;
        // Before what is new: a pod may have taken the address of another.
        for key in removed {
            let Some(found) = inner.sources[place].found.remove(&key) else { continue };
            inner.sources[place].checks.remove(&key);
            let heir = inner.heir(place, &key);
            let source = &inner.sources[place];
            let version = source.plan.version.clone();
            match heir {
                // Nothing of ours was told.
                Heir::Owner => {}
                Heir::Next(version, discovered) => changes.entry(version).or_default().push(Change::Put(discovered)),
                Heir::Nobody => {
                    let identity = source.plan.identity(&found).into();
                    changes.entry(version).or_default().push(Change::Remove { identity, lost });
                }
            }
        }
        for found in put {
            let key = found.key();
            let double = inner.other_owner(place, &key, ..place);
            let source = &mut inner.sources[place];
            if source.found.get(&key) == Some(&found) {
                continue;
            }
            // As https it is another endpoint than as http.
            let identity = source.plan.identity(&found);
            let before = source.found.get(&key).map(|found| source.plan.identity(found));
            if let Some(before) = before.filter(|before| *before != identity && double.is_none()) {
                let gone = Change::Remove { identity: before.into(), lost: false };
                changes.entry(source.plan.version.clone()).or_default().push(gone);
            }
            match source.plan.check(&found) {
                Some(check) => drop(source.checks.insert(key.clone(), check)),
                None => drop(source.checks.remove(&key)),
            }
            if let Some(owner) = double {
                source.tell_of_double(&key, &owner);
            } else if let Some(discovered) = source.discovered(&found) {
                changes.entry(source.plan.version.clone()).or_default().push(Change::Put(Box::new(discovered)));
            }
            source.found.insert(key, found);
        }
        let source = &mut inner.sources[place];
        let first = !std::mem::replace(&mut source.answered, true);
        match problem {
            None => source.succeeded(),
            Some(problem) => source.failed(&problem),
        }
        let (service, version) = (Arc::clone(&source.plan.service), Arc::clone(&source.plan.version));
        let dispatcher = Arc::clone(&source.plan.dispatcher);
        let of_version = |source: &&Source| source.plan.service == service && source.plan.version == version;
        if first && inner.sources.iter().filter(of_version).all(|source| source.answered) {
            changes.entry(version).or_default().push(Change::AllAnswered);
        }
        let now = ids::now();
        let changed = !changes.is_empty();
        for (version, changes) in changes {
            dispatcher.discover(&version, changes, now);
        }
        if changed {
            self.tell_checks(&inner);
        }
    }

    fn tell_checks(&self, inner: &Inner) {
        let found = inner.sources.iter().flat_map(|source| source.checks.values());
        let all: Vec<Arc<Check>> = inner.listed_checks.iter().chain(found).cloned().collect();
        if !all.is_empty() || !self.checks.borrow().is_empty() {
            self.checks.send_replace(all);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who has an endpoint that a source gives up.
enum Heir {
    /// Another had it all the time.
    Owner,
    /// Another finds it, too, and has it from now on: in this version.
    Next(Arc<str>, Box<Discovered>),
    Nobody,
}

impl Inner {
    /// The source in this range that finds the same endpoint for the same service.
    fn other_owner(&self, place: usize, key: &Key, range: std::ops::RangeTo<usize>) -> Option<Arc<str>> {
        let service = &self.sources[place].plan.service;
        let owner = self.sources[range].iter().find(|it| it.plan.service == *service && it.found.contains_key(key));
        owner.map(|owner| Arc::clone(&owner.name))
    }

    fn heir(&self, place: usize, key: &Key) -> Heir {
        if self.other_owner(place, key, ..place).is_some() {
            return Heir::Owner;
        }
        let service = &self.sources[place].plan.service;
        let later = self.sources[place + 1..].iter().filter(|it| it.plan.service == *service);
        let next = later.filter_map(|it| Some((it, it.discovered(it.found.get(key)?)?))).next();
        next.map_or(Heir::Nobody, |(it, discovered)| Heir::Next(Arc::clone(&it.plan.version), Box::new(discovered)))
    }
}

impl Source {
    fn new(id: u64, plan: Plan) -> Source {
        Source {
            id,
            name: plan.source.source.to_string().into(),
            plan,
            found: HashMap::new(),
            checks: HashMap::new(),
            answered: false,
            last_success: None,
            failures: 0,
            problem: None,
            told_of_double: false,
            task: None,
        }
    }

    fn succeeded(&mut self) {
        self.last_success = Some(ids::wall_clock());
        if self.problem.take().is_some() {
            let (service, version, source) = (&self.plan.service, &self.plan.version, &self.name);
            info!(%service, %version, %source, "discovery works again");
        }
    }

    /// One line for each problem, not for each time that it is met.
    fn failed(&mut self, problem: &str) {
        self.failures += 1;
        if self.problem.as_deref() == Some(problem) {
            return;
        }
        let (service, version, source) = (&self.plan.service, &self.plan.version, &self.name);
        let endpoints = self.found.len();
        warn!(%service, %version, %source, endpoints, "discovery: {problem}; what is known stays in use");
        self.problem = Some(problem.into());
    }

    fn tell_of_double(&mut self, key: &Key, owner: &str) {
        if std::mem::replace(&mut self.told_of_double, true) {
            return;
        }
        let (service, version, source, endpoint) = (&self.plan.service, &self.plan.version, &self.name, &key.0);
        warn!(
            %service, %version, %source, endpoint,
            "the endpoint is also found by {owner}, which comes first and has it: give each version a source of its own"
        );
    }

    fn discovered(&self, found: &Found) -> Option<Discovered> {
        self.plan.discovered(found, &self.name)
    }

    fn status(&self) -> SourceStatus {
        let count = |readiness| self.found.values().filter(|found| found.readiness == readiness).count();
        SourceStatus {
            service: Arc::clone(&self.plan.service),
            version: Arc::clone(&self.plan.version),
            source: Arc::clone(&self.name),
            answered: self.answered,
            ready: count(Readiness::Ready),
            not_ready: count(Readiness::NotReady),
            draining: count(Readiness::Draining),
            last_success: self.last_success,
            failures: self.failures,
            problem: self.problem.clone(),
        }
    }
}

impl Plan {
    fn url(&self, found: &Found) -> EndpointUrl {
        let https = self.template.https || found.https;
        EndpointUrl::Tcp { https, host: found.host.clone(), port: found.port }
    }

    fn identity(&self, found: &Found) -> String {
        crate::state::identity(&self.url(found), found.uid.as_deref())
    }

    /// `None`: it needs https, and that is not possible.
    fn tls(&self, found: &Found) -> Option<Option<ClientTls>> {
        let Template { https, tls, server_name, .. } = &self.template;
        if !https && !found.https {
            return Some(None);
        }
        let server_name = match server_name {
            Some(name) => name.clone(),
            None => ServerName::try_from(found.name.to_string()).ok()?,
        };
        Some(Some(ClientTls { config: Arc::clone(tls.as_ref()?), server_name }))
    }

    fn discovered(&self, found: &Found, source: &Arc<str>) -> Option<Discovered> {
        let Template { http, host, headers, pool, metrics, .. } = &self.template;
        Some(Discovered {
            settings: TargetSettings {
                service: Arc::clone(&self.service),
                version: Arc::clone(&self.version),
                url: self.url(found),
                uid: found.uid.clone(),
                http: *http,
                host: host.clone(),
                headers: headers.clone(),
                pool: pool.clone(),
                tls: self.tls(found)?,
                metrics: Arc::clone(metrics),
            },
            weight: self.source.weight.saturating_mul(found.weight),
            max_runs: self.source.max_runs,
            readiness: found.readiness,
            origin: Origin { source: Arc::clone(source), pod: found.pod.clone(), zone: found.zone.clone() },
        })
    }

    /// `None`: it is not to be probed.
    fn check(&self, found: &Found) -> Option<Arc<Check>> {
        let Template { http, host, headers, health, own_load, .. } = &self.template;
        if health.path.is_none() && !health.tcp && own_load.is_none() {
            return None;
        }
        Some(Arc::new(Check {
            service: Arc::clone(&self.service),
            dispatcher: Arc::clone(&self.dispatcher),
            identity: self.identity(found),
            probe: Probe {
                way: Way {
                    url: self.url(found),
                    port: health.port,
                    http: *http,
                    host: host.clone(),
                    set: headers.set.clone(),
                    tls: self.tls(found)?,
                },
                health: health.clone(),
                own_load: *own_load,
            },
        }))
    }
}

/// How a source tells what it finds. What comes from one that the configuration no longer has is not heard.
#[derive(Clone)]
pub struct Reporter {
    discovery: Weak<Discovery>,
    id: u64,
}

impl Reporter {
    /// What has changed; nothing is an answer, too.
    pub fn found(&self, update: Update) {
        if let Some(discovery) = self.discovery.upgrade() {
            discovery.take_update(self.id, update);
        }
    }

    /// All that there is now.
    pub fn found_all(&self, all: Vec<Found>, problem: Option<String>) {
        let Some(discovery) = self.discovery.upgrade() else { return };
        let removed = {
            let inner = discovery.lock();
            let Some(source) = inner.sources.iter().find(|source| source.id == self.id) else { return };
            let mut gone: std::collections::HashSet<Key> = source.found.keys().cloned().collect();
            for found in &all {
                gone.remove(&found.key());
            }
            gone.into_iter().collect()
        };
        discovery.take_update(self.id, Update { put: all, removed, lost: false, problem });
    }

    /// Nobody can say at the moment what there is.
    pub fn failed(&self, problem: &str) {
        let Some(discovery) = self.discovery.upgrade() else { return };
        if let Some(source) = discovery.lock().sources.iter_mut().find(|source| source.id == self.id) {
            source.failed(problem);
        }
    }
}
