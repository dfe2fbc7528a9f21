//! Learn: session ids that the configured places of a successful answer's body tell.

use crate::config::JsonPointer;
use crate::json::{Extractor, Progress};
use crate::proxy::identify;
use crate::state::dispatcher::Lease;
use crate::state::sessions::SessionKey;

/// Looks for an id in an answer's body.
pub struct Learn {
    extractor: Extractor,
    /// How many JSON places are looked at, in their order.
    places: usize,
    /// The principal's digest.
    scope: Option<[u8; 16]>,
    over: bool,
}

impl Learn {
    pub fn new(pointers: &[JsonPointer], scope: Option<[u8; 16]>) -> Learn {
        Learn { extractor: Extractor::new(pointers), places: pointers.len(), scope, over: false }
    }

    pub fn observe(&mut self, payload: &[u8]) {
        if !self.over {
            self.extractor.feed(payload);
        }
    }

    /// Learns the first id that was found, once there is nothing more to find, or the body has ended.
    pub fn tell(&mut self, lease: &mut Lease, at_end: bool) {
        if self.over || (self.extractor.progress() == Progress::More && !at_end) {
            return;
        }
        self.over = true;
        let key = |index| identify::text_of(self.extractor.value(index)?.as_bytes());
        if let Some(text) = (0..self.places).find_map(key) {
            lease.learn(SessionKey { scope: self.scope, text: text.into() }, crate::ids::now());
        }
    }
}
