//! This module starts QEMU.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::rc::Rc;
use std::time::Duration;

use memlane_net::task;
use memlane_protocol::wire::plain;
use memlane_protocol::wire::starter::StartRequest;
use tracing::warn;

use super::child::{ENDING, collect};
use super::definition::Definition;
use super::handed::Handed;
use super::qmp::Qmp;
use super::starter::Ready;
use super::state_directory::{Record, log_of, paths};
use super::{Lacking, QemuError};
use crate::config::QemuSettings;
use crate::process::Process;
use crate::users::Lease;

/// A QEMU that is starting is looked at in these intervals.
const LOOK: Duration = Duration::from_millis(5);
/// A QEMU may take this long until its monitor answers: it may have to take all RAM from the host first.
const PATIENCE: Duration = Duration::from_secs(60);
/// If QEMU fails, this many bytes of the end of its log are shown.
const TAIL_BYTES: u64 = 1000;

/// A QEMU whose monitor can be connected to.
pub(super) struct Started {
    /// This is the process.
    pub process: Rc<Process>,
    /// This is the process as a child of the daemon, if it is one. It must be collected when it ends.
    pub child: Option<Child>,
    /// QEMU's output goes to this file.
    log: PathBuf,
}

impl Started {
    /// Ends a QEMU that was started in vain, and removes what it leaves behind.
    pub(super) async fn end(self, record: Record) {
        if let Err(error) = self.process.kill() {
            warn!(guest = record.name, %error, "a QEMU was started in vain");
        }
        if tokio::time::timeout(ENDING, self.process.ended()).await.is_err() {
            warn!(guest = record.name, pid = self.process.identity().pid, "a QEMU does not end");
        }
        let tidy = move || {
            if let Some(mut child) = self.child {
                collect(&mut child);
            }
            record.remove_files();
        };
        task::aside(tidy).await;
    }
}

/// Starts the QEMU of a guest as the user of `lease`, and waits until its monitor answers. `record` says what it leaves
/// behind.
///
/// # Errors
///
/// Fails if something that QEMU needs is not on this host, if it ends, or if its monitor does not answer in time.
pub(super) async fn start(
    settings: &QemuSettings,
    definition: &Definition,
    record: &Record,
    lease: &Lease,
) -> Result<Started, QemuError> {
    let (user, log) = (lease.user(), log_of(&record.qmp));
    let ask = {
        let (settings, definition, incoming) = (settings.clone(), definition.clone(), record.incoming);
        move || ask(&settings, &definition, user, incoming)
    };
    let ready = task::aside(ask).await?;
    // Before it runs, so that its shim is known when it connects.
    let process = Process::running(ready.pid());
    if let Ok(process) = &process {
        lease.note(process.identity());
    }
    // One that cannot be followed is not let go.
    let (known, of_record) = (process.is_ok(), record.clone());
    let go = move || match known {
        true => ready.go().inspect_err(|_| of_record.remove_files()),
        false => {
            of_record.remove_files();
            Ok(None)
        }
    };
    let child = task::aside(go).await?;
    let started = Started { process: Rc::new(process?), child, log };
    let up = tokio::select! {
        () = answers(&record.qmp) => return Ok(started),
        () = started.process.ended() => Some(()),
        () = tokio::time::sleep(PATIENCE) => None,
    };
    let words = tail(&started.log).await;
    started.end(record.clone()).await;
    Err(match up {
        Some(()) => QemuError::Ended { lacks: lacking(&words), user, words },
        None => QemuError::Slow { after: PATIENCE, words },
    })
}

/// Prepares what a QEMU needs, and has a starter prepare to become it.
fn ask(
    settings: &QemuSettings,
    definition: &Definition,
    user: u32,
    incoming: bool,
) -> Result<Ready, QemuError> {
    let QemuSettings { guests, attach_socket, .. } = settings;
    if !guests.shim.exists() {
        return Err(QemuError::NoShim(guests.shim.clone()));
    }
    let paths = paths(guests, &definition.name);
    let handed = Handed::open(definition, &paths)?;
    let (descriptors, bytes) = (handed.all(), |path: &Path| path.as_os_str().as_bytes().to_vec());
    let arguments = definition.command_line(&handed.given(), incoming);
    let request = StartRequest {
        user,
        groups: guests.groups.clone(),
        descriptors: descriptors.len(),
        program: bytes(&definition.qemu),
        attach_socket: bytes(attach_socket),
        arguments: arguments.into_iter().map(String::into_bytes).collect(),
    };
    let ready = Ready::ask(guests, &request, &descriptors).inspect_err(|_| {
        let _ = [&paths.memory, &paths.qmp].map(std::fs::remove_file);
    });
    Ok(ready?)
}

/// Finds what QEMU lacks in what it said before it ended, since it has no other way to tell.
fn lacking(words: &str) -> Option<Lacking> {
    match words {
        _ if words.contains("unsupported machine type") => Some(Lacking::Machine),
        _ if words.contains("CPU model") => Some(Lacking::Cpu),
        _ if words.contains("Permission denied") => Some(Lacking::Rights),
        _ if words.contains("locking memory failed") => Some(Lacking::LockedMemory),
        _ if words.contains("Cannot allocate memory") => Some(Lacking::Memory),
        _ => None,
    }
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

/// Returns once QEMU answers. It takes its RAM before it greets, or after that, and makes its devices before it answers:
/// each may last long, and may fail.
async fn answers(qmp: &Path) {
    while Qmp::connect_within(qmp, (PATIENCE, PATIENCE)).await.is_err() {
        tokio::time::sleep(LOOK).await;
    }
}
