//! Admin: the API, probes, metrics and live page of a running proxy.

mod document;
mod guard;
mod page;
mod problem;
mod rollout;
mod view;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Extension, Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Router, middleware};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use crate::config::{Address, parse_duration};
use crate::control::discovery::Discovery;
use crate::control::{DrainHandle, ReloadHandle, ReloadState, runs};
use crate::drain::Phase;
use crate::ids::{self, RunId};
use crate::metrics::CONTENT_TYPE;
use crate::net::listen::{Bounded, Socket};
use crate::scaling::Source;
use crate::snapshot::Running;
use crate::state::dispatcher::Dispatcher;
use crate::state::runs::Stop;
use crate::state::status::{CancelReport, Ending};
use document::Json;
use guard::Reader;
use problem::Problem;

/// What the admin server shows and steers.
pub struct Context {
    pub source: Source,
    pub running: Arc<Running>,
    pub reload: ReloadHandle,
    pub reload_state: Arc<ReloadState>,
    pub drain: DrainHandle,
    pub discovery: Arc<Discovery>,
}

/// How much is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surface {
    /// Everything; asks for the token where one is configured.
    Full,
    /// `/healthz`, `/readyz`, `/metrics` and `/busy`, to anyone.
    Probes,
}

/// Serves until it is dropped, with every connection that it accepted, or told to `stop`: then it accepts nothing more,
/// and what was asked is answered within [`LAST_ANSWERS`].
pub async fn serve(context: Arc<Context>, socket: Socket, surface: Surface, stop: CancellationToken) {
    let (address, listener) = match socket.local_address().and_then(|address| Ok((address, socket.into_tokio()?))) {
        Ok(bound) => bound,
        Err(error) => return error!(%error, "the admin address can't be served"),
    };
    let access = match &address {
        Address::Tcp(address) => guard::Access { surface, unix: false, loopback: is_loopback(address.ip()) },
        Address::Unix(path) => {
            keep_private(path);
            guard::Access { surface, unix: true, loopback: false }
        }
    };
    let router = router(context, access);
    let listener = Bounded::new(listener, CONNECTIONS_MAX);
    let mut connections = JoinSet::new();
    while let Some((accepted, permit)) = listener.accept("the admin API", &stop).await {
        while connections.try_join_next().is_some() {}
        let stream = accepted.into_tokio().map(|(stream, _)| stream);
        connections.spawn(connection(stream, router.clone(), permit));
    }
    drop(listener);
    // Those that are left then are idle, or want to wait for long.
    let _ = tokio::time::timeout(LAST_ANSWERS, async { while connections.join_next().await.is_some() {} }).await;
}

/// How long a request may take that came before another process took over.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

async fn connection<S>(stream: std::io::Result<S>, router: Router, _permit: OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let served = match stream {
        Ok(stream) => {
            hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(HEAD_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
                .await
        }
        Err(error) => return debug!(%error, "an admin connection was lost"),
    };
    if let Err(error) = served {
        debug!(%error, "an admin connection broke off");
    }
}

/// An admin socket decides over the whole proxy, so only its owner may connect.
fn keep_private(path: &FilePath) {
    use std::os::unix::fs::PermissionsExt;
    if let Err(error) = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)) {
        error!(%error, path = %path.display(), "the admin socket could not be made private");
    }
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

fn router(context: Arc<Context>, access: guard::Access) -> Router {
    let probes = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/busy", get(busy))
        .route("/metrics", get(metrics));
    let routes = match access.surface {
        Surface::Probes => probes,
        Surface::Full => probes
            .route("/", get(page::serve))
            .route("/api/v1/status", get(status))
            .route("/api/v1/config", get(config))
            .route("/api/v1/reload", post(reload))
            .route("/api/v1/sessions", get(sessions).delete(forget_sessions))
            .route("/api/v1/runs", get(list_runs))
            .route("/api/v1/runs/{id}", delete(end_run))
            .route("/api/v1/services/{service}/endpoints/{address}/drain", post(drain_endpoint))
            .route("/api/v1/services/{service}/endpoints/{address}/undrain", post(undrain_endpoint))
            .route("/api/v1/services/{service}/safe-to-roll", get(safe_to_roll))
            .route("/api/v1/services/{service}/rollout", get(rollout::status))
            .route("/api/v1/services/{service}/rollout/{action}", post(rollout::steer))
            .route("/api/v1/services/{service}/versions/{version}/evict", post(rollout::evict))
            .route("/api/v1/drain", post(drain))
            .route("/api/v1/metrics", get(metrics_json)),
    };
    let door = guard::Door { context: Arc::clone(&context), access };
    routes
        .fallback(async || Problem::not_found("there is nothing at this path"))
        .method_not_allowed_fallback(async || {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path does not take this method")
        })
        .layer(middleware::from_fn_with_state(Arc::new(door), guard::pass))
        .layer(middleware::map_response(no_store))
        .with_state(context)
}

