//! Target: what a request asks for, brought to one spelling, so that what is matched is what is forwarded.

use super::HeadError;
use super::octets::{self, HOST, PATH, QUERY, UNRESERVED};

/// Splits an origin-form target into its normalised path and its query (without the `?`, as sent).
///
/// The path must begin with `/` (`*` is for the caller to tell). Dot segments are removed (RFC 3986 section 5.2.4),
/// percent-encoded unreserved characters decoded, other percent-encodings upper-cased, `<`, `>` and the backtick
/// encoded; slashes are not merged. Also for the `:path` of HTTP/2.
///
/// A query may hold `"`, `<` and `>`, which some clients send and `http::Uri` refuses.
pub fn normalise_target(text: &str) -> Result<(String, Option<String>), HeadError> {
    normalise(text.as_bytes())
}

/// Whether `authority` is `host` or `host:port`: a name, an IPv4 address, or an IPv6 address in brackets; a decimal
/// port up to 65535 where there is a colon; no user information.
pub fn valid_authority(authority: &[u8]) -> bool {
    let (host, port) = split_port(authority);
    let host_is_valid = match host {
        [b'[', address @ .., b']'] => {
            std::str::from_utf8(address).is_ok_and(|text| text.parse::<std::net::Ipv6Addr>().is_ok())
        }
        name => !name.is_empty() && valid_name(name),
    };
    host_is_valid && port.is_none_or(valid_port)
}

/// As [`normalise_target`], for bytes.
pub(super) fn normalise(target: &[u8]) -> Result<(String, Option<String>), HeadError> {
    let (path, query) = match memchr::memchr(b'?', target) {
        Some(at) => (&target[..at], Some(&target[at + 1..])),
        None => (target, None),
    };
    let query = match query {
        Some(query) => Some(checked(query, QUERY)?.to_owned()),
        None => None,
    };
    if path.first() != Some(&b'/') {
        return Err(HeadError::Malformed("The target does not begin with a slash."));
    }
    // Nothing to change is by far the most frequent case.
    if !has_dot_segment(path)
        && let Ok(path) = checked(path, PATH)
    {
        return Ok((path.to_owned(), query));
    }
    let decoded = decode(path)?;
    Ok((remove_dot_segments(&decoded), query))
}

/// Whether two authorities are the same: hosts without regard to case, `default_port` where a port is missing.
pub(super) fn same_authority(one: &[u8], other: &[u8], default_port: u16) -> bool {
    let (one_host, one_port) = split_port(one);
    let (other_host, other_port) = split_port(other);
    let number = |port: Option<&[u8]>| port.map_or(Some(default_port), port_number);
    one_host.eq_ignore_ascii_case(other_host) && number(one_port) == number(other_port)
}

/// `bytes` as text, if all of them are in `class`.
fn checked(bytes: &[u8], class: u8) -> Result<&str, HeadError> {
    match bytes.iter().find(|&&byte| !octets::is(byte, class)) {
        Some(&byte) => Err(refused(byte)),
        None => std::str::from_utf8(bytes).map_err(|_| refused(0x80)),
    }
}

/// The sentence for a byte that may not stand in a target.
fn refused(byte: u8) -> HeadError {
    HeadError::Malformed(match byte {
        b' ' => "The target holds a space.",
        b'#' => "The target holds a fragment.",
        b'\\' => "The path holds a backslash.",
        0..0x20 | 0x7f => "The target holds a control byte.",
        _ => "The target holds a byte that must be percent-encoded.",
    })
}

fn has_dot_segment(path: &[u8]) -> bool {
    memchr::memchr_iter(b'.', path).any(|at| path[at - 1] == b'/')
}

/// Percent-encodings in their one form. All bytes of the result are in PATH or `%`.
fn decode(path: &[u8]) -> Result<String, HeadError> {
    let mut decoded = String::with_capacity(path.len());
    let mut bytes = path.iter();
    while let Some(&byte) = bytes.next() {
        if octets::is(byte, PATH) {
            decoded.push(char::from(byte));
            continue;
        }
        if matches!(byte, b'<' | b'>' | b'`') {
            push_encoded(&mut decoded, byte);
            continue;
        }
        if byte != b'%' {
            return Err(refused(byte));
        }
        let digits = (
            bytes.next().and_then(|&digit| octets::hex_digit(digit)),
            bytes.next().and_then(|&digit| octets::hex_digit(digit)),
        );
        let (Some(high), Some(low)) = digits else {
            return Err(HeadError::Malformed("The path holds a `%` without two hexadecimal digits."));
        };
        let value = high << 4 | low;
        if value == 0 {
            return Err(HeadError::Malformed("The path holds an encoded NUL byte."));
        }
        if octets::is(value, UNRESERVED) {
            decoded.push(char::from(value));
        } else {
            push_encoded(&mut decoded, value);
        }
    }
    Ok(decoded)
}

fn push_encoded(text: &mut String, value: u8) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    text.push('%');
    text.push(char::from(DIGITS[usize::from(value >> 4)]));
    text.push(char::from(DIGITS[usize::from(value & 0xf)]));
}

/// RFC 3986 section 5.2.4, for a path that begins with a slash.
fn remove_dot_segments(path: &str) -> String {
    let mut kept = String::with_capacity(path.len());
    let mut ends_open = false;
    for segment in path.split('/').skip(1) {
        ends_open = matches!(segment, "." | "..");
        match segment {
            "." => {}
            ".." => kept.truncate(kept.rfind('/').unwrap_or(0)),
            _ => {
                kept.push('/');
                kept.push_str(segment);
            }
        }
    }
    if ends_open || kept.is_empty() {
        kept.push('/');
    }
    kept
}

