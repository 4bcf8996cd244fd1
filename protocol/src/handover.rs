//! Who owns the guest: the protocol that passes it from one host to the other.
//!
//! [`Source`] and [`Destination`] are the two halves. Each is a plain state machine: the
//! daemon tells it what happened ([`Event`]) and carries out what it returns ([`Action`]).
//!
//! ```text
//! source                                   destination
//! Offer            ----------------------> check, hold resources
//!                  <---------------------- Accept
//! copy
//! journal Leaving
//! pause, send the last pages               load the state
//!                                          journal Prepared
//!                  <---------------------- Ready
//! relinquish the VMM
//! journal Committed       (the one moment at which ownership changes hands)
//! Commit           ----------------------> journal Running
//!                                          resume the guest
//!                  <---------------------- Running
//! journal Finished
//! Done             ----------------------> forget
//! discard the VMM, forget
//! ```
//!
//! Two-phase commit with presumed abort, the source being coordinator and one of the two
//! participants:
//!
//! - Until `Committed` is durable the source owns the guest, and every failure ends with the
//!   guest running there. No record of a migration means that it was never committed, and so does
//!   `Leaving`; but a VMM that has been relinquished is not resumed on the strength of that alone.
//! - From `Prepared` on the destination is in doubt: it neither runs the guest nor forgets
//!   it, and repeats `Ready`, which is a question too, until it hears `Commit` or `Abort`.
//! - From `Committed` on the source is bound: it repeats `Commit` until it hears what has
//!   become of the guest. `Declined` is the only way back: the destination's durable promise
//!   that the guest has never run there and never will.
//!
//! What is sent before `Ready` belongs to one connection, and losing that connection fails
//! the migration; so only `Ready`, `Commit` and what answers it are ever repeated (on
//! [`Event::Tick`]). Messages may be lost, doubled, or overtake each other.
//!
//! # In doubt
//!
//! `Leaving` is written while the guest still runs, so that a source which crashes afterwards and
//! finds its VMM relinquished knows whom to ask. It cannot rely on its own silence, as a journal may
//! be damaged: it asks the destination to [`Withdraw`](Message::Withdraw), and takes the guest back
//! only when that has `Declined`, durably. A relinquished VMM of which the journal knows nothing, and
//! which names the migration itself, is treated alike; a loaded one of which the destination's journal
//! knows nothing is taken for `Prepared`. For the same reason a source that keeps a guest which it has
//! begun to relinquish resumes it first and says `Abort` afterwards: a destination forgets at that
//! word, and could not be asked any more.
//!
//! A destination that knows nothing of the migration says [`Unknown`](Message::Unknown), which permits
//! nothing. Where the other host never answers, or answers so, only an operator knows more
//! ([`Event::Resolved`]). Running the guest is safe if what the operator promises is true: that the
//! other host's VMM of this guest has ended, and stays so.
//!
//! What a damaged journal can still do, and no answer can mend:
//!
//! - a source that has lost `Committed` answers `Ready` with `Abort` before it has seen its VMM again:
//!   the guest then is in doubt at the source until an operator resolves it, and it is gone if that
//!   VMM has ended as well;
//! - a destination that has lost its promise `Declined` before its VMM was discarded may be told to run
//!   what the source has taken back, by a `Commit` that was on its way for all that time; one that has
//!   lost it after `Running`, as its VMM could not start the guest, says `Lost` of a guest that the
//!   source still has;
//! - a destination that has lost its journal while the guest fetches does not fetch any more, and an
//!   operator ends both;
//! - a destination that has lost `Running`, and whose VMM has ended as well, promises that the guest has
//!   never run: the source goes on from where the guest was paused, as after a crash of a host that is
//!   restored from a snapshot. (A source that has heard of post-copy knows better, and takes the guest for
//!   lost.) The journal of the daemon cannot lose its last record unseen; an older copy of it that somebody
//!   puts in its place can.
//!
//! A VMM that still lives is asked before anything is promised: one that says that it runs the guest is
//! believed, whatever the journal has lost. So even then there are never two owners at the same time.
//!
//! # Post-copy
//!
//! The destination may resume the guest while part of its memory is still at the source:
//!
//! ```text
//! source                                   destination
//! Commit           ----------------------> journal Running
//!                                          resume the guest, with pages missing
//!                  <---------------------- Fetching
//! serve pages      ======================> place them
//!                                          the last page is here
//!                  <---------------------- Running
//! journal Finished, and so on as above
//! ```
//!
//! The guest has changed hands as ever, so it needs no new record: `Committed` forbids the
//! source to run it or to forget it, and the memory of a VMM that only waits does not change.
//! A restarted source finds `Committed`, repeats `Commit`, hears `Fetching` and serves
//! again. A restarted destination finds `Running` and tells the VMM to resume, which shows
//! whether pages are missing. So the guest outlives connections and daemons.
//!
//! What ends it is that its VMM, the memory at the source, or the knowledge of what is missing
//! is gone before the last page has come: the guest is whole nowhere, as the source's copy is
//! out of date. Then the destination says `Lost`, and both hosts report [`Outcome::Lost`], as
//! they do when an operator no longer waits for a host that will not come back
//! ([`Event::Abandoned`]). A source that has given up answers `Fetching` with `Gone`.
//!
//! # What a VMM must do
//!
//! Daemons may crash and come back while VMMs live on, so both VMMs have a part in this:
//!
//! - at the source, a paused VMM that loses its daemon resumes by itself, *unless* it has
//!   been relinquished: then it waits for the daemon to come back and say (stock QEMU, which
//!   does not know of daemons, always waits);
//! - at the destination, an incoming VMM never runs before it is told to.
//!
//! # What the daemon must do
//!
//! Start the actions of one call in order. Journal actions take effect in the order in which
//! they were asked for, and so do the commands to a VMM; nothing relies on an order between
//! a journal action, a command and a message. One machine serves one migration, whose
//! identity is never used again, and which the journal, the wire and the commands to a VMM
//! carry beside what is defined here. Once [`is_over`](Source::is_over) the machine may be
//! dropped; messages for a migration that has no machine are answered with
//! [`Source::answer_unknown`] and [`Destination::answer_unknown`].
//!
//! In post-copy the destination's daemon must be able to tell, after a crash at any moment, a
//! guest that has all of its memory from one that has not: before it says [`Event::Complete`]
//! or [`Event::Abandoned`], the VMM must be left in a state that shows it. Where it cannot
//! tell *which* pages are missing it must not guess: a missing page that is taken for one that
//! is here would be read as zeros. After [`Outcome::Lost`], a guest that still runs there
//! must fail where it touches what is missing.
//!
//! `tests/handover_model.rs` walks every reachable state of all of this, with losses,
//! crashes and failing VMMs at every step.

