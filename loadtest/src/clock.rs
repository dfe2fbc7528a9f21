//! The one clock of the load test: CLOCK_MONOTONIC, the same for every process of the machine.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};
use tokio::io::unix::AsyncFd;

/// Nanoseconds of CLOCK_MONOTONIC.
///
/// `std::time::Instant` reads the same clock but hides the number, and an event's send time has to travel from the
/// agent's process to the generator's.
pub fn monotonic_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A duration in whole nanoseconds, at most some 584 years.
pub fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A timer of the kernel's (timerfd_create(2)), good to some ten microseconds.
///
/// The runtime's own timers go off together, each millisecond: events of different streams would come in bursts, and how
/// many of a burst a proxy meets at once would depend on how fast agent and client are at that number of streams.
pub struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    #[expect(deprecated, reason = "its successor is unsafe for kinds that lie about their descriptor; OwnedFd doesn't")]
    pub fn new() -> io::Result<Self> {
        let descriptor = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Self(AsyncFd::new(descriptor)?))
    }

    /// Waits until the clock shows `due_ns`.
    pub async fn wait_until_ns(&self, due_ns: u64) -> io::Result<()> {
        if monotonic_ns() >= due_ns {
            return Ok(());
        }
        let due = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec { tv_sec: (due_ns / 1_000_000_000) as i64, tv_nsec: (due_ns % 1_000_000_000) as i64 },
        };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::ABSTIME, &due)?;
        // What the timer tells besides its readiness, how often it went off, is nothing to wait for: it isn't read.
        while monotonic_ns() < due_ns {
            self.0.readable().await?.clear_ready();
        }
        Ok(())
    }
}

/// Reads `250ms`, `30s`, `5m`, `1h` or a bare number of seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let wrong = || format!("`{text}` is not a duration: write it as 250ms, 30s, 5m or 1h");
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "" | "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(wrong()),
    };
    if !(0.0..=1e6).contains(&seconds) {
        return Err(wrong());
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_unit() {
        for (text, milliseconds) in [("250ms", 250), ("30s", 30_000), ("1.5", 1_500), ("5m", 300_000)] {
            assert_eq!(parse_duration(text).unwrap().as_millis(), milliseconds, "{text}");
        }
        for wrong in ["", "fast", "3 weeks", "-1s", "NaN"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_timer_is_never_early_and_serves_again() {
        let timer = Timer::new().unwrap();
        for wait_us in [300, 1, 2_700, 0] {
            let due_ns = monotonic_ns() + wait_us * 1_000;
            timer.wait_until_ns(due_ns).await.unwrap();
            assert!(monotonic_ns() >= due_ns, "{wait_us}");
        }
    }

    #[tokio::test]
    async fn timers_within_a_millisecond_go_off_one_after_the_other() {
        // The runtime's timers go off together or a whole millisecond apart. On a busy machine a round may be disturbed.
        let give_up_ns = monotonic_ns() + 10_000_000_000;
        let mut spread = false;
        while !spread && monotonic_ns() < give_up_ns {
            let (first, second) = (Timer::new().unwrap(), Timer::new().unwrap());
            let start_ns = monotonic_ns() + 2_000_000;
            let (first_ns, second_ns) =
                tokio::join!(async { first.wait_until_ns(start_ns).await.map(|()| monotonic_ns()) }, async {
                    second.wait_until_ns(start_ns + 400_000).await.map(|()| monotonic_ns())
                },);
            spread = (200_000..700_000).contains(&second_ns.unwrap().saturating_sub(first_ns.unwrap()));
        }
        assert!(spread);
    }

    #[test]
    fn the_clock_does_not_go_back() {
        let first = monotonic_ns();
        assert!(monotonic_ns() >= first);
    }
}
