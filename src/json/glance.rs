//! A quick look at a whole document for who knows already where something stands in it, without keeping anything.

use super::end_of_plain;

/// The keys on the way to the key whose opening quote is at `position`, outermost first, written into `keys`.
///
/// `None`: it can't be told so (an escape in a key, deeper than `keys` is long, no JSON), and must be read.
pub fn keys_around<'k, 'a>(document: &'a [u8], position: usize, keys: &'k mut [&'a [u8]]) -> Option<&'k [&'a [u8]]> {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < position {
        match document[at] {
            b'"' => {
                let start = at + 1;
                at = start + end_of_plain(document.get(start..)?)?;
                let is_escaped = document[at] == b'\\';
                while document[at] == b'\\' {
                    at += 2;
                    at += end_of_plain(document.get(at..)?)?;
                }
                let text = &document[start..at];
                at += 1;
                while matches!(document.get(at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
                    at += 1;
                }
                let is_key = document.get(at) == Some(&b':');
                if is_key {
                    if is_escaped {
                        return None;
                    }
                    *keys.get_mut(depth.checked_sub(1)?)? = text;
                }
                // A colon or, behind a value, a comma: nothing to be looked at.
                at += usize::from(is_key || document.get(at) == Some(&b','));
            }
            // An element of an array stands behind no key.
            b'{' | b'[' => {
                *keys.get_mut(depth)? = b"";
                depth += 1;
                at += 1;
            }
            b'}' | b']' => {
                depth = depth.checked_sub(1)?;
                at += 1;
            }
            _ => at += 1,
        }
    }
    // Otherwise it stands inside a string. The last key is that of the object that holds the one asked for.
    if at == position { keys.get(..depth.checked_sub(1)?) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_around_a_key() {
        let around = |document: &str| {
            let position = document.find("\"x\"").expect("it is there");
            let mut keys = [&b""[..]; 3];
            let found = keys_around(document.as_bytes(), position, &mut keys)?;
            Some(found.iter().map(|key| String::from_utf8_lossy(key).into_owned()).collect::<Vec<_>>().join("/"))
        };
        for (document, keys) in [
            (r#"{"x":1}"#, Some("")),
            (r#"{"a":{"c":{"d":"e"}},"b":{"c": "d","x":1}}"#, Some("b")),
            (r#"{"a":{"b":[1,2],"c":{"x":1}}}"#, Some("a/c")),
            (r#"{"a":[{"x":1}]}"#, Some("a/")),
            (r#"{"a":"\"b\\\\\"","b":{"x":1}}"#, Some("b")),
            (r#"{"a\"":{"x":1}}"#, None),
            (r#"{"a": "c" ,"b" :{"x":1}}"#, Some("b")),
            (r#"{"a":{"b":{"c":{"x":1}}}}"#, None),
            (r#"{"a":"\"","b":{"x":1}}"#, Some("b")),
            (r#"{"a":1}}"x":1"#, None),
        ] {
            assert_eq!(around(document).as_deref(), keys, "{document}");
        }
        let (inside, mut keys) = (br#"{"a":"b","c":"d \"x\" e"}"#, [&b""[..]; 3]);
        let position = memchr::memmem::find(inside, b"\"x").expect("it is there");
        assert_eq!(keys_around(inside, position, &mut keys), None);
    }
}
