//! Daemons, QEMUs and connections that are lost in each phase before the commit: the guest, a
//! real Linux in stock QEMU, runs on where it was, and a second attempt succeeds.

mod common;

use std::time::Duration;

use common::{Linux, Stage, Tap};
use memlane_api::types::Phase;
use memlane_lab::{HostId, LabOptions, Rate};
use memlane_protocol::handover::Message;
use memlane_protocol::wire::control::Control;

/// A point of the protocol at which everything can be held up.
struct Point {
    name: &'static str,
    /// Whether host A, from which the guest comes, says the word.
    by_source: bool,
    is: fn(&Control) -> bool,
}

const OFFERING: Point =
    Point { name: "offering", by_source: true, is: |message| matches!(message, Control::Offer(_)) };
/// Most pages are there; the guest runs.
const COPYING: Point =
    Point { name: "copying", by_source: false, is: |message| matches!(message, Control::HolesDone) };
/// The guest stands still, and its memory is compared before the end of QEMU's state is sent.
const COMPARING: Point =
    Point { name: "comparing", by_source: false, is: |message| matches!(message, Control::Digests { .. }) };
/// All pages are there, and QEMU at the destination has loaded what there is of its state.
const SWITCHING_OVER: Point = Point {
    name: "switching over",
    by_source: true,
    is: |message| matches!(message, Control::State { bytes, .. } if bytes.is_empty()),
};
/// QEMU at the destination has loaded all of it but the last byte.
const LOADING: Point = Point {
    name: "loading",
    by_source: true,
    is: |message| matches!(message, Control::State { total, offset, .. } if offset + 1 == *total),
};
/// QEMU at the destination has loaded all of it, and the source does not know.
const READY: Point = Point {
    name: "ready",
    by_source: false,
    is: |message| matches!(message, Control::Handover { message: Message::Ready, .. }),
};

const BEFORE_COMMIT: [Point; 6] = [OFFERING, COPYING, COMPARING, SWITCHING_OVER, LOADING, READY];

/// A guest that is to move, and where it is.
struct Scene {
    stage: Stage,
    tap: Tap,
    linux: Linux,
}

impl Scene {
    fn new(test: &str) -> Option<Self> {
        let (stage, tap) = Stage::tapped_for_linux(test)?;
        let linux = stage.linux(|_| {});
        Some(Self { stage, tap, linux })
    }

    /// Orders the guest to move from host A to host B, and returns when it is held up at `point`.
    fn begin(&self, point: &Point) -> common::Order {
        eprintln!("{}", point.name);
        self.tap.hold(if point.by_source { HostId::A } else { HostId::B }, point.is);
        // QEMU's state is sent before it is known that all pages are there, unless they are compared.
        let verify = (point.name == COMPARING.name).then_some("--verify");
        let order = self.stage.begin("web1", verify.as_slice());
        self.tap.wait();
        order
    }

    /// The guest has come to no harm at host A; a second attempt brings it to host B, and another back.
    fn assert_unharmed(&mut self) {
        self.stage.wait_for_standing(HostId::A, "web1", "running");
        self.linux.assert_runs();
        // Whatever was started there for it is gone.
        self.stage.wait_for_absence(HostId::B, "web1");
        self.linux.assert_moves(&self.stage, HostId::A);
        self.linux.assert_moves(&self.stage, HostId::B);
    }
}

#[test]
fn the_destination_daemon_is_killed() {
    let Some(mut scene) = Scene::new("the_destination_daemon_is_killed") else { return };
    for point in BEFORE_COMMIT {
        let order = scene.begin(&point);
        scene.stage.rig.stop_daemon(HostId::B).unwrap();
        scene.tap.lose();
        // Refused (3): nothing had begun. Failed (4): the guest runs on at its source.
        order.expect(if point.name == OFFERING.name { 3 } else { 4 }, &["host"]);
        scene.linux.assert_runs();
        scene.stage.rig.start_daemon(HostId::B).unwrap();
        scene.assert_unharmed();
    }
}

/// A guest that stands still for the switchover goes on when its daemon is back.
#[test]
fn the_source_daemon_is_killed() {
    let Some(mut scene) = Scene::new("the_source_daemon_is_killed") else { return };
    for point in BEFORE_COMMIT {
        let order = scene.begin(&point);
        scene.stage.rig.stop_daemon(HostId::A).unwrap();
        scene.tap.lose();
        order.expect(6, &["memlaned"]);
        scene.stage.rig.start_daemon(HostId::A).unwrap();
        scene.assert_unharmed();
    }
}

#[test]
fn the_destination_qemu_is_killed() {
    let Some(mut scene) = Scene::new("the_destination_qemu_is_killed") else { return };
    for point in [COPYING, COMPARING, SWITCHING_OVER, LOADING, READY] {
        let order = scene.begin(&point);
        scene.stage.kill_qemu(HostId::B, "web1");
        scene.tap.release();
        order.expect(4, &["gone"]);
        scene.assert_unharmed();
    }
}

/// The guest ends with it, unless it has arrived; nothing else is left at the destination, and nothing is hidden.
#[test]
fn the_source_qemu_is_killed() {
    let test = "the_source_qemu_is_killed";
    let Some((stage, tap)) = Stage::tapped_for_linux(test) else { return };
    let mut scene = Scene { linux: stage.linux(|_| {}), stage, tap };
    for point in [COPYING, COMPARING, SWITCHING_OVER, LOADING, READY] {
        let order = scene.begin(&point);
        scene.stage.kill_qemu(HostId::A, "web1");
        scene.tap.release();
        let answer = order.end();
        if point.name != COPYING.name && answer.code == 0 {
            // QEMU had saved all of the guest before it ended, and nothing was needed of it any more.
            scene.linux.assert_runs();
            scene.linux.assert_moves(&scene.stage, HostId::B);
            continue;
        }
        assert!(answer.code == 4 && answer.text.contains("the guest's VMM is gone"), "{}", answer.text);
        assert!(answer.last().unwrap()["guest_runs_at"].is_null(), "{}", answer.text);
        scene.stage.wait_for_absence(HostId::A, "web1");
        scene.stage.wait_for_absence(HostId::B, "web1");
        let file = scene.stage.rig.lab().host(HostId::A).directory().join("web1.toml");
        scene.stage.launch(HostId::A, file.to_str().unwrap());
        scene.linux.assert_booted_again(&scene.stage);
    }
    scene.assert_unharmed();
}

