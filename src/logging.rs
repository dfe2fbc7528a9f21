//! Logging: diagnostics to stderr, and the access log, one line an exchange, to stdout.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::IntCounter;
use sha2::{Digest, Sha256};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, filter, fmt, reload};

use crate::config::{Log, LogFormat, LogLevel, SessionIds};
use crate::error::Code;
use crate::ids::{self, RunId};

/// Starts diagnostics to stderr for the whole process. Where something else already receives them (a test), that stays.
pub fn init(log: &Log) -> Diagnostics {
    let (layer, handle) = reload::Layer::new(layer(log));
    let _ = tracing_subscriber::registry().with(layer).try_init();
    Diagnostics { handle }
}

/// Changes the diagnostics of the running process.
#[derive(Clone)]
pub struct Diagnostics {
    handle: reload::Handle<Boxed, Registry>,
}

impl Diagnostics {
    /// Takes over level and format of a reloaded configuration.
    pub fn configure(&self, log: &Log) {
        // Fails only where another subscriber won at start; then that one decides.
        let _ = self.handle.reload(layer(log));
    }
}

type Boxed = Box<dyn Layer<Registry> + Send + Sync>;

fn layer(log: &Log) -> Boxed {
    let level = match log.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // Libraries speak at `debug` of every frame; whoever asks for `debug` wants to hear of us.
    let filter = filter::Targets::new().with_default(level.min(LevelFilter::INFO)).with_target("longhaul", level);
    // Whoever asks by them says what they meet, once; they say it with every try.
    let filter = filter.with_target("kube", LevelFilter::OFF).with_target("hickory", LevelFilter::OFF);
    // Its report of a failed write goes to stderr by `eprintln!`, which panics when stderr is what failed.
    let lines = fmt::layer().with_writer(std::io::stderr).log_internal_errors(false);
    match log.format {
        LogFormat::Text => filter.and_then(lines.with_ansi(std::io::stderr().is_terminal())).boxed(),
        LogFormat::Json => filter.and_then(lines.with_ansi(false).json().flatten_event(true)).boxed(),
    }
}

/// The access log: formats lines where they arise and hands them to one thread that writes them to stdout.
/// Clones write to the same log.
#[derive(Clone)]
pub struct AccessLog {
    shared: Arc<Shared>,
    queue: SyncSender<Item>,
}

struct Shared {
    enabled: AtomicBool,
    json: AtomicBool,
    plain_sessions: AtomicBool,
    /// Whoever read the log is gone: nothing is formatted any more.
    closed: AtomicBool,
    dropped: IntCounter,
}

enum Item {
    Line(String),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

/// One exchange at its end. What is not known, or has no meaning for it, is `None`.
#[derive(Clone, Debug)]
pub struct AccessLine<'a> {
    /// When the exchange ended.
    pub time: SystemTime,
    /// The effective client address; none behind a unix socket.
    pub client: Option<IpAddr>,
    /// `None`, as the path: the request's head could not be read.
    pub method: Option<&'a str>,
    /// Without the query, which may carry secrets.
    pub path: Option<&'a str>,
    /// 0: no answer was begun.
    pub status: u16,
    pub code: Option<Code>,
    /// Of the run that the exchange started.
    pub outcome: Option<&'a str>,
    pub service: Option<&'a str>,
    pub version: Option<&'a str>,
    pub endpoint: Option<&'a str>,
    pub affinity: &'a str,
    /// The session's key as the client sent it; written hashed unless the configuration says `plain`.
    pub session: Option<&'a str>,
    pub run: Option<RunId>,
    pub queue: Option<Duration>,
    pub first_event: Option<Duration>,
    pub events: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub duration: Duration,
}

impl AccessLog {
    /// Starts the thread that writes to stdout. `dropped` counts the lines that were lost because it could not keep up.
    pub fn start(log: &Log, dropped: IntCounter) -> AccessLog {
        AccessLog::to(std::io::stdout(), log, dropped)
    }

