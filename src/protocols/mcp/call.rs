//! Call: runs that are a `tools/call`, what their answers tell, and the messages that end them.

use std::sync::{Arc, LazyLock};

use memchr::memmem::Finder;

use crate::json::{Extractor, Pointers};
use crate::message::Fields;
use crate::protocols::mcp::base::Base;
use crate::protocols::mcp::{BATCH, BATCH_MESSAGES_MAX, call_key, call_of_key, is_stateless, rpc_id, session, tasks};
use crate::protocols::{
    self, AtEnd, Fact, Look, OnDisconnect, Recognised, Request, RunRef, Watch, is_event_stream, is_json, is_success,
    outcome_of_status,
};
use crate::run::{Kind, RunOutcome};
use crate::sse;

/// The error with which a server confirms that a call was cancelled.
const CANCELLED: &str = "-32800";

/// What a JSON-RPC message from the server is told by.
pub static ANSWER: LazyLock<Arc<Pointers>> = LazyLock::new(|| {
    Arc::new(Pointers::new([
        "/method",
        "/id",
        "/error",
        "/error/code",
        "/error/message",
        "/result",
        "/result/resultType",
        "/result/taskId",
        "/result/status",
        "/result/task/taskId",
        "/result/task/status",
        "/params/taskId",
        "/params/status",
    ]))
});

/// Of every answer of a batch: its id, and whether it is an error.
static BATCH_ANSWER: LazyLock<Arc<Pointers>> = LazyLock::new(|| Arc::new(Pointers::new(ANSWERS.into_iter().flatten())));

const ANSWERS: [[&str; 2]; BATCH_MESSAGES_MAX] = [
    ["/0/id", "/0/error"],
    ["/1/id", "/1/error"],
    ["/2/id", "/2/error"],
    ["/3/id", "/3/error"],
    ["/4/id", "/4/error"],
    ["/5/id", "/5/error"],
    ["/6/id", "/6/error"],
    ["/7/id", "/7/error"],
];

/// A `tools/call`. Without an id, or a session to which it belongs, it has no key.
pub fn start(request: &Request<'_>, session: Option<&str>, id: Option<String>) -> Recognised {
    let run = session.zip(id.as_deref()).and_then(|(session, id)| call_key(session, id));
    Recognised {
        base: Base::written(request),
        // Up to 2025-11-25 a lost connection is no cancel: the answer may come on another stream of the session. Where
        // there is no session no such stream exists.
        on_disconnect: if session.is_some() { OnDisconnect::GoesOn } else { OnDisconnect::Ends },
        run: run.clone(),
        ..Recognised::start(Answer {
            is_named: run.is_some(),
            stateless: is_stateless(request),
            ..Answer::new(session, id)
        })
    }
}

/// A batch: the exchange's own run is its first call, the others begin when the server takes it. `None`: it is none.
pub fn batch(request: &Request<'_>, session: Option<&str>, body: &Extractor) -> Option<Recognised> {
    let mut seen = false;
    let mut calls = Vec::new();
    for [method, id] in BATCH {
        seen |= body.has(method) || body.has(id);
        if body.text(method) == Some("tools/call") {
            calls.extend(rpc_id(body.at(id)));
        }
    }
    if !seen {
        return None;
    }
    if calls.is_empty() {
        return Some(Recognised { watch: Some(Box::new(Small::new(session.is_some()))), ..Recognised::other() });
    }
    let first = calls.remove(0);
    let run = session.and_then(|session| call_key(session, &first));
    Some(Recognised {
        base: Base::written(request),
        on_disconnect: if session.is_some() { OnDisconnect::GoesOn } else { OnDisconnect::Ends },
        rpc_id: Some(first.clone()),
        run: run.clone(),
        ..Recognised::start(Answer { others: calls, is_named: run.is_some(), ..Answer::new(session, Some(first)) })
    })
}

/// A notification that a call is no longer wanted.
pub fn cancel(in_session: bool, run: Option<String>) -> Recognised {
    let watch = Small { in_session, cancels: run.clone() };
    let kind = if run.is_some() { Kind::Cancel } else { Kind::Other };
    Recognised { kind, run, watch: Some(Box::new(watch)), ..Recognised::other() }
}

