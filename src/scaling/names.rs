//! Names: the addresses behind a headless service.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use hickory_resolver::net::runtime::TokioRuntimeProvider;

use crate::net::name_servers;

/// For one question to one server.
const TIMEOUT: Duration = Duration::from_millis(500);
/// How often a question is asked.
const ATTEMPTS: usize = 2;

/// Asks DNS anew each time: whoever came or left a moment ago must not be missed.
pub struct Names {
    /// Or why nobody can be asked.
    resolver: Result<TokioResolver, String>,
}

impl Names {
    /// Asks the servers of this machine (`/etc/resolv.conf`, with its search domains), or these alone.
    pub fn new(servers: Option<&[SocketAddr]>) -> Names {
        let builder = match servers {
            None => TokioResolver::builder_tokio().map_err(|failure| {
                format!("the DNS servers of this machine are not known ({failure}); look at /etc/resolv.conf")
            }),
            Some(servers) => {
                Ok(TokioResolver::builder_with_config(name_servers::only(servers), TokioRuntimeProvider::default()))
            }
        };
        let resolver = builder.and_then(|mut builder| {
            let options = builder.options_mut();
            // Every replica has an address of each family where there are two, so one family names them all.
            options.ip_strategy = LookupIpStrategy::Ipv4thenIpv6;
            options.cache_size = 0;
            options.timeout = TIMEOUT;
            options.attempts = ATTEMPTS;
            builder.build().map_err(|failure| format!("DNS can't be asked: {failure}"))
        });
        Names { resolver }
    }

    /// The addresses of a name, sorted; an address is its own. Never empty: no answer is an error, which says what to do.
    pub async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, String> {
        let resolver = self.resolver.as_ref().map_err(String::clone)?;
        let found =
            resolver.lookup_ip(name).await.map_err(|failure| format!("DNS has no answer for {name}: {failure}"))?;
        let mut addresses: Vec<IpAddr> = found.iter().collect();
        addresses.sort_unstable();
        addresses.dedup();
        match addresses.is_empty() {
            true => Err(format!("DNS knows no address of {name}; is it the headless service of the proxy's replicas?")),
            false => Ok(addresses),
        }
    }
}
