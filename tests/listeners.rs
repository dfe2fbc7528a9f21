//! Listeners and routes: TLS, unix sockets, PROXY protocol, redirects, fixed answers and prefixes; and the documents'
//! own examples.

mod support;

use std::path::Path;

use support::{Backend, Certificate, Http2Client, RawClient, Script, get, http2_request, start_proxy, within};

fn service(backend: &Backend) -> String {
    format!("services: [{{name: support, versions: [{{name: stable, endpoints: [\"{}\"]}}]}}]\n", backend.url())
}

#[tokio::test]
async fn tls_chooses_the_certificate_by_name_and_the_version_by_alpn() {
    let backend = Backend::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let one = Certificate::create(directory.path(), &["one.test"]);
    let two = Certificate::create(directory.path(), &["two.test"]);
    let files = |certificate: &Certificate| {
        format!(
            "{{cert_file: \"{}\", key_file: \"{}\"}}",
            certificate.cert_file.display(),
            certificate.key_file.display()
        )
    };
    let listener = format!(
        "listeners: [{{address: \"127.0.0.1:0\", tls: {{certificates: [{}, {}]}}}}]\n",
        files(&one),
        files(&two)
    );
    let proxy = start_proxy(&format!("{listener}{}", service(&backend))).await;
    // Each client trusts one certificate alone: the handshake fails where the wrong one is shown.
    for (name, certificate) in [("one.test", &one), ("two.test", &two)] {
        let mut client = RawClient::connect_tls(proxy.address, name, certificate.client(&["http/1.1"])).await;
        client.send(format!("GET / HTTP/1.1\r\nHost: {name}\r\n\r\n")).await;
        assert_eq!(client.read_response().await.text(), "ok");
        let client = Http2Client::connect_tls(proxy.address, name, certificate.client(&["h2"])).await;
        assert_eq!(client.fetch(http2_request("GET", proxy.address, "/"), b"").await.text(), "ok");
    }
    assert!(backend.requests().iter().all(|request| request.header("x-forwarded-proto") == Some("https")));
}

#[tokio::test]
async fn certificates_rotate_and_a_broken_pair_leaves_the_old_one() {
    let backend = Backend::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let [first, second, third] = ["a", "b", "c"].map(|name| {
        let directory = directory.path().join(name);
        std::fs::create_dir(&directory).expect("writable");
        Certificate::create(&directory, &["one.test"])
    });
    let served = (directory.path().join("tls.crt"), directory.path().join("tls.key"));
    let put = |certificate: &Certificate, key: &Certificate| {
        std::fs::copy(&certificate.cert_file, &served.0).expect("writable");
        std::fs::copy(&key.key_file, &served.1).expect("writable");
    };
    put(&first, &first);
    let config = format!(
        "listeners: [{{address: \"127.0.0.1:0\", tls: {{certificates: [{{cert_file: \"{}\", key_file: \"{}\"}}]}}}}]\n{}",
        served.0.display(),
        served.1.display(),
        service(&backend)
    );
    let proxy = start_proxy(&config).await;
    // A client trusts one certificate alone.
    let serves = async |certificate: &Certificate| {
        let mut client = RawClient::connect_tls(proxy.address, "one.test", certificate.client(&["http/1.1"])).await;
        client.send("GET / HTTP/1.1\r\nHost: one.test\r\n\r\n").await;
        assert_eq!(client.read_response().await.text(), "ok");
    };
    serves(&first).await;
    put(&second, &second);
    assert_eq!(proxy.reload(&config).await.status(), 200);
    serves(&second).await;
    put(&third, &first);
    let refused = proxy.reload(&config).await;
    assert_eq!(refused.status(), 400, "{refused:?}");
    serves(&second).await;
    // A renewed one does not wait until a mistake elsewhere is mended.
    put(&third, &third);
    assert_eq!(proxy.reload(&format!("{config}mistake: 1\n")).await.status(), 400);
    serves(&third).await;
}

