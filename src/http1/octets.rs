//! Octets: which bytes may stand where (RFC 9110 section 5.6.2, RFC 3986).

/// May stand in a token: methods, field names, connection options.
pub(super) const TOKEN: u8 = 1;
/// May stand in a path: pchar and `/` without `%`, and the bytes that clients send unencoded although they should not.
pub(super) const PATH: u8 = 2;
/// May stand in a query.
pub(super) const QUERY: u8 = 4;
/// May stand in a host name, without `%`: unreserved and sub-delims, but no comma (it would look like a list).
pub(super) const HOST: u8 = 8;
/// Unreserved: percent-encoded or not, it means the same (RFC 3986 section 2.3).
pub(super) const UNRESERVED: u8 = 16;

/// Whether `byte` is in `class`.
#[inline]
pub(super) fn is(byte: u8, class: u8) -> bool {
    CLASSES[byte as usize] & class != 0
}

/// Whether all of `bytes` may stand in a field value: HTAB, SP, VCHAR and obs-text (RFC 9110 section 5.5).
#[inline]
pub(super) fn is_field_value(bytes: &[u8]) -> bool {
    // Without an early return, so that the compiler can look at many bytes at once.
    !bytes.iter().fold(false, |bad, &byte| bad | ((byte < 0x20) & (byte != b'\t')) | (byte == 0x7f))
}

/// Whether `bytes` is a token.
pub(super) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|&byte| is(byte, TOKEN))
}

/// `value` without the spaces and tabs around it.
#[inline]
pub(super) fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = value {
        value = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

/// The members of a comma list, trimmed; empty ones are left out (RFC 9110 section 5.6.1.2).
pub(super) fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(trim).filter(|member| !member.is_empty())
}

/// The value of a hexadecimal digit.
#[inline]
pub(super) fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

static CLASSES: [u8; 256] = classes();

const fn classes() -> [u8; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let octet = byte as u8;
        if octet.is_ascii_alphanumeric() {
            table[byte] = TOKEN | PATH | QUERY | HOST | UNRESERVED;
        }
        byte += 1;
    }
    table = add(table, b"!#$%&'*+-.^_`|~", TOKEN);
    table = add(table, b"-._~", PATH | QUERY | HOST | UNRESERVED);
    table = add(table, b"!$&'()*+,;=:@/", PATH | QUERY);
    // No backslash in a path: some servers read it as a slash.
    table = add(table, b"\"[]^{|}", PATH | QUERY);
    table = add(table, b"?%\\<>`", QUERY);
    table = add(table, b"!$&'()*+;=", HOST);
    table
}

const fn add(mut table: [u8; 256], bytes: &[u8], class: u8) -> [u8; 256] {
    let mut index = 0;
    while index < bytes.len() {
        table[bytes[index] as usize] |= class;
        index += 1;
    }
    table
}
