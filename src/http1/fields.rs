//! Fields: reads a field section once, strictly, and lifts what concerns the connection out of it.

use super::octets::{self, TOKEN};
use super::{HeadError, HeadLimits};
use crate::message::Fields;

/// A field section, its connection-level fields taken apart.
#[derive(Default)]
pub(super) struct Section<'a> {
    /// End-to-end fields only.
    pub(super) fields: Fields,
    pub(super) host: Option<&'a [u8]>,
    pub(super) content_length: Option<u64>,
    pub(super) chunked: bool,
    pub(super) close: bool,
    /// Upgrade, where Connection has `upgrade`; without `h2c`, which is a matter of this connection only.
    pub(super) upgrade: Option<String>,
    pub(super) expect_continue: bool,
    pub(super) accepts_trailers: bool,
}

/// Room for the fields that a head is given on its way through, so that they are added without moving what is there.
const ADDED_BYTES: usize = 448;
const ADDED_FIELDS: usize = 8;
/// A field line is rarely shorter.
const FIELD_BYTES: usize = 24;

/// Reads the lines of `section`, through its final empty line.
pub(super) fn read_section(section: &[u8], limits: HeadLimits) -> Result<Section<'_>, HeadError> {
    let mut rest = section;
    let mut count = 0;
    let mut read = Section {
        fields: Fields::with_capacity(section.len() + ADDED_BYTES, ADDED_FIELDS + section.len() / FIELD_BYTES),
        ..Section::default()
    };
    let mut has_transfer_encoding = false;
    let mut connection_upgrade = false;
    let mut upgrade = None;
    let mut nominated = Vec::new();
    loop {
        let line = next_line(&mut rest)?;
        if line.is_empty() {
            break;
        }
        count += 1;
        if count > limits.max_fields {
            return Err(HeadError::TooLarge);
        }
        let (name, value) = split_field(line)?;
        match kind(name) {
            Kind::EndToEnd => push(&mut read.fields, line, name, value),
            Kind::Dropped => {}
            Kind::Host => {
                if read.host.replace(value).is_some() {
                    return Err(HeadError::Malformed("There are two Host fields."));
                }
            }
            Kind::ContentLength => {
                if read.content_length.replace(content_length(value)?).is_some() {
                    return Err(HeadError::Malformed("There are two Content-Length fields."));
                }
            }
            Kind::TransferEncoding => {
                if has_transfer_encoding {
                    return Err(HeadError::Malformed("There are two Transfer-Encoding fields."));
                }
                has_transfer_encoding = true;
                if !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(HeadError::Malformed("Transfer-Encoding is not exactly `chunked`."));
                }
                read.chunked = true;
            }
            Kind::Connection => {
                for option in octets::list(value) {
                    if option.eq_ignore_ascii_case(b"close") {
                        read.close = true;
                    } else if option.eq_ignore_ascii_case(b"upgrade") {
                        connection_upgrade = true;
                    } else if !octets::is_token(option) {
                        return Err(HeadError::Malformed("Connection holds something that is not a token."));
                    } else if needed_by_all(option) {
                        return Err(HeadError::Malformed(
                            "Connection names a field that frames or routes the message.",
                        ));
                    } else if kind(option) == Kind::EndToEnd {
                        nominated.push(option);
                    }
                }
            }
            Kind::TransferCodings => {
                read.accepts_trailers |= octets::list(value).any(|coding| coding.eq_ignore_ascii_case(b"trailers"));
            }
            Kind::Upgrade => add_protocols(&mut upgrade, value)?,
            Kind::Expect => {
                if value.eq_ignore_ascii_case(b"100-continue") {
                    read.expect_continue = true;
                } else {
                    read.fields.push(name, value);
                }
            }
        }
    }
    if !rest.is_empty() {
        return Err(HeadError::Malformed("There are bytes after the empty line that ends the head."));
    }
    if read.chunked && read.content_length.is_some() {
        return Err(HeadError::Malformed("Content-Length and Transfer-Encoding are both there."));
    }
    if connection_upgrade {
        read.upgrade = upgrade;
    }
    if !nominated.is_empty() {
        read.fields.retain(|name, _| !nominated.iter().any(|option| option.eq_ignore_ascii_case(name)));
    }
    Ok(read)
}

/// Reads a trailer section, through its final empty line; fields that must not be there are left out.
pub(super) fn read_trailers(section: &[u8]) -> Result<Fields, HeadError> {
    let mut rest = section;
    let mut fields = Fields::default();
    loop {
        let line = next_line(&mut rest)?;
        if line.is_empty() {
            return Ok(fields);
        }
        let (name, value) = split_field(line)?;
        if may_be_trailer(name) {
            fields.push(name, value);
        }
    }
}

/// Whether a field of this name never passes a proxy (RFC 9110 section 7.6.1), Connection's own nominations apart.
pub fn is_hop_by_hop(name: &[u8]) -> bool {
    matches!(
        kind(name),
        Kind::Connection | Kind::Dropped | Kind::TransferCodings | Kind::TransferEncoding | Kind::Upgrade
    )
}

/// Whether a field of this name may stand in a trailer section: it neither frames, routes, authenticates nor says
/// how to process the message (RFC 9110 section 6.5.1).
pub fn may_be_trailer(name: &[u8]) -> bool {
    const REFUSED: [&[u8]; 32] = [
        b"age",
        b"authorization",
        b"cache-control",
        b"content-encoding",
        b"content-length",
        b"content-location",
        b"content-range",
        b"content-type",
        b"cookie",
        b"date",
        b"expect",
        b"expires",
        b"forwarded",
        b"host",
        b"if-match",
        b"if-modified-since",
        b"if-none-match",
        b"if-range",
        b"if-unmodified-since",
        b"location",
        b"max-forwards",
        b"pragma",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"range",
        b"retry-after",
        b"set-cookie",
        b"te",
        b"trailer",
        b"vary",
        b"warning",
        b"www-authenticate",
    ];
    !is_hop_by_hop(name)
        && !REFUSED.iter().any(|refused| refused.eq_ignore_ascii_case(name))
        && !starts_with(name, b"x-forwarded-")
        && !starts_with(name, b"longhaul-")
}

