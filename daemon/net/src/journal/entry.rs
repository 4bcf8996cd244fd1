//! This module holds what is remembered of one migration, and how that is written down.
//!
//! A new field of [`Entry`] is a new field of [`Line`], with `#[serde(default)]` so that what an earlier version has
//! written can be read.

use memlane_api::ids;
use memlane_protocol::handover::{Record, UnknownRecord};
use memlane_protocol::wire::attach::MigrationId;
use memlane_protocol::wire::{BadLabel, Label};
use serde::{Deserialize, Serialize};

/// A process, told apart from a later one with the same number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VmmIdentity {
    /// This is the process's number; 0 means that it is not known.
    pub pid: u32,
    /// This is when the process started, in clock ticks since the host booted (`proc(5)`, field 22 of
    /// `/proc/PID/stat`); 0 means that it is not known.
    pub started: u64,
}

/// The part of one migration that the journal knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// This identifies the migration.
    pub migration: MigrationId,
    /// This is the guest's name.
    pub guest: Label,
    /// This is the other host.
    pub peer: Label,
    /// This is the process of the guest's VMM on this host.
    pub vmm: VmmIdentity,
    /// This is a digest of the guest's shape; 0 means that it is not known.
    pub shape: u64,
    /// The handover has come this far on this host.
    pub record: Record,
    /// If this is true, the guest runs here, or is about to, and part of its memory is only at the source.
    pub fetching: bool,
}

/// A key tells migrations apart. Each source chooses identities of its own, so that two peers may choose the same.
pub type Key = (Label, MigrationId);

impl Entry {
    /// Returns the key that tells this migration apart from others.
    pub fn key(&self) -> Key {
        (self.peer.clone(), self.migration)
    }
}

/// An [`Entry`] as text, or the note that a migration is to be forgotten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Line {
    migration: String,
    guest: String,
    peer: String,
    #[serde(default)]
    pid: u32,
    #[serde(default)]
    started: u64,
    #[serde(default)]
    shape: u64,
    #[serde(default)]
    fetching: bool,
    /// With `None` the migration is to be forgotten.
    record: Option<String>,
}

/// The effect of a line on what is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// This entry is the newest of its migration.
    Set(Entry),
    /// The migration is over.
    Forget(Key),
}

/// A line of the journal makes no sense.
#[derive(Debug, thiserror::Error)]
pub(super) enum LineError {
    /// The field `migration` holds no identity of a migration.
    #[error("`{}` names no migration", .0.escape_debug())]
    Migration(String),
    /// The field `guest` or `peer` holds no name.
    #[error(transparent)]
    Name(#[from] BadLabel),
    /// The field `record` holds no word that the handover knows.
    #[error(transparent)]
    Record(#[from] UnknownRecord),
}

impl Line {
    /// Makes a line which says that `record` is the newest of the migration, or with `None` that the migration is over.
    /// The value of `entry.record` does not matter.
    pub(super) fn new(entry: &Entry, record: Option<Record>) -> Self {
        Self {
            migration: ids::encode(&entry.migration),
            guest: entry.guest.to_string(),
            peer: entry.peer.to_string(),
            pid: entry.vmm.pid,
            started: entry.vmm.started,
            shape: entry.shape,
            fetching: entry.fetching,
            record: record.map(|record| record.to_string()),
        }
    }

    /// Returns what the line does to what is known.
    ///
    /// # Errors
    ///
    /// Fails if a field of the line does not hold what its name says.
    pub(super) fn change(&self) -> Result<Change, LineError> {
        let migration =
            ids::decode(&self.migration).ok_or_else(|| LineError::Migration(self.migration.clone()))?;
        let (guest, peer) = (self.guest.parse()?, self.peer.parse()?);
        let Some(record) = &self.record else { return Ok(Change::Forget((peer, migration))) };
        Ok(Change::Set(Entry {
            migration,
            guest,
            peer,
            vmm: VmmIdentity { pid: self.pid, started: self.started },
            shape: self.shape,
            fetching: self.fetching,
            record: record.parse()?,
        }))
    }
}