/// Host and port, split at the colon after the host; of an IPv6 address without brackets, nonsense that is not valid.
fn split_port(authority: &[u8]) -> (&[u8], Option<&[u8]>) {
    match memchr::memrchr(b':', authority) {
        // A colon inside brackets is the address's own.
        Some(at) if !authority[at..].contains(&b']') => (&authority[..at], Some(&authority[at + 1..])),
        _ => (authority, None),
    }
}

fn valid_name(name: &[u8]) -> bool {
    let mut bytes = name.iter();
    while let Some(&byte) = bytes.next() {
        let valid = match byte {
            b'%' => [bytes.next(), bytes.next()].iter().all(|digit| digit.is_some_and(u8::is_ascii_hexdigit)),
            _ => octets::is(byte, HOST),
        };
        if !valid {
            return false;
        }
    }
    true
}

fn valid_port(port: &[u8]) -> bool {
    port_number(port).is_some()
}

fn port_number(port: &[u8]) -> Option<u16> {
    let mut number: Option<u16> = None;
    for byte in port {
        let digit = byte.is_ascii_digit().then(|| u16::from(byte - b'0'))?;
        number = Some(number.unwrap_or(0).checked_mul(10)?.checked_add(digit)?);
    }
    number
}

#[cfg(test)]
mod tests {
    use super::{normalise_target, same_authority, valid_authority};
    use crate::http1::HeadError;

    #[test]
    fn paths_have_one_spelling() {
        for (sent, path) in [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/a/b/..", "/a/"),
            ("/a/b/.", "/a/b/"),
            ("/..", "/"),
            ("/../../a", "/a"),
            ("/.", "/"),
            ("/a//b", "/a//b"),
            ("/a//../b", "/a/b"),
            ("//a", "//a"),
            ("/.//a", "//a"),
            ("/...", "/..."),
            ("/.well-known/x", "/.well-known/x"),
            ("/a.b/c..d", "/a.b/c..d"),
            ("/%7euser/%41", "/~user/A"),
            ("/a%2fb%2F", "/a%2Fb%2F"),
            ("/%2e%2E/x", "/x"),
            ("/a/.%2e/x", "/x"),
            ("/%e2%82%ac", "/%E2%82%AC"),
            ("/a%25b", "/a%25b"),
            ("/a|b[0]{x}", "/a|b[0]{x}"),
            ("/<a>/../`", "/%60"),
        ] {
            assert_eq!(normalise_target(sent), Ok((path.to_owned(), None)), "{sent}");
            let (once, _) = normalise_target(sent).expect("it is valid");
            assert_eq!(normalise_target(&once), Ok((once.clone(), None)), "again {sent}");
        }
    }

    #[test]
    fn queries_stay_as_sent() {
        for query in ["", "a=b", "a=%2e&b=%zz%", "x=1?y=/../", "j={\"a\":[1|2]}\\"] {
            let sent = format!("/p?{query}");
            assert_eq!(normalise_target(&sent), Ok(("/p".to_owned(), Some(query.to_owned()))));
        }
    }

    #[test]
    fn bad_targets_have_each_their_sentence() {
        for (sent, words) in [
            ("", "slash"),
            ("a/b", "slash"),
            ("*", "slash"),
            ("?a", "slash"),
            ("/a b", "space"),
            ("/a?b c", "space"),
            ("/a\tb", "control"),
            ("/a\x7f", "control"),
            ("/a?\x01", "control"),
            ("/%41\x01", "control"),
            ("/a#b", "fragment"),
            ("/a?b#c", "fragment"),
            ("/ä", "percent-encoded"),
            ("/a?ä", "percent-encoded"),
            ("/a\\b", "backslash"),
            ("/%41\\b", "backslash"),
            ("/%", "two hex"),
            ("/%4", "two hex"),
            ("/%4g", "two hex"),
            ("/%%41", "two hex"),
            ("/%00", "NUL"),
        ] {
            match normalise_target(sent) {
                Err(HeadError::Malformed(sentence)) => assert!(sentence.contains(words), "{sent:?}: {sentence}"),
                other => panic!("{sent:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn authorities() {
        for valid in ["a", "a.example", "A-b_c~", "10.0.0.1:80", "[::1]", "[::1]:8080", "a:0", "a:65535", "%41b", "x;y"]
        {
            assert!(valid_authority(valid.as_bytes()), "{valid}");
        }
        for bad in [
            "",
            ":",
            ":80",
            "a:",
            "a:b",
            "a:+1",
            "a:65536",
            "a:80:80",
            "u@a",
            "a b",
            "a/b",
            "a,b",
            "a?b",
            "a#b",
            "[::1",
            "::1",
            "[]",
            "[g]",
            "[::1]x",
            "[::1]:",
            "a%4",
            "a%zz",
            "ä",
            "a\0",
            "a\\b",
            "[1.2.3.4]",
            "<a>",
            "a\t",
        ] {
            assert!(!valid_authority(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn default_ports_and_case_do_not_matter() {
        for (one, other, default_port, same) in [
            ("a", "A", 80, true),
            ("a:80", "a", 80, true),
            ("a:443", "a", 443, true),
            ("a:0080", "a:80", 1, true),
            ("a:443", "a", 80, false),
            ("a", "b", 80, false),
            ("[::1]:80", "[::1]", 80, true),
            ("a:1", "a:2", 80, false),
        ] {
            assert_eq!(same_authority(one.as_bytes(), other.as_bytes(), default_port), same, "{one} {other}");
        }
    }
}
