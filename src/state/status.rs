//! Status: what the live state tells the admin API and the metrics.

use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::ids::RunId;
use crate::protocols::Call;
use crate::state::Target;
use crate::state::runs::{About, Stop};

/// One service, in the shape of `GET /api/v1/status`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServiceStatus {
    pub name: String,
    /// In the order of the configuration; removed versions whose endpoints still finish come after.
    pub versions: Vec<VersionStatus>,
    pub queue: QueueStatus,
    pub outstanding_runs: u64,
    /// Runs that the ready endpoints may have at once; `None` where that is unlimited.
    pub capacity: Option<u64>,
    /// Outstanding on endpoints that don't drain, and queued: the number to scale on.
    pub demand: u64,
    /// Queued and not pinned: what one more endpoint could take now.
    pub placeable_demand: u64,
    /// `demand / capacity`; `None` where capacity is unlimited.
    pub saturation: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VersionStatus {
    pub name: String,
    pub weight: u32,
    #[serde(serialize_with = "whole_where_it_is")]
    pub effective_weight: f64,
    /// What it was given by weight since it is known.
    #[serde(skip)]
    pub dealt: Dealt,
    pub share: Share,
    pub sessions: u64,
    pub outstanding_runs: u64,
    /// As of the service.
    pub capacity: Option<u64>,
    /// What there is to do for it.
    #[serde(skip)]
    pub demand: VersionDemand,
    pub endpoints: Vec<EndpointStatus>,
}

/// A version's part of its service's demand. Whoever waits for no particular version counts for all of them, for each by
/// its share of the weights; so the parts of all versions add up to the service's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct VersionDemand {
    /// Outstanding on endpoints that drain: not among what is to be scaled for.
    pub draining_runs: u64,
    pub queued: f64,
    /// Of `queued`: not pinned.
    pub placeable: f64,
}

/// What a version was given by weight, without what a `match` sent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dealt {
    /// Sessions that began.
    pub sessions: u64,
    /// Runs that ended, and how long they took together.
    pub runs: u64,
    pub run_time: Duration,
}

/// The part that a version really has of what all were given by weight since the weights changed last, from 0 to 1;
/// `None`: nothing was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Share {
    /// Of the weights: what the others should be.
    pub weight: Option<f64>,
    /// Of the sessions that began.
    pub sessions: Option<f64>,
    /// Of the runs that ended, whenever their sessions began, and of the time that they took.
    pub runs: Option<f64>,
    pub run_minutes: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EndpointStatus {
    pub address: String,
    /// Where it was found; absent where the configuration lists it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The pod's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    pub state: EndpointState,
    pub outstanding_runs: u32,
    /// Runs that it says it has itself, where it does.
    pub reported_runs: Option<u32>,
    /// Exchanges that are not runs.
    pub open_exchanges: u32,
    pub max_runs: Option<u32>,
    pub sessions: u32,
    pub weight: u32,
    /// Open connections to it.
    pub connections: usize,
    /// Where it drains.
    pub drain: Option<DrainStatus>,
}

/// How far the drain of an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DrainStatus {
    /// Who wants it: `operator`, `removed`, `health` (`health.draining_status`), `answer` (`longhaul-drain: 1`),
    /// `source` (Kubernetes: its pod terminates).
    pub by: Vec<&'static str>,
    /// When what is left begins to be cut; `None`: it was, and what came after it goes on.
    pub cut_in_ms: Option<u64>,
    pub empty_in: DrainEstimate,
}

/// When an endpoint will have no run any more, if nothing cuts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DrainEstimate {
    /// With even odds by then; `None`: nobody can say.
    pub p50_ms: Option<u64>,
    /// In 95 of 100 cases by then.
    pub p95_ms: Option<u64>,
    /// Ended runs of the service that it rests on; older ones count less.
    pub runs_seen: u64,
}

/// `GET /api/v1/services/S/safe-to-roll`: what a rollout now would cut.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RollReport {
    pub service: String,
    pub grace_ms: u64,
    /// So probable it must be that nothing is cut to be called safe.
    pub confidence: f64,
    pub safe: bool,
    pub outstanding_runs: u64,
    /// On average.
    pub expected_cut_runs: f64,
    pub probability_none_cut: f64,
    /// As in [`DrainEstimate`].
    pub runs_seen: u64,
    pub endpoints: Vec<RollEndpoint>,
}

/// The same of one endpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RollEndpoint {
    pub address: String,
    pub version: String,
    pub state: EndpointState,
    pub outstanding_runs: u32,
    pub sessions: u32,
    pub expected_cut_runs: f64,
    pub probability_none_cut: f64,
    pub empty_in: DrainEstimate,
    pub safe: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    Ready,
    Draining,
    Unhealthy,
    Ejected,
    Gone,
}

impl EndpointState {
    pub const ALL: [EndpointState; 5] = [
        EndpointState::Ready,
        EndpointState::Draining,
        EndpointState::Unhealthy,
        EndpointState::Ejected,
        EndpointState::Gone,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            EndpointState::Ready => "ready",
            EndpointState::Draining => "draining",
            EndpointState::Unhealthy => "unhealthy",
            EndpointState::Ejected => "ejected",
            EndpointState::Gone => "gone",
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct QueueStatus {
    pub length: u64,
    pub oldest_ms: u64,
}

/// One pinned session. `key` is the plain text: whoever shows it hashes it where the reader may not see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SessionInfo {
    pub key: String,
    pub version: String,
    pub endpoint: String,
    /// An exchange of it was answered with success, so that the pin is kept.
    pub confirmed: bool,
    /// A `versions[].match` chose its version.
    pub matched: bool,
    pub outstanding_runs: u32,
    pub idle_ms: u64,
    pub age_ms: u64,
}

/// One outstanding run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RunInfo {
    pub id: String,
    pub version: String,
    pub endpoint: String,
    /// The plain key of its session; as in [`SessionInfo`].
    pub session: Option<String>,
    pub state: &'static str,
    /// As `agent_protocol` names it.
    pub protocol: &'static str,
    /// What the protocol calls it, where that is known.
    pub protocol_id: Option<String>,
    pub age_ms: u64,
    pub carriers: u32,
    pub attempts: u32,
}

/// A call about a run that is due.
pub struct DueCall {
    pub number: u32,
    pub id: RunId,
    pub target: Arc<Target>,
    pub about: About,
    /// The protocol's id of the run.
    pub key: Box<str>,
    pub question: Question,
    pub call: Call,
}

/// What a [`DueCall`] is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    Status,
    Cancel,
}

/// What `DELETE /api/v1/runs/ID` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CancelReport {
    /// The run is over.
    Confirmed,
    /// The endpoint was asked to end it.
    Sent,
    /// Nobody can be asked; it does not count any more.
    Impossible,
}

/// Whether that can be said of a run yet.
pub enum Ending {
    Told(CancelReport),
    /// It has no name yet by which its endpoint could be called, and is called once it has one: 10 s are waited for that.
    /// Then what carries it is closed.
    Open(Arc<Stop>),
}

/// Whole numbers as such, as they were configured: `95`, not `95.0`.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn whole_where_it_is<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if number.fract() == 0.0 { serializer.serialize_u64(*number as u64) } else { serializer.serialize_f64(*number) }
}
