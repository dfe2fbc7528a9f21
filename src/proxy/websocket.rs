//! WebSocket: the two ends of an Upgrade, also where the client's side is an HTTP/2 stream (RFC 6455, RFC 8441).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;

use crate::message::{Fields, RequestHead, ResponseHead, Version};

/// An extended CONNECT has no key; the HTTP/1.1 request that it becomes needs one.
pub fn add_key(fields: &mut Fields, random: &[u8; 16]) {
    fields.set("sec-websocket-key", STANDARD.encode(random).as_bytes());
    if !fields.contains("sec-websocket-version") {
        fields.append("sec-websocket-version", b"13");
    }
}

/// Checks that a 101 answers the request's Upgrade; towards HTTP/2 it becomes a 200.
pub fn check_switch(request: &RequestHead, answer: &mut ResponseHead, version: Version) -> Result<(), &'static str> {
    let asked = request.upgrade.as_deref().ok_or("the endpoint switched protocols without being asked")?;
    let given = answer.upgrade.as_deref().ok_or("the endpoint's 101 names no protocol")?;
    // The list that was offered is in order of preference (RFC 9110 section 7.8); any of it may be chosen.
    if !asked.split(',').any(|offer| offer.trim().eq_ignore_ascii_case(given.trim())) {
        return Err("the endpoint switched to a protocol that was not asked for");
    }
    if version == Version::Http2 {
        answer.status = StatusCode::OK;
        answer.upgrade = None;
        answer.fields.remove("sec-websocket-accept");
    }
    Ok(())
}
