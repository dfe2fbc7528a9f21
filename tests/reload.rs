//! Reload, watching, health checks and drain, without a data plane: who accepts connections is played by the test.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use longhaul::app::{self, App, Options, StartError};
use longhaul::config::{self, Address};
use longhaul::control::call::Way;
use longhaul::control::health::{self, Probe, Verdict};
use longhaul::control::reload::{Heritage, Outlets, Reloader, Side, SideCommand};
use longhaul::control::{ReloadHandle, ReloadState, clock, watch};
use longhaul::drain::Phase;
use longhaul::ids;
use longhaul::metrics::Metrics;
use longhaul::net::listen::Socket;
use longhaul::snapshot::{AcceptCommand, Running};
use longhaul::state::ClientTls;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

/// Less than the watch's poll takes, so that a lost event is not made good by it.
const PATIENCE: Duration = Duration::from_secs(8);

/// The file that most tests begin with.
const PLAIN: &str = "
listeners:
  - {name: public, address: '127.0.0.1:0'}
admin: {address: '127.0.0.1:0'}
services:
  - name: support
    versions:
      - {name: stable, endpoints: ['http://127.0.0.1:9']}
";

#[tokio::test]
async fn the_same_meaning_is_the_same_generation() {
    let proxy = Proxy::start(PLAIN);
    let first = proxy.status().sha256;
    proxy.write(&format!("# only a comment is new\n{PLAIN}"));
    assert_eq!(proxy.reload.reload().await, Ok(1));
    let status = proxy.status();
    assert_eq!((status.generation, status.succeeded, status.failed), (1, 1, 0));
    assert_ne!(status.sha256, first, "the status names the file that is there now");
    assert_eq!(proxy.running.snapshot.load().generation, 1);
}

#[tokio::test]
async fn a_bad_file_changes_nothing() {
    let proxy = Proxy::start(PLAIN);
    eventually("the listener is started", || proxy.sockets() == proxy.listeners()).await;
    let before = proxy.running.snapshot.load_full();
    proxy.write("listeners: [");
    let problems = proxy.reload.reload().await.expect_err("half a file is no configuration");
    assert_eq!(proxy.status().last_error.as_ref(), Some(&problems));
    assert_eq!((proxy.status().succeeded, proxy.status().failed), (0, 1));
    assert!(Arc::ptr_eq(&before, &proxy.running.snapshot.load_full()));
    assert_eq!(proxy.sockets(), proxy.listeners());

    proxy.write(PLAIN);
    assert_eq!(proxy.reload.reload().await, Ok(1));
    assert_eq!(proxy.status().last_error, None);
}

#[tokio::test]
async fn a_new_admin_address_is_refused() {
    let proxy = Proxy::start(PLAIN);
    proxy.write(&PLAIN.replace("admin: {address: '127.0.0.1:0'}", "admin: {address: '127.0.0.2:0'}"));
    let problems = proxy.reload.reload().await.expect_err("the admin socket stays where it is");
    assert_eq!(problems.list.len(), 1);
    assert_eq!(problems.list[0].path, "admin.address");
    assert!(problems.list[0].message.contains("127.0.0.1:0"), "{}", problems.list[0].message);
    assert_eq!(proxy.status().generation, 1);
}

#[tokio::test]
async fn another_place_for_the_state_is_refused() {
    let proxy = Proxy::start(PLAIN);
    proxy.write(&format!("{PLAIN}\nstate: {{file: state}}\n"));
    let problems = proxy.reload.reload().await.expect_err("the state stays where it is");
    assert_eq!(problems.list.iter().map(|problem| problem.path.as_str()).collect::<Vec<_>>(), ["state"]);
    assert!(problems.list[0].message.contains("restart the proxy"), "{}", problems.list[0].message);
    assert_eq!(proxy.status().generation, 1);
}

