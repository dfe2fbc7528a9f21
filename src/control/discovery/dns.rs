//! DNS: the addresses of a name, asked again as their TTL says, and kept where nobody answers.
//!
//! What an answer means: records are what there is. No records of a name that exists (NODATA) is nothing: a headless service
//! that is scaled to zero. A name that does not exist (NXDOMAIN) and did before is believed only after a while, for a
//! resolver that has lost a zone says the same. Anything else (SERVFAIL, silence) says nothing, and changes nothing.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ResolveHosts, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::system_conf::read_system_conf;
use tokio::task::JoinSet;

use crate::config::{DnsSource, EndpointHost};
use crate::control::discovery::{Found, Reporter};
use crate::ids;
use crate::net::name_servers;
use crate::state::discovery::Readiness;

/// A TTL of nothing does not mean to ask without end; a shorter `refresh` goes before it.
const TTL_MIN: Duration = Duration::from_secs(1);
/// Asks again so soon after the first failure, and twice as late after each next one, up to the next limit.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// One look at a name, all its types and search domains together.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// A name that is gone is believed to be after so long, and so many such answers in a row.
const MISSING_FOR: Duration = Duration::from_secs(30);
const MISSING_ANSWERS: u32 = 3;
/// Addresses of one source; more are left out.
const ADDRESSES_MAX: usize = 4096;
/// Targets of SRV records that are looked up at once.
const LOOKUPS_MAX: usize = 16;

/// Looks the name up for as long as it is there.
pub async fn run(source: DnsSource, name_servers: Option<Vec<SocketAddr>>, reporter: Reporter) {
    let mut names = Names::default();
    let mut settled = None;
    let mut failures = 0;
    loop {
        let looked = match Lookups::new(name_servers.as_deref()) {
            Ok(lookups) => tokio::time::timeout(LOOKUP_TIMEOUT, lookups.look_up(&source, &mut settled))
                .await
                .unwrap_or_else(|_| Looked::failed(format!("no answer within {LOOKUP_TIMEOUT:?}"))),
            Err(failure) => Looked::failed(format!("{failure}; look at /etc/resolv.conf")),
        };
        let problem = looked.problem();
        let ttl = looked.ttl();
        let answered = names.take(looked, ids::now());
        let problem = problem.map(|problem| format!("{} can't be resolved: {problem}", source.name));
        let wait = if problem.is_none() {
            failures = 0;
            interval(ttl, source.refresh)
        } else {
            failures += 1;
            retry(failures - 1, source.refresh)
        };
        match (answered, problem) {
            (true, problem) => reporter.found_all(names.found(&source), problem),
            (false, Some(problem)) => reporter.failed(&problem),
            (false, None) => {}
        }
        tokio::time::sleep(jittered(wait, ids::random_u64())).await;
    }
}

/// How long an answer holds.
fn interval(ttl: Option<Duration>, refresh: Duration) -> Duration {
    ttl.map_or(refresh, |ttl| ttl.max(TTL_MIN).min(refresh))
}

/// How soon to ask again after so many failures before.
fn retry(failures: u32, refresh: Duration) -> Duration {
    let doubled = RETRY_MIN.saturating_mul(1 << failures.min(10));
    // Whoever wants to ask often does so also then.
    if refresh < RETRY_MIN {
        refresh.saturating_mul(1 << failures.min(5)).min(RETRY_MIN)
    } else {
        doubled.min(RETRY_MAX)
    }
}

/// Up to a tenth less, so that replicas that were started together don't ask together.
fn jittered(wait: Duration, random: u64) -> Duration {
    let share = (random >> 11) as f64 / (1u64 << 53) as f64;
    wait.mul_f64(1.0 - 0.1 * share)
}

/// What was said about one type of records of one name.
#[derive(Clone, Debug, PartialEq)]
enum Answer<T> {
    /// And how long they hold.
    Records(Vec<T>, Duration),
    /// The name is there, without such records.
    Empty,
    /// There is no such name.
    NoName,
    /// Nobody could say: why.
    Failed(String),
}

