//! Sessions: which version and endpoint a conversation is pinned to.
//!
//! Built for a million pins below 100 MiB: records of 40 bytes in chunks that never move, a hash table of their
//! numbers, and everything that only a busy session needs kept apart.

use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use foldhash::quality::RandomState;
use hashbrown::HashTable;
use serde::{Deserialize, Serialize};

/// The key of a session: what the client calls its conversation, within its principal's scope.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SessionKey {
    /// A keyed digest of the `session.scope` value, where scope is configured (the value itself is never kept).
    pub scope: Option<[u8; 16]>,
    pub text: Box<str>,
}

impl SessionKey {
    /// The compact form, by which it can be told from every other.
    pub fn to_bytes(&self) -> Box<[u8]> {
        Parts::of(self).write()
    }

    /// Reads [`SessionKey::to_bytes`]. `None`: it is something else.
    pub fn from_bytes(bytes: &[u8]) -> Option<SessionKey> {
        let (scope, text) = match bytes.split_first()? {
            (0, text) => (None, text),
            (1, rest) => rest.split_first_chunk().map(|(scope, text)| (Some(*scope), text))?,
            _ => return None,
        };
        Some(SessionKey { scope, text: str::from_utf8(text).ok()?.into() })
    }
}

/// No record.
const NONE: u32 = u32::MAX;

/// Aliases that one session may have.
const ALIASES_MAX: usize = 8;

/// Tables, so that growing one never holds the dispatcher for long.
const SHARDS: usize = 64;

/// Records of one chunk.
const CHUNK: usize = 4096;

/// An exchange of the session was answered with 2xx or 3xx: the pin is kept.
const CONFIRMED: u32 = 1;
/// That was on the endpoint where the session is now.
const SETTLED: u32 = 2;
/// A `versions[].match` chose the version: not part of any share.
const MATCHED: u32 = 4;
/// Only another name of a session.
const ALIAS: u32 = 8;
/// It began before its pin: it was moved, or a cookie told where it lives. So its age is not known, and it is not judged.
const CARRIED: u32 = 16;
/// At its next start it is placed anew, by the weights.
const EVICTED: u32 = 32;
const FLAG_BITS: u32 = 6;

/// Seconds that fit beside the flags: two years. Sessions that begin later count as born then.
const BORN_MAX: u32 = u32::MAX >> FLAG_BITS;

/// The clock of the table: steps of 10 ms, which wrap after 497 days.
pub(crate) type Ticks = u32;

pub(crate) const TICK: Duration = Duration::from_millis(10);

/// All sessions of one service.
pub(crate) struct Sessions {
    hasher: RandomState,
    shards: Vec<HashTable<u32>>,
    chunks: Vec<Vec<Record>>,
    /// Head of the chain of unused records, linked by `next`.
    free: u32,
    /// Longest idle; busy sessions are not in this list, and neither are unconfirmed ones, since those live only as long
    /// as their exchanges. So whatever is here may be evicted, in this order.
    oldest: u32,
    newest: u32,
    extras: Vec<Extra>,
    free_extras: Vec<u32>,
    sessions: usize,
    aliases: usize,
}

/// One key: a session, or an alias of one.
struct Record {
    /// A byte that says whether there is a scope, the scope, the text.
    key: Box<[u8]>,
    /// Towards the older in the list of idle sessions.
    previous: u32,
    next: u32,
    /// When the session's last exchange ended.
    used: Ticks,
    /// The endpoint; for an alias its session.
    link: u32,
    extra: u32,
    /// Seconds since the service's start, above the flags.
    born_and_flags: u32,
}

/// What only a session needs that is busy, has aliases or a credit.
#[derive(Default)]
struct Extra {
    open: u32,
    first_run: Option<u32>,
    /// Serial of its placement credit, 0 for none.
    credit: u64,
    aliases: Vec<u32>,
}

/// What is told of a session.
pub(crate) struct View<'a> {
    pub id: u32,
    pub key: &'a str,
    pub endpoint: u32,
    pub confirmed: bool,
    pub matched: bool,
    pub busy: bool,
    pub used: Ticks,
    pub born_seconds: u32,
}

impl Sessions {
    pub fn new() -> Sessions {
        Sessions {
            hasher: RandomState::default(),
            shards: (0..SHARDS).map(|_| HashTable::new()).collect(),
            chunks: Vec::new(),
            free: NONE,
            oldest: NONE,
            newest: NONE,
            extras: Vec::new(),
            free_extras: Vec::new(),
            sessions: 0,
            aliases: 0,
        }
    }