#[tokio::test]
async fn listeners_come_and_go_and_keep_their_sockets() {
    let proxy = Proxy::start(PLAIN);
    let [first] = &proxy.listeners()[..] else { panic!("one listener") };
    proxy.write(&PLAIN.replace("admin:", "  - {name: second, address: '127.0.0.2:0'}\nadmin:"));
    assert_eq!(proxy.reload.reload().await, Ok(2));
    let two = proxy.listeners();
    assert_eq!(two.len(), 2);
    assert_eq!(two[0], *first, "the socket of an unchanged address stays");
    eventually("both are started", || proxy.sockets() == two).await;

    // Another name for the same address is another listener on the same socket.
    proxy.write(&PLAIN.replace("name: public", "name: renamed"));
    assert_eq!(proxy.reload.reload().await, Ok(3));
    assert_eq!(proxy.listeners(), std::slice::from_ref(first));
    assert_eq!(proxy.running.snapshot.load().listeners[0].config.name, "renamed");
    eventually("the second is stopped", || proxy.sockets() == [first.clone()]).await;
    assert_eq!(proxy.started(), 2, "no socket was bound twice");
}

#[tokio::test]
async fn a_taken_port_refuses_the_whole_reload() {
    let proxy = Proxy::start(PLAIN);
    eventually("the listener is started", || proxy.sockets() == proxy.listeners()).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("its address");
    let text = PLAIN
        .replace("admin:", &format!("  - {{name: free, address: '127.0.0.2:0'}}\n  - {{address: '{address}'}}\nadmin:"))
        .replace("name: support", "name: sales");
    proxy.write(&text);
    let problems = proxy.reload.reload().await.expect_err("the port is taken");
    assert_eq!(problems.list[0].path, "listeners[2].address");
    assert_eq!(proxy.status().generation, 1);
    assert_eq!(&*proxy.running.snapshot.load().services[0].name, "support");
    assert_eq!(proxy.started(), 1);

    drop(taken);
    assert_eq!(proxy.reload.reload().await, Ok(2));
    eventually("all three are started", || proxy.sockets().len() == 3).await;
}

#[tokio::test]
async fn the_probes_server_follows_the_file() {
    let mut proxy = Proxy::start(PLAIN);
    let with_probes =
        PLAIN.replace("'127.0.0.1:0'}\nservices", "'127.0.0.1:0', probes: {address: '127.0.0.1:0'}}\nservices");
    proxy.write(&with_probes);
    assert_eq!(proxy.reload.reload().await, Ok(2));
    assert!(matches!(proxy.sides.try_recv(), Ok(SideCommand { side: Side::Probes, socket: Some(_) })));
    proxy.write(&with_probes.replace("name: support", "name: sales"));
    assert_eq!(proxy.reload.reload().await, Ok(3));
    assert!(proxy.sides.try_recv().is_err(), "unchanged probes stay as they are");
    proxy.write(PLAIN);
    assert_eq!(proxy.reload.reload().await, Ok(4));
    assert!(matches!(proxy.sides.try_recv(), Ok(SideCommand { side: Side::Probes, socket: None })));
}

#[tokio::test]
async fn live_state_outlives_reloads() {
    let proxy = Proxy::start(PLAIN);
    tokio::spawn(clock::run(Arc::clone(&proxy.running), Arc::clone(&proxy.state)));
    let dispatcher = Arc::clone(&proxy.running.snapshot.load().services[0].dispatcher);
    let dispatcher_now = || Arc::clone(&proxy.running.snapshot.load().services[0].dispatcher);

    proxy.write(&PLAIN.replace("127.0.0.1:9'", "127.0.0.1:10'"));
    assert_eq!(proxy.reload.reload().await, Ok(2));
    assert!(Arc::ptr_eq(&dispatcher, &dispatcher_now()));

    proxy.write(&PLAIN.replace("name: support", "name: sales"));
    assert_eq!(proxy.reload.reload().await, Ok(3));
    assert!(!Arc::ptr_eq(&dispatcher, &dispatcher_now()));
    assert_eq!(removed(&proxy.state), ["support"], "kept while somebody holds it");

    proxy.write(PLAIN);
    assert_eq!(proxy.reload.reload().await, Ok(4));
    assert!(Arc::ptr_eq(&dispatcher, &dispatcher_now()), "the service that came back is the same one");
    assert_eq!(removed(&proxy.state), ["sales"]);
    eventually("nobody holds sales", || removed(&proxy.state).is_empty()).await;
    drop(dispatcher);
}

