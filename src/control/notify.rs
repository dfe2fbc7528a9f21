//! Notify: tells the service manager how this process stands, by the protocol of sd_notify(3), and shows its watchdog
//! that every thread still turns.

use std::collections::HashMap;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;
use tracing::{error, warn};

use crate::control::ReloadState;
use crate::drain::Phase;
use crate::ids;
use crate::pulse::BEAT;
use crate::snapshot::Running;

/// A thread that has not turned for so long stands still.
const STANDSTILL: Duration = BEAT.saturating_mul(3);

/// Where the service manager listens. Cheap to clone; without one, everything here does nothing.
#[derive(Clone, Default)]
pub struct Notifier {
    inner: Option<Arc<Inner>>,
}

struct Inner {
    socket: UnixDatagram,
    to: SocketAddr,
    /// Set where a watchdog waits: how long without a sign before it ends this process.
    watchdog: Option<Duration>,
    /// Another process speaks for the service now.
    silent: AtomicBool,
}

impl Notifier {
    /// Of `NOTIFY_SOCKET` (a path, or `@name` in the abstract namespace), `WATCHDOG_USEC` and `WATCHDOG_PID`. `successor`:
    /// this process takes over from the one for which these were made.
    pub fn from_environment(successor: bool) -> io::Result<Notifier> {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(Notifier::default());
        };
        let text = |name: &str| std::env::var(name).ok();
        let ours = successor || text("WATCHDOG_PID").is_none_or(|pid| pid == std::process::id().to_string());
        let watchdog = text("WATCHDOG_USEC").filter(|_| ours).and_then(|time| time.parse().ok());
        let watchdog = watchdog.filter(|time| *time > 0).map(Duration::from_micros);
        Notifier::to(name.as_encoded_bytes(), watchdog)
    }

    /// To the socket of this name.
    pub fn to(name: &[u8], watchdog: Option<Duration>) -> io::Result<Notifier> {
        let to = match name.split_first() {
            Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
            _ => {
                use std::os::unix::ffi::OsStrExt;
                SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?
            }
        };
        let socket = UnixDatagram::unbound()?;
        // Whoever does not read must not hold us.
        socket.set_nonblocking(true)?;
        Ok(Notifier { inner: Some(Arc::new(Inner { socket, to, watchdog, silent: AtomicBool::new(false) })) })
    }

    /// There is a service manager.
    pub fn tells_somebody(&self) -> bool {
        self.inner.is_some()
    }

    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}\n", line(status)));
    }

    /// A reload begins; [`Notifier::ready`] tells its end.
    pub fn reloading(&self) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}\nSTATUS=reloading\n", ids::monotonic_microseconds()));
    }

    pub fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=draining: open exchanges finish\n");
    }

    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}\n", line(status)));
    }

    /// Another process is the service from here on, and speaks for it: this one falls silent.
    pub fn main_is(&self, process: u32) {
        self.send(&format!("MAINPID={process}\n"));
        if let Some(inner) = &self.inner {
            inner.silent.store(true, Ordering::Release);
        }
    }

    fn send(&self, message: &str) {
        let Some(inner) = self.inner.as_ref().filter(|inner| !inner.silent.load(Ordering::Acquire)) else { return };
        if let Err(failure) = inner.socket.send_to_addr(message.as_bytes(), &inner.to) {
            warn!("the service manager (NOTIFY_SOCKET) can't be told how this stands: {failure}");
        }
    }
}

/// As one line, as the protocol wants it.
fn line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

/// Tells of the drain, and the watchdog that all is well, until it is dropped.
pub async fn run(notifier: Notifier, running: Arc<Running>) {
    let stopping = async {
        running.drain.reached(Phase::Announced).await;
        notifier.stopping();
        std::future::pending::<()>().await;
    };
    let watchdog = notifier.inner.as_ref().and_then(|inner| inner.watchdog);
    let signs = async {
        let Some(patience) = watchdog else { return std::future::pending().await };
        let mut ticks = tokio::time::interval(patience / 2);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watch = Watch::default();
        loop {
            ticks.tick().await;
            match watch.standing_still(running.pulses.counts(), ids::now()) {
                None => notifier.send("WATCHDOG=1\n"),
                Some(thread) => error!(
                    "thread {thread} has stood still for {STANDSTILL:?}: the watchdog is not told that all is well"
                ),
            }
        }
    };
    tokio::join!(stopping, signs);
}

/// Tells the end of each reload, until it is dropped.
pub async fn tell_reloads(notifier: Notifier, state: Arc<ReloadState>) {
    let mut reloads = state.subscribe();
    while reloads.changed().await.is_ok() {
        let status = reloads.borrow_and_update().clone();
        notifier.ready(&match &status.last_error {
            None => format!("serving, configuration {}", status.generation),
            Some(problems) => {
                format!(
                    "serving configuration {}; a newer one was refused with {} problems",
                    status.generation,
                    problems.list.len()
                )
            }
        });
    }
}

/// Which threads turn.
#[derive(Default)]
struct Watch {
    /// By name: the last count, and since when it is that.
    seen: HashMap<String, (u64, Instant)>,
}

impl Watch {
    /// A thread that has not beaten for [`STANDSTILL`].
    fn standing_still(&mut self, counts: Vec<(String, u64)>, now: Instant) -> Option<String> {
        let mut still = None;
        for (name, count) in counts {
            let (known, since) = self.seen.entry(name.clone()).or_insert((count, now));
            if *known != count {
                (*known, *since) = (count, now);
            } else if now.saturating_duration_since(*since) >= STANDSTILL {
                still = Some(name);
            }
        }
        still
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 512];
        let count = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..count].to_vec()).unwrap()
    }

    #[test]
    fn it_speaks_to_paths_and_abstract_names_until_another_process_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let by_path = UnixDatagram::bind(&path).unwrap();
        let name = format!("longhaul-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
        let by_name = UnixDatagram::bind_addr(&abstract_name).unwrap();

        let notifier = Notifier::to(path.as_os_str().as_encoded_bytes(), None).unwrap();
        notifier.ready("one\ntwo");
        assert_eq!(receive(&by_path), "READY=1\nSTATUS=one two\n");
        notifier.reloading();
        let message = receive(&by_path);
        let time = message.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").and_then(|rest| rest.split('\n').next());
        assert!(time.is_some_and(|time| time.parse::<u64>().is_ok_and(|time| time > 0)), "{message}");

        let notifier = Notifier::to(format!("@{name}").as_bytes(), None).unwrap();
        notifier.main_is(42);
        notifier.stopping();
        assert_eq!(receive(&by_name), "MAINPID=42\n");
        by_name.set_nonblocking(true).unwrap();
        assert!(by_name.recv(&mut [0; 16]).is_err(), "nothing is said after that");
    }

    #[test]
    fn a_thread_that_stands_still_is_seen() {
        let start = ids::now();
        let counts = |one, two| vec![("one".to_owned(), one), ("two".to_owned(), two)];
        let mut watch = Watch::default();
        assert_eq!(watch.standing_still(counts(0, 0), start), None);
        assert_eq!(watch.standing_still(counts(5, 0), start + STANDSTILL / 2), None);
        assert_eq!(watch.standing_still(counts(9, 0), start + STANDSTILL).as_deref(), Some("two"));
        assert_eq!(watch.standing_still(counts(12, 1), start + STANDSTILL), None);
    }
}
