//! Substitute: `${VAR}` and `${file:/path}` inside string values, and keys that are written twice.

use std::io::Read as _;
use std::path::Path;

use super::read::{Context, join};
use super::yaml::{Data, Node, Scalar, Spot};

/// More than any secret has; a larger file is surely not meant.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Replaces in the whole tree, and removes (with a problem) keys that are there already.
pub fn prepare(node: &mut Node, path: &str, environment: &dyn Fn(&str) -> Option<String>, context: &mut Context) {
    match &mut node.data {
        Data::Scalar(scalar) => {
            let problems = replace(scalar, environment, context);
            scalar.failed = !problems.is_empty();
            for message in problems {
                context.problem(node.spot, path, message);
            }
        }
        Data::List(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                prepare(item, &format!("{path}[{index}]"), environment, context);
            }
        }
        Data::Map(pairs) => {
            remove_doubles(pairs, path, context);
            for (key, value) in pairs {
                let path = join(path, key.key().unwrap_or("?"));
                prepare(value, &path, environment, context);
            }
        }
    }
}

fn remove_doubles(pairs: &mut Vec<(Node, Node)>, path: &str, context: &mut Context) {
    let mut first = std::collections::HashMap::<String, Spot>::new();
    pairs.retain(|(key, _)| {
        let Some(name) = key.key() else { return true };
        match first.get(name) {
            None => {
                first.insert(name.to_owned(), key.spot);
                true
            }
            Some(earlier) => {
                let message = format!("this key is already there in line {}; keep one of the two", earlier.line);
                context.problem(key.spot, &join(path, name), message);
                false
            }
        }
    });
}

/// Replaces in one value; gives what went wrong. `$${` is a literal `${`.
fn replace(scalar: &mut Scalar, environment: &dyn Fn(&str) -> Option<String>, context: &mut Context) -> Vec<String> {
    let mut problems = Vec::new();
    if !scalar.text.contains("${") {
        return problems;
    }
    let text = std::mem::take(&mut scalar.text);
    let mut rest = text.as_str();
    let mut result = String::with_capacity(text.len());
    while let Some(start) = rest.find("${") {
        if rest[..start].ends_with('$') {
            result.push_str(&rest[..start - 1]);
            result.push_str("${");
            rest = &rest[start + 2..];
            continue;
        }
        result.push_str(&rest[..start]);
        let Some(length) = rest[start..].find('}') else {
            problems.push("`${` without its `}`; write `$${` for a literal `${`".to_owned());
            rest = &rest[start + 2..];
            continue;
        };
        let name = &rest[start + 2..start + length];
        rest = &rest[start + length + 1..];
        scalar.substituted = true;
        let value = match name.strip_prefix("file:") {
            Some(file) => {
                scalar.secret = true;
                contents(&context.file(file))
            }
            None => variable(name, environment),
        };
        match value {
            Ok(value) => result.push_str(&value),
            Err(message) => problems.push(message),
        }
    }
    result.push_str(rest);
    scalar.text = result;
    problems
}

fn variable(name: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let valid = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !name.is_empty();
    if !valid {
        let name = name.escape_debug();
        return Err(format!(
            "`${{{name}}}`: expected `${{VARIABLE}}` or `${{file:/path}}`; write `$${{` for a literal `${{`"
        ));
    }
    environment(name)
        .ok_or_else(|| format!("the environment variable {name} is not set; set it where longhaul is started"))
}

fn contents(path: &Path) -> Result<String, String> {
    let fail = |what: &str| format!("cannot read {}: {what}", path.display());
    let file = std::fs::File::open(path).map_err(|error| fail(&error.to_string()))?;
    let mut text = String::new();
    match file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text) {
        Err(error) => Err(fail(&error.to_string())),
        Ok(length) if length as u64 > FILE_BYTES_MAX => Err(fail("it is larger than 1MiB")),
        Ok(_) => {
            // Editors and `echo` end a file with a newline that is no part of the secret.
            let kept = text.strip_suffix('\n').map_or(text.len(), |line| line.strip_suffix('\r').unwrap_or(line).len());
            text.truncate(kept);
            Ok(text)
        }
    }
}
