//! Memlane in a lab: a daemon on each host, guests attached to them, and orders.

mod config;
mod output;

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memlane_keys::Authority;
use serde_json::Value;

use crate::host::{HostId, LabHost};
use crate::hosts::RemoteHosts;
use crate::lab::{Lab, LabOptions};
use crate::linux::LinuxGuest;
use crate::process::LabProcess;
use crate::programs::Programs;
use crate::rate::Rate;
use crate::user::DaemonUser;
use crate::vmm::LabVmm;
use crate::wait::wait_for;
use config::DaemonConfig;

pub use output::CtlOutput;

/// The longest wait for a daemon or a VMM to start, on a machine that is busy.
const START: Duration = Duration::from_secs(60);

/// The name of the socket of a daemon's API, in its host's directory.
const API_SOCKET: &str = "api.sock";

/// Two hosts with a daemon each.
pub struct Rig {
    programs: Programs,
    config: DaemonConfig,
    daemon_user: DaemonUser,
    /// Variables for the daemons' environment.
    environment: Vec<(String, String)>,
    daemons: [Option<LabProcess>; 2],
    started: u32,
    // Dropped last, after everything that runs in it.
    lab: Lab,
}

/// The settings of a [`Rig`] that differ from the defaults.
#[derive(Clone, Debug, Default)]
pub struct RigOptions {
    /// The hosts and their ports.
    pub lab: LabOptions,
    /// Keys to add to both configurations, before their tables.
    pub keys: String,
    /// Tables to add to both configurations, such as `[limits]`.
    pub tables: String,
    /// Whether each daemon starts QEMU for guests that the other one sends.
    pub may_start_guests: bool,
    /// Whether the traffic between the daemons is left unencrypted.
    pub insecure: bool,
    /// The user that both daemons run as.
    pub daemon_user: DaemonUser,
    /// Variables to add to the daemons' environment.
    pub environment: Vec<(String, String)>,
}

impl Rig {
    /// Makes the hosts and starts both daemons.
    ///
    /// # Errors
    ///
    /// If the lab cannot be made, or a daemon does not come up.
    pub fn new(programs: &Programs, options: RigOptions) -> Result<Self> {
        let lab = Lab::new(options.lab.clone())?;
        Self::start(programs, lab, options)
    }

    /// Reaches hosts that exist already and starts both daemons, with `tables` added to both configurations. `speed` is
    /// what each port carries, if that is known. If `insecure` is true, their traffic is not encrypted.
    ///
    /// # Errors
    ///
    /// If a host cannot be reached, or a daemon does not come up.
    pub fn over_ssh(
        programs: &Programs,
        hosts: &RemoteHosts,
        speed: Option<Rate>,
        tables: String,
        insecure: bool,
    ) -> Result<Self> {
        let lab = LabOptions { port_rate: speed, ..LabOptions::default() };
        Self::start(
            programs,
            Lab::over_ssh(hosts, programs)?,
            RigOptions { lab, tables, insecure, ..RigOptions::default() },
        )
    }

    fn start(programs: &Programs, lab: Lab, options: RigOptions) -> Result<Self> {
        let RigOptions { lab: of_lab, keys, tables, may_start_guests, insecure, daemon_user, environment } =
            options;
        let authority = if insecure { None } else { Some(Authority::new("lab")?) };
        let port_speed = of_lab.port_rate.map(|rate| format!("{}bit", rate.bits_per_second()));
        let mut rig = Self {
            programs: programs.clone(),
            config: DaemonConfig { keys, tables, authority, may_start_guests, port_speed },
            daemon_user,
            environment,
            daemons: [None, None],
            started: 0,
            lab,
        };
        for id in [HostId::A, HostId::B] {
            rig.daemon_user.settle(rig.lab.host(id))?;
            rig.config.write_keys(rig.lab.host(id), &rig.daemon_user)?;
            rig.write_config(id, "")?;
            rig.start_daemon(id)?;
        }
        Ok(rig)
    }

    /// Returns the lab with the two hosts.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Returns the daemon of a host.
    ///
    /// # Panics
    ///
    /// If it has been stopped.
    pub fn daemon(&mut self, id: HostId) -> &mut LabProcess {
        self.daemons[id as usize].as_mut().expect("the daemon has been started")
    }

    /// Returns the socket at which a host's daemon listens for orders, as it is reached from here.
    pub fn api_socket(&self, id: HostId) -> PathBuf {
        let host = self.lab.host(id);
        // Whoever asks has started the daemon, and that has reached its socket before.
        host.reach(API_SOCKET).unwrap_or_else(|_| host.directory().join(API_SOCKET))
    }

    /// Returns the path of a host's configuration file.
    pub fn config_file(&self, id: HostId) -> PathBuf {
        self.lab.host(id).directory().join("memlaned.toml")
    }

