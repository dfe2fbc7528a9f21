//! Certainty: how strongly counts speak against a claim, at every moment and not only at one chosen beforehand.
//!
//! Each function gives ln E of an *e-process*: a number that starts at 1 and of which, as long as the claim is true, the
//! chance of *ever* reaching 1/a is at most a, however often it is looked at (Ville's inequality). So "E reached 1/a" may be
//! asked after every run and acted upon at once, which a p-value of a fixed sample may not.
//!
//! The construction is universal inference (Wasserman, Ramdas, Balakrishnan: "Universal inference", PNAS 2020) with a
//! mixture above the line: the likelihood of the counts under a Beta prior, divided by their greatest likelihood under the
//! claim. Above the line stands a martingale under each single member of the claim, and the line below is at least that
//! member's likelihood; nothing is approximated and no sample is too small. How many runs go to which side does not
//! matter, as long as it doesn't depend on how these runs end.

/// Runs, and how many of them are what is counted (failed, or slower than a bound).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub hits: u64,
    pub of: u64,
}

/// A Beta distribution: where a rate is expected before anything was seen. It only decides how soon a difference is
/// noticed, never how often an error is made.
#[derive(Clone, Copy, Debug)]
pub struct Prior {
    hits: f64,
    misses: f64,
}

impl Prior {
    /// A version in service fails seldom, and of times one in twenty is above a 95th percentile.
    pub const TWENTIETH: Prior = Prior { hits: 0.5, misses: 9.5 };
    /// More than one time in twenty is above what should be one.
    pub const TENTH: Prior = Prior { hits: 2.0, misses: 18.0 };
    /// A new version that is bad fails often.
    pub const FIFTH: Prior = Prior { hits: 2.0, misses: 8.0 };
}

/// ln E against the claim that the rate behind `count` is at most `limit`. Below 0 where `count` does not speak against it.
pub fn against_at_most(limit: f64, count: Count, prior: Prior) -> f64 {
    ln_mixture(count, prior) - ln_likelihood(count, count.rate().min(limit))
}

/// ln E against the claim that the rate behind `count` is at least `limit`.
pub fn against_at_least(limit: f64, count: Count, prior: Prior) -> f64 {
    ln_mixture(count, prior) - ln_likelihood(count, count.rate().max(limit))
}

/// ln E against the claim that the rate behind `to` is at most `ratio` times that behind `from`, whatever that is;
/// negative infinity where the counts don't speak against it at all.
pub fn against_ratio(ratio: f64, from: Count, to: Count) -> f64 {
    if from.of == 0 || to.of == 0 || to.rate() <= ratio * from.rate() {
        return f64::NEG_INFINITY;
    }
    let rate = likeliest_rate_of_from(ratio, from, to);
    let claimed = ln_likelihood(from, rate) + ln_likelihood(to, (ratio * rate).min(1.0));
    ln_mixture(from, Prior::TWENTIETH) + ln_mixture(to, Prior::FIFTH) - claimed
}

/// ln of the mean of E and 1, which is an e-process too: half of a doubt costs at most that half, however little the counts
/// speak against the claim.
pub fn hedged(e_ln: f64) -> f64 {
    e_ln.max(0.0) + (-e_ln.abs()).exp().ln_1p() - std::f64::consts::LN_2
}

impl Count {
    /// 0 where there are no runs.
    pub fn rate(self) -> f64 {
        if self.of == 0 { 0.0 } else { self.hits as f64 / self.of as f64 }
    }

    fn misses(self) -> f64 {
        (self.of - self.hits) as f64
    }
}

/// ln of the chance of exactly this sequence of outcomes where the rate was drawn from `prior`.
fn ln_mixture(count: Count, prior: Prior) -> f64 {
    ln_beta(count.hits as f64 + prior.hits, count.misses() + prior.misses) - ln_beta(prior.hits, prior.misses)
}

fn ln_beta(a: f64, b: f64) -> f64 {
    libm::lgamma(a) + libm::lgamma(b) - libm::lgamma(a + b)
}

/// ln of the chance of exactly this sequence of outcomes at `rate`.
fn ln_likelihood(count: Count, rate: f64) -> f64 {
    // 0 * ln 0 is 0 here: what never happened tells nothing against a rate of 0.
    let term = |times: f64, chance: f64| if times == 0.0 { 0.0 } else { times * chance.ln() };
    term(count.hits as f64, rate) + term(count.misses(), 1.0 - rate)
}

