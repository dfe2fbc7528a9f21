//! Queue: the bounded waiting room of one service: who waits, for what, and who is next for a slot.
//!
//! A waiter stands in a *lane*, named by what it may use: one endpoint, one version, any endpoint. A free slot looks at
//! three lanes only (its endpoint's, its version's and the common one), so nobody who can't use it stands in its way,
//! and nothing is scanned. A lane may promise too much but never too little: whoever takes a waiter from it asks again
//! where that may go, and puts it where it belongs ([`Queue::sort`]) if that is not here.

mod lane;
mod rank;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::state::queue::lane::{Flow, Lane};
use crate::state::queue::rank::Ranks;

/// How often a class lets others go first; then it is due.
pub const PASSED_MAX: u32 = 8;

/// The bound on starvation: waiters of other classes that take a slot which the next of a class could have used. Once a
/// class is due, every other goes before it at most once.
pub const OVERTAKEN_MAX: u32 = PASSED_MAX + CLASSES as u32 - 1;

const CLASSES: usize = 8;

/// How urgent a start is: 0 to 7, lower is more urgent, as the urgency of RFC 9218 section 4.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Class(u8);

impl Class {
    pub const MOST_URGENT: Class = Class(0);
    pub const LEAST_URGENT: Class = Class(7);

    /// What the priority header says. Numbers beyond the ends count as the ends; without a number it is the default.
    pub fn of_header(value: Option<&[u8]>) -> Class {
        let number = value.and_then(|value| std::str::from_utf8(value).ok()?.trim().parse::<i64>().ok());
        number.map_or(Class::default(), |number| Class(number.clamp(0, 7) as u8))
    }
}

impl Default for Class {
    fn default() -> Class {
        Class(3)
    }
}

/// Who asks: the digest of its `session.scope` value; `None` is one principal of its own.
pub type Principal = Option<[u8; 16]>;

/// What a waiter waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A slot of this endpoint: its session lives there.
    Endpoint(u32),
    /// A slot of any endpoint of this version. Whoever renumbers versions sorts these again.
    Version(usize),
    /// A slot, no matter where.
    Any,
    /// A ready endpoint, with or without a free slot: it starts no run.
    Ready,
    /// Something else than there is: nothing is offered to it before [`Queue::sort`] has put it elsewhere.
    Nowhere,
    /// Its session's turn. No slot is offered to it before [`Queue::sort`] has put it elsewhere.
    Turn,
}

impl Place {
    /// It waits for a slot.
    fn takes_a_slot(self) -> bool {
        matches!(self, Place::Endpoint(_) | Place::Version(_) | Place::Any)
    }
}

/// Names a waiter. Later arrivals have larger tickets; none is used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Ticket(u64);

/// Who comes to wait.
#[derive(Debug)]
pub struct Arrival<W> {
    pub class: Class,
    pub principal: Principal,
    /// Waiters with the same number keep their order. Any number that stands for the session, from before it is known
    /// to the table; a chance collision ties two sessions together and does no other harm.
    pub session: Option<u64>,
    pub place: Place,
    pub deadline: Instant,
    /// It needs no place of those that [`Queue::set_max`] bounds, because something else does: there is one start at most
    /// that interrupts a session.
    pub beyond_max: bool,
    pub waiter: W,
}

/// What has become free.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    pub endpoint: u32,
    pub version: usize,
    /// There is a slot; otherwise the endpoint is only ready.
    pub slot: bool,
    /// New work may be placed here. Otherwise (it drains, it is not ready) only those bound to the endpoint may come.
    pub open: bool,
    /// The version takes its share of whatever comes. Otherwise (its weight is 0) only those bound to it may come.
    pub common: bool,
}

impl Offer {
    fn places(self) -> impl Iterator<Item = Place> {
        let Offer { endpoint, version, slot, open, common } = self;
        [
            (slot, Place::Endpoint(endpoint)),
            (slot && open, Place::Version(version)),
            (slot && open && common, Place::Any),
            (open, Place::Ready),
        ]
        .into_iter()
        .filter_map(|(offered, place)| offered.then_some(place))
    }
}

/// The waiting room. `W` is what its owner keeps of a waiter.
pub struct Queue<W> {
    max: usize,
    /// In order of arrival.
    waiting: BTreeMap<Ticket, Waiting<W>>,
    last_ticket: u64,
    lanes: HashMap<Place, Lane>,
    /// Principals within a class, with the stamp of their last turn: the one served longest ago is next.
    flows: HashMap<Flow, Turns>,
    last_stamp: u64,
    sessions: HashMap<u64, BTreeSet<Ticket>>,
    deadlines: BTreeSet<(Instant, Ticket)>,
    ranks: Ranks,
    placeable: usize,
}

struct Waiting<W> {
    flow: Flow,
    session: Option<u64>,
    place: Place,
    since: Instant,
    deadline: Instant,
    rank: usize,
    waiter: W,
}

