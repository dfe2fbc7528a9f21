//! Targets: what must hold for any bytes. Run by the fuzzer, and over the committed corpus by `tests/corpus.rs`.
//!
//! The first byte of `chunks`, `sse`, `websocket`, `json` and `answer` says into what pieces the rest is cut.

use longhaul::config::JsonPointer;
use longhaul::error::{Code, ProxyError};
use longhaul::http1::chunks::{Chunks, FramingError, HEADROOM, Piece};
use longhaul::http1::{
    HeadLimits, head_end, normalise_target, read_request, read_response, valid_authority, write_request,
    write_response, write_trailers,
};
use longhaul::json::{Extractor, Progress};
use longhaul::message::{Fields, Version};
use longhaul::protocols::a2a::rewrite_card;
use longhaul::protocols::{ALL, Cancel, Fact, From, KEY_BYTES_MAX, Look, Plan, Protocol, Recognised, Request, RunRef};
use longhaul::sse::{Reader, Scanner};
use longhaul::websocket;

const LIMITS: HeadLimits = HeadLimits { max_bytes: 4096, max_fields: 32 };

/// Our own form of a head may be a little longer than what was sent.
const WIDE: HeadLimits = HeadLimits { max_bytes: 16384, max_fields: 64 };

const TRAILER_BYTES_MAX: u32 = 1024;

/// Our own form of trailers may be a little longer, too.
const TRAILER_BYTES_WIDE: u32 = 2048;

/// A head is found wherever it is cut; what is read from it, written and read again, is the same.
pub fn head(data: &[u8]) {
    let whole = head_end(data, &mut 0, LIMITS);
    let mut scanned = 0;
    let stepwise = (0..=data.len())
        .map(|length| head_end(&data[..length], &mut scanned, LIMITS))
        .find(|found| !matches!(found, Ok(None)))
        .unwrap_or(Ok(None));
    assert_eq!(stepwise, whole);

    // Also what `head_end` would refuse must not get through.
    let head = match whole {
        Ok(Some(end)) => &data[..end],
        _ => data,
    };
    request_comes_back(head, whole.is_err());
    for method in [http::Method::GET, http::Method::HEAD] {
        response_comes_back(head, &method, whole.is_err());
    }
}

fn request_comes_back(bytes: &[u8], refused_before: bool) {
    let Ok(mut head) = read_request(bytes, LIMITS) else { return };
    assert!(!refused_before);
    if head.authority.is_empty() {
        head.authority = "localhost".to_owned();
    }
    let mut written = Vec::new();
    write_request(&mut written, &head, head.authority.as_bytes());
    assert_eq!(head_end(&written, &mut 0, WIDE), Ok(Some(written.len())));
    let again = read_request(&written, WIDE).expect("our own form is valid");
    // These are the client's connection's, and not passed on.
    head.version = Version::Http11;
    head.keep_alive = true;
    assert_eq!(again, head);
}

fn response_comes_back(bytes: &[u8], method: &http::Method, refused_before: bool) {
    let Ok(mut head) = read_response(bytes, LIMITS, method) else { return };
    assert!(!refused_before);
    let mut written = Vec::new();
    write_response(&mut written, &head, !head.keep_alive);
    assert_eq!(head_end(&written, &mut 0, WIDE), Ok(Some(written.len())));
    let mut again = read_response(&written, WIDE, method).expect("our own form is valid");
    head.version = Version::Http11;
    if head.status.is_informational() {
        // An interim answer never closes.
        again.keep_alive = head.keep_alive;
    }
    assert_eq!(again, head);
}

/// However a body is cut, both ways of reading it agree, and what goes on is canonical and means the same.
pub fn chunks(data: &[u8]) {
    let Some((&size, body)) = data.split_first() else { return };
    let piece = usize::from(size).max(1);
    let whole = passed(body, body.len().max(1), TRAILER_BYTES_MAX);
    let cut = passed(body, piece, TRAILER_BYTES_MAX);
    assert_eq!(cut, whole);
    let read = read(body, piece);
    assert_eq!(read.as_ref().map(|body| &body.payload), whole.as_ref().map(|body| &body.payload));
    assert_eq!(read.as_ref().map(|body| &body.trailers), whole.as_ref().map(|body| &body.trailers));
    assert_eq!(read.as_ref().map(|body| body.consumed), whole.as_ref().map(|body| body.consumed));

    let Ok(whole) = whole else { return };
    if !whole.ended {
        return;
    }
    let mut output = whole.forwarded.clone();
    if let Some(trailers) = &whole.trailers {
        write_trailers(&mut output, trailers);
    }
    let again = passed(&output, piece, TRAILER_BYTES_WIDE).expect("our own form is valid");
    assert!(again.ended);
    assert_eq!(again.payload, whole.payload);
    assert_eq!(again.forwarded.len() == output.len(), again.trailers.is_none());
}

