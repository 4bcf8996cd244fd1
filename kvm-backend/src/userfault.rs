//! userfaultfd, thin: missing pages and write protection (`userfaultfd(2)`, `ioctl_userfaultfd(2)`).
//!
//! Whoever holds the descriptor acts on the memory of the process that made it. When the last copy of
//! it is closed, the kernel lifts all protection and lets every waiting thread go; whatever was
//! missing then reads as zeros.

mod faults;
mod place;

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    UFFD_FEATURE_POISON, UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, USERFAULTFD_IOC, uffdio_api, uffdio_range,
    uffdio_register, uffdio_writeprotect,
};
use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Setter, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;

use crate::ioctl::Answering;

pub use faults::Fault;
pub use place::{IfThere, Placed, Unplaced};

/// `UFFDIO_WRITEPROTECT_MODE_WP` of `linux/userfaultfd.h`, which linux-raw-sys lacks.
const MODE_PROTECT: u64 = 1 << 0;

/// Missing pages of memory in files, hugetlbfs included.
pub const MISSING: u64 = (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS) as u64;
/// Pages that raise `SIGBUS` when they are touched (Linux 6.6).
pub const POISON: u64 = UFFD_FEATURE_POISON as u64;
/// Write protection of memory in files, hugetlbfs included. A write to a protected page waits.
pub const WRITE_PROTECT: u64 = (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM) as u64;
/// A write to a protected page lifts the protection and goes on, without a message.
pub const WRITE_PROTECT_ASYNC: u64 = WRITE_PROTECT | UFFD_FEATURE_WP_ASYNC as u64;

/// What is unregistered in one go (64 MiB): the kernel goes through all page tables of it, and no
/// thread of the process can take a fault meanwhile.
const UNREGISTER_BYTES: usize = 64 << 20;

/// Which faults a range is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// First touch of a page that is not there.
    Missing,
    /// Writes to protected pages.
    WriteProtect,
    /// Both.
    Both,
}

/// A userfaultfd, of this process or of one that handed it over.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

