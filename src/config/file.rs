//! File: the shape of the configuration file, from its top; routes and services have files of their own.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use super::certificates::{self, PairError};
use super::kubernetes::kubernetes;
use super::read::{Block, Kind, Located, block};
use super::routes::{RouteTarget, routes};
use super::services::services;
use super::values::{
    address, boolean, choice, count, duration, integer, network, path, positive_duration, ratio, size, small,
    socket_address, text,
};
use super::{
    Address, Admin, CertificateFiles, Config, EndpointHost, EndpointUrl, Kubernetes, Limits, Listener, ListenerTls,
    Log, LogFormat, LogLevel, SessionIds, Shutdown, State, TlsVersion,
};

/// The whole file.
pub fn file() -> Kind<'static, Config> {
    block("a mapping with `listeners` and `services`", |top| {
        let listeners = top.required("listeners", "Addresses on which clients connect.", listener().located().list());
        let admin = top.key("admin", "Where the admin API, metrics and the live page are served.", admin(), "{}");
        let debug_from = top.key(
            "debug_from",
            "Effective client addresses that may ask for longhaul-debug.",
            network().list(),
            "[127.0.0.0/8, \"::1/128\"]",
        );
        let log = top.key("log", "Diagnostics (stderr) and the access log (stdout).", log(), "{}");
        top.key("trace", "Distributed tracing.", trace(), "{}");
        let shutdown = top.key("shutdown", "How the proxy drains on SIGTERM.", shutdown(), "{}");
        let about =
            "Where sessions, runs and rollouts are kept: `memory`, a file or redis. Can't change while the proxy runs.";
        let state = top.key("state", about, state(), "memory");
        let kubernetes = top.key("kubernetes", "Only where Kubernetes is used.", kubernetes(), "{}");
        let services =
            top.key("services", "One for each agent, whatever versions of it are deployed.", services(), "[]");
        // Also of services with problems, lest their routes seem to lead nowhere.
        let names = top.names_in("services");
        let about = "First match wins. None at all: everything goes to the only service.";
        let routes = top.key("routes", about, routes(&names), "[]");

        if let Some(listeners) = &listeners {
            if listeners.is_empty() && !top.has_items("listeners") {
                top.problem("listeners", "there is no listener; add one, such as `- address: 0.0.0.0:8080`");
            }
            check_addresses(top, listeners, &admin, &kubernetes);
        }
        for service in services.iter().filter(|service| state == State::Memory && service.value.rollout.is_some()) {
            let message = "with `state: memory` a restart of the proxy forgets how far the rollout is and starts it again; \
                           keep it with `state: {file: ..}`";
            service.warning(top.context(), "rollout", message);
        }
        if is_open_sidecar(&admin, &services) {
            let message = "this looks like a sidecar: its only endpoints are on this machine. The agent beside it runs tools, which \
                           reach this address as well; give the admin API a `token_file`, or a unix socket that only longhaul mounts";
            top.warning("admin", message);
        }
        let fixed = !routes.is_empty() && routes.iter().all(|target| matches!(target, RouteTarget::Fixed(_)));
        if names.is_empty() && !fixed && !top.has_items("services") {
            top.problem("services", "there is no service; add one, or let every route redirect or respond");
        }
        let routes = if routes.is_empty() && !top.has_items("routes") {
            if names.len() > 1 {
                let message = "there are several services and no routes, so it is open which service a request is for; \
                               add `routes`, each with a `match` and a `service`";
                top.problem("services", message);
            }
            vec![RouteTarget::Service(super::routes::everything_to(0))]
        } else {
            check_all_used(top, &services, &routes);
            routes
        };
        Some(Config {
            listeners: listeners?.into_iter().map(|listener| listener.value).collect(),
            admin,
            debug_from,
            log,
            shutdown,
            state,
            kubernetes,
            routes: routes.into_iter().map(RouteTarget::into_route).collect(),
            services: services.into_iter().map(|service| service.value).collect(),
        })
    })
}

