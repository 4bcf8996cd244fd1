//! This module finds the RAM of a guest in QEMU, and maps it into this process too.
//!
//! RAM is in files, one for each memory back end. A file with a name is opened here. One without (a memfd, or a file
//! that QEMU has unlinked, as it does in a directory of huge pages), and one whose name leads nowhere from here, is handed
//! over by the shim in QEMU, which finds it by its address.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memlane_kvm::ram::GuestRam;
use memlane_net::task;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::machine::{MAX_RAM_BYTES, MAX_REGIONS, Region};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::QemuError;
use super::blockers::CONNECTING;
use super::definition::BACKEND;
use super::qmp::{Qmp, items};
use crate::DriverError;
use crate::shim::Shims;

/// These are the descriptors of whichever process looks.
const DESCRIPTORS: &str = "/proc/self/fd";
/// From this version on, QEMU leaves only files out of its own stream that it was told a path of (`x-ignore-shared`).
const FILES_ONLY: [u32; 3] = [8, 1, 0];

/// A part of a guest's RAM: a memory back end of QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MemoryPart {
    /// This is its file, if it has a name; otherwise it says what it is.
    path: PathBuf,
    /// The file must be this user's. It is `None` of a file that this daemon has made, and of one that is handed over.
    owner: Option<u32>,
    /// It has this many bytes.
    bytes: u64,
    /// QEMU has mapped it at this address, at which the shim finds it. It is `None` where the path leads to it.
    #[serde(default)]
    address: Option<u64>,
}

/// A memory back end, as QEMU describes it.
struct Backend {
    id: String,
    kind: String,
    share: bool,
    path: PathBuf,
    bytes: u64,
}

/// Finds all RAM of the guest, one part for each memory back end, in order of their names. `own_memory` is the file that
/// this daemon has made for the guest's RAM, if it has started QEMU.
///
/// # Errors
///
/// Fails if QEMU does not answer, or if part of the memory cannot be shared.
pub(super) async fn parts(qmp: &Qmp, own_memory: Option<&Path>) -> Result<Vec<MemoryPart>, QemuError> {
    let backends = backends(qmp).await?;
    let mut parts = Vec::with_capacity(backends.len());
    let mut view = None;
    for Backend { id, path, bytes, .. } in backends {
        // QEMU was handed a descriptor of it.
        if let Some(own) = own_memory.filter(|_| path.starts_with(DESCRIPTORS) && id == BACKEND) {
            parts.push(MemoryPart { path: own.to_owned(), owner: None, bytes, address: None });
            continue;
        }
        let part = MemoryPart { path, owner: Some(qmp.user()), bytes, address: None };
        let path = part.path.clone();
        if task::aside(move || leads_nowhere(&path)).await {
            if view.is_none() {
                view = Some(Arc::<str>::from(qmp.human("info mtree -f").await?));
            }
            let address = address_of(qmp, &id, view.clone().unwrap_or_default()).await?;
            let path = if part.path.as_os_str().is_empty() { id.into() } else { part.path };
            parts.push(MemoryPart { path, owner: None, bytes, address: Some(address) });
        } else {
            parts.push(part);
        }
    }
    Ok(parts)
}

/// Opens and maps memory, one region for each part, which lies behind the one before. `pid` is QEMU's process.
///
/// # Errors
///
/// Fails if a part cannot be opened, or is none that can be mapped.
pub(super) async fn map(
    parts: &[MemoryPart],
    pid: u32,
    shims: &Shims,
) -> Result<(Vec<Region>, Arc<GuestRam>), QemuError> {
    let mut handed = Vec::with_capacity(parts.len());
    for part in parts {
        handed.push(match part.address {
            Some(address) => {
                shims.wait_for(pid, CONNECTING).await;
                let file = shims.mapped_file(pid, address).await;
                Some(file.map_err(|source| QemuError::Handed { path: part.path.clone(), source })?)
            }
            None => None,
        });
    }
    let parts = parts.to_vec();
    task::aside(move || map_all(parts.into_iter().zip(handed))).await
}

