//! Idempotency: which starts have been seen, so that a repeated one reads the first one's answer and starts no second
//! run.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::ids::RunId;
use crate::state::recording::{self, Budget, Reader, Recorder, Recording};

/// Starts that are remembered at once, those that run included: about 40 MiB without their answers.
pub const STARTS_MAX: usize = 65_536;

/// What is kept of one answer. A longer one is for those who are there while it comes.
pub const ANSWER_BYTES_MAX: usize = 1 << 20;

/// What all answers of a service may take together.
pub const ANSWERS_BYTES_MAX: usize = 64 << 20;

/// What makes a start the same as another: a digest of all of [`Identity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StartKey([u8; 32]);

/// What must agree for a start to be a repetition; the body is compared apart. Nobody reads another's answer.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    pub service: &'a str,
    pub scope: Option<&'a [u8; 16]>,
    /// Every value of the field, as it came.
    pub authorization: &'a [&'a [u8]],
    pub cookie: &'a [&'a [u8]],
    pub method: &'a str,
    /// With the query, as the client sent it.
    pub path: &'a str,
    pub key: &'a str,
}

impl StartKey {
    pub fn of(identity: Identity<'_>) -> StartKey {
        let Identity { service, scope, authorization, cookie, method, path, key } = identity;
        let mut digest = Sha256::new();
        // Each part says first how long it is, so that no two identities run together into the same bytes.
        let mut part = |bytes: &[u8]| {
            digest.update((bytes.len() as u64).to_le_bytes());
            digest.update(bytes);
        };
        part(service.as_bytes());
        part(scope.map(<[u8; 16]>::as_slice).unwrap_or_default());
        for values in [authorization, cookie] {
            part(&(values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| part(value));
        }
        part(method.as_bytes());
        part(path.as_bytes());
        part(key.as_bytes());
        StartKey(digest.finalize().into())
    }
}

/// What becomes of a start that carries a key.
pub enum Start {
    /// It is the first: it runs, and records its answer. [`Starts::ended`] is to be called at the end of its run.
    First(Recorder),
    /// The run is there, or was: its answer can be read, once the digest of the request was compared
    /// ([`Reader::poll_asked`]; another is a conflict, 422).
    Repeated { run: RunId, reader: Reader },
    /// The run is there, or was, but its answer was too large to be kept (409).
    NotKept(RunId),
    /// Nothing more can be remembered: so many runs with keys are outstanding. To start it would be to risk a second.
    Full,
}

/// How a run with a key has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// There was an answer to its end, or one that must not be had a second time. It is kept for `keep` from now on.
    Keep,
    /// No endpoint has seen it, or the answer broke off: a repeated start may try anew.
    Forget,
}

/// The starts of one service that are remembered.
pub struct Starts {
    keep: Duration,
    starts: HashMap<StartKey, Known>,
    /// Those whose run has ended, by when.
    ended: BTreeSet<(Instant, StartKey)>,
    /// Those of them whose answer was not let go yet.
    kept: BTreeSet<(Instant, StartKey)>,
    budget: Arc<Budget>,
}

struct Known {
    run: RunId,
    recording: Arc<Recording>,
    ended: Option<Instant>,
}

impl Starts {
    /// Remembers starts for `keep` after the end of their runs. Budgets may be shared between services.
    pub fn new(keep: Duration, budget: Arc<Budget>) -> Starts {
        Starts { keep, starts: HashMap::new(), ended: BTreeSet::new(), kept: BTreeSet::new(), budget }
    }

    /// How long starts are remembered from now on, those that are already included.
    pub fn set_keep(&mut self, keep: Duration) {
        self.keep = keep;
    }

