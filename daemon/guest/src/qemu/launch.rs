//! This module starts QEMU.

use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use memlane_net::task;
use memlane_protocol::wire::{Label, plain};
use tracing::{debug, warn};

use super::definition::{Definition, Paths};
use super::qmp::Qmp;
use super::state_directory::{Record, paths};
use super::{Lacking, QemuError};
use crate::config::QemuSettings;
use crate::process::{Process, ProcessError};

/// A QEMU that is starting is looked at in these intervals.
const LOOK: Duration = Duration::from_millis(5);
/// A QEMU may take this long until its monitor answers: it may have to take all RAM from the host first.
const PATIENCE: Duration = Duration::from_secs(60);
/// A process that was told to end, or has ended, is waited for this long.
const ENDING: Duration = Duration::from_secs(20);
/// If QEMU fails, this many bytes of the end of its log are shown.
const TAIL_BYTES: u64 = 1000;

/// A QEMU whose monitor can be connected to.
pub(super) struct Started {
    /// QEMU's output goes to this file.
    pub log: PathBuf,
    /// This is the process itself, or the one that waits for systemd's unit to end. It must be collected when it ends.
    pub child: Child,
    unit: Option<String>,
}

impl Started {
    /// Ends a QEMU that was started in vain, and removes what it leaves behind.
    pub(super) async fn end(mut self, record: Record) {
        let end = move || {
            if let Some(unit) = &self.unit {
                let mut stop = manager("systemctl");
                let stopped = stop.args(["stop", unit]).stdin(Stdio::null()).spawn();
                let stopped = stopped.map(|mut stopping| collect(&mut stopping));
                debug!(unit, ?stopped, "stopping a unit");
            }
            let _ = self.child.kill();
            collect(&mut self.child);
            record.remove_files();
        };
        task::aside(end).await;
    }
}

/// Waits for a process that has ended, or is about to, for at most 20 seconds. It must be called on a thread that has
/// nothing else to do.
pub(super) fn collect(child: &mut Child) -> Option<ExitStatus> {
    let until = Instant::now() + ENDING;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => std::thread::sleep(LOOK),
            Ok(None) => {
                warn!(pid = child.id(), "a process does not end; it is killed, and not waited for any more");
                let _ = child.kill();
                return None;
            }
            Err(error) => {
                debug!(pid = child.id(), %error, "cannot wait for a process");
                return None;
            }
        }
    }
}

/// Starts the QEMU of a guest, and waits until its monitor answers. `record` says what it leaves behind.
///
/// # Errors
///
/// Fails if something that QEMU needs is not on this host, if it ends, or if its monitor does not answer in time.
pub(super) async fn start(
    settings: &QemuSettings,
    definition: &Definition,
    record: &Record,
) -> Result<Started, QemuError> {
    let paths = paths(&settings.guests, &definition.name);
    let begin = {
        let (settings, definition, paths) = (settings.clone(), definition.clone(), paths.clone());
        let incoming = record.incoming;
        move || begin(&settings, &definition, &paths, incoming)
    };
    let started = task::aside(begin).await?;
    let up = tokio::select! {
        () = answers(&paths.qmp) => return Ok(started),
        ended = end_of(&started.child) => Some(ended),
        () = tokio::time::sleep(PATIENCE) => None,
    };
    let words = tail(&started.log).await;
    started.end(record.clone()).await;
    Err(match up {
        Some(Ok(())) => QemuError::Ended { lacks: lacking(&words), words },
        Some(Err(error)) => error.into(),
        None => QemuError::Slow { after: PATIENCE, words },
    })
}

/// Prepares what a QEMU needs, and starts it.
fn begin(
    settings: &QemuSettings,
    definition: &Definition,
    paths: &Paths,
    incoming: bool,
) -> Result<Started, QemuError> {
    for nic in &definition.nics {
        if !Path::new("/sys/class/net").join(&nic.tap).exists() {
            let (guest, network) = (definition.name.clone(), nic.network.clone());
            return Err(QemuError::NoTap { tap: nic.tap.clone(), guest, network });
        }
    }
    let log = log_of(&paths.qmp);
    prepare(paths).map_err(|(doing, path, source)| QemuError::Start { doing, path, source })?;
    let output =
        log_file(&log).map_err(|source| QemuError::Start { doing: "write to", path: log.clone(), source })?;
    let arguments = definition.command_line(paths, incoming);
    let shim = &settings.guests.shim;
    let environment = [
        ("LD_PRELOAD", shim.clone().into_os_string()),
        ("MEMLANE_ATTACH_SOCKET", settings.attach_socket.clone().into_os_string()),
    ];
    if !shim.exists() {
        return Err(QemuError::NoShim(shim.clone()));
    }
    let failed = |source| QemuError::Start { doing: "start", path: definition.qemu.clone(), source };
    if systemd_runs() {
        let child = run_as_unit(definition, &arguments, &environment, (&log, output)).map_err(failed)?;
        Ok(Started { log, child, unit: Some(unit(&definition.name)) })
    } else {
        let child = run_as_session(&definition.qemu, &arguments, &environment, output).map_err(failed)?;
        Ok(Started { log, child, unit: None })
    }
}

