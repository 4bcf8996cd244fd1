use std::os::fd::AsFd;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

use super::*;

const MIB: u64 = 1 << 20;
/// Two regions with a gap between them; the first ends within a word of any bitmap.
const LAYOUT: [(u64, u64); 2] = [(0, 5 * PAGE_SIZE), (MIB, 3 * PAGE_SIZE)];

fn ram() -> GuestRam {
    GuestRam::create(&LAYOUT, &Backing::Memfd).unwrap()
}

fn region(address: u64, bytes: u64) -> Region {
    Region { address, bytes, page_bytes: PAGE_SIZE as u32, offset: 0 }
}

fn memfd(bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    fd
}

#[test]
fn pages_are_numbered_over_gaps() {
    let ram = ram();
    assert_eq!(ram.pages(), 8);
    for (page, address) in [(0, 0), (4, 4 * PAGE_SIZE), (5, MIB), (7, MIB + 2 * PAGE_SIZE)] {
        assert_eq!(ram.address_of(page), Some(address));
        assert_eq!(ram.page_of(address + PAGE_SIZE - 1), Some(page));
        assert_eq!(ram.region_of(page), Some(usize::from(page > 4)));
    }
    for nowhere in [5 * PAGE_SIZE, MIB - 1, MIB + 3 * PAGE_SIZE, u64::MAX] {
        assert_eq!(ram.page_of(nowhere), None);
    }
    assert_eq!((ram.address_of(8), ram.region_of(8), ram.region_of(u64::MAX)), (None, None, None));

    let pieces: Vec<_> = ram.slices(3..7).map(|slice| (slice.first_page, slice.len as u64)).collect();
    assert_eq!(pieces, [(3, 2 * PAGE_SIZE), (5, 2 * PAGE_SIZE)]);
    assert_eq!(ram.slices(0..u64::MAX).count(), 2);
    assert_eq!(ram.slices(8..9).count() + ram.slices(u64::MAX..u64::MAX).count(), 0);
    let (from, to) = (6, 2);
    assert_eq!(ram.slices(from..to).count(), 0);
}

#[test]
fn both_processes_see_the_same_bytes() {
    let ram = ram();
    let fds = ram.descriptors().into_iter().map(|fd| fd.try_clone_to_owned().unwrap());
    let daemon = GuestRam::map(ram.regions().iter().copied().zip(fds).collect()).unwrap();
    assert!(daemon.is_sealed());
    ram.memory().write_obj(0x1234_5678u32, GuestAddress(MIB + 8)).unwrap();
    assert_eq!(daemon.memory().read_obj::<u32>(GuestAddress(MIB + 8)).unwrap(), 0x1234_5678);
    assert!(rustix::fs::ftruncate(ram.descriptors()[0], 0).is_err());
}

#[test]
fn writes_of_the_vmm_set_bits() {
    let ram = ram();
    ram.memory().write_slice(&[1; 5000], GuestAddress(4090)).unwrap();
    ram.memory().write_obj(1u8, GuestAddress(MIB + PAGE_SIZE)).unwrap();
    let written: Vec<_> = ram.dirty_bitmap().runs().collect();
    assert_eq!(written, [0..3, 6..7]);
    let region = ram.memory().find_region(GuestAddress(MIB)).unwrap();
    assert!(region.bitmap().dirty_at(PAGE_SIZE as usize) && !region.bitmap().dirty_at(0));
    ram.memory().read_obj::<u64>(GuestAddress(MIB)).unwrap();
    assert!(!ram.dirty_bitmap().contains(5));
}