use std::fmt;
use std::str::FromStr;

mod destination;
mod source;

pub use destination::Destination;
pub use source::Source;

/// What the two halves say to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Message {
    /// Source: will you take this guest?
    Offer,
    /// Destination: yes; resources are held.
    Accept,
    /// Destination: no.
    Refuse,
    /// Destination: all is here and loaded. Shall I run it? Repeated until answered.
    Ready,
    /// Source: it is yours, run it. Repeated until answered.
    Commit,
    /// Destination: it runs here, and all of its memory is here. Repeated until answered.
    Running,
    /// Destination: it runs here, and part of its memory is still at the source. Repeated until
    /// that has changed.
    Fetching,
    /// Destination: it may have run here, and ended or was given up before all of its memory was
    /// known to be here. Repeated until answered.
    Lost,
    /// Destination: it has never run here and never will. Repeated until answered.
    Declined,
    /// Source: heard; the destination may forget the migration.
    Done,
    /// Source, in answer to `Fetching`: the guest's memory is not here any more.
    Gone,
    /// Either: this migration is off. From the source: it was never committed.
    Abort,
    /// Source: I do not know whether I committed. Unless you have heard that I did, promise not to
    /// run it. Repeated until answered.
    Withdraw,
    /// Destination, in answer to `Withdraw` or `Commit`: I know nothing of this migration.
    Unknown,
}

/// What a half writes to its host's journal, durably, about one migration. The last one counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Record {
    /// Source: the guest is about to be paused and relinquished.
    Leaving,
    /// Source: the guest is the destination's.
    Committed,
    /// Source: the destination needs nothing from here any more, and the VMM is to be discarded.
    Finished,
    /// Source: the guest was passed on and lost, and the VMM is to be discarded.
    Lost,
    /// Source: the operator gave up what is here, and the VMM is to be discarded.
    GivenUp,
    /// Source: the destination declined, or the operator said so; the guest is the source's again.
    TakenBack,
    /// Destination: loaded, and in doubt until the source answers.
    Prepared,
    /// Destination: the guest is ours; it may be running from here on.
    Running,
    /// Destination: a promise that the guest never ran here and never will.
    Declined,
}

