//! Transports: TLS, HTTP/2, unix sockets and the PROXY protocol, on both sides of the proxy.

mod support;

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const GET: &str = "GET / HTTP/1.1\r\nHost: agents.test\r\n\r\n";

/// One service of one version with these endpoints; `version` are more keys of the version.
fn service(endpoint: &str, version: &str) -> String {
    format!(
        "services:\n  - name: support\n    versions:\n      - {{name: stable, endpoints: [\"{endpoint}\"]{version}}}\n"
    )
}

fn tls_listener(certificates: &[&Certificate], more: &str) -> String {
    let pairs: Vec<String> = certificates
        .iter()
        .map(|it| format!("{{cert_file: '{}', key_file: '{}'}}", it.cert_file.display(), it.key_file.display()))
        .collect();
    format!("listeners: [{{address: '127.0.0.1:0', tls: {{certificates: [{}]{more}}}}}]\n", pairs.join(", "))
}

async fn tls_handshake(
    address: std::net::SocketAddr,
    name: &str,
    config: Arc<rustls::ClientConfig>,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(name.to_owned()).expect("a server name");
    within("TLS handshake", tokio_rustls::TlsConnector::from(config).connect(name, stream)).await
}

/// The certificate that the proxy shows to a client that asks for `name`.
async fn shown(address: std::net::SocketAddr, name: &str, trusted: &Certificate) -> CertificateDer<'static> {
    let stream = tls_handshake(address, name, trusted.client(&["http/1.1"])).await.expect("TLS handshake");
    let certificates = stream.get_ref().1.peer_certificates().expect("a server shows one");
    certificates[0].clone().into_owned()
}

#[tokio::test]
async fn tls_chooses_the_certificate_by_name_and_the_protocol_by_alpn() {
    let files = tempfile::tempdir().expect("a directory");
    let one = Certificate::create(files.path(), &["one.test"]);
    let two = Certificate::create(files.path(), &["two.test"]);
    let backend = Backend::start().await;
    let proxy = start_proxy(&format!("{}{}", tls_listener(&[&one, &two], ""), service(backend.url(), ""))).await;

    assert_eq!(&shown(proxy.address, "one.test", &one).await, one.der());
    assert_eq!(&shown(proxy.address, "two.test", &two).await, two.der());

    let mut http1 = RawClient::connect_tls(proxy.address, "two.test", two.client(&["http/1.1"])).await;
    http1.send(GET).await;
    assert_eq!(http1.read_response().await.text(), "ok");
    assert_eq!(backend.request(1).await.header("x-forwarded-proto"), Some("https"));

    let http2 = Http2Client::connect_tls(proxy.address, "one.test", one.client(&["h2"])).await;
    assert_eq!(http2.fetch(http2_request("GET", proxy.address, "/"), b"").await.text(), "ok");

    // Without ALPN it is HTTP/1.1, whatever the first bytes look like.
    let mut silent = RawClient::connect_tls(proxy.address, "one.test", one.client(&[])).await;
    silent.send(GET).await;
    assert_eq!(silent.read_response().await.text(), "ok");
}

#[tokio::test]
async fn client_certificates_are_required_where_an_authority_is_set() {
    let files = tempfile::tempdir().expect("a directory");
    let server = Certificate::create(files.path(), &["server.test"]);
    let client = Certificate::create(files.path(), &["client.test"]);
    let stranger = Certificate::create(files.path(), &["stranger.test"]);
    let backend = Backend::start().await;
    let authority = format!(", client_ca_file: '{}'", client.cert_file.display());
    let proxy = start_proxy(&format!("{}{}", tls_listener(&[&server], &authority), service(backend.url(), ""))).await;

    let with = |certificate: &Certificate| {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(server.der().clone()).expect("a certificate");
        let chain = vec![CertificateDer::from_pem_file(&certificate.cert_file).expect("PEM")];
        let key = PrivateKeyDer::from_pem_file(&certificate.key_file).expect("PEM");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .expect("they match");
        Arc::new(config)
    };
    let mut known = RawClient::connect_tls(proxy.address, "server.test", with(&client)).await;
    known.send(GET).await;
    assert_eq!(known.read_response().await.status(), 200);

    for config in [server.client(&[]), with(&stranger)] {
        // In TLS 1.3 the client hears of it only after its own half of the handshake.
        if let Ok(mut stream) = tls_handshake(proxy.address, "server.test", config).await {
            let _ = stream.write_all(GET.as_bytes()).await;
            let mut answer = Vec::new();
            let read = within("the refusal", stream.read_to_end(&mut answer)).await;
            assert!(read.is_err() && answer.is_empty(), "{read:?} {answer:?}");
        }
    }
    assert_eq!(backend.request_count(), 1);
}

