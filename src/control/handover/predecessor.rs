//! Predecessor: the side of the process that takes over.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io::{self, Read};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{Duration, MissedTickBehavior};
use tracing::{info, warn};

use crate::control::handover::{
    ENVIRONMENT, Hello, PROTOCOL, STEP_TIMEOUT, ToNew, ToOld, channel, in_time, length_of, receive, send,
};
use crate::control::reload::Heritage;
use crate::ids::{self, RunId};
use crate::net::inherit::{self, Inherited};
use crate::snapshot::Running;
use crate::state::Refusal;
use crate::state::core::Finish;
use crate::state::dispatcher::{Dispatcher, Lease, Picked, Placed};
use crate::state::queue::Ticket;
use crate::state::succession::{Answer, AskSent, Told};
use crate::state::waiting::Waiting;

/// How often it is looked which runs of the old process are to end.
const STOPS_EVERY: Duration = Duration::from_millis(50);

/// The process that serves until this one takes over from it.
pub struct Predecessor {
    stream: StdUnixStream,
}

impl Predecessor {
    /// `None`: this process was started by nobody that it could take over from. What it is given goes to `heritage`.
    pub fn greet(heritage: &mut Heritage) -> Result<Option<Predecessor>, String> {
        if std::env::var_os(ENVIRONMENT).is_none() {
            return Ok(None);
        }
        let said = |failure: io::Error| {
            format!("{ENVIRONMENT} is set, but the process to take over from could not be heard: {failure}")
        };
        let stream = rustix::stdio::stdin().try_clone_to_owned().map_err(said)?;
        let stream = StdUnixStream::from(stream);
        let hello = hear(&stream, heritage).map_err(said)?;
        // What is read from the standard input from here on is nothing.
        let nothing = std::fs::File::open("/dev/null").map_err(said)?;
        rustix::stdio::dup2_stdin(&nothing).map_err(|failure| said(failure.into()))?;
        heritage.secrets = Some(hello.secrets);
        heritage.generation = Some((hello.generation, hello.sha256));
        Ok(Some(Predecessor { stream }))
    }

    /// Says that everything is built, and takes the state over. From then on this process decides, and has to serve.
    pub async fn take_over(self, running: &Arc<Running>) -> io::Result<Link> {
        self.stream.set_nonblocking(true)?;
        let mut stream = UnixStream::from_std(self.stream)?;
        in_time("the old process was told of readiness", send(&mut stream, &ToOld::Ready)).await?;
        let estates = match in_time("the old process gives its state", receive(&mut stream)).await? {
            ToNew::Estate(estates) => estates,
            ToNew::Released | ToNew::Told(_) => return Err(io::Error::other("the old process gives no state")),
        };
        let mut leases = HashMap::new();
        let (mut sessions, mut carried) = (0, 0);
        let now = ids::now();
        for estate in estates {
            let Some(dispatcher) = dispatcher(running, &estate.image.name) else {
                warn!(service = estate.image.name, "is configured no more: its sessions are not taken over");
                continue;
            };
            sessions += estate.image.pins.len();
            // What the configuration does not name (any more) is the old process's to finish.
            for (run, lease) in dispatcher.take_over(estate, &|_| None, now) {
                carried += 1;
                leases.insert(run, lease);
            }
        }
        in_time("the old process was told that this one serves", send(&mut stream, &ToOld::Serving)).await?;
        info!(sessions, carried, "took over from the process before, which finishes what it has begun");
        let (reader, writer) = stream.into_split();
        let (answers, to_write) = channel();
        let link = Link {
            running: Arc::clone(running),
            reader,
            writer,
            to_write,
            answers,
            leases,
            stopped: Vec::new(),
            waiting: HashMap::new(),
            released: Arc::default(),
        };
        Ok(link)
    }
}

