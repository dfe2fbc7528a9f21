//! Edits: the configured changes of heads (fields, path prefix, Host), and what a changed path means for the answer.

use std::borrow::Cow;

use crate::config::{EndpointHost, EndpointUrl, HeaderEdits, HostPolicy};
use crate::message::Fields;

/// Removes, then sets, as configured. Names that say where a message ends or which hop it is for are left alone: these
/// are never fields here, and one let in would be read as framing by whoever comes next.
pub fn apply(edits: &HeaderEdits, fields: &mut Fields) {
    for name in &edits.remove {
        fields.remove(name.as_str());
    }
    for (name, value) in &edits.set {
        if !is_framing(name.as_str()) {
            fields.set(name.as_str(), value.as_bytes());
        }
    }
}

/// True for `longhaul-*`: names that only we may write, in either direction.
pub fn is_own(name: &[u8]) -> bool {
    name.get(..OWN_PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(OWN_PREFIX))
}

/// By which an endpoint says, with any answer, that it drains (`1`) or does not any more (`0`).
const DRAIN_HEADER: &[u8] = b"longhaul-drain";

/// Removes the `longhaul-*` fields of an endpoint's answer, so that clients can believe ours; what it said of its own
/// drain, if it did.
pub fn remove_own(fields: &mut Fields) -> Option<bool> {
    let mut drains = None;
    fields.retain(|name, value| {
        if is_own(name) && name.eq_ignore_ascii_case(DRAIN_HEADER) {
            drains = match value {
                b"1" => Some(true),
                b"0" => Some(false),
                _ => drains,
            };
        }
        !is_own(name)
    });
    drains
}

/// The path below `prefix`, beginning with `/`; `None` if the path is not below it. Only whole segments count:
/// `/support` is a prefix of `/support/x` and `/support`, not of `/supporters`.
pub fn strip_prefix<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    let rest = path.strip_prefix(prefix.trim_end_matches('/'))?;
    match rest.as_bytes().first() {
        Some(b'/') => Some(rest),
        None => Some("/"),
        Some(_) => None,
    }
}

/// What the client and the endpoint each call the place from which an answer comes, for a route with `strip_prefix`.
#[derive(Clone, Copy, Debug)]
pub struct PrefixRewrite<'a> {
    /// The route's `strip_prefix`.
    pub prefix: &'a str,
    /// `http` or `https`, as the client sees it.
    pub scheme: &'a str,
    /// The authority of the client's request.
    pub authority: &'a str,
    /// The Host that was sent to the endpoint.
    pub sent_host: &'a str,
    pub endpoint: &'a EndpointUrl,
}

/// Gives the prefix back to what an answer says about its own place: `Location`, `Content-Location` and the `Path` of
/// cookies. URLs of other hosts and relative references stay. Do this before adding fields of our own.
pub fn rewrite_answer(fields: &mut Fields, rewrite: &PrefixRewrite<'_>) {
    let prefix = rewrite.prefix.trim_end_matches('/');
    if prefix.is_empty() {
        return;
    }
    let is_affected = |name: &[u8]| REWRITTEN.iter().any(|affected| name.eq_ignore_ascii_case(affected.as_bytes()));
    if !fields.iter().any(|(name, _)| is_affected(name)) {
        return;
    }
    let mut rewritten = Fields::default();
    for (name, value) in fields.iter() {
        let changed = if !is_affected(name) {
            None
        } else if name.eq_ignore_ascii_case(b"set-cookie") {
            rewrite_cookie(value, prefix)
        } else {
            rewrite_reference(value, prefix, rewrite)
        };
        rewritten.push(name, changed.as_deref().unwrap_or(value));
    }
    *fields = rewritten;
}

