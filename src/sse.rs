//! SSE: an incremental scanner of event streams (WHATWG HTML section 9.2), and a reader of what is in their events.

mod reader;

pub use reader::{DATA_BYTES_MAX, Event, Reader};

/// Counts the events of a stream as it passes. A few bytes of state, nothing is kept of the stream.
#[derive(Clone, Debug, Default)]
pub struct Scanner {
    line: Line,
    /// Bytes of a byte order mark read at the very start.
    mark: u8,
    /// The start of the stream is behind us.
    begun: bool,
    /// The last byte was a CR: an LF right after it belongs to it.
    after_return: bool,
    /// A line that was not empty came since the last empty one.
    in_block: bool,
    /// One of these lines was a `data` field.
    has_data: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// So many bytes of the line, all of them those of `data`.
    Start(u8),
    /// Somewhere in a line whose kind is known.
    Rest,
}

impl Default for Line {
    fn default() -> Line {
        Line::Start(0)
    }
}

const NAME: &[u8; 4] = b"data";
const MARK: &[u8; 3] = b"\xef\xbb\xbf";

impl Scanner {
    /// Reads on and returns how many events these bytes completed: blocks with at least one `data` field (which may be
    /// empty) that an empty line ended.
    pub fn feed(&mut self, bytes: &[u8]) -> u32 {
        let mut events = 0;
        let mut position = 0;
        while let Some(&byte) = bytes.get(position) {
            if self.line == Line::Rest {
                // Only the end of the line matters now; it can be far away.
                match memchr::memchr2(b'\r', b'\n', &bytes[position..]) {
                    Some(length) => {
                        events += self.end_line(bytes[position + length]);
                        position += length + 1;
                        continue;
                    }
                    None => return events,
                }
            }
            position += 1;
            if !self.begun && self.is_mark(byte) {
                continue;
            }
            if std::mem::take(&mut self.after_return) && byte == b'\n' {
                continue;
            }
            match (byte, self.line) {
                (b'\r' | b'\n', _) => events += self.end_line(byte),
                (b':', Line::Start(4)) => {
                    self.has_data = true;
                    self.line = Line::Rest;
                }
                (_, Line::Start(count)) if NAME.get(usize::from(count)) == Some(&byte) => {
                    self.line = Line::Start(count + 1);
                    self.in_block = true;
                }
                _ => {
                    self.line = Line::Rest;
                    self.in_block = true;
                }
            }
        }
        events
    }

    /// Nothing of an event has been read yet: what is written here stands between events. False between the CR and the
    /// LF of an empty line, and so after an empty line that ends in a lone CR.
    pub fn between_events(&self) -> bool {
        self.line == Line::Start(0) && !self.in_block && !self.after_return && (self.begun || self.mark == 0)
    }

    /// Takes the byte order mark that may stand at the start. A part of one that goes on otherwise is a line's content.
    fn is_mark(&mut self, byte: u8) -> bool {
        if MARK.get(usize::from(self.mark)) == Some(&byte) {
            self.mark += 1;
            self.begun = usize::from(self.mark) == MARK.len();
            return true;
        }
        self.begun = true;
        if self.mark > 0 {
            self.line = Line::Rest;
            self.in_block = true;
        }
        false
    }

