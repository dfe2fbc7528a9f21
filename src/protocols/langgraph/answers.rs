//! Answers of an Agent Server, and what they tell of its runs.

use std::sync::{Arc, LazyLock};

use memchr::memmem;

use super::{Place, STATUS, THREAD_OF_BODY, place, run_key, standing};
use crate::json::{Extractor, Pointers};
use crate::message::Fields;
use crate::protocols::{
    AtEnd, Fact, From, Look, Standing, Watch, is_event_stream, is_json, is_success, key, outcome_of_status, pointers,
};
use crate::run::RunOutcome;
use crate::sse;

/// Of a batch of runs so many are known one by one.
const BATCH_RUNS_MAX: usize = 32;

static RUN: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/run_id", "/thread_id"]));
static RUN_ID: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/run_id"]));
static VALUES: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["", "/__error__"]));
static RESULT: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/type", "/result/run_id"]));
static EVENT_ID: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/event_id"]));
/// The thread and the run of the first, of the second, and so on: [`Batch`] reads them by number.
static BATCH: LazyLock<Arc<Pointers>> = LazyLock::new(|| {
    let list: Vec<String> =
        (0..BATCH_RUNS_MAX).flat_map(|index| [format!("/{index}/thread_id"), format!("/{index}/run_id")]).collect();
    Arc::new(Pointers::new(list.iter().map(String::as_str)))
});

/// How the answer to a start tells of the run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// At once, with the run.
    Background,
    Stream,
    /// At the run's end, with the thread's values.
    Wait,
    Command,
}

/// Reads the answer to a start.
pub(super) struct Started {
    form: Form,
    thread: Option<String>,
    /// A success ends all other runs of the thread, also those that wait.
    ends_others: bool,
    status: u16,
    /// The run's key is told.
    told: bool,
}

impl Started {
    pub(super) fn new(form: Form, thread: Option<&str>, ends_others: bool) -> Started {
        Started { form, thread: thread.map(str::to_owned), ends_others, status: 0, told: false }
    }

    fn tell_run(&mut self, thread: Option<&str>, run: &str, facts: &mut Vec<Fact>) {
        if self.told {
            return;
        }
        if self.thread.is_none()
            && let Some(thread) = thread.and_then(key)
        {
            // The server made a thread for this run.
            facts.push(Fact::Session(thread.clone()));
            self.thread = Some(thread);
        }
        if let Some(run) = run_key(self.thread.as_deref(), run) {
            self.told = true;
            facts.push(Fact::Run(run));
        }
    }
}

impl Watch for Started {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        if !is_success(status) {
            return Look::Nothing;
        }
        let location = |name| std::str::from_utf8(fields.get(name)?).ok();
        let target = location("content-location").or_else(|| location("location")).unwrap_or_default();
        let place = place(target.split('?').next().unwrap_or_default());
        // Of a background run without a thread the head names the run alone, the body both.
        if let Some((place, run)) = place.as_ref().and_then(|place| Some((place, place.run()?)))
            && (self.form == Form::Stream || self.thread.is_some() || place.thread.is_some())
        {
            self.tell_run(place.thread, run, facts);
        }
        if self.ends_others && self.form != Form::Command {
            facts.push(Fact::SessionRunsEnded(RunOutcome::Interrupted));
        }
        match self.form {
            Form::Stream if is_event_stream(fields) => Look::Events,
            Form::Wait if is_json(fields) => Look::Json(&VALUES),
            Form::Command if is_json(fields) => Look::Json(&RESULT),
            Form::Background if is_json(fields) && !self.told => Look::Json(&RUN),
            _ => Look::Nothing,
        }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        match self.form {
            Form::Background => {
                if let Some(run) = values.text("/run_id") {
                    self.tell_run(values.text("/thread_id"), run, facts);
                }
            }
            Form::Command => {
                if let Some(run) = values.text("/result/run_id").filter(|run| !run.is_empty()) {
                    self.tell_run(None, run, facts);
                    if self.ends_others {
                        facts.push(Fact::SessionRunsEnded(RunOutcome::Interrupted));
                    }
                } else if values.text("/type") == Some("error") {
                    facts.push(Fact::Ended(RunOutcome::Failed));
                }
            }
            Form::Wait => facts.extend(end_of_values(values)),
            Form::Stream => {}
        }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        if event.name == b"error" {
            facts.push(Fact::Ended(RunOutcome::Failed));
        } else if event.name == b"metadata"
            && !self.told
            && let Some(run) = Extractor::read(&RUN_ID, event.data).text("/run_id")
        {
            self.tell_run(None, run, facts);
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        if !is_success(self.status) {
            return AtEnd::Ended(outcome_of_status(self.status));
        }
        match self.form {
            _ if self.told && self.thread.is_some() => AtEnd::GoesOn,
            Form::Stream | Form::Wait | Form::Command => AtEnd::Ended(RunOutcome::Completed),
            // It goes on, but under no name that we could ask for.
            Form::Background => AtEnd::Ended(RunOutcome::Unknown),
        }
    }
}

