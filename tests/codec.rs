//! The HTTP/1.1 codec as a whole: heads survive being written and read, and hyper reads the same valid bytes alike.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http::{Method, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use longhaul::http1::chunks::{Chunks, HEADROOM, Piece};
use longhaul::http1::{
    HeadLimits, head_end, read_request, read_response, write_request, write_response, write_trailers,
};
use longhaul::message::{Fields, Framing, RequestHead, ResponseHead, Version};
use proptest::collection::vec;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LIMITS: HeadLimits = HeadLimits { max_bytes: 65536, max_fields: 128 };

fn fields() -> impl Strategy<Value = Fields> {
    let name = "[Xx]-[A-Za-z0-9!#$%&'*+.^_`|~-]{1,8}";
    let value = prop_oneof![
        Just(Vec::new()),
        "[!-~]{1,12}".prop_map(String::into_bytes),
        ("[!-~]", "[ \t!-~]{0,12}", "[!-~]")
            .prop_map(|(first, middle, last)| format!("{first}{middle}{last}").into_bytes()),
        vec(0x80..=0xffu8, 1..6),
    ];
    vec((name, value), 0..8).prop_map(|pairs| {
        let mut fields = Fields::default();
        for (name, value) in pairs {
            fields.append(&name, &value);
        }
        fields
    })
}

fn request() -> impl Strategy<Value = RequestHead> {
    let path = vec("[A-Za-z0-9._~!$&'()*+,;=:@-]{0,5}", 1..5).prop_map(|segments| {
        let plain: Vec<String> =
            segments.into_iter().map(|text| if text.starts_with('.') { "d".to_owned() } else { text }).collect();
        format!("/{}", plain.join("/"))
    });
    let framing = prop_oneof![Just(Framing::None), any::<u64>().prop_map(Framing::Length), Just(Framing::Chunked)];
    let upgrade = proptest::option::of("[a-z]{3,6}(/[0-9])?");
    (
        (
            "[A-Z]{3,7}",
            path,
            proptest::option::of("[A-Za-z0-9/?&=%._~|\\[\\]{}-]{0,12}"),
            "[a-z0-9.-]{1,10}(:[1-9][0-9]{0,3})?",
        ),
        (fields(), framing, upgrade, any::<bool>(), any::<bool>()),
    )
        .prop_map(
            |((method, path, query, authority), (fields, framing, upgrade, expect_continue, accepts_trailers))| {
                RequestHead {
                    method: Method::from_bytes(method.as_bytes()).expect("a token"),
                    path,
                    query,
                    authority,
                    version: Version::Http11,
                    fields,
                    framing,
                    keep_alive: true,
                    upgrade,
                    expect_continue,
                    accepts_trailers,
                }
            },
        )
        .prop_filter("not served", |head| head.method != Method::CONNECT && head.upgrade.as_deref() != Some("h2c"))
}

fn response() -> impl Strategy<Value = (ResponseHead, Method)> {
    let framing = prop_oneof![any::<u64>().prop_map(Framing::Length), Just(Framing::Chunked), Just(Framing::Eof)];
    let reason = proptest::option::of("[a-z]{1,8}( [a-z]{1,5})?".prop_map(String::into_bytes));
    let declared = proptest::option::of(any::<u64>());
    (100..600u16, reason, fields(), framing, declared, any::<bool>(), any::<bool>()).prop_map(
        |(status, reason, fields, framing, declared, keep_alive, to_head)| {
            let status = StatusCode::from_u16(status).expect("three digits");
            let never_has_length = status.is_informational() || status == StatusCode::NO_CONTENT;
            let has_no_body = never_has_length || status == StatusCode::NOT_MODIFIED || to_head;
            let framing = if has_no_body { Framing::None } else { framing };
            let is_switching = status == StatusCode::SWITCHING_PROTOCOLS;
            let keep_alive = (keep_alive || status.is_informational()) && framing != Framing::Eof && !is_switching;
            let head = ResponseHead {
                status,
                reason,
                version: Version::Http11,
                fields,
                framing,
                keep_alive,
                upgrade: is_switching.then(|| "websocket".to_owned()),
                declared_length: declared.filter(|_| has_no_body && !never_has_length),
            };
            (head, if to_head { Method::HEAD } else { Method::GET })
        },
    )
}

proptest! {
    #[test]
    fn a_request_head_survives_writing_and_reading(head in request()) {
        let mut bytes = Vec::new();
        write_request(&mut bytes, &head, head.authority.as_bytes());
        prop_assert_eq!(head_end(&bytes, &mut 0, LIMITS), Ok(Some(bytes.len())));
        prop_assert_eq!(read_request(&bytes, LIMITS), Ok(head));
    }

    #[test]
    fn a_response_head_survives_writing_and_reading((head, method) in response()) {
        let mut bytes = Vec::new();
        write_response(&mut bytes, &head, !head.keep_alive);
        prop_assert_eq!(head_end(&bytes, &mut 0, LIMITS), Ok(Some(bytes.len())));
        prop_assert_eq!(read_response(&bytes, LIMITS, &method), Ok(head));
    }
}

