//! Cli: the commands of the `longhaul` program.
//!
//! Exit codes: 0 done, 1 not done (or a rollout that failed), 2 wrong usage.

mod client;
mod inspect;
mod rollout;
mod steer;
mod table;

use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::app;
use crate::config;
use crate::control::handover::{Predecessor, Program};
use crate::control::notify::Notifier;
use crate::control::reload::Heritage;
use crate::demo;
use crate::logging;
use crate::net::inherit::Inherited;
use client::{AdminUrl, Client, ClientError};
use rollout::{Action, Said};

#[derive(Parser)]
#[command(
    name = "longhaul",
    version,
    about = "An agent-aware load-balancing reverse proxy: sessions and runs, not requests"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve; diagnostics go to stderr, the access log to stdout
    Run(ConfigFile),
    /// Print every problem of a configuration file
    Check(ConfigFile),
    /// Three built-in agents behind the proxy, and a tour of lines to paste
    Demo {
        /// Port on 127.0.0.1; 0 takes any free one
        #[arg(long, default_value_t = 8080)]
        port: u16,
    },
    /// Print the JSON Schema of the configuration file, for editors
    Schema,
    /// Services, versions and endpoints of a running proxy
    Status(Admin),
    /// Pinned sessions of a running proxy
    Sessions {
        #[command(flatten)]
        admin: Admin,
        /// Only those of this service
        #[arg(long)]
        service: Option<String>,
        /// Only the session with this key
        #[arg(long)]
        key: Option<String>,
        /// At most so many rows; 1000 where it is not given
        #[arg(long)]
        limit: Option<usize>,
    },
    /// Outstanding runs of a running proxy
    Runs {
        #[command(flatten)]
        admin: Admin,
        /// Only those of this service
        #[arg(long)]
        service: Option<String>,
        /// Only the runs of the session with this key
        #[arg(long)]
        session: Option<String>,
        /// At most so many rows; 1000 where it is not given
        #[arg(long)]
        limit: Option<usize>,
    },
    /// Give an endpoint no new work; without SERVICE and ENDPOINT, end the whole proxy once its runs are done
    Drain {
        #[command(flatten)]
        admin: Admin,
        /// Its service
        #[arg(requires = "endpoint")]
        service: Option<String>,
        /// Its host:port
        endpoint: Option<String>,
        /// Return only when the drain is over
        #[arg(long)]
        wait: bool,
    },
    /// End the drain of an endpoint
    Undrain {
        #[command(flatten)]
        admin: Admin,
        /// Its service
        service: String,
        /// Its host:port
        endpoint: String,
    },
    /// How new sessions move from one version to another in steps; with --wait: 0 completed, 1 aborted or found bad
    Rollout {
        #[command(flatten)]
        admin: Admin,
        /// The service whose versions change
        service: String,
        #[arg(value_enum, default_value_t = Action::Status)]
        action: Action,
        /// Return only when it is over: completed, aborted, or paused by the judge
        #[arg(long)]
        wait: bool,
    },
}

#[derive(Args)]
struct ConfigFile {
    /// The configuration file; paths in it are relative to it
    #[arg(short, long = "config", default_value = "longhaul.yaml", value_name = "FILE")]
    config: PathBuf,
}

/// How to reach a running proxy.
#[derive(Args)]
struct Admin {
    /// Admin address of the proxy: http://HOST:PORT or unix:/PATH
    #[arg(long = "admin", default_value = "http://127.0.0.1:9901", value_name = "URL")]
    url: AdminUrl,
    /// File with the token of the admin API
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The program: reads the command line, does what it says.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(file) => run(file.config),
        Command::Check(file) => check(&file.config),
        Command::Demo { port } => match demo::run(port) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failure(error),
        },
        Command::Schema => print(&format!("{:#}\n", config::schema())),
        Command::Status(admin) => admin.call(async |client| inspect::status(client, admin.json).await),
        Command::Sessions { admin, service, key, limit } => {
            let query = client::query(&[("service", service), ("key", key), ("limit", text(limit))]);
            admin.call(async |client| inspect::sessions(client, &query, admin.json).await)
        }
        Command::Runs { admin, service, session, limit } => {
            let query = client::query(&[("service", service), ("session", session), ("limit", text(limit))]);
            admin.call(async |client| inspect::runs(client, &query, admin.json).await)
        }
        Command::Drain { admin, service: Some(service), endpoint: Some(endpoint), wait } => {
            admin.call(async |client| steer::drain_endpoint(client, &service, &endpoint, wait, admin.json).await)
        }
        Command::Drain { admin, wait, .. } => {
            admin.call(async |client| steer::drain_proxy(client, wait, admin.json).await)
        }
        Command::Undrain { admin, service, endpoint } => {
            admin.call(async |client| steer::undrain_endpoint(client, &service, &endpoint, admin.json).await)
        }
        Command::Rollout { admin, service, action, wait } => {
            admin.call_to(async |client| rollout::rollout(client, &service, action, wait, admin.json).await)
        }
    }
}

