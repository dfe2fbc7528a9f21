//! Recorded: exchanges as they were seen on the wire, put through a recogniser. For tests only.

use http::Method;

use crate::json::Extractor;
use crate::message::Fields;
use crate::protocols::{AtEnd, Fact, From, Look, Plan, Protocol, Recognised, Request, by_name, is_json};
use crate::run::{Kind, RunOutcome};
use crate::sse;

/// A request: the first line as `POST /path?query`, then fields, then an empty line and the body.
pub fn recognised_by(protocol: Option<&'static dyn Protocol>, text: &str) -> Option<Recognised> {
    let (head, body) = text.split_once("\n\n").unwrap_or((text, ""));
    let mut lines = head.lines();
    let (method, target) = lines.next().and_then(|line| line.split_once(' ')).expect("method and target");
    let method: Method = method.parse().expect("a method");
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    let mut fields = Fields::default();
    let mut upgrade = None;
    for line in lines {
        let (name, value) = line.split_once(": ").expect("a field");
        match name {
            "upgrade" => upgrade = Some(value),
            _ => fields.append(name, value.as_bytes()),
        }
    }
    if !body.is_empty() && !fields.contains("content-type") {
        fields.append("content-type", b"application/json");
    }
    let request = Request { method: &method, path, query, fields: &fields, upgrade };
    let plan = Plan::new(protocol, &request);
    let values = plan.wants(&request).filter(|_| !body.is_empty() && is_json(&fields)).map(|pointers| {
        let mut extractor = Extractor::read(pointers, body.as_bytes());
        extractor.finish();
        extractor
    });
    plan.recognise(&request, values.as_ref())
}

/// As the protocol of this name sees a request, which has to be its own.
pub fn recognised(protocol: &str, text: &str) -> Recognised {
    recognised_by(by_name(protocol), text).unwrap_or_else(|| panic!("{protocol} does not know {text}"))
}

/// Whom `auto` takes a request for; empty: for nobody's.
pub fn auto(text: &str) -> &'static str {
    recognised_by(None, text).and_then(|recognised| recognised.protocol).map_or("", Protocol::name)
}

/// Kind, session and run.
pub fn words(recognised: &Recognised) -> (Kind, Option<&str>, Option<&str>) {
    (recognised.kind, recognised.session.as_deref(), recognised.run.as_deref())
}

/// What an answer tells that ends whole. `head` is the status, then fields: `200 content-type: text/event-stream`.
pub fn told(recognised: &mut Recognised, head: &str, body: &str) -> (Vec<Fact>, AtEnd) {
    let mut facts = read(recognised, head, body);
    let end = recognised.watch.as_mut().expect("the answer is read").end(&mut facts);
    (facts, end)
}

/// What an answer tells that breaks off.
pub fn told_until_cut(recognised: &mut Recognised, head: &str, body: &str) -> Vec<Fact> {
    let mut facts = read(recognised, head, body);
    recognised.watch.as_mut().expect("the answer is read").cut(RunOutcome::Cancelled, &mut facts);
    facts
}

/// What messages of a WebSocket tell; those of the client begin with `>`.
pub fn told_by_messages(recognised: &mut Recognised, messages: &[&str]) -> Vec<Fact> {
    let mut facts = Vec::new();
    let watch = recognised.watch.as_mut().expect("the answer is read");
    assert!(matches!(watch.head(101, &Fields::default(), &mut facts), Look::Messages));
    for message in messages {
        match message.strip_prefix('>') {
            Some(text) => watch.message(From::Client, text.as_bytes(), &mut facts),
            None => watch.message(From::Endpoint, message.as_bytes(), &mut facts),
        }
    }
    facts
}

fn read(recognised: &mut Recognised, head: &str, body: &str) -> Vec<Fact> {
    let watch = recognised.watch.as_mut().expect("the answer is read");
    let (status, rest) = head.split_once(' ').unwrap_or((head, ""));
    let mut fields = Fields::default();
    for field in rest.split(", ").filter(|field| !field.is_empty()) {
        let (name, value) = field.split_once(": ").expect("a field");
        fields.append(name, value.as_bytes());
    }
    let mut facts = Vec::new();
    match watch.head(status.parse().expect("a status"), &fields, &mut facts) {
        Look::Nothing => {}
        Look::Json(pointers) => {
            let mut values = Extractor::read(pointers, body.as_bytes());
            values.finish();
            watch.body(&values, &mut facts);
        }
        Look::Events => sse::Reader::default().feed(body.as_bytes(), |event| watch.event(event, &mut facts)),
        Look::Messages => panic!("messages have a function of their own"),
    }
    facts
}
