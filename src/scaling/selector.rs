//! Selector: a Kubernetes label selector as it stands in a query: `service=support,version in (stable,canary)`.
//!
//! The grammar is that of `labels.Parse` in apimachinery: equality (`=`, `==`, `!=`), sets (`in`, `notin`), existence
//! (`key`, `!key`) and numbers (`>`, `<`), joined by commas.

use std::str::FromStr;

/// Longer ones are refused.
const BYTES_MAX: usize = 4096;

/// Requirements, all of which must hold; none at all accepts everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    requirements: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    condition: Condition,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    In(Vec<String>),
    /// Also where there is no such label.
    NotIn(Vec<String>),
    Exists,
    Absent,
    Above(i64),
    Below(i64),
}

impl Selector {
    /// Whether something with these labels is meant.
    pub fn accepts<'v>(&self, value_of: impl Fn(&str) -> Option<&'v str>) -> bool {
        self.requirements.iter().all(|requirement| requirement.condition.holds(value_of(&requirement.key)))
    }

    /// Whether it wants anything of this label but its absence.
    pub fn speaks_of(&self, label: &str) -> bool {
        self.requirements
            .iter()
            .any(|requirement| requirement.key == label && requirement.condition != Condition::Absent)
    }
}

impl Condition {
    fn holds(&self, value: Option<&str>) -> bool {
        let number = || value.and_then(|value| value.parse::<i64>().ok());
        match self {
            Condition::In(values) => value.is_some_and(|value| values.iter().any(|one| one == value)),
            Condition::NotIn(values) => value.is_none_or(|value| values.iter().all(|one| one != value)),
            Condition::Exists => value.is_some(),
            Condition::Absent => value.is_none(),
            Condition::Above(bound) => number().is_some_and(|number| number > *bound),
            Condition::Below(bound) => number().is_some_and(|number| number < *bound),
        }
    }
}

impl FromStr for Selector {
    /// What is wrong with it.
    type Err = String;

    fn from_str(text: &str) -> Result<Selector, String> {
        if text.len() > BYTES_MAX {
            return Err(format!("the label selector is longer than {BYTES_MAX} bytes"));
        }
        let mut tokens = Tokens { rest: text };
        let mut requirements = Vec::new();
        if tokens.peek() == Token::End {
            return Ok(Selector { requirements });
        }
        loop {
            requirements.push(requirement(&mut tokens)?);
            match tokens.next() {
                Token::End => return Ok(Selector { requirements }),
                Token::Comma => {}
                other => return Err(unexpected(other, "a comma or the end")),
            }
        }
    }
}

fn requirement(tokens: &mut Tokens<'_>) -> Result<Requirement, String> {
    if tokens.peek() == Token::Not {
        tokens.next();
        return Ok(Requirement { key: word(tokens, "a key after !")?, condition: Condition::Absent });
    }
    let key = word(tokens, "a key")?;
    if matches!(tokens.peek(), Token::Comma | Token::End) {
        return Ok(Requirement { key, condition: Condition::Exists });
    }
    let condition = match tokens.next() {
        Token::Equal => Condition::In(vec![value(tokens)?]),
        Token::NotEqual => Condition::NotIn(vec![value(tokens)?]),
        Token::Above => Condition::Above(number(tokens)?),
        Token::Below => Condition::Below(number(tokens)?),
        Token::Word("in") => Condition::In(values(tokens)?),
        Token::Word("notin") => Condition::NotIn(values(tokens)?),
        other => return Err(unexpected(other, "one of = == != in notin > <")),
    };
    Ok(Requirement { key, condition })
}

fn word(tokens: &mut Tokens<'_>, wanted: &str) -> Result<String, String> {
    match tokens.next() {
        Token::Word(word) => Ok(word.to_owned()),
        other => Err(unexpected(other, wanted)),
    }
}

/// An empty one where none is written.
fn value(tokens: &mut Tokens<'_>) -> Result<String, String> {
    match tokens.peek() {
        Token::Comma | Token::End | Token::Close => Ok(String::new()),
        _ => word(tokens, "a value"),
    }
}

fn number(tokens: &mut Tokens<'_>) -> Result<i64, String> {
    let text = word(tokens, "a whole number")?;
    text.parse().map_err(|_| format!("{text:?} in the label selector is no whole number"))
}

fn values(tokens: &mut Tokens<'_>) -> Result<Vec<String>, String> {
    match tokens.next() {
        Token::Open => {}
        other => return Err(unexpected(other, "( after in or notin")),
    }
    let mut values = Vec::new();
    loop {
        values.push(value(tokens)?);
        match tokens.next() {
            Token::Comma => {}
            Token::Close => return Ok(values),
            other => return Err(unexpected(other, "a comma or )")),
        }
    }
}

