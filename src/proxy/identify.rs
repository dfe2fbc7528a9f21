//! Step 5, identify: which session an exchange belongs to, and what it is to a run.

use std::future::poll_fn;
use std::hash::Hasher;
use std::task::Poll;

use bytes::Bytes;
use http::Method;
use siphasher::sip128::{Hasher128, SipHasher13};

use crate::config::{self, KeySource};
use crate::json::{Extractor, Progress};
use crate::message::{Fields, RequestHead, ResponseHead};
use crate::net::cookie::CookieSession;
use crate::protocols::{self, Plan, Protocol, Recognised};
use crate::proxy::edits;
use crate::proxy::observe::Observer;
use crate::proxy::peer::{Next, Peer, SourceFault};
use crate::proxy::timer::Timer;
use crate::snapshot::{Recognition, Service};
use crate::state::Kind;
use crate::state::sessions::SessionKey;

/// How much of a request body is read ahead to find a session key. What lies behind it is not looked at.
pub const LOOK_AHEAD_BYTES_MAX: usize = 256 * 1024;

/// How long that part of a body may take; then it goes on without.
const LOOK_AHEAD_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);

/// Session keys longer than this are no keys.
const KEY_BYTES_MAX: usize = 1024;

/// What is known of an exchange before an endpoint is picked.
pub struct Identity {
    pub kind: Kind,
    pub key: Option<SessionKey>,
    /// The proxy's own cookie, where the client sent one.
    pub cookie: Option<Box<CookieSession>>,
    /// The principal's digest, for keys that the answer will tell.
    pub scope: Option<[u8; 16]>,
    /// That is the digest of nothing: the request has none of the values that tell principals apart.
    pub anonymous: bool,
    /// To whom the proxy's own cookie belongs, as [`crate::net::cookie::Sealer`] wants it.
    pub principal: Vec<u8>,
    /// The key is a new one of ours: the client is to be given it as a cookie.
    pub issue_cookie: bool,
    /// What the exchange is to the protocol that recognised it; `None`: it is plain HTTP.
    pub recognised: Option<Recognised>,
}

/// What a request is to a run under plain HTTP.
fn kind(service: &config::Service, request: &protocols::Request<'_>) -> Kind {
    let start = match &service.runs.matches {
        Some(matches) => matches.iter().any(|condition| {
            (condition.methods.is_empty() || condition.methods.contains(request.method))
                && condition.path.as_ref().is_none_or(|path| path.matches(request.path))
        }),
        None => {
            *request.method == Method::POST
                || request.upgrade.is_some()
                || (*request.method == Method::GET && accepts_event_stream(request.fields))
        }
    };
    if start { Kind::Start } else { Kind::Other }
}

/// The client reads event streams.
pub fn accepts_event_stream(fields: &Fields) -> bool {
    fields.get_all("accept").any(|value| {
        value.split(|byte| *byte == b',').any(|range| {
            let media_type = range.split(|byte| *byte == b';').next().unwrap_or_default();
            media_type.trim_ascii().eq_ignore_ascii_case(b"text/event-stream")
        })
    })
}

/// What the head tells. With what was looked for in the body it becomes the [`Identity`].
pub struct Head {
    plan: Plan,
    places: Places,
    /// As in [`Identity`].
    scope: Option<[u8; 16]>,
    anonymous: bool,
    principal: Vec<u8>,
    cookie: Option<Box<CookieSession>>,
}

impl Head {
    /// What the head tells, and what is to be looked for in the body: something only where the protocol wants fields of
    /// it, or a `json` place is asked before any other has a hit. `prefix` is the route's `strip_prefix`.
    pub fn read(
        service: &Service,
        prefix: Option<&str>,
        scope_secret: &[u8; 16],
        request: &RequestHead,
    ) -> (Head, Option<Sought>) {
        let session = &service.config.session;
        let view = view(request, prefix);
        let (scope, anonymous) = scope(session, scope_secret, &view).unzip();
        let principal = if service.cookie.is_some() { principal(session, &view) } else { Vec::new() };
        let keyed = session.affinity != config::Affinity::None;
        let cookie = service
            .cookie
            .as_ref()
            .filter(|_| keyed)
            .and_then(|sealer| sealer.open(request.fields.get_all("cookie"), &principal, crate::ids::wall_clock()))
            .map(Box::new);
        let plan = plan(service, &view);
        let places = if keyed { places(session, &view) } else { Places::default() };
        let wanted = plan.wants(&view);
        let sought = (wanted.is_some() || places.in_body.is_some()).then(|| Sought {
            fields: wanted.map(|pointers| Box::new(Extractor::of(pointers.clone()))),
            places: places.in_body.as_ref().map(|pointers| Box::new(Extractor::new(pointers))),
            places_count: places.in_body.as_ref().map_or(0, Vec::len),
        });
        (Head { plan, places, scope, anonymous: anonymous.unwrap_or_default(), principal, cookie }, sought)
    }

