//! Values: the kinds of single values: durations, sizes, addresses, header names, patterns, URLs.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::read::{Kind, REDACTED, Read, join, nearest};
use super::yaml::{Data, Node, Scalar, quote};
use super::{Address, EndpointHost, EndpointUrl, JsonPointer, PathPattern};

/// Ten years: longer waits are surely mistakes, and adding one to an instant never overflows.
const DURATION_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// The longest path that fits a unix socket's address, without its final zero.
const SOCKET_PATH_MAX: usize = 107;

/// Any text; numbers and booleans are taken as they are written.
pub fn text<'k>() -> Kind<'k, String> {
    Kind::scalar("a text", || json!({"type": "string"}), |_, scalar| Ok(scalar.text.clone()), |text| json!(text))
}

pub fn boolean<'k>() -> Kind<'k, bool> {
    Kind::scalar(
        "true or false",
        || json!({"type": ["boolean", "string"], "pattern": VARIABLE}),
        |_, scalar| match scalar.text.as_str() {
            "true" | "True" | "TRUE" if scalar.plain => Ok(true),
            "false" | "False" | "FALSE" if scalar.plain => Ok(false),
            text => Err(format!("expected true or false (without quotes), found {}", quote(text))),
        },
        |value| json!(value),
    )
}

/// An integer within `least..=most`.
pub fn integer<'k>(least: u64, most: u64) -> Kind<'k, u64> {
    Kind::scalar(
        "an integer",
        move || json!({"type": ["integer", "string"], "minimum": least, "maximum": most, "pattern": VARIABLE}),
        move |_, scalar| {
            let text = &scalar.text;
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            match text.parse::<u64>() {
                Ok(_) if !scalar.plain => Err(format!("expected an integer, found a text; remove the quotes: {text}")),
                Ok(number) if digits && (least..=most).contains(&number) => Ok(number),
                _ if most == u64::MAX => Err(format!("expected an integer of at least {least}, found {}", quote(text))),
                _ => Err(format!("expected an integer from {least} to {most}, found {}", quote(text))),
            }
        },
        |number| json!(number),
    )
}

/// An integer that fits 32 bits by its bounds.
pub fn small<'k>(least: u32, most: u32) -> Kind<'k, u32> {
    integer(least.into(), most.into()).map(|number| number as u32)
}

/// A count of things in memory.
pub fn count<'k>(least: u64) -> Kind<'k, usize> {
    integer(least, u64::from(u32::MAX)).map(|number| number as usize)
}

pub fn port<'k>() -> Kind<'k, u16> {
    integer(1, 65535).map(|number| number as u16)
}

/// One of some words, each with what it means.
pub fn choice<'k, T: Copy + 'k>(options: &'k [(&'static str, T)]) -> Kind<'k, T> {
    let words = || options.iter().map(|(word, _)| *word);
    let all = move || words().collect::<Vec<_>>().join(", ");
    Kind::new(
        format!("one of {}", all()),
        move || {
            // A plain `1` in the file is a number to an editor.
            let numbers = words().filter_map(|word| word.parse::<u64>().ok()).map(|number| json!(number));
            json!({"enum": words().map(|word| json!(word)).chain(numbers).collect::<Vec<_>>()})
        },
        move |context, node, path| {
            let Some(word) = word(node) else {
                context.problem(node.spot, path, format!("expected one of {}; found {}", all(), node.describe()));
                return None;
            };
            match options.iter().find(|(option, _)| *option == word) {
                Some((word, value)) => Some(Read { value: *value, shown: json!(word) }),
                None if is_secret_node(node) => {
                    context.problem(
                        node.spot,
                        path,
                        format!("expected one of {}; the file holds something else", all()),
                    );
                    None
                }
                None => {
                    let hint =
                        nearest(word, words()).map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
                    context.problem(node.spot, path, format!("expected one of {}; found {}{hint}", all(), quote(word)));
                    None
                }
            }
        },
    )
}

fn is_secret_node(node: &Node) -> bool {
    matches!(&node.data, Data::Scalar(scalar) if scalar.secret)
}

fn word(node: &Node) -> Option<&str> {
    match &node.data {
        Data::Scalar(scalar) if !scalar.is_null() => Some(&scalar.text),
        _ => None,
    }
}

