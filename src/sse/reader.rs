//! Reader: the events of a stream with their names and data, as they pass (WHATWG HTML section 9.2).
//!
//! Where an event lies within one piece of the stream, as it nearly always does, nothing of it is copied.

use std::ops::Range;

/// How much of an event's data, and of its name, is kept to be looked at. What lies behind passes unseen.
pub const DATA_BYTES_MAX: usize = 64 * 1024;
const NAME_BYTES_MAX: usize = 256;

/// One event that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The value of `event`; empty where there is none.
    pub name: &'a [u8],
    /// The values of `data`, with a line feed between two; at most [`DATA_BYTES_MAX`] bytes of it.
    pub data: &'a [u8],
    /// `data` is not all of it.
    pub cut: bool,
}

/// Reads an event stream piece by piece.
#[derive(Debug, Default)]
pub struct Reader {
    /// What is known of the event that is being read, apart from what lies in the current piece.
    name: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    cut: bool,
    /// A line that is not empty came since the last event.
    in_block: bool,
    /// The beginning of a line that is not complete.
    line: Vec<u8>,
    /// The rest of the current line is of no use: it is too long to be kept.
    skip_line: bool,
    /// The last byte was a CR: an LF right after it belongs to it.
    after_return: bool,
    /// The stream's first line is behind us, and with it a byte order mark.
    begun: bool,
}

/// The part of an event that lies in the current piece.
#[derive(Default)]
struct Here {
    name: Option<Range<usize>>,
    data: Option<Range<usize>>,
}

