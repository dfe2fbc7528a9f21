//! Steps 5 to 8, forward: who asks, where it goes, and attempts until an endpoint has answered.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::Method;

use crate::config::{self, Affinity, HttpVersion};
use crate::error::{Code, ProxyError};
use crate::ids;
use crate::message::{Framing, RequestHead, ResponseHead, Version};
use crate::net::cookie::CookieSession;
use crate::orca::Report;
use crate::proxy::account::{CallerForm, Record};
use crate::proxy::connection::Connection;
use crate::proxy::heartbeat::Heartbeat;
use crate::proxy::identify::{self, Identity};
use crate::proxy::learn::Learn;
use crate::proxy::observe::Observer;
use crate::proxy::peer::{Peer, SourceFault};
use crate::proxy::pick::{self, Found, Wanted};
use crate::proxy::relay::{self, Answer, Deadlines, Direction, Flow, Timed};
use crate::proxy::repeat::{self, Kept, Replayed, Way};
use crate::proxy::rewrite::{self, Place};
use crate::proxy::timer::Timer;
use crate::proxy::upstream::{self, Unanswered, Upstream};
use crate::proxy::watch::{self, Watching};
use crate::proxy::worker::Local;
use crate::proxy::{Caller, edits, forwarded, in_place, may_keep_alive, respond, shadow, websocket, whose_error};
use crate::snapshot::{Listener, Service};
use crate::state::core::Finish;
use crate::state::dispatcher::{Lease, Placed};
use crate::state::runs::Stop;
use crate::state::sessions::SessionKey;
use crate::state::{AffinityOutcome, Evidence, Kind, Refusal, RunOutcome, Target};

/// What is asked for, beside the request itself.
pub struct Asked<'a> {
    pub connection: &'a Connection,
    pub listener: &'a Listener,
    pub service: &'a Local<Service>,
    pub route: &'a config::Route,
    pub outside: &'a forwarded::Outside,
    /// What it does if its session has a run.
    pub policy: config::Policy,
    pub caller: &'a Caller,
}

pub enum Forwarded {
    Streaming(Box<Flow>),
    /// It was answered with the answer to an earlier start.
    Replayed(Replayed),
    ClientGone,
}

