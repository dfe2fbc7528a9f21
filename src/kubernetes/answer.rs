//! Answer: what an API server says to one request, within bounds: the whole of it, or line by line as a watch brings it.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use kube::Client;
use kube::client::Body;
use kube::core::Status;

/// Of what is said to explain a refusal.
const REFUSAL_BYTES_MAX: usize = 64 << 10;
/// Of plain words.
const MESSAGE_LENGTH_MAX: usize = 200;
/// One event of a watch: an object, of which the API server keeps no larger ones than a few megabytes.
const LINE_BYTES_MAX: usize = 16 << 20;
/// Whoever wants not to be asked for longer is asked after this all the same.
const COME_AGAIN_MAX: Duration = Duration::from_secs(60);

/// Why there is no answer, or none that can be used.
#[derive(Debug)]
pub enum Failure {
    /// There is no connection, or it broke.
    Unheard(kube::Error),
    /// It says no.
    Refused(Refusal),
    /// What it says is not what was asked for.
    Unusable(String),
}

/// An answer with an error's status, or the error within one that began well.
#[derive(Debug)]
pub struct Refusal {
    /// Its `code` is that of the answer, also where there is no more to read.
    pub status: Box<Status>,
    /// When it wants to be asked again (`Retry-After` of 429 and 503): 60 s at most.
    pub come_again: Option<Duration>,
}

impl Failure {
    /// See [`Refusal::come_again`].
    pub fn come_again(&self) -> Option<Duration> {
        match self {
            Failure::Refused(refusal) => refusal.come_again,
            Failure::Unheard(_) | Failure::Unusable(_) => None,
        }
    }
}

/// The answer to a request, its body still to come. It has no time limit.
pub async fn ask(client: &Client, request: Request<Vec<u8>>) -> Result<Response<Body>, Failure> {
    let mut request = request.map(Body::from);
    // A watch is read as it comes.
    request.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let answer = client.send(request).await.map_err(Failure::Unheard)?;
    if answer.status().is_success() {
        return Ok(answer);
    }
    let (head, body) = answer.into_parts();
    // Where it says nothing that can be read, its status has to do.
    let said = Limited::new(body, REFUSAL_BYTES_MAX).collect().await.map(|said| said.to_bytes()).unwrap_or_default();
    let mut status: Box<Status> = serde_json::from_slice(&said).unwrap_or_else(|_| {
        // Some who stand before it, and its own limits, say it in plain words.
        let message = String::from_utf8_lossy(&said).trim().chars().take(MESSAGE_LENGTH_MAX).collect();
        Box::new(Status { message, ..Status::default() })
    });
    status.code = head.status.as_u16();
    let come_again = come_again(head.status, &head.headers, &status);
    Err(Failure::Refused(Refusal { status, come_again }))
}

/// The whole of an answer.
pub async fn read(answer: Response<Body>, bytes_max: usize) -> Result<Bytes, Failure> {
    match Limited::new(answer.into_body(), bytes_max).collect().await {
        Ok(read) => Ok(read.to_bytes()),
        Err(failure) if failure.is::<http_body_util::LengthLimitError>() => {
            Err(Failure::Unusable(format!("it is longer than {bytes_max} bytes")))
        }
        Err(failure) => Err(match failure.downcast::<kube::Error>() {
            Ok(failure) => Failure::Unheard(*failure),
            Err(failure) => Failure::Unusable(failure.to_string()),
        }),
    }
}

/// The API server gives seconds, in the header or, where it explains itself, in its words.
fn come_again(status: StatusCode, headers: &HeaderMap, said: &Status) -> Option<Duration> {
    if !matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        return None;
    }
    let header = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    let said = said.details.as_ref().map(|details| u64::from(details.retry_after_seconds)).filter(|after| *after > 0);
    header.or(said).map(|seconds| Duration::from_secs(seconds).min(COME_AGAIN_MAX))
}

/// The lines of an answer that has no end.
pub struct Lines {
    body: Body,
    unread: BytesMut,
    /// So far there is no end of a line in it.
    scanned: usize,
}

impl Lines {
    pub fn of(answer: Response<Body>) -> Lines {
        Lines { body: answer.into_body(), unread: BytesMut::new(), scanned: 0 }
    }

    /// The next one; `None` where the answer has ended or broke off, a part of a line included. Nothing is lost where
    /// it is not waited for.
    pub async fn next(&mut self) -> Option<Result<Bytes, Failure>> {
        loop {
            if let Some(end) = memchr::memchr(b'\n', &self.unread[self.scanned..]) {
                let line = self.unread.split_to(self.scanned + end + 1).freeze();
                self.scanned = 0;
                return Some(Ok(line));
            }
            self.scanned = self.unread.len();
            if self.scanned > LINE_BYTES_MAX {
                return Some(Err(Failure::Unusable(format!("an event is longer than {LINE_BYTES_MAX} bytes"))));
            }
            if let Ok(data) = self.body.frame().await?.ok()?.into_data() {
                self.unread.extend_from_slice(&data);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_what_they_are_however_they_come() {
        let answer = Response::new(Body::from(b"one\n\ntwo\nhalf".to_vec()));
        let mut lines = Lines::of(answer);
        for wanted in ["one\n", "\n", "two\n"] {
            assert_eq!(lines.next().await.unwrap().unwrap(), wanted);
        }
        assert!(lines.next().await.is_none());
    }

    #[test]
    fn a_server_is_asked_again_when_it_wants_to_be_and_not_never() {
        let of = |status, header: Option<&'static str>, said: &str| {
            let headers = header.map(|value| (header::RETRY_AFTER, HeaderValue::from_static(value)));
            come_again(status, &headers.into_iter().collect(), &serde_json::from_str(said).unwrap())
        };
        let busy = StatusCode::TOO_MANY_REQUESTS;
        assert_eq!(of(busy, Some("7"), "{}"), Some(Duration::from_secs(7)));
        assert_eq!(of(busy, None, r#"{"details":{"retryAfterSeconds":3}}"#), Some(Duration::from_secs(3)));
        assert_eq!(of(busy, None, r#"{"details":{}}"#), None);
        assert_eq!(of(busy, Some("Fri, 31 Dec 1999 23:59:59 GMT"), "{}"), None);
        assert_eq!(of(StatusCode::SERVICE_UNAVAILABLE, Some("86400"), "{}"), Some(COME_AGAIN_MAX));
        assert_eq!(of(StatusCode::FORBIDDEN, Some("7"), "{}"), None);
    }
}
