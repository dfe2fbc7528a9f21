//! Services: what the next snapshot has of each, with its dispatcher, its endpoints and their checks; and how a service goes on
//! from what was kept of it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use sha2::{Digest, Sha256};
use tracing::info;

use crate::config::{self, Problem};
use crate::control::call::Way;
use crate::control::discovery::{Plan, Template};
use crate::control::health::{Check, OwnLoad, Probe};
use crate::control::reload::builder::Builder;
use crate::control::reload::tls::{CachedClientTls, finds_https, is_https, server_name};
use crate::control::reload::{hex, problem};
use crate::metrics::VersionMetrics;
use crate::net::cookie::Sealer;
use crate::snapshot::{Recognition, Service, Snapshot};
use crate::state::core::Restored;
use crate::state::dispatcher::{Dispatcher, ServiceSettings};
use crate::state::image::Place;
use crate::state::{self, TargetSettings};
use crate::store::{Kept, Store};

/// What [`Builder::service`] adds to, service by service.
#[derive(Default)]
pub(super) struct Services {
    pub(super) list: Vec<Arc<Service>>,
    pub(super) dispatchers: Vec<(Arc<Dispatcher>, ServiceSettings)>,
    pub(super) checks: Vec<Arc<Check>>,
    pub(super) plans: Vec<Plan>,
    pub(super) client_tls: Vec<CachedClientTls>,
    pub(super) version_metrics: HashMap<(String, String), Arc<VersionMetrics>>,
}

impl Builder {
    /// Adds a service to `services`, and what is wrong with it to `problems`. One that was there before keeps its dispatcher.
    pub(super) fn service(
        &self,
        index: usize,
        service: &config::Service,
        current: Option<&Snapshot>,
        removed: &[(String, Arc<Dispatcher>)],
        services: &mut Services,
        problems: &mut Vec<Problem>,
    ) {
        let old = current.and_then(|current| current.services.iter().find(|old| *old.name == *service.name));
        let name = old.map_or_else(|| Arc::from(service.name.as_str()), |old| Arc::clone(&old.name));
        let metrics = old.map_or_else(|| self.metrics.service(&service.name), |old| Arc::clone(&old.metrics));
        let dispatcher = match old {
            Some(old) => Arc::clone(&old.dispatcher),
            None => match removed.iter().find(|(removed, _)| *removed == service.name) {
                Some((_, dispatcher)) => Arc::clone(dispatcher),
                None => Dispatcher::new(&service.name, Arc::clone(&metrics)),
            },
        };
        let recognition = Recognition::of(service.agent_protocol);
        let cookie = service.session.cookie.as_ref().map(|cookie| self.sealer(&service.name, cookie));

        let mut targets = Vec::with_capacity(service.versions.len());
        for (version_index, version) in service.versions.iter().enumerate() {
            let path = format!("services[{index}].versions[{version_index}]");
            let version_name: Arc<str> = version.name.as_str().into();
            let metrics = self.version_metrics(&service.name, &version.name);
            services.version_metrics.insert((service.name.clone(), version.name.clone()), Arc::clone(&metrics));
            let mut of_version = Vec::with_capacity(version.endpoints.len());
            for (endpoint_index, endpoint) in version.endpoints.iter().enumerate() {
                let tls = match self.endpoint_tls(version, &endpoint.url, &mut services.client_tls) {
                    Ok(tls) => tls,
                    Err(failure) => {
                        problems.push(problem(&format!("{path}.{}", failure.key(endpoint_index)), failure.message()));
                        continue;
                    }
                };
                let own_load = OwnLoad::of(recognition);
                if service.health.path.is_some() || service.health.tcp || own_load.is_some() {
                    services.checks.push(Arc::new(Check {
                        service: Arc::clone(&name),
                        dispatcher: Arc::clone(&dispatcher),
                        identity: endpoint.url.identity(),
                        probe: Probe {
                            way: Way {
                                url: endpoint.url.clone(),
                                port: service.health.port,
                                http: version.http,
                                host: version.host.clone(),
                                set: version.headers.set.clone(),
                                tls: tls.clone(),
                            },
                            health: service.health.clone(),
                            own_load,
                        },
                    }));
                }
                of_version.push(TargetSettings {
                    service: Arc::clone(&name),
                    version: Arc::clone(&version_name),
                    url: endpoint.url.clone(),
                    uid: None,
                    http: version.http,
                    host: version.host.clone(),
                    headers: version.headers.clone(),
                    pool: service.pool.clone(),
                    tls,
                    metrics: Arc::clone(&metrics),
                });
            }
            if !version.sources.is_empty() {
                let tls = match self.tls_of_sources(version, &mut services.client_tls) {
                    Ok(tls) => tls,
                    Err(message) => {
                        problems.push(problem(&format!("{path}.tls"), message));
                        continue;
                    }
                };
                services.plans.extend(version.sources.iter().map(|source| Plan {
                    service: Arc::clone(&name),
                    dispatcher: Arc::clone(&dispatcher),
                    version: Arc::clone(&version_name),
                    source: source.clone(),
                    template: Template {
                        http: version.http,
                        host: version.host.clone(),
                        headers: version.headers.clone(),
                        pool: service.pool.clone(),
                        metrics: Arc::clone(&metrics),
                        https: finds_https(version),
                        tls: tls.clone(),
                        server_name: version.tls.server_name.as_ref().and_then(|name| server_name(name).ok()),
                        health: service.health.clone(),
                        own_load: OwnLoad::of(recognition),
                    },
                }));
            }
            targets.push(of_version);
        }
        let settings = ServiceSettings { config: service.clone(), targets, discovered: Vec::new() };
        services.dispatchers.push((Arc::clone(&dispatcher), settings));
        services.list.push(Arc::new(Service {
            name,
            config: service.clone(),
            dispatcher,
            metrics,
            cookie,
            recognition,
        }));
    }

