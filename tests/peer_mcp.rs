//! Peer MCP: the official MCP clients (Python and TypeScript) and stateful servers, with and without the proxy between.

mod support;

use std::time::Duration;

use support::{
    Fleet, PeerClient, PeerScript, Peers, Proxy, assert_same, eventually_async, fetch, start_proxy, transcript,
};

const SERVER: PeerScript = PeerScript { environment: "mcp", file: "mcp_server.py" };
const PYTHON: PeerScript = PeerScript { environment: "mcp", file: "mcp_client.py" };
const TYPESCRIPT: PeerScript = PeerScript { environment: "node", file: "mcp_client.mjs" };
static SERVERS: Fleet = Fleet::new(SERVER, &[], "/seen");

/// Before these servers, with the protocol and more members of the service.
async fn proxy_before(servers: &Peers, protocol: &str, more: &str) -> Proxy {
    let urls = servers.urls();
    start_proxy(&format!(
        "services:\n  - name: tools\n    agent_protocol: {protocol}\n{more}    \
         versions: [{{name: stable, endpoints: {urls}}}]\n"
    ))
    .await
}

fn url(proxy: &Proxy) -> String {
    format!("http://{}", proxy.address)
}

/// Sees the same of one server and of the proxy before all of `servers`.
async fn assert_no_difference(servers: &Peers, proxy: &Proxy) {
    let direct = servers.each()[0].url();
    let proxied = url(proxy);
    let (python, python_proxied, typescript, typescript_proxied) = tokio::join!(
        transcript(PYTHON, &direct, &["all"]),
        transcript(PYTHON, &proxied, &["all"]),
        transcript(TYPESCRIPT, &direct, &["all"]),
        transcript(TYPESCRIPT, &proxied, &["all"]),
    );
    assert_eq!(python["session"]["counts"], serde_json::json!(["1", "2", "3", "4", "5"]), "the script is right");
    assert_eq!(python["stateless"]["version"], "2026-07-28", "the script is right");
    assert_eq!(typescript["polled"], "polled done", "the script is right");
    assert_same(&python, &python_proxied);
    assert_same(&typescript, &typescript_proxied);
}

#[tokio::test]
async fn clients_see_no_difference_through_plain_http_before_one_server() {
    let servers = SERVERS.take(1).await;
    let proxy = proxy_before(&servers, "http", "").await;
    assert_no_difference(&servers, &proxy).await;
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

/// What a configuration can say without recognition: the session's header, learned from the answer that brings it.
const KEY: &str = "    session: {key: [{header: mcp-session-id}, {response_header: mcp-session-id}]}\n";

#[tokio::test]
async fn sessions_stay_by_their_configured_header_before_three_servers() {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, "http", KEY).await;
    let seen = transcript(PYTHON, &url(&proxy), &["session", "sessions", "progress", "many=200,3"]).await;
    assert_eq!(seen["many"], serde_json::json!({"sessions": 200, "wrong": 0}));
}

#[tokio::test]
async fn recognised_clients_see_no_difference_before_three_servers() {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, "mcp", "").await;
    assert_no_difference(&servers, &proxy).await;
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

#[tokio::test]
async fn recognised_by_themselves_clients_see_no_difference_before_three_servers() {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, "auto", "").await;
    assert_no_difference(&servers, &proxy).await;
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

#[tokio::test]
async fn recognised_200_sessions_over_three_servers_and_none_is_lost() {
    let servers = SERVERS.take(3).await;
    let before = servers.counts("/seen", "/sessions").await;
    let proxy = proxy_before(&servers, "mcp", "").await;
    let seen = transcript(PYTHON, &url(&proxy), &["many=200,3"]).await;
    assert_eq!(seen["many"], serde_json::json!({"sessions": 200, "wrong": 0}));
    let after = servers.counts("/seen", "/sessions").await;
    let new: Vec<u64> = before.iter().zip(&after).map(|(before, after)| after - before).collect();
    assert_eq!(new.iter().sum::<u64>(), 200, "{new:?}");
    assert!(new.iter().all(|count| (60..=74).contains(count)), "spread evenly: {new:?}");
}

/// A session whose server is gone goes to another, which doesn't know it and says so.
#[tokio::test]
async fn clients_of_a_killed_server_start_again_by_their_configured_header() {
    assert_only_the_clients_of_a_killed_server_notice("http", KEY).await;
}

#[tokio::test]
async fn recognised_clients_of_a_killed_server_start_again_and_the_others_notice_nothing() {
    assert_only_the_clients_of_a_killed_server_notice("mcp", "").await;
}

async fn assert_only_the_clients_of_a_killed_server_notice(protocol: &str, more: &str) {
    let mut servers = SERVERS.take(3).await;
    let before = servers.counts("/seen", "/sessions").await;
    let health = "    health: {tcp: true, interval: 250ms, unhealthy_after: 1}\n";
    let proxy = proxy_before(&servers, protocol, &format!("{more}{health}")).await;
    let mut client = PeerClient::start(PYTHON, &url(&proxy), &["survive=200"]);
    client.prints("ready").await;
    let lost = servers.each()[1].count("/seen", "/sessions").await - before[1];
    let killed = servers.each()[1].address().to_string();
    servers.kill(1);
    eventually_async("the proxy notices that the server is gone", || async {
        proxy.endpoint(&killed).await.is_some_and(|endpoint| endpoint["state"] != "ready")
    })
    .await;
    client.go_on();
    let seen = client.finish().await;
    assert!((60..=74).contains(&lost), "spread evenly: {lost} of 200");
    assert_eq!(
        seen["survive"],
        serde_json::json!({"restarted": lost, "untouched": 200 - lost, "broken": []}),
        "{lost} sessions were on the killed server"
    );
}

/// The Python server's refusal of a request without a session carries the id of one that doesn't exist.
#[tokio::test]
async fn recognised_no_session_is_learned_from_a_refusal() {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, "mcp", "").await;
    let ping = serde_json::json!({"jsonrpc": "2.0", "id": 1, "method": "ping"});
    let accept = "Accept: application/json, text/event-stream\r\n";
    // It answers only to the Host that it knows as its own.
    let text = ping.to_string();
    let head = format!("POST /mcp HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n{accept}", proxy.address);
    let answer = fetch(proxy.address, format!("{head}Content-Length: {}\r\n\r\n{text}", text.len())).await;
    assert_eq!(answer.status(), 400, "{answer:?}");
    assert!(answer.header("mcp-session-id").is_some(), "the trap is there: {answer:?}");
    tokio::time::timeout(Duration::from_secs(5), proxy.metric_becomes("longhaul_sessions", &[], 0.0))
        .await
        .expect("no session");
}
