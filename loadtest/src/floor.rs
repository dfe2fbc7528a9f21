//! The floor: a plain byte copy between sockets, which knows nothing. What a proxy costs above it is the proxy's own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::agent::Bound;
use crate::socket::listen;
use crate::tls;

/// Flags of `loadtest floor`.
#[derive(Args, Clone, Debug)]
pub struct FloorOptions {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Where to copy to; may be given several times: connections take turns
    #[arg(long, required = true)]
    pub to: Vec<SocketAddr>,
    /// Worker threads
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Take TLS off with this certificate chain (PEM)
    #[arg(long, requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The key of --tls-cert (PEM)
    #[arg(long, requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
}

/// Copies until the process ends. Prints the bound address as one line of JSON first.
pub fn main(options: &FloorOptions) -> anyhow::Result<()> {
    rlimit::increase_nofile_limit(u64::MAX).context("cannot raise the limit of descriptors")?;
    crate::run::runtime(options.threads)?.block_on(serve(options))
}

async fn serve(options: &FloorOptions) -> anyhow::Result<()> {
    let acceptor = match (&options.tls_cert, &options.tls_key) {
        (Some(certificate), Some(key)) => Some(tls::acceptor(certificate, key, &[b"http/1.1"])?),
        _ => None,
    };
    let listener = listen(options.listen).with_context(|| format!("cannot listen on {}", options.listen))?;
    println!("{}", serde_json::to_string(&Bound { addresses: vec![listener.local_addr()?] })?);
    let targets: Arc<[SocketAddr]> = options.to.clone().into();
    let turn = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((client, _)) = listener.accept().await else {
            // Out of descriptors, mostly: let some connections end.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        // Without it small events would wait for acknowledgements, which no proxy lets happen either.
        let _ = client.set_nodelay(true);
        let (targets, turn, acceptor) = (targets.clone(), turn.clone(), acceptor.clone());
        tokio::spawn(async move {
            let target = targets[turn.fetch_add(1, Ordering::Relaxed) % targets.len()];
            // Either side may break its connection at any time; the other is closed with it.
            let _ = match acceptor {
                None => copy(client, target).await,
                Some(acceptor) => match acceptor.accept(client).await {
                    Ok(client) => copy(client, target).await,
                    Err(error) => Err(error),
                },
            };
        });
    }
}

async fn copy<S: AsyncRead + AsyncWrite + Unpin>(mut client: S, target: SocketAddr) -> std::io::Result<()> {
    let mut server = TcpStream::connect(target).await?;
    server.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}
