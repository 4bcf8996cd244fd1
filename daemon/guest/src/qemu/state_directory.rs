//! The daemon remembers the QEMUs that it keeps in files of JSON, one for each, in `guests/` beside the journal. No
//! QEMU outlives its host, so these files need not either.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use memlane_net::journal::VmmIdentity;
use memlane_net::{private, task};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::Bond;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tracing::warn;

use super::definition::Definition;
use super::machine::Parts;
use super::ram::MemoryPart;
use crate::config::GuestsConfig;

/// A record cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot remember guest {guest} in {}: {source}", path.display())]
pub struct StateError {
    guest: String,
    path: PathBuf,
    source: io::Error,
}

/// Holds what is remembered, and the directory in which it lies. The files are read once, and written by threads beside
/// the control thread, which asks what is remembered far more often than it changes that.
pub(super) struct StateDirectory {
    directory: PathBuf,
    records: RefCell<BTreeMap<String, Record>>,
    /// This lock lets one file be written at a time, so that the last file of a name has what was remembered last.
    writing: Arc<Mutex<()>>,
}

/// A QEMU that the daemon keeps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// This is the name of the guest.
    pub name: String,
    /// This is QEMU's process, from when the daemon takes its guest in.
    #[serde(default)]
    pub pid: u32,
    /// This is when that process started, in clock ticks since the host booted.
    #[serde(default)]
    pub started: u64,
    /// QEMU runs as this user, which is no other guest's, if this daemon started it. It is `None` of a QEMU that others
    /// started, and of one that an earlier version of the daemon started as its own user.
    #[serde(default)]
    pub user: Option<u32>,
    /// This is the path of QEMU's monitor.
    pub qmp: PathBuf,
    /// If this is true, QEMU waits for a guest to arrive, or has one that has not run yet.
    pub incoming: bool,
    /// If this is true, this daemon has started a migration of QEMU's own.
    #[serde(default)]
    pub migrating: bool,
    /// If this is true, QEMU was started for a migration, and is of no use without it.
    #[serde(default, rename = "summoned")]
    pub launched_for_migration: bool,
    /// The guest waits for the outcome of this migration, since it was relinquished or loaded. QEMU cannot remember
    /// that, and a host whose file system forgets it has no QEMU any more either.
    #[serde(default)]
    pub bond: Option<Bound>,
    /// The guest stood still, as this word of QEMU's says, before it was paused for a migration, and is not to be run by
    /// that.
    #[serde(default)]
    pub stays: Option<String>,
    /// This is the guest file, if this daemon started QEMU.
    pub definition: Option<String>,
    /// This is what QEMU was made of when it was started from that file.
    #[serde(default, rename = "then")]
    pub machine: Option<Parts>,
    /// These files are removed when QEMU ends, if this daemon started it: its RAM and its monitor's socket.
    #[serde(default)]
    pub files: Vec<PathBuf>,
    /// These are the parts of the guest's RAM, from when the daemon has looked at it: QEMU cannot be asked while it waits
    /// for a page of it.
    #[serde(default)]
    pub parts: Vec<MemoryPart>,
}

/// A [`Bond`] in the form in which it is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Bound {
    migration: String,
    peer: String,
    fetching: bool,
}

impl Bound {
    /// Returns what was written down, or `None` if that makes no sense.
    pub(super) fn bond(&self) -> Option<Bond> {
        let (migration, peer) = (memlane_api::ids::decode(&self.migration)?, self.peer.parse().ok()?);
        Some(Bond { migration, peer, fetching: self.fetching })
    }
}

impl From<&Bond> for Bound {
    fn from(bond: &Bond) -> Self {
        let (migration, peer) = (memlane_api::ids::encode(&bond.migration), bond.peer.to_string());
        Self { migration, peer, fetching: bond.fetching }
    }
}

impl Record {
    /// Makes the record of a QEMU that is started from a guest file.
    pub(super) fn launched(definition: &Definition, incoming: bool, guests: &GuestsConfig) -> Self {
        let Paths { memory, qmp } = paths(guests, &definition.name);
        Self {
            name: definition.name.to_string(),
            pid: 0,
            started: 0,
            user: None,
            qmp: qmp.clone(),
            incoming,
            migrating: false,
            launched_for_migration: false,
            bond: None,
            stays: None,
            definition: Some(definition.text.clone()),
            machine: None,
            files: vec![memory, qmp],
            parts: Vec::new(),
        }
    }

