//! ACP (Agent Communication Protocol): runs with a session, which go on when their caller leaves, in every mode.
//!
//! A run that awaits its caller holds no worker: it has ended, and its resumption starts another under the same key.
//! (Zed's Agent Client Protocol, which has the same letters, is no HTTP.)

use std::sync::{Arc, LazyLock};

use http::Method;
use memchr::memmem;

use crate::json::{Extractor, Pointers};
use crate::message::Fields;
use crate::protocols::{
    AtEnd, Call, Cancel, Fact, KEY_BYTES_MAX, Look, OnDisconnect, Protocol, Recognised, Request, RunRef, Sign,
    Standing, Watch, at_segment, is_event_stream, is_json, is_segment, is_success, is_uuid, key, outcome_of_status,
    pointers,
};
use crate::run::{Kind, RunOutcome};
use crate::sse;

/// acp-sdk 1.0.3, specification 0.2.0.
pub struct Acp;

const SHAPE: &[&str] = &["/agent_name", "/input", "/session_id"];
static CREATE: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(SHAPE));
static RUN: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/run_id", "/session_id", "/status"]));
static EVENT: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/type", "/run/run_id", "/run/session_id"]));

impl Protocol for Acp {
    fn name(&self) -> &'static str {
        "acp"
    }

    fn sign(&self, request: &Request<'_>) -> Sign {
        match place(request.path) {
            // LangGraph has runs without a thread, too: the body tells.
            Some(Place { spot: Spot::Runs, .. }) if request.method == Method::POST => Sign::Path,
            Some(Place { spot: Spot::Run(run) | Spot::Cancel(run) | Spot::Events(run), .. }) if is_uuid(run) => {
                Sign::Path
            }
            _ => Sign::None,
        }
    }

    fn has_shape(&self, request: &Request<'_>, body: &Extractor) -> bool {
        body.text("/agent_name").is_some()
            && body.has("/input")
            && place(request.path).is_some_and(|place| place.spot == Spot::Runs)
    }

    fn shape(&self) -> &'static [&'static str] {
        SHAPE
    }

    fn wants(&self, request: &Request<'_>) -> Option<&'static Arc<Pointers>> {
        let creates = request.method == Method::POST && place(request.path)?.spot == Spot::Runs;
        creates.then_some(&CREATE)
    }

    fn recognise(&self, request: &Request<'_>, body: Option<&Extractor>) -> Option<Recognised> {
        let place = place(request.path)?;
        let posts = request.method == Method::POST;
        let (kind, role, run) = match place.spot {
            Spot::Runs if posts => {
                // Without its body it may be anyone's.
                body?.text("/agent_name")?;
                (Kind::Start, Role::Start, None)
            }
            // It resumes one that waits.
            Spot::Run(run) if posts => (Kind::Start, Role::Start, Some(run)),
            Spot::Cancel(run) if posts => (Kind::Cancel, Role::Ask, Some(run)),
            Spot::Run(run) => (Kind::Read, Role::Ask, Some(run)),
            Spot::Events(run) => (Kind::Read, Role::Ask, Some(run)),
            Spot::Session(session) => return Some(Recognised { session: key(session), ..Recognised::other() }),
            Spot::Runs | Spot::Cancel(_) => return None,
        };
        let run = run.and_then(key);
        // What names only the run is for the session that the run was told as.
        let session = match kind {
            Kind::Start if run.is_none() => body?.text("/session_id").and_then(key),
            _ => run.clone(),
        };
        Some(Recognised {
            kind,
            on_disconnect: OnDisconnect::GoesOn,
            base: place.base.to_owned(),
            watch: Some(Box::new(Answer { role, session: session.clone(), run: run.clone(), told: false, status: 0 })),
            session,
            run,
            ..Recognised::other()
        })
    }

    fn status_call(&self, run: &RunRef<'_>) -> Option<Call> {
        let target = format!("{}/runs/{}", run.base, run.key);
        Some(Call { method: Method::GET, target, fields: Vec::new(), body: Vec::new() })
    }

    fn judge(&self, _run: &RunRef<'_>, status: u16, body: &[u8]) -> Standing {
        match status {
            404 => Standing::Ended(RunOutcome::Unknown),
            200 => Extractor::read(&RUN, body).text("/status").map_or(Standing::NoEvidence, standing),
            _ => Standing::NoEvidence,
        }
    }

    fn cancel_call(&self, run: &RunRef<'_>, _how: Cancel) -> Option<Call> {
        let target = format!("{}/runs/{}/cancel", run.base, run.key);
        Some(Call { method: Method::POST, target, fields: Vec::new(), body: Vec::new() })
    }
}

