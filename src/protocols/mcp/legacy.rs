//! Legacy: HTTP+SSE of 2024-11-05, where a GET stream names the address to which messages are posted, and answers them.

use http::Method;

use crate::protocols::{Request, key};

/// The query parameters by which servers name a session (Python's, TypeScript's).
const PARAMETERS: [&str; 2] = ["session_id", "sessionId"];

/// The session in the address of a POST.
pub fn session(request: &Request<'_>) -> Option<String> {
    PARAMETERS.iter().find_map(|name| request.query_value(name)).as_deref().and_then(key)
}

/// A POST to an address as such streams name it.
pub fn is_message(request: &Request<'_>) -> bool {
    *request.method == Method::POST && request.path.contains("message") && session(request).is_some()
}

/// The session that an `endpoint` event names.
pub fn session_of_event(data: &[u8]) -> Option<String> {
    let (_, query) = std::str::from_utf8(data).ok()?.trim().split_once('?')?;
    let query = query.split('#').next()?;
    let value = query.split('&').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        PARAMETERS.contains(&name).then_some(value)
    })?;
    key(&percent_encoding::percent_decode_str(value).decode_utf8_lossy())
}

/// The data of an `endpoint` event for clients that see the server below `prefix` (a route's `strip_prefix`). `None`: it
/// stays as it is, because it is relative to the stream's own address, or no address.
pub fn rewrite_endpoint_event(data: &[u8], prefix: &str) -> Option<Vec<u8>> {
    let prefix = prefix.trim_end_matches('/');
    let text = std::str::from_utf8(data).ok()?;
    if prefix.is_empty() || text.bytes().any(|byte| byte.is_ascii_control()) {
        return None;
    }
    let address = text.trim_start();
    // `//host/path` and `http://host/path` have a path, too, behind the host.
    let path_at = match address.find("//") {
        Some(0) => address[2..].find(['/', '?', '#']).map_or(address.len(), |length| 2 + length),
        Some(at) if address[..at].ends_with(':') && !address[..at].contains(['/', '?', '#']) => {
            address[at + 2..].find(['/', '?', '#']).map_or(address.len(), |length| at + 2 + length)
        }
        _ if address.starts_with('/') => 0,
        _ => return None,
    };
    Some([&address[..path_at], prefix, &address[path_at..]].concat().into_bytes())
}
