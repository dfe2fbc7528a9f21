//! Clients of the generator: each run of the plan is carried out, timed from when it was to be sent, and checked.

mod http1;
mod http2;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rustls::pki_types::ServerName;
use tokio::sync::watch;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::clock::{Timer, monotonic_ns, nanoseconds};
use crate::event::{EventChecker, EventTemplate};
use crate::plan::{PlannedRun, PlannedSession};
use crate::socket::{DialError, Dialer};
use crate::statistics::{Fault, Latency, Statistics};
use crate::workload::{Work, Workload};
use crate::{tls, websocket};

/// All clients of one load test.
pub struct Clients {
    workload: Workload,
    statistics: Arc<Statistics>,
    dialer: Arc<Dialer>,
    authority: String,
    http1: http1::Pool,
    http2: http2::Pool,
    release: watch::Receiver<bool>,
}

/// A run that did not go well, and why.
#[derive(Debug)]
pub struct Failure {
    pub fault: Fault,
    pub explanation: String,
}

impl Failure {
    fn new(fault: Fault, explanation: impl ToString) -> Self {
        Self { fault, explanation: explanation.to_string() }
    }
}

impl From<DialError> for Failure {
    fn from(error: DialError) -> Self {
        match error {
            DialError::Connect(error) => Self::new(Fault::Connect, error),
            DialError::Tls(error) => Self::new(Fault::Handshake, error),
        }
    }
}

impl From<tokio_tungstenite::tungstenite::Error> for Failure {
    fn from(error: tokio_tungstenite::tungstenite::Error) -> Self {
        Self::new(Fault::Broken, error)
    }
}

/// One request as the HTTP versions need it.
struct Request<'a> {
    method: &'static str,
    target: &'a str,
    scheme: &'static str,
    authority: &'a str,
    session: Option<(&'a str, &'a str)>,
    /// A body of JSON; empty: none.
    body: &'static str,
    accept: &'static str,
}

/// An answer's head, and its body to be read.
struct Answer {
    status: u16,
    /// Which backend answered, if it is a mock agent.
    agent: Option<u32>,
    location: Option<String>,
    body: Body,
}

enum Body {
    Http1(http1::Body),
    Http2(http2::Body),
}

impl Body {
    /// Reads some of the body; false at its end. An end before the end is a failure.
    async fn read(&mut self, content: &mut (dyn FnMut(&[u8]) + Send)) -> Result<bool, Failure> {
        match self {
            Self::Http1(body) => body.read(content).await,
            Self::Http2(body) => body.read(content).await,
        }
    }
}

impl Clients {
    /// `release` turning true ends idle streams.
    pub async fn new(
        workload: Workload,
        statistics: Arc<Statistics>,
        release: watch::Receiver<bool>,
    ) -> anyhow::Result<Self> {
        let (address, authority, server_name) = resolve(&workload.target).await?;
        let tls = match server_name {
            Some(name) => Some((tls::connector(&workload.tls, workload.http == 2)?, name)),
            None => None,
        };
        let dialer = Arc::new(Dialer::new(address, workload.sources, tls));
        let http1 = http1::Pool::new(dialer.clone());
        let http2 = http2::Pool::new(dialer.clone(), workload.streams_per_connection);
        Ok(Self { workload, statistics, dialer, authority, http1, http2, release })
    }

    /// Goes through the turns of a session. `intended_ns`: when it was to begin.
    pub async fn session(&self, session: &PlannedSession, mut intended_ns: u64) {
        let id = format!("session-{:08x}", session.number);
        let mut agent = None;
        for (turn, run) in session.turns.iter().enumerate() {
            if run.think_ns > 0 {
                let wake_ns = monotonic_ns() + run.think_ns;
                tokio::time::sleep(Duration::from_nanos(run.think_ns)).await;
                // A timer of a millisecond's grain is the generator's own and no wait of the client.
                intended_ns = monotonic_ns();
                self.statistics.latency(Latency::Lateness, intended_ns.saturating_sub(wake_ns));
            } else if turn > 0 {
                intended_ns = monotonic_ns();
            }
            let tag = session.number * u64::from(self.workload.session.turns) + turn as u64;
            let answered_by = self.turn(run, &id, tag, intended_ns).await;
            if let (Some(before), Some(now)) = (agent, answered_by)
                && before != now
            {
                self.statistics.count(|counts| counts.moved_turns += 1);
            }
            agent = answered_by.or(agent);
        }
    }

