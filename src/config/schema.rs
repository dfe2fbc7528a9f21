//! Schema: the JSON Schema of the file, as the declared shape describes itself.

use std::sync::LazyLock;

use serde_json::{Value, json};

/// The JSON Schema (2020-12) of the configuration file, for editors.
pub fn schema() -> Value {
    let mut schema = super::file::file().schema();
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    schema["title"] = json!("longhaul configuration");
    schema
}

/// The path of every key of the file, with `[]` for items: `services[].name`.
pub fn key_paths() -> &'static [String] {
    static PATHS: LazyLock<Vec<String>> = LazyLock::new(|| {
        let mut paths = Vec::new();
        collect(&schema(), "", &mut paths);
        paths
    });
    &PATHS
}

/// The blocks that have a key of this name, at most three.
pub fn places_of(name: &str) -> Vec<String> {
    let mut places: Vec<String> = key_paths()
        .iter()
        .filter_map(|path| match path.rsplit_once('.') {
            Some((block, last)) if last == name => Some(format!("`{block}`")),
            None if path == name => Some("the top of the file".to_owned()),
            _ => None,
        })
        .collect();
    places.dedup();
    places.truncate(3);
    places
}

fn collect(schema: &Value, path: &str, paths: &mut Vec<String>) {
    for form in schema.get("anyOf").and_then(Value::as_array).into_iter().flatten() {
        collect(form, path, paths);
    }
    if let Some(items) = schema.get("items") {
        collect(items, &format!("{path}[]"), paths);
    }
    for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let path = super::read::join(path, name);
        collect(property, &path, paths);
        paths.push(path);
    }
}
