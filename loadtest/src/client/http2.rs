//! The generator's HTTP/2: exchanges share connections, up to the workload's number.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use h2::RecvStream;
use h2::client::SendRequest;
use tokio::sync::Mutex;

use super::{Answer, Failure, Request};
use crate::socket::Dialer;
use crate::statistics::{Fault, Statistics};

/// Connections and how many exchanges each carries.
pub struct Pool {
    dialer: Arc<Dialer>,
    streams_per_connection: usize,
    // Held while connecting: arrivals of one moment share the new connection.
    connections: Mutex<Vec<Shared>>,
}

#[derive(Clone)]
struct Shared {
    send: SendRequest<Bytes>,
    in_flight: Arc<AtomicUsize>,
}

impl Pool {
    pub fn new(dialer: Arc<Dialer>, streams_per_connection: u32) -> Self {
        let streams_per_connection = streams_per_connection as usize;
        Self { dialer, streams_per_connection, connections: Mutex::default() }
    }

    /// Sends a request and reads the head of its answer.
    pub async fn send(&self, request: &Request<'_>, statistics: &Statistics) -> Result<Answer, Failure> {
        let (mut send, place) = self.place(statistics).await?;
        let head = encode(request)?;
        let (response, mut stream) = send.send_request(head, request.body.is_empty()).map_err(broken)?;
        if !request.body.is_empty() {
            stream.send_data(Bytes::from_static(request.body.as_bytes()), true).map_err(broken)?;
        }
        let (head, stream) = response.await.map_err(broken)?.into_parts();
        let text = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
        Ok(Answer {
            status: head.status.as_u16(),
            agent: text("x-agent").and_then(|agent| agent.parse().ok()),
            location: text("location").map(str::to_owned),
            body: super::Body::Http2(Body { stream, _place: place }),
        })
    }

    async fn place(&self, statistics: &Statistics) -> Result<(SendRequest<Bytes>, Place), Failure> {
        let mut connections = self.connections.lock().await;
        while let Some(at) =
            connections.iter().position(|shared| shared.in_flight.load(Ordering::Relaxed) < self.streams_per_connection)
        {
            // The place is taken before the wait for the connection: it may hang on the peer's limit of streams.
            let place = Place::take(&connections[at].in_flight);
            match connections[at].send.clone().ready().await {
                Ok(send) => return Ok((send, place)),
                Err(_) => {
                    connections.swap_remove(at);
                    statistics.count(|counts| counts.reconnects += 1);
                }
            }
        }
        let socket = self.dialer.dial().await?;
        let (send, connection) = h2::client::Builder::new()
            .initial_window_size(1 << 20)
            .initial_connection_window_size(1 << 24)
            .enable_push(false)
            .handshake(socket)
            .await
            .map_err(broken)?;
        tokio::spawn(async move {
            // Each exchange on it sees the error itself.
            let _ = connection.await;
        });
        statistics.count(|counts| counts.connections += 1);
        let shared = Shared { send, in_flight: Arc::default() };
        connections.push(shared.clone());
        let place = Place::take(&shared.in_flight);
        drop(connections);
        Ok((shared.send.ready().await.map_err(broken)?, place))
    }
}

/// The body of an answer.
pub struct Body {
    stream: RecvStream,
    _place: Place,
}

impl Body {
    pub async fn read(&mut self, content: &mut (dyn FnMut(&[u8]) + Send)) -> Result<bool, Failure> {
        match self.stream.data().await {
            None => Ok(false),
            Some(Ok(data)) => {
                content(&data);
                self.stream.flow_control().release_capacity(data.len()).map_err(broken)?;
                Ok(true)
            }
            Some(Err(error)) if error.is_reset() => Err(Failure::new(Fault::CutOff, error)),
            Some(Err(error)) => Err(broken(error)),
        }
    }
}

/// One exchange's place on a connection; given back when dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(in_flight: &Arc<AtomicUsize>) -> Self {
        in_flight.fetch_add(1, Ordering::Relaxed);
        Self(in_flight.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn encode(request: &Request<'_>) -> Result<http::Request<()>, Failure> {
    let mut head = http::Request::builder()
        .method(request.method)
        .uri(format!("{}://{}{}", request.scheme, request.authority, request.target))
        .header("accept", request.accept);
    if let Some((name, value)) = request.session {
        head = head.header(name, value);
    }
    if !request.body.is_empty() {
        head = head.header("content-type", "application/json");
    }
    head.body(()).map_err(|error| Failure::new(Fault::Malformed, error))
}

fn broken(error: h2::Error) -> Failure {
    Failure::new(Fault::Broken, error)
}
