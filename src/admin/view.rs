//! View: the live state in the shapes that the admin API and the metrics show.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use serde::Serialize;
use serde_json::{Value, json};

use crate::admin::guard::Reader;
use crate::admin::{Context, draining};
use crate::config::State;
use crate::control::discovery::SourceStatus;
use crate::ids;
use crate::logging;
use crate::metrics::{Scrape, ScrapedEndpoint, ScrapedService, ScrapedSource, ScrapedVersion};
use crate::state::dispatcher::Dispatcher;
use crate::state::status::{RunInfo, ServiceStatus, SessionInfo};
use crate::store;

/// As [`crate::scaling::Source::dispatchers`].
pub fn dispatchers(context: &Context) -> Vec<Arc<Dispatcher>> {
    context.source.dispatchers()
}

fn services(context: &Context, now: Instant) -> Vec<ServiceStatus> {
    context.source.services(now)
}

/// Of all services.
pub fn outstanding_runs(context: &Context, now: Instant) -> u64 {
    services(context, now).iter().map(|service| service.outstanding_runs).sum()
}

/// `GET /api/v1/status`
pub fn status(context: &Context, now: Instant) -> Value {
    let snapshot = context.running.snapshot.load();
    let reload = context.reload_state.status();
    let listeners: Vec<Value> = snapshot
        .listeners
        .iter()
        .map(|listener| {
            json!({
                "name": listener.config.name,
                "address": listener.local_address.to_string(),
                "tls": listener.tls.is_some(),
                "connections": listener.metrics.connections.get(),
            })
        })
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "config": {
            "generation": reload.generation,
            "sha256": reload.sha256,
            "loaded_at": str::from_utf8(&logging::timestamp(reload.loaded_at)).unwrap_or_default(),
            "last_error": reload.last_error.map(|problems| problems.to_string()),
        },
        "draining": draining(context),
        "state": match &snapshot.loaded.config.state {
            State::Memory => json!("memory"),
            State::File(directory) => json!({ "file": store::path_in(directory) }),
        },
        "open_exchanges": context.running.open_exchanges.get(),
        "listeners": listeners,
        "services": services(context, now),
        "discovery": context.discovery.status().iter().map(discovery).collect::<Vec<Value>>(),
    })
}

/// A source of endpoints.
fn discovery(source: &SourceStatus) -> Value {
    let age = source.last_success.map(|at| ids::wall_clock().duration_since(at).unwrap_or_default());
    json!({
        "service": *source.service,
        "version": *source.version,
        "source": *source.source,
        "answered": source.answered,
        "endpoints": {"ready": source.ready, "not_ready": source.not_ready, "draining": source.draining},
        "last_success_ms": age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
        "failures": source.failures,
        "problem": source.problem.as_deref(),
    })
}

/// What `/metrics` shows besides its own counters.
pub fn scrape(context: &Context, now: Instant) -> Scrape {
    let reload = context.reload_state.status();
    Scrape {
        generation: reload.generation,
        draining: draining(context),
        reloads_succeeded: reload.succeeded,
        reloads_failed: reload.failed,
        last_reload_successful: reload.last_error.is_none(),
        services: services(context, now).into_iter().map(scraped).collect(),
        sources: context.discovery.status().iter().map(scraped_source).collect(),
    }
}

fn scraped_source(source: &SourceStatus) -> ScrapedSource {
    let since = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    ScrapedSource {
        service: source.service.to_string(),
        version: source.version.to_string(),
        source: source.source.to_string(),
        endpoints: [source.ready, source.not_ready, source.draining].map(|count| count as u64),
        last_success_seconds: source.last_success.map_or(0.0, since),
        failures: source.failures,
        has_problem: source.problem.is_some(),
    }
}

fn scraped(service: ServiceStatus) -> ScrapedService {
    let versions = service.versions.into_iter().map(|version| ScrapedVersion {
        name: version.name,
        effective_weight: version.effective_weight,
        sessions_begun: version.dealt.sessions,
        runs_ended: version.dealt.runs,
        run_seconds: version.dealt.run_time.as_secs_f64(),
        sessions: version.sessions,
        outstanding_runs: version.outstanding_runs,
        run_capacity: version.capacity,
        endpoints: version
            .endpoints
            .into_iter()
            .map(|endpoint| ScrapedEndpoint {
                address: endpoint.address,
                state: endpoint.state.as_str(),
                outstanding_runs: u64::from(endpoint.outstanding_runs),
                sessions: u64::from(endpoint.sessions),
                empty_in_seconds: endpoint.drain.as_ref().map_or([None; 2], |drain| {
                    let seconds = |milliseconds: u64| milliseconds as f64 / 1000.0;
                    [drain.empty_in.p50_ms.map(seconds), drain.empty_in.p95_ms.map(seconds)]
                }),
            })
            .collect(),
    });
    ScrapedService {
        name: service.name,
        queued_runs: service.queue.length,
        demand: service.demand,
        placeable_demand: service.placeable_demand,
        saturation: service.saturation.filter(|saturation| saturation.is_finite()),
        versions: versions.collect(),
    }
}

/// A row with the service that it belongs to.
#[derive(Serialize)]
pub struct Row<T> {
    service: String,
    #[serde(flatten)]
    row: T,
}

/// At most `limit` sessions, those with this key only where one is given.
pub fn sessions(
    dispatchers: &[Arc<Dispatcher>],
    key: Option<&str>,
    limit: usize,
    reader: Reader,
    now: Instant,
) -> Vec<Row<SessionInfo>> {
    rows(dispatchers, limit, |dispatcher, limit| {
        let mut found = dispatcher.sessions(key, limit, now);
        for session in &mut found {
            hide(&mut session.key, reader);
        }
        found
    })
}

/// At most `limit` outstanding runs, those of this session only where one is given.
pub fn runs(
    dispatchers: &[Arc<Dispatcher>],
    session: Option<&str>,
    limit: usize,
    reader: Reader,
    now: Instant,
) -> Vec<Row<RunInfo>> {
    rows(dispatchers, limit, |dispatcher, limit| {
        let mut found = dispatcher.runs(session, limit, now);
        for key in found.iter_mut().filter_map(|run| run.session.as_mut()) {
            hide(key, reader);
        }
        found
    })
}

fn rows<T>(
    dispatchers: &[Arc<Dispatcher>],
    limit: usize,
    mut read: impl FnMut(&Dispatcher, usize) -> Vec<T>,
) -> Vec<Row<T>> {
    let mut rows: Vec<Row<T>> = Vec::new();
    for dispatcher in dispatchers {
        let free = limit - rows.len();
        if free == 0 {
            break;
        }
        let found = read(dispatcher, free);
        rows.extend(found.into_iter().take(free).map(|row| Row { service: dispatcher.name().to_string(), row }));
    }
    rows
}

/// As in the access log, so that a line there can be found here.
fn hide(key: &mut String, reader: Reader) {
    if !reader.plain_keys {
        *key = String::from_utf8_lossy(&logging::hash_session(key)).into_owned();
    }
}
