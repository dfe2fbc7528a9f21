//! Replicas: the load of all replicas of the proxy together, this one's included.
//!
//! They are found by their headless service and asked over the port of their probes. The answer is the sum of all or an
//! error: of a replica that can't be asked its last numbers count for a while, and then there is no sum. So whoever scales
//! by it holds what there is, and never takes pods away because somebody was not heard.

mod follow;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use http::HeaderValue;
use http::header::{ACCEPT, AUTHORIZATION};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::warn;

use crate::config::{self, Address, EndpointHost, EndpointUrl, HostPolicy, HttpVersion};
use crate::control::call::{self, Question, Way};
use crate::ids;
use crate::scaling::names::Names;
use crate::scaling::{Load, Source};

pub use follow::Following;

/// For one sum: below the ten seconds after which the control plane of a cluster gives up on an answer.
const SUM_TIMEOUT: Duration = Duration::from_secs(5);
/// For DNS.
const NAMES_TIMEOUT: Duration = Duration::from_secs(2);
/// For the answer of one replica.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long what a replica said last, and what DNS said last, stands for what can't be had.
const STALE_MAX: Duration = Duration::from_secs(30);
/// A sum is given to all who ask within so long: one for each autoscaler object would be the same.
const FRESH: Duration = Duration::from_millis(500);
/// Replicas that are asked at once.
const ASKED_AT_ONCE: usize = 16;
/// More replicas than that are taken for a mistake: of a name that is not ours.
const REPLICAS_MAX: usize = 256;
/// Of one answer: ten thousand endpoints.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// Sums up replicas. One for each process.
pub struct Replicas {
    source: Source,
    names: Names,
    heard: Mutex<Heard>,
    /// One sum at a time, for all who wait for it: of those without and with endpoints.
    sums: [tokio::sync::Mutex<Option<(Instant, Load)>>; 2],
    /// Told when a replica that is followed has said something new.
    told: Notify,
    /// The one task that follows, while anybody wants it.
    following: Mutex<Weak<follow::Task>>,
}

/// What was heard last.
#[derive(Default)]
struct Heard {
    /// Of DNS.
    addresses: Option<Named>,
    /// For sums.
    replicas: HashMap<SocketAddr, Said>,
    /// Of the others by following them. Apart, because a follower says what it heard last, and is told of what is else.
    followed: HashMap<SocketAddr, Said>,
}

/// Whom DNS named last.
struct Named {
    /// Where they were looked for: elsewhere they are nobody.
    settings: config::Replicas,
    addresses: Vec<SocketAddr>,
    at: Instant,
}

/// What a replica said last.
#[derive(Clone)]
struct Said {
    load: Load,
    at: Instant,
}

impl Named {
    /// Those who may be asked while DNS has no answer: an address that it named long ago may be another's by now.
    fn still_good(&self, settings: &config::Replicas, now: Instant) -> Option<&[SocketAddr]> {
        let is_good = self.settings == *settings && now.saturating_duration_since(self.at) <= STALE_MAX;
        is_good.then_some(&self.addresses[..])
    }
}

impl Heard {
    /// What the replicas at these addresses have to do, each process once and without `own`. It is of all of them or an
    /// error, which names the one that was not heard. Whoever left the service is forgotten.
    fn parts(
        &mut self,
        own: &str,
        addresses: &[SocketAddr],
        failures: &HashMap<SocketAddr, String>,
        now: Instant,
    ) -> Result<Vec<Load>, String> {
        self.replicas.retain(|address, _| addresses.contains(address));
        let mut counted = vec![own];
        let mut parts = Vec::new();
        for address in addresses {
            let failure = || failures.get(address).map_or("it did not answer", String::as_str);
            let said = self.replicas.get(address);
            let said = said.ok_or_else(|| format!("the replica {address} can't be asked: {}", failure()))?;
            let age = now.saturating_duration_since(said.at);
            if age > STALE_MAX {
                let seconds = age.as_secs();
                return Err(format!("the replica {address} can't be asked for {seconds} s: {}", failure()));
            }
            // One that does not say which process it is is another than all that don't: to count one twice keeps pods that
            // are not needed, to leave one out takes those that are.
            if said.load.instance.is_empty() || !counted.contains(&said.load.instance.as_str()) {
                counted.push(&said.load.instance);
                parts.push(said.load.clone());
            }
        }
        Ok(parts)
    }
}

impl Replicas {
    /// `name_servers`: to be asked instead of the machine's.
    pub fn new(source: Source, name_servers: Option<&[SocketAddr]>) -> Arc<Replicas> {
        Arc::new(Replicas {
            source,
            names: Names::new(name_servers),
            heard: Mutex::default(),
            sums: Default::default(),
            told: Notify::new(),
            following: Mutex::default(),
        })
    }

    pub fn source(&self) -> &Source {
        &self.source
    }

