//! Succession: what one process leaves to the next, and what the two say to each other while the first still carries
//! exchanges: every decision is the next one's from the moment in which it was given a service.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::UnboundedSender;

use crate::config::Policy;
use crate::ids::{self, RunId};
use crate::protocols;
use crate::rollout::Moment;
use crate::state::dispatcher::{Ask, Dispatcher, Lease, Picked, PinHint};
use crate::state::endpoints::Says;
use crate::state::image::{Place, RunImage, ServiceImage};
use crate::state::queue::{Class, Principal, Ticket};
use crate::state::runs::About;
use crate::state::sessions::SessionKey;
use crate::state::{AffinityOutcome, Kind, Refusal, RunOutcome, TargetSettings};

/// All that lives of one service.
#[derive(Debug, Serialize, Deserialize)]
pub struct Estate {
    pub image: ServiceImage,
    pub health: Vec<HealthLeft>,
    pub drains: Vec<DrainLeft>,
}

/// An endpoint that drains, whoever said so.
#[derive(Debug, Serialize, Deserialize)]
pub struct DrainLeft {
    /// [`crate::config::EndpointUrl::identity`].
    pub endpoint: String,
    /// An operator or the configuration drains it.
    pub drained: bool,
    /// It says so itself.
    pub says: Option<Says>,
    /// When what is left there is cut; `None`: that has begun.
    pub deadline: Option<Moment>,
    /// It is being cut.
    pub cut: bool,
}

/// What is known of an endpoint's health, so that it need not be asked before it may be used.
#[derive(Debug, Serialize, Deserialize)]
pub struct HealthLeft {
    /// [`crate::config::EndpointUrl::identity`].
    pub endpoint: String,
    /// What active checks said last.
    pub healthy: Option<bool>,
    /// In milliseconds.
    pub ejected_for: Option<u64>,
}

/// By which protocol a run is known, on its way to another process.
#[derive(Debug, Serialize, Deserialize)]
pub struct AboutSent {
    pub protocol: Option<String>,
    pub base: String,
    pub goes_on: bool,
}

impl AboutSent {
    fn of(about: &About) -> AboutSent {
        AboutSent {
            protocol: about.protocol.map(|protocol| protocol.name().to_owned()),
            base: about.base.to_string(),
            goes_on: about.goes_on,
        }
    }

    fn about(&self) -> About {
        About {
            protocol: self.protocol.as_deref().and_then(protocols::by_name),
            base: self.base.as_str().into(),
            goes_on: self.goes_on,
        }
    }
}

/// An [`Ask`] on its way to another process.
#[derive(Debug, Serialize, Deserialize)]
pub struct AskSent {
    pub key: Option<SessionKey>,
    pub kind: Kind,
    pub creates: bool,
    pub bound: bool,
    pub run: Option<String>,
    pub about: Option<AboutSent>,
    pub version: Option<String>,
    pub hint: Option<PinHint>,
    pub id: Option<RunId>,
    pub class: Class,
    pub principal: Principal,
    /// As the configuration writes it.
    pub policy: String,
    pub credentials: Vec<(String, String)>,
}

impl AskSent {
    /// `run` is the id of the run that a start begins.
    pub fn of(ask: &Ask<'_>, run: Option<RunId>) -> AskSent {
        let word = Policy::WORDS.iter().find(|(_, policy)| *policy == ask.policy).map_or("allow", |(word, _)| *word);
        let own = |(name, value): &(&'static str, String)| ((*name).to_owned(), value.clone());
        AskSent {
            key: ask.key.cloned(),
            kind: ask.kind,
            creates: ask.creates,
            bound: ask.bound,
            run: ask.run.map(str::to_owned),
            about: ask.about.map(AboutSent::of),
            version: ask.version.map(str::to_owned),
            hint: ask.hint.cloned(),
            id: run,
            class: ask.class,
            principal: ask.principal,
            policy: word.to_owned(),
            credentials: ask.credentials.iter().map(own).collect(),
        }
    }
}

/// What the process before tells the one that decides.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// An exchange asks for an endpoint; to be answered with its ticket.
    Asks {
        service: String,
        ticket: Ticket,
        ask: Box<AskSent>,
    },
    /// It waits no longer.
    Leaves {
        service: String,
        ticket: Ticket,
    },
    Ended {
        service: String,
        run: RunId,
        outcome: RunOutcome,
    },
    /// What carried the run is over, and it goes on.
    Left {
        service: String,
        run: RunId,
    },
    /// A run began that nobody asked a place for.
    Started {
        service: String,
        run: Box<RunImage>,
        place: Place,
    },
    /// The protocol's own id of a run has become known.
    Named {
        service: String,
        run: RunId,
        key: String,
    },
    /// A run was sent to another endpoint, because the first never saw it.
    Moved {
        service: String,
        run: RunId,
        endpoint: String,
    },
    /// An answer of an endpoint said whether it drains.
    Says {
        service: String,
        endpoint: String,
        drains: bool,
    },
    /// A session lives there: an answer of 2xx or 3xx said so.
    Pinned {
        service: String,
        key: SessionKey,
        alias: Option<SessionKey>,
        endpoint: String,
    },
}