/// Which rate of `from` makes both counts likeliest where that of `to` is just `ratio` times it: the lower root of the
/// derivative's quadratic (Miettinen, Nurminen: "Comparative analysis of two rates", Statistics in Medicine 1985).
fn likeliest_rate_of_from(ratio: f64, from: Count, to: Count) -> f64 {
    let hits = (from.hits + to.hits) as f64;
    let a = ratio * (from.of + to.of) as f64;
    let b = hits * (1.0 + ratio) + ratio * to.misses() + from.misses();
    let discriminant = (b * b - 4.0 * a * hits).max(0.0);
    2.0 * hits / (b + discriminant.sqrt())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn count(hits: u64, of: u64) -> Count {
        Count { hits, of }
    }

    #[test]
    fn a_clear_difference_is_certain_and_none_is_not() {
        assert!(against_ratio(2.0, count(0, 5000), count(10, 50)) > 20.0_f64.ln());
        assert!(against_ratio(2.0, count(50, 5000), count(15, 75)) > 100.0_f64.ln());
        assert_eq!(against_ratio(2.0, count(10, 50), count(20, 100)), f64::NEG_INFINITY);
        assert_eq!(against_ratio(2.0, count(0, 0), count(20, 100)), f64::NEG_INFINITY);
        assert!(against_at_most(0.05, count(20, 100), Prior::FIFTH) > 20.0_f64.ln());
        assert!(against_at_most(0.05, count(6, 100), Prior::FIFTH) < 0.0);
    }

    /// E-values: the mean of E over everything that can be seen is at most 1 where the claim just holds. All outcomes of
    /// a small sample are summed, each with its exact chance.
    #[test]
    fn the_mean_of_e_is_at_most_one_where_the_claim_holds() {
        let chance = |rate: f64, of: u64, hits: u64| {
            let choose = -ln_beta(hits as f64 + 1.0, (of - hits) as f64 + 1.0) - ((of + 1) as f64).ln();
            (choose + ln_likelihood(count(hits, of), rate)).exp()
        };
        for (ratio, rate) in [(1.0, 0.05), (2.0, 0.01), (2.0, 0.2), (2.0, 0.5), (0.5, 0.9), (1.5, 0.001)] {
            let (of_from, of_to) = (40, 25);
            let mut mean = 0.0;
            let mut whole = 0.0;
            for from in 0..=of_from {
                for to in 0..=of_to {
                    let chance = chance(rate, of_from, from) * chance(rate * ratio, of_to, to);
                    whole += chance;
                    mean += chance * against_ratio(ratio, count(from, of_from), count(to, of_to)).exp();
                }
            }
            assert!((whole - 1.0).abs() < 1e-9, "the chances add up: {whole}");
            assert!(mean <= 1.0 && mean > 0.0, "ratio {ratio}, rate {rate}: {mean}");
        }
        for (rate, prior) in [(0.05, Prior::TENTH), (0.05, Prior::FIFTH), (0.02, Prior::FIFTH)] {
            let mean = |e_ln: fn(f64, Count, Prior) -> f64| -> f64 {
                (0..=60).map(|hits| chance(rate, 60, hits) * e_ln(rate, count(hits, 60), prior).exp()).sum()
            };
            assert!(mean(against_at_most) <= 1.0 && mean(against_at_least) <= 1.0, "rate {rate}");
        }
    }

    #[test]
    fn a_hedge_is_the_mean_with_one() {
        for e in [0.0, 1e-9, 0.5, 1.0, 3.0, 1e6] {
            let hedge = hedged(f64::ln(e)).exp();
            assert!((hedge - (e + 1.0) / 2.0).abs() < 1e-9 * (e + 1.0), "{e}: {hedge}");
        }
        assert_eq!(hedged(1e4), 1e4 - std::f64::consts::LN_2, "without overflow");
    }

    proptest! {
        /// The rate below the line is the likeliest of all that the claim allows at its edge.
        #[test]
        fn the_likeliest_rate_is_found(
            ratio in 0.2..5.0_f64, of in (1..400_u64, 1..400_u64), parts in (0.0..=1.0_f64, 0.0..=1.0_f64), other in 0.0..=1.0_f64,
        ) {
            let from = count((of.0 as f64 * parts.0) as u64, of.0);
            let to = count((of.1 as f64 * parts.1) as u64, of.1);
            prop_assume!(to.rate() > ratio * from.rate());
            let at = |rate: f64| ln_likelihood(from, rate) + ln_likelihood(to, (ratio * rate).min(1.0));
            let found = likeliest_rate_of_from(ratio, from, to);
            prop_assert!(found >= 0.0 && found <= 1.0_f64.min(1.0 / ratio) + 1e-9);
            let other = other * 1.0_f64.min(1.0 / ratio);
            let (best, compared) = (at(found), at(other));
            prop_assert!(compared.is_nan() || best >= compared - 1e-6, "{best} at {found}, {compared} at {other}");
        }
    }
}
