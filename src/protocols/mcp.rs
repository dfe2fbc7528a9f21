//! MCP (Model Context Protocol) over HTTP: sessions of 2025-03-26 to 2025-11-25, none in 2026-07-28, HTTP+SSE of 2024-11-05.
//!
//! A run is a `tools/call`. Everything else (lists, gets, pings, notifications, the client's answers to what the server
//! asks) only has to reach the session's endpoint.

mod base;
mod call;
mod legacy;
mod listen;
mod tasks;

use std::sync::{Arc, LazyLock};

use http::Method;

use crate::error::ProxyError;
use crate::json::{Extractor, Found, Pointers};
use crate::protocols::{
    Call, Cancel, KEY_BYTES_MAX, OnDisconnect, Protocol, Recognised, Request, RunRef, Sign, Standing, key,
};

pub use legacy::rewrite_endpoint_event;

/// So many messages of a batch are looked at (JSON-RPC batches exist in 2025-03-26 only). What comes behind passes
/// uncounted.
const BATCH_MESSAGES_MAX: usize = 8;

/// Model Context Protocol.
pub struct Mcp;

impl Protocol for Mcp {
    fn name(&self) -> &'static str {
        "mcp"
    }

    fn sign(&self, request: &Request<'_>) -> Sign {
        if !matches!(*request.method, Method::POST | Method::GET | Method::DELETE) {
            return Sign::None;
        }
        if MARKS.iter().any(|name| request.fields.contains(name)) {
            return Sign::Mark;
        }
        let is_path = match request.segments().next_back() {
            Some("mcp") => true,
            Some("sse") => *request.method == Method::GET,
            _ => false,
        };
        if is_path || legacy::is_message(request) { Sign::Path } else { Sign::None }
    }

    fn has_shape(&self, _request: &Request<'_>, body: &Extractor) -> bool {
        body.text("/jsonrpc") == Some("2.0")
            && body.text("/method").is_some_and(|method| match method {
                "initialize"
                | "ping"
                | "server/discover"
                | "subscriptions/listen"
                | "logging/setLevel"
                | "completion/complete" => true,
                // A2A 0.3 has methods of this name, whose tasks are called `id`.
                _ if method.starts_with("tasks/") => body.has("/params/taskId"),
                _ => METHODS.iter().any(|prefix| method.starts_with(prefix)),
            })
    }

    fn shape(&self) -> &'static [&'static str] {
        &["/jsonrpc", "/method", "/id", "/params/requestId", "/params/taskId"]
    }

    fn wants(&self, request: &Request<'_>) -> Option<&'static Arc<Pointers>> {
        if *request.method != Method::POST {
            return None;
        }
        match method_in_head(request) {
            Some(method) if !method.starts_with("tasks/") => None,
            _ if may_be_batch(request) => Some(&MESSAGE_OR_BATCH),
            _ => Some(&MESSAGE),
        }
    }

    fn recognise(&self, request: &Request<'_>, body: Option<&Extractor>) -> Option<Recognised> {
        match *request.method {
            Method::POST => Some(post(request, body)),
            Method::GET => listen::recognise(request),
            Method::DELETE => Some(call::end_session(request)),
            _ => None,
        }
    }

    fn status_call(&self, run: &RunRef<'_>) -> Option<Call> {
        tasks::status_call(run)
    }

    fn judge(&self, run: &RunRef<'_>, status: u16, body: &[u8]) -> Standing {
        tasks::judge(run, status, body)
    }

    fn cancel_call(&self, run: &RunRef<'_>, _how: Cancel) -> Option<Call> {
        call::cancel_call(run).or_else(|| tasks::cancel_call(run))
    }

    /// A JSON-RPC error (server-defined code) that carries our own code as data.
    fn error_body(&self, error: &ProxyError, rpc_id: Option<&str>) -> Option<Vec<u8>> {
        let message = serde_json::to_string(&error.detail).ok()?;
        let (id, code) = (rpc_id.unwrap_or("null"), error.code.as_str());
        let body = format!(
            r#"{{"jsonrpc":"2.0","id":{id},"error":{{"code":-32000,"message":{message},"data":{{"code":"{code}"}}}}}}"#
        );
        Some(body.into_bytes())
    }
}

const MARKS: [&str; 3] = ["mcp-protocol-version", "mcp-session-id", "mcp-method"];

