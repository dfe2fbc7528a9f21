//! Scaling: tells autoscalers how much there is to do: the load of this proxy and of its other replicas, as one number.
//!
//! [`Source`] reads this process's own [`Load`]; [`replicas`] adds those of the others. What is served from them are the
//! JSON document of the admin API (for KEDA's `metrics-api`), the gRPC scaler of KEDA and the external metrics API of
//! Kubernetes. None of it is on the way of a request.

#[cfg(feature = "kubernetes")]
pub mod deletion_cost;
#[cfg(feature = "kubernetes")]
pub mod external;
#[cfg(feature = "kubernetes")]
pub mod keda;
#[cfg(feature = "kubernetes")]
mod lease;
pub mod load;
mod names;
pub mod quantity;
pub mod replicas;
pub mod selector;
mod source;

pub use load::Load;
pub use source::Source;
