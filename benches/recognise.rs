//! Recognise: what it costs to tell what a request is, and whether an event of its answer is of interest.
//!
//! Below 2 microseconds a request and 0.2 a stream event.

use divan::{Bencher, black_box};
use http::Method;
use longhaul::json::Extractor;
use longhaul::message::Fields;
use longhaul::protocols::{Fact, Look, Plan, Protocol, Recognised, Request, Watch, by_name};
use longhaul::sse::Event;

fn main() {
    divan::main();
}

struct Asked {
    method: Method,
    path: &'static str,
    fields: Fields,
    body: &'static [u8],
}

impl Asked {
    fn new(method: Method, path: &'static str, extra: Option<(&str, &str)>, body: &'static str) -> Asked {
        let mut fields = Fields::default();
        for (name, value) in [
            ("user-agent", "python-httpx/0.28.1"),
            ("accept", "text/event-stream"),
            ("accept-encoding", "gzip, deflate"),
            ("authorization", "Bearer 0123456789abcdef0123456789abcdef0123456789abcdef"),
            ("content-type", "application/json"),
            ("cookie", "theme=dark; csrf=0123456789abcdef"),
            ("x-request-id", "5f0c1d7e-0000-7000-8000-000000000001"),
        ]
        .into_iter()
        .chain(extra)
        {
            fields.append(name, value.as_bytes());
        }
        Asked { method, path, fields, body: body.as_bytes() }
    }

    /// As the proxy does it, under `auto`: head, then what is wanted of the body.
    fn recognise(&self) -> Option<Recognised> {
        let request =
            Request { method: &self.method, path: self.path, query: None, fields: &self.fields, upgrade: None };
        let plan = Plan::new(None, &request);
        let values = plan.wants(&request).filter(|_| !self.body.is_empty()).map(|pointers| {
            let mut values = Extractor::read(pointers, self.body);
            values.finish();
            values
        });
        plan.recognise(&request, values.as_ref())
    }
}

fn request(bencher: Bencher<'_, '_>, name: Option<&str>, asked: Asked) {
    let found = asked.recognise().and_then(|recognised| recognised.protocol).map(Protocol::name);
    assert_eq!(found, name, "it is recognised");
    bencher.bench_local(|| black_box(&asked).recognise().is_some());
}

const RUN: &str = r#"{"assistant_id":"agent","input":{"messages":[{"role":"user","content":"What is the weather in Paris, and will it rain tomorrow?"}]},"config":{"configurable":{"user":"u-1"}},"stream_mode":["values","messages"],"stream_resumable":true,"multitask_strategy":"enqueue"}"#;
const MESSAGE: &str = r#"{"jsonrpc":"2.0","id":"5f0c1d7e","method":"message/stream","params":{"message":{"kind":"message","role":"user","messageId":"5f0c1d7e","contextId":"5f0c1d7e-0000-7000-8000-000000000001","parts":[{"kind":"text","text":"What is the weather in Paris, and will it rain tomorrow?"}]}}}"#;
const ORDER: &str = r#"{"customer":{"id":17,"name":"A. Person"},"items":[{"sku":"a-1","count":2},{"sku":"b-2","count":1}],"note":"Please ring twice, and leave it with the neighbour if nobody is in."}"#;

#[divan::bench]
fn request_langgraph(bencher: Bencher<'_, '_>) {
    let path = "/threads/5f0c1d7e-0000-7000-8000-000000000001/runs/stream";
    request(bencher, Some("langgraph"), Asked::new(Method::POST, path, None, RUN));
}

#[divan::bench]
fn request_langgraph_poll(bencher: Bencher<'_, '_>) {
    let path = "/threads/5f0c1d7e-0000-7000-8000-000000000001/runs/5f0c1d7e-0000-7000-8000-000000000002";
    request(bencher, Some("langgraph"), Asked::new(Method::GET, path, None, ""));
}

#[divan::bench]
fn request_a2a_by_header(bencher: Bencher<'_, '_>) {
    request(bencher, Some("a2a"), Asked::new(Method::POST, "/agent", Some(("a2a-version", "0.3")), MESSAGE));
}