/// Both types of addresses of a name.
#[derive(Clone, Debug, PartialEq)]
struct Addresses {
    v4: Answer<IpAddr>,
    v6: Answer<IpAddr>,
}

#[derive(Clone, Debug, PartialEq)]
struct Service {
    priority: u16,
    weight: u16,
    port: u16,
    target: String,
}

/// What one look at a source showed.
enum Looked {
    Addresses(Addresses),
    /// SRV records, and the addresses of their targets.
    Services(Answer<Service>, HashMap<String, Addresses>),
}

impl Looked {
    fn failed(why: String) -> Looked {
        Looked::Addresses(Addresses { v4: Answer::Failed(why.clone()), v6: Answer::Failed(why) })
    }

    /// What went wrong, if anything did.
    fn problem(&self) -> Option<String> {
        let of_addresses = |addresses: &Addresses| addresses.v4.problem().or(addresses.v6.problem());
        match self {
            Looked::Addresses(Addresses { v4: Answer::NoName, v6: Answer::NoName }) => Some(no_name()),
            Looked::Addresses(addresses) => of_addresses(addresses),
            Looked::Services(Answer::NoName, _) => Some(no_name()),
            Looked::Services(services, targets) => services.problem().or_else(|| {
                let mut of_targets: Vec<_> = targets.iter().collect();
                of_targets.sort_unstable_by_key(|(name, _)| *name);
                of_targets.into_iter().find_map(|(name, it)| Some(format!("its target {name}: {}", of_addresses(it)?)))
            }),
        }
    }

    /// The shortest of all records.
    fn ttl(&self) -> Option<Duration> {
        let of_addresses = |addresses: &Addresses| [addresses.v4.ttl(), addresses.v6.ttl()].into_iter().flatten().min();
        match self {
            Looked::Addresses(addresses) => of_addresses(addresses),
            Looked::Services(services, targets) => {
                services.ttl().into_iter().chain(targets.values().filter_map(of_addresses)).min()
            }
        }
    }
}

fn no_name() -> String {
    "there is no such name (NXDOMAIN); look at its spelling, and whether what it names is still there".to_owned()
}

impl<T> Answer<T> {
    fn problem(&self) -> Option<String> {
        match self {
            Answer::Failed(why) => Some(why.clone()),
            Answer::Records(..) | Answer::Empty | Answer::NoName => None,
        }
    }

    fn ttl(&self) -> Option<Duration> {
        match self {
            Answer::Records(_, ttl) => Some(*ttl),
            _ => None,
        }
    }
}

/// The last good answers.
#[derive(Default)]
struct Names {
    /// Of the source's own name.
    addresses: Kept,
    services: KeptOf<Service>,
    targets: HashMap<String, Kept>,
}

#[derive(Default)]
struct Kept {
    v4: KeptOf<IpAddr>,
    v6: KeptOf<IpAddr>,
}

/// The last good answer of one type.
struct KeptOf<T> {
    records: Vec<T>,
    /// Since when, and how many times, the name was said not to exist.
    missing: Option<(Instant, u32)>,
    /// An answer was believed: that there are no records is known then, and not only that nobody has said any.
    known: bool,
}

impl<T> Default for KeptOf<T> {
    fn default() -> KeptOf<T> {
        KeptOf { records: Vec::new(), missing: None, known: false }
    }
}

impl<T> KeptOf<T> {
    /// Takes an answer. False: it says nothing.
    fn take(&mut self, answer: Answer<T>, now: Instant) -> bool {
        match answer {
            Answer::Failed(_) => return false,
            Answer::Records(records, _) => self.records = records,
            Answer::Empty => self.records.clear(),
            Answer::NoName => {
                let (since, count) = self.missing.map_or((now, 1), |(since, count)| (since, count.saturating_add(1)));
                self.missing = Some((since, count));
                if count >= MISSING_ANSWERS && now.saturating_duration_since(since) >= MISSING_FOR {
                    self.records.clear();
                    self.known = true;
                }
                return self.known;
            }
        }
        self.missing = None;
        self.known = true;
        true
    }
}

