//! The scaler of KEDA: a real gRPC client asks as KEDA does, of one replica and of several.
#![cfg(feature = "kubernetes")]

mod support;

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use longhaul::config::Address;
use support::{
    Backend, Proxy, RawClient, Script, ZoneServer, eventually, eventually_async, start_proxy, start_proxy_with, within,
};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

/// As in KEDA's `externalscaler.proto`; written again here, so that a slip in the product's own shows.
#[derive(Clone, PartialEq, prost::Message)]
struct ScaledObjectRef {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(map = "string, string", tag = "3")]
    scaler_metadata: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct IsActiveResponse {
    #[prost(bool, tag = "1")]
    result: bool,
}

/// `MetricSpec` and `MetricValue` have the same fields.
#[derive(Clone, PartialEq, prost::Message)]
struct Metric {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int64, tag = "2")]
    whole: i64,
    #[prost(double, tag = "3")]
    float: f64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Metrics {
    #[prost(message, repeated, tag = "1")]
    list: Vec<Metric>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetMetricsRequest {
    #[prost(message, optional, tag = "1")]
    scaled_object_ref: Option<ScaledObjectRef>,
    #[prost(string, tag = "2")]
    metric_name: String,
}

/// What KEDA is to us.
struct Keda {
    channel: Channel,
    object: ScaledObjectRef,
}

impl Keda {
    async fn connect(proxy: &Proxy, metadata: &[(&str, &str)]) -> Keda {
        let Some(Address::Tcp(address)) = proxy.app.bound.keda else { panic!("there is a scaler") };
        let channel =
            Endpoint::try_from(format!("http://{address}")).expect("a URL").connect().await.expect("a server");
        let scaler_metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let object = ScaledObjectRef { name: "agents".to_owned(), namespace: "default".to_owned(), scaler_metadata };
        Keda { channel, object }
    }

    async fn call<Question, Answer>(&self, name: &str, question: Question) -> Result<Answer, Status>
    where
        Question: prost::Message + Default + 'static,
        Answer: prost::Message + Default + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await.expect("a connection");
        let path = PathAndQuery::try_from(format!("/externalscaler.ExternalScaler/{name}")).expect("a path");
        let codec = ProstCodec::<Question, Answer>::default();
        within(name, grpc.unary(Request::new(question), path, codec)).await.map(|answer| answer.into_inner())
    }

    async fn is_active(&self) -> Result<bool, Status> {
        self.call("IsActive", self.object.clone()).await.map(|answer: IsActiveResponse| answer.result)
    }

    async fn metric(&self) -> Result<f64, Status> {
        let request = GetMetricsRequest {
            scaled_object_ref: Some(self.object.clone()),
            metric_name: "longhaul_run_demand".to_owned(),
        };
        self.call("GetMetrics", request).await.map(|answer: Metrics| answer.list[0].float)
    }

    async fn stream(&self) -> Result<Streaming<IsActiveResponse>, Status> {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await.expect("a connection");
        let path = PathAndQuery::from_static("/externalscaler.ExternalScaler/StreamIsActive");
        let codec = ProstCodec::<ScaledObjectRef, IsActiveResponse>::default();
        let answer = grpc.server_streaming(Request::new(self.object.clone()), path, codec).await;
        answer.map(|answer| answer.into_inner())
    }
}

async fn next(stream: &mut Streaming<IsActiveResponse>) -> bool {
    within("a push", stream.message()).await.expect("no end").expect("a message").result
}

/// Until this is pushed.
async fn becomes(stream: &mut Streaming<IsActiveResponse>, active: bool) {
    while next(stream).await != active {}
}

fn agents(endpoints: &str, more: &str) -> String {
    format!(
        "kubernetes: {{keda: {{address: \"127.0.0.1:0\"{more}}}}}\nservices:\n  - name: agents\n    agent_protocol: http\n    \
         runs: {{max_per_endpoint: 4, queue: {{max: 100, timeout: 30s}}}}\n    \
         versions: [{{name: stable, endpoints: [{endpoints}]}}]\n"
    )
}

async fn start_run(proxy: &Proxy) -> RawClient {
    let mut client = proxy.connect().await;
    client.send("POST /run HTTP/1.1\r\nHost: agents.test\r\nContent-Length: 2\r\n\r\n{}").await;
    client
}

