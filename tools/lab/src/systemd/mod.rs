//! A host that systemd has started, at the speed of this machine: `systemd-nspawn` boots a tree of Debian in namespaces
//! of its own, with the network of a lab's host.
//!
//! Units, credentials, the journal, upgrades and users are those of a real host. The kernel is this machine's, and so is
//! what only the kernel has: devices are made without udev, and no module is loaded.

mod cgroup;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Pid;

use crate::cleanup::Registration;
use crate::host::LabHost;
use crate::namespace;
use crate::process::LabProcess;
use crate::wait::wait_for;
use cgroup::Cgroup;

/// The longest wait for systemd to have started everything, on a machine that is busy.
const BOOT: Duration = Duration::from_secs(60);
/// Mounts the tree under a layer in memory, which takes what is written, and boots it. No mount is seen outside.
const SCRIPT: &str = r#"
mount -t tmpfs -o mode=0755 memlane "$2"
mkdir "$2/written" "$2/work" "$2/root"
mount -t overlay -o "lowerdir=$1,upperdir=$2/written,workdir=$2/work" memlane "$2/root"
echo "$3" > "$2/root/etc/hostname"
: > "$2/root/etc/fstab"
# It would want keys of its own, and nobody comes that way.
ln -sf /dev/null "$2/root/etc/systemd/system/ssh.service"
exec systemd-nspawn --quiet --register=no --keep-unit --boot --capability=all --console=pipe \
    --directory="$2/root" --machine="$3" --bind=/dev/net/tun systemd.show_status=0
"#;

/// A host that systemd has started. Dropping it kills everything that runs there, and removes what was written.
#[derive(Debug)]
pub struct SystemdHost {
    name: String,
    control_address: Ipv4Addr,
    first: Pid,
    process: LabProcess,
    _cleanup: Registration,
}

impl SystemdHost {
    /// Boots a tree of Debian on one of a lab's hosts, and waits until systemd has started everything. The tree itself is
    /// not changed.
    ///
    /// # Errors
    ///
    /// If `systemd-nspawn` cannot start it, or a unit fails.
    pub fn boot(host: &LabHost, tree: &Path) -> Result<Self> {
        for name in cgroup::names().into_iter().filter(|name| namespace::is_stale(name)) {
            cgroup::remove(&name);
        }
        let namespace = host.made_here()?;
        let cgroup_name = namespace.name().to_owned();
        let cleanup = Registration::new({
            let name = cgroup_name.clone();
            move || cgroup::remove(&name)
        });
        let cgroup = Cgroup::create(&cgroup_name)?;
        let place = host.directory().join("systemd");
        fs::create_dir(&place).with_context(|| format!("creating {}", place.display()))?;
        let mut command = Command::new("sh");
        command.args(["-eu", "-c", SCRIPT, "sh"]).args([tree, &place]).arg(host.name());
        // It would not let a service have what the service's unit lets it have.
        command.env("SYSTEMD_SECCOMP", "0");
        // As Debian boots, whatever this machine has.
        command.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1");
        namespace.confine_network(&mut command);
        cgroup.confine(&mut command)?;
        let mut process = LabProcess::spawn("systemd", command, host.directory().join("systemd.log"))?;
        let first = wait_for("systemd", BOOT, || {
            if !process.is_running() { Some(None) } else { first_process(process.pid()).map(Some) }
        });
        let first = first.with_context(|| process.log_tail())?;
        let first = first.with_context(|| format!("systemd-nspawn has ended: {}", process.log_tail()))?;
        let booted = Self {
            name: host.name().to_owned(),
            control_address: host.control_address(),
            first,
            process,
            _cleanup: cleanup,
        };
        booted.wait_until_started()?;
        booted.make_devices()?;
        Ok(booted)
    }

    /// Returns the name of the host.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the host's address on the control link.
    pub fn control_address(&self) -> Ipv4Addr {
        self.control_address
    }

