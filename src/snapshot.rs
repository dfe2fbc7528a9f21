//! Snapshot: everything that a reload replaces as a whole. Built by control, read by the data plane, never changed.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::SystemTime;

use arc_swap::ArcSwap;

use crate::config;
use crate::drain::Drain;
use crate::logging::AccessLog;
use crate::metrics::{ListenerMetrics, Metrics, RouteMetrics, ServiceMetrics};
use crate::net::cookie::Sealer;
use crate::net::listen::Socket;
use crate::net::tls::ServerTls;
use crate::per_thread::OpenCount;
use crate::protocols::{self, Protocol};
use crate::pulse::Pulses;
use crate::state::dispatcher::Dispatcher;

/// One generation of the configuration, with what was built from it.
pub struct Snapshot {
    /// Counts the configurations that took effect; the first is 1.
    pub generation: u64,
    pub loaded: config::Loaded,
    pub loaded_at: SystemTime,
    /// In the order of `loaded.config.listeners`.
    pub listeners: Vec<Arc<Listener>>,
    /// In the order of `loaded.config.services`, to which [`config::RouteAction::Service`] points.
    pub services: Vec<Arc<Service>>,
}

impl Snapshot {
    /// The listener bound to `local_address`, unless a reload removed it.
    pub fn listener(&self, local_address: &config::Address) -> Option<Arc<Listener>> {
        self.listeners.iter().find(|listener| listener.local_address == *local_address).cloned()
    }
}

pub struct Listener {
    pub config: config::Listener,
    /// The address really bound (the port is never 0).
    pub local_address: config::Address,
    pub tls: Option<Arc<ServerTls>>,
    pub metrics: Arc<ListenerMetrics>,
    /// In the order of the configuration's routes.
    pub routes: Vec<Arc<RouteMetrics>>,
    /// For what no route matched: label `none`.
    pub no_route: Arc<RouteMetrics>,
}

pub struct Service {
    pub name: Arc<str>,
    pub config: config::Service,
    pub dispatcher: Arc<Dispatcher>,
    pub metrics: Arc<ServiceMetrics>,
    pub cookie: Option<Sealer>,
    pub recognition: Recognition,
}

/// Who says what an exchange of a service is.
#[derive(Clone, Copy)]
pub enum Recognition {
    /// `runs.match` and the places of `session.key` alone.
    Http,
    /// Each exchange shows its protocol.
    Auto,
    One(&'static dyn Protocol),
}

impl Recognition {
    pub fn of(configured: config::AgentProtocol) -> Recognition {
        match configured {
            config::AgentProtocol::Http => Recognition::Http,
            config::AgentProtocol::Auto => Recognition::Auto,
            config::AgentProtocol::Named(name) => protocols::by_name(name).map_or(Recognition::Http, Recognition::One),
        }
    }
}

/// What every part of a running proxy shares.
pub struct Running {
    pub snapshot: ArcSwap<Snapshot>,
    pub metrics: Arc<Metrics>,
    pub drain: Drain,
    /// Exchanges between their first and last byte, upgrades included.
    pub open_exchanges: OpenCount,
    /// Those that were cut because the proxy's own drain took as long as it may.
    pub cut_exchanges: AtomicUsize,
    pub access_log: AccessLog,
    /// Keys the digests of `session.scope` values: the process before's, what `state.file` keeps, or a random one.
    pub scope_secret: [u8; 16],
    /// Of the threads that must turn.
    pub pulses: Pulses,
}

/// Told by control to whoever accepts connections.
pub enum AcceptCommand {
    /// Accept on this socket, as the listener of the newest snapshot whose `local_address` this is.
    Start { local_address: config::Address, socket: Socket },
    /// Stop accepting; open connections finish.
    Stop { local_address: config::Address },
}
