//! Errors that longhaul makes itself, as data: one code per cause, with its status and whether a later try can help.

use http::StatusCode;

/// The `code` of a problem answer (`application/problem+json`, RFC 9457), of logs and of `longhaul_requests_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    NoRoute,
    BadRequest,
    HeaderTooLarge,
    BodyTooLarge,
    SessionBusy,
    IdempotencyConflict,
    QueueFull,
    PrincipalLimit,
    QueueTimeout,
    NoEndpoint,
    SessionLost,
    Draining,
    Overloaded,
    ConnectFailed,
    TlsFailed,
    UpstreamReset,
    ConnectTimeout,
    FirstByteTimeout,
    RunTimeout,
}

impl Code {
    pub const ALL: [Code; 19] = [
        Code::NoRoute,
        Code::BadRequest,
        Code::HeaderTooLarge,
        Code::BodyTooLarge,
        Code::SessionBusy,
        Code::IdempotencyConflict,
        Code::QueueFull,
        Code::PrincipalLimit,
        Code::QueueTimeout,
        Code::NoEndpoint,
        Code::SessionLost,
        Code::Draining,
        Code::Overloaded,
        Code::ConnectFailed,
        Code::TlsFailed,
        Code::UpstreamReset,
        Code::ConnectTimeout,
        Code::FirstByteTimeout,
        Code::RunTimeout,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Code::NoRoute => "no_route",
            Code::BadRequest => "bad_request",
            Code::HeaderTooLarge => "header_too_large",
            Code::BodyTooLarge => "body_too_large",
            Code::SessionBusy => "session_busy",
            Code::IdempotencyConflict => "idempotency_conflict",
            Code::QueueFull => "queue_full",
            Code::PrincipalLimit => "principal_limit",
            Code::QueueTimeout => "queue_timeout",
            Code::NoEndpoint => "no_endpoint",
            Code::SessionLost => "session_lost",
            Code::Draining => "draining",
            Code::Overloaded => "overloaded",
            Code::ConnectFailed => "connect_failed",
            Code::TlsFailed => "tls_failed",
            Code::UpstreamReset => "upstream_reset",
            Code::ConnectTimeout => "connect_timeout",
            Code::FirstByteTimeout => "first_byte_timeout",
            Code::RunTimeout => "run_timeout",
        }
    }

    pub fn status(self) -> StatusCode {
        match self {
            Code::NoRoute => StatusCode::NOT_FOUND,
            Code::BadRequest => StatusCode::BAD_REQUEST,
            Code::HeaderTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Code::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Code::SessionBusy => StatusCode::CONFLICT,
            Code::IdempotencyConflict => StatusCode::UNPROCESSABLE_ENTITY,
            Code::QueueFull | Code::PrincipalLimit => StatusCode::TOO_MANY_REQUESTS,
            Code::QueueTimeout | Code::NoEndpoint | Code::SessionLost | Code::Draining | Code::Overloaded => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Code::ConnectFailed | Code::TlsFailed | Code::UpstreamReset => StatusCode::BAD_GATEWAY,
            Code::ConnectTimeout | Code::FirstByteTimeout | Code::RunTimeout => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// A short sentence that is the same for every occurrence (RFC 9457 section 3.1.3).
    pub fn title(self) -> &'static str {
        match self {
            Code::NoRoute => "No route matches the request",
            Code::BadRequest => "The request is malformed or ambiguous",
            Code::HeaderTooLarge => "The request head is too large",
            Code::BodyTooLarge => "The request body is too large",
            Code::SessionBusy => "The session has a run",
            Code::IdempotencyConflict => "The key of an earlier start was used for another",
            Code::PrincipalLimit => "The caller has as many runs as it may",
            Code::QueueTimeout => "No endpoint became free in time",
            Code::QueueFull => "Every endpoint is at its run limit and the queue is full",
            Code::NoEndpoint => "No endpoint is ready",
            Code::SessionLost => "The session's endpoint is gone",
            Code::Draining => "The proxy is shutting down",
            Code::Overloaded => "The proxy is at a limit of its own",
            Code::ConnectFailed => "The endpoint could not be connected to",
            Code::TlsFailed => "The TLS handshake with the endpoint failed",
            Code::UpstreamReset => "The endpoint broke off or sent a malformed answer",
            Code::ConnectTimeout => "The endpoint did not accept the connection in time",
            Code::FirstByteTimeout => "The endpoint sent no answer in time",
            Code::RunTimeout => "The run exceeded its allowed duration",
        }
    }

    /// The error type of `Proxy-Status` (RFC 9209 section 2.3).
    pub fn proxy_status(self) -> &'static str {
        match self {
            Code::NoRoute | Code::NoEndpoint | Code::SessionLost => "destination_unavailable",
            Code::BadRequest | Code::HeaderTooLarge | Code::BodyTooLarge => "http_request_error",
            Code::SessionBusy | Code::IdempotencyConflict | Code::PrincipalLimit => "http_request_denied",
            Code::QueueFull | Code::QueueTimeout => "connection_limit_reached",
            Code::Draining | Code::Overloaded => "proxy_internal_response",
            Code::ConnectFailed => "connection_refused",
            Code::TlsFailed => "tls_protocol_error",
            Code::UpstreamReset => "connection_terminated",
            Code::ConnectTimeout => "connection_timeout",
            Code::FirstByteTimeout | Code::RunTimeout => "http_response_timeout",
        }
    }

    /// Seconds for `Retry-After`, where a later try can work.
    pub fn retry_after_seconds(self) -> Option<u16> {
        match self {
            Code::QueueFull | Code::PrincipalLimit | Code::QueueTimeout => Some(1),
            Code::NoEndpoint | Code::Draining | Code::Overloaded => Some(1),
            Code::ConnectFailed | Code::ConnectTimeout => Some(1),
            _ => None,
        }
    }
}

/// An error that ends an exchange: its code and a sentence for whoever reads the answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {detail}", code.as_str())]
pub struct ProxyError {
    pub code: Code,
    pub detail: String,
    /// In place of the code's own, where the caller's protocol gives another one the meaning that is needed.
    pub status: StatusCode,
    /// In place of [`Code::retry_after_seconds`], where it was measured.
    pub retry_after_seconds: Option<u16>,
}

impl ProxyError {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        ProxyError {
            code,
            detail: detail.into(),
            status: code.status(),
            retry_after_seconds: code.retry_after_seconds(),
        }
    }
}
