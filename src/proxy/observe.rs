//! Observe: what is noticed about a body while it passes: bytes, events, the first of them, ids to learn.

use std::time::Instant;

use crate::json::{Extractor, Progress};
use crate::sse::Scanner;

/// Counts one direction of an exchange. Sees payload bytes once each, in order, whatever the framing.
#[derive(Default)]
pub struct Observer {
    pub bytes: u64,
    /// Events of an event stream (WHATWG HTML section 9.2); 0 for other bodies.
    pub events: u64,
    /// When the first event ended, or the first byte came where the body is no event stream.
    pub first_event_at: Option<Instant>,
    scanner: Option<Scanner>,
    extractor: Option<Box<Extractor>>,
    extracted: bool,
    /// More than this many bytes are a fault; 0: no limit.
    pub bytes_max: u64,
}

impl Observer {
    /// For a body that may have so many bytes and no more.
    pub fn up_to(bytes_max: u64) -> Observer {
        Observer { bytes_max, ..Observer::default() }
    }

    /// Counts events from now on.
    pub fn expect_events(&mut self) {
        self.scanner = Some(Scanner::default());
    }

    /// Looks for JSON values from now on; [`Observer::take_extracted`] tells when they are known.
    pub fn expect_json(&mut self, extractor: Extractor) {
        self.extractor = Some(Box::new(extractor));
    }

    pub fn observe(&mut self, payload: &[u8]) {
        self.bytes += payload.len() as u64;
        match &mut self.scanner {
            Some(scanner) => {
                let events = scanner.feed(payload);
                if events > 0 {
                    self.events += u64::from(events);
                    self.first_event_at.get_or_insert_with(crate::ids::now);
                }
            }
            None => {
                self.first_event_at.get_or_insert_with(crate::ids::now);
            }
        }
        if let Some(extractor) = &mut self.extractor
            && !self.extracted
        {
            self.extracted = extractor.feed(payload) != Progress::More;
        }
    }

    pub fn over_limit(&self) -> bool {
        self.bytes_max != 0 && self.bytes > self.bytes_max
    }

    /// The extractor, once it needs no more bytes (or the body has ended: `at_end`).
    pub fn take_extracted(&mut self, at_end: bool) -> Option<Box<Extractor>> {
        if self.extracted || at_end { self.extractor.take() } else { None }
    }
}
