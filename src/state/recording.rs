//! Recording: an answer as it comes, kept for a while, so that others can read it from its beginning and follow it live.
//!
//! The writer is never held back. It copies what it is given, so that no large read buffer stays alive for a few bytes
//! of it, and every byte kept is a byte counted.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

use crate::message::{Fields, ResponseHead};

/// The unit in which answers are kept, and the most that a reader copies at a time.
const BLOCK_BYTES: usize = 16 * 1024;

/// What a short answer takes at first.
const FIRST_BYTES: usize = 1024;

/// What all recordings that share it may take together.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    bytes_max: usize,
}

impl Budget {
    pub fn new(bytes_max: usize) -> Arc<Budget> {
        Arc::new(Budget { used: AtomicUsize::new(0), bytes_max })
    }

    /// Bytes that are kept now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// More than three quarters are used: time to let go of what is least needed.
    pub fn is_tight(&self) -> bool {
        self.used() > self.bytes_max / 4 * 3
    }

    fn reserve(&self, bytes: usize) -> bool {
        let fits = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.bytes_max);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    fn release(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// An answer. It is *whole* while every byte of it is here; once it has outgrown its bound or the budget it is not, for
/// good: nobody may begin to read it then. Who reads it already goes on while less behind than what is still kept.
pub struct Recording {
    state: Mutex<State>,
    budget: Arc<Budget>,
    bytes_max: usize,
}

struct State {
    /// The digest of the request that the answer is for, once that was read to its end.
    asked: Option<[u8; 32]>,
    head: Option<Arc<ResponseHead>>,
    /// All of [`BLOCK_BYTES`].
    blocks: VecDeque<Bytes>,
    tail: Vec<u8>,
    /// Where the first kept byte stands in the answer.
    start: u64,
    whole: bool,
    end: Option<End>,
    readers: usize,
    last_reader: u64,
    waiting: Vec<(u64, Waker)>,
}

#[derive(Clone, Debug)]
enum End {
    Complete(Option<Fields>),
    Cut,
}

/// Writes a recording. Dropped before its end it leaves an answer that was cut.
pub struct Recorder {
    recording: Arc<Recording>,
}

/// Reads a recording from its beginning.
pub struct Reader {
    recording: Arc<Recording>,
    number: u64,
    position: u64,
}

/// What a reader finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Bytes(Bytes),
    /// That was all; the trailers, where there were any.
    End(Option<Fields>),
    /// The answer broke off here.
    Cut,
    /// The reader was too slow for an answer of this size: what it needs next is not kept any more.
    Behind,
}

/// Begins to record an answer of which `bytes_max` may be kept.
pub fn record(bytes_max: usize, budget: &Arc<Budget>) -> Recorder {
    let state = State {
        asked: None,
        head: None,
        blocks: VecDeque::new(),
        tail: Vec::new(),
        start: 0,
        whole: true,
        end: None,
        readers: 0,
        last_reader: 0,
        waiting: Vec::new(),
    };
    Recorder { recording: Arc::new(Recording { state: Mutex::new(state), budget: Arc::clone(budget), bytes_max }) }
}

impl Recorder {
    pub fn recording(&self) -> &Arc<Recording> {
        &self.recording
    }

    /// The request has been read to its end.
    pub fn asked(&self, digest: [u8; 32]) {
        self.change(|state| state.asked = Some(digest));
    }

    /// The answer begins.
    pub fn head(&self, head: ResponseHead) {
        self.change(|state| state.head = Some(Arc::new(head)));
    }

    /// More of the body.
    pub fn append(&self, bytes: &[u8]) {
        let Recording { budget, bytes_max, .. } = &*self.recording;
        self.change(|state| state.append(bytes, *bytes_max, budget));
    }

    /// The answer has come whole.
    pub fn end(self, trailers: Option<Fields>) {
        let budget = &self.recording.budget;
        self.change(|state| {
            let spare = state.tail.capacity();
            state.tail.shrink_to_fit();
            budget.release(spare - state.tail.capacity());
            state.end = Some(End::Complete(trailers));
        });
    }

    /// Changes something and wakes whoever waits for it, outside of the lock.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let woken = {
            let mut state = self.recording.state();
            change(&mut state);
            std::mem::take(&mut state.waiting)
        };
        for (_, waker) in woken {
            waker.wake();
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.change(|state| {
            state.end.get_or_insert(End::Cut);
        });
    }
}

