//! Remembered: a start with a key whose run goes on. Unless its answer came whole it is forgotten with its exchange.

use std::sync::Arc;

use crate::ids::{self, RunId};
use crate::state::dispatcher::Dispatcher;
use crate::state::idempotency::{Finish, StartKey};

/// Tells the table how the first start ended, exactly once.
pub struct Remembered {
    dispatcher: Arc<Dispatcher>,
    key: StartKey,
    run: RunId,
    ended: bool,
}

impl Remembered {
    pub fn new(dispatcher: Arc<Dispatcher>, key: StartKey, run: RunId) -> Remembered {
        Remembered { dispatcher, key, run, ended: false }
    }

    pub fn finish(&mut self, finish: Finish) {
        if !std::mem::replace(&mut self.ended, true) {
            self.dispatcher.start_ended(self.key, self.run, finish, ids::now());
        }
    }
}

impl Drop for Remembered {
    fn drop(&mut self) {
        self.finish(Finish::Forget);
    }
}
