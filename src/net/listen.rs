//! Listen: listening sockets (TCP, dual stack, unix).

use std::fs::{self, Permissions};
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::net::{Ipv6Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::{Domain, SockAddr, Type};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::config::Address;
#[cfg(feature = "simulation")]
use crate::net::simulated;
use crate::net::stream::Plain;

/// A bound, listening socket, not yet tied to a runtime.
#[derive(Debug)]
pub enum Socket {
    Tcp(std::net::TcpListener),
    /// With its file, which goes when the listener does.
    Unix(std::os::unix::net::UnixListener, SocketFile),
    #[cfg(feature = "simulation")]
    Simulated(simulated::Listener),
}

/// A listening socket on the runtime that accepts.
pub enum TokioListener {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener, SocketFile),
    #[cfg(feature = "simulation")]
    Simulated(simulated::Listener),
}

/// A connection that no runtime knows yet, nonblocking, so that any worker may take it.
#[derive(Debug)]
pub enum Accepted {
    /// With TCP_NODELAY set: a token must not wait for the acknowledgement of the one before. An IPv4 peer of a dual
    /// stack socket has its IPv4 address.
    Tcp(std::net::TcpStream, SocketAddr),
    Unix(std::os::unix::net::UnixStream),
    #[cfg(feature = "simulation")]
    Simulated(simulated::Stream, SocketAddr),
}

impl Accepted {
    /// Ties the connection to the runtime in whose context this is called; and who connected, where that has an address.
    pub fn into_tokio(self) -> io::Result<(Plain, Option<SocketAddr>)> {
        Ok(match self {
            Accepted::Tcp(stream, peer) => (Plain::Tcp(tokio::net::TcpStream::from_std(stream)?), Some(peer)),
            Accepted::Unix(stream) => (Plain::Unix(tokio::net::UnixStream::from_std(stream)?), None),
            #[cfg(feature = "simulation")]
            Accepted::Simulated(stream, peer) => (Plain::Simulated(stream), Some(peer)),
        })
    }
}

/// The file of a unix socket; unlinked when this is dropped, unless somebody else's socket has its place by then, or it
/// was never ours, or is not any more.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
    kept: Kept,
}

/// Whether the file of a socket is to stay when the socket goes. Shared with whoever may pass the socket on.
#[derive(Clone, Debug)]
pub struct Kept(Arc<AtomicBool>);

impl Kept {
    fn new(kept: bool) -> Kept {
        Kept(Arc::new(AtomicBool::new(kept)))
    }

    /// This process removes it.
    pub fn is_ours(&self) -> bool {
        !self.0.load(Ordering::Relaxed)
    }

    /// It stays.
    pub fn leave(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl SocketFile {
    /// That of a socket which is bound there; `ours`: it is to be removed with it.
    pub fn of(path: PathBuf, ours: bool) -> io::Result<SocketFile> {
        let metadata = fs::symlink_metadata(&path)?;
        Ok(SocketFile { path, device: metadata.dev(), inode: metadata.ino(), kept: Kept::new(!ours) })
    }

    pub fn kept(&self) -> Kept {
        self.kept.clone()
    }
}

/// Binds and listens. A `[::]` address takes IPv4 too. Of a unix socket, a file that nothing listens on any more is
/// replaced. The error says which address it was.
pub fn bind(address: &Address) -> io::Result<Socket> {
    bind_with_mode(address, None, false)
}

/// As [`bind`], but another process of the same user that does the same may listen on the same TCP port beside us
/// (SO_REUSEPORT): the next proxy begins to serve before this one ends.
pub fn bind_shared(address: &Address) -> io::Result<Socket> {
    bind_with_mode(address, None, true)
}

/// As [`bind`], but a unix socket is its owner's alone (mode 0600), from its first moment.
pub fn bind_private(address: &Address) -> io::Result<Socket> {
    bind_with_mode(address, Some(0o600), false)
}

/// True for the errors of `accept` that say that this process or machine has run out of something: accepting again at
/// once would only spin, so wait a little. (After any other error the next `accept` may succeed.)
pub fn is_resource_exhaustion(error: &io::Error) -> bool {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENOBUFS: i32 = if cfg!(target_os = "linux") { 105 } else { 55 };
    error.kind() == ErrorKind::OutOfMemory || matches!(error.raw_os_error(), Some(ENFILE | EMFILE | ENOBUFS))
}

/// How long to wait before accepting again then.
pub const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Accepts while there are places.
pub struct Bounded {
    listener: TokioListener,
    places: Arc<Semaphore>,
}

impl Bounded {
    pub fn new(listener: TokioListener, places: usize) -> Bounded {
        Bounded { listener, places: Arc::new(Semaphore::new(places)) }
    }

    /// The next connection to `what`, and its place. `None`: it is to stop.
    pub async fn accept(&self, what: &str, stop: &CancellationToken) -> Option<(Accepted, OwnedSemaphorePermit)> {
        // The semaphore is never closed.
        let place = Arc::clone(&self.places).acquire_owned().await.ok()?;
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return None,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok(accepted) => return Some((accepted, place)),
                Err(failure) if is_resource_exhaustion(&failure) => tokio::time::sleep(EXHAUSTED_PAUSE).await,
                Err(failure) => debug!(%failure, "a connection to {what} was lost before it was accepted"),
            }
        }
    }
}

