//! These tests are about the journal as a whole: what is remembered, and what happens when a disk is full or fails.

use std::fs;
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::format::SLOT;
use super::store::{Disk, FILE, IDENTITY};
use super::*;

pub(super) fn entry(number: u8, record: Record) -> Entry {
    let label = |name: &str| name.parse().unwrap();
    let vmm = VmmIdentity { pid: 4711, started: 1 << 40 };
    let (guest, peer) = (label("web1"), label("host-b"));
    Entry { migration: [number; 16], guest, peer, vmm, shape: 0, record, fetching: false }
}

/// Returns what a daemon that starts finds, or why it does not start.
fn found(directory: &Path) -> Result<Vec<Entry>, JournalError> {
    tokio_uring::start(async { Journal::open(directory, |_| ()).await.map(|(_, open)| open) })
}

/// Returns the entries of a store.
fn entries(store: &Store) -> Vec<Entry> {
    store.entries.lock().unwrap().values().cloned().collect()
}

#[test]
fn remembers_what_is_not_over() {
    let directory = tempfile::tempdir().unwrap();
    tokio_uring::start(async {
        let (journal, open) = Journal::open(directory.path(), |_| ()).await.unwrap();
        assert!(open.is_empty());
        let (one, two) = (entry(1, Record::Committed), entry(2, Record::Prepared));
        journal.write(&two, Record::Prepared).await.unwrap();
        journal.write(&one, Record::Committed).await.unwrap();
        journal.write(&two, Record::Running).await.unwrap();
        assert_eq!(journal.known(&two.peer, &two.migration), Some(entry(2, Record::Running)));
        drop(journal);
        let (journal, open) = Journal::open(directory.path(), |_| ()).await.unwrap();
        assert_eq!(open, [one.clone(), entry(2, Record::Running)]);
        assert_eq!(journal.known(&one.peer, &one.migration), Some(one.clone()));
        journal.forget(&one).await.unwrap();
        assert_eq!(journal.known(&one.peer, &one.migration), None);
    });
    assert_eq!(found(directory.path()).unwrap(), [entry(2, Record::Running)]);
}

#[test]
fn another_peers_migration_of_the_same_identity_is_another() {
    let directory = tempfile::tempdir().unwrap();
    let one = entry(1, Record::Committed);
    tokio_uring::start(async {
        let (journal, _) = Journal::open(directory.path(), |_| ()).await.unwrap();
        let other = Entry { peer: "host-c".parse().unwrap(), ..entry(1, Record::Prepared) };
        journal.write(&one, Record::Committed).await.unwrap();
        journal.write(&other, Record::Prepared).await.unwrap();
        assert_eq!(journal.known(&one.peer, &one.migration), Some(one.clone()));
        journal.forget(&other).await.unwrap();
    });
    assert_eq!(found(directory.path()).unwrap(), [one]);
}

#[test]
fn a_second_daemon_is_kept_out() {
    let directory = tempfile::tempdir().unwrap();
    tokio_uring::start(async {
        let (journal, _) = Journal::open(directory.path(), |_| ()).await.unwrap();
        let error = Journal::open(directory.path(), |_| ()).await.map(drop).unwrap_err().to_string();
        assert!(error.contains("another memlaned uses"), "{error}");
        drop(journal);
        Journal::open(directory.path(), |_| ()).await.map(drop).unwrap();
    });
}

#[test]
fn a_record_is_written_even_if_nobody_waits_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let (one, two) = (entry(1, Record::Committed), entry(2, Record::Prepared));
    tokio_uring::start(async {
        let (journal, _) = Journal::open(directory.path(), |_| ()).await.unwrap();
        let nobody = tokio::time::timeout(std::time::Duration::ZERO, journal.write(&one, Record::Committed));
        let _ = nobody.await;
        journal.write(&two, Record::Prepared).await.unwrap();
    });
    assert_eq!(found(directory.path()).unwrap(), [one, two]);
}