fn check_all_used(top: &mut Block, services: &[Located<super::Service>], routes: &[RouteTarget]) {
    for (index, service) in services.iter().enumerate() {
        let used = routes.iter().any(|target| match target {
            RouteTarget::Service(route) => route.action == super::RouteAction::Service(index),
            RouteTarget::Unknown => true,
            RouteTarget::Fixed(_) => false,
        });
        if !used {
            let message = format!("no route leads to the service {}", service.value.name);
            top.context().warning(service.spot, &service.path, message);
        }
    }
}

/// Whoever runs beside the proxy could steer it. It is taken for a sidecar where it serves local endpoints alone and others
/// look at its probes.
fn is_open_sidecar(admin: &Admin, services: &[Located<super::Service>]) -> bool {
    let endpoints = || {
        let versions = services.iter().flat_map(|service| &service.value.versions);
        versions.flat_map(|version| &version.endpoints)
    };
    let is_local = |endpoint: &super::Endpoint| match &endpoint.url {
        EndpointUrl::Unix(_) => true,
        EndpointUrl::Tcp { host: EndpointHost::Ip(address), .. } => address.to_canonical().is_loopback(),
        EndpointUrl::Tcp { host: EndpointHost::Name(name), .. } => name.eq_ignore_ascii_case("localhost"),
    };
    matches!(admin.address, Address::Tcp(_))
        && admin.token_file.is_none()
        && admin.probes.is_some_and(|probes| !probes.ip().to_canonical().is_loopback())
        && endpoints().next().is_some()
        && endpoints().all(is_local)
}

fn check_addresses(top: &mut Block, listeners: &[Located<Listener>], admin: &Admin, kubernetes: &Kubernetes) {
    let mut taken: HashMap<Address, String> = HashMap::new();
    let mut names: HashMap<&str, usize> = HashMap::new();
    let mut reserve = |address: &Address, owner: String| -> Option<String> {
        // Port 0 is a free port for each.
        if matches!(address, Address::Tcp(address) if address.port() == 0) {
            return None;
        }
        match taken.get(address) {
            Some(earlier) => Some(format!("the address {address} is already used by {earlier}; each needs its own")),
            None => {
                taken.insert(address.clone(), owner);
                None
            }
        }
    };
    reserve(&admin.address, "`admin.address`".to_owned());
    if let Some(probes) = admin.probes {
        reserve(&Address::Tcp(probes), "`admin.probes`".to_owned());
    }
    let of_scaling = [
        ("kubernetes.external_metrics", kubernetes.external_metrics.as_ref().map(|metrics| metrics.address)),
        ("kubernetes.keda", kubernetes.keda.as_ref().map(|keda| keda.address)),
    ];
    for (name, address) in of_scaling {
        if let Some(message) = address.and_then(|address| reserve(&Address::Tcp(address), format!("`{name}`"))) {
            top.problem("kubernetes", message);
        }
    }
    for listener in listeners {
        let Located { value, spot, .. } = listener;
        if let Some(message) = reserve(&value.address, format!("the listener in line {}", spot.line)) {
            listener.problem(top.context(), "address", message);
        } else if let Some(line) = names.get(value.name.as_str()) {
            let message = format!(
                "the name {} is already that of the listener in line {line}; give each its own `name`",
                value.name
            );
            listener.problem(top.context(), "name", message);
        }
        names.entry(&value.name).or_insert(spot.line);
    }
}

fn listener() -> Kind<'static, Listener> {
    block("a listener such as {address: 0.0.0.0:8080}", |block| {
        let name = block.key(
            "name",
            "What metrics and status call it; its address by default.",
            listener_name().nullable(),
            "null",
        );
        let about = "IP:port ([::]:8080 is dual stack) or unix:/path. HTTP/1.1 and HTTP/2 on one port.";
        let address = block.required("address", about, address());
        let tls = block.optional("tls", "TLS; without it the listener speaks cleartext.", listener_tls());
        let about = "Networks of proxies whose Forwarded and X-Forwarded fields are believed.";
        let trusted_proxies = block.key("trusted_proxies", about, network().list(), "[]");
        let proxy_protocol = block.key(
            "proxy_protocol",
            "`accept`: PROXY protocol v1 and v2, only from trusted_proxies.",
            choice(&[("none", false), ("accept", true)]),
            "none",
        );
        let about = "An idle connection is closed after that long.";
        let keepalive_timeout = block.key("keepalive_timeout", about, positive_duration(), "75s");
        let limits = block.key("limits", "Bounds of what a client may send.", limits(), "{}");
        if proxy_protocol && trusted_proxies.is_empty() && !block.has_items("trusted_proxies") {
            let message = "`accept` needs `trusted_proxies`: anyone else could claim any client address; \
                           add the networks of the proxies in front";
            block.problem("proxy_protocol", message);
        }
        let address = address?;
        let name = name.unwrap_or_else(|| address.to_string());
        block.show("name", serde_json::json!(name));
        Some(Listener { name, address, tls, trusted_proxies, proxy_protocol, keepalive_timeout, limits })
    })
}

