//! Image: a picture of what a service must not lose: pins, outstanding runs, its rollout and operators' drains. It owns
//! all it names, and names endpoints by identity, so that another process can take it: after a restart, or beside this one.

use serde::{Deserialize, Serialize};

use crate::rollout::{Moment, Rollout};
use crate::state::sessions::SessionKey;

/// One service. Serialised as JSON; a [`Pin`] also has a compact form, since there may be a million.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServiceImage {
    pub name: String,
    /// Where pins and runs are; they refer to it by index.
    pub places: Vec<Place>,
    pub pins: Vec<Pin>,
    pub runs: Vec<RunImage>,
    /// Drained by an operator.
    pub drains: Vec<DrainImage>,
    /// `None`: the configuration has none.
    pub rollout: Option<Rollout>,
}

/// An endpoint, as it is known across processes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    pub version: String,
    /// [`crate::config::EndpointUrl::identity`].
    pub endpoint: String,
}

/// A session and where it is pinned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    pub key: SessionKey,
    pub aliases: Vec<SessionKey>,
    /// Index into [`ServiceImage::places`].
    pub place: u32,
    /// An exchange of it was answered with success.
    pub confirmed: bool,
    /// That was at this place.
    pub settled: bool,
    /// A `versions[].match` chose its version.
    pub matched: bool,
    /// At its next start it is placed anew.
    pub evicted: bool,
    /// `None`: before its pin.
    pub born: Option<Moment>,
    /// When its last exchange ended; the time of the picture while one is open.
    pub used: Moment,
}

/// A run that is outstanding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunImage {
    /// [`crate::ids::RunId`] as text.
    pub id: String,
    /// Index into [`ServiceImage::places`].
    pub place: u32,
    pub session: Option<SessionKey>,
    /// As `agent_protocol` names it; `None`: plain HTTP.
    pub protocol: Option<String>,
    /// What of its start the protocol's calls need.
    pub base: String,
    /// The protocol's own id of it.
    pub key: Option<String>,
    /// It outlives its exchange.
    pub goes_on: bool,
    pub started: Moment,
    /// When it has to be over.
    pub deadline: Option<Moment>,
    pub first_event: Option<Moment>,
    pub attempts: u32,
    /// Exchanges that carry it, in the process that took the picture.
    pub carriers: u32,
    pub matched: bool,
    pub unjudged: bool,
    /// The digest of the `session.scope` value whose run it is.
    pub principal: Option<[u8; 16]>,
}

/// An endpoint that an operator drains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainImage {
    /// [`crate::config::EndpointUrl::identity`].
    pub endpoint: String,
    /// When what is left there is cut; `None`: that is over.
    pub deadline: Option<Moment>,
}

/// Which outstanding runs a picture has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunsTaken {
    All,
    /// Those that outlive this process: nothing carries them, or they go on without what does.
    Lasting,
}

const CONFIRMED: u8 = 1;
const SETTLED: u8 = 2;
const MATCHED: u8 = 4;
const EVICTED: u8 = 8;
const BORN: u8 = 16;

impl Pin {
    /// Appends everything but the key in the compact form: flags, place, times, then the aliases, each after its length.
    /// The place is by the number that whoever keeps it has for it.
    pub fn write_value_at(&self, place: u32, into: &mut Vec<u8>) {
        let flags = [
            (self.confirmed, CONFIRMED),
            (self.settled, SETTLED),
            (self.matched, MATCHED),
            (self.evicted, EVICTED),
            (self.born.is_some(), BORN),
        ];
        into.push(flags.into_iter().filter(|(on, _)| *on).fold(0, |sum, (_, flag)| sum | flag));
        into.extend_from_slice(&place.to_le_bytes());
        into.extend_from_slice(&self.used.0.to_le_bytes());
        into.extend_from_slice(&self.born.unwrap_or_default().0.to_le_bytes());
        for alias in &self.aliases {
            let bytes = alias.to_bytes();
            into.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            into.extend_from_slice(&bytes);
        }
    }

    /// Reads what [`SessionKey::to_bytes`] and [`Pin::write_value_at`] wrote. `None`: it is something else.
    pub fn read(key: &[u8], value: &[u8]) -> Option<Pin> {
        let key = SessionKey::from_bytes(key)?;
        let (&[flags], rest) = value.split_first_chunk()?;
        let (place, rest) = rest.split_first_chunk()?;
        let (used, rest) = rest.split_first_chunk()?;
        let (born, mut rest) = rest.split_first_chunk()?;
        let mut aliases = Vec::new();
        while let Some((length, after)) = rest.split_first_chunk() {
            let (alias, after) = after.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            aliases.push(SessionKey::from_bytes(alias)?);
            rest = after;
        }
        if !rest.is_empty() {
            return None;
        }
        Some(Pin {
            key,
            aliases,
            place: u32::from_le_bytes(*place),
            confirmed: flags & CONFIRMED != 0,
            settled: flags & SETTLED != 0,
            matched: flags & MATCHED != 0,
            evicted: flags & EVICTED != 0,
            born: (flags & BORN != 0).then_some(Moment(u64::from_le_bytes(*born))),
            used: Moment(u64::from_le_bytes(*used)),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys() -> impl Strategy<Value = SessionKey> {
        (any::<Option<[u8; 16]>>(), "\\PC{0,40}").prop_map(|(scope, text)| SessionKey { scope, text: text.into() })
    }

    prop_compose! {
        fn pins()(
            key in keys(),
            aliases in proptest::collection::vec(keys(), 0..4),
            place in any::<u32>(),
            flags in any::<[bool; 4]>(),
            born in any::<Option<u64>>(),
            used in any::<u64>(),
        ) -> Pin {
            let [confirmed, settled, matched, evicted] = flags;
            let (born, used) = (born.map(Moment), Moment(used));
            Pin { key, aliases, place, confirmed, settled, matched, evicted, born, used }
        }
    }

    proptest! {
        #[test]
        fn a_pin_comes_back_as_it_was_written(pin in pins(), number in any::<u32>()) {
            let mut value = Vec::new();
            pin.write_value_at(number, &mut value);
            prop_assert_eq!(Pin::read(&pin.key.to_bytes(), &value), Some(Pin { place: number, ..pin.clone() }));
            let json = serde_json::to_string(&pin).unwrap();
            prop_assert_eq!(serde_json::from_str::<Pin>(&json).unwrap(), pin);
        }

        #[test]
        fn anything_else_is_no_pin_and_breaks_nothing(key in any::<Vec<u8>>(), value in any::<Vec<u8>>(), cut in 0..64_usize) {
            let _ = Pin::read(&key, &value);
            let place = 7;
            let key = SessionKey { scope: None, text: "a".into() };
            let aliases = vec![SessionKey { scope: Some([3; 16]), text: "alias".into() }];
            let pin = Pin {
                key: key.clone(), aliases, place, confirmed: true, settled: true, matched: false, evicted: false,
                born: None, used: Moment(1),
            };
            let mut whole = Vec::new();
            pin.write_value_at(place, &mut whole);
            let cut = cut.min(whole.len() - 1);
            // Without its aliases it is a pin, too.
            prop_assert!(cut == 21 || Pin::read(&key.to_bytes(), &whole[..cut]).is_none());
        }
    }
}
