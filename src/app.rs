//! App: builds every part from a config and runs them until the end.
//!
//! Nothing here is global: several may live in one process, as they do in tests.

#[cfg(feature = "simulation")]
pub mod here;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info, warn};

use crate::admin;
use crate::config::{Address, Loaded, Problems, State};
use crate::control::handover::{self, Door, HandOver, Predecessor, Program};
use crate::control::notify::{self, Notifier};
use crate::control::reload::{self, AfterReload, Heritage, Outlets, Reloader, Side, SideCommand};
use crate::control::shutdown::{self, Ended, Signals};
use crate::control::{DrainHandle, ReloadHandle, ReloadState, clock, health, runs, watch};
use crate::logging::AccessLog;
use crate::metrics::Metrics;
use crate::net::descriptors;
use crate::net::listen::Socket;
use crate::proxy;
use crate::scaling::Source;
#[cfg(feature = "kubernetes")]
use crate::scaling::{self, replicas::Replicas};
use crate::snapshot::{AcceptCommand, Running};
use crate::store::{self, Expected, StoreSlot};

/// How long the data plane may take to end after everything was cut.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a process that takes over looks for endpoints before it does.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(10);
/// Workers where the number of cores is not known.
const WORKERS_DEFAULT: usize = 2;

pub struct Options {
    /// Read again at every reload.
    pub config_path: PathBuf,
    /// What [`crate::config::load`] made of it.
    pub loaded: Loaded,
    /// Worker threads of the data plane; `None`: one for each core.
    pub workers: Option<usize>,
    /// Obey SIGTERM, SIGINT, SIGHUP and SIGUSR2. They belong to the whole process, so only the binary sets this.
    pub signals: bool,
    /// Reload when files change.
    pub watch: bool,
    /// Called after each reload that changed something; the binary sets its log level by it.
    pub after_reload: Option<AfterReload>,
    /// What this process was given by the one that started it.
    pub heritage: Heritage,
    /// The process that serves until this one does.
    pub predecessor: Option<Predecessor>,
    /// What a later process is started from, that is to take over from this one.
    pub program: Option<Program>,
}

impl Options {
    /// As tests want it: no signals, no watching, two workers.
    pub fn new(config_path: PathBuf, loaded: Loaded) -> Options {
        Options {
            config_path,
            loaded,
            workers: Some(2),
            signals: false,
            watch: false,
            after_reload: None,
            heritage: Heritage::default(),
            predecessor: None,
            program: None,
        }
    }
}

