//! Load: what one replica, or all of them together, has to do: the document that replicas exchange and autoscalers read.
//!
//! It is plain data. Adding two of them up is exact for runs, since each run is at one replica; capacities add up too,
//! because each replica places up to its own limits.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::{Deserialize, Serialize};

use crate::scaling::selector::Selector;
use crate::state::status::ServiceStatus;

/// `GET /api/v1/metrics`. Unknown members are ignored, so that replicas of two releases understand each other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Names the process: one that is found under two addresses counts once.
    #[serde(default)]
    pub instance: String,
    /// Stands for which services and versions have anything to do; for the replica that made it, to tell whether that has
    /// changed.
    #[serde(default)]
    pub activity: String,
    pub services: BTreeMap<String, ServiceLoad>,
    /// By service and version.
    #[serde(default)]
    pub versions: BTreeMap<String, BTreeMap<String, VersionLoad>>,
    /// By `host:port`, where it was asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub endpoints: BTreeMap<String, EndpointLoad>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServiceLoad {
    pub outstanding_runs: u64,
    pub queued_runs: u64,
    /// `None`: unlimited.
    pub capacity: Option<u64>,
    /// Outstanding on endpoints that don't drain, and queued.
    pub demand: u64,
    /// Queued and not pinned.
    pub placeable_demand: u64,
    /// `demand / capacity`.
    pub saturation: Option<f64>,
}

/// Parts of waiters that wait for no version in particular count for each by its weight.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VersionLoad {
    pub outstanding_runs: u64,
    /// Of those: on endpoints that drain.
    pub draining_runs: u64,
    pub queued_runs: f64,
    pub capacity: Option<u64>,
    pub placeable_demand: f64,
}

/// What would be lost with an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointLoad {
    pub outstanding_runs: u64,
    pub sessions: u64,
}

/// The numbers that an autoscaler may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    Demand,
    OutstandingRuns,
    QueuedRuns,
    PlaceableDemand,
    Saturation,
}

impl Metric {
    pub const ALL: [Metric; 5] =
        [Metric::Demand, Metric::OutstandingRuns, Metric::QueuedRuns, Metric::PlaceableDemand, Metric::Saturation];

    /// Its name among the metrics.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Demand => "longhaul_run_demand",
            Metric::OutstandingRuns => "longhaul_outstanding_runs",
            Metric::QueuedRuns => "longhaul_queued_runs",
            Metric::PlaceableDemand => "longhaul_placeable_demand",
            Metric::Saturation => "longhaul_saturation",
        }
    }

    /// As KEDA's `scalerMetadata` may name it: in full, or without the prefix; `demand` is run_demand.
    pub fn of_name(name: &str) -> Option<Metric> {
        let short = name.strip_prefix("longhaul_").unwrap_or(name);
        if short == "demand" {
            return Some(Metric::Demand);
        }
        Metric::ALL.into_iter().find(|metric| metric.name().strip_prefix("longhaul_") == Some(short))
    }
}

/// A number with the labels that it has.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample<'l> {
    pub service: &'l str,
    pub version: Option<&'l str>,
    pub value: f64,
}

impl Load {
    /// Of the services of one process.
    pub fn of(instance: &str, services: &[ServiceStatus], with_endpoints: bool) -> Load {
        let mut load = Load { instance: instance.to_owned(), ..Load::default() };
        for service in services {
            let of_service = ServiceLoad {
                outstanding_runs: service.outstanding_runs,
                queued_runs: service.queue.length,
                capacity: service.capacity,
                demand: service.demand,
                placeable_demand: service.placeable_demand,
                saturation: service.saturation,
            };
            load.services.insert(service.name.clone(), of_service);
            let versions = service.versions.iter().map(|version| {
                let of_version = VersionLoad {
                    outstanding_runs: version.outstanding_runs,
                    draining_runs: version.demand.draining_runs,
                    queued_runs: version.demand.queued,
                    capacity: version.capacity,
                    placeable_demand: version.demand.placeable,
                };
                (version.name.clone(), of_version)
            });
            load.versions.insert(service.name.clone(), versions.collect());
            let endpoints = service.versions.iter().flat_map(|version| &version.endpoints);
            for endpoint in endpoints.filter(|_| with_endpoints) {
                load.endpoints.entry(endpoint.address.clone()).or_default().add(EndpointLoad {
                    outstanding_runs: u64::from(endpoint.outstanding_runs),
                    sessions: u64::from(endpoint.sessions),
                });
            }
        }
        load.activity = load.activity();
        load
    }

