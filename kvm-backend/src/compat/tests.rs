use std::collections::HashSet;

use memlane_protocol::wire::machine::{Region, TrackerKind};

use super::*;

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
    wire_entry(&kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() })
}

fn shape() -> GuestShape {
    GuestShape {
        name: "web1".parse().unwrap(),
        tracker: TrackerKind::Log,
        machine: Machine {
            vmm: "memlane-vmm".parse().unwrap(),
            state_version: 1,
            vcpus: 2,
            features: Machine::KVM | Machine::IRQCHIP,
            tsc_khz: 2_000_000,
            xcr0: 7,
            xsave_bytes: 4096,
            cpuid: vec![
                entry(0, 0, [13, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
                entry(1, 0, [0, 0x0100_0800, 1 << 28 | 1 << 27, 1 << 25]),
                entry(7, 0, [0, 1 << 5 | 1 << 29, 0, 0]),
            ],
            msrs: vec![0x10, 0x174],
        },
        regions: vec![Region { address: 0, bytes: 1 << 20, page_bytes: 4096, offset: 0 }],
        nics: vec![],
    }
}

/// The reasons after `change` to the host's description.
fn reasons(change: impl FnOnce(&mut GuestShape)) -> Vec<String> {
    let (guest, mut host) = (shape(), shape());
    change(&mut host);
    check(&guest, &host).iter().map(ToString::to_string).collect()
}

#[track_caller]
fn one_reason(change: impl FnOnce(&mut GuestShape), words: &[&str]) {
    let reasons = reasons(change);
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    for word in words {
        assert!(reasons[0].contains(word), "{word:?} is not in {:?}", reasons[0]);
    }
}

#[test]
fn a_host_that_has_everything_will_do() {
    assert_eq!(reasons(|_| ()), Vec::<String>::new());
    let more = |host: &mut GuestShape| {
        host.machine.features |= Machine::PIT | Machine::TSC_SCALING;
        host.machine.xcr0 = 0xff;
        host.machine.xsave_bytes = 8192;
        host.machine.msrs.push(0x175);
        host.machine.cpuid[2].ebx = u32::MAX.into();
        host.machine.cpuid.push(entry(7, 1, [u32::MAX; 4]));
        host.regions[0].page_bytes = 2 << 20;
        host.tracker = TrackerKind::Pagemap;
        host.name = "other".parse().unwrap();
    };
    assert_eq!(reasons(more), Vec::<String>::new());
}

#[test]
fn each_difference_that_matters_is_named() {
    one_reason(|host| host.machine.vmm = "other".parse().unwrap(), &["memlane-vmm", "other"]);
    one_reason(|host| host.machine.state_version = 2, &["version 1", "version 2"]);
    one_reason(|host| host.machine.vcpus = 4, &["2 vCPUs", "with 4"]);
    one_reason(|host| host.regions[0].bytes = 2 << 20, &["0x100000 bytes at 0x0", "0x200000 bytes at 0x0"]);
    one_reason(|host| host.regions[0].address = 4096, &["at 0x1000"]);
    one_reason(|host| host.machine.features = Machine::KVM, &["irqchip"]);
    one_reason(|host| host.machine.tsc_khz = 2_000_501, &["2000000 kHz", "2000501 kHz"]);
    one_reason(|host| host.machine.xcr0 = 3, &["0x4"]);
    one_reason(|host| host.machine.xsave_bytes = 2048, &["4096", "2048"]);
    one_reason(|host| host.machine.msrs = vec![0x10], &["0x174"]);
    one_reason(|host| host.machine.cpuid[2].ebx = (1 << 29).into(), &["avx2"]);
    one_reason(|host| host.machine.cpuid[1].ecx = 0.into(), &["avx"]);
    one_reason(
        |host| host.machine.cpuid[0] = entry(0, 0, [13, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        &["AuthenticAMD", "GenuineIntel"],
    );
    assert_eq!(reasons(|host| host.machine.cpuid.truncate(2)).len(), 2);
}

#[test]
fn topology_and_the_guests_own_settings_do_not_matter() {
    let other = |host: &mut GuestShape| {
        host.machine.cpuid[1].ebx = 0x0700_0800.into(); // APIC id
        host.machine.cpuid[1].ecx = (1 << 28).into(); // no OSXSAVE
    };
    assert_eq!(reasons(other), Vec::<String>::new());
}

#[test]
fn a_little_drift_of_the_tsc_is_tolerated_and_any_with_scaling() {
    assert_eq!(reasons(|host| host.machine.tsc_khz = 2_000_500), Vec::<String>::new());
    assert_eq!(reasons(|host| host.machine.tsc_khz = 1_999_500), Vec::<String>::new());
    let scaling = |host: &mut GuestShape| {
        host.machine.tsc_khz = 3_000_000;
        host.machine.features |= Machine::TSC_SCALING;
    };
    assert_eq!(reasons(scaling), Vec::<String>::new());
}

#[test]
fn a_guest_that_can_run_guests_is_refused_even_by_its_like() {
    let mut guest = shape();
    guest.machine.cpuid.push(entry(0x8000_0001, 0, [0, 0, 1 << 2, 0]));
    let reasons = check(&guest, &guest);
    assert!(matches!(reasons[..], [Incompatible::Nested(svm)] if svm.name() == Some("svm")), "{reasons:?}");
}

#[test]
fn a_process_moves_to_a_process_only() {
    let process = |vcpus| {
        let program = Program { name: "memlane-vmm".parse().unwrap(), state_version: 1, vcpus };
        GuestShape { machine: describe_process(&program), ..shape() }
    };
    assert_eq!(check(&process(2), &process(2)), []);
    assert_eq!(check(&process(2), &shape()), [Incompatible::NotVirtual]);
    assert_eq!(check(&shape(), &process(2))[0], Incompatible::Device("kvm"));
}

#[test]
fn unknown_features_are_named_by_their_place() {
    let feature = Feature { function: 7, index: 2, register: Register::Edx, bit: 5 };
    assert_eq!(feature.to_string(), "the feature of CPUID leaf 0x7.2, edx bit 5");
    assert_eq!("avx2".parse::<Feature>().unwrap().to_string(), "avx2");
    assert!("avx3".parse::<Feature>().unwrap_err().to_string().contains("avx3"));
}

#[test]
fn names_are_unique_and_lie_in_words_that_are_compared() {
    let (mut names, mut places) = (HashSet::new(), HashSet::new());
    for (feature, name) in cpuid::names() {
        assert!(names.insert(name), "{name} twice");
        assert!(places.insert(feature), "{name} has the place of another");
        assert!(compare::is_compared(feature), "{name} is not compared");
    }
}

#[test]
fn this_host_can_run_what_it_describes() {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            memlane_lab::say_skipped(
                "this_host_can_run_what_it_describes",
                &format!("no /dev/kvm ({error})"),
            );
            return;
        }
    };
    let program = Program { name: "memlane-vmm".parse().unwrap(), state_version: 1, vcpus: 2 };
    let host = GuestShape { machine: describe_host(&kvm, &program, &[]).unwrap(), ..shape() };
    assert!(host.machine.tsc_khz > 0 && !host.machine.msrs.is_empty());
    assert_eq!(check(&host, &host), []);

    // The same host, when it hides a feature that the guest was given.
    let Some(feature) =
        ["avx2", "sse4_2"].map(|name| name.parse::<Feature>().unwrap()).into_iter().find(|feature| {
            let without = describe_host(&kvm, &program, &[*feature]).unwrap();
            without != host.machine
        })
    else {
        memlane_lab::say_skipped("hiding a feature", "the host has neither avx2 nor sse4_2");
        return;
    };
    let narrow = GuestShape { machine: describe_host(&kvm, &program, &[feature]).unwrap(), ..shape() };
    assert_eq!(check(&host, &narrow), [Incompatible::Cpuid(feature)]);
    assert_eq!(check(&narrow, &host), []);
}
