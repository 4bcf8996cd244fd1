//! This module finds out whether a guest's memory fits where it is to come to: into this host's memory, into the file
//! system that it lies in, and into what the control groups of the daemon may use. The daemon's lanes write it first, so
//! it is the daemon's control group that is charged.

use std::fs;
use std::path::{Path, PathBuf};

use memlane_kvm::descriptors;
use memlane_kvm::ram::GuestRam;

/// The control groups of this host.
const GROUPS: &str = "/sys/fs/cgroup";

/// A place that has less room than a guest needs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoRoom {
    /// The host has not enough memory.
    #[error(
        "the guest needs {} MiB more than its VMM holds, {} MiB are available, and {} MiB of them are to stay free; free \
         memory there, or lower limits.memory_reserve",
        mib(*wanted), mib(*available), mib(*reserve)
    )]
    Host {
        /// The guest needs so many bytes more.
        wanted: u64,
        /// The kernel thinks that so many can be used.
        available: u64,
        /// So many are to stay free.
        reserve: u64,
    },
    /// The file system that the guest's memory lies in has not enough.
    #[error(
        "the guest needs {} MiB more than its VMM holds, and the file system of its memory has {} MiB free; give it more \
         (mount -o remount,size=), or free what lies there",
        mib(*wanted), mib(*free)
    )]
    FileSystem {
        /// The guest needs so many bytes more.
        wanted: u64,
        /// So many are free.
        free: u64,
    },
    /// The daemon may not open enough files.
    #[error(
        "a move takes up to {wanted} file descriptors of the daemon, and it may open {left} more; raise LimitNOFILE= of its \
         unit, or `ulimit -n`"
    )]
    Descriptors {
        /// A move may take so many.
        wanted: u64,
        /// So many more may be opened.
        left: u64,
    },
    /// A control group of the daemon may not use enough.
    #[error(
        "the guest needs {} MiB more than its VMM holds, and the daemon's control group {} may use {} MiB more; raise its \
         memory.max (MemoryMax= of its unit)",
        mib(*wanted), group.display(), mib(*free)
    )]
    Group {
        /// The guest needs so many bytes more.
        wanted: u64,
        /// This is the control group.
        group: PathBuf,
        /// It may use so many more.
        free: u64,
    },
}

/// Looks for a place that has less room than `wanted` bytes. It may block, as file systems may.
pub(super) fn lacking(ram: &GuestRam, wanted: u64, reserve: u64) -> Option<NoRoom> {
    if wanted == 0 {
        return None;
    }
    if let Some(available) =
        available_memory().filter(|available| *available < wanted.saturating_add(reserve))
    {
        return Some(NoRoom::Host { wanted, available, reserve });
    }
    if let Some(free) = free_in_file_systems(ram).filter(|free| *free < wanted) {
        return Some(NoRoom::FileSystem { wanted, free });
    }
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let (group, free) = tightest(Path::new(GROUPS), own.lines().find_map(|line| line.strip_prefix("0::"))?)?;
    (free < wanted).then_some(NoRoom::Group { wanted, group, free })
}

/// Tells whether this daemon may open enough files for one more move, over so many lanes. It may block.
pub(super) fn lacking_descriptors(lanes: u64) -> Option<NoRoom> {
    /// A VMM, its memory, timers and connections to other hosts take fewer.
    const BESIDES: u64 = 32;
    // Each lane has a socket, an eventfd, a ring and a pipe.
    let wanted = BESIDES + 8 * lanes;
    // What cannot be counted is not refused.
    let left = descriptors::left().unwrap_or(u64::MAX);
    (left < wanted).then_some(NoRoom::Descriptors { wanted, left })
}

/// Returns how many bytes the kernel thinks can be used without swapping (`MemAvailable`), if it says so.
pub fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib << 10)
}

/// Returns how many bytes are free in the fullest file system of the guest's memory, if one is bounded.
fn free_in_file_systems(ram: &GuestRam) -> Option<u64> {
    let systems = ram.descriptors().into_iter().filter_map(|file| rustix::fs::fstatfs(file).ok());
    // A memfd lies in a tmpfs without bounds.
    let bounded = systems.filter(|system| system.f_blocks > 0);
    bounded.map(|system| system.f_bavail.saturating_mul(system.f_bsize as u64)).min()
}

/// Returns the control group, among that of `path` and those above it, that may use the least more, and how much.
fn tightest(root: &Path, path: &str) -> Option<(PathBuf, u64)> {
    let number = |file: PathBuf| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let groups = Path::new(path.trim_start_matches('/')).ancestors();
    let free = groups.filter_map(|group| {
        let directory = root.join(group);
        // Without a bound it says "max".
        let (most, used) = (number(directory.join("memory.max"))?, number(directory.join("memory.current"))?);
        let stat = fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
        Some((Path::new("/").join(group), most.saturating_sub(used.saturating_sub(cached(&stat)))))
    });
    free.min_by_key(|(_, free)| *free)
}

/// Returns how much of what a control group uses is cached files, which make way.
fn cached(stat: &str) -> u64 {
    let fields = stat.lines().filter_map(|line| line.split_once(' '));
    let files = fields.filter(|(name, _)| matches!(*name, "active_file" | "inactive_file"));
    files.filter_map(|(_, bytes)| bytes.parse::<u64>().ok()).sum()
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_control_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let bound = |group: &str, most: &str, used: &str| {
            let directory = root.path().join(group);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("memory.max"), most).unwrap();
            fs::write(directory.join("memory.current"), used).unwrap();
        };
        bound("system.slice", "5000000\n", "4000000\n");
        bound("system.slice/memlaned.service", "max\n", "7\n");
        let path = "/system.slice/memlaned.service";
        assert_eq!(tightest(root.path(), path), Some(("/system.slice".into(), 1_000_000)));
        bound("system.slice/memlaned.service", "100\n", "700\n");
        assert_eq!(tightest(root.path(), path), Some((path.into(), 0)));
        assert_eq!(tightest(root.path(), "/other"), None);
        assert_eq!(cached("anon 7\ninactive_file 5\nactive_file 6\nshmem 9\n"), 11);
    }

    #[test]
    fn each_place_is_told_with_its_remedy() {
        let wanted = 64 << 20;
        let told = NoRoom::FileSystem { wanted, free: 1 << 20 }.to_string();
        assert!(told.contains("64 MiB") && told.contains("1 MiB free") && told.contains("size="), "{told}");
        let told = NoRoom::Group { wanted, group: "/a".into(), free: 0 }.to_string();
        assert!(told.contains("group /a") && told.contains("memory.max"), "{told}");
    }
}
