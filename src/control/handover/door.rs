//! Door: where `longhaul run --upgrade` finds the process that serves the same configuration, and is found by it.
//!
//! It is a unix socket in the abstract namespace (unix(7)), so that there is no file to be left behind, named after the
//! user and the configuration file. Such a name protects nothing, so each side asks the kernel who the other is
//! (SO_PEERCRED), and speaks to the same user only.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::UCred;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::control::handover::{Refused, frame};

/// How often it is tried to open the door where another process has it: the one before, for as long as it serves.
const OPEN_EVERY: Duration = Duration::from_millis(50);
/// So often in vain is worth a line in the log.
const TRIES_SAID: u32 = 200;
/// What whoever comes says first. Before that nothing is begun for it: not everybody who connects wants to take over.
const KNOCK: &[u8; 17] = b"longhaul upgrade\n";
/// How long it may take for that.
const KNOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// So many are heard at once.
const STANDING_MAX: usize = 16;
/// How long a refusal may take to be written.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// After a failure to accept, which is for want of descriptors or memory.
const PAUSE: Duration = Duration::from_secs(1);

/// The door of the process that serves. Closed when it is dropped.
pub struct Door {
    address: SocketAddr,
    listener: Option<UnixListener>,
    tries: u32,
    /// Those who have come and have not yet been let in or sent away. Nothing waits for them.
    standing: JoinSet<io::Result<Comer>>,
}

/// A process of the same user that asks to take over.
pub struct Comer {
    pub stream: StdUnixStream,
    process: Pid,
    /// A handle of it: its number may be another's when it has gone.
    handle: OwnedFd,
}

impl Door {
    /// The one of this configuration file; it is opened when [`Door::comer`] is first awaited.
    pub fn of(config: &Path) -> io::Result<Door> {
        Ok(Door { address: address(config)?, listener: None, tries: 0, standing: JoinSet::new() })
    }

    /// Waits for a process that may take over. Whoever may not is told why.
    pub async fn comer(&mut self) -> Comer {
        loop {
            let listener = match self.listener.take() {
                Some(listener) => self.listener.insert(listener),
                None => match open(&self.address) {
                    Ok(listener) => self.listener.insert(listener),
                    Err(failure) => {
                        self.tries = self.tries.saturating_add(1);
                        if self.tries == TRIES_SAID {
                            warn!("`longhaul run --upgrade` can't find this process (SIGUSR2 still works): {failure}");
                        }
                        tokio::time::sleep(OPEN_EVERY).await;
                        continue;
                    }
                },
            };
            tokio::select! {
                Some(came) = self.standing.join_next() => match came {
                    Ok(Ok(comer)) => return comer,
                    Ok(Err(failure)) => warn!("a process that asked to take over was refused: {failure}"),
                    Err(failure) => warn!("whoever asked to take over could not be heard: {failure}"),
                },
                accepted = listener.accept(), if self.standing.len() < STANDING_MAX => match accepted {
                    Ok((stream, _)) => drop(self.standing.spawn(Comer::of(stream))),
                    Err(failure) => {
                        warn!("whoever asked to take over could not be heard: {failure}");
                        tokio::time::sleep(PAUSE).await;
                    }
                },
            }
        }
    }
}

impl Comer {
    async fn of(mut stream: UnixStream) -> io::Result<Comer> {
        let peer = stream.peer_cred()?;
        let refused = match Self::known(&mut stream, peer).await {
            Ok((process, handle)) => {
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                return Ok(Comer { stream, process, handle });
            }
            Err(refused) => refused,
        };
        let told = frame(&Refused { refused: refused.clone() })?;
        // Whoever does not listen learns it from the end of the stream.
        let _ = timeout(REFUSAL_TIMEOUT, stream.write_all(&told)).await;
        Err(io::Error::new(io::ErrorKind::PermissionDenied, refused))
    }

