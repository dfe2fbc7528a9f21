//! Net: sockets as the proxy sees them; everything that touches the operating system's network goes through here.

pub mod cookie;
pub mod inherit;
pub mod listen;
pub mod name_servers;
pub mod proxy_protocol;
#[cfg(feature = "simulation")]
pub mod simulated;
pub mod stream;
pub mod tls;

/// Raises the soft limit of open descriptors to the hard one and returns the limit that holds now.
///
/// A proxy holds two sockets a stream, and the usual soft limit of 1024 is that of a shell, not of a server.
pub fn raise_descriptor_limit() -> std::io::Result<u64> {
    rlimit::increase_nofile_limit(u64::MAX)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let limit = super::raise_descriptor_limit().unwrap();
        let (soft, hard) = rlimit::Resource::NOFILE.get().unwrap();
        assert_eq!((soft, limit), (hard, hard));
    }
}