    /// `found`: what was looked for in the body, where there was one to look into.
    pub fn identity(
        self,
        service: &Service,
        prefix: Option<&str>,
        request: &RequestHead,
        found: Option<&Sought>,
    ) -> Identity {
        let Head { plan, places, scope, anonymous, principal, cookie } = self;
        let keyed = service.config.session.affinity != config::Affinity::None;
        let view = view(request, prefix);
        let in_body = found.and_then(Sought::key);
        let mut recognised = plan.recognise(&view, found.and_then(|found| found.fields.as_deref()));
        let kind = recognised.as_ref().map_or_else(|| kind(&service.config, &view), |recognised| recognised.kind);
        let own = recognised.as_mut().and_then(|recognised| recognised.session.take());
        let text = places.before.or(in_body).or(places.after).or(own.filter(|_| keyed));
        let mut issue_cookie = false;
        let key = match (text, &cookie, &service.cookie) {
            (Some(text), ..) => Some(SessionKey { scope, text: text.into() }),
            (None, Some(cookie), _) => Some(SessionKey { scope, text: cookie.id.as_str().into() }),
            (None, None, Some(_)) if keyed => {
                issue_cookie = true;
                Some(SessionKey { scope, text: new_cookie_id().into() })
            }
            (None, None, _) => None,
        };
        Identity { kind, key, cookie, scope, anonymous, principal, issue_cookie, recognised }
    }
}

fn plan(service: &Service, view: &protocols::Request<'_>) -> Plan {
    match service.recognition {
        Recognition::Http => Plan::Http,
        Recognition::Auto => Plan::new(None, view),
        Recognition::One(protocol) => Plan::new(Some(protocol), view),
    }
}

/// Whose the request is as far as its head alone tells, for an error that comes before anyone has looked into its body.
pub fn protocol_by_head(
    service: &Service,
    prefix: Option<&str>,
    request: &RequestHead,
) -> Option<&'static dyn Protocol> {
    let view = view(request, prefix);
    plan(service, &view).recognise(&view, None)?.protocol
}

/// The request as its endpoint will see it.
pub fn view<'a>(request: &'a RequestHead, prefix: Option<&str>) -> protocols::Request<'a> {
    let stripped = prefix.and_then(|prefix| edits::strip_prefix(&request.path, prefix));
    protocols::Request {
        method: &request.method,
        path: stripped.unwrap_or(&request.path),
        query: request.query.as_deref(),
        fields: &request.fields,
        upgrade: request.upgrade.as_deref(),
    }
}

/// What the configured places of the session key give, as far as the head tells.
#[derive(Default)]
struct Places {
    /// Of the first place that has a hit, if no place in the body goes before it.
    before: Option<String>,
    /// The places in the body that do.
    in_body: Option<Vec<config::JsonPointer>>,
    /// Of the first place with a hit behind those.
    after: Option<String>,
}

fn places(session: &config::Session, request: &protocols::Request<'_>) -> Places {
    let mut places = Places::default();
    for source in &session.key {
        match source {
            KeySource::Json(pointer) => places.in_body.get_or_insert_default().push(pointer.clone()),
            source => {
                let Some(text) = key_in_head(source, request) else { continue };
                match places.in_body {
                    Some(_) => places.after = Some(text),
                    None => places.before = Some(text),
                }
                return places;
            }
        }
    }
    places
}

fn new_cookie_id() -> String {
    use base64::Engine;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(crate::ids::random_bytes::<16>())
}

/// The session key that the answer's head tells, where one of the places is there.
pub fn learned_from_head(session: &config::Session, response: &ResponseHead) -> Option<String> {
    session.key.iter().find_map(|source| match source {
        KeySource::ResponseHeader(name) => text_of(response.fields.get(name.as_str())?),
        _ => None,
    })
}

/// The JSON places to look at in an answer's body.
pub fn response_pointers(session: &config::Session) -> Vec<config::JsonPointer> {
    session
        .key
        .iter()
        .filter_map(|source| match source {
            KeySource::ResponseJson(pointer) => Some(pointer.clone()),
            _ => None,
        })
        .collect()
}

/// The digest of the first `session.scope` value; of nothing, where none is there: the anonymous principal, as the second
/// value tells.
fn scope(session: &config::Session, secret: &[u8; 16], request: &protocols::Request<'_>) -> Option<([u8; 16], bool)> {
    if session.scope.is_empty() {
        return None;
    }
    let mut hasher = SipHasher13::new_with_key(secret);
    let value = session.scope.iter().find_map(|source| in_head(source, request, credential));
    if let Some(value) = &value {
        hasher.write(value);
        hasher.write_u8(1);
    }
    Some((hasher.finish128().as_bytes(), value.is_none()))
}

/// The principal for the proxy's own cookie: a digest that is the same in every process, as the cookie outlives this one.
fn principal(session: &config::Session, request: &protocols::Request<'_>) -> Vec<u8> {
    if session.scope.is_empty() {
        return Vec::new();
    }
    let value = session.scope.iter().find_map(|source| in_head(source, request, credential));
    ring::digest::digest(&ring::digest::SHA256, &value.unwrap_or_default()).as_ref().to_vec()
}

