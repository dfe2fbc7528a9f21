//! The generator: sends the plan at its times, measures the steady window, and gathers the report.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::client::Clients;
use crate::clock::{monotonic_ns, nanoseconds};
use crate::plan::{PlannedSession, Planner};
use crate::process::{Usage, machine_busy_seconds, usage};
use crate::statistics::{Counts, Fault, Latency, Moment, Percentiles, Statistics};
use crate::workload::Workload;

/// Everything that a load test found.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Report {
    pub workload: Workload,
    pub seconds: f64,
    pub counts: Counts,
    /// How many faults of each kind.
    pub faults: BTreeMap<Fault, u64>,
    /// The first explanation of each kind.
    pub fault_examples: BTreeMap<Fault, String>,
    pub answer: Percentiles,
    pub event: Percentiles,
    pub first_event: Percentiles,
    pub lateness: Percentiles,
    pub window: WindowReport,
    pub timeline: Vec<Moment>,
}

/// What the steady window held.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct WindowReport {
    pub seconds: f64,
    pub events: u64,
    pub answers: u64,
    /// Of the given processes; absent without them.
    pub processes: Option<ProcessReport>,
    /// CPU time of this generator, in cores.
    pub generator_cores: f64,
    /// CPU time of everything on this machine, in cores.
    pub machine_cores: f64,
}

/// What the measured processes used in the window.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct ProcessReport {
    pub cores: f64,
    /// Absent without events.
    pub cpu_us_per_event: Option<f64>,
    pub user_us_per_event: Option<f64>,
    /// Absent without answers.
    pub cpu_us_per_answer: Option<f64>,
    pub user_us_per_answer: Option<f64>,
    pub resident_mib_before: f64,
    pub resident_mib: f64,
    /// Runs in flight at the end of the window.
    pub open: u64,
    /// What was added to the resident memory since before the first arrival, over the runs in flight.
    pub resident_kib_per_open: Option<f64>,
}

impl Report {
    pub fn fault_count(&self) -> u64 {
        self.faults.values().sum()
    }
}

/// A runtime with so many threads; one thread has no queues between cores.
pub fn runtime(threads: usize) -> anyhow::Result<Runtime> {
    let mut builder = if threads <= 1 {
        tokio::runtime::Builder::new_current_thread()
    } else {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(threads);
        builder
    };
    builder.enable_all().build().context("cannot start the runtime")
}

/// Pieces of the line over time.
const MOMENT: Duration = Duration::from_millis(500);
const MOMENTS_MAX: u32 = 4000;
const ARRIVALS_QUEUED_MAX: usize = 4096;

/// Carries out a workload. `title` heads the progress bar, which shows on a terminal only.
pub async fn execute(workload: Workload, title: &str) -> anyhow::Result<Report> {
    workload.check()?;
    rlimit::increase_nofile_limit(u64::MAX).context("cannot raise the limit of descriptors")?;
    let statistics = Arc::new(Statistics::new());
    let (release, released) = watch::channel(false);
    let clients = Arc::new(Clients::new(workload.clone(), statistics.clone(), released).await?);
    let before = usage(&workload.pids);
    let start_ns = monotonic_ns() + 5_000_000;

    let watcher = tokio::spawn(watch_window(workload.clone(), statistics.clone(), start_ns, before, release));
    let progress = tokio::spawn(show_progress(workload.clone(), statistics.clone(), start_ns, title.to_owned()));
    match workload.arrivals.concurrency {
        None => open_loop(&workload, &clients, &statistics, start_ns).await?,
        Some(concurrency) => closed_loop(&workload, &clients, concurrency, start_ns).await,
    }
    let window = watcher.await.context("the window's task broke")?;
    progress.abort();
    Ok(Report {
        seconds: (monotonic_ns() - start_ns) as f64 / 1e9,
        counts: statistics.counts(),
        faults: statistics.faults(),
        fault_examples: statistics.fault_examples(),
        answer: statistics.percentiles(Latency::Answer),
        event: statistics.percentiles(Latency::Event),
        first_event: statistics.percentiles(Latency::FirstEvent),
        lateness: statistics.percentiles(Latency::Lateness),
        window,
        timeline: statistics.timeline(),
        workload,
    })
}