impl Kept {
    /// All of it is, or there is something: one type alone that has none says nothing of the name.
    fn is_known(&self) -> bool {
        (self.v4.known && self.v6.known) || self.all().next().is_some()
    }

    fn take(&mut self, addresses: Addresses, now: Instant) -> bool {
        let Addresses { v4, v6 } = addresses;
        let (v4, v6) = (self.v4.take(v4, now), self.v6.take(v6, now));
        (v4 || v6) && self.is_known()
    }

    fn all(&self) -> impl Iterator<Item = IpAddr> {
        self.v4.records.iter().chain(&self.v6.records).copied()
    }
}

impl Names {
    /// Takes what a look showed. False: nobody could say anything.
    fn take(&mut self, looked: Looked, now: Instant) -> bool {
        match looked {
            Looked::Addresses(addresses) => self.addresses.take(addresses, now),
            Looked::Services(services, targets) => {
                let answered = self.services.take(services, now);
                for (name, addresses) in targets {
                    self.targets.entry(name).or_default().take(addresses, now);
                }
                let services = &self.services.records;
                self.targets.retain(|name, _| services.iter().any(|service| service.target == *name));
                let mut targets = self.targets.values();
                answered && (targets.clone().all(Kept::is_known) || targets.any(|kept| kept.all().next().is_some()))
            }
        }
    }

    /// The endpoints by what is known.
    fn found(&self, source: &DnsSource) -> Vec<Found> {
        let bare: Arc<str> = source.name.trim_end_matches('.').into();
        let Some(port) = source.port else { return self.found_by_services(source) };
        let mut addresses: Vec<IpAddr> = self.addresses.all().filter(usable).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses.truncate(ADDRESSES_MAX);
        addresses.into_iter().map(|address| found(address, port, false, &bare, 1)).collect()
    }

    /// Those of the lowest priority that has any (RFC 2782), by their weights.
    fn found_by_services(&self, source: &DnsSource) -> Vec<Found> {
        let https = source.name.to_ascii_lowercase().starts_with("_https.");
        let mut priorities: Vec<u16> = self.services.records.iter().map(|service| service.priority).collect();
        priorities.sort_unstable();
        priorities.dedup();
        for priority in priorities {
            let mut all: Vec<Found> = Vec::new();
            for service in self.services.records.iter().filter(|service| service.priority == priority) {
                let name: Arc<str> = service.target.trim_end_matches('.').into();
                let addresses = self.targets.get(&service.target).into_iter().flat_map(Kept::all).filter(usable);
                // A weight of 0 is the least that there is.
                let weight = u32::from(service.weight).max(1);
                all.extend(addresses.map(|address| found(address, service.port, https, &name, weight)));
            }
            all.sort_by_cached_key(Found::key);
            all.dedup_by_key(|found| found.key());
            all.truncate(ADDRESSES_MAX);
            if !all.is_empty() {
                return all;
            }
        }
        Vec::new()
    }
}

/// Nobody listens at the others.
fn usable(address: &IpAddr) -> bool {
    !address.is_unspecified() && !address.is_multicast()
}

fn found(address: IpAddr, port: u16, https: bool, name: &Arc<str>, weight: u32) -> Found {
    Found {
        host: EndpointHost::Ip(address),
        port,
        https,
        name: Arc::clone(name),
        uid: None,
        pod: None,
        zone: None,
        readiness: Readiness::Ready,
        weight,
    }
}

/// Asks name servers.
#[derive(Clone)]
struct Lookups {
    resolver: TokioResolver,
    /// Domains in which a name that is not complete is looked for.
    search: Vec<Name>,
    /// A name with so many dots is looked for as it is first.
    ndots: usize,
}

