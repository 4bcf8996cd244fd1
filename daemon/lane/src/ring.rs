//! The io_uring of a lane: submits operations, waits, and returns completions.

use std::io;
use std::time::{Duration, Instant};

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, squeue};

/// An io_uring that only its own thread uses.
pub(crate) struct Ring {
    ring: IoUring,
    /// The number of operations whose result is not seen yet.
    operations: usize,
    /// The number of zero-copy sends whose result is seen, but whose pages the kernel may still read.
    notifications: usize,
}

/// The buffers of operations that the kernel may still use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InFlight {
    /// The kernel uses nothing any more.
    Nothing,
    /// The kernel may read the bytes of zero-copy sends, whose pages it has pinned.
    SentBytes,
    /// The kernel may use everything.
    All,
}

/// A message of the kernel about one operation.
pub(crate) struct Completion {
    /// The number that the caller gave the operation.
    pub operation: u64,
    /// The result, as the system call of the same name would return it.
    pub result: io::Result<u32>,
    /// More completions of the same operation follow.
    pub more: bool,
    /// For the notification of a zero-copy send, whose pages are free now: whether the kernel copied them.
    pub released: Option<bool>,
}

impl Ring {
    /// Makes a ring with room for `entries` operations at once. The caller makes it on the thread that uses it.
    pub(crate) fn new(entries: u32) -> io::Result<Self> {
        let ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(entries)?;
        Ok(Self { ring, operations: 0, notifications: 0 })
    }

    /// Queues an operation.
    ///
    /// # Safety
    /// Everything that `entry` points to stays valid, in place and (for what the kernel
    /// writes) unread until the operation's last completion.
    pub(crate) unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: passed on to the caller.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.operations += 1;
                return Ok(());
            }
            self.ring.submit()?;
        }
    }

    /// Submits what is queued and waits until something completes, or for `longest`.
    pub(crate) fn wait(&mut self, longest: Duration) -> io::Result<()> {
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

    /// Returns the next completion, if one is there.
    pub(crate) fn completed(&mut self) -> Option<Completion> {
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
        let more = cqueue::more(flags);
        match released {
            Some(_) => self.notifications -= 1,
            None => {
                self.operations -= 1;
                self.notifications += usize::from(more);
            }
        }
        Some(Completion { operation: entry.user_data(), result, more, released })
    }

    /// Discards completions until no operation is under way, for a second at most, and returns what the kernel may still
    /// use. The caller must have made all operations come to an end. The pages of a zero-copy send stay in use for as long
    /// as TCP tries to deliver them, which can be too long to wait for.
    pub(crate) fn drain(&mut self) -> InFlight {
        const LONGEST: Duration = Duration::from_secs(1);
        const RETRY: Duration = Duration::from_millis(10);
        let deadline = Instant::now() + LONGEST;
        loop {
            while self.completed().is_some() {}
            let left = deadline.saturating_duration_since(Instant::now());
            match (self.operations, self.notifications) {
                (0, 0) => return InFlight::Nothing,
                (0, _) if left.is_zero() => return InFlight::SentBytes,
                (_, _) if left.is_zero() => return InFlight::All,
                _ => {}
            }
            if self.wait(left).is_err() {
                std::thread::sleep(RETRY);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use io_uring::{opcode, types};
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn drains_what_ends_and_tells_what_does_not() {
        let (event, mut value) = (eventfd(0, EventfdFlags::empty()).unwrap(), Box::new(0u64));
        let mut ring = Ring::new(8).unwrap();
        assert_eq!(ring.drain(), InFlight::Nothing);
        let pointer: *mut u64 = &mut *value;
        let entry = opcode::Read::new(types::Fd(event.as_raw_fd()), pointer.cast(), 8).build();
        // SAFETY: the value is boxed and lives until the ring has been drained below.
        unsafe { ring.push(&entry) }.unwrap();
        assert_eq!(ring.drain(), InFlight::All);
        rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(ring.drain(), InFlight::Nothing);
        assert_eq!(*value, 1);
    }
}
