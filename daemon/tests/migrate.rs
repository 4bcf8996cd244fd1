//! A guest moves between two daemons, and nothing of it is lost.

use memlane_lab::{HostId, LabOptions, Programs, Requirement, Rig, RigOptions, skip};

fn args(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn a_guest_moves_while_it_writes() {
    if skip("a_guest_moves_while_it_writes", Requirement::LAB_WITH_KVM) {
        return;
    }
    let programs = Programs::build(false).unwrap();
    let lab = LabOptions { ports: 2, bridge: true, ..LabOptions::default() };
    let mut rig = Rig::new(&programs, RigOptions { lab, ..RigOptions::default() }).unwrap();
    let guest = "--ram 256MiB --working-set 16MiB --rate 20000 --vcpus 1";
    let mut source = rig.start_vmm(HostId::A, "web1", &args(guest)).unwrap();
    let mut there = rig.start_vmm(HostId::B, "web1", &args(&format!("{guest} --incoming"))).unwrap();
    let answer =
        rig.ctl(HostId::A, &["migrate", "web1", "host-b", "--downtime-limit", "5s", "--verify"]).unwrap();
    println!("{}\n{}\n{}", answer.text, rig.daemon(HostId::A).log_tail(), rig.daemon(HostId::B).log_tail());
    assert_eq!(answer.code, 0);
    let report = there.verify().unwrap();
    assert_eq!(report["equal"], true, "{report}");
    println!("{}", source.process().log_tail());
}
