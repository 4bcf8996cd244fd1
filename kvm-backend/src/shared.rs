//! [`SharedWords`]: memory that a VMM and its daemon share, as atomic words.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// A mapped memfd, as words of 64 bits. A [`PageSet`](memlane_protocol::PageSet) over them is a set of pages that
/// two processes fill and drain at once.
#[derive(Debug)]
pub struct SharedWords {
    first: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping belongs to this value alone and is only ever read and written through atomics, which any
// thread may use.
unsafe impl Send for SharedWords {}
// SAFETY: the mapping is only ever read and written through atomics, which threads may share.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Makes a memfd of `words` words, all zero, seals it at its size, and maps it. Returns the words and the
    /// memfd.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for no words or more than can be mapped, and what the kernel refused.
    pub fn create(words: usize) -> io::Result<(Self, OwnedFd)> {
        let fd = rustix::fs::memfd_create("dirty-pages", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, bytes(words)? as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Self::map(&fd, words)?, fd))
    }

    /// Maps `words` words of a memfd that another process made. If the memfd is not sealed against shrinking, it
    /// is sealed here; otherwise the other process could take the memory away.
    ///
    /// # Errors
    ///
    /// `InvalidData` if the descriptor is no memfd, cannot be sealed, or is too short; and what the kernel
    /// refused.
    pub fn map<Fd: AsFd>(fd: Fd, words: usize) -> io::Result<Self> {
        let fd = fd.as_fd();
        let wrong = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
        let seals = rustix::fs::fcntl_get_seals(fd)
            .map_err(|error| wrong(format!("shared words must lie in a memfd ({error})")))?;
        if !seals.contains(SealFlags::SHRINK) {
            rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK)
                .map_err(|error| wrong(format!("cannot seal shared words against shrinking: {error}")))?;
        }
        let bytes = bytes(words)?;
        let found = rustix::fs::fstat(fd)?.st_size;
        if u64::try_from(found).is_ok_and(|found| found < bytes as u64) {
            return Err(wrong(format!("{words} shared words take {bytes} bytes, their memfd has {found}")));
        }
        // SAFETY: this makes a new mapping, at an address that the kernel chooses.
        let first = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                fd,
                0,
            )?
        };
        let first = NonNull::new(first.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { first, words })
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds this many words for as long as `self` lives, cannot shrink,
        // is page aligned, and any bits are a valid `AtomicU64`.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives `self`. An error would mean that the
        // mapping is gone already, and nothing is left to do.
        let _ = unsafe { rustix::mm::munmap(self.first.as_ptr().cast(), self.words * size_of::<u64>()) };
    }
}

/// Returns the number of bytes of `words` words.
///
/// # Errors
///
/// `InvalidInput` for no words, which cannot be mapped, and for too many.
fn bytes(words: usize) -> io::Result<usize> {
    words.checked_mul(size_of::<u64>()).filter(|bytes| (1..=isize::MAX as usize).contains(bytes)).ok_or_else(
        || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("cannot share {words} words: a mapping has 1 to 2^60 - 1"),
            )
        },
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use memlane_protocol::PageSet;

    use super::*;

    #[test]
    fn both_mappings_see_the_same_pages() {
        let words = PageSet::words_needed(10_000);
        let (own, fd) = SharedWords::create(words).unwrap();
        let ours = PageSet::over(10_000, own).unwrap();
        let theirs = PageSet::over(10_000, SharedWords::map(&fd, words).unwrap()).unwrap();
        assert_eq!(ours.insert_range(5..700), 695);
        assert_eq!(theirs.count(), 695);
        let taken = PageSet::new(10_000);
        theirs.drain_into(0..10_000, &taken);
        assert!(ours.is_empty() && taken.count() == 695);
    }

    #[test]
    fn what_could_shrink_or_is_too_small_is_refused() {
        assert!(SharedWords::create(0).is_err());
        assert!(SharedWords::create(usize::MAX).is_err());
        let (_, fd) = SharedWords::create(512).unwrap();
        assert!(SharedWords::map(&fd, 513).unwrap_err().to_string().contains("513 shared words"));
        assert!(rustix::fs::ftruncate(&fd, 8).is_err());

        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(4096).unwrap();
        assert!(SharedWords::map(&file, 8).unwrap_err().to_string().contains("cannot seal"));
        let (pipe, _other) = rustix::pipe::pipe().unwrap();
        assert!(SharedWords::map(&pipe, 8).unwrap_err().to_string().contains("memfd"));

        // One that is not sealed yet is sealed when it is mapped.
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let open = rustix::fs::memfd_create("open", flags).unwrap();
        rustix::fs::ftruncate(&open, 4096).unwrap();
        let words = SharedWords::map(&open, 512).unwrap();
        assert!(rustix::fs::ftruncate(&open, 8).is_err());
        words[511].store(1, Ordering::Relaxed);
    }
}
