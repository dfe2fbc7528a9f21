//! Rollout: how one stands, as text; its commands; and waiting for its end, as a pipeline does.

use std::time::{Duration, SystemTime};

use clap::ValueEnum;
use serde_json::Value;

use crate::cli::client::{Client, ClientError, encode};
use crate::cli::inspect::{cell, duration, list, pretty};
use crate::cli::table::aligned;
use crate::logging;
use crate::rollout::{Moment, Transition};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Action {
    /// Where it is, and on what evidence
    Status,
    /// Begin; nothing where it has begun
    Start,
    /// The next step now
    Promote,
    /// Keep the shares as they are
    Pause,
    /// Go on
    Resume,
    /// New sessions back to the old version; nothing that runs is cut
    Abort,
}

/// What a command has to say.
pub struct Said {
    pub text: String,
    /// It came out as whoever asked wants it.
    pub good: bool,
}

/// `longhaul rollout SERVICE ..`. With `wait`, returns when nothing more happens by itself, and only completion is good (after
/// `abort`: that it is aborted).
pub async fn rollout(
    client: &Client,
    service: &str,
    action: Action,
    wait: bool,
    as_json: bool,
) -> Result<Said, ClientError> {
    let path = format!("/api/v1/services/{}/rollout", encode(service));
    let mut report = match action.verb() {
        Some(verb) => client.post(&format!("{path}/{verb}")).await?,
        None => client.get(&path).await?,
    };
    let mut unreached = Duration::ZERO;
    while wait && report["settled"] != true {
        tokio::time::sleep(ASK_EVERY).await;
        match client.get(&path).await {
            Ok(newer) => {
                report = newer;
                unreached = Duration::ZERO;
            }
            // A rollout takes hours, and the proxy may be restarted meanwhile.
            Err(ClientError::Unreachable { .. } | ClientError::Strange { .. }) if unreached < UNREACHED_MAX => {
                unreached += ASK_EVERY;
            }
            Err(error) => return Err(error),
        }
    }
    let text = if as_json { pretty(&report) } else { text(service, &report) };
    Ok(Said { text, good: !wait || is_good(&report, action) })
}

impl Action {
    fn verb(self) -> Option<&'static str> {
        match self {
            Action::Status => None,
            Action::Start => Some("start"),
            Action::Promote => Some("promote"),
            Action::Pause => Some("pause"),
            Action::Resume => Some("resume"),
            Action::Abort => Some("abort"),
        }
    }
}

fn is_good(report: &Value, action: Action) -> bool {
    report["state"] == if action == Action::Abort { "aborted" } else { "completed" }
}

fn text(service: &str, report: &Value) -> String {
    let [from, to] = ["from", "to"].map(|field| cell(&report[field]));
    let mut text = format!("{service}: {from} -> {to}, {}\n", place(report));
    let percent = 100.0 * report["share"].as_f64().unwrap_or(0.0);
    text.push_str(format!("{percent:.4}").trim_end_matches('0').trim_end_matches('.'));
    text.push_str(&format!("% of the new sessions of both start at {to}\n"));
    if report["held_ms"].is_u64() {
        let [held, hold] = ["held_ms", "hold_ms"].map(|field| duration(&report[field]));
        let runs = match report["min_runs"].as_u64() {
            Some(runs) => format!("; {runs} runs of each version are needed"),
            None => "; not judged, as there is nothing to compare".to_owned(),
        };
        text.push_str(&format!("the step lasts for {held} of {hold}{runs}\n"));
    }
    text.push_str(&evidence(&report["evidence"], &from, &to));
    // What this program does not know is left out: the proxy may be newer.
    let history = list(&report["history"]).iter();
    for transition in history.filter_map(|one| serde_json::from_value::<Transition>(one.clone()).ok()) {
        text.push_str(&format!("{} {transition}\n", time(transition.at)));
    }
    text
}

