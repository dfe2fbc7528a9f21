//! The work items of the comparison, each a workload with what is read from its report.

use std::time::Duration;

use super::peer::{Front, Peer};
use crate::plan::Planner;
use crate::run::Report;
use crate::workload::{Length, MixItem, Process, Span, Tls, Work, Workload};

/// A work item.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Item {
    Short,
    Streams,
    Idle,
    ShortTls,
    StreamsTls,
    IdleTls,
    StreamsHttp2,
    Balance,
    Reloads,
    HalfLoad,
    Growth(u32),
}

/// One measured value.
pub struct Figure {
    pub name: &'static str,
    /// Absent where it makes no sense, such as CPU time without a proxy.
    pub value: Option<f64>,
}

/// How large the work is.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    pub streams: u32,
    pub stream_seconds: u32,
    pub short_seconds: u64,
    pub idle: u32,
    /// Between the opening of the last idle stream and the measurement.
    pub settle: Duration,
    pub balance_seconds: u64,
}

impl Scale {
    pub const FULL: Self = Self {
        streams: 1000,
        stream_seconds: 10,
        short_seconds: 5,
        idle: 9000,
        settle: Duration::from_secs(2),
        balance_seconds: 30,
    };
    pub const QUICK: Self = Self {
        streams: 50,
        stream_seconds: 1,
        short_seconds: 1,
        idle: 100,
        settle: Duration::from_millis(200),
        balance_seconds: 2,
    };
}

/// Backends of the balance item, and how many runs each works on at once.
pub const BACKENDS: usize = 10;
pub const SLOTS: usize = 4;
/// Between the events of a stream.
pub const INTERVAL: Duration = Duration::from_millis(100);
const EVENT_BYTES: usize = 200;
const CONNECTIONS: u32 = 64;

impl Item {
    /// The items that a letter of `--work` stands for.
    pub fn of_letter(letter: &str) -> Option<Vec<Self>> {
        Some(match letter {
            "a" => vec![Self::Short],
            "b" => vec![Self::Streams],
            "c" => vec![Self::Idle],
            "d" => vec![Self::ShortTls, Self::StreamsTls, Self::IdleTls],
            "e" => vec![Self::StreamsHttp2],
            "f" => vec![Self::Balance],
            "g" => vec![Self::Reloads],
            "h" => vec![Self::HalfLoad],
            "i" => vec![Self::Growth(100), Self::Growth(1000), Self::Growth(9000)],
            _ => return None,
        })
    }

    pub fn title(self) -> String {
        match self {
            Self::Short => "a: short requests, 64 kept connections, closed loop".to_owned(),
            Self::Streams => "b: SSE streams, an event each 100 ms".to_owned(),
            Self::Idle => "c: idle streams".to_owned(),
            Self::ShortTls => "d: TLS, short requests, 64 kept connections".to_owned(),
            Self::StreamsTls => "d: TLS, SSE streams, an event each 100 ms".to_owned(),
            Self::IdleTls => "d: TLS, idle streams".to_owned(),
            Self::StreamsHttp2 => "e: HTTP/2 clients, 100 SSE streams a connection".to_owned(),
            Self::Balance => {
                format!("f: runs of mixed lengths over {BACKENDS} backends that work on {SLOTS} at once")
            }
            Self::Reloads => "g: as b, with a reload each second".to_owned(),
            Self::HalfLoad => "h: SSE streams at half of the floor's saturating load".to_owned(),
            Self::Growth(streams) => format!("i: 10,000 events a second over {streams} streams"),
        }
    }

    /// What clients speak.
    pub fn front(self) -> Front {
        match self {
            Self::ShortTls | Self::StreamsTls | Self::IdleTls => Front::Tls,
            Self::StreamsHttp2 => Front::Http2,
            _ => Front::Http1,
        }
    }

    /// Whether the item says anything about this peer.
    pub fn concerns(self, peer: Peer) -> bool {
        match (self, peer) {
            // The mock agent of the comparison speaks without TLS, and alone it balances nothing.
            (Self::ShortTls | Self::StreamsTls | Self::IdleTls | Self::Idle | Self::Balance, Peer::Direct) => false,
            // A byte copy knows connections, not runs.
            (Self::Balance, Peer::Floor) => false,
            (Self::Growth(_), peer) => matches!(peer, Peer::Floor | Peer::Longhaul | Peer::Nginx | Peer::Haproxy),
            _ => true,
        }
    }

