//! Client: talks to the API server that the configuration names.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};

use crate::config;

/// To connect to an API server, TLS included. It is near, and whoever asks tries again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// To write a request.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no client. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "there is no service account of a pod here ({0}); outside a cluster name a file with `kubernetes.kubeconfig`"
    )]
    NotInCluster(#[source] InClusterError),
    #[error("the kubeconfig {} can't be used: {source}; `kubectl --kubeconfig` with it shows what is missing", file.display())]
    Kubeconfig { file: PathBuf, source: KubeconfigError },
    #[error("a client for the Kubernetes API can't be made: {0}; look at the certificates and the URL of the cluster")]
    Unusable(#[source] kube::Error),
}

/// A client for the cluster that `settings` name. Its default namespace is the pod's own, or that of the kubeconfig's
/// context. A service account's token is read again as it is renewed. Nothing is sent yet; to be called within a runtime.
///
/// Answers have no time limit, because those to a watch have no end: whoever asks for something else sets one.
/// It repeats nothing by itself.
pub async fn client(settings: &config::Kubernetes) -> Result<Client, ClientError> {
    let mut config = match &settings.kubeconfig {
        None => Config::incluster().map_err(ClientError::NotInCluster)?,
        Some(file) => {
            of_kubeconfig(file).await.map_err(|source| ClientError::Kubeconfig { file: file.clone(), source })?
        }
    };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.write_timeout = Some(WRITE_TIMEOUT);
    config.read_timeout = None;
    config.default_retry = false;
    Client::try_from(config).map_err(ClientError::Unusable)
}

async fn of_kubeconfig(file: &Path) -> Result<Config, KubeconfigError> {
    let kubeconfig = Kubeconfig::read_from(file)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_kubeconfig_that_is_none_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kubeconfig");
        std::fs::write(&file, "apiVersion: v1\nkind: Config\n").unwrap();
        let failure = client(&config::Kubernetes { kubeconfig: Some(file.clone()), ..config::Kubernetes::default() })
            .await
            .err()
            .unwrap()
            .to_string();
        assert!(failure.contains(&file.display().to_string()), "{failure}");
    }

    #[tokio::test]
    async fn the_namespace_is_that_of_the_context() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kubeconfig");
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
            clusters: [{name: k, cluster: {server: 'http://127.0.0.1:1'}}]\nusers: [{name: u, user: {token: t}}]\n\
            contexts: [{name: c, context: {cluster: k, user: u, namespace: agents}}]\n";
        std::fs::write(&file, text).unwrap();
        let client =
            client(&config::Kubernetes { kubeconfig: Some(file), ..config::Kubernetes::default() }).await.unwrap();
        assert_eq!(client.default_namespace(), "agents");
    }
}
