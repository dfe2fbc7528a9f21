//! Certificate: a self-signed certificate in files, with the TLS settings of both sides.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};

pub struct Certificate {
    /// PEM.
    pub cert_file: PathBuf,
    /// PEM.
    pub key_file: PathBuf,
    der: CertificateDer<'static>,
    key: Vec<u8>,
}

impl Certificate {
    /// A certificate for `names` (DNS names or IP addresses), written to `directory` as NAME.crt and NAME.key.
    pub fn create(directory: &Path, names: &[&str]) -> Certificate {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let made = rcgen::generate_simple_self_signed(names.clone()).expect("valid names");
        let cert_file = directory.join(format!("{}.crt", names[0]));
        let key_file = directory.join(format!("{}.key", names[0]));
        std::fs::write(&cert_file, made.cert.pem()).expect("writable directory");
        std::fs::write(&key_file, made.signing_key.serialize_pem()).expect("writable directory");
        Certificate { cert_file, key_file, der: made.cert.der().clone(), key: made.signing_key.serialize_der() }
    }

    /// The bytes of the certificate, to compare with what a peer showed.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// A server that shows this certificate and offers `alpn`.
    pub fn server(&self, alpn: &[&str]) -> Arc<rustls::ServerConfig> {
        let key = PrivateKeyDer::try_from(self.key.clone()).expect("a key of rcgen");
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("ring has the default versions")
            .with_no_client_auth()
            .with_single_cert(vec![self.der.clone()], key)
            .expect("key and certificate match");
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Arc::new(config)
    }

    /// A client that trusts this certificate alone and offers `alpn`.
    pub fn client(&self, alpn: &[&str]) -> Arc<rustls::ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.der.clone()).expect("a certificate of rcgen");
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("ring has the default versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
