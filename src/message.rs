//! Message: the head of a request or response as the proxy handles it, whichever HTTP version carried it.
//!
//! Connection-level facts (framing, keep-alive, upgrade) are lifted out of the fields into typed members when a head
//! is read, so that no hop-by-hop field can leak through: it is not there any more.

use http::{Method, StatusCode};

/// A field section: names and values in the order they came, in one allocation.
/// Names keep the case in which they were sent; look-ups ignore case.
#[derive(Clone, Default)]
pub struct Fields {
    /// Lines as HTTP/1.1 has them, `name: value` and CRLF each: what is sent on is only copied. Lines that were removed
    /// are still here.
    data: Vec<u8>,
    entries: Vec<Entry>,
    /// A line was removed.
    has_gaps: bool,
}

/// A line of `data`.
#[derive(Clone, Copy)]
struct Entry {
    start: u32,
    name_length: u32,
    value_length: u32,
}

const COLON: &[u8; 2] = b": ";
const LINE_END: &[u8; 2] = b"\r\n";

impl Entry {
    fn value_start(&self) -> usize {
        self.start as usize + self.name_length as usize + COLON.len()
    }

    fn end(&self) -> usize {
        self.value_start() + self.value_length as usize + LINE_END.len()
    }

    fn name<'a>(&self, data: &'a [u8]) -> &'a [u8] {
        &data[self.start as usize..][..self.name_length as usize]
    }

    fn value<'a>(&self, data: &'a [u8]) -> &'a [u8] {
        &data[self.value_start()..][..self.value_length as usize]
    }

    fn is_named(&self, data: &[u8], name: &str) -> bool {
        self.name_length as usize == name.len() && self.name(data).eq_ignore_ascii_case(name.as_bytes())
    }
}

impl Fields {
    /// Room for `count` fields whose lines come to `bytes`.
    pub fn with_capacity(bytes: usize, count: usize) -> Fields {
        Fields { data: Vec::with_capacity(bytes), entries: Vec::with_capacity(count), has_gaps: false }
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
        self.entries.iter().map(|entry| (entry.name(&self.data), entry.value(&self.data)))
    }

    /// The first value of the field `name`.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.entries.iter().find(|entry| entry.is_named(&self.data, name)).map(|entry| entry.value(&self.data))
    }

    /// Every value of the field `name`, in order.
    pub fn get_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> + 'a {
        let data = &self.data;
        self.entries.iter().filter(move |entry| entry.is_named(data, name)).map(|entry| entry.value(data))
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
        let start = self.data.len() as u32;
        self.data.reserve(name.len() + COLON.len() + value.len() + LINE_END.len());
        self.data.extend_from_slice(name);
        self.data.extend_from_slice(COLON);
        self.data.extend_from_slice(value);
        self.data.extend_from_slice(LINE_END);
        self.entries.push(Entry { start, name_length: name.len() as u32, value_length: value.len() as u32 });
    }

    /// As [`Fields::push`], for `line` that is `name: value` already, with one space and without CRLF.
    pub fn push_line(&mut self, line: &[u8], name_length: usize) {
        let start = self.data.len() as u32;
        self.data.reserve(line.len() + LINE_END.len());
        self.data.extend_from_slice(line);
        self.data.extend_from_slice(LINE_END);
        let value_length = (line.len() - name_length - COLON.len()) as u32;
        self.entries.push(Entry { start, name_length: name_length as u32, value_length });
    }

    /// As [`Fields::append`], with a value that `write` puts behind what is there already (it only ever appends).
    pub fn append_with(&mut self, name: &str, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.data.len() as u32;
        self.data.extend_from_slice(name.as_bytes());
        self.data.extend_from_slice(COLON);
        let value_start = self.data.len();
        write(&mut self.data);
        let value_length = (self.data.len() - value_start) as u32;
        self.data.extend_from_slice(LINE_END);
        self.entries.push(Entry { start, name_length: name.len() as u32, value_length });
    }

    /// The bytes that [`Fields::write`] writes, at the most.
    pub fn byte_length(&self) -> usize {
        self.data.len()
    }

    /// Writes every field as a line of HTTP/1.1, CRLF included.
    pub fn write(&self, out: &mut Vec<u8>) {
        if !self.has_gaps {
            out.extend_from_slice(&self.data);
            return;
        }
        for entry in &self.entries {
            out.extend_from_slice(&self.data[entry.start as usize..entry.end()]);
        }
    }

    /// Replaces every field `name` by this one.
    pub fn set(&mut self, name: &str, value: &[u8]) {
        self.remove(name);
        self.append(name, value);
    }

    /// Removes every field `name`.
    pub fn remove(&mut self, name: &str) {
        // Nearly always it is not there.
        if !self.contains(name) {
            return;
        }
        let data = &self.data;
        self.entries.retain(|entry| {
            let keep = !entry.is_named(data, name);
            self.has_gaps |= !keep;
            keep
        });
    }

    /// Keeps the fields for which `keep(name, value)` holds.
    pub fn retain(&mut self, mut keep: impl FnMut(&[u8], &[u8]) -> bool) {
        let Fields { data, entries, has_gaps } = self;
        let mut keeps = |entry: &Entry| keep(entry.name(data), entry.value(data));
        // Nearly always all are kept, and none is moved.
        let Some(first) = entries.iter().position(|entry| !keeps(entry)) else { return };
        *has_gaps = true;
        let mut kept = first;
        for index in first + 1..entries.len() {
            if keeps(&entries[index]) {
                entries[kept] = entries[index];
                kept += 1;
            }
        }
        entries.truncate(kept);
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
    fn lines_are_written_without_those_that_were_removed() {
        let written = |fields: &Fields| {
            let mut out = Vec::new();
            fields.write(&mut out);
            String::from_utf8(out).expect("text")
        };
        let mut fields = sample();
        fields.push_line(b"X-Line: as it came", 6);
        fields.append_with("x-with", |value| value.extend_from_slice(b"2"));
        assert_eq!(written(&fields), "Accept: a\r\nx-one: 1\r\naccept: b\r\nX-Line: as it came\r\nx-with: 2\r\n");
        assert_eq!(fields.get("x-line"), Some(&b"as it came"[..]));
        assert_eq!(fields.get("x-with"), Some(&b"2"[..]));
        fields.set("accept", b"");
        fields.remove("x-with");
        assert_eq!(written(&fields), "x-one: 1\r\nX-Line: as it came\r\naccept: \r\n");
        fields.retain(|name, _| name == b"x-one");
        assert_eq!(written(&fields), "x-one: 1\r\n");
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
