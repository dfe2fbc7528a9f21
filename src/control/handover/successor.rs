//! Successor: the side of the process that gives everything away.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::config::Address;
use crate::control::handover::door::{Comer, Guest};
use crate::control::handover::{
    Door, ENVIRONMENT, Hello, PROTOCOL, Passed, Program, ToNew, ToOld, channel, frame, in_time, receive, send,
};
use crate::control::notify::Notifier;
use crate::control::reload::HandedOver;
use crate::control::shutdown::{self, Ended};
use crate::control::{ReloadHandle, ReloadState};
use crate::drain::Phase;
use crate::ids;
use crate::net::inherit;
use crate::snapshot::Running;
use crate::state::core::SPREAD_PART;
use crate::state::dispatcher::Dispatcher;
use crate::state::succession::{Answer, Told};
use crate::store::StoreSlot;

/// How often open exchanges are counted while this process finishes.
const COUNT_EVERY: Duration = Duration::from_millis(20);
/// For how long nothing may be open or connected.
const QUIET: Duration = Duration::from_millis(100);
/// How often every thread turns before the connections are counted; the first may have begun before.
const TURNS: u64 = 3;
const TURNS_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a process that came by itself may take to notice that there is no handover.
const GUEST_ENDS: Duration = Duration::from_secs(1);
/// How long the last of what is told may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What a handover needs of this process.
pub struct HandOver {
    pub running: Arc<Running>,
    pub reload: ReloadHandle,
    pub reload_state: Arc<ReloadState>,
    pub notifier: Notifier,
    /// `None`: there is none to start (this is a part of another program).
    pub program: Option<Program>,
    /// Asked for by SIGUSR2.
    pub asked: Arc<Notify>,
    /// Where processes that were started beside this one ask for it. `None`: nowhere.
    pub door: Option<Door>,
    /// Cancelled when the process before this one has closed the state's file.
    pub predecessor_released: CancellationToken,
    /// Cancelled when the process before this one has gone.
    pub predecessor_gone: CancellationToken,
    /// Closed before the new process is told that it is free to open it.
    pub store: StoreSlot,
    /// To be cancelled when admin requests are another's.
    pub admin_stop: CancellationToken,
}

/// Who is to take over.
enum Next<'p> {
    /// A process that is to be started.
    Start(&'p Program),
    /// One that was started by somebody else.
    Came(Comer),
}

/// Hands over when it is asked for, as often as it takes. Returns when a new process serves and this one has finished.
pub async fn run(mut hand_over: HandOver) -> Ended {
    let mut door = hand_over.door.take();
    loop {
        let came = tokio::select! {
            () = hand_over.asked.notified() => None,
            comer = knocks(&mut door) => Some(comer),
        };
        let next = match (came, &hand_over.program) {
            (Some(comer), _) => match hand_over.refusal(&comer) {
                Some(reason) => {
                    warn!(process = comer.process(), "--upgrade refused: {reason}");
                    comer.refuse(&reason);
                    continue;
                }
                None => {
                    info!(process = comer.process(), "--upgrade: a new process asks to take over");
                    Next::Came(comer)
                }
            },
            (None, None) => {
                warn!("SIGUSR2 ignored: this process can't tell how it was started");
                continue;
            }
            (None, Some(_)) if hand_over.running.drain.phase() != Phase::Serving => {
                warn!("SIGUSR2 ignored: the proxy is draining already");
                continue;
            }
            (None, Some(program)) => {
                info!(program = %program.path.display(), "SIGUSR2: starting a new process, which is to take over");
                Next::Start(program)
            }
        };
        match hand_over.start(next).await {
            Ok(given) => {
                // The new one opens it.
                drop(door);
                return hand_over.finish(given).await;
            }
            Err(failure) => {
                hand_over.reload.hand_over_failed().await;
                error!("the new process did not take over, and this one goes on as before: {failure}");
            }
        }
    }
}

async fn knocks(door: &mut Option<Door>) -> Comer {
    match door {
        Some(door) => door.comer().await,
        None => std::future::pending().await,
    }
}

/// A process that serves now.
struct Given {
    stream: UnixStream,
    told: mpsc::UnboundedReceiver<Told>,
    dispatchers: Vec<Arc<Dispatcher>>,
    process: u32,
}

impl HandOver {
    /// Why a process that came by itself may not take over.
    fn refusal(&self, comer: &Comer) -> Option<String> {
        if self.running.drain.phase() != Phase::Serving {
            return Some("it is draining already".to_owned());
        }
        let ours = std::process::id();
        // The service would end with its main process, and the new one with the shell that it was started from.
        self.notifier.tells_somebody().then(|| {
            format!(
                "a service manager started it, and would lose sight of process {}; use kill -USR2 {ours} instead",
                comer.process()
            )
        })
    }