impl Recording {
    /// A reader from the first byte on; `None` where that is not kept (any more).
    pub fn read(self: &Arc<Self>) -> Option<Reader> {
        let mut state = self.state();
        if !state.whole {
            return None;
        }
        state.readers += 1;
        state.last_reader += 1;
        let number = state.last_reader;
        drop(state);
        Some(Reader { recording: Arc::clone(self), number, position: 0 })
    }

    pub fn is_whole(&self) -> bool {
        self.state().whole
    }

    /// Nobody is to begin reading any more; what no reader needs is forgotten now.
    pub fn forget(&self) {
        let mut state = self.state();
        state.whole = false;
        if state.readers == 0 {
            state.clear(&self.budget);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let Recording { state, budget, .. } = self;
        state.get_mut().unwrap_or_else(PoisonError::into_inner).clear(budget);
    }
}

impl Reader {
    /// The digest of the request that is being answered; `None`: that broke off before its end.
    pub fn poll_asked(&mut self, context: &mut Context<'_>) -> Poll<Option<[u8; 32]>> {
        self.poll(context, |state, _| {
            let known = state.asked.is_some() || state.end.is_some();
            known.then_some(state.asked)
        })
    }

    /// The answer's head; `None`: none came.
    pub fn poll_head(&mut self, context: &mut Context<'_>) -> Poll<Option<Arc<ResponseHead>>> {
        self.poll(context, |state, _| {
            let known = state.head.is_some() || state.end.is_some();
            known.then(|| state.head.clone())
        })
    }

    /// What comes next of the body.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Piece> {
        self.poll(context, State::piece)
    }

    fn poll<T>(&mut self, context: &mut Context<'_>, look: impl FnOnce(&State, &mut u64) -> Option<T>) -> Poll<T> {
        let mut state = self.recording.state();
        if let Some(found) = look(&state, &mut self.position) {
            return Poll::Ready(found);
        }
        let waker = context.waker();
        match state.waiting.iter_mut().find(|(number, _)| *number == self.number) {
            Some((_, known)) => known.clone_from(waker),
            None => state.waiting.push((self.number, waker.clone())),
        }
        Poll::Pending
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.recording.state();
        state.readers -= 1;
        state.waiting.retain(|(number, _)| *number != self.number);
        if !state.whole && state.readers == 0 {
            state.clear(&self.recording.budget);
        }
    }
}

impl State {
    fn kept(&self) -> usize {
        self.blocks.len() * BLOCK_BYTES + self.tail.capacity()
    }

    /// Where the answer stands.
    fn position(&self) -> u64 {
        self.start + (self.blocks.len() * BLOCK_BYTES + self.tail.len()) as u64
    }

    fn append(&mut self, mut bytes: &[u8], bytes_max: usize, budget: &Budget) {
        while !bytes.is_empty() {
            let room = self.tail.capacity() - self.tail.len();
            if room > 0 {
                let (now, later) = bytes.split_at(room.min(bytes.len()));
                self.tail.extend_from_slice(now);
                bytes = later;
            } else if self.tail.len() >= BLOCK_BYTES {
                self.blocks.push_back(Bytes::from(std::mem::take(&mut self.tail)));
            } else if !self.grow(bytes_max, budget) {
                self.clear(budget);
                self.start += bytes.len() as u64;
                return;
            }
        }
    }

    /// Gives the tail more room, where needed at the cost of the beginning.
    fn grow(&mut self, bytes_max: usize, budget: &Budget) -> bool {
        let old = self.tail.capacity();
        let new = (old * 2).clamp(FIRST_BYTES, BLOCK_BYTES);
        while !(self.whole || self.readers > 0) || self.kept() + (new - old) > bytes_max || !budget.reserve(new - old) {
            self.whole = false;
            if self.blocks.pop_front().is_none() {
                return false;
            }
            self.start += BLOCK_BYTES as u64;
            budget.release(BLOCK_BYTES);
        }
        self.tail.reserve_exact(new - self.tail.len());
        true
    }

    /// Keeps nothing of what has come.
    fn clear(&mut self, budget: &Budget) {
        budget.release(self.kept());
        self.start = self.position();
        self.blocks = VecDeque::new();
        self.tail = Vec::new();
    }