/// Why the proxy did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Certificates that can't be used, listeners that can't be bound.
    #[error("{}", describe(.0))]
    Refused(Problems),
    /// The admin API's address can't be bound, or a socket that was passed is for nothing.
    #[error("admin.address: {0}")]
    Admin(String),
    /// What `state.file` names can't be used.
    #[error(transparent)]
    Store(#[from] store::OpenError),
    /// The system gave no thread, runtime or signal.
    #[error("can't start: {0}")]
    System(#[from] std::io::Error),
}

fn describe(problems: &Problems) -> String {
    let lines = problems.list.iter().map(|problem| format!("{}: {}: {}", problems.file, problem.path, problem.message));
    lines.collect::<Vec<_>>().join("\n")
}

/// The addresses really bound: ports are never 0.
#[derive(Clone, Debug)]
pub struct Bound {
    /// By name, in the order of the configuration.
    pub listeners: Vec<(String, Address)>,
    pub admin: Address,
    pub probes: Option<Address>,
    pub external_metrics: Option<Address>,
    pub keda: Option<Address>,
}

/// A running proxy. Dropping it without [`App::wait`] ends it at once.
pub struct App {
    pub bound: Bound,
    pub running: Arc<Running>,
    pub drain: DrainHandle,
    pub reload: ReloadHandle,
    pub reload_state: Arc<ReloadState>,
    store: StoreSlot,
    /// Taken by `wait`.
    threads: Option<Threads>,
}

struct Threads {
    control: JoinHandle<Ended>,
    data: proxy::Handle,
}

/// Binds everything, then starts both planes. When this returns, connections are accepted and the admin API answers.
pub fn build(options: Options) -> Result<App, StartError> {
    let workers = options.workers;
    let Built { bound, accept, control } = assemble(options)?;
    let workers = workers.unwrap_or_else(|| thread::available_parallelism().map_or(WORKERS_DEFAULT, usize::from));
    let running = Arc::clone(&control.context.running);
    let data = proxy::start(Arc::clone(&running), workers, accept)?;

    let (drain, reload) = (control.context.drain.clone(), control.context.reload.clone());
    let (reload_state, store) = (Arc::clone(&control.context.reload_state), control.store.clone());
    let (ready_sender, ready) = sync_channel(1);
    let control = thread::Builder::new().name("control".to_owned()).spawn(move || control.run(&ready_sender));
    let started = control.and_then(|control| match ready.recv() {
        Ok(Ok(())) => Ok(control),
        Ok(Err(failure)) => Err(failure),
        Err(_) => Err(std::io::Error::other("the control thread ended before it began")),
    });
    let control = match started {
        Ok(control) => control,
        Err(failure) => {
            running.drain.advance(crate::drain::Phase::Forced);
            data.join();
            return Err(failure.into());
        }
    };
    announce(&bound);
    Ok(App { bound, running, drain, reload, reload_state, store, threads: Some(Threads { control, data }) })
}

/// Everything but what it runs on.
struct Built {
    bound: Bound,
    /// For the accept loop.
    accept: mpsc::Receiver<AcceptCommand>,
    control: Control,
}

/// Binds everything.
fn assemble(options: Options) -> Result<Built, StartError> {
    let Options { config_path, loaded, workers: _, signals, watch, after_reload, mut heritage, predecessor, program } =
        options;
    let notifier = heritage.notifier.clone();
    match descriptors::raise_limit() {
        Ok(limit) => {
            if let Err(failure) = descriptors::reserve(limit) {
                tracing::debug!("no room could be made for descriptors: {failure}");
            }
        }
        Err(failure) => tracing::warn!("the descriptor limit could not be raised: {failure}"),
    }
    reload::log_warnings(&config_path.display().to_string(), &loaded);
    let admin_address = loaded.config.admin.address.clone();
    let metrics = Metrics::new();
    let store = heritage.store.clone();
    match &loaded.config.state {
        State::Memory => {}
        // It is opened when the process that serves has closed it.
        State::File(directory) if predecessor.is_some() => {
            if let Some(secrets) = heritage.secrets.clone() {
                store.expect(Expected { directory: directory.clone(), metrics: metrics.store(), secrets });
            }
        }
        State::File(directory) => {
            let (opened, found) = store::open(directory, metrics.store())?;
            heritage.kept = Some(found);
            store.put(opened);
        }
    }
    let name_servers = heritage.surroundings.name_servers.clone();
    let access_log = AccessLog::start(&loaded.config.log, metrics.access_log_dropped());
    // Before the listeners, whose ports may be shared: a proxy that was started twice must end before it is given a
    // connection that it would lose.
    let (admin_bound, admin_socket) =
        reload::bind_admin(&mut heritage.sockets, &admin_address).map_err(StartError::Admin)?;
    let (mut reloader, outlets) =
        Reloader::new(config_path.clone(), loaded, metrics, access_log, after_reload, heritage)
            .map_err(StartError::Refused)?;
    reloader.bound_admin(&admin_address, &admin_socket).map_err(StartError::Admin)?;

    let Outlets { running, handle: reload, state: reload_state, accept, sides, side_addresses, discovery } = outlets;
    let side =
        |wanted: Side| side_addresses.iter().find(|(side, _)| *side == wanted).map(|(_, address)| address.clone());
    let bound = Bound {
        listeners: listeners(&running),
        admin: admin_bound,
        probes: side(Side::Probes),
        external_metrics: side(Side::ExternalMetrics),
        keda: side(Side::Keda),
    };
    let control = Control {
        config_path,
        watch,
        signals,
        reloader,
        admin_socket,
        sides,
        name_servers,
        notifier,
        predecessor,
        program,
        store,
        context: Arc::new(admin::Context {
            source: Source::new(Arc::clone(&running), Arc::clone(&reload_state)),
            running,
            reload,
            reload_state,
            drain: DrainHandle::new(),
            discovery,
        }),
    };
    Ok(Built { bound, accept, control })
}

impl App {
    /// The address of the listener `name`, as it is bound now.
    pub fn listener(&self, name: &str) -> Option<Address> {
        listeners(&self.running).into_iter().find(|(known, _)| known == name).map(|(_, address)| address)
    }

    /// Blocks until the proxy was drained or forced to end.
    pub fn wait(mut self) -> Ended {
        let open = || self.running.open_exchanges.get();
        let Some(Threads { control, data }) = self.threads.take() else { return Ended { cut: open(), forced: true } };
        let ended = control.join().unwrap_or_else(|_| {
            error!("the control plane broke down; ending");
            Ended { cut: open(), forced: true }
        });
        self.running.drain.advance(crate::drain::Phase::Forced);
        join_in_time(data);
        let snapshot = self.running.snapshot.load();
        self.store.end(|store| snapshot.services.iter().for_each(|service| store.keep(&service.dispatcher, false)));
        ended
    }
}

impl Drop for App {
    fn drop(&mut self) {
        if self.threads.is_some() {
            self.drain.force();
        }
    }
}

/// A worker that hangs must not keep the process alive.
fn join_in_time(data: proxy::Handle) {
    let (sender, done) = sync_channel(1);
    let joiner = thread::Builder::new().name("join".to_owned()).spawn(move || {
        data.join();
        // Nobody waits any more after the time-out.
        let _ = sender.send(());
    });
    if joiner.is_ok() && done.recv_timeout(JOIN_TIMEOUT).is_err() {
        error!("the data plane did not end within {JOIN_TIMEOUT:?}: left behind");
    }
}

fn listeners(running: &Running) -> Vec<(String, Address)> {
    let snapshot = running.snapshot.load();
    let address =
        |listener: &Arc<crate::snapshot::Listener>| (listener.config.name.clone(), listener.local_address.clone());
    snapshot.listeners.iter().map(address).collect()
}

fn announce(bound: &Bound) {
    for (name, address) in &bound.listeners {
        info!(name, "listening on {}", reload::display(address));
    }
    info!("admin listening on {}", reload::display(&bound.admin));
    let sides =
        [("probes", &bound.probes), ("external metrics", &bound.external_metrics), ("the scaler of KEDA", &bound.keda)];
    for (name, address) in sides {
        if let Some(address) = address {
            info!("{name} listening on {}", reload::display(address));
        }
    }
}

/// Everything that runs on the control thread.
struct Control {
    config_path: PathBuf,
    watch: bool,
    signals: bool,
    reloader: Reloader,
    admin_socket: Socket,
    sides: mpsc::Receiver<SideCommand>,
    name_servers: Option<Vec<SocketAddr>>,
    notifier: Notifier,
    predecessor: Option<Predecessor>,
    program: Option<Program>,
    store: StoreSlot,
    context: Arc<admin::Context>,
}

impl Control {
    /// Until the end of the drain. Says over `ready` whether it could begin.
    fn run(self, ready: &std::sync::mpsc::SyncSender<std::io::Result<()>>) -> Ended {
        // Whoever waits for `ready` is in `build` and can't have gone.
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(failure) => {
                let _ = ready.send(Err(failure));
                return NEVER_BEGAN;
            }
        };
        let ended = runtime.block_on(async {
            let signals = match self.signals.then(Signals::listen).transpose() {
                Ok(signals) => signals,
                Err(failure) => {
                    let _ = ready.send(Err(failure));
                    return NEVER_BEGAN;
                }
            };
            self.serve(signals, ready).await
        });
        // What is left may be stuck in reading a file.
        runtime.shutdown_timeout(Duration::from_millis(100));
        ended
    }

    async fn serve(self, signals: Option<Signals>, ready: &std::sync::mpsc::SyncSender<std::io::Result<()>>) -> Ended {
        let Control { config_path, watch, signals: _, reloader, .. } = self;
        let Control { admin_socket, sides, name_servers, notifier, predecessor, program, store, context, .. } = self;
        let (running, reload, state, drain) =
            (&context.running, &context.reload, &context.reload_state, &context.drain);
        // They end with the runtime.
        tokio::spawn(health::run(context.discovery.checks()));
        context.discovery.start();
        let (mut released, predecessor_gone) = (CancellationToken::new(), CancellationToken::new());
        match predecessor {
            None => {
                released.cancel();
                predecessor_gone.cancel();
            }
            // Everything is there; only now is anything taken from the process that serves.
            Some(predecessor) => {
                // While the other serves there is time to find endpoints; but it does not wait for ever.
                let _ = tokio::time::timeout(DISCOVERY_TIMEOUT, context.discovery.complete()).await;
                match predecessor.take_over(running, &reloader).await {
                    Ok(link) => {
                        released = link.released();
                        let gone = predecessor_gone.clone();
                        tokio::spawn(async move {
                            link.run().await;
                            gone.cancel();
                        });
                    }
                    Err(failure) => {
                        let _ = ready.send(Err(failure));
                        return NEVER_BEGAN;
                    }
                }
            }
        }
        tokio::spawn(reloader.run());
        tokio::spawn(clock::run(Arc::clone(running), Arc::clone(state)));
        tokio::spawn(runs::run(Arc::clone(running), Arc::clone(state)));
        // As signals, it belongs to the whole process.
        let door = signals.is_some().then(|| Door::of(&config_path)).and_then(|door| {
            door.map_err(|failure| warn!("`longhaul run --upgrade` can't find this process: {failure}")).ok()
        });
        if watch {
            tokio::spawn(watch::run(config_path, reload.clone(), Arc::clone(state)));
        }
        let asked = Arc::new(Notify::new());
        if let Some(signals) = signals {
            tokio::spawn(signals.run(drain.clone(), reload.clone(), Arc::clone(&asked)));
        }
        let admin_stop = CancellationToken::new();
        tokio::spawn(admin::serve(Arc::clone(&context), admin_socket, admin::Surface::Full, admin_stop.clone()));
        tokio::spawn(serve_sides(Arc::clone(&context), sides, name_servers, admin_stop.clone()));
        let _ = ready.send(Ok(()));
        let (running_there, state_there) = (Arc::clone(running), Arc::clone(state));
        tokio::spawn(tell(notifier.clone(), running_there, state_there, released.clone(), store.clone()));
        let hand_over = HandOver {
            running: Arc::clone(running),
            reload: reload.clone(),
            reload_state: Arc::clone(state),
            notifier,
            program,
            asked,
            door,
            predecessor_released: released,
            predecessor_gone,
            admin_stop,
            store,
        };
        let ended = shutdown::run(Arc::clone(running), drain.clone(), reload.clone(), Arc::clone(state));
        tokio::select! {
            biased;
            ended = ended => ended,
            ended = handover::run(hand_over) => ended,
        }
    }
}

