//! Proxies of the comparison: found, configured, started, reloaded and ended.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::agent::Bound;
use crate::clock::monotonic_ns;
use crate::plan::Random;
use crate::process::tree_ids;
use crate::tls::TestCertificate;

/// What stands between the clients and the agents.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// No proxy
    Direct,
    /// A plain byte copy
    Floor,
    Longhaul,
    Nginx,
    Haproxy,
    Caddy,
    Envoy,
}

/// What clients speak to the proxy.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Front {
    Http1,
    /// HTTP/1.1 in TLS.
    Tls,
    /// HTTP/2 with prior knowledge.
    Http2,
}

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    pub longhaul: PathBuf,
    /// Beside the places of the search path.
    pub envoy: Option<PathBuf>,
}

/// What a proxy is started with.
pub struct Setup<'a> {
    pub front: Front,
    pub agents: &'a [SocketAddr],
    pub folder: &'a Path,
    pub certificate: &'a TestCertificate,
    pub programs: &'a Programs,
}

impl Peer {
    pub const ALL: [Self; 7] =
        [Self::Direct, Self::Floor, Self::Longhaul, Self::Nginx, Self::Haproxy, Self::Caddy, Self::Envoy];

    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Floor => "floor",
            Self::Longhaul => "longhaul",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Caddy => "caddy",
            Self::Envoy => "envoy",
        }
    }

    /// The program and its version; `None` if it is not installed.
    pub fn version(self, programs: &Programs) -> Option<String> {
        let argument = match self {
            Self::Direct => return Some("no proxy".to_owned()),
            Self::Floor => return Some(format!("loadtest {}, tokio byte copy", env!("CARGO_PKG_VERSION"))),
            Self::Nginx | Self::Haproxy => "-v",
            Self::Caddy => "version",
            Self::Longhaul | Self::Envoy => "--version",
        };
        let output = Command::new(self.program(programs)?).arg(argument).output().ok()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        text.lines().find(|line| !line.trim().is_empty()).map(|line| line.trim().to_owned())
    }

    fn program(self, programs: &Programs) -> Option<PathBuf> {
        match self {
            Self::Direct | Self::Floor => std::env::current_exe().ok(),
            Self::Longhaul => programs.longhaul.is_file().then(|| programs.longhaul.clone()),
            Self::Envoy => programs.envoy.clone().or_else(|| on_path("envoy")),
            Self::Nginx | Self::Haproxy | Self::Caddy => on_path(self.name()),
        }
    }

    /// Starts the proxy. It accepts connections when this returns.
    pub fn start(self, setup: &Setup<'_>) -> anyhow::Result<Running> {
        let scheme = if setup.front == Front::Tls { "https" } else { "http" };
        if self == Self::Direct {
            let target = format!("http://{}", setup.agents[0]);
            return Ok(Running { child: None, target, reload: Reload::None, log: PathBuf::new() });
        }
        let program = self.program(setup.programs).with_context(|| format!("{} is not installed", self.name()))?;
        let places = Places { port: free_port()?, admin: free_port()?, setup };
        let log = setup.folder.join(format!("{}.log", self.name()));
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&log)?);
        let reload = self.configure(&places, &mut command)?;
        let child = command.spawn().with_context(|| format!("cannot start {}", self.name()))?;
        let host = if scheme == "https" { "localhost" } else { "127.0.0.1" };
        let target = format!("{scheme}://{host}:{}", places.port);
        let mut running = Running { child: Some(child), target, reload, log };
        running.wait_until_it_accepts(places.port).with_context(|| format!("starting {}", self.name()))?;
        Ok(running)
    }

    /// Writes the configuration and adds the arguments that name it.
    fn configure(self, places: &Places<'_>, command: &mut Command) -> anyhow::Result<Reload> {
        let folder = places.setup.folder;
        let files: Vec<(&'static str, &'static str)> = match self {
            Self::Direct | Self::Floor => Vec::new(),
            Self::Longhaul => vec![("longhaul.yaml", include_str!("../../peers/longhaul.yaml"))],
            Self::Nginx => vec![("nginx.conf", include_str!("../../peers/nginx.conf"))],
            Self::Haproxy => vec![("haproxy.cfg", include_str!("../../peers/haproxy.cfg"))],
            Self::Caddy => vec![("Caddyfile", include_str!("../../peers/Caddyfile"))],
            Self::Envoy => vec![
                ("envoy-listener.yaml", include_str!("../../peers/envoy-listener.yaml")),
                ("envoy-cluster.yaml", include_str!("../../peers/envoy-cluster.yaml")),
                ("envoy.yaml", include_str!("../../peers/envoy.yaml")),
            ],
        };
        let values = |generation| self.values(places, generation);
        for (name, template) in &files {
            write_anew(&folder.join(name), &render(template, &values(0)))?;
        }
        // Two generations that differ in a timeout: a reload without a change may be skipped.
        let rendered = |number: usize| -> [Vec<(PathBuf, String)>; 2] {
            [1, 0].map(|generation| {
                let files = files.iter().take(number);
                files.map(|(name, template)| (folder.join(name), render(template, &values(generation)))).collect()
            })
        };
        Ok(match self {
            Self::Direct => Reload::None,
            Self::Floor => {
                command.arg("floor").arg("--listen").arg(format!("127.0.0.1:{}", places.port));
                for agent in places.setup.agents {
                    command.arg("--to").arg(agent.to_string());
                }
                if places.setup.front == Front::Tls {
                    let certificate = places.setup.certificate;
                    command.arg("--tls-cert").arg(&certificate.certificate).arg("--tls-key").arg(&certificate.key);
                }
                Reload::None
            }
            Self::Longhaul => {
                command.arg("run").arg("-c").arg(folder.join("longhaul.yaml"));
                Reload::Signal(Signal::HUP, rendered(1))
            }
            Self::Nginx => {
                command.arg("-p").arg(folder).arg("-e").arg("stderr").arg("-c").arg(folder.join("nginx.conf"));
                Reload::Signal(Signal::HUP, rendered(1))
            }
            Self::Haproxy => {
                command.arg("-W").arg("-f").arg(folder.join("haproxy.cfg"));
                Reload::Signal(Signal::USR2, rendered(1))
            }
            Self::Caddy => {
                command.args(["run", "--adapter", "caddyfile", "--config"]).arg(folder.join("Caddyfile"));
                command.env("HOME", folder).env("XDG_DATA_HOME", folder).env("XDG_CONFIG_HOME", folder);
                Reload::Post(SocketAddr::from(([127, 0, 0, 1], places.admin)), rendered(1))
            }
            Self::Envoy => {
                command.args(["--concurrency", "2", "--disable-hot-restart", "-l", "error", "-c"]);
                command.arg(folder.join("envoy.yaml"));
                Reload::Watched(rendered(2))
            }
        })
    }

    fn values(self, places: &Places<'_>, generation: usize) -> Vec<(&'static str, String)> {
        let Places { port, admin, setup } = places;
        let backends = |separator: &str, backend: &dyn Fn(usize, &SocketAddr) -> String| {
            let backends: Vec<String> =
                setup.agents.iter().enumerate().map(|(index, agent)| backend(index, agent)).collect();
            backends.join(separator)
        };
        let choose = |http1: String, tls: String, http2: String| match setup.front {
            Front::Http1 => http1,
            Front::Tls => tls,
            Front::Http2 => http2,
        };
        let certificate = setup.certificate.certificate.display();
        let key = setup.certificate.key.display();
        let seconds = 3600 + generation;
        let mut values = vec![
            ("PORT", port.to_string()),
            ("ADMIN", admin.to_string()),
            ("FOLDER", setup.folder.display().to_string()),
        ];
        values.extend(match self {
            Self::Direct | Self::Floor => Vec::new(),
            Self::Longhaul => vec![
                ("BACKENDS", backends(", ", &|_, agent| format!("\"http://{agent}\""))),
                ("IDLE_TIMEOUT", format!("{seconds}s")),
                (
                    "TLS",
                    choose(
                        String::new(),
                        format!("tls: {{certificates: [{{cert_file: {certificate}, key_file: {key}}}]}}"),
                        String::new(),
                    ),
                ),
            ],
            Self::Nginx => vec![
                ("BACKENDS", backends("\n", &|_, agent| format!("        server {agent} max_fails=0;"))),
                ("LISTEN", choose(String::new(), "ssl".to_owned(), "http2".to_owned())),
                ("GENERATION", format!("generation {generation}")),
                (
                    "TLS",
                    choose(
                        String::new(),
                        format!(
                            "        ssl_certificate {certificate};\n        ssl_certificate_key {key};\n        ssl_buffer_size 4k;"
                        ),
                        "        http2_max_requests 100000000;".to_owned(),
                    ),
                ),
            ],
            Self::Haproxy => vec![
                ("BACKENDS", backends("\n", &|index, agent| format!("    server agent{index} {agent}"))),
                ("SERVER_TIMEOUT", format!("{seconds}s")),
                (
                    "BIND",
                    choose(
                        String::new(),
                        format!("ssl crt {} alpn http/1.1", setup.certificate.both.display()),
                        "proto h2".to_owned(),
                    ),
                ),
            ],
            Self::Caddy => vec![
                ("BACKENDS", backends(" ", &|_, agent| agent.to_string())),
                ("DIAL_TIMEOUT", format!("{}s", 5 + generation)),
                ("PROTOCOLS", choose("h1".to_owned(), "h1".to_owned(), "h1 h2 h2c".to_owned())),
                (
                    "SITE",
                    choose(format!("http://:{port}"), format!("https://localhost:{port}"), format!("http://:{port}")),
                ),
                ("TLS", choose(String::new(), format!("tls {certificate} {key}"), String::new())),
            ],
            Self::Envoy => vec![
                (
                    "BACKENDS",
                    backends("\n", &|_, agent| {
                        format!(
                            "      - {{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}}}",
                            agent.ip(),
                            agent.port()
                        )
                    }),
                ),
                ("CONNECT_TIMEOUT", format!("{}s", 5 + generation)),
                ("IDLE_TIMEOUT", format!("{seconds}s")),
                (
                    "TLS",
                    choose(
                        "name: plain".to_owned(),
                        format!(
                            "transport_socket: {{name: envoy.transport_sockets.tls, typed_config: {{\
                             \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, \
                             common_tls_context: {{alpn_protocols: [http/1.1], tls_certificates: [{{\
                             certificate_chain: {{filename: {certificate}}}, private_key: {{filename: {key}}}}}]}}}}}}"
                        ),
                        "name: plain".to_owned(),
                    ),
                ),
            ],
        });
        values
    }
}

