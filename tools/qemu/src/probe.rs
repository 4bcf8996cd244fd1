//! Managers start QEMU without a guest as well, to learn what it can do. Such a QEMU is started as it is.

use std::ffi::OsString;

use crate::line::{Item, items};
use memlane_qmp::options::{Options, Properties};

/// The values of these options are texts of the guest's, in which `help` is a word like any other.
const FREE_TEXT: [&str; 7] = ["append", "fw_cfg", "initrd", "kernel", "name", "smbios", "uuid"];

/// Tells whether a command line asks about QEMU, and runs no guest.
pub(crate) fn is_probe(arguments: &[OsString]) -> bool {
    let items = items(arguments);
    let has = |name: &str| items.iter().any(|item| item.name == name);
    // Incus and Proxmox start a stopped machine without a name, and ask it by its monitor.
    let is_nameless = has("S") && !has("name") && !has("readconfig");
    arguments.is_empty() || is_nameless || items.iter().any(asks)
}

fn asks(item: &Item<'_>) -> bool {
    if matches!(item.name, "h" | "help" | "version" | "audio-help") {
        return true;
    }
    let Some(text) = item.text() else { return false };
    if matches!(item.name, "machine" | "M")
        && Options::parse(text, "type").get("type").is_some_and(|kind| kind == "none" || is_help(&kind))
    {
        return true;
    }
    // A doubled comma stands for one, and leaves an empty part between two.
    !FREE_TEXT.contains(&item.name) && text.split(',').any(is_help)
}

fn is_help(word: &str) -> bool {
    matches!(word, "help" | "?")
}

#[cfg(test)]
mod tests {
    fn is_probe(line: &str) -> bool {
        super::is_probe(&line.split_whitespace().map(Into::into).collect::<Vec<_>>())
    }

    #[test]
    fn what_asks_about_qemu_is_a_probe() {
        for line in [
            "",
            "-version",
            "--help",
            "-h",
            "-cpu help",
            "-machine help",
            "-M ?",
            "-machine type=help",
            "-device virtio-blk-pci,help",
            "-m 2G -object memory-backend-ram,help",
            "-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg -qmp unix:/x -daemonize",
            "-M type=none",
            // Incus asks for the features of a machine in this way, and Proxmox for CPU flags in the next one.
            "-S -nographic -nodefaults -no-user-config -chardev socket,id=monitor,path=/x -qmp chardev:monitor -machine q35",
            "-machine pc -display none -pidfile /x -S -daemonize -accel tcg",
        ] {
            assert!(is_probe(line), "{line}");
        }
    }

    #[test]
    fn a_guest_is_no_probe() {
        for line in [
            "-m 2G disk.img",
            "-name help -m 2G",
            "-append help",
            "-S -name web1",
            "-S -readconfig /x",
            "-machine nonesuch",
            "-device virtio-blk-pci,drive=helpful",
        ] {
            assert!(!is_probe(line), "{line}");
        }
    }
}
