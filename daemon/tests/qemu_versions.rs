//! A guest moves between versions of QEMU, and stays the machine that it is.

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::{LIMITS, Stage};
use memlane_lab::qemu::{self, Version};
use memlane_lab::{HostId, LabOptions, Requirement, RigOptions, say_skipped};

/// All versions are used whichever one the tests are run with, so [`Requirement::Qemu`] is not among these.
const NEEDS: &[Requirement] = &[Requirement::Root, Requirement::Ip, Requirement::Tc, Requirement::Kernel];

/// It is started as a `q35` of the oldest version, which is another machine in each of the newer ones.
#[test]
fn linux_moves_to_newer_versions_and_back() {
    let test = "linux_moves_to_newer_versions_and_back";
    if let Some(lacking) = qemu::VERSIONS.into_iter().find(|version| !version.program().exists()) {
        return say_skipped(
            test,
            &format!("QEMU {} is not unpacked (`cargo xtask test` does it)", lacking.name),
        );
    }
    let lab = LabOptions { switch: true, ..LabOptions::default() };
    let options = RigOptions { lab, tables: LIMITS.into(), may_start_guests: true, ..RigOptions::default() };
    let Some(mut stage) = Stage::with(test, NEEDS, options) else {
        return;
    };
    let [oldest, middle, newest] = qemu::VERSIONS;
    let program = stage.rig.lab().host(HostId::A).directory().join("qemu");
    script(&program, oldest);
    for id in [HostId::A, HostId::B] {
        let (before, now) = (qemu::program().display().to_string(), program.display().to_string());
        stage.reconfigure(id, |text| text.replace(&before, &now));
    }
    have(&mut stage, HostId::A, &program, oldest);
    let mut linux = stage.linux(|guest| guest.qemu = program.clone());
    let mut from = HostId::A;
    for version in [newest, middle, oldest] {
        have(&mut stage, from.other(), &program, version);
        linux.assert_moves(&stage, from);
        from = from.other();
    }
    linux.assert_whole(&stage);
}

/// From now on the daemon of a host starts this version as `program`; a QEMU that runs there runs on.
fn have(stage: &mut Stage, id: HostId, program: &Path, version: Version) {
    let other: PathBuf = format!("{}-{}", program.display(), version.name).into();
    script(&other, version);
    let see = format!("mount --bind {} {}", other.display(), program.display());
    stage.rig.start_daemon_after(id, &see).unwrap();
}

/// A program that becomes that version.
fn script(path: &Path, version: Version) {
    fs::write(path, format!("#!/bin/sh\nexec {} \"$@\"\n", version.program().display())).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
}
