//! Socket: responses that begin and end in the messages of a WebSocket, several at a time in lanes, some with no message
//! of the client before them.

use std::sync::{Arc, LazyLock};

use crate::json::{Extractor, Pointers};
use crate::message::Fields;
use crate::protocols::openai_responses::{Place, outcome, outcome_of_event};
use crate::protocols::typed::type_of;
use crate::protocols::{AtEnd, Fact, From, Look, Recognised, Watch, is_success, key};
use crate::run::RunOutcome;

/// So many open responses of one socket are counted.
const OPEN_RUNS_MAX: usize = 64;

/// A socket is placed as a session is: what runs on it is told by its messages.
pub fn recognise(place: Place<'_>) -> Recognised {
    let watch = Socket { open: Vec::new(), is_realtime: place == Place::Realtime };
    Recognised { creates_session: true, watch: Some(Box::new(watch)), ..Recognised::other() }
}

static MESSAGE: LazyLock<Arc<Pointers>> = LazyLock::new(|| {
    Arc::new(Pointers::new(["/response/id", "/response/status", "/response/incomplete_details/reason", "/stream_id"]))
});

struct Socket {
    open: Vec<Open>,
    is_realtime: bool,
}

struct Open {
    /// Empty where lanes are not used.
    lane: String,
    run: String,
}

impl Watch for Socket {
    fn head(&mut self, status: u16, _fields: &Fields, _facts: &mut Vec<Fact>) -> Look {
        // Over HTTP/2 a socket is opened by a 200 (RFC 8441).
        if status == 101 || is_success(status) { Look::Messages } else { Look::Nothing }
    }

    fn message(&mut self, from: From, text: &[u8], facts: &mut Vec<Fact>) {
        // What the client asks for waits in its lane until the server says that it begins.
        if from == From::Client {
            return;
        }
        let name = type_of(text);
        let began = *name == *b"response.created";
        // An error in Realtime is not the end of a response, which has a message of its own.
        let ended = match &*name {
            b"response.done" => Some(RunOutcome::Completed),
            b"error" if self.is_realtime => None,
            name => outcome_of_event(name),
        };
        if !began && ended.is_none() {
            return;
        }
        let values = Extractor::read(&MESSAGE, text);
        let lane = values.text("/stream_id").unwrap_or_default();
        let run = values.text("/response/id").and_then(key);
        match (run, ended) {
            (Some(run), None) => self.begin(run, lane, facts),
            (Some(run), Some(by_name)) => {
                let steered = values.text("/response/incomplete_details/reason") == Some("steered");
                let by_status = values.text("/response/status").and_then(outcome);
                self.end_run(
                    |open| open.run == run,
                    if steered { RunOutcome::Interrupted } else { by_status.unwrap_or(by_name) },
                    facts,
                );
            }
            // A bare error: the lane says which.
            (None, Some(outcome)) => self.end_run(|open| open.lane == lane, outcome, facts),
            (None, None) => {}
        }
    }

    fn end(&mut self, facts: &mut Vec<Fact>) -> AtEnd {
        // Closing is how a client cancels what runs.
        self.cut(RunOutcome::Cancelled, facts);
        AtEnd::GoesOn
    }

    fn cut(&mut self, outcome: RunOutcome, facts: &mut Vec<Fact>) {
        facts.extend(self.open.drain(..).map(|open| Fact::RunEnded(open.run, outcome)));
    }
}

impl Socket {
    fn begin(&mut self, run: String, lane: &str, facts: &mut Vec<Fact>) {
        if self.open.len() < OPEN_RUNS_MAX && self.open.iter().all(|open| open.run != run) {
            facts.push(Fact::RunStarted(run.clone()));
            self.open.push(Open { lane: lane.to_owned(), run });
        }
    }

