//! Where the plain part of a string ends. Most strings are short: their first bytes are looked at as machine words.

/// Strings up to here are searched by machine words: a search with wide registers costs more than it saves on them.
const SHORT_BYTES: usize = 16;

/// Where the first quote or backslash is.
pub fn end_of_plain(text: &[u8]) -> Option<usize> {
    near(text, words::ends).or_else(|| memchr::memchr2(b'"', b'\\', text))
}

/// As [`end_of_plain`], if that is near and there are only ASCII characters before it, none of them a control.
pub fn end_of_short(text: &[u8]) -> Option<usize> {
    let is_special = |word| words::ends(word) | words::less(word, 0x20) | words::not_ascii(word);
    near(text, is_special).filter(|&end| matches!(text[end], b'"' | b'\\'))
}

/// The first byte that is marked, if it is among the whole words at the start.
fn near(text: &[u8], marks: impl Fn(u64) -> u64) -> Option<usize> {
    let mut at = 0;
    while at < SHORT_BYTES {
        let marks = marks(u64::from_le_bytes(*text[at..].first_chunk()?));
        if marks != 0 {
            return Some(at + marks.trailing_zeros() as usize / 8);
        }
        at += 8;
    }
    None
}

/// Eight bytes at once: the high bit of each that is meant. Above the first of them it may be wrong, which nobody asks.
mod words {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x80 * ONES;

    pub fn less(word: u64, than: u64) -> u64 {
        word.wrapping_sub(than * ONES) & !word & HIGH
    }

    pub fn not_ascii(word: u64) -> u64 {
        word & HIGH
    }

    /// Quotes and backslashes.
    pub fn ends(word: u64) -> u64 {
        let is = |byte: u8| less(word ^ (u64::from(byte) * ONES), 1);
        is(b'"') | is(b'\\')
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_near_end_of_a_string_is_found(
            text in proptest::collection::vec(prop_oneof![8 => b'a'..=b'z', 1 => any::<u8>(), 1 => Just(b'"')], 0..30),
        ) {
            let is_special = |byte: &u8| !(0x20..0x80).contains(byte) || matches!(byte, b'"' | b'\\');
            let end = text.iter().position(is_special).filter(|&end| matches!(text[end], b'"' | b'\\'));
            // Only whole words are looked at.
            let looked_at = (text.len() / 8 * 8).min(SHORT_BYTES);
            prop_assert_eq!(end_of_short(&text), end.filter(|&end| end < looked_at));
        }
    }
}
