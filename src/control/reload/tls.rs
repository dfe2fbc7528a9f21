//! TLS: the certificates of listeners, read anew where their files have changed, and how endpoints are reached over https.

use std::path::Path;
use std::sync::Arc;

use rustls_pki_types::ServerName;
use sha2::{Digest, Sha256};
use tracing::info;

use crate::config::{self, EndpointHost, EndpointUrl, Problem, Problems};
use crate::control::reload::builder::Builder;
use crate::control::reload::problem;
use crate::net::tls::{self, ServerTls};
use crate::snapshot::Snapshot;
use crate::state::ClientTls;

/// Unchanged settings keep the same `Arc`, by which the dispatcher sees that a target is unchanged.
#[derive(Clone)]
pub(super) struct CachedClientTls {
    settings: config::UpstreamTls,
    http: config::HttpVersion,
    /// Of the files that `settings` names.
    content: [u8; 32],
    config: Arc<rustls::ClientConfig>,
}

impl Builder {
    /// Re-reads the listeners' certificates; a bad file leaves those that were there.
    pub(super) fn refresh_certificates(&self, current: &Snapshot) -> Result<(), Problems> {
        let mut problems = Vec::new();
        for (index, listener) in current.listeners.iter().enumerate() {
            if let Some(tls) = &listener.tls {
                refresh(tls, index, &mut problems);
            }
        }
        self.all_well(problems)
    }

    /// A version's endpoints are reached as before, by the content of the files that its `tls` block names too.
    pub(super) fn client_tls_is_kept(&self, version: &config::Version) -> bool {
        !(version.endpoints.iter().any(|endpoint| is_https(&endpoint.url)) || finds_https(version))
            || find_client_tls(&self.client_tls, version, &file_content(&version.tls)).is_some()
    }

    pub(super) fn endpoint_tls(
        &self,
        version: &config::Version,
        url: &EndpointUrl,
        next: &mut Vec<CachedClientTls>,
    ) -> Result<Option<ClientTls>, TlsFailure> {
        let EndpointUrl::Tcp { https: true, host, .. } = url else { return Ok(None) };
        let server_name = match (&version.tls.server_name, host) {
            (Some(name), _) => server_name(name)?,
            (None, EndpointHost::Ip(ip)) => ServerName::IpAddress((*ip).into()),
            (None, EndpointHost::Name(name)) => server_name(name)?,
        };
        let content = file_content(&version.tls);
        if let Some(known) = find_client_tls(next, version, &content) {
            return Ok(Some(ClientTls { config: Arc::clone(&known.config), server_name }));
        }
        let cached = match find_client_tls(&self.client_tls, version, &content) {
            Some(known) => known.clone(),
            None => CachedClientTls {
                settings: version.tls.clone(),
                http: version.http,
                content,
                config: tls::client(&version.tls, version.http).map_err(TlsFailure::Settings)?,
            },
        };
        let config = Arc::clone(&cached.config);
        next.push(cached);
        Ok(Some(ClientTls { config, server_name }))
    }

    /// By which endpoints that are found are reached over https. `None`: that is neither wanted nor possible.
    pub(super) fn tls_of_sources(
        &self,
        version: &config::Version,
        next: &mut Vec<CachedClientTls>,
    ) -> Result<Option<Arc<rustls::ClientConfig>>, String> {
        // Any: each endpoint has a name of its own.
        let host = EndpointHost::Ip(std::net::Ipv4Addr::LOCALHOST.into());
        let url = EndpointUrl::Tcp { https: true, host, port: 443 };
        match self.endpoint_tls(version, &url, next) {
            Ok(tls) => Ok(tls.map(|tls| tls.config)),
            Err(failure) if finds_https(version) => Err(failure.message()),
            Err(_) => Ok(None),
        }
    }
}

/// Endpoints that are found have no scheme: it is https where the version says anything of TLS.
pub(super) fn finds_https(version: &config::Version) -> bool {
    !version.sources.is_empty() && version.tls != config::UpstreamTls::default()
}

pub(super) fn is_https(url: &EndpointUrl) -> bool {
    matches!(url, EndpointUrl::Tcp { https: true, .. })
}

/// Why there is no TLS towards an endpoint.
pub(super) enum TlsFailure {
    /// The version's `tls` block.
    Settings(String),
    /// Neither `tls.server_name` nor the endpoint's host is a name that a certificate can have.
    ServerName(String),
}

impl TlsFailure {
    pub(super) fn key(&self, endpoint: usize) -> String {
        match self {
            TlsFailure::Settings(_) => "tls".to_owned(),
            TlsFailure::ServerName(_) => format!("endpoints[{endpoint}]"),
        }
    }

    pub(super) fn message(self) -> String {
        match self {
            TlsFailure::Settings(message) => message,
            TlsFailure::ServerName(name) => {
                format!("\"{name}\" is no name that a certificate can have; set tls.server_name to one")
            }
        }
    }
}

pub(super) fn server_name(name: &str) -> Result<ServerName<'static>, TlsFailure> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsFailure::ServerName(name.to_owned()))
}

pub(super) fn listener_tls(
    settings: &config::ListenerTls,
    kept: Option<&Arc<ServerTls>>,
    index: usize,
    problems: &mut Vec<Problem>,
) -> Option<Arc<ServerTls>> {
    if let Some(kept) = kept {
        refresh(kept, index, problems);
        return Some(Arc::clone(kept));
    }
    match tls::server(settings) {
        Ok(tls) => Some(Arc::new(tls)),
        Err(message) => {
            problems.push(problem(&format!("listeners[{index}].tls"), message));
            None
        }
    }
}

fn refresh(tls: &ServerTls, index: usize, problems: &mut Vec<Problem>) {
    match tls.reload_if_changed() {
        Ok(true) => info!("certificates of listeners[{index}] were read anew"),
        Ok(false) => {}
        Err(message) => problems.push(problem(&format!("listeners[{index}].tls"), message)),
    }
}

fn find_client_tls<'a>(
    cache: &'a [CachedClientTls],
    version: &config::Version,
    content: &[u8; 32],
) -> Option<&'a CachedClientTls> {
    cache.iter().find(|known| known.settings == version.tls && known.http == version.http && known.content == *content)
}

/// A digest of the files; one that can't be read counts as such and is reported by whoever needs it.
fn file_content(tls: &config::UpstreamTls) -> [u8; 32] {
    let mut digest = Sha256::new();
    for path in [&tls.ca_file, &tls.cert_file, &tls.key_file].into_iter().flatten() {
        match std::fs::read(Path::new(path)) {
            Ok(content) => {
                digest.update((content.len() as u64).to_be_bytes());
                digest.update(content);
            }
            Err(_) => digest.update(u64::MAX.to_be_bytes()),
        }
    }
    digest.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_tls_is_kept_by_content() {
        let directory = tempfile::tempdir().unwrap();
        let ca_file = directory.path().join("ca.crt");
        let settings = config::UpstreamTls { ca_file: Some(ca_file.clone()), ..config::UpstreamTls::default() };
        let missing = file_content(&settings);
        std::fs::write(&ca_file, "one").unwrap();
        let first = file_content(&settings);
        assert_ne!(missing, first);
        assert_eq!(first, file_content(&settings));
        std::fs::write(&ca_file, "two").unwrap();
        assert_ne!(first, file_content(&settings));
    }
}
