//! Stamped events: how the mock agent writes them and how the generator checks every one.
//!
//! An event is a whole SSE event of a fixed size:
//! `id: 00000012\ndata: {"tag":"00000000000000ab","sent_ns":"0000123456789012345","text":"xxxx"}\n\n`.
//! Numbers have fixed widths, so the agent rewrites two fields in place and formats nothing.

use serde::Serialize;

/// The smallest event that holds its own fields, in bytes.
pub const EVENT_BYTES_MIN: usize = HEAD.len() + FOOT.len();
/// The largest event that the checker accepts, in bytes.
pub const EVENT_BYTES_MAX: usize = 1 << 20;

const HEAD: &[u8] =
    b"id: 00000000\ndata: {\"tag\":\"0000000000000000\",\"sent_ns\":\"0000000000000000000\",\"text\":\"";
const FOOT: &[u8] = b"\"}\n\n";
const ID: std::ops::Range<usize> = 4..12;
const TAG: std::ops::Range<usize> = 27..43;
const SENT: std::ops::Range<usize> = 56..75;

/// What can be wrong with the events of a stream.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventFault {
    /// Bytes that are not the event that was sent.
    Corrupt,
    /// An event of another client's stream.
    Crossed,
    /// An event seen before.
    Doubled,
    /// A hole in the sequence that was never filled.
    Lost,
    /// An event that came after a later one.
    Reordered,
    /// The stream ended in the middle of an event.
    Truncated,
}

/// One event as bytes, written once and restamped for each sending.
pub struct EventTemplate {
    bytes: Vec<u8>,
}

impl EventTemplate {
    /// An event of `size` bytes (at least [`EVENT_BYTES_MIN`], at most [`EVENT_BYTES_MAX`]) for the stream `tag`.
    pub fn new(tag: u64, size: usize) -> Self {
        let size = size.clamp(EVENT_BYTES_MIN, EVENT_BYTES_MAX);
        let mut bytes = Vec::with_capacity(size);
        bytes.extend_from_slice(HEAD);
        bytes.resize(size - FOOT.len(), b'x');
        bytes.extend_from_slice(FOOT);
        bytes[TAG].copy_from_slice(format!("{tag:016x}").as_bytes());
        Self { bytes }
    }

    /// The event with its sequence number (from 0) and its send time.
    pub fn stamped(&mut self, sequence: u32, sent_ns: u64) -> &[u8] {
        write_decimal(&mut self.bytes[ID], u64::from(sequence));
        write_decimal(&mut self.bytes[SENT], sent_ns);
        &self.bytes
    }
}

/// Checks the events of one stream as their bytes come, however these are cut.
pub struct EventChecker {
    tag: u64,
    size: usize,
    next: u32,
    seen: u32,
    // Sequence numbers that were jumped over and may still come; bounded by HOLES_MAX.
    holes: Vec<u32>,
    lost_for_good: u64,
    partial: Vec<u8>,
    in_comment: bool,
}

const HOLES_MAX: usize = 4096;

impl EventChecker {
    /// A checker for the stream `tag` with events of `size` bytes.
    pub fn new(tag: u64, size: usize) -> Self {
        let size = size.clamp(EVENT_BYTES_MIN, EVENT_BYTES_MAX);
        Self {
            tag,
            size,
            next: 0,
            seen: 0,
            holes: Vec::new(),
            lost_for_good: 0,
            partial: Vec::new(),
            in_comment: false,
        }
    }

    /// Takes bytes of the body. `found` is called once for each event, with its send time or with what is wrong.
    ///
    /// Comments (lines that start with a colon, such as heartbeats of a proxy) are passed over.
    pub fn feed(&mut self, mut input: &[u8], mut found: impl FnMut(Result<u64, EventFault>)) {
        while !input.is_empty() {
            if self.in_comment {
                let Some(end) = memchr::memchr(b'\n', input) else { return };
                input = &input[end + 1..];
                self.in_comment = false;
            } else if self.partial.is_empty() {
                match input[0] {
                    b':' => self.in_comment = true,
                    // The empty line that follows a comment.
                    b'\n' => input = &input[1..],
                    _ if input.len() >= self.size => {
                        let (event, rest) = input.split_at(self.size);
                        found(self.judge(event));
                        input = rest;
                    }
                    _ => {
                        self.partial.extend_from_slice(input);
                        return;
                    }
                }
            } else {
                let missing = self.size - self.partial.len();
                let (more, rest) = input.split_at(missing.min(input.len()));
                self.partial.extend_from_slice(more);
                input = rest;
                if self.partial.len() == self.size {
                    let event = std::mem::take(&mut self.partial);
                    found(self.judge(&event));
                    // The room is kept for the next event that comes in parts.
                    self.partial = event;
                    self.partial.clear();
                }
            }
        }
    }

    /// How many different events came so far.
    pub fn seen(&self) -> u32 {
        self.seen
    }

    /// What an ended stream lacks: holes that were never filled, and a half event at the end.
    pub fn finish(&self, mut found: impl FnMut(EventFault)) {
        for _ in 0..self.lost_for_good + self.holes.len() as u64 {
            found(EventFault::Lost);
        }
        if !self.partial.is_empty() {
            found(EventFault::Truncated);
        }
    }

