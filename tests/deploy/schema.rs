//! Schema: Kubernetes objects against the OpenAPI schemas in tests/data, with unknown fields refused.

use std::collections::HashMap;

use serde_json::Value;

const FILES: [&str; 2] = [include_str!("../data/kubernetes-1.34.json"), include_str!("../data/custom-resources.json")];
/// The keywords that [`Schemas::walk`] obeys. Any other in the data would be a rule that nobody checks.
const KEYWORDS: [&str; 9] =
    ["$ref", "additionalProperties", "enum", "format", "items", "oneOf", "properties", "required", "type"];

pub struct Schemas {
    /// From `apps/v1/Deployment` to the name of its definition.
    kinds: HashMap<String, String>,
    definitions: HashMap<String, Value>,
}

impl Schemas {
    pub fn load() -> Schemas {
        let mut schemas = Schemas { kinds: HashMap::new(), definitions: HashMap::new() };
        for file in FILES {
            let data: Value = serde_json::from_str(file).expect("JSON");
            for (kind, name) in data["kinds"].as_object().expect("kinds") {
                schemas.kinds.insert(kind.clone(), name.as_str().expect("a name").to_owned());
            }
            for (name, schema) in data["definitions"].as_object().expect("definitions") {
                schemas.only_known_keywords(name, schema);
                schemas.definitions.insert(name.clone(), schema.clone());
            }
        }
        schemas
    }

    /// Everything that is wrong with `object`.
    pub fn problems(&self, object: &Value) -> Vec<String> {
        let kind = format!("{}/{}", text(&object["apiVersion"]), text(&object["kind"]));
        let Some(name) = self.kinds.get(&kind) else { return vec![format!("no schema for {kind}")] };
        let mut problems = Vec::new();
        self.walk(&self.definitions[name], object, &kind, &mut problems);
        problems
    }

    fn walk(&self, schema: &Value, value: &Value, path: &str, problems: &mut Vec<String>) {
        if let Some(name) = schema["$ref"].as_str() {
            return self.walk(&self.definitions[name], value, path, problems);
        }
        if let Some(choices) = schema["oneOf"].as_array() {
            let fits = |choice: &&Value| {
                let mut wrong = Vec::new();
                self.walk(choice, value, path, &mut wrong);
                wrong.is_empty()
            };
            if choices.iter().filter(fits).count() == 0 {
                problems.push(format!("{path}: {value} is none of {choices:?}"));
            }
            return;
        }
        let right = match schema["type"].as_str() {
            None => true,
            Some("object") => value.is_object(),
            Some("array") => value.is_array(),
            Some("string") => value.is_string(),
            Some("boolean") => value.is_boolean(),
            Some("integer") => value.is_i64() || value.is_u64(),
            Some("number") => value.is_number(),
            Some(other) => panic!("{path}: a type {other} in the schema"),
        };
        if !right {
            problems.push(format!("{path}: {value} is no {}", schema["type"]));
            return;
        }
        if let Some(allowed) = schema["enum"].as_array()
            && !allowed.contains(value)
        {
            problems.push(format!("{path}: {value} is none of {allowed:?}"));
        }
        if let Some(items) = value.as_array() {
            for (index, item) in items.iter().enumerate() {
                self.walk(&schema["items"], item, &format!("{path}[{index}]"), problems);
            }
        }
        if let Some(fields) = value.as_object() {
            for name in schema["required"].as_array().into_iter().flatten().map(text) {
                if !fields.contains_key(name) {
                    problems.push(format!("{path}: {name} is missing"));
                }
            }
            for (name, field) in fields {
                let path = format!("{path}.{name}");
                match (schema["properties"].get(name), &schema["additionalProperties"]) {
                    (Some(known), _) => self.walk(known, field, &path, problems),
                    (None, more @ Value::Object(_)) => self.walk(more, field, &path, problems),
                    (None, Value::Null) if schema.get("properties").is_none() => {}
                    (None, _) => problems.push(format!("{path}: no such field")),
                }
            }
        }
    }

    fn only_known_keywords(&self, name: &str, schema: &Value) {
        let Some(keywords) = schema.as_object() else { return };
        for (keyword, inner) in keywords {
            assert!(KEYWORDS.contains(&keyword.as_str()), "{name} has the keyword {keyword}, which nobody checks");
            match keyword.as_str() {
                "properties" => {
                    inner.as_object().into_iter().flatten().for_each(|(_, one)| self.only_known_keywords(name, one));
                }
                "oneOf" => inner.as_array().into_iter().flatten().for_each(|one| self.only_known_keywords(name, one)),
                "items" | "additionalProperties" => self.only_known_keywords(name, inner),
                _ => {}
            }
        }
    }
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