fn removed(state: &ReloadState) -> Vec<String> {
    state.removed_services().into_iter().map(|(name, _)| name).collect()
}

#[tokio::test]
async fn a_write_in_place_is_seen() {
    let proxy = Proxy::start(PLAIN).watched();
    proxy.write(&PLAIN.replace("stable", "green"));
    proxy.reaches(2).await;
    proxy.write(&PLAIN.replace("stable", "blue"));
    proxy.reaches(3).await;
}

#[tokio::test]
async fn a_rename_is_seen() {
    let proxy = Proxy::start(PLAIN).watched();
    for (turn, name) in ["green", "blue"].into_iter().enumerate() {
        let beside = proxy.path.with_extension("new");
        std::fs::write(&beside, PLAIN.replace("stable", name)).expect("a file beside");
        std::fs::rename(&beside, &proxy.path).expect("a rename");
        proxy.reaches(turn as u64 + 2).await;
    }
}

#[tokio::test]
async fn a_symlink_swap_is_seen() {
    // As the kubelet does it: longhaul.yaml -> ..data/longhaul.yaml, ..data -> ..1, then ..data is renamed over.
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path().to_owned();
    let fill = |name: &str, text: &str| {
        std::fs::create_dir(root.join(name)).expect("a directory");
        std::fs::write(root.join(name).join("longhaul.yaml"), text).expect("a file");
    };
    fill("..1", PLAIN);
    std::os::unix::fs::symlink("..1", root.join("..data")).expect("a symlink");
    std::os::unix::fs::symlink("..data/longhaul.yaml", root.join("longhaul.yaml")).expect("a symlink");
    let proxy = Proxy::at(directory, root.join("longhaul.yaml")).watched();
    for (turn, name) in ["green", "blue"].into_iter().enumerate() {
        let fresh = format!("..{}", turn + 2);
        fill(&fresh, &PLAIN.replace("stable", name));
        std::os::unix::fs::symlink(&fresh, root.join("..data_tmp")).expect("a symlink");
        std::fs::rename(root.join("..data_tmp"), root.join("..data")).expect("a rename");
        std::fs::remove_dir_all(root.join(format!("..{}", turn + 1))).expect("the old one goes");
        proxy.reaches(turn as u64 + 2).await;
    }
}

#[tokio::test]
async fn a_change_before_the_watch_began_is_seen() {
    let proxy = Proxy::start(PLAIN);
    proxy.write(&PLAIN.replace("stable", "green"));
    let proxy = proxy.watched();
    proxy.reaches(2).await;
}

#[tokio::test]
async fn a_refused_file_is_tried_again_without_counting_twice() {
    let proxy = Proxy::start(PLAIN).watched();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("its address");
    proxy.write(&PLAIN.replace("admin:", &format!("  - {{address: '{address}'}}\nadmin:")));
    eventually("the reload is refused", || proxy.status().failed == 1).await;
    drop(taken);
    // Anything that happens beside the file leads to another try.
    std::fs::write(proxy.path.with_extension("txt"), "x").expect("a file beside");
    proxy.reaches(2).await;
    assert_eq!(proxy.status().failed, 1);
    assert_eq!(proxy.status().last_error, None);
}

#[tokio::test]
async fn health_checks_follow_the_configuration() {
    let (first, second) = (Answering::start("200 OK").await, Answering::start("200 OK").await);
    let text = |endpoint: SocketAddr| {
        PLAIN.replace("127.0.0.1:9'", &format!("{endpoint}'"))
            + "    health: {path: '/health?deep=1', interval: 50ms}\n"
    };
    let proxy = Proxy::start(&text(first.address));
    eventually("probed again and again", || first.count() >= 3).await;
    proxy.write(&text(second.address));
    assert_eq!(proxy.reload.reload().await, Ok(2));
    eventually("the new endpoint is probed", || second.count() >= 1).await;
    // What was under way when the endpoint left may still arrive; then nothing more, while the other is probed on.
    let (left, reference) = (first.count(), second.count());
    eventually("time goes by", || second.count() >= reference + 10).await;
    assert!(first.count() <= left + 1, "{} probes after the endpoint left", first.count() - left);
}