impl Lookups {
    /// With the system's configuration as it is now, or these servers.
    fn new(name_servers: Option<&[SocketAddr]>) -> Result<Lookups, NetError> {
        let (config, mut options) = match name_servers {
            None => read_system_conf()?,
            Some(servers) => {
                let mut options = ResolverOpts::default();
                options.use_hosts_file = ResolveHosts::Never;
                (name_servers::only(servers), options)
            }
        };
        // Answers are kept here, and asked for again when it is time.
        options.cache_size = 0;
        let mut search: Vec<Name> = config.search().to_vec();
        if let Some(domain) = config.domain().filter(|domain| !search.contains(domain)) {
            search.insert(0, domain.clone());
        }
        let ndots = options.ndots;
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options;
        Ok(Lookups { resolver: builder.build()?, search, ndots })
    }

    /// `settled` is the complete name that the source's turned out to be: as long as it is there, no other is tried.
    async fn look_up(self, source: &DnsSource, settled: &mut Option<Name>) -> Looked {
        let candidates = match settled.clone().map_or_else(|| self.candidates(&source.name), |name| Ok(vec![name])) {
            Ok(candidates) => candidates,
            Err(failure) => return Looked::failed(failure),
        };
        if source.is_srv() {
            let services;
            (services, *settled) =
                self.first(candidates, |lookups, name| async move { lookups.services(name).await }).await;
            let targets = match &services {
                Answer::Records(services, _) => self.addresses_of(services).await,
                _ => HashMap::new(),
            };
            return Looked::Services(services, targets);
        }
        let addresses;
        (addresses, *settled) =
            self.first(candidates, |lookups, name| async move { lookups.addresses(name).await }).await;
        Looked::Addresses(addresses)
    }

    /// The complete names that a name may mean, in the order in which they are tried.
    fn candidates(&self, name: &str) -> Result<Vec<Name>, String> {
        let name = Name::from_str_relaxed(name).map_err(|failure| failure.to_string())?;
        if name.is_fqdn() {
            return Ok(vec![name]);
        }
        let mut as_it_is = name.clone();
        as_it_is.set_fqdn(true);
        let in_domains = self.search.iter().filter_map(|domain| name.clone().append_domain(domain).ok());
        let dots = usize::from(name.num_labels()).saturating_sub(1);
        Ok(match dots >= self.ndots {
            true => std::iter::once(as_it_is).chain(in_domains).collect(),
            false => in_domains.chain([as_it_is]).collect(),
        })
    }

    /// The answer of the first candidate that has records, and that candidate. Where there is none: that nobody can say,
    /// if that is so of one of them; that it is empty, if one is there; else that there is none.
    async fn first<A: Ranked, F: Future<Output = A>>(
        &self,
        candidates: Vec<Name>,
        ask: impl Fn(Lookups, Name) -> F,
    ) -> (A, Option<Name>) {
        let lone = candidates.len() == 1;
        let mut best: Option<(A, Option<Name>)> = None;
        for name in candidates {
            let answer = ask(self.clone(), name.clone()).await;
            let rank = answer.rank();
            // Without records it is settled only where no other is possible, or was.
            let settled = (rank == Rank::Records || lone && rank != Rank::NoName).then_some(name);
            if rank == Rank::Records {
                return (answer, settled);
            }
            if best.as_ref().is_none_or(|(best, _)| rank > best.rank()) {
                best = Some((answer, settled));
            }
        }
        best.unwrap_or_else(|| (A::no_name(), None))
    }

    async fn addresses(self, name: Name) -> Addresses {
        let address = |data: &RData| match data {
            RData::A(address) => Some(IpAddr::V4(address.0)),
            RData::AAAA(address) => Some(IpAddr::V6(address.0)),
            _ => None,
        };
        let (v4, v6) = tokio::join!(
            self.ask(name.clone(), RecordType::A, address),
            self.ask(name.clone(), RecordType::AAAA, address)
        );
        Addresses { v4, v6 }
    }

    async fn services(self, name: Name) -> Answer<Service> {
        let service = |data: &RData| match data {
            // A target of "." says that there is none (RFC 2782).
            RData::SRV(srv) if !srv.target.is_root() => Some(Service {
                priority: srv.priority,
                weight: srv.weight,
                port: srv.port,
                target: srv.target.to_ascii(),
            }),
            _ => None,
        };
        self.ask(name, RecordType::SRV, service).await
    }

