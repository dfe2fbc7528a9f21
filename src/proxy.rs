//! Proxy: the way of a request, top to bottom.

pub mod edits;
pub mod forwarded;
pub mod problem;
pub mod route;
