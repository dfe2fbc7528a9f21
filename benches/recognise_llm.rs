//! Recognise: what it costs to tell an MCP or model API request's session and run, and to notice an event of its answer.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use flate2::{Compress, Compression, FlushCompress};
use http::Method;
use longhaul::json::Extractor;
use longhaul::message::Fields;
use longhaul::protocols::{Fact, From, Look, Plan, Recognised, Request, by_name};
use longhaul::sse::Event;
use longhaul::websocket::{INFLATED_BYTES_MAX, Reader};

fn main() {
    divan::main();
}

/// A request as a client sends it: path, fields of its own, body.
struct Sent {
    protocol: &'static str,
    path: &'static str,
    fields: &'static [(&'static str, &'static str)],
    body: &'static str,
}

const SENT: [Sent; 7] = [
    Sent {
        protocol: "mcp",
        path: "/mcp",
        fields: &[("mcp-protocol-version", "2025-11-25"), ("mcp-session-id", "5f0c1d7e00007000800000000000000a")],
        body: r#"{"method":"tools/call","params":{"name":"search","arguments":{"query":"how do I reset it","limit":5},"_meta":{"progressToken":7}},"jsonrpc":"2.0","id":7}"#,
    },
    // Of the version that has batches: more has to be looked for.
    Sent {
        protocol: "mcp",
        path: "/mcp",
        fields: &[("mcp-session-id", "5f0c1d7e00007000800000000000000a")],
        body: r#"{"method":"tools/call","params":{"name":"search","arguments":{"query":"how do I reset it","limit":5},"_meta":{"progressToken":7}},"jsonrpc":"2.0","id":7}"#,
    },
    Sent {
        protocol: "mcp",
        path: "/mcp",
        fields: &[("mcp-protocol-version", "2026-07-28"), ("mcp-method", "tools/call"), ("mcp-name", "search")],
        body: "{}",
    },
    Sent {
        protocol: "openai-responses",
        path: "/v1/responses",
        fields: &[],
        body: r#"{"model":"m","input":[{"role":"user","content":"how do I reset it"}],"previous_response_id":"resp_0123456789abcdef","stream":true,"background":false}"#,
    },
    Sent {
        protocol: "openai-chat",
        path: "/v1/chat/completions",
        fields: &[],
        body: r#"{"model":"m","messages":[{"role":"user","content":"how do I reset it"}],"stream":true}"#,
    },
    Sent {
        protocol: "ag-ui",
        path: "/agent",
        fields: &[],
        body: r#"{"threadId":"5f0c1d7e-0000-7000-8000-000000000001","runId":"5f0c1d7e-0000-7000-8000-000000000002","tools":[],"context":[],"forwardedProps":{},"state":{},"messages":[{"id":"1","role":"user","content":"hi"}]}"#,
    },
    Sent {
        protocol: "ai-sdk",
        path: "/api/chat",
        fields: &[],
        body: r#"{"id":"c0123456789abcde","messages":[{"id":"1","role":"user","parts":[{"type":"text","text":"hi"}]}],"trigger":"submit-message"}"#,
    },
];

