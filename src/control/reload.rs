//! Reload: turns a configuration file into the next snapshot, all or nothing, one at a time.
//!
//! The order matters. Everything that can fail comes first (read, check, certificates, sockets) and touches nothing that
//! runs. Then dispatchers learn their new endpoints, the snapshot is swapped, and last the accept loop hears of new and
//! gone listeners: so no request ever meets a service that its dispatcher does not know, nor a socket without listener.
//!
//! Here is the loop that does one reload after the other. What can fail is the [`builder`]'s, part by part: [`services`],
//! [`listeners`], [`sides`] and [`tls`]. Others ask through the [`handle`] and see the [`status`].

mod builder;
mod handle;
mod listeners;
mod services;
mod sides;
mod status;
mod tls;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use crate::config::{self, Address, Loaded, Problem, Problems};
use crate::control::discovery::{Discovery, Surroundings};
use crate::control::notify::Notifier;
use crate::control::reload::builder::{Announcements, Builder, Prepared};
use crate::control::reload::handle::{Request, Trigger};
use crate::control::reload::sides::SIDE_COMMANDS_MAX;
use crate::control::reload::status::Removed;
use crate::drain::Drain;
use crate::ids;
use crate::logging::AccessLog;
use crate::metrics::Metrics;
use crate::net::inherit::{Inherited, Spare};
use crate::net::listen::Socket;
use crate::per_thread::OpenCount;
use crate::pulse::Pulses;
use crate::snapshot::{AcceptCommand, Running, Snapshot};
use crate::state::TargetSettings;
use crate::state::image::Place;
use crate::store::{Kept, Secrets, Store, StoreSlot};

pub(super) use handle::HandedOver;
pub use handle::ReloadHandle;
pub use listeners::bind_admin;
pub(crate) use listeners::display;
pub use sides::{Side, SideCommand};
pub use status::{ReloadState, ReloadStatus};

/// Commands that the accept loop may be behind.
const COMMANDS_MAX: usize = 64;

/// What a process begins with that was not made by it.
#[derive(Default)]
pub struct Heritage {
    pub sockets: Inherited,
    /// `None`: it makes its own.
    pub secrets: Option<Secrets>,
    /// The newest generation of the process before, and the digest of its file.
    pub generation: Option<(u64, String)>,
    pub notifier: Notifier,
    pub store: StoreSlot,
    /// What the store had in it. `None`: there is none, or another process has it still.
    pub kept: Option<Kept>,
    /// Where endpoints are looked for.
    pub surroundings: Surroundings,
}

/// What a new [`Reloader`] hands to the other parts.
pub struct Outlets {
    pub running: Arc<Running>,
    pub handle: ReloadHandle,
    pub state: Arc<ReloadState>,
    /// For the accept loop.
    pub accept: mpsc::Receiver<AcceptCommand>,
    /// For the servers beside.
    pub sides: mpsc::Receiver<SideCommand>,
    /// Their addresses that were bound at the start.
    pub side_addresses: Vec<(Side, Address)>,
    /// Where endpoints come from that the configuration does not list.
    pub discovery: Arc<Discovery>,
}

/// Called with every configuration that has taken effect by a reload (not with the first).
pub type AfterReload = Box<dyn Fn(&config::Config) + Send + Sync>;

/// The one who reloads.
pub struct Reloader {
    path: PathBuf,
    running: Arc<Running>,
    state: Arc<ReloadState>,
    builder: Builder,
    requests: mpsc::Receiver<Request>,
    accept: mpsc::Sender<AcceptCommand>,
    sides: mpsc::Sender<SideCommand>,
    discovery: Arc<Discovery>,
    after_reload: Option<AfterReload>,
    /// What the first configuration has to tell, until [`Reloader::run`] does.
    first: Announcements,
    listeners_closed: bool,
    store: StoreSlot,
    handing_over: bool,
    /// Of every socket that this process listens on.
    spares: Vec<Spare>,
    /// Where those of servers beside listen.
    side_spares: Vec<(Side, Address)>,
    notifier: Notifier,
}

