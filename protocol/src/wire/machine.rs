//! What a guest is made of, and what a host can run: the same words for both, so that a
//! destination compares like with like before anything moves.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::text::RawLabel;
use super::{Label, Reader, WireError, put};
use crate::PAGE_SIZE;

/// CPUID entries in a description (KVM's own limit is 256).
pub const MAX_CPUID_ENTRIES: usize = 256;
/// Model-specific registers in a description.
pub const MAX_MSRS: usize = 1024;
/// Regions of memory in a guest; their descriptors travel in one message.
pub const MAX_REGIONS: usize = 64;
/// Network interfaces of a guest.
pub const MAX_NICS: usize = 16;
/// Virtual CPUs of a guest.
pub const MAX_VCPUS: u16 = 4096;
/// Bytes of RAM of a guest: 64 TiB, so that page numbers and sums stay far from overflow.
pub const MAX_RAM_BYTES: u64 = 64 << 40;

/// A guest as its VMM describes it when it attaches, and as it is offered to a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestShape {
    /// The guest's name, unique on its host.
    pub name: Label,
    /// How its VMM finds dirty pages.
    pub tracker: TrackerKind,
    /// Processor, interrupt controller and clocks.
    pub machine: Machine,
    /// RAM, in order of page number.
    pub regions: Vec<Region>,
    /// Network interfaces that must be announced at the destination.
    pub nics: Vec<Nic>,
}

/// How a VMM finds the pages that its guest wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum TrackerKind {
    /// KVM's dirty bitmap, cleared piece by piece.
    Log = 1,
    /// KVM's dirty ring.
    Ring = 2,
    /// `PAGEMAP_SCAN` over userfaultfd write protection.
    Pagemap = 3,
}

/// The VMM, and the processor that it shows to the guest (of an offered guest) or could show
/// (of a VMM that waits for one).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Name of the VMM program. State moves only between VMMs of one name.
    pub vmm: Label,
    /// Format of the VMM's state; the destination must read it.
    pub state_version: u16,
    /// Number of virtual CPUs.
    pub vcpus: u16,
    /// What else the guest uses, a set of [`Machine::FEATURES`].
    pub features: u32,
    /// Frequency of the guest's time-stamp counter, 0 where it has none of its own.
    pub tsc_khz: u32,
    /// Extended state components (XCR0) used, or allowed.
    pub xcr0: u64,
    /// Bytes of the XSAVE area.
    pub xsave_bytes: u32,
    /// CPUID leaves; empty for a guest that is no virtual machine.
    pub cpuid: Vec<CpuidEntry>,
    /// Model-specific registers saved, or restorable, in ascending order.
    pub msrs: Vec<u32>,
}

impl Machine {
    /// Runs under KVM.
    pub const KVM: u32 = 1 << 0;
    /// Has the in-kernel interrupt controllers.
    pub const IRQCHIP: u32 = 1 << 1;
    /// Has the in-kernel interval timer.
    pub const PIT: u32 = 1 << 2;
    /// The host can give the guest another TSC frequency than its own.
    pub const TSC_SCALING: u32 = 1 << 3;
    /// Names of the features, by bit.
    pub const FEATURES: [&str; 4] = ["kvm", "irqchip", "pit", "tsc-scaling"];
}

/// One leaf of CPUID, as `struct kvm_cpuid_entry2` has it.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
)]
#[repr(C)]
pub struct CpuidEntry {
    /// Leaf (EAX on entry).
    pub function: U32,
    /// Subleaf (ECX on entry), where the leaf has subleaves.
    pub index: U32,
    /// `KVM_CPUID_FLAG_*`.
    pub flags: U32,
    /// Result in EAX.
    pub eax: U32,
    /// Result in EBX.
    pub ebx: U32,
    /// Result in ECX.
    pub ecx: U32,
    /// Result in EDX.
    pub edx: U32,
}

/// A piece of guest memory behind one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address, page aligned.
    pub address: u64,
    /// Length, whole pages.
    pub bytes: u64,
    /// Size of the backing pages: 4 KiB or 2 MiB.
    pub page_bytes: u32,
    /// Where the region begins in its descriptor.
    pub offset: u64,
}

/// A network interface of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// The network it must find at the destination.
    pub network: Label,
}

