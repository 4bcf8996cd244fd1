//! `mmdebstrap`, which unpacks packages of Debian with all that they depend on.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::archive::DebianArchive;
use crate::programs::{in_path, run};

/// The program and its package.
const MMDEBSTRAP: (&str, &str) = ("mmdebstrap", "mmdebstrap");

/// The packages that are unpacked together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bootstrap<'a> {
    /// The name of a Debian release.
    pub(crate) suite: &'a str,
    /// Whether what came later than the release, with its backports, is preferred.
    pub(crate) backported: bool,
    /// Whether the packages are installed as on a host, by their own scripts. Otherwise only their files are laid out.
    pub(crate) installed: bool,
    /// The packages. What they depend on comes with them, and what they recommend does not.
    pub(crate) packages: &'a [&'a str],
}

impl Bootstrap<'_> {
    /// Unpacks into `root`, where nothing may exist yet. It installs mmdebstrap on this machine first, if it is missing.
    ///
    /// # Errors
    ///
    /// If this is not root, or no archive has the packages.
    pub(crate) fn unpack(&self, root: &Path) -> Result<()> {
        let Self { suite, backported, installed, packages } = *self;
        ensure!(rustix::process::geteuid().is_root(), "that is for root (use sudo)");
        install_tools(&[MMDEBSTRAP])?;
        let path = root.to_str().context("a path that is no UTF-8")?;
        let variant = if installed { "--variant=minbase" } else { "--variant=extract" };
        let include = format!("--include={}", packages.join(","));
        let backports = format!("{suite}-backports");
        // What is backported is not taken unless that is asked for.
        let prefer = format!("--aptopt=APT::Default-Release \"{backports}\"");
        let mut last = None;
        for archive in DebianArchive::all()? {
            let sources = [archive.source(suite), archive.source(&backports)];
            // In namespaces of its own: /proc and /sys, which it mounts in the tree, are gone with it, so that nobody removes
            // them with an unfinished tree.
            let mut arguments = vec!["--mount", "--pid", "--fork", "--kill-child", MMDEBSTRAP.0];
            // What a crash of this machine leaves of an unfinished tree is of no use anyway.
            arguments.extend(["--quiet", "--dpkgopt=force-unsafe-io", variant, &include]);
            if backported {
                arguments.push(&prefer);
            }
            arguments.extend([suite, path, &sources[0]]);
            if backported {
                arguments.push(&sources[1]);
            }
            match run("unshare", &arguments, Path::new("/")) {
                // It names the archive, for nobody.
                Ok(_) => return remove_sources(root),
                Err(error) => last = Some(error),
            }
            let _ = fs::remove_dir_all(root);
        }
        Err(last.context("no archive was asked")?)
    }
}

/// Installs those of `tools` on this machine that are missing. Each is a program and the Debian package that has it.
///
/// # Errors
///
/// If apt cannot install one.
pub(crate) fn install_tools(tools: &[(&str, &str)]) -> Result<()> {
    let lacking: Vec<&str> =
        tools.iter().filter(|(program, _)| !in_path(program)).map(|(_, package)| *package).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let install = [&["install", "-qy", "--no-install-recommends"], &lacking[..]].concat();
    if run("apt-get", &install, Path::new("/")).is_err() {
        // A fresh machine has no lists yet, and others have old ones.
        run("apt-get", &["update", "-q"], Path::new("/"))?;
        run("apt-get", &install, Path::new("/"))?;
    }
    Ok(())
}

fn remove_sources(root: &Path) -> Result<()> {
    let apt = root.join("etc/apt");
    let _ = fs::remove_dir_all(apt.join("sources.list.d"));
    match fs::remove_file(apt.join("sources.list")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing the sources in {}", apt.display()))
        }
        _ => Ok(()),
    }
}