#[test]
fn what_is_over_is_dropped_while_it_is_written_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE);
    let held = entry(0, Record::Committed);
    tokio_uring::start(async {
        let (journal, _) = Journal::open(directory.path(), |_| ()).await.unwrap();
        let journal = std::rc::Rc::new(journal);
        journal.write(&held, Record::Committed).await.unwrap();
        let first = fs::File::open(&path).unwrap();
        let length = first.metadata().unwrap().len();
        let move_many = |guest: u8| {
            let journal = journal.clone();
            tokio::task::spawn_local(async move {
                for _ in 0..60 {
                    let one = entry(guest, Record::Prepared);
                    journal.write(&one, Record::Prepared).await.unwrap();
                    journal.write(&one, Record::Running).await.unwrap();
                    let known = journal.known(&one.peer, &one.migration).unwrap();
                    assert_eq!(known.record, Record::Running);
                    journal.forget(&one).await.unwrap();
                }
                journal.write(&entry(guest, Record::Prepared), Record::Prepared).await.unwrap();
            })
        };
        for moved in [move_many(1), move_many(2), move_many(3)] {
            moved.await.unwrap();
        }
        let now = fs::metadata(&path).unwrap();
        assert_eq!(now.len(), length);
        assert_eq!(first.metadata().unwrap().nlink(), 0, "it was never written anew");
        assert_eq!(now.mode() & 0o7777, 0o600);
    });
    let prepared = |number| entry(number, Record::Prepared);
    assert_eq!(found(directory.path()).unwrap(), [held, prepared(1), prepared(2), prepared(3)]);
}

/// So many entries need a longer file.
#[test]
fn entries_beyond_the_slots_of_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let all: Vec<Entry> = (0..=255).map(|number| entry(number, Record::Prepared)).collect();
    let mut store = Store::open(directory.path(), Box::new(|_| ())).unwrap();
    for entry in &all {
        store.append(entry, Some(Record::Prepared)).unwrap();
    }
    drop(store);
    let store = Store::open(directory.path(), Box::new(|_| ())).unwrap();
    assert_eq!(entries(&store), all);
    assert_eq!(fs::metadata(&store.path).unwrap().len(), store.slots * SLOT as u64);
}

/// The disk is full as far as the journal is concerned: it cannot be written anew.
#[test]
fn the_old_file_does_while_there_can_be_no_new_one() {
    let directory = tempfile::tempdir().unwrap();
    let in_the_way = crate::private::beside(&directory.path().join(FILE));
    let (held, other) = (entry(1, Record::Committed), entry(2, Record::Prepared));
    let mut store = Store::open(directory.path(), Box::new(|_| ())).unwrap();
    store.append(&held, Some(Record::Committed)).unwrap();
    fs::create_dir(&in_the_way).unwrap();
    while store.taken < store.slots - 4 {
        store.append(&other, Some(Record::Prepared)).unwrap();
        store.append(&other, None).unwrap();
        if store.is_untidy() {
            store.tidy_up();
        }
    }
    drop(store);
    // It starts as well, although there is reason to write it anew.
    let mut store = Store::open(directory.path(), Box::new(|_| ())).unwrap();
    assert_eq!(entries(&store), std::slice::from_ref(&held));
    while store.taken < store.slots {
        store.append(&other, Some(Record::Prepared)).unwrap();
    }
    let error = store.append(&other, Some(Record::Running)).unwrap_err().to_string();
    assert!(error.contains("make room in the journal"), "{error}");
    assert_eq!(entries(&store), [held.clone(), other.clone()]);
    drop(store);
    let mut store = Store::open(directory.path(), Box::new(|_| ())).unwrap();
    fs::remove_dir(&in_the_way).unwrap();
    store.append(&held, None).unwrap();
    assert!(store.taken < 10, "{}", store.taken);
    drop(store);
    assert_eq!(found(directory.path()).unwrap(), [other]);
}

/// A disk that tears the next write, or fails to make it durable.
struct Failing {
    file: fs::File,
    torn: Arc<AtomicU32>,
    unsynced: Arc<AtomicU32>,
}

fn comes_up(times: &AtomicU32) -> bool {
    times.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

impl Disk for Failing {
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        if comes_up(&self.torn) {
            self.file.write_all_at(&bytes[..SLOT / 3], at)?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_all_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        if comes_up(&self.unsynced) { Err(io::Error::other("no disk")) } else { self.file.sync_data() }
    }
}

#[test]
fn a_failed_write_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::open(directory.path(), Box::new(|_| ())).unwrap();
    let one = entry(1, Record::Committed);
    store.append(&one, Some(Record::Committed)).unwrap();
    let file = fs::File::options().read(true).write(true).open(&store.path).unwrap();
    let (torn, unsynced) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    store.file = Box::new(Failing { file, torn: torn.clone(), unsynced: unsynced.clone() });
    let before = fs::read(&store.path).unwrap();
    for fails in [&torn, &unsynced] {
        for record in [Some(Record::Finished), None] {
            fails.store(1, Ordering::Relaxed);
            let error = store.append(&one, record).unwrap_err().to_string();
            assert!(error.contains("cannot write to the journal"), "{error}");
            assert_eq!(entries(&store), std::slice::from_ref(&one));
            assert_eq!(fs::read(&store.path).unwrap(), before);
        }
    }
    store.append(&one, Some(Record::Finished)).unwrap();
    drop(store);
    assert_eq!(found(directory.path()).unwrap(), [entry(1, Record::Finished)]);
}

