//! A guest is moved by Memlane and by QEMU itself, and arrives whole. Root and QEMU are needed.

use memlane_lab::{Lab, LabOptions, Programs, Requirement, Size, skip};
use memlane_perf::baseline::memory::MemoryState;
use memlane_perf::baseline::qemu::QemuMethod;
use memlane_perf::baseline::qemu::firmware::Firmware;
use memlane_perf::scenario::{Bench, QemuScenario, Scenario};

#[test]
fn every_way_of_moving_is_measured() {
    if skip("every_way_of_moving_is_measured", Requirement::LAB_WITH_LINUX) {
        return;
    }
    let bench = Bench { programs: Programs::build(false).expect("programs"), hosts: None, repetitions: 1 };
    let scenario = QemuScenario {
        ram: Size::from_mib(256),
        touched: Some(Size::from_mib(32)),
        dirty_rate: 100,
        vcpus: 1,
        ports: 2,
        port_rate: None,
        prealloc: false,
        anonymous: false,
    };
    let too_full = QemuScenario { touched: Some(Size::from_mib(250)), ..scenario.clone() };
    let error = too_full.measure(&bench).expect_err("no memory is left for a kernel");
    assert!(error.to_string().contains("--touched"), "{error}");

    let report = scenario.measure(&bench).expect("a measurement");
    assert_eq!(report.runs.iter().count(), 3);
    for run in report.runs.iter() {
        let figure = |name: &str| run.figures.value(name).expect("a figure");
        let downtime = figure("downtime_ms") / 1e3;
        assert!(0.0 < downtime && downtime < figure("total_seconds"), "{run:?}");
        // What was touched cannot be compressed, nor be left out.
        assert!(figure("sent_gb") * 1e9 > f64::from(32 << 20), "{run:?}");
        assert!(figure("cpu_seconds") > 0.0 && figure("cpu_seconds_per_gb") > 0.0, "{run:?}");
    }
    let json = report.json();
    let ratio = |name: &str| json["ratios"][name].as_f64().expect("a ratio");
    assert!(ratio("vs_qemu") <= ratio("vs_plain"), "{json}");
}

#[test]
fn a_guest_that_runs_its_firmware_moves_whole() {
    let needs = [Requirement::LAB, &[Requirement::Qemu]].concat();
    if skip("a_guest_that_runs_its_firmware_moves_whole", &needs) {
        return;
    }
    let lab = Lab::new(LabOptions::default()).expect("a lab");
    let guest = Firmware::new(&lab, 64 << 20).expect("a guest");
    for (way, memory) in
        [(QemuMethod::Plain, MemoryState::Prepared), (QemuMethod::Multifd(2), MemoryState::Fresh)]
    {
        // It compares both ends itself.
        let moved = guest.migrate(&lab, way, memory).expect("a move");
        assert!(0.0 < moved.downtime && moved.downtime <= moved.seconds, "{moved:?}");
        assert!(moved.ram_bytes > 63 << 20, "{moved:?}");
    }
}
