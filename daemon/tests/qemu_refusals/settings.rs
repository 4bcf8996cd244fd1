//! What others have set for QEMU's own migration, which ours borrows.

use memlane_lab::{HostId, wait_for};
use memlane_protocol::wire::control::Control;
use serde_json::{Value, json};

use crate::common::{LONG, Order, Stage, Tap};
use crate::qemu::{Qemu, assert_moves, stage};

/// A guest and the QEMU that waits for it, both of others and attached.
struct Scene {
    stage: Stage,
    tap: Tap,
    ends: [Qemu; 2],
}

impl Scene {
    fn new(test: &str) -> Option<Self> {
        let mut stage = stage(test, false, "")?;
        let tap = Tap::install(&mut stage);
        let ends = [(HostId::A, "", &[][..]), (HostId::B, "-incoming defer", &["--incoming"])];
        let ends = ends.map(|(id, arguments, more)| {
            let qemu = Qemu::start(stage.rig.lab().host(id), "web1", arguments);
            let answer = qemu.attach(&stage, id, "web1", more);
            assert_eq!(answer.code, 0, "{}", answer.text);
            qemu
        });
        Some(Self { stage, tap, ends })
    }

    /// Orders the guest to move, and returns when most of it is there.
    fn begin(&self) -> Order {
        self.tap.hold(HostId::B, |message| *message == Control::HolesDone);
        let order = self.stage.begin("web1", &[]);
        self.tap.wait();
        let [here, there] = &self.ends;
        // At the source not before the pause: what others have QEMU do meanwhile is theirs.
        assert!(!leaves_out_ram(here) && leaves_out_ram(there));
        order
    }
}

#[test]
fn what_was_set_is_set_again() {
    let Some(scene) = Scene::new("what_was_set_is_set_again") else { return };
    let settings = |qemu: &Qemu| {
        ["query-migrate-capabilities", "query-migrate-parameters"].map(|command| qemu.run(command))
    };
    for qemu in &scene.ends {
        let multifd = json!([{ "capability": "multifd", "state": true }]);
        qemu.run_with("migrate-set-capabilities", json!({ "capabilities": multifd }));
        let parameters = json!({ "max-bandwidth": 1 << 20, "downtime-limit": 77, "announce-rounds": 3 });
        qemu.run_with("migrate-set-parameters", parameters);
    }
    let before = scene.ends.each_ref().map(settings);

    let order = scene.begin();
    let answer = scene.stage.rig.ctl(HostId::A, &["cancel", "web1"]).unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    scene.tap.release();
    order.expect(5, &["cancelled"]);
    scene.stage.wait_for_end("web1");
    assert_eq!(scene.ends.each_ref().map(settings), before);

    scene.stage.wait_for_standing(HostId::B, "web1", "incoming");
    assert_moves(&scene.stage);
    let [_, there] = &scene.ends;
    let again = || (settings(there) == before[1]).then_some(());
    wait_for("the settings of before", LONG, again)
        .unwrap_or_else(|error| panic!("{error}: {:?}", settings(there)));
}

/// Saved or moved by QEMU's own means, the guest would be without its RAM.
#[test]
fn nothing_stays_when_daemons_are_killed() {
    let Some(mut scene) = Scene::new("nothing_stays_when_daemons_are_killed") else { return };
    let order = scene.begin();
    for id in [HostId::A, HostId::B] {
        scene.stage.rig.stop_daemon(id).unwrap();
    }
    scene.tap.lose();
    order.expect(6, &["memlaned"]);
    for id in [HostId::A, HostId::B] {
        scene.stage.rig.start_daemon(id).unwrap();
    }
    for qemu in &scene.ends {
        wait_for("all of QEMU's migration", LONG, || (!leaves_out_ram(qemu)).then_some(())).unwrap();
    }
    scene.stage.wait_for_standing(HostId::B, "web1", "incoming");
    assert_moves(&scene.stage);
}

fn leaves_out_ram(qemu: &Qemu) -> bool {
    let capabilities = qemu.run("query-migrate-capabilities");
    let on = |found: &Value| found["capability"] == "x-ignore-shared" && found["state"] == true;
    capabilities.as_array().unwrap().iter().any(on)
}
