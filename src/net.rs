//! Net: sockets as the proxy sees them; everything that touches the operating system's network goes through here.

pub mod cookie;
pub mod descriptors;
pub mod hang_up;
pub mod inherit;
pub mod listen;
pub mod name_servers;
pub mod proxy_protocol;
#[cfg(feature = "simulation")]
pub mod simulated;
pub mod stream;
pub mod tls;