/// Picks an endpoint, sends the request there, tries again where that is safe, and begins the answer.
pub async fn forward(
    asked: Asked<'_>,
    client: &mut Peer,
    mut request: Box<RequestHead>,
    timer: &mut Timer,
    record: &mut Record,
) -> Result<Forwarded, ProxyError> {
    let Asked { connection, listener, service, route, caller, .. } = asked;
    let body_bytes_max = listener.config.limits.max_body_bytes;
    let prefix = route.strip_prefix.as_deref();
    if matches!(request.framing, Framing::Length(length) if length > body_bytes_max) {
        record.caller_form = form_by_head(service, prefix, &request);
        return Err(relay::over_limit());
    }

    // 5 identify
    let mut observer = Observer::up_to(body_bytes_max);
    let secret = &connection.worker.running.scope_secret;
    let mut identity = {
        let (head, sought) = identify::Head::read(service, prefix, secret, &request);
        let found = match sought {
            None => Ok(None),
            // Boxed, so that an exchange that its head tells all of does not make room for it.
            Some(sought) => Box::pin(identify::look_ahead(sought, &mut request, client, &mut observer, timer)).await,
        };
        match found {
            Ok(found) => head.identity(service, prefix, &request, found.as_ref()),
            Err(SourceFault::Cut(_)) => return Ok(Forwarded::ClientGone),
            Err(SourceFault::Malformed(reason)) => {
                record.caller_form = form_by_head(service, prefix, &request);
                return Err(ProxyError::new(Code::BadRequest, reason));
            }
        }
    };
    record.session = identity.key.clone();
    record.starts = identity.kind == Kind::Start;
    let about = watch::about(identity.recognised.as_ref());
    if let Some(recognised) = &mut identity.recognised {
        let rpc_id = recognised.rpc_id.take();
        record.caller_form = recognised.protocol.map(|protocol| Box::new(CallerForm { protocol, rpc_id }));
    }

    let kept = match repeat::way(service, prefix, &request, &identity) {
        Ok(Way::Usual) => None,
        Ok(Way::First(kept)) => {
            // All that was read of the body waits in front.
            observer.compare(repeat::Asked::new(Rc::clone(&kept), client.held()));
            Some(kept)
        }
        Ok(Way::Again(run, reader)) => {
            record.run = Some(run);
            record.starts = false;
            let replaying = repeat::replay(reader, connection, client, caller, observer, timer, record);
            let replayed = Box::pin(replaying).await?;
            return Ok(Forwarded::Replayed(replayed));
        }
        Err((error, run)) => {
            record.run = run;
            record.starts = false;
            return Err(error);
        }
    };

    if identity.kind == Kind::Start && caller.knew_better {
        service.dispatcher.rejected();
        record.outcome = Some(RunOutcome::Rejected);
        let detail = "the proxy is ending, and has told this connection to close: start the run on another connection";
        return Err(ProxyError::new(Code::Draining, detail));
    }

    // 6 turn, 7 pick
    let id = kept.as_ref().map(|kept| kept.run());
    let wanted = Wanted { service, policy: asked.policy, request: &request, identity: &identity, about: &about, id };
    let found = pick::pick(wanted, client, timer, record).await?;
    let Found::Placed(Placed { mut target, affinity, mut lease }) = found else { return Ok(Forwarded::ClientGone) };
    // Such a run has begun at its endpoint, or will, whoever leaves: only the answer says by which name it can be asked about.
    let outlives = about.goes_on && identity.kind == Kind::Start;
    let mut watching = Watching::new(identity.recognised.as_mut(), about, identity.scope);
    let mut cuts = target.cut.count();
    record.affinity = affinity;
    record.run = lease.run_id();
    record.target = Some(target.clone());

    // 8 forward
    prepare(&mut request, route, service, record, caller)?;
    let mut direction = Direction::new(false, observer);
    let idempotent =
        matches!(request.method, Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE);
    // An HTTP/2 endpoint can leave any request unprocessed after it was sent, and says so.
    let may_be_refused = match target.http {
        HttpVersion::Http1 => false,
        HttpVersion::Http2 => true,
        HttpVersion::Auto => target.tls.is_some(),
    };
    if (idempotent || may_be_refused)
        && service.config.attempts > 1
        && request.framing != Framing::None
        && request.upgrade.is_none()
    {
        direction.replay = Some(Box::default());
    }
    if shadow::is_due(service, &identity, &request, &target) {
        direction.replay.get_or_insert_default().copies = true;
    }
    let dispatched = ids::now();
    let timeouts = &service.config.timeouts;
    let overrides = &route.timeouts;
    let first_byte_timeout = overrides.first_byte.unwrap_or(timeouts.first_byte);
    let deadlines = Deadlines {
        first_byte: dispatched + first_byte_timeout,
        first_byte_timeout,
        run: service.config.runs.max_duration.filter(|_| identity.kind == Kind::Start).map(|max| dispatched + max),
    };
    let connect_timeout = overrides.connect.unwrap_or(timeouts.connect);
    let mut attempt = 1;
    let mut fresh = false;
    let mut exchange = None;
    let mut answer = loop {
        let tried = try_once(
            Attempt {
                asked: &asked,
                target: &target,
                cuts,
                stop: lease.stop(),
                deadlines,
                connect_timeout,
                fresh,
                goes_on: kept.is_some(),
                outlives,
                begun: record.begun,
            },
            client,
            &mut request,
            &mut direction,
            &mut exchange,
            timer,
        )
        .await;
        if !matches!(tried, Tried::Answered(_)) {
            // Its connection is closed before its place is given on.
            exchange = None;
        }
        let unanswered = match tried {
            Tried::Answered(answer) => break answer,
            Tried::ClientGone => {
                let finish = gone_before_answer(service, watching.as_deref_mut(), &mut lease);
                record.ended(finish);
                lease.finish(finish);
                return Ok(Forwarded::ClientGone);
            }
            Tried::Stopped(outcome) => {
                lease.finish(Finish::Left);
                record.ended(Finish::Ended(outcome));
                return Err(ProxyError::new(watch::code_of_stop(outcome), "the run was ended before it was answered"));
            }
            Tried::Refused(error) => {
                lease.outcome(RunOutcome::Cancelled);
                record.ended(Finish::Ended(RunOutcome::Cancelled));
                return Err(error);
            }
            Tried::Unanswered { unanswered, reused } => {
                fresh = reused;
                unanswered
            }
        };
        // Neither that our own bound on connections is reached nor that we cut it says anything of the endpoint.
        let drain_over = target.cut.count() != cuts;
        if !drain_over && !unanswered.connection_spent && unanswered.error.code != Code::Overloaded {
            lease.report(Evidence::Bad, ids::now());
        }
        let timed_out = matches!(unanswered.error.code, Code::FirstByteTimeout | Code::RunTimeout);
        let whole = ahead_only(client, &direction) || direction.replay.is_some();
        let repeatable = idempotent && !drain_over && unanswered.error.code == Code::UpstreamReset;
        let may_retry = attempt < service.config.attempts && !timed_out && whole && (unanswered.unsent || repeatable);
        let next = if !may_retry {
            None
        } else if unanswered.connection_spent {
            Some(target.clone())
        } else {
            // Where there is no other endpoint, a kept connection that broke may have been at its end: a new one is tried. So
            // it is with what may be asked twice of anyone.
            match lease.retry(ids::now(), ids::random_u64()) {
                Ok(other) => Some(other),
                Err(Refusal::NoEndpoint | Refusal::QueueFull) => (fresh || repeatable).then(|| target.clone()),
                // Its session is elsewhere by now, or its run was ended.
                Err(_) => None,
            }
        };
        if let Some(next) = next {
            attempt += 1;
            direction.restart(client);
            target = next;
            cuts = target.cut.count();
            record.target = Some(target.clone());
            continue;
        }
        let outcome = if timed_out { RunOutcome::TimedOut } else { RunOutcome::Failed };
        lease.outcome(outcome);
        record.ended(Finish::Ended(outcome));
        let error = unanswered.error;
        return Err(if drain_over { whose_error(error, &connection.worker.running) } else { error });
    };

    let mut upstream = exchange.expect("whoever was answered has an exchange");
    let outside =
        Place { scheme: asked.outside.scheme, authority: asked.outside.authority(&request.authority), prefix };
    let ahead = rewrite::ahead(
        identity.recognised.as_ref(),
        service.recognition,
        &outside,
        &request,
        &target.url,
        &mut answer,
        &mut upstream.peer,
        timer,
    )
    .await;

    begin_answer(
        asked,
        client,
        &request,
        &identity,
        watching,
        kept,
        lease,
        (target, cuts),
        upstream,
        direction,
        &mut answer,
        ahead,
        deadlines,
        record,
    )
}

