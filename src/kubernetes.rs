//! Kubernetes: the way to a cluster's API server, for whoever watches there or writes to it.

pub mod answer;
pub mod client;
