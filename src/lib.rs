//! longhaul: an agent-aware load-balancing reverse proxy. A run is not a request.
//!
//! Start reading at [`proxy`]: it is the list of the steps that a request takes.

#![forbid(unsafe_code)]

pub mod admin;
pub mod app;
pub mod balance;
pub mod cli;
pub mod config;
pub mod control;
pub mod demo;
pub mod drain;
pub mod error;
pub mod estimate;
pub mod http1;
pub mod ids;
pub mod json;
#[cfg(feature = "kubernetes")]
pub mod kubernetes;
pub mod logging;
pub mod message;
pub mod metrics;
pub mod net;
pub mod orca;
pub mod per_thread;
pub mod protocols;
pub mod proxy;
pub mod pulse;
pub mod rollout;
pub mod run;
pub mod scaling;
pub mod snapshot;
pub mod sse;
pub mod state;
pub mod store;
pub mod websocket;
