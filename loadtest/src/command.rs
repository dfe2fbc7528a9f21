//! `loadtest run`: a workload from a file, from flags, or from a file with flags on top.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, ValueEnum};

use crate::clock::parse_duration;
use crate::report;
use crate::run::{execute, runtime};
use crate::workload::{Length, MixItem, Process, Span, Work, Workload};

/// Flags of `loadtest run`.
#[derive(Args, Clone, Debug)]
pub struct RunOptions {
    /// A workload (YAML or JSON); flags given beside it win
    #[arg(long, short)]
    file: Option<PathBuf>,
    /// http://HOST:PORT or https://HOST:PORT
    #[arg(long)]
    target: Option<String>,
    /// What to do, without a file
    #[arg(long, value_enum)]
    kind: Option<Kind>,
    /// The path of short requests
    #[arg(long, default_value = "/")]
    path: String,
    /// Events of a stream, messages of a WebSocket
    #[arg(long, default_value_t = 100)]
    events: u32,
    /// Time between events, between messages, and between polls of a job
    #[arg(long, value_parser = parse_duration, default_value = "100ms")]
    interval: Duration,
    /// Bytes of an event or message
    #[arg(long, default_value_t = 200)]
    size: usize,
    /// How long a run or job takes (its mean with --exponential)
    #[arg(long, value_parser = parse_duration, default_value = "1s")]
    time: Duration,
    /// Draw the times of runs and jobs from an exponential distribution
    #[arg(long)]
    exponential: bool,
    /// Sessions that arrive a second
    #[arg(long)]
    rate: Option<f64>,
    /// How they arrive
    #[arg(long, value_enum)]
    process: Option<ProcessFlag>,
    /// For how long they arrive
    #[arg(long, value_parser = parse_duration)]
    duration: Option<Duration>,
    /// No more sessions than this
    #[arg(long)]
    limit: Option<u64>,
    /// A closed loop of so many clients instead of a rate
    #[arg(long)]
    concurrency: Option<u32>,
    /// Turns of a session
    #[arg(long)]
    turns: Option<u32>,
    /// The pause between turns
    #[arg(long, value_parser = parse_duration)]
    think: Option<Duration>,
    /// The header that carries the session's id (empty: none)
    #[arg(long)]
    session_header: Option<String>,
    /// The share of runs whose client leaves at a random time: 0 to 1
    #[arg(long)]
    abort: Option<f64>,
    /// 1 or 2
    #[arg(long)]
    http: Option<u8>,
    /// With HTTP/2: exchanges that share a connection
    #[arg(long)]
    streams_per_connection: Option<u32>,
    /// Certificates to trust (PEM)
    #[arg(long)]
    ca: Option<PathBuf>,
    /// Take any certificate
    #[arg(long)]
    insecure: bool,
    /// Loopback addresses to come from
    #[arg(long)]
    sources: Option<u8>,
    /// A process to measure, with its children; may be given several times
    #[arg(long = "pid")]
    pids: Vec<u32>,
    /// The steady window begins so long after the first arrival
    #[arg(long, value_parser = parse_duration)]
    window_from: Option<Duration>,
    /// The steady window ends so long after the first arrival (default: with the arrivals)
    #[arg(long, value_parser = parse_duration)]
    window_to: Option<Duration>,
    /// The seed of everything that is drawn
    #[arg(long)]
    seed: Option<u64>,
    /// Threads of the generator
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Write the report as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the report as a page with plots that needs nothing else
    #[arg(long)]
    html: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    Idle,
    Job,
    Run,
    Short,
    Stream,
    WebSocket,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ProcessFlag {
    Constant,
    Poisson,
}

/// Runs the load and reports; false if anything went wrong with any run.
pub fn main(options: &RunOptions) -> anyhow::Result<bool> {
    let workload = workload(options)?;
    let report = runtime(options.threads)?.block_on(execute(workload, "load"))?;
    print!("{}", report::table(&report));
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    if let Some(path) = &options.html {
        std::fs::write(path, report::page(&report))?;
    }
    Ok(report.fault_count() == 0)
}

fn workload(options: &RunOptions) -> anyhow::Result<Workload> {
    let mut workload = match (&options.file, &options.target) {
        (Some(file), _) => Workload::read(file)?,
        (None, Some(target)) => {
            let text = serde_json::json!({"target": target, "mix": [{"kind": "short"}]}).to_string();
            Workload::parse(&text)?
        }
        (None, None) => bail!("name a target: --target http://HOST:PORT, or a workload: --file workload.yaml"),
    };
    if options.file.is_none() || options.kind.is_some() {
        workload.mix = vec![MixItem { weight: 1.0, work: work(options) }];
    }
    let arrivals = &mut workload.arrivals;
    set(&mut workload.target, options.target.clone());
    set(&mut arrivals.rate, options.rate);
    set(&mut arrivals.duration, options.duration.map(Span));
    set(&mut arrivals.limit, options.limit);
    set(&mut workload.session.turns, options.turns);
    set(&mut workload.session.think, options.think.map(|think| Length::Fixed(Span(think))));
    set(&mut workload.session.header, options.session_header.clone());
    set(&mut workload.abort, options.abort);
    set(&mut workload.http, options.http);
    set(&mut workload.streams_per_connection, options.streams_per_connection);
    set(&mut workload.sources, options.sources);
    set(&mut workload.window.from, options.window_from.map(Span));
    set(&mut workload.window.to, options.window_to.map(Span));
    set(&mut workload.seed, options.seed);
    if let Some(process) = options.process {
        arrivals.process = match process {
            ProcessFlag::Constant => Process::Constant,
            ProcessFlag::Poisson => Process::Poisson,
        };
    }
    arrivals.concurrency = options.concurrency.or(arrivals.concurrency);
    workload.tls.ca = options.ca.clone().or(workload.tls.ca.take());
    workload.tls.insecure |= options.insecure;
    workload.pids.extend(&options.pids);
    workload.check()?;
    Ok(workload)
}

fn work(options: &RunOptions) -> Work {
    let RunOptions { events, size, .. } = *options;
    let interval = Span(options.interval);
    let time = match options.exponential {
        true => Length::Exponential { mean: Span(options.time) },
        false => Length::Fixed(Span(options.time)),
    };
    match options.kind.unwrap_or(Kind::Short) {
        Kind::Idle => Work::Idle,
        Kind::Job => Work::Job { time, poll: interval },
        Kind::Run => Work::Run { time },
        Kind::Short => Work::Short { path: options.path.clone() },
        Kind::Stream => Work::Stream { events, interval, size },
        Kind::WebSocket => Work::WebSocket { messages: events, interval, size },
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}
