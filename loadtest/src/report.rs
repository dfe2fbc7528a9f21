//! The report of one load test for people: a table for the terminal, and a page with plots.

use std::fmt::Write;

use crate::plot::{Line, escape, lines, page as html_page, short};
use crate::run::Report;
use crate::statistics::Percentiles;

/// The report as text.
pub fn table(report: &Report) -> String {
    let mut text = String::new();
    let counts = &report.counts;
    let window = &report.window;
    let _ = writeln!(
        text,
        "{} runs started, {} completed, {} aborted by their clients, {} faults in {:.1} s",
        counts.started,
        counts.completed,
        counts.aborted,
        report.fault_count(),
        report.seconds
    );
    let _ = writeln!(
        text,
        "{} events and {} answers over {} connections ({} made anew, {} turns moved to another backend)\n",
        counts.events, counts.answers, counts.connections, counts.reconnects, counts.moved_turns
    );
    let _ = writeln!(
        text,
        "{:<12} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}   milliseconds",
        "latency", "count", "mean", "p50", "p99", "p99.9", "p99.99", "max"
    );
    for (name, percentiles) in latencies(report) {
        if percentiles.count > 0 {
            let _ = writeln!(
                text,
                "{name:<12} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
                percentiles.count,
                short(percentiles.mean_ms),
                short(percentiles.p50_ms),
                short(percentiles.p99_ms),
                short(percentiles.p999_ms),
                short(percentiles.p9999_ms),
                short(percentiles.max_ms)
            );
        }
    }
    let _ = writeln!(
        text,
        "\nsteady window of {:.1} s: {:.0} events/s, {:.0} answers/s; this generator {:.2} cores, the machine {:.2}",
        window.seconds,
        window.events as f64 / window.seconds.max(1e-9),
        window.answers as f64 / window.seconds.max(1e-9),
        window.generator_cores,
        window.machine_cores
    );
    if let Some(processes) = &window.processes {
        let _ = write!(text, "measured processes: {:.2} cores", processes.cores);
        for (value, unit) in [
            (processes.cpu_us_per_event, "us CPU/event"),
            (processes.user_us_per_event, "us user/event"),
            (processes.cpu_us_per_answer, "us CPU/answer"),
            (processes.user_us_per_answer, "us user/answer"),
            (processes.resident_kib_per_open, "KiB/open run"),
        ] {
            if let Some(value) = value {
                let _ = write!(text, ", {} {unit}", short(value));
            }
        }
        let _ = writeln!(
            text,
            ", resident {:.1} MiB ({:.1} before)",
            processes.resident_mib, processes.resident_mib_before
        );
    }
    for (fault, count) in &report.faults {
        let name = serde_json::to_string(fault).unwrap_or_default();
        let example = report.fault_examples.get(fault).map(String::as_str).unwrap_or_default();
        let _ = writeln!(text, "fault {}: {count}  {example}", name.trim_matches('"'));
    }
    text
}

/// The report as a page that needs nothing else.
pub fn page(report: &Report) -> String {
    let mut body = format!("<p>{}</p><pre>{}</pre>", escape(&report.workload.target), escape(&table(report)));
    let curves: Vec<Line<'_>> = latencies(report)
        .into_iter()
        .filter(|(_, percentiles)| percentiles.count > 0)
        .map(|(name, percentiles)| {
            let nines = |quantile: f64| -(1.0 - quantile).max(1e-9).log10();
            Line { name, points: percentiles.curve.iter().map(|&(quantile, ms)| (nines(quantile), ms)).collect() }
        })
        .collect();
    let quantile = |nines: f64| format!("p{}", short(100.0 * (1.0 - 10f64.powf(-nines))));
    body += &lines("Latency by percentile, ms", &curves, quantile);
    let over_time = |name, value: fn(&crate::statistics::Moment) -> f64| Line {
        name,
        points: report.timeline.iter().map(|moment| (moment.seconds, value(moment))).collect(),
    };
    let seconds = |x: f64| format!("{} s", short(x));
    body += &lines(
        "Latency over time, ms",
        &[over_time("p50", |moment| moment.p50_ms), over_time("p99", |moment| moment.p99_ms)],
        seconds,
    );
    body += &lines(
        "A second",
        &[
            over_time("events", |moment| moment.events_per_second),
            over_time("answers", |moment| moment.answers_per_second),
        ],
        seconds,
    );
    body += &lines("Runs in flight", &[over_time("open", |moment| moment.open as f64)], seconds);
    let workload = serde_json::to_string_pretty(&report.workload).unwrap_or_default();
    body += &format!("<h2>Workload</h2><pre>{}</pre>", escape(&workload));
    html_page("Load test", &body)
}

fn latencies(report: &Report) -> [(&'static str, &Percentiles); 4] {
    [
        ("event", &report.event),
        ("first event", &report.first_event),
        ("answer", &report.answer),
        ("lateness", &report.lateness),
    ]
}
