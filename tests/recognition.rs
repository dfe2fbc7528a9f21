//! Recognition: whatever bodies and streams hold, they pass unchanged, and what can't be read is plain HTTP.

mod support;

use support::{Backend, Body, Proxy, Script, Step, get, post, start_proxy};

async fn auto(backends: &[&Backend], more: &str) -> Proxy {
    let urls: Vec<String> = backends.iter().map(|backend| format!("\"{}\"", backend.url())).collect();
    let versions = format!("    versions: [{{name: stable, endpoints: [{}]}}]\n", urls.join(", "));
    start_proxy(&format!("services:\n  - name: agents\n{versions}{more}")).await
}

const JSON: &str = "Content-Type: application/json\r\n";

#[tokio::test]
async fn every_body_passes_unchanged_whatever_a_recogniser_makes_of_it() {
    let backend = Backend::start().await;
    backend.each(|_| Script::ok("{}"));
    let proxy = auto(&[&backend], "").await;
    let long = "x".repeat(1 << 20);
    let bodies: Vec<Vec<u8>> = vec![
        br#"{"threadId":"a","runId":"b","messages":["#.to_vec(),
        br#"{"threadId":"a","threadId":"b","runId":"c","messages":[]}"#.to_vec(),
        format!(r#"{{"threadId":"{long}","runId":"{long}","messages":[]}}"#).into_bytes(),
        b"{\"jsonrpc\":\"2.0\",\"id\":\"\xff\xfe\",\"method\":\"tools/call\"}".to_vec(),
        format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)).into_bytes(),
        b"\0\0\0".to_vec(),
        b"".to_vec(),
        br#"[{"jsonrpc":"2.0","id":1,"method":"tools/call"},{"jsonrpc":"2.0","id":"1","method":"tools/call"}]"#
            .to_vec(),
    ];
    for (number, body) in bodies.iter().enumerate() {
        let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
        let mut client = proxy.connect().await;
        let head = format!("POST /agent HTTP/1.1\r\nHost: a\r\n{JSON}Content-Length: {}\r\n\r\n", body.len());
        client.send(head).await;
        client.send(body).await;
        assert_eq!(client.read_response().await.status(), 200, "{}", text(body));
        let request = backend.request(number + 1).await;
        assert!(request.body == *body, "{} became {}", text(body), text(&request.body));
    }
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
}

#[tokio::test]
async fn every_event_stream_passes_unchanged_whatever_its_line_ends() {
    let huge = format!("data: {{\"type\":\"RUN_STARTED\",\"x\":\"{}\"}}\n\n", "y".repeat(8 << 20));
    let streams: Vec<Vec<u8>> = vec![
        b"data: {\"type\":\"RUN_STARTED\"}\n\ndata: {\"type\":\"RUN_FINISHED\"}\n\n".to_vec(),
        b"data: {\"type\":\"RUN_STARTED\"}\r\n\r\ndata: {\"type\":\"RUN_FINISHED\"}\r\n\r\n".to_vec(),
        b"data: {\"type\":\"RUN_STARTED\"}\r\rdata: {\"type\":\"RUN_FINISHED\"}\r\r".to_vec(),
        b"data: {\"type\":\"RUN_STARTED\"}\r\ndata\rid: 7\n\r\nevent: x\n\ndata: {\"type\":\"RUN_FINISHED\"}\n\r\n"
            .to_vec(),
        b"\xef\xbb\xbfdata: \xff\xfe\n\n: comment\n\ndata: {\"type\":\"RUN_FINISHED\"}\nid: after\n\n".to_vec(),
        [huge.as_bytes(), b"data: {\"type\":\"RUN_FINISHED\"}\n\n"].concat(),
    ];
    for stream in streams {
        let backend = Backend::start().await;
        let sent = stream.clone();
        backend.each(move |_| {
            let headers = vec![("content-type".to_owned(), "text/event-stream".to_owned())];
            let mut steps = vec![Step::ReadBody, Step::Head { status: 200, headers, body: Body::Chunked }];
            steps.extend(sent.chunks(100_000).map(|piece| Step::Data(piece.to_vec())));
            steps.push(Step::End);
            Script(steps)
        });
        let proxy = auto(&[&backend], "    agent_protocol: ag-ui\n").await;
        let body = r#"{"threadId":"t","runId":"r","messages":[]}"#;
        let answer = post(proxy.address, "/agent", JSON, body).await;
        assert!(answer.body == stream, "{:?}", String::from_utf8_lossy(&stream[..stream.len().min(200)]));
        proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\""], 1.0).await;
    }
}

