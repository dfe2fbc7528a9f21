//! Guard: who may use the admin API: those with the token, and no web page of somebody else.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use tracing::error;

use crate::admin::problem::Problem;
use crate::admin::{Context, Surface, page};

/// What the socket says about whoever comes through it.
#[derive(Clone, Copy)]
pub struct Access {
    pub surface: Surface,
    pub unix: bool,
    pub loopback: bool,
}

/// One server's guard.
pub struct Door {
    pub context: Arc<Context>,
    pub access: Access,
}

/// What the caller may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reader {
    /// Session keys in the plain.
    pub plain_keys: bool,
}

/// Lets a request through, or answers it.
pub async fn pass(State(door): State<Arc<Door>>, mut request: Request, next: Next) -> Response {
    if door.access.surface == Surface::Probes {
        return next.run(request).await;
    }
    if let Err(problem) = check_browser(door.access, request.method(), request.headers()) {
        return problem.into_response();
    }
    let token_file = door.context.running.snapshot.load().loaded.config.admin.token_file.clone();
    let has_token = match token_file {
        Some(file) => match check_token(&file, request.headers()).await {
            Ok(()) => true,
            Err(_) if matches!(request.uri().path(), "/healthz" | "/readyz") => false,
            // The page holds nothing secret and can ask the person for the token.
            Err(_) if request.uri().path() == "/" && request.method() == Method::GET => return page::ask_for_token(),
            Err(problem) => return problem.into_response(),
        },
        None => false,
    };
    request.extensions_mut().insert(Reader { plain_keys: has_token || door.access.unix });
    next.run(request).await
}

/// Refuses what a browser sends on behalf of another site. Loopback and unix sockets need no token, so it is this
/// check that keeps a web page from steering the proxy of the person who looks at it.
fn check_browser(access: Access, method: &Method, headers: &HeaderMap) -> Result<(), Problem> {
    let host = headers.get(header::HOST).map(|host| host.to_str().unwrap_or("\0"));
    // A name that someone lets point to 127.0.0.1 (DNS rebinding) passes the browser's own check of the origin.
    if access.loopback && host.is_some_and(|host| !is_local_name(host)) {
        return Err(Problem::forbidden("the Host is not this machine; use 127.0.0.1 or localhost"));
    }
    if let Some(origin) = headers.get(header::ORIGIN) {
        let authority =
            origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, authority)| authority);
        let same = authority.is_some_and(|authority| host.is_some_and(|host| host.eq_ignore_ascii_case(authority)));
        if !same {
            return Err(Problem::forbidden("requests from pages of other origins are refused"));
        }
    }
    let site = headers.get("sec-fetch-site").map(|site| site.as_bytes());
    let changes = !matches!(*method, Method::GET | Method::HEAD);
    if changes && site.is_some_and(|site| site != b"same-origin" && site != b"none") {
        return Err(Problem::forbidden("requests from pages of other sites are refused"));
    }
    Ok(())
}

/// An IP address or `localhost`, with or without a port.
fn is_local_name(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        return address.parse::<IpAddr>().is_ok() && (port.is_empty() || is_port(port.strip_prefix(':').unwrap_or("")));
    }
    let name = match host.split_once(':') {
        Some((name, port)) if is_port(port) => name,
        Some(_) => return false,
        None => host,
    };
    name.parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost")
}

fn is_port(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The file is read each time, so that a token that is changed there counts at once.
async fn check_token(file: &Path, headers: &HeaderMap) -> Result<(), Problem> {
    let text = match tokio::fs::read_to_string(file).await {
        Ok(text) => text,
        Err(error) => {
            error!(%error, file = %file.display(), "admin.token_file can't be read; every request is refused");
            return Err(Problem::unauthorized("the proxy can't read its token file"));
        }
    };
    let expected = text.trim();
    let missing = || Problem::unauthorized("send the token of admin.token_file: `authorization: Bearer TOKEN`");
    let sent = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).ok_or_else(missing)?;
    let (scheme, token) = sent.split_once(' ').ok_or_else(missing)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(missing());
    }
    // An empty file must not make an empty token valid.
    match !expected.is_empty() && same(token.trim(), expected) {
        true => Ok(()),
        false => Err(Problem::unauthorized("this is not the token of admin.token_file")),
    }
}

/// Compares digests, all of their bytes, so that the time tells nothing of where or how long the expected token is.
fn same(one: &str, other: &str) -> bool {
    let (one, other) = (Sha256::digest(one), Sha256::digest(other));
    one.iter().zip(other.iter()).fold(0, |difference, (one, other)| difference | (one ^ other)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_names() {
        for host in ["127.0.0.1:9901", "localhost", "LocalHost:80", "[::1]:9901", "[::1]", "10.0.0.1"] {
            assert!(is_local_name(host), "{host}");
        }
        for host in ["", "evil.example", "evil.example:9901", "127.0.0.1.evil.example", "localhost.evil", "[::1", "a:b"]
        {
            assert!(!is_local_name(host), "{host}");
        }
    }

    #[test]
    fn tokens_are_equal_or_not() {
        assert!(same("secret", "secret"));
        assert!(!same("secret", "Secret") && !same("", "secret") && !same("secret2", "secret"));
    }
}
