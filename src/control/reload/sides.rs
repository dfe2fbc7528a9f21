//! Sides: the servers beside the listeners and the admin API, which a reload may start, move or stop.

use std::net::SocketAddr;

use crate::config::{self, Address, Problem};
use crate::control::reload::builder::{Announcements, Builder};
use crate::control::reload::problem;
use crate::net::listen::{self, Socket};

/// Commands that the servers beside may be behind.
pub(super) const SIDE_COMMANDS_MAX: usize = Side::ALL.len();

/// A server beside the listeners and the admin API, which a reload may start, move or stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Probes,
    ExternalMetrics,
    Keda,
}

impl Side {
    pub(super) const ALL: [Side; 3] = [Side::Probes, Side::ExternalMetrics, Side::Keda];

    /// The key of the configuration that has its address.
    pub fn key(self) -> &'static str {
        match self {
            Side::Probes => "admin.probes",
            Side::ExternalMetrics => "kubernetes.external_metrics",
            Side::Keda => "kubernetes.keda",
        }
    }

    pub(super) fn configured(self, config: &config::Config) -> Option<SocketAddr> {
        match self {
            Side::Probes => config.admin.probes,
            Side::ExternalMetrics => config.kubernetes.external_metrics.as_ref().map(|metrics| metrics.address),
            Side::Keda => config.kubernetes.keda.as_ref().map(|keda| keda.address),
        }
    }
}

/// What such a server has to do after a reload.
pub struct SideCommand {
    pub side: Side,
    /// Serve on this socket, and no longer on the one before; `None`: stop.
    pub socket: Option<Socket>,
}

/// Where such a server listens.
#[derive(Clone)]
pub(super) struct BoundSide {
    pub(super) side: Side,
    pub(super) configured: SocketAddr,
    pub(super) local: Address,
}

impl Builder {
    /// The servers beside as the configuration wants them.
    pub(super) fn bind_sides(
        &self,
        config: &config::Config,
        announcements: &mut Announcements,
        problems: &mut Vec<Problem>,
    ) -> Vec<BoundSide> {
        let mut sides = Vec::new();
        for side in Side::ALL {
            let known = self.sides.iter().find(|bound| bound.side == side);
            let Some(configured) = side.configured(config) else {
                if known.is_some() {
                    announcements.sides.push(SideCommand { side, socket: None });
                }
                continue;
            };
            if let Some(bound) = known.filter(|bound| bound.configured == configured) {
                sides.push(bound.clone());
                continue;
            }
            match self.take_or_bind(&Address::Tcp(configured), side.key(), listen::bind) {
                Ok((local, socket)) => {
                    announcements.sides.push(SideCommand { side, socket: Some(socket) });
                    sides.push(BoundSide { side, configured, local });
                }
                Err(message) => problems.push(problem(&format!("{}.address", side.key()), message)),
            }
        }
        sides
    }
}