const WRITE_TO: &str = "MEMLANE_TEST_JOURNAL";

/// This is the child of the test below, which the environment tells where to write. It counts in the journal, and
/// prints what is durable.
#[test]
fn counts_until_it_is_killed() {
    let Some(directory) = std::env::var_os(WRITE_TO) else { return };
    let mut store = Store::open(Path::new(&directory), Box::new(|_| ())).unwrap();
    let mut counter = entries(&store).first().map_or(entry(1, Record::Committed), Entry::clone);
    let other = entry(2, Record::Prepared);
    loop {
        counter.vmm.started += 1;
        store.append(&counter, Some(Record::Committed)).unwrap();
        println!("durable {}", counter.vmm.started);
        store.append(&other, Some(Record::Prepared)).unwrap();
        store.append(&other, None).unwrap();
        if store.is_untidy() {
            store.tidy_up();
        }
    }
}

/// A process that is killed in the middle of a write, or of writing the file anew, can be started again, and knows all that was
/// durable.
#[test]
fn a_daemon_that_is_killed_starts_again() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..40 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "journal::tests::counts_until_it_is_killed"])
            .env(WRITE_TO, directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let durable = |line: String| line.strip_prefix("durable ").map(|count| count.parse::<u64>().unwrap());
        let mut last = lines.by_ref().find_map(durable).unwrap();
        std::thread::sleep(Duration::from_micros(round * 1777));
        child.kill().unwrap();
        child.wait().unwrap();
        last = lines.filter_map(durable).last().unwrap_or(last);
        let counter = &found(directory.path()).unwrap()[0];
        let counted = counter.vmm.started;
        assert!(counted == last || counted == last + 1, "{last} was durable, and {counted} was found");
    }
    let numbered = fs::read(directory.path().join(FILE)).unwrap();
    assert!(format::read(&numbered).unwrap().first > 1, "it was never written anew");
}

/// Makes a directory with a journal that holds one entry. Returns its files.
fn journal() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::open(directory.path(), Box::new(|_| ())).unwrap();
    store.append(&entry(1, Record::Committed), Some(Record::Committed)).unwrap();
    let (path, identity) = (directory.path().join(FILE), directory.path().join(IDENTITY));
    (directory, path, identity)
}

#[test]
fn a_daemon_does_not_start_without_the_journal_that_was_there() {
    let (directory, path, identity) = journal();
    let whole = fs::read(&path).unwrap();
    let refused = |what: &[&str]| {
        let error = found(directory.path()).unwrap_err().to_string();
        let to_do = ["Put the file back", "memlanectl status", path.to_str().unwrap()];
        for what in what.iter().chain(&to_do) {
            assert!(error.contains(what), "{what:?} is not said: {error}");
        }
    };

    fs::remove_file(&path).unwrap();
    refused(&["is missing", "handover.id"]);

    let (_other, foreign, _) = journal();
    fs::copy(foreign, &path).unwrap();
    refused(&["is another one", "byte 0", "handover.id"]);

    // What an earlier version wrote is not believed where there has been a journal with sums.
    for text in [&b""[..], &[0; 4096], b"{\"migration\":\"01\"}\n"] {
        fs::write(&path, text).unwrap();
        let offset = if text.len() < SLOT { text.len() } else { 0 };
        refused(&[&format!("is damaged at byte {offset}:")]);
    }

    let mut damaged = whole.clone();
    damaged[SLOT] = 0;
    fs::write(&path, &damaged).unwrap();
    refused(&["is damaged at byte 512:", "sum is wrong", "committed"]);

    // The promise is gone as if it had never been made.
    damaged[SLOT..2 * SLOT].fill(0);
    fs::write(&path, &damaged).unwrap();
    refused(&["is damaged at byte 512:"]);

    fs::write(&path, &whole[..2 * SLOT]).unwrap();
    refused(&["is damaged at byte 1024:", "the file ends here"]);

    fs::write(&path, &whole).unwrap();
    assert_eq!(found(directory.path()).unwrap(), [entry(1, Record::Committed)]);

    // Its name was not written before a crash, and is now.
    fs::remove_file(&identity).unwrap();
    assert_eq!(found(directory.path()).unwrap(), [entry(1, Record::Committed)]);
    let name = fs::read(&identity).unwrap();
    for bit in 0..name.len() * 8 {
        let mut name = name.clone();
        name[bit / 8] ^= 1 << (bit % 8);
        fs::write(&identity, name).unwrap();
        let error = Store::open(directory.path(), Box::new(|_| ())).map(drop).unwrap_err().to_string();
        assert!(error.contains("handover.id is damaged at byte 0"), "{error}");
    }
    for cut in 0..name.len() {
        fs::write(&identity, &name[..cut]).unwrap();
        assert!(Store::open(directory.path(), Box::new(|_| ())).is_err());
    }
}

