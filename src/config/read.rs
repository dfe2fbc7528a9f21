//! Read: the frame in which the shape of the file is declared once.
//!
//! A block of the file is a function that asks a [`Block`] for each of its keys, with a description, a kind and a default.
//! The same function reads a file, fills in defaults, tells unknown keys and describes itself as a JSON Schema; so these can't drift apart.
//! All keys must be asked for before a block gives up because of one of them.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde_json::{Map, Value, json};

use super::Problem;
use super::not_yet;
use super::yaml::{self, Data, Node, Scalar, Spot};

/// What stands in the effective configuration for a secret.
pub const REDACTED: &str = "***";

/// What reading collects beside the values.
pub struct Context<'c> {
    pub problems: Vec<Problem>,
    pub warnings: Vec<Problem>,
    /// Every file that the configuration names.
    pub files: Vec<PathBuf>,
    /// Relative paths are relative to this directory.
    pub base: &'c Path,
}

impl<'c> Context<'c> {
    pub fn new(base: &'c Path) -> Context<'c> {
        Context { problems: Vec::new(), warnings: Vec::new(), files: Vec::new(), base }
    }

    pub fn problem(&mut self, spot: Spot, path: &str, message: impl Into<String>) {
        self.problems.push(problem(spot, path, message));
    }

    pub fn warning(&mut self, spot: Spot, path: &str, message: impl Into<String>) {
        self.warnings.push(problem(spot, path, message));
    }

    /// The file that `text` names, and a note that the configuration depends on it.
    pub fn file(&mut self, text: &str) -> PathBuf {
        let path = self.base.join(text);
        if !self.files.contains(&path) {
            self.files.push(path.clone());
        }
        path
    }
}

pub fn problem(spot: Spot, path: &str, message: impl Into<String>) -> Problem {
    let path = if path.is_empty() { "(file)" } else { path };
    // One line each, whatever text of the file a message repeats.
    let message = message.into().replace(char::is_control, " ");
    Problem { line: spot.line, column: spot.column, path: path.to_owned(), message }
}

/// A value as read, and as the effective configuration shows it.
pub struct Read<T> {
    pub value: T,
    pub shown: Value,
}

type Reading<'k, T> = dyn Fn(&mut Context, &Node, &str) -> Option<Read<T>> + 'k;

/// How one kind of value is written, read and described.
pub struct Kind<'k, T> {
    /// For messages: `a duration such as 30s`.
    expects: String,
    /// Nothing at all (`key:`) means the default, as it does for blocks and lists.
    empty_is_default: bool,
    schema: Box<dyn Fn() -> Value + 'k>,
    read: Rc<Reading<'k, T>>,
}

