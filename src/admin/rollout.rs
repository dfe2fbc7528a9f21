//! Rollout: what the admin API shows of rollouts, and how they and the sessions of a version are steered.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::admin::document::Json;
use crate::admin::problem::Problem;
use crate::admin::{NAMES_MAX, Shared, dispatcher, steerable};
use crate::ids;
use crate::rollout::Command;
use crate::state::dispatcher::Dispatcher;

/// `GET /api/v1/services/S/rollout`
pub async fn status(State(context): Shared, Path(service): Path<String>) -> Result<Response, Problem> {
    let dispatcher = dispatcher(&context, &service)?;
    let rollout = dispatcher.rollout(ids::now()).ok_or_else(|| no_rollout(&service))?;
    Ok(Json(rollout.report()).into_response())
}

/// `POST /api/v1/services/S/rollout/ACTION`: the rollout as it stands then. 409 where the command means nothing there.
pub async fn steer(
    State(context): Shared,
    Path((service, action)): Path<(String, String)>,
) -> Result<Response, Problem> {
    let command = command(&action).ok_or_else(|| {
        let known = COMMANDS.map(|(name, _)| name).join(", ");
        Problem::not_found(&format!("a rollout does not {action}; it knows {known}"))
    })?;
    let dispatcher = steerable(&context, &service)?;
    match dispatcher.steer_rollout(command, ids::now()) {
        Some(Ok(rollout)) => Ok(Json(rollout.report()).into_response()),
        Some(Err(refused)) => Err(Problem::new(StatusCode::CONFLICT, "rollout_refused", &refused.to_string())),
        None => Err(no_rollout(&service)),
    }
}

/// `POST /api/v1/services/S/versions/V/evict`
pub async fn evict(
    State(context): Shared,
    Path((service, version)): Path<(String, String)>,
) -> Result<Response, Problem> {
    let dispatcher = steerable(&context, &service)?;
    let evicted = dispatcher.evict_sessions(&version, ids::now()).ok_or_else(|| no_version(&dispatcher, &version))?;
    Ok(Json(json!({ "service": service, "version": version, "evicted": evicted })).into_response())
}

const COMMANDS: [(&str, Command); 5] = [
    ("start", Command::Start),
    ("promote", Command::Promote),
    ("pause", Command::Pause),
    ("resume", Command::Resume),
    ("abort", Command::Abort),
];

fn command(action: &str) -> Option<Command> {
    COMMANDS.iter().find(|(name, _)| *name == action).map(|(_, command)| *command)
}

fn no_rollout(service: &str) -> Problem {
    Problem::not_found(&format!("the configuration of {service} has no rollout; add `rollout` to the service"))
}

fn no_version(dispatcher: &Dispatcher, version: &str) -> Problem {
    let known = dispatcher.status(ids::now()).versions.into_iter().map(|known| known.name).take(NAMES_MAX);
    let known = known.collect::<Vec<String>>().join(", ");
    Problem::not_found(&format!("{} has no version {version}; it has {known}", dispatcher.name()))
}
