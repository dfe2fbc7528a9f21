//! Tasks: calls that the server goes on with by itself (experimental in 2025-11-25, an extension since 2026-07-28).

use crate::json::Extractor;
use crate::message::Fields;
use crate::protocols::mcp::base::{Base, text_of_header};
use crate::protocols::mcp::call::{ANSWER, Small, may_be_answer, tell_lost};
use crate::protocols::mcp::{STATELESS, call_of_key};
use crate::protocols::{
    self, AtEnd, Call, Fact, Look, Recognised, Request, RunRef, Standing, Watch, is_event_stream, is_json, is_success,
};
use crate::run::{Kind, RunOutcome};
use crate::sse;

/// The key of a run that is a task: its id. One with a space could be taken for a call's.
pub fn key(id: &str) -> Option<String> {
    protocols::key(id).filter(|id| !id.contains(' '))
}

/// How a task ended that has this status; `None`: it has not.
pub fn outcome(status: &str) -> Option<RunOutcome> {
    match status {
        "completed" => Some(RunOutcome::Completed),
        "failed" => Some(RunOutcome::Failed),
        "cancelled" => Some(RunOutcome::Cancelled),
        _ => None,
    }
}

/// A request about a task.
pub fn recognise(request: &Request<'_>, method: &str, in_session: bool, body: Option<&Extractor>) -> Recognised {
    let run = match body {
        Some(body) => body.text("/params/taskId").and_then(key),
        None => request.header("mcp-name").and_then(text_of_header).as_deref().and_then(key),
    };
    let Some(run) = run else {
        return Recognised { watch: Some(Box::new(Small::new(in_session))), ..Recognised::other() };
    };
    let kind = match method {
        "tasks/get" => Kind::Read,
        "tasks/cancel" => Kind::Cancel,
        // It waits until the task is over, and answers as the call would have.
        "tasks/result" => Kind::Join,
        _ => Kind::Other,
    };
    let watch = Answer { run: run.clone(), kind, in_session };
    Recognised { kind, run: Some(run), watch: Some(Box::new(watch)), ..Recognised::other() }
}

/// What a `notifications/tasks` says.
pub fn notified(values: &Extractor, facts: &mut Vec<Fact>) {
    let is_it = values.text("/method").is_some_and(|method| method.starts_with("notifications/tasks"));
    if let Some(task) = values.text("/params/taskId").filter(|_| is_it).and_then(key) {
        tell(task, values.text("/params/status"), facts);
    }
}

fn tell(task: String, status: Option<&str>, facts: &mut Vec<Fact>) {
    match status.map(outcome) {
        Some(Some(outcome)) => facts.push(Fact::RunEnded(task, outcome)),
        Some(None) => facts.push(Fact::RunAlive(task)),
        None => {}
    }
}

/// Reads the answer to a request about a task.
struct Answer {
    run: String,
    kind: Kind,
    in_session: bool,
}

impl Watch for Answer {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        if self.in_session {
            tell_lost(status, facts);
        }
        if is_success(status) && is_event_stream(fields) {
            Look::Events
        } else if (is_success(status) || status == 400 || status == 404) && is_json(fields) {
            Look::Json(&ANSWER)
        } else {
            Look::Nothing
        }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        if values.has("/method") {
            return;
        }
        if is_unknown_task(values) {
            facts.push(Fact::RunEnded(self.run.clone(), RunOutcome::Unknown));
        } else if self.kind == Kind::Join {
            if values.has("/result") {
                facts.push(Fact::Ended(RunOutcome::Completed));
            } else if values.has("/error") {
                facts.push(Fact::Ended(RunOutcome::Failed));
            }
        } else {
            tell(self.run.clone(), values.text("/result/status"), facts);
        }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        if may_be_answer(event.data) {
            self.body(&Extractor::read(&ANSWER, event.data), facts);
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}

/// There is no code of its own for a task that does not exist (any more); what there is ("invalid params") is said of
/// much else.
fn is_unknown_task(values: &Extractor) -> bool {
    values.word("/error/code") == Some("-32602")
        && values.text("/error/message").is_some_and(|message| {
            let message = message.to_ascii_lowercase();
            message.contains("not found") || message.contains("expired")
        })
}

/// `tasks/get`, for runs that are tasks.
pub fn status_call(run: &RunRef<'_>) -> Option<Call> {
    call(run, "tasks/get")
}

/// `tasks/cancel`.
pub fn cancel_call(run: &RunRef<'_>) -> Option<Call> {
    call(run, "tasks/cancel")
}

fn call(run: &RunRef<'_>, method: &str) -> Option<Call> {
    if call_of_key(run.key).is_some() || run.key.is_empty() {
        return None;
    }
    let base = Base::read(run.base)?;
    let task = serde_json::to_string(run.key).ok()?;
    // A request without sessions says by itself what its sender can do.
    let meta = if base.version == STATELESS {
        format!(
            r#","_meta":{{"io.modelcontextprotocol/protocolVersion":"{STATELESS}","io.modelcontextprotocol/clientCapabilities":{{"extensions":{{"io.modelcontextprotocol/tasks":{{}}}}}}}}"#
        )
    } else {
        String::new()
    };
    let body = format!(r#"{{"jsonrpc":"2.0","id":"longhaul","method":"{method}","params":{{"taskId":{task}{meta}}}}}"#);
    Some(base.call(method, Some(run.key), body))
}

/// The answer to [`status_call`].
pub fn judge(run: &RunRef<'_>, status: u16, body: &[u8]) -> Standing {
    let in_session = Base::read(run.base).is_some_and(|base| !base.session.is_empty());
    if status == 404 && in_session {
        return Standing::Ended(RunOutcome::Unknown);
    }
    let mut standing = Standing::NoEvidence;
    let mut read = |document: &[u8]| {
        let values = Extractor::read(&ANSWER, document);
        if is_unknown_task(&values) {
            standing = Standing::Ended(RunOutcome::Unknown);
        } else if let Some(status) = values.text("/result/status") {
            standing = outcome(status).map_or(Standing::Running, Standing::Ended);
        }
    };
    if body.trim_ascii_start().starts_with(b"{") {
        read(body);
    } else {
        // A server may answer anything with a stream.
        sse::Reader::default().feed(body, |event| read(event.data));
    }
    standing
}