impl<'k, T: 'k> Kind<'k, T> {
    /// A kind with a reader of its own.
    pub fn new(
        expects: impl Into<String>,
        schema: impl Fn() -> Value + 'k,
        read: impl Fn(&mut Context, &Node, &str) -> Option<Read<T>> + 'k,
    ) -> Kind<'k, T> {
        Kind { expects: expects.into(), empty_is_default: false, schema: Box::new(schema), read: Rc::new(read) }
    }

    /// A kind that is written as one text or number; `parse` says in its error what is wrong with the text and what would be right.
    pub fn scalar(
        expects: &'static str,
        schema: impl Fn() -> Value + 'k,
        parse: impl Fn(&mut Context, &Scalar) -> Result<T, String> + 'k,
        show: impl Fn(&T) -> Value + 'k,
    ) -> Kind<'k, T> {
        Kind::new(expects, schema, move |context, node, path| {
            let scalar = match &node.data {
                Data::Scalar(scalar) if !scalar.is_null() => scalar,
                _ => {
                    context.problem(node.spot, path, format!("expected {expects}, found {}", node.describe()));
                    return None;
                }
            };
            match parse(context, scalar) {
                Ok(value) => {
                    let shown = if scalar.secret { json!(REDACTED) } else { show(&value) };
                    Some(Read { value, shown })
                }
                Err(message) => {
                    let message = if scalar.secret {
                        format!("expected {expects}; the file holds something else")
                    } else {
                        message
                    };
                    context.problem(node.spot, path, message);
                    None
                }
            }
        })
    }

    pub fn read(&self, context: &mut Context, node: &Node, path: &str) -> Option<Read<T>> {
        (self.read)(context, node, path)
    }

    pub fn schema(&self) -> Value {
        (self.schema)()
    }

    pub fn expects(&self) -> &str {
        &self.expects
    }

    pub fn map<U: 'k>(self, change: impl Fn(T) -> U + 'k) -> Kind<'k, U> {
        self.then(move |_, _, _, Read { value, shown }| Some(Read { value: change(value), shown }))
    }

    /// Adds a check on the value; its error is the message.
    pub fn checked(self, check: impl Fn(&T) -> Result<(), String> + 'k) -> Kind<'k, T> {
        self.then(move |context, node, path, found| match check(&found.value) {
            Ok(()) => Some(found),
            Err(message) => {
                context.problem(node.spot, path, message);
                None
            }
        })
    }

    /// Adds a look at the value that may find problems anywhere in it.
    pub fn inspected(self, inspect: impl Fn(&mut Context, &T) + 'k) -> Kind<'k, T> {
        self.then(move |context, _, _, found| {
            inspect(context, &found.value);
            Some(found)
        })
    }

    /// The value, or nothing where the file says null.
    pub fn nullable(self) -> Kind<'k, Option<T>> {
        let schema = self.schema;
        let read = self.read;
        Kind {
            expects: format!("{}, or null", self.expects),
            empty_is_default: false,
            schema: Box::new(move || any_of(vec![json!({"type": "null"}), schema()])),
            read: Rc::new(move |context, node, path| {
                if node.is_null() {
                    return Some(Read { value: None, shown: Value::Null });
                }
                let Read { value, shown } = read(context, node, path)?;
                Some(Read { value: Some(value), shown })
            }),
        }
    }

    /// The value together with where it stands.
    pub fn located(self) -> Kind<'k, Located<T>> {
        self.then(|_, node, path, Read { value, shown }| {
            let keys = match &node.data {
                Data::Map(pairs) => {
                    pairs.iter().filter_map(|(key, value)| Some((key.key()?.to_owned(), value.spot))).collect()
                }
                _ => Vec::new(),
            };
            Some(Read { value: Located { value, spot: node.spot, path: path.to_owned(), keys }, shown })
        })
    }

    /// This kind, with `step` after each reading that found a value.
    fn then<U: 'k>(self, step: impl Fn(&mut Context, &Node, &str, Read<T>) -> Option<Read<U>> + 'k) -> Kind<'k, U> {
        let read = self.read;
        Kind {
            expects: self.expects,
            empty_is_default: self.empty_is_default,
            schema: self.schema,
            read: Rc::new(move |context, node, path| {
                let found = read(context, node, path)?;
                step(context, node, path, found)
            }),
        }
    }

    /// A list of such values.
    pub fn list(self) -> Kind<'k, Vec<T>> {
        let expects = format!("a list, each item {}", self.expects);
        let message = expects.clone();
        let schema = self.schema;
        let read = self.read;
        Kind {
            expects,
            empty_is_default: true,
            schema: Box::new(move || json!({"type": "array", "items": schema()})),
            read: Rc::new(move |context, node, path| {
                let Data::List(items) = &node.data else {
                    context.problem(node.spot, path, format!("expected {message}; found {}", node.describe()));
                    return None;
                };
                let mut values = Vec::with_capacity(items.len());
                let mut shown = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate().filter(|(_, item)| !item.has_failed()) {
                    if let Some(read) = read(context, item, &format!("{path}[{index}]")) {
                        values.push(read.value);
                        shown.push(read.shown);
                    }
                }
                Some(Read { value: values, shown: Value::Array(shown) })
            }),
        }
    }

    /// A mapping where the file has one, else this kind.
    pub fn or_block(self, block: Kind<'k, T>) -> Kind<'k, T> {
        let schema = self.schema;
        let read = self.read;
        Kind {
            expects: format!("{} or {}", self.expects, block.expects),
            empty_is_default: false,
            schema: Box::new(move || any_of(vec![schema(), (block.schema)()])),
            read: Rc::new(move |context, node, path| match &node.data {
                Data::Map(_) => (block.read)(context, node, path),
                _ => read(context, node, path),
            }),
        }
    }
}

