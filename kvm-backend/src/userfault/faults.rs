//! Reading the faults of threads that wait: [`Userfault::read`].

use std::io;

use linux_raw_sys::general::{
    UFFD_EVENT_PAGEFAULT, UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, uffd_msg,
};
use rustix::io::Errno;

use super::Userfault;

/// The number of messages that are read in one call.
const MESSAGES: usize = 64;
const MESSAGE_BYTES: usize = size_of::<uffd_msg>();
/// The offsets of the fields of a message about a fault.
const FLAGS: usize = std::mem::offset_of!(uffd_msg, arg);
const ADDRESS: usize = FLAGS + size_of::<u64>();

/// A fault that a thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The address at which the page begins.
    pub address: u64,
    /// Whether the thread wants to write.
    pub write: bool,
    /// Whether the page is present and write-protected; otherwise it is missing.
    pub protected: bool,
}

impl Userfault {
    /// Reads faults that were reported since the last call, at most some dozens, calls `take` with each, and
    /// returns how many there were. The call does not wait: poll(2) tells when the descriptor is readable.
    ///
    /// The fault of a thread that was woken meanwhile is not reported; that of a thread which a signal interrupted
    /// may be reported again.
    ///
    /// # Errors
    ///
    /// The kernel refused.
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

/// Parses a message; `None` if it is not about a fault, which the features of this library never ask for.
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