    pub fn len(&self) -> usize {
        self.starts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// A start with a key comes; `run` is the id of its run if it is the first.
    pub fn start(&mut self, key: StartKey, run: RunId, now: Instant) -> Start {
        self.expire(now);
        if let Some(known) = self.starts.get(&key) {
            return match known.recording.read() {
                Some(reader) => Start::Repeated { run: known.run, reader },
                None => Start::NotKept(known.run),
            };
        }
        self.make_room();
        if self.starts.len() >= STARTS_MAX {
            return Start::Full;
        }
        let recorder = recording::record(ANSWER_BYTES_MAX, &self.budget);
        self.starts.insert(key, Known { run, recording: Arc::clone(recorder.recording()), ended: None });
        Start::First(recorder)
    }

    /// The run of the first start has ended, or did not come to be.
    pub fn ended(&mut self, key: StartKey, run: RunId, finish: Finish, now: Instant) {
        let Some(known) = self.starts.get_mut(&key).filter(|known| known.run == run && known.ended.is_none()) else {
            return;
        };
        match finish {
            Finish::Keep => {
                known.ended = Some(now);
                self.ended.insert((now, key));
                self.kept.insert((now, key));
            }
            Finish::Forget => {
                self.starts.remove(&key);
            }
        }
    }

    /// Forgets what was kept long enough. Whoever reads an answer reads on.
    pub fn expire(&mut self, now: Instant) {
        while let Some((ended, _)) = self.ended.first()
            && now.saturating_duration_since(*ended) >= self.keep
        {
            self.forget_oldest();
        }
    }

    /// Lets the oldest answers go where memory is short: their runs are remembered, so that none is started again. Only
    /// where the table itself is full is the oldest run forgotten.
    fn make_room(&mut self) {
        while self.budget.is_tight()
            && let Some((_, key)) = self.kept.pop_first()
        {
            if let Some(known) = self.starts.get(&key) {
                known.recording.forget();
            }
        }
        if self.starts.len() >= STARTS_MAX {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some(oldest) = self.ended.pop_first() {
            self.kept.remove(&oldest);
            self.starts.remove(&oldest.1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use proptest::prelude::*;

    use super::*;
    use crate::state::recording::Piece;

    const KEEP: Duration = Duration::from_secs(600);

    fn identity<'a>() -> Identity<'a> {
        Identity {
            service: "support",
            scope: None,
            authorization: &[b"Bearer a"],
            cookie: &[],
            method: "POST",
            path: "/run?x=1",
            key: "k",
        }
    }

    fn key(name: u64) -> StartKey {
        StartKey::of(Identity { key: &name.to_string(), ..identity() })
    }

    fn read(reader: &mut Reader) -> Vec<u8> {
        let mut read = Vec::new();
        while let Poll::Ready(Piece::Bytes(bytes)) = reader.poll_next(&mut Context::from_waker(Waker::noop())) {
            read.extend_from_slice(&bytes);
        }
        read
    }

    #[test]
    fn everything_that_tells_callers_apart_is_in_the_key() {
        let same = StartKey::of(identity());
        assert_eq!(same, StartKey::of(identity()));
        let others = [
            Identity { service: "other", ..identity() },
            Identity { scope: Some(&[0; 16]), ..identity() },
            Identity { authorization: &[b"Bearer b"], ..identity() },
            Identity { authorization: &[], cookie: &[b"Bearer a"], ..identity() },
            Identity { authorization: &[b"Bearer", b" a"], ..identity() },
            Identity { cookie: &[b""], ..identity() },
            Identity { method: "PUT", ..identity() },
            Identity { path: "/run?x=1k", key: "", ..identity() },
            Identity { key: "K", ..identity() },
        ];
        let keys: std::collections::HashSet<StartKey> = others.into_iter().map(StartKey::of).collect();
        assert_eq!(keys.len(), 9);
        assert!(!keys.contains(&same));
    }

    #[test]
    fn a_repeated_start_reads_what_the_first_one_gets_live_and_afterwards() {
        let now = crate::ids::now();
        let mut starts = Starts::new(KEEP, Budget::new(ANSWERS_BYTES_MAX));
        let [run, other] = [(); 2].map(|()| RunId::generate());
        let Start::First(recorder) = starts.start(key(0), run, now) else { panic!("it is the first") };
        recorder.append(b"one ");
        let Start::Repeated { run: known, mut reader } = starts.start(key(0), other, now) else { panic!("it repeats") };
        assert_eq!(known, run);
        assert_eq!(reader.poll_asked(&mut Context::from_waker(Waker::noop())), Poll::Pending);
        recorder.asked([5; 32]);
        assert_eq!(reader.poll_asked(&mut Context::from_waker(Waker::noop())), Poll::Ready(Some([5; 32])));
        assert_eq!(read(&mut reader), b"one ");
        recorder.append(b"two");
        recorder.end(None);
        starts.ended(key(0), run, Finish::Keep, now);
        assert_eq!(read(&mut reader), b"two");
        let almost = now + KEEP - Duration::from_millis(1);
        let Start::Repeated { mut reader, .. } = starts.start(key(0), other, almost) else { panic!("it is kept") };
        assert!(matches!(starts.start(key(0), other, now + KEEP), Start::First(_)), "it was kept long enough");
        assert_eq!(read(&mut reader), b"one two", "who reads already reads on");
    }

    #[test]
    fn what_is_too_large_is_known_and_not_kept() {
        let now = crate::ids::now();
        let mut starts = Starts::new(KEEP, Budget::new(ANSWERS_BYTES_MAX));
        let run = RunId::generate();
        let Start::First(recorder) = starts.start(key(0), run, now) else { panic!("it is the first") };
        recorder.append(&vec![0; ANSWER_BYTES_MAX + 1]);
        assert!(matches!(starts.start(key(0), RunId::generate(), now), Start::NotKept(known) if known == run));
        recorder.end(None);
        starts.ended(key(0), run, Finish::Keep, now);
        assert!(matches!(starts.start(key(0), RunId::generate(), now), Start::NotKept(known) if known == run));
    }

    #[test]
    fn what_no_endpoint_saw_may_be_tried_again() {
        let now = crate::ids::now();
        let mut starts = Starts::new(KEEP, Budget::new(ANSWERS_BYTES_MAX));
        let run = RunId::generate();
        assert!(matches!(starts.start(key(0), run, now), Start::First(_)));
        starts.ended(key(0), run, Finish::Forget, now);
        let second = RunId::generate();
        assert!(matches!(starts.start(key(0), second, now), Start::First(_)));
        starts.ended(key(0), run, Finish::Forget, now);
        assert_eq!(starts.len(), 1, "an end that is told late is not the second's");
    }

    #[test]
    fn short_memory_costs_old_answers_and_never_a_second_run() {
        let now = crate::ids::now();
        let budget = Budget::new(4 << 20);
        let mut starts = Starts::new(KEEP, Arc::clone(&budget));
        for name in 0..20 {
            let run = RunId::generate();
            let Start::First(recorder) = starts.start(key(name), run, now) else { panic!("it is the first") };
            recorder.append(&vec![0; ANSWER_BYTES_MAX / 2]);
            recorder.end(None);
            starts.ended(key(name), run, Finish::Keep, now + Duration::from_millis(name));
            assert!(budget.used() <= 4 << 20);
        }
        let mut kept = |name| matches!(starts.start(key(name), RunId::generate(), now), Start::Repeated { .. });
        assert!(kept(19) && kept(16) && !kept(0) && !kept(10));
        assert_eq!(starts.len(), 20);
    }

    #[test]
    fn the_table_is_bounded() {
        let now = crate::ids::now();
        let mut starts = Starts::new(KEEP, Budget::new(ANSWERS_BYTES_MAX));
        let first = RunId::generate();
        for name in 0..STARTS_MAX as u64 {
            let run = if name == 0 { first } else { RunId::generate() };
            assert!(matches!(starts.start(key(name), run, now), Start::First(_)));
        }
        assert!(matches!(starts.start(key(u64::MAX), first, now), Start::Full), "all of them run");
        starts.ended(key(0), first, Finish::Keep, now);
        assert!(matches!(starts.start(key(u64::MAX), first, now), Start::First(_)));
        assert_eq!(starts.len(), STARTS_MAX);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Start(u64),
        Append(usize, usize),
        End(usize, bool),
        Pass(u64),
    }

    fn steps() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..5_u64).prop_map(Step::Start),
            3 => (0..5_usize, 0..3_000_usize).prop_map(|(which, count)| Step::Append(which, count)),
            2 => (0..5_usize, any::<bool>()).prop_map(|(which, keep)| Step::End(which, keep)),
            1 => (1..400_u64).prop_map(Step::Pass),
        ]
    }

    /// A run as the model has it.
    struct Running {
        name: u64,
        run: RunId,
        recorder: Option<Recorder>,
        written: usize,
        ended: Option<u64>,
    }

    proptest! {
        /// For every key there is one run at a time, and everybody who repeats it reads that one's whole answer.
        #[test]
        fn one_key_is_one_run(steps in proptest::collection::vec(steps(), 1..80)) {
            let begin = crate::ids::now();
            let at = |time: u64| begin + Duration::from_secs(time);
            let mut now = 0;
            let budget = Budget::new(ANSWERS_BYTES_MAX);
            let mut starts = Starts::new(KEEP, Arc::clone(&budget));
            let mut model: Vec<Running> = Vec::new();
            for step in steps {
                model.retain(|known| known.ended.is_none_or(|ended| now - ended < KEEP.as_secs()));
                match step {
                    Step::Start(name) => {
                        let run = RunId::generate();
                        let known = model.iter().find(|known| known.name == name);
                        match (starts.start(key(name), run, at(now)), known) {
                            (Start::First(recorder), None) => {
                                model.push(Running { name, run, recorder: Some(recorder), written: 0, ended: None });
                            }
                            (Start::Repeated { run, mut reader }, Some(known)) => {
                                prop_assert_eq!(run, known.run);
                                prop_assert_eq!(read(&mut reader).len(), known.written);
                            }
                            (_, known) => prop_assert!(false, "known: {}", known.is_some()),
                        }
                    }
                    Step::Append(which, count) => {
                        if let Some(known) = model.get_mut(which) && let Some(recorder) = &known.recorder {
                            recorder.append(&vec![0; count]);
                            known.written += count;
                        }
                    }
                    Step::End(which, keep) => {
                        if let Some(known) = model.get_mut(which) && let Some(recorder) = known.recorder.take() {
                            if keep {
                                recorder.end(None);
                                starts.ended(key(known.name), known.run, Finish::Keep, at(now));
                                known.ended = Some(now);
                            } else {
                                drop(recorder);
                                starts.ended(key(known.name), known.run, Finish::Forget, at(now));
                                model.remove(which);
                            }
                        }
                    }
                    Step::Pass(time) => now += time,
                }
            }
            now += KEEP.as_secs();
            starts.expire(at(now));
            let running = model.iter().filter(|known| known.ended.is_none()).count();
            prop_assert_eq!(starts.len(), running);
            prop_assert!(starts.ended.is_empty() && starts.kept.is_empty());
            drop((starts, model));
            prop_assert_eq!(budget.used(), 0);
        }
    }
}
