//! AI SDK (Vercel): chats whose answer is a UI message stream, which an application may let its clients resume.

use std::sync::{Arc, LazyLock};

use http::Method;

use crate::json::{Extractor, Pointers};
use crate::message::Fields;
use crate::protocols::typed::type_of;
use crate::protocols::{
    AtEnd, Fact, Look, Protocol, Recognised, Request, Sign, Watch, is_event_stream, is_success, key, outcome_of_status,
};
use crate::run::{Kind, RunOutcome};
use crate::sse;

/// `POST {api}` and `GET {api}/{chat}/stream` (ai 6.0); the client's default for `{api}` is `/api/chat`.
pub struct AiSdk;

impl Protocol for AiSdk {
    fn name(&self) -> &'static str {
        "ai-sdk"
    }

    fn sign(&self, request: &Request<'_>) -> Sign {
        let is_path = match *request.method {
            Method::POST => request.path.ends_with(DEFAULT_PATH),
            Method::GET => resumed_chat(request).is_some() && request.path.contains(DEFAULT_PATH),
            _ => false,
        };
        if is_path { Sign::Path } else { Sign::None }
    }

    fn has_shape(&self, _request: &Request<'_>, body: &Extractor) -> bool {
        matches!(body.text("/trigger"), Some("submit-message" | "regenerate-message"))
            && body.has("/messages")
            && body.text("/id").is_some()
    }

    fn shape(&self) -> &'static [&'static str] {
        &["/id", "/messages", "/trigger"]
    }

    fn wants(&self, request: &Request<'_>) -> Option<&'static Arc<Pointers>> {
        static CHAT: LazyLock<Arc<Pointers>> = LazyLock::new(|| Arc::new(Pointers::new(["/id"])));
        (*request.method == Method::POST).then_some(&CHAT)
    }

    fn recognise(&self, request: &Request<'_>, body: Option<&Extractor>) -> Option<Recognised> {
        match *request.method {
            // The chat's id names its run, too: it has one at a time, and a resuming client says no more. Whether the
            // work goes on without its client is the application's choice, which nobody can see from here. Most don't
            // resume, and for them closing is the only cancel: so the run ends with its exchange, and a resumed stream
            // shows that it lives. Applications that resume say `on_disconnect: continue`.
            Method::POST => {
                let chat = body.and_then(|body| body.text("/id")).and_then(key);
                Some(Recognised { run: chat.clone(), session: chat, ..Recognised::start(Answer::default()) })
            }
            Method::GET => {
                let chat = key(&percent_encoding::percent_decode_str(resumed_chat(request)?).decode_utf8_lossy())?;
                let watch = Answer { joined: Some(chat.clone()), ..Answer::default() };
                Some(Recognised {
                    kind: Kind::Join,
                    session: Some(chat.clone()),
                    run: Some(chat),
                    watch: Some(Box::new(watch)),
                    ..Recognised::other()
                })
            }
            _ => None,
        }
    }
}

const DEFAULT_PATH: &str = "/api/chat";

/// The chat of `{api}/{chat}/stream`, still percent-encoded.
fn resumed_chat<'a>(request: &Request<'a>) -> Option<&'a str> {
    let (api, chat) = request.path.strip_suffix("/stream")?.rsplit_once('/')?;
    (!api.is_empty() && !chat.is_empty()).then_some(chat)
}

/// Reads a UI message stream.
#[derive(Default)]
struct Answer {
    /// The run, where it was another exchange that started it.
    joined: Option<String>,
    status: u16,
    streams: bool,
}

impl Watch for Answer {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        self.streams = is_success(status) && is_event_stream(fields);
        if let Some(run) = &self.joined {
            if status == 204 {
                // Nothing is running.
                facts.push(Fact::RunEnded(run.clone(), RunOutcome::Unknown));
            } else if self.streams {
                facts.push(Fact::RunAlive(run.clone()));
            }
        }
        if self.streams { Look::Events } else { Look::Nothing }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        let outcome = match &*type_of(event.data) {
            b"finish" => RunOutcome::Completed,
            b"abort" => RunOutcome::Cancelled,
            b"error" => RunOutcome::Failed,
            b"" if event.data.trim_ascii() == b"[DONE]" => RunOutcome::Completed,
            _ => return,
        };
        facts.push(Fact::Ended(outcome));
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        if self.joined.is_some() {
            return AtEnd::GoesOn;
        }
        AtEnd::Ended(if self.streams { RunOutcome::Truncated } else { outcome_of_status(self.status) })
    }
}

