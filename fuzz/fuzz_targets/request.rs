//! Fuzz target `request`: see `targets.rs`.
#![no_main]

#[path = "../targets.rs"]
#[expect(dead_code, reason = "each binary runs one of the targets")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::request(data));
