//! Balance: pure placement: cohorts, rendezvous hashing, smooth weighted round robin.