/// Sends each session at its time, whatever became of those before it.
async fn open_loop(
    workload: &Workload,
    clients: &Arc<Clients>,
    statistics: &Arc<Statistics>,
    start_ns: u64,
) -> anyhow::Result<()> {
    let (send, mut arrivals) = mpsc::channel::<PlannedSession>(ARRIVALS_QUEUED_MAX);
    let plan = workload.clone();
    // A thread of its own sleeps to within some ten microseconds; the runtime's timers have a grain of a millisecond.
    let clock = std::thread::Builder::new().name("arrivals".to_owned()).spawn(move || {
        for session in Planner::new(&plan) {
            let wait_ns = (start_ns + session.at_ns).saturating_sub(monotonic_ns());
            std::thread::sleep(Duration::from_nanos(wait_ns));
            if send.blocking_send(session).is_err() {
                return;
            }
        }
    })?;
    let mut running = JoinSet::new();
    while let Some(session) = arrivals.recv().await {
        while running.try_join_next().is_some() {}
        if running.len() >= workload.max_in_flight {
            statistics.fault(Fault::Overload, "more runs in flight than max_in_flight");
            continue;
        }
        let intended_ns = start_ns + session.at_ns;
        let (clients, statistics) = (clients.clone(), statistics.clone());
        running.spawn(async move {
            statistics.latency(Latency::Lateness, monotonic_ns().saturating_sub(intended_ns));
            clients.session(&session, intended_ns).await;
        });
    }
    // Every run has a deadline of its own, so this ends.
    while running.join_next().await.is_some() {}
    clock.join().map_err(|_| anyhow::anyhow!("the thread of arrivals broke"))
}

/// Keeps so many clients busy until the duration is over.
async fn closed_loop(workload: &Workload, clients: &Arc<Clients>, concurrency: u32, start_ns: u64) {
    let end_ns = start_ns + nanoseconds(workload.arrivals.duration.0);
    let planner = Arc::new(tokio::sync::Mutex::new(OwnedPlanner::new(workload)));
    let mut running = JoinSet::new();
    for _ in 0..concurrency {
        let (clients, planner) = (clients.clone(), planner.clone());
        running.spawn(async move {
            while monotonic_ns() < end_ns {
                let Some(session) = planner.lock().await.next() else { return };
                clients.session(&session, monotonic_ns()).await;
            }
        });
    }
    while running.join_next().await.is_some() {}
}

/// A planner that clients on several threads can share: it draws in batches from a plan of its own.
struct OwnedPlanner {
    workload: Workload,
    drawn: std::vec::IntoIter<PlannedSession>,
    batch: u64,
}

impl OwnedPlanner {
    const BATCH: u64 = 1024;

    fn new(workload: &Workload) -> Self {
        Self { workload: workload.clone(), drawn: Vec::new().into_iter(), batch: 0 }
    }

    fn next(&mut self) -> Option<PlannedSession> {
        if let Some(session) = self.drawn.next() {
            return Some(session);
        }
        let first = self.batch * Self::BATCH;
        let limit = self.workload.arrivals.limit;
        let left = if limit == 0 { Self::BATCH } else { limit.saturating_sub(first).min(Self::BATCH) };
        let mut batch = self.workload.clone();
        batch.seed = self.workload.seed.wrapping_add(self.batch);
        self.batch += 1;
        let drawn: Vec<_> = Planner::new(&batch)
            .take(left as usize)
            .map(|session| PlannedSession { number: session.number + first, ..session })
            .collect();
        self.drawn = drawn.into_iter();
        self.drawn.next()
    }
}

