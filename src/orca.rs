//! ORCA: load that an endpoint reports with its answers, in the field or trailer `endpoint-load-metrics`
//! (xds.data.orca.v3.OrcaLoadReport): `TEXT`, `JSON` or `BIN`.

use base64::Engine;
use serde_json::Value;

use crate::message::Fields;

/// The field or trailer with a format in front.
const FIELD: &str = "endpoint-load-metrics";
/// The one with the message alone, as gRPC has it.
const BINARY_FIELD: &str = "endpoint-load-metrics-bin";
/// A longer report is none.
const REPORT_BYTES_MAX: usize = 8 * 1024;

/// The named metric that says how many runs an endpoint has.
const RUNS: &str = "runs";

/// What of a report bears on placement.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// The named metric `runs`.
    pub runs: Option<f64>,
    /// The share of what the application can do, 1.0 for all of it, where it says so.
    pub application_utilization: Option<f64>,
}

impl Report {
    /// Of an answer's fields or trailers; `None`: there is none, or it can't be read.
    pub fn read(fields: &Fields) -> Option<Report> {
        if let Some(value) = fields.get(BINARY_FIELD) {
            return message(&decode(value)?);
        }
        let value = fields.get(FIELD).filter(|value| value.len() <= REPORT_BYTES_MAX)?;
        let text = std::str::from_utf8(value).ok()?.trim();
        let (format, report) = text.split_once(' ')?;
        match format {
            "TEXT" => pairs(report),
            "JSON" => json(report),
            "BIN" => message(&decode(report.as_bytes())?),
            _ => None,
        }
    }

    /// As a number of runs on an endpoint that may have `max_runs`.
    pub fn as_runs(&self, max_runs: Option<u32>) -> Option<u32> {
        let by_utilization = || Some(self.application_utilization? * f64::from(max_runs?));
        let runs = self.runs.or_else(by_utilization)?;
        Some(runs.ceil().min(f64::from(u32::MAX)) as u32)
    }

    fn set(&mut self, name: &str, value: f64) -> Option<()> {
        let member = match name {
            "application_utilization" => &mut self.application_utilization,
            _ if name.strip_prefix("named_metrics.") == Some(RUNS) => &mut self.runs,
            _ => return Some(()),
        };
        // Not a number, or one that can't be: the whole report is not to be trusted.
        *member = Some((value.is_finite() && value >= 0.0).then_some(value)?);
        Some(())
    }
}

fn decode(value: &[u8]) -> Option<Vec<u8>> {
    let value = value.trim_ascii();
    if value.len() > REPORT_BYTES_MAX {
        return None;
    }
    let unpadded: &[u8] = value.split(|byte| *byte == b'=').next().unwrap_or_default();
    base64::engine::general_purpose::STANDARD_NO_PAD.decode(unpadded).ok()
}

/// `cpu_utilization=0.3,named_metrics.runs=4`, with `:` in place of `=` as older senders write it.
fn pairs(text: &str) -> Option<Report> {
    let mut report = Report::default();
    for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once(['=', ':'])?;
        report.set(name.trim(), value.trim().parse().ok()?)?;
    }
    Some(report)
}

fn json(text: &str) -> Option<Report> {
    let value: Value = serde_json::from_str(text).ok()?;
    let mut report = Report::default();
    if let Some(share) = value.get("application_utilization") {
        report.set("application_utilization", share.as_f64()?)?;
    }
    if let Some(runs) = value.pointer("/named_metrics/runs") {
        report.set("named_metrics.runs", runs.as_f64()?)?;
    }
    Some(report)
}

/// The message in Protocol Buffers' wire format: field 8 is the map `named_metrics`, 9 is `application_utilization`.
fn message(mut bytes: &[u8]) -> Option<Report> {
    let mut report = Report::default();
    while !bytes.is_empty() {
        match field(&mut bytes)? {
            (8, Wire::Bytes(mut entry)) => {
                let (mut name, mut value) = (&[][..], 0.0);
                while !entry.is_empty() {
                    match field(&mut entry)? {
                        (1, Wire::Bytes(bytes)) => name = bytes,
                        (2, Wire::Double(double)) => value = double,
                        _ => {}
                    }
                }
                if name == RUNS.as_bytes() {
                    report.set("named_metrics.runs", value)?;
                }
            }
            (9, Wire::Double(value)) => report.set("application_utilization", value)?,
            _ => {}
        }
    }
    Some(report)
}

