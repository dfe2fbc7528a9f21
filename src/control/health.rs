//! Health: asks every endpoint that has a check how it is, and tells its dispatcher.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HOST, HeaderName, HeaderValue, USER_AGENT};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use crate::config::{self, EndpointHost, EndpointUrl, HostPolicy, HttpVersion};
use crate::ids;
use crate::state::ClientTls;
use crate::state::dispatcher::Dispatcher;

/// Probes under way at once, of all services; more wait for their turn.
const PROBES_MAX: usize = 256;
/// How much of an answer's body is read, so that the endpoint can finish writing it; more is cut.
const BODY_BYTES_MAX: usize = 64 * 1024;

const AGENT: &str = concat!("longhaul/", env!("CARGO_PKG_VERSION"), " health");

/// One endpoint to be probed, and who is to hear of it.
pub struct Check {
    pub service: Arc<str>,
    pub dispatcher: Arc<Dispatcher>,
    /// [`EndpointUrl::identity`].
    pub identity: String,
    pub probe: Probe,
}

/// How to probe one endpoint.
#[derive(Clone)]
pub struct Probe {
    pub url: EndpointUrl,
    pub http: HttpVersion,
    pub host: HostPolicy,
    /// `versions[].headers.set`: the only credentials that a probe carries.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Set for https.
    pub tls: Option<ClientTls>,
    pub health: config::Health,
}

/// What one probe showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Healthy,
    /// And why.
    Unhealthy(String),
    /// 401 or 403: the endpoint answers, but not to us. Nothing changes.
    NoEvidence(StatusCode),
}

/// Keeps one task for each check of the newest configuration; an unchanged check goes on undisturbed.
pub async fn run(mut checks: watch::Receiver<Vec<Arc<Check>>>) {
    let slots = Arc::new(Semaphore::new(PROBES_MAX));
    let mut tasks: HashMap<(Arc<str>, String), Probing> = HashMap::new();
    loop {
        let wanted = checks.borrow_and_update().clone();
        let mut next = HashMap::with_capacity(wanted.len());
        for check in wanted {
            let key = (Arc::clone(&check.service), check.identity.clone());
            let probing = match tasks.remove(&key) {
                Some(probing) if probing.check.same(&check) => probing,
                _ => {
                    let task = tokio::spawn(keep_probing(Arc::clone(&check), Arc::clone(&slots)));
                    Probing { check, _task: AbortOnDropHandle::new(task) }
                }
            };
            next.insert(key, probing);
        }
        // What is left in the old map is no longer wanted: dropping it ends it.
        tasks = next;
        if checks.changed().await.is_err() {
            return;
        }
    }
}

struct Probing {
    check: Arc<Check>,
    /// Ends with it.
    _task: AbortOnDropHandle<()>,
}

impl Check {
    fn same(&self, other: &Check) -> bool {
        let (mine, its) = (&self.probe, &other.probe);
        let same_tls = match (&mine.tls, &its.tls) {
            (Some(mine), Some(its)) => Arc::ptr_eq(&mine.config, &its.config) && mine.server_name == its.server_name,
            (None, None) => true,
            _ => false,
        };
        same_tls
            && Arc::ptr_eq(&self.dispatcher, &other.dispatcher)
            && mine.url == its.url
            && mine.http == its.http
            && mine.host == its.host
            && mine.set == its.set
            && mine.health == its.health
    }
}

/// The first probe at once, then one each interval.
async fn keep_probing(check: Arc<Check>, slots: Arc<Semaphore>) {
    let mut last = None;
    loop {
        let Ok(slot) = slots.acquire().await else { return };
        let started = ids::now();
        let (verdict, rest) = probe(&check.probe).await;
        match &verdict {
            Verdict::Healthy => check.dispatcher.probe_result(&check.identity, true, ids::now()),
            Verdict::Unhealthy(_) => check.dispatcher.probe_result(&check.identity, false, ids::now()),
            Verdict::NoEvidence(_) => {}
        }
        if last.as_ref() != Some(&verdict) {
            tell(&check, &verdict);
            last = Some(verdict);
        }
        if let Some(rest) = rest {
            // Slow bodies don't matter: the verdict is known.
            let _ = tokio::time::timeout(check.probe.health.timeout, rest).await;
        }
        drop(slot);
        let took = ids::now().saturating_duration_since(started);
        tokio::time::sleep(jittered(check.probe.health.interval, ids::random_u64()).saturating_sub(took)).await;
    }
}