/// The same notification, from us. `None`: the run is no call that can be named.
pub fn cancel_call(run: &RunRef<'_>) -> Option<protocols::Call> {
    let (_, id) = call_of_key(run.key)?;
    let base = Base::read(run.base)?;
    let body = format!(
        r#"{{"jsonrpc":"2.0","method":"notifications/cancelled","params":{{"requestId":{id},"reason":"The proxy was asked to end it."}}}}"#
    );
    Some(base.call("notifications/cancelled", None, body))
}

/// A DELETE: the session ends, and with it its runs.
pub fn end_session(request: &Request<'_>) -> Recognised {
    let session = session(request);
    Recognised {
        bound: session.is_some(),
        watch: session.is_some().then(|| Box::new(EndSession) as Box<dyn Watch>),
        session,
        ..Recognised::other()
    }
}

/// Reads the answer to `initialize`.
pub struct Initialize;

impl Watch for Initialize {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        // A server may send an id with an error, too: such a session does not exist.
        if is_success(status)
            && let Some(id) = fields.get("mcp-session-id").and_then(|value| std::str::from_utf8(value).ok())
        {
            facts.extend(protocols::key(id.trim()).map(Fact::Session));
        }
        Look::Nothing
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}

/// Reads the answer to something that is no run: only whether the session is still there.
pub struct Small {
    in_session: bool,
    /// The run that ends if the server takes it.
    cancels: Option<String>,
}

impl Small {
    pub fn new(in_session: bool) -> Small {
        Small { in_session, cancels: None }
    }
}

impl Watch for Small {
    fn head(&mut self, status: u16, _fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        if is_success(status) {
            facts.extend(self.cancels.take().map(|run| Fact::RunEnded(run, RunOutcome::Cancelled)));
        }
        if self.in_session {
            tell_lost(status, facts);
        }
        Look::Nothing
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}

/// 404 about a session: the server does not know it, and its runs are gone with it.
pub fn tell_lost(status: u16, facts: &mut Vec<Fact>) {
    if status == 404 {
        facts.push(Fact::SessionRunsEnded(RunOutcome::Unknown));
        facts.push(Fact::SessionLost);
    }
}

struct EndSession;

impl Watch for EndSession {
    fn head(&mut self, status: u16, _fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        if is_success(status) {
            facts.push(Fact::SessionRunsEnded(RunOutcome::Cancelled));
            facts.push(Fact::SessionLost);
        }
        tell_lost(status, facts);
        Look::Nothing
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}

/// Reads the answer to calls.
struct Answer {
    session: Option<String>,
    /// Of the call that is the exchange's run, as JSON. `None`: it could not be read.
    id: Option<String>,
    /// Of the other calls of the batch.
    others: Vec<String>,
    /// The run has a key under which another stream can tell its end.
    is_named: bool,
    /// It has become a task, of which its own calls tell.
    is_task: bool,
    stateless: bool,
    status: u16,
    streams: bool,
}

impl Watch for Answer {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        if self.session.is_some() {
            tell_lost(status, facts);
        }
        if !is_success(status) {
            self.others.clear();
            return Look::Nothing;
        }
        if let Some(session) = &self.session {
            facts.extend(self.others.iter().filter_map(|id| call_key(session, id)).map(Fact::RunStarted));
        }
        self.streams = is_event_stream(fields);
        if self.streams {
            Look::Events
        } else if status == 202 || !is_json(fields) {
            Look::Nothing
        } else if self.others.is_empty() {
            Look::Json(&ANSWER)
        } else {
            Look::Json(&BATCH_ANSWER)
        }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        if self.others.is_empty() {
            self.answered(values, facts);
        } else {
            self.batch_answered(values, facts);
        }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        if !may_be_answer(event.data) {
            return;
        }
        if event.data.starts_with(b"[") {
            self.batch_answered(&Extractor::read(&BATCH_ANSWER, event.data), facts);
        } else {
            self.answered(&Extractor::read(&ANSWER, event.data), facts);
        }
    }