enum Wire<'a> {
    Bytes(&'a [u8]),
    Double(f64),
    Other,
}

/// One field: its number and its value.
fn field<'a>(bytes: &mut &'a [u8]) -> Option<(u64, Wire<'a>)> {
    let key = varint(bytes)?;
    let value = match key & 7 {
        0 => {
            varint(bytes)?;
            Wire::Other
        }
        1 => Wire::Double(f64::from_le_bytes(take(bytes, 8)?.try_into().ok()?)),
        2 => {
            let length = varint(bytes)?.try_into().ok()?;
            Wire::Bytes(take(bytes, length)?)
        }
        5 => {
            take(bytes, 4)?;
            Wire::Other
        }
        _ => return None,
    };
    Some((key >> 3, value))
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use proptest::prelude::*;

    use super::*;

    fn read(name: &str, value: &str) -> Option<Report> {
        let mut fields = Fields::default();
        fields.append(name, value.as_bytes());
        Report::read(&fields)
    }

    fn report(runs: Option<f64>, application_utilization: Option<f64>) -> Option<Report> {
        Some(Report { runs, application_utilization })
    }

    /// cpu_utilization 0.5, rps 3 (varint), named_metrics {"runs": 4.0}, application_utilization 0.75.
    fn encoded() -> String {
        let mut bytes = vec![0x09];
        bytes.extend(0.5_f64.to_le_bytes());
        bytes.extend([0x18, 3, 0x42, 15, 0x0a, 4]);
        bytes.extend(b"runs");
        bytes.push(0x11);
        bytes.extend(4.0_f64.to_le_bytes());
        bytes.push(0x49);
        bytes.extend(0.75_f64.to_le_bytes());
        base64::engine::general_purpose::STANDARD.encode(bytes)
    }

    #[test]
    fn every_format_is_read() {
        let both = report(Some(4.0), Some(0.75));
        for text in [
            "TEXT cpu_utilization=0.3,application_utilization=0.75,named_metrics.runs=4",
            "TEXT application_utilization:0.75, named_metrics.runs:4",
            r#"JSON {"cpu_utilization":0.3,"application_utilization":0.75,"named_metrics":{"runs":4,"x":1}}"#,
            &format!("BIN {}", encoded()),
        ] {
            assert_eq!(read("endpoint-load-metrics", text), both, "{text}");
        }
        assert_eq!(read("Endpoint-Load-Metrics-Bin", &encoded()), both);
        assert_eq!(read("endpoint-load-metrics", "TEXT cpu_utilization=0.3"), report(None, None));
    }

    #[test]
    fn what_can_not_be_trusted_is_none() {
        for text in [
            "",
            "cpu_utilization=0.3",
            "XML <a/>",
            "TEXT named_metrics.runs=NaN",
            "TEXT named_metrics.runs=-1",
            "TEXT named_metrics.runs",
            "TEXT application_utilization=inf",
            "JSON {",
            r#"JSON {"named_metrics":{"runs":"4"}}"#,
            "BIN !!",
            "BIN CQ==",
        ] {
            assert_eq!(read("endpoint-load-metrics", text), None, "{text}");
        }
        assert_eq!(read("endpoint-load-metrics", &format!("TEXT {}", "a=1,".repeat(10_000))), None);
    }

    #[test]
    fn a_share_is_runs_where_there_is_a_limit() {
        let of = |runs, share, max| Report { runs, application_utilization: share }.as_runs(max);
        assert_eq!(of(Some(3.2), Some(0.9), Some(10)), Some(4));
        assert_eq!(of(None, Some(0.75), Some(10)), Some(8));
        assert_eq!(of(None, Some(0.75), None), None);
        assert_eq!(of(Some(1e300), None, None), Some(u32::MAX));
    }

    proptest! {
        #[test]
        fn no_bytes_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = message(&bytes);
            let mut fields = Fields::default();
            fields.append("endpoint-load-metrics", &bytes);
            let _ = Report::read(&fields);
        }
    }
}