    /// Of every target.
    async fn addresses_of(&self, services: &[Service]) -> HashMap<String, Addresses> {
        let mut targets: Vec<&str> = services.iter().map(|service| service.target.as_str()).collect();
        targets.sort_unstable();
        targets.dedup();
        targets.truncate(ADDRESSES_MAX);
        let mut asked = JoinSet::new();
        let mut found = HashMap::with_capacity(targets.len());
        for target in targets {
            if asked.len() >= LOOKUPS_MAX
                && let Some(Ok((target, addresses))) = asked.join_next().await
            {
                found.insert(target, addresses);
            }
            let (lookups, target) = (self.clone(), target.to_owned());
            asked.spawn(async move {
                let addresses = match Name::from_ascii(&target) {
                    Ok(name) => lookups.addresses(name).await,
                    Err(_) => Addresses { v4: Answer::NoName, v6: Answer::NoName },
                };
                (target, addresses)
            });
        }
        while let Some(done) = asked.join_next().await {
            found.extend(done);
        }
        found
    }

    async fn ask<T>(&self, name: Name, kind: RecordType, read: impl Fn(&RData) -> Option<T>) -> Answer<T> {
        match self.resolver.lookup(name, kind).await {
            Ok(lookup) => {
                let records: Vec<T> = lookup.answers().iter().filter_map(|record| read(&record.data)).collect();
                let ttl = lookup.answers().iter().map(|record| record.ttl).min().unwrap_or_default();
                Answer::Records(records, Duration::from_secs(ttl.into()))
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(none))) => match none.response_code {
                ResponseCode::NoError => Answer::Empty,
                ResponseCode::NXDomain => Answer::NoName,
                code => Answer::Failed(format!("the name server answers {code}")),
            },
            Err(NetError::Dns(DnsError::ResponseCode(code))) => {
                Answer::Failed(format!("the name server answers {code}"))
            }
            Err(NetError::Timeout) => Answer::Failed("no name server answers".to_owned()),
            Err(failure) => Answer::Failed(failure.to_string()),
        }
    }
}

/// How much an answer says for a name to be the one that is meant.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    NoName,
    Empty,
    Failed,
    Records,
}

trait Ranked {
    fn no_name() -> Self;
    fn rank(&self) -> Rank;
}

impl<T> Ranked for Answer<T> {
    fn no_name() -> Self {
        Answer::NoName
    }

    fn rank(&self) -> Rank {
        match self {
            Answer::NoName => Rank::NoName,
            Answer::Empty => Rank::Empty,
            Answer::Failed(_) => Rank::Failed,
            Answer::Records(..) => Rank::Records,
        }
    }
}

impl Ranked for Addresses {
    fn no_name() -> Self {
        Addresses { v4: Answer::NoName, v6: Answer::NoName }
    }

