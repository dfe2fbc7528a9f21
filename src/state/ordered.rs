//! Ordered: a set in order that is cheap while it is small, as nearly every version's endpoints are.

use std::collections::BTreeSet;

/// From so many on a tree is cheaper than moving what lies behind.
const FEW: usize = 64;

/// Either all in `few`, or all in `many`.
pub(crate) struct Ordered<T> {
    few: Vec<T>,
    many: BTreeSet<T>,
}

impl<T> Default for Ordered<T> {
    fn default() -> Ordered<T> {
        Ordered { few: Vec::new(), many: BTreeSet::new() }
    }
}

impl<T: Copy + Ord> Ordered<T> {
    pub fn len(&self) -> usize {
        self.few.len() + self.many.len()
    }

    pub fn is_empty(&self) -> bool {
        self.few.is_empty() && self.many.is_empty()
    }

    /// From the least on.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.few.iter().chain(&self.many)
    }

    pub fn insert(&mut self, item: T) {
        if !self.many.is_empty() {
            self.many.insert(item);
            return;
        }
        if let Err(position) = self.few.binary_search(&item) {
            self.few.insert(position, item);
        }
        if self.few.len() >= FEW {
            self.many.extend(self.few.drain(..));
        }
    }

    /// Whether it was there.
    pub fn remove(&mut self, item: &T) -> bool {
        if !self.many.is_empty() {
            let found = self.many.remove(item);
            // Well below the bound, so that one that comes and goes does not move all of them each time.
            if self.many.len() <= FEW / 2 {
                self.few.extend(std::mem::take(&mut self.many));
            }
            return found;
        }
        let found = self.few.binary_search(item);
        if let Ok(position) = found {
            self.few.remove(position);
        }
        found.is_ok()
    }

    pub fn clear(&mut self) {
        self.few.clear();
        self.many.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::Ordered;

    proptest! {
        #[test]
        fn it_is_as_a_tree(steps in proptest::collection::vec((any::<bool>(), 0_u32..150), 0..600)) {
            let (mut ordered, mut tree) = (Ordered::default(), BTreeSet::new());
            for (inserts, item) in steps {
                // More come than go, until the middle of the range is full and a tree is made of them.
                if inserts || item % 3 == 0 {
                    ordered.insert(item);
                    tree.insert(item);
                } else {
                    prop_assert_eq!(ordered.remove(&item), tree.remove(&item));
                }
                prop_assert_eq!(ordered.len(), tree.len());
                prop_assert_eq!(ordered.is_empty(), tree.is_empty());
            }
            prop_assert!(ordered.iter().eq(&tree));
            for item in 0..150 {
                prop_assert_eq!(ordered.remove(&item), tree.remove(&item));
                prop_assert!(ordered.iter().eq(&tree));
            }
        }
    }
}
