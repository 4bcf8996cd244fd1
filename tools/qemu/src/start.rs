//! Starting QEMU: what a changed command line needs of the system is made, and then this process becomes QEMU.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use memlane_protocol::wire::plain;
use rustix::fs::{Access, MemfdFlags, access, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::emulator::Emulator;
use crate::monitor;
use crate::rewrite::Rewritten;
use crate::tell;
use crate::warning::Warning;

/// The environment variable that names the shim.
const SHIM_VARIABLE: &str = "MEMLANE_SHIM";
const DEFAULT_SHIM: &str = "/usr/lib/memlane/libmemlane_shim.so";
/// The environment variable by which the shim finds the daemon.
const ATTACH_VARIABLE: &str = "MEMLANE_ATTACH_SOCKET";
const DEFAULT_ATTACH: &str = "/run/memlane/attach.sock";
/// ld.so(8)
const PRELOAD: &str = "LD_PRELOAD";

/// A QEMU that is about to be started.
#[derive(Debug)]
pub(crate) struct Start {
    emulator: Emulator,
    /// These are its arguments, without a program's name.
    pub arguments: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
    /// At these places of the arguments stands the path of a file with this text.
    files: BTreeMap<usize, String>,
    /// The socket of the monitor is to be here.
    monitor: Option<PathBuf>,
    /// This is left as it was.
    pub warnings: Vec<Warning>,
}

/// QEMU does not start.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {}: {source}; MEMLANE_EMULATOR names another QEMU", plain(&path.to_string_lossy()))]
pub(crate) struct StartError {
    path: PathBuf,
    source: io::Error,
}

impl Start {
    /// Returns a QEMU that is started just so.
    pub(crate) fn new(emulator: Emulator, arguments: Vec<OsString>) -> Self {
        let (environment, files) = (Vec::new(), BTreeMap::new());
        Self { emulator, arguments, environment, files, monitor: None, warnings: Vec::new() }
    }

    /// Takes a changed command line, which gets a monitor besides.
    pub(crate) fn take(&mut self, rewritten: Rewritten) {
        let Rewritten { arguments, files, name, has_monitor, warnings } = rewritten;
        self.monitor = (!has_monitor).then(|| monitor::path(name.as_deref()));
        (self.arguments, self.files, self.warnings) = (arguments, files, warnings);
    }

    /// Has QEMU load the shim.
    pub(crate) fn load_shim(&mut self) {
        let shim = env::var_os(SHIM_VARIABLE).map_or_else(|| DEFAULT_SHIM.into(), PathBuf::from);
        if !shim.is_file() || access(&shim, Access::READ_OK).is_err() {
            let what = format!("there is no shim {} that QEMU's user can read", shim.display());
            self.warnings.push(Warning::new(what, format!("install it, or name it by {SHIM_VARIABLE}")));
            return;
        }
        let others = env::var_os(PRELOAD).unwrap_or_default();
        // Both characters stand between libraries.
        let is_loaded = others
            .as_bytes()
            .split(|byte| b" :".contains(byte))
            .any(|one| one == shim.as_os_str().as_bytes());
        if !is_loaded {
            let mut all = shim.into_os_string();
            if !others.is_empty() {
                all.push(" ");
                all.push(others);
            }
            self.environment.push((PRELOAD, all));
        }
        if env::var_os(ATTACH_VARIABLE).is_none() {
            self.environment.push((ATTACH_VARIABLE, DEFAULT_ATTACH.into()));
        }
    }

    /// Shows what would be started.
    pub(crate) fn show(mut self) -> ExitCode {
        let mut text = self.emulator.path.as_os_str().as_bytes().to_vec();
        for at in self.files.keys() {
            self.arguments[*at] = "/proc/self/fd/N".into();
        }
        if self.monitor.is_some() {
            self.arguments.extend(monitor::arguments("N").map(Into::into));
        }
        for argument in &self.arguments {
            text.push(b'\n');
            text.extend(argument.as_bytes());
        }
        for (name, value) in &self.environment {
            text.extend(format!("\n{name}=").as_bytes());
            text.extend(value.as_bytes());
        }
        if let Some(path) = &self.monitor {
            text.extend(format!("\n# fd=N is the socket {}", path.display()).as_bytes());
        }
        for file in self.files.values() {
            text.extend(format!("\n# /proc/self/fd/N is a file of this text:\n{file}").as_bytes());
        }
        text.push(b'\n');
        match io::stdout().write_all(&text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        }
    }

    /// Becomes QEMU. It returns only if that fails.
    pub(crate) fn run(mut self) -> StartError {
        self.hand_files_down();
        self.hand_monitor_down();
        let Emulator { path, name } = self.emulator;
        let mut qemu = Command::new(&path);
        qemu.arg0(name).args(&self.arguments).envs(self.environment);
        let source = qemu.exec();
        StartError { path, source }
    }

    fn hand_files_down(&mut self) {
        for (at, text) in std::mem::take(&mut self.files) {
            match handed_file(&text) {
                Ok(path) => self.arguments[at] = path.into(),
                Err(error) => {
                    let what = format!("cannot hand down a file for -readconfig ({error})");
                    tell(&Warning::new(what, "let QEMU's AppArmor profile read /memfd:memlane-readconfig"));
                }
            }
        }
    }

    fn hand_monitor_down(&mut self) {
        let Some(path) = &self.monitor else { return };
        let handed = monitor::make(path).and_then(|socket| {
            let failed = |error: io::Error| {
                Warning::new(format!("cannot hand the monitor down ({error})"), "start it once more")
            };
            hand_down(socket).map_err(failed)
        });
        match handed {
            Ok(number) => self.arguments.extend(monitor::arguments(number).map(Into::into)),
            Err(warning) => tell(&warning),
        }
    }
}

/// Makes a file with this text that is open in QEMU, and returns by which path QEMU can open it once more.
fn handed_file(text: &str) -> io::Result<String> {
    let file = memfd_create(c"memlane-readconfig", MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(file);
    file.write_all(text.as_bytes())?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // QEMU would not start without it, and a profile of AppArmor may forbid this.
    std::fs::File::open(&path)?;
    hand_down(file.into())?;
    Ok(path)
}

/// Has QEMU inherit a descriptor, and returns its number.
fn hand_down(descriptor: OwnedFd) -> io::Result<i32> {
    fcntl_setfd(descriptor.as_fd(), FdFlags::empty())?;
    let number = descriptor.as_raw_fd();
    // It is QEMU's from now on.
    let _ = descriptor.into_raw_fd();
    Ok(number)
}
