//! The example of `docs/vmm-authors.md`: its guest, which halts if it finds a page that is not as it left it, moves to
//! another host and back.

mod common;

use common::{LONG, Stage, wait_for_exit};
use memlane_lab::{HostId, LabOptions, LabProcess, wait_for};

/// Starts the example on a host, and waits until its daemon knows it.
fn start(stage: &Stage, id: HostId, log: &str, incoming: bool) -> LabProcess {
    let host = stage.rig.lab().host(id);
    // The stage has built it with the programs. It lies beside `deps`, where the programs of tests lie.
    let here = std::env::current_exe().unwrap();
    let program = here.ancestors().nth(2).unwrap().join("examples/smallest_vmm");
    let mut command = host.command(program);
    command.arg("web1").arg(host.directory().join("attach.sock")).args(incoming.then_some("--incoming"));
    let process = host.spawn(log, command).unwrap();
    stage.wait_for_standing(id, "web1", if incoming { "incoming" } else { "running" });
    process
}

/// How far the guest was when the example last said so.
fn laps(vmm: &LabProcess) -> u64 {
    let log = std::fs::read_to_string(vmm.log()).unwrap();
    log.lines().rev().find_map(|line| line.strip_prefix("laps: ")?.parse().ok()).unwrap_or(0)
}

/// Waits until the guest has made so many laps, and checks its whole memory in each of them.
fn wait_for_laps(vmm: &mut LabProcess, least: u64) -> u64 {
    let came = wait_for("the guest to go on", LONG, || {
        assert!(vmm.is_running(), "the example has ended: {}", vmm.log_tail());
        Some(laps(vmm)).filter(|laps| *laps >= least)
    });
    came.unwrap_or_else(|error| panic!("{error}: {}", vmm.log_tail()))
}

#[test]
fn the_example_of_a_vmm_moves_there_and_back() {
    let test = "the_example_of_a_vmm_moves_there_and_back";
    let Some(stage) = Stage::new(test, LabOptions::default()) else { return };
    let mut here = start(&stage, HostId::A, "here", false);
    let before = wait_for_laps(&mut here, 3);

    let mut there = start(&stage, HostId::B, "there", true);
    let answer = stage.migrate("web1", &["--verify"]);
    assert_eq!(answer.code, 0, "{}", answer.text);
    let ended = answer.last().unwrap();
    assert_eq!(ended["digest_verified"], true, "{ended}");
    wait_for_exit(&mut here);
    assert!(here.log_tail().ends_with("the guest runs elsewhere"), "{}", here.log_tail());
    let between = wait_for_laps(&mut there, before + 3);

    let mut back = start(&stage, HostId::A, "back", true);
    let order = ["migrate", "web1", "host-a", "--postcopy", "now", "--downtime-limit", "60s"];
    let answer = stage.rig.ctl(HostId::B, &order).unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    wait_for_exit(&mut there);
    wait_for_laps(&mut back, between + 3);
}