#[tokio::test]
async fn a_probe_says_who_it_is_and_carries_only_what_is_configured() {
    let server = Answering::start("204 No Content").await;
    let mut probe = probe_of(&format!("http://{}", server.address), "/health?deep=1");
    probe.way.set = vec![("authorization".parse().expect("a name"), "Bearer probe".parse().expect("a value"))];
    assert_eq!(verdict(&probe).await, Verdict::Healthy);
    let head = server.heads.lock().expect("heads")[0].to_ascii_lowercase();
    let mut lines: Vec<&str> = head.trim_end().split("\r\n").collect();
    assert_eq!(lines.remove(0), "get /health?deep=1 http/1.1");
    lines.sort_unstable();
    let mut expected = [
        "authorization: bearer probe".to_owned(),
        "connection: close".to_owned(),
        format!("host: {}", server.address),
        format!("user-agent: longhaul/{}", env!("CARGO_PKG_VERSION")),
    ];
    expected.sort_unstable();
    assert_eq!(lines, expected);

    probe.way.host = config::HostPolicy::Literal("agents.example".to_owned());
    verdict(&probe).await;
    let head = server.heads.lock().expect("heads")[1].to_ascii_lowercase();
    assert!(head.contains("host: agents.example\r\n"), "{head}");
}

#[tokio::test]
async fn answers_are_judged() {
    for (status, wanted) in [
        ("200 OK", Verdict::Healthy),
        ("399 Odd", Verdict::Healthy),
        ("404 Not Found", Verdict::Unhealthy("answered 404".to_owned())),
        ("503 Service Unavailable", Verdict::Unhealthy("answered 503".to_owned())),
        ("401 Unauthorized", Verdict::NoEvidence(http::StatusCode::UNAUTHORIZED)),
        ("403 Forbidden", Verdict::NoEvidence(http::StatusCode::FORBIDDEN)),
    ] {
        let server = Answering::start(status).await;
        assert_eq!(verdict(&probe_of(&format!("http://{}", server.address), "/")).await, wanted, "{status}");
    }
}

#[tokio::test]
async fn silence_and_refusal_are_unhealthy() {
    // Bound but never accepted: the kernel completes the handshake, nobody answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = silent.local_addr().expect("its address");
    let mut probe = probe_of(&format!("http://{address}"), "/");
    probe.health.timeout = Duration::from_millis(50);
    assert_eq!(verdict(&probe).await, Verdict::Unhealthy("no answer within 50ms".to_owned()));

    probe.health.path = None;
    probe.health.tcp = true;
    assert_eq!(verdict(&probe).await, Verdict::Healthy, "a TCP check only connects");
    drop(silent);
    let Verdict::Unhealthy(reason) = verdict(&probe).await else { panic!("nobody listens") };
    assert!(reason.starts_with("can't connect"), "{reason}");
}

#[tokio::test]
async fn the_port_of_the_check_goes_before_that_of_the_endpoint() {
    let server = Answering::start("200 OK").await;
    let mut probe = probe_of("http://127.0.0.1:9", "/");
    probe.way.port = Some(server.address.port());
    assert_eq!(verdict(&probe).await, Verdict::Healthy);
    let head = server.heads.lock().expect("heads")[0].to_ascii_lowercase();
    assert!(head.contains("host: 127.0.0.1:9\r\n"), "{head}");
}

#[tokio::test]
async fn an_endless_body_does_not_hold_the_verdict() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("its address");
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a probe");
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.expect("a head");
        while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
    });
    let (verdict, rest) = health::probe(&probe_of(&format!("http://{address}"), "/")).await;
    assert_eq!(verdict, Verdict::Healthy);
    tokio::time::timeout(PATIENCE, rest.expect("a body").read()).await.expect("reading is bounded");
}

