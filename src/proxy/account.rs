//! Step 10, account: what an exchange was, told exactly once, when its record is dropped: metrics and access log.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;

use crate::error::Code;
use crate::ids::RunId;
use crate::logging::AccessLine;
use crate::message::{Fields, RequestHead};
use crate::protocols::Protocol;
use crate::proxy::connection::Connection;
use crate::proxy::worker::{Local, Worker};
use crate::snapshot::{Listener, Running, Service};
use crate::state::core::Finish;
use crate::state::sessions::SessionKey;
use crate::state::{AffinityOutcome, RunOutcome, Target};

/// Counts among the open exchanges, for which a drain waits, as long as it lives.
pub struct OpenExchange(Rc<Worker>);

impl OpenExchange {
    pub fn new(worker: &Rc<Worker>) -> OpenExchange {
        worker.running.open_exchanges.begin();
        OpenExchange(worker.clone())
    }
}

impl Drop for OpenExchange {
    fn drop(&mut self) {
        self.0.running.open_exchanges.end();
    }
}

/// A protocol that has a form of its own for errors.
pub struct CallerForm {
    pub protocol: &'static dyn Protocol,
    /// The id of the JSON-RPC request, as JSON.
    pub rpc_id: Option<String>,
}

/// The story of one exchange, filled in as it goes.
pub struct Record {
    open: OpenExchange,
    listener: Local<Listener>,
    pub route: Option<usize>,
    started: Instant,
    pub client: Option<std::net::IpAddr>,
    method: http::Method,
    path: Box<str>,
    /// 0: no answer was begun.
    pub status: u16,
    pub code: Option<Code>,
    /// An event stream was begun before there was an answer: what fails from then on is an event of it.
    pub begun: bool,
    pub outcome: Option<RunOutcome>,
    /// The exchange starts its run (it may also join one).
    pub starts: bool,
    /// The client may see which endpoint answers, and wants to.
    pub debug: bool,
    /// In whose form the caller reads errors.
    pub caller_form: Option<Box<CallerForm>>,
    pub service: Option<Local<Service>>,
    pub target: Option<Arc<Target>>,
    pub affinity: AffinityOutcome,
    pub session: Option<SessionKey>,
    pub run: Option<RunId>,
    pub queued: Duration,
    pub first_event_at: Option<Instant>,
    pub events: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Of an answer of our own: logged, but not among the bytes of a service's streams.
    pub own_bytes_out: u64,
}

impl Record {
    pub fn open(connection: &Connection, listener: Local<Listener>, request: &RequestHead) -> Record {
        let open = OpenExchange::new(&connection.worker);
        // Kept for the log line only; the path is the client's and may be long.
        let keep_path = listener_logs(&connection.worker.running);
        Record {
            listener,
            route: None,
            started: crate::ids::now(),
            client: None,
            method: request.method.clone(),
            path: if keep_path { request.path.as_str().into() } else { "".into() },
            status: 0,
            code: None,
            begun: false,
            outcome: None,
            starts: false,
            debug: false,
            caller_form: None,
            service: None,
            target: None,
            affinity: AffinityOutcome::None,
            session: None,
            run: None,
            queued: Duration::ZERO,
            first_event_at: None,
            events: 0,
            bytes_in: 0,
            bytes_out: 0,
            own_bytes_out: 0,
            open,
        }
    }

    pub fn started(&self) -> Instant {
        self.started
    }

    /// Tells of the endpoint that was chosen, where the client may know it and wants to.
    pub fn add_debug_fields(&self, fields: &mut Fields) {
        if let (true, Some(target)) = (self.debug, &self.target) {
            fields.append("longhaul-version", target.version.as_bytes());
            fields.append("longhaul-endpoint", target.address.as_bytes());
        }
    }

    /// Notes how the run ended that the exchange started, if it did.
    pub fn ended(&mut self, finish: Finish) {
        self.outcome = match finish {
            Finish::Ended(outcome) if self.starts && self.run.is_some() => Some(outcome),
            _ => None,
        };
    }
}

/// Counts a request whose head could not be read, and writes its line: it has neither method nor path.
pub fn unreadable(connection: &Connection, status: StatusCode, code: Code, bytes_out: usize) {
    let status = status.as_u16();
    connection.listener().no_route.record(status, Some(code));
    let running = &connection.worker.running;
    if !listener_logs(running) {
        return;
    }
    running.access_log.write(&AccessLine {
        time: crate::ids::wall_clock(),
        client: connection.peer.address,
        method: None,
        path: None,
        status,
        code: Some(code),
        outcome: None,
        service: None,
        version: None,
        endpoint: None,
        affinity: AffinityOutcome::None.as_str(),
        session: None,
        run: None,
        queue: None,
        first_event: None,
        events: 0,
        bytes_in: 0,
        bytes_out: bytes_out as u64,
        duration: Duration::ZERO,
    });
}

fn listener_logs(running: &Running) -> bool {
    running.access_log.enabled()
}

impl Drop for Record {
    fn drop(&mut self) {
        let route = match self.route {
            Some(index) => self.listener.routes.get(index).unwrap_or(&self.listener.no_route),
            None => &self.listener.no_route,
        };
        route.record(self.status, self.code);
        if let Some(target) = &self.target {
            let metrics = &target.metrics;
            for (counter, count) in [
                (&metrics.stream_events, self.events),
                (&metrics.bytes_request, self.bytes_in),
                (&metrics.bytes_response, self.bytes_out),
            ] {
                // Adding nothing would fetch the counter from another core all the same.
                if count > 0 {
                    counter.inc_by(count);
                }
            }
            if self.starts
                && self.run.is_some()
                && let Some(at) = self.first_event_at
            {
                metrics.time_to_first_event_seconds.observe(at.duration_since(self.started).as_secs_f64());
            }
        }
        let running = &self.open.0.running;
        if !listener_logs(running) {
            return;
        }
        running.access_log.write(&AccessLine {
            time: crate::ids::wall_clock(),
            client: self.client,
            method: Some(self.method.as_str()),
            path: Some(&self.path),
            status: self.status,
            code: self.code,
            outcome: self.outcome.map(RunOutcome::as_str),
            service: self.service.as_ref().map(|service| &*service.name),
            version: self.target.as_ref().map(|target| &*target.version),
            endpoint: self.target.as_ref().map(|target| &*target.address),
            affinity: self.affinity.as_str(),
            session: self.session.as_ref().map(|session| &*session.text),
            run: self.run,
            queue: Some(self.queued),
            first_event: self.first_event_at.map(|at| at.duration_since(self.started)),
            events: self.events,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out + self.own_bytes_out,
            duration: crate::ids::now().duration_since(self.started),
        });
    }
}
