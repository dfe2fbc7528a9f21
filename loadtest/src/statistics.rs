//! What a load test counts while it runs: latencies in HDR histograms, faults by kind, and a line over time.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::event::EventFault;

/// What can go wrong with a run, from its client's side.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// No connection.
    Connect,
    /// The TLS handshake failed.
    Handshake,
    /// The connection broke: reset, or an error while reading or writing.
    Broken,
    /// The connection or stream ended within an answer, and it showed.
    CutOff,
    /// A stream ended as if complete, but events are missing.
    Short,
    /// Bytes that are not HTTP.
    Malformed,
    /// An answer whose status is an error.
    Status,
    /// No end within the run's time and the grace.
    TimedOut,
    /// More runs in flight than allowed; not sent.
    Overload,
    /// An event of another client's stream.
    Crossed,
    /// An event twice.
    Doubled,
    /// A hole in the events.
    Lost,
    /// An event after a later one.
    Reordered,
    /// The stream ended within an event.
    Truncated,
    /// An event with changed bytes.
    Corrupt,
}

impl From<EventFault> for Fault {
    fn from(fault: EventFault) -> Self {
        match fault {
            EventFault::Corrupt => Self::Corrupt,
            EventFault::Crossed => Self::Crossed,
            EventFault::Doubled => Self::Doubled,
            EventFault::Lost => Self::Lost,
            EventFault::Reordered => Self::Reordered,
            EventFault::Truncated => Self::Truncated,
        }
    }
}

/// A latency's name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Latency {
    /// From the time a run was to be sent to the whole answer, less the time the agent was asked to take.
    Answer,
    /// From an event's send time (in its bytes) to its arrival. For WebSockets: there and back.
    Event,
    /// From the time a stream was to be asked for to its first event.
    FirstEvent,
    /// How late the generator itself was in sending: it should be far below the other figures.
    Lateness,
}

/// Counters and histograms, shared by all clients.
pub struct Statistics {
    inner: Mutex<Inner>,
}

struct Inner {
    counts: Counts,
    answer: Histogram<u64>,
    event: Histogram<u64>,
    first_event: Histogram<u64>,
    lateness: Histogram<u64>,
    faults: BTreeMap<Fault, u64>,
    fault_examples: BTreeMap<Fault, String>,
    recording: bool,
    timeline: Vec<Moment>,
    moment: Histogram<u64>,
    moment_events: u64,
    moment_answers: u64,
}

/// Totals.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Counts {
    /// Runs that were sent.
    pub started: u64,
    /// Runs that ended well.
    pub completed: u64,
    /// Runs whose client left, as the workload asks for.
    pub aborted: u64,
    pub events: u64,
    /// Whole answers: of short requests, runs, streams and polls of jobs.
    pub answers: u64,
    pub connections: u64,
    /// A kept connection had been closed by the other side before it was used again; the request was sent anew.
    pub reconnects: u64,
    /// Turns of a session that another backend answered than the turn before.
    pub moved_turns: u64,
    /// Runs in flight now.
    pub open: u64,
}

/// A piece of the test's time.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Moment {
    pub seconds: f64,
    pub events_per_second: f64,
    pub answers_per_second: f64,
    pub open: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
}

/// A histogram's summary, in milliseconds.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Percentiles {
    pub count: u64,
    pub mean_ms: f64,
    pub p50_ms: f64,
    pub p90_ms: f64,
    pub p99_ms: f64,
    pub p999_ms: f64,
    pub p9999_ms: f64,
    pub max_ms: f64,
    /// Quantile and milliseconds, for plots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub curve: Vec<(f64, f64)>,
}

const LATENCY_NS_MAX: u64 = 3_600_000_000_000;

impl Statistics {
    pub fn new() -> Self {
        let inner = Inner {
            counts: Counts::default(),
            answer: histogram(),
            event: histogram(),
            first_event: histogram(),
            lateness: histogram(),
            faults: BTreeMap::new(),
            fault_examples: BTreeMap::new(),
            recording: false,
            timeline: Vec::new(),
            moment: coarse_histogram(),
            moment_events: 0,
            moment_answers: 0,
        };
        Self { inner: Mutex::new(inner) }
    }

    /// Latencies of answers and events are recorded only between `record(true)` and `record(false)`.
    pub fn record(&self, recording: bool) {
        self.inner().recording = recording;
    }

