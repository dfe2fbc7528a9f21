//! Answer: what the external metrics API says: discovery documents, values, and errors as Kubernetes writes them.

use std::collections::HashMap;
use std::time::SystemTime;

use axum::extract::Query;
use http::{Method, StatusCode, Uri};
use serde_json::{Value, json};

use crate::logging;
use crate::scaling::Load;
use crate::scaling::load::Metric;
use crate::scaling::quantity::quantity;
use crate::scaling::selector::Selector;

const GROUP: &str = "external.metrics.k8s.io";
const GROUP_VERSION: &str = "external.metrics.k8s.io/v1beta1";

/// What is asked.
#[derive(Debug, PartialEq)]
pub enum Asked {
    /// A document that is always the same.
    Document(Value),
    /// A metric's values.
    Values { metric: Metric, selector: Selector },
    /// Nothing that there is.
    Wrong(StatusCode, String),
}

impl Asked {
    pub fn of(method: &Method, uri: &Uri) -> Asked {
        let path: Vec<&str> = uri.path().trim_matches('/').split('/').collect();
        let asked = match path.as_slice() {
            ["apis"] => Asked::Document(groups()),
            ["apis", GROUP] => Asked::Document(group("v1")),
            ["apis", GROUP, "v1beta1"] => Asked::Document(resources()),
            ["apis", GROUP, "v1beta1", "namespaces", _, metric] => values(metric, uri),
            _ => return Asked::Wrong(StatusCode::NOT_FOUND, format!("there is nothing at {}", uri.path())),
        };
        match *method {
            Method::GET | Method::HEAD => asked,
            _ => Asked::Wrong(StatusCode::METHOD_NOT_ALLOWED, "metrics can only be read".to_owned()),
        }
    }
}

fn values(name: &str, uri: &Uri) -> Asked {
    let Some(metric) = Metric::ALL.into_iter().find(|metric| metric.name() == name) else {
        let known = Metric::ALL.map(Metric::name).join(", ");
        return Asked::Wrong(StatusCode::NOT_FOUND, format!("there is no metric {name}; there are: {known}"));
    };
    let parameters = Query::<HashMap<String, String>>::try_from_uri(uri).map(|Query(parameters)| parameters);
    let Ok(parameters) = parameters else {
        return Asked::Wrong(StatusCode::BAD_REQUEST, "the query can't be read".to_owned());
    };
    match parameters.get("labelSelector").map_or("", String::as_str).parse() {
        Ok(selector) => Asked::Values { metric, selector },
        Err(wrong) => Asked::Wrong(StatusCode::BAD_REQUEST, wrong),
    }
}

/// `APIGroupList`
fn groups() -> Value {
    let mut group = group("");
    if let Some(fields) = group.as_object_mut() {
        fields.remove("kind");
        fields.remove("apiVersion");
    }
    json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": [group] })
}

fn group(api_version: &str) -> Value {
    let version = json!({ "groupVersion": GROUP_VERSION, "version": "v1beta1" });
    json!({
        "kind": "APIGroup", "apiVersion": api_version, "name": GROUP, "versions": [version], "preferredVersion": version,
    })
}

/// `APIResourceList`
fn resources() -> Value {
    let resources = Metric::ALL.map(|metric| {
        json!({
            "name": metric.name(), "singularName": "", "namespaced": true, "kind": "ExternalMetricValueList",
            "verbs": ["get"],
        })
    });
    json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": GROUP_VERSION, "resources": resources })
}

/// `ExternalMetricValueList`
pub fn value_list(load: &Load, metric: Metric, selector: &Selector, now: SystemTime) -> Value {
    let timestamp = logging::timestamp(now);
    let timestamp = str::from_utf8(&timestamp).unwrap_or_default();
    let items: Vec<Value> = load
        .samples(metric, selector)
        .into_iter()
        .map(|sample| {
            let mut labels = json!({ "service": sample.service });
            if let Some(version) = sample.version {
                labels["version"] = json!(version);
            }
            json!({
                "metricName": metric.name(), "metricLabels": labels, "timestamp": timestamp,
                "value": quantity(sample.value),
            })
        })
        .collect();
    json!({ "kind": "ExternalMetricValueList", "apiVersion": GROUP_VERSION, "metadata": {}, "items": items })
}

/// `Status`
pub fn failure(status: StatusCode, message: &str) -> Value {
    let reason = match status {
        StatusCode::BAD_REQUEST => "BadRequest",
        StatusCode::UNAUTHORIZED => "Unauthorized",
        StatusCode::NOT_FOUND => "NotFound",
        StatusCode::METHOD_NOT_ALLOWED => "MethodNotAllowed",
        StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailable",
        _ => "InternalError",
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason,
        "code": status.as_u16(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(path: &str) -> Asked {
        Asked::of(&Method::GET, &path.parse().unwrap())
    }

    #[test]
    fn what_may_be_asked() {
        let prefix = "/apis/external.metrics.k8s.io/v1beta1/namespaces/default";
        let selector = "service%3Dsupport%2Cversion+in+%28stable%2Ccanary%29";
        let asked = ask(&format!("{prefix}/longhaul_run_demand?labelSelector={selector}"));
        let selector = "service=support,version in (stable,canary)".parse().unwrap();
        assert_eq!(asked, Asked::Values { metric: Metric::Demand, selector });
        assert!(matches!(ask(&format!("{prefix}/longhaul_saturation")), Asked::Values { .. }));
        for (path, code) in [
            (format!("{prefix}/cpu"), 404),
            (format!("{prefix}/longhaul_run_demand?labelSelector=a+b"), 400),
            ("/openapi/v2".to_owned(), 404),
            ("/openapi/v3".to_owned(), 404),
            ("/".to_owned(), 404),
            ("/apis/external.metrics.k8s.io/v1".to_owned(), 404),
        ] {
            assert!(matches!(ask(&path), Asked::Wrong(status, _) if status.as_u16() == code), "{path}");
        }
        let asked = Asked::of(&Method::POST, &format!("{prefix}/longhaul_run_demand").parse().unwrap());
        assert!(matches!(asked, Asked::Wrong(StatusCode::METHOD_NOT_ALLOWED, _)));
        assert!(matches!(ask("/apis"), Asked::Document(_)) && matches!(ask("/apis/"), Asked::Document(_)));
    }
}