#[tokio::test]
async fn unix_sockets_and_http2_are_probed() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("agent.sock");
    let listener = tokio::net::UnixListener::bind(&path).expect("a socket");
    let answering = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.expect("a probe");
        let mut connection = h2::server::handshake(stream).await.expect("HTTP/2");
        let (request, mut respond) = connection.accept().await.expect("a request").expect("a good one");
        let response = http::Response::builder().status(200).body(()).expect("a response");
        respond.send_response(response, true).expect("sent");
        // Drives the connection until the probe closes it.
        while connection.accept().await.is_some() {}
        request
    });
    let mut probe = probe_of("http://127.0.0.1:9", "/health");
    probe.way.url = config::EndpointUrl::Unix(path);
    probe.way.http = config::HttpVersion::Http2;
    assert_eq!(verdict(&probe).await, Verdict::Healthy);
    let request = answering.await.expect("the server");
    assert_eq!(request.uri().to_string(), "http://localhost/health");
}

#[tokio::test]
async fn https_is_probed_in_the_version_that_was_negotiated() {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["agents.example".to_owned()]).expect("a certificate");
    let key = rustls_pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .expect("a server");
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("its address").port();
    let (spoken, mut heard) = mpsc::channel(2);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut stream = acceptor.accept(stream).await.expect("TLS");
            if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                let mut connection = h2::server::handshake(stream).await.expect("HTTP/2");
                let (request, mut respond) = connection.accept().await.expect("a request").expect("a good one");
                let response = http::Response::builder().status(204).body(()).expect("a response");
                respond.send_response(response, true).expect("sent");
                while connection.accept().await.is_some() {}
                spoken.send(request.uri().to_string()).await.expect("the test listens");
            } else {
                let mut line = vec![0; 14];
                stream.read_exact(&mut line).await.expect("a request");
                stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.expect("sent");
                spoken.send(String::from_utf8(line).expect("text")).await.expect("the test listens");
            }
        }
    });

    let mut roots = rustls::RootCertStore::empty();
    roots.add(cert.der().clone()).expect("a root");
    for (alpn, wanted) in [(&b"h2"[..], format!("https://127.0.0.1:{port}/")), (b"http/1.1", "GET / HTTP/1.1".into())] {
        let mut client = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        client.alpn_protocols = vec![alpn.to_vec()];
        let mut probe = probe_of(&format!("http://127.0.0.1:{port}"), "/");
        let server_name = "agents.example".try_into().expect("a name");
        probe.way.tls = Some(ClientTls { config: Arc::new(client), server_name });
        assert_eq!(verdict(&probe).await, Verdict::Healthy);
        assert_eq!(heard.recv().await, Some(wanted));
    }
}

fn probe_of(url: &str, path: &str) -> Probe {
    let address: SocketAddr = url.strip_prefix("http://").expect("http").parse().expect("an address");
    Probe {
        way: Way {
            url: config::EndpointUrl::Tcp {
                https: false,
                host: config::EndpointHost::Ip(address.ip()),
                port: address.port(),
            },
            port: None,
            http: config::HttpVersion::Auto,
            host: config::HostPolicy::Preserve,
            set: Vec::new(),
            tls: None,
        },
        health: config::Health {
            path: Some(path.to_owned()),
            tcp: false,
            port: None,
            expect_status: vec![(200, 399)],
            draining_status: Vec::new(),
            interval: Duration::from_secs(5),
            timeout: PATIENCE,
            unhealthy_after: 3,
            healthy_after: 2,
            load: None,
        },
        own_load: None,
    }
}

async fn verdict(probe: &Probe) -> Verdict {
    let (verdict, rest) = health::probe(probe).await;
    if let Some(rest) = rest {
        rest.read().await;
    }
    verdict
}

const DRAINING: &str = "shutdown: {delay: 50ms, timeout: 10000ms}\n";

