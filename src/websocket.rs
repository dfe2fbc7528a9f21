//! WebSocket: a reader of the text messages that pass in one direction (RFC 6455). It only looks on: what it can't read
//! passes all the same.

mod deflate;
mod frames;

pub use deflate::INFLATED_BYTES_MAX;
use deflate::{Deflate, Inflater};
pub use frames::{Frames, GOING_AWAY};

use crate::message::Fields;

/// How much of a message is kept to be looked at. What lies behind passes unseen.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// A text message that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Unmasked and inflated, its fragments put together; at most [`MESSAGE_BYTES_MAX`] bytes of it. Nobody has looked
    /// whether it is UTF-8.
    pub text: &'a [u8],
    /// `text` is not all of it.
    pub cut: bool,
}

/// Reads one direction piece by piece.
///
/// Where a message lies in one piece and is neither masked nor compressed, nothing of it is copied. It gives up for good at
/// the first frame that is malformed or uses an extension other than the compression that was agreed on, and at the first
/// message that can't be inflated or is longer than [`INFLATED_BYTES_MAX`].
#[derive(Default)]
pub struct Reader {
    /// The beginning of a frame's head: so many of these bytes have come.
    head: [u8; HEAD_BYTES_MAX],
    head_length: usize,
    /// The frame whose payload is being read.
    frame: Option<Frame>,
    /// The message that goes on in further frames.
    open: Option<Content>,
    /// What is kept of the text message that is being read.
    text: Text,
    /// Where compression was agreed on.
    inflater: Option<Inflater>,
    blind: bool,
}

/// The beginning of a message.
#[derive(Default)]
struct Text {
    bytes: Vec<u8>,
    /// More has come than is kept.
    cut: bool,
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    content: Content,
    is_last: bool,
    /// So much of the payload is still to come.
    left: u64,
    mask: Option<[u8; 4]>,
    /// So much has come, as far as the mask minds.
    offset: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Data {
        is_text: bool,
        is_compressed: bool,
    },
    /// Ping or pong: it may stand between two fragments.
    Control,
    Close,
}

/// Flags, length of up to eight more bytes, mask (RFC 6455 section 5.2).
const HEAD_BYTES_MAX: usize = 14;

/// A control frame's payload is no longer (section 5.5).
const CONTROL_BYTES_MAX: u64 = 125;

/// So much is unmasked at a time where it isn't kept.
const UNMASKED_BYTES: usize = 256;

/// It is no frame that can be read.
struct Unreadable;

impl Text {
    /// Adds what there is room for.
    fn keep(&mut self, bytes: &[u8]) {
        let room = MESSAGE_BYTES_MAX - self.bytes.len();
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.cut |= bytes.len() > room;
    }
}

impl Reader {
    /// For what an endpoint sends after this answer to a handshake.
    pub fn as_agreed(answer: &Fields) -> Reader {
        Reader { inflater: Deflate::agreed(answer).map(Inflater::new), ..Reader::default() }
    }

