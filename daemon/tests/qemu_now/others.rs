//! What others have QEMU do neither suffers from a move nor spoils it.

use memlane_api::types::Phase;
use memlane_lab::HostId;
use serde_json::{Value, json};

use crate::common::qemu::{Qemu, assert_says_no};
use crate::scene::{Scene, slow};

/// Two disks that hold nothing: one is copied to the other.
const DISKS: &str =
    "-blockdev driver=null-co,node-name=from,size=1048576 -blockdev driver=null-co,node-name=to,size=1048576";

/// Begins to copy the first disk to the second, as backups and moves of disks do. It ends only when it is told to.
fn mirror(qemu: &Qemu) {
    let job = json!({ "job-id": "backup7", "device": "from", "target": "to", "sync": "full" });
    qemu.run_with("blockdev-mirror", job);
}

fn jobs(qemu: &Qemu) -> usize {
    qemu.run("query-jobs").as_array().unwrap().len()
}

fn capabilities(qemu: &Qemu) -> Value {
    qemu.run("query-migrate-capabilities")
}

#[test]
fn a_block_job_is_seen_before_and_left_alone() {
    let Some(scene) = Scene::new("a_block_job_is_seen_before_and_left_alone", DISKS, None) else { return };
    mirror(&scene.here);
    for command in ["check", "migrate"] {
        let answer = scene.stage.rig.ctl(HostId::A, &[command, "web1", "host-b"]).unwrap();
        assert_says_no(&answer, &["backup7", "mirror", "job-cancel"]);
    }
    assert_eq!(jobs(&scene.here), 1);
    scene.here.assert_runs();
}

/// It has begun while the guest was copied: the move ends, and the job goes on.
#[test]
fn a_block_job_that_comes_later_is_left_alone() {
    let Some(scene) = Scene::new("a_block_job_that_comes_later_is_left_alone", DISKS, slow()) else { return };
    scene.fill();
    // What another program has set is in force while the guest is copied, and afterwards.
    let set = json!({ "capabilities": [{ "capability": "return-path", "state": true }] });
    scene.here.run_with("migrate-set-capabilities", set);
    let before = capabilities(&scene.here);
    let order = scene.stage.begin("web1", &["--compression", "off"]);
    scene.stage.wait_until(HostId::A, "web1", "copying", |moved| moved.phase == Phase::Copying);
    mirror(&scene.here);
    assert_eq!(capabilities(&scene.here), before);
    order.expect(4, &["backup7", "mirror", "begun while the guest was copied"]);
    assert_eq!(jobs(&scene.here), 1);
    assert_eq!(capabilities(&scene.here), before);
    scene.here.assert_runs();
}

/// Another program saves the guest, which QEMU does by migrating it: nothing is cancelled.
#[test]
fn a_save_by_another_program_is_left_alone() {
    let Some(scene) = Scene::new("a_save_by_another_program_is_left_alone", "", slow()) else { return };
    scene.fill();
    let order = scene.stage.begin("web1", &["--compression", "off"]);
    scene.stage.wait_until(HostId::A, "web1", "copying", |moved| moved.phase == Phase::Copying);
    let slowly = json!({ "max-bandwidth": 1 << 20 });
    scene.here.run_with("migrate-set-parameters", slowly);
    scene.here.run_with("migrate", json!({ "uri": "exec:cat > /dev/null" }));
    order.expect(4, &["another program has QEMU migrate or save the guest"]);
    assert_eq!(scene.here.run("query-migrate")["status"], "active");
    scene.here.assert_runs();
}

/// It has ended by then, and the guest is elsewhere, or in a file: here it must not run.
#[test]
fn a_guest_that_others_have_moved_away_is_not_run_here() {
    let Some(scene) = Scene::new("a_guest_that_others_have_moved_away_is_not_run_here", "", slow()) else {
        return;
    };
    scene.fill();
    let order = scene.stage.begin("web1", &["--compression", "off"]);
    scene.stage.wait_until(HostId::A, "web1", "copying", |moved| moved.phase == Phase::Copying);
    let fast = json!({ "max-bandwidth": 1u64 << 40 });
    scene.here.run_with("migrate-set-parameters", fast);
    scene.here.run_with("migrate", json!({ "uri": "exec:cat > /dev/null" }));
    scene.wait_for_status(&scene.here, "postmigrate");
    scene.stage.rig.ctl(HostId::A, &["cancel", "web1"]).unwrap();
    order.expect(5, &[]);
    assert_eq!(scene.here.run("query-status")["status"], "postmigrate");
}

/// The other host was told what QEMU is made of before that.
#[test]
fn a_medium_that_is_changed_while_the_guest_is_copied_ends_the_move() {
    const DRIVE: &str =
        "-blockdev driver=null-co,node-name=iso,size=1048576,read-only=on -device ide-cd,drive=iso,id=cd0";
    let test = "a_medium_that_is_changed_while_the_guest_is_copied_ends_the_move";
    let Some(scene) = Scene::new(test, DRIVE, slow()) else { return };
    scene.fill();
    let order = scene.stage.begin("web1", &["--compression", "off"]);
    scene.stage.wait_until(HostId::A, "web1", "copying", |moved| moved.phase == Phase::Copying);
    scene.here.run_with("eject", json!({ "id": "cd0", "force": true }));
    order.expect(4, &["was changed while the guest was copied", "order the move again"]);
    scene.here.assert_runs();
}
