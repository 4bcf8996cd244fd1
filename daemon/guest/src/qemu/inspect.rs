//! This module asks QEMU about itself and its guest.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use memlane_kvm::ram::GuestRam;
use memlane_net::task;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::{MAX_DISKS, MAX_NAME_BYTES, QemuGuest};
use memlane_protocol::wire::machine::{
    CpuidEntry, GuestShape, MAX_CPUID_ENTRIES, MAX_NICS, Machine, Nic, TrackerKind,
};
use serde_json::{Value, json};

use super::QemuError;
use super::definition::{Definition, unicast_mac};
use super::qmp::{Qmp, items};
use super::ram::{self, MemoryPart};
use crate::DriverError;
use crate::config::NetworkConfig;
use crate::shim::Shims;

/// This driver was written for the `x-ignore-shared` and `fd:` migrations of QEMU from this version on.
const OLDEST: [u32; 3] = [7, 2, 0];
/// This is the format of the state: QEMU's own stream, which carries its versions itself.
const STATE_VERSION: u16 = 1;

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
    shims: &Shims,
) -> Result<Facts, QemuError> {
    let version = qmp.version();
    if version < OLDEST {
        return Err(QemuError::TooOld { found: version, oldest: OLDEST });
    }
    let parts = ram::parts(qmp, own_memory).await?;
    let (shape_regions, ram) = ram::map(&parts, qmp.pid(), shims).await?;
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
        parts: Vec::new(),
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
pub(super) async fn disks(qmp: &Qmp) -> Result<Vec<String>, DriverError> {
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