/// A duration that may be zero.
pub fn duration<'k>() -> Kind<'k, Duration> {
    Kind::scalar(
        "a duration such as 30s",
        || json!({"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$|\\$\\{"}),
        |_, scalar| parse_duration(&scalar.text),
        |duration| json!(show_duration(*duration)),
    )
}

/// A duration longer than zero.
pub fn positive_duration<'k>() -> Kind<'k, Duration> {
    duration().checked(|duration| match duration.is_zero() {
        true => Err("must be longer than 0s".to_owned()),
        false => Ok(()),
    })
}

pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let expected = || format!("expected a duration such as 250ms, 30s, 5m or 1h; found {}", quote(text));
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = match number.parse() {
        Ok(number) => number,
        Err(_) => return Err(expected()),
    };
    let milliseconds = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60 * 1000),
        "h" => number.checked_mul(3600 * 1000),
        "" => return Err(format!("a duration needs a unit: {number}ms, {number}s, {number}m or {number}h")),
        "d" => return Err(format!("a duration is in ms, s, m or h: {}h", number.saturating_mul(24))),
        _ => return Err(expected()),
    };
    match milliseconds.map(Duration::from_millis) {
        Some(duration) if duration <= DURATION_MAX => Ok(duration),
        _ => Err(format!("{} is too long; at most {}", quote(text), show_duration(DURATION_MAX))),
    }
}

/// In the largest unit that needs no fraction: `90s`, `5m`, `1h`.
pub fn show_duration(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    match milliseconds {
        0 => "0s".to_owned(),
        _ if milliseconds.is_multiple_of(3_600_000) => format!("{}h", milliseconds / 3_600_000),
        _ if milliseconds.is_multiple_of(60_000) => format!("{}m", milliseconds / 60_000),
        _ if milliseconds.is_multiple_of(1000) => format!("{}s", milliseconds / 1000),
        _ => format!("{milliseconds}ms"),
    }
}

/// Bytes, within `least..=most`.
pub fn size<'k>(least: u64, most: u64) -> Kind<'k, u64> {
    Kind::scalar(
        "a size such as 64KiB",
        || json!({"type": ["string", "integer"], "minimum": 0, "pattern": "^[0-9]+(B|KiB|MiB|GiB|TiB)?$|\\$\\{"}),
        move |_, scalar| match parse_size(&scalar.text)? {
            bytes if bytes < least => Err(format!("{} is too small; at least {}", scalar.text, show_size(least))),
            bytes if bytes > most => Err(format!("{} is too large; at most {}", scalar.text, show_size(most))),
            bytes => Ok(bytes),
        },
        |bytes| json!(show_size(*bytes)),
    )
}

pub fn parse_size(text: &str) -> Result<u64, String> {
    let expected = || format!("expected a size such as 64KiB or 4MiB, or bytes as an integer; found {}", quote(text));
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| expected())?;
    let factor = match unit {
        "" | "B" => Some(1),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        "TiB" => Some(1u64 << 40),
        _ => None,
    };
    if let Some(factor) = factor {
        return number.checked_mul(factor).ok_or_else(|| format!("{} is too large", quote(text)));
    }
    let binary = match unit.to_ascii_lowercase().as_str() {
        "k" | "kb" | "ki" | "kib" => "KiB",
        "m" | "mb" | "mi" | "mib" => "MiB",
        "g" | "gb" | "gi" | "gib" => "GiB",
        _ => return Err(expected()),
    };
    Err(format!("{}; did you mean {number}{binary}?", expected()))
}

fn show_size(bytes: u64) -> String {
    let units = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes != 0 && bytes.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{}{name}", bytes / unit),
        None => format!("{bytes}B"),
    }
}

