//! Post-copy is measured of both guests, beside what they are held against. Root and QEMU are needed.

use memlane_lab::{Programs, Rate, Requirement, Size, skip};
use memlane_perf::scenario::{Bench, PostcopyScenario, Scenario};

#[test]
fn all_waits_are_measured() {
    let needs = [Requirement::LAB, &[Requirement::Qemu]].concat();
    if skip("all_waits_are_measured", &needs) {
        return;
    }
    let bench = Bench { programs: Programs::build(false).expect("programs"), hosts: None, repetitions: 1 };
    let scenario = PostcopyScenario {
        ram: Size::from_mib(64),
        working_set: None,
        dirty_rate: None,
        vcpus: 1,
        readers: 1,
        ports: 2,
        port_rate: Some("500mbit".parse::<Rate>().expect("a rate")),
    };
    let small = PostcopyScenario { ram: Size::from_mib(16), ..scenario.clone() };
    let error = small.measure(&bench).expect_err("nothing is left to be read");
    assert!(error.to_string().contains("--ram"), "{error}");

    let report = scenario.measure(&bench).expect("a measurement");
    let json = report.json();
    let figures = |by: &str, how: &str| -> Vec<f64> {
        let case = if by == "memlane" { &json[by][how] } else { &json["baselines"][by][how] };
        let names = ["faults", "requests", "fault_p50_us", "fault_p99_us", "fault_max_us"];
        names.map(|name| case[name]["median"].as_f64().expect(name)).into()
    };
    for (by, how) in
        [("memlane", "now"), ("memlane", "hybrid"), ("memlane", "qemu guest"), ("qemu", "postcopy-preempt")]
    {
        let [faults, requests, p50, p99, max] = figures(by, how)[..] else { unreachable!("five names") };
        assert!(faults > 0.0 && requests > 0.0, "{by} {how}: {json}");
        assert!(0.0 < p50 && p50 <= p99 && p99 <= max, "{by} {how}: {json}");
    }
    for name in ["p50_vs_rpc", "p99_over_rpc_us", "p50_vs_qemu", "p99_vs_qemu"] {
        assert!(json["ratios"][name].is_f64(), "no {name} in {json}");
    }
    assert!(json["memlane"]["now"]["stream_gbit_per_second"]["median"].as_f64() > Some(0.0), "{json}");
    // A guest that times itself has a distribution to be drawn.
    let drawn = report.runs.iter().filter(|run| run.trace.waits.is_some()).count();
    assert_eq!(drawn, 5);
}
