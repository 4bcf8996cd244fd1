//! This module finds what prevents a guest in QEMU from being moved, before anything moves.

use std::time::Duration;

use memlane_kvm::ram::GuestRam;
use serde_json::{Value, json};

use super::block::{self, BlockNode, DiskFiles};
use super::qmp::{Qmp, items};
use super::{others, run_state};
use crate::shim::Shims;
use crate::{Blocker, DriverError};

/// From this version on, Linux can track writes of another process, by `PAGEMAP_SCAN` and asynchronous write
/// protection.
const OLDEST_LINUX: (u32, u32) = (6, 7);

/// A shim is waited for this long: after a start of the daemon it connects within a few seconds.
pub(super) const CONNECTING: Duration = Duration::from_secs(6);

/// Finds all blockers of the guest of this QEMU, and what to do about them.
///
/// # Errors
///
/// Fails if QEMU does not answer.
pub(super) async fn find(qmp: &Qmp, shims: &Shims) -> Result<Vec<Blocker>, DriverError> {
    let mut found = Vec::new();
    found.extend(kernel(&rustix::system::uname().release().to_string_lossy()));
    found.extend(status(&qmp.status().await?, qmp.version()));
    found.extend(others::at_work(qmp).await?);
    found.extend(devices(qmp).await?);
    found.extend(disks(qmp).await?);
    found.extend(blocked_reasons(qmp).await?);
    // Last, since it is asked of QEMU itself, and costs a descriptor: can its writes be tracked?
    shims.wait_for(qmp.pid(), CONNECTING).await;
    if let Err(error) = shims.open_userfault(qmp.pid(), false).await {
        found.push(Blocker::new("shim", error.to_string(), None));
    }
    Ok(found)
}

fn kernel(release: &str) -> Option<Blocker> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    let found = (numbers.next()?, numbers.next()?);
    let (major, minor) = OLDEST_LINUX;
    let detail =
        || format!("this host runs Linux {release}, which cannot track the writes of another process");
    let remedy = || format!("run Linux {major}.{minor} or newer on this host");
    (found < OLDEST_LINUX).then(|| Blocker::new("kernel", detail(), Some(remedy())))
}

fn status(status: &str, version: [u32; 3]) -> Option<Blocker> {
    let immovable = run_state::movable(status, version).err()?;
    Some(Blocker::new("guest", immovable.to_string(), Some(immovable.remedy().to_owned())))
}

/// Finds devices whose writes to memory are not noticed, because they bypass QEMU's page tables, and devices whose memory
/// is not the guest's alone.
async fn devices(qmp: &Qmp) -> Result<Vec<Blocker>, DriverError> {
    let mut found = Vec::new();
    for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let list = qmp.execute("qom-list", json!({ "path": path })).await?;
        found.extend(items(&list).iter().filter_map(refused));
    }
    let networks = qmp.human("info network").await?;
    for kind in ["vhost-user", "vhost-vdpa"] {
        if networks.contains(&format!("type={kind}")) {
            let detail =
                format!("a network back end of type {kind} writes guest memory where nobody sees it");
            let remedy = format!("use -netdev tap,vhost=on instead of -netdev {kind}");
            found.push(Blocker::new("device", detail, Some(remedy)));
        }
    }
    Ok(found)
}

