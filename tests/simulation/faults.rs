//! Faults: what goes wrong in a seed's world, and when; and that all of it is healed in the end.

use std::rc::Rc;
use std::time::Duration;

use longhaul::ids::simulation::jump_wall_clock;
use longhaul::net::simulated::{Link, Passage};
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep};

use crate::agent::Death;
use crate::shape::{PROXY, agent_address, agent_host, client_host, pick};
use crate::world::World;

/// How long everything may stand still at once.
const PAUSE_MAX: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct Fault {
    /// Since the beginning.
    at: Duration,
    what: What,
    /// Until it is healed.
    lasts: Duration,
}

#[derive(Clone, Debug)]
enum What {
    ClientLink(usize, Link),
    AgentLink(usize, Link),
    ClientReset(usize),
    AgentReset(usize),
    Death(usize, Death),
    /// It stands still, with everything that it does.
    Stop(usize),
    OperatorDrain(usize),
    ToldDrain(usize),
    Removal(usize),
    Limits(Vec<Option<u32>>, Vec<Option<u32>>),
    Weight(usize, u32),
    SameMeaning,
    Nonsense,
    WallClock {
        hours: u64,
        back: bool,
    },
    /// The whole machine of the proxy stands still.
    Pause,
}

pub fn draw(world: &World, chance: &mut SmallRng) -> Vec<Fault> {
    let shape = &world.shape;
    let count = chance.random_range(0..=14);
    let mut plan: Vec<Fault> = (0..count)
        .map(|_| {
            let client = chance.random_range(0..shape.clients);
            let agent = chance.random_range(0..shape.agents);
            let limit = |chance: &mut SmallRng| chance.random_bool(0.8).then(|| chance.random_range(1..=4));
            let what = match chance.random_range(0..20) {
                0 => What::ClientLink(client, bad_link(chance)),
                1..4 => What::AgentLink(agent, bad_link(chance)),
                4 => What::ClientReset(client),
                5 => What::AgentReset(agent),
                6 | 7 => What::Death(agent, Death::Process),
                8 | 9 => What::Death(agent, Death::Machine),
                10 => What::Stop(agent),
                11 => What::OperatorDrain(agent),
                12 => What::ToldDrain(agent),
                13 | 14 => What::Removal(agent),
                15 => {
                    let of_services = shape.services.iter().map(|_| limit(chance)).collect();
                    let of_agents = (0..shape.agents).map(|_| chance.random_bool(0.3).then(|| limit(chance)).flatten());
                    What::Limits(of_services, of_agents.collect())
                }
                16 => What::Weight(agent, chance.random_range(1..=5)),
                17 => pick_reload(chance),
                18 => What::WallClock { hours: chance.random_range(1..=100), back: chance.random_bool(0.5) },
                _ => What::Pause,
            };
            let at = Duration::from_millis(chance.random_range(0..shape.seconds * 800));
            let lasts = match chance.random_bool(0.6) {
                true => Duration::from_millis(chance.random_range(10..4_000)),
                false => Duration::from_millis(chance.random_range(4_000..30_000)),
            };
            Fault { at, what, lasts }
        })
        .collect();
    plan.sort_by_key(|fault| fault.at);
    plan
}

fn pick_reload(chance: &mut SmallRng) -> What {
    if chance.random_bool(0.5) { What::SameMeaning } else { What::Nonsense }
}

fn bad_link(chance: &mut SmallRng) -> Link {
    let link = Link::default();
    match chance.random_range(0..4) {
        0 => Link { passage: Passage::Held, ..link },
        1 => Link { passage: Passage::Cut, ..link },
        2 => Link { loss: chance.random_range(0.05..0.4), ..link },
        _ => Link {
            latency: Duration::from_millis(chance.random_range(20..500)),
            jitter: Duration::from_millis(pick(chance, &[0, 50, 300])),
            ..link
        },
    }
}

/// Each at its time; returns when the last is over.
pub async fn carry_out(world: &Rc<World>, plan: Vec<Fault>) {
    let began = Instant::now();
    let faults: Vec<_> = plan
        .into_iter()
        .map(|fault| {
            let world = Rc::clone(world);
            spawn_local(async move {
                tokio::time::sleep_until(began + fault.at).await;
                world.trace.note(format!("fault: {fault:?}"));
                begin(&world, &fault).await;
                sleep(fault.lasts).await;
                world.trace.note(format!("over: {:?}", fault.what));
                end(&world, &fault.what).await;
            })
        })
        .collect();
    for fault in faults {
        // It panics only where this file is wrong, which the panic hook tells.
        let _ = fault.await;
    }
}

