//! Balance: pure placement: cohorts, rendezvous hashing, smooth weighted round robin, exact load scores.
//!
//! Hashes here have fixed seeds: every replica and every release must place a key alike. Changing a seed or the
//! arithmetic moves sessions between versions, so the tests pin some values.

use std::cmp::Ordering;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Seed of the hash that deals sessions to versions.
const COHORT_SEED: u64 = 0x6c6f_6e67_6861_756c;

/// Seed of the hash that deals sessions to endpoints under `affinity: hash`. Differs from [`COHORT_SEED`], so that the
/// endpoints of a version share its cohort evenly.
const ENDPOINT_SEED: u64 = 0x656e_6470_6f69_6e74;

/// One choice of a rendezvous: a version or an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// What is given back when it wins.
    pub index: u32,
    /// [`version_hash`] or [`endpoint_hash`] of `name`.
    pub hash: u64,
    /// Breaks ties, so that the order of candidates never matters.
    pub name: &'a str,
    /// 0 never wins. In any unit that is the same for all of them.
    pub weight: u64,
}

/// Where a session key stands in the deal among versions.
pub fn cohort(key: &str) -> u64 {
    xxh3_64_with_seed(key.as_bytes(), COHORT_SEED)
}

pub fn version_hash(name: &str) -> u64 {
    xxh3_64_with_seed(name.as_bytes(), COHORT_SEED)
}

/// Where a session key stands in the deal among the endpoints of its version.
pub fn placement(key: &str) -> u64 {
    xxh3_64_with_seed(key.as_bytes(), ENDPOINT_SEED)
}

pub fn endpoint_hash(identity: &str) -> u64 {
    xxh3_64_with_seed(identity.as_bytes(), ENDPOINT_SEED)
}

/// Weighted rendezvous: the candidate with the least -ln(u) / weight, where u is drawn from (0, 1) by key and candidate.
/// A candidate's chance is its share of the weights, and raising one weight moves keys only towards it.
pub fn rendezvous<'a>(key: u64, candidates: impl Iterator<Item = Candidate<'a>>) -> Option<u32> {
    struct Best<'a> {
        candidate: Candidate<'a>,
        draw: u64,
        score: Option<f64>,
    }
    let mut best: Option<Best<'a>> = None;
    for candidate in candidates.filter(|candidate| candidate.weight > 0) {
        let draw = mix(key, candidate.hash);
        let Some(leader) = &mut best else {
            best = Some(Best { candidate, draw, score: None });
            continue;
        };
        // A lower draw with no more weight can't win: most candidates are settled without a logarithm.
        if draw < leader.draw && candidate.weight <= leader.candidate.weight {
            continue;
        }
        let score = score(draw, candidate.weight);
        let leading = *leader.score.get_or_insert_with(|| self::score(leader.draw, leader.candidate.weight));
        let order = score.total_cmp(&leading).then_with(|| candidate.name.cmp(leader.candidate.name));
        if order == Ordering::Less {
            best = Some(Best { candidate, draw, score: Some(score) });
        }
    }
    best.map(|best| best.candidate.index)
}

/// 52 bits of a key's and a candidate's hash.
fn mix(key: u64, candidate: u64) -> u64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&key.to_le_bytes());
    bytes[8..].copy_from_slice(&candidate.to_le_bytes());
    xxh3_64_with_seed(&bytes, COHORT_SEED) >> 12
}

fn score(draw: u64, weight: u64) -> f64 {
    // Half a step up keeps u away from 0 and, with 52 bits, exactly below 1. libm's logarithm, not the platform's: all
    // replicas must agree to the last bit.
    let u = (draw as f64 + 0.5) / (1_u64 << 52) as f64;
    -libm::log(u) / weight as f64
}

