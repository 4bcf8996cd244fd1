//! The requirements of a lab on its machine, so that tests can say why they were skipped.

use std::fmt;
use std::io::Write;
use std::path::Path;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::linux::Kernel;
use crate::{package, programs, qemu, vm};

/// The path of the ssh server. It must be started by its full path.
pub const SSHD: &str = "/usr/sbin/sshd";
/// The UEFI firmware OVMF as Debian has it: its code, and the file of variables that it begins with.
pub const OVMF: (&str, &str) = ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd");

/// A thing that a lab, or a program that runs in it, needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requirement {
    /// Root, with the right to make network namespaces.
    Root,
    /// `ip` of iproute2.
    Ip,
    /// `tc` of iproute2.
    Tc,
    /// A usable /dev/kvm.
    Kvm,
    /// [The QEMU](qemu::program) that labs use.
    Qemu,
    /// A kernel for Linux guests, unpacked already.
    Kernel,
    /// A kernel with FUSE.
    Fuse,
    /// The ssh server [`SSHD`], and the programs that come with it.
    Sshd,
    /// `systemd-analyze` of systemd, which need not run here.
    SystemdAnalyze,
    /// The firmware [`OVMF`].
    Ovmf,
    /// The TPM emulator `swtpm`.
    Swtpm,
    /// `prometheus`, and `promtool`, which comes with it.
    Prometheus,
    /// `systemd-nspawn`, which starts hosts of their own.
    Nspawn,
    /// [Memlane's package](crate::package), made already.
    Package,
    /// The image of [hosts that are VMs](vm::Hosts), made already, and the QEMU that runs them.
    Vms,
}

impl Requirement {
    /// The requirements of [`Lab::new`](crate::Lab::new).
    pub const LAB: &[Self] = &[Self::Root, Self::Ip, Self::Tc];

    /// The requirements of a lab with QEMU.
    pub const LAB_WITH_QEMU: &[Self] = &[Self::Root, Self::Ip, Self::Tc, Self::Qemu];

    /// The requirements of a lab with KVM guests.
    pub const LAB_WITH_KVM: &[Self] = &[Self::Root, Self::Ip, Self::Tc, Self::Kvm];

    /// The requirements of a lab with QEMU guests that run Linux.
    pub const LAB_WITH_LINUX: &[Self] = &[Self::Root, Self::Ip, Self::Tc, Self::Qemu, Self::Kernel];

    /// The requirements of a lab whose hosts systemd has started.
    pub const LAB_WITH_SYSTEMD: &[Self] = &[Self::Root, Self::Ip, Self::Tc, Self::Nspawn];

    /// The requirements of [hosts that are VMs](vm::Hosts).
    pub const LAB_WITH_VMS: &[Self] = &[Self::Root, Self::Ip, Self::Vms];

    /// The requirements of a lab with QEMU guests that run Linux and have a [disk](crate::LateDisk) whose reads end late.
    pub const LAB_WITH_LATE_DISK: &[Self] =
        &[Self::Root, Self::Ip, Self::Tc, Self::Qemu, Self::Kernel, Self::Fuse];
}

/// A requirement that is not met. Its text says what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingRequirement {
    /// The requirement that is not met.
    pub requirement: Requirement,
    reason: String,
}

impl fmt::Display for MissingRequirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// Returns those of `requirements` that are not met on this machine.
pub fn missing(requirements: &[Requirement]) -> Vec<MissingRequirement> {
    requirements
        .iter()
        .filter_map(|&requirement| Some(MissingRequirement { requirement, reason: reason(requirement)? }))
        .collect()
}

/// Returns why `requirements` are not met, in one line; `None` if they are met.
pub fn why_not(requirements: &[Requirement]) -> Option<String> {
    let reasons: Vec<String> = missing(requirements).iter().map(MissingRequirement::to_string).collect();
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

/// Returns whether `test` cannot run here, and if so prints a line on stderr that says why. This is for tests.
pub fn skip(test: &str, requirements: &[Requirement]) -> bool {
    if requirements.contains(&Requirement::Qemu) {
        qemu::note_test(test);
    }
    let reason = why_not(requirements);
    if let Some(reason) = &reason {
        say_skipped(test, reason);
    }
    reason.is_some()
}

/// Prints on stderr that `test` was skipped. It writes past the test runner, which hides the output of a test that
/// succeeds. This is for tests.
pub fn say_skipped(test: &str, reason: &str) {
    // Nothing can be done about a stderr that is gone.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

fn reason(requirement: Requirement) -> Option<String> {
    match requirement {
        Requirement::Root if !rustix::process::geteuid().is_root() => Some("not root (use sudo)".into()),
        Requirement::Root => network_namespaces(),
        Requirement::Ip => in_path("ip", "iproute2"),
        Requirement::Tc => in_path("tc", "iproute2"),
        Requirement::Kvm => kvm(),
        Requirement::Qemu => qemu::why_not(),
        Requirement::Fuse if Path::new("/dev/fuse").exists() => None,
        Requirement::Fuse => Some("there is no /dev/fuse (modprobe fuse)".into()),
        Requirement::Sshd if Path::new(SSHD).exists() => in_path("ssh", "openssh-client"),
        Requirement::Sshd => Some(format!("there is no {SSHD} (install openssh-server)")),
        Requirement::SystemdAnalyze => in_path("systemd-analyze", "systemd"),
        Requirement::Ovmf if Path::new(OVMF.0).exists() && Path::new(OVMF.1).exists() => None,
        Requirement::Ovmf => Some(format!("there is no {} (install ovmf)", OVMF.0)),
        Requirement::Swtpm => in_path("swtpm", "swtpm"),
        Requirement::Prometheus => {
            in_path("prometheus", "prometheus").or_else(|| in_path("promtool", "prometheus"))
        }
        Requirement::Vms => vm::why_not(),
        Requirement::Nspawn => in_path("systemd-nspawn", "systemd-container"),
        Requirement::Package if package::package().is_some() => None,
        Requirement::Package => {
            Some("Memlane's package is not made (`cargo xtask package --debug` does it)".into())
        }
        Requirement::Kernel if Kernel::present().is_some() => None,
        Requirement::Kernel => {
            Some("no kernel for Linux guests is unpacked (`cargo xtask test` does it)".into())
        }
    }
}

/// Tries to make a network namespace, on a thread whose end undoes it. Root in a container often lacks the capability.
fn network_namespaces() -> Option<String> {
    // SAFETY: a network namespace of its own leaves the thread's memory and descriptors alone.
    let tried = std::thread::spawn(|| unsafe { unshare_unsafe(UnshareFlags::NEWNET) });
    let error = tried.join().expect("the thread makes one system call").err()?;
    Some(format!("root here may not make network namespaces ({error}): CAP_SYS_ADMIN is needed"))
}

fn in_path(program: &str, package: &str) -> Option<String> {
    (!programs::in_path(program))
        .then(|| format!("`{program}` is not in PATH (install {package}; it may live in /usr/sbin)"))
}

fn kvm() -> Option<String> {
    let path = Path::new("/dev/kvm");
    let error = std::fs::OpenOptions::new().read(true).write(true).open(path).err()?;
    Some(format!("{} cannot be opened: {error}", path.display()))
}
