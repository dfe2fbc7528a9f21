//! Sources: endpoints that are found rather than listed: the addresses of a name, the pods of a service.

use std::net::IpAddr;
use std::time::Duration;

use serde_json::json;

use super::read::{Kind, block};
use super::values::{parse_duration, port, show_duration, text};
use super::yaml::quote;
use super::{DnsSource, KubernetesSource, PodPort};

/// Whoever asks more often asks in vain: answers are not that fresh.
const REFRESH_MIN: Duration = Duration::from_millis(100);
/// What is older says nothing any more.
const REFRESH_MAX: Duration = Duration::from_secs(24 * 3600);
/// RFC 1035 section 2.3.4, without the final dot.
const NAME_CHARACTERS_MAX: usize = 253;
const LABEL_CHARACTERS_MAX: usize = 63;

/// `{name: agents.svc, port: 8000, refresh: 5s}`
pub fn dns() -> Kind<'static, DnsSource> {
    block("{name: agents.svc, port: 8000, refresh: 5s}", |block| {
        let about = "The name to resolve; one that begins with `_` has SRV records.";
        let name = block.required("name", about, dns_name());
        let port = block.optional("port", "The port of every address; SRV records have their own.", port());
        let refresh =
            block.key("refresh", "How long an answer holds at most; less where its TTL says so.", refresh(), "5s");
        let is_service = name.as_ref().is_some_and(|name| name.starts_with('_'));
        match (port, is_service) {
            (Some(_), true) => block.warning("port", "the SRV records have the ports; this one has no effect"),
            (None, false) if name.is_some() && !block.has("port") => {
                block.problem("", "`port` is missing: addresses have none; only SRV records (names with `_`) do");
            }
            _ => {}
        }
        Some(DnsSource { port: port.filter(|_| !is_service), name: name?, refresh })
    })
}

/// `{namespace: agents, service: support, port: http}`
pub fn kubernetes() -> Kind<'static, KubernetesSource> {
    block("{namespace: agents, service: support, port: http}", |block| {
        let about = "null: that of the pod, or of the kubeconfig's context.";
        let namespace = block.optional("namespace", about, label("a namespace"));
        let service = block.required("service", "The service's name.", label("a service"));
        let port = block.required(
            "port",
            "The name of a port of the service, or the number of a port of its pods.",
            pod_port(),
        );
        if !cfg!(feature = "kubernetes") {
            block.problem(
                "",
                "this longhaul was built without the feature `kubernetes`; take one that has it, or use `dns`",
            );
        }
        Some(KubernetesSource { namespace, service: service?, port: port? })
    })
}

fn refresh() -> Kind<'static, Duration> {
    Kind::scalar(
        "a duration such as 5s",
        || json!({"type": "string"}),
        |_, scalar| {
            let refresh = parse_duration(&scalar.text)?;
            if (REFRESH_MIN..=REFRESH_MAX).contains(&refresh) {
                return Ok(refresh);
            }
            let (least, most) = (show_duration(REFRESH_MIN), show_duration(REFRESH_MAX));
            Err(format!("{} is out of bounds; from {least} to {most}", quote(&scalar.text)))
        },
        |refresh| json!(show_duration(*refresh)),
    )
}

fn dns_name() -> Kind<'static, String> {
    text().checked(|name| {
        if name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
            return Err(format!("{} is an address already; list it: http://{name}:8000", quote(name)));
        }
        let bare = name.strip_suffix('.').unwrap_or(name);
        let good = |label: &str| {
            (1..=LABEL_CHARACTERS_MAX).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        match bare.len() <= NAME_CHARACTERS_MAX && bare.split('.').all(good) {
            true => Ok(()),
            false => {
                Err(format!("{} is not a name that DNS has, such as agents.svc (without scheme and port)", quote(name)))
            }
        }
    })
}

/// RFC 1123 section 2.1, in the form of Kubernetes: lower case.
fn is_label(text: &str) -> bool {
    (1..=LABEL_CHARACTERS_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn label(what: &'static str) -> Kind<'static, String> {
    text().checked(move |text| match is_label(text) {
        true => Ok(()),
        false => Err(format!(
            "{} can't be the name of {what}: 1 to 63 lower case letters, digits and `-`, such as agents",
            quote(text)
        )),
    })
}

fn pod_port() -> Kind<'static, PodPort> {
    Kind::scalar(
        "a port such as http or 8000",
        || json!({"type": ["string", "integer"], "minimum": 1, "maximum": 65535}),
        |_, scalar| {
            let text = scalar.text.as_str();
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            match text.parse::<u16>() {
                Ok(number) if digits && number > 0 => Ok(PodPort::Number(number)),
                _ if digits => Err(format!("a port is a number from 1 to 65535, found {text}")),
                _ if is_label(text) => Ok(PodPort::Name(text.to_owned())),
                _ => Err(format!("{} is neither a port's name nor its number, such as http or 8000", quote(text))),
            }
        },
        |port| match port {
            PodPort::Name(name) => json!(name),
            PodPort::Number(number) => json!(number),
        },
    )
}