/// Any text in one line: the default name, an address, may be a path.
fn listener_name() -> Kind<'static, String> {
    text().checked(|name| match name.is_empty() || name.len() > 256 || name.contains(char::is_control) {
        true => Err("a name has 1 to 256 characters in one line".to_owned()),
        false => Ok(()),
    })
}

fn limits() -> Kind<'static, Limits> {
    block("a mapping of limits", |block| {
        Some(Limits {
            max_connections: block.key("max_connections", "Connections open at once.", count(1), "100000"),
            header_timeout: block.key("header_timeout", "For a whole request head.", positive_duration(), "10s"),
            max_header_bytes: block.key(
                "max_header_bytes",
                "A longer request head is answered 431.",
                size(256, 16 << 20),
                "64KiB",
            ) as usize,
            max_headers: block.key("max_headers", "Fields in a request head.", integer(1, 10_000), "128") as usize,
            max_body_bytes: block.key(
                "max_body_bytes",
                "A longer request body is answered 413.",
                size(0, 1 << 50),
                "100MiB",
            ),
            max_streams_per_connection: block.key(
                "max_streams_per_connection",
                "Exchanges at once on one HTTP/2 connection.",
                small(1, 1_000_000),
                "256",
            ),
        })
    })
}

fn listener_tls() -> Kind<'static, ListenerTls> {
    block("a mapping with `certificates`", |block| {
        let about =
            "Certificates with their keys, chosen by SNI, the first where none fits; re-read when the files change.";
        let certificates = block.required("certificates", about, certificate_files().list());
        let about = "Authorities of client certificates; where set, clients must have one (mTLS).";
        let client_ca_file = block.optional("client_ca_file", about, authorities_file());
        let min_version = block.key(
            "min_version",
            "The oldest TLS version that is spoken.",
            choice(&[("1.2", TlsVersion::V1_2), ("1.3", TlsVersion::V1_3)]),
            "\"1.2\"",
        );
        let certificates = certificates?;
        if certificates.is_empty() && !block.has_items("certificates") {
            block.problem("certificates", "there is no certificate; add {cert_file: .., key_file: ..}");
        }
        Some(ListenerTls { certificates, client_ca_file, min_version })
    })
}

pub fn certificate_files() -> Kind<'static, CertificateFiles> {
    block("{cert_file: .., key_file: ..}", |block| {
        let cert_file = block.required("cert_file", "The certificate chain, PEM, the server's own first.", path());
        let key_file = block.required("key_file", "The private key, PEM.", path());
        let (cert_file, key_file) = (cert_file?, key_file?);
        check_pair(block, &cert_file, &key_file);
        Some(CertificateFiles { cert_file, key_file })
    })
}

/// Adds what is wrong with the files of `cert_file` and `key_file` to the problems of the block that has these keys.
pub fn check_pair(block: &mut Block, cert_file: &std::path::Path, key_file: &std::path::Path) {
    match certificates::check_pair(cert_file, key_file) {
        Ok(()) => {}
        Err(PairError::Certificate(message)) => block.problem("cert_file", message),
        Err(PairError::Key(message)) => block.problem("key_file", message),
    }
}

/// A PEM file with certificates of authorities.
pub fn authorities_file() -> Kind<'static, PathBuf> {
    path().checked(|file| certificates::check_authorities(file))
}