#[test]
fn a_journal_of_a_later_version_is_left_alone() {
    let (directory, path, _) = journal();
    let later = fs::read(&path).unwrap();
    let text = String::from_utf8(later[..SLOT].to_vec()).unwrap().replace("\"format\":2", "\"format\":3");
    let id = format::read(&later).unwrap().id;
    let sum = crc32c::crc32c_append(crc32c::crc32c(&id), &text.as_bytes()[16..]);
    let text = format!("{{\"sum\":\"{sum:08x}{}", &text[16..]);
    fs::write(&path, [text.as_bytes(), &later[SLOT..]].concat()).unwrap();
    let error = found(directory.path()).unwrap_err().to_string();
    assert!(error.contains("has format 3") && error.contains("up to 2"), "{error}");
}

#[test]
fn an_earlier_versions_journal_is_read_once() {
    const COMMITTED: &str = "{\"migration\":\"01010101010101010101010101010101\",\"guest\":\"web1\",\"peer\":\"host-b\",\
        \"pid\":4711,\"started\":1099511627776,\"fetching\":false,\"record\":\"committed\"}\n";
    let over = COMMITTED.replace("0101", "0202").replace("\"committed\"", "null");
    let oldest = COMMITTED.replace("\"pid\":4711,\"started\":1099511627776,\"fetching\":false,", "");
    let nuls = "\0".repeat(4096);
    let directory = tempfile::tempdir().unwrap();
    let (path, identity) = (directory.path().join(FILE), directory.path().join(IDENTITY));

    let committed = entry(1, Record::Committed);
    let unnamed = Entry { vmm: VmmIdentity::default(), ..committed.clone() };
    for (text, holds) in [
        (format!("{COMMITTED}{over}{nuls}"), vec![committed.clone()]),
        (format!("{COMMITTED}{over}"), vec![committed.clone()]),
        (oldest, vec![unnamed]),
        (nuls.clone(), vec![]),
    ] {
        fs::write(&path, &text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(found(directory.path()).unwrap(), holds, "{text:?}");
        let written = fs::read(&path).unwrap();
        assert!(format::read(&written).is_ok());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(found(directory.path()).unwrap(), holds);
        assert_eq!(fs::read(&path).unwrap(), written, "it is not written anew without need");
        fs::remove_file(&identity).unwrap();
    }

    // It has no sums, so a line that is not whole may have been a promise.
    let end = COMMITTED.len();
    let after = |text: &str, offset: usize| (format!("{COMMITTED}{text}"), offset);
    for (text, offset) in [
        after("{\"migr", end),
        after(&format!("{{\"migr{nuls}"), end),
        after(&format!("{nuls}{COMMITTED}"), end + nuls.len()),
        after(&COMMITTED.replace("committed", "perhaps"), end),
        (COMMITTED.replace("01", "zz"), 0),
        (format!("\0{}", &COMMITTED[1..]), 1),
        (String::new(), 0),
        after(&COMMITTED.replace("0101", &"0101".repeat(1000)), end),
        after(&COMMITTED.replace("4711", &format!("\"{}\"", "4711".repeat(1000))), end),
    ] {
        fs::write(&path, &text).unwrap();
        let error = found(directory.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("is damaged at byte {offset}:")), "{text:?}: {error}");
        assert!(error.len() < 1000, "{error}");
        assert_eq!(fs::read(&path).unwrap(), text.as_bytes(), "it is left as it is");
        assert!(!identity.exists());
    }
}