/// Reads the first message, and the sockets with it.
fn hear(stream: &StdUnixStream, heritage: &mut Heritage) -> io::Result<Hello> {
    stream.set_read_timeout(Some(STEP_TIMEOUT))?;
    let mut head = [0; 4];
    let (count, handles) = inherit::receive_with_sockets(stream, &mut head)?;
    let mut reader = stream;
    reader.read_exact(&mut head[count..])?;
    let mut bytes = Vec::new();
    reader.take(length_of(head)? as u64).read_to_end(&mut bytes)?;
    let spoken: serde_json::Value = serde_json::from_slice(&bytes)?;
    if spoken["protocol"] != PROTOCOL {
        let reason = format!(
            "it speaks version {} of the handover, this program version {PROTOCOL}; restart the service instead",
            spoken["protocol"]
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    let hello: Hello = serde_json::from_value(spoken)?;
    if hello.sockets.len() != handles.len() {
        return Err(io::Error::other("not all of the listening sockets came through"));
    }
    let mut sockets = Inherited::default();
    for (passed, handle) in hello.sockets.iter().zip(handles) {
        sockets.add(handle, passed.address(), passed.purpose.clone(), passed.owns_file)?;
    }
    heritage.sockets = sockets;
    Ok(hello)
}

fn dispatcher(running: &Running, service: &str) -> Option<Arc<Dispatcher>> {
    let snapshot = running.snapshot.load();
    snapshot.services.iter().find(|known| *known.name == *service).map(|known| Arc::clone(&known.dispatcher))
}

/// What still joins this process to the one before.
pub struct Link {
    running: Arc<Running>,
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    to_write: mpsc::UnboundedReceiver<Answer>,
    /// Bounded by the exchanges of the old process, as each asks once.
    answers: mpsc::UnboundedSender<Answer>,
    /// Of the runs that the old process carries.
    leases: HashMap<RunId, Lease>,
    /// Those of them that it was told to end.
    stopped: Vec<RunId>,
    /// Exchanges of the old process that wait here.
    waiting: HashMap<(String, Ticket), (Option<RunId>, AbortHandle)>,
    released: Arc<Notify>,
}

impl Link {
    /// Told when the old process accepts nothing any more.
    pub fn released(&self) -> Arc<Notify> {
        Arc::clone(&self.released)
    }

    /// Answers the old process until it has gone. What it carries then ends, as unknown.
    pub async fn run(mut self) {
        let (found, mut placed) = channel::<(RunId, Lease)>();
        let (mut reader, mut writer) = (self.reader, self.writer);
        let (messages, mut told) = mpsc::channel(64);
        let reading = tokio::spawn(async move {
            while let Ok(message) = receive::<ToNew>(&mut reader).await {
                if messages.send(message).await.is_err() {
                    return;
                }
            }
        });
        let writing = tokio::spawn(async move {
            while let Some(answer) = self.to_write.recv().await {
                if send(&mut writer, &ToOld::Answer(answer)).await.is_err() {
                    return;
                }
            }
        });
        let mut desk = Desk {
            running: self.running,
            answers: self.answers,
            leases: self.leases,
            stopped: self.stopped,
            waiting: self.waiting,
            found,
        };
        let mut stops = tokio::time::interval(STOPS_EVERY);
        stops.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // A lease is noted before the end of its run can be told.
                biased;
                Some((run, lease)) = placed.recv() => {
                    desk.leases.insert(run, lease);
                }
                message = told.recv() => match message {
                    Some(ToNew::Told(told)) => desk.take(told),
                    Some(ToNew::Released) => self.released.notify_one(),
                    Some(ToNew::Estate(_)) => warn!("the old process gives its state twice"),
                    None => break,
                },
                _ = stops.tick() => desk.tell_stops(),
            }
        }
        reading.abort();
        writing.abort();
        self.released.notify_one();
        for (_, waiting) in desk.waiting.values() {
            waiting.abort();
        }
        if desk.leases.is_empty() {
            info!("the process before has finished");
        } else {
            warn!(runs = desk.leases.len(), "the process before went with runs in hand: how they ended is not known");
        }
    }
}

struct Desk {
    running: Arc<Running>,
    answers: mpsc::UnboundedSender<Answer>,
    leases: HashMap<RunId, Lease>,
    stopped: Vec<RunId>,
    waiting: HashMap<(String, Ticket), (Option<RunId>, AbortHandle)>,
    found: mpsc::UnboundedSender<(RunId, Lease)>,
}

