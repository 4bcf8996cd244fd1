//! A guest of one sector, which does what it is told by a key.

use std::fs;
use std::path::Path;

use memlane_lab::LabHost;

/// It waits for a key (`int 0x16`): `s` suspends it (S3), and any other key powers it off (S5). It writes to the ACPI
/// control register, whose address QEMU's firmware sets to 0x604.
const CODE: [u8; 23] = [
    0x31, 0xc0, // xor ax, ax
    0xcd, 0x16, // int 0x16
    0xba, 0x04, 0x06, // mov dx, 0x604
    0x3c, b's', // cmp al, 's'
    0x74, 0x06, // je suspend
    0xb8, 0x00, 0x20, // mov ax, 0x2000
    0xef, // out dx, ax
    0xeb, 0xef, // jmp to the beginning
    0xb8, 0x00, 0x24, // suspend: mov ax, 0x2400
    0xef, // out dx, ax
    0xeb, 0xe9, // jmp to the beginning
];

/// Makes the disk of such a guest, and returns the arguments of a QEMU that boots it.
pub(crate) fn arguments(host: &LabHost) -> String {
    let disk = host.directory().join("sector.img");
    write(&disk);
    format!(
        "-drive file={},format=raw,if=none,id=sector,readonly=on -device virtio-blk-pci,drive=sector,bootindex=0",
        disk.display()
    )
}

fn write(disk: &Path) {
    /// Firmware finds no disk that has no cylinder.
    const DISK_BYTES: u64 = 8 << 20;
    let mut sector = [0; 512];
    sector[..CODE.len()].copy_from_slice(&CODE);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    fs::write(disk, sector).unwrap();
    fs::File::options().write(true).open(disk).unwrap().set_len(DISK_BYTES).unwrap();
}
