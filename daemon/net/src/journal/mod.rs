//! What must be remembered across a crash: who was promised which guest.
//!
//! A record is made durable (`fdatasync`) before the handover goes on, and the last record of a
//! migration counts. In the journal's directory, mode 0700, lie (mode 0600):
//!
//! - `handover.jsonl`, the records, in a format (`format.rs`) in which every bit is covered by a sum,
//!   every record by a number, and the length by the header;
//! - `handover.id`, which says that there is a journal, and which. It is written once the journal is durable;
//! - `lock`, which is locked by the daemon that uses the journal.
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
//!   nobody has acted on that record yet. A last slot that is neither is taken for what it cannot be told from, a
//!   promise that was damaged. It stops the daemon, although it may be the work of a disk that tears sectors.
//! - A record that could not be written is taken back: the free slot is written again. If that fails too, what a restart would
//!   find is unknown, and the daemon aborts.
//!
//! # Room
//!
//! A file never grows. When most of it is of migrations that are over, or all of it is taken, it is written anew beside
//! the old one, and put in its place with its directory synced. While the disk is full, the old one does.
//! All of this is the work of a thread of its own, in the order in which it was asked for, and goes on when nobody waits for
//! it any more.

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

pub use entry::{Entry, Key, VmmIdentity};
pub use error::JournalError;
use store::{Entries, Store};

/// The journal of this host.
pub struct Journal {
    entries: Entries,
    /// To the journal's thread; `None` only while it is being closed.
    requests: Option<mpsc::Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

/// A record that is to be made durable; `None`: the migration is over.
struct Request {
    entry: Entry,
    record: Option<Record>,
    done: oneshot::Sender<Result<(), JournalError>>,
}

impl Journal {
    /// Opens the journal in `directory`, and tells which migrations were under way. The journal's thread calls
    /// `synced` with the time that each write to the disk took.
    ///
    /// # Errors
    ///
    /// If another daemon uses it, or what is in its files does not add up.
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

    /// What is durable of a migration with `peer` that is not over.
    pub fn known(&self, peer: &Label, migration: &MigrationId) -> Option<Entry> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.get(&(peer.clone(), *migration)).cloned()
    }

    /// Whether this migration is under way here, with whichever peer.
    pub fn knows(&self, migration: &MigrationId) -> bool {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.values().any(|entry| entry.migration == *migration)
    }

    /// Makes `record` durable as the newest of the migration; `entry.record` does not matter.
    /// After an error a restarted daemon does not find it.
    pub async fn write(&self, entry: &Entry, record: Record) -> Result<(), JournalError> {
        self.request(entry, Some(record)).await
    }

    /// Forgets a migration that is over.
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
    /// Lets what was asked for be done, and unlocks the directory.
    fn drop(&mut self) {
        self.requests.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the journal's thread does until nobody needs it.
fn keep(mut store: Store, queue: &mpsc::Receiver<Request>) {
    while let Ok(Request { entry, record, done }) = queue.recv() {
        let _ = done.send(store.append(&entry, record));
        // When a guest has just been moved, hardly anybody waits for the next record.
        if record.is_none() && store.is_untidy() {
            store.tidy_up();
        }
    }
}

/// Whether a record was written is not known, so nothing may be done on the strength of it.
fn give_up() -> ! {
    error!("the thread that writes the journal has ended");
    std::process::abort();
}

#[cfg(test)]
mod damage;
#[cfg(test)]
mod tests;
