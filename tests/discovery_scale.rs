//! Discovery at scale: many pods of which some change all the time; how soon that is true, and what it costs.
//!
//! By default a part of it. `LONGHAUL_DISCOVERY_FULL=1 cargo test --release --test discovery_scale -- --nocapture` shows
//! 1,000 pods, 50 changes a second, for a minute.
#![cfg(feature = "kubernetes")]

mod support;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use longhaul::control::discovery::Surroundings;
use longhaul::ids;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::Instant;

/// As the EndpointSlice controller fills them.
const PODS_A_SLICE: usize = 100;
const CHANGES_A_SECOND: u32 = 50;
/// From a change to nobody being sent where it was, and somebody being sent where it is.
const ROUTED_WITHIN: Duration = Duration::from_secs(1);

fn address(pod: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 1 + (pod / 250) as u8, 1 + (pod % 250) as u8)
}

/// An endpoint at each address, all at one port, that notes when it is asked.
struct Pods {
    port: u16,
    /// When each of them was asked last.
    asked: Arc<Mutex<HashMap<Ipv4Addr, Instant>>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Pods {
    async fn start(count: usize) -> Pods {
        let asked: Arc<Mutex<HashMap<Ipv4Addr, Instant>>> = Arc::default();
        'ports: loop {
            let mut listeners = Vec::new();
            let mut port = 0;
            for pod in 0..count {
                match TcpListener::bind((address(pod), port)).await {
                    Ok(listener) => {
                        port = listener.local_addr().expect("bound").port();
                        listeners.push((address(pod), listener));
                    }
                    // Somebody has the port there.
                    Err(_) => continue 'ports,
                }
            }
            let serve = |(address, listener): (Ipv4Addr, TcpListener)| {
                let asked = Arc::clone(&asked);
                tokio::spawn(async move {
                    while let Ok((mut stream, _)) = listener.accept().await {
                        let asked = Arc::clone(&asked);
                        tokio::spawn(async move {
                            let mut buffer = vec![0; 4096];
                            // Requests are small: one read, one request.
                            while matches!(stream.read(&mut buffer).await, Ok(1..)) {
                                asked.lock().unwrap().insert(address, Instant::now());
                                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
                                if stream.write_all(answer).await.is_err() {
                                    return;
                                }
                            }
                        });
                    }
                })
            };
            let tasks = listeners.into_iter().map(serve).collect();
            return Pods { port, asked, tasks };
        }
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// What the thread of this name has used of a processor.
fn processor_time(thread: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux");
    let times = tasks.filter_map(|task| {
        let path = task.ok()?.path();
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        let statistics = std::fs::read_to_string(path.join("schedstat")).ok()?;
        (name.trim() == thread).then(|| statistics.split(' ').next()?.parse::<u64>().ok())?
    });
    Duration::from_nanos(times.sum())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_change_is_routed_soon_and_costs_little() {
    let in_full = std::env::var_os("LONGHAUL_DISCOVERY_FULL").is_some();
    let (count, seconds) = if in_full { (1_000, 60) } else { (200, 4) };
    longhaul::net::descriptors::raise_limit().expect("descriptors");
    let pods = Pods::start(count).await;
    let server = ApiServer::start().await;
    let directory = tempfile::tempdir().expect("a directory");
    let kubeconfig = server.kubeconfig(directory.path());
    let mut listed: Vec<Pod> = (0..count).map(|pod| Pod::at(&address(pod).to_string(), 1)).collect();
    let put = |listed: &[Pod], number: usize| {
        let from = number * PODS_A_SLICE;
        server.put(slice(
            &format!("support-{number}"),
            pods.port,
            &listed[from..(from + PODS_A_SLICE).min(listed.len())],
        ));
    };
    (0..count.div_ceil(PODS_A_SLICE)).for_each(|number| put(&listed, number));
    let config = format!(
        "kubernetes: {{kubeconfig: {}}}\nservices:\n  - name: support\n    versions:\n      - {{name: stable, endpoints: [{{kubernetes: {{service: support, port: http}}}}]}}\n",
        kubeconfig.display()
    );
    let proxy = start_proxy_in(Surroundings::default(), &config);
    let dispatcher = proxy.dispatcher();
    let state = || -> HashMap<String, &'static str> {
        let status = dispatcher.status(ids::now());
        let endpoints = status.versions.into_iter().flat_map(|version| version.endpoints);
        endpoints.map(|endpoint| (endpoint.address, endpoint.state.as_str())).collect()
    };
    let all_ready = || state().values().filter(|state| **state == "ready").count() == count;
    eventually_within(Duration::from_secs(30), "every pod is ready", all_ready).await;

    // Traffic that visits everybody, over and over.
    let (stopped, answered, failed) =
        (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let client = || {
        let (stopped, answered, failed, target) =
            (Arc::clone(&stopped), Arc::clone(&answered), Arc::clone(&failed), proxy.address);
        tokio::spawn(async move {
            let mut client = RawClient::connect(target).await;
            while !stopped.load(Ordering::SeqCst) {
                client.send("GET /health HTTP/1.1\r\nHost: a\r\n\r\n").await;
                let good = client.read_response().await.status() == 200;
                if good { &answered } else { &failed }.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
    };
    let clients: Vec<_> = (0..2).map(|_| client()).collect();

    let generation = proxy.status().await["config"]["generation"].clone();
    let processor_before = processor_time("control");
    let began = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / CHANGES_A_SECOND);
    // What is to become of an address, and since when.
    let mut awaited: Vec<(usize, &'static str, Instant)> = Vec::new();
    let mut not_ready: HashMap<Ipv4Addr, Instant> = HashMap::new();
    let (mut latest, mut changes, mut sent_too_late) = (Duration::ZERO, 0usize, 0usize);
    let look = |awaited: &mut Vec<(usize, &'static str, Instant)>, latest: &mut Duration| {
        let state = state();
        awaited.retain(|(pod, wanted, since)| {
            let name = SocketAddr::new(IpAddr::V4(address(*pod)), pods.port).to_string();
            let is_so = state.get(&name).copied() == Some(*wanted);
            if is_so {
                *latest = (*latest).max(since.elapsed());
            }
            !is_so
        });
    };
    while began.elapsed() < Duration::from_secs(seconds) {
        ticks.tick().await;
        // A pod becomes ready or ceases to be, or another takes its address: each third time.
        let pod = changes * 7 % count;
        changes += 1;
        if awaited.iter().any(|(awaited, ..)| *awaited == pod) {
            continue;
        }
        let now = Instant::now();
        let wanted = if listed[pod].ready && changes % 3 != 0 {
            listed[pod] = listed[pod].clone().not_ready();
            not_ready.insert(address(pod), now);
            "unhealthy"
        } else {
            listed[pod] = Pod::at(&address(pod).to_string(), changes as u32);
            not_ready.remove(&address(pod));
            "ready"
        };
        put(&listed, pod / PODS_A_SLICE);
        awaited.push((pod, wanted, now));
        look(&mut awaited, &mut latest);
        let asked = pods.asked.lock().unwrap();
        let late = |(address, since): &(&Ipv4Addr, &Instant)| {
            asked.get(address).is_some_and(|at| *at > **since + ROUTED_WITHIN)
        };
        sent_too_late += not_ready.iter().filter(late).count();
    }
    let took = began.elapsed();
    let used = processor_time("control").saturating_sub(processor_before);
    let end = Instant::now();
    while !awaited.is_empty() && end.elapsed() < DEADLINE {
        look(&mut awaited, &mut latest);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stopped.store(true, Ordering::SeqCst);
    for client in clients {
        client.await.expect("an answer to each");
    }
    let share = used.as_secs_f64() / took.as_secs_f64();
    println!(
        "{count} pods, {changes} changes in {:.1} s: the last was routed after {} ms, the control plane used {:.2} % of a core, \
         {} requests, {} failed, {} lists, {} watches",
        took.as_secs_f64(),
        latest.as_millis(),
        share * 100.0,
        answered.load(Ordering::SeqCst),
        failed.load(Ordering::SeqCst),
        server.lists(),
        server.watches(),
    );
    assert!(awaited.is_empty(), "never true: {awaited:?}");
    assert_eq!(failed.load(Ordering::SeqCst), 0);
    assert!(answered.load(Ordering::SeqCst) > 0);
    assert_eq!(proxy.status().await["config"]["generation"], generation, "no reload");
    if in_full {
        assert!(latest < ROUTED_WITHIN, "{latest:?}");
        assert_eq!(sent_too_late, 0, "somebody was sent to a pod that is not ready");
        // Without optimisation it says nothing.
        assert!(share < 0.05 || cfg!(debug_assertions), "{share}");
    }
}
