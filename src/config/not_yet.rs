//! Not yet: the keys whose capability is not built. Their shape is checked, their default accepted, anything else refused.
//! Building a capability deletes its line.

use serde_json::Value;

struct NotYet {
    /// With `[]` for every item of a list.
    path: &'static str,
    /// Values beside the default that are accepted, because they mean what is built.
    accepted: &'static [&'static str],
    /// What to do until then.
    instead: &'static str,
}

const fn not_yet(path: &'static str, instead: &'static str) -> NotYet {
    NotYet { path, accepted: &[], instead }
}

const NOT_YET: &[NotYet] = &[
    not_yet("state.redis", "write `memory`, or `{file: ..}` for a directory of this machine"),
    not_yet("trace.otlp_endpoint", "leave it out; `traceparent` is passed on and made where it is absent"),
    not_yet("services[].runs.resume", "leave it out"),
];

/// Why `path` may not have this value, if it may not. Both values as the effective configuration shows them.
pub fn refusal(path: &str, value: &Value, default: impl FnOnce() -> Value) -> Option<String> {
    let general = without_indices(path);
    let found = NOT_YET.iter().find(|entry| entry.path == general)?;
    if *value == default() {
        return None;
    }
    if value.as_str().is_some_and(|text| found.accepted.contains(&text)) {
        return None;
    }
    let what = match value {
        Value::String(text) => format!("`{text}`"),
        _ => "this".to_owned(),
    };
    Some(format!("{what} is not available yet; {}", found.instead))
}

/// `services[0].name` as `services[].name`.
fn without_indices(path: &str) -> String {
    let mut inside = false;
    path.chars()
        .filter(|c| {
            if *c == ']' {
                inside = false;
            }
            let keep = !inside;
            if *c == '[' {
                inside = true;
            }
            keep
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line whose key was renamed would refuse nothing.
    #[test]
    fn every_line_names_a_key_of_the_file() {
        let known = crate::config::schema::key_paths();
        for entry in NOT_YET {
            assert!(known.iter().any(|path| path == entry.path), "{} is no key of the file", entry.path);
        }
    }
}
