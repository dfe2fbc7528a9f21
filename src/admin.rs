//! Admin: the API, probes, metrics and live page of a running proxy.

use std::sync::Arc;

use crate::control::{DrainHandle, ReloadHandle, ReloadState};
use crate::net::listen::Socket;
use crate::snapshot::Running;

pub struct Context {
    pub running: Arc<Running>,
    pub reload: ReloadHandle,
    pub reload_state: Arc<ReloadState>,
    pub drain: DrainHandle,
}

pub enum Surface {
    Full,
    Probes,
}

pub async fn serve(_context: Arc<Context>, _socket: Socket, _surface: Surface) {
    std::future::pending().await
}
