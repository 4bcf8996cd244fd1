//! This module asks QEMU about itself and its guest, and maps the guest's memory.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memlane_kvm::ram::GuestRam;
use memlane_net::task;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::{MAX_DISKS, MAX_NAME_BYTES, QemuGuest};
use memlane_protocol::wire::machine::{
    CpuidEntry, GuestShape, MAX_CPUID_ENTRIES, MAX_NICS, MAX_RAM_BYTES, MAX_REGIONS, Machine, Nic, Region,
    TrackerKind,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::QemuError;
use super::definition::{BACKEND, Definition, unicast_mac};
use super::qmp::{Qmp, items};
use crate::DriverError;
use crate::config::NetworkConfig;

/// This driver was written for the `x-ignore-shared` and `fd:` migrations of QEMU from this version on.
const OLDEST: [u32; 3] = [7, 2, 0];
/// This is the format of the state: QEMU's own stream, which carries its versions itself.
const STATE_VERSION: u16 = 1;

/// These are the descriptors of whichever process looks.
const DESCRIPTORS: &str = "/proc/self/fd";

/// A part of a guest's RAM: a memory back end of QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MemoryPart {
    /// This is its file.
    path: PathBuf,
    /// The file must be this user's. It is `None` of a file that this daemon has made.
    owner: Option<u32>,
    /// It has this many bytes.
    bytes: u64,
}

/// A guest in QEMU.
pub(super) struct Facts {
    /// This is the guest's shape.
    pub shape: GuestShape,
    /// This is what the shape has no room for.
    pub qemu: QemuGuest,
    /// This is the guest's memory, mapped into this process too.
    pub ram: Arc<GuestRam>,
    /// These are the parts of that memory, by which it is found again.
    pub parts: Vec<MemoryPart>,
}

/// Asks QEMU for everything that a migration needs to know. `own_memory` is the file that this daemon has made for the
/// guest's RAM, if it has started QEMU.
///
/// # Errors
///
/// Fails if QEMU does not answer, is too old, or if its memory cannot be shared.
pub(super) async fn inspect(
    qmp: &Qmp,
    name: &Label,
    definition: Option<&Definition>,
    own_memory: Option<&Path>,
    networks: &[NetworkConfig],
) -> Result<Facts, QemuError> {
    let version = qmp.version();
    if version < OLDEST {
        return Err(QemuError::TooOld { found: version, oldest: OLDEST });
    }
    let parts = memory(qmp, own_memory).await?;
    let to_map = parts.clone();
    let (shape_regions, ram) = task::aside(move || map(to_map)).await?;
    let kvm = qmp.execute("query-kvm", json!({})).await?["enabled"] == true;
    let cpus = qmp.execute("query-cpus-fast", json!({})).await?;
    let cpus = items(&cpus);
    let first = cpus.first().and_then(|cpu| cpu["qom-path"].as_str()).unwrap_or_default();
    let machine = Machine {
        vmm: "qemu".parse().expect("a label"),
        state_version: STATE_VERSION,
        vcpus: u16::try_from(cpus.len()).unwrap_or(u16::MAX),
        features: if kvm { Machine::KVM } else { 0 },
        tsc_khz: 0,
        xcr0: 0,
        xsave_bytes: 0,
        cpuid: if kvm { cpu_features(qmp, first).await } else { Vec::new() },
        msrs: Vec::new(),
    };
    let kind = |path: String| async move {
        let kind = qmp.execute("qom-get", json!({ "path": path, "property": "type" })).await?;
        Ok::<_, DriverError>(bounded(kind.as_str().unwrap_or_default()))
    };
    let qemu = QemuGuest {
        machine: without(kind("/machine".to_owned()).await?, "-machine"),
        cpu: without(without(kind(first.to_owned()).await?, "-cpu"), "-x86_64"),
        accelerator: if kvm { "kvm" } else { "tcg" }.to_owned(),
        disks: disks(qmp).await?,
        definition: definition.map(|definition| definition.text.clone()).unwrap_or_default(),
    };
    let nics = match definition {
        Some(definition) => {
            let nics = definition.nics.iter();
            nics.map(|nic| Nic { mac: nic.mac, network: nic.network.clone() }).collect()
        }
        None => {
            let (text, networks) = (qmp.human("info network").await?, networks.to_vec());
            task::aside(move || nics(&text, &networks)).await
        }
    };
    let shape = GuestShape {
        name: name.clone(),
        tracker: TrackerKind::Pagemap,
        machine,
        regions: shape_regions,
        nics,
    };
    Ok(Facts { shape, qemu, ram, parts })
}

