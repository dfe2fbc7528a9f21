//! Deletion costs: replicas of the proxy elect one that tells the cluster which pods would lose runs.
#![cfg(feature = "kubernetes")]

mod support;

use std::net::Ipv4Addr;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Cluster, Proxy, RawClient, eventually_within, start_proxy};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

/// The cluster is asked every few seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// An agent that works and works, on an address of its own.
struct Agent {
    address: String,
    _task: AbortOnDropHandle<()>,
}

impl Agent {
    async fn start(ip: Ipv4Addr) -> Agent {
        let listener = TcpListener::bind((ip, 0)).await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let task = tokio::spawn(async move {
            let mut connections = Vec::new();
            while let Ok((connection, _)) = listener.accept().await {
                connections.push(connection);
            }
        });
        Agent { address, _task: AbortOnDropHandle::new(task) }
    }
}

const PODS: &str = "/api/v1/namespaces/agents/pods";
const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/agents/leases/longhaul";

fn pod(name: &str, ip: Ipv4Addr) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "agents", "uid": format!("uid-{name}")},
        "spec": {"containers": []}, "status": {"phase": "Running", "podIP": ip.to_string(), "podIPs": [{"ip": ip.to_string()}]},
    })
}

fn cost(cluster: &Cluster, name: &str) -> Option<String> {
    let pod = cluster.get(&format!("{PODS}/{name}")).expect("a pod");
    pod["metadata"]["annotations"]["controller.kubernetes.io/pod-deletion-cost"].as_str().map(str::to_owned)
}

fn holder(cluster: &Cluster) -> Option<String> {
    let lease = cluster.get(LEASE)?;
    lease["spec"]["holderIdentity"].as_str().filter(|holder| !holder.is_empty()).map(str::to_owned)
}

async fn replica(cluster: &Cluster, directory: &tempfile::TempDir, agents: &[Agent]) -> Proxy {
    let kubeconfig = cluster.kubeconfig(directory.path(), "agents");
    let endpoints: Vec<String> = agents.iter().map(|agent| format!("\"http://{}\"", agent.address)).collect();
    let config = format!(
        "kubernetes: {{kubeconfig: {}, pod_deletion_cost: true}}\nservices:\n  - name: agents\n    agent_protocol: http\n    \
         session: {{key: [{{header: x-session}}]}}\n    versions: [{{name: stable, endpoints: [{}]}}]\n",
        kubeconfig.display(),
        endpoints.join(", ")
    );
    start_proxy(&config).await
}

async fn start_run(proxy: &Proxy, session: &str) -> RawClient {
    let mut client = proxy.connect().await;
    let head =
        format!("POST /run HTTP/1.1\r\nHost: agents.test\r\nx-session: {session}\r\nContent-Length: 2\r\n\r\n{{}}");
    client.send(head).await;
    client
}

#[tokio::test]
async fn idle_pods_are_cheaper_than_those_with_runs_and_one_replica_says_so() {
    let directory = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start().await;
    let ips = [Ipv4Addr::new(127, 0, 0, 31), Ipv4Addr::new(127, 0, 0, 32)];
    let agents = [Agent::start(ips[0]).await, Agent::start(ips[1]).await];
    cluster.put(&format!("{PODS}/a"), pod("a", ips[0]));
    cluster.put(&format!("{PODS}/b"), pod("b", ips[1]));
    let mut idle = pod("idle", Ipv4Addr::new(127, 0, 0, 33));
    idle["metadata"]["annotations"] = json!({"controller.kubernetes.io/pod-deletion-cost": "-5"});
    cluster.put(&format!("{PODS}/idle"), idle);

    let first = replica(&cluster, &directory, &agents).await;
    eventually_within(PATIENCE, "there is a leader", || holder(&cluster).is_some()).await;
    let leader = holder(&cluster);
    let second = replica(&cluster, &directory, &agents).await;
    let client = start_run(&first, "one").await;
    let costs = || (cost(&cluster, "a"), cost(&cluster, "b"));
    eventually_within(PATIENCE, "the pod with the run is dear", || {
        let dear = Some("1001".to_owned());
        matches!(costs(), (one, None) | (None, one) if one == dear)
    })
    .await;
    assert_eq!(holder(&cluster), leader, "the second waits");
    assert_eq!(cluster.get(LEASE).expect("a lease")["spec"]["leaseTransitions"], 0);

    assert_eq!(cost(&cluster, "idle").as_deref(), Some("-5"), "what others wrote is theirs");
    let patches = cluster.asked().iter().filter(|asked| asked.method == "PATCH").count();
    assert_eq!(patches, 1, "nothing is written that says nothing new");

    // The leader drains: it gives the lease up, and the other need not wait for its end.
    let _runs = [start_run(&second, "two").await, start_run(&second, "two").await];
    drop(client);
    first.app.drain.drain();
    eventually_within(PATIENCE, "there is another leader", || holder(&cluster).is_some_and(|now| Some(now) != leader))
        .await;
    eventually_within(PATIENCE, "it says what it knows", || {
        let (one, other) = costs();
        let dear = Some("2001".to_owned());
        let cheap = |cost: &Option<String>| cost.as_deref().is_none_or(|cost| cost == "0");
        (one == dear && cheap(&other)) || (other == dear && cheap(&one))
    })
    .await;
}
