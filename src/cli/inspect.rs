//! Inspect: what a running proxy knows, as tables for people or JSON for scripts.

use serde_json::Value;

use crate::cli::client::{Client, ClientError};
use crate::cli::table::aligned;

/// `longhaul status`
pub async fn status(client: &Client, json: bool) -> Result<String, ClientError> {
    let status = client.get("/api/v1/status").await?;
    Ok(if json { pretty(&status) } else { status_text(&status) })
}

/// `longhaul sessions`; `query` begins with `?` or is empty.
pub async fn sessions(client: &Client, query: &str, json: bool) -> Result<String, ClientError> {
    let answer = client.get(&format!("/api/v1/sessions{query}")).await?;
    if json {
        return Ok(pretty(&answer));
    }
    let head = ["SERVICE", "SESSION", "VERSION", "ENDPOINT", "RUNS", "IDLE", "AGE"];
    let row = |session: &Value| {
        vec![
            cell(&session["service"]),
            cell(&session["key"]),
            cell(&session["version"]),
            cell(&session["endpoint"]),
            cell(&session["outstanding_runs"]),
            duration(&session["idle_ms"]),
            duration(&session["age_ms"]),
        ]
    };
    Ok(table_or(&head, list(&answer["sessions"]).iter().map(row).collect(), "no sessions\n"))
}

/// `longhaul runs`; `query` begins with `?` or is empty.
pub async fn runs(client: &Client, query: &str, json: bool) -> Result<String, ClientError> {
    let answer = client.get(&format!("/api/v1/runs{query}")).await?;
    if json {
        return Ok(pretty(&answer));
    }
    let head = ["SERVICE", "RUN", "SESSION", "VERSION", "ENDPOINT", "STATE", "AGE"];
    let row = |run: &Value| {
        vec![
            cell(&run["service"]),
            cell(&run["id"]),
            cell(&run["session"]),
            cell(&run["version"]),
            cell(&run["endpoint"]),
            cell(&run["state"]),
            duration(&run["age_ms"]),
        ]
    };
    Ok(table_or(&head, list(&answer["runs"]).iter().map(row).collect(), "no outstanding runs\n"))
}

/// As scripts want it.
pub fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// The elements of an array; of anything else none.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn status_text(status: &Value) -> String {
    let config = &status["config"];
    let mut text = format!(
        "longhaul {}, configuration {} since {}{}\n",
        cell(&status["version"]),
        cell(&config["generation"]),
        cell(&config["loaded_at"]),
        if status["draining"] == true { ", draining" } else { "" },
    );
    if let Some(file) = status["state"]["file"].as_str() {
        text.push_str(&format!("state kept in {file}\n"));
    }
    for listener in list(&status["listeners"]) {
        let [name, address, connections] = ["name", "address", "connections"].map(|field| cell(&listener[field]));
        // A listener without a name of its own is called by its address.
        let on = if name == address { String::new() } else { format!(" on {address}") };
        text.push_str(&format!("listener {name}{on}: {connections} open connections\n"));
    }
    if let Some(error) = config["last_error"].as_str() {
        text.push_str(&format!("the last reload was refused, nothing changed:\n{error}\n"));
    }
    let head = ["SERVICE", "VERSION", "WEIGHT", "ENDPOINT", "STATE", "RUNS", "MAX", "OTHER", "SESSIONS"];
    let mut rows = Vec::new();
    for service in list(&status["services"]) {
        for version in list(&service["versions"]) {
            let first = [cell(&service["name"]), cell(&version["name"]), cell(&version["effective_weight"])];
            let endpoints = list(&version["endpoints"]);
            if endpoints.is_empty() {
                rows.push([first.as_slice(), &["(no endpoints)".to_owned()]].concat());
            }
            for endpoint in endpoints {
                let fields = ["address", "state", "outstanding_runs", "max_runs", "open_exchanges", "sessions"];
                rows.push([first.as_slice(), &fields.map(|field| cell(&endpoint[field]))].concat());
            }
        }
    }
    text.push('\n');
    text.push_str(&aligned(&head, &rows));
    text.push_str(&drains(status));
    let queued = list(&status["services"]).iter().filter(|service| service["queue"]["length"] != 0);
    for service in queued {
        let [length, oldest] = [cell(&service["queue"]["length"]), duration(&service["queue"]["oldest_ms"])];
        text.push_str(&format!("{}: {length} runs wait, the oldest for {oldest}\n", cell(&service["name"])));
    }
    text
}

/// A line for each endpoint that drains: why, and when it will be empty.
fn drains(status: &Value) -> String {
    let mut text = String::new();
    for service in list(&status["services"]) {
        let endpoints = list(&service["versions"]).iter().flat_map(|version| list(&version["endpoints"]));
        for endpoint in endpoints.filter(|endpoint| endpoint["drain"].is_object()) {
            let drain = &endpoint["drain"];
            let by: Vec<String> = list(&drain["by"]).iter().map(cell).collect();
            let [p50, p95] = ["p50_ms", "p95_ms"].map(|quantile| duration(&drain["empty_in"][quantile]));
            let [service, address] = [cell(&service["name"]), cell(&endpoint["address"])];
            text.push_str(&format!("{address} of {service} drains ({}): empty in {p50} (p95 {p95})", by.join(", ")));
            if drain["cut_in_ms"].is_u64() {
                text.push_str(&format!(", cut in {}", duration(&drain["cut_in_ms"])));
            }
            text.push('\n');
        }
    }
    text
}

fn table_or(head: &[&str], rows: Vec<Vec<String>>, nothing: &str) -> String {
    if rows.is_empty() { nothing.to_owned() } else { aligned(head, &rows) }
}

/// As a table shows it.
pub fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Milliseconds as people say them.
pub fn duration(milliseconds: &Value) -> String {
    let Some(milliseconds) = milliseconds.as_u64() else { return "-".to_owned() };
    match milliseconds / 1000 {
        0 => format!("{milliseconds}ms"),
        seconds @ 1..=119 => format!("{seconds}s"),
        seconds @ 120..=7199 => format!("{}m", seconds / 60),
        seconds => format!("{}h", seconds / 3600),
    }
}
