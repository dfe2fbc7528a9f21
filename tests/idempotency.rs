//! Idempotency: a start that is made again starts nothing and is answered with the first one's answer.

mod support;

use std::time::Duration;

use futures_util::future::join_all;
use support::{Backend, Counting, Http2Client, Proxy, Script, eventually, http2_request, post, start_proxy};

fn config(url: &str, more: &str) -> String {
    format!(
        "services:\n  - name: agents\n    agent_protocol: http\n    runs: {{idempotency: {{keep: 10s}}{more}}}\n    \
         versions: [{{name: stable, endpoints: [\"{url}\"]}}]\n"
    )
}

fn start(key: &str, headers: &str, body: &str) -> String {
    format!(
        "POST /run HTTP/1.1\r\nHost: agents.test\r\nIdempotency-Key: {key}\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    )
}

async fn repeat(proxy: &Proxy, key: &str, headers: &str, body: &str) -> support::Response {
    support::fetch(proxy.address, start(key, headers, body)).await
}

#[tokio::test]
async fn debug_fields_are_not_kept_for_those_who_repeat() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&config(backend.url(), "")).await;
    let first = repeat(&proxy, "a", "longhaul-debug: 1\r\n", "{}").await;
    assert_eq!(first.header("longhaul-version"), Some("stable"));
    let again = repeat(&proxy, "a", "", "{}").await;
    assert_eq!(again.header("longhaul-run-id"), first.header("longhaul-run-id"));
    assert_eq!((again.header("longhaul-version"), again.header("longhaul-endpoint")), (None, None));
}

/// 100 clients lose their connection in the middle of the answer (or before it) and start again.
#[tokio::test]
async fn a_hundred_starts_are_repeated_after_a_cut_and_run_once() {
    const CLIENTS: usize = 100;
    let backend = Counting::start();
    let proxy = start_proxy(&config(&backend.url(), "")).await;
    let begun = longhaul::ids::now();
    let clients = (0..CLIENTS).map(|number| {
        let (proxy, backend) = (&proxy, &backend);
        async move {
            let headers = format!("X-Name: {number}\r\nX-Session: s{number}\r\nX-Microseconds: held\r\n");
            let mut first = proxy.connect().await;
            first.send(start(&number.to_string(), &headers, "{}")).await;
            match number % 3 {
                0 => drop(first.read_chunks_after_head("begin").await),
                1 => {
                    let seen = || backend.seen().iter().any(|run| run.name == number.to_string());
                    eventually("the backend has it", seen).await;
                }
                // As soon as it was sent.
                _ => {}
            }
            drop(first);
            let again = async {
                // Every other one reads live, the others once the run has ended.
                if number % 2 == 0 {
                    backend.release(&format!("s{number}"));
                }
                repeat(proxy, &number.to_string(), &headers, "{}").await
            };
            let release = async {
                tokio::time::sleep(Duration::from_millis(30)).await;
                backend.release(&format!("s{number}"));
            };
            tokio::join!(again, release).0
        }
    });
    let answers = join_all(clients).await;
    let whole = answers.iter().enumerate().filter(|(number, answer)| {
        let text = answer.text();
        let is_its_own = text.contains(&format!("begin {number}\n")) && text.contains(&format!("end {number}\n"));
        answer.status() == 200 && !answer.truncated && is_its_own
    });
    let whole = whole.count();
    println!(
        "{CLIENTS} starts repeated: {} runs at the backend, {whole} whole answers, in {:?}",
        backend.seen().len(),
        begun.elapsed()
    );
    assert_eq!((backend.seen().len(), whole), (CLIENTS, CLIENTS));
    proxy.metric_becomes("longhaul_outstanding_runs", &[], 0.0).await;
    proxy.metric_becomes("longhaul_runs_total", &["outcome=\"completed\""], CLIENTS as f64).await;
}

#[tokio::test]
async fn a_finished_answer_is_given_again_to_the_same_caller_alone() {
    let backend = Backend::start().await;
    let mut count = 0;
    backend.each(move |_| {
        count += 1;
        Script::answer(201, &[("x-count", &count.to_string()), ("content-type", "application/json")], "{\"done\":true}")
    });
    let proxy = start_proxy(&config(backend.url(), "")).await;
    let first = repeat(&proxy, "k", "Authorization: a\r\n", "{\"x\":1}").await;
    let again = repeat(&proxy, "k", "Authorization: a\r\n", "{\"x\":1}").await;
    assert_eq!((first.status(), first.header("x-count")), (201, Some("1")));
    assert_eq!((again.status(), again.header("x-count"), again.text()), (201, Some("1"), first.text()));
    assert_eq!(again.header("longhaul-run-id"), first.header("longhaul-run-id"));
    let other_body = repeat(&proxy, "k", "Authorization: a\r\n", "{\"x\":2}").await;
    assert_eq!((other_body.status(), other_body.code().as_deref()), (422, Some("idempotency_conflict")));
    for (key, headers) in
        [("k", "Authorization: b\r\n"), ("k", "Authorization: a\r\nCookie: b=1\r\n"), ("l", "Authorization: a\r\n")]
    {
        let other = repeat(&proxy, key, headers, "{\"x\":1}").await;
        assert_ne!(other.header("x-count"), Some("1"), "{key} {headers}");
    }
    assert_eq!(backend.requests().len(), 4);
    let without = post(proxy.address, "/run", "Authorization: a\r\n", "{\"x\":1}").await;
    assert_eq!(without.header("x-count"), Some("5"), "a start without a key is one of its own");
    // Over HTTP/2 as well.
    let client = Http2Client::connect(proxy.address).await;
    let mut request = http2_request("POST", proxy.address, "/run");
    request.headers_mut().insert("idempotency-key", "k".parse().expect("a value"));
    request.headers_mut().insert("authorization", "a".parse().expect("a value"));
    let again = client.fetch(request, b"{\"x\":1}").await;
    assert_eq!((again.status(), again.text()), (201, first.text()));
}

#[tokio::test]
async fn what_was_not_answered_is_tried_anew_and_what_is_too_long_is_not_kept() {
    let backend = Backend::start().await;
    let proxy = start_proxy(&config(backend.url(), "")).await;
    backend.next(Script::status(503));
    assert_eq!(repeat(&proxy, "a", "", "{}").await.status(), 503);
    assert_eq!(repeat(&proxy, "a", "", "{}").await.status(), 200, "its endpoint asked to come again");
    backend.next(Script::raw("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"));
    assert!(repeat(&proxy, "b", "", "{}").await.truncated);
    assert_eq!(repeat(&proxy, "b", "", "{}").await.text(), "ok", "it broke off");
    backend.next(Script::ok(&"x".repeat(2 << 20)));
    let long = repeat(&proxy, "c", "", "{}").await;
    assert_eq!((long.status(), long.body.len()), (200, 2 << 20));
    let again = repeat(&proxy, "c", "", "{}").await;
    assert_eq!((again.status(), again.code().as_deref()), (409, Some("idempotency_conflict")));
    assert_eq!(again.header("longhaul-run-id"), long.header("longhaul-run-id"));
}
