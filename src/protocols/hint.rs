//! Hint: whether a request's head can show any protocol at all. Most of what passes shows none, and is not to pay for
//! asking each of them.

use crate::protocols::Request;

/// False only where every protocol's sign is none.
pub fn may_show(request: &Request<'_>) -> bool {
    request.path.split('/').any(is_telling)
        || request.query.is_some_and(|query| query.contains("ession") || query.contains("A2A"))
        || request.fields.iter().any(|(name, value)| is_mark(name, value))
}

/// A segment that stands in a path of some protocol.
fn is_telling(segment: &str) -> bool {
    // By length first: nearly every segment is settled by that.
    let is_word = match segment.len() {
        2 => segment == "ws",
        3 => matches!(segment, "mcp" | "sse" | "run"),
        4 => matches!(segment, "runs" | "apps" | "chat" | "card"),
        5 => segment == "tasks",
        6 => segment == "stream",
        7 => matches!(segment, "threads" | "session" | "run_sse"),
        8 => matches!(segment, "sessions" | "messages" | "runtimes" | "realtime" | "run_live"),
        9 => segment == "responses",
        10 => segment == "agent.json",
        11 => matches!(segment, "completions" | "invocations"),
        13 => segment == "conversations",
        15 => segment == "agent-card.json",
        17 => segment == "extendedAgentCard",
        _ => false,
    };
    // `message:send`, `{task}:cancel`.
    is_word || (segment.len() > 7 && segment.contains(':'))
}

/// A field that only some protocol has, by how its name begins; or whose value names one.
fn is_mark(name: &[u8], value: &[u8]) -> bool {
    let Some(start) = name.first_chunk::<4>() else { return false };
    let mut start = *start;
    start.make_ascii_lowercase();
    match &start {
        b"mcp-" | b"a2a-" | b"anth" | b"open" | b"x-am" => true,
        b"acce" => contains(value, b"ag-ui"),
        b"cont" => contains(value, b"a2a"),
        _ => false,
    }
}

fn contains(value: &[u8], word: &[u8]) -> bool {
    value.windows(word.len()).any(|window| window.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::may_show;
    use crate::message::Fields;
    use crate::protocols::Request;

    #[test]
    fn plain_requests_show_nothing() {
        let mut fields = Fields::default();
        for (name, value) in [
            ("host", "agents.example"),
            ("accept", "text/html, text/event-stream"),
            ("content-type", "application/json"),
            ("user-agent", "curl/8"),
            ("x-session-id", "7"),
        ] {
            fields.append(name, value.as_bytes());
        }
        let shows = |path: &str, query| {
            may_show(&Request { method: &Method::GET, path, query, fields: &fields, upgrade: None })
        };
        for path in ["/", "/health", "/support/index.html", "/v1/models", "/api/items/17"] {
            assert!(!shows(path, Some("page=2")), "{path}");
        }
        for path in ["/threads/1", "/a/runs", "/message:send", "/x/mcp", "/v1/chat/completions"] {
            assert!(shows(path, None), "{path}");
        }
        assert!(shows("/message", Some("session_id=1")));
    }
}