    async fn start(&self, next: Next<'_>) -> io::Result<Given> {
        let HandedOver { sockets, secrets, generation, sha256 } = self.reload.hand_over().await?;
        let passed = sockets.iter().map(|socket| {
            let (tcp, unix) = match &socket.configured {
                Address::Tcp(address) => (Some(*address), None),
                Address::Unix(path) => (None, Some(path.clone())),
            };
            Passed { tcp, unix, purpose: socket.purpose.clone(), owns_file: socket.owns_file() }
        });
        let hello = Hello { protocol: PROTOCOL, secrets, generation, sha256, sockets: passed.collect() };
        let (ours, mut new) = match next {
            Next::Start(program) => {
                let (ours, theirs) = StdUnixStream::pair()?;
                (ours, New::Child(spawn(program, theirs.into())?))
            }
            Next::Came(comer) => {
                let (stream, guest) = comer.into_parts();
                (stream, New::Guest(guest))
            }
        };
        let process = new.process();
        let given = async {
            inherit::send_with_sockets(&ours, &frame(&hello)?, &sockets)?;
            drop(sockets);
            ours.set_nonblocking(true)?;
            self.give(UnixStream::from_std(ours)?, process).await
        };
        match given.await {
            Ok(given) => Ok(given),
            Err(failure) => Err(io::Error::new(failure.kind(), format!("{failure}{}", new.end().await))),
        }
    }

    async fn give(&self, mut stream: UnixStream, process: u32) -> io::Result<Given> {
        match in_time("it did not become ready", receive(&mut stream)).await? {
            ToOld::Ready => {}
            ToOld::Serving | ToOld::Answer(_) => return Err(io::Error::other("it speaks out of turn")),
        }
        if self.running.drain.phase() != Phase::Serving {
            return Err(io::Error::other("the proxy was told to end meanwhile"));
        }
        let snapshot = self.running.snapshot.load_full();
        let dispatchers: Vec<Arc<Dispatcher>> =
            snapshot.services.iter().map(|service| Arc::clone(&service.dispatcher)).collect();
        let (to, told) = channel();
        let now = ids::now();
        let estates = dispatchers.iter().map(|dispatcher| dispatcher.hand_over(to.clone(), now)).collect();
        drop(to);
        let serving = async {
            send(&mut stream, &ToNew::Estate(estates)).await?;
            receive(&mut stream).await
        };
        let served = tokio::select! {
            biased;
            served = in_time("it did not take the state over", serving) => served,
            () = self.running.drain.reached(Phase::Announced) => {
                Err(io::Error::other("the proxy was told to end meanwhile"))
            }
        };
        match served {
            Ok(ToOld::Serving) => Ok(Given { stream, told, dispatchers, process }),
            failed => {
                let now = ids::now();
                dispatchers.iter().for_each(|dispatcher| dispatcher.reinstate(now));
                Err(failed.err().unwrap_or_else(|| io::Error::other("it speaks out of turn")))
            }
        }
    }

    /// Stops accepting, and lives for the exchanges that it has.
    async fn finish(&self, given: Given) -> Ended {
        let Given { stream, mut told, dispatchers, process } = given;
        self.reload.close_listeners().await;
        self.admin_stop.cancel();
        self.notifier.main_is(process);
        let timeout = self.running.snapshot.load().loaded.config.shutdown.timeout;
        let open = self.running.open_exchanges.get();
        info!(open, ?timeout, process, "the new process serves; this one finishes what it has begun");
        self.running.drain.advance(Phase::Draining);

        let (mut reader, mut writer) = stream.into_split();
        let (done, mut finished) = mpsc::channel::<()>(1);
        let (closed, mut is_closed) = oneshot::channel();
        let (store, retiring) = (self.store.clone(), dispatchers.clone());
        let predecessor_released = self.predecessor_released.clone();
        tokio::spawn(async move {
            // The new one relies on it that nobody before it has the file.
            predecessor_released.cancelled().await;
            let closing = move || store.give_away();
            if tokio::task::spawn_blocking(closing).await.is_err() {
                error!("closing the state broke down; the new process may not be able to open it");
            }
            // Only now: what is forgotten here is not to be missing in the file.
            let now = ids::now();
            retiring.iter().for_each(|dispatcher| dispatcher.retire(now));
            // Whoever waited for it may have ended.
            let _ = closed.send(());
        });
        let writing = tokio::spawn(async move {
            // Nobody waits for the disk: what is to be told is told meanwhile.
            let mut released = false;
            loop {
                let message = tokio::select! {
                    biased;
                    _ = &mut is_closed, if !released => {
                        released = true;
                        Some(ToNew::Released)
                    }
                    message = told.recv() => message.map(ToNew::Told),
                    _ = finished.recv() => None,
                };
                let Some(message) = message else { return };
                if send(&mut writer, &message).await.is_err() {
                    return;
                }
            }
        });
        let answered = dispatchers.clone();
        let reading = tokio::spawn(async move {
            loop {
                match receive(&mut reader).await {
                    Ok(ToOld::Answer(answer)) => {
                        if let Some(dispatcher) = answered.iter().find(|one| **one.name() == *service_of(&answer)) {
                            dispatcher.answered(answer, ids::now());
                        }
                    }
                    Ok(ToOld::Ready | ToOld::Serving) => {}
                    Err(failure) => {
                        warn!("the new process is gone ({failure}): deciding alone for what is left here");
                        let now = ids::now();
                        answered.iter().for_each(|dispatcher| dispatcher.reinstate(now));
                        return;
                    }
                }
            }
        });
        if tokio::time::timeout(timeout, self.all_finished()).await.is_err() {
            let left = self.running.open_exchanges.get();
            let over = timeout / SPREAD_PART;
            warn!(?timeout, left, ?over, "shutdown.timeout has passed: what is left is cut, one after another");
            shutdown::cut_what_is_left(&self.running, &self.reload_state, over).await;
        }
        let open = self.running.open_exchanges.get();
        let cut = open + self.running.cut_exchanges.load(Ordering::Acquire);
        self.running.drain.advance(Phase::Forced);
        drop(done);
        if tokio::time::timeout(LAST_WORDS, writing).await.is_err() {
            warn!("the new process did not hear everything of this one's last runs");
        }
        reading.abort();
        info!(cut, "the end of the process that handed over");
        Ended { cut, forced: false }
    }

