//! The memory that guests' RAM is made of.

use std::ffi::c_long;
use std::fs;
use std::path::Path;

use rustix::fs::{statfs, statvfs};

use super::{Finding, Host, nearest};
use crate::units;

/// `TMPFS_MAGIC` and `HUGETLBFS_MAGIC` of `linux/magic.h`.
const TMPFS: u64 = 0x0102_1994;
const HUGETLBFS: u64 = 0x9584_58f6;

/// What a file system is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Memory, and swap.
    Tmpfs,
    /// Huge pages that were set aside.
    Hugetlbfs,
    /// A disk, or the network.
    Other,
}

/// Looks at the memory for guests.
pub(super) fn look(host: &Host<'_>) -> Vec<Finding> {
    let directory = nearest(&host.config.guests.memory);
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let enabled = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let kind = kind_of(&directory);
    let size = statvfs(&directory).map_or(0, |found| found.f_blocks * found.f_frsize);
    vec![shared_memory(&directory, kind, size, &info), huge_pages(kind, &info, &enabled)]
}

/// Tells what the file system of a directory is made of.
pub(super) fn kind_of(directory: &Path) -> Kind {
    match statfs(directory).map(|found| c_long::from(found.f_type) as u64) {
        Ok(TMPFS) => Kind::Tmpfs,
        Ok(HUGETLBFS) => Kind::Hugetlbfs,
        _ => Kind::Other,
    }
}

/// Judges the file system for guests' RAM, which has `size` bytes.
fn shared_memory(directory: &Path, kind: Kind, size: u64, info: &str) -> Finding {
    const CHECK: &str = "shared-memory";
    let directory = directory.display();
    let memory = field(info, "MemTotal").unwrap_or(0);
    let found = format!("{directory}: {} of {} memory", units::bytes(size), units::bytes(memory));
    match kind {
        Kind::Other => Finding::missing(
            CHECK,
            format!("{directory} is neither on tmpfs nor on hugetlbfs: RAM of guests cannot lie there"),
            "correct memory of [guests] in the daemon's configuration; its default is /dev/shm/memlane",
        ),
        Kind::Hugetlbfs => Finding::ok(CHECK, format!("{directory} is on hugetlbfs")),
        // RAM of guests is most of a host's memory.
        Kind::Tmpfs if size < memory / 5 * 3 => Finding::advice(
            CHECK,
            format!("{found}: all RAM of QEMU guests must fit in there"),
            "mount -o remount,size=90% /dev/shm, and in /etc/fstab: tmpfs /dev/shm tmpfs size=90% 0 0",
        ),
        Kind::Tmpfs => Finding::ok(CHECK, found),
    }
}

fn huge_pages(kind: Kind, info: &str, enabled: &str) -> Finding {
    const CHECK: &str = "huge-pages";
    let number = |name| field(info, name).unwrap_or(0);
    let (total, free, bytes) = (number("HugePages_Total"), number("HugePages_Free"), number("Hugepagesize"));
    let chosen = enabled.split(['[', ']']).nth(1).unwrap_or("unknown");
    let found = format!(
        "{free} of {total} pages of {} are free; transparent ones for shared memory: {chosen}",
        units::bytes(bytes)
    );
    if kind == Kind::Hugetlbfs && free == 0 {
        return Finding::missing(
            CHECK,
            format!("{found}; RAM of guests is to lie in them"),
            "sysctl -w vm.nr_hugepages=NUMBER, with as many as guests need",
        );
    }
    Finding::ok(CHECK, found)
}

/// Finds a number in `/proc/meminfo`. What is in kB is returned in bytes.
fn field(info: &str, name: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let mut words = line.split_whitespace();
    let number: u64 = words.next()?.parse().ok()?;
    Some(if words.next() == Some("kB") { number.saturating_mul(1024) } else { number })
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    const INFO: &str = "MemTotal:       10000000 kB\nMemFree:  1 kB\nHugePages_Total:       4\n\
                        HugePages_Free:        0\nHugepagesize:       2048 kB\n";

    #[test]
    fn ram_of_guests_fits_or_not() {
        let judge = |kind, size| shared_memory("/dev/shm".as_ref(), kind, size, INFO).status;
        assert_eq!(judge(Kind::Tmpfs, 9_000_000 << 10), Status::Ok);
        assert_eq!(judge(Kind::Tmpfs, 5_000_000 << 10), Status::Advice);
        assert_eq!(judge(Kind::Hugetlbfs, 0), Status::Ok);
        assert_eq!(judge(Kind::Other, 9_000_000 << 10), Status::Missing);
    }

    #[test]
    fn huge_pages_are_free_where_they_are_needed_or_not() {
        let judge = |kind| huge_pages(kind, INFO, "always within_size advise [never] deny force");
        assert_eq!(judge(Kind::Tmpfs).status, Status::Ok);
        assert!(judge(Kind::Tmpfs).found.contains("0 of 4 pages of 2.00 MiB are free"));
        assert!(judge(Kind::Tmpfs).found.ends_with("never"));
        assert!(judge(Kind::Hugetlbfs).remedy.unwrap().contains("vm.nr_hugepages"));
        let free = INFO.replace("HugePages_Free:        0", "HugePages_Free:        4");
        assert_eq!(huge_pages(Kind::Hugetlbfs, &free, "").status, Status::Ok);
    }

    #[test]
    fn file_systems_are_told_apart() {
        assert_eq!(kind_of("/proc".as_ref()), Kind::Other);
        assert_eq!(kind_of("/nonexistent".as_ref()), Kind::Other);
        assert_eq!(field("MemTotal", "MemTotal"), None);
        assert_eq!(field(INFO, "HugePages_Total"), Some(4));
    }
}
