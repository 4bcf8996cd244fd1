//! A move is watched moment by moment. Root is needed.

use memlane_lab::{HostId, LabOptions, Programs, Requirement, Rig, RigOptions, Size, skip};
use memlane_perf::memlane::{BenchGuest, WriteLoad};
use memlane_perf::timeline::ProgressSample;

#[test]
fn the_guest_and_the_ports_are_watched_at_both_ends() {
    if skip("the_guest_and_the_ports_are_watched_at_both_ends", Requirement::LAB) {
        return;
    }
    let programs = Programs::build(false).expect("programs");
    let rate = Some("500mbit".parse().expect("a rate"));
    let lab = LabOptions { ports: 2, port_rate: rate, ..LabOptions::default() };
    let tables = "[limits]\nmin_bandwidth = \"1mbit\"\n".to_owned();
    let mut rig = Rig::new(&programs, RigOptions { lab, tables, ..RigOptions::default() }).expect("a rig");
    let idle = BenchGuest::idle(Size::from_mib(64), false);
    let guest = BenchGuest { writes: WriteLoad::Rate(2000), readers: 1, ..idle };
    let moved = guest.migrate(&mut rig, &[], |_, _| {}).and_then(|moved| moved.arrived()).expect("a move");

    let (timeline, migration) = (&moved.timeline, &moved.migration);
    let pause = timeline.course.pause.expect("the guest moved");
    assert!(0.0 < pause.from && pause.from < pause.to && pause.to < timeline.course.ended, "{pause:?}");
    let rounds = migration["rounds"].as_array().into_iter().flatten();
    let rounds = rounds.filter(|round| round["seconds"].as_f64() > Some(0.0)).count();
    assert!(rounds > 0 && timeline.course.rounds.len() == rounds, "{migration}");
    // It was seen before the order, at its source, and after the pause, at its destination; and it went on counting.
    let (first, last) =
        (timeline.progress.first().expect("a look"), timeline.progress.last().expect("a look"));
    assert!(first.seconds < 0.0 && last.seconds > pause.to, "{first:?} {last:?}");
    assert!(first.written < last.written && first.read < last.read, "{first:?} {last:?}");
    let ordered = |one: &ProgressSample, next: &ProgressSample| {
        one.seconds <= next.seconds && one.written <= next.written
    };
    assert!(timeline.progress.is_sorted_by(ordered));
    // Whatever the daemons sent went over the ports, with headers.
    let span = timeline.span().expect("it was watched");
    let carried: u64 = timeline.ports.iter().map(|port| port.bytes(span)).sum();
    assert_eq!(timeline.ports.len(), 2);
    assert!(carried > migration["bytes_sent"].as_u64().expect("bytes"), "{carried} of {migration}");
    // It had all of its memory, and waited for none; that is told of those that do not.
    assert!(moved.waits.is_none());
    assert!(rig.metrics(HostId::B).is_ok_and(|text| text.contains("memlane_postcopy_fault_seconds_bucket")));
}
