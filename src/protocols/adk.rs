//! ADK (`adk api_server`): a session belongs to an app and a user, and a run ends with its exchange.

use std::sync::{Arc, LazyLock};

use http::Method;
use percent_encoding::percent_decode_str;

use crate::json::{Extractor, Pointers};
use crate::message::Fields;
use crate::protocols::{
    AtEnd, Fact, KEY_BYTES_MAX, Look, Protocol, Recognised, Request, Sign, Watch, at_segment, is_event_stream, is_json,
    is_success, key, outcome_of_status, pointers,
};
use crate::run::RunOutcome;
use crate::sse;

/// google-adk 2.13.
pub struct Adk;

/// Bodies come in both forms of names.
const SHAPE: &[&str] = &[
    "/app_name",
    "/appName",
    "/user_id",
    "/userId",
    "/session_id",
    "/sessionId",
    "/new_message",
    "/newMessage",
    "/invocation_id",
    "/invocationId",
];
/// All that names the session.
static SESSION: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&SHAPE[..6]));
static SESSION_ID: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/id"]));
static FIRST_EVENT: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/0/invocationId"]));
static EVENT: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/error", "/invocationId"]));

impl Protocol for Adk {
    fn name(&self) -> &'static str {
        "adk"
    }

    fn sign(&self, request: &Request<'_>) -> Sign {
        match spot(request) {
            Some(Spot::Run) => Sign::Path,
            Some(_) => Sign::Mark,
            None => Sign::None,
        }
    }

    fn has_shape(&self, request: &Request<'_>, body: &Extractor) -> bool {
        matches!(spot(request), Some(Spot::Run | Spot::RunEvents)) && is_run(body)
    }

    fn shape(&self) -> &'static [&'static str] {
        SHAPE
    }

    fn wants(&self, request: &Request<'_>) -> Option<&'static Arc<Pointers>> {
        match spot(request)? {
            Spot::Run | Spot::RunEvents => Some(&SESSION),
            Spot::Live | Spot::NewSession { .. } | Spot::Session { .. } => None,
        }
    }

    fn recognise(&self, request: &Request<'_>, body: Option<&Extractor>) -> Option<Recognised> {
        Some(match spot(request)? {
            Spot::Run | Spot::RunEvents => {
                let body = body?;
                let text = |snake, camel| body.text(snake).or_else(|| body.text(camel));
                let session = text("/session_id", "/sessionId")?;
                let user = text("/user_id", "/userId").unwrap_or_default();
                // The server can have a default.
                let app = text("/app_name", "/appName").unwrap_or_default();
                Recognised { session: joined(app, user, session), ..Recognised::start(Run::default()) }
            }
            Spot::Live => {
                let value = |name| request.query_value(name).unwrap_or_default();
                let session = value("session_id");
                let session =
                    if session.is_empty() { None } else { joined(&value("app_name"), &value("user_id"), &session) };
                Recognised { session, ..Recognised::start(Run::default()) }
            }
            Spot::NewSession { app, user, session } => {
                let session = session.and_then(|session| joined(&app, &user, &session));
                Recognised {
                    creates_session: true,
                    watch: Some(Box::new(NewSession { app, user })),
                    session,
                    ..Recognised::other()
                }
            }
            Spot::Session { session } => {
                let deletes = request.method == Method::DELETE;
                Recognised {
                    watch: if deletes { Some(Box::new(Deleted)) } else { None },
                    session,
                    ..Recognised::other()
                }
            }
        })
    }
}

enum Spot {
    /// `/run`: a name that many have.
    Run,
    /// `/run_sse`.
    RunEvents,
    /// `/run_live`, a WebSocket.
    Live,
    NewSession {
        app: String,
        user: String,
        /// As the client wants to call it.
        session: Option<String>,
    },
    Session {
        session: Option<String>,
    },
}

fn spot(request: &Request<'_>) -> Option<Spot> {
    let posts = request.method == Method::POST;
    match request.path.rsplit_once('/')?.1 {
        "run" if posts => return Some(Spot::Run),
        "run_sse" if posts => return Some(Spot::RunEvents),
        "run_live" if request.upgrade.is_some() => return Some(Spot::Live),
        _ => {}
    }
    // /apps/{app}/users/{user}/sessions[/{session}]
    let (_, tail) = at_segment(request.path, "/apps")?;
    let mut segments = tail.trim_end_matches('/').split('/').skip(2);
    let mut next = || segments.next().map(|segment| percent_decode_str(segment).decode_utf8_lossy().into_owned());
    let app = next()?;
    let users = next()?;
    let user = next()?;
    let sessions = next()?;
    let session = next();
    if users != "users" || sessions != "sessions" || next().is_some() {
        return None;
    }
    if posts {
        // Kept with the exchange.
        let fits = app.len() + user.len() <= KEY_BYTES_MAX;
        return fits.then_some(Spot::NewSession { app, user, session });
    }
    Some(Spot::Session { session: session.and_then(|session| joined(&app, &user, &session)) })
}

