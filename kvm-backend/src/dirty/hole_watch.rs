//! [`HoleWatch`]: whether memory was taken from a guest's files.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::io::Errno;

use crate::ram::GuestRam;

/// Notices holes that are punched into the files behind a guest's memory, by inotify(7): punching a hole modifies
/// a file, and a write through a mapping does not.
pub(super) enum HoleWatch {
    /// The kernel reports every hole to this inotify descriptor.
    Inotify(OwnedFd),
    /// The kernel reports no holes in these files, so there may be some at any time.
    Unavailable,
    /// The caller has promised that no holes are made.
    Disabled,
}

impl HoleWatch {
    /// Watches the files behind `ram` from now on.
    pub(super) fn new(ram: &GuestRam) -> Self {
        watch(ram).map_or(Self::Unavailable, Self::Inotify)
    }

    /// Returns whether holes may have been punched since the last call.
    pub(super) fn may_have_changed(&self) -> bool {
        let watch = match self {
            Self::Inotify(watch) => watch,
            Self::Unavailable => return true,
            Self::Disabled => return false,
        };
        let mut any = false;
        let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
        loop {
            match rustix::io::read(watch, &mut buffer) {
                Ok(_) => any = true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return any,
                Err(_) => return true,
            }
        }
    }
}

fn watch(ram: &GuestRam) -> Result<OwnedFd, Errno> {
    let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    for fd in ram.descriptors() {
        if is_memfd(fd) {
            // The kernel reports no event for a file that has no path (Linux 6.14).
            return Err(Errno::OPNOTSUPP);
        }
        inotify::add_watch(&watch, format!("/proc/self/fd/{}", fd.as_raw_fd()), WatchFlags::MODIFY)?;
    }
    Ok(watch)
}

/// Returns whether the file is a memfd: guest memory in one is sealed against shrinking, as no other file can be.
fn is_memfd(fd: BorrowedFd<'_>) -> bool {
    fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::ram::Backing;

    #[test]
    fn holes_are_noticed_and_writes_are_not() {
        let ram = GuestRam::create(&[(0, 1 << 20)], &Backing::File("/dev/shm".into())).unwrap();
        let watch = HoleWatch::new(&ram);
        ram.memory().write_obj(1u64, GuestAddress(0)).unwrap();
        assert!(!watch.may_have_changed());
        ram.punch(0..1).unwrap();
        ram.punch(7..8).unwrap();
        assert!(watch.may_have_changed());
        assert!(!watch.may_have_changed());
    }

    #[test]
    fn a_memfd_may_have_holes_at_any_time() {
        let ram = GuestRam::create(&[(0, 1 << 20)], &Backing::Memfd).unwrap();
        assert!(HoleWatch::new(&ram).may_have_changed());
        assert!(!HoleWatch::Disabled.may_have_changed());
    }
}