#[cfg(test)]
mod tests {
    use crate::protocols::recorded::{auto, recognised, told, words};
    use crate::protocols::{AtEnd, Fact, OnDisconnect};
    use crate::run::{Kind, RunOutcome};

    const BODY: &str =
        r#"{"id":"c1","messages":[{"id":"m1","role":"user","parts":[]}],"trigger":"submit-message","messageId":null}"#;

    #[test]
    fn a_chat_is_the_session_and_names_its_run() {
        for path in ["/api/chat", "/anything"] {
            let text = format!("POST {path}\n\n{BODY}");
            assert_eq!(auto(&text), "ai-sdk");
            let start = recognised("ai-sdk", &text);
            assert_eq!(
                (words(&start), start.on_disconnect),
                ((Kind::Start, Some("c1"), Some("c1")), OnDisconnect::Ends)
            );
        }
        assert_eq!(auto("POST /api/chat\n\n{\"messages\":[]}"), "ai-sdk");
        assert_eq!(auto("POST /x\n\n{\"id\":\"c1\",\"messages\":[]}"), "");
        let resume = "GET /api/chat/c%201/stream";
        assert_eq!(auto(resume), "ai-sdk");
        assert_eq!(words(&recognised("ai-sdk", resume)), (Kind::Join, Some("c 1"), Some("c 1")));
        assert_eq!(auto("GET /threads/t1/stream"), "");
        assert_eq!(words(&recognised("ai-sdk", "GET /my/agent/c1/stream")).0, Kind::Join);
    }

    #[test]
    fn how_answers_end() {
        let sse = "200 content-type: text/event-stream, x-vercel-ai-ui-message-stream: v1";
        let start = "data: {\"type\":\"start\",\"messageId\":\"m\"}\n\ndata: {\"type\":\"text-delta\",\"delta\":\"\\\"finish\\\"\"}\n\n\
                     data: {\"type\":\"finish-step\"}\n\n";
        let done = "data: [DONE]\n\n";
        for (head, body, outcomes, end) in [
            (
                sse,
                format!("{start}data: {{\"type\":\"finish\"}}\n\n"),
                vec![RunOutcome::Completed],
                RunOutcome::Truncated,
            ),
            (
                sse,
                format!("{start}data: {{\"type\": \"abort\"}}\n\n"),
                vec![RunOutcome::Cancelled],
                RunOutcome::Truncated,
            ),
            (
                sse,
                format!("{start}data: {{\"type\":\"error\",\"errorText\":\"e\"}}\n\n"),
                vec![RunOutcome::Failed],
                RunOutcome::Truncated,
            ),
            (sse, format!("{start}{done}"), vec![RunOutcome::Completed], RunOutcome::Truncated),
            (sse, start.to_owned(), vec![], RunOutcome::Truncated),
            // The older stream of text lines.
            (
                "200 content-type: text/plain, x-vercel-ai-data-stream: v1",
                "0:\"a\"\n".to_owned(),
                vec![],
                RunOutcome::Completed,
            ),
            ("500", String::new(), vec![], RunOutcome::Failed),
        ] {
            let answer = told(&mut recognised("ai-sdk", &format!("POST /api/chat\n\n{BODY}")), head, &body);
            let facts = outcomes.into_iter().map(Fact::Ended).collect();
            assert_eq!(answer, (facts, AtEnd::Ended(end)), "{head} {body}");
        }
    }

    #[test]
    fn a_resuming_client_learns_whether_anything_runs() {
        let resume = || recognised("ai-sdk", "GET /api/chat/c1/stream");
        let nothing = vec![Fact::RunEnded("c1".to_owned(), RunOutcome::Unknown)];
        assert_eq!(told(&mut resume(), "204", ""), (nothing, AtEnd::GoesOn));
        let body = "data: {\"type\":\"finish\"}\n\n";
        let facts = vec![Fact::RunAlive("c1".to_owned()), Fact::Ended(RunOutcome::Completed)];
        assert_eq!(told(&mut resume(), "200 content-type: text/event-stream", body).0, facts);
        assert_eq!(told(&mut resume(), "404", ""), (vec![], AtEnd::GoesOn));
    }
}
