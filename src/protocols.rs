//! Protocols: by which signs the sessions and runs of agents are known. Pure: a request's head and the wanted fields of
//! its body go in, what the exchange is comes out; the answer's head, body fields and events go in, facts come out.
//!
//! A protocol is one file and one line in [`ALL`]. Ids that are found here route, they never authorise.

pub mod a2a;
mod acp;
mod adk;
mod ag_ui;
mod agentcore;
mod ai_sdk;
mod anthropic;
mod langgraph;
mod mcp;
mod openai_chat;
mod openai_responses;
#[cfg(test)]
mod recorded;
#[cfg(test)]
mod testing;
mod typed;

pub use mcp::rewrite_endpoint_event;

use std::sync::{Arc, LazyLock};

use http::Method;

use crate::error::ProxyError;
use crate::json::{Extractor, Pointers};
use crate::message::Fields;
use crate::run::{Kind, RunOutcome};
use crate::sse;

/// Every protocol, in the order in which `auto` asks them.
pub static ALL: &[&dyn Protocol] = &[
    &langgraph::Langgraph,
    &mcp::Mcp,
    &a2a::A2a,
    &acp::Acp,
    &adk::Adk,
    &openai_responses::OpenaiResponses,
    &openai_chat::OpenaiChat,
    &anthropic::Anthropic,
    &ag_ui::AgUi,
    &ai_sdk::AiSdk,
    // What runs in such a container may speak any of the others, which then say more.
    &agentcore::Agentcore,
];

/// Keys of sessions and runs that are longer are none.
pub const KEY_BYTES_MAX: usize = 512;

/// What a run's start leaves for later calls ([`Recognised::base`]) is no longer, or there are none.
pub const BASE_BYTES_MAX: usize = 2 * KEY_BYTES_MAX;

/// One protocol: the recogniser of its requests, and what its runs can be asked.
pub trait Protocol: Sync {
    /// As `agent_protocol` names it.
    fn name(&self) -> &'static str;

    /// How plainly the head of a request shows that it is this protocol's. Only `auto` asks.
    fn sign(&self, request: &Request<'_>) -> Sign;

    /// Whether the body of a request (read for [`Protocol::shape`] of all) has this protocol's shape. Only `auto` asks, where no head
    /// was plain.
    fn has_shape(&self, _request: &Request<'_>, _body: &Extractor) -> bool {
        false
    }

    /// Every field that [`Protocol::has_shape`], and after it [`Protocol::recognise`], reads.
    fn shape(&self) -> &'static [&'static str] {
        &[]
    }

    /// Which fields of the request's body [`Protocol::recognise`] wants; `None`: it needs no look at it.
    fn wants(&self, _request: &Request<'_>) -> Option<&'static Arc<Pointers>> {
        None
    }

    /// What an exchange is. `body` has the pointers of [`Protocol::wants`], as far as they were found; it is `None`
    /// where there was no look at the body (not JSON, encoded, none was wanted). `None`: not this protocol's, it passes
    /// as plain HTTP.
    fn recognise(&self, request: &Request<'_>, body: Option<&Extractor>) -> Option<Recognised>;

    /// The call by which the proxy asks how a run stands; `None`: there is none.
    fn status_call(&self, _run: &RunRef<'_>) -> Option<Call> {
        None
    }

    /// What the answer to [`Protocol::status_call`] says. 401, 403, 429 and 5xx are no evidence and don't come here.
    fn judge(&self, _run: &RunRef<'_>, _status: u16, _body: &[u8]) -> Standing {
        Standing::NoEvidence
    }

    /// The call by which the proxy ends a run; `None`: closing its exchange is all that can be done.
    fn cancel_call(&self, _run: &RunRef<'_>, _how: Cancel) -> Option<Call> {
        None
    }

    /// An error made here in the form that callers of this protocol read, where it has one. `rpc_id` is
    /// [`Recognised::rpc_id`].
    fn error_body(&self, _error: &ProxyError, _rpc_id: Option<&str>) -> Option<Vec<u8>> {
        None
    }

    /// The path at which an endpoint tells how many runs it has, those included that no request of ours started.
    fn load_path(&self) -> Option<&'static str> {
        None
    }

    /// Reads the answer from there; `None`: it says nothing.
    fn load(&self, _body: &[u8]) -> Option<u32> {
        None
    }
}

/// How plainly a request's head shows a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sign {
    None,
    /// A path that this protocol has, and that others might have too: the body's shape decides first, where there is
    /// one. What such a protocol reads of that body has to be among its [`Protocol::shape`].
    Path,
    /// A header that only this protocol has, or a path that nobody else has.
    Mark,
}

