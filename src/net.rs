//! Net: sockets as the proxy sees them; everything that touches the operating system's network goes through here.

pub mod cookie;
pub mod listen;
pub mod proxy_protocol;
pub mod tls;
