//! Debian's cloud kernel, taken from its package.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::programs::{run, target_directory};

/// The name of a package that depends on the kernel's own package, whose name changes with every version.
const PACKAGE: &str = "linux-image-cloud-amd64";
const IMAGE: &str = "vmlinuz-";

/// A kernel and its modules, unpacked from a Debian package.
#[derive(Debug, Clone)]
pub struct Kernel {
    release: String,
    image: PathBuf,
    modules: PathBuf,
}

/// A module of the kernel.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) contents: Vec<u8>,
}

impl Kernel {
    /// Returns the kernel that an earlier call has left in cargo's target directory. If there is none, it downloads the
    /// kernel with `apt-get` and unpacks it there, without installing it.
    ///
    /// # Errors
    ///
    /// If it is not there and cannot be downloaded; the message says how to get it by hand.
    pub fn obtain() -> Result<Self> {
        if let Some(kernel) = Self::present() {
            return Ok(kernel);
        }
        let directory = directory();
        download(&directory).with_context(|| {
            format!(
                "no kernel for Linux guests: where there is a network, run `apt-get update`; else unpack a Debian \
                 kernel package with `dpkg-deb -x PACKAGE.deb {}`",
                directory.join("kernel").display()
            )
        })?;
        Self::present().with_context(|| format!("{PACKAGE} has left no kernel in {}", directory.display()))
    }

    /// Returns the kernel that has been unpacked already, if there is one.
    pub fn present() -> Option<Self> {
        let mut unpacked: Vec<PathBuf> =
            fs::read_dir(directory()).ok()?.flatten().map(|entry| entry.path()).collect();
        unpacked.sort();
        unpacked.iter().rev().find_map(|root| Self::in_package(root))
    }

    /// Returns the kernel's version, such as `6.1.0-56-cloud-amd64`.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Returns the file for QEMU's `-kernel`.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Returns the contents of the modules `names` and of all that they depend on, in an order in which they can be
    /// loaded. Modules that are built into the kernel are left out.
    pub(super) fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut files = BTreeMap::new();
        find_modules(&self.modules, &mut files)?;
        let mut ordered = Vec::new();
        for name in names {
            add_module(name, &files, &mut ordered)?;
        }
        Ok(ordered)
    }

    fn in_package(root: &Path) -> Option<Self> {
        let release = fs::read_dir(root.join("boot"))
            .ok()?
            .flatten()
            .find_map(|entry| Some(entry.file_name().to_str()?.strip_prefix(IMAGE)?.to_owned()))?;
        let image = root.join("boot").join(format!("{IMAGE}{release}"));
        let modules = root.join("lib/modules").join(&release);
        modules.is_dir().then_some(Self { release, image, modules })
    }
}

fn directory() -> PathBuf {
    target_directory().join("memlane-kernel")
}

fn download(directory: &Path) -> Result<()> {
    let package = concrete_package().or_else(|error| {
        // A fresh machine has no lists yet, and only root may fetch them.
        ensure!(rustix::process::geteuid().is_root(), error);
        run("apt-get", &["update", "-q"], Path::new("/"))?;
        concrete_package()
    })?;
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    // Unpacked under a name that nobody looks for, so that what is found is whole.
    let fetched =
        tempfile::Builder::new().prefix(".fetch-").tempdir_in(directory).context("making a directory")?;
    // As root, apt-get would like to be another user, who may not write here, and says so.
    run("apt-get", &["download", "-q", "-o", "APT::Sandbox::User=root", &package], fetched.path())?;
    let file = fs::read_dir(fetched.path())?
        .flatten()
        .find(|entry| entry.path().extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("`apt-get download {package}` has left no package"))?;
    let file = file.file_name().into_string().ok().context("the package's name is no UTF-8")?;
    run("dpkg-deb", &["-x", &file, "kernel"], fetched.path())?;
    match fs::rename(fetched.path().join("kernel"), directory.join(&package)) {
        // Another process was faster.
        Err(_) if Kernel::present().is_some() => Ok(()),
        result => result.context("putting the kernel in its place"),
    }
}

/// Finds the name of the package that contains the kernel itself.
fn concrete_package() -> Result<String> {
    let text = run("apt-cache", &["depends", "--important", PACKAGE], Path::new("/"))?;
    text.lines()
        .find_map(|line| {
            line.trim().strip_prefix("Depends: ").filter(|name| name.starts_with("linux-image-"))
        })
        .map(str::to_owned)
        .with_context(|| format!("apt knows no package that {PACKAGE} depends on"))
}

/// Finds the files of all modules under `directory`, by name.
fn find_modules(directory: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            find_modules(&path, found)?;
        } else if let Some(name) =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".ko"))
        {
            found.insert(canonical(name), path);
        }
    }
    Ok(())
}

fn add_module(name: &str, files: &BTreeMap<String, PathBuf>, ordered: &mut Vec<Module>) -> Result<()> {
    let name = canonical(name);
    let Some(file) = files.get(&name) else { return Ok(()) };
    if ordered.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let contents = fs::read(file).with_context(|| format!("reading the module {}", file.display()))?;
    for dependency in dependencies(&contents) {
        add_module(&dependency, files, ordered)?;
    }
    ordered.push(Module { name, contents });
    Ok(())
}

/// Reads from the module's section `.modinfo` what it depends on: `modules.dep` is only made when a kernel is
/// installed.
fn dependencies(module: &[u8]) -> Vec<String> {
    let text = module.split(|byte| *byte == 0).find_map(|word| word.strip_prefix(b"depends="));
    let text = String::from_utf8_lossy(text.unwrap_or_default());
    text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// Returns the name of a module as it is compared. Files may have `-` where names have `_`.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_depend_on() {
        let directory = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &[u8]| {
            fs::write(directory.path().join(name), text).expect("a file");
        };
        write("virtio-net.ko", b"\x7fELF\0license=GPL\0depends=net_failover,virtio\0");
        write("net_failover.ko", b"\0depends=failover\0");
        write("failover.ko", b"\0depends=\0");
        write("virtio.ko", b"nothing is said\0");
        write("other.ko", b"\0depends=virtio\0");
        let kernel =
            Kernel { release: "6.1".into(), image: "vmlinuz".into(), modules: directory.path().to_owned() };
        let names = |wanted: &[&str]| {
            let modules = kernel.modules(wanted).expect("modules");
            modules.into_iter().map(|module| module.name).collect::<Vec<_>>()
        };
        assert_eq!(
            names(&["virtio_net", "virtio", "built_in"]),
            ["failover", "net_failover", "virtio", "virtio_net"]
        );
    }
}
