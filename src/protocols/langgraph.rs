//! LangGraph Agent Server: a thread is the session, and its runs outlive their exchanges. The end of a stream says nothing.
//!
//! A run that is to begin later (`after_seconds`) is pending from its creation, and counts like any other that waits.
//! Runs that no request started (crons, those of another proxy) are told by the streams of their thread where there
//! are any, and otherwise only by the server's own count ([`Protocol::load`]).

mod answers;

use std::sync::{Arc, LazyLock};

use answers::{Batch, Cancelling, Form, Joined, NewThread, OnSuccess, Reading, Started, ThreadEvents};
use http::Method;

use crate::json::{Extractor, Pointers, Progress};
use crate::protocols::{
    Call, Cancel, Fact, KEY_BYTES_MAX, OnDisconnect, Protocol, Recognised, Request, RunRef, Sign, Standing, Watch,
    at_segment, is_segment, is_uuid, key, pointers,
};
use crate::run::{Kind, RunOutcome};

/// langgraph-api 0.16: the API of threads and runs, and its version 2 of commands and lifecycle events.
pub struct Langgraph;

/// Of requests.
const SHAPE: &[&str] = &["/assistant_id", "/thread_id"];
static THREAD_OF_BODY: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/thread_id"]));
static STATELESS: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(SHAPE));
static CREATE: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/multitask_strategy", "/on_disconnect"]));
static COMMAND: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/method", "/params/multitaskStrategy"]));

/// Of answers to our own calls.
static STATUS: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/status"]));
static QUEUE: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/queue/n_pending", "/queue/n_running"]));

impl Protocol for Langgraph {
    fn name(&self) -> &'static str {
        "langgraph"
    }

    fn sign(&self, request: &Request<'_>) -> Sign {
        let Some(place) = place(request.path) else { return Sign::None };
        if is_assistants(request, &place) || is_version_of_assistants(&place) {
            return Sign::None;
        }
        let posts = request.method == Method::POST;
        match (place.spot, place.thread) {
            (Spot::Threads | Spot::Search | Spot::Runs, None) if posts => Sign::Path,
            (Spot::Stream | Spot::Wait | Spot::Batch | Spot::CancelMany, None) if posts => Sign::Mark,
            (Spot::Thread | Spot::Copy | Spot::Other | Spot::ThreadStream, Some(thread)) if !is_uuid(thread) => {
                Sign::None
            }
            (_, Some(_)) => Sign::Mark,
            (_, None) => Sign::None,
        }
    }

    fn has_shape(&self, request: &Request<'_>, body: &Extractor) -> bool {
        body.text("/assistant_id").is_some()
            && place(request.path).is_some_and(|place| {
                place.spot == Spot::Runs
                    && place.thread.is_none()
                    && !is_assistants(request, &place)
                    && !is_version_of_assistants(&place)
            })
    }

    fn shape(&self) -> &'static [&'static str] {
        SHAPE
    }

    fn wants(&self, request: &Request<'_>) -> Option<&'static Arc<Pointers>> {
        if request.method != Method::POST {
            return None;
        }
        let place = place(request.path)?;
        match place.spot {
            Spot::Threads | Spot::CancelMany => Some(&THREAD_OF_BODY),
            Spot::Runs if place.thread.is_none() => Some(&STATELESS),
            Spot::Runs | Spot::Stream | Spot::Wait => Some(&CREATE),
            Spot::Commands => Some(&COMMAND),
            _ => None,
        }
    }

    fn recognise(&self, request: &Request<'_>, body: Option<&Extractor>) -> Option<Recognised> {
        let place = place(request.path)?;
        if is_assistants(request, &place) {
            return None;
        }
        let recognised = match *request.method {
            Method::POST => post(request, &place, body)?,
            Method::GET => get(request, &place),
            Method::DELETE => delete(&place),
            _ => Recognised::other(),
        };
        Some(Recognised {
            session: place.thread.and_then(key).or(recognised.session),
            run: place.run().and_then(|run| run_key(place.thread, run)),
            base: place.base.to_owned(),
            ..recognised
        })
    }

    fn status_call(&self, run: &RunRef<'_>) -> Option<Call> {
        let (thread, id) = run.key.split_once('/')?;
        let target = format!("{}/threads/{thread}/runs/{id}", run.base);
        Some(Call { method: Method::GET, target, fields: Vec::new(), body: Vec::new() })
    }

    fn judge(&self, _run: &RunRef<'_>, status: u16, body: &[u8]) -> Standing {
        match status {
            // A rollback deletes its run.
            404 => Standing::Ended(RunOutcome::Interrupted),
            200 => standing(Extractor::read(&STATUS, body).text("/status")),
            _ => Standing::NoEvidence,
        }
    }

    fn cancel_call(&self, run: &RunRef<'_>, how: Cancel) -> Option<Call> {
        let (thread, id) = run.key.split_once('/')?;
        let action = match how {
            Cancel::Interrupt => "interrupt",
            Cancel::Rollback => "rollback",
        };
        let target = format!("{}/threads/{thread}/runs/{id}/cancel?action={action}", run.base);
        Some(Call { method: Method::POST, target, fields: Vec::new(), body: Vec::new() })
    }

    fn load_path(&self) -> Option<&'static str> {
        Some("/metrics?format=json")
    }

    fn load(&self, body: &[u8]) -> Option<u32> {
        let values = Extractor::read(&QUEUE, body);
        let count = |pointer| values.word(pointer)?.parse::<u32>().ok();
        Some(count("/queue/n_pending")?.saturating_add(count("/queue/n_running")?))
    }
}

