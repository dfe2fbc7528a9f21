//! Route: finds the first route that a request matches; also the matching of paths and header conditions for others.

use http::{HeaderName, HeaderValue, Method};

use crate::config::{Route, RouteMatch};
use crate::message::Fields;

/// The index of the first route whose conditions all hold. `host` is the request's authority, its port is ignored;
/// `path` is the normalised path without query.
pub fn find(routes: &[Route], method: &Method, host: &str, path: &str, fields: &Fields) -> Option<usize> {
    // Most configurations ask for no host.
    let host = if routes.iter().all(|route| route.matches.hosts.is_empty()) { "" } else { host_without_port(host) };
    routes.iter().position(|route| matches(&route.matches, method, host, path, fields))
}

/// True if for every condition one of the request's fields of that name has that value.
pub fn matches_headers(conditions: &[(HeaderName, HeaderValue)], fields: &Fields) -> bool {
    conditions.iter().all(|(name, value)| fields.get_all(name.as_str()).any(|sent| sent == value.as_bytes()))
}

fn matches(conditions: &RouteMatch, method: &Method, host: &str, path: &str, fields: &Fields) -> bool {
    (conditions.methods.is_empty() || conditions.methods.contains(method))
        && conditions.path.as_ref().is_none_or(|pattern| pattern.matches(path))
        && (conditions.hosts.is_empty() || conditions.hosts.iter().any(|pattern| matches_host(pattern, host)))
        && matches_headers(&conditions.headers, fields)
}

fn matches_host(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some("") => true,
        // `suffix` begins with the dot, so `*.example.com` takes neither `example.com` nor `badexample.com`.
        Some(suffix) => host
            .len()
            .checked_sub(suffix.len())
            .is_some_and(|start| start > 0 && host.as_bytes()[start..].eq_ignore_ascii_case(suffix.as_bytes())),
        None => pattern.eq_ignore_ascii_case(host),
    }
}

/// The host of an authority: no port, no final dot; an IPv6 address keeps its brackets.
fn host_without_port(authority: &str) -> &str {
    let host = match authority.rsplit_once(':') {
        // A colon inside the brackets of an IPv6 address is no port's.
        Some((host, port)) if !port.ends_with(']') => host,
        _ => authority,
    };
    host.strip_suffix('.').unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use http::StatusCode;
    use proptest::prelude::*;

    use super::*;
    use crate::config::{HeaderEdits, PathPattern, RouteAction, TimeoutOverrides};

    fn pattern(text: &str) -> PathPattern {
        text.parse().expect("a pattern")
    }

    fn route(matches: RouteMatch) -> Route {
        Route {
            label: String::new(),
            matches,
            action: RouteAction::Respond { status: StatusCode::OK, body: String::new() },
            strip_prefix: None,
            request_headers: HeaderEdits::default(),
            response_headers: HeaderEdits::default(),
            timeouts: TimeoutOverrides::default(),
        }
    }

    #[test]
    fn paths() {
        for (text, path, expected) in [
            ("/", "/", true),
            ("/", "/x", false),
            ("/**", "/", true),
            ("/**", "/x/y", true),
            ("/**", "*", true),
            ("/x", "*", false),
            ("/x", "/x", true),
            ("/x", "/x/", false),
            ("/x", "/X", false),
            ("/x", "/xy", false),
            ("/x/", "/x/", true),
            ("/x/", "/x", false),
            ("/x/**", "/x", true),
            ("/x/**", "/x/", true),
            ("/x/**", "/x/y/z", true),
            ("/x/**", "/xy", false),
            ("/x/**", "/y/x", false),
            ("/a/*", "/a/b", true),
            ("/a/*", "/a/", false),
            ("/a/*", "/a", false),
            ("/a/*", "/a/b/c", false),
            ("/a/*/c", "/a/b/c", true),
            ("/a/*/c", "/a//c", false),
            ("/*/b/**", "/a/b", true),
            ("/*/b/**", "/a/c", false),
            ("/a%20b", "/a%20b", true),
        ] {
            assert_eq!(pattern(text).matches(path), expected, "{text} and {path}");
        }
    }

    #[test]
    fn the_session_is_captured() {
        let threads: PathPattern = "/threads/{session}/**".parse().expect("a pattern");
        assert_eq!(threads.capture("/threads/t1/runs"), Some("t1"));
        assert_eq!(threads.capture("/threads/t1"), Some("t1"));
        assert_eq!(threads.capture("/threads/"), None);
        assert_eq!(pattern("/**").capture("/threads/t1"), None);
    }

    #[test]
    fn hosts() {
        for (pattern, host, expected) in [
            ("example.com", "example.com", true),
            ("example.com", "EXAMPLE.com:8080", true),
            ("example.com", "example.com.", true),
            ("example.com", "example.com.:80", true),
            ("example.com", "a.example.com", false),
            ("*.example.com", "a.example.com", true),
            ("*.example.com", "b.A.Example.com:1", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", ".example.com", false),
            ("*.example.com", "badexample.com", false),
            ("*.example.com", "é.example.com", true),
            ("*", "anything", true),
            ("[::1]", "[::1]:8080", true),
            ("[::1]", "[::1]", true),
            ("[::1]", "[::2]", false),
            ("127.0.0.1", "127.0.0.1:80", true),
            ("example.com", "", false),
        ] {
            let routes = [route(RouteMatch { hosts: vec![pattern.to_owned()], ..RouteMatch::default() })];
            let found = find(&routes, &Method::GET, host, "/", &Fields::default());
            assert_eq!(found.is_some(), expected, "{pattern} and {host}");
        }
    }

    #[test]
    fn the_first_route_whose_conditions_all_hold_wins() {
        let routes = [
            route(RouteMatch {
                methods: vec![Method::POST],
                path: Some(pattern("/support/**")),
                headers: vec![(HeaderName::from_static("x-tier"), HeaderValue::from_static("gold"))],
                ..RouteMatch::default()
            }),
            route(RouteMatch { path: Some(pattern("/support/**")), ..RouteMatch::default() }),
            route(RouteMatch::default()),
        ];
        let mut gold = Fields::default();
        gold.append("X-Tier", b"silver");
        gold.append("X-Tier", b"gold");
        let none = Fields::default();
        assert_eq!(find(&routes, &Method::POST, "a", "/support/x", &gold), Some(0));
        assert_eq!(find(&routes, &Method::GET, "a", "/support/x", &gold), Some(1));
        assert_eq!(find(&routes, &Method::POST, "a", "/support/x", &none), Some(1));
        assert_eq!(find(&routes, &Method::POST, "a", "/other", &gold), Some(2));
        assert_eq!(find(&routes[..2], &Method::POST, "a", "/other", &gold), None);
    }

    proptest! {
        #[test]
        fn no_input_panics(host in ".{0,20}", path in ".{0,20}") {
            let routes = [route(RouteMatch {
                hosts: vec!["*.example.com".to_owned(), "a".to_owned()],
                path: Some(pattern("/a/*/{session}/**")),
                ..RouteMatch::default()
            })];
            find(&routes, &Method::GET, &host, &path, &Fields::default());
            host_without_port(&host);
        }
    }
}
