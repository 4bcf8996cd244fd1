//! One VM.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::json;

use super::arguments::{self, Places};
use super::cables::Ends;
use super::emulator;
use super::image::Image;
use super::shell::Shell;
use crate::child::{die_with_parent, tail};
use crate::clock::unix_time;
use crate::host::HostId;
use crate::process::LabProcess;
use crate::programs::run;
use crate::qmp::Monitor;
use crate::wait::wait_for;

/// The longest wait for a boot, on a machine that is busy: it only bounds a failure.
const BOOT: Duration = Duration::from_secs(900);
/// The longest wait for a line of shell code, unless another limit is said.
const COMMAND: Duration = Duration::from_secs(300);
/// The longest wait for the memory of a machine to be read or written.
const STATE: Duration = Duration::from_secs(300);

/// What a machine begins with.
#[derive(Debug, Clone, Copy)]
pub(super) enum Beginning<'a> {
    /// It boots from this raw disk, which is not written to.
    Boot(&'a Path),
    /// It goes on from a saved state, with the layer of its disk that belongs to it. Neither is written to.
    GoOn { disk: &'a Path, state: &'a Path },
}

/// A host that is a virtual machine. Dropping it kills it.
#[derive(Debug)]
pub struct Machine {
    id: HostId,
    name: String,
    image: Image,
    /// The directory of its own files on this machine.
    directory: PathBuf,
    cables: Ends,
    /// What runs while it has power. The connection is dropped before QEMU is.
    shell: Option<Shell>,
    qemu: Option<LabProcess>,
}

impl Machine {
    /// Starts a machine with a disk of its own. Its files are kept below `lab`, a directory with a short path.
    pub(super) fn start(
        id: HostId,
        image: &Image,
        lab: &Path,
        cables: Ends,
        beginning: Beginning<'_>,
    ) -> Result<Self> {
        let directory = lab.join(id.letter());
        fs::create_dir(&directory).with_context(|| format!("creating {}", directory.display()))?;
        let mut machine = Self {
            id,
            name: format!("host-{}", id.letter()),
            image: image.clone(),
            directory,
            cables,
            shell: None,
            qemu: None,
        };
        let (disk, format, state) = match beginning {
            Beginning::Boot(disk) => (disk, "raw", None),
            Beginning::GoOn { disk, state } => (disk, "qcow2", Some(state)),
        };
        let own = machine.disk();
        let [disk, own] =
            [disk, &own].map(|path| path.to_str().context("a path that is no UTF-8").map(str::to_owned));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", format, "-b", &disk?, &own?], lab)?;
        machine.switch_on(state)?;
        Ok(machine)
    }

    /// Returns which of the two hosts it is.
    pub fn id(&self) -> HostId {
        self.id
    }

    /// Returns the host's name, `host-a` or `host-b`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the host's address on the control link.
    pub fn control_address(&self) -> Ipv4Addr {
        self.id.address(0)
    }

    /// Returns the host's address on port `index`.
    pub fn port_address(&self, index: u8) -> Ipv4Addr {
        self.id.address(1 + index)
    }

