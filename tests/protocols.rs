//! Protocols: whatever comes, no recogniser panics, and what it tells is bounded. The exchanges are put together from the words that
//! recognisers look for; `fuzz/targets.rs` says what must hold.

use proptest::prelude::*;

#[path = "../fuzz/targets.rs"]
#[expect(dead_code, reason = "two of the targets are run here")]
mod targets;

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_request_is_recognised_or_not(request in request()) {
        targets::request(request.as_bytes());
    }

    #[test]
    fn any_answer_is_read(piece in 1..64u8, request in request(), answer in answer()) {
        let mut exchange = vec![piece];
        exchange.extend_from_slice(request.as_bytes());
        exchange.extend_from_slice(b"\n==\n");
        exchange.extend_from_slice(answer.as_bytes());
        targets::answer(&exchange);
    }
}

/// Ids as they are, as they might be, and far too long.
fn id() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => Just("0199a1b2-0000-7000-8000-000000000001".to_owned()),
        2 => "[a-z0-9_-]{1,8}",
        1 => ".{0,6}",
        1 => (500..530usize).prop_map(|length| "x".repeat(length)),
        1 => Just("é\r\n\u{0} /?#%2F".to_owned()),
    ]
}

fn request() -> impl Strategy<Value = String> {
    let method = proptest::sample::select(vec!["GET", "POST", "DELETE", "PATCH", "OPTIONS"]);
    let word = proptest::sample::select(
        "threads runs stream wait batch cancel join events commands search copy state crons protocol tasks message:send \
         message:stream pushNotificationConfigs apps users sessions session run run_sse run_live invocations runtimes ws \
         stopruntimesession v1 chat completions responses messages mcp sse conversations .well-known agent-card.json"
            .split_whitespace()
            .collect::<Vec<&str>>(),
    );
    // In a path an id is escaped, or it would be none.
    let segment = prop_oneof![3 => word.prop_map(str::to_owned), 2 => id().prop_map(|id| escaped(&id))];
    let suffix = proptest::sample::select(vec!["", "", "", ":cancel", ":subscribe", "/"]);
    let query =
        proptest::sample::select(vec!["", "?wait=true", "?A2A-Version=1.0", "?session_id=s&app_name=a&user_id=u"]);
    let path = proptest::collection::vec(segment, 0..6).prop_map(|segments| segments.join("/"));
    let body = prop_oneof![1 => Just(String::new()), 9 => json()];
    (method, path, suffix, query, fields(), body).prop_map(|(method, path, suffix, query, fields, body)| {
        format!("{method} /{path}{suffix}{query}\ncontent-type: application/json{fields}\n\n{body}")
    })
}

fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() || byte == b'-' { char::from(byte).into() } else { format!("%{byte:02X}") }
        })
        .collect()
}

fn fields() -> impl Strategy<Value = String> {
    let name = proptest::sample::select(vec![
        "a2a-version",
        "openai-beta",
        "upgrade",
        "mcp-session-id",
        "mcp-protocol-version",
        "mcp-method",
        "anthropic-version",
        "last-event-id",
        "run-id",
        "content-location",
        "location",
        "x-amzn-bedrock-agentcore-runtime-session-id",
    ]);
    let value = prop_oneof![
        2 => id().prop_map(|id| id.replace(['\r', '\n'], "")),
        1 => id().prop_map(|id| format!("/threads/t/runs/{}", escaped(&id))),
        2 => proptest::sample::select(vec!["websocket", "assistants=v2", "1.0", "tools/call", "2025-11-25"])
            .prop_map(str::to_owned),
    ];
    proptest::collection::vec((name, value), 0..4)
        .prop_map(|fields| fields.iter().map(|(name, value)| format!("\n{name}: {value}")).collect())
}

fn answer() -> impl Strategy<Value = String> {
    let status = proptest::sample::select(vec![101, 200, 200, 200, 200, 202, 204, 400, 404, 409, 500]);
    let event = (
        proptest::sample::select(vec![
            "",
            "event: metadata\n",
            "event: error\r\n",
            "event: endpoint\n",
            "event: message\n",
        ]),
        json(),
        proptest::sample::select(vec!["\n", "\r\n", "\r"]),
    )
        .prop_map(|(name, data, end)| format!("{name}data: {data}{end}{end}"));
    let events = proptest::collection::vec(event, 0..5)
        .prop_map(|events| format!("content-type: text/event-stream\n\n{}", events.concat()));
    let document = json().prop_map(|document| format!("content-type: application/json\n\n\n\n{document}"));
    let messages = proptest::collection::vec((proptest::bool::ANY, json()), 0..5).prop_map(|messages| {
        let line = |(ours, text): &(bool, String)| format!("{}{text}\n", if *ours { "> " } else { "" });
        format!("x: y\n\n{}", messages.iter().map(line).collect::<String>())
    });
    (status, fields(), prop_oneof![events, document, messages])
        .prop_map(|(status, fields, rest)| format!("{status}{fields}\n{rest}"))
}

/// Documents of the names and values that are looked for, sometimes cut or changed.
fn json() -> impl Strategy<Value = String> {
    let value = prop_oneof![
        3 => id().prop_map(serde_json::Value::from),
        3 => proptest::sample::select(
            "2.0 run.start message/send SendMessage SendStreamingMessage tasks/get GetTask tools/call initialize task \
             message status-update completed working TASK_STATE_FAILED TASK_STATE_WORKING input-required success error \
             pending interrupted interrupt rollback cancel run.created run.failed run_done synth:r:lc||failed HealthyBusy"
                .split_whitespace()
                .collect::<Vec<&str>>()
        )
        .prop_map(serde_json::Value::from),
        1 => any::<i64>().prop_map(serde_json::Value::from),
        1 => any::<bool>().prop_map(serde_json::Value::from),
        1 => Just(serde_json::Value::Null),
    ];
    let name = || {
        proptest::sample::select(
            "jsonrpc method id params result error code task taskId contextId status state kind final message messageId \
             statusUpdate artifactUpdate tenant thread_id run_id session_id run type event_id assistant_id agent_name input \
             app_name appName user_id userId sessionId new_message newMessage invocationId multitask_strategy \
             multitaskStrategy on_disconnect __error__ queue n_pending n_running requestId response conversation threadId \
             runId messages"
                .split_whitespace()
                .collect::<Vec<&str>>(),
        )
    };
    let document = value.prop_recursive(4, 24, 6, move |inner| {
        prop_oneof![
            8 => proptest::collection::vec((name(), inner.clone()), 0..6).prop_map(|members| {
                members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<serde_json::Value>()
            }),
            1 => proptest::collection::vec(inner, 0..4).prop_map(serde_json::Value::from),
        ]
    });
    (document, 0..8usize, any::<usize>()).prop_map(|(document, change, at)| {
        let mut text = document.to_string();
        let mut at = at % (text.len() + 1);
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        match change {
            0 => text.truncate(at),
            1 => text.insert(at, '"'),
            _ => {}
        }
        text
    })
}