/// How MCP's other methods begin.
const METHODS: [&str; 4] = ["tools/", "notifications/", "resources/", "prompts/"];

static MESSAGE: LazyLock<Arc<Pointers>> =
    LazyLock::new(|| Arc::new(Pointers::new(["/method", "/id", "/params/requestId", "/params/taskId"])));

/// Method and id of every message of a batch.
const BATCH: [[&str; 2]; BATCH_MESSAGES_MAX] = [
    ["/0/method", "/0/id"],
    ["/1/method", "/1/id"],
    ["/2/method", "/2/id"],
    ["/3/method", "/3/id"],
    ["/4/method", "/4/id"],
    ["/5/method", "/5/id"],
    ["/6/method", "/6/id"],
    ["/7/method", "/7/id"],
];

static MESSAGE_OR_BATCH: LazyLock<Arc<Pointers>> = LazyLock::new(|| {
    let single = ["/method", "/id", "/params/requestId", "/params/taskId"];
    Arc::new(Pointers::new(single.into_iter().chain(BATCH.into_iter().flatten())))
});

/// The version whose servers refuse headers that differ from the body, so that headers can be believed. It knows no
/// sessions.
const STATELESS: &str = "2026-07-28";

/// The first version with a header of its own: a request without one is older, and only the oldest has batches.
const BATCHES: &str = "2025-03-26";

fn version<'a>(request: &Request<'a>) -> Option<&'a str> {
    request.fields.get("mcp-protocol-version").and_then(|value| std::str::from_utf8(value).ok()).map(str::trim)
}

fn is_stateless(request: &Request<'_>) -> bool {
    version(request) == Some(STATELESS)
}

/// `Mcp-Method`, where it can be believed.
fn method_in_head<'a>(request: &'a Request<'_>) -> Option<&'a str> {
    if is_stateless(request) { request.header("mcp-method") } else { None }
}

/// A batch needs a session here: without one nobody could tell its runs apart later.
fn may_be_batch(request: &Request<'_>) -> bool {
    request.fields.contains("mcp-session-id") && version(request).is_none_or(|version| version == BATCHES)
}

/// The session of a request, wherever its version has it.
fn session(request: &Request<'_>) -> Option<String> {
    if is_stateless(request) {
        return None;
    }
    match request.header("mcp-session-id") {
        Some(id) => key(id),
        None if *request.method == Method::POST => legacy::session(request),
        None => None,
    }
}

fn post(request: &Request<'_>, body: Option<&Extractor>) -> Recognised {
    let session = session(request);
    let in_session = |recognised: Recognised| Recognised {
        bound: session.is_some() || recognised.creates_session,
        session: session.clone(),
        rpc_id: recognised.rpc_id.or_else(|| body.and_then(|body| rpc_id(body.at("/id")))),
        ..recognised
    };
    if may_be_batch(request)
        && let Some(body) = body
        && let Some(batch) = call::batch(request, session.as_deref(), body)
    {
        return in_session(batch);
    }
    let method = method_in_head(request).or_else(|| body.and_then(|body| body.text("/method")));
    let id = body.and_then(|body| rpc_id(body.at("/id")));
    in_session(match (method, &id) {
        (Some("tools/call"), _) => call::start(request, session.as_deref(), id.clone()),
        (Some("initialize"), _) => Recognised {
            creates_session: session.is_none(),
            watch: Some(Box::new(call::Initialize)),
            ..Recognised::other()
        },
        (Some("notifications/cancelled"), _) => {
            let run = session.as_deref().and_then(|session| {
                let request_id = rpc_id(body?.at("/params/requestId"))?;
                call_key(session, &request_id)
            });
            call::cancel(session.is_some(), run)
        }
        (Some(method), _) if method.starts_with("tasks/") => tasks::recognise(request, method, session.is_some(), body),
        // An answer to what the server asked (no method, but an id), or one of the many small requests.
        (Some(_), _) | (None, Some(_)) => {
            Recognised { watch: Some(Box::new(call::Small::new(session.is_some()))), ..Recognised::other() }
        }
        // It can't be read: it counts as a run for as long as it lasts.
        (None, None) => Recognised {
            on_disconnect: OnDisconnect::Ends,
            run: None,
            ..call::start(request, session.as_deref(), None)
        },
    })
}

