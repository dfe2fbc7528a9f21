//! Hang-up: sees that the other side of a connection has closed though what it sent before has not been read.
//!
//! That a socket can be read does not tell it, for it can as long as anything is left, and the end comes behind that. The
//! system does tell (EPOLLRDHUP of epoll_ctl(2)), but to one who waits for nothing else, and the descriptor that is read
//! waits for what there is to read. So a second one of the same socket waits for that word alone: whoever waits is woken
//! by it and not by what comes in before.

use std::future::{Future, pending};
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{Interest, Ready};
use tokio::net::{TcpStream, UnixStream};

use crate::net::stream::{Plain, Stream};

/// Waits for the other side of one connection to close, or to end what it sends. Holds a descriptor.
pub struct HangUp {
    /// `None`: it has.
    waiting: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

impl HangUp {
    /// Fails where no descriptor is free. To be called within the runtime in which it is polled.
    pub fn of(stream: &Stream) -> io::Result<HangUp> {
        let waiting: Pin<Box<dyn Future<Output = ()>>> = match stream.plain() {
            Plain::Tcp(socket) => {
                let second = TcpStream::from_std(socket.as_fd().try_clone_to_owned()?.into())?;
                Box::pin(async move { closed(second.ready(CLOSED).await).await })
            }
            Plain::Unix(socket) => {
                let second = UnixStream::from_std(socket.as_fd().try_clone_to_owned()?.into())?;
                Box::pin(async move { closed(second.ready(CLOSED).await).await })
            }
            #[cfg(feature = "simulation")]
            Plain::Simulated(socket) => Box::pin(socket.hang_up()),
        };
        Ok(HangUp { waiting: Some(waiting) })
    }

    /// Ready once the other side has closed, and from then on.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Some(waiting) = &mut self.waiting {
            ready!(waiting.as_mut().poll(context));
            self.waiting = None;
        }
        Poll::Ready(())
    }
}

/// Whoever waits for urgent data, of which none is told here, is woken by the end and by nothing that can be read.
const CLOSED: Interest = Interest::PRIORITY;

async fn closed(told: io::Result<Ready>) {
    if !told.is_ok_and(Ready::is_read_closed) {
        // The runtime ends.
        pending().await
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    async fn tcp() -> (Stream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (far, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (Stream::Plain(Plain::Tcp(accepted.unwrap().0)), far.unwrap())
    }

    fn unix() -> (Stream, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Stream::Plain(Plain::Unix(near)), far)
    }

    /// Sends more than once, ends it, and counts how often whoever waits was woken.
    async fn wakes_once(near: Stream, mut far: impl AsyncWriteExt + Unpin) {
        let mut hang_up = HangUp::of(&near).unwrap();
        let mut polls = 0;
        let mut waiting = std::pin::pin!(poll_fn(|context| {
            polls += 1;
            hang_up.poll(context)
        }));
        for _ in 0..3 {
            far.write_all(b"never read").await.unwrap();
            let waits = tokio::time::timeout(std::time::Duration::from_millis(20), waiting.as_mut()).await;
            assert!(waits.is_err(), "it is still there");
        }
        far.shutdown().await.unwrap();
        waiting.as_mut().await;
        // Two for each of the three time-outs and two for the end: none for what came in.
        assert!(polls <= 8, "{polls}");
        poll_fn(|context| hang_up.poll(context)).await;
    }

    #[tokio::test]
    async fn an_end_is_seen_behind_what_is_not_read_and_what_comes_wakes_nobody() {
        let (near, far) = tcp().await;
        wakes_once(near, far).await;
        let (near, far) = unix();
        wakes_once(near, far).await;
    }

    #[tokio::test]
    async fn one_that_had_left_before_is_seen_too() {
        let (near, mut far) = tcp().await;
        far.write_all(b"never read").await.unwrap();
        drop(far);
        let mut hang_up = HangUp::of(&near).unwrap();
        poll_fn(|context| hang_up.poll(context)).await;
    }
}