#[tokio::test]
async fn new_certificates_are_used_for_new_connections_and_open_ones_go_on() {
    let files = tempfile::tempdir().expect("a directory");
    let old = Certificate::create(files.path(), &["agents.test"]);
    let backend = Backend::start().await;
    backend.drip_each();
    let config = format!("{}{}", tls_listener(&[&old], ""), service(backend.url(), ""));
    let proxy = start_proxy(&config).await;
    let mut open = RawClient::connect_tls(proxy.address, "agents.test", old.client(&[])).await;
    open.send(GET).await;
    let drip = backend.drip().await;
    drip.event("before").await;
    open.read_head().await;
    open.read_chunks_until("before").await;

    // Half of the pair is replaced: the old pair stays in use.
    let key = std::fs::read(&old.key_file).expect("readable");
    let new = Certificate::create(files.path(), &["agents.test"]);
    let new_key = std::fs::read(&new.key_file).expect("readable");
    std::fs::write(&new.key_file, key).expect("writable");
    assert_eq!(proxy.reload(&config).await.status(), 400);
    assert_eq!(&shown(proxy.address, "agents.test", &old).await, old.der());

    std::fs::write(&new.key_file, new_key).expect("writable");
    assert_eq!(proxy.reload(&config).await.status(), 200);
    assert_eq!(&shown(proxy.address, "agents.test", &new).await, new.der());
    drip.event("after").await;
    open.read_chunks_until("after").await;
    drip.finish().await;
    assert_eq!(open.read_chunk().await, None);
}

#[tokio::test]
async fn one_cleartext_port_speaks_both_versions() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(backend.url(), "")).await;
    assert_eq!(get(proxy.address, "/", "").await.text(), "ok");
    let http2 = Http2Client::connect(proxy.address).await;
    let response = http2.fetch(http2_request("POST", proxy.address, "/a?b=c"), b"body").await;
    assert_eq!((response.status(), response.text().as_str()), (200, "ok"));
    let request = backend.request(2).await;
    assert_eq!((request.target.as_str(), request.body.as_slice()), ("/a?b=c", b"body".as_slice()));
    assert_eq!(request.authority, proxy.address.to_string());

    // The preface may come byte by byte.
    let mut slow = TcpStream::connect(proxy.address).await.expect("something listens");
    slow.set_nodelay(true).expect("a TCP socket");
    for byte in PREFACE {
        slow.write_all(&[*byte]).await.expect("open");
    }
    write_frame(&mut slow, SETTINGS, 0, 0, &[]).await;
    assert_eq!(read_frame(&mut slow).await.kind, SETTINGS);
}

#[tokio::test]
async fn unix_sockets_on_both_sides() {
    let files = tempfile::tempdir().expect("a directory");
    let backend = Backend::start_unix(&files.path().join("agent.sock")).await;
    let path = files.path().join("public.sock");
    let listener = format!("listeners: [{{name: public, address: 'unix:{}'}}]\n", path.display());
    let proxy = start_proxy(&format!("{listener}{}", service(backend.url(), ""))).await;
    let mut client = RawClient::connect_unix(&path).await;
    for _ in 0..2 {
        client.send(GET).await;
        assert_eq!(client.read_response().await.text(), "ok");
    }
    assert_eq!(backend.connections(), 1, "the connection to the endpoint is kept");
    assert!(proxy.endpoint(&backend.name()).await.is_some(), "{}", backend.name());
    drop(client);
    drop(proxy);
    eventually("the listener takes its file along", || !path.exists()).await;
}

