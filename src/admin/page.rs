//! Page: the live page, one HTML document without a single foreign resource.

use std::sync::LazyLock;

use axum::http::{HeaderName, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

/// The page.
pub async fn serve() -> Response {
    answer(StatusCode::OK)
}

/// The page for a browser that has not sent the token: it asks the person for it.
pub fn ask_for_token() -> Response {
    let mut response = answer(StatusCode::UNAUTHORIZED);
    response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    response
}

fn answer(status: StatusCode) -> Response {
    const NO_REFERRER: (HeaderName, &str) = (header::REFERRER_POLICY, "no-referrer");
    (status, [NO_REFERRER, (header::CONTENT_SECURITY_POLICY, POLICY.as_str())], Html(PAGE)).into_response()
}

const PAGE: &str = include_str!("page.html");

/// Only the page's own script and style run (CSP 3, hash sources), so that a name that slipped through unescaped
/// could do nothing.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        hash(element("script")),
        hash(element("style")),
    )
});

fn element(name: &str) -> &'static str {
    let (_, rest) = PAGE.split_once(&format!("<{name}>")).unwrap_or_default();
    rest.split_once(&format!("</{name}>")).unwrap_or_default().0
}

fn hash(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_self_contained() {
        for element in ["script", "style"] {
            assert_eq!(PAGE.matches(&format!("<{element}")).count(), 1, "{element}");
            assert!(!super::element(element).trim().is_empty());
        }
        for foreign in ["http://", "https://", "src=", "@import", "url(", "innerHTML", " style=", "onclick"] {
            assert!(!PAGE.contains(foreign), "{foreign}");
        }
    }
}
