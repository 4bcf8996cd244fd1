//! What a guest's description may not say.

use proptest::prelude::*;

use super::Codec;
use crate::wire::WireError;
use crate::wire::machine::{
    CpuidEntry, GuestShape, MAX_CPUID_ENTRIES, MAX_MSRS, MAX_NICS, MAX_RAM_BYTES, MAX_REGIONS, MAX_VCPUS,
    Machine, Nic, Region, TrackerKind,
};

/// Where the counts lie in an encoded description, and where its lists begin.
const TRACKER: usize = 128;
const REGIONS: usize = 129;
const NICS: usize = 130;
const CPUID: usize = 156;
const MSRS: usize = 158;
const LISTS: usize = 160;

const SMALL: u32 = 4 << 10;
const HUGE: u32 = 2 << 20;
const GIB: u64 = 1 << 30;

/// A guest with 1 GiB of 4 KiB pages, and 2 GiB of 2 MiB pages above the gap below 4 GiB.
pub(super) fn shape() -> GuestShape {
    GuestShape {
        name: "web1".parse().unwrap(),
        tracker: TrackerKind::Ring,
        machine: Machine {
            vmm: "memlane-vmm".parse().unwrap(),
            state_version: 1,
            vcpus: 4,
            features: Machine::KVM | Machine::IRQCHIP,
            tsc_khz: 2_400_000,
            xcr0: 7,
            xsave_bytes: 832,
            cpuid: Vec::new(),
            msrs: vec![0x10, 0x174],
        },
        regions: vec![region(0, GIB, SMALL), region(4 * GIB, 2 * GIB, HUGE)],
        nics: Vec::new(),
    }
}

/// As much of everything as is allowed.
pub(super) fn largest_shape() -> GuestShape {
    let shape = shape();
    let entry = CpuidEntry {
        function: 1.into(),
        index: 0.into(),
        flags: 0.into(),
        eax: 1.into(),
        ebx: 2.into(),
        ecx: 3.into(),
        edx: 4.into(),
    };
    let nic = Nic { mac: [2; 6], network: "n".repeat(63).parse().unwrap() };
    let each = MAX_RAM_BYTES / MAX_REGIONS as u64;
    GuestShape {
        machine: Machine {
            vcpus: MAX_VCPUS,
            cpuid: vec![entry; MAX_CPUID_ENTRIES],
            msrs: (0..MAX_MSRS as u32).collect(),
            ..shape.machine
        },
        regions: (0..MAX_REGIONS as u64).map(|number| region(number * each, each, HUGE)).collect(),
        nics: vec![nic; MAX_NICS],
        ..shape
    }
}

proptest! {
    /// Numbers that are nearly right, against the rules in plain words.
    #[test]
    fn regions_are_aligned_ascending_and_apart(regions in prop::collection::vec(near_region(), 0..4)) {
        let aligned = regions.iter().all(|region| {
            let page = u64::from(region.page_bytes);
            region.address % page == 0 && region.bytes % page == 0 && region.offset % page == 0
        });
        let apart = regions.windows(2).all(|pair| pair[0].address + pair[0].bytes <= pair[1].address);
        let some = !regions.is_empty() && regions.iter().all(|region| region.bytes > 0);
        prop_assert_eq!(read(regions).is_ok(), aligned && apart && some);
    }
}

/// A region among the first MiBs, most often of whole pages.
fn near_region() -> impl Strategy<Value = Region> {
    let bytes = |most: u64| {
        prop_oneof![
            20 => (0..=most).prop_map(|huge| huge << 21),
            4 => (0..=most << 9).prop_map(|small| small << 12),
            1 => 0..=most << 21,
        ]
    };
    (bytes(12), bytes(3), bytes(1), prop::sample::select(vec![SMALL, HUGE]))
        .prop_map(|(address, bytes, offset, page_bytes)| Region { address, bytes, page_bytes, offset })
}

#[test]
fn sizes_are_sums_over_the_regions() {
    assert_eq!(shape().ram_bytes(), 3 * GIB);
    assert_eq!(shape().pages(), 3 * GIB / 4096);
    assert_eq!(largest_shape().ram_bytes(), MAX_RAM_BYTES);
    assert_eq!(GuestShape::read(&largest_shape().write()), Ok(largest_shape()));
}

#[test]
fn pages_are_of_4_kib_or_2_mib() {
    for page_bytes in [0, 1, 8 << 10, 1 << 30, u32::MAX] {
        let regions = vec![Region { page_bytes, ..region(0, GIB, SMALL) }];
        assert_eq!(read(regions), value("the page size of a memory region", page_bytes.into()));
    }
}

#[test]
fn a_region_is_some_whole_pages_long() {
    let wrong = |found| value("the length of a memory region", found);
    assert_eq!(read(vec![region(0, 0, SMALL)]), wrong(0));
    assert_eq!(read(vec![region(0, GIB + 1, SMALL)]), wrong(GIB + 1));
    assert_eq!(read(vec![region(0, GIB + 4096, HUGE)]), wrong(GIB + 4096));
    for bytes in [MAX_RAM_BYTES + 4096, u64::MAX - 4095] {
        assert_eq!(read(vec![region(0, bytes, SMALL)]), wrong(bytes));
    }
}

