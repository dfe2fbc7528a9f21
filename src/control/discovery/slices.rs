//! Slices: what the EndpointSlices of a service say together of its pods. Pure: slices in, changes of endpoints out.
//!
//! A pod is one endpoint, however many slices and families of addresses it stands in: its identity has its UID, and of its
//! addresses it keeps the first that it is known by while that is listed. Terminating and serving is draining; terminating
//! and not serving is gone. An address that belongs to another pod by now is no longer that of the one that terminates.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::config::{EndpointHost, PodPort};
use crate::control::discovery::{Found, Update};
use crate::state::discovery::Readiness;

/// Pods of one source; more are left out.
const PODS_MAX: usize = 10_000;
/// Slices that can't be read, of which is kept why.
const UNREADABLE_MAX: usize = 64;
/// Of that, in characters: it may quote what was read.
const REASON_LENGTH_MAX: usize = 200;

/// `discovery.k8s.io/v1`: what of it is looked at.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    pub metadata: Metadata,
    pub address_type: Option<String>,
    pub endpoints: Option<Vec<Endpoint>>,
    pub ports: Option<Vec<Port>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    #[serde(default)]
    pub name: String,
    pub resource_version: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// They are interchangeable: the first is used.
    #[serde(default)]
    pub addresses: Vec<String>,
    pub conditions: Option<Conditions>,
    pub target_ref: Option<TargetRef>,
    pub zone: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Conditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct TargetRef {
    pub kind: Option<String>,
    pub name: Option<String>,
    pub uid: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    pub name: Option<String>,
    pub port: Option<u16>,
    pub protocol: Option<String>,
    pub app_protocol: Option<String>,
}

/// A slice as the API server sends it.
pub enum Sent {
    Slice(EndpointSlice),
    Unreadable { name: String, why: String },
}

impl Sent {
    pub fn read(text: &RawValue) -> Sent {
        match serde_json::from_str(text.get()) {
            Ok(slice) => Sent::Slice(slice),
            Err(failure) => {
                let why = failure.to_string().chars().take(REASON_LENGTH_MAX).collect();
                Sent::Unreadable { name: Named::of(text).name, why }
            }
        }
    }
}

/// What can be told of an object though the rest of it may be anything.
#[derive(Default)]
pub struct Named {
    /// Empty where it has none.
    pub name: String,
    pub version: Option<String>,
}

impl Named {
    pub fn of(text: &RawValue) -> Named {
        #[derive(Deserialize)]
        struct Object<'o> {
            #[serde(borrow)]
            metadata: &'o RawValue,
        }
        let metadata = serde_json::from_str(text.get()).map(|Object { metadata }| metadata.get()).unwrap_or_default();
        let metadata: Metadata = serde_json::from_str(metadata).unwrap_or_default();
        Named { name: metadata.name, version: metadata.resource_version }
    }
}

/// What one slice says of one endpoint. The better, the less: of two slices the better is believed, and whoever does not
/// terminate is better than who does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    Ready,
    NotReady,
    Draining,
    Gone,
}

impl Standing {
    /// `ready` is true for all where the service publishes addresses that are not ready, so terminating is looked at first.
    fn of(conditions: Conditions) -> Standing {
        let ready = conditions.ready.unwrap_or(true);
        let serving = conditions.serving.unwrap_or(ready);
        match (conditions.terminating.unwrap_or(false), serving, ready) {
            (true, true, _) => Standing::Draining,
            (true, false, _) => Standing::Gone,
            (false, _, true) => Standing::Ready,
            (false, _, false) => Standing::NotReady,
        }
    }

    fn terminates(self) -> bool {
        self >= Standing::Draining
    }
}

/// A pod's UID, or the address of what is none.
type PodId = Arc<str>;

/// An address of a pod.
type At = (EndpointHost, u16);

#[derive(Clone, Debug, PartialEq)]
struct Listed {
    standing: Standing,
    /// As far as the slice says; its readiness is not used.
    found: Found,
}