/// What tells principals apart is taken whole, whatever its length and bytes (tokens have kilobytes): a value that was
/// left out would make its owner one of the anonymous. It is never empty.
fn credential(value: &[u8]) -> Option<Vec<u8>> {
    let value = value.trim_ascii();
    (!value.is_empty()).then(|| value.to_vec())
}

/// The session key at this place of the head; `None` where it is not there, or is in a body.
pub fn key_in_head(source: &KeySource, request: &protocols::Request<'_>) -> Option<String> {
    in_head(source, request, text_of)
}

/// The value at a place of the request's head, as `read` takes it.
fn in_head<T>(source: &KeySource, request: &protocols::Request<'_>, read: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
    match source {
        KeySource::Header(name) => read(request.fields.get(name.as_str())?),
        KeySource::Cookie(name) => request.fields.get_all("cookie").find_map(|value| cookie_value(value, name, &read)),
        KeySource::Query(name) => query_value(request.query?, name, read),
        KeySource::Path(pattern) => {
            let captured = pattern.capture(request.path)?;
            read(&percent_encoding::percent_decode_str(captured).collect::<Vec<u8>>())
        }
        KeySource::Json(_) | KeySource::ResponseHeader(_) | KeySource::ResponseJson(_) => None,
    }
}

/// A session key as every place tells it: trimmed, not empty, and not too long.
pub fn text_of(value: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(value).ok()?.trim();
    (!text.is_empty() && text.len() <= KEY_BYTES_MAX).then(|| text.to_owned())
}

fn cookie_value<T>(field: &[u8], name: &str, read: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
    field.split(|byte| *byte == b';').find_map(|pair| {
        let pair = pair.trim_ascii();
        let value = pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        let unquoted = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
        read(unquoted)
    })
}

/// A value of an `application/x-www-form-urlencoded` query (WHATWG URL section 5.1).
fn query_value<T>(query: &str, name: &str, read: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
    let decode = |text: &str| -> Vec<u8> { percent_encoding::percent_decode_str(&text.replace('+', " ")).collect() };
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        if decode(key) == name.as_bytes() { read(&decode(value)) } else { None }
    })
}

/// What is looked for in a body.
pub struct Sought {
    /// Of the protocol.
    fields: Option<Box<Extractor>>,
    /// Of the session key.
    places: Option<Box<Extractor>>,
    places_count: usize,
}

impl Sought {
    /// Whether more bytes can tell more.
    fn feed(&mut self, bytes: &[u8]) -> bool {
        let more = |extractor: &mut Option<Box<Extractor>>| {
            extractor.as_mut().is_some_and(|extractor| extractor.feed(bytes) == Progress::More)
        };
        more(&mut self.fields) | more(&mut self.places)
    }

    /// The session key, at the first place that has one.
    fn key(&self) -> Option<String> {
        let places = self.places.as_ref()?;
        (0..self.places_count).find_map(|index| text_of(places.value(index)?.as_bytes()))
    }
}

/// Looks into the body's first [`LOOK_AHEAD_BYTES_MAX`]; what was read is given back whole. `None`: there is nothing to
/// look into.
pub async fn look_ahead(
    mut sought: Sought,
    request: &mut RequestHead,
    client: &mut Peer,
    observer: &mut Observer,
    timer: &mut Timer,
) -> Result<Option<Sought>, SourceFault> {
    if !may_be_json(request) || client.source_ended() && client.held().is_empty() {
        return Ok(None);
    }
    if request.expect_continue {
        // The client waits for a word before it sends the body; we are the ones who read it first.
        request.expect_continue = false;
        client.send_continue();
    }
    let mut ahead: Vec<u8> = Vec::new();
    let deadline = crate::ids::now() + LOOK_AHEAD_TIMEOUT;
    let result = poll_fn(|context| {
        loop {
            let _ = client.poll_flush(context);
            match client.poll_next(context, false, observer) {
                Poll::Ready(Ok(Next::Bytes)) => {
                    let bytes = client.held();
                    let more = sought.feed(bytes);
                    ahead.extend_from_slice(bytes);
                    let count = bytes.len();
                    client.consume(count);
                    if !more || ahead.len() >= LOOK_AHEAD_BYTES_MAX {
                        return Poll::Ready(Ok(()));
                    }
                }
                Poll::Ready(Ok(Next::End(trailers))) => {
                    client.put_back_trailers(trailers);
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Err(fault)) => return Poll::Ready(Err(fault)),
                Poll::Pending => return timer.poll_passed(context, deadline).map(|()| Ok(())),
            }
        }
    })
    .await;
    client.put_back(Bytes::from(ahead));
    result?;
    Ok(Some(sought))
}

fn may_be_json(request: &RequestHead) -> bool {
    if request.fields.contains("content-encoding") {
        return false;
    }
    is_json(request.fields.get("content-type"))
}

/// `application/json`, or a type that ends in `+json` (RFC 6839); a missing type may be.
pub fn is_json(content_type: Option<&[u8]>) -> bool {
    let Some(value) = content_type else { return true };
    let media_type = value.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii().to_ascii_lowercase();
    media_type.ends_with(b"/json") || media_type.ends_with(b"+json")
}