    /// Ends the line with `byte`; 1 if that completes an event.
    fn end_line(&mut self, byte: u8) -> u32 {
        self.after_return = byte == b'\r';
        let line = std::mem::take(&mut self.line);
        if line == Line::Start(4) {
            // A field without a colon has the empty value.
            self.has_data = true;
        }
        if line != Line::Start(0) {
            return 0;
        }
        self.in_block = false;
        u32::from(std::mem::take(&mut self.has_data))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Scanner;

    fn count(stream: &[u8]) -> u32 {
        Scanner::default().feed(stream)
    }

    #[test]
    fn counts_blocks_with_data() {
        for (stream, events) in [
            ("", 0),
            ("\n\n\n", 0),
            ("data: a\n\n", 1),
            ("data: a\n", 0),
            ("data: a\ndata: b\n\ndata: c\n\n", 2),
            ("data\n\n", 1),
            ("data:\n\n", 1),
            ("id: 1\ndata:\n\n", 1),
            ("id: 1\nretry: 5\n\n", 0),
            (": comment\n\n", 0),
            (": comment\ndata: a\n\n", 1),
            ("event: x\n\ndata: a\n\n", 1),
            ("datum: a\n\n", 0),
            ("data : a\n\n", 0),
            (" data: a\n\n", 0),
            ("Data: a\n\n", 0),
            ("dat\n\n", 0),
            ("dataa\n\n", 0),
            ("data: a\r\rdata: b\r\n\r\ndata: c\n\rdata: d\r\n\n", 4),
            ("data: a\r\n\r", 1),
            ("\u{feff}data: a\n\n", 1),
            ("\u{feff}\u{feff}data: a\n\n", 0),
            ("data: a\n\n\u{feff}data: b\n\n", 1),
            ("\u{fefe}data: a\n\n", 0),
        ] {
            assert_eq!(count(stream.as_bytes()), events, "{stream:?}");
        }
        assert_eq!(count(b"\xef\xbbdata: a\n\n"), 0);
        assert_eq!(count(b"\xef\n\ndata: a\n\n"), 1);
    }

    #[test]
    fn knows_where_something_may_be_inserted() {
        for (stream, between) in [
            ("", true),
            ("\n", true),
            ("d", false),
            ("data: a\n", false),
            ("data: a\n\n", true),
            (": c\n", false),
            (": c\n\n", true),
            ("data: a\r\n\r", false),
            ("data: a\r\n\r\n", true),
            ("data: a\n\nid", false),
            ("\u{feff}", true),
        ] {
            let mut scanner = Scanner::default();
            scanner.feed(stream.as_bytes());
            assert_eq!(scanner.between_events(), between, "{stream:?}");
        }
        let mut scanner = Scanner::default();
        scanner.feed(b"\xef\xbb");
        assert!(!scanner.between_events());
    }

    /// The standard's words, on the whole stream at once.
    fn reference(stream: &[u8]) -> u32 {
        let stream = stream.strip_prefix(b"\xef\xbb\xbf").unwrap_or(stream);
        let mut lines = vec![Vec::new()];
        let mut bytes = stream.iter().peekable();
        while let Some(&byte) = bytes.next() {
            match byte {
                b'\r' => {
                    bytes.next_if(|&&next| next == b'\n');
                    lines.push(Vec::new());
                }
                b'\n' => lines.push(Vec::new()),
                _ => lines.last_mut().expect("never empty").push(byte),
            }
        }
        // The last one has no end.
        lines.pop();
        let mut events = 0;
        let mut has_data = false;
        for line in lines {
            if line.is_empty() {
                events += u32::from(std::mem::take(&mut has_data));
            } else if line.split(|&byte| byte == b':').next() == Some(&b"data"[..]) {
                has_data = true;
            }
        }
        events
    }

    proptest! {
        #[test]
        fn any_split_counts_as_the_standard_reads(
            pieces in proptest::collection::vec(prop_oneof![
                4 => Just(&b"data"[..]), 2 => Just(&b":"[..]), 3 => Just(&b"\n"[..]), 3 => Just(&b"\r"[..]), 3 => Just(&b"\r\n"[..]),
                1 => Just(&b" x"[..]), 1 => Just(&b"id"[..]), 1 => Just(&b"\xef\xbb\xbf"[..]), 1 => Just(&b"\xef"[..]),
            ], 0..40),
            cuts in proptest::collection::vec(any::<usize>(), 0..10),
        ) {
            let stream = pieces.concat();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
            cuts.push(stream.len());
            cuts.sort_unstable();
            let mut scanner = Scanner::default();
            let mut events = 0;
            let mut start = 0;
            for cut in cuts {
                events += scanner.feed(&stream[start..cut]);
                start = cut;
            }
            prop_assert_eq!(events, reference(&stream));
            let mut whole = Scanner::default();
            whole.feed(&stream);
            prop_assert_eq!(scanner.between_events(), whole.between_events());
        }
    }
}