    /// Reads on, and calls `told` with every text message that these bytes complete.
    pub fn feed(&mut self, bytes: &[u8], mut told: impl FnMut(Message<'_>)) {
        let mut rest = bytes;
        while !rest.is_empty() && !self.blind {
            let read = match self.frame {
                None => {
                    self.head[self.head_length] = rest[0];
                    self.head_length += 1;
                    rest = &rest[1..];
                    self.begin_frame()
                }
                Some(frame) => {
                    let length = usize::try_from(frame.left).map_or(rest.len(), |left| left.min(rest.len()));
                    let (payload, behind) = rest.split_at(length);
                    rest = behind;
                    if self.is_whole_text(&frame, payload) {
                        let text = &payload[..length.min(MESSAGE_BYTES_MAX)];
                        told(Message { text, cut: text.len() < length });
                        self.frame = None;
                        continue;
                    }
                    self.read_payload(frame, payload)
                }
            };
            // A frame without payload ends with its head.
            if read.and_then(|()| self.end_frame(&mut told)).is_err() {
                self.give_up();
            }
        }
    }

    /// It has given up, or the direction is closed: nothing will be told any more.
    pub fn is_blind(&self) -> bool {
        self.blind
    }

    /// Begins the frame once its head is complete.
    fn begin_frame(&mut self) -> Result<(), Unreadable> {
        let head = &self.head[..self.head_length];
        let (Some(&flags), Some(&length)) = (head.first(), head.get(1)) else { return Ok(()) };
        let length_bytes = match length & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let mask_at = 2 + length_bytes;
        let is_masked = length & 0x80 != 0;
        if head.len() < mask_at + if is_masked { 4 } else { 0 } {
            return Ok(());
        }
        let long = head[2..mask_at].iter().fold(0u64, |long, &byte| long << 8 | u64::from(byte));
        let left = match length_bytes {
            0 => u64::from(length & 0x7f),
            // The shortest form is the only one.
            2 if long >= 126 => long,
            8 if long > 0xffff && long >> 63 == 0 => long,
            _ => return Err(Unreadable),
        };
        let is_last = flags & 0x80 != 0;
        // Only a message's first frame says that it is compressed (RFC 7692 section 6).
        let is_compressed = match (flags & 0x70, flags & 0x0f) {
            (0, _) => false,
            (0x40, 1 | 2) if self.inflater.is_some() => true,
            _ => return Err(Unreadable),
        };
        let content = match (flags & 0x0f, self.open) {
            (0, Some(content)) => content,
            (1, None) => Content::Data { is_text: true, is_compressed },
            (2, None) => Content::Data { is_text: false, is_compressed },
            (8, _) => Content::Close,
            (9 | 10, _) => Content::Control,
            _ => return Err(Unreadable),
        };
        if matches!(content, Content::Control | Content::Close) && (!is_last || left > CONTROL_BYTES_MAX) {
            return Err(Unreadable);
        }
        let mask = is_masked.then(|| [head[mask_at], head[mask_at + 1], head[mask_at + 2], head[mask_at + 3]]);
        self.head_length = 0;
        self.frame = Some(Frame { content, is_last, left, mask, offset: 0 });
        Ok(())
    }

    /// It is a text message that needs nothing done to it.
    fn is_whole_text(&self, frame: &Frame, payload: &[u8]) -> bool {
        frame.content == Content::Data { is_text: true, is_compressed: false }
            && frame.is_last
            && frame.offset == 0
            && frame.left == payload.len() as u64
            && frame.mask.is_none()
            && self.open.is_none()
    }

    fn read_payload(&mut self, mut frame: Frame, payload: &[u8]) -> Result<(), Unreadable> {
        match (frame.content, frame.mask) {
            (Content::Data { is_text: true, is_compressed: false }, mask) => {
                let kept = self.text.bytes.len();
                self.text.keep(payload);
                if let Some(mask) = mask {
                    unmask(&mut self.text.bytes[kept..], mask, frame.offset);
                }
            }
            (Content::Data { is_text, is_compressed: true }, None) => self.inflate(payload, is_text)?,
            (Content::Data { is_text, is_compressed: true }, Some(mask)) => {
                let mut offset = frame.offset;
                for masked in payload.chunks(UNMASKED_BYTES) {
                    let mut piece = [0; UNMASKED_BYTES];
                    let piece = &mut piece[..masked.len()];
                    piece.copy_from_slice(masked);
                    unmask(piece, mask, offset);
                    self.inflate(piece, is_text)?;
                    offset += masked.len();
                }
            }
            _ => {}
        }
        frame.left -= payload.len() as u64;
        frame.offset = (frame.offset + payload.len()) % 4 + 4;
        self.frame = Some(frame);
        Ok(())
    }

    fn inflate(&mut self, payload: &[u8], is_text: bool) -> Result<(), Unreadable> {
        let inflater = self.inflater.as_mut().ok_or(Unreadable)?;
        inflater.feed(payload, is_text.then_some(&mut self.text))
    }

    /// Ends the frame once its payload is complete, and the message with the last one.
    fn end_frame(&mut self, told: &mut impl FnMut(Message<'_>)) -> Result<(), Unreadable> {
        let Some(frame) = self.frame.filter(|frame| frame.left == 0) else { return Ok(()) };
        self.frame = None;
        match frame.content {
            Content::Control => {}
            Content::Close => self.give_up(),
            content if !frame.is_last => self.open = Some(content),
            Content::Data { is_text, is_compressed } => {
                self.open = None;
                if is_compressed {
                    let inflater = self.inflater.as_mut().ok_or(Unreadable)?;
                    inflater.end(is_text.then_some(&mut self.text))?;
                }
                // Whoever is silent now shall not hold what one message needed.
                let Text { bytes, cut } = std::mem::take(&mut self.text);
                if is_text {
                    told(Message { text: &bytes, cut });
                }
            }
        }
        Ok(())
    }

    fn give_up(&mut self) {
        *self = Reader { blind: true, ..Reader::default() };
    }
}

fn unmask(bytes: &mut [u8], mask: [u8; 4], offset: usize) {
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte ^= mask[(offset + index) % 4];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::deflate::endpoint::Endpoint;
    use super::{MESSAGE_BYTES_MAX, Reader};
    use crate::message::Fields;

    type Told = Vec<(Vec<u8>, bool)>;

    fn frame(flags: u8, mask: Option<[u8; 4]>, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![flags];
        let bit = if mask.is_some() { 0x80 } else { 0 };
        match payload.len() {
            length @ 0..126 => bytes.push(bit | length as u8),
            length @ 126..0x1_0000 => {
                bytes.push(bit | 126);
                bytes.extend((length as u16).to_be_bytes());
            }
            length => {
                bytes.push(bit | 127);
                bytes.extend((length as u64).to_be_bytes());
            }
        }
        bytes.extend(mask.iter().flatten());
        bytes.extend(payload.iter().enumerate().map(|(index, byte)| byte ^ mask.map_or(0, |mask| mask[index % 4])));
        bytes
    }

    fn read(stream: &[u8], cuts: &[usize]) -> (Told, bool) {
        read_by(Reader::default(), stream, cuts)
    }

    /// Of an endpoint that has answered so to a handshake.
    fn reader(extensions: &str) -> Reader {
        let mut answer = Fields::default();
        answer.append("sec-websocket-extensions", extensions.as_bytes());
        Reader::as_agreed(&answer)
    }

    fn read_by(mut reader: Reader, stream: &[u8], cuts: &[usize]) -> (Told, bool) {
        let mut told = Vec::new();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
        cuts.push(stream.len());
        cuts.sort_unstable();
        let mut start = 0;
        for cut in cuts {
            reader.feed(&stream[start..cut], |message| told.push((message.text.to_vec(), message.cut)));
            assert!(reader.text.bytes.capacity() <= 2 * MESSAGE_BYTES_MAX, "what is kept is bounded");
            start = cut;
        }
        (told, reader.is_blind())
    }

    fn texts(frames: &[Vec<u8>]) -> (Vec<String>, bool) {
        let (told, blind) = read(&frames.concat(), &[]);
        (told.into_iter().map(|(text, _)| String::from_utf8(text).unwrap()).collect(), blind)
    }

    #[test]
    fn tells_text_messages() {
        let mask = Some([1, 2, 3, 4]);
        // RFC 6455 section 5.7: "Hello" unmasked, masked and in fragments with a ping between them.
        assert_eq!(texts(&[b"\x81\x05Hello".to_vec()]).0, ["Hello"]);
        assert_eq!(texts(&[b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58".to_vec()]).0, ["Hello"]);
        let fragments = [b"\x01\x03Hel".to_vec(), b"\x89\x05Hello".to_vec(), b"\x80\x02lo".to_vec()];
        assert_eq!(texts(&fragments), (vec!["Hello".to_owned()], false));
        let masked =
            [frame(1, mask, b"Hel"), frame(0, Some([9; 4]), b""), frame(0x8a, mask, b""), frame(0x80, None, b"lo")];
        assert_eq!(texts(&masked).0, ["Hello"]);
        assert_eq!(texts(&[frame(0x81, None, b""), frame(0x82, None, b"bin"), frame(0x81, mask, b"x")]).0, ["", "x"]);
        // After a close frame nothing comes that counts.
        assert_eq!(texts(&[frame(0x88, None, b"\x03\xe8"), frame(0x81, None, b"x")]), (vec![], true));
    }

    #[test]
    fn gives_up_at_what_it_can_not_read() {
        for bad in [
            frame(0xc1, None, b"compressed"),
            frame(0xa1, None, b"x"),
            frame(0x91, None, b"x"),
            frame(0x80, None, b"goes on from nothing"),
            frame(0x83, None, b"no such kind"),
            frame(0x8b, None, b""),
            frame(0x09, None, b"a ping in fragments"),
            frame(0x89, None, &[0; 126]),
            b"\x81\x7e\x00\x05Hello".to_vec(),
            b"\x81\x7f\x00\x00\x00\x00\x00\x00\x00\x05Hello".to_vec(),
            b"\x81\x7f\x80\x00\x00\x00\x00\x00\x00\x00".to_vec(),
        ] {
            let stream = [frame(0x81, None, b"before"), bad.clone(), frame(0x81, None, b"after")];
            assert_eq!(texts(&stream), (vec!["before".to_owned()], true), "{bad:?}");
        }
        let overlapping = [frame(1, None, b"a"), frame(0x81, None, b"b"), frame(0x80, None, b"c")];
        assert_eq!(texts(&overlapping), (vec![], true));
    }

    #[test]
    fn keeps_no_more_than_its_bound_of_a_huge_message() {
        let huge = vec![b'x'; 3 * MESSAGE_BYTES_MAX];
        let streams = [
            frame(0x81, None, &huge),
            frame(0x81, Some([1, 2, 3, 4]), &huge),
            [frame(1, None, &huge), frame(0, None, &huge), frame(0x80, None, &huge)].concat(),
        ];
        for stream in streams {
            let stream = [stream, frame(0x81, None, b"after")].concat();
            for cuts in [vec![], (0..stream.len()).step_by(1000).collect::<Vec<_>>()] {
                let (told, blind) = read(&stream, &cuts);
                assert!(!blind);
                assert_eq!((told[0].0.as_slice(), told[0].1), (&huge[..MESSAGE_BYTES_MAX], true));
                assert_eq!(told[1..], [(b"after".to_vec(), false)]);
            }
        }
    }

    #[test]
    fn reads_compressed_messages_as_was_agreed() {
        let hello = b"\xf2\x48\xcd\xc9\xc9\x07\x00";
        let (first, rest) = hello.split_at(3);
        let mask = Some([1, 2, 3, 4]);
        let agreed = "permessage-deflate; server_max_window_bits=12";
        let said = |text: &str| (text.as_bytes().to_vec(), false);
        // RFC 7692 section 7.2.3.1: whole, and in fragments, of which only the first says that it is compressed.
        let fragments = [frame(0x41, None, first), frame(0x89, None, b"ping"), frame(0x80, None, rest)];
        let masked = [frame(0x41, mask, first), frame(0, Some([9; 4]), b""), frame(0x80, mask, rest)];
        let stream = [frame(0xc1, None, hello), fragments.concat(), masked.concat(), frame(0x81, None, b"plain")];
        // A message of the other kind is part of what the next may refer to, one that is not compressed is none.
        let others = [frame(0xc2, None, hello), frame(0x81, None, b"x"), frame(0xc1, None, b"\xf2\x00\x11\x00\x00")];
        let told = vec![said("Hello"), said("Hello"), said("Hello"), said("plain"), said("x"), said("Hello")];
        assert_eq!(read_by(reader(agreed), &[&stream[..], &others[..]].concat().concat(), &[]), (told, false));

        // What was not agreed on is not read.
        for extensions in ["", "x-compress", "permessage-deflate; x=1", "permessage-deflate, x"] {
            let stream = [frame(0x81, None, b"before"), frame(0xc1, None, hello), frame(0x81, None, b"after")];
            assert_eq!(
                read_by(reader(extensions), &stream.concat(), &[]),
                (vec![said("before")], true),
                "{extensions}"
            );
        }
        for bad in [
            [frame(0x41, None, first), frame(0xc0, None, rest)],
            [frame(0xc9, None, b""), frame(0xc1, None, hello)],
            [frame(0xe1, None, hello), frame(0xc1, None, hello)],
            [frame(0xc1, None, first), frame(0xc1, None, hello)],
            [frame(0xc1, None, b"\x07"), frame(0xc1, None, hello)],
        ] {
            assert_eq!(read_by(reader(agreed), &bad.concat(), &[]), (vec![], true), "{bad:?}");
        }
    }

    #[test]
    fn a_socket_without_compressed_messages_holds_nothing_for_them() {
        let mut reader = reader("permessage-deflate");
        reader.feed(&frame(0x81, None, b"plain"), |_| ());
        assert!(reader.inflater.expect("it was agreed on").holds_nothing());
    }

    /// A message (text or not, compressed or not) with the places where it is broken into fragments, a mask, and whether
    /// something stands between the fragments.
    type Sent = (bool, bool, Vec<u8>, Vec<usize>, Option<[u8; 4]>, bool);

    fn message() -> impl Strategy<Value = Sent> {
        (
            any::<bool>(),
            any::<bool>(),
            proptest::collection::vec(any::<u8>(), 0..300),
            proptest::collection::vec(any::<usize>(), 0..3),
            any::<Option<[u8; 4]>>(),
            any::<bool>(),
        )
    }

    proptest! {
        #[test]
        fn any_messages_in_any_fragments_and_pieces_are_told(
            messages in proptest::collection::vec(message(), 0..6),
            (window_bits, keeps_window) in (8..=15u8, any::<bool>()),
            cuts in proptest::collection::vec(any::<usize>(), 0..10),
        ) {
            let mut endpoint = Endpoint::new(window_bits, keeps_window, 6);
            let mut stream = Vec::new();
            let mut expected = Vec::new();
            for (is_text, is_compressed, text, breaks, mask, ping) in messages {
                let payload = if is_compressed { endpoint.compress(&text) } else { text.clone() };
                let mut breaks: Vec<usize> = breaks.iter().map(|at| at % (payload.len() + 1)).collect();
                breaks.sort_unstable();
                breaks.push(payload.len());
                let mut start = 0;
                for (index, &end) in breaks.iter().enumerate() {
                    let last = if index + 1 == breaks.len() { 0x80 } else { 0 };
                    let kind = match (index, is_text) { (0, true) => 1, (0, false) => 2, _ => 0 };
                    let compressed = if index == 0 && is_compressed { 0x40 } else { 0 };
                    stream.extend(frame(last | compressed | kind, mask, &payload[start..end]));
                    if ping {
                        stream.extend(frame(0x89, mask, b"ping"));
                    }
                    start = end;
                }
                if is_text {
                    expected.push((text, false));
                }
            }
            prop_assert_eq!(read_by(reader(&endpoint.extensions()), &stream, &cuts), (expected, false));
        }

        #[test]
        fn any_bytes_are_read_alike_in_any_pieces(
            stream in proptest::collection::vec(prop_oneof![
                Just(0x81u8), Just(1), Just(0x80), Just(0), Just(0x89), Just(0x88), Just(126), Just(127), any::<u8>(),
                Just(0xc1), Just(0x41), Just(0xf2), Just(0xff),
            ], 0..60),
            extensions in proptest::sample::select(vec!["", "permessage-deflate"]),
            cuts in proptest::collection::vec(any::<usize>(), 0..10),
        ) {
            prop_assert_eq!(read_by(reader(extensions), &stream, &cuts), read_by(reader(extensions), &stream, &[]));
        }
    }
}
