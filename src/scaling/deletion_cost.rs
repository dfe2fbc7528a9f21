//! Deletion cost: tells the cluster which pods would lose runs, so that an autoscaler removes idle ones first.
//!
//! A ReplicaSet that shrinks removes pods in the order of the annotation `controller.kubernetes.io/pod-deletion-cost`. One
//! replica of the proxy, the holder of a lease, writes it on the pods behind the endpoints, from what all replicas together
//! have there. It writes little: a pod only when its number has changed so much that it may change the order.

mod plan;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, Error};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::config;
use crate::drain::Phase;
use crate::ids;
use crate::kubernetes::client::client;
use crate::scaling::lease::{self, Leading};
use crate::scaling::load::EndpointLoad;
use crate::scaling::replicas::Replicas;
use plan::Written;

const ANNOTATION: &str = "controller.kubernetes.io/pod-deletion-cost";

/// Between two looks at what there is to write: with [`plan::PATCHES_MAX`] that is two patches a second.
const ROUND: Duration = Duration::from_secs(5);
/// How often pods are listed, at least, while there are endpoints of which no pod is known.
const LIST_EVERY: Duration = Duration::from_secs(10);
/// Pods that one answer has.
const PAGE: u32 = 500;
/// Pods of a namespace that are looked at.
const PODS_MAX: usize = 10_000;
/// For an answer of the API server.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Before trying again to reach the API server at all.
const PAUSE: Duration = Duration::from_secs(10);

/// Writes while the configuration wants it, until it is dropped, told to `stop` or the proxy drains; then the lease is
/// given up.
pub async fn run(replicas: Arc<Replicas>, stop: CancellationToken) {
    let source = replicas.source().clone();
    let mut reloads = source.reload_state.subscribe();
    loop {
        let settings = source.running.snapshot.load().loaded.config.kubernetes.clone();
        let until = async {
            while reloads.changed().await.is_ok() {
                if source.running.snapshot.load().loaded.config.kubernetes != settings {
                    return;
                }
            }
            std::future::pending().await
        };
        let (leading, _) = watch::channel(None);
        let identity = identity(source.instance());
        let ended = tokio::select! {
            () = act(&replicas, &settings, &identity, &leading), if settings.pod_deletion_cost => false,
            () = until => false,
            () = stop.cancelled() => true,
            () = source.running.drain.reached(Phase::Announced) => true,
        };
        if leading.borrow().is_some()
            && let Ok(client) = client(&settings).await
        {
            lease::release(leases(client, &settings), &settings.leader_election.name, &identity).await;
        }
        if ended {
            return;
        }
    }
}

/// Whoever looks at the lease sees the pod.
fn identity(instance: &str) -> String {
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "longhaul".to_owned());
    format!("{host}_{instance}")
}

fn leases(client: Client, settings: &config::Kubernetes) -> Api<Lease> {
    match &settings.leader_election.namespace {
        Some(namespace) => Api::namespaced(client, namespace),
        None => Api::default_namespaced(client),
    }
}

/// Takes part in the election, and writes while this process is the one.
async fn act(replicas: &Replicas, settings: &config::Kubernetes, identity: &str, leading: &watch::Sender<Leading>) {
    let client = loop {
        match client(settings).await {
            Ok(client) => break client,
            Err(failure) => warn!("kubernetes.pod_deletion_cost: {failure}"),
        }
        tokio::time::sleep(PAUSE).await;
    };
    let name = &settings.leader_election.name;
    let taking_part = lease::run(leases(client.clone(), settings), name, identity.to_owned(), leading);
    let writing = write(replicas, Api::default_namespaced(client), leading.subscribe());
    tokio::join!(taking_part, writing);
}

async fn write(replicas: &Replicas, pods: Api<Pod>, mut leading: watch::Receiver<Leading>) {
    let mut known = Pods::default();
    loop {
        let leader = leading.clone();
        let leads = || leader.borrow().is_some_and(|until| until > ids::now());
        if leads() {
            match replicas.sum(true).await {
                Ok(sum) => known.round(&pods, &sum.endpoints, &leads).await,
                // A part of the truth would call busy pods idle.
                Err(failure) => debug!("deletion costs stay as they are: {failure}"),
            }
            tokio::time::sleep(ROUND).await;
        } else {
            // Somebody else writes meanwhile.
            known = Pods::default();
            if leading.changed().await.is_err() {
                return;
            }
        }
    }
}

/// The pods behind endpoints.
#[derive(Default)]
struct Pods {
    by_address: HashMap<IpAddr, PodName>,
    /// By name: what their annotations say.
    written: HashMap<String, Written>,
    listed: Option<Instant>,
}

#[derive(Clone)]
struct PodName {
    name: String,
    uid: String,
}