/// A share of the whole, `0%` to `100%`, as a fraction.
pub fn ratio<'k>() -> Kind<'k, f64> {
    Kind::scalar(
        "a ratio such as 5%",
        || json!({"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?%$|\\$\\{"}),
        |_, scalar| {
            let text = &scalar.text;
            let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            let number = text.strip_suffix('%').filter(|number| match number.split_once('.') {
                Some((whole, part)) => digits(whole) && digits(part),
                None => digits(number),
            });
            match number.and_then(|number| number.parse::<f64>().ok()) {
                Some(percent) if percent <= 100.0 => Ok(percent / 100.0),
                Some(_) => Err(format!("a ratio is at most 100%, found {}", quote(text))),
                None => Err(format!("expected a ratio such as 5%, found {}", quote(text))),
            }
        },
        |fraction| json!(format!("{}%", (fraction * 1e8).round() / 1e6)),
    )
}

/// A file or directory, relative to the configuration file; not looked at.
pub fn path<'k>() -> Kind<'k, PathBuf> {
    Kind::scalar(
        "the path of a file",
        || json!({"type": "string", "minLength": 1}),
        |context, scalar| match scalar.text.is_empty() {
            true => Err("the path is empty".to_owned()),
            false => Ok(context.file(&scalar.text)),
        },
        |path| json!(path.display().to_string()),
    )
}

/// `IP:PORT`, where longhaul listens.
pub fn socket_address<'k>() -> Kind<'k, SocketAddr> {
    Kind::scalar(
        "an address such as 0.0.0.0:8080",
        || json!({"type": "string"}),
        |_, scalar| parse_socket_address(&scalar.text),
        |address| json!(address.to_string()),
    )
}

/// `IP:PORT` or `unix:/path`, where longhaul listens.
pub fn address<'k>() -> Kind<'k, Address> {
    Kind::scalar(
        "an address such as 0.0.0.0:8080, or unix:/path",
        || json!({"type": "string"}),
        |context, scalar| match scalar.text.strip_prefix("unix:") {
            Some(path) => socket_path(context.base, path).map(Address::Unix),
            None => parse_socket_address(&scalar.text).map(Address::Tcp),
        },
        |address| json!(address.to_string()),
    )
}

fn parse_socket_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let what = format!("expected an IP address and a port, such as 0.0.0.0:8080; found {}", quote(text));
    let hint = if let Some(port) = text.strip_prefix("localhost:") {
        format!("; did you mean 127.0.0.1:{port}?")
    } else if let Some(port) = text.strip_prefix(':').or_else(|| text.strip_prefix("*:")) {
        format!("; did you mean 0.0.0.0:{port}?")
    } else if let Ok(ip) = text.parse::<IpAddr>() {
        format!("; the port is missing: {}", SocketAddr::new(ip, 8080))
    } else if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        format!("; did you mean 0.0.0.0:{text}?")
    } else if text.starts_with('/') {
        format!("; did you mean unix:{text}?")
    } else {
        String::new()
    };
    Err(what + &hint)
}

fn socket_path(base: &std::path::Path, text: &str) -> Result<PathBuf, String> {
    // `unix:///run/x` is how other programs write `unix:/run/x`.
    let text = if text.starts_with("//") { format!("/{}", text.trim_start_matches('/')) } else { text.to_owned() };
    if text.is_empty() || text.ends_with('/') {
        return Err("a unix socket needs a path: unix:/run/agent.sock".to_owned());
    }
    let path = base.join(text);
    match path.as_os_str().len() > SOCKET_PATH_MAX || path.to_string_lossy().contains('\0') {
        true => Err(format!("the path of a unix socket has at most {SOCKET_PATH_MAX} bytes; use a shorter one")),
        false => Ok(path),
    }
}

/// A network such as `10.0.0.0/8`; a bare address is a network of one.
pub fn network<'k>() -> Kind<'k, IpNet> {
    Kind::scalar(
        "a network such as 10.0.0.0/8",
        || json!({"type": "string"}),
        |_, scalar| {
            let text = &scalar.text;
            let network = match text.parse::<IpAddr>() {
                Ok(address) => Ok(IpNet::from(address)),
                Err(_) => text.parse::<IpNet>(),
            };
            let network = network.map_err(|_| {
                format!("expected a network such as 10.0.0.0/8 or ::1/128, or one address; found {}", quote(text))
            })?;
            match network.trunc() == network {
                true => Ok(network),
                false => Err(format!("{text} has bits beyond its prefix; did you mean {}?", network.trunc())),
            }
        },
        |network| json!(network.to_string()),
    )
}