/// Why a userfaultfd could not be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultError {
    /// This process may not.
    #[error(
        "userfaultfd for faults of the kernel is not permitted: give the user access to /dev/userfaultfd, \
         or the process CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd to 1"
    )]
    Permission,
    /// The descriptor is something else.
    #[error("the descriptor is no userfaultfd")]
    Kind,
    /// The kernel has none, or not with these features; or it was set up before.
    #[error(
        "userfaultfd with features {features:#x}: {source}; the features asked for need Linux 6.7 or newer"
    )]
    Features {
        /// `UFFD_FEATURE_*` asked for.
        features: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Userfault {
    /// Opens a userfaultfd with these `UFFD_FEATURE_*`, by `/dev/userfaultfd` or else by the
    /// system call. It reports faults of the kernel too, as KVM takes a guest's pages there.
    pub fn open(features: u64) -> Result<Self, UserfaultError> {
        let fd = open().map_err(|error| match error {
            Errno::PERM | Errno::ACCESS => UserfaultError::Permission,
            other => UserfaultError::Features { features, source: other.into() },
        })?;
        Self::from_fd(fd, features)
    }

    /// Takes a userfaultfd that another process made and left as it was, and asks for these
    /// `UFFD_FEATURE_*`. It acts on the memory of the process that made it, whoever holds it.
    ///
    /// Fails on a descriptor of any other kind, and on one that was set up before.
    pub fn from_fd(fd: OwnedFd, features: u64) -> Result<Self, UserfaultError> {
        set_up(&fd, features)?;
        Self::never_waiting(fd)
    }

    /// As [`from_fd`](Self::from_fd), and asks for the features `wished` too; whether the kernel has
    /// those. One that does not know all that it is asked for leaves the descriptor as it was.
    pub fn from_fd_wishing(fd: OwnedFd, features: u64, wished: u64) -> Result<(Self, bool), UserfaultError> {
        if set_up(&fd, features | wished).is_ok() {
            return Ok((Self::never_waiting(fd)?, true));
        }
        Ok((Self::from_fd(fd, features)?, false))
    }

    /// Whoever made the descriptor may have meant it to keep its reader waiting.
    fn never_waiting(fd: OwnedFd) -> Result<Self, UserfaultError> {
        match rustix::io::ioctl_fionbio(&fd, true) {
            Ok(()) => Ok(Self(fd)),
            Err(_) => Err(UserfaultError::Kind),
        }
    }

    /// Registers whole pages of a mapping of its process for `faults`.
    pub fn register(&self, addresses: Range<u64>, faults: Faults) -> io::Result<()> {
        let mode = match faults {
            Faults::Missing => UFFDIO_REGISTER_MODE_MISSING,
            Faults::WriteProtect => UFFDIO_REGISTER_MODE_WP,
            Faults::Both => UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
        };
        let mut argument = uffdio_register { range: range(addresses), mode: mode.into(), ioctls: 0 };
        // SAFETY: the argument is of the ioctl's type. Registering changes no memory.
        unsafe { ioctl(&self.0, Updater::<UFFDIO_REGISTER, _>::new(&mut argument)) }?;
        Ok(())
    }

    /// Ends what [`register`](Self::register) began; protection is lifted, waiting threads go on.
    pub fn unregister(&self, addresses: Range<u64>) -> io::Result<()> {
        for start in addresses.clone().step_by(UNREGISTER_BYTES) {
            let end = addresses.end.min(start.saturating_add(UNREGISTER_BYTES as u64));
            let mut argument = range(start..end);
            // SAFETY: the argument is of the ioctl's type. Unregistering changes no memory.
            unsafe { ioctl(&self.0, Updater::<UFFDIO_UNREGISTER, _>::new(&mut argument)) }?;
        }
        // The kernel wakes only those who wait for missing pages (Linux 6.18).
        self.wake(addresses)
    }

    /// Protects registered pages against writing, or lifts the protection. Also pages that are
    /// not there yet, in files and where the feature is asynchronous.
    pub fn write_protect(&self, addresses: Range<u64>, on: bool) -> io::Result<()> {
        let mode = if on { MODE_PROTECT } else { 0 };
        let mut argument = uffdio_writeprotect { range: range(addresses), mode };
        // The mappings of the process may be changing (EAGAIN); that passes.
        loop {
            // SAFETY: the argument is of the ioctl's type. Protecting changes no memory.
            match unsafe { ioctl(&self.0, Updater::<UFFDIO_WRITEPROTECT, _>::new(&mut argument)) } {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    /// Lets threads go that wait for these pages: they look again.
    pub fn wake(&self, addresses: Range<u64>) -> io::Result<()> {
        // SAFETY: the argument is of the ioctl's type, and waking changes no memory.
        Ok(unsafe { ioctl(&self.0, Setter::<UFFDIO_WAKE, _>::new(range(addresses))) }?)
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether a call failed because the process, or its mapping of that memory, is gone.
pub fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::SRCH | Errno::NOENT))
}

/// Whether a page could not be placed because there is one already; see [`IfThere::Fail`].
pub fn is_there(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::EXIST)
}

/// A userfaultfd of this process that nothing was asked of yet.
pub(crate) fn open() -> Result<OwnedFd, Errno> {
    match rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(device) => open_by(device.as_fd()),
        // SAFETY: of no concern to memory before it is registered.
        Err(_) => unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) },
    }
}

/// The same, by the rights of whoever opened `device`, which is `/dev/userfaultfd`.
pub(crate) fn open_by(device: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    const NEW: u32 = opcode::none(USERFAULTFD_IOC as u8, 0);
    let flags = OFlags::CLOEXEC | OFlags::NONBLOCK;
    let flags = std::ptr::without_provenance_mut(flags.bits() as usize);
    // SAFETY: USERFAULTFD_IOC_NEW takes flags by value.
    let fd = unsafe { ioctl(device, Answering::<NEW>::new(flags)) }?;
    // SAFETY: the ioctl returned a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks for features, as can be done once.
fn set_up(fd: &OwnedFd, features: u64) -> Result<(), UserfaultError> {
    let mut api = uffdio_api { api: UFFD_API.into(), features, ioctls: 0 };
    // SAFETY: the argument is of the ioctl's type.
    unsafe { ioctl(fd, Updater::<UFFDIO_API, _>::new(&mut api)) }.map_err(|error| match error {
        Errno::NOTTY => UserfaultError::Kind,
        other => UserfaultError::Features { features, source: other.into() },
    })
}

fn range(addresses: Range<u64>) -> uffdio_range {
    uffdio_range { start: addresses.start, len: addresses.end.saturating_sub(addresses.start) }
}

#[cfg(test)]
mod tests;
