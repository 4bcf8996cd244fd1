//! Placing pages that are missing.

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

/// What became of pages that were to be placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// Bytes that were placed.
    pub bytes: u64,
    /// Bytes of pages that were there already, and were left as they are.
    pub already: u64,
}

impl AddAssign for Placed {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.already += other.already;
    }
}

/// What to do about a page that is there already where one is to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfThere {
    /// Leave it as it is, let go whoever waits for it, and go on behind it.
    Leave,
    /// Stop before it, with [`is_there`](super::is_there) as the error: nobody but the caller should have
    /// placed it. Whoever waits for it goes on waiting.
    Fail,
}

/// Why pages were not placed, or not all of them.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct Unplaced {
    /// What was placed before that, all of it whole pages from the beginning on.
    pub placed: Placed,
    /// What the kernel said.
    pub source: io::Error,
}

impl Userfault {
    /// Places `from` as whole pages of `page_bytes` each, from address `to` on, and lets threads go
    /// that wait for them (`UFFDIO_COPY`). Each page appears whole.
    ///
    /// See [`is_gone`](super::is_gone) for an error that says that the process has ended.
    pub fn copy(&self, to: u64, from: &[u8], page_bytes: u64, if_there: IfThere) -> Result<Placed, Unplaced> {
        self.place(to..to.saturating_add(from.len() as u64), page_bytes, if_there, |part| {
            let source = &from[(part.start - to) as usize..][..(part.end - part.start) as usize];
            let mut argument = uffdio_copy {
                dst: part.start,
                src: source.as_ptr() as u64,
                len: source.len() as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the argument is of the ioctl's type, and the kernel reads no more than `source`.
            // It writes only where there is no page yet in a range that was registered for this.
            let done = unsafe { ioctl(&self.0, Updater::<UFFDIO_COPY, _>::new(&mut argument)) };
            (done, argument.copy)
        })
    }

    /// Places zeros (`UFFDIO_ZEROPAGE`), as [`copy`](Self::copy) does. Not on hugetlbfs, where zeros
    /// have to be copied.
    pub fn zero(&self, addresses: Range<u64>, if_there: IfThere) -> Result<Placed, Unplaced> {
        self.place(addresses, PAGE_SIZE, if_there, |part| {
            let mut argument = uffdio_zeropage { range: range(part), mode: 0, zeropage: 0 };
            // SAFETY: the argument is of the ioctl's type. The kernel writes only where there is no
            // page yet in a range that was registered for this.
            let done = unsafe { ioctl(&self.0, Updater::<UFFDIO_ZEROPAGE, _>::new(&mut argument)) };
            (done, argument.zeropage)
        })
    }

    /// Has every access to these pages that are not there fail from now on, with `SIGBUS` or
    /// `EHWPOISON` (`UFFDIO_POISON`, Linux 6.6). Pages that are there are left as they are.
    pub fn poison(&self, addresses: Range<u64>, page_bytes: u64) -> Result<Placed, Unplaced> {
        self.place(addresses, page_bytes, IfThere::Leave, |part| {
            let mut argument = uffdio_poison { range: range(part), mode: 0, updated: 0 };
            // SAFETY: the argument is of the ioctl's type. Only pages that are not there are changed,
            // in a range that was registered for this.
            let done = unsafe { ioctl(&self.0, Updater::<UFFDIO_POISON, _>::new(&mut argument)) };
            (done, argument.updated)
        })
    }

    /// Has `call` place what is left of `addresses` until nothing is; it returns the outcome and how
    /// many bytes were placed.
    fn place(
        &self,
        addresses: Range<u64>,
        page_bytes: u64,
        if_there: IfThere,
        mut call: impl FnMut(Range<u64>) -> (Result<(), Errno>, i64),
    ) -> Result<Placed, Unplaced> {
        let page_bytes = page_bytes.max(PAGE_SIZE);
        let mut placed = Placed::default();
        let mut from = addresses.start;
        let mut end = addresses.end;
        while from < addresses.end {
            let (done, bytes) = call(from..end);
            let page_end = addresses.end.min(from + page_bytes);
            // On any error the count holds its negative.
            let bytes = u64::try_from(bytes).unwrap_or(0).min(end - from);
            (from, placed.bytes) = (from + bytes, placed.bytes + bytes);
            match done {
                // Placed in part, and why it went no further the next call says; or the mappings of
                // the process are changing, which passes.
                Ok(()) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::EXIST) if if_there == IfThere::Leave => {
                    self.wake(from..page_end).map_err(|source| Unplaced { placed, source })?;
                    placed.already += page_end - from;
                    from = page_end;
                }
                // Perhaps it is two mappings, side by side.
                Err(Errno::NOENT) if end > page_end => {
                    end = page_end;
                    continue;
                }
                Err(error) => return Err(Unplaced { placed, source: error.into() }),
            }
            end = addresses.end;
        }
        Ok(placed)
    }
}