impl Listed {
    fn at(&self) -> At {
        (self.found.host.clone(), self.found.port)
    }

    fn is_at(&self, at: &At) -> bool {
        self.found.host == at.0 && self.found.port == at.1
    }
}

/// The slices of one service.
pub struct Slices {
    port: PodPort,
    /// The service's name within the cluster.
    name: Arc<str>,
    slices: HashMap<Box<str>, HashMap<PodId, Listed>>,
    /// Whom slices list at an address: nobody else, so that it is no larger than they are.
    by_address: HashMap<At, Vec<PodId>>,
    /// Pods of which something may have changed.
    touched: HashSet<PodId>,
    told: HashMap<PodId, Found>,
    /// By slice: why its endpoints can't be used.
    portless: HashMap<Box<str>, String>,
    /// By slice: why it can't be read. What it said before that counts.
    unreadable: BTreeMap<Box<str>, String>,
}

impl Slices {
    pub fn new(port: PodPort, name: Arc<str>) -> Slices {
        Slices {
            port,
            name,
            slices: HashMap::new(),
            by_address: HashMap::new(),
            touched: HashSet::new(),
            told: HashMap::new(),
            portless: HashMap::new(),
            unreadable: BTreeMap::new(),
        }
    }

    /// Takes all slices that there are.
    pub fn replace(&mut self, all: Vec<Sent>) {
        let mut gone: HashSet<Box<str>> = self.slices.keys().cloned().collect();
        self.unreadable.clear();
        for sent in all {
            let (Sent::Slice(EndpointSlice { metadata: Metadata { name, .. }, .. }) | Sent::Unreadable { name, .. }) =
                &sent;
            gone.remove(name.as_str());
            self.take(sent);
        }
        for name in gone {
            self.remove(&name);
        }
    }

    /// Takes a slice that is new or has changed.
    pub fn take(&mut self, sent: Sent) {
        match sent {
            Sent::Slice(slice) => self.put(slice),
            Sent::Unreadable { name, why } => {
                if self.unreadable.len() < UNREADABLE_MAX || self.unreadable.contains_key(name.as_str()) {
                    self.unreadable.insert(name.into(), why);
                }
            }
        }
    }

    fn put(&mut self, slice: EndpointSlice) {
        let name: Box<str> = slice.metadata.name.as_str().into();
        self.unreadable.remove(&name);
        let next = self.read(slice, &name);
        let mut old = self.slices.remove(&name).unwrap_or_default();
        for (pod, listed) in &next {
            if old.get(pod) == Some(listed) {
                continue;
            }
            self.touched.insert(Arc::clone(pod));
            let there = self.by_address.entry(listed.at()).or_default();
            if !there.contains(pod) {
                there.push(Arc::clone(pod));
            }
        }
        old.retain(|pod, listed| next.get(pod) != Some(listed));
        self.slices.insert(name, next);
        self.unlist(old);
    }

    pub fn remove(&mut self, name: &str) {
        if let Some(old) = self.slices.remove(name) {
            self.unlist(old);
        }
        self.portless.remove(name);
        self.unreadable.remove(name);
    }

    /// A slice no longer says this, though it or another may still list the same pods.
    fn unlist(&mut self, old: HashMap<PodId, Listed>) {
        for (pod, listed) in old {
            let at = listed.at();
            let mut listed = self.slices.values().filter_map(|slice| slice.get(&pod));
            if !listed.any(|listed| listed.is_at(&at))
                && let Some(there) = self.by_address.get_mut(&at)
            {
                there.retain(|other| *other != pod);
                // The address may be theirs again.
                self.touched.extend(there.iter().cloned());
                if there.is_empty() {
                    self.by_address.remove(&at);
                }
            }
            self.touched.insert(pod);
        }
    }

