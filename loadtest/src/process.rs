//! CPU time and memory of processes and their children, read from /proc.

use std::collections::{HashMap, HashSet};
use std::fs;

use rustix::param::clock_ticks_per_second;
use serde::{Deserialize, Serialize};

/// What a set of processes used so far.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Usage {
    pub user_seconds: f64,
    pub system_seconds: f64,
    /// Resident now.
    pub resident_bytes: u64,
    pub processes: usize,
}

impl Usage {
    pub fn cpu_seconds(&self) -> f64 {
        self.user_seconds + self.system_seconds
    }

    /// CPU time since `earlier`; the memory of now.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            user_seconds: (self.user_seconds - earlier.user_seconds).max(0.0),
            system_seconds: (self.system_seconds - earlier.system_seconds).max(0.0),
            ..*self
        }
    }
}

/// Sums over `roots` and all their living descendants. The time of children that ended and were waited for is part of
/// their parent's, so workers that are replaced during a reload are not lost.
pub fn usage(roots: &[u32]) -> Usage {
    let ticks = clock_ticks_per_second().max(1) as f64;
    let processes = tree(roots);
    let mut usage = Usage { processes: processes.len(), ..Usage::default() };
    for stat in &processes {
        usage.user_seconds += stat.user_ticks as f64 / ticks;
        usage.system_seconds += stat.system_ticks as f64 / ticks;
        usage.resident_bytes += resident_bytes(stat.pid);
    }
    usage
}

/// The living processes of `roots` and all their descendants.
pub fn tree_ids(roots: &[u32]) -> Vec<u32> {
    tree(roots).iter().filter(|stat| !stat.ended).map(|stat| stat.pid).collect()
}

/// Busy seconds of the whole machine since it started, over all cores.
pub fn machine_busy_seconds() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let numbers: Vec<f64> =
        text.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest times are within user.
    let busy: f64 = numbers.iter().take(8).enumerate().filter(|(at, _)| !matches!(at, 3 | 4)).map(|(_, n)| n).sum();
    busy / clock_ticks_per_second().max(1) as f64
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Stat {
    pid: u32,
    parent: u32,
    /// A zombie, which waits for its parent to take notice.
    ended: bool,
    user_ticks: u64,
    system_ticks: u64,
}

fn tree(roots: &[u32]) -> Vec<Stat> {
    if roots.is_empty() {
        return Vec::new();
    }
    let all: Vec<Stat> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?))
        .collect();
    let mut children: HashMap<u32, Vec<Stat>> = HashMap::new();
    for stat in &all {
        children.entry(stat.parent).or_default().push(*stat);
    }
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let mut waiting: Vec<Stat> = all.iter().filter(|stat| roots.contains(&stat.pid)).copied().collect();
    while let Some(stat) = waiting.pop() {
        if seen.insert(stat.pid) {
            found.push(stat);
            waiting.extend(children.get(&stat.pid).into_iter().flatten().copied());
        }
    }
    found
}

/// Reads a line of /proc/PID/stat (proc(5)); the second field may hold spaces and parentheses.
fn parse_stat(line: &str) -> Option<Stat> {
    let (pid, rest) = line.split_once(" (")?;
    let fields: Vec<&str> = rest.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u64>().ok());
    Some(Stat {
        pid: pid.parse().ok()?,
        parent: u32::try_from(number(4)?).ok()?,
        ended: fields.first() == Some(&"Z"),
        user_ticks: number(14)? + number(16)?,
        system_ticks: number(15)? + number(17)?,
    })
}

fn resident_bytes(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kibibytes = text
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_with_an_odd_name_is_read() {
        let line = "42 (a (b) c) S 7 42 42 0 -1 4194304 100 0 0 0 11 12 3 4 20 0 1 0 100 1000 200 18446744073709551615";
        assert_eq!(parse_stat(line), Some(Stat { pid: 42, parent: 7, ended: false, user_ticks: 14, system_ticks: 16 }));
        assert_eq!(parse_stat("nonsense"), None);
    }

    #[test]
    fn this_process_is_measured() {
        let usage = usage(&[std::process::id()]);
        assert!(usage.processes >= 1 && usage.resident_bytes > 100_000, "{usage:?}");
        assert!(machine_busy_seconds() > 0.0);
    }

    #[test]
    fn no_roots_use_nothing() {
        assert_eq!(usage(&[]), Usage::default());
    }
}