    /// As [`AccessLog::start`], to another writer.
    pub fn to(writer: impl Write + Send + 'static, log: &Log, dropped: IntCounter) -> AccessLog {
        let (queue, lines) = sync_channel(QUEUED_LINES_MAX);
        let shared = Arc::new(Shared {
            enabled: AtomicBool::new(false),
            json: AtomicBool::new(false),
            plain_sessions: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            dropped,
        });
        let access_log = AccessLog { shared: Arc::clone(&shared), queue };
        access_log.configure(log);
        let spawned = std::thread::Builder::new().name("access-log".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || write_lines(writer, &lines, &shared)
        });
        if let Err(error) = spawned {
            tracing::error!(%error, "no access log: its thread could not be started");
            shared.closed.store(true, Ordering::Relaxed);
        }
        access_log
    }

    /// Takes over a reloaded configuration.
    pub fn configure(&self, log: &Log) {
        self.shared.enabled.store(log.access, Ordering::Relaxed);
        self.shared.json.store(log.format == LogFormat::Json, Ordering::Relaxed);
        self.shared.plain_sessions.store(log.session_ids == SessionIds::Plain, Ordering::Relaxed);
    }

    /// A line that is given will be written: whoever must gather its parts can ask first.
    pub fn enabled(&self) -> bool {
        self.shared.enabled.load(Ordering::Relaxed) && !self.shared.closed.load(Ordering::Relaxed)
    }

    /// Queues the line. Never waits: when the queue is full the line is dropped and counted.
    pub fn write(&self, line: &AccessLine<'_>) {
        if !self.enabled() {
            return;
        }
        let plain_sessions = self.shared.plain_sessions.load(Ordering::Relaxed);
        let text = match self.shared.json.load(Ordering::Relaxed) {
            true => line.json(plain_sessions),
            false => line.text(plain_sessions),
        };
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Item::Line(text)) {
            self.shared.dropped.inc();
        }
    }

    /// Waits until every line so far is written, at most `timeout`. Blocks its thread: for the end of the process.
    pub fn flush(&self, timeout: Duration) {
        let deadline = ids::now() + timeout;
        let (done, written) = sync_channel(1);
        let mut item = Item::Flush(done);
        while let Err(TrySendError::Full(back)) = self.queue.try_send(item) {
            if ids::now() >= deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
            item = back;
        }
        let _ = written.recv_timeout(deadline.saturating_duration_since(ids::now()));
    }
}

/// The thread's life: takes what is queued, writes it in one go, ends with the last handle or when nobody reads.
fn write_lines(mut writer: impl Write, queue: &Receiver<Item>, shared: &Shared) {
    let mut batch = Vec::with_capacity(BATCH_BYTES);
    while let Ok(first) = queue.recv() {
        let mut next = Some(first);
        let mut flushes = Vec::new();
        while let Some(item) = next {
            match item {
                Item::Line(line) => batch.extend_from_slice(line.as_bytes()),
                Item::Flush(done) => flushes.push(done),
            }
            next = if batch.len() < BATCH_BYTES { queue.try_recv().ok() } else { None };
        }
        if let Err(error) = writer.write_all(&batch).and_then(|()| writer.flush()) {
            shared.closed.store(true, Ordering::Relaxed);
            tracing::warn!(%error, "the access log ends: stdout can't be written any more");
            return;
        }
        batch.clear();
        for done in flushes {
            let _ = done.try_send(());
        }
    }
}

