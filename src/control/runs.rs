//! Runs: asks endpoints about runs that no exchange carries any more, and ends those that are to be ended.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::sync::Semaphore;
use tokio::time::MissedTickBehavior;
use tracing::{debug, warn};

use crate::control::ReloadState;
use crate::control::call::{self, Question, Way};
use crate::ids;
use crate::protocols::{RunRef, Standing};
use crate::snapshot::Running;
use crate::state::core::CancelAnswer;
use crate::state::dispatcher::Dispatcher;
use crate::state::status::{self, DueCall};

/// How often is looked for what is due.
const TICK: Duration = Duration::from_millis(50);

/// Calls under way at once, of all services; more wait for their turn.
const CALLS_MAX: usize = 64;

/// For one call, with its answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How much of an answer is read.
const BODY_BYTES_MAX: usize = 1 << 20;

/// Looks and asks until it is dropped.
pub async fn run(running: Arc<Running>, state: Arc<ReloadState>) {
    let slots = Arc::new(Semaphore::new(CALLS_MAX));
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let configured = running.snapshot.load().services.iter().map(|service| service.dispatcher.clone()).collect();
        let dispatchers: Vec<Arc<Dispatcher>> = configured;
        let removed = state.removed_services().into_iter().map(|(_, dispatcher)| dispatcher);
        for dispatcher in dispatchers.into_iter().chain(removed) {
            for due in dispatcher.due_runs(slots.available_permits(), ids::now()) {
                let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { break };
                let dispatcher = Arc::clone(&dispatcher);
                tokio::spawn(async move {
                    make(&dispatcher, &due).await;
                    drop(slot);
                });
            }
        }
    }
}

/// Makes one call, and tells the dispatcher what came of it.
pub async fn make(dispatcher: &Dispatcher, due: &DueCall) {
    let answer = ask(due).await;
    let endpoint = &due.target.address;
    match due.question {
        status::Question::Status => {
            let found = match &answer {
                Ok((status, body)) if says_something(*status) => {
                    let run = RunRef { base: &due.about.base, key: &due.key };
                    let protocol = due.about.protocol;
                    Some(protocol.map_or(Standing::NoEvidence, |protocol| protocol.judge(&run, status.as_u16(), body)))
                }
                Ok((status, _)) => {
                    debug!(%endpoint, status = status.as_u16(), "a question about a run was not answered");
                    Some(Standing::NoEvidence)
                }
                Err(Failed::Unreachable(_)) => None,
                Err(Failed::Unanswered(_)) => Some(Standing::NoEvidence),
            };
            dispatcher.asked(due, found, ids::now());
        }
        status::Question::Cancel => {
            let said = match &answer {
                Ok((status, _)) if status.is_success() => CancelAnswer::Accepted,
                Ok((StatusCode::NOT_FOUND | StatusCode::GONE, _)) => CancelAnswer::Gone,
                Ok(_) | Err(_) => CancelAnswer::Refused,
            };
            if said == CancelAnswer::Refused {
                let reason = match &answer {
                    Ok((status, _)) => format!("it answered {status}"),
                    Err(Failed::Unreachable(reason) | Failed::Unanswered(reason)) => reason.clone(),
                };
                warn!(%endpoint, run = %due.id, reason, "a run could not be cancelled at its endpoint");
            }
            dispatcher.cancelled(due, said, ids::now());
        }
    }
}

/// An answer that a proxy without the right credentials, or too eager a one, gets says nothing of the run.
fn says_something(status: StatusCode) -> bool {
    !status.is_server_error()
        && !matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS)
}

enum Failed {
    /// Nobody accepted the connection.
    Unreachable(String),
    /// Somebody did, and gave no answer in time.
    Unanswered(String),
}

async fn ask(due: &DueCall) -> Result<(StatusCode, Vec<u8>), Failed> {
    let way = Way::to(&due.target);
    let call = &due.call;
    let question =
        Question { method: call.method.clone(), target: &call.target, fields: &call.fields, body: &call.body };
    let connected = tokio::time::timeout(CALL_TIMEOUT, call::connect(&way)).await;
    let stream = match connected {
        Ok(Ok(stream)) => stream,
        Ok(Err(reason)) => return Err(Failed::Unreachable(reason)),
        Err(_) => return Err(Failed::Unreachable(format!("no connection within {CALL_TIMEOUT:?}"))),
    };
    let answered = tokio::time::timeout(CALL_TIMEOUT, async {
        let answer = call::ask(&way, stream, &question, BODY_BYTES_MAX).await?;
        Ok((answer.status, answer.body.read().await))
    });
    match answered.await {
        Ok(answered) => answered.map_err(Failed::Unanswered),
        Err(_) => Err(Failed::Unanswered(format!("no answer within {CALL_TIMEOUT:?}"))),
    }
}
