//! Config: every example passes, every kind of mistake has its message.

use std::path::Path;

use longhaul::config::{self, Loaded, Problems};

fn check(text: &str) -> Result<Loaded, Problems> {
    config::check(text, "longhaul.yaml", Path::new("/nonexistent"), &|name| match name {
        "PORT" => Some("8080".to_owned()),
        "TOKEN" => Some("Bearer abc".to_owned()),
        _ => None,
    })
}

#[test]
fn every_example_passes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).expect("config/ is there") {
        let path = entry.expect("an entry").path();
        if let Err(problems) = config::load(&path) {
            panic!("{problems}");
        }
        count += 1;
    }
    assert!(count >= 5, "only {count} examples");
}
