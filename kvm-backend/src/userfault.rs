//! [`Userfault`]: a thin layer over userfaultfd, for missing pages and write protection (`userfaultfd(2)`,
//! `ioctl_userfaultfd(2)`).
//!
//! A process that holds the descriptor acts on the memory of the process that made it. When the last copy of the
//! descriptor is closed, the kernel lifts all protection and wakes every waiting thread; pages that were missing
//! then read as zeros.

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

use crate::ioctl::ReturnsValue;

pub use faults::Fault;
pub use place::{IfPresent, PlaceError, Placed};

/// `UFFDIO_WRITEPROTECT_MODE_WP` of `linux/userfaultfd.h`, which linux-raw-sys lacks.
const MODE_PROTECT: u64 = 1 << 0;

/// The features for missing pages of memory in files, hugetlbfs included.
pub const MISSING: u64 = (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS) as u64;
/// The feature for pages that raise `SIGBUS` when they are touched (Linux 6.6).
pub const POISON: u64 = UFFD_FEATURE_POISON as u64;
/// The features for write protection of memory in files, hugetlbfs included, where a write to a protected page
/// waits.
pub const WRITE_PROTECT: u64 = (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM) as u64;
/// The features for write protection where a write to a protected page lifts the protection and goes on, without a
/// message (Linux 6.7).
pub const WRITE_PROTECT_ASYNC: u64 = WRITE_PROTECT | UFFD_FEATURE_WP_ASYNC as u64;

/// The number of bytes that are unregistered in one go (64 MiB): the kernel goes through all their page tables,
/// and no thread of the process can take a fault meanwhile.
const UNREGISTER_BYTES: usize = 64 << 20;

/// The faults for which a range is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// The range is registered for the first touch of a page that is missing.
    Missing,
    /// The range is registered for writes to protected pages.
    WriteProtect,
    /// The range is registered for both.
    Both,
}

/// A userfaultfd of this process, or of another process that handed it over. Reading it never waits.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

/// Why a userfaultfd could not be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultError {
    /// This process may not make a userfaultfd.
    #[error(
        "userfaultfd for faults of the kernel is not permitted: give the user access to /dev/userfaultfd, \
         or the process CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd to 1"
    )]
    Permission,
    /// The descriptor is no userfaultfd.
    #[error("cannot use the descriptor as a userfaultfd: it is something else")]
    Kind,
    /// The kernel has no userfaultfd, or not with these features; or the descriptor was set up before.
    #[error(
        "cannot set up a userfaultfd with features {features:#x}: {source}; they need Linux 6.7 or newer, and a \
         userfaultfd can be set up once"
    )]
    Features {
        /// The `UFFD_FEATURE_*` bits that were asked for.
        features: u64,
        /// What the kernel answered.
        source: io::Error,
    },
}

impl Userfault {
    /// Opens a userfaultfd with these `UFFD_FEATURE_*` bits, by `/dev/userfaultfd` or else by the system call. It
    /// reports faults in the kernel too, as that is where KVM touches a guest's pages.
    ///
    /// # Errors
    ///
    /// [`UserfaultError::Permission`], and [`UserfaultError::Features`].
    pub fn open(features: u64) -> Result<Self, UserfaultError> {
        let fd = open().map_err(|error| match error {
            Errno::PERM | Errno::ACCESS => UserfaultError::Permission,
            other => UserfaultError::Features { features, source: other.into() },
        })?;
        Self::from_fd(fd, features)
    }

    /// Takes a userfaultfd that another process made and did not set up, and sets it up with these
    /// `UFFD_FEATURE_*` bits (`UFFDIO_API`). It acts on the memory of the process that made it.
    ///
    /// # Errors
    ///
    /// [`UserfaultError::Kind`] for a descriptor of another kind, and [`UserfaultError::Features`] if the kernel lacks a
    /// feature or the descriptor was set up before.
    pub fn from_fd(fd: OwnedFd, features: u64) -> Result<Self, UserfaultError> {
        set_up(&fd, features)?;
        Self::nonblocking(fd)
    }

    /// Takes a userfaultfd as [`from_fd`](Self::from_fd) does, with the `optional` features too if the kernel has
    /// them all, and returns whether it has.
    ///
    /// # Errors
    ///
    /// The errors are those of [`from_fd`](Self::from_fd).
    pub fn from_fd_with_optional(
        fd: OwnedFd,
        features: u64,
        optional: u64,
    ) -> Result<(Self, bool), UserfaultError> {
        // A kernel that does not know a feature leaves the descriptor as it was.
        if set_up(&fd, features | optional).is_ok() {
            return Ok((Self::nonblocking(fd)?, true));
        }
        Ok((Self::from_fd(fd, features)?, false))
    }

