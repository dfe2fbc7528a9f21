//! Route: what finding a route costs, where the match is the last of many.

use divan::{Bencher, black_box};
use http::{Method, StatusCode};
use longhaul::config::{HeaderEdits, PathPattern, Route, RouteAction, RouteMatch, Segment, TimeoutOverrides};
use longhaul::message::Fields;
use longhaul::proxy::route;

fn main() {
    divan::main();
}

/// `/service-N/**` on `*.example.com`, N counting up.
fn routes(count: usize) -> Vec<Route> {
    (0..count)
        .map(|index| Route {
            label: format!("/service-{index}/**"),
            matches: RouteMatch {
                hosts: vec!["*.example.com".to_owned()],
                path: Some(PathPattern { segments: vec![Segment::Literal(format!("service-{index}"))], open: true }),
                ..RouteMatch::default()
            },
            action: RouteAction::Respond { status: StatusCode::OK, body: String::new() },
            strip_prefix: None,
            request_headers: HeaderEdits::default(),
            response_headers: HeaderEdits::default(),
            timeouts: TimeoutOverrides::default(),
        })
        .collect()
}

#[divan::bench(args = [1, 10, 100, 1000])]
fn find_the_last(bencher: Bencher<'_, '_>, count: usize) {
    let routes = routes(count);
    let path = format!("/service-{}/threads/t1/runs", count - 1);
    let mut fields = Fields::default();
    fields.append("accept", b"text/event-stream");
    assert_eq!(route::find(&routes, &Method::POST, "agents.example.com:8443", &path, &fields), Some(count - 1));
    bencher.bench_local(|| {
        route::find(black_box(&routes), &Method::POST, black_box("agents.example.com:8443"), black_box(&path), &fields)
    });
}
