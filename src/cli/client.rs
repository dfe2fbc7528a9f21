//! Client: one request at a time to the admin API of a running proxy, over TCP or a unix socket.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::{AUTHORIZATION, HOST, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// Where the admin API is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminUrl {
    /// `host:port`
    Tcp(String),
    Unix(PathBuf),
}

impl FromStr for AdminUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<AdminUrl, String> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| path.starts_with('/')) {
            return Ok(AdminUrl::Unix(PathBuf::from(path)));
        }
        let expected = || "must be http://HOST:PORT or unix:/PATH, such as http://127.0.0.1:9901".to_owned();
        let authority = text.strip_prefix("http://").ok_or_else(expected)?.trim_end_matches('/');
        let parsed: http::uri::Authority = authority.parse().map_err(|_| expected())?;
        if parsed.as_str().contains('@') || parsed.host().is_empty() {
            return Err(expected());
        }
        let port = parsed.port_u16().unwrap_or(80);
        Ok(AdminUrl::Tcp(format!("{}:{port}", parsed.host())))
    }
}

impl fmt::Display for AdminUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminUrl::Tcp(authority) => write!(formatter, "http://{authority}"),
            AdminUrl::Unix(path) => write!(formatter, "unix:{}", path.display()),
        }
    }
}

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "{url} can't be reached ({source}); is longhaul running? If its admin address is another one, say so with --admin URL"
    )]
    Unreachable { url: AdminUrl, source: std::io::Error },
    #[error("{url} refuses: {detail} ({status}); {hint}", hint = token_hint(*.has_token))]
    Unauthorized { url: AdminUrl, status: StatusCode, detail: String, has_token: bool },
    #[error("{detail}")]
    Refused { status: StatusCode, detail: String },
    #[error("{url} did not answer as longhaul does: {what}")]
    Strange { url: AdminUrl, what: String },
    #[error("{url} gave no answer within {} s", TIMEOUT.as_secs())]
    Late { url: AdminUrl },
    #[error("the token file {file} can't be used: {why}")]
    Token { file: String, why: String },
}

fn token_hint(has_token: bool) -> &'static str {
    if has_token { "the token in --token-file is not the proxy's" } else { "give --token-file FILE" }
}

/// Speaks to one proxy.
pub struct Client {
    url: AdminUrl,
    authorization: Option<HeaderValue>,
}

impl Client {
    pub fn new(url: AdminUrl, token_file: Option<&Path>) -> Result<Client, ClientError> {
        let authorization = token_file.map(authorization).transpose()?;
        Ok(Client { url, authorization })
    }

    pub async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.request(Method::GET, path).await
    }

    pub async fn post(&self, path: &str) -> Result<Value, ClientError> {
        self.request(Method::POST, path).await
    }

    async fn request(&self, method: Method, path: &str) -> Result<Value, ClientError> {
        let exchange = async {
            match &self.url {
                AdminUrl::Tcp(address) => {
                    let stream = TcpStream::connect(address).await.map_err(|error| self.unreachable(error))?;
                    self.exchange(stream, address, method, path).await
                }
                AdminUrl::Unix(file) => {
                    let stream = UnixStream::connect(file).await.map_err(|error| self.unreachable(error))?;
                    self.exchange(stream, "localhost", method, path).await
                }
            }
        };
        match tokio::time::timeout(TIMEOUT, exchange).await {
            Ok(result) => result,
            Err(_) => Err(ClientError::Late { url: self.url.clone() }),
        }
    }

    async fn exchange<S>(&self, stream: S, host: &str, method: Method, path: &str) -> Result<Value, ClientError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let strange = |what: String| ClientError::Strange { url: self.url.clone(), what };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| strange(error.to_string()))?;
        // Its errors come out of the request; it ends with it.
        let connection = tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header(HOST, host);
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| strange(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(|error| strange(error.to_string()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| strange(error.to_string()))?
            .to_bytes();
        connection.abort();
        let answer: Option<Value> = serde_json::from_slice(&body).ok();
        if status.is_success() || status == StatusCode::LOCKED {
            return answer.ok_or_else(|| strange(format!("{path} is not JSON")));
        }
        // Without it this is the problem of another program's answer.
        let Some(detail) = answer.as_ref().and_then(|answer| answer["detail"].as_str()) else {
            return Err(strange(format!("{path} answered {status}")));
        };
        let detail = detail.to_owned();
        Err(match status {
            StatusCode::UNAUTHORIZED => {
                let has_token = self.authorization.is_some();
                ClientError::Unauthorized { url: self.url.clone(), status, detail, has_token }
            }
            _ => ClientError::Refused { status, detail },
        })
    }

    fn unreachable(&self, source: std::io::Error) -> ClientError {
        ClientError::Unreachable { url: self.url.clone(), source }
    }
}

fn authorization(file: &Path) -> Result<HeaderValue, ClientError> {
    let wrong = |why: String| ClientError::Token { file: file.display().to_string(), why };
    let text = std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    if text.trim().is_empty() {
        return Err(wrong("it is empty".to_owned()));
    }
    let mut value = HeaderValue::from_str(&format!("Bearer {}", text.trim()))
        .map_err(|_| wrong("it must be one line of visible characters".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// `?name=value&..` of those that are there; empty where none is.
pub fn query(parameters: &[(&str, Option<String>)]) -> String {
    let mut text = String::new();
    for (name, value) in parameters {
        if let Some(value) = value {
            let separator = if text.is_empty() { '?' } else { '&' };
            text.push_str(&format!("{separator}{name}={}", encode(value)));
        }
    }
    text
}

/// For one path segment or query value.
pub fn encode(text: &str) -> impl fmt::Display + '_ {
    utf8_percent_encode(text, RESERVED)
}

/// Everything that is not unreserved (RFC 3986 section 2.3).
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A reload may have to resolve and read files.
const TIMEOUT: Duration = Duration::from_secs(30);
const ANSWER_BYTES_MAX: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for (text, expected) in [
            ("http://127.0.0.1:9901", "http://127.0.0.1:9901"),
            ("http://[::1]:9901/", "http://[::1]:9901"),
            ("http://admin.example", "http://admin.example:80"),
            ("unix:/run/longhaul.sock", "unix:/run/longhaul.sock"),
        ] {
            assert_eq!(text.parse::<AdminUrl>().unwrap().to_string(), expected);
        }
        for text in
            ["", "127.0.0.1:9901", "https://127.0.0.1:9901", "unix:relative", "http://", "http://a@b:1", "http://a/b"]
        {
            assert!(text.parse::<AdminUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn queries_are_encoded() {
        let parameters = [("service", None), ("key", Some("a b/&=é".to_owned())), ("limit", Some("5".to_owned()))];
        assert_eq!(query(&parameters), "?key=a%20b%2F%26%3D%C3%A9&limit=5");
    }
}
