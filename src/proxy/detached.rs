//! Detached: the endpoint's half of an exchange whose client has left and whose run is to go on all the same
//! (`runs.on_disconnect: continue`), or whose answer is recorded for others
//! (`runs.idempotency`). It is relayed as before, to nobody.

use std::rc::Rc;
use std::time::Duration;

use crate::config::OnDisconnect;
use crate::proxy;
use crate::proxy::account::Record;
use crate::proxy::connection::Connection;
use crate::proxy::peer::Peer;
use crate::proxy::relay::{self, End, Flow};
use crate::proxy::timer::Timer;
use crate::proxy::worker::Worker;

/// The first wake-up of the timer; it is moved as the relay wants.
const FIRST_WAKE: Duration = Duration::from_secs(60);

/// Whether the run of this exchange, whose client has left, goes on without it. The request must have come whole.
pub fn goes_on(flow: &Flow, end: End) -> bool {
    end == End::ClientGone
        && flow.lease.as_ref().is_some_and(|lease| lease.run_id().is_some())
        && flow.request.done()
        && !flow.tunnel
        && (flow.response.observer.is_recorded()
            || matches!(flow.service.config.runs.on_disconnect, OnDisconnect::Continue(_)))
}

/// Goes on in a task of its own. The record stays open: the exchange ends, and is told of, with its run.
pub fn spawn(connection: &Connection, flow: Box<Flow>, record: Record) {
    let worker = Rc::clone(&connection.worker);
    tokio::task::spawn_local(go_on(worker, flow, record));
}

async fn go_on(worker: Rc<Worker>, mut flow: Box<Flow>, mut record: Record) {
    let mut timer = Timer::new(FIRST_WAKE);
    let mut nobody = Peer::Nobody;
    // Waiting is all there is to be done for whoever reads nothing.
    if let Some(timed) = &mut flow.timed {
        timed.heartbeat = None;
    }
    let longest = longest(&flow);
    let relaying = relay::stream(&mut nobody, &mut flow, &mut timer);
    let end = match longest {
        Some(most) => tokio::time::timeout(most, relaying).await.unwrap_or(End::ClientGone),
        None => relaying.await,
    };
    let end = proxy::whose(end, &worker.running);
    flow.tell(&mut record);
    if end == End::ClientGone {
        flow.cancels = true;
    }
    if end != End::Whole {
        flow.upstream.hang_up();
    }
    record.ended(flow.give_back(end));
    if end == End::Whole {
        let keep_alive = flow.upstream_keep_alive;
        flow.upstream.recycle(&worker.pool, keep_alive);
    }
}

/// For how long at most.
fn longest(flow: &Flow) -> Option<Duration> {
    let runs = &flow.service.config.runs;
    match runs.on_disconnect {
        OnDisconnect::Continue(most) => most,
        OnDisconnect::Protocol | OnDisconnect::Cancel => runs.idempotency.as_ref().map(|idempotency| idempotency.keep),
    }
}
