//! A guest that does not run keeps standing still wherever it ends up, and one that shuts itself down is not lost.

use memlane_api::types::{Outcome, Phase};
use memlane_lab::{HostId, wait_for};

use crate::common::LONG;
use crate::common::qemu::assert_says_no;
use crate::scene::{Scene, slow};

#[test]
fn a_paused_guest_moves_and_stays_paused() {
    let Some(scene) = Scene::new("a_paused_guest_moves_and_stays_paused", "", None) else { return };
    scene.here.run("stop");
    scene.assert_moves_and_stays("paused");
    // Before 10.0, QEMU must have taken its disks before it can give them up.
    let back = scene.wait_at_a();
    let answer = scene.stage.rig.ctl(HostId::B, &["migrate", "web1", "host-a", "--verify"]).unwrap();
    if back.run("query-version")["qemu"]["major"].as_u64().unwrap() >= 10 {
        assert_eq!(answer.code, 0, "{}", answer.text);
        assert_eq!(back.run("query-status")["status"], "paused");
        return;
    }
    assert_says_no(&answer, &["has not run since", "let it run once"]);
    // Its operator has it run, and it answers.
    scene.there.run("cont");
    scene.press(&scene.there, "q");
    wait_for("the guest to shut itself down", LONG, || {
        (!scene.stage.rig.ctl(HostId::B, &["guests"]).ok()?.text.contains("web1")).then_some(())
    })
    .unwrap();
}

#[test]
fn a_guest_that_was_shut_down_stays_so() {
    let Some(scene) = Scene::new("a_guest_that_was_shut_down_stays_so", "-no-shutdown", None) else { return };
    scene.press(&scene.here, "q");
    scene.wait_for_status(&scene.here, "shutdown");
    scene.assert_moves_and_stays("shutdown");
}

/// Before 9.0, QEMU wakes it up: such a move is refused.
#[test]
fn a_suspended_guest_stays_so_or_does_not_move() {
    let Some(scene) = Scene::new("a_suspended_guest_stays_so_or_does_not_move", "", None) else { return };
    scene.press(&scene.here, "s");
    scene.wait_for_status(&scene.here, "suspended");
    if scene.here.run("query-version")["qemu"]["major"].as_u64().unwrap() >= 9 {
        return scene.assert_moves_and_stays("suspended");
    }
    let answer = scene.stage.migrate("web1", &[]);
    assert_eq!(answer.code, 3, "{}", answer.text);
    assert!(answer.text.contains("suspended (S3)") && answer.text.contains("wake it up"), "{}", answer.text);
    scene.wait_for_status(&scene.here, "suspended");
}

/// It is paused by its operator while it is copied, once so that it moves and once so that it does not.
#[test]
fn a_guest_that_is_paused_while_it_is_copied_is_not_run() {
    let test = "a_guest_that_is_paused_while_it_is_copied_is_not_run";
    let Some(scene) = Scene::new(test, "", slow()) else { return };
    scene.fill();
    let order = scene.stage.begin("web1", &["--compression", "off"]);
    scene.stage.wait_until(HostId::A, "web1", "copying", |moved| moved.phase == Phase::Copying);
    scene.here.run("stop");
    scene.stage.rig.ctl(HostId::A, &["cancel", "web1"]).unwrap();
    order.expect(5, &[]);
    scene.wait_for_status(&scene.here, "paused");
    scene.assert_moves_and_stays("paused");
}

#[test]
fn a_guest_that_powers_itself_off_while_it_is_copied() {
    let test = "a_guest_that_powers_itself_off_while_it_is_copied";
    let Some(scene) = Scene::new(test, "", slow()) else { return };
    scene.fill();
    let order = scene.stage.begin("web1", &["--compression", "off"]);
    scene.stage.wait_until(HostId::A, "web1", "copying", |moved| moved.phase == Phase::Copying);
    scene.press(&scene.here, "q");
    order.expect(9, &["the guest powered off at host-a"]);
    scene.there.run("query-status");
}

/// What it has not fetched it needs no more.
#[test]
fn a_guest_that_powers_itself_off_while_it_is_fetched() {
    let test = "a_guest_that_powers_itself_off_while_it_is_fetched";
    let Some(scene) = Scene::new(test, "", slow()) else { return };
    scene.fill();
    let order = scene.stage.begin("web1", &["--postcopy", "now", "--compression", "off"]);
    scene.stage.wait_until(HostId::B, "web1", "fetching", |moved| moved.phase == Phase::Fetching);
    scene.press(&scene.there, "q");
    order.expect(9, &["the guest powered off at host-b"]);
    let there = scene.stage.wait_until(HostId::B, "web1", "the end", |moved| moved.outcome.is_some());
    assert_eq!(there.outcome, Some(Outcome::PoweredOff), "{there:#?}");
}
