//! Demo: three built-in agents behind the real proxy, and a tour of lines to paste.
//!
//! The agents are reached over loopback sockets like any others, and the configuration is a text that goes through
//! the same check as a file: what the demo shows is the product.

mod agent;
mod tour;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::info;

use crate::app::{self, App, Options, StartError};
use crate::config::{self, Address, Problems};
use crate::ids;
use crate::logging;
use crate::state::status::EndpointState;
use agent::Agent;
use tour::Tour;

/// The address of the admin API that every client command assumes.
const ADMIN_PORT: u16 = 9901;

/// The agents are of this process, so they are ready in an instant; a machine that is this slow gets its tour anyway.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// The three agents: name and version.
const AGENTS: [(&str, &str); 3] = [("stable-1", "stable"), ("stable-2", "stable"), ("canary-1", "canary")];

/// Why the demo can't run.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error("127.0.0.1:{port} can't be listened on ({source}); choose another with --port, or --port 0 for any")]
    Port { port: u16, source: std::io::Error },
    #[error("the built-in agents could not be started: {0}")]
    Agents(std::io::Error),
    #[error("no directory for the demo's configuration: {0}")]
    Directory(std::io::Error),
    #[error("the demo's configuration is refused: {0}")]
    Configuration(#[from] Problems),
    #[error("the proxy could not be started: {0}")]
    Proxy(#[from] StartError),
}

/// Runs the demo on 127.0.0.1:`port` (0: any free one) until Ctrl-C.
pub fn run(port: u16) -> Result<(), DemoError> {
    // Said before anything else starts, because a taken port is the one thing that often goes wrong.
    drop(bind(port).map_err(|source| DemoError::Port { port, source })?);
    let agents = agent::start(&AGENTS).map_err(DemoError::Agents)?;
    let directory = Directory::create().map_err(DemoError::Directory)?;
    let file = directory.0.join("longhaul.yaml");
    let (app, note) = match start_proxy(&file, &configuration(port, ADMIN_PORT, &agents)) {
        Err(DemoError::Proxy(StartError::Admin(_))) => {
            let app = start_proxy(&file, &configuration(port, 0, &agents))?;
            (app, Some(format!("127.0.0.1:{ADMIN_PORT} is taken, so the admin API is on another port.")))
        }
        started => (started?, None),
    };
    wait_until_ready(&app);
    let proxy = app.listener("demo").unwrap_or(Address::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, port))));
    let tour = Tour {
        proxy: proxy.to_string(),
        admin: app.bound.admin.to_string(),
        config_file: file.display().to_string(),
        agents: &agents,
        program: program(),
        note,
    };
    print!("{tour}");
    let ended = app.wait();
    info!(cut = ended.cut, "the demo has ended");
    Ok(())
}

/// Waits until every agent has passed its first health check, so that the first line pasted is served.
fn wait_until_ready(app: &App) {
    let ready = || {
        let snapshot = app.running.snapshot.load();
        snapshot.services.iter().all(|service| {
            let status = service.dispatcher.status(ids::now());
            let mut endpoints = status.versions.iter().flat_map(|version| &version.endpoints);
            endpoints.all(|endpoint| endpoint.state == EndpointState::Ready)
        })
    };
    let deadline = ids::now() + READY_TIMEOUT;
    while !ready() && ids::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The demo's configuration: what a person would write for these agents.
fn configuration(port: u16, admin_port: u16, agents: &[Agent]) -> String {
    let endpoints = |version: &str| {
        let urls: Vec<String> = agents
            .iter()
            .filter(|agent| agent.version == version)
            .map(|agent| format!("http://{}", agent.address))
            .collect();
        urls.join(", ")
    };
    format!(
        "\
listeners:
  - {{name: demo, address: \"127.0.0.1:{port}\"}}
admin: {{address: \"127.0.0.1:{admin_port}\"}}
log: {{level: error, access: false}}
shutdown: {{delay: 0s, timeout: 5s}}
services:
  - name: {service}
    session:
      key: [{{header: x-session-id}}, {{json: /thread_id}}]
      cookie: {{name: longhaul}}
    health: {{path: /health, interval: 1s}}
    versions:
      - {{name: stable, weight: 90, endpoints: [{stable}]}}
      - {{name: canary, weight: 10, endpoints: [{canary}], match: {{headers: {{x-canary: \"1\"}}}}}}
",
        service = tour::SERVICE,
        stable = endpoints("stable"),
        canary = endpoints("canary"),
    )
}

/// The one call into the rest of the product. The file is a real one, so that a person can edit it and see it reload.
fn start_proxy(file: &Path, text: &str) -> Result<App, DemoError> {
    std::fs::write(file, text).map_err(DemoError::Directory)?;
    let loaded = config::load(file)?;
    logging::init(&loaded.config.log);
    let options = Options { signals: true, watch: true, ..Options::new(file.to_owned(), loaded) };
    Ok(app::build(options)?)
}

/// A directory for the demo's configuration, removed when dropped.
struct Directory(PathBuf);

impl Directory {
    fn create() -> std::io::Result<Directory> {
        let path = std::env::temp_dir().join(format!("longhaul-demo-{:016x}", ids::random_u64()));
        std::fs::create_dir(&path)?;
        Ok(Directory(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What is left behind in a directory for temporary files does no harm.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn bind(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port))
}

/// How to call this program in a shell, from any directory.
fn program() -> String {
    let path = std::env::current_exe().ok().and_then(|path| path.into_os_string().into_string().ok());
    match path {
        Some(path) if path.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+".contains(c)) => path,
        Some(path) => format!("'{}'", path.replace('\'', r"'\''")),
        None => "longhaul".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_names_every_agent_once() {
        let agents: Vec<Agent> = AGENTS
            .iter()
            .zip(4001..)
            .map(|((name, version), port)| Agent { name, version, address: SocketAddr::from(([127, 0, 0, 1], port)) })
            .collect();
        let text = configuration(8080, 9901, &agents);
        assert!(text.contains("endpoints: [http://127.0.0.1:4001, http://127.0.0.1:4002]"), "{text}");
        assert!(text.contains("endpoints: [http://127.0.0.1:4003]"), "{text}");
        assert!(text.contains("address: \"127.0.0.1:8080\""), "{text}");
    }
}
