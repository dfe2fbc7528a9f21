//! Snapshot: everything that a reload replaces as a whole.
