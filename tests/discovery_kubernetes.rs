//! Discovery in Kubernetes: the real client against a scripted API server, the pods of which are real endpoints.
#![cfg(feature = "kubernetes")]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use longhaul::control::discovery::Surroundings;
use support::*;
use tempfile::TempDir;

/// An API server, and where its kubeconfig is.
async fn cluster() -> (ApiServer, TempDir) {
    let server = ApiServer::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    server.kubeconfig(directory.path());
    (server, directory)
}

/// One service whose endpoints are the pods of `support` at its port `http`.
fn config(directory: &TempDir, rest: &str) -> String {
    config_with(directory, "http", rest)
}

fn config_with(directory: &TempDir, port: &str, rest: &str) -> String {
    format!(
        "kubernetes: {{kubeconfig: {}}}\nservices:\n  - name: support\n    session: {{key: [{{header: x-session-id}}]}}\n{rest}    versions:\n      \
         - name: stable\n        endpoints: [{{kubernetes: {{namespace: agents, service: support, port: {port}}}}}]\n",
        directory.path().join("kubeconfig").display()
    )
}

async fn start(config: &str) -> Proxy {
    let proxy = start_proxy_in(Surroundings::default(), config);
    eventually_async("the proxy is ready", || async { proxy.admin("GET", "/readyz").await.status() == 200 }).await;
    proxy
}

/// The endpoints in this state, sorted.
async fn endpoints(proxy: &Proxy, state: &str) -> Vec<String> {
    let status = proxy.status().await;
    let endpoints = status["services"][0]["versions"][0]["endpoints"].as_array().expect("a list").clone();
    let mut named: Vec<String> = endpoints
        .iter()
        .filter(|endpoint| endpoint["state"] == state)
        .map(|endpoint| endpoint["address"].as_str().expect("an address").to_owned())
        .collect();
    named.sort();
    named
}

fn names(backends: &[&Backend]) -> Vec<String> {
    let mut names: Vec<String> = backends.iter().map(|backend| backend.name()).collect();
    names.sort();
    names
}

async fn are(state: &str, proxy: &Proxy, backends: &[&Backend]) {
    let wanted = names(backends);
    eventually_async(&format!("{wanted:?} are {state}"), || async { endpoints(proxy, state).await == wanted }).await;
}

fn port(backend: &Backend) -> u16 {
    backend.address().port()
}

async fn run(address: SocketAddr, session: &str) -> Response {
    post(address, "/run", &format!("x-session-id: {session}\r\n"), "{}").await
}

#[tokio::test]
async fn pods_are_endpoints_by_their_conditions() {
    let (server, directory) = cluster().await;
    let fleet = Backend::start_fleet(4).await;
    let [ready, new, leaving, gone] = &fleet[..] else { panic!("four") };
    let pods = [
        Pod::of(ready, 1),
        Pod::of(new, 1).not_ready(),
        Pod::of(leaving, 1).terminating(true),
        Pod::of(gone, 1).terminating(false),
    ];
    server.put(slice("support-a", port(ready), &pods));
    let proxy = start(&config(&directory, "")).await;
    are("ready", &proxy, &[ready]).await;
    are("unhealthy", &proxy, &[new]).await;
    are("draining", &proxy, &[leaving]).await;
    let found = proxy.endpoint(&ready.name()).await.expect("an endpoint");
    assert_eq!(found["pod"], format!("pod-{}", pods[0].uid));
    assert_eq!((&found["zone"], &found["source"]), (&"zone-a".into(), &"kubernetes agents/support:http".into()));
    assert_eq!(proxy.endpoint(&leaving.name()).await.expect("an endpoint")["drain"]["by"][0], "source");
    for number in 0..8 {
        assert_eq!(run(proxy.address, &number.to_string()).await.status(), 200);
    }
    assert_eq!(ready.request_count(), 8);

    server.put(slice("support-a", port(ready), &[Pod::of(ready, 1).terminating(true), Pod::of(new, 1)]));
    are("ready", &proxy, &[new]).await;
    assert_eq!(run(proxy.address, "0").await.header("longhaul-affinity"), Some("moved"));
    server.delete("support-a");
    are("ready", &proxy, &[]).await;
    assert_eq!(run(proxy.address, "0").await.code().as_deref(), Some("no_endpoint"));
}

#[tokio::test]
async fn a_port_may_be_a_number_and_one_that_is_not_there_is_told() {
    let (server, directory) = cluster().await;
    let backend = Backend::start_at(([127, 0, 0, 2], 0)).await;
    server.put(slice("support-a", 1, &[Pod::of(&backend, 1)]));
    let proxy = start(&config_with(&directory, &port(&backend).to_string(), "")).await;
    are("ready", &proxy, &[&backend]).await;
    assert_eq!(run(proxy.address, "s").await.status(), 200);
    assert_eq!(proxy.reload(&config_with(&directory, "web", "")).await.status(), 200);
    eventually_async("it is told", || async {
        let problem = proxy.status().await["discovery"][0]["problem"].as_str().unwrap_or_default().to_owned();
        problem.contains("web") && problem.contains("http, metrics")
    })
    .await;
}

