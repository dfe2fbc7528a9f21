//! Deploy: what is in deploy/ would be taken by the API server, is taken by `longhaul check`, and fits together.
//!
//! Manifests and the rendered chart are held against Kubernetes' own schemas, offline. The chart is rendered by
//! scripts/render-chart, with Helm; here its result is held against the chart's files.

#[path = "deploy/metrics.rs"]
mod metrics;
#[path = "deploy/objects.rs"]
mod objects;
#[path = "deploy/schema.rs"]
mod schema;
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use longhaul::config;
use objects::{Objects, Pod, files_in};
use schema::{Schemas, text};
use serde_json::Value;
use sha2::{Digest, Sha256};
use support::*;

const GRACE_VARIABLE: &str = "LONGHAUL_TERMINATION_GRACE_PERIOD";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every example, and the chart with each set of values.
fn all() -> Vec<Objects> {
    let examples = files_in(&root().join("deploy/kubernetes"), ".yaml");
    let charts = files_in(&root().join("tests/data/chart"), ".yaml");
    assert!(examples.len() >= 4 && charts.len() >= 4, "{examples:?} {charts:?}");
    examples.iter().chain(&charts).map(|path| Objects::read(path)).collect()
}

/// Pods that have longhaul in them.
fn proxies(objects: &Objects) -> Vec<Pod<'_>> {
    let pods: Vec<Pod> = Pod::all(objects).into_iter().filter(|pod| pod.container("longhaul").is_some()).collect();
    assert!(!pods.is_empty(), "{} deploys no longhaul", objects.name);
    pods
}

fn configuration<'a>(objects: &'a Objects, pod: &Pod) -> &'a str {
    let files = pod.projected_files("/etc/longhaul");
    let name = files.iter().find_map(|(from, _)| from.strip_prefix("configMap/")).expect("a ConfigMap");
    let map = objects.named("ConfigMap", name).unwrap_or_else(|| panic!("{}: no ConfigMap {name}", objects.name));
    text(&map["data"]["longhaul.yaml"])
}

#[test]
fn every_manifest_and_the_rendered_chart_fit_the_schemas() {
    let schemas = Schemas::load();
    for objects in all() {
        for object in &objects.list {
            let problems = schemas.problems(object);
            assert!(problems.is_empty(), "{}: {}", objects.name, problems.join("\n"));
        }
    }
}

#[test]
fn the_schemas_refuse_what_the_api_server_would() {
    let schemas = Schemas::load();
    let good = Objects::read(&root().join("deploy/kubernetes/sidecar.yaml")).named("Deployment", "support").cloned();
    let good = good.expect("a Deployment");
    assert_eq!(schemas.problems(&good), Vec::<String>::new());
    let refused = |change: &dyn Fn(&mut Value), what: &str| {
        let mut bad = good.clone();
        change(&mut bad);
        let problems = schemas.problems(&bad).join("\n");
        assert!(problems.contains(what), "expected {what:?}, got {problems:?}");
    };
    let pod = "/spec/template/spec";
    refused(&|bad| bad["spec"]["replcas"] = 3.into(), "spec.replcas: no such field");
    refused(&|bad| bad["spec"]["replicas"] = "3".into(), "is no \"integer\"");
    refused(&|bad| bad["apiVersion"] = "apps/v2".into(), "no schema for apps/v2/Deployment");
    refused(&|bad| drop(bad["spec"].as_object_mut().expect("a spec").remove("selector")), "spec: selector is missing");
    refused(
        &|bad| bad.pointer_mut(pod).expect("a pod")["containers"][0]["lifecyle"] = "x".into(),
        "containers[0].lifecyle: no such field",
    );
    refused(
        &|bad| bad.pointer_mut(pod).expect("a pod")["initContainers"][0]["env"][0]["value"] = 671.into(),
        "env[0].value: 671 is no \"string\"",
    );
}

