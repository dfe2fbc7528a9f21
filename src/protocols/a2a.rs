//! A2A: a context is the session, a task is the run; JSON-RPC of 0.3 and 1.0, and REST of both.
//!
//! A task that waits for its caller (input, authorisation) holds no worker: its run has ended, and the next message
//! starts another under the same key.

mod answers;
mod card;

pub use card::{asks_for_card, rewrite_card};

use std::sync::{Arc, LazyLock};

use answers::{Answer, Role};
use http::Method;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::error::ProxyError;
use crate::json::{Extractor, Found, Pointers};
use crate::protocols::{
    Call, Cancel, KEY_BYTES_MAX, OnDisconnect, Protocol, Recognised, Request, RunRef, Sign, Standing, at_segment,
    is_uuid, key, pointers,
};
use crate::run::{Kind, RunOutcome};

/// a2a-sdk 1.3, specification 1.0.1 and 0.3.
pub struct A2a;

const SHAPE: &[&str] = &[
    "/jsonrpc",
    "/method",
    "/id",
    "/params/id",
    "/params/taskId",
    "/params/contextId",
    "/params/tenant",
    "/params/message/contextId",
    "/params/message/taskId",
];
static RPC: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(SHAPE));
static REST: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/message/contextId", "/message/taskId"]));

/// The header by which 1.0 is told from 0.3, which has none.
const VERSION: &str = "a2a-version";
/// Longer versions are none.
const VERSION_BYTES_MAX: usize = 16;

/// What may stand in a segment of a path as it is (RFC 3986 section 2.3).
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

