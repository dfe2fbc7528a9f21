//! TLS: server and client configurations from files; certificates are chosen by SNI and re-read when the files change.

pub mod asking;

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
    /// bad change nothing: what was there stays in use, and the error says which file it was (of a bad one only once, until
    /// it changes again).
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::path::PathBuf;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::{HandshakeKind, ProtocolVersion};
    use tempfile::TempDir;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;

    /// A directory with an authority in `ca.crt`, which signs what [`Files::issue`] writes.
    struct Files {
        directory: TempDir,
        issuer: Issuer<'static, KeyPair>,
    }

    impl Files {
        fn new() -> Files {
            let directory = tempfile::tempdir().unwrap();
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            let authority = params.self_signed(&key).unwrap();
            std::fs::write(directory.path().join("ca.crt"), authority.pem()).unwrap();
            Files { directory, issuer: Issuer::new(params, key) }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn issue(&self, file: &str, names: &[&str]) -> CertificateFiles {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let key = KeyPair::generate().unwrap();
            let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
            let files = CertificateFiles {
                cert_file: self.path(&format!("{file}.crt")),
                key_file: self.path(&format!("{file}.key")),
            };
            std::fs::write(&files.cert_file, certificate.pem()).unwrap();
            std::fs::write(&files.key_file, key.serialize_pem()).unwrap();
            files
        }

        fn upstream(&self) -> UpstreamTls {
            UpstreamTls { ca_file: Some(self.path("ca.crt")), ..UpstreamTls::default() }
        }

        /// Issues by this authority, but writes where the other's files are (this directory is gone by then).
        fn issue_in(&self, other: &Files, file: &str) -> CertificateFiles {
            let from = self.issue(file, &["stranger.example"]);
            let to = CertificateFiles {
                cert_file: other.path(&format!("{file}.crt")),
                key_file: other.path(&format!("{file}.key")),
            };
            std::fs::copy(from.cert_file, &to.cert_file).unwrap();
            std::fs::copy(from.key_file, &to.key_file).unwrap();
            to
        }

        /// A copy of this authority among the other's files.
        fn path_of_copy(&self, other: &Files) -> PathBuf {
            let path = other.path("new-ca.crt");
            std::fs::copy(self.path("ca.crt"), &path).unwrap();
            path
        }

        fn upstream_in(&self, other: &Files) -> UpstreamTls {
            UpstreamTls { ca_file: Some(self.path_of_copy(other)), ..UpstreamTls::default() }
        }
    }

    fn listener(certificates: Vec<CertificateFiles>) -> ListenerTls {
        ListenerTls { certificates, client_ca_file: None, min_version: TlsVersion::V1_2 }
    }

    /// What a client saw of a handshake after which both sides sent a byte.
    struct Seen {
        certificate: CertificateDer<'static>,
        alpn: Option<Vec<u8>>,
        version: Option<ProtocolVersion>,
        kind: Option<HandshakeKind>,
    }

    fn handshake(server: &ServerTls, client: Arc<ClientConfig>, name: &str) -> Result<Seen, String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let socket = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let address = socket.local_addr().unwrap();
            let acceptor = TlsAcceptor::from(server.config());
            let accept = async {
                let (stream, _) = socket.accept().await.unwrap();
                let mut stream = acceptor.accept(stream).await.map_err(|error| format!("server: {error}"))?;
                let byte = stream.read_u8().await.map_err(|error| format!("server: {error}"))?;
                stream.write_u8(byte).await.map_err(|error| format!("server: {error}"))?;
                stream.shutdown().await.map_err(|error| format!("server: {error}"))
            };
            let connect = async {
                let stream = tokio::net::TcpStream::connect(address).await.unwrap();
                let name = ServerName::try_from(name.to_owned()).unwrap();
                let connector = TlsConnector::from(client);
                let mut stream = connector.connect(name, stream).await.map_err(|error| format!("client: {error}"))?;
                stream.write_u8(7).await.map_err(|error| format!("client: {error}"))?;
                let mut answer = Vec::new();
                // To the end, so that the session's tickets have come.
                stream.read_to_end(&mut answer).await.map_err(|error| format!("client: {error}"))?;
                assert_eq!(answer, [7]);
                let session = stream.get_ref().1;
                Ok::<_, String>(Seen {
                    certificate: session.peer_certificates().unwrap()[0].clone().into_owned(),
                    alpn: session.alpn_protocol().map(<[u8]>::to_vec),
                    version: session.protocol_version(),
                    kind: session.handshake_kind(),
                })
            };
            let (accepted, seen) = tokio::join!(accept, connect);
            // One of the two errors is the reason, the other only the alert that followed from it.
            match (accepted, seen) {
                (Ok(()), seen) => seen,
                (Err(server), Ok(_)) => Err(server),
                (Err(server), Err(client)) => Err(format!("{server}; {client}")),
            }
        })
    }

    fn certificate(files: &CertificateFiles) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(&files.cert_file).unwrap()
    }

    #[test]
    fn the_certificate_is_chosen_by_the_name_that_the_client_asks_for() {
        let files = Files::new();
        let first = files.issue("first", &["first.example", "127.0.0.1"]);
        let exact = files.issue("exact", &["a.wild.example"]);
        let wildcard = files.issue("wildcard", &["*.wild.example", "other.example"]);
        let server = server(&listener(vec![first.clone(), wildcard.clone(), exact.clone()])).unwrap();
        let client = client(&files.upstream(), HttpVersion::Auto).unwrap();
        for (name, expected) in [
            ("first.example", &first),
            ("a.wild.example", &exact),
            ("A.Wild.Example", &exact),
            ("b.wild.example", &wildcard),
            ("other.example", &wildcard),
            // An address is never sent as SNI.
            ("127.0.0.1", &first),
        ] {
            let seen = handshake(&server, client.clone(), name).unwrap();
            assert_eq!(seen.certificate, certificate(expected), "{name}");
        }
        // Nobody is that; the client is given the first one, and refuses it.
        for name in ["unknown.example", "a.b.wild.example", "wild.example"] {
            let error = handshake(&server, client.clone(), name).err().unwrap();
            assert!(error.contains("client: invalid peer certificate"), "{name}: {error}");
            assert!(error.contains("first.example"), "{name}: {error}");
        }
    }

    #[test]
    fn http2_is_preferred_and_each_side_may_ask_for_one_only() {
        let files = Files::new();
        let server = server(&listener(vec![files.issue("a", &["a.example"])])).unwrap();
        for (http, expected) in
            [(HttpVersion::Auto, "h2"), (HttpVersion::Http2, "h2"), (HttpVersion::Http1, "http/1.1")]
        {
            let client = client(&files.upstream(), http).unwrap();
            let seen = handshake(&server, client, "a.example").unwrap();
            assert_eq!(seen.alpn.as_deref(), Some(expected.as_bytes()));
            assert_eq!(seen.version, Some(ProtocolVersion::TLSv1_3));
        }
    }

    #[test]
    fn the_minimal_version_holds() {
        let files = Files::new();
        let mut tls = listener(vec![files.issue("a", &["a.example"])]);
        let roots = authorities(&files.path("ca.crt"), &read(files.path("ca.crt")).unwrap()).unwrap();
        let old_client = Arc::new(
            ClientConfig::builder_with_provider(PROVIDER.clone())
                .with_protocol_versions(&[&rustls::version::TLS12])
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth(),
        );
        let seen = handshake(&server(&tls).unwrap(), old_client.clone(), "a.example").unwrap();
        assert_eq!((seen.version, seen.alpn), (Some(ProtocolVersion::TLSv1_2), None));
        tls.min_version = TlsVersion::V1_3;
        assert!(handshake(&server(&tls).unwrap(), old_client, "a.example").is_err());
    }

    #[test]
    fn sessions_are_resumed() {
        let files = Files::new();
        let server = server(&listener(vec![files.issue("a", &["a.example"])])).unwrap();
        let client = client(&files.upstream(), HttpVersion::Auto).unwrap();
        let kinds = [(); 2].map(|()| handshake(&server, client.clone(), "a.example").unwrap().kind);
        assert_eq!(kinds, [Some(HandshakeKind::Full), Some(HandshakeKind::Resumed)]);
    }

    #[test]
    fn with_a_client_authority_only_its_clients_come_in() {
        let files = Files::new();
        let mut tls = listener(vec![files.issue("a", &["a.example"])]);
        tls.client_ca_file = Some(files.path("ca.crt"));
        let server = server(&tls).unwrap();

        let anonymous = client(&files.upstream(), HttpVersion::Auto).unwrap();
        let refusal = |client| handshake(&server, client, "a.example").err().unwrap();
        let error = refusal(anonymous);
        assert!(error.contains("server: peer sent no certificates"), "{error}");

        let with = |pair: CertificateFiles| {
            let tls =
                UpstreamTls { cert_file: Some(pair.cert_file), key_file: Some(pair.key_file), ..files.upstream() };
            client(&tls, HttpVersion::Auto).unwrap()
        };
        let known = with(files.issue("client", &["client.example"]));
        assert!(handshake(&server, known.clone(), "a.example").is_ok());
        let stranger = with(Files::new().issue_in(&files, "stranger"));
        let error = refusal(stranger);
        assert!(error.contains("server: invalid peer certificate"), "{error}");

        // When the authority is replaced, an old client can't slip in by a ticket either.
        std::fs::copy(Files::new().path_of_copy(&files), files.path("ca.crt")).unwrap();
        assert_eq!(server.reload_if_changed(), Ok(true));
        let error = refusal(known);
        assert!(error.contains("server: invalid peer certificate"), "{error}");
    }

    #[test]
    fn changed_files_are_taken_up_and_bad_ones_are_not() {
        let files = Files::new();
        let pair = files.issue("a", &["a.example"]);
        let server = server(&listener(vec![pair.clone()])).unwrap();
        let client = client(&files.upstream(), HttpVersion::Auto).unwrap();
        let served = || handshake(&server, client.clone(), "a.example").unwrap().certificate;
        let old = certificate(&pair);
        assert_eq!(served(), old);
        assert_eq!(server.reload_if_changed(), Ok(false));

        files.issue("a", &["a.example"]);
        assert_eq!(server.reload_if_changed(), Ok(true));
        let new = certificate(&pair);
        assert_ne!(new, old);
        assert_eq!(served(), new);
        assert_eq!(server.reload_if_changed(), Ok(false));

        // The certificate is there already, its key not yet.
        let other = files.issue("other", &["a.example"]);
        std::fs::copy(&other.cert_file, &pair.cert_file).unwrap();
        let error = server.reload_if_changed().unwrap_err();
        assert!(error.contains("a.crt") && error.contains("a.key"), "{error}");
        assert_eq!(served(), new);
        std::fs::copy(&other.key_file, &pair.key_file).unwrap();
        assert_eq!(server.reload_if_changed(), Ok(true));
        assert_eq!(served(), certificate(&other));

        std::fs::remove_file(&pair.key_file).unwrap();
        assert!(server.reload_if_changed().unwrap_err().contains("a.key"));
        assert_eq!(served(), certificate(&other));
    }

    #[test]
    fn an_endpoint_of_another_authority_is_refused() {
        let files = Files::new();
        let server = server(&listener(vec![files.issue("a", &["a.example"])])).unwrap();
        let client = client(&Files::new().upstream_in(&files), HttpVersion::Auto).unwrap();
        let error = handshake(&server, client, "a.example").err().unwrap();
        assert!(error.contains("client: invalid peer certificate"), "{error}");
    }

    #[test]
    fn bad_files_are_named() {
        let files = Files::new();
        let good = files.issue("good", &["a.example"]);
        let other = files.issue("other", &["a.example"]);
        std::fs::write(files.path("empty"), "").unwrap();
        std::fs::write(files.path("cut"), "-----BEGIN CERTIFICATE-----\nMIIB").unwrap();
        let message = |cert: &Path, key: &Path| {
            let pair = CertificateFiles { cert_file: cert.to_owned(), key_file: key.to_owned() };
            server(&listener(vec![pair])).err().unwrap()
        };
        for (cert, key, file, reason) in [
            (files.path("none"), good.key_file.clone(), "none", "No such file"),
            (files.path("empty"), good.key_file.clone(), "empty", "no PEM certificate"),
            (files.path("cut"), good.key_file.clone(), "cut", "not a PEM file"),
            (good.cert_file.clone(), files.path("empty"), "empty", "no unencrypted PEM private key"),
            (good.cert_file.clone(), other.key_file.clone(), "other.key", "can't be used together"),
        ] {
            let message = message(&cert, &key);
            assert!(message.contains(file) && message.contains(reason), "{message}");
        }
        assert!(server(&listener(Vec::new())).err().unwrap().contains("tls.certificates is empty"));

        let without_key = UpstreamTls { cert_file: Some(good.cert_file), ..files.upstream() };
        assert!(client(&without_key, HttpVersion::Auto).unwrap_err().contains("tls.key_file"));
        let bad_authority = UpstreamTls { ca_file: Some(files.path("empty")), ..UpstreamTls::default() };
        assert!(client(&bad_authority, HttpVersion::Auto).unwrap_err().contains("empty"));
    }

    #[test]
    fn the_name_to_verify_is_the_configured_one_or_the_endpoints_host() {
        let named = UpstreamTls { server_name: Some("agents.example".to_owned()), ..UpstreamTls::default() };
        let ip = EndpointHost::Ip(Ipv4Addr::new(10, 0, 0, 1).into());
        assert_eq!(server_name(&named, &ip).unwrap(), ServerName::try_from("agents.example").unwrap());
        assert_eq!(server_name(&UpstreamTls::default(), &ip).unwrap(), ServerName::try_from("10.0.0.1").unwrap());
        let host = EndpointHost::Name("agents.svc".to_owned());
        assert_eq!(server_name(&UpstreamTls::default(), &host).unwrap(), ServerName::try_from("agents.svc").unwrap());
        let bad = EndpointHost::Name("not a name".to_owned());
        assert!(server_name(&UpstreamTls::default(), &bad).unwrap_err().contains("tls.server_name"));
    }
}
