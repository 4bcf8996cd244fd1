//! This module looks at what a QEMU is made of now: devices, vCPUs, memory modules, and what is in its drives.
//!
//! All of it is said in lines of plain words, one for each part, which are alike in two QEMUs if the parts are. So two
//! QEMUs are compared by their lines, whatever their versions, and an operator is told of a difference by the line.

use std::collections::{BTreeMap, BTreeSet};

use memlane_protocol::wire::control::{MAX_PART_BYTES, MAX_PARTS};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::qmp::{Qmp, items};
use crate::DriverError;

/// Devices on these buses are part of the board, and versions of QEMU name them in their own ways.
const BOARD: [&str; 4] = ["main-system-bus", "virtio-bus", "i2c", "isa.0"];
/// These limits may be set for a drive, by the names of `query-block`.
pub(super) const LIMITS: [&str; 13] = [
    "bps",
    "bps_rd",
    "bps_wr",
    "iops",
    "iops_rd",
    "iops_wr",
    "bps_max",
    "bps_rd_max",
    "bps_wr_max",
    "iops_max",
    "iops_rd_max",
    "iops_wr_max",
    "iops_size",
];

/// What a QEMU is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Parts {
    /// These are the devices.
    pub devices: Vec<Device>,
    /// These are memory modules and vCPUs, in words.
    pub modules: Vec<String>,
    /// These are the drives, by their names.
    pub drives: BTreeMap<String, Drive>,
    /// This is the identity that the guest is shown (`vmgenid`), if it has such a device.
    #[serde(default)]
    pub identity: Option<String>,
    /// These are the names of what devices use: block nodes, network back ends and memory back ends.
    pub backends: BTreeSet<String>,
}

/// A device on a bus.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Device {
    /// This is the name of the bus.
    pub bus: String,
    /// This is its type.
    pub kind: String,
    /// This is the name that it was given, or an empty text.
    pub id: String,
    /// This is where it is on the bus, as far as that is said.
    pub at: String,
}

/// What is in a drive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Drive {
    /// This is the file or the address, if there is a medium.
    pub file: Option<String>,
    /// This is the driver of its format.
    pub format: String,
    /// This tells whether it may not be written to.
    pub read_only: bool,
    /// These limits are set, by the names of `query-block`.
    pub limits: BTreeMap<String, u64>,
}

impl Parts {
    /// Asks QEMU.
    ///
    /// # Errors
    ///
    /// Fails if QEMU does not answer.
    pub(super) async fn look(qmp: &Qmp) -> Result<Self, DriverError> {
        let devices = devices(&qmp.human("info qtree").await?);
        let mut modules = Vec::new();
        let memory = qmp.execute("query-memory-devices", json!({})).await?;
        modules.extend(items(&memory).iter().map(memory_module));
        // Some machines have a fixed number, and know no such command.
        let cpus = match qmp.execute("query-hotpluggable-cpus", json!({})).await {
            Err(DriverError::Failed { .. }) => Value::Null,
            cpus => cpus?,
        };
        modules.extend(items(&cpus).iter().filter_map(vcpu));
        modules.sort();
        // QEMU refuses where there is no such device.
        let identity = match qmp.execute("query-vm-generation-id", json!({})).await {
            Err(DriverError::Failed { .. }) => None,
            answer => answer?["guid"].as_str().map(str::to_owned),
        };
        let blocks = qmp.execute("query-block", json!({})).await?;
        let drives = items(&blocks).iter().filter_map(drive).collect();
        let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true })).await?;
        let names = items(&nodes).iter().filter_map(|node| node["node-name"].as_str());
        // QEMU itself has named the others.
        let mut backends: BTreeSet<String> =
            names.filter(|name| !name.starts_with('#')).map(str::to_owned).collect();
        backends.extend(networks(&qmp.human("info network").await?));
        let memory = qmp.execute("query-memdev", json!({})).await?;
        backends.extend(items(&memory).iter().filter_map(|back| Some(back["id"].as_str()?.to_owned())));
        let parts = Self { devices, modules, drives, identity, backends };
        if parts.devices.len() + parts.modules.len() + 2 * parts.drives.len() >= MAX_PARTS {
            let reason = format!("it has more than {MAX_PARTS} devices and drives, which cannot be compared");
            return Err(DriverError::Failed { request: "look at its parts", reason });
        }
        Ok(parts)
    }

    /// Says what it is made of, one line for each part, in order.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.devices.iter().map(Device::to_string).collect();
        lines.extend(self.modules.iter().cloned());
        lines.extend(
            self.identity.iter().map(|guid| format!("generation identity {guid} (-device vmgenid,guid=)")),
        );
        lines.extend(self.drives.iter().flat_map(|(name, drive)| drive.lines(name)));
        for line in &mut lines {
            *line = plain(line);
        }
        lines.sort();
        lines.truncate(MAX_PARTS);
        lines
    }
}

