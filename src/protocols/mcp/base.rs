//! Base: what a run remembers of its start, so that the proxy can ask about it or end it later.

use http::Method;

use crate::protocols::mcp::{STATELESS, is_stateless, version};
use crate::protocols::{BASE_BYTES_MAX, Call, Request};

/// What calls of ours need to know of a run's start.
pub struct Base<'a> {
    pub version: &'a str,
    /// What the header said; empty without.
    pub session: &'a str,
    /// Path and query.
    pub target: &'a str,
}

impl Base<'_> {
    /// Empty where it would be too long or is nothing that can be sent: then there are no calls.
    pub fn written(request: &Request<'_>) -> String {
        let session = if is_stateless(request) { None } else { request.header("mcp-session-id") };
        let (version, session) = (version(request).unwrap_or_default(), session.unwrap_or_default());
        let Some(target) = request.target() else { return String::new() };
        let length = version.len() + session.len() + target.len() + 2;
        let is_plain = [version, session].iter().all(|text| text.bytes().all(|byte| byte.is_ascii_graphic()));
        if !is_plain || length > BASE_BYTES_MAX {
            return String::new();
        }
        format!("{version}\n{session}\n{target}")
    }

    pub fn read(text: &str) -> Option<Base<'_>> {
        let mut parts = text.splitn(3, '\n');
        Some(Base { version: parts.next()?, session: parts.next()?, target: parts.next()? })
    }

    /// A message of ours to where the run was started.
    pub fn call(&self, method: &str, name: Option<&str>, body: String) -> Call {
        let mut fields = vec![("accept", "application/json, text/event-stream".to_owned())];
        if !self.version.is_empty() {
            fields.push(("mcp-protocol-version", self.version.to_owned()));
        }
        if !self.session.is_empty() {
            fields.push(("mcp-session-id", self.session.to_owned()));
        }
        if self.version == STATELESS {
            fields.push(("mcp-method", method.to_owned()));
            fields.extend(name.map(|name| ("mcp-name", header_value(name))));
        }
        Call { method: Method::POST, target: self.target.to_owned(), fields, body: body.into_bytes() }
    }
}

/// A text as `Mcp-Name` carries it: in Base64 where it is not plain, or looks as if it were.
pub fn header_value(text: &str) -> String {
    use base64::Engine;
    let is_plain = text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) && text.trim() == text;
    if is_plain && !text.starts_with(SENTINEL) {
        return text.to_owned();
    }
    format!("{SENTINEL}{}?=", base64::engine::general_purpose::STANDARD.encode(text))
}

/// The text of an `Mcp-Name`.
pub fn text_of_header(value: &str) -> Option<String> {
    use base64::Engine;
    let Some(encoded) = value.strip_prefix(SENTINEL).and_then(|rest| rest.strip_suffix("?=")) else {
        return Some(value.to_owned());
    };
    String::from_utf8(base64::engine::general_purpose::STANDARD.decode(encoded).ok()?).ok()
}

const SENTINEL: &str = "=?base64?";
