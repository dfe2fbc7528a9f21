//! Lease: which replica acts on the cluster for all: the holder of a Lease (`coordination.k8s.io/v1`).
//!
//! The rules are those of client-go's leader election. Nobody compares clocks: a holder counts as alive for the lease's
//! duration after this process saw the lease change, by its own clock; so clocks that differ do no harm.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Error};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::ids;

/// How long a holder that says nothing more is waited for.
const DURATION: Duration = Duration::from_secs(15);
/// How long after its last renewal began a holder acts as such. Shorter than [`DURATION`], so that it has stopped before
/// another begins.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at the lease.
const RETRY: Duration = Duration::from_secs(2);
/// For an answer of the API server.
const TIMEOUT: Duration = Duration::from_secs(4);
/// A lease that says more is taken to say this: one that was made by hand must not stop everything.
const DURATION_MAX: Duration = Duration::from_secs(3600);

/// What one candidate knows. Pure: no clock, no API.
struct Election {
    identity: String,
    /// The lease as it was seen last, and when it was first seen like that.
    observed: Option<(LeaseSpec, Instant)>,
}

/// What is to be done with the lease.
#[derive(Debug, PartialEq)]
enum Step {
    Create(LeaseSpec),
    Replace(LeaseSpec),
    /// Another holds it.
    Wait,
}

impl Election {
    fn new(identity: String) -> Election {
        Election { identity, observed: None }
    }

    fn step(&mut self, lease: Option<&LeaseSpec>, now: Instant, wall: &MicroTime) -> Step {
        let mine = |acquired: &MicroTime, transitions: i32| LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(DURATION.as_secs() as i32),
            acquire_time: Some(acquired.clone()),
            renew_time: Some(wall.clone()),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        };
        let Some(lease) = lease else { return Step::Create(mine(wall, 0)) };
        if self.observed.as_ref().is_none_or(|(known, _)| known != lease) {
            self.observed = Some((lease.clone(), now));
        }
        let since = self.observed.as_ref().map_or(now, |(_, since)| *since);
        let holder = lease.holder_identity.as_deref().unwrap_or_default();
        let transitions = lease.lease_transitions.unwrap_or(0);
        if holder == self.identity {
            return Step::Replace(mine(lease.acquire_time.as_ref().unwrap_or(wall), transitions));
        }
        let seconds = lease.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(0);
        let alive = now.saturating_duration_since(since) < Duration::from_secs(seconds).min(DURATION_MAX);
        match !holder.is_empty() && alive {
            true => Step::Wait,
            false => Step::Replace(mine(wall, transitions.saturating_add(1))),
        }
    }
}

/// Until when this process may act as the holder; `None`: it is not.
pub type Leading = Option<Instant>;

