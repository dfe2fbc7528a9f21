//! Turn: what happens to a start whose session has a run already (double texting): go, refuse, wait or interrupt.
//!
//! A start is named by the id that its run will have. From `Go` until it has ended (or never began) it is *current*
//! here, whether it waits for a slot or runs; only who has not been told `Go` is *waiting*.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::config::Policy;
use crate::ids::RunId;
use crate::state::sessions::SessionKey;

/// How long an interrupting start waits for the runs that it cancelled; then it goes all the same.
pub const INTERRUPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Starts of one session that wait for their turn at most, so that one conversation can't fill the queue.
pub const WAITING_PER_SESSION_MAX: usize = 64;

/// What becomes of a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Go,
    /// Refused: this run is outstanding.
    Busy(RunId),
    /// It waits until [`Turns::ended`] names it.
    Wait,
    /// Refused: too many of its session wait.
    Full,
    /// It waits until [`Turns::ended`] or, after [`INTERRUPT_TIMEOUT`], [`Turns::overdue`] names it. The caller now
    /// cancels the runs `cancel` (no run is named to two callers) and refuses the starts `replaced` as busy with this
    /// one: they wait no more. Both may be empty.
    Interrupt {
        cancel: Vec<RunId>,
        replaced: Vec<RunId>,
    },
}

/// The turns of all sessions of a service that have a start. A session goes by its first key, never by an alias.
#[derive(Default)]
pub struct Turns {
    sessions: HashMap<SessionKey, Turn>,
    /// Interrupting starts that wait, by when they have waited long enough.
    deadlines: BTreeMap<(Instant, RunId), SessionKey>,
}

/// One session. While anybody waits, somebody is current: there is always one whose end lets the next go.
#[derive(Default)]
struct Turn {
    current: Vec<Current>,
    /// In the order in which they go. An interrupting start replaces all before it, so only the first can be one.
    waiting: VecDeque<Waiting>,
}

struct Current {
    run: RunId,
    /// Somebody was told to cancel it.
    cancelled: bool,
}

struct Waiting {
    run: RunId,
    /// It interrupts, and goes by then.
    deadline: Option<Instant>,
}

impl Turns {
    /// No session has a start.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// A start comes.
    pub fn ask(&mut self, session: &SessionKey, run: RunId, policy: Policy, now: Instant) -> Answer {
        let Some(turn) = self.sessions.get_mut(session) else {
            self.adopt(session, run);
            return Answer::Go;
        };
        match policy {
            Policy::Allow => {
                turn.current.push(Current { run, cancelled: false });
                Answer::Go
            }
            Policy::Reject => Answer::Busy(turn.current[0].run),
            Policy::Enqueue if turn.waiting.len() >= WAITING_PER_SESSION_MAX => Answer::Full,
            Policy::Enqueue => {
                turn.waiting.push_back(Waiting { run, deadline: None });
                Answer::Wait
            }
            Policy::Interrupt | Policy::Rollback => {
                let deadline = now + INTERRUPT_TIMEOUT;
                let replaced: Vec<Waiting> = turn.waiting.drain(..).collect();
                turn.waiting.push_back(Waiting { run, deadline: Some(deadline) });
                let fresh =
                    |current: &mut Current| (!std::mem::replace(&mut current.cancelled, true)).then_some(current.run);
                let cancel = turn.current.iter_mut().filter_map(fresh).collect();
                for waiting in &replaced {
                    forget_deadline(&mut self.deadlines, waiting);
                }
                self.deadlines.insert((deadline, run), session.clone());
                Answer::Interrupt { cancel, replaced: replaced.iter().map(|waiting| waiting.run).collect() }
            }
        }
    }

    /// A run turned out to belong to this session: its id was in the answer, or the endpoint began it by itself.
    pub fn adopt(&mut self, session: &SessionKey, run: RunId) {
        let turn = self.sessions.entry(session.clone()).or_default();
        turn.current.push(Current { run, cancelled: false });
    }