    /// Lets a service of the first generation go on from what was kept of it.
    pub(super) fn go_on(
        &self,
        dispatcher: &Arc<Dispatcher>,
        settings: ServiceSettings,
        store: &Store,
        kept: &mut Kept,
        now: Instant,
    ) {
        let image = kept.take(&settings.config);
        store.keep(dispatcher, image.is_some());
        let Some(mut image) = image else { return dispatcher.apply(settings, now) };
        if let Some(rollout) = image.rollout.take() {
            dispatcher.restore_rollout(rollout, now);
        }
        let config = settings.config.clone();
        dispatcher.apply(settings, now);
        let restored = dispatcher.restore(image, &|place| self.unnamed_target(&config, place), now);
        let Restored { pins, dropped, runs } = restored;
        info!(service = config.name, pins, expired = dropped, runs, "goes on from the state that was kept");
    }

    /// How an endpoint is reached that the configuration no longer names: as its version's others, if that is still there.
    /// `None`: nobody can tell.
    pub(super) fn unnamed_target(&self, service: &config::Service, place: &Place) -> Option<TargetSettings> {
        let (url, uid) = state::of_identity(&place.endpoint)?;
        let version = service.versions.iter().find(|version| version.name == place.version);
        let tls = match version {
            Some(version) => self.endpoint_tls(version, &url, &mut Vec::new()).ok()?,
            // What its certificate is to be checked by is not known.
            None if is_https(&url) => return None,
            None => None,
        };
        Some(TargetSettings {
            service: service.name.as_str().into(),
            version: place.version.as_str().into(),
            url,
            uid: uid.map(Arc::from),
            http: version.map_or(config::HttpVersion::Auto, |version| version.http),
            host: version.map_or(config::HostPolicy::Preserve, |version| version.host.clone()),
            headers: version.map(|version| version.headers.clone()).unwrap_or_default(),
            pool: service.pool.clone(),
            tls,
            metrics: self.version_metrics(&service.name, &place.version),
        })
    }

    fn version_metrics(&self, service: &str, version: &str) -> Arc<VersionMetrics> {
        let key = (service.to_owned(), version.to_owned());
        self.version_metrics.get(&key).map_or_else(|| self.metrics.version(service, version), Arc::clone)
    }

    fn sealer(&self, service: &str, cookie: &config::SessionCookie) -> Sealer {
        if cookie.secrets.is_empty() {
            Sealer::new(service, &cookie.name, cookie.ttl, &[self.own_secret(service)])
        } else {
            Sealer::new(service, &cookie.name, cookie.ttl, &cookie.secrets)
        }
    }

    /// The secret of a service that names none: the same after every reload, another one for every service.
    fn own_secret(&self, service: &str) -> String {
        let mut secret = Sha256::new();
        secret.update(self.cookie_secret);
        secret.update(service.as_bytes());
        hex(&secret.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids;
    use crate::metrics::Metrics;
    use crate::net::inherit::Inherited;

    fn builder() -> Builder {
        Builder::new("longhaul.yaml".into(), Metrics::new(), ids::random_bytes(), Inherited::default())
    }

    #[test]
    fn own_cookie_secrets_stay_for_the_life_of_the_process() {
        let process = builder();
        assert_eq!(process.own_secret("support"), process.own_secret("support"));
        assert_ne!(process.own_secret("support"), process.own_secret("sales"));
        assert_ne!(process.own_secret("support"), builder().own_secret("support"));
    }
}
