//! Certificates: whether the PEM files that the configuration names can be used.

use std::path::Path;

use rustls::RootCertStore;
use rustls::crypto::ring::default_provider;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// What is wrong with a pair of files, and with which of the two.
pub enum PairError {
    Certificate(String),
    Key(String),
}

/// Checks that both files are readable and that the key is the certificate's.
pub fn check_pair(cert_file: &Path, key_file: &Path) -> Result<(), PairError> {
    let chain = chain(cert_file).map_err(PairError::Certificate)?;
    let key = PrivateKeyDer::from_pem_file(key_file)
        .map_err(|error| PairError::Key(describe(key_file, &error, "a private key")))?;
    CertifiedKey::from_der(chain, key, &default_provider()).map(|_| ()).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => PairError::Key(format!(
            "the key in {} does not belong to the certificate in {}",
            key_file.display(),
            cert_file.display()
        )),
        rustls::Error::InvalidCertificate(error) => {
            PairError::Certificate(format!("{} is no usable certificate: {error}", cert_file.display()))
        }
        error => PairError::Key(format!("{} is no usable private key: {error}", key_file.display())),
    })
}

/// Checks that the file holds certificates that can be trusted as authorities.
pub fn check_authorities(ca_file: &Path) -> Result<(), String> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(ca_file)? {
        roots.add(certificate).map_err(|error| format!("{} is no usable certificate: {error}", ca_file.display()))?;
    }
    Ok(())
}

fn chain(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(file).and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>());
    match read {
        Ok(chain) if chain.is_empty() => Err(describe(file, &pem::Error::NoItemsFound, "a certificate")),
        Ok(chain) => Ok(chain),
        Err(error) => Err(describe(file, &error, "a certificate")),
    }
}

fn describe(file: &Path, error: &pem::Error, what: &str) -> String {
    let file = file.display();
    match error {
        pem::Error::Io(error) => format!("cannot read {file}: {error}"),
        pem::Error::NoItemsFound => format!("{file} does not hold {what} in PEM form (-----BEGIN ..-----)"),
        error => format!("{file} is not valid PEM: {error}"),
    }
}
