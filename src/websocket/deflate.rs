//! Deflate: inflates the compressed messages of one direction (permessage-deflate, RFC 7692).

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

use crate::message::Fields;
use crate::websocket::{Text, Unreadable};

/// How far one message is inflated. Whoever keeps a window has to inflate all of each message, so what is longer ends the
/// reading: few bytes that become very many shall not cost more than this.
pub const INFLATED_BYTES_MAX: usize = 8 * 1024 * 1024;

/// What an endpoint and its client have agreed on about what the endpoint sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deflate {
    /// Distances lead back by no more than two to the power of this: 8 to 15.
    window_bits: u8,
    /// A message may refer to those before it.
    keeps_window: bool,
}

/// Inflates message after message. Between two it holds no more than the window, of 32 KiB at the most and as long as what
/// has been inflated; during one 11 KiB besides.
pub(super) struct Inflater {
    agreed: Deflate,
    /// What was inflated last; a ring once it is as long as agreed.
    window: Vec<u8>,
    /// Where in the window the next byte goes.
    at: usize,
    /// The window is full: what lies behind `at` is older than what lies before it.
    is_full: bool,
    /// Of the message that is being read.
    state: Option<Box<DecompressorOxide>>,
    /// So much that message has become.
    inflated: usize,
}

/// What of each message is not sent: the end of an empty block (section 7.2.1).
const TAIL: [u8; 4] = [0, 0, 0xff, 0xff];

/// The window's length at first.
const WINDOW_BYTES_MIN: usize = 4 * 1024;

const FLAGS: u32 = inflate_flags::TINFL_FLAG_HAS_MORE_INPUT | inflate_flags::TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY;

impl Deflate {
    /// What the answer to a handshake says (section 7.1). `None`: no compression, or something that can't be read, such as
    /// an extension besides.
    pub(super) fn agreed(answer: &Fields) -> Option<Deflate> {
        let mut extensions = answer
            .get_all("sec-websocket-extensions")
            .flat_map(|value| value.split(|byte| *byte == b','))
            .map(<[u8]>::trim_ascii)
            .filter(|extension| !extension.is_empty());
        let (Some(extension), None) = (extensions.next(), extensions.next()) else { return None };
        let mut parameters = extension.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
        if parameters.next() != Some(b"permessage-deflate") {
            return None;
        }
        let mut deflate = Deflate { window_bits: 15, keeps_window: true };
        let mut seen = Vec::new();
        for parameter in parameters {
            let mut parts = parameter.splitn(2, |byte| *byte == b'=').map(<[u8]>::trim_ascii);
            let (name, value) = (parts.next().unwrap_or_default(), parts.next());
            if seen.contains(&name) {
                return None;
            }
            seen.push(name);
            match (name, value) {
                (b"server_no_context_takeover", None) => deflate.keeps_window = false,
                (b"server_max_window_bits", Some(value)) => deflate.window_bits = window_bits(value)?,
                // Of what the client sends.
                (b"client_no_context_takeover", None) => {}
                (b"client_max_window_bits", Some(value)) => _ = window_bits(value)?,
                _ => return None,
            }
        }
        Some(deflate)
    }

    fn window_bytes(self) -> usize {
        // Where 8 is agreed, zlib takes 9 all the same.
        1 << self.window_bits.max(9)
    }
}

fn window_bits(value: &[u8]) -> Option<u8> {
    let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
    match value {
        [digit @ b'8'..=b'9'] => Some(digit - b'0'),
        [b'1', digit @ b'0'..=b'5'] => Some(10 + digit - b'0'),
        _ => None,
    }
}

impl Inflater {
    pub(super) fn new(agreed: Deflate) -> Inflater {
        Inflater { agreed, window: Vec::new(), at: 0, is_full: false, state: None, inflated: 0 }
    }

    #[cfg(test)]
    pub(super) fn holds_nothing(&self) -> bool {
        self.state.is_none() && self.window.capacity() == 0
    }

    /// Reads on in a message; `None`: what it says is of no interest.
    pub(super) fn feed(&mut self, payload: &[u8], text: Option<&mut Text>) -> Result<(), Unreadable> {
        self.inflate(payload, text).map(|_| ())
    }

