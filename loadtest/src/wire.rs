//! HTTP/1.1 on bytes, for both ends of the load test: where a head ends and what a body's framing says.

use std::fmt;

/// The longest head that either end accepts, in bytes.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// The most header fields that either end accepts.
pub const HEADERS_MAX: usize = 64;

/// How a message says where its body ends (RFC 9112 section 6.3).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Framing {
    Chunked,
    Length(u64),
    UntilClose,
}

/// Bytes that break HTTP/1.1.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "malformed HTTP/1.1: {}", self.0)
    }
}

/// The length of the head at the start of `bytes`, its empty line included; `None` while it isn't whole.
pub fn head_length(bytes: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, b"\r\n\r\n").map(|at| at + 4)
}

/// Takes the framing out of the body that follows a head, as its bytes come.
pub struct BodyDecoder {
    state: State,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Length(u64),
    UntilClose,
    ChunkSize { size: u64, digits: u8 },
    ChunkExtension { size: u64 },
    ChunkSizeEnd { size: u64 },
    ChunkData(u64),
    ChunkDataReturn,
    ChunkDataEnd,
    // Trailers: whether the line has a byte so far.
    Trailer { empty: bool },
    TrailerEnd { empty: bool },
    Ended,
}

const CHUNK_START: State = State::ChunkSize { size: 0, digits: 0 };

impl BodyDecoder {
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::Chunked => CHUNK_START,
            Framing::Length(0) => State::Ended,
            Framing::Length(length) => State::Length(length),
            Framing::UntilClose => State::UntilClose,
        };
        Self { state }
    }

    /// Whether the whole body came.
    pub fn ended(&self) -> bool {
        self.state == State::Ended
    }

    /// Whether an end of the connection here is the end of the body.
    pub fn may_end_by_close(&self) -> bool {
        matches!(self.state, State::UntilClose | State::Ended)
    }

    /// Takes bytes, hands what is content to `content`, and says how many bytes belonged to this body.
    pub fn decode(&mut self, input: &[u8], mut content: impl FnMut(&[u8])) -> Result<usize, Malformed> {
        let mut at = 0;
        while at < input.len() {
            let rest = &input[at..];
            self.state = match self.state {
                State::Ended => break,
                State::UntilClose => {
                    content(rest);
                    return Ok(input.len());
                }
                State::Length(left) => {
                    let taken = take(rest, left);
                    content(&rest[..taken]);
                    at += taken;
                    match left - taken as u64 {
                        0 => State::Ended,
                        left => State::Length(left),
                    }
                }
                State::ChunkData(left) => {
                    let taken = take(rest, left);
                    content(&rest[..taken]);
                    at += taken;
                    match left - taken as u64 {
                        0 => State::ChunkDataReturn,
                        left => State::ChunkData(left),
                    }
                }
                state => {
                    at += 1;
                    framing_byte(state, rest[0])?
                }
            };
        }
        Ok(at)
    }
}

fn framing_byte(state: State, byte: u8) -> Result<State, Malformed> {
    Ok(match (state, byte) {
        (State::ChunkSize { size, digits }, byte) if byte.is_ascii_hexdigit() => {
            if digits == 15 {
                return Err(Malformed("a chunk size has too many digits"));
            }
            let digit = char::from(byte).to_digit(16).unwrap_or(0);
            State::ChunkSize { size: size * 16 + u64::from(digit), digits: digits + 1 }
        }
        (State::ChunkSize { digits: 0, .. }, _) => return Err(Malformed("a chunk has no size")),
        (State::ChunkSize { size, .. } | State::ChunkExtension { size }, b'\r') => State::ChunkSizeEnd { size },
        (State::ChunkSize { size, .. }, b';' | b' ' | b'\t') => State::ChunkExtension { size },
        (State::ChunkExtension { size }, _) => State::ChunkExtension { size },
        (State::ChunkSizeEnd { size: 0 }, b'\n') => State::Trailer { empty: true },
        (State::ChunkSizeEnd { size }, b'\n') => State::ChunkData(size),
        (State::ChunkDataReturn, b'\r') => State::ChunkDataEnd,
        (State::ChunkDataEnd, b'\n') => CHUNK_START,
        (State::Trailer { empty }, b'\r') => State::TrailerEnd { empty },
        (State::Trailer { .. }, _) => State::Trailer { empty: false },
        (State::TrailerEnd { empty: true }, b'\n') => State::Ended,
        (State::TrailerEnd { empty: false }, b'\n') => State::Trailer { empty: true },
        _ => return Err(Malformed("chunk framing is out of step")),
    })
}

fn take(rest: &[u8], left: u64) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(rest.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(framing: Framing, input: &[u8], cut: usize) -> Result<(Vec<u8>, bool, usize), Malformed> {
        let mut decoder = BodyDecoder::new(framing);
        let mut body = Vec::new();
        let mut used = 0;
        for part in input.chunks(cut) {
            used += decoder.decode(part, |bytes| body.extend_from_slice(bytes))?;
        }
        Ok((body, decoder.ended(), used))
    }

    #[test]
    fn chunks_are_taken_apart_however_they_are_cut() {
        let input = b"5\r\nhello\r\nA;x=1\r\n, agents! \r\n0\r\nx-trailer: 1\r\n\r\nnext";
        for cut in 1..input.len() {
            let (body, ended, used) = decode(Framing::Chunked, input, cut).unwrap();
            assert_eq!((&body[..], ended, used), (&b"hello, agents! "[..], true, input.len() - 4), "cut {cut}");
        }
    }

    #[test]
    fn a_length_leaves_what_follows() {
        let (body, ended, used) = decode(Framing::Length(3), b"abcdef", 2).unwrap();
        assert_eq!((&body[..], ended, used), (&b"abc"[..], true, 3));
        assert!(BodyDecoder::new(Framing::Length(0)).ended());
    }

    #[test]
    fn a_body_until_close_never_ends_by_itself() {
        let (body, ended, _) = decode(Framing::UntilClose, b"abc", 2).unwrap();
        assert_eq!((&body[..], ended), (&b"abc"[..], false));
        assert!(BodyDecoder::new(Framing::UntilClose).may_end_by_close());
        assert!(!BodyDecoder::new(Framing::Chunked).may_end_by_close());
    }

    #[test]
    fn broken_chunks_are_refused() {
        for input in [&b"\r\n"[..], b"xyz\r\n", b"1\r\nab\r\n", b"1\nA", b"1234567890abcdef0\r\n"] {
            assert!(decode(Framing::Chunked, input, 1).is_err(), "{:?}", String::from_utf8_lossy(input));
        }
    }

    #[test]
    fn a_head_ends_at_its_empty_line() {
        assert_eq!(head_length(b"GET / HTTP/1.1\r\nhost: a\r\n"), None);
        assert_eq!(head_length(b"GET / HTTP/1.1\r\n\r\nrest"), Some(18));
    }
}