impl Reloader {
    /// Binds and builds the first generation, which goes on from what was kept in the store, if there is one. Nothing is
    /// served before [`Reloader::run`].
    pub fn new(
        path: PathBuf,
        loaded: Loaded,
        metrics: Arc<Metrics>,
        access_log: AccessLog,
        after_reload: Option<AfterReload>,
        heritage: Heritage,
    ) -> Result<(Reloader, Outlets), Problems> {
        let Heritage { sockets, secrets, generation, notifier, store, mut kept, surroundings } = heritage;
        let file: Arc<str> = path.display().to_string().into();
        let secrets = secrets.or(kept.as_ref().map(|kept| kept.secrets.clone())).unwrap_or_else(Secrets::generate);
        let mut builder = Builder::new(Arc::clone(&file), Arc::clone(&metrics), secrets.cookie, sockets);
        let mut prepared = builder.prepare(loaded, None, &[])?;
        if let Some((generation, sha256)) = generation {
            // The same file is the same generation, whatever process it is in effect in.
            let changed = u64::from(sha256 != prepared.snapshot.loaded.sha256);
            prepared.snapshot.generation = generation + changed;
        }
        let (handle, requests) = ReloadHandle::new(file);
        let (accept, accept_receiver) = mpsc::channel(COMMANDS_MAX);
        let (sides, sides_receiver) = mpsc::channel(SIDE_COMMANDS_MAX);
        let discovery = Discovery::new(surroundings);
        discovery.take(prepared.plans, prepared.checks, &prepared.snapshot.loaded.config.kubernetes);

        let now = ids::now();
        for (dispatcher, mut settings) in prepared.dispatchers {
            settings.discovered = discovery.of_service(&settings.config);
            match (store.get(), &mut kept) {
                (Some(store), Some(kept)) => builder.go_on(&dispatcher, settings, store, kept, now),
                _ => dispatcher.apply(settings, now),
            }
        }
        if let (Some(store), Some(kept)) = (store.get(), kept) {
            forget_unnamed(store, kept);
        }
        builder.client_tls = prepared.client_tls;
        builder.version_metrics = prepared.version_metrics;
        builder.sides = prepared.sides_bound;

        let status = ReloadStatus {
            generation: prepared.snapshot.generation,
            sha256: prepared.snapshot.loaded.sha256.clone(),
            loaded_at: prepared.snapshot.loaded_at,
            last_error: None,
            succeeded: 0,
            failed: 0,
            files: prepared.snapshot.loaded.files.clone(),
        };
        let state = Arc::new(ReloadState::new(status));
        let running = Arc::new(Running {
            snapshot: ArcSwap::from_pointee(prepared.snapshot),
            metrics,
            drain: Drain::new(),
            open_exchanges: OpenCount::default(),
            cut_exchanges: AtomicUsize::new(0),
            access_log,
            scope_secret: secrets.scope,
            pulses: Pulses::default(),
        });
        let outlets = Outlets {
            running: Arc::clone(&running),
            handle,
            state: Arc::clone(&state),
            accept: accept_receiver,
            sides: sides_receiver,
            side_addresses: builder.sides.iter().map(|bound| (bound.side, bound.local.clone())).collect(),
            discovery: Arc::clone(&discovery),
        };
        let first = prepared.announcements;
        let listeners_closed = false;
        let reloader = Reloader {
            path,
            running,
            state,
            builder,
            requests,
            accept,
            sides,
            discovery,
            after_reload,
            first,
            listeners_closed,
            store,
            handing_over: false,
            spares: Vec::new(),
            side_spares: Vec::new(),
            notifier,
        };
        Ok((reloader, outlets))
    }

    /// Takes note of the admin API's socket, the last one: whatever is inherited has to be used by then.
    pub fn bound_admin(&mut self, address: &Address, socket: &Socket) -> Result<(), String> {
        self.keep_spare(socket, address.clone(), "admin");
        let snapshot = self.running.snapshot.load();
        let listeners = snapshot.listeners.iter().map(|listener| listener.config.address.clone());
        let sides = Side::ALL.into_iter().filter_map(|side| side.configured(&snapshot.loaded.config));
        let others = sides.map(Address::Tcp).chain([address.clone()]);
        let configured: Vec<Address> = listeners.chain(others).collect();
        self.builder.inherited().settle(&configured)
    }

