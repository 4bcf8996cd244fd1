//! The kinds of guests, and how their QEMUs are started.

use std::any::Any;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use memlane_lab::qmp::Monitor;
use memlane_lab::{LabHost, LabProcess, OVMF, wait_for};
use serde_json::{Value, json};

use crate::common::qemu::{Background, SMALL, ram_file, shim};
use crate::common::{LONG, words, wrapped};

/// A kind of guest.
pub(crate) struct Kind {
    /// The words of the table.
    pub what: &'static str,
    /// What is said of it where it is refused.
    pub words: &'static str,
    /// Its RAM; `{}` stands for a directory of memory, and `{NAME}` for a file there.
    ram: &'static str,
    /// Its further arguments; `{DISK}` stands for a file of both hosts, `{CODE}` and `{VARIABLES}` for the firmware OVMF and
    /// a file of both hosts in which it keeps variables, and `{TPM}` for the socket of a TPM that each QEMU has for itself.
    arguments: &'static str,
    manner: Manner,
    /// What is done to the guest before the order.
    pub then: fn(&Running),
}

/// How QEMU is started.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Plain,
    /// In the background, as another user.
    Background,
    /// In the background, with another root directory.
    Chroot,
    /// By memlane-qemu.
    Wrapped,
    /// By memlane-qemu, with the command line of a manager.
    Manager(&'static str),
}

/// A QEMU that runs.
pub(crate) struct Running {
    _process: Box<dyn Any>,
    _tpm: Option<LabProcess>,
    pub qmp: PathBuf,
    ours: PathBuf,
}

impl Running {
    fn run(&self, command: &str, arguments: Value) -> Value {
        Monitor::connect(&self.ours).unwrap().execute(command, arguments).unwrap()
    }

    /// Waits until the guest has written to a drive.
    fn wait_for_writes(&self, drive: &str) {
        let written = || {
            let stats = self.run("query-blockstats", json!({}));
            let of_drive = stats.as_array()?.iter().find(|stats| stats["device"] == drive)?.clone();
            (of_drive["stats"]["wr_highest_offset"].as_u64()? > 0).then_some(())
        };
        wait_for("the guest to write", LONG, written).unwrap();
    }
}

const NAMED: &str =
    "-m 64M -object memory-backend-file,id=ram,share=on,size=64M,mem-path={NAME} -machine memory-backend=ram";
const LARGER: &str = "-m 256M -object memory-backend-file,id=ram,share=on,size=256M,mem-path={NAME} -machine memory-backend=ram";
const NAMELESS: &str =
    "-m 64M -object memory-backend-file,id=ram,share=on,size=64M,mem-path={} -machine memory-backend=ram";
const MEMFD: &str =
    "-m 64M -object memory-backend-memfd,id=ram,share=on,size=64M -machine memory-backend=ram";
const PRIVATE: &str = "-m 64M -object memory-backend-ram,id=ram,size=64M -machine memory-backend=ram";
const NODES: &str = "-m 128M -smp 2 -object memory-backend-file,id=n0,share=on,size=64M,mem-path={} \
    -object memory-backend-file,id=n1,share=on,size=64M,mem-path={} -numa node,memdev=n0,cpus=0 -numa node,memdev=n1,cpus=1";
const DIMM: &str = "-m 64M,slots=2,maxmem=1G -object memory-backend-file,id=ram,share=on,size=64M,mem-path={} \
    -machine memory-backend=ram -object memory-backend-file,id=mem1,share=on,size=128M,mem-path={} \
    -device pc-dimm,id=dimm1,memdev=mem1";
const VIRTIO_MEM: &str = "-m 64M,maxmem=1G -object memory-backend-file,id=ram,share=on,size=64M,mem-path={} \
    -machine memory-backend=ram -object memory-backend-file,id=mem1,share=on,size=128M,mem-path={} \
    -device virtio-mem-pci,id=vm0,memdev=mem1,requested-size=0";
