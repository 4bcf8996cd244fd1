//! The disk of the journal.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::statvfs;

use super::memory::{Kind, kind_of};
use super::{Finding, Host, nearest};
use crate::units;

/// The journal is a few records for each guest that moves.
const NEEDED_BYTES: u64 = 16 << 20;
/// A pause waits for the disk two times, and should have room for more.
const SLOW: Duration = Duration::from_millis(50);

/// Looks at the disk.
pub(super) fn look(host: &Host<'_>) -> Vec<Finding> {
    let directory = nearest(&host.config.journal);
    let free = statvfs(&directory).map_or(0, |found| found.f_bavail * found.f_frsize);
    vec![
        journal(&host.config.journal, kind_of(&directory), free),
        sync_time(&directory, time_of_sync(&directory).map_err(|error| error.to_string())),
    ]
}

fn journal(directory: &Path, kind: Kind, free: u64) -> Finding {
    const CHECK: &str = "journal";
    let name = directory.display();
    if kind != Kind::Other {
        return Finding::missing(
            CHECK,
            format!("{name} is in memory: a host that crashes forgets whose its guests are"),
            "name a directory on a disk as journal in the daemon's configuration",
        );
    }
    let found = format!("{name}: {} free", units::bytes(free));
    match free < NEEDED_BYTES {
        true => Finding::missing(
            CHECK,
            format!("{found}: a guest whose record cannot be written stands still"),
            format!("make room on the disk of {name}: df -h {name}"),
        ),
        false => Finding::ok(CHECK, found),
    }
}

fn sync_time(directory: &Path, taken: Result<Duration, String>) -> Finding {
    const CHECK: &str = "journal-sync";
    let name = directory.display();
    match taken {
        Err(error) => {
            let found = format!("not measured: this user cannot write to {name} ({error})");
            Finding::advice(CHECK, found, "sudo memlanectl doctor")
        }
        Ok(taken) if taken > SLOW => Finding::advice(
            CHECK,
            format!(
                "writing to the disk of {name} took {}, and each pause waits for that twice",
                units::seconds(taken.as_secs_f64())
            ),
            "put the journal on a faster disk: journal in the daemon's configuration",
        ),
        Ok(taken) => {
            let taken = units::seconds(taken.as_secs_f64());
            Finding::ok(CHECK, format!("writing to the disk of {name} took {taken}"))
        }
    }
}

/// Writes a block to a file without a name, and waits until the disk has it.
fn time_of_sync(directory: &Path) -> io::Result<Duration> {
    let mut file = tempfile::tempfile_in(directory)?;
    file.write_all(&[0; 4096])?;
    let begun = Instant::now();
    file.sync_all()?;
    Ok(begun.elapsed())
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn the_journal_is_on_a_disk_with_room_or_not() {
        let judge = |kind, free| journal("/var/lib/memlane".as_ref(), kind, free).status;
        assert_eq!(judge(Kind::Other, 1 << 30), Status::Ok);
        assert_eq!(judge(Kind::Other, 1 << 20), Status::Missing);
        assert_eq!(judge(Kind::Tmpfs, 1 << 30), Status::Missing);
    }

    #[test]
    fn the_disk_is_fast_or_slow_or_was_not_tried() {
        let judge = |taken| sync_time("/var/lib".as_ref(), taken).status;
        assert_eq!(judge(Ok(Duration::from_millis(2))), Status::Ok);
        assert_eq!(judge(Ok(Duration::from_millis(80))), Status::Advice);
        assert_eq!(judge(Err("denied".into())), Status::Advice);
    }

    #[test]
    fn a_measurement_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        time_of_sync(directory.path()).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(time_of_sync(&directory.path().join("absent")).is_err());
    }
}
