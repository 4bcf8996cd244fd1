//! What a host can run: descriptions of guests and hosts, and [`check`], which compares them
//! before anything moves.

mod cpuid;

use std::fmt;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::machine::{CpuidEntry, GuestShape, MAX_CPUID_ENTRIES, Machine};

pub use cpuid::{Feature, Register};

use crate::state::StateError;
use crate::vcpu::{Capabilities, kvm_error, same_frequency};

/// The VMM that is being described.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its name; state moves only between VMMs of one name.
    pub name: Label,
    /// Version of the state that it saves and loads.
    pub state_version: u16,
    /// Number of vCPUs of its guest.
    pub vcpus: u16,
}

/// Describes what this host could run in `program`'s VMM. Makes a VM of its own to find out,
/// which ends with the call. `without` is held back from the guest's processor.
pub fn describe_host(kvm: &Kvm, program: &Program, without: &[Feature]) -> Result<Machine, StateError> {
    let vm = kvm.create_vm().map_err(kvm_error("make a VM (KVM_CREATE_VM)"))?;
    let irqchip = vm.create_irq_chip().is_ok();
    let pit = irqchip && vm.create_pit2(kvm_pit_config::default()).is_ok();
    let vcpu = vm.create_vcpu(0).map_err(kvm_error("make a vCPU (KVM_CREATE_VCPU)"))?;
    let cpuid = host_cpuid(kvm, without)?;
    let entries = CpuId::from_entries(&cpuid).map_err(|_| StateError::TooMany("CPUID entries"))?;
    vcpu.set_cpuid2(&entries).map_err(kvm_error("set CPUID (KVM_SET_CPUID2)"))?;
    let host = Capabilities::probe(kvm, &vm, &vcpu, irqchip)?;
    // What a vCPU really has, read back as for a guest: some KVMs show more than they were given.
    let shown = vcpu.get_cpuid2(MAX_CPUID_ENTRIES).map_err(kvm_error("read CPUID (KVM_GET_CPUID2)"))?;
    let mut shown = shown.as_slice().to_vec();
    shown.iter_mut().for_each(|entry| without.iter().for_each(|feature| feature.hide(entry)));
    Ok(machine(program, &host, pit, host.tsc_khz, &shown))
}

/// Describes the guest whose first vCPU is `vcpu`, of which `host` was
/// [probed](Capabilities::probe).
pub fn describe_guest(
    program: &Program,
    host: &Capabilities,
    pit: bool,
    vcpu: &VcpuFd,
) -> Result<Machine, StateError> {
    let cpuid = vcpu.get_cpuid2(MAX_CPUID_ENTRIES).map_err(kvm_error("read CPUID (KVM_GET_CPUID2)"))?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(kvm_error("read the TSC frequency (KVM_GET_TSC_KHZ)"))?;
    Ok(machine(program, host, pit, tsc_khz, cpuid.as_slice()))
}

/// Describes a guest that is no virtual machine: nothing about the processor matters to it.
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

/// The CPUID that a guest on this host may be given: what KVM supports, without `without`, and
/// without VMX and SVM: the state of a guest's own guests is not moved.
pub fn host_cpuid(kvm: &Kvm, without: &[Feature]) -> Result<Vec<kvm_cpuid_entry2>, StateError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_error("tell what it supports (KVM_GET_SUPPORTED_CPUID)"))?;
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

/// Reasons why `guest` cannot go on in the VMM that describes itself as `host`; none if it can.
///
/// `host` is the description of a VMM that awaits a guest: its memory and vCPUs are there
/// already and must match.
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
    // Whether TSC frequencies can be adapted is the host's affair alone.
    let features = |machine: &Machine| machine.features & !Machine::TSC_SCALING;
    for (bit, name) in Machine::FEATURES.into_iter().enumerate() {
        let has = |machine: &Machine| features(machine) >> bit & 1 == 1;
        require(has(theirs) || !has(ours), Incompatible::Device(name));
    }
    // Features that this version has no name for.
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
    found.extend(cpuid::compare(&ours.cpuid, &theirs.cpuid));
    let unknown = |msr: &&u32| theirs.msrs.binary_search(msr).is_err();
    found.extend(ours.msrs.iter().filter(unknown).map(|msr| Incompatible::Msr(*msr)));
    found
}

/// A reason why a guest cannot run on a host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Incompatible {
    /// Another VMM program.
    #[error("the guest runs in {guest}, the destination's VMM is {host}")]
    Vmm {
        /// The guest's VMM.
        guest: Label,
        /// The waiting VMM.
        host: Label,
    },
    /// State of another version.
    #[error(
        "the guest's VMM saves state of version {guest}, the destination's reads version {host}; \
         run the same version of the VMM on both hosts"
    )]
    StateVersion {
        /// Version that would be sent.
        guest: u16,
        /// Version that would be understood.
        host: u16,
    },
    /// Other vCPUs.
    #[error("the guest has {guest} vCPUs, the destination's VMM was started with {host}")]
    Vcpus {
        /// The guest's.
        guest: u16,
        /// Those of the waiting VMM.
        host: u16,
    },
    /// Memory of another size or at other addresses.
    #[error("the guest's memory is {guest}, that of the destination's VMM is {host}")]
    Memory {
        /// The guest's.
        guest: Layout,
        /// That of the waiting VMM.
        host: Layout,
    },
    /// A facility of the kernel that the guest uses and the host does not have.
    #[error("the guest uses {0}, which the destination does not have")]
    Device(&'static str),
    /// Facilities that this version does not know.
    #[error("the guest uses facilities that this version does not know (bits {0:#x})")]
    UnknownDevices(u32),
    /// A guest that is a plain process cannot become a virtual machine.
    #[error("the guest is a process and no virtual machine, the destination's VMM uses KVM")]
    NotVirtual,
    /// Another TSC frequency, and no scaling.
    #[error(
        "the guest's TSC runs at {guest_khz} kHz, the destination's at {host_khz} kHz, and its \
         processor cannot scale it"
    )]
    TscFrequency {
        /// The guest's.
        guest_khz: u32,
        /// The host's.
        host_khz: u32,
    },
    /// State components of XSAVE.
    #[error(
        "the guest may use extended state components {0:#x} of XCR0, which the destination does not have"
    )]
    ExtendedState(u64),
    /// A larger XSAVE area.
    #[error("the guest's XSAVE area takes {guest} bytes, the destination's at most {host}")]
    XsaveBytes {
        /// The guest's.
        guest: u32,
        /// The host's.
        host: u32,
    },
    /// Processors of two makers.
    #[error("the guest's processor is {guest}, the destination's {host}")]
    Vendor {
        /// The guest's, as CPUID spells it.
        guest: String,
        /// The host's.
        host: String,
    },
    /// A processor feature that the guest was given.
    #[error("the guest's processor has {0}, the destination's has not")]
    Cpuid(Feature),
    /// The guest could run guests, whose state is not moved.
    #[error("the guest's processor has {0}; guests that can run guests of their own cannot be moved")]
    Nested(Feature),
    /// An MSR that the destination's KVM cannot restore.
    #[error("the destination's KVM cannot restore the guest's MSR {0:#x}")]
    Msr(u32),
}

/// Pieces of guest memory, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout(pub Vec<(u64, u64)>);

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (address, bytes)) in self.0.iter().enumerate() {
            let and = if number > 0 { " and " } else { "" };
            write!(f, "{and}{bytes:#x} bytes at {address:#x}")?;
        }
        Ok(())
    }
}

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