    /// Ends the message.
    pub(super) fn end(&mut self, text: Option<&mut Text>) -> Result<(), Unreadable> {
        let reached = self.inflate(&TAIL, text)?;
        self.state = None;
        self.inflated = 0;
        if !self.agreed.keeps_window {
            *self = Inflater::new(self.agreed);
        }
        if reached == Reached::InsideBlock { Err(Unreadable) } else { Ok(()) }
    }

    fn inflate(&mut self, mut payload: &[u8], mut text: Option<&mut Text>) -> Result<Reached, Unreadable> {
        loop {
            if !self.agreed.keeps_window && text.as_ref().is_none_or(|text| text.cut) {
                return Ok(Reached::Enough);
            }
            self.make_room();
            let state = self.state.get_or_insert_default();
            // As long as the window is not full, a distance that leads out of it is noticed.
            let linear = if self.is_full { 0 } else { inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF };
            let (status, read, written) = decompress(state, payload, &mut self.window, self.at, FLAGS | linear);
            payload = &payload[read..];
            if let Some(text) = &mut text {
                text.keep(&self.window[self.at..self.at + written]);
            }
            self.at += written;
            self.inflated += written;
            if self.inflated > INFLATED_BYTES_MAX {
                return Err(Unreadable);
            }
            match status {
                TINFLStatus::NeedsMoreInput => return Ok(Reached::InsideBlock),
                TINFLStatus::HasMoreOutput => {}
                TINFLStatus::BlockBoundary => {
                    // A block may end within a byte; the last one of a message doesn't.
                    if payload.is_empty() && state.block_boundary_state().is_some_and(|state| state.num_bits == 0) {
                        return Ok(Reached::BlockEnd);
                    }
                }
                // A last block is not the message's end, and the next one begins with a byte (section 7.2.3.5).
                TINFLStatus::Done => state.init(),
                _ => return Err(Unreadable),
            }
        }
    }

    /// Makes sure that there is room for a byte at least.
    fn make_room(&mut self) {
        if self.at < self.window.len() {
            return;
        }
        let full = self.agreed.window_bytes();
        if self.window.len() < full {
            self.window.resize((2 * self.window.len()).max(WINDOW_BYTES_MIN).min(full), 0);
        } else {
            self.is_full = true;
            self.at = 0;
        }
    }
}

/// How far the bytes of a message have led.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached {
    /// More has to come.
    InsideBlock,
    /// Another block may follow, or nothing.
    BlockEnd,
    /// Nobody wants to know the rest.
    Enough,
}

/// An endpoint that compresses, with another implementation.
#[cfg(test)]
pub(super) mod endpoint {
    use flate2::{Compress, Compression, FlushCompress};

    pub struct Endpoint {
        compress: Compress,
        window_bits: u8,
        keeps_window: bool,
    }

    impl Endpoint {
        pub fn new(window_bits: u8, keeps_window: bool, level: u32) -> Endpoint {
            // As zlib does it where 8 is agreed on.
            let compress = Compress::new_with_window_bits(Compression::new(level), false, window_bits.max(9));
            Endpoint { compress, window_bits, keeps_window }
        }

        /// What it answers to a handshake.
        pub fn extensions(&self) -> String {
            let takeover = if self.keeps_window { "" } else { "; server_no_context_takeover" };
            format!("permessage-deflate; server_max_window_bits={}{takeover}", self.window_bits)
        }