/// Something that happened, which the daemon tells a half. What a half has no use for in its
/// state it ignores: a late or doubled event is harmless.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The peer said this.
    Message(Message),
    /// The connection to the peer is lost. (When it is back: [`Event::Tick`].)
    PeerLost,
    /// A while has gone by, or the connection is back: repeat what has not been answered.
    Tick,
    /// Something went wrong here: a deadline passed, lanes failed, digests differ, the state
    /// cannot be saved or loaded, a VMM refused to be paused or relinquished, or the source's
    /// VMM, not yet relinquished, lost its connection to the daemon (and so resumes by itself).
    Failed,
    /// The VMM's process has ended, and what it said before has been told. A relinquished or
    /// incoming VMM that merely lost its connection is not gone: it attaches again, and is told
    /// again what it has not answered.
    VmmGone,
    /// [`Action::Journal`] is durable.
    Journalled(Record),
    /// [`Action::Journal`] failed, and a restarted daemon will not find the record either.
    JournalFailed(Record),
    /// [`Action::Resume`] was carried out: the guest runs, and has all of its memory.
    Resumed,
    /// [`Action::Resume`] failed, and the guest has not executed an instruction since it was
    /// paused or loaded. If that is not certain, it is [`Event::VmmGone`] instead. To be said as
    /// well of a guest that the journal calls no more than prepared, when a restarted daemon at the
    /// destination does not know which of its pages are missing: at once, before anybody asks that it
    /// be started. What that means is decided when the VMM has said whether it runs the guest.
    ResumeFailed,
    /// [`Action::Discard`] was carried out.
    Discarded,
    /// Source: the operator wants to keep the guest here. See [`Source::can_cancel`].
    Cancel,
    /// Source: time to pause the guest (`convergence::Decision::SwitchOver`).
    SwitchOver,
    /// Source: the guest is paused, and its last pages and its state have been sent.
    Sent,
    /// Source: [`Action::Relinquish`] was carried out.
    Relinquished,
    /// A VMM that attaches to a restarted daemon waits for word whether the guest is to run: it has
    /// been relinquished, or has loaded the guest, for this migration.
    Waits,
    /// A VMM that attaches to a restarted daemon has the guest for its own: it runs it or, at the
    /// source, has it paused without having been relinquished.
    Owned,
    /// Destination: the offer can be met, and what it needs is held.
    Accepted,
    /// Destination: the offer cannot be met.
    Refused,
    /// Destination: every page has arrived, digests agree if they were asked for, and the
    /// VMM has loaded the state. In post-copy: every page that was to come beforehand.
    Loaded,
    /// Destination: [`Action::Resume`] was carried out: the guest runs, and waits where it
    /// touches pages that are not here yet.
    ResumedIncomplete,
    /// Destination, after [`Event::ResumedIncomplete`]: the last missing page is here.
    Complete,
    /// The guest will never have what it still needs from the source. At the destination: the
    /// operator said so before the last page was here, or the guest runs and a restarted daemon
    /// does not know what it lacks. At the source: the operator said that the destination will
    /// never ask again, or what [`Action::Serve`] needs is not here any more. See
    /// [`Source::can_abandon`] and [`Destination::can_abandon`].
    Abandoned,
    /// The operator has decided what no host can decide. See [`Source::can_resolve`] and
    /// [`Destination::can_resolve`].
    Resolved(Resolution),
}

/// What an operator decides about a guest in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// It is to run here. The operator promises that the other host's VMM of this guest has ended.
    RunHere,
    /// What is here of it is to be given up.
    Discard,
}

/// Something for the daemon to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use]
pub enum Action {
    /// Send this to the peer if it is connected; drop it otherwise.
    Send(Message),
    /// Write this durably; then [`Event::Journalled`] or [`Event::JournalFailed`].
    Journal(Record),
    /// Remove the migration from the journal. Harmless when it is not there.
    Forget,
    /// Source: start tracking and copying.
    Copy,
    /// Source: pause the guest and send the rest; then [`Event::Sent`] or [`Event::Failed`].
    Pause,
    /// Source: tell the VMM that it must not resume by itself any more, not even if the
    /// daemon goes away; then [`Event::Relinquished`] or [`Event::VmmGone`]. A VMM that is not
    /// paused for this migration, because it has resumed by itself, refuses: [`Event::Failed`].
    Relinquish,
    /// Let the guest run here. At the source: stop copying and tracking, and resume the guest
    /// if it is paused or relinquished for this migration. At the destination: start it, unless
    /// it was started by this migration before (whatever has become of it since). Then
    /// [`Event::Resumed`], [`Event::ResumeFailed`] or [`Event::VmmGone`]; at the destination
    /// [`Event::ResumedIncomplete`] or [`Event::Abandoned`] as well.
    Resume,
    /// Make sure that a VMM never runs the guest: the relinquished one at the source, the
    /// incoming one at the destination. Then [`Event::Discarded`] or [`Event::VmmGone`].
    Discard,
    /// Source: from now until [`Action::Discard`], let the destination fetch from the memory of
    /// the relinquished VMM, and connect again after every loss. The daemon holds that memory as
    /// the VMM does, so it survives either; if it is not here any more, because the VMM ended
    /// and the daemon was restarted: [`Event::Abandoned`].
    Serve,
    /// Tell the operator how it ended for this host.
    Report(Outcome),
}

