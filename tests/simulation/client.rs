//! Client: makes turns of its sessions, loses patience now and then, and looks at every answer.

use std::rc::Rc;
use std::time::Duration;

use longhaul::drain::Phase;
use longhaul::error::Code;
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio::time::{Instant, sleep, timeout};

use crate::shape::{Protocol, client_host, listener, pick};
use crate::wire::{Ending, Head, Wire};
use crate::world::World;

/// A client with none waits so long for each answer.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Client {
    index: usize,
    world: Rc<World>,
    chance: SmallRng,
    sessions: Vec<Session>,
    turns: u64,
    kept: Option<Wire>,
}

/// A conversation, and what is known of its pin.
struct Session {
    key: String,
    /// The agent of the last answer, if that was a success, and nothing unknown has happened since.
    home: Option<usize>,
    /// At some time one was.
    confirmed: bool,
}

/// What a client asks for.
pub struct Ask {
    pub service: usize,
    pub session: Option<String>,
    pub token: String,
    /// 0: a short answer.
    pub events: u64,
    pub gap: u64,
    pub failure: &'static str,
    pub stubborn: bool,
    /// Leaves after this time.
    pub patience: Duration,
}

/// What came of it.
#[derive(Debug)]
pub enum Outcome {
    /// An agent's whole answer.
    Answered { status: u16, agent: usize, affinity: String },
    /// The proxy's own.
    Refused { code: Code },
    /// It began and broke off, visibly.
    Cut { agent: usize },
    /// The connection ended before an answer.
    Nothing { reused: bool },
    /// No connection came about.
    Unreachable,
    /// The client has left.
    Impatient,
}

impl Client {
    pub fn new(index: usize, world: Rc<World>, mut chance: SmallRng) -> Client {
        let sessions = (0..chance.random_range(1..=3)).map(|number| Session {
            key: format!("11111111-1111-4111-8{index:03}-{number:012}"),
            home: None,
            confirmed: false,
        });
        let sessions = sessions.collect();
        Client { index, world, chance, sessions, turns: 0, kept: None }
    }

    /// Until it is time to end.
    pub async fn run(mut self, until: Instant) {
        // A client of one service: its sessions are there.
        let service = self.index % self.world.shape.services.len();
        while Instant::now() < until {
            sleep(Duration::from_millis(self.chance.random_range(1..4_000))).await;
            self.turn(service).await;
        }
    }

    async fn turn(&mut self, service: usize) {
        let session = self.chance.random_bool(0.85).then(|| self.chance.random_range(0..self.sessions.len()));
        let key = session.map(|session| self.sessions[session].key.clone());
        let ask = self.ask(service, key.clone());
        if session.is_some() && self.chance.random_bool(0.15) {
            // Double texting: a second start before the first has ended, over a connection of its own.
            let second = self.ask(service, key);
            let wait = Duration::from_millis(self.chance.random_range(1..3_000));
            let (world, index) = (Rc::clone(&self.world), self.index);
            let first = exchange(&world, index, None, &ask);
            let second = async {
                sleep(wait).await;
                exchange(&world, index, None, &second).await
            };
            let ((first, _), (second, _)) = tokio::join!(first, second);
            if let Some(session) = session {
                let session = &mut self.sessions[session];
                // Which of them came to its agent first is not known.
                session.home = None;
                session.confirmed |= is_success(&first) | is_success(&second);
            }
            return;
        }
        let kept = self.kept.take().filter(|_| self.chance.random_bool(0.7));
        let (outcome, kept) = exchange(&self.world, self.index, kept, &ask).await;
        self.kept = kept;
        if let Some(session) = session {
            self.look_at_pin(session, &outcome);
        }
    }

    fn ask(&mut self, service: usize, session: Option<String>) -> Ask {
        self.turns += 1;
        let chance = &mut self.chance;
        let (events, gap) = match chance.random_range(0..10) {
            0..4 => (0, chance.random_range(1..500)),
            4..9 => (chance.random_range(1..20), chance.random_range(1..800)),
            // Longer than most drains.
            _ => (chance.random_range(10..20), chance.random_range(500..1_500)),
        };
        let failure = match chance.random_range(0..20) {
            0 => pick(chance, &["status", "cut", "silence", "refuse"]),
            _ => "none",
        };
        let patience = match chance.random_bool(0.1) {
            true => Duration::from_millis(chance.random_range(1..5_000)),
            false => PATIENCE,
        };
        let token = format!("c{}t{}", self.index, self.turns);
        Ask { service, session, token, events, gap, failure, stubborn: chance.random_bool(0.2), patience }
    }

