//! Handover: how a waiter gets what was found for it, from whoever freed it, with no moment in which it is anybody's.
//!
//! The giver, under the service's lock, takes the waiter from the queue, makes the reservation in its name, and puts
//! that on its seat; then, outside of the lock, it wakes the waiter's task. A waiter that leaves takes its seat along:
//! what lies there already it must give back, which lets the next one have it.

use std::collections::HashMap;
use std::task::Waker;

use crate::state::queue::Ticket;

/// The seats of all who wait; part of what the service's lock protects.
pub struct Handover<G> {
    seats: HashMap<Ticket, Seat<G>>,
}

enum Seat<G> {
    /// Whom to wake; `None` until it has looked for the first time.
    Waiting(Option<Waker>),
    Given(G),
}

impl<G> Default for Handover<G> {
    fn default() -> Handover<G> {
        Handover { seats: HashMap::new() }
    }
}

impl<G> Handover<G> {
    /// Nobody sits here.
    pub fn is_empty(&self) -> bool {
        self.seats.is_empty()
    }

    /// A waiter takes its seat, in the same step as its place in the queue.
    pub fn sit(&mut self, ticket: Ticket) {
        self.seats.insert(ticket, Seat::Waiting(None));
    }

    /// Gives something to a waiter. The waker, if any, is to be woken once the lock is released. Gives back what the
    /// waiter can't take: it has left, or has something already (neither happens to one who is in the queue).
    pub fn give(&mut self, ticket: Ticket, given: G) -> Result<Option<Waker>, G> {
        match self.seats.get_mut(&ticket) {
            Some(seat @ Seat::Waiting(_)) => match std::mem::replace(seat, Seat::Given(given)) {
                Seat::Waiting(waker) => Ok(waker),
                Seat::Given(_) => Ok(None),
            },
            _ => Err(given),
        }
    }

    /// The waiter looks at its seat: it takes what lies there and is done, or will be woken by this waker.
    pub fn look(&mut self, ticket: Ticket, waker: &Waker) -> Option<G> {
        match self.seats.get_mut(&ticket)? {
            Seat::Waiting(Some(known)) => known.clone_from(waker),
            Seat::Waiting(none) => *none = Some(waker.clone()),
            Seat::Given(_) => {
                if let Some(Seat::Given(given)) = self.seats.remove(&ticket) {
                    return Some(given);
                }
            }
        }
        None
    }

    /// The waiter leaves. What was given to it meanwhile is its caller's to give back.
    pub fn leave(&mut self, ticket: Ticket) -> Option<G> {
        match self.seats.remove(&ticket)? {
            Seat::Given(given) => Some(given),
            Seat::Waiting(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Poll;
    use std::time::Duration;

    use shuttle::rand::Rng;
    use shuttle::sync::Mutex;

    use super::*;
    use crate::state::queue::{Arrival, Class, Offer, Place, Queue};

    const OFFER: Offer = Offer { endpoint: 0, version: 0, slot: true, open: true, common: true };

    /// The order of the dispatcher's steps, around slots that are only a number.
    struct Room {
        free: usize,
        queue: Queue<()>,
        handover: Handover<()>,
    }

    impl Room {
        /// Hands free slots to those who wait, and says whom to wake. Nobody who comes later finds one of them.
        fn serve(&mut self) -> Vec<Waker> {
            let mut wakers = Vec::new();
            while self.free > 0
                && let Some(next) = self.queue.first(OFFER)
            {
                self.queue.take(next, OFFER);
                self.free -= 1;
                match self.handover.give(next, ()) {
                    Ok(waker) => wakers.extend(waker),
                    Err(()) => self.free += 1,
                }
            }
            wakers
        }
    }

    fn arrive(room: &Mutex<Room>) -> Option<Ticket> {
        let now = crate::ids::now();
        let mut room = room.lock().expect("not poisoned");
        if room.free > 0 {
            room.free -= 1;
            return None;
        }
        let arrival = Arrival {
            class: Class::default(),
            principal: None,
            session: None,
            place: Place::Any,
            deadline: now + Duration::from_secs(1),
            beyond_max: false,
            waiter: (),
        };
        let ticket = room.queue.push(arrival, now).expect("there is room");
        room.handover.sit(ticket);
        Some(ticket)
    }

    fn give_back(room: &Mutex<Room>) {
        let wakers = {
            let mut room = room.lock().expect("not poisoned");
            room.free += 1;
            room.serve()
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    fn leave(room: &Mutex<Room>, ticket: Ticket) {
        let given = {
            let mut room = room.lock().expect("not poisoned");
            room.queue.leave(ticket);
            room.handover.leave(ticket)
        };
        if given.is_some() {
            give_back(room);
        }
    }

    /// Some come, some of those leave while they wait, all others run and give their slot back.
    fn scenario() {
        const SLOTS: usize = 2;
        let room = Arc::new(Mutex::new(Room { free: SLOTS, queue: Queue::new(100), handover: Handover::default() }));
        let running = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<_> = (0..5)
            .map(|number| {
                let (room, running) = (Arc::clone(&room), Arc::clone(&running));
                shuttle::thread::spawn(move || {
                    if let Some(ticket) = arrive(&room) {
                        if number % 2 == 1 {
                            // It looks once, so that somebody may be about to wake it, and gives up.
                            let looked = room.lock().expect("not poisoned").handover.look(ticket, Waker::noop());
                            if looked.is_none() {
                                for _ in 0..shuttle::rand::thread_rng().gen_range(0..3) {
                                    shuttle::thread::yield_now();
                                }
                                leave(&room, ticket);
                                return;
                            }
                        } else {
                            shuttle::future::block_on(poll_fn(|context| {
                                let mut room = room.lock().expect("not poisoned");
                                room.handover.look(ticket, context.waker()).map_or(Poll::Pending, Poll::Ready)
                            }));
                        }
                    }
                    assert!(running.fetch_add(1, Ordering::Relaxed) < SLOTS, "more run than there are slots");
                    shuttle::thread::yield_now();
                    running.fetch_sub(1, Ordering::Relaxed);
                    give_back(&room);
                })
            })
            .collect();
        for task in tasks {
            task.join().expect("no panic");
        }
        let room = room.lock().expect("not poisoned");
        assert_eq!(room.free, SLOTS, "no slot is lost");
        assert!(room.queue.is_empty() && room.handover.is_empty());
    }

    /// Shuttle runs the threads in many orders, and fails where one waits for ever: a lost wake-up.
    #[test]
    fn no_order_of_steps_loses_a_slot_or_a_wake_up() {
        shuttle::check_random(scenario, 3_000);
        shuttle::check_pct(scenario, 2_000, 4);
    }
}
