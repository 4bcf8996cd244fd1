use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::vcpu::{Capabilities, complete_io};

/// A VM with all in-kernel devices and two vCPUs that have not run.
struct Machine {
    host: Capabilities,
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
}

impl Machine {
    fn new(test: &str) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                memlane_lab::say_skipped(test, &format!("no /dev/kvm ({error})"));
                return None;
            }
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        vm.create_pit2(kvm_pit_config::default()).unwrap();
        let cpuid: CpuId = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let vcpus: Vec<VcpuFd> = (0..2).map(|id| vm.create_vcpu(id).unwrap()).collect();
        vcpus.iter().for_each(|vcpu| vcpu.set_cpuid2(&cpuid).unwrap());
        let host = Capabilities::probe(&kvm, &vm, &vcpus[0], true).unwrap();
        Some(Self { host, vcpus, vm })
    }

    fn capture(&self) -> MachineState {
        let now = Moment::now();
        MachineState {
            captured_at: now.realtime,
            vm: VmState::capture(&self.vm, true, true).unwrap(),
            vcpus: self.vcpus.iter().map(|v| VcpuState::capture(v, &self.host, &now).unwrap()).collect(),
            own: b"anything".to_vec(),
        }
    }

    fn restore(&self, state: &MachineState) -> Duration {
        let now = Moment::now();
        let passed = state.passed(&now);
        state.vm.restore(&self.vm, passed).unwrap();
        for (vcpu, state) in self.vcpus.iter().zip(&state.vcpus) {
            state.restore(vcpu, &self.host, &now, passed).unwrap();
        }
        passed
    }

    /// Gives the second vCPU values unlike those after reset.
    fn disturb(&self) {
        let vcpu = &self.vcpus[1];
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rax, regs.r15, regs.rip, regs.rflags) = (0x1122_3344, 42, 0xfff0_1000, 0x202);
        vcpu.set_regs(&regs).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cr2, sregs.gdt.base, sregs.gdt.limit) = (0x5000, 0x6000, 0x7f);
        vcpu.set_sregs(&sregs).unwrap();
        let mut debug = vcpu.get_debug_regs().unwrap();
        debug.db[2] = 0x8888;
        vcpu.set_debug_regs(&debug).unwrap();
        let mut xsave = vcpu.get_xsave().unwrap();
        xsave.region[0] = 0x027f; // FCW
        xsave.region[40..44].copy_from_slice(&[1, 2, 3, 4]); // XMM0
        xsave.region[128] |= 3; // XSTATE_BV: x87 and SSE
        // SAFETY: the area has the size that KVM_CAP_XSAVE2 gives here (no dynamic components).
        unsafe { vcpu.set_xsave(&xsave) }.unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[0x80] = 0x20; // task priority
        vcpu.set_lapic(&lapic).unwrap();
        let lstar = kvm_bindings::kvm_msr_entry { index: 0xc000_0082, data: 0x7777, ..Default::default() };
        assert_eq!(vcpu.set_msrs(&kvm_bindings::Msrs::from_entries(&[lstar]).unwrap()), Ok(1));
        let mut pit = self.vm.get_pit2().unwrap();
        pit.channels[2].count = 0x1234;
        self.vm.set_pit2(&pit).unwrap();
    }
}

/// Without what goes on by itself.
fn timeless(mut state: MachineState) -> MachineState {
    state.captured_at = 0;
    state.vm.clock = Default::default();
    for channel in state.vm.pit.iter_mut().flat_map(|pit| &mut pit.channels) {
        channel.count_load_time = 0;
    }
    state.vcpus.iter_mut().for_each(|vcpu| vcpu.tsc = 0);
    state
}