/// A value and where it stands in the file.
#[derive(Clone, Debug)]
pub struct Located<T> {
    pub value: T,
    pub spot: Spot,
    pub path: String,
    /// Of a mapping: where the value of each key stands.
    keys: Vec<(String, Spot)>,
}

impl<T> Located<T> {
    /// Another value that stands at the same place.
    pub fn with<U>(self, change: impl FnOnce(T) -> U) -> Located<U> {
        Located { value: change(self.value), spot: self.spot, path: self.path, keys: self.keys }
    }

    /// A problem of the value of `key` of this mapping.
    pub fn problem(&self, context: &mut Context, key: &str, message: impl Into<String>) {
        context.problem(self.spot_of(key), &join(&self.path, key), message);
    }

    pub fn warning(&self, context: &mut Context, key: &str, message: impl Into<String>) {
        context.warning(self.spot_of(key), &join(&self.path, key), message);
    }

    fn spot_of(&self, key: &str) -> Spot {
        self.keys.iter().find(|(name, _)| name == key).map_or(self.spot, |(_, spot)| *spot)
    }
}

/// A mapping whose keys `read` asks for; it gives `None` where a problem leaves nothing to go on with.
pub fn block<'k, T: 'k>(what: &'static str, read: impl Fn(&mut Block) -> Option<T> + 'k) -> Kind<'k, T> {
    let read = Rc::new(read);
    let describe = Rc::clone(&read);
    let schema = move || {
        let mut context = Context::new(Path::new(""));
        let node = empty_map();
        let mut block = Block::new(&mut context, &node, "");
        block.schema = Some(Description::default());
        describe(&mut block);
        block.schema.map(Description::finish).unwrap_or_default()
    };
    let reading = move |context: &mut Context, node: &Node, path: &str| {
        if !matches!(node.data, Data::Map(_)) {
            context.problem(node.spot, path, format!("expected {what}, found {}", node.describe()));
            return None;
        }
        let mut block = Block::new(context, node, path);
        let value = read(&mut block);
        let shown = block.finish();
        Some(Read { value: value?, shown })
    };
    Kind { empty_is_default: true, ..Kind::new(what, schema, reading) }
}

/// One mapping of the file while it is read.
pub struct Block<'b, 'c> {
    context: &'b mut Context<'c>,
    node: &'b Node,
    path: &'b str,
    known: Vec<&'static str>,
    shown: Map<String, Value>,
    /// Set while the shape is described instead of a file read.
    schema: Option<Description>,
}

/// The JSON Schema of a block in the making.
#[derive(Default)]
struct Description {
    properties: Map<String, Value>,
    required: Vec<&'static str>,
}

impl Description {
    fn add(&mut self, name: &'static str, about: &str, mut schema: Value, default: Option<&Node>) {
        if let Some(fields) = schema.as_object_mut() {
            fields.insert("description".to_owned(), json!(about));
            match default {
                Some(default) => {
                    // `key:` with nothing after it means the default.
                    if let Some(form @ ("object" | "array")) = fields.get("type").and_then(Value::as_str) {
                        fields.insert("type".to_owned(), json!([form, "null"]));
                    }
                    fields.insert("default".to_owned(), literal(default));
                }
                None => self.required.push(name),
            }
        }
        self.properties.insert(name.to_owned(), schema);
    }

    fn finish(self) -> Value {
        let mut schema = json!({"type": "object", "properties": self.properties, "additionalProperties": false});
        if !self.required.is_empty() {
            schema["required"] = json!(self.required);
        }
        schema
    }
}

impl<'b, 'c> Block<'b, 'c> {
    fn new(context: &'b mut Context<'c>, node: &'b Node, path: &'b str) -> Block<'b, 'c> {
        Block { context, node, path, known: Vec::new(), shown: Map::new(), schema: None }
    }