/// A request's head as a recogniser sees it.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub method: &'a Method,
    /// As the endpoint is to see it: normalised, percent-encoding kept, without the route's `strip_prefix`.
    pub path: &'a str,
    pub query: Option<&'a str>,
    pub fields: &'a Fields,
    /// The protocol of an Upgrade, in lower case.
    pub upgrade: Option<&'a str>,
}

/// What an exchange is.
pub struct Recognised {
    pub kind: Kind,
    /// The protocol's own session key, where the request tells it. Configured places of `session.key` go before it.
    pub session: Option<String>,
    /// Of a join, read or cancel: the run that is meant. Of a start: the run's key where the client makes it.
    pub run: Option<String>,
    /// It makes a session without starting a run: it is placed as a run would be.
    pub creates_session: bool,
    /// The session lives at its endpoint and nowhere else: instead of being moved the client is told 404, and makes
    /// another (MCP of the session era).
    pub bound: bool,
    /// Of a start: what becomes of the run when its client leaves.
    pub on_disconnect: OnDisconnect,
    /// What of the start a later [`RunRef::base`] needs (a path, a prefix); empty where nothing.
    pub base: String,
    /// The `id` of a JSON-RPC request as JSON (`1`, `"1"`), for error bodies.
    pub rpc_id: Option<String>,
    /// Reads the answer; `None`: it says nothing of runs and sessions.
    pub watch: Option<Box<dyn Watch>>,
    /// Who recognised it; set by [`Plan::recognise`].
    pub protocol: Option<&'static dyn Protocol>,
}

/// What becomes of a run whose client has left, where the configuration leaves that to the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisconnect {
    /// The run ends with its exchange.
    Ends,
    /// The run goes on without it.
    GoesOn,
}

/// Reads one answer. Called in this order: `head`, then as [`Look`] said, then `end` if the body ended whole, or else
/// `cut`.
pub trait Watch: Send {
    /// Takes the final head, and says what of the body is to be read.
    fn head(&mut self, status: u16, fields: &Fields, facts: &mut Vec<Fact>) -> Look;

    /// Takes the fields that [`Look::Json`] asked for: once, as soon as they are known or the body has ended.
    fn body(&mut self, _values: &Extractor, _facts: &mut Vec<Fact>) {}

    /// Takes one event. Most events of a stream are of no interest: tell those quickly, by their name or a byte search.
    fn event(&mut self, _event: sse::Event<'_>, _facts: &mut Vec<Fact>) {}

    /// Takes one text message of a WebSocket.
    fn message(&mut self, _from: From, _text: &[u8], _facts: &mut Vec<Fact>) {}

    /// The body has ended whole. Answers what became of the run that the exchange started or joined; that matters only
    /// where no [`Fact::Ended`] was told.
    fn end(&mut self, facts: &mut Vec<Fact>) -> AtEnd;

    /// The body did not end whole: the client left, the endpoint broke off or a time-out cut it, and a run that ends
    /// with its exchange ends with this outcome. What else lived in this answer alone ends here: a session, runs of
    /// other exchanges. The exchange's own run is none of its business.
    fn cut(&mut self, _outcome: RunOutcome, _facts: &mut Vec<Fact>) {}
}

/// What of an answer's body is to be read.
#[derive(Clone, Copy)]
pub enum Look {
    Nothing,
    /// These fields of a JSON body.
    Json(&'static Arc<Pointers>),
    /// Events of an event stream.
    Events,
    /// Text messages of a WebSocket, both ways.
    Messages,
}

/// Who sent a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    Client,
    Endpoint,
}

/// What an answer tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The session's id. Told from success only.
    Session(String),
    /// The key of the run that this exchange started.
    Run(String),
    /// The run that this exchange started or joined has ended.
    Ended(RunOutcome),
    /// A run has begun that no request started: a lane of a socket, a successor.
    RunStarted(String),
    /// The run with this key has ended.
    RunEnded(String, RunOutcome),
    /// The run with this key is alive.
    RunAlive(String),
    /// All runs of the exchange's session have ended, but for the one that this exchange started.
    SessionRunsEnded(RunOutcome),
    /// The endpoint does not know the session (any more): its pin is of no use.
    SessionLost,
    /// Something may have ended that no answer will tell: the session's runs are to be asked about now.
    RecheckSession,
    /// As above, for all runs of the endpoint.
    RecheckEndpoint,
}

