//! KEDA: an external scaler (gRPC) that also pushes: whoever is scaled to zero is woken by the first run that waits.
//!
//! A trigger of type `external-push` names it by `scalerAddress`, and says in its metadata which `service` it is about and,
//! where it wants, which `version`, `metric` and `target`. Every answer is about all replicas of the proxy together.

mod messages;
mod server;

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::codegen::BoxStream;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;

use crate::drain::Phase;
use crate::scaling::load::Metric;
use crate::scaling::replicas::Replicas;
use crate::state::dispatcher::Dispatcher;
use messages::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricSpec, MetricValue,
    ScaledObjectRef,
};

pub use server::serve;

/// How long there must be nothing to do before that is pushed. Work is pushed at once.
const IDLE_AFTER: Duration = Duration::from_secs(2);
/// How often what is true is pushed again while there is work: KEDA may have failed to do what the first push asked for.
const REPEAT: Duration = Duration::from_secs(10);
/// How often a stream looks at what nothing told it of: reloads, replicas.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks that something told it to take.
const LOOK_APART: Duration = Duration::from_millis(5);

/// Answers KEDA.
struct Scaler {
    replicas: Arc<Replicas>,
    /// It is not served here any more.
    ended: CancellationToken,
}

/// What a trigger says.
struct Trigger {
    service: String,
    version: Option<String>,
    metric: Metric,
    /// For each pod; `None`: it does not say.
    target: Option<f64>,
}

impl Trigger {
    fn of(metadata: &HashMap<String, String>) -> Result<Trigger, Status> {
        let text = |name: &str| metadata.get(name).map(|value| value.trim()).filter(|value| !value.is_empty());
        let service = text("service").ok_or_else(|| {
            Status::invalid_argument("the trigger's metadata does not say which service it is about: `service: NAME`")
        })?;
        let metric = match text("metric") {
            None => Metric::Demand,
            Some(name) => Metric::of_name(name).ok_or_else(|| {
                let known = Metric::ALL.map(Metric::name).join(", ");
                Status::invalid_argument(format!("there is no metric {name}; there are: {known}"))
            })?,
        };
        let target = text("target").map(|text| match text.parse::<f64>() {
            Ok(target) if target.is_finite() && target > 0.0 => Ok(target),
            _ => Err(Status::invalid_argument(format!("target: {text:?} is not a number above 0"))),
        });
        Ok(Trigger {
            service: service.to_owned(),
            version: text("version").map(str::to_owned),
            metric,
            target: target.transpose()?,
        })
    }
}

impl Scaler {
    fn new(replicas: Arc<Replicas>, ended: CancellationToken) -> Scaler {
        Scaler { replicas, ended }
    }

    async fn is_active(&self, object: &ScaledObjectRef) -> Result<IsActiveResponse, Status> {
        let trigger = Trigger::of(&object.scaler_metadata)?;
        let dispatcher = self.dispatcher(&trigger)?;
        if self.is_active_here(&trigger, &dispatcher) {
            return Ok(IsActiveResponse { result: true });
        }
        let sum = self.replicas.sum(false).await.map_err(Status::unavailable)?;
        Ok(IsActiveResponse { result: sum.is_active(&trigger.service, trigger.version.as_deref()) })
    }

    fn metric_spec(&self, object: &ScaledObjectRef) -> Result<GetMetricSpecResponse, Status> {
        let trigger = Trigger::of(&object.scaler_metadata)?;
        self.dispatcher(&trigger)?;
        let target = trigger.target.or_else(|| self.whole_endpoint(&trigger)).ok_or_else(|| {
            Status::invalid_argument(
                "the trigger's metadata does not say how much one pod should have: `target: \"10\"` (it may be left out \
                 where the service has runs.max_per_endpoint)",
            )
        })?;
        let spec = MetricSpec {
            metric_name: trigger.metric.name().to_owned(),
            // An older KEDA knows whole numbers only; 0 would make it divide by nothing.
            target_size: (target.round() as i64).max(1),
            target_size_float: target,
        };
        Ok(GetMetricSpecResponse { metric_specs: vec![spec] })
    }

    async fn metrics(&self, request: GetMetricsRequest) -> Result<GetMetricsResponse, Status> {
        let object = request.scaled_object_ref.unwrap_or_default();
        let trigger = Trigger::of(&object.scaler_metadata)?;
        let sum = self.replicas.sum(false).await.map_err(Status::unavailable)?;
        let value =
            sum.value(trigger.metric, &trigger.service, trigger.version.as_deref()).map_err(Status::not_found)?;
        let value = MetricValue {
            metric_name: if request.metric_name.is_empty() {
                trigger.metric.name().to_owned()
            } else {
                request.metric_name
            },
            // Never less than there is.
            metric_value: value.ceil() as i64,
            metric_value_float: value,
        };
        Ok(GetMetricsResponse { metric_values: vec![value] })
    }

