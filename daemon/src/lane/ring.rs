//! One lane's io_uring: submit, wait, complete.

use std::io;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, squeue};

/// An io_uring that only its own thread uses.
pub struct Ring {
    ring: IoUring,
}

/// What the kernel says of one operation.
pub struct Completion {
    /// The number that the operation was given.
    pub operation: u64,
    /// Its result, as the system call of the same name would return it.
    pub result: io::Result<u32>,
    /// More completions of the same operation follow.
    pub more: bool,
    /// The pages of a zero-copy send are free again; `Some(true)` if they had been copied.
    pub released: Option<bool>,
}

impl Ring {
    /// Makes a ring with room for `entries` operations at once. Call on the thread that uses it.
    pub fn new(entries: u32) -> io::Result<Self> {
        let ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(entries)?;
        Ok(Self { ring })
    }

    /// Queues an operation.
    ///
    /// # Safety
    /// Everything that `entry` points to stays valid, in place and (for what the kernel
    /// writes) unread until the operation's last completion.
    pub unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: passed on to the caller.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }

    /// Submits what is queued and waits until something completes, or for `longest`.
    pub fn wait(&mut self, longest: Duration) -> io::Result<()> {
        let timeout = Timespec::from(longest);
        let arguments = SubmitArgs::new().timespec(&timeout);
        match self.ring.submitter().submit_with_args(1, &arguments) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The next completion, if one is there.
    pub fn completed(&mut self) -> Option<Completion> {
        /// `IORING_NOTIF_USAGE_ZC_COPIED`, bit 31 of a notification's result.
        const COPIED: u32 = 1 << 31;
        let entry = self.ring.completion().next()?;
        let (result, flags) = (entry.result(), entry.flags());
        let released = cqueue::notif(flags).then_some(result as u32 & COPIED != 0);
        let result = match (released, u32::try_from(result)) {
            (Some(_), _) => Ok(0),
            (None, Ok(count)) => Ok(count),
            (None, Err(_)) => Err(io::Error::from_raw_os_error(-result)),
        };
        Some(Completion { operation: entry.user_data(), result, more: cqueue::more(flags), released })
    }
}
