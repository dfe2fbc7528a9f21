//! Yaml: the text of a file as a tree of nodes that know their line and column.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span, Tag};

/// Deeper nesting than any sensible file has; it bounds every recursive walk over the tree.
const DEPTH_MAX: usize = 64;
/// Nodes after aliases are expanded, so that nested aliases can't blow up memory.
const NODES_MAX: usize = 500_000;

/// What `!!` may say of a value.
const CORE_TAGS: [&str; 7] = ["str", "int", "float", "bool", "null", "seq", "map"];

/// A value in the file.
#[derive(Clone, Debug)]
pub struct Node {
    pub spot: Spot,
    pub data: Data,
}

/// Where a node begins: both count from 1, columns in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spot {
    pub line: usize,
    pub column: usize,
}

#[derive(Clone, Debug)]
pub enum Data {
    Scalar(Scalar),
    List(Vec<Node>),
    /// In the order of the file; keys may still be doubled.
    Map(Vec<(Node, Node)>),
}

#[derive(Clone, Debug)]
pub struct Scalar {
    pub text: String,
    /// Not quoted: `null`, `true` and numbers are what they look like.
    pub plain: bool,
    /// Some of the text came from the environment or a file.
    pub substituted: bool,
    /// Some of the text came from a file: never shown.
    pub secret: bool,
    /// The text could not be completed, which is already a problem.
    pub failed: bool,
}

/// What is wrong with the text as YAML.
#[derive(Debug)]
pub struct SyntaxError {
    pub spot: Spot,
    pub message: String,
}

/// Parses `text`; an empty document is a null.
pub fn parse(text: &str) -> Result<Node, SyntaxError> {
    let mut builder = Builder { open: Vec::new(), anchors: HashMap::new(), nodes: 0, root: None };
    for event in Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text)) {
        match event {
            Ok((event, span)) => builder.event(event, span)?,
            Err(error) => {
                let marker = error.marker();
                let spot = Spot { line: marker.line().max(1), column: marker.col() + 1 };
                return Err(SyntaxError { spot, message: format!("not valid YAML: {}", error.info()) });
            }
        }
    }
    Ok(builder.root.unwrap_or_else(|| Node::null(Spot::START)))
}

impl Spot {
    pub const START: Spot = Spot { line: 1, column: 1 };

    fn of(span: Span) -> Spot {
        Spot { line: span.start.line().max(1), column: span.start.col() + 1 }
    }
}

impl Node {
    fn null(spot: Spot) -> Node {
        let scalar = Scalar::new(String::new(), true);
        Node { spot, data: Data::Scalar(scalar) }
    }

    pub fn is_null(&self) -> bool {
        matches!(&self.data, Data::Scalar(scalar) if scalar.is_null())
    }

    /// Whether there is no value to read because a substitution in it failed.
    pub fn has_failed(&self) -> bool {
        matches!(&self.data, Data::Scalar(scalar) if scalar.failed)
    }

    /// The value of `key` in a mapping.
    pub fn child(&self, key: &str) -> Option<&Node> {
        let Data::Map(pairs) = &self.data else { return None };
        pairs.iter().find(|(name, _)| name.key() == Some(key)).map(|(_, value)| value)
    }

    /// The text of a node that serves as a key.
    pub fn key(&self) -> Option<&str> {
        match &self.data {
            Data::Scalar(scalar) => Some(&scalar.text),
            _ => None,
        }
    }

    /// What the node is, for messages: `a list`, `"text"`.
    pub fn describe(&self) -> String {
        match &self.data {
            Data::Scalar(scalar) if scalar.is_null() => "nothing (null)".to_owned(),
            Data::Scalar(scalar) if scalar.secret => "a secret value".to_owned(),
            Data::Scalar(scalar) => quote(&scalar.text),
            Data::List(_) => "a list".to_owned(),
            Data::Map(_) => "a mapping".to_owned(),
        }
    }

    fn weight(&self) -> usize {
        1 + match &self.data {
            Data::Scalar(_) => 0,
            Data::List(items) => items.iter().map(Node::weight).sum(),
            Data::Map(pairs) => pairs.iter().map(|(key, value)| key.weight() + value.weight()).sum(),
        }
    }

    fn depth(&self) -> usize {
        1 + match &self.data {
            Data::Scalar(_) => 0,
            Data::List(items) => items.iter().map(Node::depth).max().unwrap_or(0),
            Data::Map(pairs) => pairs.iter().map(|(key, value)| key.depth().max(value.depth())).max().unwrap_or(0),
        }
    }
}

impl Scalar {
    fn new(text: String, plain: bool) -> Scalar {
        Scalar { text, plain, substituted: false, secret: false, failed: false }
    }

    /// An empty environment variable is an empty text, not nothing.
    pub fn is_null(&self) -> bool {
        self.plain && !self.substituted && matches!(self.text.as_str(), "" | "~" | "null" | "Null" | "NULL")
    }
}

/// `text` in quotes, shortened and without control characters, for messages.
pub fn quote(text: &str) -> String {
    const SHOWN_MAX: usize = 80;
    if text.chars().count() <= SHOWN_MAX {
        format!("{text:?}")
    } else {
        let start: String = text.chars().take(SHOWN_MAX).collect();
        format!("{:?}", format!("{start}…"))
    }
}

struct Builder {
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
    root: Option<Node>,
}

