//! Rank: how many of those still here came before, in logarithmic time (a Fenwick tree over the order of arrival).

/// Room that even an empty queue has, so that renumbering stays rare.
const ROOM_MIN: usize = 64;

/// Counts who is still here, by order of arrival.
#[derive(Default)]
pub(super) struct Ranks {
    /// Slot n (from 1) holds the count of the n & -n slots up to it.
    sums: Vec<usize>,
    used: usize,
}

impl Ranks {
    /// Room for twice as many, so that each arrival pays for one renumbering of one waiter at most.
    pub fn with_room_for(count: usize) -> Ranks {
        Ranks { sums: vec![0; (2 * count).max(ROOM_MIN) + 1], used: 0 }
    }

    pub fn is_full(&self) -> bool {
        self.used + 1 >= self.sums.len()
    }

    /// Somebody comes; the caller has seen that there is room.
    pub fn push(&mut self) -> usize {
        self.used += 1;
        let mut slot = self.used;
        while let Some(sum) = self.sums.get_mut(slot) {
            *sum += 1;
            slot += lowest_bit(slot);
        }
        self.used
    }

    pub fn remove(&mut self, rank: usize) {
        let mut slot = rank;
        while let Some(sum) = self.sums.get_mut(slot) {
            *sum -= 1;
            slot += lowest_bit(slot);
        }
    }

    /// How many are here from the first up to this one, itself included.
    pub fn up_to(&self, rank: usize) -> usize {
        let mut slot = rank;
        let mut sum = 0;
        while slot > 0 {
            sum += self.sums[slot];
            slot -= lowest_bit(slot);
        }
        sum
    }
}

fn lowest_bit(slot: usize) -> usize {
    slot & slot.wrapping_neg()
}