    /// Sessions, aliases not counted.
    pub fn len(&self) -> usize {
        self.sessions
    }

    /// The session of this key or alias.
    pub fn find(&self, key: &SessionKey) -> Option<u32> {
        let parts = Parts::of(key);
        let hash = self.hash(parts);
        let id = *self.shards[shard(hash)].find(hash, |id| Parts::read(&self.record(*id).key) == parts)?;
        let record = self.record(id);
        Some(if record.flag(ALIAS) { record.link } else { id })
    }

    /// Adds a session that is not there yet. It is idle and in no list: the caller opens an exchange of it at once.
    pub fn insert(&mut self, key: &SessionKey, endpoint: u32, matched: bool, born_seconds: u32) -> u32 {
        let flags = if matched { MATCHED } else { 0 };
        self.sessions += 1;
        self.add(key, endpoint, born_seconds.min(BORN_MAX) << FLAG_BITS | flags)
    }

    /// Makes `key` another name of `session`, unless it is known or the table has enough. Of a session with many names
    /// the oldest is forgotten.
    pub fn add_alias(&mut self, session: u32, key: &SessionKey, aliases_max: usize) {
        if self.aliases >= aliases_max || self.find(key).is_some() {
            return;
        }
        if self.extra(session).is_some_and(|extra| extra.aliases.len() >= ALIASES_MAX) {
            // A chain of answers names its session anew each time: the newest names are the ones that come back.
            let oldest = self.extra_mut(session).aliases.remove(0);
            self.aliases -= 1;
            self.erase(oldest);
        }
        let alias = self.add(key, session, ALIAS);
        self.aliases += 1;
        self.extra_mut(session).aliases.push(alias);
    }

    /// Forgets an idle session and its aliases. Its runs and its credit must have been taken back before.
    pub fn remove(&mut self, session: u32) {
        self.unlink(session);
        let extra = self.record(session).extra;
        if extra != NONE {
            let Extra { open, first_run, credit, aliases } = std::mem::take(&mut self.extras[extra as usize]);
            debug_assert!(open == 0 && first_run.is_none() && credit == 0, "a busy session is never removed");
            self.free_extras.push(extra);
            self.aliases -= aliases.len();
            for alias in aliases {
                self.erase(alias);
            }
        }
        self.sessions -= 1;
        self.erase(session);
    }

    /// One exchange of it begins.
    pub fn open(&mut self, session: u32) {
        self.unlink(session);
        self.extra_mut(session).open += 1;
    }

    /// One exchange of it has ended. True when the session is idle now.
    pub fn close(&mut self, session: u32) -> bool {
        let extra = self.extra_mut(session);
        extra.open -= 1;
        !self.busy(session)
    }

    /// Puts an idle session at the young end of the list.
    pub fn rest(&mut self, session: u32, now: Ticks) {
        self.trim(session);
        let newest = self.newest;
        let record = self.record_mut(session);
        record.used = now;
        record.previous = newest;
        record.next = NONE;
        match newest {
            NONE => self.oldest = session,
            newest => self.record_mut(newest).next = session,
        }
        self.newest = session;
    }

    /// The idle session that was used longest ago.
    pub fn oldest(&self) -> Option<u32> {
        (self.oldest != NONE).then_some(self.oldest)
    }

    /// It has open exchanges or outstanding runs: neither evicted nor expired.
    pub fn busy(&self, session: u32) -> bool {
        self.extra(session).is_some_and(|extra| extra.open > 0 || extra.first_run.is_some())
    }

    /// How long it has been idle; 0 while it is busy.
    pub fn idle(&self, session: u32, now: Ticks) -> Duration {
        if self.busy(session) { Duration::ZERO } else { TICK * now.wrapping_sub(self.record(session).used) }
    }

    pub fn endpoint(&self, session: u32) -> u32 {
        self.record(session).link
    }

    pub fn set_endpoint(&mut self, session: u32, endpoint: u32) {
        let record = self.record_mut(session);
        record.link = endpoint;
        record.set_flag(SETTLED, false);
    }

    pub fn confirm(&mut self, session: u32, settled: bool) {
        let record = self.record_mut(session);
        record.set_flag(CONFIRMED, true);
        if settled {
            record.set_flag(SETTLED, true);
        }
    }

