//! What may go wrong on a path, and what a daemon or VMM may do wrong.

use memlane_protocol::handover::Record;

/// How much may go wrong on one path. Loss, doubling and reordering of messages and lost
/// connections are not counted: they may always happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Budget {
    /// A daemon crashes.
    pub crashes: u8,
    /// A VMM ends, loses its connection, or cannot load or resume.
    pub vmm: u8,
    /// A journal refuses a record.
    pub journal: u8,
    /// The operator cancels.
    pub cancel: bool,
    /// The guest is resumed before all of its memory is there.
    pub postcopy: bool,
    /// The destination's VMM, which lacks pages when its daemon comes back, answers only once it can have them.
    pub hangs: bool,
    /// An operator no longer waits for the other host while that guest fetches.
    pub abandon: bool,
    /// A journal is found damaged at a restart: its end, or all of it, is lost.
    pub damage: u8,
    /// A host burns.
    pub burn: u8,
    /// Operators resolve what is in doubt, as often as they like: they run the guest here where that is
    /// right, or discard what is here where the guest is seen to run there;
    pub resolve: bool,
    /// and they discard it anywhere.
    pub discard: bool,
}

/// What a cheating daemon or VMM does wrong, all the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    None,
    /// Says that this record is durable when it is not.
    NotDurable(Record),
    /// The VMM says that it is relinquished, and would still resume by itself.
    NotRelinquished,
    /// The source forgets a finished migration while its VMM is still there.
    ForgetBeforeDiscard,
    /// The source resumes the guest when the connection is lost after the commit.
    ResumeOnPeerLost,
    /// The source sends the state of a guest that still runs.
    SentBeforePause,
    /// The destination discards a prepared guest when the connection is lost.
    GiveUpInDoubt,
    /// Nothing is ever sent again.
    NeverRepeat,
    /// The destination says that the last page is there when it is not.
    CompleteTooEarly,
    /// A restarted destination takes a guest that lacks pages for one that has all,
    ForgetsMissing,
    /// or one that has all for one that lacks pages,
    ForgetsComplete,
    /// or starts a guest of which it does not know which pages it lacks,
    RunsWithHoles,
    /// or takes a guest that it cannot start, and never has, for one that is lost.
    LosesWhatNeverRan,
    /// The destination gives a guest up, and would fetch again after a crash.
    GivesUpWithoutTrace,
    /// The source takes `Fetching` for `Running`.
    FetchingIsRunning,
    /// The source frees the memory when the connection is lost.
    FreesOnPeerLost,
    /// A restarted source does not serve again,
    ServesNotAfterCrash,
    /// or does not say that it has nothing to serve any more.
    ServesWhatIsDropped,
    /// The source takes it for sure that a guest runs whose VMM hangs.
    RecoveringIsFetching,
    /// A daemon takes the word of another VMM for that of the one it told.
    BelievesStrangers,
    /// A restarted source resumes a relinquished VMM of which the journal does not say that it was
    /// committed,
    ResumesOnAGuess,
    /// or takes the guest back because the other host knows nothing of it.
    UnknownIsDeclined,
    /// The operator says that the other host is off when it is not.
    PromisesWhatIsNotTrue,
    /// A restarted destination says of a VMM that runs the guest that it waits for word,
    TakesRunningForLoaded,
    /// or of a VMM that has not loaded all of the guest.
    TakesLoadingForLoaded,
}