/// What a path names.
struct Place<'a> {
    /// What stands before `/threads` or `/runs`: the server may be mounted somewhere.
    base: &'a str,
    thread: Option<&'a str>,
    spot: Spot<'a>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Spot<'a> {
    Threads,
    /// Of threads, of no thread.
    Search,
    Thread,
    Copy,
    ThreadStream,
    /// Version 2: lifecycle events of a thread, as a stream or a WebSocket.
    Events,
    Commands,
    Runs,
    Stream,
    Wait,
    Batch,
    CancelMany,
    Run(&'a str),
    Join(&'a str),
    RunStream(&'a str),
    Cancel(&'a str),
    /// State, history, crons.
    Other,
}

impl<'a> Place<'a> {
    /// The run that is meant.
    fn run(&self) -> Option<&'a str> {
        match self.spot {
            Spot::Run(run) | Spot::Join(run) | Spot::RunStream(run) | Spot::Cancel(run) => Some(run),
            _ => None,
        }
    }
}

fn place(path: &str) -> Option<Place<'_>> {
    let (base, tail) = at_segment(path, "/threads").or_else(|| at_segment(path, "/runs"))?;
    // It is kept with every run.
    if base.len() > KEY_BYTES_MAX {
        return None;
    }
    let mut parts = [""; 5];
    let mut count = 0;
    for part in tail.trim_end_matches('/').split('/').skip(1) {
        *parts.get_mut(count)? = part;
        count += 1;
    }
    let (first, rest) = parts[..count].split_first()?;
    if rest.contains(&"") {
        return None;
    }
    let (thread, spot) = match rest {
        _ if *first == "runs" => (None, of_runs(rest)?),
        [] => (None, Spot::Threads),
        ["search" | "count" | "prune"] => (None, Spot::Search),
        // OpenAI Assistants: a thread and its run in one.
        ["runs", ..] => return None,
        [thread] => (Some(*thread), Spot::Thread),
        [thread, "runs", rest @ ..] => (Some(*thread), of_runs(rest)?),
        [thread, "state" | "history", ..] => (Some(*thread), Spot::Other),
        [thread, "copy"] => (Some(*thread), Spot::Copy),
        [thread, "stream"] => (Some(*thread), Spot::ThreadStream),
        [thread, "stream", "events"] => (Some(*thread), Spot::Events),
        [thread, "commands"] => (Some(*thread), Spot::Commands),
        _ => return None,
    };
    Some(Place { base, thread, spot })
}

/// What stands behind `runs`, of a thread or of none.
fn of_runs<'a>(rest: &[&'a str]) -> Option<Spot<'a>> {
    Some(match rest {
        [] => Spot::Runs,
        ["stream"] => Spot::Stream,
        ["wait"] => Spot::Wait,
        ["batch"] => Spot::Batch,
        ["cancel"] => Spot::CancelMany,
        ["crons", ..] => Spot::Other,
        [run] => Spot::Run(run),
        [run, "join"] => Spot::Join(run),
        [run, "stream"] => Spot::RunStream(run),
        [run, "cancel"] => Spot::Cancel(run),
        // A WebSocket of version 2.
        [_, "protocol"] => Spot::Events,
        _ => return None,
    })
}

/// OpenAI Assistants have paths like ours; their threads are `thread_…`, ours are UUIDs.
fn is_assistants(request: &Request<'_>, place: &Place<'_>) -> bool {
    place.thread.is_some_and(|thread| thread.starts_with("thread_"))
        || request.fields.get("openai-beta").is_some_and(|value| value.starts_with(b"assistants"))
}

/// Without a sign in the request their version in the path has to do.
fn is_version_of_assistants(place: &Place<'_>) -> bool {
    place.base.ends_with("/v1") && !place.thread.is_some_and(is_uuid)
}

/// A run with its thread, as its path names both. One without a thread is known by its id alone, and can't be asked about.
fn run_key(thread: Option<&str>, run: &str) -> Option<String> {
    if !is_segment(run) || thread.is_some_and(|thread| !is_segment(thread)) {
        return None;
    }
    match thread {
        Some(thread) if thread.len() + run.len() < KEY_BYTES_MAX => Some(format!("{thread}/{run}")),
        Some(_) => None,
        None => key(run),
    }
}