    /// Takes back that it is confirmed: its endpoint does not know it any more.
    pub fn doubt(&mut self, session: u32) {
        let record = self.record_mut(session);
        record.set_flag(CONFIRMED, false);
        record.set_flag(SETTLED, false);
    }

    /// Notes that it is older than its pin.
    pub fn carry(&mut self, session: u32) {
        self.record_mut(session).set_flag(CARRIED, true);
    }

    /// When it began, in seconds since the service's start; `None`: before its pin.
    pub fn born_seconds(&self, session: u32) -> Option<u32> {
        let record = self.record(session);
        (!record.flag(CARRIED)).then_some(record.born_and_flags >> FLAG_BITS)
    }

    pub fn matched(&self, session: u32) -> bool {
        self.record(session).flag(MATCHED)
    }

    /// Whether it is to be placed anew at its next start.
    pub fn evict(&mut self, session: u32, evicted: bool) {
        self.record_mut(session).set_flag(EVICTED, evicted);
    }

    pub fn evicted(&self, session: u32) -> bool {
        self.record(session).flag(EVICTED)
    }

    pub fn confirmed(&self, session: u32) -> bool {
        self.record(session).flag(CONFIRMED)
    }

    pub fn settled(&self, session: u32) -> bool {
        self.record(session).flag(SETTLED)
    }

    pub fn key(&self, session: u32) -> &str {
        Parts::read(&self.record(session).key).text()
    }

    /// Its key, with its scope.
    pub fn session_key(&self, session: u32) -> SessionKey {
        let parts = Parts::read(&self.record(session).key);
        SessionKey { scope: parts.scope.try_into().ok(), text: parts.text().into() }
    }

    /// Whether this is its key or one of its aliases, in any scope.
    pub fn answers_to(&self, session: u32, text: &str) -> bool {
        let aliases = self.extra(session).map(|extra| extra.aliases.as_slice()).unwrap_or_default();
        self.key(session) == text || aliases.iter().any(|alias| self.key(*alias) == text)
    }

    /// Its other names.
    pub fn aliases(&self, session: u32) -> Vec<SessionKey> {
        let aliases = self.extra(session).map(|extra| extra.aliases.as_slice()).unwrap_or_default();
        aliases.iter().map(|alias| self.session_key(*alias)).collect()
    }

    /// Takes an idle session out of the list of those, because a run of it goes on that nothing carries.
    pub fn hold(&mut self, session: u32) {
        self.unlink(session);
    }

    pub fn first_run(&self, session: u32) -> Option<u32> {
        self.extra(session)?.first_run
    }

    pub fn set_first_run(&mut self, session: u32, run: Option<u32>) {
        self.extra_mut(session).first_run = run;
    }

    /// The serial of its placement credit, 0 for none.
    pub fn credit(&self, session: u32) -> u64 {
        self.extra(session).map_or(0, |extra| extra.credit)
    }

    pub fn set_credit(&mut self, session: u32, serial: u64) {
        self.extra_mut(session).credit = serial;
        if serial == 0 {
            self.trim(session);
        }
    }

    /// How many records there are, used or not: the bound for [`Sessions::view`].
    pub fn slots(&self) -> u32 {
        self.chunks.iter().map(Vec::len).sum::<usize>() as u32
    }

