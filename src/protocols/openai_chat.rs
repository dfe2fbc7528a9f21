//! OpenAI Chat Completions: no session, a run is the exchange, and only `[DONE]` is a good end of its stream.

use crate::message::Fields;
use crate::protocols::{
    AtEnd, Fact, Look, Protocol, Recognised, Request, Sign, Watch, is_event_stream, outcome_of_status,
};
use crate::run::RunOutcome;
use crate::sse;

/// `POST /v1/chat/completions` (openai-python 3.54).
pub struct OpenaiChat;

impl Protocol for OpenaiChat {
    fn name(&self) -> &'static str {
        "openai-chat"
    }

    fn sign(&self, request: &Request<'_>) -> Sign {
        if is_create(request) { Sign::Mark } else { Sign::None }
    }

    fn recognise(&self, request: &Request<'_>, _body: Option<&crate::json::Extractor>) -> Option<Recognised> {
        is_create(request).then(|| Recognised::start(Completion::default()))
    }
}

fn is_create(request: &Request<'_>) -> bool {
    request.method == http::Method::POST && request.path.ends_with("/chat/completions")
}

/// Reads the answer of one completion.
#[derive(Default)]
struct Completion {
    outcome: Option<RunOutcome>,
    streams: bool,
}

impl Watch for Completion {
    fn head(&mut self, status: u16, fields: &Fields, _facts: &mut Vec<Fact>) -> Look {
        self.streams = status == 200 && is_event_stream(fields);
        self.outcome = Some(outcome_of_status(status));
        if self.streams { Look::Events } else { Look::Nothing }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        if event.data == b"[DONE]" {
            facts.push(Fact::Ended(RunOutcome::Completed));
        } else if event.data.starts_with(br#"{"error""#) || event.name == b"error" {
            facts.push(Fact::Ended(RunOutcome::Failed));
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        // A stream that ends without `[DONE]` was cut by whoever made it.
        let outcome = if self.streams { RunOutcome::Truncated } else { self.outcome.unwrap_or(RunOutcome::Failed) };
        AtEnd::Ended(outcome)
    }
}
