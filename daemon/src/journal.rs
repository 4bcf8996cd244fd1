//! What must be remembered across a crash: who was promised which guest.
//!
//! One file, `handover.jsonl`, a JSON line a record, each made durable (`fdatasync`) before the
//! handover goes on. The last line of a migration counts. Lines of migrations that are over
//! are dropped when the daemon starts.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use memlane_protocol::handover::Record;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::MigrationId;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio_uring::fs::{File, OpenOptions};

use crate::hex;

const FILE: &str = "handover.jsonl";

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file cannot be read or written.
    #[error("cannot {doing} the journal {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file holds what no journal holds.
    #[error(
        "{}:{line}: this is no journal entry ({why}); guests may be in doubt, so the daemon does not \
         start: move the file away only when you know where each guest runs",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
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
    /// How far the handover came on this host.
    pub record: Record,
}

/// The journal of this host.
pub struct Journal {
    path: PathBuf,
    file: Rc<File>,
    end: Cell<u64>,
    /// Entries must reach the disk in the order in which they were made.
    writing: Mutex<()>,
}

#[derive(Serialize, Deserialize)]
struct Line {
    migration: String,
    guest: String,
    peer: String,
    /// `None`: forget the migration.
    record: Option<String>,
}

impl Journal {
    /// Opens the journal in `directory`, and tells which migrations were under way.
    pub async fn open(directory: &Path) -> Result<(Self, Vec<Entry>), JournalError> {
        let path = directory.join(FILE);
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| JournalError::Io { doing, path, source }
        };
        std::fs::create_dir_all(directory).map_err(failed("create the directory of", directory))?;
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let open = parse(&path, &text)?;

        // Written anew beside the old one and put in its place, so that a crash leaves either.
        let fresh = directory.join("handover.jsonl.new");
        let mut bytes = Vec::new();
        for entry in &open {
            bytes.extend(line(entry, Some(entry.record)));
        }
        let end = bytes.len() as u64;
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).open(&fresh).await;
        let file = file.map_err(failed("write", &fresh))?;
        file.write_all_at(bytes, 0).await.0.map_err(failed("write", &fresh))?;
        file.sync_all().await.map_err(failed("write", &fresh))?;
        std::fs::rename(&fresh, &path).map_err(failed("replace", &path))?;
        let parent = std::fs::File::open(directory).and_then(|directory| directory.sync_all());
        parent.map_err(failed("make durable the directory of", directory))?;
        let journal = Self { path, file: Rc::new(file), end: Cell::new(end), writing: Mutex::new(()) };
        Ok((journal, open))
    }

    /// Writes `record` durably.
    pub async fn write(&self, entry: &Entry, record: Record) -> Result<(), JournalError> {
        self.append(line(entry, Some(record))).await
    }

    /// Forgets a migration that is over.
    pub async fn forget(&self, entry: &Entry) -> Result<(), JournalError> {
        self.append(line(entry, None)).await
    }

    async fn append(&self, bytes: Vec<u8>) -> Result<(), JournalError> {
        let _in_order = self.writing.lock().await;
        let failed = |source| JournalError::Io { doing: "write to", path: self.path.clone(), source };
        let (at, count) = (self.end.get(), bytes.len() as u64);
        self.file.write_all_at(bytes, at).await.0.map_err(failed)?;
        let started = std::time::Instant::now();
        self.file.sync_data().await.map_err(failed)?;
        crate::metrics::journal_synced(started.elapsed());
        self.end.set(at + count);
        Ok(())
    }
}

fn line(entry: &Entry, record: Option<Record>) -> Vec<u8> {
    let line = Line {
        migration: hex::encode(&entry.migration),
        guest: entry.guest.to_string(),
        peer: entry.peer.to_string(),
        record: record.map(|record| record.to_string()),
    };
    let mut bytes = serde_json::to_vec(&line).expect("strings always become JSON");
    bytes.push(b'\n');
    bytes
}

/// The entries of migrations that are not over. A last line without its end was never
/// durable, so nothing was done on the strength of it.
fn parse(path: &Path, text: &str) -> Result<Vec<Entry>, JournalError> {
    let mut open = BTreeMap::new();
    for (index, text) in text.split_inclusive('\n').enumerate() {
        if !text.ends_with('\n') {
            break;
        }
        let damaged = |why: String| JournalError::Damaged { path: path.to_owned(), line: index + 1, why };
        let line: Line = serde_json::from_str(text).map_err(|error| damaged(error.to_string()))?;
        let migration = hex::decode(&line.migration)
            .ok_or_else(|| damaged(format!("`{}` names no migration", line.migration)))?;
        let Some(record) = line.record else {
            open.remove(&migration);
            continue;
        };
        let entry = Entry {
            migration,
            guest: line.guest.parse().map_err(|error| damaged(format!("{error}")))?,
            peer: line.peer.parse().map_err(|error| damaged(format!("{error}")))?,
            record: record.parse().map_err(|error| damaged(format!("{error}")))?,
        };
        open.insert(migration, entry);
    }
    Ok(open.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u8, record: Record) -> Entry {
        let label = |name: &str| name.parse().unwrap();
        Entry { migration: [number; 16], guest: label("web1"), peer: label("host-b"), record }
    }

    #[test]
    fn remembers_what_is_not_over() {
        let directory = tempfile::tempdir().unwrap();
        tokio_uring::start(async {
            let (journal, open) = Journal::open(directory.path()).await.unwrap();
            assert!(open.is_empty());
            let (one, two) = (entry(1, Record::Committed), entry(2, Record::Prepared));
            journal.write(&two, Record::Prepared).await.unwrap();
            journal.write(&one, Record::Committed).await.unwrap();
            journal.write(&two, Record::Running).await.unwrap();
            let (journal, open) = Journal::open(directory.path()).await.unwrap();
            assert_eq!(open, [one.clone(), entry(2, Record::Running)]);
            journal.forget(&one).await.unwrap();
            let (_, open) = Journal::open(directory.path()).await.unwrap();
            assert_eq!(open, [entry(2, Record::Running)]);
        });
    }

    #[test]
    fn a_torn_last_line_was_never_promised_and_damage_is_told() {
        let path = Path::new("/journal");
        let whole = String::from_utf8(line(&entry(1, Record::Prepared), Some(Record::Prepared))).unwrap();
        assert_eq!(parse(path, &format!("{whole}{{\"migr")).unwrap().len(), 1);
        for (text, why) in [
            ("nonsense\n".to_owned(), ":1: this is no journal entry"),
            (format!("{whole}{}", whole.replace("prepared", "perhaps")), ":2: this is no journal entry"),
            (whole.replace("01", "zz"), "names no migration"),
        ] {
            let error = parse(path, &text).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