/// Adds the field that `line` was split into.
#[inline]
fn push(fields: &mut Fields, line: &[u8], name: &[u8], value: &[u8]) {
    // Usually the line has its one form already.
    if line.len() == name.len() + 2 + value.len() && line[name.len() + 1] == b' ' {
        fields.push_line(line, name.len());
    } else {
        fields.push(name, value);
    }
}

/// Takes the first line off `rest`, without its CRLF.
#[inline]
pub(super) fn next_line<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], HeadError> {
    let Some(end) = memchr::memchr(b'\r', rest) else {
        return Err(HeadError::Malformed("A line does not end in CRLF."));
    };
    if rest.get(end + 1) != Some(&b'\n') {
        return Err(HeadError::Malformed("The head has a bare CR: lines end in CRLF."));
    }
    let line = &rest[..end];
    *rest = &rest[end + 2..];
    Ok(line)
}

/// What a field means to the connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Connection,
    ContentLength,
    /// Of the connection, and without meaning to us.
    Dropped,
    EndToEnd,
    Expect,
    Host,
    /// TE.
    TransferCodings,
    TransferEncoding,
    Upgrade,
}

#[inline]
fn kind(name: &[u8]) -> Kind {
    // By length first: most fields are of no concern here, and this tells so without a comparison.
    let (known, kind): (&[u8], Kind) = match name.len() {
        2 => (b"te", Kind::TransferCodings),
        4 => (b"host", Kind::Host),
        6 => (b"expect", Kind::Expect),
        7 => (b"upgrade", Kind::Upgrade),
        10 if name[0] | 0x20 == b'k' => (b"keep-alive", Kind::Dropped),
        10 => (b"connection", Kind::Connection),
        14 if name[0] | 0x20 == b'h' => (b"http2-settings", Kind::Dropped),
        14 => (b"content-length", Kind::ContentLength),
        16 => (b"proxy-connection", Kind::Dropped),
        17 => (b"transfer-encoding", Kind::TransferEncoding),
        _ => return Kind::EndToEnd,
    };
    if name.eq_ignore_ascii_case(known) { kind } else { Kind::EndToEnd }
}

/// Fields without which the message would be another one: Connection can't make them a matter of one hop.
fn needed_by_all(option: &[u8]) -> bool {
    const NEEDED: [&[u8]; 7] = [
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"expect",
        b"host",
        b"transfer-encoding",
    ];
    NEEDED.iter().any(|needed| needed.eq_ignore_ascii_case(option))
}

#[inline]
fn split_field(line: &[u8]) -> Result<(&[u8], &[u8]), HeadError> {
    let length = line.iter().position(|&byte| !octets::is(byte, TOKEN)).unwrap_or(line.len());
    match line.get(length) {
        Some(b':') if length > 0 => {}
        Some(b':') => return Err(HeadError::Malformed("A field has no name.")),
        Some(b' ' | b'\t') if length == 0 => {
            return Err(HeadError::Malformed("A line begins with a space: folded fields are obsolete."));
        }
        Some(b' ' | b'\t') => return Err(HeadError::Malformed("There is a space before a field's colon.")),
        Some(_) => return Err(HeadError::Malformed("A field name holds a byte that is not allowed.")),
        None => return Err(HeadError::Malformed("A field line has no colon.")),
    }
    let value = octets::trim(&line[length + 1..]);
    if !octets::is_field_value(value) {
        return Err(HeadError::Malformed("A field value holds a control byte."));
    }
    Ok((&line[..length], value))
}

fn content_length(value: &[u8]) -> Result<u64, HeadError> {
    if value.is_empty() {
        return Err(HeadError::Malformed("Content-Length is empty."));
    }
    if value.contains(&b',') {
        return Err(HeadError::Malformed("Content-Length is a list."));
    }
    let mut length: u64 = 0;
    for &byte in value {
        if !byte.is_ascii_digit() {
            return Err(HeadError::Malformed("Content-Length holds something other than decimal digits."));
        }
        length = length
            .checked_mul(10)
            .and_then(|length| length.checked_add(u64::from(byte - b'0')))
            .ok_or(HeadError::Malformed("Content-Length is too large a number."))?;
    }
    Ok(length)
}

/// Adds the members of an Upgrade value, `h2c` left out: HTTP/2 in cleartext is by prior knowledge only (RFC 9113).
fn add_protocols(upgrade: &mut Option<String>, value: &[u8]) -> Result<(), HeadError> {
    for protocol in octets::list(value) {
        let text = std::str::from_utf8(protocol)
            .ok()
            .filter(|text| {
                text.split('/').count() <= 2 && text.split('/').all(|part| octets::is_token(part.as_bytes()))
            })
            .ok_or(HeadError::Malformed("Upgrade holds something that is not a protocol name."))?;
        if text.eq_ignore_ascii_case("h2c") {
            continue;
        }
        match upgrade {
            Some(upgrade) => {
                upgrade.push_str(", ");
                upgrade.push_str(text);
            }
            None => *upgrade = Some(text.to_owned()),
        }
    }
    Ok(())
}

fn starts_with(name: &[u8], prefix: &[u8]) -> bool {
    name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}
