//! Inherit: listening sockets that were open before this process began, from a service manager (systemd's socket
//! activation) or from the process before it, and those that it can pass on in its turn.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use listenfd::ListenFd;
use rustix::net::{AddressFamily, SocketType};

use crate::config::Address;
use crate::net::listen::{Kept, Socket, SocketFile};

/// Sockets that wait for whoever is configured to listen there.
#[derive(Default)]
pub struct Inherited {
    waiting: Vec<Heirloom>,
    /// Each has to be used: somebody configured it for this process.
    by_configuration: bool,
}

struct Heirloom {
    /// As the configuration named it, where that is known: its port may be 0.
    configured: Option<Address>,
    local: Address,
    /// What the giver calls it, for people.
    name: String,
    socket: OwnedFd,
    /// The file of a unix socket is ours to remove in the end.
    owns_file: bool,
}

impl Inherited {
    /// What a service manager passed to this process (`LISTEN_FDS`, see sd_listen_fds(3)). Must be called while there is
    /// one thread only, as it takes the variables out of the environment.
    pub fn from_service_manager() -> Result<Inherited, String> {
        // Those are gone after the next line.
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let mut passed = ListenFd::from_env();
        let mut inherited = Inherited { by_configuration: true, ..Inherited::default() };
        for index in 0..passed.len() {
            let name = names.next().filter(|name| !name.is_empty()).unwrap_or("unknown").to_owned();
            let fault = |failure: io::Error| {
                format!(
                    "the service manager passed socket {} ({name}), which can't be used: {failure}; \
                     only listening stream sockets can (ListenStream=, with Accept=no)",
                    index + 1
                )
            };
            let socket: OwnedFd = match passed.take_tcp_listener(index) {
                Ok(Some(listener)) => listener.into(),
                Ok(None) => continue,
                Err(_) => match passed.take_unix_listener(index).map_err(fault)? {
                    Some(listener) => listener.into(),
                    None => continue,
                },
            };
            inherited.add(socket, None, name.clone(), false).map_err(fault)?;
        }
        Ok(inherited)
    }

    /// Adds a socket; fails where it does not listen.
    pub fn add(
        &mut self,
        socket: OwnedFd,
        configured: Option<Address>,
        name: String,
        owns_file: bool,
    ) -> io::Result<()> {
        let invalid = |reason: &str| io::Error::new(io::ErrorKind::InvalidInput, reason);
        if rustix::net::sockopt::socket_type(&socket)? != SocketType::STREAM {
            return Err(invalid("it is no stream socket"));
        }
        if !rustix::net::sockopt::socket_acceptconn(&socket)? {
            return Err(invalid("it does not listen"));
        }
        let local = if rustix::net::sockopt::socket_domain(&socket)? == AddressFamily::UNIX {
            let listener = UnixListener::from(socket.try_clone()?);
            let path = listener.local_addr()?.as_pathname().map(PathBuf::from);
            Address::Unix(path.ok_or_else(|| invalid("it is a unix socket without a path"))?)
        } else {
            Address::Tcp(std::net::TcpListener::from(socket.try_clone()?).local_addr()?)
        };
        self.waiting.push(Heirloom { configured, local, name, socket, owns_file });
        Ok(())
    }

    /// The socket that listens there already, if there is one. `purpose`: what it is for, which tells those apart that
    /// are configured with "any free port".
    pub fn take(&mut self, address: &Address, purpose: &str) -> Option<io::Result<Socket>> {
        let any_port = matches!(address, Address::Tcp(address) if address.port() == 0);
        let configured = |one: &Heirloom| one.configured.as_ref() == Some(address);
        let same = |one: &Heirloom| configured(one) && one.name == purpose;
        let here = |one: &Heirloom| one.local == *address || (configured(one) && !any_port);
        let place = self.waiting.iter().position(same).or_else(|| self.waiting.iter().position(here))?;
        let Heirloom { local, socket, owns_file, .. } = self.waiting.remove(place);
        Some(adopt(local, socket, owns_file))
    }

