//! Cut: how an exchange hears that it is over before its end: its endpoint's drain has taken as long as it may, or its
//! run was ended from elsewhere.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, RawWakerVTable, Waker};

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
    /// Which task it wakes, while no step has come. No clone of the waker, as that would be two more atomic operations for
    /// each request: `told` has one until then, which keeps another task from getting the same address.
    wakes: Task,
}

type Task = (*const (), *const RawWakerVTable);

const NOBODY: Task = (std::ptr::null(), std::ptr::null());

fn task(waker: &Waker) -> Task {
    (waker.data(), std::ptr::from_ref(waker.vtable()))
}

impl<'a> Hearing<'a> {
    /// To be polled with what [`Cut::told`] gave before the first poll.
    pub fn new(since: Since<'a>, stop: Option<&Arc<Stop>>) -> Hearing<'a> {
        Hearing { since, stop: stop.cloned(), wakes: NOBODY }
    }

    pub fn poll(&mut self, mut told: Pin<&mut Notified<'a>>, context: &mut Context<'_>) -> Poll<Heard> {
        let (count, place) = self.since.cut.wave();
        // Each step ends what `told` waits for: also those of a wave that had begun when the endpoint was picked, which are
        // not meant for this exchange, but the next wave is.
        let steps = count != self.since.count || place != 0;
        if steps && self.since.is_reached() {
            return Poll::Ready(Heard::DrainOver);
        }
        if steps || self.wakes != task(context.waker()) {
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
            self.wakes = task(context.waker());
        }
        match self.stop.as_ref().and_then(|stop| stop.outcome()) {
            Some(outcome) => Poll::Ready(Heard::Stopped(outcome)),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll, Wake};

    use super::{Heard, Hearing, Since};
    use crate::state::Cut;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_came_while_others_are_cut_hears_the_next_time() {
        let cut = Cut::default();
        cut.begin();
        let woken = Arc::new(Woken::default());
        let times = || woken.0.load(Ordering::Relaxed);
        let waker = Arc::clone(&woken).into();
        let mut context = Context::from_waker(&waker);
        let mut told = pin!(cut.told());
        let mut hearing = Hearing::new(Since::new(&cut, cut.count()), None);
        assert!(hearing.poll(told.as_mut(), &mut context).is_pending());
        for (step, share) in [0.5, 1.0].into_iter().enumerate() {
            cut.reach(share);
            assert_eq!(times(), step + 1, "it looks");
            assert!(hearing.poll(told.as_mut(), &mut context).is_pending(), "it is not meant");
        }
        cut.begin();
        assert_eq!(times(), 3);
        assert!(hearing.poll(told.as_mut(), &mut context).is_pending(), "not its turn yet");
        cut.reach(1.0);
        assert_eq!(times(), 4);
        assert_eq!(hearing.poll(told.as_mut(), &mut context), Poll::Ready(Heard::DrainOver));
    }
}