/// The name of a service, version or listener.
pub fn name<'k>() -> Kind<'k, String> {
    Kind::scalar(
        "a name",
        || json!({"type": "string", "minLength": 1, "maxLength": 128}),
        |_, scalar| {
            let text = &scalar.text;
            let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '"' | '\\' | '?' | '#' | '%');
            if text.is_empty() || text.len() > 128 {
                Err("a name has 1 to 128 characters".to_owned())
            } else if text.contains(bad) {
                Err(format!(
                    "{} can't be a name: no spaces, slashes, quotes, `\\`, `?`, `#` or `%`, such as support-v2",
                    quote(text)
                ))
            } else {
                Ok(text.clone())
            }
        },
        |text| json!(text),
    )
}

/// Fields that longhaul takes out of a head and writes itself.
const OWN_FIELDS: &[(&str, &str)] = &[
    ("host", "use `match.hosts` to match it and `versions[].host` to change it"),
    ("content-length", "it follows from the body"),
    ("transfer-encoding", "it follows from the body"),
    ("connection", "it belongs to one connection"),
    ("keep-alive", "it belongs to one connection"),
    ("proxy-connection", "it belongs to one connection"),
    ("te", "it belongs to one connection"),
    ("upgrade", "it belongs to one connection"),
];

pub fn header_name<'k>() -> Kind<'k, HeaderName> {
    Kind::scalar(
        "the name of a header",
        || json!({"type": "string", "minLength": 1}),
        |_, scalar| parse_header_name(&scalar.text),
        |name| json!(name.as_str()),
    )
}

fn parse_header_name(text: &str) -> Result<HeaderName, String> {
    let name: HeaderName = text.parse().map_err(|_| {
        format!("{} is not a header name; it has only letters, digits and !#$%&'*+-.^_`|~", quote(text))
    })?;
    match OWN_FIELDS.iter().find(|(own, _)| *own == name) {
        Some((_, why)) => Err(format!("the header {name} can't be used here: {why}")),
        None => Ok(name),
    }
}

/// Header names with their values, sorted by name: their order in the file has no meaning.
pub fn headers<'k>() -> Kind<'k, Vec<(HeaderName, HeaderValue)>> {
    Kind::new(
        "a mapping of header names to values",
        || json!({"type": "object", "additionalProperties": {"type": "string"}}),
        |context, node, path| {
            if node.is_null() {
                return Some(Read { value: Vec::new(), shown: json!({}) });
            }
            let Data::Map(pairs) = &node.data else {
                let message = format!("expected a mapping of header names to values, found {}", node.describe());
                context.problem(node.spot, path, message);
                return None;
            };
            let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
            let mut shown = serde_json::Map::new();
            for (key, value) in pairs {
                let written = key.key().unwrap_or("?");
                let path = join(path, written);
                let name = match parse_header_name(key.key().unwrap_or_default()) {
                    Ok(name) if headers.iter().any(|(earlier, _)| *earlier == name) => {
                        context.problem(
                            key.spot,
                            &path,
                            format!("the header {name} is already there; case makes no difference"),
                        );
                        continue;
                    }
                    Ok(name) => name,
                    Err(message) => {
                        context.problem(key.spot, &path, message);
                        continue;
                    }
                };
                if value.has_failed() {
                    continue;
                }
                let Data::Scalar(scalar) = &value.data else {
                    context.problem(value.spot, &path, format!("expected a text, found {}", value.describe()));
                    continue;
                };
                match header_value(scalar) {
                    Ok(value) => {
                        let hidden = scalar.substituted || is_secret(&name);
                        shown.insert(name.to_string(), if hidden { json!(REDACTED) } else { json!(scalar.text) });
                        headers.push((name, value));
                    }
                    Err(message) => context.problem(value.spot, &path, message),
                }
            }
            headers.sort_by(|left, right| left.0.as_str().cmp(right.0.as_str()));
            Some(Read { value: headers, shown: Value::Object(shown) })
        },
    )
}

