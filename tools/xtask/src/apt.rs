//! Packages of Debian that commands of this program need.

use std::process::Command;

use anyhow::{Context, Result, bail};

/// Installs packages.
///
/// # Errors
///
/// If this is not root, or apt finds no such package.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    println!("== installing {}", packages.join(" "));
    apt_get(&["update", "-q"])?;
    apt_get(&[&["install", "-qy", "--no-install-recommends"], packages].concat())
}

/// Returns those of `packages` that are not installed.
///
/// # Errors
///
/// If `dpkg-query` cannot be run: this is no Debian.
pub(crate) fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let mut missing = Vec::new();
    for package in packages {
        let mut query = Command::new("dpkg-query");
        let asked = query.args(["--show", "--showformat=${db:Status-Status}", package]).output();
        // It fails where it knows no package of that name.
        if asked.context("running dpkg-query")?.stdout != b"installed" {
            missing.push(*package);
        }
    }
    Ok(missing)
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .status()
        .context("running apt-get")?;
    if !status.success() {
        bail!("apt-get {} ended with {status}", arguments.join(" "));
    }
    Ok(())
}