    /// This process's own part.
    pub fn own(&self, with_endpoints: bool) -> Load {
        self.source.load(with_endpoints, ids::now())
    }

    /// What all replicas have to do. The error says which of them can't be asked, and why.
    pub async fn sum(&self, with_endpoints: bool) -> Result<Load, String> {
        let Some(settings) = self.settings() else { return Ok(self.own(with_endpoints)) };
        // Held while others are asked, because whoever waits for it wants that answer; a caller that gives up lets go of it.
        let mut last = self.sums[usize::from(with_endpoints)].lock().await;
        let begun = ids::now();
        if let Some((_, sum)) = last.as_ref().filter(|(at, _)| begun.saturating_duration_since(*at) < FRESH) {
            return Ok(sum.clone());
        }
        let sum = match tokio::time::timeout(SUM_TIMEOUT, self.ask_all(&settings, with_endpoints)).await {
            Ok(sum) => sum?,
            Err(_) => return Err(format!("the replicas could not be asked within {SUM_TIMEOUT:?}")),
        };
        *last = Some((begun, sum.clone()));
        Ok(sum)
    }

    async fn ask_all(&self, settings: &config::Replicas, with_endpoints: bool) -> Result<Load, String> {
        let addresses = self.addresses(settings).await?;
        let target = if with_endpoints { "/metrics?endpoints=true" } else { "/metrics" };
        let mut waiting = addresses.iter().copied();
        let mut asking = JoinSet::new();
        let mut failures: HashMap<SocketAddr, String> = HashMap::new();
        loop {
            while asking.len() < ASKED_AT_ONCE
                && let Some(address) = waiting.next()
            {
                let token = self.token(address).await;
                asking.spawn(async move { (address, ask(address, target, token, ASK_TIMEOUT).await) });
            }
            match asking.join_next().await {
                None => break,
                Some(Ok((address, Ok(load)))) => {
                    self.lock().replicas.insert(address, Said { load, at: ids::now() });
                }
                Some(Ok((address, Err(failure)))) => {
                    failures.insert(address, failure);
                }
                Some(Err(_)) => {}
            }
        }
        self.add_up(&addresses, &failures, with_endpoints)
    }

    /// Own numbers are read last, so that they are not older than the others'.
    fn add_up(
        &self,
        addresses: &[SocketAddr],
        failures: &HashMap<SocketAddr, String>,
        with_endpoints: bool,
    ) -> Result<Load, String> {
        let parts = self.lock().parts(self.source.instance(), addresses, failures, ids::now())?;
        for (address, failure) in failures {
            warn!("the replica {address} can't be asked ({failure}): its last numbers count for {STALE_MAX:?}");
        }
        let mut sum = self.own(with_endpoints);
        parts.iter().for_each(|part| sum.add(part));
        Ok(sum)
    }

    /// Those of all replicas. Where DNS has no answer, its last one counts for a while.
    async fn addresses(&self, settings: &config::Replicas) -> Result<Vec<SocketAddr>, String> {
        let asked = tokio::time::timeout(NAMES_TIMEOUT, self.names.addresses(&settings.dns)).await;
        let found = asked.unwrap_or_else(|_| Err(format!("DNS has no answer for {}", settings.dns)));
        let now = ids::now();
        let mut heard = self.lock();
        match found {
            Ok(found) if found.len() > REPLICAS_MAX => Err(format!(
                "{} has {} addresses, and {REPLICAS_MAX} replicas are the most; is it the right name?",
                settings.dns,
                found.len()
            )),
            Ok(found) => {
                let found: Vec<SocketAddr> =
                    found.into_iter().map(|address| SocketAddr::new(address, settings.port)).collect();
                heard.addresses = Some(Named { settings: settings.clone(), addresses: found.clone(), at: now });
                Ok(found)
            }
            Err(failure) => match heard.addresses.as_ref().and_then(|known| known.still_good(settings, now)) {
                Some(known) => {
                    warn!("{failure}: the replicas that it named last count for {STALE_MAX:?}");
                    Ok(known.to_vec())
                }
                None => Err(failure),
            },
        }
    }

    /// As the newest configuration has it.
    fn settings(&self) -> Option<config::Replicas> {
        let snapshot = self.source.running.snapshot.load();
        snapshot.loaded.config.kubernetes.replicas().cloned()
    }

    /// The admin API's own token, for a replica at whose port that answers. Probes want none, and nobody is sent a secret
    /// that he does not want; nor is anybody whom DNS does not name, as only those are asked.
    async fn token(&self, replica: SocketAddr) -> Option<HeaderValue> {
        let admin = self.source.running.snapshot.load().loaded.config.admin.clone();
        let is_admin = matches!(&admin.address, Address::Tcp(address) if address.port() == replica.port());
        let file = admin.token_file.filter(|_| is_admin)?;
        let token = tokio::fs::read_to_string(file).await.ok()?;
        let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim())).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the replica at `address` says of itself.
