//! What must be remembered across a crash: who was promised which guest.
//!
//! One file, `handover.jsonl`, a JSON line a record, each made durable (`fdatasync`) before the
//! handover goes on. The last line of a migration counts. Lines of migrations that are over
//! are dropped when the daemon starts. The lines end at the first NUL: NULs are room that is
//! written in advance, so that a record costs no change of the file's length.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use memlane_protocol::handover::Record;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::MigrationId;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tokio::sync::Mutex;
use tokio_uring::fs::File;
use tracing::error;

mod entry;

use entry::{Change, Line};
pub use entry::{Entry, Key, VmmIdentity};

const FILE: &str = "handover.jsonl";
const LOCK: &str = "lock";
/// The file grows by this many bytes.
const ROOM: u64 = 64 << 10;

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
    /// Another daemon has it open.
    #[error(
        "another memlaned uses the journal in {}; stop it, or configure another `journal`",
        directory.display()
    )]
    InUse {
        /// Where the journal lies.
        directory: PathBuf,
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

/// The journal of this host. Let whatever is begun here finish: a write that nobody waits for
/// any more may or may not have happened.
pub struct Journal {
    path: PathBuf,
    file: File,
    /// The same open file, to be cut off.
    blocking: std::fs::File,
    /// Where the next line goes.
    end: Cell<u64>,
    /// What the file is long.
    room: Cell<u64>,
    /// Migrations that are not over, as the file has them.
    entries: RefCell<BTreeMap<Key, Entry>>,
    /// Entries must reach the disk in the order in which they were made.
    writing: Mutex<()>,
    /// Locked for as long as it is open.
    _lock: std::fs::File,
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
        let lock = lock(directory)?;
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let entries = parse(&path, &text)?;

        // Written anew beside the old one and put in its place, so that a crash leaves either.
        let fresh = directory.join("handover.jsonl.new");
        let mut bytes: Vec<u8> = entries.values().flat_map(|entry| line(entry, Some(entry.record))).collect();
        let end = bytes.len() as u64;
        let room = end + ROOM;
        bytes.resize(room as usize, 0);
        let blocking = std::fs::File::create(&fresh).map_err(failed("write", &fresh))?;
        let file = File::from_std(blocking.try_clone().map_err(failed("write", &fresh))?);
        file.write_all_at(bytes, 0).await.0.map_err(failed("write", &fresh))?;
        file.sync_all().await.map_err(failed("write", &fresh))?;
        std::fs::rename(&fresh, &path).map_err(failed("replace", &path))?;
        let parent = std::fs::File::open(directory).and_then(|directory| directory.sync_all());
        parent.map_err(failed("make durable the directory of", directory))?;
        let open = entries.values().cloned().collect();
        let journal = Self {
            path,
            file,
            blocking,
            end: Cell::new(end),
            room: Cell::new(room),
            entries: entries.into(),
            writing: Mutex::new(()),
            _lock: lock,
        };
        Ok((journal, open))
    }

    /// What is durable of a migration with `peer` that is not over.
    pub fn known(&self, peer: &Label, migration: &MigrationId) -> Option<Entry> {
        self.entries.borrow().get(&(peer.clone(), *migration)).cloned()
    }

    /// Makes `record` durable as the newest of the migration; `entry.record` does not matter.
    /// After an error a restarted daemon does not find it.
    pub async fn write(&self, entry: &Entry, record: Record) -> Result<(), JournalError> {
        let _in_order = self.writing.lock().await;
        self.append(line(entry, Some(record))).await?;
        self.entries.borrow_mut().insert(entry.key(), Entry { record, ..entry.clone() });
        Ok(())
    }

    /// Forgets a migration that is over.
    pub async fn forget(&self, entry: &Entry) -> Result<(), JournalError> {
        let _in_order = self.writing.lock().await;
        self.append(line(entry, None)).await?;
        self.entries.borrow_mut().remove(&entry.key());
        Ok(())
    }

    async fn append(&self, mut bytes: Vec<u8>) -> Result<(), JournalError> {
        let (at, end) = (self.end.get(), self.end.get() + bytes.len() as u64);
        let room = if end > self.room.get() { end + ROOM } else { self.room.get() };
        if room > self.room.get() {
            bytes.resize((room - at) as usize, 0);
        }
        match self.make_durable(bytes, at).await {
            Ok(()) => {
                self.end.set(end);
                self.room.set(room);
                Ok(())
            }
            Err(source) => {
                self.cut_off();
                Err(JournalError::Io { doing: "write to", path: self.path.clone(), source })
            }
        }
    }

    async fn make_durable(&self, bytes: Vec<u8>, at: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, at).await.0?;
        let started = std::time::Instant::now();
        self.file.sync_data().await?;
        crate::metrics::journal_synced(started.elapsed());
        Ok(())
    }

    /// Takes back what a failed write may have left after the last durable line.
    fn cut_off(&self) {
        let end = self.end.get();
        match self.blocking.set_len(end).and_then(|()| self.blocking.sync_all()) {
            Ok(()) => self.room.set(end),
            Err(failure) => {
                // Whether the record is found after a restart is unknown, so neither of its
                // consequences may be acted on. A restart finds out.
                error!(path = %self.path.display(), %failure, "cannot take back a failed write to the journal");
                std::process::abort();
            }
        }
    }
}

