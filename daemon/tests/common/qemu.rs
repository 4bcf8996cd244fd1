//! QEMUs that a test starts by itself, and guest files for those that a daemon starts.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use memlane_keys::{CA, CERTIFICATE, KEY};
use memlane_lab::linux::LinuxGuest;
use memlane_lab::qmp::Monitor;
use memlane_lab::{
    BackgroundProcess, CtlOutput, HostId, LabHost, LabOptions, LabProcess, Requirement, RigOptions,
};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::{LIMITS, Stage, words};

/// What every guest has, of a machine type and a processor that all QEMUs from 7.2 on know by these names.
pub(crate) const SMALL: &str =
    "-accel tcg -nodefaults -no-user-config -display none -machine pc-q35-7.2 -cpu Nehalem";
/// A user without any rights.
pub(crate) const NOBODY: u32 = 65534;
/// Runs the program that follows as [`NOBODY`], and still ends with whoever started it.
pub(crate) const AS_NOBODY: &[&str] =
    &["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--pdeathsig=KILL"];

const NEEDS: &[Requirement] = &[Requirement::Root, Requirement::Ip, Requirement::Tc, Requirement::Qemu];

/// Two hosts with a daemon each; `None` where something is missing.
pub(crate) fn stage(test: &str, may_start_guests: bool, keys: &str) -> Option<Stage> {
    let lab = LabOptions { bridge: true, ..LabOptions::default() };
    let (keys, tables) = (keys.to_owned(), LIMITS.to_owned());
    Stage::with(test, NEEDS, RigOptions { lab, keys, tables, may_start_guests, ..RigOptions::default() })
}

/// A QEMU with two monitors: one for the daemon, and one for the test.
pub(crate) struct Qemu {
    process: LabProcess,
    pub qmp: PathBuf,
    pub ours: PathBuf,
}

impl Qemu {
    /// Starts one as docs/qemu.md says: with the shim, and its RAM in a file.
    pub(crate) fn start(host: &LabHost, name: &str, arguments: &str) -> Self {
        Self::start_with_ram(host, name, &format!("{} {arguments}", ram(host, name, 64)))
    }

    /// Starts one with the shim, and with the RAM that is among its `arguments`.
    pub(crate) fn start_with_ram(host: &LabHost, name: &str, arguments: &str) -> Self {
        Self::spawn(host, name, with_shim(host), arguments)
    }

    /// Starts one with the shim, whose guest is a Linux, with the RAM that is among the `arguments`. Its tap is there.
    pub(crate) fn start_linux(host: &LabHost, guest: &LinuxGuest, arguments: &str) -> Self {
        let mut command = with_shim(host);
        command.args(guest.qemu_arguments());
        let network = format!(
            "-netdev tap,id=net0,ifname={},script=no,downscript=no -device virtio-net-pci,netdev=net0,mac={}",
            guest.tap,
            guest.mac_text()
        );
        Self::spawn(host, &guest.name, command, &format!("{network} {arguments}"))
    }

    /// Starts one without the shim, and with only the RAM that is among its `arguments`.
    pub(crate) fn start_bare(host: &LabHost, name: &str, arguments: &str) -> Self {
        Self::spawn(host, name, host.command(host.qemu()), arguments)
    }

    /// Starts one without the shim, as [`NOBODY`].
    pub(crate) fn start_as_nobody(host: &LabHost, name: &str) -> Self {
        open_to_nobody(host);
        let mut command = host.command(AS_NOBODY[0]);
        command.args(&AS_NOBODY[1..]).arg(host.qemu());
        Self::spawn(host, name, command, &ram(host, name, 64))
    }

    fn spawn(host: &LabHost, name: &str, mut command: Command, arguments: &str) -> Self {
        let monitor = |kind: &str| host.directory().join(format!("{name}.{kind}"));
        let (qmp, ours) = (monitor("qmp"), monitor("ours"));
        command.args(words(SMALL)).args(words(arguments));
        for socket in [&qmp, &ours] {
            // Of another one by this name.
            let _ = fs::remove_file(socket);
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        }
        let mut process = host.spawn(name, command).unwrap();
        // It greets before it has made all its devices, and answers afterwards.
        if let Err(error) = Monitor::connect_while(&ours, || process.is_running()) {
            panic!("{error:#}; {}", process.log_tail());
        }
        Self { process, qmp, ours }
    }

    /// Runs a command of the monitor.
    pub(crate) fn run(&self, command: &str) -> Value {
        self.run_with(command, json!({}))
    }

    /// Runs a command of the monitor, with arguments.
    pub(crate) fn run_with(&self, command: &str, arguments: Value) -> Value {
        Monitor::connect(&self.ours).unwrap().execute(command, arguments).unwrap()
    }

    /// Starts one as [`Qemu::start`] does, which then goes to the background as user [`NOBODY`].
    pub(crate) fn start_in_background(host: &LabHost, name: &str, arguments: &str) -> Background {
        let monitor = host.directory().join(format!("{name}.qmp"));
        let pid_file = host.directory().join(format!("{name}.pid"));
        let mut command = with_shim(host);
        command.args(words(SMALL)).args(words(&ram(host, name, 64))).args(words(arguments));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        command.arg("-daemonize").arg("-pidfile").arg(&pid_file);
        command.args(memlane_lab::qemu::run_as("nobody").unwrap());
        let ended = command.output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        Background::of_pid_file(&pid_file, monitor)
    }