impl Desk {
    fn take(&mut self, told: Told) {
        let now = ids::now();
        match told {
            Told::Asks { service, ticket, ask } => self.asks(service, ticket, &ask),
            Told::Leaves { service, ticket } => {
                if let Some((_, waiting)) = self.waiting.remove(&(service, ticket)) {
                    waiting.abort();
                }
            }
            Told::Ended { service: _, run, outcome } => {
                if let Some(lease) = self.leases.remove(&run) {
                    end(lease, Finish::Ended(outcome));
                }
                self.waiting.retain(|_, (of, _)| *of != Some(run));
            }
            Told::Left { service: _, run } => {
                if let Some(lease) = self.leases.remove(&run) {
                    end(lease, Finish::Left);
                }
            }
            Told::Started { service, run, place } => {
                let adopted = dispatcher(&self.running, &service).and_then(|one| one.adopt_run(*run, place, now));
                self.leases.extend(adopted);
            }
            Told::Named { service, run, key } => {
                if let Some(dispatcher) = dispatcher(&self.running, &service) {
                    dispatcher.adopt_name(run, &key);
                }
            }
            Told::Moved { service: _, run, endpoint } => {
                if let Some(lease) = self.leases.get_mut(&run) {
                    lease.was_moved(&endpoint, now);
                }
            }
            Told::Pinned { service, key, alias, endpoint } => {
                if let Some(dispatcher) = dispatcher(&self.running, &service) {
                    dispatcher.adopt_pin(&key, alias.as_ref(), &endpoint, now);
                }
            }
        }
    }

    fn asks(&mut self, service: String, ticket: Ticket, ask: &AskSent) {
        let picked = match dispatcher(&self.running, &service) {
            Some(dispatcher) => dispatcher.pick_for(ask, ids::now()),
            None => Err(Refusal::NoEndpoint),
        };
        match picked {
            Ok(Picked::Placed(placed)) => {
                if let Some((run, lease)) = self.answer_placed(service, ticket, placed) {
                    self.leases.insert(run, lease);
                }
            }
            Ok(Picked::Waiting(waiting)) => {
                let run = waiting.run_id();
                let (answers, found, key) = (self.answers.clone(), self.found.clone(), (service.clone(), ticket));
                let task = tokio::spawn(async move {
                    match wait(waiting).await {
                        Ok(placed) => {
                            let answer = placed_answer(service, ticket, &placed);
                            // The lease first: what is told of its run comes after the answer.
                            if let Some(run) = placed.lease.run_id() {
                                let _ = found.send((run, placed.lease));
                            }
                            let _ = answers.send(answer);
                        }
                        Err(refusal) => {
                            let _ = answers.send(Answer::Refused { service, ticket, refusal });
                        }
                    }
                });
                self.waiting.insert(key, (run, task.abort_handle()));
            }
            Err(refusal) => {
                // Fails only where the other end has gone.
                let _ = self.answers.send(Answer::Refused { service, ticket, refusal });
            }
        }
    }

    /// A lease is kept for a run; what is none needs only to be told where to go.
    fn answer_placed(&self, service: String, ticket: Ticket, placed: Placed) -> Option<(RunId, Lease)> {
        let _ = self.answers.send(placed_answer(service, ticket, &placed));
        Some((placed.lease.run_id()?, placed.lease))
    }

    fn tell_stops(&mut self) {
        self.stopped.retain(|run| self.leases.contains_key(run));
        for (run, lease) in &self.leases {
            let Some(outcome) = lease.stop().and_then(|stop| stop.outcome()) else { continue };
            if !self.stopped.contains(run) {
                self.stopped.push(*run);
                let service = lease.service().to_string();
                let _ = self.answers.send(Answer::Stop { service, run: *run, outcome });
            }
        }
    }
}

fn placed_answer(service: String, ticket: Ticket, placed: &Placed) -> Answer {
    let (endpoint, affinity) = (placed.target.identity(), placed.affinity);
    Answer::Placed { service, ticket, endpoint, affinity }
}

async fn wait(mut waiting: Waiting) -> Result<Placed, Refusal> {
    let until = waiting.until();
    match tokio::time::timeout_at(until.into(), poll_fn(|context| waiting.poll(context))).await {
        Ok(found) => found,
        Err(_) => waiting.time_out(ids::now()),
    }
}

fn end(mut lease: Lease, finish: Finish) {
    lease.finish(finish);
}
