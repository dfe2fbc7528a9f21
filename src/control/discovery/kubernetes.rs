//! Kubernetes: follows the EndpointSlices of a service: a list, then a watch from where the list ended.
//!
//! A watch that ends goes on from its last event; one that has expired begins with a list again. What the API server
//! does not say changes nothing: while it is away, what is known stays. One that is silent is asked whether it still lives,
//! for a peer that froze sends no reset; it is tried at once when it answers again.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kube::Client;
use kube::core::params::{ListParams, WatchParams};
use kube::core::{Request, Status};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::config::{self, KubernetesSource};
use crate::control::discovery::Reporter;
use crate::control::discovery::slices::{Named, Sent, Slices};
use crate::ids;
use crate::kubernetes::answer::{self, Failure, Lines, Refusal};
use crate::kubernetes::client::{ClientError, client};

/// Changes that come within so long are told together.
const GATHER: Duration = Duration::from_millis(50);
/// Between two tries: doubled with each, up to the most. That is short, so that what was missed is made good soon after
/// the API server is back; each waits a part of it by chance, so that replicas don't come together.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// Slices of one answer to a list, and what they may take together.
const PAGE: u32 = 500;
const PAGE_BYTES_MAX: usize = 256 << 20;
/// How long the API server keeps a watch at most, and a part more by chance. Seconds.
const WATCH_SECONDS: u32 = 240;
const WATCH_SECONDS_MORE: u32 = 50;
/// An answer that takes longer is asked for a second time beside the first, over a connection of its own.
const HASTE: Duration = Duration::from_secs(1);
/// How long the first is waited for all the same.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a sign of life may take, and how often it is asked for while none comes.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
const SILENT: &str = "the API server does not answer; look at its health, and at the network between";
/// Bookmarks come about each minute: a watch that is silent for longer is not believed in.
const SILENCE_MAX: Duration = Duration::from_secs(90);

/// The cluster that the configuration names, and one client for all.
#[derive(Default)]
pub struct Cluster {
    settings: config::Kubernetes,
    client: Mutex<Option<Client>>,
}

impl Cluster {
    pub fn new(settings: config::Kubernetes) -> Cluster {
        Cluster { settings, client: Mutex::default() }
    }

    async fn client(&self) -> Result<Client, ClientError> {
        let mut known = self.client.lock().await;
        if let Some(client) = &*known {
            return Ok(client.clone());
        }
        let made = client(&self.settings).await?;
        *known = Some(made.clone());
        Ok(made)
    }
}

/// Follows the service for as long as it is there.
pub async fn run(source: KubernetesSource, cluster: Arc<Cluster>, silence: Duration, reporter: Reporter) {
    let mut backoff = Backoff::default();
    let client = loop {
        match cluster.client().await {
            Ok(client) => break client,
            Err(failure) => reporter.failed(&failure.to_string()),
        }
        sleep(backoff.next(ids::random_u64())).await;
    };
    let namespace = source.namespace.as_deref().unwrap_or(client.default_namespace()).to_owned();
    let name = format!("{}.{namespace}.svc", source.service);
    let mut follower = Follower {
        request: Request::new(format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices")),
        selector: format!("kubernetes.io/service-name={}", source.service),
        namespace,
        slices: Slices::new(source.port, name.into()),
        version: None,
        silence,
        client,
        reporter,
    };
    loop {
        let began = Instant::now();
        let ended = match follower.version.clone() {
            None => follower.list().await,
            Some(version) => follower.watch(&version).await,
        };
        let lasted = began.elapsed() >= RETRY_MAX;
        let waits = match ended {
            Ended::Listed => false,
            Ended::Closed | Ended::Stale => !lasted,
            Ended::Expired => {
                follower.version = None;
                !lasted
            }
            Ended::Failed { why, come_again } => {
                follower.reporter.failed(&why);
                sleep(come_again.unwrap_or_default() + backoff.next(ids::random_u64())).await;
                continue;
            }
        };
        // What ended quickly may do so again.
        if waits {
            sleep(backoff.next(ids::random_u64())).await;
        } else if lasted {
            backoff = Backoff::default();
        }
    }
}

/// How a list or a watch came to its end.
enum Ended {
    /// The list is there.
    Listed,
    /// The watch ended, as each does at some time, or was broken off: it may go on.
    Closed,
    /// It was silent for too long, or the API server was: it goes on over another connection.
    Stale,
    /// It can't go on from where it was.
    Expired,
    /// And why, and after which time the API server wants to be asked again, where it says so.
    Failed { why: String, come_again: Option<Duration> },
}

/// One service that is followed.
struct Follower {
    client: Client,
    namespace: String,
    request: Request,
    selector: String,
    /// Up to where everything is known; `None`: nothing is, or not enough.
    version: Option<String>,
    slices: Slices,
    /// After which the API server is asked for a sign of life.
    silence: Duration,
    reporter: Reporter,
}

#[derive(Deserialize)]
struct List {
    metadata: ListMetadata,
    /// Each is read by itself: one that can't be is not to keep the others back.
    items: Option<Vec<Box<RawValue>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    #[serde(default)]
    resource_version: String,
    #[serde(rename = "continue")]
    rest: Option<String>,
}

/// A line of a watch.
#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    object: Box<RawValue>,
}

