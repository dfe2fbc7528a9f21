//! Retry: another endpoint for an exchange that the one it was given did not serve.

use std::sync::Arc;
use std::time::Instant;

use crate::state::Target;
use crate::state::core::{Core, Grant, Request, Rules, Unplaced};
use crate::state::sessions::SessionKey;

impl Core {
    /// Moves a grant to another endpoint, or to the same one where its pin is confirmed.
    pub fn retry(&mut self, grant: &mut Grant, now: Instant, rng: u64) -> Result<Arc<Target>, Unplaced> {
        let now = self.advance(now);
        if grant.run.and_then(|run| self.runs.run(run)).is_some_and(|run| run.ended) {
            return Err(Unplaced::Lost);
        }
        let from = grant.endpoint;
        let pinned = grant.session.map(|session| (self.sessions.endpoint(session), self.sessions.settled(session)));
        let to = match pinned {
            _ if grant.fixed => from,
            Some((here, true)) if here == from => from,
            Some((here, settled)) if here != from && (settled || self.may_follow(grant, here)) => {
                // One that is gone is kept for its pins only.
                if self.was_tried(grant, here) || self.endpoints[here].gone {
                    return Err(Unplaced::Empty);
                }
                if grant.run.is_some() && !self.endpoints[here].has_slot() {
                    return Err(Unplaced::PinnedFull(here));
                }
                here
            }
            // Whoever has joined it meanwhile is there.
            _ if grant.run.and_then(|run| self.runs.run(run)).is_some_and(|run| run.carriers > 1) => from,
            _ => self.choose_another(grant, now, rng)?,
        };
        if let Some(run) = grant.run.and_then(|run| self.runs.run_mut(run)) {
            run.attempts += 1;
        }
        if to != from {
            self.shift(grant, to, now);
            self.tell_move(grant);
        }
        Ok(self.target(grant))
    }

    /// Another endpoint than those tried, of the same version if that has one.
    fn choose_another(&mut self, grant: &Grant, now: Instant, rng: u64) -> Result<u32, Unplaced> {
        let known = grant.tried.iter().filter_map(|identity| self.by_identity.get(identity).copied());
        let tried: Vec<u32> = known.chain([grant.endpoint]).collect();
        let version = self.endpoints[grant.endpoint].version;
        let key = grant.session.map(|session| SessionKey { scope: None, text: self.sessions.key(session).into() });
        let request = Request { key: key.as_ref(), run: grant.run_id, creates: grant.placing, version: None, now, rng };
        let version = if self.versions[version].configured && self.offers(version, &tried) {
            version
        } else {
            self.choose_version(&request, &tried).ok_or(Unplaced::Empty)?.0
        };
        if request.run.is_none() && grant.session.is_none() && !grant.placing {
            return self.versions[version].next_in_rotation(&tried).ok_or(Unplaced::Empty);
        }
        self.place_session(version, &request, &tried)
    }

    /// Hands the grant's place over to another endpoint, and its tentative pin with it. (One that is confirmed at the
    /// old endpoint never comes here: it retries there.)
    pub(super) fn shift(&mut self, grant: &mut Grant, to: u32, now: Instant) {
        let from = grant.endpoint;
        match grant.run {
            Some(_) => {
                self.endpoints[from].outstanding -= 1;
                self.endpoints[to].outstanding += 1;
            }
            None => {
                self.endpoints[from].open -= 1;
                self.endpoints[to].open += 1;
            }
        }
        if grant.placing {
            self.endpoints[from].credit -= 1;
            self.endpoints[to].credit += 1;
        }
        let Rules { slow_start, .. } = self.rules;
        let endpoint = &mut self.endpoints[to];
        if grant.run.is_some() {
            self.picks += 1;
            endpoint.stamp = self.picks;
        }
        self.versions[endpoint.version].turn(to, endpoint, slow_start, now);
        if let Some(run) = grant.run.and_then(|run| self.runs.run_mut(run)) {
            run.endpoint = to;
            run.target = endpoint.target.clone();
        }
        if let Some(run) = grant.run {
            self.run_changed(run);
        }
        grant.tried.push(self.endpoints[from].identity.clone());
        grant.endpoint = to;
        if let Some(session) = grant.session
            && self.sessions.endpoint(session) == from
        {
            self.move_pin(session, to);
        }
        self.reindex(to);
        self.settle(from, now);
    }

    /// A tentative pin was moved by another exchange of the session, to where this one may follow.
    fn may_follow(&self, grant: &Grant, here: u32) -> bool {
        let endpoint = &self.endpoints[here];
        endpoint.ready && !self.was_tried(grant, here) && (grant.run.is_none() || endpoint.has_slot())
    }

    fn was_tried(&self, grant: &Grant, endpoint: u32) -> bool {
        grant.tried.contains(&self.endpoints[endpoint].identity)
    }
}
