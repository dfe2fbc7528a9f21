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
use tokio::net::UnixListener;
use tracing::{debug, warn};

use crate::control::handover::{Refused, frame};

/// How often it is tried to open the door where another process has it: the one before, for as long as it serves.
const OPEN_EVERY: Duration = Duration::from_millis(50);
/// So often in vain is worth a line in the log.
const TRIES_SAID: u32 = 200;
/// How long a refusal may take to be written.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// After a failure to accept, which is for want of descriptors or memory.
const PAUSE: Duration = Duration::from_secs(1);

/// The door of the process that serves. Closed when it is dropped.
pub struct Door {
    address: SocketAddr,
    listener: Option<UnixListener>,
    tries: u32,
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
        Ok(Door { address: address(config)?, listener: None, tries: 0 })
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
            let came = match listener.accept().await {
                Ok((stream, _)) => stream.into_std().and_then(Comer::known),
                Err(failure) => {
                    warn!("whoever asked to take over could not be heard: {failure}");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            match came {
                Ok(comer) => return comer,
                Err(failure) => warn!("a process that asked to take over was refused: {failure}"),
            }
        }
    }
}

impl Comer {
    fn known(stream: StdUnixStream) -> io::Result<Comer> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(REFUSAL_TIMEOUT))?;
        let peer = rustix::net::sockopt::socket_peercred(&stream)?;
        if peer.uid != geteuid() {
            let (theirs, ours) = (peer.uid.as_raw(), geteuid().as_raw());
            let reason = format!("whoever asks is user {theirs}, and the process that serves is user {ours}'s");
            refuse(&stream, &reason);
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
        }
        // Fails where the kernel has none (before Linux 5.3), or the process has gone.
        let handle = match pidfd_open(peer.pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(failure) => {
                refuse(&stream, "it can't be seen by the process that serves (another container?)");
                return Err(failure.into());
            }
        };
        stream.set_write_timeout(None)?;
        Ok(Comer { stream, process: peer.pid, handle })
    }

    pub fn process(&self) -> u32 {
        self.process.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends it away with a sentence.
    pub fn refuse(self, reason: &str) {
        refuse(&self.stream, reason);
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

fn refuse(stream: &StdUnixStream, reason: &str) {
    // Whoever does not listen learns it from the end of the stream.
    let told = frame(&Refused { refused: reason.to_owned() }).and_then(|bytes| {
        let mut stream = stream;
        stream.write_all(&bytes)
    });
    if let Err(failure) = told {
        debug!("a refusal was not heard: {failure}");
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
    let stream = StdUnixStream::connect_addr(&address(config).map_err(none)?).map_err(none)?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|failure| none(failure.into()))?;
    if peer.uid != geteuid() {
        return Err(Unheard::Other(format!(
            "--upgrade: process {} answers for {}, but it is user {}'s; end that one",
            peer.pid,
            config.display(),
            peer.uid.as_raw()
        )));
    }
    Ok(stream)
}

fn open(address: &SocketAddr) -> io::Result<UnixListener> {
    let listener = StdUnixListener::bind_addr(address)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// The directory counts as it is, the file by its name there: what a ConfigMap's link points to changes.
fn address(config: &Path) -> io::Result<SocketAddr> {
    let path = std::path::absolute(config)?;
    let named = match (path.parent(), path.file_name()) {
        (Some(directory), Some(name)) => directory.canonicalize()?.join(name),
        _ => path,
    };
    let digest = Sha256::digest(named.as_os_str().as_bytes());
    let short: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    SocketAddr::from_abstract_name(format!("longhaul/{}/{short}", geteuid().as_raw()))
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
        let waits = tokio::time::timeout(3 * OPEN_EVERY, second.comer()).await;
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
