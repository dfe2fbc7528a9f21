//! The mock agent: a very cheap HTTP/1.1 and HTTP/2 server that streams stamped events, holds runs, runs jobs and echoes WebSockets.
//!
//! One process plays as many backends as it has listeners, so that it can say how evenly runs lay on them.

mod answer;
mod board;
mod http1;
mod http2;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};

use crate::socket::{PrefixedStream, listen};
use crate::tls;
use board::Board;
pub use board::BoardReport;

/// Flags of `loadtest agent`.
#[derive(Args, Clone, Debug)]
pub struct AgentOptions {
    /// Where to listen; may be given several times: each address is one backend. Port 0 chooses a free port
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: Vec<SocketAddr>,
    /// Serve each --listen address on so many ports (with port 0)
    #[arg(long, default_value_t = 1)]
    pub backends: usize,
    /// How many runs a backend works on at once; the rest wait in order. Unset: all at once
    #[arg(long)]
    pub slots: Option<usize>,
    /// Threads that serve
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Serve TLS with this certificate chain (PEM)
    #[arg(long, requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The key of --tls-cert (PEM)
    #[arg(long, requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
}

/// What the first line on stdout says, as JSON.
#[derive(serde::Deserialize, serde::Serialize)]
pub struct Bound {
    pub addresses: Vec<SocketAddr>,
}

const BACKENDS_MAX: usize = 1000;

/// Serves until the process ends. Prints the bound addresses as one line of JSON first.
pub fn main(options: &AgentOptions) -> anyhow::Result<()> {
    anyhow::ensure!(
        (1..=BACKENDS_MAX).contains(&options.backends),
        "--backends must be 1 to {BACKENDS_MAX}, not {}",
        options.backends
    );
    rlimit::increase_nofile_limit(u64::MAX).context("cannot raise the limit of descriptors")?;
    crate::run::runtime(options.threads)?.block_on(serve(options))
}

async fn serve(options: &AgentOptions) -> anyhow::Result<()> {
    let acceptor = match (&options.tls_cert, &options.tls_key) {
        (Some(certificate), Some(key)) => Some(tls::acceptor(certificate, key, &[b"h2", b"http/1.1"])?),
        _ => None,
    };
    let mut listeners = Vec::new();
    for address in &options.listen {
        for _ in 0..options.backends {
            listeners.push(listen(*address).with_context(|| format!("cannot listen on {address}"))?);
        }
    }
    let addresses = listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?;
    println!("{}", serde_json::to_string(&Bound { addresses })?);

    let board = Arc::new(Board::new(listeners.len(), options.slots));
    let mut serving = tokio::task::JoinSet::new();
    for (backend, listener) in listeners.into_iter().enumerate() {
        serving.spawn(accept(listener, acceptor.clone(), Backend { number: backend, board: board.clone() }));
    }
    serving.join_next().await;
    Ok(())
}

/// One of the backends that this process plays.
#[derive(Clone)]
struct Backend {
    number: usize,
    board: Arc<Board>,
}

async fn accept(listener: TcpListener, acceptor: Option<tokio_rustls::TlsAcceptor>, backend: Backend) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, mostly: let some connections end.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let (acceptor, backend) = (acceptor.clone(), backend.clone());
        tokio::spawn(async move {
            // A client that breaks its connection is the client's matter: the generator reports it from its side.
            let _ = connection(stream, acceptor, backend).await;
        });
    }
}

const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

async fn connection(
    mut stream: TcpStream,
    acceptor: Option<tokio_rustls::TlsAcceptor>,
    backend: Backend,
) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    if let Some(acceptor) = acceptor {
        let stream = acceptor.accept(stream).await?;
        if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
            return http2::serve(stream, backend).await;
        }
        return http1::serve(stream, Vec::new(), backend).await;
    }
    let mut first = vec![0; HTTP2_PREFACE.len()];
    let mut length = 0;
    while length < first.len() && first[..length] == HTTP2_PREFACE[..length] {
        match stream.read(&mut first[length..]).await? {
            0 => return Ok(()),
            read => length += read,
        }
    }
    first.truncate(length);
    if first == HTTP2_PREFACE {
        return http2::serve(PrefixedStream::new(first, stream), backend).await;
    }
    http1::serve(stream, first, backend).await
}
