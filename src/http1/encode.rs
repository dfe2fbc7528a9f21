//! Encode: heads, trailers and chunk headers in one canonical form.

use http::StatusCode;

use crate::message::{Fields, Framing, RequestHead, ResponseHead};

/// The start line, framing and connection fields; what else a head needs is known from its fields.
const HEAD_BYTES: usize = 160;

/// Writes a request head for an endpoint, as HTTP/1.1 whatever version carried it here. `host` is the Host field.
///
/// Framing, Connection, Upgrade, Expect and TE come from the typed members. A request has no framing "until the end":
/// [`Framing::Eof`] is written as no body.
pub fn write_request(out: &mut Vec<u8>, head: &RequestHead, host: &[u8]) {
    out.reserve(HEAD_BYTES + head.fields.byte_length());
    out.extend_from_slice(head.method.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(head.path.as_bytes());
    if let Some(query) = &head.query {
        out.push(b'?');
        out.extend_from_slice(query.as_bytes());
    }
    out.extend_from_slice(b" HTTP/1.1\r\n");
    write_field(out, b"Host", host);
    head.fields.write(out);
    write_framing(out, head.framing);
    if head.expect_continue {
        out.extend_from_slice(b"Expect: 100-continue\r\n");
    }
    // TE concerns this hop, so Connection names it (RFC 9110 section 10.1.4).
    match (&head.upgrade, head.accepts_trailers) {
        (Some(_), true) => out.extend_from_slice(b"Connection: upgrade, TE\r\n"),
        (Some(_), false) => out.extend_from_slice(b"Connection: upgrade\r\n"),
        (None, true) => out.extend_from_slice(b"Connection: TE\r\n"),
        (None, false) => {}
    }
    if let Some(upgrade) = &head.upgrade {
        write_field(out, b"Upgrade", upgrade.as_bytes());
    }
    if head.accepts_trailers {
        out.extend_from_slice(b"TE: trailers\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes a response head for a client, as HTTP/1.1.
///
/// `close`: the connection closes after this answer; it always does where the framing is [`Framing::Eof`].
/// [`Framing::None`] says that no body can follow (1xx, 204, 304, to HEAD): an empty body is [`Framing::Length`] of 0.
pub fn write_response(out: &mut Vec<u8>, head: &ResponseHead, close: bool) {
    out.reserve(HEAD_BYTES + head.fields.byte_length());
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(head.status.as_str().as_bytes());
    out.push(b' ');
    match &head.reason {
        Some(reason) => out.extend_from_slice(reason),
        None => out.extend_from_slice(head.status.canonical_reason().unwrap_or_default().as_bytes()),
    }
    out.extend_from_slice(b"\r\n");
    head.fields.write(out);
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        out.extend_from_slice(b"Connection: upgrade\r\n");
        if let Some(upgrade) = &head.upgrade {
            write_field(out, b"Upgrade", upgrade.as_bytes());
        }
    } else if !head.status.is_informational() {
        // RFC 9110 section 8.6: 1xx and 204 never carry a length.
        if head.status != StatusCode::NO_CONTENT {
            write_framing(out, head.framing);
            if let (Framing::None, Some(length)) = (head.framing, head.declared_length) {
                write_framing(out, Framing::Length(length));
            }
        }
        if close || head.framing == Framing::Eof {
            out.extend_from_slice(b"Connection: close\r\n");
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes a trailer section and the empty line that ends the message; the last chunk (`0` and CRLF) comes before it.
pub fn write_trailers(out: &mut Vec<u8>, trailers: &Fields) {
    trailers.write(out);
    out.extend_from_slice(b"\r\n");
}

/// Writes the size line of a chunk of `length` bytes and returns how many bytes of `out` it takes.
pub fn write_chunk_header(out: &mut [u8; 18], length: usize) -> usize {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let count = (usize::BITS - length.leading_zeros()).div_ceil(4).max(1) as usize;
    for (index, digit) in out[..count].iter_mut().enumerate() {
        *digit = DIGITS[length >> (4 * (count - 1 - index)) & 0xf];
    }
    out[count..count + 2].copy_from_slice(b"\r\n");
    count + 2
}

#[inline]
fn write_field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn write_framing(out: &mut Vec<u8>, framing: Framing) {
    match framing {
        Framing::None | Framing::Eof => {}
        Framing::Length(length) => {
            out.extend_from_slice(b"Content-Length: ");
            let mut digits = [0; 20];
            let mut start = digits.len();
            let mut rest = length;
            loop {
                start -= 1;
                digits[start] = b'0' + (rest % 10) as u8;
                rest /= 10;
                if rest == 0 {
                    break;
                }
            }
            out.extend_from_slice(&digits[start..]);
            out.extend_from_slice(b"\r\n");
        }
        Framing::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
    }
}

#[cfg(test)]
mod tests {
    use http::{Method, StatusCode};

    use super::{write_chunk_header, write_request, write_response, write_trailers};
    use crate::message::{Fields, Framing, RequestHead, ResponseHead, Version};

    #[test]
    fn a_request_has_one_form() {
        let mut fields = Fields::default();
        fields.append("Accept", b"*/*");
        let head = RequestHead {
            method: Method::POST,
            path: "/a".to_owned(),
            query: Some("b".to_owned()),
            authority: "client.example".to_owned(),
            version: Version::Http2,
            fields,
            framing: Framing::Length(u64::MAX),
            keep_alive: false,
            upgrade: Some("websocket".to_owned()),
            expect_continue: true,
            accepts_trailers: true,
        };
        let mut out = Vec::new();
        write_request(&mut out, &head, b"h:1");
        assert_eq!(
            String::from_utf8_lossy(&out),
            "POST /a?b HTTP/1.1\r\nHost: h:1\r\nAccept: */*\r\nContent-Length: 18446744073709551615\r\nExpect: 100-continue\r\n\
             Connection: upgrade, TE\r\nUpgrade: websocket\r\nTE: trailers\r\n\r\n"
        );
    }

    #[test]
    fn responses() {
        let head = |status: u16, framing, declared_length| ResponseHead {
            status: StatusCode::from_u16(status).expect("a status"),
            reason: None,
            version: Version::Http11,
            fields: Fields::default(),
            framing,
            keep_alive: true,
            upgrade: (status == 101).then(|| "websocket".to_owned()),
            declared_length,
        };
        for (head, close, text) in [
            (head(200, Framing::Length(0), None), false, "200 OK\r\nContent-Length: 0\r\n\r\n"),
            (
                head(200, Framing::Chunked, None),
                true,
                "200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n",
            ),
            (head(200, Framing::Eof, None), false, "200 OK\r\nConnection: close\r\n\r\n"),
            (head(304, Framing::None, Some(7)), false, "304 Not Modified\r\nContent-Length: 7\r\n\r\n"),
            (head(204, Framing::Length(0), None), false, "204 No Content\r\n\r\n"),
            (head(103, Framing::None, None), true, "103 Early Hints\r\n\r\n"),
            (
                head(101, Framing::None, None),
                true,
                "101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            ),
            (head(799, Framing::Length(1), None), false, "799 \r\nContent-Length: 1\r\n\r\n"),
        ] {
            let mut out = Vec::new();
            write_response(&mut out, &head, close);
            assert_eq!(String::from_utf8_lossy(&out), format!("HTTP/1.1 {text}"));
        }
    }

    #[test]
    fn chunk_headers_and_trailers() {
        for (length, text) in [
            (0, "0\r\n"),
            (1, "1\r\n"),
            (15, "f\r\n"),
            (16, "10\r\n"),
            (0xabc, "abc\r\n"),
            (usize::MAX, "ffffffffffffffff\r\n"),
        ] {
            let mut out = [0; 18];
            let written = write_chunk_header(&mut out, length);
            assert_eq!(&out[..written], text.as_bytes());
        }
        let mut trailers = Fields::default();
        trailers.append("x-sum", b"1");
        let mut out = Vec::new();
        write_trailers(&mut out, &trailers);
        assert_eq!(out, b"x-sum: 1\r\n\r\n");
    }
}
