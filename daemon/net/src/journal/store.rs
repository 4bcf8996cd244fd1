//! This module reads and writes the journal's files. Everything here may block, and runs on the journal's own thread.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use memlane_api::ids;
use memlane_protocol::handover::Record;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tracing::{error, info, warn};

use super::earlier;
use super::entry::{Entry, Key, Line};
use super::error::{Fault, JournalError};
use super::format::{self, Contents, JournalId, SLOT};
use crate::private;

/// This file holds the records.
pub(super) const FILE: &str = "handover.jsonl";
/// This file says that there is a journal, and which one. It is written once the journal is durable.
pub(super) const IDENTITY: &str = "handover.id";
/// The daemon that uses the journal holds a lock on this file.
const LOCK: &str = "lock";
/// The lock of a daemon that is gone is waited for this long.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// A file has this many slots, unless there are many entries.
const SLOTS: u64 = 256;

/// These are the entries that are durable, as all threads see them.
pub(super) type Entries = Arc<Mutex<BTreeMap<Key, Entry>>>;

/// This is called with the time that it took to make a record durable.
pub(super) type Synced = Box<dyn Fn(Duration) + Send>;

/// A disk takes the records.
pub(super) trait Disk: Send {
    /// Writes all of `bytes` at the offset `at`, in bytes.
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()>;
    /// Makes durable what was written.
    fn sync(&self) -> io::Result<()>;
}

impl Disk for File {
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// An open journal.
pub(super) struct Store {
    pub(super) path: PathBuf,
    pub(super) file: Box<dyn Disk>,
    id: JournalId,
    /// This is the number of the header's slot.
    first: u64,
    pub(super) slots: u64,
    /// This many slots are taken, with the header.
    pub(super) taken: u64,
    /// The file may be written anew when this many slots are taken.
    tidy_at: u64,
    /// These are the migrations that are not over.
    pub(super) entries: Entries,
    /// This is called with the time that each write to the disk took.
    synced: Synced,
    /// This file is locked while the store is open.
    _lock: File,
}

impl Store {
    /// Opens the journal in `directory`. Makes one where there never was one.
    ///
    /// # Errors
    ///
    /// Fails if another daemon uses it, if it cannot be read or written, or if what is in its files does not add up.
    pub(super) fn open(directory: &Path, synced: Synced) -> Result<Self, JournalError> {
        private::directory(directory).map_err(failed("make the directory", directory))?;
        let lock = lock(directory)?;
        let (path, identity_path) = (directory.join(FILE), directory.join(IDENTITY));
        // A crash has left it, or nothing.
        let _ = std::fs::remove_file(private::beside(&path));
        let identity = read(&identity_path)?.map(|bytes| format::read_identity(&bytes)).transpose();
        let identity = identity.map_err(|fault| explain(&identity_path, fault))?;
        let (contents, unwritten) = match (read(&path)?, identity) {
            (None, Some(_)) => return Err(JournalError::Missing { path, identity: identity_path }),
            (None, None) => (fresh(BTreeMap::new()), true),
            (Some(bytes), None) if !bytes.starts_with(format::BEGINNING.as_bytes()) => {
                let entries = earlier::read(&bytes).map_err(|fault| explain(&path, fault))?;
                info!(path = %path.display(), entries = entries.len(), "the journal is of an earlier version; it gets sums");
                (fresh(entries), true)
            }
            (Some(bytes), identity) => {
                let contents = format::read(&bytes).map_err(|fault| explain(&path, fault))?;
                if let Some(identity) = identity.filter(|identity| *identity != contents.id) {
                    let (found, expected) = (ids::encode(&contents.id), ids::encode(&identity));
                    return Err(JournalError::Foreign { path, found, identity: identity_path, expected });
                }
                (contents, false)
            }
        };

        let written = |file: File| -> Box<dyn Disk> { Box::new(file) };
        let file = if unwritten { private::put(&path, &contents.file()) } else { private::open(&path) };
        let Contents { id, first, slots, taken, entries } = contents;
        let file = file.map(written).map_err(failed("write the journal", &path))?;
        let entries = Arc::new(Mutex::new(entries));
        let mut store =
            Self { path, file, id, first, slots, taken, tidy_at: slots / 2, entries, synced, _lock: lock };
        let mut renamed = unwritten;
        if !unwritten && store.is_untidy() {
            renamed |= store.tidy();
        }
        if renamed {
            store.settle().map_err(failed("make durable the directory", directory))?;
        }
        if identity.is_none() {
            let noted = private::put(&identity_path, &format::identity(&id)).and_then(|_| store.settle());
            match noted {
                Ok(()) => {}
                Err(source) if unwritten => {
                    return Err(JournalError::Io { doing: "write", path: identity_path, source });
                }
                Err(error) => {
                    warn!(path = %identity_path.display(), %error, "cannot note that there is a journal: \
                        should it vanish, that would go unnoticed; this is tried again at the next start");
                }
            }
        }
        Ok(store)
    }