    /// Has the daemon of a host take it.
    pub(crate) fn attach(&self, stage: &Stage, id: HostId, name: &str, more: &[&str]) -> CtlOutput {
        attach(stage, id, name, &self.qmp, more)
    }

    /// The number of its process.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        super::signal(&self.process, signal);
    }

    /// Its guest runs.
    pub(crate) fn assert_runs(&self) {
        assert_eq!(self.run("query-status")["status"], "running");
    }
}

/// The command of a QEMU with the shim in it.
fn with_shim(host: &LabHost) -> Command {
    let mut command = host.command(host.qemu());
    command.env("LD_PRELOAD", shim());
    command.env("MEMLANE_ATTACH_SOCKET", host.directory().join("attach.sock"));
    command
}

/// A QEMU that is nobody's child.
pub(crate) struct Background {
    _process: BackgroundProcess,
    pub qmp: PathBuf,
}

impl Background {
    /// Takes care of the one whose number is in a file.
    pub(crate) fn of_pid_file(pid_file: &Path, qmp: PathBuf) -> Self {
        Self { _process: BackgroundProcess::of_pid_file(pid_file).unwrap(), qmp }
    }
}

/// RAM in a file that the daemon can see.
pub(crate) fn ram(host: &LabHost, name: &str, mib: u32) -> String {
    let file = ram_file(host, name);
    format!(
        "-m {mib}M -object memory-backend-file,id=memlane-ram,share=on,size={mib}M,mem-path={file} \
         -machine memory-backend=memlane-ram"
    )
}

/// Where a guest's RAM may lie.
pub(crate) fn ram_file(host: &LabHost, name: &str) -> String {
    host.memory_directory().join(format!("{name}.by-hand")).display().to_string()
}

/// Has the daemon of a host take the QEMU whose monitor is there.
pub(crate) fn attach(stage: &Stage, id: HostId, name: &str, qmp: &Path, more: &[&str]) -> CtlOutput {
    let mut words = vec!["attach", "--name", name, "--qmp", qmp.to_str().unwrap()];
    words.extend(more);
    stage.rig.ctl(id, &words).unwrap()
}

/// Has the daemons take guest `web1` on host A, and the QEMU on host B that waits for it.
#[track_caller]
pub(crate) fn attach_both(stage: &Stage, here: &Qemu, there: &Qemu) {
    for (id, qemu, more) in [(HostId::A, here, &[][..]), (HostId::B, there, &["--incoming"])] {
        let answer = qemu.attach(stage, id, "web1", more);
        assert_eq!(answer.code, 0, "{}", answer.text);
    }
}

/// Writes a guest file; `more` are further keys and tables of it.
pub(crate) fn guest_file(host: &LabHost, name: &str, arguments: &str, more: &str) -> String {
    let arguments = serde_json::Value::from(words(&format!("{SMALL} {arguments}")));
    let qemu = match more.starts_with("qemu = ") {
        true => String::new(),
        false => format!("qemu = \"{}\"\n", host.qemu().display()),
    };
    let text = format!("name = \"{name}\"\nmemory = \"64MiB\"\narguments = {arguments}\n{qemu}{more}\n");
    let file = host.directory().join(format!("{name}.toml"));
    fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

/// An answer that is a refusal, and says all of `why`.
#[track_caller]
pub(crate) fn assert_says_no(answer: &CtlOutput, why: &[&str]) {
    assert_eq!(answer.code, 3, "{}", answer.text);
    for why in why {
        assert!(answer.text.contains(why), "{why:?} is not said: {}", answer.text);
    }
}

/// Guest `web1`, whose move was refused before, moves to host B.
#[track_caller]
pub(crate) fn assert_moves(stage: &Stage) {
    stage.wait_for_standing(HostId::A, "web1", "running");
    let answer = stage.migrate("web1", &["--verify"]);
    assert_eq!(answer.code, 0, "{}", answer.text);
    stage.wait_for_standing(HostId::B, "web1", "running");
    stage.wait_for_end("web1");
}

/// Lets [`NOBODY`] make files where programs of this host make theirs, and read the keys of its daemon. Labs are for root
/// only otherwise.
pub(crate) fn open_to_nobody(host: &LabHost) {
    for directory in [host.directory(), host.memory_directory()] {
        let parent = directory.parent().unwrap();
        fs::set_permissions(parent, Permissions::from_mode(0o711)).unwrap();
        std::os::unix::fs::chown(directory, Some(NOBODY), None).unwrap();
    }
    for keys in [CA, CERTIFICATE, KEY] {
        std::os::unix::fs::chown(host.directory().join(keys), Some(NOBODY), None).unwrap();
    }
}

/// The shim, which is built beside the daemon.
pub(crate) fn shim() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_memlaned")).with_file_name("libmemlane_shim.so")
}