    /// A run has ended, or a start will not become one: it left, was refused or timed out, current or waiting. Says who
    /// goes now; that one is current from here on. What this session does not know is ignored.
    pub fn ended(&mut self, session: &SessionKey, run: RunId) -> Option<RunId> {
        let turn = self.sessions.get_mut(session)?;
        if let Some(index) = turn.waiting.iter().position(|waiting| waiting.run == run) {
            let left = turn.waiting.remove(index)?;
            forget_deadline(&mut self.deadlines, &left);
            return None;
        }
        let index = turn.current.iter().position(|current| current.run == run)?;
        turn.current.remove(index);
        if !turn.current.is_empty() {
            return None;
        }
        let Some(next) = turn.waiting.pop_front() else {
            self.sessions.remove(session);
            return None;
        };
        turn.current.push(Current { run: next.run, cancelled: false });
        forget_deadline(&mut self.deadlines, &next);
        Some(next.run)
    }

    /// Interrupting starts that have waited long enough. They are current from here on, beside the runs that would not
    /// end.
    pub fn overdue(&mut self, now: Instant) -> Vec<RunId> {
        let mut go = Vec::new();
        while let Some(entry) = self.deadlines.first_entry()
            && entry.key().0 <= now
        {
            let ((_, run), session) = entry.remove_entry();
            if let Some(turn) = self.sessions.get_mut(&session) {
                turn.waiting.retain(|waiting| waiting.run != run);
                turn.current.push(Current { run, cancelled: false });
                go.push(run);
            }
        }
        go
    }

    /// When [`Turns::overdue`] has something to say next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first_key_value().map(|((deadline, _), _)| *deadline)
    }
}