    /// Returns the place on this machine at which a file of the host is found, for as long as the host runs.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.first.as_raw_nonzero()))
            .join(path.trim_start_matches('/'))
    }

    /// Returns a command that runs a program of the host as the host's root.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.first.as_raw_nonzero()));
        command.args(["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd"]);
        command.args(["--", "/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"]);
        command.args(["HOME=/root", "DEBIAN_FRONTEND=noninteractive", program]);
        command
    }

    /// Runs a command line in the host's shell, as root, and returns what it prints.
    ///
    /// # Errors
    ///
    /// If it fails; what it prints is in the error.
    pub fn run(&self, line: &str) -> Result<String> {
        let (code, text) = self.try_run(line)?;
        ensure!(code == 0, "`{line}` on {} ended with {code}: {}", self.name, text.trim());
        Ok(text)
    }

    /// Runs a command line as [`SystemdHost::run`] does, and returns its exit code, and what it prints on both outputs.
    ///
    /// # Errors
    ///
    /// If it cannot be run, or is killed.
    pub fn try_run(&self, line: &str) -> Result<(i32, String)> {
        let mut command = self.command("/bin/sh");
        command.args(["-c", &format!("exec 2>&1; {line}")]);
        let output = command.output().with_context(|| format!("running `{line}` on {}", self.name))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.code() {
            Some(code) => Ok((code, text)),
            None => bail!("`{line}` on {} was killed: {}", self.name, text.trim()),
        }
    }

    /// Writes a file on the host, for all to read, and the directories above it.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn write(&self, path: &str, contents: impl AsRef<[u8]>) -> Result<()> {
        let there = self.path(path);
        let written =
            there.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&there, contents));
        written.with_context(|| format!("writing {path} on {}", self.name))
    }

    /// Copies a file to the host.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or not be written there.
    pub fn copy(&self, file: &Path, to: &str) -> Result<()> {
        let copied = fs::copy(file, self.path(to));
        copied.with_context(|| format!("copying {} to {to} on {}", file.display(), self.name))?;
        Ok(())
    }

    fn wait_until_started(&self) -> Result<()> {
        let mut state = String::new();
        let started = wait_for("systemd to start everything", BOOT, || {
            state = self
                .try_run("systemctl is-system-running")
                .map_or_else(|error| error.to_string(), |said| said.1);
            ["running\n", "degraded\n"].contains(&state.as_str()).then_some(())
        });
        started.with_context(|| format!("it says: {}", state.trim()))?;
        ensure!(
            state == "running\n",
            "units failed on {}: {}",
            self.name,
            self.try_run("systemctl --failed --no-legend --plain")?.1
        );
        Ok(())
    }

    /// Makes the devices that udev would make.
    fn make_devices(&self) -> Result<()> {
        let misc = fs::read_to_string("/proc/misc").context("reading /proc/misc")?;
        let number = misc.lines().find_map(|line| line.trim().strip_suffix(" userfaultfd"));
        let number = number.context("this kernel has no /dev/userfaultfd")?;
        self.run(&format!("mknod -m 0600 /dev/userfaultfd c 10 {number}"))?;
        if Path::new("/dev/kvm").exists() {
            // One of its own, since the group has another number on this machine.
            self.run("mknod -m 0660 /dev/kvm c 10 232 && chgrp kvm /dev/kvm")?;
        }
        Ok(())
    }
}

impl Drop for SystemdHost {
    fn drop(&mut self) {
        // Whatever runs there ends with its first process.
        let _ = rustix::process::kill_process(self.first, rustix::process::Signal::KILL);
        let _ = self.process.kill();
    }
}

/// Returns the process that is the first one for itself, of those that a process has started.
fn first_process(parent: u32) -> Option<Pid> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_whitespace().find_map(|child| {
        let status = fs::read_to_string(format!("/proc/{child}/status")).ok()?;
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        let is_first = numbers.split_whitespace().nth(1) == Some("1");
        // Its program is systemd, once it is one.
        let name = status.lines().find_map(|line| line.strip_prefix("Name:"))?;
        (is_first && name.trim() == "systemd").then(|| Pid::from_raw(child.parse().ok()?))?
    })
}
