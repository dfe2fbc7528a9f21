//! Step 1, accept: one loop for all listeners; a socket goes to the worker with the least to do.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::Poll;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::Address;
use crate::drain::Phase;
use crate::net::listen::{self, Accepted, Socket, TokioListener};
use crate::proxy::worker::WorkerHandle;
use crate::pulse::BEAT;
use crate::snapshot::{AcceptCommand, Listener, Running};

/// Connections that are still taken from a listener that stops; new ones must not keep it open.
const LAST_ACCEPTED_MAX: usize = 4096;

/// Starts and stops listeners as told, until the proxy ends.
pub async fn run(running: Arc<Running>, workers: Arc<[WorkerHandle]>, mut commands: mpsc::Receiver<AcceptCommand>) {
    let mut listening: HashMap<Address, CancellationToken> = HashMap::new();
    let pulse = running.pulses.join("accept");
    tokio::task::spawn_local(async move {
        let mut interval = tokio::time::interval(BEAT);
        loop {
            interval.tick().await;
            pulse.beat();
        }
    });
    let drain = running.drain.clone();
    let forced = drain.reached(Phase::Forced);
    tokio::pin!(forced);
    loop {
        let command = tokio::select! {
            biased;
            () = &mut forced => return,
            command = commands.recv() => command,
        };
        match command {
            Some(AcceptCommand::Start { local_address, socket }) => {
                let stop = CancellationToken::new();
                listening.insert(local_address.clone(), stop.clone());
                let (running, workers) = (running.clone(), workers.clone());
                tokio::task::spawn_local(async move {
                    accept_from(socket, &local_address, &running, &workers, &stop).await;
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

async fn accept_from(
    socket: Socket,
    address: &Address,
    running: &Running,
    workers: &[WorkerHandle],
    stop: &CancellationToken,
) {
    let socket = match socket.into_tokio() {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!("listener {address:?} could not be served: {error}");
            return;
        }
    };
    let mut known: Option<Arc<Listener>> = None;
    let mut last_left = LAST_ACCEPTED_MAX;
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => match last_accepted(&socket).await {
                Some(Ok(accepted)) if last_left > 0 => {
                    last_left -= 1;
                    Ok(accepted)
                }
                _ => return,
            },
            accepted = socket.accept() => accepted,
        };
        match accepted {
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
                tokio::time::sleep(listen::EXHAUSTED_PAUSE).await;
            }
        }
    }
}

/// Whoever has connected already is served: to the client that connection stands. `None`: nobody has.
async fn last_accepted(socket: &TokioListener) -> Option<io::Result<Accepted>> {
    // So that the runtime looks at the socket once more.
    tokio::task::yield_now().await;
    poll_fn(|context| match socket.poll_accept(context) {
        Poll::Ready(accepted) => Poll::Ready(Some(accepted)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
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
        let _ = io::Write::write(&mut &*stream, ANSWER.as_bytes());
    }
}
