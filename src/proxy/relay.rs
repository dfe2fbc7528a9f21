//! Step 9, stream: both directions of an exchange, as the bytes come, by one task that looks both ways.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::config;
use crate::error::{Code, ProxyError};
use crate::message::{Fields, ResponseHead};
use crate::orca::Report;
use crate::proxy::account::Record;
use crate::proxy::cut::{Heard, Hearing, Since};
use crate::proxy::edits;
use crate::proxy::forward;
use crate::proxy::heartbeat::Heartbeat;
use crate::proxy::observe::Observer;
use crate::proxy::peer::{Next, Peer, SourceFault};
use crate::proxy::timer::Timer;
use crate::proxy::upstream::{Unanswered, Upstream};
use crate::proxy::watch::Watching;
use crate::proxy::worker::Local;
use crate::snapshot::Service;
use crate::state::core::Finish;
use crate::state::dispatcher::Lease;
use crate::state::runs::Stop;
use crate::state::{Cut, RunOutcome, Target};
use crate::websocket;

/// Interim answers (1xx) of one exchange; more are an endpoint gone mad.
const INTERIM_ANSWERS_MAX: u32 = 64;

/// When readers of event streams that a drain has cut are to come again, in milliseconds: not all at once, and not before
/// there is somebody to take them.
const RETRY_MILLISECONDS_MIN: u64 = 1_000;
const RETRY_MILLISECONDS_MAX: u64 = 5_000;

/// What an idempotent request keeps of its body, so that it can be sent again.
const REPLAY_BYTES_MAX: usize = 64 * 1024;

/// One direction: a body on its way from one peer to the other.
pub struct Direction {
    /// HTTP/1.1 chunk framing passes as it is.
    pub raw: bool,
    pub observer: Observer,
    stage: Stage,
    trailers: Option<Box<Fields>>,
    /// Since the flag was last taken, bytes moved.
    moved: bool,
    /// The sink takes no more for now.
    blocked: bool,
    /// A copy of what was sent, where the request may have to be sent again; `None` where it can't be (any more).
    pub replay: Option<Box<Replay>>,
}

/// What was sent of a body.
#[derive(Default)]
pub struct Replay {
    body: Vec<u8>,
    trailers: Option<Fields>,
    /// What was sent is to be sent to a shadow, too.
    pub copies: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Flowing,
    Finishing,
    Done,
    /// The sink is gone; what the source still has is of no use.
    Stopped,
}

/// Why a direction can't go on.
pub enum PumpFault {
    Source(SourceFault),
    Sink(io::Error),
    OverLimit,
}

impl Direction {
    pub fn new(raw: bool, observer: Observer) -> Direction {
        Direction { raw, observer, stage: Stage::Flowing, trailers: None, moved: false, blocked: false, replay: None }
    }

    pub fn done(&self) -> bool {
        self.stage == Stage::Done
    }

    /// Nothing more will move.
    pub fn over(&self) -> bool {
        matches!(self.stage, Stage::Done | Stage::Stopped)
    }

    /// There is no body to move, only the end to mark.
    pub fn skip_body(&mut self) {
        self.stage = Stage::Finishing;
    }

    pub fn stop(&mut self) {
        self.stage = Stage::Stopped;
    }

    /// The body that was sent, where it was sent whole and is to be copied.
    pub fn take_copy(&mut self) -> Option<Vec<u8>> {
        let done = self.done();
        let replay = self.replay.as_mut().filter(|replay| replay.copies && done && replay.trailers.is_none())?;
        Some(std::mem::take(&mut replay.body))
    }

    /// Begins again from the start of the body, for another attempt; what was sent is given back to its source.
    pub fn restart(&mut self, from: &mut Peer) {
        if let Some(replay) = &mut self.replay {
            if !replay.body.is_empty() {
                from.put_back(Bytes::from(std::mem::take(&mut replay.body)));
            }
            if let Some(trailers) = replay.trailers.take() {
                from.put_back_trailers(Some(trailers));
            }
        }
        self.trailers = None;
        self.stage = Stage::Flowing;
        self.blocked = false;
    }
}

