//! OpenAI Responses: runs that may go on in the background, chained by their ids or kept together by a conversation.
//!
//! Weak hints (`user`, `safety_identifier`, `prompt_cache_key`) are no sessions and are not read.

mod socket;

use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

use http::Method;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::error::ProxyError;
use crate::json::{Extractor, Pointers};
use crate::message::Fields;
use crate::protocols::openai_chat;
use crate::protocols::typed::type_of;
use crate::protocols::{
    AtEnd, Call, Cancel, Fact, Look, OnDisconnect, Protocol, Recognised, Request, RunRef, Sign, Standing, Watch,
    is_event_stream, is_json, is_success, key, outcome_of_status,
};
use crate::run::{Kind, RunOutcome};
use crate::sse;

/// `/v1/responses` and `/v1/conversations` over HTTP, `/v1/responses` and `/v1/realtime` over a WebSocket
/// (openai-python 3.54).
pub struct OpenaiResponses;

impl Protocol for OpenaiResponses {
    fn name(&self) -> &'static str {
        "openai-responses"
    }

    fn sign(&self, request: &Request<'_>) -> Sign {
        // The Assistants API is nobody's here, but its paths look like another's (`/threads/{id}/runs`): marked as ours
        // it passes as plain HTTP.
        let is_assistants = request.header("openai-beta").is_some_and(|beta| beta.contains("assistants"));
        let is_place = Place::of(request).is_some_and(|(_, is_rooted)| is_rooted);
        if is_assistants || is_place { Sign::Mark } else { Sign::None }
    }

    fn wants(&self, request: &Request<'_>) -> Option<&'static Arc<Pointers>> {
        static CREATE: LazyLock<Arc<Pointers>> = LazyLock::new(|| {
            Arc::new(Pointers::new([
                "/background",
                "/conversation",
                "/conversation/id",
                "/previous_response_id",
                "/store",
            ]))
        });
        let is_create = matches!(Place::of(request), Some((Place::Responses | Place::Compact, _)));
        (is_create && *request.method == Method::POST).then_some(&CREATE)
    }

    fn recognise(&self, request: &Request<'_>, body: Option<&Extractor>) -> Option<Recognised> {
        let (place, _) = Place::of(request)?;
        if request.upgrade == Some("websocket") {
            return matches!(place, Place::Responses | Place::Realtime).then(|| socket::recognise(place));
        }
        match (place, request.method) {
            (Place::Responses, &Method::POST) => Some(create(request, body)),
            (Place::Compact, &Method::POST) => {
                Some(Recognised { session: chain(body), ..Recognised::start(Answer::new(Asked::Plain)) })
            }
            (Place::Response(id), &Method::GET) => {
                let joins = request.query_value("stream").is_some_and(|value| value == "true" || value == "1");
                about(request, id, if joins { Kind::Join } else { Kind::Read })
            }
            (Place::Response(id), &Method::DELETE) => about(request, id, Kind::Other),
            (Place::Cancel(id), &Method::POST) => about(request, id, Kind::Cancel),
            (Place::Conversations, &Method::POST) => Some(Recognised {
                creates_session: true,
                watch: Some(Box::new(Conversation { ends: false })),
                ..Recognised::other()
            }),
            (Place::PartOf(id) | Place::Conversation(id), _) => {
                let ends = matches!(place, Place::Conversation(_)) && *request.method == Method::DELETE;
                Some(Recognised {
                    session: key(id),
                    watch: ends.then(|| Box::new(Conversation { ends }) as Box<dyn Watch>),
                    ..Recognised::other()
                })
            }
            (Place::Small, _) => Some(Recognised::other()),
            _ => None,
        }
    }

    fn status_call(&self, run: &RunRef<'_>) -> Option<Call> {
        Some(Call { method: Method::GET, target: target(run, "")?, fields: Vec::new(), body: Vec::new() })
    }

    fn judge(&self, _run: &RunRef<'_>, status: u16, body: &[u8]) -> Standing {
        if status == 404 {
            return Standing::Ended(RunOutcome::Unknown);
        }
        let values = Extractor::read(&RESPONSE, body);
        match values.text("/status") {
            Some(status) if is_success_of(status) => outcome(status).map_or(Standing::Running, Standing::Ended),
            _ => Standing::NoEvidence,
        }
    }

    fn cancel_call(&self, run: &RunRef<'_>, _how: Cancel) -> Option<Call> {
        Some(Call { method: Method::POST, target: target(run, "/cancel")?, fields: Vec::new(), body: Vec::new() })
    }

    fn error_body(&self, error: &ProxyError, _rpc_id: Option<&str>) -> Option<Vec<u8>> {
        openai_chat::error_body(error)
    }
}

