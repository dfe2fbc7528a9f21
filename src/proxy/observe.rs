//! Observe: what is noticed about a body while it passes: bytes, events, the first of them, and what it tells of sessions
//! and runs.

use std::rc::Rc;
use std::time::Instant;

use crate::proxy::learn::Learn;
use crate::proxy::repeat::{Asked, Kept};
use crate::proxy::watch::Watching;
use crate::sse::Scanner;
use crate::state::core::Finish;
use crate::state::dispatcher::Lease;
use crate::websocket::Frames;

/// Counts one direction of an exchange. Sees payload bytes once each, in order, whatever the framing.
#[derive(Default)]
pub struct Observer {
    pub bytes: u64,
    /// Events of an event stream (WHATWG HTML section 9.2); 0 for other bodies.
    pub events: u64,
    /// When the first event ended, or the first byte came where the body is no event stream.
    pub first_event_at: Option<Instant>,
    scanner: Option<Scanner>,
    /// More than this many bytes are a fault; 0: no limit.
    pub bytes_max: u64,
    /// What is read of the body, where anything is.
    reading: Option<Box<Reading>>,
}

/// What an answer tells besides its length.
#[derive(Default)]
struct Reading {
    learn: Option<Learn>,
    watching: Option<Box<Watching>>,
    /// Of an answer that is recorded.
    kept: Option<Rc<Kept>>,
    /// Of a request whose answer is.
    asked: Option<Asked>,
    /// Of a WebSocket: where a frame has ended.
    frames: Option<Frames>,
}

impl Observer {
    /// For a body that may have so many bytes and no more.
    pub fn up_to(bytes_max: u64) -> Observer {
        Observer { bytes_max, ..Observer::default() }
    }

    /// For an answer's body.
    pub fn of_answer(learn: Option<Learn>, watching: Option<Box<Watching>>, kept: Option<Rc<Kept>>) -> Observer {
        let is_read = learn.is_some() || watching.is_some() || kept.is_some();
        let reading = is_read.then(|| Box::new(Reading { learn, watching, kept, asked: None, frames: None }));
        Observer { reading, ..Observer::default() }
    }

    /// The request is compared with later ones of the same key.
    pub fn compare(&mut self, asked: Asked) {
        self.reading = Some(Box::new(Reading { asked: Some(asked), ..Reading::default() }));
    }

    /// The request has come whole.
    pub fn asked(&mut self) {
        if let Some(asked) = self.reading.as_mut().and_then(|reading| reading.asked.take()) {
            asked.end();
        }
    }

    /// The answer is recorded, so that it is wanted whoever reads it now.
    pub fn is_recorded(&self) -> bool {
        self.reading.as_ref().is_some_and(|reading| reading.kept.is_some())
    }

    /// The body is what an endpoint sends over a WebSocket.
    pub fn expect_frames(&mut self) {
        self.reading.get_or_insert_default().frames = Some(Frames::default());
    }

    /// The body is that of a WebSocket, and a frame may begin here.
    pub fn between_frames(&self) -> bool {
        self.reading.as_ref().and_then(|reading| reading.frames.as_ref()).is_some_and(Frames::is_between)
    }

    /// Counts events from now on.
    pub fn expect_events(&mut self) {
        if !self.watching().is_some_and(|watching| watching.reads_events()) {
            self.scanner = Some(Scanner::default());
        }
    }

    /// The body is an event stream of which nothing of an event has passed yet.
    pub fn between_events(&self) -> bool {
        match &self.scanner {
            Some(scanner) => scanner.between_events(),
            None => self.watching().is_some_and(|watching| watching.between_events()),
        }
    }

    pub fn observe(&mut self, payload: &[u8]) {
        self.bytes += payload.len() as u64;
        let mut events = self.scanner.as_mut().map(|scanner| scanner.feed(payload));
        if let Some(reading) = &mut self.reading {
            if let Some(kept) = &reading.kept {
                kept.append(payload);
            }
            if let Some(asked) = &mut reading.asked {
                asked.observe(payload);
            }
            if let Some(learn) = &mut reading.learn {
                learn.observe(payload);
            }
            if let Some(frames) = &mut reading.frames {
                frames.feed(payload);
            }
            if let Some(watching) = &mut reading.watching {
                let reads_events = watching.reads_events();
                let seen = watching.observe(payload);
                if reads_events {
                    events = Some(seen);
                }
            }
        }
        self.events += u64::from(events.unwrap_or(0));
        // The first byte is all that can be told of a body that is no event stream.
        if events != Some(0) {
            self.first_event_at.get_or_insert_with(crate::ids::now);
        }
    }

    pub fn over_limit(&self) -> bool {
        self.bytes_max != 0 && self.bytes > self.bytes_max
    }

    /// Passes on what was read of sessions and runs. With the body's end: what became of the exchange's run, where that
    /// is not for HTTP to say.
    pub fn tell(&mut self, lease: &mut Lease, at_end: bool) -> Option<Finish> {
        lease.first_event(self.first_event_at);
        let reading = self.reading.as_mut()?;
        if let (Some(kept), true) = (&reading.kept, at_end) {
            kept.end();
        }
        if let Some(learn) = &mut reading.learn {
            learn.tell(lease, at_end);
        }
        let watching = reading.watching.as_mut()?;
        watching.pass_on(lease);
        at_end.then(|| watching.end(lease))
    }

    pub fn watching(&self) -> Option<&Watching> {
        self.reading.as_ref()?.watching.as_deref()
    }

    pub fn watching_mut(&mut self) -> Option<&mut Watching> {
        self.reading.as_mut()?.watching.as_deref_mut()
    }
}