/// Takes part until it is dropped, and tells how it stands.
pub async fn run(api: Api<Lease>, name: &str, identity: String, leading: &watch::Sender<Leading>) {
    let mut election = Election::new(identity);
    loop {
        let begun = ids::now();
        match tokio::time::timeout(TIMEOUT, take_part(&api, name, &mut election)).await {
            Ok(Ok(true)) => {
                if leading.send_replace(Some(begun + RENEW_DEADLINE)).is_none() {
                    info!("this replica acts on the cluster for all ({name} is its lease)");
                }
            }
            Ok(Ok(false)) => lost(leading, name),
            Ok(Err(failure)) => debug!("the lease {name} can't be renewed: {failure}"),
            Err(_) => debug!("the lease {name} can't be renewed: no answer within {TIMEOUT:?}"),
        }
        if leading.borrow().is_some_and(|until| until <= ids::now()) {
            lost(leading, name);
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn lost(leading: &watch::Sender<Leading>, name: &str) {
    if leading.send_replace(None).is_some() {
        warn!("this replica does not act on the cluster any more: the lease {name} is another's, or can't be renewed");
    }
}

/// One round; true: this process holds the lease.
async fn take_part(api: &Api<Lease>, name: &str, election: &mut Election) -> Result<bool, Error> {
    let known = api.get_opt(name).await?;
    let spec = known.as_ref().map(|lease| lease.spec.clone().unwrap_or_default());
    let (written, lease) = match election.step(spec.as_ref(), ids::now(), &wall_clock()) {
        Step::Wait => return Ok(false),
        Step::Create(spec) => {
            let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(spec) };
            (api.create(&PostParams::default(), &lease).await, lease)
        }
        // With the version that was read: whoever changed it meanwhile was first.
        Step::Replace(spec) => {
            let lease = Lease { spec: Some(spec), ..known.unwrap_or_default() };
            (api.replace(name, &PostParams::default(), &lease).await, lease)
        }
    };
    match written {
        Ok(written) => {
            let spec = written.spec.or(lease.spec).unwrap_or_default();
            election.observed = Some((spec, ids::now()));
            Ok(true)
        }
        // What is there now shows at the next look.
        Err(Error::Api(status)) if status.code == 409 => Ok(false),
        Err(failure) => Err(failure),
    }
}

/// Gives the lease up, so that another replica need not wait. To be called by its holder only.
pub async fn release(api: Api<Lease>, name: &str, identity: &str) {
    let release = async {
        let Some(lease) = api.get_opt(name).await? else { return Ok(()) };
        let spec = lease.spec.clone().unwrap_or_default();
        if spec.holder_identity.as_deref() != Some(identity) {
            return Ok(());
        }
        let spec = LeaseSpec { holder_identity: None, lease_duration_seconds: Some(1), ..spec };
        api.replace(name, &PostParams::default(), &Lease { spec: Some(spec), ..lease }).await.map(|_| ())
    };
    match tokio::time::timeout(TIMEOUT, release).await {
        Ok(Ok(())) => {}
        Ok(Err(failure)) => debug!("the lease {name} can't be released: {failure}"),
        Err(_) => debug!("the lease {name} can't be released: no answer within {TIMEOUT:?}"),
    }
}

/// In whole microseconds, as a lease has it: what is read again is what was written.
fn wall_clock() -> MicroTime {
    let since_epoch = ids::wall_clock().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let microseconds = i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX);
    MicroTime(Timestamp::from_microsecond(microseconds).unwrap_or(Timestamp::UNIX_EPOCH))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wall(microseconds: i64) -> MicroTime {
        MicroTime(Timestamp::from_microsecond(microseconds).unwrap())
    }

    fn written(step: Step) -> LeaseSpec {
        match step {
            Step::Create(spec) | Step::Replace(spec) => spec,
            Step::Wait => panic!("it waits"),
        }
    }

    #[test]
    fn a_holder_counts_while_its_lease_changes() {
        let start = ids::now();
        let seconds = |seconds: u64| start + Duration::from_secs(seconds);
        let mut one = Election::new("one".to_owned());
        let mut two = Election::new("two".to_owned());
        let mut lease = written(one.step(None, start, &wall(1)));
        assert_eq!((lease.holder_identity.as_deref(), lease.lease_transitions), (Some("one"), Some(0)));
        // Its clock is of another century; what counts is that it changes.
        assert_eq!(two.step(Some(&lease), start, &wall(9_000_000_000_000_000)), Step::Wait);
        lease = written(one.step(Some(&lease), seconds(10), &wall(2)));
        assert_eq!(lease.acquire_time, Some(wall(1)), "since the beginning");
        assert_eq!(two.step(Some(&lease), seconds(16), &wall(3)), Step::Wait);
        assert_eq!(two.step(Some(&lease), seconds(30), &wall(3)), Step::Wait);
        let lease = written(two.step(Some(&lease), seconds(31), &wall(3)));
        assert_eq!((lease.holder_identity.as_deref(), lease.lease_transitions), (Some("two"), Some(1)));
        assert_eq!(one.step(Some(&lease), seconds(31), &wall(4)), Step::Wait);
        // It was given up.
        let released = LeaseSpec { holder_identity: Some(String::new()), ..lease };
        assert_eq!(written(one.step(Some(&released), seconds(32), &wall(5))).lease_transitions, Some(2));
    }

    proptest! {
        /// Two candidates with their own clocks, steps at any times, renewals that are lost: never do both act.
        #[test]
        fn there_is_one_holder(steps in prop::collection::vec((0usize..2, 1u64..20_000, any::<bool>()), 1..200)) {
            let start = ids::now();
            let mut candidates = [Election::new("a".to_owned()), Election::new("b".to_owned())];
            let mut leading: [Leading; 2] = [None, None];
            let mut stored: Option<LeaseSpec> = None;
            let mut now = start;
            for (number, (who, later, lost)) in steps.into_iter().enumerate() {
                now += Duration::from_millis(later);
                // The request is lost on its way.
                if lost {
                    continue;
                }
                let step = candidates[who].step(stored.as_ref(), now, &wall(number as i64 * (1 - 2 * who as i64)));
                match step {
                    Step::Wait => leading[who] = None,
                    Step::Create(spec) | Step::Replace(spec) => {
                        candidates[who].observed = Some((spec.clone(), now));
                        stored = Some(spec);
                        leading[who] = Some(now + RENEW_DEADLINE);
                    }
                }
                let acting = leading.iter().flatten().filter(|until| **until > now).count();
                prop_assert!(acting <= 1);
            }
        }
    }
}
