//! Call: a request that the proxy itself makes to an endpoint: health checks, and questions about runs.
//!
//! It carries `versions[].headers.set` and nothing of any client's.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, USER_AGENT};
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use crate::config::{EndpointHost, EndpointUrl, HostPolicy, HttpVersion};
use crate::net::stream::Plain;
use crate::state::{ClientTls, Target};

const AGENT: &str = concat!("longhaul/", env!("CARGO_PKG_VERSION"));

/// How to reach an endpoint.
#[derive(Clone)]
pub struct Way {
    pub url: EndpointUrl,
    /// Another port than the URL's.
    pub port: Option<u16>,
    pub http: HttpVersion,
    pub host: HostPolicy,
    /// `versions[].headers.set`: the only credentials that a call carries.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Set for https.
    pub tls: Option<ClientTls>,
}

/// What is asked.
pub struct Question<'a> {
    pub method: Method,
    /// Path and query.
    pub target: &'a str,
    pub fields: &'a [(&'static str, String)],
    /// JSON where it is not empty.
    pub body: &'a [u8],
}

/// The head of an answer, and the way to its body.
pub struct Answer {
    pub status: StatusCode,
    /// Whether the endpoint drains, where it says so (`longhaul-drain`).
    pub drains: Option<bool>,
    pub body: Body,
}

/// Reads an answer's body up to a bound, so that the endpoint sees a proper end.
pub struct Body(Pin<Box<dyn Future<Output = Vec<u8>> + Send>>);

impl Body {
    /// What there is of it, as far as the bound goes.
    pub async fn read(self) -> Vec<u8> {
        self.0.await
    }
}

impl Way {
    /// As exchanges reach it.
    pub fn to(target: &Target) -> Way {
        Way {
            url: target.url.clone(),
            port: None,
            http: target.http,
            host: target.host.clone(),
            set: target.headers.set.clone(),
            tls: target.tls.clone(),
        }
    }
}

impl<'a> Question<'a> {
    pub fn get(target: &'a str) -> Question<'a> {
        Question { method: Method::GET, target, fields: &[], body: &[] }
    }
}

/// Opens a connection. The error is a sentence.
pub async fn connect(way: &Way) -> Result<Box<dyn Stream>, String> {
    let failed = |failure: std::io::Error| format!("can't connect: {failure}");
    match &way.url {
        EndpointUrl::Unix(path) => Ok(Box::new(UnixStream::connect(path).await.map_err(failed)?)),
        EndpointUrl::Tcp { host, port, .. } => {
            let port = way.port.unwrap_or(*port);
            let stream = match host {
                EndpointHost::Ip(ip) => Plain::connect_tcp(SocketAddr::new(*ip, port)).await,
                EndpointHost::Name(name) => TcpStream::connect((name.as_str(), port)).await.map(Plain::Tcp),
            };
            Ok(Box::new(stream.map_err(failed)?))
        }
    }
}

/// A connection to an endpoint.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Asks over a new connection, and reads `body_bytes_max` of the answer at most.
pub async fn ask(
    way: &Way,
    stream: Box<dyn Stream>,
    question: &Question<'_>,
    body_bytes_max: usize,
) -> Result<Answer, String> {
    let Some(tls) = &way.tls else {
        return match way.http {
            HttpVersion::Http2 => ask_http2(way, stream, question, body_bytes_max).await,
            HttpVersion::Auto | HttpVersion::Http1 => ask_http1(way, stream, question, body_bytes_max).await,
        };
    };
    let connector = TlsConnector::from(Arc::clone(&tls.config));
    let stream = connector
        .connect(tls.server_name.clone(), stream)
        .await
        .map_err(|failure| format!("TLS handshake failed: {failure}"))?;
    let negotiated_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    if negotiated_http2 || way.http == HttpVersion::Http2 {
        ask_http2(way, stream, question, body_bytes_max).await
    } else {
        ask_http1(way, stream, question, body_bytes_max).await
    }
}

async fn ask_http1(
    way: &Way,
    stream: impl Stream + 'static,
    question: &Question<'_>,
    body_bytes_max: usize,
) -> Result<Answer, String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|failure| format!("no HTTP/1.1: {failure}"))?;
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let target: Uri = question.target.parse().map_err(|_| format!("{} is no request target", question.target))?;
    let mut request = Request::new(Full::new(Bytes::copy_from_slice(question.body)));
    *request.method_mut() = question.method.clone();
    *request.uri_mut() = target;
    let host = HeaderValue::try_from(host(way)).map_err(|_| "the endpoint's host is no header value".to_owned())?;
    request.headers_mut().insert(HOST, host);
    set_headers(request.headers_mut(), way, question)?;
    request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    let response = sender.send_request(request).await.map_err(|failure| format!("no answer: {failure}"))?;
    let (status, drains) = (response.status(), drains(response.headers()));
    let body = async move {
        let mut body = response.into_body();
        let mut read = Vec::new();
        while let Some(Ok(frame)) = body.frame().await {
            read.extend_from_slice(frame.data_ref().map(Bytes::as_ref).unwrap_or_default());
            if read.len() > body_bytes_max {
                break;
            }
        }
        drop((sender, connection));
        read
    };
    Ok(Answer { status, drains, body: Body(Box::pin(body)) })
}

