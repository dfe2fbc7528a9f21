//! Clock: every dispatcher learns what time it is (deadlines of drains, sessions, ejections): once a second, and more often
//! while exchanges are cut one after another, or are about to be.

use std::sync::Arc;
use std::time::Duration;

use crate::control::ReloadState;
use crate::ids;
use crate::snapshot::Running;
use crate::state::core::USUAL_TICK;

/// While what drains have left is being cut, and in the second before.
const CUTTING_TICK: Duration = Duration::from_millis(100);

/// Ticks until it is dropped.
pub async fn run(running: Arc<Running>, state: Arc<ReloadState>) {
    loop {
        let now = ids::now();
        let mut in_haste = false;
        for service in &running.snapshot.load().services {
            in_haste |= service.dispatcher.tick(now);
        }
        in_haste |= state.tick_removed(now);
        tokio::time::sleep(if in_haste { CUTTING_TICK } else { USUAL_TICK }).await;
    }
}