/// Finds all RAM of the guest, one part for each memory back end, in order of their names.
async fn memory(qmp: &Qmp, own_memory: Option<&Path>) -> Result<Vec<MemoryPart>, QemuError> {
    let backends = qmp.execute("query-memdev", json!({})).await?;
    let mut backends: Vec<&Value> = items(&backends).iter().collect();
    backends.sort_by_key(|backend| backend["id"].as_str().unwrap_or_default().to_owned());
    if backends.is_empty() || backends.len() > MAX_REGIONS {
        return Err(QemuError::NoMemory { found: backends.len(), limit: MAX_REGIONS });
    }
    let (mut parts, mut address) = (Vec::new(), 0u64);
    for backend in backends {
        let id = backend["id"].as_str().unwrap_or_default();
        let bytes = backend["size"].as_u64().unwrap_or(0);
        let end = address.checked_add(bytes).filter(|end| *end <= MAX_RAM_BYTES);
        let end = end.ok_or_else(|| QemuError::TooMuchMemory { id: id.to_owned(), bytes })?;
        let path = format!("/objects/{id}");
        let get =
            |property: &'static str| qmp.execute("qom-get", json!({ "path": path, "property": property }));
        let kind = get("type").await?;
        if kind != "memory-backend-file" || backend["share"] != true {
            let kind = kind.as_str().unwrap_or("unknown").to_owned();
            let share = backend["share"] == true;
            return Err(QemuError::PrivateMemory { id: id.to_owned(), kind, share });
        }
        let path = PathBuf::from(get("mem-path").await?.as_str().unwrap_or_default());
        // QEMU was handed a descriptor of it.
        let (path, owner) = match own_memory.filter(|_| path.starts_with(DESCRIPTORS) && id == BACKEND) {
            Some(own) => (own.to_owned(), None),
            None => (path, Some(qmp.user())),
        };
        parts.push(MemoryPart { path, owner, bytes });
        address = end;
    }
    Ok(parts)
}

/// Opens and maps memory, one region for each part, which lies behind the one before.
pub(super) fn map(parts: Vec<MemoryPart>) -> Result<(Vec<Region>, Arc<GuestRam>), QemuError> {
    let mut next = 0u64;
    let parts = parts.into_iter().map(|MemoryPart { path, owner, bytes }| {
        let address = next;
        next = next.saturating_add(bytes);
        let (file, page_bytes) = open(&path, owner)?;
        Ok((Region { address, bytes, page_bytes, offset: 0 }, file))
    });
    let regions = parts.collect::<Result<Vec<_>, QemuError>>()?;
    let shape = regions.iter().map(|(region, _)| *region).collect();
    let ram = GuestRam::map(regions)?;
    ram.mark_as_observer();
    Ok((shape, Arc::new(ram)))
}

/// Opens a file that QEMU says is its memory. It must be QEMU's own: a QEMU that was taken over
/// must not make this daemon write to what belongs to others. A file that the daemon has made has no such owner.
fn open(path: &Path, owner: Option<u32>) -> Result<(OwnedFd, u32), QemuError> {
    use rustix::fs::{Mode, OFlags};
    let failed = |source: std::io::Error| QemuError::MemoryFile { path: path.to_owned(), source };
    let odd = |why: &str| failed(std::io::Error::other(why.to_owned()));
    if path.starts_with(DESCRIPTORS) {
        return Err(odd(
            "it is a descriptor of QEMU's, by which nobody else finds it; give mem-path= a file's name",
        ));
    }
    let metadata = std::fs::symlink_metadata(path).map_err(failed)?;
    if metadata.is_dir() {
        return Err(odd("it is a directory, so QEMU's file in it has no name; give mem-path= a file's name"));
    }
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    let file = std::fs::File::from(file);
    let metadata = file.metadata().map_err(failed)?;
    if owner.is_some_and(|owner| owner != metadata.uid()) {
        return Err(odd("it does not belong to the user that QEMU runs as"));
    }
    let system = rustix::fs::fstatfs(&file).map_err(|error| failed(error.into()))?;
    let huge = system.f_type as i64 == libc::HUGETLBFS_MAGIC;
    let page_bytes = if huge { system.f_bsize as u32 } else { PAGE_SIZE as u32 };
    Ok((file.into(), page_bytes))
}