fn map_all(
    parts: impl Iterator<Item = (MemoryPart, Option<OwnedFd>)>,
) -> Result<(Vec<Region>, Arc<GuestRam>), QemuError> {
    let mut next = 0u64;
    let parts = parts.map(|(MemoryPart { path, owner, bytes, .. }, handed)| {
        let address = next;
        next = next.saturating_add(bytes);
        let file = match handed {
            Some(file) => memory_only(&path, file)?,
            None => open(&path, owner)?,
        };
        let page_bytes = page_bytes_of(&path, &file)?;
        Ok((Region { address, bytes, page_bytes, offset: 0 }, file))
    });
    let regions = parts.collect::<Result<Vec<_>, QemuError>>()?;
    let shape = regions.iter().map(|(region, _)| *region).collect();
    let ram = GuestRam::map(regions)?;
    ram.mark_as_observer();
    Ok((shape, Arc::new(ram)))
}

/// Asks QEMU for its memory back ends. All of them must be shared, and be such that QEMU leaves them out of its stream.
async fn backends(qmp: &Qmp) -> Result<Vec<Backend>, QemuError> {
    let found = qmp.execute("query-memdev", json!({})).await?;
    let found = items(&found);
    if found.is_empty() || found.len() > MAX_REGIONS {
        return Err(QemuError::NoMemory { found: found.len(), limit: MAX_REGIONS });
    }
    let mut backends = Vec::with_capacity(found.len());
    for backend in found {
        backends.push(describe(qmp, backend).await?);
    }
    backends.sort_by(|a, b| a.id.cmp(&b.id));
    let mut end = 0u64;
    for Backend { id, bytes, .. } in &backends {
        let sum = end.checked_add(*bytes).filter(|end| *end <= MAX_RAM_BYTES);
        end = sum.ok_or_else(|| QemuError::TooMuchMemory { id: id.clone(), bytes: *bytes })?;
    }
    let version = qmp.version();
    let private: Vec<String> =
        backends.iter().filter(|backend| !backend.is_left_out(version)).map(Backend::in_words).collect();
    if !private.is_empty() {
        return Err(QemuError::PrivateMemory { private: private.join(", "), version });
    }
    Ok(backends)
}

async fn describe(qmp: &Qmp, backend: &Value) -> Result<Backend, DriverError> {
    let id = backend["id"].as_str().unwrap_or_default().to_owned();
    let path = format!("/objects/{id}");
    let get = |property: &'static str| qmp.execute("qom-get", json!({ "path": path, "property": property }));
    let kind = get("type").await?.as_str().unwrap_or("unknown").to_owned();
    let file = match kind.as_str() {
        "memory-backend-file" => get("mem-path").await?,
        _ => Value::Null,
    };
    Ok(Backend {
        id,
        kind,
        share: backend["share"] == true,
        path: file.as_str().unwrap_or_default().into(),
        bytes: backend["size"].as_u64().unwrap_or(0),
    })
}

impl Backend {
    /// Tells whether a QEMU of this version leaves it out of its stream when it is told to (`x-ignore-shared`).
    fn is_left_out(&self, version: [u32; 3]) -> bool {
        match self.kind.as_str() {
            "memory-backend-file" => self.share,
            "memory-backend-memfd" => self.share && version < FILES_ONLY,
            _ => false,
        }
    }

    fn in_words(&self) -> String {
        format!("{} ({}{})", self.id, self.kind, if self.share { "" } else { ", share=off" })
    }
}

/// Tells whether the daemon cannot open a file by its path, which QEMU may do all the same. What is wrong with a file that
/// it can open, opening it tells.
fn leads_nowhere(path: &Path) -> bool {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    let metadata = std::fs::symlink_metadata(path);
    path.starts_with(DESCRIPTORS)
        || metadata.is_ok_and(|metadata| metadata.is_dir())
        || accessat(CWD, path, Access::READ_OK | Access::WRITE_OK, AtFlags::EACCESS).is_err()
}

