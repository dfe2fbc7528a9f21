//! Cut: how an exchange hears that it is over before its end: its endpoint's drain has taken as long as it may, or its
//! run was ended from elsewhere.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::sync::futures::Notified;

use crate::run::RunOutcome;
use crate::state::Cut;
use crate::state::runs::Stop;

/// Since when an exchange listens: only a cut after its endpoint was picked is meant for it.
#[derive(Clone, Copy)]
pub struct Since<'a> {
    pub cut: &'a Cut,
    /// [`Cut::count`] then.
    pub count: u32,
}

/// What is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    DrainOver,
    /// The run was ended, as this.
    Stopped(RunOutcome),
}

/// Hears it. Cheap to poll again: it takes a lock only when it is to wake another task than before.
pub struct Hearing<'a> {
    since: Since<'a>,
    /// Of the exchange's run, where it carries one.
    stop: Option<Arc<Stop>>,
    wakes: Option<Waker>,
}

impl<'a> Hearing<'a> {
    /// To be polled with what [`Cut::told`] gave before the first poll.
    pub fn new(since: Since<'a>, stop: Option<&Arc<Stop>>) -> Hearing<'a> {
        Hearing { since, stop: stop.cloned(), wakes: None }
    }

    pub fn poll(&mut self, told: Pin<&mut Notified<'_>>, context: &mut Context<'_>) -> Poll<Heard> {
        if self.since.cut.count() != self.since.count {
            return Poll::Ready(Heard::DrainOver);
        }
        if !self.wakes.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            if let Some(stop) = &self.stop {
                stop.wakes(context.waker());
            }
            // One that comes from here on wakes this task; one that came just now has told `told`.
            if told.poll(context).is_ready() {
                return Poll::Ready(Heard::DrainOver);
            }
            self.wakes = Some(context.waker().clone());
        }
        match self.stop.as_ref().and_then(|stop| stop.outcome()) {
            Some(outcome) => Poll::Ready(Heard::Stopped(outcome)),
            None => Poll::Pending,
        }
    }
}