    /// A session's endpoint changes only with a reason, which the answer says.
    fn look_at_pin(&mut self, session: usize, outcome: &Outcome) {
        let world = Rc::clone(&self.world);
        let session = &mut self.sessions[session];
        match outcome {
            Outcome::Answered { status, agent, affinity } => {
                if let Some(home) = session.home {
                    let said = affinity.as_str();
                    let right = match said {
                        "hit" => *agent == home,
                        "moved" | "lost" => world.oracle.borrow().was_ever_troubled(home),
                        _ => false,
                    };
                    if !right {
                        let key = &session.key;
                        world
                            .trace
                            .violation(format!("session {key} was at agent {home} and is answered by {agent}: {said}"));
                    }
                }
                if session.confirmed && affinity == "none" {
                    world.trace.violation(format!("session {} has no affinity", session.key));
                }
                let success = (200..400).contains(status);
                session.home = success.then_some(*agent);
                session.confirmed |= success;
            }
            // Nothing was placed, or where it was is not known.
            _ => session.home = None,
        }
    }
}

fn is_success(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Answered { status: 200, .. })
}

/// Asks once. Gives the connection back where it can be used again.
pub async fn exchange(world: &Rc<World>, client: usize, kept: Option<Wire>, ask: &Ask) -> (Outcome, Option<Wire>) {
    let began = Instant::now();
    let (token, session) = (&ask.token, ask.session.as_deref().unwrap_or("-"));
    world.trace.note(format!(
        "client {client} asks {token} of s{} {session} ({} events, {} ms, {})",
        ask.service, ask.events, ask.gap, ask.failure
    ));
    let asked = timeout(ask.patience, ask_and_read(world, client, kept, ask)).await;
    let (outcome, wire) = asked.unwrap_or((Outcome::Impatient, None));
    world.trace.note(format!("client {client} got of {token}: {outcome:?}"));
    judge(world, client, ask, &outcome, began);
    (outcome, wire)
}

/// Whether that may be.
fn judge(world: &World, client: usize, ask: &Ask, outcome: &Outcome, began: Instant) {
    let token = &ask.token;
    let client_troubled = world.is_client_troubled(client, began);
    let service = &world.shape.services[ask.service];
    let oracle = world.oracle.borrow();
    let is_troubled = || service.agents.iter().any(|agent| oracle.is_troubled(*agent, began));
    match outcome {
        Outcome::Refused { code } => {
            let reason = match code {
                // There may be more of it than there is room.
                Code::QueueFull | Code::QueueTimeout => true,
                Code::SessionBusy => ask.session.is_some() && service.takes_turns(),
                // Agents that fail are taken for dead for a while.
                Code::NoEndpoint | Code::SessionLost | Code::ConnectFailed | Code::ConnectTimeout => is_troubled(),
                Code::UpstreamReset => {
                    is_troubled() || ask.failure == "refuse" || service.double_texting == "interrupt"
                }
                Code::FirstByteTimeout => is_troubled() || ask.failure == "silence",
                _ => false,
            };
            if !reason && world.proxy.running.drain.phase() == Phase::Serving {
                world.trace.violation(format!("{token} was refused without a reason: {}", code.as_str()));
            }
        }
        Outcome::Cut { agent } => {
            // A run that waits for its client is cut by an interrupting one, too.
            let reason = client_troubled
                || ask.failure != "none"
                || oracle.is_troubled(*agent, began)
                || service.double_texting == "interrupt";
            if !reason {
                world.trace.violation(format!("{token} was cut at agent {agent} without a reason"));
            }
        }
        Outcome::Nothing { reused: false } | Outcome::Unreachable if !client_troubled => {
            world.trace.violation(format!("{token} got no answer over a connection that nothing had happened to"));
        }
        Outcome::Impatient => {
            let reason = ask.patience < PATIENCE || client_troubled || is_troubled() || ask.failure != "none";
            if !reason {
                world.trace.violation(format!("{token} had no answer for {PATIENCE:?}, and nothing has happened"));
            }
        }
        _ => {}
    }
}

