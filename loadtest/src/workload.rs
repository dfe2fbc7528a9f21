//! What a load test does: the checked form of a workload file and of the flags of `run`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use saphyr::{LoadableYamlNode, Scalar, Yaml};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::clock::parse_duration;
use crate::event::{EVENT_BYTES_MAX, EVENT_BYTES_MIN};

/// The most sessions that one load test starts.
pub const SESSIONS_MAX: u64 = 50_000_000;
/// The longest load test.
pub const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);

/// A whole load test.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub target: String,
    /// The HTTP version that clients speak: 1 or 2 (without TLS by prior knowledge).
    #[serde(default = "one")]
    pub http: u8,
    /// With HTTP/2: how many exchanges share a connection.
    #[serde(default = "hundred")]
    pub streams_per_connection: u32,
    #[serde(default)]
    pub arrivals: Arrivals,
    /// What a turn of a session does, drawn by weight.
    #[serde(default)]
    pub mix: Vec<MixItem>,
    #[serde(default)]
    pub session: Session,
    /// The share of runs whose client leaves, at a random time within the run: 0 to 1.
    #[serde(default)]
    pub abort: f64,
    /// Clients of a loopback target come from so many addresses, 127.0.1.1 and up: ports last longer. 1 to 250.
    #[serde(default = "sixteen")]
    pub sources: u8,
    /// Processes whose CPU time and memory are measured, with all their children.
    #[serde(default)]
    pub pids: Vec<u32>,
    #[serde(default)]
    pub window: Window,
    /// How long to wait for runs in flight after the last arrival.
    #[serde(default = "thirty_seconds")]
    pub grace: Span,
    /// The most runs in flight; an arrival beyond it is counted as a fault and not sent.
    #[serde(default = "in_flight_max")]
    pub max_in_flight: usize,
    #[serde(default = "one_seed")]
    pub seed: u64,
    #[serde(default)]
    pub tls: Tls,
}

/// When sessions begin.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Arrivals {
    /// Sessions a second.
    pub rate: f64,
    pub process: Process,
    pub duration: Span,
    /// No more sessions than this; 0 means no limit but the duration.
    pub limit: u64,
    /// Set: a closed loop of so many clients, each starting its next session when the last one ended. The rate is
    /// ignored, and latencies of a closed loop hide the waiting that a stall would have caused.
    pub concurrency: Option<u32>,
}

impl Default for Arrivals {
    fn default() -> Self {
        let duration = Span(Duration::from_secs(10));
        Self { rate: 10.0, process: Process::Poisson, duration, limit: 0, concurrency: None }
    }
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Process {
    Constant,
    Poisson,
}

/// One kind of work and how often it is drawn.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MixItem {
    #[serde(default = "one_weight")]
    pub weight: f64,
    #[serde(flatten)]
    pub work: Work,
}

/// What one turn of a session asks of the agent.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Work {
    /// Opens a stream, takes its first event and stays until the end of the window.
    Idle,
    /// Starts a background job (202), then asks for its state until it is done.
    Job { time: Length, poll: Span },
    /// A POST that is answered after this time.
    Run { time: Length },
    /// A GET with a short answer.
    Short {
        #[serde(default = "root")]
        path: String,
    },
    /// A POST that is answered with server-sent events.
    Stream { events: u32, interval: Span, size: usize },
    /// A WebSocket on which each message is echoed.
    WebSocket { messages: u32, interval: Span, size: usize },
}

/// A conversation of several turns.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Session {
    pub turns: u32,
    /// The pause between an answer and the next turn.
    pub think: Length,
    /// The header that carries the session's id; empty: none is sent.
    pub header: String,
}

impl Default for Session {
    fn default() -> Self {
        Self { turns: 1, think: Length::Fixed(Span(Duration::ZERO)), header: String::new() }
    }
}

/// The steady window: CPU, memory and latencies of events are counted in it. Times from the first arrival.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Window {
    pub from: Span,
    /// Zero: until the arrivals end.
    pub to: Span,
}

