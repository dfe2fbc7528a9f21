//! Shape: what a seed's world is made of, and the configuration that the proxy has of it, which reloads change.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use rand::RngExt;
use rand::rngs::SmallRng;

pub const PROXY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
pub const ADMIN: &str = "127.0.0.1:9901";

/// Where clients connect.
pub fn listener() -> SocketAddr {
    SocketAddr::new(PROXY, 8080)
}

pub fn agent_host(agent: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 1, agent as u8 + 1))
}

pub fn agent_address(agent: usize) -> SocketAddr {
    SocketAddr::new(agent_host(agent), 8000)
}

pub fn client_host(client: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 2, client as u8 + 1))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// A header has the session, each POST is a run.
    Http,
    /// Runs go on when their requests have ended.
    LangGraph,
}

/// What the seed makes of a service. The rest changes by reloads.
#[derive(Clone, Debug)]
pub struct Service {
    pub protocol: Protocol,
    pub double_texting: &'static str,
    pub queue_max: usize,
    pub queue_timeout: u64,
    pub when_draining: &'static str,
    pub when_lost: &'static str,
    pub checks_health: bool,
    pub drain_timeout: u64,
    pub agents: Vec<usize>,
}

impl Service {
    /// Two runs of one session are never at agents at once.
    pub fn takes_turns(&self) -> bool {
        self.double_texting != "allow"
    }
}

pub struct Shape {
    pub services: Vec<Service>,
    pub agents: usize,
    pub clients: usize,
    /// For so long clients make turns, and faults happen.
    pub seconds: u64,
}

/// What reloads change.
#[derive(Clone, Debug)]
pub struct Settings {
    /// By service.
    pub max_per_endpoint: Vec<Option<u32>>,
    /// By agent.
    pub endpoints: Vec<EndpointSettings>,
    /// Changes nothing that is seen.
    pub comment: u64,
}

#[derive(Clone, Copy, Debug)]
pub struct EndpointSettings {
    pub present: bool,
    pub weight: u32,
    pub max_runs: Option<u32>,
}

impl Shape {
    pub fn draw(chance: &mut SmallRng) -> Shape {
        let agents = chance.random_range(3..=6);
        let services: usize = chance.random_range(1..=3);
        let of = |service: usize| (0..agents).filter(|agent| agent % services == service).collect::<Vec<_>>();
        let services = (0..services)
            .map(|index| {
                let protocol = if chance.random_bool(0.3) { Protocol::LangGraph } else { Protocol::Http };
                Service {
                    protocol,
                    double_texting: pick(chance, &["allow", "reject", "enqueue", "interrupt"]),
                    queue_max: chance.random_range(1..=20),
                    queue_timeout: chance.random_range(3..=20),
                    when_draining: pick(chance, &["move-idle", "stay"]),
                    when_lost: pick(chance, &["rebind", "rebind", "reject"]),
                    checks_health: chance.random_bool(0.8),
                    drain_timeout: chance.random_range(5..=15),
                    agents: of(index),
                }
            })
            .collect();
        let clients = chance.random_range(5..=30);
        let seconds = chance.random_range(30..=80);
        Shape { services, agents, clients, seconds }
    }

    pub fn service_of(&self, agent: usize) -> usize {
        self.services.iter().position(|service| service.agents.contains(&agent)).unwrap_or_default()
    }

    /// The file, as `settings` are now.
    pub fn configuration(&self, settings: &Settings) -> String {
        let mut text = format!(
            "# {}\nlisteners: [{{name: public, address: \"{}\", keepalive_timeout: 20s}}]\n\
             admin: {{address: \"{ADMIN}\"}}\nlog: {{access: false}}\nshutdown: {{delay: 1s, timeout: 20s}}\nroutes:\n",
            settings.comment,
            listener()
        );
        for index in 0..self.services.len() {
            let _ = writeln!(text, "  - {{match: {{path: /s{index}/**}}, service: s{index}}}");
        }
        text.push_str("services:\n");
        for (index, service) in self.services.iter().enumerate() {
            let _ = writeln!(text, "  - name: s{index}");
            match service.protocol {
                Protocol::Http => {
                    text.push_str("    agent_protocol: http\n    session: {key: [{header: x-session}], WHEN}\n")
                }
                Protocol::LangGraph => text.push_str("    agent_protocol: langgraph\n    session: {WHEN}\n"),
            }
            let when = format!("when_draining: {}, when_lost: {}", service.when_draining, service.when_lost);
            text = text.replace("WHEN", &when);
            let max = settings.max_per_endpoint[index].map_or("null".to_owned(), |max| max.to_string());
            let _ = writeln!(
                text,
                "    runs: {{max_per_endpoint: {max}, queue: {{max: {}, timeout: {}s}}, double_texting: {{policy: {}}}, \
                 unseen_timeout: 60s}}",
                service.queue_max, service.queue_timeout, service.double_texting
            );
            text.push_str("    timeouts: {connect: 2s, first_byte: 20s, idle: 30s}\n");
            if service.checks_health {
                text.push_str(
                    "    health: {path: /health, interval: 2s, timeout: 1s, unhealthy_after: 2, healthy_after: 1}\n",
                );
            }
            text.push_str("    outlier: {consecutive_failures: 3, eject_for: 5s}\n");
            text.push_str("    pool: {max_idle: 10, idle_timeout: 10s}\n");
            let _ = writeln!(text, "    drain: {{timeout: {}s}}", service.drain_timeout);
            text.push_str("    versions:\n      - name: stable\n        endpoints:");
            let present: Vec<usize> =
                service.agents.iter().copied().filter(|agent| settings.endpoints[*agent].present).collect();
            text.push_str(if present.is_empty() { " []\n" } else { "\n" });
            for agent in present {
                let EndpointSettings { weight, max_runs, .. } = settings.endpoints[agent];
                let max = max_runs.map_or(String::new(), |max| format!(", max_runs: {max}"));
                let _ =
                    writeln!(text, "          - {{url: \"http://{}\", weight: {weight}{max}}}", agent_address(agent));
            }
        }
        text
    }

    pub fn first_settings(&self, chance: &mut SmallRng) -> Settings {
        let limit = |chance: &mut SmallRng| chance.random_bool(0.8).then(|| chance.random_range(1..=4));
        Settings {
            max_per_endpoint: self.services.iter().map(|_| limit(chance)).collect(),
            endpoints: vec![EndpointSettings { present: true, weight: 1, max_runs: None }; self.agents],
            comment: 0,
        }
    }
}

impl Settings {
    /// How many runs an agent may have at once.
    pub fn limit(&self, shape: &Shape, agent: usize) -> Option<u32> {
        self.endpoints[agent].max_runs.or(self.max_per_endpoint[shape.service_of(agent)])
    }
}

pub fn pick<T: Copy>(chance: &mut SmallRng, of: &[T]) -> T {
    of[chance.random_range(0..of.len())]
}
