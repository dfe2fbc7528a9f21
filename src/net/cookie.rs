//! Cookie: the proxy's own session cookie, sealed so that clients can neither read nor forge it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;

use crate::ids;
use crate::message::Fields;
use crate::state::dispatcher::PinHint;

/// Seals and opens the cookies of one service.
pub struct Sealer {
    name: String,
    ttl: Duration,
    /// What a cookie is bound to: it opens for no other service and under no other name.
    binding: Vec<u8>,
    /// The first seals, all open. Never empty.
    keys: Vec<LessSafeKey>,
}

/// What a cookie says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CookieSession {
    /// The session's key: random, made by the proxy.
    pub id: String,
    /// Where the session was pinned when the cookie was issued.
    pub pin: PinHint,
}

impl CookieSession {
    /// A session with a new id of 128 random bits.
    pub fn new(random: [u8; 16], pin: PinHint) -> CookieSession {
        CookieSession { id: URL_SAFE_NO_PAD.encode(random), pin }
    }
}

impl Sealer {
    /// `secrets`: the first seals, all open; empty: a random one for this process.
    pub fn new(service: &str, name: &str, ttl: Duration, secrets: &[String]) -> Sealer {
        let binding = [service.as_bytes(), b"\0", name.as_bytes()].concat();
        let keys = if secrets.is_empty() {
            vec![key(&ids::random_bytes::<32>(), &binding)]
        } else {
            secrets.iter().map(|secret| key(secret.as_bytes(), &binding)).collect()
        };
        Sealer { name: name.to_owned(), ttl, binding, keys }
    }

    /// The whole value of a Set-Cookie field: HttpOnly, SameSite=Lax, Path=/, Max-Age; Secure on TLS. It opens for the
    /// same `principal` only; the empty one is everybody, where principals are not told apart.
    pub fn seal(&self, session: &CookieSession, principal: &[u8], secure: bool, now: SystemTime) -> String {
        let value = self.seal_value(session, principal, now, ids::random_bytes());
        let secure = if secure { "; Secure" } else { "" };
        format!("{}={value}; Path=/; Max-Age={}; HttpOnly; SameSite=Lax{secure}", self.name, self.ttl.as_secs())
    }

    /// Opens the cookie in a request's Cookie fields; `None` where there is none, or it is forged, foreign, another
    /// principal's or too old.
    pub fn open<'a>(
        &self,
        cookies: impl Iterator<Item = &'a [u8]>,
        principal: &[u8],
        now: SystemTime,
    ) -> Option<CookieSession> {
        cookies
            .flat_map(|field| field.split(|byte| *byte == b';'))
            .filter_map(|pair| self.value_of(pair))
            // Clients may hold several of one name, of other paths or domains; more than a few are an attempt.
            .take(ATTEMPTS_MAX)
            .find_map(|value| self.open_value(value, principal, now))
    }

    /// Removes the cookie from the request, leaving the client's others as they are.
    pub fn strip(&self, fields: &mut Fields) {
        let is_cookie = |name: &[u8]| name.eq_ignore_ascii_case(b"cookie");
        let is_ours = |pair: &[u8]| self.value_of(pair).is_some();
        let is_there =
            fields.iter().any(|(name, value)| is_cookie(name) && value.split(|byte| *byte == b';').any(is_ours));
        if !is_there {
            return;
        }
        let mut stripped = Fields::default();
        for (name, value) in fields.iter() {
            if !is_cookie(name) || !value.split(|byte| *byte == b';').any(is_ours) {
                stripped.push(name, value);
                continue;
            }
            let others: Vec<&[u8]> = value.split(|byte| *byte == b';').filter(|pair| !is_ours(pair)).collect();
            let others = others.join(&b';');
            let others = others.trim_ascii();
            if !others.is_empty() {
                stripped.push(name, others);
            }
        }
        *fields = stripped;
    }

    /// The value of a pair ` name=value` if the name is ours (they are case-sensitive, RFC 6265 section 4.1.1).
    fn value_of<'a>(&self, pair: &'a [u8]) -> Option<&'a [u8]> {
        let (name, value) = pair.split_at(memchr::memchr(b'=', pair)?);
        let value = value[1..].trim_ascii();
        let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
        (name.trim_ascii() == self.name.as_bytes()).then_some(value)
    }

    fn bound_to(&self, principal: &[u8]) -> Vec<u8> {
        if principal.is_empty() { self.binding.clone() } else { [&*self.binding, b"\0", principal].concat() }
    }

    fn seal_value(&self, session: &CookieSession, principal: &[u8], now: SystemTime, nonce: [u8; NONCE_LEN]) -> String {
        let mut sealed = nonce.to_vec();
        let expires = now.checked_add(self.ttl).map_or(u64::MAX, seconds);
        let mut payload = encode(session, expires);
        // Sealing fails only beyond 256 GiB; the empty value that would come of it opens for nobody.
        let Ok(tag) = self.keys[0].seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(self.bound_to(principal)),
            &mut payload,
        ) else {
            return String::new();
        };
        sealed.extend_from_slice(&payload);
        sealed.extend_from_slice(tag.as_ref());
        URL_SAFE_NO_PAD.encode(sealed)
    }

    fn open_value(&self, value: &[u8], principal: &[u8], now: SystemTime) -> Option<CookieSession> {
        if value.len() > VALUE_BYTES_MAX {
            return None;
        }
        let sealed = URL_SAFE_NO_PAD.decode(value).ok()?;
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let (session, expires) = self.keys.iter().find_map(|key| {
            let mut payload = sealed.to_vec();
            let nonce = Nonce::assume_unique_for_key(*nonce);
            decode(key.open_in_place(nonce, Aad::from(self.bound_to(principal)), &mut payload).ok()?)
        })?;
        (seconds(now) < expires).then_some(session)
    }
}