    /// The workload. `load`: events a second of item h, as many as there are streams for.
    pub fn workload(self, target: &str, scale: &Scale, load: f64) -> Workload {
        match self {
            Self::Short | Self::ShortTls => {
                let mut workload = blank(target, Work::Short { path: "/".to_owned() });
                workload.arrivals.concurrency = Some(CONNECTIONS);
                workload.arrivals.duration = Span(Duration::from_secs(scale.short_seconds));
                workload.window.from = Span(Duration::from_secs(scale.short_seconds) / 5);
                workload
            }
            Self::Streams | Self::StreamsTls | Self::Reloads => {
                streams(target, scale.streams, INTERVAL, scale.stream_seconds)
            }
            Self::StreamsHttp2 => {
                Workload { http: 2, ..streams(target, scale.streams, INTERVAL, scale.stream_seconds) }
            }
            Self::HalfLoad => {
                let count = (load * INTERVAL.as_secs_f64()).clamp(10.0, f64::from(scale.idle)) as u32;
                streams(target, count, INTERVAL, scale.stream_seconds)
            }
            Self::Growth(count) => {
                let count = count.min(scale.idle);
                streams(target, count, INTERVAL * count / scale.streams, scale.stream_seconds)
            }
            Self::Idle | Self::IdleTls => {
                let mut workload = blank(target, Work::Idle);
                // TLS handshakes cost about a millisecond at each end.
                let rate = if self == Self::IdleTls { 400.0 } else { 2000.0 };
                let ramp = Duration::from_secs_f64(f64::from(scale.idle) / rate);
                workload.arrivals.process = Process::Constant;
                workload.arrivals.rate = rate;
                workload.arrivals.limit = u64::from(scale.idle);
                workload.arrivals.duration = Span(ramp + Duration::from_secs(1));
                workload.window.from = Span(ramp + scale.settle);
                workload.window.to = Span(ramp + scale.settle + Duration::from_millis(100));
                workload
            }
            Self::Balance => {
                let mean = |milliseconds| Length::Exponential { mean: Span(Duration::from_millis(milliseconds)) };
                let mut workload = blank(target, Work::Run { time: mean(100) });
                workload.mix[0].weight = 80.0;
                workload.mix.push(MixItem { weight: 20.0, work: Work::Run { time: mean(1500) } });
                // Seven tenths of what all places can do: 0.8 x 100 ms + 0.2 x 1500 ms = 380 ms a run.
                workload.arrivals.rate = 0.7 * (BACKENDS * SLOTS) as f64 / 0.38;
                workload.arrivals.duration = Span(Duration::from_secs(scale.balance_seconds));
                workload.window.from = Span(Duration::from_secs(scale.balance_seconds) / 6);
                workload
            }
        }
    }

    /// What the report says; the first figure is the item's headline.
    pub fn figures(self, report: &Report) -> Vec<Figure> {
        let mut figures = Vec::new();
        let mut add = |name, value: Option<f64>| figures.push(Figure { name, value });
        let processes = report.window.processes.as_ref();
        match self {
            Self::Short | Self::ShortTls => {
                add("CPU us/request", processes.and_then(|processes| processes.cpu_us_per_answer));
                add("user us/request", processes.and_then(|processes| processes.user_us_per_answer));
                add("requests/s", Some(report.window.answers as f64 / report.window.seconds));
                add("p50 ms", Some(report.answer.p50_ms));
                add("p99 ms", Some(report.answer.p99_ms));
            }
            Self::Idle | Self::IdleTls => {
                add("KiB/idle stream", processes.and_then(|processes| processes.resident_kib_per_open));
                add("open", processes.map(|processes| processes.open as f64));
            }
            Self::Balance => {
                add("wait mean ms", Some(report.answer.mean_ms));
                add("wait p50 ms", Some(report.answer.p50_ms));
                add("wait p99 ms", Some(report.answer.p99_ms));
            }
            _ => {
                add("CPU us/event", processes.and_then(|processes| processes.cpu_us_per_event));
                add("user us/event", processes.and_then(|processes| processes.user_us_per_event));
                add("events/s", Some(report.window.events as f64 / report.window.seconds));
                add("p50 ms", Some(report.event.p50_ms));
                add("p99 ms", Some(report.event.p99_ms));
                add("p99.9 ms", Some(report.event.p999_ms));
                add("first p99 ms", Some(report.first_event.p99_ms));
            }
        }
        figures
    }
}

/// Arrivals and lengths of a workload's runs, as the simulation wants them.
pub fn trace(workload: &Workload) -> Vec<(u64, u64)> {
    Planner::new(workload).map(|session| (session.at_ns, session.turns[0].time_ns)).collect()
}