const NVDIMM: &str = "-m 64M,slots=2,maxmem=1G -object memory-backend-file,id=ram,share=on,size=64M,mem-path={} \
    -machine memory-backend=ram,nvdimm=on -object memory-backend-file,id=nv,share=on,size=16M,mem-path={} \
    -device nvdimm,id=nvdimm0,memdev=nv";
const SHARED: &str = "-m 64M -object memory-backend-file,id=ram,share=on,size=64M,mem-path={} -machine memory-backend=ram \
    -object memory-backend-file,id=shared,share=on,size=1M,mem-path={} -device ivshmem-plain,id=s0,memdev=shared";

const PLAIN: Kind =
    Kind { what: "", words: "", ram: NAMED, arguments: "", manner: Manner::Plain, then: nothing };

/// All kinds, in the order of the table.
pub(crate) const ALL: &[Kind] = &[
    Kind { what: "RAM in a file with a name", ..PLAIN },
    Kind { what: "RAM in a file without a name (`mem-path=` a directory)", ram: NAMELESS, ..PLAIN },
    Kind { what: "RAM in two NUMA nodes without names", ram: NODES, ..PLAIN },
    Kind { what: "RAM in a shared memfd", ram: MEMFD, words: "memlane-qemu", ..PLAIN },
    Kind { what: "RAM in a shared memfd, by memlane-qemu", ram: MEMFD, manner: Manner::Wrapped, ..PLAIN },
    Kind { what: "RAM that is private (`memory-backend-ram`)", ram: PRIVATE, words: "memlane-qemu", ..PLAIN },
    Kind { what: "RAM that is private, by memlane-qemu", ram: PRIVATE, manner: Manner::Wrapped, ..PLAIN },
    Kind { what: "RAM by `-m` alone", ram: "-m 64M", words: "memlane-qemu", ..PLAIN },
    Kind { what: "RAM by `-m` alone, by memlane-qemu", ram: "-m 64M", manner: Manner::Wrapped, ..PLAIN },
    Kind {
        what: "the command line of Proxmox VE, by memlane-qemu",
        manner: Manner::Manager("proxmox"),
        ..PLAIN
    },
    Kind { what: "the command line of Incus, by memlane-qemu", manner: Manner::Manager("incus"), ..PLAIN },
    Kind { what: "the command line of Nova, by memlane-qemu", manner: Manner::Manager("nova"), ..PLAIN },
    Kind {
        what: "in the background, as another user (`-daemonize`, `-runas`)",
        manner: Manner::Background,
        ..PLAIN
    },
    Kind {
        what: "in another root directory (`-chroot`)",
        words: "there is no shim in process",
        manner: Manner::Chroot,
        ..PLAIN
    },
    Kind {
        what: "QEMU's sandbox",
        arguments: "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ..PLAIN
    },
    Kind {
        what: "RAM that is locked (`-overcommit mem-lock=on`)",
        arguments: "-overcommit mem-lock=on",
        ..PLAIN
    },
    Kind {
        what: "a disk with `cache=none,aio=native`",
        arguments: "-drive file={DISK},format=raw,if=none,id=d,cache=none,aio=native -device virtio-blk-pci,drive=d",
        ..PLAIN
    },
    Kind {
        what: "a disk with `cache=none,aio=io_uring` and an iothread",
        arguments: "-object iothread,id=io0 -drive file={DISK},format=raw,if=none,id=d,cache=none,aio=io_uring \
                    -device virtio-blk-pci,drive=d,iothread=io0",
        ..PLAIN
    },
    Kind {
        what: "a disk with `cache=directsync` behind virtio-scsi",
        arguments: "-drive file={DISK},format=raw,if=none,id=d,cache=directsync -device virtio-scsi-pci,id=sc \
                    -device scsi-hd,drive=d,bus=sc.0",
        ..PLAIN
    },
    Kind {
        what: "a CD-ROM",
        arguments: "-drive file={DISK},format=raw,if=none,id=cd,media=cdrom -device ide-cd,drive=cd,id=cd0",
        ..PLAIN
    },
    Kind {
        what: "a CD-ROM whose medium was changed, where the waiting QEMU has the old one",
        arguments: "-drive file={DISK},format=raw,if=none,id=cd,media=cdrom -device ide-cd,drive=cd,id=cd0",
        words: "the guest has drive cd with nothing in it",
        then: |qemu| drop(qemu.run("eject", json!({ "id": "cd0", "force": true }))),
        ..PLAIN
    },
    Kind {
        what: "a device that was plugged in, where the waiting QEMU has none",
        arguments: "-device qemu-xhci,id=usb",
        words: "device pen7 (usb-tablet)",
        then: |qemu| {
            let tablet = json!({ "driver": "usb-tablet", "id": "pen7", "bus": "usb.0" });
            qemu.run("device_add", tablet);
        },
        ..PLAIN
    },
    Kind {
        what: "OVMF, with its variables in a file",
        ram: LARGER,
        arguments: "-drive if=pflash,unit=0,format=raw,readonly=on,file={CODE} \
                    -drive if=pflash,unit=1,id=vars,format=raw,file={VARIABLES}",
        then: |qemu| qemu.wait_for_writes("vars"),
        ..PLAIN
    },
    Kind {
        what: "a TPM (`swtpm`)",
        arguments: "-chardev socket,id=tpm,path={TPM} -tpmdev emulator,id=tpm0,chardev=tpm -device tpm-crb,tpmdev=tpm0",
        ..PLAIN
    },
    Kind { what: "a pc-dimm from the start", ram: DIMM, ..PLAIN },
    Kind { what: "virtio-mem", ram: VIRTIO_MEM, words: "virtio-mem", ..PLAIN },
    Kind {
        what: "a balloon with free page reporting",
        arguments: "-device virtio-balloon-pci,free-page-reporting=on",
        ..PLAIN
    },
    Kind { what: "16 network cards", arguments: "{NICS}", ..PLAIN },
    Kind { what: "`-cpu max`", arguments: "-cpu max", ..PLAIN },
    Kind {
        what: "`vmgenid` with an identity of its own",
        arguments: "-device vmgenid,guid=c773c261-d800-4348-9f5d-167fadd53cf8",
        ..PLAIN
    },
    Kind {
        what: "`vmgenid,guid=auto`, where others start the waiting QEMU",
        arguments: "-device vmgenid,guid=auto",
        words: "generation identity",
        ..PLAIN
    },
    Kind { what: "`ivshmem`", ram: SHARED, words: "no part of the guest's memory is of it", ..PLAIN },
    Kind { what: "`nvdimm`", ram: NVDIMM, words: "no part of the guest's memory is of it", ..PLAIN },
    Kind { what: "a guest that is paused", then: |qemu| drop(qemu.run("stop", json!({}))), ..PLAIN },
    Kind {
        what: "a disk that is being mirrored",
        arguments: "-blockdev driver=null-co,node-name=from,size=1048576 -blockdev driver=null-co,node-name=to,size=1048576",
        words: "job-cancel",
        then: |qemu| {
            let job = json!({ "job-id": "m0", "device": "from", "target": "to", "sync": "full" });
            qemu.run("blockdev-mirror", job);
        },
        ..PLAIN
    },
];

