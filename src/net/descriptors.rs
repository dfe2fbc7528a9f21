//! Descriptors: how many sockets this process may hold, and the kernel's table that it holds them in.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;

/// So many slots the table of descriptors has from the beginning: 8 bytes of the kernel's memory each.
const SLOTS: u64 = 16 * 1024;

/// Raises the soft limit of open descriptors to the hard one and returns the limit that holds now.
///
/// A proxy holds two sockets a stream, and the usual soft limit of 1024 is that of a shell, not of a server.
pub fn raise_limit() -> io::Result<u64> {
    rlimit::increase_nofile_limit(u64::MAX)
}

/// Makes the table of descriptors as large as `limit` allows, up to [`SLOTS`], before anybody waits for it.
///
/// Linux doubles a table that is full. Where threads share it, whoever needs the next descriptor then waits until every
/// core has let go of the old table (`expand_fdtable`, fs/file.c): some 10 ms in which a worker with a new connection
/// serves none of its streams. The table never shrinks.
pub fn reserve(limit: u64) -> io::Result<()> {
    let last = RawFd::try_from(SLOTS.min(limit).saturating_sub(1)).unwrap_or(0);
    // The lowest free descriptor from there on, which goes again at once.
    rustix::io::fcntl_dupfd_cloexec(File::open("/dev/null")?, last)?;
    Ok(())
}
