//! A Linux guest: its parts, and how they are described to QEMU and to Memlane.

use std::fmt;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{Initramfs, Kernel};
use crate::lan::Lan;
use crate::qemu;
use crate::size::Size;

/// The kernel's parameters. A boot on an emulated processor takes seconds, so everything that is not needed is left
/// out. Warnings are printed (level 4), so that a kernel that hangs says where. The guest uses memory that is
/// plugged in.
const KERNEL_PARAMETERS: &str = "console=ttyS0 loglevel=5 panic=-1 mitigations=off nokaslr random.trust_cpu=on \
                                 tsc=reliable no_timer_check cryptomgr.notests audit=0 \
                                 memhp_default_state=online";

/// The executor of the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor executes them, through /dev/kvm.
    Kvm,
    /// QEMU translates and executes them itself.
    Tcg,
}

/// A Linux guest under QEMU.
#[derive(Debug, Clone)]
pub struct LinuxGuest {
    /// The guest's name.
    pub name: String,
    /// The kernel that it boots.
    pub kernel: Kernel,
    /// The initramfs that it boots into.
    pub initramfs: Initramfs,
    /// The program that is its VMM.
    pub qemu: PathBuf,
    /// The executor of the guest's instructions.
    pub accelerator: Accelerator,
    /// The number of virtual processors. As many threads write and check memory.
    pub vcpus: u16,
    /// The size of the guest's RAM.
    pub ram: Size,
    /// Whether QEMU takes all of the RAM from the system when it starts.
    pub prealloc: bool,
    /// The memory that the threads write. Only Linux itself touches the rest.
    pub working_set: Size,
    /// The number of pages that all threads together write in a second.
    pub rate: u64,
    /// The hardware address of the guest's network interface.
    pub mac: [u8; 6],
    /// The name of the tap that the interface is connected to, on either host.
    pub tap: String,
    /// The IPv4 address of the interface.
    pub address: Ipv4Addr,
    /// The file that receives what the guest prints on its console, on whichever host it runs.
    pub console: PathBuf,
    /// The names, as Linux gives them, of the disks that the guest reads and checks all the time.
    pub disks: Vec<String>,
    /// Whether the kernel carries the guest's packets (vhost-net) instead of QEMU.
    pub vhost: bool,
    /// Further arguments for QEMU.
    pub arguments: Vec<String>,
}

impl Accelerator {
    /// Chooses KVM if a stock Linux can be expected to boot under it, else TCG, and says why.
    pub fn choose() -> (Self, &'static str) {
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let kvm = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        Self::of(&processor, kvm)
    }

    /// Chooses the accelerator of a host that has such a /proc/cpuinfo, and a usable /dev/kvm if `kvm`.
    pub fn of(processor: &str, kvm: bool) -> (Self, &'static str) {
        if !kvm {
            (Self::Tcg, "/dev/kvm cannot be opened")
        } else if !processor.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
            // There are such machines: their KVM does without the processor's help, and only so much of its work.
            (
                Self::Tcg,
                "the processor has neither vmx nor svm, and no stock Linux boots under a KVM without them",
            )
        } else {
            (Self::Kvm, "/dev/kvm is there")
        }
    }

    /// Returns the name that QEMU's `-accel` uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl LinuxGuest {
    /// Describes a guest called `web1` with one vCPU, 512 MiB of RAM, and a quarter of it in use.
    pub fn new(kernel: Kernel, initramfs: Initramfs, accelerator: Accelerator, console: PathBuf) -> Self {
        Self {
            name: "web1".into(),
            kernel,
            initramfs,
            qemu: qemu::program(),
            accelerator,
            vcpus: 1,
            ram: Size::from_mib(512),
            prealloc: false,
            working_set: Size::from_mib(128),
            rate: 2000,
            mac: [0x52, 0x54, 0, 0x4d, 0x4c, 1],
            tap: "tap-web1".into(),
            address: Lan::GUEST,
            console,
            disks: Vec::new(),
            vhost: false,
            arguments: Vec::new(),
        }
    }

    /// Makes the file that receives what the guest prints, for QEMUs of any user.
    ///
    /// # Errors
    ///
    /// If it cannot be made.
    pub fn make_console(&self) -> Result<()> {
        fs::File::create(&self.console)
            .and_then(|file| file.set_permissions(PermissionsExt::from_mode(0o666)))
            .with_context(|| format!("making the console's file {}", self.console.display()))
    }

    /// Returns the hardware address as text.
    pub fn mac_text(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }

    /// Returns the arguments for QEMU, without those for name, RAM, network and monitor. The program that starts QEMU
    /// adds these.
    pub fn qemu_arguments(&self) -> Vec<String> {
        let processor = match self.accelerator {
            Accelerator::Kvm => "host",
            // An old model has less to emulate.
            Accelerator::Tcg => "Nehalem",
        };
        // Appended to, since two QEMUs have it open when the guest moves.
        let console = format!("file,id=console,path={},append=on", self.console.display());
        let (kernel, initramfs) = (self.kernel.image().display(), self.initramfs.file().display());
        let pairs = [
            ("-machine", "q35".to_owned()),
            ("-accel", self.accelerator.to_string()),
            ("-cpu", processor.to_owned()),
            ("-smp", self.vcpus.to_string()),
            ("-display", "none".to_owned()),
            ("-chardev", console),
            ("-serial", "chardev:console".to_owned()),
            ("-kernel", kernel.to_string()),
            ("-initrd", initramfs.to_string()),
            ("-append", self.command_line()),
        ];
        let mut arguments = vec!["-nodefaults".to_owned(), "-no-user-config".to_owned()];
        arguments.extend(pairs.into_iter().flat_map(|(option, value)| [option.to_owned(), value]));
        arguments.extend(self.arguments.iter().cloned());
        arguments
    }

    /// Returns the text of the guest file for `memlanectl launch`.
    pub fn file(&self) -> String {
        let Self { name, ram, prealloc, tap, vhost, .. } = self;
        let qemu = self.qemu.display();
        // JSON's strings are TOML's basic strings.
        let arguments = serde_json::Value::from(self.qemu_arguments());
        format!(
            "name = \"{name}\"\nmemory = \"{ram}\"\nprealloc = {prealloc}\nqemu = \"{qemu}\"\narguments = {arguments}\n\
             [[nic]]\nmac = \"{mac}\"\ntap = \"{tap}\"\nnetwork = \"lan\"\nvhost = {vhost}\n",
            mac = self.mac_text(),
        )
    }

    fn command_line(&self) -> String {
        let Self { vcpus, rate, address, .. } = self;
        let disks = self.disks.join(",");
        let disks = if disks.is_empty() { disks } else { format!(" memlane.disks={disks}") };
        format!(
            "{KERNEL_PARAMETERS} memlane.address={address}/{prefix} memlane.memory={memory} \
             memlane.checkers={vcpus} memlane.rate={rate}{disks}",
            prefix = Lan::PREFIX,
            memory = self.working_set.bytes(),
        )
    }
}