/// A JSON-RPC id as JSON: the number 1 is not the string "1".
fn rpc_id(found: Option<Found<'_>>) -> Option<String> {
    match found? {
        Found::Text(text) => serde_json::to_string(text).ok(),
        Found::Word(word) => (word != "true" && word != "false").then(|| word.to_owned()),
        Found::Container | Found::Unreadable => None,
    }
}

/// The key of a run that is a call: JSON-RPC ids are unique within their session only.
fn call_key(session: &str, rpc_id: &str) -> Option<String> {
    // The first space tells where the session ends; a real session id is visible ASCII and has none.
    (session.len() + 1 + rpc_id.len() <= KEY_BYTES_MAX && !session.contains(' ')).then(|| format!("{session} {rpc_id}"))
}

/// Session and JSON-RPC id of such a key; `None`: the run is a task.
fn call_of_key(key: &str) -> Option<(&str, &str)> {
    key.split_once(' ')
}

#[cfg(test)]
mod tests {
    use crate::error::{Code, ProxyError};
    use crate::protocols::recorded::{auto, recognised, told, told_until_cut, words};
    use crate::protocols::{AtEnd, Call, Cancel, Fact, OnDisconnect, Protocol, RunRef, Standing};
    use crate::run::{Kind, RunOutcome};

    use super::Mcp;
    use super::base::{header_value, text_of_header};

    const SSE: &str = "200 content-type: text/event-stream";
    const JSON: &str = "200 content-type: application/json";

    /// A POST of the session era as the SDKs send it.
    fn in_session(body: &str) -> String {
        format!(
            "POST /mcp\naccept: application/json, text/event-stream\nmcp-protocol-version: 2025-11-25\n\
             mcp-session-id: s1\n\n{body}"
        )
    }

    fn stateless(method: &str, body: &str) -> String {
        format!("POST /mcp\nmcp-protocol-version: 2026-07-28\nmcp-method: {method}\n\n{body}")
    }

    fn call(id: &str) -> String {
        format!(
            r#"{{"method":"tools/call","params":{{"name":"slow","arguments":{{"id":7}}}},"jsonrpc":"2.0","id":{id}}}"#
        )
    }

    fn run_ended(key: &str, outcome: RunOutcome) -> Fact {
        Fact::RunEnded(key.to_owned(), outcome)
    }

