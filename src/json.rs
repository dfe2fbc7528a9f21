//! JSON: a streaming extractor of a few pointers from a body that goes on unchanged (RFC 8259, RFC 6901).

mod glance;
mod plain;

use std::sync::Arc;

use crate::config::JsonPointer;
pub use glance::keys_around;
pub use plain::end_of_plain;
use plain::end_of_short;

/// Nesting deeper than this is refused.
const DEPTH_MAX: usize = 64;

/// A value longer than this, unescaped, counts as absent.
const VALUE_BYTES_MAX: usize = 1024;

/// Documents nest no deeper, nearly all of them.
const DEPTH_USUAL: usize = 8;

/// Pointers made ready to be looked for, once for many documents: the tree that their tokens make.
#[derive(Debug)]
pub struct Pointers {
    /// As RFC 6901 writes them, by number.
    texts: Vec<Box<str>>,
    /// The first is the whole document.
    nodes: Vec<Node>,
    /// Longer keys are none of the wanted ones.
    key_bytes_max: usize,
}

/// A place that a pointer ends at or goes through.
#[derive(Debug)]
struct Node {
    /// The token that leads here from the node above.
    name: String,
    /// That token as an array index: digits without a leading zero.
    index: Option<u64>,
    children: Vec<usize>,
    /// The pointers that end here: several where one was asked for more than once.
    targets: Vec<usize>,
    /// How many pointers end here or below.
    count: usize,
}

/// A value at a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// A string, unescaped.
    Text(&'a str),
    /// A number, `true` or `false`, as it is written.
    Word(&'a str),
    /// An object or array: that it is there is all that is known.
    Container,
    /// A string that is too long or not Unicode.
    Unreadable,
}

/// Reads a document in pieces and keeps the scalars at the wanted pointers.
///
/// Strings are kept unescaped; numbers, `true` and `false` as their text. Null, objects, arrays, strings over
/// 1024 bytes and strings that are not Unicode (a lone surrogate escape) are absent. Of a name that comes twice in an
/// object only the first counts.
#[derive(Debug)]
pub struct Extractor {
    pointers: Arc<Pointers>,
    /// By pointer.
    values: Vec<Option<Value>>,
    /// By node: it has been met, and what comes under its name again does not count.
    met: Vec<bool>,
    /// How many pointers are neither found nor known to be absent.
    open: usize,
    stack: Vec<Container>,
    state: State,
    /// Whose value comes next or is being read.
    target: Option<usize>,
    /// The key or value being read; its length is bounded.
    text: Vec<u8>,
    /// Whether the text being read is of use: still short enough, and wanted.
    keep: bool,
    utf8: Utf8,
    progress: Progress,
}

/// Where the extractor stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It may learn more from more bytes.
    More,
    /// Everything wanted is found, or can't come any more. What follows is not looked at.
    Done,
    /// Not JSON, not UTF-8 or nested too deeply: there are no values.
    Failed,
}

#[derive(Debug)]
enum Value {
    Text(String),
    Word(String),
    Container,
    Unreadable,
}

#[derive(Debug)]
struct Container {
    /// Of an array: the index of the element that is being read or comes next.
    array: Option<u64>,
    /// Where pointers go on.
    node: Option<usize>,
    /// How many pointers are open once it is read: none of those that go through it.
    open_after: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A value must come.
    Value,
    /// After `[`: a value or the end.
    FirstElement,
    /// After `{`: a key or the end.
    FirstKey,
    /// After a comma in an object.
    Key,
    Colon,
    /// After a value in a container.
    AfterValue,
    String {
        is_key: bool,
    },
    Escape {
        is_key: bool,
    },
    /// In `\uXXXX`: so many digits came. `high` is the high surrogate that came just before, or 0.
    Unicode {
        is_key: bool,
        digits: u8,
        value: u16,
        high: u16,
    },
    /// After a high surrogate: `\` must follow, or it was a lone one.
    LowSurrogate {
        is_key: bool,
        high: u16,
    },
    /// And then `u`.
    LowSurrogateEscape {
        is_key: bool,
        high: u16,
    },
    Number(Number),
    /// In `true`, `false` or `null`: so many bytes came.
    Literal {
        word: &'static str,
        count: usize,
    },
    /// The document is over.
    End,
}

/// Where in a number (RFC 8259 section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

