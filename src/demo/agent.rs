//! Agent: a built-in HTTP agent that streams tokens and remembers its sessions, for the demo.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc;

/// Between two tokens: about 50 tokens make four seconds, which is an ordinary answer.
const TOKEN_PACE: Duration = Duration::from_millis(80);
/// As above for a slow run of about 20 seconds.
const SLOW_TOKEN_PACE: Duration = Duration::from_millis(400);
/// Words of the user's message that an agent repeats.
const ECHO_WORDS_MAX: usize = 20;
/// Sessions that an agent remembers; the oldest is forgotten first.
const SESSIONS_MAX: usize = 10_000;

/// A running agent.
#[derive(Clone, Copy, Debug)]
pub struct Agent {
    pub name: &'static str,
    pub version: &'static str,
    pub address: SocketAddr,
}

/// Starts an agent for every (name, version), each on a loopback port of its own, on one thread that lives as long as
/// the process.
pub fn start(agents: &[(&'static str, &'static str)]) -> std::io::Result<Vec<Agent>> {
    let mut started = Vec::new();
    let mut listeners = Vec::new();
    for &(name, version) in agents {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        started.push(Agent { name, version, address: listener.local_addr()? });
        listeners.push(listener);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let served: Vec<Agent> = started.clone();
    std::thread::Builder::new().name("demo-agents".to_owned()).spawn(move || {
        runtime.block_on(async move {
            let mut servers = tokio::task::JoinSet::new();
            for (agent, listener) in served.into_iter().zip(listeners) {
                servers.spawn(serve(agent, listener));
            }
            while servers.join_next().await.is_some() {}
        });
    })?;
    Ok(started)
}

async fn serve(agent: Agent, listener: std::net::TcpListener) -> std::io::Result<()> {
    let mind = Arc::new(Mind { agent, memory: Mutex::new(Memory::default()) });
    let router = axum::Router::new()
        .route("/", get(describe))
        .route("/health", get(|| async { "ok" }))
        .route("/chat", post(chat))
        .route("/slow", get(slow))
        .with_state(mind);
    axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await
}

/// One agent's identity and memory.
struct Mind {
    agent: Agent,
    memory: Mutex<Memory>,
}

/// How many turns each session has had here.
#[derive(Default)]
struct Memory {
    turns: HashMap<String, u32>,
    /// Oldest first.
    order: VecDeque<String>,
}

impl Memory {
    /// Counts a turn of `session` and says which it is, from 1.
    fn turn(&mut self, session: &str) -> u32 {
        if let Some(turns) = self.turns.get_mut(session) {
            *turns = turns.saturating_add(1);
            return *turns;
        }
        if self.order.len() == SESSIONS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.turns.remove(&oldest);
        }
        self.order.push_back(session.to_owned());
        self.turns.insert(session.to_owned(), 1);
        1
    }
}

/// The body of `POST /chat`.
#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    message: String,
    thread_id: Option<String>,
    #[serde(default)]
    slow: bool,
}

async fn describe(State(mind): State<Arc<Mind>>) -> Response {
    let sessions = mind.memory.lock().map(|memory| memory.turns.len()).unwrap_or_default();
    Json(json!({
        "agent": mind.agent.name,
        "version": mind.agent.version,
        "sessions": sessions,
        "endpoints": {
            "POST /chat": "{\"message\": \"...\", \"thread_id\": \"...\", \"slow\": false}, answered by an event stream",
            "GET /slow": "an event stream of 20 seconds",
            "GET /health": "ok",
        },
    }))
    .into_response()
}

async fn chat(State(mind): State<Arc<Mind>>, headers: HeaderMap, body: Bytes) -> Response {
    // The content type is not looked at: `curl -d` sends another one.
    let message: Message = match serde_json::from_slice(&body) {
        Ok(message) => message,
        Err(error) => {
            let detail = format!("the body must be JSON with \"message\" and perhaps \"thread_id\": {error}");
            return (StatusCode::BAD_REQUEST, Json(json!({ "error": detail }))).into_response();
        }
    };
    let pace = if message.slow { SLOW_TOKEN_PACE } else { TOKEN_PACE };
    let session = session_header(&headers).or(message.thread_id);
    mind.answer(session, &message.message, pace)
}

async fn slow(State(mind): State<Arc<Mind>>, headers: HeaderMap) -> Response {
    mind.answer(session_header(&headers), "take your time", SLOW_TOKEN_PACE)
}

fn session_header(headers: &HeaderMap) -> Option<String> {
    headers.get("x-session-id").and_then(|value| value.to_str().ok()).map(str::to_owned)
}