fn post(request: &Request<'_>, place: &Place<'_>, body: Option<&Extractor>) -> Option<Recognised> {
    let text = |pointer| body.and_then(|values| values.text(pointer));
    let run = place.run().and_then(|run| run_key(place.thread, run));
    Some(match (place.spot, place.thread) {
        (Spot::Threads, _) => Recognised {
            session: text("/thread_id").and_then(key),
            creates_session: true,
            watch: Some(Box::new(NewThread)),
            ..Recognised::other()
        },
        (Spot::Copy, _) => Recognised { watch: Some(Box::new(NewThread)), ..Recognised::other() },
        (Spot::Runs, None) => {
            let values = body?;
            // Others have such a path, too. A body that was not read to its end may be ours.
            if text("/assistant_id").is_none() && values.progress() == Progress::Done {
                return None;
            }
            start(place, Form::Background, None, None)
        }
        (Spot::Runs, Some(_)) => start(place, Form::Background, text("/multitask_strategy"), None),
        (Spot::Stream, _) => start(place, Form::Stream, text("/multitask_strategy"), text("/on_disconnect")),
        (Spot::Wait, _) => start(place, Form::Wait, text("/multitask_strategy"), text("/on_disconnect")),
        (Spot::Batch, None) => {
            Recognised { on_disconnect: OnDisconnect::GoesOn, ..Recognised::start(Batch::default()) }
        }
        (Spot::Commands, _) => match text("/method") {
            Some("run.start" | "input.respond") => start(place, Form::Command, text("/params/multitaskStrategy"), None),
            _ => Recognised::other(),
        },
        (Spot::Events, _) => thread_events(place),
        (Spot::Cancel(_), _) => {
            let waits = is_yes(request.query_value("wait"));
            Recognised { kind: Kind::Cancel, ..watched(Cancelling::new(run, waits)) }
        }
        (Spot::CancelMany, None) => {
            let session = text("/thread_id").and_then(key);
            let fact = if session.is_some() { Fact::RecheckSession } else { Fact::RecheckEndpoint };
            Recognised { kind: Kind::Cancel, session, ..watched(OnSuccess(vec![fact])) }
        }
        _ => Recognised::other(),
    })
}

fn get(request: &Request<'_>, place: &Place<'_>) -> Recognised {
    let run = place.run().and_then(|run| run_key(place.thread, run));
    let join = |form| Recognised {
        kind: Kind::Join,
        on_disconnect: if is_yes(request.query_value("cancel_on_disconnect")) {
            OnDisconnect::Ends
        } else {
            OnDisconnect::GoesOn
        },
        ..watched(Joined { form })
    };
    match place.spot {
        Spot::Run(_) => Recognised { kind: Kind::Read, ..watched(Reading { run }) },
        Spot::Join(_) => join(Form::Wait),
        Spot::RunStream(_) => join(Form::Stream),
        Spot::ThreadStream | Spot::Events => thread_events(place),
        _ => Recognised::other(),
    }
}

fn delete(place: &Place<'_>) -> Recognised {
    let facts = match (place.spot, place.thread) {
        (Spot::Thread, _) => vec![Fact::SessionRunsEnded(RunOutcome::Cancelled), Fact::SessionLost],
        (Spot::Run(run), thread) => {
            run_key(thread, run).map(|run| Fact::RunEnded(run, RunOutcome::Cancelled)).into_iter().collect()
        }
        _ => return Recognised::other(),
    };
    Recognised { kind: Kind::Cancel, ..watched(OnSuccess(facts)) }
}

fn watched(watch: impl Watch + 'static) -> Recognised {
    Recognised { watch: Some(Box::new(watch)), ..Recognised::other() }
}

/// Runs that are told there are not the exchange's, and don't end with it.
fn thread_events(place: &Place<'_>) -> Recognised {
    Recognised { on_disconnect: OnDisconnect::GoesOn, ..watched(ThreadEvents::new(place)) }
}

fn start(place: &Place<'_>, form: Form, strategy: Option<&str>, on_disconnect: Option<&str>) -> Recognised {
    // The run of a stream without a thread can't be asked about: whatever becomes of it, it is known no longer than
    // its stream.
    let ends = on_disconnect == Some("cancel") || (form == Form::Stream && place.thread.is_none());
    let ends_others = place.thread.is_some() && matches!(strategy, Some("interrupt" | "rollback"));
    let watch = Started::new(form, place.thread, ends_others);
    Recognised {
        on_disconnect: if ends { OnDisconnect::Ends } else { OnDisconnect::GoesOn },
        ..Recognised::start(watch)
    }
}

fn is_yes(value: Option<String>) -> bool {
    value.is_some_and(|value| ["true", "yes", "1"].iter().any(|yes| value.eq_ignore_ascii_case(yes)))
}

