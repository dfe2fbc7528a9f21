//! Targets: what must hold for any bytes. Run by the fuzzer, and over the committed corpus by `tests/corpus.rs`.
//!
//! The first byte of `chunks`, `sse` and `json` says into what pieces the rest is cut.

use longhaul::config::JsonPointer;
use longhaul::http1::chunks::{Chunks, FramingError, HEADROOM, Piece};
use longhaul::http1::{
    HeadLimits, head_end, normalise_target, read_request, read_response, valid_authority, write_request,
    write_response, write_trailers,
};
use longhaul::json::{Extractor, Progress};
use longhaul::message::{Fields, Version};
use longhaul::sse::Scanner;

const LIMITS: HeadLimits = HeadLimits { max_bytes: 4096, max_fields: 32 };

/// Our own form of a head may be a little longer than what was sent.
const WIDE: HeadLimits = HeadLimits { max_bytes: 16384, max_fields: 64 };

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
    let whole = passed(body, body.len().max(1));
    let cut = passed(body, piece);
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
    let again = passed(&output, piece).expect("our own form is valid");
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

fn passed(input: &[u8], piece: usize) -> Result<Body, FramingError> {
    let mut chunks = Chunks::new(1024);
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
    let mut chunks = Chunks::new(1024);
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