/// Everything here is true for a moment only, and some of it is nobody else's business.
async fn no_store(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

type Shared = State<Arc<Context>>;
type Parameters = Query<HashMap<String, String>>;

async fn healthz() -> &'static str {
    "ok\n"
}

async fn readyz(State(context): Shared, Query(parameters): Parameters) -> Result<&'static str, Problem> {
    let parameters = Known::of(parameters, &["service"])?;
    if draining(&context) {
        return Err(not_ready("the proxy is draining"));
    }
    if let Some(source) = context.discovery.awaited() {
        let why = source.problem.as_deref().unwrap_or("nothing yet");
        return Err(not_ready(&format!("{} of {} has not answered: {why}", source.source, source.service)));
    }
    if let Some(name) = parameters.text("service") {
        let dispatcher = dispatcher(&context, name)?;
        if !dispatcher.ready_for_work(ids::now()) {
            return Err(not_ready(&format!("no endpoint of {name} is ready and has a free slot")));
        }
    }
    Ok("ready\n")
}

fn not_ready(reason: &str) -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", reason)
}

async fn busy(State(context): Shared) -> Response {
    let outstanding_runs = view::outstanding_runs(&context, ids::now());
    let status = if outstanding_runs == 0 { StatusCode::OK } else { StatusCode::LOCKED };
    (status, Json(json!({ "outstanding_runs": outstanding_runs }))).into_response()
}

/// Prometheus text, or for whoever accepts JSON alone the load as at `/api/v1/metrics`: for the other replicas, which have no
/// token. `activity` and `wait`: not before it is another activity than that, or so much time has passed.
async fn metrics(
    State(context): Shared,
    Query(parameters): Parameters,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if !wants_json(&headers) {
        return Ok(metrics_text(&context));
    }
    let parameters = Known::of(parameters, &["endpoints", "activity", "wait"])?;
    let wait = match parameters.text("wait").map(parse_duration) {
        None => Duration::ZERO,
        Some(Ok(wait)) => wait.min(WAIT_MAX),
        Some(Err(_)) => return Err(Problem::bad_request("wait is a duration such as 20s")),
    };
    let load = match parameters.text("activity") {
        Some(known) => context.source.load_when_changed(known, wait).await,
        None => context.source.load(parameters.text("endpoints") == Some("true"), ids::now()),
    };
    Ok(Json(load).into_response())
}

/// Many a client says by default that it takes JSON and anything else: that is no wish for it.
fn wants_json(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).into_iter().filter_map(|value| value.to_str().ok());
    let ranges = accepted.flat_map(|value| value.split(','));
    let types: Vec<&str> = ranges.map(|range| range.split(';').next().unwrap_or_default().trim()).collect();
    types.contains(&"application/json") && !types.iter().any(|range| ["text/plain", "text/*", "*/*"].contains(range))
}

fn metrics_text(context: &Context) -> Response {
    let text = context.running.metrics.render(&view::scrape(context, ids::now()));
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response()
}

async fn metrics_json(State(context): Shared) -> Response {
    Json(context.source.load(false, ids::now())).into_response()
}

async fn status(State(context): Shared) -> Response {
    Json(view::status(&context, ids::now())).into_response()
}

async fn config(State(context): Shared) -> Response {
    Json(context.running.snapshot.load().loaded.effective.clone()).into_response()
}

async fn reload(State(context): Shared) -> Result<Response, Problem> {
    match context.reload.reload().await {
        Ok(generation) => Ok(Json(json!({ "generation": generation })).into_response()),
        Err(problems) => Err(Problem::config(&problems)),
    }
}

async fn sessions(
    State(context): Shared,
    Query(parameters): Parameters,
    Extension(reader): Extension<Reader>,
) -> Result<Response, Problem> {
    let parameters = Known::of(parameters, &["service", "key", "limit"])?;
    let dispatchers = dispatchers(&context, parameters.text("service"))?;
    let rows = view::sessions(&dispatchers, parameters.text("key"), parameters.limit()?, reader, ids::now());
    Ok(Json(json!({ "sessions": rows })).into_response())
}