/// Moves what can be moved: one read, one write, and again, until the source has nothing or the sink takes nothing.
/// `came_in` is called with what was noticed before it goes out; `true`: the last byte is among it. The trailers are those
/// that have come.
pub fn poll_pump(
    from: &mut Peer,
    to: &mut Peer,
    direction: &mut Direction,
    context: &mut Context<'_>,
    mut came_in: impl FnMut(&mut Observer, bool, Option<&Fields>),
) -> Poll<Result<(), PumpFault>> {
    loop {
        match direction.stage {
            Stage::Done | Stage::Stopped => return Poll::Ready(Ok(())),
            Stage::Finishing => {
                direction.blocked = true;
                ready!(to.poll_finish(context, direction.raw, &mut direction.trailers)).map_err(PumpFault::Sink)?;
                direction.blocked = false;
                direction.stage = Stage::Done;
            }
            Stage::Flowing => match from.poll_next(context, direction.raw, &mut direction.observer) {
                Poll::Pending => {
                    // A head, or the end of a TLS record, must not wait for the next body bytes.
                    let was_blocked = direction.blocked;
                    direction.blocked = match to.poll_flush(context) {
                        Poll::Ready(Ok(())) => false,
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(PumpFault::Sink(error))),
                        Poll::Pending => true,
                    };
                    // The sink's reader has moved on: only from now on is silence the source's.
                    direction.moved |= was_blocked && !direction.blocked;
                    return Poll::Pending;
                }
                Poll::Ready(Err(fault)) => return Poll::Ready(Err(PumpFault::Source(fault))),
                Poll::Ready(Ok(Next::End(trailers))) => {
                    came_in(&mut direction.observer, true, trailers.as_ref());
                    if let Some(replay) = &mut direction.replay {
                        replay.trailers.clone_from(&trailers);
                    }
                    direction.trailers = trailers.map(Box::new);
                    direction.stage = Stage::Finishing;
                }
                Poll::Ready(Ok(Next::Bytes)) => {
                    came_in(&mut direction.observer, from.source_ended(), from.trailers());
                    if direction.observer.over_limit() {
                        return Poll::Ready(Err(PumpFault::OverLimit));
                    }
                    let count = match to.poll_write(context, from.held()) {
                        Poll::Pending => {
                            direction.blocked = true;
                            return Poll::Pending;
                        }
                        Poll::Ready(result) => result.map_err(PumpFault::Sink)?,
                    };
                    direction.blocked = false;
                    direction.moved = true;
                    if let Some(replay) = &mut direction.replay {
                        if replay.body.len() + count <= REPLAY_BYTES_MAX {
                            replay.body.extend_from_slice(&from.held()[..count]);
                        } else {
                            direction.replay = None;
                        }
                    }
                    from.consume(count);
                }
            },
        }
    }
}

/// The client's body: its end is told to whoever compares it.
fn request_came_in(observer: &mut Observer, ended: bool, _: Option<&Fields>) {
    if ended {
        observer.asked();
    }
}

/// How waiting for an answer ended.
pub enum Answer {
    Head(ResponseHead),
    /// No answer; what to tell the client if no other attempt is made.
    None(Unanswered),
    /// The client left, or broke its request off.
    ClientGone,
    /// The run was ended from elsewhere.
    Stopped(RunOutcome),
    /// The request itself can't be served.
    Refused(ProxyError),
}

