//! Request: one strict reading of a request head (RFC 9112 sections 2, 3 and 6).

use http::Method;

use super::fields::{next_line, read_section};
use super::target::{normalise, same_authority, valid_authority};
use super::{HeadError, HeadLimits, octets};
use crate::message::{Framing, RequestHead, Version};

/// Reads `head`: exactly one request head with its final empty line, as [`super::head_end`] found it. One empty line
/// before it is skipped (RFC 9112 section 2.2).
pub fn read_request(head: &[u8], limits: HeadLimits) -> Result<RequestHead, HeadError> {
    if head.len() > limits.max_bytes {
        return Err(HeadError::TooLarge);
    }
    let mut rest = head.strip_prefix(b"\r\n").unwrap_or(head);
    let (method, target, version) = request_line(next_line(&mut rest)?)?;
    let section = read_section(rest, limits)?;

    if version == Version::Http10 && section.chunked {
        return Err(HeadError::Malformed("Transfer-Encoding is there in HTTP/1.0."));
    }
    if section.host.is_none() && version == Version::Http11 {
        return Err(HeadError::Malformed("There is no Host field."));
    }
    if section.host.is_some_and(|host| !valid_authority(host)) {
        return Err(HeadError::Malformed("Host is not a valid host and port."));
    }
    let (path, query, authority) = read_target(&method, target, section.host)?;
    let framing = match (section.chunked, section.content_length) {
        (true, _) => Framing::Chunked,
        (false, Some(length)) => Framing::Length(length),
        (false, None) => Framing::None,
    };
    let is_current = version == Version::Http11;
    Ok(RequestHead {
        method,
        path,
        query,
        authority,
        version,
        fields: section.fields,
        framing,
        keep_alive: is_current && !section.close,
        upgrade: section.upgrade.filter(|_| is_current),
        // RFC 9110 section 10.1.1: from an HTTP/1.0 client it is to be ignored.
        expect_continue: is_current && section.expect_continue,
        accepts_trailers: section.accepts_trailers,
    })
}

fn request_line(line: &[u8]) -> Result<(Method, &[u8], Version), HeadError> {
    let parts = memchr::memchr(b' ', line).zip(memchr::memrchr(b' ', line)).filter(|(first, last)| first < last);
    let Some((first, last)) = parts else {
        return Err(HeadError::Malformed("The request line is not a method, a target and a version."));
    };
    let method = &line[..first];
    if !octets::is_token(method) {
        return Err(HeadError::Malformed("The method is not a token."));
    }
    let method = Method::from_bytes(method).map_err(|_| HeadError::Malformed("The method is not a token."))?;
    if method == Method::CONNECT {
        return Err(HeadError::Malformed("CONNECT is not served: this is no forward proxy."));
    }
    Ok((method, &line[first + 1..last], read_version(&line[last + 1..])?))
}

/// The version of a start line.
pub(super) fn read_version(text: &[u8]) -> Result<Version, HeadError> {
    match text {
        b"HTTP/1.1" => Ok(Version::Http11),
        b"HTTP/1.0" => Ok(Version::Http10),
        _ => Err(HeadError::Malformed("The version is neither HTTP/1.1 nor HTTP/1.0.")),
    }
}