#[test]
fn the_control_connection_is_lost() {
    let Some(mut scene) = Scene::new("the_control_connection_is_lost") else { return };
    for point in BEFORE_COMMIT {
        let order = scene.begin(&point);
        scene.tap.lose();
        let answer = order.end();
        if [COPYING.name, READY.name].contains(&point.name) && answer.code == 0 {
            // While the guest was copied, the connection was resumed; or the destination asked again, over a new one,
            // before the source missed the first.
            scene.linux.assert_runs();
            scene.stage.wait_for_absence(HostId::A, "web1");
            scene.linux.assert_moves(&scene.stage, HostId::B);
        } else {
            assert_eq!(answer.code, if point.name == OFFERING.name { 3 } else { 4 }, "{}", answer.text);
        }
        scene.assert_unharmed();
    }
}

/// The daemon at the destination is killed while the guest runs there without all of its memory. QEMU may wait for a page
/// then, and so answer nobody.
#[test]
fn the_destination_daemon_is_killed_while_it_fetches() {
    let test = "the_destination_daemon_is_killed_while_it_fetches";
    let Some((mut stage, mut linux)) = slow_stage(test) else { return };
    let name = linux.guest.name.clone();
    let order = stage.begin(&name, &["--postcopy", "now", "--downtime-limit", "60s"]);
    for after in [Duration::ZERO, Duration::from_secs(3)] {
        wait_for_pages(&stage, &name);
        stage.rig.stop_daemon(HostId::B).unwrap();
        stage.wait_until(HostId::A, &name, "word of what is waited for", |migration| {
            migration.postcopy.as_ref().is_some_and(|postcopy| postcopy.waits_for.is_some())
        });
        std::thread::sleep(after);
        stage.rig.start_daemon(HostId::B).unwrap();
        stage.wait_for_log(HostId::B, "going on to fetch");
    }
    stage.rig.lab().set_port_rate(0, None).unwrap();
    let moved = order.expect(0, &[]).last().unwrap().clone();
    assert_eq!(moved["postcopy"]["remaining_pages"], 0, "{moved}");
    linux.assert_runs();
    linux.assert_whole(&stage);
    stage.wait_for_absence(HostId::A, &name);
    linux.assert_moves(&stage, HostId::B);
}

/// Both daemons are killed then. The destination's cannot learn whether the guest runs before its QEMU has the page that it
/// waits for, and the source's cannot hear that it runs.
#[test]
fn both_daemons_are_killed_while_it_fetches() {
    let test = "both_daemons_are_killed_while_it_fetches";
    let Some((mut stage, mut linux)) = slow_stage(test) else { return };
    let name = linux.guest.name.clone();
    let order = stage.begin(&name, &["--postcopy", "now", "--downtime-limit", "60s"]);
    wait_for_pages(&stage, &name);
    for id in [HostId::B, HostId::A] {
        stage.rig.stop_daemon(id).unwrap();
    }
    order.expect(6, &["memlaned"]);
    // Long enough for QEMU to come to a page that is missing.
    std::thread::sleep(Duration::from_secs(5));
    for id in [HostId::A, HostId::B] {
        stage.rig.start_daemon(id).unwrap();
    }
    stage.wait_for_log(HostId::B, "going on to fetch");
    stage.wait_for_log(HostId::A, "serving a guest");
    stage.rig.lab().set_port_rate(0, None).unwrap();
    stage.wait_for_end(&name);
    linux.assert_runs();
    linux.assert_whole(&stage);
    stage.wait_for_absence(HostId::A, &name);
    linux.assert_moves(&stage, HostId::B);
}

/// A guest whose memory takes a while to move.
fn slow_stage(test: &str) -> Option<(Stage, Linux)> {
    let port_rate = Some(Rate::from_bits_per_second(50_000_000));
    let stage = Stage::for_linux(test, LabOptions { port_rate, ..LabOptions::default() })?;
    let linux = stage.linux(|guest| guest.working_set = "96MiB".parse().unwrap());
    Some((stage, linux))
}

/// Waits until the guest runs at the destination, and pages come.
fn wait_for_pages(stage: &Stage, name: &str) {
    stage.wait_until(HostId::A, name, "post-copy", |migration| {
        let postcopy = migration.postcopy.as_ref();
        migration.phase == Phase::Fetching
            && postcopy.is_some_and(|postcopy| postcopy.pages_streamed > 100 && postcopy.waits_for.is_none())
    });
}

/// A daemon that is started again finds the guests that it had, and they can be moved.
#[test]
fn daemons_are_killed_between_moves() {
    let test = "daemons_are_killed_between_moves";
    let Some(mut stage) = Stage::for_linux(test, LabOptions::default()) else { return };
    let mut linux = stage.linux(|_| {});
    for from in [HostId::A, HostId::B] {
        for id in [HostId::A, HostId::B] {
            stage.rig.start_daemon(id).unwrap();
        }
        stage.wait_for_standing(from, "web1", "running");
        linux.assert_moves(&stage, from);
    }
}