/// Finds the address at which QEMU has mapped a back end: some of the guest's memory that is the back end's, by the guest's
/// address, and from there QEMU's. `view` is how the guest's memory is made up (`info mtree -f`).
async fn address_of(qmp: &Qmp, id: &str, view: Arc<str>) -> Result<u64, QemuError> {
    let odd =
        |why: &str| QemuError::MemoryFile { path: id.into(), source: std::io::Error::other(why.to_owned()) };
    // A QEMU that was taken over may say as much as a line may have, for each back end.
    let wanted = id.to_owned();
    let range = task::aside(move || range_in(&view, &wanted)).await;
    let (address, offset) = range.ok_or_else(|| {
        odd(
            "no part of the guest's memory is of it: it is a device's (ivshmem, nvdimm), whose memory does not move, or of no \
             use; remove it",
        )
    })?;
    let answer = qmp.human(&format!("gpa2hva {address:#x}")).await?;
    let found = host_address_in(&answer, id).and_then(|found| found.checked_sub(offset));
    found.ok_or_else(|| odd("QEMU does not say where it is"))
}

/// Finds a range of the guest's memory that is a back end's. Returns the address where it begins, and its offset in the
/// back end.
fn range_in(view: &str, id: &str) -> Option<(u64, u64)> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let mut is_guests = false;
    view.lines().find_map(|line| {
        if let Some(root) = line.trim_start().strip_prefix("Root memory region: ") {
            // There are views of devices too, and of single back ends.
            is_guests = matches!(root.trim_end(), "system" | "memory");
        }
        let (range, rest) = line.trim_start().split_once(" (prio ")?;
        let name = rest.split_once(", ram): ")?.1;
        let mut words = name.split(' ');
        if !is_guests || !is_name_of(words.next()?, id) {
            return None;
        }
        let offset = words.find_map(|word| word.strip_prefix('@')).map_or(Some(0), hex)?;
        Some((hex(range.split_once('-')?.0)?, offset))
    })
}

/// Finds QEMU's address in its answer, if that is about this back end.
fn host_address_in(answer: &str, id: &str) -> Option<u64> {
    let (name, rest) = answer.split_once('(')?.1.split_once(')')?;
    let digits = rest.split_once("is 0x")?.1;
    let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
    is_name_of(name, id).then(|| u64::from_str_radix(&digits[..end], 16).ok()).flatten()
}

/// Machine types of before QEMU 4.0 name memory by the path of its back end.
fn is_name_of(name: &str, id: &str) -> bool {
    name.strip_prefix("/objects/").unwrap_or(name) == id
}

/// Opens a file that QEMU says is its memory. It must be QEMU's own: a QEMU that was taken over
/// must not make this daemon write to what belongs to others. A file that the daemon has made has no such owner.
fn open(path: &Path, owner: Option<u32>) -> Result<OwnedFd, QemuError> {
    use rustix::fs::{Mode, OFlags};
    let failed = |source: std::io::Error| QemuError::MemoryFile { path: path.to_owned(), source };
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    let file = std::fs::File::from(file);
    let metadata = file.metadata().map_err(failed)?;
    if owner.is_some_and(|owner| owner != metadata.uid()) {
        return Err(failed(std::io::Error::other("it does not belong to the user that QEMU runs as")));
    }
    Ok(file.into())
}

/// Checks that what the shim has handed over is memory: a file of some file system might keep its reader waiting.
fn memory_only(path: &Path, file: OwnedFd) -> Result<OwnedFd, QemuError> {
    use rustix::fs::{FileType, fstat, fstatfs};
    let failed = |source: std::io::Error| QemuError::MemoryFile { path: path.to_owned(), source };
    let kind = FileType::from_raw_mode(fstat(&file).map_err(|error| failed(error.into()))?.st_mode);
    let system = fstatfs(&file).map_err(|error| failed(error.into()))?.f_type as i64;
    let is_memory = [libc::TMPFS_MAGIC, libc::HUGETLBFS_MAGIC].contains(&system);
    if kind != FileType::RegularFile || !is_memory {
        return Err(failed(std::io::Error::other(
            "QEMU's shim has handed over what is no memory (tmpfs, hugetlbfs)",
        )));
    }
    Ok(file)
}

fn page_bytes_of(path: &Path, file: &OwnedFd) -> Result<u32, QemuError> {
    let system = rustix::fs::fstatfs(file)
        .map_err(|error| QemuError::MemoryFile { path: path.to_owned(), source: error.into() })?;
    let huge = system.f_type as i64 == libc::HUGETLBFS_MAGIC;
    Ok(if huge { system.f_bsize as u32 } else { PAGE_SIZE as u32 })
}

