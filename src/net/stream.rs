//! Stream: a connected socket, plain or TLS, with the readiness call that the relay needs.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use rustix::net::{RecvFlags, SendFlags};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::coop;

#[cfg(feature = "simulation")]
use crate::net::simulated;

/// A connected socket without TLS.
pub enum Plain {
    Tcp(TcpStream),
    Unix(UnixStream),
    #[cfg(feature = "simulation")]
    Simulated(simulated::Stream),
}

/// A connected socket as the data plane reads and writes it.
pub enum Stream {
    Plain(Plain),
    TlsServer(Box<tokio_rustls::server::TlsStream<Plain>>),
    TlsClient(Box<tokio_rustls::client::TlsStream<Plain>>),
}

impl Stream {
    /// Ready when a read may give bytes, the end or an error; holding no buffer until then is what keeps silent streams
    /// small. May be ready spuriously (a TLS record that is not complete yet).
    pub fn poll_read_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Stream::Plain(plain) => plain.poll_read_ready(context),
            Stream::TlsServer(tls) => {
                let (plain, session) = tls.get_mut();
                if plaintext_waits(&mut session.reader()) {
                    Poll::Ready(Ok(()))
                } else {
                    plain.poll_read_ready(context)
                }
            }
            Stream::TlsClient(tls) => {
                let (plain, session) = tls.get_mut();
                if plaintext_waits(&mut session.reader()) {
                    Poll::Ready(Ok(()))
                } else {
                    plain.poll_read_ready(context)
                }
            }
        }
    }

    /// As [`Stream::poll_read_ready`], without being told later.
    pub fn is_read_ready(&mut self) -> bool {
        match self {
            Stream::Plain(plain) => plain.is_read_ready(),
            tls => tls.poll_read_ready(&mut Context::from_waker(Waker::noop())).is_ready(),
        }
    }

    /// Reads into `buffer`; 0 is the end.
    pub fn poll_read_into(&mut self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        if let Stream::Plain(plain) = self {
            return plain.poll_receive(context, buffer);
        }
        let mut target = ReadBuf::new(buffer);
        ready!(Pin::new(self).poll_read(context, &mut target))?;
        Poll::Ready(Ok(target.filled().len()))
    }

    /// Writes what the slices hold, as far as the socket takes it.
    pub fn poll_write_slices(&mut self, context: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match (self, slices) {
            // The system call for one slice is the cheaper one.
            (Stream::Plain(plain), [slice]) => plain.poll_send(context, slice),
            (stream, [slice]) => Pin::new(stream).poll_write(context, slice),
            (stream, _) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    /// Closing will reset the connection: the peer sees an error in place of an end, and what is still on its way may be
    /// lost. Of no effect on unix sockets, which know no reset, and under TLS, where the missing close_notify says it.
    pub fn reset_on_close(&self) {
        if let Stream::Plain(Plain::Tcp(stream)) = self {
            // A socket that takes no option is gone already.
            let _ = stream.set_zero_linger();
        }
        #[cfg(feature = "simulation")]
        if let Stream::Plain(Plain::Simulated(stream)) = self {
            stream.reset_on_close();
        }
    }

    /// Bytes given to [`Stream::poll_write_slices`] may wait here (in the TLS session) and need a flush.
    pub fn buffers_writes(&self) -> bool {
        !matches!(self, Stream::Plain(_))
    }

    pub fn is_tls(&self) -> bool {
        !matches!(self, Stream::Plain(_))
    }

    /// The socket beneath.
    pub fn plain(&self) -> &Plain {
        match self {
            Stream::Plain(plain) => plain,
            Stream::TlsServer(tls) => tls.get_ref().0,
            Stream::TlsClient(tls) => tls.get_ref().0,
        }
    }

    /// The protocol that ALPN (RFC 7301) settled on is `h2`.
    pub fn negotiated_http2(&self) -> bool {
        let protocol = match self {
            Stream::Plain(_) => None,
            Stream::TlsServer(tls) => tls.get_ref().1.alpn_protocol(),
            Stream::TlsClient(tls) => tls.get_ref().1.alpn_protocol(),
        };
        protocol == Some(b"h2")
    }
}

fn plaintext_waits(reader: &mut impl io::BufRead) -> bool {
    match reader.fill_buf() {
        // Empty is a clean end (close_notify), which a read must report too.
        Ok(_) => true,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}

impl Plain {
    /// Connects, with TCP_NODELAY set: events are small and must not wait for each other.
    pub async fn connect_tcp(address: SocketAddr) -> io::Result<Plain> {
        #[cfg(feature = "simulation")]
        if let Some(network) = simulated::current() {
            return network.connect(address).await.map(Plain::Simulated);
        }
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Plain::Tcp(stream))
    }

    fn poll_read_ready(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Plain::Tcp(stream) => stream.poll_read_ready(context),
            Plain::Unix(stream) => stream.poll_read_ready(context),
            #[cfg(feature = "simulation")]
            Plain::Simulated(stream) => stream.poll_read_ready(context),
        }
    }

    /// As [`AsyncRead::poll_read`]. The system is called without the C library, whose calls may be cancelled by other
    /// threads and pay for that each time.
    fn poll_receive(&self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let budget = ready!(coop::poll_proceed(context));
        #[cfg(feature = "simulation")]
        if let Plain::Simulated(stream) = self {
            return stream.poll_receive(context, buffer).map(|received| {
                budget.made_progress();
                received
            });
        }
        loop {
            let outcome = self.transfer(Interest::READABLE, buffer.len(), |socket| {
                Ok(rustix::net::recv(socket, &mut *buffer, RecvFlags::empty())?.0)
            });
            match outcome {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(self.poll_read_ready(context))?,
                done => {
                    budget.made_progress();
                    return Poll::Ready(done);
                }
            }
        }
    }

    /// As [`AsyncWrite::poll_write`], by the way of [`Plain::poll_receive`].
    fn poll_send(&self, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let budget = ready!(coop::poll_proceed(context));
        #[cfg(feature = "simulation")]
        if let Plain::Simulated(stream) = self {
            return stream.poll_send(context, data).map(|sent| {
                budget.made_progress();
                sent
            });
        }
        loop {
            let outcome = self.transfer(Interest::WRITABLE, data.len(), |socket| {
                Ok(rustix::net::send(socket, data, SendFlags::NOSIGNAL)?)
            });
            match outcome {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(self.poll_write_ready(context))?,
                done => {
                    budget.made_progress();
                    return Poll::Ready(done);
                }
            }
        }
    }

    /// Makes `call` if the socket is ready, and notes where it no longer is: after less than was `wanted` the next
    /// call would only say so.
    fn transfer(
        &self,
        interest: Interest,
        wanted: usize,
        mut call: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut transferred = None;
        let mut once = |socket: BorrowedFd<'_>| loop {
            match call(socket) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(count) => {
                    transferred = Some(count);
                    let is_short = 0 < count && count < wanted;
                    return if is_short { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) };
                }
            }
        };
        let outcome = match self {
            Plain::Tcp(stream) => stream.try_io(interest, || once(stream.as_fd())),
            Plain::Unix(stream) => stream.try_io(interest, || once(stream.as_fd())),
            #[cfg(feature = "simulation")]
            Plain::Simulated(_) => Err(io::ErrorKind::Unsupported.into()),
        };
        transferred.map_or(outcome, Ok)
    }

    fn poll_write_ready(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Plain::Tcp(stream) => stream.poll_write_ready(context),
            Plain::Unix(stream) => stream.poll_write_ready(context),
            #[cfg(feature = "simulation")]
            Plain::Simulated(_) => Poll::Ready(Ok(())),
        }
    }

    fn is_read_ready(&self) -> bool {
        // No read is made: it is only asked whether one may be.
        let ready = match self {
            Plain::Tcp(stream) => stream.try_io(Interest::READABLE, || Ok(())),
            Plain::Unix(stream) => stream.try_io(Interest::READABLE, || Ok(())),
            #[cfg(feature = "simulation")]
            Plain::Simulated(stream) => return stream.is_read_ready(),
        };
        ready.is_ok()
    }
}

