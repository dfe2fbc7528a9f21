//! The fuzz targets as plain tests: over their committed corpus, each input cut short and changed anywhere, and over
//! pieces of the inputs put together at random.

use std::path::Path;

use proptest::prelude::*;

#[path = "../fuzz/targets.rs"]
mod targets;

#[test]
fn head() {
    run("head", targets::head);
}

#[test]
fn chunks() {
    run("chunks", targets::chunks);
}

#[test]
fn target() {
    run("target", targets::target);
}

#[test]
fn sse() {
    run("sse", targets::sse);
}

#[test]
fn websocket() {
    run("websocket", targets::websocket);
}

#[test]
fn json() {
    run("json", targets::json);
}

#[test]
fn request() {
    run("request", targets::request);
}

#[test]
fn answer() {
    run("answer", targets::answer);
}

proptest! {
    #[test]
    fn head_pieces(data in pieces("head")) {
        targets::head(&data[1..]);
    }

    #[test]
    fn chunks_pieces(data in pieces("chunks")) {
        targets::chunks(&data);
    }

    #[test]
    fn target_pieces(data in pieces("target")) {
        targets::target(&data[1..]);
    }

    #[test]
    fn sse_pieces(data in pieces("sse")) {
        targets::sse(&data);
    }

    #[test]
    fn request_pieces(data in pieces("request")) {
        targets::request(&data[1..]);
    }

    #[test]
    fn answer_pieces(data in pieces("answer")) {
        targets::answer(&data);
    }

    #[test]
    fn websocket_pieces(data in pieces("websocket")) {
        targets::websocket(&data);
    }

    #[test]
    fn json_pieces(data in pieces("json")) {
        targets::json(&data);
    }
}

fn run(name: &str, target: fn(&[u8])) {
    for data in corpus(name) {
        // Shown only if the test fails.
        println!("{:?}", String::from_utf8_lossy(&data));
        for length in 0..=data.len() {
            target(&data[..length]);
        }
        for index in 0..data.len() {
            for other in [0, b'\r', b'\n', b' ', b'0', b'"', 0xff] {
                let mut changed = data.clone();
                changed[index] = other;
                target(&changed);
            }
        }
    }
}

/// Slices of inputs, one after the other.
fn pieces(name: &str) -> impl Strategy<Value = Vec<u8>> {
    let corpus = corpus(name);
    let slice = (0..corpus.len(), any::<usize>(), 0..24usize).prop_map(move |(index, start, length)| {
        let data = &corpus[index];
        let start = start % data.len();
        data[start..data.len().min(start + length)].to_vec()
    });
    (any::<u8>(), proptest::collection::vec(slice, 0..8)).prop_map(|(first, slices)| {
        let mut data = slices.concat();
        // The size of the pieces, where the target wants one.
        data.insert(0, first % 16);
        data
    })
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let inputs: Vec<Vec<u8>> = std::fs::read_dir(&folder)
        .expect("every target has a corpus")
        .map(|entry| std::fs::read(entry.expect("the corpus can be listed").path()).expect("the corpus can be read"))
        .filter(|data| !data.is_empty())
        .collect();
    assert!(inputs.len() >= 4, "{name} has only {} inputs", inputs.len());
    inputs
}
