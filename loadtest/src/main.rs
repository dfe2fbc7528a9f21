//! `loadtest`: a load generator made for agents, a mock agent, the floor, and a comparison of proxies side by side.

mod agent;
mod balance;
mod client;
mod clock;
mod command;
mod compare;
mod event;
mod floor;
mod hpa;
mod plan;
mod plot;
mod process;
mod report;
mod run;
mod socket;
mod statistics;
mod tls;
mod websocket;
mod wire;
mod workload;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Load tests for AI agents and the proxies before them
#[derive(Parser)]
#[command(name = "loadtest", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve as a mock agent: streams, runs, jobs, WebSockets
    Agent(agent::AgentOptions),
    /// Measure longhaul, other proxies, the floor and no proxy side by side
    Compare(compare::CompareOptions),
    /// Copy bytes between sockets: the least that a proxy can cost
    Floor(floor::FloorOptions),
    /// Simulate a day of agents under Kubernetes' HorizontalPodAutoscaler, scaled by run demand and by CPU
    Hpa(hpa::HpaOptions),
    /// Send load to a target, check every event, report
    Run(Box<command::RunOptions>),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Agent(options) => agent::main(&options).map(|()| true),
        Command::Compare(options) => compare::main(&options),
        Command::Floor(options) => floor::main(&options).map(|()| true),
        Command::Hpa(options) => hpa::main(&options),
        Command::Run(options) => command::main(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("loadtest: {error:#}");
            ExitCode::from(2)
        }
    }
}
