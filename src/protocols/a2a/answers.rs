//! Answers of an A2A agent: tasks, their states, messages and errors, with or without JSON-RPC around them.

use std::sync::{Arc, LazyLock};

use memchr::memmem;

use crate::json::{Extractor, Pointers, end_of_plain, keys_around};
use crate::message::Fields;
use crate::protocols::{
    AtEnd, Fact, Look, Standing, Watch, is_event_stream, is_json, is_success, key, outcome_of_status,
};
use crate::run::RunOutcome;
use crate::sse;

/// What an exchange is to its run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Start,
    Join,
    /// A read or a cancel.
    Ask,
}

/// Where the parts of an answer are, behind `/result` in JSON-RPC. [`Reply::read`] numbers them in this order.
const PLACES: [&str; 17] = [
    "/task/id",
    "/task/contextId",
    "/task/status/state",
    "/statusUpdate/taskId",
    "/statusUpdate/contextId",
    "/statusUpdate/status/state",
    "/artifactUpdate/taskId",
    "/artifactUpdate/contextId",
    "/message/messageId",
    "/message/contextId",
    // 0.3, and a task alone.
    "/kind",
    "/id",
    "/taskId",
    "/contextId",
    "/status/state",
    "/messageId",
    "/final",
];
/// The last one is the error's.
static RPC: LazyLock<Arc<Pointers>> = LazyLock::new(|| {
    let mut all = PLACES.map(|place| format!("/result{place}")).to_vec();
    all.push("/error/code".to_owned());
    Arc::new(Pointers::new(all.iter().map(String::as_str)))
});
static REST: LazyLock<Arc<Pointers>> =
    LazyLock::new(|| Arc::new(Pointers::new(PLACES.into_iter().chain(["/error/code"]))));

/// JSON-RPC's code for a task that is not there (A2A 1.0 section 5.4).
const TASK_NOT_FOUND: &str = "-32001";

fn places(rpc: bool) -> &'static Arc<Pointers> {
    if rpc { &RPC } else { &REST }
}

/// What an answer or an event says.
struct Reply<'a> {
    task: Option<&'a str>,
    context: Option<&'a str>,
    state: Option<&'a str>,
    /// The agent answers with a message: there is no task.
    is_message: bool,
    /// 0.3: no event follows.
    is_final: bool,
    error: Option<&'a str>,
}

impl<'a> Reply<'a> {
    fn read(values: &'a Extractor) -> Reply<'a> {
        let value = |index| values.value(index);
        let kind = value(10);
        let is_message = value(8).is_some() || kind == Some("message") || (kind.is_none() && value(15).is_some());
        // `id` is a task's only where the thing is one.
        let bare = value(11).filter(|_| kind == Some("task") || (kind.is_none() && value(14).is_some()));
        Reply {
            task: value(0).or(value(3)).or(value(6)).or(value(12)).or(bare).filter(|_| !is_message),
            context: value(1).or(value(4)).or(value(7)).or(value(9)).or(value(13)),
            state: value(2).or(value(5)).or(value(14)),
            is_message,
            is_final: value(16) == Some("true"),
            error: value(PLACES.len()),
        }
    }
}

/// What a task's state says, in the words of 1.0 and of 0.3.
fn standing(state: &[u8]) -> Standing {
    match state.strip_prefix(b"TASK_STATE_").unwrap_or(state) {
        b"SUBMITTED" | b"submitted" | b"WORKING" | b"working" => Standing::Running,
        b"COMPLETED" | b"completed" => Standing::Ended(RunOutcome::Completed),
        // The agent has declined the task.
        b"REJECTED" | b"rejected" => Standing::Ended(RunOutcome::Failed),
        b"FAILED" | b"failed" => Standing::Ended(RunOutcome::Failed),
        b"CANCELED" | b"canceled" | b"CANCELLED" | b"cancelled" => Standing::Ended(RunOutcome::Cancelled),
        // It waits for its caller and holds no worker.
        b"INPUT_REQUIRED" | b"input-required" | b"AUTH_REQUIRED" | b"auth-required" => {
            Standing::Ended(RunOutcome::Completed)
        }
        _ => Standing::NoEvidence,
    }
}

/// Reads the answer to our own question for a task.
pub(super) fn judge(rpc: bool, body: &[u8]) -> Standing {
    let values = Extractor::read(places(rpc), body);
    let reply = Reply::read(&values);
    match reply.error {
        Some(TASK_NOT_FOUND) => Standing::Ended(RunOutcome::Unknown),
        Some(_) => Standing::NoEvidence,
        None => reply.state.map_or(Standing::NoEvidence, |state| standing(state.as_bytes())),
    }
}

/// Reads any answer that is of interest.
pub(super) struct Answer {
    role: Role,
    rpc: bool,
    /// What the request was placed by, then what the answer told.
    session: Option<String>,
    /// Of a start: as the answer told it.
    run: Option<String>,
    status: u16,
    streams: bool,
}

static STATE: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"state\""));
static FINAL: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"final\""));
static ERROR: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new("\"error\""));

