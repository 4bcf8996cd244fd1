//! What fails, for how long, and how it is mended.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use memlane_lab::{HostId, LabVmm};
use rustix::process::Signal;

use crate::common::{Stage, Tap, signal};

/// What hangs, is cut off or is full is so for this long: twice as long as hosts may be silent.
const AWAY: Duration = Duration::from_secs(10);
/// A daemon that was killed is started again after this time.
const RESTART: Duration = Duration::from_secs(1);

/// This daemon's journal is on a disk of its own, which nothing else is on.
const SMALL_DISK: &str = r#"mount -t tmpfs -o size=192k,mode=0700 tmpfs "$1/journal""#;
/// This VMM's memory is on a file system of its own, with a little more room than the guest needs.
const SMALL_MEMORY: &str = r#"mkdir "$1/small" && mount -t tmpfs -o size=80m,mode=0700 tmpfs "$1/small""#;
/// The file on either that takes all the room that there is.
const FILLER: &str = "filler";

/// Something that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    SourceDaemonKilled,
    DestinationDaemonKilled,
    SourceVmmKilled,
    DestinationVmmKilled,
    SourceDaemonStopped,
    DestinationDaemonStopped,
    SourceVmmStopped,
    DestinationVmmStopped,
    ControlCut,
    PortCut,
    AllCut,
    SourceDiskFull,
    DestinationDiskFull,
    DestinationMemoryFull,
}

/// The processes of a cell, in the order source, destination.
pub(crate) type Vmms = [LabVmm; 2];

impl Fault {
    pub(crate) const ALL: [Self; 14] = [
        Self::SourceDaemonKilled,
        Self::DestinationDaemonKilled,
        Self::SourceVmmKilled,
        Self::DestinationVmmKilled,
        Self::SourceDaemonStopped,
        Self::DestinationDaemonStopped,
        Self::SourceVmmStopped,
        Self::DestinationVmmStopped,
        Self::ControlCut,
        Self::PortCut,
        Self::AllCut,
        Self::SourceDiskFull,
        Self::DestinationDiskFull,
        Self::DestinationMemoryFull,
    ];