    fn judge(&mut self, event: &[u8]) -> Result<u64, EventFault> {
        let (sequence, tag, sent_ns) = parse(event).ok_or(EventFault::Corrupt)?;
        if tag != self.tag {
            return Err(EventFault::Crossed);
        }
        if sequence < self.next {
            return match self.holes.iter().position(|&hole| hole == sequence) {
                Some(place) => {
                    self.holes.swap_remove(place);
                    self.seen += 1;
                    Err(EventFault::Reordered)
                }
                None => Err(EventFault::Doubled),
            };
        }
        for hole in self.next..sequence {
            if self.holes.len() == HOLES_MAX {
                self.lost_for_good += u64::from(sequence - hole);
                break;
            }
            self.holes.push(hole);
        }
        self.next = sequence + 1;
        self.seen += 1;
        Ok(sent_ns)
    }
}

fn parse(event: &[u8]) -> Option<(u32, u64, u64)> {
    let text_ends = event.len().checked_sub(FOOT.len())?;
    let fields_intact = event[..ID.start] == HEAD[..ID.start]
        && event[ID.end..TAG.start] == HEAD[ID.end..TAG.start]
        && event[TAG.end..SENT.start] == HEAD[TAG.end..SENT.start]
        && event[SENT.end..HEAD.len()] == HEAD[SENT.end..]
        && &event[text_ends..] == FOOT;
    if !fields_intact || event[HEAD.len()..text_ends].iter().any(|&byte| byte != b'x') {
        return None;
    }
    let sequence = u32::try_from(read_decimal(&event[ID])?).ok()?;
    let tag = u64::from_str_radix(std::str::from_utf8(&event[TAG]).ok()?, 16).ok()?;
    Some((sequence, tag, read_decimal(&event[SENT])?))
}

fn write_decimal(field: &mut [u8], mut number: u64) {
    for digit in field.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

fn read_decimal(field: &[u8]) -> Option<u64> {
    field.iter().try_fold(0u64, |number, &digit| {
        digit.is_ascii_digit().then(|| number.wrapping_mul(10).wrapping_add(u64::from(digit - b'0')))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 120;

    fn bytes_of(sequences: &[u32]) -> Vec<u8> {
        let mut template = EventTemplate::new(7, SIZE);
        sequences.iter().flat_map(|&sequence| template.stamped(sequence, 1000 + u64::from(sequence)).to_vec()).collect()
    }

    fn check(checker: &mut EventChecker, input: &[u8], cut: usize) -> (Vec<Result<u64, EventFault>>, Vec<EventFault>) {
        let mut found = Vec::new();
        for part in input.chunks(cut) {
            checker.feed(part, |event| found.push(event));
        }
        let mut missing = Vec::new();
        checker.finish(|fault| missing.push(fault));
        (found, missing)
    }

    #[test]
    fn the_fields_are_where_the_ranges_say() {
        assert_eq!(&HEAD[ID], b"00000000");
        assert_eq!(&HEAD[TAG], b"0000000000000000");
        assert_eq!(&HEAD[SENT], b"0000000000000000000");
        assert_eq!(HEAD[SENT.end], b'"');
        let event = bytes_of(&[12]);
        assert_eq!(event.len(), SIZE);
        assert!(event.starts_with(b"id: 00000012\ndata: {\"tag\":\"0000000000000007\""));
    }

    #[test]
    fn events_in_order_are_right_however_they_are_cut() {
        let input = bytes_of(&[0, 1, 2, 3]);
        for cut in [1, 7, SIZE - 1, SIZE, SIZE + 1, input.len()] {
            let (found, missing) = check(&mut EventChecker::new(7, SIZE), &input, cut);
            assert_eq!(found, [Ok(1000), Ok(1001), Ok(1002), Ok(1003)], "cut {cut}");
            assert!(missing.is_empty());
        }
    }

    #[test]
    fn comments_are_passed_over_however_they_are_cut() {
        let mut input = bytes_of(&[0]);
        input.extend_from_slice(b": heartbeat\n\n");
        input.extend(bytes_of(&[1]));
        for cut in 1..input.len() {
            let (found, missing) = check(&mut EventChecker::new(7, SIZE), &input, cut);
            assert_eq!(found, [Ok(1000), Ok(1001)], "cut {cut}");
            assert!(missing.is_empty());
        }
    }

    #[test]
    fn each_fault_has_its_name() {
        let find = |sequences: &[u32]| check(&mut EventChecker::new(7, SIZE), &bytes_of(sequences), 50);
        let (found, missing) = find(&[0, 2, 3]);
        assert_eq!((found.len(), missing), (3, vec![EventFault::Lost]));
        let (found, missing) = find(&[0, 2, 1]);
        assert_eq!((found[2], missing.len()), (Err(EventFault::Reordered), 0));
        let (found, missing) = find(&[0, 1, 1]);
        assert_eq!((found[2], missing.len()), (Err(EventFault::Doubled), 0));

        let (_, missing) = check(&mut EventChecker::new(7, SIZE), &bytes_of(&[0, 1])[..SIZE + 9], 50);
        assert_eq!(missing, [EventFault::Truncated]);
        let (found, _) = check(&mut EventChecker::new(8, SIZE), &bytes_of(&[0]), 50);
        assert_eq!(found, [Err(EventFault::Crossed)]);
        let mut changed = bytes_of(&[0]);
        changed[100] = b'y';
        let (found, _) = check(&mut EventChecker::new(7, SIZE), &changed, 50);
        assert_eq!(found, [Err(EventFault::Corrupt)]);
    }

    #[test]
    fn a_huge_hole_is_counted_and_bounded() {
        let (_, missing) = check(&mut EventChecker::new(7, SIZE), &bytes_of(&[0, 100_000]), SIZE);
        assert_eq!(missing.len(), 99_999);
    }
}
