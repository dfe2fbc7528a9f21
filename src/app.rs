//! App: builds every part from a config and runs them until the end.
