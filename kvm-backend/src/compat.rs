//! What a host can run: descriptions of guests and hosts, and [`check`], which compares them before anything moves.

mod compare;
mod cpuid;
mod incompatible;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::machine::{CpuidEntry, GuestShape, MAX_CPUID_ENTRIES, Machine};

pub use cpuid::{Feature, Register, UnknownFeature};
pub use incompatible::{Incompatible, Layout};

use crate::error::StateError;
use crate::vcpu::{Capabilities, same_frequency};

/// The VMM that is being described.
#[derive(Clone, Debug)]
pub struct Program {
    /// The VMM's name; state moves only between VMMs of one name.
    pub name: Label,
    /// The version of the state that the VMM saves and loads.
    pub state_version: u16,
    /// The number of vCPUs of its guest.
    pub vcpus: u16,
}

/// Describes what this host could run in `program`'s VMM. It makes a virtual machine to find out, which ends with
/// the call. The features in `without` are hidden from the guest's processor.
///
/// # Errors
///
/// [`StateError`] says what KVM refused.
pub fn describe_host(kvm: &Kvm, program: &Program, without: &[Feature]) -> Result<Machine, StateError> {
    let vm = kvm.create_vm().map_err(StateError::kvm("make a virtual machine (KVM_CREATE_VM)"))?;
    let irqchip = vm.create_irq_chip().is_ok();
    let pit = irqchip && vm.create_pit2(kvm_pit_config::default()).is_ok();
    let vcpu = vm.create_vcpu(0).map_err(StateError::kvm("make a vCPU (KVM_CREATE_VCPU)"))?;
    let cpuid = host_cpuid(kvm, without)?;
    let entries = CpuId::from_entries(&cpuid).map_err(|_| StateError::TooMany("CPUID entries"))?;
    vcpu.set_cpuid2(&entries).map_err(StateError::kvm("set CPUID (KVM_SET_CPUID2)"))?;
    let host = Capabilities::probe(kvm, &vm, &vcpu, irqchip)?;
    // The vCPU's CPUID is read back, as it is for a guest: some versions of KVM show more than they were given.
    let shown = vcpu.get_cpuid2(MAX_CPUID_ENTRIES).map_err(StateError::kvm("read CPUID (KVM_GET_CPUID2)"))?;
    let mut shown = shown.as_slice().to_vec();
    shown.iter_mut().for_each(|entry| without.iter().for_each(|feature| feature.hide(entry)));
    Ok(machine(program, &host, pit, host.tsc_khz, &shown))
}

/// Describes the guest whose first vCPU is `vcpu`, with which `host` was [probed](Capabilities::probe). `pit` says
/// whether it has the in-kernel interval timer.
///
/// # Errors
///
/// [`StateError`] says what KVM refused.
pub fn describe_guest(
    program: &Program,
    host: &Capabilities,
    pit: bool,
    vcpu: &VcpuFd,
) -> Result<Machine, StateError> {
    let cpuid = vcpu.get_cpuid2(MAX_CPUID_ENTRIES).map_err(StateError::kvm("read CPUID (KVM_GET_CPUID2)"))?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(StateError::kvm("read the TSC frequency (KVM_GET_TSC_KHZ)"))?;
    Ok(machine(program, host, pit, tsc_khz, cpuid.as_slice()))
}

/// Describes a guest that is no virtual machine and to which nothing about the processor matters.
pub fn describe_process(program: &Program) -> Machine {
    Machine {
        vmm: program.name.clone(),
        state_version: program.state_version,
        vcpus: program.vcpus,
        features: 0,
        tsc_khz: 0,
        xcr0: 0,
        xsave_bytes: 0,
        cpuid: Vec::new(),
        msrs: Vec::new(),
    }
}

/// Returns the CPUID that a guest on this host may be given (`KVM_GET_SUPPORTED_CPUID`).
///
/// That is what KVM supports, without the features in `without`, and without VMX and SVM, since the state of a
/// guest's own guests is not moved.
///
/// # Errors
///
/// [`StateError::Kvm`] if KVM does not answer.
pub fn host_cpuid(kvm: &Kvm, without: &[Feature]) -> Result<Vec<kvm_cpuid_entry2>, StateError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(StateError::kvm("list the CPUID that it supports (KVM_GET_SUPPORTED_CPUID)"))?;
    let mut entries = supported.as_slice().to_vec();
    for entry in &mut entries {
        // KVM offers the LAPIC's deadline timer, but older kernels list it as a capability only.
        if entry.function == 1 && kvm.check_extension(Cap::TscDeadlineTimer) {
            entry.ecx |= 1 << 24;
        }
        for feature in Feature::NESTED.iter().chain(without) {
            feature.hide(entry);
        }
    }
    Ok(entries)
}

