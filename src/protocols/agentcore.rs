//! AgentCore (Amazon Bedrock): the container's contract, and the paths of the service in front of containers.
//!
//! A container that works on after its answer says so in its ping: that is its load of one, and no run of ours.

use std::sync::{Arc, LazyLock};

use http::Method;
use memchr::memmem;

use crate::json::{Extractor, Pointers};
use crate::message::Fields;
use crate::protocols::{
    AtEnd, Fact, Look, Protocol, Recognised, Request, Sign, Watch, at_segment, is_event_stream, is_success, key,
    outcome_of_status, pointers,
};
use crate::run::{Kind, RunOutcome};
use crate::sse;

/// bedrock-agentcore 1.25.
pub struct Agentcore;

/// The session, in requests and answers.
const SESSION: &str = "x-amzn-bedrock-agentcore-runtime-session-id";

static STATUS: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/status"]));

impl Protocol for Agentcore {
    fn name(&self) -> &'static str {
        "agentcore"
    }

    /// `POST /invocations` alone is SageMaker's, too.
    fn sign(&self, request: &Request<'_>) -> Sign {
        let is_service = at_segment(request.path, "/runtimes").is_some() && spot(request).is_some();
        if is_service || request.fields.contains(SESSION) { Sign::Mark } else { Sign::None }
    }

    fn recognise(&self, request: &Request<'_>, _body: Option<&Extractor>) -> Option<Recognised> {
        let session = request.header(SESSION).and_then(key);
        let recognised = match spot(request) {
            Some(Spot::Invocation) => Recognised::start(Invocation { session: session.clone(), status: 0 }),
            Some(Spot::Stop) => {
                Recognised { kind: Kind::Cancel, watch: Some(Box::new(Stopped)), ..Recognised::other() }
            }
            None if session.is_some() => Recognised::other(),
            None => return None,
        };
        Some(Recognised { session, ..recognised })
    }

    fn load_path(&self) -> Option<&'static str> {
        Some("/ping")
    }

    fn load(&self, body: &[u8]) -> Option<u32> {
        match Extractor::read(&STATUS, body).text("/status")? {
            "HealthyBusy" => Some(1),
            "Healthy" => Some(0),
            _ => None,
        }
    }
}

enum Spot {
    /// Work: an invocation, a command, or a WebSocket.
    Invocation,
    /// The service ends the session, with all it runs.
    Stop,
}

fn spot(request: &Request<'_>) -> Option<Spot> {
    let posts = request.method == Method::POST;
    match request.path.trim_end_matches('/').rsplit_once('/')?.1 {
        "invocations" | "commands" if posts => Some(Spot::Invocation),
        "stopruntimesession" if posts => Some(Spot::Stop),
        "ws" if request.upgrade.is_some() => Some(Spot::Invocation),
        _ => None,
    }
}

/// Reads the answer to an invocation.
struct Invocation {
    session: Option<String>,
    status: u16,
}

impl Watch for Invocation {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        if !is_success(status) && status != 101 {
            return Look::Nothing;
        }
        let session = fields.get(SESSION).and_then(|value| key(std::str::from_utf8(value).ok()?));
        if session.is_some() && session != self.session {
            facts.extend(session.map(Fact::Session));
        }
        if is_event_stream(fields) { Look::Events } else { Look::Nothing }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        static ERROR_TYPE: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"error_type\""));
        // What the SDK writes when the agent raises in its stream.
        if event.data.starts_with(b"{\"error\"") && ERROR_TYPE.find(event.data).is_some() {
            facts.push(Fact::Ended(RunOutcome::Failed));
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        // RuntimeClientError: the service's word for a 5xx of the agent.
        let failed = self.status == 424;
        AtEnd::Ended(if failed { RunOutcome::Failed } else { outcome_of_status(self.status) })
    }
}

struct Stopped;

