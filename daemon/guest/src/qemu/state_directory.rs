//! What the daemon remembers of the QEMUs that it keeps: a file of JSON for each, in `guests/`
//! beside the journal. No QEMU outlives its host, so neither need these files.

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

use super::definition::{Definition, Paths};
use crate::config::GuestsConfig;

/// A record cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot remember guest {guest} in {}: {source}", path.display())]
pub struct StateError {
    guest: String,
    path: PathBuf,
    source: io::Error,
}

/// What is remembered, and the directory in which it is: read once, and written by threads beside the control
/// thread, which asks what is remembered far more often than it changes that.
pub struct StateDirectory {
    directory: PathBuf,
    records: RefCell<BTreeMap<String, Record>>,
    /// One file is written at a time, so that the last of a name has what was remembered last.
    writing: Arc<Mutex<()>>,
}

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
    #[serde(default, rename = "summoned")]
    pub launched_for_migration: bool,
    /// What it waits for word of, since it was relinquished or has loaded a guest: a QEMU cannot
    /// remember that, and a host whose file system forgets it has no QEMU any more either.
    #[serde(default)]
    pub bond: Option<Bound>,
    /// The guest file, if this daemon started it.
    pub definition: Option<String>,
    /// What goes when it ends, if this daemon started it: its RAM and its monitor's socket.
    #[serde(default)]
    pub files: Vec<PathBuf>,
}

/// A [`Bond`], as it is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bound {
    migration: String,
    peer: String,
    fetching: bool,
}

impl Bound {
    /// What was written down; `None` if it is none.
    pub fn bond(&self) -> Option<Bond> {
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
            launched_for_migration: false,
            bond: None,
            definition: Some(definition.text.clone()),
            files: vec![memory, qmp],
        }
    }

    /// Of a QEMU that others started.
    pub fn attached(name: Label, qmp: PathBuf, incoming: bool) -> Self {
        let name = name.to_string();
        let (pid, started, migrating, launched_for_migration) = (0, 0, false, false);
        let (bond, definition, files) = (None, None, Vec::new());
        Self { name, pid, started, qmp, incoming, migrating, launched_for_migration, bond, definition, files }
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

impl StateDirectory {
    /// Beside the journal; nothing is remembered before it is [loaded](Self::load).
    pub fn beside(journal: &Path) -> Self {
        let (records, writing) = Default::default();
        Self { directory: journal.join("guests"), records, writing }
    }

    /// Reads everything that was remembered; what cannot be read is left out, and told.
    pub async fn load(&self) {
        let directory = self.directory.clone();
        let records = task::aside(move || all(&directory)).await;
        self.records.borrow_mut().extend(records.into_iter().map(|record| (record.name.clone(), record)));
    }

    /// Everything that is remembered.
    pub fn all(&self) -> Vec<Record> {
        self.records.borrow().values().cloned().collect()
    }

    /// What is remembered of the guest of this name.
    pub fn read(&self, name: &str) -> Option<Record> {
        self.records.borrow().get(name).cloned()
    }

    /// The guest that was awaited has arrived, and runs: what becomes of it is its operator's affair.
    pub fn note_arrival(self: &Rc<Self>, name: &str) {
        let arrived = self.change(name, |record| {
            (record.incoming, record.launched_for_migration, record.migrating) = (false, false, false);
            record.bond = None;
        });
        if arrived {
            let (states, name) = (self.clone(), name.to_owned());
            task::spawn("note of an arrival", async move { states.save_or_tell(&name).await });
        }
    }

    /// QEMU migrates, or does not any more, because this daemon has told it to. What it does without
    /// that is its operator's affair.
    pub async fn note_migration(&self, name: &str, migrating: bool) {
        let noted = self.change(name, |record| {
            record.migrating = migrating;
            record.bond = record.bond.take().filter(|_| migrating);
        });
        if noted {
            self.save_or_tell(name).await;
        }
    }

    /// QEMU's guest waits for word of a migration: from here on nothing else lets it run.
    pub async fn bind(&self, name: &str, bond: &Bond) -> Result<(), StateError> {
        let Some(record) = self.read(name) else {
            let source = io::Error::other("nothing is remembered of it");
            return Err(StateError { guest: name.to_owned(), path: self.path(name), source });
        };
        self.change(name, |record| record.bond = Some(bond.into()));
        // What else has changed meanwhile stays.
        self.save(name).await.inspect_err(|_| {
            self.change(name, |changed| changed.bond = record.bond);
        })
    }

    /// Whether there is such a record to change.
    fn change(&self, name: &str, change: impl FnOnce(&mut Record)) -> bool {
        self.records.borrow_mut().get_mut(name).map(change).is_some()
    }

    async fn save_or_tell(&self, name: &str) {
        if let Err(error) = self.save(name).await {
            warn!(guest = name, %error, "cannot remember how a guest in QEMU stands");
        }
    }

    /// Remembers; a record of the same name is replaced.
    pub async fn write(&self, record: &Record) -> Result<(), StateError> {
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

    /// Forgets.
    pub async fn remove(&self, name: &str) {
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
            // To its end, whether anybody waits for it or not.
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

/// All records of a directory that can be read.
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

/// Where the QEMU of a launched guest keeps what the daemon must reach.
pub fn paths(guests: &GuestsConfig, name: &Label) -> Paths {
    let memory = guests.memory.join(format!("{name}.ram"));
    Paths { memory, qmp: guests.directory.join(name.as_str()).join("qmp.sock") }
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
            states.bind("web1", &bond).await.unwrap();
            assert!(states.bind("web2", &bond).await.is_err());
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
