//! The journal remembers across a crash which host was promised which guest.
//!
//! A record is made durable (`fdatasync`) before the handover goes on, and the last record of a migration counts. The
//! journal's directory has mode 0700 and holds these files of mode 0600:
//!
//! - `handover.jsonl` holds the records, in a format (`format.rs`) in which every bit is covered by a sum, every record
//!   by a number, and the length by the header.
//! - `handover.id` says that there is a journal, and which one. It is written once the journal is durable.
//! - `lock` is locked by the daemon that uses the journal.
//!
//! # What does not add up
//!
//! The daemon does not start: a promise that is forgotten is a guest that runs on two hosts. Nothing is guessed
//! or repaired, and nothing at the end of the file is an exception:
//!
//! - Records are written over free slots, which have sums and numbers as well. So neither a record that was wiped out, nor
//!   one whose beginning was, nor a file that was cut at a record's end looks like one that was never written. Only
//!   a disk that says to have written and has not can do that.
//! - A slot is a sector of a disk, and lies within a page of memory. A daemon that is killed in the middle of a write leaves the
//!   free slot or the record, and so does a host that loses power, as disks write sectors whole or not at all. Either is right:
//!   no host has acted on that record yet. A last slot that is neither is taken for what it cannot be told from, a
//!   promise that was damaged. It stops the daemon, although it may be the work of a disk that tears sectors.
//! - A record that could not be written is taken back: the free slot is written again. If that fails too, what a restart would
//!   find is unknown, and the daemon aborts.
//!
//! # Room
//!
//! A file never grows. When most of it is of migrations that are over, or all of it is taken, it is written anew beside
//! the old one, and put in its place with its directory synced. While the disk is full, the old one does.
//! All of this is the work of a thread of its own, in the order in which it was asked for, and goes on when no task waits
//! for it any more.
//!
//! [`read`] takes the bytes of a file apart, and [`read_earlier`] those of a file that an earlier version wrote. They change
//! nothing.

mod earlier;
mod entry;
mod error;
mod format;
mod store;

use std::path::Path;
use std::sync::{PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use memlane_protocol::handover::Record;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::MigrationId;
use tokio::sync::oneshot;
use tracing::error;

pub use earlier::read as read_earlier;
pub use entry::{Entry, Key, VmmIdentity};
pub use error::{Fault, JournalError};
pub use format::{Contents, read};
use store::{Entries, Store};

/// The log is written within this time where it can be.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// The journal of this host.
pub struct Journal {
    entries: Entries,
    /// Requests go to the journal's thread. This is `None` only while the journal is being closed.
    requests: Option<mpsc::Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

/// A record that is to be made durable. With `None` the migration is over.
struct Request {
    entry: Entry,
    record: Option<Record>,
    done: oneshot::Sender<Result<(), JournalError>>,
}

impl Journal {
    /// Opens the journal in `directory`. Returns it with the migrations that were under way. The journal's thread calls
    /// `synced` with the time that each write to the disk took.
    ///
    /// # Errors
    ///
    /// Fails if another daemon uses it, or if what is in its files does not add up.
    pub async fn open(
        directory: &Path,
        synced: impl Fn(Duration) + Send + 'static,
    ) -> Result<(Self, Vec<Entry>), JournalError> {
        let directory = directory.to_owned();
        let (opened, answer) = oneshot::channel();
        let (requests, queue) = mpsc::channel();
        let path = directory.clone();
        let work = move || match Store::open(&directory, Box::new(synced)) {
            Ok(store) => {
                let _ = opened.send(Ok(store.entries.clone()));
                keep(store, &queue);
            }
            Err(error) => {
                let _ = opened.send(Err(error));
            }
        };
        let thread = std::thread::Builder::new().name("journal".into()).spawn(work);
        let thread =
            thread.map_err(|source| JournalError::Io { doing: "start a thread for", path, source })?;
        let entries = answer.await.unwrap_or_else(|_| give_up())?;
        let open = entries.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        Ok((Self { entries, requests: Some(requests), thread: Some(thread) }, open))
    }

    /// Returns what is durable of a migration with `peer` that is not over.
    pub fn known(&self, peer: &Label, migration: &MigrationId) -> Option<Entry> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.get(&(peer.clone(), *migration)).cloned()
    }

    /// Tells whether this migration is under way here, with any peer.
    pub fn knows(&self, migration: &MigrationId) -> bool {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.values().any(|entry| entry.migration == *migration)
    }

    /// Makes `record` durable as the newest of the migration. The value of `entry.record` does not matter.
    ///
    /// # Errors
    ///
    /// Fails if the disk is full or broken. A restarted daemon then does not find the record.
    pub async fn write(&self, entry: &Entry, record: Record) -> Result<(), JournalError> {
        self.request(entry, Some(record)).await
    }

    /// Forgets a migration that is over.
    ///
    /// # Errors
    ///
    /// Fails if the disk is full or broken. A restarted daemon then finds the migration.
    pub async fn forget(&self, entry: &Entry) -> Result<(), JournalError> {
        self.request(entry, None).await
    }

    async fn request(&self, entry: &Entry, record: Option<Record>) -> Result<(), JournalError> {
        let (done, answer) = oneshot::channel();
        let request = Request { entry: entry.clone(), record, done };
        let sent = self.requests.as_ref().and_then(|requests| requests.send(request).ok());
        if sent.is_none() {
            give_up();
        }
        answer.await.unwrap_or_else(|_| give_up())
    }
}

impl Drop for Journal {
    /// Lets the requests that were made be done, and unlocks the directory.
    fn drop(&mut self) {
        self.requests.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Does the work of the journal's thread, until the journal is dropped.
fn keep(mut store: Store, queue: &mpsc::Receiver<Request>) {
    while let Ok(Request { entry, record, done }) = queue.recv() {
        let _ = done.send(store.append(&entry, record));
        // When a guest has just been moved, the next record is rarely waited for.
        if record.is_none() && store.is_untidy() {
            store.tidy_up();
        }
    }
}

/// Ends the daemon: whether a record was written is not known, so nothing may be done on the strength of it.
fn give_up() -> ! {
    error!("the thread that writes the journal has ended");
    abort()
}

/// Ends the daemon. The log, which a thread of its own writes, has time to tell why; nobody gets an answer meanwhile.
fn abort() -> ! {
    std::thread::sleep(LAST_WORDS);
    std::process::abort()
}

#[cfg(test)]
mod damage;
#[cfg(test)]
mod tests;