/// Calls the same method on whatever this is.
macro_rules! delegate {
    ($type:ident { $($(#[$condition:meta])? $variant:ident),+ }) => {
        impl AsyncRead for $type {
            fn poll_read(
                self: Pin<&mut Self>,
                context: &mut Context<'_>,
                buffer: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                match self.get_mut() { $($(#[$condition])? $type::$variant(inner) => Pin::new(inner).poll_read(context, buffer)),+ }
            }
        }

        impl AsyncWrite for $type {
            fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
                match self.get_mut() { $($(#[$condition])? $type::$variant(inner) => Pin::new(inner).poll_write(context, data)),+ }
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                context: &mut Context<'_>,
                slices: &[IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    $($(#[$condition])? $type::$variant(inner) => Pin::new(inner).poll_write_vectored(context, slices)),+
                }
            }

            fn is_write_vectored(&self) -> bool {
                match self { $($(#[$condition])? $type::$variant(inner) => inner.is_write_vectored()),+ }
            }

            fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() { $($(#[$condition])? $type::$variant(inner) => Pin::new(inner).poll_flush(context)),+ }
            }

            fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() { $($(#[$condition])? $type::$variant(inner) => Pin::new(inner).poll_shutdown(context)),+ }
            }
        }
    };
}

delegate!(Plain {
    Tcp,
    Unix,
    #[cfg(feature = "simulation")]
    Simulated
});
delegate!(Stream { Plain, TlsServer, TlsClient });
