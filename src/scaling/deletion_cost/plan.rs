//! Plan: which pods' costs are to be written now. Pure.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::scaling::load::EndpointLoad;

/// Patches of one round; what is left comes in the next.
pub const PATCHES_MAX: usize = 10;
/// A pod is written to once in so long at most.
const APART: Duration = Duration::from_secs(15);
/// What a run costs. Sessions count less than that together: a pod with a run goes after every pod without.
const RUN_COST: u64 = 1000;
const SESSIONS_COST_MAX: u64 = RUN_COST - 1;
/// A cost is written anew when it is so many percent off; by less, the order among pods hardly changes.
const OFF_PERCENT: u64 = 25;

/// What is known of a pod's annotation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Written {
    /// `None`: it has none, which counts as 0.
    pub cost: Option<i32>,
    /// When this process tried to write it last.
    pub at: Option<Instant>,
    /// This process wrote it.
    pub ours: bool,
}

/// What it costs to remove a pod: its runs, then its sessions.
pub fn cost(load: EndpointLoad) -> i32 {
    let runs = load.outstanding_runs.saturating_mul(RUN_COST);
    i32::try_from(runs.saturating_add(load.sessions.min(SESSIONS_COST_MAX))).unwrap_or(i32::MAX)
}

/// The pods to write to, and what. Those first whose work began or ended since, then by how far their costs are off.
pub fn due(
    loads: &HashMap<String, EndpointLoad>,
    written: &HashMap<String, Written>,
    now: Instant,
) -> Vec<(String, i32)> {
    let mut due: Vec<(u64, &str, i32)> = Vec::new();
    let mut look = |name, wanted: i32| {
        let Written { cost, at, .. } = written.get(name).copied().unwrap_or_default();
        let too_soon = at.is_some_and(|at| now.saturating_duration_since(at) < APART);
        let off = off_by(cost.unwrap_or(0), wanted);
        if off >= OFF_PERCENT && !too_soon {
            due.push((off, name, wanted));
        }
    };
    for (name, load) in loads {
        look(name.as_str(), cost(*load));
    }
    // Whoever has no endpoint any more has nothing to lose; what others wrote is theirs.
    for (name, known) in written {
        if known.ours && !loads.contains_key(name) {
            look(name.as_str(), 0);
        }
    }
    due.sort_unstable_by(|one, other| other.0.cmp(&one.0).then(one.1.cmp(other.1)));
    due.into_iter().take(PATCHES_MAX).map(|(_, name, cost)| (name.to_owned(), cost)).collect()
}

/// Percent of the larger; more than 100 where work began or ended.
fn off_by(is: i32, wanted: i32) -> u64 {
    if is == wanted {
        return 0;
    }
    let busy = |cost: i32| i64::from(cost) >= RUN_COST as i64;
    if busy(is) != busy(wanted) || (is == 0) != (wanted == 0) {
        return 1000;
    }
    let (is, wanted) = (i64::from(is), i64::from(wanted));
    is.abs_diff(wanted) * 100 / is.unsigned_abs().max(wanted.unsigned_abs()).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids;

    fn load(outstanding_runs: u64, sessions: u64) -> EndpointLoad {
        EndpointLoad { outstanding_runs, sessions }
    }

    #[test]
    fn a_run_weighs_more_than_all_sessions() {
        assert_eq!(cost(load(0, 0)), 0);
        assert!(cost(load(1, 0)) > cost(load(0, 1_000_000)));
        assert_eq!(cost(load(2, 5)), 2005);
        assert_eq!(cost(load(u64::MAX, u64::MAX)), i32::MAX);
    }

    #[test]
    fn what_is_written_and_what_is_not() {
        let now = ids::now();
        let loads =
            |pods: &[(&str, EndpointLoad)]| pods.iter().map(|(name, load)| ((*name).to_owned(), *load)).collect();
        let written = |cost: i32, at| HashMap::from([("a".to_owned(), Written { cost: Some(cost), at, ours: true })]);
        let due_of = |load: EndpointLoad, known: &HashMap<String, Written>| due(&loads(&[("a", load)]), known, now);
        let nothing = HashMap::new();
        assert_eq!(due_of(load(0, 0), &nothing), [], "0 is what it counts as");
        assert_eq!(due_of(load(3, 0), &nothing), [("a".to_owned(), 3000)]);
        assert_eq!(due_of(load(10, 0), &written(9000, None)), [], "a tenth more");
        assert_eq!(due_of(load(12, 0), &written(9000, None)), [("a".to_owned(), 12_000)]);
        assert_eq!(due_of(load(0, 0), &written(1000, None)), [("a".to_owned(), 0)]);
        assert_eq!(due_of(load(0, 0), &written(1000, Some(now))), [], "it was written just now");
        assert_eq!(due(&HashMap::new(), &written(5000, None), now), [("a".to_owned(), 0)], "no endpoint any more");
        let others = HashMap::from([("b".to_owned(), Written { cost: Some(7), at: None, ours: false })]);
        assert_eq!(due(&HashMap::new(), &others, now), [], "of somebody else");
        let many: HashMap<String, EndpointLoad> = (0..50).map(|number| (format!("p{number:02}"), load(1, 0))).collect();
        assert_eq!(due(&many, &HashMap::new(), now).len(), PATCHES_MAX);
    }

    proptest! {
        /// Written again and again, costs come to what they should be, give or take what is not worth a patch, and the
        /// idle are always told from the busy.
        #[test]
        fn it_settles(pods in prop::collection::vec((0u64..5, 0u64..2000, any::<i32>()), 1..40)) {
            let mut now = ids::now();
            let loads: HashMap<String, EndpointLoad> =
                pods.iter().enumerate().map(|(number, pod)| (number.to_string(), load(pod.0, pod.1))).collect();
            let mut written: HashMap<String, Written> = pods.iter().enumerate()
                .map(|(number, pod)| (number.to_string(), Written { cost: Some(pod.2), at: None, ours: false })).collect();
            for _ in 0..=pods.len() / PATCHES_MAX {
                for (name, cost) in due(&loads, &written, now) {
                    written.insert(name, Written { cost: Some(cost), at: Some(now), ours: true });
                }
                now += APART;
            }
            prop_assert_eq!(due(&loads, &written, now), vec![]);
            for (name, load) in &loads {
                let is = written[name].cost.unwrap();
                prop_assert_eq!(is >= RUN_COST as i32, load.outstanding_runs > 0);
                prop_assert!(off_by(is, cost(*load)) < OFF_PERCENT);
            }
        }
    }
}