fn fields(own: &[(&str, &str)]) -> Fields {
    let mut fields = Fields::default();
    let common = [
        ("user-agent", "python-httpx/0.28.1"),
        ("accept", "application/json, text/event-stream"),
        ("accept-encoding", "gzip, deflate"),
        ("authorization", "Bearer 0123456789abcdef0123456789abcdef0123456789abcdef"),
        ("content-type", "application/json"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ];
    for (name, value) in common.iter().chain(own) {
        fields.append(name, value.as_bytes());
    }
    fields
}

fn recognise(sent: &Sent, fields: &Fields, auto: bool) -> Option<Recognised> {
    let configured = if auto { None } else { by_name(sent.protocol) };
    let request = Request { method: &Method::POST, path: sent.path, query: None, fields, upgrade: None };
    let plan = Plan::new(configured, &request);
    let values = plan.wants(&request).map(|pointers| Extractor::read(pointers, sent.body.as_bytes()));
    plan.recognise(&request, values.as_ref())
}

#[divan::bench(args = 0..SENT.len())]
fn request_configured(bencher: Bencher<'_, '_>, index: usize) {
    request(bencher, &SENT[index], false);
}

#[divan::bench(args = 0..SENT.len())]
fn request_auto(bencher: Bencher<'_, '_>, index: usize) {
    request(bencher, &SENT[index], true);
}

fn request(bencher: Bencher<'_, '_>, sent: &Sent, auto: bool) {
    let fields = fields(sent.fields);
    let found = recognise(sent, &fields, auto).and_then(|recognised| recognised.protocol);
    assert_eq!(found.map(|protocol| protocol.name()), Some(sent.protocol));
    bencher.bench_local(|| recognise(black_box(sent), black_box(&fields), auto).is_some());
}

/// The events of which a stream is full: name, data.
const EVENTS: [(&str, &str); 7] = [
    (
        "message",
        r#"{"method":"notifications/progress","params":{"progressToken":7,"progress":3,"message":"looking"},"jsonrpc":"2.0"}"#,
    ),
    ("message", r#"{"method":"notifications/message","params":{"level":"info","data":"looking"},"jsonrpc":"2.0"}"#),
    ("message", r#"{"method":"notifications/message","params":{"level":"info","data":"looking"},"jsonrpc":"2.0"}"#),
    (
        "response.output_text.delta",
        r#"{"type":"response.output_text.delta","sequence_number":7,"item_id":"msg_0123456789","output_index":0,"content_index":0,"delta":" the"}"#,
    ),
    (
        "",
        r#"{"id":"chatcmpl-0123456789","object":"chat.completion.chunk","created":1700000000,"model":"m","choices":[{"index":0,"delta":{"content":" the"},"finish_reason":null}]}"#,
    ),
    ("", r#"{"type":"TEXT_MESSAGE_CONTENT","messageId":"5f0c1d7e-0000-7000-8000-000000000003","delta":" the"}"#),
    ("", r#"{"type":"text-delta","id":"0","delta":" the"}"#),
];

#[divan::bench(args = 0..EVENTS.len())]
fn event(bencher: Bencher<'_, '_>, index: usize) {
    let sent = &SENT[index];
    let fields = fields(sent.fields);
    let mut watch =
        recognise(sent, &fields, false).and_then(|recognised| recognised.watch).expect("a start is watched");
    let mut answer = Fields::default();
    answer.append("content-type", b"text/event-stream");
    let mut facts = Vec::new();
    assert!(matches!(watch.head(200, &answer, &mut facts), Look::Events));
    let (name, data) = EVENTS[index];
    let event = Event { name: name.as_bytes(), data: data.as_bytes(), cut: false };
    bencher.bench_local(|| watch.event(black_box(event), &mut facts));
    assert!(facts.is_empty(), "such an event tells nothing");
}

/// A frame of a WebSocket with such an event, from its bytes to the recogniser.
#[divan::bench]
fn websocket_message(bencher: Bencher<'_, '_>) {
    let fields = fields(&[]);
    let request = Request {
        method: &Method::GET,
        path: "/v1/responses",
        query: None,
        fields: &fields,
        upgrade: Some("websocket"),
    };
    let plan = Plan::new(None, &request);
    let mut watch = plan.recognise(&request, None).and_then(|recognised| recognised.watch).expect("it is watched");
    let data = EVENTS[3].1.as_bytes();
    let mut frame = vec![0x81, 126];
    frame.extend((data.len() as u16).to_be_bytes());
    frame.extend_from_slice(data);
    let mut reader = Reader::default();
    let mut facts: Vec<Fact> = Vec::new();
    bencher.bench_local(|| {
        reader.feed(black_box(&frame), |message| watch.message(From::Endpoint, message.text, &mut facts));
    });
    assert!(facts.is_empty() && !reader.is_blind());
}

/// A reader that has agreed on compression, and the frames of messages that say this.
fn compressed(texts: &[&[u8]]) -> (Reader, Vec<Vec<u8>>) {
    let mut answer = Fields::default();
    answer.append("sec-websocket-extensions", b"permessage-deflate");
    let mut compress = Compress::new(Compression::default(), false);
    let frames = texts.iter().map(|text| {
        let mut payload = Vec::with_capacity(text.len() + 1000);
        compress.compress_vec(text, &mut payload, FlushCompress::Sync).expect("it can be compressed");
        payload.truncate(payload.len() - 4);
        let length = match payload.len() {
            length @ 0..126 => vec![length as u8],
            length => [&[126][..], &(length as u16).to_be_bytes()].concat(),
        };
        [&[0xc1][..], &length, &payload].concat()
    });
    (Reader::as_agreed(&answer), frames.collect())
}

/// As above, compressed; it refers to those before it, as nearly all do.
#[divan::bench]
fn compressed_websocket_message(bencher: Bencher<'_, '_>) {
    let data = EVENTS[3].1.as_bytes();
    let (mut reader, frames) = compressed(&[data, data]);
    reader.feed(&frames[0], |_| ());
    bencher.bench_local(|| reader.feed(black_box(&frames[1]), |message| _ = black_box(message.text)));
    assert!(!reader.is_blind());
}

/// The most that a few bytes can become, in bytes of it.
#[divan::bench]
fn compressed_websocket_zeros(bencher: Bencher<'_, '_>) {
    let zeros = vec![0; INFLATED_BYTES_MAX];
    let (mut reader, frames) = compressed(&[&zeros]);
    let counted = bencher.counter(BytesCount::new(zeros.len()));
    counted.bench_local(|| reader.feed(black_box(&frames[0]), |message| _ = black_box(message.text)));
    assert!(!reader.is_blind());
}
