//! Metrics: what docs/operations.md promises, to hold dashboards and alerts against.

use std::collections::{BTreeMap, BTreeSet};

/// The metrics of the table, each with its labels; of a histogram also the series that it is written as.
pub fn promised(document: &str) -> BTreeMap<String, BTreeSet<String>> {
    let section = document.split("\n## Metrics\n").nth(1).expect("a section Metrics");
    let section = section.split("\n## ").next().unwrap_or_default();
    let mut metrics = BTreeMap::new();
    for line in section.lines().filter(|line| line.starts_with("| `longhaul_")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
        let labels: BTreeSet<String> =
            cells[1].split(',').map(|label| label.trim().to_owned()).filter(|label| !label.is_empty()).collect();
        for name in cells[0].split('`').filter(|part| part.starts_with("longhaul_")) {
            metrics.insert(name.to_owned(), labels.clone());
            if name.ends_with("_seconds") {
                for ending in ["_bucket", "_sum", "_count"] {
                    let mut labels = labels.clone();
                    labels.insert("le".to_owned());
                    metrics.insert(format!("{name}{ending}"), labels);
                }
            }
        }
    }
    assert!(metrics.len() > 30, "{metrics:?}");
    metrics
}

/// The metrics of a text, each with the labels that it is selected by: `name{label="value", ..}`.
pub fn used(text: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    for (position, _) in text.match_indices("longhaul_") {
        let whole_word = !text[..position].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let rest = &text[position..];
        let length =
            rest.find(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')).unwrap_or(rest.len());
        if !whole_word {
            continue;
        }
        let selector = rest[length..].strip_prefix('{').and_then(|inside| inside.split('}').next()).unwrap_or_default();
        // Label values here have no comma and no brace.
        let labels = selector.split(',').filter_map(|part| part.split(['=', '!']).next());
        let labels = labels.map(|label| label.trim().to_owned()).filter(|label| !label.is_empty()).collect();
        found.push((rest[..length].to_owned(), labels));
    }
    found
}

/// The labels that the text groups by.
pub fn grouped_by(text: &str) -> BTreeSet<String> {
    let mut labels = BTreeSet::new();
    for word in ["by (", "on (", "without ("] {
        for piece in text.split(word).skip(1) {
            let inside = piece.split(')').next().unwrap_or_default();
            labels.extend(inside.split(',').map(|label| label.trim().to_owned()));
        }
    }
    labels
}
