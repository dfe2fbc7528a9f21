//! AG-UI: runs whose ids their clients make, in a stream that says of each run when it begins and ends.

use std::sync::{Arc, LazyLock};

use http::Method;
use memchr::memmem::Finder;

use crate::json::{Extractor, Pointers};
use crate::message::Fields;
use crate::protocols::{
    AtEnd, Fact, KEY_BYTES_MAX, Look, Protocol, Recognised, Request, Sign, Watch, is_event_stream, is_success, key,
    outcome_of_status,
};
use crate::run::RunOutcome;
use crate::sse;

/// So many runs of one stream are known at a time; further ones pass uncounted.
const OPEN_RUNS_MAX: usize = 64;

/// One POST to any address (ag-ui-protocol 1.0).
pub struct AgUi;

impl Protocol for AgUi {
    fn name(&self) -> &'static str {
        "ag-ui"
    }

    fn sign(&self, request: &Request<'_>) -> Sign {
        let is_marked = *request.method == Method::POST
            && request.header("accept").is_some_and(|accept| accept.contains("application/vnd.ag-ui.event+proto"));
        if is_marked { Sign::Mark } else { Sign::None }
    }

    fn has_shape(&self, _request: &Request<'_>, body: &Extractor) -> bool {
        body.text("/threadId").is_some() && body.text("/runId").is_some() && body.has("/messages")
    }

    fn shape(&self) -> &'static [&'static str] {
        &["/threadId", "/runId", "/messages"]
    }

    fn wants(&self, request: &Request<'_>) -> Option<&'static Arc<Pointers>> {
        static IDS: LazyLock<Arc<Pointers>> = LazyLock::new(|| Arc::new(Pointers::new(["/threadId", "/runId"])));
        (*request.method == Method::POST).then_some(&IDS)
    }

    fn recognise(&self, request: &Request<'_>, body: Option<&Extractor>) -> Option<Recognised> {
        if *request.method != Method::POST {
            return None;
        }
        let session = body.and_then(|body| body.text("/threadId")).and_then(key);
        let id = body.and_then(|body| body.text("/runId"));
        let run = session.as_deref().zip(id).and_then(|(session, id)| run_key(session, id));
        // Closing the connection is the only cancel there is.
        let watch = Answer {
            own: [run.clone(), None],
            own_state: State::Asked,
            others: Vec::new(),
            session: session.clone(),
            status: 0,
            streams: false,
        };
        Some(Recognised { session, run, ..Recognised::start(watch) })
    }
}

/// Clients make run ids; they only have to differ within a thread.
fn run_key(thread: &str, run: &str) -> Option<String> {
    (!run.is_empty() && thread.len() + 1 + run.len() <= KEY_BYTES_MAX).then(|| format!("{thread} {run}"))
}

static EVENT: LazyLock<Arc<Pointers>> = LazyLock::new(|| Arc::new(Pointers::new(["/type", "/threadId", "/runId"])));

/// Reads a stream of events.
struct Answer {
    /// The keys of the run that was asked for: as the client wrote it, and as the server announced it.
    own: [Option<String>; 2],
    own_state: State,
    /// Further runs in the same stream that have begun and not ended.
    others: Vec<String>,
    session: Option<String>,
    status: u16,
    streams: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Asked,
    Begun,
    Ended,
}

impl Watch for Answer {
    fn head(&mut self, status: u16, fields: &Fields, _facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        // Events in protobuf are not read: the run ends with its exchange.
        self.streams = is_success(status) && is_event_stream(fields);
        if self.streams { Look::Events } else { Look::Nothing }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        static RUN: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"RUN_"));
        if RUN.find(event.data).is_none() {
            return;
        }
        let values = Extractor::read(&EVENT, event.data);
        let run = values.text("/runId").and_then(|run| {
            let thread = values.text("/threadId").or(self.session.as_deref()).unwrap_or_default();
            run_key(thread, run)
        });
        match values.text("/type") {
            Some("RUN_STARTED") => self.started(run, facts),
            Some("RUN_FINISHED") => self.ended(run, RunOutcome::Completed, facts),
            Some("RUN_ERROR") => self.ended(run, RunOutcome::Failed, facts),
            _ => {}
        }
    }

    fn end(&mut self, facts: &mut Vec<Fact>) -> AtEnd {
        if !self.streams {
            return AtEnd::Ended(outcome_of_status(self.status));
        }
        // A run that does not say that it ended has failed.
        facts.extend(self.others.drain(..).map(|run| Fact::RunEnded(run, RunOutcome::Failed)));
        AtEnd::Ended(RunOutcome::Failed)
    }

    fn cut(&mut self, outcome: RunOutcome, facts: &mut Vec<Fact>) {
        facts.extend(self.others.drain(..).map(|run| Fact::RunEnded(run, outcome)));
    }
}

impl Answer {
    fn started(&mut self, run: Option<String>, facts: &mut Vec<Fact>) {
        if self.own_state == State::Asked {
            // The first is what was asked for, whatever the server calls it.
            self.own_state = State::Begun;
            self.own[1] = run;
            return;
        }
        if let Some(run) = run.filter(|run| !self.is_own(run) && !self.others.contains(run))
            && self.others.len() < OPEN_RUNS_MAX
        {
            self.others.push(run.clone());
            facts.push(Fact::RunStarted(run));
        }
    }

