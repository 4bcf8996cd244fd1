//! [`Incompatible`]: the reasons why a guest cannot run on a host.

use std::fmt;

use memlane_protocol::wire::Label;

use super::cpuid::Feature;

/// A reason why a guest cannot run on a host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Incompatible {
    /// The destination runs another VMM program.
    #[error("the guest runs in {guest}, the destination's VMM is {host}; run the same VMM on both hosts")]
    Vmm {
        /// The name of the guest's VMM.
        guest: Label,
        /// The name of the waiting VMM.
        host: Label,
    },
    /// The destination reads another version of the state.
    #[error(
        "the guest's VMM saves state of version {guest}, the destination's reads version {host}; \
         run the same version of the VMM on both hosts"
    )]
    StateVersion {
        /// The version that would be sent.
        guest: u16,
        /// The version that the destination reads.
        host: u16,
    },
    /// The destination has another number of vCPUs.
    #[error(
        "the guest has {guest} vCPUs, the destination's VMM was started with {host}; start it with as many"
    )]
    Vcpus {
        /// The guest's number.
        guest: u16,
        /// The number of the waiting VMM.
        host: u16,
    },
    /// The destination has memory of another size or at other addresses.
    #[error(
        "the guest's memory is {guest}, that of the destination's VMM is {host}; start it with the same memory"
    )]
    Memory {
        /// The guest's memory.
        guest: Layout,
        /// The memory of the waiting VMM.
        host: Layout,
    },
    /// The guest uses a facility of the kernel that the host does not have.
    #[error("the guest uses {0}, which the destination does not have")]
    Device(&'static str),
    /// The guest uses facilities that this version does not know.
    #[error("the guest uses facilities that this version does not know (bits {0:#x})")]
    UnknownDevices(u32),
    /// A guest that is a plain process cannot become a virtual machine.
    #[error("the guest is a process and no virtual machine, the destination's VMM uses KVM")]
    NotVirtual,
    /// The TSC frequencies differ, and the host's processor cannot scale its own.
    #[error(
        "the guest's TSC runs at {guest_khz} kHz, the destination's at {host_khz} kHz, and its \
         processor cannot scale it"
    )]
    TscFrequency {
        /// The guest's frequency in kHz.
        guest_khz: u32,
        /// The host's frequency in kHz.
        host_khz: u32,
    },
    /// The destination lacks extended state components (XSAVE).
    #[error(
        "the guest may use extended state components {0:#x} of XCR0, which the destination does not have"
    )]
    ExtendedState(u64),
    /// The guest's XSAVE area is larger than the destination's.
    #[error("the guest's XSAVE area takes {guest} bytes, the destination's at most {host}")]
    XsaveBytes {
        /// The guest's size in bytes.
        guest: u32,
        /// The host's size in bytes.
        host: u32,
    },
    /// The processors are of two makers.
    #[error("the guest's processor is {guest}, the destination's {host}")]
    Vendor {
        /// The maker of the guest's processor, as CPUID spells it.
        guest: String,
        /// The maker of the host's processor.
        host: String,
    },
    /// The destination's processor lacks a feature that the guest was given.
    #[error("the guest's processor has {0}, the destination's has not")]
    Cpuid(Feature),
    /// The guest can run guests of its own, whose state is not moved.
    #[error("the guest's processor has {0}; guests that can run guests of their own cannot be moved")]
    Nested(Feature),
    /// The destination's KVM cannot restore one of the guest's MSRs.
    #[error("the destination's KVM cannot restore the guest's MSR {0:#x}")]
    Msr(u32),
}

/// A memory layout, for messages: the address and the length of each region, in bytes.
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