    fn rank(&self) -> Rank {
        self.v4.rank().max(self.v6.rank())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(addresses: &[&str]) -> Answer<IpAddr> {
        Answer::Records(addresses.iter().map(|address| address.parse().unwrap()).collect(), Duration::from_secs(5))
    }

    fn source() -> DnsSource {
        DnsSource { name: "agents.svc".to_owned(), port: Some(80), refresh: Duration::from_secs(5) }
    }

    fn known(names: &Names) -> Vec<String> {
        let address = |found: Found| match found.host {
            EndpointHost::Ip(address) => address.to_string(),
            EndpointHost::Name(name) => name,
        };
        names.found(&source()).into_iter().map(address).collect()
    }

    #[test]
    fn only_a_missing_name_that_is_missing_for_long_is_believed() {
        let mut names = Names::default();
        let now = ids::now();
        let looked = |v4, v6| Looked::Addresses(Addresses { v4, v6 });
        assert!(names.take(looked(records(&["10.0.0.2", "10.0.0.1"]), Answer::Empty), now));
        assert_eq!(known(&names), ["10.0.0.1", "10.0.0.2"]);
        assert!(!names.take(Looked::failed("no answer".to_owned()), now));
        assert_eq!(known(&names).len(), 2);
        for seconds in [1, 2, 3, 20] {
            assert!(names.take(looked(Answer::NoName, Answer::NoName), now + Duration::from_secs(seconds)));
            assert_eq!(known(&names).len(), 2, "after {seconds} s");
        }
        // A failure in between is no answer; an answer begins anew.
        names.take(Looked::failed("no answer".to_owned()), now + Duration::from_secs(25));
        names.take(looked(Answer::NoName, Answer::NoName), now + MISSING_FOR + Duration::from_secs(1));
        assert_eq!(known(&names), Vec::<String>::new());
        names.take(looked(records(&["10.0.0.1"]), Answer::Empty), now + Duration::from_secs(40));
        names.take(looked(Answer::NoName, Answer::NoName), now + Duration::from_secs(100));
        assert_eq!(known(&names), ["10.0.0.1"]);
        names.take(looked(Answer::Empty, Answer::Empty), now + Duration::from_secs(101));
        assert_eq!(known(&names), Vec::<String>::new());
    }

    #[test]
    fn one_family_that_fails_keeps_what_it_had() {
        let mut names = Names::default();
        let now = ids::now();
        let looked = |v4, v6| Looked::Addresses(Addresses { v4, v6 });
        names.take(looked(records(&["10.0.0.1"]), records(&["fd00::1"])), now);
        assert!(names.take(looked(records(&["10.0.0.2"]), Answer::Failed("SERVFAIL".to_owned())), now));
        assert_eq!(known(&names), ["10.0.0.2", "fd00::1"]);
    }

    /// Or what a state file remembers would go by the first stutter.
    #[test]
    fn at_the_start_half_an_answer_is_none() {
        let looked = |v4, v6| Looked::Addresses(Addresses { v4, v6 });
        let failed = || Answer::Failed("SERVFAIL".to_owned());
        let now = ids::now();
        let mut names = Names::default();
        assert!(!names.take(looked(failed(), Answer::Empty), now));
        assert!(!names.take(looked(Answer::NoName, Answer::NoName), now));
        assert!(names.take(looked(records(&["10.0.0.1"]), failed()), now), "there is something");
        let mut names = Names::default();
        assert!(names.take(looked(Answer::Empty, Answer::Empty), now), "there is nothing");
        let mut names = Names::default();
        for seconds in [0, 15] {
            assert!(!names.take(looked(Answer::NoName, Answer::NoName), now + Duration::from_secs(seconds)));
        }
        assert!(names.take(looked(Answer::NoName, Answer::NoName), now + MISSING_FOR), "there is no such name");
    }

    #[test]
    fn how_long_an_answer_holds() {
        let seconds = Duration::from_secs;
        assert_eq!(interval(Some(seconds(0)), seconds(5)), seconds(1));
        assert_eq!(interval(Some(seconds(3)), seconds(5)), seconds(3));
        assert_eq!(interval(Some(seconds(300)), seconds(5)), seconds(5));
        assert_eq!(interval(None, seconds(5)), seconds(5));
        assert_eq!(interval(Some(seconds(0)), Duration::from_millis(100)), Duration::from_millis(100));
        let waits: Vec<u64> = (0..8).map(|failures| retry(failures, seconds(5)).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(retry(40, Duration::from_millis(100)), seconds(1));
    }

    #[tokio::test]
    async fn a_name_is_looked_for_in_domains_by_its_dots() {
        let server: SocketAddr = ([127, 0, 0, 1], 53).into();
        let mut lookups = Lookups::new(Some(&[server])).unwrap();
        (lookups.search, lookups.ndots) = (vec![Name::from_ascii("svc.cluster.local.").unwrap()], 5);
        let names = |name: &str| -> Vec<String> {
            lookups.candidates(name).unwrap().into_iter().map(|name| name.to_ascii()).collect()
        };
        assert_eq!(names("agents.team"), ["agents.team.svc.cluster.local.", "agents.team."]);
        assert_eq!(names("a.b.c.d.e.f"), ["a.b.c.d.e.f.", "a.b.c.d.e.f.svc.cluster.local."]);
        assert_eq!(names("agents.team."), ["agents.team."]);
    }
}