#[derive(Debug, Default, PartialEq)]
struct Body {
    payload: Vec<u8>,
    forwarded: Vec<u8>,
    trailers: Option<Fields>,
    consumed: usize,
    ended: bool,
}

fn passed(input: &[u8], piece: usize, trailer_bytes_max: u32) -> Result<Body, FramingError> {
    let mut chunks = Chunks::new(trailer_bytes_max);
    let mut body = Body::default();
    for part in input.chunks(piece) {
        let mut buffer = vec![0; HEADROOM];
        buffer.extend_from_slice(part);
        let end = buffer.len();
        let pass = chunks.pass(&mut buffer, HEADROOM, end, |data| body.payload.extend_from_slice(data))?;
        body.forwarded.extend_from_slice(&buffer[pass.forward]);
        body.consumed += pass.consumed - HEADROOM;
        if pass.ended {
            body.ended = true;
            body.trailers = chunks.take_trailers();
            break;
        }
    }
    Ok(body)
}

fn read(input: &[u8], piece: usize) -> Result<Body, FramingError> {
    let mut chunks = Chunks::new(TRAILER_BYTES_MAX);
    let mut body = Body::default();
    for mut part in input.chunks(piece) {
        while !body.ended {
            let length = match chunks.next(part)? {
                Piece::NeedMore => break,
                Piece::Framing { length, .. } => length,
                Piece::Data { length } => {
                    body.payload.extend_from_slice(&part[..length]);
                    length
                }
                Piece::End { length } => {
                    body.ended = true;
                    body.trailers = chunks.take_trailers();
                    length
                }
            };
            body.consumed += length;
            part = &part[length..];
        }
    }
    Ok(body)
}

