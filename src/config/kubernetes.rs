//! Kubernetes: what of the file says how longhaul and a cluster work together.

use std::path::Path;

use super::Kubernetes;
use super::read::{Kind, block};
use super::values::{boolean, path, port, socket_address, text};

/// The block `kubernetes`.
pub fn kubernetes() -> Kind<'static, Kubernetes> {
    let certificate = || {
        block("{cert_file: .., key_file: ..}", |block| {
            block.required("cert_file", "The certificate chain, PEM.", path());
            block.required("key_file", "The private key, PEM.", path());
            Some(())
        })
    };
    let replicas = || {
        block("{dns: .., port: ..}", |block| {
            block.required("dns", "A headless service's name.", text());
            block.key("port", "The port of their probes listener.", port(), "9900");
            Some(())
        })
    };
    let external_metrics = move || {
        block("{address: 0.0.0.0:6443, tls: ..}", move |block| {
            block.required("address", "IP:port.", socket_address());
            block.required("tls", "The API server needs TLS.", certificate());
            block.optional(
                "client_ca_file",
                "null: what the cluster's extension-apiserver-authentication says.",
                path(),
            );
            block.optional("replicas", "The other replicas, whose counts are added.", replicas());
            Some(())
        })
    };
    let keda = || {
        block("{address: 0.0.0.0:9902}", |block| {
            block.required("address", "IP:port.", socket_address());
            Some(())
        })
    };
    let leader_election = || {
        block("a mapping with `namespace` and `name`", |block| {
            block.optional("namespace", "null: the pod's own.", text());
            block.key("name", "Of the lease.", text(), "longhaul");
            Some(())
        })
    };
    block("a mapping", move |block| {
        let about = "How the API server is reached; null: by the pod's service account.";
        let kubeconfig = block.optional("kubeconfig", about, path().checked(|path| check_readable(path)));
        block.optional("external_metrics", "Serves external.metrics.k8s.io/v1beta1.", external_metrics());
        block.optional("keda", "A KEDA external-push scaler (gRPC).", keda());
        block.key("pod_deletion_cost", "Whether pods with runs are marked as costly to delete.", boolean(), "false");
        block.key("leader_election", "Which replica acts on the cluster.", leader_election(), "{}");
        Some(Kubernetes { kubeconfig })
    })
}

/// What is in it, whoever uses it says.
fn check_readable(path: &Path) -> Result<(), String> {
    std::fs::File::open(path).map(|_| ()).map_err(|failure| format!("cannot read {}: {failure}", path.display()))
}