async fn forget_sessions(State(context): Shared, Query(parameters): Parameters) -> Result<Response, Problem> {
    let parameters = Known::of(parameters, &["service", "key"])?;
    let service = parameters.text("service").ok_or_else(|| Problem::bad_request("say which service: ?service=NAME"))?;
    // An empty key is a variable that was not set, and must not mean every session.
    if parameters.0.get("key").is_some_and(String::is_empty) {
        return Err(Problem::bad_request("the key is empty; leave `key` out to forget every idle session"));
    }
    let forgotten = steerable(&context, service)?.forget_sessions(parameters.text("key"), ids::now());
    Ok(Json(json!({ "forgotten": forgotten })).into_response())
}

async fn list_runs(
    State(context): Shared,
    Query(parameters): Parameters,
    Extension(reader): Extension<Reader>,
) -> Result<Response, Problem> {
    let parameters = Known::of(parameters, &["service", "session", "limit"])?;
    let dispatchers = dispatchers(&context, parameters.text("service"))?;
    let rows = view::runs(&dispatchers, parameters.text("session"), parameters.limit()?, reader, ids::now());
    Ok(Json(json!({ "runs": rows })).into_response())
}

/// The kill switch.
async fn end_run(State(context): Shared, Path(id): Path<String>) -> Result<Response, Problem> {
    let id =
        RunId::parse(&id).ok_or_else(|| Problem::bad_request("a run's id is a UUID, as `longhaul runs` shows it"))?;
    for dispatcher in view::dispatchers(&context) {
        if dispatcher.has_successor() {
            return Err(handing_over());
        }
        let Some((ending, call)) = dispatcher.cancel(id, ids::now()) else { continue };
        if let Some(call) = call {
            let dispatcher = Arc::clone(&dispatcher);
            tokio::spawn(async move { runs::make(&dispatcher, &call).await });
        }
        let report = match ending {
            Ending::Told(report) => report,
            Ending::Open(stop) => ended_or_called(&dispatcher, id, &stop).await?,
        };
        return Ok(Json(json!({ "cancel": report })).into_response());
    }
    Err(Problem::not_found("there is no outstanding run with this id; it may have ended"))
}

/// Waits until it is known what becomes of a run that has no name yet: its own time to be named is bounded, and so is
/// that in which what carries it closes.
async fn ended_or_called(dispatcher: &Dispatcher, id: RunId, stop: &Stop) -> Result<CancelReport, Problem> {
    loop {
        tokio::time::sleep(ENDING_EVERY).await;
        if dispatcher.has_successor() {
            return Err(handing_over());
        }
        if let Some(report) = dispatcher.ending(id, stop) {
            return Ok(report);
        }
    }
}

async fn drain_endpoint(
    State(context): Shared,
    Path((service, address)): Path<(String, String)>,
) -> Result<Response, Problem> {
    let dispatcher = steerable(&context, &service)?;
    let found = dispatcher.drain_endpoint(&address, ids::now());
    endpoint_answer(&dispatcher, &address, found, "draining")
}

async fn undrain_endpoint(
    State(context): Shared,
    Path((service, address)): Path<(String, String)>,
) -> Result<Response, Problem> {
    let dispatcher = steerable(&context, &service)?;
    let found = dispatcher.undrain_endpoint(&address, ids::now());
    endpoint_answer(&dispatcher, &address, found, "undrained")
}

/// What a rollout now would cut.
async fn safe_to_roll(
    State(context): Shared,
    Path(service): Path<String>,
    Query(parameters): Parameters,
) -> Result<Response, Problem> {
    let parameters = Known::of(parameters, &["grace", "endpoint", "confidence"])?;
    let dispatcher = dispatcher(&context, &service)?;
    let grace = match parameters.text("grace").map(parse_duration) {
        None => None,
        Some(Ok(grace)) => Some(grace),
        Some(Err(_)) => return Err(Problem::bad_request("grace is a duration such as 30s, 10m or 1h")),
    };
    let confidence = match parameters.text("confidence") {
        None => CONFIDENCE_DEFAULT,
        Some(text) => match text.parse() {
            Ok(confidence) if (0.0..=1.0).contains(&confidence) => confidence,
            _ => return Err(Problem::bad_request("confidence is a probability between 0 and 1, such as 0.95")),
        },
    };
    let endpoint = parameters.text("endpoint");
    match dispatcher.safe_to_roll(endpoint, grace, confidence, ids::now()) {
        Some(report) => Ok(Json(report).into_response()),
        None => Err(no_endpoint(&dispatcher, endpoint.unwrap_or_default())),
    }
}

