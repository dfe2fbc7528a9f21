//! `loadtest compare`: longhaul, other proxies, the floor and no proxy, in interleaved rounds on this machine.

mod outcome;
mod peer;
mod work;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::SignalKind;

use crate::agent::BoardReport;
use crate::balance::{Policy, simulate};
use crate::clock::{monotonic_ns, nanoseconds, parse_duration};
use crate::process::usage;
use crate::run::{Report, execute, runtime};
use crate::tls::TestCertificate;
use crate::workload::Workload;
use outcome::Outcome;
use peer::{AgentProcess, Peer, Programs, Reload, Running, Setup};
use work::{BACKENDS, INTERVAL, Item, SLOTS, Scale, trace};

/// Flags of `loadtest compare`.
#[derive(Args, Clone, Debug)]
pub struct CompareOptions {
    /// How often everything is measured (default: 5; with --quick: once)
    #[arg(long)]
    rounds: Option<u32>,
    /// Which work: a short, b streams, c idle, d TLS, e HTTP/2, f balance, g reloads, h half load, i growth
    /// (default: all; with --quick: a,b,c,f)
    #[arg(long, value_delimiter = ',')]
    work: Vec<String>,
    /// Which contestants (default: all that are installed)
    #[arg(long, value_delimiter = ',', value_enum)]
    peers: Vec<Peer>,
    /// The longhaul program
    #[arg(long, default_value = "target/release/longhaul")]
    longhaul: PathBuf,
    /// The Envoy program (default: peers/.venv/bin/envoy, then the search path)
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// Small and short: to see that everything works, not to measure
    #[arg(long)]
    quick: bool,
    /// Idle streams; each takes two descriptors of a proxy
    #[arg(long)]
    idle: Option<u32>,
    /// No work is begun after this
    #[arg(long, value_parser = parse_duration, default_value = "2h")]
    total: Duration,
    /// Where compare.json and compare.html are written
    #[arg(long, default_value = "target/compare")]
    output: PathBuf,
}

const ROUNDS_MAX: u32 = 1000;

/// Runs the comparison and prints its tables. False if any contestant failed to run or had faults.
pub fn main(options: &CompareOptions) -> anyhow::Result<bool> {
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 5 });
    anyhow::ensure!((1..=ROUNDS_MAX).contains(&rounds), "--rounds must be 1 to {ROUNDS_MAX}");
    stop_on_signals()?;
    let (_, descriptors) = rlimit::Resource::NOFILE.get()?;
    rlimit::increase_nofile_limit(u64::MAX).context("cannot raise the limit of descriptors")?;
    let mut scale = if options.quick { Scale::QUICK } else { Scale::FULL };
    scale.idle = options.idle.unwrap_or(scale.idle);
    let allowed = u32::try_from(descriptors.saturating_sub(1000) / 2).unwrap_or(u32::MAX);
    if scale.idle > allowed {
        eprintln!("the limit of {descriptors} descriptors allows {allowed} idle streams, not {}", scale.idle);
        scale.idle = allowed;
    }
    let mut items = Vec::new();
    let default_work = if options.quick { "a,b,c,f" } else { "a,b,c,d,e,f,g,h,i" };
    let default_work: Vec<String> = default_work.split(',').map(str::to_owned).collect();
    for letter in if options.work.is_empty() { &default_work } else { &options.work } {
        items.extend(
            Item::of_letter(letter).with_context(|| format!("--work: there is no work `{letter}`, only a to i"))?,
        );
    }
    let local_envoy = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/.venv/bin/envoy");
    let envoy = options.envoy.clone().or_else(|| local_envoy.is_file().then_some(local_envoy));
    let programs = Programs { longhaul: options.longhaul.clone(), envoy };
    let mut outcome = Outcome { machine: machine(), ..Outcome::default() };
    let wanted = if options.peers.is_empty() { Peer::ALL.to_vec() } else { options.peers.clone() };
    let mut peers = Vec::new();
    for peer in wanted {
        match peer.version(&programs) {
            Some(version) => {
                outcome.versions.insert(peer.name().to_owned(), version);
                peers.push(peer);
            }
            None => outcome.notes.push(format!("{} is not installed here and is left out", peer.name())),
        }
    }

    let folder = tempfile::tempdir()?;
    let certificate = TestCertificate::create(folder.path())?;
    let mut comparison = Comparison {
        scale,
        folder: folder.path(),
        certificate: &certificate,
        programs: &programs,
        outcome,
        half_load: 0.0,
        agent_cores_max: 0.0,
        generator_cores_max: 0.0,
    };
    let end_ns = monotonic_ns() + nanoseconds(options.total);
    if items.contains(&Item::HalfLoad)
        && let Err(error) = comparison.find_half_load()
    {
        let failure = format!("left out, as the saturating load could not be found: {error:#}");
        comparison.outcome.add_failure(&Item::HalfLoad.title(), Peer::Floor.name(), failure);
        items.retain(|item| *item != Item::HalfLoad);
    }
    'rounds: for round in 1..=rounds {
        for &item in &items {
            for turn in 0..peers.len() {
                if STOPPED.load(Ordering::Relaxed) {
                    comparison.outcome.notes.push(format!("stopped by a signal in round {round}"));
                    break 'rounds;
                }
                if monotonic_ns() > end_ns {
                    comparison.outcome.notes.push(format!("the time of --total was over in round {round}"));
                    break 'rounds;
                }
                // Each round begins with another contestant: none is always the first or after the same one.
                let peer = peers[(turn + round as usize - 1) % peers.len()];
                if item.concerns(peer) {
                    let title = format!("{round}/{rounds} {} {}", &item.title()[..1], peer.name());
                    comparison.measure(item, peer, round, &title);
                }
            }
            if item == Item::Balance {
                comparison.simulate_balance(round);
            }
        }
    }

    let mut outcome = comparison.outcome;
    outcome.notes.push(format!(
        "busiest item: the mock agent used {:.2} cores and this generator {:.2}; near 1.00 one of them would be the bottleneck",
        comparison.agent_cores_max, comparison.generator_cores_max
    ));
    add_differences(&mut outcome);
    sort_contestants(&mut outcome, &peers);
    print!("{}", outcome.table());
    std::fs::create_dir_all(&options.output)?;
    std::fs::write(options.output.join("compare.json"), serde_json::to_vec_pretty(&outcome)?)?;
    std::fs::write(options.output.join("compare.html"), outcome.page())?;
    println!("\nwritten: {}", options.output.join("compare.{json,html}").display());
    Ok(outcome.items.iter().flat_map(|item| &item.contestants).all(|one| one.failures.is_empty() && one.faults == 0))
}

