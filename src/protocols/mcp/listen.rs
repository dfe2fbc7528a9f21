//! Listen: GET streams, on which a server sends what no POST asked for: answers of calls whose own stream is gone, and in
//! HTTP+SSE all answers.

use std::sync::LazyLock;

use memchr::memmem::Finder;

use crate::json::Extractor;
use crate::message::Fields;
use crate::protocols::mcp::call::{ANSWER, may_be_answer, tell_call, tell_lost, verdict};
use crate::protocols::mcp::{call_key, legacy, rpc_id, session, tasks};
use crate::protocols::{AtEnd, Fact, Look, Recognised, Request, Watch, is_event_stream, is_success};
use crate::run::RunOutcome;
use crate::sse;

/// A stream of the session (idle, or resumed by `Last-Event-ID`), or one that will name a session.
pub fn recognise(request: &Request<'_>) -> Option<Recognised> {
    let accepts = request.header("accept").is_some_and(|accept| accept.contains("text/event-stream"));
    let session = session(request);
    if !accepts && session.is_none() {
        // A document of another standard (authorisation servers have them), to which clients send our headers, too.
        return None;
    }
    Some(Recognised {
        creates_session: session.is_none(),
        bound: true,
        watch: Some(Box::new(Stream { session: session.clone(), named_here: false, deaf: false })),
        session,
        ..Recognised::other()
    })
}

struct Stream {
    session: Option<String>,
    /// The session was named by this stream, and lives as long.
    named_here: bool,
    /// There is no session, so nothing can be told.
    deaf: bool,
}

impl Watch for Stream {
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look {
        if self.session.is_some() {
            tell_lost(status, facts);
        }
        if is_success(status) && is_event_stream(fields) { Look::Events } else { Look::Nothing }
    }

    fn event(&mut self, event: sse::Event<'_>, facts: &mut Vec<Fact>) {
        if self.deaf {
            return;
        }
        let Some(session) = &self.session else {
            self.session = (event.name == b"endpoint").then(|| legacy::session_of_event(event.data)).flatten();
            self.named_here = self.session.is_some();
            self.deaf = self.session.is_none();
            facts.extend(self.session.clone().map(Fact::Session));
            return;
        };
        static TASK: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"notifications/tasks"));
        if !may_be_answer(event.data) && TASK.find(event.data).is_none() {
            return;
        }
        let values = Extractor::read(&ANSWER, event.data);
        tasks::notified(&values, facts);
        if let Some(verdict) = verdict(&values, false)
            && let Some(key) = rpc_id(values.at("/id")).and_then(|id| call_key(session, &id))
        {
            tell_call(key, verdict, facts);
        }
    }

    fn end(&mut self, facts: &mut Vec<Fact>) -> AtEnd {
        self.cut(RunOutcome::Truncated, facts);
        AtEnd::GoesOn
    }

    fn cut(&mut self, outcome: RunOutcome, facts: &mut Vec<Fact>) {
        if self.named_here {
            facts.push(Fact::SessionRunsEnded(outcome));
            facts.push(Fact::SessionLost);
        }
    }
}