#[test]
fn a_drain_ends_by_itself() {
    let (app, _directory) = start_app(&format!("{PLAIN}{DRAINING}"));
    assert_eq!(app.running.drain.phase(), Phase::Serving);
    app.drain.drain();
    let running = Arc::clone(&app.running);
    let ended = app.wait();
    assert_eq!((ended.cut, ended.forced), (0, false));
    assert_eq!(running.drain.phase(), Phase::Forced);
}

#[test]
fn a_drain_waits_for_open_exchanges_and_refuses_reloads() {
    let (app, _directory) = start_app(&format!("{PLAIN}{DRAINING}"));
    app.running.open_exchanges.begin();
    app.drain.drain();
    wait_until("draining", || app.running.drain.phase() == Phase::Draining);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    wait_until("reloads are refused", || runtime.block_on(app.reload.reload()).is_err());
    let error = app.reload_state.status().last_error.expect("a reason");
    assert!(error.list[0].message.contains("draining"), "{}", error.list[0].message);
    assert_eq!(app.running.drain.phase(), Phase::Draining, "the exchange is still open");

    app.running.open_exchanges.end();
    assert_eq!(app.wait().cut, 0);
}

#[test]
fn a_drain_has_an_end() {
    let (app, _directory) = start_app(&format!("{PLAIN}shutdown: {{delay: 0ms, timeout: 100ms}}\n"));
    for _ in 0..3 {
        app.running.open_exchanges.begin();
    }
    app.drain.drain();
    let ended = app.wait();
    assert_eq!((ended.cut, ended.forced), (3, false));
}

#[test]
fn a_forced_end_does_not_wait() {
    let (app, _directory) = start_app(&format!("{PLAIN}shutdown: {{delay: 60000ms, timeout: 60000ms}}\n"));
    app.running.open_exchanges.begin();
    app.drain.drain();
    wait_until("announced", || app.running.drain.phase() == Phase::Announced);
    app.drain.force();
    let ended = app.wait();
    assert_eq!((ended.cut, ended.forced), (1, true));
}

#[test]
fn two_proxies_live_in_one_process_and_know_their_ports() {
    let ((one, _first), (two, _second)) = (start_app(PLAIN), start_app(PLAIN));
    let ports: Vec<u16> =
        [&one, &two].iter().flat_map(|app| [port(&app.bound.listeners[0].1), port(&app.bound.admin)]).collect();
    assert!(ports.iter().all(|port| *port != 0), "{ports:?}");
    one.drain.force();
    one.wait();
    assert_eq!(two.running.drain.phase(), Phase::Serving);
    two.drain.force();
    two.wait();
}

#[test]
fn a_taken_port_stops_the_start() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("its address").to_string();
    let directory = tempfile::tempdir().expect("a directory");
    let start = |text: &str| {
        let path = directory.path().join("longhaul.yaml");
        std::fs::write(&path, text).expect("a file");
        let loaded = config::load(&path).expect("a good file");
        app::build(Options::new(path, loaded)).err().expect("a taken port")
    };
    let StartError::Refused(problems) = start(&PLAIN.replacen("127.0.0.1:0", &address, 1)) else { panic!("listener") };
    assert_eq!(problems.list[0].path, "listeners[0].address");
    let error = start(&PLAIN.replace("admin: {address: '127.0.0.1:0'}", &format!("admin: {{address: '{address}'}}")));
    assert!(matches!(error, StartError::Admin(_)), "{error}");
    assert!(error.to_string().contains(&address), "{error}");
}

fn start_app(text: &str) -> (App, TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("longhaul.yaml");
    std::fs::write(&path, text).expect("a file");
    let loaded = config::load(&path).expect("a good file");
    (app::build(Options::new(path, loaded)).expect("a start"), directory)
}

fn port(address: &Address) -> u16 {
    match address {
        Address::Tcp(address) => address.port(),
        Address::Unix(path) => panic!("{} has no port", path.display()),
    }
}

