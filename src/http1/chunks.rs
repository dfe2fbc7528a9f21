//! Chunks: the chunked transfer coding as a state machine that may stop at any byte (RFC 9112 section 7.1).
//!
//! Two ways to use it: [`Chunks::next`] tells payload and framing apart, for bodies that are framed anew;
//! [`Chunks::pass`] checks the framing of bytes that go on as they are and takes out what is not canonical.

use std::ops::Range;

use super::HeadError;
use super::fields::read_trailers;
use super::octets;
use crate::message::Fields;

/// How many bytes [`Chunks::pass`] may need before the bytes that it is given: a zero that an earlier call held back.
pub const HEADROOM: usize = 1;

/// Bytes of one chunk's extensions. They mean nothing to us, so they only need to be endured.
const EXTENSION_BYTES_MAX: usize = 1024;

/// Leading zeros of a chunk size.
const LEADING_ZEROS_MAX: u8 = 16;

/// A body that breaks the chunked coding: the sentence says how. What follows can't be told from anything else, so the
/// connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FramingError(pub &'static str);

/// Where in a chunked body we are. A few words; it allocates only for trailers.
#[derive(Debug)]
pub struct Chunks {
    state: State,
    max_trailer_bytes: u32,
    /// Made when there are some, which is rare.
    trailers: Option<Box<Trailers>>,
}

#[derive(Debug, Default)]
struct Trailers {
    section: Vec<u8>,
    fields: Option<Fields>,
}

/// What the start of the input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// So many bytes of framing; `canonical` where they could go on as they are.
    Framing { length: usize, canonical: bool },
    /// So many bytes of payload.
    Data { length: usize },
    /// The last bytes of the body, framing too; what follows belongs to the next message.
    End { length: usize },
    /// The input is empty.
    NeedMore,
}

/// What [`Chunks::pass`] made of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Goes on to the other side. With trailers it ends after the last chunk's `0` line: the caller then writes what
    /// [`Chunks::take_trailers`] gives with [`super::write_trailers`].
    pub forward: Range<usize>,
    /// The index in the buffer at which this message's bytes end.
    pub consumed: usize,
    /// The body is complete.
    pub ended: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In a size: its significant digits so far, and how many zeros came before them.
    Size {
        value: u64,
        digits: u8,
        zeros: u8,
    },
    /// After a size; `begun` once the semicolon was there.
    Extension {
        value: u64,
        length: u32,
        begun: bool,
    },
    SizeLineFeed {
        value: u64,
    },
    Data {
        left: u64,
    },
    DataReturn,
    DataLineFeed,
    /// After the last chunk's size line.
    TrailerStart,
    LastLineFeed,
    Trailers,
    Ended,
}

const START: State = State::Size { value: 0, digits: 0, zeros: 0 };

/// One step of the machine over the start of some bytes.
enum Step {
    /// Framing that goes on as it is.
    Keep(usize),
    /// Framing that need not go on.
    Drop(usize),
    /// A zero that was dropped is needed after all. Takes no input.
    Zero,
    Data(usize),
    /// The end; the last bytes go on or, being trailers, don't.
    End {
        length: usize,
        keep: bool,
    },
}

impl Chunks {
    /// At the start of a body. Trailers over `max_trailer_bytes` are an error.
    pub fn new(max_trailer_bytes: u32) -> Chunks {
        Chunks { state: START, max_trailer_bytes, trailers: None }
    }

    /// Nothing of a chunk's framing was read yet.
    pub fn is_between_chunks(&self) -> bool {
        self.state == START
    }

    /// Looks at the start of `input`, and takes the piece that it returns as read.
    #[inline]
    pub fn next(&mut self, input: &[u8]) -> Result<Piece, FramingError> {
        if input.is_empty() {
            return Ok(Piece::NeedMore);
        }
        loop {
            return Ok(match self.step(input)? {
                Step::Keep(length) => Piece::Framing { length, canonical: true },
                Step::Drop(length) => Piece::Framing { length, canonical: false },
                Step::Zero => continue,
                Step::Data(length) => Piece::Data { length },
                Step::End { length, .. } => Piece::End { length },
            });
        }
    }

