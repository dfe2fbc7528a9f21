//! Cookie: the proxy's own session cookie, sealed so that clients can neither read nor forge it.

use std::time::{Duration, SystemTime};

use crate::state::dispatcher::PinHint;

/// Seals and opens the cookies of one service.
pub struct Sealer {
    _name: String,
}

/// What a cookie says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CookieSession {
    /// The session's key: random, made by the proxy.
    pub id: String,
    /// Where the session was pinned when the cookie was issued.
    pub pin: PinHint,
}

impl Sealer {
    /// `secrets`: the first seals, all open; empty: a random one for this process.
    pub fn new(name: &str, ttl: Duration, secrets: &[String]) -> Sealer {
        let _ = (ttl, secrets);
        Sealer { _name: name.to_owned() }
    }

    /// The whole value of a Set-Cookie field: HttpOnly, SameSite=Lax, Path=/, Max-Age; Secure on TLS.
    pub fn seal(&self, session: &CookieSession, secure: bool, now: SystemTime) -> String {
        let _ = (session, secure, now);
        unimplemented!()
    }

    /// Opens the cookie in a request's Cookie fields; `None` where there is none, or it is forged, foreign or too old.
    pub fn open<'a>(&self, cookies: impl Iterator<Item = &'a [u8]>, now: SystemTime) -> Option<CookieSession> {
        let _ = (cookies, now);
        unimplemented!()
    }

    /// Removes the cookie from the request, leaving the client's others as they are.
    pub fn strip(&self, fields: &mut crate::message::Fields) {
        let _ = fields;
    }
}
