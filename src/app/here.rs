//! Here: the whole proxy as tasks of the runtime that it is started on, for simulations.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use tokio::task::JoinHandle;

use super::{Bound, Built, Options, StartError, WORKERS_DEFAULT, assemble};
use crate::control::shutdown::Ended;
use crate::control::{DrainHandle, ReloadHandle, ReloadState};
use crate::proxy;
use crate::snapshot::Running;

/// A proxy that runs on this thread.
pub struct Here {
    pub bound: Bound,
    pub running: Arc<Running>,
    pub drain: DrainHandle,
    pub reload: ReloadHandle,
    pub reload_state: Arc<ReloadState>,
    /// Ready at the end of the proxy's drain.
    pub ended: JoinHandle<Ended>,
}

/// As [`super::build`], but on the thread and the local runtime that this is called on; it starts nothing of its own but
/// the thread of the access log.
pub fn build(options: Options) -> Result<Here, StartError> {
    let workers = options.workers.unwrap_or(WORKERS_DEFAULT);
    let Built { bound, accept, control } = assemble(options)?;
    let context = Arc::clone(&control.context);
    proxy::start_here(Arc::clone(&context.running), workers, accept);
    let ended = tokio::task::spawn_local(async move {
        // Room for the one word that is said; nobody waits for it, as whatever is asked meanwhile waits itself.
        let (ready, _heard) = sync_channel(1);
        control.serve(None, &ready).await
    });
    Ok(Here {
        bound,
        running: Arc::clone(&context.running),
        drain: context.drain.clone(),
        reload: context.reload.clone(),
        reload_state: Arc::clone(&context.reload_state),
        ended,
    })
}
