//! What an offer says about a guest in stock QEMU besides its shape.

use zerocopy::byteorder::little_endian::U32;

use crate::wire::error::WireError;
use crate::wire::reader::{Reader, count, put};

/// The largest number of disks of one guest.
pub const MAX_DISKS: usize = 64;
/// The longest path of a disk, and the longest name of a machine type or CPU model, in bytes.
pub const MAX_NAME_BYTES: usize = 4096;
/// The largest number of lines that say what a guest's QEMU is made of.
pub const MAX_PARTS: usize = 1024;
/// The length of the longest of these lines in bytes.
pub const MAX_PART_BYTES: usize = 512;
/// The length of the longest guest file in bytes.
pub const MAX_DEFINITION_BYTES: usize = 64 << 10;

/// What a destination must know of a guest in stock QEMU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QemuGuest {
    /// The machine type with its version, such as `pc-q35-7.2`.
    pub machine: String,
    /// The CPU model, such as `qemu64`.
    pub cpu: String,
    /// The accelerator that runs the guest's code: `kvm` or `tcg`.
    pub accelerator: String,
    /// The files and devices that hold the disks. The destination must have them under the same paths.
    pub disks: Vec<String>,
    /// The guest file from which the guest was started, and could be started at the destination. It is empty for a guest
    /// that was not started from a guest file.
    pub definition: String,
    /// What the guest's QEMU is made of now, in words, one line for each part: devices, memory modules, vCPUs, and what is in
    /// its drives. A QEMU that is to receive the guest has the same lines. It is empty if that is not known. Since version 4.
    pub parts: Vec<String>,
}

impl QemuGuest {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        for name in [&self.machine, &self.cpu, &self.accelerator] {
            put_long(out, name);
        }
        put(out, &U32::new(count(self.disks.len(), u32::MAX)));
        self.disks.iter().for_each(|disk| put_long(out, disk));
        put_long(out, &self.definition);
        if !self.parts.is_empty() {
            put(out, &U32::new(count(self.parts.len(), u32::MAX)));
            self.parts.iter().for_each(|part| put_long(out, part));
        }
    }

    /// Reads one, with its parts if it has any.
    pub(super) fn decode(reader: &mut Reader<'_>, has_parts: bool) -> Result<Self, WireError> {
        let [machine, cpu, accelerator] = [
            long(reader, "machine type of a guest", MAX_NAME_BYTES)?,
            long(reader, "CPU model of a guest", MAX_NAME_BYTES)?,
            long(reader, "accelerator of a guest", MAX_NAME_BYTES)?,
        ];
        let (found, limit) = (u64::from(reader.take::<U32>("count of disks")?.get()), MAX_DISKS as u64);
        if found > limit {
            return Err(WireError::TooLarge { what: "count of disks", found, limit });
        }
        let disks =
            (0..found).map(|_| long(reader, "path of a disk", MAX_NAME_BYTES)).collect::<Result<_, _>>()?;
        let definition = long(reader, "guest file", MAX_DEFINITION_BYTES)?;
        let mut parts = Vec::new();
        if has_parts {
            let (found, limit) = (u64::from(reader.take::<U32>("count of parts")?.get()), MAX_PARTS as u64);
            if found > limit {
                return Err(WireError::TooLarge { what: "count of parts", found, limit });
            }
            for _ in 0..found {
                parts.push(long(reader, "part of a guest's QEMU", MAX_PART_BYTES)?);
            }
        }
        Ok(Self { machine, cpu, accelerator, disks, definition, parts })
    }
}

/// Appends text with its length. The caller makes sure that a reader accepts that length.
fn put_long(out: &mut Vec<u8>, text: &str) {
    put(out, &U32::new(count(text.len(), u32::MAX)));
    out.extend_from_slice(text.as_bytes());
}

fn long(reader: &mut Reader<'_>, what: &'static str, limit: usize) -> Result<String, WireError> {
    let bytes = reader.take::<U32>(what)?.get();
    let text = reader.bytes(what, bytes.into(), limit)?;
    String::from_utf8(text.to_vec()).map_err(|_| WireError::Text(what))
}