impl Default for Window {
    fn default() -> Self {
        Self { from: Span(Duration::from_secs(1)), to: Span(Duration::ZERO) }
    }
}

/// How the target's certificate is judged.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// A PEM file with the certificates that are trusted.
    pub ca: Option<std::path::PathBuf>,
    /// Take any certificate.
    pub insecure: bool,
}

/// A time that is drawn for each run.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Length {
    Fixed(Span),
    Uniform { min: Span, max: Span },
    Exponential { mean: Span },
}

/// A duration that is written `250ms`, `30s` or `5m`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Span(pub Duration);

impl Workload {
    /// Reads a YAML or JSON file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} is not a workload", path.display()))
    }

    /// Reads YAML (of which JSON is a part) and checks it.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let documents = Yaml::load_from_str(text)?;
        let [document] = documents.as_slice() else { bail!("write one document with one workload") };
        let workload: Self = serde_json::from_value(json_of(document, 0)?)?;
        workload.check()?;
        Ok(workload)
    }

    /// Checks what the types can't say.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.mix.is_empty() {
            bail!("mix: name at least one kind of work");
        }
        if self.mix.iter().any(|item| !(0.0..=1e9).contains(&item.weight))
            || self.mix.iter().all(|item| item.weight == 0.0)
        {
            bail!("mix: weights must be 0 or more, and one of them more than 0");
        }
        for item in &self.mix {
            if let Work::Stream { events: count, size, .. } | Work::WebSocket { messages: count, size, .. } = item.work
            {
                if !(EVENT_BYTES_MIN..=EVENT_BYTES_MAX).contains(&size) {
                    bail!("mix: size must be {EVENT_BYTES_MIN} to {EVENT_BYTES_MAX} bytes, not {size}");
                }
                if !(1..=99_999_999).contains(&count) {
                    bail!("mix: a stream needs 1 to 99999999 events, not {count}");
                }
            }
        }
        if !matches!(self.http, 1 | 2) {
            bail!("http: must be 1 or 2, not {}", self.http);
        }
        if self.http == 2 && self.mix.iter().any(|item| matches!(item.work, Work::WebSocket { .. })) {
            bail!("mix: WebSockets are only driven over HTTP/1.1; write http: 1");
        }
        if !(1..=250).contains(&self.sources) {
            bail!("sources: must be 1 to 250, not {}", self.sources);
        }
        if !(0.0..=1.0).contains(&self.abort) {
            bail!("abort: must be 0 to 1, not {}", self.abort);
        }
        if !(1..=10_000).contains(&self.session.turns) {
            bail!("session: turns must be 1 to 10000, not {}", self.session.turns);
        }
        if self.streams_per_connection == 0 || self.max_in_flight == 0 || self.arrivals.concurrency == Some(0) {
            bail!("streams_per_connection, max_in_flight and concurrency must be 1 or more");
        }
        if self.arrivals.concurrency.is_none() && !(0.001..=1e6).contains(&self.arrivals.rate) {
            bail!("arrivals: rate must be 0.001 to 1000000 a second, not {}", self.arrivals.rate);
        }
        if self.arrivals.duration.0 > DURATION_MAX || self.grace.0 > DURATION_MAX {
            bail!("arrivals: duration and grace must be at most 24h");
        }
        if self.arrivals.limit > SESSIONS_MAX {
            bail!("arrivals: limit must be at most {SESSIONS_MAX}");
        }
        Ok(())
    }

    /// When the steady window ends, from the first arrival.
    pub fn window_end(&self) -> Duration {
        if self.window.to.0.is_zero() { self.arrivals.duration.0 } else { self.window.to.0 }
    }
}

impl Work {
    /// The word for it in tables.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Job { .. } => "job",
            Self::Run { .. } => "run",
            Self::Short { .. } => "short",
            Self::Stream { .. } => "stream",
            Self::WebSocket { .. } => "web-socket",
        }
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(f64),
            Text(String),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Number(seconds) => seconds.to_string(),
            Written::Text(text) => text,
        };
        parse_duration(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{}ms", self.0.as_secs_f64() * 1e3))
    }
}

