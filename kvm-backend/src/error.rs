//! The errors of this crate, each with what was being done, to what, and what the reader can do.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

/// Why guest memory could not be made, mapped or registered.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The regions are no layout that a guest can have.
    #[error("memory region {index} cannot be used: {reason}")]
    Layout {
        /// The region's index, from 0.
        index: usize,
        /// What is wrong with the region.
        reason: &'static str,
    },
    /// There is no region at all, or there are more than one message to the daemon can carry.
    #[error("a guest has 1 to {limit} memory regions, not {found}; merge regions that touch")]
    Regions {
        /// The number of regions given.
        found: usize,
        /// The largest number of regions.
        limit: usize,
    },
    /// The path cannot back guest memory.
    #[error(
        "cannot open {path:?} as guest memory: {source}; give a file or a directory on tmpfs or hugetlbfs"
    )]
    Open {
        /// The path given.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The descriptor is no shared memory, or not of the page size that was said.
    #[error("memory region {index} cannot be used: its file is {found}; use a memfd, or a file on {wanted}")]
    Kind {
        /// The region's index, from 0.
        index: usize,
        /// What the descriptor refers to.
        found: String,
        /// The kind of file that is needed.
        wanted: &'static str,
    },
    /// The file is shorter than the region.
    #[error(
        "memory region {index} cannot be used: its file has {found} bytes, and the region ends at {needed}; make \
         the file long enough"
    )]
    Short {
        /// The region's index, from 0.
        index: usize,
        /// The length of the file in bytes.
        found: u64,
        /// The end of the region in the file, in bytes.
        needed: u64,
    },
    /// Two regions show the same bytes of a file, so that a page would have two numbers.
    #[error("memory regions {0} and {1} overlap in the same file; give each its own part of the file")]
    Aliased(usize, usize),
    /// The kernel, or the file system that the region lies in, has not enough huge pages that nobody has reserved.
    #[error(
        "memory region {index} takes {pages} huge pages of {kib} KiB, and there are not as many left; add some \
         (/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages), or give its hugetlbfs more (mount -o remount,size=)"
    )]
    HugePages {
        /// The region's index, from 0.
        index: usize,
        /// The number of pages in the region, of which its VMM may have reserved some.
        pages: u64,
        /// The size of each page in KiB.
        kib: u32,
    },
    /// The kernel refused.
    #[error("memory region {index} cannot be used: cannot {doing}: {source}")]
    Kernel {
        /// The region's index, from 0.
        index: usize,
        /// What was being done, after "cannot".
        doing: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// Why memory is not the guest's any more, in the process that looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RamFault {
    /// A file behind the memory is shorter than it was.
    #[error("the guest's memory file was truncated by its VMM")]
    Truncated,
    /// The kernel had no page where there should have been one.
    #[error(
        "the kernel could not provide a page of the guest's memory: its file was truncated for a while, or its tmpfs \
         or the pool of huge pages is used up"
    )]
    NoPage,
    /// The machine cannot read a page of the memory.
    #[error("the machine reports a hardware error in the guest's memory; see the kernel's log")]
    Hardware,
}

/// Why writes could not be tracked. After any error but [`TrackError::Range`] the tracker may have missed writes:
/// stop it, and count every page as written.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The kernel refused.
    #[error("cannot {doing}: {source}")]
    Kernel {
        /// What was being done, after "cannot".
        doing: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The kernel lacks something, or does not let this process use it.
    #[error("{what} is not available here: {source}; {advice}")]
    Unavailable {
        /// What is missing.
        what: &'static str,
        /// What the kernel answered.
        source: io::Error,
        /// What the reader can do.
        advice: &'static str,
    },
    /// The process that was tracked from outside has ended, or no longer maps the guest's memory.
    #[error("cannot track the guest's writes: its VMM has ended, or has unmapped the guest's memory")]
    Gone,
    /// A tracker was used that is not started.
    #[error("cannot track the guest's writes: tracking has not been started")]
    NotStarted,
    /// The pages lie beyond the guest's memory.
    #[error("cannot track pages {pages:?}: the guest has {limit} pages")]
    Range {
        /// The pages asked for.
        pages: Range<u64>,
        /// The number of pages that the guest has.
        limit: u64,
    },
    /// It is not known which vCPU writes, or the VMM cannot keep a vCPU out of the guest.
    #[error(
        "cannot throttle single vCPUs: that takes KVM's dirty rings, and a VMM that keeps vCPUs out of the guest on \
         request"
    )]
    ThrottleUnsupported,
    /// A dirty ring cannot have this size.
    #[error(
        "cannot make dirty rings of {entries} entries: the number must be a power of two from 4096 to {limit} (0: \
         this kernel has no dirty rings; use another tracker)"
    )]
    RingSize {
        /// The number of entries asked for.
        entries: u32,
        /// The largest number that this kernel allows; 0 where it has no dirty rings.
        limit: u32,
    },
    /// The vCPUs' rings would not empty.
    #[error("cannot reset the dirty rings: KVM left {left} of the collected entries; use another tracker")]
    RingStuck {
        /// The number of entries that were collected and not reset.
        left: u32,
    },
}