fn tell(check: &Check, verdict: &Verdict) {
    let (service, endpoint) = (&check.service, check.probe.url.address());
    match verdict {
        Verdict::Healthy => info!(%service, endpoint, "health check passed"),
        Verdict::Unhealthy(reason) => warn!(%service, endpoint, reason, "health check failed"),
        Verdict::NoEvidence(status) => warn!(
            %service,
            endpoint,
            status = status.as_u16(),
            "the endpoint refuses health checks, which shows nothing: give them a credential in versions[].headers.set, \
             or choose a health.path that needs none"
        ),
    }
}

/// The interval, give or take 10 %, so that probes of many endpoints spread out.
fn jittered(interval: Duration, random: u64) -> Duration {
    let share = (random >> 11) as f64 / (1u64 << 53) as f64;
    interval.mul_f64(0.9 + 0.2 * share)
}

/// Reads the rest of an answer, so that the endpoint sees a proper end.
pub type Rest = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Probes once, within `health.timeout`.
pub async fn probe(probe: &Probe) -> (Verdict, Option<Rest>) {
    match tokio::time::timeout(probe.health.timeout, ask(probe)).await {
        Ok(Ok(None)) => (Verdict::Healthy, None),
        Ok(Ok(Some((status, rest)))) => (judge(status, &probe.health.expect_status), Some(rest)),
        Ok(Err(reason)) => (Verdict::Unhealthy(reason), None),
        Err(_) => (Verdict::Unhealthy(format!("no answer within {:?}", probe.health.timeout)), None),
    }
}

fn judge(status: StatusCode, expected: &[(u16, u16)]) -> Verdict {
    if status == StatusCode::UNAUTHORIZED || status == StatusCode::FORBIDDEN {
        return Verdict::NoEvidence(status);
    }
    let code = status.as_u16();
    if expected.iter().any(|(low, high)| (*low..=*high).contains(&code)) {
        Verdict::Healthy
    } else {
        Verdict::Unhealthy(format!("answered {code}"))
    }
}

type Answer = (StatusCode, Rest);

