//! Shadow: where the copy of a start goes. It takes no slot and is counted nowhere.

use std::sync::Arc;

use crate::balance::{self, Candidate};
use crate::state::Target;
use crate::state::core::Core;

impl Core {
    /// An endpoint of the version for a copy: of one session always the same while the endpoints are, by weight.
    /// `place`: [`balance::placement`] of its key, or a random number. `None`: none is ready.
    pub fn shadow(&self, version: &str, place: u64) -> Option<Arc<Target>> {
        let version = self.versions.iter().find(|known| known.configured && *known.name == *version)?;
        let endpoints = version.endpoints.iter().map(|number| (*number, &self.endpoints[*number]));
        let candidates = endpoints.filter(|(_, endpoint)| endpoint.ready).map(|(index, endpoint)| Candidate {
            index,
            hash: endpoint.hash,
            name: &endpoint.identity,
            weight: u64::from(endpoint.weight.max(1)),
        });
        Some(Arc::clone(&self.endpoints[balance::rendezvous(place, candidates)?].target))
    }
}
