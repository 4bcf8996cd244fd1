//! What a userfaultfd tells of threads that wait.

use std::io;

use linux_raw_sys::general::{
    UFFD_EVENT_PAGEFAULT, UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, uffd_msg,
};
use rustix::io::Errno;

use super::Userfault;

/// Messages read in one call.
const MESSAGES: usize = 64;
const MESSAGE_BYTES: usize = size_of::<uffd_msg>();
/// Where the fields of a message about a fault lie.
const FLAGS: usize = std::mem::offset_of!(uffd_msg, arg);
const ADDRESS: usize = FLAGS + size_of::<u64>();

/// A thread waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where the page begins that it waits for.
    pub address: u64,
    /// It wants to write.
    pub write: bool,
    /// The page is there and protected; otherwise it is missing.
    pub protected: bool,
}

impl Userfault {
    /// Takes what has been told since the last call, at most some dozens of faults, and calls `take`
    /// with each; how many that were. Does not wait: poll for the descriptor to be readable.
    ///
    /// A thread that was let go meanwhile, or interrupted by a signal, is not told of, or again.
    pub fn read(&self, mut take: impl FnMut(Fault)) -> io::Result<usize> {
        let mut buffer = [0; MESSAGES * MESSAGE_BYTES];
        let bytes = match rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut buffer)) {
            Err(Errno::AGAIN) => 0,
            other => other?,
        };
        let faults = buffer[..bytes].chunks_exact(MESSAGE_BYTES).filter_map(parse);
        Ok(faults.inspect(|fault| take(*fault)).count())
    }
}

/// Reads a message; nothing but faults is ever asked for.
fn parse(message: &[u8]) -> Option<Fault> {
    let word = |at: usize| message.get(at..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes));
    let (flags, address) = (word(FLAGS)?, word(ADDRESS)?);
    let has = |flag: u32| flags & u64::from(flag) != 0;
    (u32::from(*message.first()?) == UFFD_EVENT_PAGEFAULT).then_some(Fault {
        address,
        write: has(UFFD_PAGEFAULT_FLAG_WRITE),
        protected: has(UFFD_PAGEFAULT_FLAG_WP),
    })
}