/// What a path names.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place<'a> {
    Responses,
    Response(&'a str),
    Cancel(&'a str),
    /// Something of a response or conversation, to be read or changed.
    PartOf(&'a str),
    Compact,
    Conversations,
    Conversation(&'a str),
    Realtime,
    /// A quick question.
    Small,
}

impl<'a> Place<'a> {
    /// And whether it lies at the root of an API, where nobody else has it.
    fn of(request: &Request<'a>) -> Option<(Place<'a>, bool)> {
        let mut segments = request.path.trim_start_matches('/').split('/');
        let mut before = "";
        let word = loop {
            match segments.next()? {
                word @ ("responses" | "conversations" | "realtime") => break word,
                other => before = other,
            }
        };
        let rest = (segments.next().filter(|id| !id.is_empty()), segments.next(), segments.next());
        let place = match (word, rest) {
            ("responses", (None, ..)) => Place::Responses,
            ("responses", (Some("compact"), None, _)) => Place::Compact,
            ("responses", (Some("input_tokens"), None, _)) => Place::Small,
            ("responses", (Some(id), None, _)) => Place::Response(id),
            ("responses", (Some(id), Some("cancel"), None)) => Place::Cancel(id),
            ("conversations", (None, ..)) => Place::Conversations,
            ("conversations", (Some(id), None, _)) => Place::Conversation(id),
            ("realtime", (None, ..)) => Place::Realtime,
            ("realtime", _) => return None,
            (_, (Some(id), ..)) => Place::PartOf(id),
            _ => return None,
        };
        Some((place, matches!(before, "v1" | "openai")))
    }
}

/// The session that a create call names: a conversation, or the response that it goes on from.
fn chain(body: Option<&Extractor>) -> Option<String> {
    let body = body?;
    let conversation = body.text("/conversation").or_else(|| body.text("/conversation/id"));
    conversation.or_else(|| body.text("/previous_response_id")).and_then(key)
}

fn create(request: &Request<'_>, body: Option<&Extractor>) -> Recognised {
    let says = |pointer, word| body.is_some_and(|body| body.word(pointer) == Some(word));
    let in_background = says("/background", "true");
    let answer = Answer::new(Asked::Create { in_background, is_stored: !says("/store", "false") });
    Recognised {
        session: chain(body),
        // Closing the connection is how a response in the foreground is cancelled.
        on_disconnect: if in_background { OnDisconnect::GoesOn } else { OnDisconnect::Ends },
        base: request.target().unwrap_or_default(),
        ..Recognised::start(answer)
    }
}

/// A request about one response, which is a link of a chain, too: where its run is forgotten, the chain's endpoint has
/// it.
fn about(request: &Request<'_>, id: &str, kind: Kind) -> Option<Recognised> {
    let run = key(&percent_encoding::percent_decode_str(id).decode_utf8_lossy())?;
    let deletes = *request.method == Method::DELETE;
    let watch = Answer::new(Asked::About { run: run.clone(), joins: kind == Kind::Join, deletes });
    Some(Recognised {
        kind,
        session: Some(run.clone()),
        run: Some(run),
        watch: Some(Box::new(watch)),
        ..Recognised::other()
    })
}

/// The address of a run of ours, with something behind it.
fn target(run: &RunRef<'_>, behind: &str) -> Option<String> {
    const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
    if run.base.is_empty() || run.key.is_empty() {
        return None;
    }
    let (path, query) = run.base.split_once('?').map_or((run.base, None), |(path, query)| (path, Some(query)));
    let query = query.map_or(String::new(), |query| format!("?{query}"));
    let path = path.trim_end_matches('/');
    Some(format!("{path}/{}{behind}{query}", utf8_percent_encode(run.key, PLAIN)))
}

static RESPONSE: LazyLock<Arc<Pointers>> = LazyLock::new(|| Arc::new(Pointers::new(["/id", "/status", "/error"])));

/// Of an event or message that has a response in it.
static IN_EVENT: LazyLock<Arc<Pointers>> = LazyLock::new(|| Arc::new(Pointers::new(["/response/id"])));

/// How a response ended that has this status; `None`: it has not.
fn outcome(status: &str) -> Option<RunOutcome> {
    match status {
        // It stopped at a limit that its caller set.
        "completed" | "incomplete" => Some(RunOutcome::Completed),
        "failed" => Some(RunOutcome::Failed),
        "cancelled" => Some(RunOutcome::Cancelled),
        _ => None,
    }
}

fn is_success_of(status: &str) -> bool {
    outcome(status).is_some() || matches!(status, "queued" | "in_progress")
}

/// How a response ended, by the type of an event.
fn outcome_of_event(name: &[u8]) -> Option<RunOutcome> {
    match name {
        b"response.completed" | b"response.incomplete" => Some(RunOutcome::Completed),
        b"response.failed" | b"error" => Some(RunOutcome::Failed),
        b"response.cancelled" => Some(RunOutcome::Cancelled),
        _ => None,
    }
}

enum Asked {
    Create {
        in_background: bool,
        is_stored: bool,
    },
    /// As a create call, of which nothing remains.
    Plain,
    About {
        run: String,
        joins: bool,
        deletes: bool,
    },
}

/// Reads an answer: a response, or its events.
struct Answer {
    asked: Asked,
    status: u16,
    streams: bool,
    /// The id is known.
    is_named: bool,
    /// The response said that it has not ended.
    is_open: bool,
}

impl Answer {
    fn new(asked: Asked) -> Answer {
        Answer { asked, status: 0, streams: false, is_named: false, is_open: false }
    }

    fn named(&mut self, id: Option<&str>, facts: &mut Vec<Fact>) {
        if let Asked::Create { is_stored, .. } = self.asked
            && let Some(id) = id.and_then(key)
        {
            self.is_named = true;
            facts.push(Fact::Run(id.clone()));
            // The next one of the chain will name it.
            facts.extend(is_stored.then_some(Fact::Session(id)));
        }
    }

    fn ended(&self, outcome: RunOutcome) -> Fact {
        match &self.asked {
            Asked::About { run, joins: false, .. } => Fact::RunEnded(run.clone(), outcome),
            _ => Fact::Ended(outcome),
        }
    }
}

impl Watch for Answer {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        if let Asked::About { run, deletes, .. } = &self.asked {
            let ended = match status {
                404 => Some(RunOutcome::Unknown),
                _ if *deletes && is_success(status) => Some(RunOutcome::Cancelled),
                _ => None,
            };
            facts.extend(ended.map(|outcome| Fact::RunEnded(run.clone(), outcome)));
            if *deletes {
                return Look::Nothing;
            }
        }
        self.streams = is_success(status) && is_event_stream(fields);
        if self.streams {
            Look::Events
        } else if is_success(status) && is_json(fields) {
            Look::Json(&RESPONSE)
        } else {
            Look::Nothing
        }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        let status = values.text("/status").filter(|status| is_success_of(status));
        self.named(values.text("/id").filter(|_| status.is_some()), facts);
        match status.map(outcome) {
            Some(Some(outcome)) => facts.push(self.ended(outcome)),
            Some(None) => {
                self.is_open = true;
                if let Asked::About { run, .. } = &self.asked {
                    facts.push(Fact::RunAlive(run.clone()));
                }
            }
            // An error in an answer that says success.
            None if values.has("/error") && !matches!(self.asked, Asked::About { .. }) => {
                facts.push(Fact::Ended(RunOutcome::Failed));
            }
            None => {}
        }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        let name = if event.name.is_empty() { type_of(event.data) } else { Cow::Borrowed(event.name) };
        let outcome = outcome_of_event(&name);
        let has_response =
            outcome.is_some() || matches!(&*name, b"response.created" | b"response.queued" | b"response.in_progress");
        if has_response && !self.is_named && matches!(self.asked, Asked::Create { .. }) {
            self.named(Extractor::read(&IN_EVENT, event.data).text("/response/id"), facts);
        }
        if let Some(outcome) = outcome {
            facts.push(self.ended(outcome));
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        let goes_on = match self.asked {
            Asked::Create { in_background, .. } => self.is_named && (self.is_open || self.streams && in_background),
            Asked::Plain => false,
            Asked::About { .. } => true,
        };
        if goes_on {
            return AtEnd::GoesOn;
        }
        AtEnd::Ended(if self.streams { RunOutcome::Truncated } else { outcome_of_status(self.status) })
    }
}

/// Reads the answer to a conversation's making or deleting.
struct Conversation {
    ends: bool,
}

impl Watch for Conversation {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        if self.ends {
            facts.extend(is_success(status).then_some(Fact::SessionLost));
            return Look::Nothing;
        }
        if is_success(status) && is_json(fields) { Look::Json(&RESPONSE) } else { Look::Nothing }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        facts.extend(values.text("/id").and_then(key).map(Fact::Session));
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}

#[cfg(test)]
mod tests {
    use crate::protocols::recorded::{auto, recognised, told, words};
    use crate::protocols::{AtEnd, Cancel, Fact, OnDisconnect, Protocol, RunRef, Standing};
    use crate::run::{Kind, RunOutcome};

    use super::OpenaiResponses;

    const SSE: &str = "200 content-type: text/event-stream";
    const JSON: &str = "200 content-type: application/json";

    fn create(body: &str) -> String {
        format!("POST /v1/responses\n\n{body}")
    }

    fn run(id: &str) -> Fact {
        Fact::Run(id.to_owned())
    }

    fn session(id: &str) -> Fact {
        Fact::Session(id.to_owned())
    }

    #[test]
    fn what_a_request_is() {
        for (text, kind, session, run) in [
            (
                create(r#"{"model":"m","input":"x","user":"u","prompt_cache_key":"k","safety_identifier":"s"}"#),
                Kind::Start,
                None,
                None,
            ),
            (create(r#"{"input":"x","previous_response_id":"resp_1"}"#), Kind::Start, Some("resp_1"), None),
            (create(r#"{"conversation":"conv_1","input":"x"}"#), Kind::Start, Some("conv_1"), None),
            (create(r#"{"conversation":{"id":"conv_1"},"input":"x"}"#), Kind::Start, Some("conv_1"), None),
            ("GET /v1/responses/resp_1".to_owned(), Kind::Read, Some("resp_1"), Some("resp_1")),
            (
                "GET /v1/responses/resp_1?stream=true&starting_after=4".to_owned(),
                Kind::Join,
                Some("resp_1"),
                Some("resp_1"),
            ),
            ("POST /v1/responses/resp_1/cancel".to_owned(), Kind::Cancel, Some("resp_1"), Some("resp_1")),
            ("DELETE /v1/responses/resp_1".to_owned(), Kind::Other, Some("resp_1"), Some("resp_1")),
            ("GET /v1/responses/resp_1/input_items?limit=2".to_owned(), Kind::Other, Some("resp_1"), None),
            (
                "POST /v1/responses/compact\n\n{\"previous_response_id\":\"resp_1\"}".to_owned(),
                Kind::Start,
                Some("resp_1"),
                None,
            ),
            ("POST /v1/responses/input_tokens\n\n{}".to_owned(), Kind::Other, None, None),
            ("POST /v1/conversations\n\n{}".to_owned(), Kind::Other, None, None),
            ("GET /v1/conversations/conv_1/items".to_owned(), Kind::Other, Some("conv_1"), None),
            ("DELETE /v1/conversations/conv_1".to_owned(), Kind::Other, Some("conv_1"), None),
            ("POST /openai/responses?api-version=1\n\n{}".to_owned(), Kind::Start, None, None),
        ] {
            assert_eq!(words(&recognised("openai-responses", &text)), (kind, session, run), "{text}");
            assert_eq!(auto(&text), "openai-responses", "{text}");
        }
        // Elsewhere only where the configuration says so.
        assert_eq!(auto("POST /responses\n\n{}"), "");
        assert_eq!(words(&recognised("openai-responses", "POST /responses\n\n{}")).0, Kind::Start);
        assert!(recognised("openai-responses", "POST /v1/conversations\n\n{}").creates_session);
        // Assistants pass as plain HTTP, though LangGraph has such a path.
        assert_eq!(auto("POST /v1/threads/thread_1/runs\nopenai-beta: assistants=v2\n\n{\"assistant_id\":\"a\"}"), "");
    }

    #[test]
    fn a_response_in_the_foreground_ends_with_its_exchange() {
        let start = || recognised("openai-responses", &create(r#"{"input":"x","stream":true}"#));
        assert_eq!(start().on_disconnect, OnDisconnect::Ends);
        let created = "event: response.created\ndata: {\"type\":\"response.created\",\"sequence_number\":0,\"response\":{\"id\":\"resp_1\",\"status\":\"in_progress\"}}\n\n";
        let delta = "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"delta\":\"response.failed\"}\n\n";
        let known = [run("resp_1"), session("resp_1")];
        for (last, outcome) in [
            (
                "event: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"id\":\"resp_1\"}}\n\n",
                Some(RunOutcome::Completed),
            ),
            ("event: response.incomplete\ndata: {}\n\n", Some(RunOutcome::Completed)),
            ("event: response.failed\ndata: {}\n\n", Some(RunOutcome::Failed)),
            ("event: error\ndata: {\"type\":\"error\",\"code\":\"x\"}\n\n", Some(RunOutcome::Failed)),
            ("data: {\"type\":\"response.failed\"}\n\n", Some(RunOutcome::Failed)),
            ("", None),
        ] {
            let (facts, end) = told(&mut start(), SSE, &format!("{created}{delta}{last}"));
            let expected: Vec<Fact> = known.iter().cloned().chain(outcome.map(Fact::Ended)).collect();
            assert_eq!((facts, end), (expected, AtEnd::Ended(RunOutcome::Truncated)), "{last}");
        }
        for (body, outcome) in [
            (r#"{"id":"resp_1","status":"completed","error":null}"#, RunOutcome::Completed),
            (r#"{"id":"resp_1","status":"incomplete"}"#, RunOutcome::Completed),
            (r#"{"id":"resp_1","status":"failed","error":{"code":"x"}}"#, RunOutcome::Failed),
        ] {
            let facts: Vec<Fact> = known.iter().cloned().chain([Fact::Ended(outcome)]).collect();
            assert_eq!(told(&mut start(), JSON, body).0, facts, "{body}");
        }
        assert_eq!(told(&mut start(), JSON, r#"{"error":{"code":"x"}}"#).0, [Fact::Ended(RunOutcome::Failed)]);
        assert_eq!(told(&mut start(), "500", ""), (vec![], AtEnd::Ended(RunOutcome::Failed)));
        assert_eq!(told(&mut start(), "429", ""), (vec![], AtEnd::Ended(RunOutcome::Completed)));
        // What is not stored can't be gone on from.
        let mut start = recognised("openai-responses", &create(r#"{"input":"x","store":false}"#));
        assert_eq!(told(&mut start, SSE, created).0, [run("resp_1")]);
    }

    #[test]
    fn a_response_in_the_background_outlives_its_exchange() {
        let start = || recognised("openai-responses", &create(r#"{"input":"x","background":true,"stream":true}"#));
        assert_eq!(start().on_disconnect, OnDisconnect::GoesOn);
        let known = vec![run("resp_1"), session("resp_1")];
        let queued = r#"{"id":"resp_1","object":"response","status":"queued","background":true}"#;
        assert_eq!(told(&mut start(), JSON, queued), (known.clone(), AtEnd::GoesOn));
        let body = "event: response.created\ndata: {\"response\":{\"id\":\"resp_1\"}}\n\n\
                    event: response.queued\ndata: {\"response\":{\"id\":\"resp_1\"}}\n\n";
        assert_eq!(told(&mut start(), SSE, body), (known, AtEnd::GoesOn));
        // Without an id nobody could ask about it.
        assert_eq!(told(&mut start(), SSE, ""), (vec![], AtEnd::Ended(RunOutcome::Truncated)));
    }

    #[test]
    fn other_exchanges_tell_how_a_response_stands() {
        let ended = |outcome| Fact::RunEnded("resp_1".to_owned(), outcome);
        for (text, head, body, facts) in [
            (
                "GET /v1/responses/resp_1",
                JSON,
                r#"{"id":"resp_1","status":"completed"}"#,
                vec![ended(RunOutcome::Completed)],
            ),
            (
                "GET /v1/responses/resp_1",
                JSON,
                r#"{"id":"resp_1","status":"in_progress"}"#,
                vec![Fact::RunAlive("resp_1".to_owned())],
            ),
            ("GET /v1/responses/resp_1", "404", "", vec![ended(RunOutcome::Unknown)]),
            ("GET /v1/responses/resp_1", "500", "", vec![]),
            (
                "POST /v1/responses/resp_1/cancel",
                JSON,
                r#"{"id":"resp_1","status":"cancelled"}"#,
                vec![ended(RunOutcome::Cancelled)],
            ),
            ("POST /v1/responses/resp_1/cancel", "400 content-type: application/json", r#"{"error":{}}"#, vec![]),
            (
                "DELETE /v1/responses/resp_1",
                JSON,
                r#"{"id":"resp_1","deleted":true}"#,
                vec![ended(RunOutcome::Cancelled)],
            ),
            (
                "GET /v1/responses/resp_1?stream=true&starting_after=3",
                SSE,
                "event: response.completed\ndata: {}\n\n",
                vec![Fact::Ended(RunOutcome::Completed)],
            ),
            ("GET /v1/responses/resp_1?stream=true", SSE, "event: response.in_progress\ndata: {}\n\n", vec![]),
        ] {
            let answer = told(&mut recognised("openai-responses", text), head, body);
            assert_eq!(answer, (facts, AtEnd::GoesOn), "{text} {head}");
        }
        let mut made = recognised("openai-responses", "POST /v1/conversations\n\n{}");
        assert_eq!(told(&mut made, JSON, r#"{"id":"conv_1","object":"conversation"}"#).0, [session("conv_1")]);
        let mut deleted = recognised("openai-responses", "DELETE /v1/conversations/conv_1");
        assert_eq!(told(&mut deleted, JSON, "{}").0, [Fact::SessionLost]);
    }

    #[test]
    fn the_proxys_own_calls() {
        let start = recognised("openai-responses", &create("{}").replace("responses", "responses?api-version=1"));
        let run = RunRef { base: &start.base, key: "resp_1/x" };
        assert_eq!(OpenaiResponses.status_call(&run).unwrap().target, "/v1/responses/resp_1%2Fx?api-version=1");
        let cancel = OpenaiResponses.cancel_call(&run, Cancel::Interrupt).unwrap();
        assert_eq!(cancel.target, "/v1/responses/resp_1%2Fx/cancel?api-version=1");
        assert_eq!(OpenaiResponses.status_call(&RunRef { base: "", key: "resp_1" }), None);
        for (status, body, standing) in [
            (200, r#"{"status":"queued"}"#, Standing::Running),
            (200, r#"{"status":"cancelled"}"#, Standing::Ended(RunOutcome::Cancelled)),
            (404, "", Standing::Ended(RunOutcome::Unknown)),
            (200, "{}", Standing::NoEvidence),
            (200, "<html>", Standing::NoEvidence),
        ] {
            assert_eq!(OpenaiResponses.judge(&run, status, body.as_bytes()), standing, "{status} {body}");
        }
    }
}