#[test]
fn a_captured_machine_is_the_same_in_another_vm() {
    let Some(first) = Machine::new("a_captured_machine_is_the_same_in_another_vm") else { return };
    first.disturb();
    let state = first.capture();
    assert_eq!(state.vcpus[1].regs.rax, 0x1122_3344);
    assert_eq!(state.vcpus[1].xsave[160..164], [1, 0, 0, 0]);
    assert!(state.vcpus[1].msrs.iter().any(|msr| msr.index == 0xc000_0082 && msr.data == 0x7777));

    let decoded = MachineState::decode(&state.encode(), 2).unwrap();
    assert_eq!(decoded, state);

    let second = Machine::new("a second VM").unwrap();
    assert_ne!(timeless(second.capture()), timeless(state.clone()));
    let passed = second.restore(&decoded);
    let again = second.capture();
    assert_eq!(timeless(again.clone()), timeless(state.clone()));

    let ticks = passed.as_nanos() as u64 * u64::from(state.vcpus[0].tsc_khz) / 1_000_000;
    for (before, after) in state.vcpus.iter().zip(&again.vcpus) {
        assert!(after.tsc >= before.tsc + ticks, "the guest's TSC must never go back");
    }
    let apart = |state: &MachineState| state.vcpus[1].tsc.wrapping_sub(state.vcpus[0].tsc);
    assert_eq!(apart(&state), apart(&again), "the TSCs of the vCPUs must stay in step");
    assert!(again.vm.clock.clock >= state.vm.clock.clock);
}

#[test]
fn a_restored_vcpu_takes_the_state_once_more() {
    let Some(first) = Machine::new("a_restored_vcpu_takes_the_state_once_more") else { return };
    first.disturb();
    let state = first.capture();
    let second = Machine::new("a second VM").unwrap();
    second.restore(&state);
    second.restore(&state);
    assert_eq!(timeless(second.capture()), timeless(state));
}

#[test]
fn completing_io_runs_no_guest_code() {
    let Some(mut machine) = Machine::new("completing_io_runs_no_guest_code") else { return };
    let before = machine.vcpus[0].get_regs().unwrap();
    complete_io(&mut machine.vcpus[0]).unwrap();
    assert_eq!(machine.vcpus[0].get_regs().unwrap(), before);
}

#[test]
fn clocks_never_go_back_nor_far_ahead() {
    let state = sample();
    let at = |realtime| Moment { tsc: 0, realtime };
    assert_eq!(state.passed(&at(state.captured_at - 5)), Duration::ZERO);
    assert_eq!(state.passed(&at(state.captured_at + 7)), Duration::from_nanos(7));
    assert_eq!(state.passed(&at(u64::MAX)), MAX_PASSED);
}

#[test]
fn says_what_is_wrong_with_the_bytes() {
    let good = sample().encode();
    let error = |bytes: &[u8], vcpus| MachineState::decode(bytes, vcpus).unwrap_err().to_string();
    assert!(error(b"nonsense", 1).contains("no machine state"));
    let mut other = good.clone();
    other[4] = 9;
    assert!(error(&other, 1).contains("version 9"));
    assert!(error(&good[..good.len() - 1], 1).contains("ends in the middle"));
    assert!(error(&good, 2).contains("has no time-stamp counter (number 1)"));
    assert!(error(&good, 0).contains("unknown section"));
    let twice = [&good[..], &good[8..]].concat();
    assert!(error(&twice, 1).contains("twice"));
    let mut writer = SectionWriter::new();
    writer.put(tag::CAPTURED_AT, 0, &[0u8; 7]);
    assert!(error(&writer.finish(), 1).contains("7 bytes, 8 expected"));
}

fn sample() -> MachineState {
    MachineState {
        captured_at: 1_700_000_000_000_000_000,
        vm: VmState { irqchips: Some([[7; _]; 3]), pit: None, clock: kvm_clock_data::default() },
        vcpus: vec![VcpuState {
            cpuid: vec![Default::default(); 3],
            regs: Default::default(),
            sregs: Default::default(),
            xsave: vec![1; 4096],
            xcrs: Some(Default::default()),
            debugregs: Default::default(),
            events: Default::default(),
            mp_state: Default::default(),
            msrs: vec![Default::default(); 5],
            lapic: None,
            tsc: 1 << 60,
            tsc_khz: 2_000_000,
        }],
        own: vec![1, 2, 3],
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_state_or_an_error(bytes in vec(any::<u8>(), 0..600), vcpus in 0u16..4) {
        let _ = MachineState::decode(&bytes, vcpus);
        let framed = [&SectionWriter::new().finish()[..], &bytes].concat();
        let _ = MachineState::decode(&framed, vcpus);
    }

    #[test]
    fn a_damaged_state_is_a_state_or_an_error(at in 0usize..6000, byte: u8, cut in 0usize..7000) {
        let mut bytes = sample().encode();
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(cut);
        if let Ok(state) = MachineState::decode(&bytes, 1) {
            prop_assert_eq!(state.encode().len(), bytes.len());
        }
    }
}