/// The form of errors of whoever sent a request with this head.
fn form_by_head(service: &Service, prefix: Option<&str>, request: &RequestHead) -> Option<Box<CallerForm>> {
    let protocol = identify::protocol_by_head(service, prefix, request)?;
    Some(Box::new(CallerForm { protocol, rpc_id: None }))
}

/// Nothing of the body was given to an endpoint: all that came in waits in front.
fn ahead_only(client: &Peer, direction: &Direction) -> bool {
    client.held().len() as u64 == direction.observer.bytes
}

/// Makes the request the one that the endpoint is to see, whichever endpoint that will be.
fn prepare(
    request: &mut RequestHead,
    route: &config::Route,
    service: &Service,
    record: &Record,
    caller: &Caller,
) -> Result<(), ProxyError> {
    if let Some(sealer) = &service.cookie {
        sealer.strip(&mut request.fields);
    }
    if let Some(prefix) = &route.strip_prefix
        && let Some(stripped) = edits::strip_prefix(&request.path, prefix)
    {
        request.path = stripped.to_owned();
    }
    edits::apply(&route.request_headers, &mut request.fields);
    if let Some(run) = record.run {
        let mut text = [0; 36];
        run.write(&mut text);
        request.fields.set("longhaul-run-id", &text);
    }
    if caller.version == Version::Http2
        && let Some(protocol) = &request.upgrade
    {
        if protocol != "websocket" {
            return Err(ProxyError::new(Code::BadRequest, "extended CONNECT is served for websocket only (RFC 8441)"));
        }
        websocket::add_key(&mut request.fields, &ids::random_bytes());
    }
    Ok(())
}

