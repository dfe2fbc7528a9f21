//! Runs: a record for every piece of agent work, from its reservation to its end, whatever carries it meanwhile.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::ids::RunId;
use crate::protocols::{Cancel, Protocol};
use crate::state::core::Origin;
use crate::state::{RunOutcome, Target};

/// One run. While it is outstanding it owns its endpoint's slot; exchanges are only its carriers, and there may be none.
/// One that has ended stays until its last carrier has gone.
pub(crate) struct Run {
    pub id: RunId,
    /// Where it runs; its metrics go by this at its end.
    pub target: Arc<Target>,
    pub endpoint: u32,
    pub session: Option<u32>,
    pub started: Instant,
    /// Exchanges that carry it.
    pub carriers: u32,
    /// How often it was sent, the first time included.
    pub attempts: u32,
    pub about: About,
    /// `None`: its end matters to no turn and no principal.
    pub origin: Option<Box<Origin>>,
    /// The protocol's own id of it.
    pub key: Option<Box<str>>,
    /// A `versions[].match` chose its version, and it has no session.
    pub matched: bool,
    /// How it ends is not its version's doing.
    pub unjudged: bool,
    /// When its first event came, where its start's exchange brought one.
    pub first_event: Option<Instant>,
    pub ended: bool,
    /// Tells its carriers that it was ended from elsewhere.
    pub stop: Arc<Stop>,
    /// When anything was heard of it last.
    pub seen: Instant,
    /// When it has to be over.
    pub deadline: Option<Instant>,
    /// It is to be ended by a call.
    pub cancel: Option<Cancelling>,
    /// Status calls in a row that reached nobody.
    pub unreachable: u32,
    /// A call about it is under way.
    pub asking: bool,
    /// The store knows of it, or is about to.
    pub stored: bool,
    wake: Option<Instant>,
    /// Its neighbours among the runs of its session.
    previous: Option<u32>,
    next: Option<u32>,
}

/// By which protocol a run is known.
#[derive(Clone, Default)]
pub struct About {
    /// `None`: plain HTTP.
    pub protocol: Option<&'static dyn Protocol>,
    /// [`crate::protocols::Recognised::base`].
    pub base: Box<str>,
    /// It goes on when its exchange is gone.
    pub goes_on: bool,
}

/// A run that is to be ended by the protocol's call.
#[derive(Clone, Copy)]
pub(crate) struct Cancelling {
    pub how: Cancel,
    /// What it counts as then.
    pub outcome: RunOutcome,
    /// After that it counts as ended, whatever the endpoint says.
    pub until: Instant,
    pub sent: bool,
    /// There is no call for it: it ends when nothing carries it any more.
    pub by_closing: bool,
}

/// Shared by a run and those who carry it: how it was ended from elsewhere, if it was.
#[derive(Debug, Default)]
pub struct Stop {
    outcome: AtomicU8,
    /// There was a call to its endpoint.
    called: AtomicBool,
    /// Those who want to hear of it: nearly always one.
    wakers: Mutex<(Option<Waker>, Vec<Waker>)>,
}

impl Stop {
    pub(crate) fn set(&self, outcome: RunOutcome) {
        self.outcome.store(outcome as u8 + 1, Ordering::Release);
        let (first, more) = std::mem::take(&mut *self.wakers());
        first.into_iter().chain(more).for_each(Waker::wake);
    }

    /// Its endpoint is called to end it.
    pub(crate) fn set_called(&self) {
        self.called.store(true, Ordering::Release);
    }

    /// Whether its endpoint was called to end it.
    pub fn is_called(&self) -> bool {
        self.called.load(Ordering::Acquire)
    }

    /// As what the run was ended.
    pub fn outcome(&self) -> Option<RunOutcome> {
        let index = usize::from(self.outcome.load(Ordering::Acquire)).checked_sub(1)?;
        RunOutcome::ALL.get(index).copied()
    }

    /// Is woken when it is ended. Whoever asks looks at [`Stop::outcome`] after this.
    pub fn wakes(&self, waker: &Waker) {
        let (first, more) = &mut *self.wakers();
        match first {
            None => *first = Some(waker.clone()),
            Some(known) if known.will_wake(waker) => {}
            Some(_) if more.iter().any(|known| known.will_wake(waker)) => {}
            // Those who have left are woken for nothing, and are few.
            Some(_) => more.push(waker.clone()),
        }
    }

