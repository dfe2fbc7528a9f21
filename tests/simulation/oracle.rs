//! Oracle: who sees everything at once, and says what must not be: too many runs at an agent, two runs of a session.
//!
//! What is promised, precisely. A run holds its slot and its session's turn until its endpoint's last byte has come, or the
//! proxy has closed its connection to the endpoint; what is promised is that no further run is *sent* before. How the
//! agent sees it depends on the network: word of a close may still be on its way (or lost, in a partition) when the next
//! run arrives over another connection, and the agent works on both for a moment. So a run counts here as long as the
//! agent works on it *and* the proxy holds the other end of its connection. A background run has no connection: it counts
//! while the agent works on it, as far as nothing has kept the proxy from learning how it is, since it began.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use longhaul::net::simulated::Network;
use tokio::time::Instant;

/// How long what has troubled an agent may be the reason of what is seen: time-outs and drains take a while.
const AFTERMATH: Duration = Duration::from_secs(70);
/// A run that was placed under an older limit may arrive so much later: it connects first, and again.
const LIMIT_MEMORY: Duration = Duration::from_secs(10);
/// So many failures in a row have an endpoint ejected (`outlier.consecutive_failures`), in the order in which the proxy
/// hears of them: among so many that the agent has done last.
const FAILURES_THAT_EJECT: usize = 3;
const LAST_ANSWERS: usize = 8;

/// A run that an agent works on.
pub struct Work {
    agent: usize,
    session: Option<String>,
    began: Instant,
    carrier: Carrier,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// This connection, of which the agent has the second end.
    Connection(u64),
    /// The request that began it has ended.
    Nothing,
}

/// A number of a [`Work`].
pub type WorkId = u64;

pub struct Oracle {
    network: Network,
    next: WorkId,
    works: BTreeMap<WorkId, Work>,
    /// By agent.
    troubles: Vec<Option<Instant>>,
    /// By agent: which limits it had from when on.
    limits: Vec<VecDeque<(Instant, Option<u32>)>>,
    /// Something that touches every agent.
    trouble_of_all: Option<Instant>,
    /// By agent: how its last answers were, the newest last.
    answers: Vec<VecDeque<bool>>,
}

impl Oracle {
    pub fn new(network: Network, limits: Vec<Option<u32>>) -> Oracle {
        let (now, agents) = (Instant::now(), limits.len());
        Oracle {
            network,
            next: 0,
            works: BTreeMap::new(),
            troubles: vec![None; limits.len()],
            limits: limits.into_iter().map(|limit| VecDeque::from([(now, limit)])).collect(),
            trouble_of_all: None,
            answers: vec![VecDeque::new(); agents],
        }
    }

    /// Something happens to an agent, or to the way to it, that may fail its runs or move its sessions.
    pub fn trouble(&mut self, agent: usize) {
        self.troubles[agent] = Some(Instant::now());
    }

    /// An agent has answered, or failed to because its request said so. Whoever fails again and again is taken for dead.
    pub fn answered(&mut self, agent: usize, well: bool) {
        let answers = &mut self.answers[agent];
        answers.push_back(well);
        if answers.len() > LAST_ANSWERS {
            answers.pop_front();
        }
        if answers.iter().filter(|well| !**well).count() >= FAILURES_THAT_EJECT {
            self.trouble(agent);
        }
    }

    pub fn trouble_all(&mut self) {
        self.trouble_of_all = Some(Instant::now());
    }

    /// Whether what was seen of an agent since `since` has a reason.
    pub fn is_troubled(&self, agent: usize, since: Instant) -> bool {
        let recent = |at: Option<Instant>| at.is_some_and(|at| at + AFTERMATH >= since);
        recent(self.troubles[agent]) || recent(self.trouble_of_all)
    }

    pub fn was_ever_troubled(&self, agent: usize) -> bool {
        self.troubles[agent].is_some() || self.trouble_of_all.is_some()
    }

    pub fn set_limit(&mut self, agent: usize, limit: Option<u32>) {
        if self.limits[agent].back().is_none_or(|(_, last)| *last != limit) {
            self.limits[agent].push_back((Instant::now(), limit));
        }
    }

    /// The highest limit under which a run that arrives now may have been sent.
    fn limit(&self, agent: usize, now: Instant) -> Option<u32> {
        let memory = if self.is_troubled(agent, now) { AFTERMATH } else { LIMIT_MEMORY };
        let limits = &self.limits[agent];
        let mut highest = Some(0);
        for (index, (_, limit)) in limits.iter().enumerate() {
            let until = limits.get(index + 1).map_or(now, |(next, _)| *next);
            if until + memory >= now {
                highest = highest.zip(*limit).map(|(one, other)| one.max(other));
            }
        }
        highest
    }

    /// How many runs of an agent hold slots for certain.
    pub fn held_at(&self, agent: usize) -> usize {
        self.works.values().filter(|work| work.agent == agent && self.is_held(work)).count()
    }

    fn is_held(&self, work: &Work) -> bool {
        match work.carrier {
            Carrier::Connection(number) => !self.network.is_left(number, 1),
            Carrier::Nothing => !self.is_troubled(work.agent, work.began),
        }
    }

    /// An agent begins to work. Says what is wrong with that.
    pub fn begin(
        &mut self,
        agent: usize,
        session: Option<String>,
        takes_turns: bool,
        carrier: Carrier,
    ) -> (WorkId, Vec<String>) {
        let now = Instant::now();
        let work = Work { agent, session, began: now, carrier };
        let mut wrong = Vec::new();
        self.next += 1;
        if !self.is_held(&work) {
            // It has come to the agent though the proxy has given it up already.
            self.works.insert(self.next, work);
            return (self.next, wrong);
        }
        let held = self.held_at(agent);
        if let Some(limit) = self.limit(agent, now)
            && held >= limit as usize
        {
            wrong.push(format!("agent {agent} has {held} runs and is sent one more, beyond its limit of {limit}"));
        }
        if let (Some(session), true) = (&work.session, takes_turns) {
            for other in self.works.values() {
                if other.session.as_ref() == Some(session) && self.is_held(other) {
                    let there = other.agent;
                    wrong.push(format!("session {session} begins a run at agent {agent} and has one at agent {there}"));
                }
            }
        }
        self.works.insert(self.next, work);
        (self.next, wrong)
    }

    /// The request that began a run has ended, the run has not.
    pub fn detach(&mut self, work: WorkId) {
        if let Some(work) = self.works.get_mut(&work) {
            work.carrier = Carrier::Nothing;
        }
    }

    pub fn end(&mut self, work: WorkId) {
        self.works.remove(&work);
    }

    /// The agent has died.
    pub fn end_all(&mut self, agent: usize) {
        self.works.retain(|_, work| work.agent != agent);
    }
}