    /// Carries out one run within its time, and books how it went. Which backend answered, if known.
    async fn turn(&self, run: &PlannedRun, session: &str, tag: u64, intended_ns: u64) -> Option<u32> {
        self.statistics.count(|counts| {
            counts.started += 1;
            counts.open += 1;
        });
        let work = &self.workload.mix[run.item].work;
        let longest = match work {
            Work::Idle => self.workload.window_end() + self.workload.grace.0,
            _ => Duration::from_nanos(run.time_ns) + self.workload.grace.0,
        };
        let perform = tokio::time::timeout(longest, self.perform(work, run, session, tag, intended_ns));
        let leaves = async {
            match run.abort_after_ns {
                Some(after) => tokio::time::sleep(Duration::from_nanos(after)).await,
                None => std::future::pending().await,
            }
        };
        let result = tokio::select! {
            result = perform => Some(result),
            () = leaves => None,
        };
        self.statistics.count(|counts| counts.open -= 1);
        match result {
            None => self.statistics.count(|counts| counts.aborted += 1),
            Some(Ok(Ok(agent))) => {
                self.statistics.count(|counts| counts.completed += 1);
                return agent;
            }
            Some(Ok(Err(failure))) => self.statistics.fault(failure.fault, &failure.explanation),
            Some(Err(_)) => {
                let explanation = format!("a {} run had not ended after {longest:?}", work.name());
                self.statistics.fault(Fault::TimedOut, &explanation);
            }
        }
        None
    }

    async fn perform(
        &self,
        work: &Work,
        run: &PlannedRun,
        session: &str,
        tag: u64,
        intended_ns: u64,
    ) -> Result<Option<u32>, Failure> {
        match work {
            Work::Short { path } => {
                let answer = self.whole("GET", path, "", session).await?;
                self.answered(intended_ns, 0);
                Ok(answer.agent)
            }
            Work::Run { .. } => {
                let target = format!("/run?time={}us", run.time_ns / 1000);
                let answer = self.whole("POST", &target, "{}", session).await?;
                self.answered(intended_ns, run.time_ns);
                Ok(answer.agent)
            }
            Work::Job { poll, .. } => self.job(run, poll.0, session, intended_ns).await,
            Work::Stream { events, interval, size } => {
                let target =
                    format!("/stream?events={events}&interval_us={}&size={size}&tag={tag:x}", interval.0.as_micros());
                self.stream(&target, *events, *size, run.time_ns, session, tag, intended_ns).await
            }
            Work::Idle => self.idle(session, tag, intended_ns).await,
            Work::WebSocket { messages, interval, size } => {
                self.web_socket(*messages, interval.0, *size, session, tag, intended_ns).await
            }
        }
    }

