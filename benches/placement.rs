//! Placement: what a pick costs with few and with many endpoints, and what a million pins cost in time and memory.

#[path = "../tests/support/placement.rs"]
mod support;

use std::alloc::System;
use std::sync::Arc;

use divan::{AllocProfiler, Bencher, black_box};
use longhaul::balance::{self, Candidate};
use longhaul::config::Affinity;
use longhaul::ids;
use longhaul::state::Kind;
use longhaul::state::dispatcher::{Ask, Dispatcher, Picked};
use support::{Fleet, key, place};

#[global_allocator]
static ALLOCATOR: AllocProfiler<System> = AllocProfiler::system();

const PINS: u32 = 1_000_000;

fn main() {
    divan::main();
}

fn dispatcher(endpoints: u16, affinity: Affinity) -> Arc<Dispatcher> {
    let dispatcher = Dispatcher::new(support::SERVICE, support::service_metrics());
    let fleet = Fleet::new().version("stable", 1, (1..=endpoints).map(place));
    dispatcher.apply(fleet.with(|config| config.session.affinity = affinity).settings(), ids::now());
    dispatcher
}

/// A pick alone: what it reserved is given back outside the measurement.
#[divan::bench(args = [2, 100, 10_000])]
fn pick(bencher: Bencher<'_, '_>, endpoints: u16) {
    let dispatcher = dispatcher(endpoints, Affinity::Pin);
    let now = ids::now();
    bencher.bench_local(|| dispatcher.pick(black_box(Ask::new(Kind::Start, None)), now, 0));
}

/// A run reserved and given back, its id and its metrics included.
#[divan::bench(args = [2, 100, 10_000])]
fn pick_and_drop(bencher: Bencher<'_, '_>, endpoints: u16) {
    let dispatcher = dispatcher(endpoints, Affinity::Pin);
    let now = ids::now();
    bencher.bench_local(|| {
        let ask = Ask::new(Kind::Start, None);
        dispatcher.pick(black_box(ask), now, 0).is_ok()
    });
}

/// The same while every endpoint has runs.
#[divan::bench(args = [2, 100, 10_000])]
fn pick_and_drop_loaded(bencher: Bencher<'_, '_>, endpoints: u16) {
    let dispatcher = dispatcher(endpoints, Affinity::Pin);
    let now = ids::now();
    let ask = || Ask::new(Kind::Start, None);
    let _held: Vec<_> = (0..u32::from(endpoints) * 3).map(|_| dispatcher.pick(ask(), now, 0)).collect();
    bencher.bench_local(|| dispatcher.pick(black_box(ask()), now, 0).is_ok());
}

/// An exchange without a run, so that only the placement is measured.
#[divan::bench(args = [2, 100, 10_000])]
fn rotate(bencher: Bencher<'_, '_>, endpoints: u16) {
    let dispatcher = dispatcher(endpoints, Affinity::Pin);
    let now = ids::now();
    bencher.bench_local(|| {
        let ask = Ask::new(Kind::Other, None);
        dispatcher.pick(black_box(ask), now, 0).is_ok()
    });
}

/// Makes a million pins: the largest allocation is what they take.
#[divan::bench(sample_count = 1, sample_size = 1)]
fn a_million_pins(bencher: Bencher<'_, '_>) {
    let keys: Vec<_> = (0..PINS).map(session).collect();
    bencher.bench_local(|| {
        let dispatcher = dispatcher(10, Affinity::Pin);
        pin(&dispatcher, &keys);
        dispatcher
    });
}

/// A pinned exchange among a million pins.
#[divan::bench]
fn pinned_among_a_million(bencher: Bencher<'_, '_>) {
    let keys: Vec<_> = (0..PINS).map(session).collect();
    let dispatcher = dispatcher(10, Affinity::Pin);
    pin(&dispatcher, &keys);
    let now = ids::now();
    let mut next = 0_usize;
    bencher.bench_local(|| {
        // A stride that is prime to the number of keys, so that no key is in the cache.
        next = (next + 618_033) % keys.len();
        let ask = Ask::new(Kind::Other, Some(&keys[next]));
        dispatcher.pick(black_box(ask), now, 0).is_ok()
    });
}

#[divan::bench(args = [2, 10, 100, 1_000])]
fn rendezvous(bencher: Bencher<'_, '_>, endpoints: u16) {
    let identities: Vec<String> = (1..=endpoints).map(|port| support::url(port).identity()).collect();
    let hashes: Vec<u64> = identities.iter().map(|identity| balance::endpoint_hash(identity)).collect();
    let mut counter = 0_u64;
    bencher.bench_local(|| {
        counter += 1;
        let candidates = identities.iter().zip(&hashes).zip(0..);
        let candidates = candidates.map(|((name, hash), index)| Candidate { index, hash: *hash, name, weight: 1 });
        balance::rendezvous(black_box(counter), candidates)
    });
}

fn session(number: u32) -> longhaul::state::sessions::SessionKey {
    // As long as a UUID.
    key(&format!("{number:08x}-0000-7000-8000-{number:012x}"))
}

fn pin(dispatcher: &Arc<Dispatcher>, keys: &[longhaul::state::sessions::SessionKey]) {
    let now = ids::now();
    for key in keys {
        let ask = Ask::new(Kind::Start, Some(key));
        if let Ok(Picked::Placed(mut placed)) = dispatcher.pick(ask, now, 0) {
            placed.lease.confirm(now);
        }
    }
}
