//! Architecture: the layer table of docs/ARCHITECTURE.md, held against the source.
//!
//! The document is the one place where the table is written. This test reads text, so it also refuses the forms that
//! would hide a dependency from it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

#[test]
fn every_file_says_what_it_is() {
    for file in source_files() {
        let text = read(&file);
        let first = text.lines().next().unwrap_or_default();
        assert!(
            first.starts_with("//! ") && first.len() > 10,
            "{}: the first line says what the file is",
            file.display()
        );
    }
}

#[test]
fn a_module_uses_only_rows_above_its_own() {
    let layers = Layers::of_document();
    let mut wrong = Vec::new();
    for file in source_files() {
        let module = module_of(&file);
        let module_text = layers.most_specific(&module);
        for used in used_modules(&module, &read(&file)) {
            let used_text = layers.most_specific(&used);
            if used_text != module_text && layers.row(&used_text) >= layers.row(&module_text) {
                wrong.push(format!("{}: {module_text} must not use {used_text}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_module_is_in_the_table_and_every_name_in_it_is_a_module() {
    let layers = Layers::of_document();
    let modules: BTreeSet<String> = source_files().iter().map(|file| module_of(file)).collect();
    for module in modules.iter().filter(|module| module.as_str() != "lib") {
        let top = module.split("::").next().unwrap_or_default();
        assert!(
            layers.contains(module) || layers.contains(top),
            "{module} is missing in the layers of ARCHITECTURE.md"
        );
    }
    for name in layers.rows.iter().flatten() {
        assert!(modules.contains(name), "{name} of the layers in ARCHITECTURE.md is not a module");
    }
}

#[test]
fn the_planes_can_not_see_each_other() {
    let layers = Layers::of_document();
    assert_eq!(layers.row("proxy"), layers.row("control"), "modules of one row don't use each other");
}

#[test]
fn no_form_hides_a_dependency() {
    let parents = Layers::of_document().rows.concat();
    let parents =
        parents.iter().filter_map(|name| name.rsplit_once("::")).map(|(parent, _)| format!("crate::{parent}::{{"));
    let forms: Vec<String> = ["crate::{", "super::super", "use crate::*", "use longhaul::{"]
        .into_iter()
        .map(str::to_owned)
        .chain(parents)
        .collect();
    for file in source_files() {
        for (number, line) in read(&file).lines().enumerate() {
            for form in &forms {
                let place = || format!("{}:{}: {form} hides what is used", file.display(), number + 1);
                assert!(line.trim_start().starts_with("//") || !line.contains(form.as_str()), "{}", place());
            }
        }
    }
}

#[test]
fn the_reader_of_this_test_sees_every_form() {
    let text = "//! Not crate::comment.\nuse crate::control::health::Check;\nuse super::route;\nlet a = crate::admin::Context;\n\
                use crate::state::{Kind, Target};\nuse longhaul::sse;\nmod tests {\n    use crate::app;\n}";
    let used: Vec<String> = used_modules("proxy::pick", text).into_iter().collect();
    assert_eq!(used, ["admin::Context", "control::health", "proxy::route", "sse", "state"]);
    let layers = Layers::of_document();
    assert_eq!(layers.most_specific("control::health"), "control");
    assert_eq!(layers.most_specific("net::cookie"), "net::cookie");
    assert!(layers.row("net") < layers.row("state") && layers.row("state") < layers.row("net::cookie"));
}

/// The rows of the table, the lowest layer first.
struct Layers {
    rows: Vec<Vec<String>>,
}

impl Layers {
    /// The first code block after the heading `## Layers`.
    fn of_document() -> Layers {
        let text = read(&root().join("docs/ARCHITECTURE.md"));
        let section = text.split("\n## Layers\n").nth(1).expect("a section Layers");
        let block = section.split("```").nth(1).expect("a code block with the table");
        let rows = block
            .lines()
            .skip(1)
            .map(|line| line.split('#').next().unwrap_or_default())
            .map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<String>>())
            .filter(|row| !row.is_empty())
            .collect();
        Layers { rows }
    }

    fn contains(&self, module: &str) -> bool {
        self.rows.iter().flatten().any(|name| name == module)
    }

    /// A file may have a row of its own (`net::cookie`); otherwise it is in that of its top module.
    fn most_specific(&self, module: &str) -> String {
        let mut name = module;
        while !self.contains(name) {
            match name.rsplit_once("::") {
                Some((parent, _)) => name = parent,
                None => break,
            }
        }
        name.to_owned()
    }

    /// What is in no row (`lib`, which only lists the modules) is above all.
    fn row(&self, module: &str) -> usize {
        self.rows.iter().position(|row| row.iter().any(|name| name == module)).unwrap_or(usize::MAX)
    }
}

/// The modules that the text of `module` names: `crate::a::b`, `longhaul::a` and, within a directory, `super::b`.
fn used_modules(module: &str, text: &str) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for line in text.lines().map(str::trim_start) {
        if line.starts_with("mod tests {") {
            // Tests come last and may look anywhere.
            break;
        }
        if line.starts_with("//") {
            continue;
        }
        for (position, _) in line.match_indices("crate::").chain(line.match_indices("longhaul::")) {
            let path = line[position..].split_once("::").map(|(_, path)| path).unwrap_or_default();
            let mut module = first_name(path).to_owned();
            if let Some(below) = path[module.len()..].strip_prefix("::") {
                let below = first_name(below);
                if !below.is_empty() {
                    module = format!("{module}::{below}");
                }
            }
            used.insert(module);
        }
        for (position, _) in line.match_indices("super::") {
            let name = first_name(&line[position + 7..]);
            used.insert(match module.rsplit_once("::") {
                Some((parent, _)) => format!("{parent}::{name}"),
                None => name.to_owned(),
            });
        }
    }
    used.remove("");
    used
}

fn first_name(path: &str) -> &str {
    path.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default()
}

/// `src/net/cookie.rs` is `net::cookie`.
fn module_of(file: &Path) -> String {
    let path = file.strip_prefix(root().join("src")).expect("a file of src").with_extension("");
    let parts: Vec<String> = path.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    parts.join("::")
}

fn source_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut directories = vec![root().join("src")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory of the project") {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    assert!(files.len() > 10, "the source was found");
    files.sort();
    files
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}