        /// The payload of a message.
        pub fn compress(&mut self, text: &[u8]) -> Vec<u8> {
            let mut payload = Vec::with_capacity(text.len() + text.len() / 100 + 1000);
            let before = self.compress.total_in();
            self.compress.compress_vec(text, &mut payload, FlushCompress::Sync).expect("it can be compressed");
            assert_eq!(self.compress.total_in() - before, text.len() as u64);
            if payload.is_empty() {
                // It has nothing to flush a second time: an empty block (section 7.2.3.6).
                return vec![0];
            }
            assert!(payload.ends_with(&super::TAIL), "a flush ends so");
            payload.truncate(payload.len() - super::TAIL.len());
            if !self.keeps_window {
                self.compress.reset();
            }
            payload
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::endpoint::Endpoint;
    use super::*;
    use crate::websocket::MESSAGE_BYTES_MAX;

    fn agreed(answer: &[&str]) -> Option<Deflate> {
        let mut fields = Fields::default();
        for value in answer {
            fields.append("Sec-WebSocket-Extensions", value.as_bytes());
        }
        Deflate::agreed(&fields)
    }

    #[test]
    fn reads_what_was_agreed_on() {
        let deflate = |window_bits, keeps_window| Some(Deflate { window_bits, keeps_window });
        for (answer, expected) in [
            ("permessage-deflate", deflate(15, true)),
            ("permessage-deflate; server_no_context_takeover", deflate(15, false)),
            ("permessage-deflate;server_max_window_bits=8 ; client_max_window_bits=15", deflate(8, true)),
            ("permessage-deflate; server_max_window_bits=\"10\"; client_no_context_takeover,", deflate(10, true)),
            ("", None),
            ("permessage-bzip2", None),
            ("permessage-deflate, mux", None),
            ("permessage-deflate; server_max_window_bits", None),
            ("permessage-deflate; server_max_window_bits=7", None),
            ("permessage-deflate; server_max_window_bits=16", None),
            ("permessage-deflate; server_max_window_bits=09", None),
            ("permessage-deflate; server_max_window_bits=\"10", None),
            ("permessage-deflate; client_max_window_bits=x", None),
            ("permessage-deflate; client_max_window_bits", None),
            ("permessage-deflate; server_no_context_takeover=1", None),
            ("permessage-deflate; server_no_context_takeover; server_no_context_takeover", None),
            ("permessage-deflate; level=9", None),
            ("permessage-deflate;", None),
        ] {
            assert_eq!(agreed(&[answer]), expected, "{answer}");
        }
        assert_eq!(agreed(&[]), None);
        assert_eq!(agreed(&["permessage-deflate", "permessage-deflate"]), None);
        assert_eq!(agreed(&["", "permessage-deflate"]), deflate(15, true));
    }

    /// What messages say whose payloads come in pieces of so many bytes; `None` from where nothing can be read.
    fn read(answer: &str, messages: &[&[u8]], piece: usize) -> Vec<Option<Vec<u8>>> {
        let mut inflater = Inflater::new(agreed(&[answer]).expect("it is agreed on"));
        let mut told = Vec::new();
        for message in messages {
            let mut text = Text::default();
            let mut pieces = message.chunks(piece);
            let read = pieces.try_for_each(|part| inflater.feed(part, Some(&mut text)));
            let is_readable = read.and_then(|()| inflater.end(Some(&mut text))).is_ok();
            assert!(inflater.window.capacity() <= inflater.agreed.window_bytes());
            assert!(text.bytes.len() <= MESSAGE_BYTES_MAX);
            told.push(is_readable.then_some(text.bytes));
            if !is_readable {
                break;
            }
            assert!(inflater.state.is_none(), "between two messages there is the window alone");
            assert!(inflater.agreed.keeps_window || inflater.holds_nothing());
        }
        told
    }

    /// RFC 7692 section 7.2.3: one block, the window kept, no compression, a last block, two blocks, nothing.
    #[test]
    fn reads_the_examples_of_the_rfc() {
        let hello: &[u8] = b"\xf2\x48\xcd\xc9\xc9\x07\x00";
        let again: &[u8] = b"\xf2\x00\x11\x00\x00";
        let stored: &[u8] = b"\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00";
        let last: &[u8] = b"\xf3\x48\xcd\xc9\xc9\x07\x00\x00";
        let two: &[u8] = b"\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00";
        let empty: &[u8] = b"\x00";
        let said = |text: &str| Some(text.as_bytes().to_vec());
        let every =
            [said("Hello"), said("Hello"), said("Hello"), said("Hello"), said("Hello"), said(""), said("Hello")];
        for piece in [1, 2, 3, 100] {
            for window_bits in 8..=15 {
                let answer = format!("permessage-deflate; server_max_window_bits={window_bits}");
                assert_eq!(read(&answer, &[hello, again, stored, last, two, empty, again], piece), every);
            }
            let answer = "permessage-deflate; server_no_context_takeover";
            assert_eq!(read(answer, &[hello, hello, last, two, empty], piece), [&every[..4], &[said("")]].concat());
            // There is nothing before it that it could refer to.
            assert_eq!(read(answer, &[hello, again], piece), [said("Hello"), None]);
        }
    }

    #[test]
    fn gives_up_at_what_can_not_be_inflated() {
        for (bad, what) in [
            (&b""[..], "no block"),
            (b"\xf2\x48\xcd\xc9\xc9", "half a block"),
            (b"\x07", "a block of the reserved kind"),
            (b"\x00\x05\x00\xfa\xfe\x48\x65\x6c\x6c\x6f\x00", "a length that is not its complement's"),
            (b"\xf2\x00\x11\x00\x00", "a distance that leads to before the first byte"),
            (b"\x00\x05\x00\xfa\xffHel", "less than was announced"),
        ] {
            for piece in [1, 100] {
                assert_eq!(read("permessage-deflate", &[bad], piece), [None], "{what}");
            }
        }
    }

    #[test]
    fn few_bytes_that_become_very_many_end_the_reading_of_whoever_keeps_a_window() {
        let zeros = vec![0; INFLATED_BYTES_MAX];
        for (length, keeps_window, is_readable) in [
            (INFLATED_BYTES_MAX, true, true),
            (INFLATED_BYTES_MAX + 1, true, false),
            (INFLATED_BYTES_MAX + 1, false, true),
        ] {
            let zeros = [&zeros[..], &[0]].concat();
            let mut endpoint = Endpoint::new(15, keeps_window, 9);
            let (bomb, after) = (endpoint.compress(&zeros[..length]), endpoint.compress(b"after"));
            assert!(bomb.len() < length / 1000);
            let told = read(&endpoint.extensions(), &[&bomb, &after], 4096);
            let expected = [Some(zeros[..MESSAGE_BYTES_MAX].to_vec()), Some(b"after".to_vec())];
            assert_eq!(told, if is_readable { expected.to_vec() } else { vec![None] }, "{length} {keeps_window}");
        }
    }

    #[test]
    fn the_bounds_of_what_a_socket_holds_are_as_stated() {
        assert!(size_of::<DecompressorOxide>() <= 11 * 1024, "{}", size_of::<DecompressorOxide>());
        assert_eq!(agreed(&["permessage-deflate"]).map(Deflate::window_bytes), Some(32 * 1024));
    }

    fn text() -> impl Strategy<Value = Vec<u8>> {
        let word = prop_oneof![
            Just(&br#"{"type":"response.output_text.delta","delta":""#[..]),
            Just(&br#""},"response":{"id":"resp_1","status":"completed"}"#[..]),
            Just(&[0; 3000][..]),
        ];
        let part = prop_oneof![
            4 => word.prop_map(<[u8]>::to_vec),
            1 => proptest::collection::vec(any::<u8>(), 0..2000),
        ];
        proptest::collection::vec(part, 0..30).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn whatever_is_deflated_is_read_as_it_was(
            messages in proptest::collection::vec(text(), 0..6),
            (window_bits, keeps_window, level, piece) in (8..=15u8, any::<bool>(), 0..=9u32, 1..5000usize),
        ) {
            let mut endpoint = Endpoint::new(window_bits, keeps_window, level);
            let payloads: Vec<Vec<u8>> = messages.iter().map(|text| endpoint.compress(text)).collect();
            let payloads: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
            let expected: Vec<_> =
                messages.iter().map(|text| Some(text[..text.len().min(MESSAGE_BYTES_MAX)].to_vec())).collect();
            prop_assert_eq!(read(&endpoint.extensions(), &payloads, piece), expected);
        }

        #[test]
        fn any_bytes_are_read_alike_in_any_pieces(
            payload in proptest::collection::vec(any::<u8>(), 0..200),
            (window_bits, keeps_window, piece) in (8..=15u8, any::<bool>(), 1..50usize),
        ) {
            let answer = Endpoint::new(window_bits, keeps_window, 0).extensions();
            prop_assert_eq!(read(&answer, &[&payload, &payload], piece), read(&answer, &[&payload, &payload], 1000));
        }
    }
}