struct Attempt<'a> {
    asked: &'a Asked<'a>,
    target: &'a Arc<Target>,
    /// [`crate::state::Cut::count`] when it was picked.
    cuts: u32,
    /// Of the run, where there is one.
    stop: Option<&'a Arc<Stop>>,
    deadlines: Deadlines,
    connect_timeout: Duration,
    /// No kept connection is to be used: one has just turned out to be broken.
    fresh: bool,
    /// The answer is wanted though its client may leave.
    goes_on: bool,
    /// So it is of a run that goes on at its endpoint whoever leaves: where its client left is no reason not to begin it.
    outlives: bool,
    /// Its stream was begun while it waited.
    begun: bool,
}

enum Tried {
    /// The exchange that answered is there.
    Answered(ResponseHead),
    /// `reused`: on a kept connection.
    Unanswered {
        unanswered: Unanswered,
        reused: bool,
    },
    ClientGone,
    /// The run was ended from elsewhere.
    Stopped(RunOutcome),
    Refused(ProxyError),
}

impl Tried {
    /// No answer, on a connection that was opened for this attempt.
    fn in_vain(unanswered: Unanswered) -> Tried {
        Tried::Unanswered { unanswered, reused: false }
    }
}

async fn try_once(
    attempt: Attempt<'_>,
    client: &mut Peer,
    request: &mut RequestHead,
    direction: &mut Direction,
    exchange: &mut Option<Box<Upstream>>,
    timer: &mut Timer,
) -> Tried {
    let Attempt { asked, target, cuts, stop, deadlines, connect_timeout, fresh, goes_on, outlives, begun } = attempt;
    let pool = &asked.connection.worker.pool;
    let kept = if fresh { None } else { upstream::pooled(pool, target) };
    let connected = match kept {
        Some(connected) => connected,
        None => {
            // Boxed, so that an exchange on a kept connection does not make room for it.
            let connecting = Box::pin(upstream::connect(pool, target, connect_timeout));
            match unless_gone(client, goes_on || outlives, connecting).await {
                None => return Tried::ClientGone,
                Some(Ok(connected)) => connected,
                Some(Err(error)) => {
                    return Tried::in_vain(Unanswered { unsent: true, connection_spent: false, error });
                }
            }
        }
    };
    let http1 = matches!(connected, upstream::Connected::Http1 { .. });
    // Once any of the body was looked at, the client's own chunk framing is lost.
    let untouched = client.is_between_chunks() && direction.observer.bytes == 0;
    direction.raw = http1 && untouched && direction.replay.is_none();
    if !http1 && request.upgrade.is_some() {
        // Not the endpoint's failure: clients must not be able to have it ejected.
        let error = ProxyError::new(Code::UpstreamReset, "this endpoint speaks HTTP/2, over which no Upgrade is sent");
        return Tried::Refused(error);
    }
    if request.upgrade.is_some() && !client.is_http1() {
        // What an HTTP/2 client sends on its CONNECT belongs to the tunnel, which the endpoint may yet refuse.
        direction.skip_body();
    }
    let interim_passes = asked.caller.version != Version::Http10 && !begun;
    if !http1 && request.expect_continue {
        // Towards an HTTP/2 endpoint nobody would wait for the word: we say it.
        request.expect_continue = false;
        client.send_continue();
    }
    // Edits of the version are the target's own, so they are undone for the next attempt by starting from the same head.
    let edited;
    let head = if target.headers.set.is_empty() && target.headers.remove.is_empty() {
        &*request
    } else {
        let mut copy = Box::new(request.clone());
        edits::apply(&target.headers, &mut copy.fields);
        edited = copy;
        &edited
    };
    let host = edits::host_for(&target.host, &request.authority, &target.url);
    let upstream = match Upstream::begin(connected, head, &host, target.tls.is_some(), direction.raw).await {
        Ok(upstream) => exchange.insert(upstream),
        // A request that HTTP/2 can't carry is no fault of the endpoint.
        Err(unanswered) if unanswered.error.code == Code::BadRequest => return Tried::Refused(unanswered.error),
        Err(unanswered) => return Tried::in_vain(unanswered),
    };
    match relay::until_answer(
        client,
        upstream,
        direction,
        (deadlines, &target.cut, cuts, stop),
        interim_passes,
        goes_on || outlives,
        timer,
    )
    .await
    {
        Answer::Head(head) => Tried::Answered(head),
        Answer::None(unanswered) => Tried::Unanswered { unanswered, reused: upstream.reused },
        Answer::ClientGone => Tried::ClientGone,
        Answer::Stopped(outcome) => Tried::Stopped(outcome),
        Answer::Refused(error) => Tried::Refused(error),
    }
}

