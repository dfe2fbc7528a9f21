//! Card: what an agent tells of itself, and that it is to be reached through the proxy.

use http::{Method, Uri};
use serde_json::Value;

use crate::protocols::Request;

/// Whether a request asks for an agent's card, where a card stands alone in the answer (A2A 1.0 section 8.2, 0.3 and
/// 0.2 section 5.3, and the extended cards of REST).
pub fn asks_for_card(request: &Request<'_>) -> bool {
    const PATHS: [&str; 4] =
        ["/.well-known/agent-card.json", "/.well-known/agent.json", "/extendedAgentCard", "/v1/card"];
    request.method == Method::GET && PATHS.iter().any(|path| request.path.ends_with(path))
}

/// A card whose URLs at the endpoint's own origin begin with `public_base` instead (`https://agents.example.com/a`,
/// without a slash at its end). `endpoint_origin` is scheme and authority: `http://10.0.0.1:9000`.
///
/// An agent often knows itself as `localhost` or `0.0.0.0`: with the endpoint's port these are its own, too. `None`:
/// nothing is to be changed, or nothing may be: a signed card would no longer be what was signed. A changed card has
/// another ETag.
pub fn rewrite_card(body: &[u8], endpoint_origin: &str, public_base: &str) -> Option<Vec<u8>> {
    let mut card: Value = serde_json::from_slice(body).ok()?;
    let is_signed = card.get("signatures").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
    if is_signed {
        return None;
    }
    let origin = Origin::of(&endpoint_origin.parse().ok()?)?;
    let mut changed = false;
    let mut rewrite = |holder: &mut Value| {
        let Some(Value::String(url)) = holder.get_mut("url") else { return };
        let Some(path) = own_path(url, &origin) else { return };
        *url = format!("{}{path}", public_base.trim_end_matches('/'));
        changed = true;
    };
    rewrite(&mut card);
    for list in ["supportedInterfaces", "additionalInterfaces"] {
        card.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten().for_each(&mut rewrite);
    }
    changed.then(|| card.to_string().into_bytes())
}

/// Path and query of a URL at this origin.
fn own_path(url: &str, origin: &Origin) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    if !origin.has(&Origin::of(&uri)?) {
        return None;
    }
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    // A card's URL without a path stays one without.
    let is_bare = path == "/" && !url.ends_with('/');
    Some(if is_bare { String::new() } else { path.to_owned() })
}

#[derive(PartialEq, Eq)]
struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Origin {
    fn of(uri: &Uri) -> Option<Origin> {
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let port = match (uri.port_u16(), scheme.as_str()) {
            (Some(port), _) => port,
            (None, "https") => 443,
            (None, "http") => 80,
            _ => return None,
        };
        Some(Origin { host: uri.host()?.to_ascii_lowercase(), scheme, port })
    }

    fn has(&self, other: &Origin) -> bool {
        let names_itself = matches!(other.host.as_str(), "localhost" | "127.0.0.1" | "[::1]" | "0.0.0.0" | "[::]");
        *self == *other || (names_itself && self.scheme == other.scheme && self.port == other.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Fields;

    fn rewritten(card: &str) -> Option<Value> {
        let body = rewrite_card(card.as_bytes(), "http://10.0.0.1:9000", "https://agents.example.com/a/")?;
        Some(serde_json::from_slice(&body).expect("a card is JSON"))
    }

    #[test]
    fn own_urls_lead_through_the_proxy_and_all_else_stays() {
        let first = r#"{"name":"é","version":"1.10","supportedInterfaces":[
            {"url":"http://10.0.0.1:9000/","protocolBinding":"JSONRPC","protocolVersion":"1.0","tenant":"t"},
            {"url":"http://localhost:9000/rest?x=1","protocolBinding":"HTTP+JSON"},
            {"url":"http://localhost:9001/rest"},{"url":"https://10.0.0.1:9000/x"},{"url":"10.0.0.1:9002"},
            {"url":7},{"x":1},null],"provider":{"url":"http://10.0.0.1:9000/about"},"iconUrl":"http://10.0.0.1:9000/i"}"#;
        let card = rewritten(first).expect("it has own URLs");
        let mut expected: Value = serde_json::from_str(first).expect("JSON");
        expected["supportedInterfaces"][0]["url"] = "https://agents.example.com/a/".into();
        expected["supportedInterfaces"][1]["url"] = "https://agents.example.com/a/rest?x=1".into();
        assert_eq!(card, expected);

        let before = r#"{"url":"HTTP://0.0.0.0:9000","preferredTransport":"JSONRPC","signatures":[],
            "additionalInterfaces":[{"url":"http://10.0.0.1:9000/v1","transport":"HTTP+JSON"}]}"#;
        let card = rewritten(before).expect("it has own URLs");
        assert_eq!(card["url"], "https://agents.example.com/a");
        assert_eq!(card["additionalInterfaces"][0]["url"], "https://agents.example.com/a/v1");
    }

    #[test]
    fn signed_and_foreign_cards_are_untouched() {
        for card in [
            r#"{"url":"http://10.0.0.1:9000/","signatures":[{"protected":"e","signature":"s"}]}"#,
            r#"{"url":"http://elsewhere.example/"}"#,
            r#"{"url":"http://10.0.0.1/"}"#,
            r#"{"url":"http://user@10.0.0.10:9000/"}"#,
            r#"{"url":"","supportedInterfaces":{}}"#,
            "[]",
            "null",
            "{",
            "",
        ] {
            assert_eq!(rewritten(card), None, "{card}");
        }
    }

    #[test]
    fn cards_are_asked_for_at_known_paths() {
        for (method, path, asks) in [
            (Method::GET, "/.well-known/agent-card.json", true),
            (Method::GET, "/rest/.well-known/agent.json", true),
            (Method::GET, "/tenant/extendedAgentCard", true),
            (Method::GET, "/v1/card", true),
            (Method::HEAD, "/.well-known/agent-card.json", false),
            (Method::GET, "/agent-card.json", false),
        ] {
            let fields = Fields::default();
            let request = Request { method: &method, path, query: None, fields: &fields, upgrade: None };
            assert_eq!(asks_for_card(&request), asks, "{method} {path}");
        }
    }
}
