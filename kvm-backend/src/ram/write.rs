//! Writing guest memory from a buffer, where allocating a page costs more than filling it.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use memlane_protocol::PAGE_SIZE;

use super::GuestRam;
use super::layout::is_huge;

/// The fewest pages for which the file is asked: fewer are faulted in as soon.
const MIN_PAGES: u64 = 4;

/// The lock that is held while the files are asked for holes, or written. The kernel lets in one thread at a time,
/// and has the others spin meanwhile; with this lock they sleep, or go another way.
#[derive(Debug, Default)]
pub(super) struct WriteLock(Mutex<()>);

impl WriteLock {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns `None` if another thread holds the lock.
    fn try_lock(&self) -> Option<MutexGuard<'_, ()>> {
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl GuestRam {
    /// Returns whether none of `pages` is allocated, so that [`write_pages`](Self::write_pages) is a better way to
    /// fill them than the mapping. It returns false for huge pages, for fewer than four pages, and while another
    /// thread writes: the mapping can allocate pages beside that thread, and waiting for it takes longer than
    /// zeroing them.
    pub fn is_unallocated(&self, pages: &Range<u64>) -> bool {
        let nothing_mapped = self
            .pieces(pages.clone())
            .all(|(index, piece)| !is_huge(&self.regions[index]) && self.populated.unmapped(&piece) == piece);
        if !nothing_mapped || pages.end.saturating_sub(pages.start) < MIN_PAGES {
            return false;
        }
        let Some(_guard) = self.write_lock.try_lock() else { return false };
        self.pieces(pages.clone()).all(|(_, piece)| matches!(self.first_data(&piece), Ok(None)))
    }

    /// Writes `bytes`, exactly as many as `pages` hold, to the files behind them (pwrite(2)) and not through the
    /// mapping. The kernel then allocates pages by the dozen, without a fault for each, and does not zero them
    /// first, which takes less than half the time. It also returns an error, and sends no signal, where memory has
    /// run out.
    ///
    /// Huge pages cannot be written that way; they are allocated first. No guest may run on this memory meanwhile.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if there are too few bytes, [`RamFault::Truncated`](super::RamFault) if a file was
    /// truncated, or there is no memory. Some of the pages may then hold what was to be written.
    pub fn write_pages(&self, pages: Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let _guard = self.write_lock.lock();
        let mut rest = bytes;
        for (index, piece) in self.pieces(pages) {
            let wanted = ((piece.end - piece.start) * PAGE_SIZE) as usize;
            let Some((bytes, left)) = rest.split_at_checked(wanted) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            rest = left;
            if is_huge(&self.regions[index]) {
                self.copy_into(piece, bytes)?;
            } else {
                // A write would make a truncated file longer again, with zeros where other pages had been.
                self.check_length(index)?;
                let (file, offset) = self.file_range(index, &piece);
                file.write_all_at(bytes, offset)?;
            }
        }
        Ok(())
    }

    /// Copies `bytes` to `pages` through the mapping.
    fn copy_into(&self, pages: Range<u64>, bytes: &[u8]) -> io::Result<()> {
        self.populate_write(pages.clone())?;
        let mut rest = bytes;
        for slice in self.slices(pages) {
            let (bytes, left) = rest.split_at(slice.len);
            rest = left;
            // SAFETY: the slice is as long as the bytes, and mapped as long as this value lives; no guest runs on
            // this memory, and the bytes are the caller's.
            unsafe { slice.ptr.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::Backing;

    const PAGE: usize = PAGE_SIZE as usize;

    #[test]
    fn what_is_written_beside_the_mapping_is_seen_through_it() {
        // The regions of one file, with a gap between them in the guest's address space.
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let backing = Backing::File(directory.path().join("ram"));
        std::fs::File::create(directory.path().join("ram")).unwrap();
        let ram = GuestRam::create(&[(0, 5 * PAGE_SIZE), (1 << 20, 3 * PAGE_SIZE)], &backing).unwrap();
        assert!(ram.is_unallocated(&(0..8)));
        let bytes: Vec<u8> = (3..7u8).flat_map(|page| [page; PAGE]).collect();
        ram.write_pages(3..7, &bytes).unwrap();
        let mut page = [0; PAGE];
        for number in 0..8 {
            assert!(ram.copy_page(number, &mut page));
            assert_eq!(page, [if (3..7).contains(&number) { number as u8 } else { 0 }; PAGE]);
        }
        assert!(!ram.is_unallocated(&(2..6)) && !ram.is_unallocated(&(4..8)));
        ram.punch(3..7).unwrap();
        assert!(ram.is_unallocated(&(3..7)));
    }

    #[test]
    fn pages_do_not_count_as_unallocated_while_another_thread_writes() {
        let ram = GuestRam::create(&[(0, 8 * PAGE_SIZE)], &Backing::Memfd).unwrap();
        let lock = ram.write_lock.lock();
        assert!(!ram.is_unallocated(&(0..8)));
        drop(lock);
        assert!(ram.is_unallocated(&(0..8)));
    }

    #[test]
    fn bytes_that_do_not_fill_the_pages_are_refused() {
        let ram = GuestRam::create(&[(0, 4 * PAGE_SIZE)], &Backing::Memfd).unwrap();
        let error = ram.write_pages(0..2, &[1; PAGE]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(ram.is_unallocated(&(0..4)));
    }

    #[test]
    fn what_another_mapping_has_touched_is_allocated() {
        let ram = GuestRam::create(&[(0, 64 * PAGE_SIZE)], &Backing::Memfd).unwrap();
        let fds = ram.descriptors().into_iter().map(|fd| fd.try_clone_to_owned().unwrap());
        let other = GuestRam::map(ram.regions().iter().copied().zip(fds).collect()).unwrap();
        other.populate_write(40..41).unwrap();
        assert!(
            ram.is_unallocated(&(0..40)) && ram.is_unallocated(&(41..64)) && !ram.is_unallocated(&(0..64))
        );
    }
}