fn admin() -> Kind<'static, Admin> {
    block("a mapping with `address`", |block| {
        let address = block.key("address", "IP:port or unix:/path (mode 0600).", address(), "127.0.0.1:9901");
        let about = "A file with the bearer token; required when the address is neither loopback nor a unix socket.";
        let token_file = block.optional("token_file", about, path().checked(|path| check_token(path)));
        let about = "A second address with only /healthz /readyz /metrics /busy, without token.";
        let probes = block.optional("probes", about, probes());
        let probes = probes.flatten();
        if let (Address::Tcp(address), Some(probes)) = (&address, probes)
            && *address == probes
            && address.port() != 0
        {
            block.problem(
                "probes",
                format!("{probes} is already the `address` of the admin API; probes need their own"),
            );
        }
        let open = matches!(&address, Address::Tcp(address) if !address.ip().to_canonical().is_loopback());
        if open && token_file.is_none() && !block.has("token_file") {
            let message = format!(
                "{address} can be reached from other machines, so it needs `token_file`; \
                 or listen on 127.0.0.1 or unix:/path and give probes their own address with `probes`"
            );
            block.problem("address", message);
        }
        Some(Admin { address, token_file, probes })
    })
}

fn probes() -> Kind<'static, Option<std::net::SocketAddr>> {
    block("{address: 0.0.0.0:9900}", |block| {
        Some(block.required("address", "IP:port of the probes listener.", socket_address()))
    })
}

fn check_token(path: &std::path::Path) -> Result<(), String> {
    match std::fs::read_to_string(path) {
        Ok(token) if token.trim().is_empty() => Err(format!("{} is empty; it must hold the token", path.display())),
        Ok(_) => Ok(()),
        Err(error) => Err(format!("cannot read {}: {error}", path.display())),
    }
}

fn log() -> Kind<'static, Log> {
    const LEVELS: &[(&str, LogLevel)] = &[
        ("error", LogLevel::Error),
        ("warn", LogLevel::Warn),
        ("info", LogLevel::Info),
        ("debug", LogLevel::Debug),
        ("trace", LogLevel::Trace),
    ];
    block("a mapping with `level`, `format`, `access`, `session_ids`", |block| {
        Some(Log {
            level: block.key("level", "The least severe diagnostics that are written.", choice(LEVELS), "info"),
            format: block.key(
                "format",
                "How lines are written.",
                choice(&[("text", LogFormat::Text), ("json", LogFormat::Json)]),
                "text",
            ),
            access: block.key("access", "Whether there is an access log.", boolean(), "true"),
            session_ids: block.key(
                "session_ids",
                "How session keys appear in logs.",
                choice(&[("hashed", SessionIds::Hashed), ("plain", SessionIds::Plain)]),
                "hashed",
            ),
        })
    })
}

fn trace() -> Kind<'static, ()> {
    block("a mapping with `otlp_endpoint`", |block| {
        block.optional("otlp_endpoint", "The collector's URL.", text());
        block.key("sample", "The share of exchanges that is traced.", ratio(), "100%");
        Some(())
    })
}

fn shutdown() -> Kind<'static, Shutdown> {
    block("a mapping with `delay` and `timeout`", |block| {
        let about = "How long everything is still served after SIGTERM, while /readyz already says 503.";
        let delay: Duration = block.key("delay", about, duration(), "5s");
        let timeout = block.key("timeout", "After that long what still runs is cut.", positive_duration(), "10m");
        Some(Shutdown { delay, timeout })
    })
}

fn state() -> Kind<'static, State> {
    let elsewhere = block("{file: /var/lib/longhaul} or {redis: {url: ..}}", |block| {
        let file = block.variant("file", "A directory of this machine; it is made where it is not there.", path());
        let about = "A Redis or Valkey that several replicas share.";
        block.variant(
            "redis",
            about,
            super::read::block("{url: redis://..}", |block| block.required("url", "Its URL.", text())),
        );
        if !block.has("file") && !block.has("redis") {
            block.problem("", "it is open where the state is kept; write `memory` or `{file: /var/lib/longhaul}`");
        }
        file.map(State::File)
    });
    choice(&[("memory", ())]).map(|()| State::Memory).or_block(elsewhere)
}
