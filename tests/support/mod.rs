//! Support: what the black-box tests share: a scriptable backend, a raw client, a proxy to start, and waiting.
#![allow(dead_code, unused_imports, reason = "every test binary uses a part of this")]

mod backend;
mod certificate;
mod client;
mod cluster;
mod counting;
mod dns;
mod http2;
mod kubernetes;
pub mod langgraph;
mod peer;
mod program;
mod proxy;
mod random;
mod zone;

use std::future::Future;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

pub use backend::{Backend, Body, Drip, Gate, Request, Script, Step};
pub use certificate::Certificate;
pub use client::{Head, RawClient, Response, fetch, get, post};
pub use cluster::Cluster;
pub use counting::{Counting, Seen};
pub use dns::{NameServer, Srv};
pub use http2::{Http2Client, Http2Stream, request as http2_request};
pub use kubernetes::{ApiServer, Pod, slice};
pub use peer::{Fleet, Peer, PeerClient, PeerScript, Peers, Transcript, assert_same, post_json, transcript};
pub use program::Program;
pub use proxy::{Proxy, ask_admin, start_proxy, start_proxy_in, start_proxy_with};
pub use random::Random;
pub use zone::ZoneServer;

/// How long a test waits for something that must happen. Far more than it ever takes: only a failure waits so long.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// Returns as soon as `condition` holds; panics with `what` when [`DEADLINE`] passes first.
pub async fn eventually(what: &str, condition: impl FnMut() -> bool) {
    eventually_within(DEADLINE, what, condition).await;
}

/// As [`eventually`], with a deadline of its own.
pub async fn eventually_within(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + deadline;
    while !condition() {
        assert!(tokio::time::Instant::now() < end, "did not happen within {deadline:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// As [`eventually`], for a condition that has to be asked over the network.
pub async fn eventually_async<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let end = tokio::time::Instant::now() + DEADLINE;
    while !condition().await {
        assert!(tokio::time::Instant::now() < end, "did not happen within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The output of `future`; panics with `what` when [`DEADLINE`] passes first.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(output) => output,
        Err(_) => panic!("did not happen within {DEADLINE:?}: {what}"),
    }
}

/// A byte stream of any kind: TCP, unix, TLS.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// The position just after the blank line that ends a head.
fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|position| position + 4)
}

/// The first value of `name` in a list of headers; names are compared without case.
fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(header, _)| header.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}
