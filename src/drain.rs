//! Drain: one signal that tells every listener and connection to finish.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::watch;

/// How far the proxy's own shutdown has come. Only ever goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Serving,
    /// `/readyz` is 503 already, everything is still served (`shutdown.delay`).
    Announced,
    /// Listeners are closed, connections are told to close.
    Draining,
    /// `shutdown.timeout` has passed, or a second signal came: what is open is cut.
    Forced,
}

impl Phase {
    const ALL: [Phase; 4] = [Phase::Serving, Phase::Announced, Phase::Draining, Phase::Forced];
}

/// The phase, shared: anyone may read or await it.
#[derive(Clone)]
pub struct Drain {
    phase: watch::Sender<Phase>,
    /// The same as a number: every request asks for it.
    current: Arc<AtomicU8>,
}

impl Default for Drain {
    fn default() -> Self {
        Drain::new()
    }
}

impl Drain {
    pub fn new() -> Drain {
        Drain { phase: watch::Sender::new(Phase::Serving), current: Arc::default() }
    }

    pub fn phase(&self) -> Phase {
        Phase::ALL[usize::from(self.current.load(Ordering::Acquire))]
    }

    /// Goes forward to `phase`; going back is ignored.
    pub fn advance(&self, phase: Phase) {
        self.phase.send_if_modified(|current| {
            let forward = phase > *current;
            if forward {
                *current = phase;
                self.current.store(phase as u8, Ordering::Release);
            }
            forward
        });
    }

    /// Returns once `phase` is reached or passed.
    pub async fn reached(&self, phase: Phase) {
        let mut receiver = self.phase.subscribe();
        // The sender is `self`, so the channel can't close while we wait.
        let _ = receiver.wait_for(|current| *current >= phase).await;
    }
}