#[test]
fn a_region_begins_on_a_page_above_the_one_before() {
    let wrong = |found| value("the address of a memory region", found);
    assert_eq!(read(vec![region(1, GIB, SMALL)]), wrong(1));
    assert_eq!(read(vec![region(4096, GIB, HUGE)]), wrong(4096));
    let after = |address| vec![region(GIB, GIB, SMALL), region(address, GIB, SMALL)];
    assert_eq!(read(after(2 * GIB)), Ok(()));
    assert_eq!(read(after(2 * GIB - 4096)), wrong(2 * GIB - 4096));
    assert_eq!(read(after(GIB)), wrong(GIB));
    assert_eq!(read(after(0)), wrong(0));
    // No address has more than 52 bits, so that the end of a region does not overflow.
    assert_eq!(read(after(1 << 52)), Ok(()));
    for address in [(1 << 52) + 4096, u64::MAX - 4095] {
        assert_eq!(read(after(address)), wrong(address));
    }
}

#[test]
fn a_region_begins_on_a_page_of_its_file() {
    let wrong = |found| value("the file offset of a memory region", found);
    let at = |offset, page_bytes| vec![Region { offset, ..region(0, GIB, page_bytes) }];
    assert_eq!(read(at(4096, SMALL)), Ok(()));
    assert_eq!(read(at(4095, SMALL)), wrong(4095));
    assert_eq!(read(at(4096, HUGE)), wrong(4096));
    assert_eq!(read(at(1 << 62, HUGE)), Ok(()));
    for offset in [(1 << 62) + 4096, u64::MAX - 4095] {
        assert_eq!(read(at(offset, SMALL)), wrong(offset));
    }
}

#[test]
fn a_guest_has_memory_but_not_too_much() {
    assert_eq!(read(vec![]), value("the number of memory regions", 0));
    let all = region(0, MAX_RAM_BYTES, HUGE);
    assert_eq!(read(vec![all]), Ok(()));
    let found = MAX_RAM_BYTES + 4096;
    let refused = WireError::TooLarge { what: "the guest's RAM", found, limit: MAX_RAM_BYTES };
    assert_eq!(read(vec![all, region(MAX_RAM_BYTES, 4096, SMALL)]), Err(refused));
}

#[test]
fn msrs_come_once_and_in_order() {
    for msrs in [vec![0x174, 0x10], vec![0x10, 0x10]] {
        let mut shape = shape();
        shape.machine.msrs = msrs;
        let wrong = WireError::Value { what: "the next MSR of an ascending list", found: 0x10 };
        assert_eq!(GuestShape::read(&shape.write()), Err(wrong));
    }
}

#[test]
fn a_guest_has_vcpus_but_not_too_many() {
    for (vcpus, taken) in [(0, false), (1, true), (MAX_VCPUS, true), (MAX_VCPUS + 1, false)] {
        let mut shape = shape();
        shape.machine.vcpus = vcpus;
        let wrong = WireError::Value { what: "the number of vCPUs", found: vcpus.into() };
        let want = if taken { Ok(shape.clone()) } else { Err(wrong) };
        assert_eq!(GuestShape::read(&shape.write()), want);
    }
}

#[test]
fn an_unknown_tracker_is_named() {
    for tracker in [0, 4, u8::MAX] {
        let mut bytes = shape().write();
        bytes[TRACKER] = tracker;
        let unknown = WireError::Unknown { what: "dirty tracker", found: tracker.into() };
        assert_eq!(GuestShape::read(&bytes), Err(unknown));
    }
}

/// The list that has too many entries is not even there.
#[test]
fn counts_are_checked_before_their_lists_are_read() {
    let refused = |what, found, limit: usize| WireError::TooLarge { what, found, limit: limit as u64 };
    let regions_end = LISTS + 32 * shape().regions.len();

    let mut bytes = shape().write();
    bytes[REGIONS] = MAX_REGIONS as u8 + 1;
    let error = refused("count of memory regions", MAX_REGIONS as u64 + 1, MAX_REGIONS);
    assert_eq!(GuestShape::read(&bytes[..LISTS]), Err(error));

    let mut bytes = shape().write();
    bytes[NICS] = u8::MAX;
    let error = refused("count of network interfaces", u8::MAX.into(), MAX_NICS);
    assert_eq!(GuestShape::read(&bytes[..regions_end]), Err(error));

    for (at, what, limit) in
        [(CPUID, "count of CPUID entries", MAX_CPUID_ENTRIES), (MSRS, "count of MSRs", MAX_MSRS)]
    {
        for found in [limit as u16 + 1, u16::MAX] {
            let mut bytes = shape().write();
            bytes[at..at + 2].copy_from_slice(&found.to_le_bytes());
            let error = refused(what, found.into(), limit);
            assert_eq!(GuestShape::read(&bytes[..regions_end]), Err(error));
        }
    }
}

/// A count that its field cannot hold is written as one that is refused, not as a smaller one.
#[test]
fn more_regions_than_can_be_counted_are_refused() {
    let regions = (0..300).map(|page| region(page << 12, 1 << 12, 4 << 10)).collect();
    let (what, found, limit) = ("count of memory regions", 255, MAX_REGIONS as u64);
    assert_eq!(read(regions), Err(WireError::TooLarge { what, found, limit }));
}

fn region(address: u64, bytes: u64, page_bytes: u32) -> Region {
    Region { address, bytes, page_bytes, offset: 0 }
}

/// What is said about a guest with these regions.
fn read(regions: Vec<Region>) -> Result<(), WireError> {
    GuestShape::read(&GuestShape { regions, ..shape() }.write()).map(drop)
}

fn value(what: &'static str, found: u64) -> Result<(), WireError> {
    Err(WireError::Value { what, found })
}
