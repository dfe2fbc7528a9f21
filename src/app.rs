//! App: builds every part from a config and runs them until the end.
//!
//! Nothing here is global: several may live in one process, as they do in tests.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info};

use crate::admin;
use crate::config::{Address, Loaded, Problems, State};
use crate::control::handover::{self, HandOver, Predecessor, Program};
use crate::control::notify::{self, Notifier};
use crate::control::reload::{self, AfterReload, Heritage, Outlets, Reloader, Side, SideCommand};
use crate::control::shutdown::{self, Ended, Signals};
use crate::control::{DrainHandle, ReloadHandle, ReloadState, clock, health, runs, watch};
use crate::logging::AccessLog;
use crate::metrics::Metrics;
use crate::net;
use crate::net::listen::Socket;
use crate::proxy;
use crate::scaling::Source;
#[cfg(feature = "kubernetes")]
use crate::scaling::{self, replicas::Replicas};
use crate::snapshot::Running;
use crate::store::{self, Secrets, StoreSlot};

/// How long the data plane may take to end after everything was cut.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
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
    /// Asked for other replicas, instead of the DNS servers of this machine.
    pub dns_server: Option<SocketAddr>,
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
            dns_server: None,
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
    let Options {
        config_path,
        loaded,
        workers,
        signals,
        watch,
        after_reload,
        mut heritage,
        predecessor,
        program,
        dns_server,
    } = options;
    let notifier = heritage.notifier.clone();
    if let Err(failure) = net::raise_descriptor_limit() {
        tracing::warn!("the descriptor limit could not be raised: {failure}");
    }
    reload::log_warnings(&config_path.display().to_string(), &loaded);
    let admin_address = loaded.config.admin.address.clone();
    let metrics = Metrics::new();
    let store = StoreSlot::clone(&heritage.store);
    let mut taken_over = None;
    match &loaded.config.state {
        State::Memory => {}
        // It is opened when the process that serves has closed it.
        State::File(directory) if predecessor.is_some() => {
            taken_over = heritage.secrets.clone().map(|secrets| (directory.clone(), secrets));
        }
        State::File(directory) => {
            let (opened, found) = store::open(directory, metrics.store())?;
            heritage.kept = Some(found);
            store.get_or_init(|| opened);
        }
    }
    let access_log = AccessLog::start(&loaded.config.log, metrics.access_log_dropped());
    // Before the listeners, whose ports may be shared: a proxy that was started twice must end before it is given a
    // connection that it would lose.
    let (admin_bound, admin_socket) =
        reload::bind_admin(&mut heritage.sockets, &admin_address).map_err(StartError::Admin)?;
    let (mut reloader, outlets) =
        Reloader::new(config_path.clone(), loaded, metrics, access_log, after_reload, heritage)
            .map_err(StartError::Refused)?;
    reloader.bound_admin(&admin_address, &admin_socket).map_err(StartError::Admin)?;

    let Outlets { running, handle: reload, state: reload_state, accept, sides, side_addresses, checks } = outlets;
    let side =
        |wanted: Side| side_addresses.iter().find(|(side, _)| *side == wanted).map(|(_, address)| address.clone());
    let bound = Bound {
        listeners: listeners(&running),
        admin: admin_bound,
        probes: side(Side::Probes),
        external_metrics: side(Side::ExternalMetrics),
        keda: side(Side::Keda),
    };
    let drain = DrainHandle::new();
    let workers = workers.unwrap_or_else(|| thread::available_parallelism().map_or(WORKERS_DEFAULT, usize::from));
    let data = proxy::start(Arc::clone(&running), workers, accept)?;

    let control = Control {
        config_path,
        watch,
        signals,
        reloader,
        checks,
        admin_socket,
        sides,
        dns_server,
        notifier,
        predecessor,
        program,
        store: store.clone(),
        taken_over,
        context: Arc::new(admin::Context {
            source: Source::new(Arc::clone(&running), Arc::clone(&reload_state)),
            running: Arc::clone(&running),
            reload: reload.clone(),
            reload_state: Arc::clone(&reload_state),
            drain: drain.clone(),
        }),
    };
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

impl App {
    /// The address of the listener `name`, as it is bound now.
    pub fn listener(&self, name: &str) -> Option<Address> {
        listeners(&self.running).into_iter().find(|(known, _)| known == name).map(|(_, address)| address)
    }

