use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use memlane_lab::{HugePages, say_skipped};
use memlane_protocol::PAGE_SIZE;

use super::*;
use crate::ram::{Backing, is_zero};

const PAGES: u64 = 4096;
/// The variable that tells a test that it runs in a process of its own, and what it is to do there.
const CHILD: &str = "MEMLANE_TEST_CHILD";

/// Memory in a file, full of data, in two regions; and the file.
fn truncatable() -> (GuestRam, std::fs::File, tempfile::TempDir) {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("ram");
    let file = std::fs::File::create_new(&path).unwrap();
    let half = PAGES / 2 * PAGE_SIZE;
    let ram = GuestRam::create(&[(0, half), (1 << 30, half)], &Backing::File(path)).unwrap();
    ram.slices(0..PAGES).for_each(|slice| {
        // SAFETY: within the slice, which nobody else uses.
        unsafe { slice.ptr.write_bytes(7, slice.len) };
    });
    (ram, file, directory)
}

fn fault(result: io::Result<()>) -> Option<RamFault> {
    let error = result.err()?;
    Some(*error.get_ref().unwrap().downcast_ref().unwrap())
}

/// Reads all pages until `enough` says so; how many were zero when memory was still the guest's.
fn read_all(ram: &GuestRam, enough: impl Fn() -> bool) -> u64 {
    let mut wrong = 0;
    while !enough() {
        for slice in ram.slices(0..PAGES) {
            for page in 0..slice.len / PAGE_SIZE as usize {
                // SAFETY: inside the slice, which is mapped as long as the memory lives.
                let zero = unsafe { is_zero(slice.ptr.add(page * PAGE_SIZE as usize)) };
                wrong += u64::from(zero && ram.intact().is_ok());
            }
        }
    }
    wrong
}

#[test]
fn a_truncated_file_is_an_error_of_its_guest_alone() {
    install_sigbus_handler().unwrap();
    let ((ram, file, _one), (other, _file, _two)) = (truncatable(), truncatable());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> =
            (0..3).map(|_| scope.spawn(|| read_all(&ram, || ram.intact().is_err()))).collect();
        let neighbour = scope.spawn(|| read_all(&other, || done.load(Ordering::Relaxed)));
        std::thread::sleep(std::time::Duration::from_millis(20));
        file.set_len(100 * PAGE_SIZE).unwrap();
        for reader in readers {
            assert_eq!(reader.join().unwrap(), 0, "zeros were read and taken for the guest's");
        }
        done.store(true, Ordering::Relaxed);
        assert_eq!(neighbour.join().unwrap(), 0);
    });
    assert_eq!(fault(ram.intact()), Some(RamFault::Truncated));
    assert_eq!((fault(other.intact()), fault(other.check())), (None, None));
    // Whatever comes back is not what was there, and writing to what is left harms nobody.
    file.set_len(PAGES * PAGE_SIZE).unwrap();
    assert_eq!(fault(ram.check()), Some(RamFault::NoPage));
    for slice in ram.slices(0..PAGES) {
        // SAFETY: within the slice, which nobody else uses.
        unsafe { slice.ptr.write_bytes(1, slice.len) };
    }
}

#[test]
fn what_was_truncated_is_no_hole() {
    let (ram, file, _directory) = truncatable();
    assert_eq!(ram.data_extents(0..PAGES).unwrap(), vec![0..PAGES]);
    file.set_len(3000 * PAGE_SIZE).unwrap();
    // What is there may be asked about.
    assert_eq!(ram.next_data(0..10).unwrap(), Some(0));
    for looked in [
        ram.data_extents_uncached(2900..3100),
        ram.data_blocks(0..PAGES, 512),
        ram.data_extents_uncached(3500..PAGES),
    ] {
        assert_eq!(fault(looked.map(drop)), Some(RamFault::Truncated));
    }
    assert_eq!(fault(ram.intact()), Some(RamFault::Truncated));
}

