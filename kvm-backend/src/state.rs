//! All of a virtual machine but its RAM: [`MachineState`], and the bytes that it travels as.
//!
//! A state is a list of sections, each with a tag, a number (which vCPU, which chip) and raw kernel structures as
//! its payload. The format has a version, an unknown section is an error, and a structure must have exactly the
//! length that it has here: a state that is not understood whole is not loaded at all.

mod sections;

use std::time::Duration;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use memlane_protocol::wire::machine::{MAX_CPUID_ENTRIES, MAX_MSRS};
use zerocopy::{FromBytes, IntoBytes};

pub use sections::{SectionWriter, Sections, VERSION};

pub use crate::clock::{Moment, host_tsc};
pub use crate::error::StateError;
use crate::vcpu::VcpuState;

/// The longest time by which a guest's clocks are advanced for having been moved. If the hosts' clocks differ by
/// more, at least one of them is wrong.
pub const MAX_PASSED: Duration = Duration::from_secs(3600);

/// The interrupt controllers of `KVM_GET_IRQCHIP`, in the order of their sections.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// A virtual machine, without its RAM.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineState {
    /// The `CLOCK_REALTIME` of the capture, in nanoseconds since 1970.
    pub captured_at: u64,
    /// The state that belongs to no vCPU.
    pub vm: VmState,
    /// The states of the vCPUs, in the order of their numbers.
    pub vcpus: Vec<VcpuState>,
    /// The VMM's own data, which this library does not look at.
    pub own: Vec<u8>,
}

/// The interrupt controllers, timer and clock of a virtual machine.
#[derive(Clone, Debug, PartialEq)]
pub struct VmState {
    /// Both PICs and the IOAPIC as `struct kvm_irqchip`, if they are in the kernel.
    pub irqchips: Option<[RawIrqchip; 3]>,
    /// The interval timer, if it is in the kernel.
    pub pit: Option<kvm_pit_state2>,
    /// The paravirtual clock (kvmclock).
    pub clock: kvm_clock_data,
}

/// The bytes of a `struct kvm_irqchip`, which is a union and cannot be compared.
pub type RawIrqchip = [u8; size_of::<kvm_irqchip>()];

impl MachineState {
    /// Returns by how much the guest's clocks must be advanced if the state is loaded at `now`: never backwards,
    /// and never by more than [`MAX_PASSED`], whatever the two hosts' clocks say.
    pub fn passed(&self, now: &Moment) -> Duration {
        Duration::from_nanos(now.realtime.saturating_sub(self.captured_at)).min(MAX_PASSED)
    }

    /// Returns the bytes to send to the other host.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = SectionWriter::new();
        out.put(tag::CAPTURED_AT, 0, &self.captured_at);
        out.put(tag::CLOCK, 0, &self.vm.clock);
        for (index, chip) in self.vm.irqchips.iter().flatten().enumerate() {
            out.put(tag::IRQCHIP, index as u16, chip);
        }
        if let Some(pit) = &self.vm.pit {
            out.put(tag::PIT, 0, pit);
        }
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let index = index as u16;
            out.put(tag::CPUID, index, vcpu.cpuid.as_slice());
            out.put(tag::REGS, index, &vcpu.regs);
            out.put(tag::SREGS, index, &vcpu.sregs);
            out.put(tag::XSAVE, index, vcpu.xsave.as_slice());
            if let Some(xcrs) = &vcpu.xcrs {
                out.put(tag::XCRS, index, xcrs);
            }
            out.put(tag::DEBUGREGS, index, &vcpu.debugregs);
            out.put(tag::EVENTS, index, &vcpu.events);
            out.put(tag::MP_STATE, index, &vcpu.mp_state);
            out.put(tag::MSRS, index, vcpu.msrs.as_slice());
            if let Some(lapic) = &vcpu.lapic {
                out.put(tag::LAPIC, index, lapic);
            }
            out.put(tag::TSC, index, &[vcpu.tsc, vcpu.tsc_khz.into()]);
        }
        out.put(tag::OWN, 0, self.own.as_slice());
        out.finish()
    }

    /// Reads a state from the bytes that another host sent. `vcpus` is the number of vCPUs of this machine.
    ///
    /// # Errors
    ///
    /// [`StateError`] if the bytes are no state of such a machine; nothing is loaded then.
    pub fn decode(bytes: &[u8], vcpus: u16) -> Result<Self, StateError> {
        let mut sections = Sections::decode(bytes)?;
        let captured_at = sections.take(tag::CAPTURED_AT, 0, "time of capture")?;
        let clock = sections.take(tag::CLOCK, 0, "paravirtual clock")?;
        let irqchips = match sections.maybe::<RawIrqchip>(tag::IRQCHIP, 0, "interrupt controller")? {
            Some(first) => Some([
                first,
                sections.take(tag::IRQCHIP, 1, "interrupt controller")?,
                sections.take(tag::IRQCHIP, 2, "interrupt controller")?,
            ]),
            None => None,
        };
        let pit = sections.maybe(tag::PIT, 0, "interval timer")?;
        let vcpus = (0..vcpus).map(|index| decode_vcpu(&mut sections, index)).collect::<Result<_, _>>()?;
        let own = sections.bytes(tag::OWN, 0, "data of the VMM")?.to_vec();
        sections.end()?;
        Ok(Self { captured_at, vm: VmState { irqchips, pit, clock }, vcpus, own })
    }
}