impl Reader {
    /// Reads on, and calls `told` with every event that these bytes complete: a block with at least one `data` field
    /// that an empty line ends.
    pub fn feed(&mut self, bytes: &[u8], mut told: impl FnMut(Event<'_>)) {
        let Some(first) = bytes.first() else { return };
        let mut here = Here::default();
        let mut position = usize::from(std::mem::take(&mut self.after_return) && *first == b'\n');
        while position < bytes.len() {
            let Some(length) = memchr::memchr2(b'\r', b'\n', &bytes[position..]) else {
                self.keep_here(bytes, &mut here);
                self.keep_line(&bytes[position..]);
                return;
            };
            let line = position..position + length;
            let end = line.end;
            position = end + 1;
            if bytes[end] == b'\r' {
                match bytes.get(position) {
                    Some(b'\n') => position += 1,
                    Some(_) => {}
                    None => self.after_return = true,
                }
            }
            self.line(bytes, line, &mut here, &mut told);
        }
        self.keep_here(bytes, &mut here);
    }

    /// Nothing of an event has been read yet: what is written here stands between events. False between the CR and the
    /// LF of an empty line, and so after an empty line that ends in a lone CR.
    pub fn between_events(&self) -> bool {
        !self.in_block && self.line.is_empty() && !self.skip_line && !self.after_return
    }

    /// One whole line, without its end.
    fn line(&mut self, bytes: &[u8], line: Range<usize>, here: &mut Here, told: &mut impl FnMut(Event<'_>)) {
        let first = !std::mem::replace(&mut self.begun, true);
        if std::mem::take(&mut self.skip_line) {
            self.line.clear();
            return;
        }
        if !self.line.is_empty() {
            // It began in an earlier piece: it is put together.
            let mut whole = std::mem::take(&mut self.line);
            whole.extend_from_slice(&bytes[line]);
            let mark = if first && whole.starts_with(MARK) { MARK.len() } else { 0 };
            self.own_line(&whole[mark..], told);
            whole.clear();
            self.line = whole;
            return;
        }
        let start = if first && bytes[line.clone()].starts_with(MARK) { line.start + MARK.len() } else { line.start };
        let line = start..line.end;
        if line.is_empty() {
            let name = here.name.take();
            let data = here.data.take();
            self.end_block(name.map(|range| &bytes[range]), data.map(|range| &bytes[range]), told);
            return;
        }
        self.in_block = true;
        match field(&bytes[line.clone()]) {
            Some((Field::Data, offset)) => {
                let value = line.start + offset..line.end;
                if !self.has_data && here.data.is_none() {
                    here.data = Some(value);
                } else {
                    self.keep_data(here.data.take().map(|range| &bytes[range]));
                    self.keep_data(Some(&bytes[value]));
                }
            }
            Some((Field::Event, offset)) => here.name = Some(line.start + offset..line.end),
            None => {}
        }
    }

    /// A line that lies in no piece alone.
    fn own_line(&mut self, line: &[u8], told: &mut impl FnMut(Event<'_>)) {
        if line.is_empty() {
            self.end_block(None, None, told);
            return;
        }
        self.in_block = true;
        match field(line) {
            Some((Field::Data, offset)) => self.keep_data(Some(&line[offset..])),
            Some((Field::Event, offset)) => self.keep_name(&line[offset..]),
            None => {}
        }
    }

    fn end_block(&mut self, name: Option<&[u8]>, data: Option<&[u8]>, told: &mut impl FnMut(Event<'_>)) {
        self.in_block = false;
        let name = name.unwrap_or(&self.name);
        if let Some(data) = data {
            let kept = &data[..data.len().min(DATA_BYTES_MAX)];
            told(Event { name, data: kept, cut: kept.len() < data.len() });
        } else if self.has_data {
            told(Event { name, data: &self.data, cut: self.cut });
        }
        self.has_data = false;
        self.cut = false;
        // Whoever is silent now shall not hold what one large event needed.
        self.name = Vec::new();
        self.data = Vec::new();
        if self.line.is_empty() {
            self.line = Vec::new();
        }
    }

    /// The piece ends: what of the open event lies in it is kept.
    fn keep_here(&mut self, bytes: &[u8], here: &mut Here) {
        if let Some(name) = here.name.take() {
            self.keep_name(&bytes[name]);
        }
        self.keep_data(here.data.take().map(|range| &bytes[range]));
    }

    fn keep_name(&mut self, name: &[u8]) {
        self.name.clear();
        self.name.extend_from_slice(&name[..name.len().min(NAME_BYTES_MAX)]);
    }

    fn keep_data(&mut self, value: Option<&[u8]>) {
        let Some(value) = value else { return };
        if self.has_data && self.data.len() < DATA_BYTES_MAX {
            self.data.push(b'\n');
        }
        self.has_data = true;
        let room = DATA_BYTES_MAX.saturating_sub(self.data.len());
        self.cut |= value.len() > room;
        self.data.extend_from_slice(&value[..value.len().min(room)]);
    }

    fn keep_line(&mut self, part: &[u8]) {
        if self.skip_line {
            return;
        }
        self.line.extend_from_slice(part);
        if self.line.len() <= DATA_BYTES_MAX {
            return;
        }
        // Of a line that is too long the beginning is what can be kept, as far as it is a field's value.
        let line = std::mem::take(&mut self.line);
        let mark = if !self.begun && line.starts_with(MARK) { MARK.len() } else { 0 };
        self.begun = true;
        self.in_block = true;
        match field(&line[mark..]) {
            Some((Field::Data, offset)) => {
                self.keep_data(Some(&line[mark + offset..]));
                self.cut = true;
            }
            Some((Field::Event, offset)) => self.keep_name(&line[mark + offset..]),
            None => {}
        }
        self.skip_line = true;
    }
}

/// The byte order mark that may stand at the very start.
const MARK: &[u8] = b"\xef\xbb\xbf";

enum Field {
    Data,
    Event,
}

/// Which field a line is, and where its value begins; `None` for the other fields and for comments.
fn field(line: &[u8]) -> Option<(Field, usize)> {
    let (kind, name) = match line.first()? {
        b'd' if line.starts_with(b"data") => (Field::Data, 4),
        b'e' if line.starts_with(b"event") => (Field::Event, 5),
        _ => return None,
    };
    match (line.get(name), line.get(name + 1)) {
        (None, _) => Some((kind, name)),
        (Some(b':'), Some(b' ')) => Some((kind, name + 2)),
        (Some(b':'), _) => Some((kind, name + 1)),
        (Some(_), _) => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{DATA_BYTES_MAX, Event, Reader};
    use crate::sse::Scanner;

    type Told = Vec<(String, String)>;

    fn read(stream: &[u8], cuts: &[usize]) -> (Told, bool) {
        let mut reader = Reader::default();
        let mut events = Vec::new();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
        cuts.push(stream.len());
        cuts.sort_unstable();
        let mut start = 0;
        for cut in cuts {
            reader.feed(&stream[start..cut], |Event { name, data, cut }| {
                assert!(!cut);
                let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                events.push((text(name), text(data)));
            });
            start = cut;
        }
        (events, reader.between_events())
    }

    fn told(stream: &str) -> Told {
        let whole = read(stream.as_bytes(), &[]);
        let every_byte: Vec<usize> = (0..stream.len()).collect();
        assert_eq!(read(stream.as_bytes(), &every_byte), whole, "{stream:?}");
        whole.0
    }

    #[test]
    fn tells_names_and_data() {
        let event = |name: &str, data: &str| (name.to_owned(), data.to_owned());
        assert_eq!(told("data: a\n\n"), [event("", "a")]);
        assert_eq!(told("event: x\ndata:a\n\ndata: b\n\n"), [event("x", "a"), event("", "b")]);
        assert_eq!(told("data: a\r\ndata:  b\r\nevent: y\r\nid: 7\r\n\r\n"), [event("y", "a\n b")]);
        assert_eq!(told("data\n\n"), [event("", "")]);
        assert_eq!(told(": comment\n\nevent: z\n\ndata: a\n\n"), [event("", "a")]);
        assert_eq!(told("event: a\nevent: b\ndata\rdata\r\r"), [event("b", "\n")]);
        assert_eq!(told("\u{feff}data: a\n\n\u{feff}data: b\n\n"), [event("", "a")]);
        assert_eq!(told("datax: a\neventx: b\ndata : c\n\n"), []);
        assert_eq!(told("data: a\n"), []);
    }

    #[test]
    fn keeps_no_more_than_its_bound_of_a_huge_event() {
        for stream in [
            format!("event: big\ndata: {}\n\ndata: after\n\n", "x".repeat(64 << 20 >> 4)),
            format!("event: big\n{}\ndata: after\n\n", "data: yyyyyyyyyyyyyyyy\n".repeat(10_000)),
        ] {
            for piece in [usize::MAX, 1000] {
                let mut reader = Reader::default();
                let mut events = Vec::new();
                for bytes in stream.as_bytes().chunks(piece.min(stream.len())) {
                    reader.feed(bytes, |event| {
                        events.push((event.name.to_vec(), event.data.len(), event.cut));
                    });
                    let kept = reader.data.capacity() + reader.line.capacity();
                    assert!(kept <= 4 * DATA_BYTES_MAX, "{kept} bytes are kept");
                }
                assert_eq!(events.len(), 2);
                assert_eq!((events[0].0.as_slice(), events[0].2), (&b"big"[..], true));
                assert!(events[0].1 <= DATA_BYTES_MAX && events[0].1 > DATA_BYTES_MAX / 2);
                assert_eq!(events[1], (Vec::new(), 5, false));
                assert_eq!(reader.data.capacity() + reader.line.capacity(), 0, "silence holds nothing");
            }
        }
    }

    proptest! {
        #[test]
        fn any_split_tells_the_same_and_counts_as_the_scanner_does(
            pieces in proptest::collection::vec(prop_oneof![
                4 => Just(&b"data"[..]), 2 => Just(&b":"[..]), 3 => Just(&b"\n"[..]), 3 => Just(&b"\r"[..]), 3 => Just(&b"\r\n"[..]),
                1 => Just(&b" x"[..]), 2 => Just(&b"event"[..]), 1 => Just(&b"\xef\xbb\xbf"[..]), 1 => Just(&b"\xef"[..]),
            ], 0..40),
            cuts in proptest::collection::vec(any::<usize>(), 0..10),
        ) {
            let stream = pieces.concat();
            let (events, between) = read(&stream, &cuts);
            prop_assert_eq!(read(&stream, &[]), (events.clone(), between));
            let mut scanner = Scanner::default();
            prop_assert_eq!(scanner.feed(&stream) as usize, events.len());
            prop_assert_eq!(scanner.between_events(), between || stream == b"\xef\xbb\xbf");
        }
    }
}
