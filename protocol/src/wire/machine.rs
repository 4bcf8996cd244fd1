//! What a guest consists of, and what a host can run. Both are described in the same terms, so that a destination
//! can compare them before anything is sent.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::WireError;
use super::reader::{Reader, count, put};
use super::text::{Label, RawLabel};
use crate::PAGE_SIZE;

/// The largest number of CPUID entries in a description. KVM's own limit is 256.
pub const MAX_CPUID_ENTRIES: usize = 256;
/// The largest number of model-specific registers in a description.
pub const MAX_MSRS: usize = 1024;
/// The largest number of memory regions of a guest, whose descriptors travel in one message.
pub const MAX_REGIONS: usize = 64;
/// The largest number of network interfaces of a guest.
pub const MAX_NICS: usize = 16;
/// The largest number of virtual CPUs of a guest.
pub const MAX_VCPUS: u16 = 4096;
/// The largest RAM of a guest in bytes. It is 64 TiB, so that page numbers and sums stay far from overflow.
pub const MAX_RAM_BYTES: u64 = 64 << 40;

/// A guest as its VMM describes it when it attaches, and as it is offered to a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestShape {
    /// The guest's name, unique on its host.
    pub name: Label,
    /// How the VMM finds dirty pages.
    pub tracker: TrackerKind,
    /// The processor, the interrupt controller and the clocks.
    pub machine: Machine,
    /// The regions of RAM, in the order of page numbers.
    pub regions: Vec<Region>,
    /// The network interfaces that must be announced at the destination.
    pub nics: Vec<Nic>,
}

/// How a VMM finds the pages that its guest wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum TrackerKind {
    /// The VMM uses KVM's dirty bitmap, which is cleared piece by piece.
    Log = 1,
    /// The VMM uses KVM's dirty ring.
    Ring = 2,
    /// The daemon uses `PAGEMAP_SCAN` over userfaultfd write protection.
    Pagemap = 3,
}

/// The VMM and the processor that it shows to the guest. For a VMM that waits for a guest, it is what the VMM could
/// show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The name of the VMM program. State moves only between VMMs of the same name.
    pub vmm: Label,
    /// The format of the VMM's state, which the destination must be able to read.
    pub state_version: u16,
    /// The number of virtual CPUs.
    pub vcpus: u16,
    /// A set of [`Machine::FEATURES`] that the guest uses.
    pub features: u32,
    /// The frequency of the guest's time-stamp counter in kHz, or 0 if it has none of its own.
    pub tsc_khz: u32,
    /// The extended state components (XCR0) that are used, or allowed.
    pub xcr0: u64,
    /// The length of the XSAVE area in bytes.
    pub xsave_bytes: u32,
    /// The CPUID leaves. They are empty for a guest that is not a virtual machine.
    pub cpuid: Vec<CpuidEntry>,
    /// The model-specific registers that are saved, or can be restored, in ascending order.
    pub msrs: Vec<u32>,
}

impl Machine {
    /// The guest runs under KVM.
    pub const KVM: u32 = 1 << 0;
    /// The guest has the in-kernel interrupt controllers.
    pub const IRQCHIP: u32 = 1 << 1;
    /// The guest has the in-kernel interval timer.
    pub const PIT: u32 = 1 << 2;
    /// The host can give the guest another TSC frequency than its own.
    pub const TSC_SCALING: u32 = 1 << 3;
    /// The names of the features, by bit.
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
    /// The leaf (EAX on entry).
    pub function: U32,
    /// The subleaf (ECX on entry), if the leaf has subleaves.
    pub index: U32,
    /// A set of `KVM_CPUID_FLAG_*`.
    pub flags: U32,
    /// The result in EAX.
    pub eax: U32,
    /// The result in EBX.
    pub ebx: U32,
    /// The result in ECX.
    pub ecx: U32,
    /// The result in EDX.
    pub edx: U32,
}

/// A region of guest memory behind one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The guest physical address, which is page aligned.
    pub address: u64,
    /// The length in bytes, which is a number of whole pages.
    pub bytes: u64,
    /// The size of the backing pages in bytes: 4 KiB or 2 MiB.
    pub page_bytes: u32,
    /// The offset in bytes at which the region begins in its descriptor.
    pub offset: u64,
}

/// A network interface of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// The Ethernet address.
    pub mac: [u8; 6],
    /// The network that the interface must find at the destination.
    pub network: Label,
}

impl GuestShape {
    /// Returns the size of the RAM in bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum()
    }

    /// Returns the number of pages of RAM.
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
                regions: count(self.regions.len(), u8::MAX),
                nics: count(self.nics.len(), u8::MAX),
                reserved: 0,
                state_version: machine.state_version.into(),
                vcpus: machine.vcpus.into(),
                features: machine.features.into(),
                tsc_khz: machine.tsc_khz.into(),
                xcr0: machine.xcr0.into(),
                xsave_bytes: machine.xsave_bytes.into(),
                cpuid: count(machine.cpuid.len(), u16::MAX).into(),
                msrs: count(machine.msrs.len(), u16::MAX).into(),
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
    /// Returns the name that operators use.
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

/// Checks that each MSR is listed once and in ascending order, so that a list can be searched.
fn check_msrs(raw: &[U32]) -> Result<Vec<u32>, WireError> {
    let msrs: Vec<u32> = raw.iter().map(|msr| msr.get()).collect();
    match msrs.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(pair) => {
            Err(WireError::Value { what: "the next MSR of an ascending list", found: pair[1].into() })
        }
        None => Ok(msrs),
    }
}

/// Checks that regions are aligned, in ascending order and apart, and small enough that no sum of their lengths
/// overflows.
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