    fn end(&mut self, facts: &mut Vec<Fact>) -> AtEnd {
        if !is_success(self.status) {
            return AtEnd::Ended(outcome_of_status(self.status));
        }
        // A server may close a stream and answer on the next one.
        if self.is_task || (self.streams || self.status == 202) && self.is_named {
            return AtEnd::GoesOn;
        }
        if let Some(session) = &self.session {
            let ended = |id: &String| Some(Fact::RunEnded(call_key(session, id)?, RunOutcome::Unknown));
            facts.extend(self.others.iter().filter_map(ended));
        }
        AtEnd::Ended(if self.streams { RunOutcome::Truncated } else { outcome_of_status(self.status) })
    }
}

impl Answer {
    fn new(session: Option<&str>, id: Option<String>) -> Answer {
        Answer {
            session: session.map(str::to_owned),
            id,
            others: Vec::new(),
            is_named: false,
            is_task: false,
            stateless: false,
            status: 0,
            streams: false,
        }
    }

    /// One message of the server.
    fn answered(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        let Some(verdict) = verdict(values, self.stateless) else { return };
        let id = rpc_id(values.at("/id"));
        // Behind a large result the id lies out of sight. Where only one question was asked it can't be about another.
        let is_own = id == self.id || self.id.is_none() || self.others.is_empty() && id.is_none() || !self.streams;
        if is_own {
            match verdict {
                Verdict::Ended(outcome) => facts.push(Fact::Ended(outcome)),
                Verdict::Task { key, ended } => {
                    facts.push(Fact::Run(key));
                    facts.extend(ended.map(Fact::Ended));
                    self.is_task = true;
                }
            }
        } else if let Some(key) =
            self.session.as_deref().zip(id.as_deref()).and_then(|(session, id)| call_key(session, id))
        {
            self.others.retain(|other| Some(other) != id.as_ref());
            tell_call(key, verdict, facts);
        }
    }

    fn batch_answered(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        for [id, error] in ANSWERS {
            let Some(answered) = rpc_id(values.at(id)) else { continue };
            let outcome = if values.has(error) { RunOutcome::Failed } else { RunOutcome::Completed };
            if Some(&answered) == self.id.as_ref() {
                facts.push(Fact::Ended(outcome));
            } else if let Some(position) = self.others.iter().position(|other| *other == answered) {
                self.others.remove(position);
                let key = self.session.as_deref().and_then(|session| call_key(session, &answered));
                facts.extend(key.map(|key| Fact::RunEnded(key, outcome)));
            }
        }
    }
}

/// What a message says of the call that it answers.
pub enum Verdict {
    Ended(RunOutcome),
    /// The call has become a task with this key, which may have ended already.
    Task {
        key: String,
        ended: Option<RunOutcome>,
    },
}

/// `None`: it answers nothing (a request or notification of the server, or no JSON-RPC).
pub fn verdict(values: &Extractor, stateless: bool) -> Option<Verdict> {
    if values.has("/method") {
        return None;
    }
    if values.has("/error") {
        let cancelled = values.word("/error/code") == Some(CANCELLED);
        return Some(Verdict::Ended(if cancelled { RunOutcome::Cancelled } else { RunOutcome::Failed }));
    }
    if !values.has("/result") {
        return None;
    }
    // Tasks lie in the result itself since they are an extension; in 2025-11-25 they had a member of their own.
    let (task, status) = if !stateless {
        (values.text("/result/task/taskId"), values.text("/result/task/status"))
    } else if values.text("/result/resultType") == Some("task") {
        (values.text("/result/taskId"), values.text("/result/status"))
    } else {
        (None, None)
    };
    let Some(key) = task.and_then(tasks::key) else {
        // What a tool reports as its own failure (`isError`) is an answer like another, for the model to read.
        return Some(Verdict::Ended(RunOutcome::Completed));
    };
    Some(Verdict::Task { key, ended: status.and_then(tasks::outcome) })
}

/// The verdict on a call that another exchange started.
pub fn tell_call(key: String, verdict: Verdict, facts: &mut Vec<Fact>) {
    match verdict {
        Verdict::Ended(outcome) => facts.push(Fact::RunEnded(key, outcome)),
        Verdict::Task { key: task, ended } => {
            // The work goes on under the task's name.
            facts.push(Fact::RunEnded(key, RunOutcome::Completed));
            if ended.is_none() {
                facts.push(Fact::RunStarted(task));
            }
        }
    }
}

/// Tells most messages that answer nothing by a byte search.
pub fn may_be_answer(data: &[u8]) -> bool {
    static RESULT: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"result\""));
    static ERROR: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"error\""));
    RESULT.find(data).is_some() || ERROR.find(data).is_some()
}
