//! Peer AI SDK: the chat transport and the message streams of the AI SDK, with and without the proxy between.

mod support;

use support::{Fleet, PeerScript, assert_same, start_proxy, transcript};

const SERVER: PeerScript = PeerScript { environment: "node", file: "ai_sdk_server.mjs" };
const CLIENT: PeerScript = PeerScript { environment: "node", file: "ai_sdk_client.mjs" };
static SERVERS: Fleet = Fleet::new(SERVER, &[], "/seen");

async fn assert_no_difference(count: usize, protocol: &str, keys: &str) {
    let servers = SERVERS.take(count).await;
    let urls = servers.urls();
    let proxy = start_proxy(&format!(
        "services:\n  - name: chat\n    agent_protocol: {protocol}\n    session: {{key: [{keys}]}}\n    \
         versions: [{{name: stable, endpoints: {urls}}}]\n"
    ))
    .await;
    let (direct, proxied) = (servers.each()[0].url(), format!("http://{}", proxy.address));
    let (direct, proxied) = tokio::join!(transcript(CLIENT, &direct, &["all"]), transcript(CLIENT, &proxied, &["all"]));
    assert_eq!(direct["chats"][0][3], "turn 4: x", "the script is right");
    assert_eq!(direct["resume"][0]["whole"], "0 1 2 3 4 5 6 7 8 9 ", "the script is right");
    assert_same(&direct, &proxied);
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

/// The application's own call, of which no protocol knows.
const STOP: &str = "{path: \"/api/chat/{session}/stop\"}";

#[tokio::test]
async fn a_client_sees_no_difference_through_plain_http_before_one_server() {
    assert_no_difference(1, "http", "").await;
}

/// What a configuration can say without recognition: where the chat's id is.
#[tokio::test]
async fn chats_stay_by_their_configured_id_before_three_servers() {
    assert_no_difference(3, "http", "{path: \"/api/chat/{session}/**\"}, {json: /id}").await;
}

#[tokio::test]
async fn recognised_a_client_sees_no_difference_before_three_servers() {
    assert_no_difference(3, "ai-sdk", STOP).await;
}

#[tokio::test]
async fn recognised_by_itself_a_client_sees_no_difference_before_three_servers() {
    assert_no_difference(3, "auto", STOP).await;
}
