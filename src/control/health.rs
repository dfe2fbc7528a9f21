//! Health: asks every endpoint that has a check how it is, and tells its dispatcher.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::sync::{Semaphore, watch};
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use crate::config;
use crate::control::call::{self, Body, Question, Way};
use crate::ids;
use crate::json::{Extractor, Pointers};
use crate::protocols::Protocol;
use crate::snapshot::Recognition;
use crate::state::dispatcher::Dispatcher;

/// Probes under way at once, of all services; more wait for their turn.
const PROBES_MAX: usize = 256;
/// An endpoint that does not tell its load is asked again after so many intervals.
const ABSENT_LOAD_INTERVALS: u32 = 6;
/// How much of an answer's body is read, so that the endpoint can finish writing it; more is cut.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// One endpoint to be probed, and who is to hear of it.
pub struct Check {
    pub service: Arc<str>,
    pub dispatcher: Arc<Dispatcher>,
    /// [`EndpointUrl::identity`].
    pub identity: String,
    pub probe: Probe,
}

/// How to probe one endpoint.
#[derive(Clone)]
pub struct Probe {
    pub way: Way,
    pub health: config::Health,
    /// Where its protocol has a path of its own for the number of its runs.
    pub own_load: Option<OwnLoad>,
}

/// Where endpoints of a protocol tell how many runs they have.
#[derive(Clone, Copy)]
pub struct OwnLoad {
    pub path: &'static str,
    pub protocol: &'static dyn Protocol,
}

impl OwnLoad {
    /// Only a service of which the protocol is certain is asked in it.
    pub fn of(recognition: Recognition) -> Option<OwnLoad> {
        let Recognition::One(protocol) = recognition else { return None };
        Some(OwnLoad { path: protocol.load_path()?, protocol })
    }
}

/// What one probe showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Healthy,
    /// It works, and takes no new sessions (`health.draining_status`, or `longhaul-drain: 1`).
    Draining,
    /// Healthy, and it says that it does not drain (`longhaul-drain: 0`).
    NotDraining,
    /// And why.
    Unhealthy(String),
    /// 401 or 403: the endpoint answers, but not to us. Nothing changes.
    NoEvidence(StatusCode),
}

/// Keeps one task for each check of the newest configuration; an unchanged check goes on undisturbed.
pub async fn run(mut checks: watch::Receiver<Vec<Arc<Check>>>) {
    let slots = Arc::new(Semaphore::new(PROBES_MAX));
    let mut tasks: HashMap<(Arc<str>, String), Probing> = HashMap::new();
    loop {
        let wanted = checks.borrow_and_update().clone();
        let mut next = HashMap::with_capacity(wanted.len());
        for check in wanted {
            let key = (Arc::clone(&check.service), check.identity.clone());
            let probing = match tasks.remove(&key) {
                Some(probing) if probing.check.same(&check) => probing,
                _ => {
                    let task = tokio::spawn(keep_probing(Arc::clone(&check), Arc::clone(&slots)));
                    Probing { check, _task: AbortOnDropHandle::new(task) }
                }
            };
            next.insert(key, probing);
        }
        // What is left in the old map is no longer wanted: dropping it ends it.
        tasks = next;
        if checks.changed().await.is_err() {
            return;
        }
    }
}

struct Probing {
    check: Arc<Check>,
    /// Ends with it.
    _task: AbortOnDropHandle<()>,
}

impl Check {
    fn same(&self, other: &Check) -> bool {
        let same_health = self.probe.health == other.probe.health;
        let (mine, its) = (&self.probe.way, &other.probe.way);
        let same_tls = match (&mine.tls, &its.tls) {
            (Some(mine), Some(its)) => Arc::ptr_eq(&mine.config, &its.config) && mine.server_name == its.server_name,
            (None, None) => true,
            _ => false,
        };
        same_tls
            && Arc::ptr_eq(&self.dispatcher, &other.dispatcher)
            && mine.url == its.url
            && mine.port == its.port
            && mine.http == its.http
            && mine.host == its.host
            && mine.set == its.set
            && same_health
            && self.probe.own_load.map(|load| load.path) == other.probe.own_load.map(|load| load.path)
    }
}

