//! Learn: session ids that the endpoint tells in a successful answer.

use crate::json::Extractor;
use crate::proxy::identify;
use crate::state::dispatcher::Lease;
use crate::state::sessions::SessionKey;

/// What it takes to learn an id from an answer's body.
pub struct Learn {
    /// The principal's digest.
    pub scope: Option<[u8; 16]>,
    /// How many JSON places are looked at, in their order.
    pub places: usize,
}

impl Learn {
    /// Learns the first id that was found.
    pub fn from_body(&self, extractor: &Extractor, lease: &mut Lease) {
        let key = |index| identify::text_of(extractor.value(index)?.as_bytes());
        if let Some(text) = (0..self.places).find_map(key) {
            lease.learn(SessionKey { scope: self.scope, text: text.into() }, crate::ids::now());
        }
    }
}