/// Returns what the vCPU shows to the guest, as leaves of CPUID. They are empty where this QEMU does not tell.
async fn cpu_features(qmp: &Qmp, cpu: &str) -> Vec<CpuidEntry> {
    let words = qmp.execute("qom-get", json!({ "path": cpu, "property": "feature-words" })).await;
    let words = words.unwrap_or_default();
    let mut leaves: BTreeMap<(u32, u32), CpuidEntry> = BTreeMap::new();
    for word in items(&words).iter().take(MAX_CPUID_ENTRIES) {
        let number = |key: &str| word[key].as_u64().and_then(|number| u32::try_from(number).ok());
        let (Some(function), Some(bits)) = (number("cpuid-input-eax"), number("features")) else { continue };
        let index = number("cpuid-input-ecx");
        let leaf = leaves.entry((function, index.unwrap_or(0))).or_insert(CpuidEntry {
            function: function.into(),
            index: index.unwrap_or(0).into(),
            // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            flags: u32::from(index.is_some()).into(),
            eax: 0.into(),
            ebx: 0.into(),
            ecx: 0.into(),
            edx: 0.into(),
        });
        match word["cpuid-register"].as_str().unwrap_or_default() {
            "EAX" => leaf.eax = bits.into(),
            "EBX" => leaf.ebx = bits.into(),
            "ECX" => leaf.ecx = bits.into(),
            "EDX" => leaf.edx = bits.into(),
            _ => {}
        }
    }
    leaves.into_values().collect()
}

/// Returns the files and devices of this host that hold disks.
async fn disks(qmp: &Qmp) -> Result<Vec<String>, DriverError> {
    let blocks = qmp.execute("query-block", json!({})).await?;
    let file = |block: &Value| block["inserted"]["image"]["filename"].as_str().map(bounded);
    // What is no path is on some server, which the destination reaches or not.
    let paths = items(&blocks).iter().filter_map(file).filter(|file| file.starts_with('/'));
    Ok(paths.take(MAX_DISKS).collect())
}

/// Finds the NICs in the output of `info network` whose taps are joined to the bridge of one of `networks`.
fn nics(text: &str, networks: &[NetworkConfig]) -> Vec<Nic> {
    let mut nics = Vec::new();
    let mut mac = None;
    for line in text.lines() {
        let field = |key: &str| line.split([',', ' ']).find_map(|field| field.strip_prefix(key));
        if let Some(address) = field("macaddr=") {
            mac = unicast_mac(address);
        }
        if let Some(tap) = field("ifname=")
            && let Some(mac) = mac.take()
            && let Some(network) = network_of(tap, networks)
        {
            nics.push(Nic { mac, network });
        }
    }
    nics.truncate(MAX_NICS);
    nics
}

/// Returns the network whose bridge a tap of this host is joined to.
fn network_of(tap: &str, networks: &[NetworkConfig]) -> Option<Label> {
    let master = std::fs::read_link(Path::new("/sys/class/net").join(tap).join("master")).ok()?;
    let bridge = master.file_name()?.to_str()?;
    networks.iter().find(|network| network.bridge == bridge).map(|network| network.name.clone())
}

fn without(mut text: String, suffix: &str) -> String {
    if text.ends_with(suffix) {
        text.truncate(text.len() - suffix.len());
    }
    text
}

/// Cuts a name to the length that an offer carries.
fn bounded(text: &str) -> String {
    text.chars()
        .scan(0, |bytes, c| {
            *bytes += c.len_utf8();
            (*bytes <= MAX_NAME_BYTES).then_some(c)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_macs_and_taps_in_what_the_monitor_tells() {
        let text = "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \
                    \\ net0: index=0,type=tap,ifname=lo,script=no,downscript=no\r\n";
        assert_eq!(nics(text, &[]), []);
    }

    #[test]
    fn names_are_cut_at_characters() {
        assert_eq!(bounded(&"é".repeat(MAX_NAME_BYTES)).len(), MAX_NAME_BYTES);
        assert_eq!(without("pc-q35-7.2-machine".into(), "-machine"), "pc-q35-7.2");
    }
}