    /// Checks the framing of `buffer[start..end]` and closes the gaps where it takes something out (extensions, leading
    /// zeros). Calls `observe` with every slice of payload, in order.
    ///
    /// `start` is at least [`HEADROOM`], and the bytes before it are free to be overwritten. Bytes that are canonical,
    /// which is nearly always all of them, are not moved.
    pub fn pass(
        &mut self,
        buffer: &mut [u8],
        start: usize,
        end: usize,
        mut observe: impl FnMut(&[u8]),
    ) -> Result<Pass, FramingError> {
        assert!(start >= HEADROOM, "Chunks::pass needs {HEADROOM} byte before its input");
        let mut kept = Kept { start, end: start, run: start };
        let mut position = start;
        let mut ended = matches!(self.state, State::Ended);
        while position < end && !ended {
            match self.step(&buffer[position..end])? {
                Step::Keep(length) => position += length,
                Step::Data(length) => {
                    observe(&buffer[position..position + length]);
                    position += length;
                }
                Step::Drop(length) => {
                    kept.skip(buffer, position, position + length);
                    position += length;
                }
                Step::Zero => kept.insert_zero(buffer),
                Step::End { length, keep } => {
                    if !keep {
                        kept.skip(buffer, position, position + length);
                    }
                    position += length;
                    ended = true;
                }
            }
        }
        kept.skip(buffer, position, position);
        Ok(Pass { forward: kept.start..kept.end, consumed: position, ended })
    }

    /// After the end: the trailers, without those that must not be there. `Some` whenever a trailer section came, even
    /// if nothing is left of it: [`Pass::forward`] then lacks the final empty line. `None` the second time.
    pub fn take_trailers(&mut self) -> Option<Fields> {
        self.trailers.take().and_then(|trailers| trailers.fields)
    }

    /// Looks at the start of `input`, which is not empty.
    #[inline]
    fn step(&mut self, input: &[u8]) -> Result<Step, FramingError> {
        match self.state {
            State::Data { left } => {
                let length = usize::try_from(left).map_or(input.len(), |left| left.min(input.len()));
                let left = left - length as u64;
                self.state = if left == 0 { State::DataReturn } else { State::Data { left } };
                Ok(Step::Data(length))
            }
            State::DataReturn => match input {
                [b'\r', b'\n', ..] => {
                    self.state = START;
                    Ok(Step::Keep(2))
                }
                [b'\r', ..] => {
                    self.state = State::DataLineFeed;
                    Ok(Step::Keep(1))
                }
                _ => Err(FramingError("A chunk does not end in CRLF where its size says.")),
            },
            State::Size { digits: 0, zeros: 0, .. } => match canonical_size(input) {
                Some((value, length)) => {
                    self.state = after_size(value);
                    Ok(Step::Keep(length))
                }
                None => self.careful_step(input),
            },
            State::TrailerStart if input.starts_with(b"\r\n") => {
                self.state = State::Ended;
                Ok(Step::End { length: 2, keep: true })
            }
            _ => self.careful_step(input),
        }
    }

    /// The states of bytes that were split or are not canonical.
    #[cold]
    fn careful_step(&mut self, input: &[u8]) -> Result<Step, FramingError> {
        let byte = input[0];
        match self.state {
            State::Size { value, digits, zeros } => {
                if let Some(digit) = octets::hex_digit(byte) {
                    return self.size_digit(value, digits, zeros, digit);
                }
                if digits == 0 && zeros == 0 {
                    return Err(FramingError("A chunk has no size in hexadecimal digits."));
                }
                if !matches!(byte, b'\r' | b';' | b' ' | b'\t') {
                    return Err(FramingError("A chunk size holds something other than hexadecimal digits."));
                }
                if digits == 0 {
                    // All of it was zeros: one of them is the size.
                    self.state = State::Size { value, digits: 1, zeros };
                    return Ok(Step::Zero);
                }
                if byte == b'\r' {
                    self.state = State::SizeLineFeed { value };
                    return Ok(Step::Keep(1));
                }
                self.state = State::Extension { value, length: 1, begun: byte == b';' };
                Ok(Step::Drop(1))
            }
            State::Extension { value, length, begun } => self.extension(input, value, length, begun),
            State::SizeLineFeed { value } => {
                expect_line_feed(byte)?;
                self.state = after_size(value);
                Ok(Step::Keep(1))
            }
            State::DataLineFeed => {
                expect_line_feed(byte)?;
                self.state = START;
                Ok(Step::Keep(1))
            }
            State::TrailerStart if byte == b'\r' => {
                self.state = State::LastLineFeed;
                Ok(Step::Keep(1))
            }
            State::LastLineFeed => {
                expect_line_feed(byte)?;
                self.state = State::Ended;
                Ok(Step::End { length: 1, keep: true })
            }
            State::TrailerStart | State::Trailers => {
                self.state = State::Trailers;
                self.collect_trailers(input)
            }
            State::Ended => Ok(Step::End { length: 0, keep: true }),
            State::Data { .. } | State::DataReturn => unreachable!("`step` handles these"),
        }
    }