/// Returns how many bytes the blocks of memory hold that QEMU's own migration would take along, from the answer to the human
/// monitor's `info ramblock`: block name, page size, offset, used and total length, and since 9.0 more.
pub(super) fn used_bytes(blocks: &str) -> Option<u64> {
    let used = blocks.lines().skip(1).map(|line| {
        let mut numbers = line.split_whitespace().filter_map(|word| word.strip_prefix("0x"));
        u64::from_str_radix(numbers.nth(1)?, 16).ok()
    });
    used.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIEW: &str = "FlatView #0\n Root memory region: mem1\n\
        \x20 0000000000000000-000000000fffffff (prio 0, ram): mem1\n\
        FlatView #1\n AS \"memory\", root: system\n Root memory region: system\n\
        \x20 0000000000000000-00000000000bffff (prio 0, ram): ram-node0\n\
        \x20 00000000000c0000-00000000000dffff (prio 1, rom): pc.rom\n\
        \x20 0000000000100000-0000000003ffffff (prio 0, ram): ram-node0 @0000000000100000 KVM\n\
        \x20 0000000004000000-0000000007ffffff (prio 0, ram): /objects/ram-node1 @0000000000000000\n\
        \x20 0000000100000000-000000010fffffff (prio 0, ram): mem1 @0000000000200000\n";

    #[test]
    fn the_used_lengths_of_memory_are_added() {
        let old = "              Block Name    PSize              Offset               Used              Total\n\
                   mm    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\n\
                   0000:00:01.0/vga.vram    4 KiB  0x0000000004080000 0x0000000001000000 0x0000000004000000\n";
        assert_eq!(used_bytes(old), Some(80 << 20));
        let new = "Block Name    PSize              Offset               Used              Total                HVA  RO\r\n\
                   mm    4 KiB  0x0000000000000000 0x0000000000001000 0x0000000004000000 0x00007fdf57fff000  rw\r\n";
        assert_eq!(used_bytes(new), Some(4096));
        assert_eq!(used_bytes(""), Some(0));
        assert_eq!(used_bytes("title\nsomething else"), None);
    }

    #[test]
    fn the_guests_memory_is_told_apart_by_its_back_ends() {
        assert_eq!(range_in(VIEW, "ram-node0"), Some((0, 0)));
        assert_eq!(range_in(VIEW, "ram-node1"), Some((0x400_0000, 0)));
        assert_eq!(range_in(VIEW, "mem1"), Some((1 << 32, 0x20_0000)));
        for other in ["ram-node", "pc.rom", "node0", ""] {
            assert_eq!(range_in(VIEW, other), None, "{other}");
        }
    }

    #[test]
    fn the_host_address_is_believed_of_the_right_memory_alone() {
        let answer = "Host virtual address for 0x100000 (ram-node0) is 0x7f5ec80ff000\r\n";
        assert_eq!(host_address_in(answer, "ram-node0"), Some(0x7f5e_c80f_f000));
        assert_eq!(host_address_in(answer, "ram-node1"), None);
        assert_eq!(host_address_in("No memory is mapped at address 0x0\r\n", "m"), None);
    }

    #[test]
    fn what_qemu_would_send_by_itself_is_known() {
        let backend = |kind: &str, share| Backend {
            id: "m".into(),
            kind: kind.into(),
            share,
            path: PathBuf::new(),
            bytes: 1,
        };
        assert!(backend("memory-backend-file", true).is_left_out([11, 1, 0]));
        assert!(!backend("memory-backend-file", false).is_left_out([7, 2, 0]));
        assert!(backend("memory-backend-memfd", true).is_left_out([7, 2, 0]));
        assert!(!backend("memory-backend-memfd", true).is_left_out([8, 1, 0]));
        assert!(!backend("memory-backend-ram", true).is_left_out([7, 2, 0]));
    }

    #[test]
    fn what_is_no_memory_is_not_taken() {
        let file = tempfile::tempfile_in("/proc/self/cwd").unwrap();
        let told = memory_only(Path::new("m"), file.into());
        let memory = tempfile::tempfile_in("/dev/shm").unwrap();
        assert!(told.is_err() && memory_only(Path::new("m"), memory.into()).is_ok());
        let directory = std::fs::File::open("/dev/shm").unwrap();
        assert!(memory_only(Path::new("m"), directory.into()).is_err());
    }
}
