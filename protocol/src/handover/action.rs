//! What a role tells the daemon to do.

use super::message::Message;
use super::outcome::Outcome;
use super::record::Record;

/// Something for the daemon to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use]
pub enum Action {
    /// The daemon sends this message if the other host is connected, and drops it otherwise.
    Send(Message),
    /// The daemon writes this record durably. It answers [`Event::Journalled`](super::Event::Journalled) or
    /// [`Event::JournalFailed`](super::Event::JournalFailed).
    Journal(Record),
    /// The daemon removes the migration from the journal. This is harmless if the migration is not there.
    Forget,
    /// Source: the daemon starts tracking and copying.
    Copy,
    /// Source: the daemon pauses the guest and sends the rest. It answers [`Event::Sent`](super::Event::Sent) or
    /// [`Event::Failed`](super::Event::Failed).
    Pause,
    /// Source: the daemon tells the VMM not to resume by itself any more, not even if the daemon goes away. It answers
    /// [`Event::Relinquished`](super::Event::Relinquished) or [`Event::VmmGone`](super::Event::VmmGone). A VMM that is
    /// not paused for this migration, because it has resumed by itself, refuses: the answer is
    /// [`Event::Failed`](super::Event::Failed).
    Relinquish,
    /// The daemon lets the guest run here.
    ///
    /// At the source, it stops copying and tracking, and resumes the guest if the guest is paused or relinquished for
    /// this migration. At the destination, it starts the guest, unless this migration has started it before (whatever
    /// has become of it since). It answers [`Event::Resumed`](super::Event::Resumed),
    /// [`Event::ResumeFailed`](super::Event::ResumeFailed) or [`Event::VmmGone`](super::Event::VmmGone); at the
    /// destination it may also answer [`Event::ResumedIncomplete`](super::Event::ResumedIncomplete) or
    /// [`Event::Abandoned`](super::Event::Abandoned).
    Resume,
    /// The daemon makes sure that a VMM never runs the guest: the relinquished VMM at the source, the incoming VMM at
    /// the destination. It answers [`Event::Discarded`](super::Event::Discarded) or
    /// [`Event::VmmGone`](super::Event::VmmGone).
    Discard,
    /// Source: until [`Action::Discard`], the daemon lets the destination fetch from the memory of the relinquished
    /// VMM, and connects again after every loss. Both the daemon and the VMM hold that memory, so it survives the end
    /// of either. If it is not here any more, because the VMM ended and the daemon was restarted, the daemon answers
    /// [`Event::Abandoned`](super::Event::Abandoned).
    Serve,
    /// The daemon tells the operator how the migration ended for this host.
    Report(Outcome),
}