    fn piece(&self, position: &mut u64) -> Option<Piece> {
        let Some(offset) = position.checked_sub(self.start) else { return Some(Piece::Behind) };
        // What is kept fits into memory, and the position is never beyond it.
        let offset = offset as usize;
        let found = match self.blocks.get(offset / BLOCK_BYTES) {
            Some(block) => block.slice(offset % BLOCK_BYTES..),
            None => Bytes::copy_from_slice(&self.tail[offset - self.blocks.len() * BLOCK_BYTES..]),
        };
        if !found.is_empty() {
            *position += found.len() as u64;
            return Some(Piece::Bytes(found));
        }
        self.end.as_ref().map(|end| match end {
            End::Complete(trailers) => Piece::End(trailers.clone()),
            End::Cut => Piece::Cut,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::task::Wake;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn next(reader: &mut Reader) -> Poll<Piece> {
        reader.poll_next(&mut Context::from_waker(Waker::noop()))
    }

    fn all(reader: &mut Reader) -> (Vec<u8>, Option<Piece>) {
        let mut read = Vec::new();
        loop {
            match next(reader) {
                Poll::Ready(Piece::Bytes(bytes)) => read.extend_from_slice(&bytes),
                Poll::Ready(end) => return (read, Some(end)),
                Poll::Pending => return (read, None),
            }
        }
    }

    fn trailers() -> Fields {
        let mut fields = Fields::default();
        fields.append("x-sum", b"1");
        fields
    }

    #[test]
    fn early_and_late_readers_read_the_same() {
        let budget = Budget::new(1 << 20);
        let recorder = record(1 << 20, &budget);
        let recording = Arc::clone(recorder.recording());
        let mut early = recording.read().expect("whole");
        recorder.append(b"one ");
        assert_eq!(next(&mut early), Poll::Ready(Piece::Bytes(Bytes::from_static(b"one "))));
        assert_eq!(next(&mut early), Poll::Pending);
        recorder.append(b"two");
        recorder.end(Some(trailers()));
        let mut late = recording.read().expect("whole");
        assert_eq!(all(&mut early), (b"two".to_vec(), Some(Piece::End(Some(trailers())))));
        assert_eq!(all(&mut late), (b"one two".to_vec(), Some(Piece::End(Some(trailers())))));
        assert_eq!(budget.used(), 7, "what is kept for long takes no more than it is");
        drop((early, late, recording));
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_writer_that_vanishes_leaves_a_cut_answer_and_wakes_its_readers() {
        let budget = Budget::new(1 << 20);
        let recorder = record(1 << 20, &budget);
        let mut reader = recorder.recording().read().expect("whole");
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut context = Context::from_waker(&waker);
        assert_eq!(reader.poll_asked(&mut context), Poll::Pending);
        assert_eq!(reader.poll_next(&mut context), Poll::Pending);
        recorder.append(b"half");
        assert_eq!(woken.0.load(Ordering::Relaxed), 1, "one reader is woken once, however often it asked");
        drop(recorder);
        assert_eq!(all(&mut reader), (b"half".to_vec(), Some(Piece::Cut)));
        assert_eq!(reader.poll_asked(&mut context), Poll::Ready(None));
        assert!(matches!(reader.poll_head(&mut context), Poll::Ready(None)));
    }

    #[test]
    fn an_answer_that_outgrows_its_bound_is_for_those_who_keep_up() {
        let budget = Budget::new(1 << 20);
        let recorder = record(4 * BLOCK_BYTES, &budget);
        let recording = Arc::clone(recorder.recording());
        let (mut quick, mut slow) = (recording.read().expect("whole"), recording.read().expect("whole"));
        let mut read = 0;
        for _ in 0..100 {
            recorder.append(&[7; 1000]);
            read += all(&mut quick).0.len();
        }
        assert_eq!(read, 100_000);
        assert!(recording.read().is_none());
        assert_eq!(next(&mut slow), Poll::Ready(Piece::Behind));
        assert!(budget.used() <= 4 * BLOCK_BYTES);
        drop((quick, slow));
        assert_eq!(budget.used(), 0, "nobody can read it any more");
        recorder.append(&[7; 100_000]);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_spent_budget_ends_the_keeping_and_not_the_answer() {
        let budget = Budget::new(2 * BLOCK_BYTES);
        let first = record(1 << 20, &budget);
        first.append(&[1; BLOCK_BYTES]);
        let second = record(1 << 20, &budget);
        let mut reader = second.recording().read().expect("whole");
        for _ in 0..10 {
            second.append(&[2; BLOCK_BYTES / 2]);
            assert!(matches!(next(&mut reader), Poll::Ready(Piece::Bytes(_))), "it keeps up");
        }
        assert!(budget.is_tight() && !second.recording().is_whole() && first.recording().is_whole());
        drop((first, second, reader));
        assert_eq!(budget.used(), 0);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Append(usize),
        Read { reader: usize, pieces: usize },
        Begin,
        Leave(usize),
        Forget,
    }

    fn steps() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => prop_oneof![0..100_usize, 0..40_000_usize].prop_map(Step::Append),
            6 => (0..4_usize, 1..5_usize).prop_map(|(reader, pieces)| Step::Read { reader, pieces }),
            2 => Just(Step::Begin),
            1 => (0..4_usize).prop_map(Step::Leave),
            1 => proptest::bool::weighted(0.1).prop_map(|forget| if forget { Step::Forget } else { Step::Begin }),
        ]
    }

    proptest! {
        /// In every interleaving a reader reads a prefix of what was written, misses nothing, and is told when it does;
        /// nothing is kept beyond the bounds or after the last has gone.
        #[test]
        fn readers_see_what_was_written(
            steps in proptest::collection::vec(steps(), 1..60),
            bytes_max in 20_000..120_000_usize,
            budget_max in 20_000..200_000_usize,
            ends: bool,
        ) {
            let budget = Budget::new(budget_max);
            let recorder = record(bytes_max, &budget);
            let recording = Arc::clone(recorder.recording());
            let mut written: Vec<u8> = Vec::new();
            let mut forgotten = false;
            let mut readers: Vec<(Reader, usize)> = Vec::new();
            for step in steps {
                match step {
                    Step::Append(count) => {
                        let more: Vec<u8> = (0..count).map(|index| ((written.len() + index) % 251) as u8).collect();
                        recorder.append(&more);
                        written.extend_from_slice(&more);
                    }
                    Step::Begin if readers.len() < 4 => {
                        let reader = recording.read();
                        prop_assert_eq!(reader.is_some(), recording.is_whole());
                        readers.extend(reader.map(|reader| (reader, 0)));
                    }
                    Step::Begin => {}
                    Step::Read { reader, pieces } => {
                        if let Some((reader, read)) = readers.get_mut(reader) {
                            for _ in 0..pieces {
                                match next(reader) {
                                    Poll::Ready(Piece::Bytes(bytes)) => {
                                        prop_assert_eq!(&bytes[..], &written[*read..*read + bytes.len()]);
                                        *read += bytes.len();
                                    }
                                    Poll::Ready(Piece::Behind) => {
                                        prop_assert!(!recording.is_whole() && *read < written.len());
                                    }
                                    Poll::Ready(other) => prop_assert!(false, "{other:?} before the end"),
                                    Poll::Pending => prop_assert_eq!(*read, written.len()),
                                }
                            }
                        }
                    }
                    Step::Leave(which) => {
                        if which < readers.len() {
                            readers.remove(which);
                        }
                    }
                    Step::Forget => {
                        recording.forget();
                        forgotten = true;
                    }
                }
                // Whatever can be kept is; rounding up to a block decides at the edge.
                let small = written.len() + BLOCK_BYTES <= bytes_max.min(budget_max);
                prop_assert!(recording.is_whole() || forgotten || !small);
                prop_assert!(budget.used() <= bytes_max.min(budget_max));
                prop_assert!(recording.is_whole() || !readers.is_empty() || budget.used() == 0);
            }
            if ends {
                recorder.end(None);
            } else {
                drop(recorder);
            }
            for (reader, read) in &mut readers {
                let (rest, end) = all(reader);
                if end != Some(Piece::Behind) {
                    prop_assert_eq!(end, Some(if ends { Piece::End(None) } else { Piece::Cut }));
                    prop_assert_eq!(*read + rest.len(), written.len());
                }
            }
            drop((readers, recording));
            prop_assert_eq!(budget.used(), 0);
        }
    }
}