    /// What was accepted last is counted only when its worker has begun with it: so the accept loop and then every worker
    /// have to have turned since the listeners closed.
    async fn turned(&self) {
        let before = self.running.pulses.counts();
        let turned = async {
            loop {
                let now = self.running.pulses.counts();
                if before.iter().zip(&now).all(|((_, before), (_, now))| now - before >= TURNS) {
                    return;
                }
                tokio::time::sleep(COUNT_EVERY).await;
            }
        };
        if tokio::time::timeout(TURNS_TIMEOUT, turned).await.is_err() {
            warn!("a thread stands still; what it was given is not waited for");
        }
    }

    /// No exchange is open, no client's connection, and the process before has gone. A connection on which nothing is
    /// open is closed by its client, by its next answer or by `keepalive_timeout`, as ever: no request meets a close
    /// that it would not have met otherwise.
    async fn all_finished(&self) {
        self.turned().await;
        let mut quiet_since = None;
        loop {
            let now = ids::now();
            let listeners = &self.running.snapshot.load().listeners;
            let connected = listeners.iter().any(|listener| listener.metrics.connections.get() > 0);
            let open = self.running.open_exchanges.get() > 0;
            if open || connected || !self.predecessor_gone.is_cancelled() {
                quiet_since = None;
            } else if now.saturating_duration_since(*quiet_since.get_or_insert(now)) >= QUIET {
                return;
            }
            tokio::time::sleep(COUNT_EVERY).await;
        }
    }
}

fn service_of(answer: &Answer) -> &str {
    match answer {
        Answer::Placed { service, .. }
        | Answer::Refused { service, .. }
        | Answer::Stop { service, .. }
        | Answer::Drains { service, .. } => service,
    }
}

/// The program as it is in its place now, with the socket as its standard input.
fn spawn(program: &Program, socket: OwnedFd) -> io::Result<Child> {
    let mut command = Command::new(&program.path);
    command.args(&program.arguments).env(ENVIRONMENT, "1").stdin(Stdio::from(socket));
    for variable in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"] {
        command.env_remove(variable);
    }
    let failed = |failure: io::Error| {
        io::Error::new(failure.kind(), format!("{} can't be started: {failure}", program.path.display()))
    };
    command.spawn().map_err(failed)
}

/// The process that is to take over.
enum New {
    Child(Child),
    Guest(Guest),
}

impl New {
    fn process(&self) -> u32 {
        match self {
            New::Child(child) => child.id(),
            New::Guest(guest) => guest.process,
        }
    }

    /// Ends a process that did not become what it was to be, and says how it ended.
    async fn end(&mut self) -> String {
        match self {
            New::Child(child) => end(child).await,
            New::Guest(guest) => {
                // It has seen the end of the stream, and says so; this is for one that stands still.
                tokio::time::sleep(GUEST_ENDS).await;
                guest.end();
                format!(" (process {}, which came by itself, has to say why)", guest.process)
            }
        }
    }
}

/// Ends a child that did not become what it was to be, and says how it ended.
async fn end(child: &mut Child) -> String {
    // One that has ended by itself says more.
    for _ in 0..50 {
        if let Ok(Some(status)) = child.try_wait() {
            return format!(" (it ended: {status}; what it said stands above)");
        }
        tokio::time::sleep(COUNT_EVERY).await;
    }
    // Fails where it has ended just now.
    let _ = child.kill();
    let _ = child.wait();
    " (it was ended)".to_owned()
}
