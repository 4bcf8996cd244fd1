//! What the two roles say to each other.

/// A message of the handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Message {
    /// The source asks whether the destination takes this guest.
    Offer,
    /// The destination takes the guest, and has reserved what it needs.
    Accept,
    /// The destination does not take the guest.
    Refuse,
    /// The destination has received and loaded everything, and asks whether to run the guest. It repeats this
    /// until it is answered.
    Ready,
    /// The source has given the guest to the destination, which is to run it. It repeats this until it is answered.
    Commit,
    /// The guest runs at the destination, and all of its memory is there. The destination repeats this until it is
    /// answered.
    Running,
    /// The guest runs at the destination, and part of its memory is still at the source. The destination repeats
    /// this until that has changed.
    Fetching,
    /// The destination owns the guest, and part of its memory is still at the source. Whether it runs cannot be learnt: its
    /// VMM does not answer, perhaps because it waits for that memory. The destination repeats this until it knows.
    Recovering,
    /// The guest may have run at the destination, and ended or was given up before all of its memory was known to
    /// be there. The destination repeats this until it is answered.
    Lost,
    /// The guest has never run at the destination and never will. The destination repeats this until it is answered.
    Declined,
    /// The source has received the answer; the destination may forget the migration.
    Done,
    /// The source answers `Fetching` or `Recovering`: it does not have the guest's memory any more.
    Gone,
    /// The sender has given up the migration. If the sender is the source, it never committed.
    Abort,
    /// The source does not know whether it committed. Unless the destination has received a commit, it is to promise
    /// not to run the guest. The source repeats this until it is answered.
    Withdraw,
    /// The destination answers `Withdraw` or `Commit`: it does not know this migration.
    Unknown,
}

/// With this, the reason begins that a destination sends along with [`Message::Running`] if the guest has shut itself down
/// since it was started there. Its memory is not needed any more then, and it runs nowhere.
pub const POWERED_OFF: &str = "powered off: ";

impl Message {
    /// Tells whether a destination says this of a guest that it was given, and repeats it until a source answers.
    pub fn awaits_source(self) -> bool {
        matches!(
            self,
            Self::Ready | Self::Running | Self::Recovering | Self::Fetching | Self::Lost | Self::Declined
        )
    }
}