#[tokio::test]
async fn a_unix_socket_is_served_and_reached() {
    let directory = tempfile::tempdir().expect("a directory");
    let backend = Backend::start_unix(&directory.path().join("agent.sock")).await;
    let path = directory.path().join("longhaul.sock");
    let listeners = format!("listeners: [{{address: \"unix:{}\"}}, {{address: \"127.0.0.1:0\"}}]\n", path.display());
    let proxy = start_proxy(&format!("{listeners}{}", service(&backend))).await;
    let mut client = RawClient::connect_unix(&path).await;
    client.send("GET /over/unix HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_response().await.text(), "ok");
    assert_eq!(get(proxy.address, "/over/tcp", "").await.text(), "ok");
    assert_eq!(backend.request_count(), 2);
}

#[tokio::test]
async fn an_endpoint_over_tls_is_verified() {
    let directory = tempfile::tempdir().expect("a directory");
    let certificate = Certificate::create(directory.path(), &["localhost"]);
    let backend = Backend::start_tls(&certificate, &["h2", "http/1.1"]).await;
    let trusting = |ca: &str| {
        format!(
            "services: [{{name: support, versions: [{{name: stable, endpoints: [\"{}\"], tls: {{{ca}}}}}]}}]\n",
            backend.url()
        )
    };
    let trusted = format!("ca_file: \"{}\"", certificate.cert_file.display());
    let proxy = start_proxy(&trusting(&trusted)).await;
    assert_eq!(get(proxy.address, "/", "").await.text(), "ok");
    let stranger = Certificate::create(directory.path(), &["stranger.test"]);
    let proxy = start_proxy(&trusting(&format!("ca_file: \"{}\"", stranger.cert_file.display()))).await;
    let refused = get(proxy.address, "/", "").await;
    assert_eq!((refused.status(), refused.code().as_deref()), (502, Some("tls_failed")));
}

#[tokio::test]
async fn the_proxy_protocol_tells_the_client_and_is_asked_for() {
    let backend = Backend::start().await;
    let listener = "listeners: [{address: \"127.0.0.1:0\", proxy_protocol: accept, trusted_proxies: [127.0.0.1/32]}]\n";
    let proxy = start_proxy(&format!("{listener}{}", service(&backend))).await;
    let mut client = proxy.connect().await;
    client.send("PROXY TCP4 10.9.8.7 10.0.0.1 4000 80\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.read_response().await.status(), 200);
    let version2 = [
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\x0a\x09\x08\x06\x0a\x00\x00\x01\x0f\xa0\x00\x50".as_slice(),
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    ]
    .concat();
    let mut client = proxy.connect().await;
    client.send(version2).await;
    assert_eq!(client.read_response().await.status(), 200);
    let requests = backend.requests();
    assert_eq!(requests[0].header("x-forwarded-for"), Some("10.9.8.7"));
    assert_eq!(requests[1].header("x-forwarded-for"), Some("10.9.8.6"));
}

#[tokio::test]
async fn routes_redirect_answer_edit_and_strip() {
    let backend = Backend::start().await;
    backend.each(|request| {
        Script::answer(200, &[("location", "/next"), ("set-cookie", "a=1; Path=/"), ("x-gone", "1")], &request.target)
    });
    let routes = "\
routes:
  - {match: {path: /old/**}, redirect: {scheme: https}}
  - {match: {path: /teapot}, respond: {status: 418, body: short and stout}}
  - match: {path: /support/**}
    service: support
    strip_prefix: /support
    headers: {request: {set: {x-tier: gold}, remove: [x-secret]}, response: {remove: [x-gone]}}
  - {match: {hosts: [\"*.example.com\"], methods: [GET]}, service: support}
";
    let proxy = start_proxy(&format!("{routes}{}", service(&backend))).await;
    let redirect = get(proxy.address, "/old/a?b=1", "").await;
    assert_eq!((redirect.status(), redirect.header("location")), (308, Some("https://agents.test/old/a?b=1")));
    let fixed = get(proxy.address, "/teapot", "").await;
    assert_eq!((fixed.status(), fixed.text().as_str()), (418, "short and stout"));
    let stripped = get(proxy.address, "/support/a?b=1", "X-Secret: 1\r\n").await;
    assert_eq!(stripped.text(), "/a?b=1");
    assert_eq!(stripped.header("location"), Some("/support/next"));
    assert_eq!((stripped.header("set-cookie"), stripped.header("x-gone")), (Some("a=1; Path=/support"), None));
    let request = backend.request(1).await;
    assert_eq!((request.header("x-tier"), request.header("x-secret")), (Some("gold"), None));
    assert_eq!(get(proxy.address, "/elsewhere", "").await.code().as_deref(), Some("no_route"));
    let mut client = proxy.connect().await;
    client.send("GET /any HTTP/1.1\r\nHost: deep.below.example.com:8080\r\n\r\n").await;
    assert_eq!(client.read_response().await.text(), "/any");
}

#[tokio::test]
async fn a_websocket_over_http2_reaches_the_endpoint_as_http1() {
    let backend = Backend::start().await;
    backend.each(|_| Script::tunnel("websocket"));
    let proxy = start_proxy(&service(&backend)).await;
    let client = Http2Client::connect(proxy.address).await;
    let mut request = http2_request("CONNECT", proxy.address, "/ws");
    request.headers_mut().insert("sec-websocket-version", "13".parse().expect("a value"));
    request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    let mut stream = client.open_extended(request).await;
    let (head, mut body) = stream.response().await;
    assert_eq!(head.status, 200);
    stream.send(b"ping", false).await;
    assert_eq!(within("the echo", body.data()).await.expect("data").expect("data"), "ping".as_bytes());
    let arrived = backend.request(1).await;
    assert_eq!((arrived.method.as_str(), arrived.target.as_str()), ("GET", "/ws"));
    assert!(arrived.header("sec-websocket-key").is_some() && arrived.header("upgrade") == Some("websocket"));
}

#[test]
fn the_examples_of_the_documents_pass_check() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = tempfile::tempdir().expect("a directory");
    let certificate = Certificate::create(directory.path(), &["agents.example.com"]);
    std::fs::rename(&certificate.cert_file, directory.path().join("tls.crt")).expect("same directory");
    std::fs::rename(&certificate.key_file, directory.path().join("tls.key")).expect("same directory");
    std::fs::write(directory.path().join("cookie-keys.txt"), "0123456789abcdef0123456789abcdef\n").expect("writable");
    for document in ["README.md", "docs/configuration.md"] {
        let text = std::fs::read_to_string(root.join(document)).expect("a document of the project");
        let examples: Vec<&str> = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
        assert!(!examples.is_empty(), "{document} has an example");
        for example in examples {
            if let Err(problems) = longhaul::config::check(example, document, directory.path(), &|_| None) {
                panic!("{problems}\n{example}");
            }
        }
    }
}