/// No browser keeps a cookie above 4096 bytes.
const VALUE_BYTES_MAX: usize = 4096;

/// How many cookies of our name one request may have tried.
const ATTEMPTS_MAX: usize = 4;

/// The longest id, version or endpoint that a cookie holds.
const TEXT_BYTES_MAX: usize = 700;

/// The first byte of the payload, so that a later form can be told from this one.
const FORM: u8 = 1;

fn key(secret: &[u8], binding: &[u8]) -> LessSafeKey {
    let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, b"longhaul session cookie");
    let pseudorandom = salt.extract(secret);
    let info = [binding];
    let derived = pseudorandom
        .expand(&info, &CHACHA20_POLY1305)
        .map(UnboundKey::from)
        .expect("32 bytes are far below what HKDF-SHA256 can give (8160)");
    LessSafeKey::new(derived)
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Form, expiry in seconds since 1970, then id, version and endpoint, each with its length before it.
fn encode(session: &CookieSession, expires: u64) -> Vec<u8> {
    let texts = [&session.id, &session.pin.version, &session.pin.endpoint];
    let mut payload = vec![FORM];
    payload.extend_from_slice(&expires.to_be_bytes());
    for text in texts {
        // A text that is too long is left out: the hint then names no endpoint, and the session is placed anew.
        let text = if text.len() > TEXT_BYTES_MAX { "" } else { text };
        payload.extend_from_slice(&(text.len() as u16).to_be_bytes());
        payload.extend_from_slice(text.as_bytes());
    }
    payload
}

fn decode(payload: &[u8]) -> Option<(CookieSession, u64)> {
    let (&form, rest) = payload.split_first()?;
    if form != FORM {
        return None;
    }
    let (expires, rest) = rest.split_first_chunk::<8>()?;
    let (id, rest) = decode_text(rest)?;
    let (version, rest) = decode_text(rest)?;
    let (endpoint, rest) = decode_text(rest)?;
    let session = CookieSession { id, pin: PinHint { version, endpoint } };
    rest.is_empty().then_some((session, u64::from_be_bytes(*expires)))
}

