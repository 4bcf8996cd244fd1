//! [`RunState`]: whether a guest runs.

/// The state of a guest in its VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// The guest is expected from another host.
    Incoming,
    /// The guest has arrived and is paused.
    Loaded,
    /// The guest has been given up.
    Discarded,
}

impl RunState {
    /// Returns the name of the state in statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Incoming => "incoming",
            Self::Loaded => "loaded",
            Self::Discarded => "discarded",
        }
    }
}
