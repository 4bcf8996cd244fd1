//! This module knows the disks of a guest in QEMU, and waits for their I/O.
//!
//! What bypasses the page cache is read by a device, or by the kernel in its place, into pages of guest memory that were
//! pinned when the read began. That is when they are noticed as written; what is read lands later, and is not
//! noticed.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use memlane_net::task;
use serde_json::{Value, json};

use super::qmp::{Qmp, items};
use crate::DriverError;

/// These drivers of QEMU read files and devices of this host.
const FILES: [&str; 3] = ["file", "host_device", "host_cdrom"];
/// These drivers receive data in QEMU's own process, and copy it through its page tables.
const NETWORK: [&str; 10] = ["rbd", "nbd", "iscsi", "nfs", "http", "https", "ftp", "ftps", "ssh", "gluster"];
/// These drivers map all of the guest's memory for a device, which then writes there as long as it likes: `io_uring` is
/// libblkio's, and has nothing to do with `aio=io_uring` of a file.
const MAPPING: [&str; 3] = ["nvme", "virtio-blk-", "io_uring"];

/// The newest major version of QEMU whose drain was tried (`daemon/tests/qemu_disks.rs`).
pub(super) const NEWEST: u32 = 11;
/// Storage may take this long to say what it is.
const STORAGE: Duration = Duration::from_secs(5);

/// File systems whose page cache is read by copying through page tables, unless a file was opened with `O_DIRECT`: all
/// others may pin pages, as FUSE does if the server of the file system says so, ZFS (`direct=always`), and 9P. See
/// statfs(2) for the numbers.
const CACHING: [u64; 10] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // Btrfs
    0x0102_1994, // tmpfs, and devtmpfs for block devices
    0x6969,      // NFS
    0xf2f5_2010, // F2FS
    0x00c3_6400, // Ceph
    0x0116_1970, // GFS2
    0x7461_636f, // OCFS2
    0x8584_58f6, // ramfs
];

/// A node of QEMU's block layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockNode {
    /// This is the name of the node.
    pub name: String,
    /// This is what it reads: a file, or an address.
    pub file: String,
    /// This is its driver.
    pub driver: String,
    /// This tells whether it was opened with `O_DIRECT`.
    direct: bool,
}

impl BlockNode {
    pub(super) fn from_answer(node: &Value) -> Self {
        let text = |key: &str| node[key].as_str().unwrap_or_default().to_owned();
        let direct = node["cache"]["direct"] == true;
        Self { name: text("node-name"), file: text("file"), driver: text("drv"), direct }
    }

    /// Tells whether the driver maps all of the guest's memory for a device.
    pub(super) fn maps_memory(&self) -> bool {
        MAPPING.iter().any(|driver| self.driver.starts_with(driver))
    }

    /// Tells whether what is read may land after it was noticed. `is_cached` tells whether the page cache has a file.
    fn lands_late(&self, is_cached: impl FnOnce(&str) -> bool) -> bool {
        match self.driver.as_str() {
            driver if FILES.contains(&driver) => self.direct || !is_cached(&self.file),
            driver if NETWORK.contains(&driver) => false,
            _ => self.direct,
        }
    }
}

/// The files of a guest's disks, as far as they have been looked at: whether the page cache has them.
#[derive(Default)]
pub(super) struct DiskFiles(RefCell<BTreeMap<String, bool>>);

impl DiskFiles {
    /// Returns a node whose reads may land after they were noticed, if there is one.
    ///
    /// # Errors
    ///
    /// Fails if QEMU does not answer.
    pub(super) async fn late(&self, qmp: &Qmp) -> Result<Option<BlockNode>, DriverError> {
        let nodes = nodes(qmp).await?;
        let unknown = |node: &&BlockNode| node.lands_late(|file| self.0.borrow().contains_key(file));
        let files: Vec<String> = nodes.iter().filter(unknown).map(|node| node.file.clone()).collect();
        if !files.is_empty() {
            self.look_at(files).await;
        }
        let is_cached = |file: &str| self.0.borrow().get(file) == Some(&true);
        Ok(nodes.into_iter().find(|node| node.lands_late(is_cached)))
    }

    /// Storage that does not answer has no page cache that is known.
    async fn look_at(&self, files: Vec<String>) {
        let look = {
            let files = files.clone();
            task::aside(move || files.iter().map(|file| is_cached(Path::new(file))).collect::<Vec<_>>())
        };
        let found = tokio::time::timeout(STORAGE, look).await;
        let found = found.unwrap_or_else(|_| vec![false; files.len()]);
        self.0.borrow_mut().extend(files.into_iter().zip(found));
    }
}

/// Returns all nodes of the block layer.
///
/// # Errors
///
/// Fails if QEMU does not answer.
pub(super) async fn nodes(qmp: &Qmp) -> Result<Vec<BlockNode>, DriverError> {
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true })).await?;
    Ok(items(&nodes).iter().map(BlockNode::from_answer).collect())
}

/// Waits until all block I/O has ended that was under way, and lets it go on. Returns how long that took.
///
/// # Errors
///
/// Fails if QEMU does not answer.
pub(super) async fn drain(qmp: &Qmp) -> Result<Duration, DriverError> {
    let started = Instant::now();
    // Before a transaction QEMU drains all block devices, even if it consists of nothing. That is written down nowhere, so
    // it is relied on in versions alone that were tried ([`NEWEST`]).
    qmp.execute("transaction", json!({ "actions": [] })).await?;
    Ok(started.elapsed())
}

/// Tells whether reads of a file go through the page cache of a file system that is known to copy. One that this daemon
/// cannot look at is not known.
fn is_cached(file: &Path) -> bool {
    let system = rustix::fs::statfs(file);
    system.is_ok_and(|system| CACHING.contains(&(system.f_type as u64 & 0xffff_ffff)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(driver: &str, file: &str, direct: bool) -> BlockNode {
        let answer = json!({ "node-name": "n0", "drv": driver, "file": file, "cache": { "direct": direct } });
        BlockNode::from_answer(&answer)
    }

    #[test]
    fn reads_past_the_page_cache_land_late() {
        for driver in ["file", "host_device"] {
            let node = |direct: bool| node(driver, "/srv/a.img", direct);
            assert!(!node(false).lands_late(|_| true) && node(true).lands_late(|_| true), "{driver}");
            assert!(node(false).lands_late(|_| false), "{driver}");
        }
        // A format is as late as its file, and what comes by a network of QEMU's own never.
        assert!(!node("qcow2", "/srv/a.img", false).lands_late(|_| false));
        assert!(node("qcow2", "/srv/a.img", true).lands_late(|_| true));
        assert!(!node("rbd", "json:{}", true).lands_late(|_| false));
    }

    #[test]
    fn files_of_unknown_file_systems_are_not_cached() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        assert!(is_cached(file.path()));
        for unknown in ["/proc/version", "/there/is/no/such/file"] {
            assert!(!is_cached(Path::new(unknown)), "{unknown}");
        }
    }

    #[test]
    fn drivers_that_map_memory_are_known() {
        for driver in ["nvme", "nvme-io_uring", "virtio-blk-vfio-pci", "io_uring"] {
            assert!(node(driver, "", false).maps_memory(), "{driver}");
        }
        assert!(!node("file", "/srv/a.img", true).maps_memory());
    }
}