fn decode_text(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    let (text, rest) = rest.split_at_checked(u16::from_be_bytes(*length).into())?;
    Some((String::from_utf8(text.to_vec()).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TTL: Duration = Duration::from_secs(3600);

    const NOBODY: &[u8] = b"";

    fn sealer(secrets: &[&str]) -> Sealer {
        let secrets: Vec<String> = secrets.iter().map(|secret| (*secret).to_owned()).collect();
        Sealer::new("support", "longhaul", TTL, &secrets)
    }

    fn session() -> CookieSession {
        let pin = PinHint { version: "stable".to_owned(), endpoint: "http://10.0.0.11:8000".to_owned() };
        CookieSession::new([7; 16], pin)
    }

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    /// The Cookie field that a client makes of a Set-Cookie field.
    fn cookie(set_cookie: &str) -> String {
        set_cookie.split(';').next().unwrap().to_owned()
    }

    fn open(sealer: &Sealer, fields: &[&str], now: SystemTime) -> Option<CookieSession> {
        sealer.open(fields.iter().map(|field| field.as_bytes()), NOBODY, now)
    }

    #[test]
    fn what_is_sealed_opens_until_it_is_too_old() {
        let sealer = sealer(&["a"]);
        let cookie = cookie(&sealer.seal(&session(), NOBODY, true, now()));
        assert_eq!(open(&sealer, &[&cookie], now()), Some(session()));
        assert_eq!(open(&sealer, &["a=1", &format!("b=2; {cookie} ;c=3")], now()), Some(session()));
        let quoted = format!("longhaul=\"{}\"", cookie.strip_prefix("longhaul=").unwrap());
        assert_eq!(open(&sealer, &[&quoted], now()), Some(session()));
        assert_eq!(open(&sealer, &[&format!("longhaul=x; {cookie}")], now()), Some(session()));
        assert_eq!(open(&sealer, &[&cookie], now() + TTL - Duration::from_secs(1)), Some(session()));
        assert_eq!(open(&sealer, &[&cookie], now() + TTL), None);
        assert_eq!(open(&sealer, &[], now()), None);
        assert_eq!(open(&sealer, &[&cookie.to_uppercase()], now()), None);
    }

    #[test]
    fn the_attributes() {
        let sealer = sealer(&["a"]);
        let attributes = |secure| {
            let sealed = sealer.seal(&session(), NOBODY, secure, now());
            sealed.split_once(';').unwrap().1.to_owned()
        };
        assert_eq!(attributes(false), " Path=/; Max-Age=3600; HttpOnly; SameSite=Lax");
        assert_eq!(attributes(true), " Path=/; Max-Age=3600; HttpOnly; SameSite=Lax; Secure");
        assert!(sealer.seal(&session(), NOBODY, true, now()).len() < 256);
    }

    #[test]
    fn the_value_is_hidden_and_never_the_same() {
        let sealer = sealer(&["a"]);
        let (one, other) = (sealer.seal(&session(), NOBODY, true, now()), sealer.seal(&session(), NOBODY, true, now()));
        assert_ne!(one, other);
        let value = URL_SAFE_NO_PAD.decode(cookie(&one).strip_prefix("longhaul=").unwrap()).unwrap();
        assert_eq!(memchr::memmem::find(&value, b"10.0.0.11"), None);
    }

    #[test]
    fn secrets_rotate() {
        let (old, both, new) = (sealer(&["old"]), sealer(&["new", "old"]), sealer(&["new"]));
        let of_old = cookie(&old.seal(&session(), NOBODY, true, now()));
        let of_both = cookie(&both.seal(&session(), NOBODY, true, now()));
        assert_eq!(open(&both, &[&of_old], now()), Some(session()));
        assert_eq!(open(&both, &[&of_both], now()), Some(session()));
        assert_eq!(open(&new, &[&of_both], now()), Some(session()));
        assert_eq!(open(&new, &[&of_old], now()), None);
        assert_eq!(open(&old, &[&of_both], now()), None);
    }

    #[test]
    fn a_cookie_opens_only_where_it_was_made() {
        let secrets = ["a".to_owned()];
        let here = Sealer::new("support", "longhaul", TTL, &secrets);
        let cookie = cookie(&here.seal(&session(), NOBODY, true, now()));
        assert_eq!(open(&Sealer::new("coder", "longhaul", TTL, &secrets), &[&cookie], now()), None);
        let renamed = cookie.replace("longhaul=", "other=");
        assert_eq!(open(&Sealer::new("support", "other", TTL, &secrets), &[&renamed], now()), None);
        // Without secrets, every process has its own.
        assert_eq!(
            open(&sealer(&[]), &[&self::cookie(&sealer(&[]).seal(&session(), NOBODY, true, now()))], now()),
            None
        );
    }

    #[test]
    fn a_cookie_opens_for_its_principal_only() {
        let sealer = sealer(&["a"]);
        let cookie = cookie(&sealer.seal(&session(), b"anna", true, now()));
        for (principal, expected) in [(&b"anna"[..], Some(session())), (b"mallory", None), (NOBODY, None)] {
            assert_eq!(sealer.open([cookie.as_bytes()].into_iter(), principal, now()), expected);
        }
    }

    #[test]
    fn an_overlong_hint_still_carries_the_session() {
        let sealer = sealer(&["a"]);
        let pin = PinHint { version: "v".repeat(1 << 17), endpoint: "e".repeat(TEXT_BYTES_MAX) };
        let cookie = cookie(&sealer.seal(&CookieSession::new([1; 16], pin), NOBODY, true, now()));
        let opened = open(&sealer, &[&cookie], now()).unwrap();
        assert_eq!(opened.id, CookieSession::new([1; 16], session().pin).id);
        assert_eq!((opened.pin.version.len(), opened.pin.endpoint.len()), (0, TEXT_BYTES_MAX));
    }

    #[test]
    fn only_our_cookie_is_stripped() {
        for (before, after) in [
            (vec!["a=1; longhaul=x; b=2"], vec!["a=1; b=2"]),
            (vec!["longhaul=x; b=2"], vec!["b=2"]),
            (vec!["a=1; longhaul=x"], vec!["a=1"]),
            (vec!["longhaul=x"], vec![]),
            (vec!["longhaul=x; longhaul=y", "c=3"], vec!["c=3"]),
            (vec!["a=1;longhaul=x;b=2;  c=3"], vec!["a=1;b=2;  c=3"]),
            (vec!["longhaul2=x; Longhaul=y; longhaul"], vec!["longhaul2=x; Longhaul=y; longhaul"]),
            (vec!["a=longhaul=x"], vec!["a=longhaul=x"]),
        ] {
            let mut fields = Fields::default();
            fields.append("accept", b"*/*");
            for value in &before {
                fields.append("Cookie", value.as_bytes());
            }
            sealer(&["a"]).strip(&mut fields);
            let left: Vec<_> = fields.get_all("cookie").map(|value| std::str::from_utf8(value).unwrap()).collect();
            assert_eq!(left, after, "{before:?}");
            assert_eq!(fields.get("accept"), Some(&b"*/*"[..]));
        }
    }

    proptest! {
        #[test]
        fn garbage_never_opens(bytes in proptest::collection::vec(any::<u8>(), 0..200), valid_base64: bool) {
            let sealer = sealer(&["a", "b"]);
            let mut field = b"longhaul=".to_vec();
            if valid_base64 {
                field.extend_from_slice(URL_SAFE_NO_PAD.encode(&bytes).as_bytes());
            } else {
                field.extend_from_slice(&bytes);
            }
            prop_assert_eq!(sealer.open([&field[..]].into_iter(), NOBODY, now()), None);
            let mut fields = Fields::default();
            fields.append("cookie", &field);
            sealer.strip(&mut fields);
            prop_assert!(fields.get("cookie").is_none_or(|left| !left.starts_with(b"longhaul=")));
        }

        #[test]
        fn no_changed_byte_goes_unseen(index in 0usize..1000, bit in 0u8..8) {
            let sealer = sealer(&["a"]);
            let value = sealer.seal_value(&session(), NOBODY, now(), [3; NONCE_LEN]);
            let mut bytes = URL_SAFE_NO_PAD.decode(&value).unwrap();
            let index = index % bytes.len();
            bytes[index] ^= 1 << bit;
            prop_assert_eq!(sealer.open_value(URL_SAFE_NO_PAD.encode(bytes).as_bytes(), NOBODY, now()), None);
            prop_assert_eq!(sealer.open_value(value.as_bytes(), NOBODY, now()), Some(session()));
        }

        #[test]
        fn payloads_of_any_kind_are_read_without_panic(payload in proptest::collection::vec(any::<u8>(), 0..60)) {
            if let Some((session, expires)) = decode(&payload) {
                prop_assert_eq!(encode(&session, expires), payload);
            }
        }
    }
}