    /// Or why it may not take over.
    async fn known(stream: &mut UnixStream, peer: UCred) -> Result<(Pid, OwnedFd), String> {
        let (theirs, ours) = (peer.uid(), geteuid().as_raw());
        if theirs != ours {
            return Err(format!("whoever asks is user {theirs}, and the process that serves is user {ours}'s"));
        }
        let mut said = [0; KNOCK.len()];
        match timeout(KNOCK_TIMEOUT, stream.read_exact(&mut said)).await {
            Ok(Ok(_)) if said == *KNOCK => {}
            Ok(Ok(_)) => return Err("what it says is not what `longhaul run --upgrade` says".to_owned()),
            Ok(Err(_)) => return Err("it went before it had said anything".to_owned()),
            Err(_) => return Err(format!("it said nothing within {KNOCK_TIMEOUT:?}")),
        }
        let Some(process) = peer.pid().and_then(Pid::from_raw) else {
            return Err(format!(
                "whoever asks runs outside the container (the PID namespace) of the process that serves, which could not end \
                 it if it failed; run it there, or use kill -USR2 {} there",
                std::process::id()
            ));
        };
        match pidfd_open(process, PidfdFlags::empty()) {
            Ok(handle) => Ok((process, handle)),
            Err(failure) => Err(format!(
                "the process that serves can get no hold of process {} ({failure}; it takes Linux 5.3)",
                process.as_raw_nonzero()
            )),
        }
    }