    fn activity(&self) -> String {
        let mut hash = DefaultHasher::new();
        for (service, versions) in &self.versions {
            (service, self.is_active(service, None)).hash(&mut hash);
            versions.keys().for_each(|version| (version, self.is_active(service, Some(version))).hash(&mut hash));
        }
        format!("{:016x}", hash.finish())
    }

    /// Adds what another replica has to do.
    pub fn add(&mut self, other: &Load) {
        for (name, theirs) in &other.services {
            match self.services.get_mut(name) {
                Some(ours) => ours.add(theirs),
                None => {
                    self.services.insert(name.clone(), theirs.clone());
                }
            }
        }
        for (service, theirs) in &other.versions {
            let ours = self.versions.entry(service.clone()).or_default();
            for (name, theirs) in theirs {
                match ours.get_mut(name) {
                    Some(ours) => ours.add(theirs),
                    None => {
                        ours.insert(name.clone(), theirs.clone());
                    }
                }
            }
        }
        for (address, theirs) in &other.endpoints {
            self.endpoints.entry(address.clone()).or_default().add(*theirs);
        }
    }

    /// The numbers of a metric whose labels `selector` accepts: one for each service, or one for each version where the
    /// selector speaks of versions.
    pub fn samples(&self, metric: Metric, selector: &Selector) -> Vec<Sample<'_>> {
        let mut samples = Vec::new();
        let accepted = |service: &str, version: Option<&str>| {
            selector.accepts(|label| match label {
                "service" => Some(service),
                "version" => version,
                _ => None,
            })
        };
        if selector.speaks_of("version") {
            for (service, versions) in &self.versions {
                for (version, load) in versions {
                    let value = load.value(metric).filter(|_| accepted(service, Some(version)));
                    samples.extend(value.map(|value| Sample { service, version: Some(version), value }));
                }
            }
            return samples;
        }
        for (service, load) in &self.services {
            let value = self.service_value(service, load, metric).filter(|_| accepted(service, None));
            samples.extend(value.map(|value| Sample { service, version: None, value }));
        }
        samples
    }

    /// The number of one service, or of one version of it. The error says what there is.
    pub fn value(&self, metric: Metric, service: &str, version: Option<&str>) -> Result<f64, String> {
        let Some(load) = self.services.get(service) else {
            return Err(format!("there is no service {service}; there are: {}", names(self.services.keys())));
        };
        let value = match version {
            None => self.service_value(service, load, metric),
            Some(version) => {
                let versions = self.versions.get(service);
                let Some(load) = versions.and_then(|versions| versions.get(version)) else {
                    let known = names(versions.into_iter().flat_map(BTreeMap::keys));
                    return Err(format!("{service} has no version {version}; it has: {known}"));
                };
                load.value(metric)
            }
        };
        value.ok_or_else(|| format!("{service} has no limit of runs, so it has no {}", metric.name()))
    }

    /// Something is outstanding or waits, on endpoints that drain too: whoever is scaled to zero would cut it.
    pub fn is_active(&self, service: &str, version: Option<&str>) -> bool {
        match version {
            None => self.services.get(service).is_some_and(|load| load.outstanding_runs > 0 || load.queued_runs > 0),
            Some(version) => {
                let load = self.versions.get(service).and_then(|versions| versions.get(version));
                load.is_some_and(|load| load.outstanding_runs > 0 || load.queued_runs > 0.0)
            }
        }
    }

    fn service_value(&self, name: &str, load: &ServiceLoad, metric: Metric) -> Option<f64> {
        match metric {
            Metric::Demand => Some(load.demand as f64),
            Metric::OutstandingRuns => {
                let versions = self.versions.get(name).into_iter().flat_map(BTreeMap::values);
                let draining = versions.map(|version| version.draining_runs).fold(0, u64::saturating_add);
                Some(load.outstanding_runs.saturating_sub(draining) as f64)
            }
            Metric::QueuedRuns => Some(load.queued_runs as f64),
            Metric::PlaceableDemand => Some(load.placeable_demand as f64),
            Metric::Saturation => saturation(load.demand as f64, load.capacity),
        }
    }
}