/// Sends the request and waits for the answer's head; interim answers are passed on meanwhile.
pub async fn until_answer(
    client: &mut Peer,
    upstream: &mut Upstream,
    request: &mut Direction,
    (deadlines, cut, cuts, stop): (Deadlines, &Cut, u32, Option<&Arc<Stop>>),
    interim_passes: bool,
    goes_on: bool,
    timer: &mut Timer,
) -> Answer {
    let mut interim_answers = 0;
    let mut told = pin!(cut.told());
    let mut cut = Hearing::new(Since::new(cut, cuts), stop);
    poll_fn(|context| {
        // An answer that is recorded, or names a run that goes on, is wanted though its client is gone, which is seen once
        // it has begun.
        let is_gone = |client: &mut Peer, context: &mut Context<'_>| !goes_on && client.poll_gone(context).is_ready();
        if !request.over() {
            match poll_pump(client, &mut upstream.peer, request, context, request_came_in) {
                Poll::Pending if request.blocked && client.poll_left(goes_on, context).is_ready() => {
                    return Poll::Ready(Answer::ClientGone);
                }
                Poll::Ready(Ok(())) | Poll::Pending => {}
                Poll::Ready(Err(PumpFault::Sink(_))) => {
                    // The endpoint takes no more. It may have answered already; else the read tells what is wrong.
                    request.stop();
                }
                Poll::Ready(Err(PumpFault::OverLimit)) => return Poll::Ready(Answer::Refused(over_limit())),
                Poll::Ready(Err(PumpFault::Source(SourceFault::Malformed(reason)))) => {
                    return Poll::Ready(Answer::Refused(ProxyError::new(Code::BadRequest, reason)));
                }
                Poll::Ready(Err(PumpFault::Source(SourceFault::Cut(_)))) => return Poll::Ready(Answer::ClientGone),
            }
        }
        loop {
            match upstream.poll_response(context) {
                Poll::Ready(Ok(mut head)) if head.status.is_informational() && head.status.as_u16() != 101 => {
                    interim_answers += 1;
                    if interim_answers > INTERIM_ANSWERS_MAX {
                        let error =
                            ProxyError::new(Code::UpstreamReset, "the endpoint sends interim answers without end");
                        return Poll::Ready(Answer::None(Unanswered { unsent: false, connection_spent: false, error }));
                    }
                    if interim_passes {
                        edits::remove_own(&mut head.fields);
                        client.send_informational(&head);
                    }
                }
                Poll::Ready(Ok(head)) => return Poll::Ready(Answer::Head(head)),
                Poll::Ready(Err(_)) if request.over() && is_gone(client, context) => {
                    return Poll::Ready(Answer::ClientGone);
                }
                Poll::Ready(Err(unanswered)) => return Poll::Ready(Answer::None(unanswered)),
                Poll::Pending => break,
            }
        }
        // Behind the answer: where that is there, it is what became of the request.
        if request.over() && is_gone(client, context) {
            return Poll::Ready(Answer::ClientGone);
        }
        if let Poll::Ready(Err(_)) = client.poll_flush(context)
            && !goes_on
        {
            return Poll::Ready(Answer::ClientGone);
        }
        match cut.poll(told.as_mut(), context) {
            Poll::Ready(Heard::DrainOver) => {
                let error = ProxyError::new(Code::UpstreamReset, "the endpoint's drain has reached drain.timeout");
                return Poll::Ready(Answer::None(Unanswered { unsent: false, connection_spent: false, error }));
            }
            Poll::Ready(Heard::Stopped(outcome)) => return Poll::Ready(Answer::Stopped(outcome)),
            Poll::Pending => {}
        }
        timer.poll_passed(context, deadlines.before_answer()).map(|()| Answer::None(deadlines.missed_answer()))
    })
    .await
}

/// When waiting for an answer ends.
#[derive(Clone, Copy)]
pub struct Deadlines {
    pub first_byte: Instant,
    pub first_byte_timeout: Duration,
    pub run: Option<Instant>,
}

impl Deadlines {
    fn before_answer(&self) -> Instant {
        self.run.map_or(self.first_byte, |run| run.min(self.first_byte))
    }

    fn missed_answer(&self) -> Unanswered {
        let error = match self.run {
            Some(run) if run <= self.first_byte => run_timeout(),
            _ => ProxyError::new(
                Code::FirstByteTimeout,
                format!("the endpoint sent no answer within {:?} (timeouts.first_byte)", self.first_byte_timeout),
            ),
        };
        Unanswered { unsent: false, connection_spent: false, error }
    }
}

