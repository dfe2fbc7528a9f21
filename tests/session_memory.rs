//! Session memory: a million pins stay below 100 MiB. A file of its own, because it measures the whole process.
//! A quarter of them is measured: the table's load is the same then.
#![cfg(target_os = "linux")]

#[path = "support/placement.rs"]
mod support;

use longhaul::ids;
use longhaul::state::Kind;
use longhaul::state::dispatcher::{Ask, Dispatcher, Picked};
use support::{Fleet, key, place};

const PINS: u32 = 250_000;

#[test]
fn a_quarter_of_a_million_pins_stays_below_25_mib() {
    let dispatcher = Dispatcher::new(support::SERVICE, support::service_metrics());
    let now = ids::now();
    let fleet = Fleet::new().version("stable", 1, (1..=10).map(place));
    dispatcher.apply(fleet.with(|config| config.session.max_sessions = PINS as usize).settings(), now);
    let before = resident_bytes();
    for number in 0..PINS {
        // As long as a UUID.
        let key = key(&format!("{number:08x}-0000-7000-8000-{number:012x}"));
        let ask = Ask::new(Kind::Other, Some(&key));
        let mut placed = dispatcher.pick(ask, now, 0).ok().and_then(Picked::placed).expect("a place");
        placed.lease.confirm(now);
        // Placement credits are for ten seconds only; the run of the session ends its own.
        let ask = Ask::new(Kind::Start, Some(&key));
        drop(dispatcher.pick(ask, now, 0));
    }
    let pinned: u64 = dispatcher.status(now).versions.iter().map(|version| version.sessions).sum();
    assert_eq!(pinned, u64::from(PINS));
    let taken = resident_bytes() - before;
    assert!(taken < 25 << 20, "{taken} bytes");
    assert!(taken > 12 << 20, "{taken} bytes can't be all of it: the measure is wrong");
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line of the resident size");
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kibibytes * 1024
}