/// Smooth weighted round robin: every candidate gains its weight, the richest (the first of equals) is taken and pays
/// the sum. `credit` is one number a candidate, kept between calls; those who sit a round out neither gain nor pay. All
/// weights together must stay below 2^62.
pub fn take_turn(credit: &mut [i64], candidates: impl Iterator<Item = (usize, u64)>) -> Option<usize> {
    let mut total = 0;
    let mut richest: Option<usize> = None;
    for (index, weight) in candidates.filter(|(_, weight)| *weight > 0) {
        credit[index] += weight as i64;
        total += weight as i64;
        if richest.is_none_or(|leader| credit[index] > credit[leader]) {
            richest = Some(index);
        }
    }
    if let Some(index) = richest {
        credit[index] -= total;
    }
    richest
}

/// How loaded an endpoint would be with one run more: (outstanding + 1) / weight, compared exactly.
#[derive(Clone, Copy, Debug)]
pub struct Score {
    /// Outstanding runs and placement credits, plus one.
    pub load: u64,
    /// Any unit, the same for all that are compared; not 0.
    pub weight: u64,
}

impl Ord for Score {
    fn cmp(&self, other: &Score) -> Ordering {
        let left = u128::from(self.load) * u128::from(other.weight);
        let right = u128::from(other.load) * u128::from(self.weight);
        left.cmp(&right)
    }
}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Score) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Score {
    fn eq(&self, other: &Score) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Score {}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates<'a>(weights: &'a [(&'a str, u32)]) -> impl Iterator<Item = Candidate<'a>> {
        weights.iter().enumerate().map(|(index, (name, weight))| Candidate {
            index: index as u32,
            hash: version_hash(name),
            name,
            weight: u64::from(*weight),
        })
    }

    fn winner<'a>(key: &str, weights: &'a [(&'a str, u32)]) -> Option<&'a str> {
        rendezvous(cohort(key), candidates(weights)).map(|index| weights[index as usize].0)
    }

    #[test]
    fn hashes_are_the_same_in_every_release() {
        assert_eq!(cohort("session-1"), 16227866329027434518);
        assert_eq!(placement("session-1"), 5178811155924322251);
        let split: String = (0..16)
            .filter_map(|n| winner(&format!("session-{n}"), &[("stable", 3), ("canary", 1)]))
            .map(|version| if version == "stable" { 's' } else { 'c' })
            .collect();
        assert_eq!(split, "sccssscsssssscss");
    }

    #[test]
    fn the_short_cut_agrees_with_the_plain_reading() {
        let weights = [("a", 3), ("b", 1), ("c", 7), ("d", 0), ("e", 3), ("f", 2)];
        for n in 0..5_000 {
            let key = cohort(&n.to_string());
            let plain = candidates(&weights)
                .filter(|candidate| candidate.weight > 0)
                .min_by(|left, right| {
                    let left = score(mix(key, left.hash), left.weight);
                    let right = score(mix(key, right.hash), right.weight);
                    left.total_cmp(&right)
                })
                .map(|candidate| candidate.index);
            assert_eq!(rendezvous(key, candidates(&weights)), plain);
        }
    }

    #[test]
    fn nothing_to_choose_from_gives_nothing() {
        assert_eq!(winner("x", &[]), None);
        assert_eq!(winner("x", &[("off", 0)]), None);
        assert_eq!(take_turn(&mut [0], [(0, 0)].into_iter()), None);
    }

    #[test]
    fn turns_are_smooth_and_by_weight() {
        let mut credit = [0; 3];
        let order: String = (0..7)
            .filter_map(|_| take_turn(&mut credit, [(0, 5), (1, 1), (2, 1)].into_iter()))
            .map(|index| ['a', 'b', 'c'][index])
            .collect();
        assert_eq!(order, "aabacaa");
        assert_eq!(credit, [0; 3]);
    }

    #[test]
    fn scores_compare_as_fractions() {
        let score = |load, weight| Score { load, weight };
        assert!(score(1, 3) < score(1, 2));
        assert!(score(2, 2) == score(3, 3));
        assert!(score(u64::MAX, 2) < score(u64::MAX, 1));
    }
}
