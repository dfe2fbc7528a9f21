//! Ids and time: the only place where the clock and randomness are read, so that a simulation can replace them.

#[cfg(feature = "simulation")]
pub mod simulation;

use std::cell::{Cell, RefCell};
use std::time::{Instant, SystemTime};

use rand::Rng;
use rand::rngs::SmallRng;

/// A run's id: UUIDv7 (RFC 9562 section 5.7), so that ids sort by start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunId(uuid::Uuid);

impl RunId {
    pub fn generate() -> RunId {
        #[cfg(feature = "simulation")]
        if simulation::is_on() {
            let since = wall_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let (millis, random) = (since.as_millis() as u64, quick_random_bytes());
            return RunId(uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid());
        }
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

impl serde::Serialize for RunId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for RunId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<RunId, D::Error> {
        let text = <std::borrow::Cow<'_, str>>::deserialize(deserializer)?;
        RunId::parse(&text).ok_or_else(|| serde::de::Error::custom("no id of a run"))
    }
}

impl std::fmt::Display for RunId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.hyphenated().fmt(formatter)
    }
}

/// The monotonic clock; within [`at_one_instant`] always the same. Pure code takes the value as an argument instead.
pub fn now() -> Instant {
    CLOCK.with(|clock| match clock.get() {
        Clock::Runs => read_clock(),
        Clock::Stands(instant) => instant,
        Clock::StandsFromNext => {
            let instant = read_clock();
            clock.set(Clock::Stands(instant));
            instant
        }
    })
}

/// Does `work`, for which the clock is read once at the most: for one poll of a task, which takes microseconds and would
/// read it a dozen times.
pub fn at_one_instant<T>(work: impl FnOnce() -> T) -> T {
    /// Lets the clock go on, also where `work` panics.
    struct GoOn(Clock);
    impl Drop for GoOn {
        fn drop(&mut self) {
            CLOCK.set(self.0);
        }
    }
    let _go_on = GoOn(CLOCK.replace(Clock::StandsFromNext));
    work()
}

thread_local! {
    static CLOCK: Cell<Clock> = const { Cell::new(Clock::Runs) };
    static QUICK: RefCell<SmallRng> = RefCell::new(rand::make_rng());
}

#[derive(Clone, Copy)]
enum Clock {
    Runs,
    StandsFromNext,
    Stands(Instant),
}

#[expect(clippy::disallowed_methods, reason = "this is the one place")]
fn read_clock() -> Instant {
    #[cfg(feature = "simulation")]
    if let Some(instant) = simulation::now() {
        return instant;
    }
    Instant::now()
}

/// The wall clock, for logs and answers only.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn wall_clock() -> SystemTime {
    #[cfg(feature = "simulation")]
    if let Some(time) = simulation::wall_clock() {
        return time;
    }
    SystemTime::now()
}

/// The system's monotonic clock in microseconds, as the protocol of service managers wants it.
pub fn monotonic_microseconds() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_nsec.unsigned_abs() / 1_000
}

pub fn random_u64() -> u64 {
    #[cfg(feature = "simulation")]
    if simulation::is_on() {
        return u64::from_ne_bytes(quick_random_bytes());
    }
    QUICK.with_borrow_mut(Rng::next_u64)
}

/// Unpredictable: for keys, and for whatever must not be guessed.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    #[cfg(feature = "simulation")]
    if simulation::is_on() {
        return quick_random_bytes();
    }
    rand::random()
}

/// Even, and different in every thread and process, but whoever has seen some can compute the next: for ids that only
/// have to be unique.
pub fn quick_random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[cfg(feature = "simulation")]
    if simulation::fill(&mut bytes) {
        return bytes;
    }
    QUICK.with_borrow_mut(|quick| quick.fill_bytes(&mut bytes));
    bytes
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_clock_stands_within_one_piece_of_work_only() {
        let past = |instant| {
            while read_clock() - instant < Duration::from_millis(1) {
                std::hint::spin_loop();
            }
        };
        let before = now();
        past(before);
        let (first, second) = at_one_instant(|| {
            let first = now();
            past(first);
            (first, now())
        });
        assert!(first > before, "it is read when it is first asked for");
        assert_eq!(first, second);
        assert!(now() > first);
    }

    #[test]
    fn quick_random_bytes_differ() {
        let drawn: std::collections::HashSet<[u8; 24]> = (0..1000).map(|_| quick_random_bytes()).collect();
        assert_eq!(drawn.len(), 1000);
        let of_another_thread = std::thread::spawn(quick_random_bytes::<24>).join().expect("it does not panic");
        assert!(!drawn.contains(&of_another_thread));
    }
}