/// Finds what QEMU lacks in what it said before it ended, since it has no other way to tell.
fn lacking(words: &str) -> Option<Lacking> {
    match words {
        _ if words.contains("unsupported machine type") => Some(Lacking::Machine),
        _ if words.contains("CPU model") => Some(Lacking::Cpu),
        _ => None,
    }
}

/// Returns the path of the log of the QEMU that has its monitor at `qmp`.
pub(super) fn log_of(qmp: &Path) -> PathBuf {
    qmp.with_file_name("qemu.log")
}

/// Returns the last lines of QEMU's log.
pub(super) async fn tail(log: &Path) -> String {
    let log = log.to_owned();
    task::aside(move || read_tail(&log)).await
}

fn read_tail(log: &Path) -> String {
    let read = || {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        // Some guests write their console there.
        file.seek(io::SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut text = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut text)?;
        io::Result::Ok(text)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(4)..];
    if last.is_empty() {
        format!("it says nothing in {}", log.display())
    } else {
        plain(&last.join("; ")).into_owned()
    }
}

/// Makes the directories, and removes what an earlier QEMU of this name has left.
fn prepare(paths: &Paths) -> Result<(), (&'static str, PathBuf, io::Error)> {
    for path in [&paths.memory, &paths.qmp] {
        let directory = path.parent().expect("a file in a directory");
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.and_then(|()| is_ours(directory))
            .map_err(|error| ("use the directory", directory.to_owned(), error))?;
    }
    memlane_net::unix_socket::make_way(&paths.qmp)
        .map_err(|error| ("use the socket", paths.qmp.clone(), error))?;
    match std::fs::remove_file(&paths.memory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(("remove the old memory", paths.memory.clone(), error))
        }
        _ => Ok(()),
    }
}

/// Checks that only the daemon's user can write to a directory: in a folder like `/tmp` others may have made one of
/// this name before.
fn is_ours(directory: &Path) -> io::Result<()> {
    let metadata = std::fs::symlink_metadata(directory)?;
    if metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(io::Error::other(
        "others can write to it; remove it, or name another in [guests] of the configuration",
    ))
}

fn log_file(log: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(log)
}

/// Returns once QEMU answers. It takes its RAM before it greets, or after that, and makes its devices before it answers:
/// each may last long, and may fail.
async fn answers(qmp: &Path) {
    while Qmp::connect_within(qmp, (PATIENCE, PATIENCE)).await.is_err() {
        tokio::time::sleep(LOOK).await;
    }
}

/// Returns once the process has ended, which must not have been collected.
async fn end_of(child: &Child) -> Result<(), ProcessError> {
    Process::running(child.id())?.ended().await;
    Ok(())
}

fn systemd_runs() -> bool {
    // sd_booted(3)
    Path::new("/run/systemd/system").is_dir()
}

/// Runs QEMU as a transient unit, which has a cgroup of its own and is not ended with the daemon's. The unit belongs to
/// the system's manager where the daemon is root. Otherwise it belongs to the user's own manager, which needs no
/// permission (but the user must linger). Returns the process that waits for its end.
fn run_as_unit(
    definition: &Definition,
    arguments: &[OsString],
    environment: &[(&str, OsString)],
    (log, output): (&Path, File),
) -> io::Result<Child> {
    let mut command = manager("systemd-run");
    command.args(["--quiet", "--collect", "--wait", &format!("--unit={}", unit(&definition.name))]);
    for stream in ["StandardOutput", "StandardError"] {
        command.arg(format!("--property={stream}=append:{}", log.display()));
    }
    for (name, value) in environment {
        let mut setting = OsString::from(format!("--setenv={name}="));
        setting.push(value);
        command.arg(setting);
    }
    // systemd would put variables of its own in the place of names after `$`.
    let arguments = arguments.iter().map(|argument| {
        let bytes = argument.as_bytes().split(|byte| *byte == b'$').collect::<Vec<_>>();
        OsString::from_vec(bytes.join(&b"$$"[..]))
    });
    command.arg("--").arg(&definition.qemu).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(output).spawn()
}

fn unit(name: &Label) -> String {
    format!("memlane-guest-{name}.service")
}

/// Returns a command that talks to the service manager of the daemon's user.
fn manager(program: &str) -> Command {
    let mut command = Command::new(program);
    let user = rustix::process::geteuid();
    if !user.is_root() {
        command.arg("--user").env("XDG_RUNTIME_DIR", format!("/run/user/{}", user.as_raw()));
    }
    command
}

/// Runs QEMU in a session of its own, which does not end with the daemon.
fn run_as_session(
    program: &Path,
    arguments: &[OsString],
    environment: &[(&str, OsString)],
    output: File,
) -> io::Result<Child> {
    let mut command = Command::new(program);
    command.args(arguments).envs(environment.iter().cloned()).current_dir("/");
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    // SAFETY: two system calls, which are all right between fork and exec; nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            // What the daemon may (announce guests) is not for QEMU.
            rustix::thread::clear_ambient_capability_set()?;
            Ok(())
        });
    }
    let child = command.spawn()?;
    // The daemon is the last that the kernel ends for want of memory; its guests are not.
    let _ = std::fs::write(format!("/proc/{}/oom_score_adj", child.id()), "0");
    Ok(child)
}