struct Places<'a> {
    port: u16,
    admin: u16,
    setup: &'a Setup<'a>,
}

/// A started proxy; dropping it ends its processes.
pub struct Running {
    child: Option<Child>,
    pub target: String,
    pub reload: Reload,
    log: PathBuf,
}

/// How a proxy takes a new configuration: two generations of its files, used in turn.
#[derive(Clone)]
pub enum Reload {
    None,
    /// Write the files, then send a signal.
    Signal(Signal, [Vec<(PathBuf, String)>; 2]),
    /// Post the file to the admin address.
    Post(SocketAddr, [Vec<(PathBuf, String)>; 2]),
    /// Replace the files; the proxy watches them.
    Watched([Vec<(PathBuf, String)>; 2]),
}

impl Reload {
    /// Gives the generation `number` to the proxy with the process `pid`.
    pub fn perform(&self, pid: Option<u32>, number: usize) -> anyhow::Result<()> {
        match self {
            Self::None => Ok(()),
            Self::Signal(signal, generations) => {
                write_all_anew(&generations[number % 2])?;
                let pid = pid.and_then(|pid| Pid::from_raw(pid.cast_signed())).context("no process to signal")?;
                Ok(kill_process(pid, *signal)?)
            }
            Self::Watched(generations) => write_all_anew(&generations[number % 2]),
            Self::Post(address, generations) => {
                let body = &generations[number % 2][0].1;
                let mut stream = TcpStream::connect_timeout(address, Duration::from_secs(2))?;
                stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                let request = format!(
                    "POST /load HTTP/1.1\r\nhost: {address}\r\norigin: http://{address}\r\ncontent-type: text/caddyfile\r\n\
                     content-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                stream.write_all(request.as_bytes())?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                if !answer.starts_with("HTTP/1.1 200") {
                    bail!("the reload was answered with {}", answer.lines().next().unwrap_or("nothing"));
                }
                Ok(())
            }
        }
    }
}