    fn size_digit(&mut self, value: u64, digits: u8, zeros: u8, digit: u8) -> Result<Step, FramingError> {
        if digit == 0 && digits == 0 {
            if zeros == LEADING_ZEROS_MAX {
                return Err(FramingError("A chunk size has too many leading zeros."));
            }
            self.state = State::Size { value, digits, zeros: zeros + 1 };
            return Ok(Step::Drop(1));
        }
        if digits == 16 {
            return Err(FramingError("A chunk size is too large a number."));
        }
        self.state = State::Size { value: value << 4 | u64::from(digit), digits: digits + 1, zeros };
        Ok(Step::Keep(1))
    }

    fn extension(&mut self, input: &[u8], value: u64, length: u32, begun: bool) -> Result<Step, FramingError> {
        let mut begun = begun;
        let mut count = 0;
        for &byte in input {
            match byte {
                b'\r' if !begun => return Err(FramingError("A chunk size is followed by a space.")),
                b'\r' => break,
                b';' => begun = true,
                b' ' | b'\t' => {}
                0..0x20 | 0x7f => return Err(FramingError("A chunk extension holds a control byte.")),
                _ if !begun => {
                    return Err(FramingError("A chunk size holds something other than hexadecimal digits."));
                }
                _ => {}
            }
            count += 1;
            if length as usize + count > EXTENSION_BYTES_MAX {
                return Err(FramingError("A chunk's extensions are too long."));
            }
        }
        if count == 0 {
            self.state = State::SizeLineFeed { value };
            return Ok(Step::Keep(1));
        }
        self.state = State::Extension { value, length: length + count as u32, begun };
        Ok(Step::Drop(count))
    }

    fn collect_trailers(&mut self, input: &[u8]) -> Result<Step, FramingError> {
        let trailers = self.trailers.get_or_insert_default();
        for (index, &byte) in input.iter().enumerate() {
            if trailers.section.len() >= self.max_trailer_bytes as usize {
                return Err(FramingError("The trailers are larger than is allowed."));
            }
            let follows_return = trailers.section.last() == Some(&b'\r');
            if follows_return != (byte == b'\n') {
                return Err(FramingError("The trailers have a bare CR or LF: lines end in CRLF."));
            }
            trailers.section.push(byte);
            if byte == b'\n' && trailers.section.ends_with(b"\r\n\r\n") {
                let section = std::mem::take(&mut trailers.section);
                trailers.fields = Some(read_trailers(&section).map_err(|error| match error {
                    HeadError::Malformed(sentence) => FramingError(sentence),
                    HeadError::TooLarge => FramingError("The trailers are larger than is allowed."),
                })?);
                self.state = State::Ended;
                return Ok(Step::End { length: index + 1, keep: false });
            }
        }
        Ok(Step::Drop(input.len()))
    }
}

/// The bytes that go on, kept together: `buffer[start..end]`, and then, from `run` on, bytes that are still to be moved
/// up to `end` when the next gap is known.
struct Kept {
    start: usize,
    end: usize,
    run: usize,
}

impl Kept {
    /// Leaves out `buffer[from..to]`.
    fn skip(&mut self, buffer: &mut [u8], from: usize, to: usize) {
        if self.start == self.end && self.run == from {
            // Nothing is kept yet: begin after the gap, so that nothing has to be moved.
            (self.start, self.end, self.run) = (to, to, to);
            return;
        }
        if self.end != self.run {
            buffer.copy_within(self.run..from, self.end);
        }
        self.end += from - self.run;
        self.run = to;
    }

    /// Puts a zero where one was left out just before `run`, in this buffer or in an earlier one.
    fn insert_zero(&mut self, buffer: &mut [u8]) {
        if self.start == self.end {
            self.start = self.run - 1;
            self.end = self.start;
        }
        buffer[self.end] = b'0';
        self.end += 1;
    }
}

