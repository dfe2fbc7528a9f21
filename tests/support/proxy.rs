//! Proxy: the product in this process, on ports of its own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use longhaul::app::{self, App, Options};
use longhaul::config::Address;
use longhaul::control::discovery::Surroundings;
use longhaul::ids;
use longhaul::state::dispatcher::Dispatcher;
use longhaul::state::status::ServiceStatus;
use serde_json::Value;
use tempfile::TempDir;

use super::client::{RawClient, Response, fetch};
use super::eventually_async;

/// A running proxy. Dropping it stops it.
pub struct Proxy {
    /// The first listener.
    pub address: SocketAddr,
    /// Every TCP listener, in the order of the file.
    pub listeners: Vec<SocketAddr>,
    pub admin: SocketAddr,
    pub app: App,
    directory: TempDir,
}

/// Starts the product with this configuration. Where the text has no `listeners` or `admin`, they are added, on port 0;
/// without `log` there is no access log.
pub async fn start_proxy(config: &str) -> Proxy {
    start_proxy_with(config, |_| {}).await
}

/// As [`start_proxy`], with other options.
pub async fn start_proxy_with(config: &str, change: impl FnOnce(&mut Options)) -> Proxy {
    let proxy = begin_proxy(config, change);
    eventually_async("the proxy is ready", || async { proxy.admin("GET", "/readyz").await.status() == 200 }).await;
    proxy
}

/// As [`start_proxy`], where endpoints are looked for in these surroundings, and without waiting for it to be ready.
pub fn start_proxy_in(surroundings: Surroundings, config: &str) -> Proxy {
    begin_proxy(config, |options| options.heritage.surroundings = surroundings)
}

fn begin_proxy(config: &str, change: impl FnOnce(&mut Options)) -> Proxy {
    let directory = tempfile::tempdir().expect("a directory");
    let file = write_config(directory.path(), config);
    let app = launch(&file, change).unwrap_or_else(|problem| panic!("{problem}\n{config}"));
    let listeners: Vec<SocketAddr> = app.bound.listeners.iter().filter_map(|(_, address)| tcp(address)).collect();
    Proxy {
        address: listeners.first().copied().unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0))),
        listeners,
        admin: tcp(&app.bound.admin).expect("the admin API of tests listens on TCP"),
        app,
        directory,
    }
}

/// The one call into the product.
fn launch(file: &Path, change: impl FnOnce(&mut Options)) -> Result<App, String> {
    let loaded = longhaul::config::load(file).map_err(|problems| problems.to_string())?;
    let mut options = Options::new(file.to_owned(), loaded);
    change(&mut options);
    app::build(options).map_err(|error| error.to_string())
}

/// The socket address of a TCP listener.
fn tcp(address: &Address) -> Option<SocketAddr> {
    match address {
        Address::Tcp(address) => Some(*address),
        Address::Unix(_) => None,
    }
}

impl Proxy {
    /// The directory of the configuration file, for relative paths.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn config_file(&self) -> PathBuf {
        self.directory.path().join("longhaul.yaml")
    }

    pub async fn connect(&self) -> RawClient {
        RawClient::connect(self.address).await
    }

    /// Replaces the file and asks for a reload; the answer says whether it took effect.
    pub async fn reload(&self, config: &str) -> Response {
        write_config(self.directory.path(), config);
        self.admin("POST", "/api/v1/reload").await
    }

    pub async fn admin(&self, method: &str, path: &str) -> Response {
        ask_admin(self.admin, method, path).await
    }

    pub async fn status(&self) -> Value {
        self.admin("GET", "/api/v1/status").await.json()
    }

    /// The dispatcher of the first service.
    pub fn dispatcher(&self) -> Arc<Dispatcher> {
        Arc::clone(&self.app.running.snapshot.load().services[0].dispatcher)
    }

    /// What the first service's dispatcher knows at this instant.
    pub fn state(&self) -> ServiceStatus {
        self.dispatcher().status(ids::now())
    }

    /// The outstanding runs of the first service at this instant.
    pub fn outstanding(&self) -> u64 {
        self.state().outstanding_runs
    }

    /// The addresses of the first version's endpoints in this state, sorted.
    pub async fn endpoints_in(&self, state: &str) -> Vec<String> {
        let endpoints = self.status().await["services"][0]["versions"][0]["endpoints"].clone();
        let mut named: Vec<String> = endpoints
            .as_array()
            .expect("a list")
            .iter()
            .filter(|endpoint| endpoint["state"] == state)
            .map(|endpoint| endpoint["address"].as_str().expect("an address").to_owned())
            .collect();
        named.sort();
        named
    }

    /// The status of the endpoint of this address (`host:port`), wherever it is.
    pub async fn endpoint(&self, address: &str) -> Option<Value> {
        let status = self.status().await;
        let services = status["services"].as_array()?;
        let versions = services.iter().filter_map(|service| service["versions"].as_array()).flatten();
        let mut endpoints = versions.filter_map(|version| version["endpoints"].as_array()).flatten();
        endpoints.find(|endpoint| endpoint["address"] == address).cloned()
    }

    /// Drains (or undrains) an endpoint as an operator does.
    pub async fn drain(&self, service: &str, address: &str, undrain: bool) -> Response {
        let address = address.replace('/', "%2F").replace(':', "%3A");
        let verb = if undrain { "undrain" } else { "drain" };
        self.admin("POST", &format!("/api/v1/services/{service}/endpoints/{address}/{verb}")).await
    }

    /// The sum of a metric's series that have all of `labels` (`service="support"`); `None` where there is no such series.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> Option<f64> {
        let text = self.admin("GET", "/metrics").await.text();
        let values = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (series_name, rest) = series.split_once('{').unwrap_or((series, ""));
            let matches = series_name == name && labels.iter().all(|label| rest.contains(label));
            matches.then(|| value.parse::<f64>().ok())?
        });
        values.reduce(|sum, value| sum + value)
    }

    /// Waits until a metric has this value.
    pub async fn metric_becomes(&self, name: &str, labels: &[&str], value: f64) {
        let what = format!("{name}{labels:?} becomes {value}");
        eventually_async(&what, || async { self.metric(name, labels).await == Some(value) }).await;
    }
}

/// Asks an admin API on TCP. It refuses a Host that is not its own address.
pub async fn ask_admin(address: SocketAddr, method: &str, path: &str) -> Response {
    fetch(address, format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n")).await
}

/// Writes the file as editors do: a new one, moved over the old.
fn write_config(directory: &Path, config: &str) -> PathBuf {
    let mut text = String::new();
    if !config.lines().any(|line| line.starts_with("listeners:")) {
        text.push_str("listeners: [{address: \"127.0.0.1:0\"}]\n");
    }
    if !config.lines().any(|line| line.starts_with("admin:")) {
        text.push_str("admin: {address: \"127.0.0.1:0\"}\n");
    }
    if !config.lines().any(|line| line.starts_with("log:")) {
        text.push_str("log: {access: false}\n");
    }
    if !config.lines().any(|line| line.starts_with("shutdown:")) {
        text.push_str("shutdown: {delay: 0s, timeout: 10s}\n");
    }
    text.push_str(config);
    let file = directory.join("longhaul.yaml");
    let draft = directory.join(".longhaul.yaml.new");
    std::fs::write(&draft, text).expect("writable directory");
    std::fs::rename(&draft, &file).expect("same directory");
    file
}
