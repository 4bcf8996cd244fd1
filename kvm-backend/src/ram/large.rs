//! [`LargePieces`]: taking memory 2 MiB at a time where much of it is about to be filled.
//!
//! A fault for each page of fresh memory is most of what receiving a guest costs: the kernel clears, charges
//! and files each page by itself. `MADV_COLLAPSE` (madvise(2), Linux 6.1) does that for a huge page at once,
//! whatever `transparent_hugepage/shmem_enabled` says, in a seventh of the time.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use memlane_protocol::PAGE_SIZE;
use rustix::mm::{MapFlags, ProtFlags};

use super::backing::HUGE_PAGE;

/// Bytes of a piece.
pub(super) const PIECE: u64 = HUGE_PAGE;
/// Pieces that are not tried after one that could not be had: the host has little memory in one piece, and
/// looking for it is slow.
const PAUSE: u32 = 512;
/// The kernel has no such thing for this memory.
const NEVER: u32 = u32::MAX;

/// What is to come of one piece.
#[derive(Debug, Default)]
pub(super) struct Coming {
    /// The region that it lies in.
    pub region: usize,
    /// From the first page to come up to the last one.
    pub pages: Range<u64>,
    count: u64,
    piece: u64,
}

impl Coming {
    /// Adds pages of one piece; gives what is to come of the piece before, if this is another one.
    pub(super) fn add(&mut self, region: usize, part: Part) -> Option<Self> {
        let Part { piece, pages } = part;
        let same = self.count > 0 && (self.region, self.piece) == (region, piece);
        let before =
            (!same).then(|| std::mem::replace(self, Self { region, piece, pages: pages.clone(), count: 0 }));
        self.pages.end = pages.end;
        self.count += pages.end - pages.start;
        before
    }

    /// Whether it is so much that the rest may be taken with it: a quarter.
    pub(super) fn is_much(&self) -> bool {
        self.count >= PIECE / PAGE_SIZE / 4
    }
}

/// Pages that lie in one piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The piece's number in the file.
    piece: u64,
    pages: Range<u64>,
}

/// Cuts pages, which begin at `offset` in their file, where pieces end.
pub(super) fn parts(offset: u64, pages: Range<u64>) -> impl Iterator<Item = Part> {
    let mut at = offset / PAGE_SIZE;
    let mut start = pages.start;
    std::iter::from_fn(move || {
        const PAGES: u64 = PIECE / PAGE_SIZE;
        let end = pages.end.min(start + PAGES - at % PAGES);
        let part = Part { piece: at / PAGES, pages: start..end };
        (at, start) = (at + (end - start), end);
        (!part.pages.is_empty()).then_some(part)
    })
}

/// Takes pieces of one guest's memory.
#[derive(Debug, Default)]
pub(super) struct LargePieces {
    /// Of the size of one piece, at an address that is a multiple of it: the guest's own mapping need not be.
    window: Mutex<Option<Window>>,
    /// Pieces not to try.
    skip: AtomicU32,
}

impl LargePieces {
    /// Takes memory for the piece of `file` at `offset`, of which nothing is there; whether it did. If not, there
    /// may be some for the page at `first`, which is wanted first.
    pub(super) fn take(&self, file: &File, offset: u64, first: u64) -> bool {
        let skip = |left: u32| (left > 0).then(|| if left == NEVER { NEVER } else { left - 1 });
        if self.skip.fetch_update(Ordering::Relaxed, Ordering::Relaxed, skip).is_ok() {
            return false;
        }
        let taken = self.try_to_take(file, offset, first);
        if let Err(error) = &taken {
            let skip = match error.raw_os_error() {
                Some(libc::EINVAL) => NEVER,
                // Somebody was busy with just this piece.
                Some(libc::EAGAIN) => 0,
                _ => PAUSE,
            };
            self.skip.store(skip, Ordering::Relaxed);
            tracing::debug!(%error, "memory is taken page by page");
            eprintln!("XX {error}");
        }
        taken.is_ok()
    }

    fn try_to_take(&self, file: &File, offset: u64, first: u64) -> io::Result<()> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let window = match &mut *window {
            Some(window) => window,
            none => none.insert(Window::reserve()?),
        };
        window.show(file, offset)?;
        // Of a piece of which nothing is there the kernel thinks that it was punched meanwhile.
        window.advise(first - offset, PAGE_SIZE, libc::MADV_POPULATE_WRITE)?;
        let collapse = || window.advise(0, PIECE, libc::MADV_COLLAPSE);
        // Somebody in the kernel may be busy with the page just now.
        collapse().or_else(|error| match error.raw_os_error() {
            Some(libc::EAGAIN) => collapse(),
            _ => Err(error),
        })
    }
}

