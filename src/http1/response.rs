//! Response: one strict reading of a response head (RFC 9112 sections 4 and 6.3).

use http::{Method, StatusCode};

use super::fields::{next_line, read_section};
use super::request::read_version;
use super::{HeadError, HeadLimits, octets};
use crate::message::{Framing, ResponseHead, Version};

/// Reads `head`: exactly one response head with its final empty line; `request_method` decides whether a body follows.
pub fn read_response(head: &[u8], limits: HeadLimits, request_method: &Method) -> Result<ResponseHead, HeadError> {
    if head.len() > limits.max_bytes {
        return Err(HeadError::TooLarge);
    }
    let mut rest = head;
    let (version, status, reason) = status_line(next_line(&mut rest)?)?;
    let section = read_section(rest, limits)?;

    if version == Version::Http10 && section.chunked {
        return Err(HeadError::Malformed("Transfer-Encoding is there in HTTP/1.0."));
    }
    let is_switching = status == StatusCode::SWITCHING_PROTOCOLS;
    if is_switching && (version == Version::Http10 || section.upgrade.is_none()) {
        return Err(HeadError::Malformed("The answer 101 does not name the protocol that it switches to."));
    }
    let never_has_length = status.is_informational() || status == StatusCode::NO_CONTENT;
    let has_no_body = never_has_length || status == StatusCode::NOT_MODIFIED || request_method == Method::HEAD;
    let framing = match (has_no_body, section.chunked, section.content_length) {
        (true, _, _) => Framing::None,
        (false, true, _) => Framing::Chunked,
        (false, false, Some(length)) => Framing::Length(length),
        (false, false, None) => Framing::Eof,
    };
    // Such an answer has no body; but an endpoint that says otherwise may send one, and it must not be read as the
    // head of the next answer.
    let contradicts_itself =
        never_has_length && (section.chunked || section.content_length.is_some_and(|length| length > 0));
    Ok(ResponseHead {
        status,
        reason,
        version,
        fields: section.fields,
        framing,
        keep_alive: version == Version::Http11
            && !section.close
            && framing != Framing::Eof
            && !is_switching
            && !contradicts_itself,
        upgrade: section.upgrade.filter(|_| is_switching),
        declared_length: section.content_length.filter(|_| has_no_body && !never_has_length),
    })
}

fn status_line(line: &[u8]) -> Result<(Version, StatusCode, Option<Vec<u8>>), HeadError> {
    const SHAPE: HeadError = HeadError::Malformed("The status line is not a version, a status and a reason.");
    let (version, rest) = line.split_at_checked(8).ok_or(SHAPE)?;
    let version = read_version(version)?;
    let (status, reason) = match rest {
        [b' ', hundreds, tens, ones, b' ', reason @ ..] => ([*hundreds, *tens, *ones], reason),
        // Without the space before the empty reason: wrong, widespread, and readable in one way only.
        [b' ', hundreds, tens, ones] => ([*hundreds, *tens, *ones], &b""[..]),
        _ => return Err(SHAPE),
    };
    let status = StatusCode::from_bytes(&status)
        .map_err(|_| HeadError::Malformed("The status is not a number from 100 to 999."))?;
    if !octets::is_field_value(reason) {
        return Err(HeadError::Malformed("The reason phrase holds a control byte."));
    }
    let is_standard = reason.is_empty() || status.canonical_reason().is_some_and(|usual| usual.as_bytes() == reason);
    Ok((version, status, (!is_standard).then(|| reason.to_vec())))
}

#[cfg(test)]
mod tests {
    use http::{Method, StatusCode};

    use super::read_response;
    use crate::http1::{HeadError, HeadLimits};
    use crate::message::{Framing, ResponseHead};

    const LIMITS: HeadLimits = HeadLimits { max_bytes: 4096, max_fields: 16 };

    fn read(head: &str) -> Result<ResponseHead, HeadError> {
        read_response(head.as_bytes(), LIMITS, &Method::GET)
    }

