//! All of a virtual machine but its RAM: [`MachineState`], and the bytes that it travels as.
//!
//! A state is a list of sections, each with a tag, a number (which vCPU, which chip) and raw
//! kernel structures as payload. The format has a version, a section that is not known is an
//! error, and a structure must have exactly the length that it has here: state that cannot be
//! understood whole is not loaded at all.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use memlane_protocol::wire::machine::{MAX_CPUID_ENTRIES, MAX_MSRS};
use rustix::time::{ClockId, clock_gettime};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::vcpu::{VcpuState, kvm_error};

/// Version of the format; states of other versions are refused.
pub const VERSION: u16 = 1;
/// The longest time by which a guest's clocks are advanced for having been moved. Beyond this
/// the hosts' clocks are not to be believed.
pub const MAX_PASSED: Duration = Duration::from_secs(3600);

const MAGIC: [u8; 4] = *b"MLST";
const MAX_SECTIONS: usize = 1 << 16;
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// A virtual machine, without its RAM.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineState {
    /// `CLOCK_REALTIME` of the capture, nanoseconds.
    pub captured_at: u64,
    /// What belongs to no vCPU.
    pub vm: VmState,
    /// The vCPUs, by number.
    pub vcpus: Vec<VcpuState>,
    /// What the VMM itself wants to find again.
    pub own: Vec<u8>,
}

/// Interrupt controllers, timer and clock of a VM.
#[derive(Clone, Debug, PartialEq)]
pub struct VmState {
    /// Both PICs and the IOAPIC as `struct kvm_irqchip`, where they are the kernel's.
    pub irqchips: Option<[RawIrqchip; 3]>,
    /// The interval timer, where it is the kernel's.
    pub pit: Option<kvm_pit_state2>,
    /// The paravirtual clock.
    pub clock: kvm_clock_data,
}

/// The bytes of a `struct kvm_irqchip`, which is a union and cannot be compared.
pub type RawIrqchip = [u8; size_of::<kvm_irqchip>()];

/// One instant on two clocks of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The host's time-stamp counter.
    pub tsc: u64,
    /// `CLOCK_REALTIME`, nanoseconds.
    pub realtime: u64,
}