impl Answer {
    pub(super) fn new(role: Role, rpc: bool, session: Option<String>, run: Option<String>) -> Answer {
        Answer { role, rpc, session, run, status: 0, streams: false }
    }

    fn reply(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        let reply = Reply::read(values);
        if let Some(error) = reply.error {
            match self.role {
                Role::Start => facts.push(Fact::Ended(RunOutcome::Failed)),
                _ if error == TASK_NOT_FOUND => self.not_found(facts),
                // It can't be cancelled or joined: that has told nothing of the outcome.
                _ => {}
            }
            return;
        }
        if self.role == Role::Start {
            self.learn(&reply, facts);
        }
        let standing = match reply.state.map(str::as_bytes).map(standing) {
            _ if reply.is_message => Standing::Ended(RunOutcome::Completed),
            Some(Standing::Running) if reply.is_final => Standing::Ended(RunOutcome::Completed),
            Some(standing) => standing,
            None => return,
        };
        match (self.role, standing) {
            (Role::Start | Role::Join, Standing::Ended(outcome)) => facts.push(Fact::Ended(outcome)),
            (Role::Ask, Standing::Ended(outcome)) => {
                facts.extend(self.run.take().map(|run| Fact::RunEnded(run, outcome)));
            }
            (Role::Ask, Standing::Running) => facts.extend(self.run.take().map(Fact::RunAlive)),
            _ => {}
        }
    }

    /// An end tells no more than that. (Of a start it may be the first to tell the context; until then its session is none,
    /// or the task.)
    fn knows_all(&self) -> bool {
        match self.role {
            Role::Start => self.session.is_some() && self.session != self.run,
            Role::Join => true,
            Role::Ask => false,
        }
    }

    /// Contexts and tasks are both told as sessions: either may be all that a later request names.
    fn learn(&mut self, reply: &Reply<'_>, facts: &mut Vec<Fact>) {
        let context = reply.context.and_then(key);
        if context.is_some() && context != self.session {
            facts.extend(context.clone().map(Fact::Session));
            self.session = context;
        }
        let task = reply.task.and_then(key);
        if task.is_some() && task != self.run {
            if task != self.session {
                facts.extend(task.clone().map(Fact::Session));
            }
            facts.extend(task.clone().map(Fact::Run));
            self.run = task;
        }
    }

    fn not_found(&mut self, facts: &mut Vec<Fact>) {
        match self.role {
            Role::Start => {}
            Role::Join => facts.push(Fact::Ended(RunOutcome::Unknown)),
            Role::Ask => facts.extend(self.run.take().map(|run| Fact::RunEnded(run, RunOutcome::Unknown))),
        }
    }
}

