//! [`Punches`]: whether memory was taken from a guest's files.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::io::Errno;

use crate::ram::GuestRam;

/// Hears of every hole that is punched into the files behind a guest's memory (inotify: punching
/// modifies a file, a write through a mapping does not).
pub(super) enum Punches {
    /// Of this.
    Heard(OwnedFd),
    /// Nothing would be heard of any.
    Unheard,
    /// There are none.
    None,
}

impl Punches {
    /// Listens from now on.
    pub fn new(ram: &GuestRam) -> Self {
        watch(ram).map_or(Self::Unheard, Self::Heard)
    }

    /// Where nobody punches.
    pub fn none() -> Self {
        Self::None
    }

    /// Whether there may have been any since the last call.
    pub fn any(&self) -> bool {
        let watch = match self {
            Self::Heard(watch) => watch,
            Self::Unheard => return true,
            Self::None => return false,
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
            // What is done to one without a path is told to nobody (Linux 6.14).
            return Err(Errno::OPNOTSUPP);
        }
        inotify::add_watch(&watch, format!("/proc/self/fd/{}", fd.as_raw_fd()), WatchFlags::MODIFY)?;
    }
    Ok(watch)
}

/// Guest memory in a memfd is sealed against shrinking, which no other file can be.
fn is_memfd(fd: BorrowedFd<'_>) -> bool {
    fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::ram::Backing;

    #[test]
    fn hears_of_holes_and_not_of_writes() {
        let ram = GuestRam::create(&[(0, 1 << 20)], &Backing::File("/dev/shm".into())).unwrap();
        let punches = Punches::new(&ram);
        ram.memory().write_obj(1u64, GuestAddress(0)).unwrap();
        assert!(!punches.any());
        ram.punch(0..1).unwrap();
        ram.punch(7..8).unwrap();
        assert!(punches.any());
        assert!(!punches.any());
    }

    #[test]
    fn fears_the_worst_of_a_memfd() {
        let ram = GuestRam::create(&[(0, 1 << 20)], &Backing::Memfd).unwrap();
        assert!(Punches::new(&ram).any());
        assert!(!Punches::none().any());
    }
}