/// Whether a body is that of a run.
fn is_run(body: &Extractor) -> bool {
    let has = |snake, camel| body.has(snake) || body.has(camel);
    has("/session_id", "/sessionId")
        && has("/user_id", "/userId")
        && (has("/new_message", "/newMessage") || has("/invocation_id", "/invocationId"))
}

/// A session is known by all three of its names.
fn joined(app: &str, user: &str, session: &str) -> Option<String> {
    if session.is_empty() || app.len() + user.len() + session.len() > KEY_BYTES_MAX {
        return None;
    }
    key(&format!("{app}/{user}/{session}"))
}

/// Reads the answer to a run: a list of events, an event stream, or a WebSocket.
#[derive(Default)]
struct Run {
    status: u16,
    told: bool,
}

impl Run {
    fn tell(&mut self, run: Option<&str>, facts: &mut Vec<Fact>) {
        if let Some(run) = run.and_then(key) {
            self.told = true;
            facts.push(Fact::Run(run));
        }
    }
}

impl Watch for Run {
    fn head(&mut self, status: u16, fields: &Fields, _facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        if !is_success(status) {
            Look::Nothing
        } else if is_event_stream(fields) {
            Look::Events
        } else if is_json(fields) {
            Look::Json(&FIRST_EVENT)
        } else {
            Look::Nothing
        }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        self.tell(values.text("/0/invocationId"), facts);
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        let is_error = event.data.starts_with(b"{\"error\"");
        if self.told && !is_error {
            return;
        }
        let values = Extractor::read(&EVENT, event.data);
        if is_error && values.has("/error") {
            facts.push(Fact::Ended(RunOutcome::Failed));
        } else if !self.told {
            self.tell(values.text("/invocationId"), facts);
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::Ended(outcome_of_status(self.status))
    }
}

/// Reads the id of a session that was made.
struct NewSession {
    app: String,
    user: String,
}

impl Watch for NewSession {
    fn head(&mut self, status: u16, fields: &Fields, _facts: &mut Vec<Fact>) -> Look {
        if is_success(status) && is_json(fields) { Look::Json(&SESSION_ID) } else { Look::Nothing }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        let session = values.text("/id").and_then(|session| joined(&self.app, &self.user, session));
        facts.extend(session.map(Fact::Session));
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}

struct Deleted;

impl Watch for Deleted {
    fn head(&mut self, status: u16, _fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        if is_success(status) {
            facts.push(Fact::SessionLost);
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
    use crate::protocols::OnDisconnect;
    use crate::protocols::testing::{Asked, answer};
    use crate::run::Kind;

    const JSON: (&str, &str) = ("content-type", "application/json");
    const EVENTS: (&str, &str) = ("content-type", "text/event-stream");
    const SNAKE: &str = r#"{"app_name":"a","user_id":"u","session_id":"s","new_message":{"parts":[]}}"#;

    fn ask(protocol: Option<&'static dyn Protocol>, line: &str, body: &str) -> Option<Recognised> {
        let (method, target) = line.split_once(' ').expect("method and target");
        let fields: &[(&str, &str)] = if target.contains("run_live") { &[("upgrade", "websocket")] } else { &[] };
        Asked { protocol, method, target, fields, body }.recognise()
    }

    /// Trap 16: both forms of names.
    #[test]
    fn kind_and_session_of_requests() {
        let camel = r#"{"newMessage":{},"appName":"a","userId":"u","sessionId":"s"}"#;
        let mixed = r#"{"appName":"a","user_id":"u","sessionId":"s","invocation_id":"e-1"}"#;
        let without_app = r#"{"user_id":"u","session_id":"s","new_message":{}}"#;
        for protocol in [None, Some(&Adk as &'static dyn Protocol)] {
            for (line, body, kind, session, creates) in [
                ("POST /run", SNAKE, Kind::Start, Some("a/u/s"), false),
                ("POST /run", camel, Kind::Start, Some("a/u/s"), false),
                ("POST /run", mixed, Kind::Start, Some("a/u/s"), false),
                ("POST /run", without_app, Kind::Start, Some("/u/s"), false),
                ("POST /x/run_sse", camel, Kind::Start, Some("a/u/s"), false),
                ("GET /run_live?app_name=a&user_id=u&session_id=s%20t", "", Kind::Start, Some("a/u/s t"), false),
                ("POST /apps/a/users/u/sessions", "{}", Kind::Other, None, true),
                ("POST /apps/a/users/u/sessions/s", "{}", Kind::Other, Some("a/u/s"), true),
                ("GET /apps/a/users/u%40x/sessions/s", "", Kind::Other, Some("a/u@x/s"), false),
                ("GET /apps/a/users/u/sessions", "", Kind::Other, None, false),
                ("PATCH /apps/a/users/u/sessions/s", "{}", Kind::Other, Some("a/u/s"), false),
                ("DELETE /apps/a/users/u/sessions/s", "", Kind::Other, Some("a/u/s"), false),
            ] {
                let recognised = ask(protocol, line, body).unwrap_or_else(|| panic!("{line} is ADK's"));
                assert_eq!(recognised.protocol.map(Protocol::name), Some("adk"), "{line}");
                assert_eq!(recognised.kind, kind, "{line}");
                assert_eq!(recognised.session.as_deref(), session, "{line} {body}");
                assert_eq!(recognised.creates_session, creates, "{line}");
                assert_eq!(recognised.on_disconnect, OnDisconnect::Ends, "{line}");
            }
        }
        for (line, body) in [
            ("POST /run", r#"{"command":"ls"}"#),
            ("POST /run", ""),
            ("GET /run", ""),
            ("GET /list-apps", ""),
            ("POST /apps/a/users/u", "{}"),
            ("POST /apps/a/users/u/sessions/s/x", "{}"),
        ] {
            assert!(ask(None, line, body).is_none(), "{line} {body}");
        }
        let long = "x".repeat(1 << 20);
        let body = format!(r#"{{"app_name":"{long}","user_id":"u","session_id":"{long}","new_message":{{}}}}"#);
        assert!(ask(Some(&Adk), "POST /run_sse", &body).is_none_or(|run| run.session.is_none()));
        let recognised = ask(Some(&Adk), &format!("GET /apps/a/users/{long}/sessions/s"), "").expect("ADK's");
        assert_eq!(recognised.session, None);
    }

    #[test]
    fn what_answers_tell() {
        let events = "data: {\"content\":{\"parts\":[{\"text\":\"{\\\"error\\\"\"}]},\"invocationId\":\"e-1\"}\n\n\
            data: {\"invocationId\":\"e-2\",\"errorCode\":\"MAX_TOKENS\"}\n\n";
        let error = "data: {\"error\":\"boom\",\"error_details\":{}}\n\n";
        let failing = format!("{events}{error}");
        let run = Fact::Run("e-1".to_owned());
        let failed = Fact::Ended(RunOutcome::Failed);
        let completed = AtEnd::Ended(RunOutcome::Completed);
        for (line, status, head, body, facts, end) in [
            ("POST /run_sse", 200, EVENTS, events, vec![run.clone()], completed),
            ("POST /run_sse", 200, EVENTS, &failing, vec![run.clone(), failed.clone()], completed),
            ("POST /run_sse", 200, EVENTS, error, vec![failed], completed),
            ("POST /run_sse", 200, EVENTS, "", vec![], completed),
            ("POST /run_sse", 404, JSON, "{}", vec![], completed),
            ("POST /run_sse", 500, JSON, "{}", vec![], AtEnd::Ended(RunOutcome::Failed)),
            ("POST /run", 200, JSON, r#"[{"id":1,"invocationId":"e-1"},{}]"#, vec![run], completed),
            ("POST /run", 200, JSON, "[]", vec![], completed),
            ("GET /run_live?session_id=s", 101, JSON, "", vec![], completed),
        ] {
            let mut recognised = ask(Some(&Adk), line, SNAKE).expect("ADK's");
            assert_eq!(answer(&mut recognised, status, &[head], body), (facts, end), "{line} {status} {body}");
        }
        for (status, body, facts) in [
            (200, r#"{"id":"s","appName":"a","userId":"u"}"#, vec![Fact::Session("a/u/s".to_owned())]),
            (409, r#"{"id":"s"}"#, vec![]),
            (200, "{}", vec![]),
        ] {
            let mut recognised = ask(None, "POST /apps/a/users/u/sessions", "{}").expect("ADK's");
            assert_eq!(answer(&mut recognised, status, &[JSON], body).0, facts);
        }
        let mut recognised = ask(None, "DELETE /apps/a/users/u/sessions/s", "").expect("ADK's");
        assert_eq!(answer(&mut recognised, 200, &[JSON], "null").0, [Fact::SessionLost]);
    }
}