/// kubectl reads them, and sees as many objects as are read here. (It asks a cluster for more than that.)
#[test]
fn kubectl_reads_every_manifest() {
    let files = [root().join("deploy/kubernetes"), root().join("tests/data/chart")];
    for file in files.iter().flat_map(|directory| files_in(directory, ".yaml")) {
        let local = ["label", "--local", "checked=yes", "--output=name", "--filename"];
        let Ok(output) = Command::new("kubectl").args(local).arg(&file).env("KUBECONFIG", "/dev/null").output() else {
            eprintln!("skipped: kubectl is not installed");
            return;
        };
        assert!(output.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
        let seen = String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.contains('/')).count();
        assert_eq!(seen, Objects::read(&file).list.len(), "{}", file.display());
    }
}

/// YAML 1.1, which Kubernetes reads, takes these for booleans; YAML 1.2, which is read here, for text.
#[test]
fn no_manifest_has_words_that_mean_other_things_to_kubernetes() {
    for objects in all() {
        let path = [root().join("deploy/kubernetes"), root().join("tests/data/chart")].map(|it| it.join(&objects.name));
        let path = path.iter().find(|path| path.exists()).expect("one of the two");
        for (number, line) in read(path).lines().enumerate() {
            let value = line.split('#').next().unwrap_or_default().rsplit(": ").next().unwrap_or_default();
            let value = value.trim().trim_end_matches(['}', ']']);
            let odd = ["on", "off", "yes", "no", "y", "n"].contains(&value.to_lowercase().as_str());
            assert!(!odd, "{}:{}: quote {value}", path.display(), number + 1);
        }
    }
}

/// The chart may have changed since it was rendered.
#[test]
fn the_rendered_chart_is_that_of_these_files() {
    let chart = root().join("deploy/helm/longhaul");
    let mut files = Vec::new();
    collect(&chart, &mut files);
    files.sort();
    let mut whole = Sha256::new();
    for file in &files {
        let name = file.strip_prefix(&chart).expect("within it").to_string_lossy().into_owned();
        whole.update([name.as_bytes(), b"\0", &std::fs::read(file).expect("readable"), b"\0"].concat());
    }
    let hash: String = whole.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    for rendered in files_in(&root().join("tests/data/chart"), ".yaml") {
        let first = read(&rendered).lines().next().unwrap_or_default().to_owned();
        assert!(first.ends_with(&hash), "{}: run scripts/render-chart", rendered.display());
    }
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { collect(&path, files) } else { files.push(path) }
    }
}

#[test]
fn every_configuration_passes_the_check() {
    for objects in all() {
        for pod in proxies(&objects) {
            let place = format!("{} {}", objects.name, pod.name());
            let directory = tempfile::tempdir().expect("a directory");
            put_secrets(directory.path(), &pod);
            let environment = pod.environment(pod.container("longhaul").expect("longhaul"));
            let checked = config::check(configuration(&objects, &pod), &place, directory.path(), &|name| {
                environment.get(name).cloned()
            });
            match checked {
                Ok(loaded) => assert_eq!(loaded.warnings, [], "{place}"),
                Err(problems) => {
                    // What is not built yet is refused in these words. Once it is, nothing is passed over here.
                    let wrong: Vec<String> = problems
                        .list
                        .iter()
                        .filter(|one| !one.message.contains("is not available yet"))
                        .map(|one| one.to_string())
                        .collect();
                    assert!(wrong.is_empty(), "{place}: {}", wrong.join("\n"));
                    eprintln!("{place}: waits for what is not available yet:\n{problems}");
                }
            }
        }
    }
}

/// The files that secrets bring, as real ones.
fn put_secrets(directory: &Path, pod: &Pod) {
    let made = rcgen::generate_simple_self_signed(vec!["longhaul.example".to_owned()]).expect("a valid name");
    for (_, path) in pod.projected_files("/etc/longhaul") {
        let Some(path) = path else { continue };
        let content = match path.rsplit('.').next() {
            Some("crt") => made.cert.pem(),
            Some("key") => made.signing_key.serialize_pem(),
            _ => "0123456789abcdef0123456789abcdef\n".to_owned(),
        };
        let file = directory.join(path);
        std::fs::create_dir_all(file.parent().expect("a directory")).expect("writable");
        std::fs::write(file, content).expect("writable");
    }
}

