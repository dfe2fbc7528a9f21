//! Trace: what happened in one seed's world, and what must not have.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::hash::Hasher as _;

use siphasher::sip::SipHasher13;
use tokio::time::Instant;

/// Events in the order in which they happened. Two runs of one seed have the same.
pub struct Trace {
    began: Instant,
    events: RefCell<Vec<String>>,
    violations: RefCell<Vec<String>>,
}

/// A whole run of a seed, told.
pub struct Story {
    pub events: Vec<String>,
    pub violations: Vec<String>,
}

impl Trace {
    pub fn begin() -> Trace {
        Trace { began: Instant::now(), events: RefCell::default(), violations: RefCell::default() }
    }

    pub fn note(&self, event: impl AsRef<str>) {
        let mut line = String::new();
        let _ = write!(line, "{:>9} {}", self.began.elapsed().as_millis(), event.as_ref());
        self.events.borrow_mut().push(line);
    }

    /// Something that is promised did not hold.
    pub fn violation(&self, what: impl AsRef<str>) {
        self.note(format!("VIOLATION: {}", what.as_ref()));
        let mut violations = self.violations.borrow_mut();
        violations.push(format!("at {} ms: {}", self.began.elapsed().as_millis(), what.as_ref()));
    }

    pub fn story(&self) -> Story {
        Story { events: self.events.take(), violations: self.violations.take() }
    }
}

impl Story {
    pub fn digest(&self) -> u64 {
        let mut hasher = SipHasher13::new();
        for event in &self.events {
            hasher.write(event.as_bytes());
            hasher.write_u8(b'\n');
        }
        hasher.finish()
    }
}