struct Comparison<'a> {
    scale: Scale,
    folder: &'a Path,
    certificate: &'a TestCertificate,
    programs: &'a Programs,
    outcome: Outcome,
    /// Events a second.
    half_load: f64,
    agent_cores_max: f64,
    generator_cores_max: f64,
}

impl Comparison<'_> {
    /// Measures one contestant at one item; what fails is noted and the comparison goes on.
    fn measure(&mut self, item: Item, peer: Peer, round: u32, title: &str) {
        let name = peer.name();
        match self.try_measure(item, peer, round, title) {
            Ok((report, board)) => {
                for figure in item.figures(&report) {
                    self.outcome.add(&item.title(), name, round, figure.name, figure.value);
                }
                if let Some(board) = board {
                    self.add_board(name, round, &board);
                }
                self.outcome.add_faults(&item.title(), name, report.fault_count());
                for (fault, count) in &report.faults {
                    let example = report.fault_examples.get(fault).map(String::as_str).unwrap_or_default();
                    self.outcome.add_failure(
                        &item.title(),
                        name,
                        format!("round {round}: {count} x {fault:?} {example}"),
                    );
                }
            }
            Err(error) => self.outcome.add_failure(&item.title(), name, format!("round {round}: {error:#}")),
        }
    }

    fn try_measure(
        &mut self,
        item: Item,
        peer: Peer,
        round: u32,
        title: &str,
    ) -> anyhow::Result<(Report, Option<BoardReport>)> {
        let balance = item == Item::Balance;
        let agent = AgentProcess::start(BACKENDS, balance.then_some(SLOTS))?;
        let running = self.start(peer, item, &agent)?;
        let mut workload = item.workload(&running.target, &self.scale, self.half_load);
        workload.pids = running.pid().into_iter().collect();
        // All contestants of a round meet the same arrivals and lengths.
        workload.seed = round.into();
        let (agent_before, began_ns) = (usage(&[agent.pid()]), monotonic_ns());
        let measured = async {
            warm_up(&workload).await?;
            let window = (workload.window.from.0, workload.window_end());
            let board = async {
                match balance {
                    true => watch_board(agent.addresses[0], window).await.map(Some),
                    false => Ok(None),
                }
            };
            let reloads = async {
                match item {
                    Item::Reloads => reload_each_second(&running, workload.window_end()).await,
                    _ => Vec::new(),
                }
            };
            let (report, board, failed) = tokio::join!(execute(workload.clone(), title), board, reloads);
            anyhow::Ok((report?, board?, failed))
        };
        let (report, board, failed_reloads) = runtime(1)?.block_on(unless_stopped(measured))?;
        for failure in failed_reloads {
            self.outcome.add_failure(&item.title(), peer.name(), failure);
        }
        let agent_seconds = usage(&[agent.pid()]).since(&agent_before).cpu_seconds();
        let seconds = (monotonic_ns() - began_ns) as f64 / 1e9;
        self.agent_cores_max = self.agent_cores_max.max(agent_seconds / seconds);
        self.generator_cores_max = self.generator_cores_max.max(report.window.generator_cores);
        Ok((report, board))
    }

    fn start(&self, peer: Peer, item: Item, agent: &AgentProcess) -> anyhow::Result<Running> {
        peer.start(&Setup {
            front: item.front(),
            agents: &agent.addresses,
            folder: self.folder,
            certificate: self.certificate,
            programs: self.programs,
        })
    }

    /// The load at which generator, floor and agent together use every core, or more than which one of them does not
    /// carry, and half of it. The busier they are the more each of them finds to do when it wakes up, and the less an
    /// event costs: the load is raised until they are almost at it.
    fn find_half_load(&mut self) -> anyhow::Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let mut saturating = f64::from(self.scale.streams) / INTERVAL.as_secs_f64();
        let mut how = "extrapolated from the last, as it was not reached";
        for _ in 0..LOAD_STEPS_MAX {
            let Tried { asked, came, used, faults } = self.try_load(saturating)?;
            self.outcome.notes.push(format!(
                "h: of {asked:.0} events/s {came:.0} came, by {used:.2} of {cores} cores of generator, floor and agent; {faults} faults"
            ));
            let clamped = asked < NEARLY * saturating;
            let carried = came >= NEARLY * asked;
            saturating = if carried { came * cores / used.max(0.01) } else { came };
            if !carried || used > ALMOST_ALL * cores {
                how = "as measured";
                break;
            }
            if clamped {
                how = "extrapolated, as there are not so many streams (--idle)";
                break;
            }
        }
        self.half_load = saturating / 2.0;
        self.outcome.notes.push(format!("h: half of the saturating load is {:.0} events/s, {how}", self.half_load));
        Ok(())
    }

    fn try_load(&self, load: f64) -> anyhow::Result<Tried> {
        let agent = AgentProcess::start(BACKENDS, None)?;
        let running = self.start(Peer::Floor, Item::HalfLoad, &agent)?;
        let mut workload = Item::HalfLoad.workload(&running.target, &self.scale, load);
        workload.pids = running.pid().into_iter().chain([agent.pid()]).collect();
        let asked = workload.arrivals.limit as f64 / INTERVAL.as_secs_f64();
        let report = runtime(1)?.block_on(unless_stopped(execute(workload, "finding half of the saturating load")))?;
        let window = &report.window;
        let used = window.processes.as_ref().map_or(0.0, |processes| processes.cores) + window.generator_cores;
        Ok(Tried { asked, came: window.events as f64 / window.seconds, used, faults: report.fault_count() })
    }

    /// What ideal policies would have made of the same arrivals and lengths.
    fn simulate_balance(&mut self, round: u32) {
        let mut workload = Item::Balance.workload("simulated", &self.scale, 0.0);
        workload.seed = round.into();
        let runs = trace(&workload);
        let window = nanoseconds(workload.window.from.0)..nanoseconds(workload.window_end());
        for (name, policy) in [
            ("ideal shortest", Policy::JoinShortestQueue),
            ("sim. round robin", Policy::RoundRobin),
            ("sim. random", Policy::Random),
        ] {
            let simulated = simulate(policy, &runs, BACKENDS, SLOTS, window.clone());
            let mut waits: Vec<f64> = runs
                .iter()
                .zip(&simulated.waits_ns)
                .filter(|((arrival_ns, _), _)| window.contains(arrival_ns))
                .map(|(_, wait_ns)| *wait_ns as f64 / 1e6)
                .collect();
            waits.sort_by(f64::total_cmp);
            let quantile = |share: f64| waits.get((waits.len() as f64 * share) as usize).copied().unwrap_or(0.0);
            let mean = waits.iter().sum::<f64>() / waits.len().max(1) as f64;
            let board = BoardReport {
                outstanding: Vec::new(),
                finished: 0,
                spread: simulated.spread,
                wait_mean_ms: mean,
                wait_p99_ms: quantile(0.99),
            };
            self.add_board(name, round, &board);
        }
    }

    /// What the backends saw: the wait for a place among those that a backend works on, and the spread.
    fn add_board(&mut self, name: &str, round: u32, board: &BoardReport) {
        let title = Item::Balance.title();
        let spread = &board.spread;
        self.outcome.add(&title, name, round, "queued mean ms", board.wait_mean_ms);
        self.outcome.add(&title, name, round, "queued p99 ms", board.wait_p99_ms);
        self.outcome.add(&title, name, round, "deviation runs", spread.deviation);
        self.outcome.add(&title, name, round, "max-min runs", spread.range);
        self.outcome.add(&title, name, round, "mean runs", spread.mean);
    }
}