    pub fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.inner().counts);
    }

    pub fn counts(&self) -> Counts {
        self.inner().counts
    }

    pub fn latency(&self, latency: Latency, nanoseconds: u64) {
        let mut inner = self.inner();
        match latency {
            Latency::Answer => {
                inner.counts.answers += 1;
                inner.moment_answers += 1;
                if inner.recording {
                    inner.answer.saturating_record(nanoseconds);
                }
                inner.moment.saturating_record(nanoseconds);
            }
            Latency::Event => {
                inner.counts.events += 1;
                inner.moment_events += 1;
                if inner.recording {
                    inner.event.saturating_record(nanoseconds);
                }
                inner.moment.saturating_record(nanoseconds);
            }
            Latency::FirstEvent => inner.first_event.saturating_record(nanoseconds),
            Latency::Lateness => inner.lateness.saturating_record(nanoseconds),
        }
    }

    /// Counts a fault; the first explanation of each kind is kept.
    pub fn fault(&self, fault: Fault, explanation: &str) {
        let mut inner = self.inner();
        *inner.faults.entry(fault).or_default() += 1;
        inner.fault_examples.entry(fault).or_insert_with(|| explanation.chars().take(300).collect());
    }

    pub fn faults(&self) -> BTreeMap<Fault, u64> {
        self.inner().faults.clone()
    }

    pub fn fault_examples(&self) -> BTreeMap<Fault, String> {
        self.inner().fault_examples.clone()
    }

    pub fn percentiles(&self, latency: Latency) -> Percentiles {
        let inner = self.inner();
        summarize(match latency {
            Latency::Answer => &inner.answer,
            Latency::Event => &inner.event,
            Latency::FirstEvent => &inner.first_event,
            Latency::Lateness => &inner.lateness,
        })
    }

    /// Closes a piece of the line over time that took `length_seconds` and ended `seconds` after the start.
    pub fn end_moment(&self, seconds: f64, length_seconds: f64) -> Moment {
        let mut inner = self.inner();
        let quantile = |inner: &Inner, quantile: f64| inner.moment.value_at_quantile(quantile) as f64 / 1e6;
        let moment = Moment {
            seconds,
            events_per_second: inner.moment_events as f64 / length_seconds,
            answers_per_second: inner.moment_answers as f64 / length_seconds,
            open: inner.counts.open,
            p50_ms: quantile(&inner, 0.5),
            p99_ms: quantile(&inner, 0.99),
        };
        inner.timeline.push(moment.clone());
        inner.moment_events = 0;
        inner.moment_answers = 0;
        inner.moment.reset();
        moment
    }

    pub fn timeline(&self) -> Vec<Moment> {
        self.inner().timeline.clone()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn summarize(histogram: &Histogram<u64>) -> Percentiles {
    if histogram.is_empty() {
        return Percentiles::default();
    }
    let at = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1e6;
    // 1 - 10^(-x) for x up to what the count supports: evenly spaced on a plot of nines.
    let nines_max = (histogram.len() as f64).log10().max(0.3);
    let curve = (0..=60)
        .map(|step| 1.0 - 10f64.powf(-nines_max * f64::from(step) / 60.0))
        .map(|quantile| (quantile, at(quantile)))
        .collect();
    Percentiles {
        count: histogram.len(),
        mean_ms: histogram.mean() / 1e6,
        p50_ms: at(0.5),
        p90_ms: at(0.9),
        p99_ms: at(0.99),
        p999_ms: at(0.999),
        p9999_ms: at(0.9999),
        max_ms: histogram.max() as f64 / 1e6,
        curve,
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1_000, LATENCY_NS_MAX, 3).expect("the bounds are constants that make sense")
}

fn coarse_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1_000, LATENCY_NS_MAX, 2).expect("the bounds are constants that make sense")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_values() {
        let statistics = Statistics::new();
        statistics.record(true);
        for milliseconds in 1..=10_000u64 {
            statistics.latency(Latency::Event, milliseconds * 1_000_000);
        }
        let percentiles = statistics.percentiles(Latency::Event);
        assert_eq!(percentiles.count, 10_000);
        for (found, expected) in [
            (percentiles.p50_ms, 5_000.0),
            (percentiles.p99_ms, 9_900.0),
            (percentiles.p999_ms, 9_990.0),
            (percentiles.max_ms, 10_000.0),
        ] {
            assert!((found / expected - 1.0).abs() < 0.002, "{found} should be near {expected}");
        }
        assert!(percentiles.curve.windows(2).all(|pair| pair[0].1 <= pair[1].1), "a curve of quantiles never falls");
    }

    #[test]
    fn outside_the_window_events_are_counted_but_not_recorded() {
        let statistics = Statistics::new();
        statistics.latency(Latency::Event, 1_000_000);
        statistics.record(true);
        statistics.latency(Latency::Event, 1_000_000);
        assert_eq!((statistics.counts().events, statistics.percentiles(Latency::Event).count), (2, 1));
    }

    #[test]
    fn moments_hold_what_came_since_the_last() {
        let statistics = Statistics::new();
        statistics.latency(Latency::Event, 3_000_000);
        let first = statistics.end_moment(0.5, 0.5);
        assert_eq!(first.events_per_second, 2.0);
        assert!((first.p99_ms - 3.0).abs() < 0.05);
        assert_eq!(statistics.end_moment(1.0, 0.5).events_per_second, 0.0);
        assert_eq!(statistics.timeline().len(), 2);
    }

    #[test]
    fn faults_are_counted_by_kind_with_their_first_explanation() {
        let statistics = Statistics::new();
        statistics.fault(Fault::Status, "503");
        statistics.fault(Fault::Status, "502");
        statistics.fault(EventFault::Lost.into(), "");
        assert_eq!(statistics.faults(), BTreeMap::from([(Fault::Status, 2), (Fault::Lost, 1)]));
        assert_eq!(statistics.fault_examples()[&Fault::Status], "503");
    }
}