/// What a run's status says of it.
fn standing(status: Option<&str>) -> Standing {
    match status {
        Some("pending" | "running") => Standing::Running,
        Some("success") => Standing::Ended(RunOutcome::Completed),
        Some("error") => Standing::Ended(RunOutcome::Failed),
        Some("timeout") => Standing::Ended(RunOutcome::TimedOut),
        // By a cancel, or by a later run of its thread.
        Some("interrupted") => Standing::Ended(RunOutcome::Interrupted),
        _ => Standing::NoEvidence,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocols::AtEnd;
    use crate::protocols::testing::{Asked, answer};

    const T: &str = "0199a1b2-0000-7000-8000-000000000001";
    const R: &str = "0199a1b2-0000-7000-8000-00000000000a";
    const JSON: (&str, &str) = ("content-type", "application/json");
    const EVENTS: (&str, &str) = ("content-type", "text/event-stream; charset=utf-8");

    /// `T` and `R` in a line stand for a thread and a run.
    fn ids(text: &str) -> String {
        text.replace("{T}", T).replace("{R}", R)
    }

    fn ask(line: &str, body: &str) -> Option<Recognised> {
        asked(Some(&Langgraph), line, &[], body)
    }

    fn asked(
        protocol: Option<&'static dyn Protocol>,
        line: &str,
        fields: &[(&str, &str)],
        body: &str,
    ) -> Option<Recognised> {
        let line = ids(line);
        let (method, target) = line.split_once(' ').expect("method and target");
        Asked { protocol, method, target, fields, body: &ids(body) }.recognise()
    }

    fn run() -> String {
        format!("{T}/{R}")
    }

    fn location() -> String {
        ids("/threads/{T}/runs/{R}")
    }

    fn is_langgraph(recognised: &Option<Recognised>) -> bool {
        recognised.as_ref().and_then(|recognised| recognised.protocol).is_some_and(|found| found.name() == "langgraph")
    }

    #[test]
    fn kind_session_and_run_of_requests() {
        use Kind::{Cancel, Join, Other, Read, Start};
        for (line, body, kind, session, run, goes_on) in [
            ("POST /threads", "{}", Other, None, None, false),
            ("POST /threads", r#"{"thread_id":"{T}","if_exists":"do_nothing"}"#, Other, Some(T), None, false),
            ("POST /threads/search", r#"{"limit":1}"#, Other, None, None, false),
            ("POST /threads/count", "{}", Other, None, None, false),
            ("GET /threads/{T}", "", Other, Some(T), None, false),
            ("PATCH /threads/{T}", "{}", Other, Some(T), None, false),
            ("GET /threads/{T}/state?subgraphs=true", "", Other, Some(T), None, false),
            ("POST /threads/{T}/state/checkpoint", "{}", Other, Some(T), None, false),
            ("POST /threads/{T}/history", "{}", Other, Some(T), None, false),
            ("GET /threads/{T}/stream", "", Other, Some(T), None, true),
            ("GET /threads/{T}/runs", "", Other, Some(T), None, false),
            ("POST /threads/{T}/runs", r#"{"assistant_id":"a","after_seconds":60}"#, Start, Some(T), None, true),
            ("POST /threads/{T}/runs/stream", r#"{"assistant_id":"a"}"#, Start, Some(T), None, true),
            ("POST /threads/{T}/runs/stream", r#"{"input":{},"on_disconnect":"cancel"}"#, Start, Some(T), None, false),
            ("POST /threads/{T}/runs/wait", r#"{"on_disconnect":"continue"}"#, Start, Some(T), None, true),
            ("POST /threads/{T}/runs/crons", "{}", Other, Some(T), None, false),
            ("POST /a/b/threads/{T}/runs/wait/", "{}", Start, Some(T), None, true),
            ("GET /threads/{T}/runs/{R}", "", Read, Some(T), Some(run()), false),
            ("GET /threads/{T}/runs/{R}/join", "", Join, Some(T), Some(run()), true),
            ("GET /threads/{T}/runs/{R}/stream", "", Join, Some(T), Some(run()), true),
            ("GET /threads/{T}/runs/{R}/stream?cancel_on_disconnect=1", "", Join, Some(T), Some(run()), false),
            ("GET /threads/{T}/runs/{R}/join?cancel_on_disconnect=false", "", Join, Some(T), Some(run()), true),
            ("POST /threads/{T}/runs/{R}/cancel?action=rollback", "", Cancel, Some(T), Some(run()), false),
            ("DELETE /threads/{T}/runs/{R}", "", Cancel, Some(T), Some(run()), false),
            ("DELETE /threads/{T}", "", Cancel, Some(T), None, false),
            ("POST /runs", r#"{"assistant_id":"a","input":null}"#, Start, None, None, true),
            ("POST /runs/wait", r#"{"assistant_id":"a"}"#, Start, None, None, true),
            // Trap 14: nobody can ask how it stands.
            ("POST /runs/stream", r#"{"assistant_id":"a"}"#, Start, None, None, false),
            ("POST /runs/batch", r#"[{"assistant_id":"a"}]"#, Start, None, None, true),
            ("POST /runs/crons", "{}", Other, None, None, false),
            ("POST /runs/cancel", r#"{"status":"all"}"#, Cancel, None, None, false),
            ("POST /runs/cancel", r#"{"thread_id":"{T}","run_ids":["{R}"]}"#, Cancel, Some(T), None, false),
            ("POST /threads/{T}/commands", r#"{"id":1,"method":"run.start","params":{}}"#, Start, Some(T), None, true),
            ("POST /threads/{T}/commands", r#"{"id":2,"method":"agent.getTree"}"#, Other, Some(T), None, false),
            ("POST /threads/{T}/stream/events", r#"{"channels":["lifecycle"]}"#, Other, Some(T), None, true),
        ] {
            let recognised = ask(line, body).unwrap_or_else(|| panic!("{line} is LangGraph's"));
            assert_eq!(recognised.kind, kind, "{line}");
            assert_eq!(recognised.session.as_deref(), session, "{line}");
            assert_eq!(recognised.run, run, "{line}");
            assert_eq!(recognised.on_disconnect == OnDisconnect::GoesOn, goes_on, "{line}");
            assert_eq!(recognised.creates_session, line == "POST /threads", "{line}");
            assert_eq!(recognised.base, if line.contains("/a/b") { "/a/b" } else { "" }, "{line}");
        }
        for line in ["GET /ok", "GET /info", "POST /assistants/search", "GET /threads//state", "POST /threads/runs"] {
            assert!(ask(line, "").is_none(), "{line}");
        }
    }

    #[test]
    fn auto_knows_its_paths_from_those_of_others() {
        let assistants: &[(&str, &str)] = &[("OpenAI-Beta", "assistants=v2")];
        for (line, fields, body, ours) in [
            ("POST /threads", &[][..], "{}", true),
            ("POST /threads/{T}/runs", &[], "{}", true),
            ("POST /v1/threads/{T}/runs", &[], "{}", true),
            ("GET /threads/{T}", &[], "", true),
            ("POST /runs", &[], r#"{"assistant_id":"agent"}"#, true),
            ("POST /runs/stream", &[], r#"{"assistant_id":"agent"}"#, true),
            ("POST /runs", &[], r#"{"pipeline":1}"#, false),
            ("POST /v1/threads", &[], "{}", false),
            ("POST /threads", assistants, "{}", false),
            ("POST /v1/threads/thread_abc/runs", &[], r#"{"assistant_id":"asst_1"}"#, false),
            ("POST /threads/thread_abc/runs", &[], r#"{"assistant_id":"asst_1"}"#, false),
            ("POST /v1/threads/{T}/runs", assistants, r#"{"assistant_id":"asst_1"}"#, false),
            ("POST /v1/threads/runs", assistants, r#"{"assistant_id":"asst_1"}"#, false),
            ("GET /forum/threads/42", &[], "", false),
            ("GET /threads", &[], "", false),
            ("GET /mythreads/1/runs", &[], "", false),
        ] {
            assert_eq!(is_langgraph(&asked(None, line, fields, body)), ours, "{line} {body}");
        }
    }

    #[test]
    fn what_answers_to_starts_tell() {
        let completed = Fact::Ended(RunOutcome::Completed);
        let failed = Fact::Ended(RunOutcome::Failed);
        let head = location();
        let ok = "event: metadata\r\ndata: {\"run_id\":\"{R}\",\"attempt\":1}\r\n\r\nevent: values\r\ndata: {\"error\":1}\r\n\r\n";
        let raised = "event: metadata\r\ndata: {\"run_id\":\"{R}\"}\r\n\r\nevent: error\r\ndata: {\"error\":\"ValueError\",\"message\":\"boom\"}\r\n\r\n";
        let fallback = "{\"run_id\":\"{R}\",\"thread_id\":\"{T}\",\"status\":\"pending\"}";
        let with_head = [("content-location", head.as_str()), JSON];
        let alone = ids("/runs/{R}");
        let with_run = [("content-location", alone.as_str()), JSON];
        let other = ids("http://10.0.0.1:8123/base/threads/{T}/runs/{R}/stream?x=1");
        for (line, status, fields, body, facts, end) in [
            ("POST /threads/{T}/runs", 200, &with_head[..], fallback, vec![Fact::Run(run())], AtEnd::GoesOn),
            ("POST /threads/{T}/runs", 200, &[JSON], fallback, vec![Fact::Run(run())], AtEnd::GoesOn),
            ("POST /threads/{T}/runs", 200, &[JSON], "{", vec![], AtEnd::Ended(RunOutcome::Unknown)),
            // The end of a stream says nothing, an error says that the run has failed.
            ("POST /threads/{T}/runs/stream", 200, &[with_head[0], EVENTS], ok, vec![Fact::Run(run())], AtEnd::GoesOn),
            ("POST /threads/{T}/runs/stream", 200, &[EVENTS], ok, vec![Fact::Run(run())], AtEnd::GoesOn),
            (
                "POST /threads/{T}/runs/stream",
                200,
                &[("location", &other), EVENTS],
                "",
                vec![Fact::Run(run())],
                AtEnd::GoesOn,
            ),
            (
                "POST /threads/{T}/runs/stream",
                200,
                &[EVENTS],
                raised,
                vec![Fact::Run(run()), failed.clone()],
                AtEnd::GoesOn,
            ),
            // Trap 3: a wait is line ends, then JSON; an error is in a 200.
            (
                "POST /threads/{T}/runs/wait",
                200,
                &with_head,
                "\n\n\n{\"a\":1}",
                vec![Fact::Run(run()), completed.clone()],
                AtEnd::GoesOn,
            ),
            (
                "POST /threads/{T}/runs/wait",
                200,
                &with_head,
                "\n{\"__error__\":{\"error\":\"ValueError\"}}",
                vec![Fact::Run(run()), failed.clone()],
                AtEnd::GoesOn,
            ),
            (
                "POST /threads/{T}/runs/wait",
                200,
                &with_head,
                "\n{\"a\":{\"__error__\":{}}}",
                vec![Fact::Run(run()), completed.clone()],
                AtEnd::GoesOn,
            ),
            ("POST /threads/{T}/runs/wait", 200, &with_head, "\n\n", vec![Fact::Run(run())], AtEnd::GoesOn),
            (
                "POST /runs/wait",
                200,
                &with_head,
                "{}",
                vec![Fact::Session(T.to_owned()), Fact::Run(run()), completed.clone()],
                AtEnd::GoesOn,
            ),
            (
                "POST /runs",
                200,
                &with_run,
                fallback,
                vec![Fact::Session(T.to_owned()), Fact::Run(run())],
                AtEnd::GoesOn,
            ),
            (
                "POST /runs/stream",
                200,
                &[with_run[0], EVENTS],
                ok,
                vec![Fact::Run(R.to_owned())],
                AtEnd::Ended(RunOutcome::Completed),
            ),
            (
                "POST /threads/{T}/commands",
                200,
                &[JSON],
                "{\"type\":\"success\",\"id\":1,\"result\":{\"run_id\":\"{R}\"}}",
                vec![Fact::Run(run())],
                AtEnd::GoesOn,
            ),
            (
                "POST /threads/{T}/commands",
                200,
                &[JSON],
                "{\"type\":\"error\",\"id\":1,\"error\":\"unknown_command\"}",
                vec![failed.clone()],
                AtEnd::Ended(RunOutcome::Completed),
            ),
            // Nothing is learned from a failure. 409: reject.
            ("POST /threads/{T}/runs/stream", 409, &with_head, "{}", vec![], AtEnd::Ended(RunOutcome::Completed)),
            ("POST /threads/{T}/runs", 500, &with_head, fallback, vec![], AtEnd::Ended(RunOutcome::Failed)),
        ] {
            let asked = r#"{"assistant_id":"a","method":"run.start"}"#;
            let mut recognised = ask(line, asked).expect("LangGraph's");
            assert_eq!(answer(&mut recognised, status, fields, &ids(body)), (facts, end), "{line} {status} {body}");
        }
    }

    #[test]
    fn a_batch_starts_many_runs() {
        let mut recognised = ask("POST /runs/batch", "[{}]").expect("LangGraph's");
        let body = r#"[{"run_id":"r1","thread_id":"t1"},{"thread_id":"t2","run_id":"r2"},{"run_id":"r3"}]"#;
        let facts = vec![Fact::Run("t1/r1".to_owned()), Fact::RunStarted("t2/r2".to_owned())];
        assert_eq!(answer(&mut recognised, 200, &[JSON], body), (facts, AtEnd::GoesOn));
    }

    /// Trap 5: all pending and running runs of the thread end, whoever started them.
    #[test]
    fn interrupt_and_rollback_end_the_other_runs_of_the_thread() {
        let all = Fact::SessionRunsEnded(RunOutcome::Interrupted);
        for (strategy, ends) in
            [("interrupt", true), ("rollback", true), ("enqueue", false), ("reject", false), ("x", false)]
        {
            let body = format!(r#"{{"assistant_id":"a","multitask_strategy":"{strategy}"}}"#);
            for line in ["POST /threads/{T}/runs", "POST /threads/{T}/runs/stream", "POST /threads/{T}/runs/wait"] {
                let (facts, _) = answer(&mut ask(line, &body).expect("LangGraph's"), 200, &[], "");
                assert_eq!(facts.contains(&all), ends, "{line} {strategy}");
                let (facts, _) = answer(&mut ask(line, &body).expect("LangGraph's"), 422, &[], "");
                assert_eq!(facts, [], "{line} {strategy}");
            }
            let body = format!(r#"{{"id":1,"method":"run.start","params":{{"multitaskStrategy":"{strategy}"}}}}"#);
            let mut recognised = ask("POST /threads/{T}/commands", &body).expect("LangGraph's");
            let (facts, _) = answer(&mut recognised, 200, &[JSON], r#"{"type":"success","result":{"run_id":"r"}}"#);
            assert_eq!(facts.contains(&all), ends, "{strategy}");
        }
    }

    #[test]
    fn what_other_answers_tell() {
        let ended = |outcome| vec![Fact::RunEnded(run(), outcome)];
        for (line, body, status, answered, facts) in [
            ("POST /threads", "{}", 200, "{\"thread_id\":\"{T}\"}", vec![Fact::Session(T.to_owned())]),
            ("POST /threads", "{}", 409, "{\"thread_id\":\"{T}\"}", vec![]),
            ("POST /threads/{T}/copy", "", 200, "{\"thread_id\":\"t2\"}", vec![Fact::Session("t2".to_owned())]),
            ("GET /threads/{T}/runs/{R}", "", 200, "{\"status\":\"pending\"}", vec![Fact::RunAlive(run())]),
            ("GET /threads/{T}/runs/{R}", "", 200, "{\"status\":\"running\"}", vec![Fact::RunAlive(run())]),
            ("GET /threads/{T}/runs/{R}", "", 200, "{\"status\":\"success\"}", ended(RunOutcome::Completed)),
            ("GET /threads/{T}/runs/{R}", "", 200, "{\"status\":\"error\"}", ended(RunOutcome::Failed)),
            ("GET /threads/{T}/runs/{R}", "", 200, "{\"status\":\"timeout\"}", ended(RunOutcome::TimedOut)),
            ("GET /threads/{T}/runs/{R}", "", 200, "{\"status\":\"interrupted\"}", ended(RunOutcome::Interrupted)),
            ("GET /threads/{T}/runs/{R}", "", 200, "{\"status\":\"new\"}", vec![]),
            ("GET /threads/{T}/runs/{R}", "", 500, "{\"status\":\"error\"}", vec![]),
            // Trap 4: rolled back.
            ("GET /threads/{T}/runs/{R}", "", 404, "{}", ended(RunOutcome::Interrupted)),
            ("GET /threads/{T}/runs/{R}/join", "", 404, "{}", vec![Fact::Ended(RunOutcome::Interrupted)]),
            ("GET /threads/{T}/runs/{R}/join", "", 200, "\n{}", vec![Fact::Ended(RunOutcome::Completed)]),
            ("GET /threads/{T}/runs/{R}/join", "", 200, "{\"__error__\":{}}", vec![Fact::Ended(RunOutcome::Failed)]),
            ("POST /threads/{T}/runs/{R}/cancel", "", 202, "", vec![Fact::RecheckSession]),
            ("POST /threads/{T}/runs/{R}/cancel?wait=true", "", 200, "\n{}", ended(RunOutcome::Cancelled)),
            ("POST /threads/{T}/runs/{R}/cancel?wait=1", "", 404, "{}", vec![Fact::RecheckSession]),
            ("POST /threads/{T}/runs/{R}/cancel", "", 422, "{}", vec![]),
            // Trap 7: no id is told.
            ("POST /runs/cancel", "{\"status\":\"all\"}", 204, "", vec![Fact::RecheckEndpoint]),
            ("POST /runs/cancel", "{\"thread_id\":\"{T}\",\"run_ids\":[]}", 204, "", vec![Fact::RecheckSession]),
            ("POST /runs/cancel", "{\"status\":\"all\"}", 422, "", vec![]),
            // Trap 6.
            ("DELETE /threads/{T}/runs/{R}", "", 204, "", ended(RunOutcome::Cancelled)),
            (
                "DELETE /threads/{T}",
                "",
                204,
                "",
                vec![Fact::SessionRunsEnded(RunOutcome::Cancelled), Fact::SessionLost],
            ),
            ("DELETE /threads/{T}", "", 404, "", vec![]),
        ] {
            let mut recognised = ask(line, body).expect("LangGraph's");
            let told = answer(&mut recognised, status, &[JSON], &ids(answered));
            assert_eq!(told, (facts, AtEnd::GoesOn), "{line} {status} {answered}");
        }
    }

    #[test]
    fn streams_of_a_thread_tell_of_all_its_runs() {
        let mut recognised = ask("GET /threads/{T}/stream", "").expect("LangGraph's");
        let stream = ids("id: 1-0\nevent: metadata\ndata: {\"run_id\":\"{R}\",\"attempt\":1}\n\n\
            event: values\ndata: {\"run_id\":\"no\"}\n\nevent: metadata\ndata: {\"status\":\"run_done\",\"run_id\":\"{R}\"}\n\n");
        let facts = vec![Fact::RunStarted(run()), Fact::RecheckSession];
        assert_eq!(answer(&mut recognised, 200, &[EVENTS], &stream), (facts, AtEnd::GoesOn));

        let frame = |id: &str| {
            let data = r#"{"namespace":[],"data":{"event":"x"}}"#;
            ids(&format!(r#"{{"type":"event","event_id":"{id}","seq":1,"method":"lifecycle","params":{data}}}"#))
        };
        let running = frame("synth:{R}:lc||running");
        let part = frame("synth:{R}:lc|tools:1|completed");
        let text = r#"{"type":"event","event_id":"1-0","method":"messages","params":{"data":"synth:r:lc||failed"}}"#;
        for (event, outcome) in [
            ("completed", RunOutcome::Completed),
            ("failed", RunOutcome::Failed),
            ("interrupted", RunOutcome::Interrupted),
        ] {
            let ended = frame(&format!("synth:{{R}}:lc||{event}"));
            let facts = vec![Fact::RunStarted(run()), Fact::RunEnded(run(), outcome)];
            let mut recognised = ask("POST /threads/{T}/stream/events", "{}").expect("LangGraph's");
            let stream = [&running, &part, text, &ended].map(|data| format!("data: {data}\r\n\r\n")).concat();
            assert_eq!(answer(&mut recognised, 200, &[EVENTS], &stream).0, facts);

            let upgrade: &[(&str, &str)] = &[("upgrade", "websocket")];
            let mut socket =
                asked(None, "GET /threads/{T}/stream/events", upgrade, "").expect("recognised by its path");
            let result = ids(r#"{"type":"success","id":1,"result":{"run_id":"{R}"}}"#);
            let failure = r#"{"type":"error","id":2,"result":{"run_id":"other"}}"#;
            let messages =
                [r#"> {"id":1,"method":"run.start","result":{"run_id":"mine"}}"#, &result, failure, text, &ended]
                    .join("\n");
            assert_eq!(answer(&mut socket, 101, &[], &messages).0, facts);
        }
    }

    #[test]
    fn runs_are_asked_about_and_cancelled_where_they_are() {
        let key = run();
        let run = RunRef { base: "/base", key: &key };
        let call = |method, target: String| Some(Call { method, target, fields: Vec::new(), body: Vec::new() });
        let target = ids("/base/threads/{T}/runs/{R}");
        assert_eq!(Langgraph.status_call(&run), call(Method::GET, target.clone()));
        let interrupt = call(Method::POST, format!("{target}/cancel?action=interrupt"));
        assert_eq!(Langgraph.cancel_call(&run, Cancel::Interrupt), interrupt);
        let rollback = call(Method::POST, format!("{target}/cancel?action=rollback"));
        assert_eq!(Langgraph.cancel_call(&run, Cancel::Rollback), rollback);
        assert_eq!(Langgraph.judge(&run, 200, br#"{"status":"running"}"#), Standing::Running);
        assert_eq!(Langgraph.judge(&run, 200, br#"{"status":"success"}"#), Standing::Ended(RunOutcome::Completed));
        assert_eq!(Langgraph.judge(&run, 404, b"{}"), Standing::Ended(RunOutcome::Interrupted));
        assert_eq!(Langgraph.judge(&run, 302, b""), Standing::NoEvidence);
        assert_eq!(Langgraph.judge(&run, 200, b"<html>"), Standing::NoEvidence);
        let stateless = RunRef { base: "", key: R };
        assert_eq!(Langgraph.status_call(&stateless), None);
        assert_eq!(Langgraph.cancel_call(&stateless, Cancel::Interrupt), None);
    }

    #[test]
    fn the_server_tells_its_own_count() {
        let body = br#"{"queue":{"n_pending":3,"n_running":2,"pending_runs_wait_time_max_secs":null}}"#;
        assert_eq!(Langgraph.load(body), Some(5));
        assert_eq!(Langgraph.load(br#"{"queue":{"n_pending":3}}"#), None);
    }

    #[test]
    fn long_ids_are_no_keys() {
        let long = "x".repeat(1 << 20);
        let recognised = ask(&format!("POST /threads/{long}/runs"), "{}").expect("LangGraph's");
        assert_eq!(recognised.session, None);
        let recognised = ask(&format!("GET /threads/{{T}}/runs/{long}"), "").expect("LangGraph's");
        assert_eq!((recognised.session.as_deref(), recognised.run), (Some(T), None));
        assert!(ask(&format!("GET /{long}/threads/t/runs/r"), "").is_none());
    }
}