fn header_value(scalar: &Scalar) -> Result<HeaderValue, String> {
    if scalar.is_null() {
        return Err("expected a text, found nothing (null); write \"\" for an empty value".to_owned());
    }
    if scalar.text.trim_matches([' ', '\t']) != scalar.text {
        return Err("a header value can't begin or end with a space".to_owned());
    }
    scalar.text.parse().map_err(|_| "a header value can't have line breaks or other control characters".to_owned())
}

/// Whether the values of this header are commonly secrets.
fn is_secret(name: &HeaderName) -> bool {
    let name = name.as_str();
    ["authorization", "cookie", "api-key", "apikey", "token", "secret", "password", "credential"]
        .iter()
        .any(|part| name.contains(part))
}

pub fn method<'k>() -> Kind<'k, Method> {
    Kind::scalar(
        "a method such as POST",
        || json!({"type": "string", "pattern": "^[A-Z0-9!#$%&'*+.^_`|~-]+$"}),
        |_, scalar| {
            let text = &scalar.text;
            if text.to_ascii_uppercase() != *text {
                return Err(format!("methods are in upper case: {}", text.to_ascii_uppercase()));
            }
            Method::from_bytes(text.as_bytes())
                .map_err(|_| format!("{} is not a method; such as GET or POST", quote(text)))
        },
        |method| json!(method.as_str()),
    )
}

/// The host of a request to match: lower case, without port, maybe `*.` before it.
pub fn host_pattern<'k>() -> Kind<'k, String> {
    Kind::scalar(
        "a host such as example.com or *.example.com",
        || json!({"type": "string", "minLength": 1}),
        |_, scalar| {
            let text = scalar.text.to_ascii_lowercase();
            let host = text.strip_prefix("*.").unwrap_or(&text);
            if host.contains('*') {
                return Err(format!(
                    "`*` stands only at the beginning, as in *.example.com; found {}. To match every host leave `hosts` out",
                    quote(&scalar.text)
                ));
            }
            if let Some(bare) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                return match bare.parse::<std::net::Ipv6Addr>() {
                    Ok(ip) => Ok(format!("[{ip}]")),
                    Err(_) => Err(format!("{} is not an IPv6 address in brackets", quote(&scalar.text))),
                };
            }
            if let Some((name, _)) = host.split_once(':') {
                return Err(format!("ports are ignored when hosts are compared; write {name}"));
            }
            match is_host_name(host) {
                true => Ok(text),
                false => Err(format!("{} is not a host; such as example.com or *.example.com", quote(&scalar.text))),
            }
        },
        |host| json!(host),
    )
}

fn is_host_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text.trim_end_matches('.').split('.').all(|label| !label.is_empty() && label.len() <= 63)
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// A host for a Host field: a name or address, maybe with a port.
pub fn parse_authority(text: &str) -> Result<String, String> {
    let bad = || format!("{} is not a host; such as agents.internal or agents.internal:8000", quote(text));
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((ip, rest)) => {
            ip.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
            (None, rest.strip_prefix(':').or(if rest.is_empty() { None } else { Some("") }))
        }
        None => match text.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(text), None),
        },
    };
    let host_is_good = host.is_none_or(is_host_name);
    let port_is_good = port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0));
    if host_is_good && port_is_good { Ok(text.to_owned()) } else { Err(bad()) }
}

/// A path pattern, with `{session}` only where `captures`.
pub fn path_pattern<'k>(captures: bool) -> Kind<'k, PathPattern> {
    Kind::scalar(
        "a path pattern such as /support/**",
        || json!({"type": "string", "pattern": "^/|\\$\\{"}),
        move |_, scalar| {
            let pattern: PathPattern = scalar.text.parse()?;
            let sessions = pattern.segments.iter().filter(|segment| **segment == super::Segment::Session).count();
            match (captures, sessions) {
                (true, 1) | (false, 0) => Ok(pattern),
                (true, 0) => Err("must say which segment is the key, as in /threads/{session}/**".to_owned()),
                (true, _) => Err("`{session}` may stand only once".to_owned()),
                (false, _) => {
                    Err("`{session}` has a meaning only in session keys; use `*` for any one segment".to_owned())
                }
            }
        },
        |pattern| json!(pattern.to_string()),
    )
}

