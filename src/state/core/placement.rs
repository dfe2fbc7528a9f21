//! Placement: chooses the endpoint of an exchange, by its session's pin, its key's hash or the load, and reserves it in the
//! same step.

use crate::balance::{self, Candidate};
use crate::config;
use crate::state::AffinityOutcome;
use crate::state::core::standing::Standing;
use crate::state::core::{Core, Grant, Request, Rules, Unplaced, rollout};
use crate::state::dispatcher::PinHint;
use crate::state::endpoints::{Choice, Endpoints, Version};
use crate::state::runs::{About, NewRun};
use crate::state::sessions::SessionKey;

impl Core {
    pub(super) fn pick_without_session(&mut self, request: Request<'_>) -> Result<Grant, Unplaced> {
        let (version, matched) = self.choose_version(&request, &[]).ok_or(Unplaced::Empty)?;
        let endpoint = match request.run {
            None if !request.creates => self.versions[version].next_in_rotation(&[]).ok_or(Unplaced::Empty)?,
            _ => self.place_session(version, &request, &[])?,
        };
        Ok(self.reserve(endpoint, None, matched, AffinityOutcome::None, &request))
    }

    pub(super) fn pick_new(&mut self, key: &SessionKey, request: Request<'_>) -> Result<Grant, Unplaced> {
        let (version, matched) = self.choose_version(&request, &[]).ok_or(Unplaced::Empty)?;
        let endpoint = self.place_session(version, &request, &[])?;
        let session = self.pin(key, endpoint, matched, request.now);
        self.count_session(endpoint, matched);
        // A table full of busy sessions leaves the new one without a pin; its run is counted all the same.
        let affinity = if session.is_some() { AffinityOutcome::New } else { AffinityOutcome::None };
        Ok(self.reserve(endpoint, session, matched, affinity, &request))
    }

    pub(super) fn pick_pinned(&mut self, session: u32, bound: bool, request: Request<'_>) -> Result<Grant, Unplaced> {
        let here = self.sessions.endpoint(session);
        let works_here = self.runs.any_at(self.sessions.first_run(session), here);
        let standing = self.standing(here);
        let leaves = self.leaves(standing, works_here, request.run.is_some())?;
        let evicted = leaves.is_none() && self.leaves_evicted(session, here, &request);
        let moved = match leaves.or(evicted.then_some(AffinityOutcome::Moved)) {
            None => None,
            Some(outcome) if bound => {
                if !self.sessions.busy(session) {
                    self.unpin(session);
                }
                return Err(Unplaced::Bound(outcome));
            }
            Some(outcome) => match self.place_anew(here, evicted, &request) {
                Ok(there) => Some((there, outcome)),
                // Better an endpoint that drains than none.
                Err(Unplaced::Empty) if standing == Standing::Draining => None,
                Err(unplaced) => return Err(unplaced),
            },
        };
        if let Some((there, outcome)) = moved {
            self.move_pin(session, there);
            self.sessions.carry(session);
            return Ok(self.reserve(there, Some(session), false, outcome, &request));
        }
        if request.run.is_some() && !self.endpoints[here].has_slot() {
            return Err(Unplaced::PinnedFull(here));
        }
        Ok(self.reserve(here, Some(session), false, AffinityOutcome::Hit, &request))
    }

    /// The table doesn't know the session, but the proxy's cookie says where it lived.
    pub(super) fn pick_hinted(
        &mut self,
        key: &SessionKey,
        hint: &PinHint,
        request: Request<'_>,
    ) -> Result<Grant, Unplaced> {
        let here = self.by_identity.get(hint.endpoint.as_str()).copied();
        let standing = here.map_or(Standing::Lost, |here| self.standing(here));
        let starts = request.run.is_some();
        let leaves = self.leaves(standing, false, starts)?;
        if let (Some(here), None) = (here, leaves) {
            if starts && !self.endpoints[here].has_slot() {
                return Err(Unplaced::PinnedFull(here));
            }
            let session = self.pin(key, here, false, request.now);
            if let Some(session) = session {
                self.sessions.carry(session);
                // The cookie was issued on success.
                self.sessions.confirm(session, true);
                self.pin_changed(session);
            }
            return Ok(self.reserve(here, session, false, AffinityOutcome::Hit, &request));
        }
        let version = match here {
            Some(here) => Some(self.endpoints[here].version),
            None => self.versions.iter().position(|version| *version.name == *hint.version),
        };
        let outcome = leaves.unwrap_or(AffinityOutcome::Lost);
        let there = match version {
            Some(version) => self.place_again(version, &request),
            None => self.place_by_weights(&request),
        };
        let there = match (there, here) {
            (Err(Unplaced::Empty), Some(here)) if standing == Standing::Draining => here,
            (there, _) => there?,
        };
        let session = self.pin(key, there, false, request.now);
        if let Some(session) = session {
            self.sessions.carry(session);
        }
        Ok(self.reserve(there, session, false, outcome, &request))
    }

