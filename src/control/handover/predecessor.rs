//! Predecessor: the side of the process that takes over.

use std::collections::{HashMap, HashSet};
use std::future::poll_fn;
use std::io::{self, Read};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::Arc;

use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Duration, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::control::handover::door::Unheard;
use crate::control::handover::{
    ENVIRONMENT, Hello, PROTOCOL, STEP_TIMEOUT, ToNew, ToOld, channel, door, in_time, length_of, receive, send,
};
use crate::control::reload::{Heritage, Reloader};
use crate::ids::{self, RunId};
use crate::net::inherit::{self, Inherited};
use crate::snapshot::Running;
use crate::state::Refusal;
use crate::state::core::Finish;
use crate::state::dispatcher::{Dispatcher, Lease, Picked, Placed};
use crate::state::image::Place;
use crate::state::queue::Ticket;
use crate::state::succession::{Answer, AskSent, Told};
use crate::state::waiting::Waiting;

/// How often it is looked which runs of the old process are to end, and which endpoints drain.
const STOPS_EVERY: Duration = Duration::from_millis(50);

/// For how long there may be no process that serves, how often it is looked for, and for how long in all.
const FOUND_WITHIN: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(20);
const LOOK_MAX: Duration = Duration::from_secs(60);

/// The process that serves until this one takes over from it.
pub struct Predecessor {
    stream: StdUnixStream,
}