#[tokio::test]
async fn https_endpoints_are_verified() {
    let files = tempfile::tempdir().expect("a directory");
    let certificate = Certificate::create(files.path(), &["localhost"]);
    let other = Certificate::create(files.path(), &["agent.internal"]);
    let backend = Backend::start_tls(&certificate, &["http/1.1"]).await;
    let renamed = Backend::start_tls(&other, &["http/1.1"]).await;
    let ca = |path: &Path, more: &str| format!(", tls: {{ca_file: '{}'{more}}}", path.display());

    let good = start_proxy(&service(backend.url(), &ca(&certificate.cert_file, ""))).await;
    assert_eq!(get(good.address, "/", "").await.text(), "ok");
    let named = ca(&other.cert_file, ", server_name: agent.internal");
    let named = start_proxy(&service(renamed.url(), &named)).await;
    assert_eq!(get(named.address, "/", "").await.text(), "ok");

    let wrong_ca = start_proxy(&service(backend.url(), &ca(&other.cert_file, ""))).await;
    let wrong_name = start_proxy(&service(renamed.url(), &ca(&other.cert_file, ""))).await;
    for proxy in [&wrong_ca, &wrong_name] {
        let answer = get(proxy.address, "/", "").await;
        assert_eq!((answer.status(), answer.code().as_deref()), (502, Some("tls_failed")));
    }
    assert_eq!((backend.request_count(), renamed.request_count()), (1, 1));
}

#[tokio::test]
async fn endpoints_speak_http2_by_alpn_and_by_configuration() {
    let files = tempfile::tempdir().expect("a directory");
    let certificate = Certificate::create(files.path(), &["localhost"]);
    let by_alpn = Backend::start_tls(&certificate, &["h2", "http/1.1"]).await;
    let known = Backend::start_http2().await;
    let tls = format!(", tls: {{ca_file: '{}'}}", certificate.cert_file.display());
    for (backend, version) in [(&by_alpn, tls), (&known, ", http: 2".to_owned())] {
        backend.each(|_| Script::echo());
        let proxy = start_proxy(&service(backend.url(), &version)).await;
        for round in 1..=3 {
            let answer =
                post(proxy.address, "/x?y=1", "Cookie: a=1\r\nConnection: x-hop\r\nX-Hop: 1\r\n", "hello").await;
            assert_eq!((answer.status(), answer.text().as_str()), (200, "hello"));
            let request = backend.request(round).await;
            assert!(request.raw_head.is_empty(), "it came over HTTP/1.1");
            assert_eq!(request.authority, "agents.test");
            assert_eq!(request.target, "/x?y=1");
            assert_eq!(request.header("x-hop"), None);
            assert_eq!(request.header("cookie"), Some("a=1"));
        }
    }
    // Clients of several workers, each of which has a connection of its own.
    assert!(known.connections() <= 2, "{} connections", known.connections());
}

// ---- PROXY protocol ----

const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

fn proxied(trusted: &str) -> String {
    format!("listeners: [{{address: '127.0.0.1:0', proxy_protocol: accept, trusted_proxies: [{trusted}]}}]\n")
}

fn v2_header(source: [u8; 4]) -> Vec<u8> {
    let mut header = V2_SIGNATURE.to_vec();
    header.extend([0x21, 0x11, 0, 12]);
    header.extend(source);
    header.extend([127, 0, 0, 1, 0x30, 0x39, 0, 80]);
    header
}

