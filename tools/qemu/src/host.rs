//! Where RAM can lie on this host.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{statfs, statvfs};

use crate::size;
use crate::warning::Warning;

/// The environment variable that names the directory of ordinary RAM.
const RAM_VARIABLE: &str = "MEMLANE_RAM";
const DEFAULT_RAM: &str = "/dev/shm";

// linux/magic.h
const TMPFS: u32 = 0x0102_1994;
const HUGETLBFS: u32 = 0x9584_58f6;

/// What a host offers for RAM.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    /// Ordinary RAM lies in this directory.
    pub ram: PathBuf,
    /// There is room for this many bytes in that directory. This is the reason if there is none at all.
    pub room: Result<u64, &'static str>,
    /// These file systems have huge pages.
    pub hugetlbfs: Vec<HugePages>,
    /// A huge page has this many bytes where nobody says anything else.
    pub huge_page: Option<u64>,
}

/// A file system of huge pages, to which this user may write.
#[derive(Clone, Debug)]
pub(crate) struct HugePages {
    /// It is mounted here.
    pub path: PathBuf,
    /// Its pages have this many bytes.
    pub page_bytes: u64,
}

impl Host {
    /// Looks at this host.
    pub(crate) fn look() -> Self {
        let ram = std::env::var_os(RAM_VARIABLE).map_or_else(|| DEFAULT_RAM.into(), PathBuf::from);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mut hugetlbfs = hugetlbfs(&mounts);
        hugetlbfs.retain(|mount| takes_files(&mount.path));
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self { room: room(&ram), ram, hugetlbfs, huge_page: huge_page(&memory) }
    }

    /// Returns a place for ordinary RAM, and makes the room smaller by it.
    ///
    /// # Errors
    ///
    /// Fails if there is not enough room. `what` is named by the warning.
    pub(crate) fn ordinary(&mut self, what: &str, bytes: u64) -> Result<PathBuf, Warning> {
        let ram = self.ram.display();
        match self.room {
            Err(why) => Err(Warning::new(
                format!("{what} cannot lie in {ram}, which {why}"),
                format!("mount a tmpfs there that QEMU's user can write to, or name one by {RAM_VARIABLE}"),
            )),
            Ok(room) if room < bytes => Err(Warning::new(
                format!(
                    "{what} of {} MiB does not fit into {ram}, where {} MiB are free",
                    bytes >> 20,
                    room >> 20
                ),
                format!("mount -o remount,size=SIZE {ram}, or name a larger tmpfs by {RAM_VARIABLE}"),
            )),
            Ok(room) => {
                self.room = Ok(room - bytes);
                Ok(self.ram.clone())
            }
        }
    }

    /// Returns a place for RAM of huge pages of this many bytes, or of the usual ones.
    ///
    /// # Errors
    ///
    /// Fails if no file system of such pages is mounted. `what` is named by the warning.
    pub(crate) fn huge(&self, what: &str, page_bytes: Option<u64>) -> Result<PathBuf, Warning> {
        let Some(page_bytes) = page_bytes.or(self.huge_page) else {
            return Err(Warning::new(
                format!("{what} wants huge pages, which this kernel does not have"),
                "start it without huge pages",
            ));
        };
        let mount = self.hugetlbfs.iter().find(|mount| mount.page_bytes == page_bytes);
        mount.map(|mount| mount.path.clone()).ok_or_else(|| {
            let kib = page_bytes >> 10;
            Warning::new(
                format!(
                    "{what} wants huge pages of {kib} KiB, of which QEMU's user can write to no hugetlbfs"
                ),
                format!("mount -t hugetlbfs -o pagesize={kib}K,mode=1777 hugetlbfs DIRECTORY"),
            )
        })
    }
}

/// Tells whether QEMU can make a file in a directory. Only a try says so: a profile of AppArmor, under which managers
/// run QEMU and so this program, may forbid what the mode of the directory allows.
fn takes_files(directory: &Path) -> bool {
    // QEMU's own file has such a name, which a profile may allow.
    let file = directory.join(format!("qemu_back_mem.memlane-{}", std::process::id()));
    let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&file);
    made.is_ok() && fs::remove_file(&file).is_ok()
}

