//! Faults that are planted, to prove that a run finds them.

/// A fault in what the daemons and VMMs do. The decisions themselves are those of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// None: everything does as it should.
    Nothing,
    /// What a lost lane left unacknowledged is not sent again.
    OrphansForgotten,
    /// What a lost lane left is sent again at once, and the destination does not close that lane before.
    TakenBackUntold,
    /// A page is in flight no longer once it is sent, so that two copies of it may be under way.
    InFlightClearedAtSend,
    /// What the tracker found is lost once a lane was lost.
    HarvestLostAfterLane,
    /// A piece of memory is protected after the lanes may read it.
    ProtectedLate,
    /// The end of an iteration does not wait until holes are made.
    HolesNotAwaited,
    /// What device models write while they are saved is not looked for.
    DeviceWritesMissed,
    /// The state is sent although pages are not acknowledged.
    AcknowledgementsNotAwaited,
    /// `Committed` is said to be durable, and is not.
    CommitNotJournalled,
    /// `Prepared` is said to be durable, and is not.
    PreparedNotJournalled,
    /// The source lets the guest run when the connection is lost after the commit.
    SourceResumesAfterCommit,
    /// The destination runs the guest before the source has said so.
    DestinationRunsUnasked,
    /// A page that comes in post-copy is not placed, and counts as placed.
    PostcopyPageDropped,
    /// A page that comes a second time in post-copy is placed again.
    PostcopyPagePlacedTwice,
    /// Accesses to missing pages find zeros when the destination's daemon ends.
    MissingReadsAsZero,
    /// A destination's daemon that was restarted takes some of the holes for pages that are there.
    HolesTakenForWhole,
    /// A QEMU whose monitor hangs, as its main loop waits for a page, is not served.
    HangingVmmNotServed,
    /// The source is not told of a QEMU that hangs at a missing page before that QEMU has answered.
    HangingVmmUntold,
    /// A source that goes on over another connection confirms a message that has not come.
    MessageLostBetweenConnections,
    /// What may not have come is sent twice over another connection.
    MessagesSentTwice,
    /// A destination that answers over a connection which is broken waits for another one, and notices nothing else.
    AnswerHoldsUpMigration,
    /// A lost lane is never taken back.
    NeverTakenBack,
    /// Nothing is ever said again.
    NeverRepeated,
    /// A pause that is too long is not ended.
    DeadlineIgnored,
    /// A lane sends more than its window holds.
    WindowIgnored,
}

impl Plant {
    /// Every fault that can be planted.
    pub const ALL: [Self; 25] = [
        Self::OrphansForgotten,
        Self::TakenBackUntold,
        Self::InFlightClearedAtSend,
        Self::HarvestLostAfterLane,
        Self::ProtectedLate,
        Self::HolesNotAwaited,
        Self::DeviceWritesMissed,
        Self::AcknowledgementsNotAwaited,
        Self::CommitNotJournalled,
        Self::PreparedNotJournalled,
        Self::SourceResumesAfterCommit,
        Self::DestinationRunsUnasked,
        Self::PostcopyPageDropped,
        Self::PostcopyPagePlacedTwice,
        Self::MissingReadsAsZero,
        Self::HolesTakenForWhole,
        Self::HangingVmmNotServed,
        Self::HangingVmmUntold,
        Self::MessageLostBetweenConnections,
        Self::MessagesSentTwice,
        Self::AnswerHoldsUpMigration,
        Self::NeverTakenBack,
        Self::NeverRepeated,
        Self::DeadlineIgnored,
        Self::WindowIgnored,
    ];
}