    fn read(&mut self, slice: EndpointSlice, name: &str) -> HashMap<PodId, Listed> {
        let endpoints = slice.endpoints.unwrap_or_default();
        let ports = slice.ports.unwrap_or_default();
        let is_tcp = |port: &&Port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        let (port, of_service) = match &self.port {
            PodPort::Name(wanted) => {
                let found = ports.iter().filter(is_tcp).find(|port| port.name.as_deref().unwrap_or("") == wanted);
                (found.and_then(|port| port.port), found)
            }
            PodPort::Number(number) => {
                (Some(*number), ports.iter().filter(is_tcp).find(|port| port.port == Some(*number)))
            }
        };
        self.portless.remove(name);
        let Some(port) = port else {
            if !endpoints.is_empty() {
                self.portless.insert(name.into(), no_port(&self.port, &ports));
            }
            return HashMap::new();
        };
        let https = of_service.is_some_and(|port| port.app_protocol.as_deref() == Some("https"));
        let is_name = slice.address_type.as_deref() == Some("FQDN");
        let listed = endpoints.into_iter().filter_map(|endpoint| {
            let address = endpoint.addresses.into_iter().next()?;
            let host = if is_name { EndpointHost::Name(address) } else { EndpointHost::Ip(address.parse().ok()?) };
            let pod = endpoint.target_ref.filter(|target| target.kind.as_deref() == Some("Pod")).unwrap_or_default();
            let found = Found {
                host,
                port,
                https,
                name: Arc::clone(&self.name),
                uid: pod.uid.filter(|uid| !uid.is_empty()).map(Arc::from),
                pod: pod.name.map(Arc::from),
                zone: endpoint.zone.map(Arc::from),
                readiness: Readiness::Ready,
                weight: 1,
            };
            let id = found.uid.clone().unwrap_or_else(|| found.key().0.into());
            Some((id, Listed { standing: Standing::of(endpoint.conditions.unwrap_or_default()), found }))
        });
        let mut all: HashMap<PodId, Listed> = HashMap::new();
        for (id, listed) in listed {
            // Twice in one slice is as once in each of two.
            match all.get(&id) {
                Some(known) if known.standing <= listed.standing => {}
                _ => {
                    all.insert(id, listed);
                }
            }
        }
        all
    }

    /// What has changed since the last time.
    pub fn take_update(&mut self) -> Update {
        let touched = self.with_neighbours();
        let mut update = Update { lost: true, problem: self.problem(), ..Update::default() };
        for pod in touched {
            let now = self.stands(&pod).filter(|_| self.told.contains_key(&pod) || self.told.len() < PODS_MAX);
            let before = self.told.get(&pod);
            if before == now.as_ref() {
                continue;
            }
            if let Some(before) = before
                && now.as_ref().is_none_or(|now| now.key() != before.key())
            {
                update.removed.push(before.key());
            }
            match now {
                Some(now) => {
                    update.put.push(now.clone());
                    self.told.insert(pod, now);
                }
                None => {
                    self.told.remove(&pod);
                }
            }
        }
        update
    }

    /// Those who were touched, and who shares an address with them.
    fn with_neighbours(&mut self) -> HashSet<PodId> {
        let mut all = std::mem::take(&mut self.touched);
        let mut addresses: HashSet<At> = HashSet::new();
        for pod in &all {
            let listed = self.slices.values().filter_map(|slice| slice.get(pod)).map(|listed| &listed.found);
            addresses.extend(listed.chain(self.told.get(pod)).map(|found| (found.host.clone(), found.port)));
        }
        all.extend(addresses.iter().filter_map(|address| self.by_address.get(address)).flatten().cloned());
        all
    }

    /// What all slices together say of a pod; `None`: it is gone, or was never there.
    fn stands(&self, pod: &PodId) -> Option<Found> {
        let listed = || self.slices.values().filter_map(|slice| slice.get(pod));
        let standing = self.standing(pod)?;
        let before = self.told.get(pod);
        let chosen = listed().map(|listed| &listed.found).min_by_key(|found| {
            (before.is_none_or(|before| before.key() != found.key()), is_v6(&found.host), found.key())
        })?;
        let neighbours = self.by_address.get(&(chosen.host.clone(), chosen.port)).into_iter().flatten();
        let mut others = neighbours.filter(|other| *other != pod).filter_map(|other| self.standing(other));
        if standing.terminates() && others.any(|other| !other.terminates()) {
            return None;
        }
        let readiness = match standing {
            Standing::Ready => Readiness::Ready,
            Standing::NotReady => Readiness::NotReady,
            Standing::Draining => Readiness::Draining,
            Standing::Gone => return None,
        };
        Some(Found { readiness, ..chosen.clone() })
    }

