//! Message: the head of a request or response as the proxy handles it, whichever HTTP version carried it.
//!
//! Connection-level facts (framing, keep-alive, upgrade) are lifted out of the fields into typed members when a head
//! is read, so that no hop-by-hop field can leak through: it is not there any more.

use http::{Method, StatusCode};

/// A field section: names and values in the order they came, in one allocation.
/// Names keep the case in which they were sent; look-ups ignore case.
#[derive(Clone, Default)]
pub struct Fields {
    data: Vec<u8>,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy)]
struct Entry {
    name_start: u32,
    name_length: u32,
    value_start: u32,
    value_length: u32,
}

impl Fields {
    /// Room for `count` fields whose names and values come to `bytes`.
    pub fn with_capacity(bytes: usize, count: usize) -> Fields {
        Fields { data: Vec::with_capacity(bytes), entries: Vec::with_capacity(count) }
    }

    /// How many fields there are, repeated names counted each time.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no field at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All fields in order, as (name, value).
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.entries.iter().map(|entry| (self.name(entry), self.value(entry)))
    }

    /// The first value of the field `name`.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.entries.iter().find(|entry| self.is(entry, name)).map(|entry| self.value(entry))
    }

    /// Every value of the field `name`, in order.
    pub fn get_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> + 'a {
        self.entries.iter().filter(move |entry| self.is(entry, name)).map(|entry| self.value(entry))
    }

    /// Whether there is a field `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Adds a field after the others, whether or not there is one of that name.
    pub fn append(&mut self, name: &str, value: &[u8]) {
        self.push(name.as_bytes(), value);
    }

    /// As [`Fields::append`], for a name in bytes.
    pub fn push(&mut self, name: &[u8], value: &[u8]) {
        let name_start = self.data.len() as u32;
        self.data.extend_from_slice(name);
        let value_start = self.data.len() as u32;
        self.data.extend_from_slice(value);
        self.entries.push(Entry {
            name_start,
            name_length: name.len() as u32,
            value_start,
            value_length: value.len() as u32,
        });
    }

    /// As [`Fields::append`], with a value that `write` puts behind what is there already (it only ever appends).
    pub fn append_with(&mut self, name: &str, write: impl FnOnce(&mut Vec<u8>)) {
        let name_start = self.data.len() as u32;
        self.data.extend_from_slice(name.as_bytes());
        let value_start = self.data.len() as u32;
        write(&mut self.data);
        let value_length = self.data.len() as u32 - value_start;
        self.entries.push(Entry { name_start, name_length: name.len() as u32, value_start, value_length });
    }

    /// The bytes that names and values take.
    pub fn byte_length(&self) -> usize {
        self.data.len()
    }

    /// Replaces every field `name` by this one.
    pub fn set(&mut self, name: &str, value: &[u8]) {
        self.remove(name);
        self.append(name, value);
    }

    /// Removes every field `name`.
    pub fn remove(&mut self, name: &str) {
        let data = &self.data;
        self.entries.retain(|entry| !named(data, entry, name));
    }

    /// Keeps the fields for which `keep(name, value)` holds.
    pub fn retain(&mut self, mut keep: impl FnMut(&[u8], &[u8]) -> bool) {
        let data = &self.data;
        self.entries.retain(|entry| {
            keep(slice(data, entry.name_start, entry.name_length), slice(data, entry.value_start, entry.value_length))
        });
    }

    fn name(&self, entry: &Entry) -> &[u8] {
        slice(&self.data, entry.name_start, entry.name_length)
    }

    fn value(&self, entry: &Entry) -> &[u8] {
        slice(&self.data, entry.value_start, entry.value_length)
    }

    fn is(&self, entry: &Entry, name: &str) -> bool {
        named(&self.data, entry, name)
    }
}

/// Equal are the same names (whatever their case) with the same values in the same order.
impl PartialEq for Fields {
    fn eq(&self, other: &Fields) -> bool {
        self.len() == other.len()
            && self.iter().zip(other.iter()).all(|((name, value), (other_name, other_value))| {
                name.eq_ignore_ascii_case(other_name) && value == other_value
            })
    }
}

