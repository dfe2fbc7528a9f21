//! The external metrics API: a real HTTPS client with client certificates asks as the API server of a cluster does.
#![cfg(feature = "kubernetes")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use longhaul::config::Address;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use support::{Backend, Cluster, Proxy, RawClient, eventually_async, start_proxy, within};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

/// An authority, which issues what the two sides show.
struct Authority {
    pem: String,
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key.
#[derive(Clone)]
struct Identity {
    pem: String,
    key_pem: String,
    der: CertificateDer<'static>,
    key: Vec<u8>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("signed");
        Authority { pem: certificate.pem(), der: certificate.der().clone(), issuer: Issuer::new(params, key) }
    }

    fn issue(&self, name: &str, purpose: ExtendedKeyUsagePurpose) -> Identity {
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let der = certificate.der().clone();
        Identity { pem: certificate.pem(), key_pem: key.serialize_pem(), der, key: key.serialize_der() }
    }

    fn client(&self, name: &str) -> Identity {
        self.issue(name, ExtendedKeyUsagePurpose::ClientAuth)
    }
}

const SERVER: &str = "longhaul.agents.svc";

/// The files of a test, and the authority of the server's certificate.
struct Files {
    directory: tempfile::TempDir,
    authority: Authority,
}

impl Files {
    fn new() -> Files {
        let files = Files { directory: tempfile::tempdir().expect("a directory"), authority: Authority::new() };
        files.renew();
        files
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let file = self.path().join(name);
        std::fs::write(&file, text).expect("writable directory");
        file
    }

    /// Another certificate for the server.
    fn renew(&self) -> CertificateDer<'static> {
        let server = self.authority.issue(SERVER, ExtendedKeyUsagePurpose::ServerAuth);
        self.write("tls.crt", &server.pem);
        self.write("tls.key", &server.key_pem);
        server.der
    }

    fn config(&self, more: &str, endpoints: &str) -> String {
        let directory = self.path().display();
        format!(
            "kubernetes:\n  external_metrics: {{address: \"127.0.0.1:0\", tls: {{cert_file: {directory}/tls.crt, key_file: \
             {directory}/tls.key}}{more}\nservices:\n  - name: agents\n    agent_protocol: http\n    \
             runs: {{max_per_endpoint: 4, queue: {{max: 100}}}}\n    versions:\n      \
             - {{name: stable, endpoints: [{endpoints}]}}\n      - {{name: canary, weight: 0, endpoints: []}}\n"
        )
    }
}

/// What the API server of a cluster is to us.
struct Caller {
    address: std::net::SocketAddr,
    connector: TlsConnector,
    sender: hyper::client::conn::http1::SendRequest<Empty<Bytes>>,
    /// What the server showed.
    server: CertificateDer<'static>,
    _connection: AbortOnDropHandle<()>,
}