/// Checks health and asks for load, as far as each is wanted.
async fn keep_probing(check: Arc<Check>, slots: Arc<Semaphore>) {
    let health = &check.probe.health;
    let checked = async {
        if health.path.is_some() || health.tcp {
            keep_checking(&check, &slots).await;
        }
    };
    let loaded = async {
        if let Some(load) = check.probe.own_load {
            keep_asking_for_load(&check, load, &slots).await;
        }
    };
    tokio::join!(checked, loaded);
}

/// Asks each interval how many runs an endpoint has. One that has no such path is asked seldom.
async fn keep_asking_for_load(check: &Check, load: OwnLoad, slots: &Semaphore) {
    let health = &check.probe.health;
    loop {
        let Ok(slot) = slots.acquire().await else { return };
        let asked = tokio::time::timeout(health.timeout, async {
            let stream = call::connect(&check.probe.way).await?;
            let question = Question::get(load.path);
            let answer = call::ask(&check.probe.way, stream, &question, BODY_BYTES_MAX).await?;
            Ok::<_, String>((answer.status, answer.body.read().await))
        });
        let found = match asked.await {
            Ok(Ok((status, body))) if status.is_success() => load.protocol.load(&body),
            _ => None,
        };
        drop(slot);
        let mut rest = health.interval;
        match found {
            Some(runs) => check.dispatcher.reported_load(&check.identity, runs, expiry(health), ids::now()),
            None => rest *= ABSENT_LOAD_INTERVALS,
        }
        tokio::time::sleep(jittered(rest, ids::random_u64())).await;
    }
}

/// The first probe at once, then one each interval.
async fn keep_checking(check: &Check, slots: &Semaphore) {
    let mut last = None;
    let load = check.probe.health.load.as_ref().map(|pointer| Arc::new(Pointers::of([pointer])));
    loop {
        let Ok(slot) = slots.acquire().await else { return };
        let started = ids::now();
        let (verdict, body) = probe(&check.probe).await;
        match &verdict {
            Verdict::Healthy => check.dispatcher.probe_result(&check.identity, true, ids::now()),
            Verdict::Draining => check.dispatcher.probe_drains(&check.identity, true, ids::now()),
            Verdict::NotDraining => check.dispatcher.probe_drains(&check.identity, false, ids::now()),
            Verdict::Unhealthy(_) => check.dispatcher.probe_result(&check.identity, false, ids::now()),
            Verdict::NoEvidence(_) => {}
        }
        if last.as_ref() != Some(&verdict) {
            tell(check, &verdict);
            last = Some(verdict);
        }
        if let Some(body) = body {
            // Slow bodies don't matter: the verdict is known.
            let read = tokio::time::timeout(check.probe.health.timeout, body.read()).await;
            if let (Some(load), Ok(read)) = (&load, read)
                && let Some(runs) = Extractor::read(load, &read).value(0).and_then(reported)
            {
                check.dispatcher.reported_load(&check.identity, runs, expiry(&check.probe.health), ids::now());
            }
        }
        drop(slot);
        let took = ids::now().saturating_duration_since(started);
        tokio::time::sleep(jittered(check.probe.health.interval, ids::random_u64()).saturating_sub(took)).await;
    }
}

/// A number of runs as an endpoint writes it; parts of one count as one.
fn reported(text: &str) -> Option<u32> {
    let runs: f64 = text.parse().ok()?;
    (runs.is_finite() && runs >= 0.0).then(|| runs.ceil().min(f64::from(u32::MAX)) as u32)
}

/// How long a report counts: until the third after it has not come.
fn expiry(health: &config::Health) -> Duration {
    health.interval * 3 + health.timeout
}

