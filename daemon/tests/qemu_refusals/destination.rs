//! What the host that a guest is to move to has against it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use memlane_lab::HostId;
use memlane_lab::qemu;

use crate::daemon::{MEMLANED, start_by, start_where};
use crate::qemu::{Qemu, assert_moves, guest_file, ram, stage};

#[test]
fn nobody_waits_or_somebody_else() {
    let Some(stage) = stage("nobody_waits_or_somebody_else", false, "") else { return };
    let [a, b] = stage.rig.lab().hosts();
    stage.launch(HostId::A, &guest_file(a, "web1", "", ""));
    let nobody = "no VMM waits for a guest named web1";
    let why = [nobody, "may_start_guests = true for [[peer]] host-a", "memlanectl launch --incoming"];
    stage.assert_refused("web1", &[], &why);

    let by_hand = Qemu::start(a, "web2", "");
    let answer = by_hand.attach(&stage, HostId::A, "web2", &[]);
    assert_eq!(answer.code, 0, "{}", answer.text);
    let why = ["no VMM waits for a guest named web2", "-incoming defer", "memlanectl attach --incoming"];
    stage.assert_refused("web2", &[], &why);
    by_hand.assert_runs();

    // Everything else that is wrong is told at once.
    let other = format!("{} -machine pc-q35-7.1 -cpu qemu64 -smp 2 -incoming defer", ram(b, "other", 32));
    let other = Qemu::start_bare(b, "other", &other);
    let answer = other.attach(&stage, HostId::B, "web1", &["--incoming"]);
    assert_eq!(answer.code, 0, "{}", answer.text);
    let why = ["-machine pc-q35-7.2", "-cpu Nehalem", "1 vCPUs", "0x4000000 bytes", "0x2000000 bytes"];
    stage.assert_refused("web1", &[], &why);
    drop(other);
    stage.wait_for_absence(HostId::B, "web1");

    let launched = |arguments: &str| {
        let file = guest_file(b, "web1", arguments, "");
        let answer = stage.rig.ctl(HostId::B, &["launch", "--incoming", &file]).unwrap();
        assert_eq!(answer.code, 0, "{}", answer.text);
    };
    launched("-machine pc-i440fx-7.2");
    stage.assert_refused("web1", &[], &["pc-i440fx-7.2; start that one with -machine pc-q35-7.2"]);
    stage.kill_qemu(HostId::B, "web1");
    stage.wait_for_absence(HostId::B, "web1");

    launched("");
    assert_moves(&stage);
    stage.wait_for_standing(HostId::A, "web2", "running");
}

/// The disk and the tap that the guest file names, the network that its NIC is on, and the program.
#[test]
fn what_the_destination_lacks() {
    let Some(mut stage) = stage("what_the_destination_lacks", true, "") else { return };
    let a = stage.rig.lab().host(HostId::A);
    let (disks, none) = (a.directory().join("disks"), a.directory().join("none"));
    for directory in [&disks, &none] {
        fs::create_dir(directory).unwrap();
    }
    let disk = disks.join("web1.img");
    let file = fs::File::create(&disk).unwrap();
    file.set_len(1 << 20).unwrap();
    // The guest's user is another on each host.
    file.set_permissions(Permissions::from_mode(0o666)).unwrap();
    let drive = format!("-drive file={},format=raw,if=virtio", disk.display());
    let nic = "[[nic]]\nmac = \"52:54:00:4d:4c:01\"\ntap = \"tap-web1\"\nnetwork = \"lan\"";
    a.add_tap("tap-web1").unwrap();
    stage.launch(HostId::A, &guest_file(a, "web1", &drive, nic));

    let daemon = start_where(&mut stage, HostId::B, &disks, &none);
    let disk = format!("disk {} is not there", disk.display());
    stage.assert_refused("web1", &[], &[&disk, "-drive file="]);
    drop(daemon);
    stage.rig.start_daemon(HostId::B).unwrap();

    stage.assert_refused(
        "web1",
        &[],
        &["network", "tap tap-web1", "ip tuntap add tap-web1 mode tap", "nic.tap"],
    );
    stage.rig.lab().host(HostId::B).add_tap("tap-web1").unwrap();

    stage.reconfigure(HostId::B, |text| text.replace("name = \"lan\"", "name = \"wan\""));
    stage.assert_refused("web1", &[], &["network lan is not configured", "[[network]]"]);
    stage.reconfigure(HostId::B, |text| text.replace("name = \"wan\"", "name = \"lan\""));

    let daemon = start_by(&mut stage, HostId::B, &["prlimit", "--nofile=64"], Path::new(MEMLANED));
    stage.assert_refused("web1", &[], &["file descriptors", "LimitNOFILE"]);
    drop(daemon);
    stage.rig.start_daemon(HostId::B).unwrap();

    let qemu = qemu::program().display().to_string();
    stage.reconfigure(HostId::B, |text| text.replace(&format!("[\"{qemu}\"]"), "[]"));
    stage.assert_refused("web1", &[], &[&qemu, "guests.qemu", "allows none"]);
    stage.reconfigure(HostId::B, |text| text.replace("qemu = []", &format!("qemu = [\"{qemu}\"]")));

    assert_moves(&stage);
}

/// The program that the guest file names is another one at the destination.
#[test]
fn what_the_destinations_qemu_lacks() {
    let Some(mut stage) = stage("what_the_destinations_qemu_lacks", true, "") else { return };
    let directory = stage.rig.lab().host(HostId::A).directory().to_owned();
    let program = directory.join("qemu");
    script(&program, "true");
    let allowed = format!("[\"{}\"]", program.display());
    for id in [HostId::A, HostId::B] {
        let qemu = qemu::program();
        stage.reconfigure(id, |text| text.replace(&format!("[\"{}\"]", qemu.display()), &allowed));
    }
    let qemu = format!("qemu = \"{}\"", program.display());
    stage.launch(HostId::A, &guest_file(stage.rig.lab().host(HostId::A), "web1", "", &qemu));

    for (ours, theirs, why) in [
        ("pc-q35-7.2", "pc-q35-99.0", &["machine", "unsupported machine type", "(-machine)"][..]),
        ("Nehalem", "NoSuch", &["machine", "CPU model 'NoSuch'", "(-cpu)"]),
        // It knows the name, and means something else by it.
        (
            "pc-q35-7.2",
            "pc-q35-7.1",
            &["machine type pc-q35-7.2", "waits for it pc-q35-7.1", "-machine pc-q35-7.2"],
        ),
    ] {
        let other = directory.join(format!("qemu-{theirs}"));
        script(&other, &renaming(ours, theirs));
        let daemon = start_where(&mut stage, HostId::B, &program, &other);
        stage.assert_refused("web1", &[], why);
        stage.wait_for_absence(HostId::B, "web1");
        drop(daemon);
    }
    stage.rig.start_daemon(HostId::B).unwrap();
    assert_moves(&stage);
}

/// A QEMU that does something else first.
fn script(path: &Path, first: &str) {
    let qemu = qemu::program();
    fs::write(path, format!("#!/bin/sh\n{first}\nexec {} \"$@\"\n", qemu.display())).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
}

/// Changes one argument of a script.
fn renaming(ours: &str, theirs: &str) -> String {
    let change = format!("case $argument in {ours}) argument={theirs} ;; esac");
    format!("for argument; do shift; {change}; set -- \"$@\" \"$argument\"; done")
}