const START_TIMEOUT_NS: u64 = 15_000_000_000;

impl Running {
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn wait_until_it_accepts(&mut self, port: u16) -> anyhow::Result<()> {
        let deadline_ns = monotonic_ns() + START_TIMEOUT_NS;
        loop {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Ok(());
            }
            let ended = self.child.as_mut().map(Child::try_wait).transpose()?.flatten();
            if ended.is_some() || monotonic_ns() > deadline_ns {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                let last: Vec<&str> = log.lines().rev().take(5).collect();
                bail!("it does not accept connections; its last words: {}", last.join(" | "));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end(child);
        }
    }
}

/// The mock agent as a process of its own; dropping it ends it.
pub struct AgentProcess {
    child: Child,
    pub addresses: Vec<SocketAddr>,
}

impl AgentProcess {
    pub fn start(backends: usize, slots: Option<usize>) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["agent", "--backends", &backends.to_string()]);
        if let Some(slots) = slots {
            command.args(["--slots", &slots.to_string()]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("the agent has no stdout")?;
        BufReader::new(stdout).read_line(&mut line)?;
        match serde_json::from_str::<Bound>(&line) {
            Ok(bound) => Ok(Self { child, addresses: bound.addresses }),
            Err(error) => {
                end(&mut child);
                Err(error).context("the agent did not say where it listens")
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

const END_TIMEOUT_NS: u64 = 3_000_000_000;

/// Asks a process to end and, after a while, ends it and what it started.
fn end(child: &mut Child) {
    let family = tree_ids(&[child.id()]);
    let signal = |signal| {
        for pid in family.iter().filter_map(|&pid| Pid::from_raw(pid.cast_signed())) {
            // It may be gone already.
            let _ = kill_process(pid, signal);
        }
    };
    signal(Signal::TERM);
    let deadline_ns = monotonic_ns() + END_TIMEOUT_NS;
    while monotonic_ns() < deadline_ns {
        if matches!(child.try_wait(), Ok(Some(_)) | Err(_)) && tree_ids(&family).is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    signal(Signal::KILL);
    let _ = child.wait();
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    // Debian keeps servers where users' search paths don't look.
    path.split(':')
        .chain(["/usr/local/sbin", "/usr/sbin"])
        .map(|folder| Path::new(folder).join(name))
        .find(|file| file.is_file())
}

/// A port that is free now, below those that Linux hands out to clients: with thousands of connections being made, one
/// of these could be taken between this check and its use.
fn free_port() -> anyhow::Result<u16> {
    let mut random = Random::new(monotonic_ns());
    (0..1000)
        .map(|_| 10_000 + (random.draw() % 20_000) as u16)
        .find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        .context("no free port between 10000 and 30000")
}

fn render(template: &str, values: &[(&str, String)]) -> String {
    values.iter().fold(template.to_owned(), |text, (name, value)| text.replace(&format!("@{name}@"), value))
}

fn write_all_anew(files: &[(PathBuf, String)]) -> anyhow::Result<()> {
    files.iter().try_for_each(|(path, text)| write_anew(path, text))
}

/// Replaces a file in one step, so that who watches it never sees half of it.
fn write_anew(path: &Path, text: &str) -> anyhow::Result<()> {
    let beside = path.with_extension("new");
    fs::write(&beside, text)?;
    Ok(fs::rename(beside, path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_in_every_template_gets_a_value() {
        let folder = tempfile::tempdir().unwrap();
        let certificate = TestCertificate::create(folder.path()).unwrap();
        let programs = Programs { longhaul: PathBuf::new(), envoy: None };
        let agents = [SocketAddr::from(([127, 0, 0, 1], 1)), SocketAddr::from(([127, 0, 0, 1], 2))];
        for front in [Front::Http1, Front::Tls, Front::Http2] {
            let setup =
                Setup { front, agents: &agents, folder: folder.path(), certificate: &certificate, programs: &programs };
            for peer in Peer::ALL {
                let places = Places { port: 1000, admin: 1001, setup: &setup };
                let reload = peer.configure(&places, &mut Command::new("true")).unwrap();
                let (Reload::Signal(_, generations) | Reload::Post(_, generations) | Reload::Watched(generations)) =
                    reload
                else {
                    continue;
                };
                assert_ne!(generations[0], generations[1], "{peer:?}: two generations differ");
                for (path, text) in generations.iter().flatten() {
                    let left = text
                        .split('@')
                        .skip(1)
                        .find(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_uppercase() || c == '_'));
                    assert_eq!(left, None, "{} has a place without a value", path.display());
                    assert!(text.contains("127.0.0.1:2") || text.contains("port_value: 2") || text.contains("1000"));
                }
            }
        }
    }
}