    /// Makes the record of a QEMU that others started.
    pub(super) fn attached(name: Label, qmp: PathBuf, incoming: bool) -> Self {
        let name = name.to_string();
        let (pid, started, migrating, launched_for_migration) = (0, 0, false, false);
        let (user, bond, stays, definition) = (None, None, None, None);
        let (machine, files, parts) = (None, Vec::new(), Vec::new());
        Self {
            name,
            pid,
            started,
            user,
            qmp,
            incoming,
            migrating,
            launched_for_migration,
            bond,
            stays,
            definition,
            machine,
            files,
            parts,
        }
    }

    /// Returns the file of the guest's RAM, if this daemon made it.
    pub(super) fn memory(&self) -> Option<&Path> {
        self.user.and(self.files.first()).map(PathBuf::as_path)
    }

    /// Returns the identity of QEMU's process.
    pub(super) fn identity(&self) -> VmmIdentity {
        VmmIdentity { pid: self.pid, started: self.started }
    }

    /// Removes what the QEMU that has ended left behind.
    pub(super) fn remove_files(&self) {
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

impl StateDirectory {
    /// Makes a state directory beside the journal. Nothing is remembered before it is [loaded](Self::load).
    pub(super) fn beside(journal: &Path) -> Self {
        let (records, writing) = Default::default();
        Self { directory: journal.join("guests"), records, writing }
    }

    /// Reads everything that was remembered. A file that cannot be read is left out, and logged.
    pub(super) async fn load(&self) {
        let directory = self.directory.clone();
        let records = task::aside(move || all(&directory)).await;
        self.records.borrow_mut().extend(records.into_iter().map(|record| (record.name.clone(), record)));
    }

    /// Returns everything that is remembered.
    pub(super) fn all(&self) -> Vec<Record> {
        self.records.borrow().values().cloned().collect()
    }

    /// Returns what is remembered of the guest of this name.
    pub(super) fn read(&self, name: &str) -> Option<Record> {
        self.records.borrow().get(name).cloned()
    }

    /// Notes that the guest which was awaited has arrived and runs. From then on the operator decides about it.
    pub(super) fn note_arrival(self: &Rc<Self>, name: &str) {
        let arrived = self.change(name, |record| {
            (record.incoming, record.launched_for_migration, record.migrating) = (false, false, false);
            record.bond = None;
        });
        if arrived {
            let (states, name) = (self.clone(), name.to_owned());
            task::spawn("note of an arrival", async move { states.save_or_tell(&name).await });
        }
    }

    /// Notes that QEMU migrates, or does not any more, because this daemon has told it to. Any other migration of
    /// QEMU's own is the operator's.
    pub(super) async fn note_migration(&self, name: &str, migrating: bool) {
        let noted = self.change(name, |record| {
            record.migrating = migrating;
            record.bond = record.bond.take().filter(|_| migrating);
        });
        if noted {
            self.save_or_tell(name).await;
        }
    }

    /// Notes that this daemon is about to have QEMU migrate its guest, which runs, or stands still in this state.
    pub(super) async fn note_pause(&self, name: &str, stays: Option<String>) {
        if self.change(name, |record| (record.migrating, record.stays) = (true, stays)) {
            self.save_or_tell(name).await;
        }
    }

    /// Notes the state in which the guest stood still before it was paused.
    pub(super) async fn note_standing(&self, name: &str, stays: Option<String>) {
        if self.change(name, |record| record.stays = stays) {
            self.save_or_tell(name).await;
        }
    }

    /// Notes that QEMU's guest waits for the outcome of a migration: from here on nothing else lets it run. If it `stays` as
    /// it was, it does not run even then.
    ///
    /// # Errors
    ///
    /// Fails if the record cannot be written.
    pub(super) async fn bind(
        &self,
        name: &str,
        bond: &Bond,
        stays: Option<String>,
    ) -> Result<(), StateError> {
        let Some(record) = self.read(name) else {
            let source = io::Error::other("nothing is remembered of it");
            return Err(StateError { guest: name.to_owned(), path: self.path(name), source });
        };
        self.change(name, |record| {
            (record.bond, record.stays, record.migrating) = (Some(bond.into()), stays, true);
        });
        // What else has changed meanwhile stays.
        self.save(name).await.inspect_err(|_| {
            self.change(name, |changed| (changed.bond, changed.migrating) = (record.bond, record.migrating));
        })
    }

    /// Changes a record. Returns whether there is one of this name.
    fn change(&self, name: &str, change: impl FnOnce(&mut Record)) -> bool {
        self.records.borrow_mut().get_mut(name).map(change).is_some()
    }

    async fn save_or_tell(&self, name: &str) {
        if let Err(error) = self.save(name).await {
            warn!(guest = name, %error, "cannot remember how a guest in QEMU stands");
        }
    }

    /// Remembers a record, in place of one of the same name.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be written.
    pub(super) async fn write(&self, record: &Record) -> Result<(), StateError> {
        let before = self.records.borrow_mut().insert(record.name.clone(), record.clone());
        let saved = self.save(&record.name).await;
        if saved.is_err() {
            let mut records = self.records.borrow_mut();
            match before {
                Some(before) => records.insert(before.name.clone(), before),
                None => records.remove(&record.name),
            };
        }
        saved
    }

    /// Forgets the record of this name.
    pub(super) async fn remove(&self, name: &str) {
        self.records.borrow_mut().remove(name);
        if let Err(error) = self.save(name).await {
            warn!(guest = name, %error, "cannot forget a guest in QEMU");
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }

    /// Brings the file of this name up to date.
    async fn save(&self, name: &str) -> Result<(), StateError> {
        let one_at_a_time = self.writing.clone().lock_owned().await;
        let path = self.path(name);
        let (record, file) = (self.read(name), path.clone());
        let saved = task::aside(move || {
            // This goes on to its end, even if the caller gives up waiting.
            let _one_at_a_time = one_at_a_time;
            match record {
                Some(record) => replace(&file, &record),
                None => match std::fs::remove_file(&file) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                },
            }
        });
        saved.await.map_err(|source| StateError { guest: name.to_owned(), path, source })
    }
}

/// Writes a record beside the one before, and puts it in its place.
fn replace(path: &Path, record: &Record) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        private::directory(directory)?;
    }
    private::put_volatile(path, &serde_json::to_vec_pretty(record)?)
}