/// Opens the store where another process had it, and tells the service manager how this stands, once this process is
/// the one that it asks.
async fn tell(
    notifier: Notifier,
    running: Arc<Running>,
    state: Arc<ReloadState>,
    released: CancellationToken,
    store: StoreSlot,
) {
    released.cancelled().await;
    if let Err(failure) = open_store(&running, &store).await {
        error!("the state is not kept until that changes; trying again every {OPEN_EVERY:?}: {failure}");
        // Nobody waits for it any longer.
        tokio::spawn(keep_opening(Arc::clone(&running), store));
    }
    notifier.ready(&format!("serving, configuration {}", state.status().generation));
    tokio::join!(notify::tell_reloads(notifier.clone(), state), notify::run(notifier, running));
}

/// How often it is tried to open the store after it could not be.
const OPEN_EVERY: Duration = Duration::from_secs(1);

async fn keep_opening(running: Arc<Running>, store: StoreSlot) {
    loop {
        tokio::time::sleep(OPEN_EVERY).await;
        if open_store(&running, &store).await.is_ok() {
            // Else another process was given it.
            if store.get().is_some() {
                info!("the state is kept from here on");
            }
            return;
        }
    }
}

/// An error: it is another's still, or can't be used, and can be tried again.
async fn open_store(running: &Running, store: &StoreSlot) -> Result<(), String> {
    let slot = store.clone();
    match tokio::task::spawn_blocking(move || slot.take_over()).await {
        Ok(opened) => opened.map_err(|failure| failure.to_string())?,
        Err(_) => return Err("opening it broke down".to_owned()),
    }
    // Here, on the thread of reloads: a service is kept by this or by the reload that it came with.
    if let Some(store) = store.get() {
        running.snapshot.load().services.iter().for_each(|service| store.keep(&service.dispatcher, false));
    }
    Ok(())
}