/// Measures between the window's ends; afterwards lets idle streams go.
async fn watch_window(
    workload: Workload,
    statistics: Arc<Statistics>,
    start_ns: u64,
    before: Usage,
    release: watch::Sender<bool>,
) -> WindowReport {
    sleep_until_ns(start_ns + nanoseconds(workload.window.from.0)).await;
    statistics.record(true);
    let (from_ns, counts_from, machine_from) = (monotonic_ns(), statistics.counts(), machine_busy_seconds());
    let (usage_from, generator_from) = (usage(&workload.pids), own_cpu_seconds());
    sleep_until_ns(start_ns + nanoseconds(workload.window_end())).await;
    let counts = statistics.counts();
    statistics.record(false);
    let now = usage(&workload.pids);
    let seconds = (monotonic_ns() - from_ns) as f64 / 1e9;
    let generator_seconds = own_cpu_seconds() - generator_from;
    let machine_seconds = machine_busy_seconds() - machine_from;
    // Nobody listens any more if no run is open.
    let _ = release.send(true);

    let events = counts.events - counts_from.events;
    let answers = counts.answers - counts_from.answers;
    let used = now.since(&usage_from);
    let microseconds_per = |seconds: f64, count: u64| (count > 0).then(|| seconds * 1e6 / count as f64);
    let processes = (!workload.pids.is_empty()).then(|| ProcessReport {
        cores: used.cpu_seconds() / seconds,
        cpu_us_per_event: microseconds_per(used.cpu_seconds(), events),
        user_us_per_event: microseconds_per(used.user_seconds, events),
        cpu_us_per_answer: microseconds_per(used.cpu_seconds(), answers),
        user_us_per_answer: microseconds_per(used.user_seconds, answers),
        resident_mib_before: before.resident_bytes as f64 / 1048576.0,
        resident_mib: now.resident_bytes as f64 / 1048576.0,
        open: counts.open,
        resident_kib_per_open: (counts.open > 0)
            .then(|| (now.resident_bytes as f64 - before.resident_bytes as f64) / 1024.0 / counts.open as f64),
    });
    WindowReport {
        seconds,
        events,
        answers,
        processes,
        generator_cores: generator_seconds / seconds,
        machine_cores: machine_seconds / seconds,
    }
}

/// Of this process without its children, which `usage` would add.
fn own_cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

async fn show_progress(workload: Workload, statistics: Arc<Statistics>, start_ns: u64, title: String) {
    let total = workload.arrivals.duration.0.max(workload.window_end());
    let bar = ProgressBar::new(u64::try_from(total.as_millis()).unwrap_or(u64::MAX));
    let style = ProgressStyle::with_template("{prefix} [{bar:30}] {elapsed} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(title);
    let moment = MOMENT.max(total / MOMENTS_MAX);
    let mut last_ns = start_ns;
    loop {
        tokio::time::sleep(moment).await;
        let now_ns = monotonic_ns();
        let seconds = now_ns.saturating_sub(start_ns) as f64 / 1e9;
        let length = now_ns.saturating_sub(last_ns).max(1) as f64 / 1e9;
        last_ns = now_ns;
        let now = statistics.end_moment(seconds, length);
        bar.set_position((seconds * 1e3) as u64);
        let faults: u64 = statistics.faults().values().sum();
        bar.set_message(format!(
            "{} open, {:.0} events/s, {:.0} answers/s, p99 {:.2} ms, {faults} faults",
            now.open, now.events_per_second, now.answers_per_second, now.p99_ms
        ));
    }
}

async fn sleep_until_ns(due_ns: u64) {
    tokio::time::sleep(Duration::from_nanos(due_ns.saturating_sub(monotonic_ns()))).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_planner_numbers_sessions_without_end_or_up_to_the_limit() {
        let text = "target: x\nmix: [{kind: short}]\narrivals: {concurrency: 2, limit: 2000}";
        let mut planner = OwnedPlanner::new(&Workload::parse(text).unwrap());
        let numbers: Vec<u64> = std::iter::from_fn(|| planner.next()).map(|session| session.number).collect();
        assert_eq!(numbers, (0..2000).collect::<Vec<_>>());
        let text = "target: x\nmix: [{kind: short}]\narrivals: {concurrency: 2}";
        let mut planner = OwnedPlanner::new(&Workload::parse(text).unwrap());
        assert!((0..5000).all(|_| planner.next().is_some()));
    }
}