/// Address space for one piece, and as much again to align it.
#[derive(Debug)]
struct Window(NonNull<libc::c_void>);

// SAFETY: the address space belongs to the value alone.
unsafe impl Send for Window {}

impl Window {
    const RESERVED: usize = 2 * PIECE as usize;

    fn reserve() -> io::Result<Self> {
        // SAFETY: new address space, where the kernel likes.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                Self::RESERVED,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        NonNull::new(start).map(Self).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }

    fn start(&self) -> *mut libc::c_void {
        let start = self.0.as_ptr();
        start.wrapping_byte_add(start.addr().next_multiple_of(PIECE as usize) - start.addr())
    }

    fn show(&mut self, file: &File, offset: u64) -> io::Result<()> {
        // SAFETY: the piece lies in the reserved address space, to which nobody has a reference.
        unsafe {
            rustix::mm::mmap(
                self.start(),
                PIECE as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                file,
                offset,
            )?;
        }
        Ok(())
    }

    fn advise(&self, from: u64, bytes: u64, advice: libc::c_int) -> io::Result<()> {
        let start = self.start().wrapping_byte_add(from as usize);
        // SAFETY: the bytes lie in the mapping that is shown; neither advice changes what they hold.
        match unsafe { libc::madvise(start, bytes as usize, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the address space is ours. An error would mean that it is gone already.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr(), Self::RESERVED) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn a_piece_is_taken_at_once_and_holds_zeros() {
        let file = File::from(rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(4 * PIECE).unwrap();
        let pieces = LargePieces::default();
        if !pieces.take(&file, PIECE, PIECE + 3 * PAGE_SIZE) {
            return eprintln!(
                "SKIPPED a_piece_is_taken_at_once_and_holds_zeros: no memory in one piece, or Linux before 6.1"
            );
        }
        assert_eq!(file.metadata().unwrap().blocks() * 512, PIECE);
        let mut bytes = vec![1; PIECE as usize];
        file.read_exact_at(&mut bytes, PIECE).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
        // What somebody has written meanwhile stays.
        file.write_all_at(&[7; 100], 3 * PIECE + 5000).unwrap();
        assert!(pieces.take(&file, 3 * PIECE, 3 * PIECE));
        file.read_exact_at(&mut bytes, 3 * PIECE).unwrap();
        assert!(
            bytes[5000..5100].iter().all(|byte| *byte == 7) && bytes[5100..].iter().all(|byte| *byte == 0)
        );
    }

    #[test]
    fn pages_are_cut_where_pieces_of_the_file_end() {
        let cut = |offset: u64, pages| parts(offset * PAGE_SIZE, pages).collect::<Vec<_>>();
        let part = |piece, pages| Part { piece, pages };
        assert_eq!(cut(0, 0..512), [part(0, 0..512)]);
        assert_eq!(cut(500, 100..700), [part(0, 100..112), part(1, 112..624), part(2, 624..700)]);
        assert_eq!(cut(500, 100..100), []);
    }

    #[test]
    fn what_comes_of_a_piece_is_counted_over_runs() {
        let mut coming = Coming::default();
        let mut add = |region, piece, pages| {
            coming.add(region, Part { piece, pages }).map(|before| (before.pages.clone(), before.is_much()))
        };
        assert_eq!(add(0, 3, 10..50), Some((0..0, false)));
        assert_eq!(add(0, 3, 60..160), None);
        assert_eq!(add(0, 4, 512..520), Some((10..160, true)));
        assert_eq!(add(1, 4, 1000..1001), Some((512..520, false)));
    }

    #[test]
    fn what_cannot_be_had_is_left_alone() {
        let (file, pieces) = (File::open("/dev/null").unwrap(), LargePieces::default());
        assert!(!pieces.take(&file, 0, 0));
        let before = pieces.skip.load(Ordering::Relaxed);
        assert!(before > 0);
        assert!(!pieces.take(&file, 0, 0));
        assert!(before == NEVER || pieces.skip.load(Ordering::Relaxed) == before - 1);
    }
}
