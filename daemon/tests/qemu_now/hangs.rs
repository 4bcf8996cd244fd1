//! A QEMU that hangs is said to hang, with the reason, and the move goes on when QEMU does.

use memlane_api::types::Phase;
use memlane_lab::HostId;
use rustix::process::Signal;

use crate::common::qemu::assert_says_no;
use crate::scene::{Scene, slow};

#[test]
fn a_qemu_that_is_stopped_is_told_from_one_that_is_gone() {
    let Some(scene) = Scene::new("a_qemu_that_is_stopped_is_told_from_one_that_is_gone", "", None) else {
        return;
    };
    scene.here.signal(Signal::STOP);
    for command in ["check", "migrate"] {
        let answer = scene.stage.rig.ctl(HostId::A, &[command, "web1", "host-b"]).unwrap();
        assert_says_no(&answer, &["is stopped", "kill -CONT"]);
    }
    scene.here.signal(Signal::CONT);
    scene.there.signal(Signal::STOP);
    for command in ["check", "migrate"] {
        let answer = scene.stage.rig.ctl(HostId::A, &[command, "web1", "host-b"]).unwrap();
        assert_says_no(&answer, &["host-b", "is stopped", "kill -CONT"]);
    }
    scene.there.signal(Signal::CONT);
    scene.here.assert_runs();
    let answer = scene.stage.migrate("web1", &["--verify"]);
    assert_eq!(answer.code, 0, "{}", answer.text);
    scene.there.assert_runs();
}

#[test]
fn a_move_goes_on_when_its_qemu_does() {
    let Some(scene) = Scene::new("a_move_goes_on_when_its_qemu_does", "", slow()) else { return };
    scene.fill();
    let order = scene.stage.begin("web1", &["--compression", "off", "--verify", "--patience", "60s"]);
    scene.stage.wait_until(HostId::A, "web1", "copying", |moved| moved.phase == Phase::Copying);
    scene.here.signal(Signal::STOP);
    let told = scene
        .stage
        .wait_until(HostId::A, "web1", "word of what is waited for", |moved| moved.waits_for.is_some());
    let waits_for = told.waits_for.unwrap();
    assert!(waits_for.contains("QEMU (process") && waits_for.contains("is stopped"), "{waits_for}");
    scene.here.signal(Signal::CONT);
    order.expect(0, &[]);
    scene.there.assert_runs();
}