impl GuestShape {
    /// Bytes of RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum()
    }

    /// Pages of RAM.
    pub fn pages(&self) -> u64 {
        self.ram_bytes() / PAGE_SIZE
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let machine = &self.machine;
        put(
            out,
            &RawShape {
                name: self.name.raw(),
                vmm: machine.vmm.raw(),
                tracker: self.tracker as u8,
                regions: self.regions.len() as u8,
                nics: self.nics.len() as u8,
                reserved: 0,
                state_version: machine.state_version.into(),
                vcpus: machine.vcpus.into(),
                features: machine.features.into(),
                tsc_khz: machine.tsc_khz.into(),
                xcr0: machine.xcr0.into(),
                xsave_bytes: machine.xsave_bytes.into(),
                cpuid: (machine.cpuid.len() as u16).into(),
                msrs: (machine.msrs.len() as u16).into(),
            },
        );
        for region in &self.regions {
            let Region { address, bytes, page_bytes, offset } = *region;
            put(
                out,
                &RawRegion {
                    address: address.into(),
                    bytes: bytes.into(),
                    offset: offset.into(),
                    page_bytes: page_bytes.into(),
                    reserved: 0.into(),
                },
            );
        }
        for nic in &self.nics {
            put(out, &RawNic { mac: nic.mac, reserved: [0; 2], network: nic.network.raw() });
        }
        put(out, machine.cpuid.as_slice());
        for msr in &machine.msrs {
            put(out, &U32::new(*msr));
        }
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let raw: &RawShape = reader.take("guest description")?;
        let regions = reader.list::<RawRegion>("count of memory regions", raw.regions.into(), MAX_REGIONS)?;
        let nics = reader.list::<RawNic>("count of network interfaces", raw.nics.into(), MAX_NICS)?;
        let cpuid = reader.list("count of CPUID entries", raw.cpuid.get().into(), MAX_CPUID_ENTRIES)?;
        let msrs = reader.list::<U32>("count of MSRs", raw.msrs.get().into(), MAX_MSRS)?;
        let vcpus = raw.vcpus.get();
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(WireError::Value { what: "the number of vCPUs", found: vcpus.into() });
        }
        Ok(Self {
            name: raw.name.label()?,
            tracker: TrackerKind::from_number(raw.tracker)?,
            machine: Machine {
                vmm: raw.vmm.label()?,
                state_version: raw.state_version.get(),
                vcpus,
                features: raw.features.get(),
                tsc_khz: raw.tsc_khz.get(),
                xcr0: raw.xcr0.get(),
                xsave_bytes: raw.xsave_bytes.get(),
                cpuid: cpuid.to_vec(),
                msrs: check_msrs(msrs)?,
            },
            regions: check_regions(regions)?,
            nics: nics
                .iter()
                .map(|nic| Ok(Nic { mac: nic.mac, network: nic.network.label()? }))
                .collect::<Result<_, WireError>>()?,
        })
    }
}

impl TrackerKind {
    /// The name that operators use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Ring => "ring",
            Self::Pagemap => "pagemap",
        }
    }

    fn from_number(number: u8) -> Result<Self, WireError> {
        [Self::Log, Self::Ring, Self::Pagemap]
            .into_iter()
            .find(|kind| *kind as u8 == number)
            .ok_or(WireError::Unknown { what: "dirty tracker", found: number.into() })
    }
}

/// Each MSR once and in ascending order, so that a list can be searched.
fn check_msrs(raw: &[U32]) -> Result<Vec<u32>, WireError> {
    let msrs: Vec<u32> = raw.iter().map(|msr| msr.get()).collect();
    match msrs.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(pair) => {
            Err(WireError::Value { what: "the next MSR of an ascending list", found: pair[1].into() })
        }
        None => Ok(msrs),
    }
}

/// Regions must be aligned, in ascending order and apart, and small enough that no sum of
/// their lengths overflows.
fn check_regions(raw: &[RawRegion]) -> Result<Vec<Region>, WireError> {
    let mut regions = Vec::with_capacity(raw.len());
    let (mut free_from, mut total) = (0, 0u64);
    for region in raw {
        let (address, bytes, offset) = (region.address.get(), region.bytes.get(), region.offset.get());
        let page_bytes = region.page_bytes.get();
        let wrong = |what, found| Err(WireError::Value { what, found });
        if page_bytes != 4 << 10 && page_bytes != 2 << 20 {
            return wrong("the page size of a memory region", page_bytes.into());
        }
        let page = u64::from(page_bytes);
        if bytes == 0 || bytes % page != 0 || bytes > MAX_RAM_BYTES {
            return wrong("the length of a memory region", bytes);
        }
        if address % page != 0 || address < free_from || address > 1 << 52 {
            return wrong("the address of a memory region", address);
        }
        if offset % page != 0 || offset > 1 << 62 {
            return wrong("the file offset of a memory region", offset);
        }
        free_from = address + bytes;
        total += bytes;
        if total > MAX_RAM_BYTES {
            return Err(WireError::TooLarge { what: "the guest's RAM", found: total, limit: MAX_RAM_BYTES });
        }
        regions.push(Region { address, bytes, page_bytes, offset });
    }
    if regions.is_empty() {
        return Err(WireError::Value { what: "the number of memory regions", found: 0 });
    }
    Ok(regions)
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawShape {
    name: RawLabel,
    vmm: RawLabel,
    tracker: u8,
    regions: u8,
    nics: u8,
    reserved: u8,
    state_version: U16,
    vcpus: U16,
    features: U32,
    tsc_khz: U32,
    xcr0: U64,
    xsave_bytes: U32,
    cpuid: U16,
    msrs: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRegion {
    address: U64,
    bytes: U64,
    offset: U64,
    page_bytes: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawNic {
    mac: [u8; 6],
    reserved: [u8; 2],
    network: RawLabel,
}