#[tokio::test]
async fn the_first_run_that_waits_is_pushed_at_once() {
    let proxy = start_proxy(&agents("", "")).await;
    let keda = Keda::connect(&proxy, &[("service", "agents")]).await;
    let mut stream = keda.stream().await.expect("a stream");
    assert!(!next(&mut stream).await, "what is true when it begins");
    let mut took = Vec::new();
    for _ in 0..3 {
        let mut client = proxy.connect().await;
        let begun = longhaul::ids::now();
        client.send("POST /run HTTP/1.1\r\nHost: agents.test\r\nContent-Length: 2\r\n\r\n{}").await;
        becomes(&mut stream, true).await;
        took.push(begun.elapsed());
        assert_eq!(keda.is_active().await.ok(), Some(true));
        drop(client);
        // Idleness is told only when it has lasted.
        becomes(&mut stream, false).await;
    }
    took.sort_unstable();
    println!("activation sent after the first queued run: {took:?}");
    assert!(took[took.len() / 2] < Duration::from_millis(100), "{took:?}");
    assert_eq!(keda.is_active().await.ok(), Some(false));
}

#[tokio::test]
async fn metrics_targets_and_mistakes() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&agents(&format!("\"{}\"", backend.url()), "")).await;
    let keda = Keda::connect(&proxy, &[("service", "agents"), ("target", "2.5")]).await;
    let spec: Metrics = keda.call("GetMetricSpec", keda.object.clone()).await.expect("a spec");
    assert_eq!(spec.list, [Metric { name: "longhaul_run_demand".to_owned(), whole: 3, float: 2.5 }]);
    assert_eq!(keda.metric().await.ok(), Some(0.0));
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(start_run(&proxy).await);
    }
    proxy.metric_becomes("longhaul_run_demand", &[], 6.0).await;
    eventually_async("six runs, two of them waiting", || async { keda.metric().await.ok() == Some(6.0) }).await;
    let of = async |metadata: &[(&str, &str)]| Keda::connect(&proxy, metadata).await;
    let version = of(&[("service", "agents"), ("version", "stable"), ("metric", "queued_runs")]).await;
    eventually_async("of the version", || async { version.metric().await.ok() == Some(2.0) }).await;
    // Where it is not said, a pod is to have as many runs as it may.
    let spec: Metrics = version.call("GetMetricSpec", version.object.clone()).await.expect("a spec");
    assert_eq!((spec.list[0].name.as_str(), spec.list[0].float), ("longhaul_queued_runs", 4.0));
    let saturation = of(&[("service", "agents"), ("metric", "saturation"), ("target", "0.8")]).await;
    eventually_async("1.5", || async { saturation.metric().await.ok() == Some(1.5) }).await;

    let code = |status: Result<bool, Status>| status.expect_err("a mistake").code();
    assert_eq!(code(of(&[]).await.is_active().await), Code::InvalidArgument);
    assert_eq!(code(of(&[("service", "x")]).await.is_active().await), Code::NotFound);
    assert_eq!(code(of(&[("service", "agents"), ("metric", "cpu")]).await.is_active().await), Code::InvalidArgument);
    assert_eq!(of(&[("service", "x")]).await.stream().await.err().map(|status| status.code()), Some(Code::NotFound));
    let nothing: Result<Metrics, Status> = keda.call("StreamMetricSpec", keda.object.clone()).await;
    assert_eq!(nothing.expect_err("not built").code(), Code::Unimplemented);
}

#[tokio::test]
async fn a_reload_may_stop_it() {
    let proxy = start_proxy(&agents("", "")).await;
    let keda = Keda::connect(&proxy, &[("service", "agents")]).await;
    let mut stream = keda.stream().await.expect("a stream");
    assert!(!next(&mut stream).await);
    let without = agents("", "").replace("kubernetes:", "# kubernetes:");
    assert_eq!(proxy.reload(&without).await.status(), 200);
    let end = within("the end of the stream", stream.message()).await;
    assert!(end.is_err() || end.is_ok_and(|message| message.is_none()));
}

/// Replicas that find each other: each has an address of its own, and all the same port.
struct Fleet {
    dns: ZoneServer,
    /// Keep the port from being given to somebody else.
    _reserved: Vec<socket2::Socket>,
    port: u16,
    replicas: Vec<Option<Proxy>>,
}

const NAME: &str = "longhaul-headless.agents.svc";

impl Fleet {
    /// The `number`th of them.
    fn ip(number: usize) -> Ipv4Addr {
        Ipv4Addr::new(127, 0, 0, 10 + u8::try_from(number).expect("few"))
    }