/// Returns what is in `these` and not in `those`; both are in order, and a line may be there several times.
pub(super) fn missing<'a>(these: &'a [String], those: &[String]) -> Vec<&'a str> {
    let mut left: BTreeMap<&str, usize> = BTreeMap::new();
    those.iter().for_each(|line| *left.entry(line).or_default() += 1);
    let is_missing = |line: &&String| match left.get_mut(line.as_str()) {
        Some(count) if *count > 0 => {
            *count -= 1;
            false
        }
        _ => true,
    };
    these.iter().filter(is_missing).map(String::as_str).collect()
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { bus, kind, id, at } = self;
        let name = if id.is_empty() { String::new() } else { format!(" {id}") };
        write!(f, "device{name} ({kind}) on bus {bus}{at}")
    }
}

impl Drive {
    fn lines(&self, name: &str) -> Vec<String> {
        let holds = match &self.file {
            Some(file) => {
                format!("{file} ({}{})", self.format, if self.read_only { ", read-only" } else { "" })
            }
            None => "nothing".to_owned(),
        };
        let limits: Vec<String> = self.limits.iter().map(|(key, limit)| format!("{key}={limit}")).collect();
        let mut lines = vec![format!("drive {name} with {holds} in it")];
        if !limits.is_empty() {
            lines.push(format!("drive {name} limited to {}", limits.join(" ")));
        }
        lines
    }
}

/// Reads the tree of devices (`info qtree`). It is indented by two spaces for each step down.
fn devices(tree: &str) -> Vec<Device> {
    let mut buses: Vec<(usize, String)> = Vec::new();
    let mut devices: Vec<Device> = Vec::new();
    // This is how far the last device is indented, if it is one of ours.
    let mut last = None;
    for line in tree.lines() {
        if devices.len() > MAX_PARTS {
            break;
        }
        let text = line.trim_start();
        let indent = line.len() - text.len();
        if let Some(bus) = text.strip_prefix("bus: ") {
            buses.retain(|(at, _)| *at < indent);
            buses.push((indent, bus.trim_end().to_owned()));
        } else if let Some(device) = text.strip_prefix("dev: ") {
            buses.retain(|(at, _)| *at < indent);
            let bus = buses.last().map(|(_, bus)| bus.clone()).unwrap_or_default();
            let (kind, id) = device.trim_end().split_once(", id \"").unwrap_or((device, ""));
            last = (!BOARD.contains(&bus.as_str())).then_some(indent);
            if last.is_some() {
                let (kind, id) = (kind.to_owned(), id.trim_end_matches('"').to_owned());
                devices.push(Device { bus, kind, id, at: String::new() });
            }
        } else if last.is_some_and(|at| indent == at + 2)
            && let Some(device) = devices.last_mut()
            && let Some((key @ ("addr" | "scsi-id" | "lun" | "port" | "unit"), value)) =
                text.split_once(" = ")
        {
            let value = value.split_whitespace().next().unwrap_or_default().trim_matches('"');
            device.at.push_str(&format!(", {key} {value}"));
        }
    }
    devices.sort();
    devices
}

fn memory_module(module: &Value) -> String {
    let data = &module["data"];
    let number = |key: &str| data[key].as_u64().unwrap_or(0);
    let kind = module["type"].as_str().unwrap_or_default();
    let id = data["id"].as_str().unwrap_or_default();
    // Of virtio-mem, what is plugged now is part of its state.
    let (bytes, address) = match kind {
        "virtio-mem" => (number("max-size"), number("memaddr")),
        _ => (number("size"), number("addr")),
    };
    format!("memory module {id} ({kind}) of {bytes} bytes at {address:#x}")
}

/// Describes a vCPU that is there; others could be plugged.
fn vcpu(cpu: &Value) -> Option<String> {
    cpu["qom-path"].as_str()?;
    let of = |key: &str| {
        cpu["props"][key].as_u64().map(|number| format!(" {} {number}", key.trim_end_matches("-id")))
    };
    let place: String =
        ["socket-id", "die-id", "core-id", "thread-id"].iter().filter_map(|key| of(key)).collect();
    Some(format!("vCPU at{place}"))
}

