//! Problem: the answers that we give ourselves: errors (RFC 9457, RFC 9209), redirects and fixed texts.

use bytes::Bytes;
use http::StatusCode;
use serde::Serialize;

use crate::config::RouteAction;
use crate::error::{Code, ProxyError};
use crate::message::{Fields, Framing, RequestHead, ResponseHead, Version};
use crate::proxy::account::CallerForm;
use crate::proxy::forwarded::Outside;

/// The answer to a request that can't be served: `application/problem+json`, with `Proxy-Status` and, where a later try
/// can work, `Retry-After`. A caller whose protocol has a form of its own for errors gets that, under the same status.
pub fn error(error: &ProxyError, caller_form: Option<&CallerForm>) -> (ResponseHead, Bytes) {
    let code = error.code;
    let body = Document {
        kind: &format!("urn:longhaul:error:{}", code.as_str()),
        title: code.title(),
        status: error.status.as_u16(),
        detail: &error.detail,
        code: code.as_str(),
    };
    // A struct of strings and a number always has a JSON form.
    let mut body = serde_json::to_vec(&body).unwrap_or_default();
    // People read these in a terminal.
    body.push(b'\n');
    let mut fields = Fields::with_capacity(256, 4);
    let own_form = caller_form.and_then(|form| form.protocol.error_body(error, form.rpc_id.as_deref()));
    let content_type: &[u8] = if own_form.is_some() { b"application/json" } else { b"application/problem+json" };
    let body = own_form.unwrap_or(body);
    fields.append("content-type", content_type);
    fields.append("cache-control", b"no-store");
    fields.append("proxy-status", proxy_status(code.proxy_status(), &error.detail).as_bytes());
    if let Some(seconds) = error.retry_after_seconds {
        fields.append("retry-after", seconds.to_string().as_bytes());
    }
    if code == Code::SessionBusy {
        // Clients of OpenAI and Anthropic try a 409 again by themselves, which would only meet the same run.
        fields.append("x-should-retry", b"false");
    }
    answer(error.status, fields, Bytes::from(body))
}

/// The answer of a route that needs no service; `None` for one that does.
pub fn fixed(action: &RouteAction, request: &RequestHead, outside: &Outside) -> Option<(ResponseHead, Bytes)> {
    match action {
        RouteAction::Service(_) => None,
        RouteAction::Redirect { scheme: new_scheme, host, path, status } => {
            let location = location(new_scheme.as_deref(), host.as_deref(), path.as_deref(), request, outside);
            let mut fields = Fields::default();
            fields.append("location", location.as_bytes());
            Some(answer(*status, fields, Bytes::new()))
        }
        RouteAction::Respond { status, body } => {
            let mut fields = Fields::default();
            if !body.is_empty() {
                fields.append("content-type", b"text/plain; charset=utf-8");
            }
            Some(answer(*status, fields, Bytes::copy_from_slice(body.as_bytes())))
        }
    }
}

/// The members of RFC 9457 section 3.1, and our code.
#[derive(Serialize)]
struct Document<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    title: &'a str,
    status: u16,
    detail: &'a str,
    code: &'a str,
}

/// How much of a sentence goes into a header field; the body has all of it.
const DETAILS_BYTES_MAX: usize = 512;

fn answer(status: StatusCode, fields: Fields, body: Bytes) -> (ResponseHead, Bytes) {
    // These have no body, whatever was configured (RFC 9110 sections 15.3.5 and 15.4.5).
    let is_bodiless = status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let body = if is_bodiless { Bytes::new() } else { body };
    let framing = if is_bodiless { Framing::None } else { Framing::Length(body.len() as u64) };
    let head = ResponseHead {
        status,
        reason: None,
        version: Version::Http11,
        fields,
        framing,
        declared_length: None,
        keep_alive: true,
        upgrade: None,
    };
    (head, body)
}

/// RFC 9209 section 2; `details` is a string of RFC 8941 section 3.3.3, which holds printable ASCII only.
fn proxy_status(error: &str, details: &str) -> String {
    let mut text = format!("longhaul; error={error}; details=\"");
    for character in details.chars().take(DETAILS_BYTES_MAX) {
        match character {
            '"' | '\\' => text.extend(['\\', character]),
            ' '..='~' => text.push(character),
            _ => text.push('?'),
        }
    }
    text.push('"');
    text
}

/// What the route says in place of the request's own scheme, host and path; the query is kept.
fn location(
    scheme: Option<&str>,
    host: Option<&str>,
    path: Option<&str>,
    request: &RequestHead,
    outside: &Outside,
) -> String {
    let mut location = String::new();
    let (own, authority) = (outside.scheme, outside.authority(&request.authority));
    let authority = match host {
        Some(host) => host,
        // Another scheme is on another port.
        None if scheme.is_some_and(|scheme| scheme != own) => without_port(authority),
        None => authority,
    };
    let path = path.unwrap_or(if request.path == "*" { "/" } else { &request.path });
    if authority.is_empty() {
        // `//x` would be read as a host, not as a path.
        location.push('/');
        location.push_str(path.trim_start_matches('/'));
    } else {
        location.push_str(scheme.unwrap_or(own));
        location.push_str("://");
        location.push_str(authority);
        location.push_str(path);
    }
    if let Some(query) = &request.query {
        location.push(if location.contains('?') { '&' } else { '?' });
        location.push_str(query);
    }
    location
}

fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => host,
        _ => authority,
    }
}

#[cfg(test)]
mod tests {
    use http::Method;
    use proptest::prelude::*;

    use super::*;
    use crate::proxy::forwarded::Peer;

    fn request(authority: &str, path: &str, query: Option<&str>) -> RequestHead {
        RequestHead {
            method: Method::GET,
            path: path.to_owned(),
            query: query.map(str::to_owned),
            authority: authority.to_owned(),
            version: Version::Http11,
            fields: Fields::default(),
            framing: Framing::None,
            keep_alive: true,
            upgrade: None,
            expect_continue: false,
            accepts_trailers: false,
        }
    }

    fn cleartext() -> Outside {
        Outside::of(&Peer::new(None, false))
    }

    #[test]
    fn every_code_has_a_whole_answer() {
        for code in Code::ALL {
            let (head, body) =
                error(&ProxyError::new(code, "all 3 endpoints of \"a\\b\" are at max_runs: naïve\r\nX: y"), None);
            assert_eq!(head.status, code.status());
            assert_eq!(head.framing, Framing::Length(body.len() as u64));
            assert_eq!(head.fields.get("content-type"), Some(&b"application/problem+json"[..]));
            assert_eq!(head.fields.get("cache-control"), Some(&b"no-store"[..]));
            let retry_after = code.retry_after_seconds().map(|seconds| seconds.to_string().into_bytes());
            assert_eq!(head.fields.get("retry-after").map(<[u8]>::to_vec), retry_after);
            let expected = format!(
                r#"longhaul; error={}; details="all 3 endpoints of \"a\\b\" are at max_runs: na?ve??X: y""#,
                code.proxy_status()
            );
            assert_eq!(head.fields.get("proxy-status"), Some(expected.as_bytes()));
            let document: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let expected = serde_json::json!({
                "type": format!("urn:longhaul:error:{}", code.as_str()),
                "title": code.title(),
                "status": code.status().as_u16(),
                "detail": "all 3 endpoints of \"a\\b\" are at max_runs: naïve\r\nX: y",
                "code": code.as_str(),
            });
            assert_eq!(document, expected);
        }
    }

    #[test]
    fn redirects() {
        let text = |value: &str| (!value.is_empty()).then(|| value.to_owned());
        for ((scheme, host, path), (authority, request_path, query), expected) in [
            (("https", "", ""), ("example.com:8080", "/a", Some("b=c")), "https://example.com/a?b=c"),
            (("http", "", ""), ("example.com:8080", "/a", None), "http://example.com:8080/a"),
            (("https", "", ""), ("[::1]:80", "/", None), "https://[::1]/"),
            (("https", "", ""), ("[::1]", "/", None), "https://[::1]/"),
            (("", "new.example:1", ""), ("example.com", "/a", Some("")), "http://new.example:1/a?"),
            (("", "", "/b"), ("example.com:8080", "/a", Some("c")), "http://example.com:8080/b?c"),
            (("", "", "/b?x"), ("example.com", "/a", Some("c")), "http://example.com/b?x&c"),
            (("https", "", ""), ("", "//evil.example", None), "/evil.example"),
            (("https", "", ""), ("example.com", "*", None), "https://example.com/"),
        ] {
            let status = StatusCode::PERMANENT_REDIRECT;
            let action = RouteAction::Redirect { scheme: text(scheme), host: text(host), path: text(path), status };
            let (head, body) = fixed(&action, &request(authority, request_path, query), &cleartext()).unwrap();
            assert_eq!(head.status, status);
            assert_eq!(head.framing, Framing::Length(0));
            assert!(body.is_empty());
            assert_eq!(String::from_utf8_lossy(head.fields.get("location").unwrap()), expected);
        }
    }

    #[test]
    fn fixed_texts() {
        let respond = |status, body: &str| {
            let action = RouteAction::Respond { status, body: body.to_owned() };
            fixed(&action, &request("a", "/", None), &cleartext()).unwrap()
        };
        let (head, body) = respond(StatusCode::NOT_FOUND, "no");
        assert_eq!((head.status, head.framing, &body[..]), (StatusCode::NOT_FOUND, Framing::Length(2), &b"no"[..]));
        assert_eq!(head.fields.get("content-type"), Some(&b"text/plain; charset=utf-8"[..]));
        let (head, body) = respond(StatusCode::NO_CONTENT, "ignored");
        assert_eq!((head.framing, body.len()), (Framing::None, 0));
        assert!(fixed(&RouteAction::Service(0), &request("a", "/", None), &cleartext()).is_none());
    }

    proptest! {
        #[test]
        fn details_are_always_a_valid_string(detail in ".{0,700}") {
            let text = proxy_status("x", &detail);
            prop_assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
            let inner = text.strip_prefix("longhaul; error=x; details=\"").unwrap().strip_suffix('"').unwrap();
            let mut characters = inner.chars();
            while let Some(character) = characters.next() {
                prop_assert!(character != '"');
                if character == '\\' {
                    prop_assert!(matches!(characters.next(), Some('"' | '\\')));
                }
            }
        }
    }
}