/// A path without patterns, in normalised form.
pub fn literal_path<'k>() -> Kind<'k, String> {
    Kind::scalar(
        "a path such as /support",
        || json!({"type": "string", "pattern": "^/|\\$\\{"}),
        |_, scalar| {
            check_normalised(&scalar.text)?;
            Ok(scalar.text.clone())
        },
        |path| json!(path),
    )
}

/// An error unless `path` is absolute and in the form in which requests are compared and forwarded (RFC 3986 section 6.2.2).
pub fn check_normalised(path: &str) -> Result<(), String> {
    if !path.starts_with('/') {
        return Err(format!("a path begins with `/`: {}", quote(&format!("/{path}"))));
    }
    if let Some(c) = path.chars().find(|c| matches!(c, '?' | '#')) {
        return Err(format!("a path ends before `{c}`; remove it and what follows"));
    }
    let normal = normalise(path)?;
    match normal == path {
        true => Ok(()),
        false => Err(format!("paths are compared in normalised form; write {normal}")),
    }
}

fn normalise(path: &str) -> Result<String, String> {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    // `{` and `}` are let through for `{session}`; the pattern's own reading refuses them elsewhere.
    let allowed = |byte: u8| unreserved(byte) || b"/!$&'()*+,;=:@{}".contains(&byte);
    let mut text = String::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        let (value, encoded) = if byte == b'%' {
            let digits = [bytes.next().unwrap_or(b' '), bytes.next().unwrap_or(b' ')];
            let parsed = std::str::from_utf8(&digits).ok().filter(|text| !text.starts_with('+'));
            match parsed.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
                Some(value) => (value, true),
                None => return Err("`%` must be followed by two hex digits; write %25 for a literal `%`".to_owned()),
            }
        } else {
            (byte, false)
        };
        if (encoded && unreserved(value)) || (!encoded && allowed(value)) {
            text.push(char::from(value));
        } else {
            text.push('%');
            text.push(char::from(HEX[usize::from(value >> 4)]));
            text.push(char::from(HEX[usize::from(value & 15)]));
        }
    }
    let mut segments: Vec<&str> = Vec::new();
    for segment in text.split('/').skip(1) {
        match segment {
            "." => {}
            ".." => {
                segments.pop();
            }
            segment => segments.push(segment),
        }
    }
    if text.ends_with("/.") || text.ends_with("/..") {
        segments.push("");
    }
    Ok(format!("/{}", segments.join("/")))
}

/// A JSON pointer (RFC 6901) to something in a body.
pub fn json_pointer<'k>() -> Kind<'k, JsonPointer> {
    Kind::scalar(
        "a JSON pointer such as /thread_id",
        || json!({"type": "string", "pattern": "^/|\\$\\{"}),
        |_, scalar| {
            let text = &scalar.text;
            let Some(rest) = text.strip_prefix('/') else {
                return Err(format!(
                    "a JSON pointer begins with `/`: {}",
                    quote(&format!("/{}", text.trim_start_matches("$.")))
                ));
            };
            rest.split('/').map(unescape_token).collect::<Result<Vec<_>, _>>().map(JsonPointer)
        },
        |pointer| {
            let tokens = pointer.0.iter().map(|token| format!("/{}", token.replace('~', "~0").replace('/', "~1")));
            json!(tokens.collect::<String>())
        },
    )
}

fn unescape_token(token: &str) -> Result<String, String> {
    let stray = token.match_indices('~').any(|(at, _)| !matches!(token.as_bytes().get(at + 1), Some(b'0' | b'1')));
    match stray {
        true => Err("in a JSON pointer `~` is written ~0 and `/` within a name ~1".to_owned()),
        false => Ok(token.replace("~1", "/").replace("~0", "~")),
    }
}

/// The name of a cookie (RFC 6265 section 4.1.1).
pub fn cookie_name<'k>() -> Kind<'k, String> {
    Kind::scalar(
        "the name of a cookie",
        || json!({"type": "string", "minLength": 1}),
        |_, scalar| match scalar.text.parse::<HeaderName>() {
            // A header name is the same token.
            Ok(_) => Ok(scalar.text.clone()),
            Err(_) => Err(format!(
                "{} is not a cookie name; it has only letters, digits and !#$%&'*+-.^_`|~",
                quote(&scalar.text)
            )),
        },
        |name| json!(name),
    )
}

