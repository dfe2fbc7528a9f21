//! Frames: follows the frame heads of one direction, so that something can be said between two frames. It looks at no
//! payload, and so reads extensions (compression), too.

/// Flags, length of up to eight more bytes, mask (RFC 6455 section 5.2).
const HEAD_BYTES_MAX: usize = 14;

/// An unmasked close frame, status 1001 (going away): a server that goes down says so (section 7.4.1).
pub const GOING_AWAY: &[u8] = &[0x88, 2, 0x03, 0xe9];

/// Reads one direction piece by piece.
#[derive(Debug, Default)]
pub struct Frames {
    head: [u8; HEAD_BYTES_MAX],
    head_length: usize,
    /// So much of a frame's payload is still to come.
    left: u64,
    /// It has said close: nothing may follow.
    closed: bool,
}

impl Frames {
    pub fn feed(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.left > 0 {
                let length = usize::try_from(self.left).map_or(rest.len(), |left| left.min(rest.len()));
                self.left -= length as u64;
                rest = &rest[length..];
                continue;
            }
            self.head[self.head_length] = rest[0];
            self.head_length += 1;
            rest = &rest[1..];
            if let Some(length) = self.payload_length() {
                self.closed |= self.head[0] & 0x0f == 8;
                self.head_length = 0;
                self.left = length;
            }
        }
    }

    /// A frame may begin here. A control frame may stand between two fragments of a message (section 5.4).
    pub fn is_between(&self) -> bool {
        self.left == 0 && self.head_length == 0 && !self.closed
    }

    /// Of the frame whose head has come whole.
    fn payload_length(&self) -> Option<u64> {
        let head = &self.head[..self.head_length];
        let length = *head.get(1)?;
        let mask_at = match length & 0x7f {
            126 => 4,
            127 => 10,
            _ => 2,
        };
        if head.len() < mask_at + if length & 0x80 != 0 { 4 } else { 0 } {
            return None;
        }
        Some(match mask_at {
            2 => u64::from(length & 0x7f),
            _ => head[2..mask_at].iter().fold(0, |long, byte| long << 8 | u64::from(*byte)),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(opcode: u8, payload: usize, masked: bool) -> Vec<u8> {
        let bit = if masked { 0x80 } else { 0 };
        let mut bytes = vec![0xc0 | opcode];
        match payload {
            0..126 => bytes.push(bit | payload as u8),
            126..0x1_0000 => {
                bytes.push(bit | 126);
                bytes.extend((payload as u16).to_be_bytes());
            }
            _ => {
                bytes.push(bit | 127);
                bytes.extend((payload as u64).to_be_bytes());
            }
        }
        bytes.extend(if masked { &[1, 2, 3, 4][..] } else { &[] });
        bytes.resize(bytes.len() + payload, 0x88);
        bytes
    }

    #[test]
    fn nothing_follows_a_close() {
        let mut frames = Frames::default();
        frames.feed(GOING_AWAY);
        assert!(!frames.is_between());
    }

    proptest! {
        #[test]
        fn it_is_between_exactly_where_a_frame_has_ended(
            sizes in prop::collection::vec((prop_oneof![0_usize..200, 60_000_usize..70_000], any::<bool>()), 1..6),
            step in 1_usize..5_000,
        ) {
            let (mut stream, mut ends) = (Vec::new(), vec![0]);
            for (size, masked) in sizes {
                stream.extend(frame(2, size, masked));
                ends.push(stream.len());
            }
            let (mut frames, mut at) = (Frames::default(), 0);
            prop_assert!(frames.is_between());
            while at < stream.len() {
                let next = (at + step).min(stream.len());
                frames.feed(&stream[at..next]);
                at = next;
                prop_assert_eq!(frames.is_between(), ends.contains(&at), "{}", at);
            }
        }
    }
}
