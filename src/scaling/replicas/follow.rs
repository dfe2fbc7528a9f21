//! Follow: hears at once when another replica has something to do, or has not any more.
//!
//! A replica answers a question of this kind only when what it has to do is something else than the caller knows. One task
//! asks all of them for whoever wants to know; it ends with the last of these.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::futures::Notified;
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use crate::ids;
use crate::scaling::replicas::{ASK_TIMEOUT, Replicas, STALE_MAX, Said, ask};

/// How long a question may stay without an answer because nothing has changed.
pub const WAIT: Duration = Duration::from_secs(20);
/// How often DNS is asked who is there.
const FIND_EVERY: Duration = Duration::from_secs(5);
/// After an answer that did not come. The first time; then twice as long, up to [`FIND_EVERY`].
const PAUSE: Duration = Duration::from_millis(200);
/// A replica is asked no more often than this.
const ASKED_APART: Duration = Duration::from_millis(50);

/// The task that follows, while somebody holds it.
pub(super) struct Task(#[expect(dead_code, reason = "ends it when it is dropped")] AbortOnDropHandle<()>);

/// Somebody who wants to hear.
pub struct Following {
    replicas: Arc<Replicas>,
    _task: Arc<Task>,
}

impl Following {
    /// Is woken when a replica has said something new.
    pub fn changes(&self) -> Notified<'_> {
        self.replicas.told.notified()
    }

    /// As [`crate::scaling::Load::is_active`], of the other replicas, as far as they were heard lately.
    pub fn is_active(&self, service: &str, version: Option<&str>) -> bool {
        let now = ids::now();
        let heard = self.replicas.lock();
        let lately = heard.followed.values().filter(|said| now.saturating_duration_since(said.at) <= STALE_MAX);
        lately.into_iter().any(|said| said.load.is_active(service, version))
    }
}

impl Replicas {
    /// From here on other replicas are followed, until the last [`Following`] is dropped. Within a runtime only.
    pub fn follow(self: &Arc<Self>) -> Following {
        let mut following = self.following.lock().unwrap_or_else(PoisonError::into_inner);
        let task = following.upgrade().unwrap_or_else(|| {
            // Its own reference would keep it alive for ever.
            let replicas = Arc::clone(self);
            let task = Arc::new(Task(AbortOnDropHandle::new(tokio::spawn(replicas.follow_all()))));
            *following = Arc::downgrade(&task);
            task
        });
        Following { replicas: Arc::clone(self), _task: task }
    }

    async fn follow_all(self: Arc<Self>) {
        let mut followed: HashMap<SocketAddr, AbortOnDropHandle<()>> = HashMap::new();
        loop {
            if let Some(settings) = self.settings() {
                match self.addresses(&settings).await {
                    Ok(addresses) => {
                        followed.retain(|address, task| addresses.contains(address) && !task.is_finished());
                        self.lock().followed.retain(|address, _| addresses.contains(address));
                        for address in addresses {
                            followed.entry(address).or_insert_with(|| {
                                AbortOnDropHandle::new(tokio::spawn(Arc::clone(&self).follow_one(address)))
                            });
                        }
                    }
                    Err(failure) => {
                        // By now their addresses may be others'.
                        followed.clear();
                        debug!("no replica can be followed: {failure}");
                    }
                }
            } else {
                followed.clear();
            }
            tokio::time::sleep(FIND_EVERY).await;
        }
    }

    /// Until it is found to be this process.
    async fn follow_one(self: Arc<Self>, address: SocketAddr) {
        let mut pause = PAUSE;
        loop {
            let known = self.lock().followed.get(&address).map(|said| said.load.activity.clone());
            let target = match known.filter(|known| !known.is_empty()) {
                None => "/metrics".to_owned(),
                Some(known) => format!("/metrics?wait={}s&activity={known}", WAIT.as_secs()),
            };
            let asked = tokio::time::Instant::now();
            match ask(address, &target, self.token(address).await, WAIT + ASK_TIMEOUT).await {
                Ok(load) => {
                    if load.instance == self.source.instance() {
                        // Looked at again after a while: addresses are given to others.
                        self.lock().followed.remove(&address);
                        tokio::time::sleep(WAIT).await;
                        continue;
                    }
                    // Whatever it answers, and however fast. One that does not say what is to be waited for can't wait.
                    let apart = if load.activity.is_empty() { FIND_EVERY } else { ASKED_APART };
                    self.lock().followed.insert(address, Said { load, at: ids::now() });
                    self.told.notify_waiters();
                    pause = PAUSE;
                    tokio::time::sleep_until(asked + apart).await;
                }
                Err(failure) => {
                    debug!("the replica {address} can't be followed: {failure}");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(FIND_EVERY);
                }
            }
        }
    }
}