impl Caller {
    async fn connect(proxy: &Proxy, authority: &Authority, identity: Option<&Identity>) -> Caller {
        let Some(Address::Tcp(address)) = proxy.app.bound.external_metrics else { panic!("it is served") };
        let mut roots = rustls::RootCertStore::empty();
        roots.add(authority.der.clone()).expect("an authority");
        let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let key = PrivateKeyDer::try_from(identity.key.clone()).expect("a key");
                builder.with_client_auth_cert(vec![identity.der.clone()], key).expect("a pair")
            }
        };
        Caller::open(address, TlsConnector::from(Arc::new(config))).await
    }

    async fn open(address: std::net::SocketAddr, connector: TlsConnector) -> Caller {
        let stream = tokio::net::TcpStream::connect(address).await.expect("a listener");
        let name = ServerName::try_from(SERVER).expect("a name");
        let stream = connector.connect(name, stream).await.expect("a handshake");
        let server = stream.get_ref().1.peer_certificates().expect("a certificate")[0].clone().into_owned();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
        let connection = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = connection.await;
        }));
        Caller { address, connector, sender, server, _connection: connection }
    }

    async fn ask(&mut self, path: &str, headers: &[(&str, &str)]) -> (StatusCode, Value) {
        // Whoever was refused has to come again.
        if self.sender.ready().await.is_err() {
            *self = Caller::open(self.address, self.connector.clone()).await;
        }
        let mut request = Request::get(path).header("host", SERVER);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Empty::new()).expect("a request");
        within("an answer", async {
            let response = self.sender.send_request(request).await.expect("an answer");
            let status = response.status();
            let body = response.into_body().collect().await.expect("a body").to_bytes();
            (status, serde_json::from_slice(&body).expect("JSON"))
        })
        .await
    }

    /// Asks until this is the answer.
    async fn ask_until(&mut self, path: &str, headers: &[(&str, &str)], wanted: u16) {
        within("another answer", async {
            while self.ask(path, headers).await.0 != wanted {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        })
        .await;
    }

    /// Asks until these are the items: a sum is given again for a moment.
    async fn becomes(&mut self, metric: &str, selector: &str, wanted: Value) {
        within(&format!("{metric} becomes {wanted}"), async {
            while self.items(metric, selector).await != wanted {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        })
        .await;
    }

    /// The items of a metric: labels and value.
    async fn items(&mut self, metric: &str, selector: &str) -> Value {
        let selector = percent_encoding::utf8_percent_encode(selector, percent_encoding::NON_ALPHANUMERIC);
        let path = format!("{API}/namespaces/default/{metric}?labelSelector={selector}");
        let (status, list) = self.ask(&path, &[]).await;
        assert_eq!(status, 200, "{list}");
        assert_eq!((&list["kind"], &list["apiVersion"]), (&json!("ExternalMetricValueList"), &json!(GROUP_VERSION)));
        let items = list["items"].as_array().expect("items");
        items
            .iter()
            .map(|item| {
                assert_eq!(item["metricName"], metric);
                assert!(item["timestamp"].as_str().is_some_and(|time| time.ends_with('Z')), "{item}");
                json!([item["metricLabels"], item["value"]])
            })
            .collect()
    }
}

const GROUP_VERSION: &str = "external.metrics.k8s.io/v1beta1";
const API: &str = "/apis/external.metrics.k8s.io/v1beta1";

async fn start_run(proxy: &Proxy) -> RawClient {
    let mut client = proxy.connect().await;
    client.send("POST /run HTTP/1.1\r\nHost: agents.test\r\nContent-Length: 2\r\n\r\n{}").await;
    client
}

#[tokio::test]
async fn what_hpa_reads() {
    let (files, clients) = (Files::new(), Authority::new());
    files.write("clients.crt", &clients.pem);
    let backends = [Backend::start().await, Backend::start().await];
    backends.iter().for_each(Backend::drip_each);
    let endpoints = backends.each_ref().map(|backend| format!("\"{}\"", backend.url())).join(", ");
    let more = format!(", client_ca_file: {}/clients.crt}}", files.path().display());
    let proxy = start_proxy(&files.config(&more, &endpoints)).await;
    let mut caller = Caller::connect(&proxy, &files.authority, Some(&clients.client("anybody"))).await;

    let (status, groups) = caller.ask("/apis", &[]).await;
    assert_eq!((status.as_u16(), &groups["kind"]), (200, &json!("APIGroupList")));
    assert_eq!(groups["groups"][0]["preferredVersion"]["groupVersion"], GROUP_VERSION);
    let (_, group) = caller.ask("/apis/external.metrics.k8s.io", &[]).await;
    assert_eq!((&group["kind"], &group["name"]), (&json!("APIGroup"), &json!("external.metrics.k8s.io")));
    let (status, resources) = caller.ask(API, &[]).await;
    assert_eq!((status.as_u16(), &resources["kind"]), (200, &json!("APIResourceList")));
    let names: Vec<&str> =
        resources["resources"].as_array().expect("a list").iter().filter_map(|one| one["name"].as_str()).collect();
    assert_eq!(
        names,
        [
            "longhaul_run_demand",
            "longhaul_outstanding_runs",
            "longhaul_queued_runs",
            "longhaul_placeable_demand",
            "longhaul_saturation"
        ]
    );
    for unknown in ["/openapi/v2", "/openapi/v3", "/", "/apis/external.metrics.k8s.io/v1beta1/namespaces/default/cpu"] {
        let (status, failure) = caller.ask(unknown, &[]).await;
        assert_eq!(
            (status.as_u16(), &failure["kind"], &failure["reason"]),
            (404, &json!("Status"), &json!("NotFound"))
        );
    }

    assert_eq!(caller.items("longhaul_run_demand", "service=agents").await, json!([[{"service": "agents"}, "0"]]));
    let mut clients = Vec::new();
    for _ in 0..11 {
        clients.push(start_run(&proxy).await);
    }
    proxy.metric_becomes("longhaul_run_demand", &[], 11.0).await;
    let of_service = |value: &str| json!([[{"service": "agents"}, value]]);
    caller.becomes("longhaul_run_demand", "service in (agents,others)", of_service("11")).await;
    assert_eq!(caller.items("longhaul_outstanding_runs", "service=agents").await, of_service("8"));
    assert_eq!(caller.items("longhaul_queued_runs", "service=agents").await, of_service("3"));
    assert_eq!(caller.items("longhaul_placeable_demand", "service!=others").await, of_service("3"));
    assert_eq!(caller.items("longhaul_saturation", "service").await, of_service("1375m"));
    assert_eq!(caller.items("longhaul_run_demand", "service=others").await, json!([]));
    assert_eq!(caller.items("longhaul_run_demand", "service=agents,pool=a").await, json!([]));
    let of_version = |version: &str, value: &str| json!([{"service": "agents", "version": version}, value]);
    let stable = json!([of_version("stable", "11")]);
    assert_eq!(caller.items("longhaul_run_demand", "service=agents,version=stable").await, stable);
    let both = json!([of_version("canary", "0"), of_version("stable", "11")]);
    assert_eq!(caller.items("longhaul_run_demand", "version in (stable,canary)").await, both);
    let (status, failure) = caller.ask(&format!("{API}/namespaces/x/longhaul_run_demand?labelSelector=a+b"), &[]).await;
    assert_eq!((status.as_u16(), &failure["reason"]), (400, &json!("BadRequest")));

    // What drains is left out: its runs end there, and no pod more is wanted for them.
    let address = backends[0].url().strip_prefix("http://").expect("a URL").to_owned();
    assert_eq!(proxy.drain("agents", &address, false).await.status(), 200);
    caller.becomes("longhaul_outstanding_runs", "service=agents", of_service("4")).await;
    caller.becomes("longhaul_run_demand", "service=agents", of_service("7")).await;
}

#[tokio::test]
async fn what_waits_for_no_version_counts_for_each_by_its_weight() {
    let (files, clients) = (Files::new(), Authority::new());
    files.write("clients.crt", &clients.pem);
    let more = format!(", client_ca_file: {}/clients.crt}}", files.path().display());
    let config =
        files.config(&more, "").replace("name: stable,", "name: stable, weight: 3,").replace("weight: 0", "weight: 1");
    let proxy = start_proxy(&config).await;
    let mut caller = Caller::connect(&proxy, &files.authority, Some(&clients.client("anybody"))).await;
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(start_run(&proxy).await);
    }
    let of_version = |version: &str, value: &str| json!([{"service": "agents", "version": version}, value]);
    let both = json!([of_version("canary", "1500m"), of_version("stable", "4500m")]);
    caller.becomes("longhaul_run_demand", "version", both).await;
    let canary = json!([of_version("canary", "1500m")]);
    assert_eq!(caller.items("longhaul_placeable_demand", "version in (canary)").await, canary);
}