/// An exchange whose answer has begun.
pub struct Flow {
    pub upstream: Box<Upstream>,
    /// Given back with the endpoint's last byte.
    pub lease: Option<Lease>,
    pub target: Arc<Target>,
    /// [`crate::state::Cut::count`] when the endpoint was picked.
    pub cuts: u32,
    pub request: Direction,
    pub response: Direction,
    pub tunnel: bool,
    /// The answer is an event stream into which something can be put between events.
    pub takes_comments: bool,
    pub idle_milliseconds: u32,
    pub service: Local<Service>,
    /// Where anything is to happen at its time; most streams have nothing of it.
    pub timed: Option<Box<Timed>>,
    /// The run is to end with its exchange whatever its protocol says.
    pub cancels: bool,
    /// What becomes of the run if the answer comes whole; with its last byte, what became of it.
    pub finish: Finish,
    /// The endpoint lets its connection be used again.
    pub upstream_keep_alive: bool,
    /// The client was not told to close.
    pub client_keep_alive: bool,
    /// Only the end of the client's connection ends the answer.
    pub until_close: bool,
}

/// What is to happen to a stream at its time.
pub struct Timed {
    /// When its run has to be over.
    pub run_deadline: Option<Instant>,
    /// Where the configuration asks for them and the answer is a stream of events.
    pub heartbeat: Option<Heartbeat>,
}

/// How an exchange ended whose answer had begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The answer went out whole.
    Whole,
    /// The client left.
    ClientGone,
    /// The endpoint broke off, fell silent, or sent nonsense.
    Truncated,
    /// The endpoint's drain took as long as it may.
    DrainOver,
    /// The proxy's own did.
    ProxyOver,
    /// The run was ended from elsewhere.
    Stopped(RunOutcome),
    /// It took longer than it may.
    TimedOut(Code),
    /// The rest of the request can't be served.
    Refused(Code),
}

/// Relays until both bodies have ended or one side is gone.
pub async fn stream(client: &mut Peer, flow: &mut Flow, timer: &mut Timer) -> End {
    // Short answers usually are there whole: nothing is to be waited for.
    if let Poll::Ready(end) = poll_fn(|context| Poll::Ready(poll_both(client, flow, context))).await {
        return end;
    }
    let mut last_moved = crate::ids::now();
    let target = flow.target.clone();
    let mut told = pin!(target.cut.told());
    let since = Since::new(&target.cut, flow.cuts);
    let mut cut = Hearing::new(since, flow.lease.as_ref().and_then(Lease::stop));
    poll_fn(|context| {
        let end = poll_both(client, flow, context);
        let answered = std::mem::take(&mut flow.response.moved);
        if std::mem::take(&mut flow.request.moved) | answered {
            last_moved = crate::ids::now();
        }
        if answered && let Some(heartbeat) = flow.heartbeat() {
            heartbeat.put_off(last_moved);
        }
        if end.is_ready() {
            return end;
        }
        // What the endpoint has finished is only on its way to the client.
        if flow.lease.is_some() {
            match cut.poll(told.as_mut(), context) {
                Poll::Ready(Heard::DrainOver) => return Poll::Ready(End::DrainOver),
                Poll::Ready(Heard::Stopped(outcome)) => return Poll::Ready(End::Stopped(outcome)),
                Poll::Pending => {}
            }
        }
        flow.poll_time_outs(client, last_moved, timer, context)
    })
    .await
}

