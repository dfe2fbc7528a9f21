//! Steps 6 and 7, turn and pick: asks for an endpoint, and waits for one where the service has a queue.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;

use crate::config::{self, Policy};
use crate::error::{Code, ProxyError};
use crate::ids::{self, RunId};
use crate::message::{Fields, Framing, RequestHead, ResponseHead, Version};
use crate::proxy::account::Record;
use crate::proxy::identify::{self, Identity};
use crate::proxy::peer::Peer;
use crate::proxy::timer::Timer;
use crate::proxy::{respond, route};
use crate::snapshot::Service;
use crate::state::dispatcher::{Ask, Picked, Placed};
use crate::state::queue::Class;
use crate::state::runs::About;
use crate::state::waiting::Waiting;
use crate::state::{AffinityOutcome, Kind, Refusal, RunOutcome};

/// By which a request chooses another policy than the configured one, where it may.
pub const OVERRIDE_HEADER: &str = "longhaul-double-texting";

/// What the proxy's own call to interrupt a run takes from the request for whose sake it is made.
const CREDENTIALS: [&str; 2] = ["authorization", "x-api-key"];

/// How a pick ended.
pub enum Found {
    Placed(Placed),
    ClientGone,
}

/// What the service, or the request, says that a start does whose session has a run.
pub fn policy(service: &config::Service, request: &RequestHead) -> Result<Policy, ProxyError> {
    let config::DoubleTexting { policy, allow_override } = service.runs.double_texting;
    let Some(chosen) = request.fields.get(OVERRIDE_HEADER).filter(|_| allow_override) else { return Ok(policy) };
    let undoes = service.agent_protocol == config::AgentProtocol::Named("langgraph");
    match Policy::of_word(chosen.trim_ascii()) {
        Some(Policy::Rollback) if !undoes => {
            let detail = format!("{OVERRIDE_HEADER}: rollback needs a protocol that can undo a run; say interrupt");
            Err(ProxyError::new(Code::BadRequest, detail))
        }
        Some(policy) => Ok(policy),
        None => {
            let words = Policy::WORDS.map(|(word, _)| word).join(", ");
            Err(ProxyError::new(Code::BadRequest, format!("{OVERRIDE_HEADER} is one of {words}")))
        }
    }
}

/// Who asks for an endpoint, and for what.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    pub service: &'a Arc<Service>,
    /// What it does if its session has a run.
    pub policy: Policy,
    pub request: &'a RequestHead,
    pub identity: &'a Identity,
    pub about: &'a About,
    /// The id that the run is to have.
    pub id: Option<RunId>,
}

/// Picks an endpoint, or waits until there is one.
pub async fn pick(
    wanted: Wanted<'_>,
    client: &mut Peer,
    timer: &mut Timer,
    record: &mut Record,
) -> Result<Found, ProxyError> {
    let Wanted { service, identity, .. } = wanted;
    let found = match ask(wanted) {
        Ok(Picked::Placed(placed)) => Ok(placed),
        Ok(Picked::Waiting(waiting)) => match Box::pin(wait(waiting, progress(wanted), client, timer, record)).await {
            Some(found) => found,
            None => {
                if identity.kind == Kind::Start {
                    record.outcome = Some(RunOutcome::Rejected);
                }
                return Ok(Found::ClientGone);
            }
        },
        Err(refusal) => Err(refusal),
    };
    found.map(Found::Placed).map_err(|refusal| {
        record.affinity = refusal.affinity();
        if identity.kind == Kind::Start {
            record.outcome = Some(RunOutcome::Rejected);
        }
        if let Refusal::Busy(run) = refusal {
            record.run = Some(run);
        }
        refused(refusal, service)
    })
}

fn ask(wanted: Wanted<'_>) -> Result<Picked, Refusal> {
    let Wanted { service, policy, request, identity, about, id } = wanted;
    let matched = service
        .config
        .versions
        .iter()
        .find(|version| !version.matches.is_empty() && route::matches_headers(&version.matches, &request.fields));
    let hint =
        identity.cookie.as_ref().filter(|cookie| identity.key.as_ref().is_some_and(|key| *key.text == *cookie.id));
    let recognised = identity.recognised.as_ref();
    // In a session of MCP parallel calls are normal.
    let parallel = about.protocol.is_some_and(|protocol| protocol.name() == "mcp");
    let policy = if parallel { Policy::Allow } else { policy };
    let interrupts = matches!(policy, Policy::Interrupt | Policy::Rollback) && identity.kind == Kind::Start;
    let credentials = if interrupts { credentials(request) } else { Vec::new() };
    let class = match &service.config.runs.queue.priority_header {
        Some(name) => Class::of_header(request.fields.get(name.as_str())),
        None => Class::default(),
    };
    let ask = Ask {
        key: identity.key.as_ref(),
        kind: identity.kind,
        creates: recognised.is_some_and(|recognised| recognised.creates_session),
        bound: recognised.is_some_and(|recognised| recognised.bound),
        run: recognised.and_then(|recognised| recognised.run.as_deref()),
        about: Some(about),
        version: matched.map(|version| version.name.as_str()),
        hint: hint.map(|cookie| &cookie.pin),
        id,
        class,
        principal: identity.scope.filter(|_| !identity.anonymous),
        policy,
        credentials: &credentials,
    };
    service.dispatcher.pick(ask, ids::now(), ids::random_u64())
}

fn credentials(request: &RequestHead) -> Vec<(&'static str, String)> {
    let value = |name: &str| Some(std::str::from_utf8(request.fields.get(name)?).ok()?.to_owned());
    CREDENTIALS.into_iter().filter_map(|name| Some((name, value(name)?))).collect()
}