    /// How an endpoint is reached that the configuration of a service no longer names. `None`: nobody can tell.
    pub(super) fn unnamed_target(&self, service: &str, place: &Place) -> Option<TargetSettings> {
        let snapshot = self.running.snapshot.load();
        let known = snapshot.services.iter().find(|known| *known.name == *service)?;
        self.builder.unnamed_target(&known.config, place)
    }

    fn keep_spare(&mut self, socket: &Socket, configured: Address, purpose: &str) {
        match Spare::of(socket, configured, purpose) {
            Ok(spare) => self.spares.push(spare),
            Err(failure) => warn!("a listening socket can't be handed over to a new process later: {failure}"),
        }
    }

    /// Starts the listeners, then reloads when asked, until every [`ReloadHandle`] is gone.
    pub async fn run(mut self) {
        let first = std::mem::take(&mut self.first);
        self.announce(first).await;
        while let Some(request) = self.requests.recv().await {
            match request {
                Request::Reload { reply, .. } if self.handing_over && self.listeners_closed => {
                    // Another process reads the file now, and says what it thinks of it.
                    let _ = reply.send(Err(self.refusal("", "another process serves now".to_owned())));
                }
                Request::Reload { trigger, reply } => {
                    if trigger == Trigger::Asked {
                        self.notifier.reloading();
                    }
                    let result = self.reload().await;
                    self.note(trigger, &result);
                    // Whoever asked may have left; the reload counts all the same.
                    let _ = reply.send(result.map(|done| done.generation));
                }
                Request::CloseListeners { reply } => {
                    self.close_listeners().await;
                    let _ = reply.send(());
                }
                Request::HandOver { reply } => {
                    let handed_over = self.hand_over();
                    self.handing_over = handed_over.is_ok();
                    if reply.send(handed_over).is_err() {
                        self.handing_over = false;
                    }
                }
                Request::HandOverFailed => self.handing_over = false,
            }
        }
    }

    async fn reload(&mut self) -> Result<Done, Problems> {
        if self.listeners_closed {
            return Err(self.refusal("", "the proxy is draining and takes no new configuration".to_owned()));
        }
        if self.handing_over {
            let message = "a new process is taking over, with the configuration as it is now; reload that one";
            return Err(self.refusal("", message.to_owned()));
        }
        if std::fs::metadata(&self.path).is_ok_and(|it| !it.is_file()) {
            // Opening a pipe again would wait for a writer for ever, and every later reload with it.
            let message = format!("{} is no regular file: only those can be reloaded", self.path.display());
            return Err(self.refusal("", message));
        }
        let path = self.path.clone();
        let loaded = load_aside(path)
            .await
            .map_err(|failure| self.refusal("", format!("reading the configuration broke off: {failure}")))?;
        let current = self.running.snapshot.load_full();
        let loaded = match loaded {
            Ok(loaded) => loaded,
            Err(problems) => {
                // A renewed certificate must not wait, and expire, for a mistake elsewhere to be mended. One that is bad
                // itself is among the problems already.
                let _ = self.builder.refresh_certificates(&current);
                return Err(problems);
            }
        };
        let sha256 = loaded.sha256.clone();
        let files = loaded.files.clone();
        if self.builder.means_the_same(&current, &loaded) {
            self.builder.refresh_certificates(&current)?;
            return Ok(Done { generation: current.generation, loaded_at: current.loaded_at, sha256, files });
        }
        self.refuse_what_cannot_change(&current.loaded.config, &loaded.config)?;
        let removed = self.state.removed_services();
        let prepared = self.builder.prepare(loaded, Some(&current), &removed)?;
        let generation = prepared.snapshot.generation;
        let loaded_at = prepared.snapshot.loaded_at;
        self.take_effect(prepared, &current).await;
        Ok(Done { generation, loaded_at, sha256, files })
    }