    /// An optional key. `default` is written as it would be in the file; a value with a problem reads as the default.
    pub fn key<'k, T: 'k>(&mut self, name: &'static str, about: &str, kind: Kind<'k, T>, default: &str) -> T {
        self.known.push(name);
        let default = yaml::parse(default).unwrap_or_else(|error| panic!("the default of {name}: {}", error.message));
        let read_default = |context: &Context| {
            let mut context = Context::new(context.base);
            let read = kind.read(&mut context, &default, "");
            read.unwrap_or_else(|| panic!("the default of {name} is not valid: {:?}", context.problems))
        };
        if let Some(schema) = &mut self.schema {
            schema.add(name, about, kind.schema(), Some(&default));
            return read_default(self.context).value;
        }
        let path = self.child_path(name);
        let Some(node) = self.node.child(name).filter(|node| !(node.is_null() && kind.empty_is_default)) else {
            let Read { value, shown } = read_default(self.context);
            self.shown.insert(name.to_owned(), shown);
            return value;
        };
        let read = if node.has_failed() { None } else { kind.read(self.context, node, &path) };
        if let Some(read) = &read
            && let Some(message) = not_yet::refusal(&path, &read.shown, || read_default(self.context).shown)
        {
            self.context.problem(node.spot, &path, message);
        }
        let Read { value, shown } = read.unwrap_or_else(|| read_default(self.context));
        self.shown.insert(name.to_owned(), shown);
        value
    }

    /// A key that is absent by default.
    pub fn optional<'k, T: 'k>(&mut self, name: &'static str, about: &str, kind: Kind<'k, T>) -> Option<T> {
        self.key(name, about, kind.nullable(), "null")
    }

    /// As [`Block::optional`], not shown in the effective configuration where it is absent:
    /// for keys of which a block has one or another.
    pub fn variant<'k, T: 'k>(&mut self, name: &'static str, about: &str, kind: Kind<'k, T>) -> Option<T> {
        let value = self.optional(name, about, kind);
        if self.shown.get(name).is_some_and(Value::is_null) {
            self.shown.remove(name);
        }
        value
    }

    /// A key that must be there. `None`: it isn't, or is not valid, which is then already among the problems.
    pub fn required<'k, T: 'k>(&mut self, name: &'static str, about: &str, kind: Kind<'k, T>) -> Option<T> {
        self.known.push(name);
        if let Some(schema) = &mut self.schema {
            schema.add(name, about, kind.schema(), None);
            return None;
        }
        let path = self.child_path(name);
        let Some(node) = self.node.child(name) else {
            let message = format!("`{name}` is missing: it must be {}", kind.expects());
            self.context.problem(self.node.spot, &path, message);
            return None;
        };
        if node.has_failed() {
            return None;
        }
        let Read { value, shown } = kind.read(self.context, node, &path)?;
        self.shown.insert(name.to_owned(), shown);
        Some(value)
    }

    /// Whether the file has the key, with more than nothing.
    pub fn has(&self, name: &str) -> bool {
        self.node.child(name).is_some_and(|node| !node.is_null())
    }

    /// Whether the file has a list there with something in it, valid or not.
    pub fn has_items(&self, name: &str) -> bool {
        self.node.child(name).is_some_and(|node| matches!(&node.data, Data::List(items) if !items.is_empty()))
    }

    /// The `name` of every item of a list, as it is written; empty where there is none.
    pub fn names_in(&self, list: &str) -> Vec<String> {
        let Some(Data::List(items)) = self.node.child(list).map(|node| &node.data) else { return Vec::new() };
        items.iter().map(|item| item.child("name").and_then(Node::key).unwrap_or_default().to_owned()).collect()
    }

    /// Takes `name` as known, because what is wrong with it was already said.
    pub fn forgive(&mut self, name: &'static str) {
        self.known.push(name);
    }

    /// Where the value of `name` stands; the block itself where it is absent.
    pub fn spot(&self, name: &str) -> Spot {
        self.node.child(name).unwrap_or(self.node).spot
    }

    pub fn child_path(&self, name: &str) -> String {
        join(self.path, name)
    }

    /// A problem of the value of `name` (of the block itself, if `name` is empty).
    pub fn problem(&mut self, name: &str, message: impl Into<String>) {
        self.context.problem(self.spot(name), &self.child_path(name), message);
    }

    pub fn warning(&mut self, name: &str, message: impl Into<String>) {
        self.context.warning(self.spot(name), &self.child_path(name), message);
    }

