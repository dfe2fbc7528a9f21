//! What the mock agent answers to a request, whatever the HTTP version: a pure function of method, path and board.

use std::time::Duration;

use super::Backend;
use crate::clock::{nanoseconds, parse_duration};
use crate::event::{EVENT_BYTES_MAX, EVENT_BYTES_MIN};

/// What is to be done for a request.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// An answer that is whole at once.
    Full(Full),
    /// Hold for this long, then answer `done`.
    Run(Duration),
    Stream(StreamPlan),
    /// Echo WebSocket messages.
    WebSocket,
}

#[derive(Debug, Default, PartialEq)]
pub struct Full {
    pub status: u16,
    pub body: String,
    pub location: Option<String>,
}

/// A stream of stamped events.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StreamPlan {
    pub tag: u64,
    pub events: u32,
    pub interval: Duration,
    pub size: usize,
    /// After the last event stay silent instead of ending.
    pub silent: bool,
}

/// Reads the request's target. Query parameters that are absent have defaults; those that make no sense give a 400.
pub fn answer(path_and_query: &str, backend: &Backend) -> Answer {
    let (path, query) = path_and_query.split_once('?').unwrap_or((path_and_query, ""));
    let chosen = match path {
        "/stream" => stream(query, false),
        "/idle" => stream(query, true),
        "/run" => time(query).map(Answer::Run),
        "/jobs" => time(query).map(|hold| {
            let number = backend.board.add_job(nanoseconds(hold));
            full(202, "started", Some(format!("/jobs/{number}")))
        }),
        "/websocket" => Some(Answer::WebSocket),
        "/board" => {
            let report = backend.board.report(parameter(query, "restart").is_some());
            Some(full(200, &serde_json::to_string(&report).unwrap_or_default(), None))
        }
        _ => Some(match path.strip_prefix("/jobs/") {
            Some(number) => match number.parse().ok().and_then(|number| backend.board.job_done(number)) {
                Some(true) => full(200, "done", None),
                Some(false) => full(202, "running", None),
                None => full(404, "no such job", None),
            },
            None => full(200, "ok", None),
        }),
    };
    chosen.unwrap_or_else(|| full(400, "a query parameter makes no sense", None))
}

fn stream(query: &str, silent: bool) -> Option<Answer> {
    let events = if silent { 1 } else { number(query, "events", 100)? };
    let interval = Duration::from_micros(number(query, "interval_us", 100_000)?);
    let size = usize::try_from(number(query, "size", 200)?).ok()?;
    let tag = parameter(query, "tag").map_or(Some(0), |tag| u64::from_str_radix(tag, 16).ok())?;
    let events = u32::try_from(events).ok().filter(|events| (1..=99_999_999).contains(events))?;
    if !(EVENT_BYTES_MIN..=EVENT_BYTES_MAX).contains(&size) {
        return None;
    }
    Some(Answer::Stream(StreamPlan { tag, events, interval, size, silent }))
}

fn time(query: &str) -> Option<Duration> {
    parse_duration(parameter(query, "time").unwrap_or("1s")).ok()
}

fn number(query: &str, name: &str, default: u64) -> Option<u64> {
    parameter(query, name).map_or(Some(default), |value| value.parse().ok())
}

fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').filter_map(|pair| pair.split_once('=')).find(|pair| pair.0 == name).map(|pair| pair.1)
}

fn full(status: u16, body: &str, location: Option<String>) -> Answer {
    Answer::Full(Full { status, body: body.to_owned(), location })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::board::Board;
    use super::*;

    fn backend() -> Backend {
        Backend { number: 0, board: Arc::new(Board::new(1, None)) }
    }

    #[test]
    fn a_stream_is_described_by_its_query() {
        let answer = answer("/stream?events=5&interval_us=2000&size=300&tag=ab", &backend());
        let plan = StreamPlan { tag: 0xab, events: 5, interval: Duration::from_millis(2), size: 300, silent: false };
        assert_eq!(answer, Answer::Stream(plan));
    }

    #[test]
    fn nonsense_is_refused() {
        for path in ["/stream?events=0", "/stream?size=3", "/idle?tag=zz", "/run?time=soon"] {
            assert!(matches!(answer(path, &backend()), Answer::Full(Full { status: 400, .. })), "{path}");
        }
    }

    #[test]
    fn a_job_is_done_after_its_time_and_then_forgotten() {
        let backend = backend();
        let Answer::Full(Full { status: 202, location: Some(place), .. }) = answer("/jobs?time=0ms", &backend) else {
            panic!("a job is started with 202 and a location");
        };
        let status = |path: &str| match answer(path, &backend) {
            Answer::Full(full) => full.status,
            _ => 0,
        };
        assert_eq!((status(&place), status(&place)), (200, 404));
        let Answer::Full(Full { location: Some(place), .. }) = answer("/jobs?time=1h", &backend) else { panic!() };
        assert_eq!(status(&place), 202);
    }
}