    /// Makes `record` durable as the newest of the migration, or with `None` that the migration is over.
    ///
    /// # Errors
    ///
    /// Fails if the disk is full or broken. A restarted daemon then does not find the record.
    pub(super) fn append(&mut self, entry: &Entry, record: Option<Record>) -> Result<(), JournalError> {
        if self.taken == self.slots {
            self.rewrite().map_err(failed("make room in the journal", &self.path))?;
            self.settle().unwrap_or_else(|failure| self.give_up(&failure));
        }
        let (sequence, at) = (self.first.wrapping_add(self.taken), self.taken * SLOT as u64);
        let bytes = format::record(&self.id, sequence, Line::new(entry, record));
        if let Err(source) = self.make_durable(&bytes, at) {
            // It may have been written in part, or as a whole and yet not be durable.
            let free = format::free(&self.id, sequence);
            self.make_durable(&free, at).unwrap_or_else(|failure| self.give_up(&failure));
            return Err(JournalError::Io { doing: "write to the journal", path: self.path.clone(), source });
        }
        self.taken += 1;
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        match record {
            Some(record) => entries.insert(entry.key(), Entry { record, ..entry.clone() }),
            None => entries.remove(&entry.key()),
        };
        Ok(())
    }

    /// Tells whether most of the file is of migrations that are over, and there is much of it.
    pub(super) fn is_untidy(&self) -> bool {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner).len() as u64;
        self.taken >= self.tidy_at && entries * 4 <= self.taken
    }

    /// Writes the file anew without what is over. If that fails, the old file is used until it is full.
    pub(super) fn tidy_up(&mut self) {
        if self.tidy() {
            self.settle().unwrap_or_else(|failure| self.give_up(&failure));
        }
    }

    fn tidy(&mut self) -> bool {
        let rewritten = self.rewrite();
        if let Err(error) = &rewritten {
            let free = self.slots - self.taken;
            warn!(path = %self.path.display(), %error, records_left = free, "cannot write the journal anew without \
                migrations that are over; the old one goes on");
            self.tidy_at = self.taken + self.slots / 8;
        }
        rewritten.is_ok()
    }

    /// Puts a file without what is over in the place of this one. [`Store::settle`] must be called next. After an error
    /// everything is as before.
    fn rewrite(&mut self) -> io::Result<()> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let first = self.first.wrapping_add(self.taken);
        let slots = slots_for(entries.len());
        let file = private::put(&self.path, &format::file(&self.id, first, slots, entries.values()))?;
        (self.file, self.first, self.slots) = (Box::new(file), first, slots);
        (self.taken, self.tidy_at) = (1 + entries.len() as u64, slots / 2);
        Ok(())
    }

    /// Makes durable which file is the journal.
    fn settle(&self) -> io::Result<()> {
        private::sync_directory(self.path.parent().unwrap_or(Path::new(".")))
    }

    fn make_durable(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file.write(bytes, at)?;
        let started = Instant::now();
        self.file.sync()?;
        (self.synced)(started.elapsed());
        Ok(())
    }

    /// Ends the daemon: what a restart would find is unknown, so nothing may be done on the strength of it. A restart
    /// finds out.
    fn give_up(&self, failure: &io::Error) -> ! {
        error!(path = %self.path.display(), %failure, "cannot tell what the journal holds after a failed write");
        super::abort()
    }
}

/// Returns a journal that is not in a file yet.
fn fresh(entries: BTreeMap<Key, Entry>) -> Contents {
    let (slots, taken) = (slots_for(entries.len()), 1 + entries.len() as u64);
    Contents { id: ids::random(), first: 1, slots, taken, entries }
}

fn slots_for(entries: usize) -> u64 {
    SLOTS.max((entries as u64 * 4).next_power_of_two())
}

/// Locks `directory` against other daemons until the file that is returned is closed.
fn lock(directory: &Path) -> Result<File, JournalError> {
    let path = directory.join(LOCK);
    let file = private::open(&path).map_err(failed("open", &path))?;
    let begun = Instant::now();
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            // A program that a daemon was about to run when it was killed has the lock until it really runs.
            Err(Errno::WOULDBLOCK) if begun.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(LOCK_PATIENCE / 50)
            }
            Err(Errno::WOULDBLOCK) => return Err(JournalError::InUse { directory: directory.to_owned() }),
            Err(error) => return Err(failed("lock", &path)(error.into())),
        }
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, JournalError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError + use<> {
    let path = path.to_owned();
    move |source| JournalError::Io { doing, path, source }
}

fn explain(path: &Path, fault: Fault) -> JournalError {
    let path = path.to_owned();
    match fault {
        Fault::Damaged { offset, found } => JournalError::Damaged { path, offset, found },
        Fault::Later(format) => JournalError::Later { path, format, known: format::FORMAT },
    }
}