#[test]
fn what_is_not_held_is_found_however_it_came_about() {
    let ram = GuestRam::create(&[(0, 8 * PAGE_SIZE), (16 << 20, 4 * PAGE_SIZE)], &Backing::Memfd).unwrap();
    assert_eq!(ram.holes(0..12).unwrap(), vec![0..12]);
    ram.populate_write(2..4).unwrap();
    ram.populate_write(7..9).unwrap();
    assert_eq!(ram.data_extents(0..12).unwrap(), [2..4, 7..9]);
    let fds = ram.descriptors().into_iter().map(|fd| fd.try_clone_to_owned().unwrap());
    let other = GuestRam::map(ram.regions().iter().copied().zip(fds).collect()).unwrap();
    other.punch(3..4).unwrap();
    assert_eq!(ram.holes(0..12).unwrap(), [0..2, 3..7, 9..12]);
    assert_eq!(ram.holes(1..8).unwrap(), [1..2, 3..7]);
    assert!(ram.holes(7..9).unwrap().is_empty() && ram.holes(4..4).unwrap().is_empty());
}

#[test]
fn holes_are_found_and_made() {
    let ram = GuestRam::create(&[(0, MIB), (4 * MIB, MIB)], &Backing::Memfd).unwrap();
    assert_eq!(ram.data_extents(0..512).unwrap(), []);
    for page in [3u64, 4, 255, 256, 300] {
        ram.memory().write_obj(page, GuestAddress(ram.address_of(page).unwrap())).unwrap();
    }
    assert_eq!(ram.data_extents(0..512).unwrap(), [3..5, 255..257, 300..301]);
    assert_eq!(ram.data_extents(4..256).unwrap(), [4..5, 255..256]);
    assert_eq!(ram.data_extents(400..9999).unwrap(), []);
    assert_eq!(ram.allocated_bytes().unwrap(), 5 * PAGE_SIZE);
    ram.punch(4..257).unwrap();
    assert_eq!(ram.allocated_bytes().unwrap(), 2 * PAGE_SIZE);
    assert_eq!(ram.data_extents(0..512).unwrap(), [3..4, 300..301]);
    ram.populate_write(2..7).unwrap();
    assert_eq!(ram.data_extents(0..512).unwrap(), [2..7, 300..301]);
    assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(255 * PAGE_SIZE)).unwrap(), 0);
    assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(3 * PAGE_SIZE)).unwrap(), 3);
}

#[test]
fn pieces_of_a_long_run_are_found_and_holes_of_others_when_one_begins_anew() {
    let ram = GuestRam::create(&[(0, MIB), (4 * MIB, MIB)], &Backing::Memfd).unwrap();
    ram.populate_write(10..500).unwrap();
    let by_pieces = || {
        let extents = (0..512).step_by(32).flat_map(|at| ram.data_extents(at..at + 32).unwrap());
        extents.map(|extent| extent.end - extent.start).sum::<u64>()
    };
    assert_eq!(by_pieces(), 490);
    // Another process: its holes are not told to this one.
    let fds = ram.descriptors().into_iter().map(|fd| fd.try_clone_to_owned().unwrap());
    let other = GuestRam::map(ram.regions().iter().copied().zip(fds).collect()).unwrap();
    other.punch(100..110).unwrap();
    assert!(ram.data_extents(96..128).unwrap().contains(&(96..128)));
    assert_eq!(ram.data_extents_uncached(0..128).unwrap(), [10..100, 110..128]);
    assert_eq!(ram.data_extents_uncached(100..9999).unwrap().len(), 1);
    assert_eq!(ram.data_extents_uncached(100..110).unwrap(), []);
    assert_eq!(by_pieces(), 480);
    assert_eq!(ram.data_extents(96..128).unwrap(), [96..100, 110..128]);
    ram.punch(112..500).unwrap();
    assert_eq!(ram.data_extents(96..512).unwrap(), [96..100, 110..112]);
}

