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
    /// [`Cut::looks`] when it began to listen.
    looks: u32,
    wakes: Option<Waker>,
}

impl<'a> Hearing<'a> {
    /// To be polled with what [`Cut::told`] gave before the first poll.
    pub fn new(since: Since<'a>, stop: Option<&Arc<Stop>>) -> Hearing<'a> {
        Hearing { since, stop: stop.cloned(), looks: since.cut.looks(), wakes: None }
    }

    pub fn poll(&mut self, mut told: Pin<&mut Notified<'a>>, context: &mut Context<'_>) -> Poll<Heard> {
        let Since { cut, count } = self.since;
        loop {
            if cut.count() != count {
                return Poll::Ready(Heard::DrainOver);
            }
            if let Some(outcome) = self.stop.as_ref().and_then(|stop| stop.outcome()) {
                return Poll::Ready(Heard::Stopped(outcome));
            }
            if cut.looks() != self.looks {
                // It was meant for somebody else: listen anew, and only then see whether there was another.
                told.set(cut.told());
                self.looks = cut.looks();
                self.wakes = None;
            }
            if self.wakes.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                return Poll::Pending;
            }
            // One that comes from here on wakes this task; one that came just now has told `told`.
            if told.as_mut().poll(context).is_pending() {
                self.wakes = Some(context.waker().clone());
                // What was decided between the look above and this is seen at the next turn.
                if cut.looks() == self.looks && cut.count() == count {
                    return Poll::Pending;
                }
            }
        }
    }
}