#[tokio::test]
async fn an_address_that_another_pod_has_by_now_is_another_endpoint() {
    let (server, directory) = cluster().await;
    let fleet = Backend::start_fleet(2).await;
    let (a, b) = (&fleet[0], &fleet[1]);
    server.put(slice("support-a", port(a), &[Pod::of(a, 1)]));
    let proxy = start(&config(&directory, "")).await;
    are("ready", &proxy, &[a]).await;
    assert_eq!(run(proxy.address, "s").await.header("longhaul-affinity"), Some("new"));
    assert_eq!(run(proxy.address, "s").await.header("longhaul-affinity"), Some("hit"));
    // The same address, in another slice, while the first says that its pod terminates.
    server.put(slice("support-a", port(a), &[Pod::of(a, 1).terminating(true)]));
    server.put(slice("support-b", port(a), &[Pod::of(a, 2), Pod::of(b, 1)]));
    are("ready", &proxy, &[a, b]).await;
    are("draining", &proxy, &[]).await;
    assert_eq!(proxy.endpoint(&a.name()).await.expect("one")["sessions"], 0, "the pin was not to this pod");
    assert_eq!(run(proxy.address, "s").await.header("longhaul-affinity"), Some("lost"));
}

#[tokio::test]
async fn a_pod_in_two_slices_and_two_families_is_one_endpoint() {
    let (server, directory) = cluster().await;
    let backend = Backend::start_at(([127, 0, 0, 2], 0)).await;
    let v4 = Pod::of(&backend, 1);
    let v6 = Pod { address: "::1".to_owned(), ..v4.clone() };
    server.put(slice("support-v6", port(&backend), &[v6]));
    server.put(slice("support-a", port(&backend), &[v4.clone()]));
    server.put(slice("support-b", port(&backend), &[v4.clone().terminating(true)]));
    let proxy = start(&config(&directory, "")).await;
    are("ready", &proxy, &[&backend]).await;
    assert_eq!(proxy.status().await["discovery"][0]["endpoints"]["ready"], 1);
    server.delete("support-b");
    server.delete("support-a");
    eventually_async("it is at its other address", || async {
        endpoints(&proxy, "ready").await == [format!("[::1]:{}", port(&backend))]
    })
    .await;
    // Where it is known, it stays, for as long as that is listed.
    server.put(slice("support-a", port(&backend), &[v4]));
    eventually_async("it was told", || async { proxy.status().await["discovery"][0]["failures"] == 0 }).await;
    assert_eq!(endpoints(&proxy, "ready").await, [format!("[::1]:{}", port(&backend))]);
}

#[tokio::test]
async fn watches_end_expire_and_repeat_themselves() {
    let (server, directory) = cluster().await;
    let fleet = Backend::start_fleet(2).await;
    let (a, b) = (&fleet[0], &fleet[1]);
    server.put(slice("support-a", port(a), &[Pod::of(a, 1)]));
    let proxy = start(&config(&directory, "")).await;
    eventually("it watches", || server.watches() == 1).await;
    assert_eq!(server.lists(), 1);
    server.end_watches();
    eventually("it watches again", || server.watches() == 2).await;
    assert_eq!(server.lists(), 1, "from where it was");
    server.put(slice("support-b", port(b), &[Pod::of(b, 1)]));
    are("ready", &proxy, &[a, b]).await;

    server.expire();
    eventually("it lists again", || server.lists() == 2).await;
    server.send_copies(3, Duration::from_millis(20));
    server.end_watches();
    eventually("it watches slowly", || server.watches() >= 4).await;
    for life in 2..6 {
        server.put(slice("support-b", port(b), &[Pod::of(b, life).not_ready()]));
        server.put(slice("support-b", port(b), &[Pod::of(b, life)]));
    }
    server.delete("support-a");
    are("ready", &proxy, &[b]).await;
    let asked = server.asked();
    let watch = asked.iter().find(|path| path.contains("watch=true")).expect("a watch");
    for part in ["allowWatchBookmarks=true", "timeoutSeconds=", "labelSelector=kubernetes.io%2Fservice-name%3Dsupport"]
    {
        assert!(watch.contains(part), "{part} in {watch}");
    }
}

#[tokio::test]
async fn what_is_refused_is_told_with_what_to_do() {
    let (server, directory) = cluster().await;
    let backend = Backend::start_at(([127, 0, 0, 2], 0)).await;
    server.put(slice("support-a", port(&backend), &[Pod::of(&backend, 1)]));
    server.refuse(Some(403));
    let proxy = start_proxy_in(Surroundings::default(), &config(&directory, ""));
    eventually_async("it is told", || async {
        let answer = proxy.admin("GET", "/readyz").await;
        answer.status() == 503 && answer.text().contains("endpointslices") && answer.text().contains("agents")
    })
    .await;
    server.refuse(None);
    are("ready", &proxy, &[&backend]).await;
    assert_eq!(proxy.admin("GET", "/readyz").await.status(), 200);
}