fn place(report: &Value) -> String {
    let step = format!("step {} of {}", cell(&report["step"]), cell(&report["steps"]));
    match (report["state"].as_str(), report["paused_by"].as_str()) {
        (Some("running"), _) => step,
        (Some("paused"), Some("judge")) => format!("paused in {step} because {} is worse", cell(&report["to"])),
        (Some("paused"), _) => format!("paused in {step}"),
        _ => cell(&report["state"]),
    }
}

fn evidence(evidence: &Value, from: &str, to: &str) -> String {
    let head = ["", from, to, "LIMIT", "CERTAINTY"];
    let seconds = |value: &Value| value.as_f64().map_or("-".to_owned(), |seconds| format!("{seconds:.3}s"));
    let sides = ["from", "to"].map(|side| &evidence[side]);
    let mut rows: Vec<Vec<String>> = Vec::new();
    for field in ["runs", "failed"] {
        rows.push([&[field.to_owned()][..], &sides.map(|side| cell(&side[field]))].concat());
    }
    for field in ["first_event_p95", "duration_p95"] {
        rows.push([&[field.to_owned()][..], &sides.map(|side| seconds(&side[field]))].concat());
    }
    for comparison in list(&evidence["comparisons"]) {
        let certainty = 100.0 * comparison["certainty"].as_f64().unwrap_or(0.0);
        rows.push(vec![
            format!("worse: {}", cell(&comparison["criterion"])),
            String::new(),
            String::new(),
            cell(&comparison["limit"]),
            format!("{certainty:.1}%"),
        ]);
    }
    aligned(&head, &rows)
}

fn time(at: Moment) -> String {
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(at.0);
    String::from_utf8_lossy(&logging::timestamp(time)).into_owned()
}

const ASK_EVERY: Duration = Duration::from_secs(1);

/// How long the proxy may be away while its rollout is waited for.
const UNREACHED_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_completion_is_good_unless_it_was_to_be_aborted() {
        let at = |state: &str| json!({ "state": state });
        assert!(is_good(&at("completed"), Action::Status) && is_good(&at("completed"), Action::Start));
        assert!(!is_good(&at("aborted"), Action::Status) && !is_good(&at("paused"), Action::Promote));
        assert!(is_good(&at("aborted"), Action::Abort) && !is_good(&at("completed"), Action::Abort));
    }

    #[test]
    fn a_report_reads_as_text() {
        let report = json!({
            "state": "paused", "step": 2, "paused_by": "judge", "settled": true, "from": "stable", "to": "canary",
            "steps": 4, "share": 0.1, "since": 0, "held_ms": 180_000, "hold_ms": 1_800_000, "min_runs": 50,
            "evidence": {
                "from": { "runs": 540, "failed": 1, "first_event_p95": 0.25, "duration_p95": 3.0 },
                "to": { "runs": 60, "failed": 12, "first_event_p95": 0.3, "duration_p95": null },
                "comparisons": [{ "criterion": "failed", "limit": 2.0, "from": 0.002, "to": 0.2, "certainty": 0.999 }],
            },
            "history": [
                { "number": 1, "at": 0, "before": { "state": "pending" }, "after": { "state": "running", "step": 1 },
                  "cause": "loaded", "evidence": null },
                { "number": 2, "at": 0, "before": { "state": "imagined" }, "cause": "unknown" },
            ],
        });
        let text = text("support", &report);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "support: stable -> canary, paused in step 2 of 4 because canary is worse");
        assert_eq!(lines[1], "10% of the new sessions of both start at canary");
        assert_eq!(lines[2], "the step lasts for 3m of 30m; 50 runs of each version are needed");
        assert!(lines[4].starts_with("runs") && lines[4].ends_with("60"), "{text}");
        assert!(lines[8].starts_with("worse: failed") && lines[8].ends_with("99.9%"), "{text}");
        let last = "1970-01-01T00:00:00.000Z pending -> step 1: the configuration has a rollout";
        assert_eq!(lines[9..], [last], "{text}");
    }
}
