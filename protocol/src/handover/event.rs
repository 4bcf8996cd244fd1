//! What the daemon tells a role.

use super::message::Message;
use super::record::Record;

/// Something that happened, which the daemon tells a role.
///
/// A role ignores an event that it has no use for in its state, so a late or doubled event is harmless.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The other host sent this message.
    Message(Message),
    /// The connection to the other host is lost. (When it is back, the daemon says [`Event::Tick`].)
    PeerLost,
    /// A while has gone by, or the connection is back: messages that were not answered are to be repeated.
    Tick,
    /// Something went wrong at this host: a deadline passed, lanes failed, digests differ, the state cannot be saved
    /// or loaded, a VMM refused to be paused or relinquished, or the source's VMM, which was not relinquished yet,
    /// lost its connection to the daemon (and so resumes by itself).
    Failed,
    /// The VMM's process has ended, and all that it said before has been told. A relinquished or incoming VMM that
    /// merely lost its connection is not gone: it attaches again, and receives again what it has not answered.
    VmmGone,
    /// The same, and the guest had shut itself down before: nobody needs its memory any more.
    PoweredOff,
    /// The record of [`Action::Journal`](super::Action::Journal) is durable.
    Journalled(Record),
    /// [`Action::Journal`](super::Action::Journal) failed, and a restarted daemon will not find the record either.
    JournalFailed(Record),
    /// [`Action::Resume`](super::Action::Resume) was done: the guest runs, and has all of its memory.
    Resumed,
    /// [`Action::Resume`](super::Action::Resume) failed, and the guest has not executed an instruction since it was
    /// paused or loaded. If that is not certain, the event is [`Event::VmmGone`] instead.
    ///
    /// A restarted daemon at the destination also says this at once if the journal says `Prepared` and it is not
    /// known which pages are missing, or the VMM has not loaded all of the guest's state. The role then waits until the VMM
    /// has said whether it runs the guest.
    ResumeFailed,
    /// [`Action::Discard`](super::Action::Discard) was done.
    Discarded,
    /// Source: the operator wants to keep the guest here. See [`Source::can_cancel`](super::Source::can_cancel).
    Cancel,
    /// Source: it is time to pause the guest (`convergence::Decision::SwitchOver`).
    SwitchOver,
    /// Source: the guest is paused, and its last pages and its state have been sent.
    Sent,
    /// Source: [`Action::Relinquish`](super::Action::Relinquish) was done.
    Relinquished,
    /// A VMM has attached to a restarted daemon and waits to be told whether the guest is to run. It has been
    /// relinquished, or has loaded the guest, for this migration.
    Waits,
    /// A VMM has attached to a restarted daemon and owns the guest: it runs it or, at the source, has it paused
    /// without having been relinquished.
    Owned,
    /// Destination: the offer can be met, and what it needs is reserved.
    Accepted,
    /// Destination: the offer cannot be met.
    Refused,
    /// Destination: the VMM has begun to load the state.
    Loading,
    /// Destination: every page has arrived, the digests agree if they were ordered, and the VMM has loaded the state.
    /// In post-copy, every page that was to come beforehand has arrived.
    Loaded,
    /// Destination: [`Action::Resume`](super::Action::Resume) was done. The guest runs, and waits where it touches
    /// pages that are not here yet.
    ResumedIncomplete,
    /// Destination, after a restart: the VMM does not answer [`Action::Resume`](super::Action::Resume), and its memory was
    /// found, so that missing pages can come. The daemon says this again while that is so.
    MemoryFound,
    /// Destination, after [`Event::ResumedIncomplete`]: the last missing page is here.
    Complete,
    /// The guest will never have what it still needs from the source.
    ///
    /// At the destination, the operator decided this before the last page was here, or the guest runs and a restarted
    /// daemon does not know which pages it lacks. At the source, the operator decided that the destination will never
    /// ask again, or the memory for [`Action::Serve`](super::Action::Serve) is not here any more. See
    /// [`Source::can_abandon`](super::Source::can_abandon) and
    /// [`Destination::can_abandon`](super::Destination::can_abandon).
    Abandoned,
    /// The operator has decided what no host can decide. See [`Source::can_resolve`](super::Source::can_resolve) and
    /// [`Destination::can_resolve`](super::Destination::can_resolve).
    Resolved(Resolution),
}

/// What an operator decides about a guest that is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// The guest is to run here. The operator promises that the other host's VMM of this guest has ended.
    RunHere,
    /// What this host has of the guest is to be given up.
    Discard,
}