impl Eq for Fields {}

impl std::fmt::Debug for Fields {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_map()
            .entries(self.iter().map(|(name, value)| (String::from_utf8_lossy(name), String::from_utf8_lossy(value))))
            .finish()
    }
}

fn slice(data: &[u8], start: u32, length: u32) -> &[u8] {
    &data[start as usize..(start + length) as usize]
}

fn named(data: &[u8], entry: &Entry, name: &str) -> bool {
    entry.name_length as usize == name.len()
        && slice(data, entry.name_start, entry.name_length).eq_ignore_ascii_case(name.as_bytes())
}

/// The HTTP version that carried a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    Http10,
    Http11,
    Http2,
}

/// How long a body is and how its end is known (RFC 9112 section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// No body at all.
    None,
    /// So many bytes.
    Length(u64),
    /// HTTP/1.1 chunks; of an HTTP/2 message without content-length likewise "until its end is marked".
    Chunked,
    /// Until the connection closes (responses only): a cut can't be told from the end.
    Eof,
}

/// A request head after one strict reading.
///
/// `fields` holds end-to-end fields only: no Host, Content-Length, Transfer-Encoding, Connection (nor what it names),
/// Keep-Alive, Proxy-Connection, TE, Upgrade, Expect: 100-continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestHead {
    pub method: Method,
    /// Normalised (RFC 3986 section 6.2.2); begins with `/`, or is `*` for OPTIONS.
    pub path: String,
    /// Without the `?`.
    pub query: Option<String>,
    /// The Host field or `:authority`, as sent. Empty only for HTTP/1.0 without Host.
    pub authority: String,
    pub version: Version,
    pub fields: Fields,
    pub framing: Framing,
    /// The client lets the connection be used again.
    pub keep_alive: bool,
    /// The value of Upgrade, where Connection names it and the version is HTTP/1.1; `websocket` for RFC 8441.
    pub upgrade: Option<String>,
    pub expect_continue: bool,
    /// `TE: trailers` was there.
    pub accepts_trailers: bool,
}

/// A response head after one strict reading; `fields` as in [`RequestHead`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseHead {
    pub status: StatusCode,
    /// The reason phrase as sent, where it is not the standard one.
    pub reason: Option<Vec<u8>>,
    pub version: Version,
    pub fields: Fields,
    pub framing: Framing,
    /// The endpoint lets the connection be used again.
    pub keep_alive: bool,
    /// The value of Upgrade in a 101 answer.
    pub upgrade: Option<String>,
    /// The Content-Length of an answer that has no body: to HEAD, or 304 (RFC 9110 section 8.6). Passed on as it is.
    pub declared_length: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::Fields;

    fn sample() -> Fields {
        let mut fields = Fields::default();
        fields.append("Accept", b"a");
        fields.append("x-one", b"1");
        fields.append("accept", b"b");
        fields
    }

    #[test]
    fn look_ups_ignore_case_and_keep_order() {
        let fields = sample();
        assert_eq!(fields.get("ACCEPT"), Some(&b"a"[..]));
        assert_eq!(fields.get_all("accept").collect::<Vec<_>>(), [b"a", b"b"]);
        assert_eq!(fields.get("accep"), None);
        assert_eq!(fields.iter().map(|(name, _)| name).collect::<Vec<_>>(), [&b"Accept"[..], b"x-one", b"accept"]);
    }

    #[test]
    fn set_remove_and_retain_leave_the_others() {
        let mut fields = sample();
        fields.set("ACCEPT", b"c");
        assert_eq!(fields.get_all("accept").collect::<Vec<_>>(), [b"c"]);
        fields.retain(|name, _| name != b"x-one");
        assert_eq!(fields.len(), 1);
        fields.remove("accept");
        assert!(fields.is_empty());
    }

    #[test]
    fn equality_ignores_the_case_of_names_only() {
        let mut other = Fields::default();
        other.append("accept", b"a");
        other.append("X-One", b"1");
        other.append("Accept", b"b");
        assert_eq!(sample(), other);
        other.set("x-one", b"2");
        assert_ne!(sample(), other);
    }
}