    fn ended(&mut self, run: Option<String>, outcome: RunOutcome, facts: &mut Vec<Fact>) {
        let other = match &run {
            Some(run) if !self.is_own(run) => self.others.iter().position(|other| other == run),
            Some(_) => None,
            // An error may not say whose it is: the newest's.
            None => self.others.len().checked_sub(1),
        };
        if let Some(other) = other {
            facts.push(Fact::RunEnded(self.others.remove(other), outcome));
        } else if self.own_state != State::Ended && run.is_none_or(|run| self.is_own(&run)) {
            self.own_state = State::Ended;
            facts.push(Fact::Ended(outcome));
        }
    }

    fn is_own(&self, run: &String) -> bool {
        self.own.iter().flatten().any(|own| own == run)
    }
}

#[cfg(test)]
mod tests {
    use crate::protocols::recorded::{auto, recognised, told, told_until_cut, words};
    use crate::protocols::{AtEnd, Fact, OnDisconnect};
    use crate::run::{Kind, RunOutcome};

    const REQUEST: &str = "POST /agent\naccept: text/event-stream\n\n\
        {\"threadId\":\"t\",\"runId\":\"r1\",\"protocolVersion\":\"1.0\",\"messages\":[],\"tools\":[],\"context\":[]}";
    const SSE: &str = "200 content-type: text/event-stream";

    fn event(kind: &str, run: &str) -> String {
        format!("data: {{\"type\":\"{kind}\",\"threadId\":\"t\",\"runId\":\"{run}\"}}\n\n")
    }

    fn told_by(body: &str) -> (Vec<Fact>, AtEnd) {
        told(&mut recognised("ag-ui", REQUEST), SSE, body)
    }

    #[test]
    fn thread_and_run_are_the_clients() {
        let start = recognised("ag-ui", REQUEST);
        assert_eq!((words(&start), start.on_disconnect), ((Kind::Start, Some("t"), Some("t r1")), OnDisconnect::Ends));
        assert_eq!(auto(REQUEST), "ag-ui");
        assert_eq!(auto(&REQUEST.replace("runId", "run_id")), "");
        assert_eq!(auto(&REQUEST.replace("threadId", "thread")), "");
    }

    #[test]
    fn runs_end_by_their_events() {
        let ended = |outcome| vec![Fact::Ended(outcome)];
        let delta = "data: {\"type\":\"TEXT_MESSAGE_CONTENT\",\"delta\":\"\\\"RUN_FINISHED\\\"\"}\n\n";
        let start = event("RUN_STARTED", "r1");
        for (body, facts) in [
            (format!("{start}{delta}{}", event("RUN_FINISHED", "r1")), ended(RunOutcome::Completed)),
            (
                format!(
                    "{start}data: {{\"type\":\"RUN_FINISHED\",\"threadId\":\"t\",\"runId\":\"r1\",\"outcome\":{{\"type\":\"interrupt\"}}}}\n\n"
                ),
                ended(RunOutcome::Completed),
            ),
            (format!("{start}data: {{\"type\":\"RUN_ERROR\",\"message\":\"m\"}}\n\n"), ended(RunOutcome::Failed)),
            (format!("{start}{delta}"), vec![]),
            // A server with ids of its own.
            (format!("{}{}", event("RUN_STARTED", "x"), event("RUN_FINISHED", "x")), ended(RunOutcome::Completed)),
            // Said before, said again.
            (format!("{start}{0}{0}", event("RUN_FINISHED", "r1")), ended(RunOutcome::Completed)),
            (String::new(), vec![]),
        ] {
            assert_eq!(told_by(&body), (facts, AtEnd::Ended(RunOutcome::Failed)), "{body}");
        }
    }

    #[test]
    fn several_runs_may_follow_each_other_in_one_stream() {
        let first = format!("{}{}", event("RUN_STARTED", "r1"), event("RUN_FINISHED", "r1"));
        let started = Fact::RunStarted("t r2".to_owned());
        let ended = |outcome| Fact::RunEnded("t r2".to_owned(), outcome);
        let (own, begin) = (Fact::Ended(RunOutcome::Completed), event("RUN_STARTED", "r2"));
        for (rest, outcome) in [
            (event("RUN_FINISHED", "r2"), RunOutcome::Completed),
            ("data: {\"type\":\"RUN_ERROR\",\"message\":\"m\"}\n\n".to_owned(), RunOutcome::Failed),
            // The stream ends without a word.
            (String::new(), RunOutcome::Failed),
        ] {
            let facts = told_by(&format!("{first}{begin}{rest}")).0;
            assert_eq!(facts, [own.clone(), started.clone(), ended(outcome)], "{rest}");
        }
        let facts = told_until_cut(&mut recognised("ag-ui", REQUEST), SSE, &format!("{first}{begin}"));
        assert_eq!(facts, [own, started, ended(RunOutcome::Cancelled)]);
    }

    /// Trap 15.
    #[test]
    fn events_in_protobuf_are_not_read() {
        let text = REQUEST.replace("text/event-stream", "application/vnd.ag-ui.event+proto");
        assert_eq!(auto(&text), "ag-ui");
        let head = "200 content-type: application/vnd.ag-ui.event+proto";
        let answer = told(&mut recognised("ag-ui", &text), head, "data: {\"type\":\"RUN_ERROR\"}\n\n");
        assert_eq!(answer, (vec![], AtEnd::Ended(RunOutcome::Completed)));
        assert_eq!(told(&mut recognised("ag-ui", &text), "500", ""), (vec![], AtEnd::Ended(RunOutcome::Failed)));
    }
}