#[test]
fn pods_are_given_the_time_that_their_drain_may_take() {
    for objects in all() {
        for pod in proxies(&objects) {
            let place = format!("{} {}", objects.name, pod.name());
            let grace = pod.spec()["terminationGracePeriodSeconds"].as_u64().expect("a grace period");
            let (delay, timeout) = shutdown_of(configuration(&objects, &pod));
            let needed = delay.as_secs_f64() + 1.1 * timeout.as_secs_f64() + 1.0;
            assert!(grace as f64 >= needed, "{place}: {grace} s, and the drain may take {needed} s");
            let environment = pod.environment(pod.container("longhaul").expect("longhaul"));
            let told = environment.get(GRACE_VARIABLE).unwrap_or_else(|| panic!("{place}: no {GRACE_VARIABLE}"));
            assert_eq!(config::parse_duration(told), Ok(Duration::from_secs(grace)), "{place}: {GRACE_VARIABLE}");
        }
    }
}

#[tokio::test]
async fn check_and_run_say_where_the_grace_period_is_too_short() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("longhaul.yaml");
    let text = "listeners: [{address: \"127.0.0.1:0\"}]\nadmin: {address: \"127.0.0.1:0\"}\n\
                shutdown: {delay: 5s, timeout: 10m}\nroutes: [{respond: {status: 404}}]\n";
    std::fs::write(&path, text).expect("a file");
    let check = |grace: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
        let output = command.args(["check", "-c"]).arg(&path).env(GRACE_VARIABLE, grace).output().expect("the binary");
        assert!(output.status.success(), "a warning is no problem");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let short = check("30s");
    assert!(
        short.contains("longhaul.yaml:3:11: shutdown: warning: the process is killed 30s after SIGTERM"),
        "{short}"
    );
    assert!(short.contains("terminationGracePeriodSeconds to 666 or more"), "{short}");
    assert!(!check("666").contains("warning"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
    let program = Program::spawn(command.args(["run", "-c"]).arg(&path).env(GRACE_VARIABLE, "665s"));
    program.after("the process is killed 665s after SIGTERM").await;
}

/// `shutdown.delay` and `shutdown.timeout` of a configuration, which may ask for what is not available yet.
fn shutdown_of(configuration: &str) -> (Duration, Duration) {
    let mut alone = String::new();
    let mut lines = configuration.lines().skip_while(|line| !line.starts_with("shutdown:"));
    alone.extend(lines.next().map(|line| format!("{line}\n")));
    alone.extend(lines.take_while(|line| line.starts_with(' ')).map(|line| format!("{line}\n")));
    assert!(alone.contains("delay") && alone.contains("timeout"), "{configuration}");
    let text = format!("{}\n{alone}", "listeners: [{address: \"127.0.0.1:0\"}]\nroutes: [{respond: {status: 404}}]");
    let loaded = config::check(&text, "shutdown", Path::new("/"), &|_| None).unwrap_or_else(|error| panic!("{error}"));
    (loaded.config.shutdown.delay, loaded.config.shutdown.timeout)
}

/// One object names another: a wrong name is valid, and works not at all.
#[test]
fn names_lead_somewhere() {
    for objects in all() {
        let pods = Pod::all(&objects);
        let mut wrong = Vec::new();
        for deployment in &pods {
            let selector = &deployment.deployment["spec"]["selector"]["matchLabels"];
            check(deployment.has_labels(selector), &mut wrong, format!("{}: selector and labels", deployment.name()));
            for container in deployment.containers() {
                for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
                    if let Some(port) = container[probe]["httpGet"]["port"].as_str() {
                        check(deployment.ports().contains_key(port), &mut wrong, format!("{probe}: port {port}"));
                    }
                }
            }
            if let Some(account) = deployment.spec()["serviceAccountName"].as_str() {
                check(objects.named("ServiceAccount", account).is_some(), &mut wrong, format!("account {account}"));
            }
        }
        for service in objects.of("Service") {
            let chosen: Vec<&Pod> = pods.iter().filter(|pod| pod.has_labels(&service["spec"]["selector"])).collect();
            let name = text(&service["metadata"]["name"]);
            check(!chosen.is_empty(), &mut wrong, format!("service {name} selects nothing"));
            for port in service["spec"]["ports"].as_array().into_iter().flatten() {
                let target = text(&port["targetPort"]);
                let found = chosen.iter().all(|pod| pod.ports().contains_key(target));
                check(found, &mut wrong, format!("service {name}: port {target}"));
            }
        }
        for kind in ["PodDisruptionBudget", "NetworkPolicy"] {
            for object in objects.of(kind) {
                let spec = &object["spec"];
                let selector = spec.get("selector").or(spec.get("podSelector")).expect("a selector");
                let chosen = pods.iter().any(|pod| pod.has_labels(&selector["matchLabels"]));
                check(chosen, &mut wrong, format!("{kind} selects nothing"));
            }
        }
        for binding in objects.of("RoleBinding") {
            let role = text(&binding["roleRef"]["name"]);
            let known = role == "extension-apiserver-authentication-reader" || objects.named("Role", role).is_some();
            check(known, &mut wrong, format!("role {role}"));
        }
        for api in objects.of("APIService") {
            let name = text(&api["spec"]["service"]["name"]);
            check(objects.named("Service", name).is_some(), &mut wrong, format!("APIService: service {name}"));
        }
        for scaled in objects.of("ScaledObject") {
            let address = text(&scaled["spec"]["triggers"][0]["metadata"]["scalerAddress"]);
            let service = address.split('.').next().unwrap_or_default();
            check(objects.named("Service", service).is_some(), &mut wrong, format!("ScaledObject: {address}"));
        }
        // In the examples, which have agents too, what longhaul looks for is there.
        if objects.of("Namespace").next().is_some() {
            for pod in proxies(&objects) {
                for line in configuration(&objects, &pod).lines().filter(|line| line.contains("kubernetes: {")) {
                    let field = |name: &str| {
                        line.split(&format!("{name}: "))
                            .nth(1)
                            .map(|rest| rest.split([',', '}']).next().unwrap_or_default())
                    };
                    let Some(service) = field("service") else { continue };
                    let found = objects.named("Service", service).is_some_and(|service| {
                        let mut ports = service["spec"]["ports"].as_array().into_iter().flatten();
                        ports.any(|port| Some(text(&port["name"])) == field("port"))
                            && Some(text(&service["metadata"]["namespace"])) == field("namespace")
                    });
                    check(found, &mut wrong, format!("discovery: {}", line.trim()));
                }
            }
        }
        assert!(wrong.is_empty(), "{}: {}", objects.name, wrong.join("\n"));
    }
}

