//! Typed: the `type` of a JSON message, told without a parser where it comes first, as nearly everybody writes it.

use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

use crate::json::{Extractor, Pointers};

static TYPE: LazyLock<Arc<Pointers>> = LazyLock::new(|| Arc::new(Pointers::new(["/type"])));

/// The string at `/type`; empty where there is none. (Of what follows it nobody looks whether it is JSON.)
pub fn type_of(message: &[u8]) -> Cow<'_, [u8]> {
    match type_in_front(message) {
        Some(found) => Cow::Borrowed(found),
        None => Cow::Owned(Extractor::read(&TYPE, message).text("/type").unwrap_or_default().as_bytes().to_vec()),
    }
}

fn type_in_front(message: &[u8]) -> Option<&[u8]> {
    let after_brace = message.trim_ascii_start().strip_prefix(b"{")?;
    let after_name = after_brace.trim_ascii_start().strip_prefix(b"\"type\"")?;
    let value = after_name.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start().strip_prefix(b"\"")?;
    let end = memchr::memchr2(b'"', b'\\', value)?;
    (value[end] == b'"').then_some(&value[..end])
}

#[cfg(test)]
mod tests {
    use super::type_of;

    #[test]
    fn finds_the_type_wherever_it_is() {
        for (message, found) in [
            (r#"{"type":"a.b","x":1}"#, "a.b"),
            (r#" { "type" : "a", "type": "b" }"#, "a"),
            (r#"{"x":{"type":"no"},"type":"yes"}"#, "yes"),
            (r#"{"type":"\u0061"}"#, "a"),
            (r#"{"type":7}"#, ""),
            (r#"{"type":"a"#, ""),
            (r#"["type"]"#, ""),
            ("", ""),
        ] {
            assert_eq!(&*type_of(message.as_bytes()), found.as_bytes(), "{message}");
        }
    }
}
