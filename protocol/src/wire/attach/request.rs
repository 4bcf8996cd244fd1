//! What a daemon asks of a VMM.

use super::bond::Bond;

/// What a daemon asks of a VMM. Times in replies are in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The VMM begins to track writes without stopping the vCPUs. No page is write-protected yet. The reply carries a
    /// memfd with the words of a [`PageSet`](crate::PageSet) over all pages, to which harvested pages are added.
    StartTracking,
    /// The VMM write-protects this run of pages for the first time, so that later writes to them are noticed. The reply's
    /// values are the time that it took, and 0.
    WriteProtect {
        /// The number of the first page.
        first: u64,
        /// The number of pages.
        pages: u64,
    },
    /// The VMM adds all pages that were written since they were last harvested to the shared set, and write-protects them
    /// again. The reply's values are the time that it took, and the number of pages added.
    Harvest,
    /// The VMM throttles the guest: until tracking ends, it lets the guest write no more than this rate, by keeping the
    /// vCPUs that write (and no others) out of the guest. The request fails if the VMM cannot do so. The reply's values
    /// are the pages written since the throttle began, and the pages that the rate permitted.
    Throttle {
        /// The rate in pages of 4 KiB per second; 0 counts as 1.
        pages_per_second: u64,
    },
    /// The VMM stops tracking and releases what tracking took.
    StopTracking,
    /// The VMM stops all vCPUs. The reply's values are `CLOCK_MONOTONIC` when the last vCPU had stopped, and 0.
    Pause {
        /// The time after the beginning of the pause when the VMM resumes the guest by itself, unless the guest has been
        /// relinquished by then, because the daemon may hang. 0 means never.
        limit_nanoseconds: u64,
    },
    /// The VMM runs the guest, or runs it again. The reply's values are `CLOCK_MONOTONIC` when the vCPUs were started, and
    /// 0.
    Resume,
    /// The VMM saves everything but RAM. The reply carries a memfd. Its values are the number of bytes in the memfd, and
    /// the time that it took.
    Save,
    /// The VMM loads what a [`Request::Save`] at another host saved. The request carries a memfd. The reply's values are
    /// the time that it took, and 0.
    Load {
        /// The number of bytes in the memfd.
        bytes: u64,
    },
    /// The VMM must not resume the paused guest by itself any more, not even if the daemon goes away.
    Relinquish(Bond),
    /// The loaded guest belongs to this migration, which the VMM remembers for its next
    /// [`VmmHello`](super::VmmHello).
    Prepare(Bond),
    /// The guest runs elsewhere or will never run here, and the VMM is to end.
    Discard,
    /// The VMM opens a userfaultfd of its process.
    ///
    /// The request carries an open `/dev/userfaultfd` to make it with, because only opening that device needs a privilege.
    /// It carries no descriptor if the daemon may not open the device; then the privileges of the VMM's process count. The
    /// reply carries the new userfaultfd, `/proc/self/pagemap` and `/proc/self/maps`. Its values are 0 and 0.
    OpenUserfault {
        /// Whether the VMM keeps a copy of the userfaultfd open until this request comes again or the process ends. Then
        /// threads that wait for a page go on waiting when the daemon ends. Otherwise the kernel lets them continue, and
        /// reads the missing page as zeros.
        keep: bool,
    },
    /// The VMM hands over the userfaultfd again of which it keeps a copy, because the daemon that had the other has ended
    /// while pages were missing. It has been set up, and the guest's memory is registered with it.
    ///
    /// The reply carries that userfaultfd, `/proc/self/pagemap` and `/proc/self/maps`. Its values are 0 and 0. The request
    /// fails if the VMM keeps none. It exists since version 4.
    KeptUserfault,
    /// A shim hands over the file that the process has mapped at this address: the guest's memory, where that has no name
    /// by which the daemon could open it.
    ///
    /// The reply carries the file, which can be read and written. Its values are 0 and 0. The request fails if no
    /// descriptor of the process is of that file, and in a VMM, whose hello has its memory. It exists since version 5.
    MappedFile {
        /// The address in the process, at which the file is mapped.
        address: u64,
    },
}

impl Request {
    /// Returns the name of the request, for logs and errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::StartTracking => "start tracking",
            Self::WriteProtect { .. } => "write-protect",
            Self::Harvest => "harvest",
            Self::Throttle { .. } => "throttle",
            Self::StopTracking => "stop tracking",
            Self::Pause { .. } => "pause",
            Self::Resume => "resume",
            Self::Save => "save",
            Self::Load { .. } => "load",
            Self::Relinquish(_) => "relinquish",
            Self::Prepare(_) => "prepare",
            Self::Discard => "discard",
            Self::OpenUserfault { .. } => "open userfaultfd",
            Self::KeptUserfault => "hand over its userfaultfd again",
            Self::MappedFile { .. } => "hand over its memory",
        }
    }
}
