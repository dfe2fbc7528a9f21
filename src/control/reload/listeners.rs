//! Listeners: which sockets the next snapshot listens on, and how an address is bound: by an inherited socket, or anew.

use std::sync::Arc;

use crate::config::{self, Address, Problem};
use crate::control::reload::builder::{Announcements, Builder};
use crate::control::reload::problem;
use crate::control::reload::tls::listener_tls;
use crate::net::inherit::Inherited;
use crate::net::listen::{self, Socket};
use crate::snapshot::{Listener, Snapshot};

impl Builder {
    /// The listeners of the next snapshot. A listener is its address: whatever else changes, the socket stays.
    pub(super) fn listeners(
        &self,
        config: &config::Config,
        current: Option<&Snapshot>,
        problems: &mut Vec<Problem>,
    ) -> (Vec<Arc<Listener>>, Announcements) {
        let mut announcements = Announcements::default();
        let mut old: Vec<&Arc<Listener>> = current.map_or_else(Vec::new, |current| current.listeners.iter().collect());
        let mut listeners = Vec::with_capacity(config.listeners.len());
        for (index, listener) in config.listeners.iter().enumerate() {
            let same =
                |old: &&Arc<Listener>| old.config.address == listener.address || old.local_address == listener.address;
            // Several may have the address "any free port": then the name tells them apart.
            let place = old
                .iter()
                .position(|old| same(old) && old.config.name == listener.name)
                .or_else(|| old.iter().position(same));
            let kept = place.map(|place| old.swap_remove(place));
            let tls = listener.tls.as_ref().and_then(|settings| {
                let kept = kept.filter(|kept| kept.config.tls.as_ref() == Some(settings));
                listener_tls(settings, kept.and_then(|kept| kept.tls.as_ref()), index, problems)
            });
            let local_address = match kept {
                Some(kept) => kept.local_address.clone(),
                None => match self.take_or_bind(&listener.address, &listener.name, listen::bind_shared) {
                    Ok((local_address, socket)) => {
                        announcements.starts.push((local_address.clone(), socket));
                        local_address
                    }
                    Err(message) => {
                        problems.push(problem(&format!("listeners[{index}].address"), message));
                        continue;
                    }
                },
            };
            listeners.push(Arc::new(Listener {
                local_address,
                tls,
                metrics: self.metrics.listener(&listener.name),
                routes: config.routes.iter().map(|route| self.metrics.route(&listener.name, &route.label)).collect(),
                no_route: self.metrics.route(&listener.name, "none"),
                config: listener.clone(),
            }));
        }
        announcements.stops = old.iter().map(|old| old.local_address.clone()).collect();
        (listeners, announcements)
    }

    /// The inherited socket of this address, or a new one.
    pub(super) fn take_or_bind(
        &self,
        address: &Address,
        purpose: &str,
        listen: fn(&Address) -> std::io::Result<Socket>,
    ) -> Result<(Address, Socket), String> {
        take_or_bind(&mut self.inherited(), address, purpose, listen)
    }
}

/// Binds the admin API's address, unless its socket was inherited.
pub fn bind_admin(inherited: &mut Inherited, address: &Address) -> Result<(Address, Socket), String> {
    take_or_bind(inherited, address, "admin", listen::bind_private)
}

fn take_or_bind(
    inherited: &mut Inherited,
    address: &Address,
    purpose: &str,
    listen: fn(&Address) -> std::io::Result<Socket>,
) -> Result<(Address, Socket), String> {
    match inherited.take(address, purpose) {
        Some(socket) => bind_by(|_| socket, address),
        None => bind_by(listen, address).map_err(|failure| match inherited.left() {
            left if left.is_empty() => failure,
            left => format!("{failure} (passed to this process are sockets for {} only)", left.join(", ")),
        }),
    }
}

/// Binds; on failure says what to do about it.
fn bind_by(
    listen: impl FnOnce(&Address) -> std::io::Result<Socket>,
    address: &Address,
) -> Result<(Address, Socket), String> {
    let socket = listen(address).map_err(|failure| failure.to_string())?;
    let local_address =
        socket.local_address().map_err(|failure| format!("can't listen on {}: {failure}", display(address)))?;
    Ok((local_address, socket))
}

pub(crate) fn display(address: &Address) -> String {
    match address {
        Address::Tcp(address) => address.to_string(),
        Address::Unix(path) => format!("unix:{}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_named_with_advice() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let Err(message) = bind_by(listen::bind, &Address::Tcp(address)) else { panic!("{address} was bound twice") };
        assert!(message.contains(&address.to_string()), "{message}");
        assert!(message.contains("choose another address"), "{message}");
    }
}
