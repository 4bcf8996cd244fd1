//! Daemons that are no root, as their unit for systemd has them.

mod common;

use std::time::Duration;

use common::{LIMITS, LONG, Stage, Tap, wait_for_exit, words};
use memlane_api::types::Phase;
use memlane_lab::{DaemonUser, HostId, LabOptions, LabVmm, Rate, Requirement, RigOptions, wait_for};
use memlane_protocol::handover::Message;
use memlane_protocol::wire::control::Control;
use rustix::process::Signal;

fn stage(test: &str, daemon_user: DaemonUser, lab: LabOptions) -> Option<Stage> {
    let options = RigOptions { lab, tables: LIMITS.into(), daemon_user, ..RigOptions::default() };
    Stage::with(test, Requirement::LAB_WITH_KVM, options)
}

#[test]
fn the_units_user_moves_guests() {
    let Some(mut stage) = stage("the_units_user_moves_guests", DaemonUser::Unit, LabOptions::default())
    else {
        return;
    };
    for more in [&["--verify"][..], &["--postcopy", "now"]] {
        let mut here = stage.guest("web1");
        let mut there = stage.receiver("web1");
        let answer = stage.migrate("web1", more);
        assert_eq!(answer.code, 0, "{}", answer.text);
        common::assert_runs(&mut there);
        common::wait_for_exit(here.process());
        there.quit().unwrap();
    }
}

/// Writes as fast as it can, all over its memory.
const BUSY: &str = "--ram 64MiB --working-set 48MiB --flat-out --fill zero=10,random=80,compressible=10";

fn pair(stage: &mut Stage) -> (LabVmm, LabVmm) {
    let here = stage.rig.start_vmm(HostId::A, "web1", &words(BUSY)).unwrap();
    let there = stage.rig.start_vmm(HostId::B, "web1", &words(&format!("{BUSY} --incoming"))).unwrap();
    (here, there)
}

/// Orders web1 to move by post-copy, and returns when the source has given it up and the destination does not know.
fn begin_to_commit(stage: &Stage, tap: &Tap) -> common::Order {
    tap.hold(HostId::A, |message| matches!(message, Control::Handover { message: Message::Commit, .. }));
    let order = stage.begin("web1", &["--postcopy", "now", "--downtime-limit", "10s"]);
    tap.wait();
    order
}

/// Daemons that find VMMs of before version 4 of the attach protocol, which do not hand over again what they keep.
fn stage_of_old_vmms(test: &str, daemon_user: DaemonUser, lab: LabOptions) -> Option<Stage> {
    let environment = vec![("MEMLANE_DEBUG_OLD_VMMS".to_owned(), "1".to_owned())];
    let options =
        RigOptions { lab, tables: LIMITS.into(), daemon_user, environment, ..RigOptions::default() };
    Stage::with(test, Requirement::LAB_WITH_KVM, options)
}

/// The daemon of a destination that was prepared to fetch ends before the guest runs there. The next one finds what is
/// missing, and the guest moves.
#[test]
fn a_guest_that_was_prepared_to_fetch_moves_all_the_same() {
    let test = "a_guest_that_was_prepared_to_fetch_moves_all_the_same";
    let Some(mut stage) = stage(test, DaemonUser::Unit, LabOptions::default()) else { return };
    let tap = Tap::install(&mut stage);
    for round in 0..3 {
        let (mut here, mut there) = pair(&mut stage);
        let order = begin_to_commit(&stage, &tap);
        stage.rig.stop_daemon(HostId::B).unwrap();
        // The commit is sent once more within a second: before the daemon is there, or after.
        tap.lose();
        std::thread::sleep(Duration::from_millis(300 * round));
        stage.rig.start_daemon(HostId::B).unwrap();
        order.expect(0, &[]);
        common::assert_runs(&mut there);
        wait_for_exit(here.process());
        there.quit().unwrap();
    }
}

