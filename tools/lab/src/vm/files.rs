//! The files that make a tree of Debian the system of a VM.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result};

use super::links::Link;
use crate::host::HostId;

/// The program that the kernel runs first. The kernel has no driver for the disk built in.
pub(super) const INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox insmod /virtio_blk.ko
until [ -b /dev/vda ]; do /bin/busybox usleep 20000; done
/bin/busybox mount -t ext4 -o rw,noatime /dev/vda /root
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /sbin/init
";

/// The units that never start: they would take the time of an emulated processor, and nobody would notice what they do.
const MASKED: [&str; 11] = [
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    "systemd-pstore.service",
    "systemd-networkd-wait-online.service",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-random-seed.service",
    "systemd-machine-id-commit.service",
    "remote-fs.target",
    "machines.target",
    "ssh.socket",
];

/// The units that start with the host, and the targets that want them. The tree of a host has them switched off.
const STARTED: [(&str, &str); 1] = [("systemd-networkd.service", "multi-user.target")];

/// Returns all files but keys: path from the root, and contents.
pub(super) fn all() -> Vec<(String, String)> {
    let mut hosts = String::from("127.0.0.1 localhost\n");
    for id in [HostId::A, HostId::B] {
        hosts += &format!("{} host-{}\n", id.address(0), id.letter());
    }
    let mut files = vec![
        ("etc/hosts".to_owned(), hosts),
        ("etc/fstab".to_owned(), "/dev/vda / ext4 rw,noatime 0 0\n".to_owned()),
        ("etc/ssh/sshd_config.d/memlane.conf".to_owned(), SSHD.to_owned()),
        // The log must be there after a loss of power, and must not fill the disk.
        (
            "etc/systemd/journald.conf.d/memlane.conf".to_owned(),
            "[Journal]\nStorage=persistent\nSystemMaxUse=64M\n".to_owned(),
        ),
    ];
    files.extend(Link::files().into_iter().map(|(name, text)| (format!("etc/systemd/network/{name}"), text)));
    files
}

/// Logins of the harness are no sessions of systemd's, which take a second each on an emulated processor; and there are many
/// of them on one connection.
const SSHD: &str = "UsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxSessions 100\n\
                    HostKey /etc/ssh/ssh_host_ed25519_key\n";

/// Writes all files into a tree, and the units that start and those that do not.
pub(super) fn write(root: &Path) -> Result<()> {
    for (path, text) in all() {
        write_file(&root.join(path), &text, 0o644)?;
    }
    let units = root.join("etc/systemd/system");
    for unit in MASKED {
        link("/dev/null", &units.join(unit))?;
    }
    for (unit, target) in STARTED {
        link(&format!("/lib/systemd/system/{unit}"), &units.join(format!("{target}.wants/{unit}")))?;
    }
    Ok(())
}

/// Writes a file, and makes the directories above it.
pub(super) fn write_file(path: &Path, text: &str, mode: u32) -> Result<()> {
    let parent = path.parent().context("a file has a directory")?;
    fs::create_dir_all(parent)
        .and_then(|()| fs::write(path, text))
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("writing {}", path.display()))
}

/// Returns a text that differs when anything differs that [`write`] does.
pub(super) fn recipe() -> String {
    format!("{:?} {MASKED:?} {STARTED:?} {INIT}", all())
}

fn link(to: &str, at: &Path) -> Result<()> {
    // A unit that is masked already, or that something else starts.
    let _ = fs::remove_file(at);
    let parent = at.parent().context("a file has a directory")?;
    fs::create_dir_all(parent)
        .and_then(|()| symlink(to, at))
        .with_context(|| format!("making the link {}", at.display()))
}