    /// Writes a host's configuration again, with `more` at its end. The daemon reads it at its next start.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write_config(&self, id: HostId, more: &str) -> Result<()> {
        let (host, peer) = (self.lab.host(id), self.lab.host(id.other()));
        let text = self.config.text(&self.programs, host, peer) + more;
        host.write(&self.config_file(id), &text)
    }

    /// Writes new keys for a host's daemon, which reads them at SIGHUP or at its next start.
    ///
    /// # Errors
    ///
    /// If they cannot be made or written.
    pub fn renew_keys(&self, id: HostId) -> Result<()> {
        self.config.write_keys(self.lab.host(id), &self.daemon_user)
    }

    /// Starts a host's daemon. If one runs, it is killed first.
    ///
    /// # Errors
    ///
    /// If it does not come up; the end of its log is in the error.
    pub fn start_daemon(&mut self, id: HostId) -> Result<()> {
        self.start_daemon_after(id, "")
    }

    /// Starts a host's daemon as [`Rig::start_daemon`] does, after the shell has run `script`, for which `$1` is the host's
    /// directory. Nobody else sees what the script mounts.
    ///
    /// # Errors
    ///
    /// If the script fails, or the daemon does not come up; the end of its log is in the error.
    pub fn start_daemon_after(&mut self, id: HostId, script: &str) -> Result<()> {
        self.spawn_daemon(id, script)?;
        let Self { daemons, lab, .. } = self;
        let host = lab.host(id);
        let daemon = daemons[id as usize].as_mut().expect("it has just been started");
        host.reach(API_SOCKET)?;
        let up = wait_for("the daemon", START, || {
            (!daemon.is_running() || host.listens(API_SOCKET)).then_some(())
        });
        up.with_context(|| daemon.log_tail())?;
        ensure!(daemon.is_running(), "memlaned has ended:\n{}", daemon.log_tail());
        Ok(())
    }

    /// Starts a host's daemon as [`Rig::start_daemon`] does, but returns at once.
    ///
    /// # Errors
    ///
    /// If the program cannot be started.
    pub fn start_daemon_unattended(&mut self, id: HostId) -> Result<()> {
        self.spawn_daemon(id, "")
    }

    fn spawn_daemon(&mut self, id: HostId, script: &str) -> Result<()> {
        self.stop_daemon(id)?;
        let (host, file) = (self.lab.host(id), self.config_file(id));
        let words = self.daemon_user.words(&host.program(&self.programs, "memlaned"));
        let mut command = after(script, host, host.directory(), &words[0]);
        command.args(&words[1..]).arg("--config").arg(file).envs(self.environment.iter().cloned());
        self.daemons[id as usize] = Some(host.spawn("memlaned", command)?);
        Ok(())
    }

    /// Kills a host's daemon (SIGKILL), as a crash would.
    ///
    /// # Errors
    ///
    /// If it cannot be killed.
    pub fn stop_daemon(&mut self, id: HostId) -> Result<()> {
        if let Some(mut daemon) = self.daemons[id as usize].take() {
            daemon.kill()?;
        }
        Ok(())
    }

    /// Starts a VMM on a host with `arguments` besides those that attach it, and waits until
    /// the daemon knows its guest.
    ///
    /// # Errors
    ///
    /// If it does not come up; the end of its log is in the error.
    pub fn start_vmm(&mut self, id: HostId, name: &str, arguments: &[String]) -> Result<LabVmm> {
        self.start_vmm_after(id, "", name, arguments)
    }

    /// Starts a VMM as [`Rig::start_vmm`] does, after the shell has run `script`, for which `$1` is the host's directory for
    /// memory. Nobody else sees what the script mounts.
    ///
    /// # Errors
    ///
    /// If the script fails, or the VMM does not come up; the end of its log is in the error.
    pub fn start_vmm_after(
        &mut self,
        id: HostId,
        script: &str,
        name: &str,
        arguments: &[String],
    ) -> Result<LabVmm> {
        let mut vmm = self.spawn_vmm(id, script, name, arguments)?;
        let attached = wait_for("the guest", START, || {
            let known = self.guest(id, name).is_ok_and(|guest| guest.is_some());
            (known || !vmm.process().is_running()).then_some(())
        });
        attached.with_context(|| vmm.process().log_tail())?;
        ensure!(vmm.process().is_running(), "memlane-vmm has ended:\n{}", vmm.process().log_tail());
        Ok(vmm)
    }

    /// Starts a VMM as [`Rig::start_vmm`] does, but returns at once.
    ///
    /// # Errors
    ///
    /// If the program cannot be started.
    pub fn start_vmm_unattended(&mut self, id: HostId, name: &str, arguments: &[String]) -> Result<LabVmm> {
        self.spawn_vmm(id, "", name, arguments)
    }

    fn spawn_vmm(&mut self, id: HostId, script: &str, name: &str, arguments: &[String]) -> Result<LabVmm> {
        self.started += 1;
        let host = self.lab.host(id);
        let control = format!("vmm{}.sock", self.started);
        let program = host.program(&self.programs, "memlane-vmm");
        let mut command = after(script, host, host.memory_directory(), program.as_os_str());
        command.args(["--name", name]).arg("--attach").arg(host.directory().join("attach.sock"));
        command.arg("--control").arg(host.directory().join(&control)).args(arguments);
        let process = host.spawn(&format!("vmm{}", self.started), command)?;
        Ok(LabVmm::new(process, host.reach(&control)?))
    }

    /// Prepares both hosts for a Linux guest, with a tap on each, and writes its guest file. Returns the path of that
    /// file.
    ///
    /// # Errors
    ///
    /// If the taps are there already, or the file cannot be written.
    pub fn prepare_linux(&self, guest: &LinuxGuest) -> Result<PathBuf> {
        for host in self.lab.hosts() {
            host.add_tap(&guest.tap)?;
        }
        guest.make_console()?;
        let file = self.lab.host(HostId::A).directory().join(format!("{}.toml", guest.name));
        std::fs::write(&file, guest.file()).with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    }

    /// Asks a host's daemon about a guest; returns `None` if the daemon does not know it.
    ///
    /// # Errors
    ///
    /// If the daemon does not answer.
    pub fn guest(&self, id: HostId, name: &str) -> Result<Option<Value>> {
        let answer = self.ctl(id, &["guests"])?;
        let guests =
            answer.last()?.as_array().with_context(|| format!("no list of guests: {}", answer.text))?;
        Ok(guests.iter().find(|guest| guest["name"] == name).cloned())
    }

    /// Reads the metrics of a host's daemon, in Prometheus' text format.
    ///
    /// # Errors
    ///
    /// If the daemon does not answer.
    pub fn metrics(&self, id: HostId) -> Result<String> {
        let mut stream = UnixStream::connect(self.api_socket(id)).context("connecting to the daemon")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: memlaned\r\nConnection: close\r\n\r\n")?;
        let answer = io::read_to_string(stream).context("reading the daemon's metrics")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("the daemon's answer has no end")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "the daemon returns no metrics: {head}");
        Ok(body.to_owned())
    }

    /// Returns a `memlanectl` command for a host's daemon.
    pub fn ctl_command(&self, id: HostId, arguments: &[&str]) -> Command {
        let mut command = self.lab.host(id).command(self.programs.path("memlanectl"));
        command.arg("--socket").arg(self.api_socket(id)).args(arguments);
        command
    }

    /// Follows a migration to its end with `memlanectl --json watch`. It calls `look` with each state that is reported,
    /// and returns the last one.
    ///
    /// # Errors
    ///
    /// If `memlanectl` cannot be run, or tells nothing; what it says else goes to stderr.
    pub fn watch(&self, id: HostId, migration: &str, mut look: impl FnMut(&Value)) -> Result<Value> {
        let mut command = self.ctl_command(id, &["--json", "watch", migration]);
        let mut child = command.stdout(Stdio::piped()).spawn().context("running memlanectl")?;
        let mut last = None;
        for line in BufReader::new(child.stdout.take().expect("it is piped")).lines() {
            let state = serde_json::from_str(&line.context("reading what memlanectl says")?)
                .context("memlanectl watch said what is no JSON")?;
            look(&state);
            last = Some(state);
        }
        child.wait().context("waiting for memlanectl")?;
        last.with_context(|| format!("memlanectl watch printed nothing about {migration}"))
    }

    /// Runs `memlanectl --json` against a host's daemon.
    ///
    /// # Errors
    ///
    /// If it cannot be run, or is killed. Its own failures are in the answer's code.
    pub fn ctl(&self, id: HostId, arguments: &[&str]) -> Result<CtlOutput> {
        let mut command = self.ctl_command(id, &["--json"]);
        let Output { status, stdout, stderr } =
            command.args(arguments).output().context("running memlanectl")?;
        let stdout = String::from_utf8_lossy(&stdout);
        let json = stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let text = format!("{stdout}{}", String::from_utf8_lossy(&stderr));
        Ok(CtlOutput { code: status.code().context("memlanectl was killed")?, json, text })
    }
}

/// Returns a command that runs `program` on the host, after the shell has run `script` with this directory as its `$1`.
fn after(script: &str, host: &LabHost, directory: &Path, program: impl AsRef<OsStr>) -> Command {
    if script.is_empty() {
        return host.command(program);
    }
    let mut command = host.command("sh");
    command.args(["-e", "-c", &format!("{script}\nshift\nexec \"$@\""), "sh"]).arg(directory).arg(program);
    command
}
