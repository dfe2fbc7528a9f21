//! TLS: server and client configurations from files; certificates are chosen by SNI and re-read when the files change.

use std::sync::Arc;

/// A listener's TLS configuration.
pub struct ServerTls {
    pub config: Arc<rustls::ServerConfig>,
}