fn poll_both(client: &mut Peer, flow: &mut Flow, context: &mut Context<'_>) -> Poll<End> {
    if !flow.request.over() {
        match poll_pump(client, &mut flow.upstream.peer, &mut flow.request, context, request_came_in) {
            Poll::Pending => {
                if flow.request.blocked && client.poll_left(flow.is_wanted_without_client(), context).is_ready() {
                    return Poll::Ready(End::ClientGone);
                }
            }
            // A tunnel has ended when one of its sides has.
            Poll::Ready(Ok(())) if flow.tunnel => return Poll::Ready(End::ClientGone),
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(PumpFault::Sink(_))) => flow.request.stop(),
            Poll::Ready(Err(PumpFault::OverLimit)) => return Poll::Ready(End::Refused(Code::BodyTooLarge)),
            Poll::Ready(Err(PumpFault::Source(SourceFault::Malformed(_)))) => {
                return Poll::Ready(End::Refused(Code::BadRequest));
            }
            Poll::Ready(Err(PumpFault::Source(SourceFault::Cut(_)))) => return Poll::Ready(End::ClientGone),
        }
    }
    if let Some(heartbeat) = flow.heartbeat() {
        match heartbeat.poll_write(client, context) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(_)) => return Poll::Ready(End::ClientGone),
            // Whoever does not take the comment takes nothing behind it either.
            Poll::Pending => return Poll::Pending,
        }
    }
    let Flow { upstream, response, lease, finish, .. } = flow;
    // Whoever has read an id can use it, and whoever has read the whole answer finds the run ended.
    let came_in = |observer: &mut Observer, ended: bool, trailers: Option<&Fields>| {
        if let Some(holder) = lease {
            if let Some(report) = trailers.and_then(Report::read) {
                holder.reported_load(&report, crate::ids::now());
            }
            if let Some(told) = observer.tell(holder, ended) {
                *finish = told;
            }
            if ended {
                give_back(lease, *finish);
            }
        }
    };
    match poll_pump(&mut upstream.peer, client, response, context, came_in) {
        Poll::Ready(Ok(())) => return Poll::Ready(End::Whole),
        Poll::Ready(Err(PumpFault::Sink(_))) => return Poll::Ready(End::ClientGone),
        Poll::Ready(Err(PumpFault::Source(_) | PumpFault::OverLimit)) => return Poll::Ready(End::Truncated),
        Poll::Pending => {}
    }
    if flow.request.over() && !flow.tunnel && client.poll_gone(context).is_ready() {
        return Poll::Ready(End::ClientGone);
    }
    Poll::Pending
}

impl Flow {
    /// Gives the endpoint's slot back, and says how the run ended.
    pub fn give_back(&mut self, end: End) -> Finish {
        if let Some(lease) = &mut self.lease {
            let cancels = self.cancels || self.service.config.runs.on_disconnect == config::OnDisconnect::Cancel;
            self.finish = judge(end, cancels, self.response.observer.watching_mut(), lease);
        }
        give_back(&mut self.lease, self.finish);
        self.finish
    }

    pub fn heartbeat(&mut self) -> Option<&mut Heartbeat> {
        self.timed.as_mut()?.heartbeat.as_mut()
    }

    /// What the client sent before it left is to reach the endpoint: its run may go on, or it is a tunnel, whose bytes
    /// mean something by themselves.
    fn is_wanted_without_client(&self) -> bool {
        let observer = &self.response.observer;
        self.tunnel
            || observer.is_recorded()
            || observer.watching().is_some_and(Watching::goes_on)
            || matches!(self.service.config.runs.on_disconnect, config::OnDisconnect::Continue(_))
    }

    fn poll_time_outs(
        &mut self,
        client: &mut Peer,
        last_moved: Instant,
        timer: &mut Timer,
        context: &mut Context<'_>,
    ) -> Poll<End> {
        let mut since = last_moved;
        loop {
            let idle = since + Duration::from_millis(u64::from(self.idle_milliseconds));
            let run_deadline = self.timed.as_ref().and_then(|timed| timed.run_deadline);
            let over = run_deadline.map_or(idle, |run| run.min(idle));
            let beat = self.heartbeat().map_or(over, |heartbeat| heartbeat.due());
            ready!(timer.poll_passed(context, beat.min(over)));
            if beat < over {
                if ready!(self.poll_beat(client, context)).is_err() {
                    return Poll::Ready(End::ClientGone);
                }
                continue;
            }
            if run_deadline.is_some_and(|run| run <= over) {
                return Poll::Ready(End::TimedOut(Code::RunTimeout));
            }
            if !self.response.blocked {
                return Poll::Ready(End::Truncated);
            }
            // The client holds back: that silence is not the endpoint's.
            since = crate::ids::now();
        }
    }