    /// What is wrong with those that nobody took; forgets them. `Err`: it is a fault of the configuration.
    pub fn settle(&mut self, configured: &[Address]) -> Result<(), String> {
        let left = self.left();
        self.waiting.clear();
        if left.is_empty() {
            return Ok(());
        }
        let left = left.join(", ");
        if !self.by_configuration {
            tracing::info!("a socket of the process before is configured no more, and is closed: {left}");
            return Ok(());
        }
        let configured: Vec<String> = configured.iter().map(Address::to_string).collect();
        Err(format!(
            "the service manager passed a socket that no address of the configuration is for: {left}; \
             configured are {}; make ListenStream= of the .socket unit and the configuration name the same addresses",
            configured.join(", ")
        ))
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Those that nobody took, as a person would name them.
    pub fn left(&self) -> Vec<String> {
        self.waiting.iter().map(|one| format!("{} ({})", one.local, one.name)).collect()
    }
}

fn adopt(local: Address, socket: OwnedFd, owns_file: bool) -> io::Result<Socket> {
    match local {
        Address::Tcp(_) => {
            let listener = std::net::TcpListener::from(socket);
            listener.set_nonblocking(true)?;
            Ok(Socket::Tcp(listener))
        }
        Address::Unix(path) => {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            Ok(Socket::Unix(listener, SocketFile::of(path, owns_file)?))
        }
    }
}

/// Another handle of a socket that this process listens on, to be passed to the process after it.
#[derive(Debug)]
pub struct Spare {
    /// As the configuration names it.
    pub configured: Address,
    pub local: Address,
    pub purpose: String,
    handle: OwnedFd,
    file: Option<Kept>,
}

impl Spare {
    pub fn of(socket: &Socket, configured: Address, purpose: &str) -> io::Result<Spare> {
        let local = socket.local_address()?;
        let (handle, file) = match socket {
            Socket::Tcp(listener) => (listener.as_fd().try_clone_to_owned()?, None),
            Socket::Unix(listener, file) => (listener.as_fd().try_clone_to_owned()?, Some(file.kept())),
            #[cfg(feature = "simulation")]
            Socket::Simulated(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        Ok(Spare { configured, local, purpose: purpose.to_owned(), handle, file })
    }

    pub fn try_clone(&self) -> io::Result<Spare> {
        Ok(Spare {
            configured: self.configured.clone(),
            local: self.local.clone(),
            purpose: self.purpose.clone(),
            handle: self.handle.try_clone()?,
            file: self.file.clone(),
        })
    }

    /// The file of a unix socket is removed in the end by this process.
    pub fn owns_file(&self) -> bool {
        self.file.as_ref().is_some_and(Kept::is_ours)
    }

    /// The file of a unix socket belongs to the next process from here on: it stays.
    pub fn leave_file(&self) {
        if let Some(file) = &self.file {
            file.leave();
        }
    }
}

/// Sockets that may be passed in one message; the system's limit is 253.
pub const PASSED_MAX: usize = 250;

/// Sends bytes, and handles of sockets along with the first of them. The stream must block.
pub fn send_with_sockets(stream: &UnixStream, bytes: &[u8], sockets: &[Spare]) -> io::Result<()> {
    use std::io::{IoSlice, Write};
    use std::mem::MaybeUninit;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    if sockets.len() > PASSED_MAX {
        let reason = format!("{} listening sockets are more than can be passed ({PASSED_MAX})", sockets.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let handles: Vec<_> = sockets.iter().map(|socket| socket.handle.as_fd()).collect();
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PASSED_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !handles.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&handles)) {
        return Err(io::Error::other("the sockets do not fit into one message"));
    }
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    let mut stream = stream;
    stream.write_all(&bytes[sent..])
}

/// Reads some bytes, at least one, and the handles that came with them. 0: the other end is gone.
pub fn receive_with_sockets(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    use std::io::IoSliceMut;
    use std::mem::MaybeUninit;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PASSED_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut sockets = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(handles) = message {
            sockets.extend(handles);
        }
    }
    Ok((received.bytes, sockets))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::net::listen;

    #[test]
    fn a_socket_passes_with_its_backlog_and_its_address() {
        let socket = listen::bind(&Address::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
        let configured = Address::Tcp("127.0.0.1:0".parse().unwrap());
        let spare = Spare::of(&socket, configured.clone(), "public").unwrap();
        let Address::Tcp(address) = spare.local else { panic!("TCP was bound") };
        // It waits in the backlog while the socket goes from hand to hand.
        let client = std::net::TcpStream::connect(address).unwrap();

        let (ours, theirs) = UnixStream::pair().unwrap();
        send_with_sockets(&ours, b"hello", std::slice::from_ref(&spare)).unwrap();
        drop((ours, spare, socket));
        let mut buffer = [0; 16];
        let (count, mut handles) = receive_with_sockets(&theirs, &mut buffer).unwrap();
        assert_eq!((&buffer[..count], handles.len()), (&b"hello"[..], 1));

        let mut inherited = Inherited::default();
        inherited.add(handles.remove(0), Some(configured.clone()), "public".to_owned(), false).unwrap();
        assert!(inherited.take(&Address::Tcp("127.0.0.1:1".parse().unwrap()), "public").is_none());
        assert!(inherited.take(&configured, "admin").is_none(), "any free port is another one for everybody");
        assert_eq!(inherited.left(), [format!("{address} (public)")]);
        let Some(Ok(Socket::Tcp(listener))) = inherited.take(&configured, "public") else {
            panic!("its socket is there")
        };
        listener.set_nonblocking(false).unwrap();
        let (_, peer) = listener.accept().unwrap();
        assert_eq!(peer, client.local_addr().unwrap());
        assert!(inherited.is_empty());
    }

    #[test]
    fn the_file_of_a_passed_unix_socket_stays_for_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let address = Address::Unix(path.clone());
        let socket = listen::bind(&address).unwrap();
        let spare = Spare::of(&socket, address.clone(), "public").unwrap();
        assert!(spare.owns_file());
        spare.leave_file();
        drop(socket);
        let mut inherited = Inherited::default();
        inherited.add(spare.handle, None, "public".to_owned(), true).unwrap();
        let next = inherited.take(&address, "renamed").unwrap().unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(next);
        assert!(!path.exists(), "the last one removes it");
    }

    #[test]
    fn what_does_not_listen_is_refused() {
        let (one, mut other) = UnixStream::pair().unwrap();
        let error = Inherited::default().add(one.into(), None, String::new(), false).unwrap_err();
        assert_eq!(error.to_string(), "it does not listen");
        assert_eq!(other.read(&mut [0]).unwrap(), 0);
    }
}