fn check(good: bool, wrong: &mut Vec<String>, what: String) {
    if !good {
        wrong.push(what);
    }
}

#[test]
fn the_proxy_s_container_may_do_nothing() {
    for objects in all() {
        for pod in proxies(&objects) {
            let longhaul = pod.container("longhaul").expect("longhaul");
            let security = &longhaul["securityContext"];
            let place = format!("{} {}", objects.name, pod.name());
            assert_eq!(security["readOnlyRootFilesystem"], true, "{place}");
            assert_eq!(security["runAsNonRoot"], true, "{place}");
            assert_eq!(security["allowPrivilegeEscalation"], false, "{place}");
            assert_eq!(security["capabilities"]["drop"][0], "ALL", "{place}");
            assert!(security["runAsUser"].as_u64().is_some_and(|user| user > 0), "{place}");
            for rule in objects.of("Role").chain(objects.of("ClusterRole")).flat_map(|role| role["rules"].as_array()) {
                for rule in rule {
                    let verbs = rule["verbs"].as_array().expect("verbs");
                    assert!(!verbs.contains(&"*".into()) && !verbs.contains(&"delete".into()), "{place}: {rule}");
                    assert_ne!(rule["resources"][0], "secrets", "{place}");
                }
            }
        }
    }
}

/// The agent beside a sidecar runs tools: it must not be able to rule its proxy.
#[test]
fn a_sidecar_s_admin_socket_is_its_own() {
    for (path, name) in [("deploy/kubernetes/sidecar.yaml", "support"), ("tests/data/chart/sidecar.yaml", "support")] {
        let objects = Objects::read(&root().join(path));
        let pods = proxies(&objects);
        let pod = &pods[0];
        assert_eq!(pod.name(), name);
        assert!(configuration(&objects, pod).contains("address: unix:/run/longhaul/admin.sock"), "{path}");
        let longhaul = pod.container("longhaul").expect("longhaul");
        assert_eq!(longhaul["restartPolicy"], "Always", "{path}: a native sidecar");
        assert!(pod.spec()["initContainers"].as_array().is_some_and(|list| list.contains(longhaul)), "{path}");
        for container in pod.containers().into_iter().filter(|container| container["name"] != "longhaul") {
            let mut mounts = container["volumeMounts"].as_array().into_iter().flatten();
            assert!(!mounts.any(|mount| mount["name"] == "run"), "{path}: the agent sees the admin socket");
        }
    }
}