fn no_endpoint(dispatcher: &Dispatcher, address: &str) -> Problem {
    let service = dispatcher.name();
    let known = dispatcher.status(ids::now()).versions.into_iter().flat_map(|version| version.endpoints);
    let known: Vec<String> = known.map(|endpoint| endpoint.address).take(NAMES_MAX).collect();
    let known = if known.is_empty() { "it has none".to_owned() } else { format!("it has {}", known.join(", ")) };
    Problem::not_found(&format!("{service} has no endpoint {address}; {known}"))
}

fn endpoint_answer(dispatcher: &Dispatcher, address: &str, found: bool, done: &str) -> Result<Response, Problem> {
    if !found {
        return Err(no_endpoint(dispatcher, address));
    }
    let service = dispatcher.name();
    Ok(Json(json!({ "service": **service, "endpoint": address, "result": done })).into_response())
}

async fn drain(State(context): Shared) -> Result<Response, Problem> {
    // This process ends anyhow once another serves; who asks means that one.
    let has_handed_over = context.running.drain.phase() >= Phase::Draining
        && view::dispatchers(&context).iter().any(|dispatcher| dispatcher.has_successor());
    if has_handed_over {
        return Err(handing_over());
    }
    context.drain.drain();
    Ok((StatusCode::ACCEPTED, Json(json!({ "draining": true }))).into_response())
}

fn draining(context: &Context) -> bool {
    context.running.drain.phase() >= Phase::Announced
}

fn dispatcher(context: &Context, service: &str) -> Result<Arc<Dispatcher>, Problem> {
    let all = view::dispatchers(context);
    if let Some(found) = all.iter().find(|dispatcher| dispatcher.name().as_ref() == service) {
        return Ok(Arc::clone(found));
    }
    let known: Vec<&str> = all.iter().map(|dispatcher| dispatcher.name().as_ref()).take(NAMES_MAX).collect();
    Err(Problem::not_found(&format!("there is no service {service}; there are: {}", known.join(", "))))
}

/// As [`dispatcher`], for what changes something. From the moment in which another process was given the state (by this
/// thread, so nothing comes between the look and the deed) it is that one's to do.
fn steerable(context: &Context, service: &str) -> Result<Arc<Dispatcher>, Problem> {
    let found = dispatcher(context, service)?;
    if found.has_successor() { Err(handing_over()) } else { Ok(found) }
}

fn handing_over() -> Problem {
    let detail = "another process is taking over, or has; nothing was done: ask again in a moment, on a new connection";
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "handing_over", detail)
}

/// That of the named service, or all.
fn dispatchers(context: &Context, service: Option<&str>) -> Result<Vec<Arc<Dispatcher>>, Problem> {
    match service {
        Some(service) => dispatcher(context, service).map(|dispatcher| vec![dispatcher]),
        None => Ok(view::dispatchers(context)),
    }
}

/// Query parameters of known names. An unknown one is refused: a misspelt `key` would widen what is asked for.
struct Known(HashMap<String, String>);

impl Known {
    fn of(parameters: HashMap<String, String>, names: &[&str]) -> Result<Known, Problem> {
        match parameters.keys().find(|name| !names.contains(&name.as_str())) {
            Some(unknown) => {
                let names = names.join(", ");
                Err(Problem::bad_request(&format!("there is no parameter {unknown} here; there are: {names}")))
            }
            None => Ok(Known(parameters)),
        }
    }

    /// An empty value is as good as none.
    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn limit(&self) -> Result<usize, Problem> {
        let Some(text) = self.text("limit") else { return Ok(ROWS_DEFAULT) };
        let limit = text.parse::<usize>().map_err(|_| Problem::bad_request("limit must be a whole number"))?;
        Ok(limit.min(ROWS_MAX))
    }
}

/// Rows of sessions or runs where `limit` is not given.
const ROWS_DEFAULT: usize = 1000;
const ROWS_MAX: usize = 100_000;
/// How many names an error lists of those that would be right.
const NAMES_MAX: usize = 20;

/// How long an answer may be waited for.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// How often it is looked what has become of a run that is to be ended.
const ENDING_EVERY: Duration = Duration::from_millis(20);

/// So probable it must be that a rollout cuts nothing to be called safe.
const CONFIDENCE_DEFAULT: f64 = 0.95;

const CONNECTIONS_MAX: usize = 256;
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
const HEAD_BYTES_MAX: usize = 64 << 10;