/// It is not JSON.
struct Invalid;

impl Pointers {
    /// Of pointers as RFC 6901 section 3 writes them: `/thread_id`, `/result/task/id`.
    pub fn new<'a>(texts: impl IntoIterator<Item = &'a str>) -> Pointers {
        let unescape = |token: &str| token.replace("~1", "/").replace("~0", "~");
        Pointers::of_tokens(texts.into_iter().map(|text| text.split('/').skip(1).map(unescape).collect()))
    }

    /// Of pointers of the configuration.
    pub fn of<'a>(pointers: impl IntoIterator<Item = &'a JsonPointer>) -> Pointers {
        Pointers::of_tokens(pointers.into_iter().map(|pointer| pointer.0.clone()))
    }

    fn of_tokens(pointers: impl Iterator<Item = Vec<String>>) -> Pointers {
        let mut all = Pointers { texts: Vec::new(), nodes: vec![Node::new(String::new())], key_bytes_max: 0 };
        for (number, tokens) in pointers.enumerate() {
            all.texts
                .push(tokens.iter().map(|name| format!("/{}", name.replace('~', "~0").replace('/', "~1"))).collect());
            let mut node = 0;
            all.nodes[node].count += 1;
            for name in tokens {
                all.key_bytes_max = all.key_bytes_max.max(name.len());
                let known = all.nodes[node].children.iter().copied().find(|&child| all.nodes[child].name == name);
                let child = known.unwrap_or_else(|| {
                    all.nodes.push(Node::new(name));
                    let child = all.nodes.len() - 1;
                    all.nodes[node].children.push(child);
                    child
                });
                all.nodes[child].count += 1;
                node = child;
            }
            all.nodes[node].targets.push(number);
        }
        all
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }
}

impl Node {
    fn new(name: String) -> Node {
        Node { index: array_index(&name), name, children: Vec::new(), targets: Vec::new(), count: 0 }
    }
}

impl Extractor {
    /// For values at `pointers`; [`Extractor::value`] numbers them in this order.
    pub fn new(pointers: &[JsonPointer]) -> Extractor {
        Extractor::of(Arc::new(Pointers::of(pointers)))
    }

    /// As [`Extractor::new`], for pointers that are ready.
    pub fn of(pointers: Arc<Pointers>) -> Extractor {
        Extractor {
            open: pointers.len(),
            target: Some(0),
            progress: if pointers.is_empty() { Progress::Done } else { Progress::More },
            values: (0..pointers.len()).map(|_| None).collect(),
            met: vec![false; pointers.nodes.len()],
            pointers,
            stack: Vec::with_capacity(DEPTH_USUAL),
            state: State::Value,
            text: Vec::new(),
            keep: false,
            utf8: Utf8::default(),
        }
    }

    /// Reads a whole document, or the first part of one.
    pub fn read(pointers: &Arc<Pointers>, document: &[u8]) -> Extractor {
        let mut extractor = Extractor::of(Arc::clone(pointers));
        extractor.feed(document);
        extractor
    }

    /// Reads on. After [`Progress::Done`] or [`Progress::Failed`] nothing is looked at any more.
    pub fn feed(&mut self, bytes: &[u8]) -> Progress {
        let mut rest = bytes;
        while self.progress == Progress::More && !rest.is_empty() {
            match self.step(rest) {
                Ok(length) => rest = &rest[length..],
                Err(Invalid) => self.progress = Progress::Failed,
            }
            if self.open == 0 && self.progress == Progress::More {
                self.progress = Progress::Done;
            }
        }
        self.progress
    }

    /// The document has ended: a number that is all of it is complete now, anything else that is open has failed.
    pub fn finish(&mut self) -> Progress {
        if self.progress == Progress::More {
            let is_whole_number =
                matches!(self.state, State::Number(number) if number.may_end()) && self.stack.is_empty();
            if is_whole_number {
                self.end_scalar(Value::Word);
            }
            self.progress = if self.state == State::End { Progress::Done } else { Progress::Failed };
        }
        self.progress
    }

    /// The value at the pointer of this number, once it is read.
    pub fn value(&self, index: usize) -> Option<&str> {
        match self.found(index)? {
            Found::Text(text) | Found::Word(text) => Some(text),
            Found::Container | Found::Unreadable => None,
        }
    }

