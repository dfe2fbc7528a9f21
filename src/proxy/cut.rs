//! Cut: how an exchange hears that it is over before its end: its endpoint's drain has taken as long as it may, or its
//! run was ended from elsewhere.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::sync::futures::Notified;

use crate::ids;
use crate::run::RunOutcome;
use crate::state::Cut;
use crate::state::runs::Stop;

/// Since when an exchange listens: only a cut after its endpoint was picked is meant for it.
#[derive(Clone, Copy)]
pub struct Since<'a> {
    cut: &'a Cut,
    /// [`Cut::count`] then.
    count: u32,
    /// Among those that are cut, once it has come to that; 0 until then.
    place: u32,
}

impl<'a> Since<'a> {
    pub fn new(cut: &'a Cut, count: u32) -> Since<'a> {
        Since { cut, count, place: 0 }
    }

    /// What there was then is being cut, and it is this exchange's turn.
    fn is_reached(&mut self) -> bool {
        let (count, place) = self.cut.wave();
        let waves = count.wrapping_sub(self.count);
        if waves == 1 && self.place == 0 {
            self.place = u32::from_ne_bytes(ids::quick_random_bytes()).max(1);
        }
        waves > 1 || (waves == 1 && self.place <= place)
    }
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

    pub fn poll(&mut self, mut told: Pin<&mut Notified<'a>>, context: &mut Context<'_>) -> Poll<Heard> {
        let has_begun = self.since.cut.count() != self.since.count;
        if has_begun && self.since.is_reached() {
            return Poll::Ready(Heard::DrainOver);
        }
        // What was told to begin has to listen for the next step.
        if has_begun || !self.wakes.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            if let Some(stop) = &self.stop {
                stop.wakes(context.waker());
            }
            // A step that comes from here on wakes this task; one that came just now has told `told`.
            while told.as_mut().poll(context).is_ready() {
                told.set(self.since.cut.told());
                if self.since.is_reached() {
                    return Poll::Ready(Heard::DrainOver);
                }
            }
            self.wakes = Some(context.waker().clone());
        }
        match self.stop.as_ref().and_then(|stop| stop.outcome()) {
            Some(outcome) => Poll::Ready(Heard::Stopped(outcome)),
            None => Poll::Pending,
        }
    }
}
