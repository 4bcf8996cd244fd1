//! Writing guest memory from a buffer, where taking a page costs more than filling it.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use memlane_protocol::PAGE_SIZE;

use super::{GuestRam, backing};

/// Fewer pages than these are as soon faulted in as asked about.
const WORTH_ASKING: u64 = 4;

/// Held while the files are asked for holes, or written. The kernel lets in one thread at a time, and has
/// the others spin meanwhile: here they sleep, or go another way.
#[derive(Debug, Default)]
pub(super) struct Writing(Mutex<()>);

impl Writing {
    fn wait(&self) -> MutexGuard<'_, ()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Not if somebody else is at it.
    fn try_now(&self) -> Option<MutexGuard<'_, ()>> {
        match self.0.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl GuestRam {
    /// Whether nothing of `pages` is there, so that [`write_pages`](Self::write_pages) is a better way to fill
    /// them than the mapping. Never so of huge pages, nor of very few; nor while another thread writes, since the
    /// mapping takes pages beside it, and waiting for a turn takes longer than making them zero.
    pub fn is_fresh(&self, pages: &Range<u64>) -> bool {
        let nothing_mapped = self.pieces(pages.clone()).all(|(index, piece)| {
            !backing::is_huge(&self.regions[index]) && self.in_tables.unmapped(&piece) == piece
        });
        if !nothing_mapped || pages.end.saturating_sub(pages.start) < WORTH_ASKING {
            return false;
        }
        let Some(_turn) = self.writing.try_now() else { return false };
        self.pieces(pages.clone()).all(|(_, piece)| matches!(self.first_data(&piece), Ok(None)))
    }

    /// Writes `bytes`, as many as `pages` hold, to the file behind them and not through the mapping: the
    /// kernel then takes pages for them by the dozen, without a fault for each, and does not make them
    /// zero first, which takes less than half the time. Nor is there a signal where memory has run out.
    ///
    /// Huge pages cannot be written that way, and are taken first. No guest may run on this memory.
    ///
    /// # Errors
    ///
    /// If there is no memory for them; some of the pages may then hold what was to be written.
    pub fn write_pages(&self, pages: Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let _turn = self.writing.wait();
        let mut rest = bytes;
        for (index, piece) in self.pieces(pages) {
            let wanted = ((piece.end - piece.start) * PAGE_SIZE) as usize;
            let Some((bytes, left)) = rest.split_at_checked(wanted) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            rest = left;
            if backing::is_huge(&self.regions[index]) {
                self.copy_into(piece, bytes)?;
            } else {
                // A write would make a file longer that was cut, with zeros where other pages had been.
                self.check_length(index)?;
                let (file, offset) = self.file_range(index, &piece);
                file.write_all_at(bytes, offset)?;
            }
        }
        Ok(())
    }

    fn copy_into(&self, pages: Range<u64>, bytes: &[u8]) -> io::Result<()> {
        self.prepare(pages.clone())?;
        let mut rest = bytes;
        for slice in self.slices(pages) {
            let (bytes, left) = rest.split_at(slice.len);
            rest = left;
            // SAFETY: the slice is as long, and mapped as long as this lives; no guest runs on this memory, and
            // the bytes are the caller's.
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
        assert!(ram.is_fresh(&(0..8)));
        let bytes: Vec<u8> = (3..7u8).flat_map(|page| [page; PAGE]).collect();
        ram.write_pages(3..7, &bytes).unwrap();
        let mut page = [0; PAGE];
        for number in 0..8 {
            assert!(ram.copy_page(number, &mut page));
            assert_eq!(page, [if (3..7).contains(&number) { number as u8 } else { 0 }; PAGE]);
        }
        assert!(!ram.is_fresh(&(2..6)) && !ram.is_fresh(&(4..8)));
        ram.punch(3..7).unwrap();
        assert!(ram.is_fresh(&(3..7)));
    }

    #[test]
    fn who_would_have_to_wait_goes_another_way() {
        let ram = GuestRam::create(&[(0, 8 * PAGE_SIZE)], &Backing::Memfd).unwrap();
        let turn = ram.writing.wait();
        assert!(!ram.is_fresh(&(0..8)));
        drop(turn);
        assert!(ram.is_fresh(&(0..8)));
    }

    #[test]
    fn bytes_that_do_not_fill_the_pages_are_refused() {
        let ram = GuestRam::create(&[(0, 4 * PAGE_SIZE)], &Backing::Memfd).unwrap();
        let error = ram.write_pages(0..2, &[1; PAGE]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(ram.is_fresh(&(0..4)));
    }

    #[test]
    fn what_others_have_touched_is_not_fresh() {
        let ram = GuestRam::create(&[(0, 64 * PAGE_SIZE)], &Backing::Memfd).unwrap();
        let fds = ram.descriptors().into_iter().map(|fd| fd.try_clone_to_owned().unwrap());
        let other = GuestRam::map(ram.regions().iter().copied().zip(fds).collect()).unwrap();
        other.prepare(40..41).unwrap();
        assert!(ram.is_fresh(&(0..40)) && ram.is_fresh(&(41..64)) && !ram.is_fresh(&(0..64)));
    }
}