async fn ask_http2(
    way: &Way,
    stream: impl Stream + 'static,
    question: &Question<'_>,
    body_bytes_max: usize,
) -> Result<Answer, String> {
    let (sender, connection) =
        h2::client::handshake(stream).await.map_err(|failure| format!("no HTTP/2: {failure}"))?;
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let mut sender = sender.ready().await.map_err(|failure| format!("no HTTP/2: {failure}"))?;
    let target = Uri::builder()
        .scheme(if way.tls.is_some() { "https" } else { "http" })
        .authority(host(way))
        .path_and_query(question.target)
        .build()
        .map_err(|_| format!("{} is no request target", question.target))?;
    let mut request = Request::new(());
    *request.method_mut() = question.method.clone();
    *request.uri_mut() = target;
    set_headers(request.headers_mut(), way, question)?;
    let no_answer = |failure: h2::Error| format!("no answer: {failure}");
    let bodiless = question.body.is_empty();
    let (response, mut sending) = sender.send_request(request, bodiless).map_err(no_answer)?;
    if !bodiless {
        sending.send_data(Bytes::copy_from_slice(question.body), true).map_err(no_answer)?;
    }
    let response = response.await.map_err(no_answer)?;
    let (status, drains) = (response.status(), drains(response.headers()));
    let body = async move {
        let mut body = response.into_body();
        let mut read = Vec::new();
        while let Some(Ok(data)) = body.data().await {
            read.extend_from_slice(&data);
            // Fails only where the stream has ended already.
            let _ = body.flow_control().release_capacity(data.len());
            if read.len() > body_bytes_max {
                break;
            }
        }
        drop((sender, connection));
        read
    };
    Ok(Answer { status, drains, body: Body(Box::pin(body)) })
}

/// A call has no client whose Host could be kept, so `preserve` is the endpoint's own.
fn host(way: &Way) -> String {
    match (&way.host, &way.url) {
        (HostPolicy::Literal(host), _) => host.clone(),
        (HostPolicy::Preserve | HostPolicy::Endpoint, EndpointUrl::Unix(_)) => "localhost".to_owned(),
        (HostPolicy::Preserve | HostPolicy::Endpoint, url @ EndpointUrl::Tcp { .. }) => url.address(),
    }
}

fn drains(headers: &HeaderMap) -> Option<bool> {
    match headers.get("longhaul-drain")?.as_bytes() {
        b"1" => Some(true),
        b"0" => Some(false),
        _ => None,
    }
}

fn set_headers(headers: &mut HeaderMap, way: &Way, question: &Question<'_>) -> Result<(), String> {
    headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
    if !question.body.is_empty() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    for (name, value) in question.fields {
        let value = HeaderValue::try_from(value).map_err(|_| format!("{name} has no header value"))?;
        headers.insert(*name, value);
    }
    for (name, value) in &way.set {
        headers.insert(name, value.clone());
    }
    Ok(())
}