    /// What is at the pointer of this number, once it has begun (a container) or is read.
    pub fn found(&self, index: usize) -> Option<Found<'_>> {
        if self.progress == Progress::Failed {
            return None;
        }
        Some(match self.values.get(index)?.as_ref()? {
            Value::Text(text) => Found::Text(text),
            Value::Word(text) => Found::Word(text),
            Value::Container => Found::Container,
            Value::Unreadable => Found::Unreadable,
        })
    }

    /// What is at the pointer written so, which must be one of the wanted.
    pub fn at(&self, pointer: &str) -> Option<Found<'_>> {
        let index = self.pointers.texts.iter().position(|text| **text == *pointer);
        debug_assert!(index.is_some(), "{pointer} is not looked for");
        self.found(index?)
    }

    /// The string at a pointer.
    pub fn text(&self, pointer: &str) -> Option<&str> {
        match self.at(pointer)? {
            Found::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The number, `true` or `false` at a pointer, as it is written.
    pub fn word(&self, pointer: &str) -> Option<&str> {
        match self.at(pointer)? {
            Found::Word(text) => Some(text),
            _ => None,
        }
    }

    /// Whether there is anything but null at a pointer. (A string that is too long is there, too.)
    pub fn has(&self, pointer: &str) -> bool {
        self.at(pointer).is_some()
    }

    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Reads some of `input`, which is not empty, and returns how much.
    fn step(&mut self, input: &[u8]) -> Result<usize, Invalid> {
        let byte = input[0];
        match self.state {
            State::String { is_key } => return self.string(input, is_key),
            State::Number(number) => {
                match number.next(byte) {
                    Some(next) => {
                        self.add(&[byte]);
                        self.state = State::Number(next);
                        return Ok(1);
                    }
                    None if number.may_end() => self.end_scalar(Value::Word),
                    None => return Err(Invalid),
                }
                // The byte after a number is read again, as what it is.
                return Ok(0);
            }
            State::Literal { word, count } => {
                let rest = &word.as_bytes()[count..];
                if !input.starts_with(rest) {
                    self.state = State::Literal { word, count: count + input.len() };
                    return if rest.starts_with(input) { Ok(input.len()) } else { Err(Invalid) };
                }
                if word == "null" {
                    self.end_null();
                } else {
                    self.add(word.as_bytes());
                    self.end_scalar(Value::Word);
                }
                return Ok(rest.len());
            }
            State::Escape { is_key } => {
                self.escape(byte, is_key)?;
                return Ok(1);
            }
            State::Unicode { is_key, digits, value, high } => {
                self.unicode(byte, is_key, digits, value, high)?;
                return Ok(1);
            }
            State::LowSurrogate { is_key, high } => {
                if byte == b'\\' {
                    self.state = State::LowSurrogateEscape { is_key, high };
                    return Ok(1);
                }
                self.keep = false;
                self.state = State::String { is_key };
                return Ok(0);
            }
            State::LowSurrogateEscape { is_key, high } => {
                if byte == b'u' {
                    self.state = State::Unicode { is_key, digits: 0, value: 0, high };
                    return Ok(1);
                }
                self.keep = false;
                self.state = State::Escape { is_key };
                return Ok(0);
            }
            _ => {}
        }
        let spaces = input.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count();
        if spaces > 0 {
            return Ok(spaces);
        }
        match (self.state, byte) {
            (State::FirstElement, b']') => self.close(),
            (State::FirstKey, b'}') => self.close(),
            (State::Value | State::FirstElement, _) => self.begin_value(byte)?,
            (State::FirstKey | State::Key, b'"') => {
                self.text.clear();
                self.keep = self.place().is_some_and(|node| !node.children.is_empty());
                self.state = State::String { is_key: true };
            }
            (State::Colon, b':') => self.state = State::Value,
            (State::AfterValue, b',') => match self.stack.last_mut() {
                Some(Container { array: Some(index), .. }) => {
                    *index += 1;
                    self.state = State::Value;
                    self.aim_at_element();
                }
                _ => self.state = State::Key,
            },
            (State::AfterValue, b']') if self.stack.last().is_some_and(|inner| inner.array.is_some()) => self.close(),
            (State::AfterValue, b'}') if self.stack.last().is_some_and(|inner| inner.array.is_none()) => self.close(),
            _ => return Err(Invalid),
        }
        Ok(1)
    }

    fn begin_value(&mut self, byte: u8) -> Result<(), Invalid> {
        self.text.clear();
        self.keep = self.target.is_some_and(|node| !self.pointers.nodes[node].targets.is_empty());
        match byte {
            b'{' => return self.open(None),
            b'[' => return self.open(Some(0)),
            b'"' => self.state = State::String { is_key: false },
            b't' => self.state = State::Literal { word: "true", count: 1 },
            b'f' => self.state = State::Literal { word: "false", count: 1 },
            b'n' => self.state = State::Literal { word: "null", count: 1 },
            b'-' | b'0'..=b'9' => {
                self.add(&[byte]);
                self.state = State::Number(match byte {
                    b'-' => Number::Minus,
                    b'0' => Number::Zero,
                    _ => Number::Integer,
                });
            }
            _ => return Err(Invalid),
        }
        Ok(())
    }

    fn open(&mut self, array: Option<u64>) -> Result<(), Invalid> {
        if self.stack.len() == DEPTH_MAX {
            return Err(Invalid);
        }
        let node = self.target.take();
        let below = node.map_or(0, |node| self.pointers.nodes[node].count);
        let open_after = self.open - below;
        if let Some(node) = node {
            self.met[node] = true;
            for &pointer in &self.pointers.nodes[node].targets {
                self.values[pointer] = Some(Value::Container);
                self.open -= 1;
            }
        }
        self.stack.push(Container { array, node, open_after });
        self.state = if array.is_some() { State::FirstElement } else { State::FirstKey };
        if array.is_some() {
            self.aim_at_element();
        }
        Ok(())
    }

    fn close(&mut self) {
        // What was looked for here did not come. A second container of the same name does not count.
        if let Some(container) = self.stack.pop() {
            self.open = container.open_after;
        }
        self.target = None;
        self.after_value();
    }

    /// Ends a number or literal, whose text was gathered.
    fn end_scalar(&mut self, kind: fn(String) -> Value) {
        let text = std::mem::take(&mut self.text);
        self.end_text(&text, kind);
        self.text = text;
    }

    fn end_string(&mut self, text: &[u8], is_key: bool) {
        if is_key { self.end_key(text) } else { self.end_text(text, Value::Text) }
    }

    fn end_text(&mut self, text: &[u8], kind: fn(String) -> Value) {
        if let Some(node) = self.target.take() {
            self.settle(node);
            for &pointer in &self.pointers.nodes[node].targets {
                let is_kept = self.keep && text.len() <= VALUE_BYTES_MAX;
                let text = is_kept.then(|| std::str::from_utf8(text).ok()).flatten();
                self.values[pointer] = Some(text.map_or(Value::Unreadable, |text| kind(text.to_owned())));
            }
        }
        self.after_value();
    }

    /// Null is as good as nothing.
    fn end_null(&mut self) {
        if let Some(node) = self.target.take() {
            self.settle(node);
        }
        self.after_value();
    }

    /// A value that is no container was read: nothing can come below it. (Where it is the whole document, what follows
    /// must still be shown to be nothing.)
    fn settle(&mut self, node: usize) {
        self.met[node] = true;
        let Node { targets, count, .. } = &self.pointers.nodes[node];
        self.open -= if self.stack.is_empty() { targets.len() } else { *count };
    }

    fn after_value(&mut self) {
        self.state = if self.stack.is_empty() { State::End } else { State::AfterValue };
    }

    fn end_key(&mut self, key: &[u8]) {
        self.target = if self.keep { self.child(|child| child.name.as_bytes() == key) } else { None };
        self.state = State::Colon;
    }

    /// Sets the target for the element that comes in the innermost array.
    fn aim_at_element(&mut self) {
        let position = self.stack.last().and_then(|inner| inner.array);
        self.target = self.child(|child| child.index == position);
    }

    /// The innermost container, where pointers go on in it.
    fn place(&self) -> Option<&Node> {
        self.stack.last()?.node.map(|node| &self.pointers.nodes[node])
    }

    /// The node of the innermost container that is so and was not met yet.
    fn child(&self, is_it: impl Fn(&Node) -> bool) -> Option<usize> {
        let nodes = &self.pointers.nodes;
        let found = self.place()?.children.iter().copied().find(|&child| is_it(&nodes[child]))?;
        (!self.met[found]).then_some(found)
    }

    /// Adds to the text being read, as long as it is of use.
    fn add(&mut self, bytes: &[u8]) {
        if !self.keep {
            return;
        }
        let bound = if matches!(
            self.state,
            State::String { is_key: true } | State::Escape { is_key: true } | State::Unicode { is_key: true, .. }
        ) {
            self.pointers.key_bytes_max
        } else {
            VALUE_BYTES_MAX
        };
        if self.text.len() + bytes.len() > bound {
            self.keep = false;
        } else {
            self.text.extend_from_slice(bytes);
        }
    }

    fn string(&mut self, input: &[u8], is_key: bool) -> Result<usize, Invalid> {
        let end = match end_of_short(input) {
            Some(end) => end,
            None => {
                let end = memchr::memchr2(b'"', b'\\', input);
                let content = &input[..end.unwrap_or(input.len())];
                let (has_control, bits) =
                    content.iter().fold((false, 0), |(bad, bits), &byte| (bad | (byte < 0x20), bits | byte));
                if has_control {
                    return Err(Invalid);
                }
                if !bits.is_ascii() || !self.utf8.is_whole() {
                    self.utf8.check(content)?;
                }
                let Some(end) = end else {
                    self.add(content);
                    return Ok(input.len());
                };
                end
            }
        };
        if !self.utf8.is_whole() {
            return Err(Invalid);
        }
        let content = &input[..end];
        if input[end] == b'\\' {
            self.add(content);
            self.state = State::Escape { is_key };
            return Ok(end + 1);
        }
        if self.text.is_empty() {
            // It came at once, and need not be gathered.
            self.end_string(content, is_key);
        } else {
            self.add(content);
            let text = std::mem::take(&mut self.text);
            self.end_string(&text, is_key);
            self.text = text;
        }
        // Nearly always it follows at once.
        if is_key && input.get(end + 1) == Some(&b':') {
            self.state = State::Value;
            return Ok(end + 2);
        }
        Ok(end + 1)
    }

    fn escape(&mut self, byte: u8, is_key: bool) -> Result<(), Invalid> {
        let plain = match byte {
            b'"' | b'\\' | b'/' => byte,
            b'b' => 8,
            b'f' => 12,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => {
                self.state = State::Unicode { is_key, digits: 0, value: 0, high: 0 };
                return Ok(());
            }
            _ => return Err(Invalid),
        };
        self.add(&[plain]);
        self.state = State::String { is_key };
        Ok(())
    }

    fn unicode(&mut self, byte: u8, is_key: bool, digits: u8, value: u16, high: u16) -> Result<(), Invalid> {
        let digit = char::from(byte).to_digit(16).ok_or(Invalid)?;
        let value = value << 4 | digit as u16;
        if digits < 3 {
            self.state = State::Unicode { is_key, digits: digits + 1, value, high };
            return Ok(());
        }
        match value {
            0xd800..0xdc00 => {
                // Two high ones: the first is a lone one.
                self.keep &= high == 0;
                self.state = State::LowSurrogate { is_key, high: value };
                return Ok(());
            }
            0xdc00..0xe000 if high != 0 => {
                let code = 0x10000 + (u32::from(high - 0xd800) << 10) + u32::from(value - 0xdc00);
                self.add_char(char::from_u32(code));
            }
            _ => {
                self.keep &= high == 0;
                self.add_char(char::from_u32(u32::from(value)));
            }
        }
        self.state = State::String { is_key };
        Ok(())
    }

    /// `None`: a lone surrogate, which makes the text none.
    fn add_char(&mut self, character: Option<char>) {
        match character {
            Some(character) => self.add(character.encode_utf8(&mut [0; 4]).as_bytes()),
            None => self.keep = false,
        }
    }
}

impl Number {
    /// The state after `byte`; `None` where it does not belong to the number.
    fn next(self, byte: u8) -> Option<Number> {
        match (self, byte) {
            (Number::Minus, b'0') => Some(Number::Zero),
            (Number::Minus, b'1'..=b'9') | (Number::Integer, b'0'..=b'9') => Some(Number::Integer),
            (Number::Zero | Number::Integer, b'.') => Some(Number::Point),
            (Number::Point | Number::Fraction, b'0'..=b'9') => Some(Number::Fraction),
            (Number::Zero | Number::Integer | Number::Fraction, b'e' | b'E') => Some(Number::Exponent),
            (Number::Exponent, b'+' | b'-') => Some(Number::ExponentSign),
            (Number::Exponent | Number::ExponentSign | Number::ExponentDigits, b'0'..=b'9') => {
                Some(Number::ExponentDigits)
            }
            _ => None,
        }
    }

    fn may_end(self) -> bool {
        matches!(self, Number::Zero | Number::Integer | Number::Fraction | Number::ExponentDigits)
    }
}

/// Checks UTF-8 that may be cut inside a character.
#[derive(Debug, Default)]
struct Utf8 {
    /// The start of a character that is not complete.
    partial: [u8; 4],
    length: usize,
}

impl Utf8 {
    fn check(&mut self, bytes: &[u8]) -> Result<(), Invalid> {
        let mut rest = bytes;
        while self.length > 0 {
            let Some((&byte, after)) = rest.split_first() else { return Ok(()) };
            rest = after;
            self.partial[self.length] = byte;
            self.length += 1;
            match std::str::from_utf8(&self.partial[..self.length]) {
                Ok(_) => self.length = 0,
                // At most three bytes can still be the start of a character, so `partial` does not overflow.
                Err(error) if error.error_len().is_none() => {}
                Err(_) => return Err(Invalid),
            }
        }
        if let Err(error) = std::str::from_utf8(rest) {
            if error.error_len().is_some() {
                return Err(Invalid);
            }
            let tail = &rest[error.valid_up_to()..];
            self.partial[..tail.len()].copy_from_slice(tail);
            self.length = tail.len();
        }
        Ok(())
    }

    /// No character is open.
    fn is_whole(&self) -> bool {
        self.length == 0
    }
}

/// RFC 6901 section 4: digits without a leading zero.
fn array_index(token: &str) -> Option<u64> {
    let is_canonical = token == "0" || (!token.starts_with('0') && token.bytes().all(|byte| byte.is_ascii_digit()));
    if is_canonical { token.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use serde_json::Value;

    use super::{Extractor, Found, Pointers, Progress};
    use crate::config::JsonPointer;

    fn pointer(text: &str) -> JsonPointer {
        JsonPointer(text.split('/').skip(1).map(|token| token.replace("~1", "/").replace("~0", "~")).collect())
    }

    fn extract(document: &[u8], pointers: &[&str], cuts: &[usize]) -> (Progress, Vec<Option<String>>) {
        let pointers: Vec<JsonPointer> = pointers.iter().map(|text| pointer(text)).collect();
        let mut extractor = Extractor::new(&pointers);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (document.len() + 1)).collect();
        cuts.push(document.len());
        cuts.sort_unstable();
        let mut start = 0;
        for cut in cuts {
            extractor.feed(&document[start..cut]);
            start = cut;
        }
        let progress = extractor.finish();
        (progress, (0..pointers.len()).map(|index| extractor.value(index).map(str::to_owned)).collect())
    }

    #[test]
    fn tells_what_kind_of_value_is_there() {
        let pointers = Arc::new(Pointers::new(["/a", "/b", "/c", "/d", "/e", "/f", "/g~1h/0"]));
        let document = format!(r#"{{"a":"1","b":1,"c":{{}},"d":null,"e":"{}","g/h":[true]}}"#, "x".repeat(2000));
        let extractor = Extractor::read(&pointers, document.as_bytes());
        assert_eq!(extractor.at("/a"), Some(Found::Text("1")));
        assert_eq!(extractor.at("/b"), Some(Found::Word("1")));
        assert_eq!(extractor.at("/c"), Some(Found::Container));
        assert_eq!(extractor.at("/d"), None);
        assert_eq!(extractor.at("/e"), Some(Found::Unreadable));
        assert_eq!(extractor.at("/f"), None);
        assert_eq!((extractor.word("/g~1h/0"), extractor.text("/g~1h/0")), (Some("true"), None));
        assert!(extractor.has("/e") && !extractor.has("/d"));
    }

    fn one(document: &str, text: &str) -> Option<String> {
        let (progress, values) = extract(document.as_bytes(), &[text], &[]);
        assert_eq!(progress, Progress::Done, "{document}");
        let every_byte: Vec<usize> = (0..document.len()).collect();
        assert_eq!(extract(document.as_bytes(), &[text], &every_byte), (progress, values.clone()), "{document}");
        values.into_iter().next().flatten()
    }

    #[test]
    fn finds_scalars() {
        for (document, text, value) in [
            (r#"{"a":"x"}"#, "/a", Some("x")),
            (r#" { "b" : [ 1 , { } ] , "a" : "x" } "#, "/a", Some("x")),
            (r#"{"a":{"b":{"c":"x"}}}"#, "/a/b/c", Some("x")),
            (r#"{"a":[10,[20,{"b":-3.5e+7}]]}"#, "/a/1/1/b", Some("-3.5e+7")),
            (r#"[0,1]"#, "/1", Some("1")),
            (r#"[0,1]"#, "/01", None),
            (r#"[0,1]"#, "/-", None),
            (r#"[0,1]"#, "/2", None),
            (r#"{"0":"x"}"#, "/0", Some("x")),
            (r#"{"a":true,"b":false,"c":null}"#, "/a", Some("true")),
            (r#"{"a":true,"b":false,"c":null}"#, "/b", Some("false")),
            (r#"{"a":true,"b":false,"c":null}"#, "/c", None),
            (r#"{"a":{}}"#, "/a", None),
            (r#"{"a":[]}"#, "/a", None),
            (r#"{"a":"x"}"#, "/a/b", None),
            (r#"{"a":""}"#, "/a", Some("")),
            (r#"{"":"x"}"#, "/", Some("x")),
            (r#"{"a/b":{"~c":"x"}}"#, "/a~1b/~0c", Some("x")),
            (r#"{"\u0061":"x"}"#, "/a", Some("x")),
            (r#"{"a":"\"\\\/\b\f\n\r\t\u00e4\ud83d\ude00ü"}"#, "/a", Some("\"\\/\u{8}\u{c}\n\r\tä😀ü")),
            (r#"{"x":{"a":1},"a":2}"#, "/a", Some("2")),
            (r#"{"x":{"b":1},"a":{"b":2}}"#, "/a/b", Some("2")),
            (r#"{"aa":1,"a":2}"#, "/a", Some("2")),
            (r#""x""#, "", Some("x")),
            ("12", "", Some("12")),
            ("-0.5 ", "", Some("-0.5")),
            ("{}", "", None),
            ("[]", "/0", None),
        ] {
            assert_eq!(one(document, text).as_deref(), value, "{document} at {text}");
        }
    }

    #[test]
    fn the_first_of_a_doubled_name_counts() {
        assert_eq!(one(r#"{"a":"x","a":"y"}"#, "/a").as_deref(), Some("x"));
        assert_eq!(one(r#"{"a":null,"a":"y"}"#, "/a"), None);
        assert_eq!(one(r#"{"a":{},"a":{"b":"y"}}"#, "/a/b"), None);
        assert_eq!(one(r#"{"a":1,"a":{"b":"y"}}"#, "/a/b"), None);
    }

    #[test]
    fn stops_once_all_is_found() {
        let mut extractor = Extractor::new(&[pointer("/b"), pointer("/a/b"), pointer("/a/b")]);
        assert_eq!(extractor.feed(br#"{"a":{"b":"x"},"#), Progress::More);
        assert_eq!((extractor.value(0), extractor.value(1), extractor.value(2)), (None, Some("x"), Some("x")));
        assert_eq!(extractor.feed(br#""b":1"#), Progress::More, "the number may go on");
        assert_eq!(extractor.feed(b"2}garbage"), Progress::Done);
        assert_eq!((extractor.value(0), extractor.value(3)), (Some("12"), None));
        assert_eq!(Extractor::new(&[]).feed(b"x"), Progress::Done);
    }

    #[test]
    fn what_is_not_json_fails() {
        for document in [
            &b""[..],
            b"{",
            b"[",
            b"}",
            b"{]",
            b"[}",
            b"{\"a\"}",
            b"{\"a\":}",
            b"{\"a\":1,}",
            b"[1,]",
            b"[,1]",
            b"{a:1}",
            b"{'a':1}",
            b"[1 2]",
            b"nul",
            b"nulL",
            b"truefalse ",
            b"01",
            b"-",
            b"1.",
            b".5",
            b"1e",
            b"+1",
            b"--1",
            b"1.e5",
            b"0x1",
            b"\"",
            b"\"\\x\"",
            b"\"\\u12g4\"",
            b"\"\n\"",
            b"\"\0\"",
            b"\"\xff\"",
            b"\"\xc3\"",
            b"\"\xc3\\n\"",
            b"\"\xed\xa0\x80\"",
            b"\"\xc0\x80\"",
            b"\"\xf4\x90\x80\x80\"",
            b"\xef\xbb\xbf{}",
            b"{\"a\":1 \"b\":2}",
            b"{\"\xff\":1}",
            b"NaN",
            b"[1}",
        ] {
            let every_byte: Vec<usize> = (0..document.len()).collect();
            for cuts in [vec![], every_byte] {
                let result = extract(document, &["/zz", ""], &cuts);
                // The whole document is absent as soon as it turns out to be a container.
                assert_eq!(result, (Progress::Failed, vec![None, None]), "{}", String::from_utf8_lossy(document));
            }
        }
        let (progress, values) = extract(br#"{"a":"x",}"#, &["/a", "/b"], &[]);
        assert_eq!((progress, values), (Progress::Failed, vec![None, None]), "nothing is known of a broken document");
    }

    #[test]
    fn lone_surrogates_make_a_value_absent_and_nothing_else() {
        for text in [r"\ud800", r"\udc00", r"\ud800x", r"\ud800\n", r"\ud800\ud800\udc00", r"\ud800\u0041"] {
            assert_eq!(one(&format!(r#"{{"a":"{text}","b":1}}"#), "/a"), None, "{text}");
            assert_eq!(one(&format!(r#"{{"a":"{text}","b":1}}"#), "/b").as_deref(), Some("1"), "{text}");
        }
    }

    #[test]
    fn bounds() {
        let nested = |depth: usize| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(one(&nested(64), &"/0".repeat(64)).as_deref(), Some("1"));
        assert_eq!(extract(nested(65).as_bytes(), &["/1"], &[]).0, Progress::Failed);
        let long = |length: usize| format!(r#"{{"a":"{}","b":1}}"#, "x".repeat(length));
        assert_eq!(one(&long(1024), "/a"), Some("x".repeat(1024)));
        assert_eq!(one(&long(1025), "/a"), None);
        assert_eq!(one(&long(1025), "/b").as_deref(), Some("1"));
        assert_eq!(one(&format!(r#"{{"{}":2,"a":1}}"#, "a".repeat(100_000)), "/a").as_deref(), Some("1"));
    }

    fn document() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[ab\"\\\\\n\u{e4}\u{1f600}]{0,4}".prop_map(Value::from),
            "[a-z]{0,20}[\"\u{e4}]{0,1}[a-z]{0,20}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[abä0]{0,2}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn agrees_with_serde_under_any_split(
            document in document(),
            pointers in proptest::collection::vec("(/[abä01]{0,1}){0,3}", 1..4),
            pretty in any::<bool>(),
            cuts in proptest::collection::vec(any::<usize>(), 0..10),
        ) {
            let text = if pretty { serde_json::to_string_pretty(&document) } else { serde_json::to_string(&document) };
            let text = text.expect("a value can be written");
            let pointers: Vec<&str> = pointers.iter().map(String::as_str).collect();
            let expected: Vec<Option<String>> = pointers
                .iter()
                .map(|pointer| match document.pointer(pointer) {
                    Some(Value::String(text)) => Some(text.clone()),
                    Some(value @ (Value::Bool(_) | Value::Number(_))) => Some(value.to_string()),
                    _ => None,
                })
                .collect();
            prop_assert_eq!(extract(text.as_bytes(), &pointers, &cuts), (Progress::Done, expected));
        }

        #[test]
        fn any_bytes_are_taken_the_same_way_under_any_split(
            bytes in proptest::collection::vec(prop_oneof![
                Just(b'{'), Just(b'}'), Just(b'['), Just(b']'), Just(b'"'), Just(b':'), Just(b','), Just(b'a'), Just(b'0'), Just(b'\\'),
                Just(b'u'), Just(0xc3), Just(0xa4), any::<u8>(),
            ], 0..40),
            cuts in proptest::collection::vec(any::<usize>(), 0..10),
        ) {
            let pointers = ["/a", "/0", "", "/a/a"];
            let whole = extract(&bytes, &pointers, &[]);
            prop_assert_eq!(&extract(&bytes, &pointers, &cuts), &whole);
        }
    }
}