    fn end_run(&mut self, is_it: impl Fn(&Open) -> bool, outcome: RunOutcome, facts: &mut Vec<Fact>) {
        if let Some(index) = self.open.iter().position(is_it) {
            facts.push(Fact::RunEnded(self.open.remove(index).run, outcome));
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::protocols::recorded::{auto, recognised, told_by_messages, words};
    use crate::protocols::{AtEnd, Fact, Recognised};
    use crate::run::{Kind, RunOutcome};

    fn socket(path: &str) -> Recognised {
        recognised("openai-responses", &format!("GET {path}\nupgrade: websocket"))
    }

    fn started(id: &str) -> Fact {
        Fact::RunStarted(id.to_owned())
    }

    fn ended(id: &str, outcome: RunOutcome) -> Fact {
        Fact::RunEnded(id.to_owned(), outcome)
    }

    fn message(kind: &str, rest: &str) -> String {
        format!(r#"{{"type":"{kind}",{rest}}}"#)
    }

    #[test]
    fn a_socket_is_no_run_but_is_placed_like_one() {
        for path in ["/v1/responses", "/v1/realtime?model=m", "/v1/realtime?call_id=c"] {
            let socket = socket(path);
            assert_eq!((words(&socket), socket.creates_session), ((Kind::Other, None, None), true));
            assert_eq!(auto(&format!("GET {path}\nupgrade: websocket")), "openai-responses");
        }
        assert_eq!(auto("POST /v1/realtime/calls\n\n{}"), "");
    }

    /// Trap 10.
    #[test]
    fn lanes_run_side_by_side_and_a_steered_response_has_a_successor() {
        let of = |id: &str, lane: &str| format!(r#""response":{{"id":"{id}"}},"stream_id":"{lane}""#);
        let steered =
            r#""response":{"id":"r2","status":"incomplete","incomplete_details":{"reason":"steered"}},"stream_id":"b""#;
        let facts = told_by_messages(
            &mut socket("/v1/responses"),
            &[
                r#">{"type":"response.create","stream_id":"a","input":[]}"#,
                r#">{"type":"response.created","response":{"id":"no"}}"#,
                &message("response.created", &of("r1", "a")),
                &message("response.created", &of("r2", "b")),
                &message("response.output_text.delta", r#""delta":"response.completed""#),
                &message("response.completed", &of("r1", "a")),
                r#">{"type":"response.steer","previous_response_id":"r2","input":[]}"#,
                &message("response.steer.accepted", &of("r2", "b")),
                &message("response.incomplete", steered),
                &message("response.created", &of("r3", "b")),
                &message("response.created", &of("r4", "c")),
                &message("error", r#""error":{"code":"x"},"stream_id":"b""#),
                // It concerns no response that has begun.
                &message("error", r#""error":{"code":"previous_response_not_found"},"stream_id":"d""#),
                &message("response.completed", &of("r4", "c")),
                &message("response.failed", &of("r4", "c")),
            ],
        );
        assert_eq!(
            facts,
            [
                started("r1"),
                started("r2"),
                ended("r1", RunOutcome::Completed),
                ended("r2", RunOutcome::Interrupted),
                started("r3"),
                started("r4"),
                ended("r3", RunOutcome::Failed),
                ended("r4", RunOutcome::Completed),
            ]
        );
    }

    #[test]
    fn realtime_responses_begin_without_the_client_and_end_by_their_status() {
        let mut socket = socket("/v1/realtime?model=m");
        let done = |status: &str| message("response.done", &format!(r#""response":{{"id":"r1","status":"{status}"}}"#));
        for (status, outcome) in [
            ("completed", RunOutcome::Completed),
            ("cancelled", RunOutcome::Cancelled),
            ("failed", RunOutcome::Failed),
            ("incomplete", RunOutcome::Completed),
        ] {
            let created = message("response.created", r#""response":{"id":"r1"}"#);
            let error = message("error", r#""error":{"type":"invalid_request_error"}"#);
            let facts = told_by_messages(&mut socket, &[&created, &error, &done(status)]);
            assert_eq!(facts, [started("r1"), ended("r1", outcome)], "{status}");
        }
    }

    #[test]
    fn what_is_open_ends_with_the_socket() {
        let mut socket = socket("/v1/responses");
        told_by_messages(&mut socket, &[&message("response.created", r#""response":{"id":"r1"}"#)]);
        let mut facts = Vec::new();
        let watch = socket.watch.as_mut().unwrap();
        watch.cut(RunOutcome::Truncated, &mut facts);
        assert_eq!(facts, [ended("r1", RunOutcome::Truncated)]);
        facts.clear();
        assert_eq!(watch.end(&mut facts), AtEnd::GoesOn);
        assert_eq!(facts, []);
    }
}
