//! [`PagemapScan`]: what the page tables of a process tell (`PAGEMAP_SCAN`).

use std::fs::File;
use std::ops::Range;

use linux_raw_sys::general::{
    PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WPALLOWED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING, page_region, pm_scan_arg,
};
use memlane_protocol::PAGE_SIZE;
use rustix::io::Errno;
use rustix::ioctl::{ioctl, opcode};

use super::TrackError;
use crate::ioctl::Answering;

/// Pages protected in one call (4 MiB): KVM drops its own mappings of the whole range, and a
/// vCPU that faults there has to wait.
pub(super) const PIECE_PAGES: u64 = 1024;

/// Written pages no further apart than this are protected again in one call. A call costs
/// about as much as KVM's mapping some tens of clean pages anew.
const MERGE_PAGES: u64 = 32;

/// Runs of pages that one scan can return.
const SCAN_RUNS: usize = 512;

/// Bytes of a huge page. Pieces are cut at its multiples, so that none is torn apart.
pub(super) const HUGE_PAGE: u64 = 2 << 20;

/// Which pages a scan returns, and what it tells of them; see
/// `Documentation/admin-guide/mm/pagemap.rst`.
#[derive(Clone, Copy)]
pub(super) struct Query {
    inverted: u32,
    all_of: u32,
    any_of: u32,
    told: u32,
    protect: bool,
}

impl Query {
    /// Pages that are not protected. As nothing more is told, no [`State`] either, the kernel goes
    /// through the page tables fastest.
    pub const WRITTEN: Self =
        Self { inverted: 0, all_of: PAGE_IS_WRITTEN, any_of: 0, told: PAGE_IS_WRITTEN, protect: false };

    /// Pages that are not protected.
    pub const WRITTEN_WITH_STATE: Self = Self { told: STATE, ..Self::WRITTEN };

    /// Pages in every [`State`] but [`State::Clean`].
    pub const NOT_CLEAN: Self = Self {
        inverted: PAGE_IS_PRESENT,
        all_of: 0,
        any_of: PAGE_IS_PRESENT | PAGE_IS_WRITTEN,
        told: STATE,
        protect: false,
    };

    /// All pages that can be protected asynchronously.
    pub const ALL: Self =
        Self { inverted: 0, all_of: PAGE_IS_WPALLOWED, any_of: 0, told: STATE, protect: false };

    /// All pages that are mapped.
    pub const ALL_MAPPED: Self = Self { all_of: 0, ..Self::ALL };
}

const STATE: u32 = PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED;

/// What a page table says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// There, and protected.
    Clean,
    /// Protected, and not there: never touched since, swapped out, or taken from the file.
    Vacant,
    /// There, or on its way from one frame to another, and not protected.
    Written,
    /// Nothing is known: no entry, or no page table. Kernels differ in whether they call this
    /// written.
    Unknown,
}

/// A run of pages that a scan returned.
pub(super) struct Found {
    pub addresses: Range<u64>,
    pub state: State,
}

/// The page tables of one process.
pub(super) struct PagemapScan {
    file: File,
}

impl PagemapScan {
    /// By `/proc/PID/pagemap`, whoever opened it.
    pub fn new(file: File) -> Self {
        Self { file }
    }

    /// Protects what `query` finds in `addresses`, piece by piece; calls `found` with it.
    pub fn protect(
        &self,
        addresses: Range<u64>,
        query: Query,
        mut found: impl FnMut(Found),
    ) -> Result<(), TrackError> {
        let mut from = addresses.start;
        while from < addresses.end {
            let cut = from.saturating_add(PIECE_PAGES * PAGE_SIZE) / HUGE_PAGE * HUGE_PAGE;
            let end = addresses.end.min(cut);
            self.scan(from..end, Query { protect: true, ..query }, |run| {
                found(run);
                Ok(())
            })?;
            from = end;
        }
        Ok(())
    }

    /// Calls `found` with what `query` finds in `addresses`, in order.
    pub fn scan(
        &self,
        addresses: Range<u64>,
        query: Query,
        mut found: impl FnMut(Found) -> Result<(), TrackError>,
    ) -> Result<(), TrackError> {
        const SCAN: u32 = opcode::read_write::<pm_scan_arg>(b'f', 16);
        let flags = if query.protect { PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC } else { 0 };
        let mut runs = [page_region { start: 0, end: 0, categories: 0 }; SCAN_RUNS];
        let mut from = addresses.start;
        while from < addresses.end {
            let mut argument = pm_scan_arg {
                size: size_of::<pm_scan_arg>() as u64,
                flags: flags.into(),
                start: from,
                end: addresses.end,
                walk_end: 0,
                vec: runs.as_mut_ptr() as u64,
                vec_len: runs.len() as u64,
                max_pages: 0,
                category_inverted: query.inverted.into(),
                category_mask: query.all_of.into(),
                category_anyof_mask: query.any_of.into(),
                return_mask: query.told.into(),
            };
            // SAFETY: the argument is of the ioctl's type, and `vec` has room for `vec_len` runs.
            let filled =
                match unsafe { ioctl(&self.file, Answering::<SCAN>::new((&raw mut argument).cast())) } {
                    Ok(filled) => filled,
                    Err(Errno::INTR) => continue,
                    Err(Errno::SRCH) => return Err(TrackError::Gone),
                    Err(error) => {
                        return Err(TrackError::kernel("scanning for written pages (PAGEMAP_SCAN)")(error));
                    }
                };
            for run in runs.iter().take(usize::try_from(filled).unwrap_or(0)) {
                found(Found { addresses: run.start..run.end, state: State::of(run.categories) })?;
            }
            if argument.walk_end <= from {
                let stuck = std::io::Error::other("the scan stands still");
                return Err(TrackError::kernel("scanning for written pages (PAGEMAP_SCAN)")(stuck));
            }
            from = argument.walk_end;
        }
        Ok(())
    }
}

impl State {
    fn of(categories: u64) -> Self {
        let has = |category: u32| categories & u64::from(category) != 0;
        match (has(PAGE_IS_PRESENT), has(PAGE_IS_SWAPPED), has(PAGE_IS_WRITTEN)) {
            (false, false, _) => Self::Unknown,
            (_, _, true) => Self::Written,
            (true, _, false) => Self::Clean,
            (false, true, false) => Self::Vacant,
        }
    }
}

/// Puts runs of written pages, which come in order, together to pieces that are protected in
/// one call.
///
/// Protecting makes KVM drop its mappings of all that is scanned, clean pages too. So whoever
/// harvests looks first, without protecting, and then protects around what was found.
#[derive(Default)]
pub(super) struct Pieces(Option<Range<u64>>);

impl Pieces {
    /// Adds a run. If it begins a new piece, returns the one before, which is then complete.
    pub fn add(&mut self, run: Range<u64>) -> Option<Range<u64>> {
        match &mut self.0 {
            Some(last)
                if run.start.saturating_sub(last.end) <= MERGE_PAGES * PAGE_SIZE
                    && run.end - last.start <= PIECE_PAGES * PAGE_SIZE =>
            {
                last.end = run.end;
                None
            }
            last => last.replace(run),
        }
    }

    /// The last piece, once there are no more runs.
    pub fn end(&mut self) -> Option<Range<u64>> {
        self.0.take()
    }
}
