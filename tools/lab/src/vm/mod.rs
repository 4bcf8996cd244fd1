//! Two hosts that are virtual machines: each has a kernel of its own, systemd, AppArmor, KVM, and a disk that can lose its power.
//!
//! QEMU emulates their processors, with the instructions of AMD's virtualization, so that they have a /dev/kvm under which a
//! stock Linux boots, on any machine. What runs in them is ten to fifty times slower than elsewhere: nothing that they measure
//! says anything of speed.
//!
//! [`Hosts::start`] makes what it needs unless it is there: a [tree of Debian](crate::debian::Tree), an [`Image`] with a
//! kernel, and a snapshot of both hosts after they have booted, from which they go on in seconds.

mod arguments;
mod cables;
mod files;
mod hosts;
mod image;
mod links;
mod machine;
mod shell;
mod snapshot;

pub use hosts::Hosts;
pub use image::Image;
pub use machine::Machine;

use crate::qemu::Version;

/// Returns the QEMU that runs the hosts: the newest one, whose emulation of AMD's virtualization is the most complete.
fn emulator() -> Version {
    crate::qemu::VERSIONS[crate::qemu::VERSIONS.len() - 1]
}

/// Returns why there can be no VMs here yet; `None` if their image and their QEMU are there.
pub(crate) fn why_not() -> Option<String> {
    let made = Image::is_there() && emulator().program().exists();
    (!made).then(|| "there is no image for VMs (`cargo xtask test --vm` makes it)".into())
}
