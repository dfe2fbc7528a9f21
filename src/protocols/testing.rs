//! Testing: recorded exchanges, put through a recogniser as the proxy does it.

use http::Method;

use crate::json::Extractor;
use crate::message::Fields;
use crate::protocols::{AtEnd, Fact, From, Look, Plan, Protocol, Recognised, Request};
use crate::sse;

/// A request, and who is to recognise it (`None`: auto).
pub struct Asked<'a> {
    pub protocol: Option<&'static dyn Protocol>,
    pub method: &'a str,
    pub target: &'a str,
    pub fields: &'a [(&'a str, &'a str)],
    /// JSON where it is not empty.
    pub body: &'a str,
}

impl Asked<'_> {
    /// What the exchange is.
    pub fn recognise(&self) -> Option<Recognised> {
        let method = Method::from_bytes(self.method.as_bytes()).expect("a method");
        let mut fields = fields(self.fields);
        if !self.body.is_empty() && !fields.contains("content-type") {
            fields.append("content-type", b"application/json");
        }
        let (path, query) = match self.target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (self.target, None),
        };
        let upgrade = self.fields.iter().find(|(name, _)| *name == "upgrade").map(|(_, value)| *value);
        let request = Request { method: &method, path, query, fields: &fields, upgrade };
        let plan = Plan::new(self.protocol, &request);
        let values = plan
            .wants(&request)
            .filter(|_| !self.body.is_empty())
            .map(|pointers| extract(Extractor::of(pointers.clone()), self.body));
        plan.recognise(&request, values.as_ref())
    }
}

/// What an answer tells, and what is to be thought of the run at its end.
pub fn answer(recognised: &mut Recognised, status: u16, head: &[(&str, &str)], body: &str) -> (Vec<Fact>, AtEnd) {
    let watch = recognised.watch.as_mut().expect("the answer is of interest");
    let mut facts = Vec::new();
    match watch.head(status, &fields(head), &mut facts) {
        Look::Nothing => {}
        Look::Json(pointers) => watch.body(&extract(Extractor::of(pointers.clone()), body), &mut facts),
        Look::Events => {
            let mut reader = sse::Reader::default();
            reader.feed(body.as_bytes(), |event| watch.event(event, &mut facts));
        }
        Look::Messages => {
            for line in body.lines() {
                let (from, text) = match line.strip_prefix("> ") {
                    Some(text) => (From::Client, text),
                    None => (From::Endpoint, line),
                };
                watch.message(from, text.as_bytes(), &mut facts);
            }
        }
    }
    let end = watch.end(&mut facts);
    (facts, end)
}

fn extract(mut extractor: Extractor, document: &str) -> Extractor {
    extractor.feed(document.as_bytes());
    extractor.finish();
    extractor
}

fn fields(list: &[(&str, &str)]) -> Fields {
    let mut fields = Fields::default();
    for (name, value) in list {
        fields.append(name, value.as_bytes());
    }
    fields
}