    /// What is true now, and from then on whenever something else is.
    fn stream_is_active(self: Arc<Self>, object: &ScaledObjectRef) -> Result<BoxStream<IsActiveResponse>, Status> {
        let trigger = Trigger::of(&object.scaler_metadata)?;
        self.dispatcher(&trigger)?;
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let ended = tokio::select! {
                ended = self.push(&trigger, &sender) => ended,
                // KEDA has left.
                () = sender.closed() => return,
            };
            let _ = sender.send(Err(ended)).await;
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    /// Pushes until there is a reason not to.
    async fn push(&self, trigger: &Trigger, sender: &mpsc::Sender<Result<IsActiveResponse, Status>>) -> Status {
        let drain = &self.replicas.source().running.drain;
        let following = self.replicas.follow();
        // What was pushed last, and when.
        let mut pushed: Option<(bool, tokio::time::Instant)> = None;
        let mut idle_since = None;
        loop {
            if drain.phase() >= Phase::Announced || self.ended.is_cancelled() {
                return Status::unavailable("this replica of the proxy ends; ask another");
            }
            let dispatcher = match self.dispatcher(trigger) {
                Ok(dispatcher) => dispatcher,
                Err(gone) => return gone,
            };
            let mut changes = pin!(dispatcher.work_changes());
            let mut elsewhere = pin!(following.changes());
            changes.as_mut().enable();
            elsewhere.as_mut().enable();
            let active = self.is_active_here(trigger, &dispatcher)
                || following.is_active(&trigger.service, trigger.version.as_deref());
            let now = tokio::time::Instant::now();
            idle_since = if active { None } else { idle_since.or(Some(now)) };
            let due = match (pushed, idle_since) {
                (None, _) => true,
                (Some((last, at)), None) => !last || now - at >= REPEAT,
                (Some((last, _)), Some(since)) => last && now - since >= IDLE_AFTER,
            };
            if due {
                if sender.send(Ok(IsActiveResponse { result: active })).await.is_err() {
                    return Status::cancelled("the caller has left");
                }
                pushed = Some((active, now));
            }
            tokio::select! {
                () = changes => {}
                () = elsewhere => {}
                () = drain.reached(Phase::Announced) => {}
                () = self.ended.cancelled() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
            // Whoever waits is counted version by version, which is too much to do for each of a thousand a second.
            if active {
                tokio::time::sleep(LOOK_APART).await;
            }
        }
    }

    fn is_active_here(&self, trigger: &Trigger, dispatcher: &Dispatcher) -> bool {
        match &trigger.version {
            _ if !dispatcher.has_work() => false,
            None => true,
            Some(version) => self.replicas.own(false).is_active(&trigger.service, Some(version)),
        }
    }

    fn dispatcher(&self, trigger: &Trigger) -> Result<Arc<Dispatcher>, Status> {
        let dispatchers = self.replicas.source().dispatchers();
        let found = dispatchers.iter().find(|dispatcher| **dispatcher.name() == *trigger.service);
        found.cloned().ok_or_else(|| {
            let known: Vec<&str> =
                dispatchers.iter().map(|dispatcher| dispatcher.name().as_ref()).take(NAMES_MAX).collect();
            Status::not_found(format!("there is no service {}; there are: {}", trigger.service, known.join(", ")))
        })
    }

    /// As many runs as an endpoint may have, where the metric counts runs.
    fn whole_endpoint(&self, trigger: &Trigger) -> Option<f64> {
        if trigger.metric == Metric::Saturation {
            return None;
        }
        let snapshot = self.replicas.source().running.snapshot.load();
        let service = snapshot.services.iter().find(|service| *service.name == *trigger.service)?;
        service.config.runs.max_per_endpoint.map(f64::from)
    }
}

/// How many names an error lists of those that would be right.
const NAMES_MAX: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn trigger(pairs: &[(&str, &str)]) -> Result<Trigger, Status> {
        Trigger::of(&pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn what_a_trigger_says() {
        let read =
            trigger(&[("service", "support"), ("scalerAddress", "x:1"), ("version", ""), ("target", "2.5")]).unwrap();
        assert_eq!(
            (read.service.as_str(), read.version, read.metric, read.target),
            ("support", None, Metric::Demand, Some(2.5))
        );
        let read =
            trigger(&[("service", "support"), ("version", "canary"), ("metric", "longhaul_queued_runs")]).unwrap();
        assert_eq!((read.version.as_deref(), read.metric, read.target), (Some("canary"), Metric::QueuedRuns, None));
        for wrong in [
            &[("version", "canary")][..],
            &[("service", "support"), ("metric", "cpu")],
            &[("service", "support"), ("target", "0")],
            &[("service", "support"), ("target", "NaN")],
            &[("service", "support"), ("target", "many")],
        ] {
            assert!(trigger(wrong).is_err_and(|status| status.code() == tonic::Code::InvalidArgument), "{wrong:?}");
        }
    }
}