impl ServiceLoad {
    fn add(&mut self, other: &ServiceLoad) {
        // What another process says may be anything: it must neither end this one nor come round to a small number.
        self.outstanding_runs = self.outstanding_runs.saturating_add(other.outstanding_runs);
        self.queued_runs = self.queued_runs.saturating_add(other.queued_runs);
        self.capacity = both(self.capacity, other.capacity);
        self.demand = self.demand.saturating_add(other.demand);
        self.placeable_demand = self.placeable_demand.saturating_add(other.placeable_demand);
        self.saturation = saturation(self.demand as f64, self.capacity);
    }
}

impl VersionLoad {
    fn add(&mut self, other: &VersionLoad) {
        self.outstanding_runs = self.outstanding_runs.saturating_add(other.outstanding_runs);
        self.draining_runs = self.draining_runs.saturating_add(other.draining_runs);
        self.queued_runs += other.queued_runs;
        self.capacity = both(self.capacity, other.capacity);
        self.placeable_demand += other.placeable_demand;
    }

    fn value(&self, metric: Metric) -> Option<f64> {
        let staying = self.outstanding_runs.saturating_sub(self.draining_runs) as f64;
        match metric {
            Metric::Demand => Some(staying + self.queued_runs),
            Metric::OutstandingRuns => Some(staying),
            Metric::QueuedRuns => Some(self.queued_runs),
            Metric::PlaceableDemand => Some(self.placeable_demand),
            Metric::Saturation => saturation(staying + self.queued_runs, self.capacity),
        }
    }
}

impl EndpointLoad {
    pub fn add(&mut self, other: EndpointLoad) {
        self.outstanding_runs = self.outstanding_runs.saturating_add(other.outstanding_runs);
        self.sessions = self.sessions.saturating_add(other.sessions);
    }
}

/// Unlimited where one of them is.
fn both(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    Some(one?.saturating_add(other?))
}

/// 1 where there is work and nothing that could do it.
fn saturation(demand: f64, capacity: Option<u64>) -> Option<f64> {
    Some(match capacity? {
        _ if demand == 0.0 => 0.0,
        0 => 1.0,
        capacity => demand / capacity as f64,
    })
}

/// How many names an error lists of those that would be right.
const NAMES_MAX: usize = 20;

