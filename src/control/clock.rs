//! Clock: every dispatcher learns what time it is (deadlines of drains, sessions, ejections): once a second, and more often
//! while exchanges are cut one after another.

use std::sync::Arc;
use std::time::Duration;

use crate::control::ReloadState;
use crate::ids;
use crate::snapshot::Running;

const TICK: Duration = Duration::from_secs(1);
/// While what drains have left is being cut.
const CUTTING_TICK: Duration = Duration::from_millis(100);

/// Ticks until it is dropped.
pub async fn run(running: Arc<Running>, state: Arc<ReloadState>) {
    loop {
        let now = ids::now();
        let mut is_cutting = false;
        for service in &running.snapshot.load().services {
            is_cutting |= service.dispatcher.tick(now);
        }
        is_cutting |= state.tick_removed(now);
        tokio::time::sleep(if is_cutting { CUTTING_TICK } else { TICK }).await;
    }
}