/// Locks `directory` against other daemons until the file that is returned is closed.
fn lock(directory: &Path) -> Result<std::fs::File, JournalError> {
    let path = directory.join(LOCK);
    let failed = |source| JournalError::Io { doing: "lock", path: path.clone(), source };
    let options = std::fs::File::options().write(true).create(true).truncate(false).open(&path);
    let file = options.map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(JournalError::InUse { directory: directory.to_owned() }),
        Err(error) => Err(failed(error.into())),
    }
}

fn line(entry: &Entry, record: Option<Record>) -> Vec<u8> {
    let line = Line::new(entry, record);
    let mut bytes = serde_json::to_vec(&line).expect("strings and numbers always become JSON");
    bytes.push(b'\n');
    bytes
}

/// The entries of migrations that are not over. A last line without its end was never
/// durable, so nothing was done on the strength of it.
fn parse(path: &Path, bytes: &[u8]) -> Result<BTreeMap<Key, Entry>, JournalError> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let (text, room) = bytes.split_at(end);
    let mut open = BTreeMap::new();
    let mut lines = 0;
    for text in text.split_inclusive(|byte| *byte == b'\n').filter(|text| text.ends_with(b"\n")) {
        lines += 1;
        let damaged = |why: String| JournalError::Damaged { path: path.to_owned(), line: lines, why };
        let line: Line = serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
        match line.change().map_err(damaged)? {
            Change::Set(entry) => open.insert(entry.key(), entry),
            Change::Forget(key) => open.remove(&key),
        };
    }
    // A crash may leave any part of the line that was being written. The beginning of a line
    // after NULs is none: a line before it is lost.
    if room.contains(&b'{') {
        let why = "it is missing, and there are lines after it".to_owned();
        return Err(JournalError::Damaged { path: path.to_owned(), line: lines + 1, why });
    }
    Ok(open)
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, SealFlags};

    use super::*;

    fn entry(number: u8, record: Record) -> Entry {
        let label = |name: &str| name.parse().unwrap();
        let vmm = VmmIdentity { pid: 4711, started: 1 << 40 };
        let (guest, peer) = (label("web1"), label("host-b"));
        Entry { migration: [number; 16], guest, peer, vmm, record, fetching: false }
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
            assert_eq!(journal.known(&two.peer, &two.migration), Some(entry(2, Record::Running)));
            drop(journal);
            let (journal, open) = Journal::open(directory.path()).await.unwrap();
            assert_eq!(open, [one.clone(), entry(2, Record::Running)]);
            assert_eq!(journal.known(&one.peer, &one.migration), Some(one.clone()));
            journal.forget(&one).await.unwrap();
            assert_eq!(journal.known(&one.peer, &one.migration), None);
            drop(journal);
            let (_, open) = Journal::open(directory.path()).await.unwrap();
            assert_eq!(open, [entry(2, Record::Running)]);
        });
    }

    #[test]
    fn another_peers_migration_of_the_same_identity_is_another() {
        let directory = tempfile::tempdir().unwrap();
        tokio_uring::start(async {
            let (journal, _) = Journal::open(directory.path()).await.unwrap();
            let one = entry(1, Record::Committed);
            let other = Entry { peer: "host-c".parse().unwrap(), ..entry(1, Record::Prepared) };
            journal.write(&one, Record::Committed).await.unwrap();
            journal.write(&other, Record::Prepared).await.unwrap();
            assert_eq!(journal.known(&one.peer, &one.migration), Some(one.clone()));
            journal.forget(&other).await.unwrap();
            drop(journal);
            let (_, open) = Journal::open(directory.path()).await.unwrap();
            assert_eq!(open, [one]);
        });
    }

    #[test]
    fn a_second_daemon_is_kept_out() {
        let directory = tempfile::tempdir().unwrap();
        tokio_uring::start(async {
            let (journal, _) = Journal::open(directory.path()).await.unwrap();
            let error = Journal::open(directory.path()).await.map(drop).unwrap_err().to_string();
            assert!(error.contains("another memlaned uses"), "{error}");
            drop(journal);
            Journal::open(directory.path()).await.map(drop).unwrap();
        });
    }

    #[test]
    fn records_are_kept_beyond_the_room_that_was_made() {
        let directory = tempfile::tempdir().unwrap();
        tokio_uring::start(async {
            let (journal, _) = Journal::open(directory.path()).await.unwrap();
            let length = || std::fs::metadata(directory.path().join(FILE)).unwrap().len();
            assert_eq!(length(), ROOM);
            let one = entry(1, Record::Committed);
            while journal.end.get() <= ROOM {
                journal.write(&one, Record::Committed).await.unwrap();
            }
            journal.write(&one, Record::Finished).await.unwrap();
            assert_eq!(length(), journal.room.get());
            drop(journal);
            let (_, open) = Journal::open(directory.path()).await.unwrap();
            assert_eq!(open, [entry(1, Record::Finished)]);
        });
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        // It cannot grow beyond a page, so the write that crosses its end fails half-way.
        const BYTES: u64 = 4096;
        let memfd = rustix::fs::memfd_create("journal", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&memfd, BYTES).unwrap();
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::GROW).unwrap();
        let blocking = std::fs::File::from(memfd);
        let reader = blocking.try_clone().unwrap();
        let written = || {
            let mut bytes = vec![0; reader.metadata().unwrap().len() as usize];
            std::os::unix::fs::FileExt::read_exact_at(&reader, &mut bytes, 0).unwrap();
            bytes
        };
        tokio_uring::start(async {
            let journal = Journal {
                path: "/journal".into(),
                file: File::from_std(blocking.try_clone().unwrap()),
                _lock: blocking.try_clone().unwrap(),
                blocking,
                end: Cell::new(0),
                room: Cell::new(BYTES),
                entries: RefCell::default(),
                writing: Mutex::new(()),
            };
            let one = entry(1, Record::Committed);
            while journal.write(&one, Record::Committed).await.is_ok() {}
            assert!(journal.end.get() > BYTES / 2);
            assert_eq!(written().len() as u64, journal.end.get());
            assert!(journal.write(&one, Record::Finished).await.is_err());
            assert!(journal.forget(&one).await.is_err());
            assert_eq!(journal.known(&one.peer, &one.migration), Some(one.clone()));
            assert_eq!(
                parse(Path::new("/journal"), &written()).unwrap().into_values().collect::<Vec<_>>(),
                [one]
            );
        });
    }

    #[test]
    fn a_torn_last_line_was_never_promised_and_damage_is_told() {
        let path = Path::new("/journal");
        let whole = String::from_utf8(line(&entry(1, Record::Prepared), Some(Record::Prepared))).unwrap();
        for torn in ["{\"migr", "{\"migr\0\0", "{\"migr\0\0epared\"}\n\0", "\0\0epared\"}\n\0\0"] {
            assert_eq!(parse(path, format!("{whole}{torn}").as_bytes()).unwrap().len(), 1, "{torn:?}");
        }
        let old = whole.replace("\"pid\":4711,\"started\":1099511627776,", "");
        let old = parse(path, old.as_bytes()).unwrap().into_values().next().unwrap();
        assert_eq!(old, Entry { vmm: VmmIdentity::default(), ..entry(1, Record::Prepared) });
        for (text, why) in [
            ("nonsense\n".to_owned(), ":1: this is no journal entry"),
            (format!("{whole}{}", whole.replace("prepared", "perhaps")), ":2: this is no journal entry"),
            (format!("{whole}\0\0\0{whole}"), ":2: this is no journal entry (it is missing"),
            (whole.replace("01", "zz"), "names no migration"),
        ] {
            let error = parse(path, text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
