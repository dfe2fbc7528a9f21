//! Identify: what finding the session key costs, by the place where it is.

use divan::{Bencher, black_box};
use http::HeaderName;
use longhaul::config::{JsonPointer, KeySource};
use longhaul::http1::{HeadLimits, read_request};
use longhaul::json::{Extractor, Progress};
use longhaul::message::RequestHead;
use longhaul::proxy::identify;

const LIMITS: HeadLimits = HeadLimits { max_bytes: 65536, max_fields: 128 };

const REQUEST: &[u8] =
    b"POST /threads/5f0c1d7e-0000-7000-8000-000000000001/runs/stream?mode=values&thread=5f0c1d7e HTTP/1.1\r\n\
    Host: agents.example.com\r\n\
    User-Agent: python-httpx/0.28.1\r\n\
    Accept: text/event-stream\r\n\
    Accept-Encoding: gzip, deflate\r\n\
    Authorization: Bearer 0123456789abcdef0123456789abcdef0123456789abcdef\r\n\
    Content-Type: application/json\r\n\
    Cookie: theme=dark; csrf=0123456789abcdef; session=5f0c1d7e-0000-7000-8000-000000000001\r\n\
    X-Session-Id: 5f0c1d7e-0000-7000-8000-000000000001\r\n\
    Content-Length: 512\r\n\r\n";

fn main() {
    divan::main();
}

fn request() -> RequestHead {
    read_request(REQUEST, LIMITS).expect("a valid head")
}

fn find(bencher: Bencher<'_, '_>, source: &KeySource) {
    let request = request();
    let view = identify::view(&request, None);
    assert!(identify::key_in_head(source, &view).is_some(), "the key is there");
    bencher.bench_local(|| identify::key_in_head(black_box(source), black_box(&view)));
}

#[divan::bench]
fn header(bencher: Bencher<'_, '_>) {
    find(bencher, &KeySource::Header(HeaderName::from_static("x-session-id")));
}

/// What a request pays for a place where no key is.
#[divan::bench]
fn header_missing(bencher: Bencher<'_, '_>) {
    let request = request();
    let view = identify::view(&request, None);
    let source = KeySource::Header(HeaderName::from_static("mcp-session-id"));
    assert!(identify::key_in_head(&source, &view).is_none(), "the key is not there");
    bencher.bench_local(|| identify::key_in_head(black_box(&source), black_box(&view)));
}

#[divan::bench]
fn cookie(bencher: Bencher<'_, '_>) {
    find(bencher, &KeySource::Cookie("session".to_owned()));
}

#[divan::bench]
fn query(bencher: Bencher<'_, '_>) {
    find(bencher, &KeySource::Query("thread".to_owned()));
}

#[divan::bench]
fn path(bencher: Bencher<'_, '_>) {
    find(bencher, &KeySource::Path("/threads/{session}/**".parse().expect("a valid pattern")));
}

/// The key behind so many bytes of the body.
#[divan::bench(args = [0, 1_000, 100_000])]
fn json(bencher: Bencher<'_, '_>, bytes_before: usize) {
    let body = format!(
        r#"{{"input":"{}","thread_id":"5f0c1d7e-0000-7000-8000-000000000001","stream":true}}"#,
        "lorem ipsum ".repeat(bytes_before / 12)
    );
    let pointers = [JsonPointer(vec!["thread_id".to_owned()])];
    bencher.bench_local(|| {
        let mut extractor = Extractor::new(&pointers);
        assert!(extractor.feed(black_box(body.as_bytes())) == Progress::Done, "the key is there");
        extractor.value(0).map(str::len)
    });
}