/// Names in lower case, and values.
type Pairs = Vec<(String, Vec<u8>)>;

/// What a reader understood of one message. Fields are sorted by name, those of one name in their order.
#[derive(Clone, Debug, Default, PartialEq)]
struct Reading {
    start: String,
    fields: Pairs,
    body: Vec<u8>,
    trailers: Pairs,
}

/// Chunks as (payload, leading zeros, extension), or the whole body under a length, or none.
#[derive(Clone, Debug)]
enum Body {
    None,
    Length(Vec<u8>),
    Chunked(Vec<(Vec<u8>, usize, &'static str)>, Fields),
}

fn body() -> impl Strategy<Value = Body> {
    let extension = prop_oneof![3 => Just(""), 1 => Just(";a"), 1 => Just(";a=\"b;c\"")];
    let trailers = vec(("x-t[a-z]{1,4}", "[!-~]{1,6}"), 0..3).prop_map(|pairs| {
        let mut trailers = Fields::default();
        for (name, value) in pairs {
            trailers.append(&name, value.as_bytes());
        }
        trailers
    });
    prop_oneof![
        Just(Body::None),
        vec(any::<u8>(), 0..100).prop_map(Body::Length),
        (vec((vec(any::<u8>(), 1..60), 0..3usize, extension), 0..5), trailers)
            .prop_map(|(chunks, trailers)| Body::Chunked(chunks, trailers)),
    ]
}

/// Sets the head's framing to the body's, and gives the body's bytes.
fn framed(body: &Body) -> (Framing, Vec<u8>) {
    match body {
        Body::None => (Framing::None, Vec::new()),
        Body::Length(bytes) => (Framing::Length(bytes.len() as u64), bytes.clone()),
        Body::Chunked(chunks, trailers) => {
            let mut bytes = Vec::new();
            for (payload, zeros, extension) in chunks {
                bytes.extend_from_slice(format!("{}{:x}{extension}\r\n", "0".repeat(*zeros), payload.len()).as_bytes());
                bytes.extend_from_slice(payload);
                bytes.extend_from_slice(b"\r\n");
            }
            bytes.extend_from_slice(b"0\r\n");
            write_trailers(&mut bytes, trailers);
            (Framing::Chunked, bytes)
        }
    }
}

fn sorted(fields: &Fields) -> Pairs {
    let mut pairs: Pairs = fields
        .iter()
        .map(|(name, value)| (String::from_utf8_lossy(name).to_ascii_lowercase(), value.to_vec()))
        .collect();
    pairs.sort_by(|one, other| one.0.cmp(&other.0));
    pairs
}

fn sorted_map(map: &http::HeaderMap) -> Pairs {
    const OF_THE_CONNECTION: [&str; 7] =
        ["host", "content-length", "transfer-encoding", "connection", "te", "upgrade", "expect"];
    let mut fields = Fields::default();
    for (name, value) in map {
        if !OF_THE_CONNECTION.contains(&name.as_str()) {
            fields.append(name.as_str(), value.as_bytes());
        }
    }
    sorted(&fields)
}

/// The body under `framing` at the start of `bytes`: payload, trailers, and the canonical form of it all.
fn our_body(framing: Framing, bytes: &[u8]) -> (Vec<u8>, Pairs, Vec<u8>) {
    match framing {
        Framing::None => (Vec::new(), Vec::new(), Vec::new()),
        Framing::Length(length) => {
            let body = bytes[..length as usize].to_vec();
            (body.clone(), Vec::new(), body)
        }
        Framing::Eof => (bytes.to_vec(), Vec::new(), bytes.to_vec()),
        Framing::Chunked => {
            let mut chunks = Chunks::new(1024);
            let mut payload = Vec::new();
            let mut rest = bytes;
            loop {
                match chunks.next(rest).expect("a valid body") {
                    Piece::NeedMore => panic!("the body has no end"),
                    Piece::Framing { length, .. } => rest = &rest[length..],
                    Piece::Data { length } => {
                        payload.extend_from_slice(&rest[..length]);
                        rest = &rest[length..];
                    }
                    Piece::End { length } => {
                        assert_eq!(length, rest.len());
                        break;
                    }
                }
            }
            let trailers = chunks.take_trailers();

            let mut buffer = vec![0; HEADROOM];
            buffer.extend_from_slice(bytes);
            let end = buffer.len();
            let mut chunks = Chunks::new(1024);
            let pass = chunks.pass(&mut buffer, HEADROOM, end, |_| {}).expect("a valid body");
            let mut canonical = buffer[pass.forward].to_vec();
            if let Some(trailers) = chunks.take_trailers() {
                write_trailers(&mut canonical, &trailers);
            }
            (payload, trailers.as_ref().map(sorted).unwrap_or_default(), canonical)
        }
    }
}

/// What hyper's server reads of `bytes`, sent in pieces of `piece` bytes.
async fn hyper_server(bytes: Vec<u8>, piece: usize) -> Reading {
    let (mut client, server) = tokio::io::duplex(4096);
    let reading = Arc::new(Mutex::new(Reading::default()));
    let seen = reading.clone();
    let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
        let seen = seen.clone();
        async move {
            let (head, body) = request.into_parts();
            let collected = body.collect().await.expect("hyper reads the body");
            let trailers = collected.trailers().map(sorted_map).unwrap_or_default();
            *seen.lock().expect("no panic meanwhile") = Reading {
                start: format!("{} {} {}", head.method, head.uri, head.headers["host"].to_str().expect("ASCII")),
                fields: sorted_map(&head.headers),
                body: collected.to_bytes().to_vec(),
                trailers,
            };
            Ok::<_, Infallible>(http::Response::new(Empty::<Bytes>::new()))
        }
    });
    let serve = hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .half_close(true)
        .serve_connection(TokioIo::new(server), service);
    let talk = async {
        for part in bytes.chunks(piece) {
            client.write_all(part).await.expect("hyper takes the bytes");
            tokio::task::yield_now().await;
        }
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.expect("hyper answers");
        answer
    };
    let (served, answer) = tokio::join!(serve, talk);
    served.expect("hyper serves");
    let text = String::from_utf8_lossy(&answer).into_owned();
    assert!(text.contains("HTTP/1.1 200"), "hyper refuses {:?}: {text}", String::from_utf8_lossy(&bytes));
    reading.lock().expect("no panic meanwhile").clone()
}

