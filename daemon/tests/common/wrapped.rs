//! QEMUs that memlane-qemu has become, with command lines after those of managers (tools/qemu/tests/lines).

use std::any::Any;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use memlane_lab::LabHost;
use memlane_lab::qmp::Monitor;

use super::qemu::{Background, shim};

/// A QEMU that memlane-qemu has become, and the monitor that it was given for the daemon.
pub(crate) struct Wrapped {
    pub process: Box<dyn Any>,
    pub qmp: PathBuf,
}

/// Starts a guest as a manager does, in which it has this name; its disk is a file.
pub(crate) fn start(host: &LabHost, name: &str, line: &str, disk: &Path, more: &[&str]) -> Wrapped {
    let directory = host.directory();
    let fill = |text: &str| {
        text.replace("{DISK}", disk.to_str().unwrap())
            .replace("{DIR}", directory.to_str().unwrap())
            .replace("{NAME}", name)
            .replace("{KVM}", "tcg")
    };
    if let Ok(config) = fs::read_to_string(lines(&format!("{line}.conf"))) {
        fs::write(directory.join(format!("{line}.conf")), fill(&config)).unwrap();
    }
    let arguments = arguments(line);
    let mut command = host.command(shim().with_file_name("memlane-qemu"));
    environment(&mut command, host).args(arguments.iter().map(|argument| fill(argument))).args(more);
    let (monitor, own) = (directory.join(format!("{name}.sock")), directory.join(format!("{name}.qmp")));
    if !arguments.iter().any(|argument| argument == "-daemonize") {
        let mut process = host.spawn(name, command).unwrap();
        Monitor::connect_while(&own, || process.is_running()).unwrap();
        return Wrapped { process: Box::new(process), qmp: monitor };
    }
    let ended = command.output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let background = Background::of_pid_file(&directory.join(format!("{name}.pid")), monitor.clone());
    Wrapped { process: Box::new(background), qmp: monitor }
}

/// Tells memlane-qemu what is where on a host.
pub(crate) fn environment<'a>(command: &'a mut Command, host: &LabHost) -> &'a mut Command {
    let directory = host.directory();
    command.env("MEMLANE_EMULATOR", host.qemu()).env("MEMLANE_SHIM", shim());
    command.env("MEMLANE_ATTACH_SOCKET", directory.join("attach.sock"));
    command.env("MEMLANE_RAM", host.memory_directory()).env("MEMLANE_MONITORS", directory)
}

/// Returns the arguments of a command line, with what is to be filled in.
pub(crate) fn arguments(line: &str) -> Vec<String> {
    let text = fs::read_to_string(lines(&format!("{line}.txt"))).unwrap();
    text.lines().filter(|argument| !argument.starts_with('#')).map(str::to_owned).collect()
}

fn lines(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/qemu/tests/lines").join(file)
}