impl Protocol for A2a {
    fn name(&self) -> &'static str {
        "a2a"
    }

    fn sign(&self, request: &Request<'_>) -> Sign {
        let content_type = request.fields.get("content-type").unwrap_or_default();
        if request.fields.contains(VERSION)
            || request.fields.contains("a2a-extensions")
            || content_type.starts_with(b"application/a2a+json")
            || version_of_query(request).is_some()
            || asks_for_card(request)
        {
            return Sign::Mark;
        }
        match rest_place(request) {
            Some(Place { operation: Operation::Get | Operation::Other, task: Some(task), .. }) => {
                // `tasks` is a common word, and theirs are UUIDs.
                if is_uuid(&task) { Sign::Path } else { Sign::None }
            }
            Some(Place { operation: Operation::Other, .. }) | None => Sign::None,
            Some(_) => Sign::Mark,
        }
    }

    fn has_shape(&self, _request: &Request<'_>, body: &Extractor) -> bool {
        body.text("/jsonrpc") == Some("2.0")
            && body.text("/method").and_then(rpc_method).is_some_and(|(operation, _)| match operation {
                // MCP has `tasks/get` and `tasks/cancel`, too; its tasks are called `taskId`.
                Operation::Get | Operation::Cancel => body.has("/params/id"),
                _ => true,
            })
    }

    fn shape(&self) -> &'static [&'static str] {
        SHAPE
    }

    fn wants(&self, request: &Request<'_>) -> Option<&'static Arc<Pointers>> {
        if request.method != Method::POST {
            return None;
        }
        match rest_place(request).map(|place| place.operation) {
            Some(Operation::Send) => Some(&REST),
            Some(_) => None,
            None => Some(&RPC),
        }
    }

    fn recognise(&self, request: &Request<'_>, body: Option<&Extractor>) -> Option<Recognised> {
        if asks_for_card(request) {
            return Some(Recognised::other());
        }
        if let Some(place) = rest_place(request) {
            let text = |pointer| body.and_then(|values| values.text(pointer)).and_then(key);
            let named = Named {
                // Only of a message is the body looked at.
                context: match place.operation {
                    Operation::Send => text("/message/contextId"),
                    _ => request.query_value("contextId").as_deref().and_then(key),
                },
                task: match place.operation {
                    Operation::Send => text("/message/taskId"),
                    _ => place.task,
                },
            };
            let version = version(request);
            let base = Base { rpc: false, version: version.as_deref(), path: place.base, tenant: "" };
            return Some(exchange(place.operation, named, &base));
        }
        let body = body?;
        if request.method != Method::POST || body.text("/jsonrpc") != Some("2.0") {
            return None;
        }
        let (operation, is_first) = rpc_method(body.text("/method")?)?;
        let text = |pointer| body.text(pointer).and_then(key);
        let named = match operation {
            Operation::Send => {
                Named { context: text("/params/message/contextId"), task: text("/params/message/taskId") }
            }
            _ => Named {
                context: text("/params/contextId"),
                task: text("/params/id").or_else(|| text("/params/taskId")),
            },
        };
        let version = version(request).or_else(|| is_first.then(|| "1.0".to_owned()));
        let tenant = body.text("/params/tenant").unwrap_or_default();
        let base = Base { rpc: true, version: version.as_deref(), path: request.path, tenant };
        Some(Recognised { rpc_id: rpc_id(body), ..exchange(operation, named, &base) })
    }

    fn status_call(&self, run: &RunRef<'_>) -> Option<Call> {
        let base = Base::read(run.base)?;
        Some(if base.rpc {
            base.rpc_call("GetTask", "tasks/get", serde_json::json!({ "id": run.key, "historyLength": 0 }))
        } else {
            base.rest_call(Method::GET, run.key, "?historyLength=0")
        })
    }

    fn judge(&self, run: &RunRef<'_>, status: u16, body: &[u8]) -> Standing {
        let Some(base) = Base::read(run.base) else { return Standing::NoEvidence };
        match status {
            404 if !base.rpc => Standing::Ended(RunOutcome::Unknown),
            200 => answers::judge(base.rpc, body),
            _ => Standing::NoEvidence,
        }
    }

    fn cancel_call(&self, run: &RunRef<'_>, _how: Cancel) -> Option<Call> {
        let base = Base::read(run.base)?;
        Some(if base.rpc {
            base.rpc_call("CancelTask", "tasks/cancel", serde_json::json!({ "id": run.key }))
        } else {
            base.rest_call(Method::POST, run.key, ":cancel")
        })
    }

    /// For JSON-RPC alone: what REST callers read is a problem as it is.
    fn error_body(&self, error: &ProxyError, rpc_id: Option<&str>) -> Option<Vec<u8>> {
        let id = rpc_id.and_then(|id| serde_json::from_str::<serde_json::Value>(id).ok())?;
        let body = serde_json::json!({
            "jsonrpc": "2.0",
            "id": id,
            // Internal error (JSON-RPC 2.0 section 5.1).
            "error": { "code": -32603, "message": error.detail, "data": { "code": error.code.as_str() } },
        });
        Some(body.to_string().into_bytes())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// A message, answered whole or by a stream.
    Send,
    Get,
    Cancel,
    Subscribe,
    /// Lists, push configurations, the extended card.
    Other,
}

/// What a method of JSON-RPC is, and whether it is one of 1.0.
fn rpc_method(method: &str) -> Option<(Operation, bool)> {
    Some(match method {
        "SendMessage" | "SendStreamingMessage" => (Operation::Send, true),
        "GetTask" => (Operation::Get, true),
        "CancelTask" => (Operation::Cancel, true),
        "SubscribeToTask" => (Operation::Subscribe, true),
        "ListTasks" | "GetExtendedAgentCard" => (Operation::Other, true),
        "message/send" | "message/stream" => (Operation::Send, false),
        "tasks/get" => (Operation::Get, false),
        "tasks/cancel" => (Operation::Cancel, false),
        "tasks/resubscribe" => (Operation::Subscribe, false),
        "agent/getAuthenticatedExtendedCard" => (Operation::Other, false),
        _ if method.starts_with("tasks/pushNotificationConfig/") => (Operation::Other, false),
        _ if method.contains("TaskPushNotificationConfig") => (Operation::Other, true),
        _ => return None,
    })
}

/// What a path of REST names.
struct Place<'a> {
    operation: Operation,
    /// What stands before it: a mount, a tenant, `/v1` in 0.3.
    base: &'a str,
    /// Percent-decoded, as bodies tell it.
    task: Option<String>,
}

fn rest_place<'a>(request: &Request<'a>) -> Option<Place<'a>> {
    let posts = request.method == Method::POST;
    let sends = |name| request.path.strip_suffix(name).filter(|_| posts);
    if let Some(base) = sends("/message:send").or_else(|| sends("/message:stream")) {
        return Some(Place { operation: Operation::Send, base, task: None });
    }
    let (base, tail) = at_segment(request.path, "/tasks")?;
    let mut segments = tail.split('/').skip(2);
    let Some(first) = segments.next().filter(|first| !first.is_empty()) else {
        return (!posts).then_some(Place { operation: Operation::Other, base, task: None });
    };
    let (task, operation) = match (segments.next(), segments.next(), segments.next()) {
        (None, ..) => match (first.rsplit_once(':'), posts) {
            (Some((task, "cancel")), true) => (task, Operation::Cancel),
            (Some((task, "subscribe")), _) => (task, Operation::Subscribe),
            (_, false) => (first, Operation::Get),
            (_, true) => return None,
        },
        (Some("pushNotificationConfigs"), _, None) => (first, Operation::Other),
        _ => return None,
    };
    let task = percent_decode_str(task).decode_utf8().ok()?;
    Some(Place { operation, base, task: key(&task) })
}

