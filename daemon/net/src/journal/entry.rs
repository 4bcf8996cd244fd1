//! What is remembered of one migration, and how that is written down.
//!
//! A new field of [`Entry`] is a new field of [`Line`], with `#[serde(default)]` so that what an earlier
//! version has written can be read.

use memlane_api::ids;
use memlane_protocol::handover::{Record, UnknownRecord};
use memlane_protocol::wire::attach::MigrationId;
use memlane_protocol::wire::{BadLabel, Label};
use serde::{Deserialize, Serialize};

/// A process, told apart from a later one with the same number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VmmIdentity {
    /// Its number; 0 if it is not known.
    pub pid: u32,
    /// When it started, in clock ticks since the host booted (`proc(5)`, field 22 of
    /// `/proc/PID/stat`); 0 if it is not known.
    pub started: u64,
}

/// What the journal knows of one migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The migration.
    pub migration: MigrationId,
    /// The guest.
    pub guest: Label,
    /// The other host.
    pub peer: Label,
    /// The guest's VMM on this host.
    pub vmm: VmmIdentity,
    /// A digest of what the guest is made of; 0 if it is not known.
    pub shape: u64,
    /// How far the handover came on this host.
    pub record: Record,
    /// The guest runs here, or is about to, and part of its memory is still at the source.
    pub fetching: bool,
}

/// What tells migrations apart: their sources choose their identities, so that one host's may be another's.
pub type Key = (Label, MigrationId);

impl Entry {
    /// Tells it apart from those of other migrations.
    pub fn key(&self) -> Key {
        (self.peer.clone(), self.migration)
    }
}

/// An [`Entry`] as text, or that it is to be forgotten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
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
    /// `None`: forget the migration.
    record: Option<String>,
}

/// What a line does to what is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// This is the newest of its migration.
    Set(Entry),
    /// The migration is over.
    Forget(Key),
}

/// A line of the journal makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
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
    /// Says that `record` is the newest of the migration, or with `None` that it is over; `entry.record`
    /// does not matter.
    pub fn new(entry: &Entry, record: Option<Record>) -> Self {
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
    pub fn change(&self) -> Result<Change, LineError> {
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
