//! Lane: those who wait for the same: by class, within a class by turns of principals, and there by arrival.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::state::queue::{Class, PASSED_MAX, Principal, Ticket};

/// Whose turns are counted: a principal within a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Flow {
    pub class: Class,
    pub principal: Principal,
}

#[derive(Default)]
pub(super) struct Lane {
    classes: BTreeMap<Class, Row>,
}

/// One class of a lane.
struct Row {
    /// Waiters of other classes that took what this class's next could have used, since the class had its last turn.
    passed: u32,
    /// When that was (a stamp), or when it came to be.
    turn: u64,
    /// Principals in the order of their turns. A stamp may be older than the principal's own, when it was served from
    /// another lane; whoever stands in front is put right before it counts.
    rotation: BTreeMap<u64, Principal>,
    waiters: HashMap<Principal, Line>,
}

/// One principal's waiters, with the stamp that the rotation has of it.
struct Line {
    stamp: u64,
    tickets: BTreeSet<Ticket>,
}

/// When a class of a lane goes. The least goes first: the overdue by turns, so that each of those lets another go first
/// only once, then the more urgent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Due {
    /// The class was passed over too often, and had its last turn at this stamp; later than all stamps otherwise.
    turn: u64,
    pub class: Class,
}

impl Lane {
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// Everybody, in no order.
    pub fn tickets(&self) -> Vec<Ticket> {
        let lines = self.classes.values().flat_map(|row| row.waiters.values());
        lines.flat_map(|line| line.tickets.iter().copied()).collect()
    }

    /// How many wait in it.
    pub fn len(&self) -> usize {
        let lines = self.classes.values().flat_map(|row| row.waiters.values());
        lines.map(|line| line.tickets.len()).sum()
    }

    /// `stamp` is of the flow's last turn, `now` the newest of all.
    pub fn insert(&mut self, ticket: Ticket, flow: Flow, stamp: u64, now: u64) {
        let row = self.classes.entry(flow.class).or_insert_with(|| Row {
            passed: 0,
            turn: now,
            rotation: BTreeMap::new(),
            waiters: HashMap::new(),
        });
        let line = row.waiters.entry(flow.principal).or_insert_with(|| {
            row.rotation.insert(stamp, flow.principal);
            Line { stamp, tickets: BTreeSet::new() }
        });
        line.tickets.insert(ticket);
    }

    pub fn remove(&mut self, ticket: Ticket, flow: Flow) {
        let Some(row) = self.classes.get_mut(&flow.class) else { return };
        let Some(line) = row.waiters.get_mut(&flow.principal) else { return };
        line.tickets.remove(&ticket);
        if line.tickets.is_empty() {
            row.rotation.remove(&line.stamp);
            row.waiters.remove(&flow.principal);
        }
        if row.waiters.is_empty() {
            self.classes.remove(&flow.class);
        }
    }

    /// The class of which a waiter goes first.
    pub fn due(&self) -> Option<Due> {
        let due = |(class, row): (&Class, &Row)| Due {
            turn: if row.passed >= PASSED_MAX { row.turn } else { u64::MAX },
            class: *class,
        };
        self.classes.iter().map(due).min()
    }

    /// The next of a class, with the stamp of its principal's last turn, which `stamp_of` knows.
    pub fn front(&mut self, class: Class, stamp_of: impl Fn(Flow) -> u64) -> Option<(u64, Ticket)> {
        self.classes.get_mut(&class)?.front(|principal| stamp_of(Flow { class, principal }))
    }

    /// A waiter of `class` took what anybody here could have used; `now` is the stamp of that turn.
    pub fn served(&mut self, class: Class, now: u64) {
        for (other, row) in &mut self.classes {
            if *other == class {
                row.passed = 0;
                row.turn = now;
            } else {
                row.passed = row.passed.saturating_add(1);
            }
        }
    }
}

impl Row {
    fn front(&mut self, stamp_of: impl Fn(Principal) -> u64) -> Option<(u64, Ticket)> {
        // Stamps only grow, so the least that is true is the least of all. Each turn of this loop puts one principal
        // right that was served elsewhere since.
        loop {
            let (stamp, principal) = self.rotation.first_key_value().map(|(stamp, principal)| (*stamp, *principal))?;
            let line = self.waiters.get_mut(&principal)?;
            let newest = stamp_of(principal);
            if newest == stamp {
                return line.tickets.first().map(|ticket| (stamp, *ticket));
            }
            self.rotation.remove(&stamp);
            self.rotation.insert(newest, principal);
            line.stamp = newest;
        }
    }
}
