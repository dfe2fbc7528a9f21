//! Kubernetes: an API server on a loopback port that knows EndpointSlices, and can be killed, frozen and replaced.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Backend, head_end};

const PATH: &str = "/apis/discovery.k8s.io/v1/namespaces/agents/endpointslices";

/// One endpoint of a slice.
#[derive(Clone, Debug)]
pub struct Pod {
    pub address: String,
    pub uid: String,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
}

impl Pod {
    /// That of a backend: ready. Its UID is made of its address and `life`.
    pub fn of(backend: &Backend, life: u32) -> Pod {
        Pod::at(&backend.address().ip().to_string(), life)
    }

    pub fn at(address: &str, life: u32) -> Pod {
        let uid = format!("uid-{address}-{life}");
        Pod { address: address.to_owned(), uid, ready: true, serving: true, terminating: false }
    }

    pub fn not_ready(self) -> Pod {
        Pod { ready: false, serving: false, ..self }
    }

    pub fn terminating(self, serving: bool) -> Pod {
        Pod { ready: false, serving, terminating: true, ..self }
    }

    fn json(&self) -> Value {
        json!({
            "addresses": [self.address],
            "conditions": {"ready": self.ready, "serving": self.serving, "terminating": self.terminating},
            "nodeName": "node-1",
            "zone": "zone-a",
            "hints": {"forZones": [{"name": "zone-a"}]},
            "targetRef": {"kind": "Pod", "namespace": "agents", "name": format!("pod-{}", self.uid), "uid": self.uid},
        })
    }
}

/// A slice of the service `support` in the namespace `agents`, whose port `http` is this.
pub fn slice(name: &str, port: u16, pods: &[Pod]) -> Value {
    let family = if pods.iter().any(|pod| pod.address.contains(':')) { "IPv6" } else { "IPv4" };
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "agents",
            "labels": {"kubernetes.io/service-name": "support", "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
        },
        "addressType": family,
        "endpoints": pods.iter().map(Pod::json).collect::<Vec<Value>>(),
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}, {"name": "metrics", "port": 9, "protocol": "TCP"}],
    })
}

#[derive(Default)]
struct Store {
    version: u64,
    slices: BTreeMap<String, Value>,
    /// What happened: up to which version, what, and to what.
    events: Vec<(u64, &'static str, Value)>,
    /// Whoever knows less has to list.
    expired: u64,
    lists: usize,
    watches: usize,
    /// The paths that were asked for.
    asked: Vec<String>,
    /// Each event is sent so many times.
    copies: usize,
    /// And so long after it happened.
    delay: Duration,
    bookmarks: Option<Duration>,
    /// Every request is answered with this, and when to come again in seconds.
    refuses: Option<(u16, Option<u32>)>,
}

/// What connections look at before each step.
#[derive(Clone, Copy, Default)]
struct Weather {
    frozen: bool,
    /// Connections up to this number are silent for ever, and stay open.
    dead_up_to: u64,
    version: u64,
    /// Watches that began before are ended.
    ended_before: u64,
}

pub struct ApiServer {
    pub address: SocketAddr,
    store: Arc<Mutex<Store>>,
    weather: watch::Sender<Weather>,
    serving: Mutex<Option<JoinHandle<()>>>,
    reserved: Mutex<Option<TcpSocket>>,
    connections: Arc<AtomicU64>,
}

impl ApiServer {
    pub async fn start() -> ApiServer {
        let store = Arc::new(Mutex::new(Store { version: 100, copies: 1, ..Store::default() }));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let weather = watch::Sender::new(Weather::default());
        let server = ApiServer {
            address,
            store,
            weather,
            serving: Mutex::default(),
            reserved: Mutex::default(),
            connections: Arc::default(),
        };
        server.serve(listener);
        server
    }