impl Mind {
    fn answer(&self, session: Option<String>, message: &str, pace: Duration) -> Response {
        let turn = match (&session, self.memory.lock()) {
            (Some(session), Ok(mut memory)) => memory.turn(session),
            _ => 1,
        };
        let opening = json!({
            "agent": self.agent.name,
            "version": self.agent.version,
            "session": session,
            "turn": turn,
        });
        let text = self.text(session.as_deref(), turn, message);
        // One event of headroom: an agent writes as fast as its reader reads, and no faster.
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(write_events(sender, opening, text, pace));
        let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
        (headers, Body::new(EventBody { receiver })).into_response()
    }

    /// About 50 words, whoever asks.
    fn text(&self, session: Option<&str>, turn: u32, message: &str) -> String {
        let echo: Vec<&str> = message.split_whitespace().take(ECHO_WORDS_MAX).collect();
        let session = session.map_or("a conversation that has no name".to_owned(), |name| format!("session {name}"));
        format!(
            "This is {name} ({version}), turn {turn} of {session} as far as I remember. You said: {echo}. I keep my memory \
             in this process, so only I can go on with it; another agent would start anew. That is why a proxy should \
             bring you back to me.",
            name = self.agent.name,
            version = self.agent.version,
            echo = echo.join(" "),
        )
    }
}

/// Writes the events of one run; ends early when the reader is gone.
async fn write_events(
    sender: mpsc::Sender<Bytes>,
    opening: serde_json::Value,
    text: String,
    pace: Duration,
) -> Option<()> {
    sender.send(event("agent", &opening)).await.ok()?;
    for word in text.split_whitespace() {
        // The pause ends with the reader too: a run that nobody reads shall not go on for nothing.
        tokio::select! {
            () = tokio::time::sleep(pace) => {}
            () = sender.closed() => return None,
        }
        sender.send(event("token", &json!({ "token": word }))).await.ok()?;
    }
    sender.send(event("done", &json!({ "finished": true }))).await.ok()
}

fn event(name: &str, data: &serde_json::Value) -> Bytes {
    format!("event: {name}\ndata: {data}\n\n").into()
}

/// A body whose chunks come from a channel.
struct EventBody {
    receiver: mpsc::Receiver<Bytes>,
}

impl hyper::body::Body for EventBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Infallible>>> {
        self.receiver.poll_recv(context).map(|chunk| chunk.map(|bytes| Ok(hyper::body::Frame::data(bytes))))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn memory_counts_turns_and_forgets_the_oldest() {
        let mut memory = Memory::default();
        assert_eq!((memory.turn("a"), memory.turn("a"), memory.turn("b")), (1, 2, 1));
        for index in 0..SESSIONS_MAX - 1 {
            memory.turn(&format!("other-{index}"));
        }
        assert_eq!(memory.turns.len(), SESSIONS_MAX);
        assert_eq!(memory.turn("a"), 1, "the oldest was forgotten");
    }

    #[test]
    fn an_answer_takes_about_four_seconds() {
        let agent = Agent { name: "stable-1", version: "stable", address: ([127, 0, 0, 1], 1).into() };
        let mind = Mind { agent, memory: Mutex::default() };
        let words = mind.text(Some("anna"), 1, "hello there").split_whitespace().count() as u32;
        let duration = TOKEN_PACE * words;
        assert!((Duration::from_secs(3)..Duration::from_secs(6)).contains(&duration), "{words} words: {duration:?}");
    }

    #[tokio::test]
    async fn a_chat_streams_its_first_event_before_the_last_and_remembers_the_session() {
        let agent = start(&[("stable-1", "stable")]).expect("loopback")[0];
        for turn in 1..=2 {
            let mut stream = tokio::net::TcpStream::connect(agent.address).await.expect("the agent listens");
            let body = r#"{"message": "hi", "thread_id": "anna"}"#;
            let request = format!("POST /chat HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            stream.write_all(request.as_bytes()).await.expect("sent");
            let mut seen = String::new();
            while !seen.contains("event: token") {
                let mut buffer = [0; 4096];
                let count = stream.read(&mut buffer).await.expect("read");
                assert_ne!(count, 0, "ended early: {seen}");
                seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
            assert!(seen.contains("text/event-stream"), "{seen}");
            assert!(seen.contains(&format!(r#""session":"anna","turn":{turn}"#)), "{seen}");
            assert!(!seen.contains("event: done"), "the answer is not held back");
        }
    }

    #[tokio::test]
    async fn a_body_that_is_not_json_is_refused_with_a_reason() {
        let agent = start(&[("stable-1", "stable")]).expect("loopback")[0];
        let mut stream = tokio::net::TcpStream::connect(agent.address).await.expect("the agent listens");
        let request = "POST /chat HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi";
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("must be JSON"), "{answer}");
    }
}