/// Whom a request names.
struct Named {
    context: Option<String>,
    task: Option<String>,
}

fn exchange(operation: Operation, named: Named, base: &Base<'_>) -> Recognised {
    let role = match operation {
        Operation::Send => Role::Start,
        Operation::Get | Operation::Cancel => Role::Ask,
        Operation::Subscribe => Role::Join,
        Operation::Other => {
            return Recognised { session: named.context.or(named.task), ..Recognised::other() };
        }
    };
    let kind = match operation {
        Operation::Send => Kind::Start,
        Operation::Get => Kind::Read,
        Operation::Cancel => Kind::Cancel,
        _ => Kind::Join,
    };
    // A message can name a task, which then is what goes on if it is accepted. If not, that task is none the worse:
    // so the answer tells the run's key.
    let run = if kind == Kind::Start { None } else { named.task.clone() };
    // Requests that name only the task are for the session that the task was told as.
    let session = named.context.or(named.task);
    Recognised {
        kind,
        on_disconnect: OnDisconnect::GoesOn,
        base: base.write(),
        watch: Some(Box::new(Answer::new(role, base.rpc, session.clone(), run.clone()))),
        session,
        run,
        ..Recognised::other()
    }
}

fn version(request: &Request<'_>) -> Option<String> {
    let text = request.header(VERSION).map(str::to_owned).or_else(|| version_of_query(request))?;
    let is_version = |text: &String| {
        text.len() <= VERSION_BYTES_MAX && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.')
    };
    Some(text).filter(is_version).filter(|text| !text.is_empty())
}

fn version_of_query(request: &Request<'_>) -> Option<String> {
    request.query_value("A2A-Version")
}

/// The `id` as JSON.
fn rpc_id(body: &Extractor) -> Option<String> {
    match body.at("/id")? {
        Found::Text(text) => serde_json::to_string(text).ok(),
        Found::Word(word) => Some(word.to_owned()),
        Found::Container | Found::Unreadable => None,
    }
}

/// Where a task is asked about, and how.
struct Base<'a> {
    rpc: bool,
    version: Option<&'a str>,
    /// Of JSON-RPC the whole path, of REST what stands before `/tasks`.
    path: &'a str,
    tenant: &'a str,
}

impl<'a> Base<'a> {
    /// As [`RunRef::base`] holds it; empty where it is too long to be kept with every run.
    fn write(&self) -> String {
        let binding = if self.rpc { "rpc" } else { "rest" };
        let text = [binding, " ", self.version.unwrap_or_default(), " ", self.path, "\n", self.tenant].concat();
        if text.len() > KEY_BYTES_MAX { String::new() } else { text }
    }

