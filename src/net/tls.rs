//! TLS: server and client configurations from files; certificates are chosen by SNI and re-read when the files change.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex};

use arc_swap::ArcSwap;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use sha2::{Digest, Sha256};

use crate::config::{CertificateFiles, EndpointHost, HttpVersion, ListenerTls, TlsVersion, UpstreamTls};

/// A listener's TLS configuration. Swapped whole when a file changes, so that certificates, client authority and the
/// tickets of sessions (which carry a client's verified identity) always belong together.
pub struct ServerTls {
    files: ListenerTls,
    current: ArcSwap<ServerConfig>,
    /// Of the contents of all files when they were last looked at, good or bad.
    seen: Mutex<[u8; 32]>,
}

/// Reads the files and builds a configuration: HTTP/2 and HTTP/1.1 by ALPN, resumption by tickets. The error is a
/// sentence that names the file.
pub fn server(files: &ListenerTls) -> Result<ServerTls, String> {
    let contents = read_all(files)?;
    Ok(ServerTls {
        files: files.clone(),
        current: ArcSwap::from(build_server(files, &contents)?),
        seen: Mutex::new(digest(&contents)),
    })
}

impl ServerTls {
    /// The configuration for a connection that begins now.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.current.load_full()
    }

    /// Reads the files again; true if they differ from last time and are in use from now on. Files that are missing or
    /// bad change nothing: what was there stays in use, and the error says which file it was (once for each content).
    pub fn reload_if_changed(&self) -> Result<bool, String> {
        let contents = read_all(&self.files)?;
        let digest = digest(&contents);
        // The lock is held to the end, so that two callers can't put an older configuration over a newer one.
        let mut seen = self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if *seen == digest {
            return Ok(false);
        }
        *seen = digest;
        self.current.store(build_server(&self.files, &contents)?);
        Ok(true)
    }
}

/// The configuration for connections to endpoints: their certificates must come from `ca_file`, or where there is none
/// from an authority that this machine trusts. Reads files, and where there is no `ca_file` the machine's trust store:
/// keep what it returns.
pub fn client(tls: &UpstreamTls, http: HttpVersion) -> Result<Arc<ClientConfig>, String> {
    let builder = ClientConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(BOTH_VERSIONS)
        .map_err(|error| error.to_string())?;
    let builder = match &tls.ca_file {
        Some(path) => builder.with_root_certificates(authorities(path, &read(path)?)?),
        None => {
            let verifier = rustls_platform_verifier::Verifier::new(PROVIDER.clone()).map_err(|error| {
                format!("this machine's trusted certificates can't be read ({error}); install ca-certificates, or set tls.ca_file")
            })?;
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
        }
    };
    let mut config = match (&tls.cert_file, &tls.key_file) {
        (None, None) => builder.with_no_client_auth(),
        (Some(cert_file), Some(key_file)) => {
            let chain = chain(cert_file, &read(cert_file)?)?;
            let key = private_key(key_file, &read(key_file)?)?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| mismatch(cert_file, key_file, &error.to_string()))?
        }
        (Some(_), None) => return Err("tls.cert_file needs tls.key_file, the certificate's private key".to_owned()),
        (None, Some(_)) => return Err("tls.key_file needs tls.cert_file, the key's certificate".to_owned()),
    };
    config.alpn_protocols = match http {
        HttpVersion::Auto => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
        HttpVersion::Http1 => vec![b"http/1.1".to_vec()],
        HttpVersion::Http2 => vec![b"h2".to_vec()],
    };
    Ok(Arc::new(config))
}

/// The name that an endpoint's certificate must carry: `tls.server_name`, else the endpoint's own host.
pub fn server_name(tls: &UpstreamTls, host: &EndpointHost) -> Result<ServerName<'static>, String> {
    let name = match (&tls.server_name, host) {
        (Some(name), _) => name.as_str(),
        (None, EndpointHost::Ip(ip)) => return Ok(ServerName::IpAddress((*ip).into())),
        (None, EndpointHost::Name(name)) => name.as_str(),
    };
    ServerName::try_from(name.to_owned()).map_err(|_| {
        format!("{name:?} can't be the name of a certificate; set tls.server_name to a host name or IP address")
    })
}

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));

const BOTH_VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];
const NEW_VERSION: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// A certificate file is a few KiB, a bundle of all authorities some hundred.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// What the files of a listener hold, in the order of the configuration.
struct Contents {
    /// Certificates and key.
    pairs: Vec<(Vec<u8>, Vec<u8>)>,
    client_ca: Option<Vec<u8>>,
}

fn read_all(files: &ListenerTls) -> Result<Contents, String> {
    Ok(Contents {
        pairs: files
            .certificates
            .iter()
            .map(|pair| Ok((read(&pair.cert_file)?, read(&pair.key_file)?)))
            .collect::<Result<_, String>>()?,
        client_ca: files.client_ca_file.as_deref().map(read).transpose()?,
    })
}