/// The answer of an HTTP check, `None` of a TCP check that could connect.
async fn ask(probe: &Probe) -> Result<Option<Answer>, String> {
    let stream = connect(probe).await?;
    let Some(path) = &probe.health.path else { return Ok(None) };
    let Some(tls) = &probe.tls else {
        return match probe.http {
            HttpVersion::Http2 => ask_http2(probe, path, stream).await,
            HttpVersion::Auto | HttpVersion::Http1 => ask_http1(probe, path, stream).await,
        }
        .map(Some);
    };
    let connector = TlsConnector::from(Arc::clone(&tls.config));
    let stream = connector
        .connect(tls.server_name.clone(), stream)
        .await
        .map_err(|failure| format!("TLS handshake failed: {failure}"))?;
    let negotiated_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    if negotiated_http2 || probe.http == HttpVersion::Http2 {
        ask_http2(probe, path, stream).await
    } else {
        ask_http1(probe, path, stream).await
    }
    .map(Some)
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn connect(probe: &Probe) -> Result<Box<dyn Stream>, String> {
    let failed = |failure: std::io::Error| format!("can't connect: {failure}");
    match &probe.url {
        EndpointUrl::Unix(path) => Ok(Box::new(UnixStream::connect(path).await.map_err(failed)?)),
        EndpointUrl::Tcp { host, port, .. } => {
            let port = probe.health.port.unwrap_or(*port);
            let stream = match host {
                EndpointHost::Ip(ip) => TcpStream::connect((*ip, port)).await,
                EndpointHost::Name(name) => TcpStream::connect((name.as_str(), port)).await,
            };
            Ok(Box::new(stream.map_err(failed)?))
        }
    }
}

async fn ask_http1(probe: &Probe, path: &str, stream: impl Stream + 'static) -> Result<Answer, String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|failure| format!("no HTTP/1.1: {failure}"))?;
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let target: Uri = path.parse().map_err(|_| format!("health.path {path} is no request target"))?;
    let mut request = Request::get(target).body(Empty::<Bytes>::new()).map_err(|failure| failure.to_string())?;
    let host = HeaderValue::try_from(host(probe)).map_err(|_| "the endpoint's host is no header value".to_owned())?;
    request.headers_mut().insert(HOST, host);
    set_headers(request.headers_mut(), probe);
    request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    let response = sender.send_request(request).await.map_err(|failure| format!("no answer: {failure}"))?;
    let status = response.status();
    let rest = async move {
        let mut body = response.into_body();
        let mut seen = 0;
        while let Some(Ok(frame)) = body.frame().await {
            seen += frame.data_ref().map_or(0, Bytes::len);
            if seen > BODY_BYTES_MAX {
                break;
            }
        }
        drop((sender, connection));
    };
    Ok((status, Box::pin(rest)))
}

async fn ask_http2(probe: &Probe, path: &str, stream: impl Stream + 'static) -> Result<Answer, String> {
    let (sender, connection) =
        h2::client::handshake(stream).await.map_err(|failure| format!("no HTTP/2: {failure}"))?;
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let mut sender = sender.ready().await.map_err(|failure| format!("no HTTP/2: {failure}"))?;
    let target = Uri::builder()
        .scheme(if probe.tls.is_some() { "https" } else { "http" })
        .authority(host(probe))
        .path_and_query(path)
        .build()
        .map_err(|_| format!("health.path {path} is no request target"))?;
    let mut request = Request::get(target).body(()).map_err(|failure| failure.to_string())?;
    set_headers(request.headers_mut(), probe);
    let (response, _) = sender.send_request(request, true).map_err(|failure| format!("no answer: {failure}"))?;
    let response = response.await.map_err(|failure| format!("no answer: {failure}"))?;
    let status = response.status();
    let rest = async move {
        let mut body = response.into_body();
        let mut seen = 0;
        while let Some(Ok(data)) = body.data().await {
            seen += data.len();
            // Fails only where the stream has ended already.
            let _ = body.flow_control().release_capacity(data.len());
            if seen > BODY_BYTES_MAX {
                break;
            }
        }
        drop((sender, connection));
    };
    Ok((status, Box::pin(rest)))
}

/// A probe has no client whose Host could be kept, so `preserve` is the endpoint's own.
fn host(probe: &Probe) -> String {
    match (&probe.host, &probe.url) {
        (HostPolicy::Literal(host), _) => host.clone(),
        (HostPolicy::Preserve | HostPolicy::Endpoint, EndpointUrl::Unix(_)) => "localhost".to_owned(),
        (HostPolicy::Preserve | HostPolicy::Endpoint, url @ EndpointUrl::Tcp { .. }) => url.address(),
    }
}

fn set_headers(headers: &mut http::HeaderMap, probe: &Probe) {
    headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
    for (name, value) in &probe.set {
        headers.insert(name, value.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_decides_but_401_and_403_are_no_evidence() {
        let expected = [(200, 299), (404, 404)];
        let judged = |code: u16| judge(StatusCode::from_u16(code).unwrap(), &expected);
        assert_eq!(judged(200), Verdict::Healthy);
        assert_eq!(judged(299), Verdict::Healthy);
        assert_eq!(judged(404), Verdict::Healthy);
        assert_eq!(judged(300), Verdict::Unhealthy("answered 300".to_owned()));
        assert_eq!(judged(500), Verdict::Unhealthy("answered 500".to_owned()));
        assert_eq!(judged(401), Verdict::NoEvidence(StatusCode::UNAUTHORIZED));
        assert_eq!(judged(403), Verdict::NoEvidence(StatusCode::FORBIDDEN));
    }

    #[test]
    fn jitter_stays_within_a_tenth() {
        let interval = Duration::from_secs(10);
        assert_eq!(jittered(interval, 0), Duration::from_secs(9));
        let most = jittered(interval, u64::MAX);
        assert!(most > Duration::from_millis(10_990) && most <= Duration::from_secs(11), "{most:?}");
    }
}