/// Awaits, unless the client leaves meanwhile.
async fn unless_gone<T>(client: &mut Peer, goes_on: bool, mut future: Pin<Box<impl Future<Output = T>>>) -> Option<T> {
    if goes_on && client.source_ended() {
        return Some(future.await);
    }
    poll_fn(|context| {
        if let Poll::Ready(value) = future.as_mut().poll(context) {
            return Poll::Ready(Some(value));
        }
        client.poll_left(goes_on, context).map(|()| None)
    })
    .await
}

/// What becomes of a run whose client leaves before it has been answered.
fn gone_before_answer(service: &Service, watching: Option<&mut Watching>, lease: &mut Lease) -> Finish {
    let Some(watching) = watching else { return Finish::Ended(RunOutcome::Cancelled) };
    match watching.broken_off(RunOutcome::Cancelled, lease) {
        Finish::Left if service.config.runs.on_disconnect == config::OnDisconnect::Cancel => cancel_soon(lease),
        finish => finish,
    }
}

/// The run is to end with its exchange though its protocol lets it go on.
pub fn cancel_soon(lease: &mut Lease) -> Finish {
    if lease.cancel_soon(ids::now()) { Finish::Left } else { Finish::Ended(RunOutcome::Cancelled) }
}

/// The endpoint has answered: what it says of itself and of the session is noted, and the answer begun.
#[expect(clippy::too_many_arguments, reason = "the end of one long step, split off only to be read by itself")]
fn begin_answer(
    asked: Asked<'_>,
    client: &mut Peer,
    request: &RequestHead,
    identity: &Identity,
    mut watching: Option<Box<Watching>>,
    kept: Option<Rc<Kept>>,
    mut lease: Lease,
    (target, cuts): (Arc<Target>, u32),
    // Behind the lease, so that on every way out the connection is closed before its place is given on.
    mut upstream: Box<Upstream>,
    direction: Direction,
    answer: &mut ResponseHead,
    ahead: Option<Bytes>,
    deadlines: Deadlines,
    record: &mut Record,
) -> Result<Forwarded, ProxyError> {
    let Asked { connection, service, route, caller, .. } = asked;
    let status = answer.status.as_u16();
    let now = ids::now();
    if status >= 500 {
        lease.report(Evidence::Bad, now);
    } else if target.needs_good_evidence() {
        lease.report(Evidence::Good, now);
    }
    let outcome = if status >= 500 { RunOutcome::Failed } else { RunOutcome::Completed };
    let success = status < 400;
    if (400..500).contains(&status) {
        lease.keep_from_judge();
    }
    let tunnel = status == 101;
    let is_event_stream = is_event_stream(answer);
    if record.begun && (status != 200 || !is_event_stream || answer.fields.contains("content-encoding")) {
        lease.outcome(outcome);
        record.ended(Finish::Ended(outcome));
        let detail = format!("the endpoint answered {status}, and no event stream, when the wait was over");
        return Err(ProxyError::new(Code::UpstreamReset, detail));
    }
    if tunnel && !direction.done() {
        lease.outcome(RunOutcome::Failed);
        record.ended(Finish::Ended(RunOutcome::Failed));
        let detail = "the endpoint switched protocols before the request had ended (RFC 9110 section 7.8)";
        return Err(ProxyError::new(Code::UpstreamReset, detail));
    }
    if tunnel {
        websocket::check_switch(request, answer, caller.version).map_err(|reason| {
            lease.outcome(RunOutcome::Failed);
            record.ended(Finish::Ended(RunOutcome::Failed));
            ProxyError::new(Code::UpstreamReset, reason)
        })?;
    }

    if let Some(report) = Report::read(&answer.fields) {
        lease.reported_load(&report, now);
    }

    // The session: confirmed, learned, told to the client.
    let mut learn = None;
    if success {
        lease.confirm(now);
        if service.config.session.affinity != Affinity::None {
            match identify::learned_from_head(&service.config.session, answer) {
                Some(text) => lease.learn(SessionKey { scope: identity.scope, text: text.into() }, now),
                None => learn = expect_learning(&service.config.session, answer, identity),
            }
        }
    }
    if let Some(watching) = &mut watching {
        watching.head(status, &answer.fields, &mut lease);
    }
    let mut response_observer = Observer::of_answer(learn, watching, kept.clone());
    if is_event_stream {
        response_observer.expect_events();
    }
    let untouched = ahead.is_none();
    if let Some(ahead) = ahead {
        response_observer.observe(&ahead);
        upstream.peer.put_back(ahead);
    }

    // The answer's head as the client is to see it.
    if let Some(drains) = edits::remove_own(&mut answer.fields) {
        lease.endpoint_drains(drains, now);
    }
    if let Some(prefix) = &route.strip_prefix {
        let sent_host = edits::host_for(&target.host, &request.authority, &target.url);
        edits::rewrite_answer(
            &mut answer.fields,
            &edits::PrefixRewrite {
                prefix,
                scheme: asked.outside.scheme,
                authority: asked.outside.authority(&request.authority),
                sent_host: &String::from_utf8_lossy(&sent_host),
                endpoint: &target.url,
            },
        );
    }
    edits::apply(&route.response_headers, &mut answer.fields);
    answer.fields.append("longhaul-affinity", record.affinity.as_str().as_bytes());
    if let Some(run) = record.run {
        let mut text = [0; 36];
        run.write(&mut text);
        answer.fields.append("longhaul-run-id", &text);
    }
    if success
        && let Some(cookie) =
            cookie_to_set(asked.service, identity, &target, record.affinity, asked.outside.scheme == "https")
    {
        answer.fields.append("set-cookie", cookie.as_bytes());
    }
    record.status = status;
    if let Some(kept) = &kept {
        kept.head(answer);
    }
    // Who repeats this start may not have asked for them.
    record.add_debug_fields(&mut answer.fields);

    // Both bodies.
    let upstream_keep_alive = answer.keep_alive;
    let from_http1 = upstream.peer.is_http1();
    let raw = tunnel
        || (untouched
            && !record.begun
            && from_http1
            && client.is_http1()
            && answer.framing == Framing::Chunked
            && caller.version == Version::Http11);
    let mut request_direction = direction;
    let bodiless = matches!(answer.framing, Framing::None | Framing::Length(0)) && !tunnel;
    let client_keep_alive = may_keep_alive(connection, client, caller) && answer.framing != Framing::Eof && !tunnel;
    let eof_framed = caller.version == Version::Http10 && answer.framing == Framing::Chunked;
    // The head of a stream that was begun in the queue has said that the connection closes.
    let client_keep_alive = client_keep_alive && !eof_framed && !record.begun;
    let until_close = client.is_http1() && (eof_framed || answer.framing == Framing::Eof) && !tunnel;
    let takes_comments = is_event_stream
        && matches!(answer.framing, Framing::Chunked | Framing::Eof)
        && !answer.fields.contains("content-encoding");
    let heartbeat = service.config.runs.heartbeat.filter(|_| takes_comments);
    let heartbeat = heartbeat.map(|after| Heartbeat::new(after, raw, now));
    let run_deadline = deadlines.run;
    let is_timed = run_deadline.is_some() || heartbeat.is_some();
    let timed = is_timed.then(|| Box::new(Timed { run_deadline, heartbeat }));
    let begun = match record.begun {
        true => Ok(()),
        false => respond::begin(client, answer, caller.version, !client_keep_alive, raw, bodiless),
    };
    // Where the answer is recorded, the relay finds that its client is gone.
    if begun.is_err() && kept.is_none() {
        let finish = gone_before_answer(service, response_observer.watching_mut(), &mut lease);
        record.ended(finish);
        lease.finish(finish);
        return Ok(Forwarded::ClientGone);
    }
    if let Some(body) = request_direction.take_copy() {
        shadow::copy(&connection.worker, service, identity, request, body);
    }
    request_direction.replay = None;
    if tunnel {
        if request.upgrade.as_deref().is_some_and(|protocol| protocol.trim().eq_ignore_ascii_case("websocket")) {
            response_observer.expect_frames();
        }
        client.become_tunnel();
        upstream.peer.become_tunnel();
        request_direction.restart(client);
        request_direction.raw = true;
        request_direction.observer.bytes_max = 0;
    }
    let idle = route.timeouts.idle.unwrap_or(service.config.timeouts.idle);
    let flow = in_place::boxed(|| Flow {
        upstream,
        lease: Some(lease),
        target,
        cuts,
        request: request_direction,
        response: Direction::new(raw, response_observer),
        takes_comments,
        tunnel,
        // Whoever asks for more than 49 days gets those.
        idle_milliseconds: u32::try_from(idle.as_millis()).unwrap_or(u32::MAX),
        service: Rc::clone(service),
        timed,
        cancels: false,
        finish: Finish::Ended(outcome),
        upstream_keep_alive,
        client_keep_alive,
        until_close,
    });
    Ok(Forwarded::Streaming(flow))
}