/// The values of a thread come when the run has ended. A failure is among them, in a 200.
fn end_of_values(values: &Extractor) -> Option<Fact> {
    if values.has("/__error__") {
        return Some(Fact::Ended(RunOutcome::Failed));
    }
    values.has("").then_some(Fact::Ended(RunOutcome::Completed))
}

/// Reads the answer to a batch of stateless runs.
#[derive(Default)]
pub(super) struct Batch {
    status: u16,
    told: bool,
}

impl Watch for Batch {
    fn head(&mut self, status: u16, fields: &Fields, _facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        if is_success(status) && is_json(fields) { Look::Json(&BATCH) } else { Look::Nothing }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        for index in 0..BATCH_RUNS_MAX {
            let (Some(thread), Some(run)) = (values.value(2 * index), values.value(2 * index + 1)) else { continue };
            if let Some(run) = run_key(Some(thread), run) {
                facts.push(if self.told { Fact::RunStarted(run) } else { Fact::Run(run) });
                self.told = true;
            }
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        match self.told {
            true => AtEnd::GoesOn,
            false if is_success(self.status) => AtEnd::Ended(RunOutcome::Unknown),
            false => AtEnd::Ended(outcome_of_status(self.status)),
        }
    }
}

/// Reads what attaches to a run.
pub(super) struct Joined {
    pub(super) form: Form,
}

impl Watch for Joined {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        if status == 404 {
            facts.push(Fact::Ended(RunOutcome::Interrupted));
        }
        match self.form {
            _ if !is_success(status) => Look::Nothing,
            Form::Wait if is_json(fields) => Look::Json(&VALUES),
            Form::Stream if is_event_stream(fields) => Look::Events,
            _ => Look::Nothing,
        }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        facts.extend(end_of_values(values));
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        if event.name == b"error" {
            facts.push(Fact::Ended(RunOutcome::Failed));
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}

/// Reads a run's record.
pub(super) struct Reading {
    pub(super) run: Option<String>,
}

impl Watch for Reading {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        if status == 404
            && let Some(run) = self.run.take()
        {
            // A rollback deletes its run.
            facts.push(Fact::RunEnded(run, RunOutcome::Interrupted));
        }
        if status == 200 && is_json(fields) { Look::Json(&STATUS) } else { Look::Nothing }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        let Some(run) = self.run.take() else { return };
        match standing(values.text("/status")) {
            Standing::Running => facts.push(Fact::RunAlive(run)),
            Standing::Ended(outcome) => facts.push(Fact::RunEnded(run, outcome)),
            Standing::NoEvidence => {}
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}

/// Reads the answer to the cancel of one run.
pub(super) struct Cancelling {
    pub(super) run: Option<String>,
    /// The answer comes when the run has ended.
    pub(super) waits: bool,
    status: u16,
}

impl Cancelling {
    pub(super) fn new(run: Option<String>, waits: bool) -> Cancelling {
        Cancelling { run, waits, status: 0 }
    }
}

impl Watch for Cancelling {
    fn head(&mut self, status: u16, _fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        // It is on its way to its end; or there (404), and we have not noticed.
        if status == 404 || (is_success(status) && !self.waits) {
            facts.push(Fact::RecheckSession);
        }
        Look::Nothing
    }