    fn serve(&self, listener: TcpListener) {
        let (store, weather, numbers) = (Arc::clone(&self.store), self.weather.clone(), Arc::clone(&self.connections));
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let number = numbers.fetch_add(1, Ordering::SeqCst) + 1;
                connections.spawn(connection(stream, number, Arc::clone(&store), weather.subscribe()));
            }
        });
        *self.serving.lock().unwrap() = Some(task);
    }

    /// Writes a kubeconfig for it.
    pub fn kubeconfig(&self, directory: &Path) -> PathBuf {
        let file = directory.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\nclusters: [{{name: test, cluster: {{server: 'http://{}'}}}}]\n\
             users: [{{name: test, user: {{token: secret}}}}]\ncontexts: [{{name: test, context: {{cluster: test, user: test, namespace: agents}}}}]\n",
            self.address
        );
        std::fs::write(&file, text).expect("writable directory");
        file
    }

    pub fn put(&self, mut slice: Value) {
        let mut store = self.store.lock().unwrap();
        store.version += 1;
        let (version, name) = (store.version, slice["metadata"]["name"].as_str().expect("a name").to_owned());
        slice["metadata"]["resourceVersion"] = version.to_string().into();
        let kind = if store.slices.insert(name, slice.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        store.events.push((version, kind, slice));
        drop(store);
        self.weather.send_modify(|weather| weather.version = version);
    }

    pub fn delete(&self, name: &str) {
        let mut store = self.store.lock().unwrap();
        store.version += 1;
        let version = store.version;
        let mut slice = store.slices.remove(name).expect("it is there");
        slice["metadata"]["resourceVersion"] = version.to_string().into();
        store.events.push((version, "DELETED", slice));
        drop(store);
        self.weather.send_modify(|weather| weather.version = version);
    }

    /// Forgets what happened: whoever watches from before has to list again.
    pub fn expire(&self) {
        let mut store = self.store.lock().unwrap();
        store.version += 1;
        store.expired = store.version;
        let version = store.version;
        drop(store);
        self.weather.send_modify(|weather| weather.version = version);
    }

    /// Ends every watch, as the API server does from time to time.
    pub fn end_watches(&self) {
        self.weather.send_modify(|weather| weather.ended_before += 1);
    }

    /// Its process is gone: connections are reset, new ones refused.
    pub async fn kill(&self) {
        let serving = self.serving.lock().unwrap().take();
        if let Some(serving) = serving {
            serving.abort();
            let _ = serving.await;
        }
        // Nobody else is given the port meanwhile.
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("an option");
        socket.bind(self.address).expect("the port was its own");
        *self.reserved.lock().unwrap() = Some(socket);
    }

    pub fn revive(&self) {
        let socket = self.reserved.lock().unwrap().take().expect("it was killed");
        self.serve(socket.listen(128).expect("it listens"));
    }

    /// It takes connections and says nothing, nor closes any.
    pub fn freeze(&self) {
        self.weather.send_modify(|weather| weather.frozen = true);
    }

    /// It goes on where it was.
    pub fn thaw(&self) {
        self.weather.send_modify(|weather| weather.frozen = false);
    }

    /// Another serves in its place; the connections of the one before are never heard of again, nor closed.
    pub fn replace(&self) {
        self.weather.send_modify(|weather| {
            weather.dead_up_to = self.connections.load(Ordering::SeqCst);
            weather.frozen = false;
        });
    }

    pub fn send_copies(&self, copies: usize, delay: Duration) {
        let mut store = self.store.lock().unwrap();
        (store.copies, store.delay) = (copies, delay);
    }

    pub fn refuse(&self, status: Option<u16>) {
        self.store.lock().unwrap().refuses = status.map(|status| (status, None));
    }

    /// Refuses, as its own limits do: in plain words, with `Retry-After`.
    pub fn refuse_for(&self, status: u16, seconds: u32) {
        self.store.lock().unwrap().refuses = Some((status, Some(seconds)));
    }

    pub fn lists(&self) -> usize {
        self.store.lock().unwrap().lists
    }

    pub fn watches(&self) -> usize {
        self.store.lock().unwrap().watches
    }

    /// The paths and queries that were asked for.
    pub fn asked(&self) -> Vec<String> {
        self.store.lock().unwrap().asked.clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(serving) = self.serving.lock().unwrap().take() {
            serving.abort();
        }
    }
}

