//! Pattern: path patterns, how they are written and what they match.

use std::fmt;
use std::str::FromStr;

use super::values::check_normalised;
use super::yaml::quote;
use super::{PathPattern, Segment};

impl PathPattern {
    /// Whether `path`, in normalised form and without query, matches.
    pub fn matches(&self, path: &str) -> bool {
        self.walk(path).is_some()
    }

    /// The segment of `path` at `{session}`, if the path matches.
    pub fn capture<'p>(&self, path: &'p str) -> Option<&'p str> {
        self.walk(path).flatten()
    }

    /// `None`: no match; else what `{session}` captured.
    fn walk<'p>(&self, path: &'p str) -> Option<Option<&'p str>> {
        let mut captured = None;
        let Some(rest) = path.strip_prefix('/') else {
            // The `*` of OPTIONS is below nothing, so only what matches everything matches it.
            return (self.open && self.segments.is_empty()).then_some(None);
        };
        let mut rest = rest.split('/');
        for segment in &self.segments {
            let found = rest.next()?;
            match segment {
                Segment::Literal(literal) if literal == found => {}
                Segment::Any if !found.is_empty() => {}
                Segment::Session if !found.is_empty() => captured = Some(found),
                _ => return None,
            }
        }
        (self.open || rest.next().is_none()).then_some(captured)
    }
}

impl FromStr for PathPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<PathPattern, String> {
        check_normalised(text)?;
        let (body, open) = match text.strip_suffix("/**") {
            Some(body) => (body, true),
            None => (text, false),
        };
        let mut segments = Vec::new();
        // `/**` leaves nothing: no segment must be there.
        for segment in body.split('/').skip(1) {
            segments.push(match segment {
                "*" => Segment::Any,
                "{session}" => Segment::Session,
                "**" => return Err("`/**` may stand only at the end; `*` is one segment".to_owned()),
                _ if segment.contains('*') => {
                    return Err(format!("`*` stands for a whole segment; {} mixes it with text", quote(segment)));
                }
                _ if segment.contains(['{', '}']) => {
                    return Err(format!(
                        "{} is not known: only `{{session}}` (in session keys), `*` and a final `/**`; \
                         a literal brace is written %7B or %7D",
                        quote(segment)
                    ));
                }
                _ => Segment::Literal(segment.to_owned()),
            });
        }
        Ok(PathPattern { segments, open })
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for segment in &self.segments {
            match segment {
                Segment::Literal(literal) => write!(formatter, "/{literal}")?,
                Segment::Any => formatter.write_str("/*")?,
                Segment::Session => formatter.write_str("/{session}")?,
            }
        }
        if self.open { formatter.write_str("/**") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_the_contract_says() {
        let cases = [
            ("/x/**", "/x", true),
            ("/x/**", "/x/", true),
            ("/x/**", "/x/a/b", true),
            ("/x/**", "/xa", false),
            ("/x/**", "/X", false),
            ("/**", "/", true),
            ("/**", "/a/b", true),
            ("/", "/", true),
            ("/", "/a", false),
            ("/a/*/c", "/a/b/c", true),
            ("/a/*/c", "/a/c", false),
            ("/a/*/c", "/a/b/b/c", false),
            ("/a/*", "/a/", false),
            ("/a/", "/a", false),
            ("/a", "/a/", false),
        ];
        for (pattern, path, expected) in cases {
            let parsed: PathPattern = pattern.parse().expect(pattern);
            assert_eq!(parsed.matches(path), expected, "{pattern} {path}");
            assert_eq!(parsed.to_string(), pattern);
        }
    }

    #[test]
    fn the_session_is_captured() {
        let pattern: PathPattern = "/threads/{session}/**".parse().expect("valid");
        assert_eq!(pattern.capture("/threads/t1"), Some("t1"));
        assert_eq!(pattern.capture("/threads/t1/runs"), Some("t1"));
        assert_eq!(pattern.capture("/threads/"), None);
        assert_eq!(pattern.capture("/other/t1"), None);
    }
}