/// Returns how many bytes fit into a directory.
fn room(directory: &Path) -> Result<u64, &'static str> {
    if !directory.is_dir() {
        return Err("is no directory");
    }
    let system = statfs(directory).map_err(|_| "cannot be looked at")?;
    // Elsewhere RAM would be written to a disk.
    if !matches!(system.f_type as u32, TMPFS | HUGETLBFS) {
        return Err("is neither a tmpfs nor a hugetlbfs");
    }
    if !takes_files(directory) {
        return Err("takes no file of this user");
    }
    let space = statvfs(directory).map_err(|_| "cannot be looked at")?;
    // A tmpfs without a limit says that it has no blocks at all (tmpfs(5), size=0).
    Ok(if space.f_blocks == 0 { u64::MAX } else { space.f_bavail.saturating_mul(space.f_frsize) })
}

/// Reads the file systems of huge pages from /proc/self/mounts.
fn hugetlbfs(mounts: &str) -> Vec<HugePages> {
    let mount = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        let (path, kind, options) = (fields.get(1)?, fields.get(2)?, fields.get(3)?);
        let page = options.split(',').find_map(|option| option.strip_prefix("pagesize="));
        // Names with a space have a backslash here, and a quotation mark cannot stand in a file of -readconfig.
        let is_plain = *kind == "hugetlbfs" && !path.contains(['\\', '"']);
        is_plain.then_some(())?;
        Some(HugePages { path: path.into(), page_bytes: size::parse(page?)? })
    };
    mounts.lines().filter_map(mount).collect()
}

/// Reads the size of a huge page from /proc/meminfo.
fn huge_page(memory: &str) -> Option<u64> {
    let line = memory.lines().find_map(|line| line.strip_prefix("Hugepagesize:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_are_found_by_their_size() {
        let mounts = "tmpfs /dev/shm tmpfs rw,nosuid,nodev 0 0\n\
            hugetlbfs /dev/hugepages hugetlbfs rw,relatime,pagesize=2M 0 0\n\
            none /mnt/a\\040b hugetlbfs rw,pagesize=1024M 0 0\n\
            none /run/huge hugetlbfs rw,relatime,pagesize=1024M 0 0\n";
        let host = Host {
            ram: "/dev/shm".into(),
            room: Ok(0),
            hugetlbfs: hugetlbfs(mounts),
            huge_page: huge_page("MemTotal: 1 kB\nHugepagesize:       2048 kB\n"),
        };
        assert_eq!(host.huge("x", None).unwrap(), Path::new("/dev/hugepages"));
        assert_eq!(host.huge("x", Some(2 << 20)).unwrap(), Path::new("/dev/hugepages"));
        assert_eq!(host.huge("x", Some(1 << 30)).unwrap(), Path::new("/run/huge"));
        let told = host.huge("the backend x", Some(64 << 10)).unwrap_err().to_string();
        assert!(
            told.contains("the backend x wants huge pages of 64 KiB") && told.contains("pagesize=64K"),
            "{told}"
        );
    }

    #[test]
    fn what_was_tried_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        assert!(takes_files(directory.path()));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(!takes_files(Path::new("/proc")));
    }

    #[test]
    fn the_room_of_a_directory_is_known() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(room(&directory.path().join("absent")), Err("is no directory"));
        assert_eq!(room(Path::new("/proc")), Err("is neither a tmpfs nor a hugetlbfs"));
        let mut host = Host { ram: "/ram".into(), room: Ok(5 << 20), hugetlbfs: Vec::new(), huge_page: None };
        assert_eq!(host.ordinary("x", 3 << 20).unwrap(), Path::new("/ram"));
        let told = host.ordinary("x", 3 << 20).unwrap_err().to_string();
        assert!(told.contains("x of 3 MiB does not fit into /ram, where 2 MiB are free"), "{told}");
    }
}