/// Why a state was not saved, read or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// An ioctl failed.
    #[error("KVM does not {doing}: {source}")]
    Kvm {
        /// What was being done, and the ioctl.
        doing: &'static str,
        /// What KVM answered.
        source: io::Error,
    },
    /// One MSR was refused.
    #[error("KVM does not {doing} MSR {msr:#x}")]
    Msr {
        /// "read" or "set".
        doing: &'static str,
        /// Which one.
        msr: u32,
    },
    /// What went wrong with one of several vCPUs.
    #[error("vCPU {index}: {source}")]
    Vcpu {
        /// Which one.
        index: usize,
        /// What went wrong.
        source: Box<StateError>,
    },
    /// The vCPU left the guest again where only earlier I/O should have been completed.
    #[error("the vCPU has I/O that cannot be completed; handle its exit and try again")]
    PendingExit,
    /// Not a state at all.
    #[error("these bytes are no machine state: they begin with {0:02x?}")]
    Magic([u8; 4]),
    /// A state of another version.
    #[error("machine state of version {0}, this program reads version {VERSION}")]
    Version(u16),
    /// The bytes end within something.
    #[error("the machine state ends in the middle of {0}")]
    Short(&'static str),
    /// A length that the thing cannot have.
    #[error("{what} of {found} bytes, {expected} expected")]
    Length {
        /// What it is.
        what: &'static str,
        /// Its length, bytes.
        found: usize,
        /// The length that it has here, bytes.
        expected: usize,
    },
    /// More than there can be.
    #[error("too many {0}")]
    TooMany(&'static str),
    /// A section that this version does not have.
    #[error("unknown section {tag} (number {index}) in the machine state")]
    Unknown {
        /// Its tag.
        tag: u16,
        /// Its number.
        index: u16,
    },
    /// The same section twice.
    #[error("section {tag} (number {index}) is twice in the machine state")]
    Twice {
        /// Its tag.
        tag: u16,
        /// Its number.
        index: u16,
    },
    /// A section is not there.
    #[error("the machine state has no {what} (number {index})")]
    Missing {
        /// What it would hold.
        what: &'static str,
        /// Its number.
        index: u16,
    },
    /// The state is of another machine than the one that should load it.
    #[error("the state has {what} and this machine has not, or the other way round")]
    Mismatch {
        /// What one of them has.
        what: &'static str,
    },
}

impl MachineState {
    /// How far the guest's clocks must be advanced if it is loaded at `now`; never backwards and
    /// never by more than [`MAX_PASSED`], whatever the two hosts' clocks say.
    pub fn passed(&self, now: &Moment) -> Duration {
        Duration::from_nanos(now.realtime.saturating_sub(self.captured_at)).min(MAX_PASSED)
    }

    /// The bytes to send.
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

    /// Reads bytes from another host. `vcpus` is how many this machine has.
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
    /// Reads what the kernel holds for the VM as a whole. The vCPUs must stand still.
    pub fn capture(vm: &VmFd, irqchip: bool, pit: bool) -> Result<Self, StateError> {
        let irqchips = match irqchip {
            true => {
                let mut raw = [[0; _]; CHIPS.len()];
                for (raw, chip_id) in raw.iter_mut().zip(CHIPS) {
                    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                    vm.get_irqchip(&mut chip)
                        .map_err(kvm_error("read an interrupt controller (KVM_GET_IRQCHIP)"))?;
                    raw.copy_from_slice(chip.as_bytes());
                }
                Some(raw)
            }
            false => None,
        };
        let pit = match pit {
            true => Some(vm.get_pit2().map_err(kvm_error("read the interval timer (KVM_GET_PIT2)"))?),
            false => None,
        };
        let clock = vm.get_clock().map_err(kvm_error("read the paravirtual clock (KVM_GET_CLOCK)"))?;
        Ok(Self { irqchips, pit, clock })
    }

    /// Writes it into a VM whose vCPUs have not run yet, to be called before the vCPUs are
    /// restored. The clock goes on from where it stood, plus `passed`.
    pub fn restore(&self, vm: &VmFd, passed: Duration) -> Result<(), StateError> {
        // Host TSC and real time of the other host mean nothing here: only the value counts.
        let clock = self.clock.clock.saturating_add(passed.as_nanos() as u64);
        vm.set_clock(&kvm_clock_data { clock, ..Default::default() })
            .map_err(kvm_error("set the paravirtual clock (KVM_SET_CLOCK)"))?;
        for (raw, chip_id) in self.irqchips.iter().flatten().zip(CHIPS) {
            let mut chip = kvm_irqchip::read_from_bytes(raw).expect("the array has the structure's size");
            // The id picks a member of the union inside the kernel; the sender has no say in it.
            chip.chip_id = chip_id;
            vm.set_irqchip(&chip).map_err(kvm_error("set an interrupt controller (KVM_SET_IRQCHIP)"))?;
        }
        match &self.pit {
            Some(pit) => vm.set_pit2(pit).map_err(kvm_error("set the interval timer (KVM_SET_PIT2)")),
            None => Ok(()),
        }
    }
}

impl Moment {
    /// Now. The two readings lie as close together as a few tries can bring them.
    pub fn now() -> Self {
        let read = || {
            let before = host_tsc();
            let clock = clock_gettime(ClockId::Realtime);
            let after = host_tsc();
            let realtime = clock.tv_sec as u64 * 1_000_000_000 + clock.tv_nsec as u64;
            let apart = after.wrapping_sub(before);
            (apart, Self { tsc: before.wrapping_add(apart / 2), realtime })
        };
        (0..5).map(|_| read()).min_by_key(|(apart, _)| *apart).expect("five readings were taken").1
    }
}

/// The host's time-stamp counter.
pub fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux leaves it to user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Writes a state section by section.
#[derive(Debug)]
pub struct SectionWriter(Vec<u8>);

impl SectionWriter {
    /// A state without sections.
    #[expect(clippy::new_without_default, reason = "a default state would be a surprise")]
    pub fn new() -> Self {
        let header = RawHeader { magic: MAGIC, version: VERSION, reserved: 0 };
        Self(header.as_bytes().to_vec())
    }

    /// Appends a section.
    pub fn put<T: IntoBytes + Immutable + ?Sized>(&mut self, tag: u16, index: u16, value: &T) {
        let payload = value.as_bytes();
        let section = RawSection { tag, index, bytes: payload.len() as u32 };
        self.0.extend_from_slice(section.as_bytes());
        self.0.extend_from_slice(payload);
    }

    /// The bytes.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// The sections of a state, each to be taken once.
#[derive(Debug)]
pub struct Sections<'a>(BTreeMap<(u16, u16), &'a [u8]>);

impl<'a> Sections<'a> {
    /// Splits a state into its sections.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, StateError> {
        let (header, mut rest) =
            RawHeader::read_from_prefix(bytes).map_err(|_| StateError::Short("its header"))?;
        if header.magic != MAGIC {
            return Err(StateError::Magic(header.magic));
        }
        if header.version != VERSION {
            return Err(StateError::Version(header.version));
        }
        let mut sections = BTreeMap::new();
        while !rest.is_empty() {
            let (section, after) = RawSection::read_from_prefix(rest)
                .map_err(|_| StateError::Short("the header of a section"))?;
            let RawSection { tag, index, bytes } = section;
            let (payload, after) =
                after.split_at_checked(bytes as usize).ok_or(StateError::Short("a section"))?;
            if sections.insert((tag, index), payload).is_some() {
                return Err(StateError::Twice { tag, index });
            }
            if sections.len() > MAX_SECTIONS {
                return Err(StateError::TooMany("sections in the machine state"));
            }
            rest = after;
        }
        Ok(Self(sections))
    }

    /// Takes a section's bytes.
    pub fn bytes(&mut self, tag: u16, index: u16, what: &'static str) -> Result<&'a [u8], StateError> {
        self.0.remove(&(tag, index)).ok_or(StateError::Missing { what, index })
    }

    /// Takes a section that is one structure.
    pub fn take<T: FromBytes>(&mut self, tag: u16, index: u16, what: &'static str) -> Result<T, StateError> {
        self.maybe(tag, index, what)?.ok_or(StateError::Missing { what, index })
    }

    /// Takes a section that is one structure, if it is there.
    pub fn maybe<T: FromBytes>(
        &mut self,
        tag: u16,
        index: u16,
        what: &'static str,
    ) -> Result<Option<T>, StateError> {
        let Some(payload) = self.0.remove(&(tag, index)) else { return Ok(None) };
        let (found, expected) = (payload.len(), size_of::<T>());
        T::read_from_bytes(payload).map(Some).map_err(|_| StateError::Length { what, found, expected })
    }

    /// Takes a section that is a list of at most `most` structures.
    pub fn list<T: FromBytes>(
        &mut self,
        tag: u16,
        index: u16,
        most: usize,
        what: &'static str,
    ) -> Result<Vec<T>, StateError> {
        let payload = self.bytes(tag, index, what)?;
        let (found, expected) = (payload.len(), size_of::<T>());
        if !found.is_multiple_of(expected) {
            return Err(StateError::Length { what, found, expected });
        }
        if found / expected > most {
            return Err(StateError::TooMany(what));
        }
        let items = payload.chunks_exact(expected).map(T::read_from_bytes);
        items.collect::<Result<_, _>>().map_err(|_| StateError::Length { what, found, expected })
    }

    /// Nothing may be left.
    pub fn end(self) -> Result<(), StateError> {
        match self.0.keys().next() {
            Some(&(tag, index)) => Err(StateError::Unknown { tag, index }),
            None => Ok(()),
        }
    }
}

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

mod tag {
    pub const CAPTURED_AT: u16 = 1;
    pub const CLOCK: u16 = 2;
    pub const IRQCHIP: u16 = 3;
    pub const PIT: u16 = 4;
    pub const CPUID: u16 = 16;
    pub const REGS: u16 = 17;
    pub const SREGS: u16 = 18;
    pub const XSAVE: u16 = 19;
    pub const XCRS: u16 = 20;
    pub const DEBUGREGS: u16 = 21;
    pub const EVENTS: u16 = 22;
    pub const MP_STATE: u16 = 23;
    pub const MSRS: u16 = 24;
    pub const LAPIC: u16 = 25;
    pub const TSC: u16 = 26;
    pub const OWN: u16 = 64;
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: u16,
    reserved: u16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawSection {
    tag: u16,
    index: u16,
    bytes: u32,
}

#[cfg(test)]
mod tests;