impl Predecessor {
    /// `None`: there is none that this process could take over from. `upgrade` names the configuration of one that is to
    /// be looked for, where this process was not started by it. What it is given goes to `heritage`.
    pub fn greet(heritage: &mut Heritage, upgrade: Option<&Path>) -> Result<Option<Predecessor>, String> {
        if std::env::var_os(ENVIRONMENT).is_none() {
            return upgrade.map(|config| Predecessor::find(heritage, config)).transpose();
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
        Ok(Some(Predecessor::take(heritage, hello, stream)))
    }

    /// Asks the process that serves this configuration. While one hands over to another there is none for a moment.
    fn find(heritage: &mut Heritage, config: &Path) -> Result<Predecessor, String> {
        let began = ids::now();
        let mut none_since = began;
        loop {
            let failure = match door::knock(config) {
                Ok(stream) => match hear(&stream, heritage) {
                    Ok(hello) => return Ok(Predecessor::take(heritage, hello, stream)),
                    // A reset where it had not read the knock (unix(7)).
                    Err(failure)
                        if matches!(failure.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) =>
                    {
                        // It may have been busy for long with another that takes over, and that one is to be found.
                        none_since = ids::now();
                        "--upgrade: the running process went, or handed over to another just now; try again".to_owned()
                    }
                    Err(failure) => {
                        return Err(format!("--upgrade: the running process does not hand over: {failure}"));
                    }
                },
                Err(Unheard::Other(failure)) => return Err(failure),
                Err(Unheard::Nobody(failure)) => failure,
            };
            let now = ids::now();
            let (none, in_all) = (now.saturating_duration_since(none_since), now.saturating_duration_since(began));
            if none >= FOUND_WITHIN || in_all >= LOOK_MAX {
                return Err(failure);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn take(heritage: &mut Heritage, hello: Hello, stream: StdUnixStream) -> Predecessor {
        heritage.secrets = Some(hello.secrets);
        heritage.generation = Some((hello.generation, hello.sha256));
        Predecessor { stream }
    }

    /// Says that everything is built, and takes the state over. From then on this process decides, and has to serve.
    /// `reloader` knows how endpoints are reached that the configuration no longer names.
    pub async fn take_over(self, running: &Arc<Running>, reloader: &Reloader) -> io::Result<Link> {
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
            let unnamed = |place: &Place| reloader.unnamed_target(dispatcher.name(), place);
            for (run, lease) in dispatcher.take_over(estate, &unnamed, now) {
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
            stopped: HashSet::new(),
            waiting: HashMap::new(),
            released: CancellationToken::new(),
        };
        Ok(link)
    }
}

/// Reads the first message, and the sockets with it.
fn hear(stream: &StdUnixStream, heritage: &mut Heritage) -> io::Result<Hello> {
    stream.set_read_timeout(Some(STEP_TIMEOUT))?;
    let mut head = [0; 4];
    let (count, handles) = inherit::receive_with_sockets(stream, &mut head)?;
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut reader = stream;
    reader.read_exact(&mut head[count..])?;
    let mut bytes = Vec::new();
    reader.take(length_of(head)? as u64).read_to_end(&mut bytes)?;
    let spoken: serde_json::Value = serde_json::from_slice(&bytes)?;
    if let Some(reason) = spoken["refused"].as_str() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
    }
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
    stopped: HashSet<RunId>,
    /// Exchanges of the old process that wait here.
    waiting: HashMap<(String, Ticket), (Option<RunId>, AbortHandle)>,
    released: CancellationToken,
}

impl Link {
    /// Cancelled when the old process accepts nothing any more and has closed the state's file.
    pub fn released(&self) -> CancellationToken {
        self.released.clone()
    }

    /// Answers the old process until it has gone. What it carries then ends, as unknown.
    pub async fn run(mut self) {
        let (found, mut waited) = channel::<Waited>();
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
            drains: HashMap::new(),
            found,
        };
        let mut stops = tokio::time::interval(STOPS_EVERY);
        stops.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // A lease is noted before the end of its run can be told.
                biased;
                Some(Waited { asked, placed }) = waited.recv() => {
                    desk.waiting.remove(&asked);
                    desk.leases.extend(placed);
                }
                message = told.recv() => match message {
                    Some(ToNew::Told(told)) => desk.take(told),
                    Some(ToNew::Released) => self.released.cancel(),
                    Some(ToNew::Estate(_)) => warn!("the old process gives its state twice"),
                    None => break,
                },
                _ = stops.tick() => {
                    desk.tell_stops();
                    desk.tell_drains();
                }
            }
        }
        reading.abort();
        writing.abort();
        self.released.cancel();
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
    stopped: HashSet<RunId>,
    waiting: HashMap<(String, Ticket), (Option<RunId>, AbortHandle)>,
    /// By service: up to which news of drains the old process knows them.
    drains: HashMap<String, u64>,
    found: mpsc::UnboundedSender<Waited>,
}

/// An exchange of the old process waits no longer.
struct Waited {
    asked: (String, Ticket),
    /// Where it was given a place for a run.
    placed: Option<(RunId, Lease)>,
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
                    dispatcher.adopt_name(run, &key, now);
                }
            }
            Told::Moved { service: _, run, endpoint } => {
                if let Some(lease) = self.leases.get_mut(&run) {
                    lease.was_moved(&endpoint, now);
                }
            }
            Told::Says { service, endpoint, drains } => {
                if let Some(dispatcher) = dispatcher(&self.running, &service) {
                    dispatcher.adopt_says(&endpoint, drains, now);
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
                let asked = key.clone();
                let task = tokio::spawn(async move {
                    let (answer, placed) = match wait(waiting).await {
                        Ok(placed) => {
                            (placed_answer(service, ticket, &placed), placed.lease.run_id().zip(Some(placed.lease)))
                        }
                        Err(refusal) => (Answer::Refused { service, ticket, refusal }, None),
                    };
                    // The lease first: what is told of its run comes after the answer.
                    let _ = found.send(Waited { asked, placed });
                    let _ = answers.send(answer);
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

    /// What drains here and what no more: that is cut there, too, or not.
    fn tell_drains(&mut self) {
        for service in &self.running.snapshot.load().services {
            let known = self.drains.get(&*service.name).copied().unwrap_or_default();
            let Some((news, drains)) = service.dispatcher.drains_since(known, ids::now()) else { continue };
            let service = service.name.to_string();
            self.drains.insert(service.clone(), news);
            let _ = self.answers.send(Answer::Drains { service, drains });
        }
    }

    fn tell_stops(&mut self) {
        self.stopped.retain(|run| self.leases.contains_key(run));
        for (run, lease) in &self.leases {
            let Some(outcome) = lease.stop().and_then(|stop| stop.outcome()) else { continue };
            if self.stopped.insert(*run) {
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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener as StdUnixListener;

    use super::*;
    use crate::control::handover::{Refused, frame};

    #[test]
    fn a_process_that_ends_after_long_with_the_knock_unread_is_not_the_last_that_is_asked() {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("longhaul.yaml");
        let door = StdUnixListener::bind_addr(&door::address(&config).unwrap()).unwrap();
        let processes = std::thread::spawn(move || {
            let ends = door.accept().unwrap().0;
            // The knock is there: closed now, the other side is told of a reset and not of an end.
            let peek = rustix::net::RecvFlags::PEEK;
            assert!(rustix::net::recv(&ends, &mut [0; 1][..], peek).unwrap().0 > 0);
            // As one does that is handing over to another: more than that is not waited for where nobody answers.
            std::thread::sleep(FOUND_WITHIN);
            drop(ends);
            let mut serves = door.accept().unwrap().0;
            serves.write_all(&frame(&Refused { refused: "not now".to_owned() }).unwrap()).unwrap();
        });
        let said = Predecessor::find(&mut Heritage::default(), &config).err().expect("nobody hands over");
        assert!(said.contains("not now"), "{said}");
        processes.join().unwrap();
    }
}