    /// Breaks the silence, where that can be done: between two events, and between two chunks where these pass as they are.
    fn poll_beat(&mut self, client: &mut Peer, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(heartbeat) = self.timed.as_mut().and_then(|timed| timed.heartbeat.as_mut()) else {
            return Poll::Ready(Ok(()));
        };
        if !is_between_events(&self.response, &self.upstream.peer) {
            heartbeat.put_off(crate::ids::now());
            return Poll::Ready(Ok(()));
        }
        heartbeat.begin(crate::ids::now());
        heartbeat.poll_write(client, context)
    }

    /// The last word to a client whose answer is about to be cut at the end of a drain, where the answer leaves room for
    /// one: an event stream's reader is told when to come again, a WebSocket's that the server goes away.
    pub fn last_word(&self, end: End) -> Option<Vec<u8>> {
        if !matches!(end, End::DrainOver | End::ProxyOver) || self.response.blocked {
            return None;
        }
        let source = &self.upstream.peer;
        if self.tunnel {
            let may = source.held().is_empty() && self.response.observer.between_frames();
            return may.then(|| websocket::GOING_AWAY.to_vec());
        }
        let is_at_rest = |timed: &Timed| timed.heartbeat.as_ref().is_none_or(Heartbeat::is_at_rest);
        let may = self.takes_comments
            && self.timed.as_deref().is_none_or(is_at_rest)
            && is_between_events(&self.response, source);
        may.then(|| {
            let retry =
                RETRY_MILLISECONDS_MIN + crate::ids::random_u64() % (RETRY_MILLISECONDS_MAX - RETRY_MILLISECONDS_MIN);
            // A block without data is no event; it only sets the time (WHATWG HTML section 9.2.6).
            let block = format!("retry: {retry}\n\n");
            if self.response.raw { format!("{:x}\r\n{block}\r\n", block.len()) } else { block }.into_bytes()
        })
    }

    /// Puts what was counted into the exchange's record.
    pub fn tell(&self, record: &mut Record) {
        record.first_event_at = self.response.observer.first_event_at;
        record.events = self.response.observer.events;
        record.bytes_in = self.request.observer.bytes;
        record.bytes_out = self.response.observer.bytes;
    }
}

/// Nothing of an event has passed, nor, where chunks pass as they are, of a chunk.
fn is_between_events(response: &Direction, source: &Peer) -> bool {
    !response.blocked
        && source.held().is_empty()
        && (!response.raw || source.is_between_chunks())
        && response.observer.between_events()
}

fn give_back(lease: &mut Option<Lease>, finish: Finish) {
    if let Some(mut lease) = lease.take() {
        lease.finish(finish);
    }
}

/// What becomes of a run whose exchange has ended before the endpoint's last byte.
fn judge(end: End, cancels: bool, watching: Option<&mut Watching>, lease: &mut Lease) -> Finish {
    if matches!(end, End::DrainOver | End::ProxyOver) {
        lease.keep_from_judge();
    }
    let outcome = match end {
        End::ClientGone | End::Refused(_) => RunOutcome::Cancelled,
        End::TimedOut(_) => RunOutcome::TimedOut,
        End::Whole | End::Truncated | End::DrainOver | End::ProxyOver => RunOutcome::Truncated,
        // Whoever ended it has seen to the rest.
        End::Stopped(_) => return Finish::Left,
    };
    let Some(watching) = watching else { return Finish::Ended(outcome) };
    let finish = watching.broken_off(outcome, lease);
    match (finish, end) {
        (Finish::Left, End::ClientGone) if cancels => forward::cancel_soon(lease),
        (Finish::Left, End::DrainOver) => Finish::Ended(outcome),
        (finish, _) => finish,
    }
}

pub fn over_limit() -> ProxyError {
    ProxyError::new(Code::BodyTooLarge, "the request body exceeds limits.max_body_bytes")
}

fn run_timeout() -> ProxyError {
    ProxyError::new(Code::RunTimeout, "the run exceeded runs.max_duration")
}