/// The control plane, and somebody who keeps the sockets that the accept loop would have.
struct Proxy {
    _directory: TempDir,
    path: PathBuf,
    running: Arc<Running>,
    reload: ReloadHandle,
    state: Arc<ReloadState>,
    sockets: Arc<Mutex<Vec<(Address, Socket)>>>,
    started: Arc<AtomicUsize>,
    sides: mpsc::Receiver<SideCommand>,
}

impl Proxy {
    fn start(text: &str) -> Proxy {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("longhaul.yaml");
        std::fs::write(&path, text).expect("a file");
        Proxy::at(directory, path)
    }

    fn at(directory: TempDir, path: PathBuf) -> Proxy {
        let loaded = config::load(&path).expect("a good file");
        let dropped = Metrics::new().access_log_dropped();
        let access_log = longhaul::logging::AccessLog::to(std::io::sink(), &loaded.config.log, dropped);
        let (reloader, outlets) =
            Reloader::new(path.clone(), loaded, Metrics::new(), access_log, None, Heritage::default())
                .expect("a start");
        let Outlets { running, handle: reload, state, mut accept, sides, side_addresses: _, discovery } = outlets;
        tokio::spawn(reloader.run());
        tokio::spawn(health::run(discovery.checks()));
        let sockets: Arc<Mutex<Vec<(Address, Socket)>>> = Arc::default();
        let started = Arc::new(AtomicUsize::new(0));
        let (kept, count) = (Arc::clone(&sockets), Arc::clone(&started));
        tokio::spawn(async move {
            while let Some(command) = accept.recv().await {
                let mut kept = kept.lock().expect("sockets");
                match command {
                    AcceptCommand::Start { local_address, socket } => {
                        count.fetch_add(1, Ordering::AcqRel);
                        kept.push((local_address, socket));
                    }
                    AcceptCommand::Stop { local_address } => kept.retain(|(known, _)| *known != local_address),
                }
            }
        });
        Proxy { _directory: directory, path, running, reload, state, sockets, started, sides }
    }

    fn watched(self) -> Proxy {
        tokio::spawn(watch::run(self.path.clone(), self.reload.clone(), Arc::clone(&self.state)));
        self
    }

    fn write(&self, text: &str) {
        std::fs::write(&self.path, text).expect("the file is written");
    }

    fn status(&self) -> longhaul::control::ReloadStatus {
        self.state.status()
    }

    /// What the snapshot says.
    fn listeners(&self) -> Vec<Address> {
        self.running.snapshot.load().listeners.iter().map(|listener| listener.local_address.clone()).collect()
    }

    /// What the accept loop was told.
    fn sockets(&self) -> Vec<Address> {
        self.sockets.lock().expect("sockets").iter().map(|(address, _)| address.clone()).collect()
    }

    fn started(&self) -> usize {
        self.started.load(Ordering::Acquire)
    }

    async fn reaches(&self, generation: u64) {
        eventually(&format!("generation {generation}"), || self.status().generation == generation).await;
        assert_eq!(self.running.snapshot.load().generation, generation);
    }
}

/// A server that answers every request alike and remembers the heads.
struct Answering {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Answering {
    async fn start(status: &'static str) -> Answering {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = Arc::clone(&heads);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let seen = Arc::clone(&seen);
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        match stream.read_u8().await {
                            Ok(byte) => head.push(byte),
                            Err(_) => return,
                        }
                    }
                    seen.lock().expect("heads").push(String::from_utf8(head).expect("text"));
                    let answer = format!("HTTP/1.1 {status}\r\nconnection: close\r\n\r\n");
                    // The probe may have gone.
                    let _ = stream.write_all(answer.as_bytes()).await;
                });
            }
        });
        Answering { address, heads }
    }

    fn count(&self) -> usize {
        self.heads.lock().expect("heads").len()
    }
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = ids::now() + PATIENCE;
    while !holds() {
        assert!(ids::now() < deadline, "did not happen in {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = ids::now() + PATIENCE;
    while !holds() {
        assert!(ids::now() < deadline, "did not happen in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
