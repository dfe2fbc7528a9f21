//! Repeat: starts that carry a key (`runs.idempotency`). The answer to the first is recorded as it passes; a repeated
//! one reads that record, live or afterwards, and starts nothing.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use http::StatusCode;
use sha2::{Digest, Sha256};

use crate::config::Idempotency;
use crate::error::{Code, ProxyError};
use crate::ids::{self, RunId};
use crate::message::{Framing, RequestHead, ResponseHead};
use crate::proxy::account::Record;
use crate::proxy::connection::Connection;
use crate::proxy::identify::{self, Identity};
use crate::proxy::observe::Observer;
use crate::proxy::peer::{Next, Peer, SourceFault};
use crate::proxy::relay;
use crate::proxy::respond;
use crate::proxy::timer::Timer;
use crate::proxy::{Caller, may_keep_alive};
use crate::snapshot::Service;
use crate::state::Kind;
use crate::state::idempotency::{self, Finish, Start, StartKey};
use crate::state::recording::{Piece, Reader, Recorder};
use crate::state::remembered::Remembered;

/// How long the body of a repeated start may be silent, or the client not read.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(600);

/// The record of a first start's answer, shared by both directions of its exchange. Dropped before the answer's end, the
/// start is forgotten and may be tried anew.
pub struct Kept {
    run: RunId,
    recorder: RefCell<Option<Recorder>>,
    remembered: RefCell<Remembered>,
    /// The answer is not to be had a second time: its endpoint asked to come again.
    passing: RefCell<bool>,
}

/// Of a request as it passes.
pub struct Asked {
    hasher: Sha256,
    kept: Rc<Kept>,
}

/// What to do with a start.
pub enum Way {
    /// As without a key.
    Usual,
    /// It is the first with its key.
    First(Rc<Kept>),
    /// It repeats one.
    Again(RunId, Reader),
}

impl Kept {
    /// The id that the run is to have.
    pub fn run(&self) -> RunId {
        self.run
    }

    /// The answer begins, as its client is to see it.
    pub fn head(&self, head: &ResponseHead) {
        let come_again = [
            StatusCode::TOO_MANY_REQUESTS,
            StatusCode::BAD_GATEWAY,
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::GATEWAY_TIMEOUT,
        ];
        *self.passing.borrow_mut() = come_again.contains(&head.status);
        if let Some(recorder) = &*self.recorder.borrow() {
            recorder.head(head.clone());
        }
    }

    pub fn append(&self, payload: &[u8]) {
        if let Some(recorder) = &*self.recorder.borrow() {
            recorder.append(payload);
        }
    }

    /// The answer has come whole.
    pub fn end(&self) {
        if let Some(recorder) = self.recorder.borrow_mut().take() {
            recorder.end(None);
            let finish = if *self.passing.borrow() { Finish::Forget } else { Finish::Keep };
            self.remembered.borrow_mut().finish(finish);
        }
    }
}

impl Asked {
    /// For a request of which these bytes were read and observed already.
    pub fn new(kept: Rc<Kept>, read: &[u8]) -> Asked {
        Asked { hasher: Sha256::new_with_prefix(read), kept }
    }

    pub fn observe(&mut self, payload: &[u8]) {
        self.hasher.update(payload);
    }

    /// The request has come whole.
    pub fn end(self) {
        if let Some(recorder) = &*self.kept.recorder.borrow() {
            recorder.asked(self.hasher.finalize().into());
        }
    }
}

/// Whether a start is the first with its key. `prefix` is the route's `strip_prefix`.
pub fn way(
    service: &Service,
    prefix: Option<&str>,
    request: &RequestHead,
    identity: &Identity,
) -> Result<Way, (ProxyError, Option<RunId>)> {
    let Some(Idempotency { key, .. }) = &service.config.runs.idempotency else { return Ok(Way::Usual) };
    if identity.kind != Kind::Start || request.upgrade.is_some() {
        return Ok(Way::Usual);
    }
    let view = identify::view(request, prefix);
    let Some(key) = key.iter().find_map(|source| identify::key_in_head(source, &view)) else { return Ok(Way::Usual) };
    // The proxy's own cookie may have been new to the first.
    let mut cookies = request.fields.clone();
    if let Some(sealer) = &service.cookie {
        sealer.strip(&mut cookies);
    }
    let authorization: Vec<&[u8]> = request.fields.get_all("authorization").collect();
    let cookie: Vec<&[u8]> = cookies.get_all("cookie").collect();
    let path = match &request.query {
        Some(query) => format!("{}?{query}", request.path),
        None => request.path.clone(),
    };
    let key = StartKey::of(idempotency::Identity {
        service: &service.name,
        scope: identity.scope.as_ref(),
        authorization: &authorization,
        cookie: &cookie,
        method: request.method.as_str(),
        path: &path,
        key: &key,
    });
    let run = RunId::generate();
    match service.dispatcher.first_start(key, run, ids::now()) {
        Start::First(recorder) => {
            let remembered = Remembered::new(Arc::clone(&service.dispatcher), key, run);
            Ok(Way::First(Rc::new(Kept {
                run,
                recorder: RefCell::new(Some(recorder)),
                remembered: RefCell::new(remembered),
                passing: RefCell::new(false),
            })))
        }
        Start::Repeated { run, reader } => Ok(Way::Again(run, reader)),
        Start::NotKept(run) => {
            let detail = "a start with this key was made before, and its answer was too long to be kept";
            let error = ProxyError::new(Code::IdempotencyConflict, detail);
            Err((ProxyError { status: StatusCode::CONFLICT, ..error }, Some(run)))
        }
        Start::Full => Err((
            ProxyError::new(Code::Overloaded, "so many starts with keys are under way that no more can be known"),
            None,
        )),
    }
}

