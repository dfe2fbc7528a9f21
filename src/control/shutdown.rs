//! Shutdown: from the first SIGTERM (or `POST /api/v1/drain`) to the end of the process.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::control::{ReloadHandle, ReloadState};
use crate::drain::Phase;
use crate::ids;
use crate::snapshot::Running;
use crate::state::core::SPREAD_PART;

/// How often open exchanges are counted while draining.
const COUNT_EVERY: Duration = Duration::from_millis(10);
/// For how long there must be no open exchange: a request may be on its way on a connection that was not yet told.
const QUIET: Duration = Duration::from_millis(100);
/// Between two steps of cutting what is left.
const CUT_EVERY: Duration = Duration::from_millis(100);
/// How long after the last cut its exchange may take to say its last word, and its client to read it.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long the accept loop may take to hear that listeners close; the drain goes on without it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Asks for the end, from anywhere. Cheap to clone.
#[derive(Clone)]
pub struct DrainHandle {
    asked: watch::Sender<Asked>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    Nothing,
    Drain,
    Force,
}

impl Default for DrainHandle {
    fn default() -> DrainHandle {
        DrainHandle::new()
    }
}

impl DrainHandle {
    pub fn new() -> DrainHandle {
        DrainHandle { asked: watch::Sender::new(Asked::Nothing) }
    }

    /// Begins the drain; more than once is the same as once.
    pub fn drain(&self) {
        self.raise(Asked::Drain);
    }

    /// Ends at once; what is open is cut.
    pub fn force(&self) {
        self.raise(Asked::Force);
    }

    fn raise(&self, to: Asked) {
        self.asked.send_if_modified(|asked| {
            let more = to > *asked;
            if more {
                *asked = to;
            }
            more
        });
    }

    async fn asked(&self, at_least: Asked) {
        // The sender is `self`, so the channel can't close while we wait.
        let _ = self.asked.subscribe().wait_for(|asked| *asked >= at_least).await;
    }
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Exchanges that were still open and were cut.
    pub cut: usize,
    /// By a second signal or [`DrainHandle::force`], not by the drain's own end.
    pub forced: bool,
}

/// Waits until a drain is asked for and carries it out.
pub async fn run(
    running: Arc<Running>,
    handle: DrainHandle,
    reload: ReloadHandle,
    reload_state: Arc<ReloadState>,
) -> Ended {
    handle.asked(Asked::Drain).await;
    let forced = tokio::select! {
        biased;
        () = handle.asked(Asked::Force) => true,
        () = drain(&running, &reload, &reload_state) => false,
    };
    let cut = running.open_exchanges.get() + running.cut_exchanges.load(Ordering::Acquire);
    running.drain.advance(Phase::Forced);
    if cut > 0 {
        warn!(cut, "the end: open exchanges are cut");
    } else {
        info!("the end: nothing was cut");
    }
    Ended { cut, forced }
}

async fn drain(running: &Running, reload: &ReloadHandle, reload_state: &ReloadState) {
    let shutdown = running.snapshot.load().loaded.config.shutdown.clone();
    running.drain.advance(Phase::Announced);
    info!(delay = ?shutdown.delay, "draining: not ready any more, still serving everything");
    tokio::time::sleep(shutdown.delay).await;

    // The timeout may have been changed by a reload meanwhile; from here on it can't.
    let timeout = running.snapshot.load().loaded.config.shutdown.timeout;
    let open = running.open_exchanges.get();
    running.drain.advance(Phase::Draining);
    info!(open, ?timeout, "draining: listeners close, open exchanges finish");
    let finish = async {
        if tokio::time::timeout(CLOSE_TIMEOUT, reload.close_listeners()).await.is_err() {
            warn!("the listeners did not close in time");
        }
        all_finished(running).await;
    };
    if tokio::time::timeout(timeout, finish).await.is_err() {
        let left = running.open_exchanges.get();
        let over = timeout / SPREAD_PART;
        warn!(?timeout, left, ?over, "shutdown.timeout has passed: what is left is cut, one after another");
        cut_what_is_left(running, reload_state, over).await;
    }
}

/// Cuts what runs at an endpoint, spread over this time, so that clients don't all come back at once.
pub(super) async fn cut_what_is_left(running: &Running, reload_state: &ReloadState, over: Duration) {
    let began = ids::now();
    let mut begins = true;
    while running.open_exchanges.get() > 0 {
        let passed = ids::now().saturating_duration_since(began);
        let share = if passed >= over { 1.0 } else { passed.as_secs_f64() / over.as_secs_f64() };
        for service in &running.snapshot.load().services {
            service.dispatcher.cut_all(begins, share);
        }
        for (_, dispatcher) in reload_state.removed_services() {
            dispatcher.cut_all(begins, share);
        }
        begins = false;
        if passed >= over + LAST_WORDS {
            return;
        }
        tokio::time::sleep(if share < 1.0 { CUT_EVERY } else { COUNT_EVERY }).await;
    }
    if !begins {
        // A connection that is closed with bytes of its client unread is reset, and the reset overtakes what was said.
        tokio::time::sleep(LAST_WORDS).await;
    }
}

async fn all_finished(running: &Running) {
    let mut quiet_since = None;
    loop {
        let now = ids::now();
        if running.open_exchanges.get() > 0 {
            quiet_since = None;
        } else if now.saturating_duration_since(*quiet_since.get_or_insert(now)) >= QUIET {
            return;
        }
        tokio::time::sleep(COUNT_EVERY).await;
    }
}

/// The process's signals. Only the binary listens to them: they belong to the whole process.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user2: Signal,
}

impl Signals {
    /// From here on the signals no longer kill the process. Must be called within a runtime.
    pub fn listen() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user2: signal(SignalKind::user_defined2())?,
        })
    }

    /// Obeys them until it is dropped.
    pub async fn run(mut self, drain: DrainHandle, reload: ReloadHandle, hand_over: Arc<Notify>) {
        let hangups = Notify::new();
        let reloads = async {
            loop {
                hangups.notified().await;
                // The reloader has logged what it thought of it.
                let _ = reload.reload().await;
            }
        };
        let obey = async {
            let mut second = false;
            loop {
                tokio::select! {
                    _ = self.terminate.recv() => end(&drain, "SIGTERM", &mut second),
                    _ = self.interrupt.recv() => end(&drain, "SIGINT", &mut second),
                    _ = self.hangup.recv() => hangups.notify_one(),
                    _ = self.user2.recv() => hand_over.notify_one(),
                }
            }
        };
        tokio::join!(reloads, obey);
    }
}

/// Signals are counted apart from [`DrainHandle::drain`]: a SIGTERM after `POST /api/v1/drain` is the first.
fn end(drain: &DrainHandle, name: &str, second: &mut bool) {
    if *second {
        warn!("{name} again: ending at once");
        drain.force();
    } else {
        info!("{name}: draining; a second one ends at once");
        drain.drain();
        *second = true;
    }
}
