//! Dispatcher: picks an endpoint and reserves it in one step, per service.

use std::sync::Arc;
use std::time::Instant;

use crate::ids::RunId;
use crate::state::sessions::SessionKey;
use crate::state::{AffinityOutcome, Evidence, Kind, Refusal, RunOutcome, Target};

/// One service's live state. Outlives every configuration that names it.
pub struct Dispatcher {}

/// What an exchange asks of the dispatcher.
pub struct Ask<'a> {
    pub key: Option<&'a SessionKey>,
    pub kind: Kind,
    /// The version that a `versions[].match` of the current configuration chose, by name.
    pub version: Option<&'a str>,
    /// Where the proxy's own cookie says that the session lives; used when the table does not know the session
    /// (another replica, a restart).
    pub hint: Option<&'a PinHint>,
}

/// A pin as the proxy's cookie carries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinHint {
    pub version: String,
    /// [`crate::config::EndpointUrl::identity`].
    pub endpoint: String,
}

/// A reserved endpoint.
pub struct Placed {
    pub target: Arc<Target>,
    pub affinity: AffinityOutcome,
    pub lease: Lease,
}

/// The reservation of one exchange: its run's slot (for a start) or its place among the open exchanges. Gives both back
/// when dropped, exactly once.
pub struct Lease {
    dispatcher: Arc<Dispatcher>,
}

impl Dispatcher {
    /// Picks and reserves; `rng` is one random number, used only by `balance: random`.
    pub fn pick(self: &Arc<Self>, ask: Ask<'_>, now: Instant, rng: u64) -> Result<Placed, Refusal> {
        let _ = (ask, now, rng);
        unimplemented!()
    }
}

impl Lease {
    /// The run that this exchange started.
    pub fn run_id(&self) -> Option<RunId> {
        unimplemented!()
    }

    /// The answer was 2xx or 3xx: the pin holds from now on.
    pub fn confirm(&mut self, now: Instant) {
        let _ = now;
    }

    /// The (successful) answer named its session; becomes the key, or an alias of the request's key.
    pub fn learn(&mut self, key: SessionKey, now: Instant) {
        let _ = (key, now);
    }

    /// Moves the reservation to another endpoint in one step after an attempt that the endpoint never saw, never to one
    /// tried before. A confirmed pin stays on its own endpoint. Counts one more attempt.
    pub fn retry(&mut self, now: Instant, rng: u64) -> Result<Arc<Target>, Refusal> {
        let _ = (now, rng);
        unimplemented!()
    }

    /// Evidence for outlier ejection about the current target.
    pub fn report(&mut self, evidence: Evidence, now: Instant) {
        let _ = (evidence, now);
    }

    /// Sets how the run is to be judged when the lease is dropped; without it a dropped run counts as cancelled.
    pub fn outcome(&mut self, outcome: RunOutcome) {
        let _ = outcome;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let _ = &self.dispatcher;
    }
}
