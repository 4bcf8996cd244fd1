//! Logging in to a VM over ssh.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::image::Image;
use crate::child::die_with_parent;
use crate::process::LabProcess;
use crate::wait::wait_for;

/// The name of the file with which `ssh -F` reaches a VM.
pub(super) const CONFIG: &str = "ssh_config";
/// The time that `timeout` gives a program to end, in seconds.
const TO_END: u64 = 5;
/// The exit status of `timeout` when the time is over.
const OVER: i32 = 124;
/// The longest wait for ssh to share its connection, on a machine that is busy.
const SHARED: Duration = Duration::from_secs(60);

/// A connection with a VM that all commands share. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Shell {
    name: String,
    config: PathBuf,
    _master: LabProcess,
}

impl Shell {
    /// Writes into `directory` how ssh reaches the VM of that name, by a port of this machine's loopback.
    pub(super) fn configure(directory: &Path, name: &str, port: u16, image: &Image) -> Result<()> {
        let known = directory.join("known_hosts");
        fs::write(&known, format!("memlane-vm {}", image.host_key()?))
            .with_context(|| format!("writing {}", known.display()))?;
        let config = directory.join(CONFIG);
        let text = format!(
            "Host {name}\n  HostName 127.0.0.1\n  Port {port}\n  User root\n  BatchMode yes\n  LogLevel ERROR\n  \
             IdentityFile {key}\n  IdentitiesOnly yes\n  HostKeyAlias memlane-vm\n  UserKnownHostsFile {known}\n  \
             GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n  ConnectTimeout 10\n  \
             ServerAliveInterval 15\n  ServerAliveCountMax 8\n  ControlPath {socket}\n",
            key = image.client_key().display(),
            known = known.display(),
            socket = socket(directory).display(),
        );
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))
    }

    /// Logs in to the VM that `directory` has been [configured](Self::configure) for. Returns `None` if that fails, as it
    /// does until the VM's server is there.
    pub(super) fn open(directory: &Path, name: &str) -> Result<Option<Self>> {
        let config = directory.join(CONFIG);
        let mut command = ssh(&config);
        let output =
            command.args(["-o", "ControlPath=none", name, "true"]).output().context("running ssh")?;
        if !output.status.success() {
            return Ok(None);
        }
        let mut command = ssh(&config);
        command.args(["-o", "ControlMaster=yes", "-o", "ControlPersist=no", "-N", name]);
        die_with_parent(&mut command);
        let mut master = LabProcess::spawn("ssh", command, directory.join("ssh.log"))?;
        let shared = socket(directory);
        let started = wait_for("ssh to share its connection", SHARED, || {
            (shared.exists() || !master.is_running()).then_some(())
        });
        started.with_context(|| master.log_tail())?;
        ensure!(master.is_running(), "ssh to {name} has ended: {}", master.log_tail());
        Ok(Some(Self { name: name.to_owned(), config, _master: master }))
    }

    /// Runs a line of shell code there, with what is given on `stdin`, and waits for its end.
    ///
    /// # Errors
    ///
    /// If it cannot be run, or does not end within `limit`.
    pub(super) fn run(&self, line: &str, limit: Duration, stdin: Stdio) -> Result<Output> {
        let mut command = Command::new("timeout");
        command.args(["--foreground", &format!("--kill-after={TO_END}"), &limit.as_secs().to_string()]);
        command.args(["ssh", "-F"]).arg(&self.config).args([&self.name, line]).stdin(stdin);
        let output = command.output().context("running ssh")?;
        ensure!(output.status.code() != Some(OVER), "gave up on `{line}` on {} after {limit:?}", self.name);
        Ok(output)
    }
}

fn ssh(config: &Path) -> Command {
    let mut command = Command::new("ssh");
    command.arg("-F").arg(config).stdin(Stdio::null());
    command
}

/// Returns the socket by which commands share the connection.
fn socket(directory: &Path) -> PathBuf {
    directory.join("ssh")
}