/// How a sidecar's pod ends, with the very commands of the manifest: the agent's hook returns when the run has ended, not before.
#[tokio::test]
async fn a_sidecar_s_agent_is_stopped_after_its_runs() {
    let directory = tempfile::tempdir().expect("a directory");
    let backend = Backend::start().await;
    backend.drip_each();
    let admin = format!("unix:{}", directory.path().join("admin.sock").display());
    let text = format!(
        "listeners: [{{address: \"127.0.0.1:0\"}}]\nadmin: {{address: \"{admin}\", probes: {{address: \"127.0.0.1:0\"}}}}\n\
         shutdown: {{delay: 100ms, timeout: 20s}}\n\
         services: [{{name: agent, versions: [{{name: local, endpoints: [\"{}\"]}}]}}]\n",
        backend.url()
    );
    let path = directory.path().join("longhaul.yaml");
    std::fs::write(&path, text).expect("a file");
    let mut program = Program::start(&["run", "-c", path.to_str().expect("text")]);
    let listener = program.after("listening on ").await;
    let probes = program.after("probes listening on ").await;
    let mut client = RawClient::connect(address_in(&listener)).await;
    client.send("POST /run HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\ncontent-length: 2\r\n\r\n{}").await;
    let run = backend.drip().await;
    run.event("one").await;
    client.read_chunks_after_head("one").await;

    let objects = Objects::read(&root().join("deploy/kubernetes/sidecar.yaml"));
    let pods = proxies(&objects);
    let hook = |container: &str| -> Vec<String> {
        let command = &pods[0].container(container).expect("there")["lifecycle"]["preStop"]["exec"]["command"];
        command.as_array().expect("a command").iter().map(text_of).collect()
    };
    // Only places are other ones: where things listen here, and no sleep of eleven seconds.
    let drain: Vec<String> =
        hook("longhaul").iter().map(|word| word.replace("unix:/run/longhaul/admin.sock", &admin)).collect();
    assert_eq!(drain[0], "/usr/local/bin/longhaul");
    let wait: Vec<String> = hook("agent")
        .iter()
        .map(|word| word.replace("sleep 11", "sleep 0.2").replace("127.0.0.1:9900", &address_in(&probes).to_string()))
        .collect();
    let mut waiting = Command::new(&wait[0]).args(&wait[1..]).spawn().expect("sh");
    let drained = Command::new(env!("CARGO_BIN_EXE_longhaul")).args(&drain[1..]).status().expect("the binary");
    assert!(drained.success(), "the hook of the sidecar returns at once");
    // It has asked at least once by now, and was told that there is a run.
    program.after("listeners close").await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(waiting.try_wait().expect("a child").is_none(), "the agent would be stopped within its run");
    run.event("two").await;
    run.finish().await;
    assert!(client.read_to_end_of_body().await.contains("two"), "the run came to its end");
    eventually_within(Duration::from_secs(15), "the hook returns", || {
        waiting.try_wait().expect("a child").is_some_and(|status| status.success())
    })
    .await;
    assert!(program.ended().await.success(), "nothing was cut");
}