/// How a migration ended for one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest runs at the destination.
    Completed,
    /// The destination refused the offer; the guest runs at the source.
    Refused,
    /// The operator cancelled; the guest runs at the source.
    Cancelled,
    /// Something failed before the commit; the guest runs at the source.
    Failed,
    /// The destination had all of the guest, could not start it, and gave it back; the guest
    /// runs at the source.
    TakenBack,
    /// The VMM that owned the guest ended during the migration, and the guest with it: at the
    /// source before the commit or after taking back; at the destination while starting it.
    VmmGone,
    /// The guest was passed on, and ended or was given up at the destination before all of its
    /// memory was known to be there. The source's copy is out of date.
    Lost,
    /// The operator gave up what was here of a guest in doubt. Whether the other host runs it is not
    /// known here.
    GivenUp,
}

/// Where a migration stands, in words for operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// The destination is asked, or asks itself, whether it can take the guest.
    Offering,
    /// The guest runs at the source while its memory is copied.
    Copying,
    /// The guest is paused, or about to be; what remains is being sent and loaded.
    SwitchingOver,
    /// Ownership is being passed: before the answer of the other host, neither runs the guest.
    Committing,
    /// The guest runs at the destination, which fetches the rest of its memory.
    Fetching,
    /// The destination has the guest and the source has heard; both are tidying up.
    Finishing,
    /// The guest is being resumed at the source, or discarded at the destination.
    Returning,
    /// Over: the guest was passed to the destination.
    Completed,
    /// Over: the guest stayed at the source.
    Returned,
}

/// A journal record of the other half was given to `recover`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the journal says `{record}` of a migration for which this host is the {half}: \
     the journal is damaged or was copied from another host"
)]
pub struct WrongRecord {
    /// What was found.
    pub record: Record,
    /// Which half this host is: "source" or "destination".
    pub half: &'static str,
}

/// A journal holds a word that is no [`Record`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no handover record: the journal is damaged or was written by a later version")]
pub struct UnknownRecord(pub String);

impl Record {
    const ALL: [Self; 9] = [
        Self::Leaving,
        Self::Committed,
        Self::Finished,
        Self::Lost,
        Self::GivenUp,
        Self::TakenBack,
        Self::Prepared,
        Self::Running,
        Self::Declined,
    ];

    /// Whether a source writes it; a destination does otherwise.
    pub fn is_of_source(self) -> bool {
        !matches!(self, Self::Prepared | Self::Running | Self::Declined)
    }

    /// The word that stands for it in the journal; [`FromStr`] reads it back.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Leaving => "leaving",
            Self::Committed => "committed",
            Self::Finished => "finished",
            Self::Lost => "lost",
            Self::GivenUp => "given-up",
            Self::TakenBack => "taken-back",
            Self::Prepared => "prepared",
            Self::Running => "running",
            Self::Declined => "declined",
        }
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Record {
    type Err = UnknownRecord;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|record| record.as_str() == word);
        known.ok_or_else(|| UnknownRecord(word.chars().take(40).collect()))
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Offering => "offering",
            Self::Copying => "copying",
            Self::SwitchingOver => "switching over",
            Self::Committing => "committing",
            Self::Fetching => "fetching",
            Self::Finishing => "finishing",
            Self::Returning => "returning",
            Self::Completed => "completed",
            Self::Returned => "returned",
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Completed => "completed: the guest runs at the destination",
            Self::Refused => "refused by the destination: the guest runs at the source",
            Self::Cancelled => "cancelled: the guest runs at the source",
            Self::Failed => "failed: the guest runs at the source",
            Self::TakenBack => "the destination could not start the guest: it runs at the source again",
            Self::VmmGone => "the VMM that owned the guest ended during the migration",
            Self::GivenUp => {
                "given up by the operator at this host: whether the other runs it is not known here"
            }
            Self::Lost => {
                "lost: the guest was passed on, and ended or was given up at the destination before all of \
                 its memory was known to be there"
            }
        })
    }
}

#[cfg(test)]
mod tests;