/// Status codes as `200-399`, `200`, or a list of these, as inclusive ranges.
pub fn status_ranges<'k>() -> Kind<'k, Vec<(u16, u16)>> {
    let form = || json!({"type": ["string", "integer"]});
    Kind::new(
        "status codes such as 200-399",
        move || json!({"anyOf": [form(), {"type": "array", "minItems": 1, "items": form()}]}),
        |context, node, path| {
            let single = std::slice::from_ref(node);
            let (items, is_list) = match &node.data {
                Data::List(items) => (items.as_slice(), true),
                _ => (single, false),
            };
            if items.is_empty() {
                context.problem(node.spot, path, "expected status codes such as 200-399, found an empty list");
            }
            let mut ranges = Vec::new();
            for (index, item) in items.iter().enumerate() {
                let path = if is_list { format!("{path}[{index}]") } else { path.to_owned() };
                match parse_status_range(item) {
                    Ok(range) => ranges.push(range),
                    Err(message) => context.problem(item.spot, &path, message),
                }
            }
            let show = |(first, last): &(u16, u16)| match first == last {
                true => json!(first),
                false => json!(format!("{first}-{last}")),
            };
            let shown = match ranges.as_slice() {
                [range] => show(range),
                ranges => ranges.iter().map(show).collect(),
            };
            (!ranges.is_empty()).then_some(Read { value: ranges, shown })
        },
    )
}

fn parse_status_range(node: &Node) -> Result<(u16, u16), String> {
    let expected = || format!("expected status codes such as 200-399 or 204, found {}", node.describe());
    let text = word(node).ok_or_else(expected)?;
    let code = |text: &str| {
        let text = text.trim();
        let digits = text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u16>().ok().filter(|code| digits && (100..=599).contains(code)).ok_or_else(expected)
    };
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (code(first)?, code(last)?),
        None => (code(text)?, code(text)?),
    };
    match first <= last {
        true => Ok((first, last)),
        false => Err(format!("the range is upside down; write {last}-{first}")),
    }
}

/// `http://host:port`, `https://host:port` or `unix:/path`.
pub fn endpoint_url<'k>() -> Kind<'k, EndpointUrl> {
    Kind::scalar(
        "the URL of an endpoint such as http://10.0.0.11:8000",
        || json!({"type": "string", "pattern": "^(https?://|unix:)|\\$\\{"}),
        |context, scalar| match scalar.text.strip_prefix("unix:") {
            Some(path) => socket_path(context.base, path).map(EndpointUrl::Unix),
            None => parse_endpoint_url(&scalar.text),
        },
        |url| json!(url.identity()),
    )
}

pub fn parse_endpoint_url(text: &str) -> Result<EndpointUrl, String> {
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(format!(
            "an endpoint needs a scheme: {}, https://.. or unix:/path",
            quote(&format!("http://{}", text.trim_start_matches('/')))
        ));
    };
    let https = match scheme.to_ascii_lowercase().as_str() {
        "http" => false,
        "https" => true,
        "ws" | "wss" | "h2c" => {
            let plain = if scheme.eq_ignore_ascii_case("wss") { "https" } else { "http" };
            return Err(format!(
                "the scheme {scheme} is written {plain}; WebSockets pass, and `http: 2` speaks HTTP/2"
            ));
        }
        _ => return Err(format!("the scheme {} is not known; http, https or unix", quote(scheme))),
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(end);
    if !matches!(tail, "" | "/") {
        return Err(format!(
            "an endpoint has no path; remove {} (a route's `strip_prefix` changes paths)",
            quote(tail)
        ));
    }
    if authority.contains('@') {
        return Err("an endpoint has no user and password; set a header in `versions[].headers.set`".to_owned());
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (ip, port) = rest.split_once(']').ok_or("the `]` after the IPv6 address is missing")?;
            let ip = ip.parse::<std::net::Ipv6Addr>().map_err(|_| format!("{} is not an IPv6 address", quote(ip)))?;
            let port = match port.strip_prefix(':') {
                Some(port) => Some(port),
                None if port.is_empty() => None,
                None => return Err(format!("expected `:port` after the address, found {}", quote(port))),
            };
            (EndpointHost::Ip(ip.into()), port)
        }
        None => {
            let (host, port) = match authority.split_once(':') {
                Some((_, port)) if port.contains(':') => {
                    return Err("an IPv6 address stands in brackets: http://[::1]:8000".to_owned());
                }
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            };
            (endpoint_host(host)?, port)
        }
    };
    let port = match port {
        None => {
            if https {
                443
            } else {
                80
            }
        }
        Some(port) => {
            let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
            let number = port.parse::<u16>().ok().filter(|number| digits && *number != 0);
            number.ok_or_else(|| format!("a port is an integer from 1 to 65535, found {}", quote(port)))?
        }
    };
    Ok(EndpointUrl::Tcp { https, host, port })
}

