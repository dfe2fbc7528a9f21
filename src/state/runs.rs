//! Runs: a record for every piece of agent work, from its reservation to its end.