/// How often a waiting client is told its position, where that is configured and it reads an event stream.
fn progress(wanted: Wanted<'_>) -> Option<(Duration, Version)> {
    let Wanted { service, request, identity, id, .. } = wanted;
    // Of an answer that is recorded the head has to be the endpoint's own, as for protocols whose clients need it; and
    // whoever waits for 100 (Continue) must not get an answer first.
    let head_matters = identity
        .recognised
        .as_ref()
        .and_then(|recognised| recognised.protocol)
        .is_some_and(|protocol| ["langgraph", "mcp", "acp"].contains(&protocol.name()));
    let may = identity.kind == Kind::Start
        && id.is_none()
        && !head_matters
        && !request.expect_continue
        && request.upgrade.is_none()
        && identify::accepts_event_stream(&request.fields);
    service.config.runs.queue.progress.filter(|_| may).map(|every| (every, request.version))
}

/// Waits for an endpoint, as long as the queue allows and the client stays. `None`: it has left.
async fn wait(
    mut waiting: Waiting,
    progress: Option<(Duration, Version)>,
    client: &mut Peer,
    timer: &mut Timer,
    record: &mut Record,
) -> Option<Result<Placed, Refusal>> {
    let mut next = progress.map(|(every, _)| ids::now() + every);
    let mut comment = Bytes::new();
    let found = poll_fn(|context| {
        if comment.is_empty()
            && let Poll::Ready(found) = waiting.poll(context)
        {
            return Poll::Ready(Some(found));
        }
        if client.poll_gone(context).is_ready() {
            return Poll::Ready(None);
        }
        loop {
            while !comment.is_empty() {
                match client.poll_write(context, &comment) {
                    Poll::Ready(Ok(count)) => drop(comment.split_to(count)),
                    Poll::Ready(Err(_)) => return Poll::Ready(None),
                    // Nothing may come between the parts of a comment, so what is given meanwhile waits, too.
                    Poll::Pending => return timer.poll_passed(context, waiting.until()).map(|()| None),
                }
                if comment.is_empty() {
                    if let Poll::Ready(found) = waiting.poll(context) {
                        return Poll::Ready(Some(found));
                    }
                    if let Poll::Ready(Err(_)) = client.poll_flush(context) {
                        return Poll::Ready(None);
                    }
                }
            }
            let until = next.map_or(waiting.until(), |next| next.min(waiting.until()));
            if timer.poll_passed(context, until).is_pending() {
                return Poll::Pending;
            }
            let now = ids::now();
            let (Some((every, version)), true) = (progress, now < waiting.until()) else {
                return Poll::Ready(Some(waiting.time_out(now)));
            };
            if !record.begun {
                record.begun = true;
                record.status = 200;
                if begin(client, version, &waiting).is_err() {
                    return Poll::Ready(None);
                }
            }
            comment = Bytes::from(format!(": queue position {}\n\n", waiting.position().unwrap_or(0)));
            next = Some(now + every);
        }
    })
    .await;
    record.queued = waiting.waited(ids::now());
    found
}

/// Begins an event stream before its endpoint is known.
fn begin(client: &mut Peer, version: Version, waiting: &Waiting) -> std::io::Result<()> {
    let mut fields = Fields::with_capacity(192, 4);
    fields.append("content-type", b"text/event-stream");
    fields.append("cache-control", b"no-store");
    fields.append("longhaul-affinity", AffinityOutcome::None.as_str().as_bytes());
    if let Some(run) = waiting.run_id() {
        fields.append("longhaul-run-id", run.to_string().as_bytes());
    }
    let mut head = ResponseHead {
        status: StatusCode::OK,
        reason: None,
        version: Version::Http11,
        fields,
        framing: Framing::Chunked,
        declared_length: None,
        keep_alive: true,
        upgrade: None,
    };
    respond::begin(client, &mut head, version, true, false, false)
}

/// What to tell whoever was given no endpoint.
fn refused(refusal: Refusal, service: &Service) -> ProxyError {
    let name = &service.name;
    let detail = match refusal {
        Refusal::QueueFull => {
            format!("every endpoint of service {name} is at its run limit, and no place to wait is free")
        }
        Refusal::PinnedFull => "the session's endpoint is at its run limit, and the session stays there".to_owned(),
        Refusal::SessionLost => "the session's endpoint is gone (session.when_lost: reject)".to_owned(),
        Refusal::SessionGone(_) => "session not found: its endpoint is gone or drains; begin a new one".to_owned(),
        Refusal::NoEndpoint => format!("no endpoint of service {name} is ready"),
        Refusal::Ending => "the proxy ends, and the run still waited for an endpoint".to_owned(),
        Refusal::QueueTimeout => {
            let timeout = service.config.runs.queue.timeout;
            format!("no endpoint of service {name} became free within {timeout:?} (runs.queue.timeout)")
        }
        Refusal::Busy(run) => format!("the session has run {run} (runs.double_texting)"),
        Refusal::PrincipalLimit => {
            let max = service.config.runs.max_per_principal.unwrap_or_default();
            format!("the caller has {max} runs already (runs.max_per_principal)")
        }
    };
    let error = ProxyError::new(refusal.code(), detail);
    match refusal {
        Refusal::SessionGone(_) => ProxyError { status: StatusCode::NOT_FOUND, ..error },
        Refusal::QueueFull | Refusal::PinnedFull | Refusal::QueueTimeout | Refusal::PrincipalLimit => {
            let after = service.dispatcher.retry_after(ids::now());
            ProxyError { retry_after_seconds: u16::try_from(after.as_secs()).ok(), ..error }
        }
        _ => error,
    }
}