fn digest(contents: &Contents) -> [u8; 32] {
    let mut hash = Sha256::new();
    let parts = contents.pairs.iter().flat_map(|(cert, key)| [cert, key]).chain(&contents.client_ca);
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

fn build_server(files: &ListenerTls, contents: &Contents) -> Result<Arc<ServerConfig>, String> {
    let versions = match files.min_version {
        TlsVersion::V1_2 => BOTH_VERSIONS,
        TlsVersion::V1_3 => NEW_VERSION,
    };
    let builder = ServerConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(versions)
        .map_err(|error| error.to_string())?;
    let builder = match (&files.client_ca_file, &contents.client_ca) {
        (Some(path), Some(bytes)) => {
            let roots = Arc::new(authorities(path, bytes)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, PROVIDER.clone())
                .build()
                .map_err(|error| format!("{}: {error}", path.display()))?;
            builder.with_client_cert_verifier(verifier)
        }
        _ => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(Arc::new(Certificates::load(&files.certificates, &contents.pairs)?));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // Tickets keep the resumable sessions at the clients; the small table of rustls remains for those that know none.
    config.ticketer = rustls::crypto::ring::Ticketer::new().map_err(|error| error.to_string())?;
    Ok(Arc::new(config))
}

/// The certificates of a listener by the names they carry.
#[derive(Debug)]
struct Certificates {
    /// Names in lower case. Several certificates of one name differ in their kind of key.
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// `*.example.com` is here as `example.com`; it stands for exactly one label (RFC 9525 section 6.3).
    wildcard: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// For clients that name no server, or one that nobody here is.
    default: Arc<CertifiedKey>,
}

impl Certificates {
    fn load(files: &[CertificateFiles], pairs: &[(Vec<u8>, Vec<u8>)]) -> Result<Certificates, String> {
        let mut exact: HashMap<String, Vec<Arc<CertifiedKey>>> = HashMap::new();
        let mut wildcard: HashMap<String, Vec<Arc<CertifiedKey>>> = HashMap::new();
        let mut default = None;
        for (files, (cert, key)) in files.iter().zip(pairs) {
            let chain = chain(&files.cert_file, cert)?;
            let names = names(&files.cert_file, &chain)?;
            let key = private_key(&files.key_file, key)?;
            let certified = CertifiedKey::from_der(chain, key, &PROVIDER)
                .map_err(|error| mismatch(&files.cert_file, &files.key_file, &error.to_string()))?;
            let certified = Arc::new(certified);
            for name in names {
                match name.strip_prefix("*.") {
                    Some(parent) => wildcard.entry(parent.to_owned()).or_default().push(certified.clone()),
                    None => exact.entry(name).or_default().push(certified.clone()),
                }
            }
            default.get_or_insert(certified);
        }
        let default = default.ok_or("tls.certificates is empty; give at least one {cert_file, key_file}")?;
        Ok(Certificates { exact, wildcard, default })
    }

    fn find(&self, name: &str) -> Option<&[Arc<CertifiedKey>]> {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let found = self.exact.get(&name).or_else(|| {
            let (_label, parent) = name.split_once('.')?;
            self.wildcard.get(parent)
        });
        found.map(Vec::as_slice)
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let candidates = hello.server_name().and_then(|name| self.find(name)).unwrap_or_default();
        let usable = |certified: &&Arc<CertifiedKey>| certified.key.choose_scheme(hello.signature_schemes()).is_some();
        candidates.iter().find(usable).or(candidates.first()).or(Some(&self.default)).cloned()
    }
}

/// The DNS names of a chain's first certificate, in lower case. None at all is no error: it can still be the default.
fn names(path: &Path, chain: &[CertificateDer<'static>]) -> Result<Vec<String>, String> {
    let first = chain.first().ok_or_else(|| no_certificate(path))?;
    let certificate = webpki::EndEntityCert::try_from(first)
        .map_err(|error| format!("{}: the first certificate can't be read: {error:?}", path.display()))?;
    Ok(certificate.valid_dns_names().map(str::to_ascii_lowercase).collect())
}

fn chain(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("{}: not a PEM file of certificates: {error}", path.display()))?;
    if chain.is_empty() { Err(no_certificate(path)) } else { Ok(chain) }
}

fn private_key(path: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| match error {
        rustls_pki_types::pem::Error::NoItemsFound => {
            format!("{}: there is no unencrypted PEM private key in it (PKCS#8, PKCS#1 or SEC1)", path.display())
        }
        error => format!("{}: not a PEM file with a private key: {error}", path.display()),
    })
}

fn authorities(path: &Path, pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(path, pem)? {
        roots.add(certificate).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(roots)
}

fn read(path: impl AsRef<Path>) -> Result<Vec<u8>, String> {
    let path = path.as_ref();
    let read = || {
        use std::io::Read;
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes: Vec<u8> = read().map_err(|error: std::io::Error| format!("{}: {error}", path.display()))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("{}: larger than 4 MiB, which no certificate or key file is", path.display()));
    }
    Ok(bytes)
}

fn no_certificate(path: &Path) -> String {
    format!("{}: there is no PEM certificate in it", path.display())
}

fn mismatch(cert_file: &Path, key_file: &Path, error: &str) -> String {
    format!("{} and {} can't be used together: {error}", cert_file.display(), key_file.display())
}
