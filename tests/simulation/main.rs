//! Simulation: the whole proxy in a world of one thread, whose network, clock and chance follow from a seed.
//!
//! Nothing of the proxy is replaced but its sockets, its clock and its chance (`net::simulated`, `ids::simulation`): its
//! accept loop, workers, relay, dispatcher, reloads, health checks and drains are what is shipped. Each seed draws
//! services, agents, clients and a plan of faults; `oracle.rs` and `world.rs` say what has to hold meanwhile and in the end.
//!
//! `LONGHAUL_SIMULATION_SEEDS=N`: so many seeds. `LONGHAUL_SIMULATION_SEED=S`: from this one on; alone, only this one, and
//! its trace is printed.

mod agent;
mod client;
mod faults;
mod network;
mod oracle;
mod shape;
mod trace;
mod wire;
mod world;

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once};
use std::thread;

use trace::Story;

const SEEDS_DEFAULT: u64 = 200;
/// Failures that are told in full.
const FAILURES_SHOWN_MAX: usize = 10;

#[test]
fn nothing_that_is_promised_fails_under_any_seed() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (first, count) = (number("LONGHAUL_SIMULATION_SEED"), number("LONGHAUL_SIMULATION_SEEDS"));
    let is_alone = first.is_some() && count.is_none();
    let first = first.unwrap_or(1);
    let count = if is_alone { 1 } else { count.unwrap_or(SEEDS_DEFAULT) };
    println!("seeds {first} to {}", first + count - 1);

    let began = longhaul::ids::now();
    let next = AtomicU64::new(first);
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    let story = live(seed);
                    if is_alone {
                        story.events.iter().for_each(|event| println!("{event}"));
                        println!("digest {:016x}", story.digest());
                    }
                    if !story.violations.is_empty() {
                        failed.lock().expect("no panic").push((seed, story.violations));
                    }
                }
            });
        }
    });
    println!("{count} seeds in {:.1?}", began.elapsed());
    let mut failed = failed.into_inner().expect("no panic");
    failed.sort();
    for (seed, violations) in failed.iter().take(FAILURES_SHOWN_MAX) {
        println!("seed {seed}:\n  {}", violations.join("\n  "));
        println!(
            "  again, with its trace: LONGHAUL_SIMULATION_SEED={seed} cargo test --workspace --features longhaul/simulation \
             --test simulation -- --nocapture"
        );
    }
    let seeds: Vec<u64> = failed.iter().map(|(seed, _)| *seed).collect();
    assert!(failed.is_empty(), "{} of {count} seeds fail: {seeds:?}", seeds.len());
}

#[test]
fn a_seed_is_one_story() {
    for seed in [3, 7, 12] {
        let (first, second) = (live(seed), live(seed));
        let differs = first.events.iter().zip(&second.events).find(|(one, other)| one != other);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(first.digest(), second.digest());
        assert!(first.events.len() > 100, "{} events", first.events.len());
    }
    assert_ne!(live(3).digest(), live(4).digest());
}

thread_local! {
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Lives one seed. A panic in any of its tasks, the proxy's above all, is a violation.
fn live(seed: u64) -> Story {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.with_borrow_mut(|panics| panics.push(panic.to_string()));
            usual(panic);
        }));
    });
    let mut story = std::panic::catch_unwind(|| world::live(seed))
        .unwrap_or_else(|_| Story { events: Vec::new(), violations: Vec::new() });
    story.violations.extend(PANICS.take());
    story
}