    pub fn context(&mut self) -> &mut Context<'c> {
        self.context
    }

    /// Replaces what the effective configuration shows for `name`.
    pub fn show(&mut self, name: &str, shown: Value) {
        self.shown.insert(name.to_owned(), shown);
    }

    fn finish(self) -> Value {
        let Data::Map(pairs) = &self.node.data else { return Value::Object(self.shown) };
        for (key, _) in pairs {
            match key.key() {
                Some(name) if self.known.contains(&name) => {}
                Some(name) => {
                    let message = unknown_key(name, &self.known);
                    self.context.problem(key.spot, &join(self.path, name), message);
                }
                None => {
                    let message = format!("a key must be a text, found {}", key.describe());
                    self.context.problem(key.spot, self.path, message);
                }
            }
        }
        Value::Object(self.shown)
    }
}

/// `path.name`, with the name in quotes where it would be hard to read otherwise.
pub fn join(path: &str, name: &str) -> String {
    let readable = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | '/'));
    match (path.is_empty(), name.is_empty(), readable) {
        (_, true, _) => path.to_owned(),
        (true, _, true) => name.to_owned(),
        (false, _, true) => format!("{path}.{name}"),
        (true, _, false) => yaml::quote(name),
        (false, _, false) => format!("{path}.{}", yaml::quote(name)),
    }
}

/// The candidate that was most likely meant by `name`.
pub fn nearest<'n>(name: &str, candidates: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    let name = name.to_lowercase().replace('-', "_");
    let allowed = (name.chars().count() / 3).clamp(1, 4);
    candidates
        .into_iter()
        .map(|candidate| (distance(&name, &candidate.to_lowercase().replace('-', "_")), candidate))
        .filter(|(distance, candidate)| *distance <= allowed && *distance < candidate.chars().count())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

fn unknown_key(name: &str, known: &[&'static str]) -> String {
    let quoted = yaml::quote(name);
    if name == "<<" {
        return "merge keys (`<<`) are not supported; write the keys out".to_owned();
    }
    let here = known.join(", ");
    if let Some(near) = nearest(name, known.iter().copied()) {
        return format!("unknown key {quoted}; did you mean `{near}`? Known here: {here}");
    }
    let places = super::schema::places_of(name);
    if places.is_empty() {
        format!("unknown key {quoted}; known here: {here}")
    } else {
        format!("unknown key {quoted} here; it belongs to {}. Known here: {here}", places.join(" or "))
    }
}

/// Edit distance in which two neighbours that changed places are one mistake (optimal string alignment).
fn distance(left: &str, right: &str) -> usize {
    let left: Vec<char> = left.chars().take(64).collect();
    let right: Vec<char> = right.chars().take(64).collect();
    let mut rows = vec![vec![0; right.len() + 1]; left.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in rows[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=left.len() {
        for j in 1..=right.len() {
            let change = usize::from(left[i - 1] != right[j - 1]);
            let mut best = (rows[i - 1][j] + 1).min(rows[i][j - 1] + 1).min(rows[i - 1][j - 1] + change);
            if i > 1 && j > 1 && left[i - 1] == right[j - 2] && left[i - 2] == right[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[left.len()][right.len()]
}

fn any_of(schemas: Vec<Value>) -> Value {
    json!({ "anyOf": schemas })
}

fn empty_map() -> Node {
    Node { spot: Spot::START, data: Data::Map(Vec::new()) }
}

/// What is written there, as JSON.
pub fn literal(node: &Node) -> Value {
    match &node.data {
        Data::Scalar(scalar) if scalar.is_null() => Value::Null,
        Data::Scalar(scalar) if scalar.secret => json!(REDACTED),
        Data::Scalar(scalar) if scalar.plain => match scalar.text.as_str() {
            "true" => json!(true),
            "false" => json!(false),
            text => text.parse::<u64>().map_or_else(|_| json!(text), |number| json!(number)),
        },
        Data::Scalar(scalar) => json!(scalar.text),
        Data::List(items) => items.iter().map(literal).collect(),
        Data::Map(pairs) => Value::Object(
            pairs.iter().map(|(key, value)| (key.key().unwrap_or_default().to_owned(), literal(value))).collect(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found() {
        let known = ["timeouts", "retries", "max_per_endpoint", "tls"];
        assert_eq!(nearest("timeout", known), Some("timeouts"));
        assert_eq!(nearest("retires", known), Some("retries"));
        assert_eq!(nearest("max-per-endpoint", known), Some("max_per_endpoint"));
        assert_eq!(nearest("balance", known), None);
        assert_eq!(nearest("x", known), None);
    }
}