/// A normalised path is plain, and stays as it is when normalised again.
pub fn target(data: &[u8]) {
    valid_authority(data);
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok((path, query)) = normalise_target(text) else { return };
    assert!(path.starts_with('/') && path.len() <= 3 * text.len());
    assert!(path.split('/').all(|segment| segment != "." && segment != ".."));
    assert!(path.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#\\<>`".contains(&byte)));
    assert_eq!(query.as_deref(), text.split_once('?').map(|(_, query)| query));
    assert_eq!(normalise_target(&path), Ok((path.clone(), None)));
}

/// Events are counted the same however the stream is cut.
pub fn sse(data: &[u8]) {
    let Some((&size, stream)) = data.split_first() else { return };
    let mut whole = Scanner::default();
    let events = whole.feed(stream);
    let mut cut = Scanner::default();
    assert_eq!(stream.chunks(usize::from(size).max(1)).map(|piece| cut.feed(piece)).sum::<u32>(), events);
    assert_eq!(cut.between_events(), whole.between_events());
    assert!(events as usize <= stream.len() / 2);
}

/// Messages are the same however the direction is cut, and bounded, whatever compression was agreed on.
pub fn websocket(data: &[u8]) {
    let Some((&size, stream)) = data.split_first() else { return };
    for extensions in [
        "",
        "permessage-deflate",
        "permessage-deflate; server_max_window_bits=9",
        "permessage-deflate; server_no_context_takeover",
    ] {
        let mut answer = Fields::default();
        answer.append("sec-websocket-extensions", extensions.as_bytes());
        let read = |piece: usize| {
            let mut reader = websocket::Reader::as_agreed(&answer);
            let mut told = Vec::new();
            for part in stream.chunks(piece) {
                reader.feed(part, |message| told.push((message.text.to_vec(), message.cut)));
            }
            (told, reader.is_blind())
        };
        let whole = read(stream.len().max(1));
        assert_eq!(read(usize::from(size).max(1)), whole);
        for (text, cut) in &whole.0 {
            assert!(text.len() <= websocket::MESSAGE_BYTES_MAX);
            assert!(!cut || text.len() == websocket::MESSAGE_BYTES_MAX);
        }
        if extensions.is_empty() {
            assert!(whole.0.iter().map(|(text, _)| text.len()).sum::<usize>() <= stream.len());
        }
    }
}

/// Values are the same however the document is cut; what serde can read does not fail.
pub fn json(data: &[u8]) {
    let Some((&size, document)) = data.split_first() else { return };
    let whole = extracted(document, document.len().max(1));
    assert_eq!(extracted(document, usize::from(size).max(1)), whole);
    let may_be_deep = document.iter().filter(|byte| matches!(byte, b'[' | b'{')).count() > 64;
    if whole.0 == Progress::Failed && !may_be_deep {
        assert!(serde_json::from_slice::<serde_json::Value>(document).is_err());
    }
}

fn extracted(document: &[u8], piece: usize) -> (Progress, Vec<Option<String>>) {
    let pointers = [&["a"][..], &["a", "b"], &["0"], &["thread_id"], &["messages", "1", "id"], &[]]
        .map(|tokens| JsonPointer(tokens.iter().map(|&token| token.to_owned()).collect()));
    let mut extractor = Extractor::new(&pointers);
    for part in document.chunks(piece) {
        extractor.feed(part);
    }
    let progress = extractor.finish();
    (progress, (0..pointers.len()).map(|index| extractor.value(index).map(str::to_owned)).collect())
}

/// Keys of sessions and runs are bounded, and every call about a run can be sent. The request is text: `POST /path?query`, then
/// fields, an empty line and the body.
pub fn request(data: &[u8]) {
    let Some(asked) = Asked::read(data) else { return };
    for protocol in protocols() {
        let Some(recognised) = asked.recognise(protocol) else { continue };
        let by = recognised.protocol.expect("whoever recognises says so");
        assert!(protocol.is_none_or(|protocol| protocol.name() == by.name()));
        recognised.session.iter().for_each(|key| bounded(key));
        assert!(recognised.base.len() <= 2 * KEY_BYTES_MAX);
        if let Some(run) = &recognised.run {
            calls_are_valid(by, &recognised.base, run);
        }
        let error = ProxyError::new(Code::NoEndpoint, "No endpoint is ready.");
        if let Some(body) = by.error_body(&error, recognised.rpc_id.as_deref()) {
            assert!(serde_json::from_slice::<serde_json::Value>(&body).is_ok());
        }
        by.judge(&RunRef { base: &recognised.base, key: "a/b" }, 200, &asked.body);
        by.load(&asked.body);
    }
    rewrite_card(&asked.body, "http://10.0.0.1:9000", "https://agents.example.com");
}

/// What an answer tells is bounded, and the same however its body is cut. The first byte says into what pieces; then a
/// request as for `request`, a line `==`, and the answer: `200`, fields, an empty line and the body.
pub fn answer(data: &[u8]) {
    const LINE: &[u8] = b"\n==\n";
    let Some((&size, exchange)) = data.split_first() else { return };
    let Some(at) = exchange.windows(LINE.len()).position(|window| window == LINE) else { return };
    let Some(asked) = Asked::read(&exchange[..at]) else { return };
    let (head, body) = split_head(&exchange[at + LINE.len()..]);
    let mut lines = head.lines();
    let Some(status) = lines.next().and_then(|line| line.parse::<u16>().ok()) else { return };
    let head = fields(lines);
    for protocol in protocols() {
        let Some(whole) = asked.recognise(protocol) else { continue };
        let Some(cut) = asked.recognise(protocol) else { panic!("it was recognised a moment ago") };
        let (by, base) = (whole.protocol.expect("whoever recognises says so"), whole.base.clone());
        let Some(facts) = told(whole, status, &head, body, body.len().max(1)) else { continue };
        assert_eq!(told(cut, status, &head, body, usize::from(size).max(1)), Some(facts.clone()));
        for fact in &facts {
            match fact {
                Fact::Session(key) => bounded(key),
                Fact::Run(run) | Fact::RunStarted(run) | Fact::RunEnded(run, _) | Fact::RunAlive(run) => {
                    calls_are_valid(by, &base, run);
                }
                _ => {}
            }
        }
    }
}

/// Auto, and everyone who could be configured.
fn protocols() -> impl Iterator<Item = Option<&'static dyn Protocol>> {
    std::iter::once(None).chain(ALL.iter().copied().map(Some))
}

struct Asked {
    method: http::Method,
    path: String,
    query: Option<String>,
    fields: Fields,
    upgrade: Option<String>,
    body: Vec<u8>,
}