/// What hyper's client reads of `bytes` as the answer to a request of `method`.
async fn hyper_client(bytes: Vec<u8>, method: Method, piece: usize) -> Reading {
    let (client, mut server) = tokio::io::duplex(4096);
    let (mut sender, connection) = hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(client))
        .await
        .expect("no bytes are needed for that");
    let answer = async move {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(server.read_u8().await.expect("hyper sends its request"));
        }
        for part in bytes.chunks(piece) {
            server.write_all(part).await.expect("hyper takes the bytes");
            tokio::task::yield_now().await;
        }
    };
    let ask = async move {
        let request = http::Request::builder().method(method).uri("/").header("host", "a").body(Empty::new());
        let response = sender.send_request(request.expect("a valid request")).await.expect("hyper reads the head");
        let (head, body) = response.into_parts();
        let collected = body.collect().await.expect("hyper reads the body");
        let trailers = collected.trailers().map(sorted_map).unwrap_or_default();
        Reading {
            start: head.status.as_str().to_owned(),
            fields: sorted_map(&head.headers),
            body: collected.to_bytes().to_vec(),
            trailers,
        }
    };
    let ((), _, reading) = tokio::join!(answer, connection, ask);
    reading
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn hyper_reads_the_same_of_a_request(mut head in request(), body in body(), piece in 1..200usize) {
        let (framing, body) = framed(&body);
        head.framing = framing;
        head.upgrade = None;
        head.expect_continue = false;
        let mut bytes = Vec::new();
        write_request(&mut bytes, &head, head.authority.as_bytes());
        let end = bytes.len();
        bytes.extend_from_slice(&body);

        prop_assert_eq!(head_end(&bytes, &mut 0, LIMITS), Ok(Some(end)));
        let read = read_request(&bytes[..end], LIMITS).expect("a valid head");
        let (payload, trailers, canonical) = our_body(read.framing, &bytes[end..]);
        let target = read.query.as_ref().map_or(read.path.clone(), |query| format!("{}?{query}", read.path));
        let ours = Reading {
            start: format!("{} {target} {}", read.method, read.authority),
            fields: sorted(&read.fields),
            body: payload,
            trailers,
        };
        let canonical = [&bytes[..end], &canonical].concat();
        prop_assert_eq!(&block_on(hyper_server(bytes, piece)), &ours);
        prop_assert_eq!(&block_on(hyper_server(canonical, piece)), &ours, "what goes on means the same");
    }

    #[test]
    fn hyper_reads_the_same_of_a_response((mut head, method) in response(), body in body(), piece in 1..200usize) {
        prop_assume!(!head.status.is_informational());
        let mut bytes = Vec::new();
        let mut body_bytes = Vec::new();
        if head.framing != Framing::None {
            (head.framing, body_bytes) = framed(&body);
            if head.framing == Framing::None {
                head.framing = Framing::Eof;
                body_bytes = b"until the end".to_vec();
            }
        }
        write_response(&mut bytes, &head, !head.keep_alive);
        let end = bytes.len();
        bytes.extend_from_slice(&body_bytes);

        let read = read_response(&bytes[..end], LIMITS, &method).expect("a valid head");
        let (payload, trailers, canonical) = our_body(read.framing, &bytes[end..]);
        let ours = Reading {
            start: read.status.as_str().to_owned(),
            fields: sorted(&read.fields),
            body: payload,
            trailers,
        };
        let canonical = [&bytes[..end], &canonical].concat();
        prop_assert_eq!(&block_on(hyper_client(bytes, method.clone(), piece)), &ours);
        prop_assert_eq!(&block_on(hyper_client(canonical, method, piece)), &ours, "what goes on means the same");
    }
}