    #[test]
    fn framing_follows_the_list_of_rfc_9112() {
        for (method, status, fields, framing, keep_alive, declared) in [
            ("GET", "200", "Content-Length: 5\r\n", Framing::Length(5), true, None),
            ("GET", "200", "Transfer-Encoding: Chunked\r\n", Framing::Chunked, true, None),
            ("GET", "200", "", Framing::Eof, false, None),
            ("GET", "200", "Connection: close\r\nContent-Length: 0\r\n", Framing::Length(0), false, None),
            ("HEAD", "200", "Content-Length: 5\r\n", Framing::None, true, Some(5)),
            ("HEAD", "200", "Transfer-Encoding: chunked\r\n", Framing::None, true, None),
            ("GET", "304", "Content-Length: 5\r\n", Framing::None, true, Some(5)),
            ("GET", "204", "", Framing::None, true, None),
            ("GET", "204", "Content-Length: 0\r\n", Framing::None, true, None),
            ("GET", "204", "Content-Length: 5\r\n", Framing::None, false, None),
            ("GET", "204", "Transfer-Encoding: chunked\r\n", Framing::None, false, None),
            ("GET", "103", "Link: x\r\n", Framing::None, true, None),
            ("POST", "205", "", Framing::Eof, false, None),
        ] {
            let head = format!("HTTP/1.1 {status} x\r\n{fields}\r\n");
            let method = Method::from_bytes(method.as_bytes()).expect("a method");
            let read = read_response(head.as_bytes(), LIMITS, &method).expect(&head);
            assert_eq!(
                (read.framing, read.keep_alive, read.declared_length),
                (framing, keep_alive, declared),
                "{head:?}"
            );
        }
    }

    #[test]
    fn reads_the_reason_and_the_upgrade() {
        assert_eq!(read("HTTP/1.1 200 OK\r\n\r\n").expect("good").reason, None);
        assert_eq!(read("HTTP/1.1 200 \r\n\r\n").expect("good").reason, None);
        assert_eq!(read("HTTP/1.1 200\r\n\r\n").expect("good").reason, None);
        assert_eq!(read("HTTP/1.1 200 Fine \r\n\r\n").expect("good").reason.as_deref(), Some(&b"Fine "[..]));
        let head =
            read("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX: y\r\n\r\n")
                .expect("good");
        assert_eq!((head.status, head.upgrade.as_deref()), (StatusCode::SWITCHING_PROTOCOLS, Some("websocket")));
        assert!(!head.keep_alive && head.fields.len() == 1);
        let head = read("HTTP/1.1 426 \r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n")
            .expect("good");
        assert_eq!(head.upgrade, None);
        assert!(head.fields.is_empty() && head.keep_alive);
        assert!(
            !read("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n").expect("good").keep_alive
        );
    }

    #[test]
    fn every_bad_head_has_its_sentence() {
        for (head, words) in [
            ("", "CRLF"),
            ("\r\nHTTP/1.1 200 OK\r\n\r\n", "status line"),
            ("HTTP/1.1\r\n\r\n", "status line"),
            ("HTTP/1.1 20 OK\r\n\r\n", "status line"),
            ("HTTP/1.1 2000 OK\r\n\r\n", "status line"),
            ("HTTP/1.1  200 OK\r\n\r\n", "status line"),
            ("HTTP/1.1 099 OK\r\n\r\n", "status is not"),
            ("HTTP/1.1 2x0 OK\r\n\r\n", "status is not"),
            ("HTTP/2.0 200 OK\r\n\r\n", "version"),
            ("ICY/1.10 200 OK\r\n\r\n", "version"),
            ("HTTP/1.1 200 O\x01K\r\n\r\n", "reason"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "both"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", "two Content-Length"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 1,1\r\n\r\n", "list"),
            ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "decimal"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "exactly"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", "exactly"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", "two Transfer"),
            ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.0"),
            ("HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n", "folded"),
            ("HTTP/1.1 200 OK\r\nX : a\r\n\r\n", "before a field's colon"),
            ("HTTP/1.1 200 OK\r\nX: a\0\r\n\r\n", "control"),
            ("HTTP/1.1 101 x\r\n\r\n", "101"),
            ("HTTP/1.1 101 x\r\nUpgrade: websocket\r\n\r\n", "101"),
        ] {
            match read(head) {
                Err(HeadError::Malformed(sentence)) => assert!(sentence.contains(words), "{head:?}: {sentence}"),
                other => panic!("{head:?}: {other:?}"),
            }
        }
    }
}