    /// The heading of its row.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::SourceDaemonKilled => "source daemon killed",
            Self::DestinationDaemonKilled => "destination daemon killed",
            Self::SourceVmmKilled => "source VMM killed",
            Self::DestinationVmmKilled => "destination VMM killed",
            Self::SourceDaemonStopped => "source daemon hangs",
            Self::DestinationDaemonStopped => "destination daemon hangs",
            Self::SourceVmmStopped => "source VMM hangs",
            Self::DestinationVmmStopped => "destination VMM hangs",
            Self::ControlCut => "control cut",
            Self::PortCut => "one port cut",
            Self::AllCut => "all cut",
            Self::SourceDiskFull => "source disk full",
            Self::DestinationDiskFull => "destination disk full",
            Self::DestinationMemoryFull => "destination out of memory",
        }
    }

    /// Prepares the hosts for it, before any guest is there.
    pub(crate) fn prepare(self, stage: &mut Stage) {
        if let Some((id, _)) = self.full_disk() {
            stage.rig.start_daemon_after(id, SMALL_DISK).unwrap();
        }
    }

    /// Starts the VMM that waits for the guest.
    pub(crate) fn start_receiver(self, stage: &mut Stage, name: &str, arguments: &[String]) -> LabVmm {
        let mut arguments = [arguments, &["--incoming".to_owned()]].concat();
        let mut script = "";
        if self == Self::DestinationMemoryFull {
            script = SMALL_MEMORY;
            let file = stage.rig.lab().host(HostId::B).memory_directory().join("small/ram");
            arguments.extend(["--backing".to_owned(), file.display().to_string()]);
        }
        stage.rig.start_vmm_after(HostId::B, script, name, &arguments).unwrap()
    }

    /// Has it happen to a migration that `tap` holds, and that goes on meanwhile as far as it can. Mends it after a while.
    pub(crate) fn strike(self, stage: &mut Stage, tap: &Tap, vmms: &mut Vmms) {
        match self {
            Self::SourceDaemonKilled => kill_daemon(stage, tap, HostId::A),
            Self::DestinationDaemonKilled => kill_daemon(stage, tap, HostId::B),
            Self::SourceVmmKilled => kill_vmm(tap, &mut vmms[0]),
            Self::DestinationVmmKilled => kill_vmm(tap, &mut vmms[1]),
            Self::SourceDaemonStopped => {
                let daemon = stage.rig.daemon(HostId::A);
                for_a_while(tap, || signal(daemon, Signal::STOP), || signal(daemon, Signal::CONT));
            }
            Self::DestinationDaemonStopped => {
                let daemon = stage.rig.daemon(HostId::B);
                for_a_while(tap, || signal(daemon, Signal::STOP), || signal(daemon, Signal::CONT));
            }
            Self::SourceVmmStopped => stop_vmm(tap, &mut vmms[0]),
            Self::DestinationVmmStopped => stop_vmm(tap, &mut vmms[1]),
            Self::ControlCut => {
                let cut = |silent| stage.rig.lab().silence_control(silent).unwrap();
                for_a_while(tap, || cut(true), || cut(false));
            }
            Self::PortCut => {
                let cut = |silent| stage.rig.lab().silence_port(0, silent).unwrap();
                for_a_while(tap, || cut(true), || cut(false));
            }
            Self::AllCut => {
                let lab = stage.rig.lab();
                let cut = |silent| {
                    lab.silence_control(silent).unwrap();
                    (0..2).for_each(|port| lab.silence_port(port, silent).unwrap());
                };
                for_a_while(tap, || cut(true), || cut(false));
            }
            Self::SourceDiskFull | Self::DestinationDiskFull => {
                let (id, directory) = self.full_disk().expect("these fill a disk");
                let journal = stage.rig.lab().host(id).directory().join(directory);
                fill_for_a_while(tap, seen_by(stage.rig.daemon(id).pid(), &journal));
            }
            Self::DestinationMemoryFull => {
                let small = stage.rig.lab().host(HostId::B).memory_directory().join("small");
                fill_for_a_while(tap, seen_by(vmms[1].process().pid(), &small));
            }
        }
    }

    /// The host whose disk is full, and what of its directory is on that disk.
    fn full_disk(self) -> Option<(HostId, &'static str)> {
        match self {
            Self::SourceDiskFull => Some((HostId::A, "journal")),
            Self::DestinationDiskFull => Some((HostId::B, "journal")),
            _ => None,
        }
    }
}

fn for_a_while(tap: &Tap, begin: impl FnOnce(), end: impl FnOnce()) {
    begin();
    tap.release();
    std::thread::sleep(AWAY);
    end();
}

fn kill_daemon(stage: &mut Stage, tap: &Tap, id: HostId) {
    stage.rig.stop_daemon(id).unwrap();
    tap.lose();
    std::thread::sleep(RESTART);
    stage.rig.start_daemon(id).unwrap();
}

fn kill_vmm(tap: &Tap, vmm: &mut LabVmm) {
    vmm.process().kill().unwrap();
    tap.release();
}

fn stop_vmm(tap: &Tap, vmm: &mut LabVmm) {
    let vmm = vmm.process();
    // It may have ended, because it had given its guest up.
    if vmm.is_running() {
        for_a_while(tap, || signal(vmm, Signal::STOP), || signal(vmm, Signal::CONT));
    } else {
        tap.release();
    }
}

/// Returns a directory as a process sees it that has mounts of its own.
fn seen_by(pid: u32, directory: &Path) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root{}", directory.display()))
}

fn fill_for_a_while(tap: &Tap, directory: PathBuf) {
    let path = directory.join(FILLER);
    let fill = || {
        let mut file = File::create(&path).unwrap();
        let full = (0..1 << 20).find_map(|_| file.write_all(&[1; 4096]).err());
        let full = full.expect("it fills up");
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull, "{full}");
    };
    let free = || {
        // Its process may have ended meanwhile, and with it the only mount.
        let _ = std::fs::remove_file(&path);
    };
    for_a_while(tap, fill, free);
}