/// How reading a record to a client ended.
pub enum Replayed {
    Whole {
        keep_alive: bool,
    },
    /// The record broke off, or the client did not keep up.
    Truncated,
    ClientGone,
}

/// Answers a repeated start with the first one's answer.
pub async fn replay(
    mut reader: Reader,
    connection: &Connection,
    client: &mut Peer,
    caller: &Caller,
    mut observer: Observer,
    timer: &mut Timer,
    record: &mut Record,
) -> Result<Replayed, ProxyError> {
    let Some(digest) = drain(client, &mut observer, timer).await? else { return Ok(Replayed::ClientGone) };
    let Some(asked) = unless_gone(client, |context| reader.poll_asked(context)).await else {
        return Ok(Replayed::ClientGone);
    };
    if asked.is_some_and(|asked| asked != digest) {
        let detail = "a start with this key was made before, with another body";
        return Err(ProxyError::new(Code::IdempotencyConflict, detail));
    }
    let Some(head) = unless_gone(client, |context| reader.poll_head(context)).await else {
        return Ok(Replayed::ClientGone);
    };
    let (Some(_), Some(head)) = (asked, head) else {
        return Err(ProxyError::new(
            Code::UpstreamReset,
            "the start that this one repeats was not answered; send it again",
        ));
    };
    let mut head = ResponseHead::clone(&head);
    record.status = head.status.as_u16();
    if head.framing == Framing::Eof {
        head.framing = Framing::Chunked;
    }
    let bodiless = matches!(head.framing, Framing::None | Framing::Length(0));
    let keep_alive = may_keep_alive(connection, client, caller);
    if respond::begin(client, &mut head, caller.version, !keep_alive, false, bodiless).is_err() {
        return Ok(Replayed::ClientGone);
    }
    let until_close = client.is_http1() && head.framing == Framing::Eof;
    let replayed = copy(&mut reader, client, timer, record).await;
    if let (Replayed::Truncated, true, Peer::Http1(http1)) = (&replayed, until_close, &*client) {
        http1.reset_on_close();
    }
    Ok(match replayed {
        Replayed::Whole { .. } => Replayed::Whole { keep_alive: keep_alive && !until_close },
        other => other,
    })
}

/// Reads the rest of a request to its end: its digest. `None`: the client has left.
async fn drain(client: &mut Peer, observer: &mut Observer, timer: &mut Timer) -> Result<Option<[u8; 32]>, ProxyError> {
    let mut hasher = Sha256::new();
    let deadline = ids::now() + PATIENCE;
    let read = poll_fn(|context| {
        loop {
            let _ = client.poll_flush(context);
            match client.poll_next(context, false, observer) {
                Poll::Ready(Ok(Next::Bytes)) => {
                    if observer.over_limit() {
                        return Poll::Ready(Err(relay::over_limit()));
                    }
                    let count = client.held().len();
                    hasher.update(client.held());
                    client.consume(count);
                }
                Poll::Ready(Ok(Next::End(_))) => return Poll::Ready(Ok(true)),
                Poll::Ready(Err(SourceFault::Malformed(reason))) => {
                    return Poll::Ready(Err(ProxyError::new(Code::BadRequest, reason)));
                }
                Poll::Ready(Err(SourceFault::Cut(_))) => return Poll::Ready(Ok(false)),
                Poll::Pending => return timer.poll_passed(context, deadline).map(|()| Ok(false)),
            }
        }
    })
    .await?;
    Ok(read.then(|| hasher.finalize().into()))
}

async fn unless_gone<T>(client: &mut Peer, mut poll: impl FnMut(&mut std::task::Context<'_>) -> Poll<T>) -> Option<T> {
    poll_fn(|context| match poll(context) {
        Poll::Ready(found) => Poll::Ready(Some(found)),
        Poll::Pending => client.poll_gone(context).map(|()| None),
    })
    .await
}

async fn copy(reader: &mut Reader, client: &mut Peer, timer: &mut Timer, record: &mut Record) -> Replayed {
    let mut left = Bytes::new();
    let mut ended = false;
    let mut trailers = None;
    let mut deadline = ids::now() + PATIENCE;
    poll_fn(|context| {
        loop {
            if !left.is_empty() {
                match client.poll_write(context, &left) {
                    Poll::Ready(Ok(count)) => {
                        drop(left.split_to(count));
                        record.bytes_out += count as u64;
                        deadline = ids::now() + PATIENCE;
                        continue;
                    }
                    Poll::Ready(Err(_)) => return Poll::Ready(Replayed::ClientGone),
                    Poll::Pending => return timer.poll_passed(context, deadline).map(|()| Replayed::Truncated),
                }
            }
            if ended {
                return match client.poll_finish(context, false, &mut trailers) {
                    Poll::Ready(Ok(())) => Poll::Ready(Replayed::Whole { keep_alive: false }),
                    Poll::Ready(Err(_)) => Poll::Ready(Replayed::ClientGone),
                    Poll::Pending => timer.poll_passed(context, deadline).map(|()| Replayed::Truncated),
                };
            }
            match reader.poll_next(context) {
                Poll::Ready(Piece::Bytes(bytes)) => left = bytes,
                Poll::Ready(Piece::End(_)) => ended = true,
                Poll::Ready(Piece::Cut | Piece::Behind) => {
                    let _ = client.poll_flush(context);
                    return Poll::Ready(Replayed::Truncated);
                }
                Poll::Pending => {
                    if let Poll::Ready(Err(_)) = client.poll_flush(context) {
                        return Poll::Ready(Replayed::ClientGone);
                    }
                    return client.poll_gone(context).map(|()| Replayed::ClientGone);
                }
            }
        }
    })
    .await
}