impl Follower {
    /// Learns all that there is now.
    async fn list(&mut self) -> Ended {
        let mut slices = Vec::new();
        let mut params = ListParams::default().labels(&self.selector).limit(PAGE);
        let version = loop {
            let page = ask(&self.reporter, || async {
                let request =
                    self.request.list(&params).map_err(|it| Failure::Unheard(kube::Error::BuildRequest(it)))?;
                answer::read(answer::ask(&self.client, request).await?, PAGE_BYTES_MAX).await
            });
            let page = match page.await {
                Ok(page) => page,
                Err(failure) => return self.ended_by(failure),
            };
            let List { metadata, items } = match serde_json::from_slice(&page) {
                Ok(list) => list,
                Err(failure) => return self.ended_by(Some(Failure::Unusable(failure.to_string()))),
            };
            slices.extend(items.unwrap_or_default().iter().map(|slice| Sent::read(slice)));
            match metadata.rest.filter(|rest| !rest.is_empty()) {
                Some(rest) => params.continue_token = Some(rest),
                None => break metadata.resource_version,
            }
        };
        self.slices.replace(slices);
        self.tell();
        self.version = Some(version);
        Ended::Listed
    }

    /// Follows what happens after `version`.
    async fn watch(&mut self, version: &str) -> Ended {
        let seconds = WATCH_SECONDS + (ids::random_u64() % u64::from(WATCH_SECONDS_MORE)) as u32;
        let params = WatchParams {
            label_selector: Some(self.selector.clone()),
            timeout: Some(seconds),
            bookmarks: true,
            ..WatchParams::default()
        };
        let client = self.client.clone();
        let events = ask(&self.reporter, || async {
            let request =
                self.request.watch(&params, version).map_err(|it| Failure::Unheard(kube::Error::BuildRequest(it)))?;
            answer::ask(&client, request).await
        });
        let mut events = match events.await {
            Ok(events) => Lines::of(events),
            Err(failure) => return self.ended_by(failure),
        };
        self.tell();
        let mut tell_at = None;
        let mut life = Life::new(self.silence, Instant::now());
        let ended = loop {
            tokio::select! {
                event = events.next() => {
                    life = Life::new(self.silence, Instant::now());
                    match event.map(|event| self.take(event)) {
                        None => break Ended::Closed,
                        Some(Ok(true)) => { tell_at.get_or_insert(Instant::now() + GATHER); }
                        // A sign that all that is known still holds.
                        Some(Ok(false)) if tell_at.is_none() => self.tell(),
                        Some(Ok(false)) => {}
                        Some(Err(ended)) => break ended,
                    }
                }
                () = sleep_until(tell_at.unwrap_or(life.ask_at)), if tell_at.is_some() => {
                    tell_at = None;
                    self.tell();
                }
                () = sleep_until(life.ask_at) => {
                    let answer = sign_of_life(&client).await;
                    match life.take(answer, Instant::now()) {
                        Pulse::Well => {}
                        Pulse::Stale => break Ended::Stale,
                        Pulse::Silent(why) => self.reporter.failed(&why),
                    }
                }
            }
        };
        if tell_at.is_some() {
            self.tell();
        }
        ended
    }

    /// Takes an event. True: something may have changed.
    fn take(&mut self, line: Result<Bytes, Failure>) -> Result<bool, Ended> {
        let event = line.and_then(|line| {
            serde_json::from_slice::<Event>(&line).map_err(|failure| Failure::Unusable(failure.to_string()))
        });
        let Event { kind, object } = match event {
            Ok(event) => event,
            Err(failure) => {
                // What it said is not known, so nobody can go on from there.
                self.version = None;
                return Err(self.ended_by(Some(failure)));
            }
        };
        match kind.as_str() {
            "ADDED" | "MODIFIED" => {
                self.reached(Named::of(&object).version);
                self.slices.take(Sent::read(&object));
                Ok(true)
            }
            "DELETED" => {
                let Named { name, version } = Named::of(&object);
                self.reached(version);
                self.slices.remove(&name);
                Ok(true)
            }
            "ERROR" => {
                let status: Box<Status> = serde_json::from_str(object.get()).unwrap_or_default();
                Err(self.ended_by(Some(Failure::Refused(Refusal { status, come_again: None }))))
            }
            // A bookmark, or what a later API server may have to say.
            _ => {
                self.reached(Named::of(&object).version);
                Ok(false)
            }
        }
    }