/// Reads all records of a directory that can be read.
fn all(directory: &Path) -> Vec<Record> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            warn!(directory = %directory.display(), %error, "cannot look for guests in QEMU");
            return Vec::new();
        }
    };
    let files = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.filter_map(|path| read(&path)).collect()
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

/// The daemon makes a guest's files at these paths, and QEMU gets descriptors of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Paths {
    /// This is the file of its RAM.
    pub memory: PathBuf,
    /// This is the socket of its monitor.
    pub qmp: PathBuf,
}

/// Returns the paths of the files of a launched guest.
pub(super) fn paths(guests: &GuestsConfig, name: &Label) -> Paths {
    let memory = guests.memory.join(format!("{name}.ram"));
    Paths { memory, qmp: guests.directory.join(name.as_str()).join("qmp.sock") }
}

/// Returns the path of the log of the QEMU that has its monitor at `qmp`.
pub(super) fn log_of(qmp: &Path) -> PathBuf {
    qmp.with_file_name("qemu.log")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a daemon that starts now remembers.
    async fn remembered(directory: &Path) -> Vec<Record> {
        let states = StateDirectory::beside(directory);
        states.load().await;
        states.all()
    }

    #[test]
    fn remembers_and_forgets() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let states = Rc::new(StateDirectory::beside(directory.path()));
            states.load().await;
            assert!(states.all().is_empty());
            let mut record = Record::attached("web1".parse().unwrap(), "/run/web1.sock".into(), true);
            states.write(&record).await.unwrap();
            record.pid = 7;
            states.write(&record).await.unwrap();
            let bond = Bond { migration: [7; 16], peer: "host-b".parse().unwrap(), fetching: true };
            let paused = Some("paused".to_owned());
            states.bind("web1", &bond, paused.clone()).await.unwrap();
            assert!(states.bind("web2", &bond, None).await.is_err());
            assert_eq!(states.read("web1").unwrap().stays, paused);
            assert_eq!(states.read("web1").unwrap().bond.and_then(|bound| bound.bond()), Some(bond));
            states.note_arrival("web1");
            assert!(states.read("web1").unwrap().bond.is_none());
            states.note_arrival("web2");
            assert!(states.read("web1").is_some_and(|record| !record.incoming));
            // After what was noted before.
            states.note_migration("web1", true).await;
            std::fs::write(directory.path().join("guests/other.json"), "{").unwrap();
            let [found] = &remembered(directory.path()).await[..] else { panic!("one record can be read") };
            let flags = (found.incoming, found.migrating);
            assert_eq!(
                (found.pid, flags, found.qmp.as_path()),
                (7, (false, true), Path::new("/run/web1.sock"))
            );
            states.remove("web1").await;
            states.remove("web1").await;
            assert!(states.all().is_empty() && remembered(directory.path()).await.is_empty());
            // One that cannot be written is not remembered.
            std::fs::remove_dir_all(directory.path().join("guests")).unwrap();
            std::fs::write(directory.path().join("guests"), "").unwrap();
            assert!(states.write(&record).await.is_err() && states.read("web1").is_none());
        });
    }
}