#[tokio::test]
async fn a_trusted_peer_tells_the_client_by_the_proxy_protocol() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&format!("{}{}", proxied("127.0.0.0/8"), service(backend.url(), ""))).await;
    let headers: [(Vec<u8>, &str); 4] = [
        (b"PROXY TCP4 203.0.113.7 127.0.0.1 56324 80\r\n".to_vec(), "203.0.113.7"),
        (b"PROXY TCP6 2001:db8::7 ::1 56324 80\r\n".to_vec(), "2001:db8::7"),
        (b"PROXY UNKNOWN\r\n".to_vec(), "127.0.0.1"),
        (v2_header([203, 0, 113, 9]), "203.0.113.9"),
    ];
    let mut count = 0;
    for (header, client_address) in &headers {
        let whole = [header.as_slice(), GET.as_bytes()].concat();
        for step in [whole.len(), 1] {
            let mut client = proxy.connect().await;
            for piece in whole.chunks(step) {
                client.send(piece).await;
            }
            assert_eq!(client.read_response().await.text(), "ok");
            count += 1;
            assert_eq!(backend.request(count).await.header("x-forwarded-for"), Some(*client_address));
        }
    }
    // HTTP/2 behind the header.
    let mut stream = TcpStream::connect(proxy.address).await.expect("something listens");
    stream.write_all(&v2_header([203, 0, 113, 10])).await.expect("open");
    let http2 = Http2Client::over(stream).await;
    assert_eq!(http2.fetch(http2_request("GET", proxy.address, "/"), b"").await.text(), "ok");
    assert_eq!(backend.request(count + 1).await.header("x-forwarded-for"), Some("203.0.113.10"));

    // It must be there.
    let mut client = proxy.connect().await;
    client.send(GET).await;
    assert_eq!(client.closed().await, b"");
}

#[tokio::test]
async fn an_untrusted_peer_can_not_say_who_it_is() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&format!("{}{}", proxied("10.0.0.0/8"), service(backend.url(), ""))).await;
    for header in [b"PROXY TCP4 203.0.113.7 127.0.0.1 56324 80\r\n".to_vec(), v2_header([203, 0, 113, 9])] {
        let mut client = proxy.connect().await;
        client.send([header.as_slice(), GET.as_bytes()].concat()).await;
        assert_eq!(client.read_response().await.status(), 400);
        client.closed().await;
    }
    assert_eq!(backend.request_count(), 0);
    assert_eq!(get(proxy.address, "/", "").await.status(), 200);
}

// ---- HTTP/2, the client's side ----