    fn end(&mut self, facts: &mut Vec<Fact>) -> AtEnd {
        if self.waits
            && is_success(self.status)
            && let Some(run) = self.run.take()
        {
            facts.push(Fact::RunEnded(run, RunOutcome::Cancelled));
        }
        AtEnd::GoesOn
    }
}

/// Tells something, if the answer is a success.
pub(super) struct OnSuccess(pub(super) Vec<Fact>);

impl Watch for OnSuccess {
    fn head(&mut self, status: u16, _fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        if is_success(status) {
            facts.append(&mut self.0);
        }
        Look::Nothing
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}

/// Reads the id of a thread that was made.
pub(super) struct NewThread;

impl Watch for NewThread {
    fn head(&mut self, status: u16, fields: &Fields, _facts: &mut Vec<Fact>) -> Look {
        if is_success(status) && is_json(fields) { Look::Json(&THREAD_OF_BODY) } else { Look::Nothing }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        facts.extend(values.text("/thread_id").and_then(key).map(Fact::Session));
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}

/// Reads the events of all runs of a thread: its stream, and the stream or WebSocket of version 2.
pub(super) struct ThreadEvents {
    thread: String,
}

static LIFECYCLE: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(":lc||"));
static RUN_ID_NAME: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"run_id\""));

impl ThreadEvents {
    pub(super) fn new(place: &Place<'_>) -> ThreadEvents {
        ThreadEvents { thread: place.thread.unwrap_or_default().to_owned() }
    }

    fn key(&self, run: &str) -> Option<String> {
        if run.is_empty() { None } else { run_key(Some(&self.thread), run) }
    }

    /// A frame of version 2. The `event_id` of a run's own lifecycle is `synth:<run>:lc||<event>`; that of a part of it
    /// has a name between the bars.
    fn frame(&self, frame: &[u8], facts: &mut Vec<Fact>) {
        if LIFECYCLE.find(frame).is_none() {
            return;
        }
        let values = Extractor::read(&EVENT_ID, frame);
        let told = values.text("/event_id").and_then(|id| id.strip_prefix("synth:")?.split_once(":lc||"));
        let Some((Some(run), event)) = told.map(|(run, event)| (self.key(run), event)) else { return };
        facts.extend(match event {
            "running" => Some(Fact::RunStarted(run)),
            "completed" => Some(Fact::RunEnded(run, RunOutcome::Completed)),
            "failed" => Some(Fact::RunEnded(run, RunOutcome::Failed)),
            "interrupted" => Some(Fact::RunEnded(run, RunOutcome::Interrupted)),
            _ => None,
        });
    }
}

impl Watch for ThreadEvents {
    fn head(&mut self, status: u16, fields: &Fields, _facts: &mut Vec<Fact>) -> Look {
        match status {
            101 => Look::Messages,
            _ if is_success(status) && is_event_stream(fields) => Look::Events,
            _ => Look::Nothing,
        }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        if event.name != b"metadata" {
            return self.frame(event.data, facts);
        }
        static METADATA: LazyLock<Arc<Pointers>> = LazyLock::new(|| pointers(&["/run_id", "/status"]));
        let values = Extractor::read(&METADATA, event.data);
        if values.text("/status") == Some("run_done") {
            // It does not say with what outcome.
            facts.push(Fact::RecheckSession);
        } else if let Some(run) = values.text("/run_id").and_then(|run| self.key(run)) {
            facts.push(Fact::RunStarted(run));
        }
    }

    fn message(&mut self, from: From, text: &[u8], facts: &mut Vec<Fact>) {
        if from == From::Client {
            return;
        }
        self.frame(text, facts);
        if RUN_ID_NAME.find(text).is_some() {
            let values = Extractor::read(&RESULT, text);
            if values.text("/type") == Some("success") {
                facts.extend(values.text("/result/run_id").and_then(|run| self.key(run)).map(Fact::RunStarted));
            }
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        AtEnd::GoesOn
    }
}
