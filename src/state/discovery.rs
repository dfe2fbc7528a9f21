//! Discovery: endpoints that the configuration does not list, as whoever found them tells a service of them.
//!
//! The first configuration and every next one bring all that is known ([`OfSources`]); between them come changes
//! ([`Change`]), each of which costs what one endpoint costs, however many there are.

use std::sync::Arc;

use crate::state::TargetSettings;

/// An endpoint that a source gives to a version.
pub struct Discovered {
    pub settings: TargetSettings,
    pub weight: u32,
    /// `None`: what the service says.
    pub max_runs: Option<u32>,
    pub readiness: Readiness,
    pub origin: Origin,
}

/// What a source says of an endpoint that it lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// It gets nothing new; its sessions go elsewhere.
    NotReady,
    /// It shuts down, and finishes what it has.
    Draining,
}

/// Where an endpoint comes from: for status and logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// [`crate::config::Source`] as text.
    pub source: Arc<str>,
    pub pod: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
}

/// What the sources of one version know.
#[derive(Default)]
pub struct OfSources {
    pub found: Vec<Discovered>,
    /// One of them has not answered yet, so that an endpoint may be there although nobody knows.
    pub awaited: bool,
}

/// What has changed of a version's discovered endpoints.
pub enum Change {
    /// It is new, or something about it is.
    Put(Box<Discovered>),
    Remove {
        /// [`crate::state::Target::identity`].
        identity: Box<str>,
        /// It does not answer any more, so that nobody is sent there; else it finishes what it has.
        lost: bool,
    },
    /// Every source of the version has answered: what was only remembered and is not found is gone.
    AllAnswered,
}

/// What the live state keeps of it.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub origin: Origin,
    pub readiness: Readiness,
}