const DEPTH_MAX: usize = 32;

fn json_of(node: &Yaml<'_>, depth: usize) -> anyhow::Result<serde_json::Value> {
    use serde_json::Value;
    if depth == DEPTH_MAX {
        bail!("nested deeper than {DEPTH_MAX} levels");
    }
    Ok(match node {
        Yaml::Value(Scalar::Null) => Value::Null,
        Yaml::Value(Scalar::Boolean(value)) => Value::Bool(*value),
        Yaml::Value(Scalar::Integer(value)) => Value::from(*value),
        Yaml::Value(Scalar::FloatingPoint(value)) => Value::from(value.into_inner()),
        Yaml::Value(Scalar::String(value)) => Value::from(value.as_ref()),
        Yaml::Sequence(items) => items.iter().map(|item| json_of(item, depth + 1)).collect::<Result<Value, _>>()?,
        Yaml::Mapping(entries) => {
            let mut object = serde_json::Map::new();
            for (key, value) in entries {
                let Some(key) = key.as_str() else { bail!("a key is not text") };
                object.insert(key.to_owned(), json_of(value, depth + 1)?);
            }
            Value::Object(object)
        }
        _ => bail!("tags, aliases and unreadable values are not allowed"),
    })
}

fn one() -> u8 {
    1
}

fn sixteen() -> u8 {
    16
}

fn hundred() -> u32 {
    100
}

fn one_weight() -> f64 {
    1.0
}

fn one_seed() -> u64 {
    1
}

fn in_flight_max() -> usize {
    100_000
}

fn thirty_seconds() -> Span {
    Span(Duration::from_secs(30))
}

fn root() -> String {
    "/".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "target: http://127.0.0.1:1\nmix: [{kind: short}]\n";

    #[test]
    fn a_small_file_gets_defaults() {
        let workload = Workload::parse(SMALL).unwrap();
        assert_eq!((workload.http, workload.sources, workload.session.turns), (1, 16, 1));
        assert_eq!(workload.window_end(), Duration::from_secs(10));
    }

    #[test]
    fn a_large_file_is_read() {
        let text = "
target: https://localhost:8443
http: 2
arrivals: {rate: 5.5, process: constant, duration: 1m, limit: 100}
mix:
  - {kind: stream, weight: 3, events: 100, interval: 100ms, size: 200}
  - {kind: run, time: {mean: 2s}}
  - {kind: job, time: {min: 1s, max: 2s}, poll: 250ms}
session: {turns: 4, think: {mean: 3s}, header: x-session-id}
abort: 0.05
window: {from: 2s, to: 9s}
tls: {insecure: true}
";
        let workload = Workload::parse(text).unwrap();
        assert_eq!(workload.mix.len(), 3);
        assert_eq!(workload.window_end(), Duration::from_secs(9));
        let json = serde_json::to_string(&workload).unwrap();
        assert_eq!(Workload::parse(&json).unwrap().session.turns, 4, "JSON of a workload is a workload");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("target: x\n", "mix"),
            (&format!("{SMALL}http: 3\n"), "http"),
            (&format!("{SMALL}abort: 2\n"), "abort"),
            (&format!("{SMALL}unknown: 2\n"), "unknown"),
            (&format!("{SMALL}grace: soon\n"), "not a duration"),
            ("target: x\nmix: [{kind: stream, events: 1, interval: 1s, size: 5}]\n", "size"),
            ("target: x\nhttp: 2\nmix: [{kind: web-socket, messages: 1, interval: 1s, size: 200}]\n", "HTTP/1.1"),
        ];
        for (text, named) in cases {
            let error = format!("{:#}", Workload::parse(text).unwrap_err());
            assert!(error.contains(named), "{error} should name {named}");
        }
    }
}