#[tokio::test]
async fn without_a_good_certificate_it_is_401() {
    let (files, clients, others) = (Files::new(), Authority::new(), Authority::new());
    files.write("clients.crt", &clients.pem);
    let more = format!(", client_ca_file: {}/clients.crt}}", files.path().display());
    let proxy = start_proxy(&files.config(&more, "")).await;
    let good = clients.client("anybody");
    let wrong_purpose = clients.issue("anybody", ExtendedKeyUsagePurpose::ServerAuth);
    let stranger = others.client("anybody");
    for (identity, expected) in [(None, 401), (Some(&stranger), 401), (Some(&wrong_purpose), 401), (Some(&good), 200)] {
        let mut caller = Caller::connect(&proxy, &files.authority, identity).await;
        let (status, answer) = caller.ask(API, &[]).await;
        assert_eq!(status.as_u16(), expected, "{answer}");
        assert_eq!(answer["kind"], if expected == 200 { "APIResourceList" } else { "Status" });
    }

    // Files that change count from the next connection (the certificate) or request (the authority) on.
    let mut old = Caller::connect(&proxy, &files.authority, Some(&good)).await;
    let renewed = files.renew();
    files.write("clients.crt", &others.pem);
    assert_eq!(proxy.admin("POST", "/api/v1/reload").await.status(), 200);
    let mut asked = 0;
    while old.ask(API, &[]).await.0 != 401 {
        asked += 1;
        assert!(asked < 500, "the old authority still counts");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let mut new = Caller::connect(&proxy, &files.authority, Some(&stranger)).await;
    assert_eq!(new.ask(API, &[]).await.0, 200);
    assert!(old.server != renewed && new.server == renewed);
}

#[tokio::test]
async fn strangers_that_ask_nothing_hold_no_places() {
    let (files, clients) = (Files::new(), Authority::new());
    files.write("clients.crt", &clients.pem);
    let more = format!(", client_ca_file: {}/clients.crt}}", files.path().display());
    let proxy = start_proxy(&files.config(&more, "")).await;
    let good = clients.client("anybody");
    let mut known = Caller::connect(&proxy, &files.authority, Some(&good)).await;
    assert_eq!(known.ask(API, &[]).await.0, 200);
    let mut strangers = Vec::new();
    for _ in 0..64 {
        strangers.push(Caller::connect(&proxy, &files.authority, None).await);
    }
    within("a place", async {
        let mut another = Caller::connect(&proxy, &files.authority, Some(&good)).await;
        assert_eq!(another.ask(API, &[]).await.0, 200);
    })
    .await;
    for mut stranger in strangers {
        let told = within("the end of its connection", async {
            while !stranger.sender.is_closed() {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        });
        told.await;
        assert!(stranger.sender.ready().await.is_err());
    }
    assert!(!known.sender.is_closed(), "whoever is known may be silent");
}

const CONFIG_MAP: &str = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";

fn config_map(authority: &Authority) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "extension-apiserver-authentication", "namespace": "kube-system"},
        "data": {
            "requestheader-client-ca-file": authority.pem,
            "requestheader-allowed-names": "[\"front-proxy-client\"]",
            "requestheader-username-headers": "[\"X-Remote-User\"]",
            "requestheader-group-headers": "[\"X-Remote-Group\"]",
            "requestheader-extra-headers-prefix": "[\"X-Remote-Extra-\"]",
        },
    })
}

