//! Shadow: a copy of a start to another version (`shadow`), sent once the start itself has been answered. Nobody hears of it:
//! its answer is read to its end, as a client would, and thrown away. It is no run, in no session, and no record is kept.

use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::timeout;

use crate::balance;
use crate::config::Timeouts;
use crate::ids;
use crate::message::{Framing, RequestHead};
use crate::proxy::edits;
use crate::proxy::identify::Identity;
use crate::proxy::observe::Observer;
use crate::proxy::peer::{Next, Peer};
use crate::proxy::upstream::{self, Upstream};
use crate::proxy::worker::Worker;
use crate::snapshot::Service;
use crate::state::dispatcher::Shadowed;
use crate::state::{Kind, Target};

/// A copy that takes longer is broken off, so that it does not keep the place of others.
const TIME_MAX: Duration = Duration::from_secs(3600);

/// Where a start stands among all: those of one session at the same place, so that whole conversations are copied.
fn draw(identity: &Identity) -> u64 {
    identity.key.as_ref().map_or_else(ids::random_u64, |key| balance::placement(&key.text))
}

fn is_within(share: f64, draw: u64) -> bool {
    // The draw as a part of all is rounded, so the whole is asked for by itself.
    share >= 1.0 || (draw as f64) < share * 2_f64.powi(64)
}

/// Whether this exchange is to be copied.
pub fn is_due(service: &Service, identity: &Identity, request: &RequestHead, target: &Target) -> bool {
    service.config.shadow.as_ref().is_some_and(|shadow| {
        identity.kind == Kind::Start
            && request.upgrade.is_none()
            && *target.version != *shadow.version
            && is_within(shadow.share, draw(identity))
    })
}

/// Sends the copy in a task of its own, if there is an endpoint and not too many are under way.
pub fn copy(worker: &Rc<Worker>, service: &Service, identity: &Identity, request: &RequestHead, body: Vec<u8>) {
    let Some(shadow) = &service.config.shadow else { return };
    let Some(Shadowed { target, permit }) = service.dispatcher.shadow(&shadow.version, draw(identity)) else { return };
    let mut request = request.clone();
    // It is not that run, and whoever gets it may want to leave out what it would do to the world.
    request.fields.remove("longhaul-run-id");
    request.fields.set("longhaul-shadow", b"1");
    edits::apply(&target.headers, &mut request.fields);
    request.expect_continue = false;
    if request.framing != Framing::None {
        request.framing = Framing::Length(body.len() as u64);
    }
    let timeouts = service.config.timeouts.clone();
    let worker = Rc::clone(worker);
    tokio::task::spawn_local(async move {
        let sent = timeout(TIME_MAX, send(&worker, &target, &request, &body, &timeouts)).await;
        drop(permit);
        match sent {
            Ok(Ok(status)) => tracing::debug!(endpoint = &*target.address, status, "a copy was answered"),
            Ok(Err(why)) => tracing::debug!(endpoint = &*target.address, why, "a copy was not answered"),
            Err(_) => tracing::debug!(endpoint = &*target.address, "a copy was broken off"),
        }
    });
}

/// The status of the answer, after its last byte. The error is a sentence.
async fn send(
    worker: &Worker,
    target: &std::sync::Arc<Target>,
    request: &RequestHead,
    body: &[u8],
    timeouts: &Timeouts,
) -> Result<u16, String> {
    let connected = match upstream::pooled(&worker.pool, target) {
        Some(connected) => connected,
        None => {
            upstream::connect(&worker.pool, target, timeouts.connect).await.map_err(|error| error.detail.to_string())?
        }
    };
    let host = edits::host_for(&target.host, &request.authority, &target.url);
    let unanswered = |unanswered: upstream::Unanswered| unanswered.error.detail.to_string();
    let begun = Upstream::begin(connected, request, &host, target.tls.is_some(), false).await;
    let mut upstream = begun.map_err(unanswered)?;
    let answered = async {
        let empty = matches!(request.framing, Framing::None | Framing::Length(0));
        write(&mut upstream.peer, body, empty).await.map_err(|error| error.to_string())?;
        loop {
            let head = poll_fn(|context| upstream.poll_response(context)).await.map_err(unanswered)?;
            if !head.status.is_informational() || head.status.as_u16() == 101 {
                return Ok::<_, String>(head);
            }
        }
    };
    let late = |_| "it took longer than it may".to_owned();
    let head = timeout(timeouts.first_byte, answered).await.map_err(late)??;
    let mut observer = Observer::default();
    loop {
        let next = poll_fn(|context| upstream.peer.poll_next(context, false, &mut observer));
        match timeout(timeouts.idle, next).await.map_err(late)? {
            Ok(Next::Bytes) => {
                let count = upstream.peer.held().len();
                upstream.peer.consume(count);
            }
            Ok(Next::End(_)) => break,
            Err(fault) => return Err(format!("the answer broke off: {fault:?}")),
        }
    }
    upstream.recycle(&worker.pool, head.keep_alive);
    Ok(head.status.as_u16())
}

async fn write(peer: &mut Peer, mut body: &[u8], empty: bool) -> io::Result<()> {
    poll_fn(|context| {
        while !body.is_empty() {
            match peer.poll_write(context, body) {
                std::task::Poll::Ready(Ok(count)) => body = &body[count..],
                std::task::Poll::Ready(Err(error)) => return std::task::Poll::Ready(Err(error)),
                std::task::Poll::Pending => return std::task::Poll::Pending,
            }
        }
        std::task::Poll::Ready(Ok(()))
    })
    .await?;
    if !empty {
        poll_fn(|context| peer.poll_finish(context, false, &mut None)).await?;
    }
    poll_fn(|context| peer.poll_flush(context)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_part_of_all_places() {
        let within =
            |share: f64| (0..1000_u64).filter(|n| is_within(share, n * (u64::MAX / 1000) + u64::MAX / 2000)).count();
        assert_eq!((within(0.0), within(0.1), within(1.0)), (0, 100, 1000));
        assert!(is_within(1.0, u64::MAX));
    }
}