    pub(super) fn pick_hashed(&mut self, key: &SessionKey, request: Request<'_>) -> Result<Grant, Unplaced> {
        let (version, matched) = self.choose_version(&request, &[]).ok_or(Unplaced::Empty)?;
        let endpoint = {
            let endpoints = &self.endpoints;
            let candidates = self.versions[version].endpoints.iter().map(|number| (*number, &endpoints[*number]));
            let candidates = candidates.filter(|(_, endpoint)| endpoint.ready).map(|(index, endpoint)| Candidate {
                index,
                hash: endpoint.hash,
                name: &endpoint.identity,
                weight: u64::from(endpoint.weight.max(1)),
            });
            balance::rendezvous(balance::placement(&key.text), candidates).ok_or(Unplaced::Empty)?
        };
        if request.run.is_some() && !self.endpoints[endpoint].has_slot() {
            return Err(Unplaced::PinnedFull(endpoint));
        }
        let mut grant = self.reserve(endpoint, None, matched, AffinityOutcome::Hit, &request);
        grant.fixed = true;
        Ok(grant)
    }

    /// Whether a session must leave its endpoint, and as what.
    pub(super) fn leaves(
        &self,
        standing: Standing,
        works_here: bool,
        starts: bool,
    ) -> Result<Option<AffinityOutcome>, Unplaced> {
        match standing {
            _ if works_here => Ok(None),
            Standing::Draining if starts && self.rules.when_draining == config::WhenDraining::MoveIdle => {
                Ok(Some(AffinityOutcome::Moved))
            }
            Standing::Open | Standing::Draining => Ok(None),
            Standing::Lost if self.rules.when_lost == config::WhenLost::Reject => Err(Unplaced::Lost),
            Standing::Lost => Ok(Some(AffinityOutcome::Lost)),
        }
    }

    /// A new endpoint for a session that had one: in its version if that has any, else as a new session's.
    pub(super) fn place_again(&mut self, version: usize, request: &Request<'_>) -> Result<u32, Unplaced> {
        if self.versions[version].configured && self.versions[version].ready() > 0 {
            return self.place_session(version, request, &[]);
        }
        self.place_by_weights(request)
    }

    pub(super) fn place_by_weights(&mut self, request: &Request<'_>) -> Result<u32, Unplaced> {
        let request = Request { version: None, ..*request };
        let (version, _) = self.choose_version(&request, &[]).ok_or(Unplaced::Empty)?;
        self.place_session(version, &request, &[])
    }

    /// An endpoint of the version for a session, none of those tried: the least loaded, for an exchange without a run a
    /// full one too.
    pub(super) fn place_session(
        &mut self,
        version: usize,
        request: &Request<'_>,
        tried: &[u32],
    ) -> Result<u32, Unplaced> {
        match self.choose(version, request, tried) {
            Some(endpoint) => {
                // It has had its turn, whether or not it is a run that it was chosen for.
                self.picks += 1;
                self.endpoints[endpoint].stamp = self.picks;
                Ok(endpoint)
            }
            None if request.run.is_some() => Err(Unplaced::Full(Some(version))),
            None => self.versions[version].next_in_rotation(tried).ok_or(Unplaced::Empty),
        }
    }

