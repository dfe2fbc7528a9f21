//! Termination: whether the time that a process manager lets a process finish is long enough for `shutdown`.
//!
//! Nothing tells a container its pod's `terminationGracePeriodSeconds` (the downward API doesn't have it), so the manifest
//! says it twice: there, and in an environment variable.

use std::time::Duration;

use super::Shutdown;
use super::values::parse_duration;

/// Where the manifest repeats the grace period: `671s`, or as there in seconds without a unit.
pub const GRACE_VARIABLE: &str = "LONGHAUL_TERMINATION_GRACE_PERIOD";
/// What is left at `shutdown.timeout` is cut within this part of it (`state::core::SPREAD_PART`).
const SPREAD_PART: u32 = 10;
/// Last words to clients, and the process's own end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// From SIGTERM to the end, at the longest.
pub fn longest_end(shutdown: &Shutdown) -> Duration {
    let timeout = shutdown.timeout;
    shutdown.delay.saturating_add(timeout).saturating_add(timeout / SPREAD_PART).saturating_add(LAST_WORDS)
}

/// What there is to say about `shutdown`, where the environment tells the grace period.
pub fn warning(shutdown: &Shutdown, environment: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    let text = environment(GRACE_VARIABLE)?;
    let grace = match text.trim().parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => match parse_duration(text.trim()) {
            Ok(grace) => grace,
            Err(message) => {
                return Some(format!(
                    "{GRACE_VARIABLE} is not understood, so the grace period is not checked: {message}"
                ));
            }
        },
    };
    let needed = longest_end(shutdown);
    (grace < needed).then(|| {
        let seconds = needed.as_millis().div_ceil(1000);
        format!(
            "the process is killed {}s after SIGTERM ({GRACE_VARIABLE}), but its drain may take {seconds}s: \
             delay + 1.1 x timeout + 1s. Runs would be cut without a word; set terminationGracePeriodSeconds \
             to {seconds} or more, or shorten `shutdown.timeout`",
            grace.as_secs_f64()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(delay_ms: u64, timeout_ms: u64, grace: &str) -> Option<String> {
        let (delay, timeout) = (Duration::from_millis(delay_ms), Duration::from_millis(timeout_ms));
        warning(&Shutdown { delay, timeout }, &|name| (name == GRACE_VARIABLE).then(|| grace.to_owned()))
    }

    #[test]
    fn a_grace_period_is_long_enough_or_the_needed_one_is_said() {
        assert_eq!(said(5_000, 600_000, "666"), None);
        assert_eq!(said(5_000, 600_000, "12m"), None);
        let short = said(5_000, 600_000, "30").expect("a warning");
        assert!(short.contains("killed 30s after") && short.contains("to 666 or more"), "{short}");
        let short = said(0, 1_005, "2s").expect("a warning");
        assert!(short.contains("may take 3s"), "seconds are rounded up: {short}");
    }

    #[test]
    fn nothing_is_said_where_nobody_tells_and_nonsense_is_named() {
        let shutdown = Shutdown { delay: Duration::ZERO, timeout: Duration::from_secs(600) };
        assert_eq!(warning(&shutdown, &|_| None), None);
        let odd = said(0, 1_000, "half an hour").expect("a warning");
        assert!(odd.contains("not understood") && odd.contains("half an hour"), "{odd}");
    }
}