/// Where the VMM does not let it be found what is missing, the guest is given back, whether or not the daemon may kill
/// the VMM, and whatever comes first: the commit or the VMM's end.
#[test]
fn a_guest_that_was_prepared_to_fetch_is_given_back() {
    for user in [DaemonUser::UnitWithout("CAP_KILL"), DaemonUser::Unit, DaemonUser::Root] {
        eprintln!("{user:?}");
        let test = "a_guest_that_was_prepared_to_fetch_is_given_back";
        let Some(mut stage) = stage_of_old_vmms(test, user, LabOptions::default()) else { return };
        let tap = Tap::install(&mut stage);
        for round in 0..3 {
            let (mut here, mut there) = pair(&mut stage);
            let order = begin_to_commit(&stage, &tap);
            stage.rig.stop_daemon(HostId::B).unwrap();
            // The commit is sent once more within a second: before the daemon is there, or after.
            tap.lose();
            std::thread::sleep(Duration::from_millis(300 * round));
            stage.rig.start_daemon(HostId::B).unwrap();
            order.expect(4, &[]);
            let there_says =
                stage.wait_until(HostId::B, "web1", "the end", |migration| migration.outcome.is_some());
            assert!(there_says.reason.is_some_and(|reason| reason.contains("given back")));
            stage.assert_runs_on("web1", &mut here);
            // Its library is told to discard what it has loaded.
            wait_for_exit(there.process());
            here.quit().unwrap();
        }
    }
}

/// The same of a VMM that hangs, so that it cannot say how it stands, and cannot be ended: its guest does not wait for it.
#[test]
fn a_guest_is_given_back_though_its_vmm_hangs() {
    let test = "a_guest_is_given_back_though_its_vmm_hangs";
    let user = DaemonUser::UnitWithout("CAP_KILL");
    let Some(mut stage) = stage(test, user, LabOptions::default()) else { return };
    let tap = Tap::install(&mut stage);
    let (mut here, mut there) = pair(&mut stage);
    let order = begin_to_commit(&stage, &tap);
    stage.rig.stop_daemon(HostId::B).unwrap();
    common::signal(there.process(), Signal::STOP);
    tap.lose();
    stage.rig.start_daemon(HostId::B).unwrap();
    order.expect(4, &[]);
    stage.assert_runs_on("web1", &mut here);
    stage.wait_for_log(HostId::B, "not permitted");
    // It is told to discard what it has loaded as soon as it can hear that.
    common::signal(there.process(), Signal::CONT);
    wait_for_exit(there.process());
}

/// A guest that ran without all of its memory when its daemon ended can only hang, if its VMM does not let it be found
/// what is missing: the VMM is ended, or, where that is not permitted, nobody takes it for a guest that runs.
#[test]
fn a_vmm_that_cannot_be_killed_is_told() {
    for (user, may) in [(DaemonUser::UnitWithout("CAP_KILL"), false), (DaemonUser::Unit, true)] {
        eprintln!("{user:?}");
        let test = "a_vmm_that_cannot_be_killed_is_told";
        let slow = Some(Rate::from_bits_per_second(50_000_000));
        let lab = LabOptions { port_rate: slow, ..LabOptions::default() };
        let Some(mut stage) = stage_of_old_vmms(test, user, lab) else { return };
        let (mut here, mut there) = pair(&mut stage);
        let order = stage.begin("web1", &["--postcopy", "now", "--downtime-limit", "10s"]);
        stage.wait_until(HostId::A, "web1", "post-copy", |migration| {
            let fetched = migration.postcopy.as_ref().map_or(0, |postcopy| postcopy.pages_streamed);
            migration.phase == Phase::Fetching && fetched > 100
        });
        stage.rig.stop_daemon(HostId::B).unwrap();
        stage.rig.start_daemon(HostId::B).unwrap();
        order.expect(7, &["lost"]);
        wait_for_exit(here.process());
        if may {
            wait_for_exit(there.process());
            continue;
        }
        for _ in 0..2 {
            stage.wait_for_standing(HostId::B, "web1", "lost");
            stage.wait_for_log(HostId::B, "not permitted");
            let answer = stage.rig.ctl(HostId::B, &["migrate", "web1", "host-a"]).unwrap();
            let pid = there.process().pid().to_string();
            assert_eq!(answer.code, 3, "{}", answer.text);
            assert!(answer.text.contains("never come") && answer.text.contains(&pid), "{}", answer.text);
            // Whoever starts the daemon anew finds it so again.
            stage.rig.start_daemon(HostId::B).unwrap();
        }
        there.process().kill().unwrap();
        wait_for("the VMM to be gone", LONG, || {
            stage.rig.guest(HostId::B, "web1").unwrap().is_none().then_some(())
        })
        .unwrap();
    }
}
