//! Buffer: 16 KiB to read into, borrowed from the worker's free list only while there is something to read.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use crate::http1::chunks::HEADROOM;

/// What one read takes at the most.
pub const READ_BYTES: usize = 16 * 1024;

/// Buffers a worker keeps for later use; more are freed.
const FREE_LIST_LENGTH_MAX: usize = 64;

thread_local! {
    static FREE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer that goes back to this thread's free list when dropped. Reads start at [`HEADROOM`].
pub struct Buffer(Vec<u8>);

impl Buffer {
    pub fn take() -> Buffer {
        let reused = FREE.with_borrow_mut(Vec::pop);
        Buffer(reused.unwrap_or_else(|| vec![0; HEADROOM + READ_BYTES]))
    }

    /// Makes room for `bytes` in all; a grown buffer is freed after use instead of kept.
    pub fn grow(&mut self, bytes: usize) {
        if self.0.len() < bytes {
            self.0.resize(bytes, 0);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.0.len() != HEADROOM + READ_BYTES {
            return;
        }
        let data = std::mem::take(&mut self.0);
        // A worker's last tasks may end after its thread-locals did; then the buffer is simply freed.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < FREE_LIST_LENGTH_MAX {
                free.push(data);
            }
        });
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