    #[test]
    fn what_a_request_of_the_session_era_is() {
        for (body, kind, run) in [
            (call("1"), Kind::Start, Some("s1 1")),
            (call(r#""1""#), Kind::Start, Some(r#"s1 "1""#)),
            (call(r#""a b\"c""#), Kind::Start, Some(r#"s1 "a b\"c""#)),
            (r#"{"jsonrpc":"2.0","id":2,"method":"tools/list"}"#.to_owned(), Kind::Other, None),
            (r#"{"jsonrpc":"2.0","id":2,"method":"prompts/get","params":{"name":"x"}}"#.to_owned(), Kind::Other, None),
            (r#"{"jsonrpc":"2.0","id":2,"method":"ping"}"#.to_owned(), Kind::Other, None),
            (r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#.to_owned(), Kind::Other, None),
            (
                r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}"#.to_owned(),
                Kind::Cancel,
                Some("s1 1"),
            ),
            (
                r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":"1"}}"#.to_owned(),
                Kind::Cancel,
                Some(r#"s1 "1""#),
            ),
            // An answer to what the server asked.
            (r#"{"jsonrpc":"2.0","id":0,"result":{"role":"assistant"}}"#.to_owned(), Kind::Other, None),
            (
                r#"{"jsonrpc":"2.0","id":5,"method":"tasks/get","params":{"taskId":"t1"}}"#.to_owned(),
                Kind::Read,
                Some("t1"),
            ),
            (
                r#"{"jsonrpc":"2.0","id":5,"method":"tasks/result","params":{"taskId":"t1"}}"#.to_owned(),
                Kind::Join,
                Some("t1"),
            ),
            // It can't be read, so it counts while it lasts.
            (r#"{"jsonrpc":"2.0","#.to_owned(), Kind::Start, None),
        ] {
            let recognised = recognised("mcp", &in_session(&body));
            assert_eq!(words(&recognised), (kind, Some("s1"), run), "{body}");
            assert!(recognised.bound && !recognised.creates_session, "{body}");
            let expected = match (kind, run) {
                (Kind::Start, Some(_)) => OnDisconnect::GoesOn,
                _ => OnDisconnect::Ends,
            };
            assert_eq!(recognised.on_disconnect, expected, "{body}");
            assert_eq!(auto(&in_session(&body)), "mcp", "{body}");
        }
    }

    #[test]
    fn a_session_is_learned_from_a_successful_initialize_alone() {
        let text = "POST /mcp\n\n{\"jsonrpc\":\"2.0\",\"id\":0,\"method\":\"initialize\",\"params\":{}}";
        assert_eq!(auto(text), "mcp");
        for (head, learned) in [
            ("200 content-type: text/event-stream, mcp-session-id: abc", Some("abc")),
            ("200 content-type: application/json, Mcp-Session-Id: abc", Some("abc")),
            ("200 content-type: application/json", None),
            // Trap 1: the Python SDK's `Missing session ID` carries a session that does not exist.
            ("400 content-type: application/json, mcp-session-id: bogus", None),
            ("503 mcp-session-id: bogus", None),
        ] {
            let mut initialize = recognised("mcp", text);
            assert_eq!(words(&initialize), (Kind::Other, None, None));
            assert!(initialize.creates_session && initialize.bound);
            let facts = told(&mut initialize, head, "").0;
            assert_eq!(facts, learned.map(|id| Fact::Session(id.to_owned())).into_iter().collect::<Vec<_>>(), "{head}");
        }
        // And from no other answer.
        let mut list = recognised("mcp", "POST /mcp\n\n{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/list\"}");
        assert_eq!(told(&mut list, "200 mcp-session-id: abc", "").0, []);
    }

    #[test]
    fn a_call_ends_by_its_own_answer() {
        let ended = |outcome| vec![Fact::Ended(outcome)];
        let progress =
            r#"{"method":"notifications/progress","params":{"progressToken":1,"progress":2},"jsonrpc":"2.0"}"#;
        for (head, body, facts) in [
            (JSON, r#"{"jsonrpc":"2.0","id":1,"result":{"content":[]}}"#, ended(RunOutcome::Completed)),
            (JSON, r#"{"result":{"content":[],"isError":true},"jsonrpc":"2.0","id":1}"#, ended(RunOutcome::Completed)),
            (JSON, r#"{"jsonrpc":"2.0","id":1,"error":{"code":-32602,"message":"m"}}"#, ended(RunOutcome::Failed)),
            (JSON, r#"{"jsonrpc":"2.0","id":1,"error":{"code":-32800,"message":"m"}}"#, ended(RunOutcome::Cancelled)),
            (
                SSE,
                "event: message\r\ndata: {\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{}}\r\n\r\n",
                ended(RunOutcome::Completed),
            ),
            // A priming event, then what the server asks (with the same id, and it says "result"), then the answer.
            (
                SSE,
                "id: 0\nretry: 500\ndata:\n\ndata: {\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"sampling/createMessage\",\
                 \"params\":{\"x\":\"result\"}}\n\ndata: {\"jsonrpc\":\"2.0\",\"id\":1,\"error\":{\"code\":1}}\n\n",
                ended(RunOutcome::Failed),
            ),
            // Trap 18: the answer to "1" is not that to 1.
            (
                SSE,
                "data: {\"jsonrpc\":\"2.0\",\"id\":\"1\",\"result\":{}}\n\n",
                vec![run_ended(r#"s1 "1""#, RunOutcome::Completed)],
            ),
            (SSE, &format!("data: {progress}\n\n"), vec![]),
        ] {
            let mut call = recognised("mcp", &in_session(&call("1")));
            let (told, end) = told(&mut call, head, body);
            assert_eq!(told, facts, "{body}");
            // The answer may still come on another stream.
            assert!(end == AtEnd::GoesOn || head == JSON, "{body}");
        }
    }

    #[test]
    fn a_large_result_before_the_id_ends_the_call_all_the_same() {
        let mut call = recognised("mcp", &in_session(&call("1")));
        let large = "x".repeat(100_000);
        let body = format!("data: {{\"result\":{{\"content\":\"{large}\"}},\"jsonrpc\":\"2.0\",\"id\":1}}\n\n");
        assert_eq!(told(&mut call, SSE, &body).0, [Fact::Ended(RunOutcome::Completed)]);
    }

    /// Trap 2.
    #[test]
    fn a_404_says_session_lost_in_the_session_era_only() {
        let lost = [Fact::SessionRunsEnded(RunOutcome::Unknown), Fact::SessionLost];
        for body in [call("1"), r#"{"jsonrpc":"2.0","id":2,"method":"tools/list"}"#.to_owned()] {
            let mut request = recognised("mcp", &in_session(&body));
            assert_eq!(told(&mut request, "404 content-type: application/json", "{}").0, lost, "{body}");
        }
        let mut get = recognised("mcp", "GET /mcp\naccept: text/event-stream\nmcp-session-id: s1");
        assert_eq!(told(&mut get, "404", "").0, lost);
        let mut call = recognised("mcp", &stateless("tools/call", &call("1")));
        let body = r#"{"jsonrpc":"2.0","id":1,"error":{"code":-32601,"message":"Method not found"}}"#;
        let answer = told(&mut call, "404 content-type: application/json", body);
        assert_eq!(answer, (vec![], AtEnd::Ended(RunOutcome::Completed)));
    }

    #[test]
    fn a_delete_ends_the_session_and_its_runs() {
        let delete = || recognised("mcp", "DELETE /mcp\nmcp-session-id: s1");
        assert_eq!(words(&delete()), (Kind::Other, Some("s1"), None));
        let ended = [Fact::SessionRunsEnded(RunOutcome::Cancelled), Fact::SessionLost];
        assert_eq!(told(&mut delete(), "200", "").0, ended);
        assert_eq!(told(&mut delete(), "405", "").0, []);
        assert_eq!(told(&mut delete(), "404", "").0.last(), Some(&Fact::SessionLost));
    }

    #[test]
    fn an_idle_stream_is_no_run_and_a_resumed_one_tells_the_ends_of_calls() {
        let text = "GET /mcp\naccept: text/event-stream\nmcp-session-id: s1\nlast-event-id: 4";
        let mut get = recognised("mcp", text);
        assert_eq!(words(&get), (Kind::Other, Some("s1"), None));
        assert!(get.bound && !get.creates_session);
        let body = "data: {\"jsonrpc\":\"2.0\",\"id\":3,\"result\":{}}\n\ndata: {\"jsonrpc\":\"2.0\",\"id\":\"x\",\"error\":{}}\n\n\
                    data: {\"jsonrpc\":\"2.0\",\"id\":9,\"method\":\"roots/list\"}\n\n\
                    data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/tasks/status\",\"params\":{\"taskId\":\"t\",\"status\":\"failed\"}}\n\n";
        let facts = [
            run_ended("s1 3", RunOutcome::Completed),
            run_ended(r#"s1 "x""#, RunOutcome::Failed),
            run_ended("t", RunOutcome::Failed),
        ];
        assert_eq!(told(&mut get, SSE, body), (facts.to_vec(), AtEnd::GoesOn));
        // Its end is not the session's.
        assert_eq!(told_until_cut(&mut recognised("mcp", text), SSE, ""), []);
    }

    #[test]
    fn a_cancel_that_the_server_takes_ends_the_run() {
        let text = in_session(r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}"#);
        assert_eq!(told(&mut recognised("mcp", &text), "202", "").0, [run_ended("s1 1", RunOutcome::Cancelled)]);
        assert_eq!(told(&mut recognised("mcp", &text), "500", "").0, []);
    }

    #[test]
    fn every_call_of_a_batch_is_a_run() {
        let text = format!(
            "POST /mcp\nmcp-session-id: s1\n\n[{},{},{},{}]",
            r#"{"jsonrpc":"2.0","id":1,"method":"ping"}"#,
            call("2"),
            call("3"),
            call(r#""4""#)
        );
        let started = ["s1 3", r#"s1 "4""#].map(|key| Fact::RunStarted(key.to_owned()));
        let batch = || recognised("mcp", &text);
        assert_eq!(words(&batch()), (Kind::Start, Some("s1"), Some("s1 2")));
        let one = |id: &str, rest: &str| format!(r#"{{"jsonrpc":"2.0","id":{id},{rest}}}"#);
        let (ok, bad) = (r#""result":{}"#, r#""error":{"code":1}"#);

        let body = format!("[{},{},{}]", one("3", bad), one("2", ok), one(r#""4""#, ok));
        let ends = [
            run_ended("s1 3", RunOutcome::Failed),
            Fact::Ended(RunOutcome::Completed),
            run_ended(r#"s1 "4""#, RunOutcome::Completed),
        ];
        let facts: Vec<Fact> = started.iter().chain(&ends).cloned().collect();
        assert_eq!(told(&mut batch(), JSON, &body).0, facts);
        // A stream may have arrays as well as single answers.
        let body = format!("data: [{},{}]\n\ndata: {}\n\n", one("3", bad), one("2", ok), one(r#""4""#, ok));
        assert_eq!(told(&mut batch(), SSE, &body).0, facts);
        // What is not taken has not begun.
        assert_eq!(told(&mut batch(), "400", ""), (vec![], AtEnd::Ended(RunOutcome::Completed)));
        // A batch without calls is no run; a version without batches has none.
        let pings = "POST /mcp\nmcp-session-id: s1\n\n[{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}]";
        assert_eq!(words(&recognised("mcp", pings)), (Kind::Other, Some("s1"), None));
    }

    #[test]
    fn a_server_without_sessions_ends_its_runs_with_their_exchanges() {
        let text = format!("POST /mcp\nmcp-protocol-version: 2025-06-18\n\n{}", call("1"));
        let mut call = recognised("mcp", &text);
        assert_eq!(words(&call), (Kind::Start, None, None));
        assert_eq!((call.bound, call.on_disconnect), (false, OnDisconnect::Ends));
        let (facts, end) = told(&mut call, SSE, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/message\"}\n\n");
        assert_eq!((facts, end), (vec![], AtEnd::Ended(RunOutcome::Truncated)));
    }

    #[test]
    fn headers_decide_in_the_stateless_version_alone() {
        // The body would say otherwise; nobody looks.
        let text = stateless("tools/call", r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#);
        let start = recognised("mcp", &text);
        assert_eq!((words(&start), start.on_disconnect), ((Kind::Start, None, None), OnDisconnect::Ends));
        for method in ["subscriptions/listen", "server/discover", "tools/list"] {
            assert_eq!(
                words(&recognised("mcp", &stateless(method, &call("1")))),
                (Kind::Other, None, None),
                "{method}"
            );
        }
        // A session that such a version does not know is none.
        let text = text.replace("mcp-method", "mcp-session-id: s1\nmcp-method");
        assert!(recognised("mcp", &text).session.is_none());
        // Any other version: the body.
        let text = text.replace("2026-07-28", "2025-11-25");
        assert_eq!(words(&recognised("mcp", &text)), (Kind::Other, Some("s1"), None));
    }

    #[test]
    fn a_call_may_become_a_task() {
        let body =
            r#"{"jsonrpc":"2.0","id":1,"result":{"resultType":"task","taskId":"t1","status":"working","ttlMs":1}}"#;
        let mut call_now = recognised("mcp", &stateless("tools/call", &call("1")));
        assert_eq!(told(&mut call_now, JSON, body), (vec![Fact::Run("t1".to_owned())], AtEnd::GoesOn));
        let body = r#"{"jsonrpc":"2.0","id":1,"result":{"task":{"taskId":"t1","status":"working"}}}"#;
        let mut call_then = recognised("mcp", &in_session(&call("1")));
        assert_eq!(told(&mut call_then, JSON, body), (vec![Fact::Run("t1".to_owned())], AtEnd::GoesOn));
        let body = r#"{"jsonrpc":"2.0","id":1,"result":{"resultType":"input_required","taskId":"t1"}}"#;
        let mut call = recognised("mcp", &stateless("tools/call", &call("1")));
        assert_eq!(told(&mut call, JSON, body).0, [Fact::Ended(RunOutcome::Completed)]);
    }

    #[test]
    fn requests_about_a_task_tell_how_it_stands() {
        let params = r#"{"jsonrpc":"2.0","id":7,"method":"tasks/x","params":{"taskId":"t1"}}"#;
        for (method, kind) in [("tasks/get", Kind::Read), ("tasks/cancel", Kind::Cancel), ("tasks/update", Kind::Other)]
        {
            assert_eq!(words(&recognised("mcp", &stateless(method, params))), (kind, None, Some("t1")));
        }
        let answer = |body: &str| told(&mut recognised("mcp", &stateless("tasks/get", params)), JSON, body).0;
        assert_eq!(
            answer(r#"{"id":7,"result":{"taskId":"t1","status":"working"}}"#),
            [Fact::RunAlive("t1".to_owned())]
        );
        assert_eq!(
            answer(r#"{"id":7,"result":{"taskId":"t1","status":"cancelled"}}"#),
            [run_ended("t1", RunOutcome::Cancelled)]
        );
        assert_eq!(
            answer(r#"{"id":7,"error":{"code":-32602,"message":"Task not found"}}"#),
            [run_ended("t1", RunOutcome::Unknown)]
        );
        assert_eq!(answer(r#"{"id":7,"error":{"code":-32602,"message":"params._meta is missing"}}"#), []);
        // Trap 17: where the body can't be read, the header says it, maybe in Base64.
        let text = "POST /mcp\nmcp-protocol-version: 2026-07-28\nmcp-method: tasks/get\nmcp-name: =?base64?w6k=?=";
        assert_eq!(words(&recognised("mcp", text)), (Kind::Read, None, Some("é")));
        assert_eq!(header_value("é"), "=?base64?w6k=?=");
        assert_eq!(text_of_header(&header_value("=?base64?")).as_deref(), Some("=?base64?"));
    }

    #[test]
    fn methods_that_a2a_has_too_are_told_by_their_task() {
        let post = |params: &str| {
            format!("POST /\n\n{{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tasks/get\",\"params\":{{{params}}}}}")
        };
        assert_eq!(auto(&post(r#""taskId":"t1""#)), "mcp");
        assert_ne!(auto(&post(r#""id":"t1""#)), "mcp");
    }

    #[test]
    fn the_proxys_own_calls() {
        let start = recognised("mcp", &stateless("tools/call", &call("1")).replace("/mcp\n", "/a/mcp?k=v\n"));
        let task = RunRef { base: &start.base, key: "t1" };
        let Call { target, fields, body, .. } = Mcp.status_call(&task).unwrap();
        assert_eq!(target, "/a/mcp?k=v");
        for field in [("mcp-method", "tasks/get"), ("mcp-name", "t1"), ("mcp-protocol-version", "2026-07-28")] {
            assert!(fields.contains(&(field.0, field.1.to_owned())), "{field:?}");
        }
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["params"]["taskId"], "t1");
        assert_eq!(body["params"]["_meta"]["io.modelcontextprotocol/protocolVersion"], "2026-07-28");
        let cancel = Mcp.cancel_call(&task, Cancel::Interrupt).unwrap();
        assert!(cancel.fields.contains(&("mcp-method", "tasks/cancel".to_owned())));

        let start = recognised("mcp", &in_session(&call(r#""a b""#)));
        let run = RunRef { base: &start.base, key: start.run.as_deref().unwrap() };
        assert_eq!(Mcp.status_call(&run), None);
        let cancel = Mcp.cancel_call(&run, Cancel::Interrupt).unwrap();
        assert!(cancel.fields.contains(&("mcp-session-id", "s1".to_owned())));
        let body: serde_json::Value = serde_json::from_slice(&cancel.body).unwrap();
        assert_eq!((&body["method"], &body["params"]["requestId"]), (&"notifications/cancelled".into(), &"a b".into()));
    }

    #[test]
    fn what_a_status_call_is_answered() {
        let start = recognised("mcp", &stateless("tools/call", ""));
        let run = RunRef { base: &start.base, key: "t1" };
        let working = r#"{"jsonrpc":"2.0","id":"longhaul","result":{"taskId":"t1","status":"input_required"}}"#;
        assert_eq!(Mcp.judge(&run, 200, working.as_bytes()), Standing::Running);
        let stream = format!("event: message\ndata: {}\n\n", working.replace("input_required", "completed"));
        assert_eq!(Mcp.judge(&run, 200, stream.as_bytes()), Standing::Ended(RunOutcome::Completed));
        let gone = br#"{"error":{"code":-32602,"message":"Failed to retrieve task: Task not found"}}"#;
        assert_eq!(Mcp.judge(&run, 400, gone), Standing::Ended(RunOutcome::Unknown));
        let unknown = br#"{"error":{"code":-32601,"message":"Method not found"}}"#;
        assert_eq!(Mcp.judge(&run, 404, unknown), Standing::NoEvidence);
        let start = recognised("mcp", &in_session(&call("1")));
        assert_eq!(Mcp.judge(&RunRef { base: &start.base, key: "t1" }, 404, b""), Standing::Ended(RunOutcome::Unknown));
    }

    #[test]
    fn errors_of_ours_are_json_rpc() {
        let error = ProxyError::new(Code::SessionLost, "it said \"no\"");
        let body = Mcp.error_body(&error, Some(r#""1""#)).unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            body,
            serde_json::json!({"jsonrpc": "2.0", "id": "1", "error":
                {"code": -32000, "message": "it said \"no\"", "data": {"code": "session_lost"}}})
        );
        let start = recognised("mcp", &in_session(&call("17")));
        assert_eq!(start.rpc_id.as_deref(), Some("17"));
    }

    /// Trap 8.
    #[test]
    fn a_run_of_http_and_sse_spans_two_connections() {
        let stream = || recognised("mcp", "GET /sse\naccept: text/event-stream");
        assert_eq!(auto("GET /sse\naccept: text/event-stream"), "mcp");
        assert_eq!(words(&stream()), (Kind::Other, None, None));
        assert!(stream().creates_session && stream().bound);

        let text = format!("POST /messages/?session_id=abc\n\n{}", call("1"));
        let mut post = recognised("mcp", &text);
        assert_eq!(words(&post), (Kind::Start, Some("abc"), Some("abc 1")));
        assert_eq!((post.bound, post.on_disconnect), (true, OnDisconnect::GoesOn));
        assert_eq!(told(&mut post, "202", "Accepted"), (vec![], AtEnd::GoesOn));
        let refused = told(&mut recognised("mcp", &text), "404", "");
        assert_eq!(refused.0.last(), Some(&Fact::SessionLost));
        assert_eq!(refused.1, AtEnd::Ended(RunOutcome::Completed));
        // In auto a client's answer is known by its address alone.
        assert_eq!(auto("POST /message?sessionId=abc\n\n{\"jsonrpc\":\"2.0\",\"id\":0,\"result\":{}}"), "mcp");

        let body = "event: endpoint\r\ndata: /messages/?session_id=abc\r\n\r\n\
                    event: message\r\ndata: {\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{}}\r\n\r\n";
        let facts = [
            Fact::Session("abc".to_owned()),
            run_ended("abc 1", RunOutcome::Completed),
            Fact::SessionRunsEnded(RunOutcome::Truncated),
            Fact::SessionLost,
        ];
        assert_eq!(told(&mut stream(), SSE, body), (facts.to_vec(), AtEnd::GoesOn));
        let cut = told_until_cut(&mut stream(), SSE, body);
        assert_eq!(cut[2..], [Fact::SessionRunsEnded(RunOutcome::Cancelled), Fact::SessionLost]);
        // A stream that begins otherwise is none of ours, whatever it says later.
        assert_eq!(told(&mut stream(), SSE, &format!("data: hello\n\n{body}")).0, []);
    }

    #[test]
    fn what_goes_with_mcp_headers_but_is_none() {
        let text = "GET /.well-known/oauth-protected-resource\nmcp-protocol-version: 2025-11-25\naccept: */*";
        assert_eq!(auto(text), "");
        assert_eq!(auto("OPTIONS /mcp"), "");
    }

    #[test]
    fn endpoint_events_get_the_prefix_back() {
        for (data, rewritten) in [
            ("/messages/?session_id=1", Some("/tools/messages/?session_id=1")),
            ("http://10.0.0.1:80/messages?a=b", Some("http://10.0.0.1:80/tools/messages?a=b")),
            ("https://host?a=b", Some("https://host/tools?a=b")),
            ("//host/messages", Some("//host/tools/messages")),
            ("/a//b", Some("/tools/a//b")),
            ("/a?u=http://x/", Some("/tools/a?u=http://x/")),
            ("messages?session_id=1", None),
            ("?session_id=1", None),
            ("a?u=http://x/", None),
            ("/a\nb", None),
            ("", None),
        ] {
            let found = super::rewrite_endpoint_event(data.as_bytes(), "/tools/");
            assert_eq!(found.as_deref(), rewritten.map(str::as_bytes), "{data}");
        }
        assert_eq!(super::rewrite_endpoint_event(b"/a", "/"), None);
    }
}