/// What became of a run whose exchange ended whole without saying so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtEnd {
    Ended(RunOutcome),
    /// It goes on, or nobody knows: it is asked about where [`Protocol::status_call`] can.
    GoesOn,
}

/// One run, as the proxy remembers it.
#[derive(Clone, Copy, Debug)]
pub struct RunRef<'a> {
    /// [`Recognised::base`] of its start.
    pub base: &'a str,
    /// Of [`Recognised::run`] or [`Fact::Run`].
    pub key: &'a str,
}

/// What is known of a run after asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Running,
    Ended(RunOutcome),
    NoEvidence,
}

/// How a run is to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancel {
    Interrupt,
    /// With all that it has done, where the protocol can.
    Rollback,
}

/// A call that the proxy makes itself. It carries `versions[].headers.set` besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub method: Method,
    /// Path and query.
    pub target: String,
    pub fields: Vec<(&'static str, String)>,
    /// JSON where it is not empty.
    pub body: Vec<u8>,
}

/// The protocol that `agent_protocol` names.
pub fn by_name(name: &str) -> Option<&'static dyn Protocol> {
    ALL.iter().copied().find(|protocol| protocol.name() == name)
}

/// Who is to recognise a request, as its head tells.
#[derive(Clone, Copy)]
pub enum Plan {
    /// Nobody: it is plain HTTP.
    Http,
    /// This protocol, after a look at what it wants of the body.
    One(&'static dyn Protocol),
    /// Whoever finds its shape in the body, else whose path it is.
    Shape(Option<&'static dyn Protocol>),
}

/// Every field by which a body's shape is told, and which is read after that.
static SHAPES: LazyLock<Arc<Pointers>> = LazyLock::new(|| {
    let mut all: Vec<&str> = ALL.iter().flat_map(|protocol| protocol.shape()).copied().collect();
    all.sort_unstable();
    all.dedup();
    Arc::new(Pointers::new(all))
});

impl Plan {
    /// For a service with this `agent_protocol`; `None`: auto.
    pub fn new(configured: Option<&'static dyn Protocol>, request: &Request<'_>) -> Plan {
        if let Some(protocol) = configured {
            return Plan::One(protocol);
        }
        // The first of those whose sign is plainest.
        let mut best = (Sign::None, Plan::Http);
        for protocol in ALL.iter().copied() {
            let sign = protocol.sign(request);
            if sign > best.0 {
                best = (sign, Plan::One(protocol));
            }
            if sign == Sign::Mark {
                break;
            }
        }
        if best.0 == Sign::Mark || request.method != Method::POST || !is_json(request.fields) {
            return best.1;
        }
        Plan::Shape(match best.1 {
            Plan::One(protocol) => Some(protocol),
            _ => None,
        })
    }

    /// The fields of the body that are wanted. (A body that is not JSON has none.)
    pub fn wants(&self, request: &Request<'_>) -> Option<&'static Arc<Pointers>> {
        match self {
            Plan::Http => None,
            Plan::One(protocol) => protocol.wants(request),
            Plan::Shape(_) => Some(&SHAPES),
        }
    }

    /// What the exchange is; `None`: plain HTTP.
    pub fn recognise(&self, request: &Request<'_>, body: Option<&Extractor>) -> Option<Recognised> {
        let protocol = match self {
            Plan::Http => return None,
            Plan::One(protocol) => *protocol,
            Plan::Shape(by_path) => {
                let by_shape = |body| ALL.iter().copied().find(|protocol| protocol.has_shape(request, body));
                body.and_then(by_shape).or(*by_path)?
            }
        };
        let recognised = protocol.recognise(request, body).filter(|found| found.base.len() <= BASE_BYTES_MAX)?;
        Some(Recognised { protocol: Some(protocol), ..recognised })
    }
}

impl Recognised {
    /// An exchange that is nothing to a run, and of which the answer says nothing.
    pub fn other() -> Recognised {
        Recognised {
            kind: Kind::Other,
            session: None,
            run: None,
            creates_session: false,
            bound: false,
            on_disconnect: OnDisconnect::Ends,
            base: String::new(),
            rpc_id: None,
            watch: None,
            protocol: None,
        }
    }

    /// A start whose run ends with its exchange.
    pub fn start(watch: impl Watch + 'static) -> Recognised {
        Recognised { kind: Kind::Start, watch: Some(Box::new(watch)), ..Recognised::other() }
    }
}

impl Request<'_> {
    /// The value of a field as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.fields.get(name)?).ok().map(str::trim)
    }

    /// The segments of the path, still percent-encoded: `/a/b` has `a` and `b`.
    pub fn segments(&self) -> impl DoubleEndedIterator<Item = &str> + Clone {
        self.path.trim_start_matches('/').split('/')
    }

    /// Path and query, for calls of ours; `None`: too long to be remembered, or nothing that a request line may have.
    pub fn target(&self) -> Option<String> {
        let target = match self.query {
            Some(query) => format!("{}?{query}", self.path),
            None => self.path.to_owned(),
        };
        let is_plain = target.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
        (is_plain && target.len() <= BASE_BYTES_MAX).then_some(target)
    }

    /// The first value of a query parameter, percent-decoded.
    pub fn query_value(&self, name: &str) -> Option<String> {
        self.query?.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=')?;
            (key == name).then(|| percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned())
        })
    }
}

