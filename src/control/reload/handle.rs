//! Handle: how anybody asks the one who reloads, through one queue, so that one thing happens at a time.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::config::Problems;
use crate::control::reload::one_problem;
use crate::net::inherit::Spare;
use crate::store::Secrets;

/// Reloads that may wait for their turn; whoever comes after waits for a place.
const WAITING_MAX: usize = 16;

/// Asks for reloads, from anywhere. Cheap to clone.
#[derive(Clone)]
pub struct ReloadHandle {
    file: Arc<str>,
    requests: mpsc::Sender<Request>,
}

impl ReloadHandle {
    /// The handle, and where what is asked comes out.
    pub(super) fn new(file: Arc<str>) -> (ReloadHandle, mpsc::Receiver<Request>) {
        let (sender, requests) = mpsc::channel(WAITING_MAX);
        (ReloadHandle { file, requests: sender }, requests)
    }

    /// Reads the file and lets it take effect; answers the generation that is in effect then (the old one where the file
    /// means the same). On an error nothing has changed.
    pub async fn reload(&self) -> Result<u64, Problems> {
        self.ask(Trigger::Asked).await
    }

    /// As [`ReloadHandle::reload`], but an error that is known already is neither logged nor counted again.
    pub(in crate::control) async fn retry(&self) -> Result<u64, Problems> {
        self.ask(Trigger::Retry).await
    }

    /// Stops every listener; from then on reloads are refused.
    pub(in crate::control) async fn close_listeners(&self) {
        let (reply, done) = oneshot::channel();
        if self.requests.send(Request::CloseListeners { reply }).await.is_ok() {
            let _ = done.await;
        }
    }

    /// Handles of all listening sockets, for another process. From then on reloads are refused until
    /// [`ReloadHandle::hand_over_failed`].
    pub(in crate::control) async fn hand_over(&self) -> std::io::Result<HandedOver> {
        let gone = || std::io::Error::other("the proxy is stopping");
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::HandOver { reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// This process stays the one that serves.
    pub(in crate::control) async fn hand_over_failed(&self) {
        // Whoever reloads has gone only where the process ends.
        let _ = self.requests.send(Request::HandOverFailed).await;
    }

    async fn ask(&self, trigger: Trigger) -> Result<u64, Problems> {
        let (reply, answer) = oneshot::channel();
        let gone = || one_problem(&self.file, "", "the proxy is stopping and reloads nothing any more".to_owned());
        self.requests.send(Request::Reload { trigger, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// What is asked of the one who reloads.
pub(super) enum Request {
    Reload { trigger: Trigger, reply: oneshot::Sender<Result<u64, Problems>> },
    CloseListeners { reply: oneshot::Sender<()> },
    HandOver { reply: oneshot::Sender<std::io::Result<HandedOver>> },
    HandOverFailed,
}

/// Why a reload is asked for: by somebody, or because an earlier one was refused.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Trigger {
    Asked,
    Retry,
}

/// What a process has to have before it can build anything that takes over from another.
pub(in crate::control) struct HandedOver {
    pub sockets: Vec<Spare>,
    pub secrets: Secrets,
    pub generation: u64,
    pub sha256: String,
}