/// A field's value, with what its writing needs.
enum Value<'a> {
    Absent,
    /// May hold anything.
    Text(&'a str),
    /// Known to need no escaping.
    Safe(&'a str),
    Address(IpAddr),
    Number(u64),
}

impl AccessLine<'_> {
    /// `key=value` pairs. Values that are more than one plain word are quoted; absent ones are `-`.
    fn text(&self, plain_sessions: bool) -> String {
        self.with_fields(plain_sessions, |fields| {
            let mut line = String::with_capacity(LINE_BYTES);
            for (index, (name, value)) in fields.iter().enumerate() {
                if index > 0 {
                    line.push(' ');
                }
                line.push_str(name);
                line.push('=');
                // Writing to a String can't fail.
                let _ = match value {
                    Value::Absent => line.write_char('-'),
                    Value::Text(text) => escape_text(text, &mut line),
                    Value::Safe(text) => line.write_str(text),
                    Value::Address(address) => write!(line, "{address}"),
                    Value::Number(number) => write!(line, "{number}"),
                };
            }
            line.push('\n');
            line
        })
    }

    /// One JSON object.
    fn json(&self, plain_sessions: bool) -> String {
        self.with_fields(plain_sessions, |fields| {
            let mut line = String::with_capacity(LINE_BYTES);
            for (index, (name, value)) in fields.iter().enumerate() {
                line.push(if index == 0 { '{' } else { ',' });
                let _ = write!(line, "\"{name}\":");
                let _ = match value {
                    Value::Absent => line.write_str("null"),
                    Value::Text(text) => escape_json(text, &mut line),
                    Value::Safe(text) => write!(line, "\"{text}\""),
                    Value::Address(address) => write!(line, "\"{address}\""),
                    Value::Number(number) => write!(line, "{number}"),
                };
            }
            line.push_str("}\n");
            line
        })
    }

    /// The fields of the contract, in its order.
    fn with_fields(&self, plain_sessions: bool, write: impl FnOnce(&[(&str, Value<'_>)]) -> String) -> String {
        let time = timestamp(self.time);
        let mut run_id = [0; 36];
        if let Some(run) = self.run {
            run.write(&mut run_id);
        }
        let hash = self.session.filter(|_| !plain_sessions).map(hash_session);
        let session = match (&hash, self.session) {
            (Some(hash), _) => Value::Safe(ascii(hash)),
            (None, plain) => text_or_absent(plain),
        };
        write(&[
            ("time", Value::Safe(ascii(&time))),
            ("client", self.client.map_or(Value::Absent, Value::Address)),
            ("method", text_or_absent(self.method)),
            ("path", text_or_absent(self.path)),
            ("status", if self.status == 0 { Value::Absent } else { Value::Number(u64::from(self.status)) }),
            ("code", self.code.map_or(Value::Absent, |code| Value::Safe(code.as_str()))),
            ("outcome", text_or_absent(self.outcome)),
            ("service", text_or_absent(self.service)),
            ("version", text_or_absent(self.version)),
            ("endpoint", text_or_absent(self.endpoint)),
            ("affinity", Value::Text(self.affinity)),
            ("session", session),
            ("run", self.run.map_or(Value::Absent, |_| Value::Safe(ascii(&run_id)))),
            ("queue_ms", milliseconds(self.queue)),
            ("first_event_ms", milliseconds(self.first_event)),
            ("events", Value::Number(self.events)),
            ("bytes_in", Value::Number(self.bytes_in)),
            ("bytes_out", Value::Number(self.bytes_out)),
            ("duration_ms", milliseconds(Some(self.duration))),
        ])
    }
}

/// How a session's key is shown to those who may not see it: the first 16 hex digits of its SHA-256.
pub fn hash_session(key: &str) -> [u8; 16] {
    let digest = Sha256::digest(key.as_bytes());
    let mut hex = [0; 16];
    for (pair, byte) in hex.chunks_exact_mut(2).zip(digest.iter()) {
        pair[0] = HEX[usize::from(byte >> 4)];
        pair[1] = HEX[usize::from(byte & 15)];
    }
    hex
}

/// RFC 3339 in UTC with milliseconds: `2026-11-23T07:58:34.120Z`. Years beyond 9999 and before 1970 are clamped.
pub fn timestamp(time: SystemTime) -> [u8; 24] {
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since_epoch.as_secs().min(LAST_SECOND);
    let (year, month, day) = civil_date(seconds / 86_400);
    let second_of_day = seconds % 86_400;
    let mut text = *b"0000-00-00T00:00:00.000Z";
    for (value, range) in [
        (year, 0..4),
        (month, 5..7),
        (day, 8..10),
        (second_of_day / 3600, 11..13),
        (second_of_day / 60 % 60, 14..16),
        (second_of_day % 60, 17..19),
        (u64::from(since_epoch.subsec_millis()), 20..23),
    ] {
        let mut rest = value;
        for digit in text[range].iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
    }
    text
}

/// Year, month and day of a day since 1970-01-01 in the Gregorian calendar. Counts in eras of 400 years that begin in
/// March, so that the leap day is the last of its year (Howard Hinnant's `civil_from_days`).
fn civil_date(days_since_epoch: u64) -> (u64, u64, u64) {
    let days = days_since_epoch + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

fn text_or_absent(value: Option<&str>) -> Value<'_> {
    value.map_or(Value::Absent, Value::Text)
}

fn milliseconds(duration: Option<Duration>) -> Value<'static> {
    duration.map_or(Value::Absent, |duration| Value::Number(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
}

/// Of bytes that this module made.
fn ascii(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap_or_default()
}

/// Writes one plain word as it is, anything else in quotes, so that no value can forge a field, a line or what a
/// terminal shows.
fn escape_text(value: &str, line: &mut String) -> std::fmt::Result {
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\' | b'=');
    if !value.is_empty() && value != "-" && value.bytes().all(plain) {
        return line.write_str(value);
    }
    escape_quoted(value, line, |line, character| write!(line, "\\u{{{character:x}}}"))
}

/// RFC 8259 section 7, and beyond it what [`misleading`] finds.
fn escape_json(value: &str, line: &mut String) -> std::fmt::Result {
    // All of these are below U+10000, so one escape is enough.
    escape_quoted(value, line, |line, character| write!(line, "\\u{character:04x}"))
}

/// Writes a value in quotes; `by_number` writes what has no escape of its own.
fn escape_quoted(
    value: &str,
    line: &mut String,
    by_number: impl Fn(&mut String, u32) -> std::fmt::Result,
) -> std::fmt::Result {
    line.push('"');
    for character in value.chars() {
        match character {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            other if other.is_control() || misleading(other) => by_number(line, u32::from(other))?,
            other => line.push(other),
        }
    }
    line.push('"');
    Ok(())
}

/// Not a control character, yet some programs end a line there, or it changes the direction of what follows.
fn misleading(character: char) -> bool {
    matches!(character, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// Of the year 9999.
const LAST_SECOND: u64 = 253_402_300_799;

/// Lines that wait for the writer before new ones are dropped.
const QUEUED_LINES_MAX: usize = 8192;

/// What the writer collects before it writes.
const BATCH_BYTES: usize = 64 << 10;

/// What a line is expected to need.
const LINE_BYTES: usize = 512;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn log(format: LogFormat, session_ids: SessionIds) -> Log {
        Log { level: LogLevel::Info, format, access: true, session_ids }
    }

    fn counter() -> IntCounter {
        IntCounter::new("dropped", "dropped").unwrap()
    }

    fn line<'a>() -> AccessLine<'a> {
        AccessLine {
            time: UNIX_EPOCH + Duration::from_millis(1_795_420_714_120),
            client: Some("192.0.2.7".parse().unwrap()),
            method: Some("POST"),
            path: Some("/support/runs"),
            status: 200,
            code: None,
            outcome: Some("completed"),
            service: Some("support"),
            version: Some("stable"),
            endpoint: Some("10.0.0.11:8000"),
            affinity: "hit",
            session: Some("thread-1"),
            run: RunId::parse("01936f5c-1d2e-7a3b-8c4d-5e6f70819203"),
            queue: None,
            first_event: Some(Duration::from_millis(41)),
            events: 12,
            bytes_in: 310,
            bytes_out: 2048,
            duration: Duration::from_secs(3),
        }
    }

    #[test]
    fn a_text_line_has_every_field_in_order() {
        assert_eq!(
            line().text(false),
            "time=2026-11-23T07:58:34.120Z client=192.0.2.7 method=POST path=/support/runs status=200 code=- \
             outcome=completed service=support version=stable endpoint=10.0.0.11:8000 affinity=hit \
             session=4b0a5fefc328e6b9 run=01936f5c-1d2e-7a3b-8c4d-5e6f70819203 queue_ms=- first_event_ms=41 events=12 \
             bytes_in=310 bytes_out=2048 duration_ms=3000\n"
        );
    }

    #[test]
    fn a_json_line_is_one_object_with_the_same_fields() {
        let json: serde_json::Value = serde_json::from_str(&line().json(true)).unwrap();
        assert_eq!(json["session"], "thread-1");
        assert_eq!(json["status"], 200);
        assert_eq!(json["code"], serde_json::Value::Null);
        assert_eq!(json["first_event_ms"], 41);
        let text = line().text(true);
        for field in text.trim_end().split(' ') {
            let name = field.split('=').next().unwrap();
            assert!(json.get(name).is_some(), "{name}");
        }
        assert_eq!(json.as_object().unwrap().len(), 19);
    }

    #[test]
    fn no_value_can_forge_a_field_or_a_line() {
        let hostile = "/a b\" status=500\r\nclient=evil \u{1b}[2J\u{7f}\u{85}\u{2028}\u{202e}\\";
        let line = AccessLine { path: Some(hostile), session: Some("-"), status: 0, ..line() };
        let text = line.text(true);
        assert_eq!(text.matches('\n').count(), 1);
        assert!(!text.trim_end().chars().any(|character| character.is_control() || misleading(character)), "{text:?}");
        assert!(text.contains(r#" path="/a b\" status=500\r\nclient=evil \u{1b}[2J\u{7f}\u{85}\u{2028}\u{202e}\\" "#));
        assert!(text.contains(" session=\"-\" "), "a dash is told from nothing: {text}");
        let json = line.json(true);
        assert_eq!(json.matches('\n').count(), 1);
        assert!(!json.trim_end().chars().any(|character| character.is_control() || misleading(character)));
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["path"], hostile);
        assert_eq!(json["status"], serde_json::Value::Null);
    }

    #[test]
    fn timestamps_know_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
            (LAST_SECOND, "9999-12-31T23:59:59.000Z"),
            (LAST_SECOND + 10, "9999-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(ascii(&timestamp(UNIX_EPOCH + Duration::from_secs(seconds))), expected);
        }
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_arrive_in_order_and_a_reload_changes_their_form() {
        let sink = Sink::default();
        let access_log = AccessLog::to(sink.clone(), &log(LogFormat::Text, SessionIds::Hashed), counter());
        for status in 200..220 {
            access_log.write(&AccessLine { status, ..line() });
        }
        access_log.configure(&log(LogFormat::Json, SessionIds::Plain));
        access_log.write(&line());
        access_log.configure(&Log { access: false, ..log(LogFormat::Json, SessionIds::Plain) });
        access_log.write(&line());
        access_log.flush(Duration::from_secs(10));
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 21);
        for (line, status) in lines.iter().zip(200..220) {
            assert!(line.contains(&format!(" status={status} ")) && line.contains(" session=4b0a5fefc328e6b9 "));
        }
        assert!(lines[20].starts_with('{') && lines[20].contains("\"session\":\"thread-1\""));
    }

    /// Takes nothing until the gate is opened.
    struct Stuck(Arc<Mutex<()>>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _open = self.0.lock().unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_is_stuck_costs_lines_not_memory_or_time() {
        let gate = Arc::new(Mutex::new(()));
        let dropped = counter();
        let access_log =
            AccessLog::to(Stuck(Arc::clone(&gate)), &log(LogFormat::Text, SessionIds::Hashed), dropped.clone());
        let closed = gate.lock().unwrap();
        // More than the queue and one batch can hold.
        for _ in 0..QUEUED_LINES_MAX + 1000 {
            access_log.write(&line());
        }
        assert!(dropped.get() > 0);
        drop(closed);
        access_log.flush(Duration::from_secs(10));
        let before = dropped.get();
        access_log.write(&line());
        assert_eq!(dropped.get(), before, "there is room again");
    }

    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_closed_stdout_ends_the_log_and_nothing_else() {
        let dropped = counter();
        let access_log = AccessLog::to(Broken, &log(LogFormat::Text, SessionIds::Hashed), dropped.clone());
        access_log.write(&line());
        access_log.flush(Duration::from_secs(10));
        for _ in 0..QUEUED_LINES_MAX * 2 {
            access_log.write(&line());
        }
        assert_eq!(dropped.get(), 0);
        assert!(access_log.shared.closed.load(Ordering::Relaxed));
    }

    #[test]
    fn diagnostics_take_over_level_and_format() {
        let (layer, handle) = reload::Layer::new(layer(&log(LogFormat::Text, SessionIds::Hashed)));
        let diagnostics = Diagnostics { handle };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            assert!(tracing::enabled!(target: "longhaul", tracing::Level::INFO));
            assert!(!tracing::enabled!(target: "longhaul", tracing::Level::DEBUG));
            let debug = Log { level: LogLevel::Debug, ..log(LogFormat::Json, SessionIds::Hashed) };
            diagnostics.configure(&debug);
            assert!(tracing::enabled!(target: "longhaul::state", tracing::Level::DEBUG));
            assert!(!tracing::enabled!(target: "h2", tracing::Level::DEBUG));
        });
    }
}
