//! Messages: those of KEDA's `externalscaler.proto`, and the names of its calls.
//!
//! The source is `pkg/scalers/externalscaler/externalscaler.proto` of kedacore/keda (package `externalscaler`, as of 2026-11).
//! It is written out by hand, field by field, because a build needs no protoc then; a field's number is its identity.

use std::collections::HashMap;

/// Which `ScaledObject` asks, with what its trigger says (`scalerMetadata`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct ScaledObjectRef {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(map = "string, string", tag = "3")]
    pub scaler_metadata: HashMap<String, String>,
}

#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct IsActiveResponse {
    #[prost(bool, tag = "1")]
    pub result: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct GetMetricSpecResponse {
    #[prost(message, repeated, tag = "1")]
    pub metric_specs: Vec<MetricSpec>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct MetricSpec {
    #[prost(string, tag = "1")]
    pub metric_name: String,
    /// For a KEDA that does not know the next one.
    #[prost(int64, tag = "2")]
    pub target_size: i64,
    #[prost(double, tag = "3")]
    pub target_size_float: f64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct GetMetricsRequest {
    #[prost(message, optional, tag = "1")]
    pub scaled_object_ref: Option<ScaledObjectRef>,
    #[prost(string, tag = "2")]
    pub metric_name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct GetMetricsResponse {
    #[prost(message, repeated, tag = "1")]
    pub metric_values: Vec<MetricValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct MetricValue {
    #[prost(string, tag = "1")]
    pub metric_name: String,
    /// For a KEDA that does not know the next one.
    #[prost(int64, tag = "2")]
    pub metric_value: i64,
    #[prost(double, tag = "3")]
    pub metric_value_float: f64,
}

pub const IS_ACTIVE: &str = "/externalscaler.ExternalScaler/IsActive";
pub const STREAM_IS_ACTIVE: &str = "/externalscaler.ExternalScaler/StreamIsActive";
pub const GET_METRIC_SPEC: &str = "/externalscaler.ExternalScaler/GetMetricSpec";
pub const GET_METRICS: &str = "/externalscaler.ExternalScaler/GetMetrics";

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// What protoc makes of the same values, byte for byte.
    #[test]
    fn they_are_the_bytes_of_the_proto() {
        let scaler_metadata = HashMap::from([("service".to_owned(), "a".to_owned())]);
        let object = ScaledObjectRef { name: "n".to_owned(), namespace: "s".to_owned(), scaler_metadata };
        let encoded = object.encode_to_vec();
        assert_eq!(encoded, b"\x0a\x01n\x12\x01s\x1a\x0c\x0a\x07service\x12\x01a");
        let request = GetMetricsRequest { scaled_object_ref: Some(object), metric_name: "m".to_owned() };
        assert_eq!(request.encode_to_vec(), [&b"\x0a\x14"[..], &encoded, b"\x12\x01m"].concat());
        assert_eq!(IsActiveResponse { result: true }.encode_to_vec(), b"\x08\x01");
        let value = MetricValue { metric_name: "m".to_owned(), metric_value: 2, metric_value_float: 1.5 };
        let bytes = b"\x0a\x0e\x0a\x01m\x10\x02\x19\0\0\0\0\0\0\xf8\x3f";
        assert_eq!(GetMetricsResponse { metric_values: vec![value] }.encode_to_vec(), bytes);
        let spec = MetricSpec { metric_name: "m".to_owned(), target_size: 2, target_size_float: 1.5 };
        assert_eq!(GetMetricSpecResponse { metric_specs: vec![spec] }.encode_to_vec(), bytes);
    }
}
