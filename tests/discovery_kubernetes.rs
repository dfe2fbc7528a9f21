//! Discovery in Kubernetes: the real client against a scripted API server, the pods of which are real endpoints.
#![cfg(feature = "kubernetes")]

mod support;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use longhaul::control::discovery::Surroundings;
use support::*;
use tempfile::TempDir;
use tokio::time::Instant;

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

fn names(backends: &[&Backend]) -> Vec<String> {
    let mut names: Vec<String> = backends.iter().map(|backend| backend.name()).collect();
    names.sort();
    names
}

async fn are(state: &str, proxy: &Proxy, backends: &[&Backend]) {
    let wanted = names(backends);
    eventually_async(&format!("{wanted:?} are {state}"), || async { proxy.endpoints_in(state).await == wanted }).await;
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
    server.put(slice("support-a", port(&backend), std::slice::from_ref(&v4)));
    server.put(slice("support-b", port(&backend), &[v4.clone().terminating(true)]));
    let proxy = start(&config(&directory, "")).await;
    are("ready", &proxy, &[&backend]).await;
    assert_eq!(proxy.status().await["discovery"][0]["endpoints"]["ready"], 1);
    server.delete("support-b");
    server.delete("support-a");
    eventually_async("it is at its other address", || async {
        proxy.endpoints_in("ready").await == [format!("[::1]:{}", port(&backend))]
    })
    .await;
    // Where it is known, it stays, for as long as that is listed.
    server.put(slice("support-a", port(&backend), &[v4]));
    eventually_async("it was told", || async { proxy.status().await["discovery"][0]["failures"] == 0 }).await;
    assert_eq!(proxy.endpoints_in("ready").await, [format!("[::1]:{}", port(&backend))]);
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
    eventually("it watches after the list", || server.watches() == 3).await;
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

#[tokio::test]
async fn whoever_wants_to_be_left_alone_for_a_while_is_asked_after_that() {
    for status in [429, 503] {
        let (server, directory) = cluster().await;
        let fleet = Backend::start_fleet(1).await;
        server.put(slice("support-a", port(&fleet[0]), &[Pod::of(&fleet[0], 1)]));
        server.refuse_for(status, 1);
        let proxy = start_proxy_in(Surroundings::default(), &config(&directory, ""));
        eventually("it was asked", || !server.asked().is_empty()).await;
        let refused = Instant::now();
        eventually_async("that is told", || async {
            let problem = proxy.status().await["discovery"][0]["problem"].as_str().unwrap_or_default().to_owned();
            problem.contains(&status.to_string()) && problem.contains("Too many requests")
        })
        .await;
        eventually("it is asked again", || server.asked().len() > 1).await;
        let passed = refused.elapsed();
        assert!(passed >= Duration::from_millis(900), "{status}: after {passed:?}");
        server.refuse(None);
        are("ready", &proxy, &[&fleet[0]]).await;
    }
}

#[tokio::test]
async fn one_slice_that_can_not_be_read_keeps_no_other_back() {
    let (server, directory) = cluster().await;
    let fleet = Backend::start_fleet(3).await;
    let of = |backend: &Backend| slice("support-a", port(backend), &[Pod::of(backend, 1)]);
    let unreadable = |name: &str| {
        let mut slice = of(&fleet[2]);
        slice["metadata"]["name"] = name.into();
        slice["ports"][0]["port"] = 80_000.into();
        slice
    };
    server.put(of(&fleet[0]));
    server.put(unreadable("support-listed"));
    let proxy = start(&config(&directory, "")).await;
    are("ready", &proxy, &[&fleet[0]]).await;
    let problem = || async { proxy.status().await["discovery"][0]["problem"].as_str().unwrap_or_default().to_owned() };
    let said = problem().await;
    assert!(said.contains("\"support-listed\"") && said.contains("80000"), "{said}");
    // Nor within a watch, which goes on.
    let (lists, watches) = (server.lists(), server.watches());
    server.put(unreadable("support-watched"));
    server.put(of(&fleet[1]));
    are("ready", &proxy, &[&fleet[1]]).await;
    eventually_async("both are told", || async { problem().await.contains("1 more") }).await;
    assert_eq!((server.lists(), server.watches()), (lists, watches));
    server.delete("support-listed");
    server.delete("support-watched");
    eventually_async("it is over", || async { problem().await.is_empty() }).await;
}

/// Whether everything is to be shown as long as it takes: minutes.
fn in_full() -> bool {
    std::env::var_os("LONGHAUL_DISCOVERY_FULL").is_some()
}

/// Clients that start one run after another, each in a session of its own, and note what fails.
struct Load {
    stopped: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    failed: Arc<Mutex<Vec<String>>>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn start(address: SocketAddr, clients: usize) -> Load {
        let (stopped, answered, failed) = (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::default());
        let client = |number: usize| {
            let (stopped, answered, failed): (_, Arc<AtomicUsize>, Arc<Mutex<Vec<String>>>) =
                (Arc::clone(&stopped), Arc::clone(&answered), Arc::clone(&failed));
            tokio::spawn(async move {
                while !stopped.load(Ordering::SeqCst) {
                    let answer = run(address, &format!("client-{number}")).await;
                    if answer.status() == 200 && answer.text() == "done" {
                        answered.fetch_add(1, Ordering::SeqCst);
                    } else {
                        failed.lock().unwrap().push(format!("{}: {}", answer.status(), answer.text()));
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            })
        };
        let clients = (0..clients).map(client).collect();
        Load { stopped, answered, failed, clients }
    }

    /// Ends it and says how many were answered; panics if one was not.
    async fn end(self) -> usize {
        self.stopped.store(true, Ordering::SeqCst);
        for client in self.clients {
            client.await.expect("an answer to each");
        }
        assert_eq!(*self.failed.lock().unwrap(), Vec::<String>::new());
        self.answered.load(Ordering::SeqCst)
    }
}

/// Its runs last so long.
fn works(backend: &Backend, time: Duration) {
    backend.each(move |_| {
        let gate = Gate::new();
        let ends = gate.clone();
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            ends.open();
        });
        Script(vec![
            Step::ReadBody,
            Step::Head { status: 200, headers: vec![], body: Body::Chunked },
            Step::Data(b"do".to_vec()),
            Step::Wait(gate),
            Step::Data(b"ne".to_vec()),
            Step::End,
        ])
    });
}

#[tokio::test]
async fn a_rollout_cuts_no_run_and_nobody_is_sent_to_a_pod_that_is_gone() {
    let (server, directory) = cluster().await;
    const PODS: usize = 10;
    let fleet = Backend::start_fleet(2 * PODS as u8).await;
    for backend in &fleet {
        works(backend, Duration::from_millis(100));
    }
    let (old, new) = fleet.split_at(PODS);
    let at = port(&fleet[0]);
    // The controller writes the whole slice with each change.
    let mut pods: Vec<Pod> = old.iter().map(|backend| Pod::of(backend, 1)).collect();
    server.put(slice("support-a", at, &pods));
    let queue = "    runs: {max_per_endpoint: 3, queue: {max: 100, timeout: 10s}}\n";
    let proxy = start(&config(&directory, queue)).await;
    are("ready", &proxy, &old.iter().collect::<Vec<_>>()).await;
    let load = Load::start(proxy.address, 20);
    eventually("every pod works", || old.iter().all(|backend| backend.request_count() > 0)).await;
    let mut gone = Vec::new();
    for (leaving, coming) in old.iter().zip(new) {
        let change = |pods: &mut Vec<Pod>, backend: &Backend, change: &dyn Fn(Pod) -> Pod| {
            let address = backend.address().ip().to_string();
            let pod = pods.iter_mut().find(|pod| pod.address == address).expect("it is there");
            *pod = change(pod.clone());
        };
        pods.push(Pod::of(coming, 1).not_ready());
        server.put(slice("support-a", at, &pods));
        change(&mut pods, coming, &|_| Pod::of(coming, 1));
        server.put(slice("support-a", at, &pods));
        change(&mut pods, leaving, &|pod| pod.terminating(true));
        server.put(slice("support-a", at, &pods));
        // The pod's grace: what it has is finished, what is on its way still comes.
        tokio::time::sleep(Duration::from_millis(200)).await;
        eventually("its runs are over", || leaving.in_flight() == 0).await;
        let address = leaving.name();
        eventually_async("no run is there", || async {
            proxy.endpoint(&address).await.is_none_or(|endpoint| endpoint["outstanding_runs"] == 0)
        })
        .await;
        gone.push((leaving, leaving.request_count()));
        change(&mut pods, leaving, &|pod| pod.terminating(false));
        server.put(slice("support-a", at, &pods));
        pods.retain(|pod| pod.address != leaving.address().ip().to_string());
        server.put(slice("support-a", at, &pods));
    }
    are("ready", &proxy, &new.iter().collect::<Vec<_>>()).await;
    let answered = load.end().await;
    println!("rollout of {PODS} pods: {answered} runs, none failed");
    assert!(answered > 100, "{answered}");
    for (backend, count) in gone {
        assert_eq!(backend.request_count(), count, "{} is gone", backend.name());
    }
    for outcome in ["failed", "truncated", "cancelled", "rejected"] {
        let label = format!("outcome=\"{outcome}\"");
        assert!(matches!(proxy.metric("longhaul_runs_total", &[&label]).await, None | Some(0.0)), "{outcome}");
    }
}

/// Waits until the endpoint is ready, and says how long that took.
async fn until_ready(proxy: &Proxy, backend: &Backend) -> Duration {
    let began = Instant::now();
    let name = backend.name();
    eventually_async(&format!("{name} is ready"), || async {
        proxy.endpoint(&name).await.is_some_and(|endpoint| endpoint["state"] == "ready")
    })
    .await;
    began.elapsed()
}

/// As a rule of the product; a busy machine is given more where nothing is measured.
fn in_time(what: &str, took: Duration) {
    println!("{what}: converged {} ms after the API server's return", took.as_millis());
    if in_full() {
        assert!(took < Duration::from_secs(2), "{what}: {took:?}");
    }
}

#[tokio::test]
async fn an_api_server_that_is_gone_or_killed_again_and_again_changes_nothing_for_traffic() {
    let (server, directory) = cluster().await;
    let fleet = Backend::start_fleet(3).await;
    let [old, while_gone, while_killed] = &fleet[..] else { panic!("three") };
    for backend in &fleet {
        works(backend, Duration::from_millis(20));
    }
    server.put(slice("support-a", port(old), &[Pod::of(old, 1)]));
    let proxy = start(&config(&directory, "")).await;
    are("ready", &proxy, &[old]).await;
    let load = Load::start(proxy.address, 4);

    server.kill().await;
    server.put(slice("support-a", port(old), &[Pod::of(old, 1), Pod::of(while_gone, 1)]));
    let away = if in_full() { Duration::from_secs(60) } else { Duration::from_secs(2) };
    tokio::time::sleep(away).await;
    assert_eq!(proxy.endpoints_in("ready").await, [old.name()], "what is known stays");
    assert!(proxy.metric("longhaul_discovery_problem", &[]).await == Some(1.0));
    server.revive();
    in_time("gone", until_ready(&proxy, while_gone).await);
    proxy.metric_becomes("longhaul_discovery_problem", &[], 0.0).await;

    let (times, life) = if in_full() { (6, Duration::from_secs(5)) } else { (4, Duration::from_millis(300)) };
    for round in 0..times {
        tokio::time::sleep(life).await;
        server.kill().await;
        if round % 2 == 1 {
            // It comes back without a memory of what happened.
            server.expire();
        }
        let pods = match round % 2 {
            0 => vec![Pod::of(old, 1), Pod::of(while_gone, 1), Pod::of(while_killed, 1)],
            _ => vec![Pod::of(old, 1), Pod::of(while_gone, 1)],
        };
        server.put(slice("support-a", port(old), &pods));
        tokio::time::sleep(Duration::from_millis(100)).await;
        server.revive();
        let began = Instant::now();
        let wanted = names(&fleet.iter().take(pods.len()).collect::<Vec<_>>());
        eventually_async("it converges", || async { proxy.endpoints_in("ready").await == wanted }).await;
        in_time("killed", began.elapsed());
    }
    println!("{} runs, none failed", load.end().await);
}

#[tokio::test]
async fn an_api_server_that_freezes_or_is_replaced_without_a_word_is_noticed() {
    let (server, directory) = cluster().await;
    let fleet = Backend::start_fleet(3).await;
    let [old, while_frozen, while_replaced] = &fleet[..] else { panic!("three") };
    for backend in &fleet {
        works(backend, Duration::from_millis(20));
    }
    server.put(slice("support-a", port(old), &[Pod::of(old, 1)]));
    let silence = if in_full() { Duration::from_secs(10) } else { Duration::from_millis(300) };
    let proxy = start_proxy_in(Surroundings { silence, ..Surroundings::default() }, &config(&directory, ""));
    are("ready", &proxy, &[old]).await;
    let load = Load::start(proxy.address, 4);

    server.freeze();
    server.put(slice("support-a", port(old), &[Pod::of(old, 1), Pod::of(while_frozen, 1)]));
    let away = if in_full() { Duration::from_secs(60) } else { Duration::from_secs(3) };
    tokio::time::sleep(away).await;
    assert_eq!(proxy.endpoints_in("ready").await, [old.name()], "what is known stays");
    proxy.metric_becomes("longhaul_discovery_problem", &[], 1.0).await;
    server.thaw();
    in_time("frozen", until_ready(&proxy, while_frozen).await);

    // The watch's own connection stays open and is silent for ever.
    server.freeze();
    tokio::time::sleep(away).await;
    server.put(slice("support-a", port(old), &[Pod::of(old, 1), Pod::of(while_replaced, 1)]));
    server.replace();
    in_time("replaced", until_ready(&proxy, while_replaced).await);
    are("ready", &proxy, &[old, while_replaced]).await;
    println!("{} runs, none failed", load.end().await);
}

#[tokio::test]
async fn at_the_start_an_api_server_that_is_not_there_is_waited_for() {
    let (server, directory) = cluster().await;
    let backend = Backend::start_at(([127, 0, 0, 2], 0)).await;
    server.put(slice("support-a", port(&backend), &[Pod::of(&backend, 1)]));
    server.kill().await;
    let queue = "    runs: {queue: {max: 10, timeout: 30s}}\n";
    let proxy = start_proxy_in(Surroundings::default(), &config(&directory, queue));
    let address = proxy.address;
    let waiting = tokio::spawn(async move { run(address, "s").await });
    eventually_async("it waits", || async { proxy.status().await["services"][0]["queue"]["length"] == 1 }).await;
    assert_eq!(proxy.admin("GET", "/readyz").await.status(), 503);
    server.revive();
    assert_eq!(within("it is placed", waiting).await.expect("no panic").status(), 200);
}

#[tokio::test]
async fn the_program_tells_each_problem_once_and_hands_over_with_its_pods() {
    let (server, directory) = cluster().await;
    let fleet = Backend::start_fleet(2).await;
    server.put(slice("support-a", port(&fleet[0]), &[Pod::of(&fleet[0], 1), Pod::of(&fleet[1], 1)]));
    server.kill().await;
    let file = directory.path().join("longhaul.yaml");
    let head = "listeners: [{address: '127.0.0.1:0'}]\nadmin: {address: '127.0.0.1:0'}\nlog: {access: false}\nshutdown: {delay: 0s, timeout: 5s}\n";
    std::fs::write(&file, head.to_owned() + &config(&directory, "")).expect("writable directory");
    let program = Program::start(&["run", "-c", file.to_str().expect("UTF-8")]);
    let listening = program.after("listening on 127.0.0.1:").await;
    let address: SocketAddr =
        format!("127.0.0.1:{}", listening.split_whitespace().next().expect("a port")).parse().expect("an address");
    program.after("discovery: ").await;
    // Several tries.
    tokio::time::sleep(Duration::from_secs(2)).await;
    server.revive();
    program.after("discovery works again").await;
    let lines = program.lines();
    let told: Vec<&String> = lines.iter().filter(|line| line.contains("WARN") || line.contains("ERROR")).collect();
    assert_eq!(told.len(), 1, "one problem, one line: {told:#?}");
    assert!(told[0].contains("kubernetes agents/support:http") && told[0].contains("API server"), "{}", told[0]);

    for session in 0..6 {
        assert_eq!(run(address, &session.to_string()).await.status(), 200);
    }
    program.signal("USR2");
    let process = program.after("process=").await;
    let process = process.split_whitespace().next().expect("a number").to_owned();
    for session in 0..6 {
        assert_eq!(run(address, &session.to_string()).await.header("longhaul-affinity"), Some("hit"));
    }
    let ended = std::process::Command::new("kill").args(["-TERM", &process]).status().expect("kill");
    assert!(ended.success());
}

#[tokio::test]
async fn another_cluster_has_other_pods() {
    let ((one, here), (other, there)) = (cluster().await, cluster().await);
    let (old, new) = (Backend::start().await, Backend::start().await);
    one.put(slice("support-a", port(&old), &[Pod::of(&old, 1)]));
    other.put(slice("support-a", port(&new), &[Pod::of(&new, 1)]));
    let proxy = start(&config(&here, "")).await;
    are("ready", &proxy, &[&old]).await;
    assert_eq!(proxy.reload(&config(&there, "")).await.status(), 200);
    are("ready", &proxy, &[&new]).await;
}

#[tokio::test]
async fn a_pod_that_speaks_tls_from_now_on_is_another_endpoint() {
    let (server, directory) = cluster().await;
    let backend = Backend::start().await;
    let mut pods = slice("support-a", port(&backend), &[Pod::of(&backend, 1)]);
    server.put(pods.clone());
    let proxy = start(&config(&directory, "    timeouts: {connect: 300ms}\n")).await;
    are("ready", &proxy, &[&backend]).await;
    // The backend speaks no TLS.
    for (protocol, understood) in [("https", false), ("http", true)] {
        pods["ports"][0]["appProtocol"] = protocol.into();
        server.put(pods.clone());
        eventually_async(&format!("it is spoken to by {protocol}"), || async {
            (run(proxy.address, "another").await.status() == 200) == understood
        })
        .await;
        are("ready", &proxy, &[&backend]).await;
    }
}
