//! Placing pages that are missing: [`Userfault::copy`], [`Userfault::zero`] and [`Userfault::poison`].

use std::io;
use std::ops::AddAssign;
use std::ops::Range;

use linux_raw_sys::general::{uffdio_copy, uffdio_poison, uffdio_zeropage};
use linux_raw_sys::ioctl::{UFFDIO_COPY, UFFDIO_ZEROPAGE};
use memlane_protocol::PAGE_SIZE;
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};

use super::{Userfault, range};

/// `_IOWR(UFFDIO, _UFFDIO_POISON, struct uffdio_poison)` of `linux/userfaultfd.h`, which
/// linux-raw-sys lacks.
const UFFDIO_POISON: u32 = opcode::read_write::<uffdio_poison>(0xaa, 0x08);

/// What became of the pages that were to be placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// The number of bytes that were placed.
    pub bytes: u64,
    /// The number of bytes of pages that were present already, and were left as they are.
    pub already: u64,
}

impl AddAssign for Placed {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.already += other.already;
    }
}

/// What to do where a page is present already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfPresent {
    /// The page is left as it is, threads that wait for it are woken, and placing goes on behind it.
    Skip,
    /// Placing stops before the page with an error ([`is_already_present`](super::is_already_present)): only the
    /// caller should have placed it. Threads that wait for it go on waiting.
    Fail,
}

/// Why not all pages were placed.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct PlaceError {
    /// What was placed before the error: whole pages from the beginning on.
    pub placed: Placed,
    /// What the kernel answered.
    pub source: io::Error,
}

impl Userfault {
    /// Places the bytes `from` as whole pages of `page_bytes` each, from address `to` on, and wakes the threads
    /// that wait for them (`UFFDIO_COPY`). Each page appears whole.
    ///
    /// # Errors
    ///
    /// [`PlaceError`] says what was placed before the kernel refused; see [`is_gone`](super::is_gone) for a process that
    /// has ended.
    pub fn copy(
        &self,
        to: u64,
        from: &[u8],
        page_bytes: u64,
        if_present: IfPresent,
    ) -> Result<Placed, PlaceError> {
        self.place(to..to.saturating_add(from.len() as u64), page_bytes, if_present, |part| {
            let source = &from[(part.start - to) as usize..][..(part.end - part.start) as usize];
            let mut argument = uffdio_copy {
                dst: part.start,
                src: source.as_ptr() as u64,
                len: source.len() as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the argument is of the ioctl's type, and the kernel reads no more than `source`. It writes
            // only where a page is missing in a range that was registered for this.
            let done = unsafe { ioctl(&self.0, Updater::<UFFDIO_COPY, _>::new(&mut argument)) };
            (done, argument.copy)
        })
    }

    /// Places pages of zeros (`UFFDIO_ZEROPAGE`), and wakes the threads that wait for them. On hugetlbfs it fails:
    /// zeros have to be [copied](Self::copy) there.
    ///
    /// # Errors
    ///
    /// The errors are those of [`copy`](Self::copy).
    pub fn zero(&self, addresses: Range<u64>, if_present: IfPresent) -> Result<Placed, PlaceError> {
        self.place(addresses, PAGE_SIZE, if_present, |part| {
            let mut argument = uffdio_zeropage { range: range(part), mode: 0, zeropage: 0 };
            // SAFETY: the argument is of the ioctl's type. The kernel writes only where a page is missing in a
            // range that was registered for this.
            let done = unsafe { ioctl(&self.0, Updater::<UFFDIO_ZEROPAGE, _>::new(&mut argument)) };
            (done, argument.zeropage)
        })
    }

    /// Makes every access to those of the pages that are missing fail from now on, with `SIGBUS` or `EHWPOISON`
    /// (`UFFDIO_POISON`, Linux 6.6). Pages that are present are left as they are.
    ///
    /// # Errors
    ///
    /// The errors are those of [`copy`](Self::copy).
    pub fn poison(&self, addresses: Range<u64>, page_bytes: u64) -> Result<Placed, PlaceError> {
        self.place(addresses, page_bytes, IfPresent::Skip, |part| {
            let mut argument = uffdio_poison { range: range(part), mode: 0, updated: 0 };
            // SAFETY: the argument is of the ioctl's type. Only missing pages are changed, in a range that was
            // registered for this.
            let done = unsafe { ioctl(&self.0, Updater::<UFFDIO_POISON, _>::new(&mut argument)) };
            (done, argument.updated)
        })
    }

    /// Calls `call` with what is left of `addresses` until nothing is left. `call` returns the outcome of its
    /// ioctl, and how many bytes the ioctl placed.
    fn place(
        &self,
        addresses: Range<u64>,
        page_bytes: u64,
        if_present: IfPresent,
        mut call: impl FnMut(Range<u64>) -> (Result<(), Errno>, i64),
    ) -> Result<Placed, PlaceError> {
        let page_bytes = page_bytes.max(PAGE_SIZE);
        let mut placed = Placed::default();
        let mut from = addresses.start;
        let mut end = addresses.end;
        while from < addresses.end {
            let (done, bytes) = call(from..end);
            let page_end = addresses.end.min(from + page_bytes);
            // After any error the count is that error, negative.
            let bytes = u64::try_from(bytes).unwrap_or(0).min(end - from);
            (from, placed.bytes) = (from + bytes, placed.bytes + bytes);
            match done {
                // A part was placed, and the next call says why it went no further; or the mappings of the process
                // are changing, which passes.
                Ok(()) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::EXIST) if if_present == IfPresent::Skip => {
                    self.wake(from..page_end).map_err(|source| PlaceError { placed, source })?;
                    placed.already += page_end - from;
                    from = page_end;
                }
                // Perhaps these are two mappings, side by side: one page is tried alone.
                Err(Errno::NOENT) if end > page_end => {
                    end = page_end;
                    continue;
                }
                Err(error) => return Err(PlaceError { placed, source: error.into() }),
            }
            end = addresses.end;
        }
        Ok(placed)
    }
}