#[tokio::test]
async fn many_streams_share_one_connection() {
    let backend = Backend::start().await;
    backend.each(|_| Script::echo());
    let proxy = start_proxy(&service(backend.url(), "")).await;
    let client = Http2Client::connect(proxy.address).await;
    let fetches = (0..100).map(|number| {
        let (client, address) = (&client, proxy.address);
        async move {
            let body = format!("body {number} ").repeat(number * 50 + 1);
            let answer = client.fetch(http2_request("POST", address, "/"), body.as_bytes()).await;
            assert_eq!(answer.status(), 200);
            assert!(!answer.truncated && answer.text() == body, "stream {number}");
        }
    });
    join_all(fetches).await;
    assert_eq!(backend.request_count(), 100);
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

async fn join_all(futures: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut futures: Vec<_> = futures.map(Box::pin).collect();
    std::future::poll_fn(|context| {
        futures.retain_mut(|future| future.as_mut().poll(context).is_pending());
        if futures.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

async fn next_data(body: &mut h2::RecvStream) -> Option<Result<Bytes, h2::Error>> {
    let data = within("data", body.data()).await;
    if let Some(Ok(data)) = &data {
        let _ = body.flow_control().release_capacity(data.len());
    }
    data
}

async fn data_until(body: &mut h2::RecvStream, text: &str) {
    let mut seen = String::new();
    while !seen.contains(text) {
        let data = next_data(body).await.unwrap_or_else(|| panic!("ended before {text:?}: {seen:?}"));
        seen.push_str(&String::from_utf8_lossy(&data.expect("no reset")));
    }
}

/// Both kinds of endpoint, and the version keys that each needs.
async fn both_backends() -> [(Backend, &'static str); 2] {
    [(Backend::start().await, ""), (Backend::start_http2().await, ", http: 2")]
}

#[tokio::test]
async fn each_event_is_flushed_and_trailers_pass() {
    for (backend, version) in both_backends().await {
        backend.drip_each();
        let proxy = start_proxy(&service(backend.url(), version)).await;
        let client = Http2Client::connect(proxy.address).await;
        let mut request = http2_request("POST", proxy.address, "/");
        request.headers_mut().insert("te", "trailers".parse().expect("a value"));
        let stream = client.open(request, true).await;
        let drip = backend.drip().await;
        assert_eq!(drip.request.header("te"), Some("trailers"));
        drip.event("one").await;
        let (head, mut body) = stream.head().await;
        assert_eq!(head.status, 200);
        data_until(&mut body, "data: one\n\n").await;
        for number in 0..20 {
            drip.event(&number.to_string()).await;
            data_until(&mut body, &format!("data: {number}\n\n")).await;
        }
        drip.finish_with(&[("x-cost", "42")]).await;
        assert!(next_data(&mut body).await.is_none());
        let trailers = within("trailers", body.trailers()).await.expect("no reset").expect("trailers");
        assert_eq!(trailers["x-cost"], "42");
    }
}

#[tokio::test]
async fn a_reset_by_the_client_reaches_the_endpoint_at_once() {
    for (backend, version) in both_backends().await {
        backend.drip_each();
        let proxy = start_proxy(&service(backend.url(), version)).await;
        let client = Http2Client::connect(proxy.address).await;
        let mut stream = client.open(http2_request("POST", proxy.address, "/"), true).await;
        let drip = backend.drip().await;
        drip.event("one").await;
        proxy.metric_becomes("longhaul_outstanding_runs", &[], 1.0).await;
        stream.reset();
        drip.until_gone().await;
        proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
        proxy.metric_becomes("longhaul_runs_total", &["outcome=\"cancelled\""], 1.0).await;

        // Before there is an answer, and with the whole connection.
        let gate = Gate::new();
        backend.next(Script::ok("late").after(&gate));
        let _stream = client.open(http2_request("POST", proxy.address, "/"), true).await;
        backend.request(2).await;
        client.abort();
        eventually("the endpoint hears of it", || backend.in_flight() == 0).await;
        proxy.metric_becomes("longhaul_runs_total", &["outcome=\"cancelled\""], 2.0).await;
        proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
    }
}

#[tokio::test]
async fn an_endpoint_that_breaks_off_resets_the_stream() {
    for (backend, version) in both_backends().await {
        backend.drip_each();
        let proxy = start_proxy(&service(backend.url(), version)).await;
        let client = Http2Client::connect(proxy.address).await;
        let stream = client.open(http2_request("POST", proxy.address, "/"), true).await;
        let drip = backend.drip().await;
        drip.event("one").await;
        let (_, mut body) = stream.head().await;
        data_until(&mut body, "one").await;
        drip.cut().await;
        let error = next_data(&mut body).await.expect("never an end as if complete").expect_err("a reset");
        assert_eq!(error.reason(), Some(h2::Reason::INTERNAL_ERROR));
        proxy.metric_becomes("longhaul_runs_total", &["outcome=\"truncated\""], 1.0).await;
        // The connection goes on.
        backend.next(Script::ok("fine"));
        assert_eq!(client.fetch(http2_request("GET", proxy.address, "/"), b"").await.text(), "fine");
    }
}

/// More than all windows and socket buffers on the way can take.
const LARGE_BYTES: usize = 32 * 1024 * 1024;

#[tokio::test]
async fn a_stream_that_is_not_read_holds_back_its_endpoint_and_nobody_else() {
    for (backend, version) in both_backends().await {
        let proxy = start_proxy(&service(backend.url(), version)).await;
        let client = Http2Client::connect(proxy.address).await;
        backend.next(Script::answer(200, &[], &"x".repeat(LARGE_BYTES)));
        let stalled = client.open(http2_request("GET", proxy.address, "/"), true).await;
        let (_, mut body) = stalled.head().await;
        for _ in 0..50 {
            assert_eq!(client.fetch(http2_request("GET", proxy.address, "/"), b"").await.text(), "ok");
        }
        assert_eq!(backend.in_flight(), 1, "the endpoint could send all of it: it was buffered");
        let mut length = 0;
        while let Some(data) = next_data(&mut body).await {
            length += data.expect("no reset").len();
        }
        assert_eq!(length, LARGE_BYTES);
    }
}

#[tokio::test]
async fn an_endpoint_that_does_not_read_holds_back_its_stream_and_nobody_else() {
    for (backend, version) in both_backends().await {
        let proxy = start_proxy(&service(backend.url(), version)).await;
        let client = Http2Client::connect(proxy.address).await;
        let gate = Gate::new();
        let mut script = Script::ok("read");
        script.0.insert(0, Step::Stall(gate.clone()));
        backend.next(script);
        let mut upload = client.open(http2_request("POST", proxy.address, "/"), false).await;
        backend.request(1).await;
        let body = vec![b'x'; LARGE_BYTES];
        let others = async {
            for _ in 0..50 {
                assert_eq!(client.fetch(http2_request("POST", proxy.address, "/"), b"small").await.text(), "ok");
            }
        };
        let mut sending = Box::pin(async move {
            for piece in body.chunks(LARGE_BYTES / 32) {
                upload.send(piece, false).await;
            }
            upload.send(b"", true).await;
            upload
        });
        tokio::select! {
            _upload = &mut sending => panic!("all of it was taken: it was buffered"),
            () = others => {}
        }
        gate.open();
        assert_eq!(sending.await.head().await.0.status, 200);
        assert_eq!(backend.requests()[0].body.len(), LARGE_BYTES);
    }
}

#[tokio::test]
async fn crumbs_of_cookies_are_joined() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(backend.url(), "")).await;
    let client = Http2Client::connect(proxy.address).await;
    let mut request = http2_request("GET", proxy.address, "/");
    for crumb in ["a=1", "b=2", "c=3"] {
        request.headers_mut().append("cookie", crumb.parse().expect("a value"));
    }
    client.fetch(request, b"").await;
    let seen = backend.request(1).await;
    let cookies: Vec<_> = seen.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("cookie")).collect();
    assert_eq!(cookies.len(), 1);
    assert_eq!(cookies[0].1, "a=1; b=2; c=3");
}

// ---- HTTP/2 by hand, for what a correct client never sends ----

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

async fn write_frame(stream: &mut TcpStream, kind: u8, flags: u8, id: u32, payload: &[u8]) {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(id.to_be_bytes());
    frame.extend(payload);
    stream.write_all(&frame).await.expect("open");
}

async fn read_frame(stream: &mut TcpStream) -> Frame {
    within("a frame", async {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.expect("a frame");
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await.expect("a whole frame");
        let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Frame { kind: head[3], flags: head[4], stream: id, payload }
    })
    .await
}

/// The next frame of a stream (frames of the connection are passed over).
async fn read_stream_frame(stream: &mut TcpStream) -> Frame {
    loop {
        let frame = read_frame(stream).await;
        if frame.stream != 0 {
            return frame;
        }
        assert_ne!(frame.kind, GOAWAY, "the whole connection was given up: {:?}", frame.payload);
    }
}

/// A field section of literals (RFC 7541 section 6.2.2).
fn field_section(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut section = Vec::new();
    for (name, value) in fields {
        section.push(0);
        for text in [name, value] {
            section.push(u8::try_from(text.len()).expect("short"));
            section.extend(text.as_bytes());
        }
    }
    section
}

async fn connect_by_hand(proxy: &Proxy) -> TcpStream {
    let mut stream = TcpStream::connect(proxy.address).await.expect("something listens");
    stream.write_all(PREFACE).await.expect("open");
    write_frame(&mut stream, SETTINGS, 0, 0, &[]).await;
    stream
}

#[tokio::test]
async fn a_malformed_request_is_an_error_of_its_stream_alone() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(backend.url(), "")).await;
    let mut connection = connect_by_hand(&proxy).await;
    let head = |method: &'static str, path: &'static str| {
        vec![(":method", method), (":scheme", "http"), (":path", path), (":authority", "agents.test")]
    };
    let with = |name: &'static str, value: &'static str| {
        let mut fields = head("GET", "/");
        fields.push((name, value));
        fields
    };
    let malformed = [
        with("connection", "close"),
        with("keep-alive", "5"),
        with("proxy-connection", "close"),
        with("transfer-encoding", "chunked"),
        with("upgrade", "websocket"),
        with("te", "gzip"),
        with("host", "other.test"),
        with("content-length", "5"),
        with("content-length", "+0"),
        with(":path", "/twice"),
        head("GET", "no-slash"),
        head("GET", "/a b"),
        vec![(":method", "GET"), (":scheme", "http"), (":path", "/")],
        vec![(":method", "GET"), (":scheme", "http"), (":authority", "agents.test")],
        vec![(":method", "CONNECT"), (":authority", "agents.test:443")],
        vec![(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "user@agents.test")],
    ];
    let mut id = 1;
    for fields in &malformed {
        write_frame(&mut connection, HEADERS, END_HEADERS | END_STREAM, id, &field_section(fields)).await;
        let frame = read_stream_frame(&mut connection).await;
        assert_eq!((frame.kind, frame.stream), (RST_STREAM, id), "{fields:?}");
        assert_eq!(frame.payload, [0, 0, 0, 1], "PROTOCOL_ERROR for {fields:?}");
        id += 2;
    }
    assert_eq!(backend.request_count(), 0);
    // A second length that contradicts the first, with a body.
    let mut fields = head("POST", "/");
    fields.extend([("content-length", "5"), ("content-length", "0")]);
    write_frame(&mut connection, HEADERS, END_HEADERS, id, &field_section(&fields)).await;
    write_frame(&mut connection, DATA, END_STREAM, id, b"12345").await;
    let frame = read_stream_frame(&mut connection).await;
    assert_eq!((frame.kind, frame.stream), (RST_STREAM, id));
    // A body that is not as long as it was said to be.
    for (length, body) in [("5", "1234"), ("5", "123456")] {
        id += 2;
        let mut fields = head("POST", "/");
        fields.push(("content-length", length));
        write_frame(&mut connection, HEADERS, END_HEADERS, id, &field_section(&fields)).await;
        write_frame(&mut connection, DATA, END_STREAM, id, body.as_bytes()).await;
        let frame = read_stream_frame(&mut connection).await;
        assert_eq!((frame.kind, frame.stream), (RST_STREAM, id));
    }
    assert!(backend.requests().iter().all(|request| !request.body_complete), "a wrong body ended as whole");

    id += 2;
    write_frame(&mut connection, HEADERS, END_HEADERS | END_STREAM, id, &field_section(&head("GET", "/"))).await;
    let frame = read_stream_frame(&mut connection).await;
    assert_eq!((frame.kind, frame.stream), (HEADERS, id), "the connection is still good");
}