impl Watch for Stopped {
    fn head(&mut self, status: u16, _fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        if is_success(status) {
            facts.push(Fact::SessionRunsEnded(RunOutcome::Cancelled));
        }
        Look::Nothing
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocols::testing::{Asked, answer};

    const S: &str = "5f0c1d7e-0000-7000-8000-000000000001-5f0c1d7e";
    const EVENTS: (&str, &str) = ("content-type", "text/event-stream");
    const ARN: &str = "/runtimes/arn%3Aaws%3Abedrock-agentcore%3Aus-east-1%3A1%3Aruntime%2Fa";

    fn ask(protocol: Option<&'static dyn Protocol>, line: &str, fields: &[(&str, &str)]) -> Option<Recognised> {
        let line = line.replace("{ARN}", ARN);
        let (method, target) = line.split_once(' ').expect("method and target");
        Asked { protocol, method, target, fields, body: "" }.recognise()
    }

    #[test]
    fn kind_and_session_of_requests() {
        let session = ("X-Amzn-Bedrock-AgentCore-Runtime-Session-Id", S);
        for (line, fields, kind, key, ours) in [
            ("POST /invocations", &[session][..], Kind::Start, Some(S), true),
            ("POST /invocations", &[], Kind::Start, None, false),
            ("GET /ws", &[session, ("upgrade", "websocket")], Kind::Start, Some(S), true),
            ("POST {ARN}/invocations?qualifier=DEFAULT", &[session], Kind::Start, Some(S), true),
            ("POST {ARN}/invocations", &[], Kind::Start, None, true),
            ("GET {ARN}/ws", &[("upgrade", "websocket")], Kind::Start, None, true),
            ("POST {ARN}/stopruntimesession", &[session], Kind::Cancel, Some(S), true),
            ("GET /x", &[session], Kind::Other, Some(S), true),
        ] {
            let recognised = ask(Some(&Agentcore), line, fields).expect("as configured");
            assert_eq!((recognised.kind, recognised.session.as_deref()), (kind, key), "{line}");
            assert_eq!(ask(None, line, fields).is_some(), ours, "{line}");
        }
        assert!(ask(Some(&Agentcore), "GET /ping", &[]).is_none());
    }

    #[test]
    fn what_answers_tell() {
        let learned = ("x-amzn-bedrock-agentcore-runtime-session-id", S);
        let session = vec![Fact::Session(S.to_owned())];
        let mut failed = session.clone();
        failed.push(Fact::Ended(RunOutcome::Failed));
        let chunk = "data: \"{\\\"error\\\": 1}\"\n\ndata: {\"error\": 1}\n\n";
        let error =
            "data: {\"error\": \"boom\", \"error_type\": \"ValueError\", \"message\": \"An error occurred\"}\n\n";
        for (status, body, facts, outcome) in [
            (200, "", session.clone(), RunOutcome::Completed),
            (200, chunk, session.clone(), RunOutcome::Completed),
            (200, error, failed, RunOutcome::Completed),
            (424, "", vec![], RunOutcome::Failed),
            (500, "", vec![], RunOutcome::Failed),
            (429, "", vec![], RunOutcome::Completed),
        ] {
            let mut recognised = ask(Some(&Agentcore), "POST /invocations", &[]).expect("as configured");
            let told = answer(&mut recognised, status, &[learned, EVENTS], body);
            assert_eq!(told, (facts, AtEnd::Ended(outcome)), "{status} {body}");
        }
        let mut known = ask(Some(&Agentcore), "POST /invocations", &[learned]).expect("as configured");
        assert_eq!(answer(&mut known, 200, &[learned], "").0, []);
        for (status, facts) in [(200, vec![Fact::SessionRunsEnded(RunOutcome::Cancelled)]), (404, vec![])] {
            let mut stop = ask(None, "POST {ARN}/stopruntimesession", &[learned]).expect("by its path");
            assert_eq!(answer(&mut stop, status, &[], "").0, facts);
        }
    }

    #[test]
    fn a_busy_ping_is_a_load_of_one() {
        let ping = |status: &str| format!(r#"{{"status":"{status}","time_of_last_update":1}}"#);
        assert_eq!(Agentcore.load(ping("HealthyBusy").as_bytes()), Some(1));
        assert_eq!(Agentcore.load(ping("Healthy").as_bytes()), Some(0));
        assert_eq!(Agentcore.load(ping("Unknown").as_bytes()), None);
        assert_eq!(Agentcore.load(b"pong"), None);
    }
}