    /// Takes a userfaultfd that was set up before, by a process that held another copy of it. Memory that is registered
    /// with it stays so. A page that a thread waits for, and of which another copy has read, is reported again after
    /// [`wake`](Self::wake).
    ///
    /// # Errors
    ///
    /// [`UserfaultError::Kind`] for a descriptor of another kind.
    pub fn from_fd_set_up(fd: OwnedFd) -> Result<Self, UserfaultError> {
        Self::nonblocking(fd)
    }

    /// Makes reads return at once: the process that made the descriptor may have meant it to block its reader.
    fn nonblocking(fd: OwnedFd) -> Result<Self, UserfaultError> {
        match rustix::io::ioctl_fionbio(&fd, true) {
            Ok(()) => Ok(Self(fd)),
            Err(_) => Err(UserfaultError::Kind),
        }
    }

    /// Registers whole pages of a mapping of the descriptor's process for `faults` (`UFFDIO_REGISTER`).
    ///
    /// # Errors
    ///
    /// The kernel refused, as it does if nothing is mapped there or another userfaultfd has registered it.
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

    /// Undoes [`register`](Self::register) (`UFFDIO_UNREGISTER`): protection is lifted, and waiting threads go on.
    ///
    /// # Errors
    ///
    /// The kernel refused; see [`is_gone`] for a process that has ended.
    pub fn unregister(&self, addresses: Range<u64>) -> io::Result<()> {
        for start in addresses.clone().step_by(UNREGISTER_BYTES) {
            let end = addresses.end.min(start.saturating_add(UNREGISTER_BYTES as u64));
            let mut argument = range(start..end);
            // SAFETY: the argument is of the ioctl's type. Unregistering changes no memory.
            unsafe { ioctl(&self.0, Updater::<UFFDIO_UNREGISTER, _>::new(&mut argument)) }?;
        }
        // The kernel wakes only threads that wait for missing pages (Linux 6.18).
        self.wake(addresses)
    }

    /// Write-protects registered pages, or lifts their protection and wakes the threads that wait for it
    /// (`UFFDIO_WRITEPROTECT`). In files, and where the feature is asynchronous, pages that are missing are
    /// protected too.
    ///
    /// # Errors
    ///
    /// The kernel refused; see [`is_gone`] for a process that has ended.
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

    /// Wakes the threads that wait for these pages (`UFFDIO_WAKE`); they then try again.
    ///
    /// # Errors
    ///
    /// The kernel refused.
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

/// Returns whether a call failed because the process has ended, or no longer maps that memory (`ESRCH`, `ENOENT`).
pub fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::SRCH | Errno::NOENT))
}

/// Returns whether a page was not placed because there is one already (`EEXIST`); see [`IfPresent::Fail`].
pub fn is_already_present(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::EXIST)
}

/// Makes a userfaultfd of this process that is not set up yet.
pub(crate) fn open() -> Result<OwnedFd, Errno> {
    match rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(device) => open_by(device.as_fd()),
        // SAFETY: a userfaultfd does nothing to memory before it is registered.
        Err(_) => unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) },
    }
}

/// Makes a userfaultfd of this process that is not set up yet, by `device`, which is an open `/dev/userfaultfd`.
/// The rights of the process that opened it count.
pub(crate) fn open_by(device: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    const NEW: u32 = opcode::none(USERFAULTFD_IOC as u8, 0);
    let flags = OFlags::CLOEXEC | OFlags::NONBLOCK;
    let flags = std::ptr::without_provenance_mut(flags.bits() as usize);
    // SAFETY: USERFAULTFD_IOC_NEW takes flags by value.
    let fd = unsafe { ioctl(device, ReturnsValue::<NEW>::new(flags)) }?;
    // SAFETY: the ioctl returned a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets a userfaultfd up with features, as can be done once (`UFFDIO_API`).
fn set_up(fd: &OwnedFd, features: u64) -> Result<(), UserfaultError> {
    let mut api = uffdio_api { api: UFFD_API.into(), features, ioctls: 0 };
    // SAFETY: the argument is of the ioctl's type.
    unsafe { ioctl(fd, Updater::<UFFDIO_API, _>::new(&mut api)) }.map_err(|error| match error {
        Errno::NOTTY => UserfaultError::Kind,
        other => UserfaultError::Features { features, source: other.into() },
    })
}

/// Returns a range of addresses as the ioctls take it.
fn range(addresses: Range<u64>) -> uffdio_range {
    uffdio_range { start: addresses.start, len: addresses.end.saturating_sub(addresses.start) }
}

#[cfg(test)]
mod tests;
