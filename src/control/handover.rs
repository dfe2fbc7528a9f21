//! Handover: a new process takes over from this one without a connection refused, cut or moved.
//!
//! On SIGUSR2 the process that serves starts the program anew and gives it, over a socket pair, handles of its listening
//! sockets; one that was started beside it (`longhaul run --upgrade`) comes to its [`door`] and is given the same. The new
//! one loads the configuration, builds everything and says that it is ready; until then nothing has
//! changed, and if it fails the old one goes on. Then the old one gives it all that lives (`state::succession`), in one
//! message. From there on the new one decides, and accepts; the old one finishes the exchanges that it has, and asks the
//! new one wherever something has to be decided for them. Listening sockets are never closed, so what connects meanwhile
//! waits in their backlog.
//!
//! ```text
//! old                               new
//!   start, Hello + sockets     ->     load, bind, build
//!                              <-     Ready
//!   Estate                     ->     take it over
//!                              <-     Serving            accepts from here on
//!   stop accepting; Released   ->     is the main process
//!   Told ...                   <->    Answer ...
//!   its last exchange ends; exit
//! ```

mod door;
mod predecessor;
mod successor;

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::config::Address;
use crate::state::succession::{Answer, Estate, Told};
use crate::store::Secrets;

pub use door::Door;
pub use predecessor::{Link, Predecessor};
pub use successor::{HandOver, run};

/// Set for a process that is to take over from the one that started it; the socket pair is its standard input.
const ENVIRONMENT: &str = "LONGHAUL_HANDOVER";

/// What both have to understand. Raised when a message changes its meaning.
const PROTOCOL: u32 = 2;

/// How long the other process may take for one step, the load of a configuration included.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// One message: what a million sessions take, and much more.
const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// What a process tells the one that it has started.
#[derive(Serialize, Deserialize)]
struct Hello {
    protocol: u32,
    secrets: Secrets,
    generation: u64,
    sha256: String,
    /// Of the sockets that come with it, in their order.
    sockets: Vec<Passed>,
}

/// In place of [`Hello`], to a process that came by itself: why there is no handover.
#[derive(Serialize)]
struct Refused {
    refused: String,
}

#[derive(Serialize, Deserialize)]
struct Passed {
    tcp: Option<std::net::SocketAddr>,
    unix: Option<PathBuf>,
    purpose: String,
    owns_file: bool,
}

impl Passed {
    fn address(&self) -> Option<Address> {
        self.tcp.map(Address::Tcp).or_else(|| self.unix.clone().map(Address::Unix))
    }
}

/// From the old process to the new one, after [`Hello`].
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ToNew {
    Estate(Vec<Estate>),
    /// The old one accepts nothing any more, and the service manager knows.
    Released,
    Told(Told),
}

/// From the new process to the old one.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ToOld {
    Ready,
    Serving,
    Answer(Answer),
}

/// The program of this process, and how it was started: for the process that is to come after it.
#[derive(Clone)]
pub struct Program {
    /// By the name under which it was found, so that a file that has taken its place is what starts.
    path: PathBuf,
    arguments: Vec<OsString>,
}

impl Program {
    /// Must be called at the start, before the working directory or the file can change.
    pub fn of_this_process() -> io::Result<Program> {
        let mut arguments = std::env::args_os();
        let name = PathBuf::from(arguments.next().unwrap_or_default());
        let path = if name.components().count() > 1 {
            std::path::absolute(&name)?
        } else {
            let directories = std::env::var_os("PATH").unwrap_or_default();
            let found = std::env::split_paths(&directories).map(|directory| directory.join(&name));
            match found.into_iter().find(|path| !name.as_os_str().is_empty() && path.is_file()) {
                Some(path) => std::path::absolute(path)?,
                None => std::env::current_exe()?,
            }
        };
        // That was for this process alone; the next one is started by it.
        Ok(Program { path, arguments: arguments.filter(|argument| argument != "--upgrade").collect() })
    }
}

/// A channel to or from the task that reads and writes. What waits in it is bounded by the exchanges that the old process
/// still has, of which there come no more: each says a few things, once. Senders hold a service's lock, so they can't wait.
#[expect(clippy::disallowed_methods, reason = "bounded by what fills it")]
fn channel<T>() -> (mpsc::UnboundedSender<T>, mpsc::UnboundedReceiver<T>) {
    mpsc::unbounded_channel()
}

fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = bytes.len() - 4;
    if length > MESSAGE_BYTES_MAX {
        return Err(io::Error::other(format!("a message of {length} bytes is longer than a handover allows")));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_be_bytes());
    Ok(bytes)
}

fn length_of(head: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_be_bytes(head) as usize;
    if length > MESSAGE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the other process speaks something else"));
    }
    Ok(length)
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), message: &impl Serialize) -> io::Result<()> {
    stream.write_all(&frame(message)?).await
}

/// The next message; an error of the kind `UnexpectedEof` where the other process has gone.
async fn receive<M: DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<M> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let length = length_of(head)?;
    // What is promised is not believed before it comes.
    let mut bytes = Vec::new();
    stream.take(length as u64).read_to_end(&mut bytes).await?;
    if bytes.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&bytes)?)
}

async fn in_time<T>(what: &str, step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(STEP_TIMEOUT, step).await {
        Ok(done) => done.map_err(|failure| io::Error::new(failure.kind(), format!("{what}: {failure}"))),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("{what}: nothing within {STEP_TIMEOUT:?}"))),
    }
}