#[divan::bench]
fn request_a2a_by_shape(bencher: Bencher<'_, '_>) {
    request(bencher, Some("a2a"), Asked::new(Method::POST, "/agent", None, MESSAGE));
}

/// Only the body tells that it is nobody's.
#[divan::bench]
fn request_plain_post(bencher: Bencher<'_, '_>) {
    request(bencher, None, Asked::new(Method::POST, "/shop/orders", None, ORDER));
}

#[divan::bench]
fn request_plain_get(bencher: Bencher<'_, '_>) {
    request(bencher, None, Asked::new(Method::GET, "/shop/orders/17", None, ""));
}

/// Of a stream whose run is known already.
fn event(bencher: Bencher<'_, '_>, protocol: &str, first: &[u8], name: &[u8], data: &[u8], tells: bool) {
    let (path, body) = match protocol {
        "langgraph" => ("/threads/5f0c1d7e-0000-7000-8000-000000000001/runs/stream", RUN),
        _ => ("/agent", MESSAGE),
    };
    let mut watch: Box<dyn Watch> = Asked::new(Method::POST, path, None, body)
        .recognise()
        .filter(|recognised| recognised.protocol.map(Protocol::name) == by_name(protocol).map(Protocol::name))
        .and_then(|recognised| recognised.watch)
        .expect("it is recognised");
    let mut fields = Fields::default();
    fields.append("content-type", b"text/event-stream");
    let mut facts: Vec<Fact> = Vec::with_capacity(8);
    assert!(matches!(watch.head(200, &fields, &mut facts), Look::Events), "its events are read");
    watch.event(Event { name: b"metadata", data: first, cut: false }, &mut facts);
    assert!(!facts.is_empty(), "the run is told");
    facts.clear();
    watch.event(Event { name, data, cut: false }, &mut facts);
    assert_eq!(!facts.is_empty(), tells, "whether it tells something");
    bencher.bench_local(|| {
        facts.clear();
        watch.event(black_box(Event { name, data, cut: false }), &mut facts);
        facts.len()
    });
}

const METADATA: &[u8] = br#"{"run_id":"5f0c1d7e-0000-7000-8000-000000000002","attempt":1}"#;
const TASK: &[u8] =
    br#"{"id":"1","jsonrpc":"2.0","result":{"kind":"task","id":"t","contextId":"c","status":{"state":"submitted"}}}"#;

#[divan::bench]
fn event_langgraph_values(bencher: Bencher<'_, '_>) {
    event(bencher, "langgraph", METADATA, b"values", RUN.as_bytes(), false);
}

#[divan::bench]
fn event_langgraph_error(bencher: Bencher<'_, '_>) {
    event(bencher, "langgraph", METADATA, b"error", br#"{"error":"ValueError","message":"boom"}"#, true);
}

#[divan::bench]
fn event_a2a_artifact(bencher: Bencher<'_, '_>) {
    let data = br#"{"id":"1","jsonrpc":"2.0","result":{"kind":"artifact-update","taskId":"t","contextId":"c","append":true,"artifact":{"artifactId":"5f0c1d7e","parts":[{"kind":"text","text":"Tomorrow it will rain in the afternoon, with some wind from the west. "}]}}}"#;
    event(bencher, "a2a", TASK, b"", data, false);
}

#[divan::bench]
fn event_a2a_working(bencher: Bencher<'_, '_>) {
    let data = br#"{"id":"1","jsonrpc":"2.0","result":{"kind":"status-update","taskId":"t","contextId":"c","final":false,"status":{"state":"working","timestamp":"2026-11-23T03:00:00Z"}}}"#;
    event(bencher, "a2a", TASK, b"", data, false);
}

/// Once a run.
#[divan::bench]
fn event_a2a_completed(bencher: Bencher<'_, '_>) {
    let data = br#"{"id":"1","jsonrpc":"2.0","result":{"kind":"status-update","taskId":"t","contextId":"c","final":true,"status":{"state":"completed","timestamp":"2026-11-23T03:00:00Z"}}}"#;
    event(bencher, "a2a", TASK, b"", data, true);
}