    async fn start(count: usize, endpoints: &str) -> Fleet {
        let dns = ZoneServer::start().await;
        let mut reserved = Vec::new();
        let mut port = 0;
        for number in 0..count {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
            socket.set_reuse_address(true).expect("an option");
            socket.bind(&SocketAddr::from((Fleet::ip(number), port)).into()).expect("a free port");
            port = socket.local_addr().expect("bound").as_socket().expect("IPv4").port();
            reserved.push(socket);
        }
        let mut fleet = Fleet { dns, _reserved: reserved, port, replicas: Vec::new() };
        fleet.name(&(0..count).collect::<Vec<_>>());
        for number in 0..count {
            let config = agents(endpoints, &format!(", replicas: {{dns: {NAME}, port: {port}}}"));
            let admin =
                format!("admin: {{address: \"127.0.0.1:0\", probes: {{address: \"{}:{port}\"}}}}\n", Fleet::ip(number));
            let server = fleet.dns.address;
            let proxy = start_proxy_with(&(admin + &config), |options| {
                options.heritage.surroundings.name_servers = Some(vec![server]);
            })
            .await;
            fleet.replicas.push(Some(proxy));
        }
        fleet
    }

    /// These are in DNS.
    fn name(&self, numbers: &[usize]) {
        self.dns.set(NAME, &numbers.iter().map(|number| Fleet::ip(*number)).collect::<Vec<_>>());
    }

    fn replica(&self, number: usize) -> &Proxy {
        self.replicas[number].as_ref().expect("it runs")
    }

    /// Ends it without a word, and waits until nothing listens there.
    async fn kill(&mut self, number: usize) {
        drop(self.replicas[number].take());
        let address = SocketAddr::from((Fleet::ip(number), self.port));
        eventually_async("nobody listens", || async { tokio::net::TcpStream::connect(address).await.is_err() }).await;
    }
}

#[tokio::test]
async fn all_replicas_are_summed_and_one_that_is_gone_is_never_a_dip() {
    let backend = Backend::start().await;
    backend.drip_each();
    let mut fleet = Fleet::start(3, &format!("\"{}\"", backend.url())).await;
    let keda = Keda::connect(fleet.replica(0), &[("service", "agents")]).await;
    let mut clients = Vec::new();
    for number in [0, 0, 1, 2, 2, 2] {
        clients.push(start_run(fleet.replica(number)).await);
    }
    eventually_async("the sum of all", || async { keda.metric().await.ok() == Some(6.0) }).await;

    // It is killed: its last numbers count, whatever is asked and how often.
    fleet.kill(2).await;
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert_eq!(keda.metric().await.ok(), Some(6.0));
    }
    // DNS has no answer: those that it named last count.
    fleet.dns.fail(true);
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(keda.metric().await.ok(), Some(6.0));
    fleet.dns.fail(false);
    // It has left: it counts no more.
    fleet.name(&[0, 1]);
    eventually_async("the sum of those that are left", || async { keda.metric().await.ok() == Some(3.0) }).await;

    // One that was never heard, and can't be: no sum at all.
    fleet.name(&[0, 1, 2]);
    eventually_async("an error", || async { keda.metric().await.is_err() }).await;
    let error = keda.metric().await.expect_err("an error");
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains(&format!("{}:{}", Fleet::ip(2), fleet.port)), "{error}");
    assert_eq!(keda.is_active().await.ok(), Some(true), "what is known for sure is said");
}

/// As an older one might: it has to be asked anew each time.
#[tokio::test]
async fn a_replica_that_can_not_be_waited_for_is_asked_now_and_then() {
    let dns = ZoneServer::start().await;
    dns.set(NAME, &[Ipv4Addr::LOCALHOST]);
    let replica = Backend::start().await;
    replica.each(|_| Script::answer(200, &[("content-type", "application/json")], r#"{"services": {}}"#));
    let port = replica.address().port();
    let server = dns.address;
    let proxy = start_proxy_with(&agents("", &format!(", replicas: {{dns: {NAME}, port: {port}}}")), |options| {
        options.heritage.surroundings.name_servers = Some(vec![server]);
    })
    .await;
    let keda = Keda::connect(&proxy, &[("service", "agents")]).await;
    let mut stream = keda.stream().await.expect("a stream");
    assert!(!next(&mut stream).await);
    eventually("it is asked", || replica.request_count() > 0).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let asked = replica.request_count();
    assert!(asked <= 3, "{asked} times within a second");
}

#[tokio::test]
async fn a_run_that_waits_at_another_replica_is_pushed_at_once() {
    let fleet = Fleet::start(2, "").await;
    let keda = Keda::connect(fleet.replica(0), &[("service", "agents")]).await;
    let mut stream = keda.stream().await.expect("a stream");
    assert!(!next(&mut stream).await);
    // Until the other is followed, which is not at once.
    let client = start_run(fleet.replica(1)).await;
    becomes(&mut stream, true).await;
    drop(client);
    becomes(&mut stream, false).await;
    let begun = longhaul::ids::now();
    let _client = start_run(fleet.replica(1)).await;
    becomes(&mut stream, true).await;
    let took = begun.elapsed();
    println!("activation sent after the first run that waits at another replica: {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}: not by looking once a second");
}
