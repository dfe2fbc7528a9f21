//! Routes: what of the file says which request goes where.

use http::StatusCode;
use serde_json::json;

use super::read::{Block, Kind, block, nearest};
use super::values::{
    choice, header_name, headers, host_pattern, literal_path, method, parse_authority, path_pattern, positive_duration,
    text,
};
use super::yaml::quote;
use super::{HeaderEdits, Route, RouteAction, RouteMatch, TimeoutOverrides};

/// A route as read; one whose service is not known is kept for the sake of the others' checks.
pub enum RouteTarget {
    Service(Route),
    /// Redirects or responds.
    Fixed(Route),
    Unknown,
}

impl RouteTarget {
    fn matches_all(&self) -> bool {
        match self {
            RouteTarget::Service(route) | RouteTarget::Fixed(route) => route.matches == RouteMatch::default(),
            RouteTarget::Unknown => false,
        }
    }

    pub fn into_route(self) -> Route {
        match self {
            RouteTarget::Service(route) | RouteTarget::Fixed(route) => route,
            RouteTarget::Unknown => everything_to(0),
        }
    }
}

/// The route of a file that has none.
pub fn everything_to(service: usize) -> Route {
    Route {
        label: "default".to_owned(),
        matches: RouteMatch::default(),
        action: RouteAction::Service(service),
        strip_prefix: None,
        request_headers: HeaderEdits::default(),
        response_headers: HeaderEdits::default(),
        timeouts: TimeoutOverrides::default(),
    }
}

/// The list of routes, for services of these names.
pub fn routes<'k>(services: &'k [String]) -> Kind<'k, Vec<RouteTarget>> {
    let routes = route(services).located().list().inspected(|context, routes| {
        let everything = routes.iter().position(|route| route.value.matches_all());
        if let Some(index) = everything
            && let Some(next) = routes.get(index + 1)
        {
            let message = format!("never reached: the route in line {} matches everything", routes[index].spot.line);
            context.warning(next.spot, &next.path, message);
        }
    });
    routes.map(|routes| routes.into_iter().map(|route| route.value).collect())
}

fn route<'k>(services: &'k [String]) -> Kind<'k, RouteTarget> {
    block("a route such as {match: {path: /support/**}, service: support}", move |block| {
        let about = "All conditions must hold; without any every request matches.";
        let matches = block.key("match", about, route_match(), "{}");
        let service = block.variant("service", "The service that gets the request.", text());
        let redirect = block.variant("redirect", "Answers with a redirect instead.", redirect());
        let respond = block.variant("respond", "Answers with a fixed response instead.", respond());
        let about =
            "Removed from the path before it is forwarded; also added to Location, Content-Location and cookie paths.";
        let strip_prefix = block.optional("strip_prefix", about, prefix());
        let (request_headers, response_headers) = block.key("headers", "Changes of header fields.", both_edits(), "{}");
        let timeouts = block.key("timeouts", "Overrides of the service's timeouts.", timeout_overrides(), "{}");

        let actions = ["service", "redirect", "respond"];
        let written: Vec<&str> = actions.into_iter().filter(|name| block.has(name)).collect();
        match written.as_slice() {
            [] => block.problem("", "a route needs exactly one of service, redirect and respond; it has none"),
            [_] => {}
            more => {
                let message = format!(
                    "a route needs exactly one of service, redirect and respond; it has {}",
                    more.join(" and ")
                );
                block.problem(more[1], message);
            }
        }
        if service.is_none() && !block.has("service") {
            for name in ["strip_prefix", "timeouts"] {
                if block.has(name) {
                    block.warning(name, "this has no effect: the route does not forward");
                }
            }
        }
        if let (Some(prefix), Some(path)) = (&strip_prefix, &matches.path) {
            let path = path.to_string();
            if !path.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
                block.warning(
                    "strip_prefix",
                    format!("paths that match {path} don't begin with {prefix}; only those that do lose it"),
                );
            }
        }
        let label = matches.path.as_ref().map(ToString::to_string);
        let label = label.or_else(|| matches.hosts.first().cloned()).unwrap_or_else(|| "default".to_owned());
        let with = |action| Route { label, matches, action, strip_prefix, request_headers, response_headers, timeouts };
        if let Some(name) = service {
            Some(match service_index(block, services, &name) {
                Some(index) => RouteTarget::Service(with(RouteAction::Service(index))),
                None => RouteTarget::Unknown,
            })
        } else if let Some(action) = redirect.or(respond) {
            Some(RouteTarget::Fixed(with(action)))
        } else {
            Some(RouteTarget::Unknown)
        }
    })
}

fn service_index(block: &mut Block, services: &[String], name: &str) -> Option<usize> {
    let found = services.iter().position(|service| service == name);
    if found.is_none() {
        let known = services.iter().map(String::as_str);
        let message = match nearest(name, known.clone()) {
            Some(near) => format!("there is no service {}; did you mean `{near}`?", quote(name)),
            None if services.is_empty() => format!("there is no service {}; add it to `services`", quote(name)),
            None => format!(
                "there is no service {}; the services are {}",
                quote(name),
                known.collect::<Vec<_>>().join(", ")
            ),
        };
        block.problem("service", message);
    }
    found
}