/// Returns the reasons why `guest` cannot go on in the VMM that describes itself as `host`; none if it can.
///
/// `host` is the description of a VMM that awaits a guest: its memory and vCPUs exist already and must match.
pub fn check(guest: &GuestShape, host: &GuestShape) -> Vec<Incompatible> {
    let mut found = Vec::new();
    let (ours, theirs) = (&guest.machine, &host.machine);
    let mut require = |fits: bool, reason: Incompatible| {
        if !fits {
            found.push(reason);
        }
    };
    require(ours.vmm == theirs.vmm, Incompatible::Vmm { guest: ours.vmm.clone(), host: theirs.vmm.clone() });
    require(
        ours.state_version == theirs.state_version,
        Incompatible::StateVersion { guest: ours.state_version, host: theirs.state_version },
    );
    require(ours.vcpus == theirs.vcpus, Incompatible::Vcpus { guest: ours.vcpus, host: theirs.vcpus });
    let layout = |shape: &GuestShape| -> Vec<_> {
        shape.regions.iter().map(|region| (region.address, region.bytes)).collect()
    };
    require(
        layout(guest) == layout(host),
        Incompatible::Memory { guest: Layout(layout(guest)), host: Layout(layout(host)) },
    );
    // TSC scaling matters on the host alone.
    let features = |machine: &Machine| machine.features & !Machine::TSC_SCALING;
    for (bit, name) in Machine::FEATURES.into_iter().enumerate() {
        let has = |machine: &Machine| features(machine) >> bit & 1 == 1;
        require(has(theirs) || !has(ours), Incompatible::Device(name));
    }
    // These are features that this version has no name for.
    let unknown = features(ours) & !features(theirs) & u32::MAX << Machine::FEATURES.len();
    require(unknown == 0, Incompatible::UnknownDevices(unknown));
    if ours.features & Machine::KVM == 0 {
        require(theirs.features & Machine::KVM == 0, Incompatible::NotVirtual);
        return found;
    }
    require(
        ours.tsc_khz == 0
            || same_frequency(ours.tsc_khz, theirs.tsc_khz)
            || theirs.features & Machine::TSC_SCALING != 0,
        Incompatible::TscFrequency { guest_khz: ours.tsc_khz, host_khz: theirs.tsc_khz },
    );
    let missing = ours.xcr0 & !theirs.xcr0;
    require(missing == 0, Incompatible::ExtendedState(missing));
    require(
        ours.xsave_bytes <= theirs.xsave_bytes,
        Incompatible::XsaveBytes { guest: ours.xsave_bytes, host: theirs.xsave_bytes },
    );
    found.extend(compare::compare(&ours.cpuid, &theirs.cpuid));
    let unknown = |msr: &&u32| theirs.msrs.binary_search(msr).is_err();
    found.extend(ours.msrs.iter().filter(unknown).map(|msr| Incompatible::Msr(*msr)));
    found
}

/// Describes a virtual machine.
fn machine(
    program: &Program,
    host: &Capabilities,
    pit: bool,
    tsc_khz: u32,
    cpuid: &[kvm_cpuid_entry2],
) -> Machine {
    let mut features = Machine::KVM;
    for (there, bit) in
        [(host.irqchip, Machine::IRQCHIP), (pit, Machine::PIT), (host.tsc_control, Machine::TSC_SCALING)]
    {
        features |= if there { bit } else { 0 };
    }
    let components = cpuid.iter().find(|entry| entry.function == 0xd && entry.index == 0);
    Machine {
        vmm: program.name.clone(),
        state_version: program.state_version,
        vcpus: program.vcpus,
        features,
        tsc_khz,
        xcr0: components.map_or(0, |entry| u64::from(entry.edx) << 32 | u64::from(entry.eax)),
        xsave_bytes: host.xsave_bytes as u32,
        cpuid: cpuid.iter().map(wire_entry).collect(),
        msrs: host.msrs.clone(),
    }
}

/// Returns a CPUID entry as it is sent.
fn wire_entry(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        function: entry.function.into(),
        index: entry.index.into(),
        flags: entry.flags.into(),
        eax: entry.eax.into(),
        ebx: entry.ebx.into(),
        ecx: entry.ecx.into(),
        edx: entry.edx.into(),
    }
}

#[cfg(test)]
mod tests;