/// A size line at the start of `input`, if it is all there and canonical: its value and length.
#[inline]
fn canonical_size(input: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0;
    let mut length = 0;
    while let Some(digit) = input.get(length).and_then(|&byte| octets::hex_digit(byte)) {
        if length == 16 {
            return None;
        }
        value = value << 4 | u64::from(digit);
        length += 1;
    }
    let is_canonical = length == 1 || (length > 1 && input[0] != b'0');
    (is_canonical && input[length..].starts_with(b"\r\n")).then_some((value, length + 2))
}

fn after_size(value: u64) -> State {
    if value == 0 { State::TrailerStart } else { State::Data { left: value } }
}

fn expect_line_feed(byte: u8) -> Result<(), FramingError> {
    if byte == b'\n' { Ok(()) } else { Err(FramingError("The chunked coding has a bare CR.")) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Chunks, FramingError, HEADROOM, Piece};
    use crate::http1::write_trailers;
    use crate::message::Fields;

    const TRAILER_BYTES_MAX: u32 = 256;

    #[derive(Debug, Default, PartialEq)]
    struct Outcome {
        payload: Vec<u8>,
        forwarded: Vec<u8>,
        trailers: Option<Fields>,
        consumed: usize,
        ended: bool,
    }

    /// Runs `pass` over `input`, cut at `cuts`.
    fn pass(input: &[u8], cuts: &[usize]) -> Result<Outcome, FramingError> {
        let mut chunks = Chunks::new(TRAILER_BYTES_MAX);
        let mut outcome = Outcome::default();
        for part in parts(input, cuts) {
            let mut buffer = vec![b'#'; HEADROOM];
            buffer.extend_from_slice(part);
            let end = buffer.len();
            let pass = chunks.pass(&mut buffer, HEADROOM, end, |data| outcome.payload.extend_from_slice(data))?;
            outcome.forwarded.extend_from_slice(&buffer[pass.forward]);
            outcome.consumed += pass.consumed - HEADROOM;
            outcome.ended = pass.ended;
            if pass.ended {
                outcome.trailers = chunks.take_trailers();
                break;
            }
            assert_eq!(pass.consumed, end, "without an end all is consumed");
        }
        Ok(outcome)
    }

    /// The same with `next`.
    fn read(input: &[u8], cuts: &[usize]) -> Result<Outcome, FramingError> {
        let mut chunks = Chunks::new(TRAILER_BYTES_MAX);
        let mut outcome = Outcome::default();
        for mut part in parts(input, cuts) {
            while !outcome.ended {
                let length = match chunks.next(part)? {
                    Piece::NeedMore => break,
                    Piece::Framing { length, .. } => length,
                    Piece::Data { length } => {
                        outcome.payload.extend_from_slice(&part[..length]);
                        length
                    }
                    Piece::End { length } => {
                        outcome.ended = true;
                        outcome.trailers = chunks.take_trailers();
                        length
                    }
                };
                outcome.consumed += length;
                part = &part[length..];
            }
        }
        Ok(outcome)
    }

    fn parts<'a>(input: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
        cuts.sort_unstable();
        let mut parts = Vec::new();
        let mut start = 0;
        for cut in cuts {
            parts.push(&input[start..cut]);
            start = cut;
        }
        parts.push(&input[start..]);
        parts
    }

    fn every_byte(input: &[u8]) -> Vec<usize> {
        (0..input.len()).collect()
    }

    #[test]
    fn canonical_framing_passes_as_it_is() {
        for input in [&b"0\r\n\r\n"[..], b"5\r\nhello\r\n0\r\n\r\n", b"A\r\n0123456789\r\n1\r\nx\r\n0\r\n\r\n"] {
            for cuts in [vec![], every_byte(input)] {
                let outcome = pass(input, &cuts).expect("good framing");
                assert_eq!(outcome.forwarded, input);
                assert!(outcome.ended && outcome.trailers.is_none());
                assert_eq!(outcome.consumed, input.len());
            }
        }
    }

    #[test]
    fn what_is_not_canonical_is_cleaned() {
        for (input, output) in [
            ("005\r\nhello\r\n00\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n"),
            ("5;a=b\r\nhello\r\n0;c\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n"),
            ("5 \t;a=\"\t\\\"ä\"\r\nhello\r\n0000 ;\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n"),
            ("0a\r\n0123456789\r\n0\r\n\r\n", "a\r\n0123456789\r\n0\r\n\r\n"),
            ("10;x\r\n0123456789abcdef\r\n0\r\n\r\n", "10\r\n0123456789abcdef\r\n0\r\n\r\n"),
        ] {
            let input = input.as_bytes();
            for cuts in std::iter::once(vec![]).chain((0..input.len()).map(|cut| vec![cut])).chain([every_byte(input)])
            {
                let outcome = pass(input, &cuts).expect("tolerable framing");
                assert_eq!(String::from_utf8_lossy(&outcome.forwarded), output, "cut at {cuts:?}");
                assert!(outcome.ended);
            }
        }
    }

    #[test]
    fn what_follows_the_body_is_left_alone() {
        for input in [&b"1\r\na\r\n0\r\n\r\n"[..], b"1\r\na\r\n0\r\nx: y\r\n\r\n"] {
            let with_next = [input, b"GET / HTTP/1.1\r\n"].concat();
            assert_eq!(pass(&with_next, &[]).expect("good framing").consumed, input.len());
            assert_eq!(read(&with_next, &[]).expect("good framing").consumed, input.len());
        }
        let mut chunks = Chunks::new(0);
        assert_eq!(chunks.next(b"0\r\n\r\nx"), Ok(Piece::Framing { length: 3, canonical: true }));
        assert_eq!(chunks.next(b"\r\nx"), Ok(Piece::End { length: 2 }));
        assert_eq!(chunks.next(b"x"), Ok(Piece::End { length: 0 }));
        let again = chunks.pass(&mut [b'0', b'x'], 1, 2, |_| panic!("no payload")).expect("nothing to refuse");
        assert_eq!((again.forward, again.consumed, again.ended), (1..1, 1, true));
    }

    #[test]
    fn trailers_are_read_and_weeded() {
        let input = b"0\r\nX-Sum: 1\r\nContent-Length: 5\r\nhost: a\r\nX-Forwarded-For: b\r\nx-b:\r\n\r\n";
        for cuts in [vec![], every_byte(input)] {
            let outcome = pass(input, &cuts).expect("good framing");
            assert_eq!(outcome.forwarded, b"0\r\n");
            let trailers = outcome.trailers.expect("there were trailers");
            assert_eq!(trailers.iter().collect::<Vec<_>>(), [(&b"X-Sum"[..], &b"1"[..]), (b"x-b", b"")]);
        }
        let outcome = pass(b"0\r\nHost: a\r\n\r\n", &[]).expect("good framing");
        assert_eq!(outcome.trailers, Some(Fields::default()), "the empty line is still to be written");
    }

    #[test]
    fn bad_framing_has_each_its_sentence() {
        for (input, words) in [
            ("\r\n", "no size"),
            (";a\r\n", "no size"),
            ("x\r\n", "no size"),
            ("-1\r\n", "no size"),
            ("+1\r\n", "no size"),
            (" 1\r\n", "no size"),
            ("0x1\r\n", "other than hex"),
            ("1_0\r\n", "other than hex"),
            ("1\n", "other than hex"),
            ("1 \r\n", "followed by a space"),
            ("1 1\r\n", "other than hex"),
            ("1\rx", "bare CR"),
            ("11112222333344445\r\n", "too large"),
            ("00000000000000000\r\n", "leading zeros"),
            ("1;a\0\r\n", "control"),
            ("1;a\nb\r\n", "control"),
            ("1;a\x7f\r\n", "control"),
            ("1;\r\r\n", "bare CR"),
            ("1\r\nab\r\n", "does not end in CRLF"),
            ("1\r\na\n", "does not end in CRLF"),
            ("1\r\na\rx", "bare CR"),
            ("0\r\n\rx", "bare CR"),
            ("0\r\n\n", "bare CR or LF"),
            ("0\r\nx: y\n\r\n", "bare CR or LF"),
            ("0\r\nx: y\r\r\n", "bare CR or LF"),
            ("0\r\nx\r\n\r\n", "colon"),
            ("0\r\nx : y\r\n\r\n", "colon"),
            ("0\r\n x: y\r\n\r\n", "folded"),
            ("0\r\nx: y\r\n z\r\n\r\n", "folded"),
            ("0\r\nx: \0\r\n\r\n", "control"),
        ] {
            let input = input.as_bytes();
            for cuts in [vec![], every_byte(input)] {
                for result in [pass(input, &cuts), read(input, &cuts)] {
                    let FramingError(sentence) = result.expect_err("bad framing");
                    assert!(sentence.contains(words), "{:?}: {sentence}", String::from_utf8_lossy(input));
                }
            }
        }
    }

    #[test]
    fn bounds() {
        let extended = |length: usize| format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(length));
        assert!(pass(extended(1023).as_bytes(), &[]).is_ok());
        assert!(pass(extended(1024).as_bytes(), &[]).is_err());
        assert!(pass(extended(1024).as_bytes(), &[500, 900]).is_err());
        let trailed = |length: usize| format!("0\r\nx:{}\r\n\r\n", "y".repeat(length - 6));
        assert!(pass(trailed(TRAILER_BYTES_MAX as usize).as_bytes(), &[]).is_ok());
        assert!(pass(trailed(TRAILER_BYTES_MAX as usize + 1).as_bytes(), &[]).is_err());
        let mut chunks = Chunks::new(0);
        assert_eq!(chunks.next(b"ffffffffffffffff\r\n"), Ok(Piece::Framing { length: 18, canonical: true }));
        assert_eq!(chunks.next(b"abc"), Ok(Piece::Data { length: 3 }));
    }

    /// A chunked body: its bytes, its payload, its trailers.
    fn body() -> impl Strategy<Value = (Vec<u8>, Vec<u8>, Option<Fields>)> {
        let chunk = (
            proptest::collection::vec(any::<u8>(), 1..40),
            0..4usize,
            prop_oneof![Just(""), Just(";a"), Just(" ;a=\"b;\""), Just(";x=y;z")],
            any::<bool>(),
        );
        let trailers = proptest::collection::vec(("x-[a-z]{1,5}", "[a-z]{0,5}"), 0..3);
        (proptest::collection::vec(chunk, 0..6), trailers, 0..3usize).prop_map(|(chunks, trailer_fields, zeros)| {
            let mut bytes = Vec::new();
            let mut payload = Vec::new();
            for (data, zeros, extension, upper) in chunks {
                let size = if upper { format!("{:X}", data.len()) } else { format!("{:x}", data.len()) };
                bytes.extend_from_slice(format!("{}{size}{extension}\r\n", "0".repeat(zeros)).as_bytes());
                bytes.extend_from_slice(&data);
                bytes.extend_from_slice(b"\r\n");
                payload.extend_from_slice(&data);
            }
            bytes.extend_from_slice(format!("0{}\r\n", "0".repeat(zeros)).as_bytes());
            let mut trailers = Fields::default();
            for (name, value) in trailer_fields {
                trailers.append(&name, value.as_bytes());
            }
            write_trailers(&mut bytes, &trailers);
            (bytes, payload, (!trailers.is_empty()).then_some(trailers))
        })
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_payload_and_canonical_output(
            (bytes, payload, trailers) in body(),
            cuts in proptest::collection::vec(any::<usize>(), 0..12),
        ) {
            let read = read(&bytes, &cuts).expect("a valid body");
            prop_assert_eq!(&read.payload, &payload);
            prop_assert_eq!(&read.trailers, &trailers);
            prop_assert!(read.ended);

            let passed = pass(&bytes, &cuts).expect("a valid body");
            prop_assert_eq!(&passed.payload, &payload);
            prop_assert_eq!(&passed.trailers, &trailers);
            prop_assert_eq!(passed.consumed, bytes.len());
            prop_assert_eq!(&passed.forwarded, &pass(&bytes, &[]).expect("a valid body").forwarded);

            // What goes on is canonical: it passes unchanged, and means the same.
            let mut output = passed.forwarded;
            if let Some(trailers) = &trailers {
                write_trailers(&mut output, trailers);
            }
            let again = pass(&output, &[]).expect("canonical output");
            prop_assert_eq!(again.payload, payload);
            prop_assert_eq!(&again.trailers, &trailers);
            if trailers.is_none() {
                prop_assert_eq!(again.forwarded, output);
            }
        }

        #[test]
        fn any_bytes_are_taken_the_same_way_under_any_split(
            bytes in proptest::collection::vec(prop_oneof![
                Just(b'\r'), Just(b'\n'), Just(b'0'), Just(b'1'), Just(b'2'), Just(b';'), Just(b' '), Just(b'a'), any::<u8>()
            ], 0..40),
            cuts in proptest::collection::vec(any::<usize>(), 0..12),
        ) {
            prop_assert_eq!(pass(&bytes, &cuts), pass(&bytes, &[]));
            prop_assert_eq!(read(&bytes, &cuts), read(&bytes, &[]));
        }
    }
}
