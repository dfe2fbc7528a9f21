//! Control: reload, health checks and deadlines, on a runtime of their own.

pub mod call;
pub mod clock;
pub mod discovery;
pub mod handover;
pub mod health;
pub mod notify;
pub mod reload;
pub mod runs;
pub mod shutdown;
pub mod watch;

pub use reload::{ReloadHandle, ReloadState, ReloadStatus};
pub use shutdown::DrainHandle;
