//! Step 1, accept: one loop for all listeners; a socket goes to the worker with the least to do.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::Address;
use crate::drain::Phase;
use crate::net::listen::{Accepted, Socket};
use crate::proxy::worker::WorkerHandle;
use crate::snapshot::{AcceptCommand, Listener, Running};

/// How long to leave a listener alone that can't accept, because descriptors or memory ran out.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Starts and stops listeners as told, until the proxy ends.
pub async fn run(running: Arc<Running>, workers: Arc<[WorkerHandle]>, mut commands: mpsc::Receiver<AcceptCommand>) {
    let mut listening: HashMap<Address, CancellationToken> = HashMap::new();
    let drain = running.drain.clone();
    let forced = drain.reached(Phase::Forced);
    tokio::pin!(forced);
    loop {
        let command = tokio::select! {
            command = commands.recv() => command,
            () = &mut forced => return,
        };
        match command {
            Some(AcceptCommand::Start { local_address, socket }) => {
                let stop = CancellationToken::new();
                listening.insert(local_address.clone(), stop.clone());
                let (running, workers) = (running.clone(), workers.clone());
                tokio::task::spawn_local(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = accept_from(socket, &local_address, &running, &workers) => {}
                    }
                });
            }
            Some(AcceptCommand::Stop { local_address }) => {
                if let Some(stop) = listening.remove(&local_address) {
                    stop.cancel();
                }
            }
            None => {
                forced.as_mut().await;
                return;
            }
        }
    }
}

async fn accept_from(socket: Socket, address: &Address, running: &Running, workers: &[WorkerHandle]) {
    let socket = match socket.into_tokio() {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!("listener {address:?} could not be served: {error}");
            return;
        }
    };
    let mut known: Option<Arc<Listener>> = None;
    loop {
        match socket.accept().await {
            Ok(accepted) => {
                let current = running.snapshot.load().listener(address);
                if current.is_some() {
                    known = current;
                }
                let Some(listener) = known.clone() else { continue };
                if listener.metrics.connections.get() >= listener.config.limits.max_connections as i64 {
                    refuse(accepted);
                    continue;
                }
                if let Some(worker) = workers.iter().min_by_key(|worker| worker.load()) {
                    worker.serve(accepted, listener).await;
                }
            }
            Err(error) => {
                // The one that failed was the client's; whatever is wrong with us is given time to pass.
                tracing::warn!("listener {address:?} could not accept: {error}");
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
            }
        }
    }
}

/// Tells a client over `max_connections` why it is sent away, as far as one write can (nothing useful under TLS).
fn refuse(accepted: Accepted) {
    const ANSWER: &str = concat!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\n",
        "proxy-status: longhaul; error=connection_limit_reached\r\nretry-after: 1\r\nlonghaul-affinity: none\r\n",
        "content-length: 175\r\nconnection: close\r\n\r\n",
        r#"{"type":"urn:longhaul:error:overloaded","title":"The proxy is at a limit of its own","status":503,"detail":"too many connections (limits.max_connections)","#,
        r#""code":"overloaded"}"#,
    );
    if let Accepted::Tcp(stream, _) = &accepted {
        let _ = std::io::Write::write(&mut &*stream, ANSWER.as_bytes());
    }
}