    /// What is in a slot, if a session is.
    pub fn view(&self, slot: u32) -> Option<View<'_>> {
        let record = self.record(slot);
        if record.key.is_empty() || record.flag(ALIAS) {
            return None;
        }
        Some(View {
            id: slot,
            key: Parts::read(&record.key).text(),
            endpoint: record.link,
            confirmed: record.flag(CONFIRMED),
            matched: record.flag(MATCHED),
            busy: self.busy(slot),
            used: record.used,
            born_seconds: record.born_and_flags >> FLAG_BITS,
        })
    }

    fn add(&mut self, key: &SessionKey, link: u32, born_and_flags: u32) -> u32 {
        let record = Record {
            key: Parts::of(key).write(),
            previous: NONE,
            next: NONE,
            used: 0,
            link,
            extra: NONE,
            born_and_flags,
        };
        let id = match self.free {
            NONE => {
                if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK) {
                    self.chunks.push(Vec::with_capacity(CHUNK));
                }
                let full = (self.chunks.len() - 1) * CHUNK;
                let chunk = self.chunks.last_mut().expect("one was pushed just now");
                chunk.push(record);
                (full + chunk.len() - 1) as u32
            }
            id => {
                self.free = self.record(id).next;
                *self.record_mut(id) = record;
                id
            }
        };
        let hash = self.hash(Parts::of(key));
        let Sessions { shards, chunks, hasher, .. } = self;
        shards[shard(hash)].insert_unique(hash, id, |id| Parts::read(&at(chunks, *id).key).hash(hasher));
        id
    }

    fn erase(&mut self, id: u32) {
        let hash = self.hash(Parts::read(&self.record(id).key));
        if let Ok(entry) = self.shards[shard(hash)].find_entry(hash, |other| *other == id) {
            entry.remove();
        }
        let free = self.free;
        let record = self.record_mut(id);
        record.key = Box::default();
        record.extra = NONE;
        record.previous = NONE;
        record.next = free;
        self.free = id;
    }

    /// Takes a session out of the list of idle ones, if it is there.
    fn unlink(&mut self, session: u32) {
        let Record { previous, next, .. } = *self.record(session);
        match previous {
            NONE if self.oldest == session => self.oldest = next,
            NONE => {}
            previous => self.record_mut(previous).next = next,
        }
        match next {
            NONE if self.newest == session => self.newest = previous,
            NONE => {}
            next => self.record_mut(next).previous = previous,
        }
        let record = self.record_mut(session);
        record.previous = NONE;
        record.next = NONE;
    }

    /// Gives back the extra of a session that no longer needs it.
    fn trim(&mut self, session: u32) {
        let id = self.record(session).extra;
        let Some(extra) = self.extra(session) else { return };
        if extra.open == 0 && extra.first_run.is_none() && extra.credit == 0 && extra.aliases.is_empty() {
            self.free_extras.push(id);
            self.record_mut(session).extra = NONE;
        }
    }

    fn extra(&self, session: u32) -> Option<&Extra> {
        match self.record(session).extra {
            NONE => None,
            id => Some(&self.extras[id as usize]),
        }
    }

    fn extra_mut(&mut self, session: u32) -> &mut Extra {
        let mut id = self.record(session).extra;
        if id == NONE {
            id = self.free_extras.pop().unwrap_or_else(|| {
                self.extras.push(Extra::default());
                (self.extras.len() - 1) as u32
            });
            self.record_mut(session).extra = id;
        }
        &mut self.extras[id as usize]
    }

    fn record(&self, id: u32) -> &Record {
        at(&self.chunks, id)
    }

    fn record_mut(&mut self, id: u32) -> &mut Record {
        &mut self.chunks[id as usize / CHUNK][id as usize % CHUNK]
    }

    fn hash(&self, parts: Parts<'_>) -> u64 {
        parts.hash(&self.hasher)
    }
}

fn at(chunks: &[Vec<Record>], id: u32) -> &Record {
    &chunks[id as usize / CHUNK][id as usize % CHUNK]
}

/// The table takes its place from the low bits and its tag from the topmost, so shards use what lies between.
fn shard(hash: u64) -> usize {
    (hash >> 40) as usize % SHARDS
}

impl Record {
    fn flag(&self, flag: u32) -> bool {
        self.born_and_flags & flag != 0
    }

    fn set_flag(&mut self, flag: u32, on: bool) {
        if on {
            self.born_and_flags |= flag;
        } else {
            self.born_and_flags &= !flag;
        }
    }
}

/// A key as it is compared and hashed, whether it comes from a request or from a record.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Parts<'a> {
    /// Empty or 16 bytes.
    scope: &'a [u8],
    text: &'a [u8],
}