/// Path, query and authority; `host` is valid where it is there.
fn read_target(
    method: &Method,
    target: &[u8],
    host: Option<&[u8]>,
) -> Result<(String, Option<String>, String), HeadError> {
    if target == b"*" {
        if method != Method::OPTIONS {
            return Err(HeadError::Malformed("The target `*` is for OPTIONS only."));
        }
        return Ok(("*".to_owned(), None, text(host.unwrap_or_default())));
    }
    if target.first() == Some(&b'/') {
        let (path, query) = normalise(target)?;
        return Ok((path, query, text(host.unwrap_or_default())));
    }
    let Some((scheme_end, default_port)) = scheme(target) else {
        return Err(HeadError::Malformed(
            "The target is neither a path nor an absolute http or https URL: it must not hold spaces or begin otherwise.",
        ));
    };
    let rest = &target[scheme_end..];
    let authority_end = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(authority_end);
    if !valid_authority(authority) {
        return Err(HeadError::Malformed("The authority in the target is not a valid host and port."));
    }
    if host.is_some_and(|host| !same_authority(host, authority, default_port)) {
        return Err(HeadError::Malformed("The target's authority contradicts Host."));
    }
    let (path, query) = match tail.first() {
        // RFC 9112 section 3.2.4: the last proxy turns an OPTIONS without a path into `*`.
        None if method == Method::OPTIONS => ("*".to_owned(), None),
        None => ("/".to_owned(), None),
        Some(b'/') => normalise(tail)?,
        Some(_) => normalise(&[b"/", tail].concat())?,
    };
    Ok((path, query, text(authority)))
}

/// Where the authority begins, and the scheme's port.
fn scheme(target: &[u8]) -> Option<(usize, u16)> {
    let begins = |scheme: &[u8]| target.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme));
    if begins(b"http://") {
        Some((7, 80))
    } else if begins(b"https://") {
        Some((8, 443))
    } else {
        None
    }
}