/// What a dashboard or an alert asks for has to be there: a wrong name is an empty panel and an alert that never fires.
#[test]
fn dashboards_and_alerts_ask_for_metrics_that_exist() {
    let promised = metrics::promised(&read(&root().join("docs/operations.md")));
    // What Prometheus adds to every series.
    let of_prometheus = ["__name__", "instance", "job", "namespace", "pod"];
    let mut files = files_in(&root().join("deploy/grafana"), ".json");
    files.extend(files_in(&root().join("deploy/prometheus"), ".yaml"));
    files.extend(["docs/hpa.md", "docs/deploy.md"].map(|file| root().join(file)));
    files.extend(files_in(&root().join("tests/data/chart"), ".yaml"));
    files.extend(files_in(&root().join("deploy/kubernetes"), ".yaml"));
    assert!(files.len() > 10, "{files:?}");
    for file in files {
        let text = read(&file).replace("\\\"", "\"");
        for (name, labels) in metrics::used(&text) {
            let place = file.display();
            let known = promised.get(&name).unwrap_or_else(|| panic!("{place}: there is no metric {name}"));
            for label in labels.iter().filter(|label| !of_prometheus.contains(&label.as_str())) {
                assert!(known.contains(label), "{place}: {name} has no label {label}");
            }
        }
        let all: std::collections::BTreeSet<&String> = promised.values().flatten().collect();
        for label in metrics::grouped_by(&text).iter().filter(|label| !of_prometheus.contains(&label.as_str())) {
            let plain = label.chars().all(|c| c.is_ascii_lowercase() || c == '_') && !label.is_empty();
            assert!(!plain || all.contains(label), "{}: no metric has the label {label}", file.display());
        }
    }
}

#[test]
fn panels_don_t_overlap_and_ask_something() {
    for file in files_in(&root().join("deploy/grafana"), ".json") {
        let dashboard: Value = serde_json::from_str(&read(&file)).expect("JSON");
        let panels = dashboard["panels"].as_array().expect("panels");
        assert!(panels.len() > 10);
        let mut taken = std::collections::HashSet::new();
        let mut numbers = std::collections::HashSet::new();
        for panel in panels {
            let title = text(&panel["title"]);
            assert!(numbers.insert(panel["id"].as_u64().expect("a number")), "{title}: its id is another's");
            let at = |name: &str| panel["gridPos"][name].as_u64().expect("a number");
            assert!(at("x") + at("w") <= 24, "{title}");
            for cell in (at("x")..at("x") + at("w")).flat_map(|x| (at("y")..at("y") + at("h")).map(move |y| (x, y))) {
                assert!(taken.insert(cell), "{title} lies on another panel");
            }
            let asks = panel["targets"].as_array().is_some_and(|all| all.iter().all(|one| one["expr"].is_string()));
            assert!(panel["type"] == "row" || asks, "{title} asks nothing");
        }
    }
}

/// Prometheus's own tool knows the language; alerts.test.yaml says when each alert fires and when it doesn't.
#[test]
fn alerts_and_panels_pass_promtool() {
    let directory = root().join("deploy/prometheus");
    let scratch = tempfile::tempdir().expect("a directory");
    let panels = scratch.path().join("panels.json");
    std::fs::write(&panels, queries_as_rules().to_string()).expect("writable");
    let panels = panels.to_str().expect("text");
    for arguments in
        [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts.test.yaml"], ["check", "rules", panels]]
    {
        let Ok(output) = Command::new("promtool").args(arguments).current_dir(&directory).output() else {
            eprintln!("skipped: promtool is not installed (on Debian: apt-get install prometheus)");
            return;
        };
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(output.status.success(), "promtool {}:\n{said}", arguments.join(" "));
    }
}

/// Every query of the dashboard as a rule, which is the form that promtool checks.
fn queries_as_rules() -> Value {
    let mut rules = Vec::new();
    for file in files_in(&root().join("deploy/grafana"), ".json") {
        let dashboard: Value = serde_json::from_str(&read(&file)).expect("JSON");
        let panels = dashboard["panels"].as_array().into_iter().flatten();
        for target in panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten()) {
            let query = text(&target["expr"]).replace("$__rate_interval", "5m").replace("$service", ".*");
            rules.push(serde_json::json!({"record": format!("query:{}", rules.len()), "expr": query}));
        }
    }
    assert!(rules.len() > 30, "{} queries", rules.len());
    serde_json::json!({"groups": [{"name": "panels", "rules": rules}]})
}