fn drive(block: &Value) -> Option<(String, Drive)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let name =
        Some(text(&block["device"])).filter(|name| !name.is_empty()).unwrap_or_else(|| text(&block["qdev"]));
    let inserted = &block["inserted"];
    let limits =
        LIMITS.iter().filter_map(|key| Some((*key, inserted[*key].as_u64().filter(|limit| *limit > 0)?)));
    let drive = Drive {
        file: inserted["file"].as_str().filter(|_| inserted.is_object()).map(str::to_owned),
        format: text(&inserted["drv"]),
        read_only: inserted["ro"] == true,
        limits: limits.map(|(key, limit)| (key.to_owned(), limit)).collect(),
    };
    // A drive that no device has is not the guest's.
    let is_guests = !name.is_empty() && block["qdev"].is_string();
    is_guests.then_some((name, drive))
}

/// Finds the names of network back ends in the output of `info network`.
fn networks(text: &str) -> Vec<String> {
    let name = |line: &str| {
        let line = line.trim_start_matches([' ', '\\']);
        let (name, rest) = line.split_once(": index=")?;
        (!rest.contains("type=nic")).then(|| name.to_owned())
    };
    text.lines().filter_map(name).collect()
}

/// Makes a line that fits into an offer.
fn plain(line: &str) -> String {
    let mut text = memlane_protocol::wire::plain(line).into_owned();
    while text.len() > MAX_PART_BYTES {
        text.pop();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TREE: &str = "bus: main-system-bus\n  type System\n  dev: ioapic, id \"\"\n  dev: q35-pcihost, id \"\"\n    bus: pcie.0\n      \
        type PCIE\n      dev: pcie-root-port, id \"rp\"\n        addr = 05.0\n        chassis = 1 (0x1)\n        bus: rp\n          \
        dev: virtio-rng-pci, id \"\"\n            addr = 00.0\n            bus: virtio-bus\n              \
        dev: virtio-rng-device, id \"\"\n      dev: virtio-scsi-pci, id \"sc\"\n        addr = 02.0\n        bus: virtio-bus\n          \
        dev: virtio-scsi-device, id \"\"\n            bus: sc.0\n              dev: scsi-hd, id \"d1\"\n                \
        scsi-id = 0 (0x0)\n                lun = 3 (0x3)\n";

    #[test]
    fn devices_are_told_by_bus_and_place() {
        let lines: Vec<String> = devices(TREE).iter().map(Device::to_string).collect();
        assert_eq!(
            lines,
            [
                "device rp (pcie-root-port) on bus pcie.0, addr 05.0",
                "device sc (virtio-scsi-pci) on bus pcie.0, addr 02.0",
                "device (virtio-rng-pci) on bus rp, addr 00.0",
                "device d1 (scsi-hd) on bus sc.0, scsi-id 0, lun 3",
            ]
        );
    }

    #[test]
    fn a_drive_is_told_by_what_is_in_it() {
        let mut block = json!({
            "device": "cd", "qdev": "/machine/x",
            "inserted": { "file": "/srv/a.iso", "drv": "raw", "ro": true, "bps": 1000000, "iops": 0 },
        });
        let (name, found) = drive(&block).unwrap();
        let lines = ["drive cd with /srv/a.iso (raw, read-only) in it", "drive cd limited to bps=1000000"];
        assert_eq!(found.lines(&name), lines);
        block["inserted"] = Value::Null;
        let (name, found) = drive(&block).unwrap();
        assert_eq!(found.lines(&name), ["drive cd with nothing in it"]);
        block["qdev"] = Value::Null;
        assert!(drive(&block).is_none());
    }

    #[test]
    fn what_is_missing_is_counted() {
        let lines = |lines: &[&str]| lines.iter().map(|line| line.to_string()).collect::<Vec<_>>();
        let (these, those) = (lines(&["a", "b", "b", "c"]), lines(&["b", "c", "d"]));
        assert_eq!(missing(&these, &those), ["a", "b"]);
        assert_eq!(missing(&those, &these), ["d"]);
    }

    #[test]
    fn network_back_ends_are_named() {
        let text = "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci\r\n \\ net0: index=0,type=tap,ifname=x\r\nhub 0\r\n";
        assert_eq!(networks(text), ["net0"]);
    }
}
