//! Ids and time: the only place where the clock and randomness are read, so that a simulation can replace them.

use std::time::{Instant, SystemTime};

/// A run's id: UUIDv7 (RFC 9562 section 5.7), so that ids sort by start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunId(uuid::Uuid);

impl RunId {
    pub fn generate() -> RunId {
        RunId(uuid::Uuid::now_v7())
    }

    pub fn parse(text: &str) -> Option<RunId> {
        uuid::Uuid::try_parse(text).ok().map(RunId)
    }

    /// The canonical 36 characters, without allocating.
    pub fn write(&self, buffer: &mut [u8; 36]) {
        self.0.hyphenated().encode_lower(buffer);
    }
}

impl std::fmt::Display for RunId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.hyphenated().fmt(formatter)
    }
}

/// The monotonic clock. Pure code takes the value as an argument instead.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn now() -> Instant {
    Instant::now()
}

/// The wall clock, for logs and answers only.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn wall_clock() -> SystemTime {
    SystemTime::now()
}

pub fn random_u64() -> u64 {
    rand::random()
}

pub fn random_bytes<const N: usize>() -> [u8; N] {
    rand::random()
}