async fn ask_and_read(world: &Rc<World>, client: usize, kept: Option<Wire>, ask: &Ask) -> (Outcome, Option<Wire>) {
    let reused = kept.is_some();
    let mut wire = match kept {
        Some(wire) => wire,
        None => match world.network.connect_from(client_host(client), listener()).await {
            Ok(stream) => Wire::new(stream),
            Err(_) => return (Outcome::Unreachable, None),
        },
    };
    let body = "{\"assistant_id\":\"agent\"}";
    let path = match (world.shape.services[ask.service].protocol, &ask.session) {
        (Protocol::LangGraph, Some(session)) => format!("/s{}/threads/{session}/runs", ask.service),
        (Protocol::LangGraph, None) => format!("/s{}/runs/stream", ask.service),
        (Protocol::Http, _) => format!("/s{}/run", ask.service),
    };
    let mut head = format!(
        "POST {path} HTTP/1.1\r\nhost: agents\r\ncontent-type: application/json\r\naccept: text/event-stream\r\n\
         x-token: {}\r\nx-events: {}\r\nx-gap: {}\r\nx-failure: {}\r\ncontent-length: {}\r\n",
        ask.token,
        ask.events,
        ask.gap,
        ask.failure,
        body.len()
    );
    if let Some(session) = &ask.session {
        head.push_str(&format!("x-session: {session}\r\n"));
    }
    if ask.stubborn {
        head.push_str("x-stubborn: 1\r\n");
    }
    head.push_str("\r\n");
    head.push_str(body);
    if wire.write(&head).await.is_err() {
        return (Outcome::Nothing { reused }, None);
    }
    let Ok(Some(head)) = wire.head().await else { return (Outcome::Nothing { reused }, None) };
    let ending = wire.body(&head).await;
    let keeps = head.field("connection") != Some("close");
    match understand(world, ask, &head, &ending) {
        Ok(outcome) => (outcome, matches!(ending, Ending::Whole(_)).then_some(wire).filter(|_| keeps)),
        Err(wrong) => {
            world.trace.violation(format!("{}: {wrong}", ask.token));
            (Outcome::Nothing { reused }, None)
        }
    }
}

/// An answer is an agent's, whole or visibly cut, or one of the proxy's own with a code.
fn understand(world: &World, ask: &Ask, head: &Head, ending: &Ending) -> Result<Outcome, String> {
    let status: u16 = head.line.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or("no status")?;
    let affinity = head.field("longhaul-affinity").ok_or("no longhaul-affinity")?.to_owned();
    if !["new", "hit", "moved", "lost", "none"].contains(&affinity.as_str()) {
        return Err(format!("an affinity that there is not: {affinity}"));
    }
    let Some(agent) = head.number("x-agent") else {
        let Ending::Whole(body) = ending else { return Ok(Outcome::Cut { agent: 0 }) };
        let body: serde_json::Value =
            serde_json::from_slice(body).map_err(|_| format!("{status} without a problem in it"))?;
        let code = Code::ALL.into_iter().find(|code| body["code"] == code.as_str());
        let code = code.ok_or_else(|| format!("{status} with an unknown code: {body}"))?;
        if head.field("proxy-status").is_none() {
            return Err(format!("{status} {} without Proxy-Status", code.as_str()));
        }
        return Ok(Outcome::Refused { code });
    };
    let agent = agent as usize;
    if status == 500 {
        return Ok(Outcome::Answered { status, agent, affinity });
    }
    if head.field("x-token") != Some(&ask.token) {
        return Err(format!("answered with the answer to {:?}", head.field("x-token")));
    }
    if !world.shape.services[ask.service].agents.contains(&agent) {
        return Err(format!("agent {agent} is none of service s{}", ask.service));
    }
    let token = &ask.token;
    let expected = match ask.events {
        _ if head.field("content-location").is_some() => None,
        0 => Some(format!("data: {token} short\n\n")),
        events => Some((0..events).map(|number| format!("data: {token} {number}\n\n")).collect()),
    };
    match (ending, expected) {
        (Ending::Whole(body), Some(expected)) if expected.as_bytes() != body => {
            Err("ended as if whole, and is not".to_owned())
        }
        (Ending::Cut(body), Some(expected)) if !expected.as_bytes().starts_with(without_last_word(body)) => {
            Err("what came of it before it was cut is not what was sent".to_owned())
        }
        (Ending::Whole(_), _) => Ok(Outcome::Answered { status, agent, affinity }),
        (Ending::Cut(_), _) => Ok(Outcome::Cut { agent }),
    }
}

/// Without what the proxy says in a stream that it cuts: when to come back.
fn without_last_word(body: &[u8]) -> &[u8] {
    let hint = body.windows(7).rposition(|window| window == b"retry: ");
    hint.map_or(body, |at| &body[..at])
}