/// How often the load is raised to find the saturating one, and the part of all cores from which on it is taken as found.
const LOAD_STEPS_MAX: usize = 4;
const ALMOST_ALL: f64 = 0.85;
/// The part of the events asked for that has to come.
const NEARLY: f64 = 0.95;

/// How much came of a load that was tried.
struct Tried {
    /// Events a second.
    asked: f64,
    /// Events a second.
    came: f64,
    /// Cores of generator, floor and agent.
    used: f64,
    faults: u64,
}

async fn unless_stopped<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::select! {
        done = work => done,
        () = stopped() => anyhow::bail!("stopped by a signal"),
    }
}

const READY_TIMEOUT_NS: u64 = 10_000_000_000;

/// Sends short requests until one goes well: a proxy may accept before it knows its backends.
async fn warm_up(workload: &Workload) -> anyhow::Result<()> {
    let text = serde_json::json!({
        "target": workload.target, "http": workload.http, "mix": [{"kind": "short"}], "grace": "1s",
        "arrivals": {"rate": 1000, "duration": "10ms", "limit": 4}, "window": {"from": "0s"},
        "tls": {"insecure": true},
    });
    let probe = Workload::parse(&text.to_string())?;
    let deadline_ns = monotonic_ns() + READY_TIMEOUT_NS;
    loop {
        let report = execute(probe.clone(), "warming up").await?;
        if report.fault_count() == 0 {
            return Ok(());
        }
        if monotonic_ns() > deadline_ns {
            anyhow::bail!("no good answer within 10 s of starting: {:?}", report.fault_examples);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A reload each second until `end` from now; what failed.
async fn reload_each_second(running: &Running, end: Duration) -> Vec<String> {
    let mut failed = Vec::new();
    let (reload, pid) = (running.reload.clone(), running.pid());
    if matches!(reload, Reload::None) {
        return failed;
    }
    for number in 0..end.as_secs() as usize {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let reload = reload.clone();
        match tokio::task::spawn_blocking(move || reload.perform(pid, number)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failed.push(format!("reload {number}: {error:#}")),
            Err(error) => failed.push(format!("reload {number}: {error}")),
        }
    }
    failed
}

/// The spread of outstanding runs over the agent's backends within the window.
async fn watch_board(agent: SocketAddr, (from, to): (Duration, Duration)) -> anyhow::Result<BoardReport> {
    tokio::time::sleep(from).await;
    ask_board(agent, "/board?restart=1").await?;
    tokio::time::sleep(to.saturating_sub(from)).await;
    ask_board(agent, "/board").await
}

async fn ask_board(agent: SocketAddr, path: &str) -> anyhow::Result<BoardReport> {
    let mut stream = tokio::net::TcpStream::connect(agent).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (_, body) = answer.split_once("\r\n\r\n").context("the agent's board has no body")?;
    Ok(serde_json::from_str(body)?)
}

/// Added latency against no proxy (h), and what reloads add to the tail (g).
fn add_differences(outcome: &mut Outcome) {
    let half_load = Item::HalfLoad.title();
    for (figure, name) in [("p50 ms", "added p50 ms"), ("p99 ms", "added p99 ms")] {
        outcome.add_difference(&half_load, figure, name, |outcome, _, round| {
            outcome.value(&half_load, Peer::Direct.name(), figure, round)
        });
    }
    let streams = Item::Streams.title();
    outcome.add_difference(&Item::Reloads.title(), "p99.9 ms", "p99.9 over b", |outcome, contestant, round| {
        outcome.value(&streams, contestant, "p99.9 ms", round)
    });
}

static STOPPED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT and SIGTERM end the comparison in order: what it started is ended, what it found is printed.
fn stop_on_signals() -> anyhow::Result<()> {
    std::thread::Builder::new().name("signals".to_owned()).spawn(|| {
        let waited = runtime(1).and_then(|runtime| {
            runtime.block_on(async {
                let mut terminate = tokio::signal::unix::signal(SignalKind::terminate())?;
                tokio::select! {
                    _ = terminate.recv() => {}
                    interrupted = tokio::signal::ctrl_c() => interrupted?,
                }
                Ok(())
            })
        });
        match waited {
            Ok(()) => STOPPED.store(true, Ordering::Relaxed),
            Err(error) => eprintln!("loadtest: signals are not heard: {error:#}"),
        }
    })?;
    Ok(())
}

async fn stopped() {
    while !STOPPED.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The order of the peers in every table; simulations last.
fn sort_contestants(outcome: &mut Outcome, peers: &[Peer]) {
    let place = |name: &str| peers.iter().position(|peer| peer.name() == name).unwrap_or(usize::MAX);
    for item in &mut outcome.items {
        item.contestants.sort_by_key(|contestant| place(&contestant.name));
    }
}

fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo");
    let model =
        processor.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{cores} cores of {}, Linux {}", model.unwrap_or("unknown"), read("/proc/sys/kernel/osrelease").trim())
}
