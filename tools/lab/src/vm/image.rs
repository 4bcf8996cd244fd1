//! The image: what both hosts boot from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::files;
use crate::cache;
use crate::debian::{Tree, install_tools};
use crate::linux::CpioArchive;
use crate::programs::{run, target_directory};

/// To be raised whenever the code below makes another image of the same parts.
const MAKER: &str = "1";
const ROLE: &str = "image";

/// The size of the disk. The file has holes where nothing was written.
const SIZE: &str = "6G";

/// Debian's backported kernel, and a program for what happens before its disk is there.
const KERNEL: Tree = Tree {
    role: "kernel",
    suite: "bookworm",
    backported: true,
    installed: false,
    packages: &["linux-image-cloud-amd64", "busybox-static"],
    masked: &[],
    asleep: &[],
};

/// The programs that make an image and start a machine from it, and their packages.
const TOOLS: [(&str, &str); 4] = [
    ("mke2fs", "e2fsprogs"),
    ("qemu-img", "qemu-utils"),
    ("ssh-keygen", "openssh-client"),
    ("xz", "xz-utils"),
];

const DISK: &str = "disk.raw";
const LINUX: &str = "vmlinuz";
const INITRD: &str = "initrd";
const HOST_KEY: &str = "host";
const CLIENT_KEY: &str = "client";

/// The disk, the kernel and the keys of VMs, in a folder below cargo's target directory. They are never written to.
#[derive(Debug, Clone)]
pub struct Image {
    folder: PathBuf,
}

impl Image {
    /// Returns the image. It makes it unless an earlier call has done so, which takes two or three minutes.
    ///
    /// # Errors
    ///
    /// If it is not there and this is not root, the packages cannot be had, or the disk has no room.
    pub fn obtain() -> Result<Self> {
        let image = Self::expected();
        let made = cache::obtain_keyed(&folder(), ROLE, &key(), |made| {
            let (tree, kernel) = (Tree::HOST.obtain()?, KERNEL.obtain()?);
            install_tools(&TOOLS)?;
            eprintln!("making the image of VMs");
            fs::create_dir(made).with_context(|| format!("creating {}", made.display()))?;
            make(made, &tree, &kernel)
        });
        made.with_context(|| format!("the image of VMs cannot be made in {}", image.folder.display()))?;
        Ok(image)
    }

    /// Returns whether the image is there already.
    pub fn is_there() -> bool {
        Self::expected().folder.is_dir()
    }

    /// Returns the raw disk. Machines write into layers above it.
    pub(super) fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
    }

    /// Returns the file for QEMU's `-kernel`.
    pub(super) fn kernel(&self) -> PathBuf {
        self.folder.join(LINUX)
    }

    /// Returns the file for QEMU's `-initrd`.
    pub(super) fn initrd(&self) -> PathBuf {
        self.folder.join(INITRD)
    }

    /// Returns the private key with which root may log in.
    pub(super) fn client_key(&self) -> PathBuf {
        self.folder.join(CLIENT_KEY)
    }

    /// Returns the public key by which both hosts are known.
    pub(super) fn host_key(&self) -> Result<String> {
        let path = self.folder.join(HOST_KEY).with_extension("pub");
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    fn expected() -> Self {
        Self { folder: folder().join(format!("{ROLE}-{}", key())) }
    }
}

/// Returns the folder for images and snapshots.
pub(super) fn folder() -> PathBuf {
    let target = target_directory();
    target.canonicalize().unwrap_or(target).join("memlane-vms")
}

/// Returns a text that differs between images of different parts.
pub(super) fn key() -> String {
    cache::key(&[MAKER, SIZE, &Tree::HOST.key(), &KERNEL.key(), &files::recipe()])
}

fn make(folder: &Path, tree: &Path, kernel: &Path) -> Result<()> {
    let release = release(kernel)?;
    let boot = kernel.join("boot").join(format!("vmlinuz-{release}"));
    fs::copy(&boot, folder.join(LINUX)).with_context(|| format!("copying {}", boot.display()))?;
    let modules = kernel.join("lib/modules").join(&release);
    fs::write(folder.join(INITRD), initrd(kernel, &modules)?).context("writing the initrd")?;
    for key in [HOST_KEY, CLIENT_KEY] {
        let path = text(&folder.join(key))?;
        run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-C", "memlane-lab", "-f", &path], folder)?;
    }

    let root = folder.join("root");
    run("cp", &["-a", &text(tree)?, &text(&root)?], folder)?;
    let there = root.join("usr/lib/modules");
    fs::create_dir_all(&there).with_context(|| format!("creating {}", there.display()))?;
    run("cp", &["-a", &text(&modules)?, &text(&there)?], folder)?;
    run("chroot", &[&text(&root)?, "depmod", &release], folder)?;
    files::write(&root)?;
    for (key, path, mode) in [
        (HOST_KEY.to_owned(), "etc/ssh/ssh_host_ed25519_key", 0o600),
        (format!("{HOST_KEY}.pub"), "etc/ssh/ssh_host_ed25519_key.pub", 0o644),
        (format!("{CLIENT_KEY}.pub"), "root/.ssh/authorized_keys", 0o600),
    ] {
        let text = fs::read_to_string(folder.join(&key)).with_context(|| format!("reading the key {key}"))?;
        files::write_file(&root.join(path), &text, mode)?;
    }

    let disk = text(&folder.join(DISK))?;
    run("mke2fs", &["-q", "-t", "ext4", "-d", &text(&root)?, &disk, SIZE], folder)?;
    fs::remove_dir_all(&root).with_context(|| format!("removing {}", root.display()))
}

/// Returns the archive that the kernel unpacks before it has a disk.
fn initrd(kernel: &Path, modules: &Path) -> Result<Vec<u8>> {
    let mut archive = CpioArchive::default();
    for directory in ["bin", "dev", "proc", "root"] {
        archive.directory(directory);
    }
    archive.file("init", files::INIT.as_bytes());
    let busybox = kernel.join("bin/busybox");
    let program = fs::read(&busybox).with_context(|| format!("reading {}", busybox.display()))?;
    archive.file("bin/busybox", &program);
    let module = modules.join("kernel/drivers/block/virtio_blk.ko.xz");
    let output = Command::new("xz").arg("-dc").arg(&module).output().context("running xz")?;
    ensure!(
        output.status.success(),
        "xz cannot read {}: {}",
        module.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    archive.file("virtio_blk.ko", &output.stdout);
    Ok(archive.finish())
}

/// Finds the version of the kernel that was unpacked.
fn release(kernel: &Path) -> Result<String> {
    let boot = kernel.join("boot");
    fs::read_dir(&boot)
        .with_context(|| format!("reading {}", boot.display()))?
        .flatten()
        .find_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned()))
        .with_context(|| format!("no kernel was unpacked into {}", boot.display()))
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("{} is no UTF-8", path.display()))
}