const NEVER_BEGAN: Ended = Ended { cut: 0, forced: true };

/// Serves beside what the newest configuration wants: probes, and what autoscalers ask.
async fn serve_sides(
    context: Arc<admin::Context>,
    mut commands: mpsc::Receiver<SideCommand>,
    name_servers: Option<Vec<SocketAddr>>,
    stop: CancellationToken,
) {
    #[cfg(feature = "kubernetes")]
    let replicas = Replicas::new(context.source.clone(), name_servers.as_deref());
    #[cfg(not(feature = "kubernetes"))]
    let _ = name_servers;
    #[cfg(feature = "kubernetes")]
    tokio::spawn(scaling::deletion_cost::run(Arc::clone(&replicas), stop.clone()));
    let mut servers: Vec<(Side, AbortOnDropHandle<()>)> = Vec::new();
    while let Some(SideCommand { side, socket }) = commands.recv().await {
        servers.retain(|(known, _)| *known != side);
        let Some(socket) = socket else { continue };
        let task = match side {
            Side::Probes => {
                tokio::spawn(admin::serve(Arc::clone(&context), socket, admin::Surface::Probes, stop.clone()))
            }
            #[cfg(feature = "kubernetes")]
            Side::Keda => tokio::spawn(scaling::keda::serve(Arc::clone(&replicas), socket, stop.clone())),
            #[cfg(feature = "kubernetes")]
            Side::ExternalMetrics => {
                tokio::spawn(scaling::external::serve(Arc::clone(&replicas), socket, stop.clone()))
            }
            // The configuration is refused that wants one.
            #[cfg(not(feature = "kubernetes"))]
            Side::Keda | Side::ExternalMetrics => continue,
        };
        servers.push((side, AbortOnDropHandle::new(task)));
    }
}