    async fn job(
        &self,
        run: &PlannedRun,
        poll: Duration,
        session: &str,
        intended_ns: u64,
    ) -> Result<Option<u32>, Failure> {
        let target = format!("/jobs?time={}us", run.time_ns / 1000);
        let answer = self.whole("POST", &target, "{}", session).await?;
        let Some(place) = answer.location.filter(|_| answer.status == 202) else {
            return Err(Failure::new(Fault::Status, format!("a job was answered with {}", answer.status)));
        };
        loop {
            tokio::time::sleep(poll).await;
            let asked_ns = monotonic_ns();
            let answer = self.whole("GET", &place, "", session).await?;
            if answer.status == 200 {
                self.answered(intended_ns, run.time_ns);
                return Ok(answer.agent);
            }
            self.answered(asked_ns, 0);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one caller, which has them at hand")]
    async fn stream(
        &self,
        target: &str,
        events: u32,
        size: usize,
        time_ns: u64,
        session: &str,
        tag: u64,
        intended_ns: u64,
    ) -> Result<Option<u32>, Failure> {
        let mut answer = self.open("POST", target, "{}", session).await?;
        let mut events_in = self.events(tag, size, intended_ns);
        while answer.body.read(&mut |bytes| events_in.feed(bytes)).await.inspect_err(|_| events_in.finish())? {}
        events_in.finish();
        if events_in.checker.seen() < events && !events_in.faulty {
            let explanation = format!("a stream of {events} events ended after {}", events_in.checker.seen());
            return Err(Failure::new(Fault::Short, explanation));
        }
        self.answered(intended_ns, time_ns);
        Ok(answer.agent)
    }

    async fn idle(&self, session: &str, tag: u64, intended_ns: u64) -> Result<Option<u32>, Failure> {
        const SIZE: usize = 200;
        let target = format!("/idle?size={SIZE}&tag={tag:x}");
        let mut answer = self.open("POST", &target, "{}", session).await?;
        let mut events = self.events(tag, SIZE, intended_ns);
        let mut release = self.release.clone();
        let mut feed = |bytes: &[u8]| events.feed(bytes);
        loop {
            tokio::select! {
                more = answer.body.read(&mut feed) => {
                    if !more? {
                        return Err(Failure::new(Fault::Short, "an idle stream was ended"));
                    }
                }
                _ = release.wait_for(|release| *release) => return Ok(answer.agent),
            }
        }
    }

    async fn web_socket(
        &self,
        messages: u32,
        interval: Duration,
        size: usize,
        session: &str,
        tag: u64,
        intended_ns: u64,
    ) -> Result<Option<u32>, Failure> {
        let socket = self.dialer.dial().await?;
        self.statistics.count(|counts| counts.connections += 1);
        let key = generate_key();
        let session_header = self.session_header(session);
        let (socket, buffered, agent) =
            http1::upgrade(socket, &self.authority, "/websocket", session_header, &key).await?;
        let mut socket = WebSocketStream::from_partially_read(socket, buffered, Role::Client, None).await;
        let mut template = EventTemplate::new(tag, size);
        let mut events = self.events(tag, size, intended_ns);
        let no_timer = |error: io::Error| Failure::new(Fault::Connect, format!("no timer for its messages: {error}"));
        let timer = Timer::new().map_err(no_timer)?;
        let start_ns = monotonic_ns();
        for sequence in 0..messages {
            timer.wait_until_ns(start_ns + nanoseconds(interval * sequence)).await.map_err(no_timer)?;
            let message = Message::binary(template.stamped(sequence, monotonic_ns()).to_vec());
            websocket::send(&mut socket, message).await?;
            match websocket::receive(&mut socket).await? {
                Some(message) => events.feed(&message.into_data()),
                None => return Err(Failure::new(Fault::Short, "a WebSocket was closed before its time")),
            }
        }
        events.finish();
        // The answer to a close frame is the other side's matter.
        let _ = socket.close(None).await;
        Ok(agent)
    }

    /// Sends a request and reads the whole answer.
    async fn whole(
        &self,
        method: &'static str,
        target: &str,
        body: &'static str,
        session: &str,
    ) -> Result<Answer, Failure> {
        let mut answer = self.open(method, target, body, session).await?;
        while answer.body.read(&mut |_| {}).await? {}
        Ok(answer)
    }

    /// Sends a request and reads the head of a good answer.
    async fn open(
        &self,
        method: &'static str,
        target: &str,
        body: &'static str,
        session: &str,
    ) -> Result<Answer, Failure> {
        let accept =
            if target.starts_with("/stream") || target.starts_with("/idle") { "text/event-stream" } else { "*/*" };
        let session = self.session_header(session);
        let scheme = if self.workload.target.starts_with("https") { "https" } else { "http" };
        let request = Request { method, target, scheme, authority: &self.authority, session, body, accept };
        let mut answer = if self.workload.http == 2 {
            self.http2.send(&request, &self.statistics).await?
        } else {
            self.http1.send(&request, &self.statistics).await?
        };
        if !(200..300).contains(&answer.status) {
            let mut text = Vec::new();
            let mut keep = |bytes: &[u8]| text.extend_from_slice(&bytes[..bytes.len().min(200)]);
            while answer.body.read(&mut keep).await? {}
            let explanation = format!("{} {}", answer.status, String::from_utf8_lossy(&text));
            return Err(Failure::new(Fault::Status, explanation));
        }
        Ok(answer)
    }

    fn answered(&self, intended_ns: u64, asked_ns: u64) {
        let taken_ns = monotonic_ns().saturating_sub(intended_ns);
        self.statistics.latency(Latency::Answer, taken_ns.saturating_sub(asked_ns));
    }

    fn session_header<'a>(&'a self, session: &'a str) -> Option<(&'a str, &'a str)> {
        let header = self.workload.session.header.as_str();
        (!header.is_empty()).then_some((header, session))
    }

    fn events(&self, tag: u64, size: usize, intended_ns: u64) -> Events<'_> {
        let checker = EventChecker::new(tag, size);
        Events { statistics: &self.statistics, checker, intended_ns, first: true, faulty: false }
    }
}

/// The events of one stream on their way into the statistics.
struct Events<'a> {
    statistics: &'a Statistics,
    checker: EventChecker,
    intended_ns: u64,
    first: bool,
    faulty: bool,
}

impl Events<'_> {
    fn feed(&mut self, bytes: &[u8]) {
        let now_ns = monotonic_ns();
        self.checker.feed(bytes, |event| match event {
            Ok(sent_ns) => {
                if self.first {
                    self.first = false;
                    self.statistics.latency(Latency::FirstEvent, now_ns.saturating_sub(self.intended_ns));
                }
                self.statistics.latency(Latency::Event, now_ns.saturating_sub(sent_ns));
            }
            Err(fault) => {
                self.faulty = true;
                self.statistics.fault(fault.into(), "");
            }
        });
    }

    fn finish(&mut self) {
        self.checker.finish(|fault| {
            self.faulty = true;
            self.statistics.fault(fault.into(), "");
        });
    }
}

/// The address, the authority for requests, and for https the name to check.
async fn resolve(target: &str) -> anyhow::Result<(SocketAddr, String, Option<ServerName<'static>>)> {
    let uri: http::Uri =
        target.parse().with_context(|| format!("`{target}` is not a target: write http://HOST:PORT"))?;
    let tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => bail!("`{target}` is not a target: write http://HOST:PORT or https://HOST:PORT"),
    };
    let authority = uri.authority().context("the target has no host")?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let addresses: Vec<SocketAddr> =
        tokio::net::lookup_host((host, port)).await.with_context(|| format!("cannot resolve {host}"))?.collect();
    // Sources to come from exist for IPv4 loopback only.
    let first_choice = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
    let address = *first_choice.with_context(|| format!("{host} has no address"))?;
    let name = if tls { Some(ServerName::try_from(host.to_owned())?) } else { None };
    Ok((address, authority.to_string(), name))
}
