//! What was plugged, unplugged, inserted, ejected and limited since the launch arrives so, or is refused by name.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use memlane_lab::qmp::Monitor;
use memlane_lab::{HostId, LabHost, wait_for};
use serde_json::{Value, json};

use crate::common::qemu::{Qemu, assert_says_no, attach_both, guest_file, stage};
use crate::common::{LONG, Stage};

/// Drives and a USB controller, whose devices go at once: others ask the guest first.
const DEVICES: &str = "-device qemu-xhci,id=usb \
    -drive if=none,id=cd,media=cdrom,format=raw,file={a.iso} -device ide-cd,drive=cd,id=cd0 \
    -drive if=none,id=stick,format=raw,file={stick.img} -device usb-storage,bus=usb.0,drive=stick,id=stick0 \
    -drive if=none,id=disk,format=raw,file={disk.img} -device virtio-blk-pci,drive=disk,id=disk0";

/// A guest that its daemon has launched. Its QEMU, and that of each host that it comes to, connects to the test.
struct Launched {
    stage: Stage,
    directory: PathBuf,
    listener: UnixListener,
    monitor: Monitor,
}

impl Launched {
    fn new(test: &str) -> Option<Self> {
        let stage = stage(test, true, "")?;
        let host = stage.rig.lab().host(HostId::A);
        let directory = open_directory(host);
        let socket = directory.join("test.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, Permissions::from_mode(0o777)).unwrap();
        let monitor = format!(
            " -chardev socket,id=test,path={},server=off -mon chardev=test,mode=control",
            socket.display()
        );
        let file = guest_file(host, "web1", &(with_files(DEVICES, &directory) + &monitor), "");
        let answer = stage.rig.ctl(HostId::A, &["launch", &file]).unwrap();
        assert_eq!(answer.code, 0, "{}", answer.text);
        let monitor = Monitor::accept(&listener).unwrap();
        Some(Self { stage, directory, listener, monitor })
    }

    /// Runs a command in the QEMU that has the guest.
    #[track_caller]
    fn run(&mut self, command: &str, arguments: Value) -> Value {
        self.monitor.execute(command, arguments).unwrap()
    }

    fn drive(&mut self, name: &str) -> Option<Value> {
        let drives = self.run("query-block", json!({}));
        drives.as_array().unwrap().iter().find(|drive| drive["device"] == name).cloned()
    }

    #[track_caller]
    fn assert_moves(&mut self, from: HostId) {
        let to = if from == HostId::A { "host-b" } else { "host-a" };
        let answer = self.stage.rig.ctl(from, &["migrate", "web1", to, "--verify"]).unwrap();
        assert_eq!(answer.code, 0, "{}", answer.text);
        self.stage.wait_for_standing(from.other(), "web1", "running");
        self.stage.wait_for_end("web1");
        // One that was started for a check has ended.
        let alive = (0..3).find_map(|_| Monitor::accept(&self.listener).ok());
        self.monitor = alive.unwrap();
    }
}

/// Makes a directory for all users, with the files of the disks in it.
fn open_directory(host: &LabHost) -> PathBuf {
    let directory = host.directory().join("disks");
    fs::create_dir_all(&directory).unwrap();
    for above in directory.ancestors().skip(1).take(2) {
        fs::set_permissions(above, Permissions::from_mode(0o711)).unwrap();
    }
    fs::set_permissions(&directory, Permissions::from_mode(0o777)).unwrap();
    for file in ["a.iso", "b.iso", "stick.img", "disk.img"] {
        let path = directory.join(file);
        fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
    }
    directory
}

fn with_files(arguments: &str, directory: &std::path::Path) -> String {
    arguments.replace('{', &format!("{}/", directory.display())).replace('}', "")
}

#[test]
fn what_has_changed_since_the_launch_arrives_so() {
    let Some(mut guest) = Launched::new("what_has_changed_since_the_launch_arrives_so") else { return };
    let other = guest.directory.join("b.iso");
    guest.run("blockdev-change-medium", json!({ "id": "cd0", "filename": other, "format": "raw" }));
    guest.run("device_del", json!({ "id": "stick0" }));
    wait_for("the drive to go", LONG, || guest.drive("stick").is_none().then_some(())).unwrap();
    let limits = json!({
        "device": "disk", "bps": 1_000_000, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 77,
    });
    guest.run("block_set_io_throttle", limits.clone());
    // Whatever would be opened that is not there any more fails.
    for gone in ["a.iso", "stick.img"] {
        fs::remove_file(guest.directory.join(gone)).unwrap();
    }
    for from in [HostId::A, HostId::B] {
        guest.assert_moves(from);
        let cd = guest.drive("cd").unwrap();
        assert_eq!(cd["inserted"]["file"], json!(other), "{cd}");
        let disk = guest.drive("disk").unwrap();
        assert_eq!(
            (&disk["inserted"]["bps"], &disk["inserted"]["iops_wr"]),
            (&json!(1_000_000), &json!(77)),
            "{disk}"
        );
        assert!(guest.drive("stick").is_none_or(|stick| stick["inserted"].is_null()));
    }
    // And once more, what has changed since the last move.
    guest.run("eject", json!({ "id": "cd0", "force": true }));
    let mut free = limits;
    (free["bps"], free["iops_wr"]) = (json!(0), json!(0));
    guest.run("block_set_io_throttle", free);
    fs::remove_file(other).unwrap();
    guest.assert_moves(HostId::A);
    assert!(guest.drive("cd").unwrap()["inserted"].is_null());
    assert_eq!(guest.drive("disk").unwrap()["inserted"]["bps"], 0);
}

#[test]
fn what_was_plugged_in_is_refused_by_name() {
    let Some(mut guest) = Launched::new("what_was_plugged_in_is_refused_by_name") else { return };
    guest.run("device_add", json!({ "driver": "usb-tablet", "id": "pen7", "bus": "usb.0" }));
    for command in ["check", "migrate"] {
        let answer = guest.stage.rig.ctl(HostId::A, &[command, "web1", "host-b"]).unwrap();
        assert_says_no(&answer, &["pen7 (usb-tablet)", "plugged in since", "device_del pen7"]);
    }
    guest.run("device_del", json!({ "id": "pen7" }));
    guest.assert_moves(HostId::A);
}

/// What waits was started by others, and is left to them.
#[test]
fn a_waiting_qemu_that_differs_is_refused_by_its_parts() {
    let test = "a_waiting_qemu_that_differs_is_refused_by_its_parts";
    let Some(stage) = stage(test, false, "") else { return };
    let [a, b] = stage.rig.lab().hosts();
    let directory = open_directory(a);
    let arguments = with_files(DEVICES, &directory);
    let here = Qemu::start(a, "web1", &arguments);
    let there =
        Qemu::start(b, "web1", &format!("{arguments} -device usb-tablet,bus=usb.0,id=pen7 -incoming defer"));
    attach_both(&stage, &here, &there);
    here.run_with("eject", json!({ "id": "cd0", "force": true }));
    let answer = stage.migrate("web1", &[]);
    let cd = format!("drive cd with {}/a.iso (raw, read-only) in it", directory.display());
    assert_says_no(
        &answer,
        &["the guest has drive cd with nothing in it", &cd, "pen7 (usb-tablet)", "start that one without it"],
    );
    here.assert_runs();
    assert_eq!(there.run("query-status")["status"], "inmigrate");
}
