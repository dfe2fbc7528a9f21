//! Heartbeat: an SSE comment in a silent event stream, so that whoever waits at the other end knows that it is alive.

use std::io;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use crate::proxy::peer::Peer;

/// A comment (WHATWG HTML section 9.2.6): readers of event streams ignore it.
const COMMENT: &[u8] = b": heartbeat\n\n";

/// The same as an HTTP/1.1 chunk of its own, for where the endpoint's framing passes as it is.
const CHUNK: &[u8] = b"d\r\n: heartbeat\n\n\r\n";

/// The heartbeats of one stream.
pub struct Heartbeat {
    after: Duration,
    raw: bool,
    silent_since: Instant,
    /// What is still to be written of one.
    left: &'static [u8],
}

impl Heartbeat {
    /// For a stream of which nothing has come yet. `raw`: its HTTP/1.1 chunks pass as they are.
    pub fn new(after: Duration, raw: bool, now: Instant) -> Heartbeat {
        Heartbeat { after, raw, silent_since: now, left: &[] }
    }

    /// Something came through, or nothing can be said now.
    pub fn put_off(&mut self, now: Instant) {
        self.silent_since = now;
    }

    /// When the next one is due.
    pub fn due(&self) -> Instant {
        self.silent_since + self.after
    }

    pub fn begin(&mut self, now: Instant) {
        self.left = if self.raw { CHUNK } else { COMMENT };
        self.silent_since = now;
    }

    /// None is half written.
    pub fn is_at_rest(&self) -> bool {
        self.left.is_empty()
    }

    /// Writes what is left of one; nothing else may be written before.
    pub fn poll_write(&mut self, client: &mut Peer, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.left.is_empty() {
            let count = ready!(client.poll_write(context, self.left))?;
            self.left = &self.left[count..];
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, COMMENT};

    #[test]
    fn the_chunk_is_the_comment_in_a_chunk() {
        let mut framed = format!("{:x}\r\n", COMMENT.len()).into_bytes();
        framed.extend_from_slice(COMMENT);
        framed.extend_from_slice(b"\r\n");
        assert_eq!(CHUNK, framed);
    }
}
