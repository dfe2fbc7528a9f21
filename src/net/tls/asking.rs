//! Asking: a server that asks its callers for a certificate and judges it only afterwards.
//!
//! The listeners' mTLS ends the handshake of whoever has no good certificate. An API of a cluster has to answer such a
//! caller, in HTTP; and which authorities count may change while a connection is open. So the handshake takes any
//! certificate whose key the caller proves to have, and [`Authorities::name_of`] says what it is worth.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};

use super::{BOTH_VERSIONS, PROVIDER, chain, mismatch, private_key, read};
use crate::config::CertificateFiles;

/// A configuration for HTTP/1.1 with this certificate. Every connection proves anew who calls, so nothing is resumed.
pub fn asking_server(files: &CertificateFiles) -> Result<Arc<ServerConfig>, String> {
    let chain = chain(&files.cert_file, &read(&files.cert_file)?)?;
    let key = private_key(&files.key_file, &read(&files.key_file)?)?;
    let mut config = ServerConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(BOTH_VERSIONS)
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(Arc::new(Anybody))
        .with_single_cert(chain, key)
        .map_err(|error| mismatch(&files.cert_file, &files.key_file, &error.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Takes any certificate, and none; but whoever shows one must have its key.
#[derive(Debug)]
struct Anybody;

impl ClientCertVerifier for Anybody {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// None: callers are to show what they have.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &PROVIDER.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &PROVIDER.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

/// Those whose certificates count.
#[derive(Clone, Debug)]
pub struct Authorities(Arc<dyn ClientCertVerifier>);

impl Authorities {
    /// Of their certificates in PEM. The error is a sentence.
    pub fn of_pem(pem: &[u8]) -> Result<Authorities, String> {
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|error| format!("not PEM certificates: {error}"))?;
            roots.add(certificate).map_err(|error| error.to_string())?;
        }
        if roots.is_empty() {
            return Err("there is no PEM certificate".to_owned());
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), PROVIDER.clone()).build();
        verifier.map(Authorities).map_err(|error| error.to_string())
    }

    /// The common name of a caller who showed this chain, if it is a client's certificate and is good now.
    pub fn name_of(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> Result<String, String> {
        let (own, intermediates) = chain.split_first().ok_or("there is no client certificate")?;
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.0.verify_client_cert(own, intermediates, UnixTime::since_unix_epoch(since_epoch)).map_err(|error| {
            match error {
                Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
                    "the client certificate is of another authority".to_owned()
                }
                other => format!("the client certificate is not good: {other}"),
            }
        })?;
        let certificate = webpki::EndEntityCert::try_from(own).map_err(|error| format!("{error:?}"))?;
        Ok(common_name(certificate.subject()).unwrap_or_default())
    }
}

/// The common name (2.5.4.3) of a distinguished name, the last if there are several; `None`: it has none. The DER is that of
/// RDNSequence without its own tag and length (RFC 5280 section 4.1.2.4).
fn common_name(mut name: &[u8]) -> Option<String> {
    const SEQUENCE: u8 = 0x30;
    const SET: u8 = 0x31;
    const OBJECT_IDENTIFIER: u8 = 0x06;
    const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
    /// UTF8String, PrintableString, T61String, IA5String.
    const TEXTS: [u8; 4] = [0x0c, 0x13, 0x14, 0x16];
    let mut found = None;
    while !name.is_empty() {
        let (tag, mut attributes, rest) = element(name)?;
        name = rest;
        while tag == SET && !attributes.is_empty() {
            let (tag, attribute, rest) = element(attributes)?;
            attributes = rest;
            let (kind, identifier, value) = element(attribute).filter(|_| tag == SEQUENCE)?;
            let (text, value, _) = element(value)?;
            if kind == OBJECT_IDENTIFIER && identifier == COMMON_NAME && TEXTS.contains(&text) {
                found = std::str::from_utf8(value).ok().map(str::to_owned);
            }
        }
    }
    found
}

/// The first element: its tag and content, and what comes after it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = der.split_first()?;
    let (length, rest) = rest.split_first()?;
    let (length, rest) = match length {
        0..=0x7f => (usize::from(*length), rest),
        // A name is shorter than 64 KiB.
        0x81 => (usize::from(*rest.first()?), &rest[1..]),
        0x82 => (usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])), &rest[2..]),
        _ => return None,
    };
    (length <= rest.len()).then(|| (*tag, &rest[..length], &rest[length..]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

    use super::*;

    struct Authority {
        pem: String,
        issuer: Issuer<'static, KeyPair>,
    }

    impl Authority {
        fn new() -> Authority {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            let certificate = params.self_signed(&key).unwrap();
            Authority { pem: certificate.pem(), issuer: Issuer::new(params, key) }
        }

        fn issue(&self, name: &str, purpose: ExtendedKeyUsagePurpose) -> CertificateDer<'static> {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.distinguished_name.push(DnType::OrganizationName, "an organization");
            params.distinguished_name.push(DnType::CommonName, name);
            params.extended_key_usages = vec![purpose];
            let key = KeyPair::generate().unwrap();
            params.signed_by(&key, &self.issuer).unwrap().der().clone()
        }
    }

    #[test]
    fn a_name_counts_if_its_authority_does() {
        let (authority, other) = (Authority::new(), Authority::new());
        let authorities = Authorities::of_pem(authority.pem.as_bytes()).unwrap();
        let now = crate::ids::wall_clock();
        let long = "x".repeat(200);
        for name in ["front-proxy-client", long.as_str()] {
            let certificate = authority.issue(name, ExtendedKeyUsagePurpose::ClientAuth);
            assert_eq!(authorities.name_of(&[certificate], now).as_deref(), Ok(name));
        }
        let wrong_purpose = authority.issue("front-proxy-client", ExtendedKeyUsagePurpose::ServerAuth);
        let stranger = other.issue("front-proxy-client", ExtendedKeyUsagePurpose::ClientAuth);
        for bad in [&[][..], &[wrong_purpose], &[stranger]] {
            assert!(authorities.name_of(bad, now).is_err());
        }
        let late = now + std::time::Duration::from_secs(3_000 * 365 * 86_400);
        let certificate = authority.issue("front-proxy-client", ExtendedKeyUsagePurpose::ClientAuth);
        assert!(authorities.name_of(&[certificate], late).is_err(), "expired");
        assert!(Authorities::of_pem(b"").is_err() && Authorities::of_pem(b"-----BEGIN").is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_name_or_not(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = common_name(&bytes);
        }
    }
}
