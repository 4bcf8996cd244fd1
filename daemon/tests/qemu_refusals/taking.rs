//! QEMUs that a daemon does not take.

use std::os::unix::net::UnixStream;

use memlane_lab::{HostId, wait_for};
use serde_json::json;

use crate::common::{LONG, Stage};
use crate::impostor;
use crate::qemu::{Qemu, assert_says_no, attach, guest_file, ram_file, stage};

#[test]
fn memory_that_the_daemon_cannot_see() {
    let Some(stage) = stage("memory_that_the_daemon_cannot_see", false, "") else { return };
    let host = stage.rig.lab().host(HostId::A);
    let backend = |kind: &str| format!("-m 64M -object memory-backend-{kind},id=mem,size=64M");
    let used = "-machine memory-backend=mem";
    let (file, directory) = (ram_file(host, "web1"), host.memory_directory().display());
    let cannot_be_seen = [
        "cannot be moved",
        "memlane-qemu",
        "memory-backend-file,",
        "share=on,",
        "mem-path=",
        "memory-backend=mem",
    ];
    for (arguments, why) in [
        ("-m 64M".to_owned(), &["pc.ram (memory-backend-ram"][..]),
        (format!("{},share=on {used}", backend("ram")), &["mem (memory-backend-ram)"]),
        (format!("{},share=off {used}", backend("memfd")), &["mem (memory-backend-memfd, share=off)"]),
        (format!("{},mem-path={file} {used}", backend("file")), &["mem (memory-backend-file, share=off)"]),
        // As it should be, but the machine does not use it.
        (format!("{},share=on,mem-path={file}", backend("file")), &["pc.ram (memory-backend-ram"]),
    ] {
        let qemu = Qemu::start_bare(host, "web1", &arguments);
        assert_not_taken(&stage, &qemu, &[], &[why, &cannot_be_seen].concat());
    }
    let nameless = format!("{},share=on,mem-path={directory} {used}", backend("file"));
    let qemu = Qemu::start_bare(host, "web1", &nameless);
    assert_not_taken(&stage, &qemu, &[], &["has no name that the daemon could open", "LD_PRELOAD="]);

    drop(qemu);
    assert_taken(&stage, &Qemu::start(host, "web1", ""));
}

#[test]
fn a_qemu_that_cannot_be_talked_to() {
    let Some(stage) = stage("a_qemu_that_cannot_be_talked_to", false, "") else { return };
    let host = stage.rig.lab().host(HostId::A);
    let monitor = host.directory().join("web1.hmp");
    let qemu = Qemu::start(host, "web1", &format!("-monitor unix:{},server=on,wait=off", monitor.display()));

    let absent = host.directory().join("absent");
    let answer = attach(&stage, HostId::A, "web1", &absent, &[]);
    assert_says_no(&answer, &["absent", "No such file", "-qmp unix:PATH,server=on,wait=off"]);
    let answer = attach(&stage, HostId::A, "web1", &monitor, &[]);
    assert_says_no(&answer, &["web1.hmp", "no QMP monitor", "-qmp"]);

    // The daemon has to believe the socket: an older QEMU is not to be had everywhere.
    let older = host.directory().join("older");
    impostor::older_monitor(&older, &qemu.qmp, [7, 1, 50]);
    let answer = attach(&stage, HostId::A, "web1", &older, &[]);
    assert_says_no(&answer, &["QEMU 7.1.50 is too old", "install 7.2 or newer"]);

    let other = UnixStream::connect(&qemu.qmp).unwrap();
    assert_not_taken(&stage, &qemu, &[], &["another program may be connected", "a -qmp socket of its own"]);
    drop(other);

    assert_taken(&stage, &qemu);
    // By its other monitor.
    let answer = attach(&stage, HostId::A, "other", &qemu.ours, &[]);
    assert_says_no(&answer, &["is here already, as guest web1", "memlanectl detach web1"]);
    let second = Qemu::start(host, "second", "");
    let taken = ["a guest named web1 is here already", "unique"];
    assert_says_no(&second.attach(&stage, HostId::A, "web1", &[]), &taken);
    let file = guest_file(host, "web1", "", "");
    assert_says_no(&stage.rig.ctl(HostId::A, &["launch", &file]).unwrap(), &taken);
    qemu.assert_runs();
    second.assert_runs();
}

#[test]
fn a_qemu_that_is_not_what_was_said() {
    let Some(stage) = stage("a_qemu_that_is_not_what_was_said", false, "") else { return };
    let host = stage.rig.lab().host(HostId::A);
    let running = Qemu::start(host, "web1", "");
    assert_not_taken(&stage, &running, &["--incoming"], &["does not wait for a guest", "-incoming defer"]);
    assert_taken(&stage, &running);

    let waiting = Qemu::start(host, "web2", "-incoming defer");
    let answer = waiting.attach(&stage, HostId::A, "web2", &[]);
    assert_says_no(&answer, &["waits for a guest", "say so with --incoming"]);
    let answer = waiting.attach(&stage, HostId::A, "web2", &["--incoming"]);
    assert_eq!(answer.code, 0, "{}", answer.text);

    let listening = host.directory().join("listening");
    let listening = Qemu::start(host, "web3", &format!("-incoming unix:{}", listening.display()));
    let answer = listening.attach(&stage, HostId::A, "web3", &["--incoming"]);
    assert_says_no(&answer, &["a migration of its own", "-incoming defer"]);

    let foreign = Qemu::start_as_nobody(host, "web4");
    let answer = foreign.attach(&stage, HostId::A, "web4", &[]);
    assert_says_no(&answer, &["runs as user 65534", "attach_users"]);
    foreign.assert_runs();
}

