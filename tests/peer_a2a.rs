//! Peer A2A: the official A2A client and servers, in every binding, with and without the proxy between.

mod support;

use support::{Fleet, PeerClient, PeerScript, Peers, Proxy, Transcript, assert_same, start_proxy, transcript};

const SERVER: PeerScript = PeerScript { environment: "a2a", file: "a2a_server.py" };
const CLIENT: PeerScript = PeerScript { environment: "a2a", file: "a2a_client.py" };
static SERVERS: Fleet = Fleet::new(SERVER, &[], "/seen");

async fn proxy_before(servers: &Peers, protocol: &str) -> Proxy {
    let urls = servers.urls();
    start_proxy(&format!(
        "services:\n  - name: agent\n    agent_protocol: {protocol}\n    \
         versions: [{{name: stable, endpoints: {urls}}}]\n"
    ))
    .await
}

fn assert_right(direct: &Transcript) {
    assert_eq!(direct["rest_cancel"]["state"], "TASK_STATE_CANCELED", "the script is right");
    assert_eq!(direct["contexts"][0], serde_json::json!(["1", "2", "3", "4"]), "the script is right");
}

/// Nothing is rewritten for plain http, so the client is told to stay at the proxy.
#[tokio::test]
async fn a_client_sees_no_difference_through_plain_http_before_one_server() {
    let servers = SERVERS.take(1).await;
    let proxy = proxy_before(&servers, "http").await;
    let url = format!("http://{}", proxy.address);
    let stay = PeerClient::start_with(CLIENT, &url, &["all"], &[("A2A_STAY", "1")]);
    let direct = servers.each()[0].url();
    let (mut direct, mut proxied) = tokio::join!(transcript(CLIENT, &direct, &["all"]), stay.finish());
    assert_right(&direct);
    direct.remove("card");
    proxied.remove("card");
    assert_same(&direct, &proxied);
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

/// The card names the proxy, so that clients come through it, and their contexts and tasks are found.
async fn assert_no_difference_before_three_servers(protocol: &str) {
    let servers = SERVERS.take(3).await;
    let proxy = proxy_before(&servers, protocol).await;
    let (direct, url) = (servers.each()[0].url(), format!("http://{}", proxy.address));
    let (direct, proxied) = tokio::join!(transcript(CLIENT, &direct, &["all"]), transcript(CLIENT, &url, &["all"]));
    assert_right(&direct);
    assert_same(&direct, &proxied);
    let requests = proxy.metric("longhaul_requests_total", &[]).await.expect("counted");
    assert!(requests > 150.0, "the client came through the proxy: {requests} requests");
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

#[tokio::test]
async fn recognised_a_client_sees_no_difference_before_three_servers() {
    assert_no_difference_before_three_servers("a2a").await;
}

#[tokio::test]
async fn recognised_by_itself_a_client_sees_no_difference_before_three_servers() {
    assert_no_difference_before_three_servers("auto").await;
}