/// The rotation's view of one flow.
struct Turns {
    stamp: u64,
    waiters: usize,
}

impl<W> Queue<W> {
    pub fn new(max: usize) -> Queue<W> {
        Queue {
            max,
            waiting: BTreeMap::new(),
            last_ticket: 0,
            lanes: HashMap::new(),
            flows: HashMap::new(),
            last_stamp: 0,
            sessions: HashMap::new(),
            deadlines: BTreeSet::new(),
            ranks: Ranks::default(),
            placeable: 0,
        }
    }

    /// How many may wait from now on. Whoever waits already stays.
    pub fn set_max(&mut self, max: usize) {
        self.max = max;
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Waiters that another endpoint could take: neither pinned nor waiting for their session's turn.
    pub fn placeable(&self) -> usize {
        self.placeable
    }

    /// How many have come so far.
    pub fn arrivals(&self) -> u64 {
        self.last_ticket
    }

    /// How many wait for what, in no order; those that wait for their session's turn are not among them.
    pub fn waiting_by_place(&self) -> impl Iterator<Item = (Place, usize)> {
        self.lanes.iter().map(|(place, lane)| (*place, lane.len()))
    }

    /// How long whoever came first has waited.
    pub fn oldest_age(&self, now: Instant) -> Duration {
        self.waiting
            .first_key_value()
            .map_or(Duration::ZERO, |(_, waiting)| now.saturating_duration_since(waiting.since))
    }

    /// Takes a place at the end; gives the arrival back where there is none. Later waiters of one session stand with the
    /// first: in its class and for the same slot, so that none overtakes another.
    pub fn push(&mut self, arrival: Arrival<W>, now: Instant) -> Result<Ticket, Arrival<W>> {
        if self.waiting.len() >= self.max && !arrival.beyond_max {
            return Err(arrival);
        }
        let Arrival { class, principal, session, mut place, deadline, waiter, .. } = arrival;
        let mut flow = Flow { class, principal };
        if let Some(others) = session.and_then(|session| self.sessions.get(&session)) {
            let mut others = others.iter().map(|ticket| &self.waiting[ticket]);
            if let Some(first) = others.clone().next() {
                flow = first.flow;
            }
            if place.takes_a_slot()
                && let Some(other) = others.find(|other| other.place.takes_a_slot())
            {
                place = other.place;
            }
        }
        self.last_ticket += 1;
        let ticket = Ticket(self.last_ticket);
        if self.ranks.is_full() {
            self.renumber();
        }
        let rank = self.ranks.push();
        self.waiting.insert(ticket, Waiting { flow, session, place, since: now, deadline, rank, waiter });
        self.deadlines.insert((deadline, ticket));
        if let Some(session) = session {
            self.sessions.entry(session).or_default().insert(ticket);
        }
        let stamp = &mut self.last_stamp;
        let turns = self.flows.entry(flow).or_insert_with(|| {
            *stamp += 1;
            Turns { stamp: *stamp, waiters: 0 }
        });
        turns.waiters += 1;
        self.enter(ticket, flow, place);
        Ok(ticket)
    }

    pub fn get(&self, ticket: Ticket) -> Option<&W> {
        self.waiting.get(&ticket).map(|waiting| &waiting.waiter)
    }

    pub fn get_mut(&mut self, ticket: Ticket) -> Option<&mut W> {
        self.waiting.get_mut(&ticket).map(|waiting| &mut waiting.waiter)
    }

    pub fn place(&self, ticket: Ticket) -> Option<Place> {
        self.waiting.get(&ticket).map(|waiting| waiting.place)
    }

    /// Gives up a place, whatever for: the client left, its time is over, it is refused.
    pub fn leave(&mut self, ticket: Ticket) -> Option<W> {
        let waiting = self.waiting.remove(&ticket)?;
        let Waiting { flow, session, place, deadline, rank, waiter, .. } = waiting;
        self.exit(ticket, flow, place);
        self.ranks.remove(rank);
        self.deadlines.remove(&(deadline, ticket));
        if let Some(session) = session
            && let Some(tickets) = self.sessions.get_mut(&session)
        {
            tickets.remove(&ticket);
            if tickets.is_empty() {
                self.sessions.remove(&session);
            }
        }
        if let Some(turns) = self.flows.get_mut(&flow) {
            turns.waiters -= 1;
            if turns.waiters == 0 {
                self.flows.remove(&flow);
            }
        }
        Some(waiter)
    }

    /// Who is next for what has become free. It stays in its place until [`Queue::take`], [`Queue::sort`] or
    /// [`Queue::leave`].
    pub fn first(&mut self, offer: Offer) -> Option<Ticket> {
        let Queue { lanes, flows, .. } = self;
        // First the class, of all lanes together; then within it by turns of principals, and by arrival.
        let due = offer.places().filter_map(|place| lanes.get(&place)?.due()).min()?;
        let fronts = offer.places().filter_map(|place| {
            let stamp_of = |flow| flows[&flow].stamp;
            lanes.get_mut(&place)?.front(due.class, stamp_of)
        });
        fronts.min().map(|(_, ticket)| ticket)
    }

    /// The waiter goes, to what was offered to it. Those that were passed over are nearer to their turn now.
    pub fn take(&mut self, ticket: Ticket, offer: Offer) -> Option<W> {
        let flow = self.waiting.get(&ticket)?.flow;
        self.last_stamp += 1;
        for place in offer.places() {
            if let Some(lane) = self.lanes.get_mut(&place) {
                lane.served(flow.class, self.last_stamp);
            }
        }
        if let Some(turns) = self.flows.get_mut(&flow) {
            turns.stamp = self.last_stamp;
        }
        self.leave(ticket)
    }

    /// Puts a waiter where it belongs, and with it those of its session that wait for a slot, too. They keep their order
    /// of arrival.
    pub fn sort(&mut self, ticket: Ticket, to: Place) {
        let Some(waiting) = self.waiting.get(&ticket) else { return };
        let others = waiting.session.filter(|_| to.takes_a_slot()).and_then(|session| self.sessions.get(&session));
        let others: Vec<Ticket> =
            others.into_iter().flatten().copied().filter(|other| self.waiting[other].place.takes_a_slot()).collect();
        self.shift(ticket, to);
        for other in others {
            self.shift(other, to);
        }
    }

    /// Who waits for this, in order of arrival: to be looked at and sorted again when something has changed for them.
    pub fn waiting_for(&self, place: Place) -> Vec<Ticket> {
        let mut tickets = self.lanes.get(&place).map(Lane::tickets).unwrap_or_default();
        tickets.sort_unstable();
        tickets
    }

    /// Who waits of a session, in order of arrival.
    pub fn of_session(&self, session: u64) -> Vec<Ticket> {
        self.sessions.get(&session).into_iter().flatten().copied().collect()
    }

    /// Somebody waits for this.
    pub fn has_lane(&self, place: Place) -> bool {
        self.lanes.contains_key(&place)
    }

    /// Everybody but those that wait for their turn, in order of arrival.
    pub fn all_in_lanes(&self) -> Vec<Ticket> {
        let in_lanes = self.waiting.iter().filter(|(_, waiting)| waiting.place != Place::Turn);
        in_lanes.map(|(ticket, _)| *ticket).collect()
    }

    /// Everybody, in order of arrival, with the class.
    pub fn everybody(&self) -> impl Iterator<Item = (Ticket, Class, &W)> {
        self.waiting.iter().map(|(ticket, waiting)| (*ticket, waiting.flow.class, &waiting.waiter))
    }

    /// Takes out those whose deadline has come, the earliest first, `limit` at most.
    pub fn expire(&mut self, now: Instant, limit: usize) -> Vec<(Ticket, W)> {
        let mut expired = Vec::new();
        while expired.len() < limit
            && let Some((deadline, ticket)) = self.deadlines.first().copied()
            && deadline <= now
        {
            expired.extend(self.leave(ticket).map(|waiter| (ticket, waiter)));
        }
        expired
    }

    /// The next deadline.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// How many of those that wait came before, itself included. It never rises. Priority, principals and pins may let
    /// later ones go first, so it is no promise.
    pub fn position(&self, ticket: Ticket) -> Option<usize> {
        self.waiting.get(&ticket).map(|waiting| self.ranks.up_to(waiting.rank))
    }

    fn shift(&mut self, ticket: Ticket, to: Place) {
        let Some(waiting) = self.waiting.get_mut(&ticket) else { return };
        let from = std::mem::replace(&mut waiting.place, to);
        let flow = waiting.flow;
        if from != to {
            self.exit(ticket, flow, from);
            self.enter(ticket, flow, to);
        }
    }

    fn enter(&mut self, ticket: Ticket, flow: Flow, place: Place) {
        self.placeable += usize::from(is_placeable(place));
        if place != Place::Turn {
            let stamp = self.flows[&flow].stamp;
            self.lanes.entry(place).or_default().insert(ticket, flow, stamp, self.last_stamp);
        }
    }

    fn exit(&mut self, ticket: Ticket, flow: Flow, place: Place) {
        self.placeable -= usize::from(is_placeable(place));
        if let Some(lane) = self.lanes.get_mut(&place) {
            lane.remove(ticket, flow);
            if lane.is_empty() {
                self.lanes.remove(&place);
            }
        }
    }

    /// Gives everybody a new rank, because those that are left have used up the room.
    fn renumber(&mut self) {
        self.ranks = Ranks::with_room_for(self.waiting.len());
        for waiting in self.waiting.values_mut() {
            waiting.rank = self.ranks.push();
        }
    }
}

fn is_placeable(place: Place) -> bool {
    matches!(place, Place::Version(_) | Place::Any | Place::Ready | Place::Nowhere)
}

#[cfg(test)]
mod tests;
