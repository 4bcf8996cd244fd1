//! Setting up what tests need of the machine, so that none of them is skipped for the lack of it.

use std::path::Path;

use anyhow::{Result, ensure};
use memlane_lab::debian::Tree;
use memlane_lab::linux::Kernel;
use memlane_lab::{Requirement, missing, qemu, why_not};

use crate::apt;

/// The Debian packages that tests need.
const PACKAGES: &[(Requirement, &str)] = &[
    (Requirement::Ip, "iproute2"),
    (Requirement::Tc, "iproute2"),
    (Requirement::Sshd, SSHD),
    // In a container it starts nothing.
    (Requirement::SystemdAnalyze, "systemd"),
    (Requirement::Ovmf, "ovmf"),
    (Requirement::Swtpm, "swtpm"),
    (Requirement::Prometheus, PROMETHEUS),
    (Requirement::Nspawn, "systemd-container"),
];
const SSHD: &str = "openssh-server";
const PROMETHEUS: &str = "prometheus";

/// Installs what is missing, if this runs as root. Tests that need it are skipped for other users anyway.
///
/// # Errors
///
/// If something cannot be had: tests that were skipped would only seem to pass.
pub(crate) fn bring() -> Result<()> {
    if why_not(&[Requirement::Root]).is_some() {
        return Ok(());
    }
    let mut packages: Vec<&str> =
        PACKAGES.iter().filter(|(need, _)| is_missing(*need)).map(|(_, package)| *package).collect();
    packages.dedup();
    // They would be started, now and whenever the machine is, and nobody asked for that.
    if Path::new("/run/systemd/system").exists() {
        packages.retain(|package| ![SSHD, PROMETHEUS].contains(package));
    }
    if !packages.is_empty() {
        apt::install(&packages)?;
        for (need, package) in PACKAGES {
            ensure!(
                !packages.contains(package) || !is_missing(*need),
                "{package} is installed now, and still lacks what tests need of it"
            );
        }
    }
    if is_missing(Requirement::Kernel) {
        println!("== fetching a kernel for Linux guests");
        println!("Linux {}", Kernel::obtain()?.release());
    }
    for version in qemu::VERSIONS {
        version.obtain()?;
    }
    Tree::HOST.obtain()?;
    Ok(())
}

fn is_missing(requirement: Requirement) -> bool {
    !missing(&[requirement]).is_empty()
}