/// The Host to send to an endpoint. A request without one (HTTP/1.0) gets the endpoint's own under `preserve`.
pub fn host_for<'a>(policy: &'a HostPolicy, authority: &'a str, endpoint: &'a EndpointUrl) -> Cow<'a, [u8]> {
    match policy {
        HostPolicy::Literal(host) => Cow::Borrowed(host.as_bytes()),
        HostPolicy::Preserve if !authority.is_empty() => Cow::Borrowed(authority.as_bytes()),
        HostPolicy::Preserve | HostPolicy::Endpoint => match endpoint {
            EndpointUrl::Unix(_) => Cow::Borrowed(b"localhost"),
            EndpointUrl::Tcp { https, host: EndpointHost::Name(name), port } if *port == default_port(*https) => {
                Cow::Borrowed(name.as_bytes())
            }
            EndpointUrl::Tcp { https, host: EndpointHost::Ip(ip), port } if *port == default_port(*https) => {
                let host = if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() };
                Cow::Owned(host.into_bytes())
            }
            EndpointUrl::Tcp { .. } => Cow::Owned(endpoint.address().into_bytes()),
        },
    }
}

const OWN_PREFIX: &[u8] = b"longhaul-";

const REWRITTEN: [&str; 3] = ["location", "content-location", "set-cookie"];

fn is_framing(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "content-length"
            | "expect"
            | "host"
            | "keep-alive"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
    )
}

fn default_port(https: bool) -> u16 {
    if https { 443 } else { 80 }
}

/// `None` where it stays as it is.
fn rewrite_reference(value: &[u8], prefix: &str, rewrite: &PrefixRewrite<'_>) -> Option<Vec<u8>> {
    let value = std::str::from_utf8(value).ok()?;
    if value.starts_with('/') && !value.starts_with("//") {
        return Some([prefix, value].concat().into_bytes());
    }
    // `//host/path` has no scheme, else it is as an absolute URL.
    let (scheme, rest) = match value.split_once("//") {
        Some(("", rest)) => (None, rest),
        Some((scheme, rest)) => (Some(scheme.strip_suffix(':')?), rest),
        None => return None,
    };
    let https = match scheme {
        Some(scheme) if scheme.eq_ignore_ascii_case("https") => true,
        Some(scheme) if scheme.eq_ignore_ascii_case("http") => false,
        Some(_) => return None,
        None => rewrite.scheme == "https",
    };
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let slash = if tail.starts_with('/') { "" } else { "/" };
    if same_authority(authority, rewrite.authority, https) {
        let start = &value[..value.len() - tail.len()];
        return Some([start, prefix, slash, tail].concat().into_bytes());
    }
    let is_endpoint = same_authority(authority, &rewrite.endpoint.address(), https)
        || same_authority(authority, rewrite.sent_host, https);
    if !is_endpoint {
        return None;
    }
    if rewrite.authority.is_empty() {
        return Some([prefix, slash, tail].concat().into_bytes());
    }
    Some([rewrite.scheme, "://", rewrite.authority, prefix, slash, tail].concat().into_bytes())
}

/// Compares two authorities; a missing port is the scheme's.
fn same_authority(one: &str, other: &str, https: bool) -> bool {
    fn split(authority: &str) -> (&str, &str) {
        match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port),
            _ => (authority, ""),
        }
    }
    let default = if https { "443" } else { "80" };
    let port = |port: &str| if port.is_empty() { default.to_owned() } else { port.to_owned() };
    let ((one_host, one_port), (other_host, other_port)) = (split(one), split(other));
    !one_host.is_empty() && one_host.eq_ignore_ascii_case(other_host) && port(one_port) == port(other_port)
}

/// `None` where the cookie has no Path below which ours could lie.
fn rewrite_cookie(value: &[u8], prefix: &str) -> Option<Vec<u8>> {
    let mut rewritten = Vec::with_capacity(value.len() + prefix.len());
    let mut is_changed = false;
    for (index, part) in value.split(|byte| *byte == b';').enumerate() {
        if index > 0 {
            rewritten.push(b';');
        }
        let path = (index > 0).then(|| cookie_path(part)).flatten();
        match path {
            Some(path) => {
                is_changed = true;
                rewritten.extend_from_slice(b" Path=");
                rewritten.extend_from_slice(prefix.as_bytes());
                // `Path=/support` covers `/support` too, `Path=/support/` would not.
                rewritten.extend_from_slice(if path == b"/" { b"" } else { path });
            }
            None => rewritten.extend_from_slice(part),
        }
    }
    is_changed.then_some(rewritten)
}