    fn reached(&mut self, version: Option<String>) {
        if let Some(version) = version.filter(|version| !version.is_empty()) {
            self.version = Some(version);
        }
    }

    fn tell(&mut self) {
        self.reporter.found(self.slices.take_update());
    }

    /// `None`: it was silent.
    fn ended_by(&self, failure: Option<Failure>) -> Ended {
        let come_again = failure.as_ref().and_then(Failure::come_again);
        let failed = |why: String| Ended::Failed { why, come_again };
        let status = match failure {
            None => return failed(SILENT.to_owned()),
            Some(Failure::Refused(Refusal { status, .. })) => status,
            Some(Failure::Unusable(why)) => return failed(format!("the API server's answer can't be used: {why}")),
            Some(Failure::Unheard(failure)) => {
                let mut what = format!("the API server can't be asked: {failure}");
                let mut cause = std::error::Error::source(&failure);
                while let Some(next) = cause {
                    let next_text = next.to_string();
                    if !what.ends_with(&next_text) {
                        what = format!("{what}: {next_text}");
                    }
                    cause = next.source();
                }
                return failed(what);
            }
        };
        if status.code == 410 || status.reason == "Expired" {
            return Ended::Expired;
        }
        failed(match status.code {
            401 => {
                "the API server does not know us (401): look at the token of the service account, or at the kubeconfig"
                    .to_owned()
            }
            403 => format!(
                "the API server refuses (403): allow `list` and `watch` of endpointslices (discovery.k8s.io) in the namespace {}",
                self.namespace
            ),
            code => format!("the API server answers {code} {}: {}", status.reason, status.message),
        })
    }
}

/// Whether the API server gives a sign of life, while a watch is silent.
struct Life {
    /// When it was last heard.
    heard: Instant,
    /// When it is to be asked.
    ask_at: Instant,
    /// In vain, in a row.
    asked: u32,
    silence: Duration,
}

enum Pulse {
    Well,
    /// It lives, but perhaps not this watch.
    Stale,
    /// And why that is a problem.
    Silent(String),
}

impl Life {
    fn new(silence: Duration, now: Instant) -> Life {
        Life { heard: now, ask_at: now + silence, asked: 0, silence }
    }

    fn take(&mut self, answer: Result<(), String>, now: Instant) -> Pulse {
        match answer {
            Ok(()) if self.asked > 0 || now.duration_since(self.heard) >= SILENCE_MAX => Pulse::Stale,
            Ok(()) => {
                self.ask_at = now + self.silence;
                Pulse::Well
            }
            Err(why) => {
                self.asked += 1;
                // Once is no proof: the connection may have been an old one.
                if self.asked == 1 {
                    self.ask_at = now;
                    return Pulse::Well;
                }
                self.ask_at = now + SIGN_OF_LIFE;
                Pulse::Silent(why)
            }
        }
    }
}

/// Any answer but that of a proxy before it which can't reach it.
async fn sign_of_life(client: &Client) -> Result<(), String> {
    let request = http::Request::get("/version").body(kube::client::Body::empty()).map_err(|it| it.to_string())?;
    match timeout(SIGN_OF_LIFE, client.send(request)).await {
        Ok(Ok(answer)) if answer.status().is_server_error() => {
            Err(format!("the API server answers {}", answer.status().as_u16()))
        }
        Ok(Ok(_)) => Ok(()),
        Ok(Err(failure)) => Err(format!("the API server can't be asked: {failure}")),
        Err(_) => Err(SILENT.to_owned()),
    }
}

/// Asks, and where the answer takes long asks again and again beside that: for the first may wait for a server that is no
/// more, and the others may not be as patient as a busy one needs. `None`: it was silent.
async fn ask<T, F>(reporter: &Reporter, attempt: impl Fn() -> F) -> Result<T, Option<Failure>>
where
    F: Future<Output = Result<T, Failure>>,
{
    let patient = timeout(PATIENCE, attempt());
    let hasty = async {
        loop {
            sleep(HASTE).await;
            match timeout(HASTE, attempt()).await {
                Ok(Ok(answer)) => return answer,
                Ok(Err(failure)) => sleep(failure.come_again().unwrap_or_default()).await,
                Err(_) => reporter.failed(SILENT),
            }
        }
    };
    tokio::select! {
        answer = patient => answer.map_err(|_| None)?.map_err(Some),
        answer = hasty => Ok(answer),
    }
}

/// How long to wait before the next try.
#[derive(Default)]
struct Backoff {
    tries: u32,
}

impl Backoff {
    /// Between a half and the whole of what the number of tries gives.
    fn next(&mut self, random: u64) -> Duration {
        let most = RETRY_MIN.saturating_mul(1 << self.tries.min(10)).min(RETRY_MAX);
        self.tries = self.tries.saturating_add(1);
        let share = (random >> 11) as f64 / (1u64 << 53) as f64;
        most.mul_f64(0.5 + 0.5 * share)
    }
}
