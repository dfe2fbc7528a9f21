//! OpenAI Chat Completions: no session, a run is the exchange, and only `[DONE]` is a good end of its stream.

use std::sync::{Arc, LazyLock};

use http::Method;
use memchr::memmem::Finder;

use crate::error::ProxyError;
use crate::json::{Extractor, Pointers};
use crate::message::Fields;
use crate::protocols::{
    AtEnd, Fact, Look, Protocol, Recognised, Request, Sign, Watch, is_event_stream, is_json, is_success,
    outcome_of_status,
};
use crate::run::RunOutcome;
use crate::sse;

/// `POST /v1/chat/completions` (openai-python 3.54), and the older `/v1/completions`.
pub struct OpenaiChat;

impl Protocol for OpenaiChat {
    fn name(&self) -> &'static str {
        "openai-chat"
    }

    fn sign(&self, request: &Request<'_>) -> Sign {
        if is_create(request) || is_stored(request) { Sign::Mark } else { Sign::None }
    }

    fn recognise(&self, request: &Request<'_>, _body: Option<&Extractor>) -> Option<Recognised> {
        if is_create(request) {
            return Some(Recognised::start(Completion::default()));
        }
        // What `store: true` has left (read, changed, deleted) is no conversation and no run.
        is_stored(request).then(Recognised::other)
    }

    fn error_body(&self, error: &ProxyError, _rpc_id: Option<&str>) -> Option<Vec<u8>> {
        error_body(error)
    }
}

fn is_create(request: &Request<'_>) -> bool {
    *request.method == Method::POST
        && (request.path.ends_with("/chat/completions") || request.path.ends_with("/v1/completions"))
}

fn is_stored(request: &Request<'_>) -> bool {
    request.path.contains("/chat/completions/")
}

/// An error as OpenAI's clients read it.
pub fn error_body(error: &ProxyError) -> Option<Vec<u8>> {
    let kind = match error.code.status().as_u16() {
        429 => "rate_limit_error",
        400..500 => "invalid_request_error",
        _ => "server_error",
    };
    let (message, code) = (serde_json::to_string(&error.detail).ok()?, error.code.as_str());
    Some(format!(r#"{{"error":{{"message":{message},"type":"{kind}","param":null,"code":"{code}"}}}}"#).into_bytes())
}

/// An error of the API's own form, or of the form that some servers of others have.
static ERROR: LazyLock<Arc<Pointers>> = LazyLock::new(|| Arc::new(Pointers::new(["/error", "/object"])));

fn is_error(values: &Extractor) -> bool {
    values.has("/error") || values.text("/object") == Some("error")
}

/// Reads the answer of one completion.
#[derive(Default)]
struct Completion {
    status: u16,
    streams: bool,
}

impl Watch for Completion {
    fn head(&mut self, status: u16, fields: &Fields, _facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        self.streams = is_success(status) && is_event_stream(fields);
        if self.streams {
            Look::Events
        } else if is_success(status) && is_json(fields) {
            Look::Json(&ERROR)
        } else {
            Look::Nothing
        }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        if is_error(values) {
            facts.push(Fact::Ended(RunOutcome::Failed));
        }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        static WORD: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"error\""));
        if event.data.trim_ascii() == b"[DONE]" {
            facts.push(Fact::Ended(RunOutcome::Completed));
        } else if event.name == b"error"
            || WORD.find(event.data).is_some() && is_error(&Extractor::read(&ERROR, event.data))
        {
            facts.push(Fact::Ended(RunOutcome::Failed));
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        // A stream that ends without `[DONE]` was cut by whoever made it, even where a `finish_reason` had come.
        AtEnd::Ended(if self.streams { RunOutcome::Truncated } else { outcome_of_status(self.status) })
    }
}

#[cfg(test)]
mod tests {
    use crate::error::{Code, ProxyError};
    use crate::protocols::recorded::{auto, recognised, told, words};
    use crate::protocols::{AtEnd, Fact, OnDisconnect};
    use crate::run::{Kind, RunOutcome};

    use super::error_body;

    const CREATE: &str = "POST /v1/chat/completions\n\n{\"model\":\"m\",\"messages\":[],\"stream\":true,\"user\":\"u\",\"prompt_cache_key\":\"k\"}";

    #[test]
    fn a_completion_is_a_run_without_a_session() {
        let create = recognised("openai-chat", CREATE);
        assert_eq!((words(&create), create.on_disconnect), ((Kind::Start, None, None), OnDisconnect::Ends));
        assert_eq!(auto(CREATE), "openai-chat");
        assert_eq!(auto("POST /openai/deployments/x/chat/completions?api-version=1"), "openai-chat");
        for text in
            ["GET /v1/chat/completions/c1", "POST /v1/chat/completions/c1\n\n{}", "DELETE /v1/chat/completions/c1"]
        {
            assert_eq!(words(&recognised("openai-chat", text)), (Kind::Other, None, None), "{text}");
        }
        assert_eq!(auto("POST /v1/embeddings\n\n{}"), "");
    }

    #[test]
    fn how_answers_end() {
        let chunk = "data: {\"id\":\"chatcmpl-1\",\"choices\":[{\"delta\":{\"content\":\"\\\"error\\\"\"}}],\"x\":\"error\"}\n\n";
        let last = "data: {\"id\":\"chatcmpl-1\",\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
        let done = "data: [DONE]\n\n";
        let sse = "200 content-type: text/event-stream";
        let json = "200 content-type: application/json";
        let ended = |outcome| Some(Fact::Ended(outcome));
        for (head, body, fact, end) in [
            (sse, format!("{chunk}{last}{done}"), ended(RunOutcome::Completed), RunOutcome::Truncated),
            (sse, format!("{chunk}{last}"), None, RunOutcome::Truncated),
            (sse, String::new(), None, RunOutcome::Truncated),
            (
                sse,
                "data: {\"error\": {\"message\":\"m\"}}\n\n".to_owned(),
                ended(RunOutcome::Failed),
                RunOutcome::Truncated,
            ),
            (sse, "data: {\"object\":\"error\"}\n\n".to_owned(), ended(RunOutcome::Failed), RunOutcome::Truncated),
            (sse, "event: error\ndata: {}\n\n".to_owned(), ended(RunOutcome::Failed), RunOutcome::Truncated),
            (json, "{\"id\":\"chatcmpl-1\",\"error\":null}".to_owned(), None, RunOutcome::Completed),
            (json, "{\"error\":{\"message\":\"m\"}}".to_owned(), ended(RunOutcome::Failed), RunOutcome::Completed),
            ("429 content-type: application/json", "{\"error\":{}}".to_owned(), None, RunOutcome::Completed),
            ("503 content-type: text/event-stream", String::new(), None, RunOutcome::Failed),
        ] {
            let answer = told(&mut recognised("openai-chat", CREATE), head, &body);
            assert_eq!(answer, (fact.into_iter().collect(), AtEnd::Ended(end)), "{head} {body}");
        }
    }

    #[test]
    fn errors_of_ours_have_their_form() {
        for (code, kind) in [
            (Code::QueueFull, "rate_limit_error"),
            (Code::BodyTooLarge, "invalid_request_error"),
            (Code::NoEndpoint, "server_error"),
        ] {
            let body = error_body(&ProxyError::new(code, "a \"b\"")).unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let expected =
                serde_json::json!({"message": "a \"b\"", "type": kind, "param": null, "code": code.as_str()});
            assert_eq!(body["error"], expected);
        }
    }
}
