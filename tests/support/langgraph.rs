//! LangGraph: the answers of a LangGraph server, as far as the proxy looks at them.

use super::{Body, Gate, Request, Script, Step};

/// The id of a server's run by its number.
pub fn run_id(number: usize) -> String {
    format!("22222222-2222-4222-8222-{number:012}")
}

/// The parts of a request's path, and its query as the last one.
pub fn parts(request: &Request) -> Vec<&str> {
    request.target.trim_start_matches('/').split(['/', '?']).collect()
}

/// To who started a run in the background.
pub fn created(thread: &str, run: &str) -> Script {
    Script::answer(
        200,
        &[("content-type", "application/json"), ("content-location", &location(thread, run))],
        &format!(r#"{{"run_id":"{run}","thread_id":"{thread}","status":"pending"}}"#),
    )
}

/// To who started a run and reads its stream, which ends once `until` is open.
pub fn stream(thread: &str, run: &str, until: Option<&Gate>) -> Script {
    let headers = vec![
        ("content-type".to_owned(), "text/event-stream".to_owned()),
        ("content-location".to_owned(), location(thread, run)),
    ];
    let begin = [
        Step::ReadBody,
        Step::Head { status: 200, headers, body: Body::Chunked },
        Step::Data(format!("event: metadata\r\ndata: {{\"run_id\":\"{run}\"}}\r\n\r\n").into()),
    ];
    let wait = until.map(|gate| Step::Wait(gate.clone()));
    Script(begin.into_iter().chain(wait).chain([Step::End]).collect())
}

/// To who asks how a run is. `status`: [`None`] where the server knows no such run.
pub fn state(run: &str, status: Option<&str>) -> Script {
    match status {
        Some(status) => Script::json(200, &format!(r#"{{"run_id":"{run}","status":"{status}"}}"#)),
        None => Script::json(404, r#"{"detail":"Run not found"}"#),
    }
}

fn location(thread: &str, run: &str) -> String {
    format!("/threads/{thread}/runs/{run}")
}
