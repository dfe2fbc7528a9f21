//! Route: finds the first route that a request matches; also the matching of paths and header conditions for others.

use http::{HeaderName, HeaderValue, Method};

use crate::config::{PathPattern, Route, RouteMatch, Segment};
use crate::message::Fields;

/// What a path pattern captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Captures<'a> {
    /// The segment at `{session}`.
    pub session: Option<&'a str>,
}

/// The index of the first route whose conditions all hold. `host` is the request's authority, its port is ignored;
/// `path` is the normalised path without query.
pub fn find(routes: &[Route], method: &Method, host: &str, path: &str, fields: &Fields) -> Option<usize> {
    let host = host_without_port(host);
    routes.iter().position(|route| matches(&route.matches, method, host, path, fields))
}

/// Matches a whole path. `*` and `{session}` take one segment that is not empty; an open pattern (`/x/**`) also takes
/// `/x` itself. Case-sensitive.
pub fn matches_path<'a>(pattern: &PathPattern, path: &'a str) -> Option<Captures<'a>> {
    let mut captures = Captures::default();
    // `*` (of OPTIONS) has no leading slash and only matches what matches everything.
    let mut rest = path.strip_prefix('/');
    for segment in &pattern.segments {
        let (found, after) = match rest?.split_once('/') {
            Some((found, after)) => (found, Some(after)),
            None => (rest?, None),
        };
        match segment {
            Segment::Literal(literal) if literal != found => return None,
            Segment::Literal(_) => {}
            Segment::Any | Segment::Session if found.is_empty() => return None,
            Segment::Any => {}
            Segment::Session => captures.session = Some(found),
        }
        rest = after;
    }
    // A pattern without segments that is not open is `/`: nothing may follow its slash.
    let is_whole = if pattern.segments.is_empty() { rest == Some("") } else { rest.is_none() };
    (pattern.open || is_whole).then_some(captures)
}

/// True if for every condition one of the request's fields of that name has that value.
pub fn matches_headers(conditions: &[(HeaderName, HeaderValue)], fields: &Fields) -> bool {
    conditions.iter().all(|(name, value)| fields.get_all(name.as_str()).any(|sent| sent == value.as_bytes()))
}

fn matches(conditions: &RouteMatch, method: &Method, host: &str, path: &str, fields: &Fields) -> bool {
    (conditions.methods.is_empty() || conditions.methods.contains(method))
        && conditions.path.as_ref().is_none_or(|pattern| matches_path(pattern, path).is_some())
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
    use crate::config::{HeaderEdits, RouteAction, TimeoutOverrides};

    fn pattern(text: &str) -> PathPattern {
        let (text, open) = match text.strip_suffix("/**") {
            Some(text) => (text, true),
            None => (text, false),
        };
        let segments = text.split('/').skip(1).filter(|_| text != "/").map(|segment| match segment {
            "*" => Segment::Any,
            "{session}" => Segment::Session,
            literal => Segment::Literal(literal.to_owned()),
        });
        PathPattern { segments: segments.collect(), open }
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
            assert_eq!(matches_path(&pattern(text), path).is_some(), expected, "{text} and {path}");
        }
    }

    #[test]
    fn the_session_is_captured() {
        let threads = pattern("/threads/{session}/**");
        assert_eq!(matches_path(&threads, "/threads/t1/runs"), Some(Captures { session: Some("t1") }));
        assert_eq!(matches_path(&threads, "/threads/t1"), Some(Captures { session: Some("t1") }));
        assert_eq!(matches_path(&threads, "/threads/"), None);
        assert_eq!(matches_path(&pattern("/**"), "/threads/t1"), Some(Captures { session: None }));
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

    /// The same by a way that is slow and obvious: both as lists.
    fn matches_by_lists(pattern: &PathPattern, path: &str) -> bool {
        let Some(path) = path.strip_prefix('/') else { return pattern.segments.is_empty() && pattern.open };
        let found: Vec<&str> =
            if path.is_empty() && pattern.segments.is_empty() { vec![] } else { path.split('/').collect() };
        let long_enough = found.len() >= pattern.segments.len();
        let short_enough = pattern.open || found.len() == pattern.segments.len();
        long_enough
            && short_enough
            && pattern.segments.iter().zip(&found).all(|(segment, found)| match segment {
                Segment::Literal(literal) => literal == found,
                Segment::Any | Segment::Session => !found.is_empty(),
            })
    }

    proptest! {
        #[test]
        fn paths_match_as_lists_of_segments_do(
            segments in proptest::collection::vec(prop_oneof!["[ab]{0,2}".prop_map(Segment::Literal), Just(Segment::Any)], 0..4),
            open: bool,
            path in "(/[ab]{0,2}){1,5}|\\*",
        ) {
            let pattern = PathPattern { segments, open };
            prop_assert_eq!(matches_path(&pattern, &path).is_some(), matches_by_lists(&pattern, &path));
        }

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
