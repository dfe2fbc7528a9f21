//! Kubernetes: what of the file says how longhaul and a cluster work together.

use std::path::Path;

use super::file::{authorities_file, certificate_files};
use super::read::{Kind, block};
use super::values::{boolean, path, port, socket_address, text};
use super::{ExternalMetrics, Keda, Kubernetes, LeaderElection, Replicas};

/// The block `kubernetes`.
pub fn kubernetes() -> Kind<'static, Kubernetes> {
    block("a mapping", |block| {
        let about = "How the API server is reached; null: by the pod's service account.";
        let kubeconfig = block.optional("kubeconfig", about, path().checked(|path| check_readable(path)));
        let about = "Serves external.metrics.k8s.io/v1beta1, for HPA.";
        let external_metrics = block.optional("external_metrics", about, external_metrics());
        let keda = block.optional("keda", "A KEDA external-push scaler (gRPC).", keda());
        let about = "Whether pods with runs are marked as costly to delete.";
        let pod_deletion_cost = block.key("pod_deletion_cost", about, boolean(), "false");
        let about = "Which replica acts on the cluster.";
        let leader_election = block.key("leader_election", about, leader_election(), "{}");
        for key in ["kubeconfig", "external_metrics", "keda"] {
            if !cfg!(feature = "kubernetes") && block.has(key) {
                block.problem(key, "this longhaul was built without the feature `kubernetes`; leave it out");
            }
        }
        if !cfg!(feature = "kubernetes") && pod_deletion_cost {
            block
                .problem("pod_deletion_cost", "this longhaul was built without the feature `kubernetes`; leave it out");
        }
        if let (Some(metrics), Some(keda)) = (&external_metrics, &keda)
            && let (Some(one), Some(other)) = (&metrics.replicas, &keda.replicas)
            && one != other
        {
            block.problem("keda", "its `replicas` are others than those of `external_metrics`; name them once, there");
        }
        let kubernetes = Kubernetes { kubeconfig, external_metrics, keda, pod_deletion_cost, leader_election };
        if pod_deletion_cost && kubernetes.replicas().is_none() {
            let message = "without `replicas` (of `external_metrics` or `keda`) only this replica's runs count; with several replicas \
                           of the proxy, name them";
            block.warning("pod_deletion_cost", message);
        }
        Some(kubernetes)
    })
}

fn external_metrics() -> Kind<'static, ExternalMetrics> {
    block("{address: 0.0.0.0:6443, tls: ..}", |block| {
        let address = block.required("address", "IP:port.", socket_address());
        let about = "Its certificate; the API server speaks TLS only. Re-read when the files change.";
        let certificate = block.required("tls", about, certificate_files());
        let about = "Authorities of callers' certificates, whatever their name. null: what ConfigMap \
                     kube-system/extension-apiserver-authentication says.";
        let client_ca_file = block.optional("client_ca_file", about, authorities_file());
        let replicas = block.optional("replicas", "The replicas of the proxy, whose numbers are added.", replicas());
        Some(ExternalMetrics { address: address?, certificate: certificate?, client_ca_file, replicas })
    })
}

fn keda() -> Kind<'static, Keda> {
    block("{address: 0.0.0.0:9902}", |block| {
        let address = block.required("address", "IP:port.", socket_address());
        let about = "The replicas of the proxy, where `external_metrics` does not name them.";
        let replicas = block.optional("replicas", about, replicas());
        Some(Keda { address: address?, replicas })
    })
}

fn replicas() -> Kind<'static, Replicas> {
    block("{dns: .., port: ..}", |block| {
        let dns = block.required("dns", "Their headless service's name.", text().checked(|name| check_name(name)));
        let port = block.key("port", "The port of their probes (`admin.probes`).", port(), "9900");
        Some(Replicas { dns: dns?, port })
    })
}

fn leader_election() -> Kind<'static, LeaderElection> {
    block("a mapping with `namespace` and `name`", |block| {
        let namespace = block.optional("namespace", "null: the pod's own.", text());
        let name = block.key("name", "Of the lease.", text(), "longhaul");
        Some(LeaderElection { namespace, name })
    })
}

fn check_name(name: &str) -> Result<(), String> {
    match name.is_empty() || name.len() > 253 || name.contains(|c: char| c.is_whitespace() || c == '/') {
        true => Err(format!("{name:?} is no DNS name such as longhaul-headless.agents.svc")),
        false => Ok(()),
    }
}

/// What is in it, whoever uses it says.
fn check_readable(path: &Path) -> Result<(), String> {
    std::fs::File::open(path).map(|_| ()).map_err(|failure| format!("cannot read {}: {failure}", path.display()))
}
