//! Processes and their children: CPU time and memory, read from /proc, and the cores that they may use.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::process::{Child, Command, Stdio};

use anyhow::Context;
use rustix::param::clock_ticks_per_second;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
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

/// The cores that this thread may use, in two parts.
pub struct Parted {
    /// The last one.
    pub one: CpuSet,
    /// All before it.
    pub others: CpuSet,
}

impl Parted {
    /// Fails where there is one core only.
    pub fn cores() -> anyhow::Result<Self> {
        let all = sched_getaffinity(None).context("cannot ask which cores there are")?;
        let last = (0..CpuSet::MAX_CPU).rev().find(|&core| all.is_set(core)).unwrap_or_default();
        let (mut one, mut others) = (CpuSet::new(), all);
        one.set(last);
        others.unset(last);
        anyhow::ensure!(others.count() > 0, "a core of its own for the proxy needs a second one for the load");
        Ok(Self { one, others })
    }
}

/// This thread, and the threads and processes that it starts, on some cores only, until this is dropped.
pub struct Confined {
    before: CpuSet,
}

impl Confined {
    pub fn to(cores: &CpuSet) -> anyhow::Result<Self> {
        let before = sched_getaffinity(None).context("cannot ask which cores there are")?;
        sched_setaffinity(None, cores).context("cannot choose cores")?;
        Ok(Self { before })
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        // They were allowed before; should they have been taken away meanwhile, the system's choice is as good.
        let _ = sched_setaffinity(None, &self.before);
    }
}

/// Cores that don't fall asleep while this lives: on each of them something runs that gives way to everything else. A
/// virtual core that sleeps must be woken by the host, and whether it sleeps depends on how close together events are.
pub struct Awake {
    spinners: Vec<Child>,
}

impl Awake {
    pub fn keep(cores: &CpuSet) -> anyhow::Result<Self> {
        let mut awake = Self { spinners: Vec::new() };
        for core in (0..CpuSet::MAX_CPU).filter(|&core| cores.is_set(core)) {
            let mut one = CpuSet::new();
            one.set(core);
            let _confined = Confined::to(&one)?;
            let mut command = Command::new("chrt");
            // It ends with this process, however that ends.
            command.args(["--idle", "0", "sh", "-c", "while kill -0 $0; do :; done"]);
            command
                .arg(std::process::id().to_string())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            awake
                .spinners
                .push(command.spawn().context("cannot start `chrt` of util-linux, which keeps a core awake")?);
        }
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        for spinner in &mut self.spinners {
            // It has ended already, or it does now.
            let _ = spinner.kill();
            let _ = spinner.wait();
        }
    }
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

    #[test]
    fn a_confined_thread_and_what_it_starts_stay_on_their_cores() {
        // A thread of its own: whoever runs tests beside it keeps all cores.
        let confined = std::thread::spawn(|| {
            let before = sched_getaffinity(None).unwrap();
            let Ok(cores) = Parted::cores() else { return };
            assert_eq!(cores.one.count() + cores.others.count(), before.count());
            let confined = Confined::to(&cores.one).unwrap();
            assert_eq!(std::thread::available_parallelism().unwrap().get(), 1);
            let output = Command::new("nproc").output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "1");
            let awake = Awake::keep(&cores.one).unwrap();
            let spinner = awake.spinners[0].id();
            assert_eq!(tree_ids(&[spinner]), [spinner]);
            drop(awake);
            assert_eq!(tree_ids(&[spinner]), [] as [u32; 0]);
            drop(confined);
            assert_eq!(sched_getaffinity(None).unwrap().count(), before.count());
        });
        confined.join().unwrap();
    }
}
