//! Counting: a backend that knows exactly which runs it has at each moment, for tests of limits and of order.
//!
//! It has a thread of its own, so that a busy test does not delay what it sees. A run begins with its request's head and
//! ends just before its last byte is written, or when the proxy has closed its connection. Of a close that is there but
//! not read yet it learns before it counts anybody who came behind it.

use std::collections::{HashMap, HashSet};
use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::head_end;

/// One run as the backend saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// `x-name` of the request.
    pub name: String,
    /// `x-session` of the request.
    pub session: String,
    pub started: Instant,
    pub ended: Option<Instant>,
    /// Its answer was written to its end.
    pub whole: bool,
    /// How many runs of its session were here already when it came.
    pub beside: usize,
}

pub struct Counting {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    released: watch::Sender<HashSet<String>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    seen: Vec<Seen>,
    /// By its place in `seen`: its connection.
    active: HashMap<usize, StdTcpStream>,
    most: usize,
}

impl Counting {
    pub fn start() -> Counting {
        let shared = Arc::<Shared>::default();
        let serving = Arc::clone(&shared);
        let (stop, mut stopped) = watch::channel(false);
        let (released, releases) = watch::channel(HashSet::new());
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
                tell.send(listener.local_addr().expect("bound")).expect("the test waits");
                loop {
                    tokio::select! {
                        accepted = listener.accept() => {
                            let (stream, _) = accepted.expect("a connection");
                            // Otherwise the last bytes of a run would wait for the word that the first have come.
                            stream.set_nodelay(true).expect("a TCP socket");
                            tokio::spawn(serve(stream, Arc::clone(&serving), releases.clone()));
                        }
                        _ = stopped.changed() => return,
                    }
                }
            });
        });
        let address = told.recv().expect("it listens");
        Counting { address, shared, stop, released, thread: Some(thread) }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Lets the run of this session end whose `x-microseconds` is `held`.
    pub fn release(&self, session: &str) {
        self.released.send_modify(|released| {
            released.insert(session.to_owned());
        });
    }

    /// Every run so far, in the order in which they began.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.lock().seen.clone()
    }

    /// The most runs that it had at once.
    pub fn most(&self) -> usize {
        self.shared.lock().most
    }

    pub fn active(&self) -> usize {
        let mut state = self.shared.lock();
        state.sweep();
        state.active.len()
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }
}

impl State {
    /// Takes note of connections that the proxy has closed.
    fn sweep(&mut self) {
        let closed = |stream: &StdTcpStream| match stream.peek(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
        };
        let gone: Vec<usize> =
            self.active.iter().filter(|(_, stream)| closed(stream)).map(|(index, _)| *index).collect();
        for index in gone {
            self.end(index, false);
        }
    }

    fn begin(&mut self, name: String, session: String, stream: &TcpStream) -> usize {
        self.sweep();
        let beside = self.active.keys().filter(|index| self.seen[**index].session == session).count();
        let index = self.seen.len();
        self.seen.push(Seen { name, session, started: longhaul::ids::now(), ended: None, whole: false, beside });
        // It shares the connection's non-blocking mode.
        let stream = stream.as_fd().try_clone_to_owned().expect("a descriptor");
        self.active.insert(index, stream.into());
        self.most = self.most.max(self.active.len());
        index
    }

    fn end(&mut self, index: usize, whole: bool) {
        if self.active.remove(&index).is_some() {
            self.seen[index].ended = Some(longhaul::ids::now());
            self.seen[index].whole = whole;
        }
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>, mut releases: watch::Receiver<HashSet<String>>) {
    let mut buffer = Vec::new();
    loop {
        let head = loop {
            if let Some(end) = head_end(&buffer) {
                break String::from_utf8_lossy(&buffer.drain(..end).collect::<Vec<u8>>()).into_owned();
            }
            if !matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
                return;
            }
        };
        let field = |name: &str| {
            let mut lines = head.lines().filter_map(|line| line.split_once(':'));
            let found = lines.find(|(known, _)| known.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let index = shared.lock().begin(field("x-name"), field("x-session"), &stream);
        let length: usize = field("content-length").parse().unwrap_or(0);
        while buffer.len() < length {
            if !matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
                return shared.lock().end(index, false);
            }
        }
        buffer.drain(..length);
        let begin = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        let event = |data: &str| {
            let event = format!("data: {data}\n\n");
            format!("{:x}\r\n{event}\r\n", event.len())
        };
        let name = field("x-name");
        let first = [&begin[..], event(&format!("begin {name}")).as_bytes()].concat();
        if stream.write_all(&first).await.is_err() {
            return shared.lock().end(index, false);
        }
        let time = field("x-microseconds");
        let session = field("x-session");
        let over = async {
            match time.as_str() {
                "held" => drop(releases.wait_for(|released| released.contains(&session)).await),
                time => tokio::time::sleep(Duration::from_micros(time.parse().unwrap_or(0))).await,
            }
        };
        tokio::select! {
            () = over => {}
            read = stream.read_buf(&mut buffer) => {
                assert!(!matches!(read, Ok(1..)), "nothing comes while a run is on its connection");
                return shared.lock().end(index, false);
            }
        }
        shared.lock().end(index, true);
        let last = format!("{}0\r\n\r\n", event(&format!("end {name}")));
        if stream.write_all(last.as_bytes()).await.is_err() {
            return;
        }
    }
}