    /// Blocks until the proxy was drained or forced to end.
    pub fn wait(mut self) -> Ended {
        let open = || self.running.open_exchanges.load(std::sync::atomic::Ordering::Acquire);
        let Some(Threads { control, data }) = self.threads.take() else { return Ended { cut: open(), forced: true } };
        let ended = control.join().unwrap_or_else(|_| {
            error!("the control plane broke down; ending");
            Ended { cut: open(), forced: true }
        });
        self.running.drain.advance(crate::drain::Phase::Forced);
        join_in_time(data);
        if let Some(store) = self.store.get() {
            store.close();
        }
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
    checks: tokio::sync::watch::Receiver<Vec<Arc<health::Check>>>,
    admin_socket: Socket,
    sides: mpsc::Receiver<SideCommand>,
    dns_server: Option<SocketAddr>,
    notifier: Notifier,
    predecessor: Option<Predecessor>,
    program: Option<Program>,
    store: StoreSlot,
    /// Where the store is that the predecessor still has open, and what it is written under.
    taken_over: Option<(PathBuf, Secrets)>,
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
        let Control { config_path, watch, signals: _, reloader, checks, .. } = self;
        let Control {
            admin_socket, sides, dns_server, notifier, predecessor, program, store, taken_over, context, ..
        } = self;
        let (running, reload, state, drain) =
            (&context.running, &context.reload, &context.reload_state, &context.drain);
        // They end with the runtime.
        tokio::spawn(health::run(checks));
        let (mut released, predecessor_gone) = (None, CancellationToken::new());
        match predecessor {
            None => predecessor_gone.cancel(),
            // Everything is there; only now is anything taken from the process that serves.
            Some(predecessor) => match predecessor.take_over(running).await {
                Ok(link) => {
                    released = Some(link.released());
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
            },
        }
        tokio::spawn(reloader.run());
        tokio::spawn(clock::run(Arc::clone(running), Arc::clone(state)));
        tokio::spawn(runs::run(Arc::clone(running), Arc::clone(state)));
        if watch {
            tokio::spawn(watch::run(config_path, reload.clone(), Arc::clone(state)));
        }
        let asked = Arc::new(Notify::new());
        if let Some(signals) = signals {
            tokio::spawn(signals.run(drain.clone(), reload.clone(), Arc::clone(&asked)));
        }
        let admin_stop = CancellationToken::new();
        tokio::spawn(admin::serve(Arc::clone(&context), admin_socket, admin::Surface::Full, admin_stop.clone()));
        tokio::spawn(serve_sides(Arc::clone(&context), sides, dns_server, admin_stop.clone()));
        let _ = ready.send(Ok(()));
        let succession = Succession { released, store: store.clone(), taken_over };
        tokio::spawn(tell(notifier.clone(), Arc::clone(running), Arc::clone(state), succession));
        let hand_over = HandOver {
            running: Arc::clone(running),
            reload: reload.clone(),
            notifier,
            program,
            asked,
            predecessor_gone,
            admin_stop,
            store,
        };
        let ended = shutdown::run(Arc::clone(running), drain.clone(), reload.clone(), Arc::clone(state));
        tokio::select! {
            ended = ended => ended,
            ended = handover::run(hand_over) => ended,
        }
    }
}

/// What this process takes over last from the one before it, if there is one.
struct Succession {
    released: Option<Arc<Notify>>,
    store: StoreSlot,
    taken_over: Option<(PathBuf, Secrets)>,
}

/// Opens the store where another process had it, and tells the service manager how this stands, once this process is
/// the one that it asks.
async fn tell(notifier: Notifier, running: Arc<Running>, state: Arc<ReloadState>, succession: Succession) {
    let Succession { released, store, taken_over } = succession;
    if let Some(released) = released {
        released.notified().await;
    }
    if let Some((directory, secrets)) = taken_over {
        let (metrics, slot) = (running.metrics.store(), StoreSlot::clone(&store));
        let opening = move || store::take_over(&directory, metrics, &secrets, &slot);
        if tokio::task::spawn_blocking(opening).await.is_err() {
            error!("opening the state broke down; it is not kept until the next start");
        }
        // Here, on the thread of reloads: a service is kept by this or by the reload that it came with.
        if let Some(store) = store.get() {
            running.snapshot.load().services.iter().for_each(|service| store.keep(&service.dispatcher, false));
        }
    }
    notifier.ready(&format!("serving, configuration {}", state.status().generation));
    tokio::join!(notify::tell_reloads(notifier.clone(), state), notify::run(notifier, running));
}

const NEVER_BEGAN: Ended = Ended { cut: 0, forced: true };

/// Serves beside what the newest configuration wants: probes, and what autoscalers ask.
async fn serve_sides(
    context: Arc<admin::Context>,
    mut commands: mpsc::Receiver<SideCommand>,
    dns_server: Option<SocketAddr>,
    stop: CancellationToken,
) {
    #[cfg(feature = "kubernetes")]
    let replicas = Replicas::new(context.source.clone(), dns_server);
    #[cfg(not(feature = "kubernetes"))]
    let _ = dns_server;
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
