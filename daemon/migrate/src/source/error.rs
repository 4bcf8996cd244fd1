//! This module says why the source's work ended without success.

use memlane_guest::DriverError;
use memlane_net::link::LinkError;
use memlane_protocol::convergence::Why;

use super::serve::ServeError;
use crate::effects::Deadline;

/// Copying or the switchover ended without success. The guest runs on at the source.
#[derive(Debug, thiserror::Error)]
pub(super) enum CopyError {
    /// The VMM failed.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The control connection failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// No lane is left. The last one ended for this reason.
    #[error("every lane to the destination is lost, the last one because {0}; see `memlanectl ports`")]
    NoLanes(String),
    /// The lane that carries the VMM's state broke.
    #[error("the lane that carries the VMM's state is lost: {0}; see `memlanectl ports`")]
    StateLane(std::io::Error),
    /// Memory could not be looked at.
    #[error("cannot find out what the guest's memory holds: {0}")]
    Memory(std::io::Error),
    /// Memory was written that the VMM at the destination may have looked at already.
    #[error(
        "the VMM wrote to the guest's memory while it saved its state, which no other has done so far; the next order has \
         its state sent when it is done"
    )]
    SavesIntoMemory,
    /// The pause would be too long.
    #[error("{0}")]
    GaveUp(Why),
    /// The pause was about to be too long.
    #[error("{}", .0.reason())]
    Late(Deadline),
    /// The destination cannot fetch.
    #[error("post-copy cannot begin: {0}")]
    Serve(#[from] ServeError),
    /// The destination's memory differs.
    #[error("the destination's memory is not equal: {0}; the guest was not handed over")]
    Unequal(String),
    /// The destination answered something else than it was asked.
    #[error("the destination broke the protocol: {0}")]
    Protocol(&'static str),
}