fn names<'n>(known: impl Iterator<Item = &'n String>) -> String {
    known.take(NAMES_MAX).map(String::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn load(runs: u64, draining: u64, queued: u64, capacity: Option<u64>) -> Load {
        let demand = runs - draining + queued;
        let service = ServiceLoad {
            outstanding_runs: runs,
            queued_runs: queued,
            capacity,
            demand,
            placeable_demand: queued,
            saturation: saturation(demand as f64, capacity),
        };
        let version = VersionLoad {
            outstanding_runs: runs,
            draining_runs: draining,
            queued_runs: queued as f64,
            capacity,
            placeable_demand: queued as f64,
        };
        Load {
            services: BTreeMap::from([("support".to_owned(), service)]),
            versions: BTreeMap::from([("support".to_owned(), BTreeMap::from([("stable".to_owned(), version)]))]),
            ..Load::default()
        }
    }

    #[test]
    fn names_of_metrics() {
        for metric in Metric::ALL {
            assert_eq!(Metric::of_name(metric.name()), Some(metric));
        }
        assert_eq!(Metric::of_name("demand"), Some(Metric::Demand));
        assert_eq!(Metric::of_name("queued_runs"), Some(Metric::QueuedRuns));
        assert_eq!(Metric::of_name("cpu"), None);
    }

    #[test]
    fn replicas_add_up() {
        let mut sum = load(3, 1, 2, Some(4));
        sum.add(&load(5, 0, 0, Some(4)));
        assert_eq!(sum.value(Metric::Demand, "support", None), Ok(9.0));
        assert_eq!(sum.value(Metric::OutstandingRuns, "support", None), Ok(7.0), "draining ones left out");
        assert_eq!(sum.value(Metric::Saturation, "support", None), Ok(1.125));
        assert_eq!(sum.services["support"].saturation, Some(1.125));
        sum.add(&load(0, 0, 0, None));
        assert!(sum.value(Metric::Saturation, "support", None).is_err(), "unlimited at one of them");
        assert!(sum.value(Metric::Demand, "other", None).unwrap_err().contains("there are: support"));
        assert!(sum.value(Metric::Demand, "support", Some("x")).unwrap_err().contains("it has: stable"));
    }

    #[test]
    fn runs_on_endpoints_that_drain_keep_it_from_zero() {
        let draining = load(1, 1, 0, Some(4));
        assert_eq!(draining.value(Metric::Demand, "support", Some("stable")), Ok(0.0));
        assert!(draining.is_active("support", None) && draining.is_active("support", Some("stable")));
        let idle = load(0, 0, 0, Some(4));
        assert!(!idle.is_active("support", None) && !idle.is_active("support", Some("stable")));
        assert!(!idle.is_active("other", None));
    }

    #[test]
    fn the_selector_decides_on_services_or_versions() {
        let load = load(3, 0, 0, None);
        let of = |selector: &str| load.samples(Metric::Demand, &selector.parse().unwrap());
        assert_eq!(of(""), [Sample { service: "support", version: None, value: 3.0 }]);
        assert_eq!(of("service=support,!version").len(), 1);
        assert_eq!(of("service=support,version=stable")[0].version, Some("stable"));
        assert_eq!(of("service!=support"), []);
        assert_eq!(of("service=support,pool=a"), []);
    }

    proptest! {
        /// Whatever they are, the sum is the sum, in any order, and survives the wire.
        #[test]
        fn adding_is_a_sum(parts in prop::collection::vec((0u64..50, 0u64..50, 0u64..50, prop::option::of(0u64..50)), 1..6)) {
            let loads: Vec<Load> =
                parts.iter().map(|(runs, draining, queued, capacity)| load(*runs, *draining.min(runs), *queued, *capacity)).collect();
            let sum_of = |loads: &mut dyn Iterator<Item = &Load>| {
                let mut sum = Load::default();
                loads.for_each(|load| sum.add(load));
                sum
            };
            let sum = sum_of(&mut loads.iter());
            prop_assert_eq!(&sum, &sum_of(&mut loads.iter().rev()));
            let runs: u64 = parts.iter().map(|part| part.0).sum();
            prop_assert_eq!(sum.services["support"].outstanding_runs, runs);
            prop_assert_eq!(sum.is_active("support", None), parts.iter().any(|part| part.0 + part.2 > 0));
            let text = serde_json::to_string(&sum).unwrap();
            let mut read: Load = serde_json::from_str(&text).unwrap();
            // The last digit of a fraction may be lost; nobody reads this one, because it is made anew.
            read.services.get_mut("support").unwrap().saturation = sum.services["support"].saturation;
            prop_assert_eq!(read, sum);
        }
    }
}