#[tokio::test]
async fn a_name_in_upper_case_is_never_forwarded() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&service(backend.url(), "")).await;
    let mut connection = connect_by_hand(&proxy).await;
    let head = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a"), ("X-Upper", "1")];
    write_frame(&mut connection, HEADERS, END_HEADERS | END_STREAM, 1, &field_section(&head)).await;
    // The h2 crate gives the whole connection up, which RFC 9113 section 5.4.2 leaves to it.
    loop {
        let frame = read_frame(&mut connection).await;
        assert_ne!(frame.kind, HEADERS, "it was answered");
        if frame.kind == GOAWAY || frame.kind == RST_STREAM {
            break;
        }
    }
    assert_eq!(backend.request_count(), 0);
}

#[tokio::test]
async fn streams_above_the_limit_are_refused() {
    let backend = Backend::start().await;
    backend.drip_each();
    let listener = "listeners: [{address: '127.0.0.1:0', limits: {max_streams_per_connection: 2}}]\n";
    let proxy = start_proxy(&format!("{listener}{}", service(backend.url(), ""))).await;
    let mut connection = connect_by_hand(&proxy).await;
    let settings = read_frame(&mut connection).await;
    assert!(settings.payload.chunks(6).any(|setting| setting == [0, 3, 0, 0, 0, 2]), "{:?}", settings.payload);
    write_frame(&mut connection, SETTINGS, 1, 0, &[]).await;
    let head = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "agents.test")];
    for id in [1, 3, 5] {
        write_frame(&mut connection, HEADERS, END_HEADERS | END_STREAM, id, &field_section(&head)).await;
    }
    loop {
        let frame = read_stream_frame(&mut connection).await;
        if frame.kind == RST_STREAM {
            assert_eq!((frame.stream, frame.payload.as_slice()), (5, [0, 0, 0, 7].as_slice()));
            break;
        }
    }
    assert_eq!(backend.request(2).await.method, "GET");
    assert_eq!(backend.request_count(), 2);
}

