//! The arguments of a VM's QEMU.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use super::cables::Ends;
use super::image::Image;
use super::links::{HARNESS, Link};
use crate::host::HostId;

/// Memory for the system, and for two guests of 512 MiB. What is never touched is never taken.
const MEMORY: &str = "2G";
const PROCESSORS: &str = "2";

/// Everything that the emulator can do: SVM with nested paging too, which KVM needs. With five levels of page tables, which no
/// kernel here needs, it is slower.
const PROCESSOR: &str = "max,la57=off";

/// A machine without what only takes time to find and to start.
const MACHINE: &str = "q35,usb=off,sata=off,smbus=off,hpet=off";

/// The parameters of the kernel. An emulated processor needs no mitigations, and its clock is always right. Auditing stays
/// on, since AppArmor tells there what it has denied.
const KERNEL_PARAMETERS: &str = "rw console=ttyS0 quiet loglevel=4 net.ifnames=0 mitigations=off nokaslr \
                                 tsc=reliable no_timer_check cryptomgr.notests random.trust_cpu=on audit=1";

/// The address of a name server that nobody asks: QEMU wants to have one.
const NAMES: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 253);

/// The places that a machine uses on this machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places<'a> {
    pub(super) image: &'a Image,
    /// The layer of the disk that it writes into.
    pub(super) disk: &'a Path,
    /// The open ends of its cables.
    pub(super) cables: &'a Ends,
    /// The TCP port on loopback that leads to its ssh server.
    pub(super) ssh: u16,
    pub(super) console: &'a Path,
    pub(super) monitor: &'a Path,
    /// The saved state that it goes on from, if it does not boot.
    pub(super) state: Option<&'a Path>,
}

/// Returns what the machine is. Two machines that differ here cannot go on from one saved state.
pub(super) fn hardware(host: HostId) -> Vec<String> {
    let kernel = format!("{KERNEL_PARAMETERS} systemd.hostname=host-{}", host.letter());
    let mut arguments = vec!["-nodefaults".to_owned(), "-no-user-config".to_owned()];
    arguments.extend(words(&[
        ("-machine", MACHINE),
        ("-accel", "tcg,thread=multi"),
        ("-cpu", PROCESSOR),
        ("-smp", PROCESSORS),
        ("-m", MEMORY),
        ("-display", "none"),
        ("-append", &kernel),
        ("-device", "virtio-blk-pci,drive=disk"),
        ("-device", "virtio-rng-pci"),
    ]));
    for link in Link::all() {
        // Without code to boot from the network.
        let device = format!("virtio-net-pci,netdev={},mac={},romfile=", link.interface(), link.mac(host));
        arguments.extend(words(&[("-device", &device)]));
    }
    arguments
}

/// Returns all arguments of a machine.
pub(super) fn all(host: HostId, places: &Places<'_>) -> Vec<String> {
    let mut arguments = hardware(host);
    arguments.extend(words(&[
        ("-kernel", &places.image.kernel().display().to_string()),
        ("-initrd", &places.image.initrd().display().to_string()),
        // QEMU hands all that the machine flushes to this machine's page cache before it answers, which is enough: the machine's
        // power is cut by killing QEMU, and never this machine's own.
        ("-drive", &format!("file={},if=none,id=disk,cache=unsafe", places.disk.display())),
        // Appended to, since a machine is started more than once.
        ("-chardev", &format!("file,id=console,path={},append=on", places.console.display())),
        ("-serial", "chardev:console"),
        ("-qmp", &format!("unix:{},server=on,wait=off", places.monitor.display())),
    ]));
    for link in Link::all() {
        arguments.extend(netdev(host, link, places));
    }
    if let Some(state) = places.state {
        arguments.extend(words(&[("-incoming", &format!("file:{}", state.display()))]));
    }
    arguments
}

/// Returns what a link leads to: the end of its cable, or the harness.
fn netdev(host: HostId, link: Link, places: &Places<'_>) -> Vec<String> {
    let name = link.interface();
    let end = places.cables.iter().find(|(of, _)| *of == link);
    let leads_to = match end {
        Some((_, tap)) => format!("tap,id={name},fd={}", tap.as_fd().as_raw_fd()),
        // Nothing but this one connection leads in, and none leads out.
        None => {
            let (port, address) = (places.ssh, host.address(0));
            format!(
                "user,id={name},restrict=on,ipv6=off,net={address}/24,host={HARNESS},dns={NAMES},\
                 hostfwd=tcp:127.0.0.1:{port}-{address}:22"
            )
        }
    };
    words(&[("-netdev", &leads_to)])
}

fn words(pairs: &[(&str, &str)]) -> Vec<String> {
    pairs.iter().flat_map(|(option, value)| [(*option).to_owned(), (*value).to_owned()]).collect()
}