/// An alert that no test makes fire may never fire.
#[test]
fn every_alert_is_tested() {
    let alerts = read(&root().join("deploy/prometheus/alerts.yaml"));
    let tests = read(&root().join("deploy/prometheus/alerts.test.yaml"));
    let names: Vec<&str> = alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() > 8);
    for name in names {
        assert!(tests.contains(&format!("alertname: {name},")), "nothing says when {name} is silent");
        assert!(tests.contains(&format!("- alertname: {name}\n")), "nothing makes {name} fire");
    }
}

#[test]
fn the_autoscalers_behave_as_the_document_recommends() {
    let document = read(&root().join("docs/hpa.md"));
    let block = document.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a block of YAML");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("behavior.yaml");
    std::fs::write(&file, block).expect("writable");
    let recommended = Objects::read(&file).list[0]["behavior"].clone();
    let mut seen = 0;
    for objects in all() {
        for scaler in objects.of("HorizontalPodAutoscaler") {
            assert_eq!(scaler["spec"]["behavior"], recommended, "{}", objects.name);
            seen += 1;
        }
        for scaled in objects.of("ScaledObject") {
            let behavior = &scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"];
            assert_eq!(*behavior, recommended, "{}", objects.name);
            seen += 1;
        }
    }
    assert!(seen >= 4, "{seen} autoscalers");
}

/// No image is built here (that takes a registry): what can be known without is checked.
#[test]
fn the_dockerfile_fits_the_program_and_the_repository() {
    let dockerfile = read(&root().join("deploy/docker/Dockerfile"));
    let joined = dockerfile.replace("\\\n", " ");
    let lines: Vec<&str> =
        joined.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let last_from = lines.iter().rposition(|line| line.starts_with("FROM ")).expect("a stage");
    let of = |instruction: &str| -> Vec<String> {
        let lines = lines[last_from..].iter().filter_map(|line| line.strip_prefix(instruction));
        lines.map(|rest| rest.trim().to_owned()).collect()
    };
    let user = of("USER ").pop().expect("a user");
    let numeric = user.split(':').all(|part| part.parse::<u32>().is_ok_and(|number| number > 0));
    assert!(numeric, "{user}: Kubernetes can tell only of a number that it is not root");
    assert_eq!(of("ENTRYPOINT "), ["[\"/usr/local/bin/longhaul\"]"]);
    assert!(of("COPY ").iter().any(|copy| copy.ends_with("/longhaul /usr/local/bin/longhaul")));
    for name in ["HEALTHCHECK", "CMD"] {
        let line = of(&format!("{name} ")).pop().unwrap_or_else(|| panic!("no {name}"));
        let words: Vec<String> = serde_json::from_str(&line[line.find('[').expect("a list")..]).expect("a JSON list");
        let command = words.iter().find(|word| !word.starts_with('/')).expect("a command of the program");
        let known =
            Command::new(env!("CARGO_BIN_EXE_longhaul")).args([command, "--help"]).output().expect("the binary");
        assert!(known.status.success(), "{name}: longhaul has no command {command}");
    }
    // What is copied from here is here, and is not kept out.
    let ignored = read(&root().join(".dockerignore"));
    for copy in lines.iter().filter_map(|line| line.strip_prefix("COPY ")).filter(|copy| !copy.starts_with("--from")) {
        let mut words: Vec<&str> = copy.split_whitespace().collect();
        words.pop();
        for source in words {
            assert!(root().join(source).exists(), "{source} is copied and not there");
            assert!(ignored.lines().any(|line| line == format!("!{source}")), "{source} is copied and ignored");
        }
    }
    let cargo = read(&root().join("Cargo.toml"));
    let rust =
        cargo.lines().find_map(|line| line.strip_prefix("rust-version = ")).expect("a version").trim_matches('"');
    assert!(lines.contains(&format!("ARG RUST={rust}").as_str()), "the image is not built with Rust {rust}");
    if let Ok(output) = Command::new("hadolint").arg(root().join("deploy/docker/Dockerfile")).output() {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

fn address_in(line: &str) -> std::net::SocketAddr {
    let words = line.split(|c: char| !(c.is_ascii_digit() || ".:[]".contains(c)));
    words.filter_map(|word| word.parse().ok()).next().unwrap_or_else(|| panic!("no address in {line:?}"))
}

fn text_of(value: &Value) -> String {
    text(value).to_owned()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
