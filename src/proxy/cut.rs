//! Cut: how an exchange hears that its endpoint's drain has taken as long as it may.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::sync::futures::Notified;

use crate::state::Cut;

/// Since when an exchange listens: only a cut after its endpoint was picked is meant for it.
#[derive(Clone, Copy)]
pub struct Since<'a> {
    pub cut: &'a Cut,
    /// [`Cut::count`] then.
    pub count: u32,
}

/// Hears it. Cheap to poll again: it takes a lock only when it is to wake another task than before.
pub struct Hearing<'a> {
    since: Since<'a>,
    wakes: Option<Waker>,
}

impl<'a> Hearing<'a> {
    /// To be polled with what [`Cut::told`] gave before the first poll.
    pub fn new(since: Since<'a>) -> Hearing<'a> {
        Hearing { since, wakes: None }
    }

    pub fn poll(&mut self, told: Pin<&mut Notified<'_>>, context: &mut Context<'_>) -> Poll<()> {
        if self.since.cut.count() != self.since.count {
            return Poll::Ready(());
        }
        if !self.wakes.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            // One that comes from here on wakes this task; one that came just now has told `told`.
            if told.poll(context).is_ready() {
                return Poll::Ready(());
            }
            self.wakes = Some(context.waker().clone());
        }
        Poll::Pending
    }
}