fn run(config_path: PathBuf) -> ExitCode {
    // First, while there is one thread only: this takes variables out of the environment.
    let (heritage, predecessor) = match heritage() {
        Ok(given) => given,
        Err(error) => return failure(error),
    };
    let program = Program::of_this_process().ok();
    let loaded = match config::load(&config_path) {
        Ok(loaded) => loaded,
        Err(problems) => {
            // As `check` prints them: each on a line of its own that begins with the file.
            let _ = writeln!(std::io::stderr(), "{problems}");
            return ExitCode::FAILURE;
        }
    };
    let diagnostics = logging::init(&loaded.config.log);
    let options = app::Options {
        config_path,
        loaded,
        workers: None,
        signals: true,
        watch: true,
        after_reload: Some(Box::new(move |config| diagnostics.configure(&config.log))),
        heritage,
        predecessor,
        program,
        dns_server: None,
    };
    let app = match app::build(options) {
        Ok(app) => app,
        Err(error) => return failure(error),
    };
    let access_log = app.running.access_log.clone();
    let ended = app.wait();
    access_log.flush(LAST_LINES_TIMEOUT);
    if ended.cut == 0 && !ended.forced { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What this process was given by whoever started it.
fn heritage() -> Result<(Heritage, Option<Predecessor>), String> {
    let mut heritage = Heritage { sockets: Inherited::from_service_manager()?, ..Heritage::default() };
    let predecessor = Predecessor::greet(&mut heritage)?;
    heritage.notifier = Notifier::from_environment(predecessor.is_some()).map_err(|failure| {
        format!("NOTIFY_SOCKET names no socket that the service manager could be told by: {failure}")
    })?;
    Ok((heritage, predecessor))
}

/// How long whoever reads the access log may take for its last lines.
const LAST_LINES_TIMEOUT: Duration = Duration::from_secs(2);

fn check(path: &Path) -> ExitCode {
    match config::load(path) {
        Ok(loaded) => {
            let file = path.display();
            let warnings = loaded.warnings.iter().map(|warning| {
                let config::Problem { line, column, path, message } = warning;
                format!("{file}:{line}:{column}: {path}: warning: {message}\n")
            });
            print(&format!("{}{file}: ok\n", warnings.collect::<String>()))
        }
        Err(problems) => {
            print(&format!("{problems}\n"));
            ExitCode::FAILURE
        }
    }
}

impl Admin {
    /// Does `command` with a client, prints what it has to say.
    fn call(&self, command: impl AsyncFnOnce(&Client) -> Result<String, ClientError>) -> ExitCode {
        self.call_to(async |client| Ok(Said { text: command(client).await?, good: true }))
    }

    /// As [`Admin::call`], where what there is to say may be bad news: exit 1.
    fn call_to(&self, command: impl AsyncFnOnce(&Client) -> Result<Said, ClientError>) -> ExitCode {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return failure(error),
        };
        let done = runtime.block_on(async {
            let client = Client::new(self.url.clone(), self.token_file.as_deref())?;
            command(&client).await
        });
        match done {
            Ok(Said { text, good }) => match print(&text) {
                ExitCode::SUCCESS if !good => ExitCode::FAILURE,
                printed => printed,
            },
            Err(error) => failure(error),
        }
    }
}

fn text(number: Option<usize>) -> Option<String> {
    number.map(|number| number.to_string())
}

/// To stdout. Whoever reads it may stop early (`| head`): that is not an error.
fn print(text: &str) -> ExitCode {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => failure(error),
        _ => ExitCode::SUCCESS,
    }
}

fn failure(error: impl Display) -> ExitCode {
    complain(error);
    ExitCode::FAILURE
}

/// To stderr, which may be closed.
fn complain(error: impl Display) {
    let _ = writeln!(std::io::stderr(), "longhaul: {error}");
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_commands_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_endpoint_is_drained_by_service_and_address() {
        assert!(Cli::try_parse_from(["longhaul", "drain"]).is_ok());
        assert!(Cli::try_parse_from(["longhaul", "drain", "support", "10.0.0.11:8000", "--wait"]).is_ok());
        assert!(Cli::try_parse_from(["longhaul", "drain", "support"]).is_err());
    }
}
