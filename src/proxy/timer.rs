//! Timer: one lazily moved deadline per connection. Moving it later costs nothing; it wakes early and looks again.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::time::Sleep;

pub struct Timer {
    sleep: Pin<Box<Sleep>>,
}

impl Timer {
    pub fn new(first: Duration) -> Timer {
        Timer { sleep: Box::pin(tokio::time::sleep(first)) }
    }

    /// Ready once `deadline` has passed. The deadline may differ at each call.
    pub fn poll_passed(&mut self, context: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let armed = self.sleep.deadline().into_std();
        if deadline < armed {
            self.sleep.as_mut().reset(deadline.into());
        }
        loop {
            ready!(self.sleep.as_mut().poll(context));
            if crate::ids::now() >= deadline {
                return Poll::Ready(());
            }
            self.sleep.as_mut().reset(deadline.into());
        }
    }
}