fn nothing(_: &Running) {}

/// One QEMU of a kind.
pub(crate) struct Start<'a> {
    kind: &'a Kind,
    name: &'a str,
    disk: &'a Path,
}

impl<'a> Start<'a> {
    pub(crate) fn new(kind: &'a Kind, name: &'a str, disk: &'a Path) -> Self {
        Self { kind, name, disk }
    }

    /// Starts it on a host, where it waits for a guest or runs one.
    pub(crate) fn on(&self, host: &LabHost, incoming: bool) -> Running {
        let directory = host.directory();
        let path = |kind: &str| directory.join(format!("{}.{kind}", self.name));
        let (qmp, ours, pid) = (path("qmp"), path("ours"), path("pid"));
        let incoming: &[&str] = if incoming { &["-incoming", "defer"] } else { &[] };
        if let Manner::Manager(line) = self.kind.manner {
            let started = wrapped::start(host, self.name, line, self.disk, incoming);
            return Running { _process: started.process, _tpm: None, qmp: started.qmp, ours };
        }
        let by = match self.kind.manner {
            Manner::Wrapped => shim().with_file_name("memlane-qemu"),
            _ => host.qemu().to_owned(),
        };
        let mut command = host.command(&by);
        match self.kind.manner {
            Manner::Wrapped => drop(wrapped::environment(&mut command, host)),
            _ => {
                command.env("LD_PRELOAD", shim());
                command.env("MEMLANE_ATTACH_SOCKET", directory.join("attach.sock"));
            }
        }
        let memory = host.memory_directory().display().to_string();
        let ram = self.kind.ram.replace("{NAME}", &ram_file(host, self.name)).replace("{}", &memory);
        let cards = "-device virtio-net-pci,romfile= ".repeat(16);
        let (tpm, socket) = (self.kind.arguments.contains("{TPM}"), path("tpm"));
        let tpm = tpm.then(|| start_tpm(host, self.name, &socket));
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let arguments = self.kind.arguments.replace("{DISK}", &text(self.disk)).replace("{NICS}", &cards);
        let arguments = arguments.replace("{CODE}", OVMF.0).replace("{TPM}", &text(&socket));
        let arguments = arguments.replace("{VARIABLES}", &text(&self.disk.with_file_name("variables.fd")));
        command.args(["-name", self.name]).args(words(SMALL)).args(words(&ram)).args(words(&arguments));
        let monitor = |socket: &Path| format!("unix:{},server=on,wait=off", socket.display());
        let for_daemon = if self.kind.manner == Manner::Wrapped {
            directory.join(format!("{}.sock", self.name))
        } else {
            qmp.clone()
        };
        if self.kind.manner != Manner::Wrapped {
            command.arg("-qmp").arg(monitor(&qmp));
        }
        command.arg("-qmp").arg(monitor(&ours)).args(incoming);
        let process: Box<dyn Any> = match self.kind.manner {
            Manner::Background => {
                command.args(memlane_lab::qemu::run_as("nobody").unwrap());
                background(command, &pid)
            }
            Manner::Chroot => {
                let root = directory.join("root");
                fs::create_dir_all(&root).unwrap();
                command.args(memlane_lab::qemu::in_root(&root).unwrap());
                background(command, &pid)
            }
            _ => {
                let mut process = host.spawn(self.name, command).unwrap();
                if let Err(error) = Monitor::connect_while(&ours, || process.is_running()) {
                    panic!("{}: {error:#}; {}", self.kind.what, process.log_tail());
                }
                Box::new(process)
            }
        };
        Running { _process: process, _tpm: tpm, qmp: for_daemon, ours }
    }
}

/// Starts a TPM that listens on a socket, and waits until it does.
fn start_tpm(host: &LabHost, name: &str, socket: &Path) -> LabProcess {
    let state = socket.with_extension("tpm-state");
    fs::create_dir_all(&state).unwrap();
    let mut command = host.command("swtpm");
    command.args(["socket", "--tpm2", "--tpmstate"]).arg(format!("dir={}", state.display()));
    command.arg("--ctrl").arg(format!("type=unixio,path={}", socket.display()));
    let process = host.spawn(&format!("{name}-tpm"), command).unwrap();
    wait_for("the TPM to listen", LONG, || socket.exists().then_some(())).unwrap();
    process
}

/// Starts a QEMU that goes to the background.
fn background(mut command: Command, pid_file: &Path) -> Box<dyn Any> {
    command.arg("-daemonize").arg("-pidfile").arg(pid_file);
    let ended = command.output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    Box::new(Background::of_pid_file(pid_file, PathBuf::new()))
}
