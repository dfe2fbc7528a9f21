//! Streaming: bytes come as they come, whole, both ways.

mod support;

use support::{Backend, RawClient, Script, get, start_proxy};

fn one_service(backend: &Backend) -> String {
    format!("services: [{{name: agent, versions: [{{name: v1, endpoints: [\"{}\"]}}]}}]\n", backend.url())
}

#[tokio::test]
async fn the_first_event_arrives_before_the_second_is_sent() {
    let backend = Backend::start().await;
    backend.drip_each();
    let proxy = start_proxy(&one_service(&backend)).await;
    let mut client = RawClient::connect(proxy.address).await;
    client.send("GET /stream HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n").await;
    let drip = backend.drip().await;
    assert_eq!(client.read_head().await.status, 200);
    drip.event("first").await;
    client.read_chunks_until("first").await;
    drip.event("second").await;
    client.read_chunks_until("second").await;
    drip.finish().await;
}

#[tokio::test]
async fn a_fixed_answer_passes() {
    let backend = Backend::start().await;
    backend.each(|_| Script::ok("hello"));
    let proxy = start_proxy(&one_service(&backend)).await;
    let response = get(proxy.address, "/x", "").await;
    assert_eq!((response.status(), response.text().as_str()), (200, "hello"));
    assert_eq!(response.header("longhaul-affinity"), Some("none"));
}