struct Place<'a> {
    /// What stands before `/runs` or `/sessions`.
    base: &'a str,
    spot: Spot<'a>,
}

#[derive(PartialEq, Eq)]
enum Spot<'a> {
    Runs,
    Run(&'a str),
    Cancel(&'a str),
    Events(&'a str),
    Session(&'a str),
}

fn place(path: &str) -> Option<Place<'_>> {
    let (base, tail) =
        at_segment(path, "/runs").or_else(|| at_segment(path, "/sessions")).or_else(|| at_segment(path, "/session"))?;
    // It is kept with every run.
    if base.len() > KEY_BYTES_MAX {
        return None;
    }
    let mut segments = tail.trim_end_matches('/').split('/').skip(1);
    let is_runs = segments.next() == Some("runs");
    let spot = match (segments.next(), segments.next(), segments.next()) {
        (None, ..) if is_runs => Spot::Runs,
        (Some(""), ..) => return None,
        (Some(run), None, _) if is_runs => Spot::Run(run),
        (Some(run), Some("cancel"), None) if is_runs => Spot::Cancel(run),
        (Some(run), Some("events"), None) if is_runs => Spot::Events(run),
        (Some(session), None, _) if !is_runs => Spot::Session(session),
        _ => return None,
    };
    Some(Place { base, spot })
}

/// What a run's status says of it.
fn standing(status: &str) -> Standing {
    match status {
        "created" | "in-progress" | "cancelling" => Standing::Running,
        "completed" => Standing::Ended(RunOutcome::Completed),
        // It waits for its caller.
        "awaiting" => Standing::Ended(RunOutcome::Completed),
        "failed" => Standing::Ended(RunOutcome::Failed),
        "cancelled" => Standing::Ended(RunOutcome::Cancelled),
        _ => Standing::NoEvidence,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Start,
    /// A read or a cancel.
    Ask,
}

/// Reads any answer about a run.
struct Answer {
    role: Role,
    session: Option<String>,
    run: Option<String>,
    /// The run of a start is told.
    told: bool,
    status: u16,
}

impl Answer {
    /// Runs are told as sessions, too: most later requests name nothing else.
    fn learn(&mut self, run: Option<&str>, session: Option<&str>, facts: &mut Vec<Fact>) {
        let session = session.and_then(key);
        if session.is_some() && session != self.session {
            facts.extend(session.clone().map(Fact::Session));
            self.session = session;
        }
        if !self.told
            && let Some(run) = run.filter(|run| is_segment(run)).and_then(key)
        {
            if self.run.as_ref() != Some(&run) {
                facts.push(Fact::Session(run.clone()));
            }
            facts.push(Fact::Run(run.clone()));
            self.run = Some(run);
            self.told = true;
        }
    }
}

impl Watch for Answer {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        if !is_success(status) {
            if status == 404
                && self.role == Role::Ask
                && let Some(run) = self.run.take()
            {
                facts.push(Fact::RunEnded(run, RunOutcome::Unknown));
            }
            return Look::Nothing;
        }
        if self.role == Role::Start {
            let run = fields.get("run-id").and_then(|value| std::str::from_utf8(value).ok());
            self.learn(run, None, facts);
        }
        if status == 202 && self.role == Role::Ask {
            // A cancel is on its way.
            facts.push(Fact::RecheckSession);
        }
        if is_event_stream(fields) {
            Look::Events
        } else if is_json(fields) {
            Look::Json(&RUN)
        } else {
            Look::Nothing
        }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        let standing = values.text("/status").map_or(Standing::NoEvidence, standing);
        if self.role == Role::Start {
            self.learn(values.text("/run_id"), values.text("/session_id"), facts);
            if let Standing::Ended(outcome) = standing {
                facts.push(Fact::Ended(outcome));
            }
            return;
        }
        // A list of events has no status.
        match (standing, self.run.clone()) {
            (Standing::Running, Some(run)) => facts.push(Fact::RunAlive(run)),
            (Standing::Ended(outcome), Some(run)) => facts.push(Fact::RunEnded(run, outcome)),
            _ => {}
        }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        static RUN_EVENT: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"run."));
        static ERROR: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"error\""));
        if RUN_EVENT.find(event.data).is_none() && ERROR.find(event.data).is_none() {
            return;
        }
        let values = Extractor::read(&EVENT, event.data);
        match values.text("/type") {
            Some("error") => facts.push(Fact::Ended(RunOutcome::Failed)),
            Some(kind) => {
                let Some(status) = kind.strip_prefix("run.") else { return };
                self.learn(values.text("/run/run_id"), values.text("/run/session_id"), facts);
                if let Standing::Ended(outcome) = standing(status) {
                    facts.push(Fact::Ended(outcome));
                }
            }
            None => {}
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        match &self.run {
            _ if self.role == Role::Ask => AtEnd::GoesOn,
            _ if !is_success(self.status) => AtEnd::Ended(outcome_of_status(self.status)),
            Some(_) => AtEnd::GoesOn,
            None => AtEnd::Ended(RunOutcome::Unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocols::testing::{Asked, answer};

    const R: &str = "0199a1b2-0000-7000-8000-00000000000a";
    const JSON: (&str, &str) = ("content-type", "application/json");
    const EVENTS: (&str, &str) = ("content-type", "text/event-stream; charset=utf-8");
    const CREATE: &str = r#"{"agent_name":"echo","input":[],"mode":"sync","session_id":"s"}"#;

    fn ask(protocol: Option<&'static dyn Protocol>, line: &str, body: &str) -> Option<Recognised> {
        let line = line.replace("{R}", R);
        let (method, target) = line.split_once(' ').expect("method and target");
        Asked { protocol, method, target, fields: &[], body }.recognise()
    }

    fn acp(line: &str, body: &str) -> Recognised {
        ask(Some(&Acp), line, body).unwrap_or_else(|| panic!("{line} is ACP's"))
    }

    #[test]
    fn kind_session_and_run_of_requests() {
        use Kind::{Cancel, Other, Read, Start};
        for (line, body, kind, session, run) in [
            ("POST /runs", CREATE, Start, Some("s"), None),
            ("POST /x/runs/", r#"{"agent_name":"a","input":[]}"#, Start, None, None),
            ("POST /runs/{R}", r#"{"await_resume":{},"mode":"stream"}"#, Start, Some(R), Some(R)),
            ("GET /runs/{R}", "", Read, Some(R), Some(R)),
            ("GET /runs/{R}/events", "", Read, Some(R), Some(R)),
            ("POST /runs/{R}/cancel", "", Cancel, Some(R), Some(R)),
            ("GET /sessions/s", "", Other, Some("s"), None),
            ("GET /session/s", "", Other, Some("s"), None),
        ] {
            let recognised = acp(line, body);
            assert_eq!(recognised.kind, kind, "{line}");
            assert_eq!((recognised.session.as_deref(), recognised.run.as_deref()), (session, run), "{line}");
            assert_eq!(recognised.on_disconnect == OnDisconnect::GoesOn, kind != Other, "{line}");
            assert_eq!(recognised.base, if line.contains("/x/") { "/x" } else { "" });
        }
        for (line, body) in
            [("GET /agents", ""), ("GET /ping", ""), ("GET /runs", ""), ("POST /runs", "{}"), ("POST /runs", "")]
        {
            assert!(ask(Some(&Acp), line, body).is_none(), "{line} {body}");
        }
    }

    #[test]
    fn auto_tells_it_from_langgraph_by_the_body() {
        for (line, body, name) in [
            ("POST /runs", CREATE, Some("acp")),
            ("POST /runs", r#"{"assistant_id":"a","input":[]}"#, Some("langgraph")),
            ("POST /runs", r#"{"input":[]}"#, None),
            ("GET /runs/{R}", "", Some("acp")),
            ("POST /runs/{R}/cancel", "{}", Some("acp")),
            ("GET /runs/7", "", None),
            ("GET /sessions/s", "", None),
        ] {
            let found = ask(None, line, body).and_then(|found| found.protocol).map(Protocol::name);
            assert_eq!(found, name, "{line} {body}");
        }
    }

    #[test]
    fn what_answers_to_starts_tell() {
        let run = |status| format!(r#"{{"run_id":"r","agent_name":"a","session_id":"s2","status":"{status}"}}"#);
        let learned = vec![Fact::Session("r".to_owned()), Fact::Run("r".to_owned()), Fact::Session("s2".to_owned())];
        for (code, status, ended) in [
            (200, "completed", Some(RunOutcome::Completed)),
            (200, "failed", Some(RunOutcome::Failed)),
            (200, "cancelled", Some(RunOutcome::Cancelled)),
            (200, "awaiting", Some(RunOutcome::Completed)),
            (202, "created", None),
            (202, "in-progress", None),
        ] {
            let mut facts = learned.clone();
            facts.extend(ended.map(Fact::Ended));
            let told = answer(&mut acp("POST /runs", CREATE), code, &[("Run-ID", "r"), JSON], &run(status));
            assert_eq!(told, (facts, AtEnd::GoesOn), "{status}");
        }
        let told = answer(&mut acp("POST /runs", CREATE), 404, &[("Run-ID", "r"), JSON], &run("failed"));
        assert_eq!(told, (vec![], AtEnd::Ended(RunOutcome::Completed)));
        let told = answer(&mut acp("POST /runs", CREATE), 200, &[JSON], "null");
        assert_eq!(told, (vec![], AtEnd::Ended(RunOutcome::Unknown)));

        let event = |kind, run| {
            format!("data: {{\"type\":\"{kind}\",\"run\":{{\"run_id\":\"{run}\",\"session_id\":\"s2\"}}}}\n\n")
        };
        let part = "data: {\"type\":\"message.part\",\"part\":{\"content\":\"\\\"run.failed\\\" \\\"error\\\"\"}}\n\n";
        for (kind, ended) in [
            ("run.completed", Some(RunOutcome::Completed)),
            ("run.failed", Some(RunOutcome::Failed)),
            ("run.cancelled", Some(RunOutcome::Cancelled)),
            ("run.awaiting", Some(RunOutcome::Completed)),
            ("run.in-progress", None),
            ("error", Some(RunOutcome::Failed)),
        ] {
            let stream = format!("{}{part}{}", event("run.created", "r"), event(kind, "r"));
            let mut facts =
                vec![Fact::Session("s2".to_owned()), Fact::Session("r".to_owned()), Fact::Run("r".to_owned())];
            facts.extend(ended.map(Fact::Ended));
            let told = answer(&mut acp("POST /runs", CREATE), 200, &[EVENTS], &stream);
            assert_eq!(told, (facts, AtEnd::GoesOn), "{kind}");
        }
        // A resumed run keeps its name.
        let facts = [Fact::Session("s2".to_owned()), Fact::Run(R.to_owned()), Fact::Ended(RunOutcome::Completed)];
        let mut resumed = acp("POST /runs/{R}", "{}");
        assert_eq!(answer(&mut resumed, 200, &[EVENTS], &event("run.completed", R)).0, facts);
    }

    #[test]
    fn what_reads_and_cancels_tell() {
        let ended = |outcome| vec![Fact::RunEnded(R.to_owned(), outcome)];
        for (line, code, body, facts) in [
            ("GET /runs/{R}", 200, r#"{"status":"in-progress"}"#, vec![Fact::RunAlive(R.to_owned())]),
            ("GET /runs/{R}", 200, r#"{"status":"completed"}"#, ended(RunOutcome::Completed)),
            ("GET /runs/{R}", 200, r#"{"status":"awaiting"}"#, ended(RunOutcome::Completed)),
            ("GET /runs/{R}", 404, r#"{"code":"not_found"}"#, ended(RunOutcome::Unknown)),
            ("GET /runs/{R}", 500, r#"{"status":"completed"}"#, vec![]),
            ("GET /runs/{R}/events", 200, r#"{"events":[{"status":"completed"}]}"#, vec![]),
            (
                "POST /runs/{R}/cancel",
                202,
                r#"{"status":"cancelling"}"#,
                vec![Fact::RecheckSession, Fact::RunAlive(R.to_owned())],
            ),
            ("POST /runs/{R}/cancel", 200, r#"{"status":"cancelled"}"#, ended(RunOutcome::Cancelled)),
            ("POST /runs/{R}/cancel", 403, "{}", vec![]),
        ] {
            assert_eq!(answer(&mut acp(line, ""), code, &[JSON], body), (facts, AtEnd::GoesOn), "{line} {body}");
        }
    }

    #[test]
    fn runs_are_asked_about_and_cancelled_where_they_are() {
        let run = RunRef { base: "/x", key: "r" };
        let target = |call: Option<Call>| call.map(|call| format!("{} {}", call.method, call.target));
        assert_eq!(target(Acp.status_call(&run)).as_deref(), Some("GET /x/runs/r"));
        assert_eq!(target(Acp.cancel_call(&run, Cancel::Interrupt)).as_deref(), Some("POST /x/runs/r/cancel"));
        assert_eq!(Acp.judge(&run, 200, br#"{"status":"cancelling"}"#), Standing::Running);
        assert_eq!(Acp.judge(&run, 200, br#"{"status":"failed"}"#), Standing::Ended(RunOutcome::Failed));
        assert_eq!(Acp.judge(&run, 404, b""), Standing::Ended(RunOutcome::Unknown));
        assert_eq!(Acp.judge(&run, 200, b"?"), Standing::NoEvidence);
    }
}