impl Socket {
    /// Where it really listens: port 0 has become the port that the system chose.
    pub fn local_address(&self) -> io::Result<Address> {
        match self {
            Socket::Tcp(listener) => listener.local_addr().map(Address::Tcp),
            Socket::Unix(_, file) => Ok(Address::Unix(file.path.clone())),
            #[cfg(feature = "simulation")]
            Socket::Simulated(listener) => Ok(Address::Tcp(listener.local_address())),
        }
    }

    /// Ties the socket to the runtime in whose context this is called.
    pub fn into_tokio(self) -> io::Result<TokioListener> {
        Ok(match self {
            Socket::Tcp(listener) => TokioListener::Tcp(tokio::net::TcpListener::from_std(listener)?),
            Socket::Unix(listener, file) => TokioListener::Unix(tokio::net::UnixListener::from_std(listener)?, file),
            #[cfg(feature = "simulation")]
            Socket::Simulated(listener) => TokioListener::Simulated(listener),
        })
    }
}

impl TokioListener {
    /// The next connection. Safe to drop at any moment: no connection is lost.
    pub async fn accept(&self) -> io::Result<Accepted> {
        poll_fn(|context| self.poll_accept(context)).await
    }

    /// As [`TokioListener::accept`]; only the last caller's waker is kept.
    pub fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        loop {
            let accepted = match self {
                TokioListener::Tcp(listener) => {
                    ready!(listener.poll_accept(context)).and_then(|(stream, peer)| prepare_tcp(stream, peer))
                }
                TokioListener::Unix(listener, _) => {
                    ready!(listener.poll_accept(context)).and_then(|(stream, _)| stream.into_std()).map(Accepted::Unix)
                }
                #[cfg(feature = "simulation")]
                TokioListener::Simulated(listener) => {
                    ready!(listener.poll_accept(context)).map(|(stream, peer)| Accepted::Simulated(stream, peer))
                }
            };
            match accepted {
                Err(error) if is_of_one_connection(&error) => continue,
                result => return Poll::Ready(result),
            }
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = self.kept.is_ours()
            && fs::symlink_metadata(&self.path)
                .is_ok_and(|metadata| metadata.dev() == self.device && metadata.ino() == self.inode);
        if is_ours {
            // Nothing is lost if this fails: the next bind finds nobody listening and removes the file.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// How many connections may wait to be accepted; the system's own limit (net.core.somaxconn) may be lower.
const BACKLOG: i32 = 4096;

fn bind_with_mode(address: &Address, mode: Option<u32>, shared: bool) -> io::Result<Socket> {
    match address {
        Address::Tcp(address) => bind_tcp(*address, shared).map_err(|error| explain(error, &address.to_string())),
        Address::Unix(path) => {
            bind_unix(path, mode).map_err(|error| explain(error, &format!("unix:{}", path.display())))
        }
    }
}

fn bind_tcp(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    #[cfg(feature = "simulation")]
    if let Some(network) = simulated::current() {
        return network.bind(address).map(Socket::Simulated);
    }
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // A restart must not wait for the old process's connections to leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    if let SocketAddr::V6(address) = address {
        socket.set_only_v6(*address.ip() != Ipv6Addr::UNSPECIFIED)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(Socket::Tcp(socket.into()))
}

fn bind_unix(path: &Path, mode: Option<u32>) -> io::Result<Socket> {
    remove_stale_file(path)?;
    let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    let file = SocketFile::of(path.to_owned(), true)?;
    if let Some(mode) = mode {
        // Before listen(): until then every connect is refused, so nobody slips in under the wider mode.
        fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(Socket::Unix(socket.into(), file))
}

/// Removes what a process that didn't end cleanly left behind, and nothing else.
fn remove_stale_file(path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::new(ErrorKind::AlreadyExists, "there is a file of that name which is not a socket"));
    }
    let probe = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Nonblocking, because a listener with a full backlog would hold us; it answers WouldBlock and is alive.
    probe.set_nonblocking(true)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Err(error),
        _ => Err(ErrorKind::AddrInUse.into()),
    }
}

fn explain(error: io::Error, address: &str) -> io::Error {
    let advice = match error.kind() {
        ErrorKind::AddrInUse => "; stop what listens there, or choose another address",
        ErrorKind::AddrNotAvailable => "; use an address of this machine, or 0.0.0.0",
        ErrorKind::PermissionDenied => {
            "; choose another address (a port above 1023, a path of your own), or give this user the right to it"
        }
        _ => "",
    };
    io::Error::new(error.kind(), format!("can't listen on {address}: {error}{advice}"))
}

fn prepare_tcp(stream: tokio::net::TcpStream, peer: SocketAddr) -> io::Result<Accepted> {
    let stream = stream.into_std()?;
    stream.set_nodelay(true)?;
    Ok(Accepted::Tcp(stream, SocketAddr::new(peer.ip().to_canonical(), peer.port())))
}

/// Errors that a connection brought with it which died before it was accepted (accept(2) names these for Linux): of no
/// interest to anyone, and the next connection is waiting.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::Interrupted
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NetworkDown
            | ErrorKind::NotConnected
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    fn tcp(text: &str) -> Address {
        Address::Tcp(text.parse().unwrap())
    }