    /// The version of a new session or of an exchange without one, and whether a match chose it. Versions without a
    /// ready endpoint outside `tried` are left out.
    pub(super) fn choose_version(&mut self, request: &Request<'_>, tried: &[u32]) -> Option<(usize, bool)> {
        if let Some(name) = request.version {
            let matched = self.versions.iter().position(|version| version.configured && *version.name == *name);
            if let Some(version) = matched.filter(|version| self.offers(*version, tried)) {
                return Some((version, true));
            }
        }
        if let Some(key) = request.key {
            let candidates = self
                .versions
                .iter()
                .enumerate()
                .filter(|(index, version)| version.configured && self.offers(*index, tried));
            let candidates = candidates.map(|(index, version)| Candidate {
                index: index as u32,
                hash: version.hash,
                name: &version.name,
                weight: version.effective_weight,
            });
            let version = balance::rendezvous(balance::cohort(&key.text), candidates)?;
            return Some((version as usize, false));
        }
        // Whoever waited for any slot takes the one that is offered.
        if let Some(serving) = self.room.serving() {
            let version = self.endpoints[serving].version;
            return (self.versions[version].effective_weight > 0).then_some((version, false));
        }
        // A run without a session waits only where all are full, so versions with a free slot come first.
        let Core { versions, turns, endpoints, .. } = self;
        let any_slot = request.run.is_some()
            && versions.iter().any(|version| version.effective_weight > 0 && version.configured && version.has_slot());
        let candidates = versions
            .iter()
            .enumerate()
            .filter(|(index, version)| {
                version.configured && offers(versions, *index, endpoints, tried) && (!any_slot || version.has_slot())
            })
            .map(|(index, version)| (index, version.effective_weight));
        Some((balance::take_turn(turns, candidates)?, false))
    }

    /// A ready endpoint of the version is left.
    pub(super) fn offers(&self, version: usize, tried: &[u32]) -> bool {
        offers(&self.versions, version, &self.endpoints, tried)
    }

    /// The endpoint of a version for one run more.
    fn choose(&mut self, version: usize, request: &Request<'_>, tried: &[u32]) -> Option<u32> {
        if let Some(serving) = self.room.serving() {
            let offered = &self.endpoints[serving];
            return (offered.version == version && offered.ready && offered.has_slot()).then_some(serving);
        }
        self.graduate(version, request.now);
        let choice = Choice {
            balance: self.rules.balance,
            slow_start: self.rules.slow_start,
            tried,
            now: request.now,
            rng: request.rng,
        };
        self.versions[version].choose(&self.endpoints, &choice)
    }

    /// Counts the exchange at the endpoint, with its run and its part in the session.
    pub(super) fn reserve(
        &mut self,
        number: u32,
        session: Option<u32>,
        matched: bool,
        affinity: AffinityOutcome,
        request: &Request<'_>,
    ) -> Grant {
        let Rules { slow_start, .. } = self.rules;
        let endpoint = &mut self.endpoints[number];
        match request.run {
            Some(_) => {
                endpoint.outstanding += 1;
                self.picks += 1;
                endpoint.stamp = self.picks;
            }
            None => endpoint.open += 1,
        }
        let placing = request.creates && request.run.is_none() && session.is_none();
        endpoint.credit += u32::from(placing);
        self.versions[endpoint.version].turn(number, endpoint, slow_start, request.now);
        let run = request.run.map(|id| {
            let target = endpoint.target.clone();
            let first = session.and_then(|session| self.sessions.first_run(session));
            let about = About::default();
            let started = request.now;
            let new = NewRun { id, target, endpoint: number, session, started, about, carriers: 1, matched };
            self.runs.insert(new, first)
        });
        if let Some(session) = session {
            self.sessions.open(session);
            if run.is_some() {
                self.sessions.set_first_run(session, run);
                self.take_credit(session);
            } else if matches!(affinity, AffinityOutcome::New | AffinityOutcome::Lost | AffinityOutcome::Moved) {
                self.give_credit(session, request.now);
            }
        }
        self.reindex(number);
        Grant {
            endpoint: number,
            session,
            run,
            run_id: request.run,
            affinity,
            matched,
            seen: rollout::Seen::of_exchange(run.is_some()),
            fixed: false,
            placing,
            tried: Vec::new(),
        }
    }

    /// A session that an exchange was to make is there, or will not be.
    pub(super) fn end_placing(&mut self, grant: &mut Grant) {
        if std::mem::take(&mut grant.placing) {
            self.endpoints[grant.endpoint].credit -= 1;
            self.reindex(grant.endpoint);
        }
    }
}

/// A ready endpoint of the version is not among those tried.
fn offers(versions: &[Version], version: usize, endpoints: &Endpoints, tried: &[u32]) -> bool {
    let spent = tried.iter().filter(|number| endpoints[**number].ready && endpoints[**number].version == version);
    versions[version].ready() > spent.count()
}