async fn begin(world: &Rc<World>, fault: &Fault) {
    mark(world, &fault.what);
    match &fault.what {
        What::ClientLink(client, link) => world.set_link(client_host(*client), *link),
        What::AgentLink(agent, link) => world.set_link(agent_host(*agent), *link),
        What::ClientReset(client) => world.network.reset_all(client_host(*client), PROXY),
        What::AgentReset(agent) => world.network.reset_all(agent_host(*agent), PROXY),
        What::Death(agent, death) => world.agents[*agent].die(world, *death),
        What::Stop(agent) => world.agents[*agent].stands_until.set(Some(Instant::now() + fault.lasts)),
        What::OperatorDrain(agent) => drain(world, *agent, "drain").await,
        What::ToldDrain(agent) => world.agents[*agent].drains.set(true),
        What::Removal(agent) => {
            world.settings.borrow_mut().endpoints[*agent].present = false;
            world.reload().await;
        }
        What::Limits(of_services, of_agents) => {
            {
                let mut settings = world.settings.borrow_mut();
                settings.max_per_endpoint.clone_from(of_services);
                for (endpoint, limit) in settings.endpoints.iter_mut().zip(of_agents) {
                    endpoint.max_runs = *limit;
                }
            }
            world.reload().await;
        }
        What::Weight(agent, weight) => {
            world.settings.borrow_mut().endpoints[*agent].weight = *weight;
            world.reload().await;
        }
        What::SameMeaning => {
            world.settings.borrow_mut().comment += 1;
            world.reload().await;
        }
        What::Nonsense => world.reload_nonsense().await,
        What::WallClock { hours, back } => jump_wall_clock(Duration::from_secs(hours * 3600), *back),
        What::Pause => {
            world.oracle.borrow_mut().trouble_all();
            (0..world.shape.clients).for_each(|client| world.trouble_client(client));
            tokio::time::advance(fault.lasts.min(PAUSE_MAX)).await;
        }
    }
}

async fn end(world: &Rc<World>, what: &What) {
    mark(world, what);
    match what {
        What::ClientLink(client, _) => world.set_link(client_host(*client), Link::default()),
        What::AgentLink(agent, _) => world.set_link(agent_host(*agent), Link::default()),
        What::Death(agent, death) => revive(world, *agent, *death),
        What::OperatorDrain(agent) => drain(world, *agent, "undrain").await,
        What::ToldDrain(agent) => world.agents[*agent].drains.set(false),
        What::Removal(agent) => {
            world.settings.borrow_mut().endpoints[*agent].present = true;
            world.reload().await;
        }
        What::ClientReset(_)
        | What::AgentReset(_)
        | What::Stop(_)
        | What::Limits(..)
        | What::Weight(..)
        | What::SameMeaning
        | What::Nonsense
        | What::WallClock { .. }
        | What::Pause => {}
    }
}

fn revive(world: &Rc<World>, agent: usize, death: Death) {
    if death == Death::Machine {
        world.network.restore_power(agent_host(agent));
    }
    world.agents[agent].start(world);
}

/// Notes whom it touches.
fn mark(world: &World, what: &What) {
    match what {
        What::ClientLink(client, _) | What::ClientReset(client) => world.trouble_client(*client),
        What::AgentLink(agent, _)
        | What::AgentReset(agent)
        | What::Death(agent, _)
        | What::Stop(agent)
        | What::OperatorDrain(agent)
        | What::ToldDrain(agent)
        | What::Removal(agent) => world.oracle.borrow_mut().trouble(*agent),
        What::Limits(..)
        | What::Weight(..)
        | What::SameMeaning
        | What::Nonsense
        | What::WallClock { .. }
        | What::Pause => {}
    }
}

async fn drain(world: &World, agent: usize, verb: &str) {
    let service = world.shape.service_of(agent);
    let address = agent_address(agent).to_string().replace(':', "%3A");
    let answer = world.admin("POST", &format!("/api/v1/services/s{service}/endpoints/{address}/{verb}")).await;
    // Of one that a reload has removed and that is empty nothing is known.
    if !answer.starts_with("HTTP/1.1 2") && !answer.starts_with("HTTP/1.1 404") {
        world.trace.violation(format!("{verb} of agent {agent}: {answer}"));
    }
}

/// Nothing is wrong any more.
pub async fn heal(world: &Rc<World>) {
    world.heal_links();
    for agent in 0..world.shape.agents {
        revive(world, agent, Death::Machine);
        world.agents[agent].drains.set(false);
        drain(world, agent, "undrain").await;
    }
    for endpoint in &mut world.settings.borrow_mut().endpoints {
        endpoint.present = true;
        endpoint.weight = 1;
    }
    world.reload().await;
}