    fn read(text: &'a str) -> Option<Base<'a>> {
        let (head, tenant) = text.split_once('\n')?;
        let (binding, rest) = head.split_once(' ')?;
        let (version, path) = rest.split_once(' ')?;
        Some(Base { rpc: binding == "rpc", version: Some(version).filter(|version| !version.is_empty()), path, tenant })
    }

    fn rpc_call(&self, method: &str, method_before: &str, mut params: serde_json::Value) -> Call {
        let is_first = self.version.is_some_and(|version| !version.starts_with("0."));
        if !self.tenant.is_empty() {
            params["tenant"] = self.tenant.into();
        }
        let method = if is_first { method } else { method_before };
        let body = serde_json::json!({ "jsonrpc": "2.0", "id": "longhaul", "method": method, "params": params });
        Call {
            method: Method::POST,
            target: self.path.to_owned(),
            fields: self.fields(),
            body: body.to_string().into_bytes(),
        }
    }

    fn rest_call(&self, method: Method, task: &str, suffix: &str) -> Call {
        let target = format!("{}/tasks/{}{suffix}", self.path, utf8_percent_encode(task, SEGMENT));
        Call { method, target, fields: self.fields(), body: Vec::new() }
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        self.version.iter().map(|version| (VERSION, (*version).to_owned())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;
    use crate::protocols::testing::{Asked, answer};
    use crate::protocols::{AtEnd, Fact};

    const JSON: (&str, &str) = ("content-type", "application/json");
    const EVENTS: (&str, &str) = ("content-type", "text/event-stream");
    const FIRST: (&str, &str) = ("A2A-Version", "1.0");
    const TASK: &str = "0199a1b2-0000-7000-8000-00000000000a";

    fn ask(line: &str, body: &str) -> Recognised {
        asked(Some(&A2a), line, &[], body).expect("it is A2A's")
    }

    fn asked(
        protocol: Option<&'static dyn Protocol>,
        line: &str,
        fields: &[(&str, &str)],
        body: &str,
    ) -> Option<Recognised> {
        let (method, target) = line.split_once(' ').expect("method and target");
        Asked { protocol, method, target, fields, body }.recognise()
    }

    fn call(method: &str, params: &str) -> String {
        format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{method}","params":{params}}}"#)
    }

    fn result(result: &str) -> String {
        format!(r#"{{"id":1,"jsonrpc":"2.0","result":{result}}}"#)
    }

    fn error(code: i32) -> String {
        format!(r#"{{"error":{{"code":{code},"message":"no"}},"id":1,"jsonrpc":"2.0"}}"#)
    }

    fn learned() -> Vec<Fact> {
        vec![Fact::Session("c".to_owned()), Fact::Session("t".to_owned()), Fact::Run("t".to_owned())]
    }

    fn learned_and(outcome: RunOutcome) -> Vec<Fact> {
        let mut facts = learned();
        facts.push(Fact::Ended(outcome));
        facts
    }

    #[test]
    fn kind_session_and_run_of_requests() {
        use Kind::{Cancel, Join, Other, Read, Start};
        let both = r#"{"message":{"parts":[{"text":"hi"}],"contextId":"c","taskId":"t"}}"#;
        let id = r#"{"id":"t"}"#;
        for (line, body, kind, session, run) in [
            ("POST /", call("message/send", r#"{"message":{"messageId":"m"}}"#), Start, None, None),
            ("POST /", call("message/stream", both), Start, Some("c"), None),
            ("POST /", call("SendMessage", both), Start, Some("c"), None),
            ("POST /", call("SendStreamingMessage", r#"{"message":{"taskId":"t"}}"#), Start, Some("t"), None),
            ("POST /x", call("tasks/get", id), Read, Some("t"), Some("t")),
            ("POST /x", call("GetTask", id), Read, Some("t"), Some("t")),
            ("POST /x", call("tasks/cancel", id), Cancel, Some("t"), Some("t")),
            ("POST /x", call("CancelTask", id), Cancel, Some("t"), Some("t")),
            ("POST /x", call("tasks/resubscribe", id), Join, Some("t"), Some("t")),
            ("POST /x", call("SubscribeToTask", id), Join, Some("t"), Some("t")),
            ("POST /x", call("ListTasks", r#"{"contextId":"c"}"#), Other, Some("c"), None),
            ("POST /x", call("tasks/pushNotificationConfig/set", r#"{"taskId":"t"}"#), Other, Some("t"), None),
            ("POST /x", call("CreateTaskPushNotificationConfig", r#"{"taskId":"t"}"#), Other, Some("t"), None),
            ("POST /x", call("agent/getAuthenticatedExtendedCard", "{}"), Other, None, None),
            ("POST /message:send", both.to_owned(), Start, Some("c"), None),
            ("POST /tenant/message:stream", both.to_owned(), Start, Some("c"), None),
            ("POST /v1/message:send", "{}".to_owned(), Start, None, None),
            ("GET /tasks/t", String::new(), Read, Some("t"), Some("t")),
            ("GET /v1/tasks/a%20b?historyLength=1", String::new(), Read, Some("a b"), Some("a b")),
            ("GET /tasks/t:subscribe", String::new(), Join, Some("t"), Some("t")),
            ("POST /v1/tasks/t:subscribe", String::new(), Join, Some("t"), Some("t")),
            ("POST /tasks/t:cancel", "{}".to_owned(), Cancel, Some("t"), Some("t")),
            ("GET /tasks?contextId=c&pageSize=1", String::new(), Other, Some("c"), None),
            ("POST /tasks/t/pushNotificationConfigs", "{}".to_owned(), Other, Some("t"), None),
            ("GET /tasks/t/pushNotificationConfigs/p", String::new(), Other, Some("t"), None),
            ("GET /.well-known/agent-card.json", String::new(), Other, None, None),
        ] {
            let recognised = ask(line, &body);
            assert_eq!(recognised.kind, kind, "{line} {body}");
            assert_eq!(recognised.session.as_deref(), session, "{line} {body}");
            assert_eq!(recognised.run.as_deref(), run, "{line} {body}");
            if kind != Other {
                assert_eq!(recognised.on_disconnect, OnDisconnect::GoesOn, "{line}");
            }
        }
        for (line, body) in [
            ("POST /", "{}"),
            ("POST /", r#"{"jsonrpc":"2.0","method":"tools/call","id":1}"#),
            ("POST /", "not JSON"),
            ("GET /", ""),
        ] {
            assert!(asked(Some(&A2a), line, &[], body).is_none(), "{line} {body}");
        }
    }

    #[test]
    fn auto_knows_it_by_header_path_and_shape() {
        let get = format!("GET /tasks/{TASK}");
        for (line, fields, body, ours) in [
            ("POST /", &[][..], call("message/send", "{}"), true),
            ("POST /", &[FIRST], call("SendMessage", "{}"), true),
            ("POST /?A2A-Version=1.0", &[], call("GetTask", "{}"), true),
            // MCP's tasks are called otherwise.
            ("POST /", &[], call("tasks/get", r#"{"id":"t"}"#), true),
            ("POST /", &[], call("tasks/get", r#"{"taskId":"t"}"#), false),
            ("POST /", &[], call("tasks/cancel", r#"{"taskId":"t"}"#), false),
            ("POST /", &[], call("tools/call", "{}"), false),
            ("POST /message:send", &[], "{}".to_owned(), true),
            ("GET /.well-known/agent-card.json", &[], String::new(), true),
            (&get, &[], String::new(), true),
            ("GET /tasks/42", &[], String::new(), false),
            ("GET /tasks/42", &[FIRST], String::new(), true),
            ("GET /tasks", &[], String::new(), false),
            ("POST /tasks", &[], "{}".to_owned(), false),
        ] {
            let found = asked(None, line, fields, &body).and_then(|found| found.protocol).map(Protocol::name);
            assert_eq!(found == Some("a2a"), ours, "{line} {body}");
        }
    }

    #[test]
    fn what_answers_to_messages_tell() {
        let first = |state| format!(r#"{{"task":{{"id":"t","contextId":"c","status":{{"state":"{state}"}}}}}}"#);
        let before = |state| {
            format!(
                r#"{{"artifacts":[{{"id":"x"}}],"contextId":"c","id":"t","kind":"task","status":{{"state":"{state}"}}}}"#
            )
        };
        let message = vec![Fact::Session("c".to_owned()), Fact::Ended(RunOutcome::Completed)];
        for (body, facts, end) in [
            (result(&first("TASK_STATE_COMPLETED")), learned_and(RunOutcome::Completed), AtEnd::GoesOn),
            (result(&first("TASK_STATE_FAILED")), learned_and(RunOutcome::Failed), AtEnd::GoesOn),
            (result(&first("TASK_STATE_REJECTED")), learned_and(RunOutcome::Failed), AtEnd::GoesOn),
            (result(&first("TASK_STATE_CANCELED")), learned_and(RunOutcome::Cancelled), AtEnd::GoesOn),
            (result(&first("TASK_STATE_INPUT_REQUIRED")), learned_and(RunOutcome::Completed), AtEnd::GoesOn),
            (result(&first("TASK_STATE_AUTH_REQUIRED")), learned_and(RunOutcome::Completed), AtEnd::GoesOn),
            // returnImmediately, or blocking: false.
            (result(&first("TASK_STATE_WORKING")), learned(), AtEnd::GoesOn),
            (result(&before("submitted")), learned(), AtEnd::GoesOn),
            (result(&before("completed")), learned_and(RunOutcome::Completed), AtEnd::GoesOn),
            (result(&before("input-required")), learned_and(RunOutcome::Completed), AtEnd::GoesOn),
            (
                result(r#"{"message":{"messageId":"m","contextId":"c"}}"#),
                message.clone(),
                AtEnd::Ended(RunOutcome::Unknown),
            ),
            (
                result(r#"{"kind":"message","messageId":"m","contextId":"c","taskId":"t"}"#),
                message.clone(),
                AtEnd::Ended(RunOutcome::Unknown),
            ),
            // Trap 9: an error in a 200.
            (error(-32009), vec![Fact::Ended(RunOutcome::Failed)], AtEnd::Ended(RunOutcome::Unknown)),
            ("[]".to_owned(), vec![], AtEnd::Ended(RunOutcome::Unknown)),
            ("{".to_owned(), vec![], AtEnd::Ended(RunOutcome::Unknown)),
        ] {
            let mut recognised = ask("POST /", &call("SendMessage", "{}"));
            assert_eq!(answer(&mut recognised, 200, &[JSON], &body), (facts, end), "{body}");
        }
        for (body, facts) in [
            (first("TASK_STATE_COMPLETED"), learned_and(RunOutcome::Completed)),
            (first("TASK_STATE_SUBMITTED"), learned()),
        ] {
            let mut recognised = ask("POST /message:send", "{}");
            assert_eq!(answer(&mut recognised, 200, &[("content-type", "application/a2a+json")], &body).0, facts);
        }
        let mut recognised = ask("POST /message:send", "{}");
        let told = answer(&mut recognised, 400, &[JSON], &first("TASK_STATE_COMPLETED"));
        assert_eq!(told, (vec![], AtEnd::Ended(RunOutcome::Completed)));
    }

    /// What is known already is not told again, and a message to a task that goes on tells of the same task.
    #[test]
    fn a_message_to_a_task_goes_on_with_it() {
        let body = result(r#"{"task":{"id":"t","contextId":"c","status":{"state":"TASK_STATE_WORKING"}}}"#);
        let mut recognised = ask("POST /", &call("SendMessage", r#"{"message":{"contextId":"c","taskId":"t"}}"#));
        let facts = vec![Fact::Session("t".to_owned()), Fact::Run("t".to_owned())];
        assert_eq!(answer(&mut recognised, 200, &[JSON], &body).0, facts);
    }

    #[test]
    fn streams_tell_a_task_and_its_end() {
        let first = r#"{"task":{"id":"t","contextId":"c","status":{"state":"TASK_STATE_SUBMITTED"}}}"#;
        let artifact = r#"{"artifactUpdate":{"taskId":"t","artifact":{"parts":[{"text":"{\"state\":\"TASK_STATE_FAILED\"} completed \"error\""}]}}}"#;
        let status = |state| {
            format!(
                r#"{{"statusUpdate":{{"taskId":"t","contextId":"c","status":{{"state" : "{state}","timestamp":"x"}}}}}}"#
            )
        };
        let before = |state, last| {
            format!(
                r#"{{"contextId":"c","final":{last},"kind":"status-update","status":{{"state":"{state}"}},"taskId":"t"}}"#
            )
        };
        let stream = |events: &[String]| events.iter().map(|data| format!("data: {data}\r\n\r\n")).collect::<String>();
        let artifact = artifact.to_owned();
        for (events, facts) in [
            (vec![first.to_owned(), artifact.clone(), status("TASK_STATE_WORKING")], learned()),
            (vec![status("TASK_STATE_WORKING"), status("TASK_STATE_COMPLETED")], learned_and(RunOutcome::Completed)),
            (
                vec![artifact.clone(), status("TASK_STATE_FAILED")],
                vec![
                    Fact::Session("t".to_owned()),
                    Fact::Run("t".to_owned()),
                    Fact::Session("c".to_owned()),
                    Fact::Ended(RunOutcome::Failed),
                ],
            ),
            (
                vec![r#"{"kind":"artifact-update","taskId":"t"}"#.to_owned(), before("failed", true)],
                vec![
                    Fact::Session("t".to_owned()),
                    Fact::Run("t".to_owned()),
                    Fact::Session("c".to_owned()),
                    Fact::Ended(RunOutcome::Failed),
                ],
            ),
            (vec![first.to_owned(), status("TASK_STATE_INPUT_REQUIRED")], learned_and(RunOutcome::Completed)),
            // 0.3; its compatible server said `final: false` at a pause.
            (vec![before("working", false), before("input-required", false)], learned_and(RunOutcome::Completed)),
            (vec![before("submitted", false), before("canceled", true)], learned_and(RunOutcome::Cancelled)),
            (vec![before("submitted", false), before("working", true)], learned_and(RunOutcome::Completed)),
        ] {
            for (line, body, wrap) in
                [("POST /", call("SendStreamingMessage", "{}"), true), ("POST /message:stream", "{}".to_owned(), false)]
            {
                let events: Vec<String> =
                    events.iter().map(|event| if wrap { result(event) } else { event.clone() }).collect();
                let told = answer(&mut ask(line, &body), 200, &[EVENTS], &stream(&events));
                assert_eq!(told, (facts.clone(), AtEnd::GoesOn), "{line} {events:?}");
            }
        }
        let joined = |events: &str| {
            answer(&mut ask("POST /", &call("tasks/resubscribe", r#"{"id":"t"}"#)), 200, &[EVENTS], events)
        };
        // The request knows the task alone, and its end is the first to tell the context.
        let named = call("message/stream", r#"{"message":{"taskId":"t"}}"#);
        let events = [r#"{"kind":"artifact-update","taskId":"t"}"#.to_owned(), before("failed", true)];
        let events: Vec<String> = events.iter().map(|event| result(event)).collect();
        let (facts, _) = answer(&mut ask("POST /", &named), 200, &[EVENTS], &stream(&events));
        let failed = Fact::Ended(RunOutcome::Failed);
        assert_eq!(facts, [Fact::Run("t".to_owned()), Fact::Session("c".to_owned()), failed]);
        // A value that is cut is none.
        let cut = r#"{"result":{"taskId":"t","contextId":"c","status":{"state":"failed"#;
        assert_eq!(joined(&stream(&[cut.to_owned()])), (vec![], AtEnd::GoesOn));
        let streaming = call("message/stream", "{}");
        let (facts, end) = answer(&mut ask("POST /", &streaming), 200, &[EVENTS], &stream(&[error(-32603)]));
        assert_eq!((facts, end), (vec![Fact::Ended(RunOutcome::Failed)], AtEnd::Ended(RunOutcome::Truncated)));
        let (facts, _) = answer(&mut ask("POST /message:stream", "{}"), 200, &[EVENTS], "event: error\ndata: {}\n\n");
        assert_eq!(facts, [Fact::Ended(RunOutcome::Failed)]);

        let working = stream(&[result(&before("working", false))]);
        assert_eq!(joined(&working), (vec![], AtEnd::GoesOn));
        let completed = stream(&[result(&before("working", false)), result(&before("completed", true))]);
        assert_eq!(joined(&completed).0, [Fact::Ended(RunOutcome::Completed)]);
        // It can't be joined, since it has ended: with what outcome is to be asked.
        assert_eq!(joined(&stream(&[error(-32004)])), (vec![], AtEnd::GoesOn));
        assert_eq!(joined(&stream(&[error(-32001)])).0, [Fact::Ended(RunOutcome::Unknown)]);
    }

    #[test]
    fn what_reads_and_cancels_tell() {
        let task = |state| format!(r#"{{"id":"t","contextId":"c","status":{{"state":"{state}"}}}}"#);
        let ended = |outcome| vec![Fact::RunEnded("t".to_owned(), outcome)];
        for (state, facts) in [
            ("TASK_STATE_WORKING", vec![Fact::RunAlive("t".to_owned())]),
            ("submitted", vec![Fact::RunAlive("t".to_owned())]),
            ("TASK_STATE_COMPLETED", ended(RunOutcome::Completed)),
            ("failed", ended(RunOutcome::Failed)),
            ("canceled", ended(RunOutcome::Cancelled)),
            ("input-required", ended(RunOutcome::Completed)),
            ("TASK_STATE_UNSPECIFIED", vec![]),
        ] {
            for method in ["tasks/get", "GetTask", "tasks/cancel", "CancelTask"] {
                let mut recognised = ask("POST /", &call(method, r#"{"id":"t"}"#));
                let told = answer(&mut recognised, 200, &[JSON], &result(&task(state)));
                assert_eq!(told, (facts.clone(), AtEnd::GoesOn), "{method} {state}");
            }
            for line in ["GET /tasks/t", "POST /v1/tasks/t:cancel"] {
                assert_eq!(answer(&mut ask(line, ""), 200, &[JSON], &task(state)).0, facts, "{line} {state}");
            }
        }
        let unknown = ended(RunOutcome::Unknown);
        let mut recognised = ask("POST /", &call("tasks/get", r#"{"id":"t"}"#));
        assert_eq!(answer(&mut recognised, 200, &[JSON], &error(-32001)).0, unknown);
        assert_eq!(answer(&mut ask("GET /tasks/t", ""), 404, &[JSON], "{}").0, unknown);
        let mut recognised = ask("POST /", &call("tasks/cancel", r#"{"id":"t"}"#));
        assert_eq!(answer(&mut recognised, 200, &[JSON], &error(-32002)).0, []);
    }

    #[test]
    fn tasks_are_asked_about_in_the_form_in_which_they_began() {
        for (line, fields, body, status, cancel) in [
            (
                "POST /agent",
                &[][..],
                call("message/send", "{}"),
                (
                    "POST /agent",
                    "",
                    r#"{"id":"longhaul","jsonrpc":"2.0","method":"tasks/get","params":{"historyLength":0,"id":"t /"}}"#,
                ),
                (
                    "POST /agent",
                    "",
                    r#"{"id":"longhaul","jsonrpc":"2.0","method":"tasks/cancel","params":{"id":"t /"}}"#,
                ),
            ),
            (
                "POST /",
                &[FIRST],
                call("SendMessage", r#"{"tenant":"a b"}"#),
                (
                    "POST /",
                    "1.0",
                    r#"{"id":"longhaul","jsonrpc":"2.0","method":"GetTask","params":{"historyLength":0,"id":"t /","tenant":"a b"}}"#,
                ),
                (
                    "POST /",
                    "1.0",
                    r#"{"id":"longhaul","jsonrpc":"2.0","method":"CancelTask","params":{"id":"t /","tenant":"a b"}}"#,
                ),
            ),
            (
                "POST /v1/message:send",
                &[],
                "{}".to_owned(),
                ("GET /v1/tasks/t%20%2F?historyLength=0", "", ""),
                ("POST /v1/tasks/t%20%2F:cancel", "", ""),
            ),
            (
                "POST /tenant/message:stream",
                &[FIRST],
                "{}".to_owned(),
                ("GET /tenant/tasks/t%20%2F?historyLength=0", "1.0", ""),
                ("POST /tenant/tasks/t%20%2F:cancel", "1.0", ""),
            ),
        ] {
            let base = asked(Some(&A2a), line, fields, &body).expect("A2A's").base;
            let run = RunRef { base: &base, key: "t /" };
            for (call, (line, version, body)) in
                [(A2a.status_call(&run), status), (A2a.cancel_call(&run, Cancel::Rollback), cancel)]
            {
                let call = call.expect("it can be asked");
                assert_eq!(format!("{} {}", call.method, call.target), line);
                assert_eq!(String::from_utf8(call.body).expect("text"), body);
                let versions: Vec<&str> = call.fields.iter().map(|(_, value)| value.as_str()).collect();
                assert_eq!(versions.concat(), version);
            }
        }
        assert_eq!(A2a.status_call(&RunRef { base: "", key: "t" }), None);
    }

    #[test]
    fn standing_of_asked_tasks() {
        let task = r#"{"id":"t","status":{"state":"TASK_STATE_WORKING"}}"#;
        let paused = r#"{"id":"t","kind":"task","status":{"state":"auth-required"}}"#;
        for (base, status, body, standing) in [
            ("rpc  /\n", 200, result(task), Standing::Running),
            ("rpc  /\n", 200, result(paused), Standing::Ended(RunOutcome::Completed)),
            ("rpc  /\n", 200, error(-32001), Standing::Ended(RunOutcome::Unknown)),
            ("rpc  /\n", 200, error(-32603), Standing::NoEvidence),
            ("rpc  /\n", 404, "{}".to_owned(), Standing::NoEvidence),
            ("rest  \n", 200, task.to_owned(), Standing::Running),
            ("rest  \n", 404, "{}".to_owned(), Standing::Ended(RunOutcome::Unknown)),
            ("rest  \n", 200, "<html>".to_owned(), Standing::NoEvidence),
            ("", 404, "{}".to_owned(), Standing::NoEvidence),
        ] {
            assert_eq!(A2a.judge(&RunRef { base, key: "t" }, status, body.as_bytes()), standing, "{base} {body}");
        }
    }

    /// Trap 18: `1` and `"1"` are different ids.
    #[test]
    fn errors_of_ours_are_answers_to_their_request() {
        let error = ProxyError::new(Code::NoEndpoint, "No endpoint is ready.");
        for (id, written) in [("1", "1"), (r#""1""#, r#""1""#), (r#""\u0000é""#, r#""\u0000é""#), ("null", "none")] {
            let body = format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"message/send","params":{{}}}}"#);
            let rpc_id = ask("POST /", &body).rpc_id;
            assert_eq!(rpc_id.as_deref().unwrap_or("none"), written);
            let Some(body) = A2a.error_body(&error, rpc_id.as_deref()) else { continue };
            let answer: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
            assert_eq!(answer["id"], serde_json::from_str::<serde_json::Value>(id).expect("JSON"));
            assert_eq!(answer["error"]["data"]["code"], "no_endpoint");
        }
        assert_eq!(A2a.error_body(&error, None), None);
    }

    #[test]
    fn long_ids_are_no_keys() {
        let long = "x".repeat(1 << 20);
        let body = call("SendMessage", &format!(r#"{{"tenant":"{long}","message":{{"contextId":"{long}"}}}}"#));
        let recognised = ask("POST /", &body);
        assert_eq!((recognised.session, recognised.run), (None, None));
        let recognised = ask(&format!("GET /{long}/tasks/{long}"), "");
        assert_eq!((recognised.session, recognised.run, recognised.base), (None, None, String::new()));
    }
}