fn expect_learning(session: &config::Session, answer: &ResponseHead, identity: &Identity) -> Option<Learn> {
    let pointers = identify::response_pointers(session);
    let readable = !answer.fields.contains("content-encoding")
        && answer.fields.get("content-type").is_some_and(|value| identify::is_json(Some(value)));
    (!pointers.is_empty() && readable).then(|| Learn::new(&pointers, identity.scope))
}

fn is_event_stream(answer: &ResponseHead) -> bool {
    answer.fields.get("content-type").is_some_and(|value| {
        let media_type = value.split(|byte| *byte == b';').next().unwrap_or_default();
        media_type.trim_ascii().eq_ignore_ascii_case(b"text/event-stream")
    })
}

/// The proxy's own cookie, where the session has no other key, or lives elsewhere than the client's cookie says.
fn cookie_to_set(
    service: &Service,
    identity: &Identity,
    target: &Target,
    affinity: AffinityOutcome,
    secure: bool,
) -> Option<String> {
    let sealer = service.cookie.as_ref()?;
    let key = identity.key.as_ref()?;
    let by_cookie = identity.cookie.as_ref().is_some_and(|cookie| *cookie.id == *key.text);
    let moved = matches!(affinity, AffinityOutcome::Moved | AffinityOutcome::Lost);
    if !(identity.issue_cookie || (by_cookie && moved)) {
        return None;
    }
    let pin = crate::state::dispatcher::PinHint { version: target.version.to_string(), endpoint: target.identity() };
    Some(sealer.seal(&CookieSession { id: key.text.to_string(), pin }, &identity.principal, secure, ids::wall_clock()))
}