fn route_match() -> Kind<'static, RouteMatch> {
    block("a mapping with `hosts`, `path`, `methods`, `headers`", |block| {
        let about = "Any of these; *.example.com is any depth below; ports are ignored.";
        let hosts = block.key("hosts", about, host_pattern().list(), "[]");
        let about = "`*` is one segment, a final /** is the path itself and everything below.";
        let path = block.optional("path", about, path_pattern(false));
        let methods = block.key("methods", "Any of these.", method().list(), "[]");
        let headers = block.key("headers", "Each of these with exactly this value.", headers(), "{}");
        Some(RouteMatch { hosts, path, methods, headers })
    })
}

fn redirect() -> Kind<'static, RouteAction> {
    block("a redirect such as {scheme: https}", |block| {
        let about = "Kept from the request where it is not given.";
        let scheme = block.optional("scheme", about, choice(&[("http", "http"), ("https", "https")]));
        let host = block.optional("host", about, text().checked(|host| parse_authority(host).map(|_| ())));
        let path = block.optional("path", about, literal_path());
        let status = block.key("status", "301, 302, 303, 307 or 308.", redirect_status(), "308");
        let any = ["scheme", "host", "path"].into_iter().any(|name| block.has(name));
        if !any {
            block.problem("", "a redirect needs at least one of scheme, host and path, else it leads back to itself");
        }
        Some(RouteAction::Redirect { scheme: scheme.map(str::to_owned), host, path, status })
    })
}

fn redirect_status() -> Kind<'static, StatusCode> {
    const STATUSES: &[(&str, StatusCode)] = &[
        ("301", StatusCode::MOVED_PERMANENTLY),
        ("302", StatusCode::FOUND),
        ("303", StatusCode::SEE_OTHER),
        ("307", StatusCode::TEMPORARY_REDIRECT),
        ("308", StatusCode::PERMANENT_REDIRECT),
    ];
    choice(STATUSES)
}

fn respond() -> Kind<'static, RouteAction> {
    block("a response such as {status: 404, body: \"no\"}", |block| {
        let status = block.key("status", "The status code.", response_status(), "200");
        let body = block.key("body", "The body, as text/plain.", text(), "\"\"");
        if !body.is_empty() && matches!(status.as_u16(), 204 | 205 | 304) {
            block.problem("body", format!("a response of status {} has no body; remove it", status.as_u16()));
        }
        Some(RouteAction::Respond { status, body })
    })
}

fn response_status() -> Kind<'static, StatusCode> {
    Kind::scalar(
        "a status code",
        || json!({"type": ["integer", "string"], "minimum": 200, "maximum": 599}),
        |_, scalar| {
            let status = scalar.text.parse::<u16>().ok().filter(|status| (200..=599).contains(status));
            status
                .and_then(|status| StatusCode::from_u16(status).ok())
                .ok_or_else(|| format!("expected a status code from 200 to 599, found {}", quote(&scalar.text)))
        },
        |status| json!(status.as_u16()),
    )
}

fn prefix() -> Kind<'static, String> {
    literal_path().checked(|prefix| match prefix.as_str() {
        "/" => Err("this would remove nothing; leave it out".to_owned()),
        prefix if prefix.ends_with('/') => {
            Err(format!("a prefix is whole segments without a final slash; write {}", prefix.trim_end_matches('/')))
        }
        prefix if prefix.contains('*') => Err("a prefix has no patterns; write the path itself".to_owned()),
        _ => Ok(()),
    })
}

fn both_edits() -> Kind<'static, (HeaderEdits, HeaderEdits)> {
    block("a mapping with `request` and `response`", |block| {
        let request = block.key("request", "Of requests, before they are forwarded.", header_edits(), "{}");
        let response = block.key("response", "Of responses, before they reach the client.", header_edits(), "{}");
        Some((request, response))
    })
}

/// Header fields to set and to remove.
pub fn header_edits() -> Kind<'static, HeaderEdits> {
    block("a mapping with `set` and `remove`", |block| {
        let set = block.key("set", "Fields that replace any of their name.", headers(), "{}");
        let mut remove = block.key("remove", "Names of fields to remove.", header_name().list(), "[]");
        if let Some((name, _)) = set.iter().find(|(name, _)| remove.contains(name)) {
            block.problem("remove", format!("{name} is set and removed; setting it already replaces what was there"));
        }
        remove.sort_by(|left, right| left.as_str().cmp(right.as_str()));
        Some(HeaderEdits { set, remove })
    })
}

fn timeout_overrides() -> Kind<'static, TimeoutOverrides> {
    block("a mapping with `connect`, `first_byte`, `idle`", |block| {
        Some(TimeoutOverrides {
            connect: block.optional("connect", "For a connection to an endpoint.", positive_duration()),
            first_byte: block.optional("first_byte", "From dispatch to the response head.", positive_duration()),
            idle: block.optional("idle", "No byte either way for so long.", positive_duration()),
        })
    })
}