fn endpoint_host(text: &str) -> Result<EndpointHost, String> {
    if text.is_empty() {
        return Err("an endpoint needs a host: http://10.0.0.11:8000".to_owned());
    }
    if let Ok(ip) = text.parse::<std::net::Ipv4Addr>() {
        return Ok(EndpointHost::Ip(ip.into()));
    }
    let looks_like_ip = text.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    if looks_like_ip {
        return Err(format!("{} is not an IPv4 address", quote(text)));
    }
    match is_host_name(text) {
        true => Ok(EndpointHost::Name(text.to_ascii_lowercase())),
        false => Err(format!("{} is not a host name", quote(text))),
    }
}

/// Matches a schema's string that is filled in from the environment or a file.
const VARIABLE: &str = "\\$\\{";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_shown() {
        for (text, milliseconds, shown) in [
            ("250ms", 250, "250ms"),
            ("90s", 90_000, "90s"),
            ("60s", 60_000, "1m"),
            ("60m", 3_600_000, "1h"),
            ("0ms", 0, "0s"),
        ] {
            let duration = parse_duration(text).expect(text);
            assert_eq!(duration, Duration::from_millis(milliseconds));
            assert_eq!(show_duration(duration), shown);
        }
        for text in ["", "s", "1", "-1s", "+1s", "1.5s", "1 s", "1S", "1d", "1h30m", "18446744073709551615h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_read_and_shown() {
        for (text, bytes, shown) in [
            ("64KiB", 65536, "64KiB"),
            ("1024", 1024, "1KiB"),
            ("1000B", 1000, "1000B"),
            ("0", 0, "0B"),
            ("1TiB", 1 << 40, "1TiB"),
        ] {
            assert_eq!(parse_size(text), Ok(bytes));
            assert_eq!(show_size(bytes), shown);
        }
        for text in ["", "KiB", "1KB", "1k", "-1", "1.5MiB", "99999999999TiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn endpoints_are_told_apart_by_scheme_host_and_port() {
        for (text, identity, address) in [
            ("http://h", "http://h:80", "h:80"),
            ("https://H.example.com/", "https://h.example.com:443", "h.example.com:443"),
            ("HTTP://10.0.0.1:8000", "http://10.0.0.1:8000", "10.0.0.1:8000"),
            ("http://[::1]:8000", "http://[::1]:8000", "[::1]:8000"),
            ("https://[0:0::1]", "https://[::1]:443", "[::1]:443"),
        ] {
            let url = parse_endpoint_url(text).expect(text);
            assert_eq!(url.identity(), identity);
            assert_eq!(url.address(), address);
        }
    }

    #[test]
    fn paths_are_normalised() {
        for (path, normal) in [
            ("/", "/"),
            ("/a/./b/../c", "/a/c"),
            ("/../a", "/a"),
            ("/a/..", "/"),
            ("/a/.", "/a/"),
            ("/%7euser/%2f", "/~user/%2F"),
            ("/a b/\u{e9}", "/a%20b/%C3%A9"),
            ("/a//b", "/a//b"),
        ] {
            assert_eq!(normalise(path).as_deref(), Ok(normal));
            assert_eq!(check_normalised(normal), Ok(()), "{normal}");
        }
        for path in ["/%", "/%4", "/%+1", "/%zz", "a", ""] {
            assert!(check_normalised(path).is_err(), "{path}");
        }
    }
}