/// A list or mapping whose end was not yet seen.
struct Open {
    spot: Spot,
    anchor: usize,
    is_map: bool,
    items: Vec<Node>,
}

impl Builder {
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), SyntaxError> {
        let spot = Spot::of(span);
        match event {
            Event::DocumentStart(_) if self.root.is_some() => {
                fail(spot, "a second YAML document begins here; a configuration is one document: remove the `---`")
            }
            Event::Scalar(text, style, anchor, tag) => {
                let is_text = refuse_tag(tag.as_deref(), spot)?;
                let plain = style == ScalarStyle::Plain && !is_text;
                let scalar = Scalar::new(text.into_owned(), plain);
                self.add(Node { spot, data: Data::Scalar(scalar) }, anchor)
            }
            Event::SequenceStart(anchor, tag) => {
                refuse_tag(tag.as_deref(), spot)?;
                self.begin(Open { spot, anchor, is_map: false, items: Vec::new() })
            }
            Event::MappingStart(anchor, tag) => {
                refuse_tag(tag.as_deref(), spot)?;
                self.begin(Open { spot, anchor, is_map: true, items: Vec::new() })
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(open) => self.end(open),
                None => fail(spot, "not valid YAML: an end without a beginning"),
            },
            Event::Alias(id) => match self.anchors.get(&id).cloned() {
                Some(node) => {
                    self.nodes += node.weight();
                    if self.open.len() + node.depth() > DEPTH_MAX {
                        return too_deep(spot);
                    }
                    self.add(node, 0)
                }
                None => fail(spot, "this alias refers to a value that contains it; write the value out"),
            },
            _ => Ok(()),
        }
    }

    fn begin(&mut self, open: Open) -> Result<(), SyntaxError> {
        if self.open.len() >= DEPTH_MAX {
            return too_deep(open.spot);
        }
        self.open.push(open);
        Ok(())
    }

    fn end(&mut self, open: Open) -> Result<(), SyntaxError> {
        let data = if open.is_map {
            let mut pairs = Vec::with_capacity(open.items.len() / 2);
            let mut items = open.items.into_iter();
            while let (Some(key), Some(value)) = (items.next(), items.next()) {
                pairs.push((key, value));
            }
            Data::Map(pairs)
        } else {
            Data::List(open.items)
        };
        self.add(Node { spot: open.spot, data }, open.anchor)
    }

    fn add(&mut self, node: Node, anchor: usize) -> Result<(), SyntaxError> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return fail(
                node.spot,
                &format!("the file has more than {NODES_MAX} values; split it or use fewer aliases"),
            );
        }
        if anchor != 0 {
            self.nodes += node.weight();
            self.anchors.insert(anchor, node.clone());
        }
        match self.open.last_mut() {
            Some(open) => open.items.push(node),
            None => self.root = Some(node),
        }
        Ok(())
    }
}

/// Whether the tag makes a scalar a text whatever it looks like. Tags that mean something to other programs are refused.
fn refuse_tag(tag: Option<&Tag>, spot: Spot) -> Result<bool, SyntaxError> {
    match tag {
        None => Ok(false),
        Some(tag) if tag.is_yaml_core_schema() && CORE_TAGS.contains(&tag.suffix.as_str()) => Ok(tag.suffix == "str"),
        Some(tag) => {
            Err(SyntaxError { spot, message: format!("tags are not supported: remove {}", quote(&tag.to_string())) })
        }
    }
}

fn too_deep(spot: Spot) -> Result<(), SyntaxError> {
    fail(spot, &format!("nested more than {DEPTH_MAX} levels deep; no key of the configuration is that deep"))
}

fn fail(spot: Spot, message: &str) -> Result<(), SyntaxError> {
    Err(SyntaxError { spot, message: message.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_know_where_they_are() {
        let root = parse("a: 1\nb:\n  - ä: {c: [x, \"2\"]}\n").expect("valid");
        let Data::List(items) = &root.child("b").expect("b").data else { panic!("b is a list") };
        let Data::List(inner) = &items[0].child("ä").and_then(|node| node.child("c")).expect("c").data else {
            panic!("c is a list")
        };
        assert_eq!(inner[0].spot, Spot { line: 3, column: 13 });
        assert_eq!(inner[1].spot, Spot { line: 3, column: 16 });
        assert!(matches!(&inner[1].data, Data::Scalar(scalar) if !scalar.plain));
    }

    #[test]
    fn tags_of_other_programs_are_refused() {
        for text in ["a: !secret x", "a: !!python/object x", "a: !!binary eA=="] {
            let error = parse(text).expect_err("refused");
            assert!(error.message.contains("tags are not supported"), "{}", error.message);
        }
        assert!(parse("a: !!str 5").is_ok());
    }

    #[test]
    fn nested_aliases_are_bounded() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..9 {
            let before = level - 1;
            let list = vec![format!("*a{before}"); 9].join(", ");
            text.push_str(&format!("a{level}: &a{level} [{list}]\n"));
        }
        let error = parse(&text).expect_err("too many");
        assert!(error.message.contains("more than 500000 values"), "{}", error.message);
    }

    #[test]
    fn nesting_is_bounded() {
        let error = parse(&"[".repeat(200)).expect_err("too deep");
        assert!(error.message.contains("64 levels"), "{}", error.message);
    }
}