/// The value of an attribute ` Path=/x`.
fn cookie_path(attribute: &[u8]) -> Option<&[u8]> {
    let equals = memchr::memchr(b'=', attribute)?;
    let (name, value) = (attribute[..equals].trim_ascii(), attribute[equals + 1..].trim_ascii());
    (name.eq_ignore_ascii_case(b"path") && value.starts_with(b"/")).then_some(value)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    fn endpoint(https: bool, host: &str, port: u16) -> EndpointUrl {
        let host = match host.parse() {
            Ok(ip) => EndpointHost::Ip(ip),
            Err(_) => EndpointHost::Name(host.to_owned()),
        };
        EndpointUrl::Tcp { https, host, port }
    }

    fn rewritten(name: &str, value: &str) -> String {
        let mut fields = Fields::default();
        fields.append("server", b"agent");
        fields.append(name, value.as_bytes());
        let endpoint = endpoint(false, "10.0.0.11", 8000);
        let rewrite = PrefixRewrite {
            prefix: "/support/",
            scheme: "https",
            authority: "example.com",
            sent_host: "internal.example",
            endpoint: &endpoint,
        };
        rewrite_answer(&mut fields, &rewrite);
        assert_eq!(fields.iter().next(), Some((&b"server"[..], &b"agent"[..])));
        String::from_utf8(fields.get(name).unwrap().to_vec()).unwrap()
    }

    #[test]
    fn fields_are_removed_then_set() {
        let name = |text: &str| text.parse::<HeaderName>().unwrap();
        let edits = HeaderEdits {
            set: vec![
                (name("x-a"), HeaderValue::from_static("new")),
                (name("transfer-encoding"), HeaderValue::from_static("chunked")),
            ],
            remove: vec![name("x-b"), name("x-a")],
        };
        let mut fields = Fields::default();
        for name in ["X-A", "X-B", "x-b", "x-c"] {
            fields.append(name, b"old");
        }
        apply(&edits, &mut fields);
        let list: Vec<_> = fields.iter().collect();
        assert_eq!(list, [(&b"x-c"[..], &b"old"[..]), (&b"x-a"[..], &b"new"[..])]);
    }

    #[test]
    fn our_own_names_are_removed_from_answers() {
        let mut fields = Fields::default();
        for name in ["Longhaul-Affinity", "longhaul-", "longhaul", "x-longhaul-a"] {
            fields.append(name, b"");
        }
        assert_eq!(remove_own(&mut fields), None);
        assert_eq!(fields.iter().map(|(name, _)| name).collect::<Vec<_>>(), [&b"longhaul"[..], b"x-longhaul-a"]);

        for (value, drains) in [("1", Some(true)), ("0", Some(false)), ("yes", None)] {
            let mut fields = Fields::default();
            fields.append("Longhaul-Drain", value.as_bytes());
            assert_eq!(remove_own(&mut fields), drains, "{value}");
            assert_eq!(fields.len(), 0);
        }
    }

    #[test]
    fn prefixes_are_whole_segments() {
        for (path, prefix, expected) in [
            ("/support/x", "/support", Some("/x")),
            ("/support", "/support", Some("/")),
            ("/support/", "/support", Some("/")),
            ("/support/x", "/support/", Some("/x")),
            ("/support", "/support/", Some("/")),
            ("/supporters", "/support", None),
            ("/other", "/support", None),
            ("/a/b/c", "/a/b", Some("/c")),
            ("/a", "/", Some("/a")),
            ("*", "/support", None),
        ] {
            assert_eq!(strip_prefix(path, prefix), expected, "{path} {prefix}");
        }
    }

    #[test]
    fn locations() {
        for (value, expected) in [
            ("/x?y#z", "/support/x?y#z"),
            ("/", "/support/"),
            ("x/y", "x/y"),
            ("../x", "../x"),
            ("?y", "?y"),
            ("", ""),
            ("https://example.com/x", "https://example.com/support/x"),
            ("https://EXAMPLE.com:443/x", "https://EXAMPLE.com:443/support/x"),
            ("https://example.com", "https://example.com/support/"),
            ("https://example.com?y", "https://example.com/support/?y"),
            ("https://example.com:8443/x", "https://example.com:8443/x"),
            ("//example.com/x", "//example.com/support/x"),
            ("//elsewhere.com/x", "//elsewhere.com/x"),
            ("http://10.0.0.11:8000/x", "https://example.com/support/x"),
            ("http://10.0.0.11:8000", "https://example.com/support/"),
            ("http://10.0.0.11/x", "http://10.0.0.11/x"),
            ("http://internal.example/x?a=//b", "https://example.com/support/x?a=//b"),
            ("https://elsewhere.com/x", "https://elsewhere.com/x"),
            ("https://elsewhere.com/?next=//example.com/x", "https://elsewhere.com/?next=//example.com/x"),
            ("ftp://example.com/x", "ftp://example.com/x"),
            ("mailto:a@example.com", "mailto:a@example.com"),
        ] {
            assert_eq!(rewritten("Location", value), expected, "{value}");
            assert_eq!(rewritten("content-location", value), expected, "{value}");
        }
        assert_eq!(rewritten("link", "/x"), "/x");
    }

    #[test]
    fn cookie_paths() {
        for (value, expected) in [
            ("a=1; Path=/; HttpOnly", "a=1; Path=/support; HttpOnly"),
            ("a=1; path=/x", "a=1; Path=/support/x"),
            ("a=1;PATH = /x ;Secure", "a=1; Path=/support/x;Secure"),
            ("a=1; HttpOnly", "a=1; HttpOnly"),
            ("a=1; Path=x", "a=1; Path=x"),
            ("a=1; Path", "a=1; Path"),
            ("path=/x", "path=/x"),
        ] {
            assert_eq!(rewritten("Set-Cookie", value), expected, "{value}");
        }
    }

    #[test]
    fn hosts_by_policy() {
        let text = |policy: HostPolicy, authority: &str, endpoint: EndpointUrl| {
            String::from_utf8(host_for(&policy, authority, &endpoint).into_owned()).unwrap()
        };
        let literal = HostPolicy::Literal("agents.example".to_owned());
        assert_eq!(text(HostPolicy::Preserve, "a:1", endpoint(false, "h", 80)), "a:1");
        assert_eq!(text(HostPolicy::Preserve, "", endpoint(false, "h", 8000)), "h:8000");
        assert_eq!(text(literal, "a", endpoint(false, "h", 80)), "agents.example");
        assert_eq!(text(HostPolicy::Endpoint, "a", endpoint(false, "h", 80)), "h");
        assert_eq!(text(HostPolicy::Endpoint, "a", endpoint(true, "h", 80)), "h:80");
        assert_eq!(text(HostPolicy::Endpoint, "a", endpoint(true, "10.0.0.1", 443)), "10.0.0.1");
        assert_eq!(text(HostPolicy::Endpoint, "a", endpoint(false, "::1", 80)), "[::1]");
        assert_eq!(text(HostPolicy::Endpoint, "a", endpoint(false, "::1", 8000)), "[::1]:8000");
        assert_eq!(text(HostPolicy::Endpoint, "a", EndpointUrl::Unix(PathBuf::from("/x"))), "localhost");
    }

    proptest! {
        #[test]
        fn a_stripped_path_and_its_prefix_make_the_path_again(rest in "(/[a-z]{0,3}){0,4}") {
            let path = format!("/support{rest}");
            let stripped = strip_prefix(&path, "/support").unwrap();
            prop_assert!(stripped.starts_with('/'));
            let whole = format!("/support{stripped}");
            prop_assert!(whole == path || (rest.is_empty() && whole == "/support/"));
        }

        #[test]
        fn no_answer_panics(value in "[ -~]{0,40}|(https?:)?//[a-z:\\[\\]]{0,6}[/?#]?[ -~]{0,9}") {
            rewritten("location", &value);
            rewritten("set-cookie", &value);
        }
    }
}
