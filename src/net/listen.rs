//! Listen: listening sockets (TCP, dual stack, unix).

/// A bound, listening socket, not yet tied to a runtime.
pub enum Socket {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}
