//! The guest's memory in one VMM: the version of each page in place of its contents.
//!
//! The first version of a page is 0, which is a page of zeros that was never written and takes no memory.

use memlane_protocol::PageSet;
use memlane_protocol::wire::frame::Content;

/// The memory of one VMM.
#[derive(Debug)]
pub(crate) struct Memory {
    versions: Vec<u32>,
    /// These pages take no memory here.
    holes: Vec<bool>,
    /// An access to a hole waits, as the memory is registered with userfaultfd.
    pub waits: bool,
    /// Writes are tracked, while this is something.
    pub tracker: Option<Tracker>,
}

/// Finds out which pages were written, as a write-protecting tracker does.
#[derive(Debug)]
pub(crate) struct Tracker {
    protected: Vec<bool>,
    written: PageSet,
}

/// What an access to a page finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Version(u32),
    /// The access waits until the page is placed.
    Waits,
}

impl Memory {
    pub(crate) fn new(pages: u64) -> Self {
        let pages = pages as usize;
        Self { versions: vec![0; pages], holes: vec![true; pages], waits: false, tracker: None }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.versions.len() as u64
    }

    /// Returns what an access finds. A hole that does not wait is zeros.
    pub(crate) fn access(&self, page: u64) -> Access {
        match self.holes[page as usize] {
            true if self.waits => Access::Waits,
            _ => Access::Version(self.version(page)),
        }
    }

    /// Returns what a page has, which is zeros for a hole.
    pub(crate) fn version(&self, page: u64) -> u32 {
        self.versions[page as usize]
    }

    pub(crate) fn is_hole(&self, page: u64) -> bool {
        self.holes[page as usize]
    }

    /// Puts contents into a page.
    pub(crate) fn put(&mut self, page: u64, version: u32) {
        (self.versions[page as usize], self.holes[page as usize]) = (version, false);
    }

    /// Makes a page a hole.
    pub(crate) fn punch(&mut self, page: u64) {
        (self.versions[page as usize], self.holes[page as usize]) = (0, true);
    }

    /// Tells whether a write to the page would have to be noticed first.
    pub(crate) fn is_protected(&self, page: u64) -> bool {
        self.tracker.as_ref().is_some_and(|tracker| tracker.protected[page as usize])
    }

    /// Writes a page as the guest does.
    pub(crate) fn write(&mut self, page: u64, version: u32) {
        self.put(page, version);
        if let Some(tracker) = &mut self.tracker
            && std::mem::take(&mut tracker.protected[page as usize])
        {
            tracker.written.insert(page);
        }
    }

    /// Begins to track. Nothing is protected yet.
    pub(crate) fn track(&mut self) {
        let pages = self.pages();
        self.tracker = Some(Tracker { protected: vec![false; pages as usize], written: PageSet::new(pages) });
    }

    /// Protects pages, so that the next write to each of them is noticed.
    pub(crate) fn protect(&mut self, pages: std::ops::Range<u64>) {
        if let Some(tracker) = &mut self.tracker {
            tracker.protected[pages.start as usize..pages.end as usize].fill(true);
        }
    }

    /// Adds the pages that were written to `into`, and protects them again. Returns how many are new there.
    pub(crate) fn harvest(&mut self, into: &PageSet) -> u64 {
        let Some(tracker) = &mut self.tracker else { return 0 };
        for run in tracker.written.runs() {
            tracker.protected[run.start as usize..run.end as usize].fill(true);
        }
        tracker.written.drain_into(0..self.versions.len() as u64, into)
    }

    /// Returns what the page is to a sending lane.
    pub(crate) fn content(&self, page: u64, sparse: bool) -> Content {
        match self.version(page) {
            0 if sparse && self.is_hole(page) => Content::Hole,
            version if is_zero(version) => Content::Zero,
            _ => Content::Data,
        }
    }
}

/// Tells whether a page of this version holds nothing but zeros, as guests clear pages now and then.
fn is_zero(version: u32) -> bool {
    version.is_multiple_of(8)
}