impl Pods {
    /// Writes what is due.
    async fn round(&mut self, pods: &Api<Pod>, endpoints: &BTreeMap<String, EndpointLoad>, leads: &impl Fn() -> bool) {
        let by_address = loads_by_address(endpoints);
        let now = ids::now();
        let is_due = self.listed.is_none_or(|at| now.saturating_duration_since(at) >= LIST_EVERY);
        if is_due && by_address.keys().any(|address| !self.by_address.contains_key(address)) {
            self.listed = Some(now);
            match tokio::time::timeout(TIMEOUT, list(pods)).await {
                Ok(Ok(list)) => self.take(list),
                Ok(Err(failure)) => warn!("pods can't be listed for their deletion costs: {failure}"),
                Err(_) => warn!("pods can't be listed for their deletion costs: no answer within {TIMEOUT:?}"),
            }
        }
        let mut loads: HashMap<String, EndpointLoad> = HashMap::new();
        for (address, load) in by_address {
            if let Some(pod) = self.by_address.get(&address) {
                loads.entry(pod.name.clone()).or_default().add(load);
            }
        }
        for (name, cost) in plan::due(&loads, &self.written, now) {
            if !leads() {
                return;
            }
            let Some(pod) = self.by_address.values().find(|pod| pod.name == name).cloned() else { continue };
            match patch(pods, &pod, cost).await {
                Ok(()) => {
                    info!("pod {name} has a deletion cost of {cost} now");
                    self.written.insert(name, Written { cost: Some(cost), at: Some(now), ours: true });
                }
                Err(Some(Error::Api(status))) if status.code == 404 || status.code == 409 => {
                    // It is gone, or another pod has its name: the next list shows.
                    self.by_address.retain(|_, known| known.name != name);
                    self.written.remove(&name);
                }
                Err(failure) => {
                    let failure = failure.map_or("no answer".to_owned(), |failure| failure.to_string());
                    warn!("the deletion cost of pod {name} can't be written: {failure}");
                    // As if it were written: not again at once.
                    let before = self.written.get(&name).copied().unwrap_or_default();
                    self.written.insert(name, Written { at: Some(now), ..before });
                }
            }
        }
    }

    /// Takes note of what is there. Of what this process wrote it knows when.
    fn take(&mut self, list: Vec<Pod>) {
        let mut written = HashMap::new();
        self.by_address.clear();
        let mut shared = Vec::new();
        for pod in list {
            let Some((name, uid)) = pod.metadata.name.zip(pod.metadata.uid) else { continue };
            let status = pod.status.unwrap_or_default();
            let is_over = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
            // One with its node's address can't be told from others by it.
            let of_host = pod.spec.is_some_and(|spec| spec.host_network == Some(true));
            if is_over || of_host || pod.metadata.deletion_timestamp.is_some() {
                continue;
            }
            let annotations = pod.metadata.annotations.unwrap_or_default();
            let cost = annotations.get(ANNOTATION).and_then(|cost| cost.parse().ok());
            let before = self.written.get(&name).copied().unwrap_or_default();
            written.insert(name.clone(), Written { cost, ..before });
            let first = status.pod_ip.into_iter();
            let all = status.pod_ips.unwrap_or_default().into_iter().map(|address| address.ip);
            for address in first.chain(all).filter_map(|address| address.parse::<IpAddr>().ok()) {
                let pod = PodName { name: name.clone(), uid: uid.clone() };
                if self.by_address.insert(address, pod).is_some_and(|other| other.name != name) {
                    shared.push(address);
                }
            }
        }
        self.by_address.retain(|address, _| !shared.contains(address));
        self.written = written;
    }
}

/// Those of several ports together.
fn loads_by_address(endpoints: &BTreeMap<String, EndpointLoad>) -> HashMap<IpAddr, EndpointLoad> {
    let mut loads: HashMap<IpAddr, EndpointLoad> = HashMap::new();
    for (address, load) in endpoints {
        if let Ok(address) = address.parse::<SocketAddr>() {
            loads.entry(address.ip()).or_default().add(*load);
        }
    }
    loads
}

async fn list(pods: &Api<Pod>) -> Result<Vec<Pod>, Error> {
    let mut found = Vec::new();
    let mut parameters = ListParams::default().limit(PAGE);
    loop {
        let page = pods.list(&parameters).await?;
        found.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty() && found.len() < PODS_MAX) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => return Ok(found),
        }
    }
}

/// `None`: there was no answer.
async fn patch(pods: &Api<Pod>, pod: &PodName, cost: i32) -> Result<(), Option<Error>> {
    // With its uid, so that no other pod of that name is written to.
    let patch = Patch::Merge(json!({"metadata": {"uid": pod.uid, "annotations": {ANNOTATION: cost.to_string()}}}));
    let parameters = PatchParams::default();
    let patching = pods.patch_metadata(&pod.name, &parameters, &patch);
    match tokio::time::timeout(TIMEOUT, patching).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(failure)) => Err(Some(failure)),
        Err(_) => Err(None),
    }
}