impl<'a> Parts<'a> {
    fn of(key: &'a SessionKey) -> Parts<'a> {
        Parts { scope: key.scope.as_ref().map(<[u8; 16]>::as_slice).unwrap_or_default(), text: key.text.as_bytes() }
    }

    fn read(bytes: &'a [u8]) -> Parts<'a> {
        match bytes.split_first() {
            Some((0, text)) => Parts { scope: &[], text },
            Some((_, rest)) if rest.len() >= 16 => Parts { scope: &rest[..16], text: &rest[16..] },
            _ => Parts { scope: &[], text: &[] },
        }
    }

    fn write(self) -> Box<[u8]> {
        let mut bytes = Vec::with_capacity(1 + self.scope.len() + self.text.len());
        bytes.push(u8::from(!self.scope.is_empty()));
        bytes.extend_from_slice(self.scope);
        bytes.extend_from_slice(self.text);
        bytes.into_boxed_slice()
    }

    fn hash(self, hasher: &RandomState) -> u64 {
        let mut hasher = hasher.build_hasher();
        hasher.write(self.scope);
        hasher.write(self.text);
        hasher.finish()
    }

    fn text(self) -> &'a str {
        str::from_utf8(self.text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> SessionKey {
        SessionKey { scope: None, text: text.into() }
    }

    fn idle(sessions: &mut Sessions, text: &str, now: Ticks) -> u32 {
        let id = sessions.insert(&key(text), 0, false, 0);
        sessions.open(id);
        assert!(sessions.close(id));
        sessions.rest(id, now);
        id
    }

    #[test]
    fn a_million_pins_take_less_than_100_mib() {
        assert_eq!(size_of::<Record>(), 40);
        // Buckets are a power of two, at most 7/8 full; a record's number and a tag byte each.
        let buckets = (1_000_000_usize * 8 / 7).next_power_of_two();
        // An allocator rounds 37 bytes of key up to 48.
        let total = 1_000_000 * (size_of::<Record>() + 48) + buckets * 5;
        assert!(total < 100 << 20, "{total} bytes");
    }

    #[test]
    fn scopes_are_different_sessions() {
        let mut sessions = Sessions::new();
        let scoped = |scope| SessionKey { scope: Some([scope; 16]), text: "a".into() };
        let first = sessions.insert(&scoped(1), 0, false, 0);
        let plain = sessions.insert(&key("a"), 0, false, 0);
        assert_ne!(first, plain);
        assert_eq!(sessions.find(&scoped(1)), Some(first));
        assert_eq!(sessions.find(&scoped(2)), None);
        assert_eq!(sessions.find(&key("a")), Some(plain));
        assert_eq!(sessions.key(first), "a");
    }

    #[test]
    fn the_idle_list_is_in_order_of_last_use_and_busy_sessions_are_not_in_it() {
        let mut sessions = Sessions::new();
        let ids: Vec<u32> = (0..4).map(|n| idle(&mut sessions, &n.to_string(), n)).collect();
        sessions.open(ids[0]);
        sessions.open(ids[2]);
        assert_eq!(sessions.oldest(), Some(ids[1]));
        assert!(sessions.close(ids[0]));
        sessions.rest(ids[0], 10);
        let mut order = Vec::new();
        while let Some(oldest) = sessions.oldest() {
            order.push(oldest);
            sessions.remove(oldest);
        }
        assert_eq!(order, [ids[1], ids[3], ids[0]]);
        assert_eq!(sessions.len(), 1);
        assert!(sessions.busy(ids[2]));
    }

    #[test]
    fn aliases_are_bounded_and_go_with_their_session() {
        let mut sessions = Sessions::new();
        let id = idle(&mut sessions, "a", 0);
        let other = idle(&mut sessions, "b", 0);
        for n in 0..20 {
            sessions.add_alias(id, &key(&format!("alias-{n}")), 100);
        }
        sessions.add_alias(id, &key("b"), 100);
        assert_eq!(sessions.find(&key("alias-12")), Some(id));
        assert_eq!(sessions.find(&key("alias-11")), None, "eight are enough");
        assert_eq!(sessions.find(&key("b")), Some(other), "a known key stays what it is");
        assert!(sessions.answers_to(id, "alias-13"));
        sessions.remove(id);
        assert_eq!(sessions.find(&key("alias-12")), None);
        assert_eq!((sessions.len(), sessions.aliases), (1, 0));
        sessions.add_alias(other, &key("alias-0"), 0);
        assert_eq!(sessions.find(&key("alias-0")), None, "the table's own bound");
    }

    #[test]
    fn slots_are_used_again() {
        let mut sessions = Sessions::new();
        for round in 0..3 {
            let ids: Vec<u32> = (0..5_000).map(|n| idle(&mut sessions, &format!("{round}-{n}"), 0)).collect();
            assert_eq!(sessions.find(&key(&format!("{round}-4999"))), Some(ids[4999]));
            for id in ids {
                sessions.remove(id);
            }
        }
        assert_eq!(sessions.len(), 0);
        assert_eq!(sessions.slots(), 5_000);
        assert_eq!(sessions.extras.len(), sessions.free_extras.len());
    }
}