#[tokio::test]
async fn the_front_proxy_is_known_by_what_the_cluster_says() {
    let (files, authority) = (Files::new(), Authority::new());
    let cluster = Cluster::start().await;
    let kubeconfig = cluster.kubeconfig(files.path(), "agents");
    let config = files
        .config("}", "")
        .replace("kubernetes:\n", &format!("kubernetes:\n  kubeconfig: {}\n", kubeconfig.display()));
    let proxy = start_proxy(&config).await;
    let front_proxy = authority.client("front-proxy-client");
    let mut caller = Caller::connect(&proxy, &files.authority, Some(&front_proxy)).await;
    let person = [("x-remote-user", "system:serviceaccount:kube-system:horizontal-pod-autoscaler")];
    let (status, failure) = caller.ask(API, &person).await;
    assert_eq!(status.as_u16(), 401, "nobody is known yet: {failure}");

    // Whoever is refused has it read again.
    cluster.put(CONFIG_MAP, config_map(&authority));
    caller.ask_until(API, &person, 200).await;
    assert_eq!(caller.ask(API, &[]).await.0, 401, "for nobody");
    assert_eq!(caller.ask(API, &[("x-remote-user", "")]).await.0, 401, "for nobody");
    let mut other = Caller::connect(&proxy, &files.authority, Some(&authority.client("somebody-else"))).await;
    assert_eq!(other.ask(API, &person).await.0, 401, "another name of the same authority");

    // What was good last stays.
    cluster.fail(true);
    let asked = cluster.asked().len();
    assert_eq!(other.ask(API, &person).await.0, 401);
    eventually_async("it is read again", || async { cluster.asked().len() > asked }).await;
    assert_eq!(caller.ask(API, &person).await.0, 200);
    cluster.fail(false);

    // The cluster has another authority.
    let newer = Authority::new();
    cluster.put(CONFIG_MAP, config_map(&newer));
    let mut next = Caller::connect(&proxy, &files.authority, Some(&newer.client("front-proxy-client"))).await;
    next.ask_until(API, &person, 200).await;
    assert_eq!(caller.ask(API, &person).await.0, 401);
}

#[tokio::test]
async fn a_replica_that_can_not_be_asked_is_an_error() {
    let (files, clients) = (Files::new(), Authority::new());
    files.write("clients.crt", &clients.pem);
    // Nothing listens there.
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
    let directory = files.path().display();
    let more = format!(", client_ca_file: {directory}/clients.crt, replicas: {{dns: 127.0.0.1, port: {free}}}}}");
    let proxy = start_proxy(&files.config(&more, "")).await;
    let mut caller = Caller::connect(&proxy, &files.authority, Some(&clients.client("anybody"))).await;
    let (status, failure) = caller.ask(&format!("{API}/namespaces/default/longhaul_run_demand"), &[]).await;
    assert_eq!((status.as_u16(), &failure["reason"]), (503, &json!("ServiceUnavailable")));
    assert!(
        failure["message"].as_str().is_some_and(|message| message.contains(&format!("127.0.0.1:{free}"))),
        "{failure}"
    );
}