/// A valid authority is ASCII.
fn text(authority: &[u8]) -> String {
    match std::str::from_utf8(authority) {
        Ok(text) => text.to_owned(),
        Err(_) => String::from_utf8_lossy(authority).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::read_request;
    use crate::http1::{HeadError, HeadLimits};
    use crate::message::{Framing, RequestHead, Version};

    const LIMITS: HeadLimits = HeadLimits { max_bytes: 4096, max_fields: 16 };

    fn read(head: &str) -> Result<RequestHead, HeadError> {
        read_request(head.as_bytes(), LIMITS)
    }

    fn with(fields: &str) -> RequestHead {
        read(&format!("POST /x HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).expect("a good head")
    }

    #[test]
    fn reads_what_is_usual() {
        let head = read(
            "POST /a/b?c=d HTTP/1.1\r\nHost: Example.com:8080\r\nAccept:  x \r\nX-Empty:\r\nContent-Length: 12\r\n\r\n",
        )
        .expect("a good head");
        assert_eq!(head.method, http::Method::POST);
        assert_eq!((head.path.as_str(), head.query.as_deref()), ("/a/b", Some("c=d")));
        assert_eq!(head.authority, "Example.com:8080");
        assert_eq!((head.version, head.framing), (Version::Http11, Framing::Length(12)));
        assert_eq!(head.fields.iter().collect::<Vec<_>>(), [(&b"Accept"[..], &b"x"[..]), (b"X-Empty", b"")]);
        assert!(head.keep_alive && !head.expect_continue && !head.accepts_trailers && head.upgrade.is_none());
        assert_eq!(read("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("one empty line is skipped").path, "/");
    }

    #[test]
    fn lifts_the_connection_out_of_the_fields() {
        let head = with(
            "Connection: close, X-Secret , keep-alive\r\nx-secret: 1\r\nX-SECRET: 2\r\nKeep-Alive: 5\r\nProxy-Connection: x\r\n\
             TE: trailers, gzip;q=1\r\nTransfer-Encoding: CHUNKED\r\nExpect: 100-Continue\r\nUpgrade: websocket\r\nTrailer: x-sum\r\n",
        );
        assert_eq!(head.fields.iter().collect::<Vec<_>>(), [(&b"Trailer"[..], &b"x-sum"[..])]);
        assert_eq!(head.framing, Framing::Chunked);
        assert!(!head.keep_alive && head.accepts_trailers && head.expect_continue);
        assert_eq!(head.upgrade, None, "Connection does not name it");
    }

    #[test]
    fn upgrades_pass_but_not_h2c() {
        let upgrade = |value: &str| {
            with(&format!("Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: x\r\nUpgrade: {value}\r\n"))
        };
        assert_eq!(upgrade("websocket").upgrade.as_deref(), Some("websocket"));
        assert_eq!(upgrade("h2c, websocket,foo/2").upgrade.as_deref(), Some("websocket, foo/2"));
        let head = upgrade("H2C");
        assert_eq!(head.upgrade, None);
        assert!(head.fields.is_empty());
        let old = read("GET / HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n").expect("a good head");
        assert_eq!(old.upgrade, None);
    }

    #[test]
    fn http_1_0_is_accepted_and_closed_after() {
        let head =
            read("GET /x HTTP/1.0\r\nConnection: keep-alive\r\nExpect: 100-continue\r\n\r\n").expect("a good head");
        assert_eq!((head.version, head.keep_alive, head.expect_continue), (Version::Http10, false, false));
        assert_eq!(head.authority, "");
    }

    #[test]
    fn absolute_and_asterisk_forms() {
        for (line, host, path, query, authority) in [
            ("GET http://A.b/x?y", "a.B:80", "/x", Some("y"), "A.b"),
            ("GET https://a:443?y", "a", "/", Some("y"), "a:443"),
            ("GET HTTP://a", "a", "/", None, "a"),
            ("OPTIONS http://a", "a", "*", None, "a"),
            ("OPTIONS *", "a", "*", None, "a"),
            ("GET //b/c", "a", "//b/c", None, "a"),
        ] {
            let head = read(&format!("{line} HTTP/1.1\r\nHost: {host}\r\n\r\n")).expect(line);
            assert_eq!((head.path.as_str(), head.query.as_deref()), (path, query), "{line}");
            assert_eq!(head.authority, authority, "{line}");
        }
    }

    #[test]
    fn every_bad_head_has_its_sentence() {
        // The start line's part of the head, then what the sentence speaks of.
        for (head, words) in [
            ("", "CRLF"),
            ("\r\n", "CRLF"),
            ("\r\n\r\n", "request line"),
            ("GET / HTTP/1.1\r\nHost: a\r\n", "CRLF"),
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\nx", "after the empty line"),
            ("GET\r\n\r\n", "request line"),
            ("GET /\r\n\r\n", "request line"),
            ("GET / \r\nHost: a\r\n\r\n", "version"),
            ("GET / HTTP/1.2\r\nHost: a\r\n\r\n", "version"),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", "version"),
            ("GET / http/1.1\r\nHost: a\r\n\r\n", "version"),
            ("GET / HTTP/1.1 \r\nHost: a\r\n\r\n", "version"),
            ("GET / HTTP/01.1\r\nHost: a\r\n\r\n", "version"),
            (" GET / HTTP/1.1\r\nHost: a\r\n\r\n", "method"),
            ("G(T / HTTP/1.1\r\nHost: a\r\n\r\n", "method"),
            ("G\tT / HTTP/1.1\r\nHost: a\r\n\r\n", "method"),
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "spaces"),
            ("GET /  HTTP/1.1\r\nHost: a\r\n\r\n", "space"),
            ("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", "space"),
            ("GET /a\tb HTTP/1.1\r\nHost: a\r\n\r\n", "control"),
            ("GET /a\x01 HTTP/1.1\r\nHost: a\r\n\r\n", "control"),
            ("GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", "fragment"),
            ("GET /ä HTTP/1.1\r\nHost: a\r\n\r\n", "percent-encoded"),
            ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS"),
            ("CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", "CONNECT"),
            ("GET a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", "neither a path"),
            ("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", "neither a path"),
            ("GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", "contradicts"),
            ("GET http://a:81/ HTTP/1.1\r\nHost: a\r\n\r\n", "contradicts"),
            ("GET https://a/ HTTP/1.1\r\nHost: a:80\r\n\r\n", "contradicts"),
            ("GET http://a@b/ HTTP/1.1\r\nHost: b\r\n\r\n", "authority"),
            ("GET http:///x HTTP/1.1\r\nHost: b\r\n\r\n", "authority"),
            ("GET http://a/ HTTP/1.1\r\n\r\n", "no Host"),
            ("GET / HTTP/1.1\r\n\r\n", "no Host"),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", "two Host"),
            ("GET / HTTP/1.0\r\nHost: a\r\nhost: b\r\n\r\n", "two Host"),
            ("GET / HTTP/1.1\r\nHost:\r\n\r\n", "Host is not"),
            ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "Host is not"),
            ("GET / HTTP/1.1\r\nHost: a,b\r\n\r\n", "Host is not"),
            ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", "Host is not"),
            ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", "folded"),
        ] {
            refused(head, words);
        }
        for (fields, words) in [
            ("X: a\r\n b\r\n", "folded"),
            ("X: a\r\n\tb\r\n", "folded"),
            ("X : a\r\n", "before a field's colon"),
            ("X\t: a\r\n", "before a field's colon"),
            (": a\r\n", "no name"),
            ("X\r\n", "no colon"),
            ("X(: a\r\n", "name"),
            ("Xä: a\r\n", "name"),
            ("X: a\rb\r\n", "bare CR"),
            ("X: a\nb\r\n", "control"),
            ("X: a\0b\r\n", "control"),
            ("X: a\x1bb\r\n", "control"),
            ("X: a\x7fb\r\n", "control"),
            ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", "both"),
            ("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n", "both"),
            ("Content-Length: 1\r\nContent-Length: 1\r\n", "two Content-Length"),
            ("Content-Length: 1\r\ncontent-length: 2\r\n", "two Content-Length"),
            ("Content-Length: 1, 1\r\n", "list"),
            ("Content-Length:\r\n", "empty"),
            ("Content-Length: +1\r\n", "decimal digits"),
            ("Content-Length: -1\r\n", "decimal digits"),
            ("Content-Length: 0x1\r\n", "decimal digits"),
            ("Content-Length: 1 1\r\n", "decimal digits"),
            ("Content-Length: 1.0\r\n", "decimal digits"),
            ("Content-Length: 18446744073709551616\r\n", "too large"),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "two Transfer-Encoding"),
            ("Transfer-Encoding: chunked, chunked\r\n", "exactly"),
            ("Transfer-Encoding: gzip, chunked\r\n", "exactly"),
            ("Transfer-Encoding: chunked, gzip\r\n", "exactly"),
            ("Transfer-Encoding: identity\r\n", "exactly"),
            ("Transfer-Encoding: xchunked\r\n", "exactly"),
            ("Transfer-Encoding: \"chunked\"\r\n", "exactly"),
            ("Transfer-Encoding: chunked;a=b\r\n", "exactly"),
            ("Transfer-Encoding: \x0bchunked\r\n", "control"),
            ("Transfer-Encoding:\r\n", "exactly"),
            ("Connection: host\r\n", "names a field"),
            ("Connection: close, Content-Length\r\n", "names a field"),
            ("Connection: transfer-encoding\r\n", "names a field"),
            ("Connection: a b\r\n", "token"),
            ("Connection: upgrade\r\nUpgrade: a b\r\n", "protocol"),
        ] {
            refused(&format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n"), words);
        }
        refused("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.0");
    }

    fn refused(head: &str, words: &str) {
        match read(head) {
            Err(HeadError::Malformed(sentence)) => assert!(sentence.contains(words), "{head:?}: {sentence}"),
            other => panic!("{head:?}: {other:?}"),
        }
    }

    #[test]
    fn bounds() {
        let fields = |count: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(count));
        assert_eq!(read(&fields(15)).expect("at the limit").fields.len(), 15);
        assert_eq!(read(&fields(16)), Err(HeadError::TooLarge));
        assert_eq!(read(&format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(4096))), Err(HeadError::TooLarge));
        assert_eq!(with("Content-Length: 18446744073709551615\r\n").framing, Framing::Length(u64::MAX));
    }
}