/// It waits no more, or goes.
fn forget_deadline(deadlines: &mut BTreeMap<(Instant, RunId), SessionKey>, waiting: &Waiting) {
    if let Some(deadline) = waiting.deadline {
        deadlines.remove(&(deadline, waiting.run));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn session(name: usize) -> SessionKey {
        SessionKey { scope: None, text: name.to_string().into() }
    }

    #[test]
    fn a_free_session_lets_everybody_go() {
        let now = crate::ids::now();
        for policy in [Policy::Allow, Policy::Reject, Policy::Enqueue, Policy::Interrupt, Policy::Rollback] {
            let mut turns = Turns::default();
            let run = RunId::generate();
            assert_eq!(turns.ask(&session(0), run, policy, now), Answer::Go);
            assert_eq!(turns.ended(&session(0), run), None);
            assert!(turns.sessions.is_empty());
        }
    }

    #[test]
    fn a_busy_session_answers_by_policy() {
        let now = crate::ids::now();
        let mut turns = Turns::default();
        let [first, second, third, fourth] = [(); 4].map(|()| RunId::generate());
        assert_eq!(turns.ask(&session(0), first, Policy::Allow, now), Answer::Go);
        assert_eq!(turns.ask(&session(0), second, Policy::Reject, now), Answer::Busy(first));
        assert_eq!(turns.ask(&session(0), second, Policy::Enqueue, now), Answer::Wait);
        assert_eq!(turns.ask(&session(0), third, Policy::Enqueue, now), Answer::Wait);
        assert_eq!(turns.ask(&session(0), fourth, Policy::Allow, now), Answer::Go);
        assert_eq!(turns.ended(&session(0), first), None, "the fourth goes on");
        assert_eq!(turns.ended(&session(0), fourth), Some(second));
        assert_eq!(turns.ended(&session(0), second), Some(third));
        assert_eq!(turns.ask(&session(1), first, Policy::Reject, now), Answer::Go, "another session");
    }

    #[test]
    fn an_interrupting_start_takes_the_place_of_all_before_it() {
        let now = crate::ids::now();
        let mut turns = Turns::default();
        let [first, queued, second, third, later] = [(); 5].map(|()| RunId::generate());
        turns.ask(&session(0), first, Policy::Interrupt, now);
        turns.ask(&session(0), queued, Policy::Enqueue, now);
        let interrupt = |cancel, replaced| Answer::Interrupt { cancel, replaced };
        let answer = turns.ask(&session(0), second, Policy::Interrupt, now);
        assert_eq!(answer, interrupt(vec![first], vec![queued]));
        let answer = turns.ask(&session(0), third, Policy::Interrupt, now);
        assert_eq!(answer, interrupt(vec![], vec![second]), "the first is being cancelled already");
        assert_eq!(turns.ask(&session(0), later, Policy::Enqueue, now), Answer::Wait);
        assert_eq!(turns.ended(&session(0), first), Some(third));
        assert_eq!(turns.ended(&session(0), third), Some(later));
    }

    #[test]
    fn an_interrupting_start_that_leaves_lets_the_next_wait_for_the_end() {
        let now = crate::ids::now();
        let mut turns = Turns::default();
        let [first, second, third] = [(); 3].map(|()| RunId::generate());
        turns.ask(&session(0), first, Policy::Interrupt, now);
        turns.ask(&session(0), second, Policy::Interrupt, now);
        turns.ask(&session(0), third, Policy::Enqueue, now);
        assert_eq!(turns.ended(&session(0), second), None, "it left");
        assert_eq!(turns.next_deadline(), None);
        assert_eq!(turns.overdue(now + INTERRUPT_TIMEOUT), []);
        assert_eq!(turns.ended(&session(0), first), Some(third));
    }

    #[test]
    fn a_run_that_will_not_end_holds_an_interrupting_start_for_so_long() {
        let now = crate::ids::now();
        let mut turns = Turns::default();
        let [stuck, second, third] = [(); 3].map(|()| RunId::generate());
        turns.ask(&session(0), stuck, Policy::Interrupt, now);
        turns.ask(&session(0), second, Policy::Rollback, now);
        assert_eq!(turns.overdue(now + INTERRUPT_TIMEOUT - Duration::from_millis(1)), []);
        assert_eq!(turns.next_deadline(), Some(now + INTERRUPT_TIMEOUT));
        assert_eq!(turns.overdue(now + INTERRUPT_TIMEOUT), [second]);
        let answer = turns.ask(&session(0), third, Policy::Interrupt, now + INTERRUPT_TIMEOUT);
        assert_eq!(answer, Answer::Interrupt { cancel: vec![second], replaced: vec![] });
        assert_eq!(turns.ended(&session(0), second), None, "the stuck one is still there");
        assert_eq!(turns.ended(&session(0), stuck), Some(third));
    }

    #[test]
    fn one_conversation_fills_its_own_places_only() {
        let now = crate::ids::now();
        let mut turns = Turns::default();
        turns.ask(&session(0), RunId::generate(), Policy::Enqueue, now);
        for _ in 0..WAITING_PER_SESSION_MAX {
            assert_eq!(turns.ask(&session(0), RunId::generate(), Policy::Enqueue, now), Answer::Wait);
        }
        assert_eq!(turns.ask(&session(0), RunId::generate(), Policy::Enqueue, now), Answer::Full);
        assert_eq!(turns.ask(&session(1), RunId::generate(), Policy::Enqueue, now), Answer::Go);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Ask {
            session: usize,
            policy: Policy,
        },
        /// The n-th of those that are current or wait.
        End(usize),
        Pass(u64),
    }

    fn steps() -> impl Strategy<Value = Step> {
        let policy = proptest::sample::select(vec![
            Policy::Allow,
            Policy::Reject,
            Policy::Enqueue,
            Policy::Enqueue,
            Policy::Interrupt,
            Policy::Rollback,
        ]);
        prop_oneof![
            5 => (0..2_usize, policy).prop_map(|(session, policy)| Step::Ask { session, policy }),
            4 => (0..20_usize).prop_map(Step::End),
            1 => (1..8_u64).prop_map(Step::Pass),
        ]
    }

    /// One start as the model has it: everybody's story in order of arrival, and all rules read off that.
    #[derive(Clone, Debug)]
    struct Told {
        session: usize,
        run: RunId,
        current: bool,
        cancelled: bool,
        goes_by: Option<u64>,
    }

    proptest! {
        #[test]
        fn it_does_what_the_story_of_all_starts_says(steps in proptest::collection::vec(steps(), 1..80)) {
            let start = crate::ids::now();
            let at = |time: u64| start + Duration::from_secs(time);
            let mut now = 0;
            let mut turns = Turns::default();
            let mut story: Vec<Told> = Vec::new();
            for step in steps {
                match step {
                    Step::Ask { session: name, policy } => {
                        let run = RunId::generate();
                        let of_session = || story.iter().filter(|told| told.session == name);
                        let busy = of_session().find(|told| told.current).map(|told| told.run);
                        let mut told = Told { session: name, run, current: false, cancelled: false, goes_by: None };
                        let answer = turns.ask(&session(name), run, policy, at(now));
                        match (busy, policy) {
                            (None, _) | (_, Policy::Allow) => {
                                prop_assert_eq!(answer, Answer::Go);
                                told.current = true;
                                story.push(told);
                            }
                            (Some(_), Policy::Reject) => {
                                let outstanding = |busy| of_session().any(|told| told.current && told.run == busy);
                                prop_assert!(matches!(answer, Answer::Busy(busy) if outstanding(busy)));
                            }
                            (Some(_), Policy::Enqueue) => {
                                prop_assert_eq!(answer, Answer::Wait);
                                story.push(told);
                            }
                            (Some(_), Policy::Interrupt | Policy::Rollback) => {
                                let Answer::Interrupt { mut cancel, replaced } = answer else {
                                    return Err(TestCaseError::fail("it interrupts"));
                                };
                                let mut expected: Vec<RunId> =
                                    of_session().filter(|told| told.current && !told.cancelled).map(|told| told.run).collect();
                                expected.sort();
                                cancel.sort();
                                prop_assert_eq!(&cancel, &expected);
                                let waiting: Vec<RunId> =
                                    of_session().filter(|told| !told.current).map(|told| told.run).collect();
                                prop_assert_eq!(replaced, waiting);
                                story.retain(|told| told.session != name || told.current);
                                for told in story.iter_mut().filter(|told| told.session == name) {
                                    told.cancelled = true;
                                }
                                told.goes_by = Some(now + INTERRUPT_TIMEOUT.as_secs());
                                story.push(told);
                            }
                        }
                    }
                    Step::End(which) if !story.is_empty() => {
                        let gone = story.remove(which % story.len());
                        let went = turns.ended(&session(gone.session), gone.run);
                        let free = !story.iter().any(|told| told.session == gone.session && told.current);
                        let next = story.iter_mut().find(|told| told.session == gone.session && free);
                        prop_assert_eq!(went, next.as_ref().map(|told| told.run));
                        if let Some(next) = next {
                            next.current = true;
                            next.goes_by = None;
                        }
                        prop_assert_eq!(turns.ended(&session(gone.session), gone.run), None, "only once");
                    }
                    Step::End(_) => {}
                    Step::Pass(time) => {
                        now += time;
                        let mut went = turns.overdue(at(now));
                        went.sort();
                        let mut expected = Vec::new();
                        for told in story.iter_mut().filter(|told| told.goes_by.is_some_and(|by| by <= now)) {
                            told.goes_by = None;
                            told.current = true;
                            expected.push(told.run);
                        }
                        expected.sort();
                        prop_assert_eq!(went, expected);
                    }
                }
                let next = story.iter().filter_map(|told| told.goes_by).min();
                prop_assert_eq!(turns.next_deadline(), next.map(at));
                let live: std::collections::BTreeSet<usize> = story.iter().map(|told| told.session).collect();
                prop_assert_eq!(turns.sessions.len(), live.len(), "nothing is kept of a session that is done");
            }
        }
    }
}