fn tell(check: &Check, verdict: &Verdict) {
    let (service, endpoint) = (&check.service, check.probe.way.url.address());
    match verdict {
        Verdict::Healthy | Verdict::NotDraining => info!(%service, endpoint, "health check passed"),
        Verdict::Draining => info!(%service, endpoint, "health check: the endpoint drains"),
        Verdict::Unhealthy(reason) => warn!(%service, endpoint, reason, "health check failed"),
        Verdict::NoEvidence(status) => warn!(
            %service,
            endpoint,
            status = status.as_u16(),
            "the endpoint refuses health checks, which shows nothing: give them a credential in versions[].headers.set, \
             or choose a health.path that needs none"
        ),
    }
}

/// The interval, give or take 10 %, so that probes of many endpoints spread out.
fn jittered(interval: Duration, random: u64) -> Duration {
    let share = (random >> 11) as f64 / (1u64 << 53) as f64;
    interval.mul_f64(0.9 + 0.2 * share)
}

/// Probes once, within `health.timeout`.
pub async fn probe(probe: &Probe) -> (Verdict, Option<Body>) {
    match tokio::time::timeout(probe.health.timeout, ask(probe)).await {
        Ok(Ok(None)) => (Verdict::Healthy, None),
        Ok(Ok(Some(call::Answer { status, drains, body }))) => {
            let verdict = match (judge(status, &probe.health), drains) {
                (Verdict::Healthy, Some(true)) => Verdict::Draining,
                (Verdict::Healthy, Some(false)) => Verdict::NotDraining,
                (verdict, _) => verdict,
            };
            (verdict, Some(body))
        }
        Ok(Err(reason)) => (Verdict::Unhealthy(reason), None),
        Err(_) => (Verdict::Unhealthy(format!("no answer within {:?}", probe.health.timeout)), None),
    }
}

fn judge(status: StatusCode, health: &config::Health) -> Verdict {
    let is_among = |ranges: &[(u16, u16)]| ranges.iter().any(|(low, high)| (*low..=*high).contains(&status.as_u16()));
    if is_among(&health.draining_status) {
        return Verdict::Draining;
    }
    if status == StatusCode::UNAUTHORIZED || status == StatusCode::FORBIDDEN {
        return Verdict::NoEvidence(status);
    }
    if is_among(&health.expect_status) {
        Verdict::Healthy
    } else {
        Verdict::Unhealthy(format!("answered {}", status.as_u16()))
    }
}

/// The answer of an HTTP check, `None` of a TCP check that could connect.
async fn ask(probe: &Probe) -> Result<Option<call::Answer>, String> {
    let stream = call::connect(&probe.way).await?;
    let Some(path) = &probe.health.path else { return Ok(None) };
    call::ask(&probe.way, stream, &Question::get(path), BODY_BYTES_MAX).await.map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_decides_but_401_and_403_are_no_evidence() {
        let health = config::Health {
            path: Some("/health".to_owned()),
            tcp: false,
            port: None,
            expect_status: vec![(200, 299), (404, 404), (429, 429)],
            draining_status: vec![(429, 429), (503, 503)],
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(2),
            unhealthy_after: 3,
            healthy_after: 2,
            load: None,
        };
        let judged = |code: u16| judge(StatusCode::from_u16(code).unwrap(), &health);
        assert_eq!(judged(503), Verdict::Draining);
        assert_eq!(judged(429), Verdict::Draining, "the narrower word wins");
        assert_eq!(judged(200), Verdict::Healthy);
        assert_eq!(judged(299), Verdict::Healthy);
        assert_eq!(judged(404), Verdict::Healthy);
        assert_eq!(judged(300), Verdict::Unhealthy("answered 300".to_owned()));
        assert_eq!(judged(500), Verdict::Unhealthy("answered 500".to_owned()));
        assert_eq!(judged(401), Verdict::NoEvidence(StatusCode::UNAUTHORIZED));
        assert_eq!(judged(403), Verdict::NoEvidence(StatusCode::FORBIDDEN));
    }

    #[test]
    fn jitter_stays_within_a_tenth() {
        let interval = Duration::from_secs(10);
        assert_eq!(jittered(interval, 0), Duration::from_secs(9));
        let most = jittered(interval, u64::MAX);
        assert!(most > Duration::from_millis(10_990) && most <= Duration::from_secs(11), "{most:?}");
    }
}