    /// Runs a line of shell code as root, and returns what it prints to stdout.
    ///
    /// # Errors
    ///
    /// If it fails, or does not end within five minutes. The error says what it printed, and what the console did.
    pub fn run(&self, line: &str) -> Result<String> {
        let output = self.try_run(line, COMMAND)?;
        if !output.status.success() {
            let [said, complained] =
                [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
            bail!(
                "`{line}` on {} failed with {}: {}\n{}\n{}",
                self.name,
                output.status,
                complained.trim(),
                said.trim(),
                self.last_words()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a line of shell code as root, and returns how it ended.
    ///
    /// # Errors
    ///
    /// If the host has no power, or the line does not end within `limit`.
    pub fn try_run(&self, line: &str, limit: Duration) -> Result<Output> {
        self.explain(self.shell()?.run(line, limit, Stdio::null()))
    }

    /// Writes a file on the host, for all to read, and the directories above it.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn write(&self, path: &str, contents: impl AsRef<[u8]>) -> Result<()> {
        let local = tempfile::NamedTempFile::new_in(&self.directory).context("making a file")?;
        fs::write(local.path(), contents).context("writing a file")?;
        self.copy_to(local.path(), path)?;
        self.run(&format!("chmod 644 {}", quoted(path))).map(drop)
    }

    /// Copies a file to the host, and makes the directories above it. Its mode is kept.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or not be written there.
    pub fn copy_to(&self, file: &Path, path: &str) -> Result<()> {
        let failed = || format!("copying {} to {path} on {}", file.display(), self.name);
        let input = File::open(file).with_context(failed)?;
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&input.metadata().with_context(failed)?.permissions());
        let (path, mode) = (quoted(path), mode & 0o7777);
        let line = format!("mkdir -p \"$(dirname {path})\" && cat > {path} && chmod {mode:o} {path}");
        let output = self.shell()?.run(&line, COMMAND, input.into()).with_context(failed)?;
        ensure!(output.status.success(), "{}: {}", failed(), String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// Copies a file of the host to this machine.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or not be written here.
    pub fn copy_from(&self, path: &str, file: &Path) -> Result<()> {
        let failed = || format!("copying {path} on {} to {}", self.name, file.display());
        let output = self.try_run(&format!("cat {}", quoted(path)), COMMAND).with_context(failed)?;
        ensure!(output.status.success(), "{}: {}", failed(), String::from_utf8_lossy(&output.stderr).trim());
        fs::write(file, output.stdout).with_context(failed)
    }

    /// Cuts the power: QEMU is killed, and with it everything that the host had in its memory. What the host had flushed to
    /// its disk is there when it is [started again](Self::start_again), and so is what it had written without a flush and
    /// QEMU had passed on already. The other ends of its cables stay.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn power_cut(&mut self) -> Result<()> {
        self.set_carriers(false)?;
        if let Some(mut qemu) = self.qemu.take() {
            qemu.kill().with_context(|| format!("killing the QEMU of {}", self.name))?;
        }
        self.shell = None;
        Ok(())
    }

    /// Gives the host its power back, and waits until it has booted.
    ///
    /// # Errors
    ///
    /// If it does not come up, or one of its units fails.
    pub fn start_again(&mut self) -> Result<()> {
        ensure!(self.qemu.is_none(), "{} has power already", self.name);
        self.set_carriers(true)?;
        self.switch_on(None)?;
        self.wait_until_started()
    }

    /// Connects to the monitor of the host's QEMU: for `inject-nmi`, `stop`, `set_link`, `query-status`. It serves one at a time.
    ///
    /// # Errors
    ///
    /// If the host has no power.
    pub fn monitor(&self) -> Result<Monitor> {
        ensure!(self.qemu.is_some(), "{} has no power", self.name);
        Monitor::connect(&self.monitor_socket())
    }

    /// Sets the host's clock by this machine's, as after a saved state was loaded: there no time had passed.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub fn set_clock(&self) -> Result<()> {
        self.run(&format!("date --set=@{:.6}", unix_time())).map(drop)
    }

    /// Returns the end of what the host has printed on its console, and of what its QEMU has complained of.
    pub fn last_words(&self) -> String {
        let said = tail(&self.console()).unwrap_or_default();
        let complained = tail(&self.directory.join("qemu.log")).unwrap_or_default();
        format!("the console of {}: {said}\nits QEMU: {complained}", self.name)
    }

    /// Waits until the host can be logged in to, and systemd has started everything.
    pub(super) fn wait_until_started(&mut self) -> Result<()> {
        self.log_in()?;
        let output = self.try_run("systemctl is-system-running --wait", BOOT)?;
        let state = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if state != "running" {
            let failed = self.run(
                "systemctl --failed --no-legend --plain; journalctl --boot --priority=err --no-pager --lines=20",
            )?;
            bail!("{} has booted and is {state:?}: {failed}\n{}", self.name, self.last_words());
        }
        Ok(())
    }

    /// Waits until the state that the host goes on from is loaded, logs in, and sets its clock.
    pub(super) fn wait_until_resumed(&mut self) -> Result<()> {
        let mut monitor = self.monitor_of_starting()?;
        let loaded = wait_for("the saved state to be loaded", STATE, || {
            match monitor.execute("query-status", json!({})) {
                Ok(status) => (status["status"] != "inmigrate").then_some(Ok(())),
                Err(error) => Some(Err(error)),
            }
        });
        self.explain(loaded.and_then(|loaded| loaded))?;
        // It was stopped when it was saved.
        self.explain(monitor.execute("cont", json!({})))?;
        drop(monitor);
        self.log_in()?;
        self.set_clock()
    }

    /// Stops the host, writes its memory to `state`, and ends it. Returns the layer of its disk, which belongs to that state.
    pub(super) fn save(&mut self, state: &Path) -> Result<PathBuf> {
        self.run("sync")?;
        // No connection shall be open in what goes on.
        self.shell = None;
        let mut monitor = self.monitor()?;
        monitor.execute("stop", json!({}))?;
        monitor.execute("migrate-set-parameters", json!({ "max-bandwidth": u32::MAX }))?;
        monitor.execute("migrate", json!({ "uri": format!("file:{}", state.display()) }))?;
        let saved = wait_for("the state to be saved", STATE, || {
            let told = monitor.execute("query-migrate", json!({}));
            match told.map(|told| (told["status"].as_str().unwrap_or_default().to_owned(), told)) {
                Ok((status, _)) if status == "completed" => Some(Ok(())),
                Ok((status, told)) if ["failed", "cancelled"].contains(&status.as_str()) => {
                    Some(Err(anyhow::anyhow!("QEMU says: {told}")))
                }
                Ok(_) => None,
                Err(error) => Some(Err(error)),
            }
        });
        saved.and_then(|saved| saved).with_context(|| format!("saving the state of {}", self.name))?;
        self.power_cut()?;
        Ok(self.disk())
    }

    fn switch_on(&mut self, state: Option<&Path>) -> Result<()> {
        // Somebody else may be faster to take it, which QEMU says then.
        let ssh = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|free| free.local_addr())
            .context("looking for a free port")?
            .port();
        Shell::configure(&self.directory, &self.name, ssh, &self.image)?;
        let ends: Vec<RawFd> = self.cables.iter().map(|(_, tap)| tap.as_fd().as_raw_fd()).collect();
        let arguments = arguments::all(
            self.id,
            &Places {
                image: &self.image,
                disk: &self.disk(),
                cables: &self.cables,
                ssh,
                console: &self.console(),
                monitor: &self.monitor_socket(),
                state,
            },
        );
        let mut command = Command::new(emulator().obtain()?);
        command.args(arguments);
        die_with_parent(&mut command);
        // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor takes locks. The taps
        // are open there, since they are open here until the machine is dropped.
        unsafe {
            command.pre_exec(move || {
                ends.iter()
                    .try_for_each(|end| Ok(fcntl_setfd(BorrowedFd::borrow_raw(*end), FdFlags::empty())?))
            });
        }
        self.qemu = Some(LabProcess::spawn("qemu", command, self.directory.join("qemu.log"))?);
        Ok(())
    }

    /// Gives all its cables but the harness's a carrier at this end, or takes it away. Without one, nothing waits in them.
    fn set_carriers(&self, on: bool) -> Result<()> {
        let set = self.cables.iter().try_for_each(|(_, tap)| tap.set_carrier(on));
        set.with_context(|| format!("setting the carriers of {}", self.name))
    }

    fn log_in(&mut self) -> Result<()> {
        let Self { directory, name, qemu, .. } = self;
        let opened = wait_for("the ssh server", BOOT, || match Shell::open(directory, name) {
            Ok(None) if qemu.as_mut().is_some_and(LabProcess::is_running) => None,
            Ok(None) => Some(Err(anyhow::anyhow!("QEMU has ended"))),
            Ok(Some(shell)) => Some(Ok(shell)),
            Err(error) => Some(Err(error)),
        });
        let opened = opened.and_then(|opened| opened).with_context(|| format!("logging in to {}", self.name));
        self.shell = Some(self.explain(opened)?);
        Ok(())
    }

    fn monitor_of_starting(&mut self) -> Result<Monitor> {
        let socket = self.monitor_socket();
        let qemu = self.qemu.as_mut().context("no power")?;
        let monitor = Monitor::connect_while(&socket, || qemu.is_running());
        self.explain(monitor)
    }

    /// Adds to an error what the host has said lately.
    fn explain<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| anyhow::anyhow!("{error:#}\n{}", self.last_words()))
    }

    fn shell(&self) -> Result<&Shell> {
        self.shell.as_ref().with_context(|| format!("{} has no power", self.name))
    }

    fn disk(&self) -> PathBuf {
        self.directory.join("disk.qcow2")
    }

    fn console(&self) -> PathBuf {
        self.directory.join("console")
    }

    fn monitor_socket(&self) -> PathBuf {
        self.directory.join("qmp")
    }
}

/// Returns a word as a shell reads it back.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
