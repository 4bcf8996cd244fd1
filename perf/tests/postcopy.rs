//! Post-copy is measured in both modes. Root is needed.

use memlane_lab::{Programs, Rate, Requirement, Size, skip};
use memlane_perf::postcopy::{PostcopyOptions, measure};

#[test]
fn both_modes_are_measured() {
    if skip("both_modes_are_measured", Requirement::LAB) {
        return;
    }
    let programs = Programs::build(false).expect("programs");
    let options = PostcopyOptions {
        ram: Size::from_mib(64),
        working_set: None,
        dirty_rate: None,
        vcpus: 1,
        readers: 1,
        ports: 2,
        port_rate: Some("500mbit".parse::<Rate>().expect("a rate")),
        repetitions: 1,
    };
    let report = measure(&programs, &options).expect("a measurement");
    assert_eq!(report.modes.len(), 2);
    for (mode, figures) in &report.modes {
        let [run] = &figures.runs[..] else { panic!("one run: {figures:?}") };
        let faults = run.faults;
        assert!(faults.faults > 0 && faults.pages_streamed > 0, "{mode}: {run:?}");
        assert!(
            faults.fault_p50_us <= faults.fault_p99_us && faults.fault_p99_us <= faults.fault_max_us,
            "{run:?}"
        );
        assert!(0.0 < faults.seconds && faults.seconds < run.total_seconds, "{mode}: {run:?}");
    }
    assert!(report.rpc_p50_us.median <= report.rpc_p99_us.median);
}