impl Watch for Answer {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        self.status = status;
        if status == 404 && !self.rpc {
            self.not_found(facts);
        }
        self.streams = is_success(status) && is_event_stream(fields);
        if self.streams {
            Look::Events
        } else if is_success(status) && is_json(fields) {
            Look::Json(places(self.rpc))
        } else {
            Look::Nothing
        }
    }

    fn body(&mut self, values: &Extractor, facts: &mut Vec<Fact>) {
        self.reply(values, facts);
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        // REST tells errors by the event's name.
        if event.name == b"error" && self.role == Role::Start {
            facts.push(Fact::Ended(RunOutcome::Failed));
            return;
        }
        let glance = match (self.role, &self.run) {
            // Any event may tell which run it is.
            (Role::Start, None) => Glance::Unclear,
            _ => Glance::at_event(self.rpc, event.data),
        };
        match glance {
            Glance::Nothing => {}
            Glance::Ends(outcome) if self.knows_all() => facts.push(Fact::Ended(outcome)),
            _ => self.reply(&Extractor::read(places(self.rpc), event.data), facts),
        }
    }

    fn end(&mut self, _facts: &mut Vec<Fact>) -> AtEnd {
        if self.role != Role::Start {
            return AtEnd::GoesOn;
        }
        match &self.run {
            _ if !is_success(self.status) => AtEnd::Ended(outcome_of_status(self.status)),
            Some(_) => AtEnd::GoesOn,
            // Nobody knows under which name.
            None if self.streams => AtEnd::Ended(RunOutcome::Truncated),
            None => AtEnd::Ended(RunOutcome::Unknown),
        }
    }
}

/// What a quick look at an event, or at one `"state"` in it, tells of a run that is known.
#[derive(Clone, Copy, PartialEq)]
enum Glance {
    Nothing,
    Ends(RunOutcome),
    /// It must be read.
    Unclear,
}

impl Glance {
    fn at_event(rpc: bool, data: &[u8]) -> Glance {
        let mut states = STATE.find_iter(data).map(|place| (place, Glance::at_state(data, place)));
        if let Some((place, first)) = states.next() {
            let second = states.next();
            if matches!(first, Glance::Ends(_)) && second.is_none() && is_of_task(rpc, data, place) {
                return first;
            }
            let others = second.into_iter().chain(states).map(|(_, state)| state);
            if std::iter::once(first).chain(others).any(|state| state != Glance::Nothing) {
                return Glance::Unclear;
            }
        }
        // An error of JSON-RPC, whose members may come in any order.
        if ERROR.find(data).is_some() { Glance::Unclear } else { Glance::Nothing }
    }

    /// Of a `"state"` there, whoever's it is.
    fn at_state(data: &[u8], place: usize) -> Glance {
        let text = value_after(&STATE, data, place).and_then(|value| value.strip_prefix(b"\""));
        let Some(text) = text else { return Glance::Nothing };
        // An escape, which nobody writes there, or no end at all.
        let Some(end) = end_of_plain(text).filter(|&end| text[end] == b'"') else { return Glance::Unclear };
        match standing(&text[..end]) {
            Standing::Ended(outcome) => Glance::Ends(outcome),
            Standing::Running => {
                let mut finals = FINAL.find_iter(data).filter_map(|place| value_after(&FINAL, data, place));
                if finals.any(|value| value.starts_with(b"true")) { Glance::Unclear } else { Glance::Nothing }
            }
            Standing::NoEvidence => Glance::Nothing,
        }
    }
}

/// Whether the key at `place` is where agents write a task's state.
fn is_of_task(rpc: bool, data: &[u8], place: usize) -> bool {
    let mut keys = [&b""[..]; 12];
    let Some(around) = keys_around(data, place, &mut keys) else { return false };
    let around = if rpc { around.strip_prefix(&[&b"result"[..]]) } else { Some(around) };
    matches!(around, Some([b"status"] | [b"statusUpdate" | b"task", b"status"]))
}

/// What follows the name at `place` and its colon, if there is one.
fn value_after<'a>(name: &memmem::Finder<'_>, data: &'a [u8], place: usize) -> Option<&'a [u8]> {
    let rest = data[place + name.needle().len()..].trim_ascii_start().strip_prefix(b":")?;
    Some(rest.trim_ascii_start())
}