    fn wakers(&self) -> MutexGuard<'_, (Option<Waker>, Vec<Waker>)> {
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All runs of one service.
#[derive(Default)]
pub(crate) struct Runs {
    slots: Vec<Option<Run>>,
    free: Vec<u32>,
    outstanding: usize,
    by_key: HashMap<Box<str>, u32>,
    /// Outstanding runs.
    by_id: HashMap<RunId, u32, foldhash::fast::RandomState>,
    /// Outstanding runs that nothing carries, or that have to be over at some time: when each is to be looked at next.
    wakes: BTreeSet<(Instant, u32)>,
}

impl Runs {
    /// Adds a run before `first`, the newest run of its session. What is returned is the newest now.
    pub fn insert(&mut self, run: NewRun, first: Option<u32>) -> u32 {
        let NewRun { id, target, endpoint, session, started, about, carriers, matched } = run;
        let run = Run {
            id,
            target,
            endpoint,
            session,
            started,
            carriers,
            attempts: 1,
            about,
            origin: None,
            key: None,
            matched,
            unjudged: false,
            first_event: None,
            ended: false,
            stop: Arc::default(),
            seen: started,
            deadline: None,
            cancel: None,
            unreachable: 0,
            asking: false,
            stored: false,
            wake: None,
            previous: None,
            next: None,
        };
        let number = match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = Some(run);
                number
            }
            None => {
                self.slots.push(Some(run));
                (self.slots.len() - 1) as u32
            }
        };
        self.outstanding += 1;
        self.by_id.insert(id, number);
        self.link(number, first);
        number
    }

    /// Puts a run that was in no session before `first`.
    pub fn link(&mut self, number: u32, first: Option<u32>) {
        if let Some(first) = first.and_then(|first| self.slots[first as usize].as_mut()) {
            first.previous = Some(number);
        }
        if let Some(run) = self.slots[number as usize].as_mut() {
            run.next = first;
        }
    }

    /// Gives a run its key. The newest run of a key has it.
    pub fn name(&mut self, number: u32, key: &str) {
        let Some(run) = self.slots[number as usize].as_mut().filter(|run| !run.ended) else { return };
        if run.key.as_deref() == Some(key) {
            return;
        }
        if let Some(old) = run.key.replace(key.into()) {
            self.by_key.remove(&old);
        }
        if let Some(other) = self.by_key.insert(key.into(), number)
            && let Some(other) = self.slots[other as usize].as_mut()
        {
            other.key = None;
        }
    }

    /// The outstanding run with this key.
    pub fn find(&self, key: &str) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// Takes an outstanding run out of everything but its slot, and says which is the newest of its session now, where
    /// this one was.
    pub fn end(&mut self, number: u32) -> Option<Option<u32>> {
        self.sleep(number);
        let run = self.slots[number as usize].as_mut()?;
        run.ended = true;
        self.outstanding -= 1;
        // Two never have one id, unless an image names a run twice.
        if self.by_id.get(&run.id) == Some(&number) {
            self.by_id.remove(&run.id);
        }
        if let Some(key) = run.key.take() {
            self.by_key.remove(&key);
        }
        let (previous, next) = (run.previous.take(), run.next.take());
        if let Some(next) = next.and_then(|next| self.slots[next as usize].as_mut()) {
            next.previous = previous;
        }
        if let Some(previous) = previous.and_then(|previous| self.slots[previous as usize].as_mut()) {
            previous.next = next;
        }
        previous.is_none().then_some(next)
    }

    /// Forgets a run that has ended and has no carrier any more.
    pub fn forget(&mut self, number: u32) {
        if self.slots[number as usize].take_if(|run| run.ended && run.carriers == 0).is_some() {
            self.free.push(number);
        }
    }

    /// How many are outstanding.
    pub fn len(&self) -> usize {
        self.outstanding
    }

    pub fn run(&self, number: u32) -> Option<&Run> {
        self.slots.get(number as usize)?.as_ref()
    }

    pub fn run_mut(&mut self, number: u32) -> Option<&mut Run> {
        self.slots.get_mut(number as usize)?.as_mut()
    }

    /// The outstanding run with this id.
    pub fn by_id(&self, id: RunId) -> Option<u32> {
        self.by_id.get(&id).copied()
    }

    /// To be looked at then, and not before.
    pub fn wake_at(&mut self, number: u32, when: Instant) {
        self.sleep(number);
        if let Some(run) = self.run_mut(number).filter(|run| !run.ended) {
            run.wake = Some(when);
            self.wakes.insert((when, number));
        }
    }

    /// Not to be looked at any more.
    pub fn sleep(&mut self, number: u32) {
        if let Some(when) = self.run_mut(number).and_then(|run| run.wake.take()) {
            self.wakes.remove(&(when, number));
        }
    }

    /// Takes one run that is to be looked at now.
    pub fn take_due(&mut self, now: Instant) -> Option<u32> {
        let (when, number) = *self.wakes.first()?;
        (when <= now).then(|| self.sleep(number))?;
        Some(number)
    }

    /// Whether any run of the chain that begins at `first` is at `endpoint`.
    pub fn any_at(&self, first: Option<u32>, endpoint: u32) -> bool {
        self.chain(first).any(|(_, run)| run.endpoint == endpoint)
    }

    /// The outstanding runs of a session, with their numbers, the newest first.
    pub fn chain(&self, first: Option<u32>) -> impl Iterator<Item = (u32, &Run)> {
        let at = |number: u32| self.run(number).map(|run| (number, run));
        std::iter::successors(first.and_then(at), move |(_, run)| run.next.and_then(at))
    }

    /// Every run that is to outlive this process was written.
    pub fn mark_stored(&mut self) {
        for run in self.slots.iter_mut().flatten().filter(|run| !run.ended && run.lasts()) {
            run.stored = true;
        }
    }

    /// So many slots the table has.
    pub fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    /// The outstanding runs of the slots `from..to`.
    pub fn between(&self, from: u32, to: u32) -> impl Iterator<Item = &Run> {
        let (from, to) = (from as usize, to as usize);
        let slots = self.slots.get(from..to.min(self.slots.len())).unwrap_or_default();
        slots.iter().filter_map(|slot| slot.as_ref().filter(|run| !run.ended))
    }

    /// All outstanding runs, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Run)> {
        let numbered = self.slots.iter().enumerate();
        numbered.filter_map(|(number, slot)| Some((number as u32, slot.as_ref().filter(|run| !run.ended)?)))
    }
}

impl Run {
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.started)
    }
}

/// What a run begins with.
pub(crate) struct NewRun {
    pub id: RunId,
    pub target: Arc<Target>,
    pub endpoint: u32,
    pub session: Option<u32>,
    pub started: Instant,
    pub about: About,
    pub carriers: u32,
    pub matched: bool,
}
