//! Nanoseconds of the codec and the scanners: what every exchange, chunk and event pays.

use divan::{Bencher, black_box};
use http::Method;
use longhaul::config::JsonPointer;
use longhaul::http1::chunks::{Chunks, HEADROOM};
use longhaul::http1::{HeadLimits, head_end, read_request, read_response, write_request, write_response};
use longhaul::json::Extractor;
use longhaul::sse::Scanner;

const LIMITS: HeadLimits = HeadLimits { max_bytes: 65536, max_fields: 128 };

const REQUEST: &[u8] = b"POST /v1/threads/5f0c/runs/stream?mode=values HTTP/1.1\r\n\
    Host: agents.example.com\r\n\
    User-Agent: python-httpx/0.28.1\r\n\
    Accept: text/event-stream\r\n\
    Accept-Encoding: gzip, deflate\r\n\
    Connection: keep-alive\r\n\
    Authorization: Bearer 0123456789abcdef0123456789abcdef0123456789abcdef\r\n\
    Content-Type: application/json\r\n\
    traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n\
    Content-Length: 512\r\n\r\n";

const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\n\
    Date: Mon, 02 Nov 2026 10:00:00 GMT\r\n\
    Server: uvicorn\r\n\
    Cache-Control: no-store\r\n\
    Content-Type: text/event-stream; charset=utf-8\r\n\
    x-request-id: 7c0d0f3e-0000-7000-8000-000000000000\r\n\
    Transfer-Encoding: chunked\r\n\r\n";

fn main() {
    divan::main();
}

#[divan::bench]
fn head_read_request(bencher: Bencher) {
    bencher.bench(|| {
        let end = head_end(black_box(REQUEST), &mut 0, LIMITS).ok().flatten().expect("a whole head");
        read_request(&REQUEST[..end], LIMITS)
    });
}

#[divan::bench]
fn head_read_response(bencher: Bencher) {
    bencher.bench(|| {
        let end = head_end(black_box(RESPONSE), &mut 0, LIMITS).ok().flatten().expect("a whole head");
        read_response(&RESPONSE[..end], LIMITS, &Method::POST)
    });
}

#[divan::bench]
fn head_write_request(bencher: Bencher) {
    let head = read_request(REQUEST, LIMITS).expect("a valid head");
    let mut out = Vec::with_capacity(1024);
    bencher.bench_local(|| {
        out.clear();
        write_request(&mut out, black_box(&head), b"10.0.0.11:8000");
        out.len()
    });
}

#[divan::bench]
fn head_write_response(bencher: Bencher) {
    let head = read_response(RESPONSE, LIMITS, &Method::POST).expect("a valid head");
    let mut out = Vec::with_capacity(1024);
    bencher.bench_local(|| {
        out.clear();
        write_response(&mut out, black_box(&head), false);
        out.len()
    });
}

/// An event of `length` bytes, two of its bytes being its empty line's.
fn event(length: usize) -> Vec<u8> {
    let mut event = b"data: ".to_vec();
    event.resize(length - 2, b'x');
    event.extend_from_slice(b"\n\n");
    event
}

#[divan::bench(args = [200, 2000])]
fn chunks_pass_one_event(bencher: Bencher, length: usize) {
    let mut buffer = vec![0; HEADROOM];
    buffer.extend_from_slice(format!("{length:x}\r\n").as_bytes());
    buffer.extend_from_slice(&event(length));
    buffer.extend_from_slice(b"\r\n");
    let end = buffer.len();
    let mut chunks = Chunks::new(4096);
    bencher.bench_local(|| {
        let mut payload = 0;
        let pass = chunks.pass(black_box(&mut buffer), HEADROOM, end, |data| payload += data.len()).expect("canonical");
        (pass, payload)
    });
}

#[divan::bench(args = [200, 2000])]
fn sse_feed_one_event(bencher: Bencher, length: usize) {
    let event = event(length);
    let mut scanner = Scanner::default();
    bencher.bench_local(|| scanner.feed(black_box(&event)));
}

#[divan::bench]
fn json_feed_a_long_body(bencher: Bencher) {
    let message = format!(r#"{{"role":"user","content":"{}"}},"#, "lorem ipsum ".repeat(40)).repeat(16);
    let body = format!(r#"{{"messages":[{}],"thread_id":"5f0c"}}"#, message.trim_end_matches(','));
    let pointers = [JsonPointer(vec!["thread_id".to_owned()])];
    bencher.counter(divan::counter::BytesCount::of_str(&body)).bench(|| {
        let mut extractor = Extractor::new(&pointers);
        extractor.feed(black_box(body.as_bytes()))
    });
}

#[divan::bench]
fn json_feed_a_short_body(bencher: Bencher) {
    let body = br#"{"thread_id":"5f0c","input":{"messages":[{"role":"user","content":"hi"}]}}"#;
    let pointers = [JsonPointer(vec!["thread_id".to_owned()])];
    bencher.bench(|| {
        let mut extractor = Extractor::new(&pointers);
        extractor.feed(black_box(body))
    });
}
