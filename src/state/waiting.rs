//! Waiting: an exchange's place in the queue. Given up when it is dropped, at once, whatever was given to it meanwhile.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::ids::{self, RunId};
use crate::state::Refusal;
use crate::state::core::Given;
use crate::state::dispatcher::{Dispatcher, Placed};
use crate::state::queue::Ticket;

/// A place in the queue. To be polled, or dropped by whoever leaves.
pub struct Waiting {
    dispatcher: Arc<Dispatcher>,
    /// `None` once the wait is over.
    ticket: Option<Ticket>,
    run: Option<RunId>,
    since: Instant,
    until: Instant,
}

impl Waiting {
    pub(super) fn new(
        dispatcher: Arc<Dispatcher>,
        ticket: Ticket,
        run: Option<RunId>,
        since: Instant,
        until: Instant,
    ) -> Waiting {
        Waiting { dispatcher, ticket: Some(ticket), run, since, until }
    }

    /// The id of the run that will start.
    pub fn run_id(&self) -> Option<RunId> {
        self.run
    }

    /// When it has waited as long as it may: time to call [`Waiting::time_out`].
    pub fn until(&self) -> Instant {
        self.until
    }

    pub fn waited(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }

    /// Ready when an endpoint is reserved, or there will be none. Not to be polled after that.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Placed, Refusal>> {
        let Some(ticket) = self.ticket else { return Poll::Pending };
        match self.dispatcher.with(|core| core.look(ticket, context.waker())) {
            Some(given) => {
                self.ticket = None;
                Poll::Ready(self.given(given))
            }
            None => Poll::Pending,
        }
    }

    /// It has waited long enough: the place is given up, unless an endpoint was reserved just now.
    pub fn time_out(&mut self, now: Instant) -> Result<Placed, Refusal> {
        let Some(ticket) = self.ticket.take() else { return Err(Refusal::QueueTimeout) };
        let given = self.dispatcher.with(|core| {
            let given = core.look(ticket, std::task::Waker::noop());
            if given.is_none() {
                core.leave(ticket, now);
            }
            given
        });
        self.given(given.unwrap_or(Err(Refusal::QueueTimeout)))
    }

    /// How many of those that wait came before, itself included.
    pub fn position(&self) -> Option<usize> {
        self.dispatcher.with(|core| core.position(self.ticket?))
    }

    fn given(&self, given: Given) -> Result<Placed, Refusal> {
        let now = ids::now();
        if self.run.is_some() {
            self.dispatcher.waited(self.waited(now));
        }
        match given {
            Ok(grant) => Ok(self.dispatcher.placed(grant)),
            Err(refusal) => Err(self.dispatcher.refused(refusal, self.run)),
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let now = ids::now();
            self.dispatcher.with(|core| core.leave(ticket, now));
            if self.run.is_some() {
                self.dispatcher.waited(self.waited(now));
                self.dispatcher.rejected();
            }
        }
    }
}
