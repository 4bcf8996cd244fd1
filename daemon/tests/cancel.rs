//! A migration that is cancelled leaves the guest at its source, in whichever round that is.

mod common;

use common::{GUEST, Stage, words};
use memlane_api::types::Phase;
use memlane_lab::{HostId, LabOptions, Rate};
use memlane_protocol::handover::Message;
use memlane_protocol::wire::control::Control;
use rustix::process::Signal;

#[test]
fn cancelled_in_each_round() {
    let rate = Rate::from_bits_per_second(200_000_000);
    let lab = LabOptions { port_rate: Some(rate), ..LabOptions::default() };
    let Some(mut stage) = Stage::new("cancelled_in_each_round", lab) else { return };
    // Writes four times as fast as the port carries, so that rounds do not become shorter.
    let busy =
        GUEST.replace("--rate 2000", "--rate 25000").replace("--working-set 8MiB", "--working-set 32MiB");
    let mut guest = stage.rig.start_vmm(HostId::A, "web1", &words(&busy)).unwrap();
    let mut there = stage.rig.start_vmm(HostId::B, "web1", &words(&format!("{busy} --incoming"))).unwrap();
    for round in 1..=3 {
        let order = stage.begin("web1", &["--downtime-limit", "300ms"]);
        stage.wait_until(HostId::A, "web1", "the round", |migration| {
            migration.outcome.is_none() && migration.rounds.len() >= round
        });
        cancel(&stage, 0, "web1");
        let answer = order.expect(5, &["cancelled by the operator"]);
        let ended = answer.last().unwrap();
        assert_eq!(ended["rounds"].as_array().unwrap().len(), round, "{ended}");
        assert_eq!(ended["guest_runs_at"], "host-a");
        stage.wait_for_end("web1");
        stage.assert_runs_on("web1", &mut guest);
    }
    stage.assert_moves("web1", &mut there);
}

#[test]
fn cancelled_while_switching_over() {
    let test = "cancelled_while_switching_over";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    // By Ctrl-C.
    tap.hold(HostId::B, |message| *message == Control::HolesDone);
    let order = stage.begin("web1", &[]);
    tap.wait();
    stage.wait_until(HostId::A, "web1", "copying", |migration| migration.phase == Phase::Copying);
    order.signal(Signal::INT);
    order.expect(5, &[]);
    tap.release();
    stage.wait_for_end("web1");
    stage.assert_runs_on("web1", &mut guest);

    for held in [
        |message: &Control| *message == Control::Verify,
        |message: &Control| matches!(message, Control::State { .. }),
    ] {
        tap.hold(HostId::A, held);
        let order = stage.begin("web1", &["--verify"]);
        tap.wait();
        let standing = stage
            .wait_until(HostId::A, "web1", "the pause", |migration| migration.phase == Phase::SwitchingOver);
        assert_eq!(standing.guest_runs_at, None);
        cancel(&stage, 0, "web1");
        tap.release();
        order.expect(5, &[]);
        stage.wait_for_end("web1");
        stage.assert_runs_on("web1", &mut guest);
    }

    // What the last one has loaded there must never run.
    common::wait_for_exit(there.process());
    let mut there = stage.receiver("web1");

    // Too late: the guest is the destination's.
    let is_commit = |message: &Control| matches!(message, Control::Handover { message: Message::Commit, .. });
    tap.hold(HostId::A, is_commit);
    let order = stage.begin("web1", &[]);
    tap.wait();
    cancel(&stage, 3, "handed over");
    tap.release();
    order.expect(0, &[]);
    common::assert_runs(&mut there);
    cancel(&stage, 3, "completed");
    let answer = stage.rig.ctl(HostId::A, &["cancel", "web9"]).unwrap();
    assert_eq!(answer.code, 2, "{}", answer.text);
}

/// Once the destination is ready it may have been told to run, unless the source says otherwise.
#[test]
fn cancelled_when_the_destination_is_ready() {
    let test = "cancelled_when_the_destination_is_ready";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    tap.hold(HostId::B, |message| matches!(message, Control::Handover { message: Message::Ready, .. }));
    let order = stage.begin("web1", &[]);
    tap.wait();
    cancel(&stage, 0, "web1");
    tap.release();
    order.expect(5, &[]);
    stage.assert_runs_on("web1", &mut guest);
    // What has been loaded there must never run.
    common::wait_for_exit(there.process());
    let mut there = stage.receiver("web1");
    stage.assert_moves("web1", &mut there);
}

fn cancel(stage: &Stage, code: i32, says: &str) {
    let answer = stage.rig.ctl(HostId::A, &["cancel", "web1"]).unwrap();
    assert_eq!(answer.code, code, "{}", answer.text);
    assert!(answer.text.contains(says), "{}", answer.text);
}
