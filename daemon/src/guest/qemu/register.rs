//! What the daemon remembers of the QEMUs that it keeps: a file of JSON for each, in `guests/`
//! beside the journal. No QEMU outlives its host, so neither need these files.

use std::io;
use std::path::{Path, PathBuf};

use memlane_protocol::wire::Label;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::definition::{Definition, Paths};
use crate::config::GuestsConfig;
use crate::journal::VmmIdentity;
use crate::private;

/// A record cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot remember guest {guest} in {}: {source}", path.display())]
pub struct RegisterError {
    guest: String,
    path: PathBuf,
    source: io::Error,
}

/// The directory of records.
pub struct Register(PathBuf);

/// A QEMU that the daemon keeps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Name of the guest.
    pub name: String,
    /// Its process, from when the daemon takes its guest in.
    #[serde(default)]
    pub pid: u32,
    /// When that started, in clock ticks since the host booted.
    #[serde(default)]
    pub started: u64,
    /// Its monitor.
    pub qmp: PathBuf,
    /// It waits for a guest to arrive, or has one that has not run yet.
    pub incoming: bool,
    /// A migration of QEMU's own is this daemon's doing.
    #[serde(default)]
    pub migrating: bool,
    /// It was started for a migration, and is of no use without.
    #[serde(default)]
    pub summoned: bool,
    /// The guest file, if this daemon started it.
    pub definition: Option<String>,
    /// What goes when it ends, if this daemon started it: its RAM and its monitor's socket.
    #[serde(default)]
    pub files: Vec<PathBuf>,
}

impl Record {
    /// Of a QEMU that is started from a guest file.
    pub fn launched(definition: &Definition, incoming: bool, guests: &GuestsConfig) -> Self {
        let Paths { memory, qmp } = paths(guests, &definition.name);
        Self {
            name: definition.name.to_string(),
            pid: 0,
            started: 0,
            qmp: qmp.clone(),
            incoming,
            migrating: false,
            summoned: false,
            definition: Some(definition.text.clone()),
            files: vec![memory, qmp],
        }
    }

    /// Of a QEMU that others started.
    pub fn attached(name: Label, qmp: PathBuf, incoming: bool) -> Self {
        let name = name.to_string();
        let (pid, started, migrating, summoned) = (0, 0, false, false);
        let (definition, files) = (None, Vec::new());
        Self { name, pid, started, qmp, incoming, migrating, summoned, definition, files }
    }

    /// The process.
    pub fn identity(&self) -> VmmIdentity {
        VmmIdentity { pid: self.pid, started: self.started }
    }

    /// Removes what the QEMU that has ended left behind.
    pub fn remove_files(&self) {
        for file in &self.files {
            match std::fs::remove_file(file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    warn!(guest = self.name, file = %file.display(), %error, "cannot remove what a QEMU left behind");
                }
                _ => {}
            }
        }
    }
}

impl Register {
    /// Beside the journal.
    pub fn beside(journal: &Path) -> Self {
        Self(journal.join("guests"))
    }

    /// Everything that was remembered; what cannot be read is left out, and told.
    pub fn all(&self) -> Vec<Record> {
        let entries = match std::fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                warn!(directory = %self.0.display(), %error, "cannot look for guests in QEMU");
                return Vec::new();
            }
        };
        let files = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
        let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
        files.filter_map(|path| read(&path)).collect()
    }

    /// What is remembered of the guest of this name.
    pub fn read(&self, name: &str) -> Option<Record> {
        read(&self.path(name))
    }

    /// The guest that was awaited has arrived, and runs: what becomes of it is its operator's affair.
    pub fn note_arrival(&self, name: &str) {
        self.change(name, |record| {
            (record.incoming, record.summoned, record.migrating) = (false, false, false);
        });
    }

    /// QEMU migrates, or does not any more, because this daemon has told it to. What it does without
    /// that is its operator's affair.
    pub fn note_migration(&self, name: &str, migrating: bool) {
        self.change(name, |record| record.migrating = migrating);
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Record)) {
        let Some(mut record) = self.read(name) else { return };
        change(&mut record);
        if let Err(error) = self.write(&record) {
            warn!(guest = name, %error, "cannot remember how a guest in QEMU stands");
        }
    }

    /// Remembers; a record of the same name is replaced.
    pub fn write(&self, record: &Record) -> Result<(), RegisterError> {
        let path = self.path(&record.name);
        let write = || {
            private::directory(&self.0)?;
            private::put_volatile(&path, &serde_json::to_vec_pretty(record)?)
        };
        write().map_err(|source| RegisterError { guest: record.name.clone(), path: path.clone(), source })
    }

    /// Forgets.
    pub fn remove(&self, name: &str) {
        match std::fs::remove_file(self.path(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!(guest = name, %error, "cannot forget a guest in QEMU");
            }
            _ => {}
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.json"))
    }
}

fn read(path: &Path) -> Option<Record> {
    let parse = |bytes: Vec<u8>| serde_json::from_slice(&bytes).map_err(io::Error::from);
    match std::fs::read(path).and_then(parse) {
        Ok(record) => Some(record),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            warn!(file = %path.display(), %error, "a guest in QEMU is forgotten; attach it again");
            None
        }
    }
}

/// Where the QEMU of a launched guest keeps what the daemon must reach.
pub fn paths(guests: &GuestsConfig, name: &Label) -> Paths {
    let memory = guests.memory.join(format!("{name}.ram"));
    Paths { memory, qmp: guests.directory.join(name.as_str()).join("qmp.sock") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_and_forgets() {
        let directory = tempfile::tempdir().unwrap();
        let register = Register::beside(directory.path());
        assert!(register.all().is_empty());
        let mut record = Record::attached("web1".parse().unwrap(), "/run/web1.sock".into(), true);
        register.write(&record).unwrap();
        record.pid = 7;
        register.write(&record).unwrap();
        register.note_arrival("web1");
        register.note_arrival("web2");
        std::fs::write(directory.path().join("guests/other.json"), "{").unwrap();
        let [found] = &register.all()[..] else { panic!("one record can be read") };
        assert_eq!((found.pid, found.incoming, found.qmp.as_path()), (7, false, Path::new("/run/web1.sock")));
        register.remove("web1");
        register.remove("web1");
        assert!(register.all().is_empty());
    }
}
