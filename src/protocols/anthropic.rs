//! Anthropic Messages: no session, a run is the exchange, and `message_stop` is the good end of its stream.

use std::borrow::Cow;

use http::Method;

use crate::error::ProxyError;
use crate::json::Extractor;
use crate::message::Fields;
use crate::protocols::typed::type_of;
use crate::protocols::{
    AtEnd, Fact, Look, Protocol, Recognised, Request, Sign, Watch, is_event_stream, is_success, outcome_of_status,
};
use crate::run::RunOutcome;
use crate::sse;

/// `POST /v1/messages` (`anthropic-version: 2023-06-01`).
pub struct Anthropic;

impl Protocol for Anthropic {
    fn name(&self) -> &'static str {
        "anthropic"
    }

    fn sign(&self, request: &Request<'_>) -> Sign {
        if request.fields.contains("anthropic-version") {
            Sign::Mark
        } else if request.path.ends_with("/v1/messages") && *request.method == Method::POST {
            Sign::Path
        } else {
            Sign::None
        }
    }

    fn recognise(&self, request: &Request<'_>, _body: Option<&Extractor>) -> Option<Recognised> {
        if *request.method == Method::POST && request.path.ends_with("/messages") {
            return Some(Recognised::start(Message { status: 0, streams: false }));
        }
        // Counting tokens is no run, and jobs of many messages are none of one exchange.
        let is_small = request.path.ends_with("/messages/count_tokens") || request.path.contains("/messages/batches");
        is_small.then(Recognised::other)
    }

    fn error_body(&self, error: &ProxyError, _rpc_id: Option<&str>) -> Option<Vec<u8>> {
        let kind = match error.code.status().as_u16() {
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            _ => "api_error",
        };
        let (message, code) = (serde_json::to_string(&error.detail).ok()?, error.code.as_str());
        let body = format!(r#"{{"type":"error","error":{{"type":"{kind}","message":{message},"code":"{code}"}}}}"#);
        Some(body.into_bytes())
    }
}

/// Reads the answer of one message.
struct Message {
    status: u16,
    streams: bool,
}

impl Watch for Message {
    fn head(&mut self, status: u16, fields: &Fields, _facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        self.streams = is_success(status) && is_event_stream(fields);
        if self.streams { Look::Events } else { Look::Nothing }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        let name = if event.name.is_empty() { type_of(event.data) } else { Cow::Borrowed(event.name) };
        match &*name {
            b"message_stop" => facts.push(Fact::Ended(RunOutcome::Completed)),
            b"error" => facts.push(Fact::Ended(RunOutcome::Failed)),
            _ => {}
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::Ended(if self.streams { RunOutcome::Truncated } else { outcome_of_status(self.status) })
    }
}

#[cfg(test)]
mod tests {
    use crate::error::{Code, ProxyError};
    use crate::protocols::recorded::{auto, recognised, told, words};
    use crate::protocols::{AtEnd, Fact, OnDisconnect, Protocol};
    use crate::run::{Kind, RunOutcome};

    use super::Anthropic;

    const CREATE: &str =
        "POST /v1/messages\nanthropic-version: 2023-06-01\n\n{\"model\":\"m\",\"metadata\":{\"user_id\":\"u\"}}";

    #[test]
    fn a_message_is_a_run_without_a_session() {
        let create = recognised("anthropic", CREATE);
        assert_eq!((words(&create), create.on_disconnect), ((Kind::Start, None, None), OnDisconnect::Ends));
        assert_eq!(auto(CREATE), "anthropic");
        assert_eq!(auto("POST /v1/messages\n\n{}"), "anthropic");
        for text in
            ["POST /v1/messages/count_tokens\n\n{}", "GET /v1/messages/batches/b1", "POST /v1/messages/batches\n\n{}"]
        {
            assert_eq!(words(&recognised("anthropic", text)), (Kind::Other, None, None), "{text}");
        }
        assert_eq!(auto("POST /v1/complete\nanthropic-version: 2023-06-01\n\n{}"), "");
    }

    #[test]
    fn how_answers_end() {
        let start = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_1\"}}\n\n\
                     event: ping\ndata: {\"type\":\"ping\"}\n\n\
                     event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"tool_use\"}}\n\n";
        let sse = "200 content-type: text/event-stream; charset=utf-8";
        for (head, body, fact, end) in [
            (
                sse,
                format!("{start}event: message_stop\ndata: {{\"type\":\"message_stop\"}}\n\n"),
                Some(RunOutcome::Completed),
                RunOutcome::Truncated,
            ),
            (
                sse,
                format!("{start}data: {{\"type\":\"message_stop\"}}\n\n"),
                Some(RunOutcome::Completed),
                RunOutcome::Truncated,
            ),
            (
                sse,
                format!(
                    "{start}event: error\ndata: {{\"type\":\"error\",\"error\":{{\"type\":\"overloaded_error\"}}}}\n\n"
                ),
                Some(RunOutcome::Failed),
                RunOutcome::Truncated,
            ),
            (sse, start.to_owned(), None, RunOutcome::Truncated),
            ("200 content-type: application/json", "{}".to_owned(), None, RunOutcome::Completed),
            ("529 content-type: application/json", "{}".to_owned(), None, RunOutcome::Failed),
            ("400 content-type: application/json", "{}".to_owned(), None, RunOutcome::Completed),
        ] {
            let answer = told(&mut recognised("anthropic", CREATE), head, &body);
            assert_eq!(answer, (fact.map(Fact::Ended).into_iter().collect(), AtEnd::Ended(end)), "{head} {body}");
        }
    }

    #[test]
    fn errors_of_ours_have_their_form() {
        for (code, kind) in [
            (Code::QueueFull, "rate_limit_error"),
            (Code::NoRoute, "not_found_error"),
            (Code::Draining, "overloaded_error"),
            (Code::UpstreamReset, "api_error"),
        ] {
            let body = Anthropic.error_body(&ProxyError::new(code, "a \"b\""), None).unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let expected = serde_json::json!({"type": "error", "error":
                {"type": kind, "message": "a \"b\"", "code": code.as_str()}});
            assert_eq!(body, expected);
        }
    }
}
