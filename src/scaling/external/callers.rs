//! Callers: who may ask: the API server of the cluster, known by the certificate that it shows.
//!
//! It has looked already whether the person behind it may see the metric. What is left is to know that it is the API
//! server: by an authority of the configuration, or as the cluster tells all servers behind it, in a ConfigMap
//! (the front proxy of "Authenticating Proxy" in the Kubernetes documentation).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use rustls_pki_types::CertificateDer;
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::kubernetes::client::client;
use crate::net::tls::asking::Authorities;
use crate::scaling::Source;

/// Who is known.
pub enum Callers {
    /// Whoever has a certificate of these, whatever its name.
    Of(Authorities),
    /// The front proxy, as the cluster describes it.
    FrontProxy(FrontProxy),
    /// Nobody yet, for this reason.
    Nobody(String),
}

/// What `kube-system/extension-apiserver-authentication` says.
#[derive(Debug)]
pub struct FrontProxy {
    authorities: Authorities,
    /// Empty: any name of those authorities.
    allowed_names: Vec<String>,
    /// One of them names the person for whom it asks.
    username_headers: Vec<HeaderName>,
}

impl Callers {
    /// Whether a caller may ask who showed this chain. The error says why not.
    pub fn check(&self, chain: &[CertificateDer<'_>], headers: &HeaderMap, now: SystemTime) -> Result<(), String> {
        match self {
            Callers::Of(authorities) => authorities.name_of(chain, now).map(|_| ()),
            Callers::FrontProxy(front_proxy) => front_proxy.check(chain, headers, now),
            Callers::Nobody(reason) => Err(reason.clone()),
        }
    }

    /// Whether a caller who showed this chain may ask, if it says for whom.
    pub fn knows(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> bool {
        match self {
            Callers::Of(authorities) => authorities.name_of(chain, now).is_ok(),
            Callers::FrontProxy(front_proxy) => front_proxy.check_certificate(chain, now).is_ok(),
            Callers::Nobody(_) => false,
        }
    }
}

impl FrontProxy {
    fn check_certificate(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> Result<(), String> {
        let name = self.authorities.name_of(chain, now)?;
        if !self.allowed_names.is_empty() && !self.allowed_names.contains(&name) {
            return Err(format!("{name:?} is not a name that the cluster's front proxy may have"));
        }
        Ok(())
    }

    fn check(&self, chain: &[CertificateDer<'_>], headers: &HeaderMap, now: SystemTime) -> Result<(), String> {
        self.check_certificate(chain, now)?;
        let names_a_person = |header: &HeaderName| headers.get(header).is_some_and(|value| !value.is_empty());
        match self.username_headers.iter().any(names_a_person) {
            true => Ok(()),
            false => Err("the request does not say for whom it is".to_owned()),
        }
    }

    /// Reads the ConfigMap's data.
    fn of(data: &BTreeMap<String, String>) -> Result<FrontProxy, String> {
        let text = |key: &str| data.get(key).map(String::as_str);
        let list = |key: &str| -> Result<Vec<String>, String> {
            let Some(text) = text(key) else { return Ok(Vec::new()) };
            serde_json::from_str(text).map_err(|failure| format!("{key} is no list of texts: {failure}"))
        };
        let authorities = text(CA).ok_or_else(|| format!("it has no {CA}; the cluster has no front proxy"))?;
        let username_headers = list("requestheader-username-headers")?;
        let username_headers: Result<Vec<HeaderName>, _> =
            username_headers.iter().map(|name| HeaderName::try_from(name.as_str())).collect();
        Ok(FrontProxy {
            authorities: Authorities::of_pem(authorities.as_bytes()).map_err(|failure| format!("{CA}: {failure}"))?,
            allowed_names: list("requestheader-allowed-names")?,
            username_headers: username_headers
                .map_err(|failure| format!("requestheader-username-headers: {failure}"))?,
        })
    }
}

const CA: &str = "requestheader-client-ca-file";
const NAMESPACE: &str = "kube-system";
const NAME: &str = "extension-apiserver-authentication";

/// How often the ConfigMap is read. It changes when the cluster's authorities do, which is announced by both being in it;
/// and whoever is refused has it read at once.
const READ_EVERY: Duration = Duration::from_secs(30);
/// Between two readings, whatever asks for them; the first while there is no answer yet, then twice as long each time.
const READ_APART: Duration = Duration::from_secs(1);
/// For an answer of the API server.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// The newest [`Callers`].
pub struct Known {
    current: Mutex<Arc<Callers>>,
    refused: Notify,
}

impl Known {
    pub fn new() -> Known {
        Known { current: Mutex::new(Arc::new(nobody_yet())), refused: Notify::new() }
    }

    pub fn current(&self) -> Arc<Callers> {
        Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn set(&self, callers: Callers) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(callers);
    }

    /// Somebody was refused: what is known may be old.
    pub fn was_refused(&self) {
        self.refused.notify_one();
    }
}

/// Before the cluster has said anything.
pub fn nobody_yet() -> Callers {
    Callers::Nobody("the cluster has not said yet by which certificate its front proxy is known".into())
}

/// Reads who is known from the cluster until it is dropped. What was good last stays.
pub async fn follow_cluster(source: Source, known: Arc<Known>) {
    let mut pause = READ_APART;
    let mut seen = None;
    loop {
        match read(&source).await {
            Ok(data) if seen.as_ref() == Some(&data) => pause = READ_EVERY,
            Ok(data) => {
                match FrontProxy::of(&data) {
                    Ok(front_proxy) => {
                        info!("the front proxy of the cluster is known by ConfigMap {NAMESPACE}/{NAME}");
                        known.set(Callers::FrontProxy(front_proxy));
                    }
                    Err(failure) => failed(&known, &failure),
                }
                seen = Some(data);
                pause = READ_EVERY;
            }
            Err(failure) => {
                failed(&known, &failure);
                pause = if pause >= READ_EVERY { READ_APART } else { pause * 2 };
            }
        }
        let soon = tokio::time::sleep(READ_APART);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = async {
                known.refused.notified().await;
                soon.await;
            } => {}
        }
    }
}

/// What is known stays; where that is nobody, they are told why.
fn failed(known: &Known, failure: &str) {
    warn!(
        "ConfigMap {NAMESPACE}/{NAME} can't be used: {failure}; the Role extension-apiserver-authentication-reader lets it be read"
    );
    if matches!(*known.current(), Callers::Nobody(_)) {
        known.set(Callers::Nobody(format!("ConfigMap {NAMESPACE}/{NAME} can't be used: {failure}")));
    }
}

async fn read(source: &Source) -> Result<BTreeMap<String, String>, String> {
    let settings = source.running.snapshot.load().loaded.config.kubernetes.clone();
    let client = client(&settings).await.map_err(|failure| failure.to_string())?;
    let api: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
    let answer = tokio::time::timeout(READ_TIMEOUT, api.get(NAME)).await;
    let map =
        answer.map_err(|_| format!("no answer within {READ_TIMEOUT:?}"))?.map_err(|failure| failure.to_string())?;
    Ok(map.data.unwrap_or_default())
}