    fn standing(&self, pod: &PodId) -> Option<Standing> {
        self.slices.values().filter_map(|slice| slice.get(pod)).map(|listed| listed.standing).min()
    }

    fn problem(&self) -> Option<String> {
        if self.told.len() >= PODS_MAX {
            return Some(format!(
                "the service has more than {PODS_MAX} pods, of which the rest is left out; divide it"
            ));
        }
        if let Some((name, why)) = self.unreadable.first_key_value() {
            let more = match self.unreadable.len() - 1 {
                0 => String::new(),
                more => format!(", nor can {more} more"),
            };
            return Some(format!(
                "the EndpointSlice {name:?} can't be read ({why}){more}: what it said before that counts, and the others \
                 do; mend or delete it"
            ));
        }
        self.portless.values().min().cloned()
    }
}

fn is_v6(host: &EndpointHost) -> bool {
    matches!(host, EndpointHost::Ip(address) if address.is_ipv6())
}

fn no_port(wanted: &PodPort, ports: &[Port]) -> String {
    let wanted = match wanted {
        PodPort::Name(name) => name.clone(),
        PodPort::Number(number) => number.to_string(),
    };
    let names: Vec<&str> =
        ports.iter().filter_map(|port| port.name.as_deref()).filter(|name| !name.is_empty()).collect();
    let there = if names.is_empty() { "it names none".to_owned() } else { format!("it has {}", names.join(", ")) };
    format!(
        "the service has no TCP port of the name {wanted} ({there}); name one of those, or the number of a port of its pods"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn slice(name: &str, endpoints: serde_json::Value) -> EndpointSlice {
        let ports = json!([{"name": "http", "port": 80}, {"name": "tls", "port": 443, "appProtocol": "https"}]);
        let slice = json!({"metadata": {"name": name}, "addressType": "IPv4", "endpoints": endpoints, "ports": ports});
        serde_json::from_value(slice).unwrap()
    }

    fn pod(address: &str, uid: &str, conditions: serde_json::Value) -> serde_json::Value {
        json!({"addresses": [address], "conditions": conditions, "targetRef": {"kind": "Pod", "name": "p", "uid": uid}})
    }

    fn slices(port: &str) -> Slices {
        Slices::new(PodPort::Name(port.to_owned()), "support.agents.svc".into())
    }

    #[test]
    fn conditions_that_are_absent_have_their_meaning() {
        let of = |value| Standing::of(serde_json::from_value(value).unwrap());
        assert_eq!(of(json!({})), Standing::Ready);
        assert_eq!(of(json!({"ready": null, "serving": null, "terminating": null})), Standing::Ready);
        assert_eq!(of(json!({"ready": false})), Standing::NotReady);
        assert_eq!(of(json!({"ready": false, "terminating": true})), Standing::Gone, "serving is as ready");
        assert_eq!(of(json!({"ready": false, "serving": true, "terminating": true})), Standing::Draining);
        assert_eq!(of(json!({"ready": false, "serving": false, "terminating": true})), Standing::Gone);
        // publishNotReadyAddresses
        assert_eq!(of(json!({"ready": true, "serving": false, "terminating": false})), Standing::Ready);
        assert_eq!(of(json!({"ready": true, "serving": true, "terminating": true})), Standing::Draining);
        assert_eq!(of(json!({"ready": true, "serving": false, "terminating": true})), Standing::Gone);
    }

    #[test]
    fn slices_with_nothing_in_them_are_read() {
        let slice: EndpointSlice =
            serde_json::from_value(json!({"metadata": {"name": "a"}, "endpoints": null, "ports": null})).unwrap();
        let mut all = slices("http");
        all.put(slice);
        let update = all.take_update();
        assert!(update.put.is_empty() && update.problem.is_none());
    }

    #[test]
    fn the_port_says_whether_it_is_https() {
        let mut all = slices("tls");
        all.put(slice("a", json!([pod("10.0.0.1", "u", json!({}))])));
        let found = all.take_update().put.remove(0);
        assert_eq!((found.port, found.https, &*found.name), (443, true, "support.agents.svc"));
    }

    #[test]
    fn an_address_belongs_to_the_pod_that_does_not_terminate() {
        let mut all = slices("http");
        all.put(slice(
            "a",
            json!([pod("10.0.0.1", "old", json!({"ready": false, "serving": true, "terminating": true}))]),
        ));
        assert_eq!(all.take_update().put[0].readiness, Readiness::Draining);
        all.put(slice("b", json!([pod("10.0.0.1", "new", json!({"ready": false}))])));
        let update = all.take_update();
        assert_eq!(update.removed.len(), 1);
        assert_eq!((update.put.len(), update.put[0].uid.as_deref()), (1, Some("new")));
        // Where the new one goes, the old one is what is known again.
        all.remove("b");
        let update = all.take_update();
        assert_eq!((update.put.len(), update.put[0].uid.as_deref()), (1, Some("old")));
    }

    #[test]
    fn a_slice_that_can_not_be_read_keeps_nobody_else_back() {
        let sent = |slice: serde_json::Value| Sent::read(&serde_json::value::to_raw_value(&slice).unwrap());
        let good = |name: &str, address: &str| {
            let endpoints = json!([pod(address, address, json!({}))]);
            json!({"metadata": {"name": name}, "endpoints": endpoints, "ports": [{"name": "http", "port": 80}]})
        };
        let mut bad = good("b", "10.0.0.2");
        bad["ports"][0]["port"] = 80_000.into();
        let mut all = slices("http");
        all.replace(vec![sent(bad.clone()), sent(good("a", "10.0.0.1")), sent(json!("nonsense"))]);
        let update = all.take_update();
        assert_eq!(update.put.len(), 1);
        let problem = update.problem.unwrap();
        assert!(problem.contains("\"\"") && problem.contains("1 more"), "{problem}");

        // What it said while it could be read counts.
        all.replace(vec![sent(good("a", "10.0.0.1")), sent(good("b", "10.0.0.2"))]);
        let update = all.take_update();
        assert_eq!((update.put.len(), update.problem), (1, None));
        all.take(sent(bad.clone()));
        let update = all.take_update();
        assert!(update.removed.is_empty() && update.problem.is_some_and(|problem| problem.contains("\"b\"")));
        all.replace(vec![sent(bad)]);
        assert_eq!(all.take_update().removed.len(), 1, "of the one that has gone");
        all.remove("b");
        let update = all.take_update();
        assert_eq!((update.removed.len(), update.problem), (1, None));
        // However many there are.
        all.replace((0..1_000).map(|number| Sent::Unreadable { name: number.to_string(), why: "so".into() }).collect());
        assert_eq!(all.unreadable.len(), UNREADABLE_MAX);
    }

    /// A pod that terminates is told no more before it is listed no more.
    #[test]
    fn of_a_pod_that_has_gone_nothing_is_kept() {
        let mut all = slices("http");
        for number in 0..3 {
            let address = format!("10.0.0.{number}");
            for conditions in [json!({}), json!({"ready": false, "serving": false, "terminating": true})] {
                all.put(slice("a", json!([pod(&address, &number.to_string(), conditions)])));
                all.take_update();
            }
        }
        all.put(slice("a", json!([])));
        all.put(slice("b", json!([pod("10.0.0.9", "never told", json!({}))])));
        all.remove("b");
        all.take_update();
        assert!(all.by_address.is_empty(), "{:?}", all.by_address);
    }

    #[test]
    fn a_problem_lasts_as_long_as_its_cause() {
        let portless = |endpoints| {
            let slice = json!({"metadata": {"name": "a"}, "endpoints": endpoints, "ports": []});
            serde_json::from_value::<EndpointSlice>(slice).unwrap()
        };
        let mut all = slices("http");
        all.put(portless(json!([pod("10.0.0.1", "u", json!({}))])));
        assert!(all.take_update().problem.is_some_and(|problem| problem.contains("no TCP port")));
        // Scaled to zero, the slice has no ports, and nobody misses one.
        all.put(portless(json!([])));
        assert_eq!(all.take_update().problem, None);
    }

    /// The number of a pod, whether the address is its IPv6 one, and its standing.
    type ListedPod = (u8, bool, u8);

    /// A step: the slice of this number is removed, or lists these pods.
    fn step() -> impl Strategy<Value = (u8, Option<Vec<ListedPod>>)> {
        let pods = proptest::collection::vec((0u8..5, any::<bool>(), 0u8..4), 0..5);
        (0u8..3, proptest::option::weighted(0.8, pods))
    }

    proptest! {
        /// Told step by step, or all at once: what is told in the end is the same, but for the address of a pod that had
        /// one before.
        #[test]
        fn changes_add_up_to_what_there_is(steps in proptest::collection::vec(step(), 1..30), every in 1usize..5) {
            let mut stepwise = slices("http");
            let mut told: HashMap<String, Readiness> = HashMap::new();
            let mut by_key: HashMap<String, Found> = HashMap::new();
            let mut last: HashMap<u8, EndpointSlice> = HashMap::new();
            let count = steps.len();
            for (index, (number, pods)) in steps.into_iter().enumerate() {
                let name = format!("slice-{number}");
                match pods {
                    None => {
                        stepwise.remove(&name);
                        last.remove(&number);
                    }
                    Some(pods) => {
                        let endpoints: Vec<_> = pods.iter().map(|(pod, v6, standing)| {
                            let address = if *v6 { format!("fd00::{pod}") } else { format!("10.0.0.{pod}") };
                            let conditions = json!({
                                "ready": *standing == 0,
                                "serving": *standing == 0 || *standing == 2,
                                "terminating": *standing >= 2,
                            });
                            self::pod(&address, &format!("uid-{pod}"), conditions)
                        }).collect();
                        let slice = slice(&name, json!(endpoints));
                        stepwise.put(slice.clone());
                        last.insert(number, slice);
                    }
                }
                if index % every == 0 || index + 1 == count {
                    let update = stepwise.take_update();
                    for key in update.removed {
                        prop_assert!(by_key.remove(&*key.0).is_some(), "only what was told is removed");
                    }
                    for found in update.put {
                        by_key.insert(found.key().0.into(), found);
                    }
                    prop_assert!(stepwise.take_update().put.is_empty(), "nothing is told twice");
                }
                let listed = || stepwise.slices.values().flatten().map(|(pod, listed)| (listed.at(), pod));
                let known = || stepwise.by_address.iter().flat_map(|(at, pods)| pods.iter().map(|pod| (at.clone(), pod)));
                prop_assert!(listed().all(|one| known().any(|other| other == one)));
                prop_assert!(known().all(|one| listed().any(|other| other == one)), "who has left is forgotten");
            }
            for found in by_key.values() {
                let before = told.insert(found.uid.as_deref().unwrap_or_default().to_owned(), found.readiness);
                prop_assert!(before.is_none(), "a pod is one endpoint");
            }
            let mut whole = slices("http");
            whole.replace(last.into_values().map(Sent::Slice).collect());
            let whole: HashMap<String, Readiness> = whole
                .take_update()
                .put
                .into_iter()
                .map(|found| (found.uid.as_deref().unwrap_or_default().to_owned(), found.readiness))
                .collect();
            prop_assert_eq!(told, whole);
        }
    }
}