    fn bound_port(socket: &Socket) -> u16 {
        match socket.local_address().unwrap() {
            Address::Tcp(address) => address.port(),
            Address::Unix(path) => panic!("not a TCP address: {}", path.display()),
        }
    }

    #[test]
    fn an_accepted_tcp_connection_is_ready_for_another_runtime() {
        let socket = bind(&tcp("127.0.0.1:0")).unwrap();
        let port = bound_port(&socket);
        assert_ne!(port, 0);
        let mut client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        client.write_all(b"hello").unwrap();
        let accepted = runtime().block_on(async { socket.into_tokio().unwrap().accept().await.unwrap() });
        let Accepted::Tcp(stream, peer) = accepted else { panic!("{accepted:?}") };
        assert_eq!(peer, client.local_addr().unwrap());
        assert!(stream.nodelay().unwrap());
        runtime().block_on(async move {
            use tokio::io::AsyncReadExt;
            let mut stream = tokio::net::TcpStream::from_std(stream).unwrap();
            let mut buffer = [0; 5];
            stream.read_exact(&mut buffer).await.unwrap();
            assert_eq!(&buffer, b"hello");
        });
    }

    #[test]
    fn the_unspecified_ipv6_address_takes_ipv4_peers_by_their_own_address() {
        let Ok(socket) = bind(&tcp("[::]:0")) else { return };
        let client = std::net::TcpStream::connect(("127.0.0.1", bound_port(&socket))).unwrap();
        let accepted = runtime().block_on(async { socket.into_tokio().unwrap().accept().await.unwrap() });
        let Accepted::Tcp(_, peer) = accepted else { panic!("{accepted:?}") };
        assert_eq!(peer, client.local_addr().unwrap());
    }

    #[test]
    fn a_taken_port_is_refused_with_its_address() {
        let socket = bind(&tcp("127.0.0.1:0")).unwrap();
        let address = socket.local_address().unwrap();
        let error = bind(&address).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
        assert!(error.to_string().contains(&format!("127.0.0.1:{}", bound_port(&socket))), "{error}");
    }

    #[test]
    fn a_port_is_shared_only_by_those_who_all_share_it() {
        let socket = bind_shared(&tcp("127.0.0.1:0")).unwrap();
        let address = socket.local_address().unwrap();
        let second = bind_shared(&address).unwrap();
        assert_eq!(second.local_address().unwrap(), address);
        assert_eq!(bind(&address).unwrap_err().kind(), ErrorKind::AddrInUse);
    }

    #[test]
    fn a_unix_socket_accepts_and_takes_its_file_along() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let address = Address::Unix(path.clone());
        let socket = bind(&address).unwrap();
        assert_eq!(socket.local_address().unwrap(), address);
        let mut client = UnixStream::connect(&path).unwrap();
        runtime().block_on(async {
            let listener = socket.into_tokio().unwrap();
            let Accepted::Unix(mut stream) = listener.accept().await.unwrap() else { panic!("not a unix socket") };
            stream.write_all(b"x").unwrap();
            assert!(path.exists());
        });
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_file_is_replaced_and_a_live_or_foreign_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let address = Address::Unix(path.clone());

        // Without a guard, as after a crash.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let live = bind(&address).unwrap();

        let error = bind(&address).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}");
        assert!(UnixStream::connect(&path).is_ok(), "the live socket must survive the attempt");

        // Another process took the name over: our guard must leave its file.
        fs::remove_file(&path).unwrap();
        let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(live);
        assert!(UnixStream::connect(&path).is_ok());
        drop(other);

        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        assert_eq!(bind(&address).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_private_socket_is_its_owners_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.sock");
        let _socket = bind_private(&Address::Unix(path.clone())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn errors_of_accept_are_told_apart() {
        for number in [12, 23, 24] {
            assert!(is_resource_exhaustion(&io::Error::from_raw_os_error(number)), "{number}");
        }
        assert!(!is_resource_exhaustion(&io::Error::from(ErrorKind::ConnectionAborted)));
        assert!(is_of_one_connection(&io::Error::from(ErrorKind::ConnectionAborted)));
        assert!(!is_of_one_connection(&io::Error::from_raw_os_error(24)));
    }
}