impl Asked {
    fn read(data: &[u8]) -> Option<Asked> {
        let (head, body) = split_head(data);
        let mut lines = head.lines();
        let (method, target) = lines.next()?.split_once(' ')?;
        let (path, query) = normalise_target(target).ok()?;
        let mut fields = fields(lines);
        let upgrade = fields.get("upgrade").map(|value| String::from_utf8_lossy(value).into_owned());
        fields.remove("upgrade");
        Some(Asked { method: method.parse().ok()?, path, query, fields, upgrade, body: body.to_vec() })
    }

    fn recognise(&self, protocol: Option<&'static dyn Protocol>) -> Option<Recognised> {
        let request = Request {
            method: &self.method,
            path: &self.path,
            query: self.query.as_deref(),
            fields: &self.fields,
            upgrade: self.upgrade.as_deref(),
        };
        let plan = Plan::new(protocol, &request);
        let values = plan.wants(&request).map(|pointers| {
            let mut extractor = Extractor::read(pointers, &self.body);
            extractor.finish();
            extractor
        });
        plan.recognise(&request, values.as_ref().filter(|_| !self.body.is_empty()))
    }
}

fn split_head(data: &[u8]) -> (String, &[u8]) {
    let end = data.windows(2).position(|window| window == b"\n\n");
    let (head, body) = end.map_or((data, &b""[..]), |end| (&data[..end], &data[end + 2..]));
    (String::from_utf8_lossy(head).into_owned(), body)
}

fn fields<'a>(lines: impl Iterator<Item = &'a str>) -> Fields {
    let mut fields = Fields::default();
    for (name, value) in lines.filter_map(|line| line.split_once(": ")) {
        fields.append(name, value.as_bytes());
    }
    fields
}

/// Everything that an answer tells; `None`: it is of no interest.
fn told(mut recognised: Recognised, status: u16, head: &Fields, body: &[u8], piece: usize) -> Option<Vec<Fact>> {
    /// Of one head, event or message.
    const FACTS_MAX: usize = 8;
    /// Of a whole body: a batch of runs.
    const FACTS_OF_BODY_MAX: usize = 128;
    let watch = recognised.watch.as_mut()?;
    let mut facts = Vec::new();
    let look = watch.head(status, head, &mut facts);
    assert!(facts.len() <= FACTS_MAX);
    match look {
        Look::Nothing => {}
        Look::Json(pointers) => {
            let mut extractor = Extractor::of(pointers.clone());
            body.chunks(piece).for_each(|part| {
                extractor.feed(part);
            });
            extractor.finish();
            watch.body(&extractor, &mut facts);
            assert!(facts.len() <= FACTS_OF_BODY_MAX);
        }
        Look::Events => {
            let mut reader = Reader::default();
            for part in body.chunks(piece) {
                reader.feed(part, |event| {
                    let before = facts.len();
                    watch.event(event, &mut facts);
                    assert!(facts.len() - before <= FACTS_MAX);
                });
            }
        }
        Look::Messages => {
            for line in body.split(|byte| *byte == b'\n') {
                let before = facts.len();
                match line.strip_prefix(b"> ") {
                    Some(text) => watch.message(From::Client, text, &mut facts),
                    None => watch.message(From::Endpoint, line, &mut facts),
                }
                assert!(facts.len() - before <= FACTS_MAX);
            }
        }
    }
    let before = facts.len();
    watch.end(&mut facts);
    assert!(facts.len() - before <= FACTS_MAX);
    Some(facts)
}

fn bounded(key: &str) {
    assert!(!key.is_empty() && key.len() <= KEY_BYTES_MAX);
}

/// What is made of a run's key, which an endpoint or a client chose, can't be anything but one request.
fn calls_are_valid(protocol: &dyn Protocol, base: &str, key: &str) {
    bounded(key);
    let run = RunRef { base, key };
    let calls = [
        protocol.status_call(&run),
        protocol.cancel_call(&run, Cancel::Interrupt),
        protocol.cancel_call(&run, Cancel::Rollback),
    ];
    for call in calls.into_iter().flatten() {
        assert!(call.target.starts_with('/'), "{}", call.target);
        assert!(call.target.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#'), "{}", call.target);
        for (name, value) in &call.fields {
            assert!(http::HeaderName::from_lowercase(name.as_bytes()).is_ok(), "{name}");
            assert!(http::HeaderValue::from_str(value).is_ok(), "{value}");
        }
        assert!(call.body.is_empty() || serde_json::from_slice::<serde_json::Value>(&call.body).is_ok());
    }
}
