//! What happens in a run, one event after another.

use std::time::Duration;

use crate::network::{Payload, Purpose};
use crate::trouble::Trouble;

/// A host, of which there are two: 0 and 1.
pub(crate) type HostId = usize;
/// The number of a migration. Each order has a new one.
pub(crate) type MigrationId = u32;

/// Something happens.
#[derive(Debug)]
pub(crate) enum Event {
    /// The first thing that is under way on a connection to this host is due there.
    Arrive { connection: usize, to: HostId },
    /// This end of a connection learns that it is lost.
    Reset { connection: usize, at: HostId },
    /// The guest's vCPUs run for a while.
    Guest,
    /// The VMM has done the command that it is at.
    Obey { vmm: usize, serial: u64 },
    /// The VMM connects to its host's daemon.
    Attach { vmm: usize },
    /// The VMM ends a pause by itself.
    PauseEnds { vmm: usize, pause: u64 },
    /// A daemon that lived then has something to do.
    Daemon { host: HostId, epoch: u32, wake: Wake },
    /// Something goes wrong.
    Trouble(Trouble),
    /// Some trouble is about to be drawn.
    DrawTrouble,
    /// The daemon starts again.
    Restart(HostId),
    /// The daemon goes on after it stood still.
    GoOn(HostId),
    /// The operator looks whether to order something.
    Operator,
    /// All trouble ends.
    Calm,
    /// It is checked whether everything has come to its end.
    Look,
}

/// Something for a daemon.
#[derive(Debug)]
pub(crate) enum Wake {
    /// This came over a connection.
    Heard { connection: usize, payload: Payload },
    /// The connection is lost, or was closed at the other end.
    Lost { connection: usize },
    /// The connection that was dialled is there, or is not to be had.
    Dialled { purpose: Purpose, connection: Option<usize> },
    /// The other host has opened a connection.
    Accepted { connection: usize },
    /// The journal has written, or cannot.
    Journalled { migration: MigrationId, ticket: u64, written: bool },
    /// The VMM has answered, or cannot.
    Answered { migration: MigrationId, ticket: u64, answer: Answer },
    /// Some work that takes a while is done.
    Worked { migration: MigrationId, ticket: u64 },
    /// The connection to the VMM is lost.
    VmmLost { vmm: usize, attachment: u64 },
    /// The VMM's process has ended.
    VmmEnded { vmm: usize },
    /// The VMM has attached.
    VmmAttached { vmm: usize },
    /// The lane's newest frame goes to the kernel.
    HandOver { connection: usize },
    /// The lane looks at its connection.
    CheckLane { connection: usize },
    /// The control link is looked at.
    Ping { connection: usize },
    /// The lanes of a migration are looked at.
    Look { migration: MigrationId },
    /// The lanes over which missing pages are served are looked at, those of the session with this ticket.
    LookAtServing { migration: MigrationId, ticket: u64 },
    /// A moment has passed.
    Moment { migration: MigrationId },
    /// A moment has come by which something was to be done.
    Deadline { migration: MigrationId },
    /// Missing pages are served again.
    ServeAgain { migration: MigrationId, ticket: u64 },
    /// The answer to a word is not waited for any longer.
    WordEnds { connection: usize },
    /// The destination is tried again, by the suspension with this ticket.
    Reconnect { migration: MigrationId, ticket: u64 },
    /// The answer of the destination, with which a migration is to go on, is not waited for any longer.
    ResumeEnds { migration: MigrationId, connection: usize },
    /// The other host is not waited for any longer, by the suspension with this ticket.
    PatienceEnds { migration: MigrationId, ticket: u64 },
    /// An offer is looked at again, until this time at most.
    Offered { migration: MigrationId, connection: usize, until: Duration },
    /// The preflight is not waited for any longer.
    PreflightEnds { migration: MigrationId },
}

/// The answer of a VMM to a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    /// It did not do it, and says so.
    Failed,
    /// The connection was lost meanwhile: it may have done it.
    Gone,
    /// There was no connection: it has not heard of it.
    Unheard,
}