impl VmState {
    /// Reads what the kernel holds for the virtual machine as a whole (`KVM_GET_IRQCHIP`, `KVM_GET_PIT2`,
    /// `KVM_GET_CLOCK`). `irqchip` and `pit` say which devices are in the kernel. The vCPUs must be paused.
    ///
    /// # Errors
    ///
    /// [`StateError::Kvm`] if KVM refuses.
    pub fn capture(vm: &VmFd, irqchip: bool, pit: bool) -> Result<Self, StateError> {
        let irqchips = match irqchip {
            true => {
                let mut raw = [[0; _]; CHIPS.len()];
                for (raw, chip_id) in raw.iter_mut().zip(CHIPS) {
                    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                    vm.get_irqchip(&mut chip)
                        .map_err(StateError::kvm("read an interrupt controller (KVM_GET_IRQCHIP)"))?;
                    raw.copy_from_slice(chip.as_bytes());
                }
                Some(raw)
            }
            false => None,
        };
        let pit = match pit {
            true => Some(vm.get_pit2().map_err(StateError::kvm("read the interval timer (KVM_GET_PIT2)"))?),
            false => None,
        };
        let clock = vm.get_clock().map_err(StateError::kvm("read the paravirtual clock (KVM_GET_CLOCK)"))?;
        Ok(Self { irqchips, pit, clock })
    }

    /// Writes the state into a virtual machine whose vCPUs have not run yet. It must be called before the vCPUs are
    /// restored. The clock goes on from where it was captured, plus `passed`.
    ///
    /// # Errors
    ///
    /// [`StateError::Kvm`] if KVM refuses; the virtual machine must not run then.
    pub fn restore(&self, vm: &VmFd, passed: Duration) -> Result<(), StateError> {
        // The other host's TSC and real time mean nothing here: only the clock's value counts.
        let clock = self.clock.clock.saturating_add(passed.as_nanos() as u64);
        vm.set_clock(&kvm_clock_data { clock, ..Default::default() })
            .map_err(StateError::kvm("set the paravirtual clock (KVM_SET_CLOCK)"))?;
        for (raw, chip_id) in self.irqchips.iter().flatten().zip(CHIPS) {
            let mut chip = kvm_irqchip::read_from_bytes(raw).expect("the array has the structure's size");
            // The id picks a member of the union inside the kernel, so that the sender must not choose it.
            chip.chip_id = chip_id;
            vm.set_irqchip(&chip)
                .map_err(StateError::kvm("set an interrupt controller (KVM_SET_IRQCHIP)"))?;
        }
        match &self.pit {
            Some(pit) => vm.set_pit2(pit).map_err(StateError::kvm("set the interval timer (KVM_SET_PIT2)")),
            None => Ok(()),
        }
    }
}

/// Takes the sections of one vCPU.
fn decode_vcpu(sections: &mut Sections<'_>, index: u16) -> Result<VcpuState, StateError> {
    let [tsc, tsc_khz] = sections.take::<[u64; 2]>(tag::TSC, index, "time-stamp counter")?;
    let state = VcpuState {
        cpuid: sections.list(tag::CPUID, index, MAX_CPUID_ENTRIES, "CPUID entries")?,
        regs: sections.take(tag::REGS, index, "registers")?,
        sregs: sections.take(tag::SREGS, index, "special registers")?,
        xsave: sections.bytes(tag::XSAVE, index, "XSAVE area")?.to_vec(),
        xcrs: sections.maybe(tag::XCRS, index, "extended control registers")?,
        debugregs: sections.take(tag::DEBUGREGS, index, "debug registers")?,
        events: sections.take(tag::EVENTS, index, "pending events")?,
        mp_state: sections.take(tag::MP_STATE, index, "run state")?,
        msrs: sections.list(tag::MSRS, index, MAX_MSRS, "MSRs")?,
        lapic: sections.maybe(tag::LAPIC, index, "local APIC")?,
        tsc,
        tsc_khz: u32::try_from(tsc_khz).map_err(|_| StateError::TooMany("kHz of a time-stamp counter"))?,
    };
    // The kernel reads fixed-size tables by these counts.
    if state.xcrs.is_some_and(|xcrs| xcrs.nr_xcrs as usize > xcrs.xcrs.len()) {
        return Err(StateError::TooMany("extended control registers"));
    }
    Ok(state)
}

/// The tags of the sections.
mod tag {
    pub(super) const CAPTURED_AT: u16 = 1;
    pub(super) const CLOCK: u16 = 2;
    pub(super) const IRQCHIP: u16 = 3;
    pub(super) const PIT: u16 = 4;
    pub(super) const CPUID: u16 = 16;
    pub(super) const REGS: u16 = 17;
    pub(super) const SREGS: u16 = 18;
    pub(super) const XSAVE: u16 = 19;
    pub(super) const XCRS: u16 = 20;
    pub(super) const DEBUGREGS: u16 = 21;
    pub(super) const EVENTS: u16 = 22;
    pub(super) const MP_STATE: u16 = 23;
    pub(super) const MSRS: u16 = 24;
    pub(super) const LAPIC: u16 = 25;
    pub(super) const TSC: u16 = 26;
    pub(super) const OWN: u16 = 64;
}

#[cfg(test)]
mod tests;