/// Answers requests one after another, as the weather lets it.
async fn connection(
    mut stream: TcpStream,
    number: u64,
    store: Arc<Mutex<Store>>,
    mut weather: watch::Receiver<Weather>,
) {
    let mut buffer = Vec::new();
    loop {
        while head_end(&buffer).is_none() {
            if !matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
                return;
            }
        }
        // No request here has a body.
        let end = head_end(&buffer).expect("a head");
        let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
        buffer.drain(..end);
        let target = head.split(' ').nth(1).expect("a target").to_owned();
        fair(&mut weather, number).await;
        let refuses = {
            let mut store = store.lock().unwrap();
            store.asked.push(target.clone());
            store.refuses
        };
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let parameter = |name: &str| {
            query
                .split('&')
                .filter_map(|pair| pair.split_once('='))
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value)
        };
        let answer = match (refuses, path) {
            (Some((status, None)), _) => answer(status, &failure(status, "Forbidden")),
            (Some((status, Some(seconds))), _) => {
                let words = "Too many requests, please try again later.";
                format!(
                    "HTTP/1.1 {status} X\r\nContent-Type: text/plain\r\nRetry-After: {seconds}\r\nContent-Length: {}\r\n\r\n{words}",
                    words.len()
                )
                .into_bytes()
            }
            (None, "/version") => answer(200, &json!({"major": "1", "minor": "34"})),
            (None, PATH) if parameter("watch") == Some("true") => {
                let from = parameter("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
                let _ = follow(&mut stream, from, number, &store, &mut weather).await;
                return;
            }
            (None, PATH) => answer(200, &list(&mut store.lock().unwrap())),
            _ => answer(404, &failure(404, "NotFound")),
        };
        if stream.write_all(&answer).await.is_err() {
            return;
        }
    }
}

fn list(store: &mut Store) -> Value {
    store.lists += 1;
    let items: Vec<&Value> = store.slices.values().collect();
    json!({
        "kind": "EndpointSliceList",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"resourceVersion": store.version.to_string()},
        "items": items,
    })
}

fn failure(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "as the test wants it", "reason": reason, "code": code})
}

fn answer(status: u16, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let head =
        format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.into_bytes(), body.into_bytes()].concat()
}

/// Returns when the connection may go on; never where another server is in this one's place.
async fn fair(weather: &mut watch::Receiver<Weather>, number: u64) {
    // The sender lives as long as the server.
    let _ = weather.wait_for(|weather| !weather.frozen && number > weather.dead_up_to).await;
}

/// A watch: a line of JSON for each event, in chunks.
async fn follow(
    stream: &mut TcpStream,
    mut from: u64,
    number: u64,
    store: &Mutex<Store>,
    weather: &mut watch::Receiver<Weather>,
) -> std::io::Result<()> {
    let (bookmarks, delay) = {
        let mut store = store.lock().unwrap();
        store.watches += 1;
        (store.bookmarks, store.delay)
    };
    let ended_before = weather.borrow().ended_before;
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await?;
    loop {
        fair(weather, number).await;
        let ends = weather.borrow_and_update().ended_before != ended_before;
        let (lines, expired) = {
            let store = store.lock().unwrap();
            let first = store.events.partition_point(|(version, ..)| *version <= from);
            let new = &store.events[first..];
            from = from.max(new.last().map_or(0, |(version, ..)| *version));
            let lines: Vec<String> = new
                .iter()
                .flat_map(|(_, kind, slice)| {
                    vec![json!({"type": kind, "object": slice}).to_string() + "\n"; store.copies]
                })
                .collect();
            (lines, from < store.expired)
        };
        if expired {
            // Whatever happened, it is no longer known: an error within an answer that began well.
            let line = json!({"type": "ERROR", "object": failure(410, "Expired")}).to_string() + "\n";
            write_chunk(stream, line.as_bytes()).await?;
            return stream.write_all(b"0\r\n\r\n").await;
        }
        for line in lines {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
                fair(weather, number).await;
            }
            // In two parts: a chunk is no line.
            let (first, second) = line.as_bytes().split_at(line.len() / 2);
            write_chunk(stream, first).await?;
            write_chunk(stream, second).await?;
        }
        if ends {
            return stream.write_all(b"0\r\n\r\n").await;
        }
        let changed = async {
            match bookmarks {
                Some(every) => tokio::time::timeout(every, weather.changed()).await.is_err(),
                None => {
                    let _ = weather.changed().await;
                    false
                }
            }
        };
        if changed.await {
            let version = from.to_string();
            let bookmark = json!({"type": "BOOKMARK", "object": {
                "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "metadata": {"resourceVersion": version},
            }});
            write_chunk(stream, (bookmark.to_string() + "\n").as_bytes()).await?;
        }
    }
}

async fn write_chunk(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    let head = format!("{:x}\r\n", bytes.len());
    stream.write_all(&[head.as_bytes(), bytes, b"\r\n"].concat()).await
}