fn unexpected(found: Token<'_>, wanted: &str) -> String {
    let found = match found {
        Token::Word(word) => format!("{word:?}"),
        Token::End => "the end".to_owned(),
        Token::Comma => "a comma".to_owned(),
        other => format!("{other:?}"),
    };
    format!("the label selector has {found} where {wanted} is expected")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'t> {
    Word(&'t str),
    Comma,
    Equal,
    NotEqual,
    Not,
    Above,
    Below,
    Open,
    Close,
    End,
}

struct Tokens<'t> {
    rest: &'t str,
}

impl<'t> Tokens<'t> {
    fn peek(&self) -> Token<'t> {
        Tokens { rest: self.rest }.next()
    }

    fn next(&mut self) -> Token<'t> {
        const SIGNS: [(&str, Token<'static>); 9] = [
            ("==", Token::Equal),
            ("=", Token::Equal),
            ("!=", Token::NotEqual),
            ("!", Token::Not),
            (">", Token::Above),
            ("<", Token::Below),
            (",", Token::Comma),
            ("(", Token::Open),
            (")", Token::Close),
        ];
        self.rest = self.rest.trim_start();
        for (sign, token) in SIGNS {
            if let Some(rest) = self.rest.strip_prefix(sign) {
                self.rest = rest;
                return token;
            }
        }
        let is_special = |character: char| character.is_whitespace() || "=!><,()".contains(character);
        let end = self.rest.find(is_special).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        if word.is_empty() { Token::End } else { Token::Word(word) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn accepts(selector: &str, labels: &[(&str, &str)]) -> bool {
        let selector: Selector = selector.parse().unwrap_or_else(|error| panic!("{selector}: {error}"));
        selector.accepts(|key| labels.iter().find(|(name, _)| *name == key).map(|(_, value)| *value))
    }

    #[test]
    fn what_kubernetes_may_send() {
        let support = &[("service", "support"), ("version", "stable")];
        for selector in [
            "",
            "  ",
            "service",
            "service=support",
            "service == support",
            "service=support,version=stable",
            "version in (stable,canary)",
            "version in (stable, canary),service",
            "version notin (canary)",
            "pool notin (canary)",
            "service!=other",
            "pool!=other",
            "!pool",
            "! pool , service = support",
        ] {
            assert!(accepts(selector, support), "{selector}");
        }
        for selector in ["service=", "service=other", "version notin (stable)", "!service", "pool", "pool in (a)"] {
            assert!(!accepts(selector, support), "{selector}");
        }
        assert!(accepts("n>3,n<5", &[("n", "4")]) && !accepts("n>3", &[("n", "x")]));
        assert!(accepts("a in (,b)", &[("a", "")]));
    }

    #[test]
    fn what_is_no_selector() {
        for text in
            [",", "a,", "=b", "a b", "a in", "a in (", "a in (b", "a in b", "a=b c", "a>x", "!", "a=(b)", "a in (b))"]
        {
            let error = text.parse::<Selector>().expect_err(text);
            assert!(error.contains("label selector"), "{text}: {error}");
        }
        assert!("a".repeat(BYTES_MAX + 1).parse::<Selector>().is_err());
    }

    proptest! {
        #[test]
        fn anything_is_read_or_refused(text in "[a-z=!<>,() ]{0,40}") {
            let _ = text.parse::<Selector>();
        }

        /// As defined: written out and read, a selector accepts what its parts accept.
        #[test]
        fn all_parts_must_hold(
            parts in prop::collection::vec(("[ab]", 0..6usize, prop::collection::vec("[xy]{0,1}", 1..3)), 0..4),
            label in prop::option::of("[xy]{0,1}"),
        ) {
            let mut text = Vec::new();
            let mut expected = true;
            for (key, kind, values) in &parts {
                let value = label.as_deref().filter(|_| key == "a");
                let within = value.is_some_and(|value| values.iter().any(|one| one == value));
                let first = value == Some(values[0].as_str());
                let set = values.join(",");
                let (written, holds) = match kind {
                    0 => (format!("{key}={}", values[0]), first),
                    1 => (format!("{key}!={}", values[0]), !first),
                    2 => (format!("{key} in ({set})"), within),
                    3 => (format!("{key} notin ({set})"), !within),
                    4 => (key.clone(), value.is_some()),
                    _ => (format!("!{key}"), value.is_none()),
                };
                text.push(written);
                expected &= holds;
            }
            let selector: Selector = text.join(",").parse().unwrap();
            prop_assert_eq!(selector.accepts(|key| label.as_deref().filter(|_| key == "a")), expected);
        }
    }
}