#[test]
fn a_truncated_file_is_not_written_to() {
    let (ram, file, _directory) = truncatable();
    assert_eq!(fault(ram.check()), None);
    file.set_len(0).unwrap();
    assert!(!ram.is_unallocated(&(100..164)));
    let written = ram.write_pages(100..164, &[1; 64 * PAGE_SIZE as usize]);
    assert_eq!(fault(written), Some(RamFault::Truncated));
    assert_eq!((file.metadata().unwrap().len(), fault(ram.check())), (0, Some(RamFault::Truncated)));
}

#[test]
fn truncated_huge_pages_are_an_error_too() {
    let test = "truncated_huge_pages_are_an_error_too";
    let _pages = match HugePages::reserve(4) {
        Ok(pages) => pages,
        Err(error) => return say_skipped(test, &format!("{error:#}")),
    };
    install_sigbus_handler().unwrap();
    let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
    let fd = rustix::fs::memfd_create("huge", flags).unwrap();
    rustix::fs::ftruncate(&fd, 4 << 20).unwrap();
    let region = memlane_protocol::wire::machine::Region {
        address: 0,
        bytes: 4 << 20,
        page_bytes: 2 << 20,
        offset: 0,
    };
    let ram = GuestRam::map(vec![(region, fd.try_clone().unwrap())]).unwrap();
    assert!(!ram.is_sealed());
    ram.populate_write(0..1024).unwrap();
    rustix::fs::ftruncate(&fd, 2 << 20).unwrap();
    let mut page = [0; PAGE_SIZE as usize];
    assert!(ram.copy_page(100, &mut page) && ram.intact().is_ok());
    assert!(ram.copy_page(1000, &mut page));
    assert_eq!(fault(ram.intact()), Some(RamFault::Truncated));
}

#[test]
fn mappings_come_and_go_in_any_number() {
    install_sigbus_handler().unwrap();
    let all: Vec<GuestRam> = (0..3 * BLOCK_SLOTS)
        .map(|_| GuestRam::create(&[(0, PAGE_SIZE), (1 << 20, PAGE_SIZE)], &Backing::Memfd).unwrap())
        .collect();
    let held = |ram: &GuestRam| ram.sigbus_guard.slots.iter().all(|slot| slot.read().is_some());
    assert!(all.iter().all(held));
    let slots: Vec<&Slot> = all.iter().flat_map(|ram| ram.sigbus_guard.slots.clone()).collect();
    let starts: Vec<usize> = slots.iter().map(|slot| slot.start.load(Ordering::SeqCst)).collect();
    drop(all);
    // Another test may have taken one of them by now.
    let stale = slots.iter().zip(starts).filter(|(slot, start)| {
        slot.read().is_some_and(|(found, bytes, _)| found == *start && bytes == PAGE_SIZE as usize)
    });
    assert!(stale.count() < slots.len() / 2);
}

/// What happens elsewhere is none of the handler's business: the process ends, as ever.
#[test]
fn any_other_fault_ends_the_process() {
    let test = "any_other_fault_ends_the_process";
    if let Ok(what) = std::env::var(CHILD) {
        install_sigbus_handler().unwrap();
        if what == "sent" {
            // SAFETY: a signal to this process, which is to end.
            unsafe { libc::raise(libc::SIGBUS) };
        } else {
            let file = tempfile::tempfile_in("/dev/shm").unwrap();
            // SAFETY: a new mapping, of a file that is shorter; reading it is the fault that is wanted.
            unsafe {
                let flags = MapFlags::SHARED;
                let at = rustix::mm::mmap(ptr::null_mut(), 4096, ProtFlags::READ, flags, &file, 0).unwrap();
                at.cast::<u8>().read_volatile();
            }
        }
        std::process::exit(0);
    }
    for what in ["sent", "fault"] {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.env(CHILD, what).args([&format!("ram::sigbus::tests::{test}"), "--exact"]);
        let status = child.output().unwrap().status;
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{what}: {status}");
    }
}
