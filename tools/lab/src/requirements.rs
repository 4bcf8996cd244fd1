//! What a lab needs of the machine, so that tests can say why they were skipped.

use std::fmt;
use std::io::Write;
use std::path::Path;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::linux::Kernel;
use crate::{programs, qemu};

/// The ssh server that is used, which has to be started by its full path.
pub const SSHD: &str = "/usr/sbin/sshd";

/// Something that a lab, or what runs in it, needs.
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
    /// [`SSHD`], and what comes with it.
    Sshd,
}

impl Requirement {
    /// What [`Lab::new`](crate::Lab::new) needs.
    pub const LAB: &[Self] = &[Self::Root, Self::Ip, Self::Tc];

    /// What a lab with QEMU needs.
    pub const LAB_WITH_QEMU: &[Self] = &[Self::Root, Self::Ip, Self::Tc, Self::Qemu];

    /// What a lab with KVM guests needs.
    pub const LAB_WITH_KVM: &[Self] = &[Self::Root, Self::Ip, Self::Tc, Self::Kvm];

    /// What a lab with QEMU guests that run Linux needs.
    pub const LAB_WITH_LINUX: &[Self] = &[Self::Root, Self::Ip, Self::Tc, Self::Qemu, Self::Kernel];
}

/// A requirement that is not met. Displayed, it says what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// What is missing.
    pub requirement: Requirement,
    reason: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// Which of `requirements` are not met here.
pub fn missing(requirements: &[Requirement]) -> Vec<Missing> {
    requirements
        .iter()
        .filter_map(|&requirement| Some(Missing { requirement, reason: reason(requirement)? }))
        .collect()
}

/// Why `requirements` are not met, in one line; `None` if they are.
pub fn why_not(requirements: &[Requirement]) -> Option<String> {
    let reasons: Vec<String> = missing(requirements).iter().map(Missing::to_string).collect();
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

/// For tests: whether `test` cannot run here, with a line on stderr that says so.
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

/// For tests: says on stderr that `test` was skipped, past the runner, which keeps to itself
/// what a test prints that ends well.
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
        Requirement::Sshd if Path::new(SSHD).exists() => in_path("ssh", "openssh-client"),
        Requirement::Sshd => Some(format!("there is no {SSHD} (install openssh-server)")),
        Requirement::Kernel if Kernel::present().is_some() => None,
        Requirement::Kernel => {
            Some("no kernel for Linux guests is unpacked (`cargo xtask test` does it)".into())
        }
    }
}

/// Root in a container often lacks the capability: try it, on a thread whose end undoes it.
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