    fn refuse_what_cannot_change(&self, old: &config::Config, new: &config::Config) -> Result<(), Problems> {
        if old.admin.address != new.admin.address {
            let was = display(&old.admin.address);
            return Err(self.refusal(
                "admin.address",
                format!("can't change while the proxy runs; put {was} back, or restart the proxy"),
            ));
        }
        if old.state != new.state {
            return Err(self
                .refusal("state", "can't change while the proxy runs; put it back, or restart the proxy".to_owned()));
        }
        Ok(())
    }

    /// The swap. Nothing here can fail.
    async fn take_effect(&mut self, prepared: Prepared, current: &Snapshot) {
        let now = ids::now();
        {
            // A service that came back is not to be emptied by the clock.
            let back = |gone: &Removed| prepared.dispatchers.iter().any(|(it, _)| Arc::ptr_eq(it, &gone.dispatcher));
            self.state.lock_removed().retain(|gone| !back(gone));
        }
        let leaving: Vec<Removed> = current
            .services
            .iter()
            .filter(|old| !prepared.dispatchers.iter().any(|(kept, _)| Arc::ptr_eq(kept, &old.dispatcher)))
            .map(|old| Removed {
                dispatcher: Arc::clone(&old.dispatcher),
                config: old.config.clone(),
                at: now,
                emptied: false,
            })
            .collect();
        // Dispatchers first: the new snapshot must never route to a service whose endpoints are not known yet. Those of
        // removed services come last (by the clock): the old snapshot must not route into an emptied one.
        self.discovery.take(prepared.plans, prepared.checks, &prepared.snapshot.loaded.config.kubernetes);
        for (dispatcher, mut settings) in prepared.dispatchers {
            settings.discovered = self.discovery.of_service(&settings.config);
            if let Some(store) = self.store.get() {
                store.keep(&dispatcher, false);
            }
            dispatcher.apply(settings, now);
        }
        let snapshot = Arc::new(prepared.snapshot);
        self.running.snapshot.store(Arc::clone(&snapshot));
        self.running.access_log.configure(&snapshot.loaded.config.log);
        self.state.lock_removed().extend(leaving);
        self.builder.client_tls = prepared.client_tls;
        self.builder.version_metrics = prepared.version_metrics;
        self.builder.sides = prepared.sides_bound;
        if let Some(after_reload) = &self.after_reload {
            after_reload(&snapshot.loaded.config);
        }
        self.announce(prepared.announcements).await;
    }

    async fn announce(&mut self, announcements: Announcements) {
        for (local_address, socket) in announcements.starts {
            let listener = self.running.snapshot.load().listener(&local_address);
            if let Some(listener) = listener {
                self.keep_spare(&socket, listener.config.address.clone(), &listener.config.name);
            }
            self.command(AcceptCommand::Start { local_address, socket }).await;
        }
        for local_address in announcements.stops {
            self.spares.retain(|spare| spare.local != local_address);
            self.command(AcceptCommand::Stop { local_address }).await;
        }
        for command in announcements.sides {
            let side = command.side;
            if let Some(place) = self.side_spares.iter().position(|(known, _)| *known == side) {
                let (_, old) = self.side_spares.swap_remove(place);
                self.spares.retain(|spare| spare.local != old);
            }
            let bound = self.builder.sides.iter().find(|bound| bound.side == side);
            if let (Some(socket), Some(bound)) = (&command.socket, bound) {
                let configured = Address::Tcp(bound.configured);
                self.side_spares.push((side, bound.local.clone()));
                self.keep_spare(socket, configured, side.key());
            }
            if self.sides.send(command).await.is_err() {
                error!("{} is not served: whoever serves it is gone", side.key());
            }
        }
    }

    async fn close_listeners(&mut self) {
        self.listeners_closed = true;
        let all = std::mem::take(&mut self.spares);
        if self.handing_over {
            all.iter().for_each(Spare::leave_file);
        }
        drop(all);
        let snapshot = self.running.snapshot.load_full();
        for listener in &snapshot.listeners {
            self.command(AcceptCommand::Stop { local_address: listener.local_address.clone() }).await;
        }
    }