/// Why a machine state was not saved, read or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// An ioctl failed.
    #[error("KVM cannot {doing}: {source}")]
    Kvm {
        /// What was being done, and the ioctl, after "cannot".
        doing: &'static str,
        /// What KVM answered.
        source: io::Error,
    },
    /// KVM refused one MSR.
    #[error("KVM cannot {doing} MSR {msr:#x}")]
    Msr {
        /// "read" or "set".
        doing: &'static str,
        /// The number of the MSR.
        msr: u32,
    },
    /// Something went wrong with one of several vCPUs.
    #[error("vCPU {index}: {source}")]
    Vcpu {
        /// The vCPU's number, from 0.
        index: usize,
        /// What went wrong.
        source: Box<StateError>,
    },
    /// The vCPU left the guest again where only earlier I/O should have been completed.
    #[error("the vCPU has I/O that cannot be completed; handle its exit and try again")]
    PendingExit,
    /// The bytes are not a machine state.
    #[error("these bytes are no machine state: they begin with {0:02x?}")]
    Magic([u8; 4]),
    /// The state has another version.
    #[error(
        "the machine state has version {found}, this program reads version {expected}; run the same version of the VMM \
         on both hosts"
    )]
    Version {
        /// The version of the state.
        found: u16,
        /// The version that this program reads.
        expected: u16,
    },
    /// The bytes end within something.
    #[error("the machine state ends in the middle of {0}")]
    Short(&'static str),
    /// A section has a length that it cannot have.
    #[error("{what} in the machine state: {found} bytes, {expected} expected")]
    Length {
        /// What the section holds.
        what: &'static str,
        /// Its length in bytes.
        found: usize,
        /// The length that it has here, in bytes.
        expected: usize,
    },
    /// There are more of something than there can be.
    #[error("too many {0}")]
    TooMany(&'static str),
    /// The state has a section that this version does not know.
    #[error(
        "unknown section {tag} (number {index}) in the machine state; run the same version of the VMM on both hosts"
    )]
    Unknown {
        /// The section's tag.
        tag: u16,
        /// The section's number.
        index: u16,
    },
    /// The state has the same section twice.
    #[error("section {tag} (number {index}) is twice in the machine state")]
    Twice {
        /// The section's tag.
        tag: u16,
        /// The section's number.
        index: u16,
    },
    /// The state lacks a section.
    #[error("the machine state has no {what} (number {index})")]
    Missing {
        /// What the section would hold.
        what: &'static str,
        /// The section's number.
        index: u16,
    },
    /// The state is of another machine than the one that should load it.
    #[error(
        "either the state or this machine has {what}, and the other has not; start both VMMs with the same devices"
    )]
    Mismatch {
        /// What one of them has.
        what: &'static str,
    },
}

/// Why the daemon's connection ended or could not be used.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The attach socket could not be used.
    #[error("cannot {doing}: {source}")]
    Socket {
        /// What was being done, after "cannot".
        doing: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The daemon closed the connection.
    #[error("the daemon closed the connection")]
    Closed,
    /// The daemon did not answer the greeting in time.
    #[error("the daemon did not answer the greeting within {0:?}")]
    Silent(std::time::Duration),
    /// The daemon sent something that is no part of the protocol.
    #[error(
        "cannot read the daemon's packet: {0}; run the same version of the daemon and of this VMM's library"
    )]
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
    #[error(
        "the daemon chose attach version {found}, this VMM speaks {oldest} to {newest}; update the older of them"
    )]
    Version {
        /// The version chosen.
        found: u16,
        /// The oldest version offered.
        oldest: u16,
        /// The newest version offered.
        newest: u16,
    },
    /// The daemon does not take this VMM.
    #[error("the daemon refused this VMM: {0}")]
    Refused(String),
}

impl TrackError {
    /// Returns a function for `map_err` that wraps what the kernel answered; `doing` says what was being done,
    /// after "cannot".
    pub(crate) fn kernel<E: Into<io::Error>>(doing: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Kernel { doing, source: source.into() }
    }
}

impl StateError {
    /// Returns a function for `map_err` that wraps what KVM answered; `doing` says what was being done, after
    /// "cannot".
    pub(crate) fn kvm(doing: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm { doing, source: error.into() }
    }
}

impl AttachError {
    /// Returns a function for `map_err` that wraps what the kernel answered; `doing` says what was being done,
    /// after "cannot".
    pub(crate) fn socket<E: Into<io::Error>>(doing: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Socket { doing, source: source.into() }
    }
}
