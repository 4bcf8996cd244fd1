//! [`PagemapScan`]: reads, and write-protects, the page tables of a process (`PAGEMAP_SCAN`).

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
use crate::ioctl::ReturnsValue;

/// The number of pages that are protected in one call (4 MiB): KVM drops its own mappings of the whole range, and a
/// vCPU that faults there has to wait.
pub(super) const PIECE_PAGES: u64 = 1024;

/// Written pages that are no further apart than this are protected again in one call: a call costs about as much as
/// it costs KVM to map some tens of clean pages anew.
const MERGE_PAGES: u64 = 32;

/// The number of runs of pages that one scan can return.
const SCAN_RUNS: usize = 512;

/// The size of a huge page in bytes. Pieces are cut at its multiples, so that no huge page is protected in part.
pub(super) const HUGE_PAGE: u64 = 2 << 20;

/// Which pages a scan returns, and which of their categories; the fields are those of `struct pm_scan_arg`
/// (`Documentation/admin-guide/mm/pagemap.rst`).
#[derive(Clone, Copy)]
pub(super) struct Query {
    category_inverted: u32,
    category_mask: u32,
    category_anyof_mask: u32,
    return_mask: u32,
    protect: bool,
}

impl Query {
    /// Finds pages that are not protected. As nothing more is returned, no [`State`] either, the kernel goes
    /// through the page tables fastest.
    pub(super) const WRITTEN: Self = Self {
        category_inverted: 0,
        category_mask: PAGE_IS_WRITTEN,
        category_anyof_mask: 0,
        return_mask: PAGE_IS_WRITTEN,
        protect: false,
    };

    /// Finds pages that are not protected, with their [`State`].
    pub(super) const WRITTEN_WITH_STATE: Self = Self { return_mask: STATE, ..Self::WRITTEN };

    /// Finds pages in every [`State`] but [`State::Clean`].
    pub(super) const NOT_CLEAN: Self = Self {
        category_inverted: PAGE_IS_PRESENT,
        category_mask: 0,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_WRITTEN,
        return_mask: STATE,
        protect: false,
    };

    /// Finds all pages that can be protected asynchronously.
    pub(super) const ALL: Self = Self {
        category_inverted: 0,
        category_mask: PAGE_IS_WPALLOWED,
        category_anyof_mask: 0,
        return_mask: STATE,
        protect: false,
    };

    /// Finds all pages that are mapped.
    pub(super) const ALL_MAPPED: Self = Self { category_mask: 0, ..Self::ALL };
}

const STATE: u32 = PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED;

/// What a page table says about a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The page is present and protected.
    Clean,
    /// The page is protected and not present: it was never touched since, was swapped out, or was taken from the
    /// file.
    Vacant,
    /// The page is present, or on its way from one frame to another, and not protected.
    Written,
    /// The page has no entry in a page table. Kernels differ in whether they call this written.
    Unknown,
}

/// A run of pages that a scan returned.
pub(super) struct Found {
    /// The run's addresses in the process.
    pub(super) addresses: Range<u64>,
    /// The state of all its pages.
    pub(super) state: State,
}

/// The page tables of one process.
pub(super) struct PagemapScan {
    file: File,
}

impl PagemapScan {
    /// Reads the process whose `/proc/PID/pagemap` this is; any process may have opened it.
    pub(super) fn new(file: File) -> Self {
        Self { file }
    }

    /// Protects the pages that `query` finds in `addresses`, piece by piece, and calls `found` with each run.
    ///
    /// # Errors
    ///
    /// [`TrackError::Gone`] if the process has ended, and what the kernel refused.
    pub(super) fn protect(
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

    /// Calls `found` with each run that `query` finds in `addresses`, in order.
    ///
    /// # Errors
    ///
    /// [`TrackError::Gone`] if the process has ended, what the kernel refused, and the errors of `found`.
    pub(super) fn scan(
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
                category_inverted: query.category_inverted.into(),
                category_mask: query.category_mask.into(),
                category_anyof_mask: query.category_anyof_mask.into(),
                return_mask: query.return_mask.into(),
            };
            // SAFETY: the argument is of the ioctl's type, and `vec` points to room for `vec_len` runs.
            let filled =
                match unsafe { ioctl(&self.file, ReturnsValue::<SCAN>::new((&raw mut argument).cast())) } {
                    Ok(filled) => filled,
                    Err(Errno::INTR) => continue,
                    Err(Errno::SRCH) => return Err(TrackError::Gone),
                    Err(error) => {
                        return Err(TrackError::kernel("scan for written pages (PAGEMAP_SCAN)")(error));
                    }
                };
            for run in runs.iter().take(usize::try_from(filled).unwrap_or(0)) {
                found(Found { addresses: run.start..run.end, state: State::of(run.categories) })?;
            }
            if argument.walk_end <= from {
                let stuck = std::io::Error::other("the scan makes no progress");
                return Err(TrackError::kernel("scan for written pages (PAGEMAP_SCAN)")(stuck));
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

/// Joins runs of written pages, which come in order, to pieces that are protected in one call.
///
/// Protecting makes KVM drop its mappings of all that is scanned, clean pages too. So a harvest first scans without
/// protecting, and then protects around what it found.
#[derive(Default)]
pub(super) struct Pieces(Option<Range<u64>>);

impl Pieces {
    /// Adds a run. If the run begins a new piece, returns the piece before, which is then complete.
    pub(super) fn add(&mut self, run: Range<u64>) -> Option<Range<u64>> {
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

    /// Returns the last piece, once there are no more runs.
    pub(super) fn end(&mut self) -> Option<Range<u64>> {
        self.0.take()
    }
}
