//! HTTP/1.1: a strict codec without input or output (RFC 9110, RFC 9112).
//!
//! A head is found with [`head_end`], read once with [`read_request`] or [`read_response`], and written afresh in one
//! canonical form with [`write_request`] or [`write_response`]: what was ambiguous was refused, so nothing is passed on
//! that the next hop could read in another way. Bodies in chunks go through [`chunks`].

pub mod chunks;
mod encode;
mod fields;
mod octets;
mod request;
mod response;
mod target;

pub use encode::{write_chunk_header, write_request, write_response, write_trailers};
pub use fields::{is_hop_by_hop, may_be_trailer};
pub use request::read_request;
pub use response::read_response;
pub use target::{normalise_target, valid_authority};

/// Bounds on one head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLimits {
    /// From the first byte of the start line through the final empty line.
    pub max_bytes: usize,
    /// Field lines, those of the connection counted too.
    pub max_fields: usize,
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// Past a bound of [`HeadLimits`] (431 towards a client).
    #[error("The head is larger than is allowed.")]
    TooLarge,
    /// Not HTTP/1.1, or readable in two ways (400 towards a client). The sentence says what is wrong.
    #[error("{0}")]
    Malformed(&'static str),
}

/// Finds the end of a head: the index after its final empty line. `None`: more bytes are needed.
///
/// `buffer` begins with the head and grows from call to call; `scanned` is 0 at first and lets each call look only at
/// what is new. A bare LF, CR or NUL is refused as soon as it is seen, a head over `max_bytes` as soon as that is sure.
/// One empty line before the start line counts as part of the head ([`read_request`] skips it).
pub fn head_end(buffer: &[u8], scanned: &mut usize, limits: HeadLimits) -> Result<Option<usize>, HeadError> {
    let window = &buffer[..buffer.len().min(limits.max_bytes)];
    let mut position = (*scanned).min(window.len());
    while let Some(found) = memchr::memchr3(b'\r', b'\n', 0, &window[position..]) {
        let at = position + found;
        match (window[at], window.get(at + 1)) {
            (b'\n', _) => return Err(HeadError::Malformed("The head has a bare LF: lines end in CRLF.")),
            (0, _) => return Err(HeadError::Malformed("The head holds a NUL byte.")),
            (_, Some(b'\n')) => {}
            (_, Some(_)) => return Err(HeadError::Malformed("The head has a bare CR: lines end in CRLF.")),
            (_, None) => break,
        }
        position = at + 2;
        if at >= 2 && &window[at - 2..at] == b"\r\n" {
            *scanned = position;
            return Ok(Some(position));
        }
    }
    if buffer.len() >= limits.max_bytes {
        return Err(HeadError::TooLarge);
    }
    // A CR at the very end is looked at again, together with what comes.
    *scanned = window.len() - usize::from(window.last() == Some(&b'\r'));
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::{HeadError, HeadLimits, head_end};

    const LIMITS: HeadLimits = HeadLimits { max_bytes: 64, max_fields: 8 };

    #[test]
    fn finds_the_end_whatever_the_split() {
        for head in [&b"GET / HTTP/1.1\r\nHost: a\r\n\r\nrest"[..], b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n\r\n"] {
            let end = head.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4);
            let mut scanned = 0;
            let mut found = None;
            for length in 0..=head.len() {
                found = head_end(&head[..length], &mut scanned, LIMITS).expect("a good head");
                assert_eq!(found.is_some(), Some(length) >= end, "after {length} bytes");
                if found.is_some() {
                    break;
                }
            }
            assert_eq!(found, end);
            assert_eq!(head_end(head, &mut 0, LIMITS), Ok(end));
        }
    }

    #[test]
    fn bare_line_ends_and_nul_are_refused_at_once() {
        for (head, word) in [
            ("GET / HTTP/1.1\nHost", "LF"),
            ("GET / HTTP/1.1\r\nHost: a\n", "LF"),
            ("\n", "LF"),
            ("GET / HTTP/1.1\rH", "CR"),
            ("\r\r\n", "CR"),
            ("GET /\0", "NUL"),
            ("\x16\x03\x01\0", "NUL"),
        ] {
            match head_end(head.as_bytes(), &mut 0, LIMITS) {
                Err(HeadError::Malformed(sentence)) => assert!(sentence.contains(word), "{head:?}: {sentence}"),
                other => panic!("{head:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_head_past_the_limit_is_refused_early() {
        let start = b"GET / HTTP/1.1\r\n";
        let mut head = start.to_vec();
        head.resize(60, b'a');
        head.extend_from_slice(b"\r\n\r\n");
        assert_eq!(head_end(&head, &mut 0, LIMITS), Ok(Some(64)));
        head.insert(20, b'a');
        assert_eq!(head_end(&head, &mut 0, LIMITS), Err(HeadError::TooLarge));
        assert_eq!(head_end(&head[..63], &mut 0, LIMITS), Ok(None));
        assert_eq!(head_end(&head[..64], &mut 0, LIMITS), Err(HeadError::TooLarge));
    }
}