    fn hand_over(&self) -> std::io::Result<HandedOver> {
        if self.listeners_closed {
            return Err(std::io::Error::other("the proxy is draining already"));
        }
        let snapshot = self.running.snapshot.load();
        Ok(HandedOver {
            sockets: self.spares.iter().map(Spare::try_clone).collect::<Result<_, _>>()?,
            secrets: Secrets { scope: self.running.scope_secret, cookie: self.builder.cookie_secret },
            generation: snapshot.generation,
            sha256: snapshot.loaded.sha256.clone(),
        })
    }

    async fn command(&self, command: AcceptCommand) {
        if self.accept.send(command).await.is_err() && !self.listeners_closed {
            error!("the accept loop is gone: listeners can't be started or stopped any more");
        }
    }

    /// Counts and logs.
    fn note(&self, trigger: Trigger, result: &Result<Done, Problems>) {
        match result {
            Ok(done) => {
                let before = self.state.status.borrow().generation;
                self.state.status.send_modify(|status| {
                    status.generation = done.generation;
                    status.sha256.clone_from(&done.sha256);
                    status.loaded_at = done.loaded_at;
                    status.last_error = None;
                    status.succeeded += 1;
                    status.files.clone_from(&done.files);
                });
                let (generation, sha256) = (done.generation, &done.sha256);
                if before == generation {
                    info!(generation, sha256, "the configuration means the same as before: kept");
                } else {
                    info!(generation, sha256, "new configuration in effect");
                    log_warnings(&self.builder.file, &self.running.snapshot.load().loaded);
                }
            }
            Err(problems) => {
                let known = self.state.status.borrow().last_error.as_ref() == Some(problems);
                if known && trigger == Trigger::Retry {
                    return;
                }
                self.state.status.send_modify(|status| {
                    status.last_error = Some(problems.clone());
                    status.failed += 1;
                });
                error!(problems = problems.list.len(), "configuration refused, the one in effect stays");
                for problem in &problems.list {
                    error!("{}:{problem}", problems.file);
                }
            }
        }
    }

    fn refusal(&self, path: &str, message: String) -> Problems {
        one_problem(&self.builder.file, path, message)
    }
}

/// Reads the file on a thread of its own: a disk may be slow.
async fn load_aside(path: PathBuf) -> Result<Result<Loaded, Problems>, tokio::task::JoinError> {
    // Another thread would bring an order of its own into a simulation.
    #[cfg(feature = "simulation")]
    if ids::simulation::is_on() {
        return Ok(config::load(&path));
    }
    tokio::task::spawn_blocking(move || config::load(&path)).await
}

/// What was kept of services that the configuration does not name goes, as by a reload without them.
fn forget_unnamed(store: &Store, kept: Kept) {
    let mut names: Vec<String> = kept.services.into_keys().collect();
    if names.is_empty() {
        return;
    }
    names.sort_unstable();
    let services = names.join(", ");
    info!(services, "the configuration does not name them any more: what was kept of them is removed");
    store.forget(names);
}

/// Logs what is not wrong but worth a line.
pub fn log_warnings(file: &str, loaded: &Loaded) {
    for problem in &loaded.warnings {
        warn!("{file}:{problem}");
    }
}

/// A reload that was accepted.
struct Done {
    generation: u64,
    loaded_at: SystemTime,
    sha256: String,
    files: Vec<PathBuf>,
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn problem(path: &str, message: String) -> Problem {
    // What goes wrong here is not the text's fault, so there is no better place in it than its beginning.
    Problem { line: 1, column: 1, path: path.to_owned(), message }
}

fn one_problem(file: &str, path: &str, message: String) -> Problems {
    // As `check` calls what is wrong with the file as a whole.
    let path = if path.is_empty() { "(file)" } else { path };
    Problems { file: file.to_owned(), list: vec![problem(path, message)] }
}
