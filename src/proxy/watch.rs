//! Watch: what an answer tells of runs and sessions, for those protocols that say more than HTTP does.

use crate::error::Code;
use crate::json::{Extractor, Progress};
use crate::message::Fields;
use crate::protocols::{self, AtEnd, Fact, From, Look, OnDisconnect, Recognised, Watch};
use crate::run::RunOutcome;
use crate::sse;
use crate::state::core::Finish;
use crate::state::dispatcher::Lease;
use crate::state::runs::About;
use crate::websocket;

/// Runs that one socket may have begun; more are not followed.
const STARTED_MAX: usize = 1024;

/// One answer as its protocol reads it.
pub struct Watching {
    watch: Box<dyn Watch>,
    reading: Reading,
    /// Told by the answer, not yet by us.
    facts: Vec<Fact>,
    /// The principal's digest, for ids that are learned.
    scope: Option<[u8; 16]>,
    about: About,
    /// The run that this exchange carries can be named, so that it can be found again without it.
    named: bool,
    /// The answer's status is an error: a start that was refused started nothing that could go on.
    refused: Option<RunOutcome>,
    /// How that run ended, once the answer has said so.
    told: Option<RunOutcome>,
    /// Keys of the runs that began over this socket and are still under way.
    started: Vec<String>,
}

enum Reading {
    Nothing,
    Json(Box<Extractor>),
    Events(sse::Reader),
    /// Those that the endpoint sends over a WebSocket.
    Messages(Box<websocket::Reader>),
}

/// What of a recognised exchange the dispatcher keeps with its run.
pub fn about(recognised: Option<&Recognised>) -> About {
    recognised.map_or_else(About::default, |recognised| About {
        protocol: recognised.protocol,
        base: recognised.base.as_str().into(),
        goes_on: recognised.on_disconnect == OnDisconnect::GoesOn,
    })
}

impl Watching {
    /// `None`: the protocol wants to know nothing of the answer.
    pub fn new(recognised: Option<&mut Recognised>, about: About, scope: Option<[u8; 16]>) -> Option<Box<Watching>> {
        let recognised = recognised?;
        let watch = recognised.watch.take()?;
        Some(Box::new(Watching {
            watch,
            reading: Reading::Nothing,
            facts: Vec::new(),
            scope,
            about,
            named: recognised.run.is_some(),
            refused: None,
            told: None,
            started: Vec::new(),
        }))
    }

    /// Takes the answer's head.
    pub fn head(&mut self, status: u16, fields: &Fields, lease: &mut Lease) {
        self.reading = match self.watch.head(status, fields, &mut self.facts) {
            Look::Json(pointers) => Reading::Json(Box::new(Extractor::of(pointers.clone()))),
            Look::Events => Reading::Events(sse::Reader::default()),
            Look::Messages => Reading::Messages(Box::new(websocket::Reader::as_agreed(fields))),
            Look::Nothing => Reading::Nothing,
        };
        self.refused = (status >= 400).then(|| protocols::outcome_of_status(status));
        self.pass_on(lease);
    }

    /// The run of this exchange goes on without its client.
    pub fn goes_on(&self) -> bool {
        self.about.goes_on
    }

    /// It counts the events itself.
    pub fn reads_events(&self) -> bool {
        matches!(self.reading, Reading::Events(_))
    }

    /// Nothing of an event has been read yet.
    pub fn between_events(&self) -> bool {
        matches!(&self.reading, Reading::Events(reader) if reader.between_events())
    }

    /// Reads on in the body; how many events these bytes completed.
    pub fn observe(&mut self, payload: &[u8]) -> u32 {
        let Watching { watch, reading, facts, .. } = self;
        match reading {
            Reading::Nothing => 0,
            Reading::Messages(reader) => {
                reader.feed(payload, |message| watch.message(From::Endpoint, message.text, facts));
                0
            }
            Reading::Events(reader) => {
                let mut events = 0;
                reader.feed(payload, |event| {
                    events += 1;
                    watch.event(event, facts);
                });
                events
            }
            Reading::Json(extractor) => {
                if extractor.feed(payload) != Progress::More {
                    watch.body(extractor, facts);
                    self.reading = Reading::Nothing;
                }
                0
            }
        }
    }

    /// Tells the dispatcher what was read.
    pub fn pass_on(&mut self, lease: &mut Lease) {
        if self.facts.is_empty() {
            return;
        }
        for fact in &self.facts {
            match fact {
                Fact::Run(_) => self.named = true,
                Fact::Ended(outcome) => self.told = Some(*outcome),
                Fact::RunStarted(key) if self.started.len() < STARTED_MAX => self.started.push(key.clone()),
                Fact::RunEnded(key, _) => self.started.retain(|started| started != key),
                _ => {}
            }
        }
        lease.tell(&mut self.facts, self.scope, &self.about, crate::ids::now());
    }

    /// The body has ended whole: what became of the exchange's run.
    pub fn end(&mut self, lease: &mut Lease) -> Finish {
        if let Reading::Json(mut extractor) = std::mem::replace(&mut self.reading, Reading::Nothing) {
            extractor.finish();
            self.watch.body(&extractor, &mut self.facts);
        }
        self.pass_on(lease);
        let end = self.watch.end(&mut self.facts);
        self.pass_on(lease);
        self.leave_started(lease);
        match (self.told.or(self.refused), end) {
            (Some(outcome), _) | (None, AtEnd::Ended(outcome)) => Finish::Ended(outcome),
            (None, AtEnd::GoesOn) if self.named => Finish::Left,
            // It goes on, and nobody will hear of it again.
            (None, AtEnd::GoesOn) => Finish::Ended(RunOutcome::Unknown),
        }
    }

    /// The exchange has ended before its end: what became of its run. `otherwise`: if the run ends with its exchange.
    pub fn broken_off(&mut self, otherwise: RunOutcome, lease: &mut Lease) -> Finish {
        self.watch.cut(otherwise, &mut self.facts);
        self.pass_on(lease);
        self.leave_started(lease);
        match (self.told.or(self.refused), self.about.goes_on, self.named) {
            (Some(told), ..) => Finish::Ended(told),
            (None, true, true) => Finish::Left,
            (None, true, false) => Finish::Ended(RunOutcome::Unknown),
            (None, false, _) => Finish::Ended(otherwise),
        }
    }

    fn leave_started(&mut self, lease: &Lease) {
        if self.started.is_empty() {
            return;
        }
        let finish = if self.about.goes_on { Finish::Left } else { Finish::Ended(RunOutcome::Cancelled) };
        lease.leave_started(&std::mem::take(&mut self.started), finish, crate::ids::now());
    }
}

/// The code of an answer to whoever waits for a run that was ended from elsewhere.
pub fn code_of_stop(outcome: RunOutcome) -> Code {
    match outcome {
        RunOutcome::TimedOut => Code::RunTimeout,
        _ => Code::UpstreamReset,
    }
}
