//! What recording costs on the way of a request, and what a scrape or an access log line costs beside it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use divan::{Bencher, black_box};
use longhaul::config::{Log, LogFormat, LogLevel, SessionIds};
use longhaul::error::Code;
use longhaul::logging::{AccessLine, AccessLog};
use longhaul::metrics::{Metrics, Scrape, ScrapedEndpoint, ScrapedService, ScrapedVersion};

fn main() {
    divan::main();
}

#[divan::bench(threads = [1, 2])]
fn record_request(bencher: Bencher) {
    let route = Metrics::new().route("public", "/support/**");
    bencher.bench(|| route.record(black_box(200), black_box(None)));
}

#[divan::bench]
fn record_refusal(bencher: Bencher) {
    let route = Metrics::new().route("public", "/support/**");
    bencher.bench(|| route.record(black_box(503), black_box(Some(Code::NoEndpoint))));
}

#[divan::bench]
fn observe_duration(bencher: Bencher) {
    let version = Metrics::new().version("support", "stable");
    bencher.bench(|| version.run_duration_seconds.observe(black_box(12.5)));
}

/// 10 services of 2 versions of 25 endpoints.
#[divan::bench]
fn render(bencher: Bencher) {
    let metrics = Metrics::new();
    let version = |service: usize, name: &str| ScrapedVersion {
        name: name.to_owned(),
        endpoints: (0..25)
            .map(|index| ScrapedEndpoint {
                address: format!("10.0.{service}.{index}:8000"),
                state: "ready",
                outstanding_runs: 3,
                sessions: 0,
                empty_in_seconds: [None; 2],
            })
            .collect(),
        ..ScrapedVersion::default()
    };
    let services = (0..10).map(|index| {
        let name = format!("service-{index}");
        let _ = (metrics.version(&name, "stable"), metrics.service(&name));
        ScrapedService {
            name,
            versions: vec![version(index, "stable"), version(index, "canary")],
            ..ScrapedService::default()
        }
    });
    let scrape = Scrape { services: services.collect(), ..Scrape::default() };
    bencher.bench(|| metrics.render(black_box(&scrape)));
}

#[divan::bench(args = [LogFormat::Text, LogFormat::Json])]
fn access_line(bencher: Bencher, format: LogFormat) {
    let log = Log { level: LogLevel::Info, format, access: true, session_ids: SessionIds::Hashed };
    let dropped = Metrics::new().access_log_dropped();
    let access_log = Arc::new(AccessLog::to(std::io::sink(), &log, dropped));
    let line = AccessLine {
        time: SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_420_714),
        client: Some([192, 0, 2, 7].into()),
        method: Some("POST"),
        path: Some("/support/runs"),
        status: 200,
        code: None,
        outcome: Some("completed"),
        service: Some("support"),
        version: Some("stable"),
        endpoint: Some("10.0.0.11:8000"),
        affinity: "hit",
        session: Some("thread-1"),
        run: None,
        queue: None,
        first_event: Some(Duration::from_millis(41)),
        events: 12,
        bytes_in: 310,
        bytes_out: 2048,
        duration: Duration::from_secs(3),
    };
    bencher.bench(|| access_log.write(black_box(&line)));
}
