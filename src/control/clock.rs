//! Clock: once a second, every dispatcher learns what time it is (deadlines of drains, sessions, ejections).

use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::control::ReloadState;
use crate::ids;
use crate::snapshot::Running;

const TICK: Duration = Duration::from_secs(1);

/// Ticks until it is dropped.
pub async fn run(running: Arc<Running>, state: Arc<ReloadState>) {
    let mut ticks = tokio::time::interval(TICK);
    // After a stall one tick is enough: every tick looks at the time itself.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = ids::now();
        for service in &running.snapshot.load().services {
            service.dispatcher.tick(now);
        }
        state.tick_removed(now);
    }
}
