//! Builder: makes the next generation from a configuration, with everything that can fail, and touches nothing that runs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::{Address, Loaded, Problem, Problems};
use crate::control::discovery::Plan;
use crate::control::health::Check;
use crate::control::reload::services::Services;
use crate::control::reload::sides::{BoundSide, SideCommand};
use crate::control::reload::tls::CachedClientTls;
use crate::ids;
use crate::metrics::{Metrics, VersionMetrics};
use crate::net::inherit::Inherited;
use crate::net::listen::Socket;
use crate::snapshot::Snapshot;
use crate::state::dispatcher::{Dispatcher, ServiceSettings};

/// Builds snapshots, and keeps what must stay the same thing from one to the next.
pub(super) struct Builder {
    pub(super) file: Arc<str>,
    pub(super) metrics: Arc<Metrics>,
    /// The secret behind the cookies of services that name none: no reload and no handover changes it, and with
    /// `state: {file: ..}` no restart.
    pub(super) cookie_secret: [u8; 32],
    pub(super) client_tls: Vec<CachedClientTls>,
    /// By service and version.
    pub(super) version_metrics: HashMap<(String, String), Arc<VersionMetrics>>,
    pub(super) sides: Vec<BoundSide>,
    /// Sockets that were open already when the process began.
    inherited: Mutex<Inherited>,
}

/// A next generation that can take effect without failing.
pub(super) struct Prepared {
    pub(super) snapshot: Snapshot,
    /// In the order of the services.
    pub(super) dispatchers: Vec<(Arc<Dispatcher>, ServiceSettings)>,
    /// Of the endpoints that are listed.
    pub(super) checks: Vec<Arc<Check>>,
    pub(super) plans: Vec<Plan>,
    pub(super) announcements: Announcements,
    pub(super) client_tls: Vec<CachedClientTls>,
    pub(super) version_metrics: HashMap<(String, String), Arc<VersionMetrics>>,
    pub(super) sides_bound: Vec<BoundSide>,
}

/// What the accept loop and the servers beside are to hear once the generation is in effect.
#[derive(Default)]
pub(super) struct Announcements {
    pub(super) starts: Vec<(Address, Socket)>,
    pub(super) stops: Vec<Address>,
    pub(super) sides: Vec<SideCommand>,
}

impl Builder {
    pub(super) fn new(file: Arc<str>, metrics: Arc<Metrics>, cookie_secret: [u8; 32], inherited: Inherited) -> Builder {
        Builder {
            file,
            metrics,
            cookie_secret,
            client_tls: Vec::new(),
            version_metrics: HashMap::new(),
            sides: Vec::new(),
            inherited: Mutex::new(inherited),
        }
    }

    /// Whether `loaded` would change nothing, the content of upstream certificates included.
    pub(super) fn means_the_same(&self, current: &Snapshot, loaded: &Loaded) -> bool {
        let mut versions = loaded.config.services.iter().flat_map(|service| &service.versions);
        current.loaded.config == loaded.config && versions.all(|version| self.client_tls_is_kept(version))
    }

    /// Builds the generation after `current`. Sockets that it binds are closed again when it fails.
    pub(super) fn prepare(
        &self,
        loaded: Loaded,
        current: Option<&Snapshot>,
        removed: &[(String, Arc<Dispatcher>)],
    ) -> Result<Prepared, Problems> {
        let mut problems = Vec::new();
        let mut services = Services::default();
        for (index, service) in loaded.config.services.iter().enumerate() {
            self.service(index, service, current, removed, &mut services, &mut problems);
        }
        let (listeners, mut announcements) = self.listeners(&loaded.config, current, &mut problems);
        let sides_bound = self.bind_sides(&loaded.config, &mut announcements, &mut problems);
        self.all_well(problems)?;

        let generation = current.map_or(1, |current| current.generation + 1);
        let loaded_at = ids::wall_clock();
        let Services { list, dispatchers, checks, plans, client_tls, version_metrics } = services;
        let snapshot = Snapshot { generation, loaded, loaded_at, listeners, services: list };
        Ok(Prepared { snapshot, dispatchers, checks, plans, announcements, client_tls, version_metrics, sides_bound })
    }

    pub(super) fn inherited(&self) -> MutexGuard<'_, Inherited> {
        self.inherited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn all_well(&self, list: Vec<Problem>) -> Result<(), Problems> {
        if list.is_empty() { Ok(()) } else { Err(Problems { file: self.file.to_string(), list }) }
    }
}
