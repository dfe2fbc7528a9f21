//! Relay: what one streamed event costs on its way, between the read that brings it and the write that takes it on.

use divan::{Bencher, black_box};
use longhaul::http1::chunks::{Chunks, HEADROOM};
use longhaul::proxy::buffer::Buffer;
use longhaul::proxy::observe::Observer;

fn main() {
    divan::main();
}

/// One event in one chunk.
fn chunk(event_bytes: usize) -> Vec<u8> {
    let mut chunk = format!("{event_bytes:x}\r\ndata: ").into_bytes();
    chunk.resize(chunk.len() + event_bytes - "data: \n\n".len(), b'x');
    chunk.extend_from_slice(b"\n\n\r\n");
    chunk
}

/// What one read brought, again and again: the framing checked, the events counted.
fn pass(bencher: Bencher<'_, '_>, read: &[u8]) -> Observer {
    let mut buffer = vec![0; HEADROOM];
    buffer.extend_from_slice(read);
    let mut chunks = Chunks::new(4096);
    let mut observer = Observer::default();
    observer.expect_events();
    bencher.bench_local(|| {
        let end = buffer.len();
        let observe = |payload: &[u8]| observer.observe(payload);
        chunks.pass(black_box(&mut buffer), HEADROOM, end, observe).expect("canonical chunks").forward
    });
    observer
}

#[divan::bench(args = [200, 2000])]
fn event_step(bencher: Bencher<'_, '_>, event_bytes: usize) {
    let observer = pass(bencher, &chunk(event_bytes));
    assert!(observer.events > 0 && observer.bytes == observer.events * event_bytes as u64, "each step is one event");
}

/// As many tokens as one read may bring when the endpoint sends each as an event and a chunk of its own.
#[divan::bench]
fn full_read_of_small_events(bencher: Bencher<'_, '_>) {
    let chunk = chunk(40);
    pass(bencher, &chunk.repeat(16 * 1024 / chunk.len()));
}

/// A read buffer borrowed for one event and given back.
#[divan::bench]
fn borrow_buffer(bencher: Bencher<'_, '_>) {
    bencher.bench_local(|| black_box(Buffer::take()).len());
}
