//! What can go wrong with memory, its tracking and the attach socket.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

/// Why guest memory could not be made, mapped or registered.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The regions are no layout that a guest can have.
    #[error("memory region {index}: {reason}")]
    Layout {
        /// Which region, from 0.
        index: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No region at all, or more than one message to the daemon can carry.
    #[error("a guest has 1 to {limit} memory regions, not {found}")]
    Regions {
        /// Number of regions given.
        found: usize,
        /// Most that there may be.
        limit: usize,
    },
    /// A path that cannot back guest memory.
    #[error("opening {path:?} as guest memory: {source}")]
    Open {
        /// The path given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The descriptor is no shared memory, or not of the page size that was said.
    #[error("memory region {index}: its descriptor is {found}; a memfd, or a file on {wanted}, is needed")]
    Kind {
        /// Which region, from 0.
        index: usize,
        /// What the descriptor refers to.
        found: String,
        /// What it must be.
        wanted: &'static str,
    },
    /// The file is shorter than the region.
    #[error("memory region {index}: its file has {found} bytes, and the region ends at {needed}")]
    Short {
        /// Which region, from 0.
        index: usize,
        /// Length of the file.
        found: u64,
        /// End of the region in it.
        needed: u64,
    },
    /// Another region shows the same bytes: a page would have two numbers.
    #[error("memory regions {0} and {1} lie over each other in the same file")]
    Aliased(usize, usize),
    /// The kernel refused.
    #[error("memory region {index}: {doing}: {source}")]
    Kernel {
        /// Which region, from 0.
        index: usize,
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why memory is not a guest's any more, in the process that looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RamLost {
    /// A file behind it is shorter than it was.
    #[error("the guest's memory file was truncated by its VMM")]
    Truncated,
    /// The kernel had no page where there should have been one.
    #[error(
        "a page of the guest's memory was not to be had: its file was truncated for a while, or its tmpfs or the \
         pool of huge pages is used up"
    )]
    NoPage,
    /// The machine cannot read a page of it.
    #[error("the machine reports an error in the guest's memory (see the kernel's log)")]
    Hardware,
}

/// Why writes could not be tracked. After any error but [`TrackError::Range`] the tracker may
/// have missed writes: stop it, and count every page as written.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The kernel refused.
    #[error("{doing}: {source}")]
    Kernel {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel lacks something, or does not let this process use it.
    #[error("{what} is not to be had here: {source}; {advice}")]
    Unavailable {
        /// What is missing.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
        /// What the reader can do.
        advice: &'static str,
    },
    /// The process that was tracked from outside has ended, or no longer maps the guest's memory.
    #[error("the VMM no longer maps the guest's memory: it has ended, or let go of it")]
    Gone,
    /// Something was asked of a tracker that is not started.
    #[error("tracking has not been started")]
    NotStarted,
    /// Pages beyond the guest's memory.
    #[error("pages {pages:?} lie outside the guest's {limit} pages")]
    Range {
        /// The pages asked for.
        pages: Range<u64>,
        /// Pages that the guest has.
        limit: u64,
    },
    /// It is not known which vCPU writes, or the VMM cannot keep one out of the guest.
    #[error(
        "vCPUs cannot be held to a rate one by one here; that takes dirty rings, and a VMM that holds vCPUs"
    )]
    NoPace,
    /// A dirty ring of a size that cannot be.
    #[error("a dirty ring of {entries} entries: the number must be a power of two from 4096 to {limit}")]
    RingSize {
        /// Entries asked for.
        entries: u32,
        /// Most that this kernel allows; 0 where it has no dirty rings.
        limit: u32,
    },
    /// The vCPUs' rings would not empty.
    #[error("KVM left {left} of the collected dirty-ring entries unreset")]
    RingStuck {
        /// Entries that were collected and not reset.
        left: u32,
    },
}

/// Why the daemon's connection ended or could not be used.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The attach socket could not be used.
    #[error("{doing}: {source}")]
    Socket {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The daemon closed the connection.
    #[error("the daemon closed the connection")]
    Closed,
    /// The daemon did not answer the greeting.
    #[error("the daemon did not answer the greeting within {0:?}")]
    Silent(std::time::Duration),
    /// The daemon sent something that is no part of the protocol.
    #[error("the daemon's packet was not understood: {0}")]
    Wire(#[from] memlane_protocol::wire::WireError),
    /// The daemon sent something at the wrong time.
    #[error("the daemon sent {found} where {expected} was due")]
    Unexpected {
        /// What came.
        found: &'static str,
        /// What should have come.
        expected: &'static str,
    },
    /// The daemon chose a version that this library did not offer.
    #[error("the daemon chose attach version {found}, this VMM speaks {oldest} to {newest}")]
    Version {
        /// Version chosen.
        found: u16,
        /// Oldest version offered.
        oldest: u16,
        /// Newest version offered.
        newest: u16,
    },
    /// The daemon does not take this VMM.
    #[error("the daemon refused this VMM: {0}")]
    Refused(String),
}

impl TrackError {
    /// For `map_err`: what was being done when the kernel refused.
    pub(crate) fn kernel<E: Into<io::Error>>(doing: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Kernel { doing, source: source.into() }
    }
}

impl AttachError {
    /// For `map_err`: what was being done when the kernel refused.
    pub(crate) fn socket<E: Into<io::Error>>(doing: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Socket { doing, source: source.into() }
    }
}
