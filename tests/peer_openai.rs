//! Peer OpenAI: the official OpenAI client and scripted servers, with and without the proxy between.

mod support;

use serde_json::json;
use support::{
    Fleet, PeerClient, PeerScript, Peers, Proxy, Transcript, assert_same, eventually_async, start_proxy, transcript,
};

const SERVER: PeerScript = PeerScript { environment: "openai", file: "openai_server.py" };
const CLIENT: PeerScript = PeerScript { environment: "openai", file: "openai_client.py" };
static SERVERS: Fleet = Fleet::new(SERVER, &[], "/seen");

const CHAT: &[&str] = &["chat", "chat_stream", "chat_fails", "chat_leave"];
const RESPONSES: &[&str] = &[
    "plain",
    "stream",
    "chain",
    "conversation",
    "background",
    "cancel",
    "resume",
    "deleted",
    "unknown",
    "leave",
    "socket",
    "lanes",
];

async fn proxy_before(servers: &Peers, protocol: &str) -> Proxy {
    let urls = servers.urls();
    start_proxy(&format!(
        "services:\n  - name: model\n    agent_protocol: {protocol}\n    \
         versions: [{{name: stable, endpoints: {urls}}}]\n"
    ))
    .await
}

/// What a client of one server sees and what one of the proxy does.
async fn both(servers: &Peers, proxy: &Proxy, scenarios: &[&str]) -> (Transcript, Transcript) {
    let (direct, proxied) = (servers.each()[0].url(), format!("http://{}", proxy.address));
    tokio::join!(transcript(CLIENT, &direct, scenarios), transcript(CLIENT, &proxied, scenarios))
}

/// Nothing is at work any more, at the servers and in the proxy's count.
async fn assert_idle(servers: &Peers, proxy: &Proxy) {
    eventually_async("the servers are idle", || async {
        servers.counts("/seen", "/running").await.iter().sum::<u64>() == 0
    })
    .await;
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

async fn assert_no_difference(count: usize, protocol: &str, scenarios: &[&str]) {
    let servers = SERVERS.take(count).await;
    let proxy = proxy_before(&servers, protocol).await;
    let (direct, proxied) = both(&servers, &proxy, scenarios).await;
    assert_eq!(direct.len(), scenarios.len(), "every scenario ran");
    assert_same(&direct, &proxied);
    assert_idle(&servers, &proxy).await;
}

#[tokio::test]
async fn a_client_sees_no_difference_through_plain_http_before_one_server() {
    assert_no_difference(1, "http", &[RESPONSES, CHAT].concat()).await;
}

/// Chat completions keep nothing, so any server will do.
#[tokio::test]
async fn chat_completions_need_no_recognition_before_three_servers() {
    assert_no_difference(3, "http", CHAT).await;
}

#[tokio::test]
async fn recognised_responses_see_no_difference_before_three_servers() {
    assert_no_difference(3, "openai-responses", RESPONSES).await;
}

#[tokio::test]
async fn recognised_chat_completions_see_no_difference_before_three_servers() {
    assert_no_difference(3, "openai-chat", CHAT).await;
}

#[tokio::test]
async fn recognised_by_itself_a_client_sees_no_difference_before_three_servers() {
    assert_no_difference(3, "auto", &[RESPONSES, CHAT].concat()).await;
}

/// A failure in the middle of a stream comes after status 200; a background response that failed is told by its poll.
#[tokio::test]
async fn recognised_failures_inside_a_200_are_failures() {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, "auto").await;
    let url = format!("http://{}", proxy.address);
    transcript(CLIENT, &url, &["stream", "background", "chat_fails"]).await;
    // `response.failed` in a stream, `failed` in a poll, `error` in a chunk, and one answer of 500.
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"failed\""], 4.0).await;
}

/// What the packages compress (websockets at both ends) is counted all the same.
#[tokio::test]
async fn recognised_runs_of_a_compressed_socket_are_counted_as_the_servers_count_them() {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, "auto").await;
    let mut client = PeerClient::start(CLIENT, &format!("http://{}", proxy.address), &["socket_held"]);
    client.prints("begun").await;
    assert_eq!(servers.counts("/seen", "/running").await.iter().sum::<u64>(), 1);
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 1.0).await;
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\""], 2.0).await;
    client.go_on();
    let seen = client.finish().await;
    let expected = ["permessage-deflate", "response.completed", "response.completed", "response.created"];
    assert_eq!(seen["socket_held"], json!(expected));
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"cancelled\""], 1.0).await;
    assert_idle(&servers, &proxy).await;
}
