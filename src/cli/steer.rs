//! Steer: commands that change what a running proxy does.

use std::time::Duration;

use serde_json::{Value, json};

use crate::cli::client::{Client, ClientError, encode};
use crate::cli::inspect::{duration, list, pretty};

/// `longhaul drain`: the whole proxy. With `wait`, returns when nothing answers at its admin address any more.
pub async fn drain_proxy(client: &Client, wait: bool, as_json: bool) -> Result<String, ClientError> {
    let answer = client.post("/api/v1/drain").await?;
    if !wait {
        return Ok(said(as_json, &answer, "the proxy drains and then ends"));
    }
    loop {
        match client.get("/api/v1/status").await {
            // A proxy that ends while it answers breaks off.
            Err(ClientError::Unreachable { .. } | ClientError::Strange { .. }) => {
                return Ok(said(as_json, &json!({ "drained": true }), "the proxy has drained and ended"));
            }
            Err(error) => return Err(error),
            Ok(_) => tokio::time::sleep(ASK_EVERY).await,
        }
    }
}

/// `longhaul drain SERVICE ENDPOINT`. With `wait`, returns when nothing is open there any more.
pub async fn drain_endpoint(
    client: &Client,
    service: &str,
    endpoint: &str,
    wait: bool,
    as_json: bool,
) -> Result<String, ClientError> {
    let answer = client.post(&endpoint_path(service, endpoint, "drain")).await?;
    if !wait {
        return Ok(said(as_json, &answer, &format!("{endpoint} of {service} gets no new sessions")));
    }
    let mut shown = String::new();
    let mut rounds: u32 = 0;
    loop {
        let status = client.get("/api/v1/status").await?;
        // Beside the answer, so that scripts read the answer alone. The estimate changes all the time, so it alone is
        // no reason to say anything more often.
        let open = open_at(&status, service, endpoint);
        if open > 0 && (rounds.is_multiple_of(TELL_ROUNDS) || !shown.starts_with(&format!("{open} "))) {
            shown = progress(&status, service, endpoint);
            eprintln!("{endpoint} of {service}: {shown}");
        }
        rounds = rounds.wrapping_add(1);
        if open_at(&status, service, endpoint) == 0 {
            let answer = json!({ "service": service, "endpoint": endpoint, "drained": true });
            return Ok(said(as_json, &answer, &format!("{endpoint} of {service} is drained")));
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// `longhaul undrain SERVICE ENDPOINT`
pub async fn undrain_endpoint(
    client: &Client,
    service: &str,
    endpoint: &str,
    as_json: bool,
) -> Result<String, ClientError> {
    let answer = client.post(&endpoint_path(service, endpoint, "undrain")).await?;
    Ok(said(as_json, &answer, &format!("{endpoint} of {service} takes sessions again")))
}

fn endpoint_path(service: &str, endpoint: &str, action: &str) -> String {
    format!("/api/v1/services/{}/endpoints/{}/{action}", encode(service), encode(endpoint))
}

/// Runs and other exchanges that are open on an endpoint; of one that is gone, none.
fn open_at(status: &Value, service: &str, endpoint: &str) -> u64 {
    let open = |one: &Value, field: &str| one[field].as_u64().unwrap_or(0);
    endpoints_at(status, service, endpoint).map(|one| open(one, "outstanding_runs") + open(one, "open_exchanges")).sum()
}

/// What is left of a drain, and how long that will take.
fn progress(status: &Value, service: &str, endpoint: &str) -> String {
    let mut text = format!("{} open", open_at(status, service, endpoint));
    if let Some(one) = endpoints_at(status, service, endpoint).next() {
        text.push_str(&format!(", {} sessions", one["sessions"]));
        let drain = &one["drain"];
        let [p50, p95] = ["p50_ms", "p95_ms"].map(|quantile| duration(&drain["empty_in"][quantile]));
        text.push_str(&format!(", empty in {p50} (p95 {p95})"));
        if drain["cut_in_ms"].is_u64() {
            text.push_str(&format!(", cut in {}", duration(&drain["cut_in_ms"])));
        }
    }
    text
}

fn endpoints_at<'a>(status: &'a Value, service: &str, endpoint: &str) -> impl Iterator<Item = &'a Value> {
    let services = list(&status["services"]).iter().filter(move |one| one["name"] == service);
    let versions = services.flat_map(|one| list(&one["versions"]));
    versions.flat_map(|one| list(&one["endpoints"])).filter(move |one| one["address"] == endpoint)
}

fn said(as_json: bool, answer: &Value, text: &str) -> String {
    if as_json { pretty(answer) } else { format!("{text}\n") }
}

const ASK_EVERY: Duration = Duration::from_millis(250);
/// How many rounds of asking may pass without a word.
const TELL_ROUNDS: u32 = 40;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_drained_when_nothing_is_open_there() {
        let status = json!({ "services": [
            { "name": "support", "versions": [
                { "endpoints": [{ "address": "a:1", "outstanding_runs": 2, "open_exchanges": 1 }] },
                { "endpoints": [{ "address": "b:1", "outstanding_runs": 0, "open_exchanges": 0 }] },
            ]},
            { "name": "other", "versions": [{ "endpoints": [{ "address": "b:1", "outstanding_runs": 9 }] }] },
        ]});
        assert_eq!(open_at(&status, "support", "a:1"), 3);
        assert_eq!(open_at(&status, "support", "b:1"), 0);
        assert_eq!(open_at(&status, "support", "gone:1"), 0);
    }

    #[test]
    fn progress_tells_what_is_left_and_for_how_long() {
        let drain =
            json!({ "by": ["operator"], "cut_in_ms": 480_000, "empty_in": { "p50_ms": 42_000, "p95_ms": null } });
        let one =
            json!({ "address": "a:1", "outstanding_runs": 2, "open_exchanges": 1, "sessions": 7, "drain": drain });
        let status = json!({ "services": [{ "name": "support", "versions": [{ "endpoints": [one] }] }] });
        let text = progress(&status, "support", "a:1");
        assert_eq!(text, "3 open, 7 sessions, empty in 42s (p95 -), cut in 8m");
    }
}