    pub fn process(&self) -> u32 {
        self.process.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends it away with a sentence.
    pub fn refuse(mut self, reason: &str) {
        let told = self.stream.set_write_timeout(Some(REFUSAL_TIMEOUT)).and_then(|()| {
            let refused = Refused { refused: reason.to_owned() };
            self.stream.write_all(&frame(&refused)?)
        });
        // Whoever does not listen learns it from the end of the stream.
        if let Err(failure) = told {
            debug!("a refusal was not heard: {failure}");
        }
    }

    /// What is left of it when its stream is given away.
    pub fn into_parts(self) -> (StdUnixStream, Guest) {
        let process = self.process();
        (self.stream, Guest { process, handle: self.handle })
    }
}

/// A process that takes over without having been started by this one.
pub struct Guest {
    pub process: u32,
    handle: OwnedFd,
}

impl Guest {
    /// It must not serve: what it was given has been taken back.
    pub fn end(&self) {
        match pidfd_send_signal(&self.handle, Signal::KILL) {
            // It has ended by itself.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(failure) => warn!(process = self.process, "the new process can't be ended: {failure}"),
        }
    }
}

/// Why nobody opened: a sentence each.
#[derive(Debug)]
pub(super) enum Unheard {
    Nobody(String),
    /// Another user's.
    Other(String),
}

/// Asks the process that serves this configuration to hand over.
pub(super) fn knock(config: &Path) -> Result<StdUnixStream, Unheard> {
    let none = |failure: io::Error| {
        Unheard::Nobody(format!(
            "--upgrade: no running longhaul of user {} and {} was found to take over from ({failure}); start it without \
             --upgrade, or give -c the same path as the running one",
            geteuid().as_raw(),
            config.display()
        ))
    };
    let mut stream = StdUnixStream::connect_addr(&address(config).map_err(none)?).map_err(none)?;
    let peer = peer(&stream).map_err(none)?;
    if peer.uid() != geteuid().as_raw() {
        let process = match peer.pid() {
            Some(process) if process > 0 => format!("process {process}"),
            _ => "a process of another container".to_owned(),
        };
        return Err(Unheard::Other(format!(
            "--upgrade: {process} answers for {}, but it is user {}'s; end that one",
            config.display(),
            peer.uid()
        )));
    }
    stream.write_all(KNOCK).map_err(none)?;
    Ok(stream)
}

/// Who the other side is. Its process has no number where it can't be seen from here.
fn peer(stream: &StdUnixStream) -> io::Result<UCred> {
    // Only a socket of a runtime can be asked; nothing is waited for in it.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let _within = runtime.enter();
    stream.set_nonblocking(true)?;
    let asked = UnixStream::from_std(stream.try_clone()?)?.peer_cred();
    stream.set_nonblocking(false)?;
    asked
}

fn open(address: &SocketAddr) -> io::Result<UnixListener> {
    let listener = StdUnixListener::bind_addr(address)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// The directory counts as it is, the file by its name there: what a ConfigMap's link points to changes.
pub(super) fn address(config: &Path) -> io::Result<SocketAddr> {
    let path = std::path::absolute(config)?;
    let named = match (path.parent(), path.file_name()) {
        (Some(directory), Some(name)) => directory.canonicalize()?.join(name),
        _ => path,
    };
    let digest = Sha256::digest(named.as_os_str().as_bytes());
    let short: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    // The number is raised when something else is to be said at the door.
    SocketAddr::from_abstract_name(format!("longhaul/2/{}/{short}", geteuid().as_raw()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(config: &Path) -> Vec<u8> {
        address(config).unwrap().as_abstract_name().unwrap().to_vec()
    }

    #[test]
    fn a_configuration_has_one_name_however_it_is_reached() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("a");
        std::fs::create_dir(&inside).unwrap();
        let linked = directory.path().join("link");
        std::os::unix::fs::symlink(&inside, &linked).unwrap();
        let known = name(&inside.join("longhaul.yaml"));
        assert_eq!(known, name(&linked.join("longhaul.yaml")));
        assert_eq!(known, name(&directory.path().join("a/../a/longhaul.yaml")));
        assert_ne!(known, name(&inside.join("other.yaml")));
        // What the file is a link to may change from one reload to the next.
        std::os::unix::fs::symlink("elsewhere", inside.join("longhaul.yaml")).unwrap();
        assert_eq!(known, name(&inside.join("longhaul.yaml")));
    }

    #[tokio::test]
    async fn whoever_says_nothing_or_something_else_is_sent_away_and_keeps_nobody_waiting() {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("longhaul.yaml");
        let mut door = Door::of(&config).unwrap();
        let address = address(&config).unwrap();
        let opens = timeout(OPEN_EVERY, door.comer());
        assert!(opens.await.is_err(), "nobody is there");
        let silent: Vec<_> = (1..STANDING_MAX).map(|_| StdUnixStream::connect_addr(&address).unwrap()).collect();
        let mut other = StdUnixStream::connect_addr(&address).unwrap();
        other.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let waits = timeout(KNOCK_TIMEOUT / 2, door.comer());
        assert!(waits.await.is_err(), "none of them may take over");
        let knocking = tokio::task::spawn_blocking(move || knock(&config).unwrap());
        let comer = timeout(KNOCK_TIMEOUT / 2, door.comer()).await.expect("the place of one who was refused");
        assert_eq!(comer.process(), std::process::id());
        drop(knocking.await.unwrap());
        let waits = timeout(2 * KNOCK_TIMEOUT, door.comer());
        assert!(waits.await.is_err());
        for (mut stream, why) in
            silent.into_iter().map(|stream| (stream, "said nothing")).chain([(other, "is not what")])
        {
            let mut said = Vec::new();
            // An error where not all was read of what it had said; the refusal comes before that.
            let _ = io::Read::read_to_end(&mut stream, &mut said);
            let said = String::from_utf8_lossy(&said);
            assert!(said.contains(why), "{said}");
        }
    }

    #[tokio::test]
    async fn a_door_opens_when_the_one_before_has_closed() {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("longhaul.yaml");
        let Err(Unheard::Nobody(said)) = knock(&config) else { panic!("there is none") };
        assert!(said.contains("no running longhaul") && said.contains("start it without --upgrade"), "{said}");
        let mut first = Door::of(&config).unwrap();
        let mut second = Door::of(&config).unwrap();
        let knocking = |config: std::path::PathBuf| tokio::task::spawn_blocking(move || knock(&config));
        let came = tokio::join!(first.comer(), async {
            while knocking(config.clone()).await.unwrap().is_err() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        assert_eq!(came.0.process(), std::process::id());
        let waits = timeout(3 * OPEN_EVERY, second.comer()).await;
        assert!(waits.is_err(), "there is one already");
        drop(first);
        let (_, asked) = tokio::join!(second.comer(), async {
            loop {
                if let Ok(stream) = knocking(config.clone()).await.unwrap() {
                    break stream;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        drop(asked);
    }
}