fn refused(device: &Value) -> Option<Blocker> {
    const BYPASSING: [&str; 6] =
        ["vfio-", "vhost-user-", "vhost-vdpa-", "vhost-scsi-", "scsi-block", "scsi-generic"];
    const SHARING: [&str; 4] = ["ivshmem", "nvdimm", "virtio-pmem", "cxl-type3"];
    let kind = device["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
    let is_one_of = |kinds: &[&str]| kinds.iter().any(|prefix| kind.starts_with(prefix));
    let does = match () {
        () if is_one_of(&BYPASSING) => "writes guest memory where nobody sees it",
        () if is_one_of(&SHARING) => {
            "has memory that other programs use too, or that outlives the guest: it does not move"
        }
        () => return None,
    };
    let name = device["name"].as_str().unwrap_or_default();
    let detail = format!("device {name} ({kind}) {does}");
    let remedy = format!("remove -device {kind}, or unplug it (device_del {name}) for the time of the move");
    Some(Blocker::new("device", detail, Some(remedy)))
}

/// Finds disks whose drivers map the guest's memory for a device: it writes there when it likes, and waiting for block
/// I/O tells nothing about that. Of a QEMU that was never tried, all that would have to be waited for are found.
async fn disks(qmp: &Qmp) -> Result<Vec<Blocker>, DriverError> {
    let nodes = block::nodes(qmp).await?;
    let mut found: Vec<Blocker> = nodes.iter().filter(|node| node.maps_memory()).map(mapping).collect();
    if qmp.version()[0] > block::NEWEST
        && let Some(node) = DiskFiles::default().late(qmp).await?
    {
        found.push(untried(&node, qmp.version()[0]));
    }
    Ok(found)
}

fn untried(node: &BlockNode, major: u32) -> Blocker {
    let BlockNode { name, file, .. } = node;
    let detail = format!(
        "disk {file} (node {name}) bypasses the page cache, and whether QEMU {major} can be had to wait for its I/O was never \
         tried (newest: {})",
        block::NEWEST
    );
    let remedy = "use -drive cache=writeback (cache.direct=off in -blockdev), or a newer Memlane".to_owned();
    Blocker::new("disk", detail, Some(remedy))
}

fn mapping(node: &BlockNode) -> Blocker {
    let BlockNode { name, file, driver, .. } = node;
    let detail = format!(
        "disk {file} (node {name}, {driver}) maps the guest's memory for its device, which writes there where nobody sees it"
    );
    let remedy = "use another -blockdev driver for it than one that drives the device by itself";
    Blocker::new("disk", detail, Some(remedy.to_owned()))
}

/// Finds memory that was plugged in or unplugged since the daemon has mapped it.
///
/// # Errors
///
/// Fails if QEMU does not answer.
pub(super) async fn memory(qmp: &Qmp, ram: &GuestRam) -> Result<Option<Blocker>, DriverError> {
    let backends = qmp.execute("query-memdev", json!({})).await?;
    let mut now: Vec<(&str, u64)> = items(&backends)
        .iter()
        .map(|back| (back["id"].as_str().unwrap_or_default(), back["size"].as_u64().unwrap_or(0)))
        .collect();
    now.sort_unstable();
    let known = ram.regions().iter().map(|region| region.bytes);
    if known.eq(now.iter().map(|(_, bytes)| *bytes)) {
        return Ok(None);
    }
    let names: Vec<&str> = now.iter().map(|(id, _)| *id).collect();
    let detail = format!(
        "memory was plugged in or unplugged since the daemon has taken the guest in; it is now {}",
        names.join(", ")
    );
    let remedy = "detach the guest and attach it again (memlanectl detach, memlanectl attach)".to_owned();
    Ok(Some(Blocker::new("memory", detail, Some(remedy))))
}

/// Finds what QEMU itself says against any migration.
async fn blocked_reasons(qmp: &Qmp) -> Result<Vec<Blocker>, DriverError> {
    let migration = qmp.execute("query-migrate", json!({})).await?;
    let blocker = |reason: &Value| {
        let detail = format!("QEMU cannot migrate: {}", reason.as_str().unwrap_or_default());
        let remedy = "remove the device or setting that it names".to_owned();
        Blocker::new("device", detail, Some(remedy))
    };
    Ok(items(&migration["blocked-reasons"]).iter().map(blocker).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_told_by_their_release() {
        for release in ["6.6.99-cloud-amd64", "5.10.0", "2.6.78", "6.6"] {
            assert!(kernel(release).unwrap().detail.contains(release));
        }
        for release in ["6.7.0", "6.18.44-fc", "10.0"] {
            assert!(kernel(release).is_none(), "{release}");
        }
    }

    #[test]
    fn devices_that_bypass_qemu_or_share_memory_are_named() {
        let device = |kind: &str| json!({ "name": "x0", "type": format!("child<{kind}>") });
        for kind in ["vfio-pci", "vhost-user-fs-pci", "vhost-vdpa-device-pci", "ivshmem-plain", "nvdimm"] {
            let blocker = refused(&device(kind)).unwrap();
            assert!(blocker.remedy.unwrap().contains(&format!("-device {kind}")));
        }
        for kind in ["virtio-net-pci", "vhost-vsock-pci", "virtio-balloon-pci"] {
            assert!(refused(&device(kind)).is_none(), "{kind}");
        }
        assert!(refused(&json!({ "name": "type", "type": "string" })).is_none());
    }

    #[test]
    fn disks_that_map_memory_are_named() {
        let answer = json!({ "node-name": "n0", "drv": "nvme", "file": "nvme://0000:01:00.0/1" });
        let node = BlockNode::from_answer(&answer);
        let blocker = mapping(&node);
        assert!(blocker.detail.contains("nvme://0000:01:00.0/1") && blocker.detail.contains("node n0"));
    }
}