#[tokio::test]
async fn a_failure_inside_a_200_is_a_failure() {
    let backend = Backend::start().await;
    backend.each(|_| {
        Script::answer(
            200,
            &[("content-type", "text/event-stream")],
            "data: {\"id\":\"c\"}\n\ndata: {\"error\":{\"message\":\"boom\"}}\n\n",
        )
    });
    let proxy = auto(&[&backend], "").await;
    let answer = post(proxy.address, "/v1/chat/completions", JSON, r#"{"stream":true}"#).await;
    assert_eq!(answer.status(), 200);
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"failed\""], 1.0).await;
}

#[tokio::test]
async fn errors_of_ours_come_in_the_callers_form() {
    let proxy = auto(&[], "").await;
    let call = r#"{"jsonrpc":"2.0","id":"7","method":"tools/call","params":{"name":"x"}}"#;
    let mcp = format!("{JSON}Accept: application/json, text/event-stream\r\nMCP-Protocol-Version: 2025-11-25\r\n");
    let answer = post(proxy.address, "/mcp", &mcp, call).await;
    assert_eq!(answer.status(), 503);
    let body = answer.json();
    assert_eq!(
        (body["id"].as_str(), body["error"]["data"]["code"].as_str()),
        (Some("7"), Some("no_endpoint")),
        "{body}"
    );
    let answer = post(proxy.address, "/v1/chat/completions", JSON, r#"{"model":"m"}"#).await;
    assert_eq!((answer.status(), answer.json()["error"]["code"].as_str()), (503, Some("no_endpoint")));
    let anthropic = format!("{JSON}anthropic-version: 2023-06-01\r\n");
    let answer = post(proxy.address, "/v1/messages", &anthropic, r#"{"model":"m"}"#).await;
    assert_eq!((answer.status(), answer.json()["type"].as_str()), (503, Some("error")));
    // Whoever has no form of its own gets the problem.
    let answer = get(proxy.address, "/", "").await;
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
}

#[tokio::test]
async fn a_body_that_nobody_reads_is_refused_in_the_callers_form_too() {
    let backend = Backend::start().await;
    let listener = "listeners: [{address: \"127.0.0.1:0\", limits: {max_body_bytes: 1KiB}}]\n";
    let versions = format!("    versions: [{{name: stable, endpoints: [\"{}\"]}}]\n", backend.url());
    let proxy = start_proxy(&format!("{listener}services:\n  - name: agents\n{versions}")).await;
    let long = format!(r#"{{"model":"m","x":"{}"}}"#, "x".repeat(2_000));
    let answer = post(proxy.address, "/v1/chat/completions", JSON, &long).await;
    assert_eq!((answer.status(), answer.json()["error"]["code"].as_str()), (413, Some("body_too_large")));
    let anthropic = format!("{JSON}anthropic-version: 2023-06-01\r\n");
    let answer = post(proxy.address, "/v1/messages", &anthropic, &long).await;
    assert_eq!((answer.status(), answer.json()["error"]["code"].as_str()), (413, Some("body_too_large")));
    let mcp = format!("{JSON}MCP-Protocol-Version: 2025-11-25\r\n");
    let answer = post(proxy.address, "/mcp", &mcp, &long).await;
    let body = answer.json();
    assert_eq!(
        (body["jsonrpc"].as_str(), body["error"]["data"]["code"].as_str()),
        (Some("2.0"), Some("body_too_large"))
    );
    let answer = post(proxy.address, "/", JSON, &long).await;
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    assert_eq!(backend.request_count(), 0);
}

#[tokio::test]
async fn an_agent_card_leads_through_the_proxy() {
    let backend = Backend::start().await;
    let url = backend.url().to_owned();
    let card = format!(r#"{{"name":"agent","url":"{url}/rpc","capabilities":{{}}}}"#);
    backend.each(move |_| Script::answer(200, &[("content-type", "application/json"), ("etag", "\"1\"")], &card));
    let routes = "routes: [{match: {path: /agents/**}, service: agents, strip_prefix: /agents}]\n";
    let versions = format!("    versions: [{{name: stable, endpoints: [\"{}\"]}}]\n", backend.url());
    let proxy = start_proxy(&format!("{routes}services:\n  - name: agents\n{versions}")).await;
    let answer = get(proxy.address, "/agents/.well-known/agent-card.json", "").await;
    let body = answer.json();
    let shown = body["url"].as_str().expect("a URL");
    assert!(shown.ends_with("/agents/rpc") && !shown.contains(&backend.url()[7..]), "{shown}");
    assert_eq!(answer.header("etag"), None);
}

#[tokio::test]
async fn the_endpoint_event_of_mcp_leads_through_the_proxy() {
    let backend = Backend::start().await;
    backend.each(|request| match request.method.as_str() {
        "GET" => {
            let headers = vec![("content-type".to_owned(), "text/event-stream".to_owned())];
            Script(vec![
                Step::Head { status: 200, headers, body: Body::Chunked },
                Step::Data(b"event: endpoint\r\ndata: /messages/?session_id=abc\r\n\r\n".to_vec()),
                Step::Data(b"event: message\r\ndata: {}\r\n\r\n".to_vec()),
                Step::End,
            ])
        }
        _ => Script::status(202),
    });
    let routes = "routes: [{match: {path: /tools/**}, service: agents, strip_prefix: /tools}]\n";
    let versions =
        format!("    versions: [{{name: stable, endpoints: [\"{}\"]}}]\n    agent_protocol: mcp\n", backend.url());
    let proxy = start_proxy(&format!("{routes}services:\n  - name: agents\n{versions}")).await;
    let answer = get(proxy.address, "/tools/sse", "Accept: text/event-stream\r\n").await;
    let expected = "event: endpoint\r\ndata: /tools/messages/?session_id=abc\r\n\r\nevent: message\r\ndata: {}\r\n\r\n";
    assert_eq!(answer.text(), expected);
}

#[tokio::test]
async fn an_mcp_session_whose_endpoint_is_gone_is_told_so_and_is_not_moved() {
    let (first, second) = (Backend::start().await, Backend::start().await);
    for (backend, id) in [(&first, "one"), (&second, "two")] {
        backend.each(move |request| {
            let json = |headers: &[(&str, &str)], body: &str| Script::answer(200, headers, body);
            let begins = request.header("mcp-session-id").is_none();
            let headers = [("content-type", "application/json"), ("mcp-session-id", id)];
            json(if begins { &headers } else { &headers[..1] }, r#"{"jsonrpc":"2.0","id":1,"result":{}}"#)
        });
    }
    let proxy = auto(&[&first, &second], "    agent_protocol: mcp\n").await;
    let accept = format!("{JSON}Accept: application/json, text/event-stream\r\n");
    let begin = r#"{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25"}}"#;
    let begun = post(proxy.address, "/mcp", &accept, begin).await;
    let session = begun.header("mcp-session-id").expect("a session").to_owned();
    let (home, other) = if session == "one" { (&first, &second) } else { (&second, &first) };
    let call = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x"}}"#;
    let headers = format!("{accept}Mcp-Session-Id: {session}\r\nMCP-Protocol-Version: 2025-11-25\r\n");
    let answer = post(proxy.address, "/mcp", &headers, call).await;
    assert_eq!((answer.status(), answer.header("longhaul-affinity")), (200, Some("hit")));
    assert_eq!(proxy.drain("agents", &home.address().to_string(), false).await.status(), 200);
    let answer = post(proxy.address, "/mcp", &headers, call).await;
    assert_eq!((answer.status(), answer.header("longhaul-affinity")), (404, Some("moved")), "{}", answer.text());
    assert_eq!(answer.json()["id"], 1);
    assert_eq!(other.request_count(), 0, "it knows nothing of that session");
    let again = post(proxy.address, "/mcp", &accept, begin).await;
    assert_eq!((again.status(), other.request_count()), (200, 1));
}
