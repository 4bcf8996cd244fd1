//! QEMUs that others have started, in the ways in which people start them, are taken in and move.

mod common;

use common::qemu::{NOBODY, Qemu, assert_moves, attach, open_to_nobody, stage};
use memlane_lab::HostId;

/// Proxmox and many scripts start QEMU so: the process that is left is another one than was started, and becomes another
/// user afterwards.
#[test]
fn a_qemu_in_the_background() {
    let keys = format!("attach_users = [0, {NOBODY}]\n");
    let Some(stage) = stage("a_qemu_in_the_background", false, &keys) else { return };
    let [a, b] = stage.rig.lab().hosts();
    for host in [a, b] {
        open_to_nobody(host);
    }
    let here = Qemu::start_in_background(a, "web1", "");
    let there = Qemu::start_in_background(b, "web1", "-incoming defer");
    for (id, qemu, more) in [(HostId::A, &here, &[][..]), (HostId::B, &there, &["--incoming"])] {
        let answer = attach(&stage, id, "web1", &qemu.qmp, more);
        assert_eq!(answer.code, 0, "{}", answer.text);
    }
    assert_moves(&stage);
}