/// What it is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Placed {
        service: String,
        ticket: Ticket,
        endpoint: String,
        affinity: AffinityOutcome,
    },
    Refused {
        service: String,
        ticket: Ticket,
        refusal: Refusal,
    },
    /// All endpoints that drain; others do not (any more).
    Drains {
        service: String,
        drains: Vec<DrainLeft>,
    },
    /// A run that it carries is to be ended, as this.
    Stop {
        service: String,
        run: RunId,
        outcome: RunOutcome,
    },
}

impl Dispatcher {
    /// Gives everything away. From here on whoever asks for an endpoint waits for the successor's answer, and all that
    /// becomes of runs and sessions is told `to` it, until [`Dispatcher::reinstate`].
    pub fn hand_over(&self, to: UnboundedSender<Told>, now: Instant) -> Estate {
        self.with(|core| core.hand_over(to, now))
    }

    /// Another process decides: what is asked of this one would be lost.
    pub fn has_successor(&self) -> bool {
        self.with(|core| core.has_successor())
    }

    /// Decides again: there is no successor (any more).
    pub fn reinstate(&self, now: Instant) {
        self.with(|core| core.reinstate(now));
    }

    /// The successor decides for good: what only it needs is forgotten here.
    pub fn retire(&self, now: Instant) {
        self.with(|core| core.retire(now));
    }

    /// Takes what the successor says.
    pub fn answered(&self, answer: Answer, now: Instant) {
        self.with(|core| match answer {
            Answer::Placed { ticket, endpoint, affinity, .. } => core.placed_there(ticket, &endpoint, affinity, now),
            Answer::Refused { ticket, refusal, .. } => core.refused_there(ticket, refusal),
            Answer::Stop { run, outcome, .. } => core.stop_run(run, outcome, now),
            Answer::Drains { drains, .. } => core.drains_there(&drains, now),
        });
    }

    /// Takes everything over, after the first [`Dispatcher::apply`]; `settings` as for [`Dispatcher::restore`]. Returned
    /// are the leases of the runs that the process before carries.
    pub fn take_over(
        self: &Arc<Self>,
        estate: Estate,
        settings: &dyn Fn(&Place) -> Option<TargetSettings>,
        now: Instant,
    ) -> Vec<(RunId, Lease)> {
        let adopted = self.with(|core| core.take_over(estate, settings, now));
        adopted.into_iter().filter_map(|grant| Some((grant.run_id()?, self.adopted(grant)))).collect()
    }

    /// A run began there that nobody asked a place for. `None`: its endpoint is not known here.
    pub fn adopt_run(self: &Arc<Self>, run: RunImage, place: Place, now: Instant) -> Option<(RunId, Lease)> {
        let grant = self.with(|core| core.adopt_started(run, place, now))?;
        Some((grant.run_id()?, self.adopted(grant)))
    }

    pub fn adopt_pin(&self, key: &SessionKey, alias: Option<&SessionKey>, endpoint: &str, now: Instant) {
        self.with(|core| core.adopt_pin(key, alias, endpoint, now));
    }

    /// An answer that came to the process before said whether its endpoint drains.
    pub fn adopt_says(&self, endpoint: &str, drains: bool, now: Instant) {
        self.with(|core| core.adopt_says(endpoint, drains, now));
    }

    /// All endpoints that drain, and the number of this news; `None`: there is none since that of `known`.
    pub fn drains_since(&self, known: u64, now: Instant) -> Option<(u64, Vec<DrainLeft>)> {
        self.with(|core| core.drains_since(known, now))
    }

    pub fn adopt_name(&self, run: RunId, key: &str, now: Instant) {
        self.with(|core| core.adopt_name(run, key, now));
    }

    /// Picks for an exchange of the process before.
    pub fn pick_for(self: &Arc<Self>, ask: &AskSent, now: Instant) -> Result<Picked, Refusal> {
        let about = ask.about.as_ref().map(AboutSent::about);
        let known = ["authorization", "x-api-key"];
        let named =
            |(name, value): &(String, String)| Some((known.into_iter().find(|known| known == name)?, value.clone()));
        let credentials: Vec<(&'static str, String)> = ask.credentials.iter().filter_map(named).collect();
        let asked = Ask {
            creates: ask.creates,
            bound: ask.bound,
            run: ask.run.as_deref(),
            about: about.as_ref(),
            version: ask.version.as_deref(),
            hint: ask.hint.as_ref(),
            id: ask.id,
            class: ask.class,
            principal: ask.principal,
            policy: Policy::of_word(ask.policy.as_bytes()).unwrap_or(Policy::Allow),
            credentials: &credentials,
            ..Ask::new(ask.kind, ask.key.as_ref())
        };
        self.pick(asked, now, ids::random_u64())
    }

    fn adopted(self: &Arc<Self>, grant: crate::state::core::Grant) -> Lease {
        let stop = self.with(|core| core.stop(&grant));
        Lease::adopted(Arc::clone(self), stop, grant)
    }
}