#[test]
fn a_guest_that_cannot_be_started() {
    let Some(mut stage) = stage("a_guest_that_cannot_be_started", false, "") else { return };
    let host = stage.rig.lab().host(HostId::A);
    let nic = "[[nic]]\nmac = \"52:54:00:4d:4c:01\"\ntap = \"tap-web1\"\nnetwork = \"lan\"";
    let qemu = host.qemu().display().to_string();
    for (arguments, more, why) in [
        ("", nic, &["tap tap-web1", "ip tuntap add tap-web1 mode tap", "nic.tap"][..]),
        ("", "qemu = \"/usr/bin/other\"", &["/usr/bin/other", "guests.qemu", &qemu]),
        ("-machine pc-q35-99.0", "", &["unsupported machine type", "-machine help"]),
        ("-cpu NoSuch", "", &["CPU model 'NoSuch'"]),
        ("-drive file=/absent/disk", "", &["-drive file=/absent/disk", "No such file"]),
    ] {
        let file = guest_file(host, "web1", arguments, more);
        let answer = stage.rig.ctl(HostId::A, &["launch", &file]).unwrap();
        assert_says_no(&answer, why);
        assert!(stage.rig.guest(HostId::A, "web1").unwrap().is_none());
    }
    // A mistake in the file itself.
    for (arguments, why) in [
        ("-m 1G", ["\"-m\"", "memory = "]),
        ("-incoming defer", ["\"-incoming\"", "memlanectl launch --incoming"]),
        ("-machine memory-backend=mem", ["\"memory-backend=mem\"", "the daemon gives the guest its RAM"]),
    ] {
        let file = guest_file(host, "web1", arguments, "");
        let answer = stage.rig.ctl(HostId::A, &["launch", &file]).unwrap();
        assert_eq!(answer.code, 2, "{}", answer.text);
        assert!(why.iter().all(|why| answer.text.contains(why)), "{}", answer.text);
    }
    let file = guest_file(host, "web1", "", "");
    stage.reconfigure(HostId::A, |text| text.replace("libmemlane_shim.so", "absent.so"));
    let answer = stage.rig.ctl(HostId::A, &["launch", &file]).unwrap();
    assert_says_no(&answer, &["absent.so", "guests.shim"]);
    stage.reconfigure(HostId::A, |text| text.replace("absent.so", "libmemlane_shim.so"));
    stage.launch(HostId::A, &file);
    stage.wait_for_standing(HostId::A, "web1", "running");
}

/// The daemon refuses to take a running QEMU as `web1`, and harms nothing.
#[track_caller]
fn assert_not_taken(stage: &Stage, qemu: &Qemu, more: &[&str], why: &[&str]) {
    assert_says_no(&qemu.attach(stage, HostId::A, "web1", more), why);
    assert!(stage.rig.guest(HostId::A, "web1").unwrap().is_none());
    qemu.assert_runs();
}

#[track_caller]
fn assert_taken(stage: &Stage, qemu: &Qemu) {
    let answer = qemu.attach(stage, HostId::A, "web1", &[]);
    assert_eq!(answer.code, 0, "{}", answer.text);
    stage.wait_for_standing(HostId::A, "web1", "running");
    qemu.assert_runs();
}

/// Its copy may run elsewhere: a daemon that finds it so must not let it run.
#[test]
fn a_guest_that_qemu_has_moved_by_itself() {
    let Some(mut stage) = stage("a_guest_that_qemu_has_moved_by_itself", false, "") else { return };
    let qemu = Qemu::start(stage.rig.lab().host(HostId::A), "web1", "");
    let answer = qemu.attach(&stage, HostId::A, "web1", &[]);
    assert_eq!(answer.code, 0, "{}", answer.text);
    qemu.run_with("migrate", json!({ "uri": "exec:cat > /dev/null" }));
    let status = || qemu.run("query-status")["status"].as_str().unwrap().to_owned();
    wait_for("the end of QEMU's own migration", LONG, || (status() == "postmigrate").then_some(())).unwrap();
    stage.assert_refused("web1", &[], &["postmigrate", "QEMU has migrated the guest by itself"]);
    stage.rig.start_daemon(HostId::A).unwrap();
    stage.wait_for_log(HostId::A, "told to migrate by others");
    assert_eq!(status(), "postmigrate");
    assert!(stage.rig.guest(HostId::A, "web1").unwrap().is_none());
    // Its operator settles it.
    qemu.run("cont");
    stage.wait_for_standing(HostId::A, "web1", "running");
}