/// A key as every place tells it: not empty, not too long.
pub fn key(text: &str) -> Option<String> {
    (!text.is_empty() && text.len() <= KEY_BYTES_MAX).then(|| text.to_owned())
}

/// Cuts a path in front of the first segment that is `name` (which begins with the slash).
pub fn at_segment<'a>(path: &'a str, name: &str) -> Option<(&'a str, &'a str)> {
    let path_bytes = path.as_bytes();
    let begins = |position: &usize| {
        let rest = &path_bytes[*position..];
        rest.starts_with(name.as_bytes()) && matches!(rest.get(name.len()), None | Some(b'/'))
    };
    Some(path.split_at(memchr::memchr_iter(b'/', path_bytes).find(begins)?))
}

/// As RFC 9562 section 4 writes one.
pub fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(index, byte)| match index {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// Whether an id may stand in a path as it is: one segment, nothing to be escaped. (An escape in it stays one.)
pub fn is_segment(text: &str) -> bool {
    let is_plain = |byte: u8| match byte {
        b'/' | b'?' | b'#' | b'\\' | b'"' | b'<' | b'>' | b'^' | b'`' | b'{' | b'|' | b'}' => false,
        _ => byte.is_ascii_graphic(),
    };
    !matches!(text, "" | "." | "..") && text.bytes().all(is_plain)
}

/// Pointers made ready, for the statics of recognisers.
fn pointers(list: &[&str]) -> Arc<Pointers> {
    Arc::new(Pointers::new(list.iter().copied()))
}

/// `text/event-stream`, whatever its parameters.
pub fn is_event_stream(fields: &Fields) -> bool {
    has_media_type(fields, |media_type| media_type.eq_ignore_ascii_case(b"text/event-stream"))
}

/// `application/json`, or a type that ends in `+json` (RFC 6839).
pub fn is_json(fields: &Fields) -> bool {
    has_media_type(fields, |media_type| {
        let lower = media_type.to_ascii_lowercase();
        lower.ends_with(b"/json") || lower.ends_with(b"+json")
    })
}

fn has_media_type(fields: &Fields, is: impl Fn(&[u8]) -> bool) -> bool {
    !fields.contains("content-encoding")
        && fields
            .get("content-type")
            .is_some_and(|value| is(value.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii()))
}

/// 2xx.
pub fn is_success(status: u16) -> bool {
    (200..300).contains(&status)
}

/// What a status alone says of a run that ends with its exchange: as for plain HTTP.
pub fn outcome_of_status(status: u16) -> RunOutcome {
    if status >= 500 { RunOutcome::Failed } else { RunOutcome::Completed }
}