/// `count` streams that begin evenly over about the first fifth of their length, and send in turn.
fn streams(target: &str, count: u32, interval: Duration, seconds: u32) -> Workload {
    let length = Duration::from_secs(seconds.into());
    let events = (length.as_secs_f64() / interval.as_secs_f64()).round().max(2.0) as u32;
    let mut workload = blank(target, Work::Stream { events, interval: Span(interval), size: EVENT_BYTES });
    let ramp = ramp(count, interval, length / 5);
    workload.arrivals.process = Process::Constant;
    workload.arrivals.rate = f64::from(count) / ramp.as_secs_f64();
    workload.arrivals.limit = u64::from(count);
    workload.arrivals.duration = Span(ramp + Duration::from_secs(1));
    workload.window.from = Span(ramp + length / 50);
    // The last event of the first stream is due one interval before its length is over.
    workload.window.to = Span((length - length / 50).saturating_sub(interval));
    workload
}

/// In which time to begin `count` streams at a constant rate so that their events lie evenly over the interval, and
/// no two streams send at once. About `wanted`: as many intervals, but divided among a number of streams, `count` or
/// little more, that has no divisor in common with them.
fn ramp(count: u32, interval: Duration, wanted: Duration) -> Duration {
    let intervals = (wanted.as_secs_f64() / interval.as_secs_f64()).round().max(1.0) as u32;
    let among = (count..).find(|&among| common_divisor(intervals, among) == 1).unwrap_or(count);
    interval * intervals * count / among
}

fn common_divisor(one: u32, other: u32) -> u32 {
    if other == 0 { one } else { common_divisor(other, one % other) }
}

fn blank(target: &str, work: Work) -> Workload {
    Workload {
        target: target.to_owned(),
        http: 1,
        streams_per_connection: 100,
        arrivals: crate::workload::Arrivals::default(),
        mix: vec![MixItem { weight: 1.0, work }],
        session: crate::workload::Session::default(),
        abort: 0.0,
        sources: 16,
        pids: Vec::new(),
        window: crate::workload::Window::default(),
        grace: Span(Duration::from_secs(20)),
        max_in_flight: 100_000,
        seed: 1,
        tls: Tls { ca: None, insecure: true },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_send_in_turn() {
        for (count, interval) in [(100, 10_000), (1000, 100_000), (9000, 900_000), (1000, 34_400), (1, 100_000)] {
            let workload = streams("http://127.0.0.1:1", count, Duration::from_micros(interval), 20);
            let interval_s = interval as f64 / 1e6;
            let mut phases: Vec<f64> =
                (0..count).map(|number| f64::from(number) / workload.arrivals.rate % interval_s).collect();
            phases.sort_by(f64::total_cmp);
            let even = interval_s / f64::from(count);
            // One place in a thousand may stay empty, and the others are that much nearer to each other.
            assert!(phases.windows(2).all(|two| two[1] - two[0] > 0.98 * even), "{count} streams");
            assert!(workload.window.from.0 < Duration::from_secs(5), "{count} streams");
        }
    }

    #[test]
    fn every_workload_is_valid_and_its_window_is_within_the_streams() {
        for scale in [Scale::FULL, Scale::QUICK] {
            for item in ["a", "b", "c", "d", "e", "f", "g", "h", "i"].into_iter().filter_map(Item::of_letter).flatten()
            {
                let workload = item.workload("http://127.0.0.1:1", &scale, 20_000.0);
                workload.check().unwrap();
                assert!(workload.window.from.0 < workload.window_end(), "{item:?}");
                assert!(!item.title().is_empty());
                if let Work::Stream { events, interval, .. } = workload.mix[0].work {
                    let ramp = f64::from(u32::try_from(workload.arrivals.limit).unwrap()) / workload.arrivals.rate;
                    assert!(workload.window.from.0.as_secs_f64() > ramp, "{item:?}");
                    assert!(workload.window_end() <= interval.0 * (events - 1), "{item:?}");
                }
            }
        }
        assert!(Item::of_letter("z").is_none());
    }

    #[test]
    fn a_trace_keeps_arrivals_in_order() {
        let trace = trace(&Item::Balance.workload("http://127.0.0.1:1", &Scale::FULL, 0.0));
        assert!(trace.windows(2).all(|pair| pair[0].0 <= pair[1].0));
        let mean = trace.iter().map(|run| run.1 as f64).sum::<f64>() / trace.len() as f64;
        assert!((mean / 380e6 - 1.0).abs() < 0.2, "a mean of {mean} ns");
    }
}