async fn ask(address: SocketAddr, target: &str, token: Option<HeaderValue>, timeout: Duration) -> Result<Load, String> {
    let mut set = vec![(ACCEPT, HeaderValue::from_static("application/json"))];
    set.extend(token.map(|token| (AUTHORIZATION, token)));
    let way = Way {
        url: EndpointUrl::Tcp { https: false, host: EndpointHost::Ip(address.ip()), port: address.port() },
        port: None,
        http: HttpVersion::Http1,
        host: HostPolicy::Endpoint,
        set,
        tls: None,
    };
    let asking = async {
        let stream = call::connect(&way).await?;
        let answer = call::ask(&way, stream, &Question::get(target), ANSWER_BYTES_MAX).await?;
        if !answer.status.is_success() {
            return Err(format!("it answers {}", answer.status.as_u16()));
        }
        let body = answer.body.read().await;
        serde_json::from_slice(&body)
            .map_err(|failure| format!("its answer is no load ({failure}); is this the port of its probes?"))
    };
    tokio::time::timeout(timeout, asking).await.unwrap_or_else(|_| Err(format!("no answer within {timeout:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scaling::load::ServiceLoad;

    fn address(number: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, number], 9900))
    }

    fn said(instance: &str, demand: u64, at: Instant) -> Said {
        let service = ServiceLoad { demand, ..ServiceLoad::default() };
        let services = [("support".to_owned(), service)].into();
        Said { load: Load { instance: instance.to_owned(), services, ..Load::default() }, at }
    }

    #[test]
    fn the_last_numbers_count_for_a_while_and_then_there_is_an_error() {
        let start = ids::now();
        let addresses = [address(1), address(2), address(3)];
        let mut heard = Heard::default();
        heard.replicas.insert(address(1), said("own", 7, start));
        heard.replicas.insert(address(2), said("b", 5, start));
        let nobody = HashMap::new();
        let missing = heard.parts("own", &addresses, &nobody, start).unwrap_err();
        assert!(missing.contains("10.0.0.3:9900"), "{missing}");

        heard.replicas.insert(address(3), said("c", 3, start));
        let demand = |parts: Vec<Load>| parts.iter().map(|part| part.services["support"].demand).sum::<u64>();
        let failures = HashMap::from([(address(2), "connection refused".to_owned())]);
        assert_eq!(
            heard.parts("own", &addresses, &failures, start + STALE_MAX).map(demand),
            Ok(8),
            "own is not among them"
        );
        let later = start + STALE_MAX + Duration::from_secs(1);
        heard.replicas.insert(address(3), said("c", 3, later));
        let stale = heard.parts("own", &addresses[1..], &failures, later).unwrap_err();
        assert!(stale.contains("10.0.0.2:9900") && stale.contains("refused"), "{stale}");
        assert_eq!(
            heard.parts("own", &addresses[2..], &failures, later).map(demand),
            Ok(3),
            "whoever left counts no more"
        );
        assert!(!heard.replicas.contains_key(&address(2)));
    }

    #[test]
    fn replicas_that_do_not_say_who_they_are_count_each() {
        let start = ids::now();
        let mut heard = Heard::default();
        heard.replicas.insert(address(1), said("", 5, start));
        heard.replicas.insert(address(2), said("", 3, start));
        heard.replicas.insert(address(3), said("own", 7, start));
        let addresses = [address(1), address(2), address(3)];
        assert_eq!(heard.parts("own", &addresses, &HashMap::new(), start).map(|parts| parts.len()), Ok(2));
    }

    #[test]
    fn whom_dns_named_long_ago_or_for_another_name_is_asked_no_more() {
        let now = ids::now();
        let settings = |dns: &str, port| config::Replicas { dns: dns.to_owned(), port };
        let named = Named { settings: settings("a.svc", 9901), addresses: vec![address(1)], at: now };
        assert_eq!(named.still_good(&settings("a.svc", 9901), now + STALE_MAX), Some(&[address(1)][..]));
        assert_eq!(named.still_good(&settings("a.svc", 9901), now + 2 * STALE_MAX), None);
        assert_eq!(named.still_good(&settings("b.svc", 9901), now), None);
        assert_eq!(named.still_good(&settings("a.svc", 9900), now), None);
    }

    #[test]
    fn a_replica_with_two_addresses_counts_once() {
        let start = ids::now();
        let mut heard = Heard::default();
        heard.replicas.insert(address(1), said("b", 5, start));
        heard.replicas.insert(address(2), said("b", 5, start));
        assert_eq!(
            heard.parts("own", &[address(1), address(2)], &HashMap::new(), start).map(|parts| parts.len()),
            Ok(1)
        );
    }
}