// ---- HTTP/2, the endpoint's side ----

/// Serves one connection as a correct endpoint, answering `text`; with `last`, the first answer is the last.
async fn serve_http2(stream: TcpStream, text: &'static str, last: bool) {
    let mut connection = h2::server::handshake(stream).await.expect("the proxy speaks HTTP/2");
    while let Some(Ok((_, mut respond))) = connection.accept().await {
        let mut body = respond.send_response(http::Response::new(()), false).expect("a stream");
        body.send_data(Bytes::from_static(text.as_bytes()), true).expect("a stream");
        if last {
            connection.graceful_shutdown();
        }
    }
}

#[tokio::test]
async fn after_a_goaway_the_next_exchange_opens_a_new_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    let proxy = start_proxy(&service(&endpoint, ", http: 2")).await;
    let accepting = tokio::spawn(async move {
        for text in ["first", "second", "third"] {
            let (stream, _) = listener.accept().await.expect("a connection");
            tokio::spawn(serve_http2(stream, text, true));
        }
    });
    for text in ["first", "second", "third"] {
        let mut client = proxy.connect().await;
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
        assert_eq!(client.read_response().await.text(), text);
    }
    accepting.await.expect("three connections");
}

#[tokio::test]
async fn a_stream_that_a_goaway_leaves_out_is_sent_again() {
    for by_goaway in [true, false] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let proxy = start_proxy(&service(&endpoint, ", http: 2")).await;
        let refusing = async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut preface = [0; 24];
            stream.read_exact(&mut preface).await.expect("the preface");
            write_frame(&mut stream, SETTINGS, 0, 0, &[]).await;
            let frame = loop {
                let frame = read_frame(&mut stream).await;
                if frame.kind == DATA && frame.flags & END_STREAM != 0 {
                    break frame;
                }
            };
            if by_goaway {
                // Last stream 0, NO_ERROR.
                write_frame(&mut stream, GOAWAY, 0, 0, &[0; 8]).await;
            } else {
                write_frame(&mut stream, RST_STREAM, 0, frame.stream, &[0, 0, 0, 7]).await;
            }
            if by_goaway {
                let (stream, _) = listener.accept().await.expect("another connection");
                serve_http2(stream, "again", false).await;
            } else {
                let again = read_stream_frame(&mut stream).await;
                assert_eq!(again.kind, HEADERS);
                let body = read_stream_frame(&mut stream).await;
                assert_eq!((body.kind, body.payload.as_slice()), (DATA, b"the body".as_slice()));
                // :status 200 (index 8 of the static table).
                write_frame(&mut stream, HEADERS, END_HEADERS, again.stream, &[0x88]).await;
                write_frame(&mut stream, DATA, END_STREAM, again.stream, b"again").await;
                std::future::pending::<()>().await;
            }
        };
        let answered = async { post(proxy.address, "/", "", "the body").await };
        let answer = tokio::select! {
            answer = answered => answer,
            () = refusing => panic!("the proxy closed the connection"),
        };
        assert_eq!((answer.status(), answer.text().as_str()), (200, "again"), "by_goaway: {by_goaway}");
    }
}

#[tokio::test]
async fn a_connection_that_the_endpoint_closed_is_not_used_again() {
    let backend = Backend::start_http2().await;
    let proxy = start_proxy(&service(backend.url(), ", http: 2")).await;
    for round in 1..=5 {
        let answer = post(proxy.address, "/", "", "hello").await;
        assert_eq!((answer.status(), answer.text().as_str()), (200, "ok"), "round {round}");
        backend.cut_connections();
        eventually("the connection is closed", || backend.open_connections() == 0).await;
    }
    assert_eq!(backend.request_count(), 5);
}

#[tokio::test]
async fn idle_http2_connections_to_endpoints_are_given_up() {
    let backend = Backend::start_http2().await;
    let config =
        service(backend.url(), ", http: 2").replace("    versions", "    pool: {idle_timeout: 1s}\n    versions");
    let proxy = start_proxy(&config).await;
    assert_eq!(get(proxy.address, "/", "").await.status(), 200);
    eventually("the idle connection is closed", || backend.open_connections() == 0).await;
    assert_eq!(get(proxy.address, "/", "").await.status(), 200);
}