#[test]
fn files_back_memory_too() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let ram = GuestRam::create(&LAYOUT, &Backing::File(directory.path().to_owned())).unwrap();
    assert!(!ram.is_sealed());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);

    let path = directory.path().join("guest");
    let backing = Backing::File(path.clone());
    let ram = GuestRam::create(&LAYOUT, &backing).unwrap();
    assert_eq!(ram.regions()[1].offset, 5 * PAGE_SIZE);
    ram.memory().write_obj(7u64, GuestAddress(MIB)).unwrap();
    drop(ram);
    // What is there stays, and nothing is cut off.
    let again = GuestRam::create(&LAYOUT, &backing).unwrap();
    assert_eq!(again.memory().read_obj::<u64>(GuestAddress(MIB)).unwrap(), 7);
    GuestRam::create(&LAYOUT[..1], &backing).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 8 * PAGE_SIZE);

    let proc = GuestRam::create(&LAYOUT, &Backing::File("/proc".into()));
    assert!(matches!(proc, Err(RamError::Kernel { .. } | RamError::Kind { .. })), "{proc:?}");
    let nowhere = GuestRam::create(&LAYOUT, &Backing::File("/nonexistent/guest".into()));
    assert!(matches!(nowhere, Err(RamError::Open { .. })), "{nowhere:?}");
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let refused = |layout: &[(u64, u64)], part: &str| {
        let error = GuestRam::create(layout, &Backing::Memfd).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(&[], "not 0");
    refused(&[(0, PAGE_SIZE); 65], "1 to 64");
    refused(&[(0, 0)], "length");
    refused(&[(0, 100)], "length");
    refused(&[(100, PAGE_SIZE)], "address");
    refused(&[(u64::MAX - 4095, PAGE_SIZE)], "address");
    refused(&[(0, 2 * PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE)], "memory region 1 cannot be used: it must begin");
    refused(&[(0, u64::MAX - 4095)], "64 TiB");
    let huge = GuestRam::create(&[(0, MIB)], &Backing::HugeMemfd).unwrap_err();
    assert!(huge.to_string().contains("length"), "{huge}");
}

#[test]
fn descriptors_of_strangers_are_checked() {
    let refused = |regions: Vec<(Region, OwnedFd)>, part: &str| {
        let error = GuestRam::map(regions).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(vec![(region(0, 2 * PAGE_SIZE), memfd(2 * PAGE_SIZE - 1))], "has 8191 bytes");
    let beyond = Region { offset: PAGE_SIZE, ..region(0, PAGE_SIZE) };
    refused(vec![(beyond, memfd(PAGE_SIZE))], "ends at 8192");
    let huge = Region { page_bytes: 2 << 20, ..region(0, 2 * MIB) };
    refused(vec![(huge, memfd(2 * MIB))], "hugetlbfs with 2 MiB pages");
    let odd = Region { page_bytes: 0, ..region(0, PAGE_SIZE) };
    refused(vec![(odd, memfd(PAGE_SIZE))], "page size");
    refused(vec![(region(0, PAGE_SIZE), rustix::pipe::pipe().unwrap().0)], "no regular file");
    refused(
        vec![(region(0, PAGE_SIZE), std::fs::File::open("/proc/self/status").unwrap().into())],
        "file system",
    );
    let read_only = memfd(PAGE_SIZE);
    rustix::fs::fcntl_add_seals(&read_only, SealFlags::WRITE).unwrap();
    refused(vec![(region(0, PAGE_SIZE), read_only)], "map it into this process");

    // Twice the same bytes, by two descriptors of one file.
    let twice = memfd(3 * PAGE_SIZE);
    let other = twice.as_fd().try_clone_to_owned().unwrap();
    let second = Region { offset: PAGE_SIZE, ..region(MIB, 2 * PAGE_SIZE) };
    refused(vec![(region(0, 2 * PAGE_SIZE), twice), (second, other)], "regions 0 and 1 overlap");
}

#[test]
fn regions_of_one_file_hold_together_what_it_holds() {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let backing = Backing::File(file.path().to_owned());
    let ram = GuestRam::create(&[(0, MIB), (4 * MIB, MIB)], &backing).unwrap();
    ram.populate_write(250..260).unwrap();
    assert_eq!(ram.allocated_bytes().unwrap(), 10 * PAGE_SIZE);
    // What lies beyond the guest's memory cannot be told apart.
    std::os::unix::fs::FileExt::write_at(file.as_file(), &[1], 2 * MIB).unwrap();
    assert_eq!(ram.allocated_bytes().unwrap(), 11 * PAGE_SIZE);
}
