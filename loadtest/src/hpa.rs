//! `loadtest hpa`: a day of agents under Kubernetes' HorizontalPodAutoscaler, scaled by run demand and by CPU.

mod controller;
mod day;

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;

use crate::plot;
use controller::Behavior;
use day::{CORES_TUNED, Outcome, Setup, Signal, TARGET, simulate};

/// Flags of `loadtest hpa`.
#[derive(Args, Clone, Debug)]
pub struct HpaOptions {
    /// The seed of arrivals, lengths of runs and starts of pods
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the plot of docs/hpa.md
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Simulates the day under each setup and prints what came of it.
pub fn main(options: &HpaOptions) -> anyhow::Result<bool> {
    let setups = setups();
    let outcomes: Vec<Outcome> = setups.iter().map(|setup| simulate(setup, options.seed)).collect();
    print!("{}", table(&setups, &outcomes));
    if let Some(path) = &options.svg {
        std::fs::write(path, plot(&setups, &outcomes) + "\n")?;
    }
    Ok(true)
}

/// Longer than any run, so that ending pods finish theirs.
const GRACE_OF_RUNS: u32 = 331;
/// What Kubernetes gives where nothing is said.
const GRACE_DEFAULT: u32 = 30;
/// 70 % of a request of one core: a usual choice.
const CORES_USUAL: f64 = 0.7;

fn setups() -> Vec<Setup> {
    let demand = Setup {
        name: "run demand",
        signal: Signal::RunDemand,
        behavior: Behavior::recommended(),
        grace: GRACE_OF_RUNS,
        idle_first: true,
        lighter_at_noon: false,
    };
    let tuned = Setup { name: "CPU, tuned", signal: Signal::Cpu(CORES_TUNED), idle_first: false, ..demand.clone() };
    let lighter = Setup { name: "CPU, tuned; runs lighter from noon", lighter_at_noon: true, ..tuned.clone() };
    let behavior = Behavior::default_of_kubernetes();
    let defaults = Setup { name: "CPU, tuned; defaults", behavior, grace: GRACE_DEFAULT, ..tuned.clone() };
    let usual = Setup { name: "CPU at 70 % of a core; defaults", signal: Signal::Cpu(CORES_USUAL), ..defaults.clone() };
    vec![demand, tuned, lighter, defaults, usual]
}

/// As a table of docs/hpa.md.
fn table(setups: &[Setup], outcomes: &[Outcome]) -> String {
    let mut text =
        format!("| |{}\n|---|{}\n", cells(setups, |setup| setup.name.to_owned()), "---|".repeat(setups.len()));
    let mut row = |name: &str, value: &dyn Fn(&Outcome) -> String| {
        let _ = writeln!(text, "| {name} |{}", cells(outcomes, value));
    };
    row("runs", &|one| one.runs.to_string());
    row("cut", &|one| one.cut.to_string());
    row("refused after 5 min in the queue", &|one| one.refused.to_string());
    row("waited longer than 10 s, or in vain", &|one| format!("{:.2} %", 100.0 * one.waited_over(10)));
    row("wait, p99 and longest", &|one| format!("{} s, {} s", one.wait(0.99), one.wait(1.0)));
    row("pod hours", &|one| format!("{:.0}", one.pod_hours));
    row("most pods", &|one| one.most_pods.to_string());
    row("changes of replicas", &|one| one.moves.to_string());
    row("changes of direction", &|one| one.direction_changes.to_string());
    row("swings", &|one| one.swings.to_string());
    text
}

fn cells<T>(items: &[T], cell: impl Fn(&T) -> String) -> String {
    items.iter().map(|item| format!(" {} |", cell(item))).collect()
}

/// Replicas over the day, and how many the demand would fill to the target.
fn plot(setups: &[Setup], outcomes: &[Outcome]) -> String {
    /// Minutes between two points.
    const STEP: usize = 4;
    let points = |values: &[u32], scale: f64| -> Vec<(f64, f64)> {
        let every = values.iter().enumerate().step_by(STEP);
        every.map(|(minute, &value)| (minute as f64 / 60.0, f64::from(value) / scale)).collect()
    };
    let mut lines = vec![plot::Line { name: "demand / 7", points: points(&outcomes[0].demand, TARGET) }];
    for index in PLOTTED {
        lines.push(plot::Line { name: setups[index].name, points: points(&outcomes[index].pods, 1.0) });
    }
    plot::lines("Pods of the agent over a day", &lines, |hour| format!("{hour:.0}:00"))
}

/// Of [`setups`]: more lines could not be told apart.
const PLOTTED: [usize; 3] = [0, 3, 4];

#[cfg(test)]
mod tests {
    use super::*;

    /// Where logarithms and cosines are those of the machine that wrote it.
    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn the_document_has_the_numbers_of_the_command() {
        let setups = setups();
        let outcomes: Vec<Outcome> = setups.iter().map(|setup| simulate(setup, 1)).collect();
        let document = include_str!("../../docs/hpa.md");
        assert!(document.contains(&table(&setups, &outcomes)), "write anew what `loadtest hpa` prints");
        let plotted = include_str!("../../docs/hpa.svg");
        assert!(plotted.trim_end() == plot(&setups, &outcomes), "run `loadtest hpa --svg docs/hpa.svg`");
    }

    /// What docs/hpa.md claims, for more days than the one that it shows.
    #[test]
    fn run_demand_scales_without_oscillation_and_cuts_nothing() {
        let setups = setups();
        for seed in 1..=6 {
            let outcomes: Vec<Outcome> = setups.iter().map(|setup| simulate(setup, seed)).collect();
            let [demand, tuned, lighter, defaults, usual] = outcomes.as_slice() else { panic!("five setups") };
            println!("seed {seed}\n{}", table(&setups, &outcomes));
            assert_eq!((demand.cut, demand.refused), (0, 0));
            assert!(demand.waited_over(10) < 0.001, "{}", demand.waited_over(10));
            // The day's own are five: three peaks and the valleys between.
            assert!(demand.swings <= 8, "{} swings", demand.swings);
            assert!(demand.direction_changes <= 40 && demand.moves <= 120);
            // The same behaviour and the same time to end, so only the signal differs: more pods for the same runs.
            assert_eq!(tuned.cut, 0);
            assert!(tuned.pod_hours > 1.15 * demand.pod_hours, "{} {}", tuned.pod_hours, demand.pod_hours);
            // A target in CPU is one for today's mix of runs.
            assert!(lighter.waited_over(10) > 0.05, "{}", lighter.waited_over(10));
            assert!(usual.waited_over(10) > 0.2 && usual.refused > 100);
            // What Kubernetes does where nothing is said.
            assert!(defaults.cut > 100 && defaults.swings > 2 * demand.swings, "{} {}", defaults.cut, defaults.swings);
        }
    }
}
