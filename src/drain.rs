//! Drain: one signal that tells every listener and connection to finish.
